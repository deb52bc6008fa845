import itertools

import pytest
import torch
import torch.nn.functional as F

from support import data
from support.drawings import Shapes10, write_shapes10
from support.files import DataError
from support.options import pick_device

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CPU = torch.device("cpu")


@pytest.fixture
def lesson(load):
    return load("train_gpu_2.py")


@pytest.fixture(scope="module")
def few_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("few")
    write_shapes10(root / "shapes10.npz", train=100, test=40)
    return root


@pytest.fixture
def small(few_root, tmp_path):
    return {"log_dir": tmp_path, "root": few_root, "batch_size": 24, "timed": 24}


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
    assert f"The best device here is {DEVICE},\n   and this run uses device = cpu\n" in out
    assert "   y              cpu       3 and 7\n" in out
    assert "-> x_there is x itself, as x was there; the model" in out
    assert lesson.show_everyday(DEVICE)["device"] == DEVICE.type


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


def changes(image):
    """All 50 of an image (3, 32, 32), shifted by up to 2 pixels and mirrored or not."""
    padded = F.pad(image[None], (2,) * 4, mode="reflect")[0]
    shifted = [padded[:, i : i + 32, j : j + 32] for i in range(5) for j in range(5)]
    return torch.stack([some for x in shifted for some in (x, x.flip(2))])


def test_the_plain_loop_makes_each_image_by_itself_as_augment_does(lesson, images_root):
    torch.manual_seed(0)
    images, labels = data.as_tensors(Shapes10(images_root))
    stats = data.channel_stats(images)
    loader = lesson.plain_loader(images_root, stats)
    x, y = next(iter(loader))
    assert len(y) == 64 and len(loader) == 12  # of 800 images
    assert x.is_contiguous() and len(y.unique()) > 5 and y.tolist() != sorted(y.tolist())
    wanted = changes(data.normalize(images[:1], *stats)[0])
    at_once = data.normalize(data.augment(images[:1].expand(60, -1, -1, -1)), *stats)
    for drawn in ([loader.dataset[0][0] for _ in range(60)], at_once):
        found = [(wanted - image).abs().amax((1, 2, 3)).min(0) for image in drawn]
        assert max(distance for distance, _ in found) < 1e-5
        assert len({int(place) for _, place in found}) > 20
    assert loader.dataset[0][1] == labels[0]


@pytest.fixture
def tricks(lesson, images_root, few_root, monkeypatch):
    """show_tricks on the CPU with speeds 10, 20 ..., the second reading 5 lower; what it timed."""
    given = []

    def speed(model, batches, device, images):
        x, _ = next(iter(batches))
        weight = next(p for p in model.parameters() if p.dim() == 4)
        given.append((model, x, weight.sum().item(), images))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0)  # as training would change them
        rows = 5 + tricks.compile
        row, again = (len(given) - 1) % rows, len(given) > rows
        return 10.0 * (row + 1) - 5.0 * again

    monkeypatch.setattr(lesson, "speed", speed)
    splits, _ = data.load_splits(images_root, 300, 0)
    stats = data.channel_stats(splits["train"][0])

    def tricks(compile=False, batch_size=100, whole=False):
        if not whole:  # but what is asked is told by fewer images
            batch = torch.randn(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64)
            monkeypatch.setattr(lesson, "plain_loader", lambda *args: [batch])
        tricks.compile = compile
        torch.manual_seed(1)
        root = images_root if whole else few_root
        return lesson.show_tricks(root, splits, stats, CPU, batch_size, compile, 99), given

    return tricks


def test_each_row_has_one_trick_more_and_the_same_weights(lesson, tricks, capsys):
    measured, given = tricks(whole=True)
    assert measured["speeds"] == [10.0, 20.0, 30.0, 40.0, 50.0]
    assert measured["spreads"] == pytest.approx([0.5, 0.25, 1 / 6, 0.125, 0.1])
    losses, offs = list(measured["losses"].values()), list(measured["logits_off"].values())
    assert losses[1:3] == pytest.approx([losses[0]] * 2, abs=1e-5)
    assert 2.2 < losses[0] < 2.5  # ln 10, not the loss of weights at 0
    assert 0 < abs(losses[3] - losses[0]) < 0.02
    begun = [weight for _, _, weight, _ in given]  # the weights of all rows, both times
    assert begun == pytest.approx([begun[0]] * 10, rel=1e-5) and begun[0] != 0
    weights = [model.model if row % 5 == 4 else model for row, (model, *_) in enumerate(given)]
    weights = [model.features[1][0].weight for model in weights]
    last = torch.channels_last
    kept = [w.is_contiguous(memory_format=last) for w in weights]
    assert kept == ([False] + [True] * 4) * 2
    assert isinstance(given[4][0], lesson.Autocast) and given[4][0].enabled
    assert [len(x) for _, x, *_ in given] == ([64] * 3 + [100] * 2) * 2
    kept = [x.is_contiguous(memory_format=last) for _, x, *_ in given]
    assert kept == ([False] * 2 + [True] * 3) * 2
    assert {images for *_, images in given} == {99}
    out = capsys.readouterr().out
    head = "   trick                       made for          loss   logits off   images/s"
    assert head + "   lower by   gain\n" in out
    rows = [line for line in out.splitlines() if line.startswith("   ")][4:9]
    assert [line[3:30].strip() for line in rows] == [
        "plain loop, batches of 64", "channels_last", "uint8 batches", "batches of 100", "autocast",
    ]  # fmt: skip
    assert [line.split()[-3:] for line in rows] == [
        ["10", "50%", "1.0"], ["20", "25%", "2.0"], ["30", "17%", "3.0"], ["40", "12%", "4.0"],
        ["50", "10%", "5.0"],
    ]  # fmt: skip
    told = [line.split()[-5:-3] for line in rows]
    assert told[0] == [f"{losses[0]:.4f}", "-"] and told[3] == ["-", "-"]
    for row, i in ((1, 1), (2, 2), (4, 3)):
        assert told[row] == [f"{losses[i]:.4f}", f"{offs[i]:.7f}"]
    assert "   --compile                   not tried: it is an option\n" in out
    assert "   on the device               not tried: all images lie on the CPU already\n" in out
    assert offs[1] < 1e-5 < offs[3] < 0.02 * measured["largest"] and 0 < offs[2] < 1e-4
    assert 0 < measured["apart"] < 1e-5
    share = f"{offs[3] / measured['largest']:.1%}"
    assert f"-> no logit is off by more than {offs[3]:.4f}, {share} of the largest one;\n" in out
    assert f" cut from one tensor differ by {measured['apart']:.7f} at most\n" in out
    assert '      the fastest row on this cpu is "autocast": 5.0 times row 1;\n' in out
    assert "      readings of one row differ by up to 50%: closer rows may be equal\n" in out


def test_compile_has_a_row_and_small_sets_have_two_batches(lesson, tricks, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "compiled", lambda model, device: model)
    measured, given = tricks(compile=True, batch_size=256)
    assert len(given) == 12 and len(measured["speeds"]) == 6 and len(given[5][1]) == 135  # of 270
    assert len(measured["losses"]) == 5  # not of the row whose network is the one above
    out = capsys.readouterr().out
    assert "   --compile                   GPUs            " in out and "it is an option" not in out
    assert "   batches of 135   " in out


def test_off_the_cpu_the_set_on_the_device_has_a_row(lesson, few_root, monkeypatch, capsys):
    class Elsewhere:
        type = "elsewhere"

    for owner in (torch.Tensor, torch.nn.Module):  # all stays where it is
        real = owner.to

        def to(self, *args, real=real, **kwargs):
            return real(self, *(arg for arg in args if type(arg) is not Elsewhere), **kwargs)

        monkeypatch.setattr(owner, "to", to)
    monkeypatch.setattr(lesson, "speed", lambda *args: 1.0)
    monkeypatch.setattr(lesson, "Autocast", lambda model, device: model)
    splits, _ = data.load_splits(few_root)
    stats = data.channel_stats(splits["train"][0])
    measured = lesson.show_tricks(few_root, splits, stats, Elsewhere(), 100, False, 99)
    assert len(measured["speeds"]) == 6 and "on the device" in measured["losses"]
    assert "lie on the CPU already" not in capsys.readouterr().out


def test_try_without_float_the_loss_is_a_multiple_of_001(lesson, tricks, monkeypatch):
    def forward(self, x):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled):
            return self.model(x)

    monkeypatch.setattr(lesson.Autocast, "forward", forward)
    losses = tricks(whole=True)[0]["losses"]
    assert losses["autocast"] * 100 == pytest.approx(round(losses["autocast"] * 100), abs=1e-6)
    first = losses["plain loop, batches of 64"] * 100
    assert abs(first - round(first)) > 1e-3


def test_a_trick_that_changes_the_logits_is_told(lesson, tricks, monkeypatch, capsys):
    monkeypatch.setattr(lesson.Autocast, "forward", lambda self, x: self.model(x) * 1.05)
    with pytest.raises(AssertionError):
        tricks()
    assert "logits off" in capsys.readouterr().out


def test_images_that_a_batch_makes_wrongly_are_told(lesson, tricks, monkeypatch):
    real = lesson.normalize
    monkeypatch.setattr(lesson, "normalize", lambda x, *stats: real(x, *stats) + 0.001)
    with pytest.raises(AssertionError):
        tricks()


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
    monkeypatch.setattr(lesson, "speed", lambda *args: 1.0)
    lesson.main(**small, compile=True, epochs=1, device="cpu")
    assert used[-4:] == [2] + [24] * 3  # the trial, then every step
    assert used.count(2) == 2 and used.count(100) == 1  # section 2 tried it, too


@pytest.mark.parametrize("seed", range(3))
def test_main_trains_on_whatever_is_there(
    lesson, small, tmp_path, seed, events, capsys, monkeypatch
):
    loader = lesson.DataLoader
    monkeypatch.setattr(lesson, "DataLoader", lambda x, batch_size, **o: loader(x, 8, **o))
    if seed:  # section 2 runs once
        nothing = {"losses": {}, "speeds": [8.0] * (5 if DEVICE.type == "cpu" else 6)}
        monkeypatch.setattr(lesson, "show_tricks", lambda *args: nothing)
    measured = lesson.main(seed=seed, **small, epochs=2)
    out = capsys.readouterr().out
    accuracy = measured["test_accuracy"]
    assert f"-> of 40 test images, seen once, {accuracy:.1%} are named rightly\n" in out
    auto = "on" if lesson.pays_autocast(DEVICE) else "off (--autocast turns it on)"
    title = f"3. How well does it learn? On {DEVICE}, batches of 24, autocast {auto}\n"
    assert title + "   epoch   train loss   val loss   val accuracy   images/s\n" in out
    last = next(line for line in out.splitlines() if line.startswith("       2   ")).split()
    assert last[3] == f"{measured['val_accuracy']:.3f}" and len(measured["speeds"]) == 5 + (
        DEVICE.type != "cpu"
    )
    logged = events(next(tmp_path.glob(f"*-{DEVICE.type}")))
    found = [(e.step, e.value) for e in logged.Scalars("tricks/images_per_second")]
    assert found == [(i, pytest.approx(v)) for i, v in enumerate(measured["speeds"], start=1)]
    found = [(e.step, e.value) for e in logged.Scalars("val/accuracy")]
    assert [step for step, _ in found] == [3, 6]
    assert found[-1][1] == pytest.approx(measured["val_accuracy"])
    assert measured["images_per_second"] > 0 and 0 <= measured["test_accuracy"] <= 1
    losses = events(next(tmp_path.glob(f"*-{DEVICE.type}"))).Scalars("train/loss")
    assert [e.step for e in losses] == list(range(1, 7)) and losses[0].value < 5


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
    assert convolutions[:9] == [wanted] * 9 and convolutions[-1] == torch.float32  # the test
    told = "on" if asked else "off (--autocast turns it on)"
    assert f"autocast {told}\n" in capsys.readouterr().out


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
    splits, _ = data.load_splits(small["root"])
    assert [len(y) for y in judged] == [10, 10, 40]
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
    assert measured["images_per_second"] == 3 * 24
    logged = events(next(tmp_path.iterdir())).Scalars("perf/images_per_second")
    assert [e.value for e in logged] == [9, 72, 72]


def test_a_test_loss_that_is_not_finite_stops_it_too(lesson, small, monkeypatch, without_tricks):
    calls, real = [], lesson.evaluate

    def poison(*args):
        calls.append(args)
        loss, *rest = real(*args)
        return loss * (float("inf") if len(calls) == 3 else 1.0), *rest

    monkeypatch.setattr(lesson, "evaluate", poison)
    with pytest.raises(DataError, match="the test loss is inf at step 6: begin anew"):
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
