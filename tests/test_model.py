import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def model(load):
    return load("model.py")


@pytest.mark.parametrize("num_classes", [2, 10, 37])
def test_parameters_by_formula_and_by_count(model, num_classes):
    moli = model.Moli(num_classes)
    assert sum(p.numel() for p in moli.parameters()) == model.expected_parameters(num_classes)


def test_moli_is_the_written_out_network(model):
    torch.manual_seed(0)
    moli, x = model.Moli().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    h = x
    for conv, _, norm, _ in moli.features:
        h = F.max_pool2d(F.conv2d(h, conv.weight, padding=2), 2)
        h = h / torch.sqrt(
            torch.tensor(1 + norm.eps)
        )  # fresh running statistics: mean 0, variance 1
        h = h * torch.sigmoid(h)
    first, second = moli.classifier[1], moli.classifier[3]
    h = h.reshape(3, 1024) @ first.weight.T + first.bias
    h = h * torch.sigmoid(h)
    torch.testing.assert_close(moli(x), h @ second.weight.T + second.bias)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 28, 28), (2, 32, 32, 3)])
def test_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        model.Moli()(torch.zeros(shape))


def test_try_kernel_3_takes_away_16_of_25_parameters_of_the_convolutions(model):
    convs = [m for _, m in model.layers(model.Moli()) if isinstance(m, torch.nn.Conv2d)]
    small = sum(m.in_channels * m.out_channels * 9 for m in convs)
    assert sum(m.weight.numel() for m in convs) - small == 50_688


def test_every_parameter_gets_a_gradient(model):
    moli = model.Moli()
    moli(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in moli.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_main_shows_that_two_linear_layers_are_one(model, seed):
    measured = model.main(seed=seed, batch=2)
    assert measured["parameters"] == 145_706
    assert measured["without"] < 1e-5 < 0.05 < measured["with_silu"]
