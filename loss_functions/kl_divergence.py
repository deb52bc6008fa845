"""KL divergence measures how badly one distribution stands in for another, and its order matters:
a Gaussian fitted to two far peaks (modes) covers both in one order, only one of them in the other.

It is a loss where the target is a distribution and not one right class. In distillation a small
network, the student, learns all class probabilities of a large one, the teacher. F.kl_div wants
logarithms first and the target second. With exchanged arguments it gives another number.

    KL(p || q)   sum_k p_k log(p_k / q_k), at least 0, and 0 only for p = q
    Gaussians    log(sigma_q / sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1 / 2
    soft loss    T^2 KL(softmax(v / T) || softmax(z / T))

    p_k, q_k   probabilities of outcome k     mu, sigma   mean and standard deviation
    z, v       logits (before the softmax) of student and teacher    log  natural: KL is in nats
    T          temperature: the larger, the more even the probabilities
    alpha      share of the soft loss; the cross-entropy with the labels has 1 - alpha

In KL(p || q) a place where p is likely and q near 0 is expensive, so the best q is wide. In
KL(q || p) a place where q is likely and p near 0 is expensive, so the best q may keep to one mode.

Needs          nn_loss.py, nn_optim.py; contrastive_loss.py for section 5
Checked here   KL = torch.distributions'; four calls of F.kl_div; both fits; the gradient by T;
               students with and without a teacher, by labels and (SEED) by similarities alone
TensorBoard    fit/density by 10 x: one wide curve, two narrow ones over the target's two modes;
               val/accuracy by epoch: soft ends highest; probe/accuracy: the same for SEED
Try            in show_fits, write (2.5,) for (2.0, 3.0): which fit has the least KL(q || p)?
Answer         the wide one, .4856, though a fit that keeps to one mode exists, .4915
Source         Kullback & Leibler 1951; Bishop 2006, section 10.1.2; Hinton et al. 2015,
               arXiv:1503.02531; SEED: Fang et al. 2021, arXiv:2101.04731
"""

import argparse
import math
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal
from torch.distributions import kl_divergence as torch_kl
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "loss_functions" / "kl_divergence"
F64 = torch.float64
CLASSES = 10


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
    right = F.kl_div(
        q.log(), p, reduction="batchmean"
    )  # KL(p || q): logarithm first, target second
    swapped = F.kl_div(p.log(), q, reduction="batchmean")
    no_log = F.kl_div(q, p, reduction="batchmean")
    with warnings.catch_warnings(action="ignore"):  # torch warns of "mean"
        mean = F.kl_div(q.log(), p, reduction="mean")

    print("1. In everyday code: how badly does q = (1/4, 3/4) stand in for p = (1/2, 1/2)? In nats")
    print("   call                                            value   what it is")
    by_hand = {"KL(p || q)": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
               "KL(q || p)": 0.25 * math.log(0.5) + 0.75 * math.log(1.5)}  # fmt: skip
    by_hand["half of KL(p || q)"] = by_hand["KL(p || q)"] / 2
    calls = {
        'F.kl_div(q.log(), p, reduction="batchmean")': right,
        "kl_plain(p, q)": kl_plain(p, q)[0],
        'F.kl_div(q.log(), p, reduction="mean")': mean,
        'F.kl_div(p.log(), q, reduction="batchmean")': swapped,
        'F.kl_div(q, p, reduction="batchmean")': no_log,
    }
    for call, value in calls.items():
        calls[call] = value.item()
        names = [name for name, true in by_hand.items() if abs(value - true) < 1e-6]
        print(f"   {call:<43}   {value:8.4f}   {', '.join(names) or 'no divergence'}")
    print("   -> by hand: KL(p || q) = 1/2 log 2 + 1/2 log 2/3 = "
          f"{by_hand['KL(p || q)']:.4f}; KL(q || p) = {by_hand['KL(q || p)']:.4f}")  # fmt: skip

    z, v, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([1])
    soft = distillation_plain(z, v, labels, T=2.0, alpha=1.0).item()
    hard = distillation_plain(z, v, labels, T=2.0, alpha=0.0).item()
    both = distillation_plain(z, v, labels, T=2.0, alpha=0.5).item()
    print("   Distillation: student's logits z = (1, 0), teacher's v = (0, 2), label 1, T = 2")
    print(
        f"   soft loss {soft:.4f}   cross-entropy of the label {hard:.4f}   alpha 0.5: {both:.4f}"
    )
    print(f"   -> alpha is the teacher's share: at 0.5 the loss is the mean of both, {both:.4f}")
    return list(calls.values()), by_hand, (soft, hard, both)


# --- 2. the divergence from scratch ------------------------------------------------------------


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


def show_definition():
    print("2. Is it torch.distributions.kl_divergence? In nats")
    p, q = torch.randn(2, 1000, 5, dtype=F64).softmax(-1)
    P, Q = Normal(*torch.tensor([0.5, 0.8], dtype=F64)), Normal(*torch.tensor([-1, 1.7], dtype=F64))
    rows = {
        "1,000 pairs of 5 outcomes": (
            kl_divergence(p, q),
            torch_kl(Categorical(p), Categorical(q)),
        ),
        "the same, kl_plain": (kl_plain(p, q), torch_kl(Categorical(p), Categorical(q))),
        "two Gaussians": (gaussian_kl(P.mean, P.stddev, Q.mean, Q.stddev), torch_kl(P, Q)),
    }
    print("   of                           mean   torch's   ours minus torch's, largest")
    for name, (ours, theirs) in rows.items():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        off = (ours - theirs).abs().max()
        print(f"   {name:<25}  {ours.mean():7.4f}   {theirs.mean():7.4f}   {off:.0e}")
    forward, reverse = kl_divergence(p, q), kl_divergence(q, p)
    print(
        f"   -> the least of the 1,000 is {forward.min():.4f}, above 0; to exchange p and q changes"
    )
    print(f"      one by {(forward - reverse).abs().max():.2f}")
    return forward.min().item()


# --- 3. the order decides the fit --------------------------------------------------------------


def target_log_density(x, d=3.0):
    """log of 0.6 N(-d, 1) + 0.4 N(d, 1)."""
    left = math.log(0.6) + Normal(-d, 1.0).log_prob(x)
    return torch.logaddexp(left, math.log(0.4) + Normal(d, 1.0).log_prob(x))


def fit_gaussian(order, mu, sigma=1.0, d=3.0):
    """mu, sigma and KL of the best q = N(mu, sigma^2) near the start, by L-BFGS on a grid of x.

    order "forward" makes KL(p || q) small, "reverse" KL(q || p); p is the target.
    """
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


def show_fits(log_dir):
    print("3. Which Gaussian q = N(mu, sigma^2) fits p = 0.6 N(-d, 1) + 0.4 N(d, 1) best?")
    print("   modes    made small   start of mu        mu    sigma       KL")
    fits, x = {}, torch.linspace(-9, 9, 181)
    for d in (2.0, 3.0):
        curves = {"target": target_log_density(x, d)}
        for order, start in (("forward", 0.0), ("reverse", -d), ("reverse", 0.0)):
            mu, sigma, kl = fits[d, order, start] = fit_gaussian(order, start, d=d)
            name = "KL(p || q)" if order == "forward" else "KL(q || p)"
            print(f"   +-{d:<5g}  {name}   {start:11.1f}   {mu:7.4f}   {sigma:6.4f}   {kl:6.4f}")
            curves[f"{order}_from_{start:g}"] = Normal(mu, sigma).log_prob(x)
        for run, log_density in curves.items():
            draw(log_dir / f"fit_{d:g}" / run, {"fit/density": log_density.exp().tolist()})
        _, sigma, kl = min(fits[d, "reverse", -d], fits[d, "reverse", 0.0], key=lambda fit: fit[2])
        print(f"   -> modes at +-{d:g}: the least KL(q || p), {kl:.4f}, is at sigma {sigma:.2f};")
        wide = fits[d, "forward", 0.0][1]
        print(f"      the least KL(p || q) at {wide:.2f}; each mode has sigma 1")
    return fits


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


def show_temperature():
    print(
        "4. Why T^2? One example, 10 classes: norm of the gradient with respect to the student's z"
    )
    print("     T   F.kl_div alone   soft_loss, with T^2")
    z, v = 3 * torch.randn(2, 1, CLASSES, dtype=F64)
    z.requires_grad_()
    rows = {}
    for T in (1, 4, 16, 64):
        alone = F.kl_div((z / T).log_softmax(1), (v / T).softmax(1), reduction="batchmean")
        (raw,), (scaled,) = (torch.autograd.grad(loss, z) for loss in (alone, soft_loss(z, v, T)))
        torch.testing.assert_close(scaled, T**2 * raw, rtol=0, atol=1e-10)
        rows[T] = raw.norm().item(), scaled.norm().item()
        print(f"   {T:3}   {rows[T][0]:14.5f}   {rows[T][1]:19.4f}")
    falls, change = rows[1][0] / rows[64][0], rows[64][1] / rows[1][1]
    print(f"   -> from T = 1 to 64 the first gets {falls:,.0f} times smaller, the second")
    print(f"      {change:.1f} times what it was: without T^2 alpha would have to grow with T")
    return rows


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
    print(f"   Does a teacher help? T = {T:g}, alpha 0.9; accuracy on {len(test[0]):,} test points")
    print("   network    learns from                                   accuracy")
    x, labels = train
    teacher = network(256, CLASSES)
    fit(teacher, len(x), lambda i: F.cross_entropy(teacher(x[i]), labels[i]), 4)
    answers = teacher.requires_grad_(False)(few[0])
    ends = {"teacher": accuracy(teacher(test[0]), test[1])}
    runs = {  # targets, alpha
        "hard": (answers, 0.0),
        "smoothed": (smoothed_answers(answers, few[1], T), 0.9),  # the control
        "soft": (answers, 0.9),
    }
    for name, (targets, alpha) in runs.items():
        seen = train_student(seed, few, test, targets, alpha, T, epochs)
        draw(log_dir / "distillation" / name, {"val/accuracy": seen})
        ends[name] = seen[-1]
    words = {"teacher": f"{len(x):,} labels", "hard": f"{len(few[0])} labels",
             "smoothed": "these, softened equally over wrong classes",
             "soft": "these and the teacher's answers to them"}  # fmt: skip
    for name, end in ends.items():
        who = name if name == "teacher" else "student"
        print(f"   {who:<8}   {words[name]:<42}   {end:8.3f}")
    best, hard = max(runs, key=ends.get), ends["hard"]
    print(f"   -> the best student learns from {words[best]}: {ends[best] - hard:.3f}")
    print(f"      above labels alone; softness alone brings {ends['smoothed'] - hard:.3f} of that")
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


def train_seed(seed, x, teacher, watch, epochs):
    """What `watch` says by epoch of a student that copies the teacher's similarities; or without a
    teacher (None) learns by InfoNCE that two noisy views of a point belong together."""
    torch.manual_seed(seed)
    student = network(32, 64)

    def loss_of(i):
        if teacher is None:
            one, two = (student(x[i] + 0.8 * torch.randn_like(x[i])) for _ in range(2))
            return info_nce(one, two, temperature=0.2)
        return seed_loss(student(x[i]), teacher(x[i]), queue=teacher(x[:500]))

    return fit(student, len(x), loss_of, epochs, watch, batch=200, lr=6e-3)


def show_seed(seed, log_dir, x, few, test, epochs):
    print("5. SEED: does copying similarities teach? Teacher and student see no label: the student")
    print(
        "   learns which of 500 points the teacher finds similar to a point. Accuracy of a linear"
    )
    print(
        f"   classifier of the outputs with {len(few[0])} labels, on {len(test[0]):,} test points"
    )
    print("   (InfoNCE: without a teacher, two noisy views of a point belong together)")
    print("   outputs of                          accuracy")
    teacher, untrained = network(256, 64), network(256, 64).requires_grad_(False)

    def teach(i):
        one, two = (teacher(x[i] + 0.8 * torch.randn_like(x[i])) for _ in range(2))
        return info_nce(one, two, temperature=0.2)

    def probe(model):
        return linear_probe(model, few, test)

    fit(teacher, len(x), teach, 8, batch=200, lr=2e-3)
    teacher.requires_grad_(False)
    probes = {"none: the points themselves": probe(nn.Identity()), "the teacher": probe(teacher)}
    for name, one in (("no_teacher", None), ("untrained_teacher", untrained), ("teacher", teacher)):
        seen = train_seed(seed, x, one, probe, epochs)
        draw(log_dir / "seed" / name, {"probe/accuracy": seen})
        probes |= {"a student at the start": seen[0], f"a student, {name}": seen[-1]}
    for name, value in probes.items():
        shown = {"a student, no_teacher": "a student, by InfoNCE alone"}.get(name, name)
        print(f"   {shown.replace('_', ' '):<33}   {value:8.3f}")
    copied, blind = probes["a student, teacher"], probes["a student, untrained_teacher"]
    alone = probes["a student, no_teacher"]
    print(f"   -> copied from a trained teacher {copied:.3f}, from an untrained one {blind:.3f};")
    print(f"      without a teacher {alone:.3f}")
    return probes


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, points=6000, labels=300, epochs=(100, 10)):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "least": show_definition()}
    measured["fits"] = show_fits(log_dir)
    measured["temperature"] = show_temperature()
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
