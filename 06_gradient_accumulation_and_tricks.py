"""Gradients of small batches add up to the gradient of one large batch, if each sum of losses is
divided by N, the number of examples in all of them, and no layer mixes examples (BatchNorm does).

When a batch does not fit in memory, it is taken in k parts. backward() adds the gradient of each
part to .grad; after the last part the optimizer makes one step. If the mean loss of each part is
divided by k instead, the examples of a short last part weigh too much, and no error is raised.
Three more tricks belong to the same loop: clip a gradient that is too long, because one step along
it may move the weights so far that the loss does not come down again; check a gradient that you
wrote yourself; freeze a layer.

    accumulate      g = sum over the parts of grad(loss sum of the part / N)
    clip by norm    g <- g * min(1, c / |g|)         one factor for all: the direction stays
    clip by value   g_i <- min(max(g_i, -c), c)      each element alone: the direction may turn
    check           f'(x) is about (f(x + h) - f(x - h)) / (2 h), for a small step h

    g  gradient of all parameters     |g|  its length     c  the limit

Needs          02_autograd_basics.py, nn_loss.py (cross_entropy). Sections 3 and 6 are second
               reading after nn_common_layers.py (BatchNorm) and nn_optim.py (AdamW)
Checked here   the loop in parts = in one batch; which loss and which layers keep that; clipping =
               torch's; what gradcheck accepts; what freezing stops
TensorBoard    accumulate/error by examples in the last part: only sum_by_N is 0 all along;
               layers/error by number of parts k: only BatchNorm_train rises;
               freeze/running_mean_moved by step: 0 in the run eval, rising in the run train
Try            in show_divisors, after the line that draws y, add  y[::3] = -100  (cross_entropy
               leaves such labels out): which loss is exact now?
Answer         None: N and n must count the labels that are left, as cross_entropy's own mean does
Source         Pascanu et al. 2013, arXiv:1211.5063, section 3.2 (clipping by norm);
               huggingface.co/blog/gradient_accumulation (2024: mean / k where N was meant)
"""

import copy
import signal
import warnings
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "06_gradient_accumulation_and_tricks"
EXACT = 1e-12  # float64: whatever is smaller is rounding


# --- 1. in everyday code -----------------------------------------------------------------------


def train_epoch(model, optimizer, loader, k, max_norm):
    """One optimizer step for each k batches (x, y) that `loader` gives; the last may have fewer.

    A step empties .grad and goes backward once for each of its batches: from the sum of the squared
    errors of model(x), divided by N, the number of elements of y in all its batches. Then it clips
    .grad to max_norm by torch's function and steps. Returns |g| before clipping of each step (a
    list). Exercise.
    """
    batches, norms = iter(loader), []
    while group := list(islice(batches, k)):  # the next k batches: only x and y, no activations
        N = sum(y.numel() for _, y in group)  # the number of examples, if each has one y
        optimizer.zero_grad()
        for x, y in group:
            loss = F.mse_loss(model(x), y, reduction="sum")
            (loss / N).backward()  # adds to .grad, and frees the activations of this batch
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
    return norms


def show_everyday():
    print("1. In everyday code: w x learns y = 2 x. Do small batches give the w of large ones?")
    x = torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0], [2.0], [1.0]])
    ends, lr, c = {}, 0.1, 6.0
    print(f"   One pass over x = {', '.join(f'{t:g}' for t in x.flatten())} from w = 0, by SGD "
          f"with lr = {lr}, |g| clipped to {c:g}")  # fmt: skip
    print("   batches of   k batches a step   examples a step   |g| before clipping   w at the end")
    for size, k in ((4, 1), (2, 2), (1, 4), (2, 1)):
        loader = DataLoader(TensorDataset(x, 2 * x), batch_size=size)
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr)
        norms = train_epoch(model, optimizer, loader, k, max_norm=c)
        ends[size, k] = [round(number, 4) for number in (*norms, model.weight.item())]
        steps = ", ".join(f"{norm:.2f}" for norm in norms)
        print(f"   {size:10}   {k:16}   {size * k:15}   {steps:<23} {ends[size, k][-1]:8.3f}")
    same = [str(size) for size, k in ends if ends[size, k] == ends[4, 1]]
    print(f"   -> with 4 examples a step (the last has {len(x) % 4}) |g| and w are the same for "
          f"batches of {', '.join(same)}")  # fmt: skip

    x = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    checked = gradcheck(torch.sin, (x,))  # True, or an error that shows both gradients
    print(f"   gradcheck(torch.sin, (x,)) is {checked}: at x = 0.5 and 1 autograd agrees with "
          "differences of sin")  # fmt: skip

    net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    net[0].requires_grad_(False)  # freezes the first layer
    net(torch.ones(1, 1)).sum().backward()
    frozen = [layer.weight.grad is None for layer in net]
    first, second = ("None" if none else "a tensor" for none in frozen)
    print("   after net[0].requires_grad_(False) and backward(), .grad of layer 0 is "
          f"{first}, of layer 1 {second}")  # fmt: skip
    return {"ends": ends, "checked": checked, "frozen": frozen}


# --- 2. which loss goes backward ---------------------------------------------------------------


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
    print(f"2. Which loss must go backward, for k = {k} parts of {size}? The last may be shorter")
    print("   loss of    weight of an example (1 is right)   relative error of the gradient")
    short, whole = f"last part of {last}", f"last part of {size}"
    print(f"   a part     {f'part of {size}':>10}   {short:>20}   {short:>14}   {whole:>15}")
    model, errors = mlp(), {}
    x, y = torch.randn(k * size, 8).double(), torch.randint(3, (k * size,))
    for rule, run in {"sum / N": "sum_by_N", "mean / k": "mean_by_k", "mean": "mean"}.items():
        pairs = {n: (x[: full + n], y[: full + n]) for n in range(1, size + 1)}
        errors[rule] = {n: accumulation_error(model, *pairs[n], size, rule) for n in pairs}
        draw(log_dir / "accumulate" / run, "accumulate/error", errors[rule])
        weights = [(full + last) / divisor(rule, n, full + last, k) for n in (size, last)]
        print(f"   {rule:<8}   {weights[0]:10.2f}   {weights[1]:20.2f}   "
              f"{errors[rule][last]:14.1e}   {errors[rule][size]:15.1e}")  # fmt: skip
    exact = [rule for rule in errors if max(errors[rule].values()) < EXACT]
    print(f"   -> exact for every size of the last part: {', '.join(exact) or 'none'}")
    return errors


# --- 3. second reading: layers that break the sum ----------------------------------------------


def middle_layers():
    """The layers to try, each (B, 16) -> (B, 16). The BatchNorm in eval mode has seen data."""
    used = nn.BatchNorm1d(16)
    used(3 * torch.randn(64, 16) + 1)  # a fresh one has mean 0, variance 1 and changes nothing
    return {"BatchNorm_train": nn.BatchNorm1d(16), "BatchNorm_eval": used.eval(),
            "LayerNorm": nn.LayerNorm(16)}  # fmt: skip


def show_layers(log_dir, N=64, parts=(1, 2, 4, 8, 16)):
    print(f"3. {N} examples in k equal parts: which layers change the gradient? Its relative error")
    print("   layer in the middle      " + "".join(f"{f'k = {k}':>9}" for k in parts))
    x, y = torch.randn(N, 8).double(), torch.randint(3, (N,))
    errors = {}
    for name, layer in middle_layers().items():
        model = mlp(layer)
        errors[name] = {k: accumulation_error(model, x, y, N // k) for k in parts}
        draw(log_dir / "layers" / name, "layers/error", errors[name])
        words = name.replace("_", " in mode ")
        print(f"   {words:<25}" + "".join(f"{error:9.0e}" for error in errors[name].values()))
    exact = [name for name in errors if max(errors[name].values()) < EXACT]
    print(f"   -> exact for every k: {' and '.join(exact).replace('_', ' in mode ')}")
    print("      (in train mode BatchNorm takes mean and variance of each part, not of the batch)")
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
    print(f"4. The gradient {g.tolist()}, clipped at c = {c:g}: what becomes of it?")
    print("   clipped by                                  g     |g|   cosine with g (1: same way)")
    rows, names = {}, ("clip_norm_, by hand", "nn.utils.clip_grad_norm_", "clip_grad_value_")
    for name in names:
        p = nn.Parameter(torch.zeros(3))
        p.grad = g.clone()
        if name == names[0]:
            clip_norm_([p.grad], c)
        elif name == names[1]:
            nn.utils.clip_grad_norm_([p], c)
        else:
            nn.utils.clip_grad_value_([p], c)
        cosine = F.cosine_similarity(g, p.grad, 0).item()
        rows[name] = *p.grad.tolist(), p.grad.norm().item(), cosine
        row = " ".join(f"{element:6.3f}" for element in rows[name][:3])
        print(f"   {name:<24} {row}  {rows[name][3]:6.3f}   {cosine:13.3f}")
    short = [name for name in names if rows[name][3] < c + 1e-6]
    same = [name for name in names if rows[name][4] > 1 - 1e-6]
    print(f"   -> |g| is {c:g} with {' and with '.join(short)}")
    print(f"   -> the direction stays with {' and with '.join(same)}")
    return rows


# --- 5. check a gradient -----------------------------------------------------------------------


def central_difference(f, x, h):
    """f'(x) for an elementwise f, at each element of x: (f(x + h) - f(x - h)) / (2 h). Exercise."""
    return (f(x + h) - f(x - h)) / (2 * h)


def cube(x, wrong=0.0):
    """x^3, but its gradient is (1 + wrong) 3 x^2: y - y.detach() has the value 0 and y's slope."""
    y = x**3
    return y + wrong * (y - y.detach())


def count_passes(wrong, inputs, **options):
    """At how many of the inputs gradcheck finds nothing wrong with cube."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gradcheck itself warns of float32
        return sum(gradcheck(cube, (x, wrong), raise_exception=False, **options) for x in inputs)


def show_gradcheck(draws):
    print("5. Is a gradient right? Differences of x^3 by gradcheck's default step, h = 1e-6")
    x = torch.tensor([1.0, 2.0, 3.0])
    slopes = {"3 x^2": 3 * x**2, "float64": central_difference(cube, x.double(), 1e-6),
              "float32": central_difference(cube, x, 1e-6)}  # fmt: skip
    print(f"   slope by           at x = {'          '.join(f'{t:g}' for t in x)}")
    for name, slope in slopes.items():
        print(f"   {name:<17}" + " ".join(f"{s:10.6f}" for s in slope))
    print(f"   At how many of {draws} inputs does gradcheck accept a gradient of x^3 that is")
    print("   input, options                 right   1 % too large")
    points, f32, passes = torch.randn(draws, 4, dtype=torch.float64), torch.float32, {}
    for name, dtype, options in (
        ("float64", torch.float64, {}),
        ("float32", f32, {}),
        ("float32, rtol=0.1", f32, {"rtol": 0.1}),
        ("float32, eps=5e-3, atol=1e-4", f32, {"eps": 5e-3, "atol": 1e-4}),
    ):
        inputs = [x.to(dtype).requires_grad_() for x in points]
        passes[name] = [count_passes(wrong, inputs, **options) for wrong in (0, 0.01)]
        print(f"   {name:<30} {passes[name][0]:5d}   {passes[name][1]:13d}")
    told = [name for name in passes if passes[name] == [draws, 0]]
    print(f"   -> accepts the right one, refuses the other, each time: {'; '.join(told)}")
    return slopes, passes


# --- 6. second reading: freeze layers ----------------------------------------------------------


def freeze(layer):
    """From now on no parameter of `layer` requires a gradient, and its .grad is None. Exercise.

    A .grad that is left from before would still move the weight in optimizer.step().
    """
    for p in layer.parameters():
        p.requires_grad_(False)
        p.grad = None


def fine_tune(mode, steps, seed=0):
    """Train around two frozen layers, of which BatchNorm is in `mode`.

    Returns net before, net after, optimizer, {step: how far BatchNorm's running mean has moved}.
    """
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
    print(f"6. Layers 1 and 2 frozen, {steps} steps of AdamW over all: what still changes?")
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
    print("   BatchNorm also has a running mean, which is no parameter:")
    print("   mode of the frozen one   running mean moved by   output for the same inputs moved by")
    for mode, (mean, output) in moved.items():
        print(f"   {mode:<22}   {mean:21.2f}   {output:35.2f}")
    still = [mode for mode in moved if moved[mode] == (0, 0)]
    print(f"   -> mode in which the output stays as it was: {', '.join(still) or 'none'}")
    print("      (net.train() puts frozen layers in mode train, too: call their .eval() after it)")
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
        "gradcheck": show_gradcheck(draws),
        "freezing": show_freezing(log_dir, seed=seed),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
