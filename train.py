"""A run that was killed and resumed ends with the same weights, bit for bit, as one never stopped.

    for x, y in batches:    loss = cross_entropy(model(x), y)
                            zero_grad, backward, optimizer.step, scheduler.step

This is the reference loop: data, model, loss, optimizer, train and eval, TensorBoard, a checkpoint
an epoch. What comes next depends on the weights, the momentum, the place in the schedule and the
random streams; a checkpoint that holds them all, renamed into place once it is whole, loses at most
an epoch. Validation images are cut from the training set by the seed; the test set is seen once.

Checked here   every loss is finite; accuracy on validation images each epoch, on test images at the
               end
TensorBoard    train/loss, val/loss, val/accuracy, test/accuracy, optim/lr, perf/images_per_second,
               the graph, hparams, test/predictions (with the truth where wrong), test/confusion
Try            leave the optimizer out of `load_state`: does the resumed run still agree? No
Source         Nesterov momentum: Sutskever et al. 2013, section 2; one cycle: Smith & Topin 2017,
               arXiv:1708.07120
"""

import argparse
import io
import math
import random
import re
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataset_transform import as_tensors, caption_grid, channel_stats, open_images, source_line
from model import Moli
from sample_data import DATASET2, DataError, write_whole

ROOT = Path(__file__).resolve().parent
LOG_DIR = ROOT / "runs" / "train"
CHECKPOINT_DIR = ROOT / "checkpoints" / "train"
PARTS = ("model", "optimizer", "scheduler")  # what has a state_dict
KEYS = {*PARTS, "options", "data", "epoch", "random"}  # what a checkpoint holds


# --- data ------------------------------------------------------------------------------------


def load_data(root=DATASET2, limit=None, seed=0, val_share=0.1):
    """Splits train, val, test: images (N, 3, 32, 32) uint8, labels (N,). And the training set.

    `limit` keeps the first so many images of the training and of the test set.
    """
    train_set, test_set = open_images(root), open_images(root, train=False)
    images, labels = (t[:limit] for t in as_tensors(train_set))
    test = tuple(t[:limit] for t in as_tensors(test_set))
    if len(images) < 2:
        raise DataError("one image cannot both train and validate: give a larger --limit")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    val, train = order.tensor_split([max(1, int(val_share * len(images)))])
    return {
        "train": (images[train], labels[train]),
        "val": (images[val], labels[val]),
        "test": test,
    }, train_set


def augment(images, pad=2):
    """Each image (B, 3, H, W) shifted by up to `pad` pixels, and mirrored with probability 1/2."""
    B, _, H, W = images.shape
    device = images.device
    padded = F.pad(images.float(), (pad,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * pad + 1, (2, B, 1), device=device)
    rows, columns = top + torch.arange(H, device=device), left + torch.arange(W, device=device)
    mirror = torch.rand(B, 1, device=device) < 0.5
    columns = torch.where(mirror, columns.flip(1), columns)  # (B, W)
    picks = torch.arange(B, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    return padded.permute(0, 2, 3, 1)[picks].permute(0, 3, 1, 2)  # (B, 3, H, W), channels last


def normalize(images, mean, std):
    """Images in 0..255 to mean 0, std 1 by channel, in channels_last order: the faster one."""
    x = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def training_batches(images, labels, stats, batch_size):
    """Shuffled, augmented, normalised batches (x, y); an incomplete last one is left out."""
    order = torch.randperm(len(images)).to(images.device)
    for i in range(len(images) // batch_size):
        batch = order[i * batch_size : (i + 1) * batch_size]
        yield normalize(augment(images[batch]), *stats), labels[batch]


def ordered_batches(images, labels, stats, batch_size=500):
    """Normalised batches (x, y) in order, all of them."""
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        yield normalize(x, *stats), y


# --- the loop --------------------------------------------------------------------------------


def train_epoch(model, batches, optimizer, scheduler):
    """One pass over the batches (x, y). Yields each step's loss, a scalar on the model's device."""
    model.train()
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()  # the caller still sees the learning rate of this step
        scheduler.step()


@torch.no_grad()
def evaluate(model, batches):
    """Mean cross-entropy, accuracy, and the predicted classes (N,)."""
    model.eval()
    loss, hits, predictions = 0.0, 0, []
    for x, y in batches:
        logits = model(x)  # (B, 10)
        loss += F.cross_entropy(logits, y, reduction="sum")
        predictions.append(logits.argmax(1))
        hits += (predictions[-1] == y).sum()
    predictions = torch.cat(predictions)
    return float(loss) / len(predictions), int(hits) / len(predictions), predictions


def make_optimizer(model, lr, total_steps):
    """SGD with Nesterov momentum, its learning rate up and down once over `total_steps`."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=total_steps, cycle_momentum=False
    )
    return optimizer, scheduler


# --- a run and its checkpoints ---------------------------------------------------------------


@dataclass
class Run:
    """What a run is made of. `epoch` epochs of `steps` steps are done and saved in `checkpoint`."""

    options: dict
    data: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int
    epoch: int = 0
    checkpoint: Path | None = None

    def state(self):
        """Everything that decides what comes next, readable with weights_only=True."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        return {"options": self.options, "data": self.data, "epoch": self.epoch,
                **parts, "random": random_state()}  # fmt: skip

    def load_state(self, state):
        """Go back to where `state` was taken. Raises DataError if it is of another model."""
        try:
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            set_random_state(state["random"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = " ".join(str(error).split())[:160]
            raise DataError(f"the checkpoint is of another model: {why}") from error
        self.epoch = state["epoch"]


def random_state():
    """Every random stream that a run may draw from."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state):
    torch.set_rng_state(state["torch"])
    for device, stream in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(stream, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def save_checkpoint(run, folder):
    """Write folder/epoch_003.pth, whole or not at all. Raises DataError if the disk refuses."""
    path = folder / f"epoch_{run.epoch:03d}.pth"
    buffer = io.BytesIO()
    torch.save(run.state(), buffer)
    with write_whole(path) as beside:
        beside.write_bytes(buffer.getvalue())
    run.checkpoint = path


def read_checkpoint(path):
    """The state in a file. Raises DataError if it is cut short, holds code, or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= KEYS:
            raise ValueError("it holds other things")
        if state["options"].keys() != {"epochs", "batch_size", "lr", "seed", "limit"}:
            raise ValueError("it holds other options")
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        UnpicklingError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:  # torch.load's answers to damaged bytes
        why = f"{error}".partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} is not a whole checkpoint of train.py: {why}") from error
    return state


def find_checkpoint(where, checkpoint_dir=CHECKPOINT_DIR):
    """The file `where`, or the last epoch in the folder `where`; for "" in the newest run's."""
    if where and not Path(where).is_dir():
        return Path(where).resolve()
    folder = Path(where or checkpoint_dir).resolve()
    files = list(folder.glob("epoch_[0-9]*.pth" if where else "*/epoch_[0-9]*.pth"))
    if not files:
        raise DataError(f"no checkpoint in {folder}: begin a run with python train.py")
    newest = max(files, key=lambda path: path.stat().st_mtime_ns).parent
    return max(newest.glob("epoch_*.pth"), key=lambda path: int(path.stem.removeprefix("epoch_")))


# --- pictures --------------------------------------------------------------------------------


def prediction_grid(images, labels, predictions, classes, count=64):
    """The first test images; each caption is the prediction, and the truth where it is wrong."""
    pairs = zip(labels[:count].tolist(), predictions[:count].tolist(), strict=True)
    captions = [classes[p] if p == y else f"{classes[p]}? {classes[y]}" for y, p in pairs]
    return caption_grid(images[:count].cpu(), captions, scale=4)


def draw_graph(writer, model):
    """The network in TensorBoard, without torch.jit.trace's notice that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer.add_graph(model.eval(), torch.zeros(1, 3, 32, 32))


def confusion_matrix(labels, predictions, K):
    """Counts (K, K): row = truth, column = prediction."""
    return (labels * K + predictions).bincount(minlength=K * K).view(K, K).cpu()


def confusion_picture(counts, classes, cell=52):
    """The matrix as a picture (3, H, W) uint8: the darker, the larger the share of its row."""
    K, left, top = len(classes), 80, 30
    picture = Image.new("RGB", (left + K * cell, top + K * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    pen.text((4, 8), "truth | said", "gray", font)
    for i in range(K):
        pen.text((4, top + i * cell + cell // 3), classes[i][:12], "black", font)
        pen.text((left + i * cell + 2, 8), classes[i][:7], "black", font)
        for j in range(K):
            x, y, shade = left + j * cell, top + i * cell, int(255 * (1 - share[i, j].item()))
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), (shade, shade, 255))
            ink = "white" if shade < 128 else "black"
            pen.text((x + 12, y + cell // 3), str(counts[i, j].item()), ink, font)
    return np.asarray(picture).transpose(2, 0, 1)


# --- main ------------------------------------------------------------------------------------


def start_run(options, splits, data):
    """A fresh Run: Moli with the weights that the seed gives, its optimizer and its schedule."""
    n, batch_size = len(splits["train"][0]), options["batch_size"]
    if batch_size > n:
        raise DataError(f"--batch-size {batch_size} is more than the {n} training images")
    steps = n // batch_size
    model = Moli().to(memory_format=torch.channels_last)
    optimizer, scheduler = make_optimizer(model, options["lr"], options["epochs"] * steps)
    return Run(options, data, model, optimizer, scheduler, steps)


def check_finite(loss, where):
    if not math.isfinite(loss):
        raise DataError(f"the loss is {loss} {where}: try a smaller --lr")


def run_epoch(run, batches, writer):
    """Train one epoch under a progress bar; train/loss and optim/lr to TensorBoard.

    Returns the mean loss and images/s. Raises DataError at the first loss that is not finite.
    """
    start, size, losses = time.perf_counter(), run.options["batch_size"], []
    first, title = run.epoch * run.steps, f"epoch {run.epoch + 1}/{run.options['epochs']}"
    with tqdm(total=run.steps * size, desc=title, unit="img", disable=None, leave=False) as bar:
        for loss in train_epoch(run.model, batches, run.optimizer, run.scheduler):
            losses.append(loss.item())
            step = first + len(losses)
            check_finite(losses[-1], f"at step {step}")
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update(size)
            if len(losses) % 10 == 0 or len(losses) == run.steps:
                writer.add_scalar("train/loss", losses[-1], step)
                writer.add_scalar("optim/lr", run.scheduler.get_last_lr()[0], step)
    return sum(losses) / run.steps, run.steps * size / (time.perf_counter() - start)


def train(run, splits, stats, folder, writer):
    """The epochs that are left, each validated, logged and saved."""
    epochs, size = run.options["epochs"], run.options["batch_size"]
    while run.epoch < epochs:
        batches = training_batches(*splits["train"], stats, size)
        loss, speed = run_epoch(run, batches, writer)
        val_loss, accuracy, _ = evaluate(run.model, ordered_batches(*splits["val"], stats))
        run.epoch += 1
        step = run.epoch * run.steps
        check_finite(val_loss, f"on the validation images after step {step}")
        writer.add_scalar("val/loss", val_loss, step)
        writer.add_scalar("val/accuracy", accuracy, step)
        writer.add_scalar("perf/images_per_second", speed, step)
        writer.flush()
        save_checkpoint(run, folder)
        print(f"epoch {run.epoch:2d}/{epochs}   train loss {loss:.3f}   val loss {val_loss:.3f}   "
              f"val accuracy {accuracy:.3f}   ({speed:,.0f} images/s)")  # fmt: skip


def test(run, test_split, stats, classes, writer):
    """Loss and accuracy on the test images, with pictures and hparams in TensorBoard."""
    images, labels = test_split
    loss, accuracy, predictions = evaluate(run.model, ordered_batches(images, labels, stats))
    counts = confusion_matrix(labels, predictions, len(classes))
    step = run.epoch * run.steps + 1
    grid = prediction_grid(images, labels, predictions, classes)
    writer.add_image("test/predictions", grid, step)
    writer.add_image("test/confusion", confusion_picture(counts, classes), step)
    options = {name: value for name, value in run.options.items() if value is not None}
    metrics = {"test/accuracy": accuracy, "test/loss": loss}  # written as scalars, too
    writer.add_hparams(options, metrics, run_name=".", global_step=step)
    return {"test_loss": loss, "test_accuracy": accuracy, "confusion": counts}


def main(
    seed=0, log_dir=LOG_DIR, checkpoint_dir=CHECKPOINT_DIR, root=DATASET2,
    epochs=5, batch_size=64, lr=0.1, limit=None, run_name=None, resume=None,
):  # fmt: skip
    """Train anew, or go on from the checkpoint file `resume` with the options that it holds."""
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "limit": limit}
    name = run_name or datetime.now().strftime("%Y%m%d-%H%M%S")
    if resume:
        state, name, checkpoint_dir = read_checkpoint(resume), resume.parent.name, resume.parents[1]
        options = state["options"]
    folder = checkpoint_dir / name
    if not resume and folder.exists():
        raise DataError(f"run {name} exists: choose another --run-name, or --resume {folder}")

    torch.manual_seed(options["seed"])
    splits, train_set = load_data(root, options["limit"], options["seed"])
    print(source_line(train_set))
    stats = channel_stats(splits["train"][0])
    run = start_run(options, splits, data=f"{type(train_set).__name__} {len(train_set)}")
    if resume:
        if state["data"] != run.data:
            raise DataError(f"{resume} was trained on {state['data']}; {root} holds {run.data}")
        run.load_state(state)
        run.checkpoint, first_step = resume, run.epoch * run.steps + 1
    else:
        save_checkpoint(run, folder)
        first_step = 0
    print(f"run {name}: {len(splits['train'][0]):,} images, {run.epoch} of {options['epochs']} "
          f"epochs done, checkpoints in {folder}")  # fmt: skip

    with SummaryWriter(log_dir / name, purge_step=first_step) as writer:
        try:
            if run.epoch == 0:
                draw_graph(writer, run.model)
            train(run, splits, stats, folder, writer)
            result = test(run, splits["test"], stats, train_set.classes, writer)
        except DataError as error:
            raise DataError(f"{error}; the last good checkpoint is {run.checkpoint}") from error
        except KeyboardInterrupt:
            how = f'go on with: python train.py --resume "{run.checkpoint}"'
            raise KeyboardInterrupt(how) from None
    print(f"test accuracy {result['test_accuracy']:.3f} on {len(splits['test'][1]):,} images")
    return {**result, "folder": folder}


# --- the command line ------------------------------------------------------------------------


def number(kind, low):
    """An argparse type: a finite `kind`, `low` or more."""

    def convert(text):
        if not low <= (value := kind(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}, or beyond all bounds")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def run_label(text):
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, . - and _")
    return text


def parse(argv=None, checkpoint_dir=CHECKPOINT_DIR):
    """The given options alone, as a dict for main. Wrong ones end with status 2."""
    parser = argparse.ArgumentParser(
        description="Train the Moli CNN on CIFAR-10, or on drawn shapes where there is none.",
        argument_default=argparse.SUPPRESS,
    )
    whole = number(int, 1)
    parser.add_argument("--epochs", type=whole, help="passes over the training images (5)")
    parser.add_argument("--batch-size", type=whole, help="images a step (64)")
    parser.add_argument("--lr", type=number(float, 1e-12), help="the largest learning rate (0.1)")
    parser.add_argument("--seed", type=number(int, 0), help="seed of all that is random (0)")
    parser.add_argument(
        "--limit", type=whole, help="only the first so many images, for a quick try"
    )
    parser.add_argument("--run-name", type=run_label, help="names runs/train/… (the time)")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="PATH",
        help="go on from a checkpoint or from a run's folder; alone: from the newest run",
    )  # fmt: skip
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if "run_name" in given:
            parser.error("--resume goes on under the old name: leave out --run-name")
        given["resume"] = find_checkpoint(given["resume"], checkpoint_dir)
        for name, value in read_checkpoint(given["resume"])["options"].items():
            if given.get(name, value) != value:
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} was {value} when this run began: leave it out")
    return given


def command(argv=None, checkpoint_dir=CHECKPOINT_DIR, **places):
    """Run main as the command line says. Returns 0, or 130 after Ctrl-C; errors are SystemExit."""
    try:
        main(**parse(argv, checkpoint_dir), checkpoint_dir=checkpoint_dir, **places)
    except KeyboardInterrupt as stop:
        print(f"stopped; {stop or 'nothing was saved yet'}", file=sys.stderr)
        return 130
    except OSError as error:
        where, why = error.filename or "to disk", error.strerror or error
        raise SystemExit(f"cannot write {where}: {why}") from error
    return 0


if __name__ == "__main__":
    sys.exit(command())
