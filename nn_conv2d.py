"""nn.Conv2d makes a picture per filter, with as many weights for a large image as for a small one.

A filter is a small block of weights. At each place of the image it is multiplied with the window of
pixels that it covers, and the products are summed: one number of the output. So the same weights
find an edge or a corner wherever it lies. nn.Linear needs a weight for each pair of an input and an
output number instead. A filter's picture is grey, and is called a channel of the output. A common
mistake is to show three channels as red, green and blue: section 5.

    y[j, r, s] = b[j] + sum over c, u, v of w[j, c, u, v] * x[c, r + u, s + v]

    x  image (C_in, H, W): C_in channels such as red, green and blue, H rows, W columns
    w  weights (C_out, C_in, k, k) of C_out filters     b  (C_out,), one number that each adds
    y  output (C_out, H', W'): channel j is the picture of filter j; H' = H - k + 1, W' = W - k + 1
    r, s  row and column in the output     u, v  row and column in the window, 0 to k - 1
    parameters  C_out * (C_in * k * k + 1)     multiplications  C_out * C_in * k * k * H' * W'

Needs          nn_module.py, nn_linear.py
Checked here   nn.Conv2d = the sum above; both counts; which of six filters set by hand finds which
               edge, dot or colour; three channels shown as one picture: grey images get colours
TensorBoard    conv2d/filters; conv2d/outputs: an image (step), and which filter answers to what in
               it; conv2d/reshaped: a grey image, and its channels in colours that are not there
Try            in show_counts, add (nn.Conv2d(3, 6, 3, stride=2), 32) at the end of layers: with
               steps of two pixels, how many parameters, how many multiplications?
Answer         168 as in the first row; a quarter of its work, 36,450: the output is 15 x 15
Source         torch.nn.Conv2d; Dumoulin & Visin 2016, arXiv:1603.07285
"""

import signal
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.data import as_tensors, open_images, source_line
from support.files import DATASET2, guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_conv2d"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    images = torch.rand(4, 3, 32, 32)  # 4 images, 3 channels, 32 rows, 32 columns
    plain = nn.Conv2d(3, 6, kernel_size=3)  # 3 channels in, 6 filters with windows of 3 x 3
    padded = nn.Conv2d(3, 6, kernel_size=3, padding=1)  # adds a frame of zeros, 1 pixel wide
    halved = nn.Conv2d(3, 6, kernel_size=3, padding=1, stride=2)  # moves the window by 2 pixels
    shapes = [tuple(layer(images).shape) for layer in (plain, padded, halved)]
    print("1. What comes out of nn.Conv2d(3, 6, 3)?")
    print("   padding (frame of zeros)   stride (pixels a step)   images in        channels out")
    for layer, shape in zip((plain, padded, halved), shapes, strict=True):
        padding, stride = layer.padding[0], layer.stride[0]
        print(f"   {padding:24d}   {stride:22d}   {tuple(images.shape)}   {shape}")

    edge = nn.Conv2d(1, 1, kernel_size=3, bias=False)  # one filter; its weights are set by hand
    with torch.no_grad():  # an edit that autograd shall not record
        edge.weight.copy_(torch.tensor([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]]))  # right minus left
    x = torch.tensor([[[[2.0, 2, 2, 9, 9], [2, 2, 2, 9, 9], [2, 2, 2, 9, 9]]]])  # (1, 1, 3, 5)
    found = edge(x)  # (1, 1, 1, 3)
    print("   One filter on an image of 3 x 5 pixels, row by row: what does it find?")
    for name, numbers in (("filter", edge.weight), ("image", x), ("output", found)):
        print(f"   {name:<6}   {'   '.join(map(str, numbers[0, 0].int().tolist()))}")
    print(f"   -> {found.max():.0f} = {x.max():.0f} - {x.min():.0f} where the right neighbour is "
          f"lighter than the left one, {found.min():.0f} where the two are equal")  # fmt: skip
    return shapes, found.flatten().tolist()


# --- 2. from scratch ---------------------------------------------------------------------------


def conv2d_by_shifts(x, weight, bias):
    """(B, C_in, H, W) -> (B, C_out, H', W') at stride 1 without padding.

    The formula on top, as a loop over j, c, u, v: channel j of y begins as bias[j], and each pass
    adds weight[j, c, u, v] times channel c of x, shifted by (u, v): its rows u to u + H' - 1,
    columns v to v + W' - 1. ValueError "weight is for n channels, x (shape) has m" if x has not
    the C_in channels of weight (C_out, C_in, k, k). Exercise.
    """
    C_out, C_in, k, _ = weight.shape
    if x.shape[1] != C_in:
        raise ValueError(f"weight is for {C_in} channels, x {tuple(x.shape)} has {x.shape[1]}")
    H, W = x.shape[2] - k + 1, x.shape[3] - k + 1  # of the output
    y = bias.view(C_out, 1, 1).repeat(len(x), 1, H, W)  # (B, C_out, H', W')
    for j, c, u, v in product(range(C_out), range(C_in), range(k), range(k)):  # four loops in one
        y[:, j] += weight[j, c, u, v] * x[:, c, u : u + H, v : v + W]
    return y


def show_from_scratch(x):
    layer = nn.Conv2d(3, 6, kernel_size=3)
    y, by_hand = layer(x), conv2d_by_shifts(x, layer.weight, layer.bias)
    print(f"2. Is each output a sum of weights times shifted images? {len(x)} images")
    print("   filter j   y[j, 0, 0] of image 0 by nn.Conv2d(3, 6, 3)   by hand")
    for j in range(6):
        print(f"   {j:8d}   {y[0, j, 0, 0]:44.4f}   {by_hand[0, j, 0, 0]:7.4f}")
    torch.testing.assert_close(by_hand, y)
    off = (by_hand - y).abs().max().item()
    print(f"   -> all {y.numel():,} numbers of both outputs differ by at most {off:.0e}")
    return off


# --- 3. what it costs --------------------------------------------------------------------------


def parameter_formula(C_in, C_out, k):
    """How many parameters nn.Conv2d(C_in, C_out, k) has, its bias included. Exercise."""
    return C_out * (C_in * k * k + 1)


def work_formula(C_in, C_out, k, H_out, W_out):
    """How many multiplications make an output of H_out rows, W_out columns, C_out channels.

    For one image of C_in channels: C_in * k * k of them for every number of the output. Exercise.
    """
    return C_out * C_in * k * k * H_out * W_out


def show_counts():
    print("3. What does a layer cost for one image? Counted, and by formula")
    print("                                           parameters               multiplications")
    print("   layer                       image      counted      formula     counted      formula")
    counts, row = [], "   {:<25}   {} x {}   {:10,}   {:10,}  {:10,}   {:10,}"
    layers = [(nn.Conv2d(3, 6, 3), 32), (nn.Conv2d(3, 6, 3), 64), (nn.Conv2d(3, 6, 5), 32)]
    for layer, side in layers:
        nn.init.ones_(layer.weight)  # times an image of ones: each product is 1, and
        nn.init.zeros_(layer.bias)  # the sum of the output says how many there are
        y = layer(torch.ones(1, 3, side, side))
        counts.append((sum(p.numel() for p in layer.parameters()), int(y.sum())))
        C_in, C_out, k = layer.in_channels, layer.out_channels, layer.kernel_size[0]
        formulas = parameter_formula(C_in, C_out, k), work_formula(C_in, C_out, k, *y.shape[2:])
        assert counts[-1] == formulas
        name = f"Conv2d({C_in}, {C_out}, {k}), stride {layer.stride[0]}"
        print(row.format(name, side, side, counts[-1][0], formulas[0], counts[-1][1], formulas[1]))
    i, o = 3 * 32 * 32, 6 * 30 * 30  # numbers of an image, and of the first output
    linear = nn.Linear(i, o, device="meta")  # shapes without numbers; each weight is used once
    dense = sum(p.numel() for p in linear.parameters()), linear.weight.numel()
    print(row.format(f"Linear({i}, {o})", 32, 32, dense[0], i * o + o, dense[1], i * o))
    (few, work), (same, more) = counts[:2]
    print(f"   -> 64 x 64 pixels, not 32 x 32: {same / few:g} times the parameters, "
          f"{more / work:.1f} times the work;")  # fmt: skip
    print(f"      Linear to as many outputs: {dense[0] / few:,.0f} times the parameters, "
          f"{dense[1] / work:.0f} times the work")  # fmt: skip
    return counts, dense


# --- 4. filters set by hand --------------------------------------------------------------------


def filters_by_hand():
    """Six filters (3, 3, 3) by name. The weights of each sum to 0: a uniform grey gives 0."""
    grey = torch.full((3, 1, 1), 1 / 3)  # the mean of red, green and blue
    rise = torch.tensor([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]])
    spot = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    return {
        "left_to_right": grey * rise,
        "top_to_bottom": grey * rise.T,
        "diagonal": grey * torch.tensor([[-1.0, 0, 0], [0, 0, 0], [0, 0, 1]]),
        "laplacian": grey * torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]),
        "red_minus_green": torch.tensor([1.0, -1, 0]).view(3, 1, 1) * spot,
        "blue_minus_yellow": torch.tensor([-0.5, -0.5, 1]).view(3, 1, 1) * spot,
    }


def simple_images():
    """Five images (3, 7, 7) by name: black, but for what the name says, which is white or red."""
    images = {name: torch.zeros(3, 7, 7) for name in ("right half", "lower half", "dot", "all red")}
    images["right half"][:, :, 4:] = 1
    images["lower half"][:, 4:] = 1
    images["dot"][:, 3, 3] = 1
    images["all red"][0] = 1
    return images | {"all white": torch.ones(3, 7, 7)}


def show_by_hand():
    layer, filters, images = nn.Conv2d(3, 6, 3), filters_by_hand(), simple_images()
    with torch.no_grad():
        layer.weight.copy_(torch.stack([*filters.values()]))  # (6, 3, 3, 3)
        layer.bias.zero_()
    found = layer(torch.stack([*images.values()])).abs().amax((2, 3)).detach()  # (5, 6)
    print("4. Which filter finds what? Largest |output| on five images, without padding")
    print("   What an image's name says is white, in 'all red' it is red; the rest is black")
    print(f"   {'filter':<17}   " + "   ".join(f"{name:>10}" for name in images))
    for name, row in zip(filters, found.T, strict=True):
        print(f"   {name:<17}   " + "   ".join(f"{number:10.2f}" for number in row))
    silent = [name for name, column in zip(images, found, strict=True) if column.max() < 1e-6]
    print(f"   -> left_to_right finds the edge of a right half ({found[0, 0]:.0f}), not of a lower "
          f"half ({found[1, 0]:.0f}), and not red ({found[3, 0]:.0f});")  # fmt: skip
    print(f"      red_minus_green finds red ({found[3, 4]:.0f}); no filter finds "
          f"{' or '.join(silent)}: the weights of each add up to "
          f"{layer.weight.sum((1, 2, 3)).abs().max():.0f}")  # fmt: skip
    return layer, found


# --- 5. a channel is no colour -----------------------------------------------------------------


def as_picture(x):
    """Signed x as grey levels in [0, 1]: 0.5 + x / (2 max |x|); 0.5 if all are 0. Exercise."""
    return 0.5 + x / (2 * x.abs().max().clamp(min=1e-12))


def colourfulness(images):
    """Mean over the pixels of (B, 3, H, W) of max - min of their 3 channels, a float. Exercise."""
    return (images.amax(1) - images.amin(1)).mean().item()


def show_reshaped(layer, x):
    print(f"5. y: 6 channels of {len(x)} grey images. May three be shown as red, green, blue?")
    print("   shown                      pictures   colour: mean of max - min of a pixel (grey: 0)")
    grey = x.mean(1, keepdim=True).expand_as(x)
    y, shown = layer(grey).detach(), {}  # y (B, 6, 30, 30)
    rows = {"the grey images": grey, "y.reshape(-1, 3, 30, 30)": y.reshape(-1, 3, 30, 30),
            "y.reshape(-1, 1, 30, 30)": y.reshape(-1, 1, 30, 30).expand(-1, 3, -1, -1)}  # fmt: skip
    for name, pictures in rows.items():
        shown[name] = len(pictures), colourfulness(pictures)
        print(f"   {name:<24}   {shown[name][0]:8d}   {shown[name][1]:46.3f}")
    wrong = [name for name, (_, colour) in shown.items() if colour > 0.01]
    print(f"   -> {', '.join(wrong)} makes grey images coloured: log each channel by itself")
    return shown, grey, y


# --- the lesson --------------------------------------------------------------------------------


def draw(log_dir, layer, x, grey, y_grey, images):
    """The filters; the first images beside their channels; channels that pass for colours."""
    filters = filters_by_hand()
    words = [name.replace("_", " ") for name in filters]
    with SummaryWriter(log_dir, purge_step=0) as writer:
        title = "Six filters, their weights as colours: mid-grey is 0, light is more, dark is less"
        picture = caption_row(title, [as_picture(w) for w in filters.values()], words, height=120)
        writer.add_image("conv2d/filters", picture, 0)
        title = "An image and its six output channels: mid-grey is 0, light is more, dark is less"
        for step in range(min(len(x), images)):
            channels = [as_picture(channel)[None] for channel in layer(x[step])]  # (1, 30, 30) each
            picture = caption_row(title, [x[step], *channels], ["the image", *words], height=128)
            writer.add_image("conv2d/outputs", picture, step)
        title = "A grey image; its channels 0 to 2, then 3 to 5, wrongly shown as red, green, blue"
        row = [grey[0], as_picture(y_grey[0, :3]), as_picture(y_grey[0, 3:])]
        words = ["the image", "channels 0 1 2", "channels 3 4 5"]
        writer.add_image("conv2d/reshaped", caption_row(title, row, words, height=200), 0)


@torch.no_grad()  # nothing is trained here
def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=8):
    torch.manual_seed(seed)
    dataset = open_images(root, train=False)
    print(source_line(dataset))
    x = as_tensors(dataset)[0][:count] / 255  # (B, 3, 32, 32) in [0, 1]
    measured = {"everyday": show_everyday(), "off": show_from_scratch(x)}
    measured["counts"], measured["dense"] = show_counts()
    layer, measured["found"] = show_by_hand()
    measured["shown"], grey, y_grey = show_reshaped(layer, x)
    draw(log_dir, layer, x, grey, y_grey, images=4)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
