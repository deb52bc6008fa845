import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector


@pytest.fixture
def lesson(load):
    return load("06_gradient_accumulation_and_tricks.py")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data(N, seed=0):
    torch.manual_seed(seed)
    return torch.randn(N, 8, dtype=torch.float64), torch.randint(3, (N,))


def one_gradient(model, x, y):
    return parameters_to_vector(
        torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters())
    )


@pytest.mark.parametrize("name", ["sum_by_N", "mean_by_k", "mean"])
def test_an_accumulated_gradient_is_the_weighted_sum_over_single_examples(lesson, name):
    x, y = data(11)
    model = lesson.mlp()
    singles = [one_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(11)]
    sizes = torch.tensor([4] * 8 + [3] * 3).double()  # of the part that an example is in
    weights = {"sum_by_N": sizes * 0 + 1 / 11, "mean_by_k": 1 / (3 * sizes), "mean": 1 / sizes}
    expected = (weights[name][:, None] * torch.stack(singles)).sum(0)
    measured = lesson.accumulated_gradient(model, x, y, 4, name)
    torch.testing.assert_close(measured, expected)


@pytest.mark.parametrize("size", [1, 3, 7, 22, 23, 99])
def test_parts_of_any_size_give_the_batch(lesson, size):
    x, y = data(23)
    assert lesson.accumulation_error(lesson.mlp(), x, y, size) < 1e-14


def test_a_k_fold_gradient_makes_k_fold_steps_of_sgd_and_the_same_steps_of_adam(lesson):
    x, y = data(24)
    moved = {}
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        for divisor in ("mean_by_k", "mean"):
            torch.manual_seed(1)
            model = lesson.mlp()
            start = parameters_to_vector(model.parameters()).detach()
            stepper = optimizer(model.parameters(), lr=1e-5)
            for _ in range(10):
                lesson.accumulated_gradient(model, x, y, 8, divisor)
                stepper.step()
            moved[optimizer, divisor] = parameters_to_vector(model.parameters()).detach() - start
    sgd, adam = (
        (moved[o, "mean"].norm() / moved[o, "mean_by_k"].norm()).item()
        for o in (torch.optim.SGD, torch.optim.Adam)
    )
    assert sgd == pytest.approx(3, rel=1e-2)
    assert adam == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("copies", [2, 5])
def test_batch_norm_breaks_the_sum_only_where_the_parts_have_other_statistics(lesson, copies):
    x, y = data(12)
    model = lesson.mlp(nn.BatchNorm1d(16))
    alike = x.repeat(copies, 1), y.repeat(copies)
    assert lesson.accumulation_error(model, *alike, 12) < 1e-12
    assert lesson.accumulation_error(model, *alike, 7) > 1e-2


def test_batch_norm_refuses_a_part_of_one_example(lesson):
    x, y = data(9)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        lesson.accumulation_error(lesson.mlp(nn.BatchNorm1d(16)), x, y, 4)


@pytest.mark.parametrize("c", [0.03, 1.7, 1e3])
@pytest.mark.parametrize("name", ["norm", "value"])
def test_clipping_is_torchs(lesson, name, c):
    torch.manual_seed(0)
    gradients = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 5), (7,), ()]]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    unclipped = [g.clone() for g in gradients]
    ours = getattr(lesson, f"clip_{name}_")(gradients, c)
    theirs = getattr(nn.utils, f"clip_grad_{name}_")(parameters, c)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, [p.grad for p in parameters])
    same = [torch.equal(a, b) for a, b in zip(gradients, unclipped, strict=True)]
    assert all(same) == (c == 1e3)


@pytest.mark.parametrize(("g", "c"), [(1.0, 0.0), (1.0, -1.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_a_norm_that_cannot_be_clipped_is_refused_and_nothing_changed(lesson, g, c):
    gradients = [torch.tensor([g, 2.0])]
    with pytest.raises(ValueError, match="cannot clip a norm of"):
        lesson.clip_norm_(gradients, c)
    torch.testing.assert_close(gradients[0], torch.tensor([g, 2.0]), equal_nan=True)


def test_torch_makes_nan_of_an_infinite_gradient_unless_told_to_refuse():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([math.inf, 2.0])
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    nn.utils.clip_grad_norm_([p], 1.0)
    assert p.grad[0].isnan()


def test_the_recurrence_written_out(lesson):
    torch.manual_seed(0)
    x, h, W, u, v = (torch.randn(s).double() for s in [(4, 3), (5,), (5, 5), (5,), (5,)])
    last = W @ W @ (W @ h) + torch.stack([W @ W @ u * a + W @ u * b + u * c for a, b, c in x])
    torch.testing.assert_close(lesson.recurrent(x, h, W, u, v), last @ v)


@pytest.mark.parametrize("rho", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("T", [1, 13])
def test_the_gradient_grows_by_rho_a_time_step(lesson, rho, T):
    torch.manual_seed(0)
    h = torch.randn(6, requires_grad=True)
    weights = lesson.random_weights(6, rho)
    lesson.recurrent(torch.randn(1, T), h, *weights).backward()
    torch.testing.assert_close(h.grad.norm() / weights[2].norm(), torch.tensor(rho**T))


def test_the_cube_is_torchs_where_its_slope_is_three(lesson):
    torch.manual_seed(0)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(lesson.Cube.apply(x, 2), x**3)
    weights = torch.randn(5, dtype=torch.float64)
    theirs = torch.autograd.grad((x**3) @ weights, x)
    torch.testing.assert_close(torch.autograd.grad(lesson.Cube.apply(x, 3) @ weights, x), theirs)


def test_the_central_difference_is_off_by_e_squared_until_rounding_takes_over(lesson):
    torch.manual_seed(0)
    x = torch.randn(50)
    for dtype, es in {torch.float64: (0.1, 1e-2, 1e-3), torch.float32: (0.1,)}.items():
        for e in es:
            assert lesson.difference_error(dtype, e, x) == pytest.approx(e**2, rel=2e-2)
    for dtype, e in {torch.float64: 1e-9, torch.float32: 1e-5}.items():
        u, largest = torch.finfo(dtype).eps / 2, x.abs().max().item() ** 3
        assert 0.1 < lesson.difference_error(dtype, e, x) / (u * largest / e) < 10


def test_a_gradient_left_behind_moves_frozen_weights_unless_freeze_clears_it(lesson):
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    layer(torch.randn(3, 4)).sum().backward()
    start = parameters_to_vector(layer.parameters()).detach().clone()
    stale, frozen = copy.deepcopy(layer), copy.deepcopy(layer)
    for p, q, r in zip(*(m.parameters() for m in (layer, stale, frozen)), strict=True):
        q.grad, r.grad = p.grad.clone(), p.grad.clone()
    stale.requires_grad_(False)
    lesson.freeze(frozen)
    for m in (stale, frozen):
        torch.optim.AdamW(m.parameters(), lr=0.1).step()
    assert not torch.equal(parameters_to_vector(stale.parameters()), start)
    assert torch.equal(parameters_to_vector(frozen.parameters()), start)


def test_frozen_weights_alone_do_not_fix_the_output_of_batch_norm(lesson):
    torch.manual_seed(0)
    h = torch.randn(32, 16)
    for mode in ("train", "eval"):
        before, net, _, _ = lesson.fine_tune(mode, steps=10)
        old, new = (model[1:3].eval()(h) for model in (before, net))
        assert torch.equal(old, new) == (mode == "eval")


def test_try_n_is_the_number_of_labels_that_are_left(lesson, monkeypatch):
    x, y = data(50)
    y[::3] = -100
    model = lesson.mlp()
    assert lesson.accumulation_error(model, x, y, 16) > 0.3
    left = (y != -100).sum().item()
    monkeypatch.setitem(lesson.DIVISORS, "sum_by_N", lambda n, N, k: left)
    assert lesson.accumulation_error(model, x, y, 16) < 1e-14


@pytest.mark.parametrize("seed", range(3))
def test_main(lesson, tmp_path, events, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, steps=60, draws=5)

    errors = measured["divisors"]
    assert errors["sum_by_N"][2] < 1e-14 < 0.2 < errors["mean_by_k"][2] < errors["mean"][2]
    assert errors["mean"][16] == pytest.approx(3)  # a gradient 4 times too long
    batch_norm = list(measured["normalization"]["BatchNorm"].values())
    assert batch_norm[0] < 1e-14 < 0.02 < batch_norm[1] < batch_norm[3] < batch_norm[4]

    assert measured["cosines"]["norm"] == pytest.approx(1)
    assert measured["cosines"]["value"] < 0.97
    nets = measured["recurrent"]
    assert nets["growth"] == pytest.approx(1.15**20, rel=1e-4)
    assert nets["unclipped"]["finite"] <= 3
    for clipped in ("norm_1", "value_0.1"):
        assert nets[clipped]["finite"] == 60
        assert nets[clipped]["loss"] < min(0.9, 0.7 * nets["unclipped_slow"]["loss"])
    assert nets["value_0.1"]["longest"] < 0.1001 * math.sqrt(16 * 16 + 16 + 16)

    passes = list(measured["gradcheck"]["passes"].values())
    assert passes[0] == (5, 0) and passes[3] == (5, 0)  # float64, and float32 with the best e
    assert max(passes[1]) <= 1 and min(passes[2]) >= 4  # float32 rejects all, or accepts all
    assert measured["gradcheck"]["smallest"]["float64"] < 1e-8
    assert measured["gradcheck"]["smallest"]["float32"] > 1e-5

    rows = measured["freezing"]["rows"]
    assert rows[0] == (144, 2, 2) and rows[4] == (51, 2, 2) and rows[1] == rows[2] == (0, 0, 0)
    assert measured["freezing"]["moved"]["train"] > 0.3

    curve = events(tmp_path / "recurrent" / "norm_1").Scalars("recurrent/log10_loss")
    assert len(curve) == 60 and curve[-1].value < curve[0].value - 1
    sweep = events(tmp_path / "accumulate" / "mean_by_k").Scalars("accumulate/error")
    assert [e.step for e in sweep] == list(range(1, 17))
