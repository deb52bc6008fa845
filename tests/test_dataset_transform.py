import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from support import data
from support.data import as_tensors, open_images
from support.pictures import caption_grid, caption_row

HALF = torch.full((3,), 0.5)
MEAN, STD = torch.tensor([0.2, 0.5, 0.7]), torch.tensor([0.1, 0.25, 2.0])


@pytest.fixture
def lesson(load):
    return load("dataset_transform.py")


@pytest.fixture
def dataset(images_root):
    return open_images(images_root)


def test_by_hand_on_numbers_that_can_be_checked_by_eye(lesson):
    picture = Image.fromarray(np.array([[[255, 0, 51]] * 4, [[102, 204, 153]] * 4], np.uint8))
    x = lesson.normalize_by_hand(picture, MEAN, STD)
    assert x.shape == (3, 2, 4) and x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0, 3], torch.tensor([8.0, -2.0, -0.25]))
    torch.testing.assert_close(x[:, 1, 0], torch.tensor([2.0, 1.2, -0.05]))
    torch.testing.assert_close(lesson.make_pipeline(MEAN, STD, train=False)(picture), x)


def test_denormalize_is_the_inverse_for_images_and_batches(lesson):
    x = torch.rand(5, 3, 4, 6)
    normalized = v2.Normalize(MEAN.tolist(), STD.tolist())(x)
    torch.testing.assert_close(lesson.denormalize(normalized, MEAN, STD), x)
    torch.testing.assert_close(lesson.denormalize(normalized[2], MEAN, STD), x[2])


def test_by_the_batch_is_image_by_image_without_augmentation(lesson, dataset):
    form = lesson.make_pipeline(MEAN, STD, train=False)
    singles = torch.stack([form(dataset[i][0]) for i in range(9)])
    batch = v2.Compose(form.transforms[1:])(as_tensors(dataset)[0][:9])
    torch.testing.assert_close(singles, batch)


def test_the_training_pipeline_crops_and_flips(lesson):
    steps = lesson.make_pipeline(MEAN, STD).transforms
    names = ["ToImage", "RandomCrop", "RandomHorizontalFlip", "ToDtype", "Normalize"]
    assert [type(step).__name__ for step in steps] == names
    assert (tuple(steps[1].size), steps[1].padding, steps[2].p) == ((32, 32), [4] * 4, 0.5)
    picture = Image.new("RGB", (32, 32), "white")
    assert lesson.make_pipeline(MEAN, STD)(picture).shape == (3, 32, 32)
    assert len(lesson.make_pipeline(MEAN, STD, train=False).transforms) == 3


@pytest.mark.parametrize("count", [3, 2001])
def test_channel_stats_are_those_of_all_values(lesson, count):
    torch.manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 3, 5), dtype=torch.uint8)
    images[:, 1] //= 2
    values = images.transpose(0, 1).flatten(1).double() / 255
    mean, std = lesson.channel_stats(images)
    torch.testing.assert_close(mean, values.mean(1).float())
    torch.testing.assert_close(std, values.std(1, correction=0).float())
    torch.testing.assert_close((mean, std), data.channel_stats(images), rtol=0, atol=1e-6)
    twice = lesson.channel_stats(images, lambda part: part.float() * 2)
    torch.testing.assert_close(twice, (mean * 510, std * 510))


def test_augment_each_draws_for_each(lesson):
    images = torch.arange(64 * 3 * 2 * 2).reshape(64, 3, 2, 2)
    torch.manual_seed(0)
    out = lesson.augment_each(images, v2.RandomHorizontalFlip())
    turned = (out == images.flip(3)).flatten(1).all(1)
    assert 15 < turned.sum() < 49 and torch.equal(out[~turned], images[~turned])


def test_different_images_are_counted(lesson):
    images = torch.zeros(6, 3, 2, 2)
    images[2, 1, 0, 1] = images[4, 1, 0, 1] = 1
    images[5, 2, 1, 1] = 1
    assert lesson.count_different(images) == 3
    assert lesson.count_different(images[:2]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_one_draw_for_a_batch_except_for_noise(lesson, dataset, capsys, seed):
    torch.manual_seed(seed)
    different = lesson.show_draws(as_tensors(dataset)[0][0], 64)
    assert different["RandomHorizontalFlip"] == (1, 2)
    assert different["RandomCrop"][0] == 1 and 30 < different["RandomCrop"][1] < 60
    assert different["ColorJitter"][0] == 1 and different["ColorJitter"][1] > 40
    assert different["GaussianNoise"] == (64, 64)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0].startswith("4. One image, 64 times")
    expected = [" ".join(line.split()[3:]) for line in lines[3:7]]
    assert expected == ["2.0 of 2", "44.4 of 81", "-", "-"]
    for line, (name, pair) in zip(lines[3:7], different.items(), strict=True):
        assert line.split()[:3] == [name, *map(str, pair)]
    ending = "once for a batch: RandomHorizontalFlip, RandomCrop, ColorJitter"
    assert lines[-1] == f"   -> drawn {ending}"


def test_different_draws_are_as_many_as_expected(lesson):
    torch.manual_seed(0)
    picture = torch.rand(3, 32, 32)
    counts = []
    for _ in range(100):
        crops = lesson.augment_each(picture.expand(64, -1, -1, -1), v2.RandomCrop(32, padding=4))
        counts.append(lesson.count_different(crops))
    assert sum(counts) / 100 == pytest.approx(81 * (1 - (80 / 81) ** 64), abs=1.5)


@pytest.mark.parametrize("seed", range(5))
def test_try_random_erasing_draws_once_for_a_batch(
    edited, lesson, dataset, images_root, tmp_path, seed, capsys
):
    lesson = edited(lesson, "v2.GaussianNoise(),", "v2.GaussianNoise(), v2.RandomErasing(p=1),")
    torch.manual_seed(seed)
    different = lesson.show_draws(as_tensors(dataset)[0][0], 64)
    once, each = different["RandomErasing"]
    assert once == 1 and each > 40
    row = capsys.readouterr().out.splitlines()[-2]
    assert row.split() == ["RandomErasing", "1", str(each), "-"]
    lesson.main(log_dir=tmp_path, root=images_root, count=8)


def test_black_padding_is_what_shifts_the_mean(lesson, dataset):
    images, _ = as_tensors(dataset)
    mean, std = data.channel_stats(images)
    steps = lesson.make_pipeline(mean, std).transforms[2:]
    for mode, shifted in (("constant", True), ("reflect", False)):
        crop = v2.RandomCrop(32, padding=4, padding_mode=mode)
        z = lesson.augment_each(images, v2.Compose([crop, *steps]))
        black = 1 - (1 - 20 / 9 / 32) ** 2  # of 0 ... 4 padded rows, and of as many columns
        shift = shifted * black * (-mean / std).mean().item()
        assert z.mean().item() == pytest.approx(shift, abs=0.06)


def test_mistakes_are_seen_or_silent(lesson, dataset, capsys):
    images, _ = as_tensors(dataset)
    silent = lesson.show_mistakes(images[:64], *data.channel_stats(images))
    assert silent == (["2", "3", "4"], ["1", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].startswith("5. Which mistakes")
    rows = [line[52:].split() for line in lines[2:8]]
    for row in (rows[0], rows[4]):
        assert abs(float(row[0])) < 0.1 and abs(float(row[1]) - 1) < 0.1 and row[2] == "none"
    assert float(rows[1][0]) > 300 and float(rows[1][1]) > 100
    assert 0.25 < float(rows[3][0]) < 0.5 and 0.35 < float(rows[3][1]) < 0.55
    assert rows[5][2] == "TypeError:"
    assert lines[-2:] == [
        "   -> no error, but a mean or std far from 0 and 1: rows 2, 3, 4",
        "   -> no error, and both fit: rows 1, 5; a fit alone proves nothing",
    ]
    x = (images[:64] / 255 - data.channel_stats(images)[0].view(3, 1, 1)) / (
        data.channel_stats(images)[1].view(3, 1, 1))  # fmt: skip
    assert rows[0][:2] == [f"{x.mean():.2f}", f"{x.std():.2f}"]


def test_a_step_that_does_nothing_changes_no_value(lesson, images_root, monkeypatch, capsys):
    monkeypatch.setattr(lesson.v2, "RandomCrop", lambda *args, **options: torch.nn.Identity())
    monkeypatch.setattr(lesson.v2, "RandomHorizontalFlip", torch.nn.Identity)
    *_, changed = lesson.show_everyday(images_root)
    assert changed == ["ToDtype", "Normalize(0.5, 0.25)"]
    shares = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[3:8]]
    assert shares[:3] == ["0%"] * 3 and shares[4] == "100%"


def test_wrong_arguments_end_with_status_2(lesson):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(["--downlaod"])
    assert stop.value.code == 2
    assert lesson.parse([]).download is False and lesson.parse(["--download"]).download is True


def test_download_comes_first(lesson, monkeypatch, tmp_path):
    class Fetched(Exception):
        pass

    def fetch(root):
        assert root == tmp_path / "here"
        raise Fetched

    monkeypatch.setattr(lesson, "download_cifar10", fetch)
    with pytest.raises(Fetched):
        lesson.main(root=tmp_path / "here", download=True)


def pixels(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_what_it_measures(lesson, dataset, images_root, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, count=16)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:-1] == ["1.", "2.", "3.", "4.", "5."]
    assert sum("   -> " in line for line in lines) == 8

    x, last, versions, changed = measured["everyday"]
    assert changed[-2:] == ["ToDtype", "Normalize(0.5, 0.25)"]
    assert f"-> steps that changed numbers: {', '.join(changed)}\n" in out
    assert x.shape == last.shape == (3, 32, 32) and x.dtype == torch.float32 and versions > 5
    label = dataset.targets[0]
    said = f"   -> dataset[0] is (tensor (3, 32, 32), label {label}); read ten times, it gave\n"
    said += f"      {versions} different tensors; 9 x 9 crops, flipped or not, are 162\n"
    assert said in out
    image = np.array(dataset[0][0])
    smallest, largest = (f"{value:.2f}" for value in (image.min(), image.max()))
    assert lines[4].split() == [
        "ToImage",
        "(3,",
        "32,",
        "32)",
        "torch.uint8",
        smallest,
        largest,
        "0%",
    ]
    assert last.min() >= -2 and last.max() <= 2
    assert f"{last.min():8.2f}   {last.max():7.2f}" in lines[8]

    difference, wrong = measured["by_hand"]
    assert difference < 1e-5 and wrong == 0
    assert f"-> v2 differs by at most {difference:.0e}; undone, 0 numbers change" in out
    mean, std = data.channel_stats(as_tensors(dataset)[0])
    pixel = torch.tensor(image[0, 0]) / 255
    for numbers in (pixel, (pixel - mean) / std):
        assert " ".join(f"{v:6.3f}" for v in numbers) in lines[26]

    statistics = measured["statistics"]
    torch.testing.assert_close((statistics["mean"], statistics["std"]), (mean, std))
    assert statistics["off"] < 1e-4
    assert f"-> not augmented: mean 0 and std 1, off by at most {statistics['off']:.0e}\n" in out
    assert 0.15 < statistics["shift"] < 0.4
    assert f"-> augmented: the mean is off by {statistics['shift']:.2f}, as RandomCrop pads" in out
    assert statistics["without"] < 0.06
    assert f"      it is off by {statistics['without']:.2f} with padding_mode='reflect'" in out
    for line, name, m, s in zip(lines[17:20], ("red", "green", "blue"), mean, std, strict=True):
        assert line.startswith(f"   {name:<6}   {m:5.3f}   {s:5.3f}     0.000   1.000   ")
        shifted, wider = map(float, line.split()[-2:])
        assert -0.4 < shifted < -0.15 and 1.05 < wider < 1.25
    shifts = [-float(line.split()[-2]) for line in lines[17:20]]
    assert statistics["shift"] == pytest.approx(max(shifts), abs=1e-3)
    assert measured["different"]["GaussianNoise"] == (16, 16)
    assert measured["passed"] == (["2", "3", "4"], ["1", "5"])


def test_pictures_show_each_step_eight_epochs_and_both_ways(lesson, dataset, tmp_path, events):
    torch.manual_seed(3)
    lesson.draw(tmp_path, dataset, MEAN, STD)
    loaded = events(tmp_path)
    steps, epochs, batch = (pixels(loaded.Images(f"transform/{tag}")[0])
                            for tag in ("steps", "epochs", "batch"))  # fmt: skip
    torch.manual_seed(3)
    image = v2.functional.pil_to_tensor(dataset[0][0])
    shown, words = (
        [image],
        ["ToImage", "RandomCrop", "RandomHorizontalFlip", "ToDtype", "Normalize"],
    )
    for step in lesson.make_pipeline(MEAN, STD).transforms[1:]:
        shown.append(step(shown[-1]))
    title = "One picture after each step. Normalize: below 0 is black here, above 1 white"
    row = caption_row(title, [*shown, shown[-2]], [*words, "denormalize"], height=160)
    assert np.abs(row.astype(int) - steps).max() <= 1  # rounding of what is denormalised

    side, line = 96, 14
    names = [dataset.classes[dataset.targets[i]] for i in range(8)]
    images = [v2.functional.pil_to_tensor(dataset[i][0]) for i in range(8)]
    plain = caption_grid(torch.stack(images), names, columns=1)
    assert epochs.shape == (3, 8 * (side + line + 4), 8 * (side + 4))
    assert np.array_equal(epochs[:, :, : side + 4], plain)  # the first column
    cells = [epochs[:, :side, i * (side + 4) : i * (side + 4) + side].tobytes() for i in range(8)]
    assert len(set(cells)) > 5
    rows = [[batch[:, y : y + side, i * (side + 4) : i * (side + 4) + side].tobytes()
             for i in range(8)] for y in (0, side + line + 4)]  # fmt: skip
    assert len(set(rows[0])) == 1 and len(set(rows[1])) > 4
    nothing = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    words = caption_grid(nothing, ["as one batch"] * 8 + ["one by one"] * 8)
    for y in (side, 2 * side + line + 4):
        assert np.array_equal(words[:, y : y + line], batch[:, y : y + line])
