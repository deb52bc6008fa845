import numpy as np
import pytest
import torch

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


def linear_accuracy(images, labels, steps=300):
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
    images, labels, _ = drawings.draw_shapes(4000, 0)
    assert linear_accuracy(images, labels) < 0.2
    white = np.zeros_like(images)  # one place, one angle, white on black: that it learns
    masks = [
        drawings.draw_mask(p, (16.0, 16.0), 11.0, 0.3)[0] for p in drawings.outlines().values()
    ]
    white += (255 * np.stack(masks)[labels, ..., None]).astype(np.uint8)
    assert linear_accuracy(white, labels) > 0.9
