import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "silu": F.silu}


@pytest.fixture
def lesson(load):
    return load("nn_relu.py")


@pytest.fixture
def pixels(lesson, images_root):
    """800 images shrunk to (800, 192) in [0, 1], and their labels."""
    images, labels = lesson.as_tensors(lesson.open_images(images_root))
    return F.avg_pool2d(images.double() / 255, 4).flatten(1), labels


def rows_of(out, start):
    """The words of each printed line that begins with `start`."""
    return [line.split() for line in out.splitlines() if line.strip().startswith(start)]


def curve(events, run, tag):
    logged = events(run).Scalars(tag)
    assert [event.step for event in logged] == list(range(len(logged)))
    return [event.value for event in logged]


# --- in everyday code --------------------------------------------------------------------------


def test_the_everyday_network_bends_and_without_relu_it_does_not(lesson, capsys):
    assert lesson.show_everyday() == ([4, 2, 0, 1, 2], [2, 1, 0, -1, -2])
    out = capsys.readouterr().out
    assert "\n   -2      -2     4      0   4        4                  2\n" in out
    assert rows_of(out, "1 ") == [["1", "1", "-2", "1", "0", "1", "-1"]]
    assert "from row to row net(x) changes by [-2, -2, 1, 1], so it bends;\n" in out
    assert "      without the ReLU it changes by [-1, -1, -1, -1]: a straight line\n" in out


def test_two_linear_layers_are_one_and_with_an_activation_they_are_not():
    torch.manual_seed(0)
    first, last, x = nn.Linear(4, 7).double(), nn.Linear(7, 3).double(), torch.randn(9, 4).double()
    weight, bias = last.weight @ first.weight, last.weight @ first.bias + last.bias
    torch.testing.assert_close(last(first(x)), x @ weight.T + bias)
    for activation in ACTIVATIONS.values():
        middle = activation(first((x[:3] + x[3:6]) / 2))
        ends = (activation(first(x[:3])) + activation(first(x[3:6]))) / 2
        assert (last(middle) - last(ends)).abs().max() > 1e-3  # of a linear map they are equal


# --- four activations --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_by_hand_are_torchs(lesson, dtype):
    x = torch.tensor([-1000, -88.5, -3.3, -1e-3, -0.0, 0.0, 0.7, 20, 1000], dtype=dtype)
    for name, theirs in ACTIVATIONS.items():
        torch.testing.assert_close(getattr(lesson, name)(x), theirs(x))
    for slope, theirs in ((lesson.sigmoid_slope, torch.sigmoid), (lesson.relu_slope, F.relu)):
        torch.testing.assert_close(slope(x), lesson.library_slope(theirs, x))
    assert lesson.relu_slope(x).tolist() == [0] * 6 + [1] * 3
    assert torch.equal(lesson.relu(x.abs()), x.abs())  # it changes no pixel in [0, 1]


def test_the_library_slope_is_a_derivative_and_leaves_x_alone(lesson):
    x = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(lesson.library_slope(torch.square, x), 2 * x)
    torch.testing.assert_close(lesson.library_slope(torch.sin, x), x.cos())
    assert not x.requires_grad and x.grad is None


def test_the_slope_is_a_quarter_at_zero_and_less_elsewhere(lesson):
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    slope = lesson.sigmoid_slope(x)
    zero = x.abs() < 1e-9
    assert zero.sum() == 1 and (slope[zero] == 0.25).all() and (slope[~zero] < 0.25).all()


def test_gelu_and_silu_have_slopes_near_0_a_half_and_1_and_are_flat_at_one_point_below_0():
    x = torch.linspace(-5, 0, 1000, dtype=torch.float64, requires_grad=True)
    for activation in (F.gelu, F.silu):
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
        assert slope.ne(0).all() and (slope[1:].sign() != slope[:-1].sign()).sum() == 1
        assert slope[x < -1.5].abs().max() < 0.13 and slope[0].abs() < 0.03
        ends = torch.tensor([0.0, 5.0], requires_grad=True)
        (slope,) = torch.autograd.grad(activation(ends).sum(), ends)
        assert slope.tolist() == pytest.approx([0.5, 1], abs=0.03) and slope[0] == 0.5


def test_the_curves_and_the_table_are_torchs(lesson, events, tmp_path, capsys):
    largest = lesson.show_activations(tmp_path)
    expected = {"relu": 1, "sigmoid": 0.25, "gelu": 1.129, "silu": 1.0998}
    assert largest == pytest.approx(expected, abs=1e-4)
    out = capsys.readouterr().out
    x, shown = torch.linspace(-5, 5, 101), torch.tensor([-3.0, 0, 1, 3]).requires_grad_()
    for name, activation in ACTIVATIONS.items():
        value, slope = curve(events, tmp_path / name, "curve/value"), []
        assert value == pytest.approx(activation(x).tolist(), abs=1e-5)
        slope = lesson.library_slope(activation, x.double()).tolist()
        slope[50] = {"relu": 0, "sigmoid": 0.25}.get(name, 0.5)
        assert curve(events, tmp_path / name, "curve/slope") == pytest.approx(slope, abs=1e-5)
        (slopes,) = torch.autograd.grad(activation(shown).sum(), shown)
        cells = *activation(shown).tolist(), *slopes.tolist(), expected[name]
        ((_, *printed),) = rows_of(out, f"{name} ")
        assert [float(cell) for cell in printed] == pytest.approx(cells, abs=6e-4)
    assert "-> a sigmoid's slope is at most 0.25, that of ReLU at most 1. By hand, the four" in out
    (off,) = re.findall("and\n      the slopes of relu and sigmoid are the same within (.+)\n", out)
    assert float(off) < 1e-14


@pytest.mark.parametrize("name", ["relu", "sigmoid", "gelu", "silu", "relu_slope", "sigmoid_slope"])
def test_each_one_by_hand_is_compared(lesson, tmp_path, monkeypatch, name):
    right = getattr(lesson, name)
    monkeypatch.setattr(lesson, name, lambda x: right(x) + 1e-6 * (x > 4.985))
    with pytest.raises(AssertionError):
        lesson.show_activations(tmp_path)


# --- through many layers -----------------------------------------------------------------------


def test_the_gradient_through_a_chain_is_the_product_of_its_slopes(lesson):
    x = torch.tensor([[0.7]], dtype=torch.float64)
    norms = lesson.gradient_norms(torch.sigmoid, [torch.ones(1, 1, dtype=torch.float64)] * 3, x)
    h, slopes = x, []
    for _ in range(3):
        slopes.append(lesson.sigmoid_slope(h))
        h = lesson.sigmoid(h)
    expected = [1, slopes[2], slopes[2] * slopes[1], slopes[2] * slopes[1] * slopes[0]]
    torch.testing.assert_close(norms.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_the_norm_is_taken_for_each_image_and_its_matrix_is_transposed(lesson):
    torch.manual_seed(0)
    W, x = torch.randn(6, 5).double(), torch.randn(3, 5).double()
    torch.manual_seed(1)
    norms = lesson.gradient_norms(torch.tanh, [W], x)
    torch.manual_seed(1)
    upstream = torch.randn(3, 6, dtype=torch.float64)
    back = (upstream * (1 - torch.tanh(x @ W.T) ** 2)) @ W
    torch.testing.assert_close(norms[1], back.norm(dim=1) / upstream.norm(dim=1))


def test_orthogonal_weights_stretch_no_vector(lesson):
    torch.manual_seed(0)
    matrices = lesson.orthogonal(17, 3)
    for W in matrices:
        torch.testing.assert_close(W @ W.T, torch.eye(17, dtype=torch.float64))
    assert len(matrices) == 3 and not torch.equal(matrices[0], matrices[1])


@pytest.mark.parametrize("seed", range(3))
def test_try_weights_4_w_lift_the_bound_but_not_the_gradient(
    lesson, edited, pixels, tmp_path, capsys, seed
):
    reader = edited(lesson, '("sigmoid", torch.sigmoid, 1)', '("sigmoid", torch.sigmoid, 4)')
    torch.manual_seed(seed)
    norms = reader.show_depth(tmp_path, pixels[0] - 0.5, 10)
    assert norms["bound"].tolist() == [1] * 11
    assert 0.62 < norms["sigmoid"][-1] ** 0.1 < 0.68
    out = capsys.readouterr().out
    assert "-> 64 of 64 images keep within (g/4)^n. Of the length, one layer\n" in out
    assert "\n      leaves 0.6" in out
    if not seed:
        reader.main(log_dir=tmp_path, root=lesson.DATASET2, count=200, depth=3, epochs=1)
        assert "look: " in capsys.readouterr().out


def test_a_bound_that_does_not_hold_stops_the_lesson(lesson, pixels, tmp_path, monkeypatch, capsys):
    norms = lesson.gradient_norms
    monkeypatch.setattr(lesson, "gradient_norms", lambda *given: norms(*given) * 1.3)
    with pytest.raises(AssertionError):
        lesson.show_depth(tmp_path, pixels[0] - 0.5, 3)
    assert "-> 0 of 64 images keep within (g/4)^n" in capsys.readouterr().out


# --- dead units --------------------------------------------------------------------------------


def test_a_dead_unit_gets_no_gradient_and_a_leaky_one_does(lesson):
    torch.manual_seed(0)
    layer, head, x = nn.Linear(5, 2), nn.Linear(2, 10), torch.rand(20, 5)
    with torch.no_grad():
        layer.bias[0] = -10
    off, *_ = lesson.survey(layer, head, [(x, torch.zeros(20, dtype=torch.int64))])
    assert off.tolist() == [True, False]
    for activation, moves in ((F.relu, [False, True]), (F.leaky_relu, [True, True])):
        layer.zero_grad()
        head(activation(layer(x))).square().sum().backward()
        assert layer.weight.grad.any(1).tolist() == moves


def test_a_unit_that_is_on_for_one_image_of_all_is_not_dead(lesson):
    layer, head = nn.Linear(1, 3), nn.Linear(3, 10)
    with torch.no_grad():
        layer.weight[:, 0], layer.bias[:] = torch.tensor([1.0, -1, 1]), torch.tensor([0.0, 0, -99])
        head.weight.zero_()
        head.weight[4, 1], head.bias[:] = 1, torch.arange(10) * 0.01
    x = -torch.ones(200, 1)
    x[150] = 1
    labels = torch.full((200,), 4)
    labels[:20] = 3
    batches = [*zip(x.split(40), labels.split(40), strict=True)]
    off, weights, accuracy = lesson.survey(layer, head, batches)
    assert off.tolist() == [False, False, True]  # the first is on for x[150] alone
    assert accuracy == 179 / 200  # x[150] is taken for class 9
    assert torch.equal(weights, layer.weight) and not weights.requires_grad
    layer.weight.data.zero_()
    assert weights.any()


def test_units_die_by_a_step_against_the_mean_image(lesson, pixels):
    torch.manual_seed(0)
    x, y = pixels[0].float(), pixels[1]
    before, after = lesson.train_and_survey(x, y, 128, epochs=1, lr=3.0)
    died = after[0] & ~before[0]
    step = (after[1] - before[1])[died]
    mean = F.normalize(x.mean(0), dim=0)
    assert died.sum() > 30 and (step @ mean < 0).float().mean() > 0.9
    assert ((step @ mean) ** 2 / step.square().sum(1)).mean() > 0.7  # 1 of 192 directions


def test_small_steps_kill_no_unit(lesson, pixels):
    torch.manual_seed(0)
    surveys = lesson.train_and_survey(pixels[0].float(), pixels[1], 128, epochs=2, lr=0.05)
    assert surveys[0][0].sum() == surveys[-1][0].sum()


def test_training_is_plain_descent_batch_after_batch(lesson, pixels):
    x, y = pixels[0][:120].float() - 0.5, pixels[1][:120]
    torch.manual_seed(3)
    *_, (_, weights, accuracy) = lesson.train_and_survey(x, y, 16, 2, 0.3, batch_size=50)
    torch.manual_seed(3)
    layer, head = nn.Linear(192, 16), nn.Linear(16, 10)
    parameters = [*layer.parameters(), *head.parameters()]
    for i in (0, 50, 100) * 2:
        targets = torch.eye(10)[y[i : i + 50]]
        loss = (head(layer(x[i : i + 50]).clamp(min=0)) - targets).square().mean()
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.3 * g
    torch.testing.assert_close(weights, layer.weight.detach())
    torch.manual_seed(3)
    defaults = lesson.train_and_survey(x, y, 16, 1, 0.3)
    torch.manual_seed(3)
    hundreds = lesson.train_and_survey(x, y, 16, 1, 0.3, batch_size=100)
    assert torch.equal(defaults[1][1], hundreds[1][1]) and len(hundreds) == 2
    right = head(layer(x).relu()).argmax(1) == y
    assert accuracy == pytest.approx(right.double().mean().item())


# --- the whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_the_bound_and_counts_the_dead(
    lesson, images_root, pixels, events, tmp_path, capsys, seed
):
    measured = lesson.main(
        seed=seed, log_dir=tmp_path, root=images_root, count=800, depth=8, epochs=4
    )
    out, norms = capsys.readouterr().out, measured["norms"]
    assert measured["everyday"][0] == [4, 2, 0, 1, 2]
    for head in (
        "1. What does nn.ReLU() do? The layer before gives x and -2 x, the one behind adds them\n",
        "    x   layer before   nn.ReLU()   net(x)   without the ReLU\n",
        "2. Which values and slopes",
        "   values at x =                  slopes at x =                  largest\n",
        "  -3       0       1      3      -3       0       1      3   slope\n",
        "3. How much of a gradient's length is left, n layers further back? Mean over 64 images\n",
        "   Weights g W, where W changes no length; a sigmoid leaves at most (g/4)^n\n",
        "  sigmoid, g=1       at most     silu, g=1     gelu, g=1     relu, g=1  relu, g=1.41\n",
        "4. How many of 128 ReLU units are dead, that is, 0 for all 800 images?\n",
        "   pixels      learning   dead units after epoch            dead,      right in the end\n",
        "               rate            0     1     2     4   then not   (by guessing: 10%)\n",
        "look: tensorboard --logdir ",
    ):
        assert head in out
    last = {run: values[-1].item() for run, values in norms.items()}
    assert 0.4 * last["bound"] < last["sigmoid"] < last["bound"] == 4.0**-8
    assert 0.8 * 2**-8 < last["silu"] < 1.2 * 2**-8 and 0.8 * 2**-8 < last["gelu"] < 1.3 * 2**-8
    assert 0.7 * 2**-4 < last["relu"] < 1.4 * 2**-4
    assert 0.7 < last["relu_sqrt2"] < 1.4
    for run, values in norms.items():
        logged = curve(events, tmp_path / f"depth_{run}", "grad/log10_norm")
        assert logged == pytest.approx(values.log10().tolist(), abs=1e-5)
    _, third = out.split("\n3. ")
    third, fourth = third.split("\n4. ")
    order = ("sigmoid", "bound", "silu", "gelu", "relu", "relu_sqrt2")
    for n in (1, 2, 4, 8):
        assert rows_of(third, f"{n} ") == [[str(n), *(f"{norms[run][n]:.1e}" for run in order)]]
    kept = {run: f"{value ** (1 / 8):.2f} with {run}" for run, value in last.items()}
    shares = ", ".join(kept[run] for run in ("sigmoid", "silu", "gelu", "relu"))
    shares += f", {last['relu_sqrt2'] ** (1 / 8):.2f} with relu and sqrt(2) W"
    assert f"      leaves {shares}\n" in out
    assert "-> 64 of 64 images keep within (g/4)^n. Of the length, one layer\n" in out

    x, labels = pixels
    printed = [line.split() for line in fourth.splitlines()[3:6]]
    for run, shift, lr, name in (
        ("images_0_1", 0.0, 3, ["0..1", "3"]),
        ("images_centred", 0.5, 3, ["-0.5..0.5", "3"]),
        ("images_0_1_small_lr", 0.0, 0.1, ["0..1", "0.1"]),
    ):
        torch.manual_seed(seed)
        surveys = lesson.train_and_survey((x - shift).float(), labels, 128, 4, lr)
        dead = [int(off.sum()) for off, *_ in surveys]
        assert measured["dead"][run] == dead
        assert measured["accuracy"][run] == surveys[-1][2]
        for (off, before, _), (later, after, _) in pairwise(surveys):
            assert later[off].all() and torch.equal(after[off], before[off])
        logged = curve(events, tmp_path / run, "dead/share")
        assert logged == pytest.approx([number / 128 for number in dead])
        row = [*(str(dead[epoch]) for epoch in (0, 1, 2, 4)), "0", f"{surveys[-1][2]:.0%}"]
        assert printed.pop(0) == [*name, *row]
    dead, centred, small = measured["dead"].values()
    assert dead[0] < 20 < 50 < dead[-1] and dead == sorted(dead) and small == dead[:1] * 5
    assert not any(centred) and not any(measured["back"].values())
    assert measured["accuracy"]["images_0_1"] < 0.25 < measured["accuracy"]["images_centred"]
    killed = f"killed {dead[-1] - dead[0]} units on pixels 0..1, 0 on pixels around 0;\n"
    assert f"   -> large steps {killed}      small steps killed 0. Of all dead units 0 came" in out


def test_units_that_come_back_are_counted(lesson, tmp_path, monkeypatch, capsys):
    states = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    surveys = [(torch.tensor(off).bool(), torch.zeros(4, 1), 0.5) for off in states]
    monkeypatch.setattr(lesson, "train_and_survey", lambda *_: surveys)
    with pytest.raises(AssertionError):
        lesson.show_dead(0, tmp_path, torch.rand(5, 3), torch.zeros(5), 4, 2, 1.0)
    out = capsys.readouterr().out
    assert [row[-2] for row in rows_of(out, "0..1")] == ["3", "3"]
    assert "-> large steps killed 0 units on pixels 0..1, 0 on pixels around 0;\n" in out
    assert "      small steps killed 0. Of all dead units 9 came back\n" in out
