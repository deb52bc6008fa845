import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def sample(load):
    return load("sample_data.py")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shapes_are_balanced_and_inside_their_boxes(sample, seed):
    images, labels, boxes = sample.draw_shapes(200, seed)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert (np.bincount(labels) == 20).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 32).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 4).all()


def test_the_box_holds_the_shape_and_nothing_else_of_it(sample):
    for polygons in sample.outlines().values():
        mask, (x0, y0, x1, y1) = sample.draw_mask(polygons, (14.0, 17.0), 9.0, 0.7)
        inside = mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
        assert inside.sum() == pytest.approx(mask.sum()) and mask.sum() > 20
        assert mask[:, int(x0)].any() and mask[int(y0)].any()
        assert mask[:, int(np.ceil(x1)) - 1].any() and mask[int(np.ceil(y1)) - 1].any()


def test_the_ten_outlines_differ(sample):
    masks = [sample.draw_mask(p, (16.0, 16.0), 12.0, 0.0)[0] for p in sample.outlines().values()]
    assert tuple(sample.outlines()) == sample.CLASSES
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert np.abs(a - b).sum() > 50


def test_a_seed_draws_the_same_and_splits_share_no_image(sample, images_root):
    again = sample.draw_shapes(800, [0, 0])[0]
    train, test = sample.Shapes10(images_root), sample.Shapes10(images_root, train=False)
    np.testing.assert_array_equal(train.data, again)
    assert not {image.tobytes() for image in train.data} & {image.tobytes() for image in test.data}


def test_colours_stand_out_from_the_ground(sample):
    rng = np.random.default_rng(0)
    grounds = rng.uniform(0, 255, (500, 3))
    distance = np.linalg.norm(sample.draw_colours(rng, grounds) - grounds, axis=1)
    assert distance.min() >= 99.9


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing key"])
def test_a_damaged_cache_is_drawn_again(sample, tmp_path, monkeypatch, damage):
    path = tmp_path / "shapes10.npz"
    sample.write_shapes10(path, train=20, test=10)
    whole = sample.Shapes10(tmp_path).data
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "foreign":
        path.write_bytes(b"not an archive")
    else:
        np.savez(path, train_images=whole)
    small = sample.write_shapes10
    monkeypatch.setattr(sample, "write_shapes10", lambda path: small(path, train=20, test=10))
    np.testing.assert_array_equal(sample.Shapes10(tmp_path).data, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["shapes10.npz"]


def test_a_write_that_fails_leaves_the_old_file(sample, tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(sample.DataError, match="No space left"), sample.write_whole(path) as beside:
        beside.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_insects_are_jpeg_files_of_several_sizes(sample, insects_root):
    folder = sample.hymenoptera(insects_root)
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 2 * (3 + 2)
    sizes = set()
    for path in files:
        with Image.open(path) as image:
            sizes.add(image.size)
            assert image.format == "JPEG"
    assert len(sizes) >= 3
    assert sample.class_folder(folder / "val", "bees") == folder / "val" / "bees"


def test_a_damaged_insect_is_drawn_again(sample, tmp_path, monkeypatch):
    small = sample.write_hymenoptera_sample
    monkeypatch.setattr(sample, "write_hymenoptera_sample", lambda f: small(f, train=1, val=1))
    folder = sample.hymenoptera(tmp_path)
    path = folder / "train" / "ants" / "ants_000.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert sample.hymenoptera(tmp_path) == folder
    assert path.read_bytes() == whole


def test_photographs_are_used_as_soon_as_they_lie_there(sample, insects_root):
    real = insects_root / "hymenoptera_data"
    (real / "train" / "ants_image").mkdir(parents=True)
    assert sample.hymenoptera(insects_root) == real
    assert "photographs" in sample.hymenoptera_source(real)
    with pytest.raises(sample.DataError, match="no images in"):
        sample.class_folder(real / "train", "ants")
    Image.new("RGB", (4, 4)).save(real / "train" / "ants_image" / "a.jpg")
    assert sample.class_folder(real / "train", "ants").name == "ants_image"


def test_main_measures_a_linear_classifier_near_chance(sample, tmp_path, images_root, insects_root):
    measured = sample.main(log_dir=tmp_path, root=images_root, insects_root=insects_root)
    assert measured["linear"] < 0.3
    assert measured["counts"] == [80] * 10
