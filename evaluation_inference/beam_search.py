"""Greedy takes the likeliest word and may miss the likeliest sentence; a beam misses fewer.

    score(Y) = log p(Y) / lp(Y),   lp(Y) = ((5 + |Y|) / 6)^alpha     |Y|: words drawn, the end too
    live       the `width` likeliest unfinished beginnings, by log p alone
    finished   kept apart, the `width` best by score: no longer in the way, and never lost
    stop       when `width` are finished and no live one can win: log p only falls, so that
               log p / lp(longest) is the most that a live one can reach (for alpha >= 0)
    diverse    groups of beams, one after the other: a word, the end excepted, costs lambda for each
               time that earlier groups have chosen it in this step

At alpha = 0 a beam of width 1 is greedy search; one that holds all beginnings is exhaustive. In
between a wider one mostly finds what is likelier (a test keeps a case where it does not), and,
without lp, what is shorter, for each word costs probability. Grammar stays whole here: short
sentences are right as well. Which when? For one right answer a narrow beam; for several that start
differently groups, though some may say the same; to hear all that a model may say, sampling.

Checked here   a sentence that greedy misses; width 1 = greedy; all beginnings = exhaustive search;
               log-probability, length, variety and grammar by width and alpha; groups by lambda
TensorBoard    beam/log_prob, length, differing, first_words, grammatical by width in
               width/alpha_0, alpha_2; beam/first_words, log_prob by 10 lambda in diverse
Try            let finished ones compete in the beam: what is lost? Likely short sentences
Source         Wu et al. 2016 (GNMT), arXiv:1609.08144, section 7, eq. 14 (lp); Vijayakumar et al.
               2018, arXiv:1610.02424, algorithm 1 (diverse)
"""

import argparse
import math
import os
import random
import re
import signal
import sys
import threading
from itertools import combinations, product, zip_longest
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "evaluation_inference" / "beam_search"
WORDS = [
    ".", "the", "a", "small", "big", "old", "red", "dog", "cat", "bird", "dogs", "cats", "birds",
    "sees", "hears", "see", "hear", "sleeps", "sings", "sleep", "sing", "often",
]  # fmt: skip
CONTEXT = 5  # words that the model sees
ADJECTIVE = "(small |big |old |red )?"
ONE, MANY = f"(the|a) {ADJECTIVE}(dog|cat|bird)", f"the {ADJECTIVE}(dogs|cats|birds)"
GRAMMAR = re.compile(
    f"({ONE} (sees|hears)|{MANY} (see|hear)) ({ONE}|{MANY})"
    f"|({ONE} (sleeps|sings)|{MANY} (sleep|sing))( often)?"
)


# --- search: log_probs(tokens (n, L)) -> (n, V) ------------------------------------------------


def length_penalty(length, alpha):
    """((5 + length) / 6)^alpha. Exercise."""
    return ((5 + length) / 6) ** alpha


def greedy_search(log_probs, prompt, longest, eos):
    """Tokens after `prompt` (L,), at most `longest`, up to eos; and their log-probability.

    log_probs(tokens (1, L)) gives (1, V); the likeliest word comes next. (list of integers, eos
    included; float). Exercise.
    """
    tokens, total = prompt[None], 0.0
    for _ in range(longest):
        log_p = log_probs(tokens)[0]
        word = log_p.argmax()
        total += log_p[word].item()
        tokens = torch.cat([tokens, word.view(1, 1)], dim=1)
        if word == eos:
            break
    return tokens[0, len(prompt) :].tolist(), total


class Finished:
    """The best `width` hypotheses that have ended, as (score, log p, tokens), best first."""

    def __init__(self, width, alpha):
        self.width, self.alpha, self.best = width, alpha, []

    def add(self, log_p, tokens):
        """Keep the hypothesis (score, log p, tokens) if it is among the best `width`, in self.best.

        score = log p / length_penalty(length, alpha); best first. Exercise.
        """
        score = log_p / length_penalty(len(tokens), self.alpha)
        self.best = sorted([*self.best, (score, log_p, tokens)], key=lambda h: -h[0])[: self.width]

    def closed_to(self, log_p, length, longest):
        """Whether no continuation of a live one with log_p, at most `longest` long, can enter.

        So it is if self.best is full, and its worst score is no less than log_p over the largest
        length_penalty that a length from length + 1 to longest can have (at one of the two).
        Exercise.
        """
        most = max(length_penalty(n, self.alpha) for n in (length + 1, longest))
        return len(self.best) == self.width and self.best[-1][0] >= log_p / most


def beam_search(log_probs, prompt, width, longest, eos, alpha=0.0, groups=1, diversity=0.0):
    """The best hypotheses after `prompt` (L,): [(score, log p, tokens)], best first.

    log_probs gets all live beams at once. With `groups`, width is split among them, and each group
    keeps its own finished ones. If none ends within `longest`, the live ones are returned.
    """
    if width < 1 or longest < 1 or groups < 1 or width % groups:
        raise ValueError(f"width {width} must be at least 1 and split into {groups} groups")
    size = width // groups
    live = prompt.expand(groups, size, -1)  # (G, W/G, L)
    totals = torch.full((groups, size), -math.inf, dtype=torch.float64, device=prompt.device)
    totals[:, 0] = 0  # all beams of a group are the same yet: one of them counts
    finished = [Finished(size, alpha) for _ in range(groups)]
    for length in range(1, longest + 1):
        log_p = log_probs(live.flatten(0, 1)).double().unflatten(0, (groups, size))  # (G, W/G, V)
        if (log_p > 1e-6).any():
            raise ValueError("log_probs gave numbers over 0: logits need log_softmax first")
        V, beams, sums = log_p.size(-1), [], []
        chosen = torch.zeros(V, dtype=torch.long, device=prompt.device)
        for g in range(groups):
            candidates = (totals[g, :, None] + log_p[g]).flatten()  # (W/G V,)
            ranked = candidates - diversity * chosen.repeat(size)
            order = ranked.argsort(descending=True, stable=True)
            for i in order[:size].tolist():
                if i % V == eos and candidates[i] > -math.inf:
                    words = [*live[g, i // V, len(prompt) :].tolist(), eos]
                    finished[g].add(candidates[i].item(), words)
            kept = order[order % V != eos][:size]
            words = kept % V
            chosen += torch.bincount(words[candidates[kept] > -math.inf], minlength=V)
            beams.append(torch.cat([live[g, kept // V], words[:, None]], dim=1))
            sums.append(candidates[kept])
        live, totals = torch.stack(beams), torch.stack(sums)
        if all(
            finished[g].closed_to(totals[g].max().item(), length, longest) for g in range(groups)
        ):
            break
    ended = [hypothesis for group in finished for hypothesis in group.best]
    if not ended:
        rest = zip(
            totals.flatten().tolist(), live.flatten(0, 1)[:, len(prompt) :].tolist(), strict=True
        )
        ended = [(t / length_penalty(len(y), alpha), t, y) for t, y in rest if t > -math.inf]
    return sorted(ended, key=lambda hypothesis: -hypothesis[0])


def exhaustive_search(log_probs, prompt, V, longest, eos, alpha=0.0):
    """The best of all sequences that end within `longest` words, by trying each.

    (score, log p, words): words of 0 … V - 1 with eos last and nowhere else; log p the sum of
    log_probs(tokens (1, L))[0, word], prompt (L,) before; score = log p / length_penalty(length,
    alpha). Exercise.
    """
    best = (-math.inf, 0.0, [])
    others = [word for word in range(V) if word != eos]
    for length in range(1, longest + 1):
        for body in product(others, repeat=length - 1):
            words, total, tokens = [*body, eos], 0.0, prompt
            for word in words:
                total += log_probs(tokens[None])[0, word].item()
                tokens = torch.cat([tokens, tokens.new_tensor([word])])
            score = total / length_penalty(length, alpha)
            best = max(best, (score, total, words), key=lambda hypothesis: hypothesis[0])
    return best


# --- languages ---------------------------------------------------------------------------------


def trap(tokens):
    """End, A, B: A is likelier than B, but nothing likely follows it."""
    after = {0: [0.0, 0.6, 0.4], 1: [0.4, 0.3, 0.3], 2: [0.9, 0.05, 0.05]}
    return torch.tensor([after[word] for word in tokens[:, -1].tolist()]).log()


def random_language(seed, V, longest):
    """log_probs in which each word so far, and its place, has a say in the next."""
    W = torch.randn(longest + 1, V, V, generator=torch.Generator().manual_seed(seed))

    def log_probs(tokens):
        places = torch.arange(tokens.size(1))
        return (1.5 * W[places, tokens].sum(1) / tokens.size(1) ** 0.5).log_softmax(1)

    return log_probs


def noun_phrase(rng):
    """Words of one, and whether they are plural."""
    many = rng.random() < 0.4
    determiner = "the" if many or rng.random() < 0.6 else "a"
    adjective = [rng.choice(("small", "big", "old", "red"))] if rng.random() < 0.4 else []
    noun = rng.choice(("dog", "cat", "bird")) + "s" * many
    return [determiner, *adjective, noun], many


def sentence(rng):
    """Words of a sentence, "." last: a plural subject takes a verb without s."""
    subject, many = noun_phrase(rng)
    if rng.random() < 0.6:
        verb, rest = rng.choice(("see", "hear")), noun_phrase(rng)[0]
    else:
        verb, rest = rng.choice(("sleep", "sing")), ["often"] * (rng.random() < 0.3)
    return [*subject, verb + "s" * (not many), *rest, "."]


def examples(n, seed):
    """Contexts (N, 5) and the words (N,) that follow them, from n sentences; 0 is "."."""
    rng, contexts, following = random.Random(seed), [], []
    for _ in range(n):
        context = [0] * CONTEXT
        for word in map(WORDS.index, sentence(rng)):
            contexts.append(context)
            following.append(word)
            context = [*context[1:], word]
    return torch.tensor(contexts), torch.tensor(following)


def train_model(seed, n, epochs):
    """A model of the next word: contexts (B, 5) -> logits (B, V)."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(len(WORDS), 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 64), nn.Tanh(),
        nn.Linear(64, len(WORDS)),
    )  # fmt: skip
    optimizer, (x, y) = torch.optim.Adam(model.parameters(), lr=5e-3), examples(n, seed)
    for _ in tqdm(range(epochs), desc="language model", leave=False, disable=None):
        for i in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(model(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False)


# --- the sections ------------------------------------------------------------------------------


def show_trap():
    print("1. a language in which greedy is wrong: probability of what is found")
    prompt = torch.tensor([0])
    _, total = greedy_search(trap, prompt, 4, eos=0)
    best = exhaustive_search(trap, prompt, 3, 4, eos=0)
    found = {"greedy": total, "exhaustive": best[1]}
    for width in (1, 2):
        found[width] = beam_search(trap, prompt, width, 4, eos=0)[0][1]
    print("   " + "   ".join(f"{name} {math.exp(p):.3f}" for name, p in found.items()))
    assert found[1] == found["greedy"] < found[2] and math.isclose(found[2], best[1])
    return found


def show_exact(languages, V=3, longest=4):
    print(
        f"2. {languages} random languages of {V} words: best sentence found, of at most {longest}"
    )
    right, prompt, all_beginnings = {}, torch.tensor([0]), V**longest
    for seed in range(languages):
        log_probs = random_language(seed, V, longest)
        best = exhaustive_search(log_probs, prompt, V, longest, eos=0)
        for width in (1, 2, 4, all_beginnings):
            score, _, words = beam_search(log_probs, prompt, width, longest, eos=0)[0]
            found = words == best[2] and math.isclose(score, best[0], abs_tol=1e-6)
            right[width] = right.get(width, 0) + found
            if width == 1:
                assert words == greedy_search(log_probs, prompt, longest, eos=0)[0]
    assert right[all_beginnings] == languages
    print("   " + "   ".join(f"width {width} {n}" for width, n in right.items()))
    return right


def beginnings(n, seed):
    """The first one to three words of n sentences, padded in front by the end of the last."""
    rng = random.Random(seed + 1000)
    starts = [sentence(rng)[: rng.randint(1, 3)] for _ in range(n)]
    return [torch.tensor([0] * CONTEXT + [WORDS.index(word) for word in start]) for start in starts]


def differing(texts):
    """Share of places in which two of the texts differ, mean over all pairs; 0 for one text."""
    pairs = list(combinations(texts, 2))
    return sum(
        sum(a != b for a, b in zip_longest(x, y)) / max(len(x), len(y)) for x, y in pairs
    ) / max(1, len(pairs))


def figures(log_probs, prompts, width, **options):
    """Of the best hypothesis: log p, length, grammar; of all `width`: variety. Means."""
    totals = dict.fromkeys(("log_prob", "length", "differing", "first_words", "grammatical"), 0.0)
    for prompt in prompts:
        found = beam_search(log_probs, prompt, width, longest=12, eos=0, **options)
        _, log_p, words = found[0]
        text = " ".join(WORDS[i] for i in [*prompt[CONTEXT:].tolist(), *words] if i)
        for name, value in {
            "log_prob": log_p, "length": len(words), "differing": differing([h[2] for h in found]),
            "first_words": len({h[2][0] for h in found}),
            "grammatical": GRAMMAR.fullmatch(text) is not None,
        }.items():  # fmt: skip
            totals[name] += value / len(prompts)
    return totals


def show_widths(log_dir, log_probs, prompts, widths):
    rows = {}
    for number, alpha in ((3, 0.0), (4, 2.0)):
        print(f"{number}. beam width, alpha = {alpha:g}: log p, words, differing, first, grammar")
        with SummaryWriter(log_dir / "width" / f"alpha_{alpha:g}", purge_step=0) as writer:
            for width in widths:
                row = rows[alpha, width] = figures(log_probs, prompts, width, alpha=alpha)
                for name, value in row.items():
                    writer.add_scalar(f"beam/{name}", value, width)
                print(f"   width {width:3}   {'   '.join(f'{v:7.3f}' for v in row.values())}")
    return rows


def show_diverse(log_dir, log_probs, prompts, width=8, groups=8):
    print(f"5. width {width} in {groups} groups, by lambda: log p, first words")
    rows = {"one group": figures(log_probs, prompts, width)}
    with SummaryWriter(log_dir / "diverse", purge_step=0) as writer:
        for strength in (0.0, 0.5, 1.0, 2.0):
            row = figures(log_probs, prompts, width, groups=groups, diversity=strength)
            rows[strength] = row
            for name in ("first_words", "log_prob"):
                writer.add_scalar(f"beam/{name}", row[name], round(10 * strength))
    for name, row in rows.items():
        print(f"   {name!s:<9}   {row['log_prob']:.3f}   {row['first_words']:.3f}")
    return rows


def main(seed=0, log_dir=LOG_DIR, languages=40, sentences=3000, epochs=8, prompts=40,
         widths=(1, 2, 4, 8, 16, 32)):  # fmt: skip
    measured = {"trap": show_trap(), "right": show_exact(languages)}
    model, starts = train_model(seed, sentences, epochs), beginnings(prompts, seed)

    def log_probs(tokens):
        return model(tokens[:, -CONTEXT:]).log_softmax(1)

    measured["widths"] = show_widths(log_dir, log_probs, starts, widths)
    measured["diverse"] = show_diverse(log_dir, log_probs, starts)
    return measured


def guard(main, *flags):
    """Run main as a program: Ctrl-C, a closed pipe and a disk that refuses end it in one line."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    options, lost = vars(parser.parse_args()), []
    if hasattr(sys.stdout, "reconfigure"):  # any path, on any console, and logs that fill
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    threading.excepthook = lost.append  # what TensorBoard's thread could not write
    try:
        main(**options)
        if not lost:
            return
        raise lost[0].exc_value
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1
    except OSError as error:
        status = f"cannot log to {LOG_DIR}: {error}" if lost else str(error)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what print still holds has nowhere to go
    sys.exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks this small are slower on two
    guard(main)
