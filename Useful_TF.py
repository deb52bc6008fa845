"""Normalize, Resize, crops, flips and ColorJitter are each a small formula on pixels, and the same
seed gives the same random result.

Transforms stand between a picture, opened by the library PIL, and the network. Resize and crops
give all pictures one size. Normalize, told the mean and standard deviation (std) of a data set,
makes them 0 and 1. Flips and ColorJitter often show the network a picture in another form.
Compose([f, g]) is g(f(x)). If you look at a normalised picture without undoing it, about half of
its numbers are below 0 and are shown as 0.

    x  picture (3, H, W) in [0, 1]     s, h, w  sizes in pixels     i, j  a window's first pixel

    Normalize           (x - mean) / std, a mean and a std for each colour; undone by x * std + mean
    Resize(s)           the short side becomes s, the long one int(s * long / short)
    Resize((h, w))      exactly h by w pixels
    RandomCrop((h, w))  the window x[:, i:i+h, j:j+w]; every place (i, j) is equally likely
    flip, horizontal    x.flip(-1), with probability p
    ColorJitter         f * x + (1 - f) * other, cut to [0, 1]; f is drawn evenly from 1 - b (never
                        below 0) to 1 + b; other is black (brightness=b), the mean grey
                        (contrast=b), or x in grey (saturation=b); several come in random order

Needs          test_Tf.py
Checked here   the formulas against torchvision; where in x a crop lies; that its seed repeats it;
               which transforms may stand behind Normalize
TensorBoard    rows of pictures, one step each: useful_tf/normalize, resize, crops, flips, jitter
               (the three formulas), jitter_drawn (f drawn by four seeds)
Try            in show_crops, write v2.RandomResizedCrop(64) for v2.RandomCrop(64): where is it now?
Answer         Nowhere: what it cuts out it also resizes, so that no window of x has its pixels
Source         torchvision.transforms.v2, "Getting started with transforms v2"
"""

import signal
from itertools import product
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


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(picture):  # picture = PIL.Image.open("bee.jpg").convert("RGB")
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
    print("   usual: ToImage, Resize(100), RandomCrop(64), flip, ToDtype, Normalize(0.5, 0.5)")
    print("   small: RandomCrop((1, 3)), flip, Normalize(0.5, 0.5)")
    print(f"   usual(picture of {picture.width} x {picture.height})   {tuple(y.shape)} {y.dtype}, "
          f"{y.min():.2f} to {y.max():.2f}")  # fmt: skip
    x = torch.tensor([[[0.0, 0.25, 0.75, 1.0]]])  # (C = 1, H = 1, W = 4)
    small = v2.Compose([
        v2.RandomCrop((1, 3)),  # height 1, width 3
        v2.RandomHorizontalFlip(p=0.5),
        v2.Normalize(mean=[0.5], std=[0.5]),
    ])  # fmt: skip
    drawn = [small(x) for _ in range(64)]

    for name, y in (
        ("x", x),
        ("CenterCrop((1, 2))(x)", v2.CenterCrop((1, 2))(x)),
        ("RandomHorizontalFlip(1)(x)", v2.RandomHorizontalFlip(p=1)(x)),
        ("Normalize([0.5], [0.5])(x)", v2.Normalize([0.5], [0.5])(x)),
        *((f"small(x), call {call}", y) for call, y in enumerate(drawn[:3], 1)),
    ):
        print(f"   {name:<26}   {'  '.join(f'{v:5.2f}' for v in y.flatten().tolist())}")
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
    print("            before           after                                largest error")
    print("   colour    mean    std      mean    std    smallest   largest   after undoing")
    mean, std = x.mean((1, 2)), x.std((1, 2))  # of this picture; usually of a whole data set
    y = v2.Normalize(mean.tolist(), std.tolist())(x)
    torch.testing.assert_close(y, normalize(x, mean, std))
    back = denormalize(y, mean, std)
    for c, name in enumerate(("red", "green", "blue")):
        numbers = mean[c], std[c], y[c].mean(), y[c].std(), y[c].min(), y[c].max()
        row = "{:6.3f}  {:5.3f}    {:6.3f}  {:5.3f}    {:8.3f}  {:8.3f}".format(
            *(round(v.item(), 3) + 0.0 for v in numbers))  # fmt: skip
        print(f"   {name:<6}  {row}   {(back - x)[c].abs().max():.0e}")
    error = (back - x).abs().max().item()
    low, high = (mask.float().mean().item() for mask in (y < 0, y > 1))
    print(f"   -> undone, x is back to within {error:.0e}")
    print(f"   -> not undone, {low:.0%} of the numbers are below 0 and shown as 0, "
          f"{high:.0%} above 1 and shown as 1")  # fmt: skip
    log_row(writer, "normalize", "Normalize, and the way back", {
        "x": x,
        "Normalize: below 0 is\nblack, above 1 white": y,
        "undone: x again": back,
    })  # fmt: skip
    return {"error": error, "low": low, "high": high}


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
    print("3. Resize: are the proportions kept?")
    print("                      height   width   width per height")
    made = {
        "x": (x, ""),
        f"Resize({s})": (v2.Resize(s)(x), "all, in proportion"),
        f"Resize(({s}, {s}))": (v2.Resize((s, s))(x), "all, squeezed"),
        f"CenterCrop({s})": (v2.CenterCrop(s)(x), "without the rim"),
    }
    aspects, row = {}, {}
    for name, (y, words) in made.items():
        height, width = y.shape[1:]
        aspects[name], row[f"{name}\n{height} x {width}\n{words}"] = width / height, y
        print(f"   {name:<17}   {height:6}   {width:5}   {width / height:16.3f}")
    assert made[f"Resize({s})"][0].shape[1:] == short_side_size(*x.shape[1:], s)
    exact, long = s * max(aspects["x"], 1 / aspects["x"]), max(made[f"Resize({s})"][0].shape)
    keeps = "keeps" if abs(long - exact) < 1 else "does not keep"
    print(f"   -> Resize({s}) {keeps} them, up to a part of a pixel: {long} for {exact:.2f}")
    log_row(writer, "resize", "two ways to resize, and a crop", row)
    return aspects


# --- 4. RandomCrop and its seed ----------------------------------------------------------------


def seeded(transform, x, seed):
    """transform(x) after torch.manual_seed(seed). A DataLoader's worker has a seed of its own."""
    torch.manual_seed(seed)
    return transform(x)


def find_window(image, crop):
    """The places (i, j) at which `crop` (C, h, w) is a window of `image` (C, H, W)."""
    h, w = crop.shape[1:]
    places = product(range(image.shape[1] - h + 1), range(image.shape[2] - w + 1))
    return [(i, j) for i, j in places if torch.equal(image[:, i : i + h, j : j + w], crop)]


def show_crops(writer, x, seed):
    print("4. RandomCrop(64): where in x is the crop, and does a seed repeat it?")
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


# --- 5. flips and colours -----------------------------------------------------------------------


def blend(x, other, f):
    """f * x + (1 - f) * other, cut to [0, 1]: f = 1 is x, f < 1 nearer to `other`, f > 1 beyond x.

    Exercise.
    """
    return (f * x + (1 - f) * other).clamp(0, 1)


def show_colours(writer, x, seed):
    print("5. Are flips and ColorJitter the formulas? f is fixed by brightness=(f, f)")
    print("   transform             formula                         largest difference")
    weights = torch.tensor([0.2989, 0.587, 0.114])  # how bright red, green and blue look
    grey = (weights[:, None, None] * x).sum(0, keepdim=True).expand_as(x)  # (3, H, W)
    errors, images = {}, {"x": x}
    flips = {"horizontal": v2.RandomHorizontalFlip(1)(x), "vertical": v2.RandomVerticalFlip(1)(x)}
    made = [("flip, horizontal", "x.flip(-1)", x.flip(-1), flips["horizontal"])]
    for kind, f, word, other in (
        ("brightness", 1.6, "black", torch.zeros_like(x)),
        ("contrast", 0.4, "the mean grey", grey.mean()),
        ("saturation", 0.0, "(x in grey)", grey),
        ("saturation", 2.5, "(x in grey)", grey),
    ):
        y = images[f"{kind}\nf = {f}"] = blend(x, other, f)
        formula = f"{f:.1f} * x {'+' if f <= 1 else '-'} {abs(1 - f):.1f} * {word}"
        made.append((f"{kind}, f = {f:.1f}", formula, y, v2.ColorJitter(**{kind: (f, f)})(x)))
    for name, formula, y, library in made:
        errors[name] = (y - library).abs().max().item()
        print(f"   {name:<19}   {formula:<29}   {errors[name]:18.0e}")
    worst = max(errors.values())
    print(f"   -> {'yes' if worst < 1e-5 else 'no'}, the largest difference is {worst:.0e}")
    log_row(writer, "jitter", "f * x + (1 - f) * other, cut to [0, 1]", images, 72)
    log_row(writer, "flips", "the two flips, with p = 1", {"x": x} | flips)
    jitter = v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5)
    drawn = {f"seed {s}": seeded(jitter, x, s) for s in range(seed, seed + 4)}
    log_row(writer, "jitter_drawn", "x, and ColorJitter(0.5, 0.5, 0.5)", {"x": x} | drawn, 72)
    return errors


# --- 6. Compose: the order ---------------------------------------------------------------------


def show_order(x):
    print("6. Does a transform T give the same after Normalize as before it?")
    print(f"   {'T':<39}   largest |Normalize(T(x)) - T(Normalize(x))|")
    norm, gaps = v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]), {}
    z = norm(x)
    bright = tv.adjust_brightness
    for name, before, behind in (
        ("Resize(64)", v2.Resize(64)(x), v2.Resize(64)(z)),
        ("CenterCrop(64)", v2.CenterCrop(64)(x), v2.CenterCrop(64)(z)),
        ("RandomHorizontalFlip(1)", v2.RandomHorizontalFlip(1)(x), v2.RandomHorizontalFlip(1)(z)),
        ("brightness, f = 0.7", bright(x, 0.7), bright(z, 0.7)),
        ("brightness, f = 1 (only cuts to [0, 1])", bright(x, 1), bright(z, 1)),
        ("0.7 * x, not cut", 0.7 * x, 0.7 * z),
    ):
        gaps[name] = (norm(before) - behind).abs().max().item()
        print(f"   {name:<39}   {gaps[name]:43.1e}")
    _, cut, scaled = list(gaps.values())[-3:]
    print(f"   -> the same: {', '.join(name for name, gap in gaps.items() if gap < 1e-4)}")
    print("      (Resize takes averages of pixels, with weights that sum to 1)")
    print("   -> put ColorJitter before Normalize. After Normalize it would cut numbers to [0, 1]")
    print(f"      (error {cut:.2f}) and take 0, now the mean colour, as black (error {scaled:.2f})")
    return gaps


# --- the lesson --------------------------------------------------------------------------------


def log_row(writer, tag, title, images, height=None):
    """`images` is {the words below an image: the image (3, H, W)}."""
    writer.add_image(f"useful_tf/{tag}", caption_row(title, images.values(), images, height), 0)


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
            "crops": show_crops(writer, x, seed),
            "colours": show_colours(writer, x, seed),
            "order": show_order(x),
        }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
