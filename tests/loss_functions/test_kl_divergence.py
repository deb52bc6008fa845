import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal
from torch.distributions import kl_divergence as torch_kl

SMALL = {"samples": 20_000, "labels": 300, "unlabelled": 2000, "epochs": (60, 10)}


@pytest.fixture(scope="module")
def lesson(load):
    return load("loss_functions/kl_divergence.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("runs")
    return lesson.main(seed=request.param, log_dir=log_dir, **SMALL), log_dir


def test_kl_by_hand_and_where_a_probability_is_0(lesson):
    p = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.75, 0.0], [0.5, 0.5, 0.0]])
    kl = lesson.kl_divergence(p, q)
    assert kl[0].item() == pytest.approx(math.log(2)) and kl[1] == 0 and kl[2] == math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_is_torchs_is_never_negative_and_has_its_gradient(lesson, dtype):
    torch.manual_seed(0)
    a, b = (3 * torch.randn(2, 50, 7, dtype=dtype)).unbind()
    leaves = [z.clone().requires_grad_() for z in (a, b, a, b)]
    ours = lesson.kl_divergence(leaves[0].softmax(-1), leaves[1].softmax(-1))
    theirs = torch_kl(Categorical(logits=leaves[2]), Categorical(logits=leaves[3]))
    torch.testing.assert_close(ours, theirs)
    assert (ours > 0).all() and not torch.allclose(
        ours, lesson.kl_divergence(b.softmax(-1), a.softmax(-1))
    )
    ours.sum().backward()
    theirs.sum().backward()
    for mine, other in zip(leaves[:2], leaves[2:], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_gaussian_form_is_torchs(lesson):
    torch.manual_seed(0)
    m_p, m_q = torch.randn(2, 9, dtype=torch.float64)
    s_p, s_q = torch.rand(2, 9, dtype=torch.float64) + 0.1
    ours = lesson.gaussian_kl(m_p, s_p, m_q, s_q)
    torch.testing.assert_close(ours, torch_kl(Normal(m_p, s_p), Normal(m_q, s_q)))


@pytest.mark.parametrize("T", [1.0, 3.5, 20.0])
def test_soft_loss_is_kl_times_t_squared_with_its_gradient(lesson, T):
    torch.manual_seed(0)
    z, v = torch.randn(2, 6, 5, dtype=torch.float64)
    z.requires_grad_()
    loss = lesson.soft_loss(z, v, T)
    p, q = (v / T).softmax(1), (z / T).softmax(1)
    torch.testing.assert_close(loss, T**2 * (p * (p / q).log()).sum(1).mean())
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, T * (q - p).detach() / 6)


def test_distillation_loss_mixes_soft_and_hard(lesson):
    torch.manual_seed(0)
    z, v, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    hard, soft = F.cross_entropy(z, labels), lesson.soft_loss(z, v, 2.5)
    mixed = lesson.distillation_loss(z, v, labels, T=2.5, alpha=0.3)
    torch.testing.assert_close(mixed, 0.3 * soft + 0.7 * hard)
    torch.testing.assert_close(lesson.distillation_loss(z, v, labels, alpha=0.0), hard)


def test_seed_loss_by_a_loop(lesson):
    torch.manual_seed(0)
    student, teacher, queue = torch.randn(3, 4), torch.randn(3, 4), torch.randn(6, 4)
    unit = [F.normalize(z, dim=1) for z in (student, teacher, queue)]
    total = 0.0
    for s, t in zip(*unit[:2], strict=True):
        candidates = [*unit[2], t]
        p = torch.stack([t @ d / 0.3 for d in candidates]).softmax(0)
        q = torch.stack([s @ d / 0.7 for d in candidates]).softmax(0)
        total -= (p * q.log()).sum() / 3
    ours = lesson.seed_loss(student, teacher, queue, student_t=0.7, teacher_t=0.3)
    torch.testing.assert_close(ours, total)


def test_seed_loss_is_kl_plus_the_teachers_entropy_and_teaches_the_student_alone(lesson):
    torch.manual_seed(0)
    student, teacher, queue = torch.randn(3, 4), torch.randn(3, 4), torch.randn(6, 4)
    for z in (student, teacher):
        z.requires_grad_()
    lesson.seed_loss(student, teacher, queue).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    best = lesson.seed_loss(teacher, teacher, queue, student_t=0.1, teacher_t=0.1)
    assert best < lesson.seed_loss(student, teacher, queue, student_t=0.1, teacher_t=0.1)


@pytest.mark.parametrize("name", ["kl_divergence", "soft_loss", "seed_loss"])
def test_shapes_that_would_broadcast_are_refused(lesson, name):
    more = {"kl_divergence": (), "soft_loss": (2.0,), "seed_loss": (torch.randn(5, 3),)}[name]
    with pytest.raises(ValueError, match=r"need equal shapes, not \(4, 3\) and \(1, 3\)"):
        getattr(lesson, name)(torch.ones(4, 3) / 3, torch.ones(1, 3) / 3, *more)


def test_try_reverse_kl_locks_on_the_mode_it_starts_near(lesson):
    mean, std, kl = lesson.fit_gaussian("reverse", 2.0)
    assert (mean, std) == pytest.approx((3, 1), abs=0.04)
    assert kl == pytest.approx(-math.log(0.4), abs=0.01)


@pytest.mark.parametrize("start", [-4.0, 0.0, 5.0])
def test_forward_kl_takes_the_moments_from_anywhere(lesson, start):
    mean, std, _ = lesson.fit_gaussian("forward", start, std=2.0)
    assert (mean, std) == pytest.approx((-0.6, math.sqrt(9.64)), abs=1e-5)


def test_a_picture_has_its_line_where_the_curve_is(lesson):
    values = torch.tensor([0.0, 0.5, 1.0])
    image = lesson.picture({(1.0, 0.0, 0.0): values}, height=101)
    assert image.shape == (3, 101, 3)
    assert image[:, 100, 0].tolist() == [1, 0, 0] and image[:, 5, 2].tolist() == [1, 0, 0]
    assert image[:, 5, 0].tolist() == [1, 1, 1]


def test_main_measures_what_the_formulas_say(measured, events):
    result, log_dir = measured
    definition, kl_div = result["definition"], result["kl_div"]
    assert abs(definition["monte_carlo"] - definition["closed"]) < 4 * definition["error"] < 0.05
    assert kl_div["batchmean"] == pytest.approx(5 * kl_div["mean"]) == pytest.approx(kl_div["ours"])
    assert result["fits"]["forward"][:2] == pytest.approx((-0.6, 3.10484), abs=1e-5)
    assert result["fits"]["reverse_left"][2] == pytest.approx(-math.log(0.6), abs=0.005)
    rows, limit = result["temperature"]
    assert rows[256][1] == pytest.approx(limit, rel=0.01)
    assert rows[256][0] < 1e-3 * rows[1][0] < rows[1][1]
    for name in ("forward", "reverse_left", "reverse_right"):
        assert len(events(log_dir / "fit" / name).Images("fit/densities")) == 1


def test_main_students_learn_from_the_teacher(measured):
    distilled, mimic = measured[0]["distillation"], measured[0]["seed"]
    assert distilled["soft"] > distilled["hard"] + 0.02
    assert mimic["seed"] > mimic["student as it started"] + 0.15
    assert mimic["seed"] > mimic["untrained_teacher"] + 0.05
