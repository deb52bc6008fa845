import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SMALL = {"n": 200_000, "train_steps": 150, "sizes": (32, 64)}
FORMATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/amp_training.py")


@pytest.mark.parametrize("dtype", FORMATS)
def test_limits_are_the_ends_of_the_format(lesson, dtype):
    E, M, _ = lesson.FORMATS[dtype]
    largest, normal, smallest, epsilon = lesson.limits(E, M)

    def stored(x):
        return torch.tensor(x, dtype=torch.float64).to(dtype).item()

    for exact in (largest, normal, smallest, 1 + epsilon, 1 - epsilon / 2):
        assert stored(exact) == exact
    assert stored(largest * (1 + epsilon / 2)) == math.inf
    assert stored(1 + epsilon / 2) == stored(1 - epsilon / 4) == 1  # ties go to the even one
    assert stored(smallest / 2) == 0 and stored(smallest * 0.51) == smallest
    assert stored(1.5 * smallest) == 2 * smallest and stored(1.4 * smallest) == smallest


def test_one_sign_exponent_and_mantissa_give_the_number(lesson):
    assert lesson.from_bits(0b0_10000_1000000000, torch.float16) == 3.0  # 2^1 * 1.5
    assert lesson.from_bits(0b0_01111110_0100000, torch.bfloat16) == 0.625  # 2^-1 * 1.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backward_in_16_bits_needs_the_scale_only_in_fp16(dtype):
    found = {}
    for S in (1.0, 2.0**10):
        w = torch.tensor([1.0], dtype=dtype, requires_grad=True)
        (w.sum() * 2.0**-26 * S).backward()
        found[S] = w.grad.item() / S
    assert found[2.0**10] == 2.0**-26
    assert found[1.0] == (0 if dtype == torch.float16 else 2.0**-26)


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("overflow_at", [(), (0,), (1, 2, 7), (3, 9)])
def test_our_scaler_lives_as_torchs(lesson, interval, overflow_at):
    options = {"init_scale": 2.0**7, "growth_interval": interval}
    ours = lesson.life(lesson.LossScaler(growth=4.0, backoff=0.25, **options), 12, overflow_at)
    theirs = lesson.life(
        lesson.make_grad_scaler(growth_factor=4.0, backoff_factor=0.25, **options), 12, overflow_at
    )
    assert ours[:2] == theirs[:2]
    assert torch.equal(ours[2], theirs[2])
    assert [i for i, taken in enumerate(ours[1]) if not taken] == list(overflow_at)


def test_one_overflow_in_one_parameter_skips_all_of_them(lesson):
    a, b, idle = (torch.ones(2, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.SGD([a, b, idle], lr=0.1)
    scaler = lesson.LossScaler(init_scale=4.0)
    scaler.scale(a.sum() + math.inf * b.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(a, torch.ones(2)) and torch.equal(a.grad, torch.ones(2))
    assert scaler.S == 2.0 and idle.grad is None


def test_try_with_an_interval_of_1_the_scale_doubles_in_every_step_taken(lesson, tmp_path):
    scales, taken = lesson.show_scaler(tmp_path, growth_interval=1)
    for i in range(len(scales) - 1):
        assert scales[i + 1] == scales[i] * (2 if taken[i] else 0.5)
    assert taken.count(False) == 2


@pytest.mark.parametrize(("unscale", "norm"), [(True, 1.0), (False, 2.0**-16)])
def test_clipping_before_unscale_lowers_the_threshold_by_the_scale(lesson, unscale, norm):
    w = torch.ones(4, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([w], lr=1.0), lesson.make_grad_scaler()
    scaler.scale(3 * w.sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([w], 1.0)
    seen = w.grad / (1 if unscale else scaler.get_scale())  # step() divides what is still scaled
    assert seen.norm().item() == pytest.approx(norm)


def test_gradient_shares_are_those_of_the_halves(lesson):
    torch.manual_seed(0)
    model, x, t = lesson.classifier(8), torch.randn(9, 16), torch.randint(4, (9,))
    shares = {k: lesson.gradient_shares(model, x, t, 2.0**k) for k in (-40, 0, 40)}
    assert shares[-40] == (1.0, 0.0) and shares[0] == (0.0, 0.0)
    assert shares[40][1] > 0.9
    assert not any(layer._forward_hooks for layer in model)


def test_autocast_types_on_the_cpu(lesson):
    for dtype in (torch.bfloat16, torch.float16):
        types = lesson.autocast_types("cpu", dtype)
        lower, upper, kept = (dtype,) * 2, (torch.float32,) * 2, (torch.float32, dtype)
        assert all(types[name] == lower for name in ("matmul", "linear", "conv1d", "attention"))
        assert all(types[name] == upper for name in ("cross_entropy", "mse_loss"))
        assert all(types[name] == kept for name in ("softmax", "layer_norm", "exp", "gelu"))


def test_weights_and_their_gradients_stay_float32_under_autocast(lesson):
    torch.manual_seed(0)
    model, before = lesson.classifier(8), torch.get_default_dtype()
    batches, _ = lesson.teacher_task(3, B=16)
    losses = lesson.fit(model, batches, torch.bfloat16, lr=0.01)
    assert len(losses) == 3 and torch.get_default_dtype() == before
    assert losses[0] == pytest.approx(math.log(4), abs=0.5)  # of 4 classes, none of them known
    assert all(w.dtype == w.grad.dtype == torch.float32 for w in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(1, 16), model[0].weight).dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(3))
def test_main_scales_trains_and_looks(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    assert result["updates"][torch.float32] == pytest.approx(0.9, abs=1e-3)
    assert result["updates"][torch.float16] == result["updates"][torch.bfloat16] == 1.0
    for measured, theory in result["flush"].values():
        assert measured == pytest.approx(theory, abs=5e-3)
    ends = result["training"]
    assert ends["bfloat16"] == pytest.approx(ends["float32"], abs=2e-3)
    assert ends["bfloat16"] != ends["float32"] < 1  # log 4 = 1.39 is chance
    assert ends["bfloat16_weights"] > ends["float32"] + 0.1
    network = result["network"]
    assert network[0][0] > network[4][0] > network[16][0] == network[16][1] == 0
    assert network[32][1] > 0.5
    assert events(tmp_path / "torch").Scalars("amp/log2_scale")[-1].value == 17


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_autocast_types_on_a_gpu(lesson):
    types = lesson.autocast_types("cuda", torch.float16)
    assert types["linear"] == (torch.float16,) * 2
    for name in ("softmax", "layer_norm", "exp", "sum"):
        assert types[name] == (torch.float32,) * 2
