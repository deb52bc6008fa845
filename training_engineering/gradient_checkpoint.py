"""With a checkpoint around each block, forward keeps one tensor a block; no gradient changes.

An activation is a tensor that forward computes and keeps, because backward needs it. A checkpoint
around a part of a network keeps only the input of that part, and runs the part again, as far as
backward needs it, when backward comes to it. You need it when a batch does not fit into memory, and
you pay with time. A checkpoint around a single Linear or activation function gains nothing. Dropout
must drop the same numbers in both runs, so a checkpoint also keeps the random number generator's
state.

    after forward     c L activations are in memory without checkpoints, S with S segments
    peak of a step    about S + c L / S: one tensor a segment, and all of the segment that runs
    best S            sqrt(c L), where the peak is about 2 sqrt(c L)

    L  blocks of the network     c  activations that one block keeps, 3 here
    S  segments: parts of L / S blocks each, with a checkpoint around each part
    peak  the most tensors of an activation's size, gradients too, in memory at one time

Needs          nn_seq.py; 07_custom_autograd_function.py for section 2
Checked here   gradients equal bit for bit under dropout, from PyTorch's checkpoint and from ours;
               activations after forward; the peak, to within 1; matrix products of a step
TensorBoard    memory/peak by S: measured lies on formula; both fall to S = 12, then rise
Try            in Block, put nn.SiLU(), nn.Linear(d, d) before nn.Dropout(p): c is 5 then. Which S
               has the least peak in section 3?
Answer         16, next to sqrt(5 * 48) = 15.5; with c = 3 it was 12
Source         Chen et al. 2016, arXiv:1604.06174, section 4 (with c = 1); torch.utils.checkpoint
"""

import argparse
import math
import os
import signal
import sys
import threading
import warnings
import weakref
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # private: nothing public sees every op
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.tensorboard import SummaryWriter

LOG_DIR = Path(__file__).resolve().parents[1] / "runs/training_engineering/gradient_checkpoint"


# --- 1. in everyday code -----------------------------------------------------------------------


def checkpointed(net, x):
    """net(x) for a Sequential, with a checkpoint around each of its blocks. Exercise."""
    for block in net:
        x = checkpoint(block, x, use_reentrant=False)  # in place of x = block(x)
    return x


def plain(net, x):
    return net(x)


def two_segments(net, x):  # PyTorch's own loop leaves the last segment without a checkpoint
    return checkpoint_sequential(net, 2, x, use_reentrant=False)


class Block(nn.Module):
    """x + W2 silu(W1 x) on x (B, d). Keeps c = 3 activations: x, W1 x and silu(W1 x)."""

    def __init__(self, d, p=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.Dropout(p))

    def forward(self, x):
        return x + self.layers(x)


def network(L, d, p=0.0):
    return nn.Sequential(*(Block(d, p) for _ in range(L)))


class Memory(TorchDispatchMode):
    """Counts matrix products, and the bytes alive in storages (the memory behind tensors).

    Storages of fewer than `least` bytes do not count, nor what was there before.
    """

    def __init__(self, least):
        super().__init__()
        self.least, self.sizes, self.peak, self.products = least, {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.products += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        tensors = out if isinstance(out, (tuple, list)) else (out,)
        for storage in [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]:
            key, size = storage.data_ptr(), storage.nbytes()
            if size >= self.least and key not in self.sizes:
                self.sizes[key] = size
                weakref.finalize(storage, self.sizes.pop, key)  # as soon as it is freed
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def step(forward, net, x, *how):
    """A step of forward(net, x, *how): gradients, activations after forward, their peak, products.

    An activation is a tensor of the size of x (B, d). The output of net counts, x does not. With
    B > d the weights are too small to count.
    """
    torch.manual_seed(0)  # the same dropout in every step
    net.zero_grad()
    with Memory(x.nbytes) as memory:
        loss = forward(net, x, *how).square().mean()
        after = sum(memory.sizes.values()) // x.nbytes
        loss.backward()
    return [w.grad for w in net.parameters()], after, memory.peak // x.nbytes, memory.products


def show_everyday(L=4):
    print(f"1. In everyday code: what do checkpoints change in a step of {L} blocks?")
    print("   forward                                 activations   matrix products   gradients")
    print("                                         after forward         of a step        same")
    net, x = network(L, 4), torch.randn(8, 4)
    rows = {
        "net(x)": step(plain, net, x),
        "checkpointed(net, x)": step(checkpointed, net, x),
        "checkpoint_sequential(net, 2, x, ...)": step(two_segments, net, x),
    }
    grads, kept, _, once = rows["net(x)"]
    for name, (g, after, _, products) in rows.items():
        same = sum(torch.equal(a, b) for a, b in zip(g, grads, strict=True))
        print(f"   {name:<37}   {after:11}   {products:15}   {same:3} of {len(grads)}")
        assert same == len(grads)
    print("   (The second run stops before a checkpoint's last Linear: backward has all it needs.)")
    _, less, _, more = rows["checkpointed(net, x)"]
    print(f"   -> a checkpoint around each block: {less} activations instead of {kept}, {more} "
          f"products instead of {once}")  # fmt: skip
    return {name: row[1:] for name, row in rows.items()}


# --- 2. from scratch ---------------------------------------------------------------------------


class Checkpoint(torch.autograd.Function):
    """`Checkpoint.apply(f, x)` is f(x), but keeps x alone and runs f again in backward.

    PyTorch's older form, use_reentrant=True, works so. Ours restores the CPU's random numbers only.
    """

    @staticmethod
    def forward(ctx, f, x):
        """f(x). Keep f and torch.get_rng_state(), as it is before f runs, as attributes of ctx.

        Keep x by ctx.save_for_backward. PyTorch records nothing else here. Exercise.
        """
        ctx.f, ctx.random = f, torch.get_rng_state()
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx, grad_y):
        """Run f again on a detached x that asks for a gradient: returns (None, gradient of x).

        f sees the random numbers of the first run, within torch.random.fork_rng(devices=[]), so
        that those outside stay. y.backward(grad_y) gives f's parameters their gradients. Exercise.
        """
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random)  # the dropout of the first run
            y = ctx.f(x)
        y.backward(grad_y)
        return None, x.grad


def first_half(net, x, call, options):
    """net(x) for two halves: the first one, f, as call(f, x, **options)."""
    return net[1](call(net[0], x, **options))


def show_scratch(L=4, B=32, d=8, p=0.2):
    print(f"2. {L} blocks, dropout {p}, a checkpoint around the first half f: right gradients?")
    print("   call                                    parameters without   of the others, largest")
    print("                                                   a gradient      relative difference")
    net, x = nn.Sequential(network(L // 2, d, p), network(L // 2, d, p)), torch.randn(B, d)
    expected, found = step(plain, net, x)[0], {}
    new, old = {"use_reentrant": False}, {"use_reentrant": True}
    for name, start, call, options in (
        ("checkpoint(f, x, use_reentrant=False)", x, checkpoint, new),
        ("   and preserve_rng_state=False", x, checkpoint, new | {"preserve_rng_state": False}),
        ("checkpoint(f, x, use_reentrant=True)", x, checkpoint, old),
        ("our Checkpoint.apply(f, x)", x, Checkpoint.apply, {}),
        ("   and x.requires_grad", x.clone().requires_grad_(), Checkpoint.apply, {}),
    ):
        with warnings.catch_warnings(action="ignore"):  # the old form warns of missing gradients
            grads = step(first_half, net, start, call, options)[0]
        pairs = [(g, e) for g, e in zip(grads, expected, strict=True) if g is not None]
        off = max(((g - e).norm() / e.norm()).item() for g, e in pairs)
        found[name] = len(grads) - len(pairs), off
        print(f"   {name:<37}   {found[name][0]:13} of {len(grads)}   {off:22.2g}")
    default, forgot, reentrant, _, ours = found.values()
    assert default == ours == (0, 0)
    print("   (A Function is recorded only if a tensor given to it requires a gradient. x is data,")
    print("   which does not, and the parameters inside f are not given to it.)")
    print(f"   -> {default[0]} parameters without a gradient with use_reentrant=False, "
          f"{reentrant[0]} with True; wrong by {forgot[1]:.2g} without the state")  # fmt: skip
    return found


# --- 3. how many segments? ---------------------------------------------------------------------


def run(net, x, S):
    """net(x) for a Sequential cut into S segments of equal length, a checkpoint around each.

    S = 0: no checkpoint. ValueError "n blocks do not split into S equal segments" if so. Exercise.
    """
    if S < 0 or (S and len(net) % S):
        raise ValueError(f"{len(net)} blocks do not split into {S} equal segments")
    for i in range(S):
        segment = net[i * len(net) // S : (i + 1) * len(net) // S]
        x = checkpoint(segment, x, use_reentrant=False)
    return x if S else net(x)


def show_segments(log_dir, L, B, d):
    net, x, after, peaks, products = network(L, d), torch.randn(B, d), {}, {}, {}
    c = step(run, net[:1], x, 0)[1]
    print(f"3. How many activations are in memory? L = {L} blocks in S segments, c = {c} a block")
    print("   segments S   after forward   peak, measured   peak, S + c L / S   matrix products")
    formula = {S: S + c * L // S for S in range(1, L + 1) if L % S == 0}
    for S in (0, *formula):  # every S that divides L
        _, after[S], peaks[S], products[S] = step(run, net, x, S)
        print(f"   {S or 'none':>10}   {after[S]:13}   {peaks[S]:14}   {formula.get(S, '-'):>17}"
              f"   {products[S]:15}")  # fmt: skip
    assert all(after[S] == (S or c * L) for S in after)
    assert all(abs(peaks[S] - formula[S]) <= 1 for S in formula)
    for name, curve in (("measured", peaks), ("formula", formula)):
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for S in formula:
                writer.add_scalar("memory/peak", curve[S], S)
    best = min(formula, key=peaks.get)
    more, root = f"for {products[best]} products, not {products[0]}", math.sqrt(c * L)
    print(f"   -> the peak is least with S = {best}: {peaks[best]}, not {peaks[0]}, {more}; "
          f"sqrt(c L) = {root:.1f}")  # fmt: skip
    return {"c": c, "after": after, "peaks": peaks, "products": products, "best": best}


# --- 4. which layers to wrap? ------------------------------------------------------------------


def run_wrapped(net, x, wraps):
    """net(x) for blocks x + layers(x), with checkpoints inside each block.

    Each (start, stop) of `wraps`, in rising order, stands for a checkpoint around
    block.layers[start:stop]; the layers between run as ever. Exercise.
    """
    for block in net:
        y, done = x, 0
        for start, stop in wraps:
            y = block.layers[done:start](y)
            y = checkpoint(block.layers[start:stop], y, use_reentrant=False)
            done = stop
        x = x + block.layers[done:](y)
    return x


def show_wrapping(L, B, d):
    print(f"4. Which layers to wrap in each of {L} blocks of Linear 1, SiLU, Linear 2?")
    print("   a checkpoint around    activations   matrix products")
    print("                        after forward         of a step")
    net, x, rows = network(L, d), torch.randn(B, d), {}
    wraps_of = {
        "nothing": (),
        "each Linear": ((0, 1), (2, 3)),
        "SiLU": ((1, 2),),
        "SiLU to Linear 2": ((1, 3),),
        "Linear 1 to SiLU": ((0, 2),),
        "Linear 1 to Linear 2": ((0, 3),),
    }
    for name, wraps in wraps_of.items():
        _, after, _, products = step(run_wrapped, net, x, wraps)
        rows[name] = after, products
        print(f"   {name:<20}   {after:12}   {products:15}")
    print("   (A Linear or a SiLU keeps no more than its input anyway. A second run ends once all")
    print("   that was kept is back: before the product of the last Linear in a checkpoint.)")
    kept, once = rows["nothing"]
    free = [name for name, row in rows.items() if row[0] < kept and row[1] == once]
    print(f"   -> keeps less, and repeats no product: {', '.join(free) or 'none'}; "
          f"keeps least: {min(rows, key=rows.get)}")  # fmt: skip
    return rows


def main(seed=0, log_dir=LOG_DIR, L=48, B=256, d=16):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "scratch": show_scratch(),
        "segments": show_segments(log_dir, L, B, d),
        "wrapped": show_wrapping(L // 4, B, d),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


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
    torch.set_num_threads(1)  # small matrices: faster than on two
    guard(main)
