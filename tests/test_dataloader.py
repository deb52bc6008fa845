import io
import multiprocessing
import re
import time
from collections import Counter
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from support.data import open_images
from support.pictures import caption_grid

starts_workers = pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)  # the second on a machine with one core


@pytest.fixture
def lesson(load):
    return load("dataloader.py")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def order_of(loader):
    return torch.cat(list(loader)).tolist()


@pytest.mark.parametrize("N", [1, 2, 7, 40])
def test_the_order_is_a_permutation_behind_one_draw(lesson, N):
    order = lesson.draw_order(N, generator(3))
    assert order.tolist() == [
        int(i) for i in DataLoader(range(N), None, True, generator=generator(3))
    ]
    assert sorted(order.tolist()) == list(range(N)) and order.dtype == torch.int64
    g, theory = generator(3), generator(3)
    lesson.draw_order(N, g)
    torch.empty((), dtype=torch.int64).random_(generator=theory)
    torch.randperm(N, generator=theory)
    assert torch.equal(g.get_state(), theory.get_state())


def test_items_are_stacked_in_their_order(lesson):
    items = [(torch.full((3, 2, 5), 0.5 * i), 7 - i) for i in range(4)]
    images, labels = lesson.stack_items(items)
    assert images.shape == (4, 3, 2, 5) and images.dtype == torch.float32
    assert images[:, 1, 1, 4].tolist() == [0, 0.5, 1, 1.5]
    assert labels.tolist() == [7, 6, 5, 4] and labels.dtype == torch.int64


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_by_hand_is_what_the_loader_brings_in_three_epochs(lesson, batch_size, drop_last):
    dataset, g = [(torch.rand(3, 4, 6), i % 5) for i in range(23)], generator(1)
    loader = DataLoader(dataset, batch_size, True, drop_last=drop_last, generator=generator(1))
    for _ in range(3):
        by_hand = lesson.batches_by_hand(dataset, batch_size, g, drop_last)
        assert len(by_hand) == len(loader) == lesson.count_batches(23, batch_size, drop_last)
        for pair, twin in zip(by_hand, loader, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, twin, strict=True))


def test_batches_by_hand_are_whole_without_being_asked(lesson):
    dataset = [(torch.zeros(3, 1, 1), i) for i in range(5)]
    assert [len(y) for _, y in lesson.batches_by_hand(dataset, 3, generator())] == [3, 2]


@pytest.mark.parametrize(
    ("N", "B", "whole", "dropped"),
    [(2000, 64, 32, 31), (64, 64, 1, 1), (65, 64, 2, 1), (3, 4, 1, 0)],
)
def test_counts(lesson, N, B, whole, dropped):
    assert lesson.count_batches(N, B, False) == whole
    assert lesson.count_batches(N, B, True) == dropped


@pytest.mark.parametrize(("K", "B"), [(2, 3), (3, 4), (5, 1)])
def test_classes_by_chance_are_the_mean_over_all_batches(lesson, K, B):
    numbers = [len(set(batch)) for batch in product(range(K), repeat=B)]
    assert lesson.classes_by_chance(K, B) == pytest.approx(sum(numbers) / len(numbers))


def test_only_the_seed_decides_the_order(lesson):
    torch.manual_seed(0)
    first = order_of(lesson.seeded_loader(range(23), 5, 1))
    torch.manual_seed(99)
    assert order_of(lesson.seeded_loader(range(23), 5, 1)) == first
    assert order_of(lesson.seeded_loader(range(23), 5, 2)) != first != list(range(23))
    assert order_of(lesson.seeded_loader(range(23), 4, 1)) == first  # batches do not matter
    assert [len(b) for b in lesson.seeded_loader(range(23), 5, 1, drop_last=True)] == [5] * 4


def test_the_table_of_seeds_names_equal_orders_and_what_is_left_out(lesson, capsys):
    orders = lesson.show_seeds(50, 16, seed=4)
    a0, a1, b0, b1, c0, d0, e0, f0 = orders.values()
    assert a0 == b0 and a1 == b1 and len({*map(tuple, (a0, a1, c0, d0, e0, f0))}) == 6
    assert c0 == order_of(lesson.seeded_loader(range(50), 16, 5))
    assert f0 == list(range(48))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:9]] == ["none"] * 7
    assert lines[2].startswith(f"   a0: seed 4, epoch 0      {str(a0[:5])[1:-1]} ")
    assert lines[6].startswith("   c0: seed 5, epoch 0 ")
    last = r"   f0: drop_last, in order +0, 1, 2, 3, 4 +3 +3   ?2: 48, 49 \.\.\."
    assert re.fullmatch(last.replace("   ?", "  "), lines[9])
    assert lines[10] == "   -> 7 of 8 deliver every item once; equal orders: a0 = b0, a1 = b1"


def edited(lesson, old, new):
    """The lesson with one change in its source, as a reader makes it on a copy."""
    source = Path(lesson.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    copy = ModuleType("copy")
    copy.__file__ = lesson.__file__
    exec(compile(source.replace(old, new), lesson.__file__, "exec"), vars(copy))
    return copy


@pytest.mark.parametrize("seed", range(5))
def test_try_drop_last_leaves_out_others_in_each_epoch(lesson, images_root, tmp_path, capsys, seed):
    line = "(seeded_loader(places, B, seed) for _ in range(2))"
    lesson = edited(lesson, line, line.replace("seed)", "seed, drop_last=True)"))
    orders = lesson.main(seed, tmp_path, images_root, count=50, batch_size=16, workers=0)["orders"]
    missing = [set(range(50)) - set(order) for order in [*orders.values()][:2]]
    assert all(len(m) == 50 % 16 for m in missing) and missing[0] != missing[1]
    assert "-> 3 of 8 deliver every item once" in capsys.readouterr().out
    seen, shuffled = set(), lesson.seeded_loader(range(50), 16, seed, drop_last=True)
    for _ in range(5):
        seen |= set(order_of(shuffled))
    assert seen == set(range(50))


@pytest.mark.parametrize("seed", range(5))
def test_sorted_batches_lean_to_the_last_class(lesson, images_root, seed):
    images_set = open_images(images_root, train=False)
    x = torch.from_numpy(images_set.data).float().flatten(1)[:600] / 255
    x, y = (x - x.mean(0)) / x.std(0), torch.tensor(images_set.targets)[:600]
    by_class, last = y.argsort(stable=True), y.max()
    named = {}
    for name, order in (
        ("sorted", by_class),
        ("shuffled", torch.randperm(len(y), generator=generator(seed))),
    ):
        torch.manual_seed(seed)
        model = torch.nn.Linear(x.shape[1], 10)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for part in order.split(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        named[name] = (model(x).argmax(1) == last).float().mean().item()
    assert named["sorted"] > 0.25 > 0.2 > named["shuffled"]  # its share is 0.1


# --- workers -----------------------------------------------------------------------------------


def test_timed_items_wait_and_know_their_place(lesson, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    dataset = lesson.Timed(TensorDataset(torch.arange(23) * 10), 0.25)
    torch.manual_seed(5)
    x, index, draw = dataset[7]
    torch.manual_seed(5)
    assert (x, index, len(dataset), waits, draw) == (70, 7, 23, [0.25], torch.rand(()))


def test_two_epochs_report_places_draws_and_seconds(lesson, monkeypatch):
    dataset = lesson.Timed(TensorDataset(torch.arange(7)), 0.0)
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    torch.manual_seed(9)
    places, draws, seconds = lesson.two_epochs(DataLoader(dataset, 3), 2)
    torch.manual_seed(2)
    assert places.tolist() == [list(range(7))] * 2 and seconds == [2.5, 1.0]
    for row in draws.tolist():
        torch.empty((), dtype=torch.int64).random_()  # for the seeds of workers
        assert row == [torch.rand(()).item() for _ in range(7)]


@starts_workers
def test_workers_keep_the_orders_and_draw_their_own_numbers(lesson):
    dataset = lesson.Timed(TensorDataset(torch.arange(23)), 0.0)
    some, kept = {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}
    places, draws = [], []
    for options in ({}, {}, some, some, kept):
        loader = lesson.seeded_loader(dataset, 4, 0, **options)
        place, draw, _ = lesson.two_epochs(loader, 0)
        places.append(place.tolist())
        draws.append(draw.tolist())
    assert places[0] == places[1] == places[2] == places[3]
    assert places[4][0] == places[0][0] and places[4][1] != places[0][1]
    assert sorted(places[4][1]) == list(range(23))
    assert draws[0] == draws[1] != draws[2] == draws[3]


class OneSlow(Dataset):
    """Item 0 waits until item 3 was read, which comes from the other worker's second batch."""

    def __init__(self):
        self.read = multiprocessing.get_context().Event()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 0:
            assert self.read.wait(60)
            time.sleep(0.2)
        if index == 3:
            self.read.set()
        return index


@starts_workers
def test_only_in_order_false_gives_up_the_order():
    orders = [
        order_of(DataLoader(OneSlow(), batch_size=1, num_workers=2, in_order=in_order))
        for in_order in (True, False)
    ]
    assert orders[0] == [0, 1, 2, 3]
    assert sorted(orders[1]) == [0, 1, 2, 3] and orders[1].index(1) < orders[1].index(0)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RuntimeError("Caught\n  No space left")]
)
def test_workers_without_shared_memory_end_in_one_line(lesson, error):
    line = r"^workers cannot .*No space.*/dev/shm.*workers=0 in main\Z"  # a dot is no line break
    with pytest.raises(lesson.DataError, match=line), lesson.sharing_memory():
        raise error
    with pytest.raises(KeyError), lesson.sharing_memory():
        raise KeyError("another error")


def test_a_system_without_semaphores_is_seen_before_the_loader(lesson, monkeypatch):
    def refuse():
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(torch.multiprocessing, "Lock", refuse)
    with pytest.raises(lesson.DataError, match="Read-only"), lesson.sharing_memory():
        pytest.fail("the loader was made")


@starts_workers
def test_the_table_of_workers_says_what_it_finds(lesson, images_root, monkeypatch, capsys):
    seen = []

    def two_epochs(loader, seed):
        seen.append((loader.num_workers, loader.persistent_workers, len(loader.dataset),
                     loader.dataset.wait, seed, loader.generator.initial_seed()))  # fmt: skip
        row = rows[len(seen) - 1]
        return torch.tensor(row[0]), torch.tensor(row[1]), row[2]

    rows = [
        ([[0], [1]], [1], (1.0, 2.0)),
        ([[0], [1]], [1], (1.5, 1.0)),
        ([[0], [1]], [2], (3.0, 3.0)),
        ([[0], [1]], [2], (0.5, 0.5)),
        ([[0], [9]], [3], (3.0, 0.5)),
        ([[0], [1]], [1], (2.0, 2.0)),
        ([[8], [1]], [1], (3.0, 1.0)),
    ]
    monkeypatch.setattr(lesson, "two_epochs", two_epochs)
    measured = lesson.show_workers(open_images(images_root, train=False), 60, 4, 7, 2)
    assert seen == [
        (0, False, 60, 0, 7, 7), (0, False, 60, 0, 7, 7), (2, False, 60, 0, 7, 7),
        (2, False, 60, 0, 7, 7), (2, True, 60, 0, 7, 7), (0, False, 16, 0.005, 7, 7),
        (2, True, 16, 0.005, 7, 7)]  # fmt: skip
    assert measured["in memory", "2 workers, again"] == ([0.5, 0.25], (True, True, True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5. Are 2 workers faster, and do they repeat? Two epochs, seed 7"
    assert [line.split()[-5:] for line in lines[4:9]] == [
        ["1.50", "0.50", "yes", "yes", "yes"], ["3.00", "1.50", "yes", "yes", "no"],
        ["0.50", "0.25", "yes", "yes", "yes"], ["3.00", "0.25", "yes", "no", "no"],
        ["1.50", "0.50", "no", "yes", "yes"]]  # fmt: skip
    assert lines[9:] == [
        "   -> in memory, once started: 0.25 of the time without workers",
        "   -> waited for 5 ms, once started: 0.50 of the time without workers",
        "   -> both orders stay: 0 workers, again; 2 workers; 2 workers, again",
        "   -> random numbers come back: 0 workers, again; 2 workers, again"]  # fmt: skip


@starts_workers
def test_one_worker_goes_through_the_table(lesson, images_root, capsys):
    dataset = open_images(images_root, train=False, transform=np.array)
    measured = lesson.show_workers(dataset, 40, 4, 0, 1)
    assert [same for _, same in measured.values()] == [
        (True, True, True), (True, True, False), (True, True, True), (True, False, False),
        (True, False, False)]  # fmt: skip
    assert all(ratio > 0 for times, _ in measured.values() for ratio in times)
    assert capsys.readouterr().out.startswith("5. Are 1 workers faster")


# --- pinned memory -----------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA GPU")
def test_pinned_batches_are_copied_from_pinned_memory(lesson, capsys):
    assert 0 < lesson.show_pinned() < 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["False", "False"], ["True", "True"]]


class Pinned:
    """A batch that notes its copies."""

    def __init__(self, pinned, calls):
        self.pinned, self.calls = pinned, calls

    def is_pinned(self):
        return self.pinned

    def to(self, device, non_blocking):
        self.calls.append((self.pinned, device, non_blocking))


def test_copies_are_timed_after_one_to_warm_up(lesson, monkeypatch, capsys):
    calls, clock = [], iter([0, 1, 5, 10, 11, 13])

    def loader(dataset, batch_size, pin_memory):
        assert dataset.tensors[0].nbytes == 64 * 2**20 and len(dataset) == batch_size
        return [(Pinned(pin_memory, calls),)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(lesson, "DataLoader", loader)
    assert lesson.show_pinned() == 0.5
    a, b = (False, "cuda", True), (True, "cuda", True)
    assert calls == [a, "wait", *[a] * 10, "wait", b, "wait", *[b] * 10, "wait"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["False"] * 2 + ["1.00"],
        ["True"] * 2 + ["0.50"],
    ]
    assert len(lines) == 5 and lines[-1].startswith("   -> pinned, the copy took 0.50 of the time")


def test_without_a_gpu_pinning_is_skipped_in_a_line(lesson, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lesson.show_pinned() is None
    assert "skipped: it needs a CUDA GPU" in capsys.readouterr().out


# --- main --------------------------------------------------------------------------------------


def pixels(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_and_logs_what_it_measures(
    lesson, images_root, tmp_path, capsys, seed, events, monkeypatch
):
    monkeypatch.setattr(lesson, "show_pinned", lambda: None)
    measured = lesson.main(
        seed=seed, log_dir=tmp_path, root=images_root, count=100, batch_size=16, workers=0
    )
    assert measured["sizes"] == [4, 4, 2] and measured["difference"] == 0
    assert measured["workers"] is None
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:-1] == ["1.", "2.", "3.", "4."]
    assert len(lines) == 33 and sum("   -> " in line for line in lines) == 4
    assert (
        "-> 3 batches; 4 + 4 + 2 = 10 images" in out
        and "-> the largest difference in 6 batches is 0\n" in out
    )
    assert "-> 7 of 8 deliver every item once; equal orders: a0 = b0, a1 = b1\n" in out
    assert "chance gives 8.15 classes" in out and out.splitlines()[-1].startswith(
        "look: tensorboard"
    )

    dataset = open_images(images_root, train=False)
    first_ten = lesson.seeded_loader(dataset.targets[:10], 4, seed)
    for labels in first_ten:  # in section 1 and, twice a line, in section 2
        assert out.count(str(labels.tolist())) == 3

    shown = [sorted(range(100), key=lambda i: dataset.targets[i]), None]
    shown[1] = [shown[0][i] for i in order_of(lesson.seeded_loader(range(100), 16, seed))]
    for run, order in zip(("in_order", "shuffled"), shown, strict=True):
        classes = [len({dataset.targets[i] for i in order[j : j + 16]}) for j in range(0, 96, 16)]
        loaded = events(tmp_path / run)
        points = [(e.step, e.value) for e in loaded.Scalars("batch/classes")]
        assert points == list(enumerate(classes))
        mean = measured["classes"][run]
        assert mean == pytest.approx(sum(classes) / 6)
        assert f"{min(classes):3d}   {mean:5.2f}   {max(classes):5d}" in out
        pictures = loaded.Images("batch/first")
        assert [e.step for e in pictures] == [0, 1]
        assert (pixels(pictures[0]) == pixels(pictures[1])).all() == (run == "in_order")
        if run == "in_order":
            images = torch.from_numpy(dataset.data[order[:16]]).permute(0, 3, 1, 2)
            names = [f"{i} {dataset.classes[dataset.targets[i]]}" for i in order[:16]]
            assert (pixels(pictures[0]) == caption_grid(images, names)).all()
    assert measured["classes"]["in_order"] < 3 < 7 < measured["classes"]["shuffled"]
    gap = abs(measured["classes"]["shuffled"] - 10 * (1 - 0.9**16))
    assert gap < 1.5 and f"shuffled is {gap:.2f} from it, in order " in out


def test_sorted_classes_are_taken_whole(lesson, images_root, tmp_path):
    fake = SimpleNamespace(targets=[1, 0, 1, 0], classes=["a", "b"],
                           data=open_images(images_root, train=False).data[:4])  # fmt: skip
    assert lesson.show_shuffling(fake, 4, 2, 0, tmp_path)["in_order"] == 1
    assert Counter(fake.targets) == {0: 2, 1: 2}
