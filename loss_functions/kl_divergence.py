"""Forward KL fits the mean and spread of two modes, reverse KL locks on one: the order decides.

    KL(p || q) = sum_k p_k log(p_k / q_k)  >= 0, in nats; 0 only for p = q; not symmetric
    Gaussians    log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1 / 2
    forward      min over q of KL(p || q): q may not miss what p does; a Gaussian takes p's moments
    reverse      min over q of KL(q || p): q may not go where p is not; a Gaussian sits on one mode

A student is taught by the teacher's softened answer: T^2 KL(softmax(v / T) || softmax(z / T)). Its
gradient with respect to z is T (softmax(z / T) - softmax(v / T)), which tends to the difference of
the logits less their means, over C; without T^2 it would die with 1 / T^2 beside the hard labels'.
SEED needs no labels at all: teacher and student each compare an image with a queue of the teacher's
earlier embeddings, and the student learns the teacher's distribution over them.

Checked here   definition, Gaussian form, Monte Carlo, torch.distributions; F.kl_div's order and
               reductions; fitted moments against theory; the gradient over T; a student with soft
               labels, or after SEED, against the same student without, on points it has not seen
TensorBoard    fit/densities in fit/forward, reverse_left, reverse_right (the target is grey);
               temperature/gradient by T in temperature/raw, times_T2; val/accuracy by epoch in
               distillation/hard, soft; seed/loss, seed/probe by epoch in seed, untrained_teacher
Try            reverse KL from the right mode: which mode, which KL? The right one, -log 0.4 = 0.92
Source         Kullback & Leibler 1951; Hinton et al. 2015, arXiv:1503.02531, section 2 and eq. 2-4;
               Fang et al. 2021 (SEED), arXiv:2101.04731, section 3.2; Bishop 2006, section 10.1.2
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal
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


def same_shapes(a, b):
    if a.shape != b.shape:
        raise ValueError(f"need equal shapes, not {tuple(a.shape)} and {tuple(b.shape)}")


# --- divergences and losses --------------------------------------------------------------------


def kl_divergence(p, q):
    """KL(p || q) over the last axis, in nats; 0 log 0 = 0, and infinite where q = 0 < p."""
    same_shapes(p, q)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def gaussian_kl(mean_p, std_p, mean_q, std_q):
    """KL of N(mean_p, std_p^2) from N(mean_q, std_q^2), elementwise."""
    spread = (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2)
    return torch.log(std_q / std_p) + spread - 0.5


def soft_loss(student_logits, teacher_logits, T):
    """T^2 KL(teacher || student) of the softened answers (B, C), mean over the batch."""
    same_shapes(student_logits, teacher_logits)
    log_q = F.log_softmax(student_logits / T, dim=-1)
    log_p = F.log_softmax(teacher_logits / T, dim=-1)
    return T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def distillation_loss(student_logits, teacher_logits, labels, T=4.0, alpha=0.9):
    """alpha times the soft loss, and 1 - alpha times cross-entropy with the labels (B,)."""
    soft = soft_loss(student_logits, teacher_logits, T)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)


def seed_loss(student, teacher, queue, student_t=0.2, teacher_t=0.05):
    """Cross-entropy of the similarity distributions of student and teacher, mean over the batch.

    student, teacher (B, D) embed the same images, queue (K, D) is the teacher's of earlier ones;
    the image's own teacher embedding is the (K + 1)-th candidate. All are taken at length 1.
    """
    same_shapes(student, teacher)
    student = F.normalize(student, dim=-1)
    teacher, queue = (F.normalize(z.detach(), dim=-1) for z in (teacher, queue))

    def similarities(z):  # (B, K + 1)
        return torch.cat([z @ queue.T, (z * teacher).sum(1, keepdim=True)], dim=1)

    p = F.softmax(similarities(teacher) / teacher_t, dim=1)
    return -(p * F.log_softmax(similarities(student) / student_t, dim=1)).sum(1).mean()


# --- fitting a Gaussian to two modes -----------------------------------------------------------


def target_log_density(x):
    """0.6 N(-3, 1) + 0.4 N(3, 1)"""
    parts = [math.log(w) + Normal(m, 1.0).log_prob(x) for w, m in ((0.6, -3.0), (0.4, 3.0))]
    return torch.logaddexp(*parts)


def fit_gaussian(direction, mean, std=1.0):
    """Mean, standard deviation and KL of the best N(m, s^2) near the start, by L-BFGS on a grid."""
    x = torch.linspace(-25, 25, 5001, dtype=F64)
    p, dx = target_log_density(x), x[1] - x[0]
    theta = torch.tensor([mean, math.log(std)], dtype=F64, requires_grad=True)  # m, log s
    tight = {"tolerance_grad": 1e-11, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe", **tight)

    def divergence():
        q = Normal(theta[0], theta[1].exp()).log_prob(x)
        a, b = (p, q) if direction == "forward" else (q, p)
        return (a.exp() * (a - b)).sum() * dx

    def closure():
        optimizer.zero_grad()
        loss = divergence()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta[0].item(), theta[1].exp().item(), divergence().item()


def picture(curves, height=240):
    """(3, H, W) picture of {colour: values (W,) from 0 up}, on white."""
    highest = max(values.max() for values in curves.values()) * 1.05
    canvas = torch.ones(3, height, len(next(iter(curves.values()))))
    for colour, values in curves.items():
        row = (height - 1 - values / highest * (height - 1)).round().long()
        previous = torch.cat([row[:1], row[:-1]])  # a line joins it to the pixel before
        for column in range(len(row)):
            top, bottom = sorted((row[column].item(), previous[column].item()))
            canvas[:, max(0, top - 1) : bottom + 2, column] = torch.tensor(colour)[:, None]
    return canvas


# --- teachers and students ---------------------------------------------------------------------


def world(seed, clusters=4, D=12):
    """A function n -> x (n, D), labels (n,): each class is `clusters` overlapping clouds."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.6 * torch.randn(CLASSES * clusters, D, generator=generator)

    def sample(n):
        which = torch.randint(len(centres), (n,), generator=generator)
        return centres[which] + torch.randn(n, D, generator=generator), which % CLASSES

    return sample


def network(width, out, D=12):
    """A body (B, D) -> (B, width) and a head (B, width) -> (B, out), one after the other."""
    body = nn.Sequential(nn.Linear(D, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(body, nn.Linear(width, out))


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def fit(model, x, loss_of, epochs, watch=None, batch=50, lr=2e-3):
    """Adam on loss_of(output, indices); after each epoch what watch(model) gives."""
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=lr), []
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(batch):
            loss = loss_of(model(x[i]), i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if watch:
            with torch.no_grad():
                seen.append(watch(model))
    return seen


def linear_probe(body, train, test, ridge=1.0):
    """Test accuracy of a linear classifier on frozen features, by ridge regression."""
    h, h_test = body(train[0]), body(test[0])
    mean, std = h.mean(0), h.std(0) + 1e-5
    h, h_test = (F.pad((f - mean) / std, (0, 1), value=1.0) for f in (h, h_test))
    targets = F.one_hot(train[1], CLASSES).to(h.dtype)
    W = torch.linalg.solve(h.T @ h + ridge * torch.eye(h.size(1)), h.T @ targets)
    return accuracy(h_test @ W, test[1])


def fit_seed(student, teacher, x, epochs, watch, batch=100, queue_size=1000):
    """SEED on points x (n, D), the queue first in, first out: losses, watch(student) by epoch."""
    queue = teacher(x[:queue_size])
    optimizer, losses, seen = torch.optim.Adam(student.parameters(), lr=2e-3), [], []
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(batch):
            z = teacher(x[i])
            loss = seed_loss(student(x[i]), z, queue)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            queue = torch.cat([queue[len(z) :], z])
        losses.append(loss.item())
        with torch.no_grad():
            seen.append(watch(student))
    return losses, seen


# --- the sections ------------------------------------------------------------------------------


def show_definition(samples):
    print("1. KL of two distributions over 5 outcomes, and of two Gaussians, in nats")
    p, q = torch.randn(2, 5, dtype=F64).softmax(-1)
    forward, reverse = kl_divergence(p, q), kl_divergence(q, p)
    library = torch.distributions.kl_divergence(*map(torch.distributions.Categorical, (p, q)))
    torch.testing.assert_close(forward, library, rtol=0, atol=1e-12)
    assert forward > 0 and reverse > 0 and kl_divergence(p, p) == 0
    print(f"   KL(p || q) {forward:.4f}   KL(q || p) {reverse:.4f}   KL(p || p) 0")

    P, Q = Normal(*torch.tensor([0.5, 0.8], dtype=F64)), Normal(*torch.tensor([-1, 1.7], dtype=F64))
    closed = gaussian_kl(P.mean, P.stddev, Q.mean, Q.stddev)
    library = torch.distributions.kl_divergence(P, Q)
    torch.testing.assert_close(closed, library, rtol=0, atol=1e-12)
    x = P.sample((samples,))
    ratios = P.log_prob(x) - Q.log_prob(x)
    error = ratios.std() / samples**0.5
    print(f"   closed form {closed:.4f}   torch.distributions {library:.4f}   "
          f"Monte Carlo {ratios.mean():.4f} +- {error:.4f}")  # fmt: skip
    return {"closed": closed.item(), "monte_carlo": ratios.mean().item(), "error": error.item()}


def show_kl_div(B=4, C=5):
    print(f"2. F.kl_div(log q, p) on (B, C) = ({B}, {C}): input is a log, target comes second")
    p, q = torch.randn(2, B, C, dtype=F64).softmax(-1)
    ours = kl_divergence(p, q).mean()
    values = {
        "batchmean": F.kl_div(q.log(), p, reduction="batchmean"),
        "mean": F.kl_div(q.log(), p.log(), reduction="sum", log_target=True) / (B * C),
        "swapped": F.kl_div(p.log(), q, reduction="batchmean"),
    }
    torch.testing.assert_close(values["batchmean"], ours, rtol=0, atol=1e-12)
    torch.testing.assert_close(values["swapped"], kl_divergence(q, p).mean(), rtol=0, atol=1e-12)
    shown = "   ".join(f"{name} {value:.4f}" for name, value in values.items())
    print(f"   KL(p || q) {ours:.4f}   {shown}")
    return {name: value.item() for name, value in values.items()} | {"ours": ours.item()}


def show_fits(log_dir):
    print("3. the best Gaussian for 0.6 N(-3, 1) + 0.4 N(3, 1): mean, standard deviation, KL")
    theory = {  # moments of the mixture; those of a mode, and minus the log of its weight
        "forward": (-0.6, math.sqrt(1 + 9 - 0.36), None),
        "reverse_left": (-3.0, 1.0, -math.log(0.6)),
        "reverse_right": (3.0, 1.0, -math.log(0.4)),
    }
    starts = {"forward": 0.0, "reverse_left": -2.0, "reverse_right": 2.0}
    fits, x = {}, torch.linspace(-9, 9, 480, dtype=F64)
    for name, (mean, std, kl) in theory.items():
        m, s, found = fits[name] = fit_gaussian(name.split("_")[0], starts[name])
        expected = f"{mean:7.4f} {std:.4f} " + (f"{kl:.4f}" if kl else "  -")
        print(f"   {name:<13}   {m:7.4f} {s:.4f} {found:.4f}   theory {expected}")
        colour = (0.1, 0.35, 0.8) if name == "forward" else (0.85, 0.2, 0.15)
        densities = {(0.6, 0.6, 0.6): target_log_density(x), colour: Normal(m, s).log_prob(x)}
        image = picture({rgb: log_p.exp() for rgb, log_p in densities.items()})
        with SummaryWriter(log_dir / "fit" / name, purge_step=0) as writer:
            writer.add_image("fit/densities", image, 0)
    return fits


def show_temperature(log_dir):
    print("4. gradient of KL(softmax(v / T) || softmax(z / T)) with respect to z, norm over T")
    z, v = 3 * torch.randn(2, CLASSES, dtype=F64)
    limit = ((z - z.mean()) - (v - v.mean())) / CLASSES
    rows = {}
    for T in (1, 2, 4, 8, 16, 64, 256):
        leaf = z.clone().requires_grad_()
        (grad,) = torch.autograd.grad(soft_loss(leaf[None], v[None], T) / T**2, leaf)
        by_hand = ((z / T).softmax(0) - (v / T).softmax(0)) / T
        torch.testing.assert_close(grad, by_hand, rtol=0, atol=1e-12)
        rows[T] = grad.norm().item(), (T**2 * grad).norm().item()
    for column, name in enumerate(("raw", "times_T2")):
        with SummaryWriter(log_dir / "temperature" / name, purge_step=0) as writer:
            for T, row in rows.items():
                writer.add_scalar("temperature/gradient", row[column], T)
    for T in (1, 4, 16, 256):
        print(f"   T {T:3}   raw {rows[T][0]:.5f}   times T^2 {rows[T][1]:.4f}")
    print(f"   limit of T^2 times it   {limit.norm():.4f}")
    return rows, limit.norm().item()


def show_distillation(seed, log_dir, teacher, few, test, epochs):
    (x, labels), (x_test, test_labels) = few, test
    print(f"5. a student with {len(x)} labels: accuracy on {len(x_test):,} others")
    answers, ends = teacher(x), {"teacher": accuracy(teacher(x_test), test_labels)}
    losses = {
        "hard": lambda z, i: F.cross_entropy(z, labels[i]),
        "soft": lambda z, i: distillation_loss(z, answers[i], labels[i]),
    }
    for name, loss_of in tqdm(losses.items(), leave=False, disable=None):
        torch.manual_seed(seed)  # the same start and the same batches
        student = network(32, CLASSES)
        seen = fit(student, x, loss_of, epochs, lambda m: accuracy(m(x_test), test_labels))
        draw(log_dir / "distillation" / name, {"val/accuracy": seen})
        ends[name] = seen[-1]
    print("   " + "   ".join(f"{name} {end:.3f}" for name, end in ends.items()))
    return ends


def show_seed(seed, log_dir, teacher, x, few, test, epochs):
    print(f"6. SEED on {len(x):,} points without labels: linear probe, {len(few[0])} labels")
    torch.manual_seed(seed)
    untrained = nn.Sequential(network(256, CLASSES)[0]).requires_grad_(False)
    probes = {"teacher": linear_probe(teacher, few, test)}
    for name, body in (("untrained_teacher", untrained), ("seed", teacher)):
        torch.manual_seed(seed)
        student = network(32, 256)  # a body, and a projection to the teacher's dimensions
        with torch.no_grad():
            probes["student as it started"] = linear_probe(student[0], few, test)
        losses, seen = fit_seed(student, body, x, epochs, lambda m: linear_probe(m[0], few, test))
        draw(log_dir / name, {"seed/loss": losses, "seed/probe": seen})
        probes[name] = seen[-1]
    for name, probe in probes.items():
        print(f"   {name.replace('_', ' '):<22} {probe:.3f}")
    return probes


def main(seed=0, log_dir=LOG_DIR, samples=100_000, labels=300, unlabelled=4000, epochs=(100, 15)):
    torch.manual_seed(seed)
    measured = {
        "definition": show_definition(samples),
        "kl_div": show_kl_div(),
        "fits": show_fits(log_dir),
        "temperature": show_temperature(log_dir),
    }
    sample = world(seed)
    (x, y), few, test = sample(4000), sample(labels), sample(4000)
    torch.manual_seed(seed)
    teacher = network(256, CLASSES)
    fit(teacher, x, lambda z, i: F.cross_entropy(z, y[i]), 6, batch=100)
    teacher.requires_grad_(False)
    distilled = show_distillation(seed, log_dir, teacher, few, test, epochs[0])
    body = nn.Sequential(teacher[0])
    mimic = show_seed(seed, log_dir, body, sample(unlabelled)[0], few, test, epochs[1])
    return measured | {"distillation": distilled, "seed": mimic}


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks this small are slower on two
    main()
