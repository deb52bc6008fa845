"""ToTensor turns bytes (H, W, C) into floats (C, H, W), divided by 255.

A picture opens as bytes (uint8, 0 to 255), one row after the other, the three colours of a pixel
side by side. A convolution wants floats, and the colours as the first axis. ToTensor does both, so
it stands in front of most image data. The trap: only uint8 is divided, and no warning tells you
about the rest, so an image of floats in 0..255 stays 255 times too large. v2, today's transforms,
names each step: ToImage() for the axes, ToDtype(float32, scale=True) for type and range. It leaves
floats as they are, too. The cure: divide by 255 (or, if all are whole numbers in 0..255, make them
uint8 first).

    out[c, i, j] = in[i, j, c] / 255     in   (H, W, C) uint8: row i, column j, colour c
                                         out  (C, H, W) float32 in [0, 1]

Needs          nothing
Checked here   ToTensor is the formula bit for bit, v2 up to the last digit of a float32; other
               moves of the axes are not; which inputs are scaled to [0, 1]; what is refused; 256
               bytes go there, through a Normalize, and come back
TensorBoard    three rows of pictures, one step each: to_tensor/colours takes a picture apart,
               to_tensor/axes moves the axes wrongly, to_tensor/range forgets to divide
Try            in show_everyday, write dtype=np.int32: by what do ToTensor and v2 divide now?
Answer         ToTensor by 1, v2 by 2147483648 (2^31, the largest int32 as a float32): the type
               decides, not the numbers
Source         torchvision.transforms.ToTensor; torchvision's guide "Getting started with
               transforms v2"; the value ranges: v2.functional.to_dtype
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision import transforms
from torchvision.transforms import v2

from support.data import first_picture, hymenoptera, hymenoptera_source
from support.files import DATASET, guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "test_Tf"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    print("1. In everyday code: what becomes of a red and a blue pixel?")
    array = np.array([[[255, 0, 0], [51, 102, 204]]], dtype=np.uint8)  # (H = 1, W = 2, C = 3)
    x = transforms.ToTensor()(array)
    convert = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    y = convert(array)

    print("                          type      shape       red pixel                    blue pixel")
    for name, value, colours in (
        ("array (H, W, C)", array, array[0]),
        ("ToTensor (C, H, W)", x, x[:, 0].T),
        ("v2 (C, H, W)", y, y[:, 0].T),
    ):
        red, blue = ("  ".join(f"{v:7.3g}" for v in pixel.tolist()) for pixel in colours)
        print(f"   {name:<20}   {type_name(value):<7}   {tuple(value.shape)!s}   {red}   {blue}")
    divisors = [round((array[0, 1].sum() / z[:, 0, 1].sum()).item()) for z in (x, y)]
    print(f"   -> ToTensor divided by {divisors[0]}, v2 by {divisors[1]}")
    return divisors


def type_name(x):
    return str(x.dtype).removeprefix("torch.")


# --- 2. from scratch ---------------------------------------------------------------------------


def to_tensor(array):
    """A uint8 array (H, W, C) as a float32 tensor (C, H, W): out[c, i, j] = in[i, j, c] / 255.

    Exercise.
    """
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def to_array(x):
    """The way back: a float tensor (C, H, W) in [0, 1] as a uint8 array (H, W, C).

    It rounds to the nearest byte: 50.99998, after a Normalize and back, is 51. Exercise.
    """
    return (x * 255).round().byte().permute(1, 2, 0).numpy()


def new_to_tensor():
    """What v2 writes in place of ToTensor."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def show_formula(picture):
    side = min(picture.size)
    picture = picture.crop((0, 0, side, side))
    print(f"2. From scratch: {side} x {side} pixels of a picture, made a tensor in six ways")
    print("                                               largest   largest |difference|   numbers")
    print("   made by                     shape           number    to row 1               wrong")
    array = np.array(picture)
    x, bare, errors, wrong = to_tensor(array), torch.from_numpy(array), {}, {}
    for name, value in {
        "permute(2, 0, 1) / 255": x,
        "ToTensor, on the picture": transforms.ToTensor()(picture),
        "v2, on the picture": new_to_tensor()(picture),
        "v2, on its array": new_to_tensor()(array),
        "transpose(0, 2) / 255": bare.transpose(0, 2) / 255,  # rows and columns are swapped, too
        "reshape(3, H, W) / 255": bare.reshape(x.shape) / 255,
    }.items():
        gap, shape = (value - x).abs(), tuple(value.shape)
        errors[name], wrong[name] = gap.max().item(), (gap > 1e-6).float().mean().item()
        print(f"   {name:<25}   {shape!s:<13}   {value.max():<7.3f}   {errors[name]:<20.1e}   "
              f"{wrong[name]:7.0%}")  # fmt: skip
    library, rounding = errors["ToTensor, on the picture"], errors["v2, on its array"]
    rounding = max(errors["v2, on the picture"], rounding)  # it multiplies by a rounded 1 / 255
    assert library == 0 and rounding <= torch.finfo(torch.float32).eps / 2
    silent = [name.partition(" /")[0] for name in wrong if wrong[name] > 0]
    print(f"   -> ToTensor is off by {library:g}, v2 by {rounding:.0e}: a float32's last digit")
    print(f"   -> of the same shape, yet wrong: {' and '.join(silent)}")

    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    undone = (to_tensor(every) - 0.5) / 0.25 * 0.25 + 0.5  # Normalize, and back
    cut_off = (undone * 255).byte().permute(1, 2, 0).numpy()
    back, cut_back = (int((bytes_ == every).sum()) for bytes_ in (to_array(undone), cut_off))
    print(f"   -> of {every.size} bytes, normalised and undone, to_array gives back {back}; "
          f"without round() {cut_back}")  # fmt: skip
    return {"rounding": rounding, "wrong": wrong, "back": back, "cut_back": cut_back}


# --- 3. the trap: what is not scaled -----------------------------------------------------------


def show_range(picture):
    array = np.array(picture)
    floats = array.astype(np.float32)
    print(f"3. What is scaled to [0, 1]? The largest number of the picture is {array.max()}")
    print("                                 ToTensor              v2")
    print("   input                         type      largest     type      largest")
    made = {}
    for name, value in {
        "uint8": array,
        "float32 in 0..255": floats,
        "the same, divided by 255": floats / 255,
        "the same, made uint8 first": floats.astype(np.uint8),
        "float64 in 0..1": array / 255,
        "int16 in 0..255": array.astype(np.int16),
    }.items():
        x, y = transforms.ToTensor()(value), new_to_tensor()(value)
        made[name] = type_name(x), x.max().item(), type_name(y), y.max().item()
        print("   {:<27}   {:<7}   {:7.3f}     {:<7}   {:7.3f}".format(name, *made[name]))
    unscaled = [name for name, (_, x, _, y) in made.items() if min(x, y) > 1]
    double = [name for name, (x, _, y, _) in made.items() if x != y]
    print(f"   -> neither of them scales {' and '.join(unscaled)}")
    print(f"   -> they differ in type on {' and '.join(double)}")
    by = array.max() / made["int16 in 0..255"][3]
    print(f"   -> v2 divides int16 by {by:.0f}, so that the picture is nearly black")
    return made


# --- 4. what is refused ------------------------------------------------------------------------


def answer_to(transform, value):
    """The type of what `transform` makes of `value`, or of the error that it raises."""
    try:
        result = transform(value)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error).__name__
    return f"{type(result).__name__}{', unchanged' if result is value else ''}"


def show_refused():
    print("4. What do they make of an input they are not made for?")
    print("                            type of the result, or the error that is raised")
    print("   input                    ToTensor     v2.ToImage")
    answers = {}
    for name, value in {
        "a tensor (3, H, W)": torch.zeros(3, 2, 2),
        "an array (1, H, W, 3)": np.zeros((1, 2, 2, 3), np.uint8),
        "the path of a picture": "ant.jpg",
    }.items():
        answers[name] = answer_to(transforms.ToTensor(), value), answer_to(v2.ToImage(), value)
        print(f"   {name:<22}   {answers[name][0]:<10}   {answers[name][1]}")
    silent = [name for name, (_, second) in answers.items() if "unchanged" in second]
    refused = sum(first.endswith("Error") for first, _ in answers.values())
    print(f"   -> ToTensor refuses {refused} of {len(answers)}")
    print(f"   -> v2 hands on, without a word: {', '.join(silent)}")
    return answers


# --- pictures for TensorBoard ------------------------------------------------------------------


def log_row(writer, tag, title, images, height=180):
    """`images` is {the words below an image: the image (1 or 3, H, W)}."""
    writer.add_image(f"to_tensor/{tag}", caption_row(title, images.values(), images, height), 0)


def log_pictures(log_dir, picture):
    array = np.array(picture)
    x = to_tensor(array)
    reshaped = torch.from_numpy(array).reshape(x.shape)
    with SummaryWriter(log_dir, purge_step=0) as writer:
        log_row(writer, "colours", "x = ToTensor()(picture): one plane for each colour", {
            "x\nall three": x,
            "x[0]\nlight = much red": x[:1],
            "x[1]\nlight = much green": x[1:2],
            "x[2]\nlight = much blue": x[2:],
        })  # fmt: skip
        log_row(writer, "axes", "from (H, W, 3) to (3, H, W), in two ways", {
            "permute(2, 0, 1)\nright: each pixel keeps its place": x,
            "reshape(3, H, W)\nwrong, and of the same shape": reshaped,
        })  # fmt: skip
        log_row(writer, "range", "ToTensor on two types: only uint8 is divided by 255", {
            "uint8 in 0..255\nright: now in 0..1": transforms.ToTensor()(array),
            "float32 in 0..255\nwrong: still in 0..255,\nand what is over 1 is shown as 1":
                transforms.ToTensor()(array.astype(np.float32)),
        })  # fmt: skip


def main(seed=0, log_dir=LOG_DIR, root=DATASET):
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    picture = first_picture(folder, "ants")
    measured = {
        "divisors": show_everyday(),
        "formula": show_formula(picture),
        "range": show_range(picture),
        "answers": show_refused(),
    }
    log_pictures(log_dir, picture)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
