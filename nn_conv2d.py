"""Each output channel is a grey picture of its own: six of them are no two RGB images.

    y[j] = b[j] + sum over c, u, v of w[j, c, u, v] * x[c, u:u+H', v:v+W']       H' = H - k + 1

    parameters        C_out (C_in k k + 1)          no H, no W: one filter serves every place
    multiply-adds     C_out C_in k k H' W'          for one image

Every filter looks at all input channels and its products are summed, so a channel of the output has
no colour. Reshaped to (-1, 3, H', W') to please add_images, six channels of B images pass for 2B
images. A filter over RGB, however, has three channels as an image has: it may be shown in colour.

Checked here   nn.Conv2d against the formula; both counts, the work product by product and by
               FlopCounterMode; six filters set by hand against slices of the image; grey images
               turned to colour by the reshape
TensorBoard    conv2d/input, conv2d/filters, conv2d/output_…: one picture a channel (step = image)
Try            stride=2: how many parameters, how much work? The same 168; a quarter: 36,450
Source         torch.nn.Conv2d; Dumoulin & Visin 2016, arXiv:1603.07285
"""

import signal
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from support.data import as_tensors, open_images, source_line
from support.files import DATASET2, guard
from support.pictures import caption_grid

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_conv2d"


def conv2d_by_shifts(x, weight, bias):
    """(B, C_in, H, W) -> (B, C_out, H', W') at stride 1, and the multiply-adds for one image.

    The formula on top, as a loop over j, c, u, v: to channel j of y, which begins as bias[j], comes
    weight[j, c, u, v] times channel c of x, shifted by (u, v). Each turn is H' W' multiply-adds.

    ValueError "weight is for n channels, x (shape) has m" if x has not the C_in channels of weight
    (C_out, C_in, k, k). Exercise.
    """
    C_out, C_in, k, _ = weight.shape
    if x.shape[1] != C_in:
        raise ValueError(f"weight is for {C_in} channels, x {tuple(x.shape)} has {x.shape[1]}")
    H, W = x.shape[2] - k + 1, x.shape[3] - k + 1
    y, count = bias.view(C_out, 1, 1).repeat(len(x), 1, H, W), 0  # (B, C_out, H, W)
    for j, c, u, v in product(range(C_out), range(C_in), range(k), range(k)):
        y[:, j] += weight[j, c, u, v] * x[:, c, u : u + H, v : v + W]
        count += H * W
    return y, count


def parameter_formula(C_in, C_out, k):
    """How many parameters nn.Conv2d(C_in, C_out, k) has, its bias included. Exercise."""
    return C_out * (C_in * k * k + 1)


def work_formula(C_in, C_out, k, H, W):
    """Multiply-adds for one image of H by W, at stride 1 without padding. Exercise."""
    return C_out * C_in * k * k * (H - k + 1) * (W - k + 1)


def filters_by_hand():
    """Six filters (3, 3, 3) by name. The weights of each sum to 0: a uniform grey gives 0."""
    grey = torch.full((3, 1, 1), 1 / 3)  # the mean of red, green and blue
    rise = torch.tensor([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]])
    slant = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [0, 0, 1]])
    bump = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    spot = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    return {
        "left_to_right": grey * rise,
        "top_to_bottom": grey * rise.T,
        "diagonal": grey * slant,
        "laplacian": grey * bump,
        "red_minus_green": torch.tensor([1.0, -1, 0]).view(3, 1, 1) * spot,
        "blue_minus_yellow": torch.tensor([-0.5, -0.5, 1]).view(3, 1, 1) * spot,
    }


def channels_by_slicing(x):
    """What those filters make of images (B, 3, H, W), each (B, H-2, W-2), without a convolution.

    {name: channel}, names and order as in filters_by_hand. The first four are differences of the
    grey image, x's mean over its channels: right - left, below - above, lower right - upper left,
    and 4 times the middle minus its four neighbours. Then red - green, and blue - (red + green) /
    2, of the middle pixel. Exercise.
    """
    grey, (red, green, blue) = x.mean(1), x[:, :, 1:-1, 1:-1].unbind(1)
    up, down = grey[:, :-2, 1:-1], grey[:, 2:, 1:-1]
    left, right = grey[:, 1:-1, :-2], grey[:, 1:-1, 2:]
    return {
        "left_to_right": right - left,
        "top_to_bottom": down - up,
        "diagonal": grey[:, 2:, 2:] - grey[:, :-2, :-2],
        "laplacian": 4 * grey[:, 1:-1, 1:-1] - up - down - left - right,
        "red_minus_green": red - green,
        "blue_minus_yellow": blue - (red + green) / 2,
    }


def as_picture(x):
    """Signed numbers of any shape as grey levels in [0, 1]: 0 is 0.5, the largest is 0 or 1.

    0.5 + x / (2 max |x|); zeros alone give 0.5, not NaN. Exercise.
    """
    return 0.5 + x / (2 * x.abs().max().clamp(min=1e-12))


def colourfulness(images):
    """Mean over all pixels of max - min of the three channels of (B, 3, H, W), a float.

    Exercise.
    """
    return (images.amax(1) - images.amin(1)).mean().item()


@torch.no_grad()
def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=8):
    torch.manual_seed(seed)
    dataset = open_images(root, train=False)
    print(source_line(dataset))
    x = as_tensors(dataset)[0][:count] / 255  # (B, 3, 32, 32) in [0, 1]

    print("1. nn.Conv2d(3, 6, 3) against the sum of shifted images")
    conv = nn.Conv2d(3, 6, kernel_size=3)
    y, _ = conv2d_by_shifts(x, conv.weight, conv.bias)
    torch.testing.assert_close(conv(x), y)
    error = (conv(x) - y).abs().max().item()
    print(f"   {tuple(x.shape)} -> {tuple(y.shape)}   largest difference {error:.1e}")

    print("2. parameters, and multiply-adds for one image, counted (by the formulas)")
    counts = {}
    for k, side in ((3, 32), (3, 64), (5, 32)):
        layer, image = nn.Conv2d(3, 6, k), torch.rand(1, 3, side, side)
        parameters = sum(p.numel() for p in layer.parameters())
        _, work = conv2d_by_shifts(image, layer.weight, layer.bias)
        with FlopCounterMode(display=False) as flops:
            layer(image)
        formulas = parameter_formula(3, 6, k), work_formula(3, 6, k, side, side)
        assert parameters == formulas[0] and work == formulas[1] == flops.get_total_flops() / 2
        counts[k, side] = parameters, work
        print(f"   Conv2d(3, 6, {k}) on {side} x {side}    parameters {parameters:5,} "
              f"({formulas[0]:,})   multiply-adds {work:9,} ({formulas[1]:,})")  # fmt: skip
    work = x[0].numel() * y[0].numel()  # every input number times a weight for every output number
    dense = work + y[0].numel()
    print(f"   Linear(3072, 5400) instead    parameters {dense:10,}   multiply-adds {work:10,}")

    print("3. filters set by hand: each channel against slices of the image")
    before, by_hand = conv(x + 0.2) - conv(x), filters_by_hand()
    conv.weight.copy_(torch.stack([*by_hand.values()]))  # (6, 3, 3, 3)
    conv.bias.zero_()
    y = conv(x)
    channels = dict(zip(by_hand, y.unbind(1), strict=True))  # name: (B, 30, 30)
    for name, expected in channels_by_slicing(x).items():
        channel = channels[name]
        torch.testing.assert_close(channel, expected)
        off = (channel - expected).abs().max()
        print(f"   {name:<18} {channel.min():+.2f} to {channel.max():+.2f}   off by {off:.0e}")
    light = {"by hand": (conv(x + 0.2) - y).abs().max(), "as initialised": before.abs().max()}
    changes = "   ".join(f"{name} {change:.1e}" for name, change in light.items())
    print(f"   largest change under 0.2 more light: {changes}")

    print("4. the six channels of images made grey, reshaped to (-1, 3, 30, 30)")
    grey = x.mean(1, keepdim=True).expand_as(x)
    folded = conv(grey).reshape(-1, 3, *y.shape[2:])
    assert torch.equal(folded[1], conv(grey)[0, 3:])
    colour = {"images": colourfulness(grey), "folded": colourfulness(folded)}
    print(f"   images {len(x):2d}   colour {colour['images']:.3f}")
    print(f"   folded {len(folded):2d}   colour {colour['folded']:.3f}")

    with SummaryWriter(log_dir, purge_step=0) as writer:
        pictures = (torch.stack([as_picture(w) for w in by_hand.values()]) * 255).byte()
        writer.add_image("conv2d/filters", caption_grid(pictures, [*by_hand], 3, scale=36), 0)
        for step in range(min(count, 4)):
            writer.add_image("conv2d/input", x[step], step)
            for j, (name, channel) in enumerate(channels.items()):
                picture = as_picture(channel[step : step + 1])  # (1, 30, 30)
                writer.add_image(f"conv2d/output_{j}_{name}", picture, step)
    return {
        "counts": counts,
        "dense": dense,
        "light": {name: change.item() for name, change in light.items()},
        "folded": len(folded),
        "colour": colour,
    }


if __name__ == "__main__":
    guard(main)
