"""A small network leaves a GPU idle: what counts is to feed it without ever waiting for it.

    uint8 on the device     the set is moved once; shuffling, augmentation, normalisation run there
    bfloat16 autocast       convolutions in half the bits, where that is faster (not on the CPU)
    channels_last           the order of memory that convolutions read fastest
    no .item() in a step    each would make Python wait; losses stay on the device for an epoch

`.to(device)` is the one word that a device needs, and "cpu" is a device too: this file runs
anywhere. All else is train.py's. --batch-size fills the chip, its --lr scaled with it; --compile
fuses small kernels, but compiling takes time first: compare the runs.

Checked here   every loss is finite; accuracy on validation images each epoch, on test images at the
               end; images/s between two waits for the device
TensorBoard    train/loss, val/accuracy, perf/images_per_second in a run named by time and device
Try            .item() on every loss: is it slower? On a GPU yes; the CPU has nothing to wait for
Source         PyTorch tutorials, "Performance Tuning Guide" and "Channels Last Memory Format"
"""

import copy
import signal
import time
from datetime import datetime
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from model import Moli
from support.checkpoints import check_finite
from support.data import augment, channel_stats, load_splits, normalize, source_line
from support.files import DATASET2, DataError, guard
from support.options import pick_device, training_parser
from train import evaluate, make_loader, make_optimizer, train_epoch

LOG_DIR = Path(__file__).resolve().parent / "runs" / "train_gpu_2"


def synchronize(device):
    """Wait until the device has done all that was queued; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pays_autocast(device):
    """Whether bfloat16 convolutions are faster there: on a GPU that has them, not on the CPU."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compiled(model, device):
    """torch.compile(model). Raises DataError where it cannot work, say without a C++ compiler."""
    try:  # on a copy: the first call compiles, and moves the statistics of batch norm
        trial = torch.compile(copy.deepcopy(model))
        trial(torch.zeros(2, 3, 32, 32, device=device)).sum().backward()
    except Exception as error:  # each backend has its own way to say no
        why = " ".join(str(error).split())[:120]
        raise DataError(f"--compile does not work here: {type(error).__name__}: {why}") from error
    return torch.compile(model)


class Autocast(nn.Module):
    """The model with its forward pass in bfloat16 where `enabled`; logits are float32 again."""

    def __init__(self, model, device, enabled):
        super().__init__()
        self.model, self.device, self.enabled = model, device, enabled

    def forward(self, x):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled):
            return self.model(x).float()


def device_batches(images, labels, stats, batch_size):
    """Shuffled, augmented, normalised batches (x, y), made on the device where the images lie."""
    order = torch.randperm(len(images), device=images.device)
    for places in order.split(batch_size)[: len(images) // batch_size]:
        yield normalize(augment(images[places]), *stats), labels[places]


def main(
    seed=0, log_dir=LOG_DIR, root=DATASET2, device="auto",
    epochs=5, batch_size=256, lr=0.2, limit=None, compile=False,
):  # fmt: skip
    device = pick_device(device)
    torch.manual_seed(seed)
    splits, train_set = load_splits(root, limit, seed)
    print(source_line(train_set))
    splits = {name: [t.to(device) for t in split] for name, split in splits.items()}
    stats = [t.to(device) for t in channel_stats(splits["train"][0].cpu())]
    model = Moli().to(device, memory_format=torch.channels_last)
    autocast = pays_autocast(device)
    forward = Autocast(compiled(model, device) if compile else model, device, autocast)
    batch_size = min(batch_size, len(splits["train"][0]))
    steps = len(splits["train"][0]) // batch_size
    optimizer, scheduler = make_optimizer(model, lr, epochs * steps)

    print(
        f"1. training on {device}, autocast {'on' if autocast else 'off'}, {steps} steps an epoch"
    )
    speeds = []
    run = f"{datetime.now():%Y%m%d-%H%M%S}-{device.type}"
    with SummaryWriter(log_dir / run, purge_step=0) as writer:
        for epoch in range(epochs):
            synchronize(device)
            start = time.perf_counter()
            batches = device_batches(*splits["train"], stats, batch_size)
            losses, _ = train_epoch(forward, batches, optimizer, scheduler, device)
            synchronize(device)
            speeds.append(steps * batch_size / (time.perf_counter() - start))
            check_finite(losses, (epoch + 1) * steps)
            val_loss, accuracy, _ = evaluate(model, make_loader(*splits["val"], stats), device)
            check_finite(val_loss, (epoch + 1) * steps, "validation ")
            for i, loss in enumerate(losses, start=epoch * steps + 1):
                writer.add_scalar("train/loss", loss, i)
            writer.add_scalar("val/accuracy", accuracy, (epoch + 1) * steps)
            writer.add_scalar("perf/images_per_second", speeds[-1], (epoch + 1) * steps)
            print(f"   epoch {epoch + 1:2d}   train loss {losses.mean():.3f}   "
                  f"val loss {val_loss:.3f}   val accuracy {accuracy:.3f}   "
                  f"({speeds[-1]:,.0f} images/s)")  # fmt: skip

    test_loss, test_accuracy, _ = evaluate(model, make_loader(*splits["test"], stats), device)
    check_finite(test_loss, epochs * steps, "test ")
    print("2. test images, seen once")
    print(f"   loss {test_loss:.3f}   accuracy {test_accuracy:.3f}")
    later = speeds[1:] or speeds
    return {"val_accuracy": accuracy, "test_accuracy": test_accuracy,
            "images_per_second": sum(later) / len(later)}  # fmt: skip


def parse(argv=None):
    """The given options alone, as a dict for main. Wrong ones end with status 2."""
    parser = training_parser(batch_size=256, lr=0.2, device="auto")
    parser.add_argument("--compile", action="store_true", help="fuse kernels by torch.compile")
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    guard(main, parse)
