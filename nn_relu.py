"""A sigmoid's slope is never over 1/4: through n of them a gradient shrinks by 4^-n or more.

    sigmoid(x) = s = 1 / (1 + exp(-x))     slope s (1 - s) <= 1/4, equal at x = 0 alone
    relu(x)    = max(x, 0)                 slope 1 where x > 0, else 0

Under weights that stretch no vector (orthogonal W), |dL/dh_0| <= 4^-n |dL/dh_n| for every image.
ReLU lets a gradient through whole or not at all: with half of its units on, a layer keeps half of
|dL/dh|^2, and with weights sqrt(2) W all of it. The price: a unit that is off for every image gets
gradient 0, so plain SGD never brings it back. Images in [0, 1] share a direction, their mean: large
steps against it turn units off for all images at once. Less 1/2, the same images do no such harm.

Checked here   both by hand; the bound for each image; what ReLU does to images in [0, 1]: nothing;
               dead units by epoch: their number only grows, their weights stand still
TensorBoard    activation/input, relu, sigmoid (images in [-1, 1]); grad/log10_norm by layers passed
               in the runs sigmoid, bound, relu; dead/share by epoch in images_0_1, images_centred
Try            sigmoid with weights 4 W: the bound is 1; is the gradient kept? No, 0.65 a layer
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


def sigmoid(x):
    """1 / (1 + e^-x) at each number of x. Exercise."""
    return 1 / (1 + torch.exp(-x))


def sigmoid_slope(x):
    """The derivative of sigmoid at each number of x: s (1 - s), where s is the sigmoid.

    Exercise.
    """
    return sigmoid(x) * (1 - sigmoid(x))


def relu(x):
    return torch.where(x > 0, x, 0)


def relu_slope(x):
    """The derivative of max(0, x) at each number of x, in the type of x: 1 if x > 0, else 0.

    Exercise.
    """
    return (x > 0).to(x.dtype)


def library_slope(activation, x):
    """The derivative of `activation` at each number of x, by torch.autograd.grad; x stays as it is.

    Exercise.
    """
    x = x.clone().requires_grad_()
    return torch.autograd.grad(activation(x).sum(), x)[0]


def orthogonal(width, depth):
    """`depth` random rotations (width, width): |W v| = |v|."""
    return [torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q for _ in range(depth)]


def gradient_norms(activation, weights, x):
    """|dL/dh_{n-l}| / |dL/dh_n| after l = 0..n layers back, for each of x (B, C): (n + 1, B).

    h_0 = x, h_i = activation(h_{i-1} W_i^T) for the n matrices of `weights`; dL/dh_n is random,
    drawn once by torch.randn_like(h_n). The norm of each image is taken over its C numbers.
    Exercise.
    """
    h = [x.clone().requires_grad_()]
    for W in weights:
        h.append(activation(h[-1] @ W.T))
    upstream = torch.randn_like(h[-1])
    norms = torch.stack([g.norm(dim=1) for g in torch.autograd.grad(h[-1], h, upstream)])
    return (norms / norms[-1]).flip(0)


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
    """SGD on images (N, C) and labels (N,). Yields a survey at the start and after each epoch.

    The batches are the same in each epoch: then a sum that was below 0 is below 0 again.
    """
    layer, head = nn.Linear(images.shape[1], hidden), nn.Linear(hidden, 10)
    optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr)
    batches = [*zip(images.split(batch_size), labels.split(batch_size), strict=True)]
    yield survey(layer, head, batches)
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(head(F.relu(layer(x))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield survey(layer, head, batches)


def write_curve(log_dir, tag, values):
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, step)


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=1000, depth=10, hidden=128, epochs=10):
    torch.manual_seed(seed)
    dataset = open_images(root)
    print(source_line(dataset))
    images, labels = (t[:count] for t in as_tensors(dataset))
    images = images.double() / 255  # (N, 3, 32, 32) in [0, 1]

    print("1. by hand against torch: largest difference; largest slope on [-10, 10]")
    grid = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    slopes = {}
    pairs = {"sigmoid": (sigmoid, sigmoid_slope, torch.sigmoid), "relu": (relu, relu_slope, F.relu)}
    for name, (ours, slope, theirs) in pairs.items():
        errors = []
        for a, b in ((ours(grid), theirs(grid)), (slope(grid), library_slope(theirs, grid))):
            torch.testing.assert_close(a, b)
            errors.append((a - b).abs().max())
        slopes[name] = slope(grid).max().item()
        print(f"   {name:<8} value {errors[0]:.0e}   slope {errors[1]:.0e}   "
              f"largest slope {slopes[name]:.4f}")  # fmt: skip
    assert slopes["sigmoid"] == 0.25

    print(f"2. {len(images):,} images: share of numbers that ReLU changes; standard deviations")
    changed = {}
    for name, x in {"[0, 1]": images, "[-1, 1]": 2 * images - 1}.items():
        y, s = F.relu(x), torch.sigmoid(x)
        changed[name] = (y != x).double().mean().item()
        print(f"   in {name:<8} changed {changed[name]:.3f}   of x {x.std():.3f}   "
              f"relu(x) {y.std():.3f}   sigmoid(x) {s.std():.3f}")  # fmt: skip
    x = 2 * images[:16] - 1
    with SummaryWriter(log_dir / "images", purge_step=0) as writer:
        writer.add_images("activation/input", images[:16], 0)
        writer.add_images("activation/relu", F.relu(x), 0)
        writer.add_images("activation/sigmoid", torch.sigmoid(x), 0)

    print("3. |dL/dh_0| / |dL/dh_n| through n layers, mean over images")
    x = F.avg_pool2d(images, 4).flatten(1)  # (N, 3, 32, 32) -> (N, 192)
    weights = orthogonal(x.shape[1], depth)
    norms = {
        "sigmoid": gradient_norms(torch.sigmoid, weights, x[:64] - 0.5),
        "relu": gradient_norms(F.relu, weights, x[:64] - 0.5),
        "relu_sqrt2": gradient_norms(F.relu, [W * 2**0.5 for W in weights], x[:64] - 0.5),
    }
    bound = 4.0 ** -torch.arange(depth + 1, dtype=torch.float64)
    assert (norms["sigmoid"] <= bound[:, None]).all()
    norms = {run: n.mean(1) for run, n in norms.items()} | {"bound": bound}
    print(f"   {'n':>3}   sigmoid   4^-n      relu      2^(-n/2)  relu, sqrt(2) W")
    for n in range(1, depth + 1):
        sigmoid_n, relu_n, sqrt2_n, bound_n = (values[n] for values in norms.values())
        print(f"   {n:3d}   {sigmoid_n:.1e}   {bound_n:.1e}   {relu_n:.1e}   {2 ** (-n / 2):.1e}   "
              f"{sqrt2_n:.1e}")  # fmt: skip
    for run, values in norms.items():
        write_curve(log_dir / run, "grad/log10_norm", values.log10())

    print(f"4. dead units of {hidden} at the start and after each epoch of SGD, learning rate 2")
    dead, accuracy = {}, {}
    for run, shift in {"images_0_1": 0.0, "images_centred": 0.5}.items():
        torch.manual_seed(seed)
        surveys = [*train_and_survey((x - shift).float(), labels, hidden, epochs, lr=2.0)]
        for (off, before, _), (still_off, after, _) in pairwise(surveys):
            assert still_off[off].all() and torch.equal(after[off], before[off])
        dead[run] = [int(off.sum()) for off, *_ in surveys]
        accuracy[run] = surveys[-1][2]
        counts = " ".join(f"{n:3d}" for n in dead[run])
        print(f"   {run:<15} {counts}   training accuracy {accuracy[run]:.2f}")
        write_curve(log_dir / run, "dead/share", [n / hidden for n in dead[run]])
    return {"slopes": slopes, "changed": changed, "norms": norms, "dead": dead,
            "accuracy": accuracy}  # fmt: skip


if __name__ == "__main__":
    guard(main)
