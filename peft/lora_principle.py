"""LoRA learns a new task by an update B A of rank r to frozen weights; off, it leaves no trace.

    y = x W^T + b,   W = W_0 + (alpha / r) B A        A (r, in), B (out, r): r (in + out) numbers

B starts at 0, so that the network starts as it was; then dL/dA = (alpha / r) B^T dL/dW is 0 too,
and the first step moves B alone. A starts at random, or nothing would ever move. Merged into W the
update costs no time. Since alpha / r divides by r, alpha is what one keeps when r changes.

Checked here   output bit-equal at the start; the gradients of A, B and W_0; the first step; merging
               and unmerging; the rank by singular values; a transformer trained on one task, and
               adapted to another by all weights, by LoRA of rank 1 to 8, by its head: accuracy,
               parameters, Adam's memory; the old task after taking LoRA off; an adapter-only file
TensorBoard    val/accuracy by step in full, head, lora_1 … lora_8; lora/singular_value by index in
               lora_1 … (those of one update: r of them are not 0)
Try            B at random as well as A: what does the first output lose? Its equality with W_0's
Source         Hu et al. 2022, arXiv:2106.09685, section 4.1
"""

import argparse
import copy
import io
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
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "up", "down")


# --- LoRA --------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer `base` plus (alpha / r) B A. TypeError for another layer, ValueError
    for r < 1."""

    def __init__(self, base, r, alpha):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"LoRALinear wraps nn.Linear, not {type(base).__name__}")
        if r < 1:
            raise ValueError(f"the rank r must be at least 1, not {r}")
        self.base, self.r, self.alpha = base.requires_grad_(False), r, alpha
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear starts its weight
        self.register_buffer("kept", None, persistent=False)  # W_0, while merged

    @property
    def merged(self):
        return self.kept is not None

    def delta(self):
        """(alpha / r) B A (out, in), in float32 at least: merging into a half rounds only once.

        Exercise.
        """
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.alpha / self.r * (self.lora_B.to(wide) @ self.lora_A.to(wide))

    @property
    def weight(self):
        """W, for modules that read it past forward, as nn.MultiheadAttention its out_proj's."""
        W = self.base.weight
        return W if self.merged else (W + self.delta()).to(W.dtype)

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        """base(x) + (alpha / r) x A^T B^T, or base(x) alone while merged. Exercise."""
        y = self.base(x)
        if self.merged:
            return y
        return y + self.alpha / self.r * (x @ self.lora_A.T @ self.lora_B.T)

    @torch.no_grad()
    def merge(self):
        """Add the update to the weight, of which a copy is kept; a second call does nothing.

        The copy of W_0 goes to self.kept; self.base.weight becomes self.weight, in place. Exercise.
        """
        if not self.merged:
            W = self.weight
            self.kept = self.base.weight.clone()
            self.base.weight.copy_(W)

    @torch.no_grad()
    def unmerge(self):
        """Put W_0 back, bit for bit (subtracting would leave rounding), if merged.

        Copy self.kept into self.base.weight; self.kept is None again. Exercise.
        """
        if self.merged:
            self.base.weight.copy_(self.kept)
            self.kept = None


def replace_layers(model, wanted, make):
    """Put make(layer) in place of every layer for which wanted(name, layer): the names.

    Over named_modules(remove_duplicate=False), all found before any is replaced; a layer in two
    places is made once and stays one. setattr on the parent, which get_submodule finds. Exercise.
    """
    places = model.named_modules(remove_duplicate=False)
    found = [(name, layer) for name, layer in places if wanted(name, layer)]
    made = {layer: make(layer) for _, layer in found}  # a layer in two places stays one
    for name, layer in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[layer])
    return [name for name, _ in found]


def add_lora(model, targets, r, alpha):
    """Freeze `model` and wrap its linear layers whose last name is in `targets`: their names.

    By replace_layers and LoRALinear(layer, r, alpha). ValueError "no linear layer is named a or b"
    if none is. Exercise.
    """
    model.requires_grad_(False)
    names = replace_layers(
        model,
        lambda name, layer: isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets,
        lambda layer: LoRALinear(layer, r, alpha),
    )
    if not names:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}")
    return names


def remove_lora(model):
    """Take the updates off: the frozen layers stand alone again."""

    def bare(layer):
        layer.unmerge()
        return layer.base

    return replace_layers(model, lambda _, layer: isinstance(layer, LoRALinear), bare)


def lora_state_dict(model):
    """A copy of the updates alone: {name.lora_A: …, name.lora_B: …}; alpha is not in it.

    Copies, which do not move when the model learns on. Exercise.
    """
    ends = (".lora_A", ".lora_B")
    return {name: w.clone() for name, w in model.state_dict().items() if name.endswith(ends)}


def load_lora(model, state):
    """Load what lora_state_dict gave; ValueError where names or shapes differ, or if merged."""
    if any(isinstance(layer, LoRALinear) and layer.merged for layer in model.modules()):
        raise ValueError("unmerge the model before an adapter is loaded")
    own = lora_state_dict(model)
    shapes, given = ({name: w.shape for name, w in part.items()} for part in (own, state))
    wrong = [name for name in sorted(own | state) if shapes.get(name) != given.get(name)]
    if wrong:
        raise ValueError(f"not of this model's adapters: {', '.join(wrong[:3])}")
    model.load_state_dict(state, strict=False)


# --- a network and two tasks -------------------------------------------------------------------


class Transformer(nn.Module):
    """Tokens (B, T, 8) -> logits (B, 4): one block of attention and MLP, and a mean."""

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


def sequences(n, prototypes, task):
    """Noisy copies x (n, T, 8) of prototypes (12, T, 8), and labels (n,): 3 to a class, regrouped
    for the second task."""
    which = torch.randint(len(prototypes), (n,))
    x = prototypes[which] + 0.8 * torch.randn(n, *prototypes.shape[1:])
    return x, which // 3 if task == "old" else which % 4


def accuracy(model, data):
    x, labels = data
    with torch.no_grad():
        return (model(x).argmax(1) == labels).double().mean().item()


def fit(model, prototypes, task, steps, lr, val=None):
    """Adam on what requires a gradient; {step: validation accuracy}, and the numbers Adam keeps."""
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer, curve = torch.optim.Adam(trained, lr=lr), {}
    for step in range(steps):
        x, labels = sequences(64, prototypes, task)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if val and (step % 20 == 0 or step == steps - 1):
            curve[step] = accuracy(model, val)
    numbers = sum(
        s.numel() for state in optimizer.state.values() for s in state.values() if s.dim()
    )
    return curve, numbers


# --- the sections ------------------------------------------------------------------------------


def show_layer(out=7, inside=5, r=2, alpha=3.0):
    print(f"1. one layer ({out}, {inside}), r = {r}, alpha = {alpha:g}")
    base = nn.Linear(inside, out).double()
    x, W_0 = torch.randn(4, inside, dtype=torch.float64), base.weight.detach().clone()
    layer = LoRALinear(base, r, alpha)
    off = (layer(x) - F.linear(x, W_0, base.bias)).abs().max().item()
    layer(x).square().sum().backward()
    grads = {"A": layer.lora_A.grad, "B": layer.lora_B.grad}
    frozen = base.weight.grad is None
    assert off == 0 and frozen and (grads["A"] == 0).all() and (grads["B"] != 0).all()
    print(f"   start      output off by {off:g}   |dL/dA| {grads['A'].norm():g}   |dL/dB| "
          f"{grads['B'].norm():.2f}   dL/dW_0 {'none' if frozen else 'there'}")  # fmt: skip
    A = layer.lora_A.detach().clone()
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.1)
    optimizer.step()
    moved = (layer.lora_A - A).norm()
    assert moved == 0 and layer.lora_B.abs().max() > 0
    y = layer(x)
    layer.merge()
    off = (layer(x) - y).abs().max().item()
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)
    layer.unmerge()
    back = (layer.base.weight - W_0).abs().max()
    assert back == 0
    print(f"   step 1     A moved by {moved:g}   |B| {layer.lora_B.norm():.2f}")
    print(f"   merged     output off by {off:.0e}   unmerged: W_0 off by {back:g}")


def adapt(start, method, prototypes, steps, val):
    """A copy of `start` on the new task: the model, its curve, trained and Adam's numbers."""
    model = copy.deepcopy(start)
    if method == "head":
        model.requires_grad_(False)
    elif method != "full":
        r = int(method.removeprefix("lora_"))
        add_lora(model, TARGETS, r, alpha=4.0)
    model.head.requires_grad_(True)  # every method learns the new classes' head
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    curve, memory = fit(model, prototypes, "new", steps, 3e-3, val)
    return model, curve, trained, memory


def singular_values(model):
    """Those of the update of the widest layer, `up`, largest first."""
    return torch.linalg.svdvals(model.up.delta().detach().double())


def show_adaptation(seed, log_dir, steps, ranks):
    print(f"2. adapting a transformer, {steps} steps: accuracy on the new task, what is trained")
    torch.manual_seed(seed)
    prototypes = torch.randn(12, 6, 8)
    start = Transformer()
    fit(start, prototypes, "old", steps, 3e-3)
    old, new = (sequences(4000, prototypes, task) for task in ("old", "new"))
    before, rows = accuracy(start, old), {}
    print(f"   before   old task {before:.3f}   new task {accuracy(start, new):.3f}")
    for method in tqdm(("full", *(f"lora_{r}" for r in ranks), "head"), leave=False, disable=None):
        torch.manual_seed(seed)
        model, curve, trained, memory = adapt(start, method, prototypes, steps, new)
        assert memory == 2 * trained  # Adam's m and v
        row = rows[method] = {"accuracy": curve[steps - 1], "trained": trained}
        with SummaryWriter(log_dir / method, purge_step=0) as writer:
            for step, value in curve.items():
                writer.add_scalar("val/accuracy", value, step)
            if method.startswith("lora"):
                values = singular_values(model)
                for i, value in enumerate(values[:12]):
                    writer.add_scalar("lora/singular_value", value, i)
                row["rank"] = int((values > 1e-5 * values[0]).sum())
                assert row["rank"] <= int(method[5:])
        row["old"] = restored(model, start, old)
        rank = f"   rank {row['rank']}" if "rank" in row else ""
        tqdm.write(f"   {method:<7}  {row['accuracy']:.3f}   trained {trained:6,}   "
                   f"Adam {memory:6,}   old task {row['old']:.3f}{rank}")  # fmt: skip
    assert all(row["old"] == before for name, row in rows.items() if name != "full")
    return {"before": before, "rows": rows}


def restored(model, start, old):
    """Accuracy on the old task with LoRA taken off and the old head put back."""
    model = copy.deepcopy(model)
    remove_lora(model)
    model.head.load_state_dict(start.head.state_dict())
    return accuracy(model, old)


def size_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue()), file


def show_file(r=4):
    print(f"3. an adapter-only file, r = {r}")
    model = Transformer()
    names = add_lora(model, TARGETS, r, alpha=8.0)
    for w in (w for w in model.parameters() if w.requires_grad):
        nn.init.normal_(w)
    size, file = size_of(lora_state_dict(model))
    whole, _ = size_of(model.state_dict())
    other = copy.deepcopy(model)
    for w in (w for w in other.parameters() if w.requires_grad):
        nn.init.zeros_(w)
    file.seek(0)
    load_lora(other, torch.load(file, weights_only=True))
    x = torch.randn(3, 6, 8)
    assert torch.equal(model(x), other(x))
    print(
        f"   {len(names)} layers   {size:,} bytes of {whole:,}   loaded: outputs equal bit for bit"
    )
    return size, whole


def main(seed=0, log_dir=LOG_DIR, steps=400, ranks=(1, 2, 4, 8)):
    torch.manual_seed(seed)
    show_layer()
    adapted = show_adaptation(seed, log_dir, steps, ranks)
    return {"adapted": adapted, "bytes": show_file()}


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
