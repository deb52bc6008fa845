"""What a language model says depends on how one draws: sharper is more often right, and more alike.

    temperature         z / T                      T -> 0 is greedy, T -> infinity uniform
    top-k               the k largest logits
    top-p               the fewest tokens, largest first, whose probabilities reach p
    min-p               tokens with at least min_p times the probability of the likeliest
    repetition penalty  z / c if z > 0 else z c    for tokens that have been said, once each

The middle three set what they drop to -inf. All are applied in the order of the transformers
library: penalty, temperature, top-k, top-p, min-p. The order matters: a temperature before top-p
changes how many tokens top-p keeps, one after it only how those share the probability. Of equal
logits the lower index goes first, so that exactly k stay (transformers keeps all ties).

Checked here   what each filter keeps; sampled counts against the analytic distribution; the
               order of temperature and top-p; entropy, distinct pairs, perplexity and the share of
               grammatical sentences by T and by p, of a model trained here on a small grammar
TensorBoard    text/entropy, distinct_2, perplexity, grammatical and repeats (texts that say a word
               twice) by 100 T in by_temperature, by 100 p in by_p, by 100 c in by_penalty
Try            add 3 to every logit: which of the five notices? The repetition penalty alone
Source         Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (top-p); Fan et al. 2018,
               arXiv:1805.04833 (top-k); Keskar et al. 2019, arXiv:1909.05858, section 4.1
               (penalty; there all are divided, which makes negative ones likelier: transformers
               multiplies those); Nguyen et al. 2024, arXiv:2407.01082 (min-p)
"""

import argparse
import math
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TOPIC = "evaluation_inference"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "sampling_strategies"

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


# --- filters: logits (B, V) -> logits (B, V) ---------------------------------------------------


def check(logits):
    """ValueError unless logits are (B, V), not NaN, with something to choose in every row."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be (B, V), not {tuple(logits.shape)}")
    if (logits.isnan() | (logits == math.inf)).any() or (logits == -math.inf).all(1).any():
        raise ValueError("logits hold NaN, +inf, or a row of nothing but -inf")


def greedy(logits):
    """The likeliest tokens (B,); of equals the first."""
    return logits.argmax(1)


def temperature(logits, T):
    """Logits over T > 0.

    ValueError "the temperature must be over 0, not T: for 0 use greedy" (nan and infinity, too);
    "logits over T are too large for …" if the quotient is infinite. Exercise.
    """
    if not 0 < T < math.inf:
        raise ValueError(f"the temperature must be over 0, not {T}: for 0 use greedy")
    scaled = logits / T
    if (scaled == math.inf).any():
        raise ValueError(f"logits over {T} are too large for {logits.dtype}: use greedy")
    return scaled


def top_k(logits, k):
    """The k largest of each row, of equals the first; all if k >= V.

    The others of the logits (B, V) are -inf. ValueError "k must be at least 1, not …". Exercise.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    order = logits.argsort(dim=1, descending=True, stable=True)
    return logits.scatter(1, order[:, k:], -math.inf)


def top_p(logits, p):
    """The fewest of the likeliest whose probabilities reach p; one at least, all for p = 1.

    The others of each row of logits (B, V) are -inf; of equals the first comes first. Sums of equal
    shares fall short by rounding: p counts as reached 1e-9 below it. ValueError "p must be from 0
    to 1, not …". Exercise.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, not {p}")
    if p == 1:
        return logits.clone()
    order = logits.argsort(dim=1, descending=True, stable=True)
    probs = logits.double().softmax(1).gather(1, order)
    before = probs.cumsum(1) - probs
    dropped = before >= p - 1e-9  # p is reached; sums of equal shares fall short by rounding
    dropped[:, 0] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


def min_p(logits, p):
    """Tokens with at least p times the largest probability of their row; the others are -inf.

    What ties with that bound stays, in spite of rounding. ValueError "min_p must be from 0 to 1,
    not …". Exercise.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, not {p}")
    probs = logits.double().softmax(1)
    least = p * (1 - 1e-6) * probs.amax(1, keepdim=True)  # what ties with it stays
    return logits.masked_fill(probs < least, -math.inf)


def repetition_penalty(logits, tokens, penalty):
    """Tokens (B, L) that were said, made less likely by penalty > 1, however often they occur.

    Their logits z become z / c if z > 0, else z c. ValueError "the penalty must be over 0, not …"
    (infinity, too); "n rows of tokens for m rows of logits". Exercise.
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"the penalty must be over 0, not {penalty}")
    if len(tokens) != len(logits):
        raise ValueError(f"{len(tokens)} rows of tokens for {len(logits)} rows of logits")
    said = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(said > 0, said / penalty, said * penalty))


def apply_filters(logits, tokens=None, penalty=1.0, T=1.0, k=None, p=1.0, min_prob=0.0):
    """All five, in the order of the transformers library."""
    check(logits)
    if tokens is None and penalty != 1:
        raise ValueError("a penalty needs the tokens that were said")
    if tokens is not None:
        logits = repetition_penalty(logits, tokens, penalty)
    logits = temperature(logits, T)
    if k is not None:
        logits = top_k(logits, k)
    return min_p(top_p(logits, p), min_prob)


# --- a small language and a model of it --------------------------------------------------------


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


def generate(model, n, longest=16, **filters):
    """n texts, as words before the first "."; mean entropy of a draw, mean -log p of a word."""
    tokens = torch.zeros(n, CONTEXT, dtype=torch.long)
    alive, entropies, surprise = torch.ones(n, dtype=torch.bool), [], []
    for _ in range(longest):
        raw = model(tokens[:, -CONTEXT:])
        drawn_from = apply_filters(raw, tokens[:, CONTEXT:], **filters).softmax(1)
        word = drawn_from.multinomial(1)  # (B, 1)
        entropies.append(torch.special.entr(drawn_from).sum(1)[alive])
        surprise.append(-raw.log_softmax(1).gather(1, word).squeeze(1)[alive])
        tokens = torch.cat([tokens, word], dim=1)
        alive &= word.squeeze(1) != 0
        if not alive.any():
            break
    texts = [[WORDS[i] for i in row] for row in tokens[:, CONTEXT:].tolist()]
    texts = [text[: text.index(".")] if "." in text else text for text in texts]
    return texts, torch.cat(entropies).mean().item(), torch.cat(surprise).mean().item()


def distinct(texts, n=2):
    """Share of the n-grams of all texts that are different ones.

    A text is a list of words, an n-gram n of them in a row. 0 if there is none. Exercise.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def grammatical(texts):
    return sum(GRAMMAR.fullmatch(" ".join(text)) is not None for text in texts) / len(texts)


# --- the sections ------------------------------------------------------------------------------


def show_filters():
    print("1. probabilities that stay, of 0.5, 0.25, 0.125, 0.125")
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    kept = {}
    for name, filtered in {
        "top-k 3": top_k(logits, 3),
        "top-p 0.75": top_p(logits, 0.75),
        "top-p 0.76": top_p(logits, 0.76),
        "top-p 0": top_p(logits, 0.0),
        "min-p 0.2": min_p(logits, 0.2),
        "min-p 0.3": min_p(logits, 0.3),
    }.items():
        kept[name] = filtered.softmax(1)[0].tolist()
        print(f"   {name:<10} {'  '.join(f'{p:.3f}' for p in kept[name])}")
    return kept


def analytic(z, T=1.0, k=None, p=1.0, min_prob=0.0):
    """The same for one row of logits, word by word and without the filters: V probabilities."""
    weight = [math.exp((x - max(z)) / T) for x in z]
    order = sorted(range(len(z)), key=lambda i: -weight[i])[:k]
    total, mass, stays = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if mass < p * total and weight[i] >= min_prob:  # the largest weight is 1
            stays.append(i)
        mass += weight[i]
    total = sum(weight[i] for i in stays)
    return torch.tensor([weight[i] / total if i in stays else 0.0 for i in range(len(z))])


def show_chi_square(samples):
    print(f"2. chi-square of {samples:,} draws against the filtered distribution")
    logits, results = 2 * torch.randn(1, 12), {}
    for name, filters in {
        "plain": {}, "T 0.7": {"T": 0.7}, "top-k 5": {"k": 5}, "top-p 0.8": {"p": 0.8},
        "min-p 0.1": {"min_prob": 0.1}, "T 1.5, k 9, p 0.9": {"T": 1.5, "k": 9, "p": 0.9},
    }.items():  # fmt: skip
        probs = apply_filters(logits, **filters).softmax(1)[0]
        draws = probs.multinomial(samples, replacement=True)
        counts, p = draws.bincount(minlength=12), analytic(logits[0].tolist(), **filters)
        assert (counts[p == 0] == 0).all()
        expected = samples * p[p > 0]
        chi = ((counts[p > 0] - expected).square() / expected).sum().item()
        freedom = len(expected) - 1
        results[name] = chi, freedom
        print(f"   {name:<18} {chi:5.1f}   degrees of freedom {freedom}")
    return results


def show_order(model):
    print('3. words that top-p 0.9 keeps after "the": temperature before it, after it')
    logits, kept = model(torch.tensor([[0, 0, 0, 0, WORDS.index("the")]])), {}
    for T in (0.5, 1.0, 2.0, 4.0):
        before, behind = top_p(temperature(logits, T), 0.9), temperature(top_p(logits, 0.9), T)
        kept[T] = [(z > -math.inf).sum().item() for z in (before, behind)]
        print(f"   T {T}   before {kept[T][0]:2}   after {kept[T][1]:2}")
    return kept


def show_curves(log_dir, model, texts):
    rows = {}
    settings = {
        "by_temperature": ("T", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)),
        "by_p": ("p", (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)),
        "by_penalty": ("penalty", (1.0, 1.2, 1.5, 2.0)),
    }
    for number, (run, (name, values)) in enumerate(settings.items(), 4):
        print(f"{number}. {texts} texts by {name}: entropy, distinct pairs, perplexity, "
              "grammatical, saying a word twice")  # fmt: skip
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for value in values:
                said, entropy, surprise = generate(model, texts, **{name: value})
                row = rows[name, value] = {
                    "entropy": entropy, "distinct_2": distinct(said),
                    "perplexity": math.exp(surprise), "grammatical": grammatical(said),
                    "repeats": sum(len(set(text)) < len(text) for text in said) / texts,
                }  # fmt: skip
                for tag, figure in row.items():
                    writer.add_scalar(f"text/{tag}", figure, round(100 * value))
                shown = "   ".join(f"{figure:.3f}" for figure in row.values())
                print(f"   {name} {value:<4}   {shown}   {' '.join(said[0])}")
    return rows


def main(seed=0, log_dir=LOG_DIR, samples=100_000, sentences=3000, epochs=8, texts=1000):
    torch.manual_seed(seed)
    measured = {"kept": show_filters(), "chi": show_chi_square(samples)}
    model = train_model(seed, sentences, epochs)
    return measured | {
        "order": show_order(model),
        "rows": show_curves(log_dir, model, texts),
    }


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
