"""A VAE learns to draw: its decoder makes new images from random numbers.

A variational autoencoder (VAE) has two networks. The encoder turns an image x into a cloud of
codes: a code z is a short list of numbers, its units, and the cloud has a mean mu and a deviation
sigma for each. The decoder turns a code back into an image. Training wants two things: a code must
rebuild its image, and the clouds must stay close to N(0, 1), standard normal noise. Then you can
draw noise and decode it. If the second demand is too weak, noise lies where no image's code lay,
and the decoder has not learned what to draw there; if too strong, a code says nothing of its image.

    loss = D + beta R           in nats (natural log); beta = 1: VAE, another beta: beta-VAE
    D = E_q[-log p(x | z)]      distortion: the cross-entropy of the pixels, which are 0 or 1
    R = KL(q(z | x) || p(z))    rate: sum over the units of (mu^2 + sigma^2 - 1 - log sigma^2) / 2
    z = mu + sigma eps          eps ~ N(0, 1): so gradients reach mu and sigma through z
    log p(x) = ELBO + KL(q(z | x) || p(z | x))      ELBO = -(D + R), the evidence lower bound

    q(z | x)  the cloud of image x            p(z)  the prior: N(0, 1) for each unit of z
    p(x | z)  what the decoder says of x      p(z | x)  the codes that x can come from, by Bayes
    E_q  mean over z from q                   KL(a || b)  how far b is from a: never below 0

Needs          nn_seq.py, nn_loss.py, loss_functions/kl_divergence.py
Checked here   D and R against torch.distributions; samples by beta; the ELBO; the gradient by z
TensorBoard    images/digits in beta_0.25, ...: test digits, rebuilt, new ones; train/elbo by step
Try            in main, write betas=(32, 4, 0) for the three betas: what becomes of the samples?
Answer         R is the largest of all, and the samples are the farthest from training images
Source         Kingma & Welling 2014, arXiv:1312.6114, appendix B; Higgins et al. 2017 (beta-VAE)
"""

import argparse
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
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import MNIST
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "generative_models" / "vae_basics"
DATA = Path(__file__).resolve().parents[1] / "data"
MEND = "python generative_models/vae_basics.py --download"
F64 = torch.float64


# --- 1. in everyday code -----------------------------------------------------------------------


def kl_to_standard_normal(mu, log_var):
    """KL(N(mu, sigma^2) || N(0, 1)) for each unit, in nats; the shape of mu.

    (mu^2 + sigma^2 - 1 - log sigma^2) / 2, where log_var is log sigma^2. Exercise.
    """
    return (mu.square() + log_var.exp() - 1 - log_var) / 2


class VAE(nn.Module):
    """Encoder and decoder, for images of `pixels` numbers and codes of K units."""

    def __init__(self, pixels, K, width):
        super().__init__()
        self.K = K
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.SiLU(), nn.Linear(width, 2 * K))
        self.decoder = nn.Sequential(nn.Linear(K, width), nn.SiLU(), nn.Linear(width, pixels))

    def forward(self, x):
        """D (B,) and R (B,) of images x (B, pixels) of 0 and 1; the loss is the mean of D + R.

        The encoder gives mu and log sigma^2, side by side; D is of one code z. Exercise.
        """
        mu, log_var = self.encoder(x).chunk(2, dim=1)  # (B, K) each
        z = mu + (log_var / 2).exp() * torch.randn_like(mu)  # one code from the cloud
        D = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)
        return D, kl_to_standard_normal(mu, log_var).sum(1)

    @torch.no_grad()
    def sample(self, n):
        """n new images (n, pixels), as probabilities of a 1: decoded from noise z. Exercise."""
        z = torch.randn(n, self.K, device=self.decoder[0].weight.device)
        return self.decoder(z).sigmoid()


def show_everyday(steps):
    print("1. In everyday code: what does a VAE of one unit make of two patterns of four pixels?")
    patterns = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    model = VAE(pixels=4, K=1, width=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        D, R = model(patterns.repeat(32, 1))
        loss = (D + R).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model.sample(1000).round()
    print("   pattern        mu   sigma   decoded from mu       share of 1,000 samples")
    mu, log_var = model.encoder(patterns).detach().chunk(2, dim=1)
    rebuilt, shares = model.decoder(mu).detach().sigmoid(), []
    for x, m, s, back in zip(patterns, mu, (log_var / 2).exp(), rebuilt, strict=True):
        shares.append((drawn == x).all(1).float().mean().item())
        text, back = " ".join(f"{v:.0f}" for v in x), " ".join(f"{v:.2f}" for v in back)
        print(f"   {text}   {m.item():7.2f}   {s.item():5.2f}   {back}   {shares[-1]:22.2f}")
    print(f"   none of the two{1 - sum(shares):58.2f}")
    print(f"   -> {sum(shares):.0%} of what is decoded from noise are the two patterns")
    print(
        f"      D + R is {loss:.2f}; to tell two equally likely patterns takes log 2 = 0.69 or more"
    )
    return {"loss": loss.item(), "shares": shares, "mu": mu[:, 0].tolist()}


# --- 2. the two terms of the loss --------------------------------------------------------------


@torch.no_grad()
def show_loss():
    print("2. Are both terms of the loss right? A VAE of 3 units, 4 random images, the same noise")
    model, x = VAE(20, 3, 8).double(), torch.bernoulli(torch.full((4, 20), 0.3, dtype=F64))
    nn.init.normal_(model.encoder[2].bias)  # so that the clouds are not yet N(0, 1)
    state = torch.get_rng_state()
    D, R = model(x)
    mu, log_var = model.encoder(x).chunk(2, dim=1)
    torch.set_rng_state(state)  # the same noise again
    q = Normal(mu, (log_var / 2).exp())
    D_library = -Bernoulli(logits=model.decoder(q.rsample())).log_prob(x).sum(1)
    R_library = kl_divergence(q, Normal(torch.zeros_like(mu), 1.0)).sum(1)
    print("   mean of            the formula   torch.distributions   largest difference")
    off = [(ours - its).abs().max().item() for ours, its in ((D, D_library), (R, R_library))]
    print(f"   D, the pixels      {D.mean():11.6f}   {D_library.mean():19.6f}   {off[0]:18.0e}")
    print(f"   R, the code        {R.mean():11.6f}   {R_library.mean():19.6f}   {off[1]:18.0e}")
    print(f"   -> the formulas and the library differ by {max(off):.0e}: rounding")
    return max(off)


# --- 3. digits ---------------------------------------------------------------------------------


def toss(images):
    """uint8 images (B, 28, 28) -> (B, 784) of 0 and 1, white with the probability of their grey"""
    return torch.bernoulli(images.flatten(1).float() / 255)


def train_vae(images, beta, K, steps, seed, writer, batch=64):
    """A VAE of K units trained on D + beta R; the pixels are tossed anew for every batch."""
    torch.manual_seed(seed)
    model = VAE(784, K, 400).to(images.device)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in tqdm(range(steps), desc=f"beta {beta:g}, K {K}", leave=False, disable=None):
        D, R = model(toss(images[torch.randint(len(images), (batch,), device=images.device)]))
        loss = (D + beta * R).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            writer.add_scalar("train/elbo", -(D + R).mean().item(), step)
    return model


@torch.no_grad()
def evaluate(model, x):
    """Means over images x: D, R and ELBO in nats; active: the units whose R is above 0.1 nats."""
    D, R = (values.mean().item() for values in model(x))
    units = kl_to_standard_normal(*model.encoder(x).chunk(2, dim=1)).mean(0)
    return {"D": D, "R": R, "elbo": -D - R, "active": (units > 0.1).sum().item()}


def mean_image(images, x):
    """A model without codes: p (784,), how often each pixel is white in training; its D on x."""
    p = (images.float().mean(0).flatten() / 255).clamp(1e-4, 1 - 1e-4)
    return p, F.binary_cross_entropy(p.expand_as(x), x).item() * x.size(1)


def show_digits(seed, log_dir, images, x, steps):
    print(f"3. What does a VAE learn in {steps} steps? Means over {len(x):,} test images, in nats")
    print("   decoded from                      D       R     ELBO = -(D + R)")
    _, alone = mean_image(images, x)
    print(f"   nothing: the mean image    {alone:8.1f} {0:7.1f} {-alone:8.1f}")
    with SummaryWriter(log_dir / "beta_1", purge_step=0) as writer:
        model = train_vae(images, 1.0, 16, steps, seed, writer)
        writer.add_image("images/digits", picture(model, x), 0, dataformats="HW")
    D, R, elbo, _ = evaluate(model, x).values()
    print(f"   the image's own code       {D:8.1f} {R:7.1f} {elbo:8.1f}")
    mu, log_var = model.encoder(x).chunk(2, dim=1)
    z = (mu + (log_var / 2).exp() * torch.randn_like(mu)).roll(1, 0)
    other = -Bernoulli(logits=model.decoder(z)).log_prob(x).sum(1).mean().item()
    print(f"   another image's code       {other:8.1f}       -        -")
    print(f"   -> a code saves {alone - D:.0f} of {alone:.0f} nats in D and costs {R:.0f}, its R")
    return model, {"alone": alone, "D": D, "R": R, "elbo": elbo, "other": other}


# --- 4. beta -----------------------------------------------------------------------------------


def nearest_distance(a, b):
    """Mean over images a (N, 784) of 0 and 1: pixels in which the nearest of b (M, 784) differs."""
    return (a.sum(1, keepdim=True) + b.sum(1) - 2 * a @ b.T).amin(1).mean().item()  # of (N, M)


def show_betas(seed, log_dir, vae, images, x, betas, steps):
    print(f"4. Which beta? VAEs of {vae.K} units after {steps} steps; a sample's pixels are 0 or 1")
    print("   used: units with R above 0.1. Pixels of 784 that differ, means; small is good:")
    print("   real: from a sample to the nearest training image (do samples look real?)")
    print("   all: from a test image to the nearest of 500 samples (are all kinds drawn?)")
    print("                     D       R     ELBO    used    pixels: real              all")
    models, training = {1: vae}, toss(images[:4000])
    for beta in betas:
        with SummaryWriter(log_dir / f"beta_{beta:g}", purge_step=0) as writer:
            models[beta] = train_vae(images, beta, vae.K, steps, seed, writer)
            writer.add_image("images/digits", picture(models[beta], x), 0, dataformats="HW")
    p, alone = mean_image(images, x)
    mean, rows = {"D": alone, "R": 0.0, "elbo": -alone, "active": 0}, {}
    takes = [("mean image", mean, torch.bernoulli(p.expand(500, -1)))]
    for beta in sorted(models, reverse=True):
        drawn = torch.bernoulli(models[beta].sample(500))
        takes.append((f"beta {beta:g}", evaluate(models[beta], x), drawn))
    for name, row, drawn in takes:
        row["away"], row["missed"] = nearest_distance(drawn, training), nearest_distance(x, drawn)
        numbers = f"{row['D']:7.1f} {row['R']:7.1f} {row['elbo']:8.1f} {row['active']:7}"
        print(f"   {name:<12}{numbers}   {row['away']:13.0f} {row['missed']:16.0f}")
        rows[name] = row
    real = nearest_distance(x, training), nearest_distance(x, training[:500])
    print(f"   (real images as samples){real[0]:29.0f} {real[1]:16.0f}")
    best, top = max(rows, key=lambda name: rows[name]["elbo"]), rows[f"beta {max(models):g}"]
    high, used = max(models), top["active"] or "none"
    print(f"   -> ELBO: best for {best}; with beta {high:g} a code uses {used} of {vae.K} units")
    none, one = rows["mean image"]["away"], rows["beta 1"]["away"]
    print(f"   -> pixels off: a sample of the mean image {none:.0f}, of beta 1 {one:.0f},")
    print(f"      a real image {real[0]:.0f}")
    return {"rows": rows, "real": real}


# --- 5. the bound ------------------------------------------------------------------------------


def linear_elbo(w, s, x, q):
    """E_q log p(x | z) - KL(q || N(0, 1)) in closed form, (B,), of x (B,) ~ N(w z, s^2).

    q is a Normal of mean mu and deviation sigma, (B,); E_q (x - w z)^2 is (x - w mu)^2 +
    w^2 sigma^2. Exercise.
    """
    fit = Normal(w * q.mean, s).log_prob(x) - (w * q.stddev / s) ** 2 / 2
    return fit - kl_divergence(q, Normal(torch.zeros_like(x), 1.0))


def show_bound(n, w=2.0, s=0.5):
    print(f"5. How far is the ELBO below log p(x)? For {n} x ~ N({w:g} z, {s:g}^2)")
    print("   q(z | x)                       log p(x)      ELBO   difference   KL(q || p(z | x))")
    wide = (w**2 + s**2) ** 0.5  # deviation of x
    x, gaps = wide * torch.randn(n, dtype=F64), {}
    log_p = Normal(torch.zeros_like(x), wide).log_prob(x)
    exact = Normal(w * x / wide**2, torch.full_like(x, s / wide))  # by Bayes
    for name, q in (
        ("p(z | x), the exact one", exact),
        ("the same, 3 times as wide", Normal(exact.mean, 3 * exact.stddev)),
        ("p(z), blind to x", Normal(torch.zeros_like(x), 1.0)),
    ):
        elbo, kl = linear_elbo(w, s, x, q), kl_divergence(q, exact)
        gaps[name] = (log_p - elbo).mean().item(), kl.mean().item()
        print(f"   {name:<29} {log_p.mean():9.3f} {elbo.mean():9.3f}   {gaps[name][0]:z10.3f}   "
              f"{gaps[name][1]:z17.3f}")  # fmt: skip
    off = max(abs(gap - kl) for gap, kl in gaps.values())
    print(f"   -> the ELBO is too low by the KL from q to p(z | x): these two differ by {off:.0e}")
    return gaps


# --- 6. the gradient through a random code -----------------------------------------------------


def gradient_samples(f, mu, sigma, n):
    """n samples each of d E[f(z)] / d mu, z ~ N(mu, sigma^2): (n, K) through z, (n, K) REINFORCE.

    f (n, K) -> (n,); mu, sigma (K,). With z = mu + sigma eps, through z it is df/dz by autograd, by
    REINFORCE f(z) eps / sigma, of the same draws. Exercise.
    """
    eps = torch.randn(n, len(mu), dtype=mu.dtype, device=mu.device)
    z = (mu + sigma * eps).requires_grad_()
    value = f(z)
    (through,) = torch.autograd.grad(value.sum(), z)  # dz / dmu = 1
    return through, value.detach()[:, None] * eps / sigma  # d log q / d mu = eps / sigma


def show_gradients(n):
    print(f"6. Why z = mu + sigma eps? {n:,} estimates of d E[z^2] / d mu = 2 mu, for sigma = 1")
    print("   REINFORCE knows f(z) = z^2 alone, not its slope: it weighs f by how eps made z")
    print("               by 2 z, through z = mu + eps          by z^2 eps (REINFORCE)")
    print("   mu   2 mu      mean   variance   formula      mean   variance   mu^4 + 14 mu^2 + 15")
    rows = {}
    for mu in range(5):
        mean = torch.full((1,), float(mu), dtype=F64)
        estimates = gradient_samples(lambda z: z.square().sum(1), mean, torch.ones_like(mean), n)
        rows[mu] = [(g.mean().item(), g.var().item()) for g in estimates]
        (a, va), (b, vb) = rows[mu]
        print(f"   {mu:2}   {2 * mu:4}   {a:7.3f}   {va:8.3f}   {4:7}   {b:7.3f}   {vb:8.2f}   "
              f"{mu**4 + 14 * mu**2 + 15:19}")  # fmt: skip
    print(f"   -> at mu = 4 REINFORCE varies {vb / va:.0f} times as much, so it needs more z")
    return rows


# --- digits, found or drawn, and their pictures -------------------------------------------------


def tile(images, columns):
    """(N, 784) of 0 to 1 -> (56 N / columns, 56 columns) uint8, row by row, twice as large"""
    cut = images.view(-1, columns, 28, 28).transpose(1, 2).reshape(-1, 28 * columns)
    return (cut * 255).byte().cpu().numpy().repeat(2, 0).repeat(2, 1)


@torch.no_grad()
def picture(model, x, columns=12):
    """(H, W) uint8: test images, what they are rebuilt as, and new images, each with its words."""
    strips = []
    for words, images in (
        ("test images: white is 1, black is 0", x[:columns]),
        ("decoded from their codes mu: the brighter, the more probable a 1",
         model.decoder(model.encoder(x[:columns]).chunk(2, dim=1)[0]).sigmoid()),
        ("decoded from noise: new images", model.sample(4 * columns)),
    ):  # fmt: skip
        line = Image.new("L", (56 * columns, 20), 255)
        ImageDraw.Draw(line).text((4, 2), words, 0, ImageFont.load_default(14))
        strips += [np.asarray(line), tile(images, columns)]
    return np.concatenate(strips)


def draw_digits(n):
    """(n, 28, 28) uint8: a font's digits, moved, sized, turned, bold: image i is i % 10."""
    fonts, images = [ImageFont.load_default(size) for size in range(20, 29)], []
    for i, (right, down, size, turn, bold) in enumerate(torch.rand(n, 5).tolist()):
        image, font = Image.new("L", (28, 28)), fonts[int(size * len(fonts))]
        ImageDraw.Draw(image).text((12 + 4 * right, 12 + 4 * down), str(i % 10), 255, font,
                                   anchor="mm", stroke_width=int(2 * bold))  # fmt: skip
        images.append(np.asarray(image.rotate(30 * turn - 15, Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(images))


def open_digits(root=DATA, train=True, count=8000, download=False):
    """Images (N, 28, 28) uint8 and a line on them: MNIST if it is there, else drawn digits.

    Raises OSError if MNIST is there but damaged, or if it cannot be fetched.
    """
    raw = Path(root, "MNIST", "raw")
    if not download and not any(raw.glob("*-ubyte*")):
        return draw_digits(count), f"data: {count:,} drawn digits; for the real MNIST: {MEND}"
    try:
        images = MNIST(root, train, download=download).data
        if images.shape[1:] != (28, 28) or not len(images):
            raise ValueError(f"images of shape {tuple(images.shape)}")
    except Exception as error:  # torchvision has a dozen ways to say no
        why = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{raw} holds no whole MNIST ({why}): delete it, then {MEND}") from error
    return images, f"data: MNIST, {len(images):,} images"


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, root=DATA, n=200_000, steps=1000,
         betas=(32, 4, 0.25), count=8000, test=1000, tiny_steps=600, download=False):  # fmt: skip
    if download:  # first, since it may fail
        open_digits(root, download=True)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    images, line = open_digits(root, True, count)
    x, _ = open_digits(root, False, test)
    images, x = images.to(device), toss(x[:test]).to(device)
    measured = {"everyday": show_everyday(tiny_steps), "loss": show_loss(), "data": line}
    print(line)
    vae, measured["digits"] = show_digits(seed, log_dir, images, x, steps)
    measured["betas"] = show_betas(seed, log_dir, vae, images, x, betas, steps)
    measured["gaps"], measured["gradients"] = show_bound(200), show_gradients(n)
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
    torch.set_num_threads(1)  # networks this small are hardly faster on two
    guard(main, "--download")
