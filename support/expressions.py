"""What the playground is asked: an expression in x, such as "sin(x) * x**2", and at which x.

The text is read into Python's syntax tree, and only the nodes named here become operations: `eval`
would run any code.
"""

import argparse
import ast
import math
import operator
import sys
import warnings

import torch

from support.files import DataError, options_parser

LONGEST, LARGEST_POWER = 200, 100
CONSTANTS = {"pi": math.pi, "e": math.e}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: operator.pow}  # fmt: skip
FUNCTIONS = {f.__name__: f for f in (torch.abs, torch.cos, torch.exp, torch.log, torch.relu,
             torch.sigmoid, torch.sin, torch.sqrt, torch.tan, torch.tanh)}  # fmt: skip
KNOWN = f"x, numbers, pi, e, + - * / ** and the functions {' '.join(FUNCTIONS)}"


class BadExpression(ValueError):
    """What is wrong with an expression, in one line."""


def parse_expression(text):
    """The function of a tensor x that `text` describes. Raises BadExpression."""
    if len(text) > LONGEST:
        raise BadExpression(f"{len(text)} characters: at most {LONGEST} are read")
    try:
        with warnings.catch_warnings(action="error"):  # "2if x" is a warning for Python
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or error or "nested too deeply"
        raise BadExpression(f"{text!r} is not an expression: {reason}") from None
    return build(tree.body)


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
    raise BadExpression(f"`{ast.unparse(node)}` is not understood; known are {KNOWN}")


def contains_x(node):
    return any(isinstance(part, ast.Name) and part.id == "x" for part in ast.walk(node))


def constant_power(node):
    """The number for an exponent without x. Raises BadExpression beyond LARGEST_POWER."""
    value = build(node)(torch.zeros((), dtype=torch.float64)).item()
    if not abs(value) <= LARGEST_POWER:
        raise BadExpression(f"exponent `{ast.unparse(node)}` is beyond {LARGEST_POWER}")
    return value


# --- is a derivative to be trusted -------------------------------------------------------------


def doubts(differences, x, value, exact, h):
    """What speaks against f' and f'', `exact`, at x, where f is `value`: sentences, or none.

    differences(h) is the pair of their approximations with step h. Where f is smooth they come a
    hundred times as near with h / 10; asked for is ten times, up to what rounding explains.
    """
    size, said = abs(value) + abs(x * exact[0]), []
    near = zip(differences(h), differences(h / 10), strict=True)
    for name, e, pair, noise in zip(("f'", "f''"), exact, near, (2e-13, 1e-15), strict=True):
        a, b = (float(number) for number in pair)
        rounding = noise * size / (h / 10) ** (1 if name == "f'" else 2)
        if not math.isfinite(e):
            said.append(f"{name} is {e} by autograd: a factor of the chain rule is not finite, "
                        "though f may have a derivative here")  # fmt: skip
        elif not (math.isfinite(a) and math.isfinite(b)):
            said.append(f"{name} is not checked: f(x - h) or f(x + h) is not finite")
        elif not abs(b - e) <= abs(a - e) / 10 + rounding:
            said.append(f"{name} is not confirmed: h / 10 does not bring differences ten times as "
                        "near (a kink, a swing within h, rounding, a number on the way too large "
                        "or too small)")  # fmt: skip
    return said


# --- the command line --------------------------------------------------------------------------


def point(text):
    """An argparse type: a number that the curves can be drawn around."""
    if not abs(value := float(text)) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not in -1000 ... 1000")
    return value


def playground_options(argv=None):
    """What is asked, as a dict for the playground's main. Wrong options end with status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--at" in argv[:-1]:  # some Pythons take the -1e2 of "--at -1e2" for an option
        i = argv.index("--at")
        argv[i : i + 2] = [f"--at={argv[i + 1]}"]
    parser = options_parser()
    parser.add_argument("expression", nargs="?", help=f'as "sin(x) * x**2"; known are {KNOWN}')
    parser.add_argument("--at", type=point, default=1.5, help="the point x (1.5)")
    parser.add_argument("-i", action="store_true", dest="interactive", help="ask for expressions")
    options, rest = parser.parse_known_args(argv)
    if options.expression is None and len(rest) == 1:  # "-x**2" looks like an option
        options.expression = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return vars(options)


def answer(play, expression, at, interactive):
    """play(expression, at), and whatever is then typed if `interactive`. Returns the exit status.

    Typed may be sin(x) or sin(x) at 2: the point stays until it is given. An empty line ends.
    """
    if interactive and not sys.stdin.isatty():
        raise DataError("-i asks in a terminal, and there is none")
    try:
        if expression is not None:
            play(expression, at)
        if interactive:
            print("an expression, or one with its point: sin(x) at 2; an empty line ends")
        while interactive and (line := input("f(x) = ").strip()):
            text, _, where = line.partition(" at ")
            try:
                at = point(where) if where else at
                play(text, at)
            except (ValueError, argparse.ArgumentTypeError) as error:
                print(f"   {error}")
    except BadExpression as error:
        print(error, file=sys.stderr)
        return 2
    except EOFError:
        print()
    return 0
