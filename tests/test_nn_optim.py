import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

SMALL = {"batches": 20, "steps": 90, "count": 150, "epochs": (6, 3), "batch": 25}


@pytest.fixture
def lesson(load):
    return load("nn_optim.py")


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
    batches = [(torch.randn(6, 5, dtype=dtype), torch.randint(2, (6,))) for _ in range(20)]
    loops = lesson.train(model, batches, ours), lesson.train(twin, batches, theirs)
    for a, b in zip(*loops, strict=True):
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


@pytest.mark.parametrize(
    "options", [{"lr": -1}, {"lr": 1, "momentum": -1}, {"lr": 1, "weight_decay": -1},
                {"lr": 1, "nesterov": True}]
)  # fmt: skip
def test_what_torch_refuses_is_refused(lesson, options):
    for make in (lesson.SGD, torch.optim.SGD):
        with pytest.raises(ValueError):
            make([torch.ones(1, requires_grad=True)], **options)


def test_the_forgotten_step_uses_the_sum_of_all_gradients(lesson):
    torch.manual_seed(0)
    model, batches = lesson.small_problem(6)
    optimizer, total = torch.optim.SGD(model.parameters(), 0.3), 0
    loop = lesson.train(model, batches, optimizer, zero=False)
    for x, t in batches:
        before = parameters_to_vector(model.parameters()).detach()
        loss = F.cross_entropy(model(x), t)
        total += parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        next(loop)
        after = parameters_to_vector(model.parameters()).detach()
        torch.testing.assert_close(before - after, 0.3 * total)


@pytest.mark.parametrize("make", ["ours", "torch"])
def test_forgotten_is_momentum_1_bit_for_bit_in_moli(lesson, make):
    torch.manual_seed(0)
    sgd = lesson.SGD if make == "ours" else torch.optim.SGD
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(4)]
    differ = partial(lesson.largest_difference, lesson.Moli(), batches, (sgd, False))
    assert differ((partial(sgd, momentum=1.0), True)) == 0
    assert differ((partial(sgd, momentum=0.99), True)) > 1e-4 < differ((sgd, True))


def test_try_zeroing_at_every_second_step(lesson):
    torch.manual_seed(0)
    model, batches = lesson.small_problem(6)
    optimizer, gradients = lesson.SGD(model.parameters(), 0.3), []
    for i, (x, t) in enumerate(batches):
        before = parameters_to_vector(model.parameters()).detach()
        loss = F.cross_entropy(model(x), t)
        gradients.append(parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))))
        list(lesson.train(model, [(x, t)], optimizer, zero=i % 2 == 0))
        step = (before - parameters_to_vector(model.parameters()).detach()) / 0.3
        torch.testing.assert_close(step, sum(gradients[i - i % 2 :]))


@pytest.mark.parametrize("lr", [0.3, 3.9])
def test_the_swing_follows_its_formula_and_bursts_beyond_4(lesson, lr):
    a = math.acos(1 - lr / 2)
    for t, w in enumerate(lesson.swing(lr, 40, zero=False)):
        assert w == pytest.approx(math.cos((t + 0.5) * a) / math.cos(a / 2), abs=1e-9)
    assert lesson.swing(0.3, 5, zero=True) == pytest.approx([0.7**t for t in range(6)])
    assert abs(lesson.swing(4.1, 100, zero=False)[-1]) > 1e6


def test_nodes_are_all_that_a_walk_from_the_loss_meets(lesson):
    model, ((x, t),) = lesson.small_problem(1)
    root = F.cross_entropy(model(x), t).grad_fn
    met, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node not in met:
            met.add(node)
            waiting += [parent for parent, _ in node.next_functions if parent is not None]
    assert lesson.nodes_of(root) == met and len(met) > 8
    assert lesson.nodes_of(None) == set()


@pytest.mark.parametrize("B", [3, 10])
def test_numbers_saved_by_a_sum_of_relu_losses(lesson, B):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = [(torch.randn(B, 4), torch.randint(2, (B,))) for _ in range(3)]
    for take, backward, nodes, numbers in (
        (lambda loss: loss, False, 8, B * (4 + 6 + 2 + 1) + 1),
        (lambda loss: loss, True, 8, 0),
        (torch.Tensor.item, True, 0, 0),
    ):
        rows = lesson.held_by_sum(model, batches, take, backward)
        leaves = 4 if nodes else 0
        assert rows == [(leaves + nodes * k, numbers * k) for k in (1, 2, 3)]


@pytest.mark.parametrize("seed", range(3))
def test_main_learns_with_zero_grad_and_not_without(lesson, images_root, tmp_path, seed, events):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, **SMALL)
    assert min(measured["sgd"].values()) > 0.05
    assert measured["forgotten_law"]["zeroed"] > 0.5
    for kept, zeroed in measured["forgotten_law"]["swings"].values():
        assert kept > 0.99 and zeroed < 0.01
    zeroed, forgotten = measured["zeroed"], measured["forgotten"]
    assert zeroed["losses"][-1] < zeroed["losses"][0] - 1
    assert forgotten["losses"][2] > zeroed["losses"][2] + 0.2
    assert len(events(tmp_path / "train" / "zeroed").Scalars("train/loss")) == 36
    assert len(events(tmp_path / "quadratic" / "forgotten").Scalars("quadratic/w")) == 91
    assert events(tmp_path / "leak" / "item").Scalars("leak/nodes")[-1].value == 0
