import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def lesson(load):
    return load("nn_conv2d.py")


def multiply_adds(layer, x):
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        layer(x)
    return flops.get_total_flops() / 2


def test_one_window_by_hand(lesson):
    x = torch.tensor([[[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]]])  # (1, 2, 2, 2)
    weight = torch.tensor([[[[1.0, 10], [100, 1000]], [[0, 0], [0, 0.5]]]])
    y, count = lesson.conv2d_by_shifts(x, weight, torch.tensor([0.25]))
    assert y.tolist() == [[[[4321 + 4 + 0.25]]]] and count == 8


@pytest.mark.parametrize(
    "C_in, C_out, k, H, W", [(3, 6, 3, 7, 12), (1, 4, 5, 9, 5), (4, 1, 1, 3, 8)]
)
def test_the_formula_is_nn_conv2d(lesson, C_in, C_out, k, H, W):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(C_in, C_out, k).double(), torch.randn(2, C_in, H, W).double()
    with torch.no_grad():
        y, work = lesson.conv2d_by_shifts(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, layer(x))
    parameters = sum(p.numel() for p in layer.parameters())
    assert parameters == lesson.parameter_formula(C_in, C_out, k)
    assert work == lesson.work_formula(C_in, C_out, k, H, W) == multiply_adds(layer, x[:1])


def test_an_image_with_other_channels_is_refused(lesson):
    with pytest.raises(ValueError, match=r"for 3 channels, x \(1, 4, 8, 8\) has 4"):
        lesson.conv2d_by_shifts(torch.rand(1, 4, 8, 8), torch.rand(2, 3, 3, 3), torch.zeros(2))


def test_an_output_channel_is_the_sum_over_the_input_channels(lesson):
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 8, 9), torch.randn(6, 3, 3, 3)
    alone = sum(F.conv2d(x[:, c : c + 1], w[4:5, c : c + 1]) for c in range(3))
    y, _ = lesson.conv2d_by_shifts(x, w, torch.zeros(6))
    torch.testing.assert_close(y[:, 4:5], alone)


def test_filters_by_hand_do_what_slicing_does(lesson):
    torch.manual_seed(0)
    x, filters = torch.randn(2, 3, 7, 11), lesson.filters_by_hand()
    channels = F.conv2d(x, torch.stack([*filters.values()])).unbind(1)
    sliced = lesson.channels_by_slicing(x)
    assert [*filters] == [*sliced]
    for weight, channel, expected in zip(filters.values(), channels, sliced.values(), strict=True):
        torch.testing.assert_close(channel, expected)
        assert weight.sum().item() == pytest.approx(0, abs=1e-6) and weight.abs().sum() > 0.5


def test_what_lies_elsewhere_is_found_by_the_same_filter(lesson):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16)
    weight = torch.stack([*lesson.filters_by_hand().values()])
    y, moved = F.conv2d(x, weight), F.conv2d(x.roll((4, 3), (2, 3)), weight)
    torch.testing.assert_close(moved[..., 4:, 3:], y[..., :-4, :-3])


def test_zero_is_mid_grey_in_a_picture(lesson):
    assert lesson.as_picture(torch.tensor([-2.0, 0, 1])).tolist() == [0, 0.5, 0.75]
    assert lesson.as_picture(torch.zeros(2)).tolist() == [0.5, 0.5]


def test_try_stride_2_keeps_the_parameters_and_quarters_the_work():
    layer = nn.Conv2d(3, 6, 3, stride=2)
    assert sum(p.numel() for p in layer.parameters()) == 168
    assert multiply_adds(layer, torch.rand(1, 3, 32, 32)) == 36_450 == 145_800 / 4


def read_png(event):
    with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("seed", range(3))
def test_main_shows_each_channel_as_its_own_grey_picture(
    lesson, events, images_root, tmp_path, seed
):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, count=2)
    assert measured["counts"] == {
        (3, 32): (168, 145_800),
        (3, 64): (168, 622_728),
        (5, 32): (456, 352_800),
    }
    dense = nn.Linear(3 * 32 * 32, 6 * 30 * 30, device="meta")
    assert measured["dense"] == sum(p.numel() for p in dense.parameters())
    light = measured["light"]
    assert light["by hand"] < 1e-5 < 0.02 < light["as initialised"]
    assert measured["folded"] == 4
    assert measured["colour"]["images"] == 0 and measured["colour"]["folded"] > 0.03

    logged = events(tmp_path)
    outputs = [tag for tag in logged.Tags()["images"] if "output" in tag]
    assert len(outputs) == 6
    for tag in outputs:
        pictures = [read_png(event) for event in logged.Images(tag)]
        assert len(pictures) == 2
        for picture in pictures:
            assert picture.shape == (30, 30, 3)
            assert (picture == picture[..., :1]).all() and picture.std() > 5
    assert read_png(logged.Images("conv2d/input")[0]).std(-1).max() > 5
