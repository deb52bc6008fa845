import hashlib
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg11, vgg16, vgg19
from torchvision.models.vgg import VGG, cfgs, make_layers

from support.files import DataError

NO_WEIGHTS = "vgg16-00000000.pth"
SMALL = {"size": 16, "batch": 4, "epochs": 40}


@pytest.fixture
def lesson(load):
    return load("model_pretrained.py")


def narrow(batch_norm=False):
    """A VGG of two narrow convolutions and narrow Linear layers, for 20 classes."""
    with torch.device("meta"):
        net = VGG(nn.Identity(), init_weights=False)
    net.features = make_layers([8, "M", 12, "M"], batch_norm)
    sizes = [(12 * 7 * 7, 16), (16, 18), (18, 20)]
    first, second, third = (nn.Linear(*size) for size in sizes)
    net.classifier = nn.Sequential(
        first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout(), third
    )
    return net


@pytest.fixture
def place(lesson, tmp_path, monkeypatch):
    """weights_path() in an empty folder: give a file of this name to have weights."""

    def at(name=NO_WEIGHTS):
        path = tmp_path / "hub" / name
        monkeypatch.setattr(lesson, "weights_path", lambda: path)
        return path

    return at


def put_weights(place, state, tmp_path):
    """A state dict where the ImageNet weights belong, under its own hash."""
    torch.save(state, tmp_path / "state.pth")
    data = (tmp_path / "state.pth").read_bytes()
    path = place(f"vgg16-{hashlib.sha256(data).hexdigest()[:8]}.pth")
    path.parent.mkdir()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("build", "column"), [(vgg11, "A"), (vgg16, "D"), (vgg19, "E")])
@pytest.mark.parametrize("classes", [1000, 37])
def test_parameters_by_formula_are_torchvisions(lesson, build, column, classes):
    with torch.device("meta"):
        net = build(num_classes=classes)
    rows = lesson.expected_parameters(cfgs[column], (25088, 4096, 4096, classes))
    weights = [p for p in net.parameters() if p.dim() > 1]
    assert [(w.shape[1], w.shape[0]) for w in weights] == [row[:2] for row in rows]
    assert lesson.count_parameters(net) == sum(row[2] for row in rows)


def test_vgg16_has_the_parameters_of_the_paper(lesson):
    assert sum(row[2] for row in lesson.expected_parameters()) == 138_357_544
    assert cfgs["D"] == list(lesson.FEATURES)


@pytest.mark.parametrize("kind", ["added", "new"])
def test_a_head_changes_the_outputs_and_nothing_before(lesson, kind):
    torch.manual_seed(0)
    x, net = torch.randn(3, 3, 40, 24), narrow().eval()
    old, before = net(x), lesson.head_inputs(net, x)
    name, head = lesson.change_head(net, kind, classes=7)
    assert net.get_submodule(name.rstrip(".")) is head
    assert [p.requires_grad for p in net.parameters()].count(True) == 2
    kept = old if kind == "added" else before
    torch.testing.assert_close(net(x), kept @ head.weight.T + head.bias)
    assert net(x).shape == (3, 7)


def test_with_state_uses_the_very_tensors(lesson):
    torch.manual_seed(0)
    x, net = torch.randn(2, 3, 32, 32), narrow().eval()
    again = lesson.with_state(narrow, net.state_dict())
    assert torch.equal(again(x), net(x)) and not again.training
    pairs = zip(again.parameters(), net.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_a_gradient_of_zero_is_not_none_and_weight_decay_moves_what_is_frozen(lesson):
    torch.manual_seed(0)
    net = narrow().eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(net(x), y).backward()
    net.features.requires_grad_(False)
    frozen = {name: p.clone() for name, p in net.features.named_parameters()}
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    for name, p in net.features.named_parameters():
        torch.testing.assert_close(p, frozen[name] * (1 - 0.1 * 0.1))
        frozen[name] = p.clone()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in net.features.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_try_batch_norm_moves_in_frozen_features_unless_in_eval(lesson, training):
    torch.manual_seed(0)
    net = narrow(batch_norm=True)
    name, _ = lesson.change_head(net, "new")
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    net.train(training)
    lesson.train_whole(net, torch.randn(4, 3, 32, 32), torch.arange(4), steps=1)
    changed = {key for key, t in net.state_dict().items() if not torch.equal(t, before[key])}
    statistics = {f"features.{i}.{part}" for i in (1, 5)
                  for part in ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert changed == {f"{name}weight", f"{name}bias"} | (statistics if training else set())


def test_without_weights_there_are_none_and_a_damaged_file_is_named(lesson, place):
    path = place()
    assert lesson.imagenet_state() is None
    path.parent.mkdir()
    path.write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"vgg16-00000000\.pth is damaged.*--download") as error:
        lesson.imagenet_state()
    assert "\n" not in str(error.value)


def test_the_weights_lie_where_torchvision_looks_for_them(lesson, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert lesson.weights_path() == tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value")])
def test_a_failed_download_is_one_line(lesson, place, monkeypatch, error):
    def fail(*_):
        raise error

    path = place()
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(DataError, match=r"cannot fetch https://\S+ \(528 MB\): .*try again") as end:
        lesson.imagenet_state(download=True)
    assert "\n" not in str(end.value) and str(path) in str(end.value)


def test_download_fetches_what_is_not_there_or_damaged_and_nothing_else(
    lesson, place, tmp_path, monkeypatch
):
    state, calls = {"a": torch.arange(3)}, []
    path = put_weights(place, state, tmp_path)
    whole = path.read_bytes()

    def fetch(url, where, prefix):
        calls.append((url, prefix))
        where.write_bytes(whole)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for damage in (None, path.unlink, lambda: path.write_bytes(whole[:-1])):
        if damage:
            damage()
        assert torch.equal(lesson.imagenet_state(download=True)["a"], state["a"])
    assert calls == [(lesson.WEIGHTS.url, path.stem[-8:])] * 2


def test_arguments(lesson, capsys):
    assert lesson.parse([]).download is False and lesson.parse(["--download"]).download is True
    with pytest.raises(SystemExit) as end:
        lesson.parse(["--fetch"])
    assert end.value.code == 2 and "--fetch" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_main_moves_the_head_and_nothing_else(
    lesson, place, images_root, tmp_path, events, capsys, seed
):
    place()
    measured = lesson.main(
        seed=seed, log_dir=tmp_path / "runs", root=images_root, build=narrow, **SMALL
    )
    assert measured["total"] == 138_357_544
    assert measured["heads"] == {"added": (138_367_554, 10_010), "new": (134_301_514, 40_970)}
    assert measured["moved"] == {
        "added": {"features": [0, 4], "classifier": [0, 6], "head": [2, 2]},
        "new": {"features": [0, 4], "classifier": [0, 4], "head": [2, 2]},
        "new, features thawed": {"features": [4, 4], "classifier": [0, 4], "head": [2, 2]},
    }
    assert list(measured["accuracy"]) == ["random"]
    first = capsys.readouterr().out.splitlines()[0]
    assert "weights: none" in first and "--download" in first
    losses = events(tmp_path / "runs" / "random_train").Scalars("head/loss")
    assert losses[-1].value < losses[0].value
    assert losses[-1].step == SMALL["epochs"] - 1


def test_main_with_weights_trains_a_head_on_them_too(lesson, place, images_root, tmp_path, capsys):
    torch.manual_seed(5)
    path = put_weights(place, narrow().state_dict(), tmp_path)
    measured = lesson.main(log_dir=tmp_path / "runs", root=images_root, build=narrow, **SMALL)
    assert list(measured["accuracy"]) == ["random", "imagenet"]
    assert capsys.readouterr().out.startswith(f"weights: {path}\n")
    assert {run.name for run in (tmp_path / "runs").iterdir()} == {
        f"{source}_{split}" for source in ("random", "imagenet") for split in ("train", "val")
    }
