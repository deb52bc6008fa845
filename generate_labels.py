"""One text file a label, beside its image folder: running this again changes nothing.

    train/ants/0013035.jpg   ->   train/ants_label/0013035.txt, which says "ants"

Data sets often come as a folder of images and a folder of annotations, matched by file name. That
match is an invariant worth checking: as many labels as images, none overwritten, no image touched.

Checked here   labels = images in every class; a second run writes no file; the images' bytes are as
               they were
TensorBoard    nothing to log: read_data.py shows what these labels lead to
Try            delete one label and run again: how many files are written? Exactly one
Source         hymenoptera_data, from PyTorch's transfer learning tutorial
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

from support.data import (
    class_folder,
    download_hymenoptera,
    hymenoptera,
    hymenoptera_source,
    image_files,
)
from support.files import DATASET, DataError, guard, options_parser, write_whole


def write_labels(folder):
    """Write the missing labels of train/ and val/, ants and bees.

    Returns {(split, kind): (images, written)}. Raises DataError for a class without images, and for
    a label without its image.
    """
    counts = {}
    for split in ("train", "val"):
        for kind in ("ants", "bees"):
            images = image_files(class_folder(folder / split, kind))
            labels = [folder / split / f"{kind}_label" / f"{image.stem}.txt" for image in images]
            stale = set(labels[0].parent.glob("*.txt")) - set(labels)
            if stale:
                raise DataError(f"{min(stale)} has no image: delete it, or bring the image back")
            missing = [label for label in labels if not label.exists()]
            for label in missing:
                with write_whole(label) as beside:
                    beside.write_text(kind, encoding="utf-8")
            counts[split, kind] = len(images), len(missing)
    return counts


def main(seed=0, root=DATASET, download=False):
    if download:
        download_hymenoptera(root)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    before = {path: path.read_bytes() for path in folder.glob("*/*/*") if path.suffix != ".txt"}
    first = write_labels(folder)
    again = write_labels(folder)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert all(written == 0 for _, written in again.values())
    print("1. labels, and what a second run writes")
    for (split, kind), (images, written) in first.items():
        labels = len(list((folder / split / f"{kind}_label").glob("*.txt")))
        print(
            f"   {split:<5} {kind:<5} images {images:4d}   labels {labels:4d}   "
            f"written {written:4d}   then {again[split, kind][1]}"
        )
    return {"first": first, "again": again}


def parse(argv=None):
    parser = options_parser()
    parser.add_argument(
        "--download", action="store_true", help="fetch the real photographs (45 MiB) first"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard(main, lambda: vars(parse()))
