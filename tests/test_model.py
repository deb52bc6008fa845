import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def model(load):
    return load("model.py")


# --- the network -------------------------------------------------------------------------------


def test_moli_keeps_its_names_their_order_and_its_numbers(model):
    """Checkpoints of train.py and the seeds of all lessons depend on them."""
    torch.manual_seed(7)
    state = model.Moli().state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = []
    for i in range(3):
        names += [f"features.{i}.0.weight", *(f"features.{i}.2.{name}" for name in norm)]
    names += [f"classifier.{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")]
    assert list(state) == names
    torch.manual_seed(7)  # the layers draw their numbers in the order of the network
    for name, layer in (
        ("features.0.0", nn.Conv2d(3, 32, 5, bias=False)),
        ("features.1.0", nn.Conv2d(32, 32, 5, bias=False)),
        ("features.2.0", nn.Conv2d(32, 64, 5, bias=False)),
        ("classifier.1", nn.Linear(1024, 64)),
        ("classifier.3", nn.Linear(64, 10)),
    ):
        for kind, tensor in layer.state_dict().items():
            assert torch.equal(state[f"{name}.{kind}"], tensor)


def test_moli_is_the_written_out_network(model):
    torch.manual_seed(0)
    moli, x = model.Moli().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    h = x
    for conv, _, norm, _ in moli.features:
        h = F.max_pool2d(F.conv2d(h, conv.weight, padding=2), 2)
        h = h / torch.sqrt(torch.tensor(1 + 1e-5))  # running statistics: mean 0, variance 1
        h = h * torch.sigmoid(h)
        assert norm.momentum == 0.1 and norm.eps == 1e-5
    first, second = moli.classifier[1], moli.classifier[3]
    h = h.reshape(3, 1024) @ first.weight.T + first.bias
    h = h * torch.sigmoid(h)
    torch.testing.assert_close(moli(x), h @ second.weight.T + second.bias)


def test_in_train_the_batch_normalises_and_a_tenth_of_it_is_kept(model):
    torch.manual_seed(0)
    moli, x = model.Moli(), torch.randn(8, 3, 32, 32)
    conv, _, norm, _ = moli.features[0]
    h = F.max_pool2d(F.conv2d(x, conv.weight, padding=2), 2)
    mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3))
    y = moli.features[0](x)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var)
    var = h.var((0, 2, 3), unbiased=False)
    h = (h - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
    torch.testing.assert_close(y, h * torch.sigmoid(h), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 28, 28), (2, 32, 32, 3)])
def test_another_shape_is_refused(model, shape):
    expected = re.escape(f"Moli takes images (B, 3, 32, 32), not {shape}")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        model.Moli()(torch.zeros(shape))


def test_every_parameter_gets_a_gradient(model):
    moli = model.Moli()
    moli(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in moli.parameters())


# --- shapes, parameters, work ------------------------------------------------------------------


def expected_parameters(num_classes, kernel=5):
    blocks = sum(kernel**2 * a * b + 2 * b for a, b in ((3, 32), (32, 32), (32, 64)))
    return blocks + 1024 * 64 + 64 + 64 * num_classes + num_classes


@pytest.mark.parametrize("num_classes", [2, 10, 37])
def test_parameters_by_formula_and_by_count(model, num_classes):
    moli = model.Moli(num_classes)
    count = sum(p.numel() for p in moli.parameters())
    assert count == expected_parameters(num_classes)
    rows = model.trace_shapes(moli.eval(), torch.zeros(1, 3, 32, 32))
    assert sum(row[3] for row in rows) == count and rows[-1][2] == (1, num_classes)


def test_trace_shapes_goes_through_all_layers_and_ends_with_the_logits(model):
    torch.manual_seed(0)
    moli, x = model.Moli(5).eval(), torch.randn(3, 3, 32, 32)
    found, seen = model.layers(moli), []
    assert [name for name, _ in found][:5] == [
        *(f"features.0.{i}" for i in range(4)),
        "features.1.0",
    ]
    assert all(moli.get_submodule(name) is layer for name, layer in found)
    for _, layer in found:
        layer.register_forward_hook(lambda layer, args, out: seen.append((layer, out)))
    moli(x)
    rows = model.trace_shapes(moli, x)
    assert len(rows) == len(found) == 16 and len(seen) == 32
    for i, (name, layer) in enumerate(found):
        assert seen[i][0] is seen[16 + i][0] is layer
        assert torch.equal(seen[i][1], seen[16 + i][1])
        count = sum(p.numel() for p in layer.parameters())
        assert rows[i] == (name, type(layer).__name__, tuple(seen[i][1].shape), count)


def test_a_trace_that_ends_elsewhere_is_told(model, monkeypatch, capsys):
    layers = model.layers
    monkeypatch.setattr(model, "layers", lambda net: layers(net)[:-1])
    model.show_shapes(model.Moli().eval(), torch.zeros(2, 3, 32, 32))
    assert "the last shape is (2, 64), unlike that of model(x)\n" in capsys.readouterr().out


def test_layers_leave_out_what_only_holds_others(model):
    net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh())))
    assert model.layers(net) == [("0", net[0]), ("1.0", net[1][0]), ("1.1.0", net[1][1][0])]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), [3, 3, 4, 6]),
        (nn.BatchNorm2d(7), [2, 7]),
        (nn.Linear(8, 5), [9, 5]),
        (nn.SiLU(), []),
        (nn.MaxPool2d(2), []),
    ],
)
def test_factors_multiply_to_the_number_of_parameters(model, layer, expected):
    assert list(model.factors(layer)) == expected
    assert (model.math.prod(expected) if expected else 0) == sum(
        p.numel() for p in layer.parameters()
    )


@pytest.mark.parametrize(
    ("layer", "size"),
    [(nn.Conv2d(3, 8, 5, padding=1, stride=2), (3, 17, 12)), (nn.Linear(12, 7), (12,))],
)
def test_multiplications_are_half_of_what_torch_counts(model, layer, size):
    x = torch.randn(3, *size)
    with FlopCounterMode(display=False) as counter:
        shape = tuple(layer(x).shape)
    assert model.multiplications(layer, shape) == counter.get_total_flops() / 2 / 3
    assert model.multiplications(nn.SiLU(), shape) == 0


# --- what bends it -----------------------------------------------------------------------------


def test_replace_changes_every_layer_of_a_kind_in_a_copy(model):
    moli = model.Moli()
    changed = model.replace(moli, nn.SiLU, nn.Tanh)
    kinds = [type(layer) for _, layer in model.layers(moli)]
    assert kinds.count(nn.SiLU) == 4
    new = [nn.Tanh if kind is nn.SiLU else kind for kind in kinds]
    assert [type(layer) for _, layer in model.layers(changed)] == new
    made = [layer for _, layer in model.layers(changed) if isinstance(layer, nn.Tanh)]
    assert len(set(map(id, made))) == 4
    for old, copied in zip(moli.parameters(), changed.parameters(), strict=True):
        assert torch.equal(old, copied) and old is not copied


def test_bend_is_0_for_an_affine_map_and_known_for_a_square(model):
    x, y = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([4.0, 3.0, 5.0])
    assert model.bend(lambda v: 3 * v - 7, x, y) == 0
    assert model.bend(torch.square, x, y) == 4  # (x - y)^2 / 4
    assert model.bend(lambda v: -v.square(), x, y) == 4
    assert not isinstance(model.bend(nn.Linear(3, 2), x, y), torch.Tensor)


def test_silu_is_x_times_its_sigmoid(model):
    h = torch.linspace(-6, 6, 7)
    torch.testing.assert_close(model.Moli().classifier[2](h), h * torch.sigmoid(h))
    torch.testing.assert_close(model.block(1, 1)[3](h), h * torch.sigmoid(h))


def test_each_row_of_table_4_is_the_network_that_it_names(model, monkeypatch):
    given = {}
    monkeypatch.setattr(model, "bend", lambda f, x, y: given.setdefault(len(given), f) and 1.0)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    moli = model.Moli().eval()
    model.show_affine(moli, x, x)
    kinds = [{type(m) for m in f.modules()} for f in given.values()]
    bending = [[kind in found for kind in (nn.SiLU, nn.MaxPool2d)] for found in kinds]
    assert bending == [[1, 1], [0, 1], [1, 0], [0, 0], [0, 0]]
    for i, f in given.items():
        pools = [m.kernel_size for m in f.modules() if isinstance(m, nn.AvgPool2d)]
        assert pools == ([2] * 3 if i in (2, 3) else [])
    assert moli.classifier[1].weight.dtype == torch.float32  # a copy was made double


def test_the_two_linear_layers_are_compared_with_and_without_silu(model, monkeypatch):
    torch.manual_seed(0)
    moli, x, z = model.Moli().eval(), torch.randn(2, 3, 32, 32), torch.randn(4, 1024)
    monkeypatch.setattr(torch, "randn", lambda *size: z)
    measured = model.show_affine(moli, x, x)
    _, first, _, second = moli.double().classifier
    h = first(z.double())
    expected = (second(h * torch.sigmoid(h)) - second(h)).abs().max().item()
    assert measured["with_silu"] == pytest.approx(expected, rel=1e-9)
    assert measured["without"] < 1e-12


# --- Try, and the whole run --------------------------------------------------------------------


def test_try_kernel_3_takes_away_16_of_25_parameters_of_the_convolutions(
    model, monkeypatch, capsys
):
    class Small(nn.Conv2d):
        def __init__(self, in_channels, out_channels, kernel_size, padding, bias):
            assert (kernel_size, padding) == (5, 2)
            super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)

    shapes = [row[2] for row in model.trace_shapes(model.Moli(), torch.zeros(2, 3, 32, 32))]
    monkeypatch.setattr(nn, "Conv2d", Small)
    measured = model.main(batch=2)
    assert measured["parameters"] == 95_018 == 145_706 - 50_688 == expected_parameters(10, kernel=3)
    assert measured["agree"] == 16
    assert shapes == [row[2] for row in model.trace_shapes(model.Moli(), torch.zeros(2, 3, 32, 32))]
    out = capsys.readouterr().out
    assert "-> 95,018 parameters; count" in out and "3 * 3 * 32 * 64\n" in out


@pytest.mark.parametrize("seed", range(3))
def test_main_shows_what_the_layers_make_and_what_bends_them(model, capsys, seed):
    measured = model.main(seed=seed, batch=2)
    out = capsys.readouterr().out
    z = measured["logits"]
    p = z.softmax(1)
    torch.manual_seed(seed)
    moli, x = model.Moli(3).eval(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(z, moli(x).detach())
    assert z.shape == (2, 3) and "-> images (2, 3, 32, 32) became logits (2, 3); an" in out
    off = max(abs(v - 1 / 3) for v in p.flatten().tolist())
    assert f"each class a probability at most {off:.3f} from 1 / 3\n" in out and off < 0.1
    for i in range(2):
        numbers = " ".join(f"{v:7.3f}" for v in z[i]) + "   " + " ".join(f"{v:7.3f}" for v in p[i])
        assert f"   {i:5d}   {numbers}   {p[i].argmax():15d}\n" in out

    assert measured["parameters"] == 145_706 and measured["agree"] == 16
    assert "-> 145,706 parameters; count and formula agree in 16 of 16 layers;\n" in out
    assert "the last shape is (2, 10), as that of model(x)\n" in out
    assert "features.1.1   MaxPool2d     (2, 32, 8, 8)             0   0\n" in out
    assert "classifier.1   Linear        (2, 64)              65,600   1025 * 64\n" in out

    assert measured["work"] == measured["torch_work"] == 12_354_176
    assert "features.1.0 Conv2d        25,600    17.6%         6,553,600    53.0%\n" in out
    assert re.search(r"   all batch norms +256 +0\.2% +not counted\n", out)
    assert re.search(r"   sum +145,706 +12,354,176\n", out)
    assert re.search(r"   sum by torch's formula +12,354,176\n", out)
    assert "-> classifier.1 Linear holds 45% of the parameters and does 0.5% of the work\n" in out

    bends = measured["bends"]
    assert bends["neither of them left"] < 1e-12 and bends["one Linear layer"] < 1e-12
    assert min(bends["Moli"], bends["max-pool left, no SiLU"], bends["SiLU left, mean-pool"]) > 2e-5
    assert "-> affine, up to rounding: neither of them left, one Linear layer. Each of" in out
    assert "to keep Moli from that: max-pool, SiLU (the first column is larger without\n" in out
    spread = {name: float(re.search(rf"   {name} .* (\d\S+)\n", out)[1]) for name in bends}
    assert spread["max-pool left, no SiLU"] > 3 * spread["Moli"] > 0
    for name, size in bends.items():
        assert re.search(rf"   {name} +{size:.5f} +\d", out)
    assert measured["without"] < 1e-12 and measured["with_silu"] > 0.05
    assert "z -> W2 (W1 z + b1) + b2 with weights W, biases b, and a single\n" in out
    assert "c = W2 b1 + b2 differ by at most 0.00000; if SiLU is\n" in out
    assert f"      between the two, by up to {measured['with_silu']:.5f}\n" in out
    for head in (
        "1. In everyday code: what comes out for two images? Moli(num_classes=3), untrained",
        "2. What becomes of 2 images? Each layer's output, and its parameters",
        "3. Where are the parameters, and where is the work for one image?",
        "4. Which layers keep Moli from being affine, x -> A x + c? If f is affine, both sides of",
        "   f((x + y) / 2) = (f(x) + f(y)) / 2 are equal for all images x, y",
        "   image   logits                       probabilities            predicted class",
        "   layer          kind          output shape        counted   by formula",
        "   layer                  parameters   of all   multiplications   of all",
        "   network f                largest difference of both sides   largest |f(x) - f(y)|",
    ):
        assert f"{head}\n" in out
