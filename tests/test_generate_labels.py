import pytest


@pytest.fixture
def lesson(load):
    return load("generate_labels.py")


def test_a_second_run_writes_nothing_and_touches_nothing(lesson, insects_root):
    measured = lesson.main(root=insects_root)
    folder = insects_root / "hymenoptera_sample"
    assert measured["first"] == {
        ("train", "ants"): (3, 3), ("train", "bees"): (3, 3),
        ("val", "ants"): (2, 2), ("val", "bees"): (2, 2)}  # fmt: skip
    label = folder / "train" / "bees_label" / "bees_001.txt"
    assert label.read_text(encoding="utf-8") == "bees"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert all(written == 0 for _, written in lesson.main(root=insects_root)["first"].values())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before


def test_try_a_deleted_label_is_the_only_one_written(lesson, insects_root):
    folder = insects_root / "hymenoptera_sample"
    lesson.write_labels(folder)
    (folder / "val" / "ants_label" / "ants_000.txt").unlink()
    written = {key: n for key, (_, n) in lesson.write_labels(folder).items() if n}
    assert written == {("val", "ants"): 1}


def test_older_copies_call_the_folder_ants_image(lesson, insects_root):
    folder = insects_root / "hymenoptera_sample"
    (folder / "train" / "ants").rename(folder / "train" / "ants_image")
    assert lesson.write_labels(folder)["train", "ants"] == (3, 3)
    assert (folder / "train" / "ants_label" / "ants_002.txt").is_file()


@pytest.mark.parametrize("state", ["empty", "missing", "other files"])
def test_a_class_without_images_is_an_error(lesson, insects_root, state):
    folder = insects_root / "hymenoptera_sample" / "val" / "bees"
    for path in folder.iterdir():
        path.unlink()
    if state == "missing":
        folder.rmdir()
    elif state == "other files":
        (folder / "notes.txt").write_text("none here", encoding="utf-8")
    with pytest.raises(lesson.DataError, match=r"no images in .*bees"):
        lesson.write_labels(folder.parents[1])


def test_a_label_without_its_image_is_an_error(lesson, insects_root):
    folder = insects_root / "hymenoptera_sample"
    lesson.write_labels(folder)
    (folder / "train" / "bees" / "bees_001.jpg").unlink()
    with pytest.raises(lesson.DataError, match=r"bees_001\.txt has no image"):
        lesson.write_labels(folder)


def test_two_images_for_one_label_are_an_error(lesson, insects_root):
    folder = insects_root / "hymenoptera_sample" / "train" / "ants"
    (folder / "ants_000.png").write_bytes(b"")
    with pytest.raises(lesson.DataError, match="two images named ants_000"):
        lesson.write_labels(folder.parents[1])


def test_wrong_arguments_end_with_status_2(lesson):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(["ants"])
    assert stop.value.code == 2
