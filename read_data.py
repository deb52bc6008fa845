"""A Dataset needs no more than __len__ and __getitem__; unequal images need a collate_fn, too.

A Dataset reads one item when it is asked for it, so that memory holds a batch and never the whole
set. You write one when files lie in a way of their own; for one folder per class there is
ImageFolder. A DataLoader joins items into batches by its collate_fn. The default one stacks them,
and tensors of unequal shape do not stack: photographs are resized, cropped or, as here, padded. A
label that cannot be read has to be named with its file, or one wrong file among thousands is not
found.

    batch[b, :, :H_b, :W_b] = image b     for b < B; the rest of batch (B, 3, max H_b, max W_b) is 0
    padded share = 1 - sum of H_b W_b / (B max H_b max W_b)

    B  images in the batch     H_b, W_b  height and width of image b, in pixels

Needs          generate_labels.py
Checked here   items = ImageFolder's; no image in two parts of a split; the default collate fails;
               padded images are unharmed
TensorBoard    batch/padded: thumbnails of padded batches by step, black where there is no image;
               batch/padded_share by step; both in the run shuffled
Try            in main, put batch_size=2 for batch_size=8: does the padded share fall?
Answer         Yes, to less than two thirds of it: a batch is as high as its highest image and as
               wide as its widest one, and of two images these are often one and the same
Source         torch.utils.data, "Working with collate_fn"; torchvision.datasets.ImageFolder
"""

import signal
import tempfile
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, random_split
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

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
        self.images = image_files(class_folder(folder, kind))
        self.labels = [folder / f"{kind}_label" / f"{image.stem}.txt" for image in self.images]

    def __len__(self):
        """How many items there are. Exercise."""
        return len(self.images)

    def __getitem__(self, index):
        """The item at `index`: self.images[index] by open_rgb, as a tensor (3, H, W) uint8; and
        the class by read_label of self.labels[index]. Exercise.
        """
        pixels = np.array(open_rgb(self.images[index]))  # (H, W, 3), whatever the file's mode
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


def write_missing_labels(folder):
    """What generate_labels.py does, so that this lesson runs without it."""
    for kind in CLASSES:
        insects = Insects(folder, kind)
        for label in insects.labels:
            if not label.exists():
                with write_whole(label) as beside:
                    beside.write_text(kind, encoding="utf-8")


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
    print("2. One folder per class: does ImageFolder bring the same items, without label files?")
    twin = TwoClasses(folder, transform=pil_to_tensor, is_valid_file=is_image)
    assert len(twin) == len(both)
    print("   item   class   shape             ImageFolder: class   same pixels")
    places = range(0, len(both), -(-len(both) // 6))
    same = 0
    for i in places:
        (image, label), (image_twin, label_twin) = both[i], twin[i]
        equal = torch.equal(image, image_twin)
        same += equal and label == label_twin
        print(f"   {i:4d}   {CLASSES[label]:<5}   {tuple(image.shape)!s:<15}   "
              f"{CLASSES[label_twin]:<18}   {'yes' if equal else 'no'}")  # fmt: skip
    print(f"   -> {same} of {len(places)} items are the same, among {len(twin)}")
    return same, len(places)


# --- 3. training and validation ----------------------------------------------------------------


def split_places(N, val_count, g):
    """Two lists of places in a Dataset of N items: N - val_count to train, val_count to validate.

    They are the first and the last places of torch.randperm(N, generator=g). Exercise.
    """
    order = torch.randperm(N, generator=g).tolist()
    return order[: N - val_count], order[N - val_count :]


def show_split(both, seed):
    N, val_count = len(both), len(both) // 4
    print(f"3. Split {N} items at random: is any image in both parts?")
    parts = random_split(both, [N - val_count, val_count], torch.Generator().manual_seed(seed))
    by_hand = split_places(N, val_count, torch.Generator().manual_seed(seed))
    ants = len(both.datasets[0])
    print("   part         items   ants   bees   the first places       by hand the same")
    for name, part, places in zip(("training", "validation"), parts, by_hand, strict=True):
        number = sum(i < ants for i in part.indices)
        print(f"   {name:<10}   {len(part):5d}   {number:4d}   {len(part) - number:4d}   "
              f"{str(part.indices[:4])[1:-1]:<16}   {part.indices == places!s:>16}")  # fmt: skip
        assert part.indices == places
    train, val = parts
    shared = set(train.indices) & set(val.indices)
    print(f"   -> in both parts: {len(shared)} images; in none: {N - len(train) - len(val)}")
    return train, val


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
    image, label = dataset[0]
    try:
        default_collate([(image, label), (image[:, 1:], label)])
        refused = ""
    except RuntimeError as error:
        refused = str(error).split(",")[0]
    loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=pad_collate)
    seen, shares, rows = 0, [], []
    with SummaryWriter(log_dir / "shuffled", purge_step=0) as writer:
        for step, (batch, labels, sizes) in enumerate(tqdm(loader, leave=False, disable=None)):
            seen += len(labels)
            shares.append(padded_share(sizes, batch))
            writer.add_scalar("batch/padded_share", shares[-1], step)
            if step < 4:  # thumbnails, and few of them: whole photographs would fill the disk
                both = zip(labels, sizes, strict=True)
                words = [f"{CLASSES[label]}\n{H} x {W}" for label, (H, W) in both]
                title = f"Batch {step}, {tuple(batch.shape)}: black is padding"
                writer.add_image("batch/padded", caption_row(title, batch, words, height=96), step)
                (h, w), (H, W) = sizes.amin(0).tolist(), sizes.amax(0).tolist()
                rows.append(f"   {step:5d}   {h:4d} to {H:4d}   {w:4d} to {W:4d}   "
                            f"{tuple(batch.shape)!s:<19}   {shares[-1]:12.2f}")  # fmt: skip
    print("   batch   heights        widths         batch (B, 3, H, W)    padded share")
    print("\n".join(rows))
    mean = sum(shares) / len(shares)
    print(f"   without collate_fn: {refused}")
    print(f"   -> {seen} images in {len(shares)} batches; on average, padding is {mean:.2f} of one")
    return {"seen": seen, "refused": refused, "shares": shares}


# --- 5. wrong labels ---------------------------------------------------------------------------


def show_wrong_labels():
    print("5. What is said of a label file that is not as it should be?")
    print("   the file                 read_label")
    files = {
        "ants, then a line end": b"ants\r\n",
        "ants, after a BOM": "ants".encode("utf-8-sig"),
        "ants in UTF-16": "ants".encode("utf-16"),
        "wasps": b"wasps",
        "empty": b"",
        "missing": None,
    }
    answers = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            label = Path(scratch, "0013035.txt")
            label.unlink(missing_ok=True)
            if content is not None:
                label.write_bytes(content)
            try:
                answers[name] = CLASSES[read_label(label)]
            except DataError as error:
                answers[name] = str(error).replace(str(label), label.name)
            print(f"   {name:<22}   {answers[name]}")
    read = sum(answer in CLASSES for answer in answers.values())
    print(f"   -> {read} are read; {len(answers) - read} are refused, each by the name of its file")
    return answers


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
        "split": show_split(both, seed),
        "batches": show_batches(both, batch_size, log_dir),
        "answers": show_wrong_labels(),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
