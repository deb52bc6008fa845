import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def lesson(load):
    return load("01_manual_gradient.py")


def scattered(n, seed):
    """Points (N,) that lie on no line."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, generator=generator, dtype=torch.float64)


def rates(lesson, x):
    """The eigenvalues of the Hessian, its eigenvectors, and the limit 2 / lambda_max."""
    eigenvalues, directions = torch.linalg.eigh(lesson.hessian(x))
    return eigenvalues, directions, 2 / eigenvalues[-1].item()


def test_the_gradient_of_two_points_by_pencil(lesson):
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])  # r = -3, -5
    assert lesson.gradient(0.0, 0.0, x, y).tolist() == [-13.0, -8.0]


def test_the_data_is_the_line(lesson):
    x, y = lesson.make_data()
    assert torch.equal(y, 2 * x + 1)
    assert (x[0], x[-1], len(x)) == (-3, 1, 20)
    assert x.mean().item() == pytest.approx(-1)


@pytest.mark.parametrize("n", [1, 7, 33])
def test_gradient_and_hessian_are_autograds(lesson, n):
    x, y = scattered(n, seed=n)
    p = torch.tensor([-1.3, 0.7], dtype=x.dtype, requires_grad=True)
    F.mse_loss(p[0] * x + p[1], y).backward()
    torch.testing.assert_close(lesson.gradient(*p.detach(), x, y), p.grad)
    second = torch.func.jacrev(torch.func.jacrev(lambda q: F.mse_loss(q[0] * x + q[1], y)))
    torch.testing.assert_close(lesson.hessian(x), second(p.detach()))


@pytest.mark.parametrize("h", [0.01, 1.0, 30.0])
def test_central_differences_are_exact_on_a_parabola_and_h_squared_off_on_a_cube(lesson, h):
    p = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    square = lesson.central_difference(lambda q: q.square().sum(), p, h)
    torch.testing.assert_close(square, 2 * p)
    cube = lesson.central_difference(lambda q: q.pow(3).sum(), p, h)
    torch.testing.assert_close(cube, 3 * p.square() + h**2)


@pytest.mark.parametrize("lr", [0.03, 0.2])
def test_descend_takes_the_steps_of_sgd(lesson, lr):
    x, y = scattered(11, seed=1)
    path = lesson.descend(x, y, lr, steps=9)
    model = torch.nn.Linear(1, 1, dtype=x.dtype)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for w, b in path[1:]:
        optimizer.zero_grad()
        F.mse_loss(model(x[:, None]).squeeze(1), y).backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.item(), w.item(), rtol=0, atol=1e-12)
        torch.testing.assert_close(model.bias.item(), b.item(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_on_other_points_the_limit_is_2_by_their_largest_eigenvalue(lesson, seed):
    x, _ = scattered(9, seed)
    y = 2 * x + 1
    eigenvalues, directions, limit = rates(lesson, x)
    below = lesson.descend(x, y, 0.99 * limit, steps=2000)
    above = lesson.descend(x, y, 1.01 * limit, steps=2000)
    torch.testing.assert_close(below[-1], lesson.TRUTH, rtol=0, atol=1e-3)
    assert (above[-1] - lesson.TRUTH).norm() > 1e3
    factors = lesson.error_factors(above, directions)
    theory = (1 - 1.01 * limit * eigenvalues).expand(10, 2)
    torch.testing.assert_close(factors, theory, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shapes", [[(5,), (5, 1)], [(5, 1), (5, 1)], [(5,), (4,)], [(), ()]])
def test_points_of_another_shape_are_refused(lesson, shapes):
    x, y = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"x and y must be \(N,\)"):
        lesson.descend(x, y, 0.1, steps=1)


def test_try_at_the_limit_itself_the_loss_stays(lesson):
    x, y = lesson.make_data()
    eigenvalues, directions, limit = rates(lesson, x)
    path = lesson.descend(x, y, limit, steps=400)
    c = (path[0] - lesson.TRUTH) @ directions[:, 1]
    torch.testing.assert_close(path[-1], path[-3])
    assert (path[-1] - path[-2]).norm().item() == pytest.approx(2 * abs(c.item()))
    for w, b in path[-4:]:
        torch.testing.assert_close(lesson.loss(w, b, x, y), eigenvalues[1] * c**2 / 2)


def test_the_picture_is_darkest_at_the_minimum_and_has_b_upwards(lesson):
    surface = lesson.contours(*lesson.make_data(), size=101, reach=4.0)
    shades = np.asarray(surface).sum(-1)  # (101, 101)
    assert shades[50, 50] == shades.min() < shades[0, 0] == shades[100, 100]
    assert shades[0, 100] < shades[0, 0]  # mean x = -1: a larger b makes up for a larger w
    corner = lesson.TRUTH + torch.tensor([2.0, 4.0])  # b at its largest
    picture = lesson.draw_path(surface, corner[None], "", reach=4.0)
    assert picture.shape == (101, 101, 3)
    assert picture[0, 75].tolist() == picture[1, 75].tolist() == [178, 34, 34]
    assert picture[0, 25].tolist() != [178, 34, 34] != picture[75, 100].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_main_fits_below_the_limit_and_diverges_above(lesson, tmp_path, events, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, lr=0.12, steps=150)
    assert measured["limit"] == pytest.approx(0.3357, abs=1e-4)
    assert measured["fit"] == pytest.approx([2, 1], abs=1e-4)
    final = measured["final_loss"]
    assert final["fit"] < 1e-9 < final["just_below"] < 1e-3 < 1e3 < final["just_above"]
    for run, value in final.items():
        loaded = events(tmp_path / run)
        curve = [event.value for event in loaded.Scalars("train/log10_loss")]
        assert len(curve) == 151
        assert curve[-1] == pytest.approx(math.log10(value), abs=1e-4)
        assert [event.step for event in loaded.Images("surface/path")] == [0]
