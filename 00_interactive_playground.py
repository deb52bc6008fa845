"""Autograd's derivatives are exact to rounding; central differences are off by h^2 f''' / 6.

    (f(x + h) - f(x - h)) / 2h            = f'(x)  + h^2 f'''(x) / 6   + O(h^4)
    (f(x + h) - 2 f(x) + f(x - h)) / h^2  = f''(x) + h^2 f''''(x) / 12 + O(h^4)

    python 00_interactive_playground.py "sin(x) * x**2" --at 1.5     any expression in x
    python 00_interactive_playground.py -i      asks again and again: sin(x), or sin(x) at 2

Autograd applies the chain rule to the operations that ran: it takes no step h, so there is none to
choose. At a kink it follows a convention, and for relu that is 0. What is typed becomes a function
through a whitelist of nodes of Python's syntax tree; eval would run any code.

Checked here   gradient of sum((2x + 1)^2) = 4 (2x + 1); a Jacobian R^3 -> R^3 by hand, by
               autograd.functional, jacrev and jacfwd; f' and f'' by hand, the errors as above
TensorBoard    curve/y of the runs f, f_prime, f_second: step s is x = at - 3 + s / 50
Try            "relu(x)" --at 0: is f' 0, as autograd says, or 1/2, as differences say? Neither:
               the slope is 0 on the left and 1 on the right, and the formulas above need an f'''
Source         Baydin et al. 2018, "Automatic differentiation in machine learning", arXiv:1502.05767
"""

import argparse
import ast
import math
import operator
import platform
import signal
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter

from support.files import guard, options_parser

LOG_DIR = Path(__file__).resolve().parent / "runs" / "00_interactive_playground"
EXPRESSION = "sin(x) * x**2"
H = 0.01  # the step of the differences: small enough for O(h^4), large enough for rounding

LONGEST, LARGEST_POWER = 200, 100
CONSTANTS = {"pi": math.pi, "e": math.e}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: operator.pow}  # fmt: skip
FUNCTIONS = {f.__name__: f for f in (torch.abs, torch.cos, torch.exp, torch.log, torch.relu,
             torch.sigmoid, torch.sin, torch.sqrt, torch.tan, torch.tanh)}  # fmt: skip


class BadExpression(ValueError):
    """What is wrong with an expression, in one line."""


# --- from text to a function -----------------------------------------------------------------


def build(node):
    """The function of a tensor x for a node of the syntax tree. Raises BadExpression."""
    match node:
        case ast.Name(id="x"):
            return lambda x: x
        case ast.Name(id=name) if name in CONSTANTS:
            return lambda x: torch.full_like(x, CONSTANTS[name])
        case ast.Constant(value=value) if type(value) in (int, float):
            return lambda x: torch.full_like(x, float(value))
        case ast.UnaryOp(op=op, operand=inner) if type(op) in SIGNS:
            f, sign = build(inner), SIGNS[type(op)]
            return lambda x: sign(f(x))
        case ast.BinOp(left=left, op=ast.Pow(), right=right) if not contains_x(right):
            f, power = build(left), constant_power(right)
            return lambda x: f(x) ** power
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            f, g, combine = build(left), build(right), OPERATORS[type(op)]
            return lambda x: combine(f(x), g(x))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in FUNCTIONS:
            f = build(inner)
            return lambda x: FUNCTIONS[name](f(x))
    raise BadExpression(f"`{ast.unparse(node)}` is not understood; known are x, numbers, pi, e, "
                        f"+ - * / ** and the functions {' '.join(FUNCTIONS)}")  # fmt: skip


def contains_x(node):
    return any(isinstance(part, ast.Name) and part.id == "x" for part in ast.walk(node))


def constant_power(node):
    """The number for an exponent without x. Raises BadExpression beyond LARGEST_POWER."""
    value = build(node)(torch.zeros((), dtype=torch.float64)).item()
    if not abs(value) <= LARGEST_POWER:
        raise BadExpression(f"exponent `{ast.unparse(node)}` is beyond {LARGEST_POWER}")
    return value


def parse_expression(text):
    """The function of a tensor x that `text` describes. Raises BadExpression, one clear line."""
    if len(text) > LONGEST:
        raise BadExpression(f"{len(text)} characters: at most {LONGEST} are read")
    try:
        with warnings.catch_warnings(action="error"):  # "2if x" is a warning for Python
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        reason = getattr(error, "msg", error)
        raise BadExpression(f"{text!r} is not an expression: {reason}") from None
    return build(tree.body)


# --- derivatives -----------------------------------------------------------------------------


def derivatives(f, order):
    """[f, f', f'', …], each elementwise: as y_i takes x_i alone, the gradient of sum(y) is y'."""
    chain = [f]
    for _ in range(order):
        chain.append(torch.func.grad(lambda x, y=chain[-1]: y(x).sum()))
    return chain


def central_differences(f, x, h=H):
    """The approximations of f'(x) and f''(x)."""
    return (f(x + h) - f(x - h)) / (2 * h), (f(x + h) - 2 * f(x) + f(x - h)) / h**2


def play(text, at=1.5, log_dir=LOG_DIR):
    """Print f, f', f'' at a point, and log them around it. Raises BadExpression."""
    f, x = parse_expression(text), torch.tensor(at, dtype=torch.float64)
    value, first, second, third, fourth = (d(x).item() for d in derivatives(f, 4))
    if not math.isfinite(value):
        raise BadExpression(f"`{text}` is {value} at x = {at:g}")
    central = [difference.item() for difference in central_differences(f, x)]
    theory = [H**2 * third / 6, H**2 * fourth / 12]
    print(f"   f(x) = {text}   x = {at:g}   h = {H:g}")
    print(f"   f    {value:16.10g}")
    rows = zip(("f'", "f''"), (first, second), central, theory, strict=True)
    for name, exact, near, error in rows:
        print(f"   {name:<4} {exact:16.10g}   central {near:16.10g}   off by {near - exact:+.3e}"
              f"   theory {error:+.3e}")  # fmt: skip
    if not all(map(math.isfinite, (first, second, *central))):
        print("   not finite: no derivative at x, or x - h or x + h is outside of the domain")
    draw_curves(text, f, at, log_dir)
    return {"f": value, "autograd": [first, second], "central": central, "theory": theory}


def draw_curves(text, f, at, log_dir):
    """f, f' and f'' from x = at - 3 to at + 3, where f and they are finite, each as a run."""
    x = at - 3 + torch.arange(301, dtype=torch.float64) / 50
    y = torch.stack([d(x) for d in derivatives(f, 2)])  # (3, 301)
    drawn = y.isfinite() & y[0].isfinite()
    for row, run in enumerate(("f", "f_prime", "f_second")):
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            writer.add_text("curve/expression", f"`{text}` for x = {x[0]:g} … {x[-1]:g}", 0)
            for step in drawn[row].nonzero().flatten().tolist():
                writer.add_scalar("curve/y", y[row, step], step)


# --- the lesson ------------------------------------------------------------------------------


def cartesian(p):
    """Spherical coordinates (r, theta, phi) as (x, y, z)."""
    r, theta, phi = p
    return torch.stack([
        r * theta.sin() * phi.cos(),
        r * theta.sin() * phi.sin(),
        r * theta.cos(),
    ])  # fmt: skip


def cartesian_jacobian(p):
    """Its derivatives (3, 3) by hand: a row for each of x, y, z, a column for each input."""
    r, theta, phi = p
    sin_t, cos_t, sin_p, cos_p = theta.sin(), theta.cos(), phi.sin(), phi.cos()
    return torch.stack([
        torch.stack([sin_t * cos_p, r * cos_t * cos_p, -r * sin_t * sin_p]),
        torch.stack([sin_t * sin_p, r * cos_t * sin_p, r * sin_t * cos_p]),
        torch.stack([cos_t, -r * sin_t, torch.zeros_like(r)]),
    ])  # fmt: skip


def main(seed=0, log_dir=LOG_DIR, at=1.5):
    torch.manual_seed(seed)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    print("1. this PyTorch")
    for name, value in {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CPU code for": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "built for CUDA": torch.version.cuda,
        "accelerators found": torch.accelerator.device_count() if device.type != "cpu" else 0,
        "device used": device,
    }.items():
        print(f"   {name:<18} {value}")

    print(f"2. gradient of sum((2x + 1)^2) on {device}")
    x = torch.randn(4).to(device).requires_grad_()
    ((2 * x + 1) ** 2).sum().backward()
    by_hand = 4 * (2 * x.detach() + 1)
    torch.testing.assert_close(x.grad, by_hand)
    for name, row in {"x": x, "autograd": x.grad, "4 (2x + 1)": by_hand}.items():
        print(f"   {name:<10} " + " ".join(f"{value:9.4f}" for value in row.tolist()))

    print("3. Jacobian of (r, theta, phi) -> (x, y, z): largest distance from the one by hand")
    p = torch.rand(3, dtype=torch.float64) * 2 + 0.5
    exact = cartesian_jacobian(p)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # jacfwd's own torch.jit
        jacobians = {
            "autograd.functional.jacobian": torch.autograd.functional.jacobian(cartesian, p),
            "torch.func.jacrev": torch.func.jacrev(cartesian)(p),
            "torch.func.jacfwd": torch.func.jacfwd(cartesian)(p),
        }
    for name, jacobian in jacobians.items():
        torch.testing.assert_close(jacobian, exact)
        print(f"   {name:<29} {(jacobian - exact).abs().max():.1e}")
    volume, theory = torch.det(jacobians["torch.func.jacrev"]), p[0] ** 2 * p[1].sin()
    torch.testing.assert_close(volume, theory)
    print(f"   determinant {volume:.6f}   theory r^2 sin(theta) {theory:.6f}")

    print("4. f' and f'' by autograd against central differences, whose error theory foretells")
    measured = play(EXPRESSION, at, log_dir)
    sin, cos = math.sin(at), math.cos(at)
    by_hand = [at**2 * cos + 2 * at * sin, (2 - at**2) * sin + 4 * at * cos]
    off = [abs(a - b) for a, b in zip(measured["autograd"], by_hand, strict=True)]
    assert max(off) < 1e-12 * (1 + at**2)
    print(f"   autograd against f' and f'' by hand: off by {off[0]:.1e} and {off[1]:.1e}")
    return {**measured, "off": off, "determinant": volume.item()}


# --- the command line ------------------------------------------------------------------------


def point(text):
    """An argparse type: a number that the curves can be drawn around."""
    if not abs(value := float(text)) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not in -1000 … 1000")
    return value


def parse(argv=None):
    parser = options_parser()
    parser.add_argument("expression", nargs="?", help='in x, such as "sin(x) * x**2"')
    parser.add_argument("--at", type=point, default=1.5, help="the point x (1.5)")
    parser.add_argument("-i", action="store_true", dest="interactive", help="ask for expressions")
    options, rest = parser.parse_known_args(argv)
    if options.expression is None and len(rest) == 1:  # "-x**2" looks like an option
        options.expression = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def ask(at, log_dir=LOG_DIR):
    """Answer `sin(x)`, or `sin(x) at 2`, until an empty line. The point stays until it is given."""
    print("an expression, or one with its point: sin(x) at 2; an empty line ends")
    while line := input("f(x) = ").strip():
        text, _, where = line.partition(" at ")
        try:
            at = point(where) if where else at
            play(text, at, log_dir)
        except (ValueError, argparse.ArgumentTypeError) as error:
            print(f"   {error}")


def command(argv=None, log_dir=LOG_DIR):
    """Run as the command line says. Returns the exit status."""
    options = parse(argv)
    if options.interactive and not sys.stdin.isatty():
        print("-i asks in a terminal, and there is none", file=sys.stderr)
        return 1
    try:
        if options.expression is not None:
            play(options.expression, options.at, log_dir)
        elif not options.interactive:
            main(log_dir=log_dir, at=options.at)
        if options.interactive:
            ask(options.at, log_dir)
    except BadExpression as error:
        print(error, file=sys.stderr)
        return 2
    except EOFError:
        print()
    return 0


if __name__ == "__main__":
    guard(command, dict)
