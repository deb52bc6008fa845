"""A clock that does not wait for the GPU measures how fast Python queues work, not the work.

    model.cuda()                      parameters and buffers to the GPU, in place
    x, y = x.cuda(), y.cuda()         every batch, as copies: train_epoch says .to("cuda")
    torch.cuda.synchronize()          before each reading of the clock

These lines are all that a GPU asks for; the loop, the optimizer and the evaluation are train.py's.
A CUDA call returns as soon as its kernel is queued, so a bare perf_counter() stops too early, and
the first batch pays for what is loaded and chosen once: both are kept apart here.

Needs CUDA

Checked here   the first loss is the CPU's; seconds with and without waiting; the first batch apart;
               validation accuracy
TensorBoard    train/loss, val/accuracy, perf/images_per_second, in a run named by its time
Try            .cuda() on the batches but not on the model: what happens? An error, no silent copy
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
from torch.utils.tensorboard import SummaryWriter

from model import Moli
from support.checkpoints import check_finite
from support.data import channel_stats, load_splits, source_line
from support.files import DATASET2, DataError, guard
from train import evaluate, make_loader, make_optimizer, train_epoch

LOG_DIR = Path(__file__).resolve().parent / "runs" / "train_gpu_1"


def seconds(work, wait=True):
    """How long work() takes: until it is done, or, with wait=False, until Python has queued it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if wait:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed_epoch(model, loader, optimizer, scheduler):
    """Losses of all steps (T,) on the CPU, seconds of the first step, seconds of the others."""
    batches, losses = iter(loader), []

    def train(some):
        losses.append(train_epoch(model, some, optimizer, scheduler, "cuda")[0])

    first = seconds(lambda: train([next(batches)]))
    rest = seconds(lambda: train(batches))
    return torch.cat(losses), first, rest


def main(
    seed=0, log_dir=LOG_DIR, root=DATASET2, epochs=2, batch_size=64, lr=0.1, limit=None, size=2048
):
    if not torch.cuda.is_available():
        raise DataError("no CUDA GPU: train_gpu_2.py runs on any device, train.py on the CPU")
    torch.manual_seed(seed)
    print(f"1. twenty products of {torch.cuda.get_device_name()}, timed")
    a = torch.randn(size, size).cuda()
    seconds(lambda: a @ a)  # the first one loads the library
    queued, done = (seconds(lambda: [a @ a for _ in range(20)], wait) for wait in (False, True))
    print(f"   without waiting / with waiting {queued / done:.3f}")

    splits, train_set = load_splits(root, limit, seed)
    print(source_line(train_set))
    stats = channel_stats(splits["train"][0])
    model = Moli().to(memory_format=torch.channels_last)

    print("2. loss of the first images")
    val_loader = make_loader(*splits["val"], stats)
    x, y = next(iter(val_loader))
    on_cpu = F.cross_entropy(model.eval()(x), y).item()
    model.cuda()
    on_cuda = F.cross_entropy(model(x.cuda()), y.cuda()).item()
    print(f"   CPU {on_cpu:.4f}   GPU {on_cuda:.4f}")
    assert abs(on_cpu - on_cuda) < 1e-2  # TF32 convolutions keep 10 bits

    print("3. training, the batches made on the CPU")
    loader = make_loader(*splits["train"], stats, batch_size, train=True)
    steps = len(loader)
    if steps < 2:
        raise DataError("the first batch is timed apart, and there is no other: a larger limit?")
    optimizer, scheduler = make_optimizer(model, lr, epochs * steps)
    run = f"{datetime.now():%Y%m%d-%H%M%S}"
    with SummaryWriter(log_dir / run, purge_step=0) as writer:
        for epoch in range(epochs):
            losses, first, rest = timed_epoch(model, loader, optimizer, scheduler)
            check_finite(losses, (epoch + 1) * steps)
            val_loss, accuracy, _ = evaluate(model, val_loader, "cuda")
            check_finite(val_loss, (epoch + 1) * steps, "validation ")
            speed = (steps - 1) * batch_size / rest
            for i, loss in enumerate(losses, start=epoch * steps + 1):
                writer.add_scalar("train/loss", loss, i)
            writer.add_scalar("val/accuracy", accuracy, (epoch + 1) * steps)
            writer.add_scalar("perf/images_per_second", speed, (epoch + 1) * steps)
            timing = f"first batch {first:.2f} s, then {speed:,.0f} images/s"
            print(f"   epoch {epoch + 1}   train loss {losses.mean():.3f}   "
                  f"val loss {val_loss:.3f}   accuracy {accuracy:.3f}   ({timing})")  # fmt: skip
    return {"on_cpu": on_cpu, "on_cuda": on_cuda, "val_accuracy": accuracy, "queued": queued / done}


if __name__ == "__main__":
    guard(main)
