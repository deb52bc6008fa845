"""In float16 a gradient of 2^-25 or less becomes 0, so that training can stand still. A loss that
is multiplied by S before backward() keeps it. bfloat16 has the range of float32 and needs no S.

Mixed precision multiplies matrices in numbers of 16 bits, float16 (FP16) or bfloat16 (BF16), and
keeps the weights in 32 bits, float32 (FP32). What is kept for backward() then takes little more
than half the memory. On a GPU large products of matrices are much faster: over 10 times on an H200.
torch.autocast picks the type of each operation. Start with bfloat16 where your GPU has it.

float16 also needs a GradScaler. It multiplies the loss by S, and unscale_ divides the gradients by
S again. If one of them is inf or nan, the step is skipped and S is halved. Clip after unscale_:
before it the gradients are S times too large. S does not help against an eps that is too large.

    E, M     bits of a number for its exponent and for its digits (mantissa); one more is its sign
    b        = 2^(E-1) - 1, the largest exponent
    largest  2^b (2 - 2^-M)    smallest normal (all digits)  2^(1-b)    smallest of all  2^(1-b-M)
    epsilon  2^-M, the gap from 1 to the next number; below 1 the gap is epsilon / 2. Results go to
             the nearest number, so 1 - d is 1 again for d below epsilon / 4, however often

Needs          nn_linear.py, nn_optim.py, 06_gradient_accumulation_and_tricks.py
Checked here   memory; the formats; a scaler by hand = GradScaler; float16 training with it, without
TensorBoard    train/loss by step: float16 stays flat, float16_scaled falls as float32 does, and
               bfloat16_weights more slowly. amp/log2_scale and amp/step_taken by step: ours = torch
Try            in amp_step, move the line scaler.unscale_(optimizer) below the next one. Which norm
               does step 4 of section 1 find, and how far do its weights move?
Answer         It finds 40960, which is 5 S, and moves the weights only to 0.9999
Source         Micikevicius et al. 2018, arXiv:1710.03740, section 3; torch.amp
"""

import argparse
import copy
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
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs/training_engineering/amp_training"
FORMATS = {  # bits of the exponent and of the mantissa
    "float32": (torch.float32, 8, 23),
    "float16": (torch.float16, 5, 10),
    "bfloat16": (torch.bfloat16, 8, 7),
}


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


# --- 1. in everyday code -----------------------------------------------------------------------


def amp_step(model, x, t, loss_of, optimizer, scaler, dtype=torch.float16, max_norm=1.0):
    """One step of training in mixed precision: the loss, and the norm of the gradients. Exercise.

    Only model and loss run under autocast to `dtype` (none for float32), on x's device. Then: drop
    old gradients, backward of the scaled loss, unscale_, clip to max_norm, step, update.
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(model(x), t)
    optimizer.zero_grad()
    scaler.scale(loss).backward()  # outside autocast: backward uses the types of forward
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)  # skipped if a gradient is inf or nan
    scaler.update()
    return loss.item(), norm.item()


def show_everyday(steps=5):
    print(
        "1. In everyday code: one step with bfloat16; then float16, whose gradients need a scale S"
    )
    print(
        "   (one example: loss |3 w1 + 4 w2|, so the gradient is (3, 4), of norm 5; clipped to 1)"
    )
    print("   type       step   S before   norm after unscale_   weights after       S after")
    x, t, rows = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1), []
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):  # "cuda" on a GPU
        loss = F.l1_loss(model(x), t)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    w1, w2 = model.weight[0].tolist()
    print(f"   bfloat16      1          -   {norm:19.4f}   {w1:7.4f} {w2:7.4f}           -")
    nn.init.ones_(model.weight)
    scaler = torch.amp.GradScaler("cpu")  # "cuda" on a GPU; enabled=False for bfloat16
    for step in range(1, steps + 1):
        before = scaler.get_scale()
        _, norm = amp_step(model, x, t, F.l1_loss, optimizer, scaler)
        rows.append((before, norm, *model.weight[0].tolist(), scaler.get_scale()))
        print(
            "   float16    {:4}   {:8.0f}   {:19.4f}   {:7.4f} {:7.4f}   {:9.0f}".format(
                step, *rows[-1]
            )
        )
    skipped, S = sum(not math.isfinite(row[1]) for row in rows), rows[-1][0]
    print(f"   -> {skipped} steps are skipped, until the larger gradient, 4 S = {4 * S:.0f}, is "
          f"below float16's largest, {torch.finfo(torch.float16).max:.0f}")  # fmt: skip
    return (w1, w2), rows


# --- 2. why 16 bits ----------------------------------------------------------------------------


def kept_bytes(model, x, t, dtype):
    """Bytes that autograd keeps for backward(), beside the weights themselves. On any device."""
    own, kept = {w.data_ptr() for w in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes  # one that is kept twice counts once
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32),
    ):
        loss = F.cross_entropy(model(x), t)
    loss.backward()  # what is kept may be freed only now, so that no address is used twice
    return sum(kept.values())


def show_reasons(batch, width, device):
    print(f"2. Why 16 bits? Memory and speed of 4 Linear + GELU of width {width}, batch {batch}")
    print("   autocast to   weights, MB   kept for backward, MB   share of float32's")
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU())]
    model, kept, seconds = nn.Sequential(*layers).to(device), {}, {}
    x, t = torch.randn(batch, width, device=device), torch.arange(batch, device=device) % width
    for name, (dtype, *_) in FORMATS.items():
        kept[name] = kept_bytes(model, x, t, dtype) / 1e6
        weights = sum(w.nbytes for w in model.parameters()) / 1e6
        print(f"   {name:<11}   {weights:11.2f}   {kept[name]:21.2f}   "
              f"{kept[name] / kept['float32']:18.2f}")  # fmt: skip
        if device == "cuda":
            from torch.utils.benchmark import Timer  # waits for the GPU; without one it warns

            a = torch.randn(8192, 8192, device=device, dtype=dtype)
            seconds[name] = Timer("a @ a", globals={"a": a}).blocked_autorange().median
    if seconds:
        times = [f"{name} {seconds['float32'] / s:.1f}" for name, s in seconds.items()]
        print(f"   speed of a product of 8192 x 8192 numbers, float32 = 1: {', '.join(times)}")
    else:
        print("   speed: skipped, no CUDA GPU; on one it shows how many times 16 bits are faster")
    print(f"   -> what is kept falls to {kept['bfloat16'] / kept['float32']:.2f} in 16 bits; the "
          "weights stay in 32")  # fmt: skip
    return kept, seconds


# --- 3. the formats ----------------------------------------------------------------------------


def limits(E, M):
    """Largest, smallest normal, smallest of all, epsilon of a format with E and M bits.

    Four floats, by the formulas on top. Exercise.
    """
    b = 2 ** (E - 1) - 1
    return 2.0**b * (2 - 2.0**-M), 2.0 ** (1 - b), 2.0 ** (1 - b - M), 2.0**-M


def show_formats(numbers=(1e-8, 1.001, 70000), steps=1000):
    print(f"3. What becomes of a number in each format, and of 1 after {steps} steps of -1e-4?")
    heads = "".join(f"  {number:>9g}" for number in numbers)
    print(f"   format    E   M    largest  smallest  epsilon{heads}  1 at the end")
    stored = {}
    for name, (dtype, E, M) in FORMATS.items():
        largest, normal, smallest, epsilon = limits(E, M)
        info = torch.finfo(dtype)
        assert (largest, normal, epsilon) == (info.max, info.smallest_normal, info.eps)
        w = torch.ones((), dtype=dtype)
        for _ in range(steps):
            w -= 1e-4
        stored[name] = [*torch.tensor(numbers, dtype=dtype).tolist(), w.item()]
        cells = "".join(f"  {number:9.4g}" for number in stored[name][:-1])
        print(f"   {name:<8}  {E}  {M:2}  {largest:9.4g}   {smallest:.1e}  {epsilon:.1e}{cells}"
              f"  {stored[name][-1]:12.4g}")  # fmt: skip
    lost = [name for name, found in stored.items() if found[-1] == 1]
    tiny = [f"{stored[name][0]:.1g} in {name}" for name in ("float16", "bfloat16")]
    print(f"   -> {numbers[0]:g} becomes {', '.join(tiny)}; small steps are lost in "
          f"{' and '.join(lost)}")  # fmt: skip
    return stored


# --- 4. the scaler by hand ---------------------------------------------------------------------


class LossScaler:
    """GradScaler by hand, for one optimizer. `overflow` is None until unscale_ has looked."""

    def __init__(self, init_scale=2.0**16, growth=2.0, backoff=0.5, growth_interval=2000):
        self.S, self.growth, self.backoff = init_scale, growth, backoff
        self.interval, self.good, self.overflow = growth_interval, 0, None

    def get_scale(self):
        return self.S

    def scale(self, loss):
        return loss * self.S

    def unscale_(self, optimizer):
        """Divide all gradients of the optimizer by S; self.overflow: is a number inf or nan?

        A parameter whose gradient is None is left out. Exercise.
        """
        self.overflow = False
        for group in optimizer.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    w.grad /= self.S
                    self.overflow |= not w.grad.isfinite().all().item()

    def step(self, optimizer):
        if self.overflow is None:
            self.unscale_(optimizer)
        if not self.overflow:
            optimizer.step()

    def update(self):
        """Overflow: S times backoff, self.good = 0. Otherwise self.good counts the step, and at
        self.interval S is multiplied by growth and self.good starts anew at 0.

        self.overflow is None afterwards. Exercise.
        """
        self.good = 0 if self.overflow else self.good + 1
        if self.overflow:
            self.S *= self.backoff
        elif self.good == self.interval:
            self.S, self.good = self.S * self.growth, 0
        self.overflow = None


def life(scaler, steps, overflow_at):
    """S before each step, whether it was taken, and the last weights; inputs are inf at times."""
    model, scales, taken = nn.Linear(3, 1, bias=False), [], []
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(steps):
        before, x = model.weight.clone(), torch.full((1, 3), math.inf if i in overflow_at else 1.0)
        scales.append(scaler.get_scale())
        amp_step(model, x, torch.zeros(1, 1), F.mse_loss, optimizer, scaler, torch.float32)
        taken.append(not torch.equal(before, model.weight))
    return scales, taken, model.weight.detach()


def show_scaler(log_dir, interval=3, steps=14, overflow_at=(4, 5)):
    bad = " and ".join(map(str, overflow_at))
    print(f"4. How does S move? It starts at 2^16 and doubles after {interval} good steps")
    print(f"   (the gradients of steps {bad} are inf; a column shows S before that step)")
    print("   step           " + "".join(f"{i:5}" for i in range(steps)))
    ours = LossScaler(growth_interval=interval)
    theirs, lives = torch.amp.GradScaler("cpu", growth_interval=interval), {}
    for name, scaler in (("ours", ours), ("torch", theirs)):
        scales, taken, _ = lives[name] = life(scaler, steps, overflow_at)
        logs = [math.log2(S) for S in scales]
        draw(log_dir / name, {"amp/log2_scale": logs, "amp/step_taken": taken})
        print(f"   {name:<5}   log2 S " + "".join(f"{S:5.0f}" for S in logs))
        print(f"   {name:<5}   skipped" + "".join("     " if t else "  yes" for t in taken))
    assert lives["ours"][:2] == lives["torch"][:2]
    assert torch.equal(lives["ours"][2], lives["torch"][2])
    skipped = len(taken) - sum(taken)
    print(f"   -> {skipped} steps are skipped, each halves S; log2 S ends at {logs[-1]:.0f}")
    return lives["torch"][:2]


# --- 5. training -------------------------------------------------------------------------------


def pixel_loss(z, t, pixels=2**27):
    """The share of these logits z (B, 4) in a mean over 128 images of 1024 x 1024 pixels.

    Cross-entropy's slope along a logit is between -1 and 1, so here it is at most 2^-27.
    """
    return F.cross_entropy(z, t, reduction="sum") / pixels


def classifier(width=64):
    """A network (B, 16) -> (B, 4)."""
    first = nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width), nn.SiLU())
    hidden = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU())
    return nn.Sequential(first, hidden, nn.Linear(width, 4))


def fit(model, batches, dtype, scaled, lr=2e-4):
    """amp_step with Adam for each batch (x, t): the mean loss of a pixel in each step, a list."""
    optimizer = torch.optim.Adam(model.parameters(), lr, eps=1e-16)  # far below the gradients
    scaler, losses = torch.amp.GradScaler("cpu", enabled=scaled), []
    for x, t in batches:
        loss, _ = amp_step(model, x, t, pixel_loss, optimizer, scaler, dtype)
        losses.append(loss * 2**27 / len(t))
    return losses


def show_training(log_dir, steps, B=128):
    print(f"5. What is learned in {steps} steps of Adam, if the loss is a mean over 2^27 pixels?")
    print("   (Adam's eps is 1e-16: its default, 1e-8, is of the size of these gradients)")
    print("                      on new examples     weights")
    print("   run                  loss   accuracy   share moved   largest distance from float32's")
    teacher, start, ends, last = classifier(), classifier(), {}, {}
    with torch.no_grad():
        teacher[-1].weight *= 8
        x = torch.randn(steps + 16, B, 16)
        t = teacher(x).argmax(-1)
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for name, dtype, weights, scaled, n in (
        ("not trained", f32, f32, False, 0),
        ("float32", f32, f32, False, steps),
        ("bfloat16", bf16, f32, False, steps),
        ("bfloat16_weights", bf16, bf16, False, steps),
        ("float16", f16, f32, False, steps),
        ("float16_scaled", f16, f32, True, steps),
    ):
        model = copy.deepcopy(start).to(weights)
        before = parameters_to_vector(model.parameters()).detach()
        batches = tqdm(list(zip(x[:n].to(weights), t[:n], strict=True)), disable=None, leave=False)
        losses = fit(model, batches, dtype, scaled)
        if losses:
            draw(log_dir / name, {"train/loss": losses})
        last[name] = parameters_to_vector(model.parameters()).detach()
        moved = (last[name] != before).float().mean().item()
        with torch.no_grad():
            z = model.float()(x[steps:].flatten(0, 1))
        right = (z.argmax(1) == t[steps:].flatten()).float().mean().item()
        ends[name] = F.cross_entropy(z, t[steps:].flatten()).item(), right, moved
    for name in ends:
        ends[name] += ((last[name] - last["float32"]).abs().max().item(),)
        print("   {:<16}   {:6.4f}   {:8.3f}   {:11.3f}   {:31.5f}".format(name, *ends[name]))
    gap, low = abs(ends["float16_scaled"][0] - ends["float32"][0]), ends["bfloat16_weights"]
    print(f"   -> float16 alone moved {ends['float16'][2]:.0%} of the weights; scaled, its loss is "
          f"{gap:.0e} away from float32's")  # fmt: skip
    print(f"   -> weights in bfloat16: loss {low[0]:.4f}, and {1 - low[2]:.0%} of them are where "
          "they began; keep 32 bits")  # fmt: skip
    return ends


def main(seed=0, log_dir=LOG_DIR, batch=1024, width=256, train_steps=400):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = {"everyday": show_everyday(), "reasons": show_reasons(batch, width, device)}
    measured["formats"] = show_formats()
    measured["life"] = show_scaler(log_dir)
    measured["training"] = show_training(log_dir, train_steps)
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
