"""Under Adam, L2 decay is divided by the size of the gradients; AdamW shrinks every weight alike.

    SGD     g <- g + wd w;  b <- mu b + g;  w <- w - lr b
    Adam    g <- g + wd w;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  then, in step t,
            w <- w - lr m' / (sqrt(v') + eps),  m' = m / (1 - b1^t),  v' = v / (1 - b2^t)
    AdamW   w <- (1 - lr wd) w,  then Adam's step with wd = 0

A learning rate is a function of the step t. A resumed scheduler needs its own state back, which
holds t, and the optimizer's, which holds the rate: StepLR and CosineAnnealingLR compute the next
rate from the last. OneCycleLR also moves beta1 from 0.95 down to 0.85 and back, unless told not to.

    step           lr gamma^floor(t / k)
    cosine         end + (lr - end) (1 + cos(pi t / T)) / 2
    one cycle      cosine from lr / 25 up to lr at 0.3 T - 1, then down to lr / 250,000 at T - 1
    warm-up        lr (t + 1) / w in the first w steps (t / w would waste one), then cosine

Checked here   ours = torch.optim after every step; the shrinkage of weights by the size s of their
               gradients: (1 - lr wd)^t under AdamW, (1 - lr wd / s)^t under Adam for s >> wd w;
               who decays, by count; the four schedules at every step; order; resuming
TensorBoard    decay/weight in sgd, adam and adamw/s_0.01 …; optim/lr, train/loss and val/loss by
               step in schedule/constant, constant_low, step, cosine, one_cycle, warmup_cosine
Try            gradients 1,000 times as large, wd = 0: whose steps stay? Adam's, for eps << sqrt(v')
Source         Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Loshchilov & Hutter 2019,
               arXiv:1711.05101, algorithm 2 (there 1 - wd, times a schedule, without lr), and
               2017, arXiv:1608.03983, eq. 5 (cosine); Smith & Topin 2018, arXiv:1708.07120 (one
               cycle, of straight lines; the cosines are PyTorch's default, after fastai)
"""

import argparse
import copy
import io
import math
import os
import signal
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, StepLR
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TOPIC = "training_engineering"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "optimizer_scheduler"
F64 = torch.float64


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


# --- optimizers --------------------------------------------------------------------------------


class ByParameter(torch.optim.Optimizer):
    """An optimizer that is `update(w, g, state, group)`; the base class keeps groups and state."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.update(w, w.grad, self.state[w], group)


class SGD(ByParameter):
    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def update(self, w, g, state, group):
        """One step of weight w with gradient g, in place, which is first g + weight_decay w.

        b <- momentum b + g, kept in state["b"] and 0 at first; w <- w - lr b. `group` holds "lr",
        "momentum", "weight_decay". Exercise.
        """
        g = g + group["weight_decay"] * w
        state["b"] = group["momentum"] * state.get("b", 0) + g
        w -= group["lr"] * state["b"]


class Adam(ByParameter):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def update(self, w, g, state, group):
        self.adam_step(w, g + group["weight_decay"] * w, state, group)

    def adam_step(self, w, g, state, group):
        """One step of Adam of weight w with gradient g, in place.

        m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; t <- t + 1; all begin at 0 and are kept in
        `state` under "m", "v", "t". With m' = m / (1 - b1^t) and v' = v / (1 - b2^t): w <- w - lr
        m' / (sqrt(v') + eps). `group` holds "betas" = (b1, b2), "lr", "eps". Exercise.
        """
        (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
        w -= lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)


class AdamW(Adam):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, w, g, state, group):
        """Decoupled decay, then Adam: w <- (1 - lr weight_decay) w in place, then adam_step.

        `group` holds "lr" and "weight_decay"; the gradient g does not see the decay. Exercise.
        """
        w *= 1 - group["lr"] * group["weight_decay"]
        self.adam_step(w, g, state, group)


def decay_groups(model, weight_decay):
    """Two parameter groups: vectors (biases, gains of norm layers) do not decay, all else does.

    [{"params": […], "weight_decay": weight_decay}, {"params": […], "weight_decay": 0.0}], of the
    parameters that require a gradient: first those of two or more axes. Embeddings decay, and so
    would the gain of a LayerNorm over several dimensions. Exercise.
    """
    parameters = [w for w in model.parameters() if w.requires_grad]
    return [
        {"params": [w for w in parameters if w.dim() >= 2], "weight_decay": weight_decay},
        {"params": [w for w in parameters if w.dim() < 2], "weight_decay": 0.0},
    ]


# --- schedules ---------------------------------------------------------------------------------


def step_lr(t, lr, k, gamma):
    """The rate at step t: lr, times gamma after every k steps. Exercise."""
    return lr * gamma ** (t // k)


def cosine_lr(t, lr, T, end=0.0):
    """The rate at step t: half a cosine from lr, at t = 0, to `end`, at t = T. Exercise."""
    return end + (lr - end) * (1 + math.cos(math.pi * t / T)) / 2


def one_cycle_lr(t, lr, T, start=0.3, div=25.0, final_div=1e4):
    """The rate at step t: half a cosine up from lr / div to lr, then one down.

    The way down ends at step T - 1, at lr / div / final_div. The first phase ends at start T - 1,
    one step before a reader would think, and need not be whole. Exercise.
    """
    top, first = start * T - 1, lr / div
    if t <= top:
        return cosine_lr(t, first, top, lr)
    return cosine_lr(t - top, lr, T - 1 - top, first / final_div)


def warmup_cosine_lr(t, lr, T, warmup):
    """The rate at step t: lr (t + 1) / warmup for `warmup` steps, then a cosine to 0 at step T.

    Exercise.
    """
    if t < warmup:
        return lr * (t + 1) / warmup
    return cosine_lr(t - warmup, lr, T - warmup)


def schedules(lr, T):
    """{name: (lr by step, scheduler of an optimizer)}, for T steps."""
    k, warmup = T // 4, T // 10
    relative = partial(warmup_cosine_lr, lr=1.0, T=T, warmup=warmup)
    return {
        "constant": (lambda t: lr, partial(LambdaLR, lr_lambda=lambda t: 1.0)),
        "constant_low": (lambda t: lr / 10, partial(LambdaLR, lr_lambda=lambda t: 0.1)),
        "step": (partial(step_lr, lr=lr, k=k, gamma=0.3), partial(StepLR, step_size=k, gamma=0.3)),
        "cosine": (partial(cosine_lr, lr=lr, T=T), partial(CosineAnnealingLR, T_max=T)),
        "one_cycle": (
            partial(one_cycle_lr, lr=lr, T=T), partial(OneCycleLR, max_lr=lr, total_steps=T)
        ),
        "warmup_cosine": (lambda t: lr * relative(t), partial(LambdaLR, lr_lambda=relative)),
    }  # fmt: skip


def train(model, optimizer, scheduler, batches):
    """One step for each batch (x, y); yields the rate that the step used, and its loss."""
    for x, y in batches:
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()  # after: the rate of step t is used up, this sets that of t + 1
        yield lr, loss.item()


# --- the sections ------------------------------------------------------------------------------


def two_layers(width=64):
    """A network (B, 8) -> (B, 1) with a norm layer: its parameters are matrices and vectors."""
    return nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 1))


def sine(steps, batch=32):
    """A network in float64 and `steps` batches x (B, 8), y = sin x_0 (B, 1) to learn."""
    x = torch.randn(steps, batch, 8, dtype=F64)
    return two_layers(16).double(), [(x_b, x_b[:, :1].sin()) for x_b in x]


def show_twins(steps):
    print(
        f"1. ours and torch.optim with weight decay, {steps} steps: largest difference of a weight"
    )
    start, batches = sine(steps)
    for ours, options in ((SGD, {"momentum": 0.9}), (Adam, {}), (AdamW, {"betas": (0.8, 0.99)})):
        weights = []
        for make in (ours, getattr(torch.optim, ours.__name__)):
            model = copy.deepcopy(start)
            optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1, **options)
            for _ in train(model, optimizer, StepLR(optimizer, 20), batches):
                weights.append(parameters_to_vector(model.parameters()).detach())
        off = (torch.stack(weights[:steps]) - torch.stack(weights[steps:])).abs().max().item()
        assert off < 1e-9
        print(f"   {ours.__name__:<5} {off:.0e}")


def mean_path(make, size, steps, pairs=128, **options):
    """Mean w_0 … w_steps of weights that start at 1, under noise of standard deviation `size`.

    Each has a twin that gets the opposite gradients, so that what the mean loses is decay.
    """
    w = torch.ones(2, pairs, dtype=F64, requires_grad=True)
    optimizer, path = make([w], **options), [1.0]
    for _ in range(steps):
        noise = size * torch.randn(pairs, dtype=F64)
        w.grad = torch.stack([noise, -noise])
        optimizer.step()
        path.append(w.mean().item())
    return path


def show_decay(seed, log_dir, steps, lr=0.01, wd=0.1):
    print(f"2. mean weight after {steps} steps, from 1, by the size s of its gradients")
    ends, exact = {}, (1 - lr * wd) ** steps
    for size in (0.01, 2, 20):
        for make in (SGD, AdamW, Adam):
            torch.manual_seed(seed)  # the same noise for all three
            path = mean_path(make, size, steps, lr=lr, weight_decay=wd)
            ends[make.__name__, size] = path[-1]
            draw(log_dir / make.__name__.lower() / f"s_{size}", {"decay/weight": path})
        assert all(abs(ends[name, size] - exact) < 1e-9 for name in ("SGD", "AdamW"))
        shown = "   ".join(  # + 0 turns -0.0 into 0.0
            f"{name} {round(ends[name, size], 3) + 0:.3f}" for name in ("SGD", "AdamW", "Adam")
        )
        theory = f"   theory {(1 - lr * wd / size) ** steps:.3f}" if size > wd else ""
        print(f"   s {size:<5} {shown}{theory}")
    print(f"   theory  SGD {exact:.3f}   AdamW {exact:.3f}")
    return ends


def show_groups(lr=0.1, wd=0.5):
    print("3. parameter groups: AdamW's first step with gradients of 0")
    groups = decay_groups(model := two_layers(), wd)
    counts = [sum(w.numel() for w in group["params"]) for group in groups]
    assert counts == [8 * 64 + 64, 64 + 2 * 64 + 1]  # matrices; biases, the norm's gain and bias
    before = [[w.detach().clone() for w in group["params"]] for group in groups]
    optimizer = AdamW(groups, lr)
    for w in model.parameters():
        w.grad = torch.zeros_like(w)
    optimizer.step()
    for group, old, factor in zip(groups, before, (1 - lr * wd, 1.0), strict=True):
        torch.testing.assert_close(group["params"], [factor * w for w in old])
    print(f"   {counts[0]} numbers in matrices: times {1 - lr * wd}   {counts[1]} others: times 1")
    return counts


def rates(make, steps, lr=1.0, scheduler_first=False):
    """The learning rates that `steps` steps use under the scheduler make(optimizer)."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler, used = make(optimizer), []
    for _ in range(steps):
        if scheduler_first:
            scheduler.step()
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not scheduler_first:
            scheduler.step()
    return used


def show_schedules(lr, T):
    print(f"4. schedules of {T} steps, lr {lr}: largest difference from the closed form")
    used = {}
    for name, (closed, make) in schedules(lr, T).items():
        used[name] = rates(make, T, lr)
        if name == "warmup_cosine":  # LambdaLR takes the closed form: its twins are these two
            warm = partial(LinearLR, start_factor=1 / (T // 10), total_iters=T // 10 - 1)
            cool = partial(CosineAnnealingLR, T_max=T - T // 10)
            used[name] = rates(warm, T // 10, lr) + rates(cool, T - T // 10, lr)
        off = max(abs(a - closed(t)) for t, a in enumerate(used[name]))
        assert off < 1e-12
        peak = max(range(T), key=closed)
        print(f"   {name:<13} {off:.0e}   first {used[name][0]:.1e}   highest at step {peak:3}   "
              f"last {used[name][-1]:.1e}")  # fmt: skip
    return used


def show_order():
    print("5. StepLR, a factor 0.1 every 3 steps: rates that 6 steps use")
    make, used = partial(StepLR, step_size=3), {}
    for first in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            used[first] = rates(make, 6, scheduler_first=first)
        name = "scheduler first" if first else "optimizer first"
        told = sum("lr_scheduler.step" in str(warning.message) for warning in caught)
        print(f"   {name}   {'  '.join(f'{rate:.2f}' for rate in used[first])}   warnings {told}")
    assert used[True] == [*used[False][1:], used[True][-1]]
    return used


def stored(state):
    """What comes back of a state dict from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def show_resume(T=60, lr=0.01):
    print(f"6. stopped after {T // 2} of {T} steps and resumed: largest differences")
    start, batches = sine(T)

    def session(parts, states, batches):
        """Train with the states of `parts` put back: the rates, and the state of each part."""
        model = copy.deepcopy(start)
        optimizer = AdamW(model.parameters(), lr)
        scheduler = CosineAnnealingLR(optimizer, T)  # by recursion, from the optimizer's rate
        objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        for name in parts:
            objects[name].load_state_dict(stored(states[name]))
        used = [rate for rate, _ in train(model, optimizer, scheduler, batches)]
        return used, {name: part.state_dict() for name, part in objects.items()}

    used, states = session((), {}, batches)
    _, half = session((), {}, batches[: T // 2])
    off, every = {}, ("model", "optimizer", "scheduler")
    for left_out in ("nothing", "scheduler", "optimizer"):
        parts = [part for part in every if part != left_out]
        again, resumed = session(parts, half, batches[T // 2 :])
        rate = max(abs(a - b) for a, b in zip(used[T // 2 :], again, strict=True))
        pairs = zip(states["model"].values(), resumed["model"].values(), strict=True)
        weight = max((a - b).abs().max().item() for a, b in pairs)
        off[left_out] = rate, weight
        print(f"   left out: {left_out:<9}   rate {rate:.1e}   weight {weight:.1e}")
    assert off["nothing"] == (0, 0)
    return off


def noisy_teacher(steps, batch, noise):
    """A network that learns, `steps` batches of a teacher's noisy answers, and a noiseless test."""
    model, teacher = two_layers(), two_layers()
    with torch.no_grad():
        teacher[-1].weight *= 4
        x, x_val = torch.randn(steps, batch, 8), torch.randn(512, 8)
        batches = [(x_b, teacher(x_b) + noise * torch.randn(batch, 1)) for x_b in x]
        return model, batches, (x_val, teacher(x_val))


def show_training(seed, log_dir, steps, lr, batch=32, noise=1.0):
    print(f"7. AdamW, {steps} batches of a teacher with noise {noise}: squared error without noise")
    torch.manual_seed(seed)
    start, batches, (x_val, y_val) = noisy_teacher(steps, batch, noise)
    ends = {}
    for name, (_, make) in tqdm(schedules(lr, steps).items(), disable=None):
        model, curves = copy.deepcopy(start), {"optim/lr": [], "train/loss": [], "val/loss": []}
        optimizer = AdamW(decay_groups(model, 0.01), lr)
        for rate, loss in train(model, optimizer, make(optimizer), batches):
            with torch.no_grad():
                val = F.mse_loss(model(x_val), y_val).item()
            for values, value in zip(curves.values(), (rate, loss, val), strict=True):
                values.append(value)
        ends[name] = val
        draw(log_dir / "schedule" / name, curves)
    print("   " + "   ".join(f"{name} {end:.3f}" for name, end in ends.items()))
    return ends


def main(seed=0, log_dir=LOG_DIR, twin_steps=50, decay_steps=1000, schedule_steps=100,
         train_steps=600, lr=0.02):  # fmt: skip
    torch.manual_seed(seed)
    show_twins(twin_steps)
    return {
        "decay": show_decay(seed, log_dir, decay_steps),
        "groups": show_groups(),
        "rates": show_schedules(lr, schedule_steps),
        "order": show_order(),
        "resume": show_resume(),
        "training": show_training(seed, log_dir, train_steps, lr),
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
