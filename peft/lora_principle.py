"""LoRA adapts a small frozen network nearly as well as training all weights, with 19% of them.

To fine-tune means to train a network further, on a new task. Training all weights gives a whole
new network for each task, and Adam keeps two more numbers for every weight. LoRA freezes the
weights, W_0, and learns what is added to them as a product of two thin matrices. The product can
be saved alone, taken off again, or added to W_0 for good (merged), and then it costs no time.

    y = W_0 x + b + (alpha / r) B A x      B starts at 0, so that the network starts as it was
    numbers to train for one layer         r (in + out), where all weights are in * out

    x, y  input and output of a linear layer, of in and out numbers     b  its bias, frozen
    A  (r, in), starts at random     B  (out, r)     alpha  a factor that you choose
    r  the rank: B A x is always a sum of r fixed vectors, the columns of B. These are directions.

The library peft calls these LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
modules_to_save=["head"]). The authors' script for RoBERTa base: r = 8, alpha = 16, lr = 5e-4.

Needs          nn_linear.py, nn_optim.py, model_architecture/attention_mechanism.py
Checked here   plain = complete = a layer of weight W_0 + update; merging; saving; taking off;
               accuracy by rank, alpha and layers; the update of all weights, cut to a low rank
TensorBoard    val/accuracy by step: full, lora_1, ...; head, the last layer alone, ends far below;
               update/singular_value by index: full falls fast, lora_4 is 0 from index 4 on
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
    print("   x = (1, 2), W_0 = the identity, alpha / r = 2, L = |y - (4, 2)|^2 / 2, lr = 0.05")
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
    moved = [" and ".join(name for i, name in enumerate("AB") if table[k][i] != table[k + 1][i])
             for k in range(2)]  # fmt: skip
    print(f"   -> the first step moves {moved[0]}, the second {moved[1]}; the gradient of W_0 is "
          f"{layer.base.weight.grad}")  # fmt: skip
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

    weight = property(lambda self: (self.base.weight + self.delta()).to(self.base.weight.dtype))
    bias = property(lambda self: self.base.bias)  # torch's own transformers read these two

    @torch.no_grad()
    def merged(self):
        """A copy of self.base that does the same alone: its weight is self.weight. Exercise."""
        layer = copy.deepcopy(self.base)
        layer.weight.copy_(self.weight)
        return layer


def largest(a, b):
    return (a - b).abs().max().item()


def show_layer():
    print("2. What does LoRA change in a layer, and can its update be merged into W_0?")
    base, x = nn.Linear(5, 7).double(), torch.randn(4, 5, dtype=torch.float64)
    layer = LoRALinear(base, r=2, alpha=3.0)
    off = {"just put on, and the frozen layer": largest(layer(x), base(x))}
    nn.init.normal_(layer.lora_B)  # as if it had been trained
    off["B at random, and the frozen layer"] = largest(layer(x), base(x))
    off["B at random, and its merged nn.Linear"] = largest(layer(x), layer.merged()(x))
    print("   layer with LoRA                         largest difference of outputs")
    for name, value in off.items():
        print(f"   {name:<37}   {value:29.2g}")
    start, trained, merged = off.values()
    print(f"   -> LoRA changes the output by {start:.2g} at the start, by {trained:.2g} with B at "
          f"random; merged it differs by {merged:.0e}")  # fmt: skip
    return off


# --- 3. put it into a network, save it, take it off --------------------------------------------


def replace_layers(model, kind, targets, make):
    """Put make(layer) in place of each layer of type `kind` whose last name is in `targets` (None:
    any name); a layer in two places is made once. Returns the names. First find all by
    model.named_modules(remove_duplicate=False), then model.set_submodule(name, new). Exercise.
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
    name is in `targets`. Returns their names. For targets (a, b) that name none it raises
    ValueError "no linear layer is named a or b". Exercise.
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
    return {name: w.clone() for name, w in model.state_dict().items() if ".lora_" in name}


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
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, d / H)
                   for z in (self.q_proj(h), self.k_proj(h), self.v_proj(h)))  # fmt: skip
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def count(model):
    return sum(w.numel() for w in model.parameters() if w.requires_grad)


def show_network():
    print("3. Put LoRA of r = 4 into a transformer: what is trained, saved and loaded?")
    print("                                         numbers           a second copy is off by")
    print("   target_modules                        in A, B   of all   before load_lora   after it")
    rows, x = {}, torch.randn(3, 6, 8)
    for targets in (ALL[:2], ALL[:4], ALL):
        model = Transformer()
        other, whole = copy.deepcopy(model), count(model)
        for network in (model, other):
            add_lora(network, targets, r=4, alpha=8)
        for name, w in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(w)  # as if it had been trained
        before = largest(model(x), other(x))
        load_lora(other, lora_state_dict(model))  # or torch.save it, and load it elsewhere
        numbers, after = count(model), largest(model(x), other(x))
        rows[targets] = numbers, before, after
        print(f"   {' '.join(targets):<37} {numbers:7,}   {numbers / whole:6.1%}   "
              f"{before:16.2f}   {after:8g}")  # fmt: skip
    print(f"   -> a second task adds {rows[ALL][0] / whole:.0%} of {whole:,} numbers or less; a "
          f"loaded copy is off by {max(after for *_, after in rows.values()):g}")  # fmt: skip
    return rows


# --- 4. is a low rank enough? ------------------------------------------------------------------


def sequences(n, prototypes, task):
    """Noisy prototypes x (n, T, 8), labels (n,): 3 to a class, regrouped for the second task."""
    which = torch.randint(len(prototypes), (n,))
    x = prototypes[which] + 0.8 * torch.randn(n, *prototypes.shape[1:])
    return x, which // 3 if task == "old" else which % 4


@torch.no_grad()
def accuracy(model, data):
    return (model(data[0]).argmax(1) == data[1]).double().mean().item()


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
    "lora_4": ("LoRA, all six layers", ALL, 4, 8),
    "lora_1": ("LoRA, all six layers", ALL, 1, 2),
    "lora_4_qv": ("LoRA, q_proj and v_proj", ALL[:2], 4, 8),
    "lora_4_alpha_1": ("LoRA, all six, smaller steps", ALL, 4, 1),
    "lora_4_untrained": ("LoRA, network never trained", ALL, 4, 8),
    "head": ("nothing but the head", (), "-", "-"),
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
    print("   head: the last layer; accuracy by guessing 0.25, with the other task's answers 0.33")
    print("                                                         accuracy   old task: old head,")
    print("   trained, with the head          r   alpha   numbers   new task   LoRA taken off")
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
        again = "-" if method == "lora_4_untrained" else f"{rows[method][1]:.3f}"
        tqdm.write(f"   {words:<28} {r:>4}   {alpha:>5}   {numbers:7,}   {rows[method][0]:8.3f}   "
                   f"{again:>19}")  # fmt: skip
        with SummaryWriter(log_dir / method, purge_step=0) as writer:
            for step, value in curve.items():
                writer.add_scalar("val/accuracy", value, step)
            if method in ("full", "lora_1", "lora_4"):
                update = models[method].up.weight - start.up.weight
                for i, value in enumerate(torch.linalg.svdvals(update)):
                    writer.add_scalar("update/singular_value", value, i)
    (full, _, whole), (lora, _, part), (head, _, _) = rows["full"], rows["lora_4"], rows["head"]
    print(f"   -> LoRA of r = 4 trains {part / whole:.0%} of the numbers and ends at {lora:.2f}; "
          f"all weights {full:.2f},\n      the head alone {head:.2f}, LoRA on a network that was "
          f"never trained {rows['lora_4_untrained'][0]:.2f}")  # fmt: skip
    return rows, start, models["full"], new


# --- 5. why is a low rank enough? --------------------------------------------------------------


def cut_to_rank(M, r):
    """The matrix of rank r closest to M (..., m, n): U_r diag(sigma_r) V_r^T. torch.linalg.svd(M,
    full_matrices=False) writes M as a sum of matrices of rank 1, largest first. Exercise."""
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[..., :r] * sigma[..., None, :r] @ Vh[..., :r, :]


@torch.no_grad()
def show_why(start, full, val, ranks=(0, 1, 2, 4, 8, 16, 32)):
    print("5. Why? The update of all weights, W - W_0 of six layers, cut to r of 32 directions")
    print("   all other weights, the head too: as trained on the new task")
    print("    r   share of its squares kept    same share, for random noise   accuracy, new task")
    rows = {}
    for r in ranks:
        model, kept, whole = copy.deepcopy(full), torch.zeros(2), torch.zeros(2)
        for name in ALL:
            W, W_0 = model.get_submodule(name).weight, start.get_submodule(name).weight
            both = torch.stack([W - W_0, torch.randn_like(W)])
            cut = cut_to_rank(both, r)
            W.copy_(W_0 + cut[0])
            kept, whole = kept + cut.square().sum((1, 2)), whole + both.square().sum((1, 2))
        rows[r] = *(kept / whole).tolist(), accuracy(model, val)
        print("   {:2}   {:25.2f}   {:29.2f}   {:18.3f}".format(r, *rows[r]))
    enough = next(r for r in ranks if rows[r][2] > rows[32][2] - 0.05)
    print("   -> {} of 32 directions keep {:.2f} of the update, {:.2f} of noise, and give {:.2f}, "
          "all 32 {:.2f}".format(enough, *rows[enough], rows[32][2]))  # fmt: skip
    return rows


def main(seed=0, log_dir=LOG_DIR, steps=300, n=2000, methods=tuple(METHODS)):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "layer": show_layer(), "network": show_network()}
    measured["methods"], *networks_and_data = show_methods(seed, log_dir, steps, n, methods)
    measured["cut"] = show_why(*networks_and_data)
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
