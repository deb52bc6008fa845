import contextlib
import inspect
import io
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
    losses = [getattr(lesson, name + how)(a, b, temperature) for how in ("", "_by_loop")]
    grads = [torch.autograd.grad(loss, (a, b)) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
    assert (losses[0] - getattr(lesson, name)(a, b, 0.3)).abs() > 0.01


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


def test_uniformity_by_hand(lesson):
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert lesson.uniformity(z).item() == pytest.approx(-4)  # one pair, d^2 = 2
    assert lesson.uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)  # the head gives 32 numbers
    assert lesson.uniformity(torch.randn(2000, 32)).item() == pytest.approx(-3.75, abs=0.02)


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


def test_one_negative_shows_at_most_log_2_and_the_error_is_that_of_the_mean(lesson):
    torch.manual_seed(0)
    bound, error = lesson.lower_bound(0.999, 2, 2000)
    assert math.log(2) - 0.01 < bound <= math.log(2)
    torch.manual_seed(0)
    means, errors = zip(*(lesson.lower_bound(0.9, 4, 50) for _ in range(100)), strict=True)
    spread, mean_error = torch.tensor(means).std().item(), sum(errors) / 100
    assert mean_error == pytest.approx(spread, rel=0.25) and error < mean_error


def test_drawn_shapes_differ_and_augmentation_keeps_them_finite(lesson):
    torch.manual_seed(0)
    images, labels = lesson.draw_shapes(160)
    assert images.shape == (160, 3, 16, 16) and labels.bincount().tolist() == 8 * [20]
    view = lesson.augment(images)
    assert view.shape == images.shape and view.isfinite().all()
    assert ((view - images).abs().mean(dim=(1, 2, 3)) > 0.05).all()


def test_try_a_small_temperature_leaves_only_equal_vectors_at_chance(lesson):
    source = inspect.getsource(lesson.show_everyday)
    assert source.count("t = 0.5\n") == 1
    changed = dict(vars(lesson))
    exec(source.replace("t = 0.5\n", "t = 0.05\n"), changed)  # what the learner is asked to do
    before, after = lesson.show_everyday(), changed["show_everyday"]()
    for name in before:
        for loss, chance in ((0, math.log(3)), (1, math.log(5))):
            stays = name == "all vectors equal"
            assert (abs(after[name][loss] - before[name][loss]) < 1e-5) == stays
            assert (before[name][loss] == pytest.approx(chance)) == stays
        assert after[name][2] == before[name][2]


def test_everyday_table_is_what_the_formulas_give(lesson, capsys):
    rows = lesson.show_everyday()
    good, wrong = (rows[name] for name in ("each k equals its q", "each k is another's q"))
    e2, e4 = math.exp(2), math.exp(4)  # cosines 1 and -1, between vectors 0 and 2; over 0.5
    outer, middle = math.log(1 + 1 / e2 + 1 / e4), math.log(1 + 2 / e2)
    assert good[0] == pytest.approx((2 * outer + middle) / 3)
    outer, middle = math.log(1 + 2 / e2 + 2 / e4), math.log(1 + 4 / e2)
    assert good[1] == pytest.approx((2 * outer + middle) / 3)
    # |a - p| is 0, |a - n| is sqrt 2, sqrt 2, 2: no triplet is within the margin
    assert good[2] == 0 and wrong[0] > math.log(3) and wrong[1] > math.log(5)
    assert rows["all vectors equal"] == pytest.approx([math.log(3), math.log(5), 1], abs=1e-5)
    # q moves on by one, so that the next k is q itself: (2 + sqrt 2 + sqrt 2) / 3 - 0 + 1
    assert wrong[2] == pytest.approx((2 + 2 * math.sqrt(2)) / 3 + 1, abs=1e-5)
    out = capsys.readouterr().out
    assert "best first: each k equals its q; all vectors equal; each k is another's q\n" in out
    assert "-> equal vectors give log 3 = 1.099, log 5 = 1.609 and the margin, within" in out


def test_the_plain_losses_are_the_checked_ones_with_gradients(lesson):
    torch.manual_seed(0)
    a, b = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for name in ("info_nce", "nt_xent"):
        losses = [getattr(lesson, name + kind)(a, b, 0.15) for kind in ("", "_plain")]
        grads = [torch.autograd.grad(loss, (a, b)) for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_length_of_small_vectors_does_not_matter(lesson, dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 4).to(dtype)
    small = lesson.unit(x * 2.0**-20)  # a power of two: exact in every format
    torch.testing.assert_close(small, lesson.unit(x))
    assert lesson.info_nce(x * 2.0**-20, x, 0.3).item() == lesson.info_nce(x, x, 0.3).item()


def test_hardest_negatives_by_hand(lesson):
    z1, z2 = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[0.1], [2.0], [5.0]])
    found = lesson.hardest_negatives(z1, z2)
    assert found.flatten().tolist() == pytest.approx([2.0, 0.1, 2.0])


def test_the_hardest_negative_gets_a_gradient(lesson):
    z1, z2 = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad(lesson.hardest_negatives(z1, z2).sum(), z2)
    assert grad.sum() == 12


def test_semi_hard_negatives_by_hand(lesson):
    z1 = torch.tensor([[0.0], [1.0], [9.0], [4.0]])
    z2 = torch.tensor([[3.0], [2.0], [-9.0], [5.5]])
    # distances 3 2 9 5.5; 2 1 10 4.5; 6 7 18 3.5; 1 2 13 1.5, the positives on the diagonal:
    # nearest beyond 3: 5.5; beyond 1: 2; beyond 18: none, so the farthest, itself; beyond 1.5: 2
    found = lesson.semi_hard_negatives(z1, z2)
    assert found.flatten().tolist() == [5.5, 3.0, -9.0, 2.0]


def test_loss_of_batch_takes_the_negatives_that_it_names(lesson):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 8, 5)
    torch.testing.assert_close(
        lesson.loss_of_batch(z1, z2, "nt_xent"), lesson.nt_xent_by_loop(z1, z2, 0.3)
    )
    a, p = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    d = torch.cdist(a, p)
    others = [torch.arange(8)[torch.arange(8) != i] for i in range(8)]
    far = {"hardest": [d[i][others[i]].min() for i in range(8)],
           "random": [d[i, (i + 1) % 8] for i in range(8)],
           "semi_hard": [min((x for x in d[i] if x > d[i, i]), default=d[i].max())
                         for i in range(8)]}  # fmt: skip
    for negatives, chosen in far.items():
        expected = (d.diagonal() - torch.stack(chosen) + 1).clamp(min=0).mean()
        ours = lesson.loss_of_batch(z1, z2, f"triplet_{negatives}")
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_drawn_shapes_have_their_areas(lesson):
    torch.manual_seed(0)
    images, labels = lesson.draw_shapes(4000)
    drawn = ((images - images[:, :, :1, :1]).abs() > 0.25).all(1)  # a corner shows the ground
    areas = drawn.sum(dim=(1, 2)).double()
    s2 = (5.5**3 - 4**3) / 4.5  # mean of s^2, for s from 4 to 5.5
    expected = {
        "disc": math.pi, "ring": 0.64 * math.pi, "square": 1.7**2, "frame": 4 * 0.64,
        "diamond": 2 * 1.2**2, "plus": 2 * 1.4 - 0.7**2, "bar": 1.4,
        "cross": 2 * (4 - 1.58**2) - 2 * 0.42**2,
    }  # fmt: skip
    for i, name in enumerate(lesson.SHAPES):
        assert areas[labels == i].mean().item() == pytest.approx(s2 * expected[name], rel=0.08)


def test_views_are_mirrored_recoloured_inverted_and_shifted(lesson):
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 16)
    image = torch.full((3, 16, 16), 0.5)
    image[0] = (ramp[:, None] + ramp) / 2  # darkest at the top left, in one channel
    views = lesson.augment(image.expand(400, 3, 16, 16))
    flat, down, right = views.std(dim=(2, 3)), (ramp - 0.5)[:, None], ramp - 0.5
    channel = flat.argmax(1)
    assert (channel.bincount() > 90).all()  # each channel in a third of the views
    busy = views[torch.arange(400), channel]
    signs = [(busy * axis).sum(dim=(1, 2)).sign() for axis in (down, right)]
    inverted, mirrored = signs[0] < 0, signs[0] != signs[1]
    assert 120 < inverted.sum() < 280 and 120 < mirrored.sum() < 280
    spot = torch.full((400, 3, 16, 16), 0.5)
    spot[:, :, 8, 8] = 20.0
    rows = (lesson.augment(spot)[:, 0] - 0.5).abs().amax(2).argmax(1)
    assert rows.unique().tolist() == [6, 7, 8, 9, 10]


class Record:
    """A writer that keeps what it is told."""

    def __init__(self):
        self.kept = []

    def add_scalar(self, tag, value, step):
        self.kept.append((tag, float(value), step))


@pytest.mark.parametrize("name", ["nt_xent", "triplet_hardest"])
def test_the_first_step_logs_the_loss_and_uniformity_of_its_views(lesson, name):
    torch.manual_seed(7)
    images = lesson.draw_shapes(40)[0]
    record = Record()
    _, row = lesson.train(images, name, steps=1, batch=8, seed=3, writer=record)
    torch.manual_seed(3)
    features = lesson.encoder()
    head = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    x = images[torch.randperm(40)[:8]]
    z1, z2 = head(features(torch.cat([lesson.augment(x), lesson.augment(x)]))).chunk(2)
    loss, spread = lesson.loss_of_batch(z1, z2, name).item(), lesson.uniformity(z1).item()
    logged = {tag: value for tag, value, _ in record.kept}
    assert logged == pytest.approx({"views/loss": loss, "views/uniformity": spread}, abs=1e-5)
    assert row == pytest.approx({"first": loss, "last": loss, "uniformity": spread}, abs=1e-5)


def test_every_training_starts_at_the_encoder_that_is_the_control(lesson, tmp_path, monkeypatch):
    probe, states, modes, seen = lesson.linear_probe, [], [], []

    def spy(features, *data):
        states.append({name: tensor.clone() for name, tensor in features.state_dict().items()})
        modes.append(features.training and bool(states[-1]))
        return probe(features, *data)

    monkeypatch.setattr(lesson, "linear_probe", spy)
    augment = lesson.augment
    monkeypatch.setattr(lesson, "augment", lambda x: seen.append(x) or augment(x))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)  # nothing is learned
    lesson.show_training(4, tmp_path, batch=4, images=32, steps=2)
    assert modes == 6 * [False] and len(seen) == 18  # 2 for the control, 4 x 2 steps x 2 views
    for i in range(4):
        torch.testing.assert_close(seen[2 + 4 * i], seen[2])  # the same images for each loss
    for state in states[2:]:
        for name, tensor in states[1].items():
            assert ("running" in name or "num_batches" in name) or tensor.equal(state[name])


@pytest.mark.parametrize("seed", [1])
def test_a_training_without_labels_makes_shapes_readable(lesson, seed):
    torch.manual_seed(seed)
    images, labelled, test = lesson.draw_shapes(2048)[0], *map(lesson.draw_shapes, (800, 1000))
    torch.manual_seed(seed)
    start = lesson.linear_probe(lesson.encoder().eval(), labelled, test)
    features, _ = lesson.train(images, "nt_xent", 160, 128, seed, Record())
    assert lesson.linear_probe(features, labelled, test) > start + 0.03


SMALL = {"pairs": 1024, "batch": 32, "images": 256, "steps": 22}
NAMES = {"nt_xent": "NT-Xent, 62 negatives", "triplet_random": "triplet, a random negative",
         "triplet_hardest": "triplet, the nearest one",
         "triplet_semi_hard": "triplet, semi-hard: beyond p"}  # fmt: skip


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("runs")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, out.getvalue()


def test_main_shows_at_most_the_information_there_is(measured, events):
    result, log_dir, out = measured
    bounds, truth = result["bound"]
    assert result["twins"] < 1e-12
    for head in (
        "vectors                      InfoNCE   NT-Xent   triplet",
        "loss      plain      with checks",
        "N   I =  0.575   I =  3.321",
        "trained by                       accuracy   first loss   last loss   uniformity",
    ):
        assert out.count(head) == 1
    for i in range(1, 5):
        assert sum(line.startswith(f"{i}. ") for line in out.splitlines()) == 1
    for N, values in bounds.items():
        for rho, bound in values.items():
            assert bound <= math.log(N) and bound < truth[rho] + 0.1
        assert values[0.999] > math.log(N) - 0.05  # I = 12.4: all hold log N
        shown = "   ".join(f"{bound:10.3f}" for bound in values.values())
        assert f"   {N:3}   {shown}   {math.log(N):5.3f}\n" in out
        logged = [e.value for e in events(log_dir / "bound" / f"N_{N}").Scalars("bound/nats")]
        assert logged == pytest.approx(list(values.values()), rel=1e-5)
    assert bounds[256][0.5] == pytest.approx(truth[0.5], abs=0.1)
    logged = events(log_dir / "bound" / "truth").Scalars("bound/nats")
    assert [e.value for e in logged] == pytest.approx(list(truth.values()), rel=1e-5)
    assert [e.step for e in logged] == [6, 33, 78, 124]
    shown = ", ".join(f"N = {N} {bounds[N][0.999]:.2f}" for N in (2, 16, 256))
    assert f"-> a batch shows at most log N: of 12.43 nats {shown};\n" in out
    error = float(out.split("standard error of at most ")[1].split()[0])
    assert 0.01 < error < 0.3


def test_main_learns_from_good_negatives_and_collapses_with_the_nearest(measured):
    result, _, out = measured
    rows = result["training"]
    untrained = [name for name in rows if name not in NAMES.values()]
    assert rows["a guess"]["accuracy"] == 1 / 8 and len(untrained) == 3
    for name in untrained:
        assert f"   {name:<31}  {rows[name]['accuracy']:9.3f}\n" in out
    top = max(rows[name]["accuracy"] for name in untrained)
    best = max(rows, key=lambda name: rows[name]["accuracy"])
    said = f"{best}: {rows[best]['accuracy']:.3f}; without training at most {top:.3f}\n"
    assert f"-> the best is {said}" in out
    for name, row in rows.items():
        if name in NAMES.values():
            shown = f"{row['first']:10.3f}   {row['last']:9.3f}   {row['uniformity']:10.3f}\n"
            assert f"   {name:<31}  {row['accuracy']:9.3f}   {shown}" in out
            collapsed = f"-> collapsed: {name}, accuracy {row['accuracy']:.3f}\n" in out
            assert collapsed == (row["uniformity"] > -0.02)
    nearest = rows[NAMES["triplet_hardest"]]
    assert nearest["uniformity"] > -0.02 and nearest["last"] == pytest.approx(1, abs=0.1)
    assert nearest["first"] > 1.1
    assert "equal it is the margin, 1: lower, so collapse lowers the loss\n" in out
    for name in ("triplet_random", "triplet_semi_hard"):
        assert rows[NAMES[name]]["uniformity"] < -0.3


def test_main_logs_what_it_returns(measured, events):
    result, log_dir, out = measured
    for name, words in NAMES.items():
        row = result["training"][words]
        for tag, last in (("loss", row["last"]), ("uniformity", row["uniformity"])):
            logged = events(log_dir / name).Scalars(f"views/{tag}")
            assert [e.step for e in logged] == [0, 10, 20, 21]
            assert logged[-1].value == pytest.approx(last, rel=1e-5)
    first = events(log_dir / "nt_xent").Scalars("views/loss")[0].value
    assert first == pytest.approx(math.log(63), rel=0.3)
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {log_dir}   http")


def test_the_linear_probe_is_the_kl_lessons(lesson, load):
    torch.manual_seed(0)
    x, labels = torch.randn(300, 6), torch.randint(4, (300,))
    x[torch.arange(300), labels] += 1.5
    train, test = (x[:100], labels[:100]), (x[100:], labels[100:])
    other = load("loss_functions/kl_divergence.py")
    features = torch.nn.Linear(6, 9).requires_grad_(False)
    ours, theirs = (m.linear_probe(features, train, test) for m in (lesson, other))
    assert ours == theirs > 0.5
