"""The learning rate decides whether a network learns, and the best one depends on the optimizer: of
six tried here, 1 is best for plain SGD, and far too large for SGD with momentum and for Adam.

An optimizer moves the parameters of a network so that the loss falls. A training loop repeats four
steps: zero_grad() drops the old gradients, the loss is computed, backward() computes its gradients,
step() moves the parameters. If the learning rate lr is too small the loss hardly falls; if it is
too large the loss does not settle. So try several, each 10 times the one before.

    p  a parameter     g  its gradient, p.grad     v  its velocity, 0 at first     <-  becomes

    plain SGD      p <- p - lr g
    momentum       v <- momentum v + g, then p <- p - lr v: each step keeps a part of the last one.
                   While g stays the same, v grows to g / (1 - momentum), which is 10 g for 0.9
    nesterov       p <- p - lr (g + momentum v), the next velocity if g stays the same
    weight_decay   g <- g + weight_decay p before all this: it pulls p towards 0
    Adam           divides the step of each number in p by the size of its recent gradients

Without zero_grad(), p.grad is the sum of all gradients so far, which is v for momentum 1. To add up
losses write total += loss.item(): a sum of the losses keeps the graph of each batch, its record.

Needs          03_computational_graph.py, dataloader.py, nn_module.py, nn_relu.py, nn_loss.py
Checked here   SGD by hand = torch's; zero_grad forgotten = momentum 1, bit for bit; what sums keep
TensorBoard    train/loss by epoch: SGD_lr_0.0001 stays near log 3, SGD_lr_10 is above it in the
               end, SGD_lr_1 falls to nearly 0; regions/by_lr: what each network has learned
Try            in show_everyday, move the line optimizer.zero_grad() to below loss.backward()
Answer         Nothing is learned: step() finds no gradient, and all epochs print the same numbers
Source         Polyak 1964; Sutskever et al. 2013, section 2 (Nesterov); Kingma & Ba 2015 (Adam)
"""

import contextlib
import copy
import math
import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from support.files import guard
from support.pictures import caption_row, regions

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_optim"
SHOWN = (1, 2, 5, 10, 20)  # epochs that are printed
RATES = (0.0001, 0.001, 0.01, 0.1, 1, 10)
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
}


# --- 1. in everyday code -----------------------------------------------------------------------


class Net(nn.Module):
    """Points (B, 2) -> logits (B, 3)."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def spirals(N):
    """N points (N, 2) on three arms that wind around each other, and the arm of each (N,)."""
    t = torch.arange(N) % 3
    radius = 0.1 + 0.9 * torch.rand(N).sqrt()
    angle = 4 * radius + 2 * math.pi / 3 * t + 0.1 * torch.randn(N)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), t


def show_everyday(train_data, test_data, epochs, batch):
    print(f"1. In everyday code: {epochs} epochs over {len(train_data[0])} points in three spirals")
    print("   epoch   mean loss in training   accuracy on other points")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(*train_data), batch_size=batch, shuffle=True)
    rows = []
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for x, t in loader:
            optimizer.zero_grad()  # drop the gradients of the last step
            loss = F.cross_entropy(model(x), t)  # nn.CrossEntropyLoss as a function
            loss.backward()  # the gradients of this batch
            optimizer.step()  # move all parameters
            total += loss.item() * len(x)  # .item() is a number, without a graph
        model.eval()
        with torch.no_grad():  # no graph: nothing is trained here
            x, t = test_data
            score = (model(x).argmax(1) == t).float().mean().item()
        rows.append((total / len(train_data[0]), score))
        if epoch in SHOWN:
            print(f"   {epoch:5d}   {rows[-1][0]:21.3f}   {rows[-1][1]:24.3f}")
    print(
        f"   -> {rows[-1][1]:.1%} right at the end; guessing: 33.3%, loss log 3 = {math.log(3):.3f}"
    )
    return rows


# --- 2. by hand --------------------------------------------------------------------------------


class SGD:
    """The step on top for each parameter that has a gradient; others stay, as do their v."""

    def __init__(self, parameters, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
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


def train_epoch(model, batches, optimizer, zero=True):
    """One step for each batch (x, t), in train mode; the mean loss of all examples, a float.

    zero_grad (only if `zero`), cross-entropy of model(x), backward, step. The loss of a batch is
    a mean, so it counts len(x) times: the last batch may be smaller. Exercise.
    """
    model.train()
    total, count = 0.0, 0
    for x, t in batches:
        if zero:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * len(x), count + len(x)
    return total / count


def weights_by_step(start, batches, kind, zero=True, **options):
    """All parameters of a copy of `start` after each step of an optimizer `kind`: (steps, P)."""
    model = copy.deepcopy(start)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    path = []
    for batch in batches:
        train_epoch(model, [batch], optimizer, zero)
        path.append(parameters_to_vector(model.parameters()).detach())
    return torch.stack(path)


def show_by_hand(data, batch):
    x, t = data
    batches = list(zip(x.double().split(batch), t.split(batch), strict=True))  # float64
    print(f"2. Is our SGD torch's? All weights in {len(batches)} steps from one start")
    print("                                                    largest difference   largest change")
    print("   options of both                                  from torch's SGD     by the options")
    start, rows = Net().double(), {}
    plain = weights_by_step(start, batches, SGD)
    for options in (
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05},
    ):
        ours = weights_by_step(start, batches, SGD, **options)
        theirs = weights_by_step(start, batches, torch.optim.SGD, **options)
        off, effect = ((ours - other).abs().max().item() for other in (theirs, plain))
        assert off < 1e-12
        name = ", ".join(f"{word} {value}" for word, value in options.items()) or "none"
        rows[name] = off, effect
        print(f"   {name:<46}   {off:18.1g}   {effect:14.3f}")
    print(f"   -> all weights are torch's within {max(off for off, _ in rows.values()):.1g}")
    return rows


# --- 3. which learning rate --------------------------------------------------------------------


@torch.no_grad()
def accuracy(model, x, t):
    """The share of x (N, 2) whose largest logit is that of its class t (N,), in eval mode: a float.

    Exercise.
    """
    model.eval()
    return (model(x).argmax(1) == t).float().mean().item()


def fit(seed, data, kind, epochs, batch, zero=True, **options):
    """A Net trained by an optimizer `kind`: the model, its loss and its accuracy by epoch.

    The same seed gives the same start and the same order of the examples.
    """
    torch.manual_seed(seed)
    model, losses, scores = Net(), [], []
    optimizer = kind(model.parameters(), **options)
    loader = DataLoader(TensorDataset(*data[0]), batch_size=batch, shuffle=True)
    for _ in range(epochs):
        losses.append(train_epoch(model, loader, optimizer, zero))
        scores.append(accuracy(model, *data[1]))
    return model, losses, scores


def show_rates(log_dir, seed, data, epochs, batch):
    print(
        f"3. Which learning rate? Mean loss in epoch {epochs}, and how many other points are right"
    )
    print(f"   guessing gives a loss of {math.log(3):.3f} and 33.3%")
    print("                  SGD       momentum 0.9               Adam")
    print("       lr     loss   right     loss   right     loss   right")
    fits = {}
    for lr in tqdm(RATES, desc="learning rates", disable=None):
        for name, (kind, options) in OPTIMIZERS.items():
            model, losses, scores = fit(seed, data, kind, epochs, batch, lr=lr, **options)
            fits[name, lr] = model, losses[-1], scores[-1]
            draw(log_dir / f"{name}_lr_{lr:g}", {"train/loss": losses, "test/accuracy": scores})
    for lr in RATES:
        row = [f"{fits[name, lr][1]:6.3f}  {fits[name, lr][2]:6.1%}" for name in OPTIMIZERS]
        print(f"   {lr:6g}   {'   '.join(row)}")
    loss = {key: values[1] for key, values in fits.items()}
    least = {name: min(loss[name, lr] for lr in RATES) for name in OPTIMIZERS}
    best = {name: [lr for lr in RATES if loss[name, lr] < least[name] + 0.01] for name in least}
    words = (f"{name} {' and '.join(f'{lr:g}' for lr in rates)}" for name, rates in best.items())
    print(f"   -> lr whose loss is within 0.01 of the least: {', '.join(words)}")
    off = [abs(loss["momentum", lr] - loss["SGD", 10 * lr]) for lr in RATES[:-1]]
    print(f"   -> losses of momentum 0.9 at lr and SGD at 10 lr: they differ by {max(off[:-1]):.3f}"
          f" or less up to lr {RATES[-3]}, by {off[-1]:.3f} at lr {RATES[-2]}")  # fmt: skip
    draw_regions(log_dir, data[0], fits)
    return {"fits": fits, "best": best, "off": off}


# --- 4. zero_grad forgotten --------------------------------------------------------------------


def show_forgotten(log_dir, seed, data, epochs, batch, lr=0.1):
    print(f"4. What if zero_grad is forgotten? Mean loss of our SGD at lr {lr}, by epoch")
    shown = [epoch for epoch in SHOWN if epoch <= epochs]
    print(f"   zero_grad   momentum{''.join(f'{epoch:8d}' for epoch in shown)}   right in the end")
    runs = {}
    cases = ("zeroed", True, 0), ("forgotten", False, 0), ("momentum_1", True, 1)
    for name, zero, momentum in cases:
        model, losses, scores = fit(seed, data, SGD, epochs, batch, zero, lr=lr, momentum=momentum)
        runs[name] = parameters_to_vector(model.parameters()), losses, scores[-1]
        draw(log_dir / name, {"train/loss": losses, "test/accuracy": scores})
        by_epoch = "".join(f"{losses[epoch - 1]:8.3f}" for epoch in shown)
        word = "called" if zero else "forgotten"
        print(f"   {word:<9}   {momentum:8d}{by_epoch}   {scores[-1]:16.1%}")
    off = (runs["forgotten"][0] - runs["momentum_1"][0]).abs().max().item()
    print(f"   -> forgotten: {runs['forgotten'][2]:.1%} right instead of {runs['zeroed'][2]:.1%}")
    print(f"   -> weights when forgotten minus weights with momentum 1, largest: {off:g}")
    return {"runs": runs, "off": off}


# --- 5. what a sum of losses keeps alive -------------------------------------------------------


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


def numbers_of(nodes, model):
    """How many numbers the nodes keep for backward(), which frees them; not the parameters."""
    kept, parameters = {}, {p.data_ptr() for p in model.parameters()}
    for node in nodes:
        for name in (name for name in dir(node) if name.startswith("_saved_")):
            with contextlib.suppress(RuntimeError):  # torch's word for: backward() has freed it
                value = getattr(node, name)
                if isinstance(value, torch.Tensor) and value.data_ptr() not in parameters:
                    kept[value.data_ptr()] = value.numel()  # two nodes may keep the same tensor
    return sum(kept.values())


def kept_by_sum(model, batches, added, backward=True):
    """(nodes, numbers) that total += `added`, as "loss.item()", keeps alive after each batch."""
    total, counts = 0.0, []
    for x, t in batches:
        loss = F.cross_entropy(model(x), t)
        if backward:
            loss.backward()
        total += {"loss": loss, "loss.detach()": loss.detach(), "loss.item()": loss.item()}[added]
        nodes = nodes_of(getattr(total, "grad_fn", None))  # a float has no grad_fn
        counts.append((len(nodes), numbers_of(nodes, model)))
    return counts


def show_memory(log_dir, data, batch):
    batches = list(zip(*(part.split(batch) for part in data), strict=True))
    k, kept = len(batches), {}
    print(f"5. What does a sum of {k} losses keep alive, by what is added to it after each batch?")
    print("   Nodes are the steps of the graph, numbers what these keep for backward()")
    print("   total +=        backward()   nodes kept after batch     numbers kept after batch")
    print(f"                   called {f'{1:11d}{2:8d}{k:8d}' * 2}")
    for run in ("loss", "no_backward", "detach", "item"):
        added = f"loss.{run}()" if run in ("detach", "item") else "loss"
        word = "no" if run == "no_backward" else "yes"
        nodes, numbers = zip(*kept_by_sum(Net(), batches, added, word == "yes"), strict=True)
        kept[run] = nodes, numbers
        draw(log_dir / run, {"leak/nodes": nodes, "leak/numbers": numbers})
        row = "   ".join("".join(f"{n[i]:8d}" for i in (0, 1, -1)) for n in (nodes, numbers))
        print(f"   {added:<13}   {word:^10}{row}")
    # 6 parameters; for each batch 2 for a Linear, 1 for a ReLU, 2 for the loss, 1 for the sum
    assert list(kept["loss"][0]) == [6 + 11 * i for i in range(1, k + 1)]
    more = [counts[-1] - counts[-2] for counts in kept["no_backward"]]
    free = [f"loss.{run}()" for run, counts in kept.items() if counts[0][-1] == counts[1][-1] == 0]
    print(f"   -> each batch adds {more[0]} nodes; without backward() {more[1]} numbers as well")
    print(f"   -> nothing is kept alive by adding {' or '.join(free)}")
    return kept


# --- the lesson --------------------------------------------------------------------------------


def draw(log_dir, values_by_tag):
    """Each {tag: values} as a curve over the steps 1, 2, 3 ...: epochs or batches."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in values_by_tag.items():
            for step, value in enumerate(values, 1):
                writer.add_scalar(tag, value, step)


def draw_regions(log_dir, data, fits):
    """One picture: a row for each optimizer, a column for each learning rate."""
    columns, captions = [], []
    for lr in RATES:
        models, _, scores = zip(*(fits[name, lr] for name in OPTIMIZERS), strict=True)
        columns.append(torch.cat([regions(model, *data) for model in models], 1))
        words = (f"{name} {score:.1%}" for name, score in zip(OPTIMIZERS, scores, strict=True))
        captions.append("\n".join([f"lr {lr:g}", *words]))
    title = (f"Rows from top: {', '.join(OPTIMIZERS)}. Dots: the training points, a colour an arm. "
             "Pale: the arm that the network says")  # fmt: skip
    with SummaryWriter(log_dir, purge_step=0) as writer:
        writer.add_image("regions/by_lr", caption_row(title, columns, captions, height=480), 0)


def main(seed=0, log_dir=LOG_DIR, points=600, epochs=20, batch=30):
    torch.manual_seed(seed)
    data = spirals(points), spirals(points)  # to train on, and others to test on
    measured = {
        "everyday": show_everyday(*data, epochs, batch),
        "by_hand": show_by_hand(data[0], batch),
        "rates": show_rates(log_dir, seed, data, epochs, batch),
        "forgotten": show_forgotten(log_dir, seed, data, epochs, batch),
        "memory": show_memory(log_dir, data[0], batch),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
