"""BatchNorm, LayerNorm, GroupNorm and InstanceNorm are one formula; its mean has different axes.

A norm stands between layers. It shifts and scales the numbers that share a mean so that their mean
is 0 and their variance 1. If all of them grow five times, its output stays as it is: no later layer
can see how large they were. So choose a norm by what it may not see: section 3. BatchNorm's outputs
depend on the whole batch in train(). In eval() it uses stored averages of mean and variance, so
there it does see the size: running <- (1 - m) running + m batch, with momentum m = 0.1.

    y = w * (x - mean) / sqrt(var + eps) + b         RMSNorm: y = w * x / sqrt(mean of x^2 + eps)

    x  (B, C, L): B examples, C channels, L positions; in an image, positions have rows and columns
    mean, var  over the axes below; var is the mean of (x - mean)^2    eps  1e-5: a divisor above 0
    w, b  learned, one a channel (InstanceNorm: if affine=True); in LayerNorm one a number of a mean

    norm           one mean for each               axes           seen in
    BatchNorm      channel                         (0, 2)         image classifiers
    GroupNorm      example and group of channels   2, part of 1   U-Nets; detection (small batches)
    InstanceNorm   example and channel             2              style transfer: contrast must go
    LayerNorm      example and position            1              Transformers; in Llama: RMSNorm

Needs          nn_linear.py, nn_conv2d.py, train.py
Checked here   plain = torch; our BatchNorm = torch's; the error of a batch's mean; what each norm
               cannot see; accuracy with four norms and with none, on two tasks
TensorBoard    accuracy/loudness_batch_32 by step: BatchNorm rises to 1, three norms stay near 0.25;
               accuracy/form_batch_2: there BatchNorm ends below GroupNorm
Try            in network, write bias=True: which norms can then hear how loud a wave is?
Answer         GroupNorm, LayerNorm: conv(5 x) + b is not 5 (conv(x) + b). InstanceNorm subtracts b
Source         arXiv:1502.03167 (BatchNorm), 1607.06450 (LayerNorm), 1607.08022 (InstanceNorm),
               1803.08494 (GroupNorm, eq. 7), 1910.07467 (RMSNorm)
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

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "model_architecture" / "normalization"


# --- 1. in everyday code -----------------------------------------------------------------------


def normalize(x, axes, eps=1e-5):
    """(x - mean) / sqrt(var + eps) over `axes`; var divides by the count n, not n - 1. Exercise."""
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


def rms_normalize(x, axes, eps=1e-5):
    """x / sqrt(mean of x^2 + eps), the mean over `axes`; nothing is subtracted. Exercise."""
    return x / (x.square().mean(axes, keepdim=True) + eps).sqrt()


def group_normalize(x, groups, eps=1e-5):
    """normalize x (B, C, ...) over all positions and C / groups neighbouring channels. Exercise."""
    return normalize(x.reshape(len(x), groups, -1), 2, eps).view_as(x)  # (B, G, C / G * L) inside


def show_everyday():
    x = torch.tensor([[[1.0, 3], [10, 14]], [[5, 7], [20, 24]]])  # 2 examples of 2 channels
    batch = nn.BatchNorm1d(2)(x)  # 2 channels; nn.BatchNorm2d is for images (B, C, H, W)
    group = nn.GroupNorm(1, 2)(x)  # 1 group that holds both channels
    instance = nn.InstanceNorm1d(2)(x)
    layer = nn.LayerNorm(2)(x.mT).mT  # .mT swaps the last two axes: (B, L, C), as in Transformers
    rms = nn.RMSNorm(2, eps=1e-5)(x.mT).mT
    rows = [
        ("x", "", x, x),
        ("BatchNorm1d(2)", "channel: 4", batch, normalize(x, (0, 2))),
        ("GroupNorm(1, 2)", "example: 4", group, group_normalize(x, 1)),
        ("InstanceNorm1d(2)", "example and channel: 2", instance, normalize(x, 2)),
        ("LayerNorm(2)", "example and position: 2", layer, normalize(x, 1)),
        ("RMSNorm(2)", "example and position: 2", rms, rms_normalize(x, 1)),
    ]
    print("1. In everyday code: what do five norms make of 2 examples of 2 channels, 2 positions?")
    print("                       one mean for each:        example 0                 example 1")
    print("   call of torch.nn    of how many numbers    " + 2 * "   channel 0    channel 1 ")
    for name, mean, y, _ in rows:
        pairs = [" ".join(f"{number:5.2f}" for number in pair) for pair in y.flatten(0, 1).tolist()]
        print(f"   {name:<17}   {mean:<23}   {'  '.join(pairs)}")
    off = max((y - plain).abs().max().item() for *_, y, plain in rows)
    print(f"   -> normalize, group_normalize, rms_normalize give the same: within {off:.0e}")
    return {name: y for name, _, y, _ in rows}, off


# --- 2. BatchNorm, complete --------------------------------------------------------------------


class BatchNorm(nn.Module):
    """nn.BatchNorm1d, 2d and 3d in one, for x (B, C, ...). Buffers are saved, but not trained."""

    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def track(self, x, axes):
        """Move running_mean and running_var, in place, towards mean and variance of x over `axes`.

        Count the batch in num_batches_tracked. running <- (1 - m) running + m batch, where m is the
        momentum. This variance divides by n - 1. Exercise.
        """
        self.num_batches_tracked += 1
        m = self.momentum
        self.running_mean.copy_((1 - m) * self.running_mean + m * x.mean(axes))
        self.running_var.copy_((1 - m) * self.running_var + m * x.var(axes, correction=1))

    def forward(self, x):
        C = len(self.running_mean)
        if x.dim() < 2 or x.shape[1] != C or (self.training and x.numel() < 2 * C):
            raise ValueError(f"x must be (B, {C}, ...), 2 values a channel, not {tuple(x.shape)}")
        axes, shape = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
        if self.training:
            self.track(x.detach(), axes)
            y = normalize(x, axes, self.eps)
        else:
            mean, var = self.running_mean.view(shape), self.running_var.view(shape)
            y = (x - mean) / (var + self.eps).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


def show_batch_norm(trials):
    print(f"2. What does BatchNorm keep of one batch? {trials:,} channels of mean 5, variance 4;")
    print("   momentum=1: the last batch alone")
    print("   batch    (running_mean - 5)^2,   4 / B:     running_var,   our class")
    print("   size B   mean over channels      expected   mean           minus torch's")
    kept = {}
    for B in (2, 8, 32, 128):
        ours, library = BatchNorm(trials, momentum=1.0), nn.BatchNorm1d(trials, momentum=1.0)
        ours, library = ours.double(), library.double()
        x = 5 + 2 * torch.randn(B, trials, dtype=torch.float64)
        off = (ours(x) - library(x)).abs().max(), (ours.eval()(x) - library.eval()(x)).abs().max()
        error, var = (library.running_mean - 5).square().mean(), library.running_var.mean()
        kept[B] = error.item(), var.item(), max(off).item()
        print("   {:6} {:22.4f} {:10.4f} {:13.3f} {:15.0e}".format(
            B, kept[B][0], 4 / B, *kept[B][1:]))  # fmt: skip
    few, many = (math.sqrt(kept[B][0]) for B in (2, 128))
    print(f"   -> the mean of 2 examples is typically off by {few:.1f}, of 128 by {many:.1f};")
    print(f"      running_var divides by B - 1: by B it would be {kept[2][1] / 2:.2f} for B = 2")
    return kept


# --- 3. what a norm cannot see -----------------------------------------------------------------


def norms_of(x, trained):
    """What each norm makes of x (B, C, L); `trained` is a BatchNorm in evaluation."""
    return {"no norm": x,
            "BatchNorm in train()": normalize(x, (0, 2)), "BatchNorm in eval()": trained(x),
            "GroupNorm of 2 groups": group_normalize(x, 2), "InstanceNorm": normalize(x, 2),
            "LayerNorm over C and L": group_normalize(x, 1),
            "LayerNorm over C": normalize(x, 1), "RMSNorm over C": rms_normalize(x, 1)}  # fmt: skip


def show_blindness(B=4, C=4, L=8):
    print("3. What can a norm not see? x changes in 4 ways: how far does example 0's output move?")
    print("                           other examples   example 0   its channel 0   all numbers")
    print("   norm                           times 5     times 5         times 5        plus 3")
    trained, rise = BatchNorm(C, momentum=1.0), 2 * torch.arange(C).view(C, 1)
    x = rise + 3 * torch.randn(B, C, L)
    trained(x), trained.eval()
    others, example, channel = x.clone(), x.clone(), x.clone()
    others[1:] *= 5
    example[0] *= 5
    channel[0, 0] *= 5
    after = [norms_of(z, trained) for z in (others, example, channel, x + 3)]
    moved = {}
    for name, y in norms_of(x, trained).items():
        moved[name] = [(outputs[name] - y)[0].abs().max().item() for outputs in after]
        print("   {:<23} {:14.2f} {:11.2f} {:15.2f} {:13.2f}".format(name, *moved[name]))
    blind = [name for name, changes in moved.items() if changes[1] < 0.01]
    mixing = [name for name, changes in moved.items() if changes[0] > 0.01]
    print("   -> behind these norms, no later layer can see how large example 0 was:\n      "
          f"{', '.join(blind)};\n      these mix examples: {', '.join(mixing)}")  # fmt: skip
    return moved


# --- 4. trained: the form of a wave, or its loudness -------------------------------------------

NAMES = ("none", "BatchNorm", "GroupNorm", "LayerNorm over C and L", "InstanceNorm")


def signals(n, task):
    """Waves x (n, 1, 32), labels (n,): which of 4 forms ("form") or how loud ("loudness")."""
    form, loud = torch.randint(4, (2, n))
    periods = torch.arange(32) / 32 * (2 + 2 * torch.rand(n, 1)) + torch.rand(n, 1)  # 2 to 4
    sine, saw = (2 * math.pi * periods).sin(), 2 * (periods % 1) - 1
    wave = torch.stack([sine, sine.sign(), saw, 2 * saw.abs() - 1], 1)[torch.arange(n), form]
    wave = wave / wave.std(1, keepdim=True) + 0.3 * torch.randn(n, 32)
    x = 2.0 ** (loud[:, None] - 1.5) * wave  # 0.35, 0.71, 1.4 or 2.8 times
    return x[:, None], form if task == "form" else loud


def norm_layer(name, C):
    """GroupNorm with one group is LayerNorm over C and L; with C groups it is InstanceNorm."""
    groups = {"GroupNorm": 4, "LayerNorm over C and L": 1, "InstanceNorm": C}
    if name in groups:
        return nn.GroupNorm(groups[name], C)
    return nn.BatchNorm1d(C) if name == "BatchNorm" else nn.Identity()


def network(name):
    """(B, 1, 32) -> logits (B, 4): a number for each class, the largest is the answer."""
    layers = []
    for c_in, c_out in ((1, 16), (16, 32)):
        conv = nn.Conv1d(c_in, c_out, 5, stride=2, padding=2, bias=False)  # the norm has a bias
        layers += [conv, norm_layer(name, c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4))


def fit(name, task, B, steps, seed):
    """{step: accuracy on 1000 other waves}, eight times during `steps` batches of B waves."""
    torch.manual_seed(seed)
    model, curve = network(name), {}
    test, labels = signals(1000, task)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        x, t = signals(B, task)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), t).backward()
        optimizer.step()
        if step % max(steps // 8, 1) == 0 or step == steps:
            with torch.no_grad():
                curve[step] = (model.eval()(test).argmax(1) == labels).double().mean().item()
    return curve


def show_tasks(seed, log_dir, names, sizes, steps):
    columns = [("form", B) for B in sizes] + [("loudness", sizes[-1])]
    print("4. Does a network learn a wave's form (sine, square, saw, triangle) or its loudness?")
    print(f"   Accuracy on 1000 other waves after {steps} batches of B waves; a guess has 0.25")
    print("   norm                  " + "".join(f"   {task}, B = {B:<2}" for task, B in columns))
    table = {}
    for name in tqdm(names, leave=False, disable=None):
        row, table[name] = "", []
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for task, B in columns:
                for step, accuracy in fit(name, task, B, steps, seed).items():
                    writer.add_scalar(f"accuracy/{task}_batch_{B}", accuracy, step)
                table[name].append(accuracy)
                row += f"   {accuracy:{len(task) + 8}.2f}"
        tqdm.write(f"   {name:<22}{row}")
    gaps = [a - b for a, b in zip(table["BatchNorm"], table["GroupNorm"], strict=True)]
    each = [f"{gap:+.2f} ({task}, B = {B})" for gap, (task, B) in zip(gaps, columns, strict=True)]
    form, loud = ("BatchNorm" if gap > 0 else "GroupNorm" for gap in (gaps[0], gaps[-1]))
    print(f"   -> BatchNorm minus GroupNorm: {', '.join(each)}\n      better: {form} for forms in "
          f"batches of {sizes[0]}, {loud} for loudness")  # fmt: skip
    return table


def main(seed=0, log_dir=LOG_DIR, trials=10_000, names=NAMES, sizes=(2, 32), steps=320):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "kept": show_batch_norm(trials)}
    measured["moved"] = show_blindness()
    measured["table"] = show_tasks(seed, log_dir, names, sizes, steps)
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
    torch.set_num_threads(1)  # networks this small are slower on two
    guard(main)
