import math
import random
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch

INF = math.inf
SMALL = {"sentences": 1200, "epochs": 6, "texts": 300}


@pytest.fixture(scope="module")
def lesson(load):
    return load("evaluation_inference/sampling_strategies.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir, out = tmp_path_factory.mktemp("runs"), StringIO()
    with redirect_stdout(out):
        figures = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return figures, log_dir, out.getvalue()


def kept(logits):
    return [(row > -INF).nonzero().squeeze(1).tolist() for row in logits]


def test_filters_by_hand_with_ties(lesson):
    assert kept(lesson.keep_min_p(torch.tensor([[0.25, 0.5]]).log(), 0.5)) == [[0, 1]]
    for n in range(2, 40):
        assert len(kept(lesson.keep_top_p(torch.zeros(1, n), (n - 1) / n))[0]) == n - 1
    p = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    for power in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        logits = p.log2().to(power)  # exact in every type
        z = p.double().log().to(power)  # rounded: limits keep clear of ties
        assert kept(lesson.keep_top_k(logits, 2)) == [[1, 3]]
        assert kept(lesson.keep_top_k(logits, 3)) == [[0, 1, 3]]  # of equals the first
        assert kept(lesson.keep_top_p(z, 0.49)) == [[1]]
        assert kept(lesson.keep_top_p(z, 0.74)) == [[1, 3]]
        assert kept(lesson.keep_top_p(z, 0.76)) == [[0, 1, 3]]
        assert kept(lesson.keep_min_p(z, 0.3)) == [[1, 3]]


def test_equal_shares_are_counted_exactly(lesson):
    for V in (3, 7, 10, 30):
        for n in range(1, V):
            assert len(kept(lesson.keep_top_p(torch.zeros(1, V), n / V))[0]) == n
    halves = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]).log()
    assert kept(lesson.keep_min_p(halves, 0.5)) == [[0, 1, 2]]
    assert kept(lesson.keep_min_p(halves, 0.25)) == [[0, 1, 2, 3, 4]]


def smallest_set(probs, p):
    """By trying: sorted by probability, the shortest beginning that reaches p."""
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    for n in range(1, len(order) + 1):
        if sum(probs[i] for i in order[:n]) >= p:
            return sorted(order[:n])
    return sorted(order)


@pytest.mark.parametrize("seed", range(5))
def test_top_p_is_the_smallest_set(lesson, seed):
    torch.manual_seed(seed)
    logits = 2 * torch.randn(4, 9, dtype=torch.float64)
    for p in (0.0, 0.1, 0.45, 0.9, 0.999):
        expected = [smallest_set(row.tolist(), p) for row in logits.softmax(1)]
        assert kept(lesson.keep_top_p(logits, p)) == expected


def test_limits_are_defined(lesson):
    logits = torch.tensor([[1.0, -INF, 0.5, 2.0]])
    assert torch.equal(lesson.keep_top_k(logits, 99), logits)
    assert torch.equal(lesson.keep_top_p(logits, 1.0), logits)
    assert torch.equal(lesson.keep_min_p(logits, 0.0), logits)
    assert kept(lesson.keep_top_k(logits, 1)) == kept(lesson.keep_top_p(logits, 0.0)) == [[3]]
    assert kept(lesson.keep_min_p(logits, 1.0)) == [[3]]
    assert kept(lesson.temper(logits, 0.1)) == [[0, 2, 3]]
    all_equal = torch.zeros(1, 5)
    assert kept(lesson.keep_top_p(all_equal, 0.39)) == [[0, 1]] and kept(
        lesson.keep_min_p(all_equal, 1.0)
    ) == [[0, 1, 2, 3, 4]]
    peak = torch.tensor([[200.0, 0.0, -200.0]])  # probability 1 in any float
    assert kept(lesson.keep_top_p(peak, 0.999)) == [[0]] and kept(lesson.keep_top_p(peak, 1.0)) == [
        [0, 1, 2]
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_filters_keep_their_input_its_type_and_what_stays(lesson, dtype):
    torch.manual_seed(0)
    logits, tokens = (3 * torch.randn(3, 17)).to(dtype), torch.randint(17, (3, 6))
    before = logits.clone()
    for filtered in (
        lesson.keep_top_k(logits, 5),
        lesson.keep_top_p(logits, 0.7),
        lesson.keep_min_p(logits, 0.1),
    ):
        assert filtered.dtype == dtype
        stays = filtered > -INF
        assert torch.equal(filtered[stays], logits[stays]) and 0 < stays.sum() < stays.numel()
        dropped = logits.masked_fill(stays, -INF).amax(1)
        assert (dropped <= filtered.masked_fill(~stays, INF).amin(1)).all()
    for filtered in (
        lesson.temper(logits, 2.0),
        lesson.penalize(logits, tokens, 1.3),
    ):
        assert filtered.dtype == dtype and not torch.equal(filtered, logits)
    assert torch.equal(logits, before)


def test_the_penalty_falls_once_on_each_word_said(lesson):
    logits = torch.tensor([[2.0, -3.0, 0.0, 5.0, -INF]])
    tokens = torch.tensor([[0, 1, 1, 0, 4]])
    expected = torch.tensor([[1.6, -3.75, 0.0, 5.0, -INF]])
    torch.testing.assert_close(lesson.penalize(logits, tokens, 1.25), expected)


def test_a_shift_of_all_logits_is_noticed_by_the_penalty_alone(lesson):
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 9, dtype=torch.float64), torch.tensor([[1, 2], [3, 3]])
    filters = {
        "temperature": lambda z: lesson.temper(z, 1.7),
        "top_k": lambda z: lesson.keep_top_k(z, 4),
        "top_p": lambda z: lesson.keep_top_p(z, 0.8),
        "min_p": lambda z: lesson.keep_min_p(z, 0.2),
        "penalty": lambda z: lesson.penalize(z, tokens, 1.5),
    }
    noticed = [name for name, f in filters.items()
               if not torch.allclose(f(logits).softmax(1), f(logits + 3).softmax(1))]  # fmt: skip
    assert noticed == ["penalty"]


def test_the_five_go_in_the_order_of_transformers(lesson):
    torch.manual_seed(0)
    logits, tokens = 3 * torch.randn(4, 30), torch.randint(30, (4, 5))
    expected = lesson.penalize(logits, tokens, 1.4)
    expected = lesson.keep_top_k(lesson.temper(expected, 1.8), 12)
    expected = lesson.keep_min_p(lesson.keep_top_p(expected, 0.85), 0.05)
    got = lesson.apply_settings(
        logits, tokens, repetition_penalty=1.4, temperature=1.8, top_k=12, top_p=0.85, min_p=0.05
    )
    assert torch.equal(got, expected)
    assert torch.equal(lesson.apply_settings(logits), logits)


def test_entropy_grows_with_temperature_by_the_variance_of_the_logits(lesson):
    torch.manual_seed(0)
    z, T = torch.randn(1, 12, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)

    def entropy(T):
        return torch.special.entr((z / T).softmax(1)).sum()

    p = (z / T).softmax(1)
    variance = (p * z**2).sum() - (p * z).sum() ** 2
    torch.testing.assert_close(torch.func.grad(entropy)(T), variance / T**3)


def test_what_makes_no_sense_is_refused(lesson):
    z = torch.zeros(2, 3)
    for call, message in (
        (lambda: lesson.temper(z, 0.0), "over 0, not 0.0: for 0 take argmax"),
        (lambda: lesson.temper(z, math.nan), "over 0"),
        (lambda: lesson.keep_top_p(z, 1.1), "p must be from 0 to 1"),
        (lambda: lesson.keep_top_p(z, -0.1), "p must be from 0 to 1"),
        (lambda: lesson.temper(z, INF), "over 0"),
        (lambda: lesson.temper(z, -1.0), "over 0, not -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_grammar_accepts_its_own_sentences_and_no_disagreement(lesson):
    rng = random.Random(0)
    texts = [lesson.sentence(rng)[:-1] for _ in range(300)]
    assert lesson.grammatical(texts) == 1.0
    wrong = ["the dogs sees a cat", "a dogs see the cat", "the dog sleeps the cat", "the dog"]
    assert lesson.grammatical([text.split() for text in wrong]) == 0.0


def test_distinct_by_hand(lesson):
    assert lesson.distinct([list("aba"), list("ab")]) == pytest.approx(2 / 3)
    assert lesson.distinct([["a"]]) == 0


def analytic(z, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """The same for one row of logits, word by word and without the settings: V probabilities."""
    weight = [math.exp((x - max(z)) / temperature) for x in z]
    order = sorted(range(len(z)), key=lambda i: -weight[i])[:top_k]
    total, mass, stays = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if mass < top_p * total and weight[i] >= min_p:  # the largest weight is 1
            stays.append(i)
        mass += weight[i]
    total = sum(weight[i] for i in stays)
    return torch.tensor([weight[i] / total if i in stays else 0.0 for i in range(len(z))])


@pytest.mark.parametrize("seed", range(4))
def test_plain_is_complete_and_computed_without_filters(lesson, seed):
    torch.manual_seed(seed)
    logits = 2 * torch.randn(3, 12)
    for options in (
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
    ):
        plain = lesson.plain_probs(logits.clone(), **{"top_k": 50, **options})
        torch.testing.assert_close(plain, lesson.apply_settings(logits, **options).softmax(1))
        for row, z in zip(plain, logits, strict=True):
            torch.testing.assert_close(row, analytic(z.tolist(), **options))
    z = logits[0].tolist()
    torch.testing.assert_close(analytic(z, min_p=0.2), lesson.keep_min_p(logits, 0.2).softmax(1)[0])


def test_of_many_equals_the_first_stay(lesson):
    logits = torch.zeros(2, 3000)  # an unstable sort mixes rows of this length
    assert kept(lesson.keep_top_k(logits, 40)) == [list(range(40))] * 2
    assert kept(lesson.keep_top_p(logits, 0.01)) == [list(range(30))] * 2
    assert (lesson.plain_probs(logits, top_k=40)[:, :40] > 0).all()


def test_plain_keeps_the_likeliest_word_at_least(lesson):
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert lesson.plain_probs(logits, top_p=0.0).tolist() == [[0.0, 1.0, 0.0]]


def test_min_p_has_no_more_room_than_rounding_needs(lesson):
    logits = torch.tensor([[0.5, 0.2499, 0.25, 0.0001]]).double().log()
    assert kept(lesson.keep_min_p(logits, 0.5)) == [[0, 2]]
    assert kept(lesson.keep_top_p(logits, 0.7501)) == [[0, 1, 2]]


def always(logits):
    return lambda tokens: torch.tensor([logits]).expand(len(tokens), -1)


def test_perplexity_is_the_models_own(lesson):
    V = len(lesson.WORDS)
    row = [0.5, 0.3] + [0.2 / (V - 2)] * (V - 2)
    model = always([math.log(p) for p in row])
    texts, perplexity = lesson.generate(model, 5, top_k=1)
    assert texts == [[]] * 5 and perplexity == pytest.approx(2)
    torch.manual_seed(0)
    _, perplexity = lesson.generate(model, 4000, top_k=2)
    p = 0.5 / 0.8
    expected = -p * math.log(0.5) - (1 - p) * math.log(1 - 0.7)
    assert math.log(perplexity) == pytest.approx(expected, rel=0.03)


def test_what_never_ends_is_cut_and_a_penalty_sees_what_was_said(lesson):
    V = len(lesson.WORDS)
    logits = [-INF, 2.0, 1.9] + [0.0] * (V - 3)
    texts, _ = lesson.generate(always(logits), 3, longest=4, top_k=1)
    assert texts == [["the"] * 4] * 3
    texts, _ = lesson.generate(always(logits), 3, longest=3, top_k=1, repetition_penalty=1.5)
    assert texts == [["the", "a", "the"]] * 3


def test_try_a_shift_of_the_logits_changes_nothing(lesson, edited):
    copied = edited(lesson, "    logits = model(the)\n", "    logits = 3 + model(the)\n")
    model = lesson.train_model(0, 300, 2)
    assert copied.show_order(model) == lesson.show_order(model)


def test_main_shows_what_stays(measured):
    figures, _, out = measured
    kept_words = figures["kept"]
    assert kept_words["none"] == pytest.approx([0.5, 0.25, 0.15, 0.1])
    for name in ("top_k 3", "top_p 0.8", "min_p 0.25"):
        assert kept_words[name] == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0])
    assert kept_words["top_p 0.7"] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert kept_words["temperature 0.5"] == pytest.approx(
        [p * p / 0.345 for p in (0.5, 0.25, 0.15, 0.1)]
    )
    assert kept_words["temperature 2"][3] == pytest.approx(
        0.1**0.5 / sum(p**0.5 for p in (0.5, 0.25, 0.15, 0.1))
    )
    assert "1. In everyday code: with what probability is each of four words drawn?\n" in out
    assert "   setting                    A      B      C      D\n" in out
    assert "   top_p 0.7                0.667  0.333  0.000  0.000\n" in out
    assert "-> temperature 0.7, top_k 3 and top_p 0.9 leave 3 words; drawn: " in out


def test_main_shows_the_order(measured):
    order, out = measured[0]["order"], measured[2]
    assert order[4.0][0] > order[1.0][0] == order[1.0][1] > 1
    assert '2. After "the", how many of 22 words does top_p 0.9 keep?\n' in out
    assert "   temperature   temperature, then top_p   top_p, then temperature\n" in out
    for T, row in order.items():
        assert f"   {T:11}   {row[0]:23}   {row[1]:23}\n" in out
    before, always = [row[0] for row in order.values()], order[1.0][1]
    assert {row[1] for row in order.values()} == {always}
    assert (
        f"-> temperature before top_p changes the number ({min(before)} to "
        f"{max(before)} words), after top_p not at all (always {always})\n"
    ) in out


def test_main_trades_grammar_for_variety(measured, events):
    rows, log_dir = measured[0]["rows"], measured[1]
    for name, low, high in (("temperature", 0.25, 2.0), ("top_p", 0.5, 1.0)):
        for figure in ("distinct_2", "perplexity"):
            assert rows[name, low][figure] < rows[name, high][figure]
    real, hot = rows["real", 0], rows["temperature", 2.0]
    assert real["grammatical"] == 1 and rows["temperature", 0.25]["grammatical"] > 0.95
    assert hot["grammatical"] < 0.85 and rows["temperature", 1.0]["grammatical"] > 0.9
    for key in (("top_p", 0.9), ("top_k", 5), ("min_p", 0.1)):
        assert rows[key]["grammatical"] > hot["grammatical"] + 0.1
    assert abs(rows["top_p", 1.0]["grammatical"] - hot["grammatical"]) < 0.1  # the same setting
    assert rows["top_p", 0.0]["perplexity"] < rows["temperature", 0.25]["perplexity"]
    penalty = {value: rows["repetition_penalty", value] for value in (1.0, 1.2, 2.0)}
    assert penalty[2.0]["repeats"] < 0.3 * real["repeats"] and real["repeats"] > 0.3
    assert penalty[2.0]["repeats"] < penalty[1.2]["repeats"] < penalty[1.0]["repeats"]
    assert penalty[2.0]["grammatical"] > 0.85
    for run, name in (
        ("by_temperature", "temperature"),
        ("by_p", "top_p"),
        ("by_penalty", "repetition_penalty"),
    ):
        logged = events(log_dir / run)
        for tag in ("distinct_2", "perplexity", "grammatical", "repeats"):
            expected = [(round(100 * v), row[tag]) for (n, v), row in rows.items() if n == name]
            points = [(e.step, e.value) for e in logged.Scalars(f"text/{tag}")]
            assert points == [(step, pytest.approx(value)) for step, value in expected]


def test_main_prints_what_it_measured(measured, lesson):
    rows, log_dir, out = measured[0]["rows"], measured[1], measured[2]
    assert "3. 300 sentences of a trained model by setting: how many are right, how varied?" in out
    assert "   setting                         right   pairs   perplexity   twice\n" in out
    names = {
        ("real", 0): "new sentences of the language",
        ("min_p", 0.1): "temperature 2, min_p 0.1",
    }
    names |= {("top_p", 0.9): "temperature 2, top_p 0.9", ("temperature", 0.5): "temperature 0.5"}
    for key, name in names.items():
        right, pairs, perplexity, twice = rows[key].values()
        assert (
            f"   {name:<29}   {right:5.2f}   {pairs:5.3f}   {perplexity:10.2f}   {twice:5.2f}"
            in out
        )
    right = {key: f"{row['grammatical']:.2f}" for key, row in rows.items()}
    twice = {key: f"{row['repeats']:.2f}" for key, row in rows.items()}
    for line in (
        f"-> right at temperature 0.25, 1 and 2: {right['temperature', 0.25]}, "
        f"{right['temperature', 1.0]} and {right['temperature', 2.0]}\n",
        f"-> right at temperature 2 with top_p 0.9: {right['top_p', 0.9]}, with top_k 5: "
        f"{right['top_k', 5]}, with min_p 0.1: {right['min_p', 0.1]}\n",
        f"-> sentences that say a word twice: {twice['real', 0]} in the language, "
        f"{twice['repetition_penalty', 1.2]} with penalty 1.2, "
        f"{twice['repetition_penalty', 2.0]} with 2\n",
    ):
        assert line in out
    for name in ("temperature 2", "temperature 2, top_p 0.9"):
        quoted = out.split(f"first wrong sentence of {name}: ")[1].splitlines()[0]
        assert quoted == "(none)" or lesson.grammatical([quoted.split()]) == 0
    assert "first wrong sentence of temperature 2: (none)" not in out
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {log_dir}   http")


def test_new_sentences_are_the_measured_ones(lesson, tmp_path):
    """The first row's perplexity is exp(mean -log p) of the words of its own sentences."""
    model = lesson.train_model(0, 200, 1)
    row = lesson.show_texts(tmp_path, model, 20, seed=3)["real", 0]
    rng, total, n = random.Random(1003), 0.0, 0
    for _ in range(20):
        said = [0] * 5
        for word in map(lesson.WORDS.index, lesson.sentence(rng)):
            total -= model(torch.tensor([said[-5:]])).log_softmax(1)[0, word].item()
            said.append(word)
            n += 1
    assert row["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-4)
