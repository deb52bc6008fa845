"""RoPE turns q and k by their positions, of which their score then knows the distance alone.

    sinusoidal   PE(t)_2i = sin(t w_i), PE(t)_2i+1 = cos(t w_i),  w_i = base^(-2i / d)    added to x
    learned      row t of a table                                                         added to x
    RoPE         pair i of q and k turned by the angle t w_i:  (R_m q) . (R_n k) = q . R_(n-m) k

Without any of them, and without a mask, attention is permutation-equivariant: shuffle the inputs,
and the outputs are shuffled. A sinusoidal PE(t + k) is PE(t), each pair turned by k w_i, and
PE(t) . PE(t + k) depends on |k| alone; but behind W_q and W_k the score does not. A pair is two
neighbours in Su et al. and in Meta's LLaMA ("interleaved"), and i and i + d / 2 in its Hugging Face
weights ("half-split"), whose rows of q and k are permuted, and from which LLaVA starts. Weights for
the one are wrong for the other.

Checked here   equivariance; the shift is a rotation; scores by distance; norms; both pairings under
               the permutation; decoding with the right and with a forgotten offset; a task of
               relative position within the length trained on, and past it, where a table ends
TensorBoard    encoding/scores: heat maps over two positions in sinusoidal, rope, projected (what
               W_q, W_k make of the first); val/accuracy by length in extrapolation/none,
               sinusoidal, learned, rope
Try            apply_rope(x, positions + 1000) in float64: which scores change? None. In float32?
               By some 1e-4, for t w_i itself is rounded, and more the larger t is
Source         Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Devlin et al. 2019 (BERT),
               arXiv:1810.04805; Su et al. 2021 (RoPE), arXiv:2104.09864, eq. 14-16, 34
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
TIGHT = {"rtol": 0, "atol": 1e-10}


# --- encodings ---------------------------------------------------------------------------------


def angles(positions, d, base=10000.0, dtype=torch.float32):
    """t w_i (…, d / 2) for positions t (…,), whole or not: w_i = base^(-2 i / d), in `dtype`.

    ValueError "positions are encoded in pairs: d must be even, not …". Exercise.
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
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, T):
        """The first T rows of the table; ValueError "the table has n positions, the input T".

        Exercise.
        """
        length = self.table.num_embeddings
        if length < T:
            raise ValueError(f"the table has {length} positions, the input {T}")
        return self.table.weight[:T]


def rotate(x, a, interleaved):
    """Each pair of x (…, d) turned by its angle a (…, d / 2): (x1 cos - x2 sin, x1 sin + x2 cos).

    Pairs are the neighbours (0, 1), (2, 3) … if interleaved, else (i, i + d / 2). Exercise.
    """
    cos, sin = a.cos(), a.sin()
    if interleaved:
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).flatten(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def apply_rope(x, positions, base=10000.0, interleaved=False):
    """x (…, T, d) with each vector turned by its position: (T,), or (B, T) for x (B, …, T, d).

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
    """The order of d numbers that takes interleaved pairs to half-split ones: 0, 2, … 1, 3, …

    Exercise.
    """
    return torch.arange(d).view(-1, 2).T.flatten()


# --- the laws ----------------------------------------------------------------------------------


def attend(q, k, v):
    return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v


def show_order(T=7, d=8):
    print("1. attention on shuffled inputs, against the shuffled outputs: largest difference")
    x, order = torch.randn(T, d, dtype=F64), torch.randperm(T)
    W = torch.randn(3, d, d, dtype=F64) / math.sqrt(d)
    encodings = {"none": 0, "sinusoidal": sinusoidal(T, d, dtype=F64)}
    off = {}
    for name, encoding in encodings.items():
        plain, shuffled = (attend(*(z @ W)) for z in (x + encoding, x[order] + encoding))
        off[name] = (plain[order] - shuffled).abs().max().item()
        print(f"   {name:<10} {off[name]:.0e}")
    assert off["none"] < 1e-12
    return off


def show_laws(T=64, d=32):
    print(f"2. laws for T = {T}, d = {d}: largest differences")
    PE, k = sinusoidal(T, d, dtype=F64), 5
    turn = angles(torch.full((T - k,), -k), d, dtype=F64)  # (sin, cos) turns the other way round
    off = {"sinusoidal: shift by 5 = rotation": PE[k:] - rotate(PE[:-k], turn, True)}
    q, k, positions = *torch.randn(2, d, dtype=F64), torch.arange(T)
    turned_q, turned_k = (apply_rope(z.expand(T, d), positions) for z in (q, k))
    scores = turned_q @ turned_k.T  # (T, T), the same q and k everywhere
    off["RoPE: score by distance alone"] = scores[1:, 1:] - scores[:-1, :-1]
    off["RoPE: norm kept"] = turned_q.norm(dim=1) - q.norm()
    x, order = torch.randn(T, d, dtype=F64), to_half_split(d)
    half, neighbours = (
        apply_rope(x[:, order], positions),
        apply_rope(x, positions, interleaved=True),
    )
    off["RoPE: pairings, permuted"] = half - neighbours[:, order]
    for name, difference in off.items():
        torch.testing.assert_close(difference, torch.zeros_like(difference), **TIGHT)
        print(f"   {name:<34} {difference.abs().max():.0e}")
    mixed = (apply_rope(x, positions) - neighbours).abs().max().item()
    W = torch.randn(d, d, dtype=F64) / math.sqrt(d)
    projected = PE @ W @ PE.T
    spread = (projected[1:, 1:] - projected[:-1, :-1]).abs().max().item()
    assert mixed > 1 and scores[0].std() > 0.1  # a rotation that does nothing would keep all laws
    print(f"   RoPE: pairings, not permuted       {mixed:.1f}")
    print(f"   sinusoidal behind W: one distance  {spread:.1f}")
    return {"mixed": mixed, "spread": spread}, {
        "sinusoidal": PE @ PE.T, "rope": scores, "projected": projected
    }  # fmt: skip


def show_maps(log_dir, maps):
    """Heat maps (T, T) of scores, blue low, red high, four pixels a position."""
    for name, scores in maps.items():
        s = ((scores - scores.min()) / (scores.max() - scores.min())).float()
        s = s.repeat_interleave(4, 0).repeat_interleave(4, 1)
        picture = torch.stack([s, 0.9 - 1.6 * (s - 0.5).abs(), 1 - s]).clamp(0, 1)
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            writer.add_image("encoding/scores", picture, 0)


def show_decoding(T=10, d=16):
    print("3. token by token with turned keys kept, against the full pass: largest difference")
    q, k, v = torch.randn(3, T, d, dtype=F64)
    positions = torch.arange(T)
    causal = torch.ones(T, T).triu(1).bool()
    scores = apply_rope(q, positions) @ apply_rope(k, positions).T / math.sqrt(d)
    full = scores.masked_fill(causal, -math.inf).softmax(-1) @ v
    off = {}
    for name, offset in (("right", 1), ("forgotten", 0)):  # forgotten: each token is at position 0
        keys, outputs = [], []
        for t in range(T):
            now = torch.tensor([t * offset])
            keys.append(apply_rope(k[t : t + 1], now))
            outputs.append(attend(apply_rope(q[t : t + 1], now), torch.cat(keys), v[: t + 1]))
        off[name] = (torch.cat(outputs) - full).abs().max().item()
        print(f"   {name:<9} offset {off[name]:.0e}")
    assert off["right"] < 1e-12 and off["forgotten"] > 0.1
    return off


# --- a task of relative position ---------------------------------------------------------------


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
            q, k = apply_rope(q, positions), apply_rope(k, positions)
        return self.head(attend(q, k, v))


def echo_accuracy(model, V, T, back, start, n=100):
    """On texts of T tokens, at the positions from `start` on."""
    tokens = torch.randint(V, (n, T))
    with torch.no_grad():
        right = model(tokens).argmax(-1)[:, back:] == tokens[:, :-back]
    return right[:, max(0, start - back) :].double().mean().item()


def lengthen(model, T):
    """A copy of the learned table's network with T rows: those learned, and new ones behind."""
    longer = Echo("learned", model.head.out_features, T, model.head.in_features)
    state, rows = model.state_dict(), longer.positions.table.weight.detach().clone()
    learned = state["positions.table.weight"]
    rows[: len(learned)] = learned
    longer.load_state_dict(state | {"positions.table.weight": rows})
    return longer


def show_extrapolation(seed, log_dir, lengths, steps, V=8, back=2):
    T = lengths[0]
    print(f"4. the token {back} places back, trained at T = {T}: accuracy at the positions of {T}, "
          f"and past them; chance {1 / V}")  # fmt: skip
    table = {}
    for kind in tqdm(("none", "sinusoidal", "learned", "rope"), leave=False, disable=None):
        torch.manual_seed(seed)
        model = Echo(kind, V, T)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            tokens = torch.randint(V, (32, T))
            logits = model(tokens)[:, back:]  # (B, T - back, V)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, :-back].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with SummaryWriter(log_dir / "extrapolation" / kind, purge_step=0) as writer:
            for length in lengths:
                longer = lengthen(model, length) if kind == "learned" and length > T else model
                past = T if length > T else 0
                table[kind, length] = echo_accuracy(longer, V, length, back, past)
                writer.add_scalar("val/accuracy", table[kind, length], length)
        shown = "   ".join(f"{length} {table[kind, length]:.3f}" for length in lengths)
        tqdm.write(f"   {kind:<10}   {shown}" + "   (new rows)" * (kind == "learned"))
    return table


def main(seed=0, log_dir=LOG_DIR, lengths=(32, 64, 128), steps=800):
    torch.manual_seed(seed)
    order = show_order()
    laws, maps = show_laws()
    show_maps(log_dir, maps)
    return {
        "order": order,
        "laws": laws,
        "decoding": show_decoding(),
        "table": show_extrapolation(seed, log_dir, lengths, steps),
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
