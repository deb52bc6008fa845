"""A gradient penalty, not the Wasserstein loss, keeps a GAN on all eight modes of a ring.

    min over G, max over D of  V = E_p[log D(x)] + E_q[log(1 - D(x))]      q: what G generates
    best D          D* = p / (p + q),  V(D*) = 2 JSD(p, q) - log 4: least where q = p, -log 4
    saturating      G lowers E[log(1 - D)]: a sample is pushed by D da/dx, a being D's logit
    non-saturating  G lowers E[-log D]: by (1 - D) da/dx, alive where D wins (D -> 0 on fakes)
    WGAN-GP         f raises E_p[f] - E_q[f] - lambda E[(|grad f| - 1)^2], the last on points
                    between real and fake, and without it f has no bound; G raises E_q[f]

In one dimension the best f has |f'| = 1 + |F_q - F_p| / (2 lambda rho): F are the distribution
functions, rho is the density of the points between. So E_p[f] - E_q[f] is the Wasserstein distance
W1 = int |F_q - F_p|, plus int (F_q - F_p)^2 / (2 lambda rho).

All networks of a comparison are trained at once, as batches of matrices: no gradient and no step of
Adam crosses from one to another, and eight GANs take the time of about three.

Checked here   V of a trained D against V(D*), by integration; both gradients before and after D
               has won, on intervals t apart; the critic against W1 and the formula; the ring: eight
               GANs a row, modes covered and share within 3 sigma, with both losses, with and
               without the penalty, at one setting; the same with a D that learns too slowly
TensorBoard    discriminator/… by x (tenths, from -3) in d_trained, d_best; gradient/log10_norm by
               tenth of D's training (t = 2) in saturating, non_saturating; wasserstein/distance by
               t (tenths) in w1_…; ring/modes, ring/good and samples/ring by step in ns, wgan, …
Try            z=2, the size of the ring's plane, without a penalty: are modes lost? Hardly any
Source         Goodfellow et al. 2014, arXiv:1406.2661, prop. 1, theorem 1, section 3; Arjovsky &
               Bottou 2017, arXiv:1701.04862, theorem 2.4; Gulrajani et al. 2017 (WGAN-GP),
               arXiv:1704.00028, eq. 3; Fedus et al. 2018 (the penalty without Wasserstein),
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

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "generative_models" / "gan_training"
F64 = torch.float64
SIGMA = 0.05  # of each Gaussian on the ring, whose radius is 1
BETAS = (0.5, 0.9)  # Adam's, as in gan_toy.py of WGAN-GP's authors


# --- networks and losses -----------------------------------------------------------------------


class MLPs(nn.Module):
    """S networks side by side: (S, B, sizes[0]) -> (S, B, sizes[-1]), ReLU between.

    They start as nn.Linear does: even within 1 / sqrt(inputs).
    """

    def __init__(self, S, sizes):
        super().__init__()
        self.weights = nn.ParameterList(
            torch.empty(S, a, b).uniform_(-1, 1) / math.sqrt(a) for a, b in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.empty(S, 1, b).uniform_(-1, 1) / math.sqrt(a) for a, b in pairwise(sizes)
        )

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
    gradient by D's weights: create_graph. ValueError "real (shape) and fake (shape) are not of one
    shape". Exercise.
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


# --- the ring ----------------------------------------------------------------------------------


def centres(device=None):
    angle = torch.arange(8, device=device) * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], dim=-1)  # (8, 2)


def ring(S, B, device=None):
    """(S, B, 2)"""
    mode = torch.randint(8, (S, B), device=device)
    return centres(device)[mode] + SIGMA * torch.randn(S, B, 2, device=device)


def count_modes(x):
    """Of samples (S, B, 2): modes that hold 1 % or more within 3 sigma, share within 3 sigma.

    (S,) integers, (S,) floats. Each sample belongs to the nearest of the eight centres() and is
    good if it is less than 3 SIGMA away. Exercise.
    """
    distance, mode = (x[:, :, None] - centres(x.device)).norm(dim=-1).min(-1)  # (S, B)
    good = distance < 3 * SIGMA
    held = (F.one_hot(mode, 8) * good[..., None]).sum(1)  # (S, 8)
    return (100 * held >= x.size(1)).sum(1), good.float().mean(1)


def ring_picture(x, side=128):
    """(1, H, W): a panel for each GAN's samples (S, B, 2), four a row, on [-1.5, 1.5] squared."""
    S = len(x)
    cell = ((x.cpu() + 1.5) / 3 * side).floor().long()
    inside = ((cell >= 0) & (cell < side)).all(-1)
    panels = torch.zeros(S, side, side)
    panels[:, :, -1] = panels[:, -1, :] = 0.3
    which = torch.arange(S)[:, None].expand_as(inside)
    panels[which[inside], side - 1 - cell[inside][:, 1], cell[inside][:, 0]] = 1.0
    columns = min(S, 4)
    panels = torch.cat([panels, torch.zeros(-S % columns, side, side)])
    rows = panels.view(-1, columns, side, side).transpose(1, 2)  # (rows, side, columns, side)
    return rows.reshape(1, -1, columns * side)


def train_gans(writer, S, loss, penalty=0.0, steps=600, d_per_g=5, lr_g=2e-3, lr_d=2e-3, z=8,
               batch=128, device=None):  # fmt: skip
    """Train S GANs on the ring; modes covered (S,), share of good samples (S,), of 2,000 each."""
    G, D = (MLPs(S, sizes).to(device) for sizes in ((z, 64, 64, 2), (2, 64, 64, 1)))
    of_g = torch.optim.Adam(G.parameters(), lr_g, BETAS)
    of_d = torch.optim.Adam(D.parameters(), lr_d, BETAS)

    def fake(n):
        return G(torch.randn(S, n, z, device=device))

    @torch.no_grad()
    def report(step):
        x = fake(2000)
        modes, good = count_modes(x)
        writer.add_image("samples/ring", ring_picture(x), step)
        writer.add_scalar("ring/modes", modes.float().mean(), step)
        writer.add_scalar("ring/good", good.mean(), step)
        return modes.tolist(), good.tolist()

    for step in tqdm(range(steps), desc=Path(writer.log_dir).name, leave=False, disable=None):
        if step % max(1, steps // 10) == 0:
            report(step)
        for _ in range(d_per_g):
            with torch.no_grad():
                x, y = ring(S, batch, device), fake(batch)
            minimise(of_d, discriminator_loss(D, x, y, loss, penalty))
        minimise(of_g, generator_loss(D(fake(batch)), loss))
    return report(steps)


# --- the sections ------------------------------------------------------------------------------


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


def two_modes(weight=0.5):
    means, stds = torch.tensor([-1.5, 1.5], dtype=F64), torch.tensor([0.5, 0.8], dtype=F64)
    weights = Categorical(torch.tensor([weight, 1 - weight], dtype=F64))
    return MixtureSameFamily(weights, Normal(means, stds))


def value(d, p, q, dx):
    """V by integration: D, p, q (N,) on a grid of step dx."""
    d = d.clamp(1e-12, 1 - 1e-12)
    return ((p * d.log() + q * (1 - d).log()).sum() * dx).item()


def show_optimum(log_dir, steps, batch=256):
    print("1. p two Gaussians: V at D*, theory 2 JSD - log 4, V of a trained D, mean |D - D*|")
    p = two_modes()
    others = {
        "same": p, "one_mode": two_modes(1.0), "normal": Normal(torch.zeros((), dtype=F64), 1.0)
    }  # fmt: skip
    D = MLPs(len(others), (1, 64, 64, 1))
    optimizer = torch.optim.Adam(D.parameters(), 2e-3, BETAS)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x = p.sample((len(others), batch, 1)).float()
        y = torch.stack([q.sample((batch, 1)) for q in others.values()]).float()
        minimise(optimizer, discriminator_loss(D, x, y, "ns", 0.0))
    grid, dx, rows, curves = torch.linspace(-6, 6, 2401, dtype=F64), 0.005, {}, {}
    with torch.no_grad():
        logits = D(grid.float().view(1, -1, 1).expand(len(others), -1, 1))
    for (name, other), d in zip(others.items(), logits.squeeze(-1).double().sigmoid(), strict=True):
        a, b = p.log_prob(grid).exp(), other.log_prob(grid).exp()
        best, middle = a / (a + b), (a + b) / 2
        jsd = ((a * (a / middle).log() + b * (b / middle).log()).sum() * dx / 2).item()
        theory = 2 * jsd - math.log(4)
        row = {"best": value(best, a, b, dx), "trained": value(d, a, b, dx)}
        row["off"] = (((d - best).abs() * middle).sum() * dx).item()  # over real and fake alike
        assert abs(row["best"] - theory) < 1e-6 and row["trained"] <= row["best"] + 1e-6
        print(f"   q {name:<10} {row['best']:8.4f} {theory:8.4f} {row['trained']:8.4f}   "
              f"{row['off']:.3f}")  # fmt: skip
        rows[name] = row
        for run, f in (("trained", d), ("best", best)):
            curves.setdefault(run, {})[f"discriminator/{name}"] = f[600:1801:20]  # of -3 … 3
    for run, tags in curves.items():
        draw(log_dir / f"d_{run}", tags)
    return rows


def intervals(t, batch):
    """x from [0, 1], y from [t, t + 1] for each of t (S,): (S, batch, 1) each."""
    return torch.rand(len(t), batch, 1), torch.rand(len(t), batch, 1) + t.view(-1, 1, 1)


def generator_gradients(D, y):
    """|d loss / d t| of a generator that shifts y, by (S,): saturating, non-saturating; mean D."""
    y = y.clone().requires_grad_()
    score = D(y)
    norms = [
        torch.autograd.grad(generator_loss(score, loss).sum(), y, retain_graph=True)[0].sum((1, 2))
        for loss in ("saturating", "ns")
    ]
    return *(norm.abs().tolist() for norm in norms), score.sigmoid().mean((1, 2)).tolist()


def show_gradients(log_dir, steps, batch=128):
    print("2. real in [0, 1], fake in [t, t + 1]: D on fakes, |dL/dt| saturating, non-saturating")
    t = torch.tensor([0.0, 0.5, 2.0, 4.0])
    D = MLPs(len(t), (1, 64, 64, 1))
    optimizer = torch.optim.Adam(D.parameters(), 1e-3, BETAS)
    rows, log_norms = {}, {"saturating": [], "non_saturating": []}
    tenths = [steps * i // 10 for i in range(11)]
    for step in range(steps + 1):
        x, y = intervals(t, batch)
        if step in tenths:
            rows[step] = generator_gradients(D, y)
            for curve, norms in zip(log_norms.values(), rows[step][:2], strict=True):
                curve.append(math.log10(norms[2]))
        minimise(optimizer, discriminator_loss(D, x, y, "ns", 0.0))
    for name, norms in log_norms.items():
        draw(log_dir / name, {"gradient/log10_norm": norms})
    for step in (0, steps):
        for i, (sat, ns, d) in enumerate(zip(*rows[step], strict=True)):
            print(f"   {step:4} steps of D   t {t[i]:.1f}   {d:.1e}   {sat:.1e}   {ns:.1e}")
    return rows


def penalised_distance(x, y, penalty, bins=500):
    """E f(x) - E f(y) of the best f: W1 + int (F_y - F_x)^2 / (2 penalty rho), of samples (n,)."""
    low, high = min(x.min(), y.min()).item(), max(x.max(), y.max()).item()
    x_share, y_share, between = (
        torch.histc(s, bins, low, high) / len(s) for s in (x, y, x + torch.rand_like(x) * (y - x))
    )
    dx = (high - low) / bins
    apart = (y_share.cumsum(0) - x_share.cumsum(0)).square() * dx
    rho = between / dx
    return exact_w1(x, y) + (apart / rho)[rho > 0].sum().item() / (2 * penalty)


def exact_w1(x, y):
    """W1 of samples (n,): sorted, each goes to its partner."""
    return (x.sort()[0] - y.sort()[0]).abs().mean().item()


def show_critic(log_dir, steps, penalty=10.0, batch=128):
    print(f"3. a WGAN-GP critic there, lambda {penalty:g}: E f(real) - E f(fake), its formula, W1")
    t = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
    f = MLPs(len(t), (1, 64, 64, 1))
    optimizer = torch.optim.Adam(f.parameters(), 2e-3, BETAS)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        now = penalty * min(1, 4 * step / steps) ** 2  # at once, half keep a wrong-signed slope
        minimise(optimizer, discriminator_loss(f, *intervals(t, batch), "wgan", now))
    x, y = intervals(t, 20_000)
    with torch.no_grad():
        critic = (f(x) - f(y)).mean((1, 2)).tolist()
    rows = {}
    for i, shift in enumerate(t.tolist()):
        a, b = x[i, :, 0], y[i, :, 0]
        rows[shift] = (critic[i], penalised_distance(a, b, penalty), exact_w1(a, b))
        print(
            f"   t {shift:.1f}   {critic[i]:6.3f}   {rows[shift][1]:6.3f}   {rows[shift][2]:6.3f}"
        )
    for i, name in enumerate(("critic", "formula", "exact")):
        with SummaryWriter(log_dir / f"w1_{name}", purge_step=0) as writer:
            for shift, row in rows.items():
                writer.add_scalar("wasserstein/distance", row[i], round(10 * shift))
    return rows


SLOW = {"d_per_g": 1, "lr_d": 2e-4}  # a fifth of the steps, a tenth of the rate
SETTINGS = {
    "ns": {"loss": "ns"},
    "wgan": {"loss": "wgan"},
    "ns_penalty": {"loss": "ns", "penalty": 1.0},
    "wgan_penalty": {"loss": "wgan", "penalty": 1.0},
    "slow_d_ns": {"loss": "ns", **SLOW},
    "slow_d_wgan_penalty": {"loss": "wgan", "penalty": 1.0, **SLOW},
}


def show_ring(seed, log_dir, gans, steps, z, device):
    print(f"4. {gans} GANs a row, {steps} steps of G: modes covered, share within 3 sigma of one")
    angle = 2 * math.pi * torch.rand(1, 20_000, 1)
    circle = torch.cat([angle.cos(), angle.sin()], dim=-1)  # all modes, and none
    rows = {}
    for name, x in {"real": ring(1, 20_000), "circle": circle}.items():
        modes, good = count_modes(x)
        rows[name] = modes.item(), good.item()
        print(f"   {name:<20} {modes.item()}   {good.item():.3f}")
    for name, settings in SETTINGS.items():
        torch.manual_seed(seed)
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            rows[name] = train_gans(writer, gans, steps=steps, z=z, device=device, **settings)
        modes, good = rows[name]
        print(f"   {name:<20} {' '.join(map(str, modes))}   {sum(good) / gans:.3f}")
    return rows


def main(seed=0, log_dir=LOG_DIR, d_steps=1000, gans=8, steps=600, z=8):
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    return {
        "optimum": show_optimum(log_dir, d_steps),
        "gradients": show_gradients(log_dir, d_steps),
        "critic": show_critic(log_dir, d_steps),
        "ring": show_ring(seed, log_dir, gans, steps, z, device),
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
    torch.set_num_threads(1)  # networks this small are slower on two
    guard(main)
