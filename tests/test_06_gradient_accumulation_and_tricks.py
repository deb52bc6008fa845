import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

F64 = torch.float64


@pytest.fixture
def lesson(load):
    return load("06_gradient_accumulation_and_tricks.py")


def data(N, seed=0):
    torch.manual_seed(seed)
    return torch.randn(N, 8, dtype=F64), torch.randint(3, (N,))


def one_gradient(model, x, y):
    return parameters_to_vector(
        torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters())
    )


def lines_after(title, out, count):
    """The `count` lines below the head of the table whose title starts so, as lists of words."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return [line.split() for line in lines[start + 1 : start + 1 + count]]


# --- accumulate --------------------------------------------------------------------------------


class Squares(nn.Module):
    """w x^2 + b: something that is not a layer of the lesson."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.tensor([-0.2]))

    def forward(self, x):
        return self.w * x**2 + self.b


def pairs(sizes, targets=1):
    """Batches (x, y), each (n, targets), of these sizes n."""
    torch.manual_seed(0)
    return [(torch.randn(n, targets), torch.randn(n, targets)) for n in sizes]


@pytest.mark.parametrize(
    ("sizes", "k"), [((3, 1, 2, 5), 2), ((4, 4, 1), 3), ((2, 3, 1), 9), ((5, 1), 1), ((1, 6, 2), 2)]
)
@pytest.mark.parametrize(("max_norm", "targets"), [(0.7, 1), (1e3, 1), (1e3, 3)])
def test_k_batches_of_any_sizes_make_the_step_of_one_batch(lesson, sizes, k, max_norm, targets):
    loader, ours, twin = pairs(sizes, targets), Squares(), Squares()
    sgd = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.5) for m in (ours, twin)]
    ours.w.grad = torch.tensor([7.0])  # what is left from before does not count
    norms, expected = lesson.train_epoch(ours, sgd[0], loader, k, max_norm), []
    for first in range(0, len(loader), k):
        x, y = (torch.cat(tensors) for tensors in zip(*loader[first : first + k], strict=True))
        sgd[1].zero_grad()
        F.mse_loss(twin(x), y).backward()
        g = torch.cat([twin.w.grad, twin.b.grad])
        expected.append(g.norm().item())
        for p in twin.parameters():
            p.grad *= min(1, max_norm / g.norm().item())
        sgd[1].step()
    assert norms == pytest.approx(expected, rel=1e-4)
    assert len(norms) == math.ceil(len(sizes) / k)
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_loop_reads_a_generator_once_and_takes_a_copy_of_any_loader(lesson):
    loader = pairs((2, 3, 2))
    ends = []
    for batches in (loader, iter(loader)):
        model = Squares()
        lesson.train_epoch(model, torch.optim.SGD(model.parameters(), 0.1), batches, 2, 1e3)
        ends.append(parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*ends)


def test_the_everyday_table_is_the_loop_by_hand(lesson, capsys):
    measured = lesson.show_everyday()
    xs = [1, 2, 1, 2, 1, 2, 1]
    expected = {}
    for size, k in ((4, 1), (2, 2), (1, 4), (2, 1)):
        w, norms = 0.0, []
        for first in range(0, 7, size * k):
            part = xs[first : first + size * k]
            g = sum(2 * (w * x - 2 * x) * x for x in part) / len(part)
            norms.append(abs(g))
            w -= 0.1 * max(-6, min(6, g))
        expected[size, k] = pytest.approx([*norms, w], abs=1e-3)
    assert measured["ends"] == expected
    assert measured["checked"] is True and measured["frozen"] == [True, False]
    out = capsys.readouterr().out
    assert lines_after("1.", out, 6)[2:] == [
        ["4", "1", "4", "10.00,", "5.60", "1.160"],
        ["2", "2", "4", "10.00,", "5.60", "1.160"],
        ["1", "4", "4", "10.00,", "5.60", "1.160"],
        ["2", "1", "2", "10.00,", "7.00,", "4.00,", "0.80", "1.680"],
    ]
    assert "-> with 4 examples a step (the last has 3) |g| and w are the same" in out
    assert "same for batches of 4, 2, 1\n" in out
    assert "   One pass over x = 1, 2, 1, 2, 1, 2, 1 from w = 0, by SGD with lr = 0.1" in out
    assert "gradcheck(torch.sin, (x,)) is True: at x = 0.5 and 1 autograd" in out
    assert "backward(), .grad of layer 0 is None, of layer 1 a tensor\n" in out


def test_a_loop_that_counts_batches_is_told(lesson, capsys, monkeypatch):
    def by_batches(model, optimizer, loader, k, max_norm):
        loader, norms = list(loader), []
        for first in range(0, len(loader), k):
            optimizer.zero_grad()
            group = loader[first : first + k]
            for x, y in group:
                (F.mse_loss(model(x), y, reduction="sum") / len(group)).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
            optimizer.step()
        return norms

    monkeypatch.setattr(lesson, "train_epoch", by_batches)
    lesson.show_everyday()
    assert "same for batches of 4\n" in capsys.readouterr().out  # and no other ones


@pytest.mark.parametrize("rule", ["sum / N", "mean / k", "mean"])
def test_an_accumulated_gradient_is_the_weighted_sum_over_single_examples(lesson, rule):
    x, y = data(11)
    model = lesson.mlp()
    singles = [one_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(11)]
    sizes = torch.tensor([4] * 8 + [3] * 3).double()  # of the part that an example is in
    weights = {"sum / N": sizes * 0 + 1 / 11, "mean / k": 1 / (3 * sizes), "mean": 1 / sizes}
    expected = (weights[rule][:, None] * torch.stack(singles)).sum(0)
    for _ in range(2):  # what is left in .grad from before does not count
        torch.testing.assert_close(lesson.accumulated_gradient(model, x, y, 4, rule), expected)


@pytest.mark.parametrize("size", [1, 3, 7, 22, 23, 99])
def test_parts_of_any_size_give_the_batch(lesson, size):
    x, y = data(23)
    assert lesson.accumulation_error(lesson.mlp(), x, y, size) < 1e-14


def test_the_error_is_the_relative_distance(lesson):
    x, y = data(24)
    assert lesson.accumulation_error(lesson.mlp(), x, y, 8, "mean") == pytest.approx(2)  # 3 g - g


def test_a_k_fold_gradient_makes_k_fold_steps_of_sgd_and_the_same_steps_of_adam(lesson):
    x, y = data(24)
    moved = {}
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        for rule in ("mean / k", "mean"):
            torch.manual_seed(1)
            model = lesson.mlp()
            start = parameters_to_vector(model.parameters()).detach()
            stepper = optimizer(model.parameters(), lr=1e-5)
            for _ in range(10):
                lesson.accumulated_gradient(model, x, y, 8, rule)
                stepper.step()
            moved[optimizer, rule] = parameters_to_vector(model.parameters()).detach() - start
    sgd, adam = (
        (moved[o, "mean"].norm() / moved[o, "mean / k"].norm()).item()
        for o in (torch.optim.SGD, torch.optim.Adam)
    )
    assert sgd == pytest.approx(3, rel=1e-2)
    assert adam == pytest.approx(1, rel=1e-3)


def test_divisors_print_weights_and_errors(lesson, tmp_path, capsys):
    torch.manual_seed(0)
    errors = lesson.show_divisors(tmp_path, size=5, k=3, last=4)
    out = capsys.readouterr().out
    for rule, (full, last) in {
        "sum / N": ("1.00", "1.00"),
        "mean / k": ("0.93", "1.17"),  # 14 / 15, 14 / 12
        "mean": ("2.80", "3.50"),
    }.items():
        row = next(line for line in out.splitlines() if line.startswith(f"   {rule}  "))
        numbers = row.removeprefix(f"   {rule}").split()
        assert numbers == [full, last, f"{errors[rule][4]:.1e}", f"{errors[rule][5]:.1e}"]
    assert "-> exact for every size of the last part: sum / N\n" in out


def test_try_n_is_the_number_of_labels_that_are_left(lesson, edited, tmp_path, capsys, monkeypatch):
    line = "    x, y = torch.randn(k * size, 8).double(), torch.randint(3, (k * size,))\n"
    copied = edited(lesson, line, line + "    y[::3] = -100\n")
    torch.manual_seed(0)
    copied.show_divisors(tmp_path / "try")
    assert "last part: none\n" in capsys.readouterr().out

    x, y = data(50)
    y[::3] = -100
    left = (y != -100).sum().item()
    monkeypatch.setattr(lesson, "divisor", lambda rule, n, N, k: left)
    assert lesson.accumulation_error(lesson.mlp(), x, y, 16) < 1e-14


# --- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, 5])
def test_batch_norm_breaks_the_sum_only_where_the_parts_have_other_statistics(lesson, copies):
    x, y = data(12)
    model = lesson.mlp(nn.BatchNorm1d(16))
    alike = x.repeat(copies, 1), y.repeat(copies)
    assert lesson.accumulation_error(model, *alike, 12) < 1e-12
    assert lesson.accumulation_error(model, *alike, 7) > 1e-2


def test_batch_norm_refuses_a_part_of_one_example(lesson):
    x, y = data(9)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        lesson.accumulation_error(lesson.mlp(nn.BatchNorm1d(16)), x, y, 4)


def test_every_layer_that_is_tried_does_what_its_name_says(lesson):
    torch.manual_seed(0)
    layers, x = lesson.middle_layers(), 5 * torch.randn(400, 16) + 2
    assert list(layers) == ["BatchNorm_train", "BatchNorm_eval", "LayerNorm"]
    by_batch, by_past, by_example = (layer(x) for layer in layers.values())
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(by_batch, normal)
    past = layers["BatchNorm_eval"]
    assert past.running_mean.abs().mean() > 0.05 and past.running_var.mean() > 1.5
    torch.testing.assert_close(by_past, (x - past.running_mean) / (past.running_var + 1e-5).sqrt())
    torch.testing.assert_close(by_example, F.layer_norm(x, (16,)))


# --- clip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.03, 1.7, 1e3])
def test_clipping_is_torchs(lesson, c):
    torch.manual_seed(0)
    gradients = [torch.randn(shape, dtype=F64) for shape in [(3, 5), (7,), ()]]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    unclipped = [g.clone() for g in gradients]
    ours = lesson.clip_norm_(gradients, c)
    torch.testing.assert_close(ours, nn.utils.clip_grad_norm_(parameters, c))
    grads = [p.grad for p in parameters]
    torch.testing.assert_close(gradients, grads, rtol=1e-10, atol=0)  # the 1e-6 is 2e-7 of |g|
    same = [torch.equal(a, b) for a, b in zip(gradients, unclipped, strict=True)]
    assert all(same) == (c == 1e3)


def test_clipping_by_value_is_a_clamp_of_each_element():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(50))
    p.grad = g = torch.randn(50)
    nn.utils.clip_grad_value_([p], 0.4)
    assert torch.equal(p.grad, g.clamp(-0.4, 0.4))


@pytest.mark.parametrize(("g", "c"), [(1.0, 0.0), (1.0, -1.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_a_norm_that_cannot_be_clipped_is_refused_and_nothing_changed(lesson, g, c):
    gradients = [torch.tensor([g, 2.0])]
    with pytest.raises(ValueError, match="cannot clip a norm of"):
        lesson.clip_norm_(gradients, c)
    torch.testing.assert_close(gradients[0], torch.tensor([g, 2.0]), equal_nan=True)


def test_torch_makes_nan_of_an_infinite_gradient_unless_told_to_refuse():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([math.inf, 2.0])
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    nn.utils.clip_grad_norm_([p], 1.0)
    assert p.grad[0].isnan()


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_the_clipped_rows(lesson, capsys, c):
    rows = lesson.show_clipping(c)
    by_hand, by_norm, by_value = rows.values()
    g = torch.tensor([3.0, -4.0, 0.5])
    for row in (by_hand, by_norm):
        assert row == pytest.approx([*(g * c / g.norm()).tolist(), c, 1], rel=1e-5)
    cut = g.clamp(-c, c)
    turned = ((g @ cut) / (g.norm() * cut.norm())).item()
    assert by_value == pytest.approx([*cut.tolist(), cut.norm().item(), turned], rel=1e-5)
    out = capsys.readouterr().out
    both = "clip_norm_, by hand and with nn.utils.clip_grad_norm_\n"
    assert f"-> |g| is {c:g} with {both}" in out and f"-> the direction stays with {both}" in out
    for name, row in rows.items():
        assert f"   {name:<24} " in out and f"  {row[3]:6.3f}   {row[4]:13.3f}\n" in out


# --- the recurrent net -------------------------------------------------------------------------


def descend(lr, c, steps, T=20):
    """The path of w from 1.3 by SGD on (w^T - 1)^2, as where a recurrent net uses w T times."""
    w = torch.tensor([1.3], requires_grad=True)
    optimizer, path = torch.optim.SGD([w], lr), [w.item()]
    while len(path) <= steps and math.isfinite(path[-1]):
        optimizer.zero_grad()
        (w**T - 1).square().sum().backward()
        if math.isfinite(c):  # a limit of inf would make nan of an infinite gradient
            nn.utils.clip_grad_norm_([w], c)
        optimizer.step()
        path.append(w.item())
    return path


def test_one_step_along_a_long_gradient_throws_a_weight_too_far_away_to_return():
    unclipped = descend(1e-3, math.inf, 500)
    assert len(unclipped) == 3 and math.isinf(unclipped[-1])
    thrown = descend(1e-6, math.inf, 500)  # to where w^20 has no slope
    assert thrown[1] < 0.5 and thrown[1] == pytest.approx(thrown[-1], abs=1e-3)
    assert descend(1e-7, math.inf, 500)[-1] > 1.05  # still far
    clipped = descend(1e-3, 1.0, 500)
    assert clipped[-1] == pytest.approx(1, abs=1e-4)
    assert max(abs(b - a) for a, b in pairwise(clipped)) < 1.001e-3  # lr c


# --- gradcheck ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_the_cube_keeps_its_values_and_has_the_gradient_it_is_told(lesson, wrong):
    torch.manual_seed(0)
    x, weights = torch.randn(2, 5, dtype=F64).requires_grad_().unbind()
    y = lesson.cube(x, wrong)
    assert torch.equal(y, x**3)
    (g,) = torch.autograd.grad(y @ weights, x)
    torch.testing.assert_close(g, (1 + wrong) * 3 * x**2 * weights)


def test_the_central_difference_is_a_slope(lesson):
    x = torch.tensor([0.3, 2.0, -1.0], dtype=F64)
    torch.testing.assert_close(lesson.central_difference(torch.sin, x, 1e-5), x.cos())
    torch.testing.assert_close(lesson.central_difference(torch.square, x, 7.0), 2 * x)  # exact


def test_the_central_difference_is_off_by_h_squared_until_rounding_takes_over(lesson):
    def error(dtype, h):
        t = x.to(dtype)
        slope = lesson.central_difference(lesson.cube, t, h)
        return (slope - 3 * t.double() ** 2).abs().max().item()

    torch.manual_seed(0)
    x = torch.randn(50)
    for dtype, steps in {F64: (0.1, 1e-2, 1e-3), torch.float32: (0.1,)}.items():
        for h in steps:
            assert error(dtype, h) == pytest.approx(h**2, rel=2e-2)  # f''' / 6 is 1
    for dtype, h in {F64: 1e-9, torch.float32: 1e-5}.items():
        u, largest = torch.finfo(dtype).eps / 2, x.abs().max().item() ** 3
        assert 0.1 < error(dtype, h) / (u * largest / h) < 10


@pytest.mark.parametrize("seed", range(100, 103))
def test_gradcheck_tells_right_from_wrong_in_float64(lesson, capsys, seed):
    torch.manual_seed(seed)
    slopes, passes = lesson.show_gradcheck(draws=6)
    assert passes["float64"] == passes["float32, eps=5e-3, atol=1e-4"] == [6, 0]
    assert max(passes["float32"]) <= 1 and min(passes["float32, rtol=0.1"]) >= 4
    assert slopes["3 x^2"].tolist() == [3, 12, 27]
    assert (slopes["float64"] - slopes["3 x^2"]).abs().max() < 1e-6
    assert (slopes["float32"] - slopes["3 x^2"]).abs().min() > 0.04
    out = capsys.readouterr().out
    told = [name for name, (right, wrong) in passes.items() if (right, wrong) == (6, 0)]
    assert f"-> accepts the right one, refuses the other, each time: {'; '.join(told)}\n" in out
    for name, (right, wrong) in passes.items():
        assert f"   {name:<30} {right:5d}   {wrong:13d}\n" in out
    assert "   3 x^2              3.000000  12.000000  27.000000\n" in out


# --- freeze ------------------------------------------------------------------------------------


def test_a_gradient_left_behind_moves_frozen_weights_unless_freeze_clears_it(lesson):
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    layer(torch.randn(3, 4)).sum().backward()
    start = parameters_to_vector(layer.parameters()).detach().clone()
    stale, frozen = copy.deepcopy(layer), copy.deepcopy(layer)
    for p, q, r in zip(*(m.parameters() for m in (layer, stale, frozen)), strict=True):
        q.grad, r.grad = p.grad.clone(), p.grad.clone()
    stale.requires_grad_(False)
    lesson.freeze(frozen)
    assert not any(p.requires_grad for p in frozen.parameters())
    for m in (stale, frozen):
        torch.optim.AdamW(m.parameters(), lr=0.1).step()
    assert not torch.equal(parameters_to_vector(stale.parameters()), start)
    assert torch.equal(parameters_to_vector(frozen.parameters()), start)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_weights_alone_do_not_fix_the_output_of_batch_norm(lesson, mode):
    torch.manual_seed(0)
    a = torch.randn(32, 16)
    before, net, _, moved = lesson.fine_tune(mode, steps=10)
    old, new = (model[1:3].eval()(a) for model in (before, net))
    assert torch.equal(old, new) == (mode == "eval")
    assert list(moved) == list(range(1, 11))
    assert moved[10] == net[2].running_mean.norm().item()  # it starts at 0


def test_what_is_printed_of_freezing_is_measured(lesson, tmp_path, capsys, events):
    torch.manual_seed(3)
    measured = lesson.show_freezing(tmp_path, steps=7)
    rows = {0: (144, 144, 144, 144), 1: (272, 0, 0, 0), 2: (32, 0, 0, 0), 4: (51, 51, 51, 51)}
    assert measured["rows"] == rows
    out = capsys.readouterr().out
    printed = lines_after("6.", out, 5)[1:]
    assert [[int(n) for n in (row[0], *row[2:])] for row in printed] == [
        [i, *rows[i]] for i in rows
    ]
    assert [row[1] for row in printed] == ["Linear", "Linear", "BatchNorm1d", "Linear"]
    assert (
        "-> frozen: layers 1 and 2; a gradient still gets to layers 0 and 4\n" in out
        and "-> mode in which the output stays as it was: eval\n" in out
    )
    assert measured["moved"]["eval"] == (0, 0)
    mean, output = measured["moved"]["train"]
    assert mean > 0.1 and output > 0.1
    assert ["train", f"{mean:.2f}", f"{output:.2f}"] in lines_after("6.", out, 10)
    for mode in ("eval", "train"):
        curve = events(tmp_path / "freeze" / mode).Scalars("freeze/running_mean_moved")
        assert [e.step for e in curve] == list(range(1, 8))
        assert curve[-1].value == pytest.approx(measured["moved"][mode][0])


# --- the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 100])
def test_main(lesson, tmp_path, events, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, draws=5)
    out = capsys.readouterr().out

    errors = measured["divisors"]
    assert max(errors["sum / N"].values()) < 1e-14 < 0.2 < errors["mean / k"][2]
    assert errors["mean / k"][2] < errors["mean"][2] and errors["mean / k"][16] < 1e-14
    assert errors["mean"][16] == pytest.approx(3)  # a gradient 4 times too long
    for run, rule in {"sum_by_N": "sum / N", "mean_by_k": "mean / k", "mean": "mean"}.items():
        curve = events(tmp_path / "accumulate" / run).Scalars("accumulate/error")
        assert [e.step for e in curve] == list(range(1, 17))
        assert [e.value for e in curve] == pytest.approx(list(errors[rule].values()), rel=1e-6)

    layers = measured["layers"]
    mixed = list(layers["BatchNorm_train"].values())
    assert mixed[0] < 1e-14 < 0.02 < min(mixed[1:]) and mixed[4] > 0.3
    assert max(*layers["BatchNorm_eval"].values(), *layers["LayerNorm"].values()) < 1e-14
    for name, row in layers.items():
        curve = events(tmp_path / "layers" / name).Scalars("layers/error")
        assert [e.step for e in curve] == [1, 2, 4, 8, 16]
        assert [e.value for e in curve] == pytest.approx(list(row.values()), rel=1e-6)
        words = name.replace("_", " in mode ")
        assert f"   {words:<25}" + "".join(f"{e:9.0e}" for e in row.values()) in out
    assert "-> exact for every k: BatchNorm in mode eval and LayerNorm\n" in out
    assert "last part: sum / N\n" in out and f"--logdir {tmp_path} " in out
    assert {p.parent.name for p in tmp_path.rglob("*tfevents*")} == {
        "sum_by_N", "mean_by_k", "mean", *layers, "eval", "train"
    }  # fmt: skip
