"""FP16 drops gradients of 2^-25 and less, unless the loss is scaled; BF16 has FP32's range.

    E exponent bits, M mantissa bits, b = 2^(E-1) - 1:
    largest 2^b (2 - 2^-M)   smallest normal 2^(1-b)   smallest of all 2^(1-b-M)   epsilon 2^-M

                E   M   largest   smallest of all   epsilon
        FP32    8  23    3.4e38   1.4e-45           1.2e-7
        FP16    5  10     65504   6.0e-8            9.8e-4     range is what it lacks
        BF16    8   7    3.4e38   9.2e-41           7.8e-3     digits are

Mixed precision multiplies matrices in 16 bits and keeps the weights in 32: a step below
epsilon / 4 of a weight just under 1 is rounded away, however often it is repeated. A GradScaler
multiplies the loss by S, so that small gradients survive FP16, and divides before the step. If one
overflows, the step is skipped and S halved; after a number of good steps S is doubled again.
Gradients are clipped after scaler.unscale_(optimizer): before, the threshold is S times too low.
Autocast's lists depend on the device: softmax, layer_norm, exp and sum, which CUDA computes in
FP32, keep the type of their input on the CPU.

Checked here   each number of the table by its bits; updates that vanish; log-uniform gradients
               flushed by FP16, in theory and counted; FP32's loss, reached in BF16, and missed
               with BF16 weights, which round steps of 2e-4 away; the FP32 network's gradients
               in FP16, by S; our LossScaler = GradScaler through two overflows; autocast's
               types, by looking; seconds
TensorBoard    grad/zeroed and grad/overflowed by log2 S in network; amp/log2_scale and
               amp/step_taken by step in ours, torch; train/loss in float32, bfloat16,
               bfloat16_weights
Try            growth_interval=1 in show_scaler: how does S move? Up in every step that is taken
Source         Micikevicius et al. 2018, arXiv:1710.03740, section 3 (weights, loss scaling);
               torch.amp
"""

import argparse
import copy
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TOPIC = "training_engineering"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "amp_training"
FORMATS = {  # exponent bits, mantissa bits, an integer type of the same size
    torch.float32: (8, 23, torch.int32),
    torch.float16: (5, 10, torch.int16),
    torch.bfloat16: (8, 7, torch.int16),
}
SCALES = range(0, 33, 2)  # log2 of the loss scale


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


# --- number formats ----------------------------------------------------------------------------


def limits(E, M):
    """Largest, smallest normal, smallest of all, epsilon of a format with E and M bits.

    Four floats. b = 2^(E-1) - 1; then 2^b (2 - 2^-M), 2^(1-b), 2^(1-b-M), 2^-M. Exercise.
    """
    b = 2 ** (E - 1) - 1
    return 2.0**b * (2 - 2.0**-M), 2.0 ** (1 - b), 2.0 ** (1 - b - M), 2.0**-M


def from_bits(bits, dtype):
    """The positive number with the exponent and mantissa bits of the integer `bits`."""
    return torch.tensor(bits, dtype=FORMATS[dtype][2]).view(dtype).item()


def show_formats():
    print("1. formats, from their bits: largest, smallest normal, smallest of all, epsilon")
    for dtype, (E, M, _) in FORMATS.items():
        largest, normal, smallest, epsilon = limits(E, M)
        info = torch.finfo(dtype)
        assert (largest, normal, epsilon) == (info.max, info.smallest_normal, info.eps)
        assert largest == from_bits((2**E - 1) * 2**M - 1, dtype)  # exponent 1…10, mantissa 1…1
        assert (normal, smallest) == (from_bits(2**M, dtype), from_bits(1, dtype))
        print(f"   {name_of(dtype):<8} E {E}   M {M:2}   {largest:.4e}   {normal:.2e}   "
              f"{smallest:.2e}   {epsilon:.2e}")  # fmt: skip


def show_updates(step=1e-4, steps=1000):
    print(f"2. a weight of 1 after {steps} updates of -{step:g}")
    ends = {}
    for dtype, (_, M, _) in FORMATS.items():
        w = torch.ones((), dtype=dtype)
        for _ in range(steps):
            w -= step
        ends[dtype] = w.item()
        print(f"   {name_of(dtype):<8} {w.item():.4f}   epsilon / 4 = {2.0**-M / 4:.1e}")
    return ends


# --- loss scaling ------------------------------------------------------------------------------


def show_flush(n, low=-10.0, high=-2.0):
    print(f"3. {n:,} gradients, log-uniform from 1e{low:g} to 1e{high:g}: share that FP16 makes 0")
    g = 10 ** torch.empty(n, dtype=torch.float64).uniform_(low, high)
    shares = {}
    for log2_scale in (0, 8, 16):
        theory = max(0.0, (math.log10(2.0 ** (-25 - log2_scale)) - low) / (high - low))
        share = ((g * 2.0**log2_scale).half() == 0).double().mean().item()
        shares[log2_scale] = share, theory
        print(f"   S = 2^{log2_scale:<2}   measured {share:.4f}   theory {theory:.4f}")
    return shares


def classifier(width=64):
    """A network (B, 16) -> (B, 4)."""
    hidden = [nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()]
    first = [nn.Linear(16, width), nn.LayerNorm(width), nn.SiLU()]
    return nn.Sequential(*first, *hidden, nn.Linear(width, 4))


def teacher_task(steps, B=128):
    """Batches x (B, 16), t (B,) of a random network's classes, and 2,048 more for validation."""
    teacher = classifier()
    with torch.no_grad():
        teacher[-1].weight *= 8
        x = torch.randn(steps * B + 2048, 16)
        t = teacher(x).argmax(1)
    val, batches = (x[-2048:], t[-2048:]), (x[:-2048].split(B), t[:-2048].split(B))
    return list(zip(*batches, strict=True)), val


def fit(model, batches, dtype, lr=2e-4):
    """Adam under autocast to `dtype` on the CPU (none for float32); the loss of each step, a list.

    Forward and cross-entropy under autocast, backward and step outside: backward uses the types of
    forward. Exercise.
    """
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    for x, t in batches:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), t)
        optimizer.zero_grad()
        loss.backward()  # outside autocast: backward uses the types of forward
        optimizer.step()
        losses.append(loss.item())
    return losses


def show_training(log_dir, steps):
    print(f"4. Adam, {steps} steps on a teacher's classes: validation loss")
    batches, (x_val, t_val) = teacher_task(steps)
    start, ends = classifier(), {}
    variants = {
        "float32": (torch.float32, torch.float32),
        "bfloat16": (torch.bfloat16, torch.float32),
        "bfloat16_weights": (torch.bfloat16, torch.bfloat16),
    }
    for name, (dtype, weights) in tqdm(variants.items(), disable=None):
        model = copy.deepcopy(start).to(weights)
        draw(log_dir / name, {"train/loss": fit(model, batches, dtype)})
        with torch.no_grad():
            ends[name] = F.cross_entropy(model.float()(x_val), t_val).item()
        if name == "float32":
            trained = model
    print("   " + "   ".join(f"{name} {end:.4f}" for name, end in ends.items()))
    return ends, trained, (x_val, t_val)


def gradient_shares(model, x, t, scale):
    """Shares of the gradients at linear layers' outputs that FP16 makes 0, and inf or nan.

    Two floats, over all numbers of all nn.Linear of the Sequential `model` together. Forward and
    cross-entropy of x, t under CPU autocast to float16, the loss times `scale`, backward. A forward
    hook can put register_hook on each output; all forward hooks are removed afterwards. Exercise.
    """
    gradients = []

    def watch(layer, x, y):
        y.register_hook(gradients.append)

    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(watch) for layer in linear]
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x), t)
    (loss * scale).backward()
    for handle in handles:
        handle.remove()
    g = torch.cat([g.flatten() for g in gradients])
    assert g.dtype == torch.float16
    return (g == 0).double().mean().item(), (~g.isfinite()).double().mean().item()


def show_network_flush(log_dir, model, x, t):
    print(f"5. gradients of the float32 network, batch of {len(x):,}, under FP16, by S")
    shares = {k: gradient_shares(model, x, t, 2.0**k) for k in SCALES}
    with SummaryWriter(log_dir / "network", purge_step=0) as writer:
        for k, (zeroed, overflowed) in shares.items():
            writer.add_scalar("grad/zeroed", zeroed, k)
            writer.add_scalar("grad/overflowed", overflowed, k)
    for k in (0, 4, 16, 28, 32):
        print(f"   S = 2^{k:<2}   made 0: {shares[k][0]:.4f}   overflowed: {shares[k][1]:.4f}")
    return shares


class LossScaler:
    """GradScaler by hand: scale(loss).backward(), step(optimizer), update()."""

    def __init__(self, init_scale=2.0**16, growth=2.0, backoff=0.5, growth_interval=2000):
        self.S, self.growth, self.backoff = init_scale, growth, backoff
        self.interval, self.good, self.overflow = growth_interval, 0, False

    def scale(self, loss):
        return loss * self.S

    def step(self, optimizer):
        """Divide all gradients of the optimizer by S, and take its step if all numbers are finite.

        Else set self.overflow and take none. A parameter whose gradient is None is left out.
        Exercise.
        """
        for group in optimizer.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    w.grad /= self.S
                    self.overflow |= not w.grad.isfinite().all().item()
        if not self.overflow:
            optimizer.step()

    def update(self):
        """Back off after an overflow, grow after `interval` good steps in a row.

        Overflow: S times backoff, self.good = 0. Otherwise self.good counts the step, and at
        self.interval S is multiplied by growth and self.good starts anew. self.overflow is False
        afterwards. Exercise.
        """
        self.good = 0 if self.overflow else self.good + 1
        if self.overflow:
            self.S *= self.backoff
        elif self.good == self.interval:
            self.S, self.good = self.S * self.growth, 0
        self.overflow = False

    def get_scale(self):
        return self.S


def life(scaler, steps, overflow_at):
    """S before each step, whether it was taken, and the weights, for a loss that overflows."""
    w = torch.ones(3, requires_grad=True)
    optimizer, scales, taken = torch.optim.SGD([w], lr=0.1), [], []
    for i in range(steps):
        before = w.detach().clone()
        optimizer.zero_grad()
        loss = w.square().sum() * (math.inf if i in overflow_at else 1)
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        taken.append(not torch.equal(before, w))
    return scales, taken, w.detach()


def show_scaler(log_dir, growth_interval=3, steps=14, overflow_at=(4, 5)):
    print(f"6. a scaler's life, growth every {growth_interval}, overflow in {overflow_at}: log2 S")
    lives = {}
    for name, make in (("ours", LossScaler), ("torch", make_grad_scaler)):
        scaler = make(growth_interval=growth_interval)
        scales, taken, _ = lives[name] = life(scaler, steps, overflow_at)
        curves = {"amp/log2_scale": [math.log2(S) for S in scales], "amp/step_taken": taken}
        draw(log_dir / name, curves)
        shown = (
            f"{math.log2(S):.0f}{' ' if t else '-'}" for S, t in zip(scales, taken, strict=True)
        )
        print(f"   {name:<5} {' '.join(shown)}   (-: skipped)")
    assert lives["ours"][:2] == lives["torch"][:2]
    assert torch.equal(lives["ours"][2], lives["torch"][2])
    return lives["torch"][:2]


def make_grad_scaler(**options):
    return torch.amp.GradScaler("cpu", **options)


# --- autocast ----------------------------------------------------------------------------------


def operations(device):
    """{name: operation} on a tensor a (4, 8)."""
    t, ones = torch.arange(4, device=device), torch.ones(8, device=device)
    return {
        "matmul": lambda a: a @ a.T,
        "linear": lambda a: F.linear(a, a),
        "conv1d": lambda a: F.conv1d(a[None], a[None]),
        "attention": lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]),
        "softmax": lambda a: F.softmax(a, -1),
        "layer_norm": lambda a: F.layer_norm(a, (8,), ones),
        "exp": lambda a: a.exp(),
        "sum": lambda a: a.sum(),
        "gelu": lambda a: F.gelu(a),
        "cross_entropy": lambda a: F.cross_entropy(a, t),
        "mse_loss": lambda a: F.mse_loss(a, a),
    }


def autocast_types(device, dtype):
    """{operation: types of its result under autocast, from float32 and from `dtype`}."""
    x = torch.randn(4, 8, device=device)
    with torch.autocast(device, dtype):
        return {
            name: (run(x).dtype, run(x.to(dtype)).dtype) for name, run in operations(device).items()
        }


def show_autocast(device, dtype):
    types = autocast_types(device, dtype)
    kinds = {
        f"always {name_of(dtype)}": (dtype, dtype),
        "always float32": (torch.float32, torch.float32),
        "as it comes": (torch.float32, dtype),
    }
    for kind, pair in kinds.items():
        names = ", ".join(name for name, found in types.items() if found == pair)
        print(f"   {device} {name_of(dtype):<8} {kind:<15} {names}")
    return types


# --- seconds -----------------------------------------------------------------------------------


def matmul_seconds(n, dtype, device, repeat=5):
    """The shortest of `repeat` products of (n, n) matrices."""
    a, times = torch.randn(n, n, device=device).to(dtype), []
    for _ in range(repeat + 1):  # the first sets things up
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()  # a GPU works on while Python goes ahead
        times.append(time.perf_counter() - start)
    return min(times[1:])


def show_seconds(devices, sizes):
    ratios = {}
    for n in sizes:
        base = matmul_seconds(n, torch.float32, "cpu")
        for device in devices:
            for dtype in FORMATS:
                ratios[device, n, dtype] = matmul_seconds(n, dtype, device) / base
            shown = (f"{name_of(dtype)} {ratios[device, n, dtype]:8.3f}" for dtype in FORMATS)
            print(f"   n {n:5}   {device:<4}   {'   '.join(shown)}")
    return ratios


def main(seed=0, log_dir=LOG_DIR, n=1_000_000, train_steps=500, sizes=(64, 256, 512)):
    torch.manual_seed(seed)
    show_formats()
    measured = {"updates": show_updates(), "flush": show_flush(n)}
    measured["training"], trained, val = show_training(log_dir, train_steps)
    measured["network"] = show_network_flush(log_dir, trained, *val)
    measured["life"] = show_scaler(log_dir)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    skipped = "" if "cuda" in devices else "; cuda skipped: there is none"
    print(f"7. autocast: types of results, from float32 and from 16-bit inputs{skipped}")
    measured["types"] = {
        (device, dtype): show_autocast(device, dtype)
        for device in devices
        for dtype in (torch.bfloat16, torch.float16)
    }
    print(f"8. seconds of an (n, n) product, the CPU's in float32 = 1{skipped}")
    measured["seconds"] = show_seconds(devices, sizes)
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
