import copy
import math
from weakref import WeakSet

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parameters_to_vector

SMALL = {"points": 60, "epochs": 2, "batch": 10}
RUNS = [f"{name}_lr_{lr:g}" for name in ("SGD", "momentum", "Adam")
        for lr in (0.0001, 0.001, 0.01, 0.1, 1, 10)]  # fmt: skip


@pytest.fixture
def lesson(load):
    return load("nn_optim.py")


@pytest.fixture
def batches(lesson):
    torch.manual_seed(0)
    x, t = lesson.spirals(60)
    return list(zip(x.double().split(10), t.split(10), strict=True))


def weights(model):
    return parameters_to_vector(model.parameters()).detach()


# --- SGD ---------------------------------------------------------------------------------------


def test_two_steps_by_hand(lesson):
    p = torch.tensor([2.0], requires_grad=True)
    optimizer = lesson.SGD([p], 0.1, momentum=0.5, nesterov=True, weight_decay=0.25)
    # g = 1 + 0.5, v = 1.5, step 1.5 + 0.75; then g = 3 + 0.44375, v = 0.75 + g, step g + v / 2
    for grad, after in ((1.0, 2 - 0.1 * 2.25), (3.0, 1.775 - 0.1 * 5.540625)):
        p.grad = torch.tensor([grad])
        optimizer.step()
        assert p.item() == pytest.approx(after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [0.003, 0.2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.6},
        {"weight_decay": 0.3},
        {"momentum": 0.95, "weight_decay": 0.01},
        {"momentum": 0.3, "nesterov": True, "weight_decay": 0.2},
    ],
)
def test_every_step_is_torchs(lesson, options, lr, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 2)).to(dtype)
    twin = copy.deepcopy(model)
    ours = lesson.SGD(model.parameters(), lr, **options)
    theirs = torch.optim.SGD(twin.parameters(), lr, **options)
    for _ in range(20):
        batch = [(torch.randn(6, 5, dtype=dtype), torch.randint(2, (6,)))]
        a, b = lesson.train_epoch(model, batch, ours), lesson.train_epoch(twin, batch, theirs)
        assert a == pytest.approx(b, rel=1e-5)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("grad", [None, torch.zeros(3)])
def test_a_zero_gradient_still_moves_by_momentum_and_none_does_not(lesson, grad):
    moved = []
    for make in (lesson.SGD, torch.optim.SGD):
        p = torch.ones(3, requires_grad=True)
        optimizer = make([p], lr=0.1, momentum=0.9, weight_decay=0.1)
        p.grad = torch.ones(3)
        optimizer.step()
        before, p.grad = p.detach().clone(), grad
        optimizer.step()
        moved.append(p.detach() - before)
    torch.testing.assert_close(*moved)
    assert (moved[0] != 0).all() == (grad is not None)


# --- the loop ----------------------------------------------------------------------------------


def test_an_epoch_returns_the_mean_of_all_examples(lesson):
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    x, t = torch.randn(10, 2), torch.randint(3, (10,))
    parts = list(zip(x.split(4), t.split(4), strict=True))  # 4, 4, 2
    whole = F.cross_entropy(model(x), t).item()
    assert lesson.train_epoch(model, parts, lesson.SGD([], 0.1)) == pytest.approx(whole)
    assert lesson.train_epoch(model, parts, torch.optim.SGD(model.parameters(), 0.1)) != whole


def test_an_epoch_trains_in_train_mode_and_accuracy_measures_in_eval_mode(lesson):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9))
    x, t = torch.randn(50, 2), torch.randint(3, (50,))
    right = (model[0](x).argmax(1) == t).double().mean().item()
    assert 0 < right < 1
    assert lesson.accuracy(model.train(), x, t) == pytest.approx(right)
    assert isinstance(lesson.accuracy(model, x, t), float) and not model.training
    losses = {lesson.train_epoch(model.eval(), [(x, t)], lesson.SGD([], 0.1)) for _ in range(3)}
    assert len(losses) == 3 and model.training


def test_accuracy_counts(lesson):
    z = torch.tensor([[0.0, 2, 1], [3, 1, 0], [0, 0, 1], [0, 5, 1]])
    assert lesson.accuracy(nn.Identity(), z, torch.tensor([1, 0, 0, 1])) == 0.75
    assert lesson.accuracy(nn.Identity(), z, torch.tensor([0, 1, 0, 0])) == 0


def test_the_forgotten_step_uses_the_sum_of_all_gradients(lesson, batches):
    model, total = lesson.Net().double(), 0
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for x, t in batches:
        before = weights(model)
        loss = F.cross_entropy(model(x), t)
        total += parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        lesson.train_epoch(model, [(x, t)], optimizer, zero=False)
        torch.testing.assert_close(before - weights(model), 0.3 * total)


def test_zeroing_at_every_second_step_adds_pairs(lesson, batches):
    model, gradients = lesson.Net().double(), []
    optimizer = lesson.SGD(model.parameters(), 0.3)
    for i, (x, t) in enumerate(batches):
        before = weights(model)
        loss = F.cross_entropy(model(x), t)
        gradients.append(parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))))
        lesson.train_epoch(model, [(x, t)], optimizer, zero=i % 2 == 0)
        step = (before - weights(model)) / 0.3
        torch.testing.assert_close(step, sum(gradients[i - i % 2 :]))


@pytest.mark.parametrize("make", ["ours", "torch"])
def test_forgotten_is_momentum_1_bit_for_bit(lesson, make, batches):
    kind = lesson.SGD if make == "ours" else torch.optim.SGD
    model = lesson.Net().double()
    forgotten = lesson.weights_by_step(model, batches, kind, zero=False)
    assert forgotten.shape == (6, len(weights(model)))
    assert torch.equal(forgotten, lesson.weights_by_step(model, batches, kind, momentum=1.0))
    for momentum in (0.99, 0):
        other = lesson.weights_by_step(model, batches, kind, momentum=momentum)
        assert (forgotten - other).abs().max() > 1e-4
    assert torch.equal(forgotten[0], lesson.weights_by_step(model, batches, kind)[0])


@pytest.mark.parametrize("lr", [0.3, 3.9])
def test_on_a_parabola_the_forgotten_zero_swings_for_ever_and_bursts_beyond_4(lesson, lr):
    def swing(lr, steps, zero):
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer, values = lesson.SGD([w], lr), [1.0]
        for _ in range(steps):
            if zero:
                optimizer.zero_grad()
            (w**2 / 2).backward()
            optimizer.step()
            values.append(w.item())
        return values

    a = math.acos(1 - lr / 2)
    for t, w in enumerate(swing(lr, 40, zero=False)):
        assert w == pytest.approx(math.cos((t + 0.5) * a) / math.cos(a / 2), abs=1e-9)
    assert swing(0.3, 5, zero=True) == pytest.approx([0.7**t for t in range(6)])
    assert abs(swing(4.1, 100, zero=False)[-1]) > 1e6


def test_a_fit_is_the_same_for_a_seed_and_another_for_another(lesson):
    data = lesson.spirals(60), lesson.spirals(30)
    results = [lesson.fit(seed, data, torch.optim.SGD, 2, 20, lr=0.1)[1:] for seed in (3, 3, 4)]
    assert results[0] == results[1] != results[2]


def test_the_points_lie_on_three_arms(lesson):
    torch.manual_seed(0)
    x, t = lesson.spirals(900)
    assert x.shape == (900, 2) and t.bincount().tolist() == [300] * 3
    radius = x.norm(dim=1)
    angle = torch.atan2(x[:, 1], x[:, 0]) - 4 * radius - 2 * math.pi / 3 * t
    angle = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    assert radius.max() <= 1 and radius.min() > 0.1
    assert abs(angle.mean()) < 0.02 and angle.std().item() == pytest.approx(0.1, rel=0.1)


# --- memory ------------------------------------------------------------------------------------


def test_nodes_are_all_that_a_walk_from_the_loss_meets(lesson, batches):
    x, t = batches[0]
    root = F.cross_entropy(lesson.Net().double()(x), t).grad_fn
    met, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node not in met:
            met.add(node)
            waiting += [parent for parent, _ in node.next_functions if parent is not None]
    assert lesson.nodes_of(root) == met and len(met) == 6 + 10
    assert lesson.nodes_of(None) == set()


def test_nodes_of_a_sum_of_losses_of_another_network(lesson):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    parts = [(torch.randn(7, 4), torch.randint(2, (7,))) for _ in range(3)]
    nodes, numbers = zip(*lesson.kept_by_sum(model, parts, "loss"), strict=True)
    assert nodes == tuple(4 + 8 * i for i in (1, 2, 3)) and numbers == (0, 0, 0)
    nodes, numbers = zip(*lesson.kept_by_sum(model, parts, "loss", backward=False), strict=True)
    assert nodes == tuple(4 + 8 * i for i in (1, 2, 3))
    # x, the output of tanh, log p and t of each point; the divisor of the mean
    assert numbers == tuple(i * (7 * (4 + 6 + 2 + 1) + 1) for i in (1, 2, 3))
    for what in ("loss.detach()", "loss.item()"):
        for backward in (True, False):
            assert lesson.kept_by_sum(model, parts, what, backward) == [(0, 0)] * 3


@pytest.mark.parametrize("B", [3, 10])
def test_numbers_saved_by_a_sum_of_losses(lesson, B):
    """What the graphs keep is more than nodes, unless a backward() has freed it."""
    model = lesson.Net(width=6)
    parameters = {p.data_ptr() for p in model.parameters()}
    for backward in (False, True):
        alive, total = WeakSet(), 0.0  # a WeakSet forgets what nobody else holds

        def pack(tensor, alive=alive):
            kept = tensor.detach()
            alive.add(kept)
            return kept

        for k in (1, 2, 3):
            x, t = torch.randn(B, 2), torch.randint(3, (B,))
            with saved_tensors_hooks(pack, lambda kept: kept):
                loss = F.cross_entropy(model(x), t)
            if backward:
                loss.backward()
            total = total + loss
            del loss
            sizes = {kept.data_ptr(): kept.numel() for kept in alive}
            saved = sum(n for pointer, n in sizes.items() if pointer not in parameters)
            # x, two ReLU outputs, log p and t of each point; the divisor of the mean
            assert saved == (0 if backward else k * (B * (2 + 6 + 6 + 3 + 1) + 1))


# --- the sections ------------------------------------------------------------------------------


def test_try_the_zero_behind_backward_learns_nothing(lesson, edited, tmp_path, capsys):
    old = """            optimizer.zero_grad()  # drop the gradients of the last step
            loss = F.cross_entropy(model(x), t)  # nn.CrossEntropyLoss as a function
            loss.backward()  # the gradients of this batch
"""
    lines = old.splitlines(keepends=True)
    changed = edited(lesson, old, "".join([lines[1], lines[2], lines[0]]))
    rows = changed.main(log_dir=tmp_path, **SMALL)["everyday"]
    assert rows[0] == pytest.approx(rows[1], abs=1e-6) and rows[0][0] > 0.9
    out = capsys.readouterr().out.splitlines()
    assert out[2].split()[1:] == out[3].split()[1:]


def test_the_second_table(lesson, capsys):
    torch.manual_seed(1)
    rows = lesson.show_by_hand(lesson.spirals(90), 15)
    assert max(off for off, _ in rows.values()) < 1e-13
    assert list(rows) == ["none", "weight_decay 0.1", "momentum 0.9",
                          "momentum 0.7, nesterov True, weight_decay 0.05"]  # fmt: skip
    none, *effects = (effect for _, effect in rows.values())
    assert none == 0 and min(effects) > 0.01
    title, _, head, *lines, follows = capsys.readouterr().out.splitlines()
    assert title == "2. Is our SGD torch's? All weights in 6 steps from one start"
    assert head.split() == ["options", "of", "both", "from", "torch's", "SGD", "by", "the",
                            "options"]  # fmt: skip
    for line, (name, (off, effect)) in zip(lines, rows.items(), strict=True):
        assert line.split() == [*name.split(), f"{off:.1g}", f"{effect:.3f}"]
    most = max(off for off, _ in rows.values())
    assert follows == f"   -> all weights are torch's within {most:.1g}"


def test_the_second_table_stops_for_another_formula(lesson, monkeypatch):
    monkeypatch.setattr(lesson, "SGD", lambda *args, **options: torch.optim.SGD(
        *args, **options | {"dampening": 0.5 * (not options.get("nesterov"))}))  # fmt: skip
    with pytest.raises(AssertionError):
        lesson.show_by_hand(lesson.spirals(90), 15)


@pytest.mark.parametrize("seed", [5, 6])
def test_each_optimizer_wants_its_own_rate(lesson, seed):
    torch.manual_seed(seed)
    data = lesson.spirals(300), lesson.spirals(300)
    fits = {}  # 300 points and 10 epochs instead of 600 and 20
    for name, lr in (("SGD", 1e-4), ("SGD", 1e-3), ("SGD", 0.01), ("SGD", 0.1), ("SGD", 1),
                     ("SGD", 10), ("momentum", 0.01), ("momentum", 0.1), ("momentum", 1),
                     ("Adam", 0.01), ("Adam", 1)):  # fmt: skip
        kind, options = lesson.OPTIMIZERS[name]
        _, losses, scores = lesson.fit(seed, data, kind, 10, 20, lr=lr, **options)
        fits[name, lr] = losses[-1], scores[-1]
    for right in (("SGD", 1), ("momentum", 0.1), ("Adam", 0.01)):
        assert fits[right][0] < 0.35 and fits[right][1] > 0.85
    assert fits["SGD", 1][0] < min(fits["momentum", 1][0], fits["Adam", 1][0]) - 0.1
    others = [fits["SGD", lr][0] for lr in (1e-4, 1e-3, 1e-2, 0.1, 10)]
    assert fits["SGD", 1][0] < min(others) - 0.1  # the best of the six
    assert fits["SGD", 1e-4][0] > 1 and fits["SGD", 10][0] > 1
    assert fits["momentum", 0.01][0] == pytest.approx(fits["SGD", 0.1][0], abs=0.1)


def test_the_forgotten_zero_unlearns(lesson):
    torch.manual_seed(8)
    data = lesson.spirals(600), lesson.spirals(600)
    zeroed, forgotten = (lesson.fit(8, data, torch.optim.SGD, 20, 30, zero, lr=0.1)
                         for zero in (True, False))  # fmt: skip
    assert zeroed[1][-1] < 0.35 and zeroed[2][-1] > 0.8
    assert forgotten[1][-1] > zeroed[1][-1] + 0.3 and forgotten[2][-1] < zeroed[2][-1] - 0.1


@pytest.mark.parametrize("seed", range(3))
def test_main(lesson, tmp_path, seed, events, capsys, monkeypatch):
    drawn = {}
    row = lesson.caption_row
    monkeypatch.setattr(lesson, "caption_row", lambda title, images, captions, height: (
        drawn.update(title=title, images=images, captions=captions)
        or row(title, images, captions, height)))  # fmt: skip
    measured = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    out = capsys.readouterr().out.splitlines()
    assert [line[0] for line in out if line[0].isdigit()] == ["1", "2", "3", "4", "5"]
    assert out[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")
    follows = [line for line in out if line.startswith("   -> ")]

    # 1. the loop in everyday code is train_epoch and accuracy
    rows = measured["everyday"]
    torch.manual_seed(seed)
    data = lesson.spirals(60), lesson.spirals(60)
    model = lesson.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = lesson.DataLoader(lesson.TensorDataset(*data[0]), batch_size=10, shuffle=True)
    for epoch, (loss, score) in enumerate(rows):
        assert lesson.train_epoch(model, loader, optimizer) == pytest.approx(loss, rel=1e-4)
        assert lesson.accuracy(model, *data[1]) == pytest.approx(score, abs=0.01)
        assert f"   {epoch + 1:5d}   {loss:21.3f}   {score:24.3f}" in out
    assert len(rows) == 2 and out[1].endswith("accuracy on other points")
    assert follows[0] == (f"   -> {rows[-1][1]:.1%} right at the end; guessing: 33.3%, "
                          "loss log 3 = 1.099")  # fmt: skip

    # 3. the learning rates
    rates = measured["rates"]
    fits = {key: values[1:] for key, values in rates["fits"].items()}
    assert [f"{name}_lr_{lr:g}" for name, lr in sorted(fits)] == sorted(RUNS, key=lambda run: (
        run.split("_")[0], float(run.split("_")[2])))  # fmt: skip
    for name, best in rates["best"].items():
        losses = {lr: fits[name, lr][0] for lr in (1e-4, 1e-3, 0.01, 0.1, 1, 10)}
        assert best == [lr for lr, loss in losses.items() if loss < min(losses.values()) + 0.01]
    off = [
        abs(fits["momentum", lr][0] - fits["SGD", 10 * lr][0]) for lr in (1e-4, 1e-3, 0.01, 0.1, 1)
    ]
    assert rates["off"] == off
    first = next(i for i, line in enumerate(out) if line.startswith("3. ")) + 4
    for line, lr in zip(out[first:], (0.0001, 0.001, 0.01, 0.1, 1, 10), strict=False):
        words = [f"{lr:g}"]
        for name in ("SGD", "momentum", "Adam"):
            words += [f"{fits[name, lr][0]:.3f}", f"{fits[name, lr][1]:.1%}"]
        assert line.split() == words
    words = [f"{name} {' and '.join(f'{lr:g}' for lr in best)}"
             for name, best in rates["best"].items()]  # fmt: skip
    assert follows[2] == f"   -> lr whose loss is within 0.01 of the least: {', '.join(words)}"
    assert follows[3].startswith(
        "   -> losses of momentum 0.9 at lr and SGD at 10 lr: they differ "
    )
    assert follows[3].endswith(
        f" by {max(off[:4]):.3f} or less up to lr 0.1, by {off[4]:.3f} at lr 1"
    )

    # 4. zero_grad forgotten
    forgotten = measured["forgotten"]
    runs = forgotten["runs"]
    assert forgotten["off"] == 0
    assert runs["forgotten"][1:] == runs["momentum_1"][1:] != runs["zeroed"][1:]
    zeroed = lesson.fit(seed, data, torch.optim.SGD, 2, 10, lr=0.1)
    assert runs["zeroed"][1] == pytest.approx(zeroed[1], rel=1e-4)
    first = next(i for i, line in enumerate(out) if line.startswith("4. "))
    assert out[first].endswith("our SGD at lr 0.1, by epoch")
    assert out[first + 1].split() == [
        "zero_grad",
        "momentum",
        "1",
        "2",
        "right",
        "in",
        "the",
        "end",
    ]
    cases = ["called", "0"], ["forgotten", "0"], ["called", "1"]
    for line, words, run in zip(out[first + 2 :], cases, runs.values(), strict=False):
        assert line.split() == [*words, *(f"{run[1][e - 1]:.3f}" for e in (1, 2)), f"{run[2]:.1%}"]
    assert list(runs) == ["zeroed", "forgotten", "momentum_1"]
    right = [f"{runs[run][2]:.1%} right" for run in ("forgotten", "zeroed")]
    assert follows[4] == f"   -> forgotten: {right[0]} instead of {right[1].split()[0]}"
    assert follows[5] == "   -> weights when forgotten minus weights with momentum 1, largest: 0"

    # 5. what a sum of losses keeps: each point needs x, two hidden layers, log p and t
    memory = measured["memory"]
    nodes, numbers = ([a + b * i for i in range(1, 7)] for a, b in ((6, 11), (0, 10 * 70 + 1)))
    assert {run: list(map(list, counts)) for run, counts in memory.items()} == {
        "loss": [nodes, [0] * 6], "no_backward": [nodes, numbers],
        "detach": [[0] * 6] * 2, "item": [[0] * 6] * 2}  # fmt: skip
    first = next(i for i, line in enumerate(out) if line.startswith("5. "))
    assert "a sum of 6 losses" in out[first]
    assert out[first + 3].split() == ["called", "1", "2", "6", "1", "2", "6"]
    assert [line.split() for line in out[first + 4 : first + 8]] == [
        ["loss", "yes", "17", "28", "72", "0", "0", "0"],
        ["loss", "no", "17", "28", "72", "701", "1402", "4206"],
        ["loss.detach()", "yes", *"000000"],
        ["loss.item()", "yes", *"000000"],
    ]
    assert follows[6:] == [
        "   -> each batch adds 11 nodes; without backward() 701 numbers as well",
        "   -> nothing is kept alive by adding loss.detach() or loss.item()",
    ]

    # what is logged
    found = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert found == sorted([*RUNS, *runs, *memory])
    for name, losses in (("zeroed", runs["zeroed"][1]), ("forgotten", runs["forgotten"][1])):
        curve = events(tmp_path / name).Scalars("train/loss")
        assert [e.step for e in curve] == [1, 2]
        assert [e.value for e in curve] == pytest.approx(losses)
    for name, lr in fits:
        loaded = events(tmp_path / f"{name}_lr_{lr:g}")
        last = [loaded.Scalars(tag)[-1].value for tag in ("train/loss", "test/accuracy")]
        assert last == pytest.approx(fits[name, lr]) and len(loaded.Scalars("train/loss")) == 2
    for run, counts in memory.items():
        for tag, values in zip(("leak/nodes", "leak/numbers"), counts, strict=True):
            curve = events(tmp_path / run).Scalars(tag)
            assert [(e.step, e.value) for e in curve] == list(enumerate(values, 1))

    # the picture
    (image,) = events(tmp_path).Images("regions/by_lr")
    assert image.step == 0 and image.height > 480
    assert drawn["title"].startswith("Rows from top: SGD, momentum, Adam. Dots: the training")
    lines = [caption.split("\n") for caption in drawn["captions"]]
    assert [words[0] for words in lines] == [f"lr {lr:g}" for lr in (1e-4, 1e-3, 0.01, 0.1, 1, 10)]
    assert lines[3][1:] == [f"{name} {fits[name, 0.1][1]:.1%}"
                            for name in ("SGD", "momentum", "Adam")]  # fmt: skip
    for picture, lr in zip(drawn["images"], (1e-4, 1e-3, 0.01, 0.1, 1, 10), strict=True):
        parts = [lesson.regions(rates["fits"][name, lr][0], *data[0])
                 for name in ("SGD", "momentum", "Adam")]  # fmt: skip
        assert torch.equal(picture, torch.cat(parts, 1))


def test_regions_show_what_the_network_says(lesson):
    class Halves(nn.Module):
        def forward(self, x):  # class 2 where y > 0, else class 0 for x < 0, class 1 for x > 0
            return torch.stack([-x[:, 0], x[:, 0], x[:, 1] * 100], 1)

    x, t = torch.tensor([[-1.0, -1.0], [1.0, -0.5], [1.0, 1.0]]), torch.tensor([1, 0, 2])
    picture = lesson.regions(Halves(), x, t, side=5)
    assert picture.shape == (3, 5, 5) and picture.dtype == torch.uint8
    red, green, blue = np.array([[230, 60, 50], [40, 150, 70], [50, 90, 220]])
    assert picture[:, 1, 0].tolist() == (170 + red // 3).tolist()  # left of the middle, y < 0
    assert picture[:, 0, 3].tolist() == (170 + green // 3).tolist()
    assert picture[:, 4, 2].tolist() == (170 + blue // 3).tolist()
    assert picture[:, 0, 0].tolist() == green.tolist()  # the point at (-1, -1) of class 1
    assert picture[:, 1, 4].tolist() == red.tolist()  # x = 1, y = -0.5
    assert picture[:, 4, 4].tolist() == blue.tolist()
