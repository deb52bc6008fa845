"""Skips keep a deep network's gradient from vanishing; unless scaled, they make it explode.

A skip adds the input h of a block to what the block computes: h + f(h). So the block learns what to
change in h, and the gradient of the sum reaches h unchanged, beside what comes through f. Without
skips, 32 layers with nn.Linear's own weights let almost no gradient through. But sums grow with
every block: scale f, let it start at 0, or give it norm(h), as language models do (Pre-LN).

                 next h           |dL/dh_0|^2 / |dL/dh_L|^2   share of the skips alone
    no skip      f(h)             (v / 2)^L                   0
    skip         h + a f(h)       (1 + a^2 v / 2)^L           (1 + a^2 v / 2)^-L
    pre-norm     h + f(norm(h))   L + 1    for v = 2          1 / (L + 1)
    post-norm    norm(h + f(h))   1        for v = 2          2^-L

    h_0, h_L  n numbers before the first and after the last of L blocks    dL/d..  a loss's gradient
    f(h) = W relu(h)  the entries of W are random with mean 0, variance v / n: v is 2 in He's
    weights, 1/3 in nn.Linear's     a  a number that scales f     norm(h) = h / sqrt(mean of h^2)
    share  the part of |dL/dh_0|^2 that never passed through an f     (means, for large n)

Needs          nn_seq.py, nn_conv2d.py, normalization.py, attention_mechanism.py
Checked here   BasicBlock = torchvision's; blocks that start as the identity; the table above;
               BasicBlocks and Transformers trained, beside those that should fail
TensorBoard    depth/log2_gradient by layer in net/...; stack/loss by step in stack/... (a guess has
               1.386); transformer/loss by step in transformer/... (a guess has 2.079)
Try            in join, write 2 * L**-0.5 for L**-0.5: what does the row skip_scaled measure now?
Answer         about +2.7; at any depth it stays below 2.9, as (1 + 4 / L)^L is below e^4
Source         arXiv:1512.03385 (ResNet), 1706.02677, section 5.1 (start at 0), 2002.10444 (Pre-norm
               at the start), 2002.04745 (Post-LN, warm-up)
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


def pre_norm(h, norm, f):
    """As residual, but f gets norm(h); the sum itself is never normalised. Exercise."""
    return h + f(norm(h))


def post_norm(h, norm, f):
    """The norm of h + f(h), so that what goes on is a normalised sum. Exercise."""
    return norm(h + f(h))


def show_everyday(depth=20):
    print("1. In everyday code: a skip is one plus sign. f(h) = h / 2, and h is 1 at the start")
    print(f"   next h          after 1 layer   after {depth}   gradient behind {depth} layers")
    f = nn.Linear(1, 1, bias=False)
    nn.init.constant_(f.weight, 0.5)
    found = {}
    rows = [("f(h)", 0, 1), ("h + f(h)", 1, 1), (f"h + f(h) / {depth}", 1, 1 / depth)]
    for name, skip, a in rows:
        h = start = torch.ones(1, 1, requires_grad=True)
        states = [h := skip * h + a * f(h) for _ in range(depth)]
        h.backward()
        found[name] = states[0].item(), h.item(), start.grad.item()
        print("   {:<13} {:15.3f} {:10.1e} {:26.1e}".format(name, *found[name]))
    kept = [name for name, (*_, slope) in found.items() if 0.1 < slope < 10]
    print(f"   -> neither vanishes nor explodes: {', '.join(kept)}")
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

    print("2. Is BasicBlock torchvision's, and what do ten of them do before training?")
    ours, twin, x = BasicBlock(6, 6), resnet.BasicBlock(6, 6), torch.randn(4, 6, 9, 11).relu()
    twin.load_state_dict(ours.state_dict())  # the same weights, by the same names
    off = {"one block minus torchvision's": ours(x) - twin(x)}
    for zero in (False, True):
        ten = [BasicBlock(6, 6, zero_init_residual=zero) for _ in range(10)]
        off[f"ten minus input, zero_init_residual={zero}"] = nn.Sequential(*ten)(x) - x
    print("   output                                      largest")
    for name, difference in off.items():
        off[name] = difference.abs().max().item()
        print(f"   {name:<42} {off[name]:8.1g}")
    _, usual, zero = off.values()
    print(f"   -> ten blocks change their input by up to {usual:.0f}; begun at zero, by {zero:g}")
    return off


# --- 3. the gradient by depth ------------------------------------------------------------------

NETS = {  # run: v, and how f(h) joins h; "default" are nn.Linear's own weights
    "no_skip_default": (1 / 3, "none"), "no_skip_he": (2, "none"),
    "skip_default": (1 / 3, "skip"), "skip_he": (2, "skip"), "skip_scaled": (2, "scaled"),
    "pre_norm": (2, "pre"), "post_norm": (2, "post"),
}  # fmt: skip


def rms(h):
    return F.rms_norm(h, h.shape[-1:])


def join(kind, h, f, L):
    """The next h of one of L blocks whose branch is f."""
    if kind == "none":
        return f(h)
    if kind == "scaled":
        return h + L**-0.5 * f(h)
    if kind == "pre":
        return pre_norm(h, rms, f)
    return post_norm(h, rms, f) if kind == "post" else residual(h, f)


def theory(kind, v, k, L):
    """E|dL/dh_k|^2 / E|dL/dh_L|^2, and its share that the skips alone carry: as on top, k for 0.

    The exponent is then L - k; pre-norm has (L + 1) / (k + 1). a^2 is 1 / L if "scaled". Exercise.
    """
    if kind == "none":
        return (v / 2) ** (L - k), 0
    growth = (1 + v / 2 / (L if kind == "scaled" else 1)) ** (L - k)
    if kind == "pre":
        growth = (L + 1) / (k + 1)
    return 1 if kind == "post" else growth, 1 / growth


def gradients_by_depth(kind, v, width, depth, batch=32):
    """dL/dh_k (B, n) for k = 0 ... L, of a loss <r, h_L> with a random r.

    Not of h_L.sum(): behind a LayerNorm the sum is 0, and so is its gradient, whatever h is.
    """
    states = [rms(torch.randn(batch, width)).requires_grad_()]
    for _ in range(depth):
        W = torch.randn(width, width) * math.sqrt(v / width)
        states.append(join(kind, states[-1], lambda h, W=W: h.relu() @ W.T, depth))  # (B, n)
    return torch.autograd.grad((torch.randn(batch, width) * states[-1]).sum(), states)


def show_depth(log_dir, width, depth):
    print(f"3. Gradient behind {depth} blocks of {width} units: log2 of |dL/dh_0| / |dL/dh_L|")
    print("                     n * variance       log2:      log2:   share of skips, 4 blocks:")
    print("   run                of a weight    measured    formula   measured    formula")
    measured = {}
    for name, (v, kind) in NETS.items():
        g = gradients_by_depth(kind, v, width, depth)
        log2 = [(g_k.norm() / g[-1].norm()).log2().item() for g_k in g]
        # dL/dh_k is dL/dh_L, scaled by the skips, and what the branches add, orthogonal to it
        share = F.cosine_similarity(g[-5].flatten(), g[-1].flatten(), dim=0).item() ** 2
        draw(log_dir / "net" / name, {"depth/log2_gradient": log2})
        size, part = theory(kind, v, 0, depth)[0], theory(kind, v, depth - 4, depth)[1]
        print(f"   {name:<15} {v:14.2f} {log2[0]:+11.1f} {math.log2(size) / 2:+10.1f} "
              f"{share:10.3f} {part:10.3f}")  # fmt: skip
        measured[name] = log2, share
    lost = [name for name, (log2, _) in measured.items() if log2[0] < -10]
    huge = [name for name, (log2, _) in measured.items() if log2[0] > 10]
    print(f"   -> less than 1 / 1000 is left in: {', '.join(lost) or '-'}; "
          f"1000 times as much in: {', '.join(huge) or '-'}")  # fmt: skip
    return measured


# --- 4. BasicBlocks trained --------------------------------------------------------------------

STACKS = {"no_skip": {"skip": False}, "skip": {}, "from_zero": {"zero_init_residual": True}}


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


def fit(model, optimizer, sample, steps, warmup=0):
    """The loss before every step; the rate rises linearly to its peak in `warmup` steps."""
    peak, losses = optimizer.param_groups[0]["lr"], []
    for step in tqdm(range(steps), leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / max(warmup, 1))
        x, t = sample()
        loss = F.cross_entropy(model(x).flatten(0, -2), t.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show_stacks(seed, log_dir, blocks, steps):
    print(f"4. Do {blocks} BasicBlocks learn the direction of a wave? Mean loss; a guess: 1.39")
    print("   no_skip: f(h); skip: h + f(h); from_zero: h + f(h), with f(h) = 0 at the start")
    print(f"   run         steps 1-10   steps 11-20   last ten of {steps}")
    measured = {}
    for name, options in STACKS.items():
        torch.manual_seed(seed)
        net = stack(blocks, **options)
        losses = fit(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), gratings, steps)
        draw(log_dir / "stack" / name, {"stack/loss": losses})
        measured[name] = [sum(part) / 10 for part in (losses[:10], losses[10:20], losses[-10:])]
        print("   {:<10} {:11.2f} {:13.2f} {:15.2f}".format(name, *measured[name]))
    order = sorted(measured, key=lambda name: measured[name][1])
    print(f"   -> by the loss in steps 11-20: {' before '.join(order)}")
    return measured


# --- 5. Transformers: Pre-LN and Post-LN trained -----------------------------------------------

RECIPES = {  # norm_first; part of the rate; part of the steps in which the rate rises: warm-up
    "post_ln": (False, 1.0, 0.0), "post_ln_tenth": (False, 0.1, 0.0),
    "post_ln_warmup": (False, 1.0, 0.5), "pre_ln": (True, 1.0, 0.0),
}  # fmt: skip


def transformer(blocks, norm_first, d=32):
    """Numbers (B, 6) -> logits (B, 6, 8). norm_first is Pre-LN: its sum gets a norm at the end."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    layers = [nn.TransformerEncoderLayer(d, 4, 4 * d, **options) for _ in range(blocks)]
    last = nn.LayerNorm(d) if norm_first else nn.Identity()
    net = nn.Sequential(nn.Embedding(6 * 8, d), *layers, last, nn.Linear(d, 8))
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    return net


def reversals(batch=32):
    """Texts of 6 tokens out of 8 (B, 6), as token + 8 * position; and the tokens in reverse."""
    tokens = torch.randint(8, (batch, 6))
    return tokens + 8 * torch.arange(6), tokens.flip(1)


def show_transformers(seed, log_dir, blocks, steps, lr):
    print(f"5. Do {blocks} Transformer layers learn to reverse a text? A guess has a loss of 2.08")
    print(
        "   post_ln: norm(h + f(h)), with a tenth of the rate, or warm-up; pre_ln: h + f(norm(h))"
    )
    print(f"   run                rate   steps of warm-up   loss, last ten of {steps} steps")
    measured = {}
    for name, (norm_first, part, warmup) in RECIPES.items():
        torch.manual_seed(seed)
        model, rise = transformer(blocks, norm_first), int(warmup * steps)
        optimizer = torch.optim.Adam(model.parameters(), lr * part)
        losses = fit(model, optimizer, reversals, steps, rise)
        draw(log_dir / "transformer" / name, {"transformer/loss": losses})
        measured[name] = sum(losses[-10:]) / 10
        print(f"   {name:<15} {lr * part:7g} {rise:18} {measured[name]:21.3f}")
    stuck = [name for name, loss in measured.items() if loss > 1.6]
    print(f"   -> least loss: {min(measured, key=measured.get)}; "
          f"next to nothing is learned by: {', '.join(stuck) or '-'}")  # fmt: skip
    return measured


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


def main(seed=0, log_dir=LOG_DIR, width=256, depth=32, blocks=16, steps=60, layers=6,
         transformer_steps=160, lr=1e-2):  # fmt: skip
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "blocks": show_block()}
    measured["depth"] = show_depth(log_dir, width, depth)
    measured["stacks"] = show_stacks(seed, log_dir, blocks, steps)
    measured["transformers"] = show_transformers(seed, log_dir, layers, transformer_steps, lr)
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
