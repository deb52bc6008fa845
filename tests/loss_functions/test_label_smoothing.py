import math

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def lesson(load):
    return load("loss_functions/label_smoothing.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("runs")
    return lesson.main(seed=request.param, log_dir=log_dir, steps=400, n=400, epochs=40), log_dir


def test_targets_and_loss_by_hand(lesson):
    q = lesson.smooth_labels(torch.tensor([1, 0]), 4, 0.2)
    torch.testing.assert_close(q, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85] + 3 * [0.05]]))
    logits = torch.tensor([[0.0, math.log(3.0)]])  # p = 1/4, 3/4
    loss = lesson.label_smoothing_loss(logits, torch.tensor([1]), 0.1)
    assert loss.item() == pytest.approx(-0.05 * math.log(0.25) - 0.95 * math.log(0.75))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.0, 0.13, 0.6, 1.0])
def test_loss_and_gradient_are_torchs(lesson, epsilon, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 7)).to(dtype).requires_grad_()
    labels = torch.randint(7, (9,))
    ours = lesson.label_smoothing_loss(logits, labels, epsilon)
    theirs = F.cross_entropy(logits, labels, label_smoothing=epsilon)
    assert ours.dtype == dtype
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*grads, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-3)


def test_the_penalty_needs_its_factor(lesson):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    ours = lesson.label_smoothing_loss(logits, labels, 0.3)
    torch.testing.assert_close(lesson.penalty_form(logits, labels, 0.3), ours)
    kl = -math.log(5) - logits.log_softmax(1).mean()
    without = F.cross_entropy(logits, labels) + 0.3 * (kl + math.log(5))  # not (1 - e) CE
    assert (without - ours).abs() > 0.1


@pytest.mark.parametrize("C", [2, 5])
@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_try_the_best_gap_is_where_p_is_q(lesson, C, epsilon):
    gap = lesson.best_gap(C, epsilon)
    if (C, epsilon) == (2, 0.1):
        assert gap == pytest.approx(math.log(0.95 / 0.05)) == pytest.approx(2.944, abs=1e-3)
    p = torch.tensor([[gap] + (C - 1) * [0.0]]).softmax(1)
    torch.testing.assert_close(p, lesson.smooth_labels(torch.tensor([0]), C, epsilon))
    assert lesson.descend(C, epsilon, 500, lr=3.0)[-1] == pytest.approx(gap, abs=1e-6)


def test_without_smoothing_the_gap_grows_by_a_log(lesson):
    gaps = lesson.descend(10, 0.0, 3000)
    assert gaps[2999] - gaps[299] == pytest.approx(math.log(10), abs=0.02)


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, math.nan])
def test_epsilon_must_be_a_share(lesson, epsilon):
    with pytest.raises(ValueError, match="epsilon must be from 0 to 1"):
        lesson.smooth_labels(torch.tensor([0]), 3, epsilon)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (1,)])
def test_shapes_that_would_broadcast_are_refused(lesson, shape):
    with pytest.raises(ValueError, match=r"logits \(B, C\) and labels \(B,\)"):
        lesson.label_smoothing_loss(torch.randn(3, 5), torch.zeros(shape, dtype=torch.long), 0.1)


def test_scatter_by_hand(lesson):
    z = torch.tensor([[0.0, 1.0], [0.0, -1.0], [4.0, 2.0], [4.0, -2.0]])
    # within (1 + 1 + 4 + 4) / 4, means at 0 and 4: between 4; no point has label 1
    assert lesson.scatter(z, torch.tensor([0, 0, 2, 2])) == pytest.approx(2.5 / 4)
    assert lesson.best_gap(10, 0.0) == math.inf and lesson.best_gap(10, 1.0) == 0


def test_a_random_label_may_be_the_right_one(lesson):
    torch.manual_seed(0)
    x, labels = lesson.noisy_clusters(20_000, 100 * torch.eye(5), 0.4)
    assert (x.argmax(1) != labels).double().mean().item() == pytest.approx(0.4 * 4 / 5, abs=0.02)


def test_calibration_error_by_hand(lesson):
    # bins (0.5, 0.75]: 0.6 right, 0.7 wrong; (0.75, 1]: 1.0 right, 0.9 right
    p = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.0, 1.0], [0.9, 0.1]])
    labels = torch.tensor([0, 1, 1, 0])
    share, confidence, accuracy = lesson.reliability(p, labels, bins=4)
    assert share.tolist() == [0, 0, 0.5, 0.5]
    assert confidence.tolist() == pytest.approx([0, 0, 0.65, 0.95], abs=1e-6)
    assert accuracy.tolist() == [0, 0, 0.5, 1.0]
    ece = lesson.expected_calibration_error(p, labels, bins=4)
    assert ece == pytest.approx(0.5 * 0.15 + 0.5 * 0.05, abs=1e-6)


def test_labels_drawn_from_p_are_calibrated_and_others_are_not(lesson):
    torch.manual_seed(0)
    p = (2 * torch.randn(50_000, 6)).softmax(1)
    labels = p.multinomial(1).squeeze(1)
    assert lesson.expected_calibration_error(p, labels) < 0.01
    sharper = p.log().mul(3).softmax(1)
    assert lesson.expected_calibration_error(sharper, labels) > 0.1


def test_a_bar_is_blue_to_the_accuracy_and_red_to_the_confidence(lesson):
    share, confidence, accuracy = torch.tensor([[0.0, 0.5, 0.5], [0, 0.6, 0.7], [0, 0.3, 0.9]])
    picture = lesson.reliability_picture(share, confidence, accuracy, size=10)
    assert picture.shape == (3, 30, 30) and picture.min() >= 0 and picture.max() <= 1
    blue = ((picture[2] - 0.8).abs() < 1e-6).sum(0)  # pixels of each column
    red = ((picture[0] - 0.9).abs() < 1e-6).sum(0)
    for column, expected in ((2, (0, 0)), (11, (9, 9)), (22, (21, 6))):
        assert (blue[column].item(), red[column].item()) == pytest.approx(expected, abs=3)


def test_main_gaps_reach_theory(measured):
    gaps = measured[0]["gaps"]
    for epsilon in (0.1, 0.3):
        assert gaps[epsilon][1] == pytest.approx(math.log((1 - 0.9 * epsilon) / (0.1 * epsilon)))
    assert gaps[0.0][1] > gaps[0.0][0] + 2


def test_main_smoothing_calibrates_on_noisy_labels_and_not_on_clean_ones(measured):
    noisy, clean = measured[0]["noisy"], measured[0]["clean"]
    assert all(row["train"] > 0.98 for row in (*noisy.values(), *clean.values()))
    assert noisy[0.0]["ece"] > 0.18 and noisy[0.1]["ece"] < 0.6 * noisy[0.0]["ece"]
    assert noisy[0.4]["confidence"] < noisy[0.4]["accuracy"] - 0.1  # too much
    assert clean[0.1]["ece"] > clean[0.0]["ece"] + 0.03


def test_main_reports_what_it_costs(measured, events):
    (noisy, clean), log_dir = (measured[0][name] for name in ("noisy", "clean")), measured[1]
    for rows in (noisy, clean):  # of either sign
        assert abs(rows[0.1]["accuracy"] - rows[0.0]["accuracy"]) < 0.03
    assert all(noisy[e]["student"] > noisy[e]["alone"] for e in (0.0, 0.1))
    assert noisy[0.1]["student"] > noisy[0.0]["student"]
    assert clean[0.1]["scatter"] < clean[0.0]["scatter"]
    assert clean[0.1]["scatter_test"] > clean[0.0]["scatter_test"]
    assert noisy[0.1]["scatter"] > noisy[0.0]["scatter"]
    assert len(events(log_dir / "noisy" / "eps_0.1").Images("calibration/reliability")) == 1
