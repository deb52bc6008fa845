"""A contrastive loss needs no labels: trained on two changed copies of each image, a network learns
vectors from which a linear classifier names shapes better than from those of an untrained one.

Two views of one example, such as two changed copies of an image, are turned into vectors. The loss
pulls these two together and pushes those of other examples, the negatives, away. With the pull
alone all vectors could become one (collapse); section 3 shows negatives that do not prevent it.
Take InfoNCE (noise-contrastive estimation) for two kinds of views (image and caption), NT-Xent
(normalised, temperature-scaled cross-entropy) for two views by one network, and the triplet loss
where each example comes with a negative of its own.

    cosine     s_ij = q_i . k_j for vectors of length 1: 1 is alike, -1 is opposite
    InfoNCE    L = -mean over i of log( exp(s_ii / t) / sum_j exp(s_ij / t) ),   j = 1 ... N
    NT-Xent    the same for the 2N views of N images; j runs over the 2N - 1 other views
    triplet    mean of max(0, |a - p| - |a - n| + margin)     (Schroff et al.: distances squared)
    bound      log N - L, on average over batches, is at most I

    q_i, k_i  the vectors of two views of example i of N     t  the temperature, above 0
    a, p, n   a vector, that of its other view, that of a negative      log  natural
    I         mutual information: how much one view tells about the other, in nats (units of log)

Needs          nn_loss.py, nn_conv2d.py, nn_optim.py
Checked here   plain losses = those with checks = loops, triplet = torch's; four trainings
               without labels, one of them a collapse; the bound, where I is known
TensorBoard    views/loss and views/uniformity (how evenly vectors spread; 0: all equal) by step,
               a run for each training: uniformity goes to 0 in triplet_hardest only; bound/nats by
               10 times I: no run N_2, N_16, N_256 passes log N, however large I is
Try            in show_everyday, write t = 0.05 for t = 0.5: which losses change?
Answer         all of InfoNCE and NT-Xent but those of equal vectors, which stay log 3 and log 5
Source         van den Oord et al. 2018, arXiv:1807.03748; Chen et al. 2020, arXiv:2002.05709;
               Schroff et al. 2015, arXiv:1503.03832; Wang & Isola 2020, arXiv:2005.10242
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

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "loss_functions" / "contrastive_loss"
F64 = torch.float64
SHAPES = ("disc", "ring", "square", "frame", "diamond", "plus", "cross", "bar")
SIZE = 16  # pixels


# --- 1. in everyday code -----------------------------------------------------------------------


def info_nce_plain(q, k, t):
    """InfoNCE of q, k (N, D), in four lines to carry into a project."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    s = q @ k.T  # (N, N) cosines: the right partner of row i is column i
    right = torch.arange(len(q), device=q.device)
    return F.cross_entropy(s / t, right)


def nt_xent_plain(z1, z2, t):
    """NT-Xent of two views z1, z2 (N, D) of N images."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    s = z @ z.T / t
    s.fill_diagonal_(-math.inf)  # no view is its own candidate
    right = torch.arange(len(z), device=z.device).roll(len(z1))  # N ... 2N - 1, 0 ... N - 1
    return F.cross_entropy(s, right)


def show_everyday():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # 3 examples, vectors of 2 numbers
    k = q  # the second views: here each equals the first
    t = 0.5
    info = info_nce_plain(q, k, t)
    both = nt_xent_plain(q, k, t)
    triplet = nn.TripletMarginLoss(margin=1.0)(q, k, k.roll(-1, 0))  # negative: the next one's k

    print("1. In everyday code: which second views k are good? 3 examples, first views q = (1, 0),")
    print(
        f"   (0, 1), (-1, 0); temperature {t}; margin 1; triplet's negative: k of the next example"
    )
    print("   vectors                      InfoNCE   NT-Xent   triplet")
    rows = {"each k equals its q": [info, both, triplet]}
    ones = torch.ones(3, 2)
    others = {"each k is another's q": (q, q.roll(1, 0)), "all vectors equal": (ones, ones)}
    for name, (a, k) in others.items():
        triplet = nn.TripletMarginLoss(margin=1.0)(a, k, k.roll(-1, 0))
        rows[name] = [info_nce_plain(a, k, t), nt_xent_plain(a, k, t), triplet]
    for name, losses in rows.items():
        rows[name] = [loss.item() for loss in losses]
        print(f"   {name:<26}" + "".join(f"{loss:10.3f}" for loss in rows[name]))
    order = sorted(rows, key=lambda name: rows[name][0])
    print(f"   -> InfoNCE, best first: {'; '.join(order)}")
    guess = [math.log(3), math.log(5), 1.0]
    off = max(abs(a - b) for a, b in zip(rows["all vectors equal"], guess, strict=True))
    print(f"   -> equal vectors give log 3 = {guess[0]:.3f}, log 5 = {guess[1]:.3f} and the margin,"
          f" within {off:.0e}")  # fmt: skip
    return rows


# --- 2. the losses from scratch ----------------------------------------------------------------


def same_shapes(*tensors):
    if len({t.shape for t in tensors}) != 1 or tensors[0].dim() < 2:
        raise ValueError(f"need equal shapes (B, D), not {[tuple(t.shape) for t in tensors]}")


def unit(x):
    """x (..., D) at length 1; in float16 the 1e-12 that keeps from 0 / 0 would itself be 0."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def info_nce(q, k, temperature=0.1):
    """Mean InfoNCE of q, k (B, D): k_i is the positive of q_i, the other k_j are its negatives.

    Cross-entropy of s / temperature, s the cosines (B, B) of q_i and k_j, with the target j = i.
    same_shapes(q, k) refuses other shapes; unit(x) gives vectors of length 1. Exercise.
    """
    same_shapes(q, k)
    s = unit(q) @ unit(k).mT / temperature  # (B, B)
    return F.cross_entropy(s, torch.arange(len(q), device=q.device))


def nt_xent(z1, z2, temperature=0.5):
    """Mean NT-Xent of two views z1, z2 (N, D) of N images.

    Each of the 2N views asks for the other view of its image among the 2N - 1 others: cross-entropy
    of their cosines over the temperature, one's own set to -infinity. same_shapes refuses other
    shapes; unit(x) gives vectors of length 1. Exercise.
    """
    same_shapes(z1, z2)
    z = unit(torch.cat([z1, z2]))  # (2N, D)
    s = (z @ z.mT / temperature).fill_diagonal_(-math.inf)  # (2N, 2N)
    return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z1)))


def triplet_loss(anchor, positive, negative, margin=1.0, eps=1e-6):
    """Mean of max(0, |a - p| - |a - n| + margin) for three tensors (..., D).

    eps is added to each difference inside the norm, as torch does. same_shapes refuses other
    shapes. Exercise.
    """
    same_shapes(anchor, positive, negative)
    near, far = ((anchor - other + eps).norm(dim=-1) for other in (positive, negative))
    return (near - far + margin).clamp(min=0).mean()


def by_loop(views, candidates, right, t):
    """-mean over i of log( exp(s_ir / t) / sum_j exp(s_ij / t) ), as written; r is right[i].

    candidates[i] lists the vectors that view i is compared with.
    """
    total = 0.0
    for view, others, r in zip(views, candidates, right, strict=True):
        e = [torch.exp(F.cosine_similarity(view, other, dim=0) / t) for other in others]
        total -= torch.log(e[r] / sum(e))
    return total / len(right)


def info_nce_by_loop(q, k, t):
    return by_loop(q, [k] * len(q), range(len(q)), t)


def nt_xent_by_loop(z1, z2, t):
    views, N = [*z1, *z2], len(z1)
    candidates = [views[:i] + views[i + 1 :] for i in range(2 * N)]  # all but itself
    right = [i + N - 1 for i in range(N)] + list(range(N))  # the other view's place among them
    return by_loop(views, candidates, right, t)


def show_twins():
    print("2. Are the losses right? 7 random pairs of vectors of 5 numbers, three ways to compute")
    print("   loss      plain      with checks   by a loop; triplet: torch's")
    a, b, c = (torch.randn(7, 5, dtype=F64, requires_grad=True) for _ in range(3))
    rows = {
        "InfoNCE": [f(a, b, 0.2) for f in (info_nce_plain, info_nce, info_nce_by_loop)],
        "NT-Xent": [f(a, b, 0.3) for f in (nt_xent_plain, nt_xent, nt_xent_by_loop)],
        "triplet": [triplet_loss(a, b, c, 0.7), F.triplet_margin_loss(a, b, c, margin=0.7)],
    }
    off = 0.0
    for name, losses in rows.items():
        grads = [torch.autograd.grad(loss, a)[0] for loss in losses]
        for i in range(len(losses)):
            torch.testing.assert_close(losses[i], losses[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(grads[i], grads[0], rtol=0, atol=1e-12)
            off = max(off, (losses[i] - losses[0]).abs().item())
            off = max(off, (grads[i] - grads[0]).abs().max().item())
        shown = ["-"] * (3 - len(losses)) + [f"{loss.item():.6f}" for loss in losses]
        print(f"   {name:<7}   {shown[0]:<8}   {shown[1]:<11}   {shown[2]}")
    print(f"   -> one way minus another, losses and gradients, largest: {off:.1g}")
    return off


# --- 3. a training without labels --------------------------------------------------------------


def uniformity(z):
    """log of the mean of e^(-2 d^2) over pairs of z (N, D), put on the unit sphere.

    d is the distance of a pair, each pair once (F.pdist). The lower, the more even. Exercise.
    """
    return F.pdist(F.normalize(z, dim=1)).square().mul(-2).exp().mean().log()


def hardest_negatives(z1, z2):
    """For each row i of z1 (N, D) the nearest row j of z2 (N, D) with j other than i: (N, D).

    Distances by torch.cdist, their diagonal set to infinity, under no_grad. Exercise.
    """
    with torch.no_grad():
        nearest = torch.cdist(z1, z2).fill_diagonal_(math.inf).argmin(1)
    return z2[nearest]


def semi_hard_negatives(z1, z2):
    """The same, among the rows that are farther than z2[i]; if none is, the farthest: (N, D).

    "Semi-hard": Schroff et al. 2015, section 3.2.
    """
    with torch.no_grad():
        d = torch.cdist(z1, z2)
        nearest = d.where(d > d.diagonal()[:, None], math.inf).min(1)
        chosen = torch.where(nearest.values.isinf(), d.argmax(1), nearest.indices)
    return z2[chosen]


def draw_shapes(n):
    """Images (n, 3, 16, 16) of the eight shapes, in any place and colours, and labels (n,)."""
    labels, axis = torch.arange(n) % len(SHAPES), torch.arange(SIZE) - SIZE / 2 + 0.5
    centre = 5 * (torch.rand(n, 2, 1, 1) - 0.5)
    x, y = axis.view(1, 1, SIZE) - centre[:, 0], axis.view(1, SIZE, 1) - centre[:, 1]
    s = 4 + 1.5 * torch.rand(n, 1, 1)  # half the width of a shape
    a, b, r = x.abs().expand(n, SIZE, SIZE), y.abs().expand(n, SIZE, SIZE), torch.hypot(x, y)
    box, thin = torch.maximum(a, b), 0.35 * s
    diagonal = torch.minimum((x + y).abs(), (x - y).abs())
    masks = torch.stack([
        r < s, (r < s) & (r > 0.6 * s), box < 0.85 * s, (box < s) & (box > 0.6 * s),
        a + b < 1.2 * s, (torch.minimum(a, b) < thin) & (box < s),
        (diagonal < 1.2 * thin) & (box < s), (b < thin) & (a < s),
    ], dim=1)  # (n, 8, 16, 16)  # fmt: skip
    mask = masks[torch.arange(n), labels, None]
    ground = torch.rand(n, 3, 1, 1)
    colour = ground + 0.5 * (2 * torch.randint(2, (n, 3, 1, 1)) - 1)
    return torch.where(mask, colour, ground) + 0.05 * torch.randn(n, 3, SIZE, SIZE), labels


def augment(x):
    """Another view of images (B, 3, 16, 16): shifted, mirrored, recoloured, noisy."""
    B, i = len(x), torch.arange(SIZE)
    rows, columns = ((i + torch.randint(-2, 3, (B, 1))) % SIZE for _ in range(2))
    columns = torch.where(torch.rand(B, 1) < 0.5, columns, columns.flip(1))
    n, channels = torch.arange(B).view(B, 1, 1, 1), torch.rand(B, 3).argsort(1).view(B, 3, 1, 1)
    x = x[n, channels, rows.view(B, 1, SIZE, 1), columns.view(B, 1, 1, SIZE)]
    sign = 2 * torch.randint(2, (B, 1, 1, 1)) - 1
    gain, shift = torch.empty(B, 3, 1, 1).uniform_(0.3, 1.5), torch.rand(B, 3, 1, 1) - 0.5
    return 0.5 + sign * gain * (x - 0.5) + 0.8 * shift + 0.1 * torch.randn_like(x)


def encoder(width=16):
    """(B, 3, 16, 16) -> (B, 16 width)"""
    layers, sizes = [], (3, width, 2 * width, 4 * width)
    for c_in, c_out, stride in zip(sizes, sizes[1:], (2, 2, 1), strict=False):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


@torch.no_grad()
def linear_probe(features, train, test, ridge=10.0):
    """Test accuracy of a linear classifier, by ridge regression, on features of the images."""
    h, h_test = features(train[0]), features(test[0])
    mean, std = h.mean(0), h.std(0) + 1e-5
    h, h_test = (F.pad((f - mean) / std, (0, 1), value=1.0) for f in (h, h_test))
    targets = F.one_hot(train[1], len(SHAPES)).to(h.dtype)
    W = torch.linalg.solve(h.T @ h + ridge * torch.eye(h.size(1)), h.T @ targets)
    return ((h_test @ W).argmax(1) == test[1]).double().mean().item()


def loss_of_batch(z1, z2, name, t=0.3, margin=1.0):
    """The loss that a row of the table is named after, of two views z1, z2 (B, D)."""
    if name == "nt_xent":
        return nt_xent(z1, z2, t)
    z1, z2 = unit(z1), unit(z2)
    if name == "triplet_random":
        return triplet_loss(z1, z2, z2.roll(-1, 0), margin)  # the next image's
    choose = hardest_negatives if name == "triplet_hardest" else semi_hard_negatives
    return triplet_loss(z1, z2, choose(z1, z2), margin)


def train(images, name, steps, batch, seed, writer):
    """The encoder after `steps` batches; and its first loss, last loss and last uniformity."""
    torch.manual_seed(seed)  # the same start, images and views for each loss
    features = encoder()
    head = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32))
    model = nn.Sequential(features, head)  # the loss sees the head's 32 numbers; the 256 are kept
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, spread = [], 0.0
    for step in tqdm(range(steps), desc=name, leave=False, disable=None):
        x = images[torch.randperm(len(images))[:batch]]
        z1, z2 = model(torch.cat([augment(x), augment(x)])).chunk(2)  # (B, 32) each
        loss = loss_of_batch(z1, z2, name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            spread = uniformity(z1.detach()).item()
            writer.add_scalar("views/loss", losses[-1], step)
            writer.add_scalar("views/uniformity", spread, step)
    return features.eval(), {"first": losses[0], "last": losses[-1], "uniformity": spread}


def show_training(seed, log_dir, batch, images, steps):
    print(f"3. What is learned without labels from {images:,} images of 8 shapes?")
    print(f"   {steps} steps of {batch} images; temperature 0.3, margin 1")
    print("   accuracy     of a linear classifier of the encoder's 256 outputs, fitted to"
          f" {images // 5}")  # fmt: skip
    print(f"                labelled images, on {images // 2:,} others")
    print("   uniformity   of the 32 numbers that a head makes of the 256, which the loss sees;")
    print("                0: all are equal; -3.75: their directions are random")
    print("   (losses of NT-Xent and triplet have different scales)")
    print("   trained by                       accuracy   first loss   last loss   uniformity")
    torch.manual_seed(seed)
    unlabelled = draw_shapes(images)[0]
    labelled, test = draw_shapes(images // 5), draw_shapes(images // 2)
    torch.manual_seed(seed)
    start = encoder()
    with torch.no_grad():  # its batch norms see views, as those of the others do
        for i in range(min(steps, 50)):
            start(augment(unlabelled.roll(-i * batch, dims=0)[:batch]))
    rows = {
        "a guess": {"accuracy": 1 / len(SHAPES)},
        "nothing: the pixels": {"accuracy": linear_probe(nn.Flatten(), labelled, test)},
        "nothing: an untrained encoder": {"accuracy": linear_probe(start.eval(), labelled, test)},
    }
    for words, row in rows.items():
        print(f"   {words:<31}  {row['accuracy']:9.3f}")
    trainings = {
        "nt_xent": f"NT-Xent, {2 * batch - 2} negatives",
        "triplet_random": "triplet, a random negative",
        "triplet_hardest": "triplet, the nearest one",
        "triplet_semi_hard": "triplet, semi-hard: beyond p",
    }
    for name, words in trainings.items():
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            features, row = train(unlabelled, name, steps, batch, seed, writer)
        row["accuracy"] = linear_probe(features, labelled, test)
        rows[words] = row
        print(f"   {words:<31}  {row['accuracy']:9.3f}   {row['first']:10.3f}   {row['last']:9.3f}"
              f"   {row['uniformity']:10.3f}")  # fmt: skip
    best = max(rows, key=lambda words: rows[words]["accuracy"])
    untrained = [row["accuracy"] for row in rows.values() if "uniformity" not in row]
    print(f"   -> the best is {best}: {rows[best]['accuracy']:.3f}; without training at most "
          f"{max(untrained):.3f}")  # fmt: skip
    for words in trainings.values():
        if rows[words]["uniformity"] > -0.02:
            print(f"   -> collapsed: {words}, accuracy {rows[words]['accuracy']:.3f}")
    first = rows[trainings["triplet_hardest"]]["first"]
    lower = "lower, so collapse lowers the loss" if first > 1 else "not lower"
    print(f"   -> with the nearest negatives the loss begins at {first:.3f}; if all vectors are")
    print(f"      equal it is the margin, 1: {lower}")
    return rows


# --- 4. what a batch can show ------------------------------------------------------------------


def gaussian_pairs(rho, n, d=4):
    """x, y (n, d) with correlation rho in each dimension: I = -d / 2 log(1 - rho^2) nats."""
    x = torch.randn(n, d, dtype=F64)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(n, d, dtype=F64)


def log_ratio(x, y, rho):
    """The best critic, log p(y_j | x_i) / p(y_j), for all pairs: (n, n)."""
    mean, variance = rho * x[:, None], 1 - rho**2
    conditional = -(y - mean).square() / (2 * variance) - math.log(variance) / 2
    return (conditional + y.square() / 2).sum(-1)


def lower_bound(rho, N, batches):
    """log N - L with the best critic: its mean over batches of N pairs, and its standard error."""
    losses = torch.zeros(batches, dtype=F64)
    for i in range(batches):
        x, y = gaussian_pairs(rho, N)
        losses[i] = F.cross_entropy(log_ratio(x, y, rho), torch.arange(N))
    return math.log(N) - losses.mean().item(), (losses.std() / math.sqrt(batches)).item()


def show_bound(log_dir, pairs):
    print(
        "4. How much information can a batch of N pairs show? I, the mutual information, is known;"
    )
    print("   log N - L in nats, L the InfoNCE with the best possible score in place of the cosine")
    rhos, bounds, most = (0.5, 0.9, 0.99, 0.999), {}, 0.0
    truth = {rho: -2 * math.log(1 - rho**2) for rho in rhos}  # d = 4
    head = "   ".join(f"I = {truth[rho]:6.3f}" for rho in rhos)
    print(f"     N   {head}   log N")
    for N in (2, 16, 256):
        bounds[N] = {}
        for rho in rhos:
            bounds[N][rho], error = lower_bound(rho, N, max(2, pairs // N))
            most = max(most, error)
        assert max(bounds[N].values()) <= math.log(N)  # as L >= 0
        shown = "   ".join(f"{bounds[N][rho]:10.3f}" for rho in rhos)
        print(f"   {N:3}   {shown}   {math.log(N):5.3f}")
    for name, values in [*((f"N_{N}", bounds[N]) for N in bounds), ("truth", truth)]:
        with SummaryWriter(log_dir / "bound" / name, purge_step=0) as writer:
            for rho in rhos:
                writer.add_scalar("bound/nats", values[rho], round(10 * truth[rho]))
    shown = ", ".join(f"N = {N} {bounds[N][0.999]:.2f}" for N in bounds)
    print(f"   -> a batch shows at most log N: of {truth[0.999]:.2f} nats {shown};")
    print("      more needs a larger batch")
    print(f"      Each number is a mean over batches, with a standard error of at most {most:.3f}")
    return bounds, truth


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, pairs=20_000, batch=256, images=4096, steps=200):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "twins": show_twins(),
        "training": show_training(seed, log_dir, batch, images, steps),
    }
    measured["bound"] = show_bound(log_dir, pairs)
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
    torch.set_num_threads(1)  # small networks: no slower than on two
    guard(main)
