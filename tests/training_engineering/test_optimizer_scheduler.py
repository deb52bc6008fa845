import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim import lr_scheduler

SMALL = {"twin_steps": 12, "decay_steps": 300, "schedule_steps": 40, "train_steps": 600}


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/optimizer_scheduler.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("runs")
    return lesson.main(seed=request.param, log_dir=log_dir, **SMALL), log_dir


def test_two_steps_of_sgd_by_hand(lesson):
    w = torch.tensor([2.0], requires_grad=True)
    optimizer = lesson.SGD([w], lr=0.1, momentum=0.5, weight_decay=0.25)
    # b = 1 + 0.5 = 1.5, then b = 0.75 + 3 + 0.25 * 1.85
    for grad, after in ((1.0, 2 - 0.15), (3.0, 1.85 - 0.1 * 4.2125)):
        w.grad = torch.tensor([grad])
        optimizer.step()
        assert w.item() == pytest.approx(after)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("Adam", 3 - 0.1 * 5 / (5 + 0.5)),  # g = 2 + 1 * 3, m' = g, sqrt(v') = |g|
        ("AdamW", 3 * 0.9 - 0.1 * 2 / (2 + 0.5)),
    ],
)
def test_the_first_step_of_adam_by_hand(lesson, name, after):
    w = torch.tensor([3.0], requires_grad=True)
    w.grad = torch.tensor([2.0])
    getattr(lesson, name)([w], lr=0.1, eps=0.5, weight_decay=1.0).step()
    assert w.item() == pytest.approx(after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.7, "weight_decay": 0.3}),
        ("Adam", {}),
        ("Adam", {"betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
        ("AdamW", {}),
        ("AdamW", {"betas": (0.95, 0.9), "eps": 1e-4, "weight_decay": 0.7}),
    ],
)
def test_every_step_is_torchs_in_two_groups_under_a_schedule(lesson, name, options, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    runs = []
    for make in (getattr(lesson, name), getattr(torch.optim, name)):
        twin = copy.deepcopy(model)
        groups = [{"params": twin[:2].parameters(), "lr": 0.003}, {"params": twin[2:].parameters()}]
        optimizer = make(groups, lr=0.03, **options)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        torch.manual_seed(1)
        batches = [(torch.randn(7, 8, dtype=dtype), torch.randn(7, 1, dtype=dtype))] * 15
        runs.append([
            (rate, loss, parameters_to_vector(twin.parameters()).detach())
            for rate, loss in lesson.train(twin, optimizer, scheduler, batches)
        ])  # fmt: skip
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    for (rate, loss, w), (rate_torch, loss_torch, w_torch) in zip(*runs, strict=True):
        assert (rate, loss) == pytest.approx((rate_torch, loss_torch), rel=100 * tight)
        torch.testing.assert_close(w, w_torch, rtol=tight, atol=tight)


def test_parameters_without_a_gradient_stay_and_do_not_decay(lesson):
    w, idle = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = lesson.AdamW([w, idle], lr=0.1, weight_decay=0.5)
    w.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(idle, torch.ones(2)) and (w < 0.9).all()


@pytest.mark.parametrize("T", [10, 37, 100])
@pytest.mark.parametrize("lr", [0.3, 1e-3])
def test_closed_forms_are_torchs_schedulers(lesson, T, lr):
    rates = partial(lesson.rates, steps=T, lr=lr)
    twins = {
        "step": rates(partial(lr_scheduler.StepLR, step_size=3, gamma=0.7)),
        "cosine": rates(partial(lr_scheduler.CosineAnnealingLR, T_max=T - 4, eta_min=lr / 7)),
        "one_cycle": rates(
            partial(lr_scheduler.OneCycleLR, max_lr=lr, total_steps=T, pct_start=0.45,
                    div_factor=10, final_div_factor=50)
        ),
    }  # fmt: skip
    for t in range(T):
        expected = {
            "step": lesson.step_lr(t, lr, 3, 0.7),
            "cosine": lesson.cosine_lr(t, lr, T - 4, lr / 7),
            "one_cycle": lesson.one_cycle_lr(t, lr, T, 0.45, 10, 50),
        }
        assert {name: values[t] for name, values in twins.items()} == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # older SequentialLR warns of itself
@pytest.mark.parametrize("warmup", [2, 5, 9])
def test_warmup_cosine_is_pytorchs_two_in_sequence(lesson, warmup):
    def make(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        cool = lr_scheduler.CosineAnnealingLR(optimizer, 30 - warmup)
        return lr_scheduler.SequentialLR(optimizer, [warm, cool], milestones=[warmup])

    ours = [lesson.warmup_cosine_lr(t, 0.2, 30, warmup) for t in range(30)]
    assert lesson.rates(make, 30, 0.2) == pytest.approx(ours)
    assert ours[0] == pytest.approx(0.2 / warmup) and max(ours) == pytest.approx(0.2)


def test_one_cycle_also_moves_the_momentum_the_other_way():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=20)
    betas = []
    for _ in range(20):
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        scheduler.step()
    assert betas[0] == betas[-1] == 0.95 and min(betas) == betas[5] == pytest.approx(0.85)


def test_decay_groups_split_every_trainable_parameter(lesson):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Embedding(7, 8)
    )
    model[2].weight.requires_grad_(False)
    decay, rest = lesson.decay_groups(model, 0.2)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    assert sum(w.numel() for w in decay["params"]) == 4 * 3 * 9 + 7 * 8
    assert sum(w.numel() for w in rest["params"]) == 4 + 2 * 4 + 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_try_adam_steps_do_not_depend_on_the_gradients_size(lesson, dtype):
    torch.manual_seed(0)
    gradients, ends = torch.randn(20, 9, dtype=dtype), {}
    for make in (lesson.SGD, lesson.Adam, lesson.AdamW):
        for size in (1, 1024):  # a power of two: exact in any dtype
            w = torch.zeros(9, dtype=dtype, requires_grad=True)
            optimizer = make([w], lr=0.01, weight_decay=0.0)
            for g in gradients:
                w.grad = size * g
                optimizer.step()
            assert w.dtype == dtype
            ends[make.__name__, size] = w.detach().float()
    for name in ("Adam", "AdamW"):
        torch.testing.assert_close(ends[name, 1], ends[name, 1024], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(1024 * ends["SGD", 1], ends["SGD", 1024], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("g", [1e-4, -1e-2, 1.0, -1e4])
def test_the_first_step_of_adam_has_the_length_of_the_rate(lesson, g):
    w = torch.zeros(1, requires_grad=True)
    w.grad = torch.tensor([g])
    lesson.Adam([w], lr=0.03).step()
    assert w.item() == pytest.approx(-math.copysign(0.03, g), rel=2e-4)


def test_main_decays_as_predicted(measured):
    decay, steps = measured[0]["decay"], SMALL["decay_steps"]
    assert abs(decay["Adam", 0.01]) < 0.01  # lr a step, for the decay alone fills the gradient
    for size in (2, 20):
        assert decay["Adam", size] == pytest.approx((1 - 0.001 / size) ** steps, abs=0.01)
    for size in (0.01, 2, 20):
        assert decay["AdamW", size] == pytest.approx(0.999**steps)


def test_main_schedules_reorders_and_resumes(measured):
    result, _ = measured
    assert result["groups"] == [576, 193]
    assert result["order"][False] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1])
    assert result["order"][True] == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01])
    assert result["resume"]["nothing"] == (0, 0)
    for left_out in ("scheduler", "optimizer"):
        assert min(result["resume"][left_out]) > 1e-3
    steps = range(SMALL["schedule_steps"])
    peaks = {
        name: max(steps, key=lambda t: round(used[t], 9)) for name, used in result["rates"].items()
    }
    at_once = dict.fromkeys(("constant", "constant_low", "step", "cosine"), 0)
    assert peaks == {**at_once, "one_cycle": 11, "warmup_cosine": 3}


def test_main_ends_lower_with_every_schedule_than_with_a_constant_rate(measured, events):
    result, log_dir = measured
    ends = result["training"]
    flat = [ends["constant"], ends["constant_low"]]
    assert max(end for name, end in ends.items() if "constant" not in name) < 0.9 * min(flat)
    for name in ends:
        run = events(log_dir / "schedule" / name)
        assert len(run.Scalars("optim/lr")) == SMALL["train_steps"]
        assert run.Scalars("val/loss")[-1].value == pytest.approx(ends[name])
