"""Where images lie, real or drawn: opened, checked, and fetched only when asked for."""

import gzip
import hashlib
import os
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url

from support.drawings import Shapes10, sample_is_whole, write_hymenoptera_sample
from support.files import DATASET, DATASET2, DataError

MEND = "python dataset_transform.py --download"
INSECTS_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
INSECTS_MD5 = "5f8c32a6554f6acb4d749776e7735e48"
INSECTS, SAMPLE = "hymenoptera_data", "hymenoptera_sample"


# --- CIFAR-10, or Shapes-10 --------------------------------------------------------------------


def open_images(root=DATASET2, train=True, transform=None):
    """CIFAR-10 if it lies under `root` or in data/ beside it, packed or not; else Shapes-10.

    Both have data (N, 32, 32, 3) uint8, targets, classes; an item is (transformed image, label).
    Raises DataError, naming the file, if CIFAR-10 is there but damaged.
    """
    root = Path(root)
    folders, refused = cifar10_folders(root), []
    for folder in folders:
        with suppress(RuntimeError):  # torchvision's, if a checksum is wrong
            return open_cifar10(folder, train, transform)
        refused.append(f"{first_broken(folder)} is missing or damaged: {MEND} mends it")
    for archive in () if folders else sorted(root.glob("cifar-10-python*")):
        if archive.suffix in (".gz", ".tgz", ".tar"):  # .tar is what some browsers make of it
            try:
                unpack_cifar10(archive)
                return open_cifar10(root / CIFAR10.base_folder, train, transform)
            except DataError as error:
                refused.append(error)
    if refused:
        raise DataError(refused[0])
    return Shapes10(root, train, transform)


def cifar10_folders(root):
    """Where CIFAR-10 seems to lie: `root`/cifar-10-batches-py, then what people make of it."""
    usual = root / CIFAR10.base_folder
    places = [top.glob(place) for top in (root, root.parent / "data")
              for place in ("data_batch_1", "*/data_batch_1", "*/*/data_batch_1")]  # fmt: skip
    found = [batch.parent for place in places for batch in sorted(place)]
    return [usual] * usual.is_dir() + [folder for folder in found if folder != usual]


def open_cifar10(folder, train, transform):
    """The CIFAR10 that lies in `folder`, whatever its name. RuntimeError if a checksum is wrong."""
    dataset = CIFAR10.__new__(CIFAR10)
    dataset.base_folder = folder.name
    dataset.__init__(folder.parent, train, transform)
    return dataset


def first_broken(folder):
    """The first of CIFAR-10's files in `folder` that is missing or has a wrong MD5, or None."""
    sums = [*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", CIFAR10.meta["md5"])]
    return next((folder / n for n, md5 in sums if not check_integrity(folder / n, md5)), None)


def source_line(dataset):
    """One line: which images these are, where the real ones would be seen, how to get them."""
    if not isinstance(dataset, Shapes10):
        return f"data: CIFAR-10, {len(dataset):,} photographs"
    missing = tell_missing(dataset.root / CIFAR10.base_folder, dataset.root, "cifar")
    return f"data: Shapes-10, {len(dataset):,} drawn images{missing}; for the real CIFAR-10: {MEND}"


def tell_missing(wanted, root, word):
    """For a line on drawn data: where the real one is not, and what else `root` has of it."""
    found = sorted(path.name for path in root.glob("*") if word in path.name.lower())
    found = [name for name in found if name != SAMPLE]
    return f", as {wanted} is not there" + (f" (but {', '.join(found)})" if found else "")


def unpack_cifar10(archive):
    """Unpack a CIFAR-10 archive beside it. Raises DataError if it is damaged, or another one."""
    root, folder = archive.parent, archive.parent / CIFAR10.base_folder
    try:
        with tempfile.TemporaryDirectory(dir=root) as beside, tarfile.open(archive) as tar:
            tar.extractall(beside, filter="data")
            fresh = Path(beside) / folder.name
            if broken := first_broken(fresh):
                raise EOFError(f"{broken.name} in it is missing or changed")
            if not folder.exists():
                os.replace(fresh, folder)  # whole or not at all
            else:
                for file in fresh.iterdir():
                    os.replace(file, folder / file.name)
    except (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"{archive} is damaged ({why}): delete it, then {MEND}") from error
    except OSError as error:
        raise DataError(f"cannot unpack {archive}: {error}") from error


def download_cifar10(root=DATASET2):
    """Put CIFAR-10 at root/cifar-10-batches-py, mending what is damaged there."""
    root = Path(root)
    fetch(CIFAR10.url, root / CIFAR10.filename, CIFAR10.tgz_md5, "163 MiB")
    unpack_cifar10(root / CIFAR10.filename)


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
    usual = root / INSECTS
    for folder in (usual / INSECTS, usual, root):  # unpacked into itself; as in older courses
        if any((folder / "train" / name).is_dir() for name in ("ants", "ants_image")):
            return folder
    for archive in sorted(root.glob(f"{INSECTS}*.zip")):
        if check_integrity(archive, INSECTS_MD5):
            unpack_hymenoptera(archive)
            return usual
    folder = root / SAMPLE
    if not sample_is_whole(folder):
        print(f"drawing ants and bees into {folder} (once, under a second)")
        write_hymenoptera_sample(folder)
    return folder


def hymenoptera_source(folder):
    """One line: what `folder` holds, where photographs would be seen, how to get them."""
    if folder.name != SAMPLE:
        return f"data: the hymenoptera_data photographs in {folder}"
    root = folder.parent
    missing = tell_missing(root / INSECTS / "train" / "ants", root, "hymenoptera")
    mend = "python generate_labels.py --download"
    return f"data: drawn ants and bees in {folder}{missing}; photographs: {mend}"


def is_image(path):
    """Whether a path is data: a file, not hidden, that torchvision's ImageFolder takes, too.

    So neither ._photo.jpg of a Mac, nor a folder a.jpg, nor imageNotFound.gif, which is no insect.
    """
    path = Path(path)
    hidden = path.name.startswith(".")
    return path.suffix.lower() in IMG_EXTENSIONS and not hidden and path.is_file()


def class_folder(folder, kind):
    """`folder`/ants, or `folder`/ants_image as in older copies. Raises DataError without images."""
    for path in (folder / kind, folder / f"{kind}_image"):
        if path.is_dir() and any(map(is_image, path.iterdir())):
            return path
    raise DataError(
        f"no images in {folder / kind}: put them there, or move {folder.parent} away "
        "and run python generate_labels.py --download"
    )


def image_files(folder):
    """The images in a folder, sorted by name. Raises DataError if two would share a label file."""
    files = sorted(filter(is_image, folder.iterdir()))
    stems = [p.stem for p in files]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise DataError(f"{folder} has two images named {min(twice)}: one label cannot serve both")
    return files


def open_rgb(path):
    """An image file of any mode as an upright RGB picture. Raises DataError if it cannot be read.

    What is transparent becomes white; greys of more than 8 bits are scaled to 0..255, not cut off.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # as the camera was held
            if image.mode.startswith(("I", "F")):
                image = scale_grey(image)
            elif image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow has a dozen ways to say no, a bomb among them
        mend = "replace or delete it, or run python generate_labels.py --download"
        raise DataError(f"{path} is not a readable image: {mend}") from error


def scale_grey(image):
    """A grey picture of 16 or 32 bits with 8: white is the least of 1, 255, 65535 that fits."""
    x = np.asarray(image, np.float64)
    white = next((w for w in (1, 255) if x.max() <= w and "16" not in image.mode), 65535)
    return Image.fromarray((x / white * 255).round().clip(0, 255).astype(np.uint8))


def open_square(path, size):
    """The middle of an image file, scaled to (3, size, size) uint8. Raises DataError as above."""
    picture = ImageOps.fit(open_rgb(path), (size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def first_picture(folder, kind):
    """The first training image of a class, as an RGB picture. Raises DataError as above."""
    return open_rgb(image_files(class_folder(folder / "train", kind))[0])


def download_hymenoptera(root=DATASET):
    """Put the photographs at root/hymenoptera_data, mending what is missing or damaged there."""
    archive = Path(root) / f"{INSECTS}.zip"
    fetch(INSECTS_URL, archive, INSECTS_MD5, "45 MiB")
    unpack_hymenoptera(archive)


def unpack_hymenoptera(archive):
    """Unpack the photographs beside their zip, over what is there. DataError if it cannot."""
    root = archive.parent
    try:
        with tempfile.TemporaryDirectory(dir=root) as beside, zipfile.ZipFile(archive) as photos:
            photos.extractall(beside)
            for source in (Path(beside) / INSECTS).rglob("*.*"):
                target = root / source.relative_to(beside)
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


def weights_path(weights):
    """Where torch.hub and torchvision keep these weights, such as VGG16_Weights.IMAGENET1K_V1."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)


def have_weights(weights, mend, size, download=False):
    """Whether they are there, fetched if `download`. DataError if damaged or out of reach."""
    path = weights_path(weights)
    beginning = path.stem.rpartition("-")[2]  # vgg16-397923af.pth: of its SHA-256
    if path.is_file():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest().startswith(beginning):
                return True
        if not download:
            raise DataError(f"{path} is damaged (its SHA-256 is another): {mend} fetches it anew")
    if download:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, path, beginning)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = f"cannot fetch {weights.url} ({size}): {error}"
            raise DataError(f"{reason}; try again, or put the file at {path} by hand") from error
    return download
