"""A VAE learns to draw: its decoder makes new images of random numbers.

A variational autoencoder (VAE) has two networks. The encoder turns an image x into a cloud of
codes: a code z is a short list of numbers, and the cloud has a mean mu and a deviation sigma for
each. The decoder turns a code back into an image. Training wants two things: a code must rebuild
its image, and the clouds must stay close to N(0, 1), standard normal noise. Then you can draw
noise and decode it. If the second demand is too weak, the decoder has not learned such codes; if
it is too strong, the codes say nothing of the image.

    loss = D + beta R           beta = 1 is the VAE, another beta is a beta-VAE
    D = E_q[-log p(x | z)]      distortion: the cross-entropy of the pixels, which are 0 or 1
    R = KL(q(z | x) || p(z))    rate: sum over z of (mu^2 + sigma^2 - 1 - log sigma^2) / 2
    z = mu + sigma eps          eps ~ N(0, 1): so gradients reach mu and sigma through z
    log p(x) = -(D + R) + KL(q(z | x) || p(z | x))      -(D + R) is called the ELBO

    q(z | x)  the cloud of image x            p(z)  the prior: N(0, 1) for each number of z
    p(x | z)  what the decoder says of x      p(z | x)  the codes that x can come from, by Bayes
    E_q  mean over z from q                   KL(a || b)  how far b is from a; 0 if they are equal

A number of z is also called a unit. Losses are in nats, because log is the natural logarithm.

Needs          nn_seq.py, nn_loss.py, loss_functions/kl_divergence.py
Checked here   D and R against torch.distributions; the last formula where p(x) is known; the
               gradient by two methods; D, R and the samples by beta, beside a model without codes
TensorBoard    images/digits in beta_0.25, beta_1, ...: test digits, rebuilt ones, new ones;
               train/elbo by step; linear/gap by log10 of the number of weights in q_prior, ...
Try            in main, write betas=(32, 4, 0) for the three betas: what becomes of the samples?
Answer         R is the largest of all, and the samples are the farthest from training images
Source         Kingma & Welling 2014, arXiv:1312.6114, appendix B; Burda et al. 2016 (weights),
               arXiv:1509.00519, eq. 8; Higgins et al. 2017 (beta-VAE)
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
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import MNIST
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "generative_models" / "vae_basics"
DATA = Path(__file__).resolve().parents[1] / "data"
MEND = "python generative_models/vae_basics.py --download"
F64 = torch.float64


# --- 1. in everyday code -----------------------------------------------------------------------


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
        R = (mu.square() + log_var.exp() - 1 - log_var).sum(1) / 2
        return D, R

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
    for i, x in enumerate(patterns):
        shares.append((drawn == x).all(1).float().mean().item())
        text, back = " ".join(f"{v:.0f}" for v in x), " ".join(f"{v:.2f}" for v in rebuilt[i])
        print(f"   {text}   {mu[i, 0]:7.2f}   {(log_var[i, 0] / 2).exp():5.2f}   {back}   "
              f"{shares[i]:22.2f}")  # fmt: skip
    print(f"   none of the two{1 - sum(shares):58.2f}")
    print(f"   -> {sum(shares):.0%} of what is decoded from noise are the two patterns; D + R is "
          f"{loss:.2f} (least: log 2 = 0.69)")  # fmt: skip
    return {"loss": loss.item(), "shares": shares, "mu": mu[:, 0].tolist()}


# --- 2. the two terms of the loss --------------------------------------------------------------


def kl_to_standard_normal(mu, log_var):
    """KL(N(mu, sigma^2) || N(0, 1)) for each unit, in nats; the shape of mu.

    (mu^2 + sigma^2 - 1 - log sigma^2) / 2, where log_var is log sigma^2. Exercise.
    """
    return (mu.square() + log_var.exp() - 1 - log_var) / 2


def library_terms(model, x):
    """D (B,) and R (B, K) as torch.distributions has them: also R of each unit apart."""
    mu, log_var = model.encoder(x).chunk(2, dim=1)
    q = Normal(mu, (log_var / 2).exp())
    z = q.rsample()  # mu + sigma eps: "r" says that gradients pass through it
    D = -Bernoulli(logits=model.decoder(z)).log_prob(x).sum(1)
    return D, kl_divergence(q, Normal(torch.zeros_like(mu), 1.0))


@torch.no_grad()
def show_loss():
    print("2. Are both terms of the loss right? A VAE of 3 units, 4 random images, the same noise")
    model, x = VAE(20, 3, 8).double(), torch.bernoulli(torch.full((4, 20), 0.3, dtype=F64))
    nn.init.normal_(model.encoder[2].bias)  # so that the clouds are not yet N(0, 1)
    state = torch.get_rng_state()
    D, R = model(x)
    torch.set_rng_state(state)  # the same noise again
    D_library, R_library = library_terms(model, x)
    R_units = kl_to_standard_normal(*model.encoder(x).chunk(2, dim=1))
    print("   mean of                     VAE.forward   torch.distributions   largest difference")
    off = []
    for name, ours, theirs in (
        ("D, the pixels", D, D_library),
        ("R, the code", R, R_library.sum(1)),
        ("R of each unit", R_units, R_library),
    ):
        off.append((ours - theirs).abs().max().item())
        print(f"   {name:<27} {ours.mean():11.6f}   {theirs.mean():19.6f}   {off[-1]:18.0e}")
    print(f"   -> the formulas and the library differ by {max(off):.0e}: rounding")
    assert max(off) < 1e-12
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
    D = F.binary_cross_entropy(p.expand_as(x), x, reduction="none")
    return p, D.sum(1).mean().item()


def show_digits(seed, log_dir, images, x, steps):
    print(f"3. What does a VAE learn in {steps} steps? Means over {len(x):,} test images, in nats")
    print("   decoded from                      D       R     ELBO")
    _, alone = mean_image(images, x)
    print(f"   nothing: the mean image    {alone:8.1f} {0:7.1f} {-alone:8.1f}")
    with SummaryWriter(log_dir / "beta_1", purge_step=0) as writer:
        model = train_vae(images, 1.0, 16, steps, seed, writer)
        writer.add_image("images/digits", picture(model, x), 0, dataformats="HW")
    D, R, elbo, _ = evaluate(model, x).values()
    print(f"   the image's own code       {D:8.1f} {R:7.1f} {elbo:8.1f}")
    logits = model.decoder(model.encoder(x).chunk(2, dim=1)[0].roll(1, 0))
    other = -Bernoulli(logits=logits).log_prob(x).sum(1).mean().item()
    print(f"   another image's code       {other:8.1f}       -        -")
    print(f"   -> codes of {model.K} units save {alone - D:.0f} of {alone:.0f} nats in D and cost "
          f"{R:.0f} in R: see images/digits")  # fmt: skip
    return model, {"alone": alone, "D": D, "R": R, "elbo": elbo, "other": other}


# --- 4. the bound ------------------------------------------------------------------------------


def importance_bound(log_w):
    """log of the mean of n weights, (B,), of their logarithms (n, B); finite where exp is not.

    By logsumexp over the first dimension, minus log n. For n = 1 it is the ELBO. Exercise.
    """
    return log_w.logsumexp(0) - math.log(len(log_w))


def linear_gaussian(W, s, x):
    """p(x) and p(z | x) for z ~ N(0, 1) and x (B, P) ~ N(W z, s^2), W (P, K): both are Gaussians.

    Covariance W W^T + s^2 I; by Bayes precision A = W^T W / s^2 + I and mean A^-1 W^T x / s^2.
    """
    (P, K), kind = W.shape, {"dtype": W.dtype}
    evidence = MultivariateNormal(torch.zeros(P, **kind), W @ W.T + s**2 * torch.eye(P, **kind))
    A = W.T @ W / s**2 + torch.eye(K, **kind)
    mean = torch.linalg.solve(A, x @ W / s**2, left=False)
    return evidence, MultivariateNormal(mean, precision_matrix=A)


def linear_elbo(W, s, x, q):
    """E_q log p(x | z) - KL(q || p(z)) in closed form, (B,), for q a MultivariateNormal.

    E_q |x - W z|^2 = |x - W mu|^2 + tr(W S W^T), mu and S the mean and covariance of q; log p is
    that of P independent N(W z, s^2). Exercise.
    """
    prior = MultivariateNormal(torch.zeros_like(q.mean), torch.eye(W.size(1), dtype=W.dtype))
    spread = (W @ q.covariance_matrix * W).sum((-2, -1)) / (2 * s**2)
    return Normal(q.mean @ W.T, s).log_prob(x).sum(-1) - spread - kl_divergence(q, prior)


def show_bound(log_dir, n, draws, s=0.25):
    W = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.0, 0.5], [0.3, 0.0]], dtype=F64)
    x = torch.randn(n, 2, dtype=F64) @ W.T + s * torch.randn(n, 4, dtype=F64)
    evidence, exact = linear_gaussian(W, s, x)
    log_p, prior = evidence.log_prob(x), MultivariateNormal(exact.mean * 0, torch.eye(2).double())
    apart = torch.diag(exact.precision_matrix[0].diagonal())
    clouds = {
        "posterior": exact,
        "diagonal": MultivariateNormal(exact.mean, precision_matrix=apart),
        "prior": prior,
    }
    print("4. How far is the ELBO below log p(x)? A linear decoder, whose p(x) is known; three q:")
    print("   p(z | x) itself, the best without covariances, and p(z), which is blind to x")
    print("                  log p(x)         KL from    log p(x) minus the bound of n weights")
    print("   q            minus ELBO   q to p(z | x)     n = 10    n = 100   n = 1000")
    gaps = {}
    for name, q in clouds.items():
        gap, kl = log_p - linear_elbo(W, s, x, q), kl_divergence(q, exact)
        torch.testing.assert_close(gap, kl, rtol=1e-9, atol=1e-9)
        gaps[name] = [gap.mean().item()]
        for count in (10, 100, 1000):
            z = q.sample((count, draws))  # (count, draws, n, 2)
            log_w = Normal(z @ W.T, s).log_prob(x).sum(-1) + prior.log_prob(z) - q.log_prob(z)
            gaps[name].append((log_p - importance_bound(log_w)).mean().item())
        draw(log_dir / f"q_{name}", {"linear/gap": gaps[name]})
        shown = "  ".join(f"{gap:z9.3f}" for gap in gaps[name][1:])
        print(f"   {name:<12} {gaps[name][0]:z12.3f}   {kl.mean():z13.3f}  {shown}")
    lost, *_, left = gaps["prior"]
    print(f"   -> the ELBO misses the KL of q; the blind q loses {lost:.1f} nats, of which 1,000 "
          f"weights leave {left:.2f}")  # fmt: skip
    return gaps


# --- 5. the gradient through a random code -----------------------------------------------------


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


def show_gradients(log_dir, n):
    def square(z):
        return z.square().sum(1)

    print(f"5. Why z = mu + sigma eps? {n:,} estimates of the gradient of E[z^2], 2 mu; sigma = 1")
    print("              through z = mu + eps          REINFORCE: z^2 eps, which needs no dz / dmu")
    print("   2 mu      mean   variance   formula      mean   variance   mu^4 + 14 mu^2 + 15")
    rows = {}
    for mu in range(5):
        mean = torch.tensor([float(mu)], dtype=F64)
        estimates = gradient_samples(square, mean, torch.ones_like(mean), n)
        rows[mu] = [(g.mean().item(), g.var().item()) for g in estimates]
        (a, va), (b, vb) = rows[mu]
        print(f"   {2 * mu:4}   {a:7.3f}   {va:8.3f}   {4:7}   {b:7.3f}   {vb:8.2f}   "
              f"{mu**4 + 14 * mu**2 + 15:19}")  # fmt: skip
    for i, name in enumerate(("reparameterised", "reinforce")):
        variances = [math.log10(row[i][1]) for row in rows.values()]
        draw(log_dir / name, {"gradient/log10_variance": variances})
    print(f"   -> both have the right mean; at mu = 4 REINFORCE varies {vb / va:.0f} times as much")
    return rows


# --- 6. beta -----------------------------------------------------------------------------------


def nearest_distance(a, b):
    """Mean over images a (N, 784) of 0 and 1: pixels in which the nearest of b (M, 784) differs."""
    differ = a.sum(1, keepdim=True) + b.sum(1) - 2 * a @ b.T  # (N, M), |a - b|^2 of zeros and ones
    return differ.min(1).values.mean().item()


def show_betas(seed, log_dir, vae, images, x, betas, steps):
    print(f"6. Which beta? VAEs of 16 units after {steps} steps, and how real their samples are")
    print("                                              units with   pixels (of 784) that differ")
    print(
        "                           D       R     ELBO   R above 0.1   from the nearest of training"
    )
    training, models = toss(images[:4000]), {1: vae}
    p, alone = mean_image(images, x)
    real = nearest_distance(x[:500], training)
    mean = nearest_distance(torch.bernoulli(p.expand(500, -1)), training)
    print(f"   test images           -       -        -             -   {real:16.0f}")
    print(f"   mean image      {alone:7.1f} {0:7.1f} {-alone:8.1f}             -   {mean:16.0f}")
    for beta in betas:
        with SummaryWriter(log_dir / f"beta_{beta:g}", purge_step=0) as writer:
            models[beta] = train_vae(images, beta, vae.K, steps, seed, writer)
            writer.add_image("images/digits", picture(models[beta], x), 0, dataformats="HW")
    rows = {}
    for beta in sorted(models, reverse=True):
        row = rows[beta] = evaluate(models[beta], x)
        row["away"] = nearest_distance(torch.bernoulli(models[beta].sample(500)), training)
        print(f"   beta {beta:<10g} {row['D']:7.1f} {row['R']:7.1f} {row['elbo']:8.1f} "
              f"{row['active']:13}   {row['away']:16.0f}")  # fmt: skip
    best, top = min(rows, key=lambda beta: rows[beta]["away"]), max(rows)
    print(f"   -> beta = {best:g} draws what is most like real images; at beta = {top:g} "
          f"{rows[top]['active']} units are in use")  # fmt: skip
    return {"rows": rows, "real": real, "mean": mean}


# --- pictures and curves -----------------------------------------------------------------------


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


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


# --- digits, found or drawn --------------------------------------------------------------------


def draw_digits(n):
    """(n, 28, 28) uint8: a font's digits, moved, sized, turned, bold: image i is i % 10."""
    fonts, images = [ImageFont.load_default(size) for size in range(20, 29)], []
    dice = torch.rand(n, 5).tolist()
    for i, (right, down, size, turn, bold) in enumerate(dice):
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
        line = f"data: {count:,} drawn digits, as there is no MNIST in {raw}; to fetch it: {MEND}"
        return draw_digits(count), line
    try:
        images = MNIST(root, train, download=download).data
        if images.shape[1:] != (28, 28) or not len(images):
            raise ValueError(f"images of shape {tuple(images.shape)}")
    except Exception as error:  # torchvision has a dozen ways to say no
        why = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{raw} holds no whole MNIST ({why}): delete it, then {MEND}") from error
    return images, f"data: MNIST, {len(images):,} images"


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, root=DATA, n=200_000, draws=10, steps=1000,
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
    measured["gaps"] = show_bound(log_dir, 200, draws)
    measured["gradients"] = show_gradients(log_dir, n)
    measured["betas"] = show_betas(seed, log_dir, vae, images, x, betas, steps)
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
