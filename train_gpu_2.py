"""One script trains on any device, and what feeds a GPU faster leaves the loss as it is.

A GPU often computes a small network faster than Python can hand it images: it waits, and is idle.
These changes to a plain loop keep it busy:

    channels_last      an image lies in memory pixel by pixel: the order that convolutions read
    uint8 batches      a batch is cut from one tensor of all images, not made image by image
    on the device      that tensor is moved there once; batches are made where they are used
    larger batches     fewer and longer steps: --batch-size, and an --lr that grows with it
    autocast           convolutions in bfloat16: 16 bits, 8 of them for its digits, not 24; section
                       3 uses it on CUDA, and anywhere with --autocast
    --compile          torch.compile fuses small steps into larger ones, and first takes its time

The loop itself, its optimizer and its evaluation are those of train.py. No step asks for a number
of the device, as loss.item() would: Python would wait, and the device would idle after that.

Needs          train.py (the loop), dataloader.py. No GPU is needed: --device takes cpu, too
Checked here   with every trick the logits, the outputs before softmax, are those of the plain loop
               within 0.01; every loss is finite; accuracy on validation, at the end on test images
TensorBoard    train/loss by step, val/accuracy, perf/images_per_second after each epoch, and
               tricks/images_per_second by row of section 2, in a run named by time and device
Try            in Autocast.forward, leave out .float(): what becomes of the loss of that row?
Answer         It is a multiple of 0.01: cross_entropy sums 200 losses to about 460 in bfloat16,
               and between 256 and 512 a number with 8 digits in base 2 is a multiple of 2
Source         PyTorch tutorials, "Performance Tuning Guide" and "Channels Last Memory Format"
"""

import copy
import signal
import time
from datetime import datetime
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from model import Moli
from support.checkpoints import check_finite
from support.data import augment, channel_stats, load_splits, normalize, open_images, source_line
from support.files import DATASET2, DataError, guard
from support.options import pick_device, training_parser
from train import evaluate, make_loader, make_optimizer, train_epoch

LOG_DIR = Path(__file__).resolve().parent / "runs" / "train_gpu_2"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(chosen):
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = chosen or device  # --device may name another than the best one here
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    model.to(device)  # a model is moved itself: its parameters now lie there
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x_there = x.to(device)  # a tensor stays where it is: this is a copy, unless x is there
    y = model(x_there)  # computed there, and lies there
    back = y.tolist()  # numbers for Python: waits until y is computed
    print(f"1. Where do things lie after .to(device)? device = {device}")
    print("   name           device    value")
    print(f"   model.weight   {model.weight.device!s:<9} 1 1")
    print(f"   x              {x.device!s:<9} rows 1 2 and 3 4")
    print(f"   x_there        {x_there.device!s:<9} rows 1 2 and 3 4")
    print(f"   y              {y.device!s:<9} {back[0][0]:.0f} and {back[1][0]:.0f}")
    same = "is x itself, as x was there" if x_there is x else "is a copy of x"
    print(f"   -> x_there {same}; the model and what it gets must lie on one device")
    return {"y": back, "device": y.device.type}


# --- 2. what each trick does -------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done all that was queued; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_batches(images, labels, stats, batch_size):
    """Yield batches (x, y) of all images (N, 3, H, W) uint8 in a random order, on their device.

    x is augment of the images as they are, then normalize(..., *stats). A last batch that would be
    smaller is left out. Exercise.
    """
    order = torch.randperm(len(images), device=images.device)
    for places in order.split(batch_size)[: len(images) // batch_size]:
        yield normalize(augment(images[places]), *stats), labels[places]


class Autocast(nn.Module):
    """A model whose forward pass is in bfloat16 where that is faster; logits are float32 again."""

    def __init__(self, model, device, enabled=True):
        super().__init__()
        self.model, self.device, self.enabled = model, device, enabled

    def forward(self, x):
        """float32 logits: those of self.model(x) under torch.autocast for bfloat16.

        Of the type of self.device, and enabled only if self.enabled is true. Exercise.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled):
            return self.model(x).float()


def compiled(model, device):
    """torch.compile(model). Raises DataError where it cannot work, say without a C++ compiler."""
    try:  # on a copy: the first call compiles, and moves the statistics of batch norm
        trial = torch.compile(copy.deepcopy(model))
        trial(torch.zeros(2, 3, 32, 32, device=device)).sum().backward()
    except Exception as error:  # each backend has its own way to say no
        why = " ".join(str(error).split())[:120]
        raise DataError(f"--compile does not work here: {type(error).__name__}: {why}") from error
    return torch.compile(model)


def speed(model, batches, device, images):
    """Images a second in training steps on about `images` of them, by train_epoch.

    The first batch of `batches` is a step of its own that is not timed: it loads and chooses what
    the others use. Then come as many batches as `images` makes, one at least, between two readings
    of time.perf_counter(), each of which follows a synchronize(device). The optimizer is
    make_optimizer(model, 0.01, 10_000). Exercise.
    """
    optimizer, scheduler = make_optimizer(model, 0.01, 10_000)
    batches = iter(batches)
    first = next(batches)
    train_epoch(model, [first], optimizer, scheduler, device)
    B = len(first[1])
    synchronize(device)
    start = time.perf_counter()
    batches = islice(batches, max(1, images // B))
    losses, _ = train_epoch(model, batches, optimizer, scheduler, device)
    synchronize(device)
    return len(losses) * B / (time.perf_counter() - start)


def plain_loader(root, stats):
    """Batches of 64 as most loops begin: each image is converted and normalised by itself."""
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*map(list, stats))]
    dataset = open_images(root, transform=v2.Compose(steps))
    return DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)


@torch.no_grad()
def logits(model, batches, device):
    """The model's outputs for all batches (x, y), in eval mode, on the CPU: (N, 10)."""
    return torch.cat([model.eval()(x.to(device)).float().cpu() for x, _ in batches])


def show_tricks(root, splits, stats, device, batch_size, compile, images):
    """Table of the tricks, one more in each row; a row begins with the same weights."""
    (x, y), n = splits["train"], len(splits["train"][1]) // 2  # two batches at least
    small, large = min(64, n), min(batch_size, n)
    there = [t.to(device) for t in (x, y)], [t.to(device) for t in stats]
    start, last = Moli().to(device), Moli().to(device, memory_format=torch.channels_last)
    halves = Autocast(last, device)
    rows = [  # words, where it pays, model, batches
        ("plain loop, batches of 64", "-", start, plain_loader(root, stats)),
        ("channels_last", "any device", last, plain_loader(root, stats)),
        ("uint8 batches", "any device", last, device_batches(x, y, stats, small)),
        ("on the device", "GPUs", last, device_batches(*there[0], there[1], small)),
        (f"batches of {large}", "GPUs", last, device_batches(*there[0], there[1], large)),
        ("autocast", "GPUs, some CPUs", halves, device_batches(*there[0], there[1], large)),
    ]
    if compile:
        fused = Autocast(compiled(last, device), device)
        rows.append(("--compile", "GPUs", fused, device_batches(*there[0], there[1], large)))
    same = [(normalize(x[:200], *stats), y[:200])]
    saved = copy.deepcopy(start.state_dict())
    print(f"2. What does each trick do on {device}? Each row adds one to those above it")
    print("   Loss and logits are those of 200 images; off: from row 1, largest; gain: over row 1")
    print("   trick                       written for       loss   logits off   images/s   gain")
    losses, offs, speeds = [], [], []
    z = logits(start, same, device)
    for words, pays, model, batches in rows:
        (start if model is start else last).load_state_dict(saved)
        losses.append(evaluate(model, same, device)[0])
        offs.append((logits(model, same, device) - z).abs().max().item())
        speeds.append(speed(model, batches, device, images))
        print(f"   {words:<27} {pays:<15} {losses[-1]:6.4f} {offs[-1]:12.4f} {speeds[-1]:10,.0f} "
              f"{speeds[-1] / speeds[0]:6.1f}")  # fmt: skip
    if not compile:
        print("   --compile                   GPUs              not tried: give that option")
    fastest = rows[max(range(len(rows)), key=speeds.__getitem__)][0]
    off, gain = max(offs), max(speeds) / speeds[0]
    print(f"   -> no logit is off by more than {off:.4f}, the largest being {z.abs().max():.2f};")
    print(f'      the fastest row on this {device.type} is "{fastest}": {gain:.1f} times row 1')
    assert off < 0.01
    return {"losses": losses, "logits_off": offs, "speeds": speeds}


# --- 3. training with them ---------------------------------------------------------------------


def pays_autocast(device):
    """Whether it surely does: on CUDA, with bfloat16 in the chip. Section 2 tells of others."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def train(writer, splits, stats, device, epochs, batch_size, lr, autocast, compile):
    """Train by the loop of train.py, each epoch timed; then test. What was measured."""
    splits = {name: [t.to(device) for t in split] for name, split in splits.items()}
    stats = [t.to(device) for t in stats]
    model = Moli().to(device, memory_format=torch.channels_last)
    autocast = autocast or pays_autocast(device)
    forward = Autocast(compiled(model, device) if compile else model, device, autocast)
    steps = len(splits["train"][0]) // batch_size
    optimizer, scheduler = make_optimizer(model, lr, epochs * steps)
    how = f"batches of {batch_size}, autocast {'on' if autocast else 'off'}"
    print(f"3. How well does it learn? On {device}, {how}")
    print("   epoch   train loss   val loss   val accuracy   images/s")
    speeds = []
    for epoch in range(1, epochs + 1):
        synchronize(device)
        start = time.perf_counter()
        batches = device_batches(*splits["train"], stats, batch_size)
        losses, _ = train_epoch(forward, batches, optimizer, scheduler, device)
        synchronize(device)
        speeds.append(steps * batch_size / (time.perf_counter() - start))
        check_finite(losses, epoch * steps)
        val_loss, accuracy, _ = evaluate(model, make_loader(*splits["val"], stats), device)
        check_finite(val_loss, epoch * steps, "validation ")
        for step, loss in enumerate(losses, start=(epoch - 1) * steps + 1):
            writer.add_scalar("train/loss", loss, step)
        writer.add_scalar("val/accuracy", accuracy, epoch * steps)
        writer.add_scalar("perf/images_per_second", speeds[-1], epoch * steps)
        print(f"   {epoch:5}   {losses.mean():10.3f}   {val_loss:8.3f}   {accuracy:12.3f}   "
              f"{speeds[-1]:8,.0f}")  # fmt: skip
    test_loss, test_accuracy, said = evaluate(model, make_loader(*splits["test"], stats), device)
    check_finite(test_loss, epochs * steps, "test ")
    print(f"   -> of {len(said):,} test images, seen once, {test_accuracy:.1%} are named rightly")
    later = speeds[1:] or speeds  # the first epoch also pays for what is chosen once
    return {"val_accuracy": accuracy, "test_accuracy": test_accuracy, "test_loss": test_loss,
            "images_per_second": sum(later) / len(later)}  # fmt: skip


def main(
    seed=0, log_dir=LOG_DIR, root=DATASET2, device="auto",
    epochs=5, batch_size=256, lr=0.2, limit=None, autocast=False, compile=False, timed=None,
):  # fmt: skip
    device = pick_device(device)
    torch.manual_seed(seed)
    splits, train_set = load_splits(root, limit, seed)
    print(source_line(train_set))
    stats, n = channel_stats(splits["train"][0]), len(splits["train"][0])
    batch_size = min(batch_size, n)
    timed = timed or (1024 if device.type == "cpu" else n)  # images a row of section 2
    measured = {"everyday": show_everyday(device)}
    tricks = show_tricks(root, splits, stats, device, batch_size, compile, timed)
    run = f"{datetime.now():%Y%m%d-%H%M%S}-{device.type}"
    with SummaryWriter(log_dir / run, purge_step=0) as writer:
        for row, value in enumerate(tricks["speeds"], start=1):
            writer.add_scalar("tricks/images_per_second", value, row)
        torch.manual_seed(seed)  # whatever section 2 has drawn
        measured |= train(
            writer, splits, stats, device, epochs, batch_size, lr, autocast, compile)  # fmt: skip
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured | tricks


def parse(argv=None):
    """The given options alone, as a dict for main. Wrong ones end with status 2."""
    parser = training_parser(batch_size=256, lr=0.2, device="auto")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 on any device")
    parser.add_argument("--compile", action="store_true", help="fuse small steps by torch.compile")
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    guard(main, parse)
