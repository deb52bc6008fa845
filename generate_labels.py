"""Label files belong to images by name; a script can write the missing ones and leave every other
file as it was.

A data set may come as a folder of images and a folder of annotations, one text file per image. You
need such files where a label says more than the name of a folder, or is corrected by hand. What
goes wrong makes no noise: a correction is overwritten, an image has no label, a label has no image,
or a.jpg and a.png share one label.

    train/ants/0013035.jpg   ->   train/ants_label/0013035.txt, which says "ants"

    ants       the class, named by the folder of its images     ants_label  the folder of its labels
    0013035    the stem: a file's name without its ending, the same for an image and its label

torchvision's ImageFolder reads no label files: the name of an image's folder is its label. Label
folders beside the images make it raise FileNotFoundError, as it takes each folder for a class and
finds no image in two. With allow_empty=True it has four classes, and bees is 2 instead of 1.

Needs          nothing
Checked here   labels = images in every class; only missing labels are written, and a second run
               writes none; no file that was there is changed; what ImageFolder makes of it
TensorBoard    nothing to log: read_data.py shows what these labels lead to
Try            in show_labels (it works on a copy of the data), write "" in place of "bees" into
               the label: is a label that says nothing written anew?
Answer         No: a file is there, so it is kept, whatever it says; one of the labels still differs
Source         hymenoptera_data, from PyTorch's transfer learning tutorial
"""

import shutil
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

        before = {path.name: path.read_text(encoding="utf-8") for path in labels.iterdir()}
        for image in images.glob("*.jpg"):
            label = labels / f"{image.stem}.txt"
            if not label.exists():
                label.write_text("ants", encoding="utf-8")
        after = {path.name: path.read_text(encoding="utf-8") for path in labels.iterdir()}

    print("   image   label   said before   says now")
    for name, text in sorted(after.items()):
        print(f"   {name[0]}.jpg   {name}   {before.get(name, '(no file)'):<11}   {text}")
    kept = [name for name in before if after[name] == before[name]]
    new = len(after) - len(before)
    print(f"   -> labels written: {new}; {', '.join(kept)} was there and is kept")
    return before, after


# --- 2. the labels of a data set ---------------------------------------------------------------


def label_path(image):
    """The label file of an image: train/ants/x.jpg -> train/ants_label/x.txt.

    In older copies the folder is called ants_image: its labels are in ants_label, too. Exercise.
    """
    class_name = image.parent.name.removesuffix("_image")
    return image.parents[1] / f"{class_name}_label" / f"{image.stem}.txt"


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

    For each split and class: image_files(class_folder(folder / split, class_name)) are the images
    (DataError if there are none), label_files(images) their labels; find_unmatched pairs them.
    Raises DataError for a label without its image; open_rgb(image) raises it for an image that
    cannot be opened. Only if all is well, each label_path(image) that is missing is written: it
    says class_name. Returns {(split, class_name): (number of images, number written)}. Exercise.
    """
    missing, counts = [], {}
    for split in SPLITS:
        for class_name in CLASSES:
            images = image_files(class_folder(folder / split, class_name))
            alone, orphans = find_unmatched(images, label_files(images))
            if orphans:
                raise DataError(f"{orphans[0]} has no image: delete it, or bring the image back")
            for image in alone:
                open_rgb(image)  # raises, before any label is written
            missing += [(label_path(image), class_name) for image in alone]
            counts[split, class_name] = len(images), len(alone)
    for label, class_name in missing:
        with write_whole(label) as beside:  # on a full disk there is no empty label
            beside.write_text(class_name, encoding="utf-8")
    return counts


def show_labels(folder, scratch, remove=3):
    """Label the data in `folder`, then a copy of it in `scratch`, where labels are missing."""
    data = write_labels(folder)
    copy = shutil.copytree(folder, scratch / folder.name)
    corrected, *labels = label_files(image_files(class_folder(copy / "train", "ants")))
    corrected.write_text("bees", encoding="utf-8")  # by hand: this one is a bee
    for label in labels[:remove]:
        label.unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()}
    first, second = write_labels(copy), write_labels(copy)
    changed = [path for path, content in before.items() if path.read_bytes() != content]

    print(
        "2. Does every image have a label now? First the data itself, then a copy of it, on which"
    )
    print(f"   {len(labels[:remove])} labels were removed and one was corrected by hand")
    print("                            the data            the copy")
    print("   split   class   images   had label   new     had label   new   new in a second run")
    labelled, total = 0, 0
    for (split, class_name), (count, new) in data.items():
        images = image_files(class_folder(folder / split, class_name))
        alone, _ = find_unmatched(images, label_files(images))
        labelled, total = labelled + count - len(alone), total + count
        copied, again = first[split, class_name][1], second[split, class_name][1]
        print(f"   {split:<5}   {class_name:<5}   {count:6d}   {count - new:9d}   {new:3d}     "
              f"{count - copied:9d}   {copied:3d}   {again:19d}")  # fmt: skip
    runs = [sum(new for _, new in counts.values()) for counts in (first, second)]
    assert labelled == total and not changed
    print(f"   -> the data: {labelled} of {total} images have a label")
    print(f"   -> the copy: {runs[0]} written, then {runs[1]}; files that were there and changed: "
          f"{len(changed)}")  # fmt: skip
    return copy, {"data": data, "first": first, "second": second, "changed": changed}


# --- 3. what has no partner --------------------------------------------------------------------


def show_unmatched(folder):
    print("3. What has no partner? Nothing is deleted: two names are left out of the lists")
    images = image_files(class_folder(folder / "train", "ants"))
    labels = label_files(images)
    given = [images[0], *images[2:]]
    alone, orphans = find_unmatched(given, labels[1:])
    print("   left out of the lists     found to have no partner")
    for left_out, found in ((labels[0], alone), (images[1], orphans)):
        print(f"   {left_out.name:<22}    {', '.join(path.name for path in found)}")
    pairs = len(given) - len(alone)
    print(f"   -> {len(alone) + len(orphans)} files have no partner; pairs left: {pairs}")
    return alone, orphans


# --- 4. ImageFolder ----------------------------------------------------------------------------


class TwoClasses(ImageFolder):
    """An ImageFolder for which only the folders of images are classes."""

    def find_classes(self, directory):
        names = [class_folder(Path(directory), class_name).name for class_name in CLASSES]
        return names, {name: label for label, name in enumerate(names)}


def show_image_folder(copy):
    print("4. Does ImageFolder need label files? The label folders of the copy are in train/, too")
    print("   call                                   classes   number of class bees   images")
    train = copy / "train"
    try:
        ImageFolder(train)
        refused = ""
    except FileNotFoundError as error:
        refused = f"{type(error).__name__}: {str(error).split('. ')[0]}"
    print(f"   ImageFolder(train)                     {refused}")
    datasets = {"ImageFolder(train, allow_empty=True)": ImageFolder(train, allow_empty=True),
                "TwoClasses(train)": TwoClasses(train)}  # fmt: skip
    numbers = []
    for call, dataset in datasets.items():
        numbers.append(dataset.class_to_idx[class_folder(train, "bees").name])
        print(f"   {call:<36}   {len(dataset.classes):7d}   {numbers[-1]:20d}   {len(dataset):6d}")
    other = []  # images whose label file says another class than their folder
    for path, target in datasets["TwoClasses(train)"].samples:
        if label_path(Path(path)).read_text(encoding="utf-8") != CLASSES[target]:
            other.append(Path(path).name)
    same = len(dataset) - len(other)
    print(
        f"   -> TwoClasses reads no label file: the files say the same of {same} of {len(dataset)},"
    )
    print(f"      and something else of {', '.join(other) or 'none'}")
    print(f"   -> label folders in train/ make bees class {numbers[0]} instead of {numbers[1]}:")
    print("      after this run use TwoClasses, or keep the label folders outside train/")
    return refused, datasets, other


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, root=DATASET, download=False):
    if download:
        download_hymenoptera(root)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    texts = show_everyday()
    with tempfile.TemporaryDirectory() as scratch:
        copy, counts = show_labels(folder, Path(scratch))
        unmatched = show_unmatched(copy)
        refused, datasets, other = show_image_folder(copy)
    return {"texts": texts, "counts": counts, "unmatched": unmatched, "refused": refused,
            "datasets": datasets, "other": other}  # fmt: skip


def parse(argv=None):
    parser = options_parser()
    parser.add_argument(
        "--download", action="store_true", help="fetch the real photographs (45 MiB) first"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard(main, lambda: vars(parse()))
