"""A fresh classifier of K classes starts at a loss near ln K, if its input is normalised.

    CE = logsumexp(z) - z_t = ln K + Var_k(z) / 2 + (mean_k z - z_t) + O(z^3)

Its logits z are small and know nothing of the target t: the variance is small, and the bracket
averages to about 0. So Moli starts near ln 10 = 2.303, and a start far from it is the cheapest sign
of a bug: pixels in 0..255 are one, unless batch norm mends it. On normalised input batch norm
hardly moves the loss, but logits spread wider, and every layer's gradient is tens of times larger.

Checked here   the expansion above for Moli with batch norm in train and eval mode, and without; raw
               pixels, too; the last bias's gradient = mean of p - y; a small step's fall
TensorBoard    grad/norm by layer (0-2 convolutions, 3-4 linear), runs with_norm and without_norm;
               logits/fresh, histograms
Try            the last layer's weights and biases times 0.01: which loss? ln 10, to three decimals
Source         Glorot & Bengio 2010; Ioffe & Szegedy 2015, arXiv:1502.03167
"""

import copy
import math
import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from model import Moli
from support.data import as_tensors, channel_stats, open_images, source_line
from support.files import DATASET2, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_loss_network"


def load_batch(root, count):
    """The first `count` images (B, 3, 32, 32), mean 0 and std 1 by channel, and labels (B,)."""
    dataset = open_images(root)
    images, labels = (t[:count] for t in as_tensors(dataset))
    mean, std = channel_stats(images)
    x = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x, labels, source_line(dataset)


def without_norm(model):
    """A copy of Moli, same weights, its batch norms replaced by nn.Identity(); the model stays.

    model.features has three blocks, in each the batch norm is number 2. Exercise.
    """
    model = copy.deepcopy(model)
    for block in model.features:
        block[2] = nn.Identity()
    return model


def expected_loss(z, t):
    """Cross-entropy to second order in the logits z (B, K), for targets t (B,): a tensor ().

    The mean over the batch of ln K + Var_k(z) / 2 + mean_k z - z_t; Var divides by K. Exercise.
    """
    bracket = z.mean(1) - z.gather(1, t[:, None]).squeeze(1)
    return math.log(z.shape[1]) + (z.var(1, correction=0) / 2 + bracket).mean()


def gradient_norms(model):
    """{name: norm of dL/dW, a float} of each layer with a weight matrix, in order.

    Those are the nn.Conv2d and nn.Linear of the model, after a backward(). Exercise.
    """
    return {name: m.weight.grad.norm().item() for name, m in model.named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))}  # fmt: skip


def loss_after_step(model, x, t, lr):
    """The loss after one plain gradient step p - lr p.grad; the model itself stays as it is.

    A deep copy is moved, its cross-entropy on x, t returned; copy.deepcopy does not copy gradients.
    Exercise.
    """
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(moved.parameters(), model.parameters(), strict=True):
            p -= lr * q.grad
        return F.cross_entropy(moved(x), t)


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=256, lr=1e-4):
    torch.manual_seed(seed)
    x, t, source = load_batch(root, count)
    print(source)
    model = Moli().double()
    plain = without_norm(model)

    print(f"1. the loss of fresh networks on {count} images, ln 10 = {math.log(10):.4f}")
    starts = {}
    for name, network in {
        "batch norm, train": copy.deepcopy(model).train(),
        "batch norm, eval": copy.deepcopy(model).eval(),
        "no batch norm": plain,
    }.items():
        with torch.no_grad():
            raw = F.cross_entropy(network(60 * x + 120), t).item()  # about 0..255 again
            z = network(x)
        loss, theory = F.cross_entropy(z, t).item(), expected_loss(z, t).item()
        spread = z.var(1, correction=0).mean().item()
        starts[name] = {"loss": loss, "theory": theory, "variance": spread, "raw": raw}
        print(f"   {name:<18} loss {loss:.4f}   expansion {theory:.4f}   "
              f"variance {spread:.4f}   raw pixels {raw:.2f}")  # fmt: skip

    print("2. backward(): the gradient of the last bias, and the mean of p - y")
    z = model(x)
    loss = F.cross_entropy(z, t)
    loss.backward()
    error = (z.softmax(1) - F.one_hot(t, 10)).mean(0).detach()
    torch.testing.assert_close(model.classifier[-1].bias.grad, error)
    for name, row in {"gradient": model.classifier[-1].bias.grad, "p - y": error}.items():
        print(f"   {name:<9} " + " ".join(f"{value:+.4f}" for value in row[:6].tolist()))

    print(f"3. one step of lr {lr:g} down the gradient")
    fall = (loss - loss_after_step(model, x, t, lr)).item()
    theory = lr * sum(p.grad.square().sum().item() for p in model.parameters())
    print(f"   the loss falls by {fall:.3e}   theory lr |g|^2 {theory:.3e}")

    print("4. gradient norm by layer")
    F.cross_entropy(plain(x), t).backward()
    norms = {"with_norm": gradient_norms(model), "without_norm": gradient_norms(plain)}
    for name in norms["with_norm"]:
        row = "   ".join(f"{run} {by_layer[name]:.4f}" for run, by_layer in norms.items())
        print(f"   {name:<14} {row}")
    for run, logits in {"with_norm": z, "without_norm": plain(x)}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for layer, norm in enumerate(norms[run].values()):
                writer.add_scalar("grad/norm", norm, layer)
            writer.add_histogram("logits/fresh", logits, 0)
    return {"starts": starts, "fall": fall, "theory": theory, "norms": norms}


if __name__ == "__main__":
    guard(main)
