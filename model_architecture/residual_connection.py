"""Skips keep a deep network's gradient from vanishing, but a plain sum h + f(h) can let it explode.

A skip adds the input h of a block to what the block makes of it: the output is h + f(h). So the
block learns what to change in h, and the gradient has a second way back to h, around f. Without
skips, 32 layers with nn.Linear's own weights let almost no gradient through. Larger weights,
Kaiming He's, keep its size. Yet 16 of ResNet's blocks learn far slower without skips (section 4).
Sums grow with every block: multiply f by a small a, or let f read norm(h), as language models do.

                next h           |g_0|^2 / |g_L|^2, an average over random weights
    no skip     f(h)             (v / 2)^L
    skip        h + a f(h)       (1 + a^2 v / 2)^L     plain: a = 1; scaled: a = 1 / sqrt(L)
    pre-norm    h + f(norm(h))   L + 1                 for v = 2, if h_0 has mean square 1
    post-norm   norm(h + f(h))   1                     for v = 2

    h_0, h_L    n numbers before the first and after the last of L blocks
    g_0, g_L    the gradients of a loss with respect to h_0 and to h_L
    f(h)        W relu(h); the entries of the matrix W are random, their mean is 0, their variance
                v / n: v is 2 in He's weights, 1/3 in nn.Linear's own
    norm(h)     h / sqrt(mean of h^2). With LayerNorm, the last two rows are called Pre-LN, Post-LN

Needs          nn_seq.py, nn_conv2d.py, normalization.py
Checked here   BasicBlock, ResNet's block of two convolutions, = torchvision's; blocks that start
               as the identity; the table above; BasicBlocks trained with skips and without
TensorBoard    depth/log2_gradient by layer: net/no_skip_default climbs from -41 to 0, net/skip_he
               falls from 16 to 0; stack/loss by step: stack/skip falls first
Try            in join, write 2 * L**-0.5 for L**-0.5: what does the row skip_scaled measure now?
Answer         about +2.7, while its formula still says +0.7; at any depth the gradient grows less
               than e^2 times (+2.9), as (1 + 4 / L)^L is below e^4
Source         arXiv:1512.03385 (ResNet), 1706.02677, section 5.1 (start at 0), 2002.10444 (pre-norm
               at the start), 2002.04745 (Pre-LN, Post-LN)
"""

import argparse
import math
import os
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

RUNS = Path(__file__).resolve().parents[1] / "runs"
LOG_DIR = RUNS / "model_architecture" / "residual_connection"


# --- 1. in everyday code -----------------------------------------------------------------------


def residual(h, f):
    """A block with a skip: its input h plus what its branch f makes of h. Exercise."""
    return h + f(h)


def show_everyday(depth=20):
    f, h = nn.Linear(1, 1, bias=False), torch.tensor([2.0], requires_grad=True)
    nn.init.constant_(f.weight, 0.5)
    plain, skip, scaled, found = [h], [h], [h], {}
    for _ in range(depth):
        plain.append(f(plain[-1]))
        skip.append(residual(skip[-1], f))
        scaled.append(residual(scaled[-1], lambda h: f(h) / depth))
    print("1. In everyday code: a skip is one plus sign. Here f(h) = h / 2, and h begins at 2")
    print("                     h after      h after    gradient of the last h")
    print(f"   next h            1 layer    {depth:>2} layers    with respect to the first h")
    rows = ("f(h)", plain), ("h + f(h)", skip), (f"h + f(h) / {depth}", scaled)
    for name, states in rows:
        (slope,) = torch.autograd.grad(states[-1], h)
        found[name] = states[1].item(), states[-1].item(), slope.item()
        print("   {:<15} {:9.4g} {:12.4g} {:17.4g}".format(name, *found[name]))
    kept = [name for name, (*_, slope) in found.items() if 0.1 < slope < 10]
    print(f"   -> the gradient stays between 0.1 and 10 with: {', '.join(kept) or '-'}")
    return found


# --- 2. BasicBlock, complete --------------------------------------------------------------------


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)): (B, C, H, W) -> (B, C', H', W').

    The shortcut is x, or a 1x1 convolution with BatchNorm where the shape changes; skip=False has
    none. With zero_init_residual the block starts as relu(shortcut(x)): for x >= 0 the identity.
    """

    def __init__(self, in_channels, out_channels, stride=1, skip=True, zero_init_residual=False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.skip, self.downsample = skip, None
        if skip and (stride != 1 or in_channels != out_channels):
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        if zero_init_residual:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        """The formula above: the shortcut is x, or self.downsample(x) if there is one. Exercise."""
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        if self.skip:
            out = out + (x if self.downsample is None else self.downsample(x))
        return out.relu()


def show_block():
    from torchvision.models import resnet  # takes 3 s, so only here

    print("2. Is our BasicBlock torchvision's? Do ten of them change an input before training?")
    ours, twin, x = BasicBlock(6, 6), resnet.BasicBlock(6, 6), torch.randn(4, 6, 9, 11).relu()
    twin.load_state_dict(ours.state_dict())  # the same weights, by the same names
    off = {"our block minus torchvision's": ours(x) - twin(x)}
    for zero in (False, True):
        ten = [BasicBlock(6, 6, zero_init_residual=zero) for _ in range(10)]
        off[f"ten blocks minus input, zero_init_residual={zero}"] = nn.Sequential(*ten)(x) - x
    print("   difference, for an input >= 0                     largest |entry|")
    for name, difference in off.items():
        off[name] = difference.abs().max().item()
        print(f"   {name:<48} {off[name]:16.2g}")
    _, usual, zero = off.values()
    print(f"   -> ten blocks change their input by up to {usual:.0f}; "
          f"those that zero_init_residual starts, by {zero:g}")  # fmt: skip
    return off


# --- 3. the gradient by depth ------------------------------------------------------------------

NETS = {  # run: v, and how f(h) joins h; "default" are nn.Linear's own weights
    "no_skip_default": (1 / 3, "none"), "no_skip_he": (2, "none"),
    "skip_default": (1 / 3, "skip"), "skip_he": (2, "skip"), "skip_scaled": (2, "scaled"),
    "pre_norm": (2, "pre"), "post_norm": (2, "post"),
}  # fmt: skip
NEXT = {"none": "f(h)", "skip": "h + f(h)", "scaled": "h + f(h) / sqrt(L)",
        "pre": "h + f(norm(h))", "post": "norm(h + f(h))"}  # fmt: skip


def pre_norm(h, norm, f):
    """As residual, but f gets norm(h); the sum itself is never normalised. Exercise."""
    return h + f(norm(h))


def post_norm(h, norm, f):
    """The norm of h + f(h), so that what goes on is a normalised sum. Exercise."""
    return norm(h + f(h))


def rms(h):
    return F.rms_norm(h, h.shape[-1:])


def join(kind, h, f, L):
    """The next h of one of L blocks whose branch is f."""
    if kind == "scaled":
        return h + L**-0.5 * f(h)
    if kind in ("pre", "post"):
        return pre_norm(h, rms, f) if kind == "pre" else post_norm(h, rms, f)
    return f(h) if kind == "none" else residual(h, f)


def theory(kind, v, L):
    """|g_0|^2 / |g_L|^2 by the docstring's table; kind is none, skip, scaled, pre or post.

    a^2 is 1 for "skip" and 1 / L for "scaled". Exercise.
    """
    if kind in ("pre", "post"):
        return L + 1 if kind == "pre" else 1
    return {"none": v / 2, "skip": 1 + v / 2, "scaled": 1 + v / 2 / L}[kind] ** L


def gradients_by_depth(kind, v, width, depth, batch=32):
    """The gradients (B, n) of a loss <r, h_L>, with a random r, for h_0 ... h_L.

    Not of h_L.sum(): behind a LayerNorm the sum is 0, and so is its gradient, whatever h is.
    """
    states = [rms(torch.randn(batch, width)).requires_grad_()]
    for _ in range(depth):
        W = torch.randn(width, width) * math.sqrt(v / width)
        states.append(join(kind, states[-1], lambda h, W=W: h.relu() @ W.T, depth))  # (B, n)
    return torch.autograd.grad((torch.randn(batch, width) * states[-1]).sum(), states)


def show_depth(log_dir, width, depth):
    print(f"3. How much of a gradient comes back through L = {depth} blocks of {width} units?")
    print("                                         n * variance    log2 of |g_0| / |g_L|")
    print("   run               next h               of a weight    measured      formula")
    measured = {}
    for name, (v, kind) in NETS.items():
        g = gradients_by_depth(kind, v, width, depth)
        log2 = measured[name] = [(g_k.norm() / g[-1].norm()).log2().item() for g_k in g]
        draw(log_dir / "net" / name, {"depth/log2_gradient": log2})
        formula = math.log2(theory(kind, v, depth)) / 2
        print(f"   {name:<17} {NEXT[kind]:<18} {v:13.2f} {log2[0]:+11.1f} {formula:+12.1f}")
    print("   g_0, g_L: gradients at the first block's input, the last block's output; +1 is twice")
    lost = [name for name, log2 in measured.items() if log2[0] < -10]
    huge = [name for name, log2 in measured.items() if log2[0] > 10]
    kept = [name for name, log2 in measured.items() if "no_skip" in name and abs(log2[0]) < 1]
    print(f"   -> less than 1 / 1000 of it: {', '.join(lost) or '-'}; more than 1000 times: "
          f"{', '.join(huge) or '-'};\n      without a skip and yet between a half and twice: "
          f"{', '.join(kept) or '-'}")  # fmt: skip
    return measured


# --- 4. BasicBlocks trained --------------------------------------------------------------------


def gratings(batch=64, size=8, noise=0.5):
    """Noisy waves of four directions and any phase (B, 1, H, W), and the direction (B,)."""
    t = torch.randint(4, (batch,))
    angle, phase = t.view(-1, 1, 1) * math.pi / 4, torch.rand(batch, 1, 1) * 2 * math.pi
    r = torch.arange(size)
    wave = torch.sin(1.3 * (angle.cos() * r + angle.sin() * r.view(-1, 1)) + phase)  # (B, H, W)
    return (wave + noise * torch.randn_like(wave)).unsqueeze(1), t


def stack(blocks, C=8, **options):
    """A stem, the BasicBlocks, a head: (B, 1, H, W) -> logits (B, 4); He's weights."""
    net = nn.Sequential(
        nn.Conv2d(1, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU(),
        *(BasicBlock(C, C, **options) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4))  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def fit(net, steps):
    """The loss before every step of SGD, each on a new batch."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for _ in tqdm(range(steps), leave=False, disable=None):
        x, t = gratings()
        loss = F.cross_entropy(net(x), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show_stacks(seed, log_dir, blocks, steps):
    print(f"4. Do {blocks} BasicBlocks learn the direction of a wave? Mean loss; a guess has 1.39")
    print(f"   run       next h     steps 1-10   steps 11-20   last ten of {steps}")
    measured = {}
    for name, text, skip in (("no_skip", "f(h)", False), ("skip", "h + f(h)", True)):
        torch.manual_seed(seed)
        losses = fit(stack(blocks, skip=skip), steps)
        draw(log_dir / "stack" / name, {"stack/loss": losses})
        measured[name] = [sum(part) / 10 for part in (losses[:10], losses[10:20], losses[-10:])]
        print("   {:<9} {:<10} {:10.2f} {:13.2f} {:15.2f}".format(name, text, *measured[name]))
    gap = measured["no_skip"][1] - measured["skip"][1]
    print(f"   -> in steps 11-20, the loss without skips minus the loss with skips is {gap:+.2f}")
    return measured


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


def main(seed=0, log_dir=LOG_DIR, width=256, depth=32, blocks=16, steps=60):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "blocks": show_block()}
    measured["depth"] = show_depth(log_dir, width, depth)
    measured["stacks"] = show_stacks(seed, log_dir, blocks, steps)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


def guard(main, *flags):
    """Run main as a program: Ctrl-C, a closed pipe and a disk that refuses end it in one line."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    options, lost = vars(parser.parse_args()), []
    if hasattr(sys.stdout, "reconfigure"):  # any path, on any console, and logs that fill
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    threading.excepthook = lost.append  # what TensorBoard's thread could not write
    try:
        main(**options)
        if not lost:
            return
        raise lost[0].exc_value
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1
    except OSError as error:
        status = f"cannot log to {LOG_DIR}: {error}" if lost else str(error)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what print still holds has nowhere to go
    sys.exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small networks: faster than on two
    guard(main)
