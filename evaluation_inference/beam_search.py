"""Beam search finds a sentence at least as likely as greedy search does, for nearly all prompts.

A language model gives every next word a probability; the probability of a sentence is the product
of the probabilities of its words. Greedy search always takes the likeliest next word, after which
perhaps nothing likely follows. Beam search keeps the `width` likeliest beginnings at each step. Use
it where one good answer is wanted, as in translation. Every further word makes a sentence less
likely, so that a wide beam may prefer a very short sentence, or even an empty one.

    log p(Y) = sum over t = 1 ... n of log p(y_t | all words before y_t)
    score(Y) = log p(Y) / lp(n)     lp(n) = ((5 + n) / 6)^alpha, the length penalty

    Y = (y_1 ... y_n)  the words after the prompt, with the end of the sentence as last word
    alpha  rewards length; 0 leaves log p as it is. The authors of lp(n) took 0.2; the demonstration
           takes 2, because at 0.4 the empty sentence still wins (Try)

The search stops when `width` sentences are finished and no beginning can overtake them. Diverse
beam search splits the beams into groups, so that their sentences begin with different words.

In generate() of the library transformers, width is num_beams and alpha is length_penalty, where
lp(n) = n^alpha.

Needs          evaluation_inference/sampling_strategies.py
Checked here   plain = complete; log p, length and prompts that lose, by width; first words by group
TensorBoard    beam/log_prob, length, steps by width in the runs width/alpha_0 (length falls) and
               width/alpha_2; beam/first_words, texts, log_prob by 10 lambda in the run diverse
Try            in show_empty, write 0.4 for 2.0: which sentence wins at width 4?
Answer         The empty one again: the long one needs lp(7) = 2^alpha above 3.06 / 2.30 = 1.33
Source         Wu et al. 2016, arXiv:1609.08144, eq. 14; Vijayakumar et al. 2018, arXiv:1610.02424
"""

import argparse
import math
import os
import random
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "evaluation_inference" / "beam_search"


# --- 1. in everyday code -----------------------------------------------------------------------


def plain_beam(log_probs, prompt, width, longest, eos):
    """The `width` likeliest sentences that a beam finds: [(log p, words)], the likeliest first.

    log_probs(tokens (n, L)) gives log p of each next word (n, V); with a network it is
    lambda tokens: model(tokens)[:, -1].log_softmax(-1). prompt (L,) stands before the words; eos is
    the number of the end. `longest` times: extend each live beginning by every word with p > 0.
    Those of the `width` likeliest extensions that have an end are finished; the `width` likeliest
    without an end live on. If nothing has ended, the live ones are returned. Exercise.
    """
    live, finished = [(0.0, [])], []
    for _ in range(longest):
        if not live:
            break
        rows = log_probs(torch.tensor([prompt.tolist() + words for _, words in live])).tolist()
        longer = []
        for (total, words), row in zip(live, rows, strict=True):
            longer += [(total + p, [*words, w]) for w, p in enumerate(row) if p > -math.inf]
        longer.sort(key=lambda sentence: -sentence[0])  # the likeliest first
        finished += [sentence for sentence in longer[:width] if sentence[1][-1] == eos]
        live = [sentence for sentence in longer if sentence[1][-1] != eos][:width]
    return sorted(finished or live, key=lambda sentence: -sentence[0])[:width]


def greedy_search(log_probs, prompt, longest, eos):
    """(log p, words) after `prompt` (L,): always the likeliest word, until eos or `longest` words.

    log_probs(tokens (1, L)) gives (1, V); words is a list of integers, eos included. Exercise.
    """
    total, words = 0.0, []
    while len(words) < longest and eos not in words:
        log_p = log_probs(torch.tensor([prompt.tolist() + words]))[0]
        words.append(log_p.argmax().item())
        total += log_p.max().item()
    return total, words


def trap(tokens):
    """log p of end, A, B: A is the likelier start, but nothing likely follows it."""
    after = {0: [0.0, 0.6, 0.4], 1: [0.4, 0.3, 0.3], 2: [0.9, 0.05, 0.05]}
    return torch.tensor([after[word] for word in tokens[:, -1].tolist()]).log()


def show_everyday():
    print("1. In everyday code: which sentence is found where the likeliest first word misleads?")
    prompt = torch.tensor([0])  # what stands before the first word: the end of another sentence
    greedy = greedy_search(trap, prompt, longest=4, eos=0)
    first, second = plain_beam(trap, prompt, width=2, longest=4, eos=0)

    print("   At the start p(A) = 0.6, p(B) = 0.4. After A p(end) = 0.4, after B p(end) = 0.9.")
    print("   found by                      sentence   probability   log p")
    names = ("greedy_search", "plain_beam, width 2: first", "plain_beam, width 2: second")
    for name, (log_p, words) in zip(names, (greedy, first, second), strict=True):
        text = " ".join(("end", "A", "B")[word] for word in words)
        print(f"   {name:<27}   {text:<8}   {math.exp(log_p):11.2f}   {log_p:5.2f}")
    ratio = math.exp(first[0] - greedy[0])
    print(f"   -> the beam's first sentence is {ratio:.1f} times as likely as the greedy one")
    return greedy, first, second


# --- 2. the complete one, and the length penalty -----------------------------------------------


def length_penalty(n, alpha):
    """((5 + n) / 6)^alpha. Exercise."""
    return ((5 + n) / 6) ** alpha


def keep_best(finished, log_p, words, width, alpha):
    """The list finished of (score, log p, words) with one more: the `width` best, best first.

    score = log p / length_penalty(number of words, alpha). Exercise.
    """
    score = log_p / length_penalty(len(words), alpha)
    return sorted([*finished, (score, log_p, words)], key=lambda sentence: -sentence[0])[:width]


def is_closed(finished, width, log_p, n, longest, alpha):
    """Whether no continuation of a live beginning of n words and this log_p can enter `finished`.

    So it is if `width` are finished and the worst score of them, the last, is at least log_p over
    the largest length_penalty from n + 1 to `longest` words (it stands at an end). Exercise.
    """
    largest = max(length_penalty(n + 1, alpha), length_penalty(longest, alpha))
    return len(finished) == width and finished[-1][0] >= log_p / largest


def beam_search(log_probs, prompt, width, longest, eos, alpha=0.0, groups=1, diversity=0.0):
    """The best sentences after `prompt` (L,): [(score, log p, words)], the best first.

    log_probs gets all live beginnings at once; with a network it is
    lambda tokens: model(tokens)[:, -1].log_softmax(-1). Each group (section 4) has width / groups
    beams and finished sentences of its own. They choose one after the other at each step; a word
    loses `diversity` for each time that earlier groups have chosen it at this step. If nothing ends
    within `longest` words, the live ones are returned.
    """
    if width < 1 or longest < 1 or groups < 1 or width % groups:
        raise ValueError(f"width {width} must be at least 1 and split into {groups} groups")
    size, live, finished = width // groups, [[(0.0, [])]] * groups, [[]] * groups  # [g]: group g
    for n in range(1, longest + 1):
        said = [words for group in live for _, words in group]
        tokens = torch.cat([prompt.expand(len(said), -1), prompt.new_tensor(said)], dim=1)
        log_p = log_probs(tokens).to("cpu", torch.float64)  # (beams, V); not each GPU has float64
        if not (log_p <= 1e-6).all():
            raise ValueError("log_probs gave NaN or numbers over 0: logits need log_softmax first")
        V = log_p.size(1)
        chosen = torch.zeros(V, dtype=torch.float64)  # by earlier groups; with one group: unused
        for g, rows in enumerate(log_p.split([len(group) for group in live])):
            totals = torch.tensor([total for total, _ in live[g]], dtype=torch.float64)
            sums = (totals[:, None] + rows).flatten()  # (beams of the group * V)
            order = (sums - diversity * chosen.repeat(len(rows))).sort(descending=True, stable=True)
            best = [i for i in order.indices[: 2 * size].tolist() if sums[i] > -math.inf]
            longer = [(sums[i].item(), [*live[g][i // V][1], i % V]) for i in best]
            for total, words in longer[:size]:
                if words[-1] == eos:
                    finished[g] = keep_best(finished[g], total, words, size, alpha)
            live[g] = [sentence for sentence in longer if sentence[1][-1] != eos][:size]
            for _, words in live[g]:
                chosen[words[-1]] += 1
        if all(is_closed(finished[g], size, max(live[g])[0], n, longest, alpha)
               for g in range(groups) if live[g]):  # fmt: skip
            break
    ended = [sentence for group in finished for sentence in group]
    if not ended:
        ended = [(total / length_penalty(len(words), alpha), total, words)
                 for group in live for total, words in group]  # fmt: skip
    return sorted(ended, key=lambda sentence: -sentence[0])


def hasty(tokens):
    """log p of end, A, B, C: of 0.1, 0.6, 0.15, 0.15; after six words the end is certain."""
    row = [1.0, 0.0, 0.0, 0.0] if tokens.size(1) > 6 else [0.1, 0.6, 0.15, 0.15]
    return torch.tensor([row]).expand(len(tokens), -1).log()


def show_empty():
    print("2. Which sentence wins if at each step p(A) = 0.6, p(B) = p(C) = 0.15 and p(end) = 0.1?")
    print("   (After six words the end is certain. n: words, with the end.)")
    print("   score = log p / lp, with the length penalty lp = ((5 + n) / 6)^alpha")
    print("   search        width   alpha   best sentence   n   probability   log p     lp   score")
    prompt, best = torch.tensor([0]), {}
    for width in (1, 4):
        log_p, words = plain_beam(hasty, prompt, width, longest=9, eos=0)[0]
        best["plain_beam", width, 0.0] = log_p, log_p, words  # its score is log p
    for width, alpha in ((1, 0.0), (4, 0.0), (4, 2.0)):
        found = beam_search(hasty, prompt, width, longest=9, eos=0, alpha=alpha)
        best["beam_search", width, alpha] = found[0]
    texts = []
    for (search, width, alpha), (score, log_p, words) in best.items():
        texts.append(" ".join(("end", "A", "B", "C")[word] for word in words[:-1]) or "(empty)")
        print(f"   {search:<11}   {width:5}   {alpha:5.1f}   {texts[-1]:<13}   {len(words)}   "
              f"{math.exp(log_p):11.3f}   {log_p:5.2f}   {log_p / score:4.2f}   {score:5.2f}"
        )  # fmt: skip
    print(f"   -> width 1 finds {texts[2]}, width 4 the likelier {texts[3]}; "
          f"alpha = {alpha:g} makes it {texts[4]}")  # fmt: skip
    return best


# --- 3. how wide? ------------------------------------------------------------------------------

WORDS = [".", "the", "a", "small", "big", "old", "red", "dog", "cat", "bird", "sees", "hears",
         "sleeps", "sings", "often"]  # fmt: skip


def sentence(rng):
    """The numbers of its words, such as: the small dog sees a cat . (0 is the end)"""
    words = ["the" if rng.random() < 0.6 else "a"]
    words += [rng.choice(("small", "big", "old", "red"))] if rng.random() < 0.4 else []
    words += [rng.choice(("dog", "cat", "bird"))]
    if rng.random() < 0.4:
        words += [rng.choice(("sleeps", "sings"))] + ["often"] * (rng.random() < 0.3)
    else:
        words += [rng.choice(("sees", "hears")), rng.choice(("the", "a"))]
        words += [rng.choice(("dog", "cat", "bird"))]
    return [WORDS.index(word) for word in [*words, "."]]


def count_model(seed, n):
    """log_probs from n sentences: how often a word has followed the three words before it."""
    rng, counts = random.Random(seed), torch.full((len(WORDS),) * 4, 0.01)  # none is impossible
    for _ in range(n):
        words = [0, 0, 0, *sentence(rng)]
        for i in range(len(words) - 3):
            counts[tuple(words[i : i + 4])] += 1
    log_p = (counts / counts.sum(3, keepdim=True)).log()
    return lambda tokens: log_p[tokens[:, -3], tokens[:, -2], tokens[:, -1]]


def beginnings(n, seed):
    """Of n other sentences: prompts, which are three ends and one to three words; and the rests."""
    rng, prompts, rests = random.Random(seed + 1000), [], []
    for _ in range(n):
        words, cut = sentence(rng), rng.randint(1, 3)
        prompts.append(torch.tensor([0, 0, 0, *words[:cut]]))
        rests.append(words[cut:])
    return prompts, rests


def log_p_of(log_probs, prompt, words):
    """log p of these words after the prompt, by the model."""
    tokens = prompt.tolist() + words
    return sum(log_probs(torch.tensor([tokens[:i]]))[0, tokens[i]].item()
               for i in range(len(prompt), len(tokens)))  # fmt: skip


def figures(log_probs, prompts, width, **options):
    """Means over the prompts: of the best sentence, of the calls, and of all sentences found."""
    rows = []
    for prompt in prompts:
        calls = []

        def counted(tokens, calls=calls):
            calls.append(len(tokens))
            return log_probs(tokens)

        found = beam_search(counted, prompt, width, longest=12, eos=0, **options)
        _, log_p, words = found[0]
        different, firsts = ({tuple(words[:n]) for *_, words in found} for n in (12, 1))
        rows.append((log_p, len(words), len(calls), len(different), len(firsts)))
    names = ("log_prob", "length", "steps", "texts", "first_words")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    means = {name: sum(column) / len(rows) for name, column in columns}
    return means, [row[0] for row in rows]


def show_widths(log_dir, log_probs, prompts, rests, widths):
    n, the, rows = len(prompts), torch.tensor([0, 0, 0, WORDS.index("the")]), {}
    print(f"3. How wide? The best rest of {n} sentences, by a model of a small language (means)")
    print(
        "   worse: prompts with a less likely rest than at width 1; calls of the model: at most 12"
    )
    print('   alpha   width   log p   words   worse   calls   best rest of "the ..."')
    real = [log_p_of(log_probs, *pair) for pair in zip(prompts, rests, strict=True)]
    rows["real"] = {"log_prob": sum(real) / n, "length": sum(map(len, rests)) / n}
    print("   the true rests {:6.2f}   {:5.2f}".format(*rows["real"].values()))
    for alpha in (0.0, 2.0):
        with SummaryWriter(log_dir / "width" / f"alpha_{alpha:g}", purge_step=0) as writer:
            _, narrow = figures(log_probs, prompts, 1, alpha=alpha)
            for width in widths:
                row, each = figures(log_probs, prompts, width, alpha=alpha)
                row["worse"] = sum(a < b - 1e-6 for a, b in zip(each, narrow, strict=True))
                rows[alpha, width] = row
                words = beam_search(log_probs, the, width, 12, eos=0, alpha=alpha)[0][2]
                text = " ".join(WORDS[i] for i in words)
                print(f"   {alpha:5.1f}   {width:5}   {row['log_prob']:5.2f}   "
                      f"{row['length']:5.2f}   {row['worse']:5}   {row['steps']:5.2f}   {text}"
                )  # fmt: skip
                for name in ("log_prob", "length", "steps"):
                    writer.add_scalar(f"beam/{name}", row[name], width)
    last = widths[-1]
    end = rows[2.0, last]["log_prob"]
    enough = next(w for i, w in enumerate(widths)
                  if all(abs(rows[2.0, v]["log_prob"] - end) < 0.005
                         for v in widths[i:]))  # fmt: skip
    print(f"   -> alpha = 0: {rows[0.0, 1]['length']:.1f} words at width 1, "
          f"{rows[0.0, last]['length']:.1f} at width {last}; the true rests have "
          f"{rows['real']['length']:.1f}")  # fmt: skip
    print(f"   -> alpha = 2: {rows[2.0, last]['length']:.1f} words at width {last}; "
          f"from width {enough} on log p is the same")  # fmt: skip
    return rows


# --- 4. several different sentences ------------------------------------------------------------


def show_diverse(log_dir, log_probs, prompts, width=8):
    print(f"4. Do {width} sentences begin with different words? One group, or {width} of one beam")
    print("   lambda: what a word loses for each time that earlier groups have chosen it")
    print('   groups   lambda   first words   sentences   log p of best   first words after "the"')
    the, rows = torch.tensor([0, 0, 0, WORDS.index("the")]), {}
    with SummaryWriter(log_dir / "diverse", purge_step=0) as writer:
        for groups, strength in ((1, 0.0), (width, 0.0), (width, 0.5), (width, 1.0), (width, 2.0)):
            options = {"groups": groups, "diversity": strength}
            row = rows[groups, strength] = figures(log_probs, prompts, width, **options)[0]
            found = beam_search(log_probs, the, width, 12, eos=0, **options)
            first = " ".join(dict.fromkeys(WORDS[words[0]] for *_, words in found))
            print(f"   {groups:6}   {strength:6.1f}   {row['first_words']:11.2f}   "
                  f"{row['texts']:9.2f}   {row['log_prob']:13.2f}   {first}")  # fmt: skip
            if groups > 1:
                for name in ("first_words", "texts", "log_prob"):
                    writer.add_scalar(f"beam/{name}", row[name], round(10 * strength))
    beam, diverse = rows[1, 0.0], rows[width, 2.0]
    print(f"   -> first words: {beam['first_words']:.1f} in one group, "
          f"{diverse['first_words']:.1f} in {width} with lambda = 2; different sentences: "
          f"{beam['texts']:.1f} and {diverse['texts']:.1f}")  # fmt: skip
    return rows


def main(seed=0, log_dir=LOG_DIR, sentences=3000, prompts=40, widths=(1, 2, 4, 8, 32)):
    measured = {"trap": show_everyday(), "empty": show_empty()}
    log_probs, (starts, rests) = count_model(seed, sentences), beginnings(prompts, seed)
    measured["widths"] = show_widths(log_dir, log_probs, starts, rests, widths)
    measured["diverse"] = show_diverse(log_dir, log_probs, starts)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
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
    guard(main)
