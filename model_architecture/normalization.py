"""Batch-, Layer-, Group- and InstanceNorm are one formula; only the axes of its mean differ.

    y = w (x - mean) / sqrt(var + eps) + b        var: divided by n, not by n - 1

    x (B, C, L…)    BatchNorm   over B, L          one mean a channel, of all examples
                    InstanceNorm     over L        one a channel and example
                    GroupNorm   over C / G, L      one a group and example; G = C is InstanceNorm,
                                                   G = 1 is LayerNorm over (C, L)
                    LayerNorm   over the last axes named, in a transformer C alone

In training BatchNorm also keeps, for evaluation, running <- (1 - m) running + m batch, with a
variance divided by n - 1; m weighs the *new* value. A mean over B examples is off by sigma^2 / B:
small batches are noise in training, and evaluation is another network. The other three know no
batch, but divide out how large an example is: where that is the answer, it is gone. So choose

    BatchNorm   for large batches, or where the scale of an example means something
    GroupNorm, LayerNorm   for small batches, and where the scale means nothing
    InstanceNorm   where even the scale of a single channel means nothing; here it never wins

Checked here   mean 0 and variance 1 over these axes, torch's outputs, gradients and running
               statistics; the ends of GroupNorm; sigma^2 / B in BatchNorm's own running mean;
               accuracy by batch size, where the scale means nothing, and where it is the answer
TensorBoard    noise/log2_mean by log2 B in noise/measured, theory (slope -1); val/accuracy by
               log2 B in waveform/BatchNorm …, none
Try            bias=True in network(): can GroupNorm then hear how loud a wave is? It can
Source         Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1; Ba et al. 2016,
               arXiv:1607.06450, eq. 3; Ulyanov et al. 2016, arXiv:1607.08022, eq. 3; Wu & He 2018,
               arXiv:1803.08494, eq. 7
"""

import argparse
import math
import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "model_architecture" / "normalization"
F64 = torch.float64


# --- one formula, four sets of axes ------------------------------------------------------------


def widen(x):
    """float32 for half precision, whose sums would round; else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalize(x, axes, eps=1e-5):
    """x less its mean over `axes`, over sqrt(variance + eps) there; half comes out as float32.

    The variance divides by n. widen(x) gives the float32. Exercise.
    """
    x = widen(x)
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


class Norm(nn.Module):
    """Weight and bias (C,), on the channels of x (B, C, …)."""

    def __init__(self, channels, eps, affine):
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def check(self, x, dims):
        if x.dim() < dims or x.size(1) != self.channels:
            need = ", ".join(["B", str(self.channels), "L"][:dims])
            raise ValueError(f"{type(self).__name__} needs ({need}, ...), not {tuple(x.shape)}")

    def check_count(self, x, values):
        if values < 2:
            raise ValueError(f"a mean over {values} value of {tuple(x.shape)} leaves nothing")

    def along(self, p, x):
        return p.view(-1, *[1] * (x.dim() - 2))  # (C,) -> (C, 1, …)

    def scale(self, y, dtype):
        """w y + b, only then rounded to the type of the input."""
        if self.weight is not None:
            y = y * self.along(self.weight, y) + self.along(self.bias, y)
        return y.to(dtype)


class BatchNorm(Norm):
    """Over B and all of L, for x (B, C, …); evaluation uses the running statistics.

    momentum=None averages all batches alike. ValueError for a single value a channel in training.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True):
        super().__init__(num_features, eps, affine)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        """Normalise x (B, C, …) over B and all of L; in evaluation by the running statistics.

        check(x, 2) first; in training check_count(x, values a channel), then track(x, axes) without
        gradient, then normalize; in either mode scale(y, x.dtype) last. In evaluation (x -
        running_mean) / sqrt(running_var + eps), in float32 for half precision. Exercise.
        """
        self.check(x, 2)
        if not self.training:
            mean, var = (self.along(s, x) for s in (self.running_mean, self.running_var))
            return self.scale((widen(x) - mean) / (var + self.eps).sqrt(), x.dtype)
        self.check_count(x, x.numel() // self.channels)
        axes = (0, *range(2, x.dim()))
        self.track(widen(x.detach()), axes)
        return self.scale(normalize(x, axes, self.eps), x.dtype)

    def track(self, x, axes):
        """Move running_mean and running_var, in place, towards mean and variance of x over `axes`.

        Count the batch in num_batches_tracked. running <- (1 - m) running + m batch, where m is the
        momentum, or 1 / num_batches_tracked without one. This variance divides by n - 1. Exercise.
        """
        self.num_batches_tracked += 1
        m = self.momentum
        if m is None:
            m = 1 / self.num_batches_tracked.item()
        for running, batch in ((self.running_mean, x.mean(axes)),
                               (self.running_var, x.var(axes, correction=1))):  # fmt: skip
            running.copy_((1 - m) * running + m * batch)


class InstanceNorm(Norm):
    """Over all of L, for x (B, C, L…); without weights unless asked for."""

    def __init__(self, num_features, eps=1e-5, *, affine=False):
        super().__init__(num_features, eps, affine)

    def forward(self, x):
        """Normalise x (B, C, L…) over all of L.

        check(x, 3), check_count(x, values of one channel of one example), normalize, scale(y,
        x.dtype). Exercise.
        """
        self.check(x, 3)
        self.check_count(x, x[0, 0].numel())
        return self.scale(normalize(x, tuple(range(2, x.dim())), self.eps), x.dtype)


class GroupNorm(Norm):
    """Over the channels of a group and all of L, for x (B, C, …)."""

    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True):
        super().__init__(num_channels, eps, affine)
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"{num_channels} channels do not split into {num_groups} groups")
        self.num_groups = num_groups

    def forward(self, x):
        """Normalise x (B, C, …) over the channels of each of num_groups groups and all of L.

        check(x, 2), check_count(x, values of a group), normalize, and scale(y, x.dtype) in the
        shape of x. Exercise.
        """
        self.check(x, 2)
        groups = x.unflatten(1, (self.num_groups, -1))  # (B, C, …) -> (B, G, C/G, …)
        self.check_count(x, groups[0, 0].numel())
        y = normalize(groups, tuple(range(2, groups.dim())), self.eps)
        return self.scale(y.flatten(1, 2), x.dtype)


class LayerNorm(nn.Module):
    """Over the last axes, which must be `normalized_shape`; weight and bias of that shape."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True):
        super().__init__()
        one = isinstance(normalized_shape, int)
        self.normalized_shape = (normalized_shape,) if one else tuple(normalized_shape)
        self.eps, self.weight, self.bias = eps, None, None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(self.normalized_shape))
            self.bias = nn.Parameter(torch.zeros(self.normalized_shape))

    def forward(self, x):
        """Normalise x over its last axes, times weight, plus bias (if there are any), in x's type.

        ValueError "LayerNorm needs …, not (shape)" if the last axes are not normalized_shape.
        Exercise.
        """
        last = len(self.normalized_shape)
        if tuple(x.shape[-last:]) != self.normalized_shape:
            wanted = f"(..., *{self.normalized_shape})"
            raise ValueError(f"LayerNorm needs {wanted}, not {tuple(x.shape)}")
        y = normalize(x, tuple(range(-last, 0)), self.eps)
        return (y if self.weight is None else y * self.weight + self.bias).to(x.dtype)


# --- equalities --------------------------------------------------------------------------------


def uneven(B, C, L):
    """x (B, C, L) whose channels and examples differ in mean and scale, so that a norm has work."""
    scale = torch.linspace(0.5, 3, C, dtype=F64)[:, None]
    shift = torch.linspace(-4, 4, B, dtype=F64)[:, None, None] + 2 * torch.arange(C)[:, None]
    return shift + scale * torch.linspace(1, 2, B)[:, None, None] * torch.randn(B, C, L, dtype=F64)


def show_axes(B=6, C=4, L=50):
    print(f"1. x ({B}, {C}, {L}): largest |mean|, |variance - 1| over the axes; off torch's")
    x = uneven(B, C, L).requires_grad_()
    pairs = {
        "BatchNorm": (BatchNorm(C), nn.BatchNorm1d(C), lambda y: y.transpose(0, 1).flatten(1)),
        "InstanceNorm": (InstanceNorm(C), nn.InstanceNorm1d(C), lambda y: y.flatten(0, 1)),
        "GroupNorm": (GroupNorm(2, C), nn.GroupNorm(2, C), lambda y: y.reshape(2 * B, -1)),
        "LayerNorm": (LayerNorm((C, L)), nn.LayerNorm((C, L)), lambda y: y.flatten(1)),
    }
    rest = {}
    for name, (ours, library, rows) in pairs.items():
        y, expected = ours.double()(x), library.double()(x)
        grads = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        var, mean = torch.var_mean(rows(y.detach()), dim=1, correction=0)
        var, mean = (var - 1).abs().max().item(), mean.abs().max().item()
        assert mean < 1e-12 and var < 1e-4  # eps keeps the variance a little under 1
        rest[name] = {
            other: axes(y.detach()).mean(1).abs().max().item()
            for other, (_, _, axes) in pairs.items()
        }
        off = (y - expected).abs().max(), (grads[0] - grads[1]).abs().max()
        print(f"   {name:<12}   {mean:.0e}   {var:.0e}   outputs {off[0]:.0e}   "
              f"gradients {off[1]:.0e}")  # fmt: skip
    return rest


def show_running(batches=30, B=4, C=3):
    print(f"2. running statistics after {batches} batches of {B}: off torch's, and off theory")
    ours, library = BatchNorm(C, momentum=0.3).double(), nn.BatchNorm1d(C, momentum=0.3).double()
    x = 5 + 2 * torch.randn(batches, B, C, dtype=F64)
    for batch in x:
        ours(batch), library(batch)
    weights = 0.3 * 0.7 ** torch.arange(batches - 1, -1, -1, dtype=F64)  # of each batch
    theory = (weights[:, None] * x.var(1, correction=1)).sum(0) + 0.7**batches
    for name, value in library.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.running_var, theory, rtol=0, atol=1e-12)
    biased = (weights[:, None] * x.var(1, correction=0)).sum(0) + 0.7**batches
    ratio = (biased / ours.running_var).mean().item()
    off = [(ours.running_var - other).abs().max() for other in (library.running_var, theory)]
    print(f"   variance {off[0]:.0e}   {off[1]:.0e}   if divided by n: {ratio:.3f} of it")
    return ratio


def show_ends(B=3, C=6, L=10):
    print("3. GroupNorm's ends: largest difference")
    x = uneven(B, C, L)
    ends = {
        "G = 1 and LayerNorm over (C, L)": (GroupNorm(1, C), LayerNorm((C, L))),
        "G = C and InstanceNorm": (GroupNorm(C, C), InstanceNorm(C)),
        "G = C and LayerNorm over (C, L)": (GroupNorm(C, C), LayerNorm((C, L))),
    }
    off = {}
    for name, pair in ends.items():
        a, b = (norm.double()(x) for norm in pair)
        off[name] = (a - b).abs().max().item()
        print(f"   {name:<33} {off[name]:.0e}")
    assert max(list(off.values())[:2]) < 1e-12
    return list(off.values())


def show_noise(log_dir, trials, sigma=2.0):
    print("4. mean that BatchNorm takes of B examples of N(0, 4), squared: measured, theory 4 / B")
    noise = {}
    for B in (2, 8, 32, 128):
        norm = BatchNorm(trials, momentum=1.0)  # each channel is a trial
        norm(sigma * torch.randn(B, trials))
        noise[B] = norm.running_mean.square().mean().item()
    for name in ("measured", "theory"):
        with SummaryWriter(log_dir / "noise" / name, purge_step=0) as writer:
            for B, value in noise.items():
                square = value if name == "measured" else sigma**2 / B
                writer.add_scalar("noise/log2_mean", math.log2(square), round(math.log2(B)))
    print("   " + "   ".join(f"B {B} {v:.4f} {sigma**2 / B:.4f}" for B, v in noise.items()))
    return noise


# --- what they are good for --------------------------------------------------------------------

SIGNAL = 32  # length of a signal
NORMS = {
    "none": lambda C: nn.Identity(),
    "BatchNorm": BatchNorm,
    "LayerNorm": lambda C: GroupNorm(1, C),  # over (C, L), any L
    "GroupNorm": lambda C: GroupNorm(4, C),
    "InstanceNorm": lambda C: InstanceNorm(C, affine=True),
}


def signals(n, task):
    """Waves x (n, 1, 32), labels (n,): which of 4 forms ("waveform") or how loud ("loudness")."""
    form, loud = torch.randint(4, (2, n))
    t = torch.arange(SIGNAL) / SIGNAL
    phase = 2 * math.pi * (t * (2 + 2 * torch.rand(n, 1)) + torch.rand(n, 1))  # 2 to 4 periods
    saw = (phase / (2 * math.pi)) % 1 * 2 - 1
    forms = torch.stack([phase.sin(), phase.sin().sign(), saw, 2 * saw.abs() - 1], dim=1)
    wave = forms[torch.arange(n), form] / forms[torch.arange(n), form].std(1, keepdim=True)
    gain = 2.0 ** (loud[:, None] - 1.5)  # 0.35 to 2.8
    x = gain * (wave + 0.3 * torch.randn(n, SIGNAL))
    return x[:, None], form if task == "waveform" else loud


def network(norm, bias=False):
    """(B, 1, 32) -> (B, 4)"""
    layers, channels = [], (1, 16, 32)
    for c_in, c_out in pairwise(channels):
        conv = nn.Conv1d(c_in, c_out, 5, stride=2, padding=2, bias=bias)  # a norm has its own
        layers += [conv, norm(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4))


def accuracy(model, x, labels):
    with torch.no_grad():
        return (model(x).argmax(1) == labels).double().mean().item()


def fit(norm, task, B, steps, seed):
    """Test accuracy after `steps` batches of B signals: compare norms, not batch sizes."""
    torch.manual_seed(seed)
    model = network(norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = zip(*(t.split(B) for t in signals(steps * B, task)), strict=True)
    for x, labels in batches:
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, labels = signals(2000, task)
    return accuracy(model.eval(), x, labels)


def show_tasks(seed, log_dir, norms, sizes, steps):
    print(
        f"5. which waveform at any loudness, {steps} steps: accuracy by batch size B, chance 0.25"
    )
    table = {}
    for name in tqdm(norms, leave=False, disable=None):
        with SummaryWriter(log_dir / "waveform" / name, purge_step=0) as writer:
            for B in sizes:
                table[name, B] = fit(NORMS[name], "waveform", B, steps, seed)
                writer.add_scalar("val/accuracy", table[name, B], round(math.log2(B)))
        shown = "   ".join(f"B {B:2} {table[name, B]:.3f}" for B in sizes)
        tqdm.write(f"   {name:<12}   {shown}")
    print(f"6. how loud, B {sizes[-1]}: accuracy")
    for name in norms:
        table["loudness", name] = fit(NORMS[name], "loudness", sizes[-1], steps, seed)
    print("   " + "   ".join(f"{name} {table['loudness', name]:.3f}" for name in norms))
    return table


def main(seed=0, log_dir=LOG_DIR, trials=20_000, norms=tuple(NORMS), sizes=(2, 8, 32), steps=400):
    torch.manual_seed(seed)
    return {
        "rest": show_axes(),
        "biased": show_running(),
        "ends": show_ends(),
        "noise": show_noise(log_dir, trials),
        "table": show_tasks(seed, log_dir, norms, sizes, steps),
    }


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
    torch.set_num_threads(1)  # networks this small are slower on two
    guard(main)
