"""Of six common layers only BatchNorm2d and Dropout compute something else in eval mode.

Call net.eval() before you predict and net.train() before you train on. In train mode BatchNorm2d
uses mean and variance of the batch, so an image gets another answer beside other images. In eval
mode it uses running averages of what it met in training, which start at mean 0 and variance 1.

    BatchNorm2d(C)   y = (x - mean) / sqrt(var + eps) * weight + bias, for each channel by itself
                     train: mean and var of the batch, over its images, rows and columns
                     eval: running ones; a batch moves them: running <- (1 - m) running + m batch
    Dropout(p)       train: 0 with probability p, else x / (1 - p), so that the mean stays; eval: x
    AvgPool2d(k)     the mean of each window of k by k pixels
    AdaptiveAvgPool2d(n)   n by n means, whatever the size of the image
    Flatten          (B, C, H, W) -> (B, C H W)
    Embedding(V, D)  a table of V rows of D numbers; token i, the number of a word, becomes row i

    m  momentum, here 0.1     eps  1e-5     weight, bias  learned; at the start 1 and 0
    var  the sum of (number - mean)^2 over the N numbers of a channel, divided by N; but what a
         batch gives to the running var is divided by N - 1

Needs          nn_conv2d.py, nn_maxpool.py
Checked here   by hand: both modes of BatchNorm2d, Dropout's mean and variance, pooling, Embedding
TensorBoard    batchnorm/running_mean and eval_minus_train by batch, in the runs momentum_0.1, 0.5:
               one goes to 5, the other near 0; dropout/mean and share_kept by number of
               masks, in the runs p_0.2, 0.5, 0.8: all means go to 1, the shares to 1 - p
Try            in show_dropout, put nn.Sequential(nn.Dropout(p), nn.Dropout(p)) for nn.Dropout(p):
               which mean and variance do the rows of the layer show?
Answer         Mean 1 as before; at p = 0.5 variance 3, not 1, as 1 of 4 is left, 4 times as large
Source         Ioffe & Szegedy 2015, arXiv:1502.03167; Srivastava et al. 2014, JMLR 15
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_common_layers"


# --- 1. in everyday code -----------------------------------------------------------------------


def in_columns(numbers):
    return " ".join(f"{number:z5.2f}" for number in numbers.flatten().tolist())


def show_everyday():
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]]).view(1, 1, 2, 2)  # one image, one channel, 2 x 2
    tokens = torch.tensor([2, 0])
    print("1. What do six layers make of the pixels 1 1 / 3 3 (Embedding: of the tokens 2 and 0)?")
    print("   layer                after .train()            after .eval()      largest difference")
    modes = {}
    for layer in (nn.BatchNorm2d(1), nn.Dropout(0.5), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1),
                  nn.Flatten(), nn.Embedding(3, 2)):  # fmt: skip
        given = tokens if isinstance(layer, nn.Embedding) else x
        trained, evaluated = layer.train()(given), layer.eval()(given)
        name = type(layer).__name__
        modes[name] = (trained - evaluated).abs().max().item()
        print(f"   {name:<18}   {in_columns(trained):<23}   {in_columns(evaluated):<23}   "
              f"{modes[name]:11.2f}")  # fmt: skip
    switched = [name for name, difference in modes.items() if difference]
    print(f"   -> train() and eval() matter to {' and '.join(switched)}: before you predict,")
    print("      call net.eval(). (BatchNorm2d has met one batch: its averages lag, section 4)")
    return modes


# --- 2. where they stand -----------------------------------------------------------------------


def show_network():
    net = nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False),  # the norm behind it has a bias
        nn.BatchNorm2d(8),  # behind a convolution, before its activation
        nn.ReLU(),
        nn.AvgPool2d(2),  # fewer pixels for what follows
        nn.AdaptiveAvgPool2d(1),  # one number per channel, for images of any size
        nn.Flatten(),  # each image becomes a row
        nn.Dropout(0.5),  # before a linear layer
        nn.Linear(8, 10),
    )
    x = torch.randn(2, 3, 32, 32)
    sizes = [tuple(net(images).shape) for images in (x, torch.randn(2, 3, 20, 50))]
    print(f"2. Where do they stand in a network? Shapes for images {tuple(x.shape)}")
    print("   layer               output           parameters")
    for layer in net:
        x = layer(x)
        count = sum(p.numel() for p in layer.parameters())
        print(f"   {type(layer).__name__:<18}  {tuple(x.shape)!s:<15}  {count:10}")
    y = nn.Embedding(6, 4)(torch.tensor([[1, 5, 1], [0, 2, 2]]))  # the first layer for text
    print(f"   Embedding(6, 4), the first layer for text: tokens (2, 3) -> {tuple(y.shape)}")
    print(f"   -> images of 32 x 32 pixels give {sizes[0]}, of 20 x 50 {sizes[1]}, as "
          "AdaptiveAvgPool2d(1)\n      leaves one number per channel")  # fmt: skip
    return sizes


# --- 3. BatchNorm2d ----------------------------------------------------------------------------


def batch_norm(x, mean, var, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias, channel by channel.

    x is (B, C, H, W), the result as well; mean, var, weight and bias are (C,). Exercise.
    """
    mean, var, weight, bias = (t.view(-1, 1, 1) for t in (mean, var, weight, bias))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def show_batch_norm(x):
    print(f"3. What does BatchNorm2d do to the three channels of {len(x)} images?")
    print("             mean of each channel   deviation of each channel")
    norm, axes = nn.BatchNorm2d(3), (0, 2, 3)
    y = norm(x)  # train mode, as every new layer
    mean, var = x.mean(axes), x.var(axes, correction=0)  # over B, H, W: (C,) each
    hand = batch_norm(x, mean, var, norm.weight, norm.bias)
    for name, z in (("before", x), ("after", y), ("by hand", hand)):
        print(f"   {name:<7} {in_columns(z.mean(axes)):>22}   {in_columns(z.std(axes)):>25}")
    half, company = len(x) // 2, {}
    for mode in ("train", "eval"):
        norm.train(mode == "train")
        company[mode] = (norm(x[:half]) - norm(x)[:half]).abs().max().item()
    running = batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    off = max((y - hand).abs().max().item(), (norm(x) - running).abs().max().item())
    print(f"   -> by hand the same within {off:.1g} in both modes. Without half of the batch")
    print(f"      an image's outputs change by up to {company['train']:.2f} in train mode, "
          f"{company['eval']:.2g} in eval mode")  # fmt: skip
    assert off < 1e-4
    return company


# --- 4. running averages -----------------------------------------------------------------------


def running_statistic(start, batch, momentum, t):
    """A running mean or variance after t batches that all have the same one.

    Each batch moves it: running <- (1 - momentum) running + momentum batch, from `start` on.
    Without a loop: (1 - momentum)^t of the start is left. Exercise.
    """
    left = (1 - momentum) ** t
    return left * start + (1 - left) * batch


def show_running(x, batches, log_dir):
    print("4. How far is eval mode behind after t times the same batch? Channel 0")
    print("   momentum    t   running mean   (1 - (1 - m)^t) mean   largest |eval - train|")
    behind, off, mean = {}, 0, x.mean((0, 2, 3))
    for momentum in (0.1, 0.5):
        norm, behind[momentum] = nn.BatchNorm2d(3, momentum=momentum), []
        with SummaryWriter(log_dir / f"momentum_{momentum}", purge_step=0) as writer:
            for t in range(1, batches + 1):
                y = norm.train()(x)
                law = running_statistic(0, mean, momentum, t)
                off = max(off, (norm.running_mean - law).abs().max().item())
                behind[momentum].append((norm.eval()(x) - y)[:, 0].abs().max().item())
                writer.add_scalar("batchnorm/running_mean", norm.running_mean[0], t)
                writer.add_scalar("batchnorm/eval_minus_train", behind[momentum][-1], t)
                if t in (1, batches // 4, batches):
                    print(f"   {momentum:<8} {t:4}   {norm.running_mean[0]:12.3f}   {law[0]:20.3f}"
                          f"   {behind[momentum][-1]:22.3f}")  # fmt: skip
    t, slow = batches // 4, behind[0.1][batches // 4 - 1]
    print(f"   -> after {t} batches (momentum 0.1) outputs in eval mode are off by {slow:.2f}.")
    print(f"      The formula holds within {off:.1g}")
    assert off < 1e-4
    return behind


# --- 5. Dropout --------------------------------------------------------------------------------


def dropout(x, p):
    """x with each number set to 0 with probability p, the others divided by 1 - p. Exercise."""
    keep = torch.rand_like(x) >= p
    return x * keep / (1 - p)


def show_dropout(masks, log_dir):
    print(f"5. What does Dropout(p) make of a 1, drawn {masks:,} times?")
    print("   p               values          mean   variance   its formula p / (1 - p)")
    ones, dropped = torch.ones(masks), {}
    for p in (0.2, 0.5, 0.8):
        layer = nn.Dropout(p)
        drawn = {"layer": layer(ones), "by hand": dropout(ones, p)}
        for name, y in drawn.items():
            values = " and ".join(f"{value:g}" for value in y.unique().tolist())
            dropped[p, name] = y.mean().item(), y.var().item()
            print(f"   {p}   {name:<9} {values:<12} {y.mean():7.3f}   {y.var():8.3f}   "
                  f"{p / (1 - p):23.3f}")  # fmt: skip
        with SummaryWriter(log_dir / f"p_{p}", purge_step=0) as writer:
            for n in range(20, 2001, 20):
                first = drawn["layer"][:n]
                writer.add_scalar("dropout/mean", first.mean(), n)
                writer.add_scalar("dropout/share_kept", (first != 0).float().mean(), n)
    off = max(abs(mean - 1) for mean, _ in dropped.values())
    chance, zeros = (p / (1 - p) / masks) ** 0.5, (y == 0).float().mean()
    print(f"   -> each mean is 1 within {off:.3f} (at p = 0.8 its deviation is {chance:.3f}),")
    print(f"      though {zeros:.0%} of the ones become 0 there")
    return dropped


# --- 6. pooling --------------------------------------------------------------------------------


def average_pool(x, k, stride):
    """(B, C, H, W) -> (B, C, H', W'), H' = (H - k) // stride + 1: the mean of each k by k window.

    Tensor.unfold(axis, k, stride) gives the windows along one axis. Exercise.
    """
    return x.unfold(2, k, stride).unfold(3, k, stride).mean((-2, -1))


def windows(size, n):
    """The n windows (start, stop) of AdaptiveAvgPool2d(n) on an axis of length `size`, a list.

    Window i is from floor(i size / n) up to, not with, ceil((i + 1) size / n). Exercise.
    """
    return [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]


def adaptive_average_pool(x, n):
    """(B, C, H, W) -> (B, C, n, n), whatever H and W: means over windows(H, n), windows(W, n).

    Exercise.
    """
    x = torch.stack([x[:, :, a:b].mean(2) for a, b in windows(x.shape[2], n)], 2)
    return torch.stack([x[..., a:b].mean(3) for a, b in windows(x.shape[3], n)], 3)


def show_pooling():
    print("6. Which windows do two pooling layers take of a row 0 1 2 3 4?")
    print("   layer                  windows       means                by hand")
    x, means = torch.arange(5.0).expand(1, 1, 3, 5), {}  # an image of three such rows
    shown = " ".join(f"{a}-{b - 1}" for a, b in windows(5, 3))
    for name, layer, hand, where in (
        ("AvgPool2d(2)", nn.AvgPool2d(2), average_pool(x, 2, 2), "0-1 2-3"),
        ("AdaptiveAvgPool2d(3)", nn.AdaptiveAvgPool2d(3), adaptive_average_pool(x, 3), shown),
    ):
        y, row = layer(x)[0, 0, 0], hand[0, 0, 0]
        means[name] = y.tolist(), row.tolist()
        print(f"   {name:<22} {where:<12} {in_columns(y):<17}   {in_columns(row)}")
    off = max(abs(a - b) for pair in means.values() for a, b in zip(*pair, strict=True))
    print("   -> AvgPool2d(2) leaves out the 4, as 2 does not divide 5; adaptive windows leave out")
    print(f"      nothing, they overlap. By hand the same within {off:.1g}")
    assert off < 1e-5
    return means


# --- 7. Embedding ------------------------------------------------------------------------------


def embed(tokens, weight):
    """Tokens of any shape (...) in 0..V-1 -> (..., D): rows of weight (V, D), as a one-hot product.

    A token outside 0..V-1 is an error (F.one_hot raises it). Exercise.
    """
    return F.one_hot(tokens, len(weight)).to(weight.dtype) @ weight


def show_embedding(tokens):
    print(f"7. Which rows of an Embedding(6, 4) learn from the tokens {tokens.tolist()}?")
    print(f"   {'row':<38}   0   1   2   3   4   5")
    rows, off = {"how often the token is there": tokens.bincount(minlength=6).tolist()}, 0
    for padding_idx in (None, 5):
        layer = nn.Embedding(6, 4, padding_idx=padding_idx)
        y = layer(tokens)  # (T,) -> (T, 4)
        off = max(off, (y - embed(tokens, layer.weight)).abs().max().item())
        y.sum().backward()
        rows[f"its gradient, padding_idx={padding_idx}"] = layer.weight.grad[:, 0].int().tolist()
    for name, row in rows.items():
        print(f"   {name:<38}" + "".join(f"{number:4}" for number in row))
    frozen = [token for token in tokens.unique().tolist() if not row[token]]
    print(f"   -> padding_idx=5 is for a token that fills up short texts: gradient 0 for {frozen}")
    print(f"      The output is one_hot(tokens) @ weight within {off:.1g}")
    assert off < 1e-6
    return rows


def main(seed=0, log_dir=LOG_DIR, batches=40, masks=100_000):
    torch.manual_seed(seed)
    centre, spread = torch.tensor([[5.0, -2, 0], [3, 0.5, 1]]).view(2, 3, 1, 1)
    x = centre + spread * torch.randn(16, 3, 8, 8)  # (B, C, H, W), each channel at its own scale
    measured = {"modes": show_everyday(), "sizes": show_network()}
    measured |= {"company": show_batch_norm(x), "behind": show_running(x, batches, log_dir)}
    measured |= {"dropped": show_dropout(masks, log_dir), "means": show_pooling()}
    measured["rows"] = show_embedding(torch.tensor([1, 5, 1, 3, 5, 1]))
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
