"""What nn.Conv2d computes is cross-correlation: only the flipped kernel makes it a convolution.

    out[b, k, i, j] = bias[k] + sum over c, u, v of
                      weight[k, c, u, v] x[b, c, i stride + u dilation - padding, j stride + ...]
    with groups, c counts only the C / groups input channels of k's own group
    size = floor((H + 2 padding - dilation (kernel - 1) - 1) / stride) + 1

A convolution runs through the kernel backwards (x[i - u] for x[i + u]); it commutes, and in Fourier
space it is a product. Without the flip, an impulse is answered by the kernel turned half round. A
network does not care: fitted to a true convolution, it learns the flipped kernel. unfold copies
every window into a column, so that the whole layer is one matrix product for each group.

Checked here   loop and unfold against F.conv2d; the size over a sweep; the flipped kernel against
               the Fourier product; the kernel that is learned from a convolution
TensorBoard    kernel/response in the runs correlation and convolution; kernel/learned by step
               and train/loss in the run learned
Try            stride=2, the input moved by one pixel: is the output moved? No; by two it is, by one
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

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_conv"
LETTER = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
).float()  # an F: half a turn shows


def output_size(size, kernel, stride=1, padding=0, dilation=1):
    """floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1. Exercise."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_sizes(x, weight, *options):
    """(H', W') of the output for x (B, C, H, W) and weight (K, C/groups, kh, kw)."""
    return [output_size(*n, *options) for n in zip(x.shape[2:], weight.shape[2:], strict=True)]


def conv2d_loop(x, weight, bias, stride=1, padding=0, dilation=1, groups=1):
    """x (B, C, H, W), weight (K, C/groups, kh, kw), bias (K,) -> (B, K, H', W').

    The formula on top, by a loop over k, i, j: each time the product of a window (B, C/groups, kh,
    kw) of the padded x with weight[k], summed, and bias[k]. Channel k belongs to group k // (K /
    groups). ValueError "weight (shape) in n groups, x (shape)" if C is not groups times weight's
    channels, or K does not split into the groups. Exercise.
    """
    K, channels, kh, kw = weight.shape
    if x.shape[1] != channels * groups or K % groups:
        raise ValueError(f"weight {tuple(weight.shape)} in {groups} groups, x {tuple(x.shape)}")
    rows, columns = output_sizes(x, weight, stride, padding, dilation)
    x = F.pad(x, (padding,) * 4)
    out = x.new_empty(len(x), K, rows, columns)
    for k, i, j in product(range(K), range(rows), range(columns)):
        first = k // (K // groups) * channels  # of the input channels in k's group
        u = i * stride + torch.arange(kh)[:, None] * dilation  # rows of the window
        v = j * stride + torch.arange(kw) * dilation  # its columns
        window = x[:, first : first + channels, u, v]  # (B, C/groups, kh, kw)
        out[:, k, i, j] = (window * weight[k]).sum((1, 2, 3)) + bias[k]
    return out


def conv2d_unfold(x, weight, bias, stride=1, padding=0, dilation=1, groups=1):
    """The same as conv2d_loop, every window a column: one matrix product for each group.

    F.unfold gives x's windows (B, C kh kw, H' W'); split both it and weight by groups. Exercise.
    """
    sizes = output_sizes(x, weight, stride, padding, dilation)
    windows = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # (B, C kh kw, H' W')
    windows = windows.unflatten(1, (groups, -1))  # (B, groups, C/groups kh kw, H' W')
    matrix = weight.flatten(1).unflatten(0, (groups, -1))  # (groups, K/groups, C/groups kh kw)
    out = (matrix @ windows).flatten(1, 2) + bias[:, None]  # (B, K, H' W')
    return out.unflatten(2, sizes)


def sweep():
    """Counts (equal, refused) of the sizes by formula against those of F.conv2d."""
    equal = refused = 0
    for size, kernel, stride, padding, dilation in product(
        range(1, 13), range(1, 6), range(1, 4), range(3), range(1, 4)
    ):
        theory = output_size(size, kernel, stride, padding, dilation)
        x, weight = torch.empty(1, 1, size, size), torch.empty(1, 1, kernel, kernel)
        try:
            measured = F.conv2d(x, weight, None, stride, padding, dilation).shape
        except RuntimeError:  # the window is larger than the padded input
            assert theory < 1
            refused += 1
        else:
            assert measured == (1, 1, theory, theory)
            equal += 1
    return equal, refused


def convolve(x, kernel):
    """The full convolution (H + h - 1, W + w - 1) of x (H, W) with kernel (h, w), by F.conv2d.

    F.conv2d does not flip the kernel and takes (B, C, H, W); "full" needs a padding of (h - 1, w -
    1). Exercise.
    """
    h, w = kernel.shape
    return F.conv2d(x[None, None], kernel.flip(0, 1)[None, None], padding=(h - 1, w - 1))[0, 0]


def fourier_convolve(x, kernel):
    """The same as convolve, as a product in Fourier space: torch.fft.rfft2 and irfft2.

    Both are transformed at the size (H + h - 1, W + w - 1) of the result. Exercise.
    """
    size = [a + b - 1 for a, b in zip(x.shape, kernel.shape, strict=True)]
    return torch.fft.irfft2(torch.fft.rfft2(x, size) * torch.fft.rfft2(kernel, size), size)


def learn_kernel(target, steps, lr, writer):
    """Fit the 5 x 5 kernel of F.conv2d to convolutions of noise with `target`. Returns it."""
    kernel = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.SGD([kernel], lr)
    for step in range(steps):
        x = torch.randn(32, 32)
        y = fourier_convolve(x, target)[4:-4, 4:-4]  # (28, 28), where no padding enters
        loss = F.mse_loss(F.conv2d(x[None, None], kernel[None, None])[0, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        writer.add_scalar("train/loss", loss.detach(), step)
        if step % 10 == 0:
            writer.add_image("kernel/learned", enlarge(F.pad(kernel.detach(), (1,) * 4), 20), step)
    return kernel.detach()


def enlarge(picture, scale):
    """(H, W) -> (1, scale H, scale W) in [0, 1], each pixel a square."""
    return picture.clamp(0, 1).kron(torch.ones(scale, scale))[None]


def main(seed=0, log_dir=LOG_DIR, steps=80):
    torch.manual_seed(seed)
    print("1. loop and unfold against F.conv2d: largest difference")
    x, bias = torch.randn(2, 4, 11, 9, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    cases = {"plain": {}, "stride 2": {"stride": 2}, "padding 1": {"padding": 1},
             "dilation 2": {"dilation": 2}, "groups 2": {"groups": 2},
             "all four": {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}}  # fmt: skip
    shapes = {}
    for name, options in cases.items():
        weight = torch.randn(6, 4 // options.get("groups", 1), 3, 2, dtype=torch.float64)
        theirs = F.conv2d(x, weight, bias, **options)
        errors = []
        for ours in (conv2d_loop, conv2d_unfold):
            torch.testing.assert_close(ours(x, weight, bias, **options), theirs)
            errors.append((ours(x, weight, bias, **options) - theirs).abs().max())
        shapes[name] = tuple(theirs.shape)
        print(f"   {name:<11} weights {weight.numel():4d}   out {shapes[name]!s:<14} "
              f"loop {errors[0]:.0e}   unfold {errors[1]:.0e}")  # fmt: skip

    equal, refused = sweep()
    print("2. the size formula against F.conv2d, over a sweep")
    print(f"   shapes equal {equal:,}   refused, size below 1 by the formula {refused:,}")

    print("3. against the Fourier product: largest difference")
    x, kernel = (torch.randn(n, n, dtype=torch.float64) for n in (32, 5))
    truth = fourier_convolve(x, kernel)
    outputs = {"flipped kernel": convolve(x, kernel), "and exchanged with x": convolve(kernel, x),
               "kernel as it is": convolve(x, kernel.flip(0, 1))}  # fmt: skip
    fourier = {name: (out - truth).abs().max().item() for name, out in outputs.items()}
    torch.testing.assert_close(outputs["flipped kernel"], truth)
    torch.testing.assert_close(outputs["and exchanged with x"], truth)
    print("   F.conv2d: " + "   ".join(f"{name} {error:.1e}" for name, error in fourier.items()))

    print(f"4. a kernel learned from convolutions with the letter F, {steps} steps")
    with SummaryWriter(log_dir / "learned", purge_step=0) as writer:
        learned = learn_kernel(LETTER, steps, 0.3, writer)
    errors = [(learned - letter).abs().max().item() for letter in (LETTER.flip(0, 1), LETTER)]
    print(f"   largest difference from the flipped F {errors[0]:.0e}   from F {errors[1]:.2f}")

    impulses = torch.zeros(28, 28)
    impulses[6::8, 6::8] = 1
    for run, letter in {"convolution": LETTER, "correlation": LETTER.flip(0, 1)}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            writer.add_image("kernel/response", enlarge(convolve(impulses, letter), 8), 0)
    return {"shapes": shapes, "sweep": (equal, refused), "fourier": fourier,
            "learned": errors}  # fmt: skip


if __name__ == "__main__":
    guard(main)
