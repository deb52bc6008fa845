"""One script trains on any device, and what makes it faster moves its outputs by less than 2 %.

A GPU computes a small network faster than Python can hand it images: it waits, and does nothing.
The lesson begins with a plain loop and adds one change after the other:

    channels_last     an image lies in memory pixel by pixel, the order that convolutions like
    uint8 batches     a batch is cut from one tensor of all images, not made image by image
    on the device     that tensor is moved to the device once; batches are made there
    larger batches    fewer and longer steps: --batch-size, with an --lr that grows with it
    autocast          convolutions in bfloat16: numbers of 16 bits with 8 binary digits, where
                      float32 has 24. Section 3 uses it on CUDA, elsewhere with --autocast
    --compile         torch.compile joins small steps into larger ones; the first step takes long

The loop is that of train.py. No step reads a number back from the device, as loss.item() does:
Python would wait for it, and the device would then wait for Python.

Needs          train.py (the loop), dataloader.py. No GPU is needed: --device cpu works everywhere
Checked here   how far each change moves the logits (outputs before softmax), as a share of the
               largest; images a second, read twice; finite losses; accuracy on unseen images
TensorBoard    in a run named by time and device: val/accuracy rises with the steps, train/loss
               falls; tricks/images_per_second shows one point for each row of section 2
Try            in Autocast.forward, leave out .float(): what becomes of the loss of that row?
Answer         It is a multiple of 0.01: cross_entropy sums 200 losses to about 460 in bfloat16,
               and between 256 and 512 a number of 8 binary digits is a multiple of 2
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
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm

from model import Moli
from support.checkpoints import check_finite
from support.data import (
    as_tensors,
    augment,
    channel_stats,
    load_splits,
    normalize,
    open_images,
    source_line,
)
from support.files import DATASET2, DataError, guard
from support.options import pick_device, training_parser
from train import evaluate, make_loader, make_optimizer, train_epoch

LOG_DIR = Path(__file__).resolve().parent / "runs" / "train_gpu_2"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(device):
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    model.to(device)  # a model is moved itself: its parameters now lie there
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x_there = x.to(device)  # a tensor stays where it is: this is a copy, unless x is there
    y = model(x_there)  # computed there, and lies there
    back = y.tolist()  # numbers for Python: waits until y is computed
    print(f"1. Where do things lie after .to(device)? The best device here is {best},")
    print(f"   and this run uses device = {device}")
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

    The first batch of `batches` is a step of its own that is not timed: in it the programs that the
    others use are loaded and chosen. Then come as many batches as `images` makes, one at least,
    between two readings of time.perf_counter(), each of which follows a synchronize(device). The
    optimizer is make_optimizer(model, 0.01, 10_000). Exercise.
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


def to_floats(stats):
    """The steps by which most loops make an image of a file a normalised tensor."""
    mean, std = map(list, stats)
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def plain_loader(root, stats):
    """Batches of 64 as most loops begin: each image is shifted, mirrored, converted by itself."""
    shift = v2.RandomCrop(32, padding=2, padding_mode="reflect")  # as augment does it
    steps = v2.Compose([shift, v2.RandomHorizontalFlip(), *to_floats(stats)])
    dataset = open_images(root, transform=steps)
    return DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)


@torch.no_grad()
def loss_and_logits(model, x, y, device):
    """In eval mode, for images x (N, 3, 32, 32) of classes y: the mean loss, and (N, 10)."""
    z = model.eval()(x.to(device))
    return F.cross_entropy(z, y.to(device), reduction="sum").item() / len(y), z.float().cpu()


def read_twice(rows, root, stats, device, images):
    """For each row two readings of speed; all rows once, then again, from the same weights."""
    readings, starts = [], [copy.deepcopy(row[2].state_dict()) for row in rows]
    for row, weights in tqdm([*zip(rows, starts, strict=True)] * 2, leave=False, disable=None):
        _, _, model, cut, _ = row
        model.load_state_dict(weights)
        batches = device_batches(*cut) if cut else plain_loader(root, stats)
        readings.append(speed(model, batches, device, images))
        model.load_state_dict(weights)
    return list(zip(readings[: len(rows)], readings[len(rows) :], strict=True))


def show_tricks(root, splits, stats, device, batch_size, compile, images):
    (x, y), n = splits["train"], len(splits["train"][1]) // 2  # two batches at least
    small, large = min(64, n), min(batch_size, n)
    there = x.to(device), y.to(device), [t.to(device) for t in stats]
    dataset = open_images(root, transform=v2.Compose(to_floats(stats)))
    x200, y200 = (t[:200] for t in as_tensors(dataset))  # to compare the logits
    one_by_one = torch.stack([dataset[i][0] for i in range(len(x200))])
    at_once = normalize(x200.to(device), *there[2])
    start, last = Moli().to(device), Moli().to(device, memory_format=torch.channels_last)
    last.load_state_dict(start.state_dict())
    rows = [  # trick, made for, model, what is cut (None: the plain loop), images to compare
        ("plain loop, batches of 64", "-", start, None, one_by_one),
        ("channels_last", "any device", last, None, one_by_one),
        ("uint8 batches", "any device", last, (x, y, stats, small), at_once),
        ("on the device", "GPUs", last, (*there, small), at_once),
        (f"batches of {large}", "GPUs", last, (*there, large), None),
        ("autocast", "GPU, some CPUs", Autocast(last, device), (*there, large), at_once),
    ]
    untried = [] if compile else [("--compile", "not tried: it is an option")]
    if compile:
        fused = Autocast(compiled(last, device), device)
        rows.append(("--compile", "GPUs", fused, (*there, large), at_once))
    if device.type == "cpu":
        del rows[3]
        untried.append(("on the device", "not tried: all images lie on the CPU already"))
    print(f"2. What does each trick do on {device}? Each row adds one to those above it")
    print(f"   Loss and logits are of {len(x200)} images, before training. logits off: the largest")
    print("   difference from row 1. images/s: the faster of two readings; lower by: how much")
    print("   slower the other one was. gain: images/s divided by that of row 1")
    print("   trick                       made for          loss   logits off   images/s   lower by"
          "   gain")  # fmt: skip
    pairs = read_twice(rows, root, stats, device, images)
    _, z1 = loss_and_logits(start, one_by_one, y200, device)
    losses, offs, speeds, spreads = {}, {}, [], []
    for (words, made_for, model, _, same), pair in zip(rows, pairs, strict=True):
        speeds.append(max(pair))
        spreads.append(1 - min(pair) / max(pair))
        if same is not None:
            losses[words], z = loss_and_logits(model, same, y200, device)
            offs[words] = (z - z1).abs().max().item()
        loss = f"{losses[words]:.4f}" if words in losses else "-"
        off = f"{offs[words]:.7f}" if words in offs and model is not start else "-"
        print(f"   {words:<27} {made_for:<15} {loss:>6}   {off:>10}   {speeds[-1]:8,.0f}   "
              f"{spreads[-1]:8.0%}   {speeds[-1] / speeds[0]:4.1f}")  # fmt: skip
    for words, why in untried:
        print(f"   {words:<27} {why}")
    off, largest = max(offs.values()), z1.abs().max().item()
    apart = (one_by_one - at_once.cpu()).abs().max().item()
    fastest, gain = rows[speeds.index(max(speeds))][0], max(speeds) / speeds[0]
    print(f"   -> no logit is off by more than {off:.4f}, {off / largest:.1%} of the largest one;")
    print(f"      images made one by one and cut from one tensor differ by {apart:.7f} at most")
    print(f'      the fastest row on this {device.type} is "{fastest}": {gain:.1f} times row 1;')
    print(f"      readings of one row differ by up to {max(spreads):.0%}: closer rows may be equal")
    assert off < 0.02 * largest and apart < 1e-4
    return {"losses": losses, "logits_off": offs, "speeds": speeds, "spreads": spreads,
            "largest": largest, "apart": apart}  # fmt: skip


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
    how = "on" if autocast else "off (--autocast turns it on)"
    print(f"3. How well does it learn? On {device}, batches of {batch_size}, autocast {how}")
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
