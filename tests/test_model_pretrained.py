import contextlib
import hashlib
import io
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg11, vgg16, vgg19
from torchvision.models.vgg import VGG, cfgs, make_layers

from support import data, drawings
from support.data import as_tensors, channel_stats, normalize
from support.drawings import Shapes10
from support.files import DataError

NO_WEIGHTS = "vgg16-00000000.pth"
WAYS = ["frozen", "all_lr_0.0001", "all_lr_0.001", "anew", "random"]


@pytest.fixture(scope="module")
def lesson(load):
    return load("model_pretrained.py")


@pytest.fixture(scope="module")
def small(lesson, tmp_path_factory):
    """One run of main, small: what it measured and printed, its logs, the pretrained weights."""
    root = tmp_path_factory.mktemp("shapes")  # enough for features that serve other shapes, too
    drawings.write_shapes10(root / "shapes10.npz", train=1000, test=300)
    log_dir, told, states, grids = tmp_path_factory.mktemp("pretrained"), io.StringIO(), [], []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        pretrain, grid = lesson.pretrain, lesson.prediction_grid
        patch.setattr(lesson, "pretrain", lambda *a: states.append(pretrain(*a)) or states[0])
        patch.setattr(lesson, "prediction_grid", lambda *a, **k: grids.append(a) or grid(*a, **k))
        patch.setattr(lesson, "weights_path", lambda weights: log_dir / NO_WEIGHTS)
        patch.setattr(lesson, "have_weights", lambda *a: False)
        measured = lesson.main(log_dir=log_dir, root=root, epochs=6, draws=2, steps=10)
    return SimpleNamespace(
        measured=measured,
        out=told.getvalue(),
        log_dir=log_dir,
        state=states[0],
        grid=grids[0],
        root=root,
    )


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
def few(small, lesson, images_root):
    """Normalised images of the three new shapes, 4 of each, and their labels."""
    torch.manual_seed(0)
    images, labels = lesson.pick_classes(Shapes10(images_root), range(7, 10))
    places = lesson.few_of_each(labels, 4)
    return normalize(images[places], *channel_stats(images)), labels[places]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


# --- a new head --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["added", "new"])
def test_a_head_changes_the_outputs_and_nothing_before(lesson, kind):
    torch.manual_seed(0)
    x, net = torch.randn(3, 3, 40, 24), narrow().eval()
    old, before = net(x), lesson.head_inputs(net, x)
    name, head = lesson.change_head(net, kind, classes=7)
    assert name == {"added": "classifier.7.", "new": "classifier.6."}[kind]
    assert net.get_submodule(name.rstrip(".")) is head and len(net.classifier) == int(name[11]) + 1
    assert [p.requires_grad for p in net.parameters()].count(True) == 2
    assert all(p.requires_grad for p in head.parameters())
    kept = old if kind == "added" else before
    torch.testing.assert_close(net(x), kept @ head.weight.T + head.bias)
    assert net(x).shape == (3, 7)


def test_the_inputs_of_the_head_are_what_it_gets_and_the_head_is_back(lesson):
    torch.manual_seed(0)
    x, net, got = torch.randn(130, 3, 8, 8), narrow().eval(), []
    last = net.classifier[6]
    last.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    inputs = lesson.head_inputs(net, x)
    net(x)
    torch.testing.assert_close(inputs, got[0].detach())
    assert net.classifier[6] is last and inputs.shape == (130, 18) and not inputs.requires_grad


@pytest.mark.parametrize("kind", ["added", "new"])
def test_the_gradient_from_stored_inputs_is_that_through_the_network(lesson, few, small, kind):
    (x, y), (net, _, head) = few, lesson.with_head(small.state, kind)
    net.eval()
    through, stored = (
        torch.autograd.grad(F.cross_entropy(logits, y), head.weight)[0]
        for logits in (net(x), head(lesson.head_inputs(net, x)))
    )
    torch.testing.assert_close(through, stored)


def test_a_moli_gets_the_weights_or_none_and_a_head_for_three(lesson, small):
    torch.manual_seed(1)
    net, name, head = lesson.with_head(small.state)
    weight = "features.0.0.weight"
    assert torch.equal(net.state_dict()[weight], small.state[weight])
    assert name == "classifier.3." and head.weight.shape == (3, 64)
    net, name, head = lesson.with_head(None, "added")
    assert not torch.equal(net.state_dict()[weight], small.state[weight])
    assert name == "classifier.4." and head.weight.shape == (3, 7)


def test_moved_tells_each_part(lesson, small):
    net, name, _ = lesson.with_head(small.state)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    none = {"features": [0, 9], "statistics": [0, 9], "classifier": [0, 2], "head": [0, 2]}
    assert lesson.moved(before, net, name) == none and list(none) == list(
        lesson.moved(before, net, name)
    )
    for key, part in {
        "features.1.0.weight": "features",
        "features.2.2.bias": "features",
        "features.2.2.running_var": "statistics",
        "classifier.1.bias": "classifier",
        "classifier.3.weight": "head",
    }.items():
        with torch.no_grad():
            net.state_dict()[key].view(-1)[-1] += 1e-3
        none[part][0] += 1
        assert lesson.moved(before, net, name) == none


# --- what is frozen stays ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_all_parameters_are_stepped_with_weight_decay(lesson, steps):
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(4, 3), (torch.randn(5, 4), torch.randint(3, (5,)))
    w = net.weight.detach().clone().requires_grad_()
    b = net.bias.detach().clone().requires_grad_()
    for _ in range(steps):
        g_w, g_b = torch.autograd.grad(F.cross_entropy(x @ w.T + b, y), (w, b))
        w, b = w - 0.01 * (g_w + 0.1 * w), b - 0.01 * (g_b + 0.1 * b)
    lesson.train_whole(net, x, y, *([] if steps == 2 else [steps]))  # two, as the table says
    torch.testing.assert_close(net.weight, w)
    torch.testing.assert_close(net.bias, b)


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


@pytest.mark.parametrize("training", [False, True])
def test_try_batch_norms_statistics_move_unless_in_eval(
    lesson, small, few, capsys, monkeypatch, training
):
    if training:  # what leaving out net.eval() does
        monkeypatch.setattr(lesson.Moli, "eval", lambda net: net)
    table = lesson.show_frozen(small.state, few)
    m = 9 if training else 0
    for kind, classifier in (("new", 2), ("added", 4)):
        for run in ("frozen", "learn"):
            assert table[kind, run] == {
                "features": [9 if run == "learn" else 0, 9],
                "statistics": [m, 9],
                "classifier": [0, classifier],
                "head": [2, 2],
            }
    lines = capsys.readouterr().out.splitlines()
    words = (
        "   in place of the old   all is frozen       0 of 9       {} of 9       0 of 2   2 of 2"
    )
    assert lines[4] == words.format(m)
    words = (
        "   behind the old one    features learn      9 of 9       {} of 9       0 of 4   2 of 2"
    )
    assert lines[7] == words.format(m)
    told = (
        f"   -> where all is frozen, {2 * m} of 42 tensors before the head changed by even one bit"
    )
    assert lines[8] == told


# --- ways to learn -----------------------------------------------------------------------------


def test_few_of_each_are_so_many_of_each_and_random(lesson):
    torch.manual_seed(0)
    labels = torch.arange(60) % 4
    places = lesson.few_of_each(labels, 5)
    assert labels[places].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert len(places.unique()) == 20 and not torch.equal(places, lesson.few_of_each(labels, 5))


def test_accuracy_is_the_share_of_largest_outputs_that_are_right(lesson):
    logits = torch.eye(3)[torch.arange(230) % 3] - 2
    y = torch.arange(230) % 3
    assert torch.equal(lesson.predict(nn.Identity(), logits), y)
    y[:23] = (y[:23] + 1) % 3
    assert lesson.accuracy(nn.Identity(), logits, y) == pytest.approx(0.9)


class Writer:
    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, value, step):
        self.rows.append((tag, value, step))


def test_the_everyday_loop_is_adam_on_the_head(lesson, small, few, tmp_path, capsys):
    x, y = few
    pictures = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    torch.manual_seed(3)
    scores = lesson.show_everyday(tmp_path, small.state, few, (x, y), pictures)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:6]]
    torch.manual_seed(3)
    net = lesson.Moli(7)
    head = nn.Linear(64, 3)
    net.load_state_dict(small.state)
    inputs = lesson.head_inputs(net.eval(), x)
    optimizer, wanted = torch.optim.Adam(head.parameters(), lr=0.01), []
    for _ in range(31):
        loss = F.cross_entropy(head(inputs), y)
        wanted.append((loss.item(), lesson.accuracy(head, inputs, y)))
        head.weight.grad, head.bias.grad = torch.autograd.grad(loss, (head.weight, head.bias))
        optimizer.step()
    for row, step in zip(rows, (0, 10, 20, 30), strict=True):
        assert row[0] == str(step) and float(row[1]) == pytest.approx(wanted[step][0], abs=0.006)
        assert row[2] == row[3] == f"{wanted[step][1]:.2f}"
    assert scores == pytest.approx((wanted[30][1],) * 2)


@pytest.mark.parametrize("lr", [None, 1e-3])
def test_learn_steps_the_head_and_all_else_only_if_asked(lesson, small, few, lr):
    torch.manual_seed(0)
    net, name, head = lesson.with_head(small.state)
    net.eval()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    test, writer = (few[0].flip(3), few[1].roll(5)), Writer()
    own, others = lesson.learn(net, head, lr, few, test, writer, steps=12)
    counts = lesson.moved(before, net, name)
    assert [m for m, _ in counts.values()] == ([9, 0, 2, 2] if lr else [0, 0, 0, 2])
    assert (own, others) == (lesson.accuracy(net, *few), lesson.accuracy(net, *test))
    assert own > 0.6 > 0.5 > others  # the labels of the test are shifted: it must not learn them
    assert [step for _, _, step in writer.rows] == [0, 5, 10]
    assert {tag for tag, _, _ in writer.rows} == {"transfer/accuracy"}


@pytest.mark.parametrize("lr", [None, 1e-4, 1e-3])
def test_adams_first_step_is_lr_for_the_head_001_for_the_rest_lr(lesson, small, few, lr):
    net, _, head = lesson.with_head(small.state)
    net.eval()
    names = {
        "features.0.0.weight": lr or 0,
        "classifier.1.weight": lr or 0,
        "classifier.3.bias": 0.01,
    }
    before = {name: net.get_parameter(name).detach().clone() for name in names}
    lesson.learn(net, head, lr, few, few, steps=1)
    for name, step in names.items():
        moves = (net.get_parameter(name) - before[name]).abs()
        assert moves.max().item() == pytest.approx(step, rel=0.02, abs=1e-9)


def test_settled_batch_norms_give_the_same_in_eval_as_in_train(lesson):
    torch.manual_seed(0)
    net, x = lesson.Moli(7), 3 * torch.randn(64, 3, 32, 32) + 2
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert (net.train()(x) - net.eval()(x)).abs().max() > 0.1
    net.load_state_dict(before)
    lesson.settle(net, x)
    assert lesson.moved(before, net, "classifier.3.")["features"] == [0, 9]
    torch.testing.assert_close(net.eval()(x), net.train()(x), atol=1e-3, rtol=1e-3)


def test_learn_trains_in_the_mode_that_it_finds_and_judges_in_eval(lesson, few):
    for training in (True, False):
        torch.manual_seed(0)
        net, name, head = lesson.with_head(None)
        net.train(training)
        before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        lesson.learn(net, head, 1e-3, few, few, Writer(), steps=2)
        assert lesson.moved(before, net, name)["statistics"] == [9 if training else 0, 9]
        assert net.state_dict()["features.0.2.num_batches_tracked"] == (2 if training else 0)


def test_pretraining_shows_each_image_at_most_once_an_epoch(lesson, monkeypatch):
    torch.manual_seed(0)
    images = torch.arange(193, dtype=torch.uint8)[:, None, None, None].expand(193, 3, 32, 32)
    labels, shown = torch.arange(193) % 7, []
    augment = lesson.augment
    monkeypatch.setattr(lesson, "augment", lambda x: shown.append(x[:, 0, 0, 0]) or augment(x))
    state = lesson.pretrain(images, labels, (torch.zeros(3), torch.ones(3)), epochs=2)
    assert [len(x) for x in shown] == [64] * 6
    first, second = torch.cat(shown[:3]), torch.cat(shown[3:])
    assert len(first.unique()) == len(second.unique()) == 192 and not torch.equal(first, second)
    assert state["features.0.2.num_batches_tracked"] == 6
    assert state["classifier.3.bias"].shape == (7,)


@pytest.mark.parametrize("classes", [range(7), range(7, 10), range(2, 5)])
def test_classes_are_picked_and_counted_from_0(lesson, images_root, classes):
    dataset = Shapes10(images_root, train=False)
    images, labels = lesson.pick_classes(dataset, classes)
    every, truth = as_tensors(dataset)
    wanted = [i for i, label in enumerate(truth.tolist()) if label in classes]
    assert torch.equal(images, every[wanted])
    assert labels.tolist() == [truth[i].item() - classes[0] for i in wanted]


# --- VGG16 -------------------------------------------------------------------------------------


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


def test_show_vgg16_counts_layers_and_heads(lesson, capsys):
    counts = lesson.show_vgg16()
    assert counts == {
        "old": (138_357_544, 138_357_544),
        "added": (138_367_554, 10_010),
        "new": (134_301_514, 40_970),
    }
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("   feat", "   clas"))]
    assert len(rows) == 16 and rows[0] == ["features.0", "3", "64", "1,792", "1,792"]
    assert rows[13] == ["classifier.0", "25,088", "4,096", "102,764,544", "102,764,544"]
    assert "-> 16 of 16 counts agree with the formula (25,088 is 512 * 7 * 7)\n" in out
    assert "   a new one behind the old one      138,367,554       10,010\n" in out
    assert "   a new one in place of the old one 134,301,514       40,970\n" in out
    assert "-> with a new head in place of the old one 0.03% of the parameters learn\n" in out


def test_the_weights_lie_where_torchvision_looks_for_them(lesson, hub):
    assert data.weights_path(lesson.WEIGHTS) == hub / "vgg16-397923af.pth"


def test_without_weights_there_are_none_and_a_damaged_file_is_named(hub):
    weights = SimpleNamespace(url=f"https://example.org/models/{NO_WEIGHTS}")
    assert data.have_weights(weights, "mend", "528 MiB") is False
    hub.mkdir(parents=True)
    (hub / NO_WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"vgg16-00000000\.pth is damaged.*: mend fetches") as error:
        data.have_weights(weights, "mend", "528 MiB")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value")])
def test_a_failed_download_is_one_line(lesson, hub, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(DataError, match=r"cannot fetch https://\S+ \(528 MiB\): .*again") as end:
        lesson.main(download=True)
    path = data.weights_path(lesson.WEIGHTS)
    assert "\n" not in str(end.value) and str(path) in str(end.value)


def put_weights(hub, state):
    """A state dict where weights belong, under its own hash: the weights' enum, and the file."""
    file = io.BytesIO()
    torch.save(state, file)
    name = f"vgg16-{hashlib.sha256(file.getvalue()).hexdigest()[:8]}.pth"
    hub.mkdir(parents=True)
    (hub / name).write_bytes(file.getvalue())
    return SimpleNamespace(url=f"https://example.org/models/{name}"), hub / name


def test_download_fetches_what_is_not_there_or_damaged_and_nothing_else(hub, monkeypatch):
    weights, path = put_weights(hub, {"a": torch.arange(3)})
    whole, calls = path.read_bytes(), []

    def fetch(url, where, prefix):
        calls.append((url, prefix))
        where.write_bytes(whole)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for damage in (None, path.unlink, lambda: path.write_bytes(whole[:-1])):
        if damage:
            damage()
        assert data.have_weights(weights, "mend", "3 B", download=True) is True
        assert path.read_bytes() == whole and data.have_weights(weights, "mend", "3 B")
    assert calls == [(weights.url, path.stem[-8:])] * 2


def test_arguments(lesson, capsys):
    assert lesson.parse([]) == {"download": False}
    assert lesson.parse(["--download"]) == {"download": True}
    with pytest.raises(SystemExit) as end:
        lesson.parse(["--fetch"])
    assert end.value.code == 2 and "--fetch" in capsys.readouterr().err


# --- main --------------------------------------------------------------------------------------


def test_what_main_measures(small):
    measured = small.measured
    assert measured["known"] > 0.3  # a guess: 0.14
    own, others = measured["everyday"]
    assert own > 0.7 and others > 0.38
    assert list(measured["others"]) == WAYS and {len(v) for v in measured["others"].values()} == {2}
    mean = {way: sum(values) / 2 for way, values in measured["others"].items()}
    assert min(mean["frozen"], mean["all_lr_0.0001"]) > max(mean["anew"], mean["random"]) + 0.05
    assert "imagenet" not in measured and measured["parameters"]["new"][1] == 40_970
    assert measured["moved"]["new", "frozen"]["features"] == [0, 9]


def test_what_main_prints(small, lesson):
    out, measured = small.out, small.measured
    known = f"cross, heart: right on {measured['known']:.0%} of test images\n"
    assert out.startswith("Moli has learned circle, ring, square, triangle, star, ")
    assert known in out
    for head in (
        "1. Can Moli with a new head learn crescent, arrow, semicircle?\n",
        "   step   loss   accuracy on its 30 images   on 90 other images\n",
        "   new head              layers before it  features   statistics   classifier     head\n",
        "3. How best to learn three shapes from 10 images of each? 2 random choices\n"
        "   10 steps of Adam; batch norm takes statistics of those images for random features\n",
        "   accuracy (a guess: 0.33)                own images   others: mean   lowest   highest\n",
        "   layer           inputs   outputs   parameters   by formula\n",
        f"5. left out (a new head on VGG16): no weights at {small.log_dir / NO_WEIGHTS};\n"
        "   python model_pretrained.py --download fetches 528 MiB\n",
    ):
        assert head in out
    own, others = measured["everyday"]
    row = next(line for line in out.splitlines() if line.startswith("     30   "))
    assert row.split()[2:] == [f"{own:.2f}", f"{others:.2f}"]
    assert f"   -> it is right on {others:.0%} of the others; a guess is right on 33%\n" in out
    mean, swing = {}, {}
    for way, values in measured["others"].items():
        row = next(line for line in out.splitlines() if line[3:41].rstrip() == lesson.WAYS[way][0])
        mean[way], swing[way] = sum(values) / 2, max(values) - min(values)
        told = [f"{v:.2f}" for v in (mean[way], min(values), max(values))]
        assert row.split()[-3:] == told and 0 <= float(row.split()[-4]) <= 1
    first, second, third, *_ = sorted(mean, key=mean.get, reverse=True)
    most = max(swing[first], swing[second])
    assert (
        f"   -> best on others: {lesson.WAYS[first][0]}, {mean[first]:.0%},\n"
        f"      and {lesson.WAYS[second][0]}, {mean[second]:.0%}. Another choice of images\n"
        f"      moves each by up to {most:.0%}; the other ways get at most "
        f"{mean[third]:.0%}\n"
    ) in out
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {small.log_dir}  ")


def test_what_main_logs(small, events, lesson):
    assert sorted(p.name for p in small.log_dir.iterdir()) == sorted([*WAYS, "section_1"])
    for way in WAYS:
        curve = events(small.log_dir / way).Scalars("transfer/accuracy")
        assert [e.step for e in curve] == [0, 5, 10]
        assert curve[-1].value == pytest.approx(small.measured["others"][way][0])
    run = events(small.log_dir / "section_1")
    (image,) = run.Images("transfer/predictions")
    assert image.step == 30
    pictures, truth, predictions, names = small.grid
    wanted, labels = lesson.pick_classes(Shapes10(small.root, train=False), range(7, 10))
    assert torch.equal(pictures, wanted) and torch.equal(truth, labels)
    right = (predictions == truth).double().mean().item()
    assert right == pytest.approx(small.measured["everyday"][1])
    assert names == ("crescent", "arrow", "semicircle")


@pytest.mark.parametrize("seed", range(3))
def test_main_judges_on_other_images_than_it_learns_from(
    lesson, small, images_root, tmp_path, monkeypatch, hub, capsys, seed
):
    given, settled, learn, weight = [], [], lesson.learn, "features.0.0.weight"

    def watch(net, head, lr, few, test, writer, steps):
        assert steps == 30
        given.append((net.training, lr, few, test, writer))
        norm, shown = net.features[0][2], net.features[0][:2](few[0])
        if lr is None and not torch.equal(net.features[0][0].weight, small.state[weight]):
            torch.testing.assert_close(norm.running_mean, shown.mean((0, 2, 3)))
            torch.testing.assert_close(norm.running_var, shown.var((0, 2, 3)))
            settled.append(len(given))
        elif lr is not None and net.training:
            assert norm.num_batches_tracked == 0
        return learn(net, head, lr, few, test, writer, steps=1)

    monkeypatch.setattr(lesson, "learn", watch)
    monkeypatch.setattr(lesson, "pretrain", lambda *args: small.state)
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, images=3, draws=2)
    assert settled == [9, 10]  # random features see their images before the head learns
    assert len(given) == 10 and [row[0] for row in given] == [False] * 6 + [True] * 2 + [False] * 2
    assert [row[1] for row in given[::2]] == [None, 1e-4, 1e-3, 1e-3, None]
    assert [row[4] is None for row in given] == [False, True] * 5
    stats = channel_stats(lesson.pick_classes(Shapes10(images_root), range(7))[0])
    new, test = (
        lesson.pick_classes(Shapes10(images_root, train=train), range(7, 10))
        for train in (True, False)
    )
    for _, _, (x, y), (x_test, y_test), _ in given:
        assert torch.equal(x_test, normalize(test[0], *stats)) and torch.equal(y_test, test[1])
        assert y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        known = {picture.numpy().tobytes() for picture in normalize(new[0], *stats)}
        assert all(picture.numpy().tobytes() in known for picture in x)
    assert all(torch.equal(a[2][0], b[2][0]) for a, b in zip(given[:2], given[8:], strict=True))
    assert not torch.equal(given[0][2][0], given[1][2][0])
    out = capsys.readouterr().out
    assert f"no weights at {hub / 'vgg16-397923af.pth'};\n" in out
    assert f"-> it is right on {measured['everyday'][1]:.0%} of the others" in out


def test_main_with_weights_puts_a_head_on_them(
    lesson, small, images_root, tmp_path, monkeypatch, hub, capsys
):
    torch.manual_seed(5)
    features, stats = narrow(), []
    weights, _ = put_weights(hub, features.state_dict())
    weights.transforms = lesson.WEIGHTS.transforms

    def build(weights=None):
        return vgg16() if weights is None else features

    def watch(images, mean, std):
        stats.append((mean, std))
        return normalize(images, mean, std)

    monkeypatch.setattr(lesson, "WEIGHTS", weights)
    monkeypatch.setattr(lesson, "vgg16", build)
    monkeypatch.setattr(lesson, "normalize", watch)
    monkeypatch.setattr(lesson, "pretrain", lambda *args: small.state)
    measured = lesson.main(log_dir=tmp_path, root=images_root, images=2, draws=2, steps=2)
    for mean, std in stats[-2:]:
        torch.testing.assert_close(mean, torch.tensor([0.485, 0.456, 0.406]))
        torch.testing.assert_close(std, torch.tensor([0.229, 0.224, 0.225]))
    test, labels = lesson.pick_classes(Shapes10(images_root, train=False), range(7, 10))
    hits = features(normalize(test, *stats[-1])).argmax(1) == labels
    assert measured["imagenet"] == pytest.approx(hits.double().mean().item())
    assert not features.training and features.classifier[6].out_features == 3
    out = capsys.readouterr().out
    assert f"   -> {measured['imagenet']:.0%} of the others are right; with Moli's features " in out
    low, high = sorted(measured["others"]["frozen"])
    assert f"with Moli's features {low:.0%} to {high:.0%}, section 3\n" in out
    assert "      (VGG16 has learned from 224 x 224 pixels; here it gets 32 x 32)\n" in out
    assert (
        "5. Do features that have learned photographs serve for drawn shapes, too?\n"
        "   new head on the frozen features of   accuracy on own images   on others\n"
    ) in out
    row = next(line for line in out.splitlines() if line.startswith("   VGG16, 1,000 kinds"))
    assert row.split()[-1] == f"{measured['imagenet']:.2f}" and "left out" not in out
