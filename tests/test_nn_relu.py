import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_relu.py")


@pytest.fixture
def pixels(lesson, images_root):
    """800 images shrunk to (800, 192) in [0, 1], and their labels."""
    images, labels = lesson.as_tensors(lesson.open_images(images_root))
    return F.avg_pool2d(images.float() / 255, 4).flatten(1), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_by_hand_are_torchs(lesson, dtype):
    x = torch.tensor([-1000, -88.5, -3.3, -1e-3, -0.0, 0.0, 0.7, 20, 1000], dtype=dtype)
    for ours, slope, theirs in ((lesson.sigmoid, lesson.sigmoid_slope, torch.sigmoid),
                                (lesson.relu, lesson.relu_slope, F.relu)):  # fmt: skip
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(slope(x), lesson.library_slope(theirs, x))


def test_the_slope_is_a_quarter_at_zero_and_less_elsewhere(lesson):
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    slope = lesson.sigmoid_slope(x)
    zero = x.abs() < 1e-9
    assert zero.sum() == 1 and (slope[zero] == 0.25).all() and (slope[~zero] < 0.25).all()


def test_the_gradient_through_a_chain_is_the_product_of_its_slopes(lesson):
    x = torch.tensor([[0.7]], dtype=torch.float64)
    norms = lesson.gradient_norms(torch.sigmoid, [torch.ones(1, 1, dtype=torch.float64)] * 3, x)
    h, slopes = x, []
    for _ in range(3):
        slopes.append(lesson.sigmoid_slope(h))
        h = lesson.sigmoid(h)
    expected = [1, slopes[2], slopes[2] * slopes[1], slopes[2] * slopes[1] * slopes[0]]
    torch.testing.assert_close(norms.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_orthogonal_weights_stretch_no_vector(lesson):
    torch.manual_seed(0)
    for W in lesson.orthogonal(17, 3):
        torch.testing.assert_close(W @ W.T, torch.eye(17, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_try_weights_4_w_lift_the_bound_but_not_the_gradient(lesson, pixels, seed):
    torch.manual_seed(seed)
    weights = [4 * W for W in lesson.orthogonal(192, 10)]
    norms = lesson.gradient_norms(torch.sigmoid, weights, pixels[0][:64].double() - 0.5)
    assert (norms <= 1).all()
    assert 0.6 < norms[-1].mean() ** 0.1 < 0.7


def test_a_dead_unit_gets_no_gradient_and_a_leaky_one_does(lesson):
    torch.manual_seed(0)
    layer, head, x = nn.Linear(5, 2), nn.Linear(2, 10), torch.rand(20, 5)
    with torch.no_grad():
        layer.bias[0] = -10
    off, *_ = lesson.survey(layer, head, [(x, torch.zeros(20, dtype=torch.int64))])
    assert off.tolist() == [True, False]
    for activation, moves in ((F.relu, [False, True]), (F.leaky_relu, [True, True])):
        layer.zero_grad()
        F.cross_entropy(head(activation(layer(x))), torch.arange(20) % 10).backward()
        assert layer.weight.grad.any(1).tolist() == moves


def test_units_die_by_a_step_against_the_mean_image(lesson, pixels):
    torch.manual_seed(0)
    x, y = pixels
    before, after = lesson.train_and_survey(x, y, 128, epochs=1, lr=2.0)
    died = after[0] & ~before[0]
    step = (after[1] - before[1])[died]
    mean = F.normalize(x.mean(0), dim=0)
    assert died.sum() > 30 and (step @ mean < 0).float().mean() > 0.9
    assert ((step @ mean) ** 2 / step.square().sum(1)).mean() > 0.7  # 1 of 192 directions


def test_small_steps_kill_no_unit(lesson, pixels):
    torch.manual_seed(0)
    surveys = [*lesson.train_and_survey(*pixels, 128, epochs=2, lr=0.05)]
    assert surveys[0][0].sum() == surveys[-1][0].sum()


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_the_bound_and_counts_the_dead(lesson, images_root, events, tmp_path, seed):
    measured = lesson.main(
        seed=seed, log_dir=tmp_path, root=images_root, count=800, depth=8, epochs=4
    )
    assert measured["slopes"] == {"sigmoid": 0.25, "relu": 1.0}
    assert measured["changed"]["[0, 1]"] == 0 and 0.3 < measured["changed"]["[-1, 1]"] < 0.7
    last = {run: norms[-1].item() for run, norms in measured["norms"].items()}
    assert 0.4 * last["bound"] < last["sigmoid"] < last["bound"] == 4.0**-8
    assert 0.7 * 2**-4 < last["relu"] < 1.4 * 2**-4
    assert 0.7 < last["relu_sqrt2"] < 1.4
    dead, centred = measured["dead"]["images_0_1"], measured["dead"]["images_centred"]
    assert dead[0] < 20 < 60 < dead[-1] and dead == sorted(dead)
    assert not any(centred)
    assert measured["accuracy"]["images_0_1"] < 0.2 < measured["accuracy"]["images_centred"]
    assert len(events(tmp_path / "images_0_1").Scalars("dead/share")) == 5
    tags = [f"activation/{name}" for name in ("input", "relu", "sigmoid")]
    assert events(tmp_path / "images").Tags()["images"] == tags
