"""Hooks read and change a network's values and gradients while its code stays as it is.

    h.register_hook(f)                  f(g) -> None, or the gradient to go on with
    m.register_forward_pre_hook(f)      f(m, args) -> None, or other args
    m.register_forward_hook(f)          f(m, args, output) -> None, or another output
    m.register_full_backward_hook(f)    f(m, grad_input, grad_output) -> None, or another grad_input

    CAM         heat = relu(sum_k w_ck A_k)       where y_c = sum_k w_ck mean_ij A_kij + b_c
    Grad-CAM    heat = relu(sum_k alpha_k A_k)    where alpha_k = mean_ij dy_c/dA_kij

So you see into a network that somebody else wrote. Grad-CAM takes the activations A of one layer by
a hook and shows where in a picture the network saw class c. CAM needs global average pooling over Z
places and one Linear layer, which Moli gets here for its classifier: there alpha_k = w_ck / Z, and
the two agree. Grad-CAM goes on where CAM cannot, as at the last convolution. Every heat map has a
peak, so it meets nulls: a shape at half its size in a random corner of noise, where one fixed guess
is right at most one time in four; an untrained network; another picture's box.

Checked here   what tensor hooks see and leave; reversal by hook and by Function; the order of
               module hooks; what a forgotten one keeps alive; NaN traced to its layer; Grad-CAM
               against CAM; how many peaks lie in the shape's box
TensorBoard    leak/hidden_kB, runs forgotten, removed; cam/peak_in_box while Moli learns, runs
               own_box, another_box; cam/heat with the shapes' boxes, runs untrained, trained
Try            hook h, not a view of it, in reverse_by_hook: what else turns? The label's gradient
Source         Ganin & Lempitsky 2015, arXiv:1409.7495 (reversal); Zhou et al. 2016,
               arXiv:1512.04150 (CAM); Selvaraju et al. 2017, arXiv:1610.02391 (Grad-CAM); Zhang
               et al. 2016, arXiv:1608.00507 (pointing); Adebayo et al. 2018, arXiv:1810.03292
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
from support.drawings import Shapes10
from support.files import DATASET2, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "04_hooks"
CLASSES = 3  # circle, ring, square: learnt in seconds


# --- tensor hooks ----------------------------------------------------------------------------


def look_and_scale(x, scale):
    """For h = 3x, L = sum(h^2) and a hook that multiplies dL/dh by `scale`: h, dL/dh as an earlier
    hook saw it and as retain_grad keeps it, and the gradient that reaches x."""
    seen = []
    h = 3 * x
    h.retain_grad()  # without it only leaves get a .grad
    h.register_hook(lambda g: seen.append(g.clone()))  # append returns None: nothing changes
    h.register_hook(lambda g: scale * g)
    h.square().sum().backward()
    return h.detach(), seen[0], h.grad, x.grad


class ReverseGradient(torch.autograd.Function):
    """Forward the identity, backward -lam."""

    @staticmethod
    def forward(h, lam):
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.lam = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return -ctx.lam * g, None


def reverse_by_hook(h, lam):
    """The same by a hook on a view of h: whatever else reads h keeps its gradient."""
    h = h.view_as(h)
    if h.requires_grad:
        h.register_hook(lambda g: -lam * g)
    return h


def shared_gradient(reverse, x, W, label, domain):
    """dL/dW of two heads' losses on h = tanh(x W), of which the domain head reads reverse(h)."""
    h = torch.tanh(x @ W)  # (B, n)
    loss = (h @ label).square().mean() + (reverse(h) @ domain).square().mean()
    return torch.autograd.grad(loss, W)[0]


def check_tensor_hooks(lam=0.7):
    h, seen, kept, at_x = look_and_scale(torch.randn(5, requires_grad=True), scale=-4)
    rows = {
        "seen by a hook: 2 h": (seen, 2 * h),
        "kept by retain_grad after * -4: -8 h": (kept, -8 * h),
        "arrived at x: 3 (-8 h)": (at_x, -24 * h),
    }
    x, W = torch.randn(8, 6), torch.randn(6, 4, requires_grad=True)
    label, domain, none = *torch.randn(2, 4), torch.zeros(4)
    of_label = shared_gradient(torch.clone, x, W, label, none)
    of_domain = shared_gradient(torch.clone, x, W, none, domain)
    for name, reverse in {"hook": reverse_by_hook, "Function": ReverseGradient.apply}.items():
        g = shared_gradient(lambda h, f=reverse: f(h, lam), x, W, label, domain)
        rows[f"reversed by {name}: g_label - {lam} g_domain"] = (g, of_label - lam * of_domain)
    for name, (g, theory) in rows.items():
        torch.testing.assert_close(g, theory)
        print(f"   {name:<48} {(g - theory).abs().max():.1e}")


# --- module hooks ----------------------------------------------------------------------------


def record_calls(model, log):
    """Hooks that note in `log` every pass of a child of `model`. Returns their handles."""
    handles = []
    for name, layer in model.named_children():
        handles += [
            layer.register_forward_pre_hook(lambda *_, n=name: log.append(f"pre {n}")),
            layer.register_forward_hook(lambda *_, n=name: log.append(f"forward {n}")),
            layer.register_full_backward_hook(lambda *_, n=name: log.append(f"backward {n}")),
        ]
    return handles


def check_module_hooks():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 3)
    log = []
    handles = record_calls(net, log)
    net(x.requires_grad_()).sum().backward()
    for handle in handles:
        handle.remove()
    forward = [f"{event} {n}" for n in range(3) for event in ("pre", "forward")]
    assert log == [*forward, "backward 2", "backward 1", "backward 0"]
    print(f"   order             {', '.join(log)}")

    h, seen = torch.tensor([-1.0, 2.0], requires_grad=True), []
    with net[1].register_full_backward_hook(lambda m, gi, go: seen.extend([*go, *gi])):
        net[1](h).backward(torch.tensor([3.0, 5.0]))
    go, gi = (g.tolist() for g in seen)
    assert (go, gi) == ([3, 5], [0, 5])
    print(f"   ReLU at -1, 2     grad_output {go}   grad_input {gi}")

    y = net(x)
    with net[1].register_forward_hook(lambda m, args, h: h * torch.tensor([1, 1, 0, 1])):
        change = y - net(x)  # (B, 2)
    torch.testing.assert_close(change, net[:2](x)[:, 2:3] * net[2].weight[:, 2])
    assert torch.equal(net(x), y) and len(log) == 9  # no hook is left
    print(f"   h_2 set to 0      output loses h_2 w_2, up to {change.abs().max():.3f}; removed, 0")


# --- the forgotten hook ----------------------------------------------------------------------


def leak(calls, remove, detach=False, batch=32, width=256):
    """Read the logits by a hook, `calls` times, and remove it each time or not.

    Returns the bytes of hidden activations alive after each call, and how often hooks ran in all.
    """
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    x, hidden, alive, runs = torch.randn(batch, 64), [], [], 0
    model[1].register_forward_hook(lambda module, args, output: hidden.append(weakref.ref(output)))

    def read_logits():
        kept = []

        def keep(module, args, output):
            nonlocal runs
            runs += 1
            kept.append(output.detach() if detach else output)

        handle = model[2].register_forward_hook(keep)
        model(x)
        if remove:
            handle.remove()
        return kept[0]

    for _ in range(calls):
        read_logits()
        alive.append(sum(ref().nbytes for ref in hidden if ref() is not None))
    return alive, runs


def check_leak(log_dir, calls=20):
    measured = {
        "forgotten": leak(calls, remove=False),
        "forgotten, detached": leak(calls, remove=False, detach=True),
        "removed": leak(calls, remove=True),
    }
    hidden = 32 * 256 * 4  # batch, width, bytes of a float32
    for name, (alive, runs) in measured.items():
        assert alive == [n * hidden * (name == "forgotten") for n in range(1, calls + 1)]
        assert runs == (calls if name == "removed" else calls * (calls + 1) / 2)
        print(f"   {name:<20} hooks ran {runs:4d} times   hidden kB alive {alive[-1] / 1000:6.1f}")
    for name in ("forgotten", "removed"):
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for n, alive in enumerate(measured[name][0], 1):
                writer.add_scalar("leak/hidden_kB", alive / 1000, n)


# --- NaN -------------------------------------------------------------------------------------


class Root(nn.Module):
    """sqrt(x); if guarded, 0 where x <= 0: finite, but its gradient there is 0 * NaN."""

    def __init__(self, guarded):
        super().__init__()
        self.guarded = guarded

    def forward(self, x):
        return torch.where(x > 0, x.sqrt(), 0.0) if self.guarded else x.sqrt()


def find_nan(model, x):
    """The first child of `model` to make a value or a gradient that is not finite; None if none is.

    x must require grad: a layer is guilty of the gradient that it hands back to its input.
    """

    def check(where, tensor):
        if not tensor.isfinite().all():
            raise FloatingPointError(where)

    handles = []
    for n, layer in model.named_children():
        handles += [
            layer.register_forward_hook(lambda m, args, out, n=n: check(f"output of {n}", out)),
            layer.register_full_backward_hook(
                lambda m, gi, go, n=n: check(f"gradient of {n}", gi[0])
            ),
        ]
    try:
        model(x).sum().backward()
    except FloatingPointError as error:
        return str(error)
    finally:
        for handle in handles:
            handle.remove()


def check_nan(depth=6, width=8):
    layers = [nn.Linear(width, width) for _ in range(depth)]
    x = torch.randn(16, width, requires_grad=True)
    for form, root, what in (
        ("sqrt(x)", Root(guarded=False), "output"),
        ("where(x > 0, sqrt(x), 0)", Root(guarded=True), "gradient"),
    ):
        found = [find_nan(nn.Sequential(*layers[:n], root, *layers[n:]), x) for n in range(depth)]
        assert found == [f"{what} of {n}" for n in range(depth)]
        print(f"   {form:<26} found {depth} of {depth}, by its {what}")
    assert find_nan(nn.Sequential(*layers), x) is None
    print(f"   {'no root':<26} found nothing")


# --- Grad-CAM --------------------------------------------------------------------------------


def grad_cam(model, layer, x, c=None):
    """Heat (B, h, w) at `layer` for classes c (B,), or else for the predicted ones.

    Raises ValueError in training mode, where batch norm mixes the images, and if c is not (B,).
    """
    if model.training:
        raise ValueError("Grad-CAM explains one image at a time: call model.eval() first")
    kept = []
    with layer.register_forward_hook(lambda module, args, output: kept.append(output)):
        logits = model(x)  # (B, K)
    c = logits.argmax(1) if c is None else c
    if c.shape != logits.shape[:1]:
        raise ValueError(f"classes {tuple(c.shape)} for logits {tuple(logits.shape)}")
    (A,) = kept  # (B, C, h, w)
    (G,) = torch.autograd.grad(logits.gather(1, c[:, None]).sum(), A)
    alpha = G.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    return F.relu((alpha * A).sum(1)).detach()


def moli_for_cam():
    """Moli with global average pooling and one Linear layer for its classifier."""
    model = Moli()
    model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))
    return model.to(memory_format=torch.channels_last)


def cam(model, x):
    """Heat (B, 4, 4) of such a Moli for the predicted classes."""
    A = model.features(x)  # (B, 64, 4, 4)
    w = model.classifier[2].weight[model.classifier(A).argmax(1)]  # (B, 64)
    return F.relu(torch.einsum("bk,bkhw->bhw", w, A)).detach()


def scale_up(heat, size=32):
    """(B, h, w) -> (B, size, size)"""
    return F.interpolate(heat[:, None], size=(size, size), mode="bilinear")[:, 0]


def peaks(heat):
    """The pixel, as (x, y) in (B, 2), where heat (B, h, w), scaled up, is largest."""
    big = scale_up(heat)
    place, width = big.flatten(1).argmax(1), big.shape[-1]
    return torch.stack([place % width, place // width], 1) + 0.5  # its middle


def share_inside(points, boxes):
    """The share of points (B, 2) that lie in their boxes (B, 4)."""
    if len(points) != len(boxes):
        raise ValueError(f"{len(points)} points for {len(boxes)} boxes")
    return ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(1).float().mean().item()


def open_shapes(root, train, count):
    """Up to `count` images (N, 3, 32, 32) of the first classes, their labels and boxes."""
    shapes = Shapes10(root, train)
    labels = torch.tensor(shapes.targets)
    keep = (labels < CLASSES).nonzero()[:count, 0]
    x = torch.from_numpy(shapes.data)[keep].permute(0, 3, 1, 2).float() / 255 * 4 - 2
    return x, labels[keep], torch.from_numpy(shapes.boxes)[keep]


def to_corner(images, boxes, corner):
    """Images (N, 3, 32, 32) at half their size in corner 0 … 3 of noise; their boxes (N, 4)."""
    N = len(images)
    pictures = torch.randn(N, 3, 2, 16, 2, 16)
    pictures[torch.arange(N), :, corner // 2, :, corner % 2] = F.avg_pool2d(images, 2)
    pictures = pictures.reshape(N, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    shift = 16 * torch.stack([corner % 2, corner // 2], 1)  # (N, 2), as (x, y)
    return pictures, boxes / 2 + shift.repeat(1, 2)


def train(model, images, labels, boxes, epochs, batch, lr=0.01):
    """Train on images in ever new corners, and yield after each step."""
    batches = [i for _ in range(epochs) for i in torch.randperm(len(images)).split(batch)]
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    for i in tqdm(batches, disable=None, leave=False):
        x, _ = to_corner(images[i], boxes[i], torch.randint(4, (len(i),)))
        model.train()
        loss = F.cross_entropy(model(x), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield


def overlay(pictures, heat, boxes, scale=5, columns=4):
    """Pictures (N, 3, 32, 32) in grey under their heat in red, the boxes in green: (3, H, W)."""
    grey = F.interpolate(pictures.mean(1, keepdim=True) / 4 + 0.5, scale_factor=scale).clamp(0, 1)
    red = scale_up(heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-9), grey.shape[-1])[:, None]
    big = grey * (1 - red) + red * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    green = torch.tensor([0, 0.9, 0]).view(3, 1, 1)
    for picture, box in zip(big, (boxes * scale).long(), strict=True):
        x0, y0, x1, y1 = box.tolist()
        picture[:, y0:y1, [x0, x1 - 1]] = green
        picture[:, [y0, y1 - 1], x0:x1] = green
    rows = F.pad(big, (4, 4, 4, 4), value=1.0).split(columns)
    return torch.cat([torch.cat([*row], dim=2) for row in rows], dim=1)


def check_cam(log_dir, root, images, epochs, batch, tested):
    data = open_shapes(root, train=True, count=images)
    test = open_shapes(root, train=False, count=tested)
    x, labels, boxes = (t.repeat_interleave(4, 0) for t in test)
    pictures, boxes = to_corner(x, boxes, torch.arange(len(x)) % 4)  # each image in each corner
    others = boxes[torch.randperm(len(boxes))]
    model = moli_for_cam()
    last_conv = model.features[2][0]  # 8 x 8 places

    heat = {0: grad_cam(model.eval(), last_conv, pictures)}
    for step, _ in enumerate(train(model, *data, epochs, batch), 1):
        if step % 20 == 0:
            heat[step] = grad_cam(model.eval(), last_conv, pictures)
    heat[step] = grad_cam(model.eval(), last_conv, pictures)

    print("5. Z times Grad-CAM against CAM, under global average pooling")
    ours, theirs = grad_cam(model, model.features, pictures), cam(model, pictures)
    Z = ours[0].numel()
    torch.testing.assert_close(Z * ours, theirs, rtol=1e-4, atol=1e-4)
    print(f"   largest difference {(Z * ours - theirs).abs().max():.1e} of {theirs.max():.1f}")

    print("6. Grad-CAM at Moli's last convolution: share of peaks in the shape's box")
    own = {step: share_inside(peaks(h), boxes) for step, h in heat.items()}
    another = {step: share_inside(peaks(h), others) for step, h in heat.items()}
    area = ((boxes[:, 2:] - boxes[:, :2]).prod(1) / 32**2).mean().item()
    accuracy = (model(pictures).argmax(1) == labels).float().mean().item()
    measured = {
        "trained": own[step],
        "untrained": own[0],
        "another box": another[step],
        "box area": area,
        "accuracy": accuracy,
    }
    print(f"   after {step:3d} steps         {own[step]:.3f}   untrained           {own[0]:.3f}")
    print(f"   another picture's box   {another[step]:.3f}   area of the boxes   {area:.3f}")
    print(f"   test accuracy           {accuracy:.3f}   chance              {1 / CLASSES:.3f}")

    for run, curve in {"own_box": own, "another_box": another}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for n, share in curve.items():
                writer.add_scalar("cam/peak_in_box", share, n)
    show = slice(None, 40, 5)  # eight pictures, two in each corner
    for run, h in {"untrained": heat[0], "trained": heat[step]}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            writer.add_image("cam/heat", overlay(pictures[show], h[show], boxes[show]), 0)
    return measured


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, images=2000, epochs=2, batch=32, tested=60):
    torch.manual_seed(seed)
    print("1. gradients at tensor hooks: largest difference from the formula")
    check_tensor_hooks()
    print("2. module hooks")
    check_module_hooks()
    print("3. logits read by a hook in 20 calls: hidden activations kept alive")
    check_leak(log_dir)
    print("4. a root before each of six layers, in turn: what hooks on every layer find")
    check_nan()
    return check_cam(log_dir, root, images, epochs, batch, tested)


if __name__ == "__main__":
    guard(main)
