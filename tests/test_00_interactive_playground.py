import io
import math

import pytest
import torch


@pytest.fixture
def lesson(load):
    return load("00_interactive_playground.py")


def at(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.fixture
def terminal(monkeypatch):
    """Let `input` read the given lines as if they were typed in a terminal."""

    def typed(lines):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    return typed


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
     "log(tan(x / 2))", "1_000 * x"],
)  # fmt: skip
def test_an_expression_means_what_python_means_by_it(lesson, text, x):
    f = lesson.parse_expression(text)
    assert f(at(x)).item() == pytest.approx(eval(text.strip(), {**NAMES, "x": x}))


@pytest.mark.parametrize(
    ("text", "hand"),
    [
        ("x**3", lambda x: (3 * x**2, 6 * x)),
        ("exp(-2 * x)", lambda x: (-2 * (-2 * x).exp(), 4 * (-2 * x).exp())),
        ("1 / x", lambda x: (-1 / x**2, 2 / x**3)),
        ("sin(cos(x))", lambda x: (
            -x.sin() * x.cos().cos(),
            -x.cos() * x.cos().cos() - x.sin() ** 2 * x.cos().sin(),
        )),
        ("7", lambda x: (0 * x, 0 * x)),
        ("abs(x)", lambda x: (x.sign(), 0 * x)),
    ],
)  # fmt: skip
def test_derivatives_are_those_by_hand(lesson, text, hand):
    x = torch.tensor([-1.9, -0.2, 0.7, 3.1], dtype=torch.float64)
    _, first, second = lesson.derivatives(lesson.parse_expression(text), 2)
    for measured, theory in zip((first(x), second(x)), hand(x), strict=True):
        torch.testing.assert_close(measured.clone(), theory)


@pytest.mark.parametrize(
    ("text", "theory"),
    [("x**3", [0, 0, 0, 6, 0]), ("x**2 * sin(x)", [0, 0, 0, 6, 0]), ("x**(4 - 2)", [0, 0, 2, 0, 0]),
     ("x**0", [1, 0, 0, 0, 0]), ("x", [0, 1, 0, 0, 0])],
)  # fmt: skip
def test_powers_have_all_derivatives_at_0(lesson, text, theory):
    f = lesson.parse_expression(text)
    assert [d(at(0.0)).item() for d in lesson.derivatives(f, 4)] == theory


@pytest.mark.parametrize("h", [0.1, 0.5, 2.0])
def test_the_differences_of_a_cube_and_of_a_fourth_power_are_off_by_the_first_term_alone(lesson, h):
    x = at(0.7)
    torch.testing.assert_close(lesson.central_differences(lambda x: x**3, x, h)[0], 3 * x**2 + h**2)
    second = lesson.central_differences(lambda x: x**4, x, h)[1]
    torch.testing.assert_close(second, 12 * x**2 + 2 * h**2)


@pytest.mark.parametrize("x", [0.8, 2.3])
@pytest.mark.parametrize("text", ["x**x", "exp(x) / x", "log(x) * sqrt(x)", "tanh(x)**3"])
def test_the_error_of_the_differences_is_the_one_foretold(lesson, text, x, tmp_path):
    measured = lesson.play(text, x, tmp_path)
    for exact, near, theory in zip(
        measured["autograd"], measured["central"], measured["theory"], strict=True
    ):
        assert abs(theory) > 1e-8
        assert near - exact == pytest.approx(theory, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_the_jacobian_by_hand(lesson, seed):
    p = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lesson.cartesian, p)
    torch.testing.assert_close(lesson.cartesian_jacobian(p), jacobian)
    assert (jacobian - jacobian.T).abs().max() > 0.1


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
        ("log(x - 2)", r"`log\(x - 2\)` is nan at x = 1.5"),
        ("1 / (x - 1.5)", r"is inf at x = 1.5"),
        ("exp(exp(exp(9 * x)))", "is inf at x = 1.5"),
    ],
)
def test_what_is_no_expression_gets_one_line_and_status_2(lesson, text, message, tmp_path, capsys):
    with pytest.raises(lesson.BadExpression, match=message):
        lesson.play(text, log_dir=tmp_path)
    assert lesson.command([text], log_dir=tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["-" * 199 + "x", "x" + "*x" * 99, "9" * 199, "((x**99)**99)**99"])
def test_the_longest_expressions_are_answered_or_refused_at_once(lesson, text, tmp_path):
    try:
        assert math.isfinite(lesson.play(text, 1.01, tmp_path)["f"])
    except lesson.BadExpression as error:
        assert "is inf" in str(error)


def test_try_at_the_kink_of_relu_autograd_says_0_and_differences_a_half(lesson, tmp_path):
    measured = lesson.play("relu(x)", 0.0, tmp_path)
    assert measured["autograd"][0] == 0
    assert measured["central"][0] == pytest.approx(0.5)
    slopes = [lesson.derivatives(torch.relu, 1)[1](at(x)).item() for x in (-1e-9, 1e-9)]
    assert slopes == [0, 1]


def test_the_curves_are_drawn_where_the_function_is_defined(lesson, tmp_path, events):
    lesson.play("log(x)", 1.0, tmp_path)  # x = -2 + s / 50 is positive from step 101 on
    for run, theory in {"f": math.log, "f_prime": lambda x: 1 / x,
                        "f_second": lambda x: -1 / x**2}.items():  # fmt: skip
        curve = events(tmp_path / run).Scalars("curve/y")
        assert [event.step for event in curve] == [*range(101, 301)]
        for event in curve:
            assert event.value == pytest.approx(theory(-2 + event.step / 50), rel=1e-5, abs=1e-6)


def test_another_expression_replaces_the_curves(lesson, tmp_path, events):
    for text in ("x", "3 * x"):
        lesson.play(text, 2.0, tmp_path)
    curve = events(tmp_path / "f").Scalars("curve/y")
    assert [event.step for event in curve] == [*range(301)]
    assert curve[-1].value == pytest.approx(15)


def test_the_command_line(lesson, tmp_path, capsys):
    assert lesson.command(["sin(x)", "--at", "-0.5"], tmp_path) == 0
    assert f"{math.cos(-0.5):.10g}" in capsys.readouterr().out
    assert lesson.command(["-x**2"], tmp_path) == 0  # looks like an option
    assert "-2.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [["x", "--at", "nan"], ["--at", "1e9"], ["--at", "here"], ["x", "y"], ["x", "--to", "3"]],
)
def test_wrong_arguments_end_with_status_2(lesson, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_i_asks_again_and_again(lesson, terminal, tmp_path, capsys):
    terminal("x**3 at 2\nx**2\nnonsense(x)\nx at noon\nx at 1001\n5 * x\n\nx**9\n")
    assert lesson.command(["-i"], tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("f(x) = ") == 7 + 3  # seven prompts, three answers
    assert "f(x) = x**2   x = 2 " in out  # the point stays
    assert "`nonsense(x)` is not understood" in out
    assert "'noon'" in out
    assert "1001 is not in -1000 … 1000" in out
    assert "f(x) = 5 * x   x = 2 " in out


def test_i_ends_with_the_input_and_with_ctrl_c(lesson, terminal, tmp_path, monkeypatch):
    terminal("x\n")
    assert lesson.command(["-i"], tmp_path) == 0

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert lesson.command(["-i"], tmp_path) == 130


def test_i_needs_a_terminal(lesson, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    assert lesson.command(["-i"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("seed", "x"), [(0, 1.5), (1, -2.0), (2, 0.6), (3, 4.0)])
def test_main_finds_every_derivative_equal(lesson, tmp_path, seed, x, capsys):
    measured = lesson.main(seed=seed, log_dir=tmp_path, at=x)
    out = capsys.readouterr().out
    assert f"{torch.__version__}\n" in out
    assert max(measured["off"]) < 1e-13
    assert measured["determinant"] > 0
    for exact, near, theory in zip(
        measured["autograd"], measured["central"], measured["theory"], strict=True
    ):
        assert near - exact == pytest.approx(theory, rel=0.01, abs=1e-8)
        assert abs(near - exact) > 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f_prime", "f_second"]
