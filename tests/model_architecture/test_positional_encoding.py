import math

import pytest
import torch

F64 = torch.float64


@pytest.fixture(scope="module")
def lesson(load):
    return load("model_architecture/positional_encoding.py")


def test_sinusoidal_by_its_formula(lesson):
    PE = lesson.sinusoidal(5, 6, base=100.0)
    for t in range(5):
        for i in range(3):
            w = 100.0 ** (-2 * i / 6)
            assert PE[t, 2 * i].item() == pytest.approx(math.sin(t * w), abs=1e-6)
            assert PE[t, 2 * i + 1].item() == pytest.approx(math.cos(t * w), abs=1e-6)


def test_rope_turns_one_pair_by_its_angle(lesson):
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])  # pairs (1, 0), (0, 2) as neighbours
    y = lesson.apply_rope(x, torch.tensor([3]), base=100.0, interleaved=True)
    a, b = 3.0, 0.3
    expected = [math.cos(a), math.sin(a), -2 * math.sin(b), 2 * math.cos(b)]
    assert y[0].tolist() == pytest.approx(expected, abs=1e-6)
    y = lesson.apply_rope(x, torch.tensor([3]), base=100.0)  # pairs (1, 0), (0, 2) again: 0 2, 1 3
    expected = [math.cos(a), -2 * math.sin(b), math.sin(a), 2 * math.cos(b)]
    assert y[0].tolist() == pytest.approx(expected, abs=1e-6)


def complex_rope(x, positions, base):
    """Interleaved pairs as complex numbers, times e^(i t w)."""
    d = x.size(-1)
    w = base ** (-torch.arange(0, d, 2, dtype=F64) / d)
    turn = torch.polar(torch.ones(len(positions), d // 2, dtype=F64), positions[:, None] * w)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * turn).flatten(-2)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0, 7.0])
@pytest.mark.parametrize("d", [2, 6, 10])
def test_rope_is_multiplication_by_complex_numbers(lesson, d, base):
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 5, d, dtype=F64), torch.tensor([0, 4, 1, 300, 7])
    x.requires_grad_()
    ours = lesson.apply_rope(x, positions, base, interleaved=True)
    theirs = complex_rope(x, positions, base)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads)
    order = lesson.to_half_split(d)
    half = lesson.apply_rope(x[..., order], positions, base)
    torch.testing.assert_close(half, ours[..., order])


def test_half_split_is_rotate_half(lesson):
    torch.manual_seed(0)
    x, positions = torch.randn(2, 4, 7, 8), torch.arange(7)
    a = lesson.angles(positions, 8)
    cos, sin = (torch.cat([f, f], dim=-1) for f in (a.cos(), a.sin()))
    halves = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
    torch.testing.assert_close(lesson.apply_rope(x, positions), x * cos + halves * sin)


@pytest.mark.parametrize("interleaved", [True, False])
def test_positions_may_differ_in_the_batch_be_negative_or_broken(lesson, interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, dtype=F64)  # (B, H, T, d)
    positions = torch.tensor([[0, 1, 2, 3], [-2, 5, 0.5, 9]], dtype=F64)
    y = lesson.apply_rope(x, positions, interleaved=interleaved)
    for b in range(2):
        each = lesson.apply_rope(x[b], positions[b], interleaved=interleaved)
        torch.testing.assert_close(y[b], each)
    torch.testing.assert_close(lesson.apply_rope(x, positions * 0, interleaved=interleaved), x)
    back = lesson.apply_rope(y, -positions, interleaved=interleaved)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_right_far_out(lesson, dtype):
    torch.manual_seed(0)
    x, positions = torch.randn(1, 3, 8).to(dtype), torch.tensor([0, 2049, 30_001])
    y = lesson.apply_rope(x, positions)
    assert y.dtype == dtype
    exact = lesson.apply_rope(x.double(), positions)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=3 * torch.finfo(dtype).eps + 5e-3)


@pytest.mark.parametrize("interleaved", [True, False])
def test_try_a_shift_of_all_positions_changes_no_score(lesson, interleaved):
    torch.manual_seed(0)
    q, k = torch.randn(2, 9, 10, dtype=F64)
    positions, scores = torch.arange(9), []
    for shift in (0, 1000):
        turned = [lesson.apply_rope(z, positions + shift, interleaved=interleaved) for z in (q, k)]
        scores.append(turned[0] @ turned[1].T)
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)
    assert (scores[0] - q @ k.T).abs().max() > 0.1


def test_what_does_not_fit_is_refused(lesson):
    for x, positions, message in (
        (torch.randn(4, 5), torch.arange(4), "d must be even, not 5"),
        (torch.randn(4, 6), torch.arange(3), r"positions \(3,\) do not fit x \(4, 6\)"),
        (torch.randn(4, 6), torch.tensor(2), "do not fit"),
        (torch.randn(4, 6), torch.zeros(4, 4), "do not fit"),
        (torch.randn(4, 6), torch.zeros(1, 4), "do not fit"),
        (torch.randn(2, 4, 6), torch.zeros(3, 4), r"positions \(3, 4\) do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            lesson.apply_rope(x, positions)
    with pytest.raises(ValueError, match="d must be even"):
        lesson.sinusoidal(4, 7)
    with pytest.raises(ValueError, match="the table has 8 positions, the input 9"):
        lesson.LearnedPositions(8, 4)(9)


def test_a_lengthened_table_answers_as_before_where_it_was_trained(lesson):
    torch.manual_seed(0)
    model, tokens = lesson.Echo("learned", 5, 8), torch.randint(5, (3, 8))
    longer = lesson.lengthen(model, 15)
    torch.testing.assert_close(longer(tokens), model(tokens))
    assert torch.equal(longer.positions(8), model.positions(8)) and len(longer.positions(15)) == 15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sinusoids_are_right_far_out(lesson, dtype):
    half, exact = lesson.sinusoidal(4096, 8, dtype=dtype), lesson.sinusoidal(4096, 8, dtype=F64)
    assert half.dtype == dtype
    assert (half.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps


def test_a_learned_table_gives_its_first_rows(lesson):
    table = lesson.LearnedPositions(6, 4)
    table(3).sum().backward()
    assert torch.equal(table(3), table.table(torch.arange(3)))
    assert table.table.weight.grad.abs().sum(1).tolist() == [4, 4, 4, 0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_its_laws_and_reads_relative_positions(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, lengths=(16, 48), steps=300)
    assert result["order"]["none"] < 1e-12 and result["order"]["sinusoidal"] > 0.05
    assert result["laws"]["mixed"] > 1 and result["laws"]["spread"] > 0.5
    assert result["decoding"]["right"] < 1e-12 and result["decoding"]["forgotten"] > 0.1
    table = result["table"]
    assert all(table[kind, 16] > 0.95 for kind in ("sinusoidal", "learned", "rope"))
    assert table["none", 16] < 0.35
    assert table["rope", 48] > 0.85 and table["sinusoidal", 48] < 0.7
    assert table["learned", 48] < 0.25
    for name in ("sinusoidal", "rope", "projected"):
        assert len(events(tmp_path / name).Images("encoding/scores")) == 1
