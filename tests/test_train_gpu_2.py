import pytest
import torch
import torch.nn.functional as F

from support import data
from support.files import DataError
from support.options import pick_device

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CPU = torch.device("cpu")


@pytest.fixture
def lesson(load):
    return load("train_gpu_2.py")


@pytest.fixture
def small(images_root, tmp_path):
    return {"log_dir": tmp_path, "root": images_root, "batch_size": 32, "limit": 300}


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


def test_autocast_does_not_pay_on_the_cpu(lesson):
    assert not lesson.pays_autocast(CPU)


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "xpu:7", "meta", "hpu"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(DataError, match=rf"no device '{name}' here; there is .*cpu"):
        pick_device(name)


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--lr", "nan"], ["--device"], ["--fast"]])
def test_wrong_arguments_end_with_status_2(lesson, wrong):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(wrong)
    assert stop.value.code == 2


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
    assert used == [2] + [32] * 8  # the trial, then every step


@pytest.mark.parametrize("seed", range(3))
def test_main_trains_on_whatever_is_there(lesson, small, tmp_path, seed, events):
    measured = lesson.main(seed=seed, **small, epochs=2)
    assert measured["images_per_second"] > 0 and 0 <= measured["test_accuracy"] <= 1
    losses = events(next(tmp_path.glob(f"*-{DEVICE.type}"))).Scalars("train/loss")
    assert [e.step for e in losses] == list(range(1, 17)) and losses[0].value < 5


def test_it_trains_validates_and_tests_on_three_sets(lesson, small, monkeypatch):
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
    lesson, small, monkeypatch, events, tmp_path
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


@pytest.mark.parametrize("name", ["train_epoch", "evaluate"])
def test_a_loss_that_is_not_finite_stops_the_run(lesson, small, monkeypatch, name):
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
    assert (
        lesson.main(log_dir=tmp_path, root=images_root, device="cuda")["images_per_second"] > 5000
    )
