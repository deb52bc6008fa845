import random

import numpy as np
import pytest
import torch
from PIL import Image

from support import drawings


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shapes_are_balanced_and_inside_their_boxes(seed):
    images, labels, boxes = drawings.draw_shapes(200, seed)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert (np.bincount(labels) == 20).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 32).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 4).all()


def test_the_box_holds_the_shape_and_nothing_else_of_it():
    for polygons in drawings.outlines().values():
        mask, (x0, y0, x1, y1) = drawings.draw_mask(polygons, (14.0, 17.0), 9.0, 0.7)
        inside = mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
        assert inside.sum() == pytest.approx(mask.sum()) and mask.sum() > 20
        assert mask[:, int(x0)].any() and mask[int(y0)].any()
        assert mask[:, int(np.ceil(x1)) - 1].any() and mask[int(np.ceil(y1)) - 1].any()


def test_the_ten_outlines_differ():
    masks = [
        drawings.draw_mask(p, (16.0, 16.0), 12.0, 0.0)[0] for p in drawings.outlines().values()
    ]
    assert tuple(drawings.outlines()) == drawings.CLASSES
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert np.abs(a - b).sum() > 50


def test_a_seed_draws_the_same_and_splits_share_no_image(images_root):
    again = drawings.draw_shapes(800, [0, 0])[0]
    train, test = drawings.Shapes10(images_root), drawings.Shapes10(images_root, train=False)
    np.testing.assert_array_equal(train.data, again)
    assert not {image.tobytes() for image in train.data} & {image.tobytes() for image in test.data}


def test_colours_stand_out_from_the_ground():
    rng = np.random.default_rng(0)
    grounds = rng.uniform(0, 255, (500, 3))
    distance = np.linalg.norm(drawings.draw_colours(rng, grounds) - grounds, axis=1)
    assert distance.min() >= 99.9


def grounds_of(n, seed):
    """The grounds that draw_shapes draws first, and their mean colours."""
    rng = np.random.default_rng(seed)
    rng.permutation(n)
    return drawings.draw_grounds(rng, n)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_clutter_and_noise_all_outside_the_box_is_ground(monkeypatch, seed):
    real = drawings.draw_clutter
    with_clutter = drawings.draw_shapes(60, seed, noise=0)[0]
    monkeypatch.setattr(drawings, "draw_clutter", lambda rng: 0 * real(rng))
    images, _, boxes = drawings.draw_shapes(60, seed, noise=0)
    grounds = grounds_of(60, seed)[0].clip(0, 255).astype(np.uint8)
    y, x = np.mgrid[0:32, 0:32]
    for image, ground, cluttered, (x0, y0, x1, y1) in zip(
        images, grounds, with_clutter, boxes, strict=True
    ):
        inside = (x + 1 > x0) & (x < x1) & (y + 1 > y0) & (y < y1)
        np.testing.assert_array_equal(image[~inside], ground[~inside])
        changed = (image != ground).any(2)
        assert changed[inside].mean() > 0.2 and changed[int(y0)].any() and changed[:, int(x0)].any()
        assert 0 < (cluttered != image).any(2).mean() < 0.4  # lines and dots are thin


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_shape_lies_over_the_clutter_in_one_colour_that_stands_out(seed):
    images, labels, boxes = drawings.draw_shapes(200, seed, noise=0)
    means = grounds_of(200, seed)[1]
    filled = np.isin(labels, [drawings.CLASSES.index(c) for c in ("circle", "square", "cross")])
    for image, box, mean in zip(images[filled], boxes[filled], means[filled], strict=True):
        x, y = ((box[:2] + box[2:]) / 2).round().astype(int)
        patch = image[y - 1 : y + 1, x - 1 : x + 1].reshape(-1, 3)
        assert (patch == patch[0]).all()
        assert np.linalg.norm(patch[0] - mean) > 98  # 100, cut to whole numbers


def test_noise_is_added_last_with_the_deviation_that_is_asked():
    for noise in (12.0, 30.0):
        plain, labels, _ = drawings.draw_shapes(100, 3, noise=0)
        noisy, same, _ = drawings.draw_shapes(100, 3, noise=noise)
        inner = (plain > 100) & (plain < 155)
        off = noisy[inner].astype(float) - plain[inner]
        assert off.std() == pytest.approx(noise, rel=0.05) and abs(off.mean()) < 1
        np.testing.assert_array_equal(labels, same)
    np.testing.assert_array_equal(
        drawings.draw_shapes(9, 3)[0], drawings.draw_shapes(9, 3, noise=12.0)[0]
    )


def test_half_of_the_grounds_are_striped_and_all_are_gradients():
    grounds, means = drawings.draw_grounds(np.random.default_rng(0), 400)
    assert grounds.shape == (400, 32, 32, 3) and means.shape == (400, 3)
    bent = np.abs(np.diff(grounds, 2, axis=1)).max((1, 2, 3)) > 1e-2  # a gradient is straight
    bent |= np.abs(np.diff(grounds, 2, axis=2)).max((1, 2, 3)) > 1e-2
    assert 0.4 < bent.mean() < 0.6
    np.testing.assert_allclose(grounds[~bent].mean((1, 2)), means[~bent], atol=6)
    slopes = grounds[~bent][:, 0, -1] - grounds[~bent][:, 0, 0]
    assert (np.abs(slopes).max(1) > 10).mean() > 0.7


def test_shapes_have_any_place_size_and_angle():
    _, labels, boxes = drawings.draw_shapes(800, 0)
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    assert (centre.std(0) > 2).all() and np.abs(centre.mean(0) - 16).max() < 0.5
    circles = size[labels == drawings.CLASSES.index("circle")]
    assert circles.min() < 17.5 and circles.max() > 24.5
    shape = size[labels == drawings.CLASSES.index("semicircle")]
    wide = shape[:, 0] / shape[:, 1]  # 2 as drawn, 1 / 2 after a quarter turn
    assert wide.max() > 1.7 and wide.min() < 0.6


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing key"])
def test_a_damaged_cache_is_drawn_again(tmp_path, monkeypatch, damage):
    path = tmp_path / "shapes10.npz"
    drawings.write_shapes10(path, train=20, test=10)
    whole = drawings.Shapes10(tmp_path).data
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "foreign":
        path.write_bytes(b"not an archive")
    else:
        np.savez(path, train_images=whole)
    small = drawings.write_shapes10
    monkeypatch.setattr(drawings, "write_shapes10", lambda path: small(path, train=20, test=10))
    np.testing.assert_array_equal(drawings.Shapes10(tmp_path).data, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["shapes10.npz"]


def test_a_cache_with_one_flipped_bit_is_never_read_as_other_images(tmp_path):
    path, rng = tmp_path / "shapes10.npz", random.Random(0)
    drawings.write_shapes10(path, train=10, test=10)
    whole, refused = path.read_bytes(), 0
    true = {split: drawings.read_shapes10(path, split) for split in ("train", "test")}
    for _ in range(100):
        place, content = rng.randrange(len(whole)), bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        for split, expected in true.items():
            arrays = drawings.read_shapes10(path, split)
            refused += arrays is None
            for got, array in zip(arrays or (), expected, strict=arrays is not None):
                np.testing.assert_array_equal(got, array, strict=True)
    assert refused >= 80


def test_an_item_is_a_picture_through_the_transform_and_its_label(images_root):
    plain = drawings.Shapes10(images_root)
    turned = drawings.Shapes10(images_root, transform=lambda image: image.rotate(180))
    for i in (0, 7):
        image, label = plain[i]
        np.testing.assert_array_equal(np.asarray(image), plain.data[i])
        np.testing.assert_array_equal(np.asarray(turned[i][0]), plain.data[i][::-1, ::-1])
        assert label == plain.targets[i] == turned[i][1]
    assert (len(plain), plain.classes) == (800, list(drawings.CLASSES))
    assert np.bincount(plain.targets).tolist() == [80] * 10


def test_bees_are_yellow_and_ants_are_dark():
    shares = {}
    for kind in ("ants", "bees"):
        for seed in range(6):
            picture = drawings.draw_insect(kind, (200, 150), np.random.default_rng(seed))
            assert picture.size == (200, 150)
            x = np.asarray(picture).astype(int)
            yellow = (x[..., 0] > 190) & (x[..., 2] < 60)
            dark = x.max(2) < 75
            shares[kind, seed] = yellow.mean(), dark.mean()
    assert all((share[0] > 0.01) == (kind == "bees") for (kind, _), share in shares.items()), shares
    assert all(share[1] > 0.01 for share in shares.values()), shares


def test_the_sample_is_the_same_for_a_seed_and_any_change_in_it_is_seen(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        drawings.write_hymenoptera_sample(tmp_path / name, train=2, val=1, seed=seed)
    a, b, c = (sorted(p.read_bytes() for p in (tmp_path / n).rglob("*.jpg")) for n in "abc")
    assert a == b and len(set(a)) == 6 and not set(a) & set(c)
    names = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.jpg")}
    assert names == {f"{split}/{kind}/{kind}_{i:03d}.jpg" for split, n in (("train", 2), ("val", 1))
                     for kind in ("ants", "bees") for i in range(n)}  # fmt: skip
    assert drawings.sample_is_whole(tmp_path / "a")
    path = tmp_path / "a" / "val" / "bees" / "bees_000.jpg"
    Image.new("RGB", (9, 9)).save(path)
    assert not drawings.sample_is_whole(tmp_path / "a")
    (tmp_path / "b" / "val" / "bees" / "bees_000.jpg").unlink()
    (tmp_path / "c" / "manifest.json").write_text("[]", encoding="utf-8")
    assert not drawings.sample_is_whole(tmp_path / "b")
    assert not drawings.sample_is_whole(tmp_path / "c")
    assert not drawings.sample_is_whole(tmp_path / "none")


def linear_accuracy(images, labels, steps=150):
    """Test accuracy of softmax regression on pixels, after `steps` of Adam on batches of 256."""
    x, y = torch.tensor(images).flatten(1).float() / 255 - 0.5, torch.tensor(labels)
    linear = torch.nn.Linear(3 * 32 * 32, 10)
    optimizer = torch.optim.Adam(linear.parameters(), 1e-3)
    for _ in range(steps):
        batch = torch.randint(len(x) // 2, (256,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(x[batch]), y[batch]).backward()
        optimizer.step()
    test = slice(len(x) // 2, None)
    return (linear(x[test]).argmax(1) == y[test]).float().mean().item()


def test_a_linear_classifier_stays_near_chance_because_any_colour_may_be_any_shapes():
    torch.manual_seed(0)
    images, labels, _ = drawings.draw_shapes(2000, 0)
    assert linear_accuracy(images, labels) < 0.2
    white = np.zeros_like(images)  # one place, one angle, white on black: that it learns
    masks = [
        drawings.draw_mask(p, (16.0, 16.0), 11.0, 0.3)[0] for p in drawings.outlines().values()
    ]
    white += (255 * np.stack(masks)[labels, ..., None]).astype(np.uint8)
    assert linear_accuracy(white, labels) > 0.9
