"""Label smoothing gives the logits a finite optimum; on noisy labels it calibrates a network.

    q_k = (1 - e) [k = y] + e / C          targets of C classes
    L   = -sum_k q_k log p_k               gradient p - q with respect to the logits
        = (1 - e) CE(y, p) + e (KL(u || p) + log C)           u = 1 / C
    best logits    z_y - z_k = log((1 - e + e / C) / (e / C)) for every k != y; infinite for e = 0

A network that can fit wrong labels will, and then claims 90 % where it is right in two cases of
three. Smoothing forbids certainty: confidence comes near to accuracy, and falls below it if e is
too large, or if the labels are right and the network knows it. What else it changes, here: about a
point of accuracy is lost; the features of one label scatter less on clean training points, and more
on all others; a student of such a teacher is no worse (Müller's harm to distillation did not show).

Checked here   L = F.cross_entropy(label_smoothing=), with gradients; the identity with KL; the best
               gap, by descent, and its growth by log t for e = 0; on 600 points, a fifth of them
               or none with a random label (right by chance in a tenth): calibration error (ECE),
               accuracy, scatter, a student and its equal without a teacher
TensorBoard    logits/gap by step in gap/eps_0 …; calibration/reliability (a bar is the accuracy at
               a confidence, red what it lacks or exceeds) and calibration/accuracy by confidence in
               per cent, in noisy/eps_0 … and clean/eps_0 …; the diagonal is the run ideal
Try            C = 2, e = 0.1: what is the best gap now? log(0.95 / 0.05) = 2.94
Source         Szegedy et al. 2016, arXiv:1512.00567, section 7; Guo et al. 2017, arXiv:1706.04599,
               eq. 3 (ECE); Müller et al. 2019, arXiv:1906.02629 (calibration, features, students)
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

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "loss_functions" / "label_smoothing"
F64 = torch.float64
BINS = 15


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


# --- the loss ----------------------------------------------------------------------------------


def smooth_labels(labels, num_classes, epsilon, dtype=None):
    """Targets q (B, C) from labels (B,): 1 - e on the label, and e spread evenly over all.

    In `dtype`, by default torch's. ValueError "epsilon must be from 0 to 1, not …" (nan, too).
    Exercise.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be from 0 to 1, not {epsilon}")
    one_hot = F.one_hot(labels, num_classes).to(dtype or torch.get_default_dtype())
    return (1 - epsilon) * one_hot + epsilon / num_classes


def label_smoothing_loss(logits, labels, epsilon):
    """Mean of -sum_k q_k log p_k over logits (B, C) and labels (B,), q by smooth_labels.

    In the type of the logits. ValueError "logits (B, C) and labels (B,), not …" for other shapes.
    Exercise.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits (B, C) and labels (B,), not {(*logits.shape,)}, {(*labels.shape,)}"
        )
    q = smooth_labels(labels, logits.size(1), epsilon, logits.dtype)
    return -(q * logits.log_softmax(1)).sum(1).mean()


def penalty_form(logits, labels, epsilon):
    """The same number as cross-entropy and a divergence from the uniform distribution u = 1 / C.

    (1 - e) CE(y, p) + e (KL(u || p) + log C), KL as a mean over the batch. Exercise.
    """
    C, log_p = logits.size(1), logits.log_softmax(1)
    u = torch.full_like(log_p, 1 / C)
    kl = F.kl_div(log_p, u, reduction="batchmean")  # KL(u || p): target second
    return (1 - epsilon) * F.cross_entropy(logits, labels) + epsilon * (kl + math.log(C))


def best_gap(num_classes, epsilon):
    """z_y - z_k at the optimum, where p = q: log((1 - e + e / C) / (e / C)); math.inf for e = 0.

    Exercise.
    """
    if epsilon == 0:
        return math.inf
    return math.log((1 - epsilon + epsilon / num_classes) / (epsilon / num_classes))


def descend(num_classes, epsilon, steps, lr=5.0):
    """The gap z_y - z_k after every step of gradient descent on the logits of one example."""
    z = torch.zeros(1, num_classes, dtype=F64, requires_grad=True)
    gaps = []
    for _ in range(steps):
        loss = label_smoothing_loss(z, torch.tensor([0]), epsilon)
        z = (z - lr * torch.autograd.grad(loss, z)[0]).detach().requires_grad_()
        gaps.append((z[0, 0] - z[0, 1:].max()).item())
    return gaps


# --- calibration -------------------------------------------------------------------------------


def reliability(p, labels, bins=BINS):
    """For each bin of confidence max_k p_k: share of the examples, mean confidence, accuracy.

    p (B, C) -> three tensors (bins,); a bin without examples has 0 in all of them. Bin i holds
    confidences above i / bins, up to and with (i + 1) / bins. Exercise.
    """
    confidence, predicted = p.double().max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins (i / n, (i + 1) / n]
    counts = index.bincount(minlength=bins)

    def mean(values):
        return index.bincount(weights=values, minlength=bins) / counts.clamp(min=1)

    return counts / len(p), mean(confidence), mean((predicted == labels).double())


def expected_calibration_error(p, labels, bins=BINS):
    """ECE: mean distance of accuracy and confidence over the bins, weighted by their share.

    A float, by reliability(p, labels, bins). Exercise.
    """
    share, confidence, accuracy = reliability(p, labels, bins)
    return (share * (accuracy - confidence).abs()).sum().item()


def reliability_picture(share, confidence, accuracy, size=20):
    """(3, H, W) in [0, 1]: blue bars of accuracy, red up to or down from the confidence."""
    bins = len(share)
    side = bins * size
    height = torch.arange(side, 0, -1).view(-1, 1) / side  # (H, 1), 1 at the top
    column = torch.arange(side) // size  # (W,) -> bin
    low, high = (f(accuracy, confidence)[column] for f in (torch.minimum, torch.maximum))
    seen = (share > 0)[column]
    picture = torch.ones(3, side, side)
    for colour, mask in (
        ((0.25, 0.45, 0.8), seen & (height <= accuracy[column])),
        ((0.9, 0.35, 0.3), seen & (height > low) & (height <= high)),
        ((0.3, 0.3, 0.3), (height - torch.arange(side, 0, -1).flip(0) / side).abs() < 1.5 / side),
    ):
        picture = torch.where(mask, torch.tensor(colour).view(3, 1, 1), picture)
    return picture


# --- what smoothing does to a network ----------------------------------------------------------


def noisy_clusters(n, centres, noise):
    """Points x (n, D) around centres (C, D), labels (n,): a share `noise` of them is random."""
    C, D = centres.shape
    classes = torch.randint(C, (n,))
    labels = torch.where(torch.rand(n) < noise, torch.randint(C, (n,)), classes)
    return centres[classes] + torch.randn(n, D), labels


def fit(x, loss_of, width, epochs, seed, C=10):
    """Features and head of an MLP after Adam on loss_of(logits, indices of the batch)."""
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Linear(x.size(1), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    )
    model = nn.Sequential(features, nn.Linear(width, C))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            loss = loss_of(model(x[i]), i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False)


def scatter(z, labels):
    """Mean squared distance from the class mean, over that of the class means from theirs.

    z (N, D), labels (N,): a float. Classes that have no point do not count; the mean of the class
    means weighs each class alike. Exercise.
    """
    seen, group = labels.unique(return_inverse=True)
    means = torch.stack([z[labels == k].mean(0) for k in seen])
    within = (z - means[group]).square().sum(1).mean()
    return (within / (means - means.mean(0)).square().sum(1).mean()).item()


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def measure(epsilon, train, test, epochs, seed, T=2.0):
    """The network trained with `epsilon`: its figures, and its softmax on the test points."""
    (x, y), (x_test, y_test) = train, test
    model = fit(x, lambda z, i: label_smoothing_loss(z, y[i], epsilon), 128, epochs, seed)
    soft = (model(x) / T).softmax(1)  # all that the student sees
    student = fit(x, lambda z, i: T * T * F.cross_entropy(z / T, soft[i]), 32, epochs, seed)
    alone = fit(x, lambda z, i: label_smoothing_loss(z, y[i], epsilon), 32, epochs, seed)
    p = model(x_test).softmax(1)
    return {
        "train": accuracy(model(x), y),
        "ece": expected_calibration_error(p, y_test),
        "confidence": p.max(1).values.mean().item(),
        "accuracy": accuracy(p, y_test),
        "scatter": scatter(model[0](x), y),
        "scatter_test": scatter(model[0](x_test), y_test),
        "student": accuracy(student(x_test), y_test),
        "alone": accuracy(alone(x_test), y_test),  # of the student's size, without a teacher
    }, p


def show_twins():
    print("1. our loss and F.cross_entropy, and the form with KL(u || p): largest differences")
    logits = torch.randn(7, 5, dtype=F64, requires_grad=True)
    labels = torch.randint(5, (7,))
    for epsilon in (0.0, 0.1, 0.7):
        losses = [
            label_smoothing_loss(logits, labels, epsilon),
            F.cross_entropy(logits, labels, label_smoothing=epsilon),
            penalty_form(logits, labels, epsilon),
        ]
        grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        by_hand = (logits.softmax(1) - smooth_labels(labels, 5, epsilon, F64)) / 7  # (p - q) / B
        for loss, grad in zip(losses, grads, strict=True):
            torch.testing.assert_close(loss, losses[1], rtol=0, atol=1e-12)
            torch.testing.assert_close(grad, by_hand, rtol=0, atol=1e-12)
        off = [(loss - losses[1]).abs().item() for loss in (losses[0], losses[2])]
        print(f"   e {epsilon}   ours {off[0]:.0e}   with KL {off[1]:.0e}")


def show_gap(log_dir, steps, C=10):
    print(f"2. gap of the logits, C = {C}, after {steps // 10}, {steps} steps of descent")
    gaps = {}
    for epsilon in (0.0, 0.01, 0.1, 0.3):
        gaps[epsilon] = descend(C, epsilon, steps)
        draw(log_dir / "gap" / f"eps_{epsilon:g}", {"logits/gap": gaps[epsilon]})
        theory = f"{best_gap(C, epsilon):.4f}" if epsilon else "infinite, + ln 10 = 2.303 a decade"
        shown = "   ".join(f"{gaps[epsilon][i - 1]:.4f}" for i in (steps // 10, steps))
        print(f"   e {epsilon:<4}   {shown}   theory {theory}")
    return {epsilon: (path[steps // 10 - 1], path[-1]) for epsilon, path in gaps.items()}


def write_calibration(log_dir, bars):
    with SummaryWriter(log_dir, purge_step=0) as writer:
        writer.add_image("calibration/reliability", reliability_picture(*bars), 0)
        for share, confidence, right in zip(*bars, strict=True):
            if share > 0.005:  # a bin of few points tells little
                writer.add_scalar("calibration/accuracy", right, round(100 * confidence.item()))


def show_networks(seed, log_dir, noise, epsilons, n, epochs):
    """{e: figures} for networks that learn n points, judged on 4,000 points with the same noise."""
    torch.manual_seed(seed)
    centres = torch.randn(10, 16)
    train, test = (noisy_clusters(m, centres, noise) for m in (n, 4000))
    rows = {}
    print("     e   fits  accuracy  confidence    ECE  scatter: train   test  student  alone")
    for epsilon in tqdm(epsilons, leave=False, disable=None):
        row, p = measure(epsilon, train, test, epochs, seed)
        rows[epsilon] = row
        write_calibration(log_dir / f"eps_{epsilon:g}", reliability(p, test[1]))
        tqdm.write(f"  {epsilon:4}  {row['train']:.3f}     {row['accuracy']:.3f}       "
                   f"{row['confidence']:.3f}  {row['ece']:.3f}           {row['scatter']:.3f}  "
                   f"{row['scatter_test']:.3f}    {row['student']:.3f}  "
                   f"{row['alone']:.3f}")  # fmt: skip
    return rows


def main(seed=0, log_dir=LOG_DIR, steps=2000, n=600, epochs=60):
    torch.manual_seed(seed)
    show_twins()
    measured = {"gaps": show_gap(log_dir, steps)}
    draw(log_dir / "ideal", {"calibration/accuracy": [i / 100 for i in range(101)]})
    for number, (name, noise, epsilons) in enumerate(
        (("noisy", 0.2, (0.0, 0.05, 0.1, 0.2, 0.4)), ("clean", 0.0, (0.0, 0.1))), 3
    ):
        print(f"{number}. an MLP on {n} points, {noise:.0%} of the labels random")
        measured[name] = show_networks(seed, log_dir / name, noise, epsilons, n, epochs)
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
