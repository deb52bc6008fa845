"""Two linear layers in a row are one linear layer; with nn.ReLU between them they can bend.

An activation is a function between two layers, applied to each number by itself. ReLU is the usual
one: it makes negative numbers 0. SiLU and GELU are smooth relatives. A sigmoid is for an output
between 0 and 1, such as a probability; between layers it shrinks gradients.

    relu(x) = max(x, 0)                      slope 1 where x > 0, else 0
    sigmoid(x) = 1 / (1 + exp(-x))           slope at most 1/4
    silu(x) = x sigmoid(x)                   slope 1/2 at x = 0, near 0 far below, near 1 far above
    gelu(x) = x (1 + erf(x / sqrt(2))) / 2   slope as for silu; erf is torch.erf

Going back through the layers, the slopes multiply. Let n layers compute sigmoid(g W h) of their
input h, where g is a number and W a matrix that changes no length: at most (g/4)^n of the
gradient's length is left.

A unit is one output number of a layer. If its weighted sum w x + b is at most 0 for every image x,
the unit is dead: ReLU makes it 0, and its gradient is 0. In a first layer, whose inputs stay the
same, plain SGD does not bring it back. Large steps on pixels that are never negative kill many.

Needs          nn_linear.py (its targets and its loss are used here)
Checked here   four values, two slopes = torch's; the bound for each image; no dead unit comes back
TensorBoard    curve/value and curve/slope by step 10 (x + 5), a run for each activation: at x = 0
               ReLU's slope jumps. grad/log10_norm by layers passed, in the runs depth_...: the
               sigmoid falls under its bound. dead/share by epoch: it jumps in one of three runs
Try            in show_depth, put ("sigmoid", torch.sigmoid, 4) for ("sigmoid", torch.sigmoid, 1):
               the bound is then 1 for all n; is the gradient kept?
Answer         No: each layer leaves 0.65 of it, for the slope is 1/4 only at a sum of 0
Source         Glorot & Bengio 2010, section 3; He et al. 2015, arXiv:1502.01852, section 2.2
"""

import signal
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.data import as_tensors, open_images, source_line
from support.files import DATASET2, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_relu"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))  # one after the other
    with torch.no_grad():  # weights that can be followed by eye
        net[0].weight[:] = torch.tensor([[1.0], [-2.0]])  # gives x and -2 x
        net[2].weight[:] = 1  # adds the two
        net[0].bias[:], net[2].bias[:] = 0, 0
        x = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
        y, straight = net(x), net[2](net[0](x))  # with the ReLU, and without it
        hidden = net[0](x)
    print("1. What does nn.ReLU() do? The layer before gives x and -2 x, the one behind adds them")
    print("    x   layer before   nn.ReLU()   net(x)   without the ReLU")
    widths = 5, 8, 6, 7, 4, 9, 19
    for row in torch.cat([x, hidden, net[1](hidden), y, straight], 1).tolist():
        print("".join(f"{value:z{width}.0f}" for value, width in zip(row, widths, strict=True)))
    steps = [[round(step) for step in t.flatten().diff().tolist()] for t in (y, straight)]
    print(f"   -> from row to row net(x) changes by {steps[0]}, so it bends;\n      without the "
          f"ReLU it changes by {steps[1]}: a straight line")  # fmt: skip
    assert len(set(steps[0])) > 1 == len(set(steps[1]))
    return y.flatten().tolist(), straight.flatten().tolist()


# --- 2. four activations -----------------------------------------------------------------------


def relu(x):
    return torch.where(x > 0, x, 0)


def relu_slope(x):
    """The slope of relu at each number of x, in the type of x: 1 if x > 0, else 0. Exercise."""
    return (x > 0).to(x.dtype)


def sigmoid(x):
    """1 / (1 + e^-x) at each number of x. Exercise."""
    return 1 / (1 + torch.exp(-x))


def sigmoid_slope(x):
    """The slope of sigmoid at each number of x: s (1 - s), where s is the sigmoid. Exercise."""
    return sigmoid(x) * (1 - sigmoid(x))


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def silu(x):
    return x * sigmoid(x)


def library_slope(activation, x):
    """The slope at each number of x, by torch.autograd.grad; x itself is left alone. Exercise."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(activation(x).sum(), x)[0]


def show_activations(log_dir):
    print("2. Which values and slopes do four activations have? (nn.ReLU, nn.Sigmoid, ...)")
    print("              values at x =                  slopes at x =                  largest")
    print("                -3       0       1      3      -3       0       1      3   slope")
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    shown, largest, off = torch.tensor([-3.0, 0, 1, 3], dtype=x.dtype), {}, []
    for name, ours, theirs in (("relu", relu, F.relu), ("sigmoid", sigmoid, torch.sigmoid),
                               ("gelu", gelu, F.gelu), ("silu", silu, F.silu)):  # fmt: skip
        y, slope = theirs(x), library_slope(theirs, x)
        off.append((ours(x) - y).abs().max().item())
        largest[name] = slope.max().item()
        cells = *theirs(shown), *library_slope(theirs, shown), largest[name]
        print(f"   {name:<8}" + "".join(f"{cell:z8.3f}" for cell in cells))
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for i in range(0, 1001, 10):  # x = -5.0, -4.9, ..., 5.0 at the steps 0 to 100
                writer.add_scalar("curve/value", y[i], i // 10)
                writer.add_scalar("curve/slope", slope[i], i // 10)
    off += [(relu_slope(x) - library_slope(F.relu, x)).abs().max().item(),
            (sigmoid_slope(x) - library_slope(torch.sigmoid, x)).abs().max().item()]  # fmt: skip
    print(f"   -> a sigmoid's slope is at most {largest['sigmoid']:g}, that of ReLU at most "
          f"{largest['relu']:g}. By hand, the four values and\n      the slopes of relu and "
          f"sigmoid are the same within {max(off):.0e}")  # fmt: skip
    assert max(off) < 1e-12 and largest["sigmoid"] == 0.25
    return largest


# --- 3. through many layers --------------------------------------------------------------------


def orthogonal(width, depth):
    """`depth` random orthogonal matrices (width, width): |W v| = |v|."""
    return [torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q for _ in range(depth)]


def gradient_norms(activation, weights, x):
    """|dL/dh_(n-l)| / |dL/dh_n| after l = 0..n layers back, for each image of x (B, C): (n + 1, B).

    h_0 = x, and h_i = activation(h_(i-1) W_i^T) is the output of layer i; the n matrices W_i are
    `weights`. The gradient dL/dh_n of the loss L is random, drawn once by torch.randn_like(h_n).
    |...| of an image is the norm over its C numbers. Exercise.
    """
    h = [x.clone().requires_grad_()]
    for W in weights:
        h.append(activation(h[-1] @ W.T))
    upstream = torch.randn_like(h[-1])
    norms = torch.stack([g.norm(dim=1) for g in torch.autograd.grad(h[-1], h, upstream)])
    return (norms / norms[-1]).flip(0)


def show_depth(log_dir, x, depth):
    print("3. How much of a gradient's length is left, n layers further back? Mean over 64 images")
    print("   Weights g W, where W changes no length; a sigmoid leaves at most (g/4)^n")
    weights, norms, heads = orthogonal(x.shape[1], depth), {}, []
    for name, activation, g in (
        ("sigmoid", torch.sigmoid, 1), ("silu", F.silu, 1), ("gelu", F.gelu, 1),
        ("relu", F.relu, 1), ("relu_sqrt2", F.relu, 2**0.5),
    ):  # fmt: skip
        each = gradient_norms(activation, [g * W for W in weights], x[:64])  # (depth + 1, 64)
        heads.append(f"{name.partition('_')[0]}, g={g:.3g}")
        norms[name] = each.mean(1)
        if name == "sigmoid":
            heads.append("at most")
            norms["bound"] = (g / 4) ** torch.arange(depth + 1, dtype=torch.float64)
            within = (each <= norms["bound"][:, None] * (1 + 1e-9)).all(0).sum().item()
    print("    n" + "".join(f"{head:>14}" for head in heads))
    for n in sorted({1, 2, depth // 2, depth}):
        print(f"   {n:2}" + "".join(f"{values[n]:14.1e}" for values in norms.values()))
    for name, values in norms.items():
        with SummaryWriter(log_dir / f"depth_{name}", purge_step=0) as writer:
            for step, value in enumerate(values.log10()):
                writer.add_scalar("grad/log10_norm", value, step)
    kept = {name: values[-1].item() ** (1 / depth) for name, values in norms.items()}
    shares = [f"{kept[name]:.2f} with {name}" for name in ("sigmoid", "silu", "gelu", "relu")]
    print(f"   -> {within} of {each.shape[1]} images keep within (g/4)^n. Of the length, one layer")
    print(f"      leaves {', '.join(shares)}, {kept['relu_sqrt2']:.2f} with relu and sqrt(2) W")
    assert within == each.shape[1]
    return norms


# --- 4. dead units -----------------------------------------------------------------------------


@torch.no_grad()
def survey(layer, head, batches):
    """Which units (hidden,) of `layer` are off for every image, its weights, and the accuracy.

    batches: pairs (x, y) of images (B, C) and labels (B,). The hidden numbers are relu(layer(x)); a
    unit is off where they are 0 for all images of all batches. The weights (hidden, C) are a copy.
    The accuracy, a float, is the share of images whose largest number of head(hidden) is that of
    the label. Exercise.
    """
    off, right = [], []
    for x, y in batches:
        h = F.relu(layer(x))  # (B, C) -> (B, hidden)
        off.append((h == 0).all(0))
        right.append(head(h).argmax(1) == y)
    accuracy = torch.cat(right).double().mean().item()
    return torch.stack(off).all(0), layer.weight.clone(), accuracy


def train_and_survey(images, labels, hidden, epochs, lr, batch_size=100):
    """SGD on images (N, C) and labels (N,). A survey at the start and after each epoch: a list.

    The batches are the same in each epoch: equal batches are rounded alike, so that a unit whose
    weights did not move is off for the same images again.
    """
    layer, head = nn.Linear(images.shape[1], hidden), nn.Linear(hidden, 10)
    optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr)
    batches = [*zip(images.split(batch_size), labels.split(batch_size), strict=True)]
    surveys = [survey(layer, head, batches)]
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.mse_loss(head(F.relu(layer(x))), F.one_hot(y, 10).float())
            loss.backward()
            optimizer.step()
        surveys.append(survey(layer, head, batches))
    return surveys


def show_dead(seed, log_dir, x, labels, hidden, epochs, lr):
    shown = sorted({0, 1, epochs // 2, epochs})
    print(f"4. How many of {hidden} ReLU units are dead, that is, 0 for all {len(x):,} images?")
    print("   pixels      learning   dead units after epoch            dead,      right in the end")
    heads = "".join(f"{epoch:6}" for epoch in shown)
    print(f"               rate       {heads}   then not   (by guessing: 10%)")
    dead, accuracy, back = {}, {}, {}
    for run, shift, rate in (
        ("images_0_1", 0, lr), ("images_centred", 0.5, lr), ("images_0_1_small_lr", 0, lr / 30)
    ):  # fmt: skip
        torch.manual_seed(seed)  # the same weights at the start
        surveys = train_and_survey((x - shift).float(), labels, hidden, epochs, rate)
        dead[run] = [int(off.sum()) for off, *_ in surveys]
        back[run] = sum(int((off & ~later).sum()) for (off, *_), (later, *_) in pairwise(surveys))
        accuracy[run] = surveys[-1][2]
        name = f"-{shift}..{shift}" if shift else "0..1"
        print(f"   {name:<11} {rate:8g}   " + "".join(f"{dead[run][epoch]:6}" for epoch in shown)
              + f"   {back[run]:8}   {accuracy[run]:18.0%}")  # fmt: skip
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for epoch, number in enumerate(dead[run]):
                writer.add_scalar("dead/share", number / hidden, epoch)
    died = [numbers[-1] - numbers[0] for numbers in dead.values()]
    print(f"   -> large steps killed {died[0]} units on pixels 0..1, {died[1]} on pixels around 0;")
    print(f"      small steps killed {died[2]}. Of all dead units {sum(back.values())} came back")
    assert not any(back.values())
    return {"dead": dead, "accuracy": accuracy, "back": back}


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=1000, depth=10, hidden=128, epochs=10, lr=3):
    torch.manual_seed(seed)
    dataset = open_images(root)
    print(source_line(dataset))
    images, labels = (t[:count] for t in as_tensors(dataset))
    x = F.avg_pool2d(images.double() / 255, 4).flatten(1)  # means of 4 x 4 pixels: (N, 192)
    measured = {"everyday": show_everyday(), "largest": show_activations(log_dir)}
    measured["norms"] = show_depth(log_dir, x - 0.5, depth)
    measured |= show_dead(seed, log_dir, x, labels, hidden, epochs, lr)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
