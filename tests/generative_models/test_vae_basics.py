import gzip
import hashlib
import math
import re
import shutil
import struct

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import MNIST, utils

F64 = torch.float64


@pytest.fixture(scope="module")
def lesson(load):
    return load("generative_models/vae_basics.py")


@pytest.fixture(scope="module")
def measured(lesson, tmp_path_factory):
    """Three seeds of a shrunk main, and the folder of the last."""
    results = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("vae")
        results.append(
            lesson.main(seed=seed, log_dir=folder, root=folder, n=20_000, draws=2, steps=70,
                        betas=(256, 8, 1), count=1000, test=300)
        )  # fmt: skip
    return results, folder


# --- digits ------------------------------------------------------------------------------------


def idx(array):
    return b"\0\0\x08" + bytes([array.dim()]) + struct.pack(f">{array.dim()}i", *array.shape) + (
        array.numpy().tobytes()
    )  # fmt: skip


@pytest.fixture
def write_mnist(lesson, monkeypatch):
    """write_mnist(folder, packed): a small MNIST of random pixels there; its images and labels."""

    def write(folder, packed, n=30):
        folder.mkdir(parents=True)
        images, labels = torch.randint(256, (n, 28, 28)).byte(), torch.randint(10, (n,)).byte()
        sums = []
        for name, _ in MNIST.resources:
            raw = idx(images if "images" in name else labels)
            path = folder / name
            path.write_bytes(gzip.compress(raw))
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            sums.append((name, md5))
            if not packed:
                path.unlink()
                path.with_suffix("").write_bytes(raw)
        monkeypatch.setattr(MNIST, "resources", sums)
        return images, labels

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody is there
    return write


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("place", ["MNIST/raw", "MNIST", "mnist", "raw", "."])
def test_mnist_is_used_where_it_lies(lesson, write_mnist, tmp_path, place, packed, train):
    images, labels = write_mnist(tmp_path / "data" / place, packed)
    (tmp_path / "data" / place / "._train-images-idx3-ubyte").write_bytes(b"AppleDouble")
    for _ in range(2):  # the second time it is unpacked
        got = lesson.open_digits(tmp_path / "data", train)
        assert torch.equal(got[0], images) and torch.equal(got[1], labels.long())
        assert got[1].dtype == torch.int64 and got[2] == "data: MNIST, 30 images"


def test_without_mnist_ten_digits_are_drawn_and_it_is_said(lesson, tmp_path):
    torch.manual_seed(0)
    images, labels, line = lesson.open_digits(tmp_path, count=200)
    assert images.shape == (200, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [20] * 10
    wanted = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    end = f"is not there; for the real MNIST: {lesson.MEND}"
    assert line == f"data: 200 drawn digits, as {wanted} {end}"
    x, y = images.flatten(1).float(), labels
    near = torch.cdist(x[100:], x[:100]).argmin(1)
    assert (y[:100][near] == y[100:]).double().mean() > 0.4  # the nearest image's digit


def test_what_looks_like_mnist_and_is_not_is_named(lesson, tmp_path):
    (tmp_path / "MNIST").mkdir()
    for name in ("mnist.npz", "train-images.idx3-ubyte", "MNIST/mnist_test.csv", "other.csv"):
        (tmp_path / name).write_bytes(b"other")
    line = lesson.open_digits(tmp_path, count=20)[2]
    found = "(but mnist.npz, mnist_test.csv, train-images.idx3-ubyte)"
    assert f"is not there {found}; for the real MNIST" in line and "20 drawn" in line


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("harm", ["cut", "foreign", "empty", "gone"])
@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "train-images-idx3-ubyte"])
def test_damage_is_one_line_with_the_folder_and_the_mend(
    lesson, write_mnist, tmp_path, packed, harm, name
):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, packed)
    path = raw / f"{name}{'.gz' * packed}"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-5], "foreign": b"<html>"}.get(harm, b""))
    if harm == "gone":
        path.unlink()
    with pytest.raises(OSError) as error:
        lesson.main(root=tmp_path, log_dir=tmp_path / "runs", n=5000, draws=1)
    message = str(error.value)
    assert message.startswith(f"{raw} holds no whole MNIST (") and "\n" not in message
    assert message.endswith(f"delete the *-ubyte* files there, then {lesson.MEND}")


@pytest.mark.parametrize(("images", "labels"), [
    (torch.zeros(30, 32, 32), torch.zeros(30)), (torch.zeros(30, 28, 28), torch.zeros(29)),
    (torch.zeros(0, 28, 28), torch.zeros(0)), (torch.zeros(30, 28, 28), torch.zeros(30) + 10),
    (torch.zeros(30, 784), torch.zeros(30)), (torch.zeros(30, 28, 28), torch.zeros(30, 1)),
])  # fmt: skip
def test_another_set_under_its_names_is_refused(lesson, write_mnist, tmp_path, images, labels):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, packed=False)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(images.byte()))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(labels.byte()))
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
    (tmp_path / "MNIST" / "raw" / MNIST.resources[1][0]).write_bytes(b"a download that was cut")

    def copy(url, root, filename, md5):
        assert url == f"{MNIST.mirrors[0]}{filename}"
        shutil.copy(tmp_path / "server" / filename, root)

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


# --- KL, gradients, the linear model -----------------------------------------------------------


def test_kl_is_that_of_torch_with_its_gradients(lesson):
    mu, log_var = (torch.randn(4, 3, dtype=F64, requires_grad=True) for _ in range(2))
    theirs = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(0.0, 1.0))
    pair = [lesson.kl_to_standard_normal(mu, log_var), theirs]
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*[torch.autograd.grad(k.sum(), (mu, log_var)) for k in pair])


def test_both_gradients_agree_where_the_variance_is_known(lesson):
    """f = (z - c)^2: m = mu - c: means 2 m, variances 4 s^2 and m^4 / s^2 + 14 m^2 + 15 s^2."""
    torch.manual_seed(0)
    mu, sigma, c = torch.tensor([1.5, -0.5], dtype=F64), torch.tensor([0.5, 0.5]).double(), 0.3
    through, score = lesson.gradient_samples(lambda z: (z - c).square().sum(1), mu, sigma, 400_000)
    assert through.shape == score.shape == (400_000, 2)
    for g in (through, score):
        error = g.std(0) / math.sqrt(len(g))
        assert ((g.mean(0) - 2 * (mu - c)).abs() < 5 * error).all()
    torch.testing.assert_close(through.var(0), 4 * sigma**2, rtol=0.02, atol=0)
    alone = lesson.gradient_samples(lambda z: (z[:, 0] - c) ** 2, mu[:1], sigma[:1], 400_000)[1]
    m, s = mu[:1] - c, sigma[:1]
    torch.testing.assert_close(alone.var(0), m**4 / s**2 + 14 * m**2 + 15 * s**2, rtol=0.05, atol=0)


@pytest.mark.parametrize(("D", "K", "s"), [(6, 2, 0.5), (4, 3, 1.3)])
def test_the_linear_models_densities_and_elbo_are_right(lesson, D, K, s):
    """log p(x) = log p(x, z) - log p(z | x) at every z; the ELBO against a mean of samples."""
    torch.manual_seed(1)
    model = lesson.LinearGaussian(D, K, s)
    x, z = torch.randn(5, D, dtype=F64), torch.randn(5, K, dtype=F64)
    joint = model.prior.log_prob(z) + model.likelihood(z).log_prob(x).sum(-1)
    torch.testing.assert_close(model.log_evidence(x), joint - model.posterior(x).log_prob(z))
    many = x.repeat(4000, 1)
    few, lot = (lesson.approximations(model, batch) for batch in (x, many))
    for name, q in few.items():
        single = model.iwae(many, lot[name], 1).view(4000, 5)
        error = single.std(0) / math.sqrt(4000)
        assert ((single.mean(0) - model.elbo(x, q)).abs() < 5 * error + 1e-9).all()


def test_no_diagonal_q_is_nearer_than_the_one_called_best(lesson):
    torch.manual_seed(0)
    model = lesson.LinearGaussian()
    x = torch.randn(3, 6, dtype=F64)
    best = lesson.approximations(model, x)["diagonal"]
    for scale in (0.8, 0.95, 1.05, 1.2):
        other = MultivariateNormal(best.mean, best.covariance_matrix * scale)
        assert (model.elbo(x, other) < model.elbo(x, best)).all()
        moved = MultivariateNormal(best.mean * scale, best.covariance_matrix)
        assert (model.elbo(x, moved) < model.elbo(x, best)).all()


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_a_linear_beta_vae_keeps_the_directions_that_pay(lesson, beta):
    """A unit's rate is ln(eigenvalue / (beta s^2)) / 2, 0 where that is negative (Lucas 2019)."""
    torch.manual_seed(0)
    s2, values = 0.5, torch.tensor([6.0, 3.0, 1.2, 0.3], dtype=F64)
    C = torch.diag(values)  # of x, (4, 4)
    W, V = (0.3 * torch.randn(4, 4, dtype=F64) for _ in range(2))
    log_var = torch.zeros(4, dtype=F64)
    parameters = [p.requires_grad_() for p in (W, V, log_var)]
    limits = {"max_iter": 2000, "tolerance_grad": 1e-10, "tolerance_change": 1e-14}
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
    torch.testing.assert_close(rates().detach().sort(descending=True)[0], expected, atol=1e-3,
                               rtol=0)  # fmt: skip


# --- the VAE -----------------------------------------------------------------------------------


def test_pixels_are_coins_tossed_anew(lesson):
    torch.manual_seed(0)
    grey = torch.full((50, 28, 28), 51).byte()
    first, second = lesson.toss(grey), lesson.toss(grey)
    assert first.unique().tolist() == [0, 1] and abs(first.mean().item() - 0.2) < 0.01
    assert not torch.equal(first, second)


def test_the_elbo_and_iwae_are_those_of_an_integral(lesson):
    """With one unit, log p(x) and the ELBO are sums over a grid of z; q is far from the prior."""
    torch.manual_seed(0)
    model, prior = lesson.VAE(1, 16).double(), Normal(0.0, 1.0)
    x = torch.bernoulli(torch.full((4, 28, 28), 0.3)).double()
    z, dz = torch.linspace(-9, 9, 3001, dtype=F64), 18 / 3000
    with torch.no_grad():
        model.encoder[-1].bias.copy_(torch.tensor([1.0, 0.3]))
        model.decoder[-1].weight.mul_(0.1)  # or weights vary too much for 3000 of them
        mu, log_var = model.encode(x)
        q = Normal(mu[:, 0], (log_var[:, 0] / 2).exp())
        log_q = q.log_prob(z[:, None])  # (3001, 4)
        D = model.distortion(z.view(-1, 1, 1).expand(-1, 4, 1), x)
        log_joint = prior.log_prob(z)[:, None] - D
        log_p = log_joint.logsumexp(0) + math.log(dz)
        elbo = (log_q.exp() * (log_joint - log_q)).sum(0) * dz
        assert (log_p - elbo > 0.2).all()
        D, R = (torch.stack(values).squeeze() for values in
                zip(*(model(x) for _ in range(1000)), strict=True))  # fmt: skip
        one = torch.stack([model.iwae(x, 1) for _ in range(1000)])  # (1000, 4)
        many = model.iwae(x, 3000)
    for sample in (-D - R, one):
        error = sample.std(0) / math.sqrt(1000)
        assert ((sample.mean(0) - elbo).abs() < 5 * error).all()
    torch.testing.assert_close(many, log_p, rtol=0, atol=0.1)


def test_the_distortion_is_that_of_coins(lesson):
    torch.manual_seed(0)
    model, x = lesson.VAE(2, 8), torch.bernoulli(torch.full((3, 28, 28), 0.5))
    z = torch.randn(3, 2)
    coins = torch.distributions.Bernoulli(logits=model.decoder(z))
    torch.testing.assert_close(model.distortion(z, x), -coins.log_prob(x.flatten(1)).sum(1))
    many = model.distortion(z.expand(5, 3, 2), x)
    torch.testing.assert_close(many, model.distortion(z, x).expand(5, 3))


def test_tile_puts_images_row_by_row(lesson):
    images = torch.arange(6.0).view(6, 1).expand(6, 784).contiguous()
    assert lesson.tile(images, 3)[0, ::28, ::28].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_map_puts_a_digit_where_the_decoder_draws_its_z(lesson):
    """A decoder that paints z itself: unit 0 grows to the right, unit 1 upwards, in both halves."""

    class Known(torch.nn.Module):
        decoder = staticmethod(lambda z: z.repeat(1, 392))  # columns of pixels alternate: z0, z1

        def encode(self, x):
            return x, torch.zeros_like(x)

    z = torch.tensor([[0.7, -1.1], [-0.3, 1.6], [40.0, -40.0]])
    picture = lesson.latent_map(Known(), z, torch.tensor([9, 9, 9]))  # 9 is white
    drawn, dots = picture[0].split(448, dim=1)
    for i in range(3):
        v = Normal(0.0, 1.0).cdf(z[i]).clamp(0.001, 0.999) * 448
        row, column = 447 - int(v[1]), int(v[0])
        assert dots[row, column] == 1
        tile = drawn[row // 28 * 28 :, column // 28 * 28 :][:2, :2]
        middle = (v // 28 + 0.5) / 16
        torch.testing.assert_close(tile[0], Normal(0.0, 1.0).icdf(middle).sigmoid())
    assert dots.sum() == 3 * 16


def test_try_beta_0_has_a_rate_that_grows_without_limit(lesson, tmp_path):
    torch.manual_seed(0)
    images = lesson.draw_digits(500)[0]
    rates = []
    for beta in (1.0, 0.0):
        with SummaryWriter(tmp_path / f"beta_{beta:g}") as writer:
            model = lesson.train_vae(images, beta, 8, 120, 0, writer)
        rates.append(lesson.evaluate(model, lesson.toss(images))["rate"])
    assert rates[1] > 5 * rates[0]


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_its_claims(measured, seed):
    result = measured[0][seed]
    for mu, (through, score) in result["gradients"].items():
        assert abs(through[1] - 4) < 0.4
        assert abs(score[1] / (mu**4 + 14 * mu**2 + 15) - 1) < 0.35
    gaps = result["gaps"]
    assert max(map(abs, gaps["posterior"])) < 1e-6
    rho = 16 * 0.7 / 17  # of the posterior's precision, W^T W / s^2 + I
    assert abs(gaps["diagonal"][0] + math.log(1 - rho**2) / 2) < 1e-9
    assert gaps["prior"][0] > 20 and gaps["prior"][3] < 0.2
    assert gaps["prior"] == sorted(gaps["prior"], reverse=True)
    digits = result["digits"]
    high, middle, low = (digits["rows"][beta] for beta in (256, 8, 1))
    assert high["rate"] < 0.1 and high["active"] == 0
    assert abs(high["distortion"] - digits["alone"]) < 5
    assert high["rate"] < middle["rate"] < low["rate"]
    assert high["distortion"] > middle["distortion"] > low["distortion"]
    assert high["active"] < low["active"]
    assert high["elbo"] < low["elbo"]
    bounds = digits["bounds"]
    assert bounds[1] < bounds[8] < bounds[64]
    assert digits["variance"][1] > 20 * digits["variance"][0]


def test_main_writes_its_pictures_and_curves(measured, events):
    _, folder = measured
    for beta in (256, 8, 1):
        tags = events(folder / f"beta_{beta}").Tags()
        assert tags["images"] == [f"images/{n}" for n in
                                  ("reconstructions", "prior_samples", "traversal")]  # fmt: skip
        assert "train/elbo" in tags["scalars"]
    curve = [e.value for e in events(folder / "curve").Scalars("rate/distortion")]
    assert len(curve) >= 2 and curve == sorted(curve, reverse=True)
    picture = events(folder / "latent_2").Images("images/latent_map")[0]
    assert (picture.height, picture.width) == (28 * 16, 56 * 16)
    assert len(events(folder / "q_prior").Scalars("linear/gap")) == 4


def test_the_same_seed_gives_the_same_numbers(lesson, measured, tmp_path):
    again = lesson.main(seed=2, log_dir=tmp_path, root=measured[1], n=20_000, draws=2, steps=70,
                        betas=(256, 8, 1), count=1000, test=300)  # fmt: skip
    assert again == measured[0][2]
