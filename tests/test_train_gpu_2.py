import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from support import data
from support.drawings import Shapes10
from support.files import DataError
from support.options import pick_device

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CPU = torch.device("cpu")


@pytest.fixture
def lesson(load):
    return load("train_gpu_2.py")


@pytest.fixture
def small(images_root, tmp_path):
    return {"log_dir": tmp_path, "root": images_root, "batch_size": 32, "limit": 300, "timed": 32}


def test_an_epoch_is_every_image_once_with_its_label_shuffled_and_augmented(lesson, monkeypatch):
    monkeypatch.setattr(lesson, "augment", lambda x: x + 100)
    labels = torch.arange(50)
    images = labels[:, None, None, None].expand(50, 3, 4, 4).to(torch.uint8)
    stats = torch.zeros(3), torch.full((3,), 1 / 255)
    batches = list(lesson.device_batches(images, labels, stats, 12))
    seen = torch.cat([y for _, y in batches])
    assert len(batches) == 4 and len(seen.unique()) == 48
    assert not torch.equal(seen, seen.sort().values)
    for x, y in batches:
        torch.testing.assert_close(x[:, 0, 0, 0], y.float() + 100)


def test_autocast_off_is_the_model_itself_and_on_is_bfloat16_within(lesson):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(5, 3), torch.randn(7, 5)
    inside = []
    model.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    off, on = (lesson.Autocast(model, CPU, enabled)(x) for enabled in (False, True))
    assert torch.equal(off, model(x)) and on.dtype == torch.float32
    assert inside[:2] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(on, off, rtol=2e-2, atol=2e-2)


def test_no_step_waits_for_the_device(lesson, load, monkeypatch):
    def wait(self, *args):
        raise AssertionError("a step asked for a number")

    train, model = load("train.py"), torch.nn.Linear(5, 3)
    batches = [(torch.randn(7, 5), torch.randint(3, (7,))) for _ in range(4)]
    optimizer, scheduler = train.make_optimizer(model, 0.2, 4)
    lesson.train_epoch(model, batches[:1], optimizer, scheduler, CPU)
    copies, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "item", wait)
    monkeypatch.setattr(torch.Tensor, "__float__", wait)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or real(self))
    losses, _ = lesson.train_epoch(model, batches[1:], optimizer, scheduler, CPU)
    assert losses.shape == (3,) and len(copies) == 1  # once an epoch


def test_autocast_surely_pays_on_cuda_with_bfloat16_in_its_chip(lesson, monkeypatch):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return True

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert lesson.pays_autocast(torch.device("cuda")) and asked == [False]
    for name in ("cpu", "mps", "xpu"):
        assert not lesson.pays_autocast(torch.device(name))


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "xpu:7", "meta", "hpu"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(DataError, match=rf"no device '{name}' here; there is .*cpu"):
        pick_device(name)


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--lr", "nan"], ["--device"], ["--fast"]])
def test_wrong_arguments_end_with_status_2(lesson, wrong):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(wrong)
    assert stop.value.code == 2


def test_arguments(lesson):
    given = lesson.parse(["--compile", "--autocast", "--batch-size", "7"])
    assert given == {"compile": True, "autocast": True, "batch_size": 7}
    assert lesson.parse([]) == {}


def test_everyday_moves_the_model_itself_and_a_copy_of_x(lesson, capsys):
    found = lesson.show_everyday(CPU)
    assert found == {"y": [[3.0], [7.0]], "device": "cpu"}
    out = capsys.readouterr().out
    assert "device = cpu\n" in out and "   y              cpu       3 and 7\n" in out
    assert "-> x_there is x itself, as x was there; the model" in out
    assert lesson.show_everyday(None)["device"] == DEVICE.type


# --- section 2: the tricks ---------------------------------------------------------------------


def test_speed_leaves_the_first_step_out_and_waits_before_each_reading(lesson, load, monkeypatch):
    order, ticks = [], iter([10.0, 12.0])
    real = lesson.train_epoch

    def train(model, batches, optimizer, scheduler, device):
        batches = list(batches)
        order.append([len(y) for _, y in batches])
        assert optimizer.param_groups[0]["lr"] < 0.01
        return real(model, batches, optimizer, scheduler, device)

    monkeypatch.setattr(lesson, "train_epoch", train)
    monkeypatch.setattr(lesson, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(lesson.time, "perf_counter", lambda: order.append("clock") or next(ticks))
    model, batch = torch.nn.Linear(5, 3), (torch.randn(7, 5), torch.randint(3, (7,)))
    before = model.weight.detach().clone()
    assert lesson.speed(model, [batch] * 9, CPU, images=30) == 4 * 7 / 2
    assert order == [[7], "wait", "clock", [7] * 4, "wait", "clock"]
    assert not torch.equal(model.weight, before)
    ticks = iter([0.0, 1.0])
    assert lesson.speed(model, itertools.repeat(batch), CPU, images=3) == 7


def test_the_plain_loop_makes_each_image_by_itself(lesson, images_root):
    torch.manual_seed(0)
    images, labels = data.as_tensors(Shapes10(images_root))
    stats = data.channel_stats(images)
    batches = list(lesson.plain_loader(images_root, stats))
    assert [len(y) for _, y in batches] == [64] * 12  # of 800 images
    wanted = data.normalize(images, *stats)
    x, y = batches[0]
    places = [(wanted - image).abs().amax((1, 2, 3)).argmin().item() for image in x[:9]]
    torch.testing.assert_close(x[:9], wanted[places], check_stride=False)
    assert y[:9].tolist() == labels[places].tolist()
    assert places != sorted(places) and x.is_contiguous()


@pytest.fixture
def tricks(lesson, images_root, monkeypatch):
    """show_tricks on the CPU with speeds 10, 20 ...; and what speed was given."""
    given = []

    def speed(model, batches, device, images):
        x, y = next(iter(batches))
        given.append((model, x, y, images))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0)  # as training would change them
        return 10.0 * len(given)

    monkeypatch.setattr(lesson, "speed", speed)
    splits, _ = data.load_splits(images_root, 300, 0)
    stats = data.channel_stats(splits["train"][0])

    def show(compile=False, batch_size=100):
        torch.manual_seed(1)
        return lesson.show_tricks(images_root, splits, stats, CPU, batch_size, compile, 99), given

    return show


def test_each_row_has_one_trick_more_and_the_same_weights(lesson, tricks, capsys, monkeypatch):
    measured, given = tricks()
    assert measured["speeds"] == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert measured["losses"][1:5] == pytest.approx([measured["losses"][0]] * 4, abs=1e-5)
    assert 2.2 < measured["losses"][0] < 2.5  # ln 10, not the loss of weights at 0
    assert 0 < abs(measured["losses"][5] - measured["losses"][0]) < 0.02
    weights = [model.model if row == 5 else model for row, (model, *_) in enumerate(given)]
    weights = [model.features[1][0].weight for model in weights]
    last = torch.channels_last
    assert [w.is_contiguous(memory_format=last) for w in weights] == [False] + [True] * 5
    assert isinstance(given[5][0], lesson.Autocast) and given[5][0].enabled
    assert [len(x) for _, x, _, _ in given] == [64] * 4 + [100] * 2
    assert [x.is_contiguous(memory_format=last) for _, x, _, _ in given] == [False] * 2 + [True] * 4
    assert {images for *_, images in given} == {99}
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("   ")][2:8]
    assert [line[3:30].strip() for line in rows] == [
        "plain loop, batches of 64", "channels_last", "uint8 batches", "on the device",
        "batches of 100", "autocast",
    ]  # fmt: skip
    for i, line in enumerate(rows):
        numbers = measured["losses"][i], measured["logits_off"][i]
        told = [f"{numbers[0]:.4f}", f"{numbers[1]:.4f}", f"{10 * i + 10}", f"{i + 1}.0"]
        assert line.split()[-4:] == told
    assert "   --compile                   GPUs              not tried" in out
    assert max(measured["logits_off"][:5]) < 1e-5 < measured["logits_off"][5] < 0.05
    off = f"{measured['logits_off'][5]:.4f}"
    told = rf"-> no logit is off by more than {off}, the largest being 0\.[1-9]\d;\n"
    assert re.search(told, out)
    assert '      the fastest row on this cpu is "autocast": 6.0 times row 1\n' in out
    assert "   trick                       written for       loss   logits off   images/s" in out


def test_compile_has_a_row_and_small_sets_have_two_batches(lesson, tricks, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "compiled", lambda model, device: model)
    measured, given = tricks(compile=True, batch_size=256)
    assert len(given) == len(measured["losses"]) == 7 and len(given[6][1]) == 135  # of 270
    out = capsys.readouterr().out
    assert "   --compile                   GPUs            " in out and "not tried" not in out
    assert "   batches of 135   " in out


def test_try_without_float_the_loss_is_a_multiple_of_001(lesson, tricks, monkeypatch):
    def forward(self, x):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled):
            return self.model(x)

    monkeypatch.setattr(lesson.Autocast, "forward", forward)
    losses = tricks()[0]["losses"]
    assert losses[5] * 100 == pytest.approx(round(losses[5] * 100), abs=1e-6)
    assert abs(losses[0] * 100 - round(losses[0] * 100)) > 1e-3


@pytest.mark.parametrize("factor", [1.5, 0.0])
def test_a_trick_that_changes_the_logits_is_told(lesson, tricks, monkeypatch, capsys, factor):
    monkeypatch.setattr(lesson.Autocast, "forward", lambda self, x: self.model(x) * factor)
    with pytest.raises(AssertionError):
        tricks()
    assert "logits off" in capsys.readouterr().out


# --- section 3: training -----------------------------------------------------------------------


@pytest.fixture
def without_tricks(lesson, monkeypatch):
    nothing = {"losses": [2.0, 2.0], "speeds": [5.0, 7.0]}
    monkeypatch.setattr(lesson, "show_tricks", lambda *args: nothing)


def test_compile_that_cannot_work_is_one_line_else_it_is_used(lesson, small, monkeypatch):
    def broken(model):
        raise RuntimeError("no C++ compiler\nwas found, and here are eighty lines more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        DataError, match="--compile does not work here: RuntimeError: no C"
    ) as error:
        lesson.main(**small, compile=True)
    assert len(str(error.value).splitlines()) == 1
    used = []

    class Compiled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            used.append(len(x))
            return self.model(x)

    monkeypatch.setattr(torch, "compile", Compiled)
    lesson.main(**small, compile=True, epochs=1, device="cpu")
    assert used[-9:] == [2] + [32] * 8  # the trial, then every step
    assert used.count(2) == 2 and used.count(200) == 2  # section 2 tried it, too


@pytest.mark.parametrize("seed", range(3))
def test_main_trains_on_whatever_is_there(lesson, small, tmp_path, seed, events, capsys):
    measured = lesson.main(seed=seed, **small, epochs=2)
    out = capsys.readouterr().out
    accuracy = measured["test_accuracy"]
    assert f"-> of 200 test images, seen once, {accuracy:.1%} are named rightly\n" in out
    auto = "on" if lesson.pays_autocast(DEVICE) else "off"
    title = f"3. How well does it learn? On {DEVICE}, batches of 32, autocast {auto}\n"
    assert title + "   epoch   train loss   val loss   val accuracy   images/s\n" in out
    last = next(line for line in out.splitlines() if line.startswith("       2   ")).split()
    assert last[3] == f"{measured['val_accuracy']:.3f}" and len(measured["speeds"]) == 6
    logged = events(next(tmp_path.glob(f"*-{DEVICE.type}")))
    found = [(e.step, e.value) for e in logged.Scalars("tricks/images_per_second")]
    assert found == [(i, pytest.approx(v)) for i, v in enumerate(measured["speeds"], start=1)]
    found = [(e.step, e.value) for e in logged.Scalars("val/accuracy")]
    assert [step for step, _ in found] == [8, 16]
    assert found[-1][1] == pytest.approx(measured["val_accuracy"])
    assert measured["images_per_second"] > 0 and 0 <= measured["test_accuracy"] <= 1
    losses = events(next(tmp_path.glob(f"*-{DEVICE.type}"))).Scalars("train/loss")
    assert [e.step for e in losses] == list(range(1, 17)) and losses[0].value < 5


@pytest.mark.parametrize("asked", [False, True])
def test_autocast_is_used_where_it_is_asked_for(lesson, small, without_tricks, capsys, asked):
    inside = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: inside.append((type(module).__name__, out.dtype))
    )
    lesson.main(**small, epochs=1, device="cpu", autocast=asked)
    hook.remove()
    wanted = torch.bfloat16 if asked else torch.float32
    convolutions = [dtype for name, dtype in inside if name == "Conv2d"]
    assert convolutions[:24] == [wanted] * 24 and convolutions[-1] == torch.float32  # the test
    assert f"autocast {'on' if asked else 'off'}\n" in capsys.readouterr().out


def test_the_set_is_moved_to_the_device_once(lesson, small, monkeypatch, without_tricks):
    moved, used, real, batches = [], [], torch.Tensor.to, lesson.device_batches

    def to(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        if args and isinstance(args[0], torch.device):
            moved.append(out.data_ptr())
        return out

    def watch(images, labels, stats, batch_size):
        used.append([t.data_ptr() for t in (images, labels, *stats)])
        return batches(images, labels, stats, batch_size)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(lesson, "device_batches", watch)
    lesson.main(**small, epochs=2, device="cpu")
    assert len(used) == 2 and used[0] == used[1]
    assert [moved.count(place) for place in used[0][:2]] == [1, 1]
    assert set(used[0]) <= set(moved)


def test_the_training_of_a_seed_does_not_depend_on_section_2(
    lesson, small, monkeypatch, tmp_path, without_tricks
):
    losses = [lesson.main(**small, epochs=1, device="cpu")["test_loss"]]
    drawing = {"losses": [2.0], "speeds": [float(torch.rand(1))]}
    monkeypatch.setattr(lesson, "show_tricks", lambda *args: torch.rand(3) is None or drawing)
    losses.append(lesson.main(**{**small, "log_dir": tmp_path / "b"}, epochs=1, device="cpu")[
        "test_loss"])  # fmt: skip
    assert losses[0] == losses[1]


def test_it_trains_validates_and_tests_on_three_sets(lesson, small, monkeypatch, without_tricks):
    models, judged = [], []

    def watch(model, loader, device):
        models.append(model)
        judged.append(loader.dataset.tensors[1].cpu())
        return real(model, loader, device)

    real = lesson.evaluate
    monkeypatch.setattr(lesson, "evaluate", watch)
    measured = lesson.main(**small, epochs=2)
    splits, _ = data.load_splits(small["root"], 300, 0)
    assert [len(y) for y in judged] == [30, 30, 200]
    assert torch.equal(judged[0], splits["val"][1]) and torch.equal(judged[-1], splits["test"][1])
    stats = data.channel_stats(splits["train"][0])
    x, y = data.normalize(splits["test"][0], *stats), splits["test"][1]
    with torch.no_grad():
        hits = models[-1].cpu().eval()(x).argmax(1) == y
    assert measured["test_accuracy"] == pytest.approx(hits.float().mean().item(), abs=0.02)


def test_on_the_cpu_its_losses_are_train_pys_for_the_same_batches(lesson, load):
    train, after = load("train.py"), []
    model = load("model.py").Moli()
    start = {name: w.clone() for name, w in model.state_dict().items()}
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(3)]
    for wrapped in (model, lesson.Autocast(model, CPU, False)):
        model.load_state_dict(start)
        losses, _ = train.train_epoch(wrapped, batches, *train.make_optimizer(model, 0.2, 3), CPU)
        after.append(losses)
    assert torch.equal(*after)
    model.load_state_dict(start)
    first = F.cross_entropy(model.train()(batches[0][0]), batches[0][1])
    torch.testing.assert_close(after[0][0], first.detach(), rtol=1e-5, atol=1e-6)


def test_the_clock_waits_before_and_after_and_the_first_epoch_is_left_out(
    lesson, small, monkeypatch, events, tmp_path, without_tricks
):
    order, ticks = [], iter([0.0, 8.0, 10.0, 11.0, 20.0, 21.0])
    real = lesson.train_epoch
    monkeypatch.setattr(lesson, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(lesson, "train_epoch", lambda *a: order.append("train") or real(*a))
    monkeypatch.setattr(lesson.time, "perf_counter", lambda: order.append("clock") or next(ticks))
    measured = lesson.main(**small, epochs=3)
    assert order == ["wait", "clock", "train", "wait", "clock"] * 3
    assert measured["images_per_second"] == 8 * 32
    logged = events(next(tmp_path.iterdir())).Scalars("perf/images_per_second")
    assert [e.value for e in logged] == [32, 256, 256]


def test_a_test_loss_that_is_not_finite_stops_it_too(lesson, small, monkeypatch, without_tricks):
    calls, real = [], lesson.evaluate

    def poison(*args):
        calls.append(args)
        loss, *rest = real(*args)
        return loss * (float("inf") if len(calls) == 3 else 1.0), *rest

    monkeypatch.setattr(lesson, "evaluate", poison)
    with pytest.raises(DataError, match="the test loss is inf at step 16: begin anew"):
        lesson.main(**small, epochs=2)


@pytest.mark.parametrize("name", ["train_epoch", "evaluate"])
def test_a_loss_that_is_not_finite_stops_the_run(lesson, small, monkeypatch, name, without_tricks):
    real = getattr(lesson, name)

    def poison(*args):
        loss, *rest = real(*args)
        return loss * float("inf"), *rest

    monkeypatch.setattr(lesson, name, poison)
    with pytest.raises(DataError, match=r"loss is inf at step .: begin anew with a smaller --lr"):
        lesson.main(**small)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_on_cuda_the_batches_are_made_on_the_device(lesson, images_root, tmp_path):
    images, labels = (t.to(DEVICE) for t in data.load_splits(images_root)[0]["train"])
    stats = [t.to(DEVICE) for t in data.channel_stats(images.cpu())]
    x, y = next(lesson.device_batches(images, labels, stats, 16))
    assert x.is_cuda and y.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
    measured = lesson.main(log_dir=tmp_path, root=images_root, device="cuda")
    assert measured["images_per_second"] > 5000
    assert measured["speeds"][5] > 2 * measured["speeds"][0]
