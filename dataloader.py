"""Shuffled or not, by any number of workers: an epoch is every image once, unless drop_last.

    batches = floor(N / B) with drop_last, else ceil(N / B), the last one of N mod B images
    order   = torch.randperm(N, generator=g), after one draw of g for the workers' own seed

A DataLoader draws indices (sampler), reads items (workers) and joins them (collate). num_workers=0
reads in the main process. Workers are processes of their own: they cost their start, and pay when
reading an item costs more than sending it. They never change which images come, or in what order.

Checked here   both counts; every epoch is a permutation; equal seeds, equal orders; workers return
               the same batches as none
TensorBoard    epoch_0/batch, epoch_1/batch, in the runs shuffled and in_order: step = batch
Try            drop_last=True with shuffle: is it the same image that is missing in each epoch? No
Source         torch.utils.data.DataLoader; PyTorch notes on reproducibility
"""

import signal
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import ToTensor

from support.data import open_images, source_line
from support.files import DATASET2, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "dataloader"


class Numbered(Dataset):
    """Items (image, label, index) of another Dataset: a batch then tells which images are in it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return *self.dataset[index], index


def seeded_loader(dataset, seed, **options):
    """A shuffling loader with a random stream of its own, which nothing else disturbs."""
    return DataLoader(
        dataset, shuffle=True, generator=torch.Generator().manual_seed(seed), **options
    )


def epoch_indices(loader):
    """The indices of one epoch, in order, as one tensor."""
    return torch.cat([indices for _, _, indices in loader])


def epoch_seconds(loader):
    """Seconds to the first batch, and seconds for the rest of the epoch."""
    start = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    for _ in batches:
        pass
    return first - start, time.perf_counter() - first


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=2000, batch_size=64, workers=2):
    full = open_images(root, train=False, transform=ToTensor())
    print(source_line(full))
    N = min(count, len(full))
    dataset = Numbered(Subset(full, range(N)))

    print(f"1. batches of {batch_size} from {N} images")
    lengths = {}
    for drop_last, theory in {False: -(-N // batch_size), True: N // batch_size}.items():
        sizes = [len(y) for _, y, _ in DataLoader(dataset, batch_size, drop_last=drop_last)]
        assert len(sizes) == theory
        lengths[drop_last] = len(sizes), sizes[-1]
        print(f"   drop_last {drop_last!s:<5}   batches {len(sizes):3d}   theory {theory:3d}   "
              f"last batch {sizes[-1]:3d}")  # fmt: skip

    print("2. shuffled epochs")
    loader = seeded_loader(dataset, seed, batch_size=batch_size)
    first, second = epoch_indices(loader), epoch_indices(loader)
    for order in (first, second):
        assert torch.equal(order.sort().values, torch.arange(N))
    again = epoch_indices(seeded_loader(dataset, seed, batch_size=batch_size))
    assert torch.equal(first, again)
    fixed = (first == second).sum().item()
    print(f"   epoch 0 begins {first[:5].tolist()}   epoch 1 begins {second[:5].tolist()}")
    print(f"   both permutations, {fixed} images in the same place; equal seeds, equal orders")

    theory = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=theory)
    assert torch.equal(first, torch.randperm(N, generator=theory))
    with_workers = None
    if workers:
        print(f"3. {workers} workers against none (machine and load decide which is faster)")
        loaders = [seeded_loader(dataset, seed, batch_size=batch_size, num_workers=n)
                   for n in (0, workers)]  # fmt: skip
        with_workers = all(
            torch.equal(a, b)
            for pair in zip(*loaders, strict=True)
            for a, b in zip(*pair, strict=True)
        )
        assert with_workers
        (_, alone), (start, rest) = (epoch_seconds(loader) for loader in loaders)
        print("   the same images in the same order")
        ratios = f"epoch {rest / alone:.2f}   start {start / alone:.2f}"
        print(f"   timing, as parts of an epoch without workers: {ratios}")

    for run, shuffle in {"in_order": False, "shuffled": True}.items():
        loader = DataLoader(
            dataset, batch_size, shuffle, generator=torch.Generator().manual_seed(seed)
        )
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for epoch in range(2):
                for step, (x, _, _) in zip(range(8), loader, strict=False):
                    writer.add_images(f"epoch_{epoch}/batch", x, step)
    return {"lengths": lengths, "fixed": fixed, "with_workers": with_workers}


if __name__ == "__main__":
    guard(main)
