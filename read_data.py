"""A Dataset needs only __len__ and __getitem__; to batch images of unequal size, you also give the
DataLoader a collate_fn, a function that joins items.

A Dataset reads an item, here an image and its label, when it is asked for it: memory holds one
batch and never the whole set. You write a Dataset when your files are not in one folder per class;
for those there is ImageFolder. The default collate_fn stacks images, and tensors of unequal shape
do not stack. You resize or crop all images to one size or, as here, keep their sizes and pad them:
each stands in the upper left corner of a larger black one.

    B  images in the batch     H_b, W_b  height and width of image b, in pixels; b is 0 to B - 1

    batch[b, :, :H_b, :W_b] = image b, and 0 elsewhere; its shape is (B, 3, max H_b, max W_b)
    padded share            = 1 - (sum of all H_b W_b) / (B max H_b max W_b)

Needs          generate_labels.py
Checked here   the items are ImageFolder's; no image is in both parts of a split; the default
               collate_fn fails; a padded image keeps every pixel
TensorBoard    batch/padded: the first batches as rows of thumbnails, black where there is no image;
               batch/padded_share by step, in the run shuffled: more than 0 in each batch
Try            in main, write batch_size=2 for batch_size=8: does the padded share fall?
Answer         Yes, to less than two thirds: a batch is as high as its highest image and as wide as
               its widest one, and of two images one is often both
Source         torch.utils.data, "Working with collate_fn"; torchvision.datasets.ImageFolder
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, random_split
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from support.data import (
    class_folder,
    hymenoptera,
    hymenoptera_source,
    image_files,
    is_image,
    open_rgb,
)
from support.files import DATASET, DataError, guard, write_whole
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "read_data"
CLASSES = ("ants", "bees")


# --- 1. in everyday code -----------------------------------------------------------------------


class Insects(Dataset):
    """The images of one class folder, with labels from text files.

    An item is (image (3, H, W) uint8, index in CLASSES).
    """

    def __init__(self, folder, kind):
        # usually: sorted((folder / kind).glob("*.jpg"))
        self.images = image_files(class_folder(folder, kind))
        self.labels = [folder / f"{kind}_label" / f"{image.stem}.txt" for image in self.images]

    def __len__(self):
        """How many items there are. Exercise."""
        return len(self.images)

    def __getitem__(self, index):
        """The item at `index`: self.images[index] by open_rgb, as a tensor (3, H, W) uint8; and
        the class by read_label of self.labels[index]. Exercise.
        """
        picture = open_rgb(self.images[index])  # Image.open(self.images[index]).convert("RGB")
        pixels = np.array(picture)  # (H, W, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1), read_label(self.labels[index])


def read_label(path):
    """The index in CLASSES of the class that a label file names.

    Space around the name does not matter, nor does the mark with which some editors begin a UTF-8
    file (encoding "utf-8-sig"). Raises DataError, naming the file and what mends it, if the file is
    missing, in another encoding, or names no class. Exercise.
    """
    choice = " or ".join(CLASSES)
    try:
        name = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: run python generate_labels.py") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: write {choice} into it and save as UTF-8") from error
    if name not in CLASSES:
        raise DataError(f"{path} says {name!a}: write {choice} into it")
    return CLASSES.index(name)


def show_everyday(folder):
    print("1. A Dataset of your own: both = Insects(train, 'ants') + Insects(train, 'bees')")
    ants, bees = Insects(folder, "ants"), Insects(folder, "bees")
    both = ants + bees  # item i is ants[i], or bees[i - len(ants)]
    print("   item          image (3, H, W)   label   class")
    for index in (0, 1, len(ants), -1):
        image, label = both[index]
        print(f"   both[{index}]{'':<{7 - len(str(index))}} {tuple(image.shape)!s:<15}   "
              f"{label:5d}   {CLASSES[label]}")  # fmt: skip
    assert len(both) == len(ants) + len(bees)
    torch.testing.assert_close(both[len(ants)][0], bees[0][0])
    print(f"   -> len(both) is {len(both)}: {len(ants)} ants, then {len(bees)} bees")
    return both


# --- 2. ImageFolder ----------------------------------------------------------------------------


class TwoClasses(ImageFolder):
    """An ImageFolder that does not take the folders of label files for classes."""

    def find_classes(self, directory):
        names = [class_folder(Path(directory), kind).name for kind in CLASSES]
        return names, {name: label for label, name in enumerate(names)}


def show_image_folder(folder, both):
    print("2. Does TwoClasses, an ImageFolder that skips the label folders, bring the same items?")
    twin = TwoClasses(folder, transform=pil_to_tensor, is_valid_file=is_image)
    assert len(twin) == len(both)
    print("             class,             class,           same")
    print("   item   by label file   by image's folder   pixels   shape")
    N = len(both)
    every, same = -(-N // 6), 0  # N / 6, rounded up: six rows stand for all items
    for i in range(N):
        (image, label), (image_twin, label_twin) = both[i], twin[i]
        equal = torch.equal(image, image_twin)
        same += equal and label == label_twin
        if i % every == 0:
            print(f"   {i:4d}   {CLASSES[label]:<13}   {CLASSES[label_twin]:<17}   "
                  f"{'yes' if equal else 'no':<6}   {tuple(image.shape)}")  # fmt: skip
    print(f"   -> {same} of all {N} items are the same: those whose label file names their folder")
    return same, N


# --- 3. training and validation ----------------------------------------------------------------


def split_places(N, val_count, g):
    """Two lists of places in a Dataset of N items: N - val_count to train, val_count to validate.

    They are the first and the last places of torch.randperm(N, generator=g). Exercise.
    """
    order = torch.randperm(N, generator=g).tolist()
    return order[: N - val_count], order[N - val_count :]


def show_split(both, seed):
    N, n, ants = len(both), len(both) // 4, len(both.datasets[0])
    print(f"3. Split {N} items at random: is an image in both parts? Are the classes balanced?")
    print("          to validate    images in    images in   split_places")
    print("   seed   ants   bees    both parts   no part     gives the same")
    splits, ants_seen = {}, set()
    for s in range(seed, seed + 3):
        parts = random_split(both, [N - n, n], torch.Generator().manual_seed(s))
        train, val = splits[s] = parts[0].indices, parts[1].indices
        same = splits[s] == split_places(N, n, torch.Generator().manual_seed(s))
        ants_seen.add(chosen := sum(i < ants for i in val))
        shared, left = set(train) & set(val), set(range(N)) - {*train, *val}
        counts = f"{chosen:4d}   {n - chosen:4d}    {len(shared):10d}   {len(left):7d}"
        print(f"   {s:4d}   {counts}     {'yes' if same else 'no'}")
        assert same
    print(f"   -> random_split does not look at classes: of {n} to validate, "
          f"{' or '.join(map(str, sorted(ants_seen)))} are ants")  # fmt: skip
    return splits


# --- 4. batches of unequal images --------------------------------------------------------------


def pad_collate(items):
    """Items [(image (3, H, W), label)] -> batch (B, 3, max H, max W), labels (B,), sizes (B, 2).

    Each image stands in the upper left corner, with 0 beside and below it; sizes are (H, W), and
    the batch has the dtype of the images. Exercise.
    """
    images, labels = zip(*items, strict=True)
    sizes = torch.tensor([image.shape[1:] for image in images])
    batch = torch.zeros(len(images), 3, *sizes.amax(0).tolist(), dtype=images[0].dtype)
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return batch, torch.tensor(labels), sizes


def padded_share(sizes, batch):
    """The share of a padded batch's pixels that belong to no image; sizes (B, 2). Exercise."""
    return 1 - sizes.prod(1).sum().item() / (len(batch) * batch.shape[2] * batch.shape[3])


def show_batches(dataset, batch_size, log_dir):
    print(f"4. Batches of {batch_size} images of unequal size: how much is padding?")
    items = [dataset[i] for i in range(min(batch_size, len(dataset)))]
    try:
        default_collate(items)
        refused = "no error, the first images happen to have one size"
    except RuntimeError as error:
        refused = str(error).split(",")[0]
    print(f"   the default collate_fn says: {refused}")
    batch, _, sizes = pad_collate(items)
    slots = zip(batch, sizes, items, strict=True)
    kept = sum(torch.equal(slot[:, :H, :W], image) for slot, (H, W), (image, _) in slots)
    print(f"   pad_collate keeps every pixel of {kept} of the same {len(items)} images")
    print("   batch   heights        widths         batch (B, 3, H, W)    padded share")
    loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=pad_collate)
    seen, shares = 0, []
    with SummaryWriter(log_dir / "shuffled", purge_step=0) as writer:
        for step, (batch, labels, sizes) in enumerate(loader):
            seen += len(labels)
            shares.append(padded_share(sizes, batch))
            writer.add_scalar("batch/padded_share", shares[-1], step)
            if step < 6:  # of many batches the first; their thumbnails, not whole photographs
                both = zip(labels, sizes, strict=True)
                words = [f"{CLASSES[label]}\n{H} x {W}" for label, (H, W) in both]
                title = f"Batch {step}, {tuple(batch.shape)}: black is padding"
                writer.add_image("batch/padded", caption_row(title, batch, words, height=96), step)
                (h, w), (H, W) = sizes.amin(0).tolist(), sizes.amax(0).tolist()
                print(f"   {step:5d}   {h:4d} to {H:4d}   {w:4d} to {W:4d}   "
                      f"{tuple(batch.shape)!s:<19}   {shares[-1]:12.2f}")  # fmt: skip
    mean = sum(shares) / len(shares)
    print(f"   -> {seen} images in {len(shares)} batches; the average padded share is {mean:.2f}")
    return {"seen": seen, "refused": refused, "kept": kept, "shares": shares}


# --- labels, if they are not there yet ---------------------------------------------------------


def write_missing_labels(folder):
    """What generate_labels.py does, so that this lesson runs without it."""
    for kind in CLASSES:
        insects = Insects(folder, kind)
        for label in insects.labels:
            if not label.exists():
                with write_whole(label) as beside:
                    beside.write_text(kind, encoding="utf-8")


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, root=DATASET, batch_size=8):
    torch.manual_seed(seed)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    write_missing_labels(folder / "train")
    both = show_everyday(folder / "train")
    measured = {
        "length": len(both),
        "same": show_image_folder(folder / "train", both),
        "splits": show_split(both, seed),
        "batches": show_batches(both, batch_size, log_dir),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
