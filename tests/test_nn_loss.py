import math

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def lesson(load):
    return load("nn_loss.py")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", ["l1_loss", "mse_loss"])
def test_l1_and_mse_equal_torch_with_their_gradients(lesson, name, reduction):
    torch.manual_seed(0)
    grads = []
    x, t = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    for loss in (getattr(lesson, name), getattr(F, name)):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, t, reduction=reduction)
        value.sum().backward()
        grads.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2, -7])
def test_cross_entropy_equals_torch_with_its_gradient(lesson, reduction, weighted, ignore_index):
    torch.manual_seed(0)
    z, t = torch.randn(23, 6, dtype=torch.float64) * 5, torch.randint(6, (23,))
    t[::4] = ignore_index
    weight = torch.rand(6, dtype=torch.float64) + 0.1 if weighted else None
    results = []
    for loss in (lesson.cross_entropy, F.cross_entropy):
        leaf = z.clone().requires_grad_()
        value = loss(leaf, t, weight=weight, ignore_index=ignore_index, reduction=reduction)
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_log_sum_exp_has_no_overflow_and_no_underflow(lesson):
    z = torch.tensor([[1000.0, 1001, 999], [-1000, -1001, -999]])
    torch.testing.assert_close(lesson.log_sum_exp(z), torch.logsumexp(z, 1))


def test_the_weighted_mean_divides_by_the_weights_of_the_targets(lesson):
    z, t, weight = torch.zeros(3, 2), torch.tensor([0, 0, 1]), torch.tensor([1.0, 6.0])
    assert lesson.cross_entropy(z, t, weight).item() == pytest.approx(math.log(2))
    z[2, 1] = 100.0  # only the heavy sample is right now: 2 log 2 over 8
    assert lesson.cross_entropy(z, t, weight).item() == pytest.approx(2 * math.log(2) / 8)


def test_try_nothing_but_ignored_targets_is_nan(lesson):
    z, t = torch.randn(3, 4), torch.full((3,), -100)
    assert math.isnan(lesson.cross_entropy(z, t)) and math.isnan(F.cross_entropy(z, t))


def test_shapes_that_would_broadcast_are_refused(lesson):
    for loss in (lesson.l1_loss, lesson.mse_loss):
        with pytest.raises(ValueError, match=r"\(4, 1\) and target \(4,\)"):
            loss(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize("seed", range(3))
def test_main_overflows_where_theory_says(lesson, tmp_path, seed, events):
    measured = lesson.main(seed=seed, log_dir=tmp_path, N=7, K=3)
    assert measured["limit"] == pytest.approx(88.72, abs=0.01)
    finite = {a: math.isfinite(value) for a, value in measured["naive"].items()}
    assert finite == {1.0: True, 50.0: True, 88.0: True, 89.0: False, 1000.0: False}
    last = {run: events(tmp_path / run).Scalars("cross_entropy/value")[-1].step
            for run in ("naive", "stable")}  # fmt: skip
    assert last == {"naive": 88, "stable": 120}
