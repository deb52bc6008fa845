"""Sampling settings decide how varied a language model's text is, and how much of it is right.

For each word that may come next a language model gives a number z, its logit. Softmax turns logits
into probabilities p = exp(z) / (sum of exp(z) over all words), and one word is drawn. An unlikely
word comes up now and then and may break the sentence; always taking the likeliest word gives the
same sentence each time. Five settings stand between the two. Their names are the arguments of
generate() in the library transformers, which applies them in this order:

    repetition_penalty  of each word that was said, z becomes z / c if z > 0, else z c; c: penalty
    temperature         z becomes z / T: below T = 1 the likeliest word gains, above T = 1 it loses
    top_k               keeps the k words with the largest z
    top_p               keeps the fewest words, likeliest first, whose p together reach this value
    min_p               keeps the words whose p is at least this value times the largest p

A word that is not kept gets z = -inf, and so p = 0. Values to start from: transformers 4 documents
top_k 50 as its default and min_p 0.01 to 0.2 as typical, which it compares with top_p 0.99 to 0.8;
it quotes about 1.2 for the penalty from Keskar.

Needs          nn_loss.py
Checked here   the order of temperature and top_p; grammar, variety and repetition by setting
TensorBoard    text/grammatical, distinct_2, perplexity, repeats; x-axis: 100 times the value; runs
               by_temperature, by_p (at temperature 2), by_penalty. By temperature, grammatical
               falls and distinct_2 (pairs of words that differ) rises
Try            in show_order, write logits = 3 + model(the). What changes?
Answer         Nothing: softmax sees only differences. (The repetition penalty would notice.)
Source         Holtzman 2020, arXiv:1904.09751, 3.1 (top-p); Fan 2018, arXiv:1805.04833 (top-k);
               Nguyen 2024, arXiv:2407.01082 (min-p); Keskar 2019, arXiv:1909.05858, 4.1 (penalty;
               there every z is divided, which makes a negative z likelier)
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
    probs[:, 1:][probs.cumsum(1)[:, :-1] >= top_p] = 0  # the words before it reach top_p already
    probs = probs / probs.sum(1, keepdim=True)
    return torch.zeros_like(probs).scatter(1, order, probs)  # back in the order of the words


def show_everyday():
    print("1. In everyday code: with what probability is each of four words drawn?")
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()  # (B, V): one text, four words
    probs = plain_probs(logits, temperature=0.7, top_k=3, top_p=0.9)
    word = probs.multinomial(1)  # (B, 1): the number of the word that comes next

    print("   setting                    A      B      C      D")
    rows = {
        "none": plain_probs(logits),
        "temperature 0.5": plain_probs(logits, temperature=0.5),
        "temperature 2": plain_probs(logits, temperature=2.0),
        "top_k 3": plain_probs(logits, top_k=3),
        "top_p 0.7": plain_probs(logits, top_p=0.7),
        "top_p 0.8": plain_probs(logits, top_p=0.8),
        "min_p 0.25": keep_min_p(logits, 0.25).softmax(1),
        "0.7, top_k 3, top_p 0.9": probs,
    }
    for name, row in rows.items():
        print(f"   {name:<23}  {'  '.join(f'{p:.3f}' for p in row[0].tolist())}")
    left = (probs > 0).sum().item()
    print(f"   -> temperature 0.7, top_k 3 and top_p 0.9 leave {left} words; drawn: "
          f"{'ABCD'[word.item()]}")  # fmt: skip
    return {name: row[0].tolist() for name, row in rows.items()}


# --- 2. the five settings, and their order: logits (B, V) -> logits (B, V) ---------------------


def temper(logits, temperature):
    """Logits over temperature > 0.

    ValueError "the temperature must be over 0, not T: for 0 take argmax" (nan and infinity, too).
    Exercise.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be over 0, not {temperature}: for 0 take argmax")
    return logits / temperature


def keep_top_k(logits, k):
    """The k largest of each row, of equals the first; all if k >= V.

    The others of the logits (B, V) are -inf. Exercise.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    return logits.scatter(1, order[:, k:], -math.inf)


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
    probs = logits.float().softmax(1).gather(1, order)
    dropped = probs.cumsum(1) - probs >= p - 1e-6  # those before it reach p
    dropped[:, 0] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


def keep_min_p(logits, p):
    """Words with at least p times the largest probability of their row; the others are -inf.

    Rounding must not count: p (1 - 1e-6) times is enough. Exercise.
    """
    probs = logits.float().softmax(1)
    least = p * (1 - 1e-6) * probs.amax(1, keepdim=True)
    return logits.masked_fill(probs < least, -math.inf)


def penalize(logits, tokens, penalty):
    """Words of tokens (B, L), that were said, made less likely by penalty > 1, each of them once.

    Their logits z become z / penalty if z > 0, else z * penalty. Exercise.
    """
    said = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(said > 0, said / penalty, said * penalty))


def apply_settings(logits, tokens=None, repetition_penalty=1.0, temperature=1.0, top_k=None,
                   top_p=1.0, min_p=0.0):  # fmt: skip
    """All five, in the order of the library transformers. A penalty needs the tokens (B, L)."""
    if repetition_penalty != 1:
        logits = penalize(logits, tokens, repetition_penalty)
    logits = keep_top_k(temper(logits, temperature), top_k or logits.size(1))
    return keep_min_p(keep_top_p(logits, top_p), min_p)


def show_order(model):
    print(f'2. After "the", how many of {len(WORDS)} words does top_p 0.9 keep?')
    print("   temperature   temperature, then top_p   top_p, then temperature")
    the, kept = torch.tensor([[0, 0, 0, 0, WORDS.index("the")]]), {}
    logits = model(the)
    for T in (0.5, 1.0, 2.0, 4.0):
        first, last = keep_top_p(temper(logits, T), 0.9), temper(keep_top_p(logits, 0.9), T)
        kept[T] = [(z > -math.inf).sum().item() for z in (first, last)]
        print(f"   {T:11}   {kept[T][0]:23}   {kept[T][1]:23}")
    first, last = ([row[i] for row in kept.values()] for i in (0, 1))
    behind = f"not at all (always {last[0]})" if len(set(last)) == 1 else f"too: {last}"
    print(f"   -> temperature before top_p changes the number ({min(first)} to {max(first)} words)"
          f", after top_p {behind}")  # fmt: skip
    return kept


# --- 3. what a model says ----------------------------------------------------------------------


def generate(model, n, longest=16, **settings):
    """n texts, as words before the first "."; and the perplexity of their words to the model.

    Perplexity is exp(mean -log p of a word), with the model's own p, before any setting.
    """
    tokens = torch.zeros(n, CONTEXT, dtype=torch.long)
    alive, surprise = torch.ones(n, dtype=torch.bool), []
    for _ in range(longest):
        raw = model(tokens[:, -CONTEXT:])
        word = apply_settings(raw, tokens[:, CONTEXT:], **settings).softmax(1).multinomial(1)
        surprise.append(-raw.log_softmax(1).gather(1, word).squeeze(1)[alive])
        tokens = torch.cat([tokens, word], dim=1)
        alive &= word.squeeze(1) != 0
        if not alive.any():
            break
    texts = [[WORDS[i] for i in row] for row in tokens[:, CONTEXT:].tolist()]
    texts = [text[: text.index(".")] if "." in text else text for text in texts]
    return texts, torch.cat(surprise).mean().exp().item()


def distinct(texts, n=2):
    """The different n-grams (n words in a row) of all texts (lists of words), over all of them."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def grammatical(texts):
    return sum(GRAMMAR.fullmatch(" ".join(text)) is not None for text in texts) / len(texts)


def show_texts(log_dir, model, n, seed):
    print(f"3. {n} sentences of a trained model by setting: how many are right, how varied?")
    print("   right: share of grammatical sentences; pairs: different pairs of neighbouring words")
    print("   over all pairs; perplexity: exp(mean -log p of a word by the model); twice: share of")
    print("   sentences that say a word twice (which may be right: the dog sees the cat)")
    print("   setting                         right   pairs   perplexity   twice")
    rng, (x, y) = random.Random(seed + 1000), examples(n, seed + 1000)  # the same new sentences
    texts = {("real", 0): [sentence(rng)[:-1] for _ in range(n)]}
    perplexity, rows = {("real", 0): F.cross_entropy(model(x), y).exp().item()}, {}
    names, hot = {("real", 0): "new sentences of the language"}, {"temperature": 2.0}
    for name, values, others in (
        ("temperature", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), {}),
        ("top_p", (0.0, 0.5, 0.75, 0.9, 1.0), hot), ("top_k", (5,), hot), ("min_p", (0.1,), hot),
        ("repetition_penalty", (1.0, 1.2, 1.5, 2.0), {}),
    ):  # fmt: skip
        for value in values:
            key, options = (name, value), {**others, name: value}
            texts[key], perplexity[key] = generate(model, n, **options)
            names[key] = ", ".join(f"{k} {v:g}" for k, v in options.items())
    for key, said in texts.items():
        twice = sum(len(set(text)) < len(text) for text in said) / n
        row = grammatical(said), distinct(said), perplexity[key], twice
        rows[key] = dict(zip(TAGS, row, strict=True))
        print("   {:<29}   {:5.2f}   {:5.3f}   {:10.2f}   {:5.2f}".format(names[key], *row))
    print("   (top_p 1 and repetition_penalty 1 change nothing: their rows show what chance does)")
    for key in (("temperature", 2.0), ("top_p", 0.9)):
        wrong = (" ".join(text) for text in texts[key] if not grammatical([text]))
        print(f"   first wrong sentence of {names[key]}: {next(wrong, '(none)')}"[:100])
    right, twice = ({key: row[tag] for key, row in rows.items()} for tag in (TAGS[0], TAGS[3]))
    cold, mild, hot = (right["temperature", T] for T in (0.25, 1.0, 2.0))
    print(f"   -> right at temperature 0.25, 1 and 2: {cold:.2f}, {mild:.2f} and {hot:.2f}")
    print(f"   -> right at temperature 2 with top_p 0.9: {right['top_p', 0.9]:.2f}, with top_k 5: "
          f"{right['top_k', 5]:.2f}, with min_p 0.1: {right['min_p', 0.1]:.2f}")  # fmt: skip
    some, strong = (twice["repetition_penalty", c] for c in (1.2, 2.0))
    print(f"   -> sentences that say a word twice: {twice['real', 0]:.2f} in the language, "
          f"{some:.2f} with penalty 1.2, {strong:.2f} with 2")  # fmt: skip
    for run, name in RUNS.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for value, row in ((value, row) for (key, value), row in rows.items() if key == name):
                for tag, figure in row.items():
                    writer.add_scalar(f"text/{tag}", figure, round(100 * value))
    return rows


# --- the small language, and its model ---------------------------------------------------------

TAGS = "grammatical", "distinct_2", "perplexity", "repeats"
RUNS = {"by_temperature": "temperature", "by_p": "top_p", "by_penalty": "repetition_penalty"}
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
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(model(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False)


def main(seed=0, log_dir=LOG_DIR, sentences=3000, epochs=8, texts=1000):
    torch.manual_seed(seed)
    measured, model = {"kept": show_everyday()}, train_model(seed, sentences, epochs)
    measured["order"] = show_order(model)
    measured["rows"] = show_texts(log_dir, model, texts, seed)
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
