import math

import pytest
import torch
from torch import nn
from torch.func import grad

F64 = torch.float64


@pytest.fixture
def lesson(load):
    lesson = load("05_jacobian_and_advanced_autograd.py")
    lesson.load_forward_mode()
    return lesson


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(lesson, tmp_path):
    sizes = {"inputs": 8, "outputs": (1, 256), "sizes": (4, 16), "large": 2**12}
    return lambda **given: lesson.main(
        log_dir=tmp_path, descent_steps=100, **{"critic_steps": 100} | sizes | given
    )


def spiral(x):  # R^3 -> R^2
    return torch.stack([x[0] * x[1], x[2].sin() * x[0]])


def saddle(p):  # minima at (0, 1) and (0, -1), a saddle at (0, 0)
    x, y = p
    return x**2 - y**2 + y**4 / 2


@pytest.mark.parametrize("way", ["jacobian_by_rows", "jacobian_by_columns"])
def test_a_wide_jacobian_by_hand(lesson, way):
    x = torch.tensor([2.0, 3.0, 0.5], dtype=F64)
    rows = [[3, 2, 0], [math.sin(0.5), 0, 2 * math.cos(0.5)]]
    expected = torch.tensor(rows, dtype=F64)
    torch.testing.assert_close(getattr(lesson, way)(spiral, x), expected)


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


def test_hvp_of_a_product_by_hand(lesson):
    x, v = torch.tensor([2.0, 3.0], dtype=F64), torch.tensor([1.0, -1.0], dtype=F64)
    Hv = lesson.hvp(lambda x: x[0] ** 2 * x[1], x, v)  # H = [[2 y, 2 x], [2 x, 0]]
    torch.testing.assert_close(Hv, torch.tensor([2.0, 4.0], dtype=F64))


def test_third_is_the_third_derivative(lesson):
    x, e = torch.tensor([2.0, 3.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    T = lesson.third(lambda x: (x**3).sum() + x[0] ** 2 * x[1], x, e)
    torch.testing.assert_close(T, torch.tensor([6 * 0.25 + 4 * 0.5 * 2, 24 + 2 * 0.25], dtype=F64))


def test_rosenbrocks_hessian_by_hand(lesson):
    x, y = p = torch.tensor([-1.2, 0.7], dtype=F64)
    rows = [[2 - 400 * y + 1200 * x**2, -400 * x], [-400 * x, 200]]
    H = lesson.jacobian_by_rows(grad(lesson.rosenbrock), p)
    torch.testing.assert_close(H, torch.tensor(rows, dtype=F64))


@pytest.mark.parametrize("size", [(1,), (4, 3)])
def test_flops_of_a_product_are_two_a_weight(lesson, size):
    B = torch.randn(3, *size[1:])
    assert lesson.flops(torch.matmul, torch.randn(5, 3), B) == 2 * 5 * B.numel()


@pytest.mark.parametrize("start", [(0.46, 0.3), (0.64, 0.8), (-1.2, 1.0), (1.19, 1.73)])
def test_newtons_next_error_is_the_predicted_one(lesson, start):
    paths = lesson.compare_descents(start, 9, 2, lr=1e-3)
    near = [k for k, e in enumerate(paths["newton"]) if -5.8 < e < -3]
    assert near and paths["newton"][-1] < -12
    for k in near:
        assert paths["newton"][k + 1] == pytest.approx(paths["predicted"][k], abs=0.1)
        assert 1.7 < paths["newton"][k + 1] / paths["newton"][k] < 2.5


def test_descent_shrinks_by_the_smallest_eigenvalue(lesson):
    paths = lesson.compare_descents((1.01, 1.02), 1, 200, lr=1e-3)
    assert 1 - paths["factor"] == pytest.approx(1 - paths["factor_theory"], rel=0.02)
    assert paths["factor_theory"] == pytest.approx(1 - 1e-3 * (501 - math.sqrt(501**2 - 400)))


def test_newton_stops_at_a_saddle_where_descent_goes_on_to_a_minimum(lesson):
    p = torch.tensor([0.5, 0.2], dtype=F64)
    end = lesson.newton(saddle, p, 8)[-1]
    torch.testing.assert_close(end, torch.zeros(2, dtype=F64))
    end = lesson.gradient_descent(saddle, p, 0.1, 200)[-1]
    torch.testing.assert_close(end, torch.tensor([0.0, 1.0], dtype=F64))


def test_the_penalty_on_a_linear_critic_by_hand(lesson):
    torch.manual_seed(0)
    w = torch.randn(5, dtype=F64, requires_grad=True)
    norms = lesson.gradient_norms(lambda x: x @ w, torch.randn(4, 5, dtype=F64))
    torch.testing.assert_close(norms, w.norm().expand(4))
    (g,) = torch.autograd.grad((norms - 1).square().mean(), w)
    torch.testing.assert_close(g, 2 * (w.norm() - 1) * w / w.norm())


def test_gradient_norms_are_each_samples_own_unless_batchnorm_mixes_them(lesson):
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    mixed = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    for critic, own in ((plain, True), (mixed, False)):
        J = torch.autograd.functional.jacobian(lambda x, D=critic: D(x)[:, 0], x)  # (B, B, n)
        each = J.diagonal(dim1=0, dim2=1).T.norm(dim=1)
        assert torch.allclose(lesson.gradient_norms(critic, x), each, atol=1e-6) == own


def test_without_create_graph_the_norm_is_a_constant(lesson):
    critic, x = nn.Linear(3, 1), torch.randn(4, 3)
    assert lesson.gradient_norms(critic, x).requires_grad
    assert not lesson.gradient_norms(critic, x, create_graph=False).requires_grad


@pytest.mark.parametrize(("weight", "shift"), [(1, 3.0), (10, 5.0), (2, 1.0)])
def test_try_the_norm_settles_at_one_plus_the_shift_over_twice_the_weight(lesson, weight, shift):
    _, norms = lesson.train_critic(0, weight, True, 200, shift)
    assert sum(norms[-50:]) / 50 == pytest.approx(1 + shift / (2 * weight), rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_main_counts_passes_and_costs_and_holds_the_norm(quick, seed):
    measured = quick(seed=seed)
    modes, norms = measured["modes"], measured["norms"]
    assert [modes[m][:2] for m in (1, 256)] == [(1, 8), (256, 8)]
    assert modes[1][2] < 0.5 and modes[256][2] > 1.5  # reverse wins when m = 1, forward when tall
    assert [row[1:] for row in measured["costs"].values()] == [(2, 5), (2, 17), (2, None)]
    assert measured["paths"]["newton"][-1] < -12 < 0 < measured["paths"]["descent"][-1]
    assert norms["penalty"] == pytest.approx(1.15, abs=0.1)
    assert norms["none"] == norms["no_create_graph"] > 3


def test_main_writes_the_curves(quick, events, tmp_path):
    quick(critic_steps=3)
    read = {run.name: events(run) for run in tmp_path.iterdir()}
    passes = [(e.step, e.value) for e in read["reverse"].Scalars("jacobian/log2_passes")]
    assert passes == [(0, 0), (8, 8)]
    assert [e.value for e in read["forward"].Scalars("jacobian/log2_passes")] == [3, 3]
    assert [e.value for e in read["hvp"].Scalars("hessian/log2_cost")] == [1, 1, 1]
    assert [e.step for e in read["newton"].Scalars("rosenbrock/log10_error")] == [*range(8)]
    curves = [[e.value for e in read[run].Scalars("penalty/grad_norm")]
              for run in ("none", "no_create_graph", "penalty")]  # fmt: skip
    assert curves[0] == curves[1] != curves[2]
