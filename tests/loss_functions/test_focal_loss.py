import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

HALF = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
F64 = torch.float64
SMALL = {"n": 4000, "epochs": 8, "sets": 2}


@pytest.fixture(scope="module")
def lesson(load):
    return load("loss_functions/focal_loss.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(map(str, words))))
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, "\n".join(lines)


@pytest.mark.parametrize(("y", "p_t", "a_t"), [(1.0, 0.2, 0.3), (0.0, 0.8, 0.7)])
def test_one_loss_by_hand(lesson, y, p_t, a_t):
    logit = torch.tensor([math.log(0.2 / 0.8)])  # p = 0.2
    for loss_of in (lesson.sigmoid_focal_loss, lesson.focal_plain):
        loss = loss_of(logit, torch.tensor([y]), alpha=0.3, gamma=1.5)
        assert loss.item() == pytest.approx(-a_t * (1 - p_t) ** 1.5 * math.log(p_t))


def test_several_classes_by_a_loop(lesson):
    torch.manual_seed(0)
    logits, labels, alpha = torch.randn(7, 4), torch.randint(4, (7,)), torch.rand(4)
    expected = []
    for row, label in zip(logits, labels, strict=True):
        p_t = (row[label].exp() / row.exp().sum()).item()
        expected.append(-alpha[label].item() * (1 - p_t) ** 0.7 * math.log(p_t))
    losses = lesson.softmax_focal_loss(logits, labels, alpha, 0.7)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [F64, torch.float32, *HALF])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.9, 0.5), (None, 3.7), (0.4, 0.0)])
def test_loss_and_gradient_are_torchvisions(lesson, alpha, gamma, dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 7, dtype=F64)).to(dtype).requires_grad_()
    y = torch.rand(5, 7).round().to(dtype)
    ours = lesson.sigmoid_focal_loss(x, y, alpha, gamma)
    wide = x.detach().double().requires_grad_()  # half a digit is no reference for another
    theirs = torchvision_loss(wide, y.double(), -1 if alpha is None else alpha, gamma)
    assert ours.dtype == dtype
    tolerance = HALF.get(dtype, 1e-5)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in ((ours, x), (theirs, wide))]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=tolerance, atol=tolerance)


def test_targets_between_no_and_yes_are_mixed(lesson):
    x, t = torch.tensor([0.7], dtype=F64), 0.3
    p = x.sigmoid().item()
    p_t = p * t + (1 - p) * (1 - t)
    ce = -t * math.log(p) - (1 - t) * math.log(1 - p)
    loss = lesson.sigmoid_focal_loss(x, torch.tensor([t], dtype=F64), 0.2, 2.0)
    assert loss.item() == pytest.approx((0.2 * t + 0.8 * (1 - t)) * (1 - p_t) ** 2 * ce)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certain_answers_have_finite_gradients(lesson, gamma):
    x = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0])
    loss = lesson.sigmoid_focal_loss(x, y, gamma=gamma)
    assert loss.tolist() == pytest.approx([0, 0, 200, 200])
    assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = lesson.softmax_focal_loss(logits, torch.tensor([0, 0]), gamma=gamma)
    assert loss.tolist() == pytest.approx([0, 200])
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_two_classes_are_one_logit(lesson, gamma):
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 2, dtype=F64), torch.randint(2, (9,))
    two = lesson.softmax_focal_loss(logits, labels, torch.tensor([0.7, 0.3]), gamma)
    one = lesson.sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.double(), 0.3, gamma)
    torch.testing.assert_close(two, one, check_dtype=False)
    plain = lesson.softmax_focal_loss(logits, labels, gamma=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, reduction="none"))


def test_alpha_without_gamma_is_pos_weight(lesson):
    torch.manual_seed(0)
    x, y = torch.randn(20, dtype=F64), torch.randint(2, (20,)).to(F64)
    weighted = F.binary_cross_entropy_with_logits(
        x, y, pos_weight=torch.tensor(99.0), reduction="none"
    )
    torch.testing.assert_close(lesson.sigmoid_focal_loss(x, y, 0.99, 0.0), weighted / 100)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.0])
def test_the_gradient_of_a_negative_has_the_other_sign(lesson, gamma):
    p_t = torch.linspace(0.05, 0.95, 19, dtype=F64)
    for y, sign, a_t in ((1.0, 1, 0.3), (0.0, -1, 0.7)):
        x = (p_t if y else 1 - p_t).logit().requires_grad_()
        loss = lesson.sigmoid_focal_loss(x, torch.full_like(x, y), alpha=0.3, gamma=gamma)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(grad, sign * a_t * lesson.focal_gradient(p_t, gamma))


def test_shapes_that_would_broadcast_are_refused(lesson):
    with pytest.raises(ValueError, match=r"logits \(4, 1\) and targets \(4,\) must agree"):
        lesson.sigmoid_focal_loss(torch.randn(4, 1), torch.zeros(4))
    for logits, labels in ((torch.randn(4, 3), (4, 1)), (torch.randn(4), (4,))):
        with pytest.raises(ValueError, match=r"logits \(B, K\) and labels \(B,\), not "):
            lesson.softmax_focal_loss(logits, torch.zeros(labels, dtype=torch.long))


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


def test_average_precision_needs_a_positive(lesson):
    with pytest.raises(ValueError, match="no positive target"):
        lesson.average_precision(torch.rand(3), torch.zeros(3))


def test_easy_negatives_by_hand(lesson):
    loss, p = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.05, 0.05, 0.5, 0.01])
    targets = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert lesson.easy_negative_share(loss, p, targets) == pytest.approx(0.5)


@pytest.mark.parametrize("alpha", [None, 0.25, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_the_best_p_leads_back_to_the_share(lesson, alpha, gamma):
    p = torch.arange(1, 10_000, dtype=F64) / 10_000
    x, a = p.logit(), 0.5 if alpha is None else alpha
    for share in (0.05, 0.4):
        yes, no = (lesson.sigmoid_focal_loss(x, torch.full_like(x, y), a, gamma) for y in (1.0, 0))
        best = p[(share * yes + (1 - share) * no).argmin()]
        assert lesson.true_share(best, alpha, gamma).item() == pytest.approx(share, abs=2e-3)


def test_one_in_100_is_positive_and_wrong_labels_are_in_training_only(lesson):
    (x, y), (x_val, y_val) = lesson.rare_class(3, 4000, 1000, 0.1)
    assert (
        y.sum() == 440 and y_val.sum() == 10 and x.shape == (4000, 8) and x_val.shape == (1000, 8)
    )
    again, (other, _) = lesson.rare_class(3, 4000, 1000)
    assert again[1].sum() == 40 and torch.equal(again[0], x) and torch.equal(other, x_val)
    shift = x[again[1] == 1].mean(0) - x[again[1] == 0].mean(0)
    assert shift.norm().item() == pytest.approx(4, abs=1.5)
    assert not torch.equal(x[:1000], x_val)  # other points


@pytest.mark.parametrize("prior", [0.5, 0.01])
def test_a_network_starts_at_its_prior(lesson, prior):
    train, (x, y) = lesson.rare_class(0, 100, 1000)
    z = lesson.fit(0, train, x, None, 0.0, 0, prior=prior)
    torch.testing.assert_close(z.sigmoid(), torch.full_like(z, prior), rtol=1e-5, atol=0)
    theory = -(0.01 * math.log(prior) + 0.99 * math.log(1 - prior))
    assert F.binary_cross_entropy_with_logits(z, y.double()).item() == pytest.approx(
        theory, rel=1e-4
    )


def test_main_begins_with_four_losses(measured):
    ours, theirs = measured[0]["everyday"]
    by_head = [-0.25 * 0.01 * math.log(0.9), -0.25 * 0.81 * math.log(0.1),
               -0.75 * 0.81 * math.log(0.1), -0.75 * 0.01 * math.log(0.9)]  # fmt: skip
    assert ours.tolist() == pytest.approx(by_head, rel=1e-4)
    assert theirs.tolist() == pytest.approx(by_head, rel=1e-4)
    assert "costs 22 times as much as one with p = 0.9 by cross-entropy" in measured[2]
    assert "and 1,770 times by focal loss" in measured[2]
    assert "by hand: a_t (1 - p_t)^gamma CE" in measured[2]


def test_main_prints_the_same_mean_loss_by_four_ways(measured, lesson, monkeypatch, capsys):
    assert 0 < measured[0]["off"] < 1e-12
    given = []

    def noted(x, y, alpha, gamma):
        given.append((x.detach(), y))
        return torchvision_loss(x, y, alpha, gamma)

    monkeypatch.setattr(lesson, "torchvision_loss", noted)
    lesson.show_complete()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:5]]
    for (x, y), row, (alpha, gamma) in zip(
        given, rows, ((0.25, 2.0), (0.8, 0.5), (0.6, 3.7)), strict=True
    ):
        assert set(y.tolist()) == {0.0, 1.0} and x.shape == (50,) and x.std() > 1.5
        loss = torchvision_loss(x, y, alpha, gamma).mean().item()
        assert row == [str(alpha), str(gamma), *4 * [f"{loss:.6f}"]]


def test_main_shows_what_gamma_does_to_easy_examples(measured, events):
    ratios = measured[0]["ratios"]
    assert ratios[0.0] == pytest.approx(11.11, abs=0.01) and ratios[2.0] == pytest.approx(
        0.0027, abs=1e-4
    )
    assert "one hard one for gamma = 1, 2, 5\n" in measured[2]
    for gamma, ratio in ratios.items():
        slopes = [-((1 - p) ** gamma) * (gamma * p * math.log(p) + p - 1) for p in (0.99, 0.1)]
        row = (f"   {gamma:<5}   {0.01**gamma:.1e}   {0.9**gamma:.3f}    {slopes[0]:.1e}   "
               f"{slopes[1]:.3f}    {ratio:.4f}\n")  # fmt: skip
        assert row in measured[2] and ratio == pytest.approx(1000 * slopes[0] / slopes[1])
    assert "size of dFL/dx     1,000 easy ones pull as" in measured[2]
    assert "hard     easy      hard     much as this many hard ones" in measured[2]
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        run = events(measured[1] / f"gamma_{gamma:g}")
        factor, pull = run.Scalars("focal/factor"), run.Scalars("focal/gradient")
        assert (
            [event.step for event in factor] == [event.step for event in pull] == [*range(1, 100)]
        )
        assert factor[29].value == pytest.approx(0.7**gamma)
        slope = 0.7**gamma * (gamma * 0.3 * math.log(0.3) - 0.7)
        assert pull[29].value == pytest.approx(-slope)


def test_main_takes_easy_negatives_out_of_the_loss(measured):
    rows = measured[0]["networks"]
    entropy, weights, focal, both = rows.values()
    assert entropy["easy"] > 0.005
    assert focal["easy"] < 0.02 * entropy["easy"]
    assert focal["easy"] < both["easy"]  # the weight of a negative is 0.75
    assert weights["easy"] < 0.1 * entropy["easy"]
    assert weights["yes"] > entropy["yes"] and weights["right"] > entropy["right"]
    assert both["yes"] < focal["yes"]
    assert entropy["CE"] == entropy["right"]
    y, text = measured[0]["y"], measured[2]
    for name, row in rows.items():
        said = row["p"] > 0.5
        assert (row["yes"], row["right"]) == (said.sum(), y[said].sum())
        top = entropy["p"].topk(row["yes"]).indices
        assert row["CE"] == y[top].sum() and abs(row["right"] - row["CE"]) <= 8
        assert row["AP"] > 0.3
        assert "   {:<13}   {:17.3f}   {:5,}   {:5}   {:3}   {:.4f}\n".format(
            name, row["AP"], row["yes"], row["right"], row["CE"], row["easy"]) in text  # fmt: skip
    assert "(always 0.01)               0.010       0       0     0\n" in text
    for words in ("judged on 4,000 others. Average precision", "yes: points with p > 0.5; right: ",
                  "how many of them are positive; CE: how many are so\n   among as many points, if "
                  "cross_entropy picks those of its highest p\n",
                  "easy: share of the loss from negatives of which cross_entropy is sure (p < 0.1)",
                  "-> easy negatives have {:.1%} of cross_entropy's loss, {:.2%} of gamma_2's"
                  .format(rows["cross_entropy"]["easy"], rows["gamma_2"]["easy"]),
                  "average precision     yes   right    CE     easy\n"):  # fmt: skip
        assert words in text
    aps = [row["AP"] for row in rows.values()]
    off = max(abs(row["right"] - row["CE"]) for row in rows.values())
    assert f"differ by {max(aps) - min(aps):.3f} at most" in text
    assert f"finds as many, give or take {off} of 40\n" in text


def test_main_draws_precision_by_recall_of_the_validation_points(measured, events):
    rows = measured[0]["networks"]
    for name, row in rows.items():
        run = events(measured[1] / "imbalance" / name)
        (event,) = run.Tensors("val/precision_recall")
        table = torch.tensor(event.tensor_proto.float_val or [])
        if not len(table):
            table = torch.frombuffer(
                bytearray(event.tensor_proto.tensor_content), dtype=torch.float
            )
        found, wrongly = table.view(6, -1)[:2]  # true and false positives from each threshold on
        y = measured[0]["y"]
        assert found[0] == y.sum() == 40 and wrongly[0] == 3960
        middle = row["p"] >= 0.5
        assert found[63].item() == pytest.approx(y[middle].sum().item(), abs=3)


def test_main_says_when_gamma_helps(measured):
    gains, text = measured[0]["gains"], measured[2]
    assert list(gains) == [(800, 0.0), (4000, 0.0), (4000, 0.1)]
    assert gains[800, 0.0][0] > 0.02  # 0.07 to 0.13 on six other seeds
    assert gains[4000, 0.1][0] < -0.1  # -0.22 to -0.41
    sure = {1: [], -1: []}
    for (gain, error), positives in zip(gains.values(), ("8/0", "40/0", "40/400"), strict=True):
        if abs(gain) > 2 * error:
            sure[1 if gain > 0 else -1].append(positives)
        assert f"   {gain:+.3f} +- {error:.3f}\n" in text and f"   {positives} " in text
    better, worse = (", ".join(sure[sign]) or "none" for sign in (1, -1))
    assert f"gamma = 2 is better with {better}; worse with {worse}\n" in text
    assert "points     right/wrong" in text and "means over 2 data sets, no alpha" in text


def test_the_error_of_a_mean_difference(lesson, monkeypatch, capsys):
    scores = iter(3 * [0.1, 0.3, 0.1, 0.5])  # gains of 0.2 and 0.4
    monkeypatch.setattr(lesson, "fit", lambda *given: given)
    monkeypatch.setattr(lesson, "average_precision", lambda *given: next(scores))
    gains = lesson.show_when(0, 500, 1, 2)
    for mean, error in gains.values():
        assert (mean, error) == pytest.approx((0.3, 0.1))
    assert "better with 1/0, 5/0, 5/50; worse with none" in capsys.readouterr().out


def test_main_corrects_p(measured):
    best, means, text = (measured[0]["best"], measured[0]["means"], measured[2])
    assert [p.item() for p in best[2.0]] == pytest.approx([0.1536, 0.306, 0.5], abs=1e-3)
    assert [p.item() for p in best[0.0]] == pytest.approx([0.01, 0.1, 0.5], abs=1e-4)
    weighted = means["alpha_0.99"]
    assert weighted[0] > weighted[2] + 0.2
    off = {name: [abs(v - row[2]) for v in row[:2]] for name, row in means.items()}
    assert off["alpha_0.99"][1] < 0.6 * off["alpha_0.99"][0]
    assert off["cross_entropy"][0] == pytest.approx(off["cross_entropy"][1])
    before, after = (max(off[name][i] for name in ("gamma_2", "gamma_2_alpha")) for i in (0, 1))
    assert f"|mean p - share|: cross_entropy {off['cross_entropy'][0]:.3f}; alpha_0.99" in text
    assert "alpha_0.99 {:.3f}, corrected {:.3f};\n".format(*off["alpha_0.99"]) in text
    assert f"with gamma = 2 at most {before:.3f}, corrected {after:.3f}\n" in text
    assert "share 0.01, corrected\n" in text
    for name, row in means.items():
        assert "   {:<13}   {:6.3f}   {:16.3f}   {:18.3f}\n".format(name, *row) in text


def test_try_a_larger_alpha_finds_more_and_ranks_as_before(lesson, edited, tmp_path):
    other = edited(lesson, '"gamma_2_alpha": (0.25, 2.0)', '"gamma_2_alpha": (0.75, 2.0)')
    rows = [copy.show_networks(0, tmp_path / str(i), 10_000, 8)[0]["gamma_2_alpha"]
            for i, copy in enumerate((lesson, other))]  # fmt: skip
    assert rows[1]["yes"] > rows[0]["yes"] + 10
    assert rows[1]["right"] > rows[0]["right"] + 5
    assert abs(rows[1]["AP"] - rows[0]["AP"]) < 0.1
