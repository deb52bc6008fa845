import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).resolve().parents[1]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def lesson(load):
    return load("train_gpu_1.py")


@pytest.fixture
def pretended_cuda(monkeypatch):
    """.cuda() that stays on the CPU: the path of the code is what is tested, not the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended GPU")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)


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
    lesson, pretended_cuda, images_root, tmp_path, seed, events
):
    small = {"limit": 200, "batch_size": 32, "size": 64}
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, **small)
    assert measured["on_cpu"] == measured["on_cuda"]
    assert [e.step for e in events(next(tmp_path.iterdir())).Scalars("train/loss")] == list(
        range(1, 11)
    )


@cuda
def test_try_a_batch_on_the_gpu_and_a_model_on_the_cpu_is_an_error(load):
    with pytest.raises(RuntimeError):
        load("model.py").Moli()(torch.zeros(2, 3, 32, 32).cuda())


@cuda
def test_main_on_a_gpu(lesson, images_root, tmp_path):
    measured = lesson.main(log_dir=tmp_path, root=images_root)
    assert abs(measured["on_cpu"] - measured["on_cuda"]) < 1e-2 and measured["queued"] < 0.9
