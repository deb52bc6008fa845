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

import argparse
import time
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from dataset_transform import channel_stats, source_line
from model import Moli
from sample_data import DATASET2
from train import (
    check_finite,
    evaluate,
    load_data,
    make_optimizer,
    number,
    ordered_batches,
    training_batches,
)

LOG_DIR = Path(__file__).resolve().parent / "runs" / "train_gpu_2"


def best_device():
    """The accelerator that is there, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def pick_device(name):
    """The device of that name, "auto" being the best. Raises SystemExit if it is not there."""
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend has its own way
        found = f"{best_device()} and cpu" if best_device().type != "cpu" else "cpu"
        raise SystemExit(f"no device {name!r} here; there is {found}") from error
    return device


def synchronize(device):
    """Wait until the device has done all that was queued; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pays_autocast(device):
    """Whether bfloat16 convolutions are faster there: on a GPU that has them, not on the CPU."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def queue_epoch(model, batches, optimizer, scheduler, autocast):
    """train.train_epoch under autocast. Returns all losses (T,) on the device, waiting for none."""
    model.train()
    losses = []
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def main(
    seed=0, log_dir=LOG_DIR, root=DATASET2, device="auto",
    epochs=5, batch_size=256, lr=0.2, limit=None, compile=False,
):  # fmt: skip
    device = pick_device(device)
    torch.manual_seed(seed)
    splits, train_set = load_data(root, limit, seed)
    print(source_line(train_set))
    splits = {name: [t.to(device) for t in split] for name, split in splits.items()}
    stats = [t.to(device) for t in channel_stats(splits["train"][0].cpu())]
    model = Moli().to(device, memory_format=torch.channels_last)
    forward = torch.compile(model) if compile else model
    batch_size = min(batch_size, len(splits["train"][0]))
    steps = len(splits["train"][0]) // batch_size
    optimizer, scheduler = make_optimizer(model, lr, epochs * steps)
    autocast = pays_autocast(device)

    print(
        f"1. training on {device}, autocast {'on' if autocast else 'off'}, {steps} steps an epoch"
    )
    speeds = []
    run = f"{datetime.now():%Y%m%d-%H%M%S}-{device.type}"
    with SummaryWriter(log_dir / run, purge_step=0) as writer:
        for epoch in range(epochs):
            synchronize(device)
            start = time.perf_counter()
            batches = training_batches(*splits["train"], stats, batch_size)
            losses = queue_epoch(forward, batches, optimizer, scheduler, autocast)
            synchronize(device)
            speeds.append(steps * batch_size / (time.perf_counter() - start))
            losses = losses.cpu()
            check_finite(losses.sum().item(), f"in epoch {epoch + 1}")
            val_loss, accuracy, _ = evaluate(model, ordered_batches(*splits["val"], stats))
            for i, loss in enumerate(losses, start=epoch * steps + 1):
                writer.add_scalar("train/loss", loss, i)
            writer.add_scalar("val/accuracy", accuracy, (epoch + 1) * steps)
            writer.add_scalar("perf/images_per_second", speeds[-1], (epoch + 1) * steps)
            print(f"   epoch {epoch + 1:2d}   train loss {losses.mean():.3f}   "
                  f"val loss {val_loss:.3f}   val accuracy {accuracy:.3f}   "
                  f"({speeds[-1]:,.0f} images/s)")  # fmt: skip

    test_loss, test_accuracy, _ = evaluate(model, ordered_batches(*splits["test"], stats))
    print("2. test images, seen once")
    print(f"   loss {test_loss:.3f}   accuracy {test_accuracy:.3f}")
    later = speeds[1:] or speeds
    return {"val_accuracy": accuracy, "test_accuracy": test_accuracy,
            "images_per_second": sum(later) / len(later)}  # fmt: skip


def parse(argv=None):
    """The given options alone, as a dict for main. Wrong ones end with status 2."""
    parser = argparse.ArgumentParser(
        description="Train Moli on any device, fast.", argument_default=argparse.SUPPRESS
    )
    whole = number(int, 1)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps, xpu … (auto)")
    parser.add_argument("--epochs", type=whole, help="passes over the training images (5)")
    parser.add_argument("--batch-size", type=whole, help="images a step (256)")
    parser.add_argument("--lr", type=number(float, 1e-12), help="the largest learning rate (0.2)")
    parser.add_argument("--seed", type=number(int, 0), help="seed of all that is random (0)")
    parser.add_argument("--limit", type=whole, help="only the first so many images")
    parser.add_argument("--compile", action="store_true", help="fuse kernels by torch.compile")
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        main(**parse())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
