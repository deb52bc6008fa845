"""With a generator of its own, a shuffling DataLoader brings each item once per epoch, and an equal
seed repeats the orders of all epochs.

A Dataset gives single items, and a network trains on batches. The DataLoader draws an order, reads
the items and stacks them: every training loop runs over one. If sorted items are not shuffled, each
step teaches one class alone, and the network leans to the class that came last. If other code
draws from the same source of random numbers, the order does not come back with the seed.

    batches = ceil(N / B), or floor(N / B) with drop_last=True, which leaves out the incomplete one
    order   = torch.randperm(N, generator=g), after one draw from g that seeds the workers

    N  items in the Dataset     B  batch_size     g  the torch.Generator, a source of random numbers

With num_workers=0 the loop reads the items itself. A worker is a process that reads batches ahead
of the loop, with random numbers of its own; persistent_workers=True starts it once, not each epoch.
Choose 0 until the training step waits for data, then 2, 4 ... up to the cores. On Windows and macOS
a script that starts workers must do so behind `if __name__ == "__main__":`, as this one does.

Needs          read_data.py, dataset_transform.py
Checked here   a loader by hand = DataLoader in two epochs; both counts; equal seeds, equal orders,
               and without a generator not; workers deliver the same places in the same order
TensorBoard    batch/classes by step in the runs in_order and shuffled: 1 or 2 classes against all;
               batch/first by epoch: the pictures of the first batch, with place and class
Try            in show_seeds, write seeded_loader(places, B, seed, drop_last=True) for a and b:
               which items are left out?
Answer         The 16 left over, other ones in each epoch: in time, all of them are seen
Source         torch.utils.data.DataLoader; PyTorch notes on reproducibility
"""

import signal
import time
from contextlib import contextmanager
from itertools import combinations
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
    print("2. Is that all a DataLoader does? Two epochs of the same ten images, with equal seeds")
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
    print(f"3. Which of {N} items do batches of {B} deliver, and does their order come back?")
    print("   loader, epoch            the first five             batches  ceil, floor  left out")
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
        torch.rand(draws)  # other code draws some numbers, which are missing to d and e alone
        batches = list(loader)
        order = orders[name[:2]] = torch.cat(batches).tolist()
        lost = sorted(set(places) - set(order))
        words = f"{len(lost)}: {str(lost[:3])[1:-1]} ..." if lost else "none"
        count = count_batches(N, B, loader.drop_last)
        print(f"   {name:<23}  {str(order[:5])[1:-1]:<24}   {len(batches):7d}  {count:11d}  "
              f"{words}")  # fmt: skip
        assert len(batches) == count
    same = [f"{x} = {y}" for x, y in combinations(orders, 2) if orders[x] == orders[y]]
    whole = sum(sorted(order) == [*places] for order in orders.values())
    print(f"   -> {whole} of {len(rows)} deliver every item once; equal orders: {', '.join(same)}")
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
    print("   order      classes in a batch: fewest    mean    most")
    targets, classes, means = images_set.targets, images_set.classes, {}
    by_class = sorted(range(N), key=lambda i: targets[i])
    sorted_set = [(i, targets[i]) for i in by_class]  # items (place, label)
    in_order = DataLoader(sorted_set, B, drop_last=True)  # a small last batch holds fewer classes
    shuffled = seeded_loader(sorted_set, B, seed, drop_last=True)
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
    chance = classes_by_chance(len(classes), B)
    gaps = {run: abs(mean - chance) for run, mean in means.items()}
    print(f"   -> chance gives {chance:.2f} classes on average: shuffled is {gaps['shuffled']:.2f} "
          f"from it, in order {gaps['in_order']:.2f}")  # fmt: skip
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


def two_epochs(loader, seed):
    """Of two epochs the places (2, N), the random numbers (2, N) and the seconds."""
    torch.manual_seed(seed)  # the loop reads with these random numbers if there are no workers
    places, draws, seconds = [], [], []
    for _ in range(2):
        start = time.perf_counter()
        batches = [(index, draw) for _, index, draw in loader]
        seconds.append(time.perf_counter() - start)
        for rows, parts in zip((places, draws), zip(*batches, strict=True), strict=True):
            rows.append(torch.cat(parts))
    return torch.stack(places), torch.stack(draws), seconds


@contextmanager
def sharing_memory():
    """Say in one line what the system says where workers get no memory to share."""
    try:
        torch.multiprocessing.Lock()  # asked first: a loader that is half made complains too
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        mend = "enlarge /dev/shm (docker run --shm-size=1g), or take workers=0 in main"
        raise DataError(f"workers cannot hand over their batches: {reason}; {mend}") from error


def show_workers(images_set, N, B, seed, workers):
    print(f"5. Are {workers} workers faster, and do they repeat? Two epochs, seed {seed}")
    print(f"{'':44}time / time of   same order as    random numbers")
    print(f"{'':44}0 workers        0 workers        as in the run")
    print("   items            loader                  epoch 0, 1       epoch 0, 1       before")
    some, kept = {"num_workers": workers}, {"num_workers": workers, "persistent_workers": True}
    runs = [("0 workers, again", {}), (f"{workers} workers", some),
            (f"{workers} workers, again", some),
            (f"{workers} workers, persistent", kept)]  # fmt: skip
    measured = {}
    for name, count, wait, first in (("in memory", N, 0, 0), ("waited for 5 ms", 4 * B, 0.005, 3)):
        dataset = Timed(Subset(images_set, range(min(N, count))), wait)
        places, draws, alone = two_epochs(seeded_loader(dataset, B, seed), seed)
        for run, options in runs[first:]:
            with sharing_memory():
                new = two_epochs(seeded_loader(dataset, B, seed, **options), seed)
            times = [a / b for a, b in zip(new[2], alone, strict=True)]
            same = *(new[0] == places).all(1).tolist(), torch.equal(new[1], draws)
            measured[name, run], draws = (times, same), new[1]
            words = ["yes" if answer else "no" for answer in same]
            print("   {:<15}  {:<21}   {:5.2f}  {:5.2f}     {:<3}  {:<3}         {}".format(
                name, run, *times, *words))  # fmt: skip
    for (name, run), (times, _) in measured.items():
        if run == runs[3][0]:
            print(f"   -> {name}, once started: {times[1]:.2f} of the time without workers")
    said = {run: same for (name, run), (_, same) in measured.items() if name == "in memory"}
    print(f"   -> both orders stay: {'; '.join(run for run in said if all(said[run][:2]))}")
    print(f"   -> random numbers come back: {'; '.join(run for run in said if said[run][2])}")
    return measured


# --- 6. pinned memory --------------------------------------------------------------------------


def show_pinned():
    print("6. Is the copy to the GPU faster with pin_memory? The copy alone of 64 MiB")
    if not torch.cuda.is_available():
        print("   skipped: it needs a CUDA GPU, which copies faster from memory that cannot move")
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
        assert batch.is_pinned() == pin
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
        "classes": show_shuffling(images_set, N, batch_size, seed, log_dir),
        "workers": show_workers(images_set, N, batch_size, seed, workers) if workers else None,
        "pinned": show_pinned(),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
