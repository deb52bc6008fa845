import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_conv.py")


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


def test_sizes_that_everyone_should_know(lesson):
    assert lesson.output_size(32, 5, padding=2) == 32
    assert lesson.output_size(32, 3, stride=2, padding=1) == 16
    assert lesson.output_size(224, 7, stride=2, padding=3) == 112
    assert lesson.output_size(7, 3, dilation=3) == 1
    assert lesson.output_size(6, 3, dilation=3) < 1


def test_a_convolution_of_outer_products_is_numpys(lesson):
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.standard_normal(n) for n in (7, 9, 3, 4))
    x, kernel = torch.from_numpy(np.outer(a, b)), torch.from_numpy(np.outer(c, d))
    truth = torch.from_numpy(np.outer(np.convolve(a, c), np.convolve(b, d)))
    torch.testing.assert_close(lesson.convolve(x, kernel), truth)
    torch.testing.assert_close(lesson.fourier_convolve(x, kernel), truth)


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


def test_try_stride_2_follows_a_move_by_two_pixels_and_not_by_one():
    torch.manual_seed(0)
    x, weight = torch.zeros(1, 1, 16, 16), torch.randn(1, 1, 3, 3)
    x[..., 4:9, 4:9] = torch.randn(5, 5)
    for stride, move, expected in ((1, 1, 1), (2, 2, 1), (2, 4, 2)):
        moved = F.conv2d(x.roll(move, 3), weight, stride=stride)
        assert torch.equal(moved, F.conv2d(x, weight, stride=stride).roll(expected, 3))
    by_one = F.conv2d(x.roll(1, 3), weight, stride=2)
    still = F.conv2d(x, weight, stride=2)
    assert all((by_one - still.roll(n, 3)).abs().max() > 0.1 for n in range(-3, 4))


@pytest.mark.parametrize("seed", range(3))
def test_main_learns_the_flipped_kernel(lesson, events, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, steps=50)
    assert measured["shapes"]["all four"] == (2, 6, 5, 5)
    assert measured["sweep"] == (1266, 354)
    flipped, exchanged, plain = measured["fourier"].values()
    assert max(flipped, exchanged) < 1e-12 < 5 < plain
    to_flipped, to_letter = measured["learned"]
    assert to_flipped < 0.01 < 0.9 < to_letter
    assert events(tmp_path / "learned").Tags()["images"] == ["kernel/learned"]
    for run in ("convolution", "correlation"):
        assert events(tmp_path / run).Tags()["images"] == ["kernel/response"]
