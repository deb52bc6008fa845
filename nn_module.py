"""A module owns what is assigned to it: a layer hidden in a plain list is never trained or saved.

    self.weight = nn.Parameter(t)         __setattr__ enters it in self._parameters
    self.layer = nn.Linear(4, 4)          __setattr__ enters it in self._modules
    self.register_buffer("mean", t)       self._buffers: saved and moved, but not trained
    self.layers = [nn.Linear(4, 4)]       a list, nothing is entered

parameters(), state_dict(), double() and train() walk these tables and see nothing else. The forward
pass uses the list all the same, and autograd computes its gradients: nothing warns. module(x) is
forward(x) and the hooks around it; forward alone leaves them out. train() and eval() set one flag,
which Dropout and BatchNorm read; gradients flow in both.

Checked here   a class of our own registers, calls and switches like nn.Module; four of six kinds of
               attribute are seen; the list's weights do not move, and a reloaded copy differs
TensorBoard    train/loss and hidden/moved in the runs plain_list and module_list
Try            give the optimizer the list's parameters too: is all well? No, they are not saved
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
ATTRIBUTES = ("parameter", "buffer", "tensor", "layer", "plain_list", "module_list")


class Double(nn.Module):
    """The smallest module: nothing to learn, one formula."""

    def forward(self, x):
        return 2 * x


class OurModule:
    """What nn.Module does with attributes, calls and modes."""

    def __init__(self):
        self._parameters, self._buffers, self._modules, self._hooks = {}, {}, {}, []
        self.training = True

    def __setattr__(self, name, value):
        """Enter an nn.Parameter in self._parameters, a module in self._modules, by its name.

        Modules are those of this class and nn.Module. Whatever it is, it becomes an attribute as
        well. Exercise.
        """
        if isinstance(value, nn.Parameter):
            self._parameters[name] = value
        elif isinstance(value, (OurModule, nn.Module)):
            self._modules[name] = value
        super().__setattr__(name, value)

    def register_buffer(self, name, tensor):
        self._buffers[name] = tensor
        super().__setattr__(name, tensor)

    def register_forward_hook(self, hook):
        self._hooks.append(hook)

    def __call__(self, *inputs):
        """self.forward(*inputs), then every hook of self._hooks as hook(self, inputs, output).

        Returns the output. Exercise.
        """
        output = self.forward(*inputs)
        for hook in self._hooks:
            hook(self, inputs, output)
        return output

    def train(self, mode=True):
        """Set self.training to `mode` here, and in all submodules by their train; return self.

        Exercise.
        """
        self.training = mode
        for child in self._modules.values():
            child.train(mode)
        return self  # eval() is train(False)


def walk(module, table, prefix=""):
    """(name, tensor) of all that a module and its submodules entered in `table`; a generator.

    `table` is the name of a dict, "_parameters" or "_buffers". Own entries come first, then those
    of each child of module._modules, their names behind "child.". Exercise.
    """
    for name, tensor in getattr(module, table).items():
        yield prefix + name, tensor
    for name, child in module._modules.items():
        yield from walk(child, table, f"{prefix}{name}.")


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
    """Whether parameters(), state_dict() and double(), called before, see the attribute `name`.

    Three bools: is there a name in named_parameters() that begins with it, before a dot; in
    state_dict(); is its tensor float64 (of a layer its weight, of a list of layers the first
    one's)? Exercise.
    """
    value = getattr(module, name)
    layer = value[0] if isinstance(value, (list, nn.ModuleList)) else value
    tensor = layer.weight if isinstance(layer, nn.Module) else layer
    names = {key.split(".")[0] for key, _ in module.named_parameters()}
    saved = {key.split(".")[0] for key in module.state_dict()}
    return name in names, name in saved, tensor.dtype == torch.float64


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


def fit(net, parameters, x, y, steps, lr, writer):
    """Adam. Returns the last mean squared error and how far the hidden weights have moved."""
    before = [layer.weight.detach().clone() for layer in net.hidden]
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pairs = zip(net.hidden, before, strict=True)
        moved = sum((layer.weight.detach() - w).square().sum() for layer, w in pairs).sqrt()
        writer.add_scalar("train/loss", loss.detach(), step)
        writer.add_scalar("hidden/moved", moved, step)
    return loss.item(), moved.item()


def hook_runs(module, x):
    """How often a forward hook runs in module(x), and in module.forward(x): two integers.

    Exercise.
    """
    runs = []
    module.register_forward_hook(lambda *_: runs.append(1))
    module(x)
    by_call = len(runs)
    module.forward(x)
    return by_call, len(runs) - by_call


def main(seed=0, log_dir=LOG_DIR, steps=200):
    print("1. what each table sees of a module's attributes")
    modules = {}
    for base in (nn.Module, OurModule):
        torch.manual_seed(seed)
        modules[base] = zoo(base)
    module, ours = modules.values()
    x = torch.randn(8, 4)
    assert torch.equal(ours(x), module(x)) and torch.equal(Double()(x), 2 * x)
    assert [*dict(walk(ours, "_parameters"))] == [*dict(module.named_parameters())]
    assert [*dict(walk(ours, "_buffers"))] == [*dict(module.named_buffers())]
    module.double()
    seen = {name: seen_by(module, name) for name in ATTRIBUTES}
    print(f"   {'':<12} parameters()   state_dict()   double()")
    for name, row in seen.items():
        print(f"   {name:<12}" + "".join(f" {'yes' if cell else '-':<14}" for cell in row).rstrip())

    print(f"2. two nets, equal weights at the start, {steps} steps on y = sin(6 x)")
    x = torch.linspace(-1, 1, 128)[:, None]
    y, nets = torch.sin(6 * x), {}
    for run, container in {"plain_list": list, "module_list": nn.ModuleList}.items():
        torch.manual_seed(seed)
        net = Net(container)
        count = sum(p.numel() for p in net.parameters())
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            loss, moved = fit(net, net.parameters(), x, y, steps, 3e-3, writer)
        copy = Net(container)
        copy.load_state_dict(net.state_dict())
        error = (copy(x) - net(x)).abs().max().item()
        nets[run] = {"parameters": count, "loss": loss, "moved": moved, "error": error}
        print(f"   {run:<12} parameters {count:5,}   loss {loss:.4f}   hidden weights moved "
              f"{moved:.2f}   reloaded copy off by {error:.2f}")  # fmt: skip

    print("3. runs of a forward hook")
    hooks = {base.__name__: hook_runs(zoo(base), torch.ones(1, 4)) for base in modules}
    for name, (called, forwarded) in hooks.items():
        print(f"   {name:<12} module(x) {called}   module.forward(x) {forwarded}")

    print("4. Dropout(0.5) on ones: share of zeros; norm of a gradient of the module's layer")
    zeros = {}
    for training in (True, False):
        module, ours = zoo(nn.Module).train(training), zoo(OurModule).train(training)
        assert ours.module_list[1].training == module.module_list[1].training == training
        dropouts = module.module_list[1], module.plain_list[1]
        share = [(drop(torch.ones(10_000)) == 0).float().mean().item() for drop in dropouts]
        module(torch.ones(1, 4)).sum().backward()
        zeros[training] = *share, module.layer.weight.grad.norm().item()
        print(f"   {'train()' if training else 'eval()':<8} module_list {share[0]:.2f}   "
              f"plain_list {share[1]:.2f}   gradient {zeros[training][2]:.2f}")  # fmt: skip
    return {"seen": seen, "nets": nets, "hooks": hooks, "zeros": zeros}


if __name__ == "__main__":
    guard(main)
