"""train.py: the loop, what a run leaves behind, and that a killed run ends with the same bits."""

import math
import os
import signal
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

from model import Moli
from support import checkpoints, data, pictures
from support.files import DataError
from support.options import train_options

SMALL = {"epochs": 3, "batch_size": 32, "limit": 300}
TOP = Path(__file__).resolve().parents[1]


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
def run(load, images_root, tmp_path_factory):
    """The folders of a small run that was never interrupted: its checkpoints, its events."""
    folder = tmp_path_factory.mktemp("whole")
    load("train.py").main(**SMALL, root=images_root, log_dir=folder / "runs",
                          checkpoint_dir=folder, run_name="run")  # fmt: skip
    return folder / "run", folder / "runs" / "run"


@pytest.fixture(scope="module")
def whole(run):
    """The last checkpoint of that run."""
    return run[0] / "epoch_003.pth"


# --- the loop ----------------------------------------------------------------------------------


def by_hand(model, batches, lrs):
    """The weights after SGD with Nesterov momentum and weight decay, written out."""
    weights = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    for (x, y), lr in zip(batches, lrs, strict=True):
        live = [w.clone().requires_grad_() for w in weights]
        loss = F.cross_entropy(x @ live[0].T + live[1], y)
        for w, v, g in zip(weights, velocity, torch.autograd.grad(loss, live), strict=True):
            g = g + 5e-4 * w
            v.mul_(0.9).add_(g)
            w.sub_(lr * (g + 0.9 * v))
    return weights


def one_cycle(lr, total):
    """The closed form of OneCycleLR: from lr / 25 up to lr over 30 %, then down to lr / 250,000."""
    peak, rates = 0.3 * total - 1, []
    for step in range(total):
        low, share = (
            (lr / 25, 1 - step / peak)
            if step <= peak
            else (lr / 25e4, (step - peak) / (total - 1 - peak))
        )
        rates.append(low + (lr - low) * (1 + math.cos(math.pi * share)) / 2)
    return rates


def test_an_epoch_is_the_update_by_hand_under_the_schedule(train):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    batches = [(torch.randn(7, 5).double(), torch.randint(3, (7,))) for _ in range(40)]
    lrs = one_cycle(0.3, 40)
    expected = by_hand(model, batches, lrs)
    first = F.cross_entropy(model(batches[0][0]), batches[0][1]).item()
    optimizer, scheduler = train.make_optimizer(model, 0.3, 40)
    losses, rates = train.train_epoch(model, batches, optimizer, scheduler, "cpu")
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-12)
    assert rates == pytest.approx(lrs, rel=1e-9) and max(rates) == pytest.approx(0.3, rel=0.02)
    assert losses.shape == (40,) and losses[0].item() == pytest.approx(first)
    assert not losses.requires_grad and model.training


def test_a_model_learns_in_train_mode_and_is_judged_in_eval_mode(train):
    modes = []

    class Watch(torch.nn.Linear):
        def forward(self, x):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model, batch = Watch(4, 3), [(torch.randn(6, 4), torch.randint(3, (6,)))]
    optimizer, scheduler = train.make_optimizer(model.eval(), 0.1, 10)
    train.train_epoch(model, batch, optimizer, scheduler, "cpu")
    train.evaluate(model, batch, "cpu")
    assert modes == [(True, True), (False, False)]


def test_evaluate_equals_one_pass_over_everything(train):
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(5, 4), torch.randn(23, 5), torch.randint(4, (23,))
    batches = zip(x.split(10), y.split(10), strict=True)
    loss, accuracy, predictions = train.evaluate(model, batches, "cpu")
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item())
    assert accuracy == pytest.approx((model(x).argmax(1) == y).sum().item() / 23)
    assert torch.equal(predictions, model(x).argmax(1)) and not model.training


def numbered(n):
    """Images whose pixels all are their number, labels that are it, too, and stats that keep it."""
    labels = torch.arange(n)
    images = labels[:, None, None, None].expand(n, 3, 4, 4).to(torch.uint8)
    return images, labels, (torch.zeros(3), torch.full((3,), 1 / 255))


def test_training_batches_are_every_image_once_with_its_label_shuffled(train):
    torch.manual_seed(0)
    images, labels, stats = numbered(50)
    loader = train.make_loader(images, labels, stats, 12, train=True)
    orders = [torch.cat([y for _, y in loader]) for _ in range(2)]
    assert len(loader) == 4 and all(len(order.unique()) == 48 for order in orders)
    assert not torch.equal(orders[0], orders[0].sort().values)
    assert not torch.equal(*orders)
    for x, y in loader:
        torch.testing.assert_close(x, y.float().view(-1, 1, 1, 1).expand_as(x))


def test_other_batches_come_in_order_and_are_complete(train):
    images, labels, stats = numbered(50)
    seen = [(x, y) for x, y in train.make_loader(images, labels, stats, 12)]
    assert [len(y) for _, y in seen] == [12, 12, 12, 12, 2]
    assert torch.equal(torch.cat([y for _, y in seen]), labels)
    torch.testing.assert_close(torch.cat([x for x, _ in seen])[:, 1, 2, 3], labels.float())


def test_only_training_images_are_augmented(train, monkeypatch):
    monkeypatch.setattr(train, "augment", lambda x: x + 100)
    images, labels, stats = numbered(50)
    x, y = next(iter(train.make_loader(images, labels, stats, 12, train=True)))
    torch.testing.assert_close(x[:, 0, 0, 0], y.float() + 100)
    x, y = next(iter(train.make_loader(images, labels, stats)))
    torch.testing.assert_close(x[:, 0, 0, 0], y.float())


# --- what a run leaves behind ------------------------------------------------------------------


def judge(path, images, labels, stats):
    """Loss and accuracy of a checkpoint's model on images that nothing has changed."""
    model = Moli().eval()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    x = (images / 255 - stats[0].view(3, 1, 1)) / stats[1].view(3, 1, 1)
    with torch.no_grad():
        logits = model(x)
    return F.cross_entropy(logits, labels).item(), (
        logits.argmax(1) == labels
    ).float().mean().item()


def test_the_curves_are_of_the_validation_images_and_the_end_of_the_test_images(
    run, images_root, events
):
    folder, log = run
    splits, _ = data.load_splits(images_root, limit=300, seed=0)
    assert [len(labels) for _, labels in splits.values()] == [270, 30, 200]
    stats = data.channel_stats(splits["train"][0])
    read = events(log)
    for epoch in (1, 2, 3):
        loss, accuracy = judge(folder / f"epoch_{epoch:03d}.pth", *splits["val"], stats)
        for tag, value in {"val/loss": loss, "val/accuracy": accuracy}.items():
            event = read.Scalars(tag)[epoch - 1]
            assert (event.step, event.value) == (8 * epoch, pytest.approx(value, rel=1e-4)), tag
    loss, accuracy = judge(folder / "best.pth", *splits["test"], stats)
    for tag, value in {"test/loss": loss, "test/accuracy": accuracy}.items():
        assert [(e.step, e.value) for e in read.Scalars(tag)] == [
            (25, pytest.approx(value, rel=1e-4))
        ]


def test_every_tenth_loss_and_learning_rate_is_logged(run, events):
    read, lrs = events(run[1]), one_cycle(0.1, 24)
    steps = [8, 16, 24]  # 8 steps an epoch: the last one of each
    assert [e.step for e in read.Scalars("train/loss")] == steps
    logged = {e.step: e.value for e in read.Scalars("optim/lr")}
    assert logged == pytest.approx({step: lrs[step - 1] for step in steps}, rel=1e-5)
    losses = [e.value for e in read.Scalars("train/loss")]
    assert len(set(losses)) == 3 and all(0 < loss < 4 for loss in losses)


def test_a_run_logs_what_the_docstring_names(run, events):
    read = events(run[1])
    assert set(read.Tags()["scalars"]) == {
        "train/loss", "optim/lr", "val/loss", "val/accuracy", "perf/images_per_second",
        "test/accuracy", "test/loss"}  # fmt: skip
    assert read.Tags()["images"] == ["test/predictions", "test/confusion"] and read.Tags()["graph"]
    assert [e.step for e in read.Images("test/confusion")] == [25]
    assert "_hparams_/session_start_info" in read.summary_metadata
    start = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for name in (b"epochs", b"batch_size", b"lr", b"seed", b"limit"):
        assert name in start


def test_images_per_second_are_images_by_seconds_of_training(train, places, monkeypatch, events):
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks))
    train.main(**places, epochs=1, batch_size=32, limit=300, run_name="run")
    (event,) = events(places["log_dir"] / "run").Scalars("perf/images_per_second")
    assert event.value == 8 * 32 / 2


def test_the_checkpoints_are_one_an_epoch_the_last_and_the_best(run):
    folder, _ = run
    names = {f"epoch_{epoch:03d}.pth" for epoch in range(4)} | {"best.pth", "last.pth"}
    assert {path.name for path in folder.iterdir()} == names
    states = {name: checkpoints.read(folder / name) for name in names}
    accuracy = {n: states[f"epoch_{n:03d}.pth"]["accuracy"] for n in range(4)}
    best = states["best.pth"]
    assert best["accuracy"] == best["best"] == max(accuracy.values())
    assert accuracy[best["epoch"]] == max(accuracy.values())
    assert states["last.pth"]["epoch"] == 3
    same = states[f"epoch_{best['epoch']:03d}.pth"]["model"]
    assert all(torch.equal(w, same[name]) for name, w in best["model"].items())


def test_the_best_epoch_need_not_be_the_last_one(train, places, monkeypatch):
    scores, real = iter([0.2, 0.9, 0.3]), train.evaluate

    def judged(model, loader, device):
        validates = len(loader.dataset) == 30
        return (1.0, next(scores), None) if validates else real(model, loader, device)

    monkeypatch.setattr(train, "evaluate", judged)
    folder = train.main(**SMALL, **places, run_name="run")["folder"]
    assert checkpoints.read(folder / "best.pth")["epoch"] == 2
    assert checkpoints.read(folder / "last.pth")["best"] == 0.9


@pytest.fixture
def shown(monkeypatch):
    """Captions and images of the grids that are drawn."""
    calls = []
    real = pictures.caption_grid
    monkeypatch.setattr(pictures, "caption_grid",
                        lambda *a, **k: calls.append(a) or real(*a, **k))  # fmt: skip
    return calls


def test_predictions_are_shown_under_their_pictures(train, places, shown, capsys):
    measured = train.main(**SMALL, **places, run_name="run")
    ((images, captions),) = shown
    splits, train_set = data.load_splits(places["root"], limit=300, seed=0)
    assert torch.equal(images, splits["test"][0][:64])
    for caption, y in zip(captions, splits["test"][1][:64].tolist(), strict=True):
        said, _, truth = caption.partition("? ")
        assert (truth or said) == train_set.classes[y]
    right = sum("?" not in caption for caption in captions)
    assert measured["confusion"].sum() == 200 and right <= measured["confusion"].trace()
    output = capsys.readouterr().out
    assert f"test accuracy {measured['test_accuracy']:.3f} on 200 images" in output
    assert measured["test_accuracy"] == pytest.approx(measured["confusion"].trace().item() / 200)
    assert "look: tensorboard --logdir" in output.splitlines()[-1]


def test_the_table_shows_what_tensorboard_shows(train, places, capsys, events):
    train.main(**SMALL, **places, run_name="run")
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("epoch"))
    assert lines[head].split("   ") == [
        "epoch", "train loss", "val loss", "val accuracy", "images/s"]  # fmt: skip
    read = events(places["log_dir"] / "run")
    for epoch, line in enumerate(lines[head + 1 : head + 4], start=1):
        row = [float(cell.replace(",", "")) for cell in line.split()]
        logged = [read.Scalars(tag)[epoch - 1].value
                  for tag in ("val/loss", "val/accuracy", "perf/images_per_second")]  # fmt: skip
        assert row[0] == epoch and row[2:4] == pytest.approx(logged[:2], abs=6e-4)
        assert row[4] == pytest.approx(logged[2], abs=1) and 1.5 < row[1] < 3.5


# --- it learns, and the same seed learns the same -----------------------------------------------


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


# --- stopped, and resumed ----------------------------------------------------------------------


def start(places, resume=None):
    """A training process like SMALL on the same data, for killing."""
    code = (
        "import sys, time, train; from pathlib import Path; a = [Path(p) for p in sys.argv[1:]];"
        "real = train.normalize;"
        "train.normalize = lambda *a: time.sleep(0.03) or real(*a);"  # slow enough to be hit
        f"train.main(**{SMALL}, root=a[0], log_dir=a[1], checkpoint_dir=a[2], run_name='run',"
        " resume=a[3] if a[3:] else None)"
    )
    paths = [*places.values(), *([resume] if resume else [])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *paths], cwd=TOP, stdout=subprocess.DEVNULL
    )


def assert_same(state, other, parts=("model", "optimizer", "scheduler", "random")):
    for part in parts:
        sides = [s[part] for s in (state, other)]
        if part == "random":  # a run on the CPU draws nothing from the GPU's stream
            sides = [{name: s for name, s in side.items() if name != "cuda"} for side in sides]
        for a, b in zip(*map(tree_leaves, sides), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, part


def test_killed_twice_and_resumed_a_run_ends_with_the_same_bits(
    train, places, whole, events, monkeypatch
):
    folder, killed = places["checkpoint_dir"] / "run", []
    for moment, delay in {"epoch_000.pth": 0.15, "epoch_001.pth": 0.0}.items():
        resume = checkpoints.find(folder, folder) if folder.is_dir() else None
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
    resume = checkpoints.find("", places["checkpoint_dir"])
    train.main(resume=resume, root=places["root"], log_dir=places["log_dir"])
    assert_same(checkpoints.read(folder / "epoch_003.pth"), checkpoints.read(whole))
    assert_same(
        checkpoints.read(folder / "best.pth"), checkpoints.read(whole.with_name("best.pth"))
    )
    assert [e.step for e in events(places["log_dir"] / "run").Scalars("val/loss")] == [8, 16, 24]


def copy_of(whole, places, epoch=2):
    """A run's folder that holds one epoch of the whole run."""
    folder = places["checkpoint_dir"] / "run"
    folder.mkdir(parents=True)
    path = folder / f"epoch_{epoch:03d}.pth"
    path.write_bytes(whole.with_name(path.name).read_bytes())
    return path


def test_a_resumed_run_purges_what_the_stopped_one_logged_of_the_lost_epoch(
    train, places, whole, events, monkeypatch
):
    here = {name: places[name] for name in ("root", "log_dir")}
    seen = []
    real = train.SummaryWriter
    monkeypatch.setattr(train, "SummaryWriter",
                        lambda *a, **k: seen.append(k["purge_step"]) or real(*a, **k))  # fmt: skip
    train.main(resume=copy_of(whole, places), **here)
    train.main(**SMALL, **places, run_name="fresh")
    assert seen == [17, 0]  # 16 steps are done: the next one is the 17th


def test_try_without_the_optimizers_state_every_weight_differs(places, whole, tmp_path):
    source = (TOP / "train.py").read_text(encoding="utf-8")
    without = source.replace("model=model, optimizer=optimizer, ", "model=model, ")
    assert without != source
    module = {"__name__": "copy", "__file__": str(tmp_path / "train.py")}
    exec(compile(without, "train.py", "exec"), module)
    path = copy_of(whole, places)
    module["main"](resume=path, root=places["root"], log_dir=places["log_dir"])
    ended = torch.load(path.with_name("epoch_003.pth"), weights_only=True)["model"]
    expected = torch.load(whole, weights_only=True)["model"]
    weights = [name for name in expected if name.endswith("weight")]
    assert not any(torch.equal(ended[name], expected[name]) for name in weights)


def test_other_images_than_those_trained_on_are_noticed(train, places, whole, tmp_path):
    with np.load(places["root"] / "shapes10.npz") as arrays:
        arrays = dict(arrays)
    arrays["train_images"] = 255 - arrays["train_images"]
    np.savez(tmp_path / "shapes10.npz", **arrays)
    with pytest.raises(DataError, match=r"was trained on images Shapes10 500 .*, here are"):
        train.main(resume=copy_of(whole, places), root=tmp_path, log_dir=places["log_dir"])


def test_another_machine_is_said(train, places, whole, capsys):
    path = copy_of(whole, places)
    state = checkpoints.read(path)
    checkpoints.save(path, state | {"machine": "AVX9, 7 threads, torch 9.9"})
    train.main(resume=path, root=places["root"], log_dir=places["log_dir"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "saved with AVX9, 7 threads, torch 9.9, here is" in notes[0]


def test_a_checkpoint_of_another_model_is_refused(train, whole, places):
    path = copy_of(whole, places)
    state = checkpoints.read(path)
    state["model"]["classifier.3.weight"] = torch.zeros(7, 64)
    checkpoints.save(path, state)
    with pytest.raises(DataError, match=r"of another model.*classifier\.3\.weight"):
        train.main(resume=path, root=places["root"], log_dir=places["log_dir"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    train, places, monkeypatch, bad
):
    def poison(model, batches, optimizer, scheduler, device):
        losses, rates = real(model, batches, optimizer, scheduler, device)
        if scheduler.last_epoch > 8:
            losses[3] = bad
        return losses, rates

    real = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", poison)
    message = rf"the loss is {bad} at step 12: begin anew .*; the last good .*epoch_001\.pth"
    with pytest.raises(DataError, match=message):
        train.main(**SMALL, **places, run_name="run")
    folder = places["checkpoint_dir"] / "run"
    assert checkpoints.read(folder / "epoch_001.pth")["epoch"] == 1
    assert not (folder / "epoch_002.pth").exists()


@pytest.mark.parametrize("count", [30, 200])
def test_validation_and_test_losses_must_be_finite_too(train, places, monkeypatch, count):
    def poison(model, loader, device):
        loss, *rest = real(model, loader, device)
        return (math.inf if len(loader.dataset) == count else loss), *rest

    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", poison)
    which = {30: "validation loss is inf at step 8", 200: "test loss is inf at step 24"}[count]
    with pytest.raises(DataError, match=which):
        train.main(**SMALL, **places, run_name="run")


def command(places, *argv):
    """train.py as a program, on the small images, in other folders."""
    code = (
        "import sys; from pathlib import Path; import train;"
        "root, log, kept = map(Path, sys.argv[1:4]); sys.argv[1:] = sys.argv[4:];"
        "train.guard(lambda **o: train.main(**o, root=root, log_dir=log, checkpoint_dir=kept),"
        " lambda: train.train_options(checkpoint_dir=kept))"
    )
    return [sys.executable, "-c", code, *map(str, places.values()), *argv]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_a_stopped_program_says_in_one_line_how_to_go_on(places, stop):
    argv = command(places, "--epochs", "500", "--limit", "100", "--run-name", "x")
    with subprocess.Popen(
        argv, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        for line in process.stdout:  # each epoch's line is flushed: a log shows it at once
            if line.split()[:1] == ["1"]:
                break
        process.send_signal(getattr(signal, stop))
        _, error = process.communicate()
    assert process.returncode == 130
    assert len(error.splitlines()) == 1
    assert "stopped; go on with: python train.py --resume" in error and "epoch_0" in error


def test_stopped_before_anything_was_saved_it_leaves_nothing(train, places, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_splits", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped; nothing was saved yet"):
        train.main(**places, run_name="x")
    assert not (places["checkpoint_dir"] / "x").exists()


def test_a_full_disk_is_one_line_that_names_the_last_good_checkpoint(train, places, monkeypatch):
    def full(self, content):
        if "epoch_002" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, content)

    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"epoch_002\.pth: No space left.*epoch_001\.pth") as error:
        train.main(**SMALL, **places, run_name="full")
    assert len(str(error.value).splitlines()) == 1
    names = {path.name for path in (places["checkpoint_dir"] / "full").iterdir()}
    assert names == {"epoch_000.pth", "epoch_001.pth", "best.pth", "last.pth"}


def test_a_forbidden_log_folder_is_one_line(train, places):
    places["log_dir"].write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(DataError, match=r"runs"):
        train.main(**places, limit=100)


def test_a_taken_name_and_too_large_a_batch_are_one_line(train, places, whole):
    with pytest.raises(DataError, match="exists: choose another --run-name"):
        train.main(**SMALL, root=places["root"], log_dir=places["log_dir"],
                   checkpoint_dir=whole.parents[1], run_name="run")  # fmt: skip
    with pytest.raises(DataError, match="--batch-size 91 is more than the 90 training images"):
        train.main(**places, limit=100, batch_size=91)
    with pytest.raises(DataError, match="larger --limit"):
        train.main(**places, limit=1, run_name="one")
    with pytest.raises(DataError, match="no device 'tpu9' here"):
        train.main(**places, device="tpu9")
    assert list(places["checkpoint_dir"].iterdir()) == []


# --- predictions -------------------------------------------------------------------------------


def test_predictions_name_what_pictures_of_any_size_and_mode_show(train, tmp_path, capsys):
    write_colours(tmp_path, shuffled=False)
    places = {"root": tmp_path, "log_dir": tmp_path / "runs", "checkpoint_dir": tmp_path / "kept"}
    train.main(**places, epochs=3, batch_size=20, lr=0.05, run_name="run")
    images = data.open_images(tmp_path, train=False)
    files = []
    for i, (size, mode) in enumerate([((32, 32), "RGB"), ((200, 90), "RGBA"), ((64, 99), "P")]):
        files.append(tmp_path / f"{i}.png")
        images[i][0].resize(size).convert(mode).save(files[-1])
    capsys.readouterr()
    train.main(predict=files, checkpoint_dir=tmp_path / "kept")
    source, head, *lines = capsys.readouterr().out.splitlines()
    assert "best.pth: epoch" in source and head.split() == ["class", "probability", "file"]
    for line, file, i in zip(lines, files, range(3), strict=True):
        name, probability, path = line.split()
        assert name == images.classes[images.targets[i]] and 0.2 < float(probability) <= 1
        assert path == str(file)


def test_what_is_no_picture_and_a_folder_without_runs_are_one_line(train, whole, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no picture", encoding="utf-8")
    with pytest.raises(DataError, match=r"text\.png"):
        train.main(predict=[path], resume=whole)
    with pytest.raises(DataError, match=r"no checkpoint in .*: begin a run with python train.py"):
        train.main(predict=[path], checkpoint_dir=tmp_path)


# --- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    ["--epochs", "0"], ["--epochs", "x"], ["--lr", "nan"], ["--lr", "inf"], ["--lr", "0"],
    ["--batch-size", "-1"], ["--limit", "0"], ["--seed", "-1"], ["--seed", "9" * 30],
    ["--run-name", "a/b"], ["--run-name", ".."], ["--run-name", ""], ["--resum", "a", "b"],
    ["--resume", "--run-name", "a"], ["more"], ["--predict"],
])  # fmt: skip
def test_wrong_arguments_end_with_status_2(tmp_path, wrong):
    with pytest.raises(SystemExit) as stop:
        train_options(wrong, tmp_path)
    assert stop.value.code == 2


def test_other_options_than_the_run_began_with_end_with_status_2(whole):
    given = train_options(["--resume", str(whole), "--epochs", "3"])
    assert given["resume"] == whole.resolve()
    with pytest.raises(SystemExit) as stop:
        train_options(["--resume", str(whole), "--epochs", "4"])
    assert stop.value.code == 2
