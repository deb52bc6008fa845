import math

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp

F64 = torch.float64


@pytest.fixture
def lesson(load):
    lesson = load("05_jacobian_and_advanced_autograd.py")
    lesson.load_forward_mode()
    return lesson


def double(*numbers):
    return torch.tensor(numbers, dtype=F64)


def spiral(x):  # R^3 -> R^2
    return torch.stack([x[0] * x[1], x[2].sin() * x[0]])


def saddle(p):  # minima at (0, 1) and (0, -1), a saddle at (0, 0)
    x, y = p
    return x**2 - y**2 + y**4 / 2


def curve(events, run, tag):
    return {e.step: e.value for e in events(run).Scalars(tag)}


# --- in everyday code --------------------------------------------------------------------------


def test_the_everyday_calls_give_the_slopes_by_hand(lesson, capsys):
    results = lesson.show_everyday()
    J = torch.tensor([[3.0, 2], [4, 0], [0, 1]])
    for name, expected in {
        "J": J, "jacfwd": J, "uJ": torch.tensor([1.0, 0, 2]) @ J,
        "Jv": J @ torch.tensor([1.0, -1]), "H": torch.tensor([[6.0, 4], [4, 0]]),
    }.items():  # fmt: skip
        assert torch.equal(results[name], expected)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = [
        ["3.0", "2.0"], ["4.0", "0.0"], ["0.0", "1.0"], ["by", "0"], ["by", "x1"], ["3.0", "4.0"],
        ["for", "f2"], ["4.0", "-1.0"], ["by", "x1"], ["6.0", "4.0"], ["4.0", "0.0"],
    ]  # fmt: skip
    assert [row[-2:] for row in rows[2:13]] == numbers
    assert " ".join(rows[13]) == "-> J has 3 rows, one per output, and 2 columns, one per input"


# --- Jacobians ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["jacobian_by_rows", "jacobian_by_columns"])
def test_a_wide_jacobian_by_hand(lesson, way):
    expected = double([3, 2, 0], [math.sin(0.5), 0, 2 * math.cos(0.5)])
    J = getattr(lesson, way)(spiral, double(2.0, 3.0, 0.5))
    torch.testing.assert_close(J, expected)


@pytest.mark.parametrize(("n", "m"), [(3, 7), (7, 3), (5, 1)])
@pytest.mark.parametrize("way", ["jacobian_by_rows", "jacobian_by_columns"])
def test_a_jacobian_of_float32_is_functionals(lesson, n, m, way):
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(n, m), nn.Softplus()), torch.randn(n)
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(getattr(lesson, way)(layer, x), expected)
    assert expected.shape == (m, n)


def test_rows_of_a_number_are_refused(lesson):
    with pytest.raises(ValueError, match=r"a vector \(m,\), not \(\)"):
        lesson.jacobian_by_rows(torch.sum, torch.zeros(3))


def test_passes_are_counted_as_they_run(lesson):
    passes = lesson.Counter()
    x = torch.zeros(3, requires_grad=True)
    y = lesson.counted(torch.sin, passes)(x)
    for _ in range(4):
        torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    lesson.counted(torch.cos, passes)(x.detach())
    assert passes == {"forward": 2, "backward": 4}


@pytest.mark.parametrize("size", [(1,), (4, 3)])
def test_flops_of_a_product_are_two_per_weight(lesson, size):
    B = torch.randn(3, *size[1:])
    assert lesson.flops(torch.matmul, torch.randn(5, 3), B) == 2 * 5 * B.numel()


def test_two_layers_are_their_formula_and_no_two_are_alike(lesson):
    torch.manual_seed(0)
    f, jacobian = lesson.two_layers(6, 4, hidden=5)
    g, _ = lesson.two_layers(6, 4, hidden=5)
    x = torch.randn(6, dtype=F64)
    assert f(x).shape == (4,) and not torch.equal(f(x), g(x))
    torch.testing.assert_close(jacobian(x), lesson.jacrev(f)(x))
    deep, _ = lesson.two_layers(400, 300)  # each unit starts at a variance of about 1
    assert 0.15 < deep(torch.randn(400, dtype=F64)).square().mean() < 1


def test_what_is_printed_of_the_modes_is_counted(lesson, tmp_path, events, capsys):
    torch.manual_seed(0)
    measured = lesson.show_modes(tmp_path, 4, (1, 64))
    assert measured["counts"] == {1: (1, 4), 64: (64, 4)}
    assert measured["back"] == pytest.approx(1) and measured["ahead"] >= 2
    assert measured["work"][1] < 0.6 and measured["work"][64] > 4
    for m, work in measured["work"].items():  # one forward pass and m backward ones
        assert work == pytest.approx((m + 1) / (measured["ahead"] * 4))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[3][:4] == ["1", "1", "4", f"{measured['work'][1]:.2f}"]
    assert rows[4][:4] == ["64", "64", "4", f"{measured['work'][64]:.2f}"]
    torch.manual_seed(0)
    for row, m in zip(rows[3:5], (1, 64), strict=True):  # drawn as in the lesson
        f, jacobian = lesson.two_layers(4, m)
        x = torch.randn(4, dtype=F64)
        ways = (lesson.jacobian_by_rows, lesson.jacobian_by_columns)
        found = [way(f, x) for way in ways] + [way(f)(x) for way in (jacrev, jacfwd)]
        assert row[4] == f"{jacobian(x)[0, 0]:.4f}"
        assert row[5] == f"{max((J - jacobian(x)).abs().max() for J in found):.0e}"
    assert " ".join(rows[6]) == "-> take rows for m = 1; take columns for m = 64"
    ahead = f"a forward-mode pass {measured['ahead']:.2g}"
    assert (
        " ".join(rows[7]) == f"-> a backward pass takes 1 times the multiplications of f, {ahead}"
    )
    turn = f"both ways cost the same at m = {measured['ahead'] * 4 - 1:.0f}"
    assert " ".join(rows[8]).endswith(turn)
    assert curve(events, tmp_path / "reverse", "jacobian/log2_passes") == {0: 0, 6: 6}
    assert curve(events, tmp_path / "forward", "jacobian/log2_passes") == {0: 2, 6: 2}


def test_a_wrong_jacobian_would_be_seen(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "jacobian_by_columns", lambda f, x: lesson.jacfwd(f)(x) + 1)
    with pytest.raises(AssertionError):
        lesson.show_modes(tmp_path, 4, (2, 64))


# --- H v ---------------------------------------------------------------------------------------


def test_hvp_of_a_product_by_hand(lesson):
    x, v = double(2.0, 3.0), double(1.0, -1.0)
    Hv = lesson.hvp(lambda x: x[0] ** 2 * x[1], x, v)  # H = [[2 y, 2 x], [2 x, 0]]
    torch.testing.assert_close(Hv, double(2.0, 4.0))


def test_hvp_is_the_product_with_hessian(lesson):
    torch.manual_seed(0)
    f, by_hand = lesson.log_sum_exp(7)
    x, v = torch.randn(2, 7, dtype=F64)
    H = hessian(f)(x)
    assert (H @ v).norm() > 1e-3
    torch.testing.assert_close(lesson.hvp(f, x, v), H @ v)
    torch.testing.assert_close(by_hand(x, v), H @ v)
    torch.testing.assert_close(H, H.T)


def hvp_rows(out):
    return {row[0]: row[1:] for row in (line.split() for line in out.splitlines()[3:])}


def test_what_is_printed_of_hvp_is_measured(lesson, tmp_path, events, capsys):
    torch.manual_seed(0)
    costs = lesson.show_hvp(tmp_path, (4, 16), 512)
    assert costs == {"hvp": {4: 2, 16: 2, 512: 2}, "hessian": {4: 5, 16: 17}}
    out = capsys.readouterr().out
    rows = hvp_rows(out)
    assert rows["4"][:4] == ["2", "5", "0.000", "MB"]
    assert rows["16"][:4] == ["2", "17", "0.002", "MB"]
    assert rows["512"][:5] == ["2", "not", "built", "2.097", "MB"]  # 8 bytes each
    torch.manual_seed(0)
    for n in (4, 16, 512):  # drawn as in the lesson
        f, by_hand = lesson.log_sum_exp(n)
        x, v = torch.randn(2, n, dtype=F64)
        apart = (lesson.hvp(f, x, v) - by_hand(x, v)).abs().max()
        assert apart < 1e-12
        assert rows[str(n)][-2:] == [f"{by_hand(x, v)[0]:.1e}", f"{apart:.0e}"]
    assert "-> H v costs 2 gradients at every n\n" in out
    assert curve(events, tmp_path / "hvp", "hessian/log2_cost") == {2: 1, 4: 1, 9: 1}
    found = curve(events, tmp_path / "hessian", "hessian/log2_cost")
    assert found == pytest.approx({2: math.log2(5), 4: math.log2(17)})


def test_a_wrong_product_would_be_seen(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "hvp", lambda f, x, v: 2 * v)
    with pytest.raises(AssertionError):
        lesson.show_hvp(tmp_path, (4,), 8)


def test_forward_over_reverse_gives_the_same(lesson):
    torch.manual_seed(0)
    f, _ = lesson.log_sum_exp(7)
    x, v = torch.randn(2, 7, dtype=F64)
    torch.testing.assert_close(lesson.hvp(f, x, v), jvp(grad(f), (x,), (v,))[1])


def test_try_the_product_with_a_unit_vector_is_a_column(lesson, edited, capsys):
    more = "    print(hvp(loss, x, torch.tensor([1.0, 0.0])))\n"
    edited(lesson, "    return results\n", more + "    return results\n").show_everyday()
    assert capsys.readouterr().out.splitlines()[-1] == "tensor([6., 4.])"


# --- Newton ------------------------------------------------------------------------------------


def test_rosenbrocks_hessian_by_hand(lesson):
    x, y = p = double(-1.2, 0.7)
    expected = double([2 - 400 * y + 1200 * x**2, -400 * x], [-400 * x, 200])
    H = lesson.jacobian_by_rows(grad(lesson.rosenbrock), p)
    torch.testing.assert_close(H, expected)
    assert lesson.rosenbrock(torch.ones(2)) == 0 == grad(lesson.rosenbrock)(torch.ones(2)).norm()


def next_error(lesson, f, best, e):
    """Newton's error after a step from best + e: |H^-1 T| / 2, T = d^2/dt^2 grad f(best + t e)."""
    T = jvp(lambda p: lesson.hvp(f, p, e), (best,), (e,))[1]
    H = lesson.jacobian_by_rows(grad(f), best)
    return (torch.linalg.solve(H, T) / 2).norm().item()


def test_the_predicted_error_is_half_of_h_inverse_times_the_third_derivative(lesson):
    def f(x):
        return (x**3).sum() + x[0] ** 2 * x[1] + 4 * x.square().sum()

    x, e = double(2.0, 3.0), double(0.5, 2.0)
    T = double(6 * 0.25 + 4 * 0.5 * 2, 24 + 2 * 0.25)
    H = double([6 * 2 + 2 * 3 + 8, 2 * 2], [2 * 2, 6 * 3 + 8])
    expected = (torch.linalg.solve(H, T) / 2).norm().item()
    assert next_error(lesson, f, x, e) == pytest.approx(expected)


@pytest.mark.parametrize("start", [(0.8, 0.6), (0.46, 0.3), (0.64, 0.8), (-1.2, 1.0), (1.19, 1.73)])
def test_newtons_next_error_is_the_predicted_one_where_it_is_small(lesson, start):
    errors = lesson.newton(lesson.rosenbrock, double(*start), 9) - 1
    sizes, seen = errors.norm(dim=1).tolist(), 0
    assert sizes[-1] < 1e-12
    for k in range(1, 10):
        if 1e-7 < sizes[k - 1] < 1e-3:  # small for the law, its square not for float64
            law, seen = next_error(lesson, lesson.rosenbrock, double(1, 1), errors[k - 1]), seen + 1
            assert sizes[k] == pytest.approx(law, rel=0.15)
            assert 1.5 < math.log(sizes[k]) / math.log(sizes[k - 1]) < 2.6  # digits about double
    assert seen


def test_descent_shrinks_by_the_smallest_eigenvalue(lesson):
    path = lesson.descent(lesson.rosenbrock, double(1.01, 1.02), 1e-3, 200)
    errors = (path - 1).norm(dim=1)
    slowest = 1e-3 * (501 - math.sqrt(501**2 - 400))  # lr lambda_min
    assert 1 - errors[-1] / errors[-2] == pytest.approx(slowest, rel=0.02)


def test_newton_stops_at_a_saddle_where_descent_goes_on_to_a_minimum(lesson):
    end = lesson.newton(saddle, double(0.5, 0.2), 8)[-1]
    torch.testing.assert_close(end, double(0.0, 0.0))
    end = lesson.descent(saddle, double(0.5, 0.2), 0.1, 200)[-1]
    torch.testing.assert_close(end, double(0.0, 1.0))


def test_what_is_printed_of_newton_is_measured(lesson, tmp_path, events, capsys):
    measured = lesson.show_newton(tmp_path)
    slow, fast = measured["descent"], measured["newton"]
    assert slow[0] == fast[0] == pytest.approx(math.hypot(0.2, 0.4))
    assert fast[6] < 1e-11 and slow[6] > 0.4
    assert fast == sorted(fast, reverse=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4. From (0.8, 0.6) to the minimum (1, 1)")
    for k, line in enumerate(lines[2:9]):
        assert line.split() == [str(k), f"{slow[k]:.1e}", f"{fast[k]:.1e}"]
    left = f"{slow[6]:.0e} by descent, {fast[6]:.0e} by Newton"
    assert lines[9] == f"   -> left after 6 steps: {left}"
    limit = 2 / (501 + math.sqrt(501**2 - 400))  # H at (1, 1) has the trace 1002, determinant 400
    assert lines[10].endswith(f"descent diverges with a step over {limit:.4f}; a Newton")
    away = lesson.descent(lesson.rosenbrock, double(1 + 1e-9, 1), 1.05 * limit, 50)[-1] - 1
    near = lesson.descent(lesson.rosenbrock, double(1 + 1e-9, 1), 0.95 * limit, 50)[-1] - 1
    assert near.norm() < 1e-9 < away.norm()
    for run, errors in {"descent": slow, "newton": fast}.items():
        logs = {k: math.log10(error) for k, error in enumerate(errors)}
        assert curve(events, tmp_path / run, "newton/log10_error") == pytest.approx(logs)


# --- the penalty -------------------------------------------------------------------------------


def test_the_penalty_on_a_linear_critic_by_hand(lesson):
    torch.manual_seed(0)
    a = torch.randn(5, dtype=F64, requires_grad=True)
    penalty = lesson.gradient_penalty(lambda x: x @ a, torch.randn(4, 5, dtype=F64))
    torch.testing.assert_close(penalty, (a.norm() - 1) ** 2)
    (g,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(g, 2 * (a.norm() - 1) * a / a.norm())


def test_the_penalty_is_the_mean_over_each_samples_own_norm(lesson):
    x = double([3.0, 4.0], [0.0, 1.0], [0.0, 0.5])  # D = |x|^2 / 2 has the gradient x
    penalty = lesson.gradient_penalty(lambda x: x.square().sum(1) / 2, x.requires_grad_())
    assert penalty.item() == pytest.approx(((5 - 1) ** 2 + 0 + 0.25) / 3)
    assert x.grad is None


def test_batch_norm_mixes_the_samples_of_a_penalty(lesson):
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    mixed = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    for D, own in ((plain, True), (mixed, False)):
        J = torch.autograd.functional.jacobian(lambda x, D=D: D(x)[:, 0], x)  # (B, B, n)
        each = J.diagonal(dim1=0, dim2=1).T.norm(dim=1)
        expected = (each - 1).square().mean()
        assert torch.allclose(lesson.gradient_penalty(D, x), expected, atol=1e-6) == own


def test_without_create_graph_the_penalty_is_a_constant(lesson):
    D, x = nn.Linear(3, 1), torch.randn(4, 3)
    assert lesson.gradient_penalty(D, x).requires_grad
    assert not lesson.gradient_penalty(D, x, create_graph=False).requires_grad


@pytest.mark.parametrize(("weight", "shift"), [(1.0, 3.0), (10.0, 5.0), (2.0, -1.0)])
def test_the_norm_settles_at_one_plus_the_shift_over_twice_the_weight(lesson, weight, shift):
    lengths = lesson.train_critic(weight, True, 600, shift=(0.0, shift))
    assert lengths[-1] == pytest.approx(1 + abs(shift) / (2 * weight), rel=1e-4)


def test_what_is_printed_of_the_penalty_is_measured(lesson, tmp_path, events, capsys):
    lengths = lesson.show_penalty(tmp_path)
    assert lengths["penalty"][-1] == pytest.approx(1.15, abs=1e-4)
    a = double(0.6, 0.8) + double(0.02 * 3, 0)  # one step of SGD without a penalty
    assert lengths["none"][0] == pytest.approx(a.norm().item())
    assert lengths["none"] == lengths["no_create_graph"] and lengths["none"][-1] > 6
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[4:7]}
    last = f"{lengths['none'][-1]:.4f}"
    assert rows["penalty"] == ["10", "True", "1.1500"]
    assert rows["none"] == ["0", "True", last]
    assert rows["no_create_graph"] == ["10", "False", last]
    assert "-> without create_graph |a| is as without a penalty, and no error is raised\n" in out
    assert "-> with the penalty |a| is 1.1500; the loss is least at" in out
    assert "1 + |d| / (2 weight) = 1.1500\n" in out
    for run, values in lengths.items():
        found = curve(events, tmp_path / run, "penalty/grad_norm")
        assert found == pytest.approx(dict(enumerate(values, 1)))


def test_another_shift_is_told(lesson, tmp_path, capsys):
    lengths = lesson.show_penalty(tmp_path, 600, 4.0, (0.0, -2.0))
    assert lengths["penalty"][-1] == pytest.approx(1.25, rel=1e-4)
    out = capsys.readouterr().out
    assert "d = (0.0, -2.0)" in out and "1 + |d| / (2 weight) = 1.2500\n" in out


# --- the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main(lesson, tmp_path, capsys, seed):
    sizes = {"inputs": 8, "outputs": (1, 256), "sizes": (4, 16), "large": 2**12}
    measured = lesson.main(seed=seed, log_dir=tmp_path, **sizes)
    assert measured["modes"]["counts"] == {1: (1, 8), 256: (256, 8)}
    assert measured["modes"]["work"][1] < 0.5 and measured["modes"]["work"][256] > 1.5
    assert measured["costs"]["hvp"] == {4: 2, 16: 2, 2**12: 2}
    assert measured["costs"]["hessian"] == {4: 5, 16: 17}
    out = capsys.readouterr().out
    assert "-> take rows for m = 1; take columns for m = 256\n" in out
    assert f"look: tensorboard --logdir {tmp_path} " in out
    runs = {"reverse", "forward", "hvp", "hessian", "newton", "descent",
            "penalty", "none", "no_create_graph"}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == runs
