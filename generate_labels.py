"""Label files are matched to images by name: writing those that are missing changes nothing else.

A data set may come as a folder of images and a folder of annotations, one text file per image. You
need such files where a label says more than the name of a folder, or is corrected by hand. What
goes wrong makes no noise: a correction is overwritten, an image has no label, a label has no image,
or a.jpg and a.png share one label.

    train/ants/0013035.jpg   ->   train/ants_label/0013035.txt, which says "ants"

    ants       the class, named by the folder of its images     ants_label  the folder of its labels
    0013035    the stem: a file's name without its ending, the same for an image and its label

ImageFolder needs no label files, since the name of the folder is the label. It takes every folder
for a class, though: label folders beside the images become classes without images.

Needs          nothing
Checked here   labels = images in every class; a second run writes no file; no image is changed;
               ImageFolder has the same labels
TensorBoard    nothing to log: read_data.py shows what these labels lead to
Try            delete train/ants_label/*3.txt and run again: what does write_labels write this time?
Answer         The deleted files, and no other: the count under "written" is theirs, the rest is 0
Source         hymenoptera_data, from PyTorch's transfer learning tutorial
"""

import signal
import tempfile
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

from torchvision.datasets import ImageFolder

from support.data import (
    class_folder,
    download_hymenoptera,
    hymenoptera,
    hymenoptera_source,
    image_files,
    open_rgb,
)
from support.files import DATASET, DataError, guard, options_parser, write_whole

SPLITS, CLASSES = ("train", "val"), ("ants", "bees")


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    print("1. Write a label for each image that has none")
    with tempfile.TemporaryDirectory() as scratch:
        images, labels = Path(scratch, "ants"), Path(scratch, "ants_label")
        images.mkdir()
        labels.mkdir()
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            (images / name).touch()
        (labels / "b.txt").write_text("bees", encoding="utf-8")  # somebody has corrected it

        written = []
        for image in sorted(images.glob("*.jpg")):
            label = labels / f"{image.stem}.txt"
            if not label.exists():
                label.write_text("ants", encoding="utf-8")
                written.append(label.name)

        print("   image   label   says")
        texts = {label.name: label.read_text(encoding="utf-8") for label in labels.iterdir()}
        for name, text in sorted(texts.items()):
            print(f"   {name[0]}.jpg   {name}   {text}")
    print(f"   -> written: {' and '.join(written)}; b.txt still says {texts['b.txt']}")
    return texts


# --- 2. the labels of a data set ---------------------------------------------------------------


def label_path(image):
    """The label file of an image: train/ants/x.jpg -> train/ants_label/x.txt.

    In older copies the folder is called ants_image: its labels are in ants_label, too. Exercise.
    """
    kind = image.parent.name.removesuffix("_image")
    return image.parents[1] / f"{kind}_label" / f"{image.stem}.txt"


def find_unmatched(images, labels):
    """Two lists of paths: images without a label, and labels without an image.

    A label belongs to the image of the same stem (path.stem); the order is kept. Exercise.
    """
    image_stems, label_stems = {p.stem for p in images}, {p.stem for p in labels}
    alone = [image for image in images if image.stem not in label_stems]
    return alone, [label for label in labels if label.stem not in image_stems]


def label_files(images):
    """The label files that lie in the label folder of these images, sorted by name."""
    files = label_path(images[0]).parent.glob("*.txt")
    return sorted(path for path in files if not path.name.startswith("."))


def write_labels(folder):
    """Write the missing labels of train/ and val/, ants and bees, or none if anything is amiss.

    Returns {(split, kind): (images, written)}. Raises DataError for a class without images, a label
    without its image, and an image that cannot be opened. Exercise.
    """
    missing, counts = [], {}
    for split in SPLITS:
        for kind in CLASSES:
            images = image_files(class_folder(folder / split, kind))
            alone, orphans = find_unmatched(images, label_files(images))
            if orphans:
                raise DataError(f"{orphans[0]} has no image: delete it, or bring the image back")
            for image in alone:
                open_rgb(image)  # raises, before any label is written
            missing += [(label_path(image), kind) for image in alone]
            counts[split, kind] = len(images), len(alone)
    for label, kind in missing:
        with write_whole(label) as beside:  # on a full disk there is no empty label
            beside.write_text(kind, encoding="utf-8")
    return counts


def show_labels(folder):
    print("2. Has every image a label, and what does a second run change?")
    before = {path: path.read_bytes() for path in folder.glob("*/*/*") if path.suffix != ".txt"}
    first = write_labels(folder)
    again = write_labels(folder)
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    print("   split   class   images   labels   written   written by a second run")
    totals = [0, 0]
    for (split, kind), (count, written) in first.items():
        images = image_files(class_folder(folder / split, kind))
        labels = label_files(images)
        assert find_unmatched(images, labels) == ([], [])
        totals = [totals[0] + count, totals[1] + len(labels)]
        print(f"   {split:<5}   {kind:<5}   {count:6d}   {len(labels):6d}   {written:7d}   "
              f"{again[split, kind][1]:23d}")  # fmt: skip
    rewritten = sum(written for _, written in again.values())
    assert not changed and rewritten == 0
    print(f"   -> {totals[1]} labels for {totals[0]} images; the second run wrote {rewritten}, and "
          f"{len(changed)} images were changed")  # fmt: skip
    return first, again


# --- 3. what has no partner --------------------------------------------------------------------


def show_unmatched(folder):
    print("3. What is found if the second image and the label of the first one are missing?")
    images = image_files(class_folder(folder / "train", "ants"))
    labels = label_files(images)
    given = [images[0], *images[2:]]
    alone, orphans = find_unmatched(given, labels[1:])
    print(f"   images without a label    {', '.join(path.name for path in alone)}")
    print(f"   labels without an image   {', '.join(path.name for path in orphans)}")
    pairs = len(given) - len(alone)
    print(f"   -> {len(alone) + len(orphans)} files have no partner; pairs left: {pairs}")
    return alone, orphans


# --- 4. ImageFolder ----------------------------------------------------------------------------


class TwoClasses(ImageFolder):
    """An ImageFolder for which only the folders of images are classes."""

    def find_classes(self, directory):
        names = [class_folder(Path(directory), kind).name for kind in CLASSES]
        return names, {name: label for label, name in enumerate(names)}


def show_image_folder(folder):
    print("4. Does ImageFolder need label files? It lists train/, where the label folders lie, too")
    print("   call                                    classes   bees are class   images")
    train = folder / "train"
    try:
        ImageFolder(train)
        refused = ""
    except FileNotFoundError as error:
        refused = str(error).split(". ")[0]
    print(f"   ImageFolder(train)                      refused: {refused}")
    datasets = {"ImageFolder(train, allow_empty=True)": ImageFolder(train, allow_empty=True),
                "TwoClasses(train)": TwoClasses(train)}  # fmt: skip
    for call, dataset in datasets.items():
        bees = dataset.class_to_idx[class_folder(train, "bees").name]
        print(f"   {call:<37}   {len(dataset.classes):7d}   {bees:14d}   {len(dataset):6d}")
    targets = {Path(path): target for path, target in dataset.samples}
    images = [path for kind in CLASSES for path in image_files(class_folder(train, kind))]
    texts = [label_path(path).read_text(encoding="utf-8") for path in images]
    same = sum(CLASSES[targets[path]] == text for path, text in zip(images, texts, strict=True))
    print(f"   -> TwoClasses reads no label file, yet {same} of {len(images)} labels are the same")
    return refused, datasets, same


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, root=DATASET, download=False):
    if download:
        download_hymenoptera(root)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    texts = show_everyday()
    first, again = show_labels(folder)
    unmatched = show_unmatched(folder)
    refused, datasets, same = show_image_folder(folder)
    return {"texts": texts, "first": first, "again": again, "unmatched": unmatched,
            "refused": refused, "datasets": datasets, "same": same}  # fmt: skip


def parse(argv=None):
    parser = options_parser()
    parser.add_argument(
        "--download", action="store_true", help="fetch the real photographs (45 MiB) first"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard(main, lambda: vars(parse()))
