"""A learning rate that falls to 0 along a cosine ends with less error than a constant one, each at
its best size of five. Weight decay in AdamW shrinks all weights alike; in Adam it does not.

An optimizer moves the weights, and a scheduler sets its learning rate for the next step. Start with
AdamW, a short warm-up (the rate rises in the first steps) and half a cosine down to 0. Weight decay
pulls weights towards 0, so that a network does not learn the noise of few examples by heart. In
torch.optim.Adam it is a part of the gradient, and so it is divided by the gradient's size.

    w  one weight    g  its gradient    t  the step: 1, 2, ...    lr  learning rate    <-  becomes
    m, v     running means of g and g^2; they start at 0. In each step m keeps the share b1 = 0.9
             of its old value, and v keeps b2 = 0.999
    m', v'   the same, divided so that the start at 0 does not make them too small
    wd       weight decay    eps  a small number against division by 0    s  size of g

    m <- b1 m + (1 - b1) g;    m' = m / (1 - b1^t);    v and v' likewise, with b2 and g^2
    AdamW   w <- (1 - lr wd) w - lr m' / (sqrt(v') + eps), so decay leaves (1 - lr wd)^t of w
    Adam    g <- g + wd w first, then the same with wd = 0. If g is noise whose size s is far above
            wd w, sqrt(v') is about s, and decay leaves about (1 - lr wd / s)^t of w

Needs          nn_optim.py, train.py (which also saves both states, to go on after a stop)
Checked here   ten lines = torch.optim.AdamW; what decay leaves; five schedules; two hard cases
TensorBoard    decay/weight by step: adam/s_20 hardly falls, adamw/s_20 does. optim/lr, train/loss
               and val/loss by step in the runs schedule/...: in val/loss constant ends above cosine
Try            in show_everyday, write loss = 1000 * F.mse_loss(model(x), y). Which numbers change?
Answer         None of section 1: Adam's step is divided by the gradient's size, so 1000 cancels
Source         Kingma & Ba, arXiv:1412.6980, algorithm 1 (Adam); Loshchilov & Hutter, cosine:
               arXiv:1608.03983, equation 5; AdamW: arXiv:1711.05101, algorithm 2 (there wd is not
               multiplied by lr, in PyTorch it is)
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
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs/training_engineering/optimizer_scheduler"
SCHEDULES = ("constant", "step", "cosine", "one_cycle", "warmup_cosine")
PEAKS = (0.001, 0.003, 0.01, 0.03, 0.1)  # the largest rate of a schedule


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


# --- 1. in everyday code -----------------------------------------------------------------------


def adamw_step(w, g, m, v, t, lr, wd=0.01, b1=0.9, b2=0.999, eps=1e-8):
    """Step t = 1, 2, ... of AdamW, as on top: changes w, m and v in place. Exercise."""
    w *= 1 - lr * wd
    m += (1 - b1) * (g - m)
    v += (1 - b2) * (g**2 - v)
    m_hat = m / (1 - b1**t)
    v_hat = v / (1 - b2**t)
    w -= lr * m_hat / (v_hat.sqrt() + eps)


def decay_groups(model, weight_decay):
    """Two groups of parameters: matrices decay, vectors (biases, the gains of norm layers) do not.

    [{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}], of
    the parameters that require a gradient: first those of two or more axes. Exercise.
    """
    trained = [w for w in model.parameters() if w.requires_grad]
    matrices, vectors = [w for w in trained if w.dim() > 1], [w for w in trained if w.dim() < 2]
    decay = {"params": matrices, "weight_decay": weight_decay}
    return [decay, {"params": vectors, "weight_decay": 0.0}]


def warmup_cosine_lr(t, lr, T, warmup):
    """The rate at t = 0, 1, ...: in `warmup` steps it is lr (t + 1) / warmup, so never 0.

    Then half a cosine from lr, at t = warmup, to 0, at t = T. Exercise.
    """
    if t < warmup:
        return lr * (t + 1) / warmup
    return lr * (1 + math.cos(math.pi * (t - warmup) / (T - warmup))) / 2


def show_everyday(T=10, warmup=2):
    print("1. In everyday code: AdamW, a schedule and the loop, for a Linear with one input")
    print("   (weight and bias start at 1, the input is 1, the target 0; only the weight decays)")
    print("   step       lr   weight, torch's AdamW   weight, adamw_step   bias, torch's AdamW")
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = torch.optim.AdamW(decay_groups(model, weight_decay=0.5), lr=0.1)
    scheduler = LambdaLR(
        optimizer, lambda t: warmup_cosine_lr(t, 1.0, T, warmup)
    )  # LambdaLR multiplies lr=0.1 by this
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    w, m, v, rows = torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), []
    for step in range(1, T + 1):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        lr = optimizer.param_groups[0]["lr"]  # the rate that this step uses
        optimizer.step()
        scheduler.step()  # after optimizer.step(): sets the rate of the next step
        adamw_step(w, model.weight.grad, m, v, step, lr, wd=0.5)  # the same by hand
        assert torch.allclose(w, model.weight, atol=1e-5)
        rows.append((lr, model.weight.item(), w.item(), model.bias.item()))
        if step in (1, 2, 3, T):
            print("   {:4}   {:6.4f}   {:21.4f}   {:18.4f}   {:19.4f}".format(step, *rows[-1]))
    lr, weight, _, bias = rows[0]
    print(f"   -> step 1 moves the bias by {1 - bias:.4f}, and lr is {lr:.4f}; decay takes "
          f"{bias - weight:.4f} more from the weight")  # fmt: skip
    return rows


# --- 2. what weight decay does -----------------------------------------------------------------


def mean_path(make, s, steps, pairs=128, **options):
    """The mean weight after 0, 1, ... steps of noise g and -g, by which it loses decay alone."""
    w = torch.ones(2, pairs, dtype=torch.float64, requires_grad=True)
    optimizer, path = make([w], **options), [1.0]
    for _ in range(steps):
        noise = s * torch.randn(pairs, dtype=torch.float64)
        w.grad = torch.stack([noise, -noise])
        optimizer.step()
        path.append(w.mean().item())
    return path


def show_decay(seed, log_dir, steps, lr=0.01, wd=0.1):
    print(f"2. How much of a weight does decay leave after {steps} steps? lr {lr}, wd {wd}")
    print("   (the gradients are noise of size s, without a direction)")
    print("   size s of the noise   SGD     AdamW   (1 - lr wd)^t   Adam    (1 - lr wd / s)^t")
    left, exact = {}, (1 - lr * wd) ** steps
    for s in (0.01, 2, 20):
        for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam):
            torch.manual_seed(seed)  # the same noise for all three
            path = mean_path(make, s, steps, lr=lr, weight_decay=wd)
            left[make.__name__, s] = path[-1]
            draw(log_dir / make.__name__.lower() / f"s_{s}", {"decay/weight": path})
        sgd, adamw, adam = (left[name, s] for name in ("SGD", "AdamW", "Adam"))
        assert abs(sgd - exact) < 1e-9 and abs(adamw - exact) < 1e-9
        law = f"{(1 - lr * wd / s) ** steps:.3f}" if s > wd else "-"
        print(f"   {s:<19}   {sgd:.3f}   {adamw:.3f}   {exact:<13.3f}   {abs(adam):.3f}   {law}")
    lost = {key: 1 - share for key, share in left.items()}
    print("   (s = 0.01 is far below wd: there decay is the larger part of Adam's gradient)")
    print(f"   -> decay takes {lost['AdamW', 2]:.2f} of the weight with AdamW if s = 2, "
          f"{lost['AdamW', 20]:.2f} if s = 20; with Adam {lost['Adam', 2]:.2f} and "
          f"{lost['Adam', 20]:.2f}")  # fmt: skip
    return left


# --- 3. which schedule -------------------------------------------------------------------------


def make_scheduler(name, optimizer, lr, T):
    """PyTorch's scheduler for T steps of an optimizer whose rate is lr."""
    if name == "step":
        return StepLR(optimizer, step_size=T // 4, gamma=0.3)  # times 0.3 after each quarter
    if name == "cosine":
        return CosineAnnealingLR(optimizer, T_max=T)
    if name == "one_cycle":  # moves b1 too, the other way
        return OneCycleLR(optimizer, max_lr=lr, total_steps=T)
    if name == "warmup_cosine":
        return LambdaLR(optimizer, lambda t: warmup_cosine_lr(t, 1.0, T, T // 10))
    return LambdaLR(optimizer, lambda t: 1.0)


class PostNorm(nn.Module):  # the block of the first transformers: x -> norm(x + f(x))
    def __init__(self, n):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(n, n), nn.Linear(n, n), nn.LayerNorm(n)

    def forward(self, x):
        return self.norm(x + self.b(self.a(x).relu()))


def network(blocks=0, n=64):
    """A network (B, 8) -> (B, 1)."""
    first = nn.Sequential(nn.Linear(8, n), nn.LayerNorm(n), nn.SiLU())
    return nn.Sequential(first, *[PostNorm(n) for _ in range(blocks)], nn.Linear(n, 1))


def task(seed, blocks, N):
    """A network; N examples, another network's answers plus noise; 256 new ones without noise."""
    torch.manual_seed(seed)
    model, teacher = network(blocks), network()
    with torch.no_grad():
        teacher[-1].weight *= 4
        x, x_new = torch.randn(N, 8), torch.randn(256, 8)
        y, y_new = teacher(x) + torch.randn(N, 1), teacher(x_new)
    return model, x, y, x_new, y_new


def train(seed, name, lr, steps, wd=0.01, blocks=0, N=10_000):
    """The loop of section 1. {"optim/lr", "train/loss", "val/loss": lists by step}."""
    model, x, y, x_new, y_new = task(seed, blocks, N)
    optimizer = torch.optim.AdamW(decay_groups(model, wd), lr)
    scheduler = make_scheduler(name, optimizer, lr, steps)
    curves = {"optim/lr": [], "train/loss": [], "val/loss": []}
    for i in torch.randint(N, (steps, 32)):  # a batch of 32
        loss = F.mse_loss(model(x[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        curves["optim/lr"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        curves["train/loss"].append(loss.item())
        with torch.no_grad():
            curves["val/loss"].append(F.mse_loss(model(x_new), y_new).item())
    return curves


def show_schedules(log_dir, seeds, steps, peaks):
    print(f"3. Which schedule? {steps} steps of AdamW; squared error at the end on new examples")
    cells = "".join(f"   {lr:<5}" for lr in peaks)
    print(f"   {'':<13}   rate / peak at step     mean of {len(seeds)} seeds, by peak rate")
    print(
        f"   {'schedule':<13}   0       {steps // 2:<5}   {steps - 1:<5}{cells}   best peak's range"
    )
    used, ends, best = {}, {}, {}
    for name in tqdm(SCHEDULES, disable=None):
        errors = {}
        for lr in peaks:
            runs = [train(seed, name, lr, steps) for seed in seeds]
            errors[lr] = [curves["val/loss"][-1] for curves in runs]
            ends[name, lr] = sum(errors[lr]) / len(seeds)
        draw(log_dir / "schedule" / name, runs[0])  # with the last of the peaks
        used[name] = [rate / lr for rate in runs[0]["optim/lr"]]
        best[name] = errors[min(peaks, key=lambda lr: ends[name, lr])]
    for name in SCHEDULES:
        shares = "   ".join(f"{used[name][t]:.3f}" for t in (0, steps // 2, steps - 1))
        cells = "".join(f"   {ends[name, lr]:.3f}" for lr in peaks)
        print(f"   {name:<13}   {shares}{cells}   {min(best[name]):.3f} to {max(best[name]):.3f}")
    constant, *falling = [sum(best[name]) / len(seeds) for name in SCHEDULES]
    print(f"   -> at its best peak constant ends at {constant:.3f}, the four that fall at "
          f"{min(falling):.3f} to {max(falling):.3f}")  # fmt: skip
    return used, ends


# --- 4. when warm-up and weight decay matter ---------------------------------------------------


def show_hard_cases(seeds, steps, lr=0.03):
    print(f"4. When do warm-up and weight decay matter? Peak {lr}, {steps} steps, as in section 3")
    print("   (PostNorm: blocks x -> LayerNorm(x + f(x)), as in the first transformers)")
    print(
        f"   squared error on new examples            mean   lowest   highest of {len(seeds)} seeds"
    )
    ends = {}
    for what, name, options in (
        ("answer the mean of 64 targets", None, {}),
        ("4 blocks of PostNorm, no warm-up", "cosine", {"blocks": 4}),
        ("4 blocks of PostNorm, warm-up", "warmup_cosine", {"blocks": 4}),
        ("64 examples only, weight decay 0.01", "warmup_cosine", {"N": 64}),
        ("64 examples only, weight decay 10", "warmup_cosine", {"N": 64, "wd": 10}),
    ):
        errors = []
        for seed in seeds:
            if name:
                errors.append(train(seed, name, lr, steps, **options)["val/loss"][-1])
            else:
                _, _, y, _, y_new = task(seed, 0, 64)
                errors.append((y_new - y.mean()).square().mean().item())
        ends[what] = sum(errors) / len(seeds)
        print(f"   {what:<36}   {ends[what]:6.3f}   {min(errors):6.3f}   {max(errors):7.3f}")
    null, cold, warm, weak, strong = ends.values()
    print(f"   -> with 4 PostNorm blocks warm-up leaves {warm / cold:.2f} of the error")
    print(f"   -> with 64 examples decay 10 leaves {strong / weak:.2f} of the error of decay 0.01, "
          f"{strong / null:.2f} of the mean's")  # fmt: skip
    print(f"   (usual decays are 0.01 to 0.1, in runs of many more steps than {steps})")
    return ends


def main(seed=0, log_dir=LOG_DIR, decay_steps=1000, steps=200, runs=3, peaks=PEAKS):
    torch.manual_seed(seed)
    seeds = range(seed * runs, (seed + 1) * runs)
    measured = {"everyday": show_everyday(), "decay": show_decay(seed, log_dir, decay_steps)}
    measured["rates"], measured["schedules"] = show_schedules(log_dir, seeds, steps, peaks)
    measured["hard"] = show_hard_cases(seeds, steps)
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
