"""Focal loss makes easy examples count less: with gamma = 2, 1,000 examples whose right answer has
the probability 0.99 pull less on a network than one example whose right answer has 0.1.

In detection one object stands against a hundred or more pieces of background, the easy negatives.
By cross-entropy each pulls little, but 1,000 together pull as much as eleven hard ones (section 3).
Focal loss multiplies the loss of an example by a factor that is near 0 where the network is sure
and right. Average precision says how good a ranking is: 1 if all positive examples (y = 1) get a
higher p than the others. Here it is better for gamma = 2 with only 20 positives, and worse if most
labels "yes" are wrong (section 5). alpha changes mostly how many get p > 0.5 (section 4).

    p_t    = p for y = 1, 1 - p for y = 0        a_t = alpha for y = 1, 1 - alpha for y = 0
    FL     = -a_t (1 - p_t)^gamma log p_t        cross-entropy for gamma = 0 and a_t = 1
    dFL/dx = (2 y - 1) a_t (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1)

    x  the logit, the raw output    p = 1 / (1 + exp(-x))    y  the target, 1 (yes) or 0 (no)
    p_t    how sure the network is of the right answer       log  natural
    gamma  0 or more: how much less easy examples count      alpha  the weight of a yes, 0 to 1

With K classes p_t is the softmax probability of the right class, and alpha has a weight for each.
With alpha or gamma, p is not the share of positives among examples like x. Section 6 turns it into
that share by a formula, which mends alpha's change in trained networks, but not always gamma's.

Needs          nn_loss.py, nn_optim.py
Checked here   plain = complete = torchvision.ops.sigmoid_focal_loss = the softmax form with 2
               classes; the gradient; what alpha and gamma do; when gamma helps; the best p
TensorBoard    focal/factor and focal/gradient in the runs gamma_0, gamma_0.5 ..., x-axis: p_t in
               percent; the larger gamma, the earlier both fall to 0. PR CURVES: imbalance/...
Try            in RIVALS, write 0.75 for 0.25: what happens to the row gamma_2_alpha of section 4?
Answer         more yeses, and more right ones; average precision changes by less than 0.1
Source         Lin et al. 2017, arXiv:1708.02002, eq. 4, 5, section 3.3, appendix B
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
from torchvision.ops import sigmoid_focal_loss as torchvision_loss
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "loss_functions" / "focal_loss"
F64 = torch.float64


# --- 1. in everyday code -----------------------------------------------------------------------


def focal_plain(logits, targets, alpha=0.25, gamma=2.0):
    """Losses of logits and targets (1.0 or 0.0) of one shape: four lines to carry away."""
    ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # -log p_t
    p_t = torch.exp(-ce)
    a_t = alpha * targets + (1 - alpha) * (1 - targets)
    return a_t * (1 - p_t) ** gamma * ce


def show_everyday():
    p = torch.tensor([0.9, 0.1, 0.9, 0.1])
    logits, targets = p.logit(), torch.tensor([1.0, 1.0, 0.0, 0.0])
    ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    ours = focal_plain(logits, targets, alpha=0.25, gamma=2.0)
    # to train: reduction="mean"; in detection reduction="sum" / number of boxes matched to objects
    theirs = torchvision_loss(logits, targets, alpha=0.25, gamma=2.0)

    print("1. In everyday code: which of 4 examples has how much loss? alpha 0.25, gamma 2")
    print("   p     target   cross-entropy   focal_plain   torchvision   "
          "by hand: a_t (1 - p_t)^gamma CE")  # fmt: skip
    heads = ("0.25 * 0.1^2 * 0.1054", "0.25 * 0.9^2 * 2.3026",
             "0.75 * 0.9^2 * 2.3026", "0.75 * 0.1^2 * 0.1054")  # fmt: skip
    for row in zip(p, targets, ce, ours, theirs, heads, strict=True):
        print("   {:.1f}   {:6.0f}   {:13.4f}   {:11.4f}   {:11.4f}   {}".format(*row))
    times = [(loss[1] / loss[0]).item() for loss in (ce, ours)]
    print(f"   -> a yes with p = 0.1 costs {times[0]:.0f} times as much as one with p = 0.9 by "
          f"cross-entropy,\n      and {times[1]:,.0f} times by focal loss")  # fmt: skip
    return ours, theirs


# --- 2. the complete losses --------------------------------------------------------------------


def sigmoid_focal_loss(logits, targets, alpha=None, gamma=2.0):
    """FL of each logit and target in [0, 1], two tensors of one shape; alpha weighs the positives.

    FL = a_t (1 - p_t)^gamma CE, where p = sigmoid(logits), 1 - p_t = (1 - p) t + p (1 - t), and
    a_t = alpha t + (1 - alpha) (1 - t), or 1 without alpha. CE is F's
    binary_cross_entropy_with_logits, 1 - p is sigmoid(-logits). For gamma < 1 the slope of
    x^gamma is infinite at 0: clamp 1 - p_t to at least torch.finfo(dtype).tiny.
    ValueError "logits (shape) and targets (shape) must agree" for other shapes. Exercise.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"logits {(*logits.shape,)} and targets {(*targets.shape,)} must agree")
    t = targets.to(logits.dtype)
    wrong = (-logits).sigmoid() * t + logits.sigmoid() * (1 - t)  # 1 - p_t
    ce = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    loss = wrong.clamp(min=torch.finfo(wrong.dtype).tiny) ** gamma * ce
    return loss if alpha is None else (alpha * t + (1 - alpha) * (1 - t)) * loss


def softmax_focal_loss(logits, labels, alpha=None, gamma=2.0):
    """FL (B,) of logits (B, K) and labels (B,); alpha (K,) weighs the classes.

    -alpha[label] (1 - p_t)^gamma log p_t, where 1 - p_t = -expm1(log p_t) is clamped as above.
    ValueError "logits (B, K) and labels (B,), not ..." for other shapes. Exercise.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        shapes = f"{(*logits.shape,)}, {(*labels.shape,)}"
        raise ValueError(f"logits (B, K) and labels (B,), not {shapes}")
    log_p_t = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)  # (B,)
    wrong = -log_p_t.expm1()  # 1 - exp(log_p_t), with all its digits
    loss = -(wrong.clamp(min=torch.finfo(wrong.dtype).tiny) ** gamma) * log_p_t
    return loss if alpha is None else alpha[labels] * loss


def show_complete():
    print("2. Are they the same loss? Mean of 50 random examples with logits x, by four ways")
    print("   alpha   gamma   plain      complete   softmax of (0, x)   torchvision")
    x, y = (3 * torch.randn(50, dtype=F64)).requires_grad_(), torch.randint(2, (50,)).to(F64)
    off = 0.0
    for alpha, gamma in ((0.25, 2.0), (0.8, 0.5), (0.6, 3.7)):
        two = torch.stack([torch.zeros_like(x), x], dim=1)  # logits of the classes no and yes
        weights = torch.tensor([1 - alpha, alpha], dtype=F64)
        ways = [focal_plain(x, y, alpha, gamma), sigmoid_focal_loss(x, y, alpha, gamma),
                softmax_focal_loss(two, y.long(), weights, gamma),
                torchvision_loss(x, y, alpha, gamma)]  # fmt: skip
        slopes = [torch.autograd.grad(w.sum(), x, retain_graph=True)[0] for w in ways]
        for way, slope in zip(ways, slopes, strict=True):
            off = max(off, (way - ways[-1]).abs().max().item(),
                      (slope - slopes[-1]).abs().max().item())  # fmt: skip
        print("   {:<5}   {:<5}   {:.6f}   {:.6f}   {:<17.6f}   {:.6f}".format(
            alpha, gamma, *(way.mean().item() for way in ways)))  # fmt: skip
    assert off < 1e-12
    print(f"   -> one way minus another, losses and gradients, largest: {off:.0e}")
    return off


# --- 3. what gamma does to one example ---------------------------------------------------------


def focal_gradient(p_t, gamma):
    """dFL/dx of a positive with p = p_t by its logit x, without alpha.

    (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1). Exercise.
    """
    return (1 - p_t) ** gamma * (gamma * p_t * p_t.log() + p_t - 1)


def show_gamma(log_dir):
    print("3. What does gamma do to an easy (p_t = 0.99) and to a hard (p_t = 0.1) example?")
    print("           (1 - p_t)^gamma    size of dFL/dx     1,000 easy ones pull as")
    print("   gamma   easy      hard     easy      hard     much as this many hard ones")
    p_t, ratios = torch.linspace(0.01, 0.99, 99, dtype=F64), {}
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        x = p_t.logit().requires_grad_()
        loss = sigmoid_focal_loss(x, torch.ones_like(x), gamma=gamma)
        (slope,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(slope, focal_gradient(p_t, gamma))
        factor, pull = (1 - p_t) ** gamma, slope.abs()
        with SummaryWriter(log_dir / f"gamma_{gamma:g}", purge_step=0) as writer:
            for i in range(99):
                writer.add_scalar("focal/factor", factor[i], i + 1)
                writer.add_scalar("focal/gradient", pull[i], i + 1)
        ratios[gamma] = (1000 * pull[98] / pull[9]).item()
        print(f"   {gamma:<5}   {factor[98]:.1e}   {factor[9]:.3f}    {pull[98]:.1e}   "
              f"{pull[9]:.3f}    {ratios[gamma]:.4f}")  # fmt: skip
    less = ", ".join(f"{gamma:g}" for gamma, ratio in ratios.items() if ratio < 1)
    print(f"   -> 1,000 easy examples pull less than one hard one for gamma = {less}")
    return ratios


# --- 4. what alpha and gamma do to a network ---------------------------------------------------

RIVALS = {  # run: alpha, gamma
    "cross_entropy": (None, 0.0),
    "alpha_0.99": (0.99, 0.0),  # trains as BCEWithLogitsLoss(pos_weight=99) does
    "gamma_2": (None, 2.0),
    "gamma_2_alpha": (0.25, 2.0),
}


def rare_class(seed, n, n_val, wrong=0.0):
    """Two pairs (points (n, 8), targets (n,)) for training and validation; one in 100 is positive.

    In training a share `wrong` of all points are negatives whose target is 1 by mistake.
    """
    torch.manual_seed(seed)
    centres, step = 2 * torch.randn(5, 8), 4 * F.normalize(torch.randn(8), dim=0)
    sets = []
    for size, share in ((n, wrong), (n_val, 0.0)):
        place = torch.arange(size) % 100
        x = centres[torch.randint(5, (size,))] + torch.randn(size, 8)
        sets.append((x + step * (place == 0)[:, None], (place <= 100 * share).float()))
    return sets


def average_precision(scores, targets):
    """Mean, over the positives, of the precision among the examples scored no lower than they.

    scores (N,), targets (N,) of 0 and 1: a float. Precision is the share of positives; examples of
    equal score are counted together. ValueError "no positive target" without any. Exercise.
    """
    if not targets.any():
        raise ValueError("no positive target")
    scores, order = scores.sort(descending=True)
    hits = targets[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])  # equal scores end here
    precision = hits[last] / (last.nonzero().squeeze(1) + 1)
    found = torch.diff(hits[last], prepend=hits.new_zeros(1))
    return ((found * precision).sum() / hits[-1]).item()


def easy_negative_share(loss, p, targets):
    """Share of the summed loss (N,) that negatives (target 0) with p < 0.1 hold. Exercise."""
    return (loss[(targets == 0) & (p < 0.1)].sum() / loss.sum()).item()


def fit(seed, train, x_val, alpha, gamma, epochs, prior=0.01):
    """Logits on x_val after training; at the start p is `prior` for every x, as rare as a yes."""
    torch.manual_seed(seed)  # the same start and the same batches for every loss
    x, y = train
    model = nn.Sequential(nn.Linear(x.size(1), 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 1))  # fmt: skip
    nn.init.zeros_(model[-1].weight)
    nn.init.constant_(model[-1].bias, -math.log((1 - prior) / prior))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(500):
            loss = sigmoid_focal_loss(model(x[i]).squeeze(1), y[i], alpha, gamma).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return model(x_val).squeeze(1).double()  # in float32 a p of 1 - 1e-8 would be 1


def show_networks(seed, log_dir, n, epochs):
    print(f"4. What do alpha and gamma do to a network? {n:,} points, one in 100 positive")
    print(f"   judged on {n:,} others. Average precision: 1 if all positive points come first")
    print("   yes: points with p > 0.5; right: how many of them are positive; CE: how many are so")
    print("   among as many points, if cross_entropy picks those of its highest p")
    print("   easy: share of the loss from negatives of which cross_entropy is sure (p < 0.1)")
    print("   trained by      average precision     yes   right    CE     easy")
    train, (x, y) = rare_class(seed, n, n)
    rows, first = {}, None
    for name, (alpha, gamma) in RIVALS.items():
        z = fit(seed, train, x, alpha, gamma, epochs)
        first, p = z if first is None else first, z.sigmoid()
        easy = easy_negative_share(sigmoid_focal_loss(first, y, alpha, gamma), first.sigmoid(), y)
        yes = int((p > 0.5).sum())
        right, as_many = int(y[p > 0.5].sum()), int(y[first.topk(yes).indices].sum())
        rows[name] = {"AP": average_precision(p, y), "yes": yes, "right": right, "CE": as_many,
                      "easy": easy, "p": p}  # fmt: skip
        print("   {:<13}   {:17.3f}   {:5,}   {:5}   {:3}   {:.4f}".format(
            name, rows[name]["AP"], yes, right, as_many, easy))  # fmt: skip
        with SummaryWriter(log_dir / "imbalance" / name, purge_step=0) as writer:
            writer.add_pr_curve("val/precision_recall", y.int(), p, 0)
    print(f"   (always 0.01)   {average_precision(0.01 + 0 * y, y):17.3f}   {0:5}   {0:5}   {0:3}")
    aps = [row["AP"] for row in rows.values()]
    off = max(abs(row["right"] - row["CE"]) for row in rows.values())
    print(f"   -> easy negatives have {rows['cross_entropy']['easy']:.1%} of cross_entropy's loss, "
          f"{rows['gamma_2']['easy']:.2%} of gamma_2's")  # fmt: skip
    print(f"   -> the average precisions differ by {max(aps) - min(aps):.3f} at most")
    print("   -> with another bound than 0.5 cross_entropy finds as many, give or take "
          f"{off} of {y.sum():.0f}")  # fmt: skip
    return rows, y


# --- 5. when gamma helps -----------------------------------------------------------------------


def show_when(seed, n, epochs, sets):
    print(f"5. When does gamma help? Average precision, means over {sets} data sets, no alpha")
    print("   training   positives:    gamma 0   gamma 2   difference +- its standard error")
    print("   points     right/wrong")
    gains, sure = {}, {"better": [], "worse": []}
    for points, wrong in ((n // 5, 0.0), (n, 0.0), (n, 0.1)):
        ap = torch.zeros(sets, 2)
        for k in tqdm(range(sets), leave=False, disable=None):
            train, (x, y) = rare_class(1000 * seed + k, points, n, wrong)
            for i, gamma in enumerate((0.0, 2.0)):  # as many steps for few points as for many
                ap[k, i] = average_precision(fit(k, train, x, None, gamma, epochs * n // points), y)
        gain = ap[:, 1] - ap[:, 0]
        mean, error = gains[points, wrong] = gain.mean().item(), gain.std().item() / sets**0.5
        positives = f"{points // 100}/{train[1].sum() - points // 100:,.0f}"
        print("   {:<8,}   {:<11}   {:7.3f}   {:7.3f}   {:+.3f} +- {:.3f}".format(
            points, positives, *ap.mean(0), mean, error))  # fmt: skip
        if abs(mean) > 2 * error:
            sure["better" if mean > 0 else "worse"].append(positives)
    print("   -> by more than 2 standard errors gamma = 2 is better with "
          f"{', '.join(sure['better']) or 'none'}; worse with "
          f"{', '.join(sure['worse']) or 'none'}")  # fmt: skip
    return gains


# --- 6. what the probabilities are -------------------------------------------------------------


def true_share(p, alpha, gamma):
    """The share of positives at which p is the best answer, so that p can be corrected.

    There the slopes cancel: share * alpha * g(p) = (1 - share) * (1 - alpha) * g(1 - p), g by
    focal_gradient. Return the share; alpha None is 0.5. Exercise.
    """
    alpha = 0.5 if alpha is None else alpha
    up, down = alpha * focal_gradient(p, gamma), (1 - alpha) * focal_gradient(1 - p, gamma)
    return down / (up + down)


def show_probabilities(rows, y):
    print("6. Is p a probability? The p with the least mean loss, if a share of all is positive")
    print("   gamma   share 0.01   share 0.1   share 0.5   share 0.01, corrected")
    p, best = torch.arange(1, 10_000, dtype=F64) / 10_000, {}
    for gamma in (0.0, 1.0, 2.0, 5.0):
        yes, no = -((1 - p) ** gamma) * p.log(), -(p**gamma) * (1 - p).log()
        best[gamma] = [p[(s * yes + (1 - s) * no).argmin()] for s in (0.01, 0.1, 0.5)]
        print("   {:<5}   {:10.3f}   {:9.3f}   {:9.3f}   {:21.3f}".format(
            gamma, *best[gamma], true_share(best[gamma][0], None, gamma)))  # fmt: skip
    print("   The networks of section 4, at the 2 % of the points with the highest p")
    print("   trained by      mean p   mean p corrected   share of positives")
    means = {}
    for name, row in rows.items():
        top = row["p"].topk(len(y) // 50).indices
        p = row["p"][top]
        means[name] = [v.mean().item() for v in (p, true_share(p, *RIVALS[name]), y[top])]
        print("   {:<13}   {:6.3f}   {:16.3f}   {:18.3f}".format(name, *means[name]))
    off = {name: [abs(v - row[2]) for v in row[:2]] for name, row in means.items()}
    print("   -> |mean p - share|: cross_entropy {:.3f}; alpha_0.99 {:.3f}, corrected {:.3f};"
          .format(off["cross_entropy"][0], *off["alpha_0.99"]))  # fmt: skip
    print("      with gamma = 2 at most {:.3f}, corrected {:.3f}".format(
        *(max(off[name][i] for name in ("gamma_2", "gamma_2_alpha")) for i in (0, 1))))  # fmt: skip
    return best, means


def main(seed=0, log_dir=LOG_DIR, n=10_000, epochs=8, sets=10):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "off": show_complete(), "ratios": show_gamma(log_dir)}
    rows, y = measured["networks"], measured["y"] = show_networks(seed, log_dir, n, epochs)
    measured["gains"] = show_when(seed, n, epochs, sets)
    measured["best"], measured["means"] = show_probabilities(rows, y)
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
