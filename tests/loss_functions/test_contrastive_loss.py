import math

import pytest
import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def lesson(load):
    return load("loss_functions/contrastive_loss.py")


def test_two_pairs_by_hand(lesson):
    q = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # lengths do not matter
    k = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    # row 0: s = 1, 1; row 1: s = 0, 0; each time the positive is one of two equals
    assert lesson.info_nce(q, k, 0.3).item() == pytest.approx(math.log(2))
    # views a, b, a, a: from a to its other view, among b, a, a; b's other view is an a
    expected = [math.log(2 + math.exp(-2)), math.log(3), math.log(2 + math.exp(-2)),
                2 + math.log(2 + math.exp(-2))]  # fmt: skip
    assert lesson.nt_xent(q, k, 0.5).item() == pytest.approx(sum(expected) / 4)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_losses_and_gradients_equal_the_double_loop(lesson, name, temperature):
    torch.manual_seed(0)
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = [getattr(lesson, name + kind)(a, b, temperature) for kind in ("", "_by_loop")]
    grads = [torch.autograd.grad(loss, (a, b)) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
    assert (losses[0] - getattr(lesson, name)(a, b, 0.3)).abs() > 0.01


def test_batches_apart_are_a_mean_over_batches(lesson):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 4, 3, 5, dtype=torch.float64)  # 4 batches of 3 images
    apart = sum(lesson.nt_xent_by_loop(a, b, 0.2) for a, b in zip(z1, z2, strict=True)) / 4
    torch.testing.assert_close(lesson.nt_xent(z1, z2, 0.2), apart)


@pytest.mark.parametrize("margin", [0.05, 0.4, 2.5])
def test_triplet_is_torchs(lesson, margin):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    losses = [
        lesson.triplet_loss(*tensors, margin), F.triplet_margin_loss(*tensors, margin=margin)
    ]  # fmt: skip
    grads = [torch.autograd.grad(loss, tensors) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


def test_a_collapsed_network_has_the_margin_as_its_triplet_loss(lesson):
    z = torch.ones(4, 3)
    assert lesson.triplet_loss(z, z, z, 0.7).item() == pytest.approx(0.7)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays_half(lesson, dtype):
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 9, 6)
    a = torch.cat([torch.zeros(1, 6), a[1:]])  # a row without direction
    for name, args in (("info_nce", (a, b)), ("nt_xent", (a, b)), ("triplet_loss", (a, b, c))):
        half = getattr(lesson, name)(*(x.to(dtype) for x in args))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), getattr(lesson, name)(*args), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shapes", [((4, 3), (1, 3)), ((4, 3), (4, 1)), ((3,), (3,))])
def test_shapes_that_would_broadcast_are_refused(lesson, shapes):
    a, b = (torch.randn(shape) for shape in shapes)
    for call in (lesson.info_nce, lesson.nt_xent):
        with pytest.raises(ValueError, match=r"need equal shapes \(B, D\)"):
            call(a, b)
    with pytest.raises(ValueError, match="need equal shapes"):
        lesson.triplet_loss(a, b, b)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_perfect_alignment_on_a_simplex_has_this_loss_and_collapse_log_n(lesson, tau):
    N = 5
    simplex = torch.eye(N, dtype=torch.float64) - 1 / N  # all cosines are -1 / (N - 1)
    expected = math.log(1 + (N - 1) * math.exp(-N / ((N - 1) * tau)))
    assert lesson.info_nce(simplex, simplex, tau).item() == pytest.approx(expected)
    same = torch.ones(N, 4)
    assert lesson.info_nce(same, same, tau).item() == pytest.approx(math.log(N))


def test_alignment_and_uniformity_by_hand(lesson):
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert lesson.alignment(z, z.flip(0)).item() == pytest.approx(2)
    assert lesson.uniformity(z).item() == pytest.approx(-4)  # one pair, d^2 = 2
    assert lesson.uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)


def test_log_ratio_is_that_of_torchs_densities(lesson):
    torch.manual_seed(0)
    x, y = lesson.gaussian_pairs(0.8, 6, d=3)
    conditional = torch.distributions.Normal(0.8 * x[:, None], 0.6).log_prob(y).sum(-1)
    marginal = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(lesson.log_ratio(x, y, 0.8), conditional - marginal)


def test_pairs_have_their_correlation(lesson):
    torch.manual_seed(0)
    x, y = lesson.gaussian_pairs(0.8, 50_000, d=2)
    assert ((x * y).mean(0) - 0.8).abs().max() < 0.02
    assert (x[:, 0] * y[:, 1]).mean().abs() < 0.02 and (y.square().mean() - 1).abs() < 0.02


def test_try_one_negative_shows_at_most_log_2(lesson):
    torch.manual_seed(0)
    bound = lesson.lower_bound(0.999, 2, 2000)
    assert math.log(2) - 0.01 < bound <= math.log(2)


def test_hardest_share_of_equal_negatives_is_their_number(lesson):
    q, k = torch.ones(41, 3), torch.ones(41, 3)
    assert lesson.hardest_share(q, k, 0.1) == pytest.approx(0.05, abs=1e-3)


def test_drawn_shapes_differ_and_augmentation_keeps_them_finite(lesson):
    torch.manual_seed(0)
    images, labels = lesson.draw_shapes(160)
    assert images.shape == (160, 3, 16, 16) and labels.bincount().tolist() == 8 * [20]
    view = lesson.augment(images)
    assert view.shape == images.shape and view.isfinite().all()
    assert ((view - images).abs().mean(dim=(1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("seed", range(3))
def test_main_bounds_information_and_learns_shapes_from_views(lesson, tmp_path, seed, events):
    small = {"pairs": 3000, "groups": (2, 128), "images": 2048, "steps": 200}
    result = lesson.main(seed=seed, log_dir=tmp_path, **small)
    bounds, truth = result["bound"]
    for N, values in bounds.items():
        assert all(
            bound < min(truth[rho] + 0.1, math.log(N) + 1e-9) for rho, bound in values.items()
        )
    assert bounds[256][0.5] == pytest.approx(truth[0.5], abs=0.1)
    shares = list(result["temperature"].values())
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.9 and shares[-1] < 0.1
    scores = result["simclr"]
    assert scores[128] > scores["random"] + 0.05 and scores["random"] > 0.15
    assert all(bounds[N][0.999] > math.log(N) - 0.05 for N in bounds)  # I = 12.4: all hold log N
    for N, at_most, at_least in ((2, 1.5, 0.9), (254, 6.0, 4.0)):  # log 3, log 255 candidates
        first = events(tmp_path / f"negatives_{N}").Scalars("simclr/loss")[0].value
        assert at_least < first < at_most
    run = events(tmp_path / "negatives_254")
    distance = [event.value for event in run.Scalars("simclr/alignment")]
    assert min(distance) < 0.8 * distance[0]
    assert len(run.Scalars("simclr/uniformity")) == 20
    assert (tmp_path / "negatives_254" / "projector_config.pbtxt").is_file()


def test_the_linear_probe_is_the_kl_lessons(lesson, load):
    torch.manual_seed(0)
    x, labels = torch.randn(300, 6), torch.randint(4, (300,))
    x[torch.arange(300), labels] += 1.5
    train, test = (x[:100], labels[:100]), (x[100:], labels[100:])
    other = load("loss_functions/kl_divergence.py")
    features = torch.nn.Linear(6, 9).requires_grad_(False)
    ours, theirs = (m.linear_probe(features, train, test) for m in (lesson, other))
    assert ours == theirs > 0.5
