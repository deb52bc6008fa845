"""A module finds the layers that are assigned to it; those in a plain list it does not find.

Write a network as a class on nn.Module: __init__ makes the layers, forward computes the output from
them. A parameter or a layer that is assigned to self is entered in a table (a dict), so that the
optimizer, the saved file and the GPU get it. A layer in a Python list is in no table. The forward
pass still uses it, and autograd still computes its gradient, but nothing warns you.

    self.weight = nn.Parameter(t)       entered in self._parameters     trained, saved, moved
    self.layer = nn.Linear(4, 3)        entered in self._modules        its parameters: all three
    self.register_buffer("mean", t)     entered in self._buffers        saved, moved
    self.layers = [nn.Linear(4, 3)]     not entered                     not trained, saved or moved
    self.mean = t                       not entered                     not trained, saved or moved

    t        a tensor                   nn.Linear(I, O)  a layer: I numbers in, O numbers out
    trained  parameters() has it        saved            state_dict() has it
    moved    to(device) changes it, and double(), which turns numbers into float64

train() and eval() set one flag, `training`, in each module that is entered. The layer nn.Dropout
reads it: in train mode it sets numbers to 0 at random, in eval mode it returns what it gets.

Needs          02_autograd_basics.py (the loop), 04_hooks.py (hooks)
Checked here   which attributes are found, also by a class of ours; what a list loses
TensorBoard    train/loss and hidden/moved by step in the runs plain_list and module_list: the two
               losses start as one and part; hidden/moved of the list stays at 0
Try            in fit, put nn.ModuleList([net.first, *net.hidden, net.last]).parameters() for
               net.parameters(): is all well with the list?
Answer         No: it learns as well as the ModuleList, but it is not saved: the copy still differs
Source         torch.nn.Module; PyTorch notes, "Modules"
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_module"


# --- 1. in everyday code -----------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()  # makes the tables, so it comes before the first layer
        self.hidden = nn.Linear(2, 3)  # 2 numbers in, 3 out: 3 x 2 weights and 3 biases
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        """The output (B, 1) of inputs x (B, 2): hidden, then torch.relu, then last. Exercise."""
        return self.last(torch.relu(self.hidden(x)))  # relu: max(0, number)


def show_everyday():
    print("1. How do I write a network, look into it and call it?")
    net = TwoLayers()
    print(f"   print(net) shows {net}".replace("\n", "\n   "))
    print("   named_parameters()   shape    numbers")
    for name, parameter in net.named_parameters():
        print(f"   {name:<20} {tuple(parameter.shape)!s:<6} {parameter.numel():9}")
        nn.init.ones_(parameter)  # sets every number in it to 1
    count = sum(parameter.numel() for parameter in net.parameters())
    y = net(torch.tensor([[1.0, 2.0], [1, -4]]))  # not net.forward(...), which leaves out hooks
    hidden = 1 + 2 + 1, 1 - 4 + 1  # by hand, each of the 3 hidden numbers before relu
    print(f"   -> {count} numbers to learn. All set to 1, they make {y[0].item():g} of [1, 2] and "
          f"{y[1].item():g} of [1, -4];\n      by hand 3 * {hidden[0]} + 1 and, as relu makes "
          f"{hidden[1]} a 0, 3 * 0 + 1")  # fmt: skip
    assert y.flatten().tolist() == [3 * hidden[0] + 1, 1]
    return count, y.flatten().tolist()


# --- 2. what is found --------------------------------------------------------------------------


class OurModule:
    """The part of nn.Module that sees attributes, calls forward and sets the mode."""

    def __init__(self):
        self._parameters, self._buffers, self._modules, self._hooks = {}, {}, {}, []
        self.training = True

    def __setattr__(self, name, value):
        """Enter an nn.Parameter in self._parameters, a module in self._modules, by its name.

        Modules are those of this class and nn.Module. Whatever it is, it becomes an attribute as
        well, by super().__setattr__(name, value); nn.Module keeps it in the table only. Exercise.
        """
        if isinstance(value, nn.Parameter):
            self._parameters[name] = value
        elif isinstance(value, (OurModule, nn.Module)):
            self._modules[name] = value
        super().__setattr__(name, value)

    def register_buffer(self, name, tensor):
        self._buffers[name] = tensor
        super().__setattr__(name, tensor)

    def __call__(self, *inputs):
        """self.forward(*inputs), returned after each hook(self, inputs, output) of self._hooks.

        Exercise.
        """
        output = self.forward(*inputs)
        for hook in self._hooks:
            hook(self, inputs, output)
        return output

    def train(self, mode=True):
        """Set self.training to `mode` here and, by their train, in all submodules. Exercise."""
        self.training = mode
        for child in self._modules.values():
            child.train(mode)


def walk(module, table, prefix=""):
    """A dict {name: tensor} of all that a module and its submodules entered in `table`.

    `table` is the name of a dict, "_parameters" or "_buffers"; an entry None (a bias that is left
    out) is passed over. Own entries come first, then those of each child in module._modules, their
    names behind "child.". `prefix` stands before each name. Exercise.
    """
    own = getattr(module, table).items()
    found = {prefix + name: tensor for name, tensor in own if tensor is not None}
    for name, child in module._modules.items():
        found |= walk(child, table, f"{prefix}{name}.")
    return found


def zoo(base):
    """A module on the class `base` with one attribute of every kind."""

    class Zoo(base):
        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.ones(4))
            self.register_buffer("buffer", torch.ones(4))
            self.tensor = torch.ones(4)
            self.layer = nn.Linear(4, 4)
            self.plain_list = [nn.Linear(4, 4), nn.Dropout(0.5)]
            self.module_list = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.5)])

        def forward(self, x):
            return self.layer(x) * self.parameter + self.buffer

    return Zoo()


def seen_by(module, name):
    """Whether parameters(), state_dict() and double() see the attribute `name`: three bools.

    Is there a name in named_parameters() that is `name` up to its first dot; is there one in
    state_dict(); is the tensor float64, as module.double() was called before (of a layer its
    weight, of a list of layers the first one's)? Exercise.
    """
    value = getattr(module, name)
    layer = value[0] if isinstance(value, (list, nn.ModuleList)) else value
    tensor = layer.weight if isinstance(layer, nn.Module) else layer
    names = {key.split(".")[0] for key, _ in module.named_parameters()}
    saved = {key.split(".")[0] for key in module.state_dict()}
    return name in names, name in saved, tensor.dtype == torch.float64


def show_found():
    print("2. Which attributes does each call find? OurModule is our own class, without nn.Module")
    print("   self.         parameters()   state_dict()   double()   entered by OurModule in")
    module, ours = zoo(nn.Module), zoo(OurModule)
    theirs = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    found = [*walk(ours, "_parameters"), *walk(ours, "_buffers")]
    module.double()  # what it finds becomes float64
    seen = {}
    for name in ("parameter", "buffer", "tensor", "layer", "plain_list", "module_list"):
        seen[name] = seen_by(module, name)
        a, b, c = ("yes" if cell else "no" for cell in seen[name])
        tables = [t for t in ("_parameters", "_buffers", "_modules") if name in getattr(ours, t)]
        print(f"   {name:<13} {a:<14} {b:<14} {c:<10} {tables[0] if tables else 'no table'}")
    lost = [name for name, cells in seen.items() if not any(cells)]
    print(f"   -> nothing finds {' and '.join(lost)}. Of {len(theirs)} tensors in nn.Module")
    print(f"      OurModule has {sum(map(found.count, theirs))}: {', '.join(theirs)}")
    assert found == theirs
    return {"seen": seen, "found": found}


# --- 3. what a plain list loses ----------------------------------------------------------------


class Net(nn.Module):
    """(B, 1) -> (B, 1), its hidden layers in a `container`: list or nn.ModuleList."""

    def __init__(self, container, width=32, depth=2):
        super().__init__()
        self.first = nn.Linear(1, width)
        self.hidden = container(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        h = torch.tanh(self.first(x))  # (B, 1) -> (B, width)
        for layer in self.hidden:
            h = torch.tanh(layer(h))
        return self.last(h)


def fit(net, x, y, steps, lr, writer):
    """The loop of 02_autograd_basics.py. Returns, by step, the loss and how far `hidden` moved."""
    before = [layer.weight.detach().clone() for layer in net.hidden]
    optimizer = torch.optim.SGD(net.parameters(), lr)
    losses, moved = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)  # the mean of (net(x) - y)^2
        loss.backward()
        moves = [layer.weight - old for layer, old in zip(net.hidden, before, strict=True)]
        losses.append(loss.item())
        moved.append(torch.stack(moves).norm().item())  # the root of the sum of all squares
        writer.add_scalar("train/loss", losses[-1], step)
        writer.add_scalar("hidden/moved", moved[-1], step)
        optimizer.step()
    return losses, moved


def show_plain_list(seed, log_dir, steps, lr):
    print(f"3. What does a list lose? Two equal networks learn y = sin(3 x), {steps} steps of SGD")
    print("   hidden      numbers    loss at          weights of hidden   outputs of a reloaded")
    print("   layers in   to learn   start      end   layers moved by     copy differ by up to")
    x = torch.linspace(-1, 1, 128)[:, None]  # (128, 1)
    y, nets = torch.sin(3 * x), {}
    for run, container in (("plain_list", list), ("module_list", nn.ModuleList)):
        torch.manual_seed(seed)  # the same weights at the start
        net = Net(container)
        count = sum(parameter.numel() for parameter in net.parameters())
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            losses, moved = fit(net, x, y, steps, lr, writer)
        copy = Net(container)  # with weights of its own, until it loads those of net
        copy.load_state_dict(net.state_dict())
        off = (copy(x) - net(x)).abs().max().item()
        nets[run] = {"parameters": count, "losses": losses, "moved": moved, "off": off}
        print(f"   {container.__name__:<10}  {count:8,}   {losses[0]:.4f}  {losses[-1]:.4f}   "
              f"{moved[-1]:17.2f}   {off:21.2f}")  # fmt: skip
    shown = " and ".join(name for name, _ in Net(list).named_children())
    print(f"   -> with the list, print(net) shows only the layers {shown}, and the hidden layers")
    print(f"      moved by {nets['plain_list']['moved'][-1]:.2f}: look for yours in print(net)")
    return nets


# --- 4. train() and eval() ---------------------------------------------------------------------


def show_modes():
    print("4. What does eval() switch? Numbers that Dropout(0.5) sets to 0, of 10,000 ones")
    print("   mode      Dropout in the ModuleList   Dropout in the list")
    module, ones, zeros = zoo(nn.Module), torch.ones(10_000), {}
    for name, mode in (("train()", module.train), ("eval()", module.eval)):
        mode()
        outputs = module.module_list[1](ones), module.plain_list[1](ones)
        zeros[name] = [(output == 0).float().mean().item() for output in outputs]
        print(f"   {name:<9} {zeros[name][0]:25.0%}   {zeros[name][1]:19.0%}")
    print(f"   -> after eval() the list's Dropout still sets {zeros['eval()'][1]:.0%} to 0")
    return zeros


def main(seed=0, log_dir=LOG_DIR, steps=300, lr=0.1):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), **show_found()}
    measured["nets"] = show_plain_list(seed, log_dir, steps, lr)
    measured["zeros"] = show_modes()
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
