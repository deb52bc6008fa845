import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap


@pytest.fixture
def lesson(load):
    return load("07_custom_autograd_function.py")


def vjp(f, g, *inputs):
    """f's output, and the gradients that a cotangent g gives."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, g)


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
    assert lesson.verdicts(lesson.affine, *inputs) == (True, True)
    assert lesson.verdicts(Broken.apply, *inputs)[0] is False


def test_without_needs_input_grad_unwanted_products_are_computed_all_the_same(lesson):
    class Careless(lesson.Affine):
        @staticmethod
        def backward(ctx, g):
            x, W = ctx.saved_tensors
            return g @ W, g.T @ x, g.sum(0)

    inputs = {"x": torch.randn(3, 7), "W": torch.randn(2, 7), "b": torch.randn(2)}
    for wanted, theory in {"x": 1, "W": 1, "b": 0, "xW": 2}.items():
        assert lesson.backward_products(lesson.affine, inputs, wanted) == theory
        assert lesson.backward_products(Careless.apply, inputs, wanted) == 2


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


def test_per_sample_gradients_average_to_the_batch_gradient(lesson):
    torch.manual_seed(0)
    (x, y), params = lesson.xor_data(37), lesson.init_params(H=5)
    functions = lesson.relu, lesson.straight_through
    batch = lesson.loss_gradients(params, x, y, *functions)
    samples = lesson.per_sample_gradients(params, x, y, *functions)
    assert any(gradient.abs().max() > 0.01 for gradient in batch)
    for each, mean in zip(samples, batch, strict=True):
        assert each.shape == (37, *mean.shape)
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


def test_far_from_the_threshold_even_the_lie_moves_nothing(lesson):
    torch.manual_seed(0)
    (x, y), (W1, b1, W2, _) = lesson.xor_data(64), lesson.init_params()
    far = W1, b1, W2, torch.tensor([1e3])
    errors, changed = lesson.train(far, x, y, lesson.relu, lesson.straight_through, 10, 0.02)
    assert errors[0] == errors[-1] > 0.2
    assert changed == [False] * 4


def test_a_plain_comparison_has_no_gradient_to_give(lesson):
    (x, y), params = lesson.xor_data(8), lesson.init_params()
    compare = lambda z: (z >= 0).float() * 2 - 1  # noqa: E731
    with pytest.raises(RuntimeError, match="does not require grad"):
        lesson.train(params, x, y, nn.ReLU(), compare, 1, 0.02)


@pytest.mark.parametrize("seed", range(3))
def test_main_learns_xor_by_the_lie_alone(lesson, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, count=128, steps=150)
    assert measured["checked"] == {
        "ReLU": (True, True),
        "ReLU at 0, its kink": (False, False),
        "ReLUWithoutMask": (False, True),
        "Affine": (True, True),
        "Sign": (True, True),
        "StraightThroughSign": (False, True),
    }
    assert measured["products"] == {"xWb": 2, "Wb": 1, "x": 1, "b": 0}
    reached = measured["reached"]
    assert reached["Sign"] == 0 < reached["StraightThroughSign"] == reached["in_reach"]
    trained = measured["trained"]
    errors = {run: errors for run, (errors, _) in trained.items()}
    assert errors["straight_through"][0] > 0.3 > 0.03 > errors["straight_through"][-1]
    assert set(errors["true_gradient"]) == {errors["straight_through"][0]}
    assert errors["straight_through"][-1] < errors["layer_behind"][-1] < 0.15
    assert {run: changed for run, (_, changed) in trained.items()} == {
        "straight_through": [True] * 4,
        "true_gradient": [False] * 4,
        "layer_behind": [False, False, True, True],
    }
    assert {path.name for path in tmp_path.iterdir()} == set(trained)
