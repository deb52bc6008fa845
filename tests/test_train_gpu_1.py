import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.files import DataError

TOP = Path(__file__).resolve().parents[1]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def lesson(load):
    return load("train_gpu_1.py")


@pytest.fixture
def pretended_cuda(monkeypatch, lesson):
    """.cuda() that stays on the CPU: the path of the code is what is tested, not the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended GPU")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    devices = []
    for name in ("train_epoch", "evaluate"):
        real = getattr(lesson, name)

        def on_cpu(*args, real=real):
            devices.append(args[-1])
            return real(*args[:-1], "cpu")

        monkeypatch.setattr(lesson, name, on_cpu)
    return devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_without_cuda_one_line_and_status_1():
    done = subprocess.run(
        [sys.executable, TOP / "train_gpu_1.py"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no CUDA GPU" in done.stderr


def test_waiting_brackets_the_clock(lesson, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    lesson.seconds(lambda: calls.append("work"))
    assert calls == ["wait", "work", "wait"]
    calls.clear()
    lesson.seconds(lambda: calls.append("work"), wait=False)
    assert calls == ["wait", "work"]


def test_run_all_skips_it_where_there_is_no_cuda(load):
    run_all = load("run_all.py")
    assert run_all.needs_cuda(TOP / "train_gpu_1.py")
    assert not run_all.needs_cuda(TOP / "train_gpu_2.py")


@pytest.mark.parametrize("seed", range(3))
def test_main_takes_the_same_path_on_a_pretended_gpu(
    lesson, pretended_cuda, images_root, tmp_path, seed, events, capsys
):
    small = {"limit": 200, "batch_size": 32, "size": 64}
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, **small)
    assert measured["on_cpu"] == measured["on_cuda"]
    assert pretended_cuda == ["cuda"] * 6  # two epochs: a first batch, the others, validation
    read = events(next(tmp_path.iterdir()))
    assert [e.step for e in read.Scalars("train/loss")] == list(range(1, 11))
    assert [e.step for e in read.Scalars("val/accuracy")] == [5, 10]
    assert read.Scalars("val/accuracy")[-1].value == pytest.approx(measured["val_accuracy"])
    losses = [e.value for e in read.Scalars("train/loss")]
    assert f"train loss {sum(losses[5:]) / 5:.3f}" in capsys.readouterr().out


def test_the_first_batch_is_timed_apart_and_images_are_those_of_the_others(
    lesson, pretended_cuda, images_root, tmp_path, monkeypatch, events, capsys
):
    def slow(work, wait=True):
        work()
        return next(took)

    took = iter([1.0, 1.0, 2.0, 7.0, 0.5] + [1.0] * 9)  # warm-up, queued, done, first batch, rest
    monkeypatch.setattr(lesson, "seconds", slow)
    small = {"limit": 200, "batch_size": 32, "size": 64, "epochs": 1}
    measured = lesson.main(log_dir=tmp_path, root=images_root, **small)
    assert measured["queued"] == 0.5
    assert "first batch 7.00 s, then 256 images/s" in capsys.readouterr().out  # 4 * 32 / 0.5
    (event,) = events(next(tmp_path.iterdir())).Scalars("perf/images_per_second")
    assert event.value == 256


def test_it_validates_on_images_it_does_not_train_on(
    lesson, pretended_cuda, images_root, tmp_path, monkeypatch
):
    trained, judged = [], []

    def watch(seen, real, *args):
        loader = args[1] if isinstance(args[1], list) else list(args[1])
        seen += [y for _, y in loader]
        return real(args[0], loader, *args[2:])

    for name, seen in {"train_epoch": trained, "evaluate": judged}.items():
        real = getattr(lesson, name)
        monkeypatch.setattr(lesson, name, lambda *a, r=real, s=seen: watch(s, r, *a))
    lesson.main(log_dir=tmp_path, root=images_root, limit=200, batch_size=32, size=64, epochs=1)
    assert [len(torch.cat(seen)) for seen in (trained, judged)] == [160, 20]


@pytest.mark.parametrize("name", ["train_epoch", "evaluate"])
def test_a_loss_that_is_not_finite_stops_it(
    lesson, pretended_cuda, images_root, tmp_path, monkeypatch, name
):
    real = getattr(lesson, name)
    monkeypatch.setattr(lesson, name, lambda *a: (real(*a)[0] * float("inf"), 0.5, None))
    monkeypatch.setattr(lesson, "timed_epoch", lambda *a: (
        lesson.train_epoch(a[0], a[1], *a[2:], "cpu")[0], 1.0, 1.0))  # fmt: skip
    with pytest.raises(DataError, match="loss is inf at step"):
        lesson.main(log_dir=tmp_path, root=images_root, limit=200, batch_size=32, size=64)


def test_too_few_images_are_one_line(lesson, pretended_cuda, images_root, tmp_path):
    small = {"log_dir": tmp_path, "root": images_root, "size": 64}
    with pytest.raises(DataError, match="--batch-size 64 is more than the 36 training images"):
        lesson.main(**small, limit=40)
    with pytest.raises(DataError, match="the first batch is timed apart"):
        lesson.main(**small, limit=100)


@cuda
def test_try_a_batch_on_the_gpu_and_a_model_on_the_cpu_is_an_error(load):
    with pytest.raises(RuntimeError):
        load("model.py").Moli()(torch.zeros(2, 3, 32, 32).cuda())


@cuda
def test_main_on_a_gpu(lesson, images_root, tmp_path):
    measured = lesson.main(log_dir=tmp_path, root=images_root)
    assert abs(measured["on_cpu"] - measured["on_cuda"]) < 1e-2 and measured["queued"] < 0.9
