"""Autograd differentiates the code that you run; you write no derivative and choose no step size.

A derivative says how much a result moves when an input moves a little; training needs one for each
weight. Autograd, automatic differentiation, records the operations while your code runs. backward()
then applies the chain rule to them, from the result back to the inputs.

Central differences check it. They use values of f only, a small step h (here 0.01) to each side of
x. f', f'', f''' and f'''' are the first to the fourth derivative of f; what is left out is smaller:

    (f(x + h) - f(x - h)) / 2h             = f'(x)  + h^2 f'''(x) / 6    + ...
    (f(x + h) - 2 f(x) + f(x - h)) / h^2   = f''(x) + h^2 f''''(x) / 12  + ...

    python 00_interactive_playground.py "sin(x) * x**2" --at 1.5    compares both for your function
    python 00_interactive_playground.py -i              asks again and again: sin(x), or sin(x) at 2

Autograd can be wrong. At a kink, such as |x| has at 0, there is no derivative, and autograd chooses
a number; and a number that arises on the way may be too large for the computer, or too small.

Needs          nothing: this is the first lesson
Checked here   2x + 2; 4 (2x + 1); all derivatives of two outputs by two inputs; f' and f'' by hand
TensorBoard    curve/y in the runs f, f_prime, f_second; step s is the point x - 3 + s / 50: where
               f_prime crosses 0, f has a top or a valley
Try            python 00_interactive_playground.py "relu(x)" --at 0, where relu(x) is max(0, x), and
               then "log(1 + exp(x))" --at 400: which results are wrong?
Answer         relu has neither f' nor f'' at its kink: autograd chose 0. log(1 + exp(x)): f'' = 1
               is wrong, it is 2e-174; 1 / exp(400)^2 = 4e-348 became 0 on the way
Source         Baydin et al. 2018, "Automatic differentiation in machine learning", arXiv:1502.05767
"""

import math
import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter

from support.expressions import BadExpression, answer, doubts, parse_expression, playground_options
from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "00_interactive_playground"
H = 0.01  # small, so that the terms left out are too; not so small that rounding matters


# --- 1. in everyday code -----------------------------------------------------------------------


def show_first():
    print("1. How fast does y = x^2 + 2x grow at x = 3?")
    print("   line of code                                after this line")
    x = torch.tensor(3.0, requires_grad=True)  # from now on torch records what is done to x
    print(f"   x = torch.tensor(3.0, requires_grad=True)   x = {x.item()}, x.grad = {x.grad}")
    y = x**2 + 2 * x
    print(f"   y = x**2 + 2 * x                            y = {y.item()}; y knows how it was made")
    y.backward()  # walks from y back to x, and leaves dy/dx in x.grad; .item(): as a number
    print(f"   y.backward()                                x.grad = {x.grad.item()}")
    print(f"   -> dy/dx is {x.grad.item()}; by hand 2x + 2 = {2 * x.item() + 2}")
    return x.grad.item()


# --- 2. many inputs ----------------------------------------------------------------------------


def show_many():
    x = torch.randn(4, requires_grad=True)
    ((2 * x + 1) ** 2).sum().backward()
    by_hand = 4 * (2 * x.detach() + 1)  # detach: the numbers alone, not recorded
    off = (x.grad - by_hand).abs().max().item()
    print("2. Does one backward() give all derivatives? y = sum over i of (2 x_i + 1)^2")
    print("   i        x_i   x.grad[i]   by hand: 4 (2 x_i + 1)")
    for i in range(4):
        print(f"   {i}   {x[i]:8.4f}   {x.grad[i]:9.4f}   {by_hand[i]:22.4f}")
    print(f"   -> one backward() gave {len(x.grad)} derivatives; largest difference {off:.1g}")
    torch.testing.assert_close(x.grad, by_hand)
    return {"many": x.grad.tolist(), "many_by_hand": by_hand.tolist()}


# --- 3. many outputs: the Jacobian -------------------------------------------------------------


def cartesian(p):
    """p = (r, t), a distance and an angle, to the point (u, v) = (r cos t, r sin t)."""
    r, t = p
    return torch.stack([r * t.cos(), r * t.sin()])


def cartesian_jacobian(p):
    """J (2, 2) by hand at p = (r, t): row 0 is du/dr, du/dt and row 1 is dv/dr, dv/dt. Exercise."""
    r, t = p
    return torch.stack([t.cos(), -r * t.sin(), t.sin(), r * t.cos()]).view(2, 2)


def show_jacobian():
    p = torch.tensor([2.0, math.pi / 6], dtype=torch.float64)
    f, by_hand = cartesian, cartesian_jacobian(p)
    found = {
        "torch.func.jacrev(f)(p)": torch.func.jacrev(f)(p),  # rev: in reverse, as backward()
        "torch.autograd.functional.jacobian(f, p)": torch.autograd.functional.jacobian(f, p),
        "by hand: cos t, -r sin t, sin t, r cos t": by_hand,
    }
    print("3. Which call gives all derivatives of two outputs by two inputs (their Jacobian)?")
    print("   f: p = (r, t) -> (u, v) = (r cos t, r sin t), at r = 2, t = pi / 6")
    print("   call                                         du/dr     du/dt     dv/dr     dv/dt")
    for name, J in found.items():
        print(f"   {name:<40}" + "".join(f"{value:10.4f}" for value in J.flatten()))
    off = [(J - by_hand).abs().max().item() for J in found.values()]
    print(f"   -> the two calls and the Jacobian by hand differ by at most {max(off):.1g}")
    assert max(off) < 1e-12
    return {"jacobian_off": off}


# --- 4. the playground -------------------------------------------------------------------------


def derivative(f):
    """The function f' of an f that works element by element; x and f'(x) have one shape.

    torch.func.grad(g) is the function that gives the gradient of a number g(x). Take for g the sum
    of y = f(x): its derivative with respect to x_i is dy_i/dx_i. Exercise.
    """
    return torch.func.grad(lambda x: f(x).sum())


def central_differences(f, x, h):
    """(f(x + h) - f(x - h)) / 2h and (f(x + h) - 2 f(x) + f(x - h)) / h^2, a pair. Exercise."""
    return (f(x + h) - f(x - h)) / (2 * h), (f(x + h) - 2 * f(x) + f(x - h)) / h**2


def play(text, at, log_dir):
    """Print f, f', f'' at a point, and log them around it. Raises BadExpression."""
    f, x = parse_expression(text), torch.tensor(at, dtype=torch.float64)
    chain = [f]
    for _ in range(4):
        chain.append(derivative(chain[-1]))
    value, *exact = (d(x).item() for d in chain)
    if not math.isfinite(value):
        raise BadExpression(f"`{text}` is {value} at x = {at:g}")
    central = [difference.item() for difference in central_differences(f, x, H)]
    theory = [H**2 * exact[2] / 6, H**2 * exact[3] / 12]
    print(f"   f(x) = {text} at x = {at:g}; differences with h = {H:g}")
    print("                autograd        differences   differences - autograd   by theory")
    print(f"   f    {value:16.10g}")
    laws = "h^2 f'''/6", "h^2 f''''/12"
    for i, name in enumerate(("f'", "f''")):
        print(f"   {name:<4} {exact[i]:16.10g}   {central[i]:16.10g}   "
              f"{central[i] - exact[i]:+22.3e}   {theory[i]:+10.3e} = {laws[i]}")  # fmt: skip
    said = doubts(lambda h: central_differences(f, x, h), at, value, exact[:2], H)
    for sentence in said or ["f' and f'' are confirmed: with h / 10 the differences come ten times "
                             "as near, up to rounding"]:  # fmt: skip
        print(f"   -> {sentence}")
    draw_curves(text, chain[:3], at, log_dir)
    return {"f": value, "autograd": exact[:2], "central": central, "theory": theory, "doubts": said}


def show_playground(at, log_dir):
    print("4. The playground: are the derivatives of a function that you type right?")
    measured = play("sin(x) * x**2", at, log_dir)
    sin, cos = math.sin(at), math.cos(at)
    by_hand = [at**2 * cos + 2 * at * sin, (2 - at**2) * sin + 4 * at * cos]
    off = [abs(a - b) for a, b in zip(measured["autograd"], by_hand, strict=True)]
    print(f"   -> autograd is off by {max(off):.0e} from f' and f'' by hand, as it takes no step h")
    print('   now you: python 00_interactive_playground.py "exp(-x**2)" --at 1')
    assert max(off) < 1e-12 * (1 + at**2)
    return {**measured, "off": off}


def draw_curves(text, chain, at, log_dir):
    """f, f' and f'' from x = at - 3 to at + 3, where f and they are finite, each as a run."""
    x = at - 3 + torch.arange(301, dtype=torch.float64) / 50
    y = torch.stack([d(x) for d in chain])  # (3, 301)
    drawn = y.isfinite() & y[0].isfinite()
    for row, run in enumerate(("f", "f_prime", "f_second")):
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            writer.add_text("curve/expression", f"`{text}` for x = {x[0]:g} to {x[-1]:g}", 0)
            for step in drawn[row].nonzero().flatten().tolist():
                writer.add_scalar("curve/y", y[row, step], step)


def main(seed=0, log_dir=LOG_DIR, at=1.5, expression=None, interactive=False):
    """The lesson; with an expression or `interactive` the playground alone, and the exit status."""
    look = f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries"
    if interactive or expression is not None:
        status = answer(lambda text, at: play(text, at, log_dir), expression, at, interactive)
        if status == 0:
            print(look)
        return status
    torch.manual_seed(seed)
    measured = {"slope": show_first(), **show_many(), **show_jacobian()}
    measured |= show_playground(at, log_dir)
    print(look)
    return measured


if __name__ == "__main__":
    guard(main, playground_options)
