import contextlib
import gzip
import hashlib
import io
import math
import re
import shutil
import struct

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import MNIST, utils

F64 = torch.float64
SMALL = {"n": 20_000, "steps": 40, "betas": (64, 4), "count": 400, "test": 150,
         "tiny_steps": 200}  # fmt: skip
TINY = {**SMALL, "n": 50, "steps": 2, "betas": (8,), "count": 30, "test": 20, "tiny_steps": 2}


@pytest.fixture(scope="module")
def lesson(load):
    return load("generative_models/vae_basics.py")


@pytest.fixture(scope="module")
def runs(lesson, tmp_path_factory):
    """A main that learns, and two that only run: what it returned, what it printed, its folder."""
    results = []
    for seed in range(3):
        folder, out = tmp_path_factory.mktemp("vae"), io.StringIO()
        with contextlib.redirect_stdout(out):
            sizes = TINY if seed else SMALL
            measured = lesson.main(seed=seed, log_dir=folder, root=folder, **sizes)
        results.append((measured, out.getvalue(), folder))
    return results


# --- digits ------------------------------------------------------------------------------------


def idx(array):
    return b"\0\0\x08" + bytes([array.dim()]) + struct.pack(f">{array.dim()}i", *array.shape) + (
        array.numpy().tobytes()
    )  # fmt: skip


@pytest.fixture
def write_mnist(monkeypatch):
    """write_mnist(root, packed): a small MNIST of random pixels there; its training images."""

    def write(root, packed=False, n=30):
        raw = root / "MNIST" / "raw"
        raw.mkdir(parents=True)
        sums, images = [], {}
        for name, _ in MNIST.resources:
            shape = (n, 28, 28) if "images" in name else (n,)
            images[name] = torch.randint(10, shape).byte()
            path = raw / name
            path.write_bytes(gzip.compress(idx(images[name])))
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            sums.append((name, md5))
            if not packed:
                path.unlink()
                path.with_suffix("").write_bytes(idx(images[name]))
        monkeypatch.setattr(MNIST, "resources", sums)
        return images["train-images-idx3-ubyte.gz"], images["t10k-images-idx3-ubyte.gz"]

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody is there
    return write


def test_mnist_is_used_where_torchvision_puts_it(lesson, write_mnist, tmp_path):
    for train, images in zip((True, False), write_mnist(tmp_path), strict=True):
        got, line = lesson.open_digits(tmp_path, train)
        assert torch.equal(got, images) and line == "data: MNIST, 30 images"


def test_without_mnist_digits_are_drawn_and_it_is_said(lesson, tmp_path):
    torch.manual_seed(0)
    images, line = lesson.open_digits(tmp_path, count=300)
    assert images.shape == (300, 28, 28) and images.dtype == torch.uint8
    x, y = images.flatten(1).float(), torch.arange(300) % 10
    near = torch.cdist(x[200:], x[:200]).argmin(1)
    assert (y[:200][near] == y[200:]).double().mean() > 0.5  # the nearest image's digit
    assert line == f"data: 300 drawn digits; for the real MNIST: {lesson.MEND}"


@pytest.mark.parametrize("harm", ["cut", "foreign", "empty", "gone"])
@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "train-images-idx3-ubyte"])
def test_damage_is_one_line_with_the_folder_and_the_mend(lesson, write_mnist, tmp_path, harm, name):
    write_mnist(tmp_path)
    raw, runs = tmp_path / "MNIST" / "raw", tmp_path / "runs"
    whole = (raw / name).read_bytes()
    (raw / name).write_bytes({"cut": whole[:-5], "foreign": b"<html>"}.get(harm, b""))
    if harm == "gone":
        (raw / name).unlink()
    with pytest.raises(OSError) as error:
        lesson.main(root=tmp_path, log_dir=runs, n=5000)
    message = str(error.value)
    assert message.startswith(f"{raw} holds no whole MNIST (") and "\n" not in message
    assert message.endswith(f"delete it, then {lesson.MEND}")


@pytest.mark.parametrize("shape", [(30, 32, 32), (0, 28, 28), (30, 784)])
def test_another_set_under_its_names_is_refused(lesson, write_mnist, tmp_path, shape):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(idx(torch.zeros(shape).byte()))
    with pytest.raises(OSError, match="holds no whole MNIST"):
        lesson.open_digits(tmp_path, train=False)
    assert len(lesson.open_digits(tmp_path)[0]) == 30


def test_it_is_fetched_when_asked_and_no_network_is_one_line(
    lesson, write_mnist, tmp_path, monkeypatch
):
    expected, _ = write_mnist(tmp_path / "server", packed=True)
    with pytest.raises(OSError, match=r"raw holds no whole MNIST \(Error downloading") as no:
        lesson.open_digits(tmp_path, download=True)
    assert "127.0.0.1:9" in str(no.value) and "\n" not in str(no.value)

    def copy(url, root, filename, md5):
        assert url == f"{MNIST.mirrors[0]}{filename}" and (filename, md5) in MNIST.resources
        shutil.copy(tmp_path / "server" / "MNIST" / "raw" / filename, root)

    monkeypatch.setattr(utils, "download_url", copy)
    assert torch.equal(lesson.open_digits(tmp_path, download=True)[0], expected)
    assert torch.equal(lesson.open_digits(tmp_path)[0], expected)


def test_main_fetches_first(lesson, monkeypatch, tmp_path):
    def fetch(root, download):
        raise ConnectionError(f"{download} {root}")

    runs = tmp_path / "runs"
    monkeypatch.setattr(lesson, "open_digits", fetch)
    with pytest.raises(ConnectionError, match=f"True {re.escape(str(tmp_path))}"):
        lesson.main(root=tmp_path, log_dir=runs, download=True)


# --- the loss ----------------------------------------------------------------------------------


def test_both_terms_are_those_of_torch_at_other_sizes(lesson):
    torch.manual_seed(3)
    model, x = lesson.VAE(7, 5, 6).double(), torch.bernoulli(torch.full((9, 7), 0.6)).double()
    torch.nn.init.normal_(model.encoder[2].bias)
    state = torch.get_rng_state()
    D, R = model(x)
    mu, log_var = model.encoder(x)[:, :5], model.encoder(x)[:, 5:]
    q = Normal(mu, log_var.exp().sqrt())
    torch.set_rng_state(state)
    z = mu + q.stddev * torch.randn_like(mu)
    torch.testing.assert_close(D, -Bernoulli(logits=model.decoder(z)).log_prob(x).sum(1))
    torch.testing.assert_close(R, kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    (D + R).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())  # also through the random code


def known(lesson, mu, log_var, sizes=(4, 2, 3)):
    """A VAE whose encoder gives mu and log_var (K,) for every image, and a list of all codes z."""
    model, codes = lesson.VAE(*sizes), []
    torch.nn.init.zeros_(model.encoder[2].weight)
    model.encoder[2].bias.data = torch.cat([torch.tensor(mu), torch.tensor(log_var)])
    model.decoder.register_forward_pre_hook(lambda _, inputs: codes.append(inputs[0]))
    return model, codes


def test_codes_have_the_encoders_mean_and_deviation_and_samples_the_priors(lesson):
    torch.manual_seed(0)
    model, codes = known(lesson, [1.0, -2.0], [math.log(9.0), math.log(0.25)])
    model(torch.zeros(20_000, 4))
    images = model.sample(20_000)
    torch.testing.assert_close(codes[0].mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.1)
    torch.testing.assert_close(codes[0].std(0), torch.tensor([3.0, 0.5]), rtol=0.03, atol=0)
    assert codes[1].mean().abs() < 0.03 and abs(codes[1].std() - 1) < 0.03
    torch.testing.assert_close(images, model.decoder(codes[1]).sigmoid())
    assert images.shape == (20_000, 4) and not images.requires_grad


def test_kl_is_that_of_torch_with_its_gradients_and_that_of_samples(lesson):
    torch.manual_seed(0)
    mu, log_var = (torch.randn(4, 3, dtype=F64, requires_grad=True) for _ in range(2))
    q, prior = Normal(mu, (log_var / 2).exp()), Normal(0.0, 1.0)
    pair = [lesson.kl_to_standard_normal(mu, log_var), kl_divergence(q, prior)]
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*[torch.autograd.grad(k.sum(), (mu, log_var)) for k in pair])
    z = q.sample((20_000,))
    ratio = (q.log_prob(z) - prior.log_prob(z)).detach()
    assert ((ratio.mean(0) - pair[0]).abs() < 5 * ratio.std(0) / math.sqrt(20_000)).all()


def test_pixels_are_coins_tossed_anew(lesson):
    torch.manual_seed(0)
    grey = torch.full((50, 28, 28), 51).byte()
    first, second = lesson.toss(grey), lesson.toss(grey)
    assert first.unique().tolist() == [0, 1] and abs(first.mean().item() - 0.2) < 0.01
    assert first.shape == (50, 784) and not torch.equal(first, second)


def test_evaluate_is_means_and_counts_units_above_a_tenth_of_a_nat(lesson):
    model, _ = known(lesson, [0.5, 0.4, 2.0, 0.0], [0.0] * 4, (3, 4, 5))  # R: .125 .08 2 0
    torch.nn.init.zeros_(model.decoder[2].weight)
    torch.nn.init.zeros_(model.decoder[2].bias)
    row = lesson.evaluate(model, torch.ones(6, 3))
    assert row["active"] == 2
    assert row["D"] == pytest.approx(3 * math.log(2), rel=1e-5)
    assert row["R"] == pytest.approx(2.205, rel=1e-5)
    assert row["elbo"] == pytest.approx(-row["D"] - row["R"])


def test_the_mean_image_is_how_often_a_pixel_is_white(lesson):
    images = torch.zeros(4, 28, 28).byte()
    images[:3, 0, 0], images[:, 0, 1] = 255, 255
    x = torch.zeros(2, 784)
    x[:, 1], x[0, 0] = 1, 1
    p, D = lesson.mean_image(images, x)
    assert p[:3].tolist() == pytest.approx([0.75, 1 - 1e-4, 1e-4])
    nats = -(math.log(0.75) + math.log(0.25)) / 2 + 783 * 1e-4
    assert abs(D - nats) < 1e-3 * nats


def test_training_weighs_the_rate_by_beta_and_logs_the_elbo(lesson, tmp_path, events):
    """With D alone the rate rises; the ELBO that is logged is that of beta = 1 all the same."""
    torch.manual_seed(0)
    images, rows = lesson.draw_digits(300), {}
    for beta in (0.0, 100.0):
        with SummaryWriter(tmp_path / f"{beta:g}") as writer:
            model = lesson.train_vae(images, beta, 5, 61, 0, writer)
        assert model.K == 5
        rows[beta] = lesson.evaluate(model, lesson.toss(images))
    assert rows[0.0]["R"] > 20 and rows[100.0]["R"] < 1
    logged = events(tmp_path / "0").Scalars("train/elbo")
    assert [e.step for e in logged] == [0, 20, 40, 60]
    assert logged[-1].value == pytest.approx(rows[0.0]["elbo"], rel=0.15)


# --- the bound ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "s"), [(-1.5, 0.5), (0.7, 1.3)])
def test_the_linear_models_elbo_is_that_of_samples_and_of_bayes(lesson, w, s):
    torch.manual_seed(1)
    x, mean, wide = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64), math.hypot(w, s)
    q = Normal(mean, torch.rand(5, dtype=F64) + 0.5)
    elbo = lesson.linear_elbo(w, s, x, q)
    exact = Normal(w * x / wide**2, s / wide)
    torch.testing.assert_close(Normal(0, wide).log_prob(x) - elbo, kl_divergence(q, exact))
    z = q.sample((20_000,))
    single = Normal(0.0, 1.0).log_prob(z) + Normal(w * z, s).log_prob(x) - q.log_prob(z)
    assert ((single.mean(0) - elbo).abs() < 5 * single.std(0) / math.sqrt(20_000)).all()


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_a_linear_beta_vae_keeps_the_directions_that_pay(lesson, beta):
    """A unit's rate is ln(eigenvalue / (beta s^2)) / 2, 0 where that is negative (Lucas 2019)."""
    torch.manual_seed(0)
    s2, values = 0.5, torch.tensor([6.0, 3.0, 1.2, 0.3], dtype=F64)
    C = torch.diag(values)  # of x, (4, 4)
    W, V = (0.3 * torch.randn(4, 4, dtype=F64) for _ in range(2))
    log_var = torch.zeros(4, dtype=F64)
    parameters = [p.requires_grad_() for p in (W, V, log_var)]
    limits = {"max_iter": 500, "tolerance_grad": 1e-8, "tolerance_change": 1e-12}
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **limits)

    def rates():
        return lesson.kl_to_standard_normal((V @ C @ V.T).diagonal().sqrt(), log_var)

    def loss():
        optimizer.zero_grad()
        E = torch.eye(4, dtype=F64) - W @ V
        D = ((E @ C @ E.T).trace() + (W.square() * log_var.exp()).sum()) / (2 * s2)
        value = D + beta * rates().sum()
        value.backward()
        return value

    optimizer.step(loss)
    expected = (values / (beta * s2)).log().clamp(min=0) / 2
    torch.testing.assert_close(rates().detach().sort(descending=True)[0], expected, atol=2e-3,
                               rtol=0)  # fmt: skip


# --- gradients and distances -------------------------------------------------------------------


def test_both_gradients_agree_where_the_variance_is_known(lesson):
    """f = (z - c)^2: m = mu - c: means 2 m, variances 4 s^2 and m^4 / s^2 + 14 m^2 + 15 s^2."""
    torch.manual_seed(0)
    mu, sigma, c = torch.tensor([1.5, -0.5], dtype=F64), torch.tensor([0.5, 0.5]).double(), 0.3
    through, score = lesson.gradient_samples(lambda z: (z - c).square().sum(1), mu, sigma, 100_000)
    assert through.shape == score.shape == (100_000, 2)
    for g in (through, score):
        error = g.std(0) / math.sqrt(len(g))
        assert ((g.mean(0) - 2 * (mu - c)).abs() < 5 * error).all()
    torch.testing.assert_close(through.var(0), 4 * sigma**2, rtol=0.03, atol=0)
    alone = lesson.gradient_samples(lambda z: (z[:, 0] - c) ** 2, mu[:1], sigma[:1], 100_000)[1]
    m, s = mu[:1] - c, sigma[:1]
    torch.testing.assert_close(alone.var(0), m**4 / s**2 + 14 * m**2 + 15 * s**2, rtol=0.1, atol=0)


def test_the_nearest_image_is_counted_in_pixels(lesson):
    torch.manual_seed(0)
    a, b = (torch.bernoulli(torch.full((n, 784), 0.3)) for n in (4, 7))
    nearest = [min(int((one != other).sum()) for other in b) for one in a]
    assert lesson.nearest_distance(a, b) == sum(nearest) / 4
    assert lesson.nearest_distance(b[2:4], b) == 0


# --- what is shown -----------------------------------------------------------------------------


def test_tile_puts_images_row_by_row(lesson):
    images = (torch.arange(6.0) / 255).view(6, 1).expand(6, 784).contiguous() + 1e-4
    shown = lesson.tile(images, 3)
    assert shown.shape == (112, 168) and shown[::56, ::56].tolist() == [[0, 1, 2], [3, 4, 5]]
    one = torch.arange(784.0).view(1, 784) / 784
    assert (lesson.tile(one, 1)[::2, ::2] == (255 * one.view(28, 28)).byte().numpy()).all()


def test_the_picture_has_test_images_then_rebuilt_then_new_ones(lesson):
    torch.manual_seed(0)
    x = lesson.toss(lesson.draw_digits(20))
    model, codes = known(lesson, [40.0, 40.0], [4.0, 4.0], (784, 2, 3))
    shown = lesson.picture(model, x)
    assert shown.shape == (3 * 20 + 6 * 56, 12 * 56) and shown.dtype.name == "uint8"
    assert (shown[20:76] == lesson.tile(x[:12], 12)).all()
    assert codes[0].shape == (12, 2) and (codes[0] == 40).all()  # mu itself, no noise
    assert (shown[96:152] == lesson.tile(model.decoder(codes[0]).sigmoid(), 12)).all()
    assert codes[1].shape == (48, 2) and codes[1].abs().max() < 6  # the prior's
    assert (shown[172:] == lesson.tile(model.decoder(codes[1]).sigmoid(), 12)).all()
    for top in (0, 76, 152):  # words: black on white
        assert 0.02 < (shown[top : top + 20] < 128).mean() < 0.2


def test_main_trains_on_training_images_and_measures_test_images(lesson, tmp_path, monkeypatch):
    sets, calls, measured_on = {}, [], []

    def open_digits(root, train, count):
        sets[train] = torch.full((count, 28, 28), 255 * train).byte()
        return sets[train], "data"

    def train_vae(images, beta, K, steps, seed, writer):
        calls.append((beta, K, steps, seed, str(writer.log_dir)))
        assert images.min() == 255
        return lesson.VAE(784, K, 8).to(images.device)

    def evaluate(model, x):
        measured_on.append(x.max().item())
        return {"D": 5.0, "R": 1.0, "elbo": -6.0, "active": 3}

    for function in (open_digits, train_vae, evaluate):
        monkeypatch.setattr(lesson, function.__name__, function)
    measured = lesson.main(seed=4, log_dir=tmp_path, **{**SMALL, "n": 50, "tiny_steps": 2})
    assert calls == [(beta, 16, 40, 4, str(tmp_path / f"beta_{beta:g}")) for beta in (1.0, 64, 4)]
    assert measured_on == [0.0] * 4
    betas = measured["betas"]
    assert betas["real"] == (784, 784)  # black test images, white training images
    assert betas["rows"]["mean image"]["away"] < 1 and betas["rows"]["mean image"]["missed"] > 770


def test_main_keeps_its_claims(runs):
    result = runs[0][0]
    everyday = result["everyday"]
    assert sum(everyday["shares"]) > 0.9 and min(everyday["shares"]) > 0.3
    assert everyday["mu"][0] * everyday["mu"][1] < 0 and everyday["loss"] > math.log(2)
    digits = result["digits"]
    assert digits["D"] < digits["alone"] - 20 and digits["elbo"] > -digits["alone"] + 10
    assert digits["other"] > digits["alone"] + 20
    for mu, (through, score) in result["gradients"].items():
        assert abs(through[0] - 2 * mu) < 0.1 and abs(score[0] - 2 * mu) < 1
        assert abs(through[1] - 4) < 0.4
        assert abs(score[1] / (mu**4 + 14 * mu**2 + 15) - 1) < 0.35
    betas = result["betas"]["rows"]
    high, middle, one, mean = (betas[x] for x in ("beta 64", "beta 4", "beta 1", "mean image"))
    assert high["R"] < 0.2 and high["active"] == 0 and one["active"] > 10
    assert high["R"] < middle["R"] < one["R"] and high["D"] > middle["D"] > one["D"]
    assert abs(high["away"] - mean["away"]) < 10 and result["betas"]["real"][0] < 0.7 * mean["away"]


@pytest.mark.parametrize("seed", range(3))
def test_the_elbo_is_below_by_the_kl_on_every_seed(runs, seed):
    result = runs[seed][0]
    assert result["loss"] < 1e-12
    exact, wide, blind = result["gaps"].values()
    assert max(map(abs, exact)) < 1e-9 and wide == pytest.approx(((8 - math.log(9)) / 2,) * 2)
    assert blind[0] > 5 and blind[0] == pytest.approx(blind[1])


@pytest.mark.parametrize("seed", range(3))
def test_main_says_what_it_measured(lesson, runs, seed):
    result, out, folder = runs[seed]
    tables = re.split(r"^(?=\d\. )", out, flags=re.M)[1:]
    answers = [re.search(r"^   -> (.*)", table, re.M)[1] for table in tables]
    assert [table[0] for table in tables] == list("123456")
    share, loss = sum(result["everyday"]["shares"]), result["everyday"]["loss"]
    assert answers[0].startswith(f"{share:.0%} of what is decoded")
    for head in ("used    pixels: real              all\n", "   used: units with R above 0.1."):
        assert head in tables[3]
    rows, real = result["betas"]["rows"], result["betas"]["real"]
    none, one = rows["mean image"]["away"], rows["beta 1"]["away"]
    assert f"a sample of the mean image {none:.0f}, of beta 1 {one:.0f},\n" in tables[3]
    assert f"      a real image {real[0]:.0f}\n" in tables[3]
    assert f"      D + R is {loss:.2f}; to tell" in tables[0]
    assert re.search(rf"^   none of the two +{1 - share:.2f}$", tables[0], re.M)
    assert f"differ by {result['loss']:.0e}" in answers[1]
    assert [line.split()[0] for line in tables[0].splitlines()[2:4]] == ["1", "0"]
    for line, share in zip(tables[0].splitlines()[2:4], result["everyday"]["shares"], strict=True):
        assert line.endswith(f" {share:.2f}")
    alone = result["digits"]["alone"]
    assert re.search(rf"the mean image +{alone:.1f} +0.0 +-{alone:.1f}$", tables[2], re.M)
    assert re.search(rf"^   mean image +{alone:.1f} +0.0 +-{alone:.1f} +0 ", tables[3], re.M)
    digits, betas = result["digits"], result["betas"]
    for name, key in (("the image's own code", "D"), ("another image's code", "other")):
        assert re.search(rf"{name} +{digits[key]:.1f} ", tables[2])
    saved = digits["alone"] - digits["D"]
    assert answers[2] == (f"a code saves {saved:.0f} of {digits['alone']:.0f} nats in D and costs "
                          f"{digits['R']:.0f}, its R")  # fmt: skip
    for name, (gap, kl) in result["gaps"].items():
        row = re.search(rf"^   {re.escape(name)} +(.*)", tables[4], re.M)[1].split()
        assert row[2:] == [f"{gap:z.3f}", f"{kl:z.3f}"]
        assert abs(float(row[0]) - float(row[1]) - gap) < 0.0011
    assert re.search(r"these two differ by \de-1[0-9]$", answers[4])
    for mu, ((a, va), (b, vb)) in result["gradients"].items():
        row = re.search(rf"^ +{mu} +{2 * mu} +(-?\d+\.\d.*)", tables[5], re.M)[1].split()
        assert row == [f"{a:.3f}", f"{va:.3f}", "4", f"{b:.3f}", f"{vb:.2f}",
                       str(mu**4 + 14 * mu**2 + 15)]  # fmt: skip
    assert f"varies {vb / va:.0f} times as much, so it needs more z" in answers[5]
    rows, sizes = betas["rows"], TINY if seed else SMALL
    assert list(rows) == ["mean image", *(f"beta {beta}" for beta in sizes["betas"]), "beta 1"]
    for name, row in rows.items():
        line = re.search(rf"^   {name} +(.*)", tables[3], re.M)[1].split()
        shown = [f"{row[key]:.1f}" for key in ("D", "R", "elbo")] + [str(row["active"])]
        assert line == [*shown, f"{row['away']:.0f}", f"{row['missed']:.0f}"]
    near, missed = betas["real"]
    assert re.search(rf"^   \(real images as samples\) +{near:.0f} +{missed:.0f}$", tables[3], re.M)
    best, top = max(rows, key=lambda name: rows[name]["elbo"]), sizes["betas"][0]
    uses = rows[f"beta {top}"]["active"] or "none"
    assert answers[3] == f"ELBO: best for {best}; with beta {top} a code uses {uses} of 16 units"
    assert out.isascii() and max(map(len, "".join(tables).splitlines()[:-1])) <= 100
    assert out.splitlines()[-1] == (f"look: tensorboard --logdir {folder}   "
                                    "http://localhost:6006/?smoothing=0#timeseries")  # fmt: skip


def test_main_writes_its_pictures_and_curves(lesson, runs, events):
    _, _, folder = runs[0]
    assert {path.name for path in folder.iterdir()} == {"beta_64", "beta_4", "beta_1"}
    for beta in (64, 4, 1):
        run = events(folder / f"beta_{beta}")
        assert run.Tags()["images"] == ["images/digits"] and run.Tags()["scalars"] == ["train/elbo"]
        shown = run.Images("images/digits")[0]
        assert (shown.width, shown.height) == (672, 396)
        assert [e.step for e in run.Scalars("train/elbo")] == [0, 20]


def test_try_beta_0_lets_the_rate_run_and_spoils_the_samples(lesson, edited, tmp_path):
    copy = edited(lesson, "betas=(32, 4, 0.25)", "betas=(32, 4, 0)")
    small = {key: value for key, value in SMALL.items() if key != "betas"}
    small |= {"tiny_steps": 2, "n": 50}
    rows = copy.main(log_dir=tmp_path, root=tmp_path, **small)["betas"]["rows"]
    zero, *others = (rows[f"beta {beta}"] for beta in (0, 32, 4, 1))
    assert zero["R"] > 2 * max(row["R"] for row in others)
    assert zero["away"] > max(row["away"] for row in others)


def test_the_same_seed_gives_the_same_numbers(lesson, runs, tmp_path):
    again = lesson.main(seed=2, log_dir=tmp_path, root=runs[2][2], **TINY)
    assert again == runs[2][0]
