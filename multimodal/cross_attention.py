"""Cross-attention lets a text ask an image; behind a gate of 0 it leaves a language model alone.

    cross      softmax(q k^T / sqrt(d)) v     q from the text (B, T, C), k and v from the image
               (B, P, K), d = C / H a head: an answer for each question, however many patches
    gated      h + tanh(a) cross(h, image),  then  h + tanh(b) mlp(h);  a = b = 0 at the start
    Q-Former   Q learned questions, the same for every image: (B, P, K) -> (B, Q, C)

At a = b = 0 (Flamingo) the gates alone get a gradient; once they have moved, the weights behind
them do too. An absent image is masked: its row of weights is 0, and cross gives its bias alone.
LLaVA needs none of this: it puts the patches, projected, among the tokens of the text.

Checked here   cross = nn.MultiheadAttention with kdim and vdim; absent images; the Q-Former's form;
               gates at 0: the output bit by bit, the gradients; a frozen language model that says
               what colour a shape has: without an image, trained with images and asked with its own
               or with another's, and trained on those of others (shuffled); where it looks
TensorBoard    train/loss, gate/cross, gate/mlp by step in images, shuffled; attention/map: scenes
               with the object asked for framed, and the weights on their patches
Try            present=False for every image of the trained model: is it the language model again?
               No: it guesses too, but the bias and the MLP still speak: it is surer of its guess
Source         Alayrac et al. 2022 (Flamingo), arXiv:2204.14198, section 2.2; Li et al. 2023
               (BLIP-2), arXiv:2301.12597, section 3.1; Liu et al. 2023 (LLaVA), arXiv:2304.08485,
               section 4.1
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

import torch
import torch.nn.functional as F
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
WORDS = (*PROMPT, *SHAPES, *COLOURS)
CELL, GRID = 8, 3  # pixels of a patch, patches of a side


# --- attention to another modality -------------------------------------------------------------


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
        """h + tanh(gate_cross) cross(norm1(h), image), then + tanh(gate_mlp) mlp(norm2(…)).

        self.weights keeps the attention's weights (B, H, T, P), detached, to be looked at.
        Exercise.
        """
        out, weights = self.cross(self.norm1(h), image, present=present, need_weights=True)
        self.weights = weights.detach()  # (B, H, T, P), kept to be looked at
        h = h + self.gate_cross.tanh() * out
        return h + self.gate_mlp.tanh() * self.mlp(self.norm2(h))


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
        each other, self.cross(h, image, present=present) at the image. Exercise.
        """
        h = self.queries.expand(len(image), -1, -1)  # (B, Q, C)
        h = h + self.own(h, h)
        return h + self.cross(h, image, present=present)


# --- scenes and questions ----------------------------------------------------------------------


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
    """Words (B, T) -> logits (B, V) of the next, by one block; `visual`, if any, comes before it.

    Only the last word is read out, and it may see all words: a causal mask would change nothing.
    """

    def __init__(self, d=48, heads=4):
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS), d), nn.Embedding(len(PROMPT) + 1, d)
        self.block = nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, batch_first=True,
                                                norm_first=True)  # fmt: skip
        self.head, self.visual = nn.Linear(d, len(WORDS)), None

    def forward(self, words, image=None, present=None):
        h = self.words(words) + self.places.weight[: words.size(1)]
        if self.visual is not None and image is not None:
            h = self.visual(h, image, present)
        return self.head(self.block(h)[:, -1])


def with_visual(model):
    """A copy of the language model with gated cross-attention, its gates at 0."""
    model = copy.deepcopy(model)
    model.visual = GatedCrossAttention(model.words.embedding_dim, 4, 3 * CELL * CELL)
    return model


def answer_accuracy(model, shift=0, n=1000):
    """Accuracy on new scenes, asked with the image `shift` places before; of a model that sees,
    also the mean weight on the patch of the object asked for, and tanh(a)."""
    scenes, colours, cells = draw_scenes(n)
    question, answer, cell = ask(colours, cells)
    with torch.no_grad():
        logits = model(question, patches(scenes).roll(shift, dims=0))
    right = (logits.argmax(1) == answer).double().mean().item()
    if model.visual is None:
        return (right,)
    weights = model.visual.weights[:, :, -1].mean(1)  # of the last word, over heads: (B, 9)
    gate = model.visual.gate_cross.tanh().item()
    return right, weights[torch.arange(n), cell].mean().item(), gate


# --- the sections ------------------------------------------------------------------------------


def show_twin(B=3, T=5, P=7, C=12, K=9, H=3):
    print(f"1. nn.MultiheadAttention with kdim {K}: largest difference of output, of gradients")
    library = nn.MultiheadAttention(C, H, kdim=K, vdim=K, batch_first=True, dtype=F64)
    ours = CrossAttention(C, H, K).double().copy_torch(library)
    text, image = torch.randn(B, T, C, dtype=F64), torch.randn(B, P, K, dtype=F64)
    inputs = (text.requires_grad_(), image.requires_grad_())
    pair = ours(text, image), library(text, image, image)[0]
    grads = [torch.autograd.grad(out.sin().sum(), inputs) for out in pair]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    off = [(x - y).abs().max().item() for x, y in (pair, *zip(*grads, strict=True))]
    print(f"   {off[0]:.0e}   {max(off[1:]):.0e}")
    present = torch.tensor([True, False, True])
    _, weights = ours(text, image, present=present, need_weights=True)
    assert weights[1].abs().max() == 0 and (weights[0].sum(-1) - 1).abs().max() < 1e-12
    print(f"   an absent image: sum of weights {weights[1].sum():g}")


def show_queries(C=16, Q=4):
    print(f"2. a Q-Former with {Q} queries: patches -> answers")
    qformer, shapes = QFormer(Q, C, 2, 9), {}
    for P in (1, 9, 100):
        shapes[P] = tuple(qformer(torch.randn(2, P, 9)).shape)
        print(f"   {P:3} patches   {shapes[P]}")
    order = torch.randperm(9)
    image = torch.randn(2, 9, 9)
    torch.testing.assert_close(qformer(image), qformer(image[:, order]), rtol=0, atol=1e-5)
    return shapes


def train_language_model(seed, steps):
    """A model of questions and answers that never sees an image, frozen."""
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        question, answer, _ = ask(*draw_scenes(64)[1:])
        loss = F.cross_entropy(model(question), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def show_gate(start):
    print("3. gates of 0 on the frozen language model: output off by; largest gradients")
    model = with_visual(start)
    optimizer = torch.optim.Adam(model.visual.parameters(), lr=3e-3)
    scenes, colours, cells = draw_scenes(32)
    image, (question, answer, _) = patches(scenes), ask(colours, cells)
    off = (model(question, image) - start(question)).abs().max()
    assert off == 0
    print(f"   output off by {off:g}")
    grads = []
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(question, image), answer).backward()
        largest = {"gates": 0.0, "behind": 0.0}
        for name, parameter in model.visual.named_parameters():
            key = "gates" if name.startswith("gate") else "behind"
            largest[key] = max(largest[key], parameter.grad.abs().max().item())
        print(f"   step {step}   gates {largest['gates']:.1e}   behind {largest['behind']:.1e}")
        grads.append(largest)
        optimizer.step()
    assert grads[0]["behind"] == 0
    return grads


def train_visual(start, seed, steps, shuffled, writer):
    """The frozen model with gated cross-attention, trained on scenes, or on those of others."""
    torch.manual_seed(seed)
    model = with_visual(start)
    optimizer = torch.optim.Adam(model.visual.parameters(), lr=3e-3)
    for step in tqdm(range(steps), leave=False, disable=None):
        scenes, colours, cells = draw_scenes(64)
        question, answer, _ = ask(colours, cells)
        image = patches(scenes).roll(1, dims=0) if shuffled else patches(scenes)
        loss = F.cross_entropy(model(question, image), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        writer.add_scalar("train/loss", loss.item(), step)
        writer.add_scalar("gate/cross", model.visual.gate_cross.tanh(), step)
        writer.add_scalar("gate/mlp", model.visual.gate_mlp.tanh(), step)
    return model


def map_picture(model, n=6, scale=6):
    """(3, H, W): scenes, the object asked for framed; under each the weights of its patches."""
    scenes, colours, cells = draw_scenes(n)
    question, _, cell = ask(colours, cells)
    with torch.no_grad():
        model(question, patches(scenes))
    weights = model.visual.weights[:, :, -1].mean(1).view(n, 1, GRID, GRID)
    maps = weights / weights.amax(dim=(1, 2, 3), keepdim=True)
    side = scale * CELL
    maps = maps.repeat_interleave(side, 2).repeat_interleave(side, 3)
    scenes = scenes.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = []
    for picture in (scenes, maps.expand(-1, 3, -1, -1).clone()):
        for image, place in zip(picture, cell.tolist(), strict=True):
            y, x = side * (place // GRID), side * (place % GRID)
            framed = image[:, y : y + side, x : x + side]
            inside = framed[:, 2:-2, 2:-2].clone()
            framed[:] = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
            framed[:, 2:-2, 2:-2] = inside
        rows.append(torch.cat([F.pad(image, (0, 6), value=1.0) for image in picture], dim=2))
    return torch.cat(rows, dim=1)


def show_answers(seed, log_dir, start, steps):
    print("4. what colour is the SHAPE: accuracy, weight on the object's patch, tanh(a)")
    rows = {"text alone": answer_accuracy(start)}
    for name in ("images", "shuffled"):
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            model = train_visual(start, seed, steps, name == "shuffled", writer)
            rows[name] = answer_accuracy(model)
            writer.add_image("attention/map", map_picture(model), 0)
        if name == "images":
            rows["another's"] = answer_accuracy(model, shift=1)
    rows["chance"] = 1 / len(COLOURS), 1 / GRID**2
    for name, numbers in rows.items():
        print(f"   {name:<10}" + "".join(f"   {number:6.3f}" for number in numbers))
    return rows


def main(seed=0, log_dir=LOG_DIR, text_steps=150, steps=300):
    torch.manual_seed(seed)
    show_twin()
    shapes = show_queries()
    start = train_language_model(seed, text_steps)
    grads = show_gate(start)
    rows = show_answers(seed, log_dir, start, steps)
    return {"shapes": shapes, "grads": grads, "rows": rows}


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
