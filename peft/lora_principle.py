"""LoRA adapts a frozen network nearly as well as training all weights, with far fewer numbers.

To fine-tune means to train a network further, on a new task. Training all weights gives a whole
new network for each task, and Adam keeps two more numbers for every weight. LoRA freezes the
weights, W_0, and learns what is added to them as a product of two thin matrices. The product can
be saved alone, taken off again, or added to W_0 for good (merged), and then it costs no time.

    y = W_0 x + b + (alpha / r) B A x      B starts at 0, so that the network starts as it was
    numbers to train for one layer         r (in + out), where all weights are in * out

    x, y  input and output of a linear layer, of in and out numbers     b  its bias, frozen
    A  (r, in), starts at random     B  (out, r)     r  the rank: an update uses r directions
    alpha  a factor that you choose, as you choose r

The library peft calls these LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
modules_to_save=["head"]). The authors' script for RoBERTa has r = 8, alpha = 16 and lr = 5e-4.

Needs          nn_linear.py, nn_optim.py, model_architecture/attention_mechanism.py
Checked here   plain = complete = a layer of weight W_0 + update; merging; saving; taking off;
               accuracy by rank, alpha and layers; the update of all weights, cut to a low rank
TensorBoard    val/accuracy by step in full, lora_1, lora_4, ... and head: head ends far below;
               cut/accuracy by rank in cut/largest and cut/random; update/singular_value by index
Try            in LoRA.__init__, write torch.ones for torch.zeros: what do tables 1 and 2 say?
Answer         LoRA changes the output before it has learned anything; A moves in the first step
Source         Hu et al. 2022, arXiv:2106.09685, sections 4.1 and 7.3; github.com/microsoft/LoRA
"""

import argparse
import copy
import math
import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / "peft" / "lora_principle"
ALL = ("q_proj", "v_proj", "k_proj", "out_proj", "up", "down")  # layers of the transformer below


# --- 1. in everyday code -----------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer plus (alpha / r) B A. The complete one is LoRALinear, in section 2."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear starts its weight

    def forward(self, x):
        """base(x) + scale x A^T B^T: x (..., in) -> (..., out). Exercise."""
        return self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


def show_everyday():
    print("1. In everyday code: what do two steps of training change in a layer with LoRA?")
    layer = LoRA(nn.Linear(2, 2, bias=False), r=1, alpha=2.0)  # stands where nn.Linear stood
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.05)  # A and B alone learn
    nn.init.eye_(layer.base.weight)  # W_0 and A in numbers to check by eye
    nn.init.eye_(layer.lora_A)
    x, target, table = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0]), []

    print("   x = (1, 2), W_0 = the identity, alpha / r = 2, loss L = |y - (4, 2)|^2 / 2")
    print("   steps   A              B              y = x + 2 B A x  dL/dA          dL/dB")
    for step in range(3):
        y = layer(x)
        loss = (y - target).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        A, B = layer.lora_A, layer.lora_B
        table.append([z.tolist() for z in (A[0], B[:, 0], y, A.grad[0], B.grad[:, 0])])
        a, b, out, da, db = (f"({z[0]:5.2f}, {z[1]:5.2f})" for z in table[-1])
        print(f"   {step}       {a} {b} {out}   {da} {db}")
        optimizer.step()
    first, second = (" and ".join(name for i, name in enumerate("AB") if old[i] != new[i])
                     for old, new in pairwise(table))  # fmt: skip
    frozen = "no gradient" if layer.base.weight.grad is None else "a gradient"
    print(f"   -> the first step moves {first}, the second {second}; W_0 gets {frozen}")
    return table


# --- 2. the complete layer, and merging --------------------------------------------------------


class LoRALinear(LoRA):
    """LoRA with what a project needs: its checks, the layer's dtype and device, merging."""

    def __init__(self, base, r, alpha):
        if not isinstance(base, nn.Linear):
            raise TypeError(f"LoRALinear wraps nn.Linear, not {type(base).__name__}")
        if r < 1:
            raise ValueError(f"the rank r must be at least 1, not {r}")
        super().__init__(base, r, alpha)
        self.to(base.weight)  # its device and dtype

    def delta(self):
        """The update (alpha / r) B A (out, in), computed in float32 at least. Exercise."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)  # so merging rounds only once
        return self.scale * (self.lora_B.to(wide) @ self.lora_A.to(wide))

    @property
    def weight(self):
        """W_0 plus the update, for modules that read it past forward (nn.MultiheadAttention)."""
        return (self.base.weight + self.delta()).to(self.base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias

    @torch.no_grad()
    def merged(self):
        """A new nn.Linear that does the same alone: a copy of base, its weight self.weight.

        self.base stays as it is. Exercise.
        """
        layer = copy.deepcopy(self.base)
        layer.weight.copy_(self.weight)
        return layer


def largest(a, b):
    return (a - b).abs().max().item()


def show_layer():
    print("2. Is the complete layer the same function, and can its update be merged into W_0?")
    base, x = nn.Linear(5, 7).double(), torch.randn(4, 5, dtype=torch.float64)
    plain, layer = LoRA(base, r=2, alpha=3.0).double(), LoRALinear(base, r=2, alpha=3.0)
    off = {"just put on, minus the frozen layer": largest(layer(x), base(x))}
    nn.init.normal_(layer.lora_B)  # as if it had been trained
    plain.load_state_dict(layer.state_dict())
    y, W = layer(x), base.weight + 3.0 / 2 * layer.lora_B @ layer.lora_A
    off["B at random, minus the frozen layer"] = largest(y, base(x))
    off["B at random, minus the plain LoRA"] = largest(y, plain(x))
    off["B at random, minus a layer of W_0 + update"] = largest(y, F.linear(x, W, base.bias))
    off["B at random, minus its merged nn.Linear"] = largest(y, layer.merged()(x))
    print("   output of LoRALinear                         largest difference")
    for name, value in off.items():
        print(f"   {name:<42}   {value:18.1g}")
    start, trained, *twins = off.values()
    print(f"   -> the output changes by {start:.1g} at the start, by {trained:.1g} with B at "
          f"random; its twins differ by {max(twins):.0e}")  # fmt: skip
    return off


# --- 3. put it into a network, save it, take it off --------------------------------------------


def replace_layers(model, kind, targets, make):
    """Put make(layer) in place of each layer of type `kind` whose last name is in `targets` (None:
    any name). Returns the names. A layer in two places is made once and stays one.

    By model.named_modules(remove_duplicate=False), all found before one is replaced, and by
    model.set_submodule(name, new). Exercise.
    """
    places = model.named_modules(remove_duplicate=False)
    found = {name: layer for name, layer in places if isinstance(layer, kind)
             and (targets is None or name.rpartition(".")[2] in targets)}  # fmt: skip
    made = {layer: make(layer) for layer in found.values()}
    for name, layer in found.items():
        model.set_submodule(name, made[layer])
    return list(found)


def add_lora(model, targets, r, alpha):
    """Freeze `model` and put LoRALinear(layer, r, alpha) around its nn.Linear layers whose last
    name is in `targets`: their names. ValueError "no linear layer is named a or b". Exercise.
    """
    model.requires_grad_(False)
    names = replace_layers(model, nn.Linear, targets, lambda layer: LoRALinear(layer, r, alpha))
    if not names:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}")
    return names


def remove_lora(model, merge=False):
    """Take LoRA off, or merge it, so that nn.Linear layers stand alone; all weights learn again."""
    replace_layers(model, LoRALinear, None, lambda layer: layer.merged() if merge else layer.base)
    model.requires_grad_(True)


def lora_state_dict(model):
    """Copies of A and B alone, as {"up.lora_A": ..., "up.lora_B": ...}, without alpha. Exercise."""
    ends = (".lora_A", ".lora_B")
    return {name: w.clone() for name, w in model.state_dict().items() if name.endswith(ends)}


def load_lora(model, state):
    """Load what lora_state_dict gave; ValueError for other layers, RuntimeError for another r."""
    if wrong := sorted(lora_state_dict(model).keys() ^ state.keys()):
        raise ValueError(f"not of this model's adapters: {', '.join(wrong[:3])}")
    model.load_state_dict(state, strict=False)


class Transformer(nn.Module):
    """Tokens (B, T, 8) -> logits (B, 4), a number for each class: attention, MLP and a mean."""

    def __init__(self, d=32, heads=4):
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(8, d)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down, self.head = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Linear(d, 4)

    def forward(self, x):
        x = self.embed(x)
        h = self.norm1(x)
        q, k, v = (
            project(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, d / H)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def count(model):
    return sum(w.numel() for w in model.parameters() if w.requires_grad)


def show_network():
    print("3. Put LoRA of r = 4 into a transformer: what is trained, saved and loaded?")
    print(
        "                                                            other copy's output, minus it"
    )
    print("   target_modules                         numbers   of all   before load_lora   after")
    rows, x = {}, torch.randn(3, 6, 8)
    for targets in (ALL[:2], ALL[:4], ALL):
        model = Transformer()
        other, whole = copy.deepcopy(model), count(model)
        for network in (model, other):
            add_lora(network, targets, r=4, alpha=8)
        nn.init.normal_(model.q_proj.lora_B)  # as if it had been trained
        before = largest(model(x), other(x))
        load_lora(other, lora_state_dict(model))  # or torch.save it, and load it elsewhere
        numbers, after = count(model), largest(model(x), other(x))
        rows[targets] = numbers, before, after
        print(f"   {' '.join(targets):<37}   {numbers:6,}   {numbers / whole:6.1%}   "
              f"{before:16.2f}   {after:5g}")  # fmt: skip
    worst = max(after for *_, after in rows.values())
    print(f"   -> a second task adds {rows[ALL][0] / whole:.0%} of the network's {whole:,} numbers "
          f"or less; loaded, outputs differ by {worst:g}")  # fmt: skip
    return rows


# --- 4. is a low rank enough? ------------------------------------------------------------------


def sequences(n, prototypes, task):
    """Noisy copies x (n, T, 8) of prototypes (12, T, 8), and labels (n,): 3 to a class, regrouped
    for the second task."""
    which = torch.randint(len(prototypes), (n,))
    x = prototypes[which] + 0.8 * torch.randn(n, *prototypes.shape[1:])
    return x, which // 3 if task == "old" else which % 4


@torch.no_grad()
def accuracy(model, data):
    x, labels = data
    return (model(x).argmax(1) == labels).double().mean().item()


def fit(model, prototypes, task, steps, val=None, lr=3e-3):
    """Adam on what requires a gradient; {step: accuracy on val}."""
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=lr)
    curve = {}
    for step in range(steps):
        x, labels = sequences(64, prototypes, task)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if val and (step % 20 == 0 or step == steps - 1):
            curve[step] = accuracy(model, val)
    return curve


METHODS = {  # run: what is trained with the head, target_modules, r, alpha
    "full": ("all weights", None, "-", "-"),
    "lora_8": ("LoRA, all six layers", ALL, 8, 16),
    "lora_4": ("LoRA, all six layers", ALL, 4, 8),
    "lora_1": ("LoRA, all six layers", ALL, 1, 2),
    "lora_4_qv": ("LoRA, q_proj and v_proj", ALL[:2], 4, 8),
    "lora_4_alpha_1": ("LoRA, all six, small alpha", ALL, 4, 1),
    "lora_4_untrained": ("LoRA, network never trained", ALL, 4, 8),
    "head": ("nothing", (), "-", "-"),
}


def adapt(start, untrained, method, prototypes, steps, val):
    """The network after training on the second task, {step: accuracy}, how many numbers learned."""
    model = copy.deepcopy(untrained if method == "lora_4_untrained" else start)
    _, targets, r, alpha = METHODS[method]
    if targets:
        add_lora(model, targets, r, alpha)
    elif method == "head":
        model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model, fit(model, prototypes, "new", steps, val), count(model)


def show_methods(seed, log_dir, steps, n, methods):
    print(f"4. Is a low rank enough? {steps} steps on one task, then {steps} on a second one")
    torch.manual_seed(seed)
    prototypes, start = torch.randn(12, 6, 8), Transformer()
    untrained = copy.deepcopy(start)
    fit(start, prototypes, "old", steps)
    old, new = (sequences(n, prototypes, task) for task in ("old", "new"))
    rows, models = {"before": (accuracy(start, new), accuracy(start, old), 0)}, {}
    print("                                                       accuracy (guessing: 0.25)")
    print("   trained, with the head          r   alpha   numbers   new task   old, LoRA taken off")
    print(f"   not yet trained on it           -       -         0   {rows['before'][0]:8.3f}   "
          f"{rows['before'][1]:19.3f}")  # fmt: skip
    for method in tqdm(methods, leave=False, disable=None):
        torch.manual_seed(seed)
        model, curve, numbers = adapt(start, untrained, method, prototypes, steps, new)
        models[method] = copy.deepcopy(model)
        remove_lora(model)
        model.head.load_state_dict(start.head.state_dict())  # each task has its own head
        rows[method] = curve[steps - 1], accuracy(model, old), numbers
        words, _, r, alpha = METHODS[method]
        tqdm.write(f"   {words:<28} {r:>4}   {alpha:>5}   {numbers:7,}   {rows[method][0]:8.3f}   "
                   f"{rows[method][1]:19.3f}")  # fmt: skip
        with SummaryWriter(log_dir / method, purge_step=0) as writer:
            for step, value in curve.items():
                writer.add_scalar("val/accuracy", value, step)
            if method in ("full", "lora_1", "lora_4", "lora_8"):
                update = models[method].up.weight - start.up.weight
                for i, value in enumerate(torch.linalg.svdvals(update)):
                    writer.add_scalar("update/singular_value", value, i)
    (full, _, whole), (lora, _, part), (head, _, _) = rows["full"], rows["lora_4"], rows["head"]
    print(f"   -> LoRA of r = 4 trains {part / whole:.0%} of the numbers and ends at {lora:.2f}; "
          f"all weights {full:.2f}, the head alone {head:.2f}")  # fmt: skip
    return rows, start, models["full"], new


# --- 5. why is a low rank enough? --------------------------------------------------------------


def cut_to_rank(M, r):
    """The matrix of rank r closest to M (m, n): U_r diag(sigma_r) V_r^T, the first r of its SVD.

    torch.linalg.svd(M, full_matrices=False) gives U, sigma (largest first) and V^T. Exercise.
    """
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :r] * sigma[:r] @ Vh[:r]


def random_directions(M, r):
    """M (m, n) along r random directions, of its output (m) or its input (n), which has fewer."""
    if M.size(0) > M.size(1):
        return random_directions(M.T, r).T
    Q, _ = torch.linalg.qr(torch.randn(M.size(0), M.size(0), dtype=M.dtype))  # m directions
    return Q[:, :r] @ Q[:, :r].T @ M


@torch.no_grad()
def show_why(log_dir, start, full, val, ranks=(0, 1, 2, 4, 8, 16, 32)):
    print("5. Why? The update of all weights, W - W_0 of six layers, cut to r of 32 directions")
    print("          share of its squares kept         accuracy on the new task")
    print("    r     largest   random directions       largest   random directions")
    rows = {}
    for r in ranks:
        for run, cut in (("largest", cut_to_rank), ("random", random_directions)):
            model, kept, whole = copy.deepcopy(full), 0.0, 0.0
            for name in ALL:
                W, W_0 = model.get_submodule(name).weight, start.get_submodule(name).weight
                update = W - W_0
                part = cut(update, r)
                kept, whole = kept + part.square().sum(), whole + update.square().sum()
                W.copy_(W_0 + part)
            rows[r, run] = (kept / whole).item(), accuracy(model, val)
        (share, score), (by_chance, null) = rows[r, "largest"], rows[r, "random"]
        print(f"   {r:2}   {share:9.2f}   {by_chance:17.2f}   {score:11.3f}   {null:17.3f}")
    for run in ("largest", "random"):
        with SummaryWriter(log_dir / "cut" / run, purge_step=0) as writer:
            for r in ranks:
                writer.add_scalar("cut/accuracy", rows[r, run][1], r)
    enough = next(r for r in ranks if rows[r, "largest"][1] > rows[32, "largest"][1] - 0.05)
    best, null = rows[enough, "largest"][1], rows[enough, "random"][1]
    print(f"   -> the {enough} largest directions of each update give {best:.2f}, all 32 "
          f"{rows[32, 'largest'][1]:.2f}, {enough} random ones {null:.2f}")  # fmt: skip
    return rows


def main(seed=0, log_dir=LOG_DIR, steps=300, n=2000, methods=tuple(METHODS)):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "layer": show_layer(), "network": show_network()}
    measured["methods"], start, full, val = show_methods(seed, log_dir, steps, n, methods)
    measured["cut"] = show_why(log_dir, start, full, val)
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
