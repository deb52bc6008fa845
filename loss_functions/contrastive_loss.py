"""A contrastive loss can show no more than log N nats of mutual information: I >= log N - L.

    InfoNCE   L = -mean_i log( e^(s_ii / t) / sum_j e^(s_ij / t) )    s_ij = q_i . k_j, of length 1
    NT-Xent   the same over 2N views of N images: an image's other view among 2N - 1 candidates
    triplet   mean of max(0, |a - p| - |a - n| + margin)              distances, not their squares

The other examples of the batch are the negatives. L = log N is chance, and no L is below 0. The
temperature t says which negatives count: the gradient with respect to s_ij is a softmax over them,
and a small t leaves it to the most similar few. SimCLR asks that two augmented views of an image
lie together (alignment) and that images spread over the sphere (uniformity). That this tells shapes
apart nobody asked for, and a linear probe measures it.

Checked here   each loss against a double loop or torch's; the bound on Gaussians whose I is known;
               the gradient of the hardest 5 % by t; the probe of SimCLR against the encoder as it
               started, by the number of negatives, with the same images in every step
TensorBoard    bound/nats by true I (in tenths) in bound/N_16 …, truth; gradient/hardest_share by t
               (in hundredths); simclr/loss, alignment, uniformity by step in negatives_2 …;
               PROJECTOR: the test images by what SimCLR learned, coloured by shape
Try            one negative in place of all (N = 2): how much information can L show? log 2 = 0.69
Source         van den Oord et al. 2018, arXiv:1807.03748, eq. 4, section 2.3; Chen et al. 2020
               (SimCLR), arXiv:2002.05709, eq. 1; Wang & Isola 2020, arXiv:2005.10242; Schroff et
               al. 2015 (triplet, there of squared distances), arXiv:1503.03832
"""

import argparse
import math
import os
import shutil
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


# --- the losses --------------------------------------------------------------------------------


def same_shapes(*tensors):
    if len({t.shape for t in tensors}) != 1 or tensors[0].dim() < 2:
        raise ValueError(f"need equal shapes (B, D), not {[tuple(t.shape) for t in tensors]}")


def info_nce(q, k, temperature=0.1):
    """Mean InfoNCE of q, k (B, D): k_i is the positive of q_i, the other k_j are its negatives.

    Cross-entropy of s / temperature, s the cosines (B, B) of q_i and k_j, with the target j = i.
    same_shapes(q, k) refuses other shapes; normalise with eps = 1e-4, as 1e-12 is 0 in float16.
    Exercise.
    """
    same_shapes(q, k)
    q, k = (F.normalize(x, dim=-1, eps=1e-4) for x in (q, k))  # 1e-12 is 0 in float16
    s = q @ k.mT / temperature  # (B, B)
    return F.cross_entropy(s, torch.arange(len(q), device=q.device))


def nt_xent(z1, z2, temperature=0.5):
    """Mean NT-Xent of two views z1, z2 (..., N, D) of N images; further axes are batches apart.

    Each of the 2N views asks for the other view of its image among the 2N - 1 others: cross-entropy
    of their cosines over the temperature, one's own set to -infinity. same_shapes refuses other
    shapes; normalise with eps = 1e-4. Exercise.
    """
    same_shapes(z1, z2)
    z = F.normalize(torch.cat([z1, z2], dim=-2), dim=-1, eps=1e-4)  # (..., 2N, D)
    n = z.size(-2)
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    s = (z @ z.mT / temperature).masked_fill(itself, -math.inf)  # (..., 2N, 2N)
    other_view = torch.arange(n, device=z.device).roll(n // 2)
    return F.cross_entropy(s.flatten(0, -2), other_view.repeat(s.numel() // n**2))


def triplet_loss(anchor, positive, negative, margin=1.0, eps=1e-6):
    """Mean of max(0, |a - p| - |a - n| + margin) for three tensors (..., D).

    eps is added to each difference inside the norm, as torch does. same_shapes refuses other
    shapes. Exercise.
    """
    same_shapes(anchor, positive, negative)
    near, far = ((anchor - other + eps).norm(dim=-1) for other in (positive, negative))
    return (near - far + margin).clamp(min=0).mean()


def nt_xent_by_loop(z1, z2, temperature):
    """NT-Xent as it is written: a sum over candidates for every view."""
    views = [*F.normalize(z1, dim=1), *F.normalize(z2, dim=1)]
    N, total = len(z1), 0.0
    for i, view in enumerate(views):
        e = [torch.exp(view @ other / temperature) for other in views]
        total -= torch.log(e[(i + N) % (2 * N)] / sum(e[j] for j in range(2 * N) if j != i))
    return total / (2 * N)


def info_nce_by_loop(q, k, temperature):
    q, k, total = F.normalize(q, dim=1), F.normalize(k, dim=1), 0.0
    for i in range(len(q)):
        e = [torch.exp(q[i] @ k[j] / temperature) for j in range(len(k))]
        total -= torch.log(e[i] / sum(e))
    return total / len(q)


def alignment(z1, z2):
    """Mean squared distance of the two views (N, D), both put on the unit sphere: 0 is best.

    Exercise.
    """
    return (F.normalize(z1, dim=1) - F.normalize(z2, dim=1)).square().sum(1).mean()


def uniformity(z):
    """log of the mean of e^(-2 d^2) over pairs of z (N, D), put on the unit sphere.

    d is the distance of a pair, each pair once (F.pdist). The lower, the more even. Exercise.
    """
    return F.pdist(F.normalize(z, dim=1)).square().mul(-2).exp().mean().log()


# --- information and temperature ---------------------------------------------------------------


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
    """log N - L, mean over batches of N pairs, with the best critic."""
    losses = []
    for _ in range(batches):
        x, y = gaussian_pairs(rho, N)
        losses.append(F.cross_entropy(log_ratio(x, y, rho), torch.arange(N)).item())
    return math.log(N) - sum(losses) / batches


def hardest_share(q, k, temperature, hardest=0.05):
    """Share of the negatives' gradient, with respect to s_ij, on the most similar 5 % of them.

    s (B, B) holds the cosines of q_i and k_j, the loss is the cross-entropy of s / temperature with
    the target j = i. In each row, the round(hardest (B - 1)) negatives of largest s count as hard.
    A float: sum of their gradients over that of all negatives. Exercise.
    """
    B = len(q)
    s = (F.normalize(q, dim=1) @ F.normalize(k, dim=1).mT).requires_grad_()
    loss = F.cross_entropy(s / temperature, torch.arange(B))
    (grad,) = torch.autograd.grad(loss, s)
    negatives = ~torch.eye(B, dtype=torch.bool)
    grad = grad[negatives].view(B, B - 1)
    order = s.detach()[negatives].view(B, B - 1).argsort(dim=1, descending=True)
    top = grad.gather(1, order[:, : round(hardest * (B - 1))])
    return (top.sum() / grad.sum()).item()


# --- SimCLR on drawn shapes --------------------------------------------------------------------


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


def train_simclr(images, group, steps, batch, seed, writer, temperature=0.3):
    """The encoder after NT-Xent within groups of `group` images; every step sees `batch` images."""
    torch.manual_seed(seed)
    features = encoder()
    head = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32))  # thrown away afterwards
    model = nn.Sequential(features, head)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in tqdm(range(steps), desc=f"groups of {group}", leave=False, disable=None):
        x = images[torch.randperm(len(images))[:batch]]
        z1, z2 = model(torch.cat([augment(x), augment(x)])).chunk(2)  # (B, 32) each
        loss = nt_xent(*(z.unflatten(0, (-1, group)) for z in (z1, z2)), temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            z1, z2 = z1.detach(), z2.detach()
            writer.add_scalar("simclr/loss", loss.item(), step)
            writer.add_scalar("simclr/alignment", alignment(z1, z2), step)
            writer.add_scalar("simclr/uniformity", uniformity(z1), step)
    return features.eval()


# --- the sections ------------------------------------------------------------------------------


def show_twins():
    print(
        "1. the losses against a double loop, or torch's: largest difference of loss, of gradient"
    )
    a, b, c = (torch.randn(7, 5, dtype=F64, requires_grad=True) for _ in range(3))
    pairs = {
        "InfoNCE": (info_nce(a, b, 0.2), info_nce_by_loop(a, b, 0.2)),
        "NT-Xent": (nt_xent(a, b, 0.3), nt_xent_by_loop(a, b, 0.3)),
        "triplet": (triplet_loss(a, b, c, 0.7), F.triplet_margin_loss(a, b, c, margin=0.7)),
    }
    for name, losses in pairs.items():
        grads = [torch.autograd.grad(loss, (a, b))[0] for loss in losses]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        off, off_grad = ((x - y).abs().max().item() for x, y in (losses, grads))
        print(f"   {name}   {off:.0e}   {off_grad:.0e}")


def show_bound(log_dir, pairs):
    print("2. log N - L with the best critic, and the mutual information I, in nats")
    rhos, bounds = (0.5, 0.9, 0.99, 0.999), {}
    truth = {rho: -2 * math.log(1 - rho**2) for rho in rhos}  # d = 4
    for N in (2, 16, 256):
        bounds[N] = {rho: lower_bound(rho, N, max(1, pairs // N)) for rho in rhos}
        shown = "   ".join(f"{bounds[N][rho]:6.3f}" for rho in rhos)
        print(f"   N {N:3}   {shown}   at most log N = {math.log(N):.3f}")
    print(f"   I       {'   '.join(f'{truth[rho]:6.3f}' for rho in rhos)}")
    for name, values in [*((f"N_{N}", bounds[N]) for N in bounds), ("truth", truth)]:
        with SummaryWriter(log_dir / "bound" / name, purge_step=0) as writer:
            for rho in rhos:
                writer.add_scalar("bound/nats", values[rho], round(10 * truth[rho]))
    return bounds, truth


def show_temperature(log_dir, B=256, D=32):
    print(f"3. share of the gradient on the hardest 5 % of {B - 1} negatives, random unit vectors")
    q, k, shares = torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64), {}
    with SummaryWriter(log_dir / "temperature", purge_step=0) as writer:
        for percent in (2, 5, 10, 20, 50, 100):
            shares[percent / 100] = hardest_share(q, k, percent / 100)
            writer.add_scalar("gradient/hardest_share", shares[percent / 100], percent)
    print("   " + "   ".join(f"t {t:g} {share:.3f}" for t, share in shares.items()))
    return shares


def write_embedding(writer, features, test, count=500):
    images, names = test[0][:count], [SHAPES[label] for label in test[1][:count]]
    shutil.rmtree(Path(writer.log_dir) / "00000", ignore_errors=True)  # the last run's
    with torch.no_grad():
        writer.add_embedding(features(images), names, images.clamp(0, 1), 0, "test_images")


def show_simclr(seed, log_dir, groups, images, steps):
    print(f"4. SimCLR, {images:,} images, {steps} steps of {max(groups)}: linear probe, 8 shapes")
    torch.manual_seed(seed)
    unlabelled, train, test = draw_shapes(images)[0], draw_shapes(800), draw_shapes(2000)
    torch.manual_seed(seed)
    scores = {
        "pixels": linear_probe(nn.Flatten(), train, test),
        "random": linear_probe(encoder().eval(), train, test),
    }
    print(f"   pixels {scores['pixels']:.3f}   encoder as it started {scores['random']:.3f}")
    for group in groups:
        with SummaryWriter(log_dir / f"negatives_{2 * group - 2}", purge_step=0) as writer:
            features = train_simclr(unlabelled, group, steps, max(groups), seed, writer)
            scores[group] = linear_probe(features, train, test)
            if group == max(groups):
                write_embedding(writer, features, test)
        print(f"   {2 * group - 2:3} negatives   {scores[group]:.3f}")
    return scores


def main(seed=0, log_dir=LOG_DIR, pairs=20_000, groups=(2, 16, 256), images=4096, steps=300):
    torch.manual_seed(seed)
    show_twins()
    return {
        "bound": show_bound(log_dir, pairs),
        "temperature": show_temperature(log_dir),
        "simclr": show_simclr(seed, log_dir, groups, images, steps),
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
    torch.set_num_threads(1)  # small networks: no slower than on two
    guard(main)
