"""backward() walks over the nodes that the code of a result left; a class of ours does the same.

Each operation on a tensor that requires grad leaves a node. The node knows the nodes of its inputs,
and how to hand a gradient back to them. backward() visits a node only after all nodes that used its
result, and adds up the gradients that arrive along several paths.

A node also keeps the values that its derivative needs, so every layer costs memory during training.
PyTorch counts edits in place, and refuses if such a value has changed before backward(). An edit
made through `.data` is not counted: the gradient is wrong, and nothing is said.

    w, b   parameters     x   a constant     z = w x     L = z (z + b)
    dL/dz = (z + b) + z, by two paths        dL/dw = x dL/dz        dL/db = z

Needs          02_autograd_basics.py
Checked here   the gradients of L by a Value class of ours = by backward() = by hand; detach() and
               .data; what operations and layers keep; a second backward()
TensorBoard    memory/kept_numbers by depth D in the runs relu, silu, no_grad: three straight lines,
               silu about twice as steep as relu, no_grad at 0
Try            in Value.backward, replace += by = : which gradient goes wrong, and why?
Answer         dL/dw is 18, not 39, and dL/dx 12, not 26: z was used twice, and one use overwrites
               the other
Source         Griewank & Walther 2008, Evaluating Derivatives, chapter 3; Karpathy 2020, micrograd;
               PyTorch notes, "Autograd mechanics"
"""

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


def kind(node):
    return node and type(node).__name__


def tree(node, leaves, depth=0, numbers=None):
    """Lines that draw the graph, inputs indented below; a node met again is only a number."""
    numbers, indent = {} if numbers is None else numbers, "  " * depth
    if node is None or node in numbers:
        return [indent + ("None" if node is None else f"{numbers[node]} again")]
    numbers[node] = len(numbers)
    lines = [f"{indent}{numbers[node]} {kind(node)}"]
    for name, leaf in leaves.items():
        if leaf is getattr(node, "variable", None):  # AccumulateGrad knows its leaf
            lines[0] += " " + name
    for parent, _ in node.next_functions:
        lines += tree(parent, leaves, depth + 1, numbers)
    return lines


def show_graph():
    w, b = (torch.tensor(value, requires_grad=True) for value in (2.0, 1.0))
    x = torch.tensor(3.0)
    z = w * x
    L = z * (z + b)
    node, inputs = L.grad_fn, L.grad_fn.next_functions  # pairs: the node of an input, and a number
    z_inputs = inputs[0][0].next_functions
    print("1. Which nodes did z = w * x and L = z * (z + b) leave? w = 2, b = 1, x = 3")
    print("   code                                            kind of node")
    print(f"   L.grad_fn                                       {kind(node)}")
    print(f"   L.grad_fn.next_functions                        {[kind(n) for n, _ in inputs]}")
    print(f"   L.grad_fn.next_functions[0][0].next_functions   {[kind(n) for n, _ in z_inputs]}")
    print("   All nodes, each above the nodes of its inputs (AccumulateGrad adds to the .grad of a")
    print("   parameter; None: the constant x; 1 again: node 1, drawn above):")
    rows = tree(node, {"w": w, "b": b})
    for row in rows:
        print(f"   {row}")
    L.backward()
    again = [row.split()[0] for row in rows if "again" in row]
    print(f"   -> used twice: node {' and '.join(again)} (z = {z:.0f}); after L.backward() "
          f"w.grad is {w.grad:.0f}, b.grad {b.grad:.0f}")  # fmt: skip
    return rows


# --- 2. backward() of one's own ----------------------------------------------------------------


class Value:
    """A number that remembers its sources: the Values it was made from, and its slope in each."""

    def __init__(self, data, sources=()):
        self.data, self.sources, self.grad = data, sources, 0.0

    def __add__(self, other):
        return Value(self.data + other.data, [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        """The product as a Value; its sources are (self, slope) and (other, slope).

        A slope is the derivative of the product with respect to self or to other. Exercise.
        """
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
        """A dict: its keys are all Values behind self, each after its own sources, then self.

        Its values are True: a dict keeps the order, and each key once. Exercise.
        """
        found = {} if found is None else found
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
    print("2. Does a class of our own, Value, find the gradients of L at w = 2, b = 1, x = 3?")
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


def show_detach():
    s = torch.tensor(0.3).sigmoid()
    right = (s * (1 - s)).item()
    print("3. y = sigmoid(w), w = 0.3. A tensor made from y is set to 0 before y.backward().")
    print(f"   Is w.grad still {right:.4f}?")
    print("   made from y          its memory   edits that y counted   w.grad   verdict")
    verdicts = {}
    for code in ("y.detach()", "y.data", "y.detach().clone()"):
        w = torch.tensor(0.3, requires_grad=True)
        y = w.sigmoid()
        other = eval(code, {"y": y})  # the code that the row shows
        other.zero_()
        memory = "that of y" if other.data_ptr() == y.data_ptr() else "its own"
        if refusal(y.backward):
            grad, verdicts[code] = "", "refused"
        else:
            grad, off = f"{w.grad:.4f}", (w.grad - right).abs().item()
            verdicts[code] = "right" if off < 1e-6 else "wrong, and silent"
        print(f"   {code:<18}   {memory:<10}   {y._version:20}   {grad:6}   {verdicts[code]}")
    seen, unseen = (" ".join(code for code, said in verdicts.items() if said == verdict)
                    for verdict in ("refused", "wrong, and silent"))  # fmt: skip
    print(f"   -> an edit of {seen} is seen and refused, an edit of {unseen} is not seen")
    z = torch.tensor(3.0, requires_grad=True)
    cut, whole = (torch.autograd.grad(f, z)[0].item() for f in (z * z.detach(), z * z))
    print(f"   -> detach() makes a constant: at z = 3 z * z.detach() has slope {cut:g}, "
          f"z * z {whole:g}")  # fmt: skip
    assert (cut, whole) == (3, 6)
    return {"verdicts": verdicts, "slopes": (cut, whole)}


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
    print("4. What does y keep for backward(), and can y.sum().backward() be called twice?")
    print("   y (x: a constant)   tensors kept   second call")
    kept, second = {}, {}
    for code in ("w + v", "w * v", "w * x", "w.exp()"):
        kept[code] = len(kept_by(eval, code, {"w": w, "v": v, "x": x}))
        y = eval(code)
        y.sum().backward()
        second[code] = "refused" if refusal(y.sum().backward) else "passes"
        print(f"   {code:<17}   {kept[code]:12}   {second[code]}")
    where = all((second[code] == "refused") == (kept[code] > 0) for code in kept)
    where = "just where" if where else "not only where"
    print(f"   -> it is refused {where} a tensor was kept: the first call frees it,")
    print("      unless it is backward(retain_graph=True)")
    return {"tensors": kept, "second": second}


# --- 5. memory by depth ------------------------------------------------------------------------


def layers(a, weights, activation):
    for W in weights:
        a = activation(a @ W)  # (B, n)
    return a


def kept_numbers(a, weights, activation):
    """How many numbers `layers` keeps besides the weights, each memory counted once."""
    own = {W.untyped_storage().data_ptr() for W in weights}
    kept = kept_by(layers, a, weights, activation)
    counts = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
    return sum(count for memory, count in counts.items() if memory not in own)


def show_memory(log_dir, batch, width, depth):
    a = torch.randn(batch, width)
    weights = [torch.randn(width, width).requires_grad_() for _ in range(depth)]
    size, kept = batch * width, {}
    print("5. How many numbers do D layers a = act(a @ W) keep for backward(), besides weights?")
    print(f"   a holds B n = {batch} x {width} = {size} numbers. Each @ keeps its input, which is")
    print("   the first a or what act gave. relu keeps what it gives, silu what it gets.")
    print("   act        D       kept   formula     by formula")
    for run, act, times, more, formula in (
        ("relu", F.relu, 1, 1, "(D + 1) B n"), ("silu", F.silu, 2, 0, "2 D B n"),
        ("no_grad", F.relu, 0, 0, "0"),
    ):  # fmt: skip
        kept[run] = []
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for D in range(1, depth + 1):
                with torch.set_grad_enabled(run != "no_grad"):
                    kept[run].append(kept_numbers(a, weights[:D], act))
                writer.add_scalar("memory/kept_numbers", kept[run][-1], D)
                law = (times * D + more) * size
                if D in (depth // 2, depth):
                    print(f"   {run:<7}  {D:3}   {kept[run][-1]:8}   {formula:<11} {law:10}")
                assert kept[run][-1] == law
    relu, silu, none = ((counts[-1] - counts[-2]) / size for counts in kept.values())
    print(f"   -> each further layer keeps {relu:g} B n with relu, {silu:g} B n with silu, "
          f"{none:g} under no_grad")  # fmt: skip
    return kept


def main(seed=0, log_dir=LOG_DIR, batch=32, width=64, depth=16):
    torch.manual_seed(seed)
    measured = {"tree": show_graph(), "own": show_own(), **show_detach(), **show_kept()}
    measured["kept"] = show_memory(log_dir, batch, width, depth)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
