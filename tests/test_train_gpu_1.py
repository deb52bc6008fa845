import re
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support.files import DataError

TOP = Path(__file__).resolve().parents[1]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def lesson(load):
    return load("train_gpu_1.py")


class Event:
    """A mark of torch.cuda, made by the CPU's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


@pytest.fixture
def pretended_cuda(monkeypatch, lesson):
    """.cuda() that stays on the CPU: the path of the code is what is tested, not the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended GPU")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    devices = []
    for name in ("train_epoch", "evaluate"):
        real = getattr(lesson, name)

        def on_cpu(*args, real=real):
            devices.append(args[-1])
            return real(*args[:-1], "cpu")

        monkeypatch.setattr(lesson, name, on_cpu)
    return devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_without_cuda_one_line_and_status_1(lesson, capsys):
    with pytest.raises(DataError) as stop:  # guard makes it one line and status 1
        lesson.main()
    assert str(stop.value) == (
        "no CUDA GPU: one would show how far a clock that does not wait for it is wrong; "
        "train_gpu_2.py runs on any device"
    )
    assert capsys.readouterr().out == ""
    tail = (TOP / "train_gpu_1.py").read_text(encoding="utf-8").splitlines()[-2:]
    assert tail == ['if __name__ == "__main__":', "    guard(main)"]


def test_waiting_brackets_the_clock(lesson, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    lesson.seconds(lambda: calls.append("work"))
    assert calls == ["wait", "work", "wait"]
    calls.clear()
    lesson.seconds(lambda: calls.append("work"), wait=False)
    assert calls == ["wait", "work"]
    ticks = iter([100.0, 100.25])
    monkeypatch.setattr(lesson.time, "perf_counter", lambda: next(ticks))
    assert lesson.seconds(lambda: None) == 0.25


def test_events_bracket_the_work_and_tell_seconds(lesson, monkeypatch):
    calls = []

    class Mark:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append(self)

        def elapsed_time(self, end):
            return 250.0 if calls[0] is self and calls[2] is end else -1.0

    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    assert lesson.event_seconds(lambda: calls.append("work")) == 0.25
    assert calls[1] == "work" and calls[3] == "wait"


def test_everyday_copies_x_and_multiplies(lesson, pretended_cuda, capsys):
    assert lesson.show_everyday() == [[3.0], [7.0]]
    out = capsys.readouterr().out
    assert "The GPU is pretended GPU\n   name           device    value\n" in out
    assert "   y              cpu       3 and 7\n" in out and "-> x stays on cpu: what" in out


def test_the_table_of_clocks(lesson, pretended_cuda, monkeypatch, capsys):
    waits, products, real = [], [], torch.Tensor.__matmul__

    def seconds(work, wait=True):
        work()
        waits.append(wait)
        return {1: 9.0, 2: 0.001, 3: 0.02}[len(waits)]

    monkeypatch.setattr(lesson, "seconds", seconds)
    monkeypatch.setattr(lesson, "event_seconds", lambda work: work() or 0.025)
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or real(a, b)
    )
    assert lesson.show_clocks(50, k=5) == pytest.approx({"queued": 0.05, "done": 0.8})
    assert waits == [True, False, True] and products == [(50, 50)] * 20
    out = capsys.readouterr().out
    assert "2. Which clock is right? 5 products of 50 x 50 matrices\n" in out
    rows = [line.split()[-2:] for line in out.splitlines()[4:7]]
    assert rows == [["1.000", "0.0"], ["20.000", "0.0"], ["25.000", "0.0"]]
    assert "-> without waiting the clock shows 5% of the time that it shows\n" in out
    assert "      with waiting, which is 80% of what the events show\n" in out


def test_teraflops_are_2_n_cubed_for_a_product(lesson, pretended_cuda, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "seconds", lambda work, wait=True: 1e-6)
    monkeypatch.setattr(lesson, "event_seconds", lambda work: 2e-6)
    lesson.show_clocks(200, k=3)
    rows = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[4:7]]
    assert rows == ["48.0", "48.0", "24.0"]  # 2 * 200^3 * 3 / 1e-6 / 1e12


def test_both_losses_are_of_the_model_in_eval_mode(lesson, pretended_cuda, load, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: moved.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: moved.append(self) or self)
    torch.manual_seed(0)
    model, x, y = load("model.py").Moli(), torch.randn(6, 3, 32, 32), torch.arange(6)
    wanted = F.cross_entropy(model.eval()(x), y).item()
    assert lesson.losses_on_both(model.train(), x, y) == pytest.approx((wanted, wanted))
    assert moved[0] is model and {id(t) for t in moved[1:]} == {id(x), id(y)}


def test_a_loss_that_differs_stops_it(lesson, monkeypatch):
    monkeypatch.setattr(lesson, "losses_on_both", lambda *a: (2.3, 2.309))
    both = lesson.show_same_loss(None, None, torch.zeros(3))
    assert both == {"on_cpu": 2.3, "on_cuda": 2.309}
    for other in (2.285, 2.315):
        monkeypatch.setattr(lesson, "losses_on_both", lambda *a, other=other: (2.3, other))
        with pytest.raises(AssertionError):
            lesson.show_same_loss(None, None, torch.zeros(3))


def test_an_epoch_is_a_first_batch_and_the_others(lesson, pretended_cuda, monkeypatch):
    batches = [(torch.randn(4, 5), torch.arange(4) % 3) for _ in range(3)]
    model, calls = torch.nn.Linear(5, 3), []
    optimizer, scheduler = lesson.make_optimizer(model, 0.1, 3)
    expected = F.cross_entropy(model(batches[0][0]), batches[0][1]).item()

    def seconds(work):
        work()
        calls.append(optimizer.state_dict()["state"] != {})
        return len(calls) * 10.0

    monkeypatch.setattr(lesson, "seconds", seconds)
    losses, first, rest = lesson.timed_epoch(model, batches, optimizer, scheduler)
    assert losses.shape == (3,) and (first, rest) == (10.0, 20.0)
    assert losses[0].item() == pytest.approx(expected) and scheduler.last_epoch == 3
    assert pretended_cuda == ["cuda", "cuda"]


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
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match("       [12]   ", line)]
    assert [row[1] for row in rows] == [f"{sum(losses[i : i + 5]) / 5:.3f}" for i in (0, 5)]
    assert rows[1][3] == f"{measured['val_accuracy']:.3f}"
    assert f"      {measured['val_accuracy']:.1%} of the validation images are right\n" in out
    for head in (
        "   clock                            milliseconds   TFLOP/s by this clock\n",
        "3. Is the loss of 20 images the same on both?\n   on the CPU   on the GPU   difference\n",
        "4. How fast does it train? Batches are made on the CPU. first, ms: milliseconds of the\n",
    ):
        assert head in out
    assert f"   {measured['on_cpu']:10.4f}   {measured['on_cuda']:10.4f}       0.0000\n" in out
    assert "-> they are 0.0000 apart;" in out and measured["everyday"] == [[3.0], [7.0]]


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_first_batch_is_timed_apart_and_images_are_those_of_the_others(
    lesson, pretended_cuda, images_root, tmp_path, monkeypatch, events, capsys, epochs
):
    def slow(work, wait=True):
        work()
        return next(took)

    took = iter([1.0, 1.0, 2.0, 7.0, 0.5, 2.0, 4.0])  # warm-up, queued, done; first, rest; again
    monkeypatch.setattr(lesson, "seconds", slow)
    monkeypatch.setattr(lesson, "event_seconds", lambda work: 4.0)
    small = {"limit": 200, "batch_size": 32, "size": 64, "epochs": epochs}
    measured = lesson.main(log_dir=tmp_path, root=images_root, **small)
    assert measured["queued"] == measured["done"] == 0.5
    assert measured["first_to_others"] == [56.0, 2.0][:epochs]
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("       1   "))
    assert row.split()[-3:] == ["7000.0", "125.0", "256"]  # 4 * 32 / 0.5
    assert "   epoch   train loss   val loss   val accuracy   first, ms   others, ms" in out
    last = ", in epoch 2 2.0 times" if epochs == 2 else ""
    assert f"-> in epoch 1 the first batch took 56.0 times as long as another{last};\n" in out
    found = events(next(tmp_path.iterdir())).Scalars("perf/images_per_second")
    assert [event.value for event in found] == [256, 32][:epochs]


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
    assert lesson.main(**small, limit=160, epochs=1)["val_accuracy"] >= 0  # two batches are enough


@cuda
def test_try_a_batch_on_the_gpu_and_a_model_on_the_cpu_is_an_error(lesson, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "cuda", lambda self: self)  # as if left out
    with pytest.raises(RuntimeError, match=r"^Expected all tensors to be on the same device"):
        lesson.show_everyday()


def test_weights_and_inputs_on_two_devices_are_an_error_anywhere():
    with pytest.raises((RuntimeError, NotImplementedError)):  # meta: a device without numbers
        torch.nn.Linear(2, 1, bias=False)(torch.zeros(2, 2, device="meta")).tolist()


@cuda
def test_main_on_a_gpu(lesson, images_root, tmp_path):
    measured = lesson.main(log_dir=tmp_path, root=images_root)
    assert abs(measured["on_cpu"] - measured["on_cuda"]) < 1e-2 and measured["queued"] < 0.9
    assert 0.5 < measured["done"] < 2 and measured["first_to_others"][0] > 1
