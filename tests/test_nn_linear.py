import pytest
import torch
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_linear.py")


def test_a_linear_layer_by_hand(lesson):
    x = torch.tensor([[1.0, 2, 3], [0, 1, 0]])
    weight, bias = torch.tensor([[1.0, 10, 100], [0, -1, 0]]), torch.tensor([0.5, 7])
    assert lesson.linear(x, weight, bias).tolist() == [[321.5, 5], [10.5, 6]]


@pytest.mark.parametrize("B, n_in, n_out", [(1, 7, 3), (5, 1, 4), (6, 11, 1)])
def test_linear_is_nn_linear_and_its_gradient_too(lesson, B, n_in, n_out):
    torch.manual_seed(0)
    layer, x = nn.Linear(n_in, n_out).double(), torch.randn(B, n_in).double()
    torch.testing.assert_close(lesson.linear(x, layer.weight, layer.bias), layer(x))
    layer(x).square().sum().backward()
    weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    lesson.linear(x, weight, bias).square().sum().backward()
    torch.testing.assert_close(weight.grad, layer.weight.grad)
    torch.testing.assert_close(bias.grad, layer.bias.grad)
    assert sum(p.numel() for p in layer.parameters()) == n_out * n_in + n_out


def test_flatten_puts_each_pixel_where_the_formula_says(lesson):
    C, H, W = 2, 3, 5
    image = torch.arange(C * H * W).view(1, C, H, W)
    row = nn.Flatten()(image)[0].tolist()
    for c in range(C):
        for h in range(H):
            for w in range(W):
                assert row[lesson.flat_index(c, h, w, H, W)] == image[0, c, h, w]


def test_a_row_of_the_output_depends_on_its_own_image_alone(lesson):
    x = torch.randn(4, 6, requires_grad=True)
    lesson.linear(x, torch.randn(3, 6), torch.randn(3))[2].sum().backward()
    assert x.grad.abs().sum(1).ne(0).tolist() == [False, False, True, False]


def test_one_answer_for_the_whole_batch_depends_on_every_image(lesson):
    x = torch.randn(4, 6, requires_grad=True)
    [(n, y)] = lesson.feed(nn.Linear(24, 3), [x], start_dim=0)
    y.sum().backward()
    assert n == 4 and y.shape == (3,)
    assert x.grad.abs().sum(1).ne(0).all()


def test_try_a_linear_layer_on_unflattened_images_takes_each_row_of_pixels(lesson):
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 10), torch.randn(2, 3, 32, 32)
    assert layer(x).shape == (2, 3, 32, 10)
    torch.testing.assert_close(layer(x)[1, 2, 5], layer(x[1, 2, 5]))


def test_shuffling_the_pixels_alone_does_change_the_outcome(lesson):
    torch.manual_seed(0)
    x, labels, order = torch.randn(40, 3072), torch.arange(40) % 10, torch.randperm(3072)
    first, second = nn.Linear(3072, 10), nn.Linear(3072, 10)
    second.load_state_dict(first.state_dict())
    losses = lesson.train(first, x, labels, steps=2)
    others = lesson.train(second, x[:, order], labels, steps=2)
    assert abs(losses[0] - others[0]) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_main_trains_alike_on_shuffled_pixels_and_fails_on_the_last_batch(
    lesson, events, images_root, tmp_path, seed
):
    measured = lesson.main(
        seed=seed, log_dir=tmp_path, root=images_root, count=50, batch_size=20, steps=8
    )
    assert [(n, tuple(y.shape)) for n, y in measured["outputs"]] == [
        (20, (20, 10)),
        (20, (20, 10)),
        (10, (10, 10)),
    ]
    (_, y), _, (n, error) = measured["batch_flattened"]
    assert y.shape == (10,) and n == 10
    assert isinstance(error, RuntimeError)
    assert "30720" in str(error) and "61440" in str(error)

    in_order, shuffled = measured["losses"]["in_order"], measured["losses"]["shuffled"]
    assert in_order == pytest.approx(shuffled, rel=1e-5)
    assert in_order[-1] < in_order[0] - 0.1
    for run in ("in_order", "shuffled"):
        logged = events(tmp_path / run)
        assert [e.value for e in logged.Scalars("train/loss")] == pytest.approx(in_order, rel=1e-5)
        assert set(logged.Tags()["images"]) == {"linear/input", "linear/templates"}
