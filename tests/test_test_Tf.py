from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2


@pytest.fixture
def lesson(load):
    return load("test_Tf.py")


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_the_formula_is_to_tensor(lesson, array):
    x = lesson.to_tensor(array)
    assert x.shape == (3, 5, 7) and x.dtype == torch.float32
    assert x[2, 4, 6] == array[4, 6, 2] / np.float32(255)
    assert torch.equal(x, transforms.ToTensor()(array))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_formula_holds_for_any_number_of_channels(lesson, channels):
    array = np.arange(6 * channels, dtype=np.uint8).reshape(3, 2, channels)
    assert torch.equal(lesson.to_tensor(array), transforms.ToTensor()(array))


def test_v2_agrees_up_to_the_last_digit(lesson, array):
    x = lesson.new_to_tensor()(array)
    assert x.dtype == torch.float32
    assert (x - lesson.to_tensor(array)).abs().max() <= 6e-8


def test_all_256_bytes_come_back_also_after_a_normalization(lesson):
    array = np.arange(256, dtype=np.uint8).reshape(8, 32, 1)
    x = lesson.to_tensor(array)
    normalized = (x - 0.485) / 0.229
    undone = normalized * 0.229 + 0.485
    for value in (x, undone):
        back = lesson.to_array(value)
        assert back.dtype == np.uint8 and np.array_equal(back, array)
    cut_off = (undone * 255).byte().permute(1, 2, 0).numpy()
    assert (cut_off != array).sum() > 20  # what .byte() alone would do
    three = lesson.to_array(torch.arange(6.0).view(3, 1, 2) / 255)
    assert three.tolist() == [[[0, 2, 4], [1, 3, 5]]]


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int32])
def test_what_is_no_byte_passes_unscaled(array, dtype):
    assert transforms.ToTensor()(array.astype(dtype)).max() == array.max()


def test_v2_leaves_floats_unscaled_and_divides_whole_numbers_by_their_largest(lesson, array):
    new = lesson.new_to_tensor()
    assert new(array.astype(np.float32)).max() == array.max()
    for dtype in (np.int16, np.int32):
        largest = new(array.astype(dtype)).max().item()
        assert largest == pytest.approx(array.max() / np.iinfo(dtype).max, rel=1e-5)


def test_a_grey_picture_keeps_an_axis(array):
    grey = transforms.ToTensor()(Image.fromarray(array).convert("L"))
    assert grey.shape == (1, 5, 7) and grey.max() <= 1


def test_try_the_type_decides_what_it_is_divided_by(lesson, capsys):
    source = Path(lesson.__file__).read_text(encoding="utf-8")
    assert source.count("dtype=np.uint8)  # (H = 1") == 1
    changed = ModuleType("changed")
    changed.__file__ = lesson.__file__
    exec(source.replace("dtype=np.uint8)  # (H = 1", "dtype=np.int32)  # (H = 1"), vars(changed))
    assert changed.show_everyday() == [1, 2**31]
    assert "-> ToTensor divided by 1, v2 by 2147483648" in capsys.readouterr().out
    assert lesson.show_everyday() == [255, 255]


def test_the_first_table_names_each_pixels_colours(lesson, capsys):
    lesson.show_everyday()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["red", "pixel", "blue", "pixel"]
    assert lines[2].split()[2:] == [*"rgbrgb"]
    assert [line[3:21].split(" ", 1)[0] for line in lines[3:6]] == ["array", "ToTensor", "v2"]
    rows = [line.split() for line in lines[3:6]]
    assert rows[0][-6:] == ["255", "0", "0", "51", "102", "204"] and "uint8" in rows[0]
    for row in rows[1:]:
        assert row[-6:] == ["1", "0", "0", "0.2", "0.4", "0.8"] and "float32" in row


@pytest.fixture
def picture(array):
    array[0, 0] = 251
    array[array > 251] = 0
    return Image.fromarray(array)


def test_the_second_table(lesson, picture, capsys):
    measured = lesson.show_formula(picture)
    assert 0 < measured["rounding"] < 6e-8
    array = np.array(picture)[:, :5]
    x = lesson.to_tensor(array)
    for name, other in {
        "reshape(3, H, W) / 255": torch.from_numpy(array.copy()).reshape(3, 5, 5),
        "transpose(0, 2) / 255": torch.from_numpy(array).transpose(0, 2),
    }.items():
        share = (other / 255 != x).float().mean().item()
        assert measured["wrong"][name] == pytest.approx(share) and share > 0.7
    title, *_, off, silent = lines = capsys.readouterr().out.splitlines()
    rows = lines[5:11]
    assert "5 x 5 pixels" in title and len(lines) == 13
    assert [row.split()[-3:] for row in rows[:2]] == [["0.984", "0.0e+00", "0%"]] * 2
    assert all("(3, 5, 5)" in row for row in rows)
    shares = list(measured["wrong"].values())[-2:]
    assert [row.split()[-1] for row in rows[4:]] == [f"{share:.0%}" for share in shares]
    assert "ToTensor is off by 0, v2" in off
    assert silent.endswith("picture is square: transpose(0, 2) and reshape(3, H, W)")


def test_the_way_back_and_what_is_lost_without_rounding(lesson, capsys):
    assert lesson.show_way_back() == [256, 193]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines[2:4]] == [["256", "0"], ["193", "63"]]
    assert lines[-1].startswith("   -> without round() 63 bytes are off: ")


def test_a_way_back_that_loses_bytes_is_told(lesson, capsys, monkeypatch):
    monkeypatch.setattr(lesson, "to_array", lambda x: (x * 254).byte().permute(1, 2, 0).numpy())
    lost, _ = lesson.show_way_back()
    assert lost < 20 and capsys.readouterr().out.splitlines()[2].split()[-2] == str(lost)


def test_the_table_of_types_and_what_follows(lesson, picture, capsys):
    measured = lesson.show_range(picture)
    byte = pytest.approx(251 / 255)
    scaled = ("float32", byte, "float32", byte)
    assert measured == {
        "uint8": scaled,
        "float32 in 0..255": ("float32", 251, "float32", 251),
        "the same, divided by 255": scaled,
        "the same, made uint8 first": scaled,
        "float64 in 0..1": ("float64", byte, "float32", byte),
        "int16 in 0..255": ("int16", 251, "float32", pytest.approx(251 / 32767)),
    }
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("picture is 251")
    by_v2 = "float32 in 0..255"
    assert out[-2] == f"   -> left unscaled by ToTensor: {by_v2}, int16 in 0..255; by v2: {by_v2}"
    assert out[-1].startswith("   -> v2 divides int16 by 32767, ")


def test_the_table_of_other_inputs(lesson, capsys):
    answers = lesson.show_others()
    assert list(answers.values()) == [
        ("TypeError", "Image (2, 4, 3)"),
        ("ValueError", "RuntimeError"),
        ("TypeError", "str"),
    ]
    out = capsys.readouterr().out.splitlines()
    for line, (name, pair) in zip(out[3:6], answers.items(), strict=True):
        assert " ".join(line.split()) == f"{name} {' '.join(pair)}"
    assert out[-2:] == [
        "   -> ToTensor refuses 3 of 3",
        f"   -> v2 raises no error, and moves no axis, for {' and '.join([*answers][::2])}",
    ]
    x = torch.rand(2, 4, 3)
    assert torch.equal(v2.ToImage()(x), x) and v2.ToImage()("ant.jpg") == "ant.jpg"


def test_the_rows_of_pictures(lesson, array, tmp_path, events, monkeypatch):
    said = {}

    def row(title, images, captions, height):
        said[title] = dict(zip(captions, images, strict=True))
        return np.zeros((3, 4, 4), np.uint8)

    monkeypatch.setattr(lesson, "caption_row", row)
    lesson.log_pictures(tmp_path, Image.fromarray(array))
    x = lesson.to_tensor(array)
    colours, axes, ranges = (list(images.values()) for images in said.values())
    assert torch.equal(colours[0], x)
    for c, plane in enumerate(colours[1:]):
        assert torch.equal(plane, x[c : c + 1])
    words = [list(images) for images in said.values()]
    assert [w[:4] for w in words[0]] == ["x\nal", "x[0]", "x[1]", "x[2]"]
    assert [w.split()[-1] for w in words[0]] == ["three", "red", "green", "blue"]
    assert torch.equal(axes[0], x) and "permute" in words[1][0]
    assert axes[1].flatten().tolist() == array.ravel().tolist() and "reshape" in words[1][1]
    assert torch.equal(ranges[0], x) and torch.equal(ranges[1], (x * 255).round())
    assert "right" in words[2][0] and "wrong" in words[2][1]


@pytest.mark.parametrize("seed", range(3))
def test_main(lesson, insects_root, tmp_path, events, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=insects_root)
    assert measured["divisors"] == [255, 255]
    assert measured["back"] == [256, 193]
    assert min([*measured["formula"]["wrong"].values()][-2:]) > 0.5
    assert measured["range"]["uint8"][1] <= 1 < 100 < measured["range"]["float32 in 0..255"][3]
    assert list(measured["answers"])[2] == "the path of a picture"
    out = capsys.readouterr().out
    assert [line[0] for line in out.splitlines() if line[0].isdigit()] == ["1", "2", "3", "4", "5"]
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")
    loaded = events(tmp_path)
    tags = ["to_tensor/axes", "to_tensor/colours", "to_tensor/range"]
    assert sorted(loaded.Tags()["images"]) == tags
    for tag in tags:
        (image,) = loaded.Images(tag)
        assert image.step == 0 and image.height >= 180 + 2 * 20 and image.width > 200
