"""Max-pooling learns by one pixel a window: the maximum gets all of the gradient, the others none.

    out[i, j] = max over u, v of x[i stride + u dilation - padding, j stride + v dilation - ...]
    size      = floor((H + 2 padding - dilation (kernel - 1) - 1) / stride) + 1
    ceil_mode   ceil in place of floor, but no window may begin in the padding on the right

The padding is minus infinity, not 0: an image of negative numbers shows the difference. floor drops
the pixels that fill no window; ceil_mode keeps them, in a smaller one. The layer has no parameters;
it makes what follows cheaper, and forgets where in the window the maximum was. It also brightens:
the mean of maxima rises with the window, where average pooling keeps the mean.

Checked here   the size over a sweep, both ceil modes; pooling by unfold against the layer; the
               gradient by hand, which 1 / k^2 of the pixels get, and average pooling's: all
TensorBoard    pool/output, pool/learns (the pixels that get a gradient) and pool/brightness by
               kernel, in the runs max and average; size/output by H in ceil_false and ceil_true
Try            windows.amax(1) for windows.max(1): is the gradient the same? Not where pixels tie
Source         torch.nn.MaxPool2d
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

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_maxpool"


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
    out = -(-steps // stride) + 1
    return out - 1 if (out - 1) * stride >= size + padding else out


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


def sweep():
    """Counts (equal, refused) of the sizes by formula against those of the layer."""
    equal = refused = 0
    for size, kernel, stride, dilation, ceil_mode in product(
        range(1, 13), range(1, 6), range(1, 5), (1, 2), (False, True)
    ):
        for padding in range(kernel // 2 + 1):
            theory = output_size(size, kernel, stride, padding, dilation, ceil_mode)
            layer = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
            try:
                measured = layer(torch.empty(1, 1, size, size)).shape
            except RuntimeError:  # the output would be empty
                assert theory < 1
                refused += 1
            else:
                assert measured == (1, 1, theory, theory)
                equal += 1
    return equal, refused


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
    return F.fold(grads, x.shape[2:], kernel, stride=stride).view_as(
        x
    )  # adds where windows overlap


def picture(x, scale=1):
    """The first 16 of images (B, 3, H, W) in [-1, 1], each pixel a square of side `scale`."""
    squares = x[:16].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return (squares + 1) / 2


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, batch=64):
    torch.manual_seed(seed)
    dataset = open_images(root)
    print(source_line(dataset))
    x = as_tensors(dataset)[0][:batch].double() / 255 * 2 - 1  # (B, 3, 32, 32) in [-1, 1]

    print("1. the numbers 1 to 25 as a 5 x 5 image, kernel 3, stride 3")
    square = torch.arange(1.0, 26).view(1, 1, 5, 5)
    for ceil_mode in (False, True):
        out = nn.MaxPool2d(3, ceil_mode=ceil_mode)(square)
        print(f"   ceil_mode {ceil_mode!s:<5}   {out[0, 0].int().tolist()}")
    equal, refused = sweep()
    print("2. the size formula against the layer, over a sweep of both ceil modes")
    print(f"   shapes equal {equal:,}   refused, size below 1 by the formula {refused:,}")

    print(f"3. pooling by unfold against the layer, {batch} images")
    for options in ({"stride": 2}, {"stride": 2, "padding": 1}, {"stride": 2, "ceil_mode": True},
                    {"stride": 2, "padding": 1, "dilation": 2}):  # fmt: skip
        theirs = nn.MaxPool2d(3, **options)(x)
        ours = max_pool(x, 3, **options)
        assert torch.equal(ours, theirs)
        off = (ours - theirs).abs().max()
        names = ", ".join(f"{name} {value}" for name, value in options.items())
        print(f"   kernel 3, {names:<31} {tuple(theirs.shape)!s:<16} off by {off:g}")

    print("4. share of pixels that get a gradient; brightness of the output")
    results = {}
    for run, Pool in {"max": nn.MaxPool2d, "average": nn.AvgPool2d}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for kernel in (1, 2, 4, 8):
                out = Pool(kernel)(x)
                upstream = torch.randn_like(out)
                grad = gradient(Pool(kernel), x, upstream)
                if run == "max":
                    assert torch.equal(grad, gradient_by_hand(x, kernel, kernel, upstream))
                else:
                    torch.testing.assert_close(out.mean(), x.mean())
                share, brightness = (grad != 0).double().mean(), (out.mean() + 1) / 2
                writer.add_scalar("pool/brightness", brightness, kernel)
                writer.add_images("pool/output", picture(out, kernel), kernel)
                writer.add_images("pool/learns", picture(torch.where(grad != 0, x, -1)), kernel)
                results[run, kernel] = share.item(), brightness.item()
                theory = kernel**-2 if run == "max" else 1
                print(f"   {run:<8} kernel {kernel}   measured {share:.4f}   theory {theory:.4f}   "
                      f"brightness {brightness:.3f}")  # fmt: skip

    for ceil_mode in (False, True):
        with SummaryWriter(log_dir / f"ceil_{ceil_mode}".lower(), purge_step=0) as writer:
            for size in range(3, 33):
                writer.add_scalar("size/output", output_size(size, 3, 3, 0, 1, ceil_mode), size)
    return {"sweep": (equal, refused), "results": results}


if __name__ == "__main__":
    guard(main)
