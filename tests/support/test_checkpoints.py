import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from support import checkpoints
from support.files import DataError


def make_state(seed=0):
    """Something like a checkpoint: a small model, a step of its optimizer, its schedule."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    fixed = {"options": {"epochs": 3, "limit": None}, "data": "x", "stats": (torch.ones(3),),
             "classes": ["a", "b"], "machine": checkpoints.machine("cpu")}  # fmt: skip
    return parts, fixed


@pytest.fixture
def saved(tmp_path):
    checkpoints.save_epoch(tmp_path, *make_state(), 2, 0.5, 0.5)
    return tmp_path / "epoch_002.pth"


def test_a_checkpoint_brings_back_weights_momentum_schedule_and_every_random_stream(saved):
    parts, fixed = make_state(seed=1)
    checkpoints.restore(checkpoints.read(saved), fixed, **parts)
    drawn = torch.rand(3), np.random.rand(3), random.random()
    expected, _ = make_state()
    for name, part in parts.items():
        mine, theirs = part.state_dict(), expected[name].state_dict()
        assert checkpoints.checksum(mine) == checkpoints.checksum(theirs)
    checkpoints.restore(checkpoints.read(saved), fixed, **parts)
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]


@pytest.mark.parametrize("place, other", [
    ("weight", torch.tensor([1.0, 2.0])), ("weight", torch.tensor([2.0, 1.0]).double()),
    ("weight", torch.tensor([[2.0, 1.0]])), ("epoch", 2.0), ("epoch", "2"), ("names", ["ab"]),
])  # fmt: skip
def test_the_checksum_sees_values_kinds_and_shapes(place, other):
    state = {"weight": torch.tensor([2.0, 1.0]), "epoch": 2, "names": ["a", "b"]}
    assert checkpoints.checksum(state) == checkpoints.checksum(dict(state))
    assert checkpoints.checksum(state) != checkpoints.checksum(state | {place: other})


def test_of_500_flipped_bits_none_loads_as_another_state(saved, tmp_path):
    content, rng = saved.read_bytes(), random.Random(0)
    right = checkpoints.checksum(checkpoints.read(saved))
    path, refused = tmp_path / "epoch_003.pth", 0
    for _ in range(500):
        place = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert checkpoints.checksum(checkpoints.read(path)) == right
        except DataError as error:
            assert len(str(error).splitlines()) == 1 and "epoch_003.pth is not a whole" in str(
                error
            )
            refused += 1
    assert refused > 200  # the others hit padding and names that nothing reads


@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -1000, -1])
def test_a_checkpoint_that_was_cut_short_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"epoch_002\.pth is not a whole checkpoint"):
        checkpoints.read(saved)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("content", ["text", "code", "list", "other dict", "folder", "missing"])
def test_a_foreign_checkpoint_is_refused_and_runs_no_code(tmp_path, content):
    path, marker = tmp_path / "epoch_001.pth", tmp_path / "marker"
    if content == "text":
        path.write_text("no checkpoint at all", encoding="utf-8")
    elif content == "folder":
        path.mkdir()
    elif content != "missing":
        held = {"code": Malicious(marker), "list": [1, 2], "other dict": {"weight": torch.ones(2)}}
        torch.save(held[content], path)
    with pytest.raises(DataError, match=r"not a whole checkpoint of train\.py: \S") as error:
        checkpoints.read(path)
    assert len(str(error.value).splitlines()) == 1
    assert not marker.exists()


@pytest.mark.parametrize("key", sorted(checkpoints.KEYS - {"checksum"}))
def test_a_checkpoint_that_lacks_something_is_refused(saved, key):
    state = checkpoints.read(saved)
    del state[key]
    checkpoints.save(saved, state)
    with pytest.raises(DataError, match="holds other things"):
        checkpoints.read(saved)


@pytest.mark.parametrize("part, wrong", [
    ("random", {"torch": torch.zeros(5, dtype=torch.uint8)}), ("model", {}), ("optimizer", {}),
    ("model", None), ("random", None), ("scheduler", 3),
])  # fmt: skip
def test_values_that_fit_nothing_are_one_line(part, wrong):
    parts, fixed = make_state()
    whole = {name: p.state_dict() for name, p in parts.items()}
    old = {**fixed, **whole, "random": checkpoints.random_state()} | {part: wrong}
    with pytest.raises(DataError, match="is of another model"):
        checkpoints.restore(old, fixed, **parts)


def test_a_write_that_fails_leaves_the_old_checkpoint(saved, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DataError, match="No space left on device"):
        checkpoints.save_epoch(saved.parent, *make_state(), 2, 0.5, 0.5)
    assert saved.read_bytes() == before
    names = {path.name for path in saved.parent.iterdir()}
    assert names == {"epoch_002.pth", "best.pth", "last.pth"}


def test_the_best_is_written_before_the_epoch_that_a_run_goes_on_from(tmp_path, monkeypatch):
    order, real = [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda p, s: order.append(p.name) or real(p, s))
    checkpoints.save_epoch(tmp_path, *make_state(), 2, 0.5, 0.5)
    checkpoints.save_epoch(tmp_path, *make_state(), 3, 0.4, 0.5)
    assert order == ["best.pth", "epoch_002.pth", "last.pth", "epoch_003.pth", "last.pth"]


def test_a_fingerprint_tells_other_images_and_other_labels():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    splits = {"train": (images, torch.tensor([1, 2])), "val": (images[:1], torch.tensor([0]))}
    word = checkpoints.fingerprint([], splits)
    assert word.startswith("list 3 ") and word == checkpoints.fingerprint([], dict(splits))
    for other in ((255 - images, torch.tensor([1, 2])), (images, torch.tensor([2, 1]))):
        assert checkpoints.fingerprint([], splits | {"train": other}) != word


def test_two_runs_under_one_name_never_share_a_folder(tmp_path):
    def claim(_):
        try:
            return checkpoints.claim_run("same", tmp_path / "kept", tmp_path / "runs")
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(claim, range(8)))
    assert sum(not isinstance(answer, str) for answer in got) == 1
    assert sum("run same exists: choose another --run-name, or delete" in str(a) for a in got) == 7


def test_runs_of_one_second_get_names_of_their_own(tmp_path):
    folders = [checkpoints.claim_run(None, tmp_path / "kept", tmp_path / "runs") for _ in range(5)]
    assert len(set(folders)) == 5


def test_a_name_whose_curves_are_still_there_is_taken(tmp_path):
    (tmp_path / "runs" / "old").mkdir(parents=True)
    with pytest.raises(DataError, match=r"run old exists: .* delete .*old"):
        checkpoints.claim_run("old", tmp_path / "kept", tmp_path / "runs")


def test_the_newest_run_is_found_and_in_a_run_the_last_epoch(tmp_path):
    for run, epoch, age in (("old", 9, 50), ("new", 999, 10), ("new", 1000, 20)):
        path = tmp_path / run / f"epoch_{epoch:03d}.pth"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (1e9 - age, 1e9 - age))
    for stray in ("epoch_001 copy.pth", "epoch_best.pth", "epoch_12.pth", "last.pth"):
        (tmp_path / "new" / stray).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    assert checkpoints.find("", tmp_path).parts[-2:] == ("new", "epoch_1000.pth")
    assert checkpoints.find("", tmp_path, best=True).parts[-2:] == ("new", "epoch_1000.pth")
    (tmp_path / "new" / "best.pth").write_bytes(b"")
    assert checkpoints.find("", tmp_path, best=True).parts[-2:] == ("new", "best.pth")
    assert checkpoints.find(tmp_path / "old", tmp_path).name == "epoch_009.pth"
    assert checkpoints.find(tmp_path / "old" / "epoch_009.pth", "").name == "epoch_009.pth"
    for nowhere in ("", tmp_path / "empty"):
        with pytest.raises(DataError, match=r"no checkpoint in .*: begin a run with python train"):
            checkpoints.find(nowhere, tmp_path / "none")
    with pytest.raises(DataError, match=r"no checkpoint .*gone\.pth"):
        checkpoints.find(tmp_path / "gone.pth", tmp_path)


@pytest.mark.parametrize("losses, step, words", [
    ([1.0, float("nan"), 2.0], 12, "the loss is nan at step 11"),
    ([1.0, 2.0, float("inf")], 12, "the loss is inf at step 12"),
    (float("-inf"), 7, "the loss is -inf at step 7"),
])  # fmt: skip
def test_the_first_loss_that_is_not_finite_is_named(losses, step, words):
    with pytest.raises(DataError, match=f"{words}: begin anew with a smaller --lr"):
        checkpoints.check_finite(torch.tensor(losses), step)
    checkpoints.check_finite([0.0, 3e38], step)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / "epoch_001.pth.77.part").write_bytes(b"half")
    (tmp_path / "epoch_000.pth").write_bytes(b"whole")
    with checkpoints.telling_how_to_resume(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["epoch_000.pth"]


def test_a_machine_is_named_by_what_rounding_depends_on(monkeypatch):
    here = checkpoints.machine("cpu")
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in here
    assert checkpoints.machine(torch.device("cpu")) == here != checkpoints.machine("cuda:1")
