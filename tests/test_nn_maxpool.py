import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_maxpool.py")


def test_the_formula_both_ways(lesson):
    assert [lesson.output_size(5, 3, 3, ceil_mode=c) for c in (False, True)] == [1, 2]
    assert [lesson.output_size(6, 3, 3, ceil_mode=c) for c in (False, True)] == [2, 2]
    assert [lesson.output_size(32, 3, 2, 1, 2, c) for c in (False, True)] == [15, 16]


def test_a_window_that_would_begin_in_the_right_padding_is_left_out(lesson):
    size = F.max_pool2d(torch.zeros(1, 1, 5, 5), 2, 2, 1, ceil_mode=True).shape[-1]
    steps_by_ceil = -(-(5 + 2 - 2) // 2) + 1
    assert lesson.output_size(5, 2, 2, 1, ceil_mode=True) == size == steps_by_ceil - 1 == 3


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [(2, 2, 0, 1), (3, 1, 1, 1), (3, 5, 0, 1), (4, 3, 2, 1), (2, 3, 1, 3), (3, 2, 1, 2)],
)
def test_pooling_by_unfold_is_the_layer(lesson, kernel, stride, padding, dilation, ceil_mode):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 13, 10, dtype=torch.float64) - 5  # a padding of 0 would win everywhere
    layer = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    ours = lesson.max_pool(x, kernel, stride, padding, dilation, ceil_mode)
    assert torch.equal(ours, layer(x)) and ours.max() < 0


def test_an_image_that_is_too_small_is_refused(lesson):
    assert lesson.output_size(2, 3, 1) < 1
    for pool in (lesson.max_pool, F.max_pool2d):
        with pytest.raises(RuntimeError):
            pool(torch.zeros(1, 1, 2, 2), 3, 1)


@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_gradient_goes_to_the_first_maximum_of_each_window(lesson, kernel, stride, ties):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 8, dtype=torch.float64)
    x = x.round() if ties else x
    layer = nn.MaxPool2d(kernel, stride)
    upstream = torch.randn_like(layer(x))
    measured = lesson.gradient(layer, x, upstream)
    torch.testing.assert_close(lesson.gradient_by_hand(x, kernel, stride, upstream), measured)
    torch.testing.assert_close(measured.sum(), upstream.sum())  # none is lost
    ours = lesson.gradient(lambda x: lesson.max_pool(x, kernel, stride), x, upstream)
    torch.testing.assert_close(ours, measured)


def test_try_amax_shares_the_gradient_among_equals(lesson):
    def pool(x):
        return F.unfold(x, 2, stride=2).amax(1).view(1, 1, 1, 1)

    one = torch.ones(1, 1, 1, 1)
    tied, plain = torch.tensor([[[[7.0, 2.0], [7.0, 7.0]]]]), torch.tensor([[[[7.0, 2], [1, 3]]]])
    assert torch.equal(pool(tied), F.max_pool2d(tied, 2))
    assert lesson.gradient(nn.MaxPool2d(2), tied, one).flatten().tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(lesson.gradient(pool, tied, one).flatten() * 3,
                               torch.tensor([1.0, 0, 1, 1]))  # fmt: skip
    assert torch.equal(lesson.gradient(pool, plain, one),
                       lesson.gradient(nn.MaxPool2d(2), plain, one))  # fmt: skip


def test_where_in_its_window_a_maximum_lies_is_forgotten():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    windows = F.unfold(x.view(6, 1, 8, 8), 2, stride=2)[:, torch.randperm(4)]
    shuffled = F.fold(windows, 8, 2, stride=2).view_as(x)
    assert not torch.equal(shuffled, x)
    assert torch.equal(F.max_pool2d(shuffled, 2), F.max_pool2d(x, 2))
    assert not [*nn.MaxPool2d(2).parameters()]


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_one_pixel_a_window(lesson, images_root, events, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, batch=16)
    assert measured["sweep"] == (1783, 329)
    brightness = {"max": [], "average": []}
    for (run, kernel), (share, mean) in measured["results"].items():
        assert share == (kernel**-2 if run == "max" else 1)
        brightness[run].append(mean)
    first, *rising = brightness["max"]
    assert first + 0.03 < rising[0] < rising[1] - 0.03 < rising[2] - 0.06
    assert brightness["average"] == pytest.approx([first] * 4)
    floor, ceil = (events(tmp_path / f"ceil_{c}").Scalars("size/output") for c in ("false", "true"))
    assert [b.value - a.value for a, b in zip(floor, ceil, strict=True)] == [0, 1, 1] * 10
    assert sorted(events(tmp_path / "max").Tags()["images"]) == ["pool/learns", "pool/output"]
