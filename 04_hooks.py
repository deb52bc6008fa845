"""Hooks read and change a network's values and gradients while its code stays as it is.

A hook is a function that PyTorch calls before or after a layer runs, or when a gradient arrives.
What the hook returns is used instead; None changes nothing. So you see into a network that somebody
else wrote: print shapes, clip a gradient, find the layer that makes a NaN, ask where in a picture
a class was seen. A hook that nobody removes stays, runs in every later call and may keep memory.

    a.register_hook(f)                   f(g): g = dL/da, gradient of the loss L with respect to a
    m.register_forward_pre_hook(f)       f(m, args): before module m computes m(*args)
    m.register_forward_hook(f)           f(m, args, output): after it
    m.register_full_backward_hook(f)     f(m, grad_input, grad_output): tuples dL/dargs, dL/doutput

Grad-CAM, "gradient-weighted class activation map", is high at the places that raise z_c, the logit
of class c. A_k, channel k of a layer's output, says where a pattern was found; alpha_k says how
much z_c rises if there is more of it. In a picture of two shapes a map that does not know c is
right about one of the two, a share of 0.5. Grad-CAM must be better.

    heat = relu(sum_k alpha_k A_k),   alpha_k = mean over all places of dz_c/dA_k

Needs          02_autograd_basics.py; for section 6 model.py
Checked here   what hooks see, change and keep alive; NaN traced to its layer; in which half of a
               picture Grad-CAM sees a shape, untrained and asked for a wrong class too
TensorBoard    leak/hidden_kB by call: the run forgotten rises, removed is 0; the picture cam/heat,
               in the runs untrained and trained: is the heat on the shape that was asked for?
Try            in reverse_by_hook, take out the line with view_as: whose gradient turns as well?
Answer         The label's as well: a hook on a itself gets all that comes back to a
Source         Selvaraju et al. 2017, arXiv:1610.02391 (Grad-CAM); Ganin & Lempitsky 2015,
               arXiv:1409.7495 (reversal)
"""

import signal
import weakref
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model import Moli
from support.drawings import CLASSES, Shapes10
from support.files import DATASET2, guard
from support.pictures import caption_row, heat_over

LOG_DIR = Path(__file__).resolve().parent / "runs" / "04_hooks"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    print("1. In everyday code: what is the shape of every layer's output?")
    print("   layer         output")
    net = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    for name, layer in net.named_children():  # name=name: each hook keeps its own name
        layer.register_forward_hook(lambda m, args, output, name=name: print(
            f"   {name}   {type(m).__name__:<8}  {tuple(output.shape)}"))  # fmt: skip
    net(torch.zeros(5, 3, 8, 8))  # net ends with this function: no hook has to be removed

    print("   A gradient seen, clipped, seen again: a = 3 x, L = sum of a^2, x = (-2, 1, 2)")
    x = torch.tensor([-2.0, 1.0, 2.0], requires_grad=True)
    a = 3 * x
    a.retain_grad()  # keeps in a.grad what is left after all hooks of a
    a.register_hook(lambda g: print(f"   dL/da = 2 a            {g.tolist()}"))  # returns None
    a.register_hook(lambda g: g.clamp(-10, 10))  # returns what goes on
    a.register_hook(lambda g: print(f"   after clamp(-10, 10)   {g.tolist()}"))
    a.square().sum().backward()
    print(f"   a.grad                 {a.grad.tolist()}")
    print(f"   x.grad = 3 times it    {x.grad.tolist()}")
    state = "changed" if x.grad.tolist() != (18 * x).tolist() else "as without hooks"
    when = "after" if a.grad.abs().max() <= 10 else "before"
    print(f"   -> x.grad is {state}; retain_grad kept the gradient {when} the clamp")
    return a.grad, x.grad


# --- 2. change a gradient on its way -----------------------------------------------------------


def reverse_by_hook(a, lam):
    """Returns a view of a: forward the same numbers, backward the gradient times -lam.

    What else reads a keeps its gradient: the hook sits on the view a.view_as(a), not on a. If a
    requires no gradient, there is nothing to hook. Exercise.
    """
    a = a.view_as(a)
    if a.requires_grad:
        a.register_hook(lambda g: -lam * g)
    return a


def show_reversal(lam=0.5):
    print(
        f"2. In your own code: two losses read a = 2 x at x = 1, one by reverse_by_hook(a, {lam})"
    )
    print("   (domain adaptation: the features a shall not tell from which domain x is)")
    print("   loss           dL/dx   without a hook")
    x, slopes = torch.tensor(1.0, requires_grad=True), {}
    a = 2 * x
    turned = reverse_by_hook(a, lam)
    for name, loss, by_hand in (("label, a^2", a**2, 8.0), ("domain, 3 a", 3 * turned, 6.0)):
        slopes[name] = torch.autograd.grad(loss, x, retain_graph=True)[0].item(), by_hand
        print(f"   {name:<12} {slopes[name][0]:7.1f}   {by_hand:14.1f}")
    times = [name for name, (g, by_hand) in slopes.items() if g == -lam * by_hand]
    print(f"   -> multiplied by {-lam}: the gradient of {' and of '.join(times)}")
    return slopes


# --- 3. hooks of modules -----------------------------------------------------------------------


def record_calls(model, log):
    """Make each child of `model` append "pre NAME", "forward NAME", "backward NAME" to `log`.

    Returns the handles of the hooks, three for each child; their remove() takes them off. Exercise.
    """
    handles = []
    for name, layer in model.named_children():  # n=name: each hook keeps its own name
        handles += [
            layer.register_forward_pre_hook(lambda *_, n=name: log.append(f"pre {n}")),
            layer.register_forward_hook(lambda *_, n=name: log.append(f"forward {n}")),
            layer.register_full_backward_hook(lambda *_, n=name: log.append(f"backward {n}")),
        ]
    return handles


def show_module_hooks():
    print("3. Hooks of modules: in which order do they run, and what does one on a ReLU get?")
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, log = torch.randn(6, 3, requires_grad=True), []
    handles = record_calls(net, log)
    net(x).sum().backward()
    noted = len(log)
    print(f"   {', '.join(log)}")
    for handle in handles:
        handle.remove()
    net(x).sum().backward()

    a, seen = torch.tensor([-1.0, 2.0], requires_grad=True), []
    with net[1].register_full_backward_hook(lambda m, gi, go: seen.extend([*go, *gi])):
        net[1](a).backward(torch.tensor([3.0, 5.0]))
    go, gi = (g.tolist() for g in seen)
    print(f"   ReLU at {a.tolist()}: in comes grad_output = dL/doutput = {go},")
    print(f"                        out goes grad_input = dL/dinput = {gi}")
    later = len(log) - noted
    print(f"   -> {noted} calls in one pass; after remove() {later} more in the next one")
    return {"log": log, "relu": (go, gi)}


# --- 4. the forgotten hook ---------------------------------------------------------------------


def leak(calls, remove, detach=False, batch=32, width=256):
    """Read the logits by a hook in `calls` calls, and remove the hook after each, or not.

    Returns the bytes of hidden activations alive after each call, and how often hooks ran in all.
    """
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    x, hidden, alive, runs = torch.randn(batch, 64), [], [], []
    # A weak reference keeps nothing alive: it becomes None when nobody else holds the output.
    model[1].register_forward_hook(lambda m, args, output: hidden.append(weakref.ref(output)))

    def read_logits():
        kept = []

        def keep(module, args, output):
            runs.append(1)
            kept.append(output.detach() if detach else output)

        handle = model[2].register_forward_hook(keep)
        model(x)
        if remove:
            handle.remove()

    for _ in range(calls):
        read_logits()
        alive.append(sum(ref().nbytes for ref in hidden if ref() is not None))
    return alive, len(runs)


def show_leak(log_dir, calls=20):
    print(f"4. Logits read by a hook in {calls} calls: what does a forgotten hook cost?")
    print("   (a forgotten hook runs in all later calls too: "
          f"1 + 2 + ... + {calls} = {calls * (calls + 1) // 2})")  # fmt: skip
    print("   hook                  hooks ran   hidden activations kept alive")
    measured = {
        "forgotten": leak(calls, remove=False),
        "forgotten, detached": leak(calls, remove=False, detach=True),
        "removed": leak(calls, remove=True),
    }
    for name, (alive, runs) in measured.items():
        print(f"   {name:<20} {runs:10d}   {alive[-1] / 1000:26.1f} kB")
    for name in ("forgotten", "removed"):
        curve = {n: alive / 1000 for n, alive in enumerate(measured[name][0], 1)}
        draw(log_dir / name, "leak/hidden_kB", curve)
    leaks = [name for name, (alive, _) in measured.items() if alive[-1]]
    once = [name for name, (_, runs) in measured.items() if runs == calls]
    print(f"   -> memory leaks: {' and '.join(leaks)}; one run per call: {' and '.join(once)}")
    return measured


# --- 5. where does the NaN come from? ----------------------------------------------------------


class Layer(nn.Module):
    """Any function f(x, w) as a layer with one weight, w = 0."""

    def __init__(self, f):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.f(x, self.w)


def find_nan(model, x):
    """What is the first to be infinite or NaN as x goes through the children of `model` and back?

    "output of NAME", "gradient of NAME" (what a child hands back to its input), "gradient of
    NAME.PARAMETER", or None. No hook stays. Exercise.
    """

    def check(where, tensor):
        if not tensor.isfinite().all():
            raise FloatingPointError(where)

    handles = []
    for n, m in model.named_children():
        handles += [
            m.register_forward_hook(lambda m, args, out, n=n: check(f"output of {n}", out)),
            m.register_full_backward_hook(lambda m, gi, go, n=n: check(f"gradient of {n}", gi[0])),
        ]
    for n, p in model.named_parameters():
        handles.append(p.register_hook(lambda g, n=n: check(f"gradient of {n}", g)))
    try:
        model(x.detach().requires_grad_()).sum().backward()
    except FloatingPointError as error:
        return str(error)
    finally:
        for handle in handles:
            handle.remove()


def show_nan(depth=6, width=8):
    print(f"5. A faulty layer put before each of {depth} layers in turn: which one do hooks name?")
    print("   (the slope of sqrt(x) is NaN for x < 0, and 0 * NaN is NaN; w is a layer's weight)")
    print(f"   faulty layer                 found   message when it was layer {depth - 1}")
    layers, found = [nn.Linear(width, width) for _ in range(depth)], {}
    x = torch.randn(16, width)
    for form, f, what in (
        ("sqrt(x)", lambda x, w: x.sqrt(), "output of {}"),
        (
            "where(x > 0, sqrt(x), 0)",
            lambda x, w: torch.where(x > 0, x.sqrt(), 0),
            "gradient of {}",
        ),
        ("x + sqrt(w), w = 0", lambda x, w: x + w.sqrt(), "gradient of {}.w"),
        ("x + w (no fault)", lambda x, w: x + w, "None"),
    ):
        said = [str(find_nan(nn.Sequential(*layers[:n], Layer(f), *layers[n:]), x))
                for n in range(depth)]  # fmt: skip
        found[form] = sum(said[n] == what.format(n) for n in range(depth))
        print(f"   {form:<26} {found[form]:2d} of {depth}   {said[-1]}")
    right = f"{sum(found.values())} of {depth * len(found)}"
    print(f"   -> {right} answers name the faulty layer, or none where there is none")
    return found


# --- 6. Grad-CAM: where does the network see class c? ------------------------------------------


def make_network():
    """Moli's three blocks, the mean over all places, one Linear layer: (B, 3, H, W) -> (B, 3)."""
    mean_and_linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(Moli().features, *mean_and_linear).to(memory_format=torch.channels_last)


def grad_cam(model, layer, x, c):
    """Heat (B, h, w) for the classes c (B,), from the output A (B, C, h, w) of `layer`.

    A comes from a forward hook; alpha (B, C) is the mean over all places of dz_c/dA, for which one
    torch.autograd.grad of the sum of all z_c is enough. Returns relu(sum_k alpha_k A_k), detached.
    Raises ValueError in training mode (batch norm mixes images) and if c is not (B,). Exercise.
    """
    if model.training:
        raise ValueError("Grad-CAM explains one image at a time: call model.eval() first")
    kept = []
    with layer.register_forward_hook(lambda m, args, output: kept.append(output)):
        z = model(x)  # (B, K)
    if c.shape != z.shape[:1]:
        raise ValueError(f"classes {tuple(c.shape)} for logits {tuple(z.shape)}")
    (A,) = kept
    (G,) = torch.autograd.grad(z.gather(1, c[:, None]).sum(), A)  # gather: z_c of each picture
    alpha = G.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    return F.relu((alpha * A).sum(1)).detach()


def open_shapes(root, train, count):
    """Up to `count` circles, rings, squares (N, 3, 32, 32) of Shapes-10 and their classes (N,)."""
    shapes = Shapes10(root, train)
    labels = torch.tensor(shapes.targets)
    keep = (labels < 3).nonzero()[:count, 0]
    x = torch.from_numpy(shapes.data)[keep].permute(0, 3, 1, 2).float() / 255 * 4 - 2
    return x.contiguous(memory_format=torch.channels_last), labels[keep]


def pair_up(x, labels, count):
    """Pictures (N, 3, 32, 64) of two shapes of different classes, and their classes (N, 2)."""
    left, right = torch.randint(len(x), (2, 4 * count))
    differ = (labels[left] != labels[right]).nonzero()[:count, 0]
    left, right = left[differ], right[differ]
    pictures = torch.cat([x[left], x[right]], dim=3).contiguous(memory_format=torch.channels_last)
    return pictures, torch.stack([labels[left], labels[right]], 1)


def share_found(heats):
    """How often the half with more heat is the half asked for: heats for the left class, the right.

    Two maps (N, h, w). Maps that do not know the class are equal, and right in one of two: 0.5.
    """
    halves = [heat.unflatten(2, (2, -1)).sum((1, 3)) for heat in heats]  # two times (N, 2)
    on_the_right = [half[:, 1] > half[:, 0] for half in halves]
    return torch.cat([~on_the_right[0], on_the_right[1]]).float().mean().item()


def ask(model, layer, pictures, classes):
    """Grad-CAM for the left shape's class and for the right one's."""
    return [grad_cam(model, layer, pictures, c) for c in classes.T]


def train(model, x, labels, epochs, batch, lr=0.01):
    """Train on single shapes, with a learning rate that rises and falls."""
    batches = [i for _ in range(epochs) for i in torch.randperm(len(x)).split(batch)]
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    model.train()
    for i in tqdm(batches, disable=None, leave=False):
        loss = F.cross_entropy(model(x[i]), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def heat_pictures(pictures, classes, heats, count=3):
    """Each picture above its heat for the left class, above its heat for the right class."""
    grey = (pictures.mean(1) / 4 + 0.5).clamp(0, 1)
    shown = [heat_over(grey, torch.zeros_like(grey)), *(heat_over(grey, heat) for heat in heats)]
    words = [
        f"top: the picture\nmiddle: {CLASSES[left]}?\nbottom: {CLASSES[right]}?"
        for left, right in classes[:count].tolist()
    ]
    title = "Grad-CAM: red speaks for the class that is asked for"
    return caption_row(title, torch.cat(shown, dim=2)[:count], words, height=192)


def show_grad_cam(log_dir, root, images, epochs, batch, asked):
    print("6. Two shapes side by side: where does Grad-CAM see the circle, the ring, the square?")
    x, labels = open_shapes(root, train=True, count=images)
    test_x, test_labels = open_shapes(root, train=False, count=600)
    pictures, classes = pair_up(test_x, test_labels, asked)
    model = make_network().eval()
    wrong = (classes + 1) % 3  # the class of the other shape, or of none
    blocks, heats = model[0], {"untrained": ask(model, model[0], pictures, classes)}
    train(model, x, labels, epochs, batch)
    heats["trained"] = ask(model, blocks, pictures, classes)
    for run, pair in heats.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            writer.add_image("cam/heat", heat_pictures(pictures, classes, pair), 0)

    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_labels).float().mean().item()
        equal = blocks(pictures).abs().sum(1)
    print(f"   classes of single test shapes: {accuracy:.3f} right, chance 0.333")
    print(f"   {'map':<42}   share right, of {2 * len(pictures)} questions; chance 0.5")
    found = {
        "Grad-CAM, block 3 (the last)": share_found(heats["trained"]),
        "Grad-CAM, block 2": share_found(ask(model, blocks[1], pictures, classes)),
        "Grad-CAM, block 1": share_found(ask(model, blocks[0], pictures, classes)),
        "Grad-CAM, block 3, untrained": share_found(heats["untrained"]),
        "Grad-CAM, block 3, next class": share_found(ask(model, blocks, pictures, wrong)),
        "sum of |channels| (equal maps: always 0.5)": share_found([equal, equal]),
    }
    for name, share in found.items():
        print(f"   {name:<42}   {share:.3f}")
    best, _, _, untrained, other, _ = found.values()
    nulls = f"untrained in {untrained:.3f}, asked for the next class in {other:.3f}"
    print(f"   -> block 3 is right in {best:.3f} of the questions; {nulls}")
    return {"accuracy": accuracy, "found": found}


# --- the run -----------------------------------------------------------------------------------


def draw(log_dir, tag, curve):
    """Write a dict {step: value} as one curve."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, value in curve.items():
            writer.add_scalar(tag, value, step)


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, images=2000, epochs=2, batch=32, asked=200):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "reversal": show_reversal(),
        "modules": show_module_hooks(),
        "leak": show_leak(log_dir),
        "nan": show_nan(),
        "cam": show_grad_cam(log_dir, root, images, epochs, batch, asked),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
