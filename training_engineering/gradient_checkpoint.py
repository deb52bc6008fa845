"""Checkpointing S segments of an L-block network leaves S + c L / S activations alive, not c L.

    forward    each segment keeps its input alone, and drops what its blocks saved
    backward   each segment, the last first, runs again from its input, and then backward as ever
    peak       S inputs and the c L / S activations that the blocks of one segment save, c each:
               least at S = sqrt(c L), where it is 2 sqrt(c L)

That peak is right to within 1 or 2: the running segment's input stands in both terms, and the
output and its gradients in neither.

The price is a second forward pass. A linear layer's backward takes two matrix products where its
forward takes one, so that a step of 1 + 2 becomes 1 + 1 + 2: a third more (a little less, for the
second run of a segment stops as soon as all that was saved is back). Dropout must fall as it did
in the first run, or the gradient is that of no network: the random numbers' state is kept as well.

Checked here   bytes saved by forward, against depth and S; the peak of what is alive at once,
               against the model; runs of each block, and FLOPs; gradients equal bit for bit, with
               dropout, and by a checkpoint of our own; what the reentrant form loses
TensorBoard    memory/saved by depth in the runs plain, segments_4, segment_each;
               memory/peak by S in peak/measured, peak/model (one unit is one activation)
Try            a block that saves more, c = 7: where does the least peak lie? Near sqrt(7 L)
Source         Chen et al. 2016, arXiv:1604.06174, section 4 (c = 1: sqrt(n) segments);
               torch.utils.checkpoint; torch.autograd.graph.saved_tensors_hooks
"""

import argparse
import copy
import math
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

TOPIC = "training_engineering"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "gradient_checkpoint"


class Block(nn.Module):
    """x + W2 silu(W1 x) on (B, d). Saves c = 3 activations: x, W1 x, silu(W1 x); dropout a mask."""

    saved = 3

    def __init__(self, d, p=0.0):
        super().__init__()
        self.expand, self.project, self.p = nn.Linear(d, d), nn.Linear(d, d), p

    def forward(self, x):
        y = self.project(F.silu(self.expand(x)))
        return x + (F.dropout(y, self.p, self.training) if self.p else y)


class Checkpoint(torch.autograd.Function):
    """`Checkpoint.apply(f, x)` is f(x), but keeps x alone and runs f again in backward.

    x must ask for a gradient, or f's parameters get none. Random numbers are those of the CPU, and
    autocast is not restored: under it, use torch's.
    """

    @staticmethod
    def forward(ctx, f, x):  # under no_grad: nothing is saved
        """f(x), computed under no_grad, so that nothing is saved but what backward needs here.

        Keep f, and the state of the CPU's random numbers before f runs, as attributes of ctx; x by
        ctx.save_for_backward. Exercise.
        """
        ctx.f, ctx.random = f, torch.get_rng_state()
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx, grad_y):
        """Run f again on x, with gradients, and send grad_y back through it: (None, gradient of x).

        x is detached first and asks for a gradient. f sees the random numbers of the first run,
        within torch.random.fork_rng(devices=[]), so that those outside stay as they were.
        y.backward(grad_y) adds to the .grad of f's parameters on the way; f itself gets None.
        Exercise.
        """
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random)  # the dropout of the first run
            y = ctx.f(x)
        y.backward(grad_y)  # adds to the .grad of f's parameters on the way
        return None, x.grad


def run(net, x, segments, **options):
    """net(x) in `segments` checkpointed parts of equal length; 0 is without checkpoints.

    Each part is a slice of the Sequential, run by torch's checkpoint(part, x, use_reentrant=False,
    **options). ValueError "n blocks do not split into s equal segments" if they do not. Exercise.
    """
    if segments == 0:
        return net(x)
    if segments < 0 or len(net) % segments:
        raise ValueError(f"{len(net)} blocks do not split into {segments} equal segments")
    length = len(net) // segments
    for i in range(0, len(net), length):
        x = checkpoint(net[i : i + length], x, use_reentrant=False, **options)
    return x


def saved_bytes(net, x, segments):
    """Bytes of tensors that forward saves for backward, parameters aside, each storage once.

    run(net, x, segments) under saved_tensors_hooks(pack, unpack); a storage is known by its
    data_ptr(), its size is nbytes(). Its output is held meanwhile, or a storage would be freed and
    counted twice. Exercise.
    """
    own = {w.untyped_storage().data_ptr() for w in net.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(net, x, segments)  # y is held, so that no storage is freed and counted twice
    del y
    return sum(sizes.values())


class Alive(TorchDispatchMode):
    """The largest number of bytes alive at once, of all that operations return under it.

    What was there before (the input x) and storages under `least` bytes (gradients of
    parameters, the loss) are left out.
    """

    def __init__(self, least):
        super().__init__()
        self.least, self.sizes, self.peak = least, {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return out

    def watch(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if size >= self.least and key not in self.sizes:
            self.sizes[key] = size
            weakref.finalize(storage, self.sizes.pop, key)
            self.peak = max(self.peak, sum(self.sizes.values()))


def step(net, x, segments, seed=0, **options):
    """One forward and backward pass from the same random numbers; the gradients of all parameters.

    torch.manual_seed(seed), gradients to zero, then the mean of the squares of run(net, x,
    segments, **options), backward. Exercise.
    """
    torch.manual_seed(seed)
    net.zero_grad()
    run(net, x, segments, **options).square().mean().backward()
    return [w.grad for w in net.parameters()]


def network(depth, d, p=0.0):
    return nn.Sequential(*(Block(d, p) for _ in range(depth)))


def divisors(n):
    """All divisors of n, in rising order, a list. Exercise."""
    return [s for s in range(1, n + 1) if n % s == 0]


# --- the sections ------------------------------------------------------------------------------


def show_saved(log_dir, depths, B, d):
    print(f"1. activations (B, d) = ({B}, {d}) that forward saves, by depth L: measured = theory")
    unit, x, rows = B * d * 4, torch.randn(B, d), {}
    variants = {
        "plain": (lambda L: 0, lambda L: Block.saved * L),
        "segments_4": (lambda L: 4, lambda L: 4),
        "segment_each": (lambda L: L, lambda L: L),
    }
    for name, (segments, theory) in variants.items():
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for L in depths:
                saved = rows[name, L] = saved_bytes(network(L, d), x, segments(L))
                assert saved == unit * theory(L)
                writer.add_scalar("memory/saved", saved / unit, L)
        shown = "   ".join(f"L {L} {rows[name, L] // unit:3}" for L in depths)
        print(f"   {name:<13} {shown}")
    return rows


def show_peak(log_dir, L, B, d):
    net, x, unit = network(L, d), torch.randn(B, d), B * d * 4
    print(f"2. most activations alive at once, forward and backward, L = {L}, by segments S")
    peaks, model = {}, {S: S + Block.saved * L // S for S in divisors(L)}
    for S in (0, *model):
        with Alive(least=unit) as alive:
            step(net, x, S)
        peaks[S] = alive.peak / unit
    for name, curve in (("measured", peaks), ("model", model)):
        with SummaryWriter(log_dir / "peak" / name, purge_step=0) as writer:
            for S in model:
                writer.add_scalar("memory/peak", curve[S], S)
    assert all(abs(peaks[S] - model[S]) <= 1 for S in model)
    assert peaks[0] == Block.saved * L + 4  # the loss and its backward
    print(f"   plain   {peaks[0]:.0f}   c L = {Block.saved * L}")
    for S in model:
        print(f"   S {S:3}   measured {peaks[S]:3.0f}   S + c L / S = {model[S]:3}")
    best = min(model, key=peaks.get)
    print(f"   least at S = {best}   sqrt(c L) = {math.sqrt(Block.saved * L):.1f}")
    return {"peaks": peaks, "best": best}


def flops(net, x, segments):
    with FlopCounterMode(display=False) as counter:
        step(net, x, segments)
    return counter.get_total_flops()


def seconds(net, x, segments):
    """The shortest of seven steps."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        step(net, x, segments)
        times.append(time.perf_counter() - start)
    return min(times)


def show_work(L, S, B, d):
    print(f"3. the price of S = {S} at L = {L}: runs of the blocks, FLOPs of the products, time")
    net, x, calls = network(L, d), torch.randn(B, d), []
    for block in net:  # before: recomputation stops early, ahead of a forward hook
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    runs = []
    for segments in (0, S):
        calls.clear()
        step(net, x, segments)
        runs.append(len(calls))
    assert runs == [L, 2 * L]
    # forward 2 L products, backward 4 L but for x, that again but for the last of each segment
    theory, work = (8 * L - 1 - S) / (6 * L - 1), flops(net, x, S) / flops(net, x, 0)
    assert math.isclose(work, theory)
    print(f"   block runs {runs[0]} and {runs[1]}   FLOPs times {work:.3f}   theory {theory:.3f}")
    print(f"   time times {seconds(net, x, S) / seconds(net, x, 0):.2f}")
    return {"runs": runs, "flops": work}


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def show_gradients(L, S, B, d, p=0.2):
    print(f"4. gradients under dropout {p}, against those without checkpoints: largest difference")
    net, x = network(L, d, p), torch.randn(B, d, requires_grad=True)
    expected = step(net, x, 0)
    off = {"checkpoint": largest_difference(step(net, x, S), expected)}
    off["without random state"] = largest_difference(
        step(net, x, S, preserve_rng_state=False), expected
    )
    ours, length = copy.deepcopy(net), L // S
    segments = [ours[i : i + length] for i in range(0, L, length)]
    torch.manual_seed(0)
    y = x
    for segment in segments:
        y = Checkpoint.apply(segment, y)
    y.square().mean().backward()
    off["our Checkpoint"] = largest_difference([w.grad for w in ours.parameters()], expected)
    assert off["checkpoint"] == off["our Checkpoint"] == 0
    scale = max(g.abs().max().item() for g in expected)
    for name, value in off.items():
        print(f"   {name:<21} {value:.1e}   largest gradient {scale:.1e}")
    return off | {"scale": scale}


def show_reentrant(B, d):
    print("5. an input that asks for no gradient: parameters of the segment that get one")
    found = {}
    for reentrant in (False, True):
        net, head = network(2, d), nn.Linear(d, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = checkpoint(net, torch.randn(B, d), use_reentrant=reentrant)
        head(y).square().mean().backward()
        found[reentrant] = sum(w.grad is not None for w in net.parameters())
        told = any("requires_grad=True" in str(warning.message) for warning in caught)
        print(f"   use_reentrant={reentrant!s:<5}   {found[reentrant]} of 8   warned {told}")
    return found


def show_cuda(L, B, d):
    """MiB at the peak of a step by segments, on the GPU; None where there is none."""
    if not torch.cuda.is_available():
        print("6. peak memory of a GPU: skipped, no CUDA here")
        return None
    print(f"6. peak memory of {torch.cuda.get_device_name()}, L = {L}, activations ({B}, {d})")
    net, x, peaks = network(L, d).cuda(), torch.randn(B, d, device="cuda"), {}
    step(net, x, 0)  # libraries take their own
    for S in (0, *divisors(L)):
        net.zero_grad()  # before, or the peak would be less by the gradients that step frees
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(net, x, S)
        peaks[S] = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"   S {S:3}   {peaks[S]:8.1f} MiB")
    return peaks


def main(seed=0, log_dir=LOG_DIR, depths=(8, 16, 32, 48), L=48, B=256, d=16, width=192):
    torch.manual_seed(seed)
    S = min(divisors(L), key=lambda S: S + Block.saved * L / S)
    return {
        "saved": show_saved(log_dir, depths, B, d),
        **show_peak(log_dir, L, B, d),
        **show_work(L, S, B, width),
        "off": show_gradients(L, S, B, d),
        "reentrant": show_reentrant(B, d),
        "cuda": show_cuda(L, 64 * B, width),
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
    torch.set_num_threads(1)  # small matrices: faster than on two
    guard(main)
