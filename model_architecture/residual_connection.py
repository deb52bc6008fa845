"""Skips keep a deep network's gradient from vanishing; unless scaled, they make it explode.

    h' = h + f(h)     dL/dh = dL/dh' + J_f^T dL/dh'     f(h) = W relu(h), Var W = v / n

                                      E|dL/dh_0|^2 / E|dL/dh_L|^2     share of the skips alone
    plain      h' = f(h)              (v / 2)^L                       0
    residual   h' = h + a f(h)        (1 + a^2)^L                     (1 + a^2)^-L
    pre-norm   h' = h + f(norm(h))    L + 1                           1 / (L + 1)
    post-norm  h' = norm(h + f(h))    1                               2^-L

in wide networks with He's v = 2, except in the first line. Without skips the gradient vanishes
under nn.Linear's v = 1/3 and keeps its size under v = 2; with them and a = 1 every block doubles
its square, with a^2 = 1 / L all together make it at most e times as large. Size is not all: the
skips of a post-norm network alone bring as good as nothing down to its first layer. Branches that
end in a zero weight make blocks the identity: all get the same gradient, at the start.

Checked here   RMSNorm = nn.RMSNorm and BasicBlock = torchvision's, with gradients and running
               statistics; zero-initialised blocks are their shortcut, bit for bit; the table;
               BasicBlocks trained without skips, with them, and with branches that start at zero;
               Post-LN and Pre-LN at the start; at a rate that Pre-LN takes at once, Post-LN stays
               at chance, and learns with a warm-up or at a tenth of the rate
TensorBoard    depth/log2_gradient by layer in net/…, a run for each line of the table;
               stack/log2_gradient by block and stack/loss by step (chance 1.386) in stack/…;
               start/log2_gradient_32_blocks by block in start/…; transformer/loss by step (chance
               2.079) in transformer/…
Try            a^2 = 4 / L: by how much can |dL/dh_0|^2 grow now? By e^4, for any L
Source         He et al. 2015, arXiv:1512.03385; Zhang & Sennrich 2019, arXiv:1910.07467 (RMSNorm);
               Goyal et al. 2017, arXiv:1706.02677, section 5.1 (zero weights); De & Smith 2020,
               arXiv:2002.10444 (pre-norm); Xiong et al. 2020, arXiv:2002.04745 (Post-LN, Pre-LN)
"""

import argparse
import math
import os
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

RUNS = Path(__file__).resolve().parents[1] / "runs"
LOG_DIR = RUNS / "model_architecture" / "residual_connection"
F64 = torch.float64
CLASSES = 4  # directions of a grating
VOCABULARY, LENGTH = 8, 6  # of a sequence


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


# --- blocks ------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last dimensions, which are `normalized_shape`.

    Computed in float32 at least, returned in x's dtype; eps defaults to the computation's own.
    """

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True):
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        self.normalized_shape, self.eps = tuple(shape), eps
        weight = nn.Parameter(torch.ones(self.normalized_shape)) if elementwise_affine else None
        self.register_parameter("weight", weight)

    def forward(self, x):
        """x / sqrt(mean x^2 + eps) * weight over the last dimensions, which are normalized_shape.

        In float32 at least, back in x's dtype; without an eps it is torch.finfo's of that
        computation, and weight may be None. ValueError "x must end in (shape), not be (shape)".
        Exercise.
        """
        D = len(self.normalized_shape)
        if x.shape[-D:] != self.normalized_shape:  # (…, 1) would broadcast against the weight
            raise ValueError(f"x must end in {self.normalized_shape}, not be {tuple(x.shape)}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        y = wide * torch.rsqrt(wide.square().mean(tuple(range(-D, 0)), keepdim=True) + eps)
        return (y if self.weight is None else y * self.weight).to(x.dtype)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x): (B, C, H, W) -> (B, C', H', W').

    The shortcut is x itself, or a 1x1 convolution with BatchNorm where the shape changes. With
    zero_init_residual the block starts as relu(shortcut x): for x >= 0 the identity.
    """

    def __init__(self, in_channels, out_channels, stride=1, skip=True, zero_init_residual=False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.skip, self.downsample = skip, None
        if skip and (stride != 1 or in_channels != out_channels):
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        if zero_init_residual:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        """relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x).

        The shortcut is x, or self.downsample(x) if there is one; nothing is added if not self.skip.
        Exercise.
        """
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        if self.skip:
            out = out + (x if self.downsample is None else self.downsample(x))
        return out.relu()


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each with a skip: (B, T, C) -> (B, T, C).

    Pre-LN (norm_first) keeps the sum as it is; Post-LN normalises it.
    """

    def __init__(self, d_model, nhead, dim_feedforward, norm_first):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.norm_first = norm_first

    def attend(self, x):
        return self.self_attn(x, x, x, need_weights=False)[0]

    def feed_forward(self, x):
        return self.linear2(self.linear1(x).relu())

    def forward(self, x):
        """self.attend, then self.feed_forward, each with its norm (norm1, norm2) and a skip.

        Pre-LN (norm_first): x + branch(norm(x)); Post-LN: norm(x + branch(x)). Exercise.
        """
        for norm, branch in ((self.norm1, self.attend), (self.norm2, self.feed_forward)):
            x = x + branch(norm(x)) if self.norm_first else norm(x + branch(x))
        return x


# --- 1, 2: the library's twins, the identity -----------------------------------------------------


def largest_difference(ours, theirs, x):
    """Give both the same weights: largest difference of outputs, gradients and buffers."""
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        grads = torch.autograd.grad((y**3).sum(), (leaf, *module.parameters()))
        results.append((y.detach(), *grads, *module.buffers()))
    torch.testing.assert_close(*results)
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def norm(h):
    return RMSNorm(h.size(-1), elementwise_affine=False)(h)


def show_twins():
    from torchvision.models import resnet  # takes 3 s, so only here

    print("1. ours and the library's: largest difference of outputs, gradients, statistics")
    x = 3 + torch.randn(5, 7, 48, dtype=F64)
    off = largest_difference(RMSNorm(48).double(), nn.RMSNorm(48).double(), x)
    print(f"   RMSNorm           {off:.0e}")
    block = BasicBlock(6, 10, stride=2).double()
    shortcut = nn.Sequential(resnet.conv1x1(6, 10, 2), nn.BatchNorm2d(10))
    twin = resnet.BasicBlock(6, 10, 2, shortcut).double()
    images = torch.randn(4, 6, 9, 11, dtype=F64)
    for mode in (True, False):  # training first: it moves the running statistics
        off = largest_difference(block.train(mode), twin.train(mode), images)
        print(f"   BasicBlock, {'train' if mode else 'eval '}  {off:.0e}")


def show_identity():
    print("2. blocks that start as their shortcut: largest difference of the output")
    x = torch.randn(4, 6, 9, 9).relu()
    blocks = (BasicBlock(6, 6, zero_init_residual=True) for _ in range(10))
    straight = (nn.Sequential(*blocks)(x) - x).abs().max().item()
    block = BasicBlock(6, 10, stride=2, zero_init_residual=True)
    y = block(x)
    down = (y - block.downsample(x).relu()).abs().max().item()
    assert straight == down == 0
    print(f"   ten in a row {straight:g}   one with a downsample {down:g}")
    (y**2).sum().backward()
    branch = [(n, p) for n, p in block.named_parameters() if "downsample" not in n]
    learning = [name for name, p in branch if p.grad.count_nonzero()]
    print("   a gradient in the branch, at the first step:", ", ".join(learning))
    return learning


# --- 3: the gradient by depth --------------------------------------------------------------------

NETS = {  # v, h', and in theory the size and the share of the table
    "plain_default": (1 / 3, lambda h, f, L: f(h), lambda L: 6.0**-L, lambda L: 0),
    "plain_he": (2, lambda h, f, L: f(h), lambda L: 1, lambda L: 0),
    "residual": (2, lambda h, f, L: h + f(h), lambda L: 2.0**L, lambda L: 2.0**-L),
    "residual_scaled": (2, lambda h, f, L: h + L**-0.5 * f(h),
                        lambda L: (1 + 1 / L) ** L, lambda L: (1 + 1 / L) ** -L),
    "pre_norm": (2, lambda h, f, L: h + f(norm(h)), lambda L: L + 1, lambda L: 1 / (L + 1)),
    "post_norm": (2, lambda h, f, L: norm(h + f(h)), lambda L: 1, lambda L: 2.0**-L),
}  # fmt: skip


def gradients_by_depth(variance, step, width, depth, batch=32):
    """dL/dh_l (B, n) for l = 0 … L, of a loss <r, h_L> with a random r.

    Not of h_L.sum(): behind a LayerNorm the sum is 0, and so is its gradient, whatever h is.
    """
    states = [norm(torch.randn(batch, width)).requires_grad_()]
    for _ in range(depth):
        W = torch.randn(width, width) * math.sqrt(variance / width)
        states.append(step(states[-1], lambda h, W=W: h.relu() @ W.T, depth))  # (B, n)
    return torch.autograd.grad((torch.randn(batch, width) * states[-1]).sum(), states)


def show_depth(log_dir, width, depth):
    print(f"3. {depth} layers of {width}: log2 |dL/dh_0| / |dL/dh_L|; share of the skips alone")
    measured = {}
    for name, (variance, step, size, share) in NETS.items():
        g = gradients_by_depth(variance, step, width, depth)
        log2 = [(g_l.norm() / g[-1].norm()).log2().item() for g_l in g]
        # dL/dh_0 is dL/dh_L, scaled by the skips, and what the branches add, orthogonal to it
        cosine = F.cosine_similarity(g[0].flatten(), g[-1].flatten(), dim=0).item()
        draw(log_dir / "net" / name, {"depth/log2_gradient": log2})
        print(f"   {name:<16} measured {log2[0]:+6.1f}   theory {math.log2(size(depth)) / 2:+6.1f}"
              f"   share {cosine**2:.3f}   theory {share(depth):.3f}")  # fmt: skip
        measured[name] = {"log2": log2, "share": cosine**2}
    return measured


# --- 4: blocks trained ---------------------------------------------------------------------------

STACKS = {"plain": {"skip": False}, "skip": {}, "from_zero": {"zero_init_residual": True}}


def stack(blocks, channels=8, **options):
    """A stem of three layers, the BasicBlocks, a head of three; convolutions as He et al."""
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        *(BasicBlock(channels, channels, **options) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def stack_gradients(net, x, t):
    """|dL/dh_l| at the input of every block."""
    states = [x]
    for layer in net:
        states.append(layer(states[-1]))
    loss = F.cross_entropy(states[-1], t)
    return [g.norm().item() for g in torch.autograd.grad(loss, states[3:-4])]


def gratings(batch=64, size=8, noise=0.5):
    """Noisy waves of four directions and any phase (B, 1, H, W), and the direction (B,)."""
    t = torch.randint(CLASSES, (batch,))
    angle, phase = t.view(-1, 1, 1) * math.pi / CLASSES, torch.rand(batch, 1, 1) * 2 * math.pi
    r = torch.arange(size)
    wave = torch.sin(1.3 * (angle.cos() * r + angle.sin() * r.view(-1, 1)) + phase)  # (B, H, W)
    return (wave + noise * torch.randn_like(wave)).unsqueeze(1), t


def fit(name, model, optimizer, sample, steps, warmup=0):
    """The loss before every step; the rate rises linearly to its peak in `warmup` steps."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1))
    )
    losses = []
    for _ in tqdm(range(steps), desc=name, leave=False, disable=None):
        x, t = sample()
        loss = F.cross_entropy(model(x).flatten(0, -2), t.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def show_stacks(seed, log_dir, blocks, steps):
    print(f"4. {blocks} BasicBlocks: |dL/dh| at the first over that at the last; loss in training")
    measured = {}
    for name, options in STACKS.items():
        torch.manual_seed(seed)
        net = stack(blocks, **options)
        g = stack_gradients(net, *gratings())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        losses = fit(name, net, optimizer, gratings, steps)
        log2 = [math.log2(g_l / g[-1]) for g_l in g]
        draw(log_dir / "stack" / name, {"stack/log2_gradient": log2, "stack/loss": losses})
        by_ten = [sum(losses[i : i + 10]) / 10 for i in range(0, steps - 9, 10)]
        print(f"   {name:<9} gradient {g[0] / g[-1]:6.1f}   mean loss in steps 1-10 {by_ten[0]:.2f}"
              f"   11-20 {by_ten[1]:.2f}   last ten {by_ten[-1]:.3f}")  # fmt: skip
        measured[name] = {"gradient": g[0] / g[-1], "losses": by_ten}
    return measured


# --- 5, 6: Post-LN and Pre-LN --------------------------------------------------------------------


class Transformer(nn.Module):
    """Tokens (B, T) -> logits (B, T, K); a Pre-LN one is normalised once more, before the head."""

    def __init__(self, blocks, norm_first, d_model=32, nhead=4):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.position = nn.Parameter(torch.randn(LENGTH, d_model))
        layers = (TransformerBlock(d_model, nhead, 4 * d_model, norm_first) for _ in range(blocks))
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()
        self.head = nn.Linear(d_model, VOCABULARY)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


def reversals(batch=32):
    """Random tokens x (B, T), and the same from the last to the first."""
    x = torch.randint(VOCABULARY, (batch, LENGTH))
    return x, x.flip(1)


def gradient_of_blocks(blocks, norm_first, draws):
    """log2 |dL/dW| of each block's last weight at the start, the mean over `draws` networks."""
    logs = []
    for _ in range(draws):
        model = Transformer(blocks, norm_first)
        x, t = reversals(256)
        F.cross_entropy(model(x).flatten(0, 1), t.flatten()).backward()
        logs.append(torch.stack([b.linear2.weight.grad.norm().log2() for b in model.blocks]))
    return torch.stack(logs).mean(0).tolist()


def show_start(log_dir, depths, draws):
    print("5. Transformers at the start: |dL/dW| of the last weight in the first and last block")
    measured = {}
    for name in ("post_ln", "pre_ln"):
        logs = {L: gradient_of_blocks(L, name == "pre_ln", draws) for L in depths}
        draw(log_dir / "start" / name, {f"start/log2_gradient_{L}_blocks": logs[L] for L in depths})
        measured[name] = {L: (2 ** logs[L][0], 2 ** logs[L][-1]) for L in depths}
        pairs = (f"{L} blocks {a:.2f} {b:.2f}" for L, (a, b) in measured[name].items())
        print(f"   {name:<7}  ", "   ".join(pairs))
    return measured


RECIPES = {  # Pre-LN, part of the learning rate, part of the steps spent warming up
    "post_ln": (False, 1.0, 0.0),
    "post_ln_tenth": (False, 0.1, 0.0),
    "post_ln_warmup": (False, 1.0, 0.5),
    "pre_ln": (True, 1.0, 0.0),
}


def show_transformers(seed, log_dir, blocks, steps, lr):
    print(f"6. {blocks} blocks learn to reverse: loss of the last ten of {steps} steps of Adam")
    measured = {}
    for name, (norm_first, part, warmup) in RECIPES.items():
        torch.manual_seed(seed)
        model = Transformer(blocks, norm_first)
        optimizer = torch.optim.Adam(model.parameters(), lr * part)
        losses = fit(name, model, optimizer, reversals, steps, int(warmup * steps))
        draw(log_dir / "transformer" / name, {"transformer/loss": losses})
        measured[name] = sum(losses[-10:]) / 10
        print(f"   {name:<14}  rate {lr * part:<5g}   warm-up {int(warmup * steps):2}   "
              f"loss {measured[name]:.3f}")  # fmt: skip
    return measured


def main(seed=0, log_dir=LOG_DIR, width=256, depth=32, blocks=16, steps=100, depths=(2, 8, 32),
         draws=4, transformer_blocks=6, transformer_steps=160, lr=1e-2):  # fmt: skip
    torch.manual_seed(seed)
    show_twins()
    return {
        "learning": show_identity(),
        "depth": show_depth(log_dir, width, depth),
        "stacks": show_stacks(seed, log_dir, blocks, steps),
        "start": show_start(log_dir, depths, draws),
        "transformers": show_transformers(seed, log_dir, transformer_blocks, transformer_steps, lr),
    }


def guard(main, *flags):
    """Run main as a program: Ctrl-C, a closed pipe and a disk that refuses end it in one line."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    options, lost = vars(parser.parse_args()), []
    if hasattr(sys.stdout, "reconfigure"):  # any path, on any console, and logs that fill
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    threading.excepthook = lost.append  # what TensorBoard's thread could not write
    try:
        main(**options)
        if not lost:
            return
        raise lost[0].exc_value
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1
    except OSError as error:
        status = f"cannot log to {LOG_DIR}: {error}" if lost else str(error)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what print still holds has nowhere to go
    sys.exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small networks: faster than on two
    guard(main)
