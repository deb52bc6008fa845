"""A Dataset needs only __getitem__ and __len__; batches of unequal images need a collate as well.

    ants + bees = ConcatDataset:   item i is ants[i], or bees[i - len(ants)]
    batch (B, 3, max H, max W) with the sizes (B, 2): image b is batch[b, :, :H_b, :W_b]

The Dataset reads one image when asked for it, so memory holds a batch and never the whole set. The
default collate stacks tensors, and tensors of unequal shape do not stack: photographs must be
resized, cropped or, as here, padded. Each error names the file and what mends it.

Checked here   lengths and order of the sum; the default collate fails; padded images are unharmed
TensorBoard    insects/batch: padded batches by step; insects/item: single images
Try            sort the images by size before batching: does the padded share fall? Yes
Source         torch.utils.data, "Working with collate_fn"
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.tensorboard import SummaryWriter

from support.data import class_folder, hymenoptera, hymenoptera_source, image_files, open_rgb
from support.files import DATASET, DataError, guard, write_whole

LOG_DIR = Path(__file__).resolve().parent / "runs" / "read_data"
CLASSES = ("ants", "bees")


class Insects(Dataset):
    """Images of one class folder with labels from text files: (uint8 (3, H, W), class index).

    Raises IndexError, and DataError for a label or an image that is missing or unreadable.
    """

    def __init__(self, folder, kind):
        self.images = image_files(class_folder(folder, kind))
        self.label_folder = folder / f"{kind}_label"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} images")
        path = self.images[index]
        pixels = np.array(open_rgb(path))  # (H, W, 3), whatever the file's mode
        return torch.from_numpy(pixels).permute(2, 0, 1), self.read_label(path)

    def label_file(self, path):
        return self.label_folder / f"{path.stem}.txt"

    def write_missing_labels(self, kind):
        """What generate_labels.py does, for this folder."""
        for path in self.images:
            if not self.label_file(path).exists():
                with write_whole(self.label_file(path)) as beside:
                    beside.write_text(kind, encoding="utf-8")

    def read_label(self, path):
        label = self.label_file(path)
        if not label.is_file():
            raise DataError(f"{label} is missing: run python generate_labels.py")
        name = label.read_text(encoding="utf-8").strip()
        if name not in CLASSES:
            raise DataError(f"{label} says {name!r}, which is none of {', '.join(CLASSES)}")
        return CLASSES.index(name)


def pad_collate(items):
    """Items [(image (3, H, W), label)] -> batch (B, 3, max H, max W), labels (B,), sizes (B, 2)."""
    images, labels = zip(*items, strict=True)
    sizes = torch.tensor([image.shape[1:] for image in images])
    batch = torch.zeros(len(images), 3, *sizes.amax(0).tolist(), dtype=images[0].dtype)
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return batch, torch.tensor(labels), sizes


def padded_share(sizes, batch):
    """The share of a padded batch's pixels that belong to no image."""
    return 1 - sizes.prod(1).sum().item() / (len(batch) * batch.shape[2] * batch.shape[3])


def main(seed=0, log_dir=LOG_DIR, root=DATASET, batch_size=8):
    torch.manual_seed(seed)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    ants, bees = (Insects(folder / "train", kind) for kind in CLASSES)
    for insects, kind in zip((ants, bees), CLASSES, strict=True):
        insects.write_missing_labels(kind)
    both = ants + bees

    print("1. the sum of two Datasets")
    assert len(both) == len(ants) + len(bees)
    for index in (0, len(ants), -1):
        image, label = both[index]
        print(f"   item {index:4d}   {CLASSES[label]}   {tuple(image.shape)}")
    assert both[len(ants)][1] == CLASSES.index("bees")
    torch.testing.assert_close(both[len(ants)][0], bees[0][0])

    print("2. default_collate on images of unequal size")
    image, label = both[0]
    unequal = [(image, label), (image[:, 1:], label)]
    try:
        default_collate(unequal)
        raise AssertionError("images of unequal size were stacked")
    except RuntimeError as error:
        print(f"   {str(error).split(',')[0]}")

    print(f"3. pad_collate, shuffled batches of {batch_size}")
    loader = DataLoader(both, batch_size, shuffle=True, collate_fn=pad_collate)
    seen, shares = 0, []
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, (batch, labels, sizes) in enumerate(loader):
            seen += len(labels)
            shares.append(padded_share(sizes, batch))
            writer.add_images("insects/batch", batch, step)
            writer.add_scalar("insects/padded_share", shares[-1], step)
        for step, index in enumerate((0, len(ants))):
            writer.add_image("insects/item", both[index][0], step)
    assert seen == len(both)
    (height, width), image = sizes[0].tolist(), batch[0]
    assert not image[:, height:].any() and not image[:, :, width:].any()
    mean = sum(shares) / len(shares)
    print(f"   images {seen} of {len(both)}   batches {len(shares)}   padded share {mean:.2f}")
    return {"seen": seen, "length": len(both), "padded_share": mean}


if __name__ == "__main__":
    guard(main)
