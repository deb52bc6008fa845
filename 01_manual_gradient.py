"""Two derivatives written by hand and a small enough learning rate fit a line.

Training lowers a loss L, one number that says how wrong the model is. Its gradient holds the
derivative of L with respect to each parameter, and a step against the gradient lowers L if it is
short enough. If the learning rate is too large, the steps swing further and further beyond the
minimum, and L grows without end. Which learning rates are too large can be said before the run.

    x, y   N data points (N,), here y = 2x + 1, x not all equal     w, b   parameters
    r = w x + b - y, for each point      L = mean(r^2)              lr     learning rate
    dL/dw = mean(2 r x)                  dL/db = mean(2 r)          by the chain rule
    w becomes w - lr dL/dw               b becomes b - lr dL/db     one step

    w and b come to the minimum from every start if and only if 0 < lr < 2 / lam_max

H, the Hessian, is the matrix (2, 2) of second derivatives of L. It has two eigenvectors e, which it
only multiplies by a number, the eigenvalue lam: H e = lam e. Along the steep one L curves most, and
its lam is lam_max; along the flat one L curves least. The error is (w, b) minus its value at the
minimum, here (w - 2, b - 1).

Needs          00_interactive_playground.py
Checked here   gradient by hand = central differences = autograd; along each eigenvector a step
               multiplies the error by 1 - lr lam; the bound, for four learning rates
TensorBoard    train/log10_loss by step, a run for each lr: three fall, just_above rises after its
               first step; surface/path: the first 20 steps of each run, over a map of L
Try            in show_learning_rates, replace `1.02 * limit` by `limit`: does L fall to 0?
Answer         No: it falls from 6.9 to 5.3 and stays there, as w and b jump between two points
Source         LeCun et al. 1998, Efficient BackProp, section 5
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter

from support.files import guard
from support.pictures import path_over_contours

LOG_DIR = Path(__file__).resolve().parent / "runs" / "01_manual_gradient"
TRUTH = torch.tensor([2.0, 1.0], dtype=torch.float64)  # w and b of the line y = 2x + 1


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    print("1. How do w and b find the line y = 2x + 1 through (1, 3) and (2, 5)? lr = 0.1")
    print("   step        w        b   r = w x + b - y   L = mean(r^2)     dL/dw    dL/db")
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    w, b, lr, losses = torch.tensor(0.0), torch.tensor(0.0), 0.1, []
    for step in range(4):
        r = w * x + b - y
        L = r.square().mean()
        dL_dw, dL_db = (2 * r * x).mean(), (2 * r).mean()
        print(f"   {step:4}   {w:6.3f}   {b:6.3f}   {r[0]:6.3f}, {r[1]:6.3f}   {L:13.4f}", end="")
        print(f"   {dL_dw:7.3f}  {dL_db:7.3f}")
        w = w - lr * dL_dw
        b = b - lr * dL_db
        losses.append(L.item())
    losses.append((w * x + b - y).square().mean().item())
    print(f"   {step + 1:4}   {w:6.3f}   {b:6.3f}{losses[4]:34.4f}")
    print(f"   -> w = w - lr * dL/dw and b = b - lr * dL/db, four times, bring L from "
          f"{losses[0]:.1f} to {losses[4]:.3f}")  # fmt: skip
    return losses


# --- 2. the gradient by hand -------------------------------------------------------------------


def make_data(n=20):
    """x and y = 2x + 1, both (N,). If the mean of x were 0 (it is -1), b would not change dL/dw."""
    x = torch.linspace(-3, 1, n, dtype=torch.float64)
    return x, TRUTH[0] * x + TRUTH[1]


def loss(w, b, x, y):
    """Mean squared error over the last dimension; w and b are numbers or (..., 1)."""
    return (w * x + b - y).square().mean(-1)


def gradient(w, b, x, y):
    """dL/dw = sum(dL/dr * dr/dw) and dL/db = sum(dL/dr * dr/db), stacked: (2,).

    w and b are numbers, x and y (N,). r = w x + b - y, so dL/dr = 2 r / N, dr/dw = x, dr/db = 1.
    Exercise.
    """
    r = w * x + b - y  # (N,)
    dL_dr = 2 * r / len(x)
    return torch.stack([(dL_dr * x).sum(), (dL_dr * 1).sum()])


def central_difference(f, p, h):
    """The gradient (n,) of f: (n,) -> number at p, without a derivative.

    Entry i is (f(p + h u) - f(p - h u)) / 2h, where u (n,) is 1 at i and 0 elsewhere. Exercise.
    """
    return torch.stack([(f(p + h * u) - f(p - h * u)) / (2 * h) for u in torch.eye(len(p)).to(p)])


def show_gradient(x, y):
    p, h = TRUTH + 3 * torch.randn(2, dtype=x.dtype), 1.0
    by_hand = gradient(*p, x, y)
    by_difference = central_difference(lambda q: loss(*q, x, y), p, h)
    w, b = p.clone().requires_grad_()  # a tensor of two gives two tensors of one
    # autograd.grad: the two derivatives as a tuple; it leaves w.grad and b.grad alone
    by_autograd = torch.stack(torch.autograd.grad(loss(w, b, x, y), (w, b)))
    print(f"2. Is the gradient by hand right? At random w = {w:.3f}, b = {b:.3f}; from here on")
    print(f"   there are {len(x)} points, x from {x[0]:g} to {x[-1]:g}, y = 2x + 1")
    print(f"             by hand   central differences, h = {h:g}    autograd")
    for i, name in enumerate(("dL/dw", "dL/db")):
        print(f"   {name}   {by_hand[i]:9.5f}   {by_difference[i]:26.5f}   {by_autograd[i]:9.5f}")
    apart = (torch.stack([by_difference, by_autograd]) - by_hand).abs().max().item()
    print(f"   -> they agree to {apart:.0e}: along w or b L is a parabola, so any h is exact")
    assert apart < 1e-11
    return {"by_hand": by_hand.tolist(), "apart": apart}


# --- 3. what a step does to the error ----------------------------------------------------------


def descend(x, y, lr, steps):
    """The path (steps + 1, 2) of p = (w, b): (0, 0), then p after each p = p - lr * gradient.

    Raises ValueError unless x and y are both (N,): others would broadcast in silence. Exercise.
    """
    if x.dim() != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be (N,), not {tuple(x.shape)} and {tuple(y.shape)}")
    p = torch.zeros(2, dtype=x.dtype)
    path = [p]
    for _ in range(steps):
        p = p - lr * gradient(*p, x, y)
        path.append(p)
    return torch.stack(path)


def hessian(x):
    """H = 2 [[mean x^2, mean x], [mean x, 1]], (2, 2), for x (N,): the same at every (w, b).

    Row 0 holds the derivatives of dL/dw with respect to w and b, row 1 those of dL/db. Exercise.
    """
    mean, square = x.mean().item(), x.square().mean().item()
    return 2 * torch.tensor([[square, mean], [mean, 1]], dtype=x.dtype)


def directions_of(H):
    """lam (2,), smallest first, and the eigenvectors, one a column (2, 2), with w not negative."""
    lam, vectors = torch.linalg.eigh(H)
    return lam, vectors * torch.where(vectors[0] < 0, -1, 1)


def error_factors(path, directions):
    """(steps, 2): each part of the error after a step, divided by the same part before the step.

    The error is path - TRUTH, (steps + 1, 2). Its part along a direction is its dot product with
    that column of `directions` (2, 2). Exercise.
    """
    parts = (path - TRUTH) @ directions  # (steps + 1, 2)
    return parts[1:] / parts[:-1]


def show_error(x, y, lr, steps):
    H, path = hessian(x), descend(x, y, lr, steps)
    lam, directions = directions_of(H)
    # gradient = H error, so a step turns a part c of the error into (1 - lr lam) c
    factors, law = error_factors(path[:11], directions), 1 - lr * lam
    print(f"3. What does a step do to the error (w - 2, b - 1)? lr = {lr:g}")
    print("   (H, the Hessian, holds the second derivatives of L. In two directions, its")
    print("   eigenvectors, H only multiplies by a number, the eigenvalue lam. The error is split")
    print("   into a part along each of the two. Theory: a step multiplies a part by 1 - lr lam.)")
    print(f"   H = [{H[0, 0]:.4f} {H[0, 1]:.4f}; {H[1, 0]:.4f} {H[1, 1]:.4f}]")
    print("   part    eigenvector (w, b)   eigenvalue lam   1 - lr lam   "
          "measured at step 1  at step 10")  # fmt: skip
    for i, name in ((1, "steep"), (0, "flat")):
        along = "({:.3f}, {:6.3f})".format(*directions[:, i])
        print(f"   {name:<5}   {along}   {lam[i]:16.4f}   {law[i]:10.4f}"
              f"   {factors[0, i]:18.4f}  {factors[-1, i]:10.4f}")  # fmt: skip
    (flat, steep), (w, b) = factors[0], path[-1]
    print(f"   -> a step multiplies the steep part by {steep:.2f} and the flat one by {flat:.2f};")
    print(f"      {steps} steps end at w = {w:.4f}, b = {b:.4f}")
    parts = (path[:11] - TRUTH) @ directions
    torch.testing.assert_close(parts[1:], law * parts[:-1], rtol=1e-7, atol=1e-12)
    return {"factors": factors[0].tolist(), "fit": path[-1].tolist()}


# --- 4. which learning rates converge ----------------------------------------------------------


def largest_lr(x):
    """2 / lam_max, a float: no learning rate from there on converges from every start. Exercise."""
    return 2 / torch.linalg.eigvalsh(hessian(x))[-1].item()


def show_learning_rates(log_dir, x, y, lr, steps):
    limit, (lam, _) = largest_lr(x), directions_of(hessian(x))
    rates = {"slow": lr / 5, "fit": lr, "just_below": 0.98 * limit, "just_above": 1.02 * limit}
    print(f"4. Which lr converge? The rule: lr < 2 / lam_max = 2 / {lam[1]:.4f} = {limit:.4f}")
    print("   (It says that 1 - lr lam is between -1 and 1 for the steep part and the flat one.")
    print(f"   Seen to converge: after {steps} steps L is below 1% of its start.)")
    print(f"   run             lr   1 - lr lam: steep     flat   L at step 0   at step {steps}   "
          "converges? by the rule   seen")  # fmt: skip
    final_loss, verdicts = {}, []
    for run, rate in rates.items():
        path = descend(x, y, rate, steps)
        losses = loss(path[:, :1], path[:, 1:], x, y)  # (steps + 1,)
        verdicts.append(("yes" if rate < limit else "no",
                         "yes" if losses[-1] < losses[0] / 100 else "no"))  # fmt: skip
        flat, steep = 1 - rate * lam
        print(f"   {run:<10}   {rate:.4f}   {steep:17.4f}   {flat:6.4f}   {losses[0]:11.2f}   "
              f"{losses[-1]:11.1e}   {verdicts[-1][0]:>22}   {verdicts[-1][1]:>4}")  # fmt: skip
        final_loss[run] = losses[-1].item()
        words = f"lr {rate:.4f}: first 20 steps from (0, 0)\ndark: L low   light: L high"
        picture = path_over_contours(
            lambda w, b: loss(w[..., None], b[..., None], x, y), path[:21], TRUTH, 4.0, words
        )
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, value in enumerate(losses.clamp_min(1e-30).log10()):
                writer.add_scalar("train/log10_loss", value, step)
            writer.add_image("surface/path", picture, 0, dataformats="HWC")
    right = sum(rule == seen for rule, seen in verdicts)
    always = sum(seen == "yes" for _, seen in verdicts)
    print(f"   -> the rule is right about {right} of {len(rates)} runs; "
          f"always answering yes would be right about {always} of {len(rates)}")  # fmt: skip
    return {"limit": limit, "final_loss": final_loss, "right": right}


def main(seed=0, log_dir=LOG_DIR, lr=0.1, steps=200):
    torch.manual_seed(seed)
    x, y = make_data()
    measured = {"everyday": show_everyday(), "gradient": show_gradient(x, y)}
    measured |= show_error(x, y, lr, steps) | show_learning_rates(log_dir, x, y, lr, steps)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
