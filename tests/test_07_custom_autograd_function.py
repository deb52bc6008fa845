from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def lesson(load):
    return load("07_custom_autograd_function.py")


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def vjp(f, g, *inputs):
    """f's output, and the gradients that a cotangent g gives."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, g)


# --- a tensor and a number ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_power_is_torchs(lesson, n):
    torch.manual_seed(0)
    x, g = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    ours = vjp(lambda x: lesson.Power.apply(x, n), g, x)
    for mine, library in zip(ours, vjp(lambda x: x**n, g, x), strict=True):
        torch.testing.assert_close(mine, library)
    x.requires_grad_()
    assert gradcheck(lambda x: lesson.Power.apply(x, n), x)
    assert gradgradcheck(lambda x: lesson.Power.apply(x, n), x)


def test_each_argument_of_forward_wants_an_answer(lesson):
    class Short(lesson.Power):
        @staticmethod
        def backward(ctx, g):
            return g  # and nothing for n

    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="incorrect number of gradients"):
        Short.apply(x, 2).sum().backward()


def test_the_first_table(lesson, capsys):
    assert lesson.show_everyday() == {"y": [1, 8, 27], "grad": [3, 12, 27], "passed": True}
    out = lines(capsys)
    assert [line.split()[-3:] for line in out[1:4]] == [
        ["1", "2", "3"], ["1", "8", "27"], ["3", "12", "27"]]  # fmt: skip
    assert out[-1] == "   -> gradcheck passes: backward is the slope of forward"


def test_the_first_table_says_so_if_backward_is_wrong(lesson, capsys, monkeypatch):
    class Wrong(Function):
        @staticmethod
        def forward(ctx, x, n):
            return x**n

        @staticmethod
        def backward(ctx, g):
            return g, None

    monkeypatch.setattr(lesson, "Power", Wrong)
    assert lesson.show_everyday()["passed"] is False
    assert lines(capsys)[-1] == "   -> gradcheck FAILS: backward is not the slope of forward"


# --- true and false backwards ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("relu", torch.relu, torch.relu),
        ("sign", lambda x: torch.where(x < 0, -1.0, 1.0), torch.sign),
        ("straight_through", lambda x: torch.where(x < 0, -1.0, 1.0), F.hardtanh),
    ],
)
def test_a_one_input_function_is_its_twin_bit_for_bit(lesson, name, forward, backward):
    torch.manual_seed(0)
    x = torch.cat([torch.tensor([-1.0, -0.0, 0.0, 1.0, float("inf")]), 2 * torch.randn(95)])
    g = torch.randn(100)
    g[:3] = float("inf")  # 0 * inf would be nan
    y, dx = vjp(getattr(lesson, name), g, x)
    assert torch.equal(y, forward(x))
    assert torch.equal(dx, vjp(backward, g, x)[1])


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_affine_is_linear_for_any_batch_shape(lesson, batch):
    torch.manual_seed(0)
    x, W, b, g = (torch.randn(s).double() for s in [(*batch, 7), (4, 7), (4,), (*batch, 4)])
    for ours, library in zip(
        vjp(lesson.affine, g, x, W, b), vjp(F.linear, g, x, W, b), strict=True
    ):
        torch.testing.assert_close(ours, library)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["relu", "sign", "affine"])
def test_right_gradients_pass_both_checks_in_batches_too(lesson, name, seed):
    torch.manual_seed(seed)
    shapes = [(2, 3), (5, 3), (5,)] if name == "affine" else [(2, 3)]
    inputs = [torch.randn(s).double().requires_grad_() for s in shapes]
    assert gradcheck(getattr(lesson, name), inputs, check_batched_grad=True)
    assert gradgradcheck(getattr(lesson, name), inputs)


@pytest.mark.parametrize("broken", range(3))
def test_gradcheck_finds_one_broken_gradient_of_three(lesson, broken):
    class Broken(lesson.Affine):
        @staticmethod
        def backward(ctx, g):
            grads = list(lesson.Affine.backward(ctx, g))
            grads[broken] = grads[broken] * 1.01
            return tuple(grads)

    torch.manual_seed(0)
    inputs = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
    assert lesson.passes(lesson.affine, *inputs) is True
    assert lesson.passes(Broken.apply, *inputs) is False


def backward_products(f, inputs, wanted):
    """Matrix products in backward, in units of the one in forward, if `wanted` need gradients."""
    inputs = [x.detach().requires_grad_(name in wanted) for name, x in inputs.items()]
    with FlopCounterMode(display=False) as forward:
        y = f(*inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return backward.get_total_flops() / forward.get_total_flops()


def test_without_needs_input_grad_unwanted_products_are_computed_all_the_same(lesson):
    class Careless(lesson.Affine):
        @staticmethod
        def backward(ctx, g):
            x, W = ctx.saved_tensors
            return g @ W, g.T @ x, g.sum(0)

    inputs = {"x": torch.randn(3, 7), "W": torch.randn(2, 7), "b": torch.randn(2)}
    for wanted, theory in {"x": 1, "W": 1, "b": 0, "xW": 2, "Wb": 1, "xWb": 2}.items():
        assert backward_products(lesson.affine, inputs, wanted) == theory
        assert backward_products(F.linear, inputs, wanted) == theory
        assert backward_products(Careless.apply, inputs, wanted) == 2


@pytest.mark.parametrize("name", ["relu", "sign", "straight_through"])
def test_vmap_is_the_loop(lesson, name):
    torch.manual_seed(0)
    f, x = getattr(lesson, name), torch.randn(5, 3)
    assert torch.equal(vmap(f)(x), torch.stack([f(row) for row in x]))


def test_vmap_over_weights_is_an_ensemble(lesson):
    torch.manual_seed(0)
    x, W, b = torch.randn(5, 3), torch.randn(4, 2, 3), torch.randn(4, 2)
    together = vmap(lesson.affine, in_dims=(None, 0, 0))(x, W, b)
    torch.testing.assert_close(
        together, torch.stack([F.linear(x, *p) for p in zip(W, b, strict=True)])
    )


def test_vmap_wants_the_rule_to_be_asked_for(lesson):
    class Plain(lesson.ReLU):
        generate_vmap_rule = False

    with pytest.raises(RuntimeError, match="generate_vmap_rule=True"):
        vmap(Plain.apply)(torch.randn(5, 3))


def test_per_sample_gradients_by_vmap_are_those_of_a_loop_and_average_to_the_batchs(lesson):
    torch.manual_seed(0)
    (x, y), params = lesson.xor_data(37), lesson.init_params(H=5)

    def loss(params, x, y):
        out = lesson.network(params, x, lesson.relu, lesson.straight_through)
        return lesson.squared_loss(out, y)

    samples = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    loop = [lesson.gradients(lambda *p, xy=xy: loss(p, *xy), *params)
            for xy in zip(x, y, strict=True)]  # fmt: skip
    batch = lesson.gradients(lambda *p: loss(p, x, y), *params)
    assert any(gradient.abs().max() > 0.01 for gradient in batch)
    for each, alone, mean in zip(samples, zip(*loop, strict=True), batch, strict=True):
        assert each.shape == (37, *mean.shape)
        torch.testing.assert_close(each, torch.stack(alone))
        torch.testing.assert_close(each.mean(0), mean)


@pytest.mark.parametrize(
    ("x", "W", "b"),
    [
        ((5, 3), (4, 2), (4,)),
        ((5, 3), (4, 3), (1,)),
        ((5, 3), (4, 3), (5, 4)),
        ((3,), (3,), ()),
        ((), (4, 3), (4,)),
    ],
)
def test_affine_refuses_what_would_be_broadcast(lesson, x, W, b):
    with pytest.raises(ValueError, match="affine takes x"):
        lesson.affine(torch.zeros(x), torch.zeros(W), torch.zeros(b))


def test_the_loss_refuses_a_column_against_a_row(lesson):
    with pytest.raises(ValueError, match=r"\(4, 1\) and y \(4,\)"):
        lesson.squared_loss(torch.ones(4, 1), torch.ones(4))


def test_the_loss_is_the_error_rate(lesson):
    out, y = torch.tensor([1.0, 1, -1, -1, 1]), torch.tensor([1.0, -1, -1, 1, -1])
    assert lesson.squared_loss(out, y) == 3 / 5


# --- Try ---------------------------------------------------------------------------------------


def changed(lesson, old, new):
    """The lesson with one edit: what Try asks for."""
    source = Path(lesson.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    module = ModuleType("changed")
    module.__file__ = lesson.__file__
    exec(source.replace(old, new), vars(module))
    return module


MASK = "return torch.where(x.abs() < 1, g, 0)"


FEW = {"steps": 60, "lr": 0.05}  # enough for 128 points: below 3 % errors for 24 seeds of 24


def test_try_without_the_mask_xor_is_learned_all_the_same(lesson, tmp_path, capsys):
    edit = changed(lesson, MASK, "return g")
    measured = edit.main(log_dir=tmp_path, count=128, **FEW)
    assert measured["trained"]["straight_through"][0][-1] < 0.06
    wrong = measured["trained"]["straight_through"][0][-1]
    assert f"behind an output Sign: {wrong:.1%} errors by" in capsys.readouterr().out
    for seed in range(1, 5):
        torch.manual_seed(seed)
        (x, y), params = edit.xor_data(128), edit.init_params()
        errors, _ = edit.train(params, x, y, edit.relu, edit.straight_through, **FEW)
        assert errors[0] > 0.25 > 0.06 > errors[-1]


def test_try_without_the_mask_it_is_the_perceptron(lesson):
    class Unmasked(lesson.Sign):
        @staticmethod
        def backward(ctx, g):
            return g

    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = lesson.sign(x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3)
    W, b = torch.zeros(1, 3), torch.zeros(1)
    w, bias, mistakes = [0.0] * 3, 0.0, []
    for _ in range(20):
        mistakes.append(0)
        for x_i, y_i in zip(x, y, strict=True):
            dW, db = lesson.gradients(
                lambda W, b, x_i=x_i, y_i=y_i: lesson.squared_loss(
                    Unmasked.apply(lesson.affine(x_i, W, b)).squeeze(0), y_i
                ),
                W, b,
            )  # fmt: skip
            W, b = W - dW, b - db
            z = sum(v * u for v, u in zip(w, x_i.tolist(), strict=True)) + bias
            if (z >= 0) != (y_i > 0):
                mistakes[-1] += 1
                w = [v + y_i.item() * u for v, u in zip(w, x_i.tolist(), strict=True)]
                bias += y_i.item()
        torch.testing.assert_close(W[0], torch.tensor(w))
        torch.testing.assert_close(b[0], torch.tensor(bias))
    assert mistakes[0] > 0 == mistakes[-1]


# --- XOR ---------------------------------------------------------------------------------------


def test_xor_is_the_sign_of_the_product(lesson):
    torch.manual_seed(0)
    x, y = lesson.xor_data(2000)
    assert x.shape == (2000, 2) and set(y.tolist()) == {-1, 1}
    assert torch.equal(y > 0, (x[:, 0] > 0) == (x[:, 1] > 0))
    assert -1 < x.min() < -0.99 and 0.99 < x.max() < 1
    for right in (x > 0).unbind(1):  # no half of the square is of one class
        assert 0.4 < (y[right] > 0).float().mean() < 0.6


def test_the_network_starts_with_random_weights(lesson):
    torch.manual_seed(0)
    W1, b1, W2, b2 = lesson.init_params(H=5000)
    assert (W1.shape, b1.shape, W2.shape, b2.shape) == ((5000, 2), (5000,), (1, 5000), (1,))
    for values, std in ((W1, 1), (b1, 1 / 2), (W2, 1 / 8)):
        assert values.std().item() == pytest.approx(std, rel=0.05)
    assert b2.item() == 0 and len(lesson.init_params()[1]) == 32


def test_the_network_is_two_affine_layers(lesson):
    torch.manual_seed(0)
    params, x = lesson.init_params(H=4), torch.randn(3, 2)
    W1, b1, W2, b2 = params
    expected = torch.tanh(torch.relu(x @ W1.T + b1) @ W2.T + b2).squeeze(1)
    torch.testing.assert_close(lesson.network(params, x, torch.relu, torch.tanh), expected)


def test_a_gradient_that_is_no_block_in_memory_is_taken(lesson):
    torch.manual_seed(0)
    x, W, b = (torch.randn(s).double() for s in [(2, 3, 5), (4, 5), (4,)])
    g = torch.randn(3, 2, 4).double().transpose(0, 1)
    assert not g.is_contiguous()
    for ours, library in zip(
        vjp(lesson.affine, g, x, W, b), vjp(F.linear, g, x, W, b), strict=True
    ):
        torch.testing.assert_close(ours, library)


def test_differences_are_the_slope(lesson):
    x = torch.tensor([0.5, 2.0]).double()
    torch.testing.assert_close(lesson.differences(torch.exp, x), x.exp())
    assert lesson.differences(torch.square, x, h=0.5).tolist() == [1, 4]  # exact for a parabola
    assert lesson.differences(lambda x: x**3, x, h=1.0).tolist() == [1.75, 13]  # 3 x^2 + h^2


def test_the_second_table(lesson, capsys):
    checked = lesson.show_truth()
    assert checked == {
        "ReLU": True,
        "ReLUWithoutMask": False,
        "Sign": True,
        "StraightThroughSign": False,
        "ReLUWithoutMask, x > 0": True,
        "ReLU at 0": False,
    }
    out = lines(capsys)
    assert [line.split() for line in out[3:7]] == [
        ["ReLU", *"00110011", "passes"],
        ["ReLUWithoutMask", *"11110011", "FAILS"],
        ["Sign", *"00000000", "passes"],
        ["StraightThroughSign", *"01100000", "FAILS"],
    ]
    found = "ReLUWithoutMask and StraightThroughSign"
    assert out[-3] == f"   -> gradcheck finds the wrong backwards: {found}"
    assert out[-2] == "   -> at 0.5 and 2 alone ReLUWithoutMask passes"
    assert out[-1] == "   -> at 0, where it has a kink, ReLU fails: backward 0, difference 0.5"


def test_a_sign_keeps_nothing_for_backward_and_its_wrong_twin_keeps_x(lesson):
    x = torch.randn(3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lesson.sign(x)
        assert kept == []
        lesson.straight_through(x)
    assert len(kept) == 1 and torch.equal(kept[0], x)


@pytest.mark.parametrize("seed", range(3))
def test_the_third_table(lesson, capsys, seed):
    torch.manual_seed(seed)
    measured = lesson.show_affine()
    assert list(measured["off"]) == ["x", "W", "b"] and measured["passed"] is True
    assert max(measured["off"].values()) < 1e-5
    out = lines(capsys)
    torch.manual_seed(seed)
    x, W, _, g = (torch.randn(s) for s in ((5, 3), (4, 3), (4,), (5, 4)))
    first = [f"{t.flatten()[0]:.4f}" for t in (g @ W, g.T @ x, g.sum(0))]
    for line, name, number in zip(out[2:5], "xWb", first, strict=True):
        cells = line.split()
        assert (cells[0], *cells[-3:-1]) == (name, number, number)
        assert cells[-1] == f"{measured['off'][name]:.0e}"
    assert out[-1] == "   -> gradcheck passes"


def test_a_wrong_affine_is_told(lesson, capsys, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(lesson, "affine", lambda x, W, b: F.linear(2 * x, W, b))
    measured = lesson.show_affine()
    assert max(measured["off"].values()) > 0.1 and measured["passed"] is True
    assert f"{measured['off']['x']:.0e}" in lines(capsys)[2]
    monkeypatch.setattr(lesson, "affine", lambda x, W, b: lesson.ReLUWithoutMask.apply(x @ W.T + b))
    assert lesson.show_affine()["passed"] is False
    assert lines(capsys)[-1] == "   -> gradcheck FAILS"


def test_an_affine_that_forgets_g_is_told(lesson, monkeypatch):
    class Forgets(lesson.Affine):
        @staticmethod
        def backward(ctx, g):
            return Affine.backward(ctx, torch.ones_like(g))

    torch.manual_seed(0)
    Affine = lesson.Affine
    monkeypatch.setattr(lesson, "Affine", Forgets)
    assert min(lesson.show_affine()["off"].values()) > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2, 104])
def test_the_wrong_backward_reaches_wrong_points_that_are_near_the_threshold(lesson, seed):
    torch.manual_seed(seed)
    (x, y), params = lesson.xor_data(256), lesson.init_params()
    z = lesson.network(params, 4 * x, torch.relu, nn.Identity())
    wrong = torch.where(z < 0, -1, 1) != y
    near = wrong & (z.abs() < 1)
    assert 0.1 < near.sum() / wrong.sum() < 0.9  # some of the wrong points are far, some are not
    for f, reached in ((lesson.sign, wrong & False), (lesson.straight_through, near)):
        (dz,) = lesson.gradients(lambda z, f=f: lesson.squared_loss(f(z), y), z)
        assert torch.equal(dz != 0, reached)


def test_far_from_the_threshold_even_the_lie_moves_nothing(lesson):
    torch.manual_seed(0)
    (x, y), (W1, b1, W2, _) = lesson.xor_data(64), lesson.init_params()
    far = W1, b1, W2, torch.tensor([1e3])
    errors, after = lesson.train(far, x, y, lesson.relu, lesson.straight_through, 10, 0.02)
    assert errors[0] == errors[-1] > 0.2
    assert all(torch.equal(p, q) for p, q in zip(far, after, strict=True))


def test_train_leaves_its_starting_weights_alone_and_is_adam(lesson):
    torch.manual_seed(0)
    (x, y), params = lesson.xor_data(64), lesson.init_params(H=8)
    kept = [p.clone() for p in params]
    errors, after = lesson.train(params, x, y, lesson.relu, lesson.straight_through, 3, 0.05)
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    twin = [p.clone().requires_grad_() for p in kept]
    optimizer, expected = torch.optim.Adam(twin, 0.05), []
    for _ in range(3):
        out = lesson.network(twin, x, lesson.relu, lesson.straight_through)
        expected.append((out != y).float().mean().item())
        optimizer.zero_grad()
        ((out - y) ** 2).mean().div(4).backward()
        optimizer.step()
    out = lesson.network(twin, x, lesson.relu, lesson.straight_through)
    assert errors == [*expected, (out != y).float().mean().item()]
    for p, q in zip(after, twin, strict=True):
        torch.testing.assert_close(p, q.detach())


def test_a_plain_comparison_has_no_gradient_to_give(lesson):
    (x, y), params = lesson.xor_data(8), lesson.init_params()
    compare = lambda z: (z >= 0).float() * 2 - 1  # noqa: E731
    with pytest.raises(RuntimeError, match="does not require grad"):
        lesson.train(params, x, y, nn.ReLU(), compare, 1, 0.02)


def test_a_region_is_light_where_the_network_says_one(lesson):
    one_side = torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.ones(1, 1), torch.tensor([-0.5])
    right = lesson.region(one_side, torch.relu, side=8)  # +1 where x[0] >= 0.5
    assert right.shape == (1, 8, 8)
    assert (right[0, :, 6:] > 0.5).all() and (right[0, :, :6] < 0.5).all()
    top = torch.tensor([[0.0, 1.0]]), torch.zeros(1), torch.ones(1, 1), torch.tensor([-0.5])
    up = lesson.region(top, torch.relu, side=8)
    assert (up[0, :2] > 0.5).all() and (up[0, 2:] < 0.5).all()
    assert torch.equal(right.unique(), torch.tensor([0.25, 0.85]))


RUNS = ["no_sign", "true_gradient", "straight_through", "opposite", "sign_within"]


@pytest.mark.parametrize("seed", [0, 1, 104])
def test_main_learns_xor_by_the_lie_alone(lesson, tmp_path, events, capsys, monkeypatch, seed):
    rows = {}

    def row(title, pictures, words):
        rows.update(zip(words, pictures, strict=True))
        return np.zeros((3, 4, 4), np.uint8)

    monkeypatch.setattr(lesson, "caption_row", row)
    measured = lesson.main(seed=seed, log_dir=tmp_path, count=128, **FEW)
    assert measured["everyday"]["passed"] and len(measured["checked"]) == 6
    assert measured["affine"]["passed"]
    trained = measured["trained"]
    assert list(trained) == RUNS
    errors = {run: errors for run, (errors, _) in trained.items()}
    assert errors["straight_through"][0] > 0.25 > 0.06 > errors["straight_through"][-1]
    assert set(errors["true_gradient"]) == {errors["straight_through"][0]}
    assert errors["opposite"][0] == errors["straight_through"][0]
    assert errors["no_sign"][0] == errors["straight_through"][0]
    assert min(errors["opposite"]) > 0.2 and errors["no_sign"][-1] < 0.08
    assert errors["sign_within"][-1] < 0.15
    assert {run: moved for run, (_, moved) in trained.items()} == {
        "no_sign": "W1 b1 W2 b2",
        "true_gradient": "nothing",
        "straight_through": "W1 b1 W2 b2",
        "opposite": "W1 b1 W2 b2",
        "sign_within": "W2 b2",
    }
    out = lines(capsys)
    assert [line[0] for line in out if line[0].isdigit()] == list("1234")
    for line, run in zip(out[-10:-5], RUNS, strict=True):
        first, last = errors[run][0], errors[run][-1]
        assert line.split()[0] == run and f"   {first:.3f}   {last:.3f}   " in line
        assert line.endswith(trained[run][1])
    assert [line.split()[2] for line in out[-10:-5]] == [
        "none", "Sign", "StraightThroughSign", "OppositeSign", "none"]  # fmt: skip
    last = {run: f"{errors[run][-1]:.1%}" for run in RUNS}
    assert out[-5] == (
        f"   -> behind an output Sign: {last['straight_through']} errors by StraightThroughSign, "
        f"{last['true_gradient']} by the true gradient"
    )
    assert out[-4].endswith(f"in the other direction, ends with {last['opposite']} errors")
    assert out[-3] == f"   -> without a Sign the true gradient ends with {last['no_sign']} errors"
    assert out[-2] == (
        f"   -> a Sign in the middle lets W2 b2 change, which ends with {last['sign_within']}"
    )
    assert out[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")
    assert {path.name for path in tmp_path.iterdir()} == {*RUNS, "regions"}
    for run in RUNS:
        scalars = events(tmp_path / run).Scalars("train/error")
        assert [event.step for event in scalars] == list(range(61))
        assert [event.value for event in scalars] == pytest.approx(errors[run])
    (picture,) = events(tmp_path / "regions").Images("regions/after_training")
    assert picture.step == 60
    assert list(rows) == [f"{run}\nerror {errors[run][-1]:.3f}" for run in RUNS]
    learned = rows[f"straight_through\nerror {errors['straight_through'][-1]:.3f}"][0]
    corners = [learned[20, 20], learned[20, -20], learned[-20, 20], learned[-20, -20]]
    assert [value.item() > 0.5 for value in corners] == [False, True, True, False]


def test_what_is_printed_last_is_the_last_step(lesson, tmp_path, capsys, monkeypatch):
    right = lesson.train
    monkeypatch.setattr(lesson, "train", lambda *args: ([0.75, 0.5, 0.25], right(*args)[1]))
    trained = lesson.main(log_dir=tmp_path, count=16, steps=3)["trained"]
    assert trained["opposite"][0] == [0.75, 0.5, 0.25]
    out = lines(capsys)
    assert out[-5].endswith("25.0% errors by StraightThroughSign, 25.0% by the true gradient")
    assert all("   0.750   0.250   " in line for line in out[-10:-5])


def test_a_second_run_in_the_same_folder_replaces_the_first(lesson, tmp_path, events):
    for _ in range(2):
        lesson.main(log_dir=tmp_path, count=16, steps=3)
    assert len(events(tmp_path / "sign_within").Scalars("train/error")) == 4
