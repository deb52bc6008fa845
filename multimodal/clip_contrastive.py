"""CLIP learns from captions alone to name images, even pairs of colour and shape new to it.

CLIP has two networks. One turns an image into a vector of length 1, the other a caption. Training
draws the vectors of an image and its own caption together, and pushes those of other pairs in the
batch apart. Then a class needs no examples, only words: write a caption for each class, and the
nearest one names the image (zero-shot). A usual classifier knows only the classes of its training.

    s_ij = e^t u_i . v_j      image i and caption j of a batch: a dot product of unit vectors
    L = (CE of the rows of s + CE of its columns) / 2      target of row i and of column i: i

    u_i, v_j  unit vectors of image i, caption j      e^t  the scale, learned; 1 / temperature
    CE  mean cross-entropy of softmax

CLIP starts e^t at 1 / 0.07 and keeps it at 100 or below. Each image here shows a drawn shape with
a size, a colour and a place; captions leave size and place out at times. Of the 36 pairs of colour
and shape, training never sees 6.

Needs          loss_functions/contrastive_loss.py, model_architecture/attention_mechanism.py
Checked here   retrieval and zero-shot beside a training with others' captions; a split batch
TensorBoard    in captions and shuffled, by step: train/loss and logit_scale/exp;
               similarity/matrix at six steps: a light diagonal appears in captions only
Try            in hide, write 0.0 for 0.4, so that captions always say all: which prompts suffer?
Answer         The bare ones: the text encoder has never read so short a caption
Source         Radford et al. 2021 (CLIP), arXiv:2103.00020, figure 3, sections 2.3, 2.5
"""

import argparse
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

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "multimodal" / "clip_contrastive"
COLOURS = {
    "red": (0.9, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.15), "white": (0.95, 0.95, 0.95), "purple": (0.7, 0.25, 0.85),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SIZES, PLACES = ("small", "large"), ("left", "right", "top", "bottom")
WORDS = ("<pad>", "<end>", "a", "on", "the", *SIZES, *COLOURS, *SHAPES, *PLACES)
LENGTH, SIDE = 8, 24  # words of a caption with its end, pixels
MAX_SCALE = math.log(100.0)


# --- 1. in everyday code -----------------------------------------------------------------------


def clip_loss(u, v, log_scale):
    """InfoNCE both ways of unit vectors u, v (B, D), pair by pair.

    s = e^log_scale u v^T; the mean of the cross-entropies of its rows and of its columns, the
    target on the diagonal. Exercise.
    """
    s, pairs = log_scale.exp() * u @ v.T, torch.arange(len(u), device=u.device)  # (B, B), (B,)
    return (F.cross_entropy(s, pairs) + F.cross_entropy(s.T, pairs)) / 2


def show_everyday():
    print("1. In everyday code: three images, three captions, e^t = 5: which belong together?")
    images = torch.tensor([[4.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])  # from an image network
    texts = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-4.0, 3.0]])  # from a text network
    u, v = F.normalize(images, dim=1), F.normalize(texts, dim=1)  # unit vectors
    t = torch.tensor(5.0).log()
    loss = clip_loss(u, v, t).item()
    cosines = u @ v.T  # image by caption
    chances = (t.exp() * cosines).softmax(dim=1)
    print("   image   vector          cosine with caption 1, 2, 3   probability of caption 1, 2, 3")
    for i in range(3):
        near, likely = ("   ".join(f"{x:5.2f}" for x in row[i]) for row in (cosines, chances))
        print(f"   {i + 1}       ({u[i, 0]:5.2f}, {u[i, 1]:4.2f})   {near}         {likely}")
    print(f"   loss {loss:.4f}; it would be log 3 = {math.log(3):.4f} if all vectors were alike")
    named = (cosines.argmax(1) + 1).tolist()
    wrong = ", ".join(str(i + 1) for i, name in enumerate(named) if name != i + 1)
    print(f"   -> the nearest captions are {named}: training must move image {wrong}")
    return {"loss": loss, "named": named}


# --- 2. two encoders, trained ------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """(B, 3, 24, 24) -> unit vectors (B, D)"""

    def __init__(self, D):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),  # (B, 16, 12, 12)
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),  # (B, 32, 6, 6)
            nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(576, D),
        )  # fmt: skip

    def forward(self, x):
        return F.normalize(self.layers(x), dim=1)


class TextEncoder(nn.Module):
    """Words (B, T) -> unit vectors (B, D): a causal transformer, read at <end>."""

    def __init__(self, D, width=64):
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS), width), nn.Embedding(LENGTH, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True,
                                                norm_first=True)  # fmt: skip
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, D)

    def forward(self, words):
        B, T = words.shape
        causal = torch.ones(T, T, dtype=torch.bool, device=words.device).triu(1)
        h = self.block(self.words(words) + self.places.weight[:T], src_mask=causal)
        end = (words == WORDS.index("<end>")).int().argmax(1)
        return F.normalize(self.project(self.norm(h[torch.arange(B, device=h.device), end])), dim=1)


class CLIP(nn.Module):
    def __init__(self, D=32):
        super().__init__()
        self.image, self.text = ImageEncoder(D), TextEncoder(D)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


@torch.no_grad()
def similarities(model, images, said):
    """u_i . v_j of images (B, 3, 24, 24) and captions (N, 4), (B, N), in eval mode."""
    model.eval()
    s = model.image(images) @ model.text(tokens(said)).T
    model.train()
    return s


def retrieval(model, facts):
    """Shares of images whose own caption is nearest, and of captions whose own image is nearest.

    From similarities(model, draw_images(facts), facts): rows images, columns captions. Exercise.
    """
    s = similarities(model, draw_images(facts), facts)
    pairs = torch.arange(len(facts), device=facts.device)
    return tuple((s.argmax(dim) == pairs).float().mean().item() for dim in (1, 0))


def train_clip(facts, steps, batch, seed, device, writer, shuffled=False):
    """CLIP after `steps` batches of facts (N, 4); shuffled: each image with another's caption."""
    torch.manual_seed(seed)
    model = CLIP().to(device)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc=Path(writer.log_dir).name, leave=False, disable=None):
        drawn = facts[torch.randint(len(facts), (batch,), device=device)]
        u = model.image(draw_images(drawn.roll(1, dims=0) if shuffled else drawn))
        loss = clip_loss(u, model.text(tokens(hide(drawn))), model.log_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.log_scale.data.clamp_(max=MAX_SCALE)  # in forward, t would have no gradient there
        writer.add_scalar("train/loss", loss.item(), step)
        writer.add_scalar("logit_scale/exp", model.log_scale.exp().item(), step)
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            shown = matrix_picture(model, one_of_each().to(device))
            writer.add_image("similarity/matrix", shown, step, dataformats="HWC")
    return model


def show_training(seed, log_dir, steps, batch, device):
    facts = all_facts().to(device)
    seen = facts[~unseen(facts)]
    print(f"2. Is the own caption found among {len(seen)}, after {steps} steps of {batch} pairs?")
    print("   trained on                 captions found   images found   scale e^t")
    models, rows = {}, {}
    for name, words in (("captions", "their own captions"), ("shuffled", "others' captions")):
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            model = train_clip(seen, steps, batch, seed, device, writer, name == "shuffled")
        models[name], (to_text, to_image) = model, retrieval(model, seen)
        rows[name] = {"retrieval": (to_text, to_image), "scale": model.log_scale.exp().item()}
        print(f"   {words:<26} {to_text:14.2f} {to_image:14.2f} {rows[name]['scale']:11.1f}")
    own, others = (rows[name]["retrieval"][0] for name in ("captions", "shuffled"))
    chance = 1 / len(seen)
    print(f"   -> it finds {own:.0%}; with others' captions {others:.1%}; chance: {chance:.1%}")
    return models, rows


# --- 3. name six images ------------------------------------------------------------------------


def bare_prompts():
    """What 36 prompts say, (36, 4): "a red circle" ...: each pair, without a size and a place."""
    pairs = torch.cartesian_prod(torch.arange(len(COLOURS)), torch.arange(len(SHAPES)))
    return F.pad(pairs, (1, 1), value=-1)


def show_six(model, device):
    print("3. Which of 36 prompts is nearest to a new image? Its pair was never trained on")
    print("   the image shows                      nearest, probability     second, probability")
    facts, classes = one_of_each().to(device), bare_prompts().to(device)
    cosines, rows = similarities(model, draw_images(facts), classes), []  # (6, 36)
    chances, order = (model.log_scale.exp() * cosines).softmax(1).topk(2)  # (6, 2) each
    for fact, (first, second), best in zip(facts.tolist(), chances, classes[order], strict=True):
        name, other = (" ".join(caption(*prompt)) for prompt in best.tolist())
        rows.append((" ".join(caption(*fact)), name, first.item()))
        print(f"   {rows[-1][0]:<36} {name:<17} {first:.2f}   {other:<17} {second:.2f}")
    right = sum(all(word in shows for word in name.split()) for shows, name, _ in rows)
    print(f"   -> without a classifier {right} of 6 are named right; a guess is right in 1 of 36")
    return rows


# --- 4. name many images -----------------------------------------------------------------------


def zero_shot(model, facts):
    """{prompts: shares of new images of facts (B, 4) whose [both, colour, shape] are named right}

    The nearest prompt names the image: of the 36 of bare_prompts ("bare"), or of the 288 full
    captions of all_facts ("full"), where a wrong size or place does not count. Exercise.
    """
    images, rows, device = draw_images(facts), {}, facts.device
    for name, said in (("bare", bare_prompts().to(device)), ("full", all_facts().to(device))):
        right = said[similarities(model, images, said).argmax(1)] == facts  # (B, 4)
        colour, shape = right[:, 1], right[:, 2]
        rows[name] = [x.float().mean().item() for x in (colour & shape, colour, shape)]
    return rows


def show_zero_shot(models, copies, device):
    facts = all_facts().to(device)
    parts = facts[unseen(facts)].repeat(copies, 1), facts[~unseen(facts)].repeat(copies, 1)
    print("4. How often does the nearest prompt name the colour and the shape of an image right?")
    print("                                     6 pairs never trained on     the 30 others")
    print("   prompts                           both   colour   shape        both   colour   shape")
    rows = {name: [zero_shot(model, part) for part in parts] for name, model in models.items()}
    for words, numbers in (
        ('36 bare: "a red ring" ...', [part["bare"] for part in rows["captions"]]),
        ("288 full: with size and place", [part["full"] for part in rows["captions"]]),
        ("36 bare, but others' captions", [part["bare"] for part in rows["shuffled"]]),
        ("(chance)", [[1 / 36, 1 / 6, 1 / 6]] * 2),
    ):
        new, seen = ("   ".join(f"{x:5.2f}" for x in row) for row in numbers)
        print(f"   {words:<34}{new}       {seen}")
    own, others = (rows[name][0]["bare"][0] for name in ("captions", "shuffled"))
    print(f"   -> words alone name {own:.0%} of the new pairs; after others' captions {others:.0%}")
    return rows


# --- 5. a batch on several GPUs ----------------------------------------------------------------


def rank_loss(own_u, own_v, u, v, log_scale, rank):
    """The part of a process, its rank: own images among all texts, own texts among all images.

    Each of B / n processes has own_u, own_v (n, D), the pairs from rank * n on of all u, v (B, D).
    The mean of both cross-entropies, s as in clip_loss. Exercise.
    """
    n = len(own_u)
    pairs, scale = torch.arange(rank * n, (rank + 1) * n, device=u.device), log_scale.exp()
    rows, columns = scale * own_u @ v.T, scale * own_v @ u.T  # (n, B) each
    return (F.cross_entropy(rows, pairs) + F.cross_entropy(columns, pairs)) / 2


def show_ranks(B=12, D=5, ranks=3):
    print(f"5. {B} pairs on {ranks} processes, gradients averaged: are they those of one process?")
    print("   vectors of the other processes      loss   relative error of the gradient")
    u, v = (F.normalize(torch.randn(B, D).double(), dim=1).requires_grad_() for _ in range(2))
    parts = list(zip(u.split(B // ranks), v.split(B // ranks), strict=True))
    rows, t = {}, torch.tensor(1.3)
    whole = clip_loss(u, v, t)
    (true,) = torch.autograd.grad(whole, u)
    for name, every in (("with their gradient", (u, v)), ("detached", (u.detach(), v.detach()))):
        mean = sum(rank_loss(*parts[rank], *every, t, rank) for rank in range(ranks)) / ranks
        (grad,) = torch.autograd.grad(mean, u, retain_graph=True)
        rows[name] = mean.item(), ((grad - true).norm() / true.norm()).item()
        print(f"   {name:<30} {mean:9.6f}   {rows[name][1]:30.3f}")
    print(f"   {'(one process has all)':<30} {whole:9.6f}")
    off = max(abs(mean - whole) for mean, _ in rows.values())
    right = " or ".join(name for name, (_, error) in rows.items() if error < 1e-9)
    print(f"   -> the losses differ by {off:.0e}; the gradient is right only for vectors {right}")
    return rows


# --- images, captions, the picture of their cosines -----------------------------------------------


def all_facts():
    """(288, 4): size, colour, shape, place of every possible image, by number."""
    return torch.cartesian_prod(*(torch.arange(len(a)) for a in (SIZES, COLOURS, SHAPES, PLACES)))


def unseen(facts):
    """Whether the pairing of colour and shape is kept for the test: each of both once."""
    return (facts[:, 1] + facts[:, 2]) % 6 == 0


def one_of_each():
    """(6, 4): one image of each pair of colour and shape that is kept for the test."""
    return torch.tensor([[i % 2, i, -i % 6, i % 4] for i in range(6)])


def hide(facts):
    """Facts (B, 4) with size and place each left out, as -1, of two in five."""
    hidden = torch.rand(len(facts), 4, device=facts.device) < 0.4
    hidden[:, 1:3] = False  # colour and shape are always said
    return facts.masked_fill(hidden, -1)


def draw_images(facts):
    """Facts (B, 4) -> images (B, 3, 24, 24): one shape on dark ground, with noise."""
    B, device, (size, colour, shape, place) = len(facts), facts.device, facts.T
    axis = torch.arange(SIDE, device=device) - SIDE / 2 + 0.5
    centre = torch.tensor([(-6.0, 0), (6, 0), (0, -6), (0, 6)], device=device)[place]
    centre = (centre + 3 * torch.rand(B, 2, device=device) - 1.5).view(B, 2, 1, 1)
    x, y = axis.view(1, 1, SIDE) - centre[:, 0], axis.view(1, SIDE, 1) - centre[:, 1]
    r = torch.tensor([3.5, 5.5], device=device)[size].view(B, 1, 1)
    a, b, d = x.abs(), y.abs(), torch.hypot(x, y)
    box, thin = torch.maximum(a, b), torch.minimum(a, b)
    masks = torch.stack([
        d < r, box < 0.85 * r, (2 * a < y + r) & (y < 0.8 * r), (thin < 0.35 * r) & (box < r),
        (d < r) & (d > 0.55 * r), a + b < 1.1 * r,
    ], dim=1)  # (B, 6, 24, 24)  # fmt: skip
    mask = masks[torch.arange(B, device=device), shape, None]
    palette = torch.tensor(list(COLOURS.values()), device=device)
    paint = palette[colour] + 0.1 * torch.randn(B, 3, device=device)
    ground = 0.3 * torch.rand(B, 1, 1, 1, device=device)
    image = torch.where(mask, paint.view(B, 3, 1, 1), ground)
    return image + 0.05 * torch.randn(B, 3, SIDE, SIDE, device=device)


def caption(size, colour, shape, place):
    """Words of "a small red triangle on the left", a list; a size or place of -1 is left out.

    All four are numbers of SIZES, of COLOURS' names, of SHAPES and of PLACES. Exercise.
    """
    adjectives = [SIZES[size]] * (size >= 0) + [list(COLOURS)[colour]]
    return ["a", *adjectives, SHAPES[shape]] + ["on", "the", PLACES[place]] * (place >= 0)


def tokens(said):
    """What captions say, (B, 4) -> their words as numbers (B, 8), <end> after each, then <pad>.

    By caption; a word's number is its place in WORDS, LENGTH is 8. Exercise.
    """
    captions = [[*caption(*facts), "<end>"] for facts in said.tolist()]
    padded = [words + ["<pad>"] * (LENGTH - len(words)) for words in captions]
    return torch.tensor([[WORDS.index(word) for word in words] for words in padded]).to(said.device)


def matrix_picture(model, facts, cell=56, left=270):
    """(H, W, 3) uint8: cosines of captions, one a row, and images, one a column: 1 is white."""
    images = draw_images(facts)
    s, n = similarities(model, images, facts).T.tolist(), len(facts)  # row: caption
    picture = Image.new("RGB", (left + n * cell, 24 + (n + 1) * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    pen.text((4, 4), "cosine of caption and image: black -1, white 1; own pairs: diagonal", 0, font)
    pixels = (images.cpu().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    for i in range(n):
        image = Image.fromarray(pixels[i]).resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
        picture.paste(image, (left + i * cell, 24))
        top = 24 + (i + 1) * cell
        pen.text((4, top + 18), " ".join(caption(*facts[i].tolist())), "black", font)
        for j, cosine in enumerate(s[i]):
            grey, x = round(255 * (cosine + 1) / 2), left + j * cell
            pen.rectangle((x, top, x + cell - 2, top + cell - 2), (grey, grey, grey))
            ink = (255 * (grey < 128),) * 3
            pen.text((x + 28, top + 28), f"{cosine:.2f}", ink, font, anchor="mm")
    return np.asarray(picture)


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, steps=700, batch=128, copies=10):
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday()}
    models, measured["training"] = show_training(seed, log_dir, steps, batch, device)
    measured["six"] = show_six(models["captions"], device)
    measured["zero_shot"], measured["ranks"] = show_zero_shot(models, copies, device), show_ranks()
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
    torch.set_num_threads(1)  # networks this small are hardly faster on two
    guard(main)
