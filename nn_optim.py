"""Without zero_grad, plain SGD is SGD with momentum 1: on a parabola it never comes to rest.

    loop       zero_grad (.grad = None), backward (.grad += dL/dp), step
    step       g = p.grad + weight_decay p,  v <- momentum v + g,  v = 0 at the start
               p <- p - lr v,  with Nesterov  p <- p - lr (g + momentum v)
    forgotten  p.grad = g_1 + … + g_t, which is v at momentum 1. For L = w^2 / 2 and w_0 = 1
               w_t = cos((t + 1/2) a) / cos(a / 2),  cos a = 1 - lr / 2,  instead of (1 - lr)^t

backward() adds, so that a gradient can be gathered in parts; old ones must be dropped by hand. A
loss that is summed as it is keeps the graph of every step so far: its nodes, and where no
backward() has freed them (validation without no_grad) all activations. A number keeps nothing.

Checked here   our SGD = torch.optim.SGD after every step; forgotten = momentum 1, bit for bit; w_t;
               nodes and numbers that a sum of losses holds, by formula; Moli, both ways
TensorBoard    train/loss by step in the runs train/zeroed (20 epochs), train/forgotten (3);
               quadratic/w by step in quadratic/zeroed, quadratic/forgotten; leak/nodes and
               leak/saved_numbers by batch, a run for each way to sum
Try            zero_grad at every second step only: which steps? g_1, g_1 + g_2, g_3, g_3 + g_4 …
Source         torch.optim.SGD; Polyak 1964 (momentum); Sutskever et al. 2013, section 2 (Nesterov)
"""

import copy
import math
import signal
from functools import partial
from pathlib import Path
from weakref import WeakSet

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model import Moli
from support.data import as_tensors, channel_stats, open_images, source_line
from support.files import DATASET2, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_optim"
SETTINGS = {
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
    "all three": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05},
}
SUMS = {  # what is added up of a loss, and whether backward() ran before
    "loss": (lambda loss: loss, True),
    "loss_without_backward": (lambda loss: loss, False),
    "detach": (torch.Tensor.detach, False),
    "item": (torch.Tensor.item, False),
}


def draw(log_dir, curves):
    """Write each {tag: values} as a curve, at the steps 0, 1, 2 …."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)


class SGD:
    """The step above for each parameter that has a gradient; others stay, as do their v."""

    def __init__(self, parameters, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
        if lr < 0 or momentum < 0 or weight_decay < 0:
            raise ValueError("lr, momentum and weight_decay must not be negative")
        if nesterov and momentum == 0:
            raise ValueError("Nesterov needs a momentum")
        self.parameters, self.lr = list(parameters), lr
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.velocities = [torch.zeros_like(p) for p in self.parameters]

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self):
        """The step on top: for each parameter p with its velocity v, in place.

        g is p.grad plus weight_decay times p; v becomes momentum v + g; p moves by -lr v, or with
        Nesterov by -lr (g + momentum v). A parameter whose gradient is None stays, as does its v.
        Exercise.
        """
        for p, v in zip(self.parameters, self.velocities, strict=True):
            if p.grad is None:
                continue
            g = p.grad + self.weight_decay * p
            v.mul_(self.momentum).add_(g)
            p -= self.lr * (g + self.momentum * v if self.nesterov else v)


def train(model, batches, optimizer, zero=True):
    """One step for each batch (x, t); yields its cross-entropy, a float, which holds no graph.

    A generator: zero_grad (only if `zero`), forward, loss, backward, step, yield. Exercise.
    """
    for x, t in batches:
        if zero:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        yield loss.item()


def small_problem(steps):
    """A network (B, 8) -> (B, 3) in float64, and `steps` batches x (32, 8), t (32,) to learn."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(steps, 32, 8, dtype=torch.float64)
    return model, [(x_b, x_b[:, :3].argmax(1)) for x_b in x]


def largest_difference(start, batches, first, second):
    """Train a copy of `start` by each of two (make optimizer, zero): max |p - q| over all steps."""
    copies = copy.deepcopy(start), copy.deepcopy(start)
    loops = [train(model, batches, make(model.parameters(), lr=0.1), zero)
             for model, (make, zero) in zip(copies, (first, second), strict=True)]  # fmt: skip
    largest = 0.0
    for _ in zip(*loops, strict=True):  # one step of each
        p, q = (parameters_to_vector(model.parameters()) for model in copies)
        largest = max(largest, (p - q).abs().max().item())
    return largest


def show_sgd(start, batches):
    print(f"1. ours and torch.optim.SGD, {len(batches)} steps: largest difference of a weight")
    effects = {}
    for name, options in SETTINGS.items():
        ours, theirs = ((partial(make, **options), True) for make in (SGD, torch.optim.SGD))
        off = largest_difference(start, batches, ours, theirs)
        assert off < 1e-12
        effects[name] = largest_difference(start, batches, ours, (SGD, True))
        print(f"   {name:<13} {off:.0e}   from plain SGD {effects[name]:.2f}")
    return effects


def swing(lr, steps, zero):
    """[w_0, …, w_steps] of plain SGD on w^2 / 2 from w_0 = 1, as floats, in float64.

    The optimizer is SGD above; the gradient is set to zero before each backward() only if `zero`.
    Exercise.
    """
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer, values = SGD([w], lr), [1.0]
    for _ in range(steps):
        if zero:
            optimizer.zero_grad()
        (w**2 / 2).backward()
        optimizer.step()
        values.append(w.item())
    return values


def show_forgotten(start, batches, log_dir, steps):
    print("2. zero_grad forgotten, against momentum 1 and against zeroed: largest difference")
    momentum_1, zeroed = (
        largest_difference(start, batches, (SGD, False), (other, True))
        for other in (partial(SGD, momentum=1.0), SGD)
    )
    assert momentum_1 == 0
    print(f"   momentum 1 {momentum_1:g}   zeroed {zeroed:.2f}")

    print(f"3. w^2 / 2 from w = 1: largest |w| in the last third of {steps} steps")
    swings = {}
    for lr in (0.1, 0.5, 1.5):
        a = math.acos(1 - lr / 2)
        theory = [math.cos((t + 0.5) * a) / math.cos(a / 2) for t in range(steps + 1)]
        w = {"forgotten": swing(lr, steps, zero=False), "zeroed": swing(lr, steps, zero=True)}
        torch.testing.assert_close(torch.tensor(w["forgotten"]), torch.tensor(theory))
        swings[lr] = [max(map(abs, values[-(steps // 3) :])) for values in w.values()]
        print(f"   lr {lr}   forgotten {swings[lr][0]:.3f}   theory at most "
              f"{1 / math.cos(a / 2):.3f}   zeroed {swings[lr][1]:.0e}")  # fmt: skip
    for name in ("forgotten", "zeroed"):
        w = swing(0.1, steps, zero=name == "zeroed")
        draw(log_dir / "quadratic" / name, {"quadratic/w": w})
    return {"zeroed": zeroed, "swings": swings}


def nodes_of(root):
    """Every node of the graph that backward() from the node `root` reaches, once: a set.

    node.next_functions holds pairs whose first is a node, or None; root itself counts, None does
    not. Exercise.
    """
    found, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


def held_by_sum(model, batches, take, backward):
    """What total += take(loss) holds after each batch: graph nodes, and numbers saved in them.

    Parameters, which live anyway, are not counted.
    """
    alive, total, rows = WeakSet(), 0.0, []
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept = tensor.detach()  # with its grad_fn it would hold its own node: a cycle
        alive.add(kept)
        return kept

    for x, t in batches:
        with saved_tensors_hooks(pack, lambda kept: kept):
            loss = F.cross_entropy(model(x), t)
        if backward:
            loss.backward()
        total += take(loss)
        del loss  # only `total` is left to hold the graph
        sizes = {kept.data_ptr(): kept.numel() for kept in alive}
        numbers = sum(n for pointer, n in sizes.items() if pointer not in parameters)
        rows.append((len(nodes_of(getattr(total, "grad_fn", None))), numbers))
    return rows


def show_leak(model, batches, log_dir):
    k, B = len(batches), len(batches[0][0])
    print(f"4. what a sum of losses holds: nodes, numbers saved, after 1, 2, {k} batches of {B}")
    held = {}
    for name, (take, backward) in SUMS.items():
        rows = held[name] = held_by_sum(model, batches, take, backward)
        nodes, numbers = zip(*rows, strict=True)
        draw(log_dir / "leak" / name, {"leak/nodes": nodes, "leak/saved_numbers": numbers})
        shown = "   ".join(f"{n:3d} {m:6,}" for n, m in (*rows[:2], rows[-1]))
        print(f"   {name:<22} {shown}")
    # nodes: 4 leaves; a batch 2 for each Linear, 1 tanh, 2 of the loss, 1 for +=
    # numbers: x, tanh, log p and t of each example; 1 divisor of the mean
    theory = [(4 + 8 * i, i * (B * (8 + 16 + 3 + 1) + 1)) for i in range(1, k + 1)]
    assert held["loss_without_backward"] == theory
    assert held["loss"] == [(nodes, 0) for nodes, _ in theory]
    assert held["detach"] == held["item"] == [(0, 0)] * k
    return held


def load_images(root, count):
    """For train and test the first images, normalised (N, 3, 32, 32), and their labels (N,)."""
    splits = [open_images(root, train) for train in (True, False)]
    print(source_line(splits[0]))
    mean, std = (s.view(3, 1, 1) for s in channel_stats(as_tensors(splits[0])[0]))
    for split in splits:
        images, labels = (t[:count] for t in as_tensors(split))
        x = (images / 255 - mean) / std
        yield x.contiguous(memory_format=torch.channels_last), labels


@torch.no_grad()
def accuracy(model, x, t):
    model.eval()
    return torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(t).double().mean().item()


def fit(x, t, epochs, batch, zero, seed, log_dir):
    """Moli after training, same start and order for the same seed; each epoch's mean loss."""
    torch.manual_seed(seed)
    model, losses = Moli().to(memory_format=torch.channels_last), []
    optimizer = SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in tqdm(range(epochs), desc=log_dir.name, disable=None):
        order = torch.randperm(len(x)).split(batch)
        losses.append(list(train(model, ((x[i], t[i]) for i in order), optimizer, zero)))
    draw(log_dir, {"train/loss": [loss for epoch in losses for loss in epoch]})
    return model, [sum(epoch) / len(epoch) for epoch in losses]


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, batches=50, steps=150, count=2000,
         epochs=(20, 3), batch=100):  # fmt: skip
    torch.manual_seed(seed)
    start, problem = small_problem(batches)
    measured = {
        "sgd": show_sgd(start, problem),
        "forgotten_law": show_forgotten(start, problem, log_dir, steps),
        "held": show_leak(start, problem, log_dir),
    }
    (x, t), test = load_images(root, count)
    print(f"5. Moli on {len(x):,} images: mean loss by epoch, ln 10 = {math.log(10):.3f}; accuracy")
    for name, n in zip(("zeroed", "forgotten"), epochs, strict=True):
        model, losses = fit(x, t, n, batch, name == "zeroed", seed, log_dir / "train" / name)
        scores = accuracy(model, x, t), accuracy(model, *test)
        shown = "   ".join(f"{i} {losses[i - 1]:.3f}" for i in (1, 3, 5, 10, 20) if i <= n)
        print(f"   {name:<9} epoch {shown}")
        print(f"   {'':<9} train {scores[0]:.3f}   test {scores[1]:.3f}")
        measured[name] = {"losses": losses, "train": scores[0], "test": scores[1]}
    return measured


if __name__ == "__main__":
    guard(main)
