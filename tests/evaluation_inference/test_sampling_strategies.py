import math

import pytest
import torch

INF = math.inf
SMALL = {"samples": 20_000, "sentences": 1200, "epochs": 6, "texts": 300}


@pytest.fixture(scope="module")
def lesson(load):
    return load("evaluation_inference/sampling_strategies.py")


@pytest.fixture(scope="module", params=range(3))
def measured(request, lesson, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("runs")
    return lesson.main(seed=request.param, log_dir=log_dir, **SMALL), log_dir


def kept(logits):
    return [(row > -INF).nonzero().squeeze(1).tolist() for row in logits]


def test_filters_by_hand_with_ties(lesson):
    assert kept(lesson.min_p(torch.tensor([[0.25, 0.5]]).log(), 0.5)) == [[0, 1]]
    for n in range(2, 40):
        assert len(kept(lesson.top_p(torch.zeros(1, n), (n - 1) / n))[0]) == n - 1
    p = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    for power in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        logits = p.log2().to(power)  # exact in every type
        z = p.double().log().to(power)  # rounded: limits keep clear of ties
        assert kept(lesson.top_k(logits, 2)) == [[1, 3]]
        assert kept(lesson.top_k(logits, 3)) == [[0, 1, 3]]  # of equals the first
        assert kept(lesson.top_p(z, 0.49)) == [[1]]
        assert kept(lesson.top_p(z, 0.74)) == [[1, 3]]
        assert kept(lesson.top_p(z, 0.76)) == [[0, 1, 3]]
        assert kept(lesson.min_p(z, 0.3)) == [[1, 3]]
    assert lesson.greedy(torch.tensor([[1.0, 3.0, 3.0], [-INF, -2.0, -5.0]])).tolist() == [1, 1]


def test_equal_shares_are_counted_exactly(lesson):
    for V in (3, 7, 10, 30):
        for n in range(1, V):
            assert len(kept(lesson.top_p(torch.zeros(1, V), n / V))[0]) == n
    halves = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]).log()
    assert kept(lesson.min_p(halves, 0.5)) == [[0, 1, 2]]
    assert kept(lesson.min_p(halves, 0.25)) == [[0, 1, 2, 3, 4]]


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
        assert kept(lesson.top_p(logits, p)) == expected


def test_limits_are_defined(lesson):
    logits = torch.tensor([[1.0, -INF, 0.5, 2.0]])
    assert torch.equal(lesson.top_k(logits, 99), logits)
    assert torch.equal(lesson.top_p(logits, 1.0), logits)
    assert torch.equal(lesson.min_p(logits, 0.0), logits)
    assert kept(lesson.top_k(logits, 1)) == kept(lesson.top_p(logits, 0.0)) == [[3]]
    assert kept(lesson.min_p(logits, 1.0)) == [[3]]
    assert kept(lesson.temperature(logits, 0.1)) == [[0, 2, 3]]
    all_equal = torch.zeros(1, 5)
    assert kept(lesson.top_p(all_equal, 0.39)) == [[0, 1]] and kept(
        lesson.min_p(all_equal, 1.0)
    ) == [[0, 1, 2, 3, 4]]
    peak = torch.tensor([[200.0, 0.0, -200.0]])  # probability 1 in any float
    assert kept(lesson.top_p(peak, 0.999)) == [[0]] and kept(lesson.top_p(peak, 1.0)) == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_filters_keep_their_input_its_type_and_what_stays(lesson, dtype):
    torch.manual_seed(0)
    logits, tokens = (3 * torch.randn(3, 17)).to(dtype), torch.randint(17, (3, 6))
    before = logits.clone()
    for filtered in (lesson.top_k(logits, 5), lesson.top_p(logits, 0.7), lesson.min_p(logits, 0.1)):
        assert filtered.dtype == dtype
        stays = filtered > -INF
        assert torch.equal(filtered[stays], logits[stays]) and 0 < stays.sum() < stays.numel()
        dropped = logits.masked_fill(stays, -INF).amax(1)
        assert (dropped <= filtered.masked_fill(~stays, INF).amin(1)).all()
    for filtered in (
        lesson.temperature(logits, 2.0),
        lesson.repetition_penalty(logits, tokens, 1.3),
    ):
        assert filtered.dtype == dtype and not torch.equal(filtered, logits)
    assert torch.equal(logits, before)


def test_the_penalty_falls_once_on_each_word_said(lesson):
    logits = torch.tensor([[2.0, -3.0, 0.0, 5.0, -INF]])
    tokens = torch.tensor([[0, 1, 1, 0, 4]])
    expected = torch.tensor([[1.6, -3.75, 0.0, 5.0, -INF]])
    torch.testing.assert_close(lesson.repetition_penalty(logits, tokens, 1.25), expected)


def test_try_a_shift_of_all_logits_is_noticed_by_the_penalty_alone(lesson):
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 9, dtype=torch.float64), torch.tensor([[1, 2], [3, 3]])
    filters = {
        "temperature": lambda z: lesson.temperature(z, 1.7),
        "top_k": lambda z: lesson.top_k(z, 4),
        "top_p": lambda z: lesson.top_p(z, 0.8),
        "min_p": lambda z: lesson.min_p(z, 0.2),
        "penalty": lambda z: lesson.repetition_penalty(z, tokens, 1.5),
    }
    noticed = [name for name, f in filters.items()
               if not torch.allclose(f(logits).softmax(1), f(logits + 3).softmax(1))]  # fmt: skip
    assert noticed == ["penalty"]


def test_the_five_go_in_the_order_of_transformers(lesson):
    torch.manual_seed(0)
    logits, tokens = 3 * torch.randn(4, 30), torch.randint(30, (4, 5))
    expected = lesson.repetition_penalty(logits, tokens, 1.4)
    expected = lesson.top_k(lesson.temperature(expected, 1.8), 12)
    expected = lesson.min_p(lesson.top_p(expected, 0.85), 0.05)
    got = lesson.apply_filters(logits, tokens, penalty=1.4, T=1.8, k=12, p=0.85, min_prob=0.05)
    assert torch.equal(got, expected)
    assert torch.equal(lesson.apply_filters(logits), logits)


def test_entropy_grows_with_temperature_by_the_variance_of_the_logits(lesson):
    torch.manual_seed(0)
    z, T = torch.randn(1, 12, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)

    def entropy(T):
        return torch.special.entr((z / T).softmax(1)).sum()

    p = (z / T).softmax(1)
    variance = (p * z**2).sum() - (p * z).sum() ** 2
    torch.testing.assert_close(torch.func.grad(entropy)(T), variance / T**3)


def test_what_makes_no_sense_is_refused(lesson):
    z, tokens = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long)
    for call, message in (
        (lambda: lesson.temperature(z, 0.0), "over 0, not 0.0: for 0 use greedy"),
        (lambda: lesson.temperature(z, math.nan), "over 0"),
        (lambda: lesson.top_k(z, 0), "k must be at least 1"),
        (lambda: lesson.top_p(z, 1.1), "p must be from 0 to 1"),
        (lambda: lesson.min_p(z, -0.1), "min_p must be from 0 to 1"),
        (lambda: lesson.repetition_penalty(z, tokens, 0.0), "penalty must be over 0"),
        (lambda: lesson.repetition_penalty(z, tokens[:1], 1.2), "1 rows of tokens for 2"),
        (lambda: lesson.apply_filters(torch.tensor([[INF, 0.0]])), r"\+inf"),
        (lambda: lesson.temperature(torch.tensor([[70.0]]).half(), 1e-3), "too large"),
        (lambda: lesson.temperature(z, INF), "over 0"),
        (lambda: lesson.repetition_penalty(z, tokens, INF), "penalty must be over 0"),
        (lambda: lesson.apply_filters(torch.zeros(3)), r"must be \(B, V\), not \(3,\)"),
        (lambda: lesson.apply_filters(torch.full((1, 3), -INF)), "nothing but -inf"),
        (lambda: lesson.apply_filters(torch.full((1, 3), math.nan)), "hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_grammar_accepts_its_own_sentences_and_no_disagreement(lesson):
    import random

    rng = random.Random(0)
    texts = [lesson.sentence(rng)[:-1] for _ in range(300)]
    assert lesson.grammatical(texts) == 1.0
    wrong = ["the dogs sees a cat", "a dogs see the cat", "the dog sleeps the cat", "the dog"]
    assert lesson.grammatical([text.split() for text in wrong]) == 0.0


def test_distinct_by_hand(lesson):
    assert lesson.distinct([list("aba"), list("ab")]) == pytest.approx(2 / 3)
    assert lesson.distinct([["a"]]) == 0


def test_main_draws_what_it_should(measured):
    chi, order = measured[0]["chi"], measured[0]["order"]
    assert all(
        value < freedom + 4.5 * math.sqrt(2 * freedom) + 5 for value, freedom in chi.values()
    )
    assert order[4.0][0] > order[1.0][0] == order[1.0][1] > 1
    assert len({behind for _, behind in order.values()}) == 1


def test_main_trades_grammar_for_variety(measured, events):
    rows, log_dir = measured[0]["rows"], measured[1]
    for name, low, high in (("T", 0.25, 2.0), ("p", 0.25, 1.0)):
        for figure in ("entropy", "distinct_2", "perplexity"):
            assert rows[name, low][figure] < rows[name, high][figure]
    assert rows["T", 0.25]["grammatical"] > 0.95 > 0.9 > rows["T", 2.0]["grammatical"]
    assert rows["p", 0.0]["entropy"] == 0
    assert rows["penalty", 2.0]["repeats"] < 0.3 * rows["penalty", 1.0]["repeats"]
    assert rows["penalty", 2.0]["grammatical"] > 0.85
    steps = [event.step for event in events(log_dir / "by_p").Scalars("text/entropy")]
    assert steps == [0, 25, 50, 75, 90, 100]
