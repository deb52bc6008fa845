"""A linear layer gets each image as one row of numbers, and it does not know which are neighbours.

nn.Linear computes each output as a weighted sum of all its inputs, plus a bias. It stands at the
end of many classifiers: flatten(1) makes a row of each image, the layer makes one number per class
of each row. Flatten from axis 1 on, as axis 0 counts the images. If you flatten all axes, 64 images
become one row: the layer needs 64 times the weights, gives one answer for all of them, and fails
at the first batch of another size.

    x = images.flatten(1)      (B, C, H, W) -> (B, I)
    y = x weight^T + bias      (B, I) -> (B, O)

    B  images in a batch       C, H, W  channels, rows, columns     ^T  rows and columns exchanged
    I  numbers in, C H W       O  numbers out       weight (O, I), bias (O,): O I + O parameters
    Pixel (c, h, w), counted from 0, comes to place (c H + h) W + w of its row.

The order of the I numbers is free. Shuffle the pixels of all images in one way, and the columns of
the weight with them: the layer computes the same, and it learns the same. Which pixels lie side by
side means nothing to it; a convolution (nn_conv2d.py) uses that.

Needs          nn_module.py
Checked here   the place of every pixel; nn.Linear = by hand; batches flattened in two ways; the
               losses on shuffled pixels, and those where the weights are left as they were
TensorBoard    train/loss by step, in the runs in_order and shuffled: two curves that are one;
               linear/input and linear/templates, what training added to five rows of the weight:
               in the run shuffled both pictures look like noise
Try            in show_batches, put (2, nn.Linear(1024, 10)) for (1, nn.Linear(3072, 10)): an error?
Answer         No: each channel is taken for a sample, so 64 images give (64, 3, 10)
Source         torch.nn.Linear, torch.nn.Flatten
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.data import as_tensors, open_images, source_line
from support.files import DATASET2, guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_linear"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    images = torch.arange(12.0).view(2, 1, 2, 3)  # 2 images of 1 channel, 2 rows, 3 columns
    x = images.flatten(1)  # (2, 6): each image a row; in a network: nn.Flatten()
    layer = nn.Linear(6, 2)  # 6 numbers in, 2 numbers out
    with torch.no_grad():  # weights that can be followed by eye
        layer.weight[:] = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
        layer.bias[:] = torch.tensor([0.5, 100])
    y = layer(x)  # (2, 2)
    print("1. How do I put a linear layer behind images? Weights 1 0 0 0 0 0 and 1 1 1 1 1 1")
    print("   x = images.flatten(1)     y = layer(x)   first pixel + 0.5   sum of pixels + 100")
    hand = torch.stack([images[:, 0, 0, 0] + 0.5, images.sum((1, 2, 3)) + 100], 1)
    for row, out, (first, total) in zip(x.tolist(), y.tolist(), hand, strict=True):
        numbers = " ".join(f"{number:2.0f}" for number in row)
        print(f"   {numbers}         {out[0]:4.1f} {out[1]:6.1f}   {first:17.1f}   {total:19.1f}")
    try:
        layer(images)
    except RuntimeError as error:
        print(f"   layer(images), not flattened: {error}")
    print(f"   -> y equals the sums by hand beside it, within {(y - hand).abs().max():g}")
    return y.tolist()


# --- 2. where a pixel goes ---------------------------------------------------------------------


def flat_index(c, h, w, H, W):
    """Where pixel (c, h, w) of an image (C, H, W) lies in its flattened row, counted from 0.

    The row holds channel after channel, of each channel row after row. Exercise.
    """
    return (c * H + h) * W + w


def show_places(images):
    print("2. Where do the neighbours of pixel (0, 0, 0) of an image (3, 32, 32) go in its row?")
    print("   neighbour       pixel (c, h, w)   place")
    places = []
    for name, pixel in (("next column", (0, 0, 1)), ("next row", (0, 1, 0)),
                        ("next channel", (1, 0, 0))):  # fmt: skip
        places.append(flat_index(*pixel, 32, 32))
        print(f"   {name:<12}    {pixel!s:<15} {places[-1]:7,}")
    c, h, w = torch.cartesian_prod(*map(torch.arange, (3, 32, 32))).unbind(1)  # all pixels: (3072,)
    right = (images.flatten(1)[:, flat_index(c, h, w, 32, 32)] == images[:, c, h, w]).all(0)
    print(f"   -> place (32 c + h) 32 + w is right for {right.sum():,} of {len(right):,} pixels")
    assert right.all()
    return places


# --- 3. by hand --------------------------------------------------------------------------------


def linear(x, weight, bias):
    """x weight^T + bias: (B, I) -> (B, O) for weight (O, I) and bias (O,). Exercise."""
    return x @ weight.T + bias


def show_by_hand(x):
    print("3. Is nn.Linear x @ weight.T + bias? Output 0 of 10, for the first three images")
    print("   image     nn.Linear   x @ weight.T + bias")
    layer = nn.Linear(3072, 10)
    with torch.no_grad():
        y, hand = layer(x), linear(x, layer.weight, layer.bias)
    for i in range(3):
        print(f"   {i:5}   {y[i, 0]:11.6f}   {hand[i, 0]:19.6f}")
    off, count = (y - hand).abs().max().item(), sum(p.numel() for p in layer.parameters())
    print(f"   -> the two differ by at most {off:.0e}, over all outputs of {len(x)} images. "
          f"nn.Linear(3072, 10) has\n      {count:,} parameters: 10 * 3072 weights and "
          f"{count - 10 * 3072} biases")  # fmt: skip
    assert off < 1e-5
    return layer, off


# --- 4. flatten from axis 1 --------------------------------------------------------------------


def feed(layer, batches, start_dim):
    """What the layer makes of each batch, flattened from axis `start_dim` on: a list of pairs.

    A pair is (len(batch), layer(flattened batch)), or (len(batch), the RuntimeError) where the
    layer refuses it; the batches after it are still fed. Exercise.
    """
    fed = []
    for batch in batches:
        try:
            fed.append((len(batch), layer(batch.flatten(start_dim))))
        except RuntimeError as error:
            fed.append((len(batch), error))
    return fed


def show_batches(images, batch_size):
    print(f"4. Flatten from which axis? {len(images)} images in batches of {batch_size}")
    print("   from axis   layer                   parameters   first and last batch -> output")
    batches, counts, outputs = images.split(batch_size), [], []
    for start_dim, layer in ((1, nn.Linear(3072, 10)), (0, nn.Linear(batch_size * 3072, 10))):
        counts.append(sum(p.numel() for p in layer.parameters()))
        outputs.append(feed(layer, batches, start_dim))
        name = f"nn.Linear({layer.in_features}, {layer.out_features})"
        ends = []
        for n, output in (outputs[-1][0], outputs[-1][-1]):
            shape = "refused" if isinstance(output, RuntimeError) else tuple(output.shape)
            ends.append(f"{n} -> {shape}")
        print(f"   {start_dim:9}   {name:<22} {counts[-1]:11,}   {', '.join(ends)}")
    refused = [n for n, output in outputs[1] if isinstance(output, RuntimeError)]
    if refused:
        print(f"   refused: {outputs[1][-1][1]}")
    print(f"   -> from axis 0 there are {counts[1] / counts[0]:.0f} times the parameters, and "
          f"{len(refused)} of {len(batches)} batches refused")  # fmt: skip
    return outputs


# --- 5. shuffled pixels ------------------------------------------------------------------------


def train(layer, x, targets, steps, lr=0.1):
    """The loop of 02_autograd_basics.py on all rows of x (N, I) at once. Returns the losses.

    `steps` steps of torch.optim.SGD on F.mse_loss(layer(x), targets), targets (N, O); the losses
    are a list of floats, each taken before its step. Exercise.
    """
    optimizer = torch.optim.SGD(layer.parameters(), lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), targets)  # the mean of (layer(x) - targets)^2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def draw(log_dir, losses, x, added, classes):
    """The losses; as pictures x (1, 3072) and what training added to the weight (10, 3072)."""
    added = 0.5 + added / added.abs().amax(1, keepdim=True) / 2  # 0 becomes 0.5, mid-grey
    pictures = {
        "input": ("The first image as the layer gets it", x + 0.5, ["x"]),
        "templates": ("What training added to the weights: a pixel that is bright here, and bright "
                      "in x, raises this class's number", added[:5], classes[:5]),
    }  # fmt: skip
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, loss in enumerate(losses):
            writer.add_scalar("train/loss", loss, step)
        for name, (title, rows, words) in pictures.items():
            row = caption_row(title, rows.view(-1, 3, 32, 32), words, height=160)
            writer.add_image(f"linear/{name}", row, 0)


def show_shuffled(log_dir, layer, x, labels, classes, steps):
    print(f"5. What if all images are shuffled in one way? Mean square error, {steps} steps")
    print("   run        pixels     columns of     first      last       largest difference from")
    print("                         the weight     loss       loss       the losses of in_order")
    targets = F.one_hot(labels, 10).float()  # (N, 10): 1 at the true class, 0 elsewhere
    order = torch.randperm(3072)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    moved = start | {"weight": start["weight"][:, order]}
    losses, weights, off = {}, {}, {}
    for run, rows, state, pixels, columns in (
        ("in_order", x, start, "in order", "in order"),
        ("shuffled", x[:, order], moved, "shuffled", "shuffled"),
        ("(control)", x[:, order], start, "shuffled", "in order"),
    ):
        layer.load_state_dict(state)
        losses[run] = train(layer, rows, targets, steps)
        weights[run] = layer.weight.detach().clone()
        pairs = zip(losses[run], losses["in_order"], strict=True)
        off[run] = max(abs(a - b) for a, b in pairs)
        print(f"   {run:<10} {pixels:<10} {columns:<12}   {losses[run][0]:.6f}   "
              f"{losses[run][-1]:.6f}   {f'{off[run]:.0e}' if off[run] else '0':>23}")  # fmt: skip
        if run != "(control)":
            draw(log_dir / run, losses[run], rows[:1], weights[run] - state["weight"], classes)
    apart = (weights["shuffled"] - weights["in_order"][:, order]).abs().max().item()
    print(f"   -> with columns shuffled alike, the losses differ by {off['shuffled']:.0e}, weights "
          f"by {apart:.0e}. With columns\n      in order it is another start, and it ends at "
          f"{losses['(control)'][-1]:.4f} instead of {losses['in_order'][-1]:.4f}")  # fmt: skip
    assert off["shuffled"] < 1e-6 and apart < 1e-5
    return {"losses": losses, "weights": weights, "start": start["weight"], "order": order}


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=500, batch_size=64, steps=40):
    torch.manual_seed(seed)
    dataset = open_images(root, train=False)
    print(source_line(dataset))
    images, labels = (t[:count] for t in as_tensors(dataset))
    images = images / 255 - 0.5  # (N, 3, 32, 32), from -0.5 to 0.5
    x = images.flatten(1)  # (N, 3072)
    measured = {"everyday": show_everyday(), "places": show_places(images)}
    layer, measured["off"] = show_by_hand(x)
    measured["outputs"], measured["batch_flattened"] = show_batches(images, batch_size)
    measured |= show_shuffled(log_dir, layer, x, labels, dataset.classes, steps)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
