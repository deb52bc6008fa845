"""backward() walks over the nodes that the forward pass left; a small class of ours does it, too.

An operation on a tensor that requires grad leaves a node. The node knows its inputs and how to hand
a gradient back to them. backward() visits a node after all that used it, and adds the gradients
that arrive along several paths. A node keeps the values that its derivative needs, so training pays
memory for every layer. If one of them changes before backward(), the gradient is wrong: PyTorch
counts edits in place and refuses, unless an edit goes around its count, as `.data` and NumPy do.

    z = w x,  L = z (z + b)        dL/dz = (z + b) + z, by two paths;  dL/dw = x dL/dz,  dL/db = z
    D layers act(a W) keep (D + 1) B n numbers if act is relu, 2 D B n if it is silu; weights are
    not counted, the + 1 is the input of layer 1

    w, b   parameters    x   a constant    a   activations (B, n): B examples, n units    W (n, n)
    act    a function of each number: relu(t) = max(0, t); silu(t) = t / (1 + e^-t)

relu keeps its result, which the next layer keeps anyway; silu keeps its input, and the next layer
keeps its result: two. The graph is what ran and not a plan: four rounds of a loop leave four nodes.

Needs          02_autograd_basics.py
Checked here   the gradients of L by a Value class of ours = by backward() = by hand; detach() and
               .data; what operations and layers keep; a second backward(); a node per round
TensorBoard    memory/kept_floats by depth D in the runs relu, silu, no_grad: three straight lines;
               graph/tree as text in the run tree: L, then the loop after 0, 1, 4 and 7 rounds
Try            in Value.backward, put = for += : which gradient goes wrong, and why?
Answer         dL/dw is 18, not 39, and dL/dx 12, not 26: z was used twice, and one use overwrites
               the other
Source         Griewank & Walther 2008, Evaluating Derivatives, chapter 3; Karpathy 2020, micrograd;
               PyTorch notes, "Autograd mechanics"
"""

import math
import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "03_computational_graph"


# --- 1. in everyday code -----------------------------------------------------------------------


def tree(node, leaves, depth=0, numbers=None):
    """Lines that draw the graph, inputs indented below; a node met again is only a number."""
    numbers = {} if numbers is None else numbers
    if node is None or node in numbers:
        return ["  " * depth + ("None" if node is None else f"{numbers[node]} again")]
    numbers[node] = len(numbers)
    name = [name for name, leaf in leaves.items() if leaf is getattr(node, "variable", None)]
    lines = ["  " * depth + " ".join([str(numbers[node]), node.name().split(":")[-1], *name])]
    for parent, _ in node.next_functions:  # one for each input; None where none is needed
        lines += tree(parent, leaves, depth + 1, numbers)
    return lines


def show_graph():
    w, b = (torch.tensor(value, requires_grad=True) for value in (2.0, 1.0))
    x = torch.tensor(3.0)
    z = w * x
    L = z * (z + b)
    print("1. Which nodes did z = w * x and L = z * (z + b) leave? w = 2, b = 1, x = 3")
    print(f"   L.grad_fn                   {L.grad_fn.name()}")
    print(f"   its next_functions          {[node.name() for node, _ in L.grad_fn.next_functions]}")
    print("   and so on, each node's inputs indented below it, None for the constant x:")
    rows = tree(L.grad_fn, {"w": w, "b": b})
    for row in rows:
        print(f"   {row}")
    L.backward()
    print(
        "   (Mul, Add: products and sums; AccumulateGrad w: the end, which adds to w.grad; 1 again:"
    )
    print("   node 1, drawn above)")
    again = next(row.split()[0] for row in rows if "again" in row)
    print(
        f"   -> node {again} (z = {z:.0f}) has two uses; w.grad {w.grad:.0f}, b.grad {b.grad:.0f}"
    )
    return rows


# --- 2. backward() of one's own ----------------------------------------------------------------


class Value:
    """A number that remembers its sources: what it was made from, with its derivative by each."""

    def __init__(self, data, sources=()):
        self.data, self.sources, self.grad = data, sources, 0.0

    def __add__(self, other):
        return Value(self.data + other.data, [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        """The product as a Value; its sources are (self, slope) and (other, slope). Exercise."""
        return Value(self.data * other.data, [(self, other.data), (other, self.data)])

    def backward(self):
        """Set self.grad to 1. Then each value adds its grad times the slope to its sources' grads.

        It does so after all values that used it: self first, and the others in reversed order().
        Exercise.
        """
        self.grad = 1.0
        for value in reversed(self.order()):
            for source, slope in value.sources:
                source.grad += value.grad * slope

    def order(self, found=None):
        """A dict: its keys are what self was made from, sources first, then self. Exercise."""
        found = {} if found is None else found  # a dict keeps the order, and each value once
        if self not in found:
            for source, _ in self.sources:
                source.order(found)
            found[self] = True
        return found


def f(w, b, x):
    """The L of section 1, for Values as for tensors."""
    z = w * x
    return z * (z + b)


def show_own():
    own = Value(2.0), Value(1.0), Value(3.0)
    f(*own).backward()
    theirs = [torch.tensor(value.data, requires_grad=True) for value in own]
    f(*theirs).backward()
    w, b, x = (value.data for value in own)
    by_hand = x * (2 * w * x + b), w * x, w * (2 * w * x + b)
    print("2. Does our own Value find the gradients of L at w = 2, b = 1, x = 3?")
    print("            our Value   backward()   by hand")
    for name, a, c, law in zip("wbx", own, theirs, by_hand, strict=True):
        print(f"   dL/d{name}   {a.grad:10.4f}   {c.grad:10.4f}   {law:7.4f}")
    off = [abs(a.grad - c.grad.item()) for a, c in zip(own, theirs, strict=True)]
    print(f"   -> Value and backward() differ by {max(off):g}")
    return [value.grad for value in own]


# --- 3. detach() and .data ---------------------------------------------------------------------


def refusal(action):
    """What the RuntimeError says that an action raises; "" if it raises none."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def show_twins():
    s = torch.tensor(0.3).sigmoid()
    right = (s * (1 - s)).item()
    print(f"3. y = sigmoid(w), then a tensor made from y is set to 0. Is dy/dw still {right:.4f}?")
    print("   made from y          memory   edits y counted      w.grad   verdict")
    verdicts = {}
    for code in ("y.detach()", "y.data", "y.detach().clone()"):
        w = torch.tensor(0.3, requires_grad=True)
        y = w.sigmoid()
        twin = eval(code, {"y": y})  # the code that the row shows
        twin.zero_()
        memory = "shared" if twin.data_ptr() == y.data_ptr() else "its own"
        if refusal(y.backward):
            grad, verdicts[code] = "", "refused"
        else:
            grad, off = f"{w.grad:.4f}", (w.grad - right).abs().item()
            verdicts[code] = "right" if off < 1e-6 else "wrong, and silent"
        print(f"   {code:<18}   {memory:<7}  {y._version:18}   {grad:6}   {verdicts[code]}")
    silent = [code for code, verdict in verdicts.items() if verdict == "wrong, and silent"]
    seen = " ".join(silent)
    print(f"   -> sigmoid keeps y for backward(); of these only {seen} changes it unnoticed")
    z = torch.tensor(3.0, requires_grad=True)
    (z * z.detach()).backward()
    print(f"   -> detach() makes a constant: z * z.detach() at z = 3 has slope {z.grad:g}, not 6")
    return {"verdicts": verdicts, "slope": z.grad.item()}


# --- 4. what is kept in memory -----------------------------------------------------------------


def kept_by(action, *args):
    """A list of the tensors that the nodes of action(*args) keep for backward().

    In a `with saved_tensors_hooks(pack, unpack):` autograd calls pack(tensor) for each tensor that
    it keeps, holds what pack returns, and calls unpack(that) when backward() needs it. Exercise.
    """
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        action(*args)
    return kept


def show_kept():
    w, v, x = (torch.rand(3, requires_grad=grad) for grad in (True, True, False))
    print("4. What does y keep for backward(), and what does a second y.sum().backward() do?")
    print("   y (x: a constant)   tensors kept   2nd backward()   2nd, after retain_graph=True")
    kept, second = {}, {}
    for code in ("w + v", "w * v", "w * x", "w.exp()"):
        kept[code] = len(kept_by(eval, code, {"w": w, "v": v, "x": x}))
        for retain in (False, True):
            w.grad, y = None, eval(code)
            y.sum().backward(retain_graph=retain)
            first = w.grad.clone()
            said = refusal(y.sum().backward)
            second[code, retain] = (
                "refused" if said else f".grad is {(w.grad / first).mean():.0f} times"
            )
        print(f"   {code:<17}   {kept[code]:12}   {second[code, False]:<14}   {second[code, True]}")
    freed = [code for code in kept if second[code, False] == "refused"]
    print(f"   -> backward() frees what was kept: {len(freed)} of {len(kept)} refuse a second one")
    return {"tensors": kept, "second": second}


# --- 5. memory by depth ------------------------------------------------------------------------


def layers(a, weights, activation):
    for W in weights:
        a = activation(a @ W)  # (B, n)
    return a


def kept_floats(a, weights, activation):
    """Numbers kept by `layers` beside the weights, each memory counted once."""
    own = {W.untyped_storage().data_ptr() for W in weights}
    kept = kept_by(layers, a, weights, activation)
    counts = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
    return sum(count for memory, count in counts.items() if memory not in own)


def show_memory(log_dir, batch, width, depth):
    a = torch.randn(batch, width)
    weights = [torch.randn(width, width).requires_grad_() for _ in range(depth)]
    print(f"5. How many numbers do D layers keep? B n = {batch} x {width} = {batch * width}")
    print("   run         D       kept   by formula")
    kept = {"relu": [], "silu": [], "no_grad": []}
    for run, counts in kept.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for D in range(1, depth + 1):
                with torch.set_grad_enabled(run != "no_grad"):
                    counts.append(kept_floats(a, weights[:D], F.silu if run == "silu" else F.relu))
                writer.add_scalar("memory/kept_floats", counts[-1], D)
                law = {"relu": D + 1, "silu": 2 * D, "no_grad": 0}[run] * batch * width
                if D in (depth // 2, depth):
                    print(f"   {run:<7}   {D:3}   {counts[-1]:8}   {law:10}")
                assert counts[-1] == law
    relu, silu, none = ((counts[-1] - counts[-2]) / (batch * width) for counts in kept.values())
    print(f"   -> a layer more keeps {relu:g} B n (relu), {silu:g} B n (silu), {none:g} (no_grad)")
    return kept


# --- 6. a graph is what ran --------------------------------------------------------------------


def show_loop():
    print("6. How long is the graph of a loop? y = x, then y = 2 * y while y < 10")
    print("   x       nodes of 2 * y   rounds by theory  x.grad   2^rounds")
    drawn, counts = [], []
    for start in (10.0, 6.0, 1.0, 0.1):
        x = y = torch.tensor(start, requires_grad=True)
        while y < 10:
            y = 2 * y
        rows = tree(y.grad_fn, {"x": x})
        counts.append(sum("Mul" in row for row in rows))
        drawn.append([f"y = {start:g}, doubled {counts[-1]} times", *rows])
        turns = max(0, math.ceil(math.log2(10 / start)))
        y.backward()
        print(f"   {start:<5g}   {counts[-1]:14}   {turns:15}   {x.grad:6.0f}   {2**turns:7}")
        assert counts[-1] == turns and x.grad == 2**turns
    print(f"   -> {counts} nodes from the same code: the graph is what ran")
    return {"drawn": drawn, "counts": counts}


def main(seed=0, log_dir=LOG_DIR, batch=32, width=64, depth=16):
    torch.manual_seed(seed)
    rows = show_graph()
    measured = {"own": show_own(), **show_twins(), **show_kept()}
    measured |= {"kept": show_memory(log_dir, batch, width, depth), **show_loop()}
    with SummaryWriter(log_dir / "tree", purge_step=0) as writer:
        for step, lines in enumerate([["L = z (z + b), z = w x", *rows], *measured["drawn"]]):
            writer.add_text("graph/tree", "    " + "\n    ".join(lines), step)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
