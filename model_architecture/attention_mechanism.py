"""The output of attention is a mean of values, weighted by how well each key fits the query.

Attention lets one position of a sequence read from others. Learned matrices make three vectors of
each input: the query q (what it looks for), the key k (what it is found by) and the value v (what
it gives). In self-attention all come from one sequence, in cross-attention k and v come from
another. A mask says which keys a query may see: without one, a network that should predict the next
token could simply read it. Several heads are several attentions side by side, each with its own
weights.

    score    s_ij = q_i . k_j / sqrt(d)              how well key j fits query i
    weight   p_ij = exp(s_ij) / sum_l exp(s_il)      the softmax of row i of the scores
    output   y_i = sum_j p_ij v_j                    in code: softmax(q k^T / sqrt(d)) v

    T  number of positions     C  numbers per position     B  sequences (batch)     H  heads
    d  numbers per query and key, C / H     causal  query i sees the keys up to i alone

If the numbers of q and k are independent, of mean 0 and variance 1, then q . k has variance d: if a
large d is not divided out by sqrt(d), one key gets nearly all weight, whatever the scores do.

Needs          nn_linear.py, nn_loss.py
Checked here   plain = complete = torch.nn, with gradients and masks; what True in a mask means; no
               output depends on a later input; decoding with a cache; what sqrt(d) and memory do
TensorBoard    attention/lookup in lookup/attention: the framed cell, where the answer stands, is
               dark; attention/causality: white above the diagonal; train/loss by step: attention's
               falls to 0, mean's does not
Try            in show_everyday, write q = 10 * torch.tensor(...): which value comes out?
Answer         1, 10: the value of the first key, whose weight is 59049 / 59050 = 1.000
Source         Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Dao et al. 2022 (FlashAttention,
               one that never keeps all weights), arXiv:2205.14135
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
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TOPIC = "model_architecture"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "attention_mechanism"
F64 = torch.float64


# --- 1. in everyday code -----------------------------------------------------------------------


def attention(q, k, v):
    """Output (..., T_q, d_v) and weights (..., T_q, T_k): the formulas on top, without a mask.

    q (..., T_q, d), k (..., T_k, d), v (..., T_k, d_v). Exercise.
    """
    weights = (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1)  # k.mT: rows and columns swapped
    return weights @ v, weights


def show_everyday():
    print("1. In everyday code: one query reads from two keys; d = 4, so scores are q . k / 2.")
    print("   1.099 is log 3, so the weights are 3 : 1")
    q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    k = torch.tensor([[math.log(3), 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    v = torch.tensor([[1.0, 10.0], [5.0, 30.0]])
    y = F.scaled_dot_product_attention(q, k, v)  # the call; below, the two lines that it stands for
    by_hand, weights = attention(q, k, v)

    print(f"   the query is ({', '.join(f'{number:g}' for number in q[0].tolist())})")
    print("   key                         score   weight   value")
    for j in range(2):
        score, key = q[0] @ k[j] / 2, ", ".join(f"{number:.4g}" for number in k[j].tolist())
        print(f"   ({key})".ljust(28) + f"   {score:5.3f}    {weights[0, j]:5.3f}   "
              f"{v[j, 0]:5.3f} {v[j, 1]:6.3f}")  # fmt: skip
    print(f"   output by torch        {y[0, 0]:5.3f} {y[0, 1]:6.3f}")
    print(f"   output by attention    {by_hand[0, 0]:5.3f} {by_hand[0, 1]:6.3f}")
    print(f"   -> {weights[0, 0]:.3f} times the first value plus {weights[0, 1]:.3f} times the "
          f"second is {(weights @ v)[0, 0]:.3f} {(weights @ v)[0, 1]:.3f}")  # fmt: skip
    return y, weights


# --- 2. what attention does: looking up --------------------------------------------------------


class LookUp(nn.Module):
    """Items (key, value) and the key that is asked for -> logits of its value, by attention.

    With attend=False all scores are 0, so that the output is a plain mean of the values: it tells
    which values are there, but not whose they are.
    """

    def __init__(self, K, V, C=32, attend=True):
        super().__init__()
        self.attend, self.key, self.value = attend, nn.Embedding(K, C), nn.Embedding(V, C)
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.head = nn.Linear(C, V)

    def forward(self, keys, values, asked):
        """keys, values (B, T), asked (B,) -> logits (B, V), weights (B, T)"""
        items = self.key(keys) + self.value(values)  # (B, T, C)
        question = self.key(asked).unsqueeze(1)  # (B, 1, C)
        y, weights = attention(self.q(question) * self.attend, self.k(items), self.v(items))
        return self.head(y.squeeze(1)), weights.squeeze(1)


def questions(B, K, V):
    """Each key once, in random order, with random values; which is asked for; answer; its place."""
    keys, values = torch.rand(B, K).argsort(1), torch.randint(V, (B, K))
    rows, place = torch.arange(B), torch.randint(K, (B,))
    return (keys, values, keys[rows, place]), values[rows, place], place


def train_lookup(model, steps, writer, K, V):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in tqdm(range(steps), leave=False, disable=None):
        inputs, answer, _ = questions(128, K, V)
        loss = F.cross_entropy(model(*inputs)[0], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        writer.add_scalar("train/loss", loss.item(), step)


def show_lookup(seed, log_dir, steps, K=8, V=8, n=2000):
    print(f"2. What does attention do? It looks up: {K} items (key, value), one key is asked for")
    print(f"   after {steps} steps, {n} new questions   accuracy   weight at the answer's place")
    table = {}
    for name in ("attention", "mean"):
        torch.manual_seed(seed)
        model = LookUp(K, V, attend=name == "attention")
        with SummaryWriter(log_dir / "lookup" / name, purge_step=0) as writer:
            train_lookup(model, steps, writer, K, V)
            torch.manual_seed(seed + 1)  # the same questions for both
            inputs, answer, place = questions(n, K, V)
            with torch.no_grad():
                logits, weights = model(*inputs)
            right = (logits.argmax(1) == answer).double().mean().item()
            table[name] = right, weights[torch.arange(n), place].mean().item()
            words = f"{name}: weights, 0 white, 1 blue; a row is\na question, its answer is framed"
            cells = draw_cells(weights[:8], words, list(enumerate(place[:8].tolist())))
            writer.add_image("attention/lookup", cells, 0, dataformats="HWC")
    commonest = (inputs[1].mode(1).values == answer).double().mean().item()
    for words, (right, weight) in (("attention", table["attention"]),
                                   ("a plain mean of the values", table["mean"])):  # fmt: skip
        print(f"   {words:<36}   {right:8.3f}   {weight:28.3f}")
    print(f"   always the most frequent value         {commonest:8.3f}")
    print(f"   a random guess                         {1 / V:8.3f}   {1 / K:28.3f}")
    print(f"   -> attention answers {table['attention'][0]:.0%} of the questions, a plain mean "
          f"{table['mean'][0]:.0%}, the most frequent value {commonest:.0%}")  # fmt: skip
    return table | {"commonest": commonest}


# --- 3. heads and masks, complete --------------------------------------------------------------


def multi_head(x, W_q, W_k, W_v, W_o, H):
    """Self-attention with H heads: x (B, T, C) -> (B, T, C), by weights W (C, C) without biases.

    q = x W_q^T, so k, v. Head h takes the h-th C / H numbers of q, k and v; the outputs of the
    heads side by side go through W_o^T. Exercise.
    """
    q, k, v = x @ W_q.T, x @ W_k.T, x @ W_v.T  # (B, T, C) each
    heads = []
    for q_h, k_h, v_h in zip(q.chunk(H, -1), k.chunk(H, -1), v.chunk(H, -1), strict=True):
        heads.append(attention(q_h, k_h, v_h)[0])  # (B, T, C / H)
    return torch.cat(heads, -1) @ W_o.T


def attention_weights(q, k, mask=None, is_causal=False):
    """Weights (..., T_q, T_k) of q (..., T_q, d) over k (..., T_k, d): each row sums to 1, or is 0.

    softmax(q k^T / sqrt(d)), q divided before the product, so that half precision stays finite.
    mask is boolean (True: allowed) or floating (added); is_causal lets query i see keys 0 to i. A
    row in which nothing is allowed is 0. ValueError "q and k need one size d, not a and b"; "give a
    mask or is_causal, not both"; "mask (shape) does not fit scores (shape)" where it would not
    broadcast to them; "a mask is boolean or floating, not ...". Exercise.
    """
    if q.size(-1) != k.size(-1):
        raise ValueError(f"q and k need one size d, not {q.size(-1)} and {k.size(-1)}")
    scores = (q / math.sqrt(q.size(-1))) @ k.mT
    if is_causal:
        if mask is not None:
            raise ValueError("give a mask or is_causal, not both")
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores.softmax(-1)
    if torch.broadcast_shapes(mask.shape, scores.shape) != scores.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit scores {tuple(scores.shape)}")
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask.is_floating_point():
        scores = scores + mask.to(scores.dtype)
    else:
        raise ValueError(f"a mask is boolean or floating, not {mask.dtype}")
    nothing = (scores == -math.inf).all(-1, keepdim=True)  # softmax would give NaN
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def scaled_dot_product_attention(q, k, v, mask=None, is_causal=False):
    """attention_weights times v (..., T_k, d_v): (..., T_q, d_v)."""
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    return attention_weights(q, k, mask, is_causal) @ v


class MultiHeadAttention(nn.Module):
    """Multi-head attention on batch-first x (B, T, C); keys and values from elsewhere if given."""

    def __init__(self, embed_dim, num_heads, bias=True):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} does not split into {num_heads} heads")
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias) for _ in range(4)
        )

    def heads(self, x):
        """(B, T, C) -> (B, H, T, C / H): head h has the numbers h C / H to (h + 1) C / H.

        Exercise.
        """
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query, key=None, value=None, mask=None, is_causal=False, key_mask=None,
                cache=None, need_weights=False):  # fmt: skip
        """(B, T_q, C), with weights (B, H, T_q, T_k) if asked for.

        mask: (T_q, T_k), (B, T_q, T_k) or (B, H, T_q, T_k); key_mask (B, T_k): True for a real key.
        cache: a dict that keeps keys and values; the query is then what comes after them.
        """
        if query.dim() != 3:
            raise ValueError(f"the query needs the shape (B, T, C), not {tuple(query.shape)}")
        key = query if key is None else key
        value = key if value is None else value
        q = self.heads(self.q_proj(query))  # (B, H, T_q, C / H)
        k, v = self.heads(self.k_proj(key)), self.heads(self.v_proj(value))
        past = 0
        if cache is not None:
            if cache:
                past = cache["k"].size(2)
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache.update(k=k, v=v)
        mask = self.join_masks(mask, is_causal, key_mask, q.size(2), k.size(2), past, q.device)
        weights = attention_weights(q, k, mask)
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))  # (B, H, T, C/H) -> (B, T, C)
        return (out, weights) if need_weights else out

    def join_masks(self, mask, is_causal, key_mask, T_q, T_k, past, device):
        """One mask that allows what all of them allow; query i sees the keys 0 to past + i.

        mask (T_q, T_k), (B, T_q, T_k) or (B, H, T_q, T_k), boolean or floating, or None; key_mask
        (B, T_k): True for a real key. What a boolean one forbids is -inf in a floating one. None if
        there is none; ValueError "a mask is boolean or floating, not ...". Exercise.
        """
        if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(f"a mask is boolean or floating, not {mask.dtype}")
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(1)  # (B, T_q, T_k) -> (B, 1, T_q, T_k)
        more = []
        if is_causal:
            more.append(torch.ones(T_q, T_k, dtype=torch.bool, device=device).tril(past))
        if key_mask is not None:
            more.append(key_mask[:, None, None, :])
        for allowed in more:
            if mask is None:
                mask = allowed
            elif mask.dtype == torch.bool:
                mask = mask & allowed
            else:
                mask = torch.where(allowed, mask, -math.inf)
        return mask

    @torch.no_grad()
    def copy_torch(self, other):
        """Take the weights of an nn.MultiheadAttention of the same size."""
        if other.num_heads != self.num_heads:
            raise ValueError(f"{other.num_heads} heads do not fit into {self.num_heads}")
        projections = (self.q_proj, self.k_proj, self.v_proj)
        for ours, weight in zip(projections, other.in_proj_weight.chunk(3), strict=True):
            ours.weight.copy_(weight)
        if other.in_proj_bias is not None:
            for ours, bias in zip(projections, other.in_proj_bias.chunk(3), strict=True):
                ours.bias.copy_(bias)
        self.out_proj.load_state_dict(other.out_proj.state_dict())
        return self


def compare(pair, inputs):
    """Largest difference of two outputs, and of their gradients: float64, so 1e-12 is rounding."""
    grads = [torch.autograd.grad(y.sin().sum(), inputs) for y in pair]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    differences = [(a - b).abs().max().item() for a, b in zip(*grads, strict=True)]
    return (pair[0] - pair[1]).abs().max().item(), max(differences)


def show_twins(B=2, H=3, T=7, d=5):
    print("3. Do the versions agree? Ours with masks, minus the plain one or torch's: largest")
    print("   difference, float64. mask: boolean (True: allowed), added to the scores, or causal;")
    print("   padding: keys left out")
    print("             mask      compared with                    outputs   gradients")
    ours, torchs = scaled_dot_product_attention, F.scaled_dot_product_attention
    qkv = [torch.randn(B, H, T, d, dtype=F64, requires_grad=True) for _ in range(3)]
    allowed, added = torch.rand(B, 1, T, T) < 0.6, torch.randn(T, T, dtype=F64)
    allowed[0, 0, 2] = False  # a row that may look at nothing
    causal = [attend(*qkv, is_causal=True) for attend in (ours, torchs)]
    name, rows = "F.scaled_dot_product_attention", []
    for mask, other, pair in (
        ("none", "plain attention", (ours(*qkv), attention(*qkv)[0])),
        ("none", name, (ours(*qkv), torchs(*qkv))),
        ("boolean", name, (ours(*qkv, allowed), torchs(*qkv, allowed))),
        ("added", name, (ours(*qkv, added), torchs(*qkv, added))),
        ("causal", name, causal),
    ):
        rows.append(("one head", mask, other, compare(pair, qkv)))

    x, real = torch.randn(B, T, H * d, dtype=F64, requires_grad=True), torch.rand(B, T) < 0.7
    real[:, 0] = True
    library = nn.MultiheadAttention(H * d, H, batch_first=True, dtype=F64)  # its biases start at 0
    module = MultiHeadAttention(H * d, H).double().copy_torch(library)
    projections = (module.q_proj, module.k_proj, module.v_proj, module.out_proj)
    plain = multi_head(x, *(layer.weight for layer in projections), H)
    theirs = library(x, x, x, key_padding_mask=~real)[0]  # True blocks there
    rows.append((f"{H} heads", "none", "plain multi_head", compare((module(x), plain), [x])))
    pair = module(x, key_mask=real), theirs
    rows.append((f"{H} heads", "padding", "nn.MultiheadAttention", compare(pair, [x])))
    for heads, mask, other, (outputs, gradients) in rows:
        print(f"   {heads:<8}  {mask:<8}  {other:<30}   {outputs:7.0e}   {gradients:9.0e}")
    worst = max(max(row[-1]) for row in rows)
    rounding = torch.finfo(F64).eps / 2
    print(f"   -> the largest of all is {worst:.0e}; numbers near 1 are rounded by {rounding:.0e}")
    return rows


# --- 4. what True means ------------------------------------------------------------------------


def show_masks():
    print("4. Does True in a mask keep a key or block it? Weights of three keys of equal score")
    print(
        "   mask                    attention_weights   F.scaled_dot...     nn.MultiheadAttention"
    )
    x, eye = torch.zeros(1, 3, 3), torch.eye(3)[None]  # with the values eye, outputs are weights
    library = nn.MultiheadAttention(3, 1, batch_first=True)
    rows = {}
    for words, mask in (
        ("True False False", torch.tensor([True, False, False])),
        ("0 -inf -inf, added", torch.tensor([0.0, -math.inf, -math.inf])),
        ("-inf -inf -inf, added", torch.tensor([-math.inf] * 3)),
    ):
        mask = mask.expand(3, 3)  # the same for each query
        found = [attention_weights(x, x, mask), F.scaled_dot_product_attention(x, x, eye, mask),
                 library(x, x, x, attn_mask=mask)[1]]  # fmt: skip
        rows[words] = [weights[0, 0].tolist() for weights in found]
        shown = ["  ".join(f"{weight:4.2f}" for weight in row) for row in rows[words]]
        print(f"   {words:<21}   {shown[0]:<17}   {shown[1]:<17}   {shown[2]}")
    keeps = ["keeps" if row[0] == 1 else "blocks" for row in rows["True False False"]]
    print(f"   -> True: attention_weights {keeps[0]}, F {keeps[1]}, nn.MultiheadAttention "
          f"{keeps[2]} that key;")  # fmt: skip
    print("      ~mask turns one into the other")
    nothing = [row[0] for row in rows["-inf -inf -inf, added"]]
    shown = ", ".join("nan" if math.isnan(weight) else f"{weight:g}" for weight in nothing)
    print(f"   -> no key allowed: weights {shown} in this order; nan spoils all that follows")
    return rows


# --- 5. causal ---------------------------------------------------------------------------------


def influence(module, x, **options):
    """|d y_i / d x_j| of a module (1, T, C) -> (1, T, C), for all positions i, j: (T, T).

    The root of the sum of squares over the C x C entries of each block of the Jacobian
    (torch.autograd.functional.jacobian). The options go to the module. Exercise.
    """
    J = torch.autograd.functional.jacobian(lambda x: module(x, **options)[0], x)  # (T, C, 1, T, C)
    return J.squeeze(2).square().sum(dim=(1, 3)).sqrt()


def show_causality(log_dir, T=8, C=12):
    print("5. Can a position see later ones? |d output i / d input j|, by autograd")
    print("   is_causal   inputs j           entries   smallest   largest")
    module, x = MultiHeadAttention(C, 3).double(), torch.randn(1, T, C, dtype=F64)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    found = {}
    for is_causal in (False, True):
        J = found[is_causal] = influence(module, x, is_causal=is_causal)
        for words, entries in (("later   (j > i)", J[later]), ("up to i (j <= i)", J[~later])):
            print(f"   {is_causal!s:<9}   {words:<16}   {len(entries):7d}   {entries.min():8.4f}   "
                  f"{entries.max():7.4f}")  # fmt: skip
    seen = int((found[True][later] != 0).sum())
    print(f"   -> with is_causal=True {seen} of the {later.sum()} later inputs have an influence")
    with SummaryWriter(log_dir / "causality", purge_step=0) as writer:
        words = "is_causal: does output i (row) depend\non input j (column)? white: not at all"
        J = found[True]
        cells = draw_cells((J / J.max()).sqrt(), words)  # sqrt: faint ones show as well
        writer.add_image("attention/causality", cells, 0, dataformats="HWC")
    return found


# --- 6. the cache ------------------------------------------------------------------------------


def show_cache(T=12, C=24):
    print("6. A model writes one token at a time: may it keep old keys and values? Outputs")
    print(f"   token by token, minus those of all {T} tokens at once")
    module, x = MultiHeadAttention(C, 4).double(), torch.randn(1, T, C, dtype=F64)
    full, cached, alone, trap, cache = module(x, is_causal=True), [], [], [], {}
    for token in x.split(1, dim=1):  # (1, 1, C)
        cached.append(module(token, is_causal=True, cache=cache))
        alone.append(module(token, is_causal=True))
        q = module.heads(module.q_proj(token))
        y = F.scaled_dot_product_attention(q, cache["k"], cache["v"], is_causal=True)
        trap.append(module.out_proj(y.transpose(1, 2).flatten(2)))
    runs = {"kept in a cache": cached, "not kept: each token sees itself alone": alone,
            "kept, but F.scaled_dot...(is_causal=True)": trap}  # fmt: skip
    off = [(torch.cat(steps, dim=1) - full).abs().max().item() for steps in runs.values()]
    assert off[0] < 1e-12
    print("   keys and values of old tokens               outputs, largest difference")
    for name, difference in zip(runs, off, strict=True):
        print(f"   {name:<41}   {difference:27.6f}")
    numbers = sum(kept.numel() for kept in cache.values())
    only_first = (torch.cat(trap, dim=1) - full[:, :1]).abs().max()  # token 0 sees itself alone
    each = numbers / (T * C)
    print(f"   -> {numbers} numbers for {T} tokens: {each:g} C per token and layer, C = {C};")
    print(f"      F's is_causal=True lets a lone query see key 0 only (within {only_first:.0e}):")
    print("      for one token, leave it out")
    return off, numbers


# --- 7. why sqrt(d) ----------------------------------------------------------------------------


def show_scale(keys=64, queries=512):
    print(
        f"7. Why sqrt(d)? Means over {queries} random queries with {keys} keys: the largest weight"
    )
    print("   p, and its slope p (1 - p) by its own score")
    print("          q . k, not divided                 q . k / sqrt(d)")
    print("      d   variance   largest p    slope      variance   largest p    slope")
    table = {}
    for d in (4, 64, 1024):
        scores, row = torch.randn(queries, d) @ torch.randn(d, keys), []
        for name, s in (("unscaled", scores), ("scaled", scores / math.sqrt(d))):
            p = s.softmax(-1).amax(-1)  # (queries,)
            table[name, d] = s.var().item(), p.mean().item(), (p * (1 - p)).mean().item()
            row.append("{:8.1f}   {:9.3f}   {:6.3f}".format(*table[name, d]))
        print(f"   {d:4}   " + "      ".join(row))
    one, divided = table["unscaled", d], table["scaled", d]
    print(
        f"   -> at d = {d} one key takes {one[1]:.0%} of the weight, with sqrt(d) {divided[1]:.0%};"
    )
    print(
        f"      the slope, by which a gradient is multiplied, {one[2]:.3f} against {divided[2]:.3f}"
    )
    return table


# --- 8. memory ---------------------------------------------------------------------------------


def saved_megabytes(run, *tensors):
    """What run(*tensors) keeps for backward besides its inputs, each storage once."""
    own, sizes = {t.untyped_storage().data_ptr() for t in tensors}, {}

    def pack(tensor):  # autograd calls it with each tensor that it keeps
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(*tensors)
    del y
    return sum(sizes.values()) / 2**20


def show_fused(lengths, H=4, d=32):
    print("8. What does length cost? MiB kept for backward, float32: ours keeps all T x T weights,")
    print("   F.scaled_dot_product_attention, fused here, never has them all")
    print(f"   formula: 4 bytes x H T (T + d), H = {H} heads of d = {d} numbers, T positions")
    print("      T       ours      fused    formula")
    runs = {"ours": scaled_dot_product_attention, "fused": F.scaled_dot_product_attention}
    kept = {}
    for T in lengths:
        tensors = [torch.randn(1, H, T, d, requires_grad=True) for _ in range(3)]
        kept[T] = {name: saved_megabytes(run, *tensors) for name, run in runs.items()}
        print(f"   {T:4}   {kept[T]['ours']:8.2f}   {kept[T]['fused']:8.2f}   "
              f"{4 * H * T * (T + d) / 2**20:8.2f}")  # fmt: skip
    growth = {name: kept[lengths[-1]][name] / kept[lengths[0]][name] for name in runs}
    print(f"   -> {lengths[-1] / lengths[0]:.0f} times the length costs {growth['ours']:.0f} times "
          f"the memory, fused {growth['fused']:.0f} times")  # fmt: skip
    return kept


# --- the lesson --------------------------------------------------------------------------------


def draw_cells(cells, words, framed=(), size=40):
    """Values (R, C) in [0, 1] as squares, white to blue, under two lines of words: (H, W, 3)."""
    rows, columns = cells.shape
    image = Image.new("RGB", (columns * size, rows * size + 36), "white")
    pen = ImageDraw.Draw(image)
    pen.text((4, 3), words, "black", ImageFont.load_default(13))
    for r in range(rows):
        for c in range(columns):
            value, x, y = cells[r, c].item(), c * size, r * size + 36
            colour = tuple(round(255 * (1 - value * part)) for part in (0.95, 0.75, 0.3))
            edge = "orangered" if (r, c) in framed else colour
            pen.rectangle((x, y, x + size - 1, y + size - 1), colour, edge, 3)
    return np.asarray(image)


def main(seed=0, log_dir=LOG_DIR, lengths=(128, 1024), steps=400):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "lookup": show_lookup(seed, log_dir, steps),
        "twins": show_twins(),
        "masks": show_masks(),
        "influence": show_causality(log_dir),
        "cache": show_cache(),
        "scale": show_scale(),
        "kept": show_fused(lengths),
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
