"""The largest curvature alone bounds the learning rate: descent needs lr < 2 / lambda_max.

    r = w x + b - y        L = mean(r^2)                 the data: y = 2x + 1, x = -3 … 1
    dL/dw = sum(dL/dr * dr/dw) = mean(2 r x)             dL/dr = 2 r / N,  dr/dw = x
    dL/db = sum(dL/dr * dr/db) = mean(2 r)               dr/db = 1
    H = 2 [[mean x^2, mean x], [mean x, 1]]              gradient = H e,  e = (w - 2, b - 1)

A step turns e into e - lr H e: the part of the error along each eigenvector of H is multiplied by
1 - lr lambda. For 0 < lr < 2 / lambda_max all these factors lie in (-1, 1) and every start ends at
the minimum; beyond, the sharpest one is below -1 and that part grows, changing sides each step.
Networks trained on the whole batch often sharpen by themselves until lambda_max is about 2 / lr.

Checked here   gradient by hand = central differences (exact on a parabola, even for h = 1) =
               autograd; H = autograd's; path = (I - lr H)^t e_0; both factors of three runs
TensorBoard    train/log10_loss: two lines fall, just_above rises; surface/path: the
               first 20 steps over the contours of L, one picture a run
Try            lr = 2 / lambda_max exactly: does the loss fall to 0? No: in the end w and b jump
               between two points, and L stays at lambda_max c^2 / 2, c the error's sharp part
Source         LeCun et al. 1998, Efficient BackProp, section 5; Cohen et al. 2021, arXiv:2103.00065
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "01_manual_gradient"
TRUTH = torch.tensor([2.0, 1.0], dtype=torch.float64)  # w, b


def make_data(n=20):
    """x and y = 2x + 1, both (N,). The mean of x is -1: were it 0, w and b would not interact."""
    x = torch.linspace(-3, 1, n, dtype=torch.float64)
    return x, TRUTH[0] * x + TRUTH[1]


def loss(w, b, x, y):
    """Mean squared error over the last dimension; w and b are numbers or (…, 1)."""
    return (w * x + b - y).square().mean(-1)


def gradient(w, b, x, y):
    """(dL/dw, dL/db) by the chain rule."""
    r = w * x + b - y  # (N,)
    dL_dr = 2 * r / len(x)
    dr_dw, dr_db = x, torch.ones_like(x)
    return torch.stack([(dL_dr * dr_dw).sum(), (dL_dr * dr_db).sum()])  # (2,)


def descend(x, y, lr, steps):
    """The path (steps + 1, 2) of (w, b) from (0, 0). Raises ValueError unless x and y are (N,)."""
    if x.dim() != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be (N,), not {tuple(x.shape)} and {tuple(y.shape)}")
    path = [torch.zeros(2, dtype=x.dtype)]
    for _ in range(steps):
        w, b = path[-1]
        path.append(path[-1] - lr * gradient(w, b, x, y))
    return torch.stack(path)


def central_difference(f, p, h):
    """The gradient (n,) of f at p (n,), one coordinate at a time."""
    return torch.stack([(f(p + h * unit) - f(p - h * unit)) / (2 * h)
                        for unit in torch.eye(len(p), dtype=p.dtype)])  # fmt: skip


def hessian(x):
    """The second derivatives (2, 2) of the loss by (w, b): the same at every point."""
    mean, square = x.mean().item(), x.square().mean().item()
    return 2 * torch.tensor([[square, mean], [mean, 1]], dtype=x.dtype)


def predicted_path(H, lr, steps):
    """The path (steps + 1, 2) that e_t = (I - lr H)^t e_0 foretells."""
    step = torch.eye(2, dtype=H.dtype) - lr * H
    e_0 = -TRUTH  # the start is (0, 0)
    return torch.stack([TRUTH + torch.linalg.matrix_power(step, t) @ e_0 for t in range(steps + 1)])


def error_factors(path, directions, steps=10):
    """What each of the first steps multiplies the error by along each direction, (steps, 2)."""
    parts = (path[: steps + 1] - TRUTH) @ directions  # (steps + 1, 2)
    return parts[1:] / parts[:-1]


def contours(x, y, size, reach):
    """A picture of the loss, `reach` to each side of the minimum: w to the right, b upwards."""
    offset = torch.linspace(-reach, reach, size, dtype=x.dtype)
    w, b = TRUTH[0] + offset, TRUTH[1] + offset.flip(0)
    surface = loss(w[None, :, None], b[:, None, None], x, y)  # (size, size)
    band = (1.5 * surface.clamp_min(0.01).log2()).floor()
    shade = (band - band.min()) / (band.max() - band.min())  # 0 lowest … 1 highest
    low, high = torch.tensor([[40.0, 60, 110], [235, 240, 250]])
    return Image.fromarray((low + shade[..., None] * (high - low)).byte().numpy())


def draw_path(picture, path, title, reach):
    """The contours with the points of a path and the joints between them, (size, size, 3)."""
    pen, middle = ImageDraw.Draw(picture), (picture.width - 1) / 2
    w, b = (path - TRUTH).T * middle / reach
    points = (torch.stack([w, -b], 1) + middle).tolist()  # column, row
    pen.line([tuple(point) for point in points], fill="firebrick", width=2)
    for column, row in points:
        pen.ellipse((column - 3, row - 3, column + 3, row + 3), fill="firebrick")
    (left, bottom), (right, top) = (TRUTH - reach).tolist(), (TRUTH + reach).tolist()
    pen.text((8, 8), title, fill="black", font_size=16)
    frame = f"w {left:g} … {right:g}   b {bottom:g} … {top:g}"
    pen.text((8, picture.height - 8), frame, fill="black", font_size=16, anchor="ls")
    return np.array(picture)


def main(seed=0, log_dir=LOG_DIR, lr=0.1, steps=200):
    torch.manual_seed(seed)
    x, y = make_data()

    p = (TRUTH + 3 * torch.randn(2, dtype=x.dtype)).requires_grad_()  # somewhere
    print(f"1. the gradient at w = {p[0]:.3f}, b = {p[1]:.3f}")
    by_hand = gradient(*p.detach(), x, y)
    by_difference = central_difference(lambda q: loss(*q, x, y), p.detach(), h=1.0)
    loss(*p, x, y).backward()
    torch.testing.assert_close(by_hand, by_difference, rtol=0, atol=1e-11)
    torch.testing.assert_close(by_hand, p.grad, rtol=0, atol=1e-11)
    rows = zip(("dL/dw", "dL/db"), by_hand, by_difference, p.grad, strict=True)
    for name, hand, difference, auto in rows:
        print(f"   {name}   by hand {hand:9.5f}   central differences {difference:9.5f}"
              f"   autograd {auto:9.5f}")  # fmt: skip

    print("2. the Hessian's eigenvalues and the largest stable learning rate")
    H = hessian(x)
    by_autograd = torch.autograd.functional.hessian(lambda q: loss(*q, x, y), p.detach())
    torch.testing.assert_close(H, by_autograd)
    eigenvalues, directions = torch.linalg.eigh(H)  # rising
    limit = 2 / eigenvalues[-1].item()
    print(f"   lambda {eigenvalues[0]:.4f}, {eigenvalues[1]:.4f}   2 / lambda_max {limit:.4f}")

    print(f"3. the fit at lr = {lr:g} against the path that (I - lr H)^t e_0 foretells")
    fit, theory = descend(x, y, lr, steps), predicted_path(H, lr, steps)
    torch.testing.assert_close(fit, theory, rtol=0, atol=1e-12)
    for t in (1, steps // 20, steps // 4, steps):
        print(f"   step {t:3d}   w {fit[t, 0]:.6f}   theory {theory[t, 0]:.6f}"
              f"   b {fit[t, 1]:+.6f}   theory {theory[t, 1]:+.6f}")  # fmt: skip

    print(f"4. what a step multiplies the error by (theory 1 - lr lambda); L after {steps} steps")
    final_loss = {}
    for run, rate in {"fit": lr, "just_below": 0.98 * limit, "just_above": 1.02 * limit}.items():
        path = descend(x, y, rate, steps)
        measured, theory = error_factors(path, directions), 1 - rate * eigenvalues
        torch.testing.assert_close(measured, theory.expand_as(measured), rtol=1e-7, atol=0)
        losses = loss(path[:, :1], path[:, 1:], x, y)  # (steps + 1,)
        final_loss[run] = losses[-1].item()
        print(f"   {run:<11} lr {rate:.4f}   sharp {measured[-1, 1]:+.4f}   theory {theory[1]:+.4f}"
              f"   flat {measured[-1, 0]:+.4f}   theory {theory[0]:+.4f}"
              f"   L {final_loss[run]:.1e}")  # fmt: skip
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, value in enumerate(losses.clamp_min(1e-30).log10()):
                writer.add_scalar("train/log10_loss", value, step)
            surface = contours(x, y, size=420, reach=4.0)
            picture = draw_path(surface, path[:21], f"lr {rate:.4f}, 20 steps", reach=4.0)
            writer.add_image("surface/path", picture, 0, dataformats="HWC")
    return {"limit": limit, "fit": fit[-1].tolist(), "final_loss": final_loss}


if __name__ == "__main__":
    guard(main)
