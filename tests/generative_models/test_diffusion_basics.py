import ast
import gzip
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
            lesson.main(seed=seed, log_dir=folder, root=folder, n=2000, points=300, ring_steps=250,
                        steps=8, each=3, sample_steps=4, count=200)
        )  # fmt: skip
    return results, folder


def test_digits_are_those_of_the_vae_lesson(lesson):
    """Both lessons stand alone, so both hold the lines that draw and read."""
    names = {"DataError", "draw_digits", "read_idx", "open_digits"}
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
    with pytest.raises(lesson.DataError, match=r"train-images-idx3-ubyte.gz is damaged"):
        lesson.main(root=tmp_path, log_dir=runs)
    assert capsys.readouterr().out == ""


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
    assert lesson.spaced(10, 4) in ([10, 8, 5, 2, 0], [10, 7, 5, 2, 0], [10, 8, 5, 3, 0])
    assert lesson.spaced(7, 7) == [7, 6, 5, 4, 3, 2, 1, 0]


def test_known_data_come_back_exactly_whatever_the_sampler(lesson):
    """Where the network knows x_0, every walk ends there; and DDIM's is the same twice."""
    torch.manual_seed(0)
    A, x_0 = lesson.linear_schedule(50), torch.randn(6, 2, dtype=F64)
    for sampler in ("beta", "tilde", "ddim"):
        ends = []
        for _ in range(2):
            x, kept = lesson.denoise(
                lambda x, t: (x - A[t] ** 0.5 * x_0) / (1 - A[t]) ** 0.5,
                torch.randn(6, 2, dtype=F64), lesson.spaced(50, 7), A, sampler, seen=(50,),
            )  # fmt: skip
            ends.append(x)
            torch.testing.assert_close(kept[50][1], x_0)
        torch.testing.assert_close(ends[0], x_0)
        torch.testing.assert_close(ends[0], ends[1])


def test_the_two_variances_have_their_own_data(lesson):
    """beta is right for N(0, 1) at every number of steps, tilde for a point (DDPM, section 3.2)."""
    A = lesson.linear_schedule()
    for steps in (1000, 30, 5):
        times = lesson.spaced(1000, steps)
        last = A[times[-2]].item()
        beta = lesson.gaussian_std(1.0, times, A, "beta") ** 2
        assert beta == pytest.approx(last, abs=1e-3)  # the last step, without noise, takes 1 - A
        assert lesson.gaussian_std(1e-6, times, A, "tilde") < 1e-5 < 1e-3
    assert lesson.gaussian_std(1e-6, lesson.spaced(1000, 30), A, "unchanged") > 0.3


def test_try_standard_normal_data_hide_the_mistake(lesson):
    A, times = lesson.linear_schedule(), lesson.spaced(1000, 20)
    assert lesson.gaussian_std(0.2, times, A, "unchanged") > 4 * 0.2
    assert lesson.gaussian_std(1.0, times, A, "unchanged") == pytest.approx(1, abs=0.01)


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


def test_the_simple_loss_is_that_of_its_eps(lesson):
    """A model that knows x_0 has loss 0; one that says 0 has loss 1."""
    torch.manual_seed(0)
    A, x_0 = lesson.linear_schedule(100).float(), torch.randn(1000, 3)

    def knows(x_t, t):
        A_t = A[t].view(-1, 1)
        return (x_t - A_t.sqrt() * x_0) / (1 - A_t).sqrt()

    assert lesson.simple_loss(knows, x_0, A) < 1e-6
    assert abs(lesson.simple_loss(lambda x, t: 0 * x, x_0, A) - 1) < 0.1


def test_images_are_shrunk_by_the_mean_and_halved_without_overlap(lesson):
    images = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    x = lesson.shrink(images)
    assert x.shape == (1, 1, 16, 16) and x[0, 0, 0, 0] == -1 and x[0, 0, 8, 8] == 1
    labels = torch.arange(60) % 10
    first, second = lesson.halves(labels, 3)
    assert (
        labels[first].tolist() == labels[second].tolist() == [k for k in range(10) for _ in "abc"]
    )
    assert not set(first.tolist()) & set(second.tolist())


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
    for sampler, steps in (("beta", 1000), ("tilde", 1000), ("tilde", 50), ("ddim", 50)):
        assert rows["best", sampler, steps][1] > 0.95
        assert rows["best", sampler, steps][0] < 0.02
        assert rows["network", sampler, steps][0] < rows["noise"][0] / 2
    assert rows["best", "unchanged", 50][1] < 0.25 and rows["best", "unchanged", 50][0] > 0.1


def test_main_writes_its_pictures_and_curves(measured, events):
    _, folder = measured
    for w in (0, 1, 3):
        run = events(folder / f"guidance_{w}")
        by_class = run.Images("digits/by_class")[0]
        assert (by_class.height, by_class.width) == (160, 48)
        way = run.Images("digits/from_noise")[0]
        assert (way.height, way.width) == (20 * 16, 5 * 16)
    assert events(folder / "ring").Images("ring/from_noise")[0].width == 10 * 128
    assert len(events(folder / "cosine").Scalars("schedule/log10_snr")) == 100
    assert [e.step for e in events(folder / "sampler_ddim").Scalars("sampling/std")] == [
        20, 100, 1000
    ]  # fmt: skip


def test_digits_are_learned_and_guidance_sharpens_them(lesson, tmp_path):
    """A U-Net of few steps: more samples are as asked the larger w, and they vary less."""
    torch.manual_seed(0)
    images, labels = lesson.draw_digits(2000)
    keep = labels < 3  # three digits are learned sooner
    x_0, labels = lesson.shrink(images[keep]), labels[keep]
    A, model = lesson.cosine_schedule().float(), lesson.UNet()
    with torch.utils.tensorboard.SummaryWriter(tmp_path) as writer:

        def batch(n=32):
            i = torch.randint(len(x_0), (n,))
            return x_0[i], labels[i].masked_fill(torch.rand(n) < 0.15, lesson.NO_CLASS)

        lesson.fit(model, batch, A, 150, 4e-3, writer)
    judge = lesson.train_judge(x_0, labels, steps=150)
    asked, start = torch.arange(3).repeat_interleave(12), torch.randn(36, 1, 16, 16)
    right, varied = [], []
    for w in (0, 1, 4):
        x, _ = lesson.denoise(lesson.guided(model, asked, w), start, lesson.spaced(1000, 12), A,
                              "tilde", 1.0)  # fmt: skip
        right.append((judge(x).argmax(1) == asked).double().mean().item())
        varied.append(lesson.spread(x, asked))
    assert right[0] < 0.6 and right[2] > 0.8 and right[0] < right[1] <= right[2] + 0.05
    assert varied[2] < varied[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_predicts_what_the_cpu_does(lesson):
    torch.manual_seed(0)
    model, x = lesson.UNet(), torch.randn(4, 1, 16, 16)
    t, labels = torch.tensor([1, 10, 100, 1000]), torch.tensor([0, 3, 9, lesson.NO_CLASS])
    here = model(x, t, labels)
    there = model.cuda()(x.cuda(), t.cuda(), labels.cuda())
    torch.testing.assert_close(here, there.cpu(), rtol=1e-2, atol=1e-2)
    A = lesson.linear_schedule().float().cuda()
    points = torch.randn(5, 2, device="cuda")
    end, _ = lesson.denoise(lambda x, t: lesson.best_eps(x, A[t]), points, lesson.spaced(1000, 20),
                            A, "ddim")  # fmt: skip
    assert end.device.type == "cuda" and F.mse_loss(end, end) == 0
