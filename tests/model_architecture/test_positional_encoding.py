import contextlib
import io
import math
import re

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
def test_a_shift_of_all_positions_changes_no_score(lesson, interleaved):
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


def test_plain_is_complete(lesson):
    torch.manual_seed(0)
    torch.testing.assert_close(lesson.plain_sinusoidal(9, 10), lesson.sinusoidal(9, 10))
    x = torch.randn(9, 10)
    torch.testing.assert_close(lesson.plain_rope(x), lesson.apply_rope(x, torch.arange(9)))
    x = torch.randn(2, 3, 9, 10)  # (B, H, T, d)
    torch.testing.assert_close(lesson.plain_rope(x), lesson.apply_rope(x, torch.arange(9)))
    q, k, v = torch.randn(3, 2, 5, 6, dtype=F64)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(lesson.attend(q, k, v), theirs)


def test_products_of_sinusoids_know_the_distance_alone(lesson):
    PE = lesson.sinusoidal(40, 12, dtype=F64)
    products = PE @ PE.T
    w = 10000.0 ** (-2 * torch.arange(6, dtype=F64) / 12)
    t = torch.arange(40)
    distance = (t[:, None] - t).abs()
    torch.testing.assert_close(products, (distance[..., None] * w).cos().sum(-1))


def test_scores_of_rope_know_the_signed_offset(lesson):
    torch.manual_seed(0)
    q, k = torch.randn(2, 12, dtype=F64)
    t = torch.arange(20)
    turned_q, turned_k = (lesson.apply_rope(z.expand(20, 12), t) for z in (q, k))
    scores = turned_q @ turned_k.T
    for m, n in ((0, 0), (3, 11), (11, 3), (19, 0)):
        alone = q @ lesson.apply_rope(k[None], torch.tensor([n - m]))[0]
        torch.testing.assert_close(scores[m, n], alone)
    assert (scores - scores.T).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["none", "sinusoidal", "learned", "rope"])
def test_positions_go_to_the_inputs_or_to_q_and_k_but_not_to_v(lesson, kind):
    torch.manual_seed(0)
    model, tokens = lesson.Echo(kind, 5, 8, d=6), torch.randint(5, (3, 7))
    x, t = model.tokens(tokens), torch.arange(7)
    if kind == "sinusoidal":
        x = x + lesson.sinusoidal(7, 6)
    elif kind == "learned":
        x = x + model.positions.table.weight[:7]
    q, k, v = (x @ W.T + b for W, b in
               zip(model.qkv.weight.chunk(3), model.qkv.bias.chunk(3), strict=True))  # fmt: skip
    if kind == "rope":
        q, k = lesson.apply_rope(q, t), lesson.apply_rope(k, t)
    expected = model.head(torch.nn.functional.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(model(tokens), expected)


def test_a_learned_table_starts_small(lesson):
    torch.manual_seed(0)
    assert lesson.LearnedPositions(200, 50).table.weight.std().item() == pytest.approx(
        0.02, rel=0.05
    )


class Says(torch.nn.Module):
    """Says the token two places back up to position 5, and token 0 from there on."""

    def forward(self, tokens):
        said = tokens.roll(2, dims=1)
        said[:, 5:] = 0
        return torch.nn.functional.one_hot(said, 4).float()


def test_accuracy_is_that_of_the_positions_asked_for(lesson):
    torch.manual_seed(0)
    accuracy = lesson.echo_accuracy
    assert accuracy(Says(), 4, 12, 2, 0, 5) == 1
    assert accuracy(Says(), 4, 12, 2, 5) == pytest.approx(0.25, abs=0.06)
    assert accuracy(Says(), 4, 12, 2, 4) == pytest.approx(1 / 8 + 7 / 8 / 4, abs=0.06)
    assert accuracy(Says(), 4, 12, 2, 0) == pytest.approx(0.3 + 0.7 / 4, abs=0.06)


def test_outputs_move_with_their_inputs_unless_they_are_told_positions(lesson):
    torch.manual_seed(0)
    x, order, t = torch.randn(7, 8, dtype=F64), torch.randperm(7), torch.arange(7)
    W_q, W_k, W_v = torch.randn(3, 8, 8, dtype=F64)
    zero, table = torch.zeros(7, 8, dtype=F64), lesson.sinusoidal(7, 8, dtype=F64)
    for name, added in (("none", zero), ("sinusoidal", table), ("rope", zero)):
        outputs = []
        for z in (x + added, x[order] + added):
            q, k = z @ W_q, z @ W_k
            if name == "rope":
                q, k = lesson.apply_rope(q, t), lesson.apply_rope(k, t)
            outputs.append(lesson.attend(q, k, z @ W_v))
        off = (outputs[0][order] - outputs[1]).abs().max()
        assert (off < 1e-12) == (name == "none") and (off > 0.01) == (name != "none")


@pytest.mark.parametrize("step", [1, 0])
def test_token_by_token_a_key_is_turned_once_by_its_own_position(lesson, step):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 10, 16, dtype=F64)
    t = torch.arange(10)
    scores = lesson.apply_rope(q, t) @ lesson.apply_rope(k, t).T / 4
    later = torch.ones(10, 10).triu(1).bool()
    whole = scores.masked_fill(later, -math.inf).softmax(-1) @ v
    keys, outputs = [], []
    for i in range(10):
        now = torch.tensor([i * step])  # 0: forgotten
        keys.append(lesson.apply_rope(k[i : i + 1], now))
        outputs.append(
            lesson.attend(lesson.apply_rope(q[i : i + 1], now), torch.cat(keys), v[: i + 1])
        )
    off = (torch.cat(outputs) - whole).abs().max()
    assert off < 1e-12 if step else off > 0.1


def test_a_shift_of_sinusoids_is_a_turn(lesson):
    PE, turn = lesson.sinusoidal(30, 8, dtype=F64), lesson.angles(torch.tensor([-5]), 8, dtype=F64)
    torch.testing.assert_close(lesson.rotate(PE[:-5], turn, True), PE[5:])  # (sin, cos): backwards


def test_rope_keeps_lengths(lesson):
    torch.manual_seed(0)
    x = torch.randn(6, 8, dtype=F64)
    turned = lesson.apply_rope(x, torch.arange(6) * 100)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))


def test_try_q_alone_turned_is_blind(lesson, edited):
    copy = edited(lesson, "(plain_rope(z), plain_rope(z))", "(plain_rope(z), z)")
    dog_first, man_first = copy.show_everyday()["RoPE"]
    torch.testing.assert_close(dog_first, man_first)
    dog_first, man_first = lesson.show_everyday()["RoPE"]
    assert (dog_first - man_first).abs().max() > 0.2


SEEDS = (0, 1, 2)
KINDS = ("none", "sinusoidal", "learned", "rope")


@pytest.fixture(scope="module", params=SEEDS)
def run(lesson, request, tmp_path_factory):
    """What main returned, where it logged, and the lines that it printed."""
    log_dir, out = tmp_path_factory.mktemp("positional"), io.StringIO()
    with contextlib.redirect_stdout(out):
        result = lesson.main(seed=request.param, log_dir=log_dir, lengths=(12, 36), steps=120)
    return result, log_dir, out.getvalue().splitlines()


def test_main_loses_and_sees_order(run):
    for name, (y, z) in run[0]["everyday"].items():
        assert torch.allclose(y, z) == (name == "no positions")


def test_main_keeps_its_laws(run):
    plain_sinusoidal, plain_rope, turned, mixed, ordered = run[0]["pairs"].values()
    assert max(plain_sinusoidal, plain_rope, turned, ordered) < 1e-5 and mixed > 1
    products, rope, projected = run[0]["laws"].values()
    assert max(*products, rope[0]) < 1e-10 and min(rope[1], *projected) > 0.5


def test_main_reads_relative_positions(run):
    table = run[0]["table"]
    assert all(table[kind, 12] > 0.95 for kind in ("sinusoidal", "learned", "rope"))
    assert table["none", 12] < 0.45
    assert table["rope", 36] > table["sinusoidal", 36] + 0.1
    assert ("learned", 36) not in table


def test_what_main_prints(run):
    result, log_dir, lines = run
    found, table = "\n".join(lines), result["table"]
    assert [line[0] for line in lines if re.match(r"\d\. ", line)] == list("1234")
    mixed, ordered = list(result["pairs"].values())[3:]
    loses = [
        "the position" if table[kind, 36] < table[kind, "old"] - 0.1 else "the length of the text"
        for kind in ("rope", "sinusoidal")
    ]
    for words in (
        "   no positions        1.00   1.00   0.58   0.58     1.00   1.00   0.58   0.58",
        "   RoPE                0.82   1.18   0.68   0.68     1.09   0.91   0.53   0.53",
        "   -> the same numbers for both sentences with: no positions",
        f"   -> the wrong pairing is off by up to {mixed:.1f};\n"
        f"      with the numbers of x put in order first, by {ordered:.6f}\n",
        "   score of positions m and n      both moved by one   m and n exchanged",
        "   -> on n - m alone depend: PE(m) . PE(n); RoPE: (R_m q) . (R_n k)\n",
        "      of these know which of the two comes first: RoPE: (R_m q) . (R_n k)\n",
        "   trained on texts of 12 tokens. Accuracy; '13-36 of 36': at the\n"
        "   positions 13 to 36 of texts of 36 tokens; 1 is the first (guess: 0.125)\n",
        f"   {'':<12}      3-12 of 12     13-36 of 36      3-12 of 36",
        "   -: learned cannot read longer texts: the table has 12 positions, the input 36",
        f"   'none' knows which tokens occur, not where: {table['none', 12]:.3f}; a guess 0.125",
        f"   -> texts of 36, positions up to 12 and past it: rope {table['rope', 'old']:.2f}, "
        f"{table['rope', 36]:.2f}; sinusoidal {table['sinusoidal', 'old']:.2f}, "
        f"{table['sinusoidal', 36]:.2f}.\n",
        f"      rope loses by {loses[0]}, sinusoidal by {loses[1]}\n",
        f"look: tensorboard --logdir {log_dir}   http",
    ):
        assert words in found, words
    for name, (y, z) in result["everyday"].items():
        shown = ["  ".join(f"{number:5.2f}" for number in row.tolist()) for row in (y, z)]
        assert f"   {name:<16}   {shown[0]}    {shown[1]}" in lines
    for name, largest in result["pairs"].items():
        assert f"   {name:<53}   {largest:12.6f}" in lines
    for name, (moved, exchanged) in result["laws"].items():
        assert f"   {name:<29}   {moved:17.6f}   {exchanged:17.6f}" in lines
    for kind in KINDS:
        shown = [table.get((kind, where)) for where in (12, 36, "old")]
        row = "".join(f"{'-' if a is None else f'{a:.3f}':>16}" for a in shown)
        assert f"   {kind:<12}{row}" in lines


def test_what_main_logs(run, events):
    result, log_dir, _ = run
    for kind in KINDS:
        points = events(log_dir / "extrapolation" / kind).Scalars("val/accuracy")
        lengths = (12,) if kind == "learned" else (12, 36)
        logged = {point.step: point.value for point in points}
        assert logged == pytest.approx({T: result["table"][kind, T] for T in lengths})


def test_the_changes_of_scores_are_those_of_their_formula(lesson):
    torch.manual_seed(5)
    largest = lesson.show_laws(T=6, d=4)
    torch.manual_seed(5)
    q, k = torch.randn(2, 4, dtype=F64)
    W = torch.randn(4, 4, dtype=F64) / 2
    PE, t = lesson.sinusoidal(6, 4, dtype=F64), torch.arange(6)
    s = torch.tensor([[PE[m] @ (W @ PE[n]) for n in range(6)] for m in range(6)])
    moved = (s[1:, 1:] - s[:-1, :-1]).abs().max().item()
    assert largest["PE(m) . (W PE(n))"] == pytest.approx((moved, (s - s.T).abs().max().item()))
    q, k = (lesson.apply_rope(z.expand(6, 4), t) for z in (q, k))
    s = q @ k.T
    assert largest["RoPE: (R_m q) . (R_n k)"][1] == pytest.approx((s - s.T).abs().max().item())


def test_the_table_of_lengths_hangs_on_its_seed_alone(lesson, tmp_path):
    tables = []
    for before in (1, 2):
        torch.manual_seed(before)
        tables.append(lesson.show_extrapolation(0, tmp_path / str(before), (8, 16), 2))
    assert tables[0] == tables[1]
