import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_loss.py")


# --- each loss ---------------------------------------------------------------------------------


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


def test_shapes_that_would_broadcast_are_refused(lesson):
    for loss in (lesson.l1_loss, lesson.mse_loss):
        with pytest.raises(ValueError, match=r"\(4, 1\) and target \(4,\)"):
            loss(torch.zeros(4, 1), torch.zeros(4))


def test_reduce_takes_weights_and_refuses_other_words(lesson):
    losses, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 0.5])
    assert lesson.reduce(losses, "none", weights) is losses
    assert lesson.reduce(losses, "sum", weights).item() == 9
    assert lesson.reduce(losses, "mean").item() == 3
    assert lesson.reduce(losses, "mean", weights).item() == 6
    with pytest.raises(ValueError, match="'max' is none of none, sum, mean"):
        lesson.reduce(losses, "max")


def test_log_sum_exp_has_no_overflow_and_no_underflow(lesson):
    z = torch.tensor([[1000.0, 1001, 999], [-1000, -1001, -999]])
    torch.testing.assert_close(lesson.log_sum_exp(z), torch.logsumexp(z, 1))


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


def test_the_weighted_mean_divides_by_the_weights_of_the_targets(lesson):
    z, t, weight = torch.zeros(3, 2), torch.tensor([0, 0, 1]), torch.tensor([1.0, 6.0])
    assert lesson.cross_entropy(z, t, weight).item() == pytest.approx(math.log(2))
    z[2, 1] = 100.0  # only the heavy sample is right now: 2 log 2 over 8
    assert lesson.cross_entropy(z, t, weight).item() == pytest.approx(2 * math.log(2) / 8)


def test_yes_or_no_is_cross_entropy_of_two_logits(lesson):
    z, yes = torch.randn(9), torch.randint(2, (9,))
    two = torch.stack([torch.zeros(9), z], 1)
    theirs = nn.BCEWithLogitsLoss()(z, yes.float())
    torch.testing.assert_close(lesson.cross_entropy(two, yes), theirs)


# --- the sections ------------------------------------------------------------------------------


def test_the_first_table_can_be_checked_by_head(lesson, capsys):
    assert lesson.show_everyday() == pytest.approx([1, 5 / 3, math.log(2)])
    _, head, *rows, follows = capsys.readouterr().out.splitlines()
    assert head.split() == ["loss", "outputs", "target", "value", "by", "head"]
    assert [" ".join(row.split()) for row in rows] == [
        "L1Loss 1.000 2.000 3.000 1.000 3.000 5.000 1.000 (0 + 1 + 2) / 3",
        "MSELoss 1.000 2.000 3.000 1.000 3.000 5.000 1.667 (0 + 1 + 4) / 3",
        "CrossEntropyLoss 0.693 0.000 0.000 class 0 0.693 exp gives 2, 1, 1: -log(2 / 4)",
    ]
    assert follows == "   -> value minus value by head, largest: 0.000"


def test_the_first_table_says_so_if_a_value_is_not_that_by_head(lesson, capsys, monkeypatch):
    monkeypatch.setattr(nn.MSELoss, "forward", lambda self, x, t: (x - t).square().sum() / 2)
    lesson.show_everyday()
    assert capsys.readouterr().out.endswith("largest: 0.833\n")


@pytest.mark.parametrize("seed", range(3))
def test_the_second_table_shows_both_sides(lesson, capsys, seed):
    torch.manual_seed(seed)
    rows = lesson.show_by_hand(6, 5)
    assert len(rows) == 12 and len({row[:3] for row in rows}) == 12
    torch.manual_seed(seed)
    x, target = torch.randn(6), torch.randn(6)
    z, t, weight = torch.randn(6, 5), torch.randint(5, (6,)), torch.rand(5) + 0.5
    for name, reduction, word, ours, theirs in rows:
        if name == "cross-entropy":
            w = weight if word == "yes" else None
            kept = [0, 2, 3, 4, 5]  # without the second one
            right = F.cross_entropy(z[kept], t[kept], w, reduction=reduction)
            if reduction == "none":
                right = torch.cat([right[:1], torch.zeros(1), right[1:]])
        else:
            right = {"L1": F.l1_loss, "MSE": F.mse_loss}[name](x, target, reduction=reduction)
        torch.testing.assert_close((ours, theirs), (right, right))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("by hand equal torch.nn's? 6 random examples, 5 classes")
    assert "the second example is ignored" in lines[1]
    for line, (*_, ours, theirs) in zip(lines[3:-1], rows, strict=True):
        shown = [float(word) for word in line.split() if "." in word]
        expected = ours.flatten()[:3].tolist() + theirs.flatten()[:3].tolist()
        name, reduction, word = line.split()[:3]
        assert (word == "-") == (name != "cross-entropy")
        assert (shown[1] == 0) == ((name, reduction) == ("cross-entropy", "none"))
        assert shown == pytest.approx(expected, abs=6e-4)
    off = max((ours - theirs).abs().max().item() for *_, ours, theirs in rows)
    assert lines[-1].endswith(f"largest in all 12 rows: {off:.1g}") and off < 1e-5


def test_try_nothing_but_ignored_targets_is_nan(lesson, edited, tmp_path, capsys):
    changed = edited(lesson, "    t[1] = -1\n", "    t[:] = -1\n")
    rows = changed.main(log_dir=tmp_path)["by_hand"]  # to its end
    for name, reduction, _, ours, theirs in rows:
        if name == "cross-entropy":
            for value in (ours, theirs):
                assert value.isnan().all() if reduction == "mean" else (value == 0).all()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    means = [words for words in lines if words[:2] == ["cross-entropy", "mean"]]
    assert [words[-2:] for words in means] == [["nan", "nan"]] * 2


@pytest.mark.parametrize("seed", range(3))
def test_the_third_table_starts_where_nothing_is_known(lesson, capsys, seed):
    torch.manual_seed(seed)
    values, targets = lesson.show_tasks()
    for name, number in (("yes", 2), ("tags", 2), ("classes", 3), ("pixels", 3)):
        assert targets[name].min() >= 0 and targets[name].max() < number
    assert len(targets["pixels"].unique()) == 3 and len(targets["tags"].unique()) == 2
    expected = [
        (1 + 1 + 1 + 81) / 4,
        (1 + 1 + 1 + 9) / 4,
        math.log(3),
        math.log(3),
        math.log(2),
        math.log(2),
    ]
    assert list(values.values()) == pytest.approx(expected)
    lines = capsys.readouterr().out.splitlines()
    losses = ["MSELoss", "L1Loss", *["CrossEntropyLoss"] * 2, *["BCEWithLogitsLoss"] * 2]
    shapes = ["(4, 1)   (4, 1)", "(4, 1)   (4, 1)", "(4, 3)   (4,)", "(4, 3, 8, 8)   (4, 8, 8)",
              "(4, 1)   (4, 1)", "(4, 3)   (4, 3)"]  # fmt: skip
    types = ["float32"] * 2 + ["int64"] * 2 + ["float32"] * 2
    for line, *words in zip(lines[3:-1], losses, shapes, types, values.values(), strict=True):
        assert " ".join(line.split()).endswith(
            " ".join([*" ".join(words[1].split()).split("  "), words[2], words[0],
                      f"{words[3]:.4f}"]))  # fmt: skip
    assert lines[-1].endswith("logits 0 the loss is log 3 for 3 classes, log 2 for yes or no")


def test_the_fourth_table_finds_the_silent_mistakes(lesson, capsys):
    values, silent = lesson.show_mistakes()
    assert silent == [2, 8, 11]
    refused = [words for (_, words), value in values.items() if value is None]
    assert len(refused) == 5
    right = {name: value for (name, words), value in values.items() if words == "-"}
    assert list(right) == ["CrossEntropyLoss", "BCEWithLogitsLoss", "MSELoss"]
    assert list(right.values()) == pytest.approx([0, 0, 0], abs=1e-6)
    best = math.log(1 + 2 / math.e)
    assert values["CrossEntropyLoss", "softmax before it"] == pytest.approx(best)
    half = (math.log(1 + 1 / math.e) + math.log(2)) / 2  # sigmoid: 1 for yes, 0 for no
    assert values["BCEWithLogitsLoss", "sigmoid before it"] == pytest.approx(half)
    table = torch.arange(4.0)[:, None] - torch.arange(4.0)  # 16 differences
    spread = table.square().mean().item()
    assert values["MSELoss", "output (4, 1), target (4,)"] == pytest.approx(spread)
    _, _, *rows, first, second = capsys.readouterr().out.splitlines()
    said = [row[70:].split(":")[0] for row in rows]
    assert said == ["-", "-", "IndexError", "RuntimeError", "RuntimeError", "ValueError", "-", "-",
                    "RuntimeError", "-", "UserWarning"]  # fmt: skip
    assert [row.split()[0] for row in rows] == [str(i) for i in range(1, 12)]
    assert first.endswith("without an error: rows 2, 8, 11")
    assert second.endswith("row 2 is 0.5514; the least after a softmax is log(1 + 2/e) = 0.5514")
    assert all(len(row) <= 120 for row in rows)


def test_no_logits_get_below_the_bound_after_a_softmax():
    torch.manual_seed(0)
    z = torch.randn(5000, 3) * 30
    losses = F.cross_entropy(z.softmax(1), torch.zeros(5000, dtype=torch.long), reduction="none")
    assert math.log(1 + 2 / math.e) - 1e-6 < losses.min() < 0.552


@pytest.mark.parametrize("seed", range(3))
def test_the_fifth_table_holds_slopes(lesson, capsys, seed):
    torch.manual_seed(seed)
    measured = lesson.show_slopes(3)
    l1, mse = measured["slopes"]
    assert l1.tolist() == [-1, -1, -1, 1, 1, 1]
    assert mse.tolist() == pytest.approx([-20, -2, -0.2, 0.2, 2, 20])
    torch.manual_seed(seed)
    z, t = torch.randn(1, 3), torch.randint(3, (1,)).item()
    p = z.softmax(1)
    expected = p.clone()
    expected[0, t] -= 1
    torch.testing.assert_close(measured["cross_entropy"], expected)
    torch.testing.assert_close(measured["p - y"], expected)
    assert measured["best"] == (3, 22)  # the median and the mean
    out = capsys.readouterr().out.splitlines()
    assert "one example's loss" in out[0] and out[4].endswith(f"right class is {t}")
    lines = [line.split() for line in out]
    errors = ["-10.0", "-1.0", "-0.1", "0.1", "1.0", "10.0"]
    assert lines[1][-6:] == errors and lines[2][-6:] == ["-1.0"] * 3 + ["1.0"] * 3
    assert lines[3][-6:] == ["-20.0", "-2.0", "-0.2", "0.2", "2.0", "20.0"]
    assert lines[5] == ["class", "k", "0", "1", "2"]
    y = F.one_hot(torch.tensor([t]), 3)
    for words, row in zip(lines[6:11], (z, p, y, expected, expected), strict=True):
        assert [float(word) for word in words[-3:]] == pytest.approx(row[0].tolist(), abs=6e-4)
    assert float(lines[11][-1]) < 1e-6
    assert lines[12][-4:] == ["mean", "L1", "mean", "MSE"]
    targets = (1, 2, 3, 4, 100)
    for words, name, c in zip(lines[13:15], ("median,", "mean,"), (3, 22), strict=True):
        l1, mse = (sum(abs(c - target) ** power for target in targets) / 5 for power in (1, 2))
        assert words == ["the", name, str(c), f"{l1:.1f}", f"{mse:.1f}"]
    assert out[15] == "   -> the best of 0, 1 ... 100 is 3 by L1, 22 by MSE"


def test_in_a_mean_of_N_a_slope_is_one_Nth():
    x = torch.randn(7, requires_grad=True)
    whole, one = (torch.autograd.grad(F.mse_loss(x, torch.zeros(7), reduction=r), x)[0]
                  for r in ("mean", "sum"))  # fmt: skip
    torch.testing.assert_close(whole, one / 7)


@pytest.mark.parametrize("seed", range(3))
def test_main_overflows_where_theory_says(lesson, tmp_path, seed, events, capsys):
    z, t = torch.randn(7, 4, dtype=torch.float64), torch.randint(4, (7,))
    losses = lesson.naive_cross_entropy(z, t)
    torch.testing.assert_close(losses, F.cross_entropy(z, t, reduction="none"))

    measured = lesson.main(seed=seed, log_dir=tmp_path, N=7, K=3)
    assert measured["limit"] == pytest.approx(math.log(3.4028235e38))
    finite = {a: math.isfinite(value) for a, value in measured["naive"].items()}
    assert finite == {1.0: True, 50.0: True, 88.0: True, 89.0: False, 1000.0: False}
    for a, value in measured["stable"].items():
        assert value == pytest.approx(a + math.log(1 + 2 * math.exp(-a)))
        assert measured["naive"][a] in (pytest.approx(value), math.inf)
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines if line[0].isdigit()] == ["1", "2", "3", "4", "5", "6"]
    follows = "finite up to a = 88 as written, 1000 by log-sum-exp; exp(a) is finite up to 88.7"
    assert lines[-2] == f"   -> {follows}"
    assert lines[-8].split() == ["a", "-log", "p_t", "as", "written", "by", "log-sum-exp"]
    shown = [line.split() for line in lines[-7:-2]]
    assert [words[0] for words in shown] == ["1", "50", "88", "89", "1000"]
    assert [words[1] for words in shown] == ["1.5514", "50.0000", "88.0000", "inf", "inf"]
    assert [words[2] for words in shown][3:] == ["89.0000", "1000.0000"]
    assert lines[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")

    for run, last in (("naive", 88), ("stable", 120)):
        curve = events(tmp_path / run).Scalars("cross_entropy/value")
        assert [e.step for e in curve] == list(range(0, last + 1, 4))
        for e in curve:
            assert e.value == pytest.approx(e.step + math.log(1 + 2 * math.exp(-e.step)))
    for run in ("l1", "mse"):
        loaded = events(tmp_path / run)
        values, slopes = loaded.Scalars("loss/value"), loaded.Scalars("loss/slope")
        assert [e.step for e in values] == [e.step for e in slopes] == list(range(201))
        for value, slope in zip(values, slopes, strict=True):
            error = (value.step - 100) / 50  # step 100 is error 0, step 150 error 1
            law = (abs(error), (error > 0) - (error < 0)) if run == "l1" else (error**2, 2 * error)
            assert (value.value, slope.value) == pytest.approx(law, abs=1e-6)
