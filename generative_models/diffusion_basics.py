"""Noise goes in at once, comes out step by step: given x_0, each step back is Gaussian, by Bayes.

    forward    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) eps       A_t = product of 1 - beta up to t
    backward   q(x_s | x_t, x_0) for any s < t, with a = A_t / A_s:
               mean      (sqrt(A_s) (1 - a) x_0 + sqrt(a) (1 - A_s) x_t) / (1 - A_t)
               variance  (1 - a) (1 - A_s) / (1 - A_t), "tilde"; or 1 - a, "beta"
    DDIM       x_s = sqrt(A_s) x_0 + sqrt(1 - A_s) eps       no noise, so that it runs both ways
    L_simple   mean of (eps - eps_theta(x_t, t))^2, t uniform on 1 … T
    guidance   eps(x_t, t) + w (eps(x_t, t, class) - eps(x_t, t))

A network guesses eps, or x_0, or v = sqrt(A) eps - sqrt(1 - A) x_0: each gives the others, and in
the steps back the guess takes the place of x_0. Fewer steps need a of the pairs (t, s) taken: with
the coefficients of the T-step chain left as they were, too much noise stays in.

Checked here   q(x_t | x_0) against the chain; the step back against Bayes; the three predictions;
               linear against cosine by signal-to-noise; samplers with the exact eps of Gaussian
               data, 1,000 to 20 steps; DDIM there and back; eight Gaussians learned: loss against
               the best possible, samples against real ones and their floor; digits by class
               and w: how many show the class asked for, how much they vary within it
TensorBoard    schedule/log10_snr by t in linear, cosine; sampling/std by steps in sampler_…;
               train/loss in ring, digits; ring/from_noise, digits/from_noise: samples on their
               way; digits/by_class in guidance_…, a row for each digit
Try            data of standard deviation 1 in section 4: which sampler looks best at 20 steps?
               The wrong one, at 1: each of its steps keeps variance 1, so that such data hide it
Source         Ho et al. 2020 (DDPM), arXiv:2006.11239, eqs. 4, 7, 14, section 3.2; Song et al. 2021
               (DDIM), arXiv:2010.02502, eq. 12; Nichol & Dhariwal 2021 (cosine, respacing),
               arXiv:2102.09672, eq. 17, section 4; Salimans & Ho 2022 (v), arXiv:2202.00512,
               section 4; Ho & Salimans 2022 (guidance, there w - 1), arXiv:2207.12598, eq. 6
"""

import argparse
import math
import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "generative_models" / "diffusion_basics"
DATA = Path(__file__).resolve().parents[1] / "data"
PLACES = ("MNIST/raw", "MNIST", "mnist/raw", "mnist", "raw", "")  # in data/, torchvision's first
MEND = "python generative_models/vae_basics.py --download"
F64 = torch.float64
RADIUS, SIGMA = 2.0, 0.1  # of the ring, of each Gaussian on it
NO_CLASS = 10


# --- digits, as in vae_basics.py ---------------------------------------------------------------


def draw_digits(n):
    """Images (n, 28, 28) uint8 and labels (n,): a font's digits, turned, slanted, sized, inked."""
    labels, font = torch.arange(n) % 10, ImageFont.load_default(42)
    glyphs = [Image.new("L", (48, 48)) for _ in range(10)]
    for digit, glyph in enumerate(glyphs):
        ImageDraw.Draw(glyph).text((24, 24), str(digit), 255, font, anchor="mm")
    glyphs = torch.stack([torch.from_numpy(np.array(glyph)) for glyph in glyphs]) / 255
    turn, slant, place = 0.15 * torch.randn(n), 0.2 * torch.randn(n), 0.06 * torch.randn(n, 2, 1)
    size, ink = torch.empty(n, 2, 1).uniform_(1.0, 1.4), torch.empty(n, 1, 1, 1).uniform_(0.2, 0.6)
    turned = torch.stack([turn.cos(), slant - turn.sin(), turn.sin(), turn.cos()], 1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([size * turned, place], 2), (n, 1, 28, 28), align_corners=False)
    soft = F.avg_pool2d(glyphs[:, None], 5, 1, 2)[labels]
    x = F.grid_sample(soft, grid, align_corners=False)  # cut at the height `ink`: low is bold
    return (255 * ((x - ink) / 0.25 + 0.5).clamp(0, 1)).byte().squeeze(1), labels


def open_digits(root=DATA, train=True, count=8000, download=False):
    """Images (N, 28, 28) uint8, labels (N,), a line on them: MNIST if it is there, else drawn ones.

    Raises OSError if MNIST is there but damaged, or if it cannot be fetched.
    """
    folders = [Path(root, place) for place in PLACES]
    there = [folder for folder in folders if any(folder.glob("t*-idx?-ubyte*"))]
    if not there and not download:
        found = {p.name for f in folders for kind in ("*ubyte*", "*mnist*.*") for p in f.glob(kind)}
        other = f" (but {', '.join(sorted(found))})" if found else ""
        missing = f"as {folders[0] / 'train-images-idx3-ubyte'} is not there{other}"
        line = f"data: {count:,} drawn digits, {missing}; for the real MNIST: {MEND}"
        return *draw_digits(count), line
    raw = [*there, folders[0]][0]

    class Found(MNIST):
        raw_folder = str(raw)

    try:
        for name, md5 in () if download else MNIST.resources:
            if not (raw / name).with_suffix("").is_file():
                if not check_integrity(raw / name, md5):
                    raise FileNotFoundError(f"{name} is missing or damaged")
                extract_archive(raw / name)
        mnist = Found(root, train, download=download)
        images, labels = mnist.data, mnist.targets
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            raise ValueError(f"images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    except Exception as error:  # torchvision has a dozen ways to say no
        why = " ".join(str(error).split()) or type(error).__name__
        mend = f"delete the *-ubyte* files there, then {MEND}"
        raise OSError(f"{raw} holds no whole MNIST ({why}): {mend}") from error
    return images, labels, f"data: MNIST, {len(images):,} images"


# --- the chain ---------------------------------------------------------------------------------


def linear_schedule(T=1000):
    """A (T + 1,) in float64, A_0 = 1: beta from 1e-4 to 0.02, evenly, times 1000 / T.

    A_t is the product of 1 - beta up to t. ValueError "with T steps beta would reach …" for T <=
    20. Exercise.
    """
    if T <= 20:
        raise ValueError(f"with {T} steps beta would reach {20 / T:g}: take more than 20")
    beta = torch.linspace(1e-4, 0.02, T, dtype=F64) * 1000 / T
    return F.pad((1 - beta).cumprod(0), (1, 0), value=1.0)


def cosine_schedule(T=1000, s=0.008):
    """A (T + 1,) in float64: f(t) / f(0), f = cos^2 of the turn (t / T + s) / (1 + s) pi / 2.

    No beta = 1 - f(t) / f(t - 1) is above 0.999. Exercise.
    """
    turn = (torch.arange(T + 1, dtype=F64) / T + s) / (1 + s) * math.pi / 2
    f = turn.cos().square()
    return F.pad((f[1:] / f[:-1]).clamp(min=0.001).cumprod(0), (1, 0), value=1.0)


def add_noise(x_0, eps, A):
    """x_t = sqrt(A) x_0 + sqrt(1 - A) eps; A is a number, or has x_0's axes. Exercise."""
    return A**0.5 * x_0 + (1 - A) ** 0.5 * eps


def convert(kind, out, x_t, A):
    """(x_0, eps, v) from x_t and one of them, `out`: kind is "x_0", "eps" or "v".

    x_t = sqrt(A) x_0 + sqrt(1 - A) eps; v = sqrt(A) eps - sqrt(1 - A) x_0. ValueError "kind must be
    x_0, eps or v, not 'kind'". Exercise.
    """
    if kind == "x_0":
        x_0, eps = out, (x_t - A**0.5 * out) / (1 - A) ** 0.5
    elif kind == "eps":
        x_0, eps = (x_t - (1 - A) ** 0.5 * out) / A**0.5, out
    elif kind == "v":
        x_0, eps = A**0.5 * x_t - (1 - A) ** 0.5 * out, (1 - A) ** 0.5 * x_t + A**0.5 * out
    else:
        raise ValueError(f"kind must be x_0, eps or v, not {kind!r}")
    return x_0, eps, A**0.5 * eps - (1 - A) ** 0.5 * x_0


def posterior(x_0, x_t, A_t, A_s):
    """Mean and variance of q(x_s | x_t, x_0), s < t, by Bayes.

    With a = A_t / A_s: mean (sqrt(A_s) (1 - a) x_0 + sqrt(a) (1 - A_s) x_t) / (1 - A_t), variance
    (1 - a) (1 - A_s) / (1 - A_t). Exercise.
    """
    a = A_t / A_s
    mean = (A_s**0.5 * (1 - a) * x_0 + a**0.5 * (1 - A_s) * x_t) / (1 - A_t)
    return mean, (1 - a) * (1 - A_s) / (1 - A_t)


def step_back(x_0, eps, x_t, A_t, A_s, sampler, noise):
    """x_s by sampler "tilde", "beta" or "ddim"; A_s > A_t, or for "ddim" any two.

    "ddim" is add_noise(x_0, eps, A_s), without noise. The others draw from the posterior: its mean,
    plus `noise` times the root of its variance, or of 1 - A_t / A_s for "beta"; where A_s = 1, the
    last step adds none. Exercise.
    """
    if sampler == "ddim":
        return add_noise(x_0, eps, A_s)
    mean, variance = posterior(x_0, x_t, A_t, A_s)
    if sampler == "beta":
        variance = 1 - A_t / A_s
    return mean + variance**0.5 * noise * (A_s < 1)  # the last step adds none


def spaced(T, steps):
    """T … 0 in `steps` steps, as even as integers are: a list of steps + 1 integers.

    ValueError "1 to T steps, not …". Exercise.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"1 to {T} steps, not {steps}")
    return torch.linspace(T, 0, steps + 1).round().int().tolist()


@torch.no_grad()
def denoise(predict, x, times, A, sampler, limit=None, seen=()):
    """Walk x_t along `times`, eps = predict(x, t): the last x, and {t: (x, x_0)} for t in seen.

    sampler "unchanged" is the mistake: it jumps to s with the coefficients of the step to t - 1.
    limit clips the predicted x_0, as for pixels.
    """
    A, kept = A.tolist(), {}
    for t, s in pairwise(times):
        x_0, eps, _ = convert("eps", predict(x, t), x, A[t])
        if limit is not None:
            x_0, eps, _ = convert("x_0", x_0.clamp(-limit, limit), x, A[t])
        if t in seen:
            kept[t] = x, x_0
        known, to = ("beta", t - 1) if sampler == "unchanged" else (sampler, s)
        x = step_back(x_0, eps, x, A[t], A[to], known, torch.randn_like(x))
    return x, kept


# --- eight Gaussians, whose best eps is known --------------------------------------------------


def centres(device=None):
    angle = torch.arange(8, device=device) * math.pi / 4
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=-1)  # (8, 2)


def ring(n, device=None):
    """(n, 2)"""
    mode = torch.randint(8, (n,), device=device)
    return centres(device)[mode] + SIGMA * torch.randn(n, 2, device=device)


def good_share(x):
    """Of points (n, 2), those within 3 sigma of a Gaussian's centre: 1 - e^-4.5 = 0.989 of real."""
    return (torch.cdist(x, centres(x.device)).amin(1) < 3 * SIGMA).float().mean().item()


def best_eps(x, A):
    """E[eps | x_t] on the ring, x (B, 2): -sqrt(1 - A) times the score; A a number or (B, 1)."""
    variance = A * SIGMA**2 + 1 - A
    apart = x[:, None] - (A**0.5 * torch.ones_like(x))[:, None] * centres(x.device)  # (B, 8, 2)
    weight = (-apart.square().sum(-1) / (2 * variance)).softmax(1)  # (B, 8)
    return (1 - A) ** 0.5 / variance * (weight[..., None] * apart).sum(1)


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| >= 0 for (n, D), (m, D): an MMD^2, its kernel -|x - y|.

    A float. A point is no pair with itself, so that two samples of one distribution come out around
    0. Exercise.
    """
    within = (torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return (2 * torch.cdist(x, y).mean() - sum(within)).item()


# --- networks ----------------------------------------------------------------------------------


def embed_time(t, size=32):
    """(B, size) from t (B,): the sines, then the cosines of t 10000^(-2 k / size), k < size / 2.

    Exercise.
    """
    angle = t[:, None] * 1e4 ** (-torch.arange(size // 2, device=t.device) / (size // 2))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class PointNet(nn.Module):
    """eps for points (B, 2) and t (B,)."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, t):
        return self.layers(torch.cat([x, embed_time(t)], dim=1))


class Block(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W); the embedding (B, D) scales and shifts the channels."""

    def __init__(self, c_in, c_out, D):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.film = nn.Linear(D, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, e):
        scale, shift = self.film(e)[..., None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class UNet(nn.Module):
    """eps for images (B, 1, 16, 16), t (B,) and labels (B,), NO_CLASS for none: 16, 8, 4 pixels."""

    def __init__(self, c=16, D=64):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(NO_CLASS + 1, D)
        self.first = nn.Conv2d(1, c, 3, padding=1)
        self.down1, self.half1 = Block(c, c, D), nn.Conv2d(c, 2 * c, 3, 2, 1)
        self.down2, self.half2 = Block(2 * c, 2 * c, D), nn.Conv2d(2 * c, 4 * c, 3, 2, 1)
        self.middle1, self.middle2 = Block(4 * c, 4 * c, D), Block(4 * c, 4 * c, D)
        self.up2, self.up1 = Block(6 * c, 2 * c, D), Block(3 * c, c, D)
        self.last = nn.Conv2d(c, 1, 3, padding=1)

    def forward(self, x, t, labels):
        e = F.silu(self.time(embed_time(t)) + self.label(labels))
        a = self.down1(self.first(x), e)  # (B, c, 16, 16)
        b = self.down2(self.half1(a), e)  # (B, 2c, 8, 8)
        h = self.middle2(self.middle1(self.half2(b), e), e)  # (B, 4c, 4, 4)
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2.0), b], dim=1), e)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2.0), a], dim=1), e)
        return self.last(F.silu(h))


def simple_loss(model, x_0, A, *labels):
    """L_simple of one batch: mean of (eps - model(x_t, t, *labels))^2.

    t uniform on 1 … T for each example (A is (T + 1,)), eps by torch.randn_like, x_t by add_noise
    with A[t] on x_0's axes. Exercise.
    """
    t = torch.randint(1, len(A), (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    x_t = add_noise(x_0, eps, A[t].view(-1, *[1] * (x_0.dim() - 1)))
    return F.mse_loss(model(x_t, t, *labels), eps)


def fit(model, batch, A, steps, rate, writer):
    """Adam and OneCycle on L_simple of batch(), which gives x_0 and, if any, labels."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in tqdm(range(steps), desc=type(model).__name__, leave=False, disable=None):
        x_0, *labels = batch()
        loss = simple_loss(model, x_0, A, *labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            writer.add_scalar("train/loss", loss.item(), step)


# --- the sections ------------------------------------------------------------------------------


def show_forward(n, T=1000, x_0=0.7):
    print(f"1. x_t from x_0 = {x_0} by t steps, {n:,} walks: mean, std; those of q(x_t | x_0)")
    A = linear_schedule(T)
    x, mean, variance, worst = torch.full((n,), x_0, dtype=F64), x_0, 0.0, 0.0
    for t in range(1, T + 1):
        alpha = (A[t] / A[t - 1]).item()
        x = alpha**0.5 * x + (1 - alpha) ** 0.5 * torch.randn_like(x)
        mean, variance = alpha**0.5 * mean, alpha * variance + 1 - alpha
        worst = max(worst, abs(mean - A[t] ** 0.5 * x_0), abs(variance - (1 - A[t])))
        if t in (10, 100, T):
            std = (1 - A[t]).sqrt()
            assert abs(x.mean() - mean) < 5 * std / math.sqrt(n)
            assert abs(x.std() - std) < 5 * std / math.sqrt(2 * n)
            print(f"   t {t:4}   {x.mean():7.4f} {x.std():.4f}   "
                  f"{A[t].sqrt() * x_0:7.4f} {std:.4f}")  # fmt: skip
    assert worst < 1e-12
    print(f"   largest difference of the chain's mean and variance, all t: {worst:.0e}")


def bayes(x_0, x_t, A_t, A_s):
    """q(x_s | x_t, x_0) from q(x_s | x_0) and q(x_t | x_s): precisions add."""
    a = A_t / A_s
    precision = 1 / (1 - A_s) + a / (1 - a)
    return (A_s**0.5 * x_0 / (1 - A_s) + a**0.5 * x_t / (1 - a)) / precision, 1 / precision


def show_posterior(T=1000):
    print("2. the step back by 1, 20, 500 of 1,000 and Bayes; x_0, eps and v into each other")
    A, x_0, x_t, eps = linear_schedule(T), *torch.randn(3, T, 1, dtype=F64)
    worst = 0.0
    for gap in (1, 20, 500):
        A_t, A_s = A[1 + gap :, None], A[1:-gap, None]
        pair = [f(x_0[: len(A_t)], x_t[: len(A_t)], A_t, A_s) for f in (posterior, bayes)]
        worst = max(worst, *(((a - b).abs() / b.abs()).max() for a, b in zip(*pair, strict=True)))
    assert worst < 1e-9
    x_t = add_noise(x_0, eps, A[1:, None])
    truth = convert("x_0", x_0, x_t, A[1:, None])
    for kind, out in zip(("x_0", "eps", "v"), truth, strict=True):
        torch.testing.assert_close(convert(kind, out, x_t, A[1:, None]), truth, rtol=0, atol=1e-9)
    print(f"   largest relative difference {worst:.0e}   conversions agree to 1e-9")


def show_schedules(log_dir, T=1000):
    print("3. half signal, half noise (A = 1/2) at t; log10 SNR at t = 1, 250, 500, 750, 1000")
    half = {}
    for name, schedule in {"linear": linear_schedule, "cosine": cosine_schedule}.items():
        A = schedule(T)
        snr = (A / (1 - A)).log10()  # infinite at t = 0
        half[name] = int((A < 0.5).nonzero()[0])
        shown = " ".join(f"{snr[t]:6.2f}" for t in (1, 250, 500, 750, 1000))
        print(f"   {name}   t {half[name]}   {shown}")
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for t in range(10, T + 1, 10):
                writer.add_scalar("schedule/log10_snr", snr[t], t)
    return half


def gaussian_eps(x, A, std):
    """E[eps | x_t] of data N(0, std^2)."""
    return (1 - A) ** 0.5 * x / (A * std**2 + 1 - A)


def gaussian_std(std, times, A, sampler):
    """Standard deviation that a sampler with the exact eps gives to data N(0, std^2)."""
    variance, A = 1.0, A.tolist()
    for t, s in pairwise(times):
        known, to = ("beta", t - 1) if sampler == "unchanged" else (sampler, s)
        eps = gaussian_eps(1.0, A[t], std)
        x_0 = convert("eps", eps, 1.0, A[t])[0]
        factor = step_back(x_0, eps, 1.0, A[t], A[to], known, 0.0)
        noise = step_back(0.0, 0.0, 0.0, A[t], A[to], known, 1.0)
        variance = factor**2 * variance + noise**2
    return variance**0.5


def show_samplers(log_dir, n, std=0.2, T=1000):
    print(f"4. data N(0, {std}^2), exact eps: std of {n:,} samples (theory), 1000, 100, 20 steps")
    A, rows = linear_schedule(T), {}
    for sampler in ("beta", "tilde", "ddim", "unchanged"):
        with SummaryWriter(log_dir / f"sampler_{sampler}", purge_step=0) as writer:
            for steps in (20, 100, 1000):
                times, x = spaced(T, steps), torch.randn(n, dtype=F64)
                x, _ = denoise(lambda x, t: gaussian_eps(x, A[t], std), x, times, A, sampler)
                theory = gaussian_std(std, times, A, sampler)
                assert abs(x.std() / theory - 1) < 5 / math.sqrt(2 * n)
                rows[sampler, steps] = x.std().item(), theory
                writer.add_scalar("sampling/std", theory, steps)
        shown = "   ".join(f"{rows[sampler, k][0]:.3f} ({rows[sampler, k][1]:.3f})"
                           for k in (1000, 100, 20))  # fmt: skip
        print(f"   {sampler:<9}   {shown}")
    return rows


def show_inversion(n, T=1000):
    print("5. DDIM from data to noise and back, exact eps: root mean square error, by steps")
    A, x, errors = linear_schedule(T), ring(n).double(), {}

    def predict(x, t):
        return best_eps(x, A[t])

    for steps in (20, 50, 200, 1000):
        times = spaced(T, steps)
        noise, _ = denoise(predict, x, times[::-1], A, "ddim")
        again, _ = denoise(predict, noise, times, A, "ddim")
        errors[steps] = (again - x).square().sum(1).mean().sqrt().item()
    print("   " + "   ".join(f"{steps} {error:.3f}" for steps, error in errors.items()))
    return errors


def points_picture(frames, side=128):
    """(1, side, n side): clouds (B, 2) side by side, each on [-3.5, 3.5] squared."""
    panels = torch.zeros(len(frames), side, side)
    for panel, x in zip(panels, frames, strict=True):
        column, row = ((x.cpu() + 3.5) / 7 * side).long().clamp(0, side - 1).T
        panel[side - 1 - row, column] = 1.0
        panel[:, -1] = 0.3
    return torch.cat(list(panels), dim=1)[None]


def train_ring(A, steps, writer, device, n=100_000):
    """The network, and the loss per number of it, of the best eps and of eps = 0."""
    model = PointNet().to(device)
    fit(model, lambda: (ring(512, device),), A, steps, 5e-3, writer)
    with torch.no_grad():
        x_0, t = ring(n, device), torch.randint(1, len(A), (n,), device=device)
        eps, A_t = torch.randn_like(x_0), A[t].view(-1, 1)
        x_t = add_noise(x_0, eps, A_t)
        guesses = {"network": model(x_t, t), "best": best_eps(x_t, A_t), "zero": 0 * eps}
    return model, {name: F.mse_loss(guess, eps).item() for name, guess in guesses.items()}


def show_ring(log_dir, steps, n, device, T=1000):
    print(f"6. eight Gaussians, {steps} steps: loss of the network, the best eps, eps = 0; samples")
    A, rows = linear_schedule(T).float().to(device), {}
    real, start = ring(n, device), torch.randn(n, 2, device=device)

    def row(name, x):
        rows[name] = energy_distance(x, real), good_share(x)
        return "{:7.4f} {:.3f}".format(*rows[name])

    with SummaryWriter(log_dir / "ring", purge_step=0) as writer:
        model, losses = train_ring(A, steps, writer, device)
        print("   " + "   ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        predictors = {
            "network": lambda x, t: model(x, torch.full((len(x),), t, device=device)),
            "best": lambda x, t: best_eps(x, A[t]),
        }
        print("   energy distance to real samples, share within 3 sigma of a centre:")
        print(f"   real samples {row('real', ring(n, device))}   noise {row('noise', start)}")
        seen = (T, 600, 400, 300, 200, 100, 50, 20)
        takes = ("tilde", T), ("tilde", 50), ("beta", 50), ("ddim", 50), ("unchanged", 50)
        for sampler, k in takes:
            line = f"   {sampler:<9} {k:4} steps"
            for name, predict in predictors.items():
                x, kept = denoise(predict, start, spaced(T, k), A, sampler, seen=seen)
                line += f"   {name} {row((name, sampler, k), x)}"
                if (name, sampler, k) == ("network", "tilde", T):
                    frames = [*(x_t for x_t, _ in kept.values()), x, real]
                    writer.add_image("ring/from_noise", points_picture(frames), 0)
            print(line)
    return losses, rows


def shrink(images):
    """uint8 (N, 28, 28) -> (N, 1, 16, 16) in [-1, 1]"""
    return F.avg_pool2d(F.pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0), 2)[:, None]


def nearest_label(x, real, labels):
    """What images x (n, 1, 16, 16) show: the label of the closest of real ones (N, 1, 16, 16)."""
    return labels[torch.cdist(x.flatten(1), real.flatten(1)).argmin(1)]


def spread(x, labels):
    """Mean over the classes of the variance of x (N, 1, 16, 16) within a class, over all pixels."""
    return torch.stack([x[labels == k].var(0).sum() for k in labels.unique()]).mean().item()


def tile(images, columns):
    """(…, 16, 16) in [-1, 1] -> (1, H, W), row by row"""
    rows = images.cpu().clamp(-1, 1).reshape(-1, columns, 16, 16).transpose(1, 2)
    return rows.reshape(1, -1, 16 * columns) / 2 + 0.5


def guided(model, labels, w):
    """eps(x, t) with classifier-free guidance: both answers in one batch."""
    nothing = torch.full_like(labels, NO_CLASS)

    def predict(x, t):
        t = torch.full((2 * len(x),), t, device=x.device)
        given, free = model(torch.cat([x, x]), t, torch.cat([labels, nothing])).chunk(2)
        return free + w * (given - free)

    return predict


def split(labels, each):
    """Indices of `each` images a class, class by class, (10 each,); of as many others; the rest."""
    found = torch.stack([(labels == k).nonzero()[: 2 * each, 0] for k in range(10)])
    rest = torch.ones_like(labels).index_fill(0, found.flatten(), 0).nonzero()[:, 0]
    return found[:, :each].flatten(), found[:, each:].flatten(), rest


def show_digits(log_dir, images, labels, steps, each, sample_steps, device, T=1000):
    print(f"7. digits, {steps} steps: share as asked, variance in a class, energy distance to real")
    A = cosine_schedule(T).float().to(device)
    x_0, labels = shrink(images).to(device), labels.to(device)
    real, other, rest = split(labels, each)
    real, other, x_0, labels = x_0[real], x_0[other], x_0[rest], labels[rest]

    def batch(n=64):
        i = torch.randint(len(x_0), (n,), device=device)
        dropped = torch.rand(n, device=device) < 0.15  # so that it learns to go without, too
        return x_0[i], labels[i].masked_fill(dropped, NO_CLASS)

    model = UNet().to(device)
    with SummaryWriter(log_dir / "digits", purge_step=0) as writer:
        fit(model, batch, A, steps, 4e-3, writer)
    asked, start = torch.arange(10, device=device).repeat_interleave(each), torch.randn_like(real)
    samples, times = {"real": other, "noise": start}, spaced(T, sample_steps)
    seen = times[:: max(1, sample_steps // 8)]
    for w in (0, 1, 3):
        x, kept = denoise(guided(model, asked, w), start, times, A, "tilde", 1.0, seen)
        samples[f"w = {w}"] = x
        with SummaryWriter(log_dir / f"guidance_{w}", purge_step=0) as writer:
            writer.add_image("digits/by_class", tile(x, each), 0)
            way = [torch.stack(pair)[:, ::each] for pair in (*kept.values(), (x, x))]
            way = torch.stack(way, dim=2)  # (x_t and x_0, 10, times, 1, 16, 16)
            writer.add_image("digits/from_noise", tile(way.transpose(0, 1), way.size(2)), 0)
    rows = {}
    for name, x in samples.items():
        right = (nearest_label(x, x_0, labels) == asked).float().mean().item()
        rows[name] = right, spread(x, asked), energy_distance(x.flatten(1), real.flatten(1))
        print("   {:<6} {:.3f}   {:6.2f}   {:7.3f}".format(name, *rows[name]))
    return rows


def main(seed=0, log_dir=LOG_DIR, root=DATA, n=20_000, points=2000, ring_steps=3000, steps=600,
         each=16, sample_steps=40, count=8000, download=False):  # fmt: skip
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    images, labels, line = open_digits(root, True, count, download)
    print(line)
    show_forward(n)
    show_posterior()
    half = show_schedules(log_dir)
    samplers = show_samplers(log_dir, n)
    inversion = show_inversion(points // 2)
    losses, distances = show_ring(log_dir, ring_steps, points, device)
    digits = show_digits(log_dir, images, labels, steps, each, sample_steps, device)
    return {"half": half, "samplers": samplers, "inversion": inversion, "losses": losses,
            "distances": distances, "digits": digits, "data": line}  # fmt: skip


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
    torch.set_num_threads(1)  # networks this small are hardly faster on two
    guard(main, "--download")
