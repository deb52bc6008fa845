from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def lesson(load):
    return load("generate_labels.py")


@pytest.fixture
def folder(insects_root):
    return insects_root / "hymenoptera_sample"


def stamps(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.*")}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("train/ants/0013035.jpg", "train/ants_label/0013035.txt"),
        ("val/bees/a.b.png", "val/bees_label/a.b.txt"),
        ("train/ants_image/x.jpeg", "train/ants_label/x.txt"),
    ],
)
def test_a_label_lies_beside_its_image(lesson, image, label):
    assert lesson.label_path(Path("data", image)) == Path("data", label)


def test_what_has_no_partner_is_found_by_its_stem(lesson):
    images = [Path("ants", name) for name in ("c.jpg", "a.png", "b.jpg", "d.jpg")]
    labels = [Path("ants_label", name) for name in ("x.txt", "b.txt", "a.txt")]
    assert lesson.find_unmatched(images, labels) == ([images[0], images[3]], [labels[0]])
    assert lesson.find_unmatched(images[1:3], labels[1:]) == ([], [])
    assert lesson.find_unmatched(images, []) == (images, [])
    assert lesson.find_unmatched([], labels) == ([], labels)


def test_labels_are_written_once_and_say_the_class(lesson, folder):
    counts = lesson.write_labels(folder)
    assert counts == {("train", "ants"): (3, 3), ("train", "bees"): (3, 3),
                      ("val", "ants"): (2, 2), ("val", "bees"): (2, 2)}  # fmt: skip
    for split, kind in counts:
        labels = sorted((folder / split / f"{kind}_label").iterdir())
        images = sorted((folder / split / kind).iterdir())
        assert [label.stem for label in labels] == [image.stem for image in images]
        assert {label.read_bytes() for label in labels} == {kind.encode()}
    before = stamps(folder)
    again = lesson.write_labels(folder)
    assert {written for _, written in again.values()} == {0}
    assert [count for count, _ in again.values()] == [3, 3, 2, 2]
    assert stamps(folder) == before


@pytest.mark.parametrize("text", ["bees", ""])
def test_a_label_that_is_there_is_kept_whatever_it_says(lesson, folder, text):
    label = folder / "train" / "ants_label" / "ants_001.txt"
    label.parent.mkdir()
    label.write_text(text, encoding="utf-8")
    assert lesson.write_labels(folder)["train", "ants"] == (3, 2)
    assert label.read_text(encoding="utf-8") == text


def test_try_deleted_labels_are_the_only_ones_written(lesson, folder, insects_root, capsys):
    lesson.main(root=insects_root)
    for label in (folder / "train" / "ants_label").glob("*2.txt"):
        label.unlink()
    kept = stamps(folder)
    measured = lesson.main(root=insects_root)
    written = [n for _, n in measured["first"].values()]
    assert written == [1, 0, 0, 0] and next(iter(measured["first"])) == ("train", "ants")
    assert {path: stamp for path, stamp in stamps(folder).items() if path in kept} == kept
    row = "train   ants         3        3         1                         0"
    assert row in capsys.readouterr().out


def test_older_copies_call_the_folder_ants_image(lesson, folder, insects_root):
    (folder / "train" / "ants").rename(folder / "train" / "ants_image")
    assert lesson.write_labels(folder)["train", "ants"] == (3, 3)
    assert (folder / "train" / "ants_label" / "ants_002.txt").is_file()
    _, datasets, same = lesson.show_image_folder(folder)
    assert same == 6 and datasets["TwoClasses(train)"].classes == ["ants_image", "bees"]


@pytest.mark.parametrize("state", ["empty", "missing", "other files"])
def test_a_class_without_images_is_an_error(lesson, folder, state):
    bees = folder / "val" / "bees"
    for path in bees.iterdir():
        path.unlink()
    if state == "missing":
        bees.rmdir()
    elif state == "other files":
        (bees / "notes.txt").write_text("none here", encoding="utf-8")
    with pytest.raises(lesson.DataError, match=r"no images in .*bees"):
        lesson.write_labels(folder)
    assert not list(folder.glob("*/*_label"))  # all or none


def test_a_label_without_its_image_is_an_error(lesson, folder):
    lesson.write_labels(folder)
    (folder / "train" / "bees" / "bees_001.jpg").unlink()
    (folder / "train" / "bees_label" / "bees_000.txt").unlink()
    with pytest.raises(lesson.DataError, match=r"bees_001\.txt has no image"):
        lesson.write_labels(folder)
    assert not (folder / "train" / "bees_label" / "bees_000.txt").exists()


def test_what_a_mac_leaves_beside_labels_is_no_label(lesson, folder):
    lesson.write_labels(folder)
    (folder / "train" / "bees_label" / "._bees_000.txt").write_bytes(b"\0")
    assert lesson.write_labels(folder)["train", "bees"] == (3, 0)


def test_an_image_that_cannot_be_opened_gets_no_label_nor_does_any_other(lesson, folder):
    path = folder / "val" / "bees" / "bees_001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(lesson.DataError, match=r"bees_001\.jpg is not a readable image"):
        lesson.write_labels(folder)
    assert not list(folder.glob("*/*_label"))


def test_two_images_for_one_label_are_an_error(lesson, folder):
    Image.new("RGB", (4, 4)).save(folder / "train" / "ants" / "ants_000.png")
    with pytest.raises(lesson.DataError, match="two images named ants_000"):
        lesson.write_labels(folder)


def test_image_folder_counts_label_folders_as_classes(lesson, folder, capsys):
    lesson.write_labels(folder)
    refused, datasets, same = lesson.show_image_folder(folder)
    assert "ants_label, bees_label" in refused and same == 6
    every, two = datasets.values()
    assert every.class_to_idx == {"ants": 0, "ants_label": 1, "bees": 2, "bees_label": 3}
    assert two.class_to_idx == {"ants": 0, "bees": 1}
    assert two.targets == [0, 0, 0, 1, 1, 1] and len(two) == len(every) == 6
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("4. Does ImageFolder need")
    assert [line.split()[-3:] for line in lines[3:5]] == [["4", "2", "6"], ["2", "1", "6"]]
    assert lines[-1].endswith("yet 6 of 6 labels are the same")


def test_a_corrected_label_is_not_the_folders(lesson, folder, capsys):
    lesson.write_labels(folder)
    (folder / "train" / "ants_label" / "ants_001.txt").write_text("bees", encoding="utf-8")
    assert lesson.show_image_folder(folder)[2] == 5
    assert "yet 5 of 6 labels are the same" in capsys.readouterr().out


def test_image_folder_needs_no_labels_as_long_as_there_are_none(lesson, folder):
    assert lesson.ImageFolder(folder / "train").classes == ["ants", "bees"]


def test_wrong_arguments_end_with_status_2(lesson):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(["ants"])
    assert stop.value.code == 2
    assert lesson.parse([]).download is False and lesson.parse(["--download"]).download is True


def test_download_comes_first(lesson, monkeypatch, tmp_path):
    monkeypatch.setattr(lesson, "download_hymenoptera", lambda root: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lesson.main(root=tmp_path, download=True)


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_what_it_finds(lesson, insects_root, folder, capsys, seed):
    measured = lesson.main(seed=seed, root=insects_root)
    assert measured["texts"] == {"a.txt": "ants", "b.txt": "bees", "c.txt": "ants"}
    alone, orphans = measured["unmatched"]
    assert [p.name for p in alone + orphans] == ["ants_000.jpg", "ants_001.txt"]
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:] == ["1.", "2.", "3.", "4."]
    assert len(lines) == 24 and sum("   -> " in line for line in lines) == 4
    assert lines[3:7] == [
        "   a.jpg   a.txt   ants", "   b.jpg   b.txt   bees", "   c.jpg   c.txt   ants",
        "   -> written: a.txt and c.txt; b.txt still says bees"]  # fmt: skip
    rows = [line.split() for line in lines[9:13]]
    assert rows == [
        ["train", "ants", "3", "3", "3", "0"], ["train", "bees", "3", "3", "3", "0"],
        ["val", "ants", "2", "2", "2", "0"], ["val", "bees", "2", "2", "2", "0"]]  # fmt: skip
    assert lines[13] == ("   -> 10 labels for 10 images; the second run wrote 0, and 0 images "
                         "were changed")  # fmt: skip
    assert lines[15].endswith(" ants_000.jpg") and lines[16].endswith(" ants_001.txt")
    assert lines[17] == "   -> 2 files have no partner; pairs left: 1"
