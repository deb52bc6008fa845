"""Where images lie, real or drawn: opened, checked, and fetched only when asked for."""

import os
import tarfile
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url

from support.drawings import Shapes10, sample_is_whole, write_hymenoptera_sample
from support.files import DATASET, DATASET2, DataError

MEND = "python dataset_transform.py --download"
INSECTS_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
INSECTS_MD5 = "5f8c32a6554f6acb4d749776e7735e48"
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"}


# --- CIFAR-10, or Shapes-10 --------------------------------------------------------------------


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


# --- batches of images -------------------------------------------------------------------------


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


def load_splits(root=DATASET2, limit=None, seed=0, val_share=0.1):
    """{"train", "val", "test"}: images (N, 3, 32, 32) uint8 and labels (N,). And the training set.

    Validation images are cut from the training set by the seed. `limit` keeps the first so many
    images of both sets.
    """
    train_set, test_set = open_images(root), open_images(root, train=False)
    images, labels = (t[:limit] for t in as_tensors(train_set))
    if len(images) < 2:
        raise DataError("one image cannot both train and validate: give a larger --limit")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    val, train = order.tensor_split([max(1, int(val_share * len(images)))])
    return {
        "train": (images[train], labels[train]),
        "val": (images[val], labels[val]),
        "test": tuple(t[:limit] for t in as_tensors(test_set)),
    }, train_set


def augment(images, pad=2):
    """Each image (B, 3, H, W) shifted by up to `pad` pixels, and mirrored with probability 1/2."""
    B, _, H, W = images.shape
    device = images.device
    padded = F.pad(images.float(), (pad,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * pad + 1, (2, B, 1), device=device)
    rows, columns = top + torch.arange(H, device=device), left + torch.arange(W, device=device)
    mirror = torch.rand(B, 1, device=device) < 0.5
    columns = torch.where(mirror, columns.flip(1), columns)  # (B, W)
    picks = torch.arange(B, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    return padded.permute(0, 2, 3, 1)[picks].permute(0, 3, 1, 2)  # (B, 3, H, W), channels last


def normalize(images, mean, std):
    """Images in 0..255 to mean 0, std 1 by channel, in channels_last order: the faster one."""
    x = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


# --- ants and bees -----------------------------------------------------------------------------


def hymenoptera(root=DATASET):
    """The folder with train/ and val/ of ants and bees: photographs if there are, else drawn."""
    root = Path(root)
    if (root / "hymenoptera_data").is_dir():
        return root / "hymenoptera_data"
    folder = root / "hymenoptera_sample"
    if not sample_is_whole(folder):
        print(f"drawing ants and bees into {folder} (once, under a second)")
        write_hymenoptera_sample(folder)
    return folder


def hymenoptera_source(folder):
    """One line: what `folder` holds, and how to get the photographs."""
    if folder.name == "hymenoptera_data":
        return f"data: the hymenoptera_data photographs in {folder}"
    return (
        f"data: drawn ants and bees in {folder}; photographs: python generate_labels.py --download"
    )


def class_folder(folder, kind):
    """`folder`/ants, or `folder`/ants_image as in older copies. Raises DataError without images."""
    for path in (folder / kind, folder / f"{kind}_image"):
        if path.is_dir() and any(p.suffix.lower() in SUFFIXES for p in path.iterdir()):
            return path
    raise DataError(
        f"no images in {folder / kind}: put them there, or move {folder.parent} away "
        "and run python generate_labels.py --download"
    )


def image_files(folder):
    """The images in a folder, sorted by name. Raises DataError if two would share a label file."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    stems = [p.stem for p in files]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise DataError(f"{folder} has two images named {min(twice)}: one label cannot serve both")
    return files


def open_rgb(path):
    """An image file of any mode as an RGB picture. Raises DataError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's own ways to say no
        mend = "replace or delete it, or run python generate_labels.py --download"
        raise DataError(f"{path} is not a readable image: {mend}") from error


def open_square(path, size):
    """The middle of an image file, scaled to (3, size, size) uint8. Raises DataError as above."""
    picture = ImageOps.fit(open_rgb(path), (size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def first_picture(folder, kind):
    """The first training image of a class, as an RGB picture. Raises DataError as above."""
    return open_rgb(image_files(class_folder(folder / "train", kind))[0])


def download_hymenoptera(root=DATASET):
    """Put the photographs at root/hymenoptera_data, mending what is missing or damaged there."""
    archive = Path(root) / "hymenoptera_data.zip"
    fetch(INSECTS_URL, archive, INSECTS_MD5, "45 MiB")
    try:
        with tempfile.TemporaryDirectory(dir=root) as beside, zipfile.ZipFile(archive) as photos:
            photos.extractall(beside)
            for source in (Path(beside) / "hymenoptera_data").rglob("*.*"):
                target = Path(root) / source.relative_to(beside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
    except OSError as error:
        raise DataError(f"cannot unpack {archive}: {error}") from error


# --- download ----------------------------------------------------------------------------------


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
