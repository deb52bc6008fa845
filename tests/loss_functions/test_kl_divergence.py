import contextlib
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal
from torch.distributions import kl_divergence as torch_kl

SMALL = {"points": 4000, "labels": 300, "epochs": (60, 5)}


@pytest.fixture(scope="module")
def lesson(load):
    return load("loss_functions/kl_divergence.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir, out = tmp_path_factory.mktemp("runs"), io.StringIO()
    with contextlib.redirect_stdout(out):
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, out.getvalue()


def test_kl_by_hand_and_where_a_probability_is_0(lesson):
    p = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.75, 0.0], [0.5, 0.5, 0.0]])
    kl = lesson.kl_divergence(p, q)
    assert kl[0].item() == pytest.approx(math.log(2)) and kl[1] == 0 and kl[2] == math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_is_torchs_with_its_gradient(lesson, dtype):
    torch.manual_seed(0)
    a, b = 3 * torch.randn(2, 50, 7, dtype=dtype)
    leaves = [z.clone().requires_grad_() for z in (a, b, a, b)]
    ours = lesson.kl_divergence(leaves[0].softmax(-1), leaves[1].softmax(-1))
    theirs = torch_kl(Categorical(logits=leaves[2]), Categorical(logits=leaves[3]))
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    for mine, other in zip(leaves[:2], leaves[2:], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_kl_is_positive_not_symmetric_and_no_distance(lesson):
    a, b, c = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]])
    kl = lesson.kl_divergence
    assert kl(a, b) > 0 and kl(b, a) > 0 and (kl(a, b) - kl(b, a)).abs() > 0.01
    assert kl(a, c) > kl(a, b) + kl(b, c)  # the triangle's inequality fails


def test_gaussian_form_is_torchs_and_the_vae_prior_term(lesson):
    torch.manual_seed(0)
    m_p, m_q = torch.randn(2, 9, dtype=torch.float64)
    s_p, s_q = torch.rand(2, 9, dtype=torch.float64) + 0.1
    ours = lesson.gaussian_kl(m_p, s_p, m_q, s_q)
    torch.testing.assert_close(ours, torch_kl(Normal(m_p, s_p), Normal(m_q, s_q)))
    to_prior = lesson.gaussian_kl(m_p, s_p, torch.zeros_like(m_p), torch.ones_like(s_p))
    torch.testing.assert_close(to_prior, (m_p**2 + s_p**2 - 1) / 2 - s_p.log())


@pytest.mark.parametrize("T", [1.0, 3.5, 20.0])
def test_soft_loss_is_kl_times_t_squared_with_its_gradient(lesson, T):
    torch.manual_seed(0)
    z, v = torch.randn(2, 6, 5, dtype=torch.float64)
    z.requires_grad_()
    loss = lesson.soft_loss(z, v, T)
    p, q = (v / T).softmax(1), (z / T).softmax(1)
    torch.testing.assert_close(loss, T**2 * lesson.kl_divergence(p, q).mean())
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, T * (q - p).detach() / 6)


def test_distillation_loss_mixes_soft_and_hard(lesson):
    torch.manual_seed(0)
    z, v, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    hard, soft = F.cross_entropy(z, labels), lesson.soft_loss(z, v, 2.5)
    mixed = lesson.distillation_loss(z, v, labels, T=2.5, alpha=0.3)
    torch.testing.assert_close(mixed, 0.3 * soft + 0.7 * hard)
    torch.testing.assert_close(lesson.distillation_loss(z, v, labels, alpha=0.0), hard)


def seed_by_loop(student, teacher, queue, tau_s, tau_t):
    """Mean over the batch of (cross-entropy, KL, the teacher's entropy)."""
    student, teacher, queue = (F.normalize(z, dim=1) for z in (student, teacher, queue))
    total = torch.zeros(3, dtype=student.dtype)
    for s, t in zip(student, teacher, strict=True):
        candidates = [*queue, t]
        p = torch.stack([t @ d / tau_t for d in candidates]).softmax(0)
        q = torch.stack([s @ d / tau_s for d in candidates]).softmax(0)
        total += torch.stack(
            [-(p * q.log()).sum(), (p * (p / q).log()).sum(), -(p * p.log()).sum()]
        )
    return total / len(student)


def test_seed_loss_is_its_loop_and_kl_plus_the_teachers_entropy(lesson):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    queue = torch.randn(6, 4, dtype=torch.float64)
    both = [z.requires_grad_() for z in (student, teacher)]
    loss = lesson.seed_loss(*both, queue, tau_s=0.7, tau_t=0.3)
    cross_entropy, kl, entropy = seed_by_loop(student, teacher.detach(), queue, 0.7, 0.3)
    torch.testing.assert_close(loss, cross_entropy)
    torch.testing.assert_close(loss, kl + entropy)
    grads = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (loss, kl)]
    torch.testing.assert_close(*grads)  # of KL alone: the entropy is a constant to the student
    loss.backward()
    assert teacher.grad is None


def test_similarities_are_to_500_points_as_the_teacher_sees_them(lesson, monkeypatch):
    seen = []

    def spy(student_z, teacher_z, queue):
        seen.append((teacher_z, queue))
        return student_z.sum()

    monkeypatch.setattr(lesson, "seed_loss", spy)
    x, teacher = torch.randn(600, 12), lesson.network(8, 64).requires_grad_(False)
    lesson.train_seed(5, x, teacher, lambda model: 0.0, epochs=1)
    torch.manual_seed(5)
    lesson.network(32, 64)
    first = torch.randperm(600)[:200]
    torch.testing.assert_close(seen[0][0], teacher(x[first]))
    assert len(seen) == 3 and all(torch.equal(queue, teacher(x[:500])) for _, queue in seen)


def test_info_nce_is_that_of_the_lesson_on_contrastive_losses(lesson, load):
    q, k = torch.randn(2, 7, 5)
    theirs = load("loss_functions/contrastive_loss.py").info_nce(q, k, 0.3)
    torch.testing.assert_close(lesson.info_nce(q, k, 0.3), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_near(lesson, dtype):
    torch.manual_seed(0)
    z, v, queue = torch.randn(3, 5), torch.randn(3, 5), torch.randn(8, 5)
    labels = torch.tensor([0, 4, 2])
    for function, tensors, more in (
        (lesson.kl_divergence, (z.softmax(1), v.softmax(1)), ()),
        (lesson.gaussian_kl, (z, v.exp(), v, z.exp()), ()),
        (lesson.distillation_loss, (z, v), (labels,)),
        (lesson.seed_loss, (z, v, queue), ()),
    ):
        half = function(*(t.to(dtype) for t in tensors), *more)
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), function(*tensors, *more), rtol=0.05, atol=0.05)


ONE, FOUR, QUEUE = torch.ones(1, 3) / 3, torch.ones(4, 3) / 3, torch.randn(5, 3)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("kl_divergence", (FOUR, ONE)),
        ("gaussian_kl", (FOUR, FOUR, FOUR, ONE)),
        ("soft_loss", (FOUR, ONE, 2.0)),
        ("soft_loss", (FOUR[0], FOUR[0], 2.0)),  # "batchmean" would divide by the classes
        ("seed_loss", (FOUR, ONE, QUEUE)),
        ("info_nce", (FOUR, ONE, 0.2)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(lesson, name, inputs):
    with pytest.raises(ValueError, match=r"need equal shapes.*, not \("):
        getattr(lesson, name)(*inputs)


def test_torch_advises_against_the_reduction_mean():
    with pytest.warns(UserWarning, match="batchmean"):
        F.kl_div(FOUR.log(), FOUR, reduction="mean")


def test_try_at_2_5_the_wide_fit_is_better_than_that_of_one_mode(lesson, edited, tmp_path):
    fits = edited(lesson, "(2.0, 3.0)", "(2.5,)").show_fits(tmp_path)
    assert fits[2.5, "reverse", 0.0][2] == pytest.approx(0.4856, abs=5e-5)
    assert fits[2.5, "reverse", -2.5][2] == pytest.approx(0.4915, abs=5e-5)
    assert fits[2.5, "reverse", 0.0][1] > 2 and fits[2.5, "reverse", -2.5][1] < 1.2
    assert (
        "the wide one, .4856, though a fit that keeps to one mode exists, .4915" in lesson.__doc__
    )


def test_everyday_values_are_those_by_hand(lesson, capsys):
    calls, by_hand, (soft, hard, both) = lesson.show_everyday()
    forward, reverse = 0.5 * math.log(4 / 3), math.log(3) * 0.75 - math.log(2)
    assert list(by_hand.values()) == pytest.approx([forward, reverse, forward / 2])
    no_log = 0.5 * (2 * math.log(0.5) - 0.25 - 0.75)  # p (log p - q)
    assert calls == pytest.approx([forward, forward, forward / 2, reverse, no_log], abs=1e-6)
    # logits over T: (0.5, 0) and (0, 1), softmax of two: a logistic function
    q, p = (1 / (1 + math.exp(-x)) for x in (0.5, -1.0))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert (soft, hard) == pytest.approx((4 * kl, math.log(1 + math.e)), abs=1e-6)
    assert both == pytest.approx((soft + hard) / 2, abs=1e-6)
    out = capsys.readouterr().out
    for line in (
        '   F.kl_div(q.log(), p, reduction="batchmean")     0.1438   KL(p || q)',
        "   kl_plain(p, q)                                  0.1438   KL(p || q)",
        '   F.kl_div(q.log(), p, reduction="mean")          0.0719   half of KL(p || q)',
        '   F.kl_div(p.log(), q, reduction="batchmean")     0.1308   KL(q || p)',
        '   F.kl_div(q, p, reduction="batchmean")          -1.1931   no divergence',
        "   soft loss 1.0296   cross-entropy of the label 1.3133   alpha 0.5: 1.1714",
    ):
        assert line + "\n" in out
    assert "= 0.1438; KL(q || p) = 0.1308\n" in out
    assert "at 0.5 the loss is the mean of both, 1.1714\n" in out


def test_plain_losses_are_the_complete_ones_and_torchs(lesson):
    torch.manual_seed(0)
    z, v, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    ours = lesson.distillation_plain(z, v, labels, 2.5, 0.3)
    torch.testing.assert_close(ours, lesson.distillation_loss(z, v, labels, 2.5, 0.3))
    p, q = z.softmax(1), v.softmax(1)
    torch.testing.assert_close(lesson.kl_plain(p, q), torch_kl(Categorical(p), Categorical(q)))


def test_a_fit_that_leaves_the_grid_is_refused(lesson):
    with pytest.raises(ArithmeticError, match="left the grid"):
        lesson.fit_gaussian("reverse", 2.5, d=2.5)


def test_target_is_the_mixture_at_any_distance(lesson):
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    p = 0.6 * Normal(-1.7, 1.0).log_prob(x).exp() + 0.4 * Normal(1.7, 1.0).log_prob(x).exp()
    torch.testing.assert_close(lesson.target_log_density(x, 1.7).exp(), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_and_zero_vectors_are_as_good_as_others(lesson, dtype):
    x = torch.eye(4)[:, :3].to(dtype)  # the last row is zero
    assert lesson.info_nce(x, x, 0.5).isfinite()
    assert lesson.info_nce(x * 2.0**-10, x, 0.5) == lesson.info_nce(x, x, 0.5)


def points(lesson, seed, sizes):
    sample = lesson.clouds(seed)
    return [sample(n) for n in sizes]


def test_test_labels_teach_nobody(lesson, tmp_path, monkeypatch):
    torch.manual_seed(0)
    train, few, test = points(lesson, 0, (600, 200, 500))
    test = test[0], torch.randint(10, (500,))  # labels that nothing can tell
    sizes, fit = [], lesson.fit

    def spy(model, n, *more, **rest):
        sizes.append(n)
        return fit(model, n, *more, **rest)

    monkeypatch.setattr(lesson, "fit", spy)
    ends = lesson.show_distillation(0, tmp_path, train, few, test, 3)
    assert sizes == [600, 200, 200, 200]
    assert all(end < 0.2 for end in ends.values())


def test_each_student_learns_from_its_own_teacher(lesson, tmp_path, monkeypatch):
    train, few, test = points(lesson, 0, (600, 200, 300))
    teachers, real = [], lesson.train_seed
    monkeypatch.setattr(
        lesson, "train_seed", lambda *a: teachers.append(a[2]) or real(*a[:4], epochs=1)
    )
    lesson.show_seed(0, tmp_path, train[0], few, test, 1)
    nobody, untrained, trained = teachers
    assert nobody is None and not any(p.requires_grad for p in trained.parameters())
    z = [teacher(train[0]) for teacher in (untrained, trained)]
    near = train[0] + 0.8 * torch.randn_like(train[0])
    losses = [
        lesson.info_nce(one, teacher(near), 0.2).item()
        for one, teacher in zip(z, (untrained, trained), strict=True)
    ]
    assert losses[1] < losses[0] - 0.5  # only one has learned that noisy views belong together


@pytest.mark.parametrize("start", [-2.0, 2.0])
def test_reverse_kl_stops_where_its_gradient_says(lesson, start):
    mu, sigma, _ = lesson.fit_gaussian("reverse", start)
    x = torch.linspace(-25, 25, 5001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(lesson.target_log_density(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    q = Normal(mu, sigma).log_prob(x.detach()).exp() * 0.01  # dx
    assert (q * slope).sum().item() == pytest.approx(0, abs=1e-6)
    assert (q * curvature).sum().item() == pytest.approx(-1 / sigma**2, abs=1e-6)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_q_that_may_have_two_modes_takes_both_in_either_order(lesson, order):
    p = lesson.target_log_density(torch.linspace(-7, 7, 29, dtype=torch.float64)).softmax(0)
    z = torch.zeros(29, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        pair = (p, z.softmax(0)) if order == "forward" else (z.softmax(0), p)
        loss = lesson.kl_divergence(*pair)
        z.grad = torch.autograd.grad(loss, z)[0]
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(z.softmax(0).detach(), p, rtol=0, atol=1e-3)


@pytest.mark.parametrize("start", [-4.0, 0.0, 5.0])
def test_forward_kl_takes_the_moments_from_anywhere(lesson, start):
    mu, sigma, _ = lesson.fit_gaussian("forward", start, sigma=2.0)
    assert (mu, sigma) == pytest.approx((-0.6, math.sqrt(9.64)), abs=1e-5)


def test_the_control_is_as_sure_of_the_label_as_the_teacher_and_knows_no_more(lesson):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(50, 7), torch.randint(7, (50,))
    p = (lesson.smoothed_answers(logits, labels, 2.5) / 2.5).softmax(1)
    share = (logits / 2.5).softmax(1)[range(50), labels].mean()
    expected = torch.where(F.one_hot(labels, 7) == 1, share, (1 - share) / 6)
    torch.testing.assert_close(p, expected)


def test_a_probe_reads_what_is_in_the_features_and_nothing_else(lesson):
    torch.manual_seed(0)
    few, test = ((torch.eye(10)[y], y) for y in (torch.randint(10, (n,)) for n in (200, 1000)))
    assert lesson.linear_probe(torch.nn.Identity(), few, test) == 1
    shuffled = few[0], few[1][torch.randperm(200)]
    assert lesson.linear_probe(torch.nn.Identity(), shuffled, test) < 0.4


def test_main_measures_what_the_formulas_say(measured, events):
    result, log_dir, out = measured
    fits, rows = result["fits"], result["temperature"]
    for d in (2.0, 3.0):  # the moments of the mixture
        sigma = math.sqrt(1 + d**2 - (0.2 * d) ** 2)
        assert fits[d, "forward", 0.0][:2] == pytest.approx((-0.2 * d, sigma), abs=1e-5)
    assert fits[3.0, "reverse", -3.0] == pytest.approx((-3, 1, -math.log(0.6)), abs=0.04)
    assert fits[3.0, "reverse", 0.0][2] > 0.8
    assert fits[2.0, "reverse", -2.0] == pytest.approx(fits[2.0, "reverse", 0.0], abs=1e-5)
    for (d, order, start), fit in fits.items():
        name = {"forward": "KL(p || q)", "reverse": "KL(q || p)"}[order]
        shown = f"{fit[0]:7.4f}   {fit[1]:6.4f}   {fit[2]:6.4f}\n"
        assert f"   +-{d:<5g}  {name}   {start:11.1f}   {shown}" in out
        run = events(log_dir / f"fit_{d:g}" / f"{order}_from_{start:g}").Scalars("fit/density")
        drawn = torch.tensor([event.value for event in run])
        x = torch.linspace(-9, 9, 181)
        torch.testing.assert_close(drawn, Normal(fit[0], fit[1]).log_prob(x).exp())
    target = events(log_dir / "fit_3" / "target").Scalars("fit/density")
    assert [target[k].value for k in (60, 120)] == pytest.approx(
        [0.6 / math.sqrt(2 * math.pi), 0.4 / math.sqrt(2 * math.pi)], rel=1e-3
    )
    for end in (
        "+-2: the least KL(q || p), 0.2303, is at sigma 2.02;",
        "+-3: the least KL(q || p), 0.5074, is at sigma 1.02;",
        "the least KL(p || q) at 2.20; each mode has sigma 1",
        "the least KL(p || q) at 3.10; each mode has sigma 1",
    ):
        assert end + "\n" in out
    for T, (raw, scaled) in rows.items():
        assert scaled == pytest.approx(T**2 * raw)
        assert f"   {T:3}   {raw:14.5f}   {scaled:19.4f}\n" in out
    assert list(rows) == [1, 4, 16, 64] and 0.4 < rows[64][1] / rows[1][1] < 2.5
    falls = rows[1][0] / rows[64][0]
    assert f"the first gets {falls:,.0f} times smaller, the second\n" in out
    assert f"      {rows[64][1] / rows[1][1]:.1f} times what it was: without T^2" in out
    assert result["least"] > 0 and f"of the 1,000 is {result['least']:.4f}, above 0" in out
    for head in (
        "call                                            value   what it is",
        "of                           mean   torch's   ours minus torch's, largest",
        "modes    made small   start of mu        mu    sigma       KL",
        "T   F.kl_div alone   soft_loss, with T^2",
        "network    learns from                                   accuracy",
        "outputs of                          accuracy",
    ):
        assert out.count(head) == 1
    for i in range(1, 6):
        assert sum(line.startswith(f"{i}. ") for line in out.splitlines()) == 1
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {log_dir}   http")


def test_another_fit_of_one_mode_is_no_worse_than_that_mode(lesson):
    assert lesson.fit_gaussian("reverse", 3.0) == pytest.approx((3, 1, -math.log(0.4)), abs=0.04)


def test_main_soft_labels_teach_more_than_hard_ones_and_more_than_softness(measured, events):
    ends, log_dir, out = measured[0]["distillation"], *measured[1:]
    assert ends["soft"] > ends["hard"] + 0.02
    assert ends["soft"] > ends["smoothed"] + 0.005
    firsts = set()
    for name in ("hard", "smoothed", "soft"):
        curve = events(log_dir / "distillation" / name).Scalars("val/accuracy")
        assert len(curve) == SMALL["epochs"][0] + 1
        assert curve[-1].value == pytest.approx(ends[name], abs=1e-6)
        firsts.add(curve[0].value)
    assert len(firsts) == 1  # the same start
    best = max(("hard", "smoothed", "soft"), key=ends.get)
    assert (
        best == "soft" and f"teacher's answers to them: {ends['soft'] - ends['hard']:.3f}\n" in out
    )
    assert f"softness alone brings {ends['smoothed'] - ends['hard']:.3f} of that\n" in out
    for name, words in (("teacher", "4,000 labels"), ("hard", "300 labels"),
                        ("smoothed", "these, softened equally over wrong classes"),
                        ("soft", "these and the teacher's answers to them")):  # fmt: skip
        assert f"   {words:<42}   {ends[name]:8.3f}\n" in out


def test_main_seed_beats_the_start_the_points_and_an_untrained_teacher(measured, events):
    probes, log_dir, out = measured[0]["seed"], *measured[1:]
    copied, start = probes["a student, teacher"], probes["a student at the start"]
    assert copied > start + 0.1
    assert copied > probes["none: the points themselves"] + 0.04
    assert copied > probes["a student, untrained_teacher"] + 0.02
    for name in ("no_teacher", "untrained_teacher", "teacher"):
        curve = events(log_dir / "seed" / name).Scalars("probe/accuracy")
        assert len(curve) == SMALL["epochs"][1] + 1
        assert curve[-1].value == pytest.approx(probes[f"a student, {name}"], abs=1e-6)
        assert curve[0].value == pytest.approx(start, abs=1e-6)
    for name, value in probes.items():
        shown = name.replace("no_teacher", "by InfoNCE alone").replace("_", " ")
        assert f"   {shown:<33}   {value:8.3f}\n" in out
    blind = probes["a student, untrained_teacher"]
    alone = probes["a student, no_teacher"]
    assert (
        f"-> copied from a trained teacher {copied:.3f}, from an untrained one {blind:.3f};" in out
    )
    assert f"      without a teacher {alone:.3f}\n" in out
