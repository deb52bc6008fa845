from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

MEAN, STD = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([2.0, 0.3, 0.7])


@pytest.fixture
def lesson(load):
    return load("Useful_TF.py")


@pytest.fixture
def x():
    """A picture (3, 70, 90) whose pixels all differ."""
    return torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0))


class Rows(dict):
    """Stands for the writer: {tag: {the words below an image: the image}}."""


@pytest.fixture
def rows(lesson, monkeypatch):
    def log_row(writer, tag, title, images, height=None):
        writer[tag] = images

    monkeypatch.setattr(lesson, "log_row", log_row)
    return Rows()


# --- the formulas ------------------------------------------------------------------------------


def test_normalize_is_torchvisions_and_is_undone(lesson, x):
    y = lesson.normalize(x, MEAN, STD)
    torch.testing.assert_close(y, v2.Normalize(MEAN.tolist(), STD.tolist())(x))
    torch.testing.assert_close(lesson.denormalize(y, MEAN, STD), x)
    white = lesson.denormalize(torch.ones(3, 1, 1), MEAN, STD).flatten()
    torch.testing.assert_close(white, MEAN + STD)


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (33, 33), (37, 99), (100, 31)])
@pytest.mark.parametrize("short", [7, 16, 50])
def test_the_short_side_formula(lesson, size, short):
    assert v2.Resize(short)(torch.rand(3, *size)).shape[1:] == lesson.short_side_size(*size, short)


def test_a_crop_is_found_where_it_was_cut(lesson):
    torch.manual_seed(0)
    image = torch.rand(3, 12, 15)
    assert lesson.find_window(image, image[:, 2:7, 9:13]) == [(2, 9)]
    assert lesson.find_window(image, torch.rand(3, 5, 4)) == []
    twice = torch.zeros(1, 1, 4)
    twice[0, 0, 2] = 1
    assert lesson.find_window(twice, torch.zeros(1, 1, 1)) == [(0, 0), (0, 1), (0, 3)]
    one_colour_differs = image[:, 2:7, 9:13].clone()
    one_colour_differs[1, 0, 0] += 1
    assert lesson.find_window(image, one_colour_differs) == []


@pytest.mark.parametrize("f", [0.0, 0.3, 1.0, 1.7])
def test_a_blend_is_each_of_torchvisions_colour_changes(lesson, x, f):
    grey = tv.rgb_to_grayscale(x, num_output_channels=3)
    for other, library in (
        (torch.zeros(3, 1, 1), tv.adjust_brightness),
        (grey.mean(), tv.adjust_contrast),
        (grey, tv.adjust_saturation),
    ):
        torch.testing.assert_close(lesson.blend(x, other, f), library(x, f), atol=1e-6, rtol=0)


def test_a_blend_is_cut_to_0_and_1(lesson):
    x = torch.tensor([0.2, 0.5, 0.9])
    assert lesson.blend(x, torch.tensor(0.5), 3).tolist() == pytest.approx([0, 0.5, 1])


# --- what is drawn at random -------------------------------------------------------------------


def test_every_corner_is_equally_likely():
    torch.manual_seed(0)
    grid, crop = torch.arange(64).view(1, 8, 8), v2.RandomCrop(5)  # every pixel tells its place
    taken = torch.stack([crop(grid)[0, 0, 0] for _ in range(3200)])
    counts = (taken // 8 * 4 + taken % 8).bincount(minlength=16)
    assert len(counts) == 16
    assert (counts - 200).square().sum() / 200 < 56  # chi-square, 15 degrees: beyond it 1 of 10^6


def test_p_is_the_share_of_flips_and_f_is_uniform():
    torch.manual_seed(0)
    pair = torch.tensor([0.2, 0.4]).expand(3, 1, 2)
    flip, jitter = v2.RandomHorizontalFlip(p=0.3), v2.ColorJitter(brightness=0.4)
    flipped = torch.stack([flip(pair)[0, 0, 0] == 0.4 for _ in range(2000)]).float().mean()
    assert flipped.item() == pytest.approx(0.3, abs=0.05)  # five standard errors
    f = torch.stack([jitter(pair)[0, 0, 0] / 0.2 for _ in range(1000)])
    assert 0.6 - 1e-6 <= f.min() < 0.62 and 1.38 < f.max() <= 1.4 + 1e-6
    assert f.mean().item() == pytest.approx(1, abs=0.04)


def test_seeded_repeats_and_other_seeds_differ(lesson):
    torch.manual_seed(5)
    expected = torch.rand(3)
    assert torch.equal(lesson.seeded(torch.rand, 3, 5), expected)
    assert not torch.equal(lesson.seeded(torch.rand, 3, 6), expected)


# --- the tables --------------------------------------------------------------------------------


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_pipelines_four_results(lesson, capsys):
    kinds = []
    for seed in range(5):
        torch.manual_seed(seed)
        kinds.append(lesson.show_everyday(Image.new("RGB", (133, 120), "white")))
    assert kinds == [4] * 5  # one of them is missed in 64 calls with probability 4e-8
    out = lines(capsys)[-12:]
    assert out[3] == "   usual(picture of 133 x 120)   (3, 64, 64) torch.float32, 1.00 to 1.00"
    out = out[3:]
    assert [line.split()[-4:] for line in (out[1], out[3], out[4])] == [
        ["0.00", "0.25", "0.75", "1.00"],
        ["1.00", "0.75", "0.25", "0.00"],
        ["-1.00", "-0.50", "0.50", "1.00"],
    ]
    assert out[2].split()[-2:] == ["0.25", "0.75"]
    possible = (["-1.00", "-0.50", "0.50"], ["0.50", "-0.50", "-1.00"],
                ["-0.50", "0.50", "1.00"], ["1.00", "0.50", "-0.50"])  # fmt: skip
    assert all(line.split()[-3:] in possible for line in out[5:8])
    assert [line.split(",")[1].split()[:2] for line in out[5:8]] == [
        ["call", "1"], ["call", "2"], ["call", "3"]]  # fmt: skip
    assert out[-1] == "   -> 64 calls gave 4 of 4 possible results: 2 windows, flipped or not"


def test_a_mean_of_zero_has_no_sign(lesson, rows, capsys):
    x = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(1))
    lesson.show_normalize(rows, x)
    assert all(line.split()[3] == "0.000" for line in lines(capsys)[3:6])


def test_normalize_centres_the_picture(lesson, rows, x, capsys):
    x[1] = x[1] / 2 + 0.4
    measured = lesson.show_normalize(rows, x)
    out = lines(capsys)
    for c, line in enumerate(out[3:6]):
        mean, std, after, spread, low, high = map(float, line.split()[1:7])
        assert mean == pytest.approx(x[c].mean().item(), abs=1e-3)
        assert std == pytest.approx(x[c].std().item(), abs=1e-3)
        assert (after, spread) == (0, 1)
        assert low == pytest.approx(((x[c].min() - x[c].mean()) / x[c].std()).item(), abs=1e-3)
        assert high == pytest.approx(((x[c].max() - x[c].mean()) / x[c].std()).item(), abs=1e-3)
    y = lesson.normalize(x, x.mean((1, 2)), x.std((1, 2)))
    low, high = ((mask.float().mean().item()) for mask in (y < 0, y > 1))
    assert (measured["low"], measured["high"]) == pytest.approx((low, high))
    assert 0.4 < low < 0.6 and 0.1 < high < 0.3 and 0 < measured["error"] < 1e-6
    assert f"within {measured['error']:.0e}" in out[-2]
    words = f"{low:.0%} of the numbers are below 0 and shown as 0, {high:.0%} above 1"
    assert out[-1] == f"   -> not undone, {words} and shown as 1"
    before, normalized, after = rows["normalize"].values()
    assert torch.equal(before, x) and normalized.min() < -1
    torch.testing.assert_close(after, x)
    assert normalized.mean((1, 2)).abs().max() < 1e-5


def test_the_undone_picture_is_undone_by_denormalize(lesson, rows, x, monkeypatch):
    monkeypatch.setattr(lesson, "denormalize", lambda y, mean, std: y * std[:, None, None])
    assert lesson.show_normalize(rows, x)["error"] > 0.3


@pytest.mark.parametrize("size", [(70, 90), (90, 70)])
def test_resize_keeps_the_shape_or_not(lesson, rows, capsys, size):
    x = torch.rand(3, *size)
    aspects = lesson.show_resize(rows, x, s=50)
    assert list(aspects) == ["x", "Resize(50)", "Resize((50, 50))", "CenterCrop(50)"]
    kept = 64 / 50 if size == (70, 90) else 50 / 64
    assert list(aspects.values()) == pytest.approx([size[1] / size[0], kept, 1, 1])
    out = lines(capsys)
    assert [line.split()[-3:-1] for line in out[2:6]] == [
        [*map(str, size)], ["50", "64"] if kept > 1 else ["64", "50"], ["50", "50"], ["50", "50"]
    ]  # fmt: skip
    assert out[-1].endswith("Resize(50) keeps them, up to a part of a pixel: 64 for 64.29")
    row = list(rows["resize"].values())
    for image, library in zip(
        row, (torch.clone, v2.Resize(50), v2.Resize((50, 50)), v2.CenterCrop(50)), strict=True
    ):
        assert torch.equal(image, library(x))
    words = [text.split("\n") for text in rows["resize"]]
    assert [text[1] for text in words] == [
        f"{image.shape[1]} x {image.shape[2]}" for image in row
    ]  # fmt: skip
    shown = [text[2] for text in words[1:]]
    assert shown == ["all, in proportion", "all, squeezed", "without the rim"]


def test_what_moves_or_averages_pixels_may_stand_behind_normalize(lesson, x, capsys):
    gaps = lesson.show_order(x)
    resize, crop, flip, dark, one, scaled = gaps.values()
    assert resize < 1e-5 and crop == flip == 0
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    z = (x - mean[:, None, None]) / std[:, None, None]
    gap = (0.7 * z).clamp(0, 1) - lesson.normalize(0.7 * x, mean, std)
    assert dark == pytest.approx(gap.abs().max().item())
    assert one == pytest.approx((z.clamp(0, 1) - z).abs().max().item()) and one > 1
    assert scaled == pytest.approx((0.3 * mean / std).max().item(), abs=1e-5)
    out = lines(capsys)
    assert [line.split()[-1] for line in out[2:8]] == [f"{gap:.1e}" for gap in gaps.values()]
    assert [line[3:42].strip() for line in out[2:8]] == list(gaps)
    assert out[8:] == [
        "   -> the same: Resize(64), CenterCrop(64), RandomHorizontalFlip(1)",
        "      (Resize takes averages of pixels, with weights that sum to 1)",
        "   -> put ColorJitter before Normalize. After Normalize it would cut numbers to [0, 1]",
        f"      (error {one:.2f}) and take 0, now the mean colour, as black (error {scaled:.2f})",
    ]


def test_only_weights_that_sum_to_1_may(x):
    """The reason behind section 4: of two averages, the one that also darkens does not commute."""
    norm = v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    for share, commutes in ((1.0, True), (0.9, False)):
        average = lambda z, share=share: share * torch.nn.functional.avg_pool2d(z, 3, 1)  # noqa: E731
        gap = (average(norm(x)) - norm(average(x))).abs().max().item()
        assert (gap < 1e-5) is commutes


def test_crops_are_windows_and_repeat_with_their_seed(lesson, rows, x, capsys):
    corners, repeats = lesson.show_crops(rows, x, seed=7)
    assert list(corners) == [7, 8, 9, 10] == list(repeats) and all(repeats.values())
    places = [where for (where,) in corners.values()]
    assert len(set(places)) > 2
    (_, whole), *crops = rows["crops"].items()
    assert torch.equal(whole, x)
    out = lines(capsys)
    for (words, crop), s, (i, j), line in zip(crops, corners, places, out[2:6], strict=True):
        assert torch.equal(crop, x[:, i : i + 64, j : j + 64])
        torch.manual_seed(s)
        assert torch.equal(crop, v2.RandomCrop(64)(x))
        assert words == f"seed {s}:\n({i}, {j})"
        assert line.split() == [str(s), f"({i},", f"{j})", "the", "same", "crop"]
    expected = f"4 of 4 crops are a window of x, in {len(set(places))} places; 4 of 4 came again"
    assert expected in out[-1]


def test_a_crop_that_heeds_no_seed_is_seen(lesson, rows, x, capsys, monkeypatch):
    monkeypatch.setattr(lesson, "seeded", lambda transform, x, seed: transform(x))
    torch.manual_seed(0)
    _, repeats = lesson.show_crops(rows, x, seed=0)
    assert not all(repeats.values()) and "another crop" in capsys.readouterr().out


def changed(lesson, old, new):
    """The lesson with one edit: what Try asks for."""
    source = Path(lesson.__file__).read_text(encoding="utf-8")
    head, code = source.split("import signal", 1)
    assert code.count(old) == 1
    module = ModuleType("changed")
    module.__file__ = lesson.__file__
    exec(head + "import signal" + code.replace(old, new), vars(module))
    return module


@pytest.mark.parametrize("seed", range(3))
def test_try_a_resized_crop_is_found_nowhere(lesson, insects_root, tmp_path, capsys, seed):
    edit = changed(lesson, "crop = v2.RandomCrop(64)", "crop = v2.RandomResizedCrop(64)")
    measured = edit.main(seed=seed, log_dir=tmp_path, root=insects_root)
    corners, repeats = measured["crops"]
    assert list(corners.values()) == [[]] * 4 and all(repeats.values())
    out = capsys.readouterr().out
    assert out.count("nowhere") == 4 and "0 of 4 crops are a window of x, in 0 places; 4 of" in out


def test_colours_are_blends(lesson, rows, x, capsys):
    errors = lesson.show_colours(rows, x, seed=3)
    fs = {"brightness": [1.6], "contrast": [0.4], "saturation": [0.0, 2.5]}
    names = [f"{kind}, f = {f}" for kind in fs for f in fs[kind]]
    assert list(errors) == ["flip, horizontal", *names] and max(errors.values()) < 1e-6
    out = lines(capsys)
    assert out[-1] == f"   -> yes, the largest difference is {max(errors.values()):.0e}"
    formulas = ["x.flip(-1)", "1.6 * x - 0.6 * black", "0.4 * x + 0.6 * the mean grey",
                "0.0 * x + 1.0 * (x in grey)", "2.5 * x - 1.5 * (x in grey)"]  # fmt: skip
    for line, (name, error), formula in zip(out[2:7], errors.items(), formulas, strict=True):
        assert " ".join(line.split()) == f"{name} {formula} {error:.0e}"

    twins = [torch.clone, lambda x: tv.adjust_brightness(x, 1.6),
             lambda x: tv.adjust_contrast(x, 0.4), lambda x: tv.adjust_saturation(x, 0.0),
             lambda x: tv.adjust_saturation(x, 2.5)]  # fmt: skip
    for image, twin in zip(rows["jitter"].values(), twins, strict=True):
        torch.testing.assert_close(image, twin(x))
    assert [words.replace("\n", ", ") for words in rows["jitter"]][1:] == names
    before, mirrored, upside_down = rows["flips"].values()
    assert torch.equal(before, x) and list(rows["flips"])[1:] == ["horizontal", "vertical"]
    assert torch.equal(mirrored, x.flip(2)) and torch.equal(upside_down, x.flip(1))
    drawn = rows["jitter_drawn"]
    assert list(drawn) == ["x", "seed 3", "seed 4", "seed 5", "seed 6"]
    torch.manual_seed(4)
    assert torch.equal(drawn["seed 4"], v2.ColorJitter(0.5, 0.5, 0.5)(x))


def test_a_wrong_blend_is_told(lesson, rows, x, capsys, monkeypatch):
    monkeypatch.setattr(lesson, "blend", lambda x, other, f: (f * x).clamp(0, 1))
    assert lesson.show_colours(rows, x, seed=0)["contrast, f = 0.4"] > 0.1
    assert "-> no, the largest difference is" in lines(capsys)[-1]


@pytest.mark.parametrize("seed", range(3))
def test_main(lesson, insects_root, tmp_path, events, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=insects_root)
    assert measured["kinds"] == 4
    assert measured["normalize"]["error"] < 1e-6
    assert measured["aspects"]["x"] == pytest.approx(measured["aspects"]["Resize(64)"], abs=0.02)
    assert measured["order"]["brightness, f = 1 (only cuts to [0, 1])"] > 0.3
    corners, repeats = measured["crops"]
    assert list(corners) == list(range(seed, seed + 4)) and all(repeats.values())
    assert all(len(where) == 1 for where in corners.values())
    assert max(measured["colours"].values()) < 1e-6
    out = capsys.readouterr().out.splitlines()
    assert [line[0] for line in out if line[0].isdigit()] == list("123456")
    assert out[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")
    loaded = events(tmp_path)
    tags = ["crops", "flips", "jitter", "jitter_drawn", "normalize", "resize"]
    assert sorted(loaded.Tags()["images"]) == [f"useful_tf/{tag}" for tag in tags]
    heights = {}
    for tag in tags:
        (image,) = loaded.Images(f"useful_tf/{tag}")
        assert image.step == 0 and 300 < image.width < 700
        heights[tag] = image.height
    assert 72 < heights["jitter_drawn"] < heights["jitter"] < heights["flips"] < 200
