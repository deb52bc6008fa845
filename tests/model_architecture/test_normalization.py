import pytest
import torch
from torch import nn

HALF = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # after three batches in 16 bits


@pytest.fixture(scope="module")
def lesson(load):
    return load("model_architecture/normalization.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("runs")
    norms = ("BatchNorm", "GroupNorm", "InstanceNorm")
    small = {"trials": 1000, "norms": norms, "sizes": (2,), "steps": 300}
    return lesson.main(request.param, log_dir, **small), log_dir


def test_normalize_by_hand(lesson):
    x = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    y = lesson.normalize(x, 1, eps=1e-12)
    torch.testing.assert_close(y[0], torch.tensor([-1.0, 1.0]))
    assert y[1].tolist() == [0, 0]


TWINS = {  # of the lesson, of torch, arguments, shape
    "three axes": ("BatchNorm", nn.BatchNorm1d, (6, 1e-3, 0.3), (5, 6, 7)),
    "no length": ("BatchNorm", nn.BatchNorm1d, (6,), (5, 6)),
    "cumulative": ("BatchNorm", nn.BatchNorm2d, (6, 1e-5, None), (2, 6, 3, 5)),
    "no weights": ("BatchNorm", nn.BatchNorm2d, (6, 1e-5, 0.1, False), (2, 6, 3, 5)),
    "InstanceNorm": ("InstanceNorm", nn.InstanceNorm2d, (6, 1e-2), (2, 6, 3, 5)),
    "GroupNorm": ("GroupNorm", nn.GroupNorm, (3, 6, 1e-2), (2, 6, 3, 5)),
    "vectors": ("GroupNorm", nn.GroupNorm, (2, 6), (4, 6)),
    "LayerNorm": ("LayerNorm", nn.LayerNorm, (5, 1e-2), (2, 3, 5)),
    "two axes": ("LayerNorm", nn.LayerNorm, ((3, 5),), (2, 6, 3, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("name", TWINS)
def test_outputs_gradients_and_state_are_torchs(lesson, name, dtype):
    torch.manual_seed(0)
    ours, library, args, shape = TWINS[name]
    ours, library = getattr(lesson, ours)(*args), library(*args)
    for parameter in library.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(library.state_dict())
    ours, library = ours.to(dtype), library.to(dtype)
    x = (3 + 2 * torch.randn(shape)).to(dtype)
    tolerance = HALF.get(dtype, 1e-5 if dtype == torch.float32 else 1e-12)
    for mode in (True, True, True, False):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        pair = [m.train(mode)(leaf) for m, leaf in zip((ours, library), leaves, strict=True)]
        assert pair[0].dtype == dtype
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
        for out in pair:
            (out.float() if dtype in HALF else out).sin().sum().backward()
        torch.testing.assert_close(
            leaves[0].grad, leaves[1].grad, rtol=tolerance, atol=2 * tolerance
        )
        x = 1.5 * x - 1
    grads = [[p.grad for p in m.parameters()] for m in (ours, library)]
    torch.testing.assert_close(*grads, rtol=5 * tolerance, atol=10 * tolerance)
    state, expected = ours.state_dict(), library.state_dict()
    assert state.keys() == expected.keys()
    torch.testing.assert_close(dict(state), dict(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(HALF))
def test_half_input_with_float32_weights_stays_half_as_in_torch(lesson, dtype):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(4, 6, 5)).to(dtype)
    for ours, library in (
        (lesson.BatchNorm(6), nn.BatchNorm1d(6)),
        (lesson.GroupNorm(3, 6), nn.GroupNorm(3, 6)),
        (lesson.LayerNorm(5), nn.LayerNorm(5)),
        (lesson.InstanceNorm(6, affine=True), nn.InstanceNorm1d(6, affine=True)),
    ):
        for mode in (True, False):
            y, expected = ours.train(mode)(x), library.train(mode)(x.float()).to(dtype)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_running_variance_is_unbiased_and_momentum_weighs_the_new(lesson):
    norm = lesson.BatchNorm(1, momentum=0.25)
    norm(torch.tensor([[1.0], [5.0]]))  # mean 3, variance 8 by n - 1, 4 by n
    assert norm.running_mean.item() == pytest.approx(0.25 * 3)
    assert norm.running_var.item() == pytest.approx(0.75 + 0.25 * 8)


def test_half_precision_sums_do_not_overflow(lesson):
    x = torch.full((4, 2, 100), 6e4, dtype=torch.float16)
    x[:, :, ::2] = -6e4
    for norm in (lesson.BatchNorm(2), lesson.InstanceNorm(2), lesson.LayerNorm(100)):
        y = norm.half()(x)
        torch.testing.assert_close(y.abs(), torch.ones_like(y), rtol=1e-2, atol=0)


def test_shapes_that_do_not_fit_are_refused(lesson):
    for norm, x, message in (
        (lesson.BatchNorm(3), torch.randn(4, 5), r"BatchNorm needs \(B, 3, \.\.\.\), not \(4, 5\)"),
        (lesson.BatchNorm(3), torch.randn(1, 3), "a mean over 1 value"),
        (lesson.BatchNorm(3), torch.randn(0, 3), "a mean over 0 value"),
        (lesson.InstanceNorm(3), torch.randn(2, 3, 1), "a mean over 1 value"),
        (lesson.GroupNorm(3, 3), torch.randn(1, 3), "a mean over 1 value"),
        (lesson.BatchNorm(3), torch.randn(3), "BatchNorm needs"),
        (lesson.InstanceNorm(3), torch.randn(4, 3), r"InstanceNorm needs \(B, 3, L, \.\.\.\)"),
        (lesson.GroupNorm(3, 6), torch.randn(2, 9), r"GroupNorm needs \(B, 6, \.\.\.\)"),
        (lesson.LayerNorm(4), torch.randn(2, 1), "LayerNorm needs"),
    ):
        with pytest.raises(ValueError, match=message):
            norm(x)
    for groups in (2, 0, -7):
        with pytest.raises(ValueError, match=f"7 channels do not split into {groups} groups"):
            lesson.GroupNorm(groups, 7)


def test_a_batch_norm_output_depends_on_its_company_in_training_alone(lesson):
    torch.manual_seed(0)
    x, company = torch.randn(2, 1, 3, 5), torch.randn(1, 3, 5) + 4
    for norm in (lesson.BatchNorm(3), lesson.GroupNorm(3, 3), lesson.InstanceNorm(3)):
        alone, together = norm(x[0]), norm(torch.cat([x[0], company]))[:1]
        assert torch.allclose(alone, together) == (not isinstance(norm, lesson.BatchNorm))
    norm = lesson.BatchNorm(3).eval()
    torch.testing.assert_close(norm(x[0]), norm(torch.cat([x[0], company]))[:1])


def test_layer_norm_is_rms_norm_of_what_is_centred(lesson):
    torch.manual_seed(0)
    x = torch.randn(4, 7, dtype=torch.float64)
    rms = nn.RMSNorm(7, eps=1e-5, dtype=torch.float64)
    torch.testing.assert_close(lesson.LayerNorm(7).double()(x), rms(x - x.mean(1, keepdim=True)))
    torch.testing.assert_close(lesson.LayerNorm(7).double()(x + 3), lesson.LayerNorm(7).double()(x))
    assert (rms(x + 3) - rms(x)).abs().max() > 0.1


def test_main_normalises_its_own_axes_and_no_others(measured):
    # where a mean over some axes is 0, so it is over more axes: those of InstanceNorm are in all
    contained = {
        "InstanceNorm": {"BatchNorm", "GroupNorm", "LayerNorm"},
        "GroupNorm": {"LayerNorm"},
    }
    for name, means in measured[0]["rest"].items():
        for other, mean in means.items():
            if other == name or other in contained.get(name, ()):
                assert mean < 1e-12
            else:
                assert mean > 0.1


def test_main_measures_noise_and_ends(measured):
    result, _ = measured
    assert result["biased"] == pytest.approx(3 / 4, abs=1e-3)
    assert result["ends"][0] < 1e-12 and result["ends"][1] < 1e-12 and result["ends"][2] > 0.1
    for B, value in result["noise"].items():
        assert value == pytest.approx(4 / B, rel=0.2)


def test_main_small_batches_break_batch_norm_and_loudness_the_others(measured, events):
    table, log_dir = measured[0]["table"], measured[1]
    assert table["BatchNorm", 2] < table["GroupNorm", 2]
    assert table["loudness", "BatchNorm"] > 0.38
    assert max(table["loudness", name] for name in ("GroupNorm", "InstanceNorm")) < 0.35
    assert len(events(log_dir / "waveform" / "BatchNorm").Scalars("val/accuracy")) == 1


def test_try_with_a_bias_group_norm_hears_the_scale(lesson):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 32)
    for bias in (True, False):
        model = lesson.network(lesson.NORMS["GroupNorm"], bias=bias).eval()
        same = torch.allclose(model(x), model(50 * x), rtol=1e-2, atol=1e-3)
        assert same == (not bias)
