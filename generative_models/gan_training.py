"""A GAN can learn to draw samples of some groups of its data and leave out the other groups.

It is two networks that play against each other. The generator G makes samples out of noise z. The
discriminator D tells them from real data. Each is trained against the other; then G draws new data.
The groups that it leaves out are its lost modes: draw many samples and count. A penalty holds the
slope of D near 1, so that D shows G a direction everywhere. Here, in the same number of steps, all
GANs find all modes with a penalty of weight 1; they miss most with weight 10, or if D learns too
slowly. The price of the penalty: fewer samples lie close to a mode.

    D raises, G lowers   V = E_p[log D(x)] + E_q[log(1 - D(x))]
    saturating           G lowers E_q[log(1 - D(x))]: hardly any slope where D is sure of a fake
    non-saturating       G lowers E_q[-log D(x)]: full slope there
    Wasserstein          a score f, any number, takes the place of D, which lies between 0 and 1:
                         D raises E_p[f] - E_q[f], G raises E_q[f]
    penalty              lambda E[(|grad D(x)| - 1)^2] is added to D's loss, x between real and fake

    E_p, E_q  mean over real data, over what G draws    |grad D|  slope of what D's network gives
    lambda    weight of the penalty                     D(x)      probability that x is real

In code D's network gives the score f, or the logit a of D(x) = sigmoid(a).

Needs          nn_loss.py, nn_optim.py, 02_autograd_basics.py
Checked here   both slopes of G; modes that eight GANs find, with each loss, with and without the
               penalty, and with a D that learns too slowly
TensorBoard    samples/ring in samples: a row for each kind of GAN, a ring where all is found;
               ring/modes, ring/near by step in ns, wgan, ...: means over the eight GANs of a kind
Try            in main, write z=2 for z=8: do the non-saturating GANs still lose modes?
Answer         Most of them find all modes now. So the size of the noise matters, too
Source         Goodfellow et al. 2014, arXiv:1406.2661; Gulrajani et al. 2017 (penalty, lambda 10),
               arXiv:1704.00028, eq. 3; Fedus et al. 2018 (the penalty with other losses),
               arXiv:1710.08446; Metz et al. 2017 (the ring), arXiv:1611.02163
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
from torchvision.utils import make_grid
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "generative_models" / "gan_training"
CENTRES = torch.view_as_real(torch.polar(torch.ones(8), torch.arange(8) * math.pi / 4))
SIGMA = 0.05  # of the eight Gaussians, whose CENTRES (8, 2) lie on a circle of radius 1
BETAS = (0.5, 0.9)  # Adam's, as the authors of the penalty chose them


# --- 1. in everyday code -----------------------------------------------------------------------


def plain_train(G, D, draw_real, steps, z, lr=2e-3, batch=128):
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr, BETAS) for net in (G, D))
    for _ in range(steps):
        for _ in range(5):  # of logits a: log D = logsigmoid(a), log(1 - D) = logsigmoid(-a)
            real, fake = draw_real(batch), G(torch.randn(batch, z)).detach()
            loss = -F.logsigmoid(D(real)).mean() - F.logsigmoid(-D(fake)).mean()
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
        loss = -F.logsigmoid(D(G(torch.randn(batch, z)))).mean()
        opt_g.zero_grad()
        loss.backward()
        opt_g.step()


def ring(*shape):
    """Points (*shape, 2) of the eight Gaussians."""
    return CENTRES[torch.randint(8, shape)] + SIGMA * torch.randn(*shape, 2)


def count_modes(x):
    """Of samples (S, B, 2): modes that hold 1 % or more within 3 sigma, share within 3 sigma.

    (S,) integers, (S,) floats. Each sample belongs to the nearest of the eight CENTRES and is near
    if it is less than 3 SIGMA away. Exercise.
    """
    distance, mode = (x[:, :, None] - CENTRES.to(x.device)).norm(dim=-1).min(-1)  # (S, B)
    near = distance < 3 * SIGMA
    held = (F.one_hot(mode, 8) * near[..., None]).sum(1)  # (S, 8)
    return (100 * held >= x.size(1)).sum(1), near.float().mean(1)


def show_everyday(steps, z):
    print("1. In everyday code: does a GAN find the eight Gaussians of a ring? 2,000 samples each")
    print("   A mode is found if 1 % of the samples or more lie close to it: within 0.15")
    G = nn.Sequential(nn.Linear(z, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    D = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    samples, noise = {"real points": ring(2000)}, torch.randn(2000, z)
    samples["G, untrained"] = G(noise).detach()
    plain_train(G, D, ring, steps, z)
    samples["G, trained"] = G(noise).detach()
    first, x = " ".join(f"{number:.1f}" for number in noise[0].tolist()), samples["G, trained"][0]
    mode = CENTRES[(CENTRES - x).norm(dim=1).argmin()].round(decimals=2) + 0  # no -0.00
    (x_1, x_2), (c_1, c_2) = x.tolist(), mode.tolist()
    print(f"   noise {first} gives ({x_1:.2f}, {x_2:.2f}); nearest mode ({c_1:.2f}, {c_2:.2f})")
    print("                  modes found, of 8   share of samples close to a mode")
    found = {}
    for name, x in samples.items():
        modes, near = count_modes(x[None])
        found[name] = modes.item(), near.item()
        print(f"   {name:<12}   {modes.item():17}   {near.item():32.3f}")
    print(f"   -> modes that the trained G leaves out: {8 - found['G, trained'][0]} of 8")
    return found


# --- 2. the losses, of many GANs at once -------------------------------------------------------


class MLPs(nn.Module):
    """S networks side by side, each started as nn.Linear is: uniform within 1 / sqrt(inputs)."""

    def __init__(self, S, sizes):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            self.weights.append(torch.empty(S, a, b).uniform_(-1, 1) / math.sqrt(a))
            self.biases.append(torch.empty(S, 1, b).uniform_(-1, 1) / math.sqrt(a))

    def forward(self, x):
        """S networks side by side: (S, B, sizes[0]) -> (S, B, sizes[-1]), ReLU between.

        x W + b for each pair of self.weights (S, a, b) and self.biases (S, 1, b); the last has no
        ReLU. Exercise.
        """
        for i, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(b, x if i == 0 else x.relu(), W)
        return x


def gradient_penalty(D, x, y):
    """(S,): mean of (|grad D| - 1)^2 at random points between real x and fake y (S, B, n).

    u x + (1 - u) y with u uniform, one for each example (torch.rand_like). The result has a
    gradient by D's weights (create_graph=True). ValueError "real (shape) and fake (shape) are not
    of one shape". Exercise.
    """
    if x.shape != y.shape:
        raise ValueError(f"real {tuple(x.shape)} and fake {tuple(y.shape)} are not of one shape")
    u = torch.rand_like(x[..., :1])
    between = (u * x + (1 - u) * y).detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)
    return (grad.norm(dim=-1) - 1).square().mean(-1)


def discriminator_loss(D, x, y, loss, penalty):
    """(S,), to be lowered: mean fake minus real score for "wgan", else -V; plus the penalty.

    -V is the mean of softplus(-a) + softplus(b), a = D(x) and b = D(y) (S, B, 1) being logits.
    `penalty` times gradient_penalty(D, x, y) is added if penalty is not 0. Exercise.
    """
    a, b = D(x).squeeze(-1), D(y).squeeze(-1)  # logits, or scores
    terms = b - a if loss == "wgan" else F.softplus(-a) + F.softplus(b)
    return terms.mean(-1) + penalty * gradient_penalty(D, x, y) if penalty else terms.mean(-1)


def generator_loss(score, loss):
    """(S,) from the logits or scores (S, B, 1) of fakes: a mean over B.

    "ns": softplus(-a) = -log D; "saturating": -softplus(a) = log(1 - D); "wgan": -a. Exercise.
    """
    terms = {"ns": F.softplus(-score), "saturating": -F.softplus(score), "wgan": -score}[loss]
    return terms.mean((-2, -1))


def minimise(optimizer, losses):
    """One step for S losses (S,): their sum has each one's gradient."""
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()


def train_step(G, D, opt_g, opt_d, loss, penalty, d_per_g, batch):
    """d_per_g steps of D and one of G, for S GANs at once."""
    S, z = G.weights[0].shape[:2]
    for _ in range(d_per_g):
        with torch.no_grad():
            x, y = ring(S, batch), G(torch.randn(S, batch, z))
        minimise(opt_d, discriminator_loss(D, x, y, loss, penalty))
    minimise(opt_g, generator_loss(D(G(torch.randn(S, batch, z))), loss))


def show_losses():
    print("2. Does G still learn where D is sure of a fake? Slope of G's loss, d loss / d a")
    print("   a: what D's network gives: a score for Wasserstein, else D(fake) = sigmoid(a)")
    print("         a   D(fake)   saturating   non-saturating   Wasserstein")
    d, found = torch.tensor([0.5, 0.1, 0.001]).double(), {}
    for loss in ("saturating", "ns", "wgan"):
        a = d.logit().view(3, 1, 1).requires_grad_()
        (slope,) = torch.autograd.grad(generator_loss(a, loss).sum(), a)
        found[loss] = slope.flatten().tolist()
    for i, share in enumerate(d.tolist()):
        sat, ns, wgan = (column[i] for column in found.values())
        print(f"   {a[i].item():7.2f} {share:9.3f}   {sat:10.3f}   {ns:14.3f}   {wgan:11.3f}")
    best, other = ("non-saturating", "saturating")[:: 1 if ns < sat else -1]
    print(f"   -> where D is sure ({share:.3f}), G learns more by {best}: slope "
          f"{min(ns, sat):.3f}, {other} {max(ns, sat):.3f}")  # fmt: skip
    return found


# --- 3. which modes are found ------------------------------------------------------------------


def train_gans(writer, S, loss, penalty=0.0, steps=400, d_per_g=5, lr_g=2e-3, lr_d=2e-3, z=8,
               batch=128):  # fmt: skip
    """Train S GANs on the ring: 2,000 samples of each (S, 2000, 2)."""
    G, D = MLPs(S, (z, 64, 64, 2)), MLPs(S, (2, 64, 64, 1))
    opt_g = torch.optim.Adam(G.parameters(), lr_g, BETAS)
    opt_d = torch.optim.Adam(D.parameters(), lr_d, BETAS)
    for step in tqdm(range(steps + 1), desc=Path(writer.log_dir).name, leave=False, disable=None):
        if step % max(1, steps // 10) == 0 or step == steps:
            with torch.no_grad():
                samples = G(torch.randn(S, 2000, z))
            modes, near = count_modes(samples)
            writer.add_scalar("ring/modes", modes.float().mean(), step)
            writer.add_scalar("ring/near", near.mean(), step)
        if step < steps:
            train_step(G, D, opt_g, opt_d, loss, penalty, d_per_g, batch)
    return samples


SLOW = {"d_per_g": 1, "lr_d": 2e-4}  # D learns a fifth as often, at a tenth of the rate
SETTINGS = {  # run: kind, arguments of train_gans
    "ns": ("non-saturating", {"loss": "ns"}),
    "wgan": ("Wasserstein", {"loss": "wgan"}),
    "ns_penalty": ("non-saturating, penalty 1", {"loss": "ns", "penalty": 1.0}),
    "wgan_penalty": ("Wasserstein, penalty 1", {"loss": "wgan", "penalty": 1.0}),
    "wgan_penalty_10": ("Wasserstein, penalty 10", {"loss": "wgan", "penalty": 10.0}),
    "slow_d": ("non-saturating, slow D", {"loss": "ns", **SLOW}),
    "slow_d_penalty": ("Wasserstein, penalty 1, slow D", {"loss": "wgan", "penalty": 1.0, **SLOW}),
}


def show_ring(seed, log_dir, gans, steps, z):
    print(f"3. Which GANs find all modes? {gans} of each kind, {steps} steps of G")
    print("   (slow D: it learns a fifth as often, at a tenth of the rate)")
    print("   kind                             modes found by each, of 8   share close to a mode")
    angle = 2 * math.pi * torch.rand(1, 2000)
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)  # finds all, and knows no mode
    samples = {"real points": ring(1, 2000), "points of a whole circle": circle}
    for run, (kind, settings) in SETTINGS.items():
        torch.manual_seed(seed)
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            samples[kind] = train_gans(writer, gans, steps=steps, z=z, **settings)
    found, words, full = {}, {}, {}
    for kind, x in samples.items():
        modes, near = count_modes(x)
        found[kind] = modes.tolist(), near.mean().item()
        full[kind] = near[modes == 8].mean().item()  # of the GANs that find all
        words[kind] = " ".join(map(str, found[kind][0]))
        print(f"   {kind:<30}   {words[kind]:<25}   {found[kind][1]:21.3f}")
    kinds, least = [kind for kind, _ in SETTINGS.values()], found["points of a whole circle"][1]
    whole = [kind for kind in kinds if min(found[kind][0]) == 8]
    lost = [kind for kind in kinds if found[kind][1] < least]
    print(f"   -> all {gans} GANs find all modes: {'; '.join(whole) or 'with no kind'}")
    print("   -> a circle finds all 8, too, so look at the share: it is below the circle's for",
          *(lost or ["no kind"]), sep="\n      ")  # fmt: skip
    (_, bare), (_, paid) = found[kinds[0]], found[kinds[2]]
    print(f"   -> share, non-saturating: {bare:.2f} without penalty, {paid:.2f} with penalty 1")
    print(f"      without penalty, the GANs that find all 8 alone: {full[kinds[0]]:.2f}")
    with SummaryWriter(log_dir / "samples", purge_step=0) as writer:
        rows = {f"{kind}: {words[kind]} modes": samples[kind] for kind in kinds}
        writer.add_image("samples/ring", panels(rows), 0, dataformats="HWC")
    return found


# --- pictures and the lesson -------------------------------------------------------------------


def panels(rows, side=96, top=18):
    """(H, W, 3) uint8: {words: clouds (S, B, 2)}, a row of each, on [-1.5, 1.5]^2, under its words.

    Points are light on black, the words black on white.
    """
    limits, font, strips = ((-1.5, 1.5), (-1.5, 1.5)), ImageFont.load_default(12), []
    for words, clouds in rows.items():
        cells = [np.histogram2d(-x[:, 1], x[:, 0], side, limits)[0].clip(0, 1) for x in clouds]
        cells = torch.from_numpy(np.stack(cells))[:, None]
        grid = make_grid(cells, len(cells), padding=1, pad_value=0.3)[0]
        strip = Image.new("RGB", (grid.size(1), grid.size(0) + top), "white")
        strip.paste(Image.fromarray((255 * grid).byte().numpy()), (0, top))
        ImageDraw.Draw(strip).text((4, 2), words, "black", font)
        strips.append(np.asarray(strip))
    return np.concatenate(strips)


def main(seed=0, log_dir=LOG_DIR, gans=8, steps=400, z=8):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(steps, z),
        "losses": show_losses(),
        "ring": show_ring(seed, log_dir, gans, steps, z),
    }
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
