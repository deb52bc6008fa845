"""Most transforms are one small formula on pixels; what is drawn at random repeats with its seed.

Transforms stand between the picture file and the network. Resize and crops make one size of many.
Normalize gives mean 0 and standard deviation 1, if mean and std are those of the data. Flips and
ColorJitter show the network each picture in a new form every time. Compose([f, g]) is g(f(x)).
Normalize and flips can be undone; crops, Resize and ColorJitter cannot. If you forget to undo
Normalize, you look at pictures that are half black.

    x  picture (3, H, W) in [0, 1]     h, w, s  sizes in pixels     i, j  the window's first pixel

    Normalize       (x - mean) / std, a mean and a std for each colour; undone by x * std + mean
    Resize(s)       the short side becomes s, the long one int(s * long / short)
    Resize((h, w))  exactly h by w pixels; a new pixel is always a weighted mean of old ones
    RandomCrop      the window x[:, i:i+h, j:j+w]; every corner (i, j) is equally likely
    Horizontal flip x.flip(-1), with probability p
    ColorJitter     f * x + (1 - f) * other, with what is below 0 or above 1 set to 0 or 1; f is
                    drawn; other is black (brightness), the mean grey (contrast), or x in grey
                    (saturation). The three come in a random order. A fourth part, hue, is left out

Needs          test_Tf.py
Checked here   Normalize, Resize's size, flip and blends against torchvision.transforms.v2; what may
               change places with Normalize; where in x a crop lies; that a seed repeats it
TensorBoard    rows of pictures, one step each: useful_tf/normalize, resize, crops, flips, jitter
               (the three formulas), jitter_drawn (f drawn by four seeds)
Try            in show_crops, put v2.RandomResizedCrop(64) for v2.RandomCrop(64): where is it found?
Answer         Nowhere: what it cut out it also resized, so that no window of x has its pixels
Source         torchvision.transforms.v2, "Getting started with transforms v2"
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from support.data import first_picture, hymenoptera, hymenoptera_source
from support.files import DATASET, guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "Useful_TF"


def log_row(writer, tag, title, images, height=None):
    """`images` is {the words below an image: the image (3, H, W)}."""
    writer.add_image(f"useful_tf/{tag}", caption_row(title, images.values(), images, height), 0)


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(picture):
    print("1. In everyday code: what becomes of a picture file, and of four grey pixels?")
    usual = v2.Compose([
        v2.ToImage(),  # from PIL to a tensor (3, H, W)
        v2.Resize(100),
        v2.RandomCrop(64),
        v2.RandomHorizontalFlip(p=0.5),
        v2.ToDtype(torch.float32, scale=True),  # from 0 ... 255 to 0 ... 1
        v2.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
    ])  # fmt: skip
    y = usual(picture)
    print(f"   width, height {picture.size} -> {tuple(y.shape)} {y.dtype}, "
          f"{y.min():.2f} to {y.max():.2f}")  # fmt: skip
    print("   pipeline = Compose([RandomCrop((1, 3)), RandomHorizontalFlip(p=0.5), "
          "Normalize([0.5], [0.5])])")  # fmt: skip
    x = torch.tensor([[[0.0, 0.25, 0.75, 1.0]]])  # (C = 1, H = 1, W = 4)
    pipeline = v2.Compose([
        v2.RandomCrop((1, 3)),  # height 1, width 3
        v2.RandomHorizontalFlip(p=0.5),
        v2.Normalize(mean=[0.5], std=[0.5]),
    ])  # fmt: skip
    drawn = [pipeline(x) for _ in range(64)]

    for name, y in (
        ("x", x),
        ("CenterCrop((1, 2))(x)", v2.CenterCrop((1, 2))(x)),
        ("RandomHorizontalFlip(p=1)(x)", v2.RandomHorizontalFlip(p=1)(x)),
        ("Normalize([0.5], [0.5])(x)", v2.Normalize([0.5], [0.5])(x)),
        *((f"pipeline(x), call {call}", y) for call, y in enumerate(drawn[:3], 1)),
    ):
        print(f"   {name:<28} {'  '.join(f'{v:5.2f}' for v in y.flatten().tolist())}")
    kinds = len({tuple(y.flatten().tolist()) for y in drawn})
    print(f"   -> {len(drawn)} calls gave {kinds} of 4 possible results: 2 windows, flipped or not")
    return kinds


# --- 2. Normalize ------------------------------------------------------------------------------


def normalize(x, mean, std):
    """(x - mean) / std for a picture x (3, H, W); mean and std are (3,), one number a colour.

    Exercise.
    """
    return (x - mean[:, None, None]) / std[:, None, None]


def denormalize(x, mean, std):
    """The way back from normalize: x * std + mean; mean and std are (3,) again.

    Exercise.
    """
    return x * std[:, None, None] + mean[:, None, None]


def show_normalize(writer, x):
    print("2. Normalize by the picture's own mean and std: what comes out, and can it be undone?")
    print("             before            after                                largest error")
    print("   colour     mean     std      mean     std   smallest   largest   after undoing")
    mean, std = x.mean((1, 2)), x.std((1, 2))  # of this picture; usually of a whole data set
    y = v2.Normalize(mean.tolist(), std.tolist())(x)
    torch.testing.assert_close(y, normalize(x, mean, std))
    back = denormalize(y, mean, std)
    for c, name in enumerate(("red", "green", "blue")):
        numbers = mean[c], std[c], y[c].mean().abs(), y[c].std(), y[c].min(), y[c].max()
        row = "{:6.3f}  {:6.3f}    {:6.3f}  {:6.3f}   {:8.3f}  {:8.3f}".format(*numbers)
        print(f"   {name:<7}   {row}   {(back - x)[c].abs().max():.0e}")
    error, black = (back - x).abs().max().item(), (y <= 0).float().mean().item()
    print(f"   -> undone, x is back to within {error:.0e}")
    print(f"   -> if you do not undo it, {black:.0%} of the numbers are 0 or less, and drawn black")
    log_row(writer, "normalize", "Normalize, and the way back", {
        "x": x,
        "Normalize: below 0 is\nblack, above 1 white": y,
        "undone: x again": back,
    })  # fmt: skip
    return {"error": error, "black": black}


# --- 3. Resize ---------------------------------------------------------------------------------


def short_side_size(height, width, short):
    """(height, width) after Resize(short): the short side is `short`, the other in proportion, cut
    to a whole number.

    Exercise.
    """
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def show_resize(writer, x, s=64):
    print("3. Resize: is the shape kept?")
    print("                      height   width   width per height")
    made = {
        "x": (x, ""),
        f"Resize({s})": (v2.Resize(s)(x), "all, in shape"),
        f"Resize(({s}, {s}))": (v2.Resize((s, s))(x), "all, squeezed"),
        f"CenterCrop({s})": (v2.CenterCrop(s)(x), "without the rim"),
    }
    aspects, row = {}, {}
    for name, (y, words) in made.items():
        height, width = y.shape[1:]
        aspects[name], row[f"{name}\n{height} x {width}\n{words}"] = width / height, y
        print(f"   {name:<17}   {height:6}   {width:5}   {width / height:16.3f}")
    assert made[f"Resize({s})"][0].shape[1:] == short_side_size(*x.shape[1:], s)
    exact, kept = s * max(aspects["x"], 1 / aspects["x"]), max(made[f"Resize({s})"][0].shape)
    print(f"   -> to keep the shape the long side must be {exact:.2f}: Resize({s}) makes it {kept}")
    log_row(writer, "resize", "two ways to resize, and a crop", row)
    return aspects


# --- 4. Compose: the order ---------------------------------------------------------------------


def show_order(x):
    print("4. May a transform T change places with Normalize, which is a * x + b?")
    print("   If every pixel of T(x) is a weighted mean of pixels of x in the same colour,")
    print("   T(a * x + b) = a * T(x) + b: both orders agree.")
    print("   T                        mean of T(white)   largest difference of the two orders")
    norm = v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    apart, white = {}, {}  # the two orders; mean of T(white)
    for name, T in {
        "Resize(64)": v2.Resize(64),
        "CenterCrop(64)": v2.CenterCrop(64),
        "RandomHorizontalFlip(1)": v2.RandomHorizontalFlip(1),
        "brightness times 0.7": lambda x: tv.adjust_brightness(x, 0.7),
        "contrast times 0.4": lambda x: tv.adjust_contrast(x, 0.4),
    }.items():
        apart[name] = (v2.Compose([T, norm])(x) - v2.Compose([norm, T])(x)).abs().max().item()
        white[name] = T(torch.ones_like(x)).mean().item()
        print(f"   {name:<23}  {white[name]:16.3f}   {apart[name]:14.1e}")
    free = [name for name, gap in apart.items() if gap < 1e-4]
    print(f"   -> yes: {', '.join(free)}")
    print(f"   -> no: {', '.join(name for name in apart if name not in free)}")
    not_enough = [name for name in apart if name not in free and abs(white[name] - 1) < 1e-3]
    print(f"   -> white stays 1, and yet no: {', '.join(not_enough) or 'none'}")
    return apart, white


# --- 5. RandomCrop and its seed ----------------------------------------------------------------


def seeded(transform, x, seed):
    """transform(x) after the seed was set: in this process, each DataLoader worker has its own."""
    torch.manual_seed(seed)
    return transform(x)


def find_window(image, crop):
    """The corners (i, j) at which `crop` (C, h, w) is a window of `image` (C, H, W)."""
    h, w = crop.shape[1:]
    windows = image.unfold(1, h, 1).unfold(2, w, 1)  # (C, H-h+1, W-w+1, h, w)
    equal = (windows == crop[:, None, None]).flatten(3).all(-1).all(0)
    return [tuple(corner) for corner in equal.nonzero().tolist()]


def show_crops(writer, x, seed):
    print("5. RandomCrop(64): where in x is the crop, and does a seed repeat it?")
    print("   seed    found at (row, column)    the same seed again")
    crop = v2.RandomCrop(64)
    corners, repeats, images = {}, {}, {}
    for s in range(seed, seed + 4):
        y = seeded(crop, x, s)
        corners[s], repeats[s] = find_window(x, y), torch.equal(y, seeded(crop, x, s))
        found = ", ".join(map(str, corners[s])) or "nowhere"
        images[f"seed {s}:\n{found}"] = y
        print(f"   {s:4}    {found:<22}    {'the same crop' if repeats[s] else 'another crop'}")
    found, again = [c[0] for c in corners.values() if len(c) == 1], sum(repeats.values())
    print(f"   -> {len(found)} of 4 crops are a window of x, in {len(set(found))} places; "
          f"{again} of 4 came again with their seed")  # fmt: skip
    log_row(writer, "crops", "x, and RandomCrop(64): which row, column", {"x": x} | images)
    return corners, repeats


# --- 6. flips and colours ----------------------------------------------------------------------


def blend(x, other, f):
    """f * x + (1 - f) * other, cut to [0, 1]: f = 1 is x, f < 1 nearer to `other`, f > 1 beyond x.

    Exercise.
    """
    return (f * x + (1 - f) * other).clamp(0, 1)


def show_colours(writer, x, seed):
    print("6. f * x + (1 - f) * other, cut to [0, 1]: is this what ColorJitter does?")
    print("   change         f     other picture    largest difference from torchvision")
    weights = torch.tensor([0.2989, 0.587, 0.114])  # how bright red, green and blue look
    grey = (weights[:, None, None] * x).sum(0, keepdim=True).expand_as(x)  # (3, H, W)
    errors, images = {}, {"x": x}
    for name, f, words, other, library in (
        ("brightness", 1.6, "black", torch.zeros_like(x), tv.adjust_brightness),
        ("contrast", 0.4, "the mean grey", grey.mean(), tv.adjust_contrast),
        ("saturation", 0.0, "x in grey", grey, tv.adjust_saturation),
        ("saturation", 2.5, "x in grey", grey, tv.adjust_saturation),
    ):
        y = images[f"{name}\nf = {f}"] = blend(x, other, f)
        errors[name, f] = (y - library(x, f)).abs().max().item()
        print(f"   {name:<10}   {f:.1f}     {words:<13}    {errors[name, f]:20.0e}")
    worst = max(errors.values())
    print(f"   -> {'yes' if worst < 1e-5 else 'no'}, the largest difference is {worst:.0e}")
    log_row(writer, "jitter", "f * x + (1 - f) * other, cut to [0, 1]", images, 72)
    flips = {"horizontal": v2.RandomHorizontalFlip(1)(x), "vertical": v2.RandomVerticalFlip(1)(x)}
    assert torch.equal(flips["horizontal"], x.flip(-1))
    log_row(writer, "flips", "the two flips, with p = 1", {"x": x} | flips)
    jitter = v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5)
    drawn = {f"seed {s}": seeded(jitter, x, s) for s in range(seed, seed + 4)}
    log_row(writer, "jitter_drawn", "x, and ColorJitter(0.5, 0.5, 0.5)", {"x": x} | drawn, 72)
    return errors


def main(seed=0, log_dir=LOG_DIR, root=DATASET):
    torch.manual_seed(seed)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    picture = first_picture(folder, "bees")
    x = tv.to_dtype(tv.pil_to_tensor(picture), scale=True)
    x = v2.Resize(100)(x)
    with SummaryWriter(log_dir, purge_step=0) as writer:
        measured = {
            "kinds": show_everyday(picture),
            "normalize": show_normalize(writer, x),
            "aspects": show_resize(writer, x),
            "order": show_order(x),
            "crops": show_crops(writer, x, seed),
            "colours": show_colours(writer, x, seed),
        }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
