import math

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def lesson(load):
    return load("nn_loss_network.py")


@pytest.mark.parametrize("scale", [0.01, 0.1])
@pytest.mark.parametrize("K", [3, 17])
def test_the_expansion_is_off_by_the_third_order(lesson, scale, K):
    torch.manual_seed(0)
    z, t = torch.randn(50, K, dtype=torch.float64) * scale, torch.randint(K, (50,))
    assert abs(lesson.expected_loss(z, t) - F.cross_entropy(z, t)) < scale**3


def test_without_norm_keeps_weights_and_leaves_the_model_alone(lesson):
    model = lesson.Moli()
    plain = lesson.without_norm(model)
    assert torch.equal(plain.features[1][0].weight, model.features[1][0].weight)
    assert not [m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len([m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]) == 3


def test_a_step_leaves_the_model_where_it_was(lesson):
    model, x, t = torch.nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    F.cross_entropy(model(x), t).backward()
    before = model.weight.clone()
    after = lesson.loss_after_step(model, x, t, 0.01)
    assert after < F.cross_entropy(model(x), t) and torch.equal(model.weight, before)


def test_try_a_tiny_last_layer_starts_at_ln_10(lesson, images_root):
    torch.manual_seed(0)
    x, t, _ = lesson.load_batch(images_root, 64)
    model = lesson.Moli().double()
    with torch.no_grad():
        for p in model.classifier[-1].parameters():
            p *= 0.01
    assert F.cross_entropy(model(x), t).item() == pytest.approx(math.log(10), abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_main_measures_what_the_expansion_predicts(lesson, images_root, tmp_path, seed, events):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, count=64)
    starts = measured["starts"]
    for start in starts.values():
        assert start["loss"] == pytest.approx(start["theory"], abs=2e-3)
        assert abs(start["loss"] - math.log(10)) < 0.05
    with_norm = starts["batch norm, train"]["variance"]
    assert with_norm > 1.5 * starts["no batch norm"]["variance"]
    fresh = starts["batch norm, eval"]["variance"]  # its running statistics are still 0 and 1
    assert fresh == pytest.approx(starts["no batch norm"]["variance"], rel=1e-3)
    assert starts["no batch norm"]["raw"] > 2.5 > starts["batch norm, train"]["raw"]
    assert measured["fall"] == pytest.approx(measured["theory"], rel=0.1)
    first = next(iter(measured["norms"]["with_norm"]))
    assert measured["norms"]["with_norm"][first] > 10 * measured["norms"]["without_norm"][first]
    steps = [e.step for e in events(tmp_path / "without_norm").Scalars("grad/norm")]
    assert steps == [0, 1, 2, 3, 4]
