"""Label smoothing with e = 0.1 makes a network less sure: that lowers its calibration error where a
fifth of the labels is random, and raises it where all labels are right.

A network is calibrated if it is right in 70 of 100 cases in which it is 70 % sure. One that learns
wrong labels by heart is surer than that. With label smoothing the target of the right class is a
little less than 1, and that of each other class a little more than 0. Another way is to divide all
logits of a trained network by one number T, the temperature, which is chosen on examples that were
not trained on. In sections 4 and 5 it lowers the error in both cases, and no answer changes.

    q_k = (1 - e) [k = y] + e / C             the smoothed targets
    L   = -sum_k q_k log p_k                  its slope along the logit z_k is p_k - q_k
        = (1 - e) CE + e (KL(u || p) + log C)
    best gap  z_y - z_k = log((1 - e + e / C) / (e / C)) for every k != y; infinite for e = 0
    ECE = sum_b share_b |accuracy_b - confidence_b|          expected calibration error; 0 is best

    C  classes    y  the label    [k = y]  1 for k = y, else 0    e  how much is smoothed, 0 to 1
    z  logits, the raw outputs    p = softmax(z)    CE = -log p_y    u_k = 1 / C    log  natural
    KL(u || p) = sum_k u_k log(u_k / p_k)    confidence  the largest p_k    b  bins of confidence

Needs          nn_loss.py, nn_optim.py, kl_divergence.py
Checked here   plain = complete = F.cross_entropy = the form with KL; the best gap, by descent;
               accuracy, confidence and ECE with and without random labels; temperature
TensorBoard    logits/gap by step in gap/eps_0 ...: only eps_0 does not become level;
               calibration/accuracy in noisy/eps_0 ..., clean/eps_0 ..., x-axis: confidence in
               percent; below the run ideal a network is too sure; calibration/reliability: bars
Try            in show_gap, write C=2 for C=10: what is the best gap for e = 0.1?
Answer         log(0.95 / 0.05) = 2.9444 instead of 4.5109
Source         Szegedy et al. 2016, arXiv:1512.00567, section 7; Guo et al. 2017, arXiv:1706.04599
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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "loss_functions" / "label_smoothing"
F64 = torch.float64
BINS = 15
TEMPERED = "e = 0, logits/T"


# --- 1. in everyday code -----------------------------------------------------------------------


def smoothing_plain(z, y, e):
    """Mean loss of logits z (B, C) and labels y (B,): three lines to carry away."""
    log_p = z.log_softmax(1)
    right = log_p.gather(1, y[:, None]).squeeze(1)  # log p_y
    return -((1 - e) * right + e * log_p.mean(1)).mean()


def show_everyday():
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    y = torch.tensor([0])  # the right class
    print("1. In everyday code: how far should the right logit lie above two others? e = 0.1")
    print("   (3.332 = log 28 is the best gap by the formula of section 3)")
    print("   logits          p of the right   CrossEntropyLoss   label_smoothing=0.1   "
          "smoothing_plain")  # fmt: skip
    losses = {}
    for gap in (0.0, 1.0, 3.332, 10.0):
        z = torch.tensor([[gap, 0.0, 0.0]])
        losses[gap] = [nn.CrossEntropyLoss()(z, y).item(), smoothed(z, y).item(),
                       smoothing_plain(z, y, 0.1).item()]  # fmt: skip
        print("   {:6.3f}, 0, 0   {:14.5f}   {:16.5f}   {:19.5f}   {:15.5f}".format(
            gap, z.softmax(1)[0, 0], *losses[gap]))  # fmt: skip
    best = [min(losses, key=lambda gap: losses[gap][i]) for i in (0, 1)]
    print(f"   -> of these gaps {best[0]:g} costs least without smoothing, {best[1]:g} with it")
    return losses


# --- 2. from scratch ---------------------------------------------------------------------------


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


def show_twins():
    print("2. Are they the same loss? 7 random examples, 5 classes")
    print("   e     smoothing_plain   label_smoothing_loss   penalty_form   F.cross_entropy")
    z = torch.randn(7, 5, dtype=F64, requires_grad=True)
    labels, off = torch.randint(5, (7,)), 0.0
    for epsilon in (0.0, 0.1, 0.7):
        losses = [
            smoothing_plain(z, labels, epsilon),
            label_smoothing_loss(z, labels, epsilon),
            penalty_form(z, labels, epsilon),
            F.cross_entropy(z, labels, label_smoothing=epsilon),
        ]
        by_hand = (z.softmax(1) - smooth_labels(labels, 5, epsilon, F64)) / 7  # (p - q) / B
        for loss in losses:
            (slope,) = torch.autograd.grad(loss, z, retain_graph=True)
            off = max(off, (loss - losses[-1]).abs().item(), (slope - by_hand).abs().max().item())
        print("   {:.1f}   {:15.6f}   {:20.6f}   {:12.6f}   {:15.6f}".format(
            epsilon, *(loss.item() for loss in losses)))  # fmt: skip
    assert off < 1e-12
    print(f"   -> one way minus another, and slopes minus (p - q) / 7, largest: {off:.0e}")
    return off


# --- 3. the best gap ---------------------------------------------------------------------------


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


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


def show_gap(log_dir, steps, C=10):
    print(f"3. Which gap of the logits is best? {C} classes, gradient descent on one example")
    print(f"   e      after {steps // 10} steps   after {steps}   formula")
    gaps = {}
    for epsilon in (0.0, 0.01, 0.1, 0.3):
        path = descend(C, epsilon, steps)
        gaps[epsilon] = path[steps // 10 - 1], path[-1]
        draw(log_dir / "gap" / f"eps_{epsilon:g}", {"logits/gap": path})
        print("   {:<4}   {:15.4f}   {:10.4f}   {:7.4f}".format(
            epsilon, *gaps[epsilon], best_gap(C, epsilon)))  # fmt: skip
    grown = gaps[0.0][1] - gaps[0.0][0]
    print(f"   -> without smoothing 10 times the steps add {grown:.3f} to the gap, and log 10 is "
          f"{math.log(10):.3f}:\n      it grows like log(steps)")  # fmt: skip
    return gaps


# --- 4, 5. what smoothing does to a network ----------------------------------------------------


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


def noisy_clusters(n, centres, noise):
    """Points x (n, D) around centres (C, D), labels (n,): a share `noise` of them is random."""
    C, D = centres.shape
    classes = torch.randint(C, (n,))
    labels = torch.where(torch.rand(n) < noise, torch.randint(C, (n,)), classes)
    return centres[classes] + torch.randn(n, D), labels


def fit(x, y, epsilon, width, epochs, seed, C=10):
    """An MLP after Adam on the smoothed loss of x (n, D), y (n,)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.size(1), width), nn.ReLU(), nn.Linear(width, width),
                          nn.ReLU(), nn.Linear(width, C))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            loss = label_smoothing_loss(model(x[i]), y[i], epsilon)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False)


def fit_temperature(z, labels):
    """The T of 0.25, 0.30 ... 6 for which the mean cross-entropy of z / T is least: a float.

    z (N, C) are logits of points that were not trained on. Exercise.
    """
    grid = torch.arange(0.25, 6.01, 0.05).tolist()
    return min(grid, key=lambda T: F.cross_entropy(z / T, labels).item())


def judge(z, labels):
    """Accuracy, mean confidence and ECE of the logits z."""
    p = z.softmax(1)
    confidence, predicted = p.max(1)
    right = (predicted == labels).double().mean().item()
    return right, confidence.mean().item(), expected_calibration_error(p, labels)


def show_networks(number, seed, log_dir, noise, epsilons, n, epochs, sets):
    """{row: accuracy, confidence, ECE}, means over data sets; judged on 4,000 other points."""
    print(f"{number}. What does smoothing do if {noise:.0%} of the labels are random, in training "
          "and test?")  # fmt: skip
    print(f"   {n} training points, 10 classes, means over {sets} data sets; "
          f"accuracy at best {1 - 0.9 * noise:.2f}")  # fmt: skip
    print("   confidence: mean of the largest p; ECE: how far accuracy and confidence differ, "
          "0 is best")  # fmt: skip
    print("   trained with      accuracy   confidence     ECE")
    names = [f"e = {epsilon:g}" for epsilon in epsilons]
    rows, temperatures = {name: [] for name in [*names, TEMPERED]}, []
    for k in tqdm(range(sets), leave=False, disable=None):
        torch.manual_seed(1000 * seed + k)
        centres = torch.randn(10, 16)
        (x, y), held, test = (noisy_clusters(m, centres, noise) for m in (n, 1000, 4000))
        for epsilon, name in zip(epsilons, names, strict=True):
            model = fit(x, y, epsilon, 128, epochs, k)
            z = model(test[0])
            rows[name].append(judge(z, test[1]))
            if k == 0:
                write_calibration(log_dir / f"eps_{epsilon:g}", reliability(z.softmax(1), test[1]))
            if epsilon == 0:
                temperatures.append(fit_temperature(model(held[0]), held[1]))
                rows[TEMPERED].append(judge(z / temperatures[-1], test[1]))
    rows = {name: torch.tensor(row).mean(0).tolist() for name, row in rows.items()}
    for name, row in rows.items():
        print("   {:<15}   {:8.3f}   {:10.3f}   {:5.3f}".format(name, *row))
    print(f"   (T, fitted on 1,000 other points: {sum(temperatures) / sets:.2f} on average)")
    ece = {name: row[2] for name, row in rows.items()}
    said = [f"{what} {'raises' if ece[name] > ece['e = 0'] else 'lowers'} it to {ece[name]:.3f}"
            for what, name in (("e = 0.1", "e = 0.1"), ("dividing by T", TEMPERED))]  # fmt: skip
    print(f"   -> e = 0 has an ECE of {ece['e = 0']:.3f}; {said[0]}, {said[1]}")
    return rows


# --- the lesson --------------------------------------------------------------------------------


def reliability_picture(share, confidence, accuracy, size=20):
    """(H, W, 3) uint8: a bar a bin, red between accuracy and confidence, blue below both; words."""
    side, left, top = len(share) * size, 30, 60
    base = top + side
    picture = Image.new("RGB", (left + side + 20, base + 40), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, seen in enumerate((share > 0).tolist()):
        x = left + i * size
        blue, red = (base - side * values[i].item() for values in (accuracy, confidence))
        if seen:
            pen.rectangle((x, blue, x + size - 2, base), (64, 115, 204))
            pen.rectangle((x, min(blue, red), x + size - 2, max(blue, red)), (230, 89, 77))
    pen.line((left, base, left + side, top), "black", 2)  # here both are equal
    for x, y, words in (
        (4, 2, "blue: up to the smaller of accuracy and confidence"),
        (4, 20, "red below the line: too sure; above: not sure enough"),
        (4, 38, "1  accuracy, upwards"), (14, base - 16, "0"), (left, base + 4, "0"),
        (left + side // 2 - 40, base + 4, "confidence"), (left + side - 8, base + 4, "1"),
    ):  # fmt: skip
        pen.text((x, y), words, "black", font)
    return np.asarray(picture)


def write_calibration(log_dir, bars):
    with SummaryWriter(log_dir, purge_step=0) as writer:
        picture = reliability_picture(*bars)
        writer.add_image("calibration/reliability", picture, 0, dataformats="HWC")
        for share, confidence, right in zip(*bars, strict=True):
            if share > 0.005:  # a bin of few points tells little
                writer.add_scalar("calibration/accuracy", right, round(100 * confidence.item()))


def main(seed=0, log_dir=LOG_DIR, steps=2000, n=600, epochs=60, sets=3):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "off": show_twins(), "gaps": show_gap(log_dir, steps)}
    draw(log_dir / "ideal", {"calibration/accuracy": [i / 100 for i in range(101)]})
    sizes = n, epochs, sets
    noisy, clean = (0.0, 0.1, 0.4), (0.0, 0.02, 0.1)
    measured["noisy"] = show_networks(4, seed, log_dir / "noisy", 0.2, noisy, *sizes)
    measured["clean"] = show_networks(5, seed, log_dir / "clean", 0.0, clean, *sizes)
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
