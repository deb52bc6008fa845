"""KL divergence says how badly one distribution stands in for another, and its order matters: the
Gaussian that fits two far modes best spreads over both, or takes one, by the order of the two.

It is a loss where the target is a distribution and not one right class. In distillation a small
network, the student, learns all class probabilities of a large one, the teacher. F.kl_div wants
logarithms first and the target second; exchanged arguments raise no error and give another loss.
SEED needs no labels: the student copies how similar the teacher finds a point to other points.

    KL(p || q)   sum_k p_k log(p_k / q_k), at least 0, and 0 only for p = q
    Gaussians    log(sigma_q / sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1 / 2
    forward fit  the q of least KL(p || q): q must be where p is
    reverse fit  the q of least KL(q || p): q must not be where p is not
    soft loss    T^2 KL(softmax(v / T) || softmax(z / T))

    p_k, q_k   probabilities of outcome k     mu, sigma   mean and standard deviation
    z, v       logits (before the softmax) of student and teacher      log  natural
    T          temperature: the larger, the more even the probabilities

Needs          nn_loss.py, contrastive_loss.py (for SEED in section 5)
Checked here   KL = torch.distributions'; four calls of F.kl_div; both fits and where they part; the
               gradient by T; two students with their controls: distillation and SEED
TensorBoard    fit/densities in fit/... (grey the target, a line the fit); temperature/log2_gradient
               by log2 T in temperature/...; val/accuracy, probe/accuracy by epoch in the other runs
Try            in show_fits, write (m, 1.0, 0.0, math.inf) for (m, 1.0, m / 2, -math.log(w)), so
               that the reverse fits start between the modes: which mode do they take?
Answer         neither: both end at mu -0.47 and sigma 2.70, at a KL of 0.85, not 0.51 and 0.91
Source         Kullback & Leibler 1951; Bishop 2006, section 10.1.2; Hinton et al. 2015,
               arXiv:1503.02531; Fang et al. 2021 (SEED), arXiv:2101.04731
"""

import argparse
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
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.distributions import Categorical, Normal
from torch.distributions import kl_divergence as torch_kl
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "loss_functions" / "kl_divergence"
F64 = torch.float64
CLASSES = 10
MODES = ((0.6, -1), (0.4, 1))  # weight and side of two Gaussians with variance 1


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


# --- 1. in everyday code -----------------------------------------------------------------------


def kl_plain(p, q):
    """KL(p || q) of probabilities above 0, over the last axis."""
    return (p * (p / q).log()).sum(-1)


def distillation_plain(z, v, labels, T, alpha):
    """Student's logits z, teacher's v (B, C), labels (B,): what to minimise in distillation."""
    soft = F.kl_div((z / T).log_softmax(1), (v / T).softmax(1), reduction="batchmean")
    return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(z, labels)


def show_everyday():
    p = torch.tensor([[0.5, 0.5]])  # one example, two outcomes: the target
    q = torch.tensor([[0.25, 0.75]])  # what a network answers
    forward = F.kl_div(q.log(), p, reduction="batchmean")  # KL(p || q)
    reverse = F.kl_div(p.log(), q, reduction="batchmean")  # KL(q || p)

    print("1. In everyday code: how badly does q = (1/4, 3/4) stand in for p = (1/2, 1/2)? In nats")
    print("   what           F.kl_div   kl_plain   by head")
    by_head = 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    plain = kl_plain(p, q).item(), kl_plain(q, p).item()
    words = "1/2 log 2 + 1/2 log 2/3", "1/4 log 1/2 + 3/4 log 3/2"
    for i, (name, value) in enumerate((("KL(p || q)", forward), ("KL(q || p)", reverse))):
        print(f"   {name:<11}   {value:9.4f}   {plain[i]:8.4f}   {by_head[i]:.4f} = {words[i]}")
    z, v, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([1])
    loss = distillation_plain(z, v, labels, T=2.0, alpha=0.5)
    print(f"   distillation_plain of the logits z = (1, 0), v = (0, 2), label 1, T 2: {loss:.4f}")
    print(f"   -> the two orders differ by {(forward - reverse).abs():.4f}")
    return [forward.item(), reverse.item(), loss.item()], [*plain, *by_head]


# --- 2. the divergence and its calls -----------------------------------------------------------


def same_shapes(*tensors, dim=None):
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) > 1 or dim not in (None, len(shapes[0])):
        axes = f" with {dim} axes" if dim else ""
        raise ValueError(f"need equal shapes{axes}, not {' and '.join(map(str, shapes))}")


def kl_divergence(p, q):
    """KL(p || q) = sum p log(p / q) over the last axis, in nats; same_shapes refuses other shapes.

    0 log 0 = 0, and infinite where q = 0 < p: torch.xlogy. Exercise.
    """
    same_shapes(p, q)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def gaussian_kl(mu_p, sigma_p, mu_q, sigma_q):
    """KL(N(mu_p, sigma_p^2) || N(mu_q, sigma_q^2)), elementwise, of four tensors of one shape.

    log(sigma_q / sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1/2. same_shapes
    refuses others. Exercise.
    """
    same_shapes(mu_p, sigma_p, mu_q, sigma_q)
    spread = (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2)
    return torch.log(sigma_q / sigma_p) + spread - 0.5


def show_definition(samples):
    print("2. Is it torch's? 1,000 random p and q of 5 outcomes; two Gaussians; in nats")
    p, q = torch.randn(2, 1000, 5, dtype=F64).softmax(-1)
    forward, reverse = kl_divergence(p, q), kl_divergence(q, p)
    library = torch_kl(Categorical(p), Categorical(q))
    for ours in (forward, kl_plain(p, q)):
        torch.testing.assert_close(ours, library, rtol=0, atol=1e-12)
    assert (forward > 0).all() and (kl_divergence(p, p) == 0).all()
    print("                 from scratch   torch    smallest   |KL(p || q) - KL(q || p)|, largest")
    apart, mean = (forward - reverse).abs().max(), forward.mean()
    print(f"   5 outcomes    {mean:12.4f}   {library.mean():.4f}   {forward.min():8.4f}   "
          f"{apart:.4f}   (from scratch, torch: the means)")  # fmt: skip

    P, Q = Normal(*torch.tensor([0.5, 0.8], dtype=F64)), Normal(*torch.tensor([-1, 1.7], dtype=F64))
    closed = gaussian_kl(P.mean, P.stddev, Q.mean, Q.stddev)
    torch.testing.assert_close(closed, torch_kl(P, Q), rtol=0, atol=1e-12)
    x = P.sample((samples,))
    ratios = P.log_prob(x) - Q.log_prob(x)  # KL is their mean under P
    error = ratios.std() / samples**0.5
    gaussians = torch_kl(P, Q)
    print(f"   Gaussians     {closed:12.4f}   {gaussians:.4f}   mean of log(p / q) at {samples:,} "
          f"draws of p: {ratios.mean():.4f} +- {error:.4f}")  # fmt: skip
    off = max((forward - library).abs().max().item(), (closed - gaussians).abs().item())
    print(f"   -> from scratch minus torch, largest: {off:.1g}")
    return {"closed": closed.item(), "monte_carlo": ratios.mean().item(), "error": error.item()}


def show_kl_div(B=4, C=5):
    print(f"   Which call gives KL(p || q)? Mean over {B} random pairs of {C} outcomes")
    p, q = torch.randn(2, B, C, dtype=F64).softmax(-1)
    right, swapped = kl_divergence(p, q).mean(), kl_divergence(q, p).mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of "mean" by itself
        mean = F.kl_div(q.log(), p, reduction="mean")
    rows = (
        ('F.kl_div(q.log(), p, reduction="batchmean")', "batchmean", "KL(p || q)", right,
         F.kl_div(q.log(), p, reduction="batchmean")),
        ('F.kl_div(q.log(), p, reduction="mean")', "mean", f"KL(p || q) / {C}", right / C, mean),
        ('F.kl_div(p.log(), q, reduction="batchmean")', "swapped", "KL(q || p)", swapped,
         F.kl_div(p.log(), q, reduction="batchmean")),
        ('F.kl_div(q, p, reduction="batchmean")', "no log", "no divergence", None,
         F.kl_div(q, p, reduction="batchmean")),
    )  # fmt: skip
    values = {}
    print("   call                                            value   what it is")
    for call, name, meaning, theory, value in rows:
        values[name] = value.item()
        if theory is not None:
            torch.testing.assert_close(value, theory, rtol=0, atol=1e-12)
        shown = "" if theory is None else f" = {theory:.4f}"
        print(f"   {call:<43}   {value:8.4f}   {meaning}{shown}")
    good = [name for name in values if abs(values[name] - right) < 1e-9]
    print(f"   -> KL(p || q) by {', '.join(good)}; no call raises an error")
    return values, right.item(), swapped.item()


# --- 3. the order decides the fit --------------------------------------------------------------


def target_log_density(x, d=3.0):
    """log of 0.6 N(-d, 1) + 0.4 N(d, 1)."""
    (w1, s1), (w2, s2) = MODES
    left = math.log(w1) + Normal(s1 * d, 1.0).log_prob(x)
    return torch.logaddexp(left, math.log(w2) + Normal(s2 * d, 1.0).log_prob(x))


def fit_gaussian(order, mu, sigma=1.0, d=3.0):
    """mu, sigma and KL of the best N(mu, sigma^2) near the start, by L-BFGS on a grid."""
    x = torch.linspace(-25, 25, 5001, dtype=F64)
    log_p, dx = target_log_density(x, d), x[1] - x[0]
    theta = torch.tensor([mu, math.log(sigma)], dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-11, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def divergence():
        log_q = Normal(theta[0], theta[1].exp()).log_prob(x)
        a, b = (log_p, log_q) if order == "forward" else (log_q, log_p)
        loss = (a.exp() * (a - b)).sum() * dx
        theta.grad = torch.autograd.grad(loss, theta)[0]
        return loss

    optimizer.step(divergence)
    mass = Normal(theta[0], theta[1].exp()).log_prob(x).exp().sum() * dx
    if abs(mass - 1) > 1e-3:
        raise ArithmeticError(f"the fit has left the grid: its mass there is {mass:.3f}, not 1")
    return theta[0].item(), theta[1].exp().item(), divergence().item()


def words_above(image, words):
    """A white strip (3, 18, W) with black words, as wide as the image (3, H, W)."""
    strip = Image.new("L", (image.size(2), 18), "white")
    ImageDraw.Draw(strip).text((4, 1), words, "black", ImageFont.load_default(12))
    grey = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
    return (grey.view(1, 18, -1) / 255).expand(3, -1, -1)


def show_fits(log_dir, d=3.0):
    print("3. Which Gaussian N(mu, sigma^2) fits 0.6 N(-3, 1) + 0.4 N(3, 1) best?")
    print("   fit             mu       sigma    KL       formula: mu, sigma, KL at most")
    mu = sum(w * side * d for w, side in MODES)  # the mixture's moments
    sigma = math.sqrt(sum(w * (1 + d**2) for w, side in MODES) - mu**2)
    theory = {"forward": (mu, sigma, 0.0, math.inf)}  # mu, sigma; start of mu, bound of the KL
    for name, (w, side) in zip(("reverse_left", "reverse_right"), MODES, strict=True):
        m = side * d
        theory[name] = (m, 1.0, m / 2, -math.log(w))  # q = the mode has -log w at most
    fits, x = {}, torch.linspace(-9, 9, 480)
    for name, (mu, sigma, start, bound) in theory.items():
        order = name.split("_")[0]
        m, s, kl = fits[name] = fit_gaussian(order, start)
        at_most = "-" if bound == math.inf else f"-log w = {bound:.4f}"
        print(f"   {name:<13} {m:7.4f}   {s:.4f}   {kl:.4f}   {mu:7.4f} {sigma:.4f}   {at_most}")
        q = Normal(m, s).log_prob(x).exp()
        colour = (0.1, 0.35, 0.8) if order == "forward" else (0.85, 0.2, 0.15)
        with SummaryWriter(log_dir / "fit" / name, purge_step=0) as writer:
            words = f"{name}: the target is grey, the fit a line; x from -9 to 9, density 0 to 0.42"
            image = picture(target_log_density(x).exp(), q, colour)
            writer.add_image("fit/densities", torch.cat([words_above(image, words), image], 1), 0)
    wide, narrow = fits["forward"][1], max(fits[k][1] for k in fits if k != "forward")
    print(f"   -> the forward fit is {wide / narrow:.1f} times as wide as a reverse one")
    return fits


def show_distance():
    print("   Does the reverse fit always take one mode? Modes at -d and d; two starts of mu")
    print("      d   from -d: mu    sigma       KL   from 0: mu    sigma       KL")
    rows, one = {}, []
    for d in (1.5, 2.0, 2.5, 3.0, 4.0):
        left, middle = (fit_gaussian("reverse", start, d=d) for start in (-d, 0.0))
        rows[d] = left, middle
        if left[2] < middle[2] - 1e-6:
            one.append(d)
        print(f"   {d:4.1f}   {left[0]:11.4f}   {left[1]:.4f}   {left[2]:.4f}   "
              f"{middle[0]:10.4f}   {middle[1]:.4f}   {middle[2]:.4f}")  # fmt: skip
    print(f"   -> to take one mode is better at d = {', '.join(f'{d:g}' for d in one)} only")
    return rows


def picture(target, fit, colour, top=0.42, height=240):
    """(3, H, W) in [0, 1]: the target (W,) as a grey area, the fit (W,) as a line."""
    pixel = top / height
    level = torch.arange(height, 0, -1)[:, None] * pixel  # (H, 1), highest first
    image = torch.where(level <= target, 0.75, 1.0).expand(3, -1, -1)
    before = torch.cat([fit[:1], fit[:-1]])  # the line reaches to the height one column before
    low, high = torch.minimum(fit, before) - pixel, torch.maximum(fit, before) + 2 * pixel
    return torch.where((level >= low) & (level <= high), torch.tensor(colour)[:, None, None], image)


# --- 4. distillation ---------------------------------------------------------------------------


def soft_loss(student_logits, teacher_logits, T):
    """T^2 KL(teacher || student) of the softened answers softmax(logits / T), mean over the batch.

    Logits are (B, C): same_shapes(…, dim=2) refuses others. Exercise.
    """
    same_shapes(student_logits, teacher_logits, dim=2)
    log_q = F.log_softmax(student_logits / T, dim=1)
    log_p = F.log_softmax(teacher_logits / T, dim=1)
    return T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def distillation_loss(student_logits, teacher_logits, labels, T=4.0, alpha=0.9):
    """alpha times the soft loss, and 1 - alpha times cross-entropy with the labels (B,).

    Exercise.
    """
    soft = soft_loss(student_logits, teacher_logits, T)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)


def show_temperature(log_dir):
    print("4. Why T^2? Length of the gradient of the KL of softened answers, along the student's z")
    print("      T   without T^2   with T^2")
    z, v = 3 * torch.randn(2, CLASSES, dtype=F64)
    limit = ((z - z.mean()) - (v - v.mean())) / CLASSES
    rows = {}
    for k in range(11):
        T, leaf = 2**k, z[None].clone().requires_grad_()
        (grad,) = torch.autograd.grad(soft_loss(leaf, v[None], T), leaf)
        by_hand = T * ((z / T).softmax(0) - (v / T).softmax(0))
        torch.testing.assert_close(grad[0], by_hand, rtol=0, atol=1e-10)
        rows[T] = grad.norm().item() / T**2, grad.norm().item()
        if k % 2 == 0:
            print(f"   {T:4}   {rows[T][0]:11.7f}   {rows[T][1]:8.4f}")
    for column, name in enumerate(("raw", "times_T2")):
        curve = [math.log2(row[column]) for row in rows.values()]
        draw(log_dir / "temperature" / name, {"temperature/log2_gradient": curve})
    hard = (z.softmax(0) - F.one_hot(v.argmax(), CLASSES)).norm()
    print(f"   limit: length of (z - v less its mean) / {CLASSES}: {limit.norm():.4f}; "
          f"length for a label's cross-entropy: {hard:.4f}")  # fmt: skip
    ratio = rows[512][0] / rows[1024][0]
    print(f"   -> from T = 512 to 1024 the gradient without T^2 falls {ratio:.2f} times")
    return {"rows": rows, "limit": limit.norm().item()}


def clouds(seed, per_class=2, D=12):
    """A function n -> points x (n, D), labels (n,): each class is some clouds, which overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES * per_class, D, generator=generator)

    def sample(n):
        cloud = torch.randint(len(centres), (n,), generator=generator)
        return centres[cloud] + torch.randn(n, D, generator=generator), cloud % CLASSES

    return sample


def network(width, out, D=12):
    hidden = nn.Linear(D, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, out))


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def fit(model, n, loss_of, epochs, watch=None, batch=100, lr=4e-3):
    """Adam on loss_of(indices of a batch out of n); watch(model) at the start, after each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    seen = [watch(model)] if watch else []
    for _ in tqdm(range(epochs), leave=False, disable=None):
        for i in torch.randperm(n).split(batch):
            loss = loss_of(i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if watch:
            seen.append(watch(model))
    return seen


def smoothed_answers(logits, labels, T):
    """Logits that at T are as sure of the label as `logits` on average, and know nothing else."""
    C = logits.size(1)
    share = (logits / T).softmax(1).gather(1, labels[:, None]).mean()
    return T * torch.log(share * (C - 1) / (1 - share)) * F.one_hot(labels, C)


def train_student(seed, few, test, targets, alpha, T, epochs):
    """Accuracy on `test` by epoch; the same start and the same batches for a seed."""
    torch.manual_seed(seed)
    (x, labels), (x_test, labels_test) = few, test
    student = network(32, CLASSES)

    def loss_of(i):
        return distillation_loss(student(x[i]), targets[i], labels[i], T, alpha)

    return fit(student, len(x), loss_of, epochs, lambda m: accuracy(m(x_test), labels_test))


def show_distillation(seed, log_dir, train, few, test, epochs, T=4.0):
    print(f"   Does it help? Students with {len(few[0])} labels, T = {T:g}; the teacher had "
          f"{len(train[0]):,}; {len(test[0]):,} test points")  # fmt: skip
    x, labels = train
    teacher = network(256, CLASSES)
    fit(teacher, len(x), lambda i: F.cross_entropy(teacher(x[i]), labels[i]), 4)
    answers = teacher.requires_grad_(False)(few[0])
    runs = {  # targets, alpha
        "hard": (answers, 0.0),
        "smoothed": (smoothed_answers(answers, few[1], T), 0.9),  # the control
        "soft": (answers, 0.9),
    }
    ends = {"teacher": accuracy(teacher(test[0]), test[1])}
    for name, (targets, alpha) in runs.items():
        seen = train_student(seed, few, test, targets, alpha, T, epochs)
        draw(log_dir / "distillation" / name, {"val/accuracy": seen})
        ends[name] = seen[-1]
    words = {"teacher": "many labels", "hard": "labels", "soft": "labels, the teacher's answers",
             "smoothed": "labels, as unsure as the teacher"}  # fmt: skip
    print("   network    learns from                        accuracy")
    for name, end in ends.items():
        who = name if name == "teacher" else "student"
        print(f"   {who:<8}   {words[name]:<32}   {end:8.3f}")
    best = max(("hard", "smoothed", "soft"), key=ends.get)
    print(f"   -> the best student learns from {words[best]}; it beats labels alone by "
          f"{ends[best] - ends['hard']:.3f}")  # fmt: skip
    return ends


# --- 5. second reading: SEED, distillation without labels --------------------------------------


def unit(x):
    """x (..., D) at length 1; in float16 the 1e-12 that keeps from 0 / 0 would itself be 0."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def seed_loss(student_z, teacher_z, queue, tau_s=0.2, tau_t=0.1):
    """Mean cross-entropy of student and teacher over candidates: their KL, plus a constant.

    student_z, teacher_z (B, D) embed the same points; candidates are the queue (K, D), of the
    teacher's earlier embeddings, and the point's own by the teacher. All are taken at length 1. Of
    the K + 1 cosines, p is the softmax at tau_t for the teacher, q that at tau_s for the student;
    -sum p log q. No gradient goes to teacher and queue. same_shapes(…, dim=2) refuses other shapes.
    Exercise.
    """
    same_shapes(student_z, teacher_z, dim=2)
    student_z = unit(student_z)
    teacher_z, queue = (unit(z.detach()) for z in (teacher_z, queue))

    def similarities(z):  # (B, K + 1)
        return torch.cat([z @ queue.T, (z * teacher_z).sum(1, keepdim=True)], dim=1)

    p = F.softmax(similarities(teacher_z) / tau_t, dim=1)
    return -(p * F.log_softmax(similarities(student_z) / tau_s, dim=1)).sum(1).mean()


def info_nce(q, k, temperature):
    """Mean InfoNCE of q, k (B, D): k_i is the positive of q_i, the other k_j are its negatives."""
    same_shapes(q, k, dim=2)
    s = unit(q) @ unit(k).T / temperature  # (B, B)
    return F.cross_entropy(s, torch.arange(len(q), device=q.device))


@torch.no_grad()
def linear_probe(model, few, test, ridge=10.0):
    """Test accuracy of a ridge regression from frozen features to the classes of a few points."""
    h, h_test = model(few[0]), model(test[0])
    mean, std = h.mean(0), h.std(0) + 1e-5
    h, h_test = (F.pad((f - mean) / std, (0, 1), value=1.0) for f in (h, h_test))
    targets = F.one_hot(few[1], CLASSES).to(h.dtype)
    W = torch.linalg.solve(h.T @ h + ridge * torch.eye(h.size(1)), h.T @ targets)
    return accuracy(h_test @ W, test[1])


def contrastive(student, x, noise=0.8):
    """loss_of for `fit`: two noisy views of a point shall meet, away from those of others."""

    def view(i):
        return student(x[i] + noise * torch.randn_like(x[i]))

    return lambda i: info_nce(view(i), view(i), temperature=0.2)


def mimic(student, x, teacher, size=500):
    """loss_of for `fit`: SEED, with a queue of the last `size` embeddings."""
    queue = teacher(x[:size])

    def loss_of(i):
        nonlocal queue
        z = teacher(x[i])
        loss = seed_loss(student(x[i]), z, queue)
        queue = torch.cat([queue, z])[-size:]  # first in, first out
        return loss

    return loss_of


def show_seed(seed, log_dir, x, few, test, epochs):
    print(f"5. SEED: can similarities be copied? {len(x):,} points without labels; then a linear")
    print(f"   classifier of the outputs, with {len(few[0])} labels")
    print("   outputs of                    accuracy")
    teacher, untrained = network(256, 64), network(256, 64).requires_grad_(False)
    fit(teacher, len(x), contrastive(teacher, x), 8, batch=200, lr=2e-3)
    teacher.requires_grad_(False)
    probe = partial(linear_probe, few=few, test=test)
    probes = {"the points": probe(nn.Identity()), "teacher": probe(teacher)}
    for name, objective in {
        "no_teacher": contrastive,
        "untrained_teacher": partial(mimic, teacher=untrained),
        "teacher": partial(mimic, teacher=teacher),
    }.items():
        torch.manual_seed(seed)
        student = network(32, 64)
        seen = fit(student, len(x), objective(student, x), epochs, probe, batch=200, lr=6e-3)
        draw(log_dir / "seed" / name, {"probe/accuracy": seen})
        probes |= {"student at the start": seen[0], f"student, {name.replace('_', ' ')}": seen[-1]}
    for name, value in probes.items():
        print(f"   {name:<27}   {value:8.3f}")
    students = {name: value for name, value in probes.items() if name.startswith("student")}
    best = max(students, key=students.get)
    print(f"   -> the best: {best}; it beats no teacher by "
          f"{students[best] - students['student, no teacher']:.3f}")  # fmt: skip
    return probes


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, samples=100_000, points=6000, labels=300, epochs=(100, 10)):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "definition": show_definition(samples)}
    measured["calls"] = show_kl_div()
    measured["fits"] = show_fits(log_dir)
    measured["distance"] = show_distance()
    measured["temperature"] = show_temperature(log_dir)
    sample = clouds(seed)
    train, few, test = sample(points), sample(labels), sample(4000)
    measured["distillation"] = show_distillation(seed, log_dir, train, few, test, epochs[0])
    measured["seed"] = show_seed(seed, log_dir, train[0], few, test, epochs[1])
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
