"""A convolutional network (CNN) is a chain of layers: formulas give all shapes and parameters.

Moli is the network that train.py trains: three convolution blocks find features in an image, two
Linear layers make them scores (logits), one for each class. Where an output does not fit the next
input, PyTorch raises an error: so compute the shapes first. Activations such as SiLU are needed:
without them, and with the mean in place of the maximum in the pools, all of Moli (in eval() mode)
is one affine map x -> A x + c of a matrix A and a vector c, and one Linear layer could do the same.

    block   convolution 5x5, padding 2 -> max-pool 2 -> batch norm -> SiLU
    size    n -> n + 2 * 2 - 5 + 1 = n by the convolution, n -> n / 2 by the pool
    shape   (3, 32, 32) -> (32, 16, 16) -> (32, 8, 8) -> (64, 4, 4) -> 64 * 4 * 4 = 1024 -> 64 -> 10
    counts  5 * 5 * C_in * C_out a convolution, 2 * C a batch norm, (inputs + 1) * outputs a Linear

    n  the height and the width     C, C_in, C_out  channels     silu(x) = x * sigmoid(x)

Needs          nn_linear.py, nn_relu.py, nn_conv2d.py, nn_maxpool.py, nn_common_layers.py, nn_seq.py
Checked here   shapes and parameters of each layer, counted and by formula; multiplications; which
               parts of the network make it more than an affine map
TensorBoard    nothing of its own: train.py draws this network's graph
Try            in block, write kernel_size=3, padding=1: how many parameters are left of 145,706?
Answer         95,018: each 5x5 kernel loses 16 of 25 numbers, 50,688 in all. The shapes stay
Source         after the CIFAR-10 "quick" network of cuda-convnet (Krizhevsky 2012); batch norm:
               Ioffe & Szegedy 2015, arXiv:1502.03167; SiLU: Elfwing et al., arXiv:1702.03118
"""

import copy
import math
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn

from support.files import guard

# --- 1. in everyday code -----------------------------------------------------------------------


def block(in_channels, out_channels):
    """(B, in, H, W) -> (B, out, H/2, W/2). Batch norm has a shift; the convolution needs none."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=5, padding=2, bias=False),
        nn.MaxPool2d(2),  # before batch norm and SiLU, so that they see a quarter of the places
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )


class Moli(nn.Module):
    """Images (B, 3, 32, 32) -> logits (B, num_classes). Raises ValueError for another shape."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(block(3, 32), block(32, 32), block(32, 64))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(1024, 64), nn.SiLU(), nn.Linear(64, num_classes)
        )

    def forward(self, x):
        """Logits (B, num_classes): the features, then the classifier, of images x (B, 3, 32, 32).

        ValueError "Moli takes images (B, 3, 32, 32), not (…)" for another shape. Exercise.
        """
        if x.dim() != 4 or x.shape[1:] != (3, 32, 32):
            raise ValueError(f"Moli takes images (B, 3, 32, 32), not {tuple(x.shape)}")
        return self.classifier(self.features(x))


def show_everyday():
    net = Moli(num_classes=3)
    net.eval()  # for predictions; net.train() to train it
    x = torch.rand(2, 3, 32, 32)  # two images
    with torch.no_grad():
        z = net(x)  # logits
        p = z.softmax(1)  # probabilities: each row sums to 1

    print("1. In everyday code: what comes out for two images? Moli(num_classes=3), untrained")
    print("   image   logits                       probabilities            predicted class")
    for i in range(len(x)):
        logits, probabilities = (" ".join(f"{v:7.3f}" for v in row[i]) for row in (z, p))
        print(f"   {i:5d}   {logits}   {probabilities}   {p[i].argmax():15d}")
    off = (p - 1 / z.shape[1]).abs().max()
    print(f"   -> images {tuple(x.shape)} became logits {tuple(z.shape)}; an untrained Moli gives")
    print(f"      each class a probability at most {off:.3f} from 1 / {z.shape[1]}")
    return z


# --- 2. shapes and parameters ------------------------------------------------------------------


def layers(model):
    """[(name, module)] of each layer that computes something: those without children, in order.

    Exercise.
    """
    return [(name, m) for name, m in model.named_modules() if not list(m.children())]


def trace_shapes(model, x):
    """[(name, kind, output shape, parameters)] of each layer for an input x (B, 3, 32, 32).

    kind is the name of its class, the shape a tuple, parameters their count. Exercise.
    """
    rows = []
    for name, layer in layers(model):
        x = layer(x)
        count = sum(p.numel() for p in layer.parameters())
        rows.append((name, type(layer).__name__, tuple(x.shape), count))
    return rows


def factors(layer):
    """The numbers whose product is how many parameters a layer has; [] if it has none.

    A square convolution without bias: [kernel, kernel, in channels, out channels]; BatchNorm2d: [2,
    channels]; a Linear layer with bias: [inputs + 1, outputs]. Exercise.
    """
    if isinstance(layer, nn.Conv2d):
        return [*layer.kernel_size, layer.in_channels, layer.out_channels]
    if isinstance(layer, nn.BatchNorm2d):
        return [2, layer.num_features]  # a scale and a shift for each channel
    if isinstance(layer, nn.Linear):
        return [layer.in_features + 1, layer.out_features]  # + 1: the bias
    return []


def show_shapes(model, x):
    print(f"2. What becomes of {len(x)} images? Each layer's output, and its parameters")
    print("   layer          kind          output shape        counted   by formula")
    rows, agree = trace_shapes(model, x), 0
    for (name, kind, shape, count), (_, layer) in zip(rows, layers(model), strict=True):
        by_formula = factors(layer)
        agree += count == (math.prod(by_formula) if by_formula else 0)
        formula = " * ".join(map(str, by_formula)) or "0"
        print(f"   {name:<12}   {kind:<11}   {shape!s:<17}   {count:7,}   {formula}")
    total = sum(count for *_, count in rows)
    last, whole = rows[-1][2], tuple(model(x).shape)
    print(f"   -> {total:,} parameters; count and formula agree in {agree} of {len(rows)} layers;")
    print(f"      the last shape is {last}, {'as' if last == whole else 'unlike'} that of model(x)")
    return {"parameters": total, "agree": agree}


# --- 3. where the parameters are, and where the work is -----------------------------------------


def multiplications(layer, shape):
    """How many multiplications a convolution or Linear layer makes for an image; output (B, ...).

    A convolution uses each of its weights at each of the H x W places of its output (B, C, H, W), a
    Linear layer each weight once. Other layers count as 0. Exercise.
    """
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        return layer.weight.numel() * math.prod(shape[2:])  # the product of no numbers is 1
    return 0


def show_work(model, x):
    from torch.utils.flop_counter import FlopCounterMode  # not on top: train.py imports this file

    traced = trace_shapes(model, x)
    rows = []
    for (name, layer), (_, kind, shape, count) in zip(layers(model), traced, strict=True):
        if work := multiplications(layer, shape):
            rows.append((f"{name} {kind}", count, work))
    parameters, work = sum(row[3] for row in traced), sum(row[2] for row in rows)
    print("3. Where are the parameters, and where is the work for one image?")
    print("   layer                  parameters   of all   multiplications   of all")
    for name, count, own in rows:
        shares = count / parameters, own / work
        print(f"   {name:<20}   {count:10,}   {shares[0]:6.1%}   {own:15,}   {shares[1]:6.1%}")
    with FlopCounterMode(display=False) as counter:
        model(x)
    measured = counter.get_total_flops() / 2 / len(x)  # it counts the additions, too
    rest = parameters - sum(row[1] for row in rows)
    print(f"   all batch norms        {rest:10,}   {rest / parameters:6.1%}       not counted")
    print(f"   sum                    {parameters:10,}            {work:15,}")
    print(f"   sum by torch's formula                         {measured:15,.0f}")
    name, count, own = max(rows, key=lambda row: row[1])
    shares = f"{count / parameters:.0%} of the parameters and does {own / work:.1%} of the work"
    print(f"   -> {name} holds {shares}")
    return {"work": work, "torch_work": measured}


# --- 4. what makes it more than one Linear layer -------------------------------------------------


def replace(model, kind, make):
    """A deep copy of model, in which each layer of class `kind`, at any depth, is a new make().

    Exercise.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, make())
    return model


@torch.no_grad()
def bend(f, x, y):
    """The largest |f((x + y) / 2) - (f(x) + f(y)) / 2|, as a float: 0 for an affine f. Exercise."""
    return (f((x + y) / 2) - (f(x) + f(y)) / 2).abs().max().item()


@torch.no_grad()
def show_affine(model, x, y):
    model, x, y = copy.deepcopy(model).double(), x.double(), y.double()
    no_silu = replace(model, nn.SiLU, nn.Identity)
    networks = {
        "Moli": model,
        "max-pool left, no SiLU": no_silu,
        "SiLU left, mean-pool": replace(model, nn.MaxPool2d, lambda: nn.AvgPool2d(2)),
        "neither of them left": replace(no_silu, nn.MaxPool2d, lambda: nn.AvgPool2d(2)),
        "one Linear layer": nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).double(),
    }
    print(
        "4. Which layers keep Moli from being affine, x -> A x + c? If f is affine, both sides of"
    )
    print("   f((x + y) / 2) = (f(x) + f(y)) / 2 are equal for all images x, y")
    print("   network f                largest difference of both sides   largest |f(x) - f(y)|")
    bends = {}
    for name, f in networks.items():
        bends[name] = bend(f, x, y)
        print(f"   {name:<22}   {bends[name]:32.5f}   {(f(x) - f(y)).abs().max():21.5f}")
    straight = [name for name, size in bends.items() if size < 1e-12]
    alone = {
        "max-pool": "max-pool left, no SiLU",
        "SiLU": "SiLU left, mean-pool",
    }
    bending = [kind for kind, name in alone.items() if name not in straight]
    print(f"   -> affine, up to rounding: {', '.join(straight)}. Each of these alone is enough")
    print(f"      to keep Moli from that: {', '.join(bending)} (the first column is larger without")
    print("      SiLU because all numbers are, as the second column shows)")
    _, first, silu, second = model.classifier
    z = torch.randn(4, 1024).double()
    one = z @ (second.weight @ first.weight).T + second.weight @ first.bias + second.bias
    off = [(second(f(first(z))) - one).abs().max().item() for f in (nn.Identity(), silu)]
    print(
        "      Two Linear layers, z -> W2 (W1 z + b1) + b2 with weights W, biases b, and a single"
    )
    print(f"      one with A = W2 W1, c = W2 b1 + b2 differ by at most {off[0]:.5f}; if SiLU is")
    print(f"      between the two, by up to {off[1]:.5f}")
    return {"bends": bends, "without": off[0], "with_silu": off[1]}


def main(seed=0, batch=4):
    torch.manual_seed(seed)
    measured = {"logits": show_everyday()}
    model = Moli().eval()
    x, y = torch.randn(2, batch, 3, 32, 32)
    with torch.no_grad():
        measured |= show_shapes(model, x) | show_work(model, x) | show_affine(model, x, y)
    return measured


if __name__ == "__main__":
    guard(main)
