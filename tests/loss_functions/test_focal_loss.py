import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

HALF = {torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def lesson(load):
    return load("loss_functions/focal_loss.py")


@pytest.mark.parametrize(("y", "p_t", "a_t"), [(1.0, 0.2, 0.3), (0.0, 0.8, 0.7)])
def test_one_loss_by_hand(lesson, y, p_t, a_t):
    logit = torch.tensor([math.log(0.2 / 0.8)])  # p = 0.2
    loss = lesson.sigmoid_focal_loss(logit, torch.tensor([y]), alpha=0.3, gamma=1.5)
    assert loss.item() == pytest.approx(-a_t * (1 - p_t) ** 1.5 * math.log(p_t))


def test_several_classes_by_a_loop(lesson):
    torch.manual_seed(0)
    logits, labels, alpha = torch.randn(7, 4), torch.randint(4, (7,)), torch.rand(4)
    expected = []
    for row, label in zip(logits, labels, strict=True):
        p_t = (row[label].exp() / row.exp().sum()).item()
        expected.append(-alpha[label].item() * (1 - p_t) ** 0.7 * math.log(p_t))
    losses = lesson.softmax_focal_loss(logits, labels, alpha, 0.7, reduction="none")
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    mean = lesson.softmax_focal_loss(logits, labels, alpha, 0.7)
    assert mean.item() == pytest.approx(sum(expected) / 7, rel=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.9, 0.5), (None, 3.7), (0.4, 0.0)])
def test_loss_and_gradient_are_torchvisions(lesson, alpha, gamma, dtype, reduction):
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 7, dtype=torch.float64)).to(dtype).requires_grad_()
    y = torch.rand(5, 7).round().to(dtype)
    ours = lesson.sigmoid_focal_loss(x, y, alpha, gamma, reduction)
    wide = x.detach().double().requires_grad_()  # half a digit is no reference for another
    theirs = torchvision_loss(wide, y.double(), -1 if alpha is None else alpha, gamma, reduction)
    assert ours.dtype == dtype
    tolerance = HALF.get(dtype, 1e-5)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in ((ours, x), (theirs, wide))]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certain_answers_have_finite_gradients(lesson, gamma):
    x = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0])
    loss = lesson.sigmoid_focal_loss(x, y, gamma=gamma)
    assert loss.tolist() == pytest.approx([0, 0, 200, 200])
    assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = lesson.softmax_focal_loss(logits, torch.tensor([0, 0]), gamma=gamma, reduction="none")
    assert loss.tolist() == pytest.approx([0, 200])
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_two_classes_are_one_logit(lesson, gamma):
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 2, dtype=torch.float64), torch.randint(2, (9,))
    two = lesson.softmax_focal_loss(logits, labels, torch.tensor([0.7, 0.3]), gamma, "none")
    one = lesson.sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.double(), 0.3, gamma)
    torch.testing.assert_close(two, one, check_dtype=False)
    plain = lesson.softmax_focal_loss(logits, labels, gamma=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))


def test_the_gradient_of_a_negative_has_the_other_sign(lesson):
    p_t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    x = (1 - p_t).logit().requires_grad_()
    loss = lesson.sigmoid_focal_loss(x, torch.zeros_like(x), alpha=0.3)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(grad, -0.7 * lesson.focal_gradient(p_t, 2.0))


def test_shapes_that_would_broadcast_are_refused(lesson):
    with pytest.raises(ValueError, match=r"\(4, 1\) and targets \(4,\) must agree"):
        lesson.sigmoid_focal_loss(torch.randn(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match=r"logits \(B, C\) and labels \(B,\)"):
        lesson.softmax_focal_loss(torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long))


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_by_thresholds(lesson, seed):
    torch.manual_seed(seed)
    scores = torch.randint(6, (30,)).float() / 5  # with ties
    targets = (torch.rand(30) < 0.3).float()
    targets[0] = 1
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = (targets[taken].sum() / targets.sum()).item()
        area += targets[taken].mean().item() * (recall - before)
        before = recall
    assert lesson.average_precision(scores, targets) == pytest.approx(area, abs=1e-6)
    shuffled = torch.randperm(30)  # the order of ties does not matter
    again = lesson.average_precision(scores[shuffled], targets[shuffled])
    assert again == pytest.approx(area, abs=1e-6)


def test_easy_negatives_by_hand(lesson):
    loss, p = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.05, 0.05, 0.5, 0.01])
    targets = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert lesson.easy_negative_share(loss, p, targets) == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.05, 0.4])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_best_probability_is_the_least_risk_on_a_grid(lesson, share, gamma):
    p = torch.arange(1, 10_000, dtype=torch.float64) / 10_000
    risk = -share * (1 - p) ** gamma * p.log() - (1 - share) * p**gamma * (1 - p).log()
    assert lesson.best_probability(share, gamma) == pytest.approx(p[risk.argmin()].item(), abs=1e-4)


def test_try_alpha_a_quarter_lowers_the_rare_class(lesson):
    x, one = torch.tensor([0.3]), torch.ones(1)
    quarter, three = (lesson.sigmoid_focal_loss(x, one, alpha=a).item() for a in (0.25, 0.75))
    assert quarter == pytest.approx(three / 3)


@pytest.mark.parametrize("seed", range(3))
def test_main_takes_easy_negatives_out_and_ranks_no_better(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, n=8000, epochs=5)
    rows = result["imbalance"]
    entropy, focal, weights = (rows[k] for k in ("cross_entropy", "focal", "class_weights"))
    assert entropy["easy_before"] == entropy["easy_after"] > 0.05
    assert focal["easy_before"] < 0.01 * entropy["easy_before"]
    assert focal["easy_before"] < 0.5 * weights["easy_before"]  # weights alone do not do it
    assert 0.5 < focal["easy_after"] / entropy["easy_after"] < 2
    assert all(0.2 < row["AP"] < entropy["AP"] + 0.05 for row in rows.values())
    assert weights["recall"] > 0.7 > 0.5 > max(entropy["recall"], focal["recall"])
    assert rows["focal_alpha"]["recall"] < focal["recall"]
    assert entropy["mean_p"] < 0.03 < focal["mean_p"] < weights["mean_p"]
    assert result["ratios"][0.0] == pytest.approx(11.11, abs=0.01) and result["ratios"][2.0] < 0.003
    assert result["best"][2.0] == pytest.approx([0.154, 0.5], abs=1e-3)
    assert result["prior"][0.01] == pytest.approx(0.0560, abs=1e-4)
    run = events(tmp_path / "imbalance" / "focal")
    assert run.Scalars("val/average_precision")[-1].value == pytest.approx(focal["AP"])
