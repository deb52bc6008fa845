"""Trained to find their captions, images are told apart by words, in pairings they never had.

    s_ij = e^t u_i . v_j        image i and caption j of a batch, as unit vectors
    L = (CE of the rows of s, target i = j, + CE of its columns) / 2     InfoNCE both ways
    dL/dt                       the mean over all rows and columns of E_softmax[s] - s_ii
    zero-shot                   a class is the mean of its prompts' unit vectors: the nearest wins

e^t is 1 / temperature, learned from 1 / 0.07 on and at most 100: the parameter is clamped after
the step. Clamped in forward, it would have no gradient once it is above, and stay there.

Captions say size and place only sometimes: "a red triangle" may fit other images of its batch, yet
only its own counts as right, as in CLIP. Colours and shapes are seen in 30 of their 36 pairings;
the other 6 are for the test.

LLaVA keeps CLIP's image encoder, frozen, and hands the features of its patches, through a linear
layer, to a language model. SEED's tokenizer turns an image into discrete tokens in a causal order;
they are drawn to the caption by this loss and must let the image be rebuilt, and a language model
then reads and writes them.

Checked here   the loss against a double loop, dL/dt against its formula; three ways to share a
               batch among ranks; a clamp in forward and on the parameter; retrieval@1 both ways
               and zero-shot on unseen pairings by several prompts; all again with others' captions
TensorBoard    train/loss, logit_scale/exp, retrieval/image_to_text, text_to_image by step in
               captions, shuffled; similarity/matrix by step; images/retrieved: captions of unseen
               pairings and the six nearest of 1,728 images
Try            captions that always say all, hide = lambda facts: facts: which prompts stop naming
               even colours? The bare ones, of a form that the text encoder has never read
Source         Radford et al. 2021 (CLIP), arXiv:2103.00020, figure 3, sections 2.3, 2.5, 3.1.4;
               Liu et al. 2023 (LLaVA), arXiv:2304.08485, section 4.1; Ge et al. 2023 (SEED),
               arXiv:2307.08041, 2310.01218
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


# --- the loss ----------------------------------------------------------------------------------


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


def scale_gradient(u, v, log_scale):
    """dL/dt of clip_loss by t = log_scale, by the formula: a tensor ().

    The mean over all rows and columns of E_softmax[s] - s_ii. Exercise.
    """
    s = log_scale.exp() * u @ v.T
    rows, columns = ((s * s.softmax(dim)).sum(dim) - s.diagonal() for dim in (1, 0))
    return (rows + columns).mean() / 2


def rank_loss(u, v, log_scale, rank, ranks):
    """The part of rank: its own images among all texts, its own texts among all images.

    Of B / ranks pairs those from rank B / ranks on are its own; the mean of both cross-entropies,
    with s as in clip_loss. ValueError "a batch of B does not split evenly among n ranks": a mean
    over ranks would weigh parts wrongly. Exercise.
    """
    if len(u) % ranks:
        raise ValueError(f"a batch of {len(u)} does not split evenly among {ranks} ranks")
    n = len(u) // ranks
    own = torch.arange(rank * n, (rank + 1) * n, device=u.device)
    scale = log_scale.exp()
    return (F.cross_entropy(scale * u[own] @ v.T, own)
            + F.cross_entropy(scale * v[own] @ u.T, own)) / 2  # fmt: skip


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


# --- the two encoders --------------------------------------------------------------------------


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


# --- what it has learned -----------------------------------------------------------------------


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


def prompts(sizes, places):
    """What the prompts say, (n, 36, 4): every pairing, in each of the n = sizes x places ways."""
    ways = [torch.tensor(a) for a in (sizes, places, range(len(COLOURS)), range(len(SHAPES)))]
    said = torch.cartesian_prod(*ways)[:, [0, 2, 3, 1]]
    return said.view(-1, len(COLOURS) * len(SHAPES), 4)


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


# --- pictures ----------------------------------------------------------------------------------


def similarity_picture(model, facts, scale=6):
    """(1, H, W): u_i . v_j from -1, black, to 1, white; images down, captions across."""
    s = (similarities(model, draw_images(facts), facts).cpu() + 1) / 2
    return s.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[None]


def retrieved_picture(model, said, images, n=6, scale=2):
    """(H, W, 3) uint8: each caption over the n nearest of images (B, 3, 24, 24)."""
    nearest = similarities(model, images, said).topk(n, dim=0)[1].T  # (captions, n)
    side, line = scale * SIDE + 2, 14
    picture = Image.new("RGB", (n * side, len(said) * (side + line)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    pixels = (images.cpu().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    for row, (facts, order) in enumerate(zip(said.tolist(), nearest.tolist(), strict=True)):
        top = row * (side + line)
        pen.text((2, top), " ".join(caption(*facts)), "black", font)
        for column, i in enumerate(order):
            size = (side - 2, side - 2)
            image = Image.fromarray(pixels[i]).resize(size, Image.Resampling.NEAREST)
            picture.paste(image, (column * side, top + line))
    return np.asarray(picture)


# --- the sections ------------------------------------------------------------------------------


def unit_vectors(B, D):
    return F.normalize(torch.randn(B, D, dtype=F64), dim=1).requires_grad_()


def show_loss(B=8, D=5):
    print("1. the loss and a double loop: largest difference of loss, of gradients; dL/dt, formula")
    u, v = unit_vectors(B, D), unit_vectors(B, D)
    t = torch.tensor(1.3, dtype=F64, requires_grad=True)
    losses = clip_loss(u, v, t), loop_loss(u, v, t)
    grads = [torch.autograd.grad(loss, (u, v, t)) for loss in losses]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    formula = scale_gradient(u, v, t).item()
    assert abs(grads[0][2].item() - formula) < 1e-12
    off = max((a - b).abs().max().item() for a, b in zip(*grads, strict=True))
    print(f"   {(losses[0] - losses[1]).abs():.0e}   {off:.0e}   {grads[0][2]:.6f}   {formula:.6f}")


def show_ranks(B=12, D=5, ranks=3):
    print(
        f"2. {ranks} ranks of {B // ranks}: loss, and how far its gradient is off that of the whole"
    )
    u, v, t = unit_vectors(B, D), unit_vectors(B, D), torch.tensor(1.3, dtype=F64)
    whole = clip_loss(u, v, t)
    (true,) = torch.autograd.grad(whole, u)
    n, rows = B // ranks, {}
    own = [torch.zeros(B, 1, dtype=torch.bool).index_fill(0, torch.arange(r * n, (r + 1) * n), True)
           for r in range(ranks)]  # fmt: skip

    def gathered(r):
        """What rank r has of u and v: its own part with a gradient, the others' without."""
        return (torch.where(own[r], x, x.detach()) for x in (u, v))

    takes = {
        "own part, gradients return": [rank_loss(u, v, t, r, ranks) for r in range(ranks)],
        "own part, others detached": [rank_loss(*gathered(r), t, r, ranks) for r in range(ranks)],
        "whole, others detached": [clip_loss(*gathered(r), t) for r in range(ranks)],
    }
    for name, losses in takes.items():
        # ranks average their gradients: right for parts; of the whole, u gets 1 / ranks of its own
        total = sum(losses) if name.startswith("whole") else sum(losses) / ranks
        (grad,) = torch.autograd.grad(total, u, retain_graph=True)
        rows[name] = (sum(losses) / ranks).item(), ((grad - true).norm() / true.norm()).item()
        print(f"   {name:<28} {rows[name][0]:.6f}   {rows[name][1]:.3f}")
    print(f"   {'one process':<28} {whole:.6f}")
    assert max(abs(loss - whole.item()) for loss, _ in rows.values()) < 1e-12
    return rows


def show_clamp(steps=50):
    print(f"3. e^t = 110, over its limit, where less is better: dL/dt, e^t after {steps} steps")
    u, rows = unit_vectors(6, 4).detach(), {}
    v = F.normalize(u + torch.randn_like(u), dim=1)
    for name in ("in forward", "parameter"):
        t = torch.tensor(math.log(110.0), dtype=F64, requires_grad=True)
        optimizer, slopes = torch.optim.SGD([t], lr=0.02), []
        for _ in range(steps):
            loss = clip_loss(u, v, t.clamp(max=MAX_SCALE) if name == "in forward" else t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            slopes.append(t.grad.item())
            if name == "parameter":
                with torch.no_grad():
                    t.clamp_(max=MAX_SCALE)
        rows[name] = slopes[0], t.exp().item()
        print(f"   clamped {name:<10}   {slopes[0]:8.4f}   {rows[name][1]:6.2f}")
    return rows


def train_clip(facts, steps, batch, seed, device, writer, shuffled=False):
    """CLIP after `steps` batches of facts (N, 4); shuffled: each image with another's caption."""
    torch.manual_seed(seed)
    model, facts = CLIP().to(device), facts.to(device)
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
        model.clamp()
        writer.add_scalar("train/loss", loss.item(), step)
        writer.add_scalar("logit_scale/exp", model.log_scale.exp().item(), step)
        if step % max(1, steps // 6) == 0:
            to_text, to_image = retrieval(model, facts)
            writer.add_scalar("retrieval/image_to_text", to_text, step)
            writer.add_scalar("retrieval/text_to_image", to_image, step)
            writer.add_image("similarity/matrix", similarity_picture(model, facts[::5]), step)
    return model


def show_training(seed, log_dir, steps, batch, copies, device):
    facts = all_facts().to(device)
    new, seen = facts[unseen(facts)], facts[~unseen(facts)]
    print(f"4. {steps} steps of {batch}; retrieval among {len(seen)}, 36 classes by prompts: "
          "pairing, colour, shape")  # fmt: skip
    rows = {}
    for name in ("captions", "shuffled"):
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            model = train_clip(seen, steps, batch, seed, device, writer, name == "shuffled")
            row = rows[name] = {
                "retrieval": retrieval(model, seen),
                "scale": model.log_scale.exp().item(),
                "unseen": zero_shot(model, new.repeat(copies, 1)),
                "seen": zero_shot(model, seen.repeat(copies, 1)),
            }
            picture = retrieved_picture(model, new[::7], draw_images(facts.repeat(6, 1)))
            writer.add_image("images/retrieved", picture, 0, dataformats="HWC")
        both = "{:.3f} to text, {:.3f} to image".format(*row["retrieval"])
        print(f"   {name}: retrieval@1 {both}   e^t {row['scale']:.1f}")
        for part in ("unseen", "seen"):
            for kind, shares in row[part].items():
                print(f"      {part:<6} {kind:<8}   " + "   ".join(f"{x:.3f}" for x in shares))
    print(f"   chance: retrieval {1 / len(seen):.3f}   pairing {1 / 36:.3f}   others {1 / 6:.3f}")
    return rows


def main(seed=0, log_dir=LOG_DIR, steps=800, batch=128, copies=10):
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    show_loss()
    return {
        "ranks": show_ranks(),
        "clamp": show_clamp(),
        "training": show_training(seed, log_dir, steps, batch, copies, device),
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
    torch.set_num_threads(1)  # networks this small are hardly faster on two
    guard(main)
