import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from support.data import as_tensors, open_images
from support.pictures import caption_row


@pytest.fixture
def lesson(load):
    return load("nn_maxpool.py")


# --- sizes -------------------------------------------------------------------------------------


def test_the_formula_both_ways(lesson):
    assert [lesson.output_size(5, 3, 3, ceil_mode=c) for c in (False, True)] == [1, 2]
    assert [lesson.output_size(6, 3, 3, ceil_mode=c) for c in (False, True)] == [2, 2]
    assert [lesson.output_size(32, 3, 2, 1, 2, c) for c in (False, True)] == [15, 16]
    more = [lesson.output_size(n, 3, 3, 0, 1, True) - lesson.output_size(n, 3, 3)
            for n in range(3, 33)]  # fmt: skip
    assert more == [0, 1, 1] * 10


def test_a_window_that_would_begin_in_the_right_padding_is_left_out(lesson):
    size = F.max_pool2d(torch.zeros(1, 1, 5, 5), 2, 2, 1, ceil_mode=True).shape[-1]
    steps_by_ceil = -(-(5 + 2 - 2) // 2) + 1
    assert lesson.output_size(5, 2, 2, 1, ceil_mode=True) == size == steps_by_ceil - 1 == 3


def test_a_size_that_is_refused_is_none(lesson):
    assert lesson.measured_size(2, 3, 1, 0, 1, False) is None
    assert lesson.measured_size(9, 3, 2, 1, 2, False) == 4
    assert lesson.measured_size(9, 3, 3, 0, 2, True) == 3


def test_a_formula_that_is_wrong_is_not_said_to_hold(lesson, monkeypatch):
    monkeypatch.setattr(lesson, "output_size", lambda *options: 3)
    with pytest.raises(AssertionError):
        lesson.show_sizes()


# --- pooling by hand ---------------------------------------------------------------------------


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


def test_a_frame_of_zeros_shows_where_an_image_is_negative(lesson, capsys):
    x = torch.full((2, 3, 8, 6), -0.75)
    x[..., 4, 4] = 5  # far from the frame: here it makes no difference
    off = lesson.show_from_scratch(x)
    assert off == [0, 0, 0, 0, 0.75]
    assert "infinity, it would be 0.75: 0 is more than" in capsys.readouterr().out


def test_a_pool_by_hand_that_is_wrong_is_seen(lesson, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "max_pool", lambda x, k, **o: nn.MaxPool2d(k, **o)(x) - 0.5)
    assert lesson.show_from_scratch(torch.rand(2, 3, 8, 6))[:4] == pytest.approx([0.5] * 4)
    assert "   -> the largest difference is 0.5; with a frame" in capsys.readouterr().out


# --- the gradient ------------------------------------------------------------------------------


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


def test_amax_shares_the_gradient_among_equals(lesson):
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


def test_try_the_first_of_two_maxima_gets_it(lesson, edited, images_root, tmp_path, capsys):
    changed = edited(lesson, "[5, 4.0,", "[5, 5.0,")
    changed.main(log_dir=tmp_path, root=images_root, batch=4)
    rows = capsys.readouterr().out.partition("\n4. ")[2].splitlines()[2:6]
    assert rows[1].split()[:5] == ["1", "5", "5", "1", "1"]
    assert [" ".join(row.split()[5:9]) for row in rows] == [
        "0 0 1 0", "1 0 0 0", "0 1 0 0", "0 0 1 0"]  # fmt: skip


# --- what is forgotten -------------------------------------------------------------------------


def test_each_window_is_turned_by_half(lesson):
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    rows = [[6, 5, 8, 7], [2, 1, 4, 3], [14, 13, 16, 15], [10, 9, 12, 11]]
    assert lesson.turn_windows(x, 2)[0, 0].tolist() == rows
    images = torch.rand(2, 3, 6, 9)
    turned = images.unflatten(3, (-1, 3)).unflatten(2, (-1, 3)).flip(3, 5).flatten(4).flatten(2, 3)
    assert torch.equal(lesson.turn_windows(images, 3), turned)


def test_the_layers_that_are_compared_are_those_that_are_named(lesson, monkeypatch):
    made, real = [], nn.Conv2d
    monkeypatch.setattr(nn, "Conv2d", lambda *a, **o: made.append((a, o)) or real(*a, **o))
    x = torch.rand(2, 3, 6, 4).double()
    assert [*lesson.show_forgotten(x)] == [
        "MaxPool2d(2)", "AvgPool2d(2)", "Conv2d(3, 3, 2, stride=2)"]  # fmt: skip
    assert made == [((3, 3, 2), {"stride": 2})]


def test_where_in_its_window_a_maximum_lies_is_forgotten():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    windows = F.unfold(x.view(6, 1, 8, 8), 2, stride=2)[:, torch.randperm(4)]
    shuffled = F.fold(windows, 8, 2, stride=2).view_as(x)
    assert not torch.equal(shuffled, x)
    assert torch.equal(F.max_pool2d(shuffled, 2), F.max_pool2d(x, 2))
    assert not [*nn.MaxPool2d(2).parameters()]


# --- the lesson --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_what_it_measures(lesson, images_root, events, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, batch=16)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:-1] == ["1.", "2.", "3.", "4.", "5."]
    assert sum("   -> " in line for line in lines) == 5

    assert measured["everyday"] == ([[5, 2], [2, 8]], [[3.25, 1], [1.25, 6]], (4, 6, 16, 16))
    assert [" ".join(line.split()) for line in lines[2:7]] == [
        "row x MaxPool2d(2) AvgPool2d(2)", "0 1 3 2 0 5 2 3.25 1", "1 5 4 1 1 2 8 1.25 6",
        "2 0 2 7 6", "3 1 2 8 3"]  # fmt: skip
    said = "-> 5 is the largest of the first 2 x 2, 3.25 their mean; images (4, 6, 32, 32) become"
    assert f"   {said} (4, 6, 16, 16)\n" in out

    assert measured["sweep"] == (1783, 329)
    rows = [line.split() for line in lines[10:18]]
    assert all(row[5] == row[6] == str(len(row) - 7) for row in rows)  # as many windows are drawn
    assert [row[5] for row in rows] == ["2", "2", "1", "2", "3", "4", "3", "3"]
    assert rows[3][4:] == ["True", "2", "2", "012", "34"]
    assert rows[5][7:] == ["012", "234", "456", "67"] and rows[7][7:] == [".0", "12", "34"]
    assert (
        "-> without ceil_mode no window has pixels 3 of 5, 4 of 5, 7 of 8; with it one has\n" in out
    )
    assert "1,783 shapes of a sweep are as the formula says, 329 more are refused\n" in out

    assert measured["off"][:4] == [0] * 4 and measured["off"][4] > 0.5
    assert (
        "   stride 2, padding 1, dilation 2   (16, 3, 15, 15)                                  0\n"
        in out
    )
    assert f"      infinity, it would be {measured['off'][4]:.2f}: 0 is more than a dark" in out

    table = out.partition("\n4. ")[2].splitlines()
    assert [" ".join(line.split()) for line in table[2:6]] == [
        f"{row} 0.25 0.25 0.25 0.25" for row in (
            "0 1 3 2 0 0 0 1 0", "1 5 4 1 1 1 0 0 0", "2 0 2 7 6 0 1 0 0", "3 1 2 8 3 0 0 1 0")
    ]  # fmt: skip
    images = as_tensors(open_images(images_root))[0][:16].double() / 255
    means = {"max": [], "average": []}
    for (run, k), (share, theory, mean) in measured["results"].items():
        assert share == theory == (k**-2 if run == "max" else 1)
        windows = images.unflatten(3, (-1, k)).unflatten(2, (-1, k))
        pooled = windows.amax((3, 5)) if run == "max" else windows.mean((3, 5))
        assert mean == pytest.approx(pooled.mean().item())
        name = "MaxPool2d" if run == "max" else "AvgPool2d"
        assert f"   {name}   {k:4d}   {share:22.2%}   {theory:11.2%}   {mean:9.3f}\n" in out
        means[run].append(mean)
    first, *rising = means["max"]
    assert first + 0.03 < rising[0] < rising[1] - 0.03 < rising[2] - 0.06
    assert means["average"] == pytest.approx([first] * 4)
    assert "-> with k = 4 MaxPool2d gives 6.25% of the pixels a gradient, AvgPool2d 100%;\n" in out
    said = f"from k = 1 to 8 MaxPool2d's mean goes from {first:.2f} to {rising[2]:.2f}"
    assert f"      {said}: lighter\n" in out

    largest, mean, convolved = measured["changes"].values()
    assert largest == 0 and mean < 1e-12 < 0.05 < convolved
    assert f"   Conv2d(3, 3, 2, stride=2)   {convolved:28.3f}\n" in out
    assert "-> MaxPool2d(2) and AvgPool2d(2) notice nothing: they forget where in a w" in out
    assert lines[-1].startswith(f"look: tensorboard --logdir {tmp_path}   http://localhost:6006/?")

    for run, logged in means.items():
        scalars = events(tmp_path / run).Scalars("pool/mean")
        assert [event.step for event in scalars] == [1, 2, 4, 8]
        assert [event.value for event in scalars] == pytest.approx(logged)


def pixels(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)


def test_pictures_show_the_outputs_and_the_pixels_that_get_a_gradient(
    lesson, images_root, events, tmp_path
):
    lesson.main(log_dir=tmp_path, root=images_root, batch=7)
    images = as_tensors(open_images(images_root))[0][:6].double() / 255
    names = [f"image {i}" for i in range(6)]
    for run, name, pool in (("max", "MaxPool2d", F.max_pool2d), ("average", "AvgPool2d",
                                                                 F.avg_pool2d)):  # fmt: skip
        logged = events(tmp_path / run)
        assert sorted(logged.Tags()["images"]) == ["pool/gradient", "pool/output"]
        outputs, learning = logged.Images("pool/output"), logged.Images("pool/gradient")
        for k, output, learns in zip((1, 2, 4, 8), outputs, learning, strict=True):
            assert output.step == learns.step == k
            title = f"{name}({k}), each number of y as one square"
            expected = caption_row(title, pool(images, k), names, height=128).astype(int)
            assert np.abs(pixels(output) - expected).max() <= 1  # rounding

            _, places = F.max_pool2d(images, k, return_indices=True)
            keep = torch.zeros_like(images).flatten(2).scatter(2, places.flatten(2), 1)
            keep = keep.view_as(images) if run == "max" else torch.ones_like(images)
            title = f"{name}({k}); in each colour, what gets no gradient is black"
            expected = caption_row(title, images * keep, names, height=128).astype(int)
            assert np.abs(pixels(learns) - expected).max() <= 1
