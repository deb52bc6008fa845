import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from support.pictures import caption_row

NAMES = ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "pool3"]
FIELDS = [(23, 3), (23, 3), (23, 4), (21, 8), (21, 8), (21, 10), (17, 18), (17, 18), (17, 22)]


@pytest.fixture
def lesson(load):
    return load("nn_seq.py")


# --- both forms --------------------------------------------------------------------------------


def test_sequential_calls_one_layer_after_the_other(lesson):
    torch.manual_seed(0)
    net, x = lesson.conv_pool_linear(), torch.randn(2, 3, 32, 32)
    h = x
    for layer in net:
        h = layer(h)
    assert torch.equal(net(x), h) and h.shape == (2, 10)
    assert isinstance(net[:4], nn.Sequential) and torch.equal(net[4:](net[:4](x)), h)


def test_the_sequential_has_the_layers_that_its_docstring_names(lesson):
    net = lesson.conv_pool_linear()
    assert [name for name, _ in net.named_children()] == [*NAMES, "flatten", "linear"]
    kinds = [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 3 + [nn.Flatten, nn.Linear]
    assert [type(layer) for layer in net] == kinds
    assert [tuple(p.shape) for p in net.parameters() if p.dim() > 1] == [
        (8, 3, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (10, 512)]  # fmt: skip


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


def test_gradients_are_those_of_the_sum_of_squares(lesson):
    net, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
    (grad,) = lesson.gradients(net, x)
    torch.testing.assert_close(grad, 2 * net.weight.detach() * 5)


# --- receptive fields --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, expected",
    [
        (nn.Conv2d(1, 2, 5, stride=3, padding=1), (5, 3, 1)),
        (nn.Conv2d(1, 2, (3, 7), dilation=(4, 1), padding=(2, 0)), (9, 1, 2)),
        (nn.MaxPool2d(2), (2, 2, 0)),
        (nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0), dilation=2), (5, 1, 1)),
        (nn.AvgPool2d(3, 2, padding=1), (3, 2, 1)),
        (nn.AvgPool2d((4, 2)), (4, 4, 0)),
        (nn.ReLU(), (1, 1, 0)),
        (nn.BatchNorm2d(3), (1, 1, 0)),
    ],
)
def test_the_window_of_a_layer(lesson, layer, expected):
    assert lesson.window(layer) == expected


@pytest.mark.parametrize(
    "layers, unit, field",
    [
        ([nn.Conv2d(1, 2, 5)], 0, (0, 5)),
        ([nn.Conv2d(1, 2, 5, stride=3, padding=1)], 4, (11, 5)),
        ([nn.Conv2d(1, 2, 5), nn.Conv2d(2, 2, 3, dilation=4, padding=2)], 7, (5, 13)),
        ([nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)], 2, (8, 7)),
        ([nn.MaxPool2d(2), nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2)], 2, (6, 8)),
        ([nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, stride=2, padding=1)], 4, (7, 5)),
        ([nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Conv2d(2, 2, 3)], 3, (6, 8)),
        ([nn.MaxPool2d(3, stride=1), nn.AvgPool2d((2, 2), padding=(1, 1))], 5, (9, 4)),
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


def test_a_dilated_pool_leaves_holes_in_a_field_of_the_size_by_formula(lesson):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, 1, dilation=3))
    assert lesson.field_by_formula(net, 0) == (0, 6)
    heat = lesson.gradient_map(net, 0, torch.randn(256, 1, 12, 12))
    assert lesson.field_by_gradient(heat) == (0, 6)  # 3 wide at each of two places, 3 apart


def test_the_map_is_the_mean_of_the_absolute_gradients(lesson):
    weight = torch.tensor([[[[1.0, -2.0], [0.0, 4.0]], [[-3.0, 2.0], [0.0, -4.0]]]])
    net = nn.Conv2d(2, 1, 2, bias=False)
    net.weight = nn.Parameter(weight)
    heat = lesson.gradient_map(net, 1, torch.randn(5, 2, 4, 4))
    expected = torch.zeros(4, 4)
    expected[1:3, 1:3] = torch.tensor([[2.0, 2.0], [0.0, 4.0]])
    torch.testing.assert_close(heat, expected)


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


def test_a_square_off_the_diagonal_is_refused(lesson):
    heat = torch.zeros(8, 8)
    heat[1:4, 3:6] = 1
    with pytest.raises(ValueError, match=r"9 pixels from \[1, 3\] to \[3, 5\] are no full square"):
        lesson.field_by_gradient(heat)


@pytest.mark.parametrize("seed", range(5))
def test_the_middle_of_a_field_counts_most(lesson, seed):
    torch.manual_seed(seed)
    first, size, heat = lesson.receptive_field(lesson.conv_pool_linear()[:9],
                                               torch.randn(48, 3, 48, 48))  # fmt: skip
    assert (first, size) == (17, 22)
    middle = heat[first + 5 : first + 17, first + 5 : first + 17].sum() / heat.sum()
    assert middle > 1.3 * (12 / 22) ** 2  # an even gradient would give it its share of the area


def test_the_frame_lies_around_the_field(lesson):
    heat = torch.zeros(9, 9)
    heat[3:6, 3:6] = torch.arange(2.0, 11).view(3, 3)
    picture = lesson.framed(heat, 3, 3)
    assert picture.shape == (3, 9, 9)
    torch.testing.assert_close(picture[:, 3:6, 3:6], (heat[3:6, 3:6] / 10).expand(3, -1, -1))
    red = (picture[0] == 1) & (picture[1:] == 0).all(0)
    ring = torch.zeros(9, 9, dtype=torch.bool)
    ring[2:7, 2:7] = True
    ring[3:6, 3:6] = False
    assert torch.equal(red, ring)
    assert picture[:, ~ring].sum().item() == pytest.approx(heat.sum().item() / 10 * 3)


# --- the lesson --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_try_dilation_2_in_conv3_widens_pool3s_field_to_30(lesson, edited, tmp_path, capsys, seed):
    first = "    net = conv_pool_linear()[:9]  # without flatten and linear\n"
    added = "    net.conv3 = nn.Conv2d(16, 32, 3, padding=2, dilation=2)\n"
    changed = edited(lesson, first, first + added)
    fields = changed.main(seed=seed, log_dir=tmp_path, batch=32)["fields"]
    sizes = [size for _, size in FIELDS[:6]] + [26, 26, 30]
    assert fields.keys() == set(NAMES) and [size for _, size in fields.values()] == sizes
    out = capsys.readouterr().out
    assert (
        "   conv3    10 + (5 - 1) * 4 = 26   " in out
        and "   pool3    26 + (2 - 1) * 4 = 30   " in out
    )
    assert "-> 9 of 9 fields are as the rule says; behind pool3 a unit sees 30 of" in out


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_what_it_measures(lesson, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, batch=32)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][:-1] == ["1.", "2.", "3.", "4."]
    assert sum("   -> " in line for line in lines) == 4

    assert measured["everyday"] == (0, 2048, (4, 10))
    assert [" ".join(line.split()) for line in lines[2:7]] == [
        "0 Conv2d (4, 8, 32, 32) 224", "1 ReLU (4, 8, 32, 32) 0", "2 MaxPool2d (4, 8, 16, 16) 0",
        "3 Flatten (4, 2048) 0", "4 Linear (4, 10) 20,490"]  # fmt: skip
    assert "   -> the layers one by one give what net(images) gives: largest difference 0;\n" in out
    assert "      Linear must take the 2,048 numbers of an image that Flatten gives\n" in out

    own, same = measured["same"].values()
    assert own[0] > 0.1 and own[1] == 0 and same == (0, 8)
    assert f"   each net its own   {own[0]:33.2g}            0 of 8\n" in out
    assert f"   the same           {0:33}            8 of 8\n" in out
    assert "-> with the same weights outputs differ by 0; 8 of 8 gradients are equal bit" in out

    assert measured["fields"] == dict(zip(NAMES, FIELDS, strict=True))
    assert "   pixels by the rule   pixels with a gradient in 32 images\n" in out
    steps = ["1 + (3 - 1) * 1 = 3", "3 + (1 - 1) * 1 = 3", "3 + (2 - 1) * 1 = 4",
             "4 + (3 - 1) * 2 = 8", "8 + (1 - 1) * 2 = 8", "8 + (2 - 1) * 2 = 10",
             "10 + (3 - 1) * 4 = 18", "18 + (1 - 1) * 4 = 18", "18 + (2 - 1) * 4 = 22"]  # fmt: skip
    for name, step, (start, size) in zip(NAMES, steps, FIELDS, strict=True):
        pixels = f"{start} to {start + size - 1}"
        assert f"   {name}    {step:<21}   {pixels:>18}   {pixels:>36}\n" in out
    legend = "   k: window of the layer; jump: pixels from one unit before the layer to the next\n"
    assert (
        legend + "   -> 9 of 9 fields are as the rule says; behind pool3 a unit sees 22 of" in out
    )

    assert measured["sizes"] == [(3, 3), (8, 5), (18, 7)]
    assert "   convolutions   with pools   without pools\n              1            3     " in out
    assert "\n              3           18               7\n" in out
    assert "-> the third convolution and the pool before it add 10 pixels; without pools it" in out
    assert " pools it adds 2\n" in out  # 10 = 2 by pool2 (8 to 10) and 8 by conv3 (10 to 18)
    assert lines[-1].startswith(f"look: tensorboard --logdir {tmp_path}   http://localhost:6006/?")


def test_a_rule_that_is_wrong_is_not_said_to_hold(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "field_by_formula", lambda layers, unit: (28, 3))
    with pytest.raises(AssertionError):
        lesson.show_fields(tmp_path, torch.randn(2, 3, 48, 48))


def test_the_graphs_and_the_fields_are_logged(lesson, events, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(lesson, "caption_row", lambda *row: rows.append(row) or caption_row(*row))
    lesson.main(log_dir=tmp_path, batch=32)
    for run, kind in {"sequential": "Sequential", "by_hand": "ConvPoolLinear"}.items():
        logged = events(tmp_path / run)
        assert any(node.name.startswith(f"{kind}/") for node in logged.Graph().node)
    (event,) = events(tmp_path / "sequential").Images("receptive_field/by_layer")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)
    ((title, pictures, words, height),) = rows
    assert "light is large" in title and height == 128
    assert np.array_equal(shown, caption_row(title, pictures, words, height))
    fields = [pair for pair in zip(NAMES, FIELDS, strict=True) if "relu" not in pair[0]]
    assert words == [f"{name}\n{size} pixels" for name, (_, size) in fields]
    for picture, (_, (start, size)) in zip(pictures, fields, strict=True):
        field = picture[:, start : start + size, start : start + size]
        assert torch.equal(field[0], field[2]) and field.max() == 1 and field.min() > 0
        ring = picture[:, start - 1 : start + size + 1, start - 1 : start + size + 1]
        assert (picture[1] > 0).sum() == size**2 and (picture[0] > 0).sum() == ring[0].numel()
