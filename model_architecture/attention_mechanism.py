"""Attention looks a value up by its key: a mean, weighted by softmax(q k^T / sqrt(d)).

    Attention(q, k, v) = softmax(q k^T / sqrt(d) + mask) v     q (…, T_q, d), k, v (…, T_k, d)
    MultiHead(x) = concat(head_1 … head_H) W_o                 each of d = C / H

For q and k of variance 1 a score q . k has variance d: without 1 / sqrt(d) the softmax of a large d
is all but one-hot, and its gradient 0. A boolean mask is True where attention is allowed, as in
F.scaled_dot_product_attention; in nn.MultiheadAttention True means blocked. An additive mask is
added to the scores, -inf blocks. A row in which nothing is allowed gives 0, not NaN.

Checked here   both equal torch's, gradients included; masks; variance and entropy by d; no output
               depends on a later input; decoding with a cache equals the full pass; memory and time
               by T against the fused kernel; looking up learned, and not learned by a plain mean
TensorBoard    scores/variance, softmax/entropy by log2 d in scaled, unscaled; attention/causality
               and attention/lookup (a row is a question, its answer's place is framed) as pictures;
               train/loss by step in lookup/attention, lookup/mean; memory/MB by T in ours, fused
Try            influence(module, x) without is_causal: what is above the diagonal? All positive
Source         Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Dao et al. 2022 (FlashAttention),
               arXiv:2205.14135, for the fused kernel
"""

import argparse
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TOPIC = "model_architecture"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "attention_mechanism"
F64 = torch.float64
TIGHT = {"rtol": 0, "atol": 1e-12}


# --- attention ---------------------------------------------------------------------------------


def attention_weights(q, k, mask=None, is_causal=False):
    """Weights (…, T_q, T_k) of q (…, T_q, d) over k (…, T_k, d): each row sums to 1, or is 0.

    softmax(q k^T / sqrt(d)), q divided before the product, so that half precision stays finite.
    mask is boolean (True: allowed) or floating (added); is_causal lets query i see keys 0 to i. A
    row in which nothing is allowed is 0. ValueError "q and k need one size d, not a and b"; "give a
    mask or is_causal, not both"; "mask (shape) does not fit scores (shape)" where it would not
    broadcast to them; "a mask is boolean or floating, not …". Exercise.
    """
    if q.size(-1) != k.size(-1):
        raise ValueError(f"q and k need one size d, not {q.size(-1)} and {k.size(-1)}")
    scores = (q / math.sqrt(q.size(-1))) @ k.mT  # dividing first keeps half precision finite
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
    """(…, T_q, d_v), from q (…, T_q, d), k (…, T_k, d), v (…, T_k, d_v).

    attention_weights times v. mask broadcasts to (…, T_q, T_k). is_causal lets query i see keys 0
    to i. ValueError "k (shape) and v (shape) do not belong together" if they differ before the last
    axis. Exercise.
    """
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
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, C/H)

    def forward(self, query, key=None, value=None, mask=None, is_causal=False, key_mask=None,
                cache=None, need_weights=False):  # fmt: skip
        """(B, T_q, C), with weights (B, H, T_q, T_k) if asked for.

        mask: (T_q, T_k), (B, T_q, T_k) or (B, H, T_q, T_k); key_mask (B, T_k): True for a real key.
        cache: a dict that keeps keys and values; the query is then what comes after them.
        """
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (
            self.heads(project(x))
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
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
        there is none; ValueError "a mask is boolean or floating, not …". Exercise.
        """
        if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(f"a mask is boolean or floating, not {mask.dtype}")
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(1)  # (B, T_q, T_k) -> (B, 1, T_q, T_k)
        allowed = []
        if is_causal:
            causal = torch.ones(T_q, T_k, dtype=torch.bool, device=device)
            allowed.append(causal.tril(past))
        if key_mask is not None:
            allowed.append(key_mask[:, None, None, :])
        for more in allowed:
            if mask is None:
                mask = more
            elif mask.dtype == torch.bool:
                mask = mask & more
            else:
                mask = torch.where(more, mask, -math.inf)
        return mask

    @torch.no_grad()
    def copy_torch(self, other):
        """Take the weights of an nn.MultiheadAttention of the same size."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        for ours, weight in zip(projections, other.in_proj_weight.chunk(3), strict=True):
            ours.weight.copy_(weight)
        if other.in_proj_bias is not None:
            for ours, bias in zip(projections, other.in_proj_bias.chunk(3), strict=True):
                ours.bias.copy_(bias)
        self.out_proj.load_state_dict(other.out_proj.state_dict())
        return self


# --- equalities --------------------------------------------------------------------------------


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def show_twins(B=2, H=3, T=7, d=5):
    print("1. ours and torch's: largest difference of outputs, of gradients")
    q, k, v = (torch.randn(B, H, T, d, dtype=F64, requires_grad=True) for _ in range(3))
    allowed = torch.rand(B, 1, T, T) < 0.6
    allowed[0, 0, 2] = False  # a row that may look at nothing
    masks = {
        "no mask": {},
        "boolean": {"mask": allowed},
        "additive": {"mask": torch.randn(T, T, dtype=F64)},
        "causal": {"is_causal": True},
    }
    for name, options in masks.items():
        theirs = {"attn_mask" if key == "mask" else key: m for key, m in options.items()}
        pair = [scaled_dot_product_attention(q, k, v, **options),
                F.scaled_dot_product_attention(q, k, v, **theirs)]  # fmt: skip
        grads = [torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in pair]
        torch.testing.assert_close(*pair, **TIGHT)
        torch.testing.assert_close(*grads, **TIGHT)
        off = largest_difference(pair[:1], pair[1:]), largest_difference(*grads)
        print(f"   {name:<22} {off[0]:.0e}   {off[1]:.0e}")
    x, real = torch.randn(B, T, H * 4, dtype=F64, requires_grad=True), torch.rand(B, T) < 0.7
    real[:, 0] = True
    library = nn.MultiheadAttention(H * 4, H, batch_first=True, dtype=F64)
    ours = MultiHeadAttention(H * 4, H).double().copy_torch(library)
    pair = [
        ours(x, key_mask=real),
        library(x, x, x, key_padding_mask=~real)[0],
    ]  # True blocks there
    grads = [torch.autograd.grad(y.sin().sum(), x) for y in pair]
    torch.testing.assert_close(*pair, **TIGHT)
    torch.testing.assert_close(*grads, **TIGHT)
    off = largest_difference(pair[:1], pair[1:]), largest_difference(*grads)
    print(f"   nn.MultiheadAttention  {off[0]:.0e}   {off[1]:.0e}")


def show_scale(log_dir, keys=64, queries=512):
    print(f"2. scores and softmax over {keys} keys, by d; a uniform softmax has entropy "
          f"{math.log(keys):.3f}")  # fmt: skip
    rows = {}
    for d in (4, 16, 64, 256, 1024):
        scores = torch.randn(queries, d) @ torch.randn(d, keys)
        for name, s in (("unscaled", scores), ("scaled", scores / math.sqrt(d))):
            p = s.softmax(-1)
            rows[name, d] = s.var().item(), torch.special.entr(p).sum(-1).mean().item()
        print(f"   d {d:4}   unscaled: variance {rows['unscaled', d][0]:7.1f}  entropy "
              f"{rows['unscaled', d][1]:.3f}   scaled: variance {rows['scaled', d][0]:.3f}  "
              f"entropy {rows['scaled', d][1]:.3f}")  # fmt: skip
    for name in ("unscaled", "scaled"):
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for (variant, d), (variance, entropy) in rows.items():
                if variant == name:
                    writer.add_scalar("scores/variance", variance, round(math.log2(d)))
                    writer.add_scalar("softmax/entropy", entropy, round(math.log2(d)))
    return rows


def influence(module, x, **options):
    """|d y_i / d x_j| of a module (1, T, C) -> (1, T, C), for all positions i, j: (T, T).

    The root of the sum of squares over the C x C entries of each block of the Jacobian
    (torch.autograd.functional.jacobian). The options go to the module. Exercise.
    """
    J = torch.autograd.functional.jacobian(lambda x: module(x, **options)[0], x)  # (T, C, 1, T, C)
    return J.squeeze(2).square().sum(dim=(1, 3)).sqrt()


def enlarge(image, factor):
    """(H, W) in [0, 1] to (3, factor H, factor W), white to blue."""
    image = image.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    return 1 - image * torch.tensor([0.95, 0.75, 0.3]).view(3, 1, 1)


def show_causality(log_dir, T=8, C=12):
    print("3. |d y_i / d x_j| with is_causal: largest for j > i, least for j <= i")
    module, x = MultiHeadAttention(C, 3).double(), torch.randn(1, T, C, dtype=F64)
    J = influence(module, x, is_causal=True)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert (J[later] == 0).all() and (J[~later] > 0).all()
    print(f"   {J[later].max():g}   {J[~later].min():.4f}")
    with SummaryWriter(log_dir / "causality", purge_step=0) as writer:
        picture = enlarge((J / J.max()).float().sqrt(), 30)  # sqrt: faint ones show as well
        writer.add_image("attention/causality", picture, 0)
    return J


def show_cache(T=12, C=24):
    print("4. token by token with a key/value cache, against one causal pass")
    module, x = MultiHeadAttention(C, 4).double(), torch.randn(2, T, C, dtype=F64)
    full, cache = module(x, is_causal=True), {}
    steps = [module(token, is_causal=True, cache=cache) for token in x.split(1, dim=1)]
    off = (torch.cat(steps, dim=1) - full).abs().max().item()
    assert off < 1e-12
    numbers = sum(t.numel() for t in cache.values())
    assert numbers == 2 * x.numel()
    print(f"   difference {off:.0e}   cached numbers {numbers} = 2 B T C")


def saved_megabytes(run, *tensors):
    """What run(*tensors) keeps for backward besides its inputs, each storage once."""
    own, sizes = {t.untyped_storage().data_ptr() for t in tensors}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(*tensors)
    del y
    return sum(sizes.values()) / 2**20


def seconds(run, *tensors, repeat=5):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run(*tensors).sum().backward()
        times.append(time.perf_counter() - start)
    return min(times)


def show_fused(log_dir, lengths, H=4, d=32):
    print(f"5. MB kept for backward by T, {H} heads of {d}: ours, fused; time ours / fused")
    runs = {"ours": scaled_dot_product_attention, "fused": F.scaled_dot_product_attention}
    kept, ratios = {}, {}
    for T in lengths:
        tensors = [torch.randn(1, H, T, d, requires_grad=True) for _ in range(3)]
        kept[T] = {name: saved_megabytes(run, *tensors) for name, run in runs.items()}
        ratios[T] = seconds(runs["ours"], *tensors) / seconds(runs["fused"], *tensors)
        print(f"   T {T:5}   {kept[T]['ours']:7.2f}   {kept[T]['fused']:5.2f}")
    print("   time   " + "   ".join(f"T {T} {ratio:.1f}" for T, ratio in ratios.items()))
    for name in runs:
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for T in lengths:
                writer.add_scalar("memory/MB", kept[T][name], T)
    return kept


# --- a task for attention ----------------------------------------------------------------------


class LookUp(nn.Module):
    """Items (key, value) and the key that is asked for -> logits of its value, by attention.

    With attend=False the question weighs all items alike: the same network but for the scores.
    """

    def __init__(self, K, V, C=32, attend=True):
        super().__init__()
        self.key, self.value = nn.Embedding(K, C), nn.Embedding(V, C)
        self.attention, self.head = MultiHeadAttention(C, 1), nn.Linear(C, V)
        if not attend:
            for parameter in self.attention.q_proj.parameters():
                nn.init.zeros_(parameter).requires_grad_(False)

    def forward(self, keys, values, asked):
        """keys, values (B, T), asked (B,) -> logits (B, V), weights (B, T)"""
        items = self.key(keys) + self.value(values)  # (B, T, C)
        question = self.key(asked).unsqueeze(1)  # (B, 1, C)
        answer, weights = self.attention(question, items, need_weights=True)
        return self.head(answer.squeeze(1)), weights[:, 0, 0]


def questions(B, K, V):
    """Each key once, in random order, with random values; which is asked for, and its place."""
    keys, values = torch.rand(B, K).argsort(1), torch.randint(V, (B, K))
    place = torch.randint(K, (B,))
    rows = torch.arange(B)
    return (keys, values, keys[rows, place]), values[rows, place], place


def show_lookup(seed, log_dir, steps, K=8, V=8):
    print(f"6. the value of one of {K} keys, {steps} steps: accuracy, weight at its place")
    scores = {}
    for name in ("attention", "mean"):
        torch.manual_seed(seed)
        model = LookUp(K, V, attend=name == "attention")
        parameters = [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        with SummaryWriter(log_dir / "lookup" / name, purge_step=0) as writer:
            for step in tqdm(range(steps), desc=name, leave=False, disable=None):
                inputs, answer, _ = questions(128, K, V)
                loss = F.cross_entropy(model(*inputs)[0], answer)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                writer.add_scalar("train/loss", loss.item(), step)
            inputs, answer, place = questions(2000, K, V)
            with torch.no_grad():
                logits, weights = model(*inputs)
            right = (logits.argmax(1) == answer).double().mean().item()
            scores[name] = right, weights[torch.arange(2000), place].mean().item()
            picture = enlarge(weights[:8], 30)
            for row, column in enumerate(place[:8]):
                frame(picture, row, column, 30)
            writer.add_image("attention/lookup", picture, 0)
        print(f"   {name:<9}   {right:.3f}   {scores[name][1]:.3f}")
    print(f"   chance      {1 / V:.3f}   {1 / K:.3f}")
    return scores


def frame(picture, row, column, size, colour=(0.9, 0.3, 0.1)):
    """Draw a frame around one cell, in place."""
    cell = picture[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
    inside = cell[:, 2:-2, 2:-2].clone()
    cell[:] = torch.tensor(colour).view(3, 1, 1)
    cell[:, 2:-2, 2:-2] = inside


def main(seed=0, log_dir=LOG_DIR, lengths=(128, 256, 512, 1024), steps=400):
    torch.manual_seed(seed)
    show_twins()
    measured = {"scale": show_scale(log_dir), "influence": show_causality(log_dir)}
    show_cache()
    return measured | {
        "kept": show_fused(log_dir, lengths),
        "lookup": show_lookup(seed, log_dir, steps),
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
