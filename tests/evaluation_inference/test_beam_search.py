import math

import pytest
import torch

SMALL = {"languages": 8, "sentences": 1200, "epochs": 6, "prompts": 10, "widths": (1, 4, 16)}


@pytest.fixture(scope="module")
def lesson(load):
    return load("evaluation_inference/beam_search.py")


PROMPT = torch.tensor([0])


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_length_penalty_is_gnmts(lesson, alpha):
    assert lesson.length_penalty(1, alpha) == 1
    assert lesson.length_penalty(7, alpha) == pytest.approx(2**alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_all_beginnings_is_exhaustive_search(lesson, seed, alpha):
    log_probs = lesson.random_language(seed, 3, 4)
    best = lesson.exhaustive_search(log_probs, PROMPT, 3, 4, eos=1, alpha=alpha)
    score, log_p, words = lesson.beam_search(log_probs, PROMPT, 81, 4, eos=1, alpha=alpha)[0]
    assert words == best[2] and (score, log_p) == pytest.approx(best[:2], rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_width_1_is_greedy_and_scores_are_true(lesson, seed):
    log_probs = lesson.random_language(seed, 5, 6)
    words, total = lesson.greedy_search(log_probs, PROMPT, 6, eos=2)
    score, log_p, found = lesson.beam_search(log_probs, PROMPT, 1, 6, eos=2)[0]
    assert found == words and log_p == pytest.approx(total, rel=1e-5) and score == log_p
    for score, log_p, found in lesson.beam_search(log_probs, PROMPT, 6, 6, eos=2, alpha=0.7):
        tokens, again = PROMPT, 0.0
        for word in found:
            again += log_probs(tokens[None])[0, word].item()
            tokens = torch.cat([tokens, torch.tensor([word])])
        assert log_p == pytest.approx(again, rel=1e-5)
        assert score == pytest.approx(log_p / ((5 + len(found)) / 6) ** 0.7)


def test_hypotheses_are_different_sorted_and_end_once(lesson):
    for seed in range(6):
        found = lesson.beam_search(lesson.random_language(seed, 4, 5), PROMPT, 8, 5, eos=0)
        texts = [tuple(words) for _, _, words in found]
        assert len(set(texts)) == len(texts) and 2 <= len(texts) <= 8
        assert all(text[-1] == 0 and 0 not in text[:-1] for text in texts)
        scores = [score for score, _, _ in found]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_stopping_early_changes_nothing(lesson, alpha, monkeypatch):
    found, steps = [], []
    for early in (True, False):
        if not early:
            monkeypatch.setattr(lesson.Finished, "closed_to", lambda *args: False)
        for seed in range(5):
            log_probs, calls = lesson.random_language(seed, 4, 8), []
            counted = lambda tokens, f=log_probs, calls=calls: calls.append(1) or f(tokens)  # noqa: E731
            found.append(lesson.beam_search(counted, PROMPT, 3, 8, eos=0, alpha=alpha))
            steps.append(len(calls))
    assert found[:5] == found[5:]
    assert sum(steps[:5]) < sum(steps[5:]) == 40 or alpha == 3.0


def test_try_a_finished_hypothesis_is_not_pushed_out_by_live_ones(lesson):
    """ "end" is the third likeliest start; live beams that are likelier lead to nothing."""
    after = {0: [0.25, 0.4, 0.35], 1: [0.1, 0.45, 0.45], 2: [0.1, 0.45, 0.45]}

    def log_probs(tokens):
        return torch.tensor([after[word] for word in tokens[:, -1].tolist()]).log()

    _, log_p, words = lesson.beam_search(log_probs, PROMPT, 3, 6, eos=0)[0]
    assert words == [0] and log_p == pytest.approx(math.log(0.25))


def test_a_wider_beam_may_find_a_worse_sentence(lesson):
    log_probs = lesson.random_language(1490, 3, 4)
    narrow, wide = (lesson.beam_search(log_probs, PROMPT, width, 4, eos=0)[0] for width in (1, 2))
    assert narrow[2] == [2, 1, 0] and wide[2] == [1, 2, 2, 0] and wide[1] < narrow[1] - 0.3


def test_differing_by_hand(lesson):
    assert lesson.differing([[1, 2, 0], [1, 0]]) == pytest.approx(2 / 3)
    assert lesson.differing([[1, 0]]) == 0


def test_what_never_ends_is_returned_as_it_is(lesson):
    def log_probs(tokens):
        return torch.tensor([[-math.inf, math.log(0.9), math.log(0.1)]]).expand(len(tokens), -1)

    found = lesson.beam_search(log_probs, PROMPT, 2, 3, eos=0)
    assert found[0][2] == [1, 1, 1] and found[0][1] == pytest.approx(3 * math.log(0.9))


def test_one_group_or_no_penalty_is_plain_search(lesson):
    log_probs = lesson.random_language(3, 6, 5)
    plain = lesson.beam_search(log_probs, PROMPT, 2, 5, eos=0)
    assert lesson.beam_search(log_probs, PROMPT, 2, 5, eos=0, groups=1, diversity=5.0) == plain
    groups = lesson.beam_search(log_probs, PROMPT, 6, 5, eos=0, groups=3, diversity=0.0)
    assert groups[::3] == plain  # three times the same


def test_groups_avoid_each_others_words(lesson):
    def log_probs(tokens):
        return torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().expand(len(tokens), -1)

    for strength, starts in ((0.0, {1}), (5.0, {1, 2, 3})):
        found = lesson.beam_search(log_probs, PROMPT, 3, 2, eos=0, groups=3, diversity=strength)
        assert {words[0] for _, _, words in found if words[0]} == starts


@pytest.mark.parametrize(("width", "groups"), [(0, 1), (4, 3), (4, 0), (-2, 1)])
def test_widths_that_do_not_split_are_refused(lesson, width, groups):
    with pytest.raises(ValueError, match=f"width {width} must be at least 1 and split"):
        lesson.beam_search(lesson.trap, PROMPT, width, 4, eos=0, groups=groups)


def test_logits_are_not_taken_for_log_probabilities(lesson):
    with pytest.raises(ValueError, match="logits need log_softmax first"):
        lesson.beam_search(lambda tokens: torch.ones(len(tokens), 3), PROMPT, 2, 4, eos=0)


def test_the_language_is_the_sampling_lessons(lesson, load):
    other = load("evaluation_inference/sampling_strategies.py")
    assert (lesson.WORDS, lesson.CONTEXT, lesson.GRAMMAR) == (
        other.WORDS,
        other.CONTEXT,
        other.GRAMMAR,
    )
    pairs = zip(lesson.examples(30, 5), other.examples(30, 5), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    states = [module.train_model(1, 50, 1).state_dict() for module in (lesson, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_likelier_and_shorter_sentences(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    assert math.exp(result["trap"]["greedy"]) == pytest.approx(0.24)
    assert math.exp(result["trap"][2]) == pytest.approx(0.36)
    right = list(result["right"].values())
    assert right == sorted(right) and right[0] < right[-1] == SMALL["languages"]
    rows = result["widths"]
    assert rows[0.0, 16]["log_prob"] > rows[0.0, 1]["log_prob"] + 0.3
    assert rows[0.0, 16]["length"] < rows[0.0, 1]["length"]
    assert rows[2.0, 16]["length"] >= rows[0.0, 16]["length"]
    diverse = result["diverse"]
    assert diverse[0.0]["first_words"] == pytest.approx(1)  # copies
    assert diverse[2.0]["first_words"] > diverse["one group"]["first_words"] + 0.5
    steps = [e.step for e in events(tmp_path / "width" / "alpha_0").Scalars("beam/log_prob")]
    assert steps == [1, 4, 16]
