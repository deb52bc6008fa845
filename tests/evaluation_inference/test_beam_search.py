import math
import re
from contextlib import redirect_stdout
from io import StringIO
from itertools import product

import pytest
import torch

PROMPT = torch.tensor([0])
SMALL = {"sentences": 1200, "prompts": 12, "widths": (1, 4, 16)}
A_SENTENCE = re.compile(
    "(the|a) ((small|big|old|red) )?(dog|cat|bird) "
    r"((sleeps|sings)( often)?|(sees|hears) (the|a) (dog|cat|bird)) \."
)


@pytest.fixture(scope="module")
def lesson(load):
    return load("evaluation_inference/beam_search.py")


@pytest.fixture(scope="module", params=range(3))
def run(request, lesson, tmp_path_factory):
    log_dir, out = tmp_path_factory.mktemp("runs"), StringIO()
    with redirect_stdout(out):
        measured = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return measured, log_dir, out.getvalue()


def random_language(seed, V, longest):
    """log_probs in which each word so far, and its place, has a say in the next."""
    W = torch.randn(longest + 1, V, V, generator=torch.Generator().manual_seed(seed)).double()

    def log_probs(tokens):
        places = torch.arange(tokens.size(1))
        return (1.5 * W[places, tokens].sum(1) / tokens.size(1) ** 0.5).log_softmax(1)

    return log_probs


def always(*probs):
    """A language in which nothing that was said matters."""
    return lambda tokens: torch.tensor([probs]).log().expand(len(tokens), -1)


def log_p_of(log_probs, words):
    tokens, total = PROMPT, 0.0
    for word in words:
        total += log_probs(tokens[None]).double()[0, word].item()
        tokens = torch.cat([tokens, torch.tensor([word])])
    return total


def exhaustive_search(log_probs, V, longest, eos, alpha):
    """The best (score, log p, words) of all sentences that end within `longest` words."""
    best = (-math.inf, 0.0, [])
    for n in range(longest):
        for body in product([word for word in range(V) if word != eos], repeat=n):
            words = [*body, eos]
            log_p = log_p_of(log_probs, words)
            score = log_p / ((5 + len(words)) / 6) ** alpha
            best = max(best, (score, log_p, words), key=lambda sentence: sentence[0])
    return best


# --- the plain one -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_plain_and_complete_find_the_same(lesson, width):
    for seed in range(8):
        log_probs = random_language(seed, 5, 6)
        plain = lesson.plain_beam(log_probs, PROMPT, width, 6, eos=2)
        complete = lesson.beam_search(log_probs, PROMPT, width, 6, eos=2)
        assert plain == [(log_p, words) for _, log_p, words in complete]


def test_width_1_is_greedy_search(lesson):
    for seed in range(12):
        log_probs = random_language(seed, 5, 6)
        log_p, words = lesson.greedy_search(log_probs, PROMPT, 6, eos=2)
        assert log_p == pytest.approx(log_p_of(log_probs, words), rel=1e-12)
        assert lesson.plain_beam(log_probs, PROMPT, 1, 6, eos=2) == [(log_p, words)]


def test_greedy_search_stops_at_the_end_or_at_longest(lesson):
    prompt = torch.tensor([3, 1])
    assert lesson.greedy_search(always(0.5, 0.3, 0.2), prompt, 4, eos=0)[1] == [0]
    log_p, words = lesson.greedy_search(always(0.1, 0.6, 0.3), prompt, 4, eos=0)
    assert words == [1, 1, 1, 1] and log_p == pytest.approx(4 * math.log(0.6))


def test_the_prompt_stands_before_every_beginning_and_all_are_asked_at_once(lesson):
    prompt, seen = torch.tensor([1, 2]), []

    def log_probs(tokens):
        seen.append(tokens.tolist())
        return always(0.2, 0.5, 0.3)(tokens)

    lesson.greedy_search(log_probs, prompt, 2, eos=0)
    assert seen == [[[1, 2]], [[1, 2, 1]]]
    for search in (lesson.plain_beam, lesson.beam_search):
        seen.clear()
        search(log_probs, prompt, 2, 2, eos=0)
        assert seen == [[[1, 2]], [[1, 2, 1], [1, 2, 2]]]


# --- the complete one --------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_length_penalty_is_gnmts(lesson, alpha):
    assert lesson.length_penalty(1, alpha) == 1
    assert lesson.length_penalty(7, alpha) == pytest.approx(2**alpha)


def test_the_best_are_kept_in_order_of_their_scores(lesson):
    kept = lesson.keep_best([], -3.0, [1] * 6 + [0], 2, alpha=1.0)
    assert kept == [(-1.5, -3.0, [1] * 6 + [0])]  # lp(7) = 2
    kept = lesson.keep_best(kept, -1.0, [0], 2, alpha=1.0)
    assert [score for score, _, _ in kept] == [-1.0, -1.5]
    assert lesson.keep_best(kept, -1.6, [0], 2, alpha=1.0) == kept
    assert [s for s, _, _ in lesson.keep_best(kept, -1.2, [0], 2, alpha=1.0)] == [-1.0, -1.2]


@pytest.mark.parametrize(
    ("log_p", "n", "longest", "alpha", "closed"),
    [
        (-4.9, 1, 7, 0.0, False),  # it may pass the worst, if not the best
        (-5.0, 1, 7, 0.0, True),
        (-9.9, 1, 7, 1.0, False),  # lp(7) = 2: its score could be -4.95
        (-10.0, 1, 7, 1.0, True),
        (-3.7, 6, 13, -1.0, True),  # alpha < 0: the largest lp is that of 7 words, 1/2
        (-2.4, 6, 13, -1.0, False),
    ],
)
def test_closed_to_what_cannot_pass_the_worst(lesson, log_p, n, longest, alpha, closed):
    finished = [(-1.0, -1.0, [0]), (-5.0, -5.0, [1, 0])]
    assert lesson.is_closed(finished, 2, log_p, n, longest, alpha) is closed
    assert lesson.is_closed(finished, 3, log_p, n, longest, alpha) is False  # not full


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_all_beginnings_is_exhaustive_search(lesson, seed, alpha):
    log_probs = random_language(seed, 3, 4)
    score, log_p, words = exhaustive_search(log_probs, 3, 4, 1, alpha)
    found = lesson.beam_search(log_probs, PROMPT, 24, 4, eos=1, alpha=alpha)[0]
    assert found[2] == words and found[:2] == pytest.approx((score, log_p), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.7}, {"groups": 3, "diversity": 0.8}])
def test_scores_are_true_and_sentences_sorted_and_different_in_a_group(lesson, options):
    alpha = options.get("alpha", 0.0)
    for seed in range(5):
        log_probs = random_language(seed, 5, 6)
        found = lesson.beam_search(log_probs, PROMPT, 6, 6, eos=2, **options)
        for score, log_p, words in found:
            assert log_p == pytest.approx(log_p_of(log_probs, words), rel=1e-12)  # float64 sums
            assert score == pytest.approx(log_p / ((5 + len(words)) / 6) ** alpha)
            assert (words[-1] == 2 or len(words) == 6) and 2 not in words[:-1]
        scores = [score for score, _, _ in found]
        assert scores == sorted(scores, reverse=True) and 1 <= len(found) <= 6
        if "groups" not in options:
            assert len({tuple(words) for _, _, words in found}) == len(found)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 3.0])
def test_stopping_early_changes_nothing(lesson, alpha, monkeypatch):
    found, steps = [], []
    for early in (True, False):
        if not early:
            monkeypatch.setattr(lesson, "is_closed", lambda *args: False)
        for seed in range(20):
            language = random_language(seed, 4, 8)

            def log_probs(tokens, language=language, early=early):
                steps.append(early)
                return language(tokens)

            found.append(lesson.beam_search(log_probs, PROMPT, 3, 8, eos=0, alpha=alpha))
    assert found[:20] == found[20:]
    assert steps.count(False) == 160 >= steps.count(True)
    assert steps.count(True) < 155 or alpha == 3.0


def test_a_finished_sentence_is_not_pushed_out_by_live_ones(lesson):
    """The end is the third likeliest start; live beams that are likelier lead to nothing."""
    after = {0: [0.25, 0.4, 0.35], 1: [0.1, 0.45, 0.45], 2: [0.1, 0.45, 0.45]}

    def log_probs(tokens):
        return torch.tensor([after[word] for word in tokens[:, -1].tolist()]).log()

    _, log_p, words = lesson.beam_search(log_probs, PROMPT, 3, 6, eos=0)[0]
    assert words == [0] and log_p == pytest.approx(math.log(0.25))


def test_a_wider_beam_may_find_a_worse_sentence(lesson):
    log_probs = random_language(1490, 3, 4)
    narrow, wide = (lesson.beam_search(log_probs, PROMPT, width, 4, eos=0)[0] for width in (1, 2))
    assert narrow[2] == [2, 1, 0] and wide[2] == [1, 2, 2, 0] and wide[1] < narrow[1] - 0.3


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_what_never_ends_is_returned_as_it_is(lesson, alpha):
    never = always(0.0, 0.9, 0.1)
    found = lesson.beam_search(never, PROMPT, 2, 3, eos=0, alpha=alpha)
    assert found[0][2] == [1, 1, 1] and found[0][1] == pytest.approx(3 * math.log(0.9))
    assert found[0][0] == pytest.approx(3 * math.log(0.9) / (8 / 6) ** alpha)
    assert lesson.plain_beam(never, PROMPT, 2, 3, eos=0) == [h[1:] for h in found] or alpha


def test_what_is_impossible_is_not_returned_and_nothing_left_to_say_ends_the_search(lesson):
    def log_probs(tokens):
        row = [0.5, 0.5, 0.0] if tokens.size(1) == 1 else [1.0, 0.0, 0.0]
        return torch.tensor([row]).log().expand(len(tokens), -1)

    found = lesson.beam_search(log_probs, PROMPT, 8, 5, eos=0)
    assert sorted(words for _, _, words in found) == [[0], [1, 0]]
    assert lesson.plain_beam(log_probs, PROMPT, 8, 5, eos=0) == [found[i][1:] for i in (0, 1)]


def test_the_prompts_that_a_wider_beam_loses_are_counted(lesson, tmp_path, monkeypatch, capsys):
    """Made-up log p of three prompts: at width 4 two of them are worse than at width 1."""
    means = {"log_prob": -1.0, "length": 2.0, "steps": 2.0}
    each = {1: [-1.0, -2.0, -3.0], 4: [-1.5, -1.0, -4.0]}
    monkeypatch.setattr(lesson, "figures", lambda lp, p, width, **o: (dict(means), each[width]))
    prompts, rests = lesson.beginnings(3, 0)
    rows = lesson.show_widths(tmp_path, lesson.count_model(0, 50), prompts, rests, (1, 4))
    assert [rows[0.0, width]["worse"] for width in (1, 4)] == [0, 2]
    assert re.search(r"^     2\.0 +4 +-1\.00 +2\.00 +2 +2\.00 ", capsys.readouterr().out, re.M)


def test_log_p_of_words_is_the_sum_after_the_prompt(lesson):
    log_probs = random_language(5, 5, 6)
    found = lesson.beam_search(log_probs, PROMPT, 2, 6, eos=2)[0]
    assert lesson.log_p_of(log_probs, PROMPT, found[2]) == pytest.approx(found[1], rel=1e-12)


def test_one_group_or_no_penalty_is_plain_search(lesson):
    log_probs = random_language(3, 6, 5)
    plain = lesson.beam_search(log_probs, PROMPT, 2, 5, eos=0)
    assert lesson.beam_search(log_probs, PROMPT, 2, 5, eos=0, groups=1, diversity=5.0) == plain
    groups = lesson.beam_search(log_probs, PROMPT, 6, 5, eos=0, groups=3, diversity=0.0)
    assert groups[::3] == plain  # three times the same


def test_groups_avoid_each_others_words(lesson):
    for strength, starts in ((0.0, {1}), (5.0, {1, 2, 3})):
        found = lesson.beam_search(
            always(0.1, 0.4, 0.3, 0.2), PROMPT, 3, 2, eos=0, groups=3, diversity=strength
        )
        assert {words[0] for _, _, words in found if words[0]} == starts


def test_a_word_costs_lambda_for_each_time_that_it_was_chosen(lesson):
    """Group 1 has A A and B A; so A costs group 2 twice 0.3, and A B comes before B A."""
    rows = {1: [0.0, 0.5, 0.4, 0.1], 2: [0.0, 0.6, 0.3, 0.1], 3: [1.0, 0.0, 0.0, 0.0]}

    def log_probs(tokens):
        return torch.tensor([rows[tokens.size(1)]]).log().expand(len(tokens), -1)

    found = lesson.beam_search(log_probs, PROMPT, 4, 3, eos=0, groups=2, diversity=0.3)
    assert [words for _, _, words in found] == [[1, 1, 0], [1, 1, 0], [2, 1, 0], [1, 2, 0]]
    assert [math.exp(log_p) for _, log_p, _ in found] == pytest.approx([0.3, 0.3, 0.24, 0.15])


@pytest.mark.parametrize(("width", "groups"), [(0, 1), (4, 3), (4, 0), (-2, 1)])
def test_widths_that_do_not_split_are_refused(lesson, width, groups):
    with pytest.raises(ValueError, match=f"width {width} must be at least 1 and split"):
        lesson.beam_search(lesson.trap, PROMPT, width, 4, eos=0, groups=groups)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_what_is_no_log_probability_is_refused(lesson, value):
    with pytest.raises(ValueError, match="NaN or numbers over 0: logits need log_softmax first"):
        lesson.beam_search(lambda tokens: torch.full((1, 3), value), PROMPT, 2, 4, eos=0)


# --- the model and what is measured ------------------------------------------------------------


def test_the_model_counts_what_follows_three_words(lesson):
    model = lesson.count_model(0, 500)
    the, dog = (lesson.WORDS.index(word) for word in ("the", "dog"))
    start, noun = model(torch.tensor([[9, 0, 0, 0], [0, 0, the, dog]])).exp()
    assert start.sum().item() == pytest.approx(1, abs=1e-5)
    share = (start[the].item() * 500.15 - 0.01) / 500  # of 500 sentences
    assert share * 500 == pytest.approx(round(share * 500), abs=1e-2) and 0.5 < share < 0.7
    assert noun[10:14].sum() > 0.98


def test_sentences_are_of_the_language_and_prompts_are_their_beginnings(lesson):
    import random

    rng, texts = random.Random(0), set()
    for _ in range(300):
        texts.add(" ".join(lesson.WORDS[i] for i in lesson.sentence(rng)))
    assert all(A_SENTENCE.fullmatch(text) for text in texts) and len(texts) > 60
    assert any("often" in text for text in texts)
    prompts, rests = lesson.beginnings(50, seed=1)
    assert {len(prompt) for prompt in prompts} == {4, 5, 6} and len(prompts) == 50
    assert all(prompt[:3].tolist() == [0, 0, 0] and prompt[3] in (1, 2) for prompt in prompts)
    for prompt, rest in zip(prompts, rests, strict=True):
        words = " ".join(lesson.WORDS[i] for i in [*prompt[3:].tolist(), *rest])
        assert A_SENTENCE.fullmatch(words) and rest


def test_figures_are_means_over_the_prompts(lesson):
    def log_probs(tokens):
        """After 0: B or C; after 1: the end. Then the end."""
        rows = {0: [0.0, 0.0, 0.75, 0.25], 1: [1.0, 0.0, 0.0, 0.0]}
        return torch.tensor([rows.get(word, rows[1]) for word in tokens[:, -1].tolist()]).log()

    prompts = [torch.tensor([0]), torch.tensor([1])]
    row, each = lesson.figures(log_probs, prompts, 2)
    assert each == pytest.approx([math.log(0.75), 0])
    assert row == pytest.approx(
        {"log_prob": math.log(0.75) / 2, "length": 1.5, "steps": 1.5, "texts": 1.5,
         "first_words": 1.5}
    )  # fmt: skip
    row, _ = lesson.figures(log_probs, prompts[:1], 4, groups=2, diversity=0.0)
    assert (row["texts"], row["first_words"]) == (2, 2)


def test_try_a_smaller_alpha_leaves_the_empty_sentence(lesson, edited, capsys):
    changed = edited(lesson, "(4, 2.0))", "(4, 0.4))")
    assert changed.show_empty()["beam_search", 4, 0.4][2] == [0]
    assert "; alpha = 0.4 makes it (empty)" in capsys.readouterr().out
    ratio = math.log(0.6**6) / math.log(0.1)
    assert ratio == pytest.approx(3.06 / 2.30, abs=5e-3)
    for alpha, words in ((0.41, [0]), (0.42, [1] * 6 + [0])):
        assert 2**alpha > ratio or words == [0]
        found = lesson.beam_search(lesson.hasty, PROMPT, 4, 9, eos=0, alpha=alpha)
        assert found[0][2] == words


def test_main_finds_what_greedy_misses_and_what_is_empty(run):
    measured, _, out = run
    greedy, first, second = measured["trap"]
    assert (greedy[1], first[1], second[1]) == ([1, 0], [2, 0], [1, 0])
    assert [math.exp(found[0]) for found in (greedy, first, second)] == pytest.approx(
        [0.24, 0.36, 0.24]
    )
    assert "plain_beam, width 2: first    B end             0.36   -1.02" in out
    assert "-> the beam's first sentence is 1.5 times as likely as the greedy one" in out
    empty = measured["empty"]
    for width, words in ((1, [1] * 6 + [0]), (4, [0])):
        assert empty["plain_beam", width, 0.0] == empty["beam_search", width, 0.0]
        assert empty["beam_search", width, 0.0][2] == words
    score, log_p, words = empty["beam_search", 4, 2.0]
    assert words == [1] * 6 + [0] and score == pytest.approx(log_p / 4)
    assert (
        "beam_search       4     2.0   A A A A A A     7         0.047   -3.06   4.00   -0.77\n"
        in out
    )
    for title in (
        "1. In everyday code: which sentence is found where the likeliest first word misleads?",
        "At the start p(A) = 0.6, p(B) = 0.4. After A p(end) = 0.4, after B p(end) = 0.9.",
        "found by                      sentence   probability   log p",
        "2. Which sentence wins if at each step p(A) = 0.6, p(B) = p(C) = 0.15 and p(end) = 0.1?",
        "(After six words the end is certain. n: words, with the end.)",
        "score = log p / lp, with the length penalty lp = ((5 + n) / 6)^alpha",
        "search        width   alpha   best sentence   n   probability   log p     lp   score",
    ):
        assert f"{title}\n" in out
    assert (
        "-> width 1 finds A A A A A A, width 4 the likelier (empty); alpha = 2 makes it A A A A A A"
    ) in out


def test_main_finds_likelier_and_shorter_sentences(run, events):
    measured, log_dir, out = run
    rows = measured["widths"]
    narrow, middle, wide, mended = rows[0.0, 1], rows[0.0, 4], rows[0.0, 16], rows[2.0, 16]
    assert wide["log_prob"] > middle["log_prob"] > narrow["log_prob"]
    assert wide["log_prob"] > narrow["log_prob"] + 0.3
    assert wide["length"] < narrow["length"] - 0.7 and mended["length"] > wide["length"] + 0.5
    assert narrow["steps"] < wide["steps"] < mended["steps"] < 12
    real = rows["real"]
    assert 3 < real["length"] < 4.5 and real["log_prob"] < wide["log_prob"] - 0.5
    for title in (
        "3. How wide? The best rest of 12 sentences, by a model of a small language (means)",
        "worse: prompts with a less likely rest than at width 1; calls of the model: at most 12",
        'alpha   width   log p   words   worse   calls   best rest of "the ..."',
        f"the true rests {real['log_prob']:6.2f}   {real['length']:5.2f}",
        f"-> alpha = 0: {narrow['length']:.1f} words at width 1, {wide['length']:.1f} at width 16; "
        f"the true rests have {real['length']:.1f}",
    ):
        assert f"   {title}\n".strip(" ") in out
    end = [abs(rows[2.0, width]["log_prob"] - mended["log_prob"]) < 0.005 for width in (1, 4, 16)]
    enough = 1 if all(end) else 4 if end[1] else 16
    assert (
        f"-> alpha = 2: {mended['length']:.1f} words at width 16; from width {enough} on log p is "
        "the same\n"
    ) in out
    assert all(rows[alpha, 1]["worse"] == 0 for alpha in (0.0, 2.0))
    assert all(rows[0.0, width]["worse"] <= 2 for width in (4, 16))
    row = r"^     [02]\.0 +\d+ +-\d.\d\d +\d.\d\d +\d+ +\d+.\d\d   (.+)$"
    texts = re.findall(row, out, re.MULTILINE)
    assert len(texts) == 6 and all(A_SENTENCE.fullmatch(f"the {text}") for text in texts)
    for alpha in (0, 2):
        logged = events(log_dir / "width" / f"alpha_{alpha}")
        for name in ("log_prob", "length", "steps"):
            expected = [(width, rows[alpha, width][name]) for width in SMALL["widths"]]
            points = [(e.step, e.value) for e in logged.Scalars(f"beam/{name}")]
            assert points == [(step, pytest.approx(value)) for step, value in expected]


def test_main_finds_more_beginnings_by_groups_and_fewer_sentences(run, events):
    measured, log_dir, out = run
    rows = measured["diverse"]
    beam, copies, diverse = rows[1, 0.0], rows[8, 0.0], rows[8, 2.0]
    assert (copies["texts"], copies["first_words"]) == pytest.approx((1, 1))
    assert copies["log_prob"] == pytest.approx(measured["widths"][0.0, 1]["log_prob"])
    assert diverse["first_words"] > beam["first_words"] + 0.25
    assert 3 < diverse["texts"] < beam["texts"] - 1 and beam["texts"] > 7.9
    assert (
        f"-> first words: {beam['first_words']:.1f} in one group, {diverse['first_words']:.1f} in "
        f"8 with lambda = 2; different sentences: {beam['texts']:.1f} and {diverse['texts']:.1f}\n"
    ) in out
    for title in (
        "4. Do 8 sentences begin with different words? One group, or 8 of one beam",
        "lambda: what a word loses for each time that earlier groups have chosen it",
        'groups   lambda   first words   sentences   log p of best   first words after "the"',
    ):
        assert f"{title}\n" in out
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {log_dir}   http")
    logged = events(log_dir / "diverse")
    for name in ("first_words", "texts", "log_prob"):
        expected = [(round(10 * s), rows[8, s][name]) for s in (0.0, 0.5, 1.0, 2.0)]
        points = [(e.step, e.value) for e in logged.Scalars(f"beam/{name}")]
        assert points == [(step, pytest.approx(value)) for step, value in expected]
