import pytest
import torch
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_seq.py")


def test_sequential_calls_one_layer_after_the_other(lesson):
    torch.manual_seed(0)
    net, x = lesson.conv_pool_linear(), torch.randn(2, 3, 32, 32)
    h = x
    for layer in net:
        h = layer(h)
    assert torch.equal(net(x), h) and h.shape == (2, 10)
    assert isinstance(net[:4], nn.Sequential) and torch.equal(net[4:](net[:4](x)), h)


def test_the_written_out_form_is_the_network_in_functions(lesson):
    torch.manual_seed(0)
    net, x = lesson.ConvPoolLinear().double(), torch.randn(2, 3, 32, 32).double()
    h = x
    for conv in (net.conv1, net.conv2, net.conv3):
        h = nn.functional.conv2d(h, conv.weight, conv.bias, padding=1).clamp(min=0)
        h = h.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    h = h.reshape(2, 512) @ net.linear.weight.T + net.linear.bias
    torch.testing.assert_close(net(x), h)


def test_names_are_the_keys_of_the_state_dict(lesson):
    net, by_hand = lesson.conv_pool_linear(), lesson.ConvPoolLinear()
    assert net.state_dict().keys() == by_hand.state_dict().keys()
    nameless = nn.Sequential(*net)
    with pytest.raises(RuntimeError, match="Missing key"):
        nameless.load_state_dict(by_hand.state_dict())


@pytest.mark.parametrize(
    "layers, unit, field",
    [
        ([nn.Conv2d(1, 2, 5)], 0, (0, 5)),
        ([nn.Conv2d(1, 2, 5, stride=3, padding=1)], 4, (11, 5)),
        ([nn.Conv2d(1, 2, 5), nn.Conv2d(2, 2, 3, dilation=4, padding=2)], 7, (5, 13)),
        ([nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)], 2, (8, 7)),
        ([nn.MaxPool2d(2), nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2)], 2, (6, 8)),
    ],
)
def test_the_field_by_formula_is_the_field_by_gradient(lesson, layers, unit, field):
    torch.manual_seed(0)
    net = nn.Sequential(*layers)
    for layer in net:  # made when the tests were collected: by what random numbers, nobody knows
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    heat = lesson.gradient_map(net, unit, torch.randn(256, 1, 30, 30))
    assert lesson.field_by_formula(net, unit) == lesson.field_by_gradient(heat) == field


def test_pixels_outside_the_field_do_not_matter_and_those_inside_do(lesson):
    torch.manual_seed(0)
    net, x = lesson.conv_pool_linear()[:6], torch.randn(64, 3, 32, 32)
    first, size = lesson.field_by_formula(net, 4)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[first : first + size, first : first + size] = True
    y, noise = net(x)[:, :, 4, 4], torch.randn_like(x)
    assert torch.equal(net(x + noise * ~inside)[:, :, 4, 4], y)
    assert not torch.equal(net(x + noise * inside)[:, :, 4, 4], y)


@pytest.mark.parametrize("holes", [[(1, 1)], [(0, 0), (0, 1), (0, 2)]])
def test_a_field_that_is_no_square_is_refused(lesson, holes):
    heat = torch.zeros(8, 8)
    heat[2:5, 2:5] = 1
    assert lesson.field_by_gradient(heat) == (2, 3)
    for row, column in holes:
        heat[2 + row, 2 + column] = 0
    with pytest.raises(ValueError, match="no full square"):
        lesson.field_by_gradient(heat)


def test_an_even_gradient_has_no_middle_that_counts_more(lesson):
    heat = torch.zeros(32, 32)
    heat[5:27, 5:27] = 1
    area, share = lesson.middle_share(heat, 5, 22)
    assert share == pytest.approx(area) == (12 / 22) ** 2


def test_try_dilation_2_in_conv3_widens_the_field_of_pool3_to_30(lesson):
    torch.manual_seed(0)
    net, x = lesson.conv_pool_linear(), torch.randn(64, 3, 48, 48)
    assert lesson.receptive_field(net[:9], x)[1] == 22
    net.conv3 = nn.Conv2d(16, 32, 3, padding=2, dilation=2)
    assert lesson.receptive_field(net[:9], x)[1] == 30
    assert net(x[..., :32, :32]).shape == (64, 10)


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_both_forms_equal_and_the_fields_of_the_formula(lesson, events, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, batch=32)
    assert measured["before"] > 0.1
    assert measured["fields"]["conv3"] == (9, 18) and measured["fields"]["pool3"] == (9, 22)
    assert measured["sizes"] == {"with pools": [3, 8, 18], "without pools": [3, 5, 7]}
    assert measured["share"] > 0.4
    for run in ("sequential", "by_hand"):
        assert events(tmp_path / run).Tags()["graph"]
    assert len(events(tmp_path / "sequential").Tags()["images"]) == 9
