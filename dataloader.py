"""A shuffling DataLoader brings each item once per epoch, in an order that its seed alone decides.

A Dataset gives single items, and a network trains on batches. The DataLoader draws an order, reads
the items and stacks them: every training loop runs over one. Without shuffling a batch may hold a
single class, without a seed no run can be repeated, and workers that cost more than they save make
every epoch longer.

    batches = ceil(N / B), or floor(N / B) with drop_last=True, which leaves out the incomplete one
    order   = torch.randperm(N, generator=g), after one draw from g to seed the workers

    N  items in the Dataset     B  batch_size     g  the torch.Generator given to the DataLoader

With num_workers=0 the loop reads the items itself. Each worker is a process that reads batches
ahead of the loop. Workers keep the order (only in_order=False gives it up), but each one has random
numbers of its own: a run is repeated by the same seed and the same number of workers.

Needs          read_data.py, dataset_transform.py
Checked here   a loader by hand = DataLoader; both counts; N items per epoch; equal seeds, equal
               orders; workers bring the same images in the same order
TensorBoard    batch/classes by step in the runs in_order and shuffled: 1 or 2 classes against all;
               batch/first by epoch: the pictures of the first batch, with place and class
Try            in seeded_loader, give DataLoader drop_last=True: which items are left out each time?
Answer         As many as there are over, but others in each epoch: in time, all of them are seen
Source         torch.utils.data.DataLoader; PyTorch notes on reproducibility
"""

import signal
import time
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from support.data import open_images, source_line
from support.files import DATASET2, DataError, guard
from support.pictures import caption_grid

LOG_DIR = Path(__file__).resolve().parent / "runs" / "dataloader"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(images_set, seed):
    print("1. Loop over ten images in shuffled batches of four")
    dataset = Subset(images_set, range(10))
    g = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, generator=g)
    print("   images (B, 3, H, W)   labels (B,)")
    sizes = []
    for images, labels in loader:
        print(f"   {tuple(images.shape)!s:<19}   {labels.tolist()}")
        sizes.append(len(images))
    print(f"   -> {len(loader)} batches; {' + '.join(map(str, sizes))} = {sum(sizes)} images")
    return sizes


# --- 2. a DataLoader by hand -------------------------------------------------------------------


def draw_order(N, g):
    """The order (N,) int64 of a shuffled epoch, from the generator g.

    It is torch.randperm(N), drawn after one int64 number: `torch.empty((), dtype=torch.int64)
    .random_(generator=g)`. The DataLoader seeds its workers by that number. Exercise.
    """
    torch.empty((), dtype=torch.int64).random_(generator=g)
    return torch.randperm(N, generator=g)


def stack_items(items):
    """A list of B items (image (3, H, W), int label) as images (B, 3, H, W) and labels (B,) int64.

    Exercise.
    """
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def batches_by_hand(dataset, batch_size, g, drop_last=False):
    """A list: the batches (images, labels) of one shuffled epoch.

    The order comes from draw_order; each run of batch_size places in it is read from the dataset
    and joined by stack_items; drop_last leaves out the last batch if it is incomplete. Exercise.
    """
    order, batches = draw_order(len(dataset), g).tolist(), []
    for start in range(0, len(order), batch_size):
        items = [dataset[i] for i in order[start : start + batch_size]]
        if len(items) == batch_size or not drop_last:
            batches.append(stack_items(items))
    return batches


def show_by_hand(images_set, seed):
    print("2. Is that all a DataLoader does? The same ten images, by hand beside the DataLoader")
    dataset = Subset(images_set, range(10))
    by_hand = batches_by_hand(dataset, 4, torch.Generator().manual_seed(seed))
    loader = DataLoader(dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(seed))
    print("   labels by hand   from the DataLoader   largest |difference| of the images")
    differences = []
    for (x, y), (images, labels) in zip(by_hand, loader, strict=True):
        differences.append((x - images).abs().max().item())
        print(f"   {y.tolist()!s:<14}   {labels.tolist()!s:<19}   {differences[-1]:34.1f}")
        assert torch.equal(y, labels)
    assert max(differences) == 0
    print(f"   -> the largest difference of all is {max(differences):.0f}: it is the same loop")
    return max(differences)


# --- 3. the order and the seed -----------------------------------------------------------------


def count_batches(N, B, drop_last):
    """How many batches of B there are in an epoch of N items. Exercise."""
    return N // B if drop_last else -(-N // B)  # -(-N // B) is ceil(N / B), in whole numbers


def seeded_loader(dataset, batch_size, seed, **options):
    """A shuffling loader with a random stream of its own, which nothing else disturbs."""
    g = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, generator=g, **options)


def show_seeds(N, B, seed):
    print(f"3. Which of {N} items do batches of {B} bring, and does their order come back?")
    print("   loader and epoch           the first five             batches   theory   left out")
    places, orders = range(N), {}  # what has a length and items is a Dataset: item i of it is i
    a, b = (seeded_loader(places, B, seed) for _ in range(2))
    c = seeded_loader(places, B, seed + 1)
    d = DataLoader(places, B, drop_last=True)
    rows = [(f"a: seed {seed}", a), (f"a: seed {seed}, next epoch", a), (f"b: seed {seed}", b),
            (f"c: seed {seed + 1}", c), ("d: drop_last, in order", d)]  # fmt: skip
    for name, loader in rows:
        torch.rand(7)  # what others draw does not matter
        batches = list(loader)
        order = orders[name] = torch.cat(batches).tolist()
        lost = sorted(set(places) - set(order))
        words = f"{len(lost)}: {str(lost[:3])[1:-1]} ..." if lost else "none"
        theory = count_batches(N, B, loader.drop_last)
        print(f"   {name:<24}   {str(order[:5])[1:-1]:<24}   {len(batches):7d}   {theory:6d}   "
              f"{words}")  # fmt: skip
        assert len(batches) == theory
    same = [name for name, order in orders.items() if order == orders[rows[0][0]]]
    whole = sum(sorted(order) == [*places] for order in orders.values())
    print(f"   -> {whole} of {len(rows)} bring every item once; equal orders: {' and '.join(same)}")
    return orders


# --- 4. why shuffle ----------------------------------------------------------------------------


def classes_by_chance(K, B):
    """The mean number of the K classes in a batch of B items drawn at random.

    A class is in none of B draws with probability (1 - 1 / K)^B. Exercise.
    """
    return K * (1 - (1 - 1 / K) ** B)


def show_shuffling(images_set, N, B, seed, log_dir):
    print(f"4. Why shuffle? {N} images sorted by class, as ImageFolder lists them, batches of {B}")
    print("   order      classes in a batch: fewest    mean    most")
    targets, classes, means = images_set.targets, images_set.classes, {}
    by_class = sorted(range(N), key=lambda i: targets[i])
    sorted_set = [(i, targets[i]) for i in by_class]  # items (place, label)
    in_order, shuffled = DataLoader(sorted_set, B), seeded_loader(sorted_set, B, seed)
    for run, loader in (("in_order", in_order), ("shuffled", shuffled)):
        numbers = [len(labels.unique()) for _, labels in loader]
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, number in enumerate(numbers):
                writer.add_scalar("batch/classes", number, step)
            for epoch in range(2):
                batch = [(int(i), classes[y]) for i, y in zip(*next(iter(loader)), strict=True)]
                pixels = torch.from_numpy(images_set.data[[i for i, _ in batch]])
                grid = caption_grid(pixels.permute(0, 3, 1, 2), [f"{i} {y}" for i, y in batch])
                writer.add_image("batch/first", grid, epoch)
        mean = means[run] = sum(numbers) / len(numbers)
        print(f"   {run:<8}   {min(numbers):26d}   {mean:5.2f}   {max(numbers):5d}")
    theory = classes_by_chance(len(classes), B)
    print(f"   -> shuffled, a batch holds {mean:.1f} classes on average; chance gives {theory:.1f}")
    return means


# --- 5. workers --------------------------------------------------------------------------------


class Timed(Dataset):
    """Items (image, place, random number) of another Dataset, after `wait` seconds each."""

    def __init__(self, dataset, wait):
        self.dataset, self.wait = dataset, wait

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        time.sleep(self.wait)  # as a slow disk would make it wait
        return self.dataset[index][0], index, torch.rand(())


def timed_epoch(loader):
    """The places (N,) and random numbers (N,) of one epoch, and its seconds."""
    start = time.perf_counter()
    places, draws = zip(*((index, draw) for _, index, draw in loader), strict=True)
    return torch.cat(places), torch.cat(draws), time.perf_counter() - start


@contextmanager
def sharing_memory():
    """Say in one line what the system says where workers get no memory to share."""
    try:
        torch.multiprocessing.Lock()  # asked first: a loader that is half made complains too
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        mend = "is /dev/shm too small? Enlarge it (docker run --shm-size=1g), or take workers=0"
        raise DataError(f"workers cannot hand over their batches: {reason}; {mend}") from error


def show_workers(images_set, N, B, seed, workers):
    print(f"5. Do {workers} workers pay? Time of an epoch, as a multiple of that without workers")
    print("   an item is         items   epoch 0   epoch 1   same order   same random numbers")
    measured = {}
    for name, count, wait in (("in memory", N, 0.0), ("waited for 5 ms", min(N, 4 * B), 0.005)):
        dataset = Timed(Subset(images_set, range(count)), wait)
        places, draws, alone = timed_epoch(seeded_loader(dataset, B, seed))
        loader = seeded_loader(dataset, B, seed, num_workers=workers, persistent_workers=True)
        with sharing_memory():
            first, second = timed_epoch(loader), timed_epoch(loader)
        order, numbers = torch.equal(first[0], places), torch.equal(first[1], draws)
        times = first[2] / alone, second[2] / alone
        measured[name] = {"times": times, "order": order, "numbers": numbers}
        print(f"   {name:<15}   {count:6d}   {times[0]:7.2f}   {times[1]:7.2f}   "
              f"{'yes' if order else 'no':>10}   {'yes' if numbers else 'no':>19}")  # fmt: skip
        assert order
    for name, row in measured.items():
        verdict = "slower" if row["times"][1] >= 1 else "faster"
        print(f"   -> once started, workers were {verdict} than none here, for items {name}")
    print("      Choose 0 until the training step waits for data, then 2, 4 ... up to the cores.")
    return measured


# --- 6. pinned memory --------------------------------------------------------------------------


def show_pinned():
    print("6. Does pin_memory pay? Time to copy 64 MB to the GPU, as a multiple of that without it")
    if not torch.cuda.is_available():
        print("   skipped: it needs a CUDA GPU, which copies faster from memory that cannot move")
        return None
    print("   pin_memory   batch.is_pinned()   time")
    dataset, seconds = TensorDataset(torch.zeros(64, 2**18)), []
    for pin in (False, True):
        (batch,) = next(iter(DataLoader(dataset, 64, pin_memory=pin)))
        for repeats in (1, 10):  # the first copy also prepares the GPU
            start = time.perf_counter()
            for _ in range(repeats):
                batch.to("cuda", non_blocking=True)
            torch.cuda.synchronize()  # until then the copies may still be under way
        seconds.append(time.perf_counter() - start)
        ratio = seconds[-1] / seconds[0]
        print(f"   {pin!s:<10}   {batch.is_pinned()!s:<17}   {ratio:4.2f}")
        assert batch.is_pinned() == pin
    print(f"   -> pinned, {ratio:.2f} of the time: write pin_memory=torch.cuda.is_available()")
    return ratio


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=2000, batch_size=64, workers=2):
    torch.manual_seed(seed)
    to_float = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images_set = open_images(root, train=False, transform=to_float)
    print(source_line(images_set))
    N = min(count, len(images_set))
    measured = {
        "sizes": show_everyday(images_set, seed),
        "difference": show_by_hand(images_set, seed),
        "orders": show_seeds(N, batch_size, seed),
        "classes": show_shuffling(images_set, N, batch_size, seed, log_dir),
        "workers": show_workers(images_set, N, batch_size, seed, workers) if workers else None,
        "pinned": show_pinned(),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
