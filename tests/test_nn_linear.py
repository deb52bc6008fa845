import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_linear.py")


def rows_of(out, start):
    """The words of each printed line that begins with `start`."""
    return [line.split() for line in out.splitlines() if line.strip().startswith(start)]


def picture(event):
    """The logged picture (3, H, W)."""
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).transpose(2, 0, 1)


# --- in everyday code --------------------------------------------------------------------------


def test_the_everyday_layer_gives_what_its_weights_say(lesson, capsys):
    assert lesson.show_everyday() == [[0.5, 115], [6.5, 151]]
    out = capsys.readouterr().out
    numbers = ["0.5", "115.0", "0.5", "115.0"]
    row = "    0  1  2  3  4  5          0.5  115.0                 0.5                 115.0\n"
    assert row in out
    assert rows_of(out, "0 ") == [["0", "1", "2", "3", "4", "5", *numbers]]
    assert rows_of(out, "6 ")[0][-4:] == ["6.5", "151.0", "6.5", "151.0"]
    assert "not flattened: mat1 and mat2 shapes cannot be multiplied (4x3 and 6x2)" in out
    assert "-> y equals the sums by hand beside it, within 0\n" in out


def test_flatten_puts_each_pixel_where_the_formula_says(lesson):
    C, H, W = 2, 3, 5
    image = torch.arange(C * H * W).view(1, C, H, W)
    row = nn.Flatten()(image)[0].tolist()
    for c in range(C):
        for h in range(H):
            for w in range(W):
                assert row[lesson.flat_index(c, h, w, H, W)] == image[0, c, h, w]


def test_a_wrong_place_stops_the_lesson(lesson, monkeypatch, capsys):
    images = torch.arange(2 * 3072).view(2, 3, 32, 32)
    assert lesson.show_places(images) == [1, 32, 1024]
    out = capsys.readouterr().out
    assert rows_of(out, "next channel") == [["next", "channel", "(1,", "0,", "0)", "1,024"]]
    assert "-> place (32 c + h) 32 + w is right for 3,072 of 3,072 pixels\n" in out
    monkeypatch.setattr(lesson, "flat_index", lambda c, h, w, H, W: (c * H + w) * W + h)
    with pytest.raises(AssertionError):
        lesson.show_places(images)
    assert "is right for 96 of 3,072 pixels\n" in capsys.readouterr().out  # where h = w


# --- by hand -----------------------------------------------------------------------------------


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


def test_the_product_is_compared_and_printed(lesson, monkeypatch, capsys):
    torch.manual_seed(0)
    x = torch.rand(4, 3072) - 0.5
    layer, off = lesson.show_by_hand(x)
    assert off < 1e-6
    out = capsys.readouterr().out
    for i in range(3):
        y = layer(x)[i, 0].item()
        ((image, theirs, ours),) = rows_of(out, f"{i} ")
        assert image == str(i) and float(theirs) == pytest.approx(y, abs=2e-6)
        assert float(ours) == pytest.approx(y, abs=2e-6)
    assert rows_of(out, "3 ") == []  # three images are shown
    assert f"differ by at most {off:.0e}, over all outputs of 4 images. nn.Linear(3072" in out
    assert "\n      30,730 parameters: 10 * 3072 weights and 10 biases\n" in out
    linear = lesson.linear
    monkeypatch.setattr(
        lesson, "linear", lambda x, w, b: linear(x, w, b) + F.one_hot(b.argmax(), 10) / 99
    )
    with pytest.raises(AssertionError):
        lesson.show_by_hand(x)


# --- which axes are flattened ------------------------------------------------------------------


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


def test_batches_give_what_the_whole_set_gives_and_a_refused_one_stops_none(lesson):
    torch.manual_seed(0)
    layer, images = nn.Linear(12, 3), torch.randn(7, 3, 2, 2)
    fed = lesson.feed(layer, images.split(3), start_dim=1)
    assert [n for n, _ in fed] == [3, 3, 1]
    torch.testing.assert_close(torch.cat([y for _, y in fed]), layer(images.flatten(1)))
    (n, error), (m, y) = lesson.feed(layer, [images[:2], images[3:4]], start_dim=0)
    assert (n, m) == (2, 1) and isinstance(error, RuntimeError) and "24" in str(error)
    torch.testing.assert_close(y, layer(images[3].flatten()))


def test_try_a_layer_on_one_channel_takes_each_channel_for_a_sample(
    lesson, edited, images_root, tmp_path, capsys
):
    reader = edited(lesson, "(1, nn.Linear(3072, 10))", "(2, nn.Linear(1024, 10))")
    reader.main(log_dir=tmp_path, root=images_root, count=100, steps=2)
    row = ["2", "nn.Linear(1024,", "10)", "10,250"]
    row += ["64", "->", "(64,", "3,", "10),", "36", "->", "(36,", "3,", "10)"]
    assert row in rows_of(out := capsys.readouterr().out, "2 ")
    assert "look: " in out
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 10), torch.randn(2, 3, 32, 32)  # not flattened: each row of pixels
    torch.testing.assert_close(layer(x)[1, 2, 5], layer(x[1, 2, 5]))


# --- shuffled pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.02, 0.1])
def test_training_is_plain_descent_on_the_mean_square(lesson, lr):
    torch.manual_seed(0)
    layer, x, targets = nn.Linear(5, 2), torch.randn(6, 5), torch.randn(6, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    losses = lesson.train(layer, x, targets, 3, lr)
    for loss in losses:
        residual = x @ weight.T + bias - targets  # (6, 2)
        assert type(loss) is float and loss == pytest.approx(residual.square().mean().item())
        weight = weight - lr * 2 * residual.T @ x / residual.numel()
        bias = bias - lr * 2 * residual.sum(0) / residual.numel()
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), bias)
    assert len(losses) == 3 and lesson.train(layer, x, targets, 0) == []
    torch.manual_seed(1)
    default, other = nn.Linear(5, 2), nn.Linear(5, 2)
    other.load_state_dict(default.state_dict())
    assert lesson.train(default, x, targets, 2) == lesson.train(other, x, targets, 2, 0.1)


def test_columns_that_do_not_follow_stop_the_lesson(lesson, tmp_path, monkeypatch):
    torch.manual_seed(0)
    x, labels, classes = torch.rand(20, 3072) - 0.5, torch.arange(20) % 10, list("abcdefghij")
    seen = lesson.show_shuffled(tmp_path, nn.Linear(3072, 10), x, labels, classes, 3)
    order, weights = seen["order"], seen["weights"]
    assert sorted(order.tolist()) == list(range(3072))
    torch.testing.assert_close(weights["shuffled"], weights["in_order"][:, order])
    train = lesson.train
    monkeypatch.setattr(lesson, "train", lambda layer, x, *given: train(layer, x + 0.01, *given))
    lesson.show_shuffled(tmp_path / "moved", nn.Linear(3072, 10), x, labels, classes, 3)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    monkeypatch.setattr(
        lesson, "train", lambda layer, x, *given: train(layer, x.cumsum(1) / 99, *given)
    )
    with pytest.raises(AssertionError):  # a layer that knows which pixels are neighbours
        lesson.show_shuffled(tmp_path / "cumsum", nn.Linear(3072, 10), x, labels, classes, 3)


@pytest.mark.parametrize("seed", range(3))
def test_main_trains_alike_on_shuffled_pixels_and_fails_on_the_last_batch(
    lesson, events, images_root, tmp_path, capsys, seed
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
    assert measured["places"] == [1, 32, 1024]

    in_order, shuffled, control = measured["losses"].values()
    assert in_order == pytest.approx(shuffled, rel=1e-5)
    assert in_order[-1] < in_order[0] - 0.01
    assert max(abs(a - b) for a, b in zip(in_order, control, strict=True)) > 3e-4
    assert abs(in_order[-1] - control[-1]) < 0.01  # no order is a better one to learn from

    out = capsys.readouterr().out
    head = ["1", "nn.Linear(3072,", "10)", "30,730"]
    assert [*head, "20", "->", "(20,", "10),", "10", "->", "(10,", "10)"] in rows_of(out, "1 ")
    head = ["0", "nn.Linear(61440,", "10)", "614,410"]
    assert [*head, "20", "->", "(10,),", "10", "->", "refused"] in rows_of(out, "0 ")
    assert f"refused: {error}\n" in out
    for head in (
        "1. How do I put a linear layer behind images? Weights 1 0 0 0 0 0 and 1 1 1 1 1 1\n",
        "   x = images.flatten(1)     y = layer(x)   first pixel + 0.5   sum of pixels + 100\n",
        "2. Where do the neighbours",
        "   neighbour       pixel (c, h, w)   place\n",
        "3. Is nn.Linear x @ weight.T + bias? Output 0 of 10, for the first three images\n",
        "   image     nn.Linear   x @ weight.T + bias\n",
        "4. Flatten from which axis? 50 images in batches of 20\n",
        "   from axis   layer                   parameters   first and last batch -> output\n",
        "5. What if all images are shuffled in one way? Mean square error, 8 steps\n",
        "   run        pixels     columns of     first      last       largest difference from\n",
        "                         the weight     loss       loss       the losses of in_order\n",
        "look: tensorboard --logdir ",
    ):
        assert head in out
    assert "from axis 0 there are 20 times the parameters, and 1 of 3 batches refused" in out
    pixels = ["in", "order"], ["shuffled"], ["shuffled"]
    columns = ["in", "order"], ["shuffled"], ["in", "order"]
    for where, whence, (run, losses) in zip(
        pixels, columns, measured["losses"].items(), strict=True
    ):
        ((*words, first, last, off),) = rows_of(out, f"{run} ")
        assert words == [run, *where, *whence]
        assert (first, last) == (f"{losses[0]:.6f}", f"{losses[-1]:.6f}")
        most = max(abs(a - b) for a, b in zip(losses, in_order, strict=True))
        assert off == (f"{most:.0e}" if most else "0")
    most = max(abs(a - b) for a, b in zip(shuffled, in_order, strict=True))
    weights = measured["weights"]
    apart = (weights["shuffled"] - weights["in_order"][:, measured["order"]]).abs().max().item()
    line = f"the losses differ by {most:.0e}, weights by {apart:.0e}. With columns\n"
    assert f"   -> with columns shuffled alike, {line}      in order it is another start" in out
    assert f", and it ends at {control[-1]:.4f} instead of {in_order[-1]:.4f}\n" in out

    images, _ = lesson.as_tensors(lesson.open_images(images_root, False))
    x = (images[:50] / 255 - 0.5).flatten(1)
    order = measured["order"]
    logged = {run: events(tmp_path / run) for run in ("in_order", "shuffled")}
    for run, columns in (("in_order", torch.arange(3072)), ("shuffled", order)):
        values = [e.value for e in logged[run].Scalars("train/loss")]
        assert values == pytest.approx(measured["losses"][run])
        shown = x[:1, columns].view(1, 3, 32, 32) + 0.5
        title = "The first image as the layer gets it"
        expected = lesson.caption_row(title, shown, ["x"], height=160)
        (event,) = logged[run].Images("linear/input")
        assert np.array_equal(picture(event), expected)
        added = (measured["weights"][run] - measured["start"][:, columns])[:5]
        added = 0.5 + added / added.abs().amax(1, keepdim=True) / 2
        title = "What training added to the weights: a pixel that is bright here, and bright in x,"
        classes = lesson.open_images(images_root).classes[:5]
        expected = lesson.caption_row(f"{title} raises this class's number",
                                      added.view(-1, 3, 32, 32), classes, height=160)  # fmt: skip
        (event,) = logged[run].Images("linear/templates")
        assert np.array_equal(picture(event), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in_order", "shuffled"]
