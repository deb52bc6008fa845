"""The learning rate decides whether a network learns, and the best one depends on the optimizer:
here 1 is best for plain SGD, and too large for SGD with momentum and for Adam.

An optimizer moves the parameters of a network by their gradients. A training loop repeats four
steps: zero_grad() drops the old gradients, the loss is computed, backward() computes its gradients,
step() moves the parameters. Plain SGD moves each against its gradient, as far as the learning rate
lr says. If lr is too small the loss hardly falls; if it is too large the loss does not settle. So
try several, each 10 times the last.

    step        g = p.grad + weight_decay p         v <- momentum v + g         v = 0 at the start
                p <- p - lr v,  or with nesterov  p <- p - lr (g + momentum v)
    momentum    while g stays the same, v grows to g / (1 - momentum), which is 10 g for 0.9
    Adam        divides the step of each number in p by the size of its recent gradients
    forgotten   without zero_grad p.grad is g_1 + ... + g_t, which is v for momentum 1

    p  a parameter     g  its gradient, g_t at step t     v  its velocity     <-  becomes

Whoever adds up losses should add loss.item(): a sum of the losses themselves keeps their graphs.

Needs          02_autograd_basics.py, dataloader.py, nn_module.py, nn_relu.py, nn_loss.py
Checked here   SGD by hand = torch's; momentum 0.9 at lr against SGD at 10 lr; forgotten = momentum
               1, bit for bit; how many nodes a sum of losses keeps, by formula
TensorBoard    train/loss and test/accuracy by epoch in a run for each optimizer and lr and in the
               runs zeroed, forgotten; leak/nodes by batch; regions/by_lr: what was learned
Try            in show_everyday, move the line optimizer.zero_grad() to below loss.backward()
Answer         Nothing is learned: step() finds no gradient, and all epochs print the same numbers
Source         torch.optim.SGD; Polyak 1964 (momentum); Sutskever et al. 2013, section 2 (Nesterov);
               Kingma & Ba 2015, arXiv:1412.6980 (Adam)
"""

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
from support.pictures import caption_row

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
    print(f"   -> {rows[-1][1]:.0%} right at the end; who guesses has 33%, and a loss of log 3 = "
          f"{math.log(3):.3f}")  # fmt: skip
    return rows


# --- 2. by hand --------------------------------------------------------------------------------


class SGD:
    """The step on top for each parameter that has a gradient; others stay, as do their v."""

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
    print(f"2. Is torch.optim.SGD this formula? All weights in {len(batches)} steps from one start")
    print("                                               largest difference of ours")
    print("   options                                     to torch's   to ours without options")
    start, rows = Net().double(), {}
    plain = weights_by_step(start, batches, SGD)
    for name, options in (
        ("weight_decay 0.1", {"weight_decay": 0.1}),
        ("momentum 0.9", {"momentum": 0.9}),
        ("momentum 0.9, nesterov", {"momentum": 0.9, "nesterov": True}),
        (
            "weight_decay 0.05, momentum 0.7, nesterov",
            {"weight_decay": 0.05, "momentum": 0.7, "nesterov": True},
        ),
    ):
        ours = weights_by_step(start, batches, SGD, **options)
        theirs = weights_by_step(start, batches, torch.optim.SGD, **options)
        off, effect = ((ours - other).abs().max().item() for other in (theirs, plain))
        assert off < 1e-12
        rows[name] = off, effect
        print(f"   {name:<41}   {off:10.1g}   {effect:23.3f}")
    print(f"   -> ours is torch's, to {max(off for off, _ in rows.values()):.1g} with each option")
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
    print(f"   who guesses has a loss of {math.log(3):.3f} and 33%")
    print("                  SGD      momentum 0.9              Adam")
    print("       lr     loss  right     loss  right     loss  right")
    fits, bar = {}, tqdm(total=len(RATES) * len(OPTIMIZERS), desc="rates", disable=None)
    for lr in RATES:
        for name, (kind, options) in OPTIMIZERS.items():
            model, losses, scores = fit(seed, data, kind, epochs, batch, lr=lr, **options)
            fits[name, lr] = model, losses[-1], scores[-1]
            draw(log_dir / f"{name}_lr_{lr:g}", {"train/loss": losses, "test/accuracy": scores})
            bar.update()
    bar.close()
    for lr in RATES:
        row = [f"{fits[name, lr][1]:6.3f}  {fits[name, lr][2]:5.0%}" for name in OPTIMIZERS]
        print(f"   {lr:6g}   {'   '.join(row)}")
    best = {name: min(RATES, key=lambda lr: fits[name, lr][1]) for name in OPTIMIZERS}
    print(f"   -> the lowest loss: {', '.join(f'{name} at {lr:g}' for name, lr in best.items())}")
    small = RATES[:3]
    off = max(abs(fits["momentum", lr][1] - fits["SGD", 10 * lr][1]) for lr in small)
    print(f"   -> up to lr {small[-1]} momentum 0.9 ends as SGD at 10 times its lr does: the losses"
          f" differ by at most {off:.3f}")  # fmt: skip
    draw_regions(log_dir, data[0], fits)
    return {"fits": fits, "best": best, "off": off}


# --- 4. zero_grad forgotten --------------------------------------------------------------------


def show_forgotten(log_dir, seed, data, epochs, batch, lr=0.1):
    print(f"4. What if zero_grad is forgotten? Mean loss of SGD at lr {lr} by epoch")
    epochs_shown = [epoch for epoch in SHOWN if epoch <= epochs]
    print("   run           " + "".join(f"{epoch:8d}" for epoch in epochs_shown) + "   accuracy")
    runs = {}
    for name, zero, momentum in (
        ("zeroed", True, 0),
        ("forgotten", False, 0),
        ("momentum_1", True, 1),
    ):
        model, losses, scores = fit(seed, data, SGD, epochs, batch, zero, lr=lr, momentum=momentum)
        runs[name] = parameters_to_vector(model.parameters()), losses, scores[-1]
        draw(log_dir / name, {"train/loss": losses, "test/accuracy": scores})
        shown = "".join(f"{losses[epoch - 1]:8.3f}" for epoch in epochs_shown)
        print(f"   {name.replace('_', ' '):<14}{shown}   {scores[-1]:8.0%}")
    off = (runs["forgotten"][0] - runs["momentum_1"][0]).abs().max().item()
    print(f"   -> forgotten and momentum 1 end with weights that differ by {off:g}")
    return {"runs": runs, "off": off}


# --- 5. memory that grows ----------------------------------------------------------------------


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


def nodes_held(model, batches, what):
    """How many nodes the graph of total += `what`, as "loss.item()", has after each batch."""
    total, counts = 0.0, []
    for x, t in batches:
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        if what == "loss":
            total = total + loss
        elif what == "loss.detach()":
            total = total + loss.detach()
        else:
            total = total + loss.item()
        counts.append(len(nodes_of(getattr(total, "grad_fn", None))))  # a float has no grad_fn
    return counts


def show_memory(log_dir, data, batch):
    x, t = data
    batches = list(zip(x.split(batch), t.split(batch), strict=True))
    k, held = len(batches), {}
    print("5. What does a sum of losses keep alive? Nodes of its graph by the number of batches")
    print(f"   added           after 1       2       3      {k:2d}")
    for what, run in (("loss", "loss"), ("loss.detach()", "detach"), ("loss.item()", "item")):
        counts = held[what] = nodes_held(Net(), batches, what)
        draw(log_dir / run, {"leak/nodes": counts})
        print(f"   {what:<15}" + "".join(f"{n:8d}" for n in (*counts[:3], counts[-1])))
    # 6 parameters; for each batch 2 for a Linear, 1 for a ReLU, 2 for the loss, 1 for the sum
    assert held["loss"] == [6 + 11 * i for i in range(1, k + 1)]
    free = [what for what, counts in held.items() if max(counts) == 0]
    print(f"   -> each batch adds {held['loss'][-1] - held['loss'][-2]} nodes to a sum of losses; "
          f"nothing is held by: {', '.join(free)}")  # fmt: skip
    return held


# --- the lesson --------------------------------------------------------------------------------


def draw(log_dir, values_by_tag):
    """Each {tag: values} as a curve over the steps 1, 2, 3 ...: epochs or batches."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, values in values_by_tag.items():
            for step, value in enumerate(values, 1):
                writer.add_scalar(tag, value, step)


@torch.no_grad()
def regions(model, x, t, side=48):
    """The plane, each place in the pale colour of its class by the model, and the points x."""
    palette = torch.tensor([[230, 60, 50], [40, 150, 70], [50, 90, 220]], dtype=torch.uint8)
    along = torch.linspace(-1, 1, side)
    places = torch.cartesian_prod(along, along).flip(1)  # (side * side, 2), row by row
    picture = 170 + palette[model(places).argmax(1)].view(side, side, 3) // 3
    column, row = ((x + 1) / 2 * (side - 1)).round().long().clamp(0, side - 1).T
    picture[row, column] = palette[t]
    return picture.permute(2, 0, 1)  # (3, side, side)


def draw_regions(log_dir, data, fits):
    """One picture: a row for each optimizer, a column for each learning rate."""
    columns, captions = [], []
    for lr in RATES:
        columns.append(torch.cat([regions(fits[name, lr][0], *data) for name in OPTIMIZERS], 1))
        scores = [f"{name} {fits[name, lr][2]:.0%}" for name in OPTIMIZERS]
        captions.append("\n".join([f"lr {lr:g}", *scores]))
    title = (f"Rows from top: {', '.join(OPTIMIZERS)}. Dots: the training points, a colour an arm. "
             "Pale: the arm that the network says")  # fmt: skip
    with SummaryWriter(log_dir, purge_step=0) as writer:
        picture = caption_row(title, columns, captions, height=3 * 160)
        writer.add_image("regions/by_lr", picture, 0)


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
