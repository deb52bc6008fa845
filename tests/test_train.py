import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

SMALL = {"epochs": 3, "batch_size": 32, "limit": 300}


@pytest.fixture
def train(load):
    return load("train.py")


@pytest.fixture
def places(tmp_path, images_root):
    return {
        "root": images_root,
        "log_dir": tmp_path / "runs",
        "checkpoint_dir": tmp_path / "checkpoints",
    }


@pytest.fixture(scope="module")
def whole(load, images_root, tmp_path_factory):
    """The state after a small run that was never interrupted, and where its files are."""
    folder = tmp_path_factory.mktemp("whole")
    train = load("train.py")
    train.main(**SMALL, root=images_root, log_dir=folder, checkpoint_dir=folder, run_name="run")
    return folder / "run" / "epoch_003.pth"


def test_an_epoch_is_every_image_once_with_its_label(train, monkeypatch):
    monkeypatch.setattr(train, "augment", lambda images: images)
    labels = torch.arange(50)
    images = labels[:, None, None, None].expand(50, 3, 4, 4).to(torch.uint8)
    stats = torch.zeros(3), torch.full((3,), 1 / 255)
    batches = list(train.training_batches(images, labels, stats, 12))
    seen = torch.cat([y for _, y in batches])
    assert len(batches) == 4 and len(seen.unique()) == 48
    for x, y in batches:
        torch.testing.assert_close(x[:, 0, 0, 0], y.float())


def test_evaluate_equals_one_pass_over_everything(train):
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(5, 4), torch.randn(23, 5), torch.randint(4, (23,))
    loss, accuracy, predictions = train.evaluate(model, zip(x.split(10), y.split(10), strict=True))
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item())
    assert accuracy == (model(x).argmax(1) == y).sum().item() / 23
    assert torch.equal(predictions, model(x).argmax(1)) and not model.training


def test_the_schedule_peaks_at_lr_and_ends_near_zero(train):
    model = torch.nn.Linear(2, 2)
    optimizer, scheduler = train.make_optimizer(model, 0.3, 40)
    lrs = []
    for _ in train.train_epoch(
        model, [(torch.ones(3, 2), torch.zeros(3).long())] * 40, optimizer, scheduler
    ):
        lrs.append(scheduler.get_last_lr()[0])
    assert max(lrs) == pytest.approx(0.3, rel=0.02) and lrs[-1] < 1e-5
    assert lrs[0] == pytest.approx(0.3 / 25)


def test_a_run_logs_what_the_docstring_names(whole, events):
    run = events(whole.parent)
    assert set(run.Tags()["scalars"]) == {
        "train/loss", "optim/lr", "val/loss", "val/accuracy", "perf/images_per_second",
        "test/accuracy", "test/loss"}  # fmt: skip
    assert run.Tags()["images"] == ["test/predictions", "test/confusion"] and run.Tags()["graph"]
    assert [e.step for e in run.Scalars("val/loss")] == [8, 16, 24]


def write_colours(root, shuffled):
    """Images whose colour tells the class, as Shapes-10: learnt in seconds, unless `shuffled`."""
    rng, arrays = np.random.default_rng(0), {}
    levels = np.meshgrid([60, 190], [60, 190], [40, 120, 200])
    palette = rng.permutation(np.stack(levels, -1).reshape(-1, 3))  # twelve colours far apart
    for split, n in {"train": 400, "test": 200}.items():
        labels = rng.permutation(np.arange(n) % 10)
        images = palette[labels][:, None, None] + rng.normal(0, 15, (n, 32, 32, 3))
        held = rng.permutation(labels) if shuffled else labels
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": held,
                   f"{split}_boxes": np.zeros((n, 4), np.float32)}  # fmt: skip
    np.savez(root / "shapes10.npz", **arrays)


@pytest.mark.parametrize("seed", range(3))
def test_main_learns_and_shuffled_labels_teach_nothing(train, places, tmp_path, seed):
    accuracies = []
    for shuffled in (False, True):
        write_colours(tmp_path, shuffled)
        places |= {"root": tmp_path}
        options = {"epochs": 3, "batch_size": 20, "lr": 0.05, "run_name": f"{shuffled}"}
        measured = train.main(seed=seed, **places, **options)
        accuracies.append(measured["test_accuracy"])
        names = [path.name for path in sorted(measured["folder"].iterdir())]
        assert names == [f"epoch_{epoch:03d}.pth" for epoch in range(4)]
    assert accuracies[0] > 0.8 and accuracies[1] < 0.3
    assert measured["confusion"].sum() == 200


@pytest.mark.skipif("CI" not in os.environ, reason="takes a minute")
def test_the_default_run_passes_90_percent_on_the_built_in_images(train, places, tmp_path):
    places |= {"root": tmp_path / "dataset2"}
    assert train.main(**places)["test_accuracy"] > 0.9


def test_the_same_seed_gives_the_same_weights(train, places, whole):
    train.main(**SMALL, **places, run_name="again")
    again = torch.load(places["checkpoint_dir"] / "again" / "epoch_003.pth", weights_only=True)
    expected = torch.load(whole, weights_only=True)
    assert all(torch.equal(again["model"][name], w) for name, w in expected["model"].items())


def start(places, resume=None):
    """A training process like SMALL on the same data, for killing."""
    code = (
        "import sys, time, train; from pathlib import Path; a = [Path(p) for p in sys.argv[1:]];"
        "train.check_finite = lambda *_: time.sleep(0.05);"  # slow enough to be hit
        f"train.main(**{SMALL}, root=a[0], log_dir=a[1], checkpoint_dir=a[2], run_name='run',"
        " resume=a[3] if a[3:] else None)"
    )
    paths = [*places.values(), *([resume] if resume else [])]
    top = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", code, *paths], cwd=top, stdout=subprocess.DEVNULL
    )


def test_killed_twice_and_resumed_a_run_ends_with_the_same_bits(
    train, places, whole, events, monkeypatch
):
    folder, killed = places["checkpoint_dir"] / "run", []
    for moment, delay in {"epoch_000.pth": 0.15, "epoch_001.pth": 0.0}.items():
        resume = train.find_checkpoint(folder) if folder.is_dir() else None
        process = start(places, resume)
        while not (folder / moment).exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        killed.append(process.poll() is None)
        process.kill()
        process.wait()
    assert killed == [True, True]
    # event files of one second are read in the order of their host's name: this one is the last
    monkeypatch.setattr(socket, "gethostname", lambda: "~the-last")
    train.main(resume=train.find_checkpoint("", places["checkpoint_dir"]), root=places["root"],
               log_dir=places["log_dir"])  # fmt: skip
    resumed = torch.load(folder / "epoch_003.pth", weights_only=True)
    expected = torch.load(whole, weights_only=True)
    for part in ("model", "optimizer", "scheduler"):
        pairs = zip(*(tree_leaves(state[part]) for state in (resumed, expected)), strict=True)
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(resumed["random"]["torch"], expected["random"]["torch"])
    assert [e.step for e in events(places["log_dir"] / "run").Scalars("val/loss")] == [8, 16, 24]


def test_try_without_the_optimizers_state_the_bits_differ(train, places, whole, monkeypatch):
    monkeypatch.setattr(train, "PARTS", ("model", "scheduler"))
    second = whole.parent / "epoch_002.pth"
    folder = places["checkpoint_dir"] / "run"
    folder.mkdir(parents=True)
    (folder / second.name).write_bytes(second.read_bytes())
    train.main(resume=folder / second.name, root=places["root"], log_dir=places["log_dir"])
    without = torch.load(folder / "epoch_003.pth", weights_only=True)["model"]
    expected = torch.load(whole, weights_only=True)["model"]
    assert not torch.equal(without["classifier.1.weight"], expected["classifier.1.weight"])


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1000, -1])
def test_a_checkpoint_that_was_cut_short_is_refused(train, whole, tmp_path, keep):
    path = tmp_path / "epoch_001.pth"
    path.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(train.DataError, match=r"epoch_001\.pth is not a whole checkpoint"):
        train.read_checkpoint(path)


@pytest.mark.parametrize("content", ["text", "code", "list", "other dict", "folder", "missing"])
def test_a_foreign_checkpoint_is_refused_and_runs_no_code(train, tmp_path, content):
    path, marker = tmp_path / "epoch_001.pth", tmp_path / "marker"
    if content == "text":
        path.write_text("no checkpoint at all", encoding="utf-8")
    elif content == "folder":
        path.mkdir()
    elif content != "missing":
        held = {"code": Malicious(marker), "list": [1, 2], "other dict": {"weight": torch.ones(2)}}
        torch.save(held[content], path)
    with pytest.raises(train.DataError, match=r"not a whole checkpoint of train\.py: \S") as error:
        train.read_checkpoint(path)
    assert len(str(error.value).splitlines()) == 1
    assert not marker.exists()


def test_a_checkpoint_of_another_model_or_of_other_images_is_refused(train, whole, places):
    folder = places["checkpoint_dir"] / "run"
    folder.mkdir(parents=True)
    here = {name: places[name] for name in ("root", "log_dir")}
    for change, message in (
        ("model", r"another model.*classifier\.3\.weight"),
        ("data", "trained on CIFAR10"),
    ):
        state = torch.load(whole, weights_only=True)
        if change == "model":
            state["model"]["classifier.3.weight"] = torch.zeros(7, 64)
        else:
            state["data"] = "CIFAR10 50000"
        torch.save(state, folder / "epoch_001.pth")
        with pytest.raises(train.DataError, match=message):
            train.main(resume=folder / "epoch_001.pth", **here)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    train, places, monkeypatch
):
    def poison(model, batches, optimizer, scheduler):
        for loss in real(model, batches, optimizer, scheduler):
            yield loss if scheduler.last_epoch < 11 else loss * math.nan

    real = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", poison)
    with pytest.raises(train.DataError, match=r"the loss is nan at step 12: .*last good.*001\.pth"):
        train.main(**SMALL, **places, run_name="run")
    assert train.read_checkpoint(places["checkpoint_dir"] / "run" / "epoch_001.pth")["epoch"] == 1
    assert not (places["checkpoint_dir"] / "run" / "epoch_002.pth").exists()


def test_ctrl_c_says_in_one_line_how_to_resume(train, places, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_epoch", interrupted)
    argv = ["--limit", "100", "--run-name", "x"]
    assert train.command(argv, **places) == 130
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "python train.py --resume" in error and "epoch_000.pth" in error


def test_a_full_or_forbidden_disk_is_one_line(train, places, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    places["checkpoint_dir"].mkdir()
    (places["checkpoint_dir"] / "taken").write_text("", encoding="utf-8")
    for argv in (["--run-name", "taken"], ["--run-name", "full"]):
        if "full" in argv:
            monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(SystemExit, match=r"No space|exists"):
            train.command([*argv, "--limit", "100"], **places)
    monkeypatch.undo()
    places["log_dir"].write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"cannot write .*runs"):
        train.command(["--limit", "100"], **places)


@pytest.mark.parametrize("wrong", [
    ["--epochs", "0"], ["--epochs", "x"], ["--lr", "nan"], ["--lr", "inf"], ["--lr", "0"],
    ["--batch-size", "-1"], ["--limit", "0"], ["--seed", "-1"], ["--seed", "9" * 30],
    ["--run-name", "a/b"], ["--run-name", ".."], ["--run-name", ""], ["--resum", "a", "b"],
    ["--resume", "--run-name", "a"], ["more"],
])  # fmt: skip
def test_wrong_arguments_end_with_status_2(train, tmp_path, wrong):
    with pytest.raises(SystemExit) as stop:
        train.parse(wrong, tmp_path)
    assert stop.value.code == 2


def test_other_options_than_the_run_began_with_end_with_status_2(train, whole):
    assert train.parse(["--resume", str(whole), "--epochs", "3"])["resume"] == whole.resolve()
    with pytest.raises(SystemExit) as stop:
        train.parse(["--resume", str(whole), "--epochs", "4"])
    assert stop.value.code == 2


def test_resume_finds_the_newest_run_and_in_a_run_the_last_epoch(train, tmp_path):
    for run, epoch, age in (("old", 9, 50), ("new", 999, 10), ("new", 1000, 20)):
        path = tmp_path / run / f"epoch_{epoch:03d}.pth"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (1e9 - age, 1e9 - age))
    assert train.find_checkpoint("", tmp_path).parts[-2:] == ("new", "epoch_1000.pth")
    assert train.find_checkpoint(tmp_path / "old").name == "epoch_009.pth"
    with pytest.raises(train.DataError, match="no checkpoint in"):
        train.find_checkpoint("", tmp_path / "none")


def test_a_taken_name_and_too_large_a_batch_are_one_line(train, places, whole):
    with pytest.raises(train.DataError, match="exists: choose another --run-name"):
        train.main(**SMALL, root=places["root"], log_dir=places["log_dir"],
                   checkpoint_dir=whole.parents[1], run_name="run")  # fmt: skip
    with pytest.raises(train.DataError, match="more than the 90 training images"):
        train.main(**places, limit=100, batch_size=91)
    with pytest.raises(train.DataError, match="larger --limit"):
        train.main(**places, limit=1, run_name="one")
