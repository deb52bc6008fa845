"""nn.MaxPool2d keeps the largest number of each window; only its own pixel gets a gradient.

Use it between convolutions: MaxPool2d(2) halves height and width, so that the next convolution
costs a quarter. It has no parameters. Two things surprise: pixels at the right and lower end that
fill no whole window are dropped without a word, unless ceil_mode=True; and one pixel of a window
gets a gradient, where nn.AvgPool2d, which takes the mean of the window, gives one to all.

    y[r, s] = max over u, v of x[r * stride + u * dilation - padding,
                                 s * stride + v * dilation - padding]
    size = floor((H + 2 * padding - dilation * (k - 1) - 1) / stride) + 1
    with ceil_mode: ceil instead of floor, but no window may begin in the padding on the right

    x  one channel of H rows (or columns), minus infinity outside     y  output, row r, column s
    k  kernel: a window has k x k pixels     u, v  row and column in the window, 0 to k - 1
    stride  how far the window moves, k unless you say otherwise; padding, dilation: nn_conv.py

Needs          nn_conv.py
Checked here   the size over a sweep, both ceil modes; pooling by unfold = the layer; the gradient
               by hand = autograd's, and 1 / k^2 of the pixels get one; what pooling forgets
TensorBoard    by kernel k (step), in the runs max and average: pool/mean, pool/output and
               pool/gradient: the images; a number that gets no gradient is 0, black
Try            in show_gradient, put 5.0 for 4.0: the first window of x has two maxima. Which of
               them, 5 and 5, gets the gradient?
Answer         The one that comes first, row by row: the rows of MaxPool2d(2) stay as they are
Source         torch.nn.MaxPool2d, torch.nn.AvgPool2d
"""

import signal
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.data import as_tensors, open_images, source_line
from support.files import DATASET2, guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_maxpool"


# --- 1. in everyday code -----------------------------------------------------------------------


def print_matrices(columns):
    """Matrices of at most 4 rows side by side, each under its name."""
    print("   row" + "".join(f"{name:>27}" for name in columns))
    for r in range(4):
        rows = ["".join(f"{n:6g}" for n in m[r].tolist()) if r < len(m) else ""
                for m in columns.values()]  # fmt: skip
        print(f"   {r:3d}" + "".join(f"{row:>27}" for row in rows).rstrip())


def show_everyday():
    x = torch.tensor([[1.0, 3, 2, 0], [5, 4, 1, 1], [0, 2, 7, 6], [1, 2, 8, 3]]).view(1, 1, 4, 4)
    largest = nn.MaxPool2d(2)(x)  # (1, 1, 2, 2): the largest of every 2 x 2 pixels
    mean = nn.AvgPool2d(2)(x)  # (1, 1, 2, 2): their mean
    images = nn.MaxPool2d(2)(torch.rand(4, 6, 32, 32))  # (4, 6, 16, 16)
    print("1. What does pooling make of 4 x 4 numbers x?")
    print_matrices({"x": x[0, 0], "MaxPool2d(2)": largest[0, 0], "AvgPool2d(2)": mean[0, 0]})
    print(f"   -> {largest[0, 0, 0, 0]:g} is the largest of the first 2 x 2, {mean[0, 0, 0, 0]:g} "
          f"their mean; images (4, 6, 32, 32) become {tuple(images.shape)}")  # fmt: skip
    return largest[0, 0].tolist(), mean[0, 0].tolist(), tuple(images.shape)


# --- 2. sizes ----------------------------------------------------------------------------------


def output_size(size, kernel, stride, padding=0, dilation=1, ceil_mode=False):
    """How many windows fit in `size` pixels: floor(steps / stride) + 1.

    steps = size + 2 padding - dilation (kernel - 1) - 1 is the way from the first place to the
    last. With ceil_mode it is rounded up instead; but a last window that would begin in the padding
    on the right, at size + padding or later, counted from the padding on the left, is left out.
    Exercise.
    """
    steps = size + 2 * padding - dilation * (kernel - 1) - 1  # from the first place to the last
    if not ceil_mode:
        return steps // stride + 1
    out = -(-steps // stride) + 1  # -(-a // b) is a / b rounded up
    return out - 1 if (out - 1) * stride >= size + padding else out


def measured_size(size, kernel, stride, padding, dilation, ceil_mode):
    """output_size's number as the layer has it, None where it refuses."""
    layer = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    try:
        return layer(torch.empty(1, 1, size, size)).shape[-1]
    except RuntimeError:  # the output would be empty
        return None


def show_sizes():
    print("2. Which size comes out? Windows over a row of pixels 0 1 2 ...; . is padding")
    print("   pixels   kernel   stride   padding   ceil_mode   formula   layer   windows")
    rows, lost = ((6, 3, 3, 0), (5, 3, 3, 0), (8, 3, 2, 0), (5, 2, 2, 1)), []
    for size, kernel, stride, padding in rows:
        row = "." * padding + "0123456789"[:size] + "." * padding
        for ceil_mode in (False, True):
            options = size, kernel, stride, padding, 1, ceil_mode
            theory, measured = output_size(*options), measured_size(*options)
            windows = " ".join(row[r * stride : r * stride + kernel] for r in range(theory))
            print(f"   {size:6d}   {kernel:6d}   {stride:6d}   {padding:7d}   {ceil_mode!s:<9}   "
                  f"{theory:7d}   {measured:5d}   {windows}")  # fmt: skip
            if not ceil_mode:
                lost += [f"{pixel} of {size}" for pixel in row.strip(".") if pixel not in windows]
    sweep = product(range(1, 13), range(1, 6), range(1, 5), range(3), (1, 2), (False, True))
    equal = refused = 0
    for options in sweep:
        if options[3] <= options[1] // 2:  # the layer takes no padding beyond half of the kernel
            theory, measured = output_size(*options), measured_size(*options)
            assert theory == measured or (theory < 1 and measured is None)
            equal += theory == measured
            refused += measured is None
    print(f"   -> without ceil_mode no window has pixels {', '.join(lost)}; with it one has")
    print(f"      {equal:,} shapes of a sweep are as the formula says, {refused} more are refused")
    return equal, refused


# --- 3. from scratch ---------------------------------------------------------------------------


def max_pool(x, kernel, stride, padding=0, dilation=1, ceil_mode=False):
    """x (B, C, H, W) -> (B, C, H', W'): every window a column, its maximum taken.

    H' and W' come from output_size; F.pad with -infinity, so that the padding never wins (with
    ceil_mode there may be more of it on the right, or pixels may be cut off there: a negative pad);
    F.unfold makes the columns. Exercise.
    """
    pads, sizes = [], []
    for size in x.shape[2:]:
        out = output_size(size, kernel, stride, padding, dilation, ceil_mode)
        end = (out - 1) * stride + dilation * (kernel - 1) + 1  # of the last window
        pads.append((padding, end - size - padding))  # the second < 0 where pixels are dropped
        sizes.append(out)
    x = F.pad(x, (*pads[1], *pads[0]), value=-torch.inf)
    windows = F.unfold(x.flatten(0, 1)[:, None], kernel, dilation, stride=stride)  # (B C, k k, L)
    return windows.max(1).values.view(*x.shape[:2], *sizes)


def show_from_scratch(x):
    print(f"3. Is it the maximum of each window? MaxPool2d(3, ...), {len(x)} images in [-1, 1]")
    print("   options                           output             largest difference from by hand")
    off = []
    for options in ({"stride": 2}, {"stride": 2, "padding": 1}, {"stride": 2, "ceil_mode": True},
                    {"stride": 2, "padding": 1, "dilation": 2}):  # fmt: skip
        y = nn.MaxPool2d(3, **options)(x)
        off.append((y - max_pool(x, 3, **options)).abs().max().item())
        text = ", ".join(f"{name} {value}" for name, value in options.items())
        print(f"   {text:<31}   {tuple(y.shape)!s:<16}   {off[-1]:31g}")
    zeros = nn.MaxPool2d(3, 2)(F.pad(x, (1, 1, 1, 1))) - nn.MaxPool2d(3, 2, padding=1)(x)
    off.append(zeros.abs().max().item())
    print(f"   -> the largest difference is {max(off[:-1]):g}; with a frame of zeros, not of minus")
    print(f"      infinity, it would be {off[-1]:.2f}: 0 is more than a dark pixel, near -1")
    return off


# --- 4. where the gradient goes ----------------------------------------------------------------


def gradient(pool, x, upstream):
    """The gradient of sum(upstream * pool(x)) with respect to x, by torch.autograd.grad.

    upstream has the shape of pool(x); x itself stays as it is. Exercise.
    """
    x = x.clone().requires_grad_()
    return torch.autograd.grad(pool(x), x, upstream)[0]


def gradient_by_hand(x, kernel, stride, upstream):
    """The gradient of a max-pool without padding: of sum(upstream * max_pool(x, kernel, stride)).

    Zeros like x (B, C, H, W), and upstream's numbers (B, C, H', W') where the windows have their
    maximum, the first of equals. Where windows overlap, the numbers add. F.unfold, scatter, F.fold.
    Exercise.
    """
    windows = F.unfold(x.flatten(0, 1)[:, None], kernel, stride=stride)  # (B C, k k, L)
    place = windows.argmax(1, keepdim=True)  # (B C, 1, L)
    grads = torch.zeros_like(windows).scatter(1, place, upstream.view_as(place))
    folded = F.fold(grads, x.shape[2:], kernel, stride=stride)  # adds where windows overlap
    return folded.view_as(x)


def show_gradient(log_dir, images):
    x = torch.tensor([[1.0, 3, 2, 0], [5, 4.0, 1, 1], [0, 2, 7, 6], [1, 2, 8, 3]]).view(1, 1, 4, 4)
    ones = torch.ones(1, 1, 2, 2)
    print("4. Which pixels get a gradient? d sum(y) / dx of the two layers of section 1")
    print_matrices({"x": x[0, 0], "MaxPool2d(2)": gradient(nn.MaxPool2d(2), x, ones)[0, 0],
                    "AvgPool2d(2)": gradient(nn.AvgPool2d(2), x, ones)[0, 0]})  # fmt: skip
    print(f"   {len(images)} images, windows of k x k; formula: MaxPool2d 1/k^2, AvgPool2d all")
    print("   layer           k   pixels with a gradient       formula   mean of y")
    results = {}
    for run, Pool in {"max": nn.MaxPool2d, "average": nn.AvgPool2d}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for k in (1, 2, 4, 8):
                y = Pool(k)(images)
                upstream = torch.randn_like(y)
                grad = gradient(Pool(k), images, upstream)
                if run == "max":
                    assert torch.equal(grad, gradient_by_hand(images, k, k, upstream))
                share, mean = (grad != 0).double().mean().item(), y.mean().item()
                theory = 1 / k**2 if run == "max" else 1
                results[run, k] = share, theory, mean
                print(f"   {Pool.__name__}   {k:4d}   {share:22.2%}   {theory:11.2%}   {mean:9.3f}")
                draw(writer, f"{Pool.__name__}({k})", k, images, y, grad)
    assert all(share == theory for share, theory, _ in results.values())
    few, all_of_them = results["max", 4][0], results["average", 4][0]
    first, last = results["max", 1][2], results["max", 8][2]
    print(f"   -> with k = 4 MaxPool2d gives {few:.2%} of the pixels a gradient, AvgPool2d "
          f"{all_of_them:.0%};")  # fmt: skip
    print(f"      from k = 1 to 8 MaxPool2d's mean goes from {first:.2f} to {last:.2f}: lighter")
    return results


# --- 5. what is forgotten ----------------------------------------------------------------------


def turn_windows(x, k):
    """Images x (B, C, H, W), of which each k x k window is turned by half a turn."""
    windows = F.unfold(x.flatten(0, 1)[:, None], k, stride=k)  # (B C, k k, L)
    return F.fold(windows.flip(1), x.shape[2:], k, stride=k).view_as(x)


@torch.no_grad()
def show_forgotten(images):
    print("5. Each 2 x 2 window of the images turned by half: what does a layer notice?")
    print("   layer                       largest change of the output")
    layers = {"MaxPool2d(2)": nn.MaxPool2d(2), "AvgPool2d(2)": nn.AvgPool2d(2),
              "Conv2d(3, 3, 2, stride=2)": nn.Conv2d(3, 3, 2, stride=2).double()}  # fmt: skip
    turned, changes = turn_windows(images, 2), {}
    for name, layer in layers.items():
        changes[name] = (layer(turned) - layer(images)).abs().max().item()
        print(f"   {name:<25}   {changes[name]:28.3f}")
    blind = [name for name, change in changes.items() if change < 1e-12]
    print(f"   -> {' and '.join(blind)} notice nothing: they forget where in a window a number lay")
    return changes


# --- the lesson --------------------------------------------------------------------------------


def draw(writer, layer, k, images, y, grad):
    """The outputs y of the first images, and those of their pixels that get a gradient; mean y."""
    writer.add_scalar("pool/mean", y.mean(), k)
    names = [f"image {i}" for i in range(min(6, len(images)))]
    title = f"{layer}, each number of y as one square"
    writer.add_image("pool/output", caption_row(title, y[:6], names, height=128), k)
    title = f"{layer}; in each colour, what gets no gradient is black"
    learns = [torch.where(g != 0, image, 0) for g, image in zip(grad[:6], images, strict=False)]
    writer.add_image("pool/gradient", caption_row(title, learns, names, height=128), k)


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, batch=64):
    torch.manual_seed(seed)
    dataset = open_images(root)
    print(source_line(dataset))
    images = as_tensors(dataset)[0][:batch].double() / 255  # (B, 3, 32, 32) in [0, 1]
    measured = {"everyday": show_everyday(), "sweep": show_sizes()}
    measured["off"] = show_from_scratch(images * 2 - 1)
    measured["results"] = show_gradient(log_dir, images)
    measured["changes"] = show_forgotten(images)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
