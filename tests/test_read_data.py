import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, random_split

from support.pictures import caption_row


@pytest.fixture
def lesson(load):
    return load("read_data.py")


@pytest.fixture
def train(lesson, insects_root):
    folder = insects_root / "hymenoptera_sample" / "train"
    lesson.write_missing_labels(folder)
    return folder


# --- the Dataset -------------------------------------------------------------------------------


def test_items_are_the_files_in_order_with_their_labels(lesson, train):
    bees = lesson.Insects(train, "bees")
    image, label = bees[1]
    with Image.open(train / "bees" / "bees_001.jpg") as file:
        width, height = file.size
        pixel = file.getpixel((5, 2))
    assert image.shape == (3, height, width) and image.dtype == torch.uint8
    assert tuple(image[:, 2, 5].tolist()) == pixel
    assert label == 1 and len(bees) == 3 and lesson.Insects(train, "ants")[0][1] == 0


def test_the_label_is_that_of_the_file_and_not_of_the_folder(lesson, train):
    (train / "ants_label" / "ants_001.txt").write_text("bees", encoding="utf-8")
    assert [label for _, label in lesson.Insects(train, "ants")] == [0, 1, 0]


def test_negative_places_work_and_others_are_refused(lesson, train):
    ants = lesson.Insects(train, "ants")
    assert torch.equal(ants[-1][0], ants[2][0])
    for index in (3, -4):
        with pytest.raises(IndexError):
            ants[index]


def test_an_image_is_opened_when_it_is_asked_for(lesson, train):
    ants = lesson.Insects(train, "ants")
    (train / "ants" / "ants_001.jpg").write_bytes(b"no image")
    assert len(ants) == 3 and ants[2][1] == 0
    with pytest.raises(lesson.DataError, match=r"ants_001\.jpg is not a readable image"):
        ants[1]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_mode_becomes_rgb(lesson, train, mode):
    path = train / "ants" / ("ants_000.jpg" if mode == "CMYK" else "ants_000.png")
    (train / "ants" / "ants_000.jpg").unlink()
    Image.new("RGB", (6, 4), (255, 0, 0)).convert(mode).save(path)
    assert lesson.Insects(train, "ants")[0][0].shape == (3, 4, 6)


def test_older_copies_call_the_folder_ants_image(lesson, train):
    (train / "ants").rename(train / "ants_image")
    assert lesson.Insects(train, "ants")[2][1] == 0
    assert lesson.TwoClasses(train).targets == [0, 0, 0, 1, 1, 1]


def test_missing_labels_are_written_and_others_kept(lesson, train):
    lost, kept = (train / "ants_label" / f"ants_00{i}.txt" for i in (1, 2))
    lost.unlink()
    kept.write_text("bees", encoding="utf-8")
    lesson.write_missing_labels(train)
    assert lost.read_bytes() == b"ants" and kept.read_bytes() == b"bees"
    assert (train / "bees_label" / "bees_000.txt").read_bytes() == b"bees"


# --- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "label"),
    [(b"ants", 0), (b"bees", 1), (b"bees\r\n", 1), (b"\n ants \t", 0), (b"\xef\xbb\xbfbees", 1)],
)
def test_labels_are_read_whatever_editor_wrote_them(lesson, tmp_path, content, label):
    path = tmp_path / "label.txt"
    path.write_bytes(content)
    assert lesson.read_label(path) == label


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"wasps", "says 'wasps': write ants or bees into it"),
        (b"Ants", "says 'Ants': write ants or bees into it"),
        (b"", "says '': write ants or bees into it"),
        ("ants".encode("utf-16"), "is not UTF-8: write ants or bees into it and save as UTF-8"),
        ("蚂蚁".encode("gbk"), "is not UTF-8: write ants or bees into it and save as UTF-8"),
        ("蚂蚁".encode(), "says '\\u8682\\u8681': write ants or bees into it"),
        ("ants".encode("utf-16-le"), "says 'a\\x00n\\x00t\\x00s\\x00': write ants or bees into it"),
        (None, "is missing: run python generate_labels.py"),
    ],
)
def test_other_labels_are_refused_in_one_line_that_names_the_file(lesson, tmp_path, content, line):
    path = tmp_path / "label.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(lesson.DataError) as refused:
        lesson.read_label(path)
    assert str(refused.value) == f"{path} {line}"


# --- ImageFolder and the split -----------------------------------------------------------------


def test_image_folder_has_the_same_items(lesson, train, capsys):
    both = lesson.Insects(train, "ants") + lesson.Insects(train, "bees")
    assert lesson.show_image_folder(train, both) == (6, 6)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].startswith("2. Does TwoClasses, an ImageFolder that skips")
    for i, line in enumerate(lines[3:9]):
        kind, shape = ("ants", "bees")[i // 3], tuple(both[i][0].shape)
        assert " ".join(line.split()) == f"{i} {kind} {kind} yes {shape}"
    last = "are the same: those whose label file names their folder"
    assert lines[-1] == f"   -> 6 of all 6 items {last}"


def test_all_items_are_compared_and_six_are_shown(lesson, train, monkeypatch, capsys):
    places, items = [], [(torch.zeros(3, 1, 1), 0)] * 15

    class Twin(list):
        def __getitem__(self, index):
            places.append(index)
            return torch.full((3, 1, 1), float(index == 4)), int(index == 5)

    monkeypatch.setattr(lesson, "TwoClasses", lambda *args, **options: Twin(items))
    assert lesson.show_image_folder(train, items) == (13, 15) and places == list(range(15))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[3:-1]] == [0, 3, 6, 9, 12]
    assert lines[-1].startswith("   -> 13 of all 15 items ")


def test_what_a_mac_leaves_beside_images_is_no_item(lesson, train):
    (train / "ants" / "._ants_000.jpg").write_bytes(b"\0\5\x16\7")
    both = lesson.Insects(train, "ants") + lesson.Insects(train, "bees")
    assert lesson.show_image_folder(train, both) == (6, 6)


def test_a_corrected_label_is_none_that_image_folder_knows(lesson, train, capsys):
    (train / "ants_label" / "ants_001.txt").write_text("bees", encoding="utf-8")
    both = lesson.Insects(train, "ants") + lesson.Insects(train, "bees")
    assert lesson.show_image_folder(train, both) == (5, 6)
    out = capsys.readouterr().out
    assert "-> 5 of all 6 items" in out and out.splitlines()[4].split()[1:4] == [
        "bees",
        "ants",
        "yes",
    ]


@pytest.mark.parametrize(("N", "val_count"), [(7, 2), (10, 5), (48, 12), (5, 0)])
def test_the_split_by_hand_is_torchs(lesson, N, val_count):
    g, twin = (torch.Generator().manual_seed(N) for _ in range(2))
    train, val = lesson.split_places(N, val_count, g)
    parts = random_split(range(N), [N - val_count, val_count], twin)
    assert (train, val) == (parts[0].indices, parts[1].indices)
    assert sorted(train + val) == list(range(N)) and len(val) == val_count
    assert all(type(i) is int for i in train)


@pytest.mark.parametrize("seed", range(3))
def test_the_table_of_the_split_counts_classes(lesson, train, capsys, seed):
    both = lesson.Insects(train, "ants") + lesson.Insects(train, "bees")
    splits = lesson.show_split(both, seed)
    lines, ants_seen = capsys.readouterr().out.splitlines(), set()
    assert len(lines) == 7 and lines[0].startswith(
        "3. Split 6 items at random: is an image in both"
    )
    for line, s in zip(lines[3:6], range(seed, seed + 3), strict=True):
        places = lesson.split_places(6, 1, torch.Generator().manual_seed(s))
        assert splits[s] == places
        count = sum(i < 3 for i in places[1])
        ants_seen.add(count)
        assert line.split() == [*map(str, (s, count, 1 - count, 0, 0)), "yes"]
    words = " or ".join(map(str, sorted(ants_seen)))
    assert (
        lines[6]
        == f"   -> random_split does not look at classes: of 1 to validate, {words} are ants"
    )


def test_random_parts_are_rarely_balanced():
    counts = []
    for s in range(200):
        _, val = random_split(range(48), [36, 12], torch.Generator().manual_seed(s))
        counts.append(sum(i < 24 for i in val))
    assert len(set(counts)) > 4 and sum(count == 6 for count in counts) < 100


def test_a_quarter_is_for_validation(lesson, capsys):
    both = ConcatDataset([[0] * 23, [0] * 25])
    splits = lesson.show_split(both, 4)
    assert list(splits) == [4, 5, 6] and all(len(val) == 12 for _, val in splits.values())
    ants = sorted({sum(i < 23 for i in val) for _, val in splits.values()})
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"of 12 to validate, {' or '.join(map(str, ants))} are ants")


def test_an_image_in_two_parts_is_counted(lesson, train, monkeypatch, capsys):
    both = lesson.Insects(train, "ants") + lesson.Insects(train, "bees")
    leaky = [SimpleNamespace(indices=[0, 1, 2, 3]), SimpleNamespace(indices=[3])]
    monkeypatch.setattr(lesson, "random_split", lambda *args: leaky)
    monkeypatch.setattr(lesson, "split_places", lambda *args: ([0, 1, 2, 3], [3]))
    lesson.show_split(both, 0)
    assert capsys.readouterr().out.splitlines()[3].split() == ["0", "0", "1", "1", "2", "yes"]


# --- batches -----------------------------------------------------------------------------------


def test_padding_leaves_every_image_whole(lesson):
    shapes = [(4, 9), (7, 2), (1, 3)]
    images = [torch.randint(1, 256, (3, h, w), dtype=torch.uint8) for h, w in shapes]
    batch, labels, sizes = lesson.pad_collate(list(zip(images, (1, 0, 1), strict=True)))
    assert batch.shape == (3, 3, 7, 9) and batch.dtype == torch.uint8
    assert labels.tolist() == [1, 0, 1] and [tuple(size) for size in sizes.tolist()] == shapes
    for padded, image, (height, width) in zip(batch, images, sizes, strict=True):
        assert torch.equal(padded[:, :height, :width], image)
        assert padded.count_nonzero() == image.numel()
    share = lesson.padded_share(sizes, batch)
    assert share == pytest.approx(1 - (36 + 14 + 3) / (3 * 63)) and type(share) is float


def test_a_batch_of_equal_images_has_no_padding(lesson):
    items = [(torch.full((3, 2, 5), 0.5 * i), i) for i in range(4)]
    batch, _, sizes = lesson.pad_collate(items)
    assert torch.equal(batch, torch.stack([image for image, _ in items]))
    assert lesson.padded_share(sizes, batch) == 0 and batch.dtype == torch.float32


def pixels(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_batches_are_printed_and_logged_as_they_are(lesson, tmp_path, capsys, events, seed):
    sizes = [(20 + 3 * i, 50 - i) for i in range(11)]
    dataset = [(torch.full((3, h, w), 20 * i + 9, dtype=torch.uint8), i % 2)
               for i, (h, w) in enumerate(sizes)]  # fmt: skip
    torch.manual_seed(seed)
    result = lesson.show_batches(dataset, 2, tmp_path)
    torch.manual_seed(seed)
    batches = list(DataLoader(dataset, 2, shuffle=True, collate_fn=lesson.pad_collate))
    shares = [lesson.padded_share(hw, batch) for batch, _, hw in batches]
    assert result["seen"] == 11 and result["shares"] == pytest.approx(shares)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4. Batches of 2 images of unequal size: how much is padding?"
    assert lines[1] == f"   the default collate_fn says: {result['refused']}"
    assert "equal size" in result["refused"] and result["kept"] == 2
    assert lines[2] == "   pad_collate keeps every pixel of 2 of the same 2 images"
    mean = sum(shares) / 6
    last = f"   -> 11 images in 6 batches; the average padded share is {mean:.2f}"
    assert len(lines) == 11 and lines[10] == last

    loaded = events(tmp_path / "shuffled")
    points = [(e.step, e.value) for e in loaded.Scalars("batch/padded_share")]
    assert points == [(i, pytest.approx(share)) for i, share in enumerate(shares)]
    pictures = loaded.Images("batch/padded")
    assert [e.step for e in pictures] == list(range(6))
    for step, (batch, labels, hw) in enumerate(batches):
        (h0, w0), (h1, w1) = hw.amin(0).tolist(), hw.amax(0).tolist()
        row = f"{step:5d}   {h0:4d} to {h1:4d}   {w0:4d} to {w1:4d}   {tuple(batch.shape)!s:<19}"
        assert lines[step + 4].strip() == f"{row}   {shares[step]:12.2f}".strip()
        words = [f"{lesson.CLASSES[y]}\n{h} x {w}" for y, (h, w) in zip(labels, hw, strict=True)]
        title = f"Batch {step}, {tuple(batch.shape)}: black is padding"
        assert np.array_equal(pixels(pictures[step]), caption_row(title, batch, words, height=96))


def test_of_many_batches_six_are_shown_and_all_are_counted(lesson, tmp_path, capsys, events):
    dataset = [(torch.ones(3, 4, 5, dtype=torch.uint8), 0)] * 8
    result = lesson.show_batches(dataset, 1, tmp_path)
    assert result == {"seen": 8, "refused": result["refused"], "kept": 1, "shares": [0.0] * 8}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[1].endswith(
        "no error, the first images happen to have one size"
    )
    assert len(events(tmp_path / "shuffled").Images("batch/padded")) == 6


def test_an_image_that_was_changed_is_not_kept(lesson, tmp_path, monkeypatch, capsys):
    def wrong(items):
        batch, labels, sizes = pad(items)
        return batch.index_fill(0, torch.tensor([0]), 7), labels, sizes

    pad = lesson.pad_collate
    monkeypatch.setattr(lesson, "pad_collate", wrong)
    dataset = [(torch.ones(3, 4, 5 + i, dtype=torch.uint8), 0) for i in range(3)]
    assert lesson.show_batches(dataset, 3, tmp_path)["kept"] == 2
    assert "every pixel of 2 of the same 3 images" in capsys.readouterr().out


# --- main --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_try_smaller_batches_have_less_padding(lesson, edited, insects_root, tmp_path, seed):
    copy = edited(lesson, "batch_size=8):", "batch_size=2):")
    copy.main(seed, tmp_path / "main", insects_root)
    torch.manual_seed(seed)
    sizes = [(375, 500), (500, 375), (240, 320), (256, 256), (300, 400)]  # as they are drawn
    dataset = [(torch.zeros(3, *sizes[i % 5], dtype=torch.uint8), 0) for i in range(48)]
    means = {}
    for B in (8, 2):
        shares = lesson.show_batches(dataset, B, tmp_path / str(B))["shares"]
        means[B] = sum(shares) / len(shares)
        assert B == 2 or min(shares) > 0.1
    assert 0.38 < means[8] < 0.56 and means[2] < means[8] * 2 / 3


def test_batches_of_like_sizes_have_no_padding(lesson):
    sizes = torch.tensor([(375, 500), (500, 375), (240, 320), (256, 256)]).repeat(8, 1).tolist()
    shares = []
    for order in (sizes, sorted(sizes)):
        items = [(torch.zeros(3, *hw, dtype=torch.uint8), 0) for hw in order]
        batches = [lesson.pad_collate(items[i : i + 8]) for i in range(0, 32, 8)]
        shares.append(sum(lesson.padded_share(hw, batch) for batch, _, hw in batches) / 4)
    assert shares[0] > 0.4 and shares[1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_main_sees_every_image(lesson, insects_root, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=insects_root, batch_size=4)
    assert measured["length"] == measured["batches"]["seen"] == 6
    assert measured["same"] == (6, 6) and list(measured["splits"]) == [seed, seed + 1, seed + 2]
    assert all(0 <= share < 0.8 for share in measured["batches"]["shares"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:-1] == ["1.", "2.", "3.", "4."]
    assert sum("   -> " in line for line in lines) == 4
    shapes = [tuple(lesson.Insects(insects_root / "hymenoptera_sample/train", kind)[i][0].shape)
              for kind, i in (("ants", 0), ("ants", 1), ("bees", 0), ("bees", 2))]  # fmt: skip
    for line, place, shape, kind in zip(
        lines[3:7], (0, 1, 3, -1), shapes, ("ants", "ants", "bees", "bees"), strict=True
    ):
        label = ["ants", "bees"].index(kind)
        assert re.fullmatch(rf"   both\[{place}\] +{re.escape(str(shape))} +{label}   {kind}", line)
    assert lines[7] == "   -> len(both) is 6: 3 ants, then 3 bees"
