import math

import pytest
import torch
import torch.nn.functional as F
from PIL import ImageDraw


@pytest.fixture(scope="module")
def lesson(load):
    return load("loss_functions/label_smoothing.py")


SMALL = {"steps": 300, "n": 128, "epochs": 40, "sets": 1}


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir, lines = tmp_path_factory.mktemp("runs"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(map(str, words))))
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, "\n".join(lines)


def test_targets_and_loss_by_hand(lesson):
    q = lesson.smooth_labels(torch.tensor([1, 0]), 4, 0.2)
    torch.testing.assert_close(q, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85] + 3 * [0.05]]))
    logits = torch.tensor([[0.0, math.log(3.0)]])  # p = 1/4, 3/4
    for loss_of in (lesson.label_smoothing_loss, lesson.smoothing_plain):
        loss = loss_of(logits, torch.tensor([1]), 0.1)
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
    gaps = lesson.descend(10, 0.0, 1000)
    assert gaps[999] - gaps[99] == pytest.approx(math.log(10), abs=0.05)


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, math.nan])
def test_epsilon_must_be_a_share(lesson, epsilon):
    with pytest.raises(ValueError, match="epsilon must be from 0 to 1"):
        lesson.smooth_labels(torch.tensor([0]), 3, epsilon)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (1,)])
def test_shapes_that_would_broadcast_are_refused(lesson, shape):
    with pytest.raises(ValueError, match=r"logits \(B, C\) and labels \(B,\)"):
        lesson.label_smoothing_loss(torch.randn(3, 5), torch.zeros(shape, dtype=torch.long), 0.1)


def test_the_best_gap_at_the_ends(lesson):
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


def test_a_bar_is_blue_to_the_accuracy_and_red_to_the_confidence(lesson, monkeypatch):
    written, text = [], ImageDraw.ImageDraw.text

    def noted(pen, place, words, *ink):
        written.append(words)
        assert min(place) >= 0 and place[0] + pen.textlength(words, ink[1]) <= 450
        return text(pen, place, words, *ink)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    share, confidence, accuracy = torch.tensor([[0.0, 0.5, 0.5], [0, 0.6, 0.7], [0, 0.3, 0.9]])
    picture = torch.tensor(lesson.reliability_picture(share, confidence, accuracy, size=100))
    assert picture.shape == (400, 350, 3) and picture.dtype == torch.uint8
    blue = (picture == torch.tensor([64, 115, 204])).all(2).sum(0)  # pixels of each column
    red = (picture == torch.tensor([230, 89, 77])).all(2).sum(0)
    for column, expected in ((35, (0, 0)), (170, (90, 90)), (310, (210, 60))):
        assert (blue[column].item(), red[column].item()) == pytest.approx(expected, abs=5)
    middle = picture[355 - 150 : 365 - 150, 30 + 150].sum(1)  # the diagonal, over the red
    assert (middle == 0).any()
    assert "blue: up to the smaller of accuracy and confidence" in written
    assert "red below the line: too sure; above: not sure enough" in written
    assert {"confidence", "1  accuracy, upwards", "0", "1"} <= {*written}


def test_a_confidence_on_a_bound_belongs_to_the_bin_below(lesson):
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    share, _, _ = lesson.reliability(p, torch.tensor([0, 0, 0]), bins=4)
    assert share.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_the_gap_is_taken_to_the_largest_other_logit(lesson, monkeypatch):
    start = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(torch, "zeros", lambda *size, **kinds: start)
    assert lesson.descend(3, 0.1, 1, lr=0.0) == [-2.0]


def test_the_temperature_gives_back_honest_logits(lesson):
    torch.manual_seed(0)
    z = 2 * torch.randn(6_000, 6)
    labels = z.softmax(1).multinomial(1).squeeze(1)
    for T in (0.5, 1.0, 3.0):
        assert lesson.fit_temperature(T * z, labels) == pytest.approx(T, abs=0.11)


def test_judge_by_hand(lesson):
    z = torch.tensor([[0.6, 0.4], [0.3, 0.7]], dtype=torch.float64).log()
    assert lesson.judge(z, torch.tensor([0, 0])) == pytest.approx((0.5, 0.65, 0.55))


def test_try_two_classes_have_another_best_gap(lesson, edited, tmp_path, capsys):
    copy = edited(lesson, "def show_gap(log_dir, steps, C=10)", "def show_gap(log_dir, steps, C=2)")
    copy.main(log_dir=tmp_path, steps=100, n=20, epochs=1, sets=1)
    assert " 2.9444\n" in capsys.readouterr().out
    lesson.show_gap(tmp_path / "ten", 100)
    assert " 4.5109\n" in capsys.readouterr().out


def test_main_begins_with_a_gap_that_is_best(measured):
    losses, text = measured[0]["everyday"], measured[2]
    for gap, (entropy, smoothed, plain) in losses.items():
        rest = math.log(1 + 2 * math.exp(-gap))  # -log p_y
        assert entropy == pytest.approx(rest, abs=1e-6)
        assert smoothed == pytest.approx(rest + 0.1 * 2 / 3 * gap, abs=1e-5)
        assert plain == pytest.approx(smoothed, abs=1e-6)
    assert "of these gaps 10 costs least without smoothing, 3.332 with it" in text
    assert 0 < measured[0]["off"] < 1e-12


def test_main_gaps_reach_theory(measured, events):
    gaps, log_dir, text = measured[0]["gaps"], measured[1], measured[2]
    for epsilon in (0.1, 0.3):
        best = math.log((1 - 0.9 * epsilon) / (0.1 * epsilon))
        assert gaps[epsilon][1] == pytest.approx(best)
        path = events(log_dir / "gap" / f"eps_{epsilon:g}").Scalars("logits/gap")
        assert len(path) == 300 and path[-1].value == pytest.approx(best)
    assert gaps[0.0][1] > gaps[0.0][0] + 2
    grown = gaps[0.0][1] - gaps[0.0][0]
    assert f"10 times the steps add {grown:.3f} to the gap, and log 10 is 2.303" in text
    assert "3. Which gap of the logits is best? 10 classes, gradient descent on one example" in text
    assert "after 30 steps   after 300   formula" in text
    for epsilon, formula in ((0.0, math.inf), (0.01, math.log(0.991 / 0.001)), (0.3, 3.1918)):
        first, last = gaps[epsilon]
        row = f"   {epsilon:<4}   {first:14.4f}   {last:9.4f}   {formula:7.4f}"
        assert row.split() in [line.split() for line in text.splitlines()]


def test_main_smoothing_calibrates_on_noisy_labels_and_not_on_clean_ones(measured):
    (noisy, clean), text = (measured[0][name] for name in ("noisy", "clean")), measured[2]
    # on eleven seeds: at least 0.189 and at most 0.43 times that; at least 0.14, 0.011 and 0.078
    assert noisy["e = 0"][2] > 0.15 and noisy["e = 0.1"][2] < 0.6 * noisy["e = 0"][2]
    assert noisy["e = 0.4"][1] < noisy["e = 0.4"][0] - 0.1  # too much
    assert clean["e = 0.1"][2] > clean["e = 0"][2] + 0.005
    assert clean["e = 0.02"][2] < clean["e = 0.1"][2] - 0.02
    assert list(noisy) == ["e = 0", "e = 0.1", "e = 0.4", "e = 0, logits/T"]
    assert list(clean) == ["e = 0", "e = 0.02", "e = 0.1", "e = 0, logits/T"]
    for rows, rises in ((noisy, "lowers"), (clean, "raises")):
        T = rows["e = 0, logits/T"]
        assert T[0] == rows["e = 0"][0]  # the same answers
        assert T[2] < 0.85 * rows["e = 0"][2]  # at most 0.72 times
        assert abs(rows["e = 0.1"][0] - rows["e = 0"][0]) < 0.05  # of either sign
        ece = [rows[name][2] for name in ("e = 0", "e = 0.1")]
        assert (f"-> e = 0 has an ECE of {ece[0]:.3f}; e = 0.1 {rises} it to {ece[1]:.3f}, "
                f"dividing by T lowers it to {T[2]:.3f}\n") in text  # fmt: skip
        for name, row in rows.items():
            assert "   {:<15}   {:8.3f}   {:10.3f}   {:5.3f}\n".format(name, *row) in text


def test_main_names_what_its_columns_are(measured):
    text = measured[2]
    assert (
        "4. What does smoothing do if 20% of the labels are random, in training and test?" in text
    )
    assert "5. What does smoothing do if 0% of the labels are random, in training and test?" in text
    assert "128 training points, 10 classes, means over 1 data sets; accuracy at best 0.82" in text
    assert "accuracy at best 1.00" in text
    assert text.count("confidence: mean of the largest p; ECE: how far") == 2
    assert text.count("trained with      accuracy   confidence     ECE\n") == 2
    assert text.count("(T, fitted on 1,000 other points: ") == 2
    assert "e     smoothing_plain   label_smoothing_loss   penalty_form   F.cross_entropy" in text
    assert "CrossEntropyLoss   label_smoothing=0.1   smoothing_plain" in text


def test_the_temperature_comes_from_the_held_out_points(lesson, monkeypatch, tmp_path, capsys):
    seen, fit = [], lesson.fit_temperature
    monkeypatch.setattr(lesson, "fit_temperature", lambda z, y: seen.append(len(z)) or fit(z, y))
    monkeypatch.setattr(lesson, "fit", lambda x, y, *more: lambda points: points[:, :10])
    rows = lesson.show_networks(4, 0, tmp_path, 0.2, (0.0, 0.1), 30, 1, 2)
    assert seen == [1000, 1000]
    assert rows["e = 0"] == rows["e = 0.1"]
    monkeypatch.setattr(lesson, "fit_temperature", lambda z, y: 2.5 * len(seen))
    rows = lesson.show_networks(4, 0, tmp_path, 0.2, (0.0, 0.1), 30, 1, 2)
    assert "other points: 5.00 on average)" in capsys.readouterr().out
    assert rows["e = 0, logits/T"][1] < rows["e = 0"][1]


def test_main_draws_accuracy_by_confidence(measured, events, lesson):
    log_dir = measured[1]
    ideal = events(log_dir / "ideal").Scalars("calibration/accuracy")
    assert [event.value for event in ideal] == pytest.approx([i / 100 for i in range(101)])
    for name, epsilons in (("noisy", (0, 0.1, 0.4)), ("clean", (0, 0.02, 0.1))):
        for epsilon in epsilons:
            run = events(log_dir / name / f"eps_{epsilon:g}")
            assert len(run.Images("calibration/reliability")) == 1
    bars = torch.tensor([[0.5, 0.496, 0.004], [0.6, 0.814, 0.99], [0.3, 0.9, 0.2]])
    lesson.write_calibration(log_dir / "bars", bars)
    points = events(log_dir / "bars").Scalars("calibration/accuracy")
    assert [point.step for point in points] == [60, 81]
    assert [point.value for point in points] == pytest.approx([0.3, 0.9])
