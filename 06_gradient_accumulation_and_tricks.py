"""Micro-batches add up to one big batch if all are divided by its N and no layer mixes examples.

    accumulate      g = sum_b grad(loss sum_b / N)       mean_b / k weighs an example N / (k n_b)
    clip by norm    g <- g * min(1, c / (|g| + 1e-6))    |g| of all parameters together
    clip by value   g <- min(max(g, -c), c)              each element alone: the direction turns
    gradcheck       f'(x) against (f(x + e) - f(x - e)) / 2e, which is off by e^2 f''' / 6 and by
                    rounding, about u |f| / e (u = 6e-8 in float32, 1e-16 in float64)
    freeze          requires_grad = False: no gradient, so no step and no optimizer state

The gradient of a mean loss is a sum over examples: a batch too large for memory can be taken in
parts. BatchNorm in train mode breaks this: it normalizes each part by the part's own statistics.
A recurrent net multiplies by W once a time step, so that one step of SGD can throw it to infinity;
clipped by norm, no step is longer than lr c. Frozen layers let gradients through to those below,
and a frozen BatchNorm in train mode still moves its running mean.

Checked here   gradients by three divisors, and with three normalizations; clipped elements, norms
               and directions; rho^T in a recurrent gradient; a net that bursts unclipped learns
               clipped; how often gradcheck passes a right and a wrong gradient; what freezing stops
TensorBoard    accumulate/error by size of the last part, normalize/error by number of parts,
               recurrent/log10_loss (3 is where it is cut: the net has burst), gradcheck/log10_error
               by -10 log10 e, freeze/running_mean_moved
Try            y[::3] = -100 in show_divisors: cross_entropy skips such labels and the assert fails.
               What is N now? The number of labels that are left, in all parts together
Source         Pascanu et al. 2013, arXiv:1211.5063, section 3.2; torch.autograd.gradcheck;
               huggingface.co/blog/gradient_accumulation (2024: mean / k where N was meant)
"""

import copy
import math
import signal
import warnings
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "06_gradient_accumulation_and_tricks"
DIVISORS = {  # of the loss sum of one part: n of the N examples, one of k parts
    "sum_by_N": lambda n, N, k: N,
    "mean_by_k": lambda n, N, k: n * k,
    "mean": lambda n, N, k: n,
}


def draw(log_dir, tag, curve):
    """Write a dict {step: value} as one curve."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, value in curve.items():
            writer.add_scalar(tag, value, step)


def mlp(*norm):
    """(B, 8) -> logits (B, 3) in float64, with the layers `norm` of width 16 in between."""
    return nn.Sequential(nn.Linear(8, 16), *norm, nn.Tanh(), nn.Linear(16, 3)).double()


def accumulated_gradient(model, x, y, size, divisor="sum_by_N"):
    """What backward gathers in .grad (P,) from parts of `size` examples, or fewer in the last."""
    model.zero_grad()
    parts = list(zip(x.split(size), y.split(size), strict=True))
    for x_b, y_b in parts:
        loss_sum = F.cross_entropy(model(x_b), y_b, reduction="sum")
        (loss_sum / DIVISORS[divisor](len(y_b), len(y), len(parts))).backward()
    return parameters_to_vector(p.grad for p in model.parameters())


def accumulation_error(model, x, y, size, divisor="sum_by_N"):
    """|g - g_batch| / |g_batch|, where g_batch comes from the mean loss of one batch."""
    g = accumulated_gradient(model, x, y, size, divisor)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    g_batch = parameters_to_vector(p.grad for p in model.parameters())
    return ((g - g_batch).norm() / g_batch.norm()).item()


def show_divisors(log_dir, size=16, k=4, last=2):
    full = (k - 1) * size
    N = full + last
    print(f"1. gradient of {N} examples, the last {last} in a part of their own, against one batch")
    model, x, y = mlp(), torch.randn(k * size, 8).double(), torch.randint(3, (k * size,))
    errors = {}
    for name, divisor in DIVISORS.items():
        lasts = {n: (x[: full + n], y[: full + n]) for n in range(1, size + 1)}
        errors[name] = {n: accumulation_error(model, *xy, size, name) for n, xy in lasts.items()}
        draw(log_dir / "accumulate" / name, "accumulate/error", errors[name])
        weight, weight_last = (N / divisor(n, N, k) for n in (size, last))
        print(f"   {name:<10} weight of an example {weight:5.2f}, in the last part "
              f"{weight_last:5.2f}   relative error {errors[name][last]:.1e}")  # fmt: skip
    assert max(errors["sum_by_N"].values()) < 1e-14
    assert errors["mean_by_k"][size] < 1e-14
    return errors


def show_normalization(log_dir, N=64, parts=(1, 2, 4, 8, 16)):
    print(f"2. gradient of {N} examples in k equal parts, against one batch: relative error")
    print(f"   {'k':<16}" + "".join(f"{k:8d}" for k in parts))
    x, y = torch.randn(N, 8).double(), torch.randint(3, (N,))
    norms = {
        "BatchNorm": nn.BatchNorm1d(16),
        "BatchNorm_eval": nn.BatchNorm1d(16).eval(),
        "LayerNorm": nn.LayerNorm(16),
    }
    errors = {}
    for name, norm in norms.items():
        model = mlp(norm)
        errors[name] = {k: accumulation_error(model, x, y, N // k) for k in parts}
        draw(log_dir / "normalize" / name, "normalize/error", errors[name])
        print(f"   {name:<16}" + "".join(f"{error:8.0e}" for error in errors[name].values()))
    assert max(*errors["BatchNorm_eval"].values(), *errors["LayerNorm"].values()) < 1e-14
    return errors


def clip_norm_(gradients, c):
    """Scale all gradients by one factor, in place. Returns their norm before.

    Raises ValueError if c <= 0 or the norm is not finite: inf * (c / inf) is nan.
    """
    norm = torch.stack([g.norm() for g in gradients]).norm()
    if not (c > 0 and norm.isfinite()):
        raise ValueError(f"cannot clip a norm of {norm:g} to {c:g}")
    for g in gradients:
        g.mul_((c / (norm + 1e-6)).clamp(max=1))
    return norm


def clip_value_(gradients, c):
    """Cut every element to -c … c, in place."""
    for g in gradients:
        g.clamp_(-c, c)


def show_clipping(c=1.0):
    print(
        f"3. one gradient, and the same clipped at {c:g}, as by nn.utils.clip_grad_norm_, _value_"
    )
    g = torch.tensor([3.0, -4.0, 0.5])
    cosines = {}
    for name, clip in {"norm": clip_norm_, "value": clip_value_}.items():
        clipped = g.clone()
        clip([clipped], c)
        twin = torch.nn.Parameter(torch.zeros(3))
        twin.grad = g.clone()
        getattr(nn.utils, f"clip_grad_{name}_")([twin], c)
        torch.testing.assert_close(clipped, twin.grad)
        cosines[name] = F.cosine_similarity(g, clipped, dim=0).item()
        row = "  ".join(f"{element:6.3f}" for element in [*g.tolist(), *clipped.tolist()])
        print(f"   by {name:<5} {row}   |g| {clipped.norm():.3f}   cosine {cosines[name]:.3f}")
    return cosines


def recurrent(x, h, W, u, v):
    """x (B, T) and a first state h (H,) -> v . h_T (B,), where h_t = W h_{t-1} + u x_t."""
    for x_t in x.T:
        h = h @ W.T + x_t[:, None] * u  # (B, H)
    return h @ v


def random_weights(H, rho):
    """W = rho times an orthogonal matrix (H, H), and unit vectors u, v (H,)."""
    W = rho * nn.init.orthogonal_(torch.empty(H, H))
    return [w.clone().requires_grad_() for w in (W, *F.normalize(torch.randn(2, H)))]


def train_recurrent(weights, lr, clip, steps, T):
    """SGD towards y = sum_t x_t / sqrt(T), of variance 1, for as long as the loss is finite.

    Returns the losses, and how far each step moved the weights.
    """
    optimizer = torch.optim.SGD(weights, lr)
    losses, lengths = [], []
    for _ in range(steps):
        x = torch.randn(32, T)
        y_hat = recurrent(x, torch.zeros_like(weights[1]), *weights)
        loss = F.mse_loss(y_hat, x.sum(1) / math.sqrt(T))
        if not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        clip([w.grad for w in weights])
        before = parameters_to_vector(weights)
        optimizer.step()
        lengths.append((parameters_to_vector(weights) - before).norm().item())
        losses.append(loss.item())
    return losses, lengths


def show_recurrent(log_dir, seed, steps, T=20, rho=1.15, lr=0.03):
    print(f"4. a recurrent net over T = {T} time steps, rho = {rho}")
    weights, h = random_weights(16, rho), torch.randn(16, requires_grad=True)
    recurrent(torch.zeros(1, T), h, *weights).backward()
    growth = (h.grad.norm() / weights[2].norm()).item()
    assert math.isclose(growth, rho**T, rel_tol=1e-4)
    print(f"   |gradient by h_0| / |gradient by h_T|   measured {growth:.3f}   rho^T {rho**T:.3f}")
    runs = {
        "unclipped": (lr, lambda gradients: None),
        "unclipped_slow": (lr / 300, lambda gradients: None),
        "norm_1": (lr, partial(clip_norm_, c=1.0)),
        "value_0.1": (lr, partial(clip_value_, c=0.1)),
    }
    measured = {"growth": growth}
    for name, (rate, clip) in runs.items():
        torch.manual_seed(seed)
        losses, lengths = train_recurrent(random_weights(16, rho), rate, clip, steps, T)
        losses += [math.inf] * (steps - len(losses))
        curve = {step: math.log10(min(loss, 1e3)) for step, loss in enumerate(losses)}
        draw(log_dir / "recurrent" / name, "recurrent/log10_loss", curve)
        loss, longest = sum(losses[-20:]) / 20, max(lengths) / rate
        measured[name] = {"finite": len(lengths), "loss": loss, "longest": longest}
        print(f"   {name:<15} lr {rate:.4f}   finite losses {len(lengths):3d} of {steps}   "
              f"mean of last 20 {loss:.3f}   longest step / lr {longest:8.3f}")  # fmt: skip
    assert measured["norm_1"]["longest"] < 1.001
    return measured


class Cube(torch.autograd.Function):
    """x^3 with the gradient slope * x^2 by hand, which is right for slope = 3."""

    @staticmethod
    def forward(x, slope):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.slope = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return ctx.slope * x**2 * grad, None


def count_passes(slope, dtype, draws, **options):
    """At how many of `draws` random inputs gradcheck finds nothing wrong with Cube."""
    inputs = [torch.randn(4, dtype=dtype, requires_grad=True) for _ in range(draws)]
    check = partial(gradcheck, Cube.apply, raise_exception=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gradcheck itself warns of float32
        return sum(check((x, slope)) for x in inputs)


def difference_error(dtype, e, x):
    """Largest error of the central difference of x^3 at the elements of x, computed in `dtype`."""
    t = x.to(dtype)
    slope = ((t + e) ** 3 - (t - e) ** 3) / (2 * e)
    return (slope - 3 * t.double() ** 2).abs().max().item()


def show_gradcheck(log_dir, draws):
    print(f"5. gradcheck at {draws} inputs: how often a right gradient, and one 1 % wrong, pass")
    settings = {
        "float64": (torch.float64, {}),
        "float32": (torch.float32, {}),
        "float32, rtol 0.1": (torch.float32, {"rtol": 0.1}),
        "float32, eps 5e-3, atol 1e-3": (torch.float32, {"eps": 5e-3, "atol": 1e-3}),
    }
    passes, smallest = {}, {}
    for name, (dtype, options) in settings.items():
        right, wrong = (count_passes(slope, dtype, draws, **options) for slope in (3, 3.03))
        passes[name] = right, wrong
        print(f"   {name:<30} right {right:3d}   wrong {wrong:3d}")
    x = torch.randn(100)
    for name, dtype in {"float32": torch.float32, "float64": torch.float64}.items():
        errors = {s: difference_error(dtype, 10 ** (-s / 10), x) for s in range(5, 125, 5)}
        curve = {s: math.log10(error) for s, error in errors.items()}
        draw(log_dir / "gradcheck" / name, "gradcheck/log10_error", curve)
        best = min(errors, key=errors.get)
        smallest[name] = errors[best]
        print(f"   difference in {name}   error {errors[60]:.0e} at e = 1e-06   "
              f"smallest {errors[best]:.0e} at e = {10 ** (-best / 10):.0e}")  # fmt: skip
    return {"passes": passes, "smallest": smallest}


def freeze(layer):
    """No gradient from now on, and none left from before: an optimizer would go on along it."""
    for p in layer.parameters():
        p.requires_grad_(False)
        p.grad = None


def fine_tune(bn_mode, steps):
    """Train around two frozen layers: net before, net after, optimizer, running mean's way."""
    frozen = nn.Linear(16, 16), nn.BatchNorm1d(16).train(bn_mode == "train")
    net = nn.Sequential(nn.Linear(8, 16), *frozen, nn.ReLU(), nn.Linear(16, 3))
    freeze(net[1:3])
    before, moved = copy.deepcopy(net), {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    x, y = torch.randn(64, 8) + 1, torch.randint(3, (64,))
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        moved[step] = (net[2].running_mean - before[2].running_mean).norm().item()
    return before, net, optimizer, moved


def show_freezing(log_dir, seed, steps=50):
    print(f"6. layers 1 and 2 frozen, {steps} steps of AdamW with weight decay over all parameters")
    moved, rows = {}, {}
    for bn_mode in ("eval", "train"):
        torch.manual_seed(seed)
        before, net, optimizer, curve = fine_tune(bn_mode, steps)
        draw(log_dir / "freeze" / f"bn_{bn_mode}", "freeze/running_mean_moved", curve)
        moved[bn_mode] = curve[steps - 1]
    for i in (0, 1, 2, 4):
        old, new = (parameters_to_vector(model[i].parameters()) for model in (before, net))
        gradients = sum(p.grad is not None for p in net[i].parameters())
        states = sum(p in optimizer.state for p in net[i].parameters())
        rows[i] = (old != new).sum().item(), gradients, states
        print(f"   {i} {type(net[i]).__name__:<12} elements changed {rows[i][0]:3d} of "
              f"{len(old):3d}   gradients {gradients}   optimizer states {states}")  # fmt: skip
    print(f"   running mean moved, eval mode {moved['eval']:.2f}   train mode {moved['train']:.2f}")
    assert rows[1] == rows[2] == (0, 0, 0) and moved["eval"] == 0
    return {"rows": rows, "moved": moved}


def main(seed=0, log_dir=LOG_DIR, steps=120, draws=20):
    torch.manual_seed(seed)
    return {
        "divisors": show_divisors(log_dir),
        "normalization": show_normalization(log_dir),
        "cosines": show_clipping(),
        "recurrent": show_recurrent(log_dir, seed, steps),
        "gradcheck": show_gradcheck(log_dir, draws),
        "freezing": show_freezing(log_dir, seed),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)  # several times faster for networks this small
    guard(main)
