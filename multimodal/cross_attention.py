"""With cross-attention a frozen language model answers what its text alone cannot tell, because it
reads an image. Behind a gate of 0 it is at first, bit for bit, the model that it was.

In cross-attention the queries come from one sequence, the text, and keys and values from another
one, the image: each word asks all patches (square pieces) of the image. Frozen means that the
weights of the trained model do not change. Two ways to give it an image are shown. Flamingo puts
cross-attention into it, behind gates: factors tanh(a) that start at 0. BLIP-2 trains a Q-Former in
front of it, here a small one of one layer: a few learned queries read the image, and what they find
stands in front of the text as if it were words.

    cross      softmax(q k^T / sqrt(d)) v        q = text W_q^T,  k = image W_k^T,  v = image W_v^T
    gated      h + tanh(a) cross(h, image),  then  h + tanh(b) mlp(h);  a = b = 0 at the start
    Q-Former   (B, P, K) -> (B, Q, C): Q learned queries, the same for each image

    B  pairs of text and image     T  words of C numbers     P  patches of K numbers
    d  numbers per query and key   a, b  learned numbers     mlp  two linear layers
    h  the text inside the model, (B, T, C)

Needs          attention_mechanism.py
Checked here   plain = complete = nn.MultiheadAttention; gates of 0: the output and the gradients;
               accuracy with the own image, with another's, and trained on those of others
TensorBoard    attention/map in images: light on the framed object; attention/queries in qformer_4:
               a row per query, most are lightest on one kind of shape; train/loss by step
Try            in show_qformer, write (4, 2, 1) for (4, 1): what do two queries give?
Answer         between the two: with fewer queries than shapes fewer questions are answered
Source         Alayrac et al. 2022 (Flamingo), arXiv:2204.14198, section 2.2; Li et al. 2023
               (BLIP-2), arXiv:2301.12597, section 3.1 and figure 3
"""

import argparse
import copy
import math
import os
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "multimodal" / "cross_attention"
F64 = torch.float64
SHAPES = ("square", "frame", "plus", "bar")
COLOURS = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.1), "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.8, 0.1), "white": (0.95, 0.95, 0.95), "pink": (0.95, 0.5, 0.8),
}  # fmt: skip
PROMPT = ("what", "colour", "is", "the")
FACTS = tuple(f"{colour}-{shape}" for shape in SHAPES for colour in COLOURS)  # "red-square" ...
WORDS = (*PROMPT, *SHAPES, *COLOURS, *FACTS)
CELL, GRID = 8, 3  # pixels of a patch, patches of a side


# --- 1. in everyday code -----------------------------------------------------------------------


def cross_plain(text, image, W_q, W_k, W_v):
    """text (B, T, C) asks image (B, P, K): answers (B, T, d) and weights (B, T, P)."""
    q, k, v = text @ W_q.T, image @ W_k.T, image @ W_v.T
    weights = (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1)  # each row sums to 1
    return weights @ v, weights


def show_everyday():
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one text: 2 words of 2 numbers
    image = torch.tensor([[[4.0, 0.0, 7.0], [0.0, 4.0, 8.0], [0.0, 0.0, 0.0]]])  # 3 patches of 3
    W_q, W_k = torch.eye(2), torch.eye(2, 3)  # a key: the first two numbers of a patch
    W_v = torch.tensor([[0.0, 0.0, 1.0]])  # a value: the third one
    answers, weights = cross_plain(text, image, W_q, W_k, W_v)
    torchs = F.scaled_dot_product_attention(text, image[..., :2], image[..., 2:])

    print("1. In everyday code: 2 words ask 3 patches. A word is its query, a patch (key, value)")
    print("   word     weight on patch ((4, 0), 7)   ((0, 4), 8)   ((0, 0), 0)   answer   torch's")
    for i, name in enumerate(("(1, 0)", "(0, 1)")):
        row = weights[0, i].tolist()
        print(f"   {name}   {row[0]:27.3f}   {row[1]:11.3f}   {row[2]:11.3f}   "
              f"{answers[0, i, 0]:6.3f}   {torchs[0, i, 0]:7.3f}")  # fmt: skip
    names = ("first", "second", "third")
    one, two = (names[patch] for patch in weights[0].argmax(1).tolist())
    print(f"   -> the first word reads most from the {one} patch, the second from the {two};")
    print(f"      torch's answers are the same within {(answers - torchs).abs().max():.0e}")
    return answers, weights


# --- 2. complete: heads, and images that are absent --------------------------------------------


class CrossAttention(nn.Module):
    """text (B, T, C) asks image (B, P, K): (B, T, C); with weights (B, H, T, P) if asked for.

    present (B,) or (B, P) is True where there is an image, or a patch. ValueError for a width that
    does not split into heads, or batches that differ.
    """

    def __init__(self, embed_dim, num_heads, kdim=None, vdim=None):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} does not split into {num_heads} heads")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(kdim or embed_dim, embed_dim)
        self.v_proj = nn.Linear(vdim or kdim or embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, C/H)

    def forward(self, text, image, value=None, present=None, need_weights=False):
        """text (B, T, C) asks image (B, P, K): (B, T, C); with weights (B, H, T, P) if asked for.

        Queries of the text, keys of the image, values of `value` or the image, each projected and
        split by self.heads; softmax(q k^T / sqrt(C / H)) v, heads joined, out_proj. present (B,) or
        (B, P) is True where there is an image, or a patch: others get weight 0, and where there is
        none, all weights are 0. ValueError "n texts for m images, k values" for batches that
        differ. Exercise.
        """
        value = image if value is None else value
        if not len(text) == len(image) == len(value):
            raise ValueError(f"{len(text)} texts for {len(image)} images, {len(value)} values")
        q, k, v = (
            self.heads(project(x))
            for project, x in ((self.q_proj, text), (self.k_proj, image), (self.v_proj, value))
        )
        scores = (q / math.sqrt(q.size(-1))) @ k.mT  # (B, H, T, P)
        if present is not None:
            allowed = present.view(len(text), 1, 1, -1).expand_as(scores)
            scores = scores.masked_fill(~allowed, -math.inf)
            nothing = ~allowed.any(-1, keepdim=True)  # softmax would give NaN
            weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        else:
            weights = scores.softmax(-1)
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return (out, weights) if need_weights else out

    @torch.no_grad()
    def copy_torch(self, other):
        """Take the weights of an nn.MultiheadAttention with kdim and vdim."""
        weights = (other.q_proj_weight, other.k_proj_weight, other.v_proj_weight)
        for ours, weight, bias in zip((self.q_proj, self.k_proj, self.v_proj), weights,
                                      other.in_proj_bias.chunk(3), strict=True):  # fmt: skip
            ours.weight.copy_(weight)
            ours.bias.copy_(bias)
        self.out_proj.load_state_dict(other.out_proj.state_dict())
        return self


def show_twin(B=3, T=5, P=7, C=12, K=9, H=3):
    print(
        f"2. Is it nn.MultiheadAttention({C}, {H}, kdim={K}, vdim={K})? Largest difference, float64"
    )
    library = nn.MultiheadAttention(C, H, kdim=K, vdim=K, batch_first=True, dtype=F64)
    ours = CrossAttention(C, H, K).double().copy_torch(library)
    one = CrossAttention(C, 1, K).double().copy_torch(library)
    text, image = torch.randn(B, T, C, dtype=F64), torch.randn(B, P, K, dtype=F64)
    inputs = (text.requires_grad_(), image.requires_grad_())
    plain = cross_plain(text, image, one.q_proj.weight, one.k_proj.weight, one.v_proj.weight)[0]
    pairs = {
        "torch's, 3 heads": (ours(text, image), library(text, image, image)[0]),
        "plain, 1 head": (one(text, image), one.out_proj(plain)),
    }
    print("   ours minus         outputs   gradients")
    off = []
    for name, pair in pairs.items():
        grads = [torch.autograd.grad(out.sin().sum(), inputs) for out in pair]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        off += [(x - y).abs().max().item() for x, y in (pair, *zip(*grads, strict=True))]
        print(f"   {name:<16}   {off[-3]:7.0e}   {max(off[-2:]):9.0e}")
    present = torch.tensor([True, False, True])
    _, weights = ours(text, image, present=present, need_weights=True)
    sums = weights.sum(-1)  # (B, H, T)
    torch.testing.assert_close(sums, present.double().view(B, 1, 1).expand_as(sums))
    print(f"   -> the largest is {max(off):.0e}; a word's weights sum to {sums[0].mean():g}, or to")
    print(f"      {sums[1].mean():g} where the image is missing")
    return max(off), sums.mean(dim=(1, 2)).tolist()


# --- 3. a gate of 0 ----------------------------------------------------------------------------


class GatedCrossAttention(nn.Module):
    """h (B, T, C) plus what it asks of the image, and an MLP, each behind a gate of 0 at first."""

    def __init__(self, embed_dim, num_heads, kdim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.cross = CrossAttention(embed_dim, num_heads, kdim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim)
        )
        self.gate_cross, self.gate_mlp = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, h, image, present=None):
        """h + tanh(gate_cross) cross(norm1(h), image), then + tanh(gate_mlp) mlp(norm2(h))).

        self.weights keeps the attention's weights (B, H, T, P), detached, to be looked at.
        Exercise.
        """
        out, weights = self.cross(self.norm1(h), image, present=present, need_weights=True)
        self.weights = weights.detach()  # (B, H, T, P), kept to be looked at
        h = h + self.gate_cross.tanh() * out
        return h + self.gate_mlp.tanh() * self.mlp(self.norm2(h))


def draw_scenes(n):
    """Images (n, 3, 24, 24): each shape once, in a cell of its own, in any colour, on dark grey.

    With the colours (n, 4) and the cells (n, 4) of the shapes.
    """
    palette = torch.tensor(list(COLOURS.values()))
    colours = torch.randint(len(palette), (n, len(SHAPES)))
    cells = torch.rand(n, GRID * GRID).argsort(1)[:, : len(SHAPES)]
    axis = torch.arange(CELL) - CELL / 2 + 0.5
    shift = torch.randint(-1, 2, (2, n, len(SHAPES), 1, 1))
    a, b = (axis.view(1, CELL) + shift[0]).abs(), (axis.view(CELL, 1) + shift[1]).abs()
    box, thin = torch.maximum(a, b), torch.minimum(a, b)  # (n, 4, 8, 8)
    masks = torch.stack([
        box[:, 0] < 2, (box[:, 1] < 3) & (box[:, 1] > 2), (thin[:, 2] < 1) & (box[:, 2] < 3),
        (b[:, 3] < 1) & (a[:, 3] < 3),
    ], dim=1)  # (n, 4, 8, 8)  # fmt: skip
    objects = torch.where(masks[:, :, None], palette[colours][..., None, None], 0.2)
    scene = torch.full((n, GRID * GRID, 3, CELL, CELL), 0.2)
    scene[torch.arange(n)[:, None], cells] = objects  # (n, 4, 3, 8, 8)
    scene = scene.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5)  # (n, 3, row, y, column, x)
    scene = scene.reshape(n, 3, GRID * CELL, GRID * CELL)
    return scene + 0.03 * torch.randn_like(scene), colours, cells


def patches(images):
    """(B, 3, 24, 24) -> (B, 9, 192): row by row, each patch 8 x 8 pixels, channel by channel.

    Exercise.
    """
    cut = images.unflatten(3, (GRID, CELL)).unflatten(2, (GRID, CELL))  # (B, 3, r, y, c, x)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def ask(colours, cells):
    """Questions "what colour is the SHAPE" (B, 5), answers (B,), both as words; the cells (B,).

    colours, cells (B, 4) are by shape; a shape for each is drawn by torch.randint. Words are
    numbers of WORDS: PROMPT first, then SHAPES, then COLOURS. Exercise.
    """
    B, shapes = len(colours), len(PROMPT)  # the number of the first word that is a shape
    which, rows = torch.randint(len(SHAPES), (B,)), torch.arange(B)
    question = torch.cat([torch.arange(shapes).expand(B, -1), shapes + which[:, None]], dim=1)
    return question, shapes + len(SHAPES) + colours[rows, which], cells[rows, which]


class LanguageModel(nn.Module):
    """Words (B, T) -> logits (B, V) of the next one, by one block that sees all words.

    `before` (B, Q, C) stands in front of the text as if it were words; `visual`, if any, is asked
    before the block.
    """

    def __init__(self, d=48, heads=4):
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS), d), nn.Embedding(len(PROMPT) + 1, d)
        self.block = nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, batch_first=True,
                                                norm_first=True)  # fmt: skip
        self.head, self.visual = nn.Linear(d, len(WORDS)), None

    def forward(self, words, image=None, present=None, before=None):
        h = self.words(words) + self.places.weight[: words.size(1)]
        if self.visual is not None and image is not None:
            h = self.visual(h, image, present)
        if before is not None:
            h = torch.cat([before, h], dim=1)
        return self.head(self.block(h)[:, -1])


def facts(colours):
    """The words (B, 4) that say all colours (B, 4) of a scene, as "red-plus", in random order."""
    first = len(WORDS) - len(FACTS) + len(COLOURS) * torch.arange(len(SHAPES))
    return (first + colours).gather(1, torch.rand(colours.shape).argsort(1))


def train(model, parameters, steps, logits_of, writer=None, shuffled=False):
    """Adam on the parameters: cross-entropy of logits_of(scenes, colours, question).

    If shuffled, the scenes are those of others.
    """
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for step in tqdm(range(steps), leave=False, disable=None):
        scenes, colours, cells = draw_scenes(64)
        question, answer, _ = ask(colours, cells)
        logits = logits_of(patches(scenes).roll(int(shuffled), dims=0), colours, question)
        loss = F.cross_entropy(logits, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if writer:
            writer.add_scalar("train/loss", loss.item(), step)
    return model


def train_language_model(seed, steps):
    """A model of texts, frozen: it reads facts where they are told, and never sees an image."""
    torch.manual_seed(seed)
    model = LanguageModel()

    def logits_of(image, colours, question):
        told = torch.rand(()) < 0.5  # every second batch, on average
        return model(question, before=model.words(facts(colours)) if told else None)

    return train(model, model.parameters(), steps, logits_of).requires_grad_(False)


def with_visual(model):
    """A copy of the language model with gated cross-attention, its gates at 0."""
    model = copy.deepcopy(model)
    model.visual = GatedCrossAttention(model.words.embedding_dim, 4, 3 * CELL * CELL)
    return model


def show_gate(start):
    print("3. Is a frozen language model with gated cross-attention at first the same?")
    print("          output minus that   largest gradient     largest gradient")
    print("   steps done   without image     of the 2 gates   of weights behind")
    model = with_visual(start)
    optimizer = torch.optim.Adam(model.visual.parameters(), lr=3e-3)
    scenes, colours, cells = draw_scenes(32)
    image, (question, answer, _) = patches(scenes), ask(colours, cells)
    table = []
    for step in range(2):
        optimizer.zero_grad()
        logits = model(question, image)
        off = (logits - start(question)).abs().max().item()
        F.cross_entropy(logits, answer).backward()
        largest = {"gates": 0.0, "behind": 0.0}
        for name, parameter in model.visual.named_parameters():
            key = "gates" if name.startswith("gate") else "behind"
            largest[key] = max(largest[key], parameter.grad.abs().max().item())
        table.append((off, largest["gates"], largest["behind"]))
        print(f"   {step:10}   {off:13.6f}   {largest['gates']:16.6f}   {largest['behind']:17.6f}")
        optimizer.step()
    gates = "the gates alone" if table[0][2] == 0 else "not the gates alone"
    print(
        f"   -> before any step the output differs by {table[0][0]:g}; the first step moves {gates}"
    )
    return table


# --- 4. a language model that sees -------------------------------------------------------------


def answer_accuracy(logits_of, shift=0, n=1000):
    """Accuracy on n new scenes, asked with the image `shift` places before; and the cells (n,)."""
    scenes, colours, cells = draw_scenes(n)
    question, answer, cell = ask(colours, cells)
    with torch.no_grad():
        logits = logits_of(patches(scenes).roll(shift, dims=0), colours, question)
    return (logits.argmax(1) == answer).double().mean().item(), cell


def show_answers(seed, log_dir, start, steps):
    print("4. What colour is the SHAPE? 4 of 9 patches hold a shape; 1,000 new scenes")
    print("   the frozen language model                  accuracy   weight on the object's patch")
    rows = {}

    def show(name, accuracy, weight=None):
        rows[name] = accuracy, weight
        print(f"   {name:<40}   {accuracy:8.3f}   {'-' if weight is None else f'{weight:.3f}':>28}")

    def told(image, colours, question):
        return start(question, before=start.words(facts(colours)))

    show("told the facts in words", answer_accuracy(told)[0])
    show("the question alone", answer_accuracy(lambda image, c, question: start(question))[0])
    for name in ("images", "shuffled"):
        torch.manual_seed(seed)
        model = with_visual(start)

        def sees(image, colours, question, model=model):
            return model(question, image)

        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            train(model, model.visual.parameters(), steps, sees, writer, name == "shuffled")
            writer.add_image("attention/map", map_picture(model), 0, dataformats="HWC")
        cases = {"images": ("gated, asked with its image", "gated, asked with another's image"),
                 "shuffled": ("gated, trained on others' images",)}  # fmt: skip
        for shift, words in enumerate(cases[name]):
            accuracy, cell = answer_accuracy(sees, shift)
            weights = model.visual.weights[:, :, -1].mean(1)  # of the last word, over heads: (n, 9)
            show(words, accuracy, weights[torch.arange(len(cell)), cell].mean().item())
    show("a guess", 1 / len(COLOURS), 1 / GRID**2)
    seen, blind = rows["gated, asked with its image"][0], rows["the question alone"][0]
    print(f"   -> with its image it answers {seen:.1%} of the questions, without one {blind:.1%}")
    return rows


# --- 5. a Q-Former in front of the language model ----------------------------------------------


class QFormer(nn.Module):
    """image (B, P, K) -> (B, Q, C): learned queries look at each other, then at the image."""

    def __init__(self, num_queries, embed_dim, num_heads, kdim):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, embed_dim))
        self.own = CrossAttention(embed_dim, num_heads)
        self.cross = CrossAttention(embed_dim, num_heads, kdim)

    def forward(self, image, present=None):
        """(B, Q, C): the queries, plus self.own of them, then plus self.cross of the image.

        The queries (Q, C) are the same for each of the B images; self.own(h, h) lets them look at
        each other, self.cross(h, image, present=present) at the image. self.weights keeps the
        weights (B, H, Q, P) of the latter, detached. Exercise.
        """
        h = self.queries.expand(len(image), -1, -1)  # (B, Q, C)
        h = h + self.own(h, h)
        out, weights = self.cross(h, image, present=present, need_weights=True)
        self.weights = weights.detach()  # (B, H, Q, P), kept to be looked at
        return h + out


class Seeing(nn.Module):
    """Question (B, T), image (B, P, K) -> logits: what a Q-Former finds stands before the text.

    The language model is frozen; the Q-Former and a linear layer into its words are trained.
    """

    def __init__(self, language_model, Q):
        super().__init__()
        C = language_model.words.embedding_dim
        self.language_model = language_model
        self.qformer, self.project = QFormer(Q, C, 4, 3 * CELL * CELL), nn.Linear(C, C)

    def forward(self, question, image):
        return self.language_model(question, before=self.project(self.qformer(image)))


def weights_by_shape(model, n=1000):
    """Mean weight (Q, 4) of each query on the patch of each shape, over n new scenes and heads."""
    scenes, _, cells = draw_scenes(n)
    with torch.no_grad():
        model.qformer(patches(scenes))
    weights = model.qformer.weights.mean(1)  # (n, Q, 9)
    places = cells[:, None].expand(-1, weights.size(1), -1)  # (n, Q, 4)
    return weights.gather(2, places).mean(0)


def show_qformer(seed, log_dir, start, steps):
    print("5. Can Q learned queries read the image, if what they find stands before the question?")
    print("   queries                                    accuracy")
    rows, found = {}, {}
    runs = [(Q, False) for Q in (4, 1)] + [(4, True)]
    for Q, shuffled in runs:
        torch.manual_seed(seed)
        model = Seeing(start, Q)
        trained = [*model.qformer.parameters(), *model.project.parameters()]

        def sees(image, colours, question, model=model):
            return model(question, image)

        name = f"qformer_{Q}" + "_shuffled" * shuffled
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            train(model, trained, steps, sees, writer, shuffled)
            if not shuffled:
                picture = query_picture(model)
                writer.add_image("attention/queries", picture, 0, dataformats="HWC")
        rows[name], found[name] = answer_accuracy(sees)[0], weights_by_shape(model)
        words = f"{Q}, trained on others' images" if shuffled else f"{Q}"
        print(f"   {words:<40}   {rows[name]:8.3f}")
    print("   weight of each of the 4 queries on the patch of the")
    print("   query" + "".join(f"   {shape:>6}" for shape in SHAPES))
    for q, row in enumerate(found["qformer_4"].tolist()):
        print(f"   {q:5}" + "".join(f"   {weight:6.3f}" for weight in row))
    kinds = len(set(found["qformer_4"].argmax(1).tolist()))
    four, one = rows["qformer_4"], rows["qformer_1"]
    print(
        f"   -> the 4 queries look most at {kinds} different shapes. They do not see the question,"
    )
    print(f"      and {four:.1%} are answered; with 1 query for 4 shapes {one:.1%}")
    return rows, found["qformer_4"]


# --- the lesson --------------------------------------------------------------------------------


def picture_of(scenes, maps, words, framed=None, scale=6):
    """uint8 (H, W, 3): a row of scenes (n, 3, 24, 24), under it rows of maps (R, n, 9), with words.

    Each map is shown over its largest weight: light is much. `framed` (n,) are cells.
    """
    side, gap, top = scale * CELL, 6, 36
    size, n = GRID * side, len(scenes)
    canvas = Image.new("RGB", (n * (size + gap), top + (1 + len(maps)) * (size + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((4, 3), words, "black", ImageFont.load_default(13))
    for i in range(n):
        pictures = [(scenes[i].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()]
        for weights in maps[:, i]:
            grey = (weights / weights.amax() * 255).round().byte().view(GRID, GRID)
            pictures.append(grey[..., None].expand(-1, -1, 3).numpy())
        for row, picture in enumerate(pictures):
            image = Image.fromarray(np.ascontiguousarray(picture)).resize(
                (size, size), 0
            )  # nearest
            x, y = i * (size + gap), top + row * (size + gap)
            canvas.paste(image, (x, y))
            if framed is not None:
                x, y = x + framed[i] % GRID * side, y + framed[i] // GRID * side
                pen.rectangle((x, y, x + side - 1, y + side - 1), None, (255, 128, 0), 2)
    return np.asarray(canvas)


def map_picture(model, n=6):
    """Scenes, the object asked for framed; under each the weights of the last word."""
    scenes, colours, cells = draw_scenes(n)
    question, _, cell = ask(colours, cells)
    with torch.no_grad():
        model(question, patches(scenes))
    weights = model.visual.weights[:, :, -1].mean(1)  # (n, 9)
    words = (
        "Above: scenes, the object asked for framed.\nBelow: where the text looks, light is much"
    )
    return picture_of(scenes, weights[None], words, cell.tolist())


def query_picture(model, n=6):
    """Scenes; under each where every query looks, a row per query."""
    scenes = draw_scenes(n)[0]
    with torch.no_grad():
        model.qformer(patches(scenes))
    weights = model.qformer.weights.mean(1)  # (n, Q, 9)
    words = (
        "Above: scenes. Below: where each learned query\nlooks, one row per query, light is much"
    )
    return picture_of(scenes, weights.transpose(0, 1), words)


def main(seed=0, log_dir=LOG_DIR, text_steps=200, steps=300, query_steps=600):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "twin": show_twin()}
    start = train_language_model(seed, text_steps)
    measured["gate"] = show_gate(start)
    measured["answers"] = show_answers(seed, log_dir, start, steps)
    measured["qformer"] = show_qformer(seed, log_dir, start, query_steps)
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
