"""CLIP learns to name images: from captions alone, even pairs of words that it was not trained on.

CLIP has two networks. One turns an image into a vector of length 1, the other a caption. Training
draws the vectors of an image and its own caption together, and pushes those of other pairs in the
batch apart. Then a class needs no examples, only words: write a caption for each class, and the
nearest one names the image (zero-shot). A usual classifier knows only the classes of its training.

    s_ij = e^t u_i . v_j        image i and caption j of a batch: a dot product of unit vectors
    L = (CE of the rows of s + CE of its columns) / 2      target of row i and of column i: i
    dL/dt = mean over all rows and columns of E_softmax[s] - s_ii

    u_i, v_j  unit vectors of image i, caption j      CE  cross-entropy, log(sum of e^s) - s_own
    e^t  the scale, learned; 1 / e^t is the temperature      E_softmax  mean by softmax(s)

CLIP starts e^t at 1 / 0.07 and keeps it at 100 or below. The images here are drawn: a shape with a
size, a colour and a place. Of the 36 pairs of colour and shape, 6 are kept for the test. Captions
leave size and place out at times. LLaVA hands CLIP's image features to a language model.

Needs          loss_functions/contrastive_loss.py, model_architecture/attention_mechanism.py
Checked here   the loss against a double loop; retrieval and zero-shot beside a training with
               other images' captions; three ways to split a batch; two ways to limit e^t
TensorBoard    in captions and shuffled, by step: train/loss, logit_scale/exp, retrieval/...;
               similarity/matrix, six pictures and the last: a light diagonal appears in captions
Try            in hide, write 0.0 for 0.4, so that captions always say all: which prompts suffer?
Answer         The bare ones: the text encoder has never read so short a caption
Source         Radford et al. 2021 (CLIP), arXiv:2103.00020, figure 3, sections 2.3, 2.5, 3.1.4;
               Liu et al. 2023 (LLaVA), arXiv:2304.08485, section 4.1
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
F64 = torch.float64
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
    target on the diagonal. ValueError "need equal shapes (B, D), not (shape) and (shape)".
    Exercise.
    """
    if u.shape != v.shape or u.dim() != 2:
        raise ValueError(f"need equal shapes (B, D), not {tuple(u.shape)} and {tuple(v.shape)}")
    s, pairs = log_scale.exp() * u @ v.T, torch.arange(len(u), device=u.device)  # (B, B), (B,)
    return (F.cross_entropy(s, pairs) + F.cross_entropy(s.T, pairs)) / 2


def loop_loss(u, v, log_scale):
    """The same, as it is written: a sum over all candidates for every image and every text."""
    scale, total = log_scale.exp(), 0.0
    for own_u, own_v in zip(u, v, strict=True):
        texts = sum(torch.exp(scale * (own_u @ other - own_u @ own_v)) for other in v)
        images = sum(torch.exp(scale * (other @ own_v - own_u @ own_v)) for other in u)
        total = total + texts.log() + images.log()
    return total / (2 * len(u))


def show_everyday():
    print("1. In everyday code: three images, three captions, e^t = 5: which belong together?")
    images = torch.tensor([[4.0, 3.0], [0.0, 1.0], [-1.0, 0.0]], dtype=F64)  # from an image network
    texts = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-3.0, 4.0]], dtype=F64)  # from a text network
    u, v = F.normalize(images, dim=1), F.normalize(texts, dim=1)  # unit vectors
    t = torch.tensor(5.0, dtype=F64).log()
    loss = clip_loss(u, v, t)
    cosines = u @ v.T  # image by caption
    chances = (t.exp() * cosines).softmax(dim=1)

    print("   image   vector          cosine with caption 1, 2, 3   probability of caption 1, 2, 3")
    for i in range(3):
        row = (
            "   ".join(f"{c:5.2f}" for c in cosines[i]),
            "   ".join(f"{p:.2f}" for p in chances[i]),
        )
        print(f"   {i + 1}       ({u[i, 0]:5.2f}, {u[i, 1]:4.2f})   {row[0]}         {row[1]}")
    off, named = (loss - loop_loss(u, v, t)).abs().item(), (cosines.argmax(1) + 1).tolist()
    print(f"   loss {loss:.4f} ({math.log(3):.4f} if all are alike); a double loop: {off:.0e} off")
    wrong = [str(i + 1) for i, name in enumerate(named) if name != i + 1]
    print(f"   -> the nearest captions are {', '.join(map(str, named))}: training must move image "
          f"{', '.join(wrong)}")  # fmt: skip
    return {"loss": loss.item(), "off": off, "named": named}


# --- 2. two encoders, trained ------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """(B, 3, 24, 24) -> unit vectors (B, D)"""

    def __init__(self, D):
        super().__init__()
        layers, sizes = [], (3, 16, 32, 64)
        for c_in, c_out, stride in zip(sizes[:-1], sizes[1:], (2, 2, 1), strict=True):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(576, D))

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
    def clamp(self):
        """The parameter itself: its gradient stays, and it can come back."""
        self.log_scale.clamp_(max=MAX_SCALE)


@torch.no_grad()
def similarities(model, images, said):
    """u_i . v_j of images (B, 3, 24, 24) and captions (N, 4), (B, N), in eval mode."""
    model.eval()
    s = model.image(images) @ model.text(tokens(said)).T
    model.train()
    return s


def retrieval(model, facts):
    """Share of images whose caption is nearest, of captions whose image is: one of each a fact.

    Two floats, from similarities(model, draw_images(facts), facts), whose rows are images and whose
    columns are captions. Exercise.
    """
    s = similarities(model, draw_images(facts), facts)
    pairs = torch.arange(len(facts), device=facts.device)
    return tuple((s.argmax(dim) == pairs).float().mean().item() for dim in (1, 0))


def train_clip(facts, shown, steps, batch, seed, device, writer, shuffled=False):
    """CLIP after `steps` batches of facts (N, 4); shuffled: each image with another's caption.

    `shown` (n, 4) are the facts in the picture of the similarities.
    """
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
        model.clamp()  # after the step: see section 6
        writer.add_scalar("train/loss", loss.item(), step)
        writer.add_scalar("logit_scale/exp", model.log_scale.exp().item(), step)
        if step % max(1, steps // 6) == 0 or step == steps - 1:
            to_text, to_image = retrieval(model, facts)
            writer.add_scalar("retrieval/image_to_text", to_text, step)
            writer.add_scalar("retrieval/text_to_image", to_image, step)
            writer.add_image("similarity/matrix", matrix_picture(model, shown), step,
                             dataformats="HWC")  # fmt: skip
    return model


def show_training(seed, log_dir, steps, batch, device):
    facts = all_facts().to(device)
    new, seen = facts[unseen(facts)], facts[~unseen(facts)]
    print(f"2. Does CLIP find the caption of an image after {steps} steps of {batch} pairs?")
    print(f"   trained on                 caption found, of {len(seen)}   image found   scale e^t")
    models, rows = {}, {}
    for name in ("captions", "shuffled"):
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            shuffled = name == "shuffled"
            model = train_clip(seen, new[::6], steps, batch, seed, device, writer, shuffled)
        models[name], (to_text, to_image) = model, retrieval(model, seen)
        rows[name] = {"retrieval": (to_text, to_image), "scale": model.log_scale.exp().item()}
        words = "others' captions" if shuffled else "their own captions"
        print(f"   {words:<26} {to_text:20.2f} {to_image:13.2f} {rows[name]['scale']:11.1f}")
    print(f"   (chance)                   {1 / len(seen):20.3f} {1 / len(seen):13.3f}")
    own, others = (rows[name]["retrieval"][0] for name in ("captions", "shuffled"))
    print(f"   -> it finds {own:.0%} of the captions; trained on others' captions, {others:.1%}")
    return models, rows


# --- 3. name one image -------------------------------------------------------------------------


def prompts(sizes, places):
    """What the prompts say, (n, 36, 4): every pairing, in each of the n = sizes x places ways."""
    ways = [torch.tensor(a) for a in (sizes, places, range(len(COLOURS)), range(len(SHAPES)))]
    said = torch.cartesian_prod(*ways)[:, [0, 2, 3, 1]]
    return said.view(-1, len(COLOURS) * len(SHAPES), 4)


def show_one(model, device):
    print("3. What is on one new image? Its facts are a pair of colour and shape never trained on")
    truth = torch.tensor([[1, 1, 5, 0]], device=device)  # large, green, diamond, left
    classes = prompts([-1], [-1])[0].to(device)  # 36 prompts: "a red circle", "a red square", ...
    cosines = similarities(model, draw_images(truth), classes)[0]  # (36,)
    chances = (model.log_scale.exp() * cosines).softmax(0)
    print(f"   it shows: {' '.join(caption(*truth[0].tolist()))}")
    print("   the nearest prompts of 36   cosine   probability")
    best = [(" ".join(caption(*classes[i].tolist())), cosines[i].item(), chances[i].item())
            for i in cosines.argsort(descending=True)[:4]]  # fmt: skip
    for words, cosine, chance in best:
        print(f"   {words:<26} {cosine:7.2f}   {chance:11.2f}")
    print(f"   -> without a classifier the image is called: {best[0][0]}")
    return best


# --- 4. name many images -----------------------------------------------------------------------


@torch.no_grad()
def zero_shot(model, facts):
    """{prompt: accuracies} on new images of facts, 36 classes: of pairing, colour, shape.

    "bare" says no size or place; "single" all, one prompt at a time, the mean over the 8 of them;
    "ensemble" has the mean vector of the 8 for each class.
    """
    model.eval()
    u = model.image(draw_images(facts))
    every = prompts(range(len(SIZES)), range(len(PLACES))).to(facts.device)
    v = model.text(tokens(every.flatten(0, 1))).unflatten(0, every.shape[:2])  # (8, 36, D)
    bare = model.text(tokens(prompts([-1], [-1])[0].to(facts.device)))
    model.train()
    takes = {"bare": bare[None], "single": v, "ensemble": F.normalize(v.mean(0), dim=1)[None]}
    rows = {}
    for name, classes in takes.items():
        guess = (u @ classes.mT).argmax(-1)  # (n, B)
        colour, shape = guess // len(SHAPES) == facts[:, 1], guess % len(SHAPES) == facts[:, 2]
        rows[name] = [x.float().mean().item() for x in (colour & shape, colour, shape)]
    return rows


def show_zero_shot(models, copies, device):
    facts = all_facts().to(device)
    parts = facts[unseen(facts)].repeat(copies, 1), facts[~unseen(facts)].repeat(copies, 1)
    print("4. How often is an image named right? 36 prompts, one for each pair of colour and shape")
    print("                                     6 pairs never trained on     the 30 others")
    print("   prompts                           both   colour   shape        both   colour   shape")
    words = {"bare": "bare: a red ring", "single": "full: a small red ring on the left",
             "ensemble": "mean vector of 8 full ones"}  # fmt: skip
    rows = {name: [zero_shot(model, part) for part in parts] for name, model in models.items()}
    shown = {words[kind]: [part[kind] for part in rows["captions"]] for kind in words}
    shown["bare, others' captions"] = [part["bare"] for part in rows["shuffled"]]
    shown["(chance)"] = [[1 / 36, 1 / 6, 1 / 6]] * 2
    for name, numbers in shown.items():
        new, seen = ("   ".join(f"{x:5.2f}" for x in row) for row in numbers)
        print(f"   {name:<34}{new}       {seen}")
    own, others = (rows[name][0]["bare"][0] for name in ("captions", "shuffled"))
    print(f"   -> words alone name {own:.0%} of the pairs never trained on; with others' captions "
          f"{others:.0%}")  # fmt: skip
    return rows


# --- 5. a batch on several GPUs ----------------------------------------------------------------


def rank_loss(own_u, own_v, u, v, log_scale, rank):
    """The part of a process, its rank: own images among all texts, own texts among all images.

    Of B / n processes each has own_u, own_v (n, D), the pairs from rank * n on of all u, v (B, D).
    The mean of both cross-entropies, s as in clip_loss. ValueError "a batch of B does not split
    evenly into parts of n": a mean over processes would weigh parts wrongly. Exercise.
    """
    n = len(own_u)
    if len(u) % n:
        raise ValueError(f"a batch of {len(u)} does not split evenly into parts of {n}")
    pairs, scale = torch.arange(rank * n, (rank + 1) * n, device=u.device), log_scale.exp()
    rows, columns = scale * own_u @ v.T, scale * own_v @ u.T  # (n, B) each
    return (F.cross_entropy(rows, pairs) + F.cross_entropy(columns, pairs)) / 2


def rank_losses(u, v, t, ranks):
    """{name: the losses of all processes}, as they come by the vectors of the others."""
    n, takes = len(u) // ranks, {}
    parts = [slice(rank * n, (rank + 1) * n) for rank in range(ranks)]
    takes["own rows, gradients come back"] = [
        rank_loss(u[part], v[part], u, v, t, rank) for rank, part in enumerate(parts)
    ]
    takes["own rows, the others detached"] = [
        rank_loss(u[part], v[part], u.detach(), v.detach(), t, rank)
        for rank, part in enumerate(parts)
    ]
    takes["all rows, the others detached"] = []
    for part in parts:
        mine_u, mine_v = u.detach().clone(), v.detach().clone()
        mine_u[part], mine_v[part] = u[part], v[part]  # with gradient
        takes["all rows, the others detached"].append(clip_loss(mine_u, mine_v, t))
    return takes


def show_ranks(B=12, D=5, ranks=3):
    print(f"5. {B} pairs on {ranks} processes that average their gradients: is that one process's?")
    print(
        "                                            gradient: its relative error, and that of its"
    )
    print("   each computes                     loss   error         direction alone")
    u = F.normalize(torch.randn(B, D, dtype=F64), dim=1).requires_grad_()
    v, t, rows = F.normalize(torch.randn(B, D, dtype=F64), dim=1), torch.tensor(1.3).double(), {}
    whole = clip_loss(u, v, t)
    (true,) = torch.autograd.grad(whole, u)
    for name, losses in rank_losses(u, v, t, ranks).items():
        mean = sum(losses) / ranks
        (grad,) = torch.autograd.grad(mean, u, retain_graph=True)
        scaled = grad * true.norm() / grad.norm()
        off, turned = ((g - true).norm().item() / true.norm().item() for g in (grad, scaled))
        rows[name] = mean.item(), off, turned
        print(f"   {name:<29} {mean:10.6f}   {off:11.3f}   {turned:15.3f}")
        assert abs(mean - whole) < 1e-12
    print(f"   {'one process':<29} {whole:10.6f}")
    right = min(rows, key=lambda name: rows[name][1])
    print(f"   -> the loss is the same each time, the gradient only for: {right}")
    return rows


# --- 6. the limit of the scale -----------------------------------------------------------------


def scale_gradient(u, v, log_scale):
    """dL/dt of clip_loss by t = log_scale, by the formula: a tensor ().

    The mean over all rows and columns of E_softmax[s] - s_ii. Exercise.
    """
    s = log_scale.exp() * u @ v.T
    rows, columns = ((s * s.softmax(dim)).sum(dim) - s.diagonal() for dim in (1, 0))
    return (rows + columns).mean() / 2


def show_clamp(steps=50):
    print(
        f"6. e^t = 110 is over its limit of 100, and the loss wants less: e^t after {steps} steps?"
    )
    print("                             dL/dt of step 1   the formula   e^t at the end")
    u, rows = F.normalize(torch.randn(6, 4, dtype=F64), dim=1), {}
    v = F.normalize(u + torch.randn_like(u), dim=1)
    formula = scale_gradient(u, v, torch.tensor(110.0, dtype=F64).log()).item()
    for name in ("in forward", "after the step"):
        t = torch.tensor(110.0, dtype=F64).log().requires_grad_()
        optimizer, slopes = torch.optim.SGD([t], lr=0.02), []
        for _ in range(steps):
            loss = clip_loss(u, v, t.clamp(max=MAX_SCALE) if name == "in forward" else t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            slopes.append(t.grad.item())
            if name == "after the step":
                with torch.no_grad():
                    t.clamp_(max=MAX_SCALE)
        rows[name] = slopes[0], t.exp().item()
        print(f"   clamped {name:<17} {slopes[0]:15.4f}   {formula:11.4f}   {rows[name][1]:14.2f}")
    assert abs(rows["after the step"][0] - formula) < 1e-12
    stuck = [name for name, (slope, _) in rows.items() if slope == 0]
    print(f"   -> clamped {' or '.join(stuck) or 'either way'} the scale has no gradient: it stays")
    return rows


# --- pictures ----------------------------------------------------------------------------------


def matrix_picture(model, facts, cell=56, left=270):
    """(H, W, 3) uint8: cosines of captions, one a row, and images, one a column: 1 is white."""
    images = draw_images(facts)
    s, n = similarities(model, images, facts).T.tolist(), len(facts)  # row: caption
    picture = Image.new("RGB", (left + n * cell, 24 + (n + 1) * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    words = "cosine of caption and image: black is -1, white is 1; own pairs on the diagonal"
    pen.text((4, 4), words, "black", font)
    pixels = (images.cpu().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    for i in range(n):
        image = Image.fromarray(pixels[i]).resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
        picture.paste(image, (left + i * cell, 24))
        top = 24 + (i + 1) * cell
        pen.text((4, top + 18), " ".join(caption(*facts[i].tolist())), "black", font)
        for j, cosine in enumerate(s[i]):
            grey, x = round(255 * (cosine + 1) / 2), left + j * cell
            pen.rectangle((x, top, x + cell - 2, top + cell - 2), (grey, grey, grey))
            ink = "black" if grey > 127 else "white"
            pen.text((x + cell / 2, top + cell / 2), f"{cosine:.2f}", ink, font, anchor="mm")
    return np.asarray(picture)


# --- images and captions -----------------------------------------------------------------------


def all_facts():
    """(288, 4): size, colour, shape, place of every possible image, by number."""
    return torch.cartesian_prod(*(torch.arange(len(a)) for a in (SIZES, COLOURS, SHAPES, PLACES)))


def unseen(facts):
    """Whether the pairing of colour and shape is kept for the test: each of both once."""
    return (facts[:, 1] + facts[:, 2]) % 6 == 0


def hide(facts):
    """Facts (B, 4) with size and place each left out, as -1, of two in five."""
    hidden = torch.rand(len(facts), 4, device=facts.device) < 0.4
    hidden[:, 1:3] = False  # colour and shape are always said
    return facts.masked_fill(hidden, -1)


def draw_images(facts):
    """Facts (B, 4) -> images (B, 3, 24, 24): one shape on dark ground, with noise."""
    B, device = len(facts), facts.device
    size, colour, shape, place = facts.T
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
    noise = 0.05 * torch.randn(B, 3, SIDE, SIDE, device=device)
    return torch.where(mask, paint.view(B, 3, 1, 1), ground) + noise


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


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, steps=700, batch=128, copies=10):
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday()}
    models, measured["training"] = show_training(seed, log_dir, steps, batch, device)
    measured["one"] = show_one(models["captions"], device)
    measured["zero_shot"] = show_zero_shot(models, copies, device)
    measured["ranks"], measured["clamp"] = show_ranks(), show_clamp()
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
