"""backward() is a walk over the nodes that the forward pass left: a short loop does the same.

    z = w x,  L = sum(z (e^z + b))    dL/dw = x (e^z + b + z e^z),  dL/db = z
    D layers act(h W) on (B, n)       keep (D + 1) B n floats with relu, 2 D B n with silu, beside W

Each operation leaves a node that turns the gradient of its result into those of its inputs; where
paths meet, as in z, they add. A node keeps what it needs for that until backward() has used it, so
training pays memory for every layer it runs through and no_grad for none: add keeps nothing, mul
its factors, relu its result, which the next layer keeps anyway, silu its input on top of that.
Nothing is declared ahead: another input may take another branch, and then leaves another graph.

Checked here   our walk = backward() = by hand; a leaf is what has no grad_fn; a second backward is
               refused, doubles after retain_graph, passes where nothing was kept; what detach() and
               .data share and cut; tensors kept, by formula; a node for each turn of a loop
TensorBoard    memory/kept_floats by depth for the runs relu, silu, no_grad: three straight lines;
               graph/tree as text: L, then the loop after 0, 1, 4 and 7 turns
Try            F.relu(z, inplace=True): does it keep less? No: z itself was never kept
Source         PyTorch notes, "Autograd mechanics"; torch.autograd.graph; Griewank & Walther 2008,
               Evaluating Derivatives, chapter 3 (the reverse mode)
"""

import math
import signal
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "03_computational_graph"


def f(w, b, x):
    """w, b and x (N,) -> L; z is used twice."""
    z = w * x
    return (z * (z.exp() + b)).sum()


def parents(node):
    """The nodes that `node` passes gradients on to, one an input; None where none is needed."""
    if any(output for _, output in node.next_functions):
        raise ValueError(f"{type(node).__name__} takes the second result of a node: left out here")
    return [parent for parent, _ in node.next_functions]


def nodes_of(root):
    """Every node that backward() from `root` reaches, once."""
    found, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.append(node)
            waiting += parents(node)
    return found


def tree(node, leaves, depth=0, numbers=None):
    """Lines that draw the graph, inputs indented; a constant is None, a node met again a number."""
    numbers = {} if numbers is None else numbers
    if node is None or node in numbers:
        return ["  " * depth + ("None" if node is None else f"{numbers[node]} again")]
    numbers[node] = len(numbers)
    name = [name for name, leaf in leaves.items() if leaf is getattr(node, "variable", None)]
    lines = ["  " * depth + " ".join([str(numbers[node]), type(node).__name__, *name])]
    for parent in parents(node):
        lines += tree(parent, leaves, depth + 1, numbers)
    return lines


def gradients_by_walk(L):
    """{leaf: dL/dleaf} for a number L: a node passes on once all that is due to it has come."""
    nodes = nodes_of(L.grad_fn)
    due = Counter(parent for node in nodes for parent in parents(node))
    grads, ready, found = {L.grad_fn: torch.ones_like(L)}, [L.grad_fn], {}
    while ready:
        node = ready.pop()
        if hasattr(node, "variable"):  # AccumulateGrad, the node of a leaf
            found[node.variable] = grads[node]
            continue
        passed = node(grads[node])  # vector-Jacobian products, one an input
        passed = passed if isinstance(passed, tuple) else (passed,)
        for parent, g in zip(parents(node), passed, strict=True):
            if parent is not None:
                # undo broadcasting; private, but nothing public tells the shape
                g = g.sum_to_size(parent._input_metadata[0].shape)
                grads[parent] = grads.get(parent, 0) + g
                due[parent] -= 1
                if due[parent] == 0:
                    ready.append(parent)
    return found


def refusal(action):
    """What the RuntimeError says that an action raises; None if it raises none."""
    try:
        action()
    except RuntimeError as error:
        return str(error)


def backward_twice(f, values, retain_graph):
    """The refusal of a second backward() of sum f(w), and .grad after it over .grad before it."""
    w = values.clone().requires_grad_()
    L = f(w).sum()
    L.backward(retain_graph=retain_graph)
    first = w.grad.clone()
    return refusal(L.backward), (w.grad / first).mean().item()


def zeroed_behind(share, values):
    """For y = sigmoid(w), zeroed through share(y): same memory, y's version, refusal, dy/dw."""
    w = values.clone().requires_grad_()
    y = torch.sigmoid(w)
    twin = share(y)
    twin.zero_()
    said = refusal(y.sum().backward)
    return twin.data_ptr() == y.data_ptr(), y._version, said, w.grad


TWINS = {
    "y.detach()": torch.detach,
    "y.data": lambda y: y.data,
    "y.detach().clone()": lambda y: y.detach().clone(),
}


def kept_by(f, *args):
    """The tensors that the nodes of f(*args) keep for backward."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        f(*args)
    return kept


KEPT = {  # how many tensors each operation keeps, where w and v require grad and x does not
    "w + v": (lambda w, v, x: w + v, 0),
    "w * v": (lambda w, v, x: w * v, 2),
    "w * x": (lambda w, v, x: w * x, 1),
    "exp w": (lambda w, v, x: w.exp(), 1),
    "sum w": (lambda w, v, x: w.sum(), 0),
}


def layers(h, weights, activation):
    for W in weights:
        h = activation(h @ W)  # (B, n)
    return h


def kept_floats(h, weights, activation):
    """Numbers kept by `layers` beside the weights, each memory counted once."""
    own = {W.untyped_storage().data_ptr() for W in weights}
    kept = kept_by(layers, h, weights, activation)
    counts = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
    return sum(count for memory, count in counts.items() if memory not in own)


def double_up_to(x, limit=10.0):
    """x (N,) doubled until its norm is at least `limit`."""
    while x.norm() < limit:
        x = 2 * x
    return x


def main(seed=0, log_dir=LOG_DIR, points=4, batch=32, width=64, depth=16):
    torch.manual_seed(seed)
    x = torch.randn(points)
    w, b = (torch.randn(points, requires_grad=True) for _ in range(2))
    L = f(w, b, x)

    print("1. the graph of L = sum(z (e^z + b)), z = w x")
    drawn = {"L": tree(L.grad_fn, {"w": w, "b": b})}
    for row in drawn["L"]:
        print(f"   {row}")

    print("2. the gradient: our walk, backward(), by hand")
    walked = gradients_by_walk(L)
    L.backward()
    z = (w * x).detach()
    by_hand = {w: x * (z.exp() + b + z * z.exp()).detach(), b: z}
    for name, leaf in {"w": w, "b": b}.items():
        torch.testing.assert_close((walked[leaf], leaf.grad), (by_hand[leaf], by_hand[leaf]))
        for n in range(points):
            row = [f"{grads[n]:8.5f}" for grads in (walked[leaf], leaf.grad, by_hand[leaf])]
            print(f"   dL/d{name}{n}   {'   '.join(row)}")

    print("3. leaves and results")
    made = {"x": x, "w": w, "0.1 * w": 0.1 * w, "w.double()": w.double(), "w.detach()": w.detach()}
    for name, tensor in made.items():
        assert tensor.is_leaf == (tensor.grad_fn is None)
        node = tensor.grad_fn.name() if tensor.grad_fn else None
        print(f"   {name:<11} is_leaf {tensor.is_leaf!s:<5}   "
              f"requires_grad {tensor.requires_grad!s:<5}   grad_fn {node}")  # fmt: skip

    print("4. a second backward(): .grad after it over .grad before it")
    ratios = {}
    for name, g in {"exp w": torch.exp, "w + 1": lambda w: w + 1}.items():
        for retain in (False, True):
            said, ratios[name, retain] = backward_twice(g, w.detach(), retain)
            outcome = "refused" if said else f"{ratios[name, retain]:.1f}"
            print(f"   {name}   retain_graph={retain!s:<5}   {outcome}")

    print("5. y = sigmoid(w), a twin of y zeroed before backward(): dy/dw, measured and right")
    value, slopes = torch.tensor(0.3), {}
    right = (torch.sigmoid(value) * (1 - torch.sigmoid(value))).item()
    for name, share in TWINS.items():
        shared, version, said, grad = zeroed_behind(share, value)
        slopes[name] = None if said else grad.item()
        outcome = "refused" if said else f"{grad:.4f} {right:.4f}"
        print(f"   {name:<18} memory shared {shared!s:<5}   version of y {version}   {outcome}")
    z.requires_grad_()
    (z * z.detach()).sum().backward()
    torch.testing.assert_close(z.grad, z.detach())
    print(f"   d sum(z z.detach()) / dz0 {z.grad[0]:.4f}   z0 {z[0]:.4f}   2 z0 {2 * z[0]:.4f}")

    print("6. tensors kept for backward(), x a constant: measured and by formula")
    for name, (g, law) in KEPT.items():
        kept = len(kept_by(g, w, b, x))
        with torch.no_grad():
            without = len(kept_by(g, w, b, x))
        assert (kept, without) == (law, 0)
        print(f"   {name}   {kept} {law}   under no_grad {without}")

    print(f"7. floats kept by D layers on ({batch}, {width}) beside the weights, and by formula")
    h = torch.randn(batch, width)
    weights = [torch.randn(width, width).requires_grad_() for _ in range(depth)]
    kept = {"relu": [], "silu": [], "no_grad": []}
    for run, counts in kept.items():
        activation = F.silu if run == "silu" else F.relu
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for D in range(1, depth + 1):
                with torch.set_grad_enabled(run != "no_grad"):
                    counts.append(kept_floats(h, weights[:D], activation))
                law = {"relu": D + 1, "silu": 2 * D, "no_grad": 0}[run] * batch * width
                assert counts[-1] == law
                writer.add_scalar("memory/kept_floats", counts[-1], D)
                if D % 8 == 0:
                    print(f"   {run:<7}   D = {D:2d}   {counts[-1]:6d} {law:6d}")

    print("8. x doubled until |x| >= 10: nodes of the loop and dL/dx0, measured and by theory")
    unit = F.normalize(torch.randn(3), dim=0)
    for norm in (20, 6, 1, 0.1):
        x = (norm * unit).requires_grad_()
        L = double_up_to(x).sum()
        drawn[norm] = tree(L.grad_fn, {"x": x})
        turns = sum("Mul" in line for line in drawn[norm])
        law = max(0, math.ceil(math.log2(10 / norm)))
        L.backward()
        assert turns == law and (x.grad == 2**law).all()
        print(f"   |x| {norm:4}   nodes {turns} {law}   dL/dx0 {x.grad[0]:5.0f} {2**law:5d}")
    x = unit.clone().requires_grad_()
    first, second = (nodes_of(double_up_to(x).grad_fn) for _ in range(2))
    common = [type(node).__name__ for node in first if node in second]
    print(f"   two calls alike: {len(first)} nodes each, in common {common}")

    with SummaryWriter(log_dir / "tree", purge_step=0) as writer:
        for step, rows in enumerate(drawn.values()):
            writer.add_text("graph/tree", "    " + "\n    ".join(rows), step)
    return {"ratios": ratios, "slopes": slopes, "kept": kept, "common": common}


if __name__ == "__main__":
    guard(main)
