import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from support.data import as_tensors, open_images
from support.pictures import caption_row

NAMES = ["left_to_right", "top_to_bottom", "diagonal", "laplacian", "red_minus_green",
         "blue_minus_yellow"]  # fmt: skip


@pytest.fixture
def lesson(load):
    return load("nn_conv2d.py")


def multiplications(layer, x):
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        layer(x)
    return flops.get_total_flops() / 2


# --- the layer, by hand and counted ------------------------------------------------------------


def test_one_window_by_hand(lesson):
    x = torch.tensor([[[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]]])  # (1, 2, 2, 2)
    weight = torch.tensor([[[[1.0, 10], [100, 1000]], [[0, 0], [0, 0.5]]]])
    y = lesson.conv2d_by_shifts(x, weight, torch.tensor([0.25]))
    assert y.tolist() == [[[[4321 + 4 + 0.25]]]]


@pytest.mark.parametrize(
    "C_in, C_out, k, H, W", [(3, 6, 3, 7, 12), (1, 4, 5, 9, 5), (4, 1, 1, 3, 8)]
)
def test_the_formulas_are_nn_conv2d(lesson, C_in, C_out, k, H, W):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(C_in, C_out, k).double(), torch.randn(2, C_in, H, W).double()
    with torch.no_grad():
        y = lesson.conv2d_by_shifts(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, layer(x))
    parameters = sum(p.numel() for p in layer.parameters())
    assert parameters == lesson.parameter_formula(C_in, C_out, k)
    work = lesson.work_formula(C_in, C_out, k, H - k + 1, W - k + 1)
    assert work == multiplications(layer, x[:1])


@pytest.mark.parametrize("stride, padding", [(2, 0), (1, 2), (3, 1)])
def test_the_work_of_other_strides_and_paddings(lesson, stride, padding):
    layer, x = nn.Conv2d(2, 5, 3, stride, padding), torch.rand(1, 2, 11, 14)
    assert lesson.work_formula(2, 5, 3, *layer(x).shape[2:]) == multiplications(layer, x)


def test_an_image_with_other_channels_is_refused(lesson):
    with pytest.raises(ValueError, match=r"for 3 channels, x \(1, 4, 8, 8\) has 4"):
        lesson.conv2d_by_shifts(torch.rand(1, 4, 8, 8), torch.rand(2, 3, 3, 3), torch.zeros(2))


def test_an_output_channel_is_the_sum_over_the_input_channels(lesson):
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 8, 9), torch.randn(6, 3, 3, 3)
    alone = sum(F.conv2d(x[:, c : c + 1], w[4:5, c : c + 1]) for c in range(3))
    y = lesson.conv2d_by_shifts(x, w, torch.zeros(6))
    torch.testing.assert_close(y[:, 4:5], alone)


# --- filters set by hand -----------------------------------------------------------------------


def channels_by_slicing(x):
    """What the six filters make of images (B, 3, H, W), without a convolution."""
    grey, (red, green, blue) = x.mean(1), x[:, :, 1:-1, 1:-1].unbind(1)
    up, down = grey[:, :-2, 1:-1], grey[:, 2:, 1:-1]
    left, right = grey[:, 1:-1, :-2], grey[:, 1:-1, 2:]
    bump = 4 * grey[:, 1:-1, 1:-1] - up - down - left - right
    slant = grey[:, 2:, 2:] - grey[:, :-2, :-2]
    return [right - left, down - up, slant, bump, red - green, blue - (red + green) / 2]


def test_filters_by_hand_do_what_slicing_does(lesson):
    torch.manual_seed(0)
    x, filters = torch.randn(2, 3, 7, 11), lesson.filters_by_hand()
    assert [*filters] == NAMES
    channels = F.conv2d(x, torch.stack([*filters.values()])).unbind(1)
    for channel, expected in zip(channels, channels_by_slicing(x), strict=True):
        torch.testing.assert_close(channel, expected)


@pytest.mark.parametrize("more", [0.2, -3.0])
def test_more_light_changes_a_channel_by_the_sum_of_its_weights(lesson, more):
    torch.manual_seed(0)
    x, fresh = torch.rand(2, 3, 9, 9), nn.Conv2d(3, 6, 3).weight.detach()
    by_hand = torch.stack([*lesson.filters_by_hand().values()])
    for weight in (fresh, by_hand):
        change = F.conv2d(x + more, weight) - F.conv2d(x, weight)
        theory = more * weight.sum((1, 2, 3)).view(1, 6, 1, 1).expand_as(change)
        torch.testing.assert_close(change, theory, rtol=0, atol=1e-5)
    assert by_hand.sum((1, 2, 3)).abs().max() < 1e-6 < 0.01 < fresh.sum((1, 2, 3)).abs().max()


def test_what_lies_elsewhere_is_found_by_the_same_filter(lesson):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16)
    weight = torch.stack([*lesson.filters_by_hand().values()])
    y, moved = F.conv2d(x, weight), F.conv2d(x.roll((4, 3), (2, 3)), weight)
    torch.testing.assert_close(moved[..., 4:, 3:], y[..., :-4, :-3])


def test_which_filter_finds_what(lesson, capsys):
    images = lesson.simple_images()
    assert [*images] == ["right half", "lower half", "dot", "all red", "all white"]
    assert [image.sum().item() for image in images.values()] == [63, 63, 3, 49, 147]
    assert images["right half"][:, :, 4:].all() and images["lower half"][:, 4:].all()
    layer, found = lesson.show_by_hand()
    assert torch.equal(layer.weight, torch.stack([*lesson.filters_by_hand().values()]))
    assert layer.bias.count_nonzero() == 0
    edges = torch.tensor([[1.0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 4, 0, 0],
                          [0, 0, 0, 0, 1, 0.5], [0] * 6])  # fmt: skip
    torch.testing.assert_close(found, edges)
    *_, red_row, blue_row, then, last = capsys.readouterr().out.splitlines()
    assert red_row.split() == ["red_minus_green", "0.00", "0.00", "0.00", "1.00", "0.00"]
    assert blue_row.split() == ["blue_minus_yellow", "0.00", "0.00", "0.00", "0.50", "0.00"]
    words = "finds the edge of a right half (1), not of a lower half (0), and not red (0);"
    assert then == f"   -> left_to_right {words}"
    words = "finds red (1); no filter finds all white: the weights of each add up to 0"
    assert last == f"      red_minus_green {words}"


# --- pictures ----------------------------------------------------------------------------------


def test_zero_is_mid_grey_in_a_picture(lesson):
    assert lesson.as_picture(torch.tensor([-2.0, 0, 1])).tolist() == [0, 0.5, 0.75]
    assert lesson.as_picture(torch.zeros(2)).tolist() == [0.5, 0.5]


def test_colour_is_the_spread_of_the_three_channels(lesson):
    images = torch.zeros(2, 3, 2, 2)
    images[0, :, 0, 0] = torch.tensor([0.5, -0.25, 0.25])
    images[1, :, 1, 1] = torch.tensor([1.0, 1.0, 1.0])
    assert lesson.colourfulness(images) == pytest.approx(0.75 / 8)


def pixels(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)


def test_pictures_show_the_filters_each_channel_and_the_false_colours(
    lesson, events, images_root, tmp_path
):
    lesson.main(log_dir=tmp_path, root=images_root, count=5)
    logged = events(tmp_path)
    assert sorted(logged.Tags()["images"]) == [
        "conv2d/filters", "conv2d/outputs", "conv2d/reshaped"]  # fmt: skip
    filters, words = [*lesson.filters_by_hand().values()], [n.replace("_", " ") for n in NAMES]
    levels = [0.5 + w / (2 * w.abs().max()) for w in filters]
    title = "Six filters, their weights as colours: mid-grey is 0, light is more, dark is less"
    expected = caption_row(title, levels, words, height=120)
    assert np.abs(pixels(logged.Images("conv2d/filters")[0]) - expected.astype(int)).max() <= 1

    x = as_tensors(open_images(images_root, train=False))[0][:4] / 255
    y = F.conv2d(x, torch.stack(filters))
    title = "An image and its six output channels: mid-grey is 0, light is more, dark is less"
    shown = logged.Images("conv2d/outputs")
    assert [event.step for event in shown] == [0, 1, 2, 3]
    for event, image, channels in zip(shown, x, y, strict=True):
        grey = [0.5 + c[None] / (2 * c.abs().max()) for c in channels]
        expected = caption_row(title, [image, *grey], ["the image", *words], height=128)
        assert np.abs(pixels(event).astype(int) - expected).max() <= 1  # rounding

    grey = x[0].mean(0).expand(3, -1, -1)
    folded = F.conv2d(grey, torch.stack(filters)).reshape(2, 3, 30, 30)
    title = "A grey image; its channels 0 to 2, then 3 to 5, wrongly shown as red, green, blue"
    row = [grey, *(0.5 + c / (2 * c.abs().max()) for c in folded)]
    words = ["the image", "channels 0 1 2", "channels 3 4 5"]
    expected = caption_row(title, row, words, height=200).astype(int)
    assert np.abs(pixels(logged.Images("conv2d/reshaped")[0]) - expected).max() <= 1


# --- the lesson --------------------------------------------------------------------------------


def test_try_stride_2_keeps_the_parameters_and_quarters_the_work(
    edited, lesson, images_root, tmp_path, capsys
):
    old = "(nn.Conv2d(3, 6, 5), 32)]"
    lesson = edited(lesson, old, "(nn.Conv2d(3, 6, 5), 32), (nn.Conv2d(3, 6, 3, stride=2), 32)]")
    measured = lesson.main(log_dir=tmp_path, root=images_root, count=2)
    assert measured["counts"][-1] == (168, 36_450) == (168, 145_800 / 4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "stride 2 " in line]
    assert [row[-4:] for row in rows] == [["168", "168", "36,450", "36,450"]]


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_what_it_measures(lesson, images_root, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, count=2)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:-1] == ["1.", "2.", "3.", "4.", "5."]
    assert sum("   -> " in line for line in lines) == 5

    shapes, found = measured["everyday"]
    assert shapes == [(4, 6, 30, 30), (4, 6, 32, 32), (4, 6, 16, 16)] and found == [0, 7, 7]
    shaped = [" ".join(line.split()) for line in lines[3:6]]
    assert shaped == [f"{padding} {stride} (4, 3, 32, 32) {shape}" for (padding, stride), shape in
                      zip([(0, 1), (1, 1), (1, 2)], shapes, strict=True)]  # fmt: skip
    assert "   filter   [0, 0, 0]   [-1, 0, 1]   [0, 0, 0]\n" in out
    assert "   image    [2, 2, 2, 9, 9]   [2, 2, 2, 9, 9]   [2, 2, 2, 9, 9]\n" in out
    assert "   output   [0, 7, 7]\n   -> 7 = 9 - 2 where the right neighbour is lighter than" in out
    assert "lighter than the left one, 0 where the two are equal\n" in out

    torch.manual_seed(seed)  # as main draws: images, three layers, the edge, then this one
    torch.rand(4, 3, 32, 32), [nn.Conv2d(3, 6, 3) for _ in range(3)], nn.Conv2d(1, 1, 3, bias=False)
    y = nn.Conv2d(3, 6, 3)(as_tensors(open_images(images_root, train=False))[0][:1] / 255)
    rows = [line.split() for line in lines[lines.index(next(
        line for line in lines if "filter j" in line)) + 1 :][:6]]  # fmt: skip
    for j, (number, twin, by_hand) in enumerate(rows):
        assert number == str(j)
        assert float(twin) == float(by_hand) == pytest.approx(y[0, j, 0, 0].item(), abs=1e-4)
    assert measured["off"] < 1e-5
    assert f"-> all 10,800 numbers of both outputs differ by at most {measured['off']:.0e}\n" in out

    assert measured["counts"] == [(168, 145_800), (168, 622_728), (456, 352_800)]
    dense = nn.Linear(3 * 32 * 32, 6 * 30 * 30, device="meta")
    assert measured["dense"] == (sum(p.numel() for p in dense.parameters()), dense.weight.numel())
    for numbers, layer in (
        ("168 168 145,800 145,800", "Conv2d(3, 6, 3), stride 1 32 x 32"),
        ("168 168 622,728 622,728", "Conv2d(3, 6, 3), stride 1 64 x 64"),
        ("456 456 352,800 352,800", "Conv2d(3, 6, 5), stride 1 32 x 32"),
        ("16,594,200 16,594,200 16,588,800 16,588,800", "Linear(3072, 5400) 32 x 32"),
    ):
        assert f"{layer} {numbers}" in [" ".join(line.split()) for line in lines]
    for k, side, (_, work) in zip((3, 3, 5), (32, 64, 32), measured["counts"], strict=True):
        assert multiplications(nn.Conv2d(3, 6, k), torch.rand(1, 3, side, side)) == work
    assert "-> 64 x 64 pixels, not 32 x 32: 1 times the parameters, 4.3 times the work;" in out
    assert "Linear to as many outputs: 98,775 times the parameters, 114 times the work\n" in out

    grey, reshaped, alone = measured["shown"].values()
    assert grey == (2, 0) and alone == (12, 0)
    assert reshaped[0] == 4 and reshaped[1] > 0.03
    assert f"   y.reshape(-1, 3, 30, 30)   {4:8d}   {reshaped[1]:46.3f}\n" in out
    assert "   -> y.reshape(-1, 3, 30, 30) makes grey images coloured: log each" in out
    assert lines[-1].startswith(f"look: tensorboard --logdir {tmp_path}   http://localhost:6006/?")
