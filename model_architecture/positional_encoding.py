"""Attention without a mask does not see the order of its inputs: it has to be told their positions.

Shuffle the inputs of such an attention, and the outputs are the same, shuffled. There are three
usual ways to tell the positions. A sinusoidal or a learned encoding is one vector for each
position, added to the input there. RoPE (rotary position embedding) turns the query q and the key k
of a position instead, by angles that grow with it; the values v stay as they are.

    sinusoidal   PE(t)_2i = sin(t w_i),  PE(t)_2i+1 = cos(t w_i),  w_i = 10000^(-2i / d)
    learned      PE(t) = row t of a table, which is trained like a weight
    RoPE         R_t turns pair i by the angle t w_i:   (R_m q) . (R_n k) = q . (R_(n-m) k)

    t, m, n  positions, from 0     d  numbers per vector, even     i  number of a pair, from 0
    PE(t)    the vector of position t, d numbers     w_i  the angle that pair i turns per position

The score of RoPE depends on the offset n - m alone: to move both positions does not change it. The
product PE(m) . PE(n) depends on it alone too, but not once learned matrices stand between, as in
the score PE(m) . (W PE(n)). Past the trained length RoPE is best in the small task here. Large
language models with RoPE fail there, unless their positions are scaled down (Chen et al. 2023) or
the base 10000 is raised, mostly with some more training.

Needs          nn_linear.py, attention_mechanism.py
Checked here   order lost and seen; plain = complete; which scores know the offset alone; accuracy
               past the length of the training texts
TensorBoard    val/accuracy by length of text, a run for each encoding: all but 'none' begin at 1;
               sinusoidal falls fastest, and learned has one point, as its table ends there
Try            in show_everyday, write (plain_rope(z), z) for (plain_rope(z), plain_rope(z)): does
               RoPE still tell the sentences apart if only q is turned?
Answer         No: its numbers become the same for both. A key that is not turned says no position
Source         Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Su et al. 2021 (RoPE),
               arXiv:2104.09864, eq. 14-16, 34; Chen et al. 2023, arXiv:2306.15595
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

import torch
import torch.nn.functional as F
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
    """q or k (..., T, d), each row turned by its position; the pairs are (i, i + d / 2)."""
    T, d = x.shape[-2:]
    t, i = torch.arange(T, device=x.device)[:, None], torch.arange(d // 2, device=x.device)
    a = t * 10000.0 ** (-2 * i / d)  # (T, d / 2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * a.cos() - x2 * a.sin(), x1 * a.sin() + x2 * a.cos()], dim=-1)


def attend(q, k, v):
    return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v


def show_everyday():
    print("1. In everyday code: does attention see who bites whom? Its output at 'bites',")
    print("   4 numbers            dog bites man             man bites dog")
    x = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]])
    dog_first, man_first = x, x.flip(0)  # dog, bites, man, one vector each; and the other way round
    found, table = {}, nn.Embedding(3, 4).weight  # a learned table, as it starts: random
    for name in ("no positions", "sinusoidal", "learned (random)", "RoPE"):
        found[name] = []
        for z in (dog_first, man_first):
            if name == "sinusoidal":
                z = z + plain_sinusoidal(3, 4)
            elif name == "learned (random)":
                z = z + table.detach()
            q, k = (plain_rope(z), plain_rope(z)) if name == "RoPE" else (z, z)
            found[name].append(attend(q, k, z)[1])
        shown = ["  ".join(f"{number:5.2f}" for number in y.tolist()) for y in found[name]]
        print(f"   {name:<16}   {shown[0]}    {shown[1]}")
    blind = [name for name, (y, z) in found.items() if torch.allclose(y, z)]
    print(f"   -> the same numbers for both sentences with: {', '.join(blind)}")
    return found


# --- 2. complete, and in a head ----------------------------------------------------------------


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


class Echo(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), by one attention head with the encoding `kind`."""

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


def show_pairs(T=64, d=32):
    print(
        "2. Do the short functions agree with the complete ones? And may weights made for one way"
    )
    print("   of pairing be used with the other?")
    print("   difference of                                                   largest")
    x, positions = torch.randn(T, d), torch.arange(T)
    half, neighbours = apply_rope(x, positions), apply_rope(x, positions, interleaved=True)
    order, a = to_half_split(d), angles(positions, d)
    turn = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(a), a)
    rows = {
        "section 1's sinusoidal and the complete one": plain_sinusoidal(T, d) - sinusoidal(T, d),
        "section 1's RoPE and apply_rope": plain_rope(x) - half,
        "apply_rope, interleaved, and complex numbers x e^(ia)":
            neighbours - torch.view_as_real(turn).flatten(-2),
        "pairs (i, i + d/2) and pairs (2i, 2i + 1)": half - neighbours,
        "the same, with the numbers of x put in order first":
            apply_rope(x[:, order], positions) - neighbours[:, order],
    }  # fmt: skip
    rows = {name: difference.abs().max().item() for name, difference in rows.items()}
    for name, largest in rows.items():
        print(f"   {name:<53}   {largest:12.6f}")
    mixed, ordered = list(rows.values())[3:]
    print(f"   -> the wrong pairing is off by up to {mixed:.1f};")
    print(f"      with the numbers of x put in order first, by {ordered:.6f}")
    print("      (i, i + d/2) is Hugging Face's LLaMA; (2i, 2i + 1) Meta's, and the paper")
    return rows


# --- 3. what a score knows ---------------------------------------------------------------------


def show_laws(T=64, d=32):
    print(
        f"3. Which scores depend on the offset n - m alone? {T} positions, d = {d}, one q and k for"
    )
    print("   all; W, random, stands for learned matrices. Largest change of a score")
    print("   score of positions m and n      both moved by one   m and n exchanged")
    PE, positions = sinusoidal(T, d, dtype=F64), torch.arange(T)
    q, k = torch.randn(2, d, dtype=F64)
    turned_q, turned_k = (apply_rope(z.expand(T, d), positions) for z in (q, k))
    W = torch.randn(d, d, dtype=F64) / math.sqrt(d)
    scores = {
        "PE(m) . PE(n)": PE @ PE.T,
        "RoPE: (R_m q) . (R_n k)": turned_q @ turned_k.T,
        "PE(m) . (W PE(n))": PE @ W.T @ PE.T,
    }
    largest = {}
    for name, s in scores.items():
        moved, exchanged = (s[1:, 1:] - s[:-1, :-1]).abs().max(), (s - s.T).abs().max()
        largest[name] = moved.item(), exchanged.item()
        print(f"   {name:<29}   {moved:17.6f}   {exchanged:17.6f}")
    offset = [name for name, (moved, _) in largest.items() if moved < 1e-10]
    print(f"   -> on n - m alone depend: {'; '.join(offset)}")
    sides = [name for name in offset if largest[name][1] > 1e-3]
    print(f"      of these know which of the two comes first: {'; '.join(sides)}")
    length = (turned_q.norm(dim=1) - q.norm()).abs().max()
    torch.testing.assert_close(length, torch.zeros_like(length), rtol=0, atol=1e-10)
    return largest


# --- 4. past the trained length ----------------------------------------------------------------


def echo_accuracy(model, V, T, back, start, stop=None, n=100):
    """On n texts of T tokens, at the positions from `start` on, or up to `stop`."""
    tokens = torch.randint(V, (n, T))
    with torch.no_grad():
        right = model(tokens).argmax(-1)[:, back:] == tokens[:, :-back]  # positions back, ...
    stop = T if stop is None else stop
    return right[:, max(0, start - back) : stop - back].double().mean().item()


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
    print(f"4. Does it go on past the trained length? Task: say the token {back} places back;")
    print(f"   trained on texts of {T} tokens. Accuracy; '{T + 1}-{last} of {last}': at the")
    print(
        f"   positions {T + 1} to {last} of texts of {last} tokens; 1 is the first (guess: {1 / V})"
    )
    heads = [f"{back + 1}-{T} of {T}", *(f"{T + 1}-{length} of {length}" for length in lengths[1:])]
    print(f"   {'':<12}" + "".join(f"{head:>16}" for head in [*heads, f"{back + 1}-{T} of {last}"]))
    table = {}
    for kind in tqdm(("none", "sinusoidal", "learned", "rope"), leave=False, disable=None):
        torch.manual_seed(seed)
        model = train_echo(kind, V, T, back, steps)
        with SummaryWriter(log_dir / "extrapolation" / kind, purge_step=0) as writer:
            for length in lengths if kind != "learned" else lengths[:1]:
                past = T if length > T else 0
                table[kind, length] = echo_accuracy(model, V, length, back, past)
                writer.add_scalar("val/accuracy", table[kind, length], length)
        if kind != "learned":
            table[kind, "old"] = echo_accuracy(model, V, last, back, 0, T)
        row = [table.get((kind, length)) for length in (*lengths, "old")]
        shown = [f"{'-' if accuracy is None else f'{accuracy:.3f}':>16}" for accuracy in row]
        tqdm.write(f"   {kind:<12}" + "".join(shown))
    try:
        LearnedPositions(T, 2)(last)
    except ValueError as error:
        print(f"   -: learned cannot read longer texts: {error}")
    guess = f"{table['none', T]:.3f}; a guess {1 / V:.3f}"
    print(f"   'none' knows which tokens occur, not where: {guess}")
    shown, loses = [], []
    for kind in ("rope", "sinusoidal"):
        old, past = table[kind, "old"], table[kind, last]
        shown.append(f"{kind} {old:.2f}, {past:.2f}")
        loses.append("the position" if past < old - 0.1 else "the length of the text")
    print(f"   -> texts of {last}, positions up to {T} and past it: {'; '.join(shown)}.")
    print(f"      rope loses by {loses[0]}, sinusoidal by {loses[1]}")
    return table


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, lengths=(32, 64, 128), steps=800):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "pairs": show_pairs(),
        "laws": show_laws(),
        "table": show_extrapolation(seed, log_dir, lengths, steps),
    }
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
