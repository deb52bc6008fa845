import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_common_layers.py")


def test_batch_norm_is_the_librarys_and_its_gradient_too(lesson):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(5, 4, 3, 6)).double().requires_grad_()
    mean, var, weight, bias = torch.rand(4, 4).double() + 0.5
    ours = lesson.batch_norm(x, mean, var, weight, bias, eps=0.1)
    torch.testing.assert_close(ours, F.batch_norm(x, mean, var, weight, bias, eps=0.1))

    axes = (0, 2, 3)
    ours = lesson.batch_norm(x, x.mean(axes), x.var(axes, correction=0), weight, bias)
    theirs = F.batch_norm(x, mean, var, weight, bias, training=True)
    torch.testing.assert_close(ours, theirs)
    (g,), (h,) = (torch.autograd.grad(y.pow(3).sum(), x) for y in (ours, theirs))
    torch.testing.assert_close(g, h)


def test_running_statistics_of_batches_that_differ(lesson):
    torch.manual_seed(0)
    norm, momentum = nn.BatchNorm2d(2, momentum=0.3), 0.3
    running_mean, running_var = torch.zeros(2), torch.ones(2)
    for _ in range(4):
        x = torch.randn(3, 2, 2, 2) * 5
        norm(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
        running_mean = lesson.running_statistic(running_mean, mean, momentum, 1)
        running_var = lesson.running_statistic(running_var, var, momentum, 1)
    torch.testing.assert_close(norm.running_mean, running_mean)
    torch.testing.assert_close(norm.running_var, running_var)


def test_one_number_a_channel_has_no_variance():
    norm, x = nn.BatchNorm2d(3), torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(x)
    assert norm.eval()(x).shape == x.shape


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_dropout_keeps_the_mean_and_scales_what_stays(lesson, p):
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 40_000, dtype=torch.float64)
    for y in (lesson.dropout(x, p), F.dropout(x, p)):
        kept = y != 0
        torch.testing.assert_close(y[kept], x[kept] / (1 - p))
        spread = (p * (1 - p) / len(x)) ** 0.5
        assert kept.double().mean().item() == pytest.approx(1 - p, abs=4.5 * spread + 1e-9)


def test_try_two_dropouts_keep_the_mean_and_triple_the_variance():
    torch.manual_seed(0)
    y = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))(torch.ones(100_000))
    assert y.unique().tolist() == [0, 4]
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert y.var().item() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("k, stride", [(1, 1), (2, 2), (3, 1), (4, 3)])
def test_average_pool_is_the_librarys(lesson, k, stride):
    x = torch.randn(2, 3, 11, 6)
    ours = lesson.average_pool(x, k, stride)
    torch.testing.assert_close(ours, nn.AvgPool2d(k, stride)(x))
    assert ours.shape[2] == (11 - k) // stride + 1


@pytest.mark.parametrize("n", [1, 2, 4, 7, 9])
def test_adaptive_average_pool_is_the_librarys(lesson, n):
    x = torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(lesson.adaptive_average_pool(x, n), nn.AdaptiveAvgPool2d(n)(x))


def test_windows_cover_the_axis_and_overlap_only_where_it_does_not_divide(lesson):
    assert lesson.windows(6, 3) == [(0, 2), (2, 4), (4, 6)]
    assert lesson.windows(5, 3) == [(0, 2), (1, 4), (3, 5)]
    assert lesson.windows(2, 3) == [(0, 1), (0, 2), (1, 2)]


def test_embedding_is_a_one_hot_product_and_its_gradient_a_sum_by_token(lesson):
    torch.manual_seed(0)
    layer, tokens = nn.Embedding(7, 3), torch.tensor([[2, 5, 2], [0, 2, 5]])
    y, g = layer(tokens), torch.randn(2, 3, 3)
    torch.testing.assert_close(y, lesson.embed(tokens, layer.weight))
    y.backward(g)
    expected = torch.zeros(7, 3)
    for token, row in zip(tokens.flatten().tolist(), g.flatten(0, 1), strict=True):
        expected[token] += row
    torch.testing.assert_close(layer.weight.grad, expected)
    assert not layer.weight.grad[[1, 3, 4, 6]].any()


def test_padding_idx_stops_the_gradient_and_does_not_hold_the_row_at_zero():
    layer = nn.Embedding(4, 2, padding_idx=1)
    assert not layer.weight[1].any()
    nn.init.ones_(layer.weight)
    layer(torch.tensor([1, 1, 2])).sum().backward()
    assert layer(torch.tensor(1)).tolist() == [1, 1]
    assert layer.weight.grad.tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("token", [4, -1])
def test_a_token_outside_the_table_is_refused(lesson, token):
    layer = nn.Embedding(4, 2)
    with pytest.raises(IndexError):
        layer(torch.tensor([token]))
    with pytest.raises(RuntimeError):
        lesson.embed(torch.tensor([token]), layer.weight)


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_the_two_layers_that_know_a_mode(lesson, events, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, batches=40, masks=20_000)
    assert measured["company"]["eval"] < 1e-5 < 0.02 < measured["company"]["train"]
    slow, fast = measured["behind"][0.1], measured["behind"][0.5]
    assert slow[0] > 3 and slow[-1] < 0.5 and fast[-1] < 0.02
    for p, forms in measured["dropped"].items():
        variance = p / (1 - p)
        for mean, var in forms.values():
            assert mean == pytest.approx(1, abs=4.5 * (variance / 20_000) ** 0.5)
            assert var == pytest.approx(variance, rel=0.1)
    assert measured["adaptive"] == [0.5, 2, 3.5]
    assert measured["gradients"] == {None: [0, 3, 0, 1, 0, 2], 5: [0, 3, 0, 1, 0, 0]}
    differ = {name for name, difference in measured["modes"].items() if difference > 1}
    assert differ == {"BatchNorm2d", "Dropout"}
    assert sum(difference == 0 for difference in measured["modes"].values()) == 4

    curve = events(tmp_path / "momentum_0.1").Scalars("batchnorm/running_mean")
    assert len(curve) == 40 and curve[-1].value == pytest.approx(5, abs=0.5)
    assert len(events(tmp_path / "p_0.8").Scalars("dropout/mean")) == 100
