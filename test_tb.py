"""TensorBoard draws what (tag, step, value) say: a wrong step or layout draws a wrong picture.

    add_scalar(tag, value, step)       one point of the curve `tag`; without a step all lie at 0
    add_image(tag, img, step)          (C, H, W) unless dataformats="HWC" says otherwise

Four traps, each measured here by reading the event files back: no step, height taken for channels,
a second run in the same folder (the curve jumps back), and a reservoir that keeps ten pictures a
tag however many were written (start tensorboard with --samples_per_plugin images=200).

Checked here   values and steps read back equal what was written; each trap, counted
TensorBoard    line/y for y = 2x in the runs with_step, without_step, two_writers, purged; image/bee
Try            write the steps in reverse: which points does the Scalars tab keep? Look at line/y
Source         torch.utils.tensorboard; TensorBoard's README, "samples_per_plugin"
"""

import logging
import signal
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from support.data import first_picture, hymenoptera, hymenoptera_source
from support.files import DATASET, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "test_tb"
RUNS = ("with_step", "without_step", "two_writers", "purged")
KEPT = 10  # pictures a tag that TensorBoard keeps by default


def write_line(log_dir, steps, **options):
    """y = 2x as line/y, one point for each of `steps`; step None leaves the step out."""
    with SummaryWriter(log_dir, **options) as writer:
        for x, step in enumerate(steps):
            writer.add_scalar("line/y", 2 * x, step)


def write_pictures(log_dir, picture, count):
    """`picture` (H, W, 3) as image/bee, ever darker, at steps 0 … count - 1."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step in range(count):
            darker = (picture * (1 - step / count)).astype(np.uint8)
            writer.add_image("image/bee", darker, step, dataformats="HWC")


def load_events(log_dir, **sizes):
    """What TensorBoard itself would load from a folder."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it announces every purge
    return EventAccumulator(str(log_dir), sizes or None).Reload()


def read_scalars(log_dir, tag="line/y"):
    """Steps and values of a curve, as TensorBoard would draw them."""
    events = load_events(log_dir).Scalars(tag)
    return [e.step for e in events], [e.value for e in events]


def read_images(log_dir, tag="image/bee", keep=KEPT):
    """The pictures of a tag that a reservoir of `keep` leaves; 0 keeps all."""
    return load_events(log_dir, **{IMAGES: keep}).Images(tag)


def layout_error(log_dir, array):
    """The error of add_image when `array` (H, W, 3) is taken for (C, H, W); None if it passes."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        try:
            writer.add_image("image/wrong", array, 0)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def main(seed=0, log_dir=LOG_DIR, root=DATASET, points=20, pictures=30):
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    picture = first_picture(folder, "bees")
    picture = np.array(picture.resize((160, 120)))  # (120, 160, 3)
    half = points // 2

    print(f"1. y = 2x at {points} steps, read back")
    write_line(log_dir / "with_step", range(points), purge_step=0)
    write_line(log_dir / "without_step", [None] * points, purge_step=0)
    for run in ("two_writers", "purged"):
        write_line(log_dir / run, range(points), purge_step=0)
    write_line(log_dir / "two_writers", range(half, points))
    write_line(log_dir / "purged", range(half, points), purge_step=half)
    lines = {run: read_scalars(log_dir / run) for run in RUNS}
    for run, (steps, _) in lines.items():
        back = sum(b < a for a, b in pairwise(steps))
        print(f"   {run:<14} points {len(steps):3d}   different steps {len(set(steps)):3d}   "
              f"steps back {back}")  # fmt: skip
    assert lines["with_step"] == ([*range(points)], [2.0 * x for x in range(points)])
    assert set(lines["without_step"][0]) == {0}

    print("2. an array (H, W, 3) without dataformats")
    error = layout_error(log_dir / "layout", picture)
    print(f"   {error}")

    print(f"3. {pictures} pictures of one tag, what the reservoir keeps")
    write_pictures(log_dir / "pictures", picture, pictures)
    kept = {keep: read_images(log_dir / "pictures", keep=keep) for keep in (KEPT, 200)}
    for keep, images in kept.items():
        print(f"   images={keep:<4} kept {len(images):3d}   last step {images[-1].step}")
    size = kept[200][0].width, kept[200][0].height
    assert size == (160, 120)
    counts = {keep: len(images) for keep, images in kept.items()}
    return {"lines": lines, "error": error, "kept": counts, "size": size}


if __name__ == "__main__":
    guard(main)
