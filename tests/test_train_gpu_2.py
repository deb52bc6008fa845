import pytest
import torch

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@pytest.fixture
def lesson(load):
    return load("train_gpu_2.py")


def test_queue_epoch_is_train_epoch(lesson, load):
    train, after = load("train.py"), []
    for epoch in (train.train_epoch, lambda *args: lesson.queue_epoch(*args, autocast=False)):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        batches = [(torch.randn(7, 5), torch.randint(3, (7,))) for _ in range(6)]
        losses = list(epoch(model, batches, *train.make_optimizer(model, 0.2, 6)))
        after.append([*losses, model.weight.detach(), model.bias.detach()])
    for ours, theirs in zip(*after, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_no_step_waits_for_the_device(lesson, load, monkeypatch):
    def wait(self):
        raise AssertionError("a step asked for a number")

    train, model = load("train.py"), torch.nn.Linear(5, 3)
    optimizer, scheduler = train.make_optimizer(model, 0.2, 4)
    batches = [(torch.randn(7, 5), torch.randint(3, (7,))) for _ in range(4)]
    lesson.queue_epoch(model, batches[:1], optimizer, scheduler, autocast=False)
    monkeypatch.setattr(torch.Tensor, "item", wait)
    monkeypatch.setattr(torch.Tensor, "__float__", wait)
    assert lesson.queue_epoch(model, batches[1:], optimizer, scheduler, False).shape == (3,)


def test_autocast_does_not_pay_on_the_cpu(lesson):
    assert not lesson.pays_autocast(torch.device("cpu"))


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "xpu:7", "meta", "hpu"])
def test_a_device_that_is_not_there_is_one_line(lesson, name):
    with pytest.raises(SystemExit, match=rf"no device '{name}' here; there is .*cpu"):
        lesson.pick_device(name)


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--lr", "nan"], ["--device"], ["--fast"]])
def test_wrong_arguments_end_with_status_2(lesson, wrong):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(wrong)
    assert stop.value.code == 2


@pytest.mark.parametrize("seed", range(3))
def test_main_trains_on_whatever_is_there(lesson, images_root, tmp_path, seed, events):
    measured = lesson.main(
        seed=seed, log_dir=tmp_path, root=images_root, epochs=2, batch_size=32, limit=300
    )
    assert measured["images_per_second"] > 0 and 0 <= measured["test_accuracy"] <= 1
    losses = events(next(tmp_path.glob(f"*-{DEVICE.type}"))).Scalars("train/loss")
    assert [e.step for e in losses] == list(range(1, 17)) and losses[0].value < 5


def test_a_loss_that_is_not_finite_stops_the_run(lesson, images_root, tmp_path):
    with pytest.raises(SystemExit, match="try a smaller --lr"):
        lesson.main(log_dir=tmp_path, root=images_root, epochs=3, lr=1e18, limit=300, batch_size=32)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_on_cuda_the_batches_are_made_on_the_device(lesson, images_root, tmp_path, load):
    train = load("train.py")
    images, labels = (t.to(DEVICE) for t in train.load_data(images_root)[0]["train"])
    stats = [t.to(DEVICE) for t in load("dataset_transform.py").channel_stats(images.cpu())]
    x, y = next(train.training_batches(images, labels, stats, 16))
    assert x.is_cuda and y.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
    assert (
        lesson.main(log_dir=tmp_path, root=images_root, device="cuda")["images_per_second"] > 5000
    )
