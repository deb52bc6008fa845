"""An adapter, two thin layers in a frozen network, teaches it a new task but cannot be merged.

One large network often has to serve many tasks. An adapter keeps its weights frozen and trains two
small linear layers, with a nonlinearity between them, put behind or beside one of its layers. It
gives 0 at the start, so that the network starts as it was. Without such a method each task needs
its own copy of all weights. An adapter has a price: it stays there and takes time at every call.

    A(h) = U f(D h + c) + e      h  d numbers     r  the adapter's width, small     f  here GELU
    serial    y + A(y)           D (r, d), c (r,), U (d, r), e (d,)  what it learns
    parallel  y + A(x)           x, y  input and output of the layer that is adapted
    gated     y + tanh(g) A(y)   g  a number that starts at 0; in the other two U = e = 0 at first

Other numbers to train: LoRA, a product B A that is added to a weight; BitFit, the biases that are
there; prefix tuning, P keys and P values put before those that attention computes; prompt tuning,
P tokens put before the input. Here all of them also learn a new last layer, the head.

Needs          peft/lora_principle.py, model_architecture/attention_mechanism.py
Checked here   equal to the layer at the start; what can be merged; accuracy on a second task with
               at most 384 and at most 1152 numbers for each method, at two learning rates; time
TensorBoard    accuracy/any, accuracy/384 and accuracy/1152 by step, a run for each method and lr
               (write lr_0.03 into "Filter runs"); gate/tanh by step: the gates leave 0
Try            in Adapter.__init__, write nn.Identity() for nn.GELU(): what does table 3 say?
Answer         The adapter's difference falls to rounding: without a nonlinearity it can be merged
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
D, HEADS = 32, 4  # width of the transformer below, and its heads


# --- 1. in everyday code -----------------------------------------------------------------------


class Adapter(nn.Module):
    """h (..., d) -> U f(D h + c) + e, which is 0 at the start: 2 d r + r + d numbers."""

    def __init__(self, d, r):
        super().__init__()
        self.down, self.f, self.up = nn.Linear(d, r), nn.GELU(), nn.Linear(r, d)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h):
        """U f(D h + c) + e, (..., d) for h (..., d): self.down, self.f, self.up. Exercise."""
        return self.up(self.f(self.down(h)))


def show_everyday():
    print("1. In everyday code: an adapter of width 1 behind a frozen layer of 2 numbers")
    layer, adapter = nn.Linear(2, 2).requires_grad_(False), Adapter(d=2, r=1)
    optimizer = torch.optim.Adam(adapter.parameters())  # the adapter alone learns
    y = layer(torch.tensor([3.0, 1.0]))
    y_new = y + adapter(y)  # use this in place of y

    numbers = sum(w.numel() for w in optimizer.param_groups[0]["params"])
    print(f"   {numbers} numbers learn; y + A(y) minus y, before they do: {(y_new - y).tolist()}")
    adapter.f = nn.ReLU()  # from here on numbers to check by eye
    for w, values in ((adapter.down.weight, [[1, -1]]), (adapter.down.bias, [0]),
                      (adapter.up.weight, [[2], [1]])):  # fmt: skip
        w.data = torch.tensor(values).float()
    print("   with D = (1, -1), U = (2, 1), c = e = 0, f = ReLU:")
    print("   y            D y   f(D y)   A(y) = U f(D y)   y + A(y)")
    rows = []
    for y in torch.tensor([[3.0, 1.0], [1.0, 3.0]]):
        h, A = adapter.down(y), adapter(y)
        rows.append([*A.tolist(), *(y + A).tolist()])
        cells = [f"({a:.1f}, {b:.1f})" for a, b in (y, A, y + A)]
        print(f"   {cells[0]}   {h.item():4.1f}   {adapter.f(h).item():6.1f}   "
              f"{cells[1]:<15}   {cells[2]}")  # fmt: skip
    moved = [str(i) for i, row in enumerate(rows, 1) if any(row[:2])]
    print(f"   -> the nonlinearity decides which y is changed: here row {' and '.join(moved)}")
    return y_new - layer(torch.tensor([3.0, 1.0])), rows


# --- 2. behind, beside, or behind a gate -------------------------------------------------------


class Adapted(nn.Module):
    """`layer` (..., d) -> (..., d) with an adapter of width r: "serial", "parallel" or "gated"."""

    def __init__(self, layer, d, r, mode):
        super().__init__()
        if mode not in ("serial", "parallel", "gated"):
            raise ValueError(f"mode is serial, parallel or gated, not {mode}")
        if r < 1:
            raise ValueError(f"the width r must be at least 1, not {r}")
        self.layer, self.mode, self.adapter = layer, mode, Adapter(d, r)
        self.gate = nn.Parameter(torch.zeros(())) if mode == "gated" else None
        if mode == "gated":
            self.adapter.up.reset_parameters()  # the gate is 0 instead: both 0 could not learn
        if weights := list(layer.parameters()):
            self.to(weights[0])  # the layer's device and dtype

    def forward(self, x):
        """With y = layer(x): serial y + A(y), parallel y + A(x), gated y + tanh(gate) A(y).

        ValueError "an adapted layer keeps the shape: (shape), not (shape)" if y is not like x.
        Exercise.
        """
        y = self.layer(x)
        if y.shape != x.shape:
            raise ValueError(f"an adapted layer keeps the shape: {(*x.shape,)}, not {(*y.shape,)}")
        if self.mode == "parallel":
            return y + self.adapter(x)
        if self.mode == "gated":
            return y + self.gate.tanh() * self.adapter(y)
        return y + self.adapter(y)


def largest(a, b):
    return (a - b).abs().max().item()


def show_places(d=5, r=3):
    print("2. Three places for an adapter: what does it change at the start, and what moves first?")
    print("              output minus the layer's, largest")
    print("   mode       at the start   up and gate at random   slopes that are not 0 at the start")
    layer, x, rows = nn.Linear(d, d).requires_grad_(False), torch.randn(4, d), {}
    for mode in ("serial", "parallel", "gated"):
        adapted = Adapted(layer, d, r, mode)
        start = largest(adapted(x), layer(x))
        adapted(x).square().sum().backward()
        trained = [(name, w) for name, w in adapted.named_parameters() if w.requires_grad]
        moving = [name for name, w in trained if w.grad.any()]
        for name, w in trained:
            if "up" in name or "gate" in name:
                nn.init.normal_(w)  # as if trained
        rows[mode] = start, largest(adapted(x), layer(x)), moving
        print(f"   {mode:<8}   {start:12g}   {rows[mode][1]:21.2f}   {', '.join(moving)}")
    worst = max(start for start, *_ in rows.values())
    print(f"   -> at the start the outputs differ from the layer's by {worst:g} at most")
    return rows


# --- 3. what can be merged ---------------------------------------------------------------------


class LowRank(nn.Module):
    """LoRA with alpha = r: base(x) + x A^T B^T, where B = 0 at the start."""

    def __init__(self, base, r):
        super().__init__()
        self.base, like = base, base.weight
        self.lora_A = nn.Parameter(
            torch.randn(r, base.in_features).to(like) / base.in_features**0.5
        )
        self.lora_B = nn.Parameter(like.new_zeros(base.out_features, r))

    def forward(self, x):
        """base(x) + x A^T B^T. Exercise."""
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T

    @torch.no_grad()
    def merged(self):
        """A copy of the base layer that does the same alone: its weight plus B A. Exercise."""
        layer = copy.deepcopy(self.base)
        layer.weight += self.lora_B @ self.lora_A
        return layer


@torch.no_grad()
def best_linear(x, y):
    """Outputs (n, m) of the linear layer, bias and all, that is closest to x (n, d) -> y (n, m).

    Least squares: torch.linalg.lstsq on x with a column of ones. Exercise.
    """
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    return ones @ torch.linalg.lstsq(ones, y).solution


def show_merging(d=8, r=3, n=200):
    print("3. Can one linear layer do the work of a layer and of what was added to it?")
    print("   added to nn.Linear   largest output   best single layer, minus it")
    x, base, rows = torch.randn(n, d), nn.Linear(d, d), {}
    adapted, lora = Adapted(base, d, r, "serial"), LowRank(base, r)
    nn.init.normal_(adapted.adapter.up.weight)  # as if trained
    nn.init.normal_(lora.lora_B)
    for name, model in (("LoRA", lora), ("serial adapter", adapted)):
        y = model(x).detach()
        rows[name] = y.abs().max().item(), largest(best_linear(x, y), y)
        print(f"   {name:<18}   {rows[name][0]:14.2f}   {rows[name][1]:27.1e}")
    rows["merged"] = largest(lora.merged()(x), lora(x))
    can = [name for name in ("LoRA", "serial adapter") if rows[name][1] < 1e-5 * rows[name][0]]
    print(f"   -> can be merged: {', '.join(can)}; LoRA by W + B A, which differs by "
          f"{rows['merged']:.0e}")  # fmt: skip
    return rows


# --- 4. equal budgets --------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention (B, T, d) -> (B, T, d); with a prefix, over P more keys and values."""

    def __init__(self, d=D, heads=HEADS):
        super().__init__()
        self.heads, self.prefix = heads, None  # (2, P, d)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        """Self-attention (B, T, d) -> (B, T, d); with a prefix, over P more keys and values.

        q, k, v by their projections. If self.prefix (2, P, d) is not None, prefix[0] comes before
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
    """Tokens (B, T, 8) -> logits (B, 4), a number for each class: one block, and a mean."""

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
        return self.head(x[:, -T:].mean(1))  # the mean over the input's own tokens


SIZED = ("serial", "parallel", "gated", "lora", "prefix", "prompt")
FIXED = ("head", "prefix_random", "prompt_random", "bitfit", "full")  # random: added, not trained


def numbers(method, size):
    """How many numbers a method of SIZED trains beside the head; size is r or P."""
    pair = 2 * (2 * D * size + size + D)  # an adapter behind attention, and one behind the MLP
    return {"serial": pair, "parallel": pair, "gated": pair + 2, "lora": 2 * size * 2 * D,
            "prefix": 2 * size * D, "prompt": size * D}[method]  # fmt: skip


def largest_size(method, budget):
    """The largest size for which numbers(method, size) is at most `budget`; 0 if none. Exercise."""
    size = 0
    while numbers(method, size + 1) <= budget:
        size += 1
    return size


def prepare(model, method, size):
    """Freeze `model`, all but its head, and add what `method` trains. ValueError if unknown."""
    model.requires_grad_(method == "full")
    model.head.requires_grad_(True)
    start = 0.5 * torch.randn(2, size, D).to(model.embed.weight)
    if method in ("serial", "parallel", "gated"):
        model.attention = Adapted(model.attention, D, size, method)
        model.mlp = Adapted(model.mlp, D, size, method)
    elif method == "lora":
        model.attention.q_proj = LowRank(model.attention.q_proj, size)
        model.attention.v_proj = LowRank(model.attention.v_proj, size)
    elif method == "bitfit":
        for name, w in model.named_parameters():
            w.requires_grad_(name.endswith("bias") or name.startswith("head"))
    elif method.startswith("prefix"):
        model.attention.prefix = nn.Parameter(start, requires_grad=method == "prefix")
    elif method.startswith("prompt"):
        model.prompt = nn.Parameter(start[0], requires_grad=method == "prompt")
    elif method not in ("full", "head"):
        raise ValueError(f"no method is called {method}")


def merged(model):
    """A copy with every LowRank merged into one linear layer."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRank):
            model.set_submodule(name, layer.merged())
    return model


def count(model, trained=False):
    return sum(w.numel() for w in model.parameters() if w.requires_grad or not trained)


def sequences(n, prototypes, task):
    """Noisy copies x (n, T, 8) of prototypes (12, T, 8), and labels (n,), for one of two tasks.

    Each is a random prototype i (torch.randint) plus 0.8 times normal noise; its label is i // 3 in
    the task "old", i % 4 in the new one. Exercise.
    """
    which = torch.randint(len(prototypes), (n,))
    x = prototypes[which] + 0.8 * torch.randn(n, *prototypes.shape[1:])
    return x, which // 3 if task == "old" else which % 4


@torch.no_grad()
def accuracy(model, data):
    """Share of data = (x, labels) for which model(x) (N, 4) is largest at the label: a float.

    Exercise.
    """
    x, labels = data
    return (model(x).argmax(1) == labels).double().mean().item()


def fit(model, prototypes, task, steps, lr, val=None, writer=None, tag=""):
    """Adam on what requires a gradient; accuracy on val, logged every 20 steps, at the end."""
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=lr)
    for step in range(steps):
        x, labels = sequences(64, prototypes, task)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if writer and (step % 20 == 0 or step == steps - 1):
            score = accuracy(model, val)
            writer.add_scalar(tag, score, step)
            if isinstance(model.mlp, Adapted) and model.mlp.mode == "gated":
                writer.add_scalar("gate/tanh", model.mlp.gate.tanh(), step)
    return score if writer else None


def plan(budgets, methods):
    """Rows (budget, method, size); what is added at random has the largest budget's size."""
    rows = []
    for method in FIXED:
        kind = method.removesuffix("_random")
        rows.append(("any", method, largest_size(kind, max(budgets)) if kind in SIZED else 0))
    for budget in budgets:
        rows += [(budget, method, largest_size(method, budget)) for method in SIZED]
    return [row for row in rows if row[1] in methods]


def show_methods(seed, log_dir, steps, n, budgets, lrs, methods):
    print(f"4. Equal budgets: {steps} steps on a second task; numbers are those beside the head")
    torch.manual_seed(seed)
    prototypes, start = torch.randn(12, 6, 8), Transformer()
    fit(start, prototypes, "old", steps, lr=0.01)
    val, rows, models = sequences(n, prototypes, "new"), {}, {"untouched": start}
    print(
        "   at most                                   numbers left    accuracy on the second task"
    )
    print("   numbers  method          size   numbers   after merging   "
          f"{'   '.join(f'lr {lr:<5g}' for lr in lrs)}")  # fmt: skip
    for budget, method, size in tqdm(plan(budgets, methods), leave=False, disable=None):
        scores, name = [], method if budget == "any" else f"{method}_{budget}"
        for lr in lrs:
            torch.manual_seed(seed)
            models[method] = model = copy.deepcopy(start)
            prepare(model, method, size)
            with SummaryWriter(log_dir / f"lr_{lr:g}" / name, purge_step=0) as writer:
                scores.append(fit(model, prototypes, "new", steps, lr, val, writer,
                                  f"accuracy/{budget}"))  # fmt: skip
        trained = count(model, trained=True) - count(model.head)
        left = count(merged(model)) - count(start)
        rows[budget, method] = trained, left, scores
        tqdm.write(f"   {budget!s:<6}   {method:<13}   {size or '-':>4}   {trained:7,}   {left:13,}"
                   f"   {'   '.join(f'{score:<8.3f}' for score in scores)}")  # fmt: skip
    for budget in budgets:
        best = {method: max(rows[budget, method][2]) for method in SIZED if method in methods}
        free = [f"{name} {best[name]:.3f}" for name in best if rows[budget, name][1] == 0]
        first = max(best, key=best.get)
        print(f"   -> at most {budget} numbers: {first} is highest here, {best[first]:.3f}; "
              f"merged, nothing is left of {', '.join(free) or 'none'}")  # fmt: skip
    gain = {row: scores[-1] - scores[0] for row, (_, _, scores) in rows.items()}
    budget, method = max(gain, key=gain.get)
    print(f"   -> lr {lrs[-1]:g} instead of {lrs[0]:g}: {method} ({budget}) gains "
          f"{gain[budget, method]:.2f}, the head alone {gain['any', 'head']:.2f}; "
          "tune lr for each method")  # fmt: skip
    return rows, models, val[0]


# --- 5. what a call costs ----------------------------------------------------------------------


@torch.no_grad()
def times(models, x, rounds):
    """{name: the shortest of its forward passes}; in turns, so that a slow moment hits all."""
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            model(x)  # its own memory at hand
            start = time.perf_counter()
            model(x)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def show_times(models, x, rounds):
    print("5. What does a call cost? The shortest forward pass, the untouched network's is 1")
    chosen = {name: model for name, model in models.items() if name in ("untouched", *SIZED)}
    if "lora" in models:
        chosen["lora, merged"] = merged(models["lora"])
    seconds = times(chosen, x, rounds)
    print("   network        numbers in it    time")
    ratios = {name: seconds[name] / seconds["untouched"] for name in chosen}
    for name, model in chosen.items():
        print(f"   {name:<12}   {count(model):13,}   {ratios[name]:5.2f}")
    slowest = max(ratios, key=ratios.get)
    print(f"   -> {name} takes {ratios[name]:.2f} of the untouched network's time; "
          f"{slowest}, the slowest, {ratios[slowest]:.2f}")  # fmt: skip
    return ratios


METHODS = (*FIXED, *SIZED)


def main(seed=0, log_dir=LOG_DIR, steps=200, n=1000, budgets=(384, 1152), lrs=(0.003, 0.03),
         methods=METHODS, rounds=100):  # fmt: skip
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "places": show_places(), "merging": show_merging()}
    measured["rows"], models, x = show_methods(seed, log_dir, steps, n, budgets, lrs, methods)
    measured["times"] = show_times(models, x[:64], rounds)  # larger ones time the memory
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
