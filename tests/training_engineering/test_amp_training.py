import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

SMALL = {"batch": 64, "width": 32, "train_steps": 50}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/amp_training.py")


# --- the step ----------------------------------------------------------------------------------


def test_a_step_uses_the_types_it_should_and_clips_the_true_gradient(lesson):
    model, seen = nn.Linear(2, 1, bias=False), []
    nn.init.constant_(model.weight, 2.0)
    model.register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))

    def loss_of(z, t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.l1_loss(z, t)

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    x, t = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1)
    for dtype in (F16, BF16):
        loss, norm = lesson.amp_step(model, x, t, loss_of, optimizer, scaler, dtype, max_norm=2.5)
        assert seen == [(F32, dtype), True] and norm == pytest.approx(5)
        assert model.weight.dtype == model.weight.grad.dtype == F32
        assert model.weight.grad.tolist()[0] == pytest.approx([1.5, 2.0], rel=1e-3)  # old ones gone
        seen.clear()
    assert loss == pytest.approx(3 * 0.5 + 0 * 4, abs=0.05)
    assert model.weight.tolist()[0] == pytest.approx([2 - 3.0, 2 - 4.0], rel=1e-3)
    lesson.amp_step(model, x, t, loss_of, optimizer, scaler, F32)
    assert seen == [(F32, F32), False]


def test_a_step_without_a_scaler_is_the_plain_one(lesson):
    torch.manual_seed(0)
    ours = lesson.classifier(8)
    plain, x, t = copy.deepcopy(ours), torch.randn(6, 16), torch.randint(4, (6,))
    off = torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, plain)]
    for _ in range(3):
        loss, norm = lesson.amp_step(ours, x, t, F.cross_entropy, optimizers[0], off, F32, 0.3)
        expected = F.cross_entropy(plain(x), t)
        optimizers[1].zero_grad()
        expected.backward()
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(plain.parameters(), 0.3).item())
        optimizers[1].step()
        assert loss == expected.item()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_try_clipping_before_unscale_lowers_the_threshold_by_the_scale(lesson, edited):
    first = "    scaler.unscale_(optimizer)\n"
    second = "    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)\n"
    _, rows = edited(lesson, first + second, second + first).show_everyday()
    assert rows[3][1] == pytest.approx(40960) == 5 * rows[3][0]
    assert [f"{w:.4f}" for w in rows[3][2:4]] == ["0.9999", "0.9999"]
    assert [row[0] for row in rows] == [2.0**k for k in (16, 15, 14, 13, 13)]


def test_the_everyday_steps_are_skipped_until_the_gradient_fits(lesson, capsys):
    with_bfloat16, rows = lesson.show_everyday()
    assert with_bfloat16 == pytest.approx((0.4, 0.2), abs=1e-5)
    assert [row[0] for row in rows] == [2.0**k for k in (16, 15, 14, 13, 13)]
    assert [row[4] for row in rows] == [2.0**k for k in (15, 14, 13, 13, 13)]
    assert [row[1] for row in rows] == pytest.approx([math.inf] * 3 + [5.0] * 2)
    weights = [*[1.0] * 6, 0.4, 0.2, -0.2, -0.6]
    assert [w for row in rows for w in row[2:4]] == pytest.approx(weights, abs=1e-5)
    out = capsys.readouterr().out
    assert re.search(r"^   bfloat16 +1 +- +5\.0000 +0\.4000 +0\.2000 +-$", out, re.MULTILINE)
    for step, (before, norm, w1, w2, after) in enumerate(rows, 1):
        cells = ["float16", str(step), f"{before:.0f}", f"{norm:.4f}", f"{w1:.4f}", f"{w2:.4f}"]
        assert [*cells, f"{after:.0f}"] in [line.split() for line in out.splitlines()]
    assert "-> 3 steps are skipped, until the larger gradient, 4 S = 32768" in out
    assert "below float16's largest, 65504" in out
    assert "(one example: loss |3 w1 + 4 w2|, so the gradient is (3, 4), of norm 5; cl" in out


# --- memory and types --------------------------------------------------------------------------


def test_kept_bytes_counts_inputs_of_the_backward_pass_once_and_no_weights(lesson):
    model, x, t = (
        nn.Sequential(nn.Linear(6, 4), nn.ReLU()),
        torch.randn(5, 6),
        torch.zeros(5).long(),
    )
    # x (5, 6), the output of ReLU (5, 4), that of log_softmax (5, 4), 5 classes, a weight
    assert lesson.kept_bytes(model, x, t, F32) == 4 * (30 + 20 + 20) + 8 * 5 + 4
    assert all(w.grad is not None and w.grad.dtype == F32 for w in model.parameters())
    wide = nn.Sequential(nn.Linear(6, 400), nn.GELU(), nn.Linear(400, 400), nn.GELU())
    x, t = torch.randn(4000, 6), torch.zeros(4000).long()
    kept = [lesson.kept_bytes(wide, x, t, dtype) for dtype in (F32, F16, BF16)]
    assert kept[1] == kept[2] and 0.5 < kept[1] / kept[0] < 0.7


def autocast_types(device, dtype):
    """{operation: types of its result under autocast, from float32 and from `dtype`}."""
    x, found = torch.randn(4, 8, device=device), {}
    t, ones = torch.arange(4, device=device), torch.ones(8, device=device)
    with torch.autocast(device, dtype):
        for name, run in {
            "matmul": lambda a: a @ a.T,
            "linear": lambda a: F.linear(a, a),
            "conv1d": lambda a: F.conv1d(a[None], a[None]),
            "attention": lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]),
            "softmax": lambda a: F.softmax(a, -1),
            "layer_norm": lambda a: F.layer_norm(a, (8,), ones),
            "exp": lambda a: a.exp(),
            "sum": lambda a: a.sum(),
            "gelu": lambda a: F.gelu(a),
            "cross_entropy": lambda a: F.cross_entropy(a, t),
            "mse_loss": lambda a: F.mse_loss(a, a),
        }.items():
            found[name] = run(x).dtype, run(x.to(dtype)).dtype
    return found


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_autocast_types_on_the_cpu(dtype):
    types = autocast_types("cpu", dtype)
    lower, upper, kept = (dtype,) * 2, (F32,) * 2, (F32, dtype)
    assert all(types[name] == lower for name in ("matmul", "linear", "conv1d", "attention"))
    assert all(types[name] == upper for name in ("cross_entropy", "mse_loss"))
    assert all(types[name] == kept for name in ("softmax", "layer_norm", "exp", "gelu"))


@needs_gpu
def test_autocast_types_on_a_gpu():
    types = autocast_types("cuda", F16)
    assert types["linear"] == (F16, F16)
    for name in ("softmax", "layer_norm", "exp", "sum"):
        assert types[name] == (F32, F32)


@needs_gpu
def test_a_gpu_is_faster_in_16_bits_and_the_step_runs_on_it(lesson, capsys):
    kept, seconds = lesson.show_reasons(64, 32, "cuda")
    assert kept["float16"] < kept["float32"]
    assert seconds["float32"] > 2 * max(seconds["float16"], seconds["bfloat16"]) > 0
    shown = re.search(r"float16 ([\d.]+), bfloat16", capsys.readouterr().out)[1]
    assert float(shown) == pytest.approx(seconds["float32"] / seconds["float16"], abs=0.06)
    model = nn.Linear(2, 1, bias=False, device="cuda")
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cuda")
    x, t = torch.tensor([[3.0, 4.0]], device="cuda"), torch.zeros(1, 1, device="cuda")
    for _ in range(4):
        lesson.amp_step(model, x, t, F.l1_loss, optimizer, scaler)
    assert model.weight.tolist()[0] == pytest.approx([0.4, 0.2], abs=1e-3)
    assert scaler.get_scale() == 2.0**13


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_limits_are_the_ends_of_the_format(lesson, name):
    dtype, E, M = lesson.FORMATS[name]
    largest, normal, smallest, epsilon = lesson.limits(E, M)
    integer = torch.int32 if dtype == F32 else torch.int16

    def from_bits(bits):
        return torch.tensor(bits, dtype=integer).view(dtype).item()

    def stored(x):
        return torch.tensor(x, dtype=torch.float64).to(dtype).item()

    assert largest == from_bits((2**E - 1) * 2**M - 1)  # exponent 1...10, mantissa 1...1
    assert (normal, smallest) == (from_bits(2**M), from_bits(1))
    for exact in (largest, normal, smallest, 1 + epsilon, 1 - epsilon / 2):
        assert stored(exact) == exact
    assert stored(largest * (1 + epsilon / 2)) == math.inf
    assert stored(1 + epsilon / 2) == stored(1 - epsilon / 4) == 1  # ties go to the even one
    assert stored(smallest / 2) == 0 and stored(smallest * 0.51) == smallest
    assert stored(1.5 * smallest) == 2 * smallest and stored(1.4 * smallest) == smallest


def test_formats_show_what_becomes_of_numbers_and_small_steps(lesson, capsys):
    stored = lesson.show_formats()
    assert stored["float32"] == pytest.approx([1e-8, 1.001, 7e4, 0.9], rel=1e-4)
    assert stored["float16"] == [0, 1.0009765625, math.inf, 1.0]
    assert stored["bfloat16"] == pytest.approx([1e-8, 1.0, 7.0144e4, 1.0], rel=2e-3)
    out = capsys.readouterr().out
    assert "1e-08 becomes 0 in float16, 1e-08 in bfloat16; small steps are lost in " in out
    assert "lost in float16 and bfloat16\n" in out
    for name, numbers in stored.items():
        cells = re.search(rf"^   {name} .*$", out, re.MULTILINE)[0].split()
        info = torch.finfo(lesson.FORMATS[name][0])
        smallest = info.smallest_normal * info.eps
        found = [float(cell) for cell in cells[3:]]
        assert found[:3] == pytest.approx([info.max, smallest, info.eps], rel=0.04)
        assert found[3:] == pytest.approx(numbers, rel=1e-3)
        assert [int(cell) for cell in cells[1:3]] == list(lesson.FORMATS[name][1:])
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_backward_in_16_bits_needs_the_scale_only_in_fp16(dtype):
    found = {}
    for S in (1.0, 2.0**10):
        w = torch.tensor([1.0], dtype=dtype, requires_grad=True)
        (w.sum() * 2.0**-26 * S).backward()
        found[S] = w.grad.item() / S
    assert found[2.0**10] == 2.0**-26
    assert found[1.0] == (0 if dtype == F16 else 2.0**-26)


def gradient_shares(model, x, t, S, loss_of):
    """Shares of the gradients at the outputs of all linear layers that are 0, and inf or nan."""
    gradients = []

    def watch(layer, args, y):
        y.register_hook(gradients.append)

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(watch)
    with torch.autocast("cpu", F16):
        loss = loss_of(model(x), t)
    (loss * S).backward()
    g = torch.cat([g.flatten() for g in gradients])
    assert g.dtype == F16
    return (g == 0).double().mean().item(), (~g.isfinite()).double().mean().item()


@pytest.mark.parametrize("seed", range(5))
def test_the_shares_of_gradients_made_0_and_inf_by_s(lesson, seed):
    torch.manual_seed(seed)
    model, x, t = lesson.classifier(), torch.randn(128, 16), torch.randint(4, (128,))

    def shares(k):
        return gradient_shares(copy.deepcopy(model), x, t, 2.0**k, lesson.pixel_loss)

    zeroed = [shares(k)[0] for k in (0, 4, 8, 16, 24)]
    assert zeroed[0] == 1 > zeroed[1] > 0.9 > zeroed[2] > 0.2 > 0.01 > zeroed[3] >= zeroed[4]
    assert shares(24)[1] == shares(36)[1] == 0 and shares(36)[0] < 1e-3
    assert shares(50) == (0, 1)


@pytest.mark.parametrize("log2_scale", [0, 8, 16])
def test_the_share_of_log_uniform_gradients_that_fp16_makes_0(log2_scale):
    torch.manual_seed(0)
    g = 10 ** torch.empty(200_000, dtype=torch.float64).uniform_(-10, -2)
    theory = max(0.0, (math.log10(2.0 ** (-25 - log2_scale)) + 10) / 8)
    share = ((g * 2.0**log2_scale).half() == 0).double().mean().item()
    assert share == pytest.approx(theory, abs=5e-3)


# --- the scaler --------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("overflow_at", [(), (0,), (1, 2, 7), (3, 9)])
def test_our_scaler_lives_as_torchs(lesson, interval, overflow_at):
    options = {"init_scale": 2.0**7, "growth_interval": interval}
    assert lesson.LossScaler().interval == torch.amp.GradScaler("cpu").get_growth_interval()
    ours = lesson.life(lesson.LossScaler(growth=4.0, backoff=0.25, **options), 12, overflow_at)
    twin = torch.amp.GradScaler("cpu", growth_factor=4.0, backoff_factor=0.25, **options)
    theirs = lesson.life(twin, 12, overflow_at)
    assert ours[:2] == theirs[:2]
    assert torch.equal(ours[2], theirs[2])
    assert [i for i, taken in enumerate(ours[1]) if not taken] == list(overflow_at)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("looked", [True, False])
def test_one_bad_number_in_one_parameter_skips_all_of_them(lesson, bad, place, looked):
    pair = [torch.ones(2, requires_grad=True) for _ in range(2)]
    idle = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [pair[0], idle]}, {"params": [pair[1]]}], lr=0.1)
    scaler = lesson.LossScaler(init_scale=4.0)
    assert scaler.scale(torch.tensor(3.0)) == 12 and scaler.get_scale() == 4.0
    for w in pair:
        w.grad = torch.tensor([4.0, 8.0])
    pair[place].grad[1] = bad
    if looked:  # divided by S once, however often it is asked for
        assert scaler.unscale_(optimizer) is None and scaler.overflow is True
    scaler.step(optimizer)
    assert all(torch.equal(w, torch.ones(2)) for w in pair)
    assert pair[1 - place].grad.tolist() == [1.0, 2.0] and idle.grad is None
    scaler.update()
    assert scaler.S == 2.0 and scaler.overflow is None and scaler.good == 0
    for w in pair:
        w.grad = torch.ones(2)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.good == 1 and scaler.S == 2.0
    assert all(w.tolist() == pytest.approx([0.95, 0.95]) for w in pair)


def test_with_an_interval_of_1_the_scale_doubles_in_every_step_taken(lesson, tmp_path):
    scales, taken = lesson.show_scaler(tmp_path, interval=1)
    for i in range(len(scales) - 1):
        assert scales[i + 1] == scales[i] * (2 if taken[i] else 0.5)
    assert [i for i, good in enumerate(taken) if not good] == [4, 5]


# --- training ----------------------------------------------------------------------------------


def test_the_pixels_slopes_are_below_what_fp16_can_hold(lesson):
    z, t = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    loss = lesson.pixel_loss(z, t)
    assert loss.item() == pytest.approx(F.cross_entropy(z, t).item() * 6 / 2**27)
    loss.backward()
    assert 0 < z.grad.abs().max() <= 2.0**-27 and (z.grad.half() == 0).all()


def test_fit_learns_only_what_survives(lesson):
    torch.manual_seed(0)
    start, x, t = lesson.classifier(8), torch.randn(5, 16, 16), torch.randint(4, (5, 16))
    batches, moved = list(zip(x, t, strict=True)), {}
    for dtype, scaled in ((F32, False), (F16, False), (F16, True), (BF16, False)):
        model = copy.deepcopy(start)
        losses = lesson.fit(model, batches, dtype, scaled, lr=0.01)
        assert losses[0] == pytest.approx(F.cross_entropy(start(x[0]), t[0]).item(), abs=0.02)
        assert len(losses) == 5
        vectors = [parameters_to_vector(m.parameters()) for m in (model, start)]
        moved[dtype, scaled] = vectors[0] - vectors[1]
    assert (moved[F16, False] == 0).all()
    for key in ((F16, True), (BF16, False)):  # Adam's first steps are lr long
        torch.testing.assert_close(moved[key].abs().mean(), moved[F32, False].abs().mean(),
                                   rtol=0.1, atol=0)  # fmt: skip
    assert 0.005 < moved[F32, False].abs().max() <= 0.0501


@pytest.mark.parametrize("seed", range(3))
def test_adams_default_eps_is_too_large_for_these_gradients(lesson, edited, seed):
    torch.manual_seed(seed)
    start, teacher, x = lesson.classifier(), lesson.classifier(), torch.randn(40, 128, 16)
    with torch.no_grad():
        teacher[-1].weight *= 8
        batches = list(zip(x, teacher(x).argmax(-1), strict=True))
    plain = edited(lesson, "lr, eps=1e-16)", "lr)")
    ends = []
    for module, dtype, scaled in ((lesson, F32, False), (plain, F32, False), (plain, F16, True)):
        ends.append(sum(module.fit(copy.deepcopy(start), batches, dtype, scaled)[-10:]) / 10)
    assert ends[1] > ends[0] + 0.04
    assert ends[2] == pytest.approx(ends[1], abs=5e-3)  # S does not help
    lesson.pixel_loss(start(x[0]), batches[0][1]).backward()
    g = torch.cat([w.grad.flatten() for w in start.parameters()])
    assert 1e-9 < g.abs().median() < 1e-8 < g.square().mean().sqrt() < 1e-7


@pytest.fixture(scope="module")
def measured(lesson, three_seeds, tmp_path_factory):
    """(result, folder, printed) of three seeds."""
    return three_seeds(lambda *seed_and_dir: lesson.main(*seed_and_dir, **SMALL), tmp_path_factory)


def test_main_trains_in_fp16_only_with_the_scaler(measured):
    for result, _, printed in measured:
        ends = result["training"]
        for name, (loss, right, moved, far) in ends.items():
            row = f"   {name:<16}   {loss:.4f} {right:10.3f} {moved:13.3f} {far:33.5f}\n"
            assert row in printed
        assert ends["float16"] == ends["not trained"] and ends["float16"][2] == 0
        assert ends["float32"][3] == 0 and ends["not trained"][3] > 5e-3
        for name in ("bfloat16", "float16_scaled"):  # near float32's weights, and not the same
            assert 1e-6 < ends[name][3] < 0.2 * ends["not trained"][3]
        best = ends["float32"]
        assert best[0] < ends["not trained"][0] - 0.1 and best[1] > ends["not trained"][1] + 0.05
        for name in ("bfloat16", "float16_scaled"):
            assert ends[name][0] == pytest.approx(best[0], abs=2e-3) and ends[name][2] > 0.99
        assert ends["bfloat16_weights"][0] > best[0] + 0.02 and ends["bfloat16_weights"][2] < 0.9
        gap = abs(ends["float16_scaled"][0] - best[0])
        assert f"float16 alone moved 0% of the weights; scaled, its loss is {gap:.0e} aw" in printed
        loss, _, moved, _ = ends["bfloat16_weights"]
        assert (
            f"in bfloat16: loss {loss:.4f}, and {1 - moved:.0%} of them are where they" in printed
        )


def test_main_prints_memory_and_says_what_is_skipped(measured):
    for result, log_dir, printed in measured:
        kept, seconds = result["reasons"]
        assert kept["float16"] == kept["bfloat16"] < 0.8 * kept["float32"]
        for name, size in kept.items():
            row = re.search(rf"^   {name} +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
            weights = 4 * 4 * (32 * 32 + 32) / 1e6
            expected = [weights, size, size / kept["float32"]]
            assert [float(cell) for cell in row.groups()] == pytest.approx(expected, abs=6e-3)
        assert f"falls to {kept['bfloat16'] / kept['float32']:.2f} in 16 bits" in printed
        assert bool(seconds) == torch.cuda.is_available()
        assert ("speed: skipped, no CUDA GPU" in printed) == (not seconds)
        assert "-> 2 steps are skipped, each halves S; log2 S ends at 17" in printed
        assert f"look: tensorboard --logdir {log_dir} " in printed
        assert "(the gradients of steps 4 and 5 are inf; " in printed
        assert "doubles after 3 good steps\n" in printed
        scales, taken = result["life"]
        for name in ("ours ", "torch"):
            row = re.search(rf"^   {name}   log2 S(.*)$", printed, re.MULTILINE)[1].split()
            assert [int(cell) for cell in row] == [math.log2(S) for S in scales]
            row = re.search(rf"^   {name}   skipped(.*)$", printed, re.MULTILINE)[1]
            yes = [row[5 * i : 5 * i + 5] == "  yes" for i in range(len(taken))]
            assert yes == [not good for good in taken]
        lines = [line for line in printed.splitlines() if not line.startswith("look")]
        assert max(map(len, lines)) <= 100


def test_main_logs_each_life_and_each_training(measured, events):
    (result, log_dir, _), *_ = measured
    scales, taken = result["life"]
    for name in ("ours", "torch"):
        run = events(log_dir / name)
        assert [e.value for e in run.Scalars("amp/log2_scale")] == [math.log2(S) for S in scales]
        assert [e.value for e in run.Scalars("amp/step_taken")] == taken
    names = {"float32", "bfloat16", "bfloat16_weights", "float16", "float16_scaled"}
    assert {path.name for path in log_dir.iterdir()} == names | {"ours", "torch"}
    curves = {}
    for name in ("float32", "bfloat16", "bfloat16_weights", "float16", "float16_scaled"):
        logged = events(log_dir / name).Scalars("train/loss")
        assert [e.step for e in logged] == list(range(SMALL["train_steps"]))
        curves[name] = [e.value for e in logged]
        assert curves[name][0] == pytest.approx(curves["float32"][0], abs=0.02)

    def tail(name):
        return sum(curves[name][-10:]) / 10

    assert tail("float32") < tail("bfloat16_weights") - 0.01 < tail("float16") - 0.02
    assert tail("float16_scaled") == pytest.approx(tail("float32"), abs=5e-3)
    assert tail("bfloat16") == pytest.approx(tail("float32"), abs=5e-3)
