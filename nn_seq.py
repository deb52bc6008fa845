"""nn.Sequential is a forward written for you: with the same weights it computes the same bits.

    Sequential(f, g, h)(x) = h(g(f(x)))

    conv 3x3 (padding 1) -> ReLU -> max-pool 2, three times; flatten; linear
    (3, 32, 32) -> (8, 16, 16) -> (16, 8, 8) -> (32, 4, 4) -> 512 -> 10

It is a chain and no more: a skip or a second input needs a forward of one's own, and every part of
it, as net[:3], is one too. Behind each part one number depends on r x r pixels alone, its
receptive field; that of unit i begins at pixel p + i j. A layer of kernel k, stride s and padding a
turns (r, j, p), which is (1, 1, 0) at the start, into

    (r + (k - 1) j,  j s,  p - a j)

A pool doubles j and with it what every later kernel adds. By gradient the field is where dy/dx is
not 0 for some image; there the middle counts most, for more paths lead from it to y.

Checked here   both forms: output and gradients bit for bit; shapes; each layer's receptive field,
               its size and its place, by formula and by gradient
TensorBoard    the graph of each form (runs sequential and by_hand; double-click the network);
               receptive_field/…: |dy/dx| on the image, in the box that the formula gives
Try            dilation=2, padding=2 in conv3: what field has pool3? 30 pixels in place of 22
Source         Araujo et al. 2019, doi:10.23915/distill.00021; Luo et al. 2016, arXiv:1701.04128
"""

import signal
import warnings
from collections import OrderedDict
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_seq"


class ConvPoolLinear(nn.Module):
    """Images (B, 3, 32, 32) -> logits (B, 10), the forward written out."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.linear = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 8, 16, 16)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 8, 8)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # (B, 32, 4, 4)
        return self.linear(x.flatten(1))  # (B, 512) -> (B, 10)


def conv_pool_linear():
    """The same as an nn.Sequential. Its names make the keys of its state_dict."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 16, kernel_size=3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(16, 32, kernel_size=3, padding=1),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear=nn.Linear(32 * 4 * 4, 10),
        )
    )


def gradients(net, x):
    """By name, the gradient of the sum of squares of net(x) in each parameter."""
    parameters = dict(net.named_parameters())
    found = torch.autograd.grad(net(x).square().sum(), parameters.values())
    return dict(zip(parameters, found, strict=True))


def window(layer):
    """Kernel (as wide as its dilation makes it), stride and padding of a layer: three integers.

    k = dilation (kernel - 1) + 1. nn.Conv2d has pairs, of which the first number is meant,
    nn.MaxPool2d numbers (and no dilation here); any other layer is (1, 1, 0). Exercise.
    """
    if isinstance(layer, nn.Conv2d):
        return layer.dilation[0] * (layer.kernel_size[0] - 1) + 1, layer.stride[0], layer.padding[0]
    if isinstance(layer, nn.MaxPool2d):
        return layer.kernel_size, layer.stride, layer.padding
    return 1, 1, 0


def field_by_formula(net, unit):
    """(first pixel, size) of what unit (unit, unit) behind `net` depends on.

    From (r, j, p) = (1, 1, 0) layer by layer, each with its window(layer) = (k, s, a); the field
    begins at p + unit j and is r wide. A layer (k, s, a) turns (r, j, p) into (r + (k - 1) j, j s,
    p - a j). Exercise.
    """
    r, j, p = 1, 1, 0
    for k, s, a in map(window, net):
        r, j, p = r + (k - 1) * j, j * s, p - a * j
    return p + unit * j, r


def gradient_map(net, unit, x):
    """Mean over the images x (B, C, H, W) of |dy/dx| (H, W), y = unit (unit, unit) of net(x).

    y is summed over the channels and images of the output (B, C', H', W'); the mean of the absolute
    gradient is over images and channels. Exercise.
    """
    x = x.clone().requires_grad_()
    y = net(x)[:, :, unit, unit].sum()
    return torch.autograd.grad(y, x)[0].abs().mean((0, 1))


def field_by_gradient(heat):
    """(first pixel, size) of the square of pixels where heat (H, W) is not 0.

    ValueError with the words "no full square" if these pixels are no square on the diagonal, or if
    there are holes in it. Exercise.
    """
    pixels = heat.nonzero()  # (n, 2)
    first, last = pixels.amin(0).tolist(), pixels.amax(0).tolist()
    size = last[0] - first[0] + 1
    if first[0] != first[1] or len(pixels) != size**2:
        raise ValueError(f"{len(pixels)} pixels from {first} to {last} are no full square")
    return first[0], size


def middle_share(heat, first, size):
    """Of the square field, the middle part's share of the area and of the sum of heat (H, W).

    The field begins at pixel (first, first) and is `size` wide; its middle part is what is left
    without size // 4 pixels at each side. Two floats. Exercise.
    """
    quarter = size // 4
    middle = slice(first + quarter, first + size - quarter)
    area = (size - 2 * quarter) ** 2 / size**2
    return area, (heat[middle, middle].sum() / heat.sum()).item()


def receptive_field(net, x):
    """First pixel and size of the field of the middle unit behind `net`, and its gradient map."""
    unit = net(x).shape[-1] // 2
    heat = gradient_map(net, unit, x)
    first, size = field_by_gradient(heat)
    assert (first, size) == field_by_formula(net, unit)
    return first, size, heat


def field_picture(heat, first, size, scale=8):
    """heat (H, W) as grey levels, enlarged, and the field's box (1, 4) in its pixels."""
    grey = (heat / heat.max()).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    box = torch.tensor([[first, first, first + size, first + size]]) * scale
    return grey.expand(3, -1, -1), box


def draw_graph(writer, net):
    """The network in TensorBoard, without torch.jit.trace's notice that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer.add_graph(net, torch.zeros(1, 3, 32, 32))


def main(seed=0, log_dir=LOG_DIR, batch=64):
    torch.manual_seed(seed)
    by_hand, net, x = ConvPoolLinear(), conv_pool_linear(), torch.randn(batch, 3, 32, 32)

    print("1. both forms on the same images: largest difference of the output")
    before = (net(x) - by_hand(x)).abs().max().item()
    net.load_state_dict(by_hand.state_dict())
    after = (net(x) - by_hand(x)).abs().max().item()
    ours, theirs = gradients(net, x), gradients(by_hand, x)
    equal = sum(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert after == 0 and equal == len(ours)
    print(f"   own weights {before:.2f}   same weights {after:g}   "
          f"gradients equal: {equal} of {len(ours)}")  # fmt: skip

    print("2. layer by layer: output, parameters, receptive field")
    fields = {}
    with SummaryWriter(log_dir / "sequential", purge_step=0) as writer:
        draw_graph(writer, net)
        for depth, (name, layer) in enumerate(net.named_children(), 1):
            shape = tuple(net[:depth](x).shape[1:])
            count = sum(p.numel() for p in layer.parameters())
            row = f"   {name:<8} {shape!s:<13} {count:5,}"
            if len(shape) == 3:
                first, size, heat = receptive_field(net[:depth], x)
                fields[name] = first, size
                formula = field_by_formula(net[:depth], shape[-1] // 2)[1]
                row += f"   formula {formula:2d}   gradient {size:2d}   from pixel {first:2d}"
                picture = field_picture(heat, first, size)
                writer.add_image_with_boxes(f"receptive_field/{depth}_{name}", *picture, depth)
            print(row)
    with SummaryWriter(log_dir / "by_hand", purge_step=0) as writer:
        draw_graph(writer, by_hand)

    print("3. receptive field after one, two, three convolutions")
    convs = [net.conv1, net.conv2, net.conv3]
    sizes = {
        "with pools": [fields[f"conv{n}"][1] for n in (1, 2, 3)],
        "without pools": [receptive_field(nn.Sequential(*convs[:n]), x)[1] for n in (1, 2, 3)],
    }
    for name, row in sizes.items():
        print(f"   {name:<14} {row}")

    print("4. the middle of pool3's field")
    area, share = middle_share(heat, *fields["pool3"])
    print(f"   share of the area {area:.2f}   of |dy/dx| {share:.2f}")
    return {"before": before, "fields": fields, "sizes": sizes, "share": share}


if __name__ == "__main__":
    guard(main)
