"""For each batch: forward, loss, zero_grad, backward, step; after each epoch: evaluate, save.

Validation images choose the best epoch; test images, which nothing has used before, then measure
it. A run that was stopped, even by SIGKILL, goes on with `python train.py --resume` and ends with
the same weights, bit for bit (on one CPU with one PyTorch): a checkpoint holds weights, momentum,
schedule and random streams.

    loss = -mean of log p[y]           p  softmax(model(x)): the predicted probability of each class
    g = gradient + 5e-4 w              x  images (B, 3, 32, 32)        y  their true classes (B,)
    v <- 0.9 v + g                     w  a weight        v  its momentum, 0 at the start
    w <- w - lr (g + 0.9 v)            lr the learning rate

Needs          model.py, nn_optim.py, dataloader.py. To copy: this file, model.py and support/
Checked here   every loss is finite; accuracy on validation images each epoch, on test images last
TensorBoard    train/loss, optim/lr every tenth step; val/loss, val/accuracy, images/s each epoch;
               pictures test/predictions (the truth behind "?" where wrong), test/confusion; hparams
Try            --run-name a; copy checkpoints/train/a/epoch_002.pth to checkpoints/train/b/; leave
               "optimizer" out of what main restores; --resume checkpoints/train/b: a's val loss?
Answer         No: the momentum is lost, and the learning rate of one step: every weight differs
Source         Nesterov: Sutskever et al. 2013, section 2; one cycle: Smith, Topin arXiv:1708.07120
"""

import os
import signal
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # waiting threads leave their core to other programs

import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model import Moli
from support import checkpoints
from support.data import augment, channel_stats, load_splits, normalize, open_square, source_line
from support.files import DATASET2, DataError, guard
from support.options import pick_device, train_options
from support.pictures import draw_graph, log_test

ROOT = Path(__file__).resolve().parent
LOG_DIR, CHECKPOINT_DIR = ROOT / "runs" / "train", ROOT / "checkpoints" / "train"


# --- the loop ----------------------------------------------------------------------------------


def train_epoch(model, batches, optimizer, scheduler, device):
    """One pass over batches (x, y): loss (a tensor), learning rate (a list) by step. Exercise."""
    model.train()  # dropout and batch norm behave otherwise in training
    losses, rates = [], []
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()  # or this step's gradients would add to those of the last one
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # keeps no graph; .item() would wait for a GPU each time
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()  # OneCycleLR after every batch; some schedulers after every epoch
    return torch.stack(losses).cpu(), rates


@torch.no_grad()  # nothing is kept for a backward()
def evaluate(model, batches, device):
    """Mean loss and accuracy over all images, and the predicted classes (N,). Exercise."""
    model.eval()
    loss, predictions, truth = 0.0, [], []
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        logits = model(x)  # (B, 10)
        loss += F.cross_entropy(logits, y, reduction="sum")  # batches may be of unequal size
        predictions.append(logits.argmax(1))
        truth.append(y)
    predictions, truth = torch.cat(predictions).cpu(), torch.cat(truth).cpu()
    return float(loss) / len(truth), (predictions == truth).double().mean().item(), predictions


def make_optimizer(model, lr, total_steps):
    """SGD with momentum; its learning rate rises to `lr` over 30 % of the steps, then falls."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr,  # the peak of the schedule
        momentum=0.9,  # gradients of some ten steps add up: what is noise in them averages out
        nesterov=True,
        weight_decay=5e-4,  # pulls every weight towards 0: only what lowers the loss stays large
    )
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=total_steps, cycle_momentum=False
    )


def make_loader(images, labels, stats, batch_size=500, train=False):
    """Normalised batches (x, y); for training shuffled, augmented, without a smaller last one."""
    if train and batch_size > len(images):
        raise DataError(f"--batch-size {batch_size} is more than the {len(images)} training images")

    def prepare(batch):
        x, y = batch
        return normalize(augment(x) if train else x, *stats), y

    # Your own Dataset, whose items are finished pairs (float image, class), needs no more than
    # DataLoader(dataset, batch_size, shuffle=train, drop_last=train); lists of indices are faster
    dataset = TensorDataset(images, labels)
    order = RandomSampler(dataset) if train else range(len(dataset))
    indices = BatchSampler(order, batch_size, drop_last=train)
    return DataLoader(dataset, batch_size=None, sampler=indices, collate_fn=prepare)


# --- a whole run -------------------------------------------------------------------------------


def main(
    seed=0, log_dir=LOG_DIR, checkpoint_dir=CHECKPOINT_DIR, root=DATASET2, epochs=5, batch_size=64,
    lr=0.1, limit=None, device="cpu", run_name=None, resume=None, predict=(),
):  # fmt: skip
    """Train anew; or go on from the file `resume`; or predict the class of each file `predict`."""
    if predict:
        return show_predictions(predict, resume or checkpoints.find("", checkpoint_dir, best=True))
    device = pick_device(device)
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "limit": limit}
    old = checkpoints.read(resume) if resume else checkpoints.fresh(options)
    options, done, best = old["options"], old["epoch"], old["best"]
    folder = resume.parent if resume else checkpoints.claim_run(run_name, checkpoint_dir, log_dir)
    with checkpoints.telling_how_to_resume(folder):
        # data
        checkpoints.seed_all(options["seed"])
        splits, train_set = load_splits(root, options["limit"], options["seed"])
        print(source_line(train_set))
        stats, classes = channel_stats(splits["train"][0]), train_set.classes
        loader = make_loader(*splits["train"], stats, options["batch_size"], train=True)
        val_loader = make_loader(*splits["val"], stats)
        epochs, steps = options["epochs"], len(loader)
        # model, optimizer, and with --resume their saved states
        model = Moli(len(classes)).to(device, memory_format=torch.channels_last)  # faster here
        optimizer, scheduler = make_optimizer(model, options["lr"], epochs * steps)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        fixed = checkpoints.what_is_fixed(options, train_set, splits, stats, device)
        if resume:
            checkpoints.restore(old, fixed, model=model, optimizer=optimizer, scheduler=scheduler)
        else:
            checkpoints.save_epoch(folder, parts, fixed, epoch=0, accuracy=0.0, best=0.0)
        print(f"run {folder.name} on {device}: {done} of {epochs} epochs done, files in {folder}")
        print("epoch   train loss   val loss   val accuracy   images/s", flush=True)
        # epochs
        with SummaryWriter(log_dir / folder.name, purge_step=done * steps + bool(done)) as writer:
            if not done:
                draw_graph(writer, model, device)
            for epoch in range(done + 1, epochs + 1):
                step = epoch * steps
                bar = tqdm(loader, f"epoch {epoch}/{epochs}", leave=False, disable=None)
                start = time.perf_counter()
                losses, rates = train_epoch(model, bar, optimizer, scheduler, device)
                speed = steps * options["batch_size"] / (time.perf_counter() - start)
                checkpoints.check_finite(losses, step)
                val_loss, accuracy, _ = evaluate(model, val_loader, device)
                checkpoints.check_finite(val_loss, step, "validation ")
                for i in range((steps - 1) % 10, steps, 10):  # every tenth step, and the last one
                    writer.add_scalar("train/loss", losses[i], step - steps + 1 + i)
                    writer.add_scalar("optim/lr", rates[i], step - steps + 1 + i)
                writer.add_scalar("val/loss", val_loss, step)
                writer.add_scalar("val/accuracy", accuracy, step)
                writer.add_scalar("perf/images_per_second", speed, step)
                writer.flush()
                best = max(best, accuracy)
                checkpoints.save_epoch(folder, parts, fixed, epoch, accuracy, best)
                row = f"{epoch:5d}   {losses.mean():10.3f}   {val_loss:8.3f}   {accuracy:12.3f}"
                print(f"{row}   {speed:8,.0f}", flush=True)
            # test, with the best epoch's weights
            model.load_state_dict(checkpoints.read(checkpoints.best_in(folder))["model"])
            test = make_loader(*splits["test"], stats)
            loss, accuracy, predictions = evaluate(model, test, device)
            checkpoints.check_finite(loss, epochs * steps, "test ")
            counts = log_test(writer, epochs * steps + 1, options, splits["test"], classes,
                              predictions, loss, accuracy)  # fmt: skip
    print(f"test accuracy {accuracy:.3f} on {len(predictions):,} images")
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return {"test_loss": loss, "test_accuracy": accuracy, "confusion": counts, "folder": folder}


@torch.no_grad()
def show_predictions(files, checkpoint):
    """Print the most probable of the classes for each image file, of any size and mode."""
    state = checkpoints.read(checkpoint)
    model = Moli(len(state["classes"])).eval()
    model.load_state_dict(state["model"])
    print(f"{checkpoint}: epoch {state['epoch']}, validation accuracy {state['accuracy']:.3f}")
    print("class        probability   file")
    for file in files:
        x = normalize(open_square(Path(file), 32)[None], *state["stats"])  # (1, 3, 32, 32)
        p = model(x).softmax(1)[0]
        print(f"{state['classes'][p.argmax()]:<12} {p.max():11.3f}   {file}")


if __name__ == "__main__":
    guard(main, train_options)
