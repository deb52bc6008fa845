import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

F64 = torch.float64
SMALL = {"trials": 4000, "names": ("BatchNorm", "GroupNorm"), "sizes": (2,), "steps": 96}


@pytest.fixture(scope="module")
def lesson(load):
    return load("model_architecture/normalization.py")


# --- the plain functions -----------------------------------------------------------------------


def test_normalize_by_hand(lesson):
    x = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    torch.testing.assert_close(lesson.normalize(x, 1, eps=3)[0], torch.tensor([-0.5, 0.5]))
    y = lesson.normalize(x, 1, eps=1e-12)
    torch.testing.assert_close(y[0], torch.tensor([-1.0, 1.0]))
    assert y[1].tolist() == [0, 0]


def test_rms_and_groups_by_hand(lesson):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # the mean square of (3, 4) is 12.5
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) / math.sqrt(13)
    torch.testing.assert_close(lesson.rms_normalize(x, 1, eps=0.5), expected)
    x = torch.tensor([[[1.0], [3.0], [7.0], [9.0]]])  # 4 channels in 2 groups: (1, 3), (7, 9)
    y = lesson.group_normalize(x, 2, eps=0.0)
    assert y.flatten().tolist() == [-1, 1, -1, 1] and y.shape == x.shape


def plain_and_library(lesson, name, x, w, b, eps):
    """By the plain functions, times w plus b; by torch. x (B, C, L), w and b (C,)."""
    column, last = (w[:, None], b[:, None]), ((w.shape[0],), w, b, eps)
    if name == "BatchNorm":
        y = lesson.normalize(x, (0, 2), eps)
        twin = F.batch_norm(x, None, None, w, b, training=True, eps=eps)
    elif name == "InstanceNorm":
        y, twin = lesson.normalize(x, 2, eps), F.instance_norm(x, weight=w, bias=b, eps=eps)
    elif name == "GroupNorm":
        y, twin = lesson.group_normalize(x, 3, eps), F.group_norm(x, 3, w, b, eps)
    elif name == "LayerNorm":
        y, twin = lesson.normalize(x, 1, eps), F.layer_norm(x.mT, *last).mT
    elif name == "LayerNorm of two axes":
        y = lesson.normalize(x, (1, 2), eps)
        twin = F.layer_norm(x, x.shape[1:], w[:, None].expand(x.shape[1:]).contiguous(),
                            b[:, None].expand(x.shape[1:]).contiguous(), eps)  # fmt: skip
    else:
        y, twin = lesson.rms_normalize(x, 1, eps), F.rms_norm(x.mT, (w.shape[0],), w, eps).mT
        return y * column[0], twin
    return y * column[0] + column[1], twin


NAMES = ["BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "LayerNorm of two axes", "RMSNorm"]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_plain_with_weights_is_torch_with_its_gradients(lesson, name, dtype):
    torch.manual_seed(0)
    x, w, b = 3 + 2 * torch.randn(5, 6, 7), torch.randn(6), torch.randn(6)
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    results = []
    for y in plain_and_library(lesson, name, *leaves, 1e-2):
        grads = torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)
        results.append((y, *(g for g in grads if g is not None)))
    tolerance = 1e-12 if dtype == F64 else 2e-5
    assert len(results[0]) == len(results[1]) == (3 if name == "RMSNorm" else 4)
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_one_group_is_layer_norm_and_a_group_a_channel_is_instance_norm(lesson):
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(3, 6, 10, dtype=F64) + torch.arange(6)[:, None]
    one, all_groups = lesson.group_normalize(x, 1), lesson.group_normalize(x, 6)
    torch.testing.assert_close(one, F.layer_norm(x, (6, 10)))
    torch.testing.assert_close(all_groups, F.instance_norm(x))
    assert (one - all_groups).abs().max() > 0.5
    images = torch.randn(2, 6, 3, 5, dtype=F64)
    torch.testing.assert_close(lesson.group_normalize(images, 3), F.group_norm(images, 3))
    torch.testing.assert_close(lesson.group_normalize(x[..., 0], 3), F.group_norm(x[..., 0], 3))


def test_layer_norm_is_rms_norm_of_what_is_centred(lesson):
    torch.manual_seed(0)
    x = torch.randn(4, 7, dtype=F64)
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(lesson.normalize(x, 1), lesson.rms_normalize(centred, 1))
    torch.testing.assert_close(lesson.normalize(x + 3, 1), lesson.normalize(x, 1))
    moved = lesson.rms_normalize(x + 3, 1) - lesson.rms_normalize(x, 1)
    assert moved.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_widens_half_precision_and_rounds_last(lesson, dtype):
    torch.manual_seed(0)
    x = (300 * torch.randn(4, 6, 5)).to(dtype)  # 300^2 is beyond float16
    wide, close = x.float(), {"rtol": torch.finfo(dtype).eps, "atol": 1e-3}
    eps = torch.finfo(torch.float32).eps  # that of the computation: RMSNorm's without an eps
    torch.testing.assert_close(
        F.rms_norm(x, (5,)), lesson.rms_normalize(wide, -1, eps).to(dtype), **close
    )
    torch.testing.assert_close(F.layer_norm(x, (5,)), lesson.normalize(wide, -1).to(dtype), **close)
    torch.testing.assert_close(
        F.group_norm(x, 3), lesson.group_normalize(wide, 3).to(dtype), **close
    )


@pytest.mark.parametrize("name", NAMES[:5])
def test_mean_0_and_variance_1_over_the_axes_of_a_norm_and_over_no_others(lesson, name):
    torch.manual_seed(0)
    B, C, L = 6, 6, 50
    b, c = torch.arange(1, B + 1, dtype=F64).view(B, 1, 1), torch.arange(C, dtype=F64)[:, None]
    x = 2 * b + 3 * c + (b + c) / 2 * torch.randn(B, C, L, dtype=F64)
    y, _ = plain_and_library(lesson, name, x, torch.ones(C).double(), torch.zeros(C).double(), 1e-5)
    rows = {"BatchNorm": y.transpose(0, 1).flatten(1), "InstanceNorm": y.flatten(0, 1),
            "GroupNorm": y.reshape(3 * B, -1), "LayerNorm": y.mT.flatten(0, 1),
            "LayerNorm of two axes": y.flatten(1)}  # fmt: skip
    contained = {"InstanceNorm": {"BatchNorm", "GroupNorm", "LayerNorm of two axes"},
                 "GroupNorm": {"LayerNorm of two axes"},
                 "LayerNorm": {"LayerNorm of two axes"}}  # fmt: skip
    for other, values in rows.items():
        var, mean = torch.var_mean(values, 1, correction=0)
        if other == name:
            assert (var - 1).abs().max() < 1e-4
        zero = other == name or other in contained.get(name, ())
        assert (mean.abs().max() < 1e-12) if zero else (mean.abs().max() > 0.1)


# --- BatchNorm, complete -----------------------------------------------------------------------

TWINS = {  # of torch, options, shape
    "three axes": (nn.BatchNorm1d, {"eps": 1e-3, "momentum": 0.3}, (5, 6, 7)),
    "no length": (nn.BatchNorm1d, {}, (5, 6)),
    "images": (nn.BatchNorm2d, {"momentum": 0.2}, (2, 6, 3, 5)),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", TWINS)
def test_batch_norm_outputs_gradients_and_state_are_torchs(lesson, name, dtype):
    torch.manual_seed(0)
    library, options, shape = TWINS[name]
    ours, library = lesson.BatchNorm(6, **options), library(6, **options)
    for parameter in library.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(library.state_dict())
    ours, library = ours.to(dtype), library.to(dtype)
    x = (3 + 2 * torch.randn(shape)).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for mode in (True, True, True, False):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        pair = [m.train(mode)(leaf) for m, leaf in zip((ours, library), leaves, strict=True)]
        assert pair[0].dtype == dtype
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
        for out in pair:
            out.sin().sum().backward()
        torch.testing.assert_close(
            leaves[0].grad, leaves[1].grad, rtol=tolerance, atol=2 * tolerance
        )
        x = 1.5 * x - 1
    grads = [[p.grad for p in m.parameters()] for m in (ours, library)]
    torch.testing.assert_close(*grads, rtol=5 * tolerance, atol=10 * tolerance)
    state, expected = ours.state_dict(), library.state_dict()
    assert state.keys() == expected.keys()
    torch.testing.assert_close(dict(state), dict(expected), rtol=tolerance, atol=tolerance)


def test_running_variance_is_unbiased_and_momentum_weighs_the_new(lesson):
    norm = lesson.BatchNorm(1, momentum=0.25)
    norm(torch.tensor([[1.0], [5.0]]))  # mean 3, variance 8 by n - 1, 4 by n
    assert norm.running_mean.item() == pytest.approx(0.25 * 3)
    assert norm.running_var.item() == pytest.approx(0.75 + 0.25 * 8)
    assert norm.running_mean.grad_fn is None and norm.num_batches_tracked == 1


def test_running_statistics_weigh_an_old_batch_less_by_a_power(lesson):
    torch.manual_seed(0)
    norm, x = lesson.BatchNorm(3, momentum=0.3).double(), torch.randn(30, 4, 3, dtype=F64)
    for batch in x:
        norm(batch)
    weights = 0.3 * 0.7 ** torch.arange(29, -1, -1, dtype=F64)[:, None]  # of each batch
    expected = (weights * x.var(1, correction=1)).sum(0) + 0.7**30  # it began at 1
    torch.testing.assert_close(norm.running_var, expected)
    torch.testing.assert_close(norm.running_mean, (weights * x.mean(1)).sum(0))


@pytest.mark.parametrize("shape", [(4, 5), (1, 3), (0, 3), (3,), (1, 3, 1)])
def test_shapes_that_do_not_fit_are_refused(lesson, shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 3, \.\.\.\), 2 values a channel, not \("):
        lesson.BatchNorm(3)(torch.zeros(shape))
    if shape == (1, 3):  # evaluation needs no variance of its own
        assert lesson.BatchNorm(3).eval()(torch.ones(shape)).shape == shape


def test_batch_norm_depends_on_its_company_in_training_alone(lesson):
    torch.manual_seed(0)
    x, company = torch.randn(1, 3, 5), torch.randn(1, 3, 5) + 4
    norm = lesson.BatchNorm(3)
    together = norm(torch.cat([x, company]))[:1]
    assert (norm(x) - together).abs().max() > 0.1
    torch.testing.assert_close(norm.eval()(x), norm(torch.cat([x, company]))[:1])


def test_the_table_of_batches_tells_the_noise_of_a_mean_and_the_divisor(lesson, capsys):
    torch.manual_seed(0)
    kept = lesson.show_batch_norm(20_000)
    out = capsys.readouterr().out
    for B, (error, var, off) in kept.items():
        assert error == pytest.approx(4 / B, rel=0.03)  # the standard error is 0.01
        assert var == pytest.approx(4, rel=0.03)
        assert off < 1e-10
        row = f"   {B:6} {error:22.4f} {4 / B:10.4f} {var:13.3f} {off:15.0e}"
        assert row in out.splitlines()
    assert " 20,000 channels of mean 5, variance 4;\n" in out
    assert "-> the mean of 2 examples is typically off by 1.4, of 128 by 0.2;\n" in out
    by_B = f"{kept[2][1] / 2:.2f}"
    assert f"running_var divides by B - 1: by B it would be {by_B} for B = 2\n" in out


@pytest.mark.parametrize("mode", [True, False])
def test_a_complete_norm_that_is_not_torchs_shows_in_the_table(lesson, monkeypatch, mode):
    right = lesson.BatchNorm.forward

    def wrong(self, x):
        y = right(self, x)
        y[0, 0] += 2 * (self.training == mode)  # at one place
        return y

    monkeypatch.setattr(lesson.BatchNorm, "forward", wrong)
    for *_, off in lesson.show_batch_norm(10).values():
        assert off == pytest.approx(2, abs=1e-6)


# --- what a norm cannot see --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_what_moves_the_output_of_which_norm(lesson, capsys, seed):
    torch.manual_seed(seed)
    moved = lesson.show_blindness()
    # other examples, the example, its channel 0, all numbers plus 3: does the output move?
    expected = {
        "no norm": (0, 1, 1, 1),
        "BatchNorm in train()": (1, 1, 1, 0),
        "BatchNorm in eval()": (0, 1, 1, 1),
        "GroupNorm of 2 groups": (0, 0, 1, 0),
        "InstanceNorm": (0, 0, 0, 0),
        "LayerNorm over C and L": (0, 0, 1, 0),
        "LayerNorm over C": (0, 0, 1, 0),
        "RMSNorm over C": (0, 0, 1, 1),
    }
    assert list(moved) == list(expected)
    for name, changes in moved.items():
        for change, moves in zip(changes, expected[name], strict=True):
            assert change > 0.1 if moves else change < 1e-3
    torch.manual_seed(seed)
    x = 2 * torch.arange(4).view(4, 1) + 3 * torch.randn(4, 4, 8)
    largest = [0, 4 * x[0].abs().max().item(), 4 * x[0, 0].abs().max().item(), 3]
    assert moved["no norm"] == pytest.approx(largest, abs=1e-5)
    # in eval() the output moves as x does, divided by each channel's standard deviation
    std = (x.transpose(0, 1).flatten(1).var(1) + 1e-5).sqrt()
    largest = [0, (4 * x[0] / std[:, None]).abs().max(), 4 * x[0, 0].abs().max() / std[0]]
    assert moved["BatchNorm in eval()"] == pytest.approx(
        [float(number) for number in (*largest, 3 / std.min())], abs=1e-4
    )
    assert moved["BatchNorm in eval()"][1] < 0.6 * moved["no norm"][1]
    out = capsys.readouterr().out
    assert all(len(line) <= 100 for line in out.splitlines())
    rows = [line[26:].split() for line in out.splitlines() if line[3:25].strip() in moved]
    assert rows == [[f"{change:.2f}" for change in changes] for changes in moved.values()]
    assert "GroupNorm of 2 groups, InstanceNorm, LayerNorm over C and L, LayerNorm over C," in out
    assert "RMSNorm over C;\n" in out
    assert out.endswith("      these mix examples: BatchNorm in train()\n")


def test_the_rows_are_the_norms_that_they_say(lesson):
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(4, 4, 8) + torch.arange(4)[:, None]
    trained = nn.BatchNorm1d(4)
    trained(x), trained.eval()
    expected = {
        "no norm": x,
        "BatchNorm in train()": nn.BatchNorm1d(4)(x),
        "BatchNorm in eval()": trained(x),
        "GroupNorm of 2 groups": nn.GroupNorm(2, 4)(x),
        "InstanceNorm": nn.InstanceNorm1d(4)(x),
        "LayerNorm over C and L": nn.LayerNorm((4, 8))(x),
        "LayerNorm over C": nn.LayerNorm(4)(x.mT).mT,
        "RMSNorm over C": nn.RMSNorm(4, eps=1e-5)(x.mT).mT,
    }
    torch.testing.assert_close(lesson.norms_of(x, trained), expected)


# --- networks ----------------------------------------------------------------------------------


def test_every_network_has_its_norm_between_convolution_and_relu(lesson):
    kinds = {"none": nn.Identity, "BatchNorm": nn.BatchNorm1d}
    groups = {"GroupNorm": (4, 4), "LayerNorm over C and L": (1, 1), "InstanceNorm": (16, 32)}
    for name in lesson.NAMES:
        layers = list(lesson.network(name))
        assert [type(layer) for layer in layers[:6:3]] == [nn.Conv1d] * 2
        assert [type(layer) for layer in layers[2:6:3]] == [nn.ReLU] * 2
        for conv, channels in zip(layers[:6:3], ((1, 16), (16, 32)), strict=True):
            assert (conv.in_channels, conv.out_channels) == channels and conv.bias is None
            assert (conv.kernel_size, conv.stride, conv.padding) == ((5,), (2,), (2,))
        norms = layers[1:6:3]
        assert {type(norm) for norm in norms} == {kinds.get(name, nn.GroupNorm)}
        if name in groups:
            assert tuple(norm.num_groups for norm in norms) == groups[name]
        if name != "none":
            assert [norm.weight.numel() for norm in norms] == [16, 32]
        assert lesson.network(name)(torch.randn(3, 1, 32)).shape == (3, 4)


def test_signals_are_what_they_say(lesson):
    torch.manual_seed(0)
    x, loud = lesson.signals(4000, "loudness")
    assert x.shape == (4000, 1, 32) and loud.bincount().tolist() == pytest.approx(
        [1000] * 4, abs=150
    )
    size = torch.stack([x[loud == k].square().mean().sqrt() for k in range(4)])
    expected = 2.0 ** (torch.arange(4) - 1.5) * math.sqrt(31 / 32 + 0.09)
    torch.testing.assert_close(size, expected, rtol=0.03, atol=0)
    torch.manual_seed(0)
    again, form = lesson.signals(4000, "form")
    assert torch.equal(x, again)
    assert abs(torch.corrcoef(torch.stack([form, loud]).double())[0, 1]) < 0.1
    wave = x[:, 0] / 2.0 ** (loud[:, None] - 1.5)
    fourth = [(wave[form == k] ** 4).mean().item() for k in range(4)]
    assert max(fourth) == fourth[2] or max(fourth) == fourth[3]
    assert min(fourth) == fourth[1]  # a square wave is flat: its fourth moment is least


def test_waves_have_two_to_four_periods(lesson, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "randn", torch.zeros)  # no noise
    x, form = lesson.signals(2000, "form")
    square = x[form == 1, 0].sign()
    flips = (square[:, 1:] != square[:, :-1]).sum(1)
    assert flips.min() >= 3 and flips.max() <= 8  # two a period, of which 31 / 32 are seen
    assert flips.double().mean() == pytest.approx(6 * 31 / 32, abs=0.2)


def test_accuracy_is_that_of_evaluation_on_other_waves_after_each_eighth(lesson, monkeypatch):
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 5, 0, 0]))

        def forward(self, x):
            seen.append((self.training, len(x)))
            return self.bias.expand(len(x), 4)

    monkeypatch.setattr(lesson, "network", lambda name: Watched())
    curve = lesson.fit("", "form", 4, 16, seed=0)
    assert list(curve) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert list(lesson.fit("", "form", 4, 9, seed=0))[-2:] == [8, 9]
    assert seen[:3] == [(True, 4), (True, 4), (False, 1000)]
    torch.manual_seed(0)
    _, labels = lesson.signals(1000, "form")
    assert curve[2] == (labels == 1).double().mean().item()


@pytest.mark.parametrize("bias", [False, True])
def test_try_with_a_bias_all_but_instance_norm_hear_the_scale(lesson, edited, bias):
    torch.manual_seed(0)
    code = edited(lesson, "bias=False", f"bias={bias}")
    x = torch.randn(2, 1, 32)
    hears = {}
    layer_norm = "LayerNorm over C and L"
    for name in ("GroupNorm", layer_norm, "InstanceNorm"):
        model = code.network(name).eval()
        hears[name] = not torch.allclose(model(x), model(50 * x), rtol=1e-2, atol=1e-3)
    assert hears == {"GroupNorm": bias, layer_norm: bias, "InstanceNorm": False}
    if bias:
        names = ("none", "GroupNorm", layer_norm, "InstanceNorm")
        heard = [list(code.fit(name, "loudness", 16, 80, 0).values())[-1] for name in names]
        assert min(heard[:3]) > 0.6 and heard[3] < 0.35


# --- main --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(lesson, three_seeds, tmp_path_factory):
    """For each of three seeds what main returned and printed, and where it logged."""
    found = three_seeds(lambda *seed_and_dir: lesson.main(*seed_and_dir, **SMALL), tmp_path_factory)
    return [(measured, printed, log_dir) for measured, log_dir, printed in found]


def test_batch_norm_hears_loudness_and_group_norm_forms_in_batches_of_two(runs):
    tables = [measured["table"] for measured, _, _ in runs]
    gaps = [table["GroupNorm"][0] - table["BatchNorm"][0] for table in tables]
    assert sum(gaps) / 3 > 0.03
    for table in tables:
        assert table["BatchNorm"][1] > 0.4 and table["GroupNorm"][1] < 0.35


@pytest.mark.parametrize("seed", range(3))
def test_main_prints_and_logs_what_it_measures(runs, events, seed):
    measured, out, log_dir = runs[seed]
    lines = out.splitlines()
    assert [line[:2] for line in lines if line[0] != " "][:-1] == ["1.", "2.", "3.", "4."]
    assert lines[-1].startswith(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?")

    rows, off = measured["everyday"]
    assert off < 1e-5 and f"rms_normalize give the same: within {off:.0e}\n" in out
    expected = {
        "x": [1, 3, 10, 14, 5, 7, 20, 24],
        "BatchNorm1d(2)": [-1.34, -0.45, -1.30, -0.56, 0.45, 1.34, 0.56, 1.30],
        "GroupNorm(1, 2)": [-1.14, -0.76, 0.57, 1.33, -1.10, -0.86, 0.74, 1.23],
        "InstanceNorm1d(2)": [-1, 1] * 4,
        "LayerNorm(2)": [-1, -1, 1, 1] * 2,
        "RMSNorm(2)": [0.14, 0.30, 1.41, 1.38, 0.34, 0.40, 1.37, 1.36],
    }
    assert list(rows) == list(expected)
    means = (
        "",
        "channel: 4",
        "example: 4",
        "example and channel: 2",
        *2 * ["example and position: 2"],
    )
    for line, mean, (name, numbers) in zip(lines[3:9], means, expected.items(), strict=True):
        assert rows[name].flatten().tolist() == pytest.approx(numbers, abs=6e-3)
        words = [*name.split(), *mean.split(), *(f"{number:.2f}" for number in numbers)]
        assert line.split() == words and len(line) <= 100

    table = measured["table"]
    for name, numbers in table.items():
        row = next(line for line in lines[-5:] if line.split()[0] == name)
        assert row.split()[1:] == [f"{number:.2f}" for number in numbers]
        run = events(log_dir / name)
        assert sorted(run.Tags()["scalars"]) == [
            "accuracy/form_batch_2",
            "accuracy/loudness_batch_2",
        ]
        for tag, last in zip(sorted(run.Tags()["scalars"]), numbers, strict=True):
            logged = run.Scalars(tag)
            assert [event.step for event in logged] == list(range(12, 97, 12))
            assert logged[-1].value == pytest.approx(last)
    small, loud = (a - b for a, b in zip(*table.values(), strict=True))
    assert f"minus GroupNorm: {small:+.2f} (form, B = 2), {loud:+.2f} (loudness, B = 2)\n" in out
    assert "better: GroupNorm for forms in batches of 2, BatchNorm for loudness\n" in out


def test_main_says_how_long_it_trains_in_which_batches(lesson, tmp_path, capsys):
    table = lesson.show_tasks(0, tmp_path, ("BatchNorm", "GroupNorm"), (2, 3), 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4. ") and " after 2 batches of B waves" in lines[1]
    assert lines[2].endswith("   form, B = 2    form, B = 3    loudness, B = 3 ")
    gaps = [f"{a - b:+.2f}" for a, b in zip(*table.values(), strict=True)]
    words = "{} (form, B = 2), {} (form, B = 3), {} (loudness, B = 3)".format(*gaps)
    assert lines[-2] == f"   -> BatchNorm minus GroupNorm: {words}"


def test_the_better_norm_is_named_by_the_numbers(lesson, monkeypatch, tmp_path, capsys):
    accuracy = {("BatchNorm", "form"): 0.7, ("GroupNorm", "form"): 0.6,
                ("BatchNorm", "loudness"): 0.3, ("GroupNorm", "loudness"): 0.5}  # fmt: skip
    monkeypatch.setattr(lesson, "fit", lambda name, task, *_: {1: accuracy[name, task]})
    lesson.show_tasks(0, tmp_path, ("BatchNorm", "GroupNorm"), (4, 8), 2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "      better: BatchNorm for forms in batches of 4, GroupNorm for loudness"
