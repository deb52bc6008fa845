"""Attention alone does not see the order of its inputs: it has to be told their positions.

Shuffle the inputs of attention without a mask, and the outputs are the same, shuffled. There are
three usual ways to tell the positions. A sinusoidal or a learned encoding is one vector for each
position, added to the input there. RoPE (rotary position embedding) turns the query q and the key k
of a position instead, by angles that grow with it; the values v stay as they are.

    sinusoidal   PE(t)_2i = sin(t w_i),  PE(t)_2i+1 = cos(t w_i),  w_i = 10000^(-2i / d)
    learned      PE(t) = row t of a table, which is trained like a weight
    RoPE         R_t turns pair i by the angle t w_i:   (R_m q) . (R_n k) = q . (R_(n-m) k)

    t, m, n  positions, from 0     d  numbers per vector, even     i  number of a pair, from 0

The score of RoPE knows the offset n - m alone. PE(m) . PE(n) knows |n - m| alone, but no longer
when learned matrices have made q and k of it. A pair is two neighbours ("interleaved") in the paper
and in Meta's LLaMA, and i with i + d / 2 ("half-split") in its Hugging Face weights, whose rows are
permuted for it: weights for the one are wrong for the other.

Needs          nn_linear.py, attention_mechanism.py
Checked here   order lost and seen; plain = complete; the laws of both encodings; decoding with the
               right and with a forgotten position; accuracy past the length of the training texts
TensorBoard    encoding/scores in the runs sinusoidal, rope: one colour along each diagonal; in
               projected: not; val/accuracy by length of text in extrapolation/<encoding>
Try            in show_laws, write positions = torch.arange(T) + 1000: which rows of the first
               table leave 0?
Answer         none: RoPE's scores know the offset alone, wherever the text starts
Source         Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Su et al. 2021 (RoPE),
               arXiv:2104.09864, eq. 14-16, 34; Devlin et al. 2019 (a table), arXiv:1810.04805
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

TOPIC = "model_architecture"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "positional_encoding"
F64 = torch.float64


# --- 1. in everyday code -----------------------------------------------------------------------


def plain_sinusoidal(T, d):
    t, i = torch.arange(T)[:, None], torch.arange(d // 2)
    a = t * 10000.0 ** (-2 * i / d)  # angles (T, d / 2)
    return torch.stack([a.sin(), a.cos()], dim=-1).flatten(1)  # sin, cos, sin, cos ...: (T, d)


def plain_rope(x):
    """q or k (T, d), each row turned by its position; the pairs are (i, i + d / 2)."""
    T, d = x.shape
    a = torch.arange(T)[:, None] * 10000.0 ** (-2 * torch.arange(d // 2) / d)  # (T, d / 2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * a.cos() - x2 * a.sin(), x1 * a.sin() + x2 * a.cos()], dim=-1)


def attend(q, k, v):
    return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v


def show_everyday():
    print("1. In everyday code: does attention see who bites whom? Its output at the word 'bites'")
    print("                  dog bites man             man bites dog")
    x = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 2.0, 0.0]])
    dog_first, man_first = x, x.flip(0)  # dog, bites, man, one vector each; and the other way round
    found = {}
    for name in ("no positions", "sinusoidal", "RoPE"):
        found[name] = []
        for z in (dog_first, man_first):
            if name == "sinusoidal":
                z = z + plain_sinusoidal(3, 4)
            q, k = (plain_rope(z), plain_rope(z)) if name == "RoPE" else (z, z)
            found[name].append(attend(q, k, z)[1])
        shown = ["  ".join(f"{number:5.2f}" for number in y.tolist()) for y in found[name]]
        print(f"   {name:<12}   {shown[0]}    {shown[1]}")
    blind = [name for name, (y, z) in found.items() if torch.allclose(y, z)]
    print(f"   -> the same numbers for both sentences with: {', '.join(blind)}")
    return found


# --- 2. the encodings, complete ----------------------------------------------------------------


def angles(positions, d, base=10000.0, dtype=torch.float32):
    """t w_i (..., d / 2) for positions t (...,), whole or not: w_i = base^(-2 i / d), in `dtype`.

    ValueError "positions are encoded in pairs: d must be even, not ...". Exercise.
    """
    if d % 2:
        raise ValueError(f"positions are encoded in pairs: d must be even, not {d}")
    i = torch.arange(d // 2, device=positions.device, dtype=dtype)
    return positions.to(dtype)[..., None] * base ** (-2 * i / d)


def sinusoidal(T, d, base=10000.0, dtype=torch.float32, device=None):
    """PE (T, d): sin(t w_i) at the even places 2 i, cos(t w_i) at the odd ones 2 i + 1.

    By angles, in float32 at least, and only then in `dtype`. Exercise.
    """
    wide = torch.promote_types(dtype, torch.float32)
    a = angles(torch.arange(T, device=device), d, base, wide)  # (T, d / 2)
    return torch.stack([a.sin(), a.cos()], dim=-1).flatten(-2).to(dtype)


class LearnedPositions(nn.Module):
    """A table (length, d); forward(T) gives its first T rows, and ValueError past its end."""

    def __init__(self, length, d):
        super().__init__()
        self.table = nn.Embedding(length, d)
        nn.init.normal_(self.table.weight, std=0.02)  # as BERT's

    def forward(self, T):
        """The first T rows of the table; ValueError "the table has n positions, the input T".

        Exercise.
        """
        length = self.table.num_embeddings
        if length < T:
            raise ValueError(f"the table has {length} positions, the input {T}")
        return self.table.weight[:T]


def rotate(x, a, interleaved):
    """Each pair of x (..., d) turned by its angle of a (..., d / 2).

    The pair (x1, x2) becomes (x1 cos a - x2 sin a, x1 sin a + x2 cos a).
    Pairs are the neighbours (0, 1), (2, 3) ... if interleaved, else (i, i + d / 2). Exercise.
    """
    cos, sin = a.cos(), a.sin()
    if interleaved:
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).flatten(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def apply_rope(x, positions, base=10000.0, interleaved=False):
    """x (..., T, d) with each vector turned by its position: (T,), or (B, T) for x (B, ..., T, d).

    Half-split pairs (i, i + d / 2), or neighbours if interleaved. Angles are float32 at least, so
    that half precision is right far out; the result has the type of x. ValueError "positions
    (shape) do not fit x (shape)" for another number of axes, or sizes that differ (B = 1 serves
    all). Exercise.
    """
    if positions.shape[-1:] != x.shape[-2:-1] or positions.dim() > min(2, x.dim() - 1):
        raise ValueError(f"positions {tuple(positions.shape)} do not fit x {tuple(x.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    a = angles(positions, x.size(-1), base, wide)  # (T, d / 2) or (B, T, d / 2)
    if positions.dim() == 2:
        if len(positions) not in (1, len(x)):
            raise ValueError(f"positions {tuple(positions.shape)} do not fit x {tuple(x.shape)}")
        a = a.view(len(a), *[1] * (x.dim() - 3), *a.shape[1:])
    return rotate(x.to(wide), a, interleaved).to(x.dtype)


def to_half_split(d):
    """The order of d numbers that takes interleaved pairs to half-split ones: 0, 2, ... 1, 3, ...

    Exercise.
    """
    return torch.arange(d).view(-1, 2).T.flatten()


def show_order(T=7, d=8):
    print(
        f"2. Is order lost for random inputs, too? {T} inputs in another order, with their outputs"
    )
    print("   brought back, minus outputs of the old order: largest difference")
    x, order = torch.randn(T, d, dtype=F64), torch.randperm(T)
    while torch.equal(order, torch.arange(T)):  # not the old order itself
        order = torch.randperm(T)
    W_q, W_k, W_v = torch.randn(3, d, d, dtype=F64) / math.sqrt(d)
    learned = LearnedPositions(T, d)(T).detach().double() / 0.02  # as large as the inputs
    positions, off = torch.arange(T), {}
    for name, encoding in (
        ("no positions", torch.zeros(T, d, dtype=F64)),
        ("sinusoidal", sinusoidal(T, d, dtype=F64)),
        ("learned", learned),
        ("RoPE", torch.zeros(T, d, dtype=F64)),
    ):
        outputs = []
        for z in (x + encoding, x[order] + encoding):
            q, k, v = z @ W_q, z @ W_k, z @ W_v
            if name == "RoPE":
                q, k = apply_rope(q, positions), apply_rope(k, positions)  # not v
            outputs.append(attend(q, k, v))
        off[name] = (outputs[0][order] - outputs[1]).abs().max().item()
        print(f"   {name:<12}   {off[name]:.0e}")
    lost = [name for name, difference in off.items() if difference < 1e-12]
    print(f"   -> order is lost with: {', '.join(lost)}")
    return off


# --- 3. the laws -------------------------------------------------------------------------------


def show_laws(T=64, d=32):
    positions = torch.arange(T)
    order = to_half_split(d)
    PE, shift = sinusoidal(T, d, dtype=F64), 5
    q, k, x = torch.randn(d, dtype=F64), torch.randn(d, dtype=F64), torch.randn(T, d, dtype=F64)
    turned_q, turned_k = (apply_rope(z.expand(T, d), positions) for z in (q, k))
    scores, products = turned_q @ turned_k.T, PE @ PE.T  # (T, T), the same q and k everywhere
    half, neighbours = apply_rope(x, positions), apply_rope(x, positions, interleaved=True)
    back = angles(torch.full((T - shift,), -shift), d, dtype=F64)  # (sin, cos) turns backwards
    start = apply_rope(x.float(), torch.arange(T))
    zero = {
        "plain sinusoidal minus complete": plain_sinusoidal(T, d) - PE.float(),
        "plain RoPE minus complete": plain_rope(x.float()) - start,
        "PE(t + 5) minus PE(t), pair i turned by -5 w_i":
            PE[shift:] - rotate(PE[:-shift], back, True),
        "PE(m) . PE(n) minus PE(m+1) . PE(n+1)": products[1:, 1:] - products[:-1, :-1],
        "RoPE: score at (m, n) minus at (m+1, n+1)": scores[1:, 1:] - scores[:-1, :-1],
        "RoPE: length of q turned minus of q": turned_q.norm(dim=1) - q.norm(),
        "RoPE: half-split of the permuted minus neighbours":
            apply_rope(x[:, order], positions) - neighbours[:, order],
    }  # fmt: skip
    W = torch.randn(d, d, dtype=F64) / math.sqrt(d)
    projected = PE @ W @ PE.T
    other = {
        "RoPE: q turned minus q": turned_q - q,
        "RoPE: score at (m, n) minus at (n, m)": scores - scores.T,
        "RoPE: half-split minus neighbours, not permuted": half - neighbours,
        "PE(m) W PE(n) minus PE(m+1) W PE(n+1), W random": projected[1:, 1:] - projected[:-1, :-1],
    }
    print(f"3. What do the scores know? {T} positions, d = {d}")
    print("   must be 0 (rounding: 1e-5 for plain, 1e-10 for others)   largest difference")
    for name, difference in zero.items():
        tolerance = 1e-5 if name.startswith("plain") else 1e-10
        torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=tolerance)
        print(f"   {name:<54}   {difference.abs().max():18.0e}")
    print("   must not be 0                                            largest difference")
    for name, difference in other.items():
        print(f"   {name:<54}   {difference.abs().max():18.2f}")
    by_offset, loose = (s[1:, 1:] - s[:-1, :-1] for s in (scores, projected))
    print(f"   -> along a diagonal RoPE's score changes by {by_offset.abs().max():.0e}, that of "
          f"PE behind a matrix by {loose.abs().max():.1f}")  # fmt: skip
    maps = {"sinusoidal": products, "rope": scores, "projected": projected}
    largest = {name: values.abs().max().item() for name, values in (zero | other).items()}
    return largest, maps


# --- 4. RoPE while a text is written -----------------------------------------------------------


def show_decoding(T=10, d=16):
    print(f"4. Which position has a new token? {T} tokens, one at a time, old keys kept as turned,")
    print("   minus one pass over all (each token sees those before it): largest difference")
    q, k, v = torch.randn(3, T, d, dtype=F64)
    positions = torch.arange(T)
    later = torch.ones(T, T).triu(1).bool()
    scores = apply_rope(q, positions) @ apply_rope(k, positions).T / math.sqrt(d)
    full = scores.masked_fill(later, -math.inf).softmax(-1) @ v
    off = {}
    for name, step in (("its number in the text", 1), ("forgotten: always 0", 0)):
        keys, outputs = [], []
        for t in range(T):
            now = torch.tensor([t * step])
            keys.append(apply_rope(k[t : t + 1], now))
            outputs.append(attend(apply_rope(q[t : t + 1], now), torch.cat(keys), v[: t + 1]))
        off[name] = (torch.cat(outputs) - full).abs().max().item()
        print(f"   {name:<22}   {off[name]:.0e}")
    right = [name for name, difference in off.items() if difference < 1e-12]
    print(f"   -> the outputs of one pass come out with: {', '.join(right)}")
    return off


# --- 5. past the trained length ----------------------------------------------------------------


class Echo(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), by one attention layer with the encoding `kind`."""

    def __init__(self, kind, V, length, d=32):
        super().__init__()
        self.kind, self.tokens = kind, nn.Embedding(V, d)
        self.positions = LearnedPositions(length, d) if kind == "learned" else None
        self.qkv, self.head = nn.Linear(d, 3 * d), nn.Linear(d, V)

    def forward(self, tokens):
        T, x = tokens.size(1), self.tokens(tokens)  # (B, T, d)
        if self.kind == "sinusoidal":
            x = x + sinusoidal(T, x.size(-1), device=x.device)
        elif self.kind == "learned":
            x = x + self.positions(T)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.kind == "rope":
            positions = torch.arange(T, device=x.device)
            q, k = apply_rope(q, positions), apply_rope(k, positions)  # v stays as it is
        return self.head(attend(q, k, v))


def echo_accuracy(model, V, T, back, start, stop=None, n=100):
    """On n texts of T tokens, at the positions from `start` on, or up to `stop`."""
    tokens = torch.randint(V, (n, T))
    with torch.no_grad():
        right = model(tokens).argmax(-1)[:, back:] == tokens[:, :-back]  # positions back, ...
    stop = T if stop is None else stop
    return right[:, max(0, start - back) : stop - back].double().mean().item()


def lengthen(model, T):
    """A copy of the learned table's network with T rows: those learned, and new ones behind."""
    longer = Echo("learned", model.head.out_features, T, model.head.in_features)
    state, rows = model.state_dict(), longer.positions.table.weight.detach().clone()
    learned = state["positions.table.weight"]
    rows[: len(learned)] = learned
    longer.load_state_dict(state | {"positions.table.weight": rows})
    return longer


def train_echo(kind, V, T, back, steps):
    model = Echo(kind, V, T)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens = torch.randint(V, (32, T))
        logits = model(tokens)[:, back:]  # (B, T - back, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, :-back].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def show_extrapolation(seed, log_dir, lengths, steps, V=8, back=2):
    T, last = lengths[0], lengths[-1]
    print(f"5. Does it go on past the trained length? Task: say the token {back} places back;")
    print(f"   trained on texts of {T} tokens. Accuracy at positions (a guess: {1 / V})")
    heads = [f"1-{T} of {T}", *(f"{T + 1}-{length} of {length}" for length in lengths[1:])]
    print(f"   {'':<12}" + "".join(f"{head:>16}" for head in [*heads, f"1-{T} of {last}"]))
    table = {}
    for kind in tqdm(("none", "sinusoidal", "learned", "rope"), leave=False, disable=None):
        torch.manual_seed(seed)
        model = train_echo(kind, V, T, back, steps)
        with SummaryWriter(log_dir / "extrapolation" / kind, purge_step=0) as writer:
            for length in lengths:
                longer = lengthen(model, length) if kind == "learned" and length > T else model
                past = T if length > T else 0
                table[kind, length] = echo_accuracy(longer, V, length, back, past)
                writer.add_scalar("val/accuracy", table[kind, length], length)
        table[kind, "old"] = echo_accuracy(longer, V, last, back, 0, T)
        row = [table[kind, length] for length in (*lengths, "old")]
        tqdm.write(f"   {kind:<12}" + "".join(f"{accuracy:16.3f}" for accuracy in row))
    print(f"   learned: the {last - T} rows past {T} are new, never trained")
    (rope_old, rope), (sine_old, sine) = [
        (table[kind, "old"], table[kind, last]) for kind in ("rope", "sinusoidal")
    ]
    print(f"   -> in texts of {last}, up to position {T} and past it: RoPE {rope_old:.2f} and "
          f"{rope:.2f}, sinusoidal {sine_old:.2f} and {sine:.2f}")  # fmt: skip
    return table


# --- the lesson --------------------------------------------------------------------------------


def draw_scores(scores, words, size=5):
    """Scores (T, T) as squares, the least blue, the largest red, under two lines of words."""
    T = len(scores)
    s = ((scores - scores.min()) / (scores.max() - scores.min())).float()
    colours = torch.stack([s, 0.9 - 1.6 * (s - 0.5).abs(), 1 - s], dim=-1).clamp(0, 1)  # (T, T, 3)
    cells = Image.fromarray((colours * 255).round().byte().numpy())
    image = Image.new("RGB", (T * size, T * size + 36), "white")
    ImageDraw.Draw(image).text((4, 3), words, "black", ImageFont.load_default(13))
    image.paste(cells.resize((T * size, T * size), Image.Resampling.NEAREST), (0, 36))
    return np.asarray(image)


def log_maps(log_dir, maps):
    titles = {"sinusoidal": "PE(m) . PE(n)", "rope": "RoPE: score of one q and one k",
              "projected": "PE(m) W PE(n), W random"}  # fmt: skip
    for name, scores in maps.items():
        words = f"{titles[name]}; row m, column n\nblue: the least, red: the largest"
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            writer.add_image("encoding/scores", draw_scores(scores, words), 0, dataformats="HWC")


def main(seed=0, log_dir=LOG_DIR, lengths=(32, 64, 128), steps=800):
    torch.manual_seed(seed)
    everyday, order = show_everyday(), show_order()
    laws, maps = show_laws()
    measured = {
        "everyday": everyday,
        "order": order,
        "laws": laws,
        "maps": maps,
        "decoding": show_decoding(),
        "table": show_extrapolation(seed, log_dir, lengths, steps),
    }
    log_maps(log_dir, maps)
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
