import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_common_layers.py")


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.tensor([5.0, -2, 0]).view(3, 1, 1) + 2 * torch.randn(16, 3, 8, 8)


def rows_of(out, start):
    """The words of each printed line that begins with `start`."""
    return [line.split() for line in out.splitlines() if line.strip().startswith(start)]


def curve(events, run, tag):
    """Its steps, and its values."""
    logged = events(run).Scalars(tag)
    return [event.step for event in logged], [event.value for event in logged]


# --- in everyday code, and in a network --------------------------------------------------------


def test_six_layers_on_four_pixels(lesson, capsys):
    torch.manual_seed(0)
    modes = lesson.show_everyday()
    out = capsys.readouterr().out
    # eval: mean 0.1 * 2, var 0.9 + 0.1 * 4 / 3, so (1 - 0.2) / 1.0165 and (3 - 0.2) / 1.0165
    norm = ["-1.00", "-1.00", "1.00", "1.00", "0.79", "0.79", "2.75", "2.75", "1.79"]
    assert rows_of(out, "BatchNorm2d ") == [["BatchNorm2d", *norm]]
    for name, numbers in (("AvgPool2d", "2.00 2.00 0.00"), ("AdaptiveAvgPool2d", "2.00 2.00 0.00"),
                          ("Flatten", "1.00 1.00 3.00 3.00 1.00 1.00 3.00 3.00 0.00")):  # fmt: skip
        assert rows_of(out, f"{name} ") == [[name, *numbers.split()]]
    ((_, *numbers, difference),) = rows_of(out, "Dropout ")
    assert numbers[4:] == ["1.00", "1.00", "3.00", "3.00"]
    assert set(numbers[:2]) <= {"0.00", "2.00"} and set(numbers[2:4]) <= {"0.00", "6.00"}
    assert modes["Dropout"] == float(difference) in (1, 3)
    ((_, *numbers, difference),) = rows_of(out, "Embedding ")
    assert numbers[:4] == numbers[4:] and difference == "0.00"
    torch.manual_seed(0)
    row = nn.Embedding(3, 2)(torch.tensor([2, 0])).flatten().tolist()
    assert [float(number) for number in numbers[:4]] == pytest.approx(row, abs=6e-3)
    assert modes["BatchNorm2d"] == pytest.approx(1 + 0.8 / 1.01653, abs=1e-3)
    assert [name for name, difference in modes.items() if difference == 0] == [
        "AvgPool2d", "AdaptiveAvgPool2d", "Flatten", "Embedding"
    ]  # fmt: skip
    assert "-> train() and eval() matter to BatchNorm2d and Dropout: before you predict,\n" in out


def test_where_they_stand(lesson, capsys):
    assert lesson.show_network() == [(2, 10), (2, 10)]
    out = capsys.readouterr().out
    table = [line.strip() for line in out.splitlines()[2:10]]
    assert [" ".join(row.split()) for row in table] == [
        "Conv2d (2, 8, 32, 32) 216", "BatchNorm2d (2, 8, 32, 32) 16", "ReLU (2, 8, 32, 32) 0",
        "AvgPool2d (2, 8, 16, 16) 0", "AdaptiveAvgPool2d (2, 8, 1, 1) 0", "Flatten (2, 8) 0",
        "Dropout (2, 8) 0", "Linear (2, 10) 90",
    ]  # fmt: skip
    assert "   Embedding(6, 4), the first layer for text: tokens (2, 3) -> (2, 3, 4)\n" in out
    assert "-> images of 32 x 32 pixels give (2, 10), of 20 x 50 (2, 10), as Adaptive" in out


# --- BatchNorm2d -------------------------------------------------------------------------------


def test_batch_norm_is_the_librarys_and_its_gradient_too(lesson):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(5, 4, 3, 6)).double().requires_grad_()
    mean, var, weight, bias = torch.rand(4, 4).double() + 0.5
    ours = lesson.batch_norm(x, mean, var, weight, bias, eps=0.1)
    torch.testing.assert_close(ours, F.batch_norm(x, mean, var, weight, bias, eps=0.1))

    axes = (0, 2, 3)
    ours = lesson.batch_norm(x, x.mean(axes), x.var(axes, correction=0), weight, bias)
    theirs = F.batch_norm(x, mean, var, weight, bias, training=True)
    torch.testing.assert_close(ours, theirs)
    (g,), (h,) = (torch.autograd.grad(y.pow(3).sum(), x) for y in (ours, theirs))
    torch.testing.assert_close(g, h)


def test_running_statistics_of_batches_that_differ(lesson):
    torch.manual_seed(0)
    norm, momentum = nn.BatchNorm2d(2, momentum=0.3), 0.3
    running_mean, running_var = torch.zeros(2), torch.ones(2)
    for _ in range(4):
        x = torch.randn(3, 2, 2, 2) * 5
        norm(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
        running_mean = lesson.running_statistic(running_mean, mean, momentum, 1)
        running_var = lesson.running_statistic(running_var, var, momentum, 1)
    torch.testing.assert_close(norm.running_mean, running_mean)
    torch.testing.assert_close(norm.running_var, running_var)


@pytest.mark.parametrize(("momentum", "t"), [(0.1, 7), (0.25, 3)])
def test_the_law_without_a_loop_holds_for_mean_and_variance(lesson, x, momentum, t):
    norm = nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(t):
        norm(x)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))  # var divided by n - 1
    torch.testing.assert_close(norm.running_mean, lesson.running_statistic(0, mean, momentum, t))
    torch.testing.assert_close(norm.running_var, lesson.running_statistic(1, var, momentum, t))


def test_one_number_a_channel_has_no_variance():
    norm, x = nn.BatchNorm2d(3), torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(x)
    assert norm.eval()(x).shape == x.shape


def test_the_table_of_batch_norm_and_the_company(lesson, x, capsys, monkeypatch):
    company = lesson.show_batch_norm(x)
    half = F.batch_norm(x[:8], None, None, training=True)
    apart = (half - F.batch_norm(x, None, None, training=True)[:8]).abs().max().item()
    assert company == pytest.approx({"train": apart, "eval": 0}, abs=1e-5)
    out = capsys.readouterr().out
    before = [f"{v:.2f}" for v in (*x.mean((0, 2, 3)).tolist(), *x.std((0, 2, 3)).tolist())]
    assert rows_of(out, "before") == [["before", *before]]
    for name in ("after", "by hand"):
        assert rows_of(out, name) == [[*name.split(), *["0.00"] * 3, *["1.00"] * 3]]
    assert f"an image's outputs change by up to {apart:.2f} in train mode, 0 in eval mode\n" in out
    batch_norm = lesson.batch_norm
    for wrong in (1, 2):  # the batch's own statistics, and the running ones
        calls = []

        def off(*given, wrong=wrong, calls=calls):
            calls.append(1)
            y = batch_norm(*given)
            y.view(-1)[7] += 1e-3 * (len(calls) == wrong)
            return y

        monkeypatch.setattr(lesson, "batch_norm", off)
        with pytest.raises(AssertionError):
            lesson.show_batch_norm(x)


def test_eval_mode_is_behind_as_logged_and_printed(lesson, x, events, tmp_path, capsys):
    behind = lesson.show_running(x, 12, tmp_path)
    out, mean = capsys.readouterr().out, x.mean((0, 2, 3))
    for momentum, rows in behind.items():
        norm, means, expected = nn.BatchNorm2d(3, momentum=momentum), [], []
        for _ in range(12):
            trained = norm.train()(x)
            expected.append((norm.eval()(x) - trained)[:, 0].abs().max().item())
            means.append(norm.running_mean[0].item())
        assert rows == pytest.approx(expected)
        run, steps = tmp_path / f"momentum_{momentum}", [*range(1, 13)]
        for tag, values in (("running_mean", means), ("eval_minus_train", expected)):
            logged_steps, logged = curve(events, run, f"batchnorm/{tag}")
            assert logged_steps == steps and logged == pytest.approx(values)
        for t in (1, 3, 12):
            law = mean[0] * (1 - (1 - momentum) ** t)
            row = [f"{n:.3f}" for n in (means[t - 1], law, expected[t - 1])]
            assert [str(momentum), str(t), *row] in rows_of(out, f"{momentum} ")
    still = f"{behind[0.1][2]:.2f}."
    assert f"after 3 batches (momentum 0.1) outputs in eval mode are off by {still}\n" in out
    assert "times the same batch? Channel 0\n" in out


def test_a_wrong_law_of_the_running_mean_stops_the_lesson(lesson, x, tmp_path, monkeypatch):
    right = lesson.running_statistic
    for channel in range(3):  # one that is wrong is enough
        off = 1e-3 * torch.eye(3)[channel]
        monkeypatch.setattr(
            lesson, "running_statistic", lambda *given, off=off: right(*given) + off
        )
        with pytest.raises(AssertionError):
            lesson.show_running(x, 4, tmp_path / str(channel))


# --- Dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_dropout_keeps_the_mean_and_scales_what_stays(lesson, p):
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 40_000, dtype=torch.float64)
    for y in (lesson.dropout(x, p), F.dropout(x, p)):
        kept = y != 0
        torch.testing.assert_close(y[kept], x[kept] / (1 - p))
        spread = (p * (1 - p) / len(x)) ** 0.5
        assert kept.double().mean().item() == pytest.approx(1 - p, abs=4.5 * spread + 1e-9)


def test_eval_mode_and_p_0_leave_everything(lesson):
    x = torch.randn(50)
    assert torch.equal(nn.Dropout(0.9).eval()(x), x) and torch.equal(nn.Dropout(0.0)(x), x)
    assert torch.equal(lesson.dropout(x, 0.0), x)


def test_the_masks_are_logged_as_they_were_drawn(lesson, events, tmp_path, capsys):
    torch.manual_seed(4)
    dropped = lesson.show_dropout(3000, tmp_path)
    torch.manual_seed(4)
    out, means = capsys.readouterr().out, []
    for p in (0.2, 0.5, 0.8):
        layer, hand = nn.Dropout(p)(torch.ones(3000)), lesson.dropout(torch.ones(3000), p)
        steps = [*range(20, 2001, 20)]
        for tag, values in (("mean", layer), ("share_kept", (layer != 0).float())):
            expected = [values[:n].mean().item() for n in steps]
            logged = curve(events, tmp_path / f"p_{p}", f"dropout/{tag}")
            assert logged == (steps, pytest.approx(expected, rel=1e-5))
        for name, y in (("layer", layer), ("by hand", hand)):
            assert dropped[p, name] == pytest.approx((y.mean().item(), y.var().item()))
            means.append(abs(y.mean().item() - 1))
            values = f"0 and {1 / (1 - p):g}".split()
            row = f"{y.mean():.3f}", f"{y.var():.3f}", f"{p / (1 - p):.3f}"
            assert rows_of(out, f"{p}   {name}") == [[str(p), *name.split(), *values, *row]]
    zeros = f"{(hand == 0).float().mean():.0%}"
    chance = (4 / 3000) ** 0.5
    within = f"{max(means):.3f} (at p = 0.8 its deviation is {chance:.3f}),\n"
    assert f"-> each mean is 1 within {within}      though {zeros} of the ones" in out


def test_try_two_dropouts_keep_the_mean_and_triple_the_variance(lesson, edited, tmp_path, capsys):
    reader = edited(
        lesson, "layer = nn.Dropout(p)", "layer = nn.Sequential(nn.Dropout(p), nn.Dropout(p))"
    )
    dropped = reader.main(log_dir=tmp_path, batches=4)["dropped"]
    out = capsys.readouterr().out
    for p in (0.2, 0.5, 0.8):
        share = (1 - p) ** 2
        mean, var = dropped[p, "layer"]
        spread = ((1 / share - 1) / 100_000) ** 0.5
        assert mean == pytest.approx(1, abs=4.5 * spread)
        assert var == pytest.approx(1 / share - 1, rel=0.06)
        ((*_, zero, word, value, _, _, _),) = rows_of(out, f"{p}   layer")
        assert (zero, word) == ("0", "and") and float(value) == pytest.approx(1 / share, rel=1e-4)
    assert "look: " in out


# --- pooling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k, stride", [(1, 1), (2, 2), (3, 1), (4, 3)])
def test_average_pool_is_the_librarys_and_a_convolution(lesson, k, stride):
    x = torch.randn(2, 3, 11, 6)
    ours = lesson.average_pool(x, k, stride)
    torch.testing.assert_close(ours, nn.AvgPool2d(k, stride)(x))
    weight = torch.full((3, 1, k, k), 1 / k**2)
    torch.testing.assert_close(ours, F.conv2d(x, weight, stride=stride, groups=3))
    assert ours.shape[2] == (11 - k) // stride + 1


@pytest.mark.parametrize("n", [1, 2, 4, 7, 9])
def test_adaptive_average_pool_is_the_librarys(lesson, n):
    x = torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(lesson.adaptive_average_pool(x, n), nn.AdaptiveAvgPool2d(n)(x))


def test_windows_cover_the_axis_and_overlap_only_where_it_does_not_divide(lesson):
    assert lesson.windows(6, 3) == [(0, 2), (2, 4), (4, 6)]
    assert lesson.windows(5, 3) == [(0, 2), (1, 4), (3, 5)]
    assert lesson.windows(2, 3) == [(0, 1), (0, 2), (1, 2)]


def test_flatten_keeps_the_order_and_the_images_apart():
    x = torch.randn(4, 3, 2, 5)
    rows = nn.Flatten()(x)
    assert rows.shape == (4, 30) and torch.equal(rows.view_as(x), x)


@pytest.mark.parametrize("name", ["average_pool", "adaptive_average_pool"])
def test_pooling_by_hand_is_compared(lesson, monkeypatch, capsys, name):
    means = lesson.show_pooling()
    assert means == {"AvgPool2d(2)": ([0.5, 2.5], [0.5, 2.5]),
                     "AdaptiveAvgPool2d(3)": ([0.5, 2, 3.5], [0.5, 2, 3.5])}  # fmt: skip
    out = capsys.readouterr().out
    row = ["0-1", "1-3", "3-4", *["0.50", "2.00", "3.50"] * 2]
    assert rows_of(out, "AdaptiveAvgPool2d(3)") == [["AdaptiveAvgPool2d(3)", *row]]
    row = ["AvgPool2d(2)", "0-1", "2-3", *["0.50", "2.50"] * 2]
    assert rows_of(out, "AvgPool2d(2) ") == [row]
    assert "-> AvgPool2d(2) leaves out the 4, as 2 does not divide 5; adaptive windows leave" in out
    assert "\n      nothing, they overlap. By hand the same within 0\n" in out
    right = getattr(lesson, name)
    monkeypatch.setattr(lesson, name, lambda x, *given: right(x, *given) + 1e-3)
    with pytest.raises(AssertionError):
        lesson.show_pooling()
    assert "By hand the same within 0.001\n" in capsys.readouterr().out


# --- Embedding ---------------------------------------------------------------------------------


def test_embedding_is_a_one_hot_product_and_its_gradient_a_sum_by_token(lesson):
    torch.manual_seed(0)
    layer, tokens = nn.Embedding(7, 3), torch.tensor([[2, 5, 2], [0, 2, 5]])
    y, g = layer(tokens), torch.randn(2, 3, 3)
    torch.testing.assert_close(y, lesson.embed(tokens, layer.weight))
    y.backward(g)
    expected = torch.zeros(7, 3)
    for token, row in zip(tokens.flatten().tolist(), g.flatten(0, 1), strict=True):
        expected[token] += row
    torch.testing.assert_close(layer.weight.grad, expected)
    assert not layer.weight.grad[[1, 3, 4, 6]].any()


def test_padding_idx_stops_the_gradient_and_does_not_hold_the_row_at_zero():
    layer = nn.Embedding(4, 2, padding_idx=1)
    assert not layer.weight[1].any()
    nn.init.ones_(layer.weight)
    layer(torch.tensor([1, 1, 2])).sum().backward()
    assert layer(torch.tensor(1)).tolist() == [1, 1]
    assert layer.weight.grad.tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("token", [4, -1])
def test_a_token_outside_the_table_is_refused(lesson, token):
    layer = nn.Embedding(4, 2)
    with pytest.raises(IndexError):
        layer(torch.tensor([token]))
    with pytest.raises(RuntimeError):
        lesson.embed(torch.tensor([token]), layer.weight)


def test_the_table_of_the_embedding(lesson, monkeypatch, capsys):
    tokens = torch.tensor([[0, 5, 2], [2, 2, 5]]).flatten()
    assert [*lesson.show_embedding(tokens).values()] == [
        [1, 0, 3, 0, 0, 2], [1, 0, 3, 0, 0, 2], [1, 0, 3, 0, 0, 0]
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert rows_of(out, "row ") == [["row", "0", "1", "2", "3", "4", "5"]]
    assert rows_of(out, "how often the token")[0][-6:] == ["1", "0", "3", "0", "0", "2"]
    assert rows_of(out, "its gradient, padding_idx=5")[0][-6:] == ["1", "0", "3", "0", "0", "0"]
    assert "-> padding_idx=5 is for a token that fills up short texts: gradient 0 for [5]\n" in out
    assert "\n      The output is one_hot(tokens) @ weight within 0\n" in out
    embed = lesson.embed
    monkeypatch.setattr(lesson, "embed", lambda *given: embed(*given) + 1e-3 * torch.eye(6, 4))
    with pytest.raises(AssertionError):
        lesson.show_embedding(tokens)


# --- the whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_the_two_layers_that_know_a_mode(lesson, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, batches=40, masks=20_000)
    out = capsys.readouterr().out
    for head in (
        "1. What do six layers make of the pixels 1 1 / 3 3",
        "  after .train()            after .eval()      largest difference\n",
        "2. Where do they stand in a network? Shapes for images (2, 3, 32, 32)\n",
        "   layer               output           parameters\n",
        "3. What does BatchNorm2d do to the three channels of 16 images?\n",
        "             mean of each channel   deviation of each channel\n",
        "4. How far is eval mode behind after t times the same batch? Channel 0\n",
        "   momentum    t   running mean   (1 - (1 - m)^t) mean   largest |eval - train|\n",
        "5. What does Dropout(p) make of a 1, drawn 20,000 times?\n",
        "   p               values          mean   variance   its formula p / (1 - p)\n",
        "6. Which windows do two pooling layers take of a row 0 1 2 3 4?\n",
        "   layer                  windows       means                by hand\n",
        "7. Which rows of an Embedding(6, 4) learn from the tokens [1, 5, 1, 3, 5, 1]?\n",
        "look: tensorboard --logdir ",
    ):
        assert head in out
    assert "matter to BatchNorm2d and Dropout: before you predict,\n" in out
    assert {name for name, off in measured["modes"].items() if off} == {"BatchNorm2d", "Dropout"}
    assert measured["company"]["eval"] < 1e-5 < 0.02 < measured["company"]["train"]
    slow, fast = measured["behind"][0.1], measured["behind"][0.5]
    assert slow[0] > 3 and 1 < slow[9] < 3 and slow[-1] < 0.5 and fast[-1] < 0.02
    for (p, _), (mean, var) in measured["dropped"].items():
        variance = p / (1 - p)
        assert mean == pytest.approx(1, abs=4.5 * (variance / 20_000) ** 0.5)
        assert var == pytest.approx(variance, rel=0.1)
    assert [*measured["rows"].values()] == [[0, 3, 0, 1, 0, 2]] * 2 + [[0, 3, 0, 1, 0, 0]]
    assert measured["sizes"] == [(2, 10), (2, 10)]
    ((_, *numbers),) = rows_of(out, "before")
    assert [float(number) for number in numbers] == pytest.approx([5, -2, 0, 3, 0.5, 1], abs=0.45)
    runs = ["momentum_0.1", "momentum_0.5", "p_0.2", "p_0.5", "p_0.8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == runs
