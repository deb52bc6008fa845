"""Two networks that play against each other learn to draw new data, but not always all of it.

That is a GAN. The generator G makes samples out of noise z, the discriminator D tries to tell them
from real data, and each is trained against the other. G then draws a sample in one step. What goes
wrong: G leaves out whole groups of the data, its lost modes. No loss shows that: count them. Here a
gradient penalty on D keeps all modes. The price: fewer samples lie close to a mode.

    D raises, G lowers   V = E_p[log D(x)] + E_q[log(1 - D(x))]
    saturating           G lowers E_q[log(1 - D(x))]: hardly any slope where D is sure of a fake
    non-saturating       G lowers E_q[-log D(x)]: full slope there
    Wasserstein          a score f takes the place of D, without bounds: D raises E_p[f] - E_q[f],
                         G raises E_q[f]
    penalty              lambda E[(|grad D(x)| - 1)^2] is added to D's loss, x between real and fake

    E_p, E_q  mean over real data, over what G draws    |grad D|  slope of D, or f, at x
    lambda    weight of the penalty                     D(x)      probability that x is real

Needs          nn_loss.py, nn_optim.py, 02_autograd_basics.py
Checked here   both slopes of G; modes that eight GANs find, with each loss, with and without the
               penalty, and with a D that learns too slowly
TensorBoard    samples/ring in samples: a row for each kind of GAN; ring/modes, ring/near by step
               in ns, wgan, ...: with a penalty of 1 all modes are found, one after another
Try            in main, write z=2 for z=8: which GANs without penalty find more modes now?
Answer         those with the non-saturating loss: most of them find all; so the noise matters, too
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
    of_g, of_d = (torch.optim.Adam(net.parameters(), lr, BETAS) for net in (G, D))
    for _ in range(steps):
        for _ in range(5):  # D gives logits: log D = logsigmoid(D(x)), log(1 - D): of -D(x)
            real, fake = draw_real(batch), G(torch.randn(batch, z)).detach()
            loss = -F.logsigmoid(D(real)).mean() - F.logsigmoid(-D(fake)).mean()
            of_d.zero_grad()
            loss.backward()
            of_d.step()
        loss = -F.logsigmoid(D(G(torch.randn(batch, z)))).mean()
        of_g.zero_grad()
        loss.backward()
        of_g.step()


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


def show_everyday(steps, z=8):
    print("1. In everyday code: does a GAN find the eight Gaussians of a ring? 2,000 samples each")
    G = nn.Sequential(nn.Linear(z, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    D = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    samples, noise = {"real points": ring(2000)}, torch.randn(2000, z)
    samples["G, untrained"] = G(noise).detach()
    plain_train(G, D, ring, steps, z)
    samples["G, trained"] = G(noise).detach()
    z_0, (x, y) = noise[0].tolist(), samples["G, trained"][0].tolist()
    print(f"   from noise {' '.join(f'{number:.1f}' for number in z_0)} comes ({x:.2f}, {y:.2f})")
    print("                  modes found, of 8   share close (within 0.15) to a mode")
    found = {}
    for name, x in samples.items():
        modes, near = count_modes(x[None])
        found[name] = modes.item(), near.item()
        print(f"   {name:<12}   {modes.item():17}   {near.item():35.3f}")
    print(f"   -> modes that the trained G leaves out: {8 - found['G, trained'][0]} of 8")
    return found


# --- 2. the losses, of many GANs at once -------------------------------------------------------


class MLPs(nn.Module):
    """S networks side by side, each as nn.Linear starts it: even within 1 / sqrt(inputs)."""

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


def train_step(G, D, of_g, of_d, loss, penalty, d_per_g, batch):
    """d_per_g steps of D and one of G, for S GANs at once."""
    S, z = G.weights[0].shape[:2]
    for _ in range(d_per_g):
        with torch.no_grad():
            x, y = ring(S, batch), G(torch.randn(S, batch, z))
        minimise(of_d, discriminator_loss(D, x, y, loss, penalty))
    minimise(of_g, generator_loss(D(G(torch.randn(S, batch, z))), loss))


def show_losses():
    print("2. Does G still learn where D is sure of a fake? Slope of G's loss by a, D = sigmoid(a)")
    print("   D(fake)   saturating   non-saturating   Wasserstein (a is the score)")
    d, found = torch.tensor([0.5, 0.1, 0.001]).double(), {}
    for loss in ("saturating", "ns", "wgan"):
        a = d.logit().view(3, 1, 1).requires_grad_()
        (slope,) = torch.autograd.grad(generator_loss(a, loss).sum(), a)
        found[loss] = slope.flatten().tolist()
    for i, share in enumerate(d.tolist()):
        sat, ns, wgan = (column[i] for column in found.values())
        print(f"   {share:7.3f}   {sat:10.3f}   {ns:14.3f}   {wgan:11.3f}")
    best = min(("saturating", "ns"), key=lambda loss: found[loss][2])
    print(f"   -> where D is sure, take: {'non-saturating' if best == 'ns' else best}")
    return found


# --- 3. which modes are found ------------------------------------------------------------------


def train_gans(writer, S, loss, penalty=0.0, steps=600, d_per_g=5, lr_g=2e-3, lr_d=2e-3, z=8,
               batch=128):  # fmt: skip
    """Train S GANs on the ring: 2,000 samples of each (S, 2000, 2)."""
    G, D = MLPs(S, (z, 64, 64, 2)), MLPs(S, (2, 64, 64, 1))
    of_g = torch.optim.Adam(G.parameters(), lr_g, BETAS)
    of_d = torch.optim.Adam(D.parameters(), lr_d, BETAS)
    for step in tqdm(range(steps + 1), desc=Path(writer.log_dir).name, leave=False, disable=None):
        if step % max(1, steps // 10) == 0 or step == steps:
            with torch.no_grad():
                samples = G(torch.randn(S, 2000, z))
            modes, near = count_modes(samples)
            writer.add_scalar("ring/modes", modes.float().mean(), step)
            writer.add_scalar("ring/near", near.mean(), step)
        if step < steps:
            train_step(G, D, of_g, of_d, loss, penalty, d_per_g, batch)
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
    print("   kind                             modes found by each, of 8   share close to a mode")
    angle = 2 * math.pi * torch.rand(1, 2000)
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)  # finds all, and knows no mode
    samples = {"real points": ring(1, 2000), "points of a whole circle": circle}
    for run, (kind, settings) in SETTINGS.items():
        torch.manual_seed(seed)
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            samples[kind] = train_gans(writer, gans, steps=steps, z=z, **settings)
    found = {}
    for kind, x in samples.items():
        modes, near = count_modes(x)
        found[kind] = modes.tolist(), near.mean().item()
        print(f"   {kind:<30}   {' '.join(map(str, found[kind][0])):<25}   {found[kind][1]:21.3f}")
    kinds = [kind for kind, _ in SETTINGS.values()]
    whole = [kind for kind in kinds if min(found[kind][0]) == 8]
    print(f"   -> all {gans} GANs find all modes: {'; '.join(whole) or 'with no kind'}")
    bare, paid = found[kinds[0]][1], found[kinds[2]][1]
    print(f"   -> share near a mode, non-saturating: {bare:.2f}; with penalty 1: {paid:.2f}")
    with SummaryWriter(log_dir / "samples", purge_step=0) as writer:
        picture = panels({kind: samples[kind] for kind in kinds})
        writer.add_image("samples/ring", picture, 0, dataformats="HWC")
    return found


# --- pictures and the lesson -------------------------------------------------------------------


def panels(rows, side=96):
    """(H, W, 3) uint8: a row for each kind of {kind: clouds (S, B, 2)}, on [-1.5, 1.5] squared."""
    limits, cells = ((-1.5, 1.5), (-1.5, 1.5)), []
    for x in torch.cat(list(rows.values())):
        cells.append(np.histogram2d(-x[:, 1], x[:, 0], side, limits)[0].clip(0, 1))
    S = len(cells) // len(rows)
    grid = make_grid(torch.from_numpy(np.stack(cells))[:, None], S, padding=1, pad_value=0.3)[0]
    image = Image.new("RGB", (grid.size(1), grid.size(0) + 20), "white")
    image.paste(Image.fromarray((255 * grid).byte().numpy()), (0, 20))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    draw.text((3, 2), "Each row: GANs of one kind. Light: a sample", "black", font)
    for i, kind in enumerate(rows):
        draw.text((4, 22 + (side + 1) * i), kind, "orange", font)
    return np.asarray(image)


def main(seed=0, log_dir=LOG_DIR, gans=8, steps=500, z=8):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(steps),
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
