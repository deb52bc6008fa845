import ast
import gzip
import math
from pathlib import Path

import pytest
import torch

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lesson(load):
    return load("generative_models/diffusion_basics.py")


@pytest.fixture(scope="module")
def measured(lesson, tmp_path_factory):
    """Three seeds of a shrunk main, and the folder of the last."""
    results = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("diffusion")
        results.append(
            lesson.main(seed=seed, log_dir=folder, root=folder, n=2000, points=300, ring_steps=150,
                        steps=4, each=3, sample_steps=4, count=200)
        )  # fmt: skip
    return results, folder


def test_digits_are_those_of_the_vae_lesson(lesson):
    """Both lessons stand alone, so both hold the lines that draw and read."""
    names = {"draw_digits", "open_digits"}
    written = [
        {node.name: ast.unparse(node) for node in ast.parse(path.read_text(encoding="utf-8")).body
         if getattr(node, "name", "") in names}
        for path in (ROOT / "generative_models" / f"{n}_basics.py" for n in ("vae", "diffusion"))
    ]  # fmt: skip
    assert written[0] == written[1] and set(written[0]) == names


def test_a_damaged_file_ends_the_run_before_it_starts(lesson, tmp_path, capsys):
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"\0\0\x08\3")[:-3])
    (path.parent / "train-labels-idx1-ubyte.gz").write_bytes(path.read_bytes())
    runs = tmp_path / "runs"
    with pytest.raises(OSError, match=r"train-images-idx3-ubyte.gz is missing or damaged"):
        lesson.main(root=tmp_path, log_dir=runs)
    assert capsys.readouterr().out == "" and not runs.exists()


@pytest.mark.parametrize("T", [40, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_goes_from_all_signal_to_hardly_any(lesson, name, T):
    A = getattr(lesson, f"{name}_schedule")(T)
    assert A.shape == (T + 1,) and A[0] == 1 and (A.diff() < 0).all() and (A > 0).all()
    assert A[-1] < 1e-2
    beta = 1 - A[1:] / A[:-1]
    assert beta.max() <= 0.9991 if name == "cosine" else beta[-1] == pytest.approx(20 / T)


def test_the_schedules_are_the_papers(lesson):
    linear, cosine = lesson.linear_schedule(), lesson.cosine_schedule()
    product = 1.0
    for t in range(1, 301):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
    assert linear[300].item() == pytest.approx(product)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (700, 0)]
    assert cosine[700].item() == pytest.approx(f[0] / f[1])


@pytest.mark.parametrize(("t", "s"), [(2, 1), (1000, 999), (700, 20), (1000, 1)])
def test_the_step_back_is_bayes_by_integration(lesson, t, s):
    A, x_0, x_t = lesson.linear_schedule(), 0.4, -0.7
    grid = torch.linspace(-8, 8, 400_001, dtype=F64)
    a = A[t] / A[s]
    log_p = -((grid - A[s] ** 0.5 * x_0) ** 2) / (2 * (1 - A[s]))
    log_p = log_p - (x_t - a**0.5 * grid) ** 2 / (2 * (1 - a))
    p = log_p.softmax(0)
    mean, variance = lesson.posterior(x_0, x_t, A[t], A[s])
    assert (p * grid).sum().item() == pytest.approx(mean.item(), abs=1e-6)
    assert (p * (grid - mean) ** 2).sum().item() == pytest.approx(variance.item(), rel=1e-4)
    torch.testing.assert_close(lesson.bayes(x_0, x_t, A[t], A[s]), (mean, variance))


def test_two_steps_back_are_one_longer_step_back(lesson):
    """q(x_r | x_t, x_0) is the mean over x_s of q(x_r | x_s, x_0): respacing keeps marginals."""
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
    x_t = lesson.add_noise(x_0, eps, A)
    v = A.sqrt() * eps - (1 - A).sqrt() * x_0
    truth = {"x_0": x_0, "eps": eps, "v": v}
    torch.testing.assert_close(lesson.convert(kind, truth[kind], x_t, A), tuple(truth.values()))
    off = [
        (a - b).square()
        for a, b in zip(lesson.convert(kind, wrong, x_t, A), truth.values(), strict=True)
    ]
    snr = A / (1 - A)
    torch.testing.assert_close(off[1], snr * off[0])
    torch.testing.assert_close(off[2], (snr + 1) * off[0])


def test_what_does_not_exist_is_refused(lesson):
    with pytest.raises(ValueError, match="with 20 steps beta would reach 1"):
        lesson.linear_schedule(20)
    with pytest.raises(ValueError, match="kind must be x_0, eps or v, not 'noise'"):
        lesson.convert("noise", 0.0, 0.0, 0.5)
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"1 to 10 steps, not {steps}"):
            lesson.spaced(10, steps)
    assert lesson.spaced(10, 4) == [10, 8, 5, 2, 0]
    assert lesson.spaced(7, 7) == [7, 6, 5, 4, 3, 2, 1, 0]


def test_known_data_come_back_exactly_and_ddim_keeps_its_eps(lesson):
    """Where the network knows x_0, every walk ends there; DDIM's holds one eps all the way."""
    torch.manual_seed(0)
    A, x_0, start = lesson.linear_schedule(50), *torch.randn(2, 6, 2, dtype=F64)
    times = lesson.spaced(50, 7)

    def known_eps(x, t):
        return (x - A[t] ** 0.5 * x_0) / (1 - A[t]) ** 0.5

    eps = known_eps(start, 50)
    for sampler in ("beta", "tilde", "ddim"):
        x, kept = lesson.denoise(known_eps, start, times, A, sampler, seen=times)
        torch.testing.assert_close(x, x_0)
        assert list(kept) == times[:-1] and kept[50][0] is start
        for t, (x_t, guess) in kept.items():
            torch.testing.assert_close(guess, x_0)
            on_the_line = torch.allclose(x_t, lesson.add_noise(x_0, eps, A[t]))
            assert on_the_line == (sampler == "ddim" or t == 50)


def test_a_walk_clips_what_it_takes_for_x_0(lesson):
    """Clipped, a guess of 3 is a guess of 1, in what is kept and in the step."""
    A, start = lesson.linear_schedule(50), torch.full((4,), 0.3, dtype=F64)
    walks = [
        lesson.denoise(lambda x, t, k=k: (x - A[t] ** 0.5 * k) / (1 - A[t]) ** 0.5,
                       start, [50, 20, 10, 0], A, "ddim", limit, seen=(20,))
        for k, limit in ((3, 1.0), (1, None))
    ]  # fmt: skip
    torch.testing.assert_close(*walks)
    assert walks[0][1][20][1].tolist() == pytest.approx([1.0] * 4)


def test_the_two_variances_have_their_own_data(lesson):
    """beta is right for N(0, 1) at every number of steps, tilde for a point (DDPM, section 3.2).

    Before the last step, that is: whatever came before, the last takes a point to the point.
    """
    A, right = lesson.linear_schedule(), {"beta": 1.0, "tilde": 0.0, "ddim": 0.0}
    for steps in (1000, 30, 5):
        *times, _ = lesson.spaced(1000, steps)
        for sampler, s in right.items():
            std = (A[times[-1]] * s**2 + 1 - A[times[-1]]).item() ** 0.5
            assert lesson.gaussian_std(s, times, A, sampler) == pytest.approx(std, rel=1e-3)
            other = lesson.gaussian_std(1 - s, times, A, sampler)
            off = other / (A[times[-1]] * (1 - s) ** 2 + 1 - A[times[-1]]).item() ** 0.5
            assert off > 1.2 if sampler == "beta" else off < 0.999


def test_try_standard_normal_data_hide_the_mistake(lesson):
    A, times = lesson.linear_schedule(), lesson.spaced(1000, 20)
    assert lesson.gaussian_std(0.2, times, A, "unchanged") > 4 * 0.2
    off = {k: abs(lesson.gaussian_std(1.0, times, A, k) - 1)
           for k in ("unchanged", "beta", "ddim", "tilde")}  # fmt: skip
    assert off["unchanged"] < 1e-4 and sorted(off, key=off.get) == list(off)


def test_the_best_eps_is_the_mean_of_those_that_lead_there(lesson):
    """By importance: eps = (x_t - sqrt(A) x_0) / sqrt(1 - A), weighted by q(x_t | x_0)."""
    torch.manual_seed(0)
    A, x = 0.8, torch.tensor([[0.9, 0.5], [-1.5, 0.2]])
    x_0 = lesson.ring(200_000)
    for point in x:
        eps = (point - A**0.5 * x_0) / (1 - A) ** 0.5
        weight = (-eps.square().sum(1) / 2).softmax(0)
        best = lesson.best_eps(point[None], A)[0]
        torch.testing.assert_close((weight[:, None] * eps).sum(0), best, rtol=0, atol=0.02)
    rows = lesson.best_eps(x, torch.tensor([[0.8], [0.3]]))
    torch.testing.assert_close(
        rows, torch.cat([lesson.best_eps(x[:1], A), lesson.best_eps(x[1:], 0.3)])
    )
    assert lesson.best_eps(x, torch.tensor(1.0)).abs().max() == 0


def test_the_energy_distance_is_its_double_loop_and_0_for_equals(lesson):
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randn(5, 3) + 1
    cross = sum((a - b).norm() for a in x for b in y) / 35
    own = [sum((a - b).norm() for a in z for b in z) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = (2 * cross - sum(own)).item()
    assert lesson.energy_distance(x, y) == pytest.approx(expected, abs=1e-4)
    same = [lesson.energy_distance(*torch.randn(2, 200, 2)) for _ in range(50)]
    assert abs(sum(same) / 50) < 0.005 and min(same) < 0 < max(same)


def test_time_is_embedded_as_in_a_transformer(lesson):
    t = torch.tensor([0, 3, 1000])
    e = lesson.embed_time(t, size=6)
    for i in range(3):
        angle = t * 1e4 ** (-i / 3)
        torch.testing.assert_close(e[:, i], angle.sin(), rtol=0, atol=1e-4)
        torch.testing.assert_close(e[:, 3 + i], angle.cos(), rtol=0, atol=1e-4)


def test_the_network_hears_time_and_class(lesson):
    torch.manual_seed(0)
    model, x = lesson.UNet(8, 16), torch.randn(2, 1, 16, 16)
    t, labels = torch.tensor([5, 5]), torch.tensor([1, 1])
    out = model(x, t, labels)
    assert out.shape == x.shape
    assert not torch.allclose(out, model(x, t + 300, labels))
    assert not torch.allclose(out, model(x, t, labels + 1))
    torch.testing.assert_close(out[:1], model(x[:1], t[:1], labels[:1]))  # no batch statistics


def test_guidance_is_its_formula(lesson):
    torch.manual_seed(0)
    model, x, labels = lesson.UNet(8, 16), torch.randn(3, 1, 16, 16), torch.tensor([1, 4, 9])
    t = torch.full((3,), 7)
    given, free = model(x, t, labels), model(x, t, torch.full_like(labels, lesson.NO_CLASS))
    for w in (0, 1, 2.5):
        predicted = lesson.guided(model, labels, w)(x, 7)
        torch.testing.assert_close(predicted, free + w * (given - free), rtol=1e-4, atol=1e-5)


def test_guidance_goes_from_all_the_data_to_a_class_to_less_than_it(lesson):
    """N(-1, 1) and N(1, 1), exact eps: w = 0 gives both, 1 the one asked for, 3 its far side."""
    torch.manual_seed(0)
    A, n = lesson.linear_schedule(), 4000

    def model(x, t, labels):  # eps from E[x_0 | x_t], for a class and for both
        A_t, free = A[t].view(-1, 1), (labels == lesson.NO_CLASS).view(-1, 1)
        mean = torch.where(free, (A_t.sqrt() * x).tanh(), 2.0 * labels.view(-1, 1) - 1)
        return (1 - A_t).sqrt() * (x - A_t.sqrt() * mean)

    asked, start, found = torch.ones(n).long(), torch.randn(n, 1, dtype=F64), {}
    for w in (0, 1, 3):
        predict = lesson.guided(model, asked, w)
        x, _ = lesson.denoise(predict, start, lesson.spaced(1000, 200), A, "tilde")
        found[w] = (x > 0).double().mean().item(), x.std().item()
    assert found[0] == pytest.approx((0.5, math.sqrt(2)), rel=0.08)
    assert found[1] == pytest.approx((0.8413, 1.0), rel=0.05)  # 0.8413: N(1, 1) above 0
    assert found[3][0] > 0.98 and found[3][1] < 0.8


def test_the_simple_loss_is_that_of_its_eps(lesson):
    """A model that knows x_0 has loss 0; one that says 0 has loss 1."""
    torch.manual_seed(0)
    A, x_0 = lesson.linear_schedule(100).float(), torch.randn(1000, 3)

    def knows(x_t, t):
        A_t = A[t].view(-1, 1)
        return (x_t - A_t.sqrt() * x_0) / (1 - A_t).sqrt()

    assert lesson.simple_loss(knows, x_0, A) < 1e-6
    assert abs(lesson.simple_loss(lambda x, t: 0 * x, x_0, A) - 1) < 0.1


def test_images_are_shrunk_by_the_mean_and_split_without_overlap(lesson):
    images = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    x = lesson.shrink(images)
    assert x.shape == (1, 1, 16, 16) and x[0, 0, 0, 0] == -1 and x[0, 0, 8, 8] == 1
    labels = torch.arange(100).flip(0) % 10
    parts = lesson.split(labels, 3)
    in_order = torch.arange(10).repeat_interleave(3)
    assert torch.equal(labels[parts[0]], in_order) and torch.equal(labels[parts[1]], in_order)
    assert torch.cat(parts).sort().values.tolist() == list(range(100))


def test_an_image_shows_what_the_nearest_does_and_the_spread_is_within_classes(lesson):
    torch.manual_seed(0)
    real, labels = torch.randn(6, 1, 16, 16), torch.tensor([4, 4, 4, 7, 7, 7])
    near = real[[5, 0, 3]] + 0.1 * torch.randn(3, 1, 16, 16)
    assert lesson.nearest_label(near, real, labels).tolist() == [7, 4, 7]
    far = real + 100.0 * labels.view(-1, 1, 1, 1)
    within = sum(part.flatten(1).var(0).sum().item() for part in (real[:3], real[3:])) / 2
    assert lesson.spread(far, labels) == pytest.approx(within, rel=1e-3)


def test_the_network_is_trained_on_other_digits_a_seventh_without_their_class(
    lesson, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    images, labels = lesson.draw_digits(100)
    batches = []
    monkeypatch.setattr(lesson, "fit", lambda model, batch, *_: batches.extend(batch(2000)))
    lesson.show_digits(tmp_path, images, labels, 1, 2, 1, torch.device("cpu"))
    x_0, given = batches
    assert (given == lesson.NO_CLASS).double().mean().item() == pytest.approx(0.15, abs=0.03)
    every = lesson.shrink(images)
    source = torch.cdist(x_0.flatten(1), every.flatten(1)).argmin(1)
    assert ((given == labels[source]) | (given == lesson.NO_CLASS)).all()
    assert (
        len(source.unique()) == 60 and source.min() == 40
    )  # the first four of each are kept apart


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_its_claims(measured, seed):
    result = measured[0][seed]
    assert result["half"] == {"linear": 260, "cosine": 497}
    samplers = result["samplers"]
    assert samplers["unchanged", 20][1] > 0.9 and abs(samplers["beta", 20][1] - 0.2) < 0.01
    assert samplers["tilde", 20][1] < samplers["tilde", 100][1] < samplers["tilde", 1000][1] < 0.2
    errors = list(result["inversion"].values())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]
    losses, rows = result["losses"], result["distances"]
    assert losses["best"] < losses["network"] < 0.7 * losses["zero"]
    assert rows["real"][1] > 0.95 and rows["noise"][1] < 0.15
    for sampler, steps in (("tilde", 1000), ("tilde", 50), ("beta", 50), ("ddim", 50)):
        assert rows["best", sampler, steps][1] > 0.95
        assert rows["best", sampler, steps][0] < 0.02
        assert rows["network", sampler, steps][0] < rows["noise"][0] / 2
    assert rows["best", "unchanged", 50][1] < 0.25 and rows["best", "unchanged", 50][0] > 0.1
    digits = result["digits"]
    assert digits["real"][0] > 0.5 > digits["noise"][0] and digits["noise"][1] > 200
    assert abs(digits["real"][2]) < 1 < 5 < digits["noise"][2]


def test_main_writes_its_pictures_and_curves(measured, events):
    _, folder = measured
    for w in (0, 1, 3):
        run = events(folder / f"guidance_{w}")
        by_class = run.Images("digits/by_class")[0]
        assert (by_class.height, by_class.width) == (160, 48)
        way = run.Images("digits/from_noise")[0]
        assert (way.height, way.width) == (20 * 16, 5 * 16)
    assert events(folder / "ring").Images("ring/from_noise")[0].width == 10 * 128
    snr = events(folder / "cosine").Scalars("schedule/log10_snr")
    assert [e.step for e in snr] == list(range(10, 1001, 10))
    A = math.cos(0.508 / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert snr[49].value == pytest.approx(math.log10(A / (1 - A)), abs=1e-5)
    assert [e.step for e in events(folder / "sampler_ddim").Scalars("sampling/std")] == [
        20, 100, 1000
    ]  # fmt: skip


def test_a_network_learns_classes_from_few_steps(lesson, tmp_path):
    """Samples of a small U-Net are as asked by guidance, by chance without; so on six seeds."""
    torch.manual_seed(0)
    images, labels = lesson.draw_digits(1000)
    keep = labels < 2  # two digits are learned sooner than ten
    x_0, labels = lesson.shrink(images[keep]), labels[keep]
    A, model = lesson.cosine_schedule().float(), lesson.UNet(8, 64)

    def batch(n=32):
        i = torch.randint(len(x_0), (n,))
        return x_0[i], labels[i].masked_fill(torch.rand(n) < 0.15, lesson.NO_CLASS)

    with lesson.SummaryWriter(tmp_path) as writer:
        lesson.fit(model, batch, A, 100, 1e-2, writer)
    asked, start = torch.arange(2).repeat_interleave(20), torch.randn(40, 1, 16, 16)
    right = [
        (lesson.nearest_label(
            lesson.denoise(lesson.guided(model, asked, w), start, lesson.spaced(1000, 10), A,
                           "tilde", 1.0)[0], x_0, labels) == asked).double().mean()
        for w in (0, 3)
    ]  # fmt: skip
    assert abs(right[0] - 0.5) < 0.25 and right[1] > 0.75


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_predicts_what_the_cpu_does(lesson):
    torch.manual_seed(0)
    model, x = lesson.UNet(), torch.randn(4, 1, 16, 16)
    t, labels = torch.tensor([1, 10, 100, 1000]), torch.tensor([0, 3, 9, lesson.NO_CLASS])
    here = model(x, t, labels)
    there = model.cuda()(x.cuda(), t.cuda(), labels.cuda())
    torch.testing.assert_close(here, there.cpu(), rtol=1e-2, atol=1e-2)
    points, ends = torch.randn(5, 2), []
    for device in ("cpu", "cuda"):
        A = lesson.linear_schedule().float().to(device)
        end, _ = lesson.denoise(lambda x, t, A=A: lesson.best_eps(x, A[t]), points.to(device),
                                lesson.spaced(1000, 20), A, "ddim")  # fmt: skip
        assert end.device.type == device
        ends.append(end.cpu())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)
