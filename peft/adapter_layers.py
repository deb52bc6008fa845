"""Adapters of 1,104 numbers in a frozen network learn a new task better than a new head alone.

A copy of all weights for each task is too much if one large network shall serve many. So its
weights stay frozen, and each task trains a few numbers of its own. An adapter is two linear layers
with a nonlinearity between them, put behind or beside a layer of the network. What it adds is 0 at
the start, so that the network starts as it was. It cannot be merged into that layer.

    A(h) = U f(D h + c) + e      h, A(h)  d numbers      D h + c  r numbers, fewer than d
    serial y + A(y), behind a layer of input x and output y       parallel y + A(x), beside it
    D, c  weight and bias of the first layer     U, e  of the second one, both 0 at the start
    f  the nonlinearity, here GELU               r  the width of the adapter

Other ways: LoRA adds a product B A to a weight matrix. BitFit trains the biases. Prefix tuning puts
P learned keys and values before those of attention. Prompt tuning puts P learned tokens before the
input. All of them here also train the last layer, the head. Choose LoRA, merged, if a call shall
cost no more than before, and LoRA for few numbers: on seeds 0 to 4, 384 numbers of LoRA are best or
at most 0.02 below the best. At 1152, the better of the two adapters beats LoRA on all these seeds.

Needs          peft/lora_principle.py, model_architecture/attention_mechanism.py
Checked here   the start; what can be merged; accuracy with at most 384 or at most 1152 trained
               numbers beside the head, at two learning rates; the time of a call
TensorBoard    accuracy/none, accuracy/384, accuracy/1152 by step, a run for each method and lr:
               write lr_0.03 into "Filter runs"; in accuracy/none, head ends far below full
Try            in Adapter.__init__, write nn.Identity() for nn.GELU(): what does table 2 say?
Answer         One linear layer is then enough for each adapter too: without f it can be merged
Source         Houlsby et al. 2019, arXiv:1902.00751, section 2.1 (U near 0; here exactly 0); arXiv:
               2110.04366 (parallel), 2106.10199 (BitFit), 2101.00190 (prefix), 2104.08691 (prompt)
"""

import argparse
import copy
import os
import signal
import sys
import threading
import timeit
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "peft" / "adapter_layers"
WIDTH, HEADS = 32, 4  # of the transformer below


# --- 1. in everyday code -----------------------------------------------------------------------


def count(model, trained=False):
    return sum(w.numel() for w in model.parameters() if w.requires_grad or not trained)


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
    print("1. In everyday code: one step of training of an adapter behind a frozen layer")
    layer, adapter = nn.Linear(2, 2).requires_grad_(False), Adapter(d=2, r=1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)  # the adapter alone learns
    x, target, rows = torch.tensor([3.0, 1.0]), torch.tensor([5.0, 1.0]), []
    adapter.f = nn.ReLU()  # from here on numbers to check by eye
    with torch.no_grad():
        for w, values in ((layer.weight, [[1, 0], [0, 1]]), (layer.bias, [0, 0]),
                          (adapter.down.weight, [[1, -1]]), (adapter.down.bias, [0])):  # fmt: skip
            w.copy_(torch.tensor(values))

    print("   y = (3, 1), D = (1, -1), c = 0, f = ReLU, so f(D y + c) = 2")
    print("   loss = |y + A(y) - (5, 1)|^2, lr = 0.05")
    print("   steps   U                e                A(y) = 2 U + e   y + A(y)")
    for step in range(2):
        y = layer(x)
        y_new = y + adapter(y)  # use this in place of y
        loss = (y_new - target).square().sum()
        rows.append([z.tolist() for z in (adapter.up.weight[:, 0], adapter.up.bias,
                                          adapter(y), y_new)])  # fmt: skip
        print(f"   {step}       " + "   ".join(f"({a:5.2f}, {b:5.2f})" for a, b in rows[-1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"   -> the {count(adapter)} numbers of the adapter add {max(map(abs, rows[0][2])):g} at "
          f"first, and after one step {rows[1][2][0]:.2f} of the 2 that are missing")  # fmt: skip
    return rows


# --- 2. behind or beside a layer, and what can be merged ----------------------------------------


class Adapted(nn.Module):
    """`layer` (..., d) -> (..., d) with an adapter of width r, "serial" or "parallel"."""

    def __init__(self, layer, d, r, mode):
        super().__init__()
        if mode not in ("serial", "parallel"):
            raise ValueError(f"mode is serial or parallel, not {mode}")
        if r < 1:
            raise ValueError(f"the width r must be at least 1, not {r}")
        self.layer, self.mode, self.adapter = layer, mode, Adapter(d, r)
        if weights := list(layer.parameters()):
            self.to(weights[0])  # the layer's device and dtype

    def forward(self, x):
        """With y = self.layer(x): y + A(y) if self.mode is "serial", y + A(x) if "parallel". If y
        is not like x: ValueError "an adapted layer keeps the shape: (3, 4), not (3, 1)". Exercise.
        """
        y = self.layer(x)
        if y.shape != x.shape:
            raise ValueError(f"an adapted layer keeps the shape: {(*x.shape,)}, not {(*y.shape,)}")
        return y + self.adapter(x if self.mode == "parallel" else y)


class LowRank(nn.Module):
    """LoRA with alpha = r: base(x) + x A^T B^T, where B = 0 at the start."""

    def __init__(self, base, r):
        super().__init__()
        self.base, A = base, torch.randn(r, base.in_features) / base.in_features**0.5
        self.lora_A = nn.Parameter(A.to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))

    def forward(self, x):
        """x (..., in) -> (..., out): base(x) + x A^T B^T. Exercise."""
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T

    @torch.no_grad()
    def merged(self):
        """A copy of the base layer that does the same alone: its weight plus B A. Exercise."""
        layer = copy.deepcopy(self.base)
        layer.weight += self.lora_B @ self.lora_A
        return layer


@torch.no_grad()
def best_linear(x, y):
    """Outputs (n, m) of the linear layer, bias and all, that is closest to x (n, d) -> y (n, m):
    least squares, by torch.linalg.lstsq on x with a column of ones. Exercise.
    """
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    return ones @ torch.linalg.lstsq(ones, y).solution


def show_layers(d=8, r=3, n=200):
    print("2. What is added to nn.Linear: how does it start, and can it be merged?")
    print("                      change of the      U or B at random:   error of the")
    print("   added              output at start    largest output      best linear layer")
    x, base, rows = torch.randn(n, d), nn.Linear(d, d).requires_grad_(False), {}
    added = {f"{mode} adapter": Adapted(base, d, r, mode) for mode in ("serial", "parallel")}
    for name, model in (added | {"LoRA": LowRank(base, r)}).items():
        start = (model(x) - base(x)).abs().max().item()
        nn.init.normal_(model.lora_B if name == "LoRA" else model.adapter.up.weight)  # as trained
        y = model(x).detach()
        rows[name] = start, y.abs().max().item(), (best_linear(x, y) - y).abs().max().item()
        print(f"   {name:<16}   {start:15g}   {rows[name][1]:16.2f}   {rows[name][2]:18.1e}")
    off = (model.merged()(x) - y).abs().max().item()
    can = [name for name, (_, size, error) in rows.items() if error < 1e-5 * size]
    print(f"   -> at the start the output changes by {max(rows.values())[0]:g}; can be merged: "
          f"{', '.join(can)} (weight W + B A: differs by {off:.0e})")  # fmt: skip
    return rows, off


# --- 3. equal budgets --------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, d=WIDTH, heads=HEADS):
        super().__init__()
        self.heads, self.prefix = heads, None  # (2, P, d)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        """Self-attention (B, T, d) -> (B, T, d): q, k, v by their projections. If self.prefix (2,
        P, d) is not None, prefix[0] comes before the keys, prefix[1] before the values, the same
        for all of the batch. Heads are split (B, H, T, d / H) for F.scaled_dot_product_attention,
        joined again and given to out_proj. Exercise.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.prefix is not None:
            more_k, more_v = self.prefix.unsqueeze(1).expand(2, len(x), -1, -1)  # (B, P, d) each
            k, v = torch.cat([more_k, k], dim=1), torch.cat([more_v, v], dim=1)
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Tokens (B, T, 8) -> logits (B, 4), a number for each class: one block, and a mean."""

    def __init__(self, d=WIDTH):
        super().__init__()
        self.embed, self.attention = nn.Linear(8, d), Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.norm1, self.norm2, self.head = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 4)
        self.prompt = None  # (P, d)

    def forward(self, x):
        T, x = x.size(1), self.embed(x)
        if self.prompt is not None:
            x = torch.cat([self.prompt.expand(len(x), -1, -1), x], dim=1)  # (B, P + T, d)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, -T:].mean(1))  # the mean over the input's own tokens


SIZED = ("serial", "parallel", "lora", "prefix", "prompt")
FIXED = {"head": ("none", 0), "prefix_random": ("none", 18), "prompt_random": ("none", 36),
         "full": ("none", 0), "bitfit": (384, 0)}  # method: budget, size  # fmt: skip


def numbers(method, size):
    """How many numbers a method of SIZED trains beside the head; size is r or P."""
    pair = 2 * (2 * WIDTH * size + size + WIDTH)  # adapters behind attention and behind the MLP
    return {"serial": pair, "parallel": pair, "lora": 2 * size * 2 * WIDTH,
            "prefix": 2 * size * WIDTH, "prompt": size * WIDTH}[method]  # fmt: skip


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
    start = 0.5 * torch.randn(2, size, WIDTH).to(model.embed.weight)
    if method in ("serial", "parallel"):
        model.attention = Adapted(model.attention, WIDTH, size, method)
        model.mlp = Adapted(model.mlp, WIDTH, size, method)
    elif method == "lora":
        model.attention.q_proj = LowRank(model.attention.q_proj, size)
        model.attention.v_proj = LowRank(model.attention.v_proj, size)
    elif method == "bitfit":
        for name, w in model.named_parameters():
            w.requires_grad_(name.endswith("bias") or name.startswith("head"))
    elif method.startswith("prefix"):  # the random ones are added but not trained
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


def sequences(n, prototypes, task):
    """Noisy copies x (n, T, 8) of prototypes (12, T, 8), and labels (n,), for one of two tasks:
    i = torch.randint(12, (n,)), then x = prototypes[i] + 0.8 * torch.randn(...), and the label is
    i // 3 in the task "old", i % 4 in the new one. Exercise.
    """
    which = torch.randint(len(prototypes), (n,))
    x = prototypes[which] + 0.8 * torch.randn(n, *prototypes.shape[1:])
    return x, which // 3 if task == "old" else which % 4


@torch.no_grad()
def accuracy(model, data):
    """The share of data = (x, labels) where model(x) (N, 4) is largest at its label. Exercise."""
    return (model(data[0]).argmax(1) == data[1]).double().mean().item()


def fit(model, prototypes, task, steps, lr, val=None):
    """Adam on what requires a gradient; {step: accuracy on val}, every 20 steps and at the end."""
    optimizer, curve = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr), {}
    for step in range(steps):
        x, labels = sequences(64, prototypes, task)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if val and (step % 20 == 0 or step == steps - 1):
            curve[step] = accuracy(model, val)
    return curve


def show_methods(seed, log_dir, steps, n, budgets, lrs, methods):
    print(f"3. Equal budgets: which method is best after {steps} steps on a second task?")
    torch.manual_seed(seed)
    prototypes, start = torch.randn(12, 6, 8), Transformer()
    fit(start, prototypes, "old", steps, lr=0.01)
    val, rows, models = sequences(n, prototypes, "new"), {}, {"untouched": start}
    print("   random: added but not trained, for comparison;   size: r or P")
    print("                             numbers trained   accuracy after")
    print("   budget   method          size   beside the head   "
          f"{'   '.join(f'lr {lr:<5g}' for lr in lrs)}")  # fmt: skip
    plan = [(budget, method, size) for method, (budget, size) in FIXED.items()]
    plan += [(budget, name, largest_size(name, budget)) for budget in budgets for name in SIZED]
    plan = [row for row in plan if row[1] in methods]
    for budget, method, size in tqdm(plan, leave=False, disable=None):
        scores = []
        for lr in lrs:
            torch.manual_seed(seed)
            models[method] = model = copy.deepcopy(start)  # the last budget and lr stay, for 4.
            prepare(model, method, size)
            curve = fit(model, prototypes, "new", steps, lr, val)
            scores.append(curve[steps - 1])
            name = method if method in FIXED else f"{method}_{budget}"
            with SummaryWriter(log_dir / f"lr_{lr:g}" / name, purge_step=0) as writer:
                for step, value in curve.items():
                    writer.add_scalar(f"accuracy/{budget}", value, step)
        rows[budget, method] = count(model, trained=True) - count(model.head), scores
        tqdm.write(f"   {budget!s:<6}   {method:<13}   {size or '-':>4}   "
                   f"{rows[budget, method][0]:15,}   "
                   f"{'   '.join(f'{score:<8.3f}' for score in scores)}")  # fmt: skip
    for budget in budgets:
        here = {name: max(scores) for (b, name), (_, scores) in rows.items() if b == budget}
        first, *others = sorted(here, key=here.get, reverse=True)
        near = ", ".join(name for name in others if here[name] > here[first] - 0.03) or "none"
        print(f"   -> {budget}, this seed: highest {first} {here[first]:.3f}, within 0.03 {near}; "
              f"head {max(rows['none', 'head'][1]):.3f}")  # fmt: skip
    more = sum(scores[-1] > scores[0] for _, scores in rows.values())
    print(f"   -> {more} of {len(rows)} rows are better at lr {lrs[-1]:g}: tune lr for each method")
    return rows, models, val[0]


# --- 4. what a call costs ----------------------------------------------------------------------


@torch.no_grad()
def show_times(models, x, rounds):
    print("4. What does a call cost? Shortest time, where the untouched network's is 1")
    chosen = {k: model for k, model in models.items() if k in ("untouched", "bitfit", *SIZED)}
    if "lora" in models:
        chosen["lora, merged"] = merged(models["lora"])
    seconds = dict.fromkeys(chosen, float("inf"))
    for name in [*chosen] * rounds:  # in turns, so that a slow moment hits all
        seconds[name] = min(seconds[name], timeit.timeit(lambda m=chosen[name]: m(x), number=1))
    ratios = {name: shortest / seconds["untouched"] for name, shortest in seconds.items()}
    print("   network        its numbers   its tokens    time")
    for name, model in chosen.items():
        tokens = x.size(1) if model.prompt is None else x.size(1) + len(model.prompt)
        print(f"   {name:<12}   {count(model):11,}   {tokens:10}   {ratios[name]:5.2f}")
    same = [name for name, model in chosen.items() if count(model) == count(models["untouched"])]
    print(f"   -> not one number more than before: {' and '.join(same[1:]) or 'none'}")
    if same[1:]:
        print("      They do the same work as untouched. Their time differs from 1.00 by up to "
              f"{max(abs(ratios[name] - 1) for name in same):.2f}:\n      this comes from the "
              "computer, not from the network")  # fmt: skip
    return ratios


def main(seed=0, log_dir=LOG_DIR, steps=200, n=1000, budgets=(384, 1152), lrs=(0.003, 0.03),
         methods=(*FIXED, *SIZED), rounds=200):  # fmt: skip
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "layers": show_layers()}
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
