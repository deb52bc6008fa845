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


def info_nce_by_loop(q, k, temperature):
    q, k, total = F.normalize(q, dim=1), F.normalize(k, dim=1), 0.0
    for i in range(len(q)):
        e = [torch.exp(q[i] @ k[j] / temperature) for j in range(len(k))]
        total -= torch.log(e[i] / sum(e))
    return total / len(q)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_losses_and_gradients_equal_the_double_loop(lesson, name, temperature):
    torch.manual_seed(0)
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    by_loop = {"info_nce": info_nce_by_loop, "nt_xent": lesson.nt_xent_by_loop}[name]
    losses = [f(a, b, temperature) for f in (getattr(lesson, name), by_loop)]
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


def test_one_negative_shows_at_most_log_2(lesson):
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
    good, wrong = (rows[name] for name in ("each equals its q", "each is another's q"))
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
    assert "InfoNCE: each equals its q; all vectors equal; each is another's q" in out


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


def test_loss_of_batch_takes_the_negatives_that_it_names(lesson):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 8, 5)
    for negatives, group in ((2, 2), (6, 4), (14, 8)):
        pairs = zip(z1.split(group), z2.split(group), strict=True)
        losses = [lesson.nt_xent_by_loop(a, b, 0.3) for a, b in pairs]
        ours = lesson.loss_of_batch(z1, z2, "nt_xent", negatives)
        torch.testing.assert_close(ours, torch.stack(losses).mean())
    a, p = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    d = torch.cdist(a, p)
    d_hard = torch.stack([d[i][torch.arange(8) != i].min() for i in range(8)])
    d_next = torch.stack([d[i, (i + 1) % 8] for i in range(8)])
    for negatives, far in (("hardest", d_hard), ("random", d_next)):
        expected = (d.diagonal() - far + 1).clamp(min=0).mean()
        ours = lesson.loss_of_batch(z1, z2, "triplet", negatives)
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


@pytest.mark.parametrize("kind", [("nt_xent", 2), ("triplet", "hardest")])
def test_the_first_step_logs_the_loss_and_measures_of_its_views(lesson, kind):
    torch.manual_seed(7)
    images = lesson.draw_shapes(40)[0]
    record = Record()
    lesson.train(images, *kind, steps=1, batch=8, seed=3, writer=record)
    torch.manual_seed(3)
    features = lesson.encoder()
    head = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    x = images[torch.randperm(40)[:8]]
    z1, z2 = head(features(torch.cat([lesson.augment(x), lesson.augment(x)]))).chunk(2)
    expected = {
        "views/loss": lesson.loss_of_batch(z1, z2, *kind),
        "views/alignment": lesson.alignment(z1, z2),
        "views/uniformity": lesson.uniformity(z1),
    }
    assert {tag: value for tag, value, _ in record.kept} == pytest.approx(
        {tag: value.item() for tag, value in expected.items()}, abs=1e-5
    )


def test_every_training_starts_at_the_encoder_that_is_the_control(lesson, tmp_path, monkeypatch):
    probe, modes = lesson.linear_probe, []

    def spy(features, *data):
        modes.append(features.training and any(True for _ in features.parameters()))
        return probe(features, *data)

    monkeypatch.setattr(lesson, "linear_probe", spy)
    seen = []
    augment = lesson.augment
    monkeypatch.setattr(lesson, "augment", lambda x: seen.append(x) or augment(x))
    rows = lesson.show_training(4, tmp_path, batch=4, images=32, steps=2)
    assert rows["start"]["accuracy"] > 0 and modes == 6 * [False]
    assert len(seen) == 16  # 4 trainings of 2 steps with 2 views
    for i in range(4):
        torch.testing.assert_close(seen[4 * i], seen[0])  # the same images for each loss


def test_without_steps_each_encoder_is_as_good_as_the_start(lesson):
    torch.manual_seed(9)
    start = lesson.encoder().state_dict()
    images = lesson.draw_shapes(16)[0]
    for kind in (("nt_xent", 2), ("triplet", "random")):
        features, _ = lesson.train(images, *kind, steps=0, batch=4, seed=9, writer=Record())
        torch.testing.assert_close(features.state_dict(), start)


def test_the_control_is_the_encoder_of_the_same_seed(lesson, tmp_path, monkeypatch):
    probe = lesson.linear_probe
    states = []
    monkeypatch.setattr(
        lesson, "linear_probe", lambda f, *data: states.append(f.state_dict()) or probe(f, *data)
    )
    monkeypatch.setattr(
        lesson, "write_embedding", lambda writer, features, test: None
    )  # nothing was learned
    trained = lesson.train

    def no_steps(images, loss, negatives, steps, batch, seed, writer):
        features, _ = trained(images, loss, negatives, 0, batch, seed, writer)
        return features, {"loss": 0.0, "alignment": 0.0, "uniformity": -1.0}

    monkeypatch.setattr(lesson, "train", no_steps)
    lesson.show_training(4, tmp_path, batch=4, images=32, steps=1)
    assert len(states) == 6
    for state in states[2:]:
        torch.testing.assert_close(state, states[1])


def test_a_training_without_labels_makes_shapes_readable(lesson):
    torch.manual_seed(0)
    images, labelled, test = lesson.draw_shapes(2048)[0], *map(lesson.draw_shapes, (800, 1000))
    torch.manual_seed(0)
    start = lesson.linear_probe(lesson.encoder().eval(), labelled, test)
    features, _ = lesson.train(images, "nt_xent", 254, 160, 128, 0, Record())
    assert lesson.linear_probe(features, labelled, test) > start + 0.03


SMALL = {"pairs": 1024, "batch": 32, "images": 256, "steps": 22}


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
        "second views k           InfoNCE   NT-Xent   triplet",
        "temperature t    share of the gradient",
        "loss      plain      with checks",
        "N   I =  0.575   I =  3.321",
        "trained by   negatives   accuracy   last loss   distance   evenness",
    ):
        assert out.count(head) == 1
    assert len(out.splitlines()) == 47  # each row of each table
    for i in range(1, 6):
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
    shown = ", ".join(f"{bounds[N][0.999]:.2f} (log N {math.log(N):.2f})" for N in (2, 16, 256))
    assert f"-> of 12.43 nats N = 2, 16, 256 show {shown}\n" in out


def test_main_a_small_temperature_leaves_the_hardest(measured, events):
    result, log_dir, out = measured
    shares = result["temperature"]
    values = list(shares.values())
    assert values == sorted(values, reverse=True) and values[0] > 0.9 and values[-1] < 0.1
    logged = events(log_dir / "temperature").Scalars("gradient/hardest_share")
    assert [e.value for e in logged] == pytest.approx(values, rel=1e-5)
    assert [e.step for e in logged] == [2, 5, 10, 20, 50, 100]
    assert f"pull most at t = 0.02 ({values[0]:.3f}), least at t = 1 ({values[-1]:.3f})" in out


def test_main_logs_what_it_returns_and_the_hardest_negatives_collapse(measured, events):
    result, log_dir, out = measured
    rows = result["training"]
    many, hardest, start = rows["nt_xent_62"], rows["triplet_hardest"], rows["start"]
    best = max(rows, key=lambda name: rows[name]["accuracy"])
    assert f"is that of {best}: {rows[best]['accuracy']:.3f}; " in out
    assert f"without training it is {start['accuracy']:.3f}\n" in out
    assert hardest["uniformity"] > -0.1 and hardest["loss"] == pytest.approx(1, abs=0.1)
    assert hardest["alignment"] < 0.1 < many["loss"]
    said = next(line for line in out.splitlines() if "-> collapsed" in line).split(": ")[1]
    assert said.split(", ") == [n for n in rows if rows[n].get("uniformity", -1) > -0.1]
    for name in ("start", "pixels"):
        assert 0.02 < rows[name]["accuracy"] < 0.45
    for name in ("nt_xent_2", "nt_xent_62", "triplet_random", "triplet_hardest"):
        run = events(log_dir / name)
        for tag in ("loss", "alignment", "uniformity"):
            logged = run.Scalars(f"views/{tag}")
            assert [e.step for e in logged] == [0, 10, 20, 21]
            assert logged[-1].value == pytest.approx(rows[name][tag], rel=1e-5)
    for name, candidates in (("nt_xent_2", 3), ("nt_xent_62", 63)):
        first = events(log_dir / name).Scalars("views/loss")[0].value
        assert first == pytest.approx(math.log(candidates), rel=0.3)
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {log_dir}   http")


def test_the_projector_has_each_test_image_under_its_own_shape(measured, lesson):
    folder = next((measured[1] / "nt_xent_62").glob("00000/*"))
    assert (folder.parent.parent / "projector_config.pbtxt").is_file()
    names = (folder / "metadata.tsv").read_text(encoding="utf-8").split()
    assert names == [lesson.SHAPES[i % 8] for i in range(128)]
    assert len((folder / "tensors.tsv").read_text(encoding="utf-8").splitlines()) == 128


def test_the_linear_probe_is_the_kl_lessons(lesson, load):
    torch.manual_seed(0)
    x, labels = torch.randn(300, 6), torch.randint(4, (300,))
    x[torch.arange(300), labels] += 1.5
    train, test = (x[:100], labels[:100]), (x[100:], labels[100:])
    other = load("loss_functions/kl_divergence.py")
    features = torch.nn.Linear(6, 9).requires_grad_(False)
    ours, theirs = (m.linear_probe(features, train, test) for m in (lesson, other))
    assert ours == theirs > 0.5
