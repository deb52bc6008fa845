"""A clock that does not wait for the GPU measures how fast Python hands out work, not the work.

An NVIDIA GPU works through a queue. A call on tensors that lie on it, such as a @ b, returns as
soon as its work stands in that queue. A clock that is read right then stops too early, and the
speed that comes out is higher than the GPU can reach. The loop is that of train.py; nearly all
that is new is that the model and each batch are moved:

    model.cuda()                moves the parameters and buffers of the model itself to the GPU
    x = x.cuda()                makes a copy of x on the GPU; each batch needs it
    y.tolist()                  brings numbers back to Python, and waits until y is computed
    torch.cuda.synchronize()    waits until the queue is empty: before each reading of a clock

In the first step of a training the GPU's programs (kernels) are loaded and chosen. The first batch
of each epoch is therefore timed apart from the others.

Needs          CUDA
               and train.py (the loop). Without a CUDA GPU it ends with one line and status 1
Checked here   the clock against marks in the GPU's queue (events); the first loss on the GPU = the
               CPU's within 0.01; validation accuracy after each epoch
TensorBoard    in a run named by its time: train/loss falls with the steps; after each epoch one
               point of val/accuracy and of perf/images_per_second, without its first step
Try            in show_everyday, leave out model.cuda(): what happens?
Answer         It ends with RuntimeError: Expected all tensors to be on the same device. Nothing is
               copied without being told: the weights lie on the CPU, and x_there on the GPU
Source         PyTorch notes, "CUDA semantics": asynchronous execution
"""

import signal
import time
from datetime import datetime
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from model import Moli
from support.checkpoints import check_finite
from support.data import channel_stats, load_splits, source_line
from support.files import DATASET2, DataError, guard
from train import evaluate, make_loader, make_optimizer, train_epoch

LOG_DIR = Path(__file__).resolve().parent / "runs" / "train_gpu_1"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    model.cuda()  # the model itself moves: its weights now lie on the GPU
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x_there = x.cuda()  # a copy on the GPU; x stays
    y = model(x_there)  # computed on the GPU, and lies there
    numbers = y.tolist()  # numbers for Python: waits for the GPU
    print(f"1. Where do things lie after .cuda()? The GPU is {torch.cuda.get_device_name()}")
    print("   name           device    value")
    for name, device, value in (
        ("model.weight", model.weight.device, "1 1"), ("x", x.device, "rows 1 2 and 3 4"),
        ("x_there", x_there.device, "rows 1 2 and 3 4"),
        ("y", y.device, " and ".join(f"{row[0]:.0f}" for row in numbers)),
    ):  # fmt: skip
        print(f"   {name:<14} {device!s:<9} {value}")
    print(f"   -> x stays on {x.device}: what the model gets is a copy on {x_there.device}")
    return numbers


# --- 2. which clock is right -------------------------------------------------------------------


def seconds(work, wait=True):
    """How long work() takes by time.perf_counter(): until the GPU is done, or until it is queued.

    torch.cuda.synchronize() stands before the first reading, so that no older work is counted, and
    with `wait` also before the second one. Exercise.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if wait:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def event_seconds(work):
    """The same by two marks in the queue of the GPU, which it stamps when it comes to them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000  # it tells milliseconds


def show_clocks(size, k=20):
    a = torch.randn(size, size).cuda()

    def products():
        for _ in range(k):
            a @ a

    seconds(products)  # the first ones load the library
    times = {
        "without waiting": seconds(products, wait=False),
        "after torch.cuda.synchronize()": seconds(products),
        "torch.cuda.Event, in the queue": event_seconds(products),
    }
    print(f"2. Which clock is right? {k} products of {size} x {size} matrices")
    print("   A product takes size^3 multiplications and as many additions. TFLOP/s: how many")
    print("   million million of both there would be in a second, were the clock right")
    print("   clock                            milliseconds   TFLOP/s by this clock")
    for words, took in times.items():
        print(f"   {words:<32} {1000 * took:12.3f}   {2 * size**3 * k / took / 1e12:21.1f}")
    queued, done, by_event = times.values()
    print(f"   -> without waiting the clock shows {queued / done:.0%} of the time that it shows")
    print(f"      with waiting, which is {done / by_event:.0%} of what the events show")
    return {"queued": queued / done, "done": done / by_event}


# --- 3. the same loss --------------------------------------------------------------------------


def losses_on_both(model, x, y):
    """Cross-entropy of images x (B, 3, H, W), classes y: on the CPU, then on the GPU, two floats.

    In eval mode; the model, at first on the CPU, is on the GPU afterwards, by .cuda(). Exercise.
    """
    on_cpu = F.cross_entropy(model.eval()(x), y).item()
    model.cuda()
    return on_cpu, F.cross_entropy(model(x.cuda()), y.cuda()).item()


def show_same_loss(model, x, y):
    on_cpu, on_cuda = losses_on_both(model, x, y)
    print(f"3. Is the loss of {len(y)} images the same on both?")
    print("   on the CPU   on the GPU   difference")
    print(f"   {on_cpu:10.4f}   {on_cuda:10.4f}   {abs(on_cuda - on_cpu):10.4f}")
    print(f"   -> they are {abs(on_cuda - on_cpu):.4f} apart; a GPU may round what a convolution")
    print("      multiplies to 10 binary digits behind the point (TF32)")
    assert abs(on_cpu - on_cuda) < 1e-2
    return {"on_cpu": on_cpu, "on_cuda": on_cuda}


# --- 4. training -------------------------------------------------------------------------------


def timed_epoch(model, loader, optimizer, scheduler):
    """One train_epoch on "cuda" in two calls: the first batch of the loader, then all others.

    Returns the losses of all steps (T,) and what `seconds` says of the one and of the others.
    Exercise.
    """
    batches, losses = iter(loader), []

    def train(some):
        losses.append(train_epoch(model, some, optimizer, scheduler, "cuda")[0])

    first = seconds(lambda: train([next(batches)]))
    rest = seconds(lambda: train(batches))
    return torch.cat(losses), first, rest


def show_training(log_dir, model, loader, val_loader, epochs, batch_size, lr):
    steps = len(loader)
    if steps < 2:
        raise DataError("the first batch is timed apart, and there is no other: a larger limit?")
    optimizer, scheduler = make_optimizer(model, lr, epochs * steps)
    print("4. How fast does it train? Batches are made on the CPU. first, ms: milliseconds of the")
    print("   epoch's first batch; others, ms: of each other batch; images/s: of the others")
    print("   epoch   train loss   val loss   val accuracy   first, ms   others, ms   images/s")
    ratios = []  # how many times the others' time the first batch took, by epoch
    run = f"{datetime.now():%Y%m%d-%H%M%S}"
    with SummaryWriter(log_dir / run, purge_step=0) as writer:
        for epoch in range(1, epochs + 1):
            losses, first, rest = timed_epoch(model, loader, optimizer, scheduler)
            check_finite(losses, epoch * steps)
            val_loss, accuracy, _ = evaluate(model, val_loader, "cuda")
            check_finite(val_loss, epoch * steps, "validation ")
            later = rest / (steps - 1)
            ratios.append(first / later)
            for step, loss in enumerate(losses, start=(epoch - 1) * steps + 1):
                writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("val/accuracy", accuracy, epoch * steps)
            writer.add_scalar("perf/images_per_second", batch_size / later, epoch * steps)
            print(f"   {epoch:5}   {losses.mean():10.3f}   {val_loss:8.3f}   {accuracy:12.3f}   "
                  f"{1000 * first:9.1f}   {1000 * later:10.1f}   "
                  f"{batch_size / later:8,.0f}")  # fmt: skip
    last = f", in epoch {epochs} {ratios[-1]:.1f} times" if epochs > 1 else ""
    print(f"   -> in epoch 1 the first batch took {ratios[0]:.1f} times as long as another{last};")
    print(f"      {accuracy:.1%} of the validation images are right")
    return {"val_accuracy": accuracy, "first_to_others": ratios}


def main(
    seed=0, log_dir=LOG_DIR, root=DATASET2, epochs=2, batch_size=64, lr=0.1, limit=None, size=2048
):
    if not torch.cuda.is_available():
        raise DataError(
            "no CUDA GPU: one would show how far a clock that does not wait for it is wrong; "
            "train_gpu_2.py runs on any device"
        )
    torch.manual_seed(seed)
    splits, train_set = load_splits(root, limit, seed)
    print(source_line(train_set))
    stats = channel_stats(splits["train"][0])
    loader = make_loader(*splits["train"], stats, batch_size, train=True)
    val_loader = make_loader(*splits["val"], stats)
    model = Moli().to(memory_format=torch.channels_last)
    measured = {"everyday": show_everyday(), **show_clocks(size)}
    measured |= show_same_loss(model, *next(iter(val_loader)))
    measured |= show_training(log_dir, model, loader, val_loader, epochs, batch_size, lr)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
