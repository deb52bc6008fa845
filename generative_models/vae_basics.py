"""The ELBO misses log p(x) by KL(q(z | x) || p(z | x)): nothing is lost but what q is wrong by.

    log p(x)  =  E_q[log p(x | z)] - KL(q(z | x) || p(z))  +  KL(q(z | x) || p(z | x))
                 [------------------ ELBO -------------]      [ >= 0, the gap         ]

The line is log p(x) = log p(x, z) - log p(z | x), its mean taken over q, log q(z | x) added and
taken away. -E_q[log p(x | z)] is the distortion D, KL(q(z | x) || p(z)) the rate R, both in nats.

    z = mu + sigma eps   so that the gradient goes through the sample; REINFORCE, the mean of
                         f(z) d log q / d mu, is unbiased too, but here varies far more
    KL to N(0, I)        sum over units of (mu^2 + sigma^2 - 1 - log sigma^2) / 2
    beta-VAE             min D + beta R: a large beta buys a small rate, and at last q = p(z)
    IWAE                 E[log mean of K weights p(x, z_k) / q(z_k | x)] climbs from the ELBO to
                         log p(x) as K grows

Digits are MNIST if it lies in data/MNIST, else drawn; each pixel is a coin (Bernoulli), tossed anew
for every batch: of zeros and ones, not of greys, cross-entropy is -log of a probability.

Checked here   KL against torch.distributions and Monte Carlo; the variance of both gradients, with
               theory; a linear model with known log p(x): the gap for three q, closed by IWAE;
               rate, distortion, active units (rate > 0.1) by beta, next to a decoder without z
TensorBoard    gradient/log10_variance by mu in reparameterised, reinforce; linear/gap by log10 K
               in q_…; train/elbo by step and images/… in beta_…; rate/distortion by rate (in tenths
               of a nat) in curve; images/latent_map in latent_2: what is drawn where, and where
               digits of the test set lie
Try            beta = 0: which rate? It has no limit: an autoencoder, whose prior samples are noise
Source         Kingma & Welling 2014, arXiv:1312.6114, eqs. 1 and 3, appendix B; Higgins et al.
               2017 (beta-VAE); Burda et al. 2016 (IWAE), arXiv:1509.00519, eq. 8; Alemi et al. 2018
               (rate and distortion), arXiv:1711.00464
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
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "generative_models" / "vae_basics"
DATA = Path(__file__).resolve().parents[1] / "data"
PLACES = ("MNIST/raw", "MNIST", "mnist/raw", "mnist", "raw", "")  # in data/, torchvision's first
MEND = "python generative_models/vae_basics.py --download"
F64 = torch.float64


# --- digits ------------------------------------------------------------------------------------


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


# --- the two gradients, and KL -----------------------------------------------------------------


def kl_to_standard_normal(mu, log_var):
    """KL(N(mu, sigma^2) || N(0, 1)) for each unit, in nats; the shape of mu.

    (mu^2 + sigma^2 - 1 - log sigma^2) / 2, where log_var is log sigma^2. Exercise.
    """
    return (mu.square() + log_var.exp() - 1 - log_var) / 2


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


# --- a model whose log p(x) is known -----------------------------------------------------------


class LinearGaussian:
    """z ~ N(0, I) of size K, x | z ~ N(W z, s^2 I) of size D: p(x) and p(z | x) are Gaussians."""

    def __init__(self, D=6, K=2, s=0.25):
        axes = torch.linalg.qr(torch.randn(D, K, dtype=F64)).Q
        gram = 0.3 * torch.eye(K, dtype=F64) + 0.7  # W^T W, so that p(z | x) has covariances
        self.W, self.s = axes @ torch.linalg.cholesky(gram).T, s
        self.prior = MultivariateNormal(torch.zeros(K, dtype=F64), torch.eye(K, dtype=F64))

    def likelihood(self, z):
        return Normal(z @ self.W.T, self.s)

    def log_evidence(self, x):
        """log p(x), (B,), of x (B, D): a Gaussian of mean 0 and covariance W W^T + s^2 I.

        Exercise.
        """
        D = len(self.W)
        covariance = self.W @ self.W.T + self.s**2 * torch.eye(D, dtype=F64)
        return MultivariateNormal(torch.zeros(D, dtype=F64), covariance).log_prob(x)

    def posterior(self, x):
        """p(z | x) for x (B, D): a MultivariateNormal.

        Precision P = W^T W / s^2 + I, mean P^-1 W^T x / s^2. Exercise.
        """
        precision = self.W.T @ self.W / self.s**2 + torch.eye(self.W.size(1), dtype=F64)
        mean = torch.linalg.solve(precision, x @ self.W / self.s**2, left=False)
        return MultivariateNormal(mean, precision_matrix=precision)

    def elbo(self, x, q):
        """E_q log p(x | z) - KL(q || prior) in closed form, (B,), for q a MultivariateNormal.

        E_q |x - W z|^2 = |x - W mu|^2 + tr(W S W^T), mu and S the mean and covariance of q.
        Exercise.
        """
        spread = (self.W @ q.covariance_matrix * self.W).sum((-2, -1))
        expected = self.likelihood(q.mean).log_prob(x).sum(-1) - spread / (2 * self.s**2)
        return expected - kl_divergence(q, self.prior)

    def iwae(self, x, q, K):
        """log of the mean of K weights p(x, z_k) / q(z_k | x), one draw of it for each x: (B,).

        z_1 … z_K from q, without gradient; logsumexp keeps it finite. Exercise.
        """
        z = q.sample((K,))
        log_w = self.likelihood(z).log_prob(x).sum(-1) + self.prior.log_prob(z) - q.log_prob(z)
        return log_w.logsumexp(0) - math.log(K)


def approximations(model, x):
    """{name: q}: the posterior, the best q without covariances, and one that does not look at x."""
    exact = model.posterior(x)
    diagonal = torch.diag(exact.precision_matrix[0].diagonal())
    return {
        "posterior": exact,
        "diagonal": MultivariateNormal(exact.mean, precision_matrix=diagonal),
        "prior": model.prior.expand((len(x),)),
    }


# --- the VAE -----------------------------------------------------------------------------------


class VAE(nn.Module):
    """Images (B, 28, 28) -> K latent units -> logits (B, 784) of the pixels."""

    def __init__(self, K=16, width=256):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(784, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2 * K),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(K, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 784),
        )  # fmt: skip

    def encode(self, x):
        return self.encoder(x).chunk(2, dim=1)  # mu, log_var: (B, K) each

    def distortion(self, z, x):
        """-log p(x | z), (..., B), for z (..., B, K) and pixels x (B, 28, 28) of 0 and 1.

        The decoder gives the logits of 784 pixels, which are independent given z. Exercise.
        """
        logits = self.decoder(z)
        return F.binary_cross_entropy_with_logits(
            logits, x.flatten(1).expand_as(logits), reduction="none"
        ).sum(-1)

    def forward(self, x):
        """D (B,), and R of each unit (B, K), from one sample of z."""
        mu, log_var = self.encode(x)
        z = mu + (log_var / 2).exp() * torch.randn_like(mu)
        return self.distortion(z, x), kl_to_standard_normal(mu, log_var)

    @torch.no_grad()
    def iwae(self, x, K):
        """The bound on log p(x) of K weights, (B,); K = 1 is the ELBO."""
        mu, log_var = self.encode(x)
        q, prior = Normal(mu, (log_var / 2).exp()), Normal(0.0, 1.0)
        z = q.sample((K,))  # (K, B, units)
        log_w = (prior.log_prob(z) - q.log_prob(z)).sum(-1) - self.distortion(z, x)
        return log_w.logsumexp(0) - math.log(K)


def toss(images):
    """uint8 images (B, 28, 28) -> pixels of 0 and 1, white with the probability of their grey"""
    return torch.bernoulli(images.float() / 255)


def train_vae(images, beta, K, steps, seed, writer, batch=64):
    """A VAE trained on D + beta R; beta rises from 0 over the first half, or units die early."""
    torch.manual_seed(seed)
    model = VAE(K).to(images.device)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    for step in tqdm(range(steps), desc=f"beta {beta:g}, K {K}", leave=False, disable=None):
        D, R = model(toss(images[torch.randint(len(images), (batch,), device=images.device)]))
        R = R.sum(1)
        loss = (D + beta * min(1, 2 * (step + 1) / steps) * R).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            writer.add_scalar("train/elbo", -(D + R).mean().item(), step)
    return model


@torch.no_grad()
def evaluate(model, x):
    """Distortion, rate, ELBO in nats an image; active: the units of a rate above 0.1 nats."""
    D, R = (values.mean(0) for values in model(x))  # (), (K,)
    D, rate, active = D.item(), R.sum().item(), (R > 0.1).sum().item()
    return {"distortion": D, "rate": rate, "elbo": -D - rate, "active": active}


# --- pictures ----------------------------------------------------------------------------------


def tile(images, columns):
    """(N, 784) -> (1, 28 N / columns, 28 columns), row by row"""
    cut = images.view(-1, columns, 28, 28)
    return cut.transpose(1, 2).reshape(1, -1, 28 * columns).cpu()


@torch.no_grad()
def draw_pictures(model, x, writer, columns=12):
    """Test images over their reconstructions, samples from the prior, and the units, one a row."""
    mu, log_var = model.encode(x)
    rebuilt = model.decoder(mu[:columns]).sigmoid()
    rows = torch.cat([x[:columns].flatten(1), rebuilt])
    writer.add_image("images/reconstructions", tile(rows, columns), 0)
    samples = model.decoder(torch.randn(5 * columns, mu.size(1), device=x.device)).sigmoid()
    writer.add_image("images/prior_samples", tile(samples, columns), 0)
    order = kl_to_standard_normal(mu, log_var).mean(0).argsort(descending=True)[:8]
    z = mu[3].repeat(len(order), columns, 1)
    for row, unit in enumerate(order):
        z[row, :, unit] = torch.linspace(-3, 3, columns)
    writer.add_image("images/traversal", tile(model.decoder(z.flatten(0, 1)).sigmoid(), columns), 0)


@torch.no_grad()
def latent_map(model, x, labels, n=16):
    """(3, 28 n, 56 n): what the decoder draws over both units, and where digits lie, by colour.

    Both are laid out by the prior's quantiles, so that equal areas are equally probable; the first
    unit grows to the right, the second upwards.
    """
    u = (torch.arange(n, device=x.device) + 0.5) / n
    z = Normal(0.0, 1.0).icdf(torch.cartesian_prod(1 - u, u)).flip(1)  # rows from the top
    drawn = tile(model.decoder(z).sigmoid(), n).expand(3, -1, -1)
    hues = torch.tensor([(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200),
                         (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
                         (170, 110, 40), (255, 255, 255)]) / 255  # fmt: skip
    cells = 7 * n  # of 4 x 4 pixels
    column, row = (Normal(0.0, 1.0).cdf(model.encode(x)[0]).cpu() * cells).long().T
    dots = torch.zeros(3, cells, cells)
    dots[:, (cells - 1 - row).clamp(min=0), column.clamp(max=cells - 1)] = hues[labels.cpu()].T
    return torch.cat([drawn, dots.repeat_interleave(4, 1).repeat_interleave(4, 2)], dim=2)


# --- the sections ------------------------------------------------------------------------------


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


def show_kl(n):
    print("1. KL(N(mu, sigma^2) || N(0, 1)): closed form, torch.distributions, Monte Carlo")
    mu, log_var = torch.tensor([[0.0, 1.0, -2.0], [0.0, -2.0, 1.0]], dtype=F64)
    q, prior = Normal(mu, (log_var / 2).exp()), Normal(torch.zeros_like(mu), 1.0)
    closed, theirs = kl_to_standard_normal(mu, log_var), kl_divergence(q, prior)
    torch.testing.assert_close(closed, theirs, rtol=0, atol=1e-12)
    z = q.sample((n,))
    log_ratio = q.log_prob(z) - prior.log_prob(z)  # (n, 3)
    error = log_ratio.std(0) / math.sqrt(n)
    assert ((log_ratio.mean(0) - closed).abs() <= 5 * error).all()
    for row in zip(mu, q.stddev, closed, theirs, log_ratio.mean(0), error, strict=True):
        print("   mu {:4.1f} sigma {:.2f}   {:.4f}   {:.4f}   {:.4f} +- {:.4f}".format(*row))


def show_gradients(log_dir, n):
    print("2. d E[z^2] / d mu = 2 mu, sigma = 1: mean of the samples, their variance (theory)")
    rows = {}
    for mu in range(5):
        mean = torch.tensor([float(mu)], dtype=F64)
        estimates = gradient_samples(lambda z: z.square().sum(1), mean, torch.ones_like(mean), n)
        rows[mu] = [(g.mean().item(), g.var().item()) for g in estimates]
        (a, va), (b, vb) = rows[mu]
        print(
            f"   mu {mu}   through z {a:6.3f}, {va:5.3f} (4)"
            f"   REINFORCE {b:6.3f}, {vb:6.2f} ({mu**4 + 14 * mu**2 + 15})"
        )
    for i, name in enumerate(("reparameterised", "reinforce")):
        variances = [math.log10(row[i][1]) for row in rows.values()]
        draw(log_dir / name, {"gradient/log10_variance": variances})
    return rows


def show_gap(log_dir, n, draws):
    model = LinearGaussian()
    z = model.prior.sample((n,))
    x = model.likelihood(z).sample()
    evidence = model.log_evidence(x)
    print(f"3. a linear model: log p(x) = {evidence.mean():.3f} nats, mean of {n} x; for three q:")
    print("                 ELBO      gap   KL to p(z|x)   gap of IWAE with K = 10, 100, 1000")
    gaps = {}
    for name, q in approximations(model, x).items():
        elbo, kl = model.elbo(x, q), kl_divergence(q, model.posterior(x))
        torch.testing.assert_close(evidence - elbo, kl, rtol=1e-9, atol=1e-9)
        iwae = [
            (evidence - torch.stack([model.iwae(x, q, K) for _ in range(draws)]).mean(0)).mean()
            for K in (10, 100, 1000)
        ]
        gaps[name] = [gap.item() for gap in ((evidence - elbo).mean(), *iwae)]
        draw(log_dir / f"q_{name}", {"linear/gap": gaps[name]})
        shown = "   ".join(f"{gap:z7.4f}" for gap in gaps[name][1:])
        print(f"   {name:<9} {elbo.mean():9.3f} {gaps[name][0]:z8.3f} {kl.mean():z14.3f}   {shown}")
    return gaps


def show_betas(seed, log_dir, images, x, betas, steps, K=16):
    p = images.float().mean(0).flatten() / 255
    p = p.clamp(1e-4, 1 - 1e-4).expand(len(x), -1)
    alone = F.binary_cross_entropy(p, x.flatten(1), reduction="none").sum(1).mean().item()
    print(f"4. {K} units, {steps} steps, {len(x):,} test images: D, R, ELBO in nats, active units")
    print(f"   a mean image, no z {alone:7.1f} {0:7.1f} {-alone:8.1f} {0:4}")
    rows, curve, models = {}, {}, {}
    for beta in betas:
        with SummaryWriter(log_dir / f"beta_{beta:g}", purge_step=0) as writer:
            model = models[beta] = train_vae(images, beta, K, steps, seed, writer)
            row = rows[beta] = evaluate(model, x)
            draw_pictures(model, x, writer)
        curve[round(10 * row["rate"])] = row["distortion"]
        print(
            f"   beta {beta:<13g} {row['distortion']:7.1f} {row['rate']:7.1f} {row['elbo']:8.1f}"
            f" {row['active']:4}"
        )
    with SummaryWriter(log_dir / "curve", purge_step=0) as writer:
        for tenths, D in sorted(curve.items()):
            writer.add_scalar("rate/distortion", D, tenths)
    return {"alone": alone, "rows": rows, **show_bounds(models[1], x)}


def show_bounds(model, x):
    bounds = {k: model.iwae(x[:300], k).mean().item() for k in (1, 8, 64)}
    print("   beta 1, bound on log p(x) of 300 images with K weights: "
          + "   ".join(f"{k} {bound:.1f}" for k, bound in bounds.items()))  # fmt: skip
    mu, log_var = (values[0].detach() for values in model.encode(x[:1]))
    sigma = (log_var / 2).exp()
    samples = gradient_samples(lambda z: model.distortion(z, x[:1]), mu, sigma, 2000)
    through, score = (g.var(0).sum().item() for g in samples)
    print(f"   beta 1, d D / d mu of one image, variance summed over units: through z "
          f"{through:.2e}   REINFORCE {score:.2e}")  # fmt: skip
    return {"bounds": bounds, "variance": (through, score)}


def show_map(seed, log_dir, images, x, labels, steps):
    print(f"5. two units, {steps} steps: D, R, ELBO; their map is a picture")
    with SummaryWriter(log_dir / "latent_2", purge_step=0) as writer:
        model = train_vae(images, 1.0, 2, steps, seed, writer)
        writer.add_image("images/latent_map", latent_map(model, x, labels), 0)
    row = evaluate(model, x)
    print(f"   {row['distortion']:.1f} {row['rate']:.1f} {row['elbo']:.1f}")
    return row


def main(seed=0, log_dir=LOG_DIR, root=DATA, n=200_000, draws=10, steps=1500,
         betas=(32, 4, 1, 0.25), count=8000, test=1000, download=False):  # fmt: skip
    if download:  # first, since it may fail
        open_digits(root, download=True)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    show_kl(n)
    gradients = show_gradients(log_dir, n)
    gaps = show_gap(log_dir, 200, draws)
    images, _, line = open_digits(root, True, count)
    x, labels, _ = open_digits(root, False, test)
    print(line)
    images, x = images.to(device), toss(x[:test]).to(device)
    digits = show_betas(seed, log_dir, images, x, betas, steps)
    two = show_map(seed, log_dir, images, x, labels[:test], steps)
    return {"gradients": gradients, "gaps": gaps, "digits": digits, "two": two, "data": line}


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
