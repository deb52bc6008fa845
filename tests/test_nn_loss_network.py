import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SMALL = {"count": 14, "few": 10, "steps": 12}
BUGS = ["none", "pixels in 0..255, no batch norm", "last layer's weights of deviation 1",
        "100 outputs for 10 classes", "sum of the losses, not the mean",
        "nll_loss of logits, not of log_softmax",
        "softmax before cross_entropy", "all images black", "labels of other images"]  # fmt: skip


@pytest.fixture
def lesson(load):
    return load("nn_loss_network.py")


# --- the functions -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 0.1])
@pytest.mark.parametrize("K", [3, 17])
def test_the_expansion_is_off_by_the_third_order(lesson, scale, K):
    torch.manual_seed(0)
    z, t = torch.randn(50, K, dtype=torch.float64) * scale, torch.randint(K, (50,))
    assert abs(lesson.expected_loss(z, t) - F.cross_entropy(z, t)) < scale**3


def test_the_expansion_takes_the_spread_of_each_image_not_of_all(lesson):
    torch.manual_seed(0)
    z = 0.1 * torch.randn(40, 5, dtype=torch.float64) + 3 * torch.randn(40, 1, dtype=torch.float64)
    t = torch.randint(5, (40,))
    loss = F.cross_entropy(z, t).item()
    assert lesson.expected_loss(z, t).item() == pytest.approx(loss, abs=1e-3)


def test_without_norm_keeps_weights_and_leaves_the_model_alone(lesson):
    model = lesson.Moli()
    plain = lesson.without_norm(model)
    assert torch.equal(plain.features[1][0].weight, model.features[1][0].weight)
    assert not [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 3


def test_gradient_norms_are_those_of_weight_matrices(lesson):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    model(torch.randn(4, 1, 3, 3)).square().sum().backward()
    norms = lesson.gradient_norms(model)
    assert list(norms) == ["0", "3"]
    for name, norm in norms.items():
        assert norm == pytest.approx(model[int(name)].weight.grad.square().sum().sqrt().item())


def test_a_step_leaves_the_model_where_it_was(lesson):
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    F.cross_entropy(model(x), t).backward()
    before = model.weight.clone()
    after = lesson.loss_after_step(model, x, t, 0.01)
    W, b = model.weight - 0.01 * model.weight.grad, model.bias - 0.01 * model.bias.grad
    torch.testing.assert_close(after, F.cross_entropy(x @ W.T + b, t))
    assert after < F.cross_entropy(model(x), t) and torch.equal(model.weight, before)


def test_overfitting_trains_a_copy_in_train_mode_on_any_loss(lesson):
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3).eval(), torch.randn(6, 4), torch.randint(3, (6,))
    before = [p.detach().clone() for p in model.parameters()]
    losses = lesson.overfit(model, x, t, lesson.sum_loss, 3)
    assert losses[0] == pytest.approx(6 * F.cross_entropy(model(x), t).item()) and len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    assert all(map(torch.equal, before, model.parameters())) and not model.training
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.001)
    for loss in losses:
        optimizer.zero_grad()
        ours = F.cross_entropy(twin(x), t, reduction="sum")
        ours.backward()
        optimizer.step()
        assert ours.item() == pytest.approx(loss)
    dropping = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    first = {lesson.overfit(dropping.eval(), x, t, F.cross_entropy, 1)[0] for _ in range(9)}
    assert len(first) > 1


def test_the_batch_is_normalised_by_channel(lesson, images_root):
    x, t, source = lesson.load_batch(images_root, 50)
    assert x.shape == (50, 3, 32, 32) and x.dtype == torch.float64 and t.shape == (50,)
    assert x.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5,
                               rtol=0)  # fmt: skip
    images, labels = lesson.as_tensors(lesson.open_images(images_root))
    assert torch.equal(t, labels[:50]) and source.startswith("data: Shapes-10, 800 drawn")
    low, high = (x[:, 0][images[:50, 0] == v].unique() for v in (images[:50, 0].min(), 128))
    assert len(low) == 1 and len(high) == 1 and low < high


@pytest.mark.parametrize("seed", range(3))
def test_a_tiny_last_layer_starts_at_log_10(lesson, images_root, seed):
    torch.manual_seed(seed)
    x, t, _ = lesson.load_batch(images_root, 16)
    model = lesson.Moli().double()
    with torch.no_grad():
        for p in model.classifier[-1].parameters():
            p *= 0.01
    assert F.cross_entropy(model(x), t).item() == pytest.approx(math.log(10), abs=1e-3)


# --- the sections ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_try_smaller_logits_start_nearer(lesson, edited, seed, capsys):
    torch.manual_seed(seed)
    changed = edited(lesson, "F.cross_entropy(model(x), t)\n        rows[K]",
                     "F.cross_entropy(0.1 * model(x), t)\n        rows[K]")  # fmt: skip
    rows = changed.show_everyday(torch.randn(16, 3, 32, 32))
    assert max(abs(loss - expected) for loss, expected in rows.values()) < 0.01
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[-1] in ("+0.000", "-0.000") or abs(float(line.split()[-1])) < 0.01
               for line in lines[2:5])  # fmt: skip


def test_the_bugs_are_what_their_words_say(lesson, tmp_path, monkeypatch):
    calls = []

    def note(model, x, t, loss, steps):
        calls.append((model, x, t, loss, steps))
        return [2.3, 0.0]

    monkeypatch.setattr(lesson, "overfit", note)
    torch.manual_seed(3)
    x, t = torch.randn(12, 3, 32, 32), torch.arange(12) % 10
    lesson.show_bugs(tmp_path, x, t, steps=7)
    models, images, labels, losses, steps = zip(*calls, strict=True)
    assert steps == (7, 1, 1, 1, 1, 1, 7, 7, 7)
    assert [torch.equal(image, x) for image in images] == [i not in (1, 7) for i in range(9)]
    torch.testing.assert_close(images[1], (x * 0.25 + 0.5) * 240)
    assert images[7].abs().max() == 0
    assert [torch.equal(label, t) for label in labels] == [True] * 8 + [False]
    assert torch.equal(labels[8].sort()[0], t.sort()[0])
    z = torch.randn(12, 10)
    values = [F.cross_entropy(z, t)] * 9
    values[4], values[5] = values[4] * 12, -z[range(12), t].mean()
    values[6] = F.cross_entropy(z.softmax(1), t)
    torch.testing.assert_close([loss(z, t) for loss in losses], values)
    right = models[0]
    assert all(models[i] is right for i in (4, 5, 6, 7, 8))
    norms = [any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in models]
    assert norms == [i != 1 for i in range(9)]
    assert models[1].classifier[-1].weight.equal(right.classifier[-1].weight)
    wide = models[2].classifier[-1].weight
    assert wide.std().item() == pytest.approx(1, abs=0.1) and abs(wide.mean().item()) < 0.2
    assert models[2].classifier[1].weight.equal(right.classifier[1].weight)
    assert [model.classifier[-1].out_features for model in models] == [10] * 3 + [100] + [10] * 5


def test_another_gradient_of_the_bias_stops_it(lesson, tmp_path, monkeypatch):
    x, t = torch.randn(4, 3, 32, 32).double(), torch.arange(4)
    one_hot = F.one_hot
    monkeypatch.setattr(lesson.F, "one_hot", lambda t, K: 2 * one_hot(t, K))
    with pytest.raises(AssertionError):
        lesson.show_backward(tmp_path, lesson.Moli().double(), x, t, 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_batch_norm_makes_gradients_longer_and_hides_raw_pixels(lesson, images_root, seed):
    torch.manual_seed(seed)
    x, t, _ = lesson.load_batch(images_root, 14)
    model = lesson.Moli().double()
    plain, norms = lesson.without_norm(model), []
    for network in (model, plain):
        F.cross_entropy(network(x), t).backward()
        norms.append(list(lesson.gradient_norms(network).values()))
    ratios = [a / b for a, b in zip(*norms, strict=True)]
    assert min(ratios) > 5 and ratios[0] > 20
    raw = F.cross_entropy(model(60 * x + 120), t).item()
    assert raw == pytest.approx(math.log(10), abs=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_main(lesson, images_root, tmp_path, seed, events, capsys):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, **SMALL)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("data: Shapes-10")
    assert [line[0] for line in out if line[0].isdigit()] == ["1", "2", "3", "4"]
    assert out[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")
    follows = [line for line in out if line.startswith("   -> ")]

    # 1. log K
    rows = measured["everyday"]
    assert list(rows) == [2, 10, 100]
    for K, (loss, expected) in rows.items():
        assert expected == math.log(K) and loss == pytest.approx(expected, abs=0.15)
        assert f"   {K:3d}   {loss:6.3f}   {expected:6.3f}   {loss - expected:+12.3f}" in out
    off = max(abs(loss - expected) for loss, expected in rows.values())
    assert follows[0] == f"   -> each first loss is log K within {off:.2f}"

    # 2. the formula
    torch.manual_seed(seed)
    model = lesson.Moli().double()
    x, t, _ = lesson.load_batch(images_root, 14)
    expansion = measured["expansion"]
    plain = lesson.without_norm(model)
    first = next(i for i, line in enumerate(out) if line.startswith("2. ")) + 3
    assert "Means over 14 images" in out[first - 3]
    assert "Loss = log K + Var(z)/2 + mean(z)-z_t" in out[first - 2]
    for line, (name, row), z in zip(out[first:], expansion.items(), (
        model.train()(x), lesson.copy.deepcopy(model).eval()(x), plain(x),
        plain((x * 0.25 + 0.5) * 240),
    ), strict=False):  # fmt: skip
        assert line.strip().startswith(name)
        if "eval" not in name:  # above, train() has moved the running statistics
            assert row["loss"] == pytest.approx(F.cross_entropy(z, t).item())
            assert row["sum"] == pytest.approx(lesson.expected_loss(z, t).item())
            spread = (z - z.mean(1, keepdim=True)).square().mean().item() / 2
            assert row["spread"] == pytest.approx(spread)
        bracket = row["sum"] - row["spread"] - math.log(10)
        assert [float(word) for word in line.split()[-5:]] == pytest.approx(
            [math.log(10), row["spread"], bracket, row["sum"], row["loss"]], abs=6e-4)  # fmt: skip
    small = list(expansion.values())[:3]
    assert max(abs(row["loss"] - row["sum"]) for row in small) < 2e-3
    assert max(abs(row["loss"] - math.log(10)) for row in small) < 0.1
    assert small[0]["spread"] > 1.5 * small[2]["spread"]
    assert small[1]["spread"] == pytest.approx(small[2]["spread"], rel=1e-3)  # statistics 0 and 1
    raw = expansion["no batch norm, pixels 0..255"]
    assert raw["loss"] > 2.5 and abs(raw["loss"] - raw["sum"]) > 0.02
    off = max(abs(row["loss"] - row["sum"]) for row in small)
    spread = max(row["spread"] for row in small)
    assert follows[1] == (f"   -> small logits: Var(z)/2 is at most {spread:.3f}; the sum is the "
                          f"loss within {off:.0e}")  # fmt: skip
    assert follows[2].endswith(f"raw pixels: the sum is off by {abs(raw['loss'] - raw['sum']):.2f}")

    # 3. the bugs
    first = next(i for i, line in enumerate(out) if line.startswith("3. "))
    assert out[first].endswith("log 10 = 2.303") and out[first + 1] == (
        "   If it is: does it fall to 0 in 12 steps on the same 10 images?")  # fmt: skip
    bugs = measured["bugs"]
    assert list(bugs["losses"]) == BUGS
    assert bugs["rows"] == ([1, 2, 3, 4, 5], [6, 7], [0, 8])
    assert follows[3:5] == ["   -> the first loss is more than 0.2 off in rows 1, 2, 3, 4, 5",
                            "   -> the last loss is above 0.5 in rows 6, 7"]  # fmt: skip
    assert follows[5].startswith("   -> both look right in rows 0, 8: look at some images")
    assert " ".join(out[first + 2].split()) == "bug first loss last loss least possible"
    least = bugs["least"]
    few = t[:10].bincount() / 10
    entropy = -sum(p * math.log(p) for p in few.tolist() if p)
    assert least == {"right": 0, "shuffled": 0, "softmax": pytest.approx(math.log(1 + 9 / math.e)),
                     "black": pytest.approx(entropy)}  # fmt: skip
    for run, words in (("right", BUGS[0]), ("softmax", BUGS[6]), ("black", BUGS[7]),
                       ("shuffled", BUGS[8])):  # fmt: skip
        losses = bugs["losses"][words]
        assert least[run] - 1e-4 < losses[-1] < least[run] + 0.15 and len(losses) == 12
        curve = events(tmp_path / run).Scalars("overfit/loss")
        assert [e.step for e in curve] == list(range(12))
        assert [e.value for e in curve] == pytest.approx(losses)
        (line,) = (line for line in out if words in line)
        assert line.split()[-3:] == [f"{losses[0]:.3f}", f"{losses[-1]:.3f}", f"{least[run]:.3f}"]
    (line,) = (line for line in out if BUGS[3] in line)
    assert line.split()[-3:] == [f"{bugs['losses'][BUGS[3]][0]:.3f}", "-", "-"]

    # 4. the first backward
    backward = measured["backward"]
    assert backward["fall"] == pytest.approx(backward["theory"], rel=0.05) and backward["fall"] > 0
    ratio = backward["fall"] / backward["theory"]
    assert follows[7].endswith(
        f"loss by {backward['fall']:.2e}, which is {ratio:.2f} times lr |g|^2"
    )
    norms, zeroed = backward["norms"], backward["zeroed"]
    titles = [line for line in out if line[:2] == "4." or line.startswith("   layer ")]
    assert titles[0].startswith(
        "4. Is the first backward() right, too? With batch norm in train mode"
    )
    words = " ".join(titles[1].split())
    assert words == "layer name length of its gradient with last weights 0"
    assert zeroed == pytest.approx(math.log(10), abs=0.1)
    assert follows[8].endswith(f"loss is {zeroed:.3f}, but 4 of 5 layers get no gradient")
    assert [norm == 0 for norm in norms["zero_last"].values()] == [True] * 4 + [False]
    layers = ["convolution 1", "convolution 2", "convolution 3", "linear 1", "linear 2"]
    for layer, (name, a) in zip(layers, norms["fresh"].items(), strict=True):
        kind = nn.Conv2d if "convolution" in layer else nn.Linear
        assert isinstance(model.get_submodule(name), kind)
        (line,) = (line for line in out if line.startswith(f"   {layer} "))
        assert line.split()[2:] == [name, f"{a:.4f}", f"{norms['zero_last'][name]:.4f}"]
    model.zero_grad()
    F.cross_entropy(model.train()(x), t).backward()
    theirs = [model.get_parameter(f"{name}.weight").grad.norm().item() for name in norms["fresh"]]
    assert list(norms["fresh"].values()) == pytest.approx(theirs) and min(theirs) > 0
    for run, lengths in norms.items():
        curve = events(tmp_path / run).Scalars("grad/norm")
        assert [(e.step, e.value) for e in curve] == [
            (i, pytest.approx(length)) for i, length in enumerate(lengths.values())
        ]
    squares = sum(p.grad.square().sum().item() for p in model.parameters())
    assert backward["theory"] == pytest.approx(1e-4 * squares)
    bias, error = (
        line.split()[-5:] for line in out if line.startswith(("   gradient of", "   mean of"))
    )
    assert bias == error and len(bias) == 5
    gradient = model.classifier[-1].bias.grad[:5].tolist()
    assert [float(word) for word in bias] == pytest.approx(gradient, abs=6e-5)
    assert float(follows[6].split()[-1]) < 1e-12 and follows[6].startswith("   -> the two differ")
