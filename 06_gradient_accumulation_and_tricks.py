"""Parts of a batch add up to the gradient of the whole batch if each loss sum is divided by N, the
number of examples in all parts, and no layer mixes or drops examples.

A batch too large for memory is taken in k parts: backward() adds the gradient of each part to
.grad, and only then the optimizer makes one step. Whoever divides the mean loss of each part by k
gives the examples of a short last part too much weight, and no error is raised. Three more tricks
belong to the same loop: clip a gradient that is too long, check one that you wrote, freeze a layer.

    accumulate      g = sum over the parts of grad(loss sum of the part / N)
    clip by norm    g <- g * min(1, c / |g|)           one factor for all: the direction stays
    clip by value   g_i <- min(max(g_i, -c), c)        each element alone: the direction may turn
    check           f'(x) is about (f(x + h) - f(x - h)) / 2h; its error is h^2 f'''(x) / 6, and
                    rounding adds about u |f| / h

    N  examples in all parts     g  gradient of all parameters, |g| its length     c  the limit
    h  a small step     u  relative rounding: 6e-8 in float32, 1e-16 in float64

Needs          02_autograd_basics.py; for sections 3 and 7 nn_common_layers.py and nn_optim.py
Checked here   g by three divisors; which layers break the sum; clipping = torch's; a recurrent net
               that bursts unclipped and arrives clipped; what gradcheck passes; what freezing stops
TensorBoard    accumulate/error by examples in the last part; layers/error by number of parts k;
               clip/w by step, while |w| < 2: only the run clipped gets to 1;
               freeze/running_mean_moved by step: 0 in the run eval, rising in the run train
Try            in show_divisors, after the line that draws y, add  y[::3] = -100  (cross_entropy
               leaves such labels out): which loss is exact now?
Answer         None of the three: N must be the number of labels that are left in all the parts
Source         Pascanu et al. 2013, arXiv:1211.5063, section 3.2 (clipping by norm);
               huggingface.co/blog/gradient_accumulation (2024: mean / k where N was meant)
"""

import copy
import math
import signal
import warnings
from itertools import pairwise
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
EXACT = 1e-12  # float64: whatever is smaller is rounding


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(k=2):
    print(f"1. In everyday code: y = w x, lr = 0.1, one step per k = {k} batches")
    print("   .grad is that of loss sum / N, N examples in a step (2, last 1), clipped to 6")
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    print("   batch     x     y    loss   .grad   clipped   w after")
    batches, rows = [(1.0, 2.0), (2.0, 4.0), (1.0, 2.0), (2.0, 4.0), (1.0, 2.0)], []
    for i, (x, y) in enumerate(batches, 1):
        loss = F.mse_loss(model(torch.tensor([x])), torch.tensor([y]), reduction="sum")
        N = k if i <= len(batches) // k * k else len(batches) % k  # examples in this step's batches
        (loss / N).backward()  # adds to .grad; right for batches of any size
        grad, clipped = model.weight.grad.item(), math.nan
        if i % k == 0 or i == len(batches):  # the last batches get their step, too
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=6.0)  # just before the step
            clipped = model.weight.grad.item()
            optimizer.step()
            optimizer.zero_grad()  # only here: the next gradients start from nothing
        rows.append((loss.item(), grad, clipped, model.weight.item()))
        row = "  ".join(f"{value:6.2f}" for value in (loss, grad, clipped)).replace("nan", "  -")
        print(f"   {i:5d}  {x:4.1f}  {y:4.1f}  {row}    {rows[-1][3]:7.3f}")
    steps = len({w for *_, w in rows} - {0.0})
    print(f"   -> {steps} steps for {len(rows)} batches: w moves after {k}, and after the last one")

    x = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    checked = gradcheck(torch.sin, (x,))  # True, or an error that shows both gradients
    print(f"   gradcheck(torch.sin, (x,)) is {checked}: autograd agrees with differences of sin")

    net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    net[0].requires_grad_(False)  # freezes the first layer
    net(torch.ones(1, 1)).sum().backward()
    frozen = [layer.weight.grad is None for layer in net]
    print(f"   after net[0].requires_grad_(False), is .grad of layers 0 and 1 None? {frozen}")
    return {"rows": rows, "checked": checked, "frozen": frozen}


# --- 2. by which number to divide --------------------------------------------------------------


def divisor(rule, n, N, k):
    """By what the loss sum of a part of n examples is divided; N examples lie in k parts."""
    return {"sum / N": N, "mean / k": n * k, "mean": n}[rule]


def accumulated_gradient(model, x, y, size, rule="sum / N"):
    """The gradient of all parameters, one vector (P,), gathered from parts of `size` examples.

    Empties .grad and splits x (N, 8) and labels y (N,); the last part may be shorter. For each part
    sums the cross-entropies of model(x_part), divides by divisor(rule, n, N, k), goes backward.
    Returns the .grad of all model.parameters() by parameters_to_vector. Exercise.
    """
    model.zero_grad()
    parts = list(zip(x.split(size), y.split(size), strict=True))
    for x_part, y_part in parts:
        loss_sum = F.cross_entropy(model(x_part), y_part, reduction="sum")
        (loss_sum / divisor(rule, len(y_part), len(y), len(parts))).backward()
    return parameters_to_vector(p.grad for p in model.parameters())


def accumulation_error(model, x, y, size, rule="sum / N"):
    """|g - g_batch| / |g_batch|, where g_batch comes from the mean loss of one whole batch."""
    g = accumulated_gradient(model, x, y, size, rule)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    g_batch = parameters_to_vector(p.grad for p in model.parameters())
    return ((g - g_batch).norm() / g_batch.norm()).item()


def mlp(*middle):
    """x (B, 8) -> logits (B, 3) in float64, with the layers `middle` of width 16 in between."""
    return nn.Sequential(nn.Linear(8, 16), *middle, nn.Tanh(), nn.Linear(16, 3)).double()


def show_divisors(log_dir, size=16, k=4, last=2):
    full = (k - 1) * size
    print(
        f"2. By what must the loss sum be divided? N = {full} + last, k = {k} parts, n in one part"
    )
    print("   loss of a part   weight (1 = as in one batch)   relative error of the gradient")
    heads = f"part of {size}   last of {last}", f"last of {last}", f"last of {size}"
    print("                    {:<28}   {:<10}   {}".format(*heads))
    model, errors = mlp(), {}
    x, y = torch.randn(k * size, 8).double(), torch.randint(3, (k * size,))
    for rule, run in {"sum / N": "sum_by_N", "mean / k": "mean_by_k", "mean": "mean"}.items():
        pairs = {n: (x[: full + n], y[: full + n]) for n in range(1, size + 1)}
        errors[rule] = {n: accumulation_error(model, *pairs[n], size, rule) for n in pairs}
        draw(log_dir / "accumulate" / run, "accumulate/error", errors[rule])
        weights = [(full + last) / divisor(rule, n, full + last, k) for n in (size, last)]
        print(f"   {rule:<15}{weights[0]:12.2f}   {weights[1]:9.2f}            "
              f"{errors[rule][last]:<10.1e}   {errors[rule][size]:.1e}")  # fmt: skip
    exact = [rule for rule in errors if max(errors[rule].values()) < EXACT]
    print(f"   -> exact for every size of the last part: {', '.join(exact) or 'none'}")
    return errors


# --- 3. layers that break the sum --------------------------------------------------------------


def middle_layers():
    """The layers to try, each (B, 16) -> (B, 16). The BatchNorm in eval mode has seen data."""
    used = nn.BatchNorm1d(16)
    used(3 * torch.randn(64, 16) + 1)  # a fresh one has mean 0, variance 1 and changes nothing
    return {"BatchNorm_train": nn.BatchNorm1d(16), "BatchNorm_eval": used.eval(),
            "LayerNorm": nn.LayerNorm(16), "Dropout_train": nn.Dropout(0.2)}  # fmt: skip


def show_layers(log_dir, N=64, parts=(1, 2, 4, 8, 16)):
    print(f"3. {N} examples in k equal parts: which layers change the gradient? Relative error")
    print("   layer, mode       " + "".join(f"{f'k = {k}':>9}" for k in parts))
    x, y = torch.randn(N, 8).double(), torch.randint(3, (N,))
    errors = {}
    for name, layer in middle_layers().items():
        model = mlp(layer)
        errors[name] = {k: accumulation_error(model, x, y, N // k) for k in parts}
        draw(log_dir / "layers" / name, "layers/error", errors[name])
        print(f"   {name:<18}" + "".join(f"{error:9.0e}" for error in errors[name].values()))
    exact = [name for name in errors if max(errors[name].values()) < EXACT]
    random = [name for name in errors if errors[name][1] > EXACT]
    print(f"   -> exact at every k: {', '.join(exact)}")
    print(f"   -> {', '.join(random)} differs at k = 1, too: it draws anew, in parts or not")
    return errors


# --- 4. clip a gradient ------------------------------------------------------------------------


def clip_norm_(gradients, c):
    """Multiply all `gradients`, a list of tensors, in place by one factor, so that |g| <= c.

    |g| is the length of all of them together, the factor min(1, c / (|g| + 1e-6)). Returns |g| as
    it was. Raises ValueError if c <= 0 or |g| is not finite: inf * (c / inf) is nan. Exercise.
    """
    norm = torch.stack([g.norm() for g in gradients]).norm()
    if not (c > 0 and norm.isfinite()):
        raise ValueError(f"cannot clip a norm of {norm:g} to {c:g}")
    for g in gradients:
        g.mul_((c / (norm + 1e-6)).clamp(max=1))
    return norm


def show_clipping(c=1.0):
    g = torch.tensor([3.0, -4.0, 0.5])
    print(f"4. The gradient {g.tolist()}, clipped at c = {c:g}: does its direction stay?")
    print("   clipped by                                  g     |g|   cosine with g")
    by_hand, by_norm, by_value = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    for p in (by_hand, by_norm, by_value):
        p.grad = g.clone()
    clip_norm_([by_hand.grad], c)
    nn.utils.clip_grad_norm_([by_norm], c)
    nn.utils.clip_grad_value_([by_value], c)
    rows, names = {}, ("clip_norm_, by hand", "nn.utils.clip_grad_norm_", "clip_grad_value_")
    for name, p in zip(names, (by_hand, by_norm, by_value), strict=True):
        rows[name] = (
            *p.grad.tolist(),
            p.grad.norm().item(),
            F.cosine_similarity(g, p.grad, 0).item(),
        )
        row = " ".join(f"{element:6.3f}" for element in rows[name][:3])
        print(f"   {name:<24} {row}  {rows[name][3]:6.3f}   {rows[name][4]:13.3f}")
    same = [name for name in names if rows[name][4] > 1 - 1e-6]
    print(f"   -> it stays with {' and with '.join(same)}")
    return rows


# --- 5. what clipping is for -------------------------------------------------------------------


def recur(W, a, T):
    """The state (n,) after T time steps a <- W a: a recurrent net has one W (n, n) for them all."""
    for _ in range(T):
        a = W @ a
    return a


def descend(lr, c, steps, T=20):
    """The path of one weight w from 1.3, by SGD on (w^T - 1)^2, clipped at c; it ends at a nan."""
    W = torch.tensor([[1.3]], requires_grad=True)
    optimizer, path = torch.optim.SGD([W], lr), [W.item()]
    while len(path) <= steps and math.isfinite(path[-1]):
        loss = (recur(W, torch.ones(1), T) - 1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([W], c)  # after backward, before step
        optimizer.step()
        path.append(W.item())
    return path


def show_recurrent(log_dir, steps=500):
    print(
        "5. One weight w, used 20 times (a recurrent net): does SGD bring w from 1.3 to w^20 = 1?"
    )
    print("   run                  lr   clipped at   longest step   steps   w at the end")
    runs = {"unclipped": (1e-3, math.inf), "unclipped_1e-6": (1e-6, math.inf),
            "unclipped_1e-7": (1e-7, math.inf), "clipped": (1e-3, 1.0)}  # fmt: skip
    paths = {}
    for name, (lr, c) in runs.items():
        path = paths[name] = descend(lr, c, steps)
        draw(log_dir / "clip" / name, "clip/w", {i: w for i, w in enumerate(path) if abs(w) < 2})
        longest = max(abs(b - a) for a, b in pairwise(path) if math.isfinite(b))
        print(f"   {name:<14} {lr:8.0e}   {c:10g}   {longest:12.3f}   "
              f"{len(path) - 1:5d}   {path[-1]:12.3f}")  # fmt: skip
    arrived = [name for name in runs if abs(paths[name][-1] - 1) < 1e-3]
    print(f"   -> within {steps} steps, at these learning rates, arrives: {', '.join(arrived)}")
    return paths


# --- 6. check a gradient -------------------------------------------------------------------------


def central_difference(f, x, h):
    """f'(x) at each element of x, for an elementwise f, by (f(x + h) - f(x - h)) / 2h. Exercise."""
    return (f(x + h) - f(x - h)) / (2 * h)


def cube(x, wrong=0.0):
    """x^3; the gradient is too large by the share `wrong`: y - y.detach() is 0, not its slope."""
    y = x**3
    return y + wrong * (y - y.detach())


def count_passes(wrong, dtype, draws, **options):
    """At how many of `draws` random inputs gradcheck finds nothing wrong with cube."""
    inputs = [torch.randn(4, dtype=dtype, requires_grad=True) for _ in range(draws)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gradcheck itself warns of float32
        return sum(gradcheck(cube, (x, wrong), raise_exception=False, **options) for x in inputs)


def show_gradcheck(draws):
    print(
        "6. Is a gradient right? The slope of x^3 by differences with gradcheck's default h = 1e-6"
    )
    x = torch.tensor([1.0, 2.0, 3.0])
    slopes = {"3 x^2": 3 * x**2, "float64": central_difference(cube, x.double(), 1e-6),
              "float32": central_difference(cube, x, 1e-6)}  # fmt: skip
    print(f"   slope by           at x = {'          '.join(f'{t:g}' for t in x)}")
    for name, slope in slopes.items():
        print(f"   {name:<17}" + " ".join(f"{s:10.6f}" for s in slope))
    print(f"   At how many of {draws} inputs does gradcheck accept")
    print("   input, options                   x^3   gradient 1 % too large")
    f32, passes = torch.float32, {}
    for name, dtype, options in (
        ("float64", torch.float64, {}),
        ("float32", f32, {}),
        ("float32, rtol=0.1", f32, {"rtol": 0.1}),
        ("float32, eps=5e-3, atol=1e-4", f32, {"eps": 5e-3, "atol": 1e-4}),
    ):
        passes[name] = [count_passes(wrong, dtype, draws, **options) for wrong in (0, 0.01)]
        print(f"   {name:<30} {passes[name][0]:6d}   {passes[name][1]:22d}")
    told = [name for name in passes if passes[name] == [draws, 0]]
    print(f"   -> it tells them apart at all inputs with: {'; '.join(told)}")
    return slopes, passes


# --- 7. freeze layers --------------------------------------------------------------------------


def freeze(layer):
    """From now on no parameter of `layer` requires a gradient, and its .grad is None. Exercise.

    A .grad that is left from before would still be followed by an optimizer.
    """
    for p in layer.parameters():
        p.requires_grad_(False)
        p.grad = None


def fine_tune(mode, steps, seed=0):
    """Train around two frozen layers: net before, net after, optimizer, running mean's way."""
    torch.manual_seed(seed)  # both modes start from the same net and data
    frozen = nn.Linear(16, 16), nn.BatchNorm1d(16).train(mode == "train")
    net = nn.Sequential(nn.Linear(8, 16), *frozen, nn.ReLU(), nn.Linear(16, 3))
    freeze(net[1:3])
    before, moved = copy.deepcopy(net), {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        moved[step] = (net[2].running_mean - before[2].running_mean).norm().item()
    return before, net, optimizer, moved


def show_freezing(log_dir, steps=50, seed=0):
    print(f"7. Layers 1 and 2 frozen, {steps} steps of AdamW over all: what still changes?")
    print("   layer           elements   changed   with .grad   with optimizer state")
    moved, rows = {}, {}
    for mode in ("eval", "train"):
        before, net, optimizer, curve = fine_tune(mode, steps, seed)
        draw(log_dir / "freeze" / mode, "freeze/running_mean_moved", curve)
        same = torch.randn(32, 16)
        old, new = (model[1:3].eval()(same) for model in (before, net))
        moved[mode] = curve[steps], (new - old).abs().max().item()
    for i in (0, 1, 2, 4):
        old, new = (parameters_to_vector(model[i].parameters()) for model in (before, net))
        graded = sum(p.numel() for p in net[i].parameters() if p.grad is not None)
        states = sum(p.numel() for p in net[i].parameters() if p in optimizer.state)
        row = rows[i] = len(old), (old != new).sum().item(), graded, states
        kind = type(net[i]).__name__
        print(f"   {i} {kind:<12} {row[0]:9d} {row[1]:9d} {row[2]:12d} {row[3]:22d}")
    kept = [str(i) for i in rows if rows[i][1:] == (0, 0, 0)]
    graded = [str(i) for i in rows if rows[i][2]]
    print(f"   -> frozen: layers {' and '.join(kept)}; a gradient still gets to layers "
          f"{' and '.join(graded)}")  # fmt: skip
    print("                        change of the   largest change of the output")
    print("   frozen BatchNorm in  running mean    for the same inputs")
    for mode, (mean, output) in moved.items():
        print(f"   {mode:<18}   {mean:12.2f}    {output:19.2f}")
    still = [mode for mode in moved if moved[mode] == (0, 0)]
    print(f"   -> its output stays in mode {', '.join(still)}: after net.train(), call its .eval()")
    return {"rows": rows, "moved": moved}


# --- the run -----------------------------------------------------------------------------------


def draw(log_dir, tag, curve):
    """Write a dict {step: value} as one curve."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, value in curve.items():
            writer.add_scalar(tag, value, step)


def main(seed=0, log_dir=LOG_DIR, draws=20):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "divisors": show_divisors(log_dir),
        "layers": show_layers(log_dir),
        "cosines": show_clipping(),
        "recurrent": show_recurrent(log_dir),
        "gradcheck": show_gradcheck(draws),
        "freezing": show_freezing(log_dir, seed=seed),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
