"""For one example, the slope of L1 is as steep for a small error as for a large one, that of MSE
grows with the error, and that of cross-entropy along an output stays between -1 and 1.

A loss is one number that says how wrong a network is. For numbers take nn.MSELoss, or nn.L1Loss if
some targets may be far off. For one class of K take nn.CrossEntropyLoss, which wants K logits, the
raw outputs of the last layer. For yes or no take nn.BCEWithLogitsLoss (binary cross-entropy), which
wants one logit, and 1.0 or 0.0 as the target. A softmax or a sigmoid of your own before these two
raises no error, but then the loss stays away from 0.

    L1              |x - t|                               its slope along x is sign(x - t)
    MSE             (x - t)^2                             its slope along x is 2 (x - t)
    softmax         p_k = exp(z_k) / sum_j exp(z_j)       K numbers above 0 whose sum is 1
    cross-entropy   -log p_t = logsumexp(z) - z_t         its slope along z_k is p_k - y_k
    logsumexp(z)    log sum_j exp(z_j) = m + log sum_j exp(z_j - m),   m is the largest z_j

    x  an output     z  the K logits of one example     p  probabilities     log  natural
    t  the target, a number or the right class     y_k  1 for k = t, else 0

reduction="mean" returns the mean of all losses, "sum" their sum, "none" each. With class weights an
example counts weight[t] times, in the mean as well. One with t = ignore_index counts nothing.

Needs          02_autograd_basics.py, nn_linear.py
Checked here   each loss by hand = torch.nn's; the slopes; mistakes without an error; overflow
TensorBoard    loss/value and loss/slope by the error in the runs l1, mse: step 100 is error 0, step
               150 error 1. cross_entropy/value by a wrong logit: the run naive ends at 88
Try            in show_by_hand, write t[:] = -1 for t[1] = -1: what is the mean of cross-entropy?
Answer         nan, by hand and in torch.nn, as it is 0 / 0; the losses and their sum are 0
Source         torch.nn.CrossEntropyLoss; Goodfellow et al. 2016, Deep Learning, section 6.2.2
"""

import math
import signal
import textwrap
import warnings
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_loss"
REDUCTIONS = ("none", "sum", "mean")


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    print("1. In everyday code: three losses on numbers that can be checked by head")
    x, t = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 5.0])
    l1 = nn.L1Loss()(x, t)  # the mean of 0, 1, 2
    mse = nn.MSELoss()(x, t)  # the mean of 0, 1, 4
    z = torch.tensor([[math.log(2), 0.0, 0.0]])  # logits (1 example, 3 classes); their exp: 2, 1, 1
    right = torch.tensor([0])  # the number of the right class of each example, int64
    ce = nn.CrossEntropyLoss()(z, right)  # p = 2/4, 1/4, 1/4, so -log(2/4)

    print("   loss               outputs                target                 value   by head")
    print(f"   L1Loss             {numbers(x)}   {numbers(t)}   {l1:.3f}   (0 + 1 + 2) / 3")
    print(f"   MSELoss            {numbers(x)}   {numbers(t)}   {mse:.3f}   (0 + 1 + 4) / 3")
    print(f"   CrossEntropyLoss   {numbers(z)}     class {right.item():<13}   {ce:.3f}   "
          "exp gives 2, 1, 1: -log(2 / 4)")  # fmt: skip
    found = [l1.item(), mse.item(), ce.item()]
    off = max(abs(a - b) for a, b in zip(found, [3 / 3, 5 / 3, math.log(2)], strict=True))
    print(f"   -> value minus value by head, largest: {off:.3f}")
    return found


def numbers(values):
    """The first three numbers of a tensor, in 20 characters."""
    return f"{' '.join(f'{value:6.3f}' for value in values.flatten()[:3].tolist()):<20}"


# --- 2. by hand --------------------------------------------------------------------------------


def same_shape(x, t):
    """Raises ValueError where x - t would broadcast: (N, 1) - (N,) is N by N differences.

    Its text: "input (4, 1) and target (4,) differ in shape". Exercise.
    """
    if x.shape != t.shape:
        raise ValueError(f"input {tuple(x.shape)} and target {tuple(t.shape)} differ in shape")


def reduce(losses, reduction, weights=None):
    """The losses ("none"), their sum ("sum"), or their sum over the sum of the weights ("mean").

    Without weights each counts 1. ValueError for any other reduction. Exercise.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is none of {', '.join(REDUCTIONS)}")
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (losses.numel() if weights is None else weights.sum())


def l1_loss(x, t, reduction="mean"):
    same_shape(x, t)
    return reduce((x - t).abs(), reduction)


def mse_loss(x, t, reduction="mean"):
    same_shape(x, t)
    return reduce((x - t).square(), reduction)


def log_sum_exp(z):
    """log sum_k exp(z_k) over the last dimension, without overflow or underflow, z finite.

    Take the largest out first: m + log sum_k exp(z_k - m). Exercise.
    """
    m = z.amax(-1, keepdim=True)
    return m.squeeze(-1) + (z - m).exp().sum(-1).log()


def cross_entropy(z, t, weight=None, ignore_index=-100, reduction="mean"):
    """Logits z (N, K) and classes t (N,); weight (K,) by class; the formulas on top.

    Example i counts w_i = weight[t_i] (1 without weight), and 0 where t_i is ignore_index. Losses
    by log_sum_exp(z) - z_t, each times w_i, then through reduce(..., reduction, w). Exercise.
    """
    kept = t != ignore_index
    t = torch.where(kept, t, 0)
    weight = torch.ones_like(z[0]) if weight is None else weight
    w = weight[t] * kept  # (N,)
    losses = log_sum_exp(z) - z.gather(1, t[:, None]).squeeze(1)
    return reduce(w * losses, reduction, w)


def show_by_hand(N, K):
    print(f"2. Do the losses by hand equal torch.nn's? {N} random examples, {K} classes")
    print("   In cross-entropy the second example is ignored. Reduction none: three of the values")
    print("   loss            reduction   class weights    by hand                torch.nn")
    x, target = torch.randn(N), torch.randn(N)
    z, t, weight = torch.randn(N, K), torch.randint(K, (N,)), torch.rand(K) + 0.5
    t[1] = -1
    rows = []
    for r in REDUCTIONS:
        rows.append(("L1", r, "-", l1_loss(x, target, r), nn.L1Loss(reduction=r)(x, target)))
        rows.append(("MSE", r, "-", mse_loss(x, target, r), nn.MSELoss(reduction=r)(x, target)))
        for word, w in (("none", None), ("yes", weight)):
            theirs = nn.CrossEntropyLoss(weight=w, ignore_index=-1, reduction=r)(z, t)
            rows.append(("cross-entropy", r, word, cross_entropy(z, t, w, -1, r), theirs))
    off = 0.0
    for name, r, word, ours, theirs in rows:
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        off = max(off, (ours - theirs).abs().max().item())
        print(f"   {name:<13}   {r:<9}   {word:<13}   {numbers(ours)}   {numbers(theirs)}".rstrip())
    print(f"   -> by hand minus torch.nn, largest in all {len(rows)} rows: {off:.1g}")
    return rows


# --- 3. which loss for which task --------------------------------------------------------------


def show_tasks():
    print("3. Which loss for which task? 4 examples, each output of the network is 0")
    print("   The numbers are 1, -1, 1, -9. With logit z, yes has probability 1 / (1 + exp(-z))")
    print("   task                              output         target      its type   loss"
          "                  value")  # fmt: skip
    amounts = torch.tensor([[1.0], [-1.0], [1.0], [-9.0]])
    classes, pixels = torch.randint(3, (4,)), torch.randint(3, (4, 8, 8))  # class numbers 0, 1, 2
    yes, tags = torch.randint(2, (4, 1)).float(), torch.randint(2, (4, 3)).float()  # 1 yes, 0 no
    values = {}
    for task, shape, target, loss in (
        ("a number", (4, 1), amounts, nn.MSELoss()),
        ("a number, some targets far off", (4, 1), amounts, nn.L1Loss()),
        ("one of 3 classes", (4, 3), classes, nn.CrossEntropyLoss()),
        ("one of 3 classes for each pixel", (4, 3, 8, 8), pixels, nn.CrossEntropyLoss()),
        ("yes or no", (4, 1), yes, nn.BCEWithLogitsLoss()),  # cross-entropy of the logits 0, z
        ("yes or no for each of 3 tags", (4, 3), tags, nn.BCEWithLogitsLoss()),
    ):
        values[task] = loss(torch.zeros(shape), target).item()
        dtype = str(target.dtype).removeprefix("torch.")
        print(f"   {task:<31}   {shape!s:<12}   {tuple(target.shape)!s:<9}   {dtype:<8}   "
              f"{type(loss).__name__:<17}   {values[task]:7.4f}")  # fmt: skip
    K, two = (math.exp(values[task]) for task in ("one of 3 classes", "yes or no"))
    print(f"   -> with logits 0 the loss is log {K:.3g} for 3 classes, log {two:.3g} for yes or no")
    return values, {"yes": yes, "tags": tags, "classes": classes, "pixels": pixels}


# --- 4. mistakes -------------------------------------------------------------------------------


def attempt(loss, output, target):
    """The value of the loss (None if it refuses), and the error or warning in words."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            value = loss(output, target).item()
        except (RuntimeError, ValueError, IndexError) as error:
            return None, f"{type(error).__name__}: {error}"
    return value, f"{said[0].category.__name__}: {said[0].message}" if said else "-"


def show_mistakes():
    print("4. Which mistakes raise no error? Each output is right, so that the loss should be 0")
    print("       loss                what is wrong                      value   torch says")
    x, classes, yes = torch.arange(4.0), torch.tensor([0, 2, 1, 2]), torch.tensor([1.0, 0, 1, 0])
    z, z_yes = 20.0 * F.one_hot(classes, 3), 40 * yes - 20  # logits (4, 3): 20, others 0; 20, -20
    ce, bce, mse = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()
    values, silent = {}, []
    for loss, words, output, target in (
        (ce, "-", z, classes),
        (ce, "softmax before it", z.softmax(1), classes),
        (ce, "classes counted from 1", z, classes + 1),
        (ce, "class numbers as float32", z, classes.float()),
        (ce, "class numbers of shape (4, 1)", z, classes[:, None]),
        (ce, "logits (3, 4) instead of (4, 3)", z.T, classes),
        (bce, "-", z_yes, yes),
        (bce, "sigmoid before it", z_yes.sigmoid(), yes),
        (bce, "yes and no as integers", z_yes, yes.long()),
        (mse, "-", x, x),
        (mse, "output (4, 1), target (4,)", x[:, None], x),
    ):
        name = type(loss).__name__
        value, said = attempt(loss, output, target)
        values[name, words] = value
        shown = "-" if value is None else f"{abs(value):.4f}"
        if value is not None and value > 1e-4:
            silent.append(len(values))
        print(f"   {len(values):2d}  {name:<17}   {words:<31}   {shown:>6}   "
              f"{textwrap.shorten(said, 50, placeholder=' ...')}")  # fmt: skip
    print(f"   -> a wrong value without an error: rows {', '.join(map(str, silent))}")
    best, twice = math.log(1 + 2 / math.e), values["CrossEntropyLoss", "softmax before it"]
    print(f"   -> row 2 is {twice:.4f}; the least after a softmax is log(1 + 2/e) = {best:.4f}")
    return values, silent


# --- 5. how hard each loss pulls ---------------------------------------------------------------


def show_slopes(K):
    print("5. How hard does each loss pull? Slopes of one example's loss (in a mean of N: 1 / N)")
    error = torch.tensor([-10.0, -1.0, -0.1, 0.1, 1.0, 10.0], requires_grad=True)  # x, for t = 0
    slopes = [torch.autograd.grad(loss(error, torch.zeros(6), "sum"), error)[0]
              for loss in (l1_loss, mse_loss)]  # fmt: skip
    torch.testing.assert_close(slopes, [error.sign(), 2 * error.detach()])
    rows = ("error x - t", error), ("slope of L1", slopes[0]), ("slope of MSE", slopes[1])
    for name, row in rows:
        print(f"   {name:<15}" + "".join(f"{value:8.1f}" for value in row.tolist()))
    z, t = torch.randn(1, K, requires_grad=True), torch.randint(K, (1,))
    nn.CrossEntropyLoss()(z, t).backward()
    p, y = z.detach().softmax(1), F.one_hot(t, K)
    torch.testing.assert_close(z.grad, p - y)
    print(f"   Cross-entropy, for an example whose right class is {t.item()}")
    print("   class k        " + "".join(f"{k:8d}" for k in range(K)))
    names = "logit z_k", "softmax p_k", "y_k", "p_k - y_k", "slope along z_k"
    for name, row in zip(names, (z, p, y, p - y, z.grad), strict=True):
        print(f"   {name:<15}" + "".join(f"{value:8.3f}" for value in row[0].tolist()))
    print(f"   -> slope minus (p - y), largest: {(z.grad - p + y).abs().max():.1g}")

    targets, constants = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]), torch.arange(101.0)
    print("   Which constant output is best for the targets 1, 2, 3, 4, 100?    mean L1   mean MSE")
    l1, mse = (f(constants[:, None] - targets).mean(1) for f in (torch.abs, torch.square))
    for word, c in (("median", targets.median().long()), ("mean", targets.mean().long())):
        print(f"   {f'the {word}, {c}':<62}   {l1[c]:7.1f}   {mse[c]:8.1f}")
    best = tuple(losses.argmin().item() for losses in (l1, mse))
    print(f"   -> the best of 0, 1 ... 100 is {best[0]} by L1, {best[1]} by MSE")
    return {"slopes": slopes, "p - y": p - y, "cross_entropy": z.grad, "best": best}


# --- 6. second reading: why the largest logit is taken out -------------------------------------


def naive_cross_entropy(z, t):
    """-log of p_t = exp(z_t) / sum_k exp(z_k), (N,), written just so, for z (N, K) and t (N,).

    It is right until exp overflows, or underflows to 0: that is its purpose here. Exercise.
    """
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return -p.gather(1, t[:, None]).squeeze(1).log()


def wrong_by(a):
    """Logits (1, 3) that give class 1 `a` and the true class 0 nothing, and the target (1,)."""
    return torch.tensor([[0.0, a, 0.0]]), torch.tensor([0])


def show_overflow():
    print("6. Logits 0, a, 0; class 0 is right: up to which a is cross-entropy finite?")
    print("        a   -log p_t as written   by log-sum-exp")
    naive, stable = {}, {}
    for a in (1.0, 50.0, 88.0, 89.0, 1000.0):
        naive[a] = naive_cross_entropy(*wrong_by(a)).item()
        stable[a] = cross_entropy(*wrong_by(a)).item()
        print(f"   {a:6.0f}   {naive[a]:19.4f}   {stable[a]:14.4f}")
    last = [max(a for a in row if math.isfinite(row[a])) for row in (naive, stable)]
    limit = math.log(torch.finfo(torch.float32).max)
    print(f"   -> finite up to a = {last[0]:.0f} as written, {last[1]:.0f} by log-sum-exp; exp(a) "
          f"is finite up to {limit:.1f}")  # fmt: skip
    return {"naive": naive, "stable": stable, "limit": limit}


# --- the lesson --------------------------------------------------------------------------------


def log_curves(log_dir):
    """L1 and MSE with their slopes by the error; cross-entropy both ways by the wrong logit."""
    for run, loss in (("l1", l1_loss), ("mse", mse_loss)):
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            error = (torch.arange(201) / 50 - 2).requires_grad_()  # -2 ... 2
            values = loss(error, torch.zeros(201), "none")
            (slopes,) = torch.autograd.grad(values.sum(), error)
            for step in range(201):
                writer.add_scalar("loss/value", values[step], step)
                writer.add_scalar("loss/slope", slopes[step], step)
    for run, loss in (("naive", naive_cross_entropy), ("stable", cross_entropy)):
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for logit in range(0, 121, 4):
                value = loss(*wrong_by(float(logit))).item()
                if math.isfinite(value):
                    writer.add_scalar("cross_entropy/value", value, logit)


def main(seed=0, log_dir=LOG_DIR, N=5, K=4):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "by_hand": show_by_hand(N, K),
        "tasks": show_tasks(),
        "mistakes": show_mistakes(),
        "slopes": show_slopes(K),
        **show_overflow(),
    }
    log_curves(log_dir)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
