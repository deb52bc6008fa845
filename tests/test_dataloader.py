import io
import multiprocessing
import time
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

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
    rows = [line.split() for line in lines[3:11]]
    for draws, (row, order) in enumerate(zip(rows, orders.values(), strict=True)):
        first = [f"{order[0]},", f"{order[1]},", str(order[2])]
        assert row[-7:-3] == [str(draws), *first]
        assert row[-3:] == (["4", "4", "0"] if draws < 7 else ["3", "3", "2"])
    names = ["a0: seed 4, epoch 0", "c0: seed 5, epoch 0", "f0: drop_last, in order"]
    assert [lines[i][3:26].strip() for i in (3, 7, 10)] == names
    assert lines[1].startswith("   a, b: two loaders of one seed; draws before: random numbers")
    assert lines[2].split()[-6:] == ["first", "items", "batches", "formula", "left", "out"]
    assert lines[11] == "   -> 7 of 8 bring every item once; equal orders: a0 = b0, a1 = b1"


def test_other_draws_change_the_order_of_a_loader_without_a_generator_alone(lesson):
    def order(draws, **options):
        torch.manual_seed(3)
        torch.rand(draws)
        return order_of(DataLoader(range(23), 5, True, **options))

    assert order(0) == order(0) != order(1)
    assert order(0, generator=generator()) == order(1, generator=generator())


@pytest.mark.parametrize("seed", range(5))
def test_try_drop_last_leaves_out_others_in_each_epoch(
    lesson, edited, images_root, tmp_path, capsys, seed
):
    line = "(seeded_loader(places, B, seed) for _ in range(2))"
    lesson = edited(lesson, line, line.replace("seed)", "seed, drop_last=True)"), (
        "    return orders\n", '    for x in ("a0", "a1"): print({*places} - {*orders[x]})\n'
        "    return orders\n"))  # fmt: skip
    orders = lesson.main(seed, tmp_path, images_root, count=50, batch_size=16, workers=0)["orders"]
    missing = [set(range(50)) - set(order) for order in [*orders.values()][:2]]
    assert all(len(m) == 50 % 16 for m in missing) and missing[0] != missing[1]
    out = capsys.readouterr().out
    assert "-> 3 of 8 bring every item once" in out
    assert f"a1 = b1\n{missing[0]}\n{missing[1]}\n" in out
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


def test_slow_items_wait_and_draw(lesson, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    dataset = lesson.Slow(range(0, 230, 10), 0.25)
    torch.manual_seed(5)
    x, draw = dataset[7]
    torch.manual_seed(5)
    assert (x, len(dataset), waits, draw) == (70, 23, [0.25], torch.rand(()))
    assert lesson.Slow(range(3)).wait == 0


def test_two_epochs_are_items_and_draws(lesson):
    torch.manual_seed(9)
    run = lesson.two_epochs(DataLoader(lesson.Slow(range(7)), 3), 2)
    torch.manual_seed(2)
    assert run.shape == (2, 2, 7) and run[:, 0].tolist() == [list(range(7))] * 2
    for row in run[:, 1].tolist():
        torch.empty((), dtype=torch.int64).random_()  # for the seeds of workers
        assert row == [torch.rand(()).item() for _ in range(7)]


def loaders_of(workers):
    some = {"num_workers": workers}
    return {"0 workers": {}, f"{workers} workers": some,
            f"{workers} persistent": {**some, "persistent_workers": True}}  # fmt: skip


@starts_workers
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_keep_the_orders_and_draw_their_own_numbers(lesson, capsys, workers):
    runs, back = lesson.show_workers(23, 4, workers, loaders_of(workers))
    zero, some, kept = runs.values()
    assert list(back.values()) == [True] * 3
    assert torch.equal(zero[:, 0], some[:, 0]) and torch.equal(zero[0, 0], kept[0, 0])
    assert not (zero[:, 1] == some[:, 1]).all(1).any() and torch.equal(some[0], kept[0])
    assert sorted(kept[1, 0].tolist()) == list(range(23))
    g = generator(workers)  # seeded once, the workers of epoch 1 take no number from g
    assert torch.equal(lesson.draw_order(23, g), kept[0, 0].long())
    torch.randperm(23, generator=g)
    assert torch.equal(torch.randperm(23, generator=g), kept[1, 0].long())
    lines = capsys.readouterr().out.splitlines()
    for line, (name, run) in zip(lines[4:7], runs.items(), strict=True):
        cells = [f"{x[0]:.0f}, {x[1]:.0f} {draws[0]:.3f}" for x, draws in run]
        assert " ".join(line.split()) == f"{name} {' '.join(cells)} yes"
    assert lines[7:] == [
        f"   -> with {workers} workers the order is that of 0 workers in 2 of 2 epochs, "
        "and the random numbers in none",
        f"   -> with {workers} persistent workers the order is that of 0 workers in 1 of 2 epochs, "
        "and the random numbers in none",
    ]


@starts_workers
def test_the_table_of_workers_says_what_it_finds(lesson, monkeypatch, capsys):
    runs = [[[[1, 2], [5, 6]], [[2, 1], [7, 8]]]] * 2
    runs += [[[[1, 2], [5, 6]], [[2, 1], [7, 9]]]] * 2
    runs += [[[[2, 1], [5, 6]], [[1, 2], [7, 9]]], [[[2, 1], [5, 6]], [[1, 2], [7, 8]]]]
    runs, seen = iter(runs), []

    def two_epochs(loader, seed):
        seen.append(
            (
                loader.num_workers,
                loader.persistent_workers,
                len(loader.dataset),
                seed,
                loader.dataset.wait,
                loader.batch_size,
                loader.generator.initial_seed(),
            )
        )
        return torch.tensor(next(runs)).double()

    monkeypatch.setattr(lesson, "two_epochs", two_epochs)
    _, back = lesson.show_workers(60, 4, 7, loaders_of(3))
    assert seen == [
        (n, kept, 60, 7, 0, 4, 7) for n, kept in ((0, False), (3, False), (3, True)) for _ in "12"
    ]
    assert list(back.values()) == [True, True, False]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("   worker: a process that reads batches ahead; persistent: ")
    assert lines[3].endswith("from a new loader?")
    assert lines[6].split() == ["3", "persistent", "2,", "1", "5.000", "1,", "2", "7.000", "no"]
    assert lines[7:] == [
        "   -> with 3 workers the order is that of 0 workers in 2 of 2 epochs, "
        "and the random numbers in 1",
        "   -> with 3 persistent workers the order is that of 0 workers in 0 of 2 epochs, "
        "and the random numbers in 1",
    ]


def test_the_fastest_epoch_counts_and_the_first_does_not(lesson, monkeypatch):
    turns, clock = [], iter([0, 1, 0, 2, 0, 9, 0, 5, 0, 3, 0, 4, 0, 8, 0, 7])

    class Loader(str):
        def __iter__(self):
            turns.append(self[:])
            return iter(())

    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert lesson.best_epochs([Loader("a"), Loader("b")]) == [3, 4]
    assert turns == ["a", "b"] * 4


@starts_workers
@pytest.mark.parametrize(
    ("null", "kept", "words"),
    [(2.0, 2.6, "slower"), (2.0, 2.2, "neither faster nor slower"), (2.0, 1.4, "faster"),
     (2.0, 1.8, "neither faster nor slower"), (1.8, 2.2, "neither faster nor slower"),
     (1.6, 2.6, "neither faster nor slower"), (1.6, 3.0, "slower"), (2.4, 1.4,
     "neither faster nor slower"), (2.4, 1.0, "faster")],
)  # fmt: skip
def test_the_table_of_times_compares_with_the_same_loader(
    lesson, images_root, monkeypatch, capsys, null, kept, words
):
    seen = []

    def best_epochs(loaders):
        seen.extend((x.num_workers, x.persistent_workers, len(x.dataset), x.dataset.wait,
                     x.batch_size, x.generator.initial_seed()) for x in loaders)  # fmt: skip
        return [2.0, null, 5.0, kept] if len(seen) == 4 else [4.0, 4.4, 4.8, 1.0]

    monkeypatch.setattr(lesson, "best_epochs", best_epochs)
    images_set = open_images(images_root, train=False)
    ratios = lesson.show_speed(images_set, 100, 4, 7, loaders_of(3))
    workers = [(0, False), (0, False), (3, False), (3, True)]
    assert seen == [(*w, n, wait, 4, 7) for n, wait in ((64, 0), (16, 0.003)) for w in workers]
    assert ratios == {"is fast": [null / 2, 2.5, kept / 2], "takes 3 ms": [1.1, 1.2, 0.25]}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "   reading an item   0 workers, again   3 workers   3 persistent",
        f"   is fast           {null / 2:16.2f}        2.50   {kept / 2:12.2f}",
        "   takes 3 ms                    1.10        1.20           0.25",
        "   (0 workers, again: the same kind of loader once more; its distance from 1 is noise)",
        "   (faster, slower: the distance from 1 is over 0.15 and over twice that of the noise)",
        f"   -> where reading an item is fast, 3 persistent workers were {words} here",
        "   -> where reading an item takes 3 ms, 3 persistent workers were faster here",
    ]


def test_no_more_images_are_timed_than_there_are(lesson, images_root, monkeypatch):
    sizes = []
    monkeypatch.setattr(lesson, "best_epochs", lambda loaders: (
        sizes.extend(len(x.dataset) for x in loaders), [1.0] * 4)[1])  # fmt: skip
    lesson.show_speed(open_images(images_root, train=False), 10, 4, 0, loaders_of(1))
    assert sizes == [10] * 8


@starts_workers
def test_main_with_a_worker_measures_it(lesson, images_root, tmp_path, capsys):
    measured = lesson.main(0, tmp_path, images_root, count=24, batch_size=4, workers=1)
    assert list(measured["runs"][0]) == ["0 workers", "1 workers", "1 persistent"]
    zero, some, kept = (run[:, 0] for run in measured["runs"][0].values())
    assert torch.equal(some, zero) and torch.equal(kept[0], zero[0])
    assert not torch.equal(kept[1], zero[1])
    assert all(ratio > 0 for ratios in measured["ratios"].values() for ratio in ratios)
    null, _, kept = measured["ratios"]["takes 3 ms"]
    assert 0.5 < null < 2 and 0.3 < kept < 3
    titles = [line[:2] for line in capsys.readouterr().out.splitlines() if line[0] != " "][1:-1]
    assert titles == [f"{i}." for i in range(1, 8)]


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
    assert "runs" not in measured
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][1:-1] == ["1.", "2.", "3.", "4."]
    assert sum("   -> " in line for line in lines) == 4
    assert (
        "-> 3 batches; 4 + 4 + 2 = 10 images" in out
        and "-> the largest difference in 6 batches is 0\n" in out
    )
    assert "-> 7 of 8 bring every item once; equal orders: a0 = b0, a1 = b1\n" in out
    assert "drawn by chance have 8.15 on average\n" in out
    assert lines[-1].startswith("look: tensorboard")

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
        assert measured["counts"][run] == classes
        assert f"{min(classes):3d}   {sum(classes) / 6:5.2f}   {max(classes):5d}\n" in out
        pictures = loaded.Images("batch/first")
        assert [e.step for e in pictures] == [0, 1]
        assert (pixels(pictures[0]) == pixels(pictures[1])).all() == (run == "in_order")
        if run == "in_order":
            images = torch.from_numpy(dataset.data[order[:16]]).permute(0, 3, 1, 2)
            names = [f"{i} {dataset.classes[dataset.targets[i]]}" for i in order[:16]]
            assert (pixels(pictures[0]) == caption_grid(images, names)).all()
    few, many = max(measured["counts"]["in_order"]), min(measured["counts"]["shuffled"])
    assert few <= 3 < many and abs(sum(classes) / 6 - 10 * (1 - 0.9**16)) < 1.5
    assert f"-> a step sees at most {few} classes in order, at least {many} shuffled;\n" in out


def test_sorted_classes_are_taken_whole(lesson, images_root, tmp_path):
    fake = SimpleNamespace(targets=[1, 0, 1, 0], classes=["a", "b"],
                           data=open_images(images_root, train=False).data[:4])  # fmt: skip
    assert lesson.show_shuffling(fake, 4, 2, 0, tmp_path)["in_order"] == [1, 1]
    assert Counter(fake.targets) == {0: 2, 1: 2}
