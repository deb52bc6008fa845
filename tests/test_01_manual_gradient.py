import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from support.pictures import path_over_contours


@pytest.fixture
def lesson(load):
    return load("01_manual_gradient.py")


def scattered(n, seed):
    """Points (N,) that lie on no line."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, generator=generator, dtype=torch.float64)


def rates(lesson, x):
    """The eigenvalues of the Hessian, its eigenvectors, and the limit 2 / lam_max."""
    lam, directions = torch.linalg.eigh(lesson.hessian(x))
    return lam, directions, 2 / lam[-1].item()


def row(out, name):
    """The words of the last printed line that begins with `name`."""
    return [line.split() for line in out.splitlines() if line.split()[:1] == [name]][-1]


def test_the_gradient_of_two_points_by_pencil(lesson):
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])  # r = -3, -5
    assert lesson.gradient(0.0, 0.0, x, y).tolist() == [-13.0, -8.0]


def test_the_everyday_loop_is_the_one_of_pencil_and_of_sgd(lesson, capsys):
    losses = lesson.show_everyday()
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = []
    for _ in range(5):
        optimizer.zero_grad()
        L = F.mse_loss(model(torch.tensor([[1.0], [2.0]])), torch.tensor([[3.0], [5.0]]))
        L.backward()
        optimizer.step()
        theirs.append(L.item())
    assert losses == pytest.approx(theirs)
    out = capsys.readouterr().out
    assert " ".join(row(out, "0")[1:]) == "0.000 0.000 -3.000, -5.000 17.0000 -13.000 -8.000"
    assert " ".join(row(out, "1")[1:]) == "1.300 0.800 -0.900, -1.600 1.6850 -4.100 -2.500"
    assert row(out, "4") == ["4", "1.882", "1.150", "0.0042"]
    assert "four times, bring L from 17.0 to 0.004\n" in out


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
    assert path.shape == (10, 2) and path[0].tolist() == [0, 0]
    for w, b in path[1:]:
        optimizer.zero_grad()
        F.mse_loss(model(x[:, None]).squeeze(1), y).backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.item(), w.item(), rtol=0, atol=1e-12)
        torch.testing.assert_close(model.bias.item(), b.item(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lr", [0.02, 0.1, 0.34])
def test_a_step_multiplies_the_error_by_1_minus_lr_H(lesson, lr):
    x, y = lesson.make_data(13)
    path, H = lesson.descend(x, y, lr, steps=60), lesson.hessian(x)
    step, error = torch.eye(2, dtype=x.dtype) - lr * H, -lesson.TRUTH
    for t, point in enumerate(path):
        predicted = lesson.TRUTH + torch.linalg.matrix_power(step, t) @ error
        torch.testing.assert_close(point, predicted, rtol=0, atol=1e-11)


def test_error_factors_by_pencil(lesson):
    u = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)  # columns
    parts = torch.tensor([[5.0, 1.0], [10.0, -3.0], [-10.0, 1.5]], dtype=torch.float64)
    factors = lesson.error_factors(lesson.TRUTH + parts @ u.T, u)
    torch.testing.assert_close(factors, parts.new_tensor([[2.0, -3.0], [-1.0, -0.5]]))


def test_directions_are_flat_then_steep_with_w_rising(lesson):
    H = torch.tensor([[5.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    lam, directions = lesson.directions_of(H)
    assert lam.tolist() == pytest.approx([1, 6])
    steep, flat = torch.tensor([2.0, 1.0]) / 5**0.5, torch.tensor([1.0, -2.0]) / 5**0.5
    torch.testing.assert_close(directions, torch.stack([flat, steep], 1).double())


def test_directions_of_a_diagonal_hessian_keep_their_length(lesson):
    lam, directions = lesson.directions_of(lesson.hessian(torch.tensor([-2.0, 2.0])))
    torch.testing.assert_close(lam, torch.tensor([2.0, 8.0]))
    torch.testing.assert_close(directions.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert directions[0, 1] > 0


def test_a_start_without_one_of_the_two_parts_is_no_fault(lesson, capsys):
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # lam = 2, 2
    lesson.show_error(x, 2 * x + 1, 0.5, 12)  # the first step removes all of the error
    assert "12 steps end at w = 2.0000, b = 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_on_other_points_the_limit_is_2_by_their_largest_eigenvalue(lesson, seed):
    x, _ = scattered(9, seed)
    y = 2 * x + 1
    lam, directions, limit = rates(lesson, x)
    assert lesson.largest_lr(x) == pytest.approx(limit)
    below = lesson.descend(x, y, 0.99 * limit, steps=2000)
    above = lesson.descend(x, y, 1.01 * limit, steps=2000)
    torch.testing.assert_close(below[-1], lesson.TRUTH, rtol=0, atol=1e-3)
    assert (above[-1] - lesson.TRUTH).norm() > 1e3
    factors = lesson.error_factors(above[:11], directions)
    theory = (1 - 1.01 * limit * lam).expand(10, 2)
    torch.testing.assert_close(factors, theory, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [[1.0], [0.0, 2.0, -2.0], [3.0, 4.0]])
def test_the_largest_lr_by_pencil(lesson, x):
    x = torch.tensor(x, dtype=torch.float64)
    mean, square = x.mean(), x.square().mean()  # lam: roots of a 2 x 2 matrix by its trace and det
    half, det = square + 1, 4 * (square - mean**2)
    assert lesson.largest_lr(x) == pytest.approx(2 / (half + (half**2 - det).sqrt()).item())


@pytest.mark.parametrize("shapes", [[(5,), (5, 1)], [(5, 1), (5, 1)], [(5,), (4,)], [(), ()]])
def test_points_of_another_shape_are_refused(lesson, shapes):
    x, y = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"x and y must be \(N,\)"):
        lesson.descend(x, y, 0.1, steps=1)


def test_try_at_the_limit_itself_the_loss_stays(lesson, edited, tmp_path, capsys):
    measured = edited(lesson, "1.02 * limit", "limit").main(log_dir=tmp_path, steps=400)
    assert measured["right"] == 4
    printed = row(capsys.readouterr().out, "just_above")
    assert printed[-4:] == ["6.89", "5.3e+00", "no", "no"]
    x, y = lesson.make_data()
    lam, directions, limit = rates(lesson, x)
    path = lesson.descend(x, y, limit, steps=400)
    c = (path[0] - lesson.TRUTH) @ directions[:, 1]
    assert measured["final_loss"]["just_above"] == pytest.approx((lam[1] * c**2 / 2).item())
    torch.testing.assert_close(path[-1], path[-3])
    assert (path[-1] - path[-2]).norm().item() == pytest.approx(2 * abs(c.item()))


def drawn(lesson, path, size=420):
    x, y = lesson.make_data()

    def f(w, b):
        return lesson.loss(w[..., None], b[..., None], x, y)

    return path_over_contours(f, path, lesson.TRUTH, 4.0, "", size)


def test_the_picture_is_darkest_at_the_minimum_and_has_b_upwards(lesson):
    outside = lesson.TRUTH[None] + 100
    picture = drawn(lesson, outside, size=401)
    assert picture.shape == (401, 401, 3)
    shades = picture.sum(-1, dtype=int)[:350]  # without the words
    assert shades[200, 200] == shades.min() == 3 * 40
    assert shades[0, 0] == shades.max() == 3 * 250  # w - 4, b + 4
    assert shades[50, 350] < shades[50, 50]  # mean x = -1: a larger b makes up for a larger w
    assert len(np.unique(shades)) > 10  # bands, 1.5 for each doubling of L


def test_a_point_of_the_path_is_red_and_where_it_belongs(lesson):
    corner = lesson.TRUTH + torch.tensor([2.0, 4.0])  # b at its largest
    picture = drawn(lesson, corner[None], size=401)
    assert picture[0, 300].tolist() == picture[1, 300].tolist() == [178, 34, 34]
    assert picture[0, 100].tolist() != [178, 34, 34] != picture[300, 400].tolist()
    reds = (drawn(lesson, lesson.TRUTH[None], size=401) == [178, 34, 34]).all(-1)
    rows, columns = reds.nonzero()  # a disc of radius 3 at the minimum
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (197, 203, 197, 203)
    two = torch.stack([lesson.TRUTH - 1, lesson.TRUTH + 1])
    reds = (drawn(lesson, two, size=401) == [178, 34, 34]).all(-1)
    assert reds[250, 150] and reds[150, 250] and reds[200, 200] and not reds[150, 150]


def test_each_run_shows_its_own_first_20_steps(lesson, tmp_path, events, monkeypatch):
    written, text = [], ImageDraw.ImageDraw.text

    def noted(self, xy, words, *rest, **more):
        written.append((xy, words))
        return text(self, xy, words, *rest, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    lesson.main(log_dir=tmp_path, lr=0.1)
    x, y = lesson.make_data()
    limit = rates(lesson, x)[2]
    runs = {"slow": 0.02, "fit": 0.1, "just_below": 0.98 * limit, "just_above": 1.02 * limit}
    frame = ((8, 412), "right: w -2 to 6   up: b -3 to 5")
    assert written == [
        words
        for lr in runs.values()
        for words in (
            ((8, 4), f"lr {lr:.4f}: first 20 steps from (0, 0)\ndark: L low   light: L high"),
            frame,
        )
    ]
    for run, lr in runs.items():
        (image,) = events(tmp_path / run).Images("surface/path")
        picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        path = lesson.descend(x, y, lr, steps=20)
        words = f"lr {lr:.4f}: first 20 steps from (0, 0)\ndark: L low   light: L high"
        expected = path_over_contours(
            lambda w, b: lesson.loss(w[..., None], b[..., None], x, y),
            path, lesson.TRUTH, 4.0, words,
        )  # fmt: skip
        assert image.step == 0 and np.array_equal(picture, expected)


@pytest.mark.parametrize("i", [0, 1])
def test_one_derivative_that_differs_is_found(lesson, monkeypatch, i):
    difference = lesson.central_difference

    def off(f, p, h):
        return difference(f, p, h) + 1e-6 * torch.eye(2)[i]

    monkeypatch.setattr(lesson, "central_difference", off)
    with pytest.raises(AssertionError):
        lesson.show_gradient(*lesson.make_data())


def test_the_first_and_the_tenth_factor_are_printed(lesson, capsys, monkeypatch):
    factors = torch.arange(20.0).view(10, 2)
    monkeypatch.setattr(lesson, "error_factors", lambda path, directions: factors[: len(path) - 1])
    lesson.show_error(*lesson.make_data(), 0.1, 100)
    out = capsys.readouterr().out
    assert row(out, "flat")[-2:] == ["0.0000", "18.0000"]
    assert row(out, "steep")[-2:] == ["1.0000", "19.0000"]


def test_the_table_shows_what_descend_did_not_what_theory_says(lesson, capsys, monkeypatch):
    descend = lesson.descend
    monkeypatch.setattr(lesson, "descend", lambda x, y, lr, n: descend(x, y, 2 * lr, n))
    with pytest.raises(AssertionError):
        lesson.show_error(*lesson.make_data(), 0.05, 100)
    printed = [float(word) for word in row(capsys.readouterr().out, "steep")[-3:]]
    assert printed == [0.7021, 0.4042, 0.4042]  # 1 - 0.05 lam, then what steps of 0.1 leave


@pytest.mark.parametrize("seed", range(3))
def test_main_fits_below_the_limit_and_diverges_above(lesson, tmp_path, events, capsys, seed):
    for _ in range(2):  # the second run's events replace the first's
        measured = lesson.main(seed=seed, log_dir=tmp_path, lr=0.12, steps=150)
    assert measured["limit"] == pytest.approx(0.3357, abs=1e-4)
    assert measured["fit"] == pytest.approx([2, 1], abs=1e-4)
    assert measured["factors"] == pytest.approx([0.8813, 0.2850], abs=1e-4)
    assert min(map(abs, measured["gradient"]["by_hand"])) > 1e-3
    assert measured["gradient"]["apart"] < 1e-11
    final = measured["final_loss"]
    assert final["fit"] < 1e-9 < final["just_below"] < final["slow"] < 0.07
    assert final["just_above"] > 1e3
    out = capsys.readouterr().out
    printed = row(out, "dL/dw")[1:] + row(out, "dL/db")[1:]
    by_hand = [f"{value:.5f}" for value in measured["gradient"]["by_hand"]]
    assert printed == [by_hand[0]] * 3 + [by_hand[1]] * 3
    assert (
        "   -> a step multiplies the steep part by 0.29 and the flat one by 0.88;\n"
        "      150 steps end at w = 2"
    ) in out
    assert [line[:2] for line in out.splitlines() if line[1:3] == ". "][-4:] == [
        "1.", "2.", "3.", "4.",
    ]  # fmt: skip
    steep, flat = 0.285, 0.8813
    for head in (
        "1. How do w and b find the line y = 2x + 1 through (1, 3) and (2, 5)? lr = 0.1\n",
        "   step        w        b   r = w x + b - y   L = mean(r^2)     dL/dw    dL/db\n",
        "2. Is the gradient by hand right? At random w = ",
        "from here on\n   there are 20 points, x from -3 to 1, y = 2x + 1\n",
        "             by hand   central differences, h = 1    autograd\n",
        "3. What does a step do to the error (w - 2, b - 1)? lr = 0.12\n",
        "   H = [4.9474 -2.0000; -2.0000 2.0000]\n",
        "   part    eigenvector (w, b)   eigenvalue lam   1 - lr lam   "
        "measured at step 1  at step 10\n",
        f"   steep   (0.893, -0.451)   {5.958:16.4f}   {steep:10.4f}   {steep:18.4f}      0.2850\n",
        f"   flat    (0.451,  0.893)   {0.9894:16.4f}   {flat:10.4f}   {flat:18.4f}      {flat}\n",
        "   (H, the Hessian, holds the second derivatives of L. In two directions, its\n",
        "   (It says that 1 - lr lam is between -1 and 1 for the steep part and the flat one.\n"
        "   Seen to converge: after 150 steps L is below 1% of its start.)\n",
        "lr   1 - lr lam: steep     flat   L at step 0   at step 150   converges? by the rule  ",
    ):
        assert head in out
    assert "4. Which lr converge? The rule: lr < 2 / lam_max = 2 / 5.9580 = 0.3357\n" in out
    assert "-> the rule is right about 4 of 4 runs; always answering yes would be " in out
    assert "would be right about 3 of 4\n" in out
    assert "along w or b L is a parabola, so any h is exact\n" in out
    lam, _, limit = rates(lesson, lesson.make_data()[0])
    said = {run: " ".join(row(out, run)[1:]) for run in final}
    for run, value in final.items():
        lr = {"slow": 0.024, "fit": 0.12, "just_below": 0.98 * limit, "just_above": 1.02 * limit}[
            run
        ]
        flat, steep = (1 - lr * lam).tolist()
        verdict = "no no" if run == "just_above" else "yes yes"
        assert said[run] == f"{lr:.4f} {steep:.4f} {flat:.4f} 6.89 {value:.1e} {verdict}"
        loaded = events(tmp_path / run)
        curve = [event.value for event in loaded.Scalars("train/log10_loss")]
        assert len(curve) == 151 and curve[0] == pytest.approx(math.log10(6.8947), abs=1e-4)
        assert curve[-1] == pytest.approx(math.log10(value), abs=1e-4)
        assert [event.step for event in loaded.Images("surface/path")] == [0]
        rises = [b > a for a, b in pairwise(curve)]
        assert rises == [False] + [run == "just_above"] * 149
