"""Draws what the notes fall back on where there is no real data: Shapes-10, and ants and bees.

Shapes-10 has CIFAR-10's form (32 x 32 RGB, ten balanced classes) and one thing more, the box of
each shape. The ants and bees are JPEG files of several sizes, laid out like hymenoptera_data.

    x = ground;  x <- x + mask (colour - x), for the clutter, then for the shape;  x + N(0, 12^2)
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from support.files import DATASET2, write_whole

CLASSES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "arrow",
           "semicircle")  # fmt: skip
SIZE, FINE = 32, 4  # pixels a side; masks are drawn FINE times larger, then averaged


# --- Shapes-10 ---------------------------------------------------------------------------------


def arc(start, stop, radius=1.0, centre=(0.0, 0.0), points=32):
    """Points (n, 2) on a circle, from angle `start` to `stop` in turns."""
    angle = np.linspace(start, stop, points) * 2 * math.pi
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius + centre


def outlines():
    """For each class the polygons (n, 2), in the unit disc, that are filled with 1, then with 0."""
    circle, corners = arc(0, 1), np.linspace(0, 1, 11)[:-1]
    star = np.concatenate(
        [arc(t, t, 1.0 if i % 2 == 0 else 0.42, points=1) for i, t in enumerate(corners)]
    )
    a, b = 0.32, 0.95  # half the cross's thickness and length
    quarter = np.array([(a, -b), (a, -a), (b, -a)])  # of the cross, turned four times
    turn = np.array([[0, 1], [-1, 0]])
    cross = np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])
    arrow = [(1, 0), (0.1, 0.8), (0.1, 0.3), (-0.95, 0.3), (-0.95, -0.3), (0.1, -0.3), (0.1, -0.8)]
    t = np.linspace(0, 2 * math.pi, 40)
    heart_y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    heart = np.stack([16 * np.sin(t) ** 3, heart_y], 1) / 17
    return {
        "circle": [circle],
        "ring": [circle, circle * 0.55],
        "square": [arc(0, 1, points=5)],
        "triangle": [arc(0, 1, points=4)],
        "star": [star],
        "cross": [cross],
        "heart": [heart],
        "crescent": [circle, arc(0, 1, 0.85, (0.45, 0))],
        "arrow": [np.array(arrow)],
        "semicircle": [arc(0, 0.5) - (0, 0.4)],
    }


def draw_mask(polygons, place, radius, angle):
    """A shape as an antialiased mask (32, 32) in [0, 1], and its box (x0, y0, x1, y1) in pixels."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    mask = Image.new("L", (SIZE * FINE, SIZE * FINE))
    pen = ImageDraw.Draw(mask)
    for polygon, fill in zip(polygons, (255, 0), strict=False):
        corners = polygon @ turn.T * radius + place  # (n, 2)
        pen.polygon([tuple(corner) for corner in corners * FINE], fill=fill)
    return np.asarray(mask.reduce(FINE), np.float32) / 255, np.array(mask.getbbox()) / FINE


def draw_clutter(rng):
    """Two lines and three dots as a mask (32, 32) in [0, 1]: thin things that are no shape."""
    mask = Image.new("L", (SIZE * 2, SIZE * 2))
    pen = ImageDraw.Draw(mask)
    for x0, y0, x1, y1 in rng.uniform(0, SIZE * 2, (2, 4)):
        pen.line((x0, y0, x1, y1), fill=int(rng.integers(100, 256)), width=2)
    for x, y in rng.uniform(0, SIZE * 2, (3, 2)):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=255)
    return np.asarray(mask.reduce(2), np.float32) / 255


def draw_grounds(rng, n):
    """Colour gradients, half of them striped, (n, 32, 32, 3) in [0, 255]; mean colours (n, 3)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE - 0.5
    angle, wave, phase = rng.uniform(0, 2 * math.pi, (3, n, 1, 1)).astype(np.float32)
    slope = np.cos(angle) * x + np.sin(angle) * y  # (n, 32, 32)
    stripes = 0.3 * np.sin((6 + 4 * wave) * (np.cos(wave) * x + np.sin(wave) * y) + phase)
    t = 0.5 + slope + stripes * (rng.random((n, 1, 1)) < 0.5)
    ends = rng.uniform(0, 255, (2, n, 1, 1, 3)).astype(np.float32)
    return ends[0] + (ends[1] - ends[0]) * t[..., None], ends.mean(0)[:, 0, 0]


def draw_colours(rng, grounds):
    """A colour in [0, 255] for each of the grounds (n, 3): any that stands out by 100 or more."""
    colours = rng.uniform(0, 255, grounds.shape)
    while (close := np.linalg.norm(colours - grounds, axis=1) < 100).any():
        colours[close] = rng.uniform(0, 255, (close.sum(), 3))
    return colours.astype(np.float32)


def draw_shapes(n, seed, noise=12.0):
    """`n` balanced images (n, 32, 32, 3) uint8, labels (n,) and boxes (n, 4) float32 in pixels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(CLASSES))
    grounds, means = draw_grounds(rng, n)
    polygons = list(outlines().values())
    alphas, clutter, boxes = [], [], []
    for label in labels:
        radius = rng.uniform(8, 13)
        place = rng.uniform(radius, SIZE - radius, 2)
        alpha, box = draw_mask(polygons[label], place, radius, rng.uniform(0, 2 * math.pi))
        alphas.append(alpha)
        boxes.append(box)
        clutter.append(draw_clutter(rng))
    images = grounds
    for masks in (clutter, alphas):  # the shape lies over the clutter
        colours = draw_colours(rng, means)[:, None, None]
        images = images + np.stack(masks)[..., None] * (colours - images)
    images = images + noise * rng.standard_normal(images.shape, np.float32)
    return images.clip(0, 255).astype(np.uint8), labels, np.stack(boxes).astype(np.float32)


def write_shapes10(path, train=10_000, test=2_000, seed=0):
    """Draw both splits, from different streams of `seed`, and cache them at `path` as .npz."""
    arrays = {}
    for split, (name, n) in enumerate({"train": train, "test": test}.items()):
        drawn = draw_shapes(n, [seed, split])
        arrays |= {
            f"{name}_{key}": a for key, a in zip(("images", "labels", "boxes"), drawn, strict=True)
        }
    with write_whole(path) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)


def read_shapes10(path, split):
    """images, labels, boxes of one split; None if the cache is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return tuple(arrays[f"{split}_{key}"] for key in ("images", "labels", "boxes"))
    except Exception:  # whatever is wrong with a cache, the answer is to draw it again
        return None


class Shapes10(Dataset):
    """Shapes-10 with the interface of torchvision.datasets.CIFAR10, and boxes.

    data (N, 32, 32, 3) uint8, targets a list of N ints, classes ten names, boxes (N, 4) float32
    (x0, y0, x1, y1) in pixels. An item is a PIL image and its label, through the transform.
    """

    def __init__(self, root=DATASET2, train=True, transform=None):
        path, split = Path(root) / "shapes10.npz", "train" if train else "test"
        arrays = read_shapes10(path, split)
        if arrays is None:
            print(f"drawing Shapes-10 into {path} (once, about 5 s)")
            write_shapes10(path)
            arrays = read_shapes10(path, split)
        self.data, labels, self.boxes = arrays
        self.targets = labels.tolist()
        self.root, self.classes, self.transform = Path(root), list(CLASSES), transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image = Image.fromarray(self.data[index])
        return self.transform(image) if self.transform else image, self.targets[index]


# --- ants and bees -----------------------------------------------------------------------------


def draw_insect(kind, size, rng):
    """An ant or a bee of any size, place and angle as an RGB picture of `size` (width, height)."""
    soil = rng.uniform((90, 90, 40), (180, 190, 110)) + rng.normal(0, 22, (12, 16, 1))
    picture = Image.fromarray(soil.clip(0, 255).astype(np.uint8))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture, "RGBA")
    for x, y in rng.uniform(0, 1, (25, 2)) * size:  # blades of grass
        tip = (x + rng.uniform(-30, 30), y + rng.uniform(-40, 40))
        pen.line((x, y, *tip), fill=(*(int(c) for c in rng.uniform(30, 160, 3)), 120), width=3)

    scale, angle = min(size) * rng.uniform(0.16, 0.24), rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    place = np.array(size) / 2 + rng.uniform(-0.1, 0.1, 2) * min(size)

    def on_picture(points):
        return [tuple(p) for p in np.asarray(points, float) @ turn.T * scale + place]

    def oval(x, y, rx, ry, fill):
        pen.polygon(on_picture(arc(0, 1) * (rx, ry) + (x, y)), fill=fill)

    thin = max(2, int(scale / 12))
    dark = tuple(int(c) for c in rng.uniform((10, 5, 0), (70, 30, 25)))
    for x in (-0.3, 0.0, 0.3):  # six legs, two antennae
        for side in (-1, 1):
            pen.line(on_picture([(x, 0), (x * 2, side * 0.6), (x * 3, side * 0.9)]), dark, thin)
    for side in (-1, 1):
        pen.line(on_picture([(0.8, 0), (1.1, side * 0.3), (1.5, side * 0.35)]), dark, thin)
    if kind == "ants":
        oval(-0.85, 0, 0.55, 0.38, dark)
        oval(0, 0, 0.38, 0.18, dark)
        oval(0.7, 0, 0.32, 0.27, dark)
    else:
        oval(-0.6, 0, 0.8, 0.45, (230, 170, 20))
        for x in (-1.15, -0.8, -0.45):
            oval(x, 0, 0.09, 0.42 * math.sqrt(1 - ((x + 0.6) / 0.8) ** 2), dark)
        oval(0.25, 0, 0.42, 0.38, (200, 140, 30))
        oval(0.75, 0, 0.28, 0.27, dark)
        for side in (-1, 1):
            oval(-0.2, side * 0.75, 0.35, 0.6, (235, 240, 255, 150))
    return picture


def write_hymenoptera_sample(folder, train=24, val=12, seed=0):
    """Draw train/ants/ants_000.jpg … val/bees/bees_011.jpg, then a manifest of their checksums."""
    sizes = [(500, 375), (375, 500), (320, 240), (256, 256), (400, 300)]
    manifest, number = {}, 0
    for split, n in {"train": train, "val": val}.items():
        for kind in ("ants", "bees"):
            for i in range(n):
                number += 1
                rng = np.random.default_rng([seed, number])
                name = f"{split}/{kind}/{kind}_{i:03d}.jpg"
                with write_whole(folder / name) as beside:
                    picture = draw_insect(kind, sizes[number % len(sizes)], rng)
                    picture.save(beside, "JPEG", quality=90)
                manifest[name] = zlib.crc32((folder / name).read_bytes())
    with write_whole(folder / "manifest.json") as beside:
        beside.write_text(json.dumps(manifest), encoding="utf-8")


def sample_is_whole(folder):
    """Whether every file of the manifest is there, unchanged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all(zlib.crc32((folder / n).read_bytes()) == crc for n, crc in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False
