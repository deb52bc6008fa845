"""ToTensor swaps the axes, makes a tensor and, for uint8 alone, divides by 255.

    (H, W, C) uint8 in 0..255   ->   (C, H, W) float32 in [0, 1],   out[c, y, x] = in[y, x, c] / 255

Everything after it expects that form. The trap is its silence: an array that is already float keeps
its range, so images in 0..255 as float32 come out unscaled. v2 says each step by name instead:
ToImage() for the axes and type, ToDtype(float32, scale=True) for the range.

Checked here   the formula, pixel by pixel; grey images; float arrays pass unscaled; refused types;
               v2 equal, up to one rounding, on PIL images and on arrays
TensorBoard    to_tensor/image, to_tensor/red, green, blue: one picture a channel
Try            torch.from_numpy instead: what shape and type come out? (H, W, C) uint8, as they were
Source         torchvision.transforms.ToTensor; torchvision.transforms.v2, "transforms v2" guide
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

LOG_DIR = Path(__file__).resolve().parent / "runs" / "test_Tf"


def to_tensor(array):
    """uint8 (H, W, C) -> float32 (C, H, W) in [0, 1]: ToTensor, written out."""
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def new_to_tensor():
    """What v2 writes in place of ToTensor."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def describe(name, x):
    kind = f"{x.dtype}".removeprefix("torch.")
    return f"   {name:<26} {tuple(x.shape)!s:<15} {kind:<8} {x.min():7.3f} … {x.max():7.3f}"


def refusal(transform, value):
    """The type of the error that `transform` raises on `value`; None if it takes it."""
    try:
        transform(value)
    except (TypeError, ValueError) as error:
        return type(error).__name__


def main(seed=0, log_dir=LOG_DIR, root=DATASET):
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    picture = first_picture(folder, "ants")
    array, convert = np.array(picture), transforms.ToTensor()

    print(f"1. a picture of width {picture.width} and height {picture.height}, before and after")
    x = convert(picture)  # (H, W, 3) -> (3, H, W)
    print(describe("NumPy array of the picture", array))
    print(describe("ToTensor()(picture)", x))
    print(describe("ToTensor()(grey picture)", convert(picture.convert("L"))))
    print(describe("ToTensor()(float array)", convert(array.astype(np.float32))))

    assert convert(picture.convert("L")).shape == (1, picture.height, picture.width)
    assert convert(array.astype(np.float32)).max() == array.max()

    print("2. against the formula, and against v2")
    torch.testing.assert_close(x, to_tensor(array), rtol=0, atol=0)
    again = new_to_tensor()
    for name, value in {"PIL image": picture, "uint8 array": array}.items():
        error = (convert(value) - again(value)).abs().max().item()
        assert error <= torch.finfo(torch.float32).eps / 2  # x / 255 against x * (1 / 255)
        print(f"   {name:<12} formula: equal bit for bit   v2: largest difference {error:.1e}")

    print("3. what ToTensor refuses")
    refused = {name: refusal(convert, value) for name, value in {
        "a tensor": x, "a list": [[0]], "an array of 4 axes": array[None]}.items()}  # fmt: skip
    assert all(refused.values())
    for name, error in refused.items():
        print(f"   {name:<20} {error}")

    with SummaryWriter(log_dir, purge_step=0) as writer:
        writer.add_image("to_tensor/image", x, 0)
        for channel, name in enumerate(("red", "green", "blue")):
            writer.add_image(f"to_tensor/{name}", x[channel : channel + 1], 0)
    return {"shape": tuple(x.shape), "refused": refused}


if __name__ == "__main__":
    guard(main)
