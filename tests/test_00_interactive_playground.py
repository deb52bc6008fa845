import math

import pytest
import torch

from support.expressions import BadExpression, parse_expression


@pytest.fixture
def lesson(load):
    return load("00_interactive_playground.py")


def at(x):
    return torch.tensor(x, dtype=torch.float64)


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
    first = lesson.derivative(parse_expression(text))
    for measured, theory in zip((first(x), lesson.derivative(first)(x)), hand(x), strict=True):
        torch.testing.assert_close(measured.clone(), theory)


@pytest.mark.parametrize(
    ("text", "theory"),
    [("x**3", [0, 0, 0, 6, 0]), ("x**2 * sin(x)", [0, 0, 0, 6, 0]), ("x**(4 - 2)", [0, 0, 2, 0, 0]),
     ("x**0", [1, 0, 0, 0, 0]), ("x", [0, 1, 0, 0, 0])],
)  # fmt: skip
def test_powers_have_all_derivatives_at_0(lesson, text, theory):
    f = parse_expression(text)
    for value in theory:
        assert f(at(0.0)).item() == value
        f = lesson.derivative(f)


@pytest.mark.parametrize("h", [0.1, 0.5, 2.0])
def test_the_differences_of_a_cube_and_of_a_fourth_power_are_off_by_the_first_term_alone(lesson, h):
    x = at(0.7)
    torch.testing.assert_close(lesson.central_differences(lambda x: x**3, x, h)[0], 3 * x**2 + h**2)
    second = lesson.central_differences(lambda x: x**4, x, h)[1]
    torch.testing.assert_close(second, 12 * x**2 + 2 * h**2)


@pytest.mark.parametrize("x", [0.8, 2.3])
@pytest.mark.parametrize("text", ["x**x", "exp(x) / x", "log(x) * sqrt(x)", "tanh(x)**3"])
def test_the_error_of_the_differences_is_the_one_of_theory(lesson, text, x, tmp_path):
    measured = lesson.play(text, x, tmp_path)
    for exact, near, theory in zip(
        measured["autograd"], measured["central"], measured["theory"], strict=True
    ):
        assert abs(theory) > 1e-8
        assert near - exact == pytest.approx(theory, rel=0.02)
    assert measured["doubts"] == []


@pytest.mark.parametrize("seed", range(3))
def test_the_jacobian_by_hand(lesson, seed):
    p = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lesson.cartesian, p)
    torch.testing.assert_close(lesson.cartesian_jacobian(p), jacobian)
    torch.testing.assert_close(torch.det(jacobian), p[0])
    assert (jacobian - jacobian.T).abs().max() > 0.1


def test_the_jacobian_section_compares_all_it_prints(lesson, capsys, monkeypatch):
    measured = lesson.show_jacobian()
    out = capsys.readouterr().out
    assert out.count("    0.8660   -1.0000    0.5000    1.7321\n") == 3
    assert len(measured["jacobian_off"]) == 3 and max(measured["jacobian_off"]) < 1e-15
    assert "-> the two calls and the Jacobian by hand differ by at most " in out
    for module, name in ((torch.func, "jacrev"), (torch.autograd.functional, "jacobian")):
        with monkeypatch.context() as patch:
            theirs = getattr(module, name)
            if name == "jacrev":
                patch.setattr(module, name, lambda f, t=theirs: lambda p: t(f)(p).T)
            else:
                patch.setattr(module, name, lambda f, p, t=theirs: t(f, p).T)
            with pytest.raises(AssertionError):
                lesson.show_jacobian()
        assert "differ by at most 1\n" in capsys.readouterr().out


def test_what_is_printed_of_the_first_two_sections(lesson, capsys):
    assert lesson.show_first() == 8
    out = capsys.readouterr().out
    assert "x = 3.0, x.grad = None\n" in out and "y = 15.0; y knows how it was made" in out
    assert "x.grad = 8.0\n" in out and "-> dy/dx is 8.0; by hand 2x + 2 = 8.0" in out
    torch.manual_seed(3)
    x = torch.randn(4)
    torch.manual_seed(3)
    measured = lesson.show_many()
    assert measured["many"] == pytest.approx((8 * x + 4).tolist(), rel=1e-5)
    out = capsys.readouterr().out
    for i, value in enumerate(x.tolist()):
        row = f"   {i}   {value:8.4f}   {8 * value + 4:9.4f}   {8 * value + 4:22.4f}\n"
        assert row in out
    assert "-> one backward() gave 4 derivatives; largest difference" in out
    title = "2. Does one backward() give all derivatives? y = sum over i of (2 x_i + 1)^2"
    assert f"{title}\n" in out


def printed(lesson, capsys, text, x, tmp_path):
    """The rows of f' and f'' and the sentences that `play` prints."""
    lesson.play(text, x, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = {
        words[0]: words[1:] for line in lines if (words := line.split())[0] in ("f", "f'", "f''")
    }
    return rows, [line.strip() for line in lines if "->" in line]


def test_what_is_printed_of_a_function(lesson, capsys, tmp_path):
    rows, said = printed(lesson, capsys, "sin(x) * x**2", 1.5, tmp_path)
    assert rows == {
        "f": ["2.24436372"],
        "f'": ["3.151643664", "3.151498462", "-1.452e-04", "-1.452e-04", "=", "h^2", "f'''/6"],
        "f''": ["0.1750494634", "0.174961344", "-8.812e-05", "-8.812e-05", "=", "h^2", "f''''/12"],
    }
    assert said == [
        "-> f' and f'' are confirmed: with h / 10 the differences come ten times as near, "
        "up to rounding"
    ]


def test_try_what_relu_and_an_overflow_do_to_the_results(lesson, capsys, tmp_path):
    rows, said = printed(lesson, capsys, "relu(x)", 0.0, tmp_path)
    assert rows["f'"][:3] == ["0", "0.5", "+5.000e-01"]
    assert [words.split()[1] for words in said] == ["f'", "f''"]
    slope = lesson.derivative(torch.relu)
    assert [slope(at(x)).item() for x in (-1e-9, 1e-9)] == [0, 1]
    rows, said = printed(lesson, capsys, "log(1 + exp(x))", 400.0, tmp_path)
    assert rows["f'"][0] == "1" and rows["f''"][0] == "1" and abs(float(rows["f''"][1])) < 1e-7
    assert [words.split()[1] for words in said] == ["f''"]
    assert math.exp(-400) == pytest.approx(1.9e-174, rel=0.02)  # s (1 - s), s the sigmoid of 400
    v = torch.exp(at(400.0))
    assert 1 / v / v == 0 and math.exp(-700) ** 0.5 > 0  # 4e-348 is too small for a float64
    near = lesson.derivative(lesson.derivative(parse_expression("log(1 + exp(x))")))(at(360.0))
    assert math.isinf(torch.exp(at(360.0)).square()) and abs(near) < 1e-9  # too large harms none


@pytest.mark.parametrize("text", ["-" * 199 + "x", "x" + "*x" * 99, "9" * 199, "((x**99)**99)**99"])
def test_the_longest_expressions_are_answered_or_refused_at_once(lesson, text, tmp_path):
    try:
        assert math.isfinite(lesson.play(text, 1.01, tmp_path)["f"])
    except BadExpression as error:
        assert "is inf" in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y", "`y` is not understood"),
        ("log(x - 2)", "`log(x - 2)` is nan at x = 1.5"),
        ("1 / (x - 1.5)", "is inf at x = 1.5"),
        ("exp(exp(exp(9 * x)))", "is inf at x = 1.5"),
        ("1e999 - x", "is inf at x = 1.5"),
        ("(-8)**(1/3)", "is nan at x = 1.5"),
    ],
)
def test_what_has_no_value_gets_one_line_and_status_2(lesson, text, message, tmp_path, capsys):
    folder = tmp_path
    assert lesson.main(expression=text, log_dir=folder) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_an_expression_is_played_alone(lesson, tmp_path, capsys):
    assert lesson.main(expression="sin(x)", at=-0.5, log_dir=tmp_path) == 0
    out = capsys.readouterr().out
    assert f"{math.cos(-0.5):.10g}" in out and "1. " not in out
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")


def test_interactive_asks_where_there_is_a_terminal(lesson, tmp_path, monkeypatch, capsys):
    asked = iter(["x**2 at 3", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert lesson.main(interactive=True, log_dir=tmp_path) == 0
    out = capsys.readouterr().out
    assert "f(x) = x**2 at x = 3;" in out and "1. " not in out


def test_the_curves_are_drawn_where_the_function_is_defined(lesson, tmp_path, events):
    lesson.play("log(x)", 1.0, tmp_path)  # x = -2 + s / 50 is positive from step 101 on
    for run, theory in {"f": math.log, "f_prime": lambda x: 1 / x,
                        "f_second": lambda x: -1 / x**2}.items():  # fmt: skip
        loaded = events(tmp_path / run)
        curve = loaded.Scalars("curve/y")
        assert [event.step for event in curve] == [*range(101, 301)]
        for event in curve:
            assert event.value == pytest.approx(theory(-2 + event.step / 50), rel=1e-5, abs=1e-6)
        (text,) = loaded.Tensors("curve/expression/text_summary")
        assert text.tensor_proto.string_val[0].decode() == "`log(x)` for x = -2 to 4"


def test_another_expression_replaces_the_curves(lesson, tmp_path, events):
    for text in ("x", "3 * x"):
        lesson.play(text, 2.0, tmp_path)
    curve = events(tmp_path / "f").Scalars("curve/y")
    assert [event.step for event in curve] == [*range(301)]
    assert curve[-1].value == pytest.approx(15)


@pytest.mark.parametrize(("seed", "x"), [(0, 1.5), (1, -2.0), (2, 0.6), (3, 4.0)])
def test_main_finds_every_derivative_equal(lesson, tmp_path, seed, x, capsys):
    measured = lesson.main(seed=seed, log_dir=tmp_path, at=x)
    out = capsys.readouterr().out
    assert measured["slope"] == 8 and max(measured["off"]) < 1e-13
    assert measured["many"] == pytest.approx(measured["many_by_hand"], rel=1e-5)
    for exact, near, theory in zip(
        measured["autograd"], measured["central"], measured["theory"], strict=True
    ):
        assert near - exact == pytest.approx(theory, rel=0.01, abs=1e-8)
        assert abs(near - exact) > 1e-6
    assert f"-> autograd is off by {max(measured['off']):.0e} from f' and f'' by hand" in out
    assert [line[:2] for line in out.splitlines() if line[1:2] == "."] == ["1.", "2.", "3.", "4."]
    for head in (
        "1. How fast does y = x^2 + 2x grow at x = 3?\n   line of code  ",
        "   i        x_i   x.grad[i]   by hand: 4 (2 x_i + 1)\n",
        "3. Which call gives all derivatives of two outputs by two inputs (their Jacobian)?\n",
        "   f: p = (r, t) -> (u, v) = (r cos t, r sin t), at r = 2, t = pi / 6\n",
        "   call                                         du/dr     du/dt     dv/dr     dv/dt\n",
        f"   f(x) = sin(x) * x**2 at x = {x:g}; differences with h = 0.01\n",
        "4. The playground: are the derivatives of a function that you type right?\n",
        "   autograd        differences   differences - autograd   by theory\n",
    ):
        assert head in out
    *_, invitation, look = out.splitlines()
    assert '"exp(-x**2)" --at 1' in invitation and look.startswith("look: tensorboard")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f_prime", "f_second"]
