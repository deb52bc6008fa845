"""Of six common layers only BatchNorm2d and Dropout compute something else in eval mode.

    BatchNorm2d   (x - mean) / sqrt(var + eps) * weight + bias, by channel, all four (C,)
                  train: mean and var of the batch over (B, H, W); eval: the running ones,
                  running <- (1 - m) running + m batch, from 0 and 1, var divided by n - 1
    Dropout(p)    train: x keep / (1 - p), keep ~ Bernoulli(1 - p), so that E y = x; eval: x
    AvgPool2d(k)  the mean of each window: a convolution with weights 1 / k^2
    AdaptiveAvgPool2d(n)  window i of n on an axis of H: floor(i H / n) up to ceil((i + 1) H / n)
    Flatten       (B, C, H, W) -> (B, C H W), the same numbers in the same order
    Embedding     weight[i] = one_hot(i) @ weight; row v's gradient sums over the places of token v

Left in train mode, a network answers an image by the company it comes in. Put into eval mode after
few batches, it uses running statistics that are still near their start.

Checked here   each law against its layer; the two modes of each layer against each other
TensorBoard    batchnorm/running_mean and eval_minus_train by batch, runs momentum_0.1 and 0.5;
               dropout/mean and share_kept by number of masks, runs p_0.2, 0.5, 0.8: all means to 1
Try            Dropout(0.5) twice, on ones: which mean and variance? 1 as before, and 3 for 1
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


# --- BatchNorm2d -----------------------------------------------------------------------------


def batch_norm(x, mean, var, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias, channel by channel.

    x is (B, C, H, W), the result as well; mean, var, weight and bias are (C,). Exercise.
    """
    mean, var, weight, bias = (t.view(-1, 1, 1) for t in (mean, var, weight, bias))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def running_statistic(start, batch, momentum, t):
    """A running mean or variance after t batches that all have the same one.

    Each batch moves it: running <- (1 - momentum) running + momentum batch, from `start` on.
    Without a loop: (1 - momentum)^t of the start is left. Exercise.
    """
    left = (1 - momentum) ** t
    return left * start + (1 - left) * batch


def company_difference(norm, x):
    """How much the first half of x (B, C, H, W) changes when the second half is left out."""
    n = len(x) // 2
    return (norm(x[:n]) - norm(x)[:n]).abs().max().item()


def in_columns(numbers):
    return " ".join(f"{number:z5.2f}" for number in numbers.tolist())


def show_batch_norm(x):
    print("1. BatchNorm2d in train mode: the channels before and after")
    norm, axes = nn.BatchNorm2d(3), (0, 2, 3)
    y = norm(x)
    mean, var = x.mean(axes), x.var(axes, correction=0)  # (C,)
    torch.testing.assert_close(y, batch_norm(x, mean, var, norm.weight, norm.bias))
    for name, z in {"x": x, "y": y}.items():
        print(f"   {name}   mean {in_columns(z.mean(axes))}   std {in_columns(z.std(axes))}")
    company = {
        "train": company_difference(norm.train(), x),
        "eval": company_difference(norm.eval(), x),
    }
    torch.testing.assert_close(
        norm(x), batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    print("   an image's change when half of its batch is left out: "
          f"train {company['train']:.2f}   eval {company['eval']:.0e}")  # fmt: skip
    return company


def show_running_mean(x, momentum, batches, log_dir):
    """Train a fresh layer on x again and again. Largest |eval - train| after each time."""
    norm, rows = nn.BatchNorm2d(3, momentum=momentum), []
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))  # var divided by n - 1
    with SummaryWriter(log_dir / f"momentum_{momentum}", purge_step=0) as writer:
        for t in range(1, batches + 1):
            y = norm.train()(x)
            expected = running_statistic(0, mean, momentum, t)
            torch.testing.assert_close(norm.running_mean, expected, rtol=1e-5, atol=1e-5)
            expected_var = running_statistic(1, var, momentum, t)
            torch.testing.assert_close(norm.running_var, expected_var, rtol=1e-5, atol=1e-5)
            off = (norm.eval()(x) - y).abs().max().item()
            writer.add_scalar("batchnorm/running_mean", norm.running_mean[0], t)
            writer.add_scalar("batchnorm/eval_minus_train", off, t)
            rows.append((norm.running_mean[0].item(), expected[0].item(), off))
    for t in (1, batches // 4, batches):
        running, theory, off = rows[t - 1]
        print(f"   momentum {momentum}   t {t:2d}   measured {running:.3f}   theory {theory:.3f}   "
              f"|eval - train| {off:6.3f}")  # fmt: skip
    return [off for _, _, off in rows]


# --- Dropout ---------------------------------------------------------------------------------


def dropout(x, p):
    """x with each number set to 0 with probability p, the others divided by 1 - p. Exercise."""
    keep = torch.rand_like(x) >= p
    return x * keep / (1 - p)


def show_dropout(p, masks, log_dir):
    """Mean and variance of what the layer, and `dropout`, make of a 1, over so many masks."""
    layer, ones = nn.Dropout(p), torch.ones(masks)
    drawn = {"layer": layer(ones), "by hand": dropout(ones, p)}
    for name, y in drawn.items():
        torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / (1 - p)]))
        print(f"   p {p}   {name:<8} mean {y.mean():.3f}   theory 1.000   "
              f"variance {y.var():.3f}   theory {p / (1 - p):.3f}")  # fmt: skip
    assert torch.equal(layer.eval()(ones), ones)
    with SummaryWriter(log_dir / f"p_{p}", purge_step=0) as writer:
        for n in range(20, 2001, 20):
            first = drawn["layer"][:n]
            writer.add_scalar("dropout/mean", first.mean(), n)
            writer.add_scalar("dropout/share_kept", (first != 0).float().mean(), n)
    return {name: (y.mean().item(), y.var().item()) for name, y in drawn.items()}


# --- pooling, Flatten, Embedding -------------------------------------------------------------


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


def embed(tokens, weight):
    """Tokens of any shape (…) in 0..V-1 -> (…, D): rows of weight (V, D), as a one-hot product.

    A token outside 0..V-1 is an error (F.one_hot raises it). Exercise.
    """
    return F.one_hot(tokens, len(weight)).to(weight.dtype) @ weight


def show_pooling(x):
    print("4. AvgPool2d(3, stride=2), AdaptiveAvgPool2d(3), Flatten")
    y = nn.AvgPool2d(3, stride=2)(x)
    convolved = F.conv2d(x, torch.full((3, 1, 3, 3), 1 / 9), stride=2, groups=3)
    torch.testing.assert_close(y, average_pool(x, 3, 2))
    torch.testing.assert_close(y, convolved)
    off = (y - convolved).abs().max()
    print(f"   average    {tuple(x.shape)} -> {tuple(y.shape)}   off from a convolution {off:.0e}")
    adaptive = nn.AdaptiveAvgPool2d(3)
    for size in ((8, 8), (5, 11), (2, 3)):
        z = torch.randn(2, 3, *size)
        torch.testing.assert_close(adaptive(z), adaptive_average_pool(z, 3))
    line = adaptive(torch.arange(5.0).expand(1, 1, 3, 5))[0, 0, 0].tolist()
    print(f"   adaptive   0 1 2 3 4 -> {line}   windows {windows(5, 3)}")
    rows = nn.Flatten()(x)
    assert torch.equal(rows.view_as(x), x)
    off = (rows.view_as(x) - x).abs().max()
    print(f"   flatten    {tuple(x.shape)} -> {tuple(rows.shape)}   and back, off by {off:g}")
    return line


def show_embedding(tokens):
    print(f"5. Embedding(6, 4) of tokens {tokens.tolist()}: gradient of the output's sum by row")
    gradients = {}
    for padding_idx in (None, 5):
        layer = nn.Embedding(6, 4, padding_idx=padding_idx)
        y = layer(tokens)  # (T,) -> (T, 4)
        torch.testing.assert_close(y, embed(tokens, layer.weight))
        y.sum().backward()
        gradients[padding_idx] = layer.weight.grad[:, 0].int().tolist()
        print(f"   padding_idx {padding_idx!s:<4}   {gradients[padding_idx]}")
    print(f"   count of the token {tokens.bincount(minlength=6).tolist()}")
    return gradients


def mode_difference(layer, x):
    """Largest difference between what a layer gives in train and in eval mode."""
    return (layer.train()(x) - layer.eval()(x)).abs().max().item()


def main(seed=0, log_dir=LOG_DIR, batches=40, masks=100_000):
    torch.manual_seed(seed)
    centre, spread = torch.tensor([[5.0, -2, 0], [3, 0.5, 1]]).view(2, 3, 1, 1)
    x = centre + spread * torch.randn(16, 3, 8, 8)  # (B, C, H, W), each channel at its own scale
    company = show_batch_norm(x)

    print("2. BatchNorm2d after t times the same batch: running mean of channel 0")
    behind = {m: show_running_mean(x, m, batches, log_dir) for m in (0.1, 0.5)}

    print(f"3. Dropout of a 1, over {masks:,} masks")
    dropped = {p: show_dropout(p, masks, log_dir) for p in (0.2, 0.5, 0.8)}

    adaptive = show_pooling(x)
    tokens = torch.tensor([1, 5, 1, 3, 5, 1])
    gradients = show_embedding(tokens)

    print("6. train against eval mode: largest difference")
    layers = (nn.BatchNorm2d(3), nn.Dropout(0.5), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3),
              nn.Flatten(), nn.Embedding(6, 4))  # fmt: skip
    modes = {}
    for layer in layers:
        name = type(layer).__name__
        modes[name] = mode_difference(layer, tokens if name == "Embedding" else x)
        print(f"   {name:<18} {modes[name]:6.3f}")
    return {
        "company": company,
        "behind": behind,
        "dropped": dropped,
        "adaptive": adaptive,
        "gradients": gradients,
        "modes": modes,
    }


if __name__ == "__main__":
    guard(main)
