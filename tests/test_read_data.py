import pytest
import torch
from PIL import Image


@pytest.fixture
def lesson(load):
    return load("read_data.py")


@pytest.fixture
def train(load, insects_root):
    folder = insects_root / "hymenoptera_sample"
    load("generate_labels.py").write_labels(folder)
    return folder / "train"


def test_items_are_the_files_in_order_with_their_labels(lesson, train):
    bees = lesson.Insects(train, "bees")
    image, label = bees[1]
    with Image.open(train / "bees" / "bees_001.jpg") as file:
        width, height = file.size
        pixel = file.getpixel((5, 2))
    assert image.shape == (3, height, width) and image.dtype == torch.uint8
    assert tuple(image[:, 2, 5].tolist()) == pixel
    assert label == 1 and len(bees) == 3


def test_negative_indices_work_and_others_are_refused(lesson, train):
    ants = lesson.Insects(train, "ants")
    torch.testing.assert_close(ants[-1][0], ants[2][0])
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"index {index} is outside of 3 images"):
            ants[index]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_mode_becomes_rgb(lesson, train, mode):
    path = train / "ants" / ("ants_000.jpg" if mode == "CMYK" else "ants_000.png")
    (train / "ants" / "ants_000.jpg").unlink()
    Image.new("RGB", (6, 4), (255, 0, 0)).convert(mode).save(path)
    assert lesson.Insects(train, "ants")[0][0].shape == (3, 4, 6)


def test_errors_name_the_file_and_what_mends_it(lesson, train):
    ants = lesson.Insects(train, "ants")
    label = train / "ants_label" / "ants_001.txt"
    label.write_text("wasps", encoding="utf-8")
    with pytest.raises(lesson.DataError, match=r"ants_001.txt says 'wasps'"):
        ants[1]
    label.unlink()
    with pytest.raises(lesson.DataError, match=r"ants_001.txt is missing: run python gen"):
        ants[1]
    for damage in (b"no image", (train / "ants" / "ants_000.jpg").read_bytes()[:900]):
        (train / "ants" / "ants_002.jpg").write_bytes(damage)
        with pytest.raises(lesson.DataError, match=r"ants_002.jpg is not a readable image"):
            ants[2]


def test_padding_leaves_every_image_whole(lesson):
    images = [torch.randint(1, 256, (3, h, w), dtype=torch.uint8) for h, w in [(4, 9), (7, 2)]]
    batch, labels, sizes = lesson.pad_collate([(images[0], 1), (images[1], 0)])
    assert batch.shape == (2, 3, 7, 9) and labels.tolist() == [1, 0]
    for padded, image, (height, width) in zip(batch, images, sizes, strict=True):
        assert torch.equal(padded[:, :height, :width], image)
        assert padded.count_nonzero() == image.numel()
    assert lesson.padded_share(sizes, batch) == pytest.approx(1 - (36 + 14) / (2 * 63))


def test_try_sorting_by_size_lowers_the_padded_share(lesson):
    torch.manual_seed(0)
    sizes = torch.randint(20, 90, (40, 2))
    items = [(torch.zeros(3, *size.tolist(), dtype=torch.uint8), 0) for size in sizes]
    ordered = sorted(items, key=lambda item: item[0].numel())
    shares = []
    for way in (items, ordered):
        collated = [lesson.pad_collate(way[i : i + 8]) for i in range(0, 40, 8)]
        shares.append(sum(lesson.padded_share(s, batch) for batch, _, s in collated))
    assert shares[1] < shares[0]


@pytest.mark.parametrize("seed", range(3))
def test_main_sees_every_image(lesson, insects_root, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=insects_root, batch_size=4)
    assert measured["seen"] == measured["length"] == 6
    assert 0 < measured["padded_share"] < 0.8
