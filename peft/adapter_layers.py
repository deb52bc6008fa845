"""An adapter, two small layers around a nonlinearity, adapts a frozen network; it cannot be merged.

    A(h) = U f(D h)                          D (r, d), U (d, r): a bottleneck of r numbers
    serial     y = layer(x);  y + A(y)       behind the layer
    parallel   layer(x) + A(x)               beside it
    gated      y + tanh(g) A(y)              g starts at 0; the others start with U = 0

All three start as the identity, bit for bit. LoRA's update is linear and can be added to a weight;
an adapter's is not, so that it stays in the way. What else can be trained of a frozen transformer:
its biases (BitFit), keys and values put before its own (prefix tuning), tokens put before its input
(prompt tuning). Each learns a new head as well, the head alone being the least of them.

Checked here   identity at the start; numbers trained, by formula and by count; accuracy on a new
               task, with all else bit-equal afterwards; added time; what merges
TensorBoard    val/accuracy by step in full, serial, parallel, gated, lora, bitfit, prefix, prompt,
               head; table/methods as text; gate/tanh by step in gated
Try            Adapter without its nonlinearity: can it be merged? Yes: W <- (I + U D) W
Source         Houlsby et al. 2019, arXiv:1902.00751, section 2.1; He et al. 2022, arXiv:2110.04366,
               section 3 (parallel); Ben Zaken et al. 2022 (BitFit), arXiv:2106.10199; Li & Liang
               2021 (prefix), arXiv:2101.00190; Lester et al. 2021 (prompt), arXiv:2104.08691
"""

import argparse
import copy
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "peft" / "adapter_layers"
D, HEADS, TOKENS = 32, 4, 4  # width, heads; how many tokens a prefix or a prompt has


# --- adapters ----------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A(h) = U f(D h) on (…, d), with biases: 2 d r + r + d numbers; zero starts with U = 0."""

    def __init__(self, d, r, activation=F.gelu, zero=True):
        super().__init__()
        if r < 1:
            raise ValueError(f"the bottleneck r must be at least 1, not {r}")
        self.down, self.up, self.activation = nn.Linear(d, r), nn.Linear(r, d), activation
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, h):
        """U f(D h), of h (…, d): self.down, self.activation, self.up. Exercise."""
        return self.up(self.activation(self.down(h)))


class Adapted(nn.Module):
    """`layer` (…, d) -> (…, d) with an adapter of width r: "serial", "parallel" or "gated"."""

    def __init__(self, layer, d, r, mode):
        super().__init__()
        if mode not in ("serial", "parallel", "gated"):
            raise ValueError(f"mode is serial, parallel or gated, not {mode}")
        weight = next(layer.parameters())
        self.layer, self.mode = layer, mode
        self.adapter = Adapter(d, r, zero=mode != "gated").to(weight.device, weight.dtype)
        self.gate = nn.Parameter(weight.new_zeros(())) if mode == "gated" else None

    def forward(self, x):
        """The layer with its adapter A: serial y + A(y), parallel y + A(x), gated y + tanh(g) A(y).

        y = layer(x). ValueError "an adapted layer keeps the shape: (shape), not (shape)". Exercise.
        """
        y = self.layer(x)
        if y.shape != x.shape:
            raise ValueError(f"an adapted layer keeps the shape: {(*x.shape,)}, not {(*y.shape,)}")
        if self.mode == "parallel":
            return y + self.adapter(x)
        if self.mode == "gated":
            return y + self.gate.tanh() * self.adapter(y)
        return y + self.adapter(y)


class LowRank(nn.Module):
    """LoRA: base(x) + x A^T B^T, with B = 0 at the start."""

    def __init__(self, base, r):
        super().__init__()
        self.base = base
        A = torch.randn(r, base.in_features) / base.in_features**0.5
        self.lora_A = nn.Parameter(A.to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))

    def forward(self, x):
        """base(x) + x A^T B^T. Exercise."""
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T

    @torch.no_grad()
    def merged(self):
        """A copy of the base layer that does the same alone: its weight plus B A. Exercise."""
        layer = copy.deepcopy(self.base)
        layer.weight += self.lora_B @ self.lora_A
        return layer


# --- a transformer to adapt --------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention (B, T, d) -> (B, T, d); with a prefix, over P more keys and values."""

    def __init__(self, d=D, heads=HEADS):
        super().__init__()
        self.heads, self.prefix = heads, None  # (2, P, d)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        """Self-attention (B, T, d) -> (B, T, d); with a prefix, over P more keys and values.

        q, k, v by their projections; If self.prefix (2, P, d) is not None, prefix[0] comes before
        the keys, prefix[1] before the values, the same for all of the batch. Heads are split (B, H,
        T, d / H) for F.scaled_dot_product_attention, joined again and given to out_proj. Exercise.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.prefix is not None:
            more_k, more_v = self.prefix.unsqueeze(1).expand(2, len(x), -1, -1)  # (B, P, d) each
            k, v = torch.cat([more_k, k], dim=1), torch.cat([more_v, v], dim=1)
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, d=D):
        super().__init__()
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    """Tokens (B, T, 8) -> logits (B, 4): one block, and a mean over the tokens."""

    def __init__(self, d=D):
        super().__init__()
        self.embed, self.attention, self.mlp = nn.Linear(8, d), Attention(d), MLP(d)
        self.norm1, self.norm2, self.head = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 4)
        self.prompt = None  # (P, d)

    def forward(self, x):
        T, x = x.size(1), self.embed(x)
        if self.prompt is not None:
            x = torch.cat([self.prompt.expand(len(x), -1, -1), x], dim=1)  # (B, P + T, d)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, -T:].mean(1))


def prepare(model, method, r):
    """Freeze `model` but for what `method` trains, its head included: numbers by formula."""
    model.requires_grad_(method == "full")
    model.head.requires_grad_(True)
    d, P, head = D, TOKENS, 4 * D + 4
    if method == "full":
        return sum(w.numel() for w in model.parameters())
    if method in ("serial", "parallel", "gated"):
        model.attention, model.mlp = (
            Adapted(m, d, r, method) for m in (model.attention, model.mlp)
        )
        for norm in (model.norm1, model.norm2):
            norm.requires_grad_(True)  # as Houlsby et al. do
        return head + 2 * (2 * d * r + r + d) + 4 * d + 2 * (method == "gated")
    if method == "lora":
        attention, mlp = ("q_proj", "k_proj", "v_proj", "out_proj"), ("up", "down")
        for parent, names in ((model.attention, attention), (model.mlp, mlp)):
            for name in names:
                setattr(parent, name, LowRank(getattr(parent, name), r))
        return head + r * (4 * 2 * d + 2 * 5 * d)
    if method == "bitfit":
        for name, w in model.named_parameters():
            w.requires_grad_(name.endswith("bias") or name.startswith("head"))
        return head + d + 4 * d + 5 * d + 2 * d  # embed, attention, mlp, norms
    if method == "prefix":
        model.attention.prefix = nn.Parameter(torch.randn(2, P, d).to(model.embed.weight))
        return head + 2 * P * d
    if method == "prompt":
        model.prompt = nn.Parameter(torch.randn(P, d).to(model.embed.weight))
        return head + P * d
    if method == "head":
        return head
    raise ValueError(f"no method is called {method}")


METHODS = {  # can it be merged into the frozen weights? Some change these and add nothing
    "full": "nothing added", "serial": "no", "parallel": "no", "gated": "no", "lora": "yes",
    "bitfit": "nothing added", "prefix": "no", "prompt": "no", "head": "nothing added",
}  # fmt: skip


# --- two tasks, as in the LoRA lesson ----------------------------------------------------------


def sequences(n, prototypes, task):
    """Noisy copies x (n, T, 8) of prototypes (12, T, 8), and labels (n,), for one of two tasks.

    Each is a random prototype i (torch.randint) plus 0.8 times normal noise; its label is i // 3 in
    the task "old", i % 4 in the new one. Exercise.
    """
    which = torch.randint(len(prototypes), (n,))
    x = prototypes[which] + 0.8 * torch.randn(n, *prototypes.shape[1:])
    return x, which // 3 if task == "old" else which % 4


def accuracy(model, data):
    """Share of data = (x, labels) for which model(x) (N, 4) is largest at the label: a float.

    Exercise.
    """
    x, labels = data
    with torch.no_grad():
        return (model(x).argmax(1) == labels).double().mean().item()


def fit(model, prototypes, task, steps, watch=None, lr=3e-3):
    """Adam on what requires a gradient; watch(model, step) is called every 20 steps and last."""
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=lr)
    for step in range(steps):
        x, labels = sequences(64, prototypes, task)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch and (step % 20 == 0 or step == steps - 1):
            watch(model, step)


@torch.no_grad()
def times(models, x, rounds=200):
    """{name: the shortest of its forward passes}; in turns, so that a slow moment hits all."""
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            model(x)  # its own memory at hand
            start = time.perf_counter()
            model(x)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def merged(model):
    """A copy with every LowRank merged into one linear layer."""
    model = copy.deepcopy(model)
    for part in (model.attention, model.mlp):
        for name, layer in list(part.named_children()):
            if isinstance(layer, LowRank):
                setattr(part, name, layer.merged())
    return model


# --- the sections ------------------------------------------------------------------------------


def show_identity(r=4):
    print(f"1. a layer with an adapter of width {r} at the start, against the layer: difference")
    layer, x = MLP(), torch.randn(3, 5, D)
    for mode in ("serial", "parallel", "gated"):
        off = (Adapted(layer, D, r, mode)(x) - layer(x)).abs().max().item()
        assert off == 0
        print(f"   {mode:<8} {off:g}")


def show_merging(r=4):
    print("2. as one linear layer with the weight's own size: largest difference")
    x, lora = torch.randn(50, D), LowRank(nn.Linear(D, D), r)
    adapter = Adapter(D, r, zero=False)
    nn.init.normal_(lora.lora_B)
    ones = torch.cat([x, torch.ones(50, 1)], dim=1)
    with torch.no_grad():
        best = ones @ torch.linalg.lstsq(ones, adapter(x)).solution  # of all affine maps
        off = {
            "lora": (lora(x) - lora.merged()(x)).abs().max().item(),
            "adapter": (adapter(x) - best).abs().max().item(),
        }
    print(f"   lora {off['lora']:.0e}   adapter, the best such layer {off['adapter']:.0e}")
    return off


def adapt(start, method, r, prototypes, steps, val, log_dir):
    """A copy of `start` on the new task; {step: accuracy}, numbers by formula and by count."""
    model = copy.deepcopy(start)
    formula = prepare(model, method, r)
    count = sum(w.numel() for w in model.parameters() if w.requires_grad)
    frozen = {name: w.clone() for name, w in model.named_parameters() if not w.requires_grad}
    with SummaryWriter(log_dir / method, purge_step=0) as writer:
        curve = {}

        def watch(model, step):
            curve[step] = accuracy(model, val)
            writer.add_scalar("val/accuracy", curve[step], step)
            if method == "gated":
                writer.add_scalar("gate/tanh", model.mlp.gate.tanh(), step)

        fit(model, prototypes, "new", steps, watch)
    assert all(torch.equal(dict(model.named_parameters())[name], w) for name, w in frozen.items())
    return model, curve[steps - 1], formula, count


def show_methods(seed, log_dir, steps, methods, r):
    print(f"3. adapting a transformer, {steps} steps, r = {r}, {TOKENS} tokens: accuracy, numbers")
    torch.manual_seed(seed)
    prototypes, start = torch.randn(12, 6, 8), Transformer()
    fit(start, prototypes, "old", steps)
    val, rows, models = sequences(2000, prototypes, "new"), {}, {"untouched": start}
    text = "method | accuracy | formula | count | merged\n---|---|---|---|---\n"
    for method in tqdm(methods, leave=False, disable=None):
        torch.manual_seed(seed)
        model, score, formula, count = adapt(start, method, r, prototypes, steps, val, log_dir)
        assert formula == count
        rows[method], models[method] = (score, count), model
        if method == "lora":
            models["lora merged"] = merged(model)
        text += f"{method} | {score:.3f} | {formula} | {count} | {METHODS[method]}\n"
        tqdm.write(f"   {method:<8}   {score:.3f}   formula {formula:6,}   count {count:6,}   "
                   f"merged: {METHODS[method]}")  # fmt: skip
    with SummaryWriter(log_dir / "table", purge_step=0) as writer:
        writer.add_text("table/methods", text, 0)
    print("4. time of a forward pass, the untouched network's = 1")
    passes = times(models, val[0][:64])  # larger ones time the memory
    ratios = {name: passes[name] / passes["untouched"] for name in models if name != "untouched"}
    print("   " + "   ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return rows


def main(seed=0, log_dir=LOG_DIR, steps=400, methods=tuple(METHODS), r=4):
    torch.manual_seed(seed)
    show_identity()
    return {"merging": show_merging(), "rows": show_methods(seed, log_dir, steps, methods, r)}


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
