"""A shuffling DataLoader without drop_last brings every item once per epoch, and with a seeded
generator of its own it can bring the same orders again.

A Dataset gives one item at a time: dataset[i] is an image and its label. A network trains on
batches, several items stacked into one tensor. A DataLoader draws an order, reads the items and
stacks them. Without shuffling, images sorted by class give batches of one or two classes. Without
a generator of its own, the order changes as soon as other code draws a random number.

    N  items in the Dataset     B  batch_size     g  the torch.Generator, a source of random numbers

    order   = torch.randperm(N, generator=g), after g has drawn one number to seed the workers
    batches = N / B rounded up, or down with drop_last=True: an incomplete batch is left out

A worker is a process that reads batches ahead of the loop; with num_workers=0 the loop itself reads
them. Start with 0, and try 2 or 4 when the training step waits for data. persistent_workers=True
starts and seeds them only once, so g draws one number less: from the second epoch on the order is
not that of a loader without it. On Windows, on macOS and, from Python 3.14, on Linux a script with
workers must work behind `if __name__ == "__main__":`.

Needs          read_data.py, dataset_transform.py
Checked here   a loader by hand = DataLoader in two epochs; the number of batches; which loaders
               repeat their orders; what workers change in order, random numbers and time
TensorBoard    batch/classes by step in the runs in_order and shuffled: 1 or 2 classes against all;
               batch/first by epoch: the pictures of the first batch, with place and class
Try            in show_seeds, in the line of a and b, write seeded_loader(places, B, seed,
               drop_last=True), and before the last line add  for x in ("a0", "a1"):
               print({*places} - {*orders[x]})  on one line: are the same items left out?
Answer         No: an epoch leaves out the 16 items at the end of its own order
Source         torch.utils.data.DataLoader; PyTorch notes on reproducibility
"""

import signal
import time
from itertools import combinations
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from support.data import open_images, source_line
from support.files import DATASET2, guard
from support.pictures import caption_grid

LOG_DIR = Path(__file__).resolve().parent / "runs" / "dataloader"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(images_set, seed):
    print("1. Loop over ten images in shuffled batches of four")
    dataset = Subset(images_set, range(10))  # images_set: as torchvision.datasets.CIFAR10(...)
    g = torch.Generator().manual_seed(seed)  # a source of random numbers that nothing else uses
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
    and joined by stack_items; drop_last leaves out the last batch if it is incomplete. At the end
    one more torch.randperm is drawn from g and not used, as the DataLoader does it. Exercise.
    """
    order, batches = draw_order(len(dataset), g).tolist(), []
    for start in range(0, len(order), batch_size):
        items = [dataset[i] for i in order[start : start + batch_size]]
        if len(items) == batch_size or not drop_last:
            batches.append(stack_items(items))
    torch.randperm(len(dataset), generator=g)  # without it the next epoch has another order
    return batches


def show_by_hand(images_set, seed):
    print("2. Draw an order, read, stack: are these the batches of the DataLoader? Ten images")
    dataset, g = Subset(images_set, range(10)), torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(seed))
    print("   epoch   labels by hand   from the DataLoader   largest |difference| of the images")
    differences = []
    for epoch in range(2):
        for (x, y), (images, labels) in zip(batches_by_hand(dataset, 4, g), loader, strict=True):
            differences.append((x - images).abs().max().item())
            print(f"   {epoch:5d}   {y.tolist()!s:<14}   {labels.tolist()!s:<19}   "
                  f"{differences[-1]:34.1f}")  # fmt: skip
            assert torch.equal(y, labels)
    assert max(differences) == 0
    print(f"   -> the largest difference in {len(differences)} batches is {max(differences):g}")
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
    print(
        "   a, b: two loaders of one seed; draws before: random numbers drawn by other code before"
    )
    print("   loader, epoch            draws before  first items      batches  formula  left out")
    places, orders = range(N), {}  # what has a length and items is a Dataset: item i of it is i
    a, b = (seeded_loader(places, B, seed) for _ in range(2))
    c = seeded_loader(places, B, seed + 1)
    d, e = (DataLoader(places, B, shuffle=True) for _ in range(2))
    f = DataLoader(places, B, drop_last=True)
    rows = [(f"a0: seed {seed}, epoch 0", a), (f"a1: seed {seed}, epoch 1", a),
            (f"b0: seed {seed}, epoch 0", b), (f"b1: seed {seed}, epoch 1", b),
            (f"c0: seed {seed + 1}, epoch 0", c), ("d0: no generator", d),
            ("e0: no generator", e), ("f0: drop_last, in order", f)]  # fmt: skip
    for draws, (name, loader) in enumerate(rows):
        torch.manual_seed(seed)
        torch.rand(draws)  # by other code, before the epoch
        batches = list(loader)
        order = orders[name[:2]] = torch.cat(batches).tolist()
        count = count_batches(N, B, loader.drop_last)
        print(f"   {name:<23}  {draws:<12d}  {str(order[:3])[1:-1]:<16}{len(batches):8d}  "
              f"{count:7d}  {N - len(set(order)):8d}")  # fmt: skip
        assert len(batches) == count
    same = [f"{x} = {y}" for x, y in combinations(orders, 2) if orders[x] == orders[y]]
    whole = sum(sorted(order) == [*places] for order in orders.values())
    print(f"   -> {whole} of {len(rows)} bring every item once; equal orders: {', '.join(same)}")
    return orders


# --- 4. why shuffle ----------------------------------------------------------------------------


def classes_by_chance(K, B):
    """The mean number of the K classes in a batch of B items drawn at random.

    A class is in none of B draws with probability (1 - 1 / K)^B: so it is for a large set of equal
    classes, of which a batch takes little away. Exercise.
    """
    return K * (1 - (1 - 1 / K) ** B)


def show_shuffling(images_set, N, B, seed, log_dir):
    print(f"4. Why shuffle? {N} images sorted by class, as ImageFolder lists them, batches of {B}")
    targets, classes, counts = images_set.targets, images_set.classes, {}
    print(f"              how many of the {len(classes)} classes are in a batch")
    print("   order      fewest    mean    most")
    by_class = sorted(range(N), key=lambda i: targets[i])
    sorted_set = [(i, targets[i]) for i in by_class]  # items (place, label)
    in_order = DataLoader(sorted_set, B, drop_last=True)  # a small last batch holds fewer classes
    shuffled = seeded_loader(sorted_set, B, seed, drop_last=True)
    for run, loader in (("in_order", in_order), ("shuffled", shuffled)):
        numbers = counts[run] = [len(labels.unique()) for _, labels in loader]
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, number in enumerate(numbers):
                writer.add_scalar("batch/classes", number, step)
            for epoch in range(2):
                batch = [(int(i), classes[y]) for i, y in zip(*next(iter(loader)), strict=True)]
                pixels = torch.from_numpy(images_set.data[[i for i, _ in batch]])
                grid = caption_grid(pixels.permute(0, 3, 1, 2), [f"{i} {y}" for i, y in batch])
                writer.add_image("batch/first", grid, epoch)
        mean = sum(numbers) / len(numbers)
        print(f"   {run:<8}   {min(numbers):6d}   {mean:5.2f}   {max(numbers):5d}")
    few, many = max(counts["in_order"]), min(counts["shuffled"])
    print(f"   -> a step sees at most {few} classes in order, at least {many} shuffled;")
    print(f"      batches drawn by chance have {classes_by_chance(len(classes), B):.2f} on average")
    return counts


# --- 5. what workers change --------------------------------------------------------------------


class Slow(Dataset):
    """Items (item of another Dataset, random number), after `wait` seconds each."""

    def __init__(self, dataset, wait=0):
        self.dataset, self.wait = dataset, wait

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        time.sleep(self.wait)  # as a slow disk would make it wait
        return self.dataset[index], torch.rand(())


def two_epochs(loader, seed):
    """(2 epochs, 2, N): the items and their random numbers, as float64."""
    torch.manual_seed(seed)  # without workers, the items draw from this stream
    epochs = [[torch.cat(part).double() for part in zip(*loader, strict=True)] for _ in range(2)]
    return torch.stack([torch.stack(epoch) for epoch in epochs])


def show_workers(N, B, seed, loaders):
    print("5. What do workers change? Each item draws a torch.rand(), as augmentation does")
    print("   worker: a process that reads batches ahead; persistent: started and seeded only once")
    print(
        "                  epoch 0                  epoch 1                  same items and numbers"
    )
    print("   loader         first items    1st rand  first items    1st rand  from a new loader?")
    runs, back = {}, {}
    for name, options in loaders.items():
        runs[name], again = (two_epochs(seeded_loader(Slow(range(N)), B, seed, **options), seed)
                             for _ in range(2))  # fmt: skip
        cells = [f"{f'{x[0]:.0f}, {x[1]:.0f}':<11}    {draws[0]:.3f}" for x, draws in runs[name]]
        back[name] = torch.equal(runs[name], again)
        print(f"   {name:<12}   {'     '.join(cells)}     {'yes' if back[name] else 'no'}")
    zero, *others = loaders
    for name in others:
        items, draws = (runs[name] == runs[zero]).all(2).sum(0)
        words = name if name.endswith("workers") else f"{name} workers"
        print(f"   -> with {words} the order is that of {zero} in {items} of 2 epochs, "
              f"and the random numbers in {draws or 'none'}")  # fmt: skip
    return runs, back


# --- 6. are they faster? -----------------------------------------------------------------------


def best_epochs(loaders, repeats=3):
    """The seconds of each loader's fastest epoch. They take turns; the first turn only warms up."""
    seconds = [[] for _ in loaders]
    for _ in range(1 + repeats):
        for loader, times in zip(loaders, seconds, strict=True):
            start = time.perf_counter()
            list(loader)
            times.append(time.perf_counter() - start)
    return [min(times[1:]) for times in seconds]


def show_speed(images_set, N, B, seed, loaders):
    print("6. Are workers faster? Time of an epoch / time with 0 workers, each the best of three")
    zero, *others = loaders
    print(f"   reading an item   {zero}, again   {'   '.join(others)}")
    measured = {}
    for name, batches, wait in (("is fast", 16, 0), ("takes 3 ms", 4, 0.003)):
        dataset = Slow(Subset(images_set, range(min(N, batches * B))), wait)
        options = [{}, *loaders.values()]
        alone, *times = best_epochs([seeded_loader(dataset, B, seed, **each) for each in options])
        null, some, kept = measured[name] = [seconds / alone for seconds in times]
        print(f"   {name:<15}   {null:16.2f}   {some:9.2f}   {kept:12.2f}")
    print(f"   ({zero}, again: the same kind of loader once more; its distance from 1 is noise)")
    print("   (faster, slower: the distance from 1 is over 0.15 and over twice that of the noise)")
    for name, (null, _, kept) in measured.items():
        words = "faster" if kept < 1 else "slower"
        clear = abs(kept - 1) > max(0.15, 2 * abs(null - 1))
        words = words if clear else "neither faster nor slower"
        print(f"   -> where reading an item {name}, {others[-1]} workers were {words} here")
    return measured


# --- 7. pinned memory --------------------------------------------------------------------------


def show_pinned():
    print("7. Is the copy to the GPU faster with pin_memory=True? The copy alone of 64 MiB")
    if not torch.cuda.is_available():
        print("   skipped: it needs a CUDA GPU; it would print the time of a copy from pinned")
        print("   memory, which the system may not move, as a share of the time of a usual copy")
        return None
    print("   pin_memory   batch.is_pinned()   time / time without it")
    dataset, seconds = TensorDataset(torch.zeros(64, 2**18)), []
    for pin in (False, True):
        (batch,) = next(iter(DataLoader(dataset, 64, pin_memory=pin)))  # it is pinned here
        for repeats in (1, 10):  # the first copy also prepares the GPU
            start = time.perf_counter()
            for _ in range(repeats):
                batch.to("cuda", non_blocking=True)
            torch.cuda.synchronize()  # until then the copies may still be under way
        seconds.append(time.perf_counter() - start)
        ratio = seconds[-1] / seconds[0]
        print(f"   {pin!s:<10}   {batch.is_pinned()!s:<17}   {ratio:22.2f}")
    print(f"   -> pinned, the copy took {ratio:.2f} of the time; to pin the batch is not in it")
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
        "counts": show_shuffling(images_set, N, batch_size, seed, log_dir),
    }
    if workers:
        some = {"num_workers": workers}
        kept = {**some, "persistent_workers": True}
        loaders = {"0 workers": {}, f"{workers} workers": some, f"{workers} persistent": kept}
        measured["runs"] = show_workers(N, batch_size, seed, loaders)
        measured["ratios"] = show_speed(images_set, N, batch_size, seed, loaders)
    measured["pinned"] = show_pinned()
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
