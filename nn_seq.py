"""nn.Sequential calls its layers one after the other: it is a forward that you need not write.

Use it where each layer takes what the layer before it gives. A second input, or the sum of two
layers, needs a class with a forward of its own. A Linear layer in the chain must be told how many
numbers reach it, and stops with an error at any other: print the shapes, as section 1 does.

    Sequential(f, g, h)(x) = h(g(f(x)))

The chain also limits how much of the image one number of an output, a unit, can see: a square of
pixels, its receptive field. Of an object that is larger, it sees a part. Layer by layer it grows:

    size = size + (k - 1) * jump, then jump = jump * stride

    size  width of the field in pixels, 1 before the first layer
    jump  how many pixels the fields of two neighbouring units lie apart, 1 before the first layer
    k, stride  of the layer's window, k x k (nn_conv.py); both are 1 for ReLU

Needs          nn_module.py, nn_relu.py, nn_conv.py, nn_maxpool.py
Checked here   nn.Sequential = a class with a forward: outputs and gradients bit for bit; the field
               by this rule = the pixels with a gradient in any of 64 images; what pools do to it
TensorBoard    the graph of each form (runs sequential and by_hand; double-click the network);
               receptive_field/by_layer: light pixels have a large |dy/dx|, all in the rule's frame
Try            in show_fields, add net.conv3 = nn.Conv2d(16, 32, 3, padding=2, dilation=2) after the
               first line: its window reaches over 5 pixels. What field has pool3?
Answer         30 pixels instead of 22; conv3 and relu3 have 26 instead of 18
Source         torch.nn.Sequential; Araujo et al. 2019, doi:10.23915/distill.00021
"""

import signal
from collections import OrderedDict
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.files import guard
from support.pictures import caption_row, draw_graph, framed

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_seq"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    net = nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16 * 16, 10),
    )
    images = torch.rand(4, 3, 32, 32)
    y = net(images)  # (4, 10): ten scores for each image
    print("1. What does each layer of an nn.Sequential make of 4 images (4, 3, 32, 32)?")
    print("   net[i]   layer       output             parameters")
    x, numbers = images, 0
    for i, layer in enumerate(net):
        x = layer(x)
        numbers = x[0].numel() if isinstance(layer, nn.Flatten) else numbers
        parameters = sum(p.numel() for p in layer.parameters())
        print(f"   {i:6d}   {type(layer).__name__:<9}   {tuple(x.shape)!s:<16}   {parameters:10,}")
    off = (x - y).abs().max().item()
    print(f"   -> the layers one by one give what net(images) gives: largest difference {off:g};")
    print(f"      Linear must take the {numbers:,} numbers of an image that Flatten gives")
    return off, numbers, tuple(y.shape)


# --- 2. the forward written out ----------------------------------------------------------------


class ConvPoolLinear(nn.Module):
    """Images (B, 3, 32, 32) -> scores (B, 10), the forward written out."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.linear = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x):
        """conv1, ReLU, max-pool of 2 x 2; so with conv2 and conv3; flattened; linear. Exercise."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 8, 16, 16)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 8, 8)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # (B, 32, 4, 4)
        return self.linear(x.flatten(1))  # (B, 512) -> (B, 10)


def conv_pool_linear():
    """The same as an nn.Sequential with names, so that it can load the weights of the class.

    nn.Sequential(OrderedDict(name=layer, ...)); the names are conv1, relu1, pool1, conv2, relu2,
    pool2, conv3, relu3, pool3, flatten, linear. Exercise.
    """
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
    """The gradient of the sum of squares of net(x) in each parameter, in their order."""
    return torch.autograd.grad(net(x).square().sum(), list(net.parameters()))


def show_same(log_dir, batch):
    by_hand, net, x = ConvPoolLinear(), conv_pool_linear(), torch.randn(batch, 3, 32, 32)
    print(f"2. Is nn.Sequential the same as a class with a forward? {batch} images of noise")
    print("   weights            largest difference of the outputs   equal gradients")
    measured = {}
    for weights in ("each net its own", "the same"):
        if weights == "the same":
            net.load_state_dict(by_hand.state_dict())  # by the names of the layers
        off = (net(x) - by_hand(x)).abs().max().item()
        pairs = list(zip(gradients(net, x), gradients(by_hand, x), strict=True))
        equal = sum(torch.equal(a, b) for a, b in pairs)
        measured[weights] = off, equal
        print(f"   {weights:<16}   {off:33.2g}   {equal:10d} of {len(pairs)}")
    assert measured["the same"] == (0, len(pairs))
    print(f"   -> with the same weights outputs differ by {off:g}; {equal} of {len(pairs)} "
          "gradients are equal bit for bit")  # fmt: skip
    for name, network in {"sequential": net, "by_hand": by_hand}.items():
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            draw_graph(writer, network)
    return measured


# --- 3. receptive fields -----------------------------------------------------------------------


def window(layer):
    """(k, stride, padding) of a layer, three integers; (1, 1, 0) where it has no window.

    nn.Conv2d, nn.MaxPool2d and nn.AvgPool2d have kernel_size, stride, padding, each a number or a
    pair, of which the first is meant (not the word "same"). k is how many pixels the window reaches
    over: dilation * (kernel_size - 1) + 1; nn.AvgPool2d has no dilation: take 1. Exercise.
    """
    if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return 1, 1, 0
    options = layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1)
    kernel, stride, padding, dilation = (n[0] if isinstance(n, tuple) else n for n in options)
    return dilation * (kernel - 1) + 1, stride, padding


def field_by_formula(layers, unit):
    """(first pixel, size) of the field of unit (unit, unit) behind an nn.Sequential.

    size and jump as on top, k, stride and padding by window(layer). start, the first pixel of the
    field of unit 0, is 0 at first; each layer makes it start - padding * jump, with the jump before
    the layer. The first pixel is start + unit * jump. Exercise.
    """
    start, size, jump = 0, 1, 1
    for layer in layers:
        k, stride, padding = window(layer)
        start, size, jump = start - padding * jump, size + (k - 1) * jump, jump * stride
    return start + unit * jump, size


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


def receptive_field(net, x):
    """First pixel and size, by gradient, of the field of the middle unit; its gradient map."""
    heat = gradient_map(net, net(x).shape[-1] // 2, x)
    return *field_by_gradient(heat), heat


def show_fields(log_dir, x):
    net = conv_pool_linear()[:9]  # without flatten and linear
    print("3. On which pixels does a unit, one number of an output, depend? One in the middle")
    print("   layer    size + (k - 1) * jump   pixels by the rule   "
          f"pixels with a gradient in {len(x)} images")  # fmt: skip
    fields, pictures, words, before, jump, equal = {}, [], [], 1, 1, 0
    for depth, (name, layer) in enumerate(net.named_children(), 1):
        part = net[:depth]  # the layers up to this one: an nn.Sequential, too
        start, size = field_by_formula(part, part(x).shape[-1] // 2)
        first, wide, heat = receptive_field(part, x)
        k, stride, _ = window(layer)
        step = f"{before} + ({k} - 1) * {jump} = {size}"
        print(f"   {name:<5}    {step:<21}   {start:12d} to {start + size - 1}   "
              f"{first:30d} to {first + wide - 1}")  # fmt: skip
        fields[name], before, jump = (first, wide), size, jump * stride
        equal += (first, wide) == (start, size)
        if k > 1:  # behind a ReLU it is the picture of the layer before
            pictures.append(framed(heat, start, size))
            words.append(f"{name}\n{size} pixels")
    print("   k: window of the layer; jump: pixels from one unit before the layer to the next")
    print(f"   -> {equal} of {len(fields)} fields are as the rule says; behind {name} a unit sees "
          f"{size} of the {x.shape[-1]} pixels of a row")  # fmt: skip
    assert equal == len(fields)
    title = "|dy/dx| on the image, y a unit in the middle: light is large. Red: the rule's field"
    with SummaryWriter(log_dir / "sequential", purge_step=0) as writer:
        writer.add_image("receptive_field/by_layer", caption_row(title, pictures, words, 128), 0)
    return fields


# --- 4. what pools do to it --------------------------------------------------------------------


def show_pools(x):
    net, sizes = conv_pool_linear(), []
    print("4. How many pixels of a row does a unit behind the last convolution see?")
    print("   convolutions   with pools   without pools")
    for n in (1, 2, 3):
        with_pools = net[: 3 * n - 2]  # up to conv1, conv2 or conv3
        without = nn.Sequential(*[layer for layer in with_pools if isinstance(layer, nn.Conv2d)])
        sizes.append((receptive_field(with_pools, x)[1], receptive_field(without, x)[1]))
        print(f"   {n:12d}   {sizes[-1][0]:10d}   {sizes[-1][1]:13d}")
    more, alone = (sizes[2][form] - sizes[1][form] for form in (0, 1))
    print(f"   -> the third convolution and the pool before it add {more} pixels; without pools it "
          f"adds {alone}")  # fmt: skip
    return sizes


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, batch=64):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "same": show_same(log_dir, batch)}
    x = torch.randn(batch, 3, 48, 48)  # so large that no field in the middle leaves it
    measured["fields"] = show_fields(log_dir, x)
    measured["sizes"] = show_pools(x)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
