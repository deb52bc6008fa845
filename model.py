"""Without the activation between them, the two Linear layers of a classifier are only one.

    block: conv 5x5 (padding 2) -> max-pool 2 -> batch norm -> SiLU,    silu(x) = x * sigmoid(x)
    (3, 32, 32) -> (32, 16, 16) -> (32, 8, 8) -> (64, 4, 4) -> 1024 -> 64 -> 10
    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)

A stack of affine maps is an affine map, however deep. What an activation adds is depth itself.
The pool stands before batch norm and activation, so that they see a quarter of the pixels.

Checked here   shape and parameters of each layer, by formula; the identity above and how far SiLU
               departs from it; SiLU against x * sigmoid(x)
TensorBoard    nothing of its own: train.py draws this network's graph
Try            kernel 3 and padding 1: how many parameters go? 16/25 of the convolutions', 50,688
Source         the CIFAR-10 "quick" network of cuda-convnet (Krizhevsky 2012); Ioffe & Szegedy 2015,
               arXiv:1502.03167; SiLU: Elfwing et al. 2018, arXiv:1702.03118
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn

from support.files import guard


def block(in_channels, out_channels):
    """(B, in, H, W) -> (B, out, H/2, W/2). Batch norm has a shift; the convolution needs none."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=5, padding=2, bias=False),
        nn.MaxPool2d(2),
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


def expected_parameters(num_classes=10):
    """How many parameters Moli has, by formula.

    A convolution has k k c_in c_out (no bias), its batch norm two a channel, a Linear layer in *
    out + out. Exercise.
    """
    channels = [(3, 32), (32, 32), (32, 64)]
    convolutions = sum(5 * 5 * c_in * c_out + 2 * c_out for c_in, c_out in channels)
    return convolutions + (1024 * 64 + 64) + (64 * num_classes + num_classes)


def main(seed=0, batch=4):
    torch.manual_seed(seed)
    model, x = Moli().eval(), torch.randn(batch, 3, 32, 32)

    print("1. shapes and parameters, layer by layer")
    rows = trace_shapes(model, x)
    for name, kind, shape, count in rows:
        print(f"   {name:<14} {kind:<12} {shape!s:<18} {count:7,}")
    total = sum(count for *_, count in rows)
    assert rows[-1][2] == model(x).shape and total == expected_parameters()
    print(f"   parameters measured {total:,}   formula {expected_parameters():,}")

    print("2. the two Linear layers, with nothing and with SiLU between them, against one")
    first, second = model.classifier[1], model.classifier[3]
    z = torch.randn(batch, 1024)
    one = z @ (second.weight @ first.weight).T + second.weight @ first.bias + second.bias
    without = (second(first(z)) - one).abs().max().item()
    with_silu = (second(F.silu(first(z))) - one).abs().max().item()
    assert without < 1e-5
    print(f"   largest difference with nothing {without:.1e}   with SiLU {with_silu:.2f}")
    h = torch.linspace(-6, 6, 7)
    torch.testing.assert_close(model.classifier[2](h), h * torch.sigmoid(h))
    return {"parameters": total, "without": without, "with_silu": with_silu}


if __name__ == "__main__":
    guard(main)
