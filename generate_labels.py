"""Label files belong to images by name; a script can write the missing ones and leave every other
file as it was.

A data set has images to train on (train/) and images to test on (val/). It may also have one text
file per image, the label file. You need label files if a label says more than a folder's name can,
or if people correct labels by hand. Some mistakes raise no error: a correction is overwritten, an
image has no label, a label has no image, or a.jpg and a.png share one label.

    train/ants/0013035.jpg   ->   train/ants_label/0013035.txt, which says "ants"

    ants          the class, named by the folder of its images
    ants_label    the folder of its labels
    0013035       the stem: a file's name without its ending, the same for an image and its label

This script writes the label folders into train/ and val/, where read_data.py looks for them. But
torchvision's ImageFolder takes each folder in train/ for a class. Once the script has run,
ImageFolder("train") raises an error, as two of the four folders hold no image: see section 4.

Needs          nothing
Checked here   only missing labels are written, and a second run writes none; no file that was there
               is changed; a label without an image, or two images for one label, stops the script;
               what ImageFolder makes of label folders
TensorBoard    nothing to log: read_data.py shows what these labels lead to
Try            in show_labels, in corrected.write_text("bees", ...), write "" for "bees": is a label
               that says nothing written anew?
Answer         No. The file exists, so it is kept; section 4 prints it, because '' is not 'ants'
Source         hymenoptera_data, from PyTorch's transfer learning tutorial
"""

import os
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
    print(f"   -> labels written: {new}; kept as they were: {', '.join(kept) or 'none'}")
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
    print("2. Are the missing labels written, and nothing else? On a copy of the data, of which")
    print(f"   {len(labels[:remove])} labels were removed and one was corrected by hand")
    print("                            with a   written by   written by a")
    print("   split   class   images    label    the script     second run")
    for (split, class_name), (count, new) in first.items():
        again = second[split, class_name][1]
        print(f"   {split:<5}   {class_name:<5}   {count:6d}   {count - new:6d}   {new:11d}   "
              f"{again:12d}")  # fmt: skip
    runs = [sum(new for _, new in counts.values()) for counts in (first, second)]
    assert not changed
    print(f"   -> {runs[0]} written, then {runs[1]}; other files that changed: {len(changed)}")
    total, labels = sum(n for n, _ in data.values()), len([*folder.glob("*/*_label/[!.]*.txt")])
    print(f"   -> the data itself has {total} images and {labels} labels")
    return copy, {"data": data, "first": first, "second": second, "changed": changed}


# --- 3. what has no partner --------------------------------------------------------------------


def answer_to(copy):
    """Of train/ants: the images without a label, the labels without an image; and write_labels."""
    alone, orphans = "-", "-"
    try:
        images = image_files(class_folder(copy / "train", "ants"))
        alone, orphans = (", ".join(path.name for path in paths) or "-"
                          for paths in find_unmatched(images, label_files(images)))  # fmt: skip
        answer = f"writes {sum(new for _, new in write_labels(copy).values())}"
    except DataError as error:
        answer = str(error).replace(f"{copy / 'train'}{os.sep}", "")
    return alone, orphans, answer


def show_unmatched(copy):
    print("3. What becomes of a file without a partner? The copy is whole before each row")
    print("                          image without   label without")
    print("   what is done           a label         an image        write_labels")
    first, second, third, *_ = image_files(class_folder(copy / "train", "ants"))
    label, picture, twin = label_path(second), third.read_bytes(), first.with_suffix(".png")
    label.unlink()
    answers = {f"{label.name} deleted": answer_to(copy)}  # which writes it again
    third.unlink()
    answers[f"{third.name} deleted"] = answer_to(copy)
    third.write_bytes(picture)
    twin.write_bytes(picture)
    answers[f"{twin.name} added"] = answer_to(copy)
    twin.unlink()
    for done, (alone, orphans, answer) in answers.items():
        print(f"   {done:<20}   {alone:<13}   {orphans:<13}   {answer}")
    mended = sum(answer.startswith("writes") for *_, answer in answers.values())
    print(f"   -> {mended} of {len(answers)} is mended; the others stop the script in one line")
    return answers


# --- 4. ImageFolder ----------------------------------------------------------------------------


def show_image_folder(copy):
    print("4. Does ImageFolder need label files? In the copy they are in train/, with the images")
    print("   call                                     classes   bees has the number")
    train, other = copy / "train", {}
    try:
        refused = f"no error, {len(ImageFolder(train).classes)} classes"
    except FileNotFoundError as error:
        refused = f"{type(error).__name__}: {str(error).split('. ')[0]}"
    print(f"   ImageFolder(train)                       {refused}")
    every = ImageFolder(train, allow_empty=True)
    labels = {path: label_path(Path(path)).read_text(encoding="utf-8") for path, _ in every.samples}
    for class_name in CLASSES:
        shutil.move(train / f"{class_name}_label", copy)
    two = ImageFolder(train)
    bees = [dataset.class_to_idx[class_folder(train, "bees").name] for dataset in (every, two)]
    print(f"   ImageFolder(train, allow_empty=True)     {len(every.classes):7d}   {bees[0]:20d}")
    print(f"   labels moved out, ImageFolder(train)     {len(two.classes):7d}   {bees[1]:20d}")
    for path, number in two.samples:  # [(path, number of its class)]
        if labels[path] != CLASSES[number]:
            other[Path(path).name] = labels[path], CLASSES[number]
    for name, (text, class_name) in other.items():
        print(f"   {name}: its label file says {text!r}, ImageFolder says {class_name!r}")
    same = len(two) - len(other)
    print("   -> ImageFolder reads no label file; "
          f"{same} of {len(two)} label files say the same as the folder")  # fmt: skip
    print(f"   -> with allow_empty=True, bees is class {bees[0]}, not {bees[1]}, without an error:")
    print("      keep label folders of your own data outside train/. These stay in train/, and")
    print("      TwoClasses in read_data.py skips them")
    return refused, every, two, other


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
        refused, every, two, other = show_image_folder(copy)
    return {"texts": texts, "counts": counts, "unmatched": unmatched, "refused": refused,
            "classes": (every.classes, two.classes), "other": other}  # fmt: skip


def parse(argv=None):
    parser = options_parser()
    parser.add_argument(
        "--download", action="store_true", help="fetch the real photographs (45 MiB) first"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard(main, lambda: vars(parse()))
