"""Hooks read and change a network's values and gradients while its code stays as it is.

A hook is a function f of yours that PyTorch calls before or after a layer runs, or when a gradient
arrives. What f returns replaces what the last column below names; None changes nothing. So you
can print shapes in a network that somebody else wrote, clip a gradient, reverse the gradient of
one loss, or find the layer that makes a NaN. A hook that nobody removes runs in every later call.

    call                                 f is called as                  f may return
    a.register_hook(f)                   f(g), g = dL/da                 another g
    m.register_forward_pre_hook(f)       f(m, args), before m(*args)     other args
    m.register_forward_hook(f)           f(m, args, output)              another output
    m.register_full_backward_hook(f)     f(m, grad_input, grad_output)   another grad_input

    a  a tensor     L  the loss     m  a module: a layer or a network
    grad_input, grad_output    tuples: the gradients of L with respect to args and to the output

Section 6, Grad-CAM, asks where in a picture a network sees a class: read it after train.py.

Needs          02_autograd_basics.py; nn_seq.py explains nn.Sequential, a chain of layers
Checked here   what hooks see and change; how often they run; a NaN traced to its layer; Grad-CAM's
               answers, with an untrained network, a wrong class and a map of no class beside them
TensorBoard    hooks/runs by call: forgotten rises faster and faster, removed by 1 a call. The
               picture cam/heat: in the run trained most red lies on the shape that it is for
Try            in reverse_by_hook, take out the line with view_as: which gradient is reversed too?
Answer         That of a^2, to -4: the hook then sits on a itself, and changes all that comes back
Source         Selvaraju et al. 2017, arXiv:1610.02391 (Grad-CAM); Ganin & Lempitsky 2015,
               arXiv:1409.7495 (gradient reversal)
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import autograd, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model import Moli
from support.drawings import CLASSES, Shapes10
from support.files import DATASET2, guard
from support.pictures import heat_columns

LOG_DIR = Path(__file__).resolve().parent / "runs" / "04_hooks"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    print("1. In everyday code: which shape has each layer's output? A forward hook prints a row")
    print("   layer         output")
    net = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    for name, layer in net.named_children():  # name=name: each hook keeps its own name
        layer.register_forward_hook(lambda m, args, output, name=name: print(
            f"   {name}   {type(m).__name__:<8}  {tuple(output.shape)}"))  # fmt: skip
    net(torch.zeros(5, 3, 8, 8))  # net is freed when this function ends, and its hooks with it

    print("   Three hooks of a: see its gradient, clip it, see it again")
    print("   a = 3 x, L = sum of a^2, x = (-2, 1, 2)")
    x = torch.tensor([-2.0, 1.0, 2.0], requires_grad=True)
    a = 3 * x
    a.retain_grad()  # keeps in a.grad what is left after all hooks of a
    a.register_hook(lambda g: print(f"   dL/da = 2 a            {g.tolist()}"))  # returns None
    a.register_hook(lambda g: g.clamp(-10, 10))  # returns what goes on
    a.register_hook(lambda g: print(f"   after clamp(-10, 10)   {g.tolist()}"))
    a.square().sum().backward()
    print(f"   a.grad                 {a.grad.tolist()}")
    print(f"   x.grad = 3 a.grad      {x.grad.tolist()}")
    held = "the clipped gradient" if a.grad.abs().max() <= 10 else "the gradient as it came"
    print(f"   -> x.grad is {x.grad.tolist()}, without a hook {(18 * x).tolist()}; "
          f"a.grad holds {held}")  # fmt: skip
    return a.grad, x.grad


# --- 2. change a gradient on its way -----------------------------------------------------------


def reverse_by_hook(a, strength):
    """A view of a: forward the same numbers, backward the gradient times -strength.

    Other code that uses a keeps its gradient: the hook sits on the view a.view_as(a), not on a. If
    a requires no gradient, there is nothing to hook. Ganin & Lempitsky use it to train features
    that do NOT help a second loss. Exercise.
    """
    a = a.view_as(a)
    if a.requires_grad:
        a.register_hook(lambda g: -strength * g)
    return a


def show_reversal(strength=0.5):
    print("2. Can the gradient of one loss be reversed, and that of another be left alone?")
    print(f"   a = 2 x at x = 1, and b = reverse_by_hook(a, {strength})")
    print("   loss   dL/dx   without the hook")
    x = torch.tensor(1.0, requires_grad=True)
    a = 2 * x
    b = reverse_by_hook(a, strength)
    bare = 2 * x
    slopes = {}
    for name, losses in (("a^2", (a**2, bare**2)), ("3 b", (3 * b, 3 * bare))):
        slope, plain = (autograd.grad(loss, x, retain_graph=True)[0].item() for loss in losses)
        slopes[name] = slope, plain
        print(f"   {name:<4} {slope:7.1f}   {plain:16.1f}")
    turned = [name for name, (slope, plain) in slopes.items() if slope == -strength * plain]
    print(f"   -> multiplied by {-strength}: the gradient of {' and of '.join(turned)}")
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
    print("3. Hooks of modules: in which order do they run, and what does a backward hook get?")
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, log = torch.randn(6, 3, requires_grad=True), []
    handles = record_calls(net, log)
    net(x).sum().backward()
    noted = len(log)
    print("   the calls, of Linear 0, ReLU 1, Linear 2:")
    print(f"   {', '.join(log)}")
    for handle in handles:
        handle.remove()
    net(x).sum().backward()

    a, seen = torch.tensor([-1.0, 2.0], requires_grad=True), []
    with net[1].register_full_backward_hook(lambda m, gi, go: seen.extend([*go, *gi])):
        net[1](a).backward(torch.tensor([3.0, 5.0]))
    go, gi = (g.tolist() for g in seen)
    print(f"   the backward hook of ReLU 1, its input {a.tolist()}:")
    print(f"   grad_output, which arrives    {go}")
    print(f"   grad_input, which goes on     {gi}")
    later = len(log) - noted
    print(f"   -> {noted} calls in one pass; after remove() {later} more in the next one")
    return {"log": log, "relu": (go, gi)}


# --- 4. the forgotten hook ---------------------------------------------------------------------


def count_runs(calls, remove):
    """Before each of `calls` calls register a hook, and remove it after the call, or not.

    Returns how often hooks have run after each call, a list.
    """
    layer, ran, counts = nn.Linear(2, 2), [], []
    for _ in range(calls):
        handle = layer.register_forward_hook(lambda m, args, output: ran.append(1))
        layer(torch.zeros(1, 2))
        if remove:
            handle.remove()
        counts.append(len(ran))
    return counts


def show_forgotten(log_dir, calls=20):
    print("4. A hook is registered before each call: what if it is not removed after the call?")
    print(f"   hooks       had run after 1 call   2 calls   3 calls   {calls} calls")
    counts = {"forgotten": count_runs(calls, False), "removed": count_runs(calls, True)}
    for name, n in counts.items():
        print(f"   {name:<9}   {n[0]:20d}   {n[1]:7d}   {n[2]:7d}   {n[-1]:8d}")
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for call, runs in enumerate(n, 1):
                writer.add_scalar("hooks/runs", runs, call)
    last = {name: n[-1] - n[-2] for name, n in counts.items()}
    print(f"   -> call {calls} ran {last['forgotten']} hooks where they were forgotten, "
          f"{last['removed']} where they were removed")  # fmt: skip
    return counts


# --- 5. where does the NaN come from? ----------------------------------------------------------


class Layer(nn.Module):
    """Any function f(x, w) as a layer with one weight, w = 0."""

    def __init__(self, f):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.f(x, self.w)


# PyTorch's own search, torch.autograd.set_detect_anomaly(True), stops at a gradient that is NaN and
# shows the line of code that it belongs to; it looks at no output, and takes inf for good.
def find_nan(model, x):
    """What is the first to be infinite or NaN as x goes through the children of `model` and back?

    "output of NAME", "gradient of NAME" (what a child hands back to its input), "gradient of
    NAME.PARAMETER", or None. Each child takes one tensor and returns one; x holds floats, and is
    not changed. No hook stays. Exercise.
    """
    handles = []

    def check(where, tensor):
        if not tensor.isfinite().all():
            raise FloatingPointError(where)

    def watch(a, name):
        a = a.view_as(a)  # so that the hook sees this child's gradient only, as in section 2
        if a.requires_grad:
            a.register_hook(lambda g: check(f"gradient of {name}", g))
        return a

    try:
        for n, m in model.named_children():
            handles.append(m.register_forward_pre_hook(lambda m, args, n=n: watch(*args, n)))
            handles.append(m.register_forward_hook(
                lambda m, args, output, n=n: check(f"output of {n}", output)))  # fmt: skip
        for n, p in model.named_parameters():
            if p.requires_grad:  # a frozen one gets no gradient
                handles.append(p.register_hook(lambda g, n=n: check(f"gradient of {n}", g)))
        model(x.detach().requires_grad_().clone()).sum().backward()
    except FloatingPointError as error:
        return str(error)
    finally:
        for handle in handles:
            handle.remove()


def show_nan(depth=6, width=8):
    print(f"5. A layer is put before each of {depth} Linear layers in turn: is a bad one found?")
    print("   (find_nan(net, x) says which output or gradient is the first to be NaN or infinite.")
    print("   sqrt(x) and its slope are NaN for x < 0, and 0 * NaN is NaN.")
    print(f"   w = 0 is the weight of the layer put in, {depth - 1}.w in layer {depth - 1}; "
          "the slope of sqrt is infinite at 0.)")  # fmt: skip
    print(f"   layer put in                right answers   answer when it was layer {depth - 1}")
    layers, found = [nn.Linear(width, width) for _ in range(depth)], {}
    x = torch.randn(16, width)
    for form, f, what in (
        ("sqrt(x)", lambda x, w: x.sqrt(), "output of {}"),
        ("where(x > 0, sqrt(x), 0)", lambda x, w: torch.where(x > 0, x.sqrt(), 0),
         "gradient of {}"),
        ("x + sqrt(w)", lambda x, w: x + w.sqrt(), "gradient of {}.w"),
        ("x + w, nothing bad", lambda x, w: x + w, "None"),
    ):  # fmt: skip
        said = [str(find_nan(nn.Sequential(*layers[:n], Layer(f), *layers[n:]), x))
                for n in range(depth)]  # fmt: skip
        found[form] = sum(said[n] == what.format(n) for n in range(depth))
        print(f"   {form:<26}  {found[form]:8d} of {depth}   {said[-1]}")
    right = f"{sum(found.values())} of {depth * len(found)}"
    print(f"   -> {right} answers name the bad layer and what is bad, or None if nothing is")
    return found


# --- 6. Grad-CAM: where does the network see class c? ------------------------------------------


def make_network():
    """Moli's three blocks, the mean over all positions, one Linear: (B, 3, H, W) -> (B, 3)."""
    return nn.Sequential(Moli().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))


def grad_cam(model, layer, x, c):
    """Heat (B, h, w) of pictures x: high at the positions that raise z_c, for the classes c (B,).

    z_c is the number (logit) that the network gives class c. A (B, C, h, w) is the output of
    `layer`, kept by a forward hook: A_k, channel k, says where a pattern was found. alpha_k (B, C)
    says how much z_c rises with it: the mean over all positions of dz_c/dA_k, for which one
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
    (G,) = autograd.grad(z.gather(1, c[:, None]).sum(), A)  # gather: z_c of each picture
    alpha = G.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    return F.relu((alpha * A).sum(1)).detach()


def open_shapes(root, train):
    """The circles, rings and squares (N, 3, 32, 32) of Shapes-10 and their classes 0, 1, 2 (N,)."""
    shapes = Shapes10(root, train)
    labels = torch.tensor(shapes.targets)
    x = torch.from_numpy(shapes.data)[labels < 3].permute(0, 3, 1, 2) / 255 * 4 - 2
    return x.contiguous(), labels[labels < 3]


def pair_up(x, labels, count):
    """Pictures (N, 3, 32, 64) of two shapes of different classes, and their classes (N, 2)."""
    left, right = torch.randint(len(x), (2, 4 * count))
    differ = (labels[left] != labels[right]).nonzero()[:count, 0]
    left, right = left[differ], right[differ]
    return torch.cat([x[left], x[right]], dim=3), torch.stack([labels[left], labels[right]], 1)


def share_right(heats):
    """How often the half asked for has more heat: maps (N, h, w) for the left class, the right one.

    Two halves with the same heat count as half right.
    """
    left, right = (heat.unflatten(2, (2, -1)).sum((1, 3)) for heat in heats)  # each (N, 2)
    more = torch.cat([left[:, 0] - left[:, 1], right[:, 1] - right[:, 0]])
    return (1 + more.sign().mean().item()) / 2


def train(model, x, labels, epochs, batch, lr=0.003):
    """Train on single shapes, as train.py does."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for i in tqdm(torch.randperm(len(x)).split(batch), disable=None, leave=False):
            loss = F.cross_entropy(model(x[i]), labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def show_grad_cam(log_dir, root, epochs, batch, asked):
    print("6. Grad-CAM marks by heat where a network sees a class: does the shape lie there?")
    x, labels = open_shapes(root, train=True)
    pictures, classes = pair_up(*open_shapes(root, train=False), asked)
    model = make_network().eval()

    def ask(classes):  # for the classes of the left shapes, then of the right ones
        return [grad_cam(model, model[0], pictures, c) for c in classes.T]

    untrained = ask(classes)
    train(model, x, labels, epochs, batch)
    other = (classes + 1) % 3  # the class of the other shape, or of neither
    trained, wrong = ask(classes), ask(other)
    blind = model[0](pictures).detach().abs().sum(1)  # one map for both questions
    shares = {
        "the trained network": share_right(trained),
        "the untrained network": share_right(untrained),
        "the trained one, for a wrong class": share_right(wrong),
        "sum of |A_k|, for no class": share_right([blind, blind]),
    }
    answers = 2 * len(pictures)
    # four standard errors, of pictures: the two answers from one picture may depend on each other
    luck = 0.5 + 4 * 0.5 / len(pictures) ** 0.5
    print(f"   {len(pictures)} pictures of two shapes, of circle, ring, square. The heat for")
    print("   the left one's class should lie on the left, that for the right one's on the right.")
    print(f"   heat of                              right, of {answers} answers   by guessing")
    for name, share in shares.items():
        print(f"   {name:<34} {share:21.3f}   {0.5:11.3f}")
    print("   (A wrong class is that of the other shape, whose heat should lie on the other side,")
    print("   or that of neither: so less than 0.5 is expected. The sum of |A_k| is what the last")
    print("   block puts out, one map for both answers.)")
    better = " and ".join(name for name, share in shares.items() if share > luck)
    print(f"   -> above {luck:.2f}, which guessing hardly ever reaches: {better or 'none'}")
    grey = (pictures.mean(1) / 4 + 0.5).clamp(0, 1)
    title = "Grad-CAM: red speaks for the class that is asked for"
    words = [f"top: the picture\nmiddle: for {CLASSES[left]}\nbottom: for {CLASSES[right]}"
             for left, right in classes[:3].tolist()]  # fmt: skip
    for run, heats in (("untrained", untrained), ("trained", trained)):
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            writer.add_image("cam/heat", heat_columns(title, grey, heats, words), 0)
    return shares


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, epochs=2, batch=32, asked=200):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "reversal": show_reversal(),
        "modules": show_module_hooks(),
        "forgotten": show_forgotten(log_dir),
        "nan": show_nan(),
        "cam": show_grad_cam(log_dir, root, epochs, batch, asked),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
