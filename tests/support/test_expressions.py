import io
import math

import pytest
import torch

from support import expressions
from support.expressions import BadExpression, doubts, parse_expression
from support.files import DataError


def at(x):
    return torch.tensor(x, dtype=torch.float64)


NAMES = {
    **{name: getattr(math, name) for name in ("cos", "e", "exp", "log", "pi", "sin", "sqrt")},
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tan": math.tan,
    "tanh": math.tanh,
}


@pytest.mark.parametrize("x", [0.3, 1.7])
@pytest.mark.parametrize(
    "text",
    ["2*x + 1", "x - 3 / x", "-x ** 2", "(-x) ** 2", "+x", "2 ** -x", "x ** x", "2 ** 3 ** 2 * x",
     "e ** (pi * x) / 10", "abs(cos(x)) - tanh(x)", "relu(x - 1) + sigmoid(-x)", " exp(x)*sqrt(x)",
     "log(tan(x / 2))", "1_000 * x", "x ** 100", "x ** -100"],
)  # fmt: skip
def test_an_expression_means_what_python_means_by_it(text, x):
    f = parse_expression(text)
    assert f(at(x)).item() == pytest.approx(eval(text.strip(), {**NAMES, "x": x}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y", "`y` is not understood"),
        ("sin", "`sin` is not understood"),
        ("x.data", r"`x\.data` is not understood"),
        ("sin(x).real", r"`sin\(x\)\.real` is not understood"),
        ("x ^ 2", r"`x \^ 2` is not understood; known are x, .* \*\* and the functions abs cos"),
        ("x % 2", "not understood"),
        ("eval(x)", r"`eval\(x\)` is not understood"),
        ("__import__('os').getcwd()", "not understood"),
        ("sin(x, x)", "not understood"),
        ("sin(x=x)", "not understood"),
        ("sin(*x)", "not understood"),
        ("[x for x in x]", "not understood"),
        ("lambda: x", "not understood"),
        ("x if x else 1", "not understood"),
        ("True * x", "`True` is not understood"),
        ("2j * x", "`2j` is not understood"),
        ("'x' * 9", "`'x'` is not understood"),
        ("9**9**9", r"exponent `9 \*\* 9` is beyond 100"),
        ("x**101", "exponent `101` is beyond 100"),
        ("x**-1000", "exponent `-1000` is beyond 100"),
        ("x**(1 / 0)", "exponent `1 / 0` is beyond 100"),
        ("x**(0 / 0)", "exponent `0 / 0` is beyond 100"),
        ("sin(x", r"'sin\(x' is not an expression"),
        ("2x", "'2x' is not an expression"),
        ("2if x else 3", "not an expression"),
        ("x\ny", r"'x\\ny' is not an expression"),
        ("x\0", "not an expression"),
        ("x²", "not an expression: invalid character"),
        ("", "'' is not an expression"),
        ("(" * 150 + "x" + ")" * 49, "not an expression"),
        ("x" + " + x" * 50, "201 characters: at most 200"),
    ],
)
def test_what_is_no_expression_is_refused_in_one_line(text, message):
    with pytest.raises(BadExpression, match=message) as caught:
        parse_expression(text)
    assert "\n" not in str(caught.value)


def test_the_longest_expression_is_read():
    assert parse_expression("x" + " + x" * 49 + "+ x")(at(2.0)).item() == 102  # 200 characters


def judged(text, x, h=0.01):
    """What `doubts` says of the derivatives of an expression, as autograd finds them."""
    f, value = parse_expression(text), at(x)

    def slope(f):
        return torch.func.grad(lambda x: f(x).sum())

    def differences(h):
        low, mid, high = f(value - h), f(value), f(value + h)
        return (high - low) / (2 * h), (high - 2 * mid + low) / h**2

    exact = [slope(f)(value).item(), slope(slope(f))(value).item()]
    return doubts(differences, x, f(value).item(), exact, h)


@pytest.mark.parametrize(
    ("text", "x"),
    [("sin(x) * x**2", 1.5), ("x", 1000), ("7", 3), ("sin(x)", 1000), ("log(x)", 900),
     ("1/x", 0.02), ("x**5", 0), ("1e6 * x**5", 0), ("exp(exp(x))", 2), ("x**100", 1.5),
     ("tan(x)", 1.55), ("sin(300 * x)", 1), ("relu(x)", 0.005), ("abs(x)**3.5", 0), ("x**-100", 1),
     ("exp(x)", -700), ("1e-9 * sin(x)", 1), ("1e9 * sin(x)", 1), ("sigmoid(20 * x)", 0.1),
     ("x**x", 2.3)],
)  # fmt: skip
def test_what_autograd_has_right_is_not_doubted(text, x):
    assert judged(text, x) == []


@pytest.mark.parametrize(
    ("text", "x", "names"),
    [
        ("relu(x)", 0, ["f'", "f''"]),  # 0 is a convention
        ("relu(x) - relu(-x)", 0, ["f'"]),  # this is x: f' is 1, autograd says 0
        ("relu(x * x)", 0, ["f''"]),  # this is x^2: f'' is 2, autograd says 0
        ("relu(x)**2", 0, ["f''"]),
        ("abs(x)", 0, ["f''"]),
        ("log(1 + exp(x))", 400, ["f''"]),  # 2e-174, autograd says 1
        ("log(x**x)", 100, ["f''"]),  # 1 / x, autograd says 31
        ("sin(1e6 * x)", 1, ["f'", "f''"]),
        ("sin(1000 * x)", 1, ["f'"]),  # h / 10 is a whole radian
    ],
)
def test_what_differences_do_not_confirm_is_named(text, x, names):
    said = judged(text, x)
    assert [sentence.split()[0] for sentence in said] == names
    assert all(" is not confirmed: h / 10 does not bring " in sentence for sentence in said)


@pytest.mark.parametrize("off", [-1, -0.5, -0.2, 0.2, 0.5, 1])
def test_a_derivative_that_is_off_by_a_fifth_of_what_differences_are_off_is_doubted(off):
    def differences(h):
        return math.cos(1) - h**2 * math.cos(1) / 6, -math.sin(1) + h**2 * math.sin(1) / 12

    right = [math.cos(1), -math.sin(1)]
    assert doubts(differences, 1, math.sin(1), right, 0.01) == []
    wrong = [e + off * (near - e) for e, near in zip(right, differences(0.01), strict=True)]
    said = doubts(differences, 1, math.sin(1), wrong, 0.01)
    assert [sentence.split()[0] for sentence in said] == ["f'", "f''"]


@pytest.mark.parametrize(
    ("text", "x", "name"),
    [("sqrt(x**4)", 0, "f' is nan"), ("x**(2 + 0*x)", -1.5, "f' is nan"),
     ("sqrt(x)", 0, "f' is inf")],
)  # fmt: skip
def test_a_derivative_that_is_no_number_is_laid_to_the_chain_rule_not_to_f(text, x, name):
    said = judged(text, x)[0]
    assert said.startswith(f"{name} by autograd: a factor of the chain rule is not finite")
    assert "though f may have a derivative" in said


@pytest.mark.parametrize(("text", "x"), [("exp(x)", 709.78), ("log(x)", 0.005), ("x**0.5", 0.01)])
def test_differences_that_leave_the_domain_are_named(text, x):
    said = judged(text, x)
    outside = "is not checked: f(x - h) or f(x + h) is not finite"
    if text == "x**0.5":
        assert said == []  # x - h is 0, where the root is still finite
    else:
        assert said == [f"f' {outside}", f"f'' {outside}"]


# --- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], (None, 1.5, False)),
        (["sin(x)", "--at", "-0.5"], ("sin(x)", -0.5, False)),
        (["--at", "-1e2", "sin(x)"], ("sin(x)", -100, False)),
        (["sin(x)", "--at", "-1e2"], ("sin(x)", -100, False)),
        (["sin(x)", "--at=-1e2"], ("sin(x)", -100, False)),
        (["-x**2"], ("-x**2", 1.5, False)),  # looks like an option
        (["-x + 1", "--at", "-1000"], ("-x + 1", -1000, False)),
        (["-i"], (None, 1.5, True)),
        (["x", "-i", "--at", "2"], ("x", 2, True)),
    ],
)
def test_options(argv, wanted):
    options = expressions.playground_options(argv)
    assert (options["expression"], options["at"], options["interactive"]) == wanted
    assert len(options) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--at", "nan"], "nan is not in -1000 ... 1000"),
        (["--at", "1e9"], "1e9 is not in"),
        (["--at", "-1001"], "-1001 is not in"),
        (["--at", "here"], "invalid point value: 'here'"),
        (["--at"], "expected one argument"),
        (["x", "y"], "unrecognized arguments: y"),
        (["x", "--to", "3"], "unrecognized arguments: --to 3"),
    ],
)
def test_wrong_options_end_with_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        expressions.playground_options(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_what_an_expression_may_hold(capsys):
    with pytest.raises(SystemExit):
        expressions.playground_options(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert expressions.KNOWN in said and "sigmoid" in said


@pytest.fixture
def terminal(monkeypatch):
    """Let `input` read the given lines as if they were typed in a terminal."""

    def typed(lines):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    return typed


def test_asking_again_and_again(terminal, capsys):
    played = []

    def play(text, x):
        if "(" in text:
            raise BadExpression(f"`{text}` is not understood")
        played.append((text, x))

    terminal("x**3 at 2\nx**2\nnonsense(x)\nx at noon\nx at 1001\n5 * x\n\nx**9\n")
    assert expressions.answer(play, "x", 1.5, interactive=True) == 0
    assert played == [("x", 1.5), ("x**3", 2), ("x**2", 2), ("5 * x", 2)]  # the point stays
    out = capsys.readouterr().out
    assert out.count("f(x) = ") == 7
    assert out.startswith("an expression, or one with its point: sin(x) at 2; an empty line ends")
    assert "   `nonsense(x)` is not understood\n" in out
    assert "'noon'" in out and "1001 is not in -1000 ... 1000" in out


def test_the_end_of_the_input_ends_it(terminal, capsys):
    terminal("x\n")
    assert expressions.answer(lambda *_: None, None, 1.5, interactive=True) == 0
    *_, asked, end = capsys.readouterr().out.split("\n")
    assert asked == "f(x) = f(x) = " and end == ""  # the shell's prompt gets a line of its own


def test_asking_needs_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    with pytest.raises(DataError, match="asks in a terminal, and there is none"):
        expressions.answer(lambda *_: None, "x", 1.5, interactive=True)


def test_without_i_one_answer_is_given_and_nothing_is_read(monkeypatch, capsys):
    played = []
    monkeypatch.setattr("builtins.input", None)
    assert expressions.answer(lambda *given: played.append(given), "x", -2, interactive=False) == 0
    assert played == [("x", -2)] and capsys.readouterr() == ("", "")


def test_a_bad_expression_is_one_line_and_status_2(capsys):
    def play(text, x):
        raise BadExpression("no")

    assert expressions.answer(play, "y", 1.5, interactive=False) == 2
    assert capsys.readouterr() == ("", "no\n")
