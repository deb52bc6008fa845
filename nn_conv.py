"""A convolution layer multiplies each window of an image with its weights and sums the products.

Read this to see what nn.Conv2d does inside, and to know the size of an output before you run it: a
Linear layer behind it needs that number, and stops with an error at any other. The stride is how
many pixels the window moves; padding puts a frame of zeros around the image; with dilation 2 a
window takes every second pixel. Taken literally, F.conv2d is no convolution: section 5.

    y[r, s] = sum over u, v of w[u, v] * x[r * stride + u * dilation - padding,
                                           s * stride + v * dilation - padding]
    size = floor((H + 2 * padding - dilation * (k - 1) - 1) / stride) + 1

    x  image of H rows (or columns), 0 outside     w  kernel: a filter's k x k weights of a channel
    y  output, at row r and column s               u, v  row and column in the window, 0 to k - 1
    With C channels the C sums are added, then a bias. With groups, the channels are split into
    equal parts, and an output channel sums over one part only.

Needs          nn_conv2d.py
Checked here   one window by numbers; the size over a sweep; a loop and a matrix product = F.conv2d;
               what moves with the image; the turned kernel = a convolution by Fourier transform
TensorBoard    conv/sizes: what stride, padding and dilation make of a letter; a pixel is a square
Try            in main, put show_moved(stride=2) for show_moved(stride=1): does the output still
               move with the image?
Answer         Only if the image moves by 2 or 4 pixels; the output then moves by 1 or 2 places
Source         Dumoulin & Visin 2016, arXiv:1603.07285; torch.nn.Conv2d
"""

import signal
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from support.files import guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_conv"
LETTER = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
).float()  # an F: turned by half it looks different


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    x = torch.tensor([[1.0, 2, 0, 1], [0, 1, 3, 1], [2, 0, 1, 0], [1, 1, 0, 2]])  # 4 x 4 pixels
    w = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])  # 3 x 3 weights
    y = F.conv2d(x[None, None], w[None, None])[0, 0]  # it takes (B, C, H, W), here (1, 1, 4, 4)
    by_loop = torch.zeros(2, 2)
    for r in range(2):
        for s in range(2):
            by_loop[r, s] = (x[r : r + 3, s : s + 3] * w).sum()
    products = x[:3, :3] * w
    print("1. What does F.conv2d do with an image x of 4 x 4 pixels and weights w of 3 x 3?")
    print("   row   x            first window   w           products   y by loop   y by F.conv2d")
    for r in range(4):
        texts = ["".join(f"{int(n):3d}" for n in matrix[r]) if r < len(matrix) else ""
                 for matrix in (x, x[:3, :3], w, products, by_loop, y)]  # fmt: skip
        print("   {:3d} {:<14}{:<15}{:<12}{:<11}{:<12}{}".format(r, *texts).rstrip())
    print(f"   -> the products of the first window add up to {products.sum():.0f}, which is "
          f"y[0, 0] = {y[0, 0]:.0f}; then the window moves on")  # fmt: skip
    assert torch.equal(by_loop, y)
    return y


# --- 2. sizes ----------------------------------------------------------------------------------


def output_size(size, kernel, stride=1, padding=0, dilation=1):
    """floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1. Exercise."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def drawn_windows(size, kernel, stride, padding, dilation):
    """The windows over a row of pixels 0123456..., as text; "." is a zero of the padding."""
    row = "." * padding + "0123456789"[:size] + "." * padding
    reach = dilation * (kernel - 1) + 1  # from the first to the last pixel of a window
    starts = range(0, len(row) - reach + 1, stride)
    return " ".join(row[start : start + reach : dilation] for start in starts)


def measured_size(size, kernel, *options):
    """output_size's number as F.conv2d has it, None where it refuses."""
    x, weight = torch.empty(1, 1, size, size), torch.empty(1, 1, kernel, kernel)
    try:
        return F.conv2d(x, weight, None, *options).shape[-1]
    except RuntimeError:  # the window is larger than the padded image
        return None


def show_sizes():
    print("2. Which size comes out, by which windows over pixels 0 1 2 ...? (point: a zero)")
    print("   pixels  kernel  stride  padding  dilation   formula  F.conv2d  left out   windows")
    same, lost = [], []
    for options in ((7, 3, 1, 0, 1), (7, 3, 1, 1, 1), (7, 5, 1, 2, 1), (7, 3, 2, 0, 1),
                    (8, 3, 2, 0, 1), (8, 3, 2, 1, 1), (7, 3, 1, 0, 2)):  # fmt: skip
        size, kernel, stride, padding, dilation = options
        theory, measured = output_size(*options), measured_size(*options)
        windows = drawn_windows(*options)
        unseen = "".join(pixel for pixel in "0123456789"[:size] if pixel not in windows)
        same += [f"{padding} for kernel {kernel}"] if measured == size and stride == 1 else []
        lost += [f"pixel {pixel} with stride {stride}" for pixel in unseen]
        print(f"   {size:6d}  {kernel:6d}  {stride:6d}  {padding:7d}  {dilation:8d}   "
              f"{theory:7d}  {measured:8d}  {unseen or '-':>8}   {windows}")  # fmt: skip
    sweep = list(product(range(1, 13), range(1, 6), range(1, 4), range(3), range(1, 4)))
    equal = sum(output_size(*options) == measured_size(*options) for options in sweep)
    refused = sum(output_size(*options) < 1 and not measured_size(*options) for options in sweep)
    print(f"   -> padding keeps the size at stride 1: {', '.join(same)};\n      no window has "
          f"{', '.join(lost)}. The formula holds for {equal:,} shapes\n      of a sweep; "
          f"F.conv2d refuses {refused} more, where it is below 1")  # fmt: skip
    assert equal + refused == len(sweep)
    return equal, refused


# --- 3. from scratch ---------------------------------------------------------------------------


def output_sizes(x, weight, *options):
    """(H', W') of the output for x (B, C, H, W) and weight (C_out, C/groups, kh, kw)."""
    return [output_size(*n, *options) for n in zip(x.shape[2:], weight.shape[2:], strict=True)]


def conv2d_loop(x, weight, bias, stride=1, padding=0, dilation=1, groups=1):
    """x (B, C, H, W), weight (C_out, C/groups, kh, kw), bias (C_out,) -> (B, C_out, H', W').

    The formula on top, by a loop over j, r, s: each time the product of a window (B, C/groups, kh,
    kw) of the padded x with weight[j], summed, and bias[j]. Channel j belongs to group
    j // (C_out / groups). ValueError "weight (shape) in n groups, x (shape)" if C is not groups
    times weight's channels, or C_out does not split into the groups. Exercise.
    """
    C_out, channels, kh, kw = weight.shape
    if x.shape[1] != channels * groups or C_out % groups:
        raise ValueError(f"weight {tuple(weight.shape)} in {groups} groups, x {tuple(x.shape)}")
    rows, columns = output_sizes(x, weight, stride, padding, dilation)
    x = F.pad(x, (padding,) * 4)
    out = x.new_empty(len(x), C_out, rows, columns)
    for j, r, s in product(range(C_out), range(rows), range(columns)):  # three loops in one
        first = j // (C_out // groups) * channels  # of the input channels in j's group
        u = r * stride + torch.arange(kh)[:, None] * dilation  # rows of the window
        v = s * stride + torch.arange(kw) * dilation  # its columns
        window = x[:, first : first + channels, u, v]  # (B, C/groups, kh, kw)
        out[:, j, r, s] = (window * weight[j]).sum((1, 2, 3)) + bias[j]
    return out


def conv2d_unfold(x, weight, bias, stride=1, padding=0, dilation=1, groups=1):
    """The same as conv2d_loop, every window a column: one matrix product for each group.

    F.unfold gives x's windows (B, C kh kw, H' W'); split both it and weight by groups. Exercise.
    """
    sizes = output_sizes(x, weight, stride, padding, dilation)
    windows = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # (B, C kh kw, H' W')
    windows = windows.unflatten(1, (groups, -1))  # (B, groups, C/groups kh kw, H' W')
    matrix = weight.flatten(1).unflatten(0, (groups, -1))  # (groups, C_out/groups, C/groups kh kw)
    out = (matrix @ windows).flatten(1, 2) + bias[:, None]  # (B, C_out, H' W')
    return out.unflatten(2, sizes)


def show_from_scratch():
    x, bias = torch.randn(2, 4, 11, 9, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    print("3. Do a loop over windows, and one matrix product, give what F.conv2d gives?")
    print(f"   x {tuple(x.shape)}                             largest difference from F.conv2d")
    print("   options      weights        output              loop   matrix product")
    cases = {"none": {}, "stride 2": {"stride": 2}, "padding 1": {"padding": 1},
             "dilation 2": {"dilation": 2}, "groups 2": {"groups": 2},
             "all four": {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}}  # fmt: skip
    shapes, off = {}, []
    for name, options in cases.items():
        weight = torch.randn(6, 4 // options.get("groups", 1), 3, 2, dtype=torch.float64)
        theirs = F.conv2d(x, weight, bias, **options)
        shapes[name] = tuple(theirs.shape)
        for ours in (conv2d_loop, conv2d_unfold):
            y = ours(x, weight, bias, **options)
            torch.testing.assert_close(y, theirs)
            off.append((y - theirs).abs().max().item())
        shape = tuple(weight.shape)
        print(f"   {name:<10}   {shape}   {shapes[name]!s:<14}   {off[-2]:7.0g}   {off[-1]:14.0g}")
    print(f"   -> both do, to {max(off):.0e}; in two groups a filter sees {weight.shape[1]} of the "
          f"{x.shape[1]} channels")  # fmt: skip
    return shapes, off


# --- 4. a moved image --------------------------------------------------------------------------


def show_moved(stride):
    x, weight, off = torch.zeros(1, 1, 20, 20), torch.randn(1, 1, 3, 3), {}
    x[..., 5:11, 5:11] = torch.randn(6, 6)  # far from the border: nothing leaves the image
    y = F.conv2d(x, weight, stride=stride)
    print(f"4. If the image moves to the right, does the output? Stride {stride}")
    print("   image moved by   y moved by, at best   largest difference   and with y not moved")
    for pixels in (1, 2, 3, 4):
        after = F.conv2d(x.roll(pixels, 3), weight, stride=stride)
        differences = [(after - y.roll(places, 3)).abs().max().item() for places in range(5)]
        off[pixels] = min(differences)
        print(f"   {pixels:14d}   {differences.index(off[pixels]):19d}   {off[pixels]:18.4f}   "
              f"{differences[0]:20.4f}")  # fmt: skip
    moved = [str(pixels) for pixels in off if off[pixels] < 1e-5]
    print(f"   -> the output moves with the image if the image moves by {', '.join(moved)} pixels")
    return off


# --- 5. second reading: true convolution -------------------------------------------------------


def convolve(x, kernel):
    """The full convolution (H + h - 1, W + w - 1) of x (H, W) with kernel (h, w), by F.conv2d.

    F.conv2d does not flip the kernel, takes (B, C, H, W) and must pad by (h - 1, w - 1). Exercise.
    """
    h, w = kernel.shape
    return F.conv2d(x[None, None], kernel.flip(0, 1)[None, None], padding=(h - 1, w - 1))[0, 0]


def fourier_convolve(x, kernel):
    """The same as convolve, as a product in Fourier space: torch.fft.rfft2 and irfft2.

    Both are transformed at the size (H + h - 1, W + w - 1) of the result. Exercise.
    """
    size = [a + b - 1 for a, b in zip(x.shape, kernel.shape, strict=True)]
    return torch.fft.irfft2(torch.fft.rfft2(x, size) * torch.fft.rfft2(kernel, size), size)


def show_convolution():
    print("5. Second reading: is it a convolution? That has x[r - u] where F.conv2d has x[r + u]")
    point, w = torch.tensor([[0.0, 0, 1, 0, 0]]), torch.tensor([[1.0, 2, 3]])
    answer, full = F.conv2d(point[None], w[None, None])[0], fourier_convolve(point, w)
    rows = {"x": point, "w": w, "F.conv2d": answer, "convolution": full[:, 2:-2]}
    rows = {name: row[0].round().int().tolist() for name, row in rows.items()}
    for name, row in rows.items():
        print(f"   {name:<11}   {row}")
    x, w = torch.randn(32, 32, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    off = [(convolve(x, k) - fourier_convolve(x, w)).abs().max().item() for k in (w, w.flip(0, 1))]
    print("   -> on noise F.conv2d is the convolution (by Fourier transform) if w is first turned")
    print(f"      by half, to {off[0]:.0e}; if w is not turned, they differ by up to {off[1]:.0f}")
    return rows, off


# --- the lesson --------------------------------------------------------------------------------


def draw(log_dir):
    """A letter, and what F.conv2d with the mean of 3 x 3 pixels makes of it by its options."""
    x, mean = F.pad(LETTER, (4, 4, 4, 4))[None, None], torch.full((1, 1, 3, 3), 1 / 9)
    pictures, words = [x[0]], ["x: 13 x 13"]
    for stride, padding, dilation in ((1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1), (1, 0, 2)):
        y = F.conv2d(x, mean, None, stride, padding, dilation)[0]
        pictures.append(y)
        text = f"stride {stride}\npadding {padding}\ndilation {dilation}"
        words.append(f"y: {y.shape[1]} x {y.shape[2]}\n{text}")
    squares = [p.repeat_interleave(10, 1).repeat_interleave(10, 2) for p in pictures]
    title = "Means of 3 x 3 pixels (white: 1, black: 0), every pixel a square: how large is y?"
    with SummaryWriter(log_dir, purge_step=0) as writer:
        writer.add_image("conv/sizes", caption_row(title, squares, words), 0)


def main(seed=0, log_dir=LOG_DIR):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "sweep": show_sizes()}
    measured["shapes"], measured["off"] = show_from_scratch()
    measured["moved"] = show_moved(stride=1)
    measured["points"], measured["fourier"] = show_convolution()
    draw(log_dir)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
