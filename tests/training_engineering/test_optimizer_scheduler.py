import copy
import io
import math
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

SMALL = {"decay_steps": 300, "steps": 60, "runs": 1, "peaks": (0.03,)}


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/optimizer_scheduler.py")


def one_weight(lr=1.0):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)


def rates(optimizer, scheduler, steps, scheduler_first=False):
    used = []
    for _ in range(steps):
        if scheduler_first:
            scheduler.step()
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not scheduler_first:
            scheduler.step()
    return used


# --- the step ----------------------------------------------------------------------------------


def test_the_first_step_by_hand(lesson):
    w, m, v = torch.tensor([3.0]), torch.zeros(1), torch.zeros(1)
    assert lesson.adamw_step(w, torch.tensor([2.0]), m, v, 1, 0.1, wd=1.0, eps=0.5) is None
    assert w.item() == pytest.approx(3 * 0.9 - 0.1 * 2 / (2 + 0.5))  # m' = g, sqrt(v') = |g|
    assert (m.item(), v.item()) == pytest.approx((0.1 * 2, 0.001 * 4))


@pytest.mark.parametrize("g", [1e-4, -1e-2, 1.0, -1e4])
def test_the_first_step_has_the_length_of_the_rate(lesson, g):
    w = torch.zeros(1)
    lesson.adamw_step(w, torch.tensor([g]), torch.zeros(1), torch.zeros(1), 1, 0.03)
    assert w.item() == pytest.approx(-math.copysign(0.03, g), rel=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.95, 0.9), "eps": 1e-4, "weight_decay": 0.7},
        {"betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    ],
)
def test_every_step_is_that_of_adamw_and_with_decay_in_the_gradient_that_of_adam(
    lesson, options, dtype
):
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4, dtype=dtype), torch.randn(15, 3, 4, dtype=dtype)
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    for make in (torch.optim.AdamW, torch.optim.Adam):
        theirs = start.clone().requires_grad_()
        optimizer = make([theirs], lr=0.03, **options)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for t, g in enumerate(gradients, 1):
            theirs.grad = g.clone()
            (group,) = optimizer.param_groups
            (b1, b2), wd = group["betas"], group["weight_decay"]
            if make is torch.optim.Adam:
                g, wd = g + wd * w, 0.0
            lesson.adamw_step(w, g, m, v, t, group["lr"], wd, b1, b2, group["eps"])
            optimizer.step()
            scheduler.step()
            torch.testing.assert_close(w, theirs.detach(), rtol=tight, atol=tight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_size_matters_to_sgd_and_not_to_adam(lesson, dtype):
    torch.manual_seed(0)
    gradients, ends = torch.randn(20, 9, dtype=dtype), {}
    for size in (1, 1024):  # a power of two: exact in any dtype
        w, m, v = (torch.zeros(9, dtype=dtype) for _ in range(3))
        sgd = torch.zeros(9, dtype=dtype)
        for t, g in enumerate(gradients, 1):
            lesson.adamw_step(w, size * g, m, v, t, 0.01, wd=0.0)
            sgd -= 0.01 * size * g
        assert w.dtype == dtype
        ends[size] = w.float(), sgd.float()
    torch.testing.assert_close(ends[1][0], ends[1024][0], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(1024 * ends[1][1], ends[1024][1], rtol=2e-2, atol=1e-2)


def test_try_a_loss_1000_times_as_large_leaves_section_1_as_it_is(lesson, edited, tmp_path, capsys):
    copy = edited(lesson, "loss = F.mse_loss(model(x), y)", "loss = 1000 * F.mse_loss(model(x), y)")
    result = copy.main(log_dir=tmp_path, decay_steps=2, steps=4, runs=1, peaks=(0.03,))
    changed = capsys.readouterr().out.partition("\n2. ")[0]
    rows = lesson.show_everyday()
    assert capsys.readouterr().out.strip() == changed.strip()
    for row, other in zip(rows, result["everyday"], strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_the_everyday_rows_are_those_of_a_weight_and_a_bias(lesson, capsys):
    rows = lesson.show_everyday(T=6, warmup=3)
    assert [row[0] for row in rows[:4]] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    weight, bias = rows[0][1], rows[0][3]
    assert bias == pytest.approx(1 - 0.1 / 3) and weight == pytest.approx(bias - 0.5 * 0.1 / 3)
    assert all(row[1] == pytest.approx(row[2], abs=1e-6) for row in rows)
    assert all(0 < later[1] < row[1] for row, later in pairwise(rows))
    assert "moves the bias by 0.0333, and lr is 0.0333; decay takes 0.0167" in (
        capsys.readouterr().out
    )


# --- who decays, and how much ------------------------------------------------------------------


def test_decay_groups_split_every_trainable_parameter(lesson):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Embedding(7, 8)
    )
    model.temperature = nn.Parameter(torch.tensor(1.0))  # of no axis
    model[2].weight.requires_grad_(False)
    decay, rest = lesson.decay_groups(model, 0.2)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    assert [id(w) for w in decay["params"]] == [id(model[0].weight), id(model[3].weight)]
    assert sorted(id(w) for w in rest["params"]) == sorted(
        id(w)
        for w in (model.temperature, model[0].bias, model[1].weight, model[1].bias, model[2].bias)
    )


def test_without_a_gradient_only_the_matrices_shrink(lesson):
    model = lesson.network(blocks=1, n=4)
    before = copy.deepcopy(model.state_dict())
    idle = nn.Parameter(torch.ones(2, 2))  # has no gradient at all
    groups = lesson.decay_groups(model, 0.5)
    groups[0]["params"].append(idle)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for w in model.parameters():
        w.grad = torch.zeros_like(w)
    optimizer.step()
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, before[name] * (0.95 if w.dim() == 2 else 1.0))
    assert torch.equal(idle, torch.ones(2, 2))


def test_mean_path_shows_decay_alone(lesson):
    torch.manual_seed(0)
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        path = lesson.mean_path(make, 3.0, 20, pairs=5, lr=0.01, weight_decay=0.0)
        assert path == pytest.approx([1.0] * 21, abs=1e-12)
    for make in (torch.optim.SGD, torch.optim.AdamW):
        path = lesson.mean_path(make, 3.0, 20, pairs=5, lr=0.02, weight_decay=0.5)
        assert path == pytest.approx([0.99**t for t in range(21)], abs=1e-12)


# --- schedules ---------------------------------------------------------------------------------


def cosine(t, first, last, T):
    return last + (first - last) * (1 + math.cos(math.pi * t / T)) / 2


def one_cycle(t, lr, T):
    top = 0.3 * T - 1  # one step earlier than one would think, and it need not be whole
    if t <= top:
        return cosine(t, lr / 25, lr, top)
    return cosine(t - top, lr, lr / 250_000, T - 1 - top)


@pytest.mark.parametrize("T", [20, 37, 100])
@pytest.mark.parametrize("lr", [0.3, 1e-3])
def test_schedules_are_their_closed_forms(lesson, T, lr):
    used = {}
    for name in lesson.SCHEDULES:
        optimizer = one_weight(lr)
        used[name] = rates(optimizer, lesson.make_scheduler(name, optimizer, lr, T), T)
    for t in range(T):
        expected = {
            "constant": lr,
            "step": lr * 0.3 ** (t // (T // 4)),
            "cosine": cosine(t, lr, 0, T),
            "one_cycle": one_cycle(t, lr, T),
            "warmup_cosine": lesson.warmup_cosine_lr(t, lr, T, T // 10),
        }
        assert {name: values[t] for name, values in used.items()} == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # older SequentialLR warns of itself
@pytest.mark.parametrize("warmup", [2, 5, 9])
def test_warmup_cosine_is_pytorchs_two_in_sequence(lesson, warmup):
    optimizer = one_weight(0.2)
    warm = lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    cool = lr_scheduler.CosineAnnealingLR(optimizer, 30 - warmup)
    both = lr_scheduler.SequentialLR(optimizer, [warm, cool], milestones=[warmup])
    ours = [lesson.warmup_cosine_lr(t, 0.2, 30, warmup) for t in range(30)]
    assert rates(optimizer, both, 30) == pytest.approx(ours)
    assert ours[0] == pytest.approx(0.2 / warmup) and max(ours) == pytest.approx(0.2)
    assert lesson.warmup_cosine_lr(30, 0.2, 30, warmup) == pytest.approx(0)


def test_one_cycle_also_moves_the_momentum_the_other_way(lesson):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    scheduler = lesson.make_scheduler("one_cycle", optimizer, 1.0, 20)
    betas = []
    for _ in range(20):
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        scheduler.step()
    assert betas[0] == betas[-1] == 0.95 and min(betas) == betas[5] == pytest.approx(0.85)


def test_a_scheduler_that_steps_before_the_optimizer_warns_and_is_one_step_early():
    def step_lr():
        optimizer = one_weight()
        return optimizer, lr_scheduler.StepLR(optimizer, 3, 0.1)

    right = rates(*step_lr(), 6)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step"):
        early = rates(*step_lr(), 6, scheduler_first=True)
    assert right == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1])
    assert early == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01])


def test_resuming_needs_the_states_of_optimizer_and_scheduler(lesson):
    torch.manual_seed(0)
    start, x = lesson.network(n=8), torch.randn(20, 4, 8)

    def session(batches, states=None, left_out=None):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
        parts, used = {"model": model, "optimizer": optimizer, "scheduler": scheduler}, []
        for name in parts if states else ():
            if name != left_out:
                parts[name].load_state_dict(states[name])
        for batch in batches:
            F.mse_loss(model(batch), batch[:, :1].sin()).backward()
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return used, torch.load(file, weights_only=True)

    used, whole = session(x)
    _, half = session(x[:10])
    for left_out in ("nothing", "scheduler", "optimizer", "model"):
        again, end = session(x[10:], half, left_out)
        same = [torch.equal(w, end["model"][name]) for name, w in whole["model"].items()]
        assert all(same) == (left_out == "nothing")
        assert (again == used[10:]) == (left_out in ("nothing", "model"))


# --- training ----------------------------------------------------------------------------------


def test_training_starts_at_the_seeds_network_and_learns_the_teachers_answers(lesson):
    curves = lesson.train(5, "constant", 0.0, 3, blocks=1, N=64)
    torch.manual_seed(5)
    model, teacher = lesson.network(1), lesson.network()
    with torch.no_grad():
        teacher[-1].weight *= 4
        x, x_new = torch.randn(64, 8), torch.randn(256, 8)
        y = teacher(x) + torch.randn(64, 1)
        i = torch.randint(64, (3, 32))
        expected = [F.mse_loss(model(x[row]), y[row]).item() for row in i]
        error = F.mse_loss(model(x_new), teacher(x_new)).item()
    assert curves["train/loss"] == pytest.approx(expected)
    assert curves["val/loss"] == pytest.approx([error] * 3)
    assert curves["optim/lr"] == [0.0] * 3


def test_a_block_is_the_norm_of_the_sum(lesson):
    torch.manual_seed(0)
    block, x = lesson.PostNorm(6), torch.randn(4, 6)
    y = x + block.b(torch.relu(block.a(x)))
    torch.testing.assert_close(block(x), F.layer_norm(y, (6,)))
    assert lesson.network(2, 8)(torch.randn(3, 8)).shape == (3, 1)
    assert sum(isinstance(m, lesson.PostNorm) for m in lesson.network(2, 6).modules()) == 2


def test_only_matrices_decay_in_training(lesson, monkeypatch):
    asked = []

    def watched(model, wd):
        asked.append(wd)
        return [{"params": list(model.parameters()), "lr": 0.0}]

    monkeypatch.setattr(lesson, "decay_groups", watched)
    curves = lesson.train(0, "constant", 0.1, 3, wd=0.7)
    assert asked == [0.7] and curves["optim/lr"] == [0.0] * 3  # the groups are those it gave


# --- main --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(lesson, three_seeds, tmp_path_factory):
    """(result, folder, printed) of three seeds."""
    return three_seeds(lambda *seed_and_dir: lesson.main(*seed_and_dir, **SMALL), tmp_path_factory)


def test_main_decays_as_predicted(lesson, measured, events):
    steps = SMALL["decay_steps"]
    for seed, (result, log_dir, printed) in enumerate(measured):
        assert (
            "   size s of the noise   SGD     AdamW   (1 - lr wd)^t   Adam    (1 - lr wd" in printed
        )
        left = result["decay"]
        assert abs(left["Adam", 0.01]) < 0.01  # lr in each step, for the decay alone fills g
        for s in (2, 20):
            assert left["Adam", s] == pytest.approx((1 - 0.001 / s) ** steps, abs=0.01)
        for s in (0.01, 2, 20):
            assert (left["AdamW", s], left["SGD", s]) == pytest.approx([0.999**steps] * 2)
            for name in ("SGD", "Adam", "AdamW"):
                curve = events(log_dir / name.lower() / f"s_{s}").Scalars("decay/weight")
                assert [event.step for event in curve] == list(range(steps + 1))
                assert curve[-1].value == pytest.approx(left[name, s], abs=1e-6)
        torch.manual_seed(seed)
        path = lesson.mean_path(torch.optim.Adam, 20, steps, lr=0.01, weight_decay=0.1)
        assert path[-1] == left["Adam", 20]
        lost = {key: 1 - share for key, share in left.items()}
        assert lost["Adam", 20] < 0.2 * lost["Adam", 2]
        assert f"{lost['AdamW', 2]:.2f} of the weight with AdamW if s = 2, " in printed
        assert (
            f" {lost['AdamW', 20]:.2f} if s = 20; with Adam {lost['Adam', 2]:.2f} and " in printed
        )
        assert f" and {lost['Adam', 20]:.2f}\n" in printed
        for s in (0.01, 2, 20):
            shares = [abs(left[name, s]) for name in ("SGD", "AdamW", "Adam")]
            laws = 0.999**steps, (1 - 0.001 / s) ** steps
            law = f"{laws[1]:.3f}" if s > 1 else "-"
            cells = [f"{x:.3f}" for x in (*shares[:2], laws[0], shares[2])]
            assert [str(s), *cells, law] in [line.split() for line in printed.splitlines()]


def test_main_trains_best_along_a_cosine_with_warm_up_and_decay(measured):
    def mean(part, key):
        return sum(result[part][key] for result, *_ in measured) / len(measured)

    for name in ("cosine", "warmup_cosine"):
        assert mean("schedules", (name, 0.03)) < 0.8 * mean("schedules", ("constant", 0.03))
    assert mean("schedules", ("constant", 0.03)) < 0.3
    _, cold, warm, weak, strong = measured[0][0]["hard"]
    assert mean("hard", warm) < 0.6 * mean("hard", cold)
    assert mean("hard", strong) < 0.95 * mean("hard", weak)


def test_a_cosine_beats_the_constant_rate_at_its_best_peak(lesson):
    def error(name, lr):
        return sum(lesson.train(seed, name, lr, 200)["val/loss"][-1] for seed in range(2)) / 2

    constant = {lr: error("constant", lr) for lr in lesson.PEAKS[1:4]}
    assert min(constant, key=constant.get) in (0.003, 0.01)  # not at an end of the grid
    assert error("cosine", 0.01) < 0.9 * min(constant.values())


def test_main_prints_what_it_measured(lesson, measured):
    for result, log_dir, printed in measured:
        ends, hard = result["schedules"], result["hard"]
        low, *_, high = sorted(ends[name, 0.03] for name in lesson.SCHEDULES[1:])
        shown = (
            f"constant ends at {ends['constant', 0.03]:.3f}, the four that fall at {low:.3f} to "
        )
        assert f"{shown}{high:.3f}\n" in printed
        null, cold, warm, weak, strong = hard.values()
        assert f"4 PostNorm blocks warm-up leaves {warm / cold:.2f} of the error" in printed
        shown = f"{strong / weak:.2f} of the error of decay 0.01, {strong / null:.2f} of the mean's"
        assert f"with 64 examples decay 10 leaves {shown}\n" in printed
        lines = [line for line in printed.splitlines() if not line.startswith("look")]
        assert max(map(len, lines)) <= 100
        for name in lesson.SCHEDULES:
            row = re.search(rf"^   {name} +[01]\.\d.*$", printed, re.MULTILINE)[0].split()
            shares = [result["rates"][name][t] for t in (0, 30, 59)]
            assert row[-2] == "to"
            cells = [float(cell) for cell in (*row[1:-2], row[-1])]
            assert cells == pytest.approx([*shares, *[ends[name, 0.03]] * 3], abs=6e-4)
        for what, error in hard.items():
            assert re.search(rf"^   {what} +{error:.3f} +{error:.3f} +{error:.3f}$", printed, re.M)
        assert f"look: tensorboard --logdir {log_dir} " in printed


def test_main_logs_the_rate_and_both_losses_of_each_schedule(lesson, measured, events):
    for seed, (result, log_dir, _) in enumerate(measured[:2]):
        assert {path.name for path in (log_dir / "schedule").iterdir()} == set(lesson.SCHEDULES)
        for name in ("warmup_cosine", "step") if seed else ("constant",):
            run = events(log_dir / "schedule" / name)
            curves = lesson.train(seed, name, 0.03, 60)
            for tag, values in curves.items():
                logged = run.Scalars(tag)
                assert [event.step for event in logged] == list(range(60))
                assert [event.value for event in logged] == pytest.approx(values, rel=1e-4)
            assert result["schedules"][name, 0.03] == pytest.approx(curves["val/loss"][-1])
            assert [lr * 0.03 for lr in result["rates"][name]] == pytest.approx(curves["optim/lr"])


def test_means_and_extremes_are_over_the_runs(lesson, tmp_path, capsys):
    seeds = range(7, 9)
    used, ends = lesson.show_schedules(tmp_path, seeds, 4, (0.01, 0.1))
    (row,) = re.findall(r"^   cosine .*$", capsys.readouterr().out, re.MULTILINE)
    assert used["cosine"] == pytest.approx([cosine(t, 1, 0, 4) for t in range(4)])
    best = min((0.01, 0.1), key=lambda lr: ends["cosine", lr])
    for lr, column in ((0.01, 4), (0.1, 5)):
        found = [lesson.train(seed, "cosine", lr, 4)["val/loss"][-1] for seed in seeds]
        assert ends["cosine", lr] == pytest.approx(sum(found) / 2)
        assert float(row.split()[column]) == pytest.approx(sum(found) / 2, abs=6e-4)
        if lr == best:
            assert row.endswith(f"   {min(found):.3f} to {max(found):.3f}")
    hard = lesson.show_hard_cases(seeds, 4)
    printed = capsys.readouterr().out
    for (what, mean), (name, lr, options) in zip(
        hard.items(),
        (
            (None, None, {}),
            ("cosine", 0.03, {"blocks": 4}),
            ("warmup_cosine", 0.03, {"blocks": 4}),
            ("warmup_cosine", 0.03, {"N": 64, "wd": 0.01}),
            ("warmup_cosine", 0.03, {"N": 64, "wd": 10}),
        ),
        strict=True,
    ):
        if name:
            found = [lesson.train(seed, name, lr, 4, **options)["val/loss"][-1] for seed in seeds]
        else:  # the mean of the targets that the next two runs learn from
            tasks = [lesson.task(seed, 0, 64) for seed in seeds]
            found = [F.mse_loss(y.mean().expand_as(new), new).item() for _, _, y, _, new in tasks]
        assert mean == pytest.approx(sum(found) / 2)
        assert re.search(
            rf"^   {what} +{mean:.3f} +{min(found):.3f} +{max(found):.3f}$", printed, re.M
        )
