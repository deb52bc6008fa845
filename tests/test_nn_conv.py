import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from support.pictures import caption_row


@pytest.fixture
def lesson(load):
    return load("nn_conv.py")


# --- the layer by hand -------------------------------------------------------------------------


def test_one_window_is_a_sum_of_products(lesson):
    x = torch.arange(9.0).view(1, 1, 3, 3)
    weight, bias = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]]), torch.tensor([0.5])
    expected = torch.tensor([[[[4310.5, 5421.5], [7643.5, 8754.5]]]])
    for ours in (lesson.conv2d_loop, lesson.conv2d_unfold):
        assert torch.equal(ours(x, weight, bias), expected)


@pytest.mark.parametrize(
    "channels, out, kernel, options",
    [
        (3, 5, (3, 3), {}),
        (2, 3, (1, 4), {"stride": 3}),
        (3, 2, (5, 2), {"padding": 2}),
        (1, 4, (2, 3), {"dilation": 3, "padding": 1}),
        (6, 6, (3, 3), {"groups": 6}),  # depthwise
        (6, 9, (3, 2), {"groups": 3, "stride": 2, "padding": 1, "dilation": 2}),
    ],
)
def test_loop_and_unfold_are_the_layer(lesson, channels, out, kernel, options):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, out, kernel, **options).double()
    x = torch.randn(3, channels, 13, 10, dtype=torch.float64)
    for ours in (lesson.conv2d_loop, lesson.conv2d_unfold):
        torch.testing.assert_close(ours(x, layer.weight, layer.bias, **options), layer(x))


def test_unfolds_gradients_are_the_layers(lesson):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, 2, 1, groups=2).double(), torch.randn(2, 4, 9, 7).double()
    loss = lesson.conv2d_unfold(x, layer.weight, layer.bias, 2, 1, 1, 2).square().sum()
    ours = torch.autograd.grad(loss, [*layer.parameters()])
    theirs = torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels, groups", [(1, 1), (2, 1), (4, 2)])
def test_channels_that_do_not_fit_are_refused(lesson, channels, groups):
    x, weight, bias = torch.zeros(1, 4, 5, 5), torch.zeros(4, channels, 3, 3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"groups, x \(1, 4, 5, 5\)"):
        lesson.conv2d_loop(x, weight, bias, groups=groups)
    with pytest.raises(RuntimeError):
        lesson.conv2d_unfold(x, weight, bias, groups=groups)


def test_filters_that_do_not_split_into_the_groups_are_refused(lesson):
    with pytest.raises(ValueError, match=r"weight \(3, 2, 1, 1\) in 2 groups, x \(1, 4, 5, 5\)"):
        lesson.conv2d_loop(torch.zeros(1, 4, 5, 5), torch.zeros(3, 2, 1, 1), torch.zeros(3), 1, 0,
                           1, 2)  # fmt: skip


# --- sizes -------------------------------------------------------------------------------------


def test_sizes_that_everyone_should_know(lesson):
    assert lesson.output_size(32, 5, padding=2) == 32
    assert lesson.output_size(32, 3, stride=2, padding=1) == 16
    assert lesson.output_size(224, 7, stride=2, padding=3) == 112
    assert lesson.output_size(7, 3, dilation=3) == 1
    assert lesson.output_size(6, 3, dilation=3) < 1


def test_a_size_that_is_refused_is_none(lesson):
    assert lesson.measured_size(6, 3, 1, 0, 3) is None
    assert lesson.measured_size(5, 3, 2, 1, 1) == 3


def test_a_row_counts_its_windows(lesson):
    assert lesson.drawn_windows(5, 2, 2, 0, 1) == "01 23"
    assert lesson.drawn_windows(4, 3, 2, 1, 1) == ".01 123"
    assert lesson.drawn_windows(5, 2, 1, 1, 3) == ".2 03 14 2."
    for options in ((9, 4, 3, 2, 1), (6, 1, 1, 0, 1), (8, 2, 1, 2, 4), (10, 3, 2, 1, 2)):
        windows = lesson.drawn_windows(*options).split()
        assert len(windows) == lesson.output_size(*options)
        assert {len(window) for window in windows} == {options[1]}


def test_a_formula_that_is_wrong_is_not_said_to_hold(lesson, monkeypatch):
    monkeypatch.setattr(lesson, "output_size", lambda *options: 3)
    with pytest.raises(AssertionError):
        lesson.show_sizes()


# --- what moves --------------------------------------------------------------------------------


def test_stride_2_follows_a_move_by_two_pixels_and_not_by_one():
    torch.manual_seed(0)
    x, weight = torch.zeros(1, 1, 16, 16), torch.randn(1, 1, 3, 3)
    x[..., 4:9, 4:9] = torch.randn(5, 5)
    for stride, move, expected in ((1, 1, 1), (2, 2, 1), (2, 4, 2)):
        moved = F.conv2d(x.roll(move, 3), weight, stride=stride)
        assert torch.equal(moved, F.conv2d(x, weight, stride=stride).roll(expected, 3))
    by_one = F.conv2d(x.roll(1, 3), weight, stride=2)
    still = F.conv2d(x, weight, stride=2)
    assert all((by_one - still.roll(n, 3)).abs().max() > 0.1 for n in range(-3, 4))


@pytest.mark.parametrize("seed", range(5))
def test_try_stride_2_follows_moves_by_2_and_4_pixels_only(lesson, edited, tmp_path, capsys, seed):
    lesson = edited(lesson, "= show_moved(stride=1)", "= show_moved(stride=2)")
    off = lesson.main(seed=seed, log_dir=tmp_path)["moved"]
    assert max(off[2], off[4]) < 1e-6 < 0.1 < min(off[1], off[3])
    out = capsys.readouterr().out
    assert "4. If the image moves to the right, does the output? Stride 2\n" in out
    rows = [line.split() for line in out.partition("\n4. ")[2].splitlines()[2:6]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"] and rows[1][1:3] == ["1", "0.0000"]
    assert rows[3][1:3] == ["2", "0.0000"] and rows[0][2] == f"{off[1]:.4f}"
    assert "   -> the output moves with the image if the image moves by 2, 4 pixels\n" in out


# --- true convolution --------------------------------------------------------------------------


def test_a_convolution_of_outer_products_is_numpys(lesson):
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.standard_normal(n) for n in (7, 9, 3, 4))
    x, kernel = torch.from_numpy(np.outer(a, b)), torch.from_numpy(np.outer(c, d))
    truth = torch.from_numpy(np.outer(np.convolve(a, c), np.convolve(b, d)))
    for ours in (lesson.convolve, lesson.fourier_convolve):
        torch.testing.assert_close(ours(x, kernel), truth)
        torch.testing.assert_close(ours(kernel, x), truth)  # it does not matter which is which


def test_conv2d_answers_an_impulse_with_the_kernel_turned_half_round(lesson):
    x, kernel = torch.zeros(1, 1, 9, 9), lesson.LETTER[None, None]
    x[0, 0, 4, 4] = 1
    answer = F.conv2d(x, kernel, padding=2)[0, 0, 2:7, 2:7]
    assert torch.equal(answer, lesson.LETTER.rot90(2))
    assert not torch.equal(answer, lesson.LETTER)


def test_the_flip_of_a_symmetric_kernel_changes_nothing(lesson):
    torch.manual_seed(0)
    x, kernel = torch.randn(8, 8), torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 4, 1]))
    correlation = F.conv2d(x[None, None], kernel[None, None], padding=2)[0, 0]
    torch.testing.assert_close(lesson.convolve(x, kernel), correlation)


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_that_learns_a_convolution_learns_the_turned_kernel(lesson, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(1, 1, 5, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    for _ in range(50):
        x = torch.randn(32, 32)
        y = lesson.fourier_convolve(x, lesson.LETTER)[4:-4, 4:-4]  # where no padding enters
        loss = F.mse_loss(layer(x[None, None])[0, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = layer.weight.detach()[0, 0]
    assert (learned - lesson.LETTER.rot90(2)).abs().max() < 0.01
    assert (learned - lesson.LETTER).abs().max() > 0.9


# --- the lesson --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_what_it_measures(lesson, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][:-1] == ["1.", "2.", "3.", "4.", "5."]
    assert sum("   -> " in line for line in lines) == 5

    assert measured["everyday"].tolist() == [[-4, 1], [0, -1]]
    assert lines[1].split()[-6:] == ["y", "by", "loop", "y", "by", "F.conv2d"]
    assert " ".join(lines[2].split()) == "0 1 2 0 1 1 2 0 1 0 -1 1 0 0 -4 1 -4 1"
    assert " ".join(lines[3].split()) == "1 0 1 3 1 0 1 3 2 0 -2 0 0 -6 0 -1 0 -1"
    assert " ".join(lines[4].split()) == "2 2 0 1 0 2 0 1 1 0 -1 2 0 -1"
    assert " ".join(lines[5].split()) == "3 1 1 0 2"
    assert "add up to -4, which is y[0, 0] = -4; then the window moves on" in lines[6]

    assert measured["sweep"] == (1266, 354)
    rows = [line.split() for line in lines[9:16]]
    assert all(row[5] == row[6] == str(len(row) - 8) for row in rows)  # as many windows are drawn
    assert [row[5] for row in rows] == ["5", "7", "7", "3", "3", "4", "3"]
    assert [row[7] for row in rows] == ["-", "-", "-", "-", "7", "-", "-"]
    assert lines[13].split() == ["8", "3", "2", "0", "1", "3", "3", "7", "012", "234", "456"]
    assert "   -> padding keeps the size at stride 1: 1 for kernel 3, 2 for kernel 5;\n" in out
    assert "   no window has pixel 7 with stride 2. The formula holds for 1,266 shapes\n" in out
    assert "   of a sweep; F.conv2d refuses 354 more, where it is below 1\n" in out

    x, sizes = torch.empty(2, 4, 11, 9), {}
    for name in ("none", "stride 2", "padding 1", "dilation 2", "groups 2", "all four"):
        option, _, number = name.partition(" ")
        options = {option: int(number)} if number.isdigit() else {}
        if name == "all four":
            options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
        sizes[name] = tuple(nn.Conv2d(4, 6, (3, 2), **options)(x).shape)
    assert measured["shapes"] == sizes and len(measured["off"]) == 12
    assert max(measured["off"]) < 1e-12
    for name, shape in measured["shapes"].items():
        weight = (6, 2 if name in ("groups 2", "all four") else 4, 3, 2)
        assert f"   {name:<10}   {weight}   {shape}" in out
    assert "   options      weights        output              loop   matrix product\n" in out
    most = max(measured["off"])
    assert f"-> both do, to {most:.0e}; in two groups a filter sees 2 of the 4 channels\n" in out

    assert max(measured["moved"].values()) < 1e-6
    rows = [line.split() for line in out.partition("\n4. ")[2].splitlines()[2:6]]
    assert [row[:3] for row in rows] == [[n, n, "0.0000"] for n in "1234"]
    assert min(float(row[3]) for row in rows) > 0.5
    assert "-> the output moves with the image if the image moves by 1, 2, 3, 4 pixels\n" in out

    assert measured["points"] == {
        "x": [0, 0, 1, 0, 0], "w": [1, 2, 3], "F.conv2d": [3, 2, 1], "convolution": [1, 2, 3]
    }  # fmt: skip
    assert "   F.conv2d      [3, 2, 1]\n   convolution   [1, 2, 3]\n" in out
    turned, as_it_is = measured["fourier"]
    assert turned < 1e-12 < 5 < as_it_is
    assert "is the convolution (by Fourier transform) if w is first turned\n" in out
    said = f"by half, to {turned:.0e}; if w is not turned, they differ by up to {as_it_is:.0f}"
    assert f"      {said}\n" in out
    assert lines[-1].startswith(f"look: tensorboard --logdir {tmp_path}   http://localhost:6006/?")


def test_the_picture_shows_how_large_each_output_is(lesson, events, tmp_path):
    lesson.main(log_dir=tmp_path)
    (event,) = events(tmp_path).Images("conv/sizes")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)
    x = torch.zeros(1, 1, 13, 13)
    x[..., 4:9, 4:9] = lesson.LETTER
    pictures, words = [x], ["x: 13 x 13"]
    sizes = {(1, 0, 1): 11, (1, 1, 1): 13, (2, 0, 1): 6, (2, 1, 1): 7, (1, 0, 2): 9}
    for (stride, padding, dilation), size in sizes.items():
        pictures.append(
            F.conv2d(x, torch.full((1, 1, 3, 3), 1 / 9), None, stride, padding, dilation)
        )
        assert pictures[-1].shape[-1] == size
        text = f"stride {stride}\npadding {padding}\ndilation {dilation}"
        words.append(f"y: {size} x {size}\n{text}")
    squares = [p[0].kron(torch.ones(10, 10)) for p in pictures]
    title = "Means of 3 x 3 pixels (white: 1, black: 0), every pixel a square: how large is y?"
    expected = caption_row(title, squares, words)
    assert np.abs(shown.astype(int) - expected).max() <= 1  # rounding
