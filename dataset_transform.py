"""Without augmentation a transform pipeline changes only the form: undo it and the image is back.

    ToImage      PIL (W, H) -> uint8 tensor (3, H, W) in 0..255, the same numbers
    ToDtype      x / 255 -> float32 in [0, 1]
    Normalize    (x - mean[c]) / std[c] -> mean 0, std 1 over the data set, channel by channel

Augmentation (RandomCrop, RandomHorizontalFlip) changes content: each epoch sees another version of
an image under the same label. It is for training images only. Called on a whole batch, a random v2
transform draws once for all of it, so a batch is augmented image by image or by code of its own.

Checked here   shape, dtype and range after each step; mean 0, std 1 over the set; the inverse; and
               that a flip on a batch turns all its images or none
TensorBoard    images/before, images/augmented, images/restored
Try            mean = std = 0.5 in Normalize: which range results? [-1, 1], whatever the images
Source         Krizhevsky 2009 (CIFAR-10); torchvision.transforms.v2
"""

import argparse
import os
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.transforms import v2

from sample_data import DATASET2, DataError, Shapes10

LOG_DIR = Path(__file__).resolve().parent / "runs" / "dataset_transform"
MEND = "python dataset_transform.py --download"


def fetch(url, path, md5, size):
    """Download `url` (of about `size`) to `path` with a progress bar, unless it lies there whole.

    A cut download starts anew on the next call. Raises DataError without network or on a wrong MD5.
    """
    if check_integrity(path, md5):
        return
    part = path.with_name(f"{path.name}.part")
    print(f"fetching {url} ({size}) to {path}")
    try:
        download_url(url, path.parent, part.name, md5)
        os.replace(part, path)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = f"cannot fetch {url} ({size}): {error}"
        raise DataError(f"{reason}; try again, or put the file at {path} by hand") from error


def unpack_cifar10(root):
    """Unpack root/cifar-10-python.tar.gz beside it. Raises DataError if its MD5 is wrong."""
    archive, folder = root / CIFAR10.filename, root / CIFAR10.base_folder
    if not check_integrity(archive, CIFAR10.tgz_md5):
        raise DataError(
            f"{archive} is damaged (MD5 is not {CIFAR10.tgz_md5}): delete it, then {MEND}"
        )
    try:
        with tempfile.TemporaryDirectory(dir=root) as beside, tarfile.open(archive) as tar:
            tar.extractall(beside, filter="data")
            fresh = Path(beside) / folder.name
            if not folder.exists():
                os.replace(fresh, folder)  # whole or not at all
            else:
                for file in fresh.iterdir():
                    os.replace(file, folder / file.name)
    except OSError as error:
        raise DataError(f"cannot unpack {archive}: {error}") from error


def download_cifar10(root=DATASET2):
    """Put CIFAR-10 at root/cifar-10-batches-py, mending what is damaged there."""
    root = Path(root)
    fetch(CIFAR10.url, root / CIFAR10.filename, CIFAR10.tgz_md5, "163 MiB")
    unpack_cifar10(root)


def open_images(root=DATASET2, train=True, transform=None):
    """CIFAR-10 if it lies under `root`, unpacked or as the archive; else Shapes-10.

    Both have data (N, 32, 32, 3) uint8, targets, classes; an item is (transformed image, label).
    Raises DataError, naming the file, if CIFAR-10 is there but damaged.
    """
    root = Path(root)
    folder = root / CIFAR10.base_folder
    if not folder.is_dir():
        if not (root / CIFAR10.filename).is_file():
            return Shapes10(root, train, transform)
        unpack_cifar10(root)
    try:
        return CIFAR10(root, train, transform)
    except RuntimeError as error:
        sums = dict(CIFAR10.train_list + CIFAR10.test_list) | {"batches.meta": CIFAR10.meta["md5"]}
        broken = [
            folder / name for name, md5 in sums.items() if not check_integrity(folder / name, md5)
        ]
        raise DataError(f"{broken[0]} is missing or damaged: {MEND} mends it") from error


def source_line(dataset):
    """One line: which images these are, and how to get the real ones."""
    if isinstance(dataset, Shapes10):
        return f"data: Shapes-10, {len(dataset):,} drawn images; for the real CIFAR-10: {MEND}"
    return f"data: CIFAR-10, {len(dataset):,} photographs"


def as_tensors(dataset):
    """All images (N, 3, 32, 32) uint8 and labels (N,) int64, in file order."""
    images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.tensor(dataset.targets)


def channel_stats(images):
    """Mean and standard deviation, (3,) in [0, 1], of uint8 images (N, 3, H, W), by counting."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    share, value = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = (share * value).sum(1)  # (3,)
    variance = (share * (value - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()


def pipeline(mean, std, train=True):
    """The v2 transform from a PIL image to a normalised float32 tensor (3, 32, 32)."""
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if train else []
    form = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())]
    return v2.Compose([v2.ToImage(), *augment, *form])


def denormalize(x, mean, std):
    """The inverse of Normalize, for x of shape (..., 3, H, W)."""
    return x * std.view(3, 1, 1) + mean.view(3, 1, 1)


def caption_grid(images, captions, columns=8, scale=3):
    """uint8 images (N, 3, H, W), enlarged, each over its caption: one picture (3, H', W') uint8."""
    side, line = images.shape[-1] * scale, 14
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (side + 4), rows * (side + line + 4)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (side + 4), i // columns * (side + line + 4)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        grid.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 2, y + side), caption, "black", font)
    return np.asarray(grid).transpose(2, 0, 1)


def trace(image, transform):
    """The name of each step of `transform`, and what one PIL image is after it."""
    yield "PIL image", v2.functional.pil_to_tensor(image)
    for step in transform.transforms:
        image = step(image)
        yield type(step).__name__, image


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=64):
    torch.manual_seed(seed)
    dataset = open_images(root)
    print(source_line(dataset))
    images, _ = as_tensors(dataset)
    mean, std = channel_stats(images)

    print("1. one image through the pipeline")
    for name, x in trace(dataset[0][0], pipeline(mean, std)):
        print(
            f"   {name:<22} {tuple(x.shape)!s:<12} {x.dtype!s:<14} {x.min():8.3f} … {x.max():8.3f}"
        )

    form = pipeline(mean, std, train=False)
    print("2. normalised with the set's own mean and standard deviation, all images")
    form_batch = v2.Compose(form.transforms[1:])  # a batch is a tensor already
    moments = torch.zeros(2, 3, dtype=torch.float64)  # E[x], E[x^2] by channel
    for batch in images.split(2000):
        x = form_batch(batch).double()
        moments += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
    moments /= len(images) * 32 * 32
    moments[1] = (moments[1] - moments[0].square()).sqrt()
    theory = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    torch.testing.assert_close(moments, theory, rtol=0, atol=1e-4)
    rows = zip(("mean", "std"), (mean, std), moments, (0, 1), strict=True)
    for name, before, after, target in rows:
        off = (after - target).abs().max()
        print(f"   {name:<5} before {before.numpy().round(3)}   after, off {target} by {off:.0e}")

    print("3. back again, and sample by sample against by the batch")
    singles = torch.stack([form(dataset[i][0]) for i in range(count)])  # (count, 3, 32, 32)
    torch.testing.assert_close(singles, form_batch(images[:count]))
    restored = denormalize(singles, mean, std)
    error = (restored - images[:count] / 255).abs().max().item()
    assert error < 1e-6
    print(f"   largest |restored - original| {error:.1e}   batch = samples: yes")

    print(f"4. RandomHorizontalFlip on a batch of {count}: images turned, in eight calls")
    flip = v2.RandomHorizontalFlip()
    same = [(flip(images[:count]) == images[:count]).flatten(1).all(1) for _ in range(8)]
    turned = [count - int(kept.sum()) for kept in same]
    assert set(turned) <= {0, count}
    print(f"   {' '.join(f'{n}' for n in turned)}   one draw for all: 0 or {count}")

    augmented = torch.stack([pipeline(mean, std)(dataset[i][0]) for i in range(count)])
    names = [dataset.classes[dataset.targets[i]] for i in range(count)]
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, x in {
            "before": images[:count],
            "augmented": denormalize(augmented, mean, std),
            "restored": restored,
        }.items():
            pixels = x if x.dtype == torch.uint8 else (x * 255).round().clamp(0, 255).byte()
            writer.add_image(f"images/{tag}", caption_grid(pixels, names), 0)
    return {"mean": mean.tolist(), "moments": moments.tolist(), "error": error, "turned": turned}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--download", action="store_true", help="fetch CIFAR-10 (163 MiB) into dataset2/ first"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        if parse().download:
            download_cifar10()
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
