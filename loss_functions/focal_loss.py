"""Focal loss takes the many easy negatives out of the loss; that is not yet a better ranking.

    p_t = p if y = 1 else 1 - p            probability of the true answer; p = sigmoid(x)
    FL  = -a_t (1 - p_t)^g log p_t         g = 0 is cross-entropy
    dFL/dx = (2 y - 1) a_t (1 - p_t)^g (g p_t log p_t + p_t - 1)

At p_t = 0.99 the factor (1 - p_t)^2 is 1e-4: ten thousand such negatives keep the loss of one. But
a network trained by FL is less sure of them, until they hold about as large a share of its loss as
of cross-entropy's. a_t is a for positives and 1 - a for negatives. For several classes p_t is the
softmax probability of the label. What is gained must be measured by average precision (area under
precision over recall), which a classifier that says "no" to all fails.

The price: FL is not a proper loss. If a share s of the examples at one point is positive, the best
p there is s for cross-entropy, but nearer to 1/2 for g > 0: probabilities must be recalibrated.

Checked here   FL = torchvision.ops.sigmoid_focal_loss; several classes against a loop; g = 0; the
               gradient; the best p by descent; at 1 : 100: share of the loss of easy negatives,
               average precision, recall, mean p, of cross-entropy, class weights and focal loss
TensorBoard    focal/factor, focal/gradient by p_t in per cent in the runs gamma_0 … gamma_5;
               loss/easy_negatives and val/average_precision by step, and a PR curve, in imbalance/…
Try            a = 0.25 for a rare class: is it raised? No: its loss is a third of that with 0.75
Source         Lin et al. 2017, arXiv:1708.02002, eq. 4-5, section 3.3, appendix B
"""

import argparse
import copy
import math
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "loss_functions" / "focal_loss"
F64 = torch.float64
REDUCE = {"none": lambda loss: loss, "mean": torch.mean, "sum": torch.sum}


# --- the loss ----------------------------------------------------------------------------------


def above_zero(x):
    """x >= 0, kept from 0, where the gradient of x ** gamma is infinite for gamma < 1."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def sigmoid_focal_loss(logits, targets, alpha=None, gamma=2.0, reduction="none"):
    """FL of logits and targets in [0, 1] of any one shape; alpha weighs the positives.

    FL = a_t (1 - p_t)^gamma CE, where p = sigmoid(logits), 1 - p_t = (1 - p) t + p (1 - t), and a_t
    is alpha for t = 1 and 1 - alpha for t = 0 (1 without alpha). CE by F's
    binary_cross_entropy_with_logits; 1 - p_t through above_zero; reduction by REDUCE. ValueError
    "logits (shape) and targets (shape) must agree". Exercise.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"logits {(*logits.shape,)} and targets {(*targets.shape,)} must agree")
    targets = targets.to(logits.dtype)
    wrong = (-logits).sigmoid() * targets + logits.sigmoid() * (1 - targets)  # 1 - p_t
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = above_zero(wrong) ** gamma * cross_entropy
    if alpha is not None:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return REDUCE[reduction](loss)


def softmax_focal_loss(logits, labels, alpha=None, gamma=2.0, reduction="mean"):
    """FL of logits (B, C) and labels (B,); alpha (C,) weighs the classes.

    -alpha[label] (1 - p_t)^gamma log p_t, with 1 - p_t = -expm1(log p_t) through above_zero. "mean"
    divides by B; F.cross_entropy with weights divides by their sum. ValueError "logits (B, C) and
    labels (B,), not …" for other shapes. Exercise.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits (B, C) and labels (B,), not {(*logits.shape,)}, {(*labels.shape,)}"
        )
    log_p_t = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)  # (B,)
    loss = -(above_zero(-log_p_t.expm1()) ** gamma) * log_p_t
    if alpha is not None:
        loss = alpha[labels] * loss
    return REDUCE[reduction](loss)


def focal_gradient(p_t, gamma):
    """dFL/dx of a positive with p = p_t by its logit x, without alpha.

    (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1). Exercise.
    """
    return (1 - p_t) ** gamma * (gamma * p_t * p_t.log() + p_t - 1)


# --- measures ----------------------------------------------------------------------------------


def average_precision(scores, targets):
    """Mean, over the positives, of the precision among the examples scored no lower than they.

    scores (N,), targets (N,) of 0 and 1: a float. Examples of equal score are counted together. It
    is the area under the step curve of precision over recall. Exercise.
    """
    scores, order = scores.sort(descending=True)
    hits = targets[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1) > 0])  # ties end here
    precision = hits[last] / (last.nonzero().squeeze(1) + 1)
    found = torch.diff(hits[last], prepend=hits.new_zeros(1))
    return ((found * precision).sum() / hits[-1]).item()


def easy_negative_share(loss, p, targets):
    """Share of the summed loss (N,) that negatives (target 0) with p < 0.1 hold: a float.

    Exercise.
    """
    return (loss[(targets == 0) & (p < 0.1)].sum() / loss.sum()).item()


# --- the sections ------------------------------------------------------------------------------


def show_twins():
    from torchvision.ops import sigmoid_focal_loss as torchvision_loss  # slow to import

    print("1. ours and torchvision's, gamma = 0 and cross-entropy: largest differences")
    x = (3 * torch.randn(50, dtype=F64)).requires_grad_()
    y = torch.randint(2, (50,)).to(F64)
    for alpha, gamma in ((0.25, 2.0), (0.8, 0.5), (0.6, 3.7)):
        pairs = [f(x, y, alpha=alpha, gamma=gamma) for f in (sigmoid_focal_loss, torchvision_loss)]
        grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in pairs]
        torch.testing.assert_close(*pairs, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        off, off_grad = ((a - b).abs().max().item() for a, b in (pairs, grads))
        print(f"   alpha {alpha:<4}  gamma {gamma}   loss {off:.0e}   gradient {off_grad:.0e}")
    logits, labels = torch.randn(9, 4, dtype=F64), torch.randint(4, (9,))
    ours, theirs = softmax_focal_loss(logits, labels, gamma=0), F.cross_entropy(logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    print(f"   4 classes   gamma 0.0   loss {(ours - theirs).abs().item():.0e}")


def show_factor(log_dir):
    print("2. factor (1 - p_t)^gamma, |gradient|, of an easy (p_t = 0.99) and a hard (0.1) example")
    p_t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    ratios = {}
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        x = p_t.logit().requires_grad_()
        loss = sigmoid_focal_loss(x, torch.ones_like(x), gamma=gamma)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(grad, focal_gradient(p_t, gamma))
        factor = (1 - p_t) ** gamma
        with SummaryWriter(log_dir / f"gamma_{gamma:g}", purge_step=0) as writer:
            for percent in range(1, 100):
                writer.add_scalar("focal/factor", factor[percent - 1], percent)
                writer.add_scalar("focal/gradient", grad[percent - 1].abs(), percent)
        ratios[gamma] = (1000 * grad[98] / grad[9]).item()
        print(f"   gamma {gamma}   factor {factor[98]:.0e} {factor[9]:.3f}   "
              f"gradient {grad[98].abs():.0e} {grad[9].abs():.3f}   "
              f"1,000 easy to 1 hard {ratios[gamma]:.4f}")  # fmt: skip
    return ratios


def best_probability(share, gamma, steps=30):
    """The p that minimises share FL(p, 1) + (1 - share) FL(p, 0), by Newton's method on x."""
    x = torch.tensor(0.0, dtype=F64)

    def risk(x):
        positive, negative = (
            sigmoid_focal_loss(x, torch.full_like(x, y), gamma=gamma) for y in (1.0, 0.0)
        )
        return share * positive + (1 - share) * negative

    slope = torch.func.grad(risk)
    for _ in range(steps):
        x = x - (slope(x) / torch.func.grad(slope)(x).abs()).clamp(-0.5, 0.5)
    return x.sigmoid().item()


def show_improper():
    print("3. best p where a share of 0.01 is positive, and where 0.5 is")
    best = {}
    for gamma in (0.0, 1.0, 2.0, 5.0):
        best[gamma] = [best_probability(share, gamma) for share in (0.01, 0.5)]
        print(f"   gamma {gamma}   {best[gamma][0]:.4f}   {best[gamma][1]:.4f}")
    return best


def rare_class(n, centres, direction, share=0.01):
    """Points x (n, D), targets y (n,): one in 100 is positive, and lies further by `direction`."""
    y = (torch.rand(n) < share).float()
    clusters = torch.randint(len(centres), (n,))
    return centres[clusters] + y[:, None] * direction + torch.randn(n, centres.size(1)), y


LOSSES = {
    "cross_entropy": partial(F.binary_cross_entropy_with_logits, reduction="none"),
    "class_weights": partial(
        F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(99.0), reduction="none"
    ),
    "focal": partial(sigmoid_focal_loss, gamma=2.0),
    "focal_alpha": partial(sigmoid_focal_loss, alpha=0.25, gamma=2.0),
}


def detector(D, width=64, prior=0.01):
    """(B, D) -> (B, 1); its first answer is `prior` for every x: b = -log((1 - prior) / prior)."""
    model = nn.Sequential(
        nn.Linear(D, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    nn.init.zeros_(model[-1].weight)
    nn.init.constant_(model[-1].bias, -math.log((1 - prior) / prior))
    return model


def fit(model, loss_of, train, val, epochs, writer):
    """Adam on the mean of loss_of; what it comes to on the validation points."""
    (x, y), (x_val, y_val) = train, val

    def report():
        figures = measure(model, loss_of, x_val, y_val)
        writer.add_scalar("loss/easy_negatives", figures["easy"], step)
        writer.add_scalar("val/average_precision", figures["AP"], step)
        return figures

    optimizer, step = torch.optim.Adam(model.parameters(), lr=2e-3), 0
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(256):
            if step % 40 == 0:
                report()
            loss = loss_of(model(x[i]).squeeze(1), y[i]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return report()


@torch.no_grad()
def measure(model, loss_of, x, y):
    logits = model(x).squeeze(1)
    p = logits.sigmoid()
    return {
        "AP": average_precision(p, y),
        "recall": (p[y == 1] > 0.5).double().mean().item(),
        "easy": easy_negative_share(loss_of(logits, y), p, y),
        "mean_p": p.mean().item(),
    }


def show_imbalance(seed, log_dir, n, epochs):
    print(f"4. an MLP on {n:,} points, one in 100 positive; on as many others")
    print("   easy negatives: their share of the loss, at cross-entropy's answers and at its own")
    torch.manual_seed(seed)
    centres, direction = 2 * torch.randn(5, 8), F.normalize(torch.randn(8), dim=0) * 2.5
    train, val = (rare_class(n, centres, direction) for _ in range(2))
    start, rows = detector(8), {}
    for name, loss_of in tqdm(LOSSES.items(), leave=False, disable=None):
        torch.manual_seed(seed)  # the same batches for all
        model = copy.deepcopy(start)
        with SummaryWriter(log_dir / "imbalance" / name, purge_step=0) as writer:
            row = rows[name] = fit(model, loss_of, train, val, epochs, writer)
            with torch.no_grad():
                logits, y = model(val[0]).squeeze(1), val[1]
            writer.add_pr_curve("val/precision_recall", y.int(), logits.sigmoid(), 0)
        if name == "cross_entropy":  # its network says, for all, which negatives are easy
            plain, p = logits, logits.sigmoid()
        row["easy_before"] = easy_negative_share(loss_of(plain, y), p, y)  # at its answers
        row["easy_after"] = easy_negative_share(loss_of(logits, y), p, y)  # trained by this loss
        tqdm.write(f"   {name:<13}   average precision {row['AP']:.3f}   "
                   f"recall {row['recall']:.3f}   easy negatives {row['easy_before']:.4f} "
                   f"{row['easy_after']:.3f}   mean p {row['mean_p']:.3f}")  # fmt: skip
    print(f"   a guess         average precision {val[1].mean():.3f}")
    return rows


def show_prior(n=10_000):
    print("5. first loss of a detector at 1 : 100: mean cross-entropy")
    y, losses = (torch.arange(n) % 100 == 0).float(), {}
    for prior in (0.5, 0.01):
        logits = detector(8, prior=prior)(torch.randn(n, 8)).squeeze(1).detach()
        losses[prior] = F.binary_cross_entropy_with_logits(logits, y).item()
        theory = -(0.01 * math.log(prior) + 0.99 * math.log(1 - prior))
        print(f"   prior {prior:<4}   measured {losses[prior]:.4f}   theory {theory:.4f}")
    return losses


def main(seed=0, log_dir=LOG_DIR, n=20_000, epochs=6):
    torch.manual_seed(seed)
    show_twins()
    return {
        "ratios": show_factor(log_dir),
        "best": show_improper(),
        "imbalance": show_imbalance(seed, log_dir, n, epochs),
        "prior": show_prior(),
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
