"""ToTensor turns bytes (H, W, C) into floats (C, H, W), divided by 255.

A picture opens as bytes (uint8, whole numbers from 0 to 255), row after row, the three colours of a
pixel side by side. PyTorch's image layers expect floats, with the colours as the axis before rows
and columns. ToTensor does both, so most image code begins with it. v2, torchvision's newer set of
transforms (operations on pictures), writes two steps instead: ToImage() moves the axes,
ToDtype(torch.float32, scale=True) changes type and range. The trap: neither way scales floats, and
no warning tells you, so an image of floats in 0..255 stays 255 times too large. Divide it by 255.

    in   (H, W, C) uint8: row i, column j, colour c     out  (C, H, W) float32 in [0, 1]

    out[c, i, j] = in[i, j, c] / 255

Needs          nothing
Checked here   ToTensor is the formula bit for bit, v2 up to the last digit of a float32; all 256
               bytes come back; which types are scaled; what other inputs get
TensorBoard    three rows of pictures, one step each: to_tensor/colours takes a picture apart,
               to_tensor/axes moves the axes wrongly, to_tensor/range forgets to divide
Try            in show_everyday, write dtype=np.int32 for dtype=np.uint8: by what do ToTensor and
               v2 divide now?
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


def new_to_tensor():
    """What v2 writes in place of ToTensor; v2.ToTensor itself is deprecated."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def type_name(x):
    return str(x.dtype).removeprefix("torch.")


def show_everyday():
    print("1. In everyday code: what becomes of a red and a blue pixel?")
    array = np.array([[[255, 0, 0], [51, 102, 204]]], dtype=np.uint8)  # (H = 1, W = 2, C = 3)
    x, y = transforms.ToTensor()(array), new_to_tensor()(array)
    print("                                              red pixel         blue pixel")
    print("                        type      shape       r     g     b     r     g     b")
    for name, value, colours in (
        ("array (H, W, C)", array, array[0]),
        ("ToTensor (C, H, W)", x, x[:, 0].T),
        ("v2 (C, H, W)", y, y[:, 0].T),
    ):
        numbers = "   ".join(f"{v:<3.3g}" for v in colours.flatten().tolist())
        print(f"   {name:<18}   {type_name(value):<7}   {tuple(value.shape)!s}   {numbers}")
    divisors = [round((array[0, 1].sum() / z[:, 0, 1].sum()).item()) for z in (x, y)]
    print(f"   -> ToTensor divided by {divisors[0]}, v2 by {divisors[1]}")
    return divisors


# --- 2. from scratch ---------------------------------------------------------------------------


def to_tensor(array):
    """A uint8 array (H, W, C) as a float32 tensor (C, H, W): out[c, i, j] = in[i, j, c] / 255.

    Exercise.
    """
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def show_formula(picture):
    side = min(picture.size)
    picture = picture.crop((0, 0, side, side))
    print(f"2. From scratch: {side} x {side} pixels of a picture, made a tensor in six ways")
    print("   permute(2, 0, 1) leaves each pixel in its place; transpose(0, 2) also swaps rows and")
    print("   columns; reshape fills the new shape with the numbers as they come")
    print("                                               largest   largest |difference|   numbers")
    print("   made by                     shape           number    from row 1             wrong")
    array = np.array(picture)
    x, bare, errors, wrong = to_tensor(array), torch.from_numpy(array), {}, {}
    for name, value in {
        "permute(2, 0, 1) / 255": x,
        "ToTensor, on the picture": transforms.ToTensor()(picture),
        "v2, on the picture": new_to_tensor()(picture),
        "v2, on its array": new_to_tensor()(array),
        "transpose(0, 2) / 255": bare.transpose(0, 2) / 255,
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
    print(f"   -> wrong without an error, as the picture is square: {' and '.join(silent)}")
    return {"rounding": rounding, "wrong": wrong}


# --- 3. the way back ---------------------------------------------------------------------------


def to_array(x):
    """The way back: a float tensor (C, H, W) in [0, 1] as a uint8 array (H, W, C).

    It rounds to the nearest byte: 50.99998, after a Normalize and back, is 51. Exercise.
    """
    return (x * 255).round().byte().permute(1, 2, 0).numpy()


def show_way_back():
    print("3. And back, from a tensor normalised and undone: are all 256 bytes as before?")
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    undone = (to_tensor(every) - 0.5) / 0.25 * 0.25 + 0.5
    cut_off = (undone * 255).byte().permute(1, 2, 0).numpy()
    print("   bytes made by            as before   changed")
    equal = []
    for name, array in (("to_array, which rounds", to_array(undone)), ("byte() alone", cut_off)):
        equal.append(int((array == every).sum()))
        print(f"   {name:<22}   {equal[-1]:9d}   {every.size - equal[-1]:7d}")
    print(f"   -> without round() {equal[0] - equal[1]} bytes are off: byte() cuts 50.99998 to 50")
    return equal


# --- 4. the trap: what is not scaled -----------------------------------------------------------


def show_range(picture):
    array = np.array(picture)
    floats = array.astype(np.float32)
    print(f"4. What is scaled to [0, 1]? The largest number of the picture is {array.max()}")
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
    left = [[name for name, row in made.items() if row[i] > 1] for i in (1, 3)]
    print(f"   -> left unscaled by ToTensor: {', '.join(left[0])}; by v2: {', '.join(left[1])}")
    by = array.max() / made["int16 in 0..255"][3]
    print(f"   -> v2 divides int16 by {by:.0f}, so that the picture is nearly black")
    return made


# --- 5. other inputs ---------------------------------------------------------------------------


def answer_to(transform, value):
    """The type and shape of what `transform` makes of `value`, or the error that it raises."""
    try:
        result = transform(value)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error).__name__
    return f"{type(result).__name__} {tuple(getattr(result, 'shape', ()))}".removesuffix(" ()")


def show_others():
    print("5. What do they make of other inputs, here of 2 x 4 pixels?")
    print("                           ToTensor     v2.ToImage gives")
    print("   input                   raises       or raises")
    answers = {}
    for name, value in {
        "a tensor (2, 4, 3)": torch.zeros(2, 4, 3),
        "an array (1, 2, 4, 3)": np.zeros((1, 2, 4, 3), np.uint8),
        "the path of a picture": "ant.jpg",
    }.items():
        answers[name] = answer_to(transforms.ToTensor(), value), answer_to(v2.ToImage(), value)
        print(f"   {name:<21}   {answers[name][0]:<10}   {answers[name][1]}")
    silent = [name for name, (_, second) in answers.items() if not second.endswith("Error")]
    refused = sum(first.endswith("Error") for first, _ in answers.values())
    print(f"   -> ToTensor refuses {refused} of {len(answers)}")
    print(f"   -> v2 raises no error, and moves no axis, for {' and '.join(silent)}")
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
        "back": show_way_back(),
        "range": show_range(picture),
        "answers": show_others(),
    }
    log_pictures(log_dir, picture)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
