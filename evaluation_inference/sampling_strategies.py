"""Sampling settings decide how varied a language model's text is, and how much of it is right.

A language model gives every next word a number, its logit z; softmax turns logits to probabilities,
and one word is drawn. Drawn as they are, unlikely words come up now and then and break sentences;
always taking the likeliest word says the same again and again. Filters stand between the two.

    temperature         z / T             T near 0: nearly always the likeliest; T = 1: as learned
    top_k               keeps the k largest logits
    top_p               keeps the fewest words, likeliest first, whose probabilities reach p
    min_p               keeps words with at least min_p times the probability of the likeliest
    repetition_penalty  z / c if z > 0, else z c, for each word that was said, c being the penalty

What is dropped gets z = -inf. These are the argument names of transformers' generate; its order is
penalty, temperature, top_k, top_p, min_p. Values to start from: temperature 0.7 to 1, top_k 50
(its default), top_p 0.9 to 0.95, min_p 0.05 to 0.1, repetition_penalty 1.1 to 1.2. Of equal
logits keep_top_k keeps the first, so that exactly k stay (transformers' top_k keeps all ties).

Needs          nn_loss.py
Checked here   plain = complete; draws against a distribution computed without the filters; the
               order of temperature and top_p; variety and grammar of a model's sentences
TensorBoard    text/entropy, distinct_2, perplexity, grammatical, repeats by 100 times the value,
               in the runs by_temperature, by_p, by_penalty
Try            in show_order, add 3 to the logits: logits = 3 + model(...). What changes?
Answer         Nothing: softmax sees differences alone. (The repetition penalty would notice.)
Source         Holtzman 2020, arXiv:1904.09751, 3.1 (top-p); Fan 2018, arXiv:1805.04833 (top-k);
               Nguyen 2024, arXiv:2407.01082 (min-p); Keskar 2019, arXiv:1909.05858, 4.1 (penalty;
               there all are divided, which makes negative logits likelier)
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


# --- 1. in everyday code -----------------------------------------------------------------------


def plain_probs(logits, temperature=1.0, top_k=50, top_p=1.0):
    """Probabilities (B, V) to draw the next word from, of logits (B, V).

    Logits over temperature; the top_k largest; of these, likeliest first, as many as are needed for
    their probabilities to reach top_p. What is dropped has probability 0, the rest sums to 1.
    Exercise.
    """
    z, order = (logits / temperature).sort(dim=1, descending=True, stable=True)
    z[:, top_k:] = -math.inf
    probs = z.softmax(1)
    probs[probs.cumsum(1) - probs >= top_p] = 0  # those before it reach top_p already
    probs = probs / probs.sum(1, keepdim=True)
    return torch.zeros_like(probs).scatter(1, order, probs)  # back in the order of the words


def show_everyday():
    print("1. In everyday code: which of four words can be drawn, and how often?")
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()  # (B, V): one text, four words
    probs = plain_probs(logits, temperature=0.7, top_k=3, top_p=0.9)
    word = probs.multinomial(1)  # (B, 1): the number of the word that comes next

    print("   setting            A      B      C      D")
    rows = {"none": plain_probs(logits), "all three": probs}
    for name, options in {
        "temperature 0.5": {"temperature": 0.5}, "temperature 2": {"temperature": 2.0},
        "top_k 3": {"top_k": 3}, "top_p 0.7": {"top_p": 0.7}, "top_p 0.8": {"top_p": 0.8},
    }.items():  # fmt: skip
        rows[name] = plain_probs(logits, **options)
    rows["min_p 0.25"] = keep_min_p(logits, 0.25).softmax(1)
    for name, row in rows.items():
        print(f"   {name:<15}  {'  '.join(f'{p:.3f}' for p in row[0].tolist())}")
    left = (probs > 0).sum().item()
    print(f"   -> temperature 0.7, top_k 3 and top_p 0.9 leave {left} words; drawn: "
          f"{'ABCD'[word.item()]}")  # fmt: skip
    return {name: row[0].tolist() for name, row in rows.items()}


# --- 2. the five filters: logits (B, V) -> logits (B, V) ---------------------------------------


def temper(logits, temperature):
    """Logits over temperature > 0.

    ValueError "the temperature must be over 0, not T: for 0 take argmax" (nan and infinity, too);
    "logits over T are too large for ..." if the quotient is infinite. Exercise.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be over 0, not {temperature}: for 0 take argmax")
    scaled = logits / temperature
    if (scaled == math.inf).any():
        raise ValueError(f"logits over {temperature} are too large for {logits.dtype}: take argmax")
    return scaled


def keep_top_k(logits, k):
    """The k largest of each row, of equals the first; all if k >= V.

    The others of the logits (B, V) are -inf. ValueError "k must be at least 1, not ...". Exercise.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    order = logits.argsort(dim=1, descending=True, stable=True)
    return logits.scatter(1, order[:, k:], -math.inf)


def probabilities(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def keep_top_p(logits, p):
    """The fewest of the likeliest whose probabilities reach p; one at least, all for p = 1.

    The others of each row of logits (B, V) are -inf; of equals the first comes first. Rounding must
    not count: p is reached 1e-6 below it. ValueError "p must be from 0 to 1, not ...". Exercise.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, not {p}")
    if p == 1:
        return logits.clone()
    order = logits.argsort(dim=1, descending=True, stable=True)
    probs = probabilities(logits).gather(1, order)
    dropped = probs.cumsum(1) - probs >= p - 1e-6  # those before it reach p
    dropped[:, 0] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


def keep_min_p(logits, p):
    """Words with at least p times the largest probability of their row; the others are -inf.

    Rounding must not count: p (1 - 1e-6) times is enough. ValueError "min_p must be from 0 to 1,
    not ...". Exercise.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, not {p}")
    probs = probabilities(logits)
    least = p * (1 - 1e-6) * probs.amax(1, keepdim=True)
    return logits.masked_fill(probs < least, -math.inf)


def penalize(logits, tokens, penalty):
    """Words of tokens (B, L), that were said, made less likely by penalty > 1, each of them once.

    Their logits z become z / penalty if z > 0, else z * penalty. ValueError "the penalty must be
    over 0, not ..." (infinity, too); "n rows of tokens for m rows of logits". Exercise.
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"the penalty must be over 0, not {penalty}")
    if len(tokens) != len(logits):
        raise ValueError(f"{len(tokens)} rows of tokens for {len(logits)} rows of logits")
    said = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(said > 0, said / penalty, said * penalty))


def apply_filters(logits, tokens=None, repetition_penalty=1.0, temperature=1.0, top_k=None,
                  top_p=1.0, min_p=0.0):  # fmt: skip
    """All five, in the order of the transformers library."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be (B, V), not {tuple(logits.shape)}")
    if (logits.isnan() | (logits == math.inf)).any() or (logits == -math.inf).all(1).any():
        raise ValueError("logits hold NaN, +inf, or a row of nothing but -inf")
    if tokens is None and repetition_penalty != 1:
        raise ValueError("a penalty needs the tokens that were said")
    if tokens is not None:
        logits = penalize(logits, tokens, repetition_penalty)
    logits = temper(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    return keep_min_p(keep_top_p(logits, top_p), min_p)


def analytic(z, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """The same for one row of logits, word by word and without the filters: V probabilities."""
    weight = [math.exp((x - max(z)) / temperature) for x in z]
    order = sorted(range(len(z)), key=lambda i: -weight[i])[:top_k]
    total, mass, stays = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if mass < top_p * total and weight[i] >= min_p:  # the largest weight is 1
            stays.append(i)
        mass += weight[i]
    total = sum(weight[i] for i in stays)
    return torch.tensor([weight[i] / total if i in stays else 0.0 for i in range(len(z))])


def chi_square(counts, p):
    """Sum of (counts - expected)^2 / expected over words that can come; inf if another has come."""
    expected = counts.sum() * p
    if (counts[p == 0] > 0).any():
        return math.inf
    return ((counts - expected)[p > 0].square() / expected[p > 0]).sum().item()


def show_draws(samples):
    print(f"2. Do {samples:,} draws follow the formulas? Chi-square: about the freedom if so")
    print("   setting                              words kept   chi-square   freedom   unfiltered")
    logits, results = 2 * torch.randn(1, 12), {}
    for options in ({}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1},
                    {"temperature": 1.5, "top_k": 9, "top_p": 0.9}):  # fmt: skip
        name = ", ".join(f"{key} {value}" for key, value in options.items()) or "none"
        p, figures = analytic(logits[0].tolist(), **options), []
        for z in (apply_filters(logits, **options), logits):
            draws = z.softmax(1)[0].multinomial(samples, replacement=True)
            figures.append(chi_square(draws.bincount(minlength=12), p))
        kept = (p > 0).sum().item()
        results[name] = *figures, kept - 1
        print(f"   {name:<35}  {kept:10}   {figures[0]:10.1f}   {kept - 1:7}   {figures[1]:10.1f}")
    most = max(chi / freedom for chi, _, freedom in results.values())
    print(f"   -> filtered draws: chi-square at most {most:.1f} times the freedom; inf: a word "
          "came that is dropped")  # fmt: skip
    return results


# --- 3. the order matters ----------------------------------------------------------------------


def show_order(model):
    print('3. How many words does top_p 0.9 keep after "the", by where the temperature stands?')
    print("   temperature   before top_p   after top_p")
    the, kept = torch.tensor([[0, 0, 0, 0, WORDS.index("the")]]), {}
    logits = model(the)
    for T in (0.5, 1.0, 2.0, 4.0):
        before, after = keep_top_p(temper(logits, T), 0.9), temper(keep_top_p(logits, 0.9), T)
        kept[T] = [(z > -math.inf).sum().item() for z in (before, after)]
        print(f"   {T:11}   {kept[T][0]:12}   {kept[T][1]:11}")
    low, high = ([row[i] for row in kept.values()] for i in (0, 1))
    print(f"   -> before top_p the temperature changes the number of words ({min(low)} to "
          f"{max(low)}), after it less ({min(high)} to {max(high)})")  # fmt: skip
    return kept


# --- 4. what a model says ----------------------------------------------------------------------


def generate(model, n, longest=16, **filters):
    """n texts, as words before the first "."; mean entropy of a draw, mean -log p of a word.

    The entropy is of the filtered distribution, -log p is the model's own, without filters.
    """
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


def show_curves(log_dir, model, texts):
    print(
        f"4. {texts} sentences of a trained model by setting: how varied, and how many are right?"
    )
    print("   entropy: of a draw, in nats; pairs: different ones of all pairs of neighbours;")
    print("   perplexity: exp(mean -log p) by the model; twice: sentences that say a word twice")
    print("   setting                  entropy   pairs   perplexity   grammatical   twice")
    settings, rows = {
        "by_temperature": ("temperature", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)),
        "by_p": ("top_p", (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)),
        "by_penalty": ("repetition_penalty", (1.0, 1.2, 1.5, 2.0)),
    }, {}  # fmt: skip
    quoted = {}
    for run, (name, values) in settings.items():
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
                a, b, c, d, e = row.values()
                print(f"   {name:<18} {value:4.2f}  {a:7.2f}   {b:5.3f}   {c:10.2f}   {d:11.2f}   "
                      f"{e:5.2f}")  # fmt: skip
                quoted[name, value] = " / ".join(" ".join(text) for text in said[:2])
    for value in (0.25, 2.0):
        print(f"   said at temperature {value}: {quoted['temperature', value]}"[:100])
    cold, hot = rows["temperature", 0.25], rows["temperature", 2.0]
    print(f"   -> temperature 0.25: {cold['grammatical']:.2f} right, {cold['distinct_2']:.3f} "
          f"pairs; 2: {hot['grammatical']:.2f} right, {hot['distinct_2']:.3f} pairs")  # fmt: skip
    return rows


# --- the small language, and its model ---------------------------------------------------------

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


def main(seed=0, log_dir=LOG_DIR, samples=100_000, sentences=3000, epochs=8, texts=1000):
    torch.manual_seed(seed)
    measured = {"kept": show_everyday(), "chi": show_draws(samples)}
    model = train_model(seed, sentences, epochs)
    measured |= {"order": show_order(model), "rows": show_curves(log_dir, model, texts)}
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
    torch.set_num_threads(1)  # networks this small are slower on two
    guard(main)
