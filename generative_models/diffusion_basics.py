"""A network that has only learned to guess noise can make new data out of pure noise.

That is a diffusion model. Training adds noise to data and asks a network for that noise. Sampling
starts from noise alone. In each of T steps it takes a little of the guessed noise away; most
samplers then add a little fresh noise. You need it to draw new samples of your data, also of one
class. Fewer steps are faster, but compute their coefficients anew: with those of the T steps,
most of the noise stays.

    forward    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) eps        A_t: alpha-bar_t in the papers
    training   lower the mean of (eps - guess(x_t, t))^2 over data x_0, noise eps and t = 1 ... T
    step back  x_s for s < t, if x_0 is known; with a = A_t / A_s it is Gaussian:
               mean      (sqrt(A_s) (1 - a) x_0 + sqrt(a) (1 - A_s) x_t) / (1 - A_t)
               variance  (1 - a) (1 - A_s) / (1 - A_t)
    samplers   take x_0 from the guess of eps. tilde: this mean, noise of this variance; beta
               (Algorithm 2): of variance 1 - a; ddim: sqrt(A_s) x_0 + sqrt(1 - A_s) eps, no noise
    guidance   guess(x_t, t) + w (guess(x_t, t, class) - guess(x_t, t)); the paper's w is w - 1

    x_t  data after t of T noisy steps     eps  noise from N(0, I)     w  strength of the guidance
    A_t  product of 1 - beta_1 ... 1 - beta_t; beta_t is the variance of the noise of step t

Needs          nn_module.py, nn_optim.py
Checked here   sample = denoise with all T steps; tilde, beta, ddim and a mistake in few steps;
               digits by class beside real ones
TensorBoard    ring/from_noise, digits/from_noise: noise becomes data, from left to right;
               train/loss in ring (0.22 is the least possible), digits; schedule/log10_snr by t
Try            in show_fewer_steps, write few=5 for few=50: which sampler is still good?
Answer         none: fewer than half of the points come near a centre, with each of them
Source         Ho et al. 2020 (DDPM), arXiv:2006.11239, Algorithms 1, 2; Song et al. 2021 (DDIM),
               arXiv:2010.02502, eq. 12; Nichol & Dhariwal 2021 (cosine), arXiv:2102.09672, eq. 17;
               Salimans & Ho 2022 (v), 2202.00512; Ho & Salimans 2022 (guidance), 2207.12598, eq. 6
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
from torchvision.utils import make_grid
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "generative_models" / "diffusion_basics"
DATA = Path(__file__).resolve().parents[1] / "data"
T, NO_CLASS = 1000, 10  # steps; the class "none"
CENTRES = torch.view_as_real(torch.polar(torch.full((8,), 2.0), torch.arange(8) * math.pi / 4))
SIGMA = 0.1  # of the eight Gaussians, whose CENTRES (8, 2) lie on a circle of radius 2


# --- 1. in everyday code -----------------------------------------------------------------------


def train_step(model, optimizer, A, x_0, *label):
    """DDPM's Algorithm 1: one step on data x_0 (B, n), with labels (B,) if any; its loss, a float.

    t by torch.randint, even on 1 ... T (A is (T + 1,)); eps by torch.randn_like; x_t by the forward
    formula; the loss is the mean of (eps - model(x_t, t, *label))^2. Exercise.
    """
    t = torch.randint(1, len(A), (len(x_0),), device=x_0.device)
    A_t, eps = A[t][:, None], torch.randn_like(x_0)
    x_t = A_t.sqrt() * x_0 + (1 - A_t).sqrt() * eps
    loss = F.mse_loss(model(x_t, t, *label), eps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def sample(model, x, beta):
    """DDPM's Algorithm 2: data from noise x (B, n), for beta (T + 1,), where beta[0] is 0.

    For t = T ... 1, with A = (1 - beta).cumprod(0) and eps = model(x, t), t as (B,) integers:
    (x - beta_t / sqrt(1 - A_t) eps) / sqrt(1 - beta_t) + sqrt(beta_t) torch.randn_like(x); the last
    step, t = 1, adds no noise. Exercise.
    """
    A = (1 - beta).cumprod(0)
    for t in range(len(beta) - 1, 0, -1):
        eps = model(x, torch.full((len(x),), t, device=x.device))
        x = (x - beta[t] / (1 - A[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
        if t > 1:
            x = x + beta[t].sqrt() * torch.randn_like(x)
    return x


class Net(nn.Module):
    """The guess of eps from x (B, n) and t (B,), for a class `label` (B,) or for none.

    The last layer gives v = sqrt(A) eps - sqrt(1 - A) x_0, so that eps = sqrt(A) v + sqrt(1 - A) x.
    Where A is near 0, x_0 from a guess of eps is divided by almost 0; from a guess of v it is not.
    """

    def __init__(self, n, width, A):
        super().__init__()
        self.register_buffer("A", A)  # moves with the network, is not trained
        self.label = nn.Embedding(NO_CLASS + 1, 32)
        self.first, self.last = nn.Linear(n + 64, width), nn.Linear(width, n)
        self.middle = nn.ModuleList(nn.Linear(width + 64, width) for _ in range(2))

    def forward(self, x, t, label=None):
        label = torch.full_like(t, NO_CLASS) if label is None else label
        # e: the time t as sines and cosines of many periods, and the class
        angle = t[:, None] * 1e4 ** (-torch.arange(16, device=t.device) / 16)
        e = torch.cat([angle.sin(), angle.cos(), self.label(label)], dim=1)  # (B, 64)
        h = self.first(torch.cat([x, e], dim=1))
        for layer in self.middle:
            h = h + layer(torch.cat([F.silu(h), e], dim=1))
        v, A = self.last(F.silu(h)), self.A[t][:, None]
        return A.sqrt() * v + (1 - A).sqrt() * x


def fit(model, batch, A, steps, rate, writer):
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in tqdm(range(steps), leave=False, disable=None):
        loss = train_step(model, optimizer, A, *batch())
        schedule.step()
        if step % 20 == 0:
            writer.add_scalar("train/loss", loss, step)


def ring(n):
    """n points (n, 2) of eight Gaussians on a circle of radius 2."""
    return CENTRES[torch.randint(8, (n,))] + SIGMA * torch.randn(n, 2)


def near(x):
    """Of points (n, 2): share within 3 SIGMA of a centre; centres that have 2 % or more of them."""
    distance, centre = torch.cdist(x, CENTRES).min(1)
    held = centre[distance < 3 * SIGMA].bincount(minlength=8) / len(x)
    return held.sum().item(), int((held >= 0.02).sum())


def show_everyday(log_dir, steps, n):
    print("1. In everyday code: does noise become points of a ring of eight Gaussians?")
    beta = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, T)])  # beta[t], t = 0 ... T
    A = (1 - beta).cumprod(0)
    model, noise = Net(2, 128, A), torch.randn(n, 2)
    points = {"noise": noise, "untrained network": sample(model, noise, beta)}
    with SummaryWriter(log_dir / "ring", purge_step=0) as writer:
        fit(model, lambda: (ring(512),), A, steps, 5e-3, writer)
    points |= {"trained network": sample(model, noise, beta), "real points": ring(n)}
    print("   noise in           point out          nearest centre     distance")
    for before, after in zip(noise[:3], points["trained network"][:3], strict=True):
        centre = CENTRES[(CENTRES - after).norm(dim=1).argmin()]
        shown = [(p.round(decimals=2) + 0).tolist() for p in (before, after, centre)]  # no -0.00
        shown = "   ".join(f"({p[0]:6.2f}, {p[1]:6.2f})" for p in shown)
        print(f"   {shown}   {(after - centre).norm():8.2f}")
    print(f"   {n:,} points         share within 0.3 of a centre   centres found, of 8")
    found = {name: near(x) for name, x in points.items()}
    for name, (share, held) in found.items():
        print(f"   {name:<17} {share:32.3f} {held:21}")
    before, after = found["untrained network"][0], found["trained network"][0]
    print(f"   -> training raises the share near a centre from {before:.2f} to {after:.2f}")
    return model, beta, found


# --- 2. fewer steps ----------------------------------------------------------------------------


def convert(kind, out, x_t, A):
    """(x_0, eps, v) from x_t and one of them, `out`: kind is "x_0", "eps" or "v".

    x_t = sqrt(A) x_0 + sqrt(1 - A) eps; v = sqrt(A) eps - sqrt(1 - A) x_0: networks are trained to
    guess any of the three. ValueError "kind must be x_0, eps or v, not 'kind'". Exercise.
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
    """Mean and variance of x_s, s < t, where x_t and x_0 are known.

    With a = A_t / A_s: mean (sqrt(A_s) (1 - a) x_0 + sqrt(a) (1 - A_s) x_t) / (1 - A_t), variance
    (1 - a) (1 - A_s) / (1 - A_t). Exercise.
    """
    a = A_t / A_s
    mean = (A_s**0.5 * (1 - a) * x_0 + a**0.5 * (1 - A_s) * x_t) / (1 - A_t)
    return mean, (1 - a) * (1 - A_s) / (1 - A_t)


@torch.no_grad()
def denoise(predict, x, pairs, A, sampler, limit=None, seen=()):
    """From x_t to x_s for each of the pairs (t, s), eps = predict(x, t): the last x, {t: x_t}.

    x_0 follows from eps by convert; limit clips it to -limit ... limit, as for pixels, and eps then
    follows from x_0. Sampler "ddim": x_s = sqrt(A_s) x_0 + sqrt(1 - A_s) eps. "tilde": the mean of
    the posterior plus the root of its variance times torch.randn_like(x), but no noise where s = 0;
    "beta": the same with variance 1 - A_t / A_s. x_t is kept for each t in `seen`. Exercise.
    """
    kept = {}
    for t, s in pairs:
        if t in seen:
            kept[t] = x
        x_0, eps, _ = convert("eps", predict(x, t), x, A[t])
        if limit is not None:
            x_0, eps, _ = convert("x_0", x_0.clamp(-limit, limit), x, A[t])
        if sampler == "ddim":
            x = A[s] ** 0.5 * x_0 + (1 - A[s]) ** 0.5 * eps
        else:
            x, variance = posterior(x_0, x, A[t], A[s])
            if s > 0:
                variance = 1 - A[t] / A[s] if sampler == "beta" else variance
                x = x + variance**0.5 * torch.randn_like(x)
    return x, kept


def spaced(T, steps):
    """T ... 0 in `steps` steps, as even as integers are: a list of steps + 1 integers."""
    if not 1 <= steps <= T:
        raise ValueError(f"1 to {T} steps, not {steps}")
    return torch.linspace(T, 0, steps + 1).round().int().tolist()


def show_fewer_steps(log_dir, model, beta, n, few=50):
    print(f"2. Do {few} steps do instead of {T:,}? {n:,} points: a share varies by "
          f"{math.sqrt(0.09 / n):.2f}")  # fmt: skip
    A, noise, times, found = (1 - beta).cumprod(0), torch.randn(n, 2), spaced(T, few), {}
    state = torch.get_rng_state()  # every row gets the same noise
    every, jumps = list(pairwise(range(T, -1, -1))), list(pairwise(times))
    wrong = [(t, t - 1) for t in times[:-1]]  # jumps with the coefficients of one of the T steps
    seen = (T, 600, 400, 300, 200, 100, 50, 20)
    print("   sampler                           steps   share near a centre   centres found, of 8")
    for name, sampler, pairs in (
        ("beta: variance 1 - a", "beta", every), ("beta", "beta", jumps),
        ("tilde: variance if x_0 is known", "tilde", jumps), ("ddim: no noise", "ddim", jumps),
        ("mistake: A_s of step t - 1", "beta", wrong),
    ):  # fmt: skip
        torch.set_rng_state(state)
        x, kept = denoise(predictor(model), noise, pairs, A, sampler, seen=seen)
        share, held = found[name] = near(x)
        print(f"   {name:<31} {len(pairs):7}   {share:19.3f}   {held:19}")
        if pairs is every:
            frames = [*kept.values(), x, ring(n)]
            torch.set_rng_state(state)
            off = (sample(model, noise, beta) - x).abs().max().item()
    print("   sample() of section 1, from the same noise, gives the points of the first row: "
          f"largest\n   difference {off:.0e}")  # fmt: skip
    full, by_beta, tilde, ddim, wrong = (share for share, _ in found.values())
    print(f"   -> near a centre: {T:,} steps {full:.2f}; {few} steps: tilde {tilde:.2f}, ddim "
          f"{ddim:.2f}, beta {by_beta:.2f},\n      with coefficients of single steps {wrong:.2f}: "
          "compute a = A_t / A_s for the steps you take")  # fmt: skip
    words = f"Points at t = {', '.join(map(str, seen))} and 0: from noise to the ring. Last: real"
    with SummaryWriter(log_dir / "ring") as writer:  # section 1's run goes on
        writer.add_image("ring/from_noise", caption(panels(frames), words), 0, dataformats="HWC")
    return found, off


# --- 3. digits, by class -----------------------------------------------------------------------


def cosine_schedule(T=1000, s=0.008):
    """A (T + 1,) in float64: f(t) / f(0), f = cos^2 of the turn (t / T + s) / (1 + s) pi / 2.

    No beta = 1 - f(t) / f(t - 1) is above 0.999. Exercise.
    """
    turn = (torch.arange(T + 1).double() / T + s) / (1 + s) * math.pi / 2
    f = turn.cos().square()
    return F.pad((f[1:] / f[:-1]).clamp(min=0.001).cumprod(0), (1, 0), value=1.0)


def predictor(model, *labels, w=0):
    """predict(x, t), one t for all: the model's guess, with guidance w if labels (B,) are given."""

    def predict(x, t):
        t = torch.full((len(x),), t, device=x.device)
        free = model(x, t)
        return free + w * (model(x, t, *labels) - free) if labels else free

    return predict


def show_digits(log_dir, images, labels, beta, steps, each, sample_steps, device):
    print(f"3. Do digits come as asked? {sample_steps} steps, tilde; w: strength of guidance")
    for name, A in (("linear", (1 - beta).cumprod(0)), ("cosine", cosine_schedule(T).float())):
        print(f"   {name} schedule: x_t has less than 0.1 x_0 in {(A < 0.01).sum()} of {T:,} steps")
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for t in range(10, T + 1, 10):
                writer.add_scalar("schedule/log10_snr", (A[t] / (1 - A[t])).log10(), t)
    A, x_0 = A.to(device), F.avg_pool2d(images / 127.5 - 1, 2).flatten(1)  # (N, 196) in [-1, 1]
    real, x_0 = x_0.to(device).tensor_split([10 * each])
    real_labels, labels = labels.to(device).tensor_split([10 * each])

    def batch():
        i = torch.randint(len(x_0), (128,), device=device)
        dropped = torch.rand(128, device=device) < 0.15  # it learns to guess without class, too
        return x_0[i], labels[i].masked_fill(dropped, NO_CLASS)

    model = Net(x_0.size(1), 512, A).to(device)
    with SummaryWriter(log_dir / "digits", purge_step=0) as writer:
        fit(model, batch, A, steps, 2e-3, writer)
    asked, noise = torch.arange(10, device=device).repeat_interleave(each), torch.randn_like(real)
    times, samples = spaced(T, sample_steps), [("real", real, real_labels), ("noise", noise, asked)]
    seen = times[:: max(1, sample_steps // 8)][:8]
    for w in (0, 1, 3):
        predict = predictor(model, asked, w=w)
        x, kept = denoise(predict, noise, pairwise(times), A, "tilde", 1.0, seen)
        samples.append((f"w = {w}", x, asked))
        way = torch.stack([x_t[::each] for x_t in kept.values()], dim=1)  # (10, 8, 196)
        rows = torch.cat([way, x.unflatten(0, (10, each))], dim=1).reshape(-1, 1, 14, 14)
        grid = make_grid(rows.clamp(-1, 1) / 2 + 0.5, len(seen) + each, padding=1)[0].cpu()
        words = f"Row: the digit asked for, guidance w = {w}. Light: ink. The first "
        words += f"{len(seen) + 1} columns: noise becomes a digit. Then: other samples"
        with SummaryWriter(log_dir / f"guidance_{w}", purge_step=0) as writer:
            writer.add_image("digits/from_noise", caption(grid, words, 3), 0, dataformats="HWC")
    means = torch.stack([x_0[labels == k].mean(0) for k in range(10)])[asked]
    samples.insert(1, ("class means", means, asked))
    print("   as asked: the training image nearest to it is of the digit asked for")
    print("   images        as asked   distance to that image   variance of a digit, all pixels")
    found = {}
    for name, x, wanted in samples:
        far, nearest = torch.cdist(x, x_0).min(1)
        right, far = (labels[nearest] == wanted).float().mean().item(), far.mean().item()
        within = torch.stack([x[wanted == k].var(0).sum() for k in range(10)]).mean().item()
        found[name] = right, far, within
        print(f"   {name:<11}   {right:8.3f}   {far:22.2f}   {within:31.1f}")
    (one, _, v1), (three, _, v3), (_, _, v) = found["w = 1"], found["w = 3"], found["real"]
    print(f"   -> from w = 1 to 3: as asked {one:.2f} to {three:.2f}, variance {v1 / v:.0%} to "
          f"{v3 / v:.0%} of real")  # fmt: skip
    return found


# --- pictures and digits -----------------------------------------------------------------------


def panels(frames, side=128):
    """(H, W) from clouds (B, 2) side by side, each on [-3.5, 3.5] squared; light: a point."""
    limits = (-3.5, 3.5), (-3.5, 3.5)
    counts = [np.histogram2d(-x[:, 1], x[:, 0], side, limits)[0] for x in frames]
    found = torch.from_numpy(np.stack(counts))[:, None].clamp(0, 1)
    return make_grid(found, len(frames), padding=1, pad_value=0.3)[0]


def caption(picture, words, scale=1):
    """(H, W) in [0, 1] -> (H', scale W, 3) uint8: enlarged, under lines of words."""
    top = 16 * (words.count("\n") + 1) + 6
    cells = Image.fromarray((255 * picture).byte().numpy())
    cells = cells.resize((scale * cells.width, scale * cells.height), Image.Resampling.NEAREST)
    image = Image.new("RGB", (cells.width, cells.height + top), "white")
    image.paste(cells, (0, top))
    ImageDraw.Draw(image).text((3, 2), words, "black", ImageFont.load_default(13))
    return np.asarray(image)


def draw_digits(n):
    """Images (n, 28, 28) uint8 and labels (n,): a font's digits, moved, sized, turned, bold."""
    fonts, images = [ImageFont.load_default(size) for size in range(24, 29)], []
    dice = torch.rand(n, 5).tolist()
    for i, (right, down, size, turn, bold) in enumerate(dice):
        image, font = Image.new("L", (28, 28)), fonts[int(size * len(fonts))]
        ImageDraw.Draw(image).text((13 + 2 * right, 13 + 2 * down), str(i % 10), 255, font,
                                   anchor="mm", stroke_width=int(2 * bold))  # fmt: skip
        images.append(np.asarray(image.rotate(20 * turn - 10, Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(images)), torch.arange(n) % 10


def open_digits(root, count, download):
    """Images (N, 28, 28) uint8, labels (N,), a line on them: MNIST if it lies there, or drawn."""
    raw, run = Path(root, "MNIST", "raw"), "python generative_models/diffusion_basics.py --download"
    if not download and not any(raw.glob("*-ubyte*")):
        return *draw_digits(count), f"data: {count:,} drawn digits; for the real MNIST: {run}"
    try:
        mnist = MNIST(root, download=download)
    except Exception as error:  # torchvision has a dozen ways to say no
        why = " ".join(str(error).split())
        raise OSError(f"{raw} holds no whole MNIST ({why}): delete it, then {run}") from error
    return mnist.data, mnist.targets, f"data: MNIST, {len(mnist.data):,} images"


def main(seed=0, log_dir=LOG_DIR, root=DATA, points=1000, ring_steps=3000, steps=2000, each=12,
         sample_steps=40, count=8000, download=False):  # fmt: skip
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    images, labels, line = open_digits(root, count, download)
    model, beta, everyday = show_everyday(log_dir, ring_steps, points)
    fewer, off = show_fewer_steps(log_dir, model, beta, points)
    print(line)
    digits = show_digits(log_dir, images, labels, beta, steps, each, sample_steps, device)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return {"everyday": everyday, "model": model, "fewer": fewer, "off": off, "digits": digits}


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
