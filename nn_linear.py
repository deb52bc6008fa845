"""A Linear layer sees each image alone, as a row of numbers in which no two are neighbours.

    x.flatten(1)     (B, C, H, W) -> (B, I),  pixel (c, h, w) at (c H + h) W + w,  I = C H W
    y = x W^T + b    (B, I) -> (B, O),        parameters O I + O

No shape of W holds B, so a last batch that is smaller passes. Flattened with the batch, 64 images
are one row of 64 I numbers: the layer needs 64 times the weights, gives one answer for all of them,
and fails at the first batch of another size. The order of the I numbers is free: shuffle the pixels
of all images in one way, and the columns of W with them, and nothing changes, training included.
Rows and columns, on which a convolution is built, mean nothing to this layer.

Checked here   the place of every pixel; nn.Linear against x @ W.T + b; a set against its batches;
               the error of flattening the batch too; training on shuffled pixels
TensorBoard    runs in_order and shuffled: train/loss, two curves that are one; linear/input and
               linear/templates, the rows of W as pictures: after the shuffling noise to the eye
Try            nn.Linear(32, 10) on (B, 3, 32, 32): an error? No: each row of pixels is a sample
Source         torch.nn.Linear, torch.nn.Flatten
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from support.data import as_tensors, open_images, source_line
from support.files import DATASET2, guard
from support.pictures import caption_grid

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_linear"


def flat_index(c, h, w, H, W):
    """Where pixel (c, h, w) of an image (C, H, W) lies in its flattened row, counted from 0.

    The row holds channel after channel, of each channel row after row. Exercise.
    """
    return (c * H + h) * W + w


def linear(x, weight, bias):
    """x W^T + b: (B, I) -> (B, O) for weight (O, I) and bias (O,). Exercise."""
    return x @ weight.T + bias


def feed(layer, batches, start_dim):
    """Of each batch, flattened from axis `start_dim` on: its size, and the output or the error.

    A generator of pairs: (len(batch), layer(flattened batch)), or (len(batch), the RuntimeError)
    where the layer refuses it; the batches after it are still fed. Exercise.
    """
    for batch in batches:
        try:
            yield len(batch), layer(batch.flatten(start_dim))
        except RuntimeError as error:
            yield len(batch), error


def train(layer, x, labels, steps, lr=0.01):
    """Softmax regression on all rows of x (N, I) at once. Returns the loss before each step.

    `steps` steps of torch.optim.SGD with momentum 0.9 on the cross-entropy of layer(x) and the
    labels (N,); the losses are a list of floats. Exercise.
    """
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(layer(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def draw_templates(weight, classes):
    """The rows of weight (10, 3072) as RGB pictures over their classes, 0 at mid-grey."""
    scaled = weight / weight.abs().amax(1, keepdim=True)
    pictures = ((0.5 + scaled / 2) * 255).byte().view(-1, 3, 32, 32)
    return caption_grid(pictures, classes, columns=4)


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=500, batch_size=64, steps=40):
    torch.manual_seed(seed)
    dataset = open_images(root, train=False)
    print(source_line(dataset))
    images, labels = (t[:count] for t in as_tensors(dataset))
    images = images / 255 - 0.5  # (N, 3, 32, 32)
    x = images.flatten(1)  # (N, 3072)

    print("1. flatten(1): how far apart neighbours lie in the row")
    c, h, w = torch.cartesian_prod(*map(torch.arange, images.shape[1:])).unbind(1)  # (3072,) each
    assert torch.equal(x[:, flat_index(c, h, w, 32, 32)], images[:, c, h, w])
    steps_apart = [flat_index(*pixel, 32, 32) for pixel in ((0, 0, 1), (0, 1, 0), (1, 0, 0))]
    print("   next column {}   next row {}   next channel {}".format(*steps_apart))

    print("2. nn.Linear(3072, 10) against x @ W.T + b")
    layer = nn.Linear(3072, 10)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))
    parameters = sum(p.numel() for p in layer.parameters())
    assert parameters == 10 * 3072 + 10
    off = (layer(x) - linear(x, layer.weight, layer.bias)).abs().max()
    print(
        f"   largest difference {off:.1e}   parameters {parameters:,}   formula {10 * 3072 + 10:,}"
    )

    print(f"3. {count} images in batches of {batch_size}, flattened from axis 1: first and last")
    batches = DataLoader(images, batch_size)
    outputs = list(feed(layer, batches, start_dim=1))
    for n, y in (outputs[0], outputs[-1]):
        print(f"   {n:3d} images -> {tuple(y.shape)}")
    torch.testing.assert_close(torch.cat([y for _, y in outputs]), layer(x))

    print("4. the same, flattened from axis 0")
    wide = nn.Linear(batch_size * 3072, 10)
    fed = list(feed(wide, batches, start_dim=0))
    (n, y), (n_last, error) = fed[0], fed[-1]
    print(f"   parameters {sum(p.numel() for p in wide.parameters()):,}")
    print(f"   {n:3d} images -> {tuple(y.shape)}")
    print(f"   {n_last:3d} images -> {type(error).__name__}: {error}")

    print(f"5. {steps} steps of training, pixels in order and shuffled: the loss")
    order = torch.randperm(3072)
    other = nn.Linear(3072, 10)
    other.load_state_dict({"weight": layer.weight[:, order], "bias": layer.bias})
    losses = {}
    for run, model, rows in (("in_order", layer, x), ("shuffled", other, x[:, order])):
        losses[run] = train(model, rows, labels, steps)
        print(f"   {run}   first {losses[run][0]:.6f}   last {losses[run][-1]:.6f}")
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, loss in enumerate(losses[run]):
                writer.add_scalar("train/loss", loss, step)
            writer.add_image("linear/input", rows[0].view(3, 32, 32) + 0.5, 0)
            templates = draw_templates(model.weight.detach(), dataset.classes)
            writer.add_image("linear/templates", templates, 0)
    torch.testing.assert_close(other.weight, layer.weight[:, order])
    torch.testing.assert_close(losses["in_order"], losses["shuffled"], rtol=1e-5, atol=0)
    return {"outputs": outputs, "batch_flattened": fed, "losses": losses}


if __name__ == "__main__":
    guard(main)
