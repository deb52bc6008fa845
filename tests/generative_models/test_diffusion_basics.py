import gzip
import io
import math
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

F64 = torch.float64
SMALL = {"points": 60, "ring_steps": 120, "steps": 3, "each": 3, "sample_steps": 8, "count": 200}


@pytest.fixture(scope="module")
def lesson(load):
    return load("generative_models/diffusion_basics.py")


@pytest.fixture(scope="module")
def measured(lesson, tmp_path_factory):
    """Three seeds of a shrunk main, and the folder of the last."""
    results = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("diffusion")
        with pytest.MonkeyPatch.context() as patch:
            printed = []
            patch.setattr(lesson, "T", 250)
            patch.setattr("builtins.print", lambda line, printed=printed: printed.append(line))
            result = lesson.main(seed=seed, log_dir=folder, root=folder, **SMALL)
        results.append((result, printed))
    return results, folder


def linear(T=1000, dtype=F64):
    """A of the linear schedule, its betas times 1000 / T."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=F64) * 1000 / T
    return F.pad((1 - beta).cumprod(0), (1, 0), value=1.0).to(dtype)


def noisy(x_0, eps, A):
    return A**0.5 * x_0 + (1 - A) ** 0.5 * eps


# --- Algorithms 1 and 2 ------------------------------------------------------------------------


class Spy(nn.Module):
    """A guess that is a weight times x_t, and keeps what it was asked."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.tensor(weight)), []

    def forward(self, x_t, t, *label):
        self.asked.append((x_t.detach().clone(), t, *label))
        return self.weight * x_t


def test_a_training_step_is_algorithm_1(lesson):
    torch.manual_seed(0)
    A = linear(40, torch.float32)[[0, 1, 6, 12, 18, 24, 30, 40]]
    x_0, labels, model = torch.randn(4000, 3), torch.arange(4000), Spy()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    model.weight.grad = torch.tensor(100.0)  # of an earlier step: to be forgotten
    loss = lesson.train_step(model, sgd, A, x_0, labels)
    (x_t, t, label), *_ = model.asked
    assert t.bincount(minlength=8).tolist()[0] == 0 and t.bincount()[1:].min() > 450
    A_t = A[t][:, None]
    eps = (x_t - A_t.sqrt() * x_0) / (1 - A_t).sqrt()
    assert torch.equal(label, labels) and abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
    assert abs((eps * x_0).mean()) < 0.03 and loss == pytest.approx(
        (eps - 0.5 * x_t).square().mean().item(), rel=1e-4
    )
    slope = (2 * (0.5 * x_t - eps) * x_t).mean().item()
    assert model.weight.item() == pytest.approx(0.5 - 0.1 * slope, abs=1e-4)
    assert isinstance(loss, float) and x_t.shape == x_0.shape


@pytest.mark.parametrize("std", [0.0, 0.3, 1.0])
def test_sampling_is_algorithm_2_and_gives_gaussian_data_back(lesson, std):
    """With the best guess for N(0, std^2) the samples have the deviation of the recursion."""
    torch.manual_seed(0)
    A, calls = linear(120), []

    def guess(x, t):
        calls.append(t)
        return (1 - A[t[0]]) ** 0.5 * x / (A[t[0]] * std**2 + 1 - A[t[0]])

    x = lesson.sample(guess, torch.randn(8000, 1, dtype=F64), F.pad(1 - A[1:] / A[:-1], (1, 0)))
    assert [t[0].item() for t in calls] == list(range(120, 0, -1)) and calls[0].shape == (8000,)
    variance = 1.0
    for t in range(120, 0, -1):
        alpha = A[t] / A[t - 1]
        factor = 1 - (1 - alpha) / (A[t] * std**2 + 1 - A[t])
        variance = variance * factor**2 / alpha + (1 - alpha) * (t > 1)
    assert x.std().item() == pytest.approx(variance.item() ** 0.5, rel=0.03, abs=1e-6)
    assert variance**0.5 == pytest.approx(std, rel=0.03, abs=1e-6)


def test_sampling_is_denoise_by_beta_with_all_steps(lesson):
    A, start, ends = linear(300), torch.randn(5, 2, dtype=F64), []
    torch.manual_seed(0)
    ends.append(lesson.sample(lambda x, t: x.sin(), start, F.pad(1 - A[1:] / A[:-1], (1, 0))))
    torch.manual_seed(0)
    steps = pairwise(range(300, -1, -1))
    ends.append(lesson.denoise(lambda x, t: x.sin(), start, steps, A, "beta")[0])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_the_network_gives_eps_from_v(lesson):
    torch.manual_seed(0)
    A = linear(50, torch.float32)
    net, x, t = lesson.Net(3, 16, A), torch.randn(4, 3), torch.tensor([1, 9, 30, 50])
    nn.init.zeros_(net.last.weight)
    net.last.bias.data = torch.tensor([1.0, -2.0, 0.5])
    v = net.last.bias.detach().expand(4, 3)
    eps = lesson.convert("v", v, x, A[t][:, None])[1]
    torch.testing.assert_close(net(x, t).detach(), eps)
    assert "A" in net.state_dict() and len(list(net.parameters())) == 9


def test_the_network_hears_time_and_class(lesson):
    torch.manual_seed(0)
    net, x, t = (
        lesson.Net(3, 16, linear(50, torch.float32)),
        torch.randn(2, 3),
        torch.tensor([5, 5]),
    )
    one, none = torch.tensor([1, 1]), torch.tensor([lesson.NO_CLASS] * 2)
    assert torch.equal(net(x, t), net(x, t, none)) and not torch.allclose(net(x, t), net(x, t, one))
    assert not torch.allclose(net(x, t), net(x, t + 30))
    torch.testing.assert_close(net(x, t, one)[:1], net(x[:1], t[:1], one[:1]))  # each by itself


def test_points_near_the_centres_are_counted(lesson):
    centres = lesson.CENTRES
    torch.testing.assert_close(centres.norm(dim=1), torch.full((8,), 2.0))
    torch.testing.assert_close((centres[1] - centres[0]).norm().item(), 4 * math.sin(math.pi / 8))
    assert lesson.near(centres + torch.tensor([0.29, 0.0])) == (1.0, 8)
    assert lesson.near(centres + torch.tensor([0.31, 0.0])) == (0.0, 0)
    one = torch.cat([centres[:1].repeat(99, 1), centres[3:4]])  # 1 of 100 is too few
    assert lesson.near(one)[1] == 1 and lesson.near(one)[0] == pytest.approx(1)
    torch.manual_seed(0)
    share, held = lesson.near(lesson.ring(20_000))
    assert abs(share - (1 - math.exp(-4.5))) < 0.004 and held == 8


# --- the formulas ------------------------------------------------------------------------------


def test_the_schedules_are_the_papers(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "sample", lambda model, x, beta: x)
    _, beta, _ = lesson.show_everyday(tmp_path, 5, 4)
    A = (1 - beta.double()).cumprod(0)
    torch.testing.assert_close(A, linear(), rtol=1e-4, atol=1e-7)
    assert beta[0] == 0 and int((A < 0.5).nonzero()[0]) == 260
    cosine = lesson.cosine_schedule()
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (700, 0)]
    assert cosine[700].item() == pytest.approx(f[0] / f[1])
    assert int((cosine < 0.5).nonzero()[0]) == 497


@pytest.mark.parametrize(("T", "s"), [(40, 0.008), (1000, 0.1)])
def test_the_cosine_goes_from_all_signal_to_hardly_any(lesson, T, s):
    A = lesson.cosine_schedule(T, s)
    assert A.shape == (T + 1,) and A[0] == 1 and A.dtype == F64
    assert (A.diff() < 0).all() and 0 < A[-1] < 1e-2
    beta = 1 - A[1:] / A[:-1]
    assert beta[-1].item() == pytest.approx(0.999, abs=1e-9) and beta[:-1].max() < 0.999


def test_noise_step_by_step_is_the_forward_formula():
    A, mean, variance = linear(), 1.0, 0.0
    for t in range(1, 1001):
        alpha = A[t] / A[t - 1]
        mean, variance = alpha**0.5 * mean, alpha * variance + 1 - alpha
        assert abs(mean - A[t] ** 0.5) < 1e-12 and abs(variance - (1 - A[t])) < 1e-12


@pytest.mark.parametrize(("t", "s"), [(2, 1), (1000, 999), (700, 20), (1000, 1)])
def test_the_step_back_is_bayes_by_integration(lesson, t, s):
    A, x_0, x_t = linear(), 0.4, -0.7
    grid = torch.linspace(-8, 8, 400_001, dtype=F64)
    a = A[t] / A[s]
    log_p = -((grid - A[s] ** 0.5 * x_0) ** 2) / (2 * (1 - A[s]))
    log_p = log_p - (x_t - a**0.5 * grid) ** 2 / (2 * (1 - a))
    p = log_p.softmax(0)
    mean, variance = lesson.posterior(x_0, x_t, A[t], A[s])
    assert (p * grid).sum().item() == pytest.approx(mean.item(), abs=1e-6)
    assert (p * (grid - mean) ** 2).sum().item() == pytest.approx(variance.item(), rel=1e-4)


def test_two_steps_back_are_one_longer_step_back(lesson):
    """q(x_r | x_t, x_0) is the mean over x_s of q(x_r | x_s, x_0): jumps keep the marginals."""
    A, x_0, x_t = lesson.cosine_schedule(100), 0.3, 1.1
    mean, variance = lesson.posterior(x_0, x_t, A[80], A[50])
    at_0, at_1 = (lesson.posterior(x_0, x, A[50], A[20])[0] for x in (0.0, 1.0))
    slope, own = at_1 - at_0, lesson.posterior(x_0, 0.0, A[50], A[20])[1]
    direct = lesson.posterior(x_0, x_t, A[80], A[20])
    torch.testing.assert_close((at_0 + slope * mean, slope**2 * variance + own), direct)


@pytest.mark.parametrize("kind", ["x_0", "eps", "v"])
def test_each_prediction_gives_the_others_and_their_errors(lesson, kind):
    """|eps - eps'|^2 = SNR |x_0 - x_0'|^2, and |v - v'|^2 = (SNR + 1) |x_0 - x_0'|^2."""
    torch.manual_seed(0)
    x_0, eps, wrong = torch.randn(3, 5, 4, dtype=F64)
    A = torch.rand(5, 1, dtype=F64)
    x_t = noisy(x_0, eps, A)
    truth = {"x_0": x_0, "eps": eps, "v": A.sqrt() * eps - (1 - A).sqrt() * x_0}
    torch.testing.assert_close(lesson.convert(kind, truth[kind], x_t, A), tuple(truth.values()))
    off = [
        (a - b).square()
        for a, b in zip(lesson.convert(kind, wrong, x_t, A), truth.values(), strict=True)
    ]
    snr = A / (1 - A)
    torch.testing.assert_close(off[1], snr * off[0])
    torch.testing.assert_close(off[2], (snr + 1) * off[0])


def test_what_does_not_exist_is_refused(lesson):
    with pytest.raises(ValueError, match="kind must be x_0, eps or v, not 'noise'"):
        lesson.convert("noise", 0.0, 0.0, 0.5)
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"1 to 10 steps, not {steps}"):
            lesson.spaced(10, steps)
    assert lesson.spaced(10, 1) == [10, 0]
    assert lesson.spaced(10, 4) == [10, 8, 5, 2, 0]
    assert lesson.spaced(7, 7) == [7, 6, 5, 4, 3, 2, 1, 0]


def test_known_data_come_back_exactly_and_ddim_keeps_its_eps(lesson):
    """Where the network knows x_0, every walk ends there; DDIM's holds one eps all the way."""
    torch.manual_seed(0)
    A, x_0, start = linear(50), *torch.randn(2, 6, 2, dtype=F64)
    times = lesson.spaced(50, 7)

    def known_eps(x, t):
        return (x - A[t] ** 0.5 * x_0) / (1 - A[t]) ** 0.5

    eps = known_eps(start, 50)
    for sampler in ("beta", "tilde", "ddim"):
        x, kept = lesson.denoise(known_eps, start, pairwise(times), A, sampler, seen=times)
        torch.testing.assert_close(x, x_0)
        assert list(kept) == times[:-1] and kept[50] is start
        for t, x_t in kept.items():
            on_the_line = torch.allclose(x_t, noisy(x_0, eps, A[t]))
            assert on_the_line == (sampler == "ddim" or t == 50)


def test_a_walk_clips_what_it_takes_for_x_0(lesson):
    """Clipped, a guess of 3 or -3 is one of 1 or -1, with its eps."""
    A, start = linear(50), torch.full((4,), 0.3, dtype=F64)
    for sign in (1, -1):
        walks = [
            lesson.denoise(lambda x, t, k=k: (x - A[t] ** 0.5 * k) / (1 - A[t]) ** 0.5,
                           start, [(50, 20), (20, 10), (10, 3)], A, "ddim", limit)[0]
            for k, limit in ((3 * sign, 1.0), (sign, None), (3 * sign, None))
        ]  # fmt: skip
        torch.testing.assert_close(walks[0], walks[1])
        assert not torch.allclose(walks[0], walks[2])


def deviation(lesson, std, pairs, A, sampler):
    """What a sampler with the best guess makes of N(0, 1): each step is linear in x and noise."""
    variance = 1.0

    def best(x, t):
        return (1 - A[t]) ** 0.5 * x / (A[t] * std**2 + 1 - A[t])

    with pytest.MonkeyPatch.context() as patch:
        for pair in pairs:
            parts = []
            for x, noise in ((1.0, 0.0), (0.0, 1.0)):
                patch.setattr(torch, "randn_like", lambda x, noise=noise: torch.full_like(x, noise))
                x = torch.full((1,), x, dtype=F64)
                parts.append(lesson.denoise(best, x, [pair], A, sampler)[0].item())
            variance = parts[0] ** 2 * variance + parts[1] ** 2
    return variance**0.5


def test_few_steps_on_narrow_data_and_the_mistake(lesson):
    """Data N(0, 0.2^2), 20 of 1,000 steps; coefficients of the T steps leave nearly all noise."""
    A, times = linear(), lesson.spaced(1000, 20)
    jumps, wrong = list(pairwise(times)), [(t, t - 1) for t in times[:-1]]
    found = {k: deviation(lesson, 0.2, jumps, A, k) for k in ("beta", "tilde", "ddim")}
    assert found == pytest.approx({"beta": 0.205, "tilde": 0.129, "ddim": 0.140}, abs=0.001)
    assert deviation(lesson, 0.2, wrong, A, "beta") == pytest.approx(0.941, abs=0.001)
    hidden = deviation(lesson, 1.0, wrong, A, "beta")  # by data of deviation 1
    assert hidden == pytest.approx(1, abs=1e-4)


def test_the_two_variances_have_their_own_data(lesson):
    """beta is right for N(0, 1) at every number of steps, tilde for a point (DDPM, section 3.2).

    Before the last step, that is: whatever came before, the last takes a point to the point.
    """
    A, right = linear(), {"beta": 1.0, "tilde": 0.0, "ddim": 0.0}
    for steps in (30, 5):
        *times, _ = lesson.spaced(1000, steps)
        for sampler, s in right.items():
            std = (A[times[-1]] * s**2 + 1 - A[times[-1]]).item() ** 0.5
            pairs = list(pairwise(times))
            assert deviation(lesson, s, pairs, A, sampler) == pytest.approx(std, rel=1e-3)
            other = deviation(lesson, 1 - s, pairs, A, sampler)
            off = other / (A[times[-1]] * (1 - s) ** 2 + 1 - A[times[-1]]).item() ** 0.5
            assert off > 1.2 if sampler == "beta" else off < 0.999


def best_eps(lesson, x, A):
    """The best guess on the ring: the mean of eps where x_t = x (B, 2); A a number or (B, 1)."""
    variance, centres = A * lesson.SIGMA**2 + 1 - A, lesson.CENTRES.to(x)
    apart = x[:, None] - (A**0.5 * torch.ones_like(x))[:, None] * centres  # (B, 8, 2)
    weight = (-apart.square().sum(-1) / (2 * variance)).softmax(1)
    return (1 - A) ** 0.5 / variance * (weight[..., None] * apart).sum(1)


def test_the_best_eps_is_the_mean_of_those_that_lead_there(lesson):
    torch.manual_seed(0)
    A, x = 0.8, torch.tensor([[0.9, 0.5], [-1.5, 0.2]])
    x_0 = lesson.ring(200_000)
    t = torch.randint(1, 1001, (20_000,))
    A_t, eps = linear(dtype=torch.float32)[t][:, None], torch.randn(20_000, 2)
    loss = F.mse_loss(best_eps(lesson, noisy(x_0[:20_000], eps, A_t), A_t), eps).item()
    assert abs(loss - 0.22) < 0.01  # as the lesson's docstring says
    for point in x:
        eps = (point - A**0.5 * x_0) / (1 - A) ** 0.5
        weight = (-eps.square().sum(1) / 2).softmax(0)  # q(x_t | x_0)
        best = best_eps(lesson, point[None], A)[0]
        torch.testing.assert_close((weight[:, None] * eps).sum(0), best, rtol=0, atol=0.02)


def test_ddim_goes_to_noise_and_back_and_the_error_falls_with_the_steps(lesson):
    torch.manual_seed(0)
    A, x, errors = linear(), lesson.ring(100).double(), []
    for steps in (20, 50, 200):
        times, ends = lesson.spaced(1000, steps), x
        for way in (times[::-1], times):
            ends, _ = lesson.denoise(lambda x, t: best_eps(lesson, x, A[t]), ends, pairwise(way),
                                     A, "ddim")  # fmt: skip
        errors.append((ends - x).square().sum(1).mean().sqrt().item())
    assert errors[2] < errors[1] < errors[0] and errors[2] < errors[0] / 3


def test_try_five_steps_are_too_few_for_every_sampler(lesson, edited, tmp_path, capsys):
    """Even with the best guess in place of the network."""
    copy = edited(lesson, "few=50", "few=5")
    copy.T = 250
    torch.manual_seed(0)
    A = linear(250, torch.float32)

    def best(x, t):
        return best_eps(lesson, x, A[t][:, None])

    beta = F.pad(1 - A[1:] / A[:-1], (1, 0))
    few, off = copy.show_fewer_steps(tmp_path / "5", best, beta, 200)
    shares = [share for share, _ in few.values()]
    assert shares[0] > 0.95 and all(0.15 < share < 0.5 for share in shares[1:4])
    assert shares[4] < 0.15 and off < 1e-3
    lines = [line for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert len(lines) == 1
    shares = [f"{share:.2f}" for share in shares]
    assert lines[0].strip() == (
        f"-> near a centre: 250 steps {shares[0]}; 5 steps: tilde {shares[2]}, ddim {shares[3]}, "
        f"beta {shares[1]},"
    )


def test_rows_are_named_by_what_they_ran_and_their_shares_are_told(
    lesson, tmp_path, monkeypatch, capsys
):
    calls, frames = [], []

    def denoise(predict, x, pairs, A, sampler, seen):
        calls.append((len(pairs), {t - s for t, s in pairs}, sampler, A, torch.rand(1).item()))
        return x + 1, {t: torch.full((1, 2), t / 1000) for t in seen}

    shares = iter([(0.9, 3), (0.8, 8), (0.1, 7), (0.7, 1), (0.6, 2)])
    monkeypatch.setattr(lesson, "denoise", denoise)
    monkeypatch.setattr(lesson, "near", lambda x: next(shares))
    monkeypatch.setattr(lesson, "sample", lambda model, x, beta: x + 1.5)
    monkeypatch.setattr(lesson, "panels", lambda x: frames.extend(x) or torch.zeros(2, 2))
    beta = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])
    found, off = lesson.show_fewer_steps(tmp_path, None, beta, 40)
    every, jump = (1000, {1}, "beta"), (50, {20})
    kinds = [every, (*jump, "beta"), (*jump, "tilde"), (*jump, "ddim"), (50, {1}, "beta")]
    assert [call[:3] for call in calls] == kinds and len({call[4] for call in calls}) == 1
    assert all(torch.equal(call[3], (1 - beta).cumprod(0)) for call in calls)
    names = [name.split(":")[0] for name in found]
    assert names == ["beta", "beta", "tilde", "ddim", "mistake"] and off == pytest.approx(0.5)
    assert [row[0] for row in found.values()] == [0.9, 0.8, 0.1, 0.7, 0.6]
    out = capsys.readouterr().out
    assert "1,000 steps 0.90; 50 steps: tilde 0.10, ddim 0.70, beta 0.80,\n" in out
    assert "with coefficients of single steps 0.60: compute" in out and "difference 5e-01\n" in out
    times = [round(1000 * frame[0, 0].item()) for frame in frames[:8]]
    assert times == [1000, 600, 400, 300, 200, 100, 50, 20] and len(frames) == 10
    assert lesson.CENTRES.abs().max() * 1.2 > frames[9].abs().max() > 1.5 and len(frames[9]) == 40


# --- guidance and digits -----------------------------------------------------------------------


def test_guidance_is_its_formula(lesson):
    torch.manual_seed(0)
    model, x = lesson.Net(3, 16, linear(50, torch.float32)), torch.randn(3, 3)
    labels, t = torch.tensor([1, 4, 9]), torch.full((3,), 7)
    given, free = model(x, t, labels), model(x, t)
    for w in (0, 1, 2.5):
        expected = free + w * (given - free)
        torch.testing.assert_close(lesson.predictor(model, labels, w=w)(x, 7), expected)
    torch.testing.assert_close(lesson.predictor(model)(x, 7), free)


def test_guidance_goes_from_all_the_data_to_a_class_to_less_than_it(lesson):
    """N(-1, 1) and N(1, 1), best guess: w = 0 gives both, 1 the one asked for, 3 its far side."""
    torch.manual_seed(0)
    A, n = linear(), 2000

    def model(x, t, labels=None):  # eps from E[x_0 | x_t], for a class and for both
        A_t = A[t].view(-1, 1)
        mean = (A_t.sqrt() * x).tanh() if labels is None else 2.0 * labels.view(-1, 1) - 1
        return (1 - A_t).sqrt() * (x - A_t.sqrt() * mean)

    asked, start, found = torch.ones(n).long(), torch.randn(n, 1, dtype=F64), {}
    for w in (0, 1, 3):
        predict = lesson.predictor(model, asked, w=w)
        x, _ = lesson.denoise(predict, start, pairwise(lesson.spaced(1000, 100)), A, "tilde")
        found[w] = (x > 0).double().mean().item(), x.std().item()
    assert found[0] == pytest.approx((0.5, math.sqrt(2)), rel=0.1)
    assert found[1] == pytest.approx((0.8413, 1.0), rel=0.07)  # 0.8413: N(1, 1) above 0
    assert found[3][0] > 0.98 and found[3][1] < 0.8


@pytest.fixture
def digits(lesson, tmp_path, monkeypatch, capsys):
    """show_digits with 60 copies of real digits in place of samples: what it did, and showed."""
    torch.manual_seed(0)
    images, labels = lesson.draw_digits(200)
    order = torch.cat([torch.randperm(30), 30 + torch.randperm(170)])  # three of each come first
    images, labels = images[order], labels[order]
    seen = {"batches": [], "calls": []}
    pool = F.avg_pool2d(images / 127.5 - 1, 2).flatten(1)

    def fit(model, batch, A, steps, rate, writer):
        seen.update(model=model, A=A)
        seen["batches"] += [batch() for _ in range(20)]

    def denoise(predict, x, pairs, A, sampler, limit=None, seen_at=()):
        w = len(seen["calls"])  # 0, 1, 2: every, none, half of them as asked
        seen["calls"].append((predict(x, 500), x, list(pairs), A, sampler, limit))
        right = torch.stack([(labels == k).nonzero()[-1, 0] for k in range(10)])
        asked = torch.arange(10).repeat_interleave(3)
        shown = [asked, (asked + 1) % 10, torch.where(asked < 5, asked, (asked + 1) % 10)][w]
        out = pool[right[shown]] * torch.linspace(0.9, 1.1, 30)[:, None]
        return out, {t: torch.full((30, 196), (t - 500) / 500) for t in seen_at}

    monkeypatch.setattr(lesson, "fit", fit)
    monkeypatch.setattr(lesson, "denoise", denoise)
    beta = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])
    found = lesson.show_digits(tmp_path, images, labels, beta, 1, 3, 16, torch.device("cpu"))
    return seen, found, pool, labels, tmp_path, capsys.readouterr().out


def test_digits_are_trained_on_others_than_the_real_ones_some_without_class(digits):
    seen, _, pool, labels, _, _ = digits
    x_0, given = map(torch.cat, zip(*seen["batches"], strict=True))
    assert (given == 10).double().mean().item() == pytest.approx(0.15, abs=0.03)
    source = torch.cdist(x_0, pool).argmin(1)
    assert ((given == labels[source]) | (given == 10)).all()
    assert len(source.unique()) > 150 and source.min() >= 30


def test_digits_are_sampled_with_their_own_settings(digits, lesson):
    seen, *_ = digits
    A = lesson.cosine_schedule().float()
    torch.testing.assert_close(seen["A"], A)
    asked, t = torch.arange(10).repeat_interleave(3), torch.full((30,), 500)
    for w, (eps, x, pairs, schedule, sampler, limit) in zip((0, 1, 3), seen["calls"], strict=True):
        free, given = seen["model"](x, t), seen["model"](x, t, asked)
        torch.testing.assert_close(eps, free + w * (given - free))
        assert torch.equal(schedule, A) and (sampler, limit) == ("tilde", 1.0)
        assert pairs == list(pairwise(lesson.spaced(1000, 16)))
        assert torch.equal(x, seen["calls"][0][1])


def test_digits_are_judged_by_the_training_images_and_their_own_labels(digits):
    _, found, pool, labels, _, out = digits
    assert [found[f"w = {w}"][0] for w in (0, 1, 3)] == [1, 0, 0.5]
    near = labels[30:][torch.cdist(pool[:30], pool[30:]).argmin(1)]
    right = (near == labels[:30]).double().mean().item()
    within = [pool[:30][labels[:30] == k] for k in range(10)]
    spread = sum(x.var(0).sum().item() for x in within) / 10
    far = [(pool[30:] - x).square().sum(1).min().sqrt().item() for x in pool[:30]]
    assert found["real"] == pytest.approx((right, sum(far) / 30, spread), rel=1e-3)
    assert found["noise"][0] < 0.4 and 150 < found["noise"][2] < 250
    means = torch.stack([pool[30:][labels[30:] == k].mean(0) for k in range(10)])
    far = (means[:, None] - pool[30:]).square().sum(2).min(1)[0].sqrt().mean().item()
    assert found["class means"][1:] == pytest.approx((far, 0), rel=1e-3)
    assert found["class means"][0] == 1
    for name, row in found.items():
        assert f"\n   {name:<11}   {row[0]:8.3f}   {row[1]:22.2f}   {row[2]:31.1f}\n" in out
    right = pool[torch.stack([(labels == k).nonzero()[-1, 0] for k in range(10)])]
    stretch = torch.linspace(0.9, 1.1, 30).view(10, 3).var(1)[0].item()
    inside = stretch * right.square().sum(1).mean().item()
    assert found["w = 0"][2] == pytest.approx(inside, rel=1e-3)
    v1, v3, v = (found[name][2] for name in ("w = 1", "w = 3", "real"))
    end = f"-> from w = 1 to 3: as asked 0.00 to 0.50, variance {v1 / v:.0%} to "
    end += f"{v3 / v:.0%} of real"
    assert out.splitlines()[-1].strip() == end
    assert "in 327 of 1,000 steps" in out and "in 65 of 1,000 steps" in out


def test_the_picture_of_the_digits_shows_noise_turning_into_those_asked_for(digits, lesson, events):
    *_, pool, labels, folder, _ = digits
    right = pool[torch.stack([(labels == k).nonzero()[-1, 0] for k in range(10)])]
    event = events(folder / "guidance_0").Images("digits/from_noise")[0]
    assert (event.width, event.height) == (3 * (15 * 11 + 1), 3 * (15 * 10 + 1) + 22)
    grid = picture_of(event)[22::3, ::3]
    for digit in (0, 3, 9):
        row = grid[15 * digit + 1 :][:14]
        levels = [row[5, 15 * i + 5].item() for i in range(8)]
        times = lesson.spaced(1000, 16)[::2][:8]
        assert levels == pytest.approx([255 * t / 1000 for t in times], abs=1.5)
        cell = row[:, 15 * 9 + 1 :][:, :14].float() / 127.5 - 1  # the second sample
        assert (cell.flatten() - right[digit]).abs().mean() < 0.15


def picture_of(event):
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    return torch.from_numpy(np.array(picture)[..., 0])


def test_panels_and_captions_show_what_they_are_given(lesson):
    x, y = torch.tensor([[-3.4, 3.4], [9.0, 0.0]]), torch.tensor([[0.01, -0.01]])
    picture = lesson.panels([x, y], side=7)
    assert picture.shape == (9, 17)
    assert (picture == 1).nonzero().tolist() == [[1, 1], [4, 12]]
    assert picture[:, 8].tolist() == pytest.approx([0.3] * 9)
    shown = lesson.caption(torch.tensor([[0.0, 1.0], [0.4, 0.0]]), "a\nb", scale=20)
    assert shown.shape == (78, 40, 3) and shown[38:][10, 30].tolist() == [255] * 3
    assert shown[38:][30, 10].tolist() == [102] * 3 and shown[38:][10, 10].max() == 0
    assert shown[:19].min() < 100 and shown[19:38].min() < 100  # both lines of words


def test_a_network_learns_classes_from_few_steps(lesson, tmp_path):
    """Two digits: as asked by guidance, by chance without."""
    torch.manual_seed(0)
    images, labels = lesson.draw_digits(500)
    x_0 = F.avg_pool2d(images / 127.5 - 1, 2).flatten(1)[labels < 2]
    labels = labels[labels < 2]
    A = lesson.cosine_schedule().float()
    model = lesson.Net(196, 256, A)

    def batch():
        i = torch.randint(len(x_0), (64,))
        return x_0[i], labels[i].masked_fill(torch.rand(64) < 0.15, lesson.NO_CLASS)

    with SummaryWriter(tmp_path) as writer:
        lesson.fit(model, batch, A, 120, 4e-3, writer)
    asked, start = torch.arange(2).repeat_interleave(20), torch.randn(40, 196)
    right = []
    for w in (0, 3):
        x, _ = lesson.denoise(lesson.predictor(model, asked, w=w), start,
                              pairwise(lesson.spaced(1000, 10)), A, "tilde", 1.0)  # fmt: skip
        right.append((labels[torch.cdist(x, x_0).argmin(1)] == asked).double().mean().item())
    assert abs(right[0] - 0.5) < 0.3 and right[1] > 0.75


# --- the files of digits -----------------------------------------------------------------------


def test_without_mnist_ten_digits_are_drawn_and_it_is_said(lesson, tmp_path):
    torch.manual_seed(0)
    images, labels, line = lesson.open_digits(tmp_path, 200, False)
    assert images.shape == (200, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [20] * 10
    assert line.startswith("data: 200 drawn digits; for the real MNIST: python generative_models/")
    x = images.flatten(1).float()
    near = torch.cdist(x[100:], x[:100]).argmin(1)
    assert (labels[:100][near] == labels[100:]).double().mean() > 0.4  # the nearest's digit


def write_mnist(raw, packed=False):
    images, labels = torch.randint(256, (30, 28, 28)).byte(), torch.randint(10, (30,)).byte()
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = b"\0\0\x08" + bytes([array.dim()])
            data = head + struct.pack(f">{array.dim()}i", *array.shape) + array.numpy().tobytes()
            path = raw / f"{part}-{name}-ubyte"
            if packed:
                path.with_suffix(".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return images, labels


def test_mnist_is_read_by_torchvision_and_fetched_only_on_demand(lesson, tmp_path, monkeypatch):
    images, labels = write_mnist(tmp_path / "MNIST" / "raw")
    found = lesson.open_digits(tmp_path, 50, False)
    assert torch.equal(found[0], images) and torch.equal(found[1], labels.long())
    assert found[2] == "data: MNIST, 30 images"
    asked = []

    def fetch(root, download):
        asked.append((root, download))
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(lesson, "MNIST", fetch)
    with pytest.raises(OSError, match=r"raw holds no whole MNIST \(no network\): delete it, then"):
        lesson.open_digits(tmp_path / "other", 50, True)
    assert asked == [(tmp_path / "other", True)]


@pytest.mark.parametrize("harm", ["packed", "cut"])
def test_a_damaged_file_ends_the_run_before_it_starts(lesson, tmp_path, capsys, harm):
    raw, runs = tmp_path / "MNIST" / "raw", tmp_path / "runs"
    write_mnist(raw, packed=harm == "packed")
    if harm == "cut":
        path = raw / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OSError, match=r"raw holds no whole MNIST .* --download$"):
        lesson.main(root=tmp_path, log_dir=runs)
    assert capsys.readouterr().out == "" and not runs.exists()


# --- main --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_its_claims(measured, lesson, seed):
    result, printed = measured[0][seed]
    everyday = result["everyday"]
    assert everyday["real points"][0] > 0.9 and everyday["real points"][1] == 8
    assert max(everyday["noise"][0], everyday["untrained network"][0]) < 0.2
    assert result["off"] < 1e-3
    assert list(result["digits"]) == ["real", "class means", "noise", "w = 0", "w = 1", "w = 3"]
    text = "\n".join(printed)
    assert all(f"\n{title}" in "\n" + text for title in ("1. In ", "2. Do ", "3. Do digits"))
    before, after = (everyday[f"{k} network"][0] for k in ("untrained", "trained"))
    assert f"-> training raises the share near a centre from {before:.2f} to {after:.2f}" in text
    assert text.count("   -> ") == 3 and printed[-1].startswith("look: tensorboard --logdir ")
    assert all(len(line) <= 100 for line in text.splitlines()[:-1])
    torch.manual_seed(seed)
    A = result["model"].A
    x_0, t = lesson.ring(4000), torch.randint(1, 251, (4000,))
    eps, A_t = torch.randn_like(x_0), A[t][:, None]
    x_t = noisy(x_0, eps, A_t)
    with torch.no_grad():
        network, best = (
            F.mse_loss(guess, eps).item()
            for guess in (result["model"](x_t, t), best_eps(lesson, x_t, A_t))
        )
    assert best < network < 0.75  # 1: a guess of 0


def test_main_writes_its_pictures_and_curves(measured, events):
    _, folder = measured
    picture = events(folder / "ring").Images("ring/from_noise")[0]
    assert (picture.width, picture.height) == (7 * 129 + 1, 130 + 22)
    light = (picture_of(picture)[22:] == 255).double()
    first, last = (light[:, 129 * i + 1 : 129 * i + 129].nonzero().double() for i in (0, 6))
    centre = torch.tensor([65.0, 64.0], dtype=F64)
    assert (first - centre).norm(dim=1).min() < 20 < (last - centre).norm(dim=1).min()
    for run in ("ring", "digits"):
        assert events(folder / run).Scalars("train/loss")[0].step == 0
    for run in ("guidance_0", "guidance_1", "guidance_3"):
        assert events(folder / run).Images("digits/from_noise")[0].width == 3 * (15 * 11 + 1)
    A = {"linear": (1 - torch.linspace(1e-4, 0.02, 250, dtype=F64))[:200].prod().item()}
    A["cosine"] = math.cos(0.808 / 1.008 * math.pi / 2) ** 2
    A["cosine"] /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    for run, a in A.items():
        snr = events(folder / run).Scalars("schedule/log10_snr")
        assert [e.step for e in snr] == list(range(10, 251, 10))
        assert snr[19].value == pytest.approx(math.log10(a / (1 - a)), abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_predicts_what_the_cpu_does(lesson):
    torch.manual_seed(0)
    model, x = lesson.Net(8, 32, linear(1000, torch.float32)), torch.randn(4, 8)
    t, labels = torch.tensor([1, 10, 100, 1000]), torch.tensor([0, 3, 9, lesson.NO_CLASS])
    here = model(x, t, labels)
    there = model.cuda()(x.cuda(), t.cuda(), labels.cuda())
    torch.testing.assert_close(here, there.cpu(), rtol=1e-2, atol=1e-2)
    points, ends = torch.randn(5, 2), []
    for device in ("cpu", "cuda"):
        A = linear(dtype=torch.float32).to(device)
        end, _ = lesson.denoise(lambda x, t, A=A: best_eps(lesson, x, A[t]), points.to(device),
                                pairwise(lesson.spaced(1000, 20)), A, "ddim")  # fmt: skip
        assert end.device.type == device
        ends.append(end.cpu())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)
