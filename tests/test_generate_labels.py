from itertools import product
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
    for split, class_name in counts:
        labels = sorted((folder / split / f"{class_name}_label").iterdir())
        images = sorted((folder / split / class_name).iterdir())
        assert [label.stem for label in labels] == [image.stem for image in images]
        assert {label.read_bytes() for label in labels} == {class_name.encode()}
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


def test_try_a_label_that_says_nothing_is_kept(lesson, edited, insects_root, capsys):
    copied = edited(lesson, 'corrected.write_text("bees", e', 'corrected.write_text("", e')
    measured = copied.main(root=insects_root)
    assert [new for _, new in measured["counts"]["first"].values()] == [2, 0, 0, 0]
    assert measured["counts"]["changed"] == []
    assert measured["other"] == {"ants_000.jpg": ("", "ants")}
    words = "ants_000.jpg: its label file says '', ImageFolder says 'ants'"
    assert words in capsys.readouterr().out


def test_only_the_missing_labels_of_the_copy_are_written(lesson, folder, tmp_path, capsys):
    lesson.write_labels(folder)
    kept = stamps(folder)
    copy, counts = lesson.show_labels(folder, tmp_path, remove=1)
    assert copy == tmp_path / folder.name and stamps(folder) == kept
    assert [list(rows.values()) for rows in (counts["data"], counts["first"])] == [
        [(3, 0), (3, 0), (2, 0), (2, 0)], [(3, 1), (3, 0), (2, 0), (2, 0)]]  # fmt: skip
    assert (copy / "train" / "ants_label" / "ants_000.txt").read_bytes() == b"bees"
    assert (copy / "train" / "ants_label" / "ants_001.txt").read_bytes() == b"ants"
    out = capsys.readouterr().out
    assert "\n   1 labels were removed and one was corrected" in out
    assert "\n   train   ants         3        2             1              0\n" in out
    assert "-> 1 written, then 0; other files that changed: 0\n" in out
    assert "-> the data itself has 10 images and 10 labels\n" in out


def test_a_label_that_the_data_lack_is_told(lesson, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "write_labels", lambda folder: dict.fromkeys(
        [(split, c) for split in lesson.SPLITS for c in lesson.CLASSES], (2, 0)))  # fmt: skip
    for split, c in product(lesson.SPLITS, lesson.CLASSES):
        for image in (folder / split / c).iterdir():
            lesson.label_path(image).parent.mkdir(exist_ok=True)
            lesson.label_path(image).touch()
    (folder / "val" / "bees_label" / "bees_001.txt").unlink()
    lesson.show_labels(folder, tmp_path)
    assert "-> the data itself has 8 images and 9 labels\n" in capsys.readouterr().out


def test_a_label_that_is_overwritten_is_seen(lesson, folder, tmp_path, monkeypatch):
    def careless(folder):
        for split, class_name in product(lesson.SPLITS, lesson.CLASSES):
            for image in (folder / split / class_name).iterdir():
                label = lesson.label_path(image)
                label.parent.mkdir(exist_ok=True)
                label.write_text(class_name, encoding="utf-8")
        return {(split, c): (2, 0) for split in lesson.SPLITS for c in lesson.CLASSES}

    monkeypatch.setattr(lesson, "write_labels", careless)
    with pytest.raises(AssertionError):
        lesson.show_labels(folder, tmp_path)


def test_older_copies_call_the_folder_ants_image(lesson, folder, insects_root):
    (folder / "train" / "ants").rename(folder / "train" / "ants_image")
    assert lesson.write_labels(folder)["train", "ants"] == (3, 3)
    assert (folder / "train" / "ants_label" / "ants_002.txt").is_file()
    _, _, two, other = lesson.show_image_folder(folder)
    assert other == {} and two.classes == ["ants_image", "bees"]


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


def test_the_labels_of_one_image_are_all_in_its_label_folder(lesson, folder):
    lesson.write_labels(folder)
    labels = lesson.label_files([folder / "train" / "bees" / "bees_001.jpg"])
    assert [label.name for label in labels] == [f"bees_00{i}.txt" for i in range(3)]


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


def test_what_has_no_partner_is_mended_or_stops_the_script(lesson, folder, capsys):
    lesson.write_labels(folder)
    before = {path: content for path, (_, content) in stamps(folder).items()}
    answers = lesson.show_unmatched(folder)
    orphan = Path("ants_label", "ants_002.txt")
    assert answers == {
        "ants_001.txt deleted": ("ants_001.jpg", "-", "writes 1"),
        "ants_002.jpg deleted": (
            "-", "ants_002.txt", f"{orphan} has no image: delete it, or bring the image back"),
        "ants_000.png added": (
            "-", "-", "ants has two images named ants_000: one label cannot serve both"),
    }  # fmt: skip
    assert {path: content for path, (_, content) in stamps(folder).items()} == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("3. What becomes of a file without a partner?")
    for line, (done, row) in zip(lines[3:6], answers.items(), strict=True):
        assert " ".join(line.split()) == f"{done} {' '.join(row)}"
    assert lines[6] == "   -> 1 of 3 is mended; the others stop the script in one line"


def test_image_folder_counts_label_folders_as_classes(lesson, folder, capsys):
    lesson.write_labels(folder)
    refused, every, two, other = lesson.show_image_folder(folder)
    assert refused.startswith("FileNotFoundError: ") and refused.endswith("ants_label, bees_label")
    assert every.class_to_idx == {"ants": 0, "ants_label": 1, "bees": 2, "bees_label": 3}
    assert two.class_to_idx == {"ants": 0, "bees": 1}
    assert two.targets == [0, 0, 0, 1, 1, 1] and len(two) == len(every) == 6 and other == {}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[0].startswith("4. Does ImageFolder need")
    assert lines[2].endswith(refused)
    assert [line.split()[-2:] for line in lines[3:5]] == [["4", "2"], ["2", "1"]]
    assert lines[1].endswith("classes   bees has the number")
    assert (
        lines[5]
        == "   -> ImageFolder reads no label file; 6 of 6 label files say the same as the folder"
    )
    assert "bees is class 2, not 1, without an error:" in lines[6]


def test_a_corrected_label_is_not_the_folders(lesson, folder, capsys):
    lesson.write_labels(folder)
    (folder / "train" / "ants_label" / "ants_001.txt").write_text("bees", encoding="utf-8")
    *_, other = lesson.show_image_folder(folder)
    assert other == {"ants_001.jpg": ("bees", "ants")}
    out = capsys.readouterr().out
    assert "   ants_001.jpg: its label file says 'bees', ImageFolder says 'ants'\n" in out
    assert "no label file; 5 of 6 label files say the same as the folder" in out


def test_label_folders_are_moved_outside_train(lesson, folder):
    lesson.write_labels(folder)
    lesson.show_image_folder(folder)
    assert not list(folder.glob("train/*_label")) and len(list(folder.glob("*_label/*.txt"))) == 6


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
    assert measured["texts"] == (
        {"b.txt": "bees"}, {"a.txt": "ants", "b.txt": "bees", "c.txt": "ants"})  # fmt: skip
    mended, *stopped = (answer for *_, answer in measured["unmatched"].values())
    assert mended == "writes 1" and all(stop.startswith("ants") for stop in stopped)
    assert len(list(folder.glob("*/*_label/*.txt"))) == 10  # the data, not only the copy
    assert (folder / "train" / "ants_label" / "ants_000.txt").read_bytes() == b"ants"
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:] == ["1.", "2.", "3.", "4."]
    assert sum("   -> " in line for line in lines) == 6
    assert lines[3:7] == [
        "   a.jpg   a.txt   (no file)     ants", "   b.jpg   b.txt   bees          bees",
        "   c.jpg   c.txt   (no file)     ants",
        "   -> labels written: 2; kept as they were: b.txt"]  # fmt: skip
    assert lines[8].startswith("   2 labels were removed")
    assert [line.split() for line in lines[11:15]] == [
        ["train", "ants", "3", "1", "2", "0"], ["train", "bees", "3", "3", "0", "0"],
        ["val", "ants", "2", "2", "0", "0"], ["val", "bees", "2", "2", "0", "0"]]  # fmt: skip
    assert lines[15:17] == [
        "   -> 2 written, then 0; other files that changed: 0",
        "   -> the data itself has 10 images and 10 labels"]  # fmt: skip
    assert measured["classes"] == (["ants", "ants_label", "bees", "bees_label"], ["ants", "bees"])
    assert measured["other"] == {"ants_000.jpg": ("bees", "ants")}
