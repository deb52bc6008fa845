"""A state dict brings a network back bit for bit; to go on with its training takes more.

A state dict is a dict that holds every weight and bias of a network under its name, and buffers
such as BatchNorm's running means. It is what you save, and what you load into a new network with
the same layers. torch.save(net, path) would save the whole network, but that can be loaded only
while its class is found where it was. A training has more to remember: Adam keeps two running
averages per weight and a count of its steps, and the learning rate often depends on the epoch. If
these are lost, the training goes on in another way, and no error tells.

    torch.save(net.state_dict(), path)                          the weights of net, to a file
    new.load_state_dict(torch.load(path, weights_only=True))    from the file, into the network new
    lr = 0.05 (1 + cos(pi epoch / total)) / 2                   the learning rate in section 3

    epoch  how many epochs are done, of total in all            pi  3.14159...

Needs          nn_module.py, nn_optim.py, nn_common_layers.py (BatchNorm)
Checked here   loaded outputs = saved outputs; what is left of the best epoch; a resumed fit = a fit
               that was never stopped, but not without the optimizer or the epoch; which changes of
               a class the two kinds of file survive; what is left when a save fails
TensorBoard    train/log10_loss by epoch in the runs never_stopped, resumed, without_optimizer,
               without_epoch: resumed lies on never_stopped, the two others leave it
Try            in make_optimizer, write torch.optim.SGD for torch.optim.Adam: which runs of table 3
               now end with the weights of never_stopped?
Answer         resumed and without_optimizer: plain SGD remembers nothing from step to step, so that
               nothing is lost with it. With momentum=0.9 it would remember, as Adam does
Source         PyTorch tutorial "Saving and Loading Models"; Adam: Kingma & Ba 2015, arXiv:1412.6980
"""

import copy
import io
import math
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import PicklingError
from types import ModuleType

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.files import guard, write_whole

ROOT = Path(__file__).resolve().parent
LOG_DIR = ROOT / "runs" / "model_save"
CHECKPOINT_DIR = ROOT / "checkpoints" / "model_save"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path, x = folder / "linear.pth", torch.tensor([[1.0, 2.0]])
    net = nn.Linear(2, 1)
    torch.save(net.state_dict(), path)

    new = nn.Linear(2, 1)  # the same layer, with random numbers of its own
    before = new(x).item()
    state = torch.load(path, weights_only=True)  # weights_only: no code runs from the file
    new.load_state_dict(state)
    new.eval()  # for predictions: Dropout and BatchNorm work differently in training
    saved, after = net(x).item(), new(x).item()

    print("1. In everyday code: is the loaded network the saved one?")
    print("   in the file          shape     values")
    for name, tensor in state.items():
        values = ", ".join(f"{value:.4f}" for value in tensor.flatten().tolist())
        print(f"   {name:<20} {tuple(tensor.shape)!s:<9} {values}")
    print("   network              output for x = (1, 2)")
    for name, output in (("saved", saved), ("new, before loading", before), ("new, after", after)):
        print(f"   {name:<20} {output:21.4f}")
    same = [output == saved for output in (before, after)]
    print(f"   -> the output is the saved one: before loading {same[0]}, after it {same[1]}")
    return same


# --- 2. keep the best epoch --------------------------------------------------------------------


def save(thing, path):
    """torch.save to `path`, whole or not at all (section 5). DataError if the disk refuses.

    torch.save into an io.BytesIO first; then write its bytes by write_bytes to the path that
    write_whole(path), a context manager, gives. Exercise.
    """
    buffer = io.BytesIO()  # a file in memory: what cannot be saved fails before the disk is met
    torch.save(thing, buffer)
    with write_whole(path) as beside:
        beside.write_bytes(buffer.getvalue())


def make_net():
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))


def fit_best(net, x, y, x_val, y_val, epochs, folder):
    """Fit net(x) to y by Adam(net.parameters(), lr=0.05), one step an epoch on the mean square.

    After each step comes the validation loss, the mean squared error of net(x_val) and y_val, which
    it does not learn from. When it is lower than ever, `save` writes the state dict to
    folder/best.pth; after the last epoch, to folder/last.pth. Returns the lowest validation loss,
    and of its epoch net.state_dict() and a deep copy of it. Exercise.
    """
    optimizer, best = torch.optim.Adam(net.parameters(), lr=0.05), math.inf
    for _ in range(epochs):
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            val_loss = F.mse_loss(net(x_val), y_val).item()
        if val_loss < best:
            best, kept = val_loss, net.state_dict()
            copied = copy.deepcopy(kept)
            save(kept, folder / "best.pth")
    save(net.state_dict(), folder / "last.pth")
    return best, kept, copied


def show_best(folder, epochs):
    x, x_val = torch.linspace(-1, 1, 16)[:, None], torch.linspace(-1, 1, 101)[:, None]  # (N, 1)
    y, y_val = torch.sin(3 * x) + torch.randn(16, 1) / 2, torch.sin(3 * x_val)
    best, kept, copied = fit_best(make_net(), x, y, x_val, y_val, epochs, folder)
    print("2. How do you keep the best epoch? Validation loss: on points that are not trained on")
    print(f"   what is loaded after {epochs} epochs           validation loss")
    states = {"last.pth": torch.load(folder / "last.pth", weights_only=True),
              "best.pth": torch.load(folder / "best.pth", weights_only=True),
              "best = net.state_dict()": kept,
              "best = copy.deepcopy(net.state_dict())": copied}  # fmt: skip
    losses = {}
    for name, state in states.items():
        net = make_net()
        net.load_state_dict(state)
        losses[name] = F.mse_loss(net(x_val), y_val).item()
        print(f"   {name:<40} {losses[name]:15.4f}")
    print(f"   -> the lowest loss of all epochs is {best:.4f}; it is kept by")
    print(f"      {' and '.join(name for name in losses if losses[name] == best)};")
    print("      net.state_dict() alone shares memory with the weights, and changes with them")
    return {"best": best, "kept": losses}


# --- 3. go on with a training ------------------------------------------------------------------


def make_optimizer(net):
    return torch.optim.Adam(net.parameters())


def learning_rate(epoch, total):
    """0.05 (1 + cos(pi epoch / total)) / 2: from 0.05 down to 0, a float. Exercise."""
    return 0.05 * (1 + math.cos(math.pi * epoch / total)) / 2


def fit(net, optimizer, x, y, epochs, total):
    """Fit net(x) to y, one step an epoch, for each epoch of `epochs`, a range within `total`.

    Before each step every parameter group gets learning_rate(epoch, total). The loss is the mean
    squared error, taken before the step; returned is a list of all losses, floats. Exercise.
    """
    losses = []
    for epoch in epochs:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, total)
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resume(path, forget=None):
    """(net, optimizer, epoch) of a checkpoint, loaded by weights_only=True, without its `forget`.

    The file holds the state dict "model" of a make_net(), the state dict "optimizer" of its
    make_optimizer(net), and "epoch". If "optimizer" is forgotten, the optimizer is a new one; if
    "epoch" is, the epoch is 0. Exercise.
    """
    state = torch.load(path, weights_only=True)
    net = make_net()
    net.load_state_dict(state["model"])
    optimizer = make_optimizer(net)
    if forget != "optimizer":
        optimizer.load_state_dict(state["optimizer"])
    return net, optimizer, 0 if forget == "epoch" else state["epoch"]


def show_resume(log_dir, folder, total):
    x = torch.linspace(-1, 1, 128)[:, None]  # (128, 1)
    y, half, path = torch.sin(3 * x), total // 2, folder / "checkpoint.pth"
    net = make_net()
    optimizer = make_optimizer(net)
    losses = {"never_stopped": fit(net, optimizer, x, y, range(half), total)}
    save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": half}, path)
    losses["never_stopped"] += fit(net, optimizer, x, y, range(half, total), total)
    goal = nn.utils.parameters_to_vector(net.parameters()).detach()  # all weights in one row

    print(f"3. Does a training go on as if never stopped? {total} epochs, loaded after {half}")
    print("                       lr in its     loss in its   largest   largest weight difference")
    print("   run                 first epoch   first epoch   loss      from never_stopped at end")
    distance = {}
    for run in ("resumed", "without_optimizer", "without_epoch"):
        net, optimizer, epoch = resume(path, forget=run.removeprefix("without_"))
        losses[run] = fit(net, optimizer, x, y, range(epoch, epoch + total - half), total)
        end = nn.utils.parameters_to_vector(net.parameters()).detach()
        distance[run] = (end - goal).abs().max().item()
        print(f"   {run:<18}  {learning_rate(epoch, total):11.3f}   {losses[run][0]:11.4f}   "
              f"{max(losses[run]):7.4f}   {distance[run]:25.2f}")  # fmt: skip
    whole = ", ".join(run for run, off in distance.items() if off == 0)
    first = ", ".join({f"{losses[run][0]:.4f}": run for run in distance})  # each number once
    print(f"   -> all begin at loss {first}: their weights are right. But only {whole}")
    print("      ends as the run without a break, never_stopped: save the optimizer's state_dict()")
    print("      and the epoch, too; a scheduler has a state_dict() of its own")
    for run, values in losses.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, value in enumerate(values, total - len(values)):
                writer.add_scalar("train/log10_loss", math.log10(value), step)
    return {"losses": losses, "distance": distance}


# --- 4. a whole model, and its class -----------------------------------------------------------

NET_PY = """
from torch import nn, relu, tanh

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(1, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        return self.out(tanh(self.hidden(x)))
"""
CHANGES = {  # the module's name after the save; what is replaced in its text, and by what
    "nothing": ("net", "", ""),
    "net.py is now nets.py": ("nets", "", ""),
    "Net is now Network": ("net", "Net", "Network"),
    "hidden is now first": ("net", "hidden", "first"),
    "tanh is now relu": ("net", "tanh", "relu"),
}


@contextmanager
def module_of(name, text):
    """Inside the block, `import name` finds a module with this text, as if a file held it."""
    module = sys.modules[name] = ModuleType(name)
    exec(text, vars(module))
    try:
        yield module
    finally:
        del sys.modules[name]


def outcome(path, net_class, x, y):
    """What becomes of a network's file, where x (B, 1) gave y (B, 1) when it was saved.

    It holds a state dict for a net_class(), or a whole network if net_class is None.
    """
    try:
        if net_class is None:
            net = torch.load(path, weights_only=False)  # may run code: only for your own files
        else:
            net = net_class()
            net.load_state_dict(torch.load(path, weights_only=True))
        return "same outputs" if torch.equal(net(x), y) else "other outputs, no error"
    except (AttributeError, ImportError, RuntimeError) as error:
        return type(error).__name__


def show_whole(folder):
    whole, state = folder / "net.pth", folder / "net_state.pth"
    x = torch.linspace(-1, 1, 9)[:, None]
    with module_of("net", NET_PY) as module:
        net = module.Net()
        y = net(x)
        save(net, whole)
        save(net.state_dict(), state)
    print("4. torch.save(net) or torch.save(net.state_dict())? Used after a change of net.py")
    print("   what changed            whole network             state dict")
    outcomes = {}
    for change, (name, old, new) in CHANGES.items():
        with module_of(name, NET_PY.replace(old, new)) as module:
            net_class = module.Network if new == "Network" else module.Net
            row = outcomes[change] = [outcome(whole, None, x, y), outcome(state, net_class, x, y)]
        print(f"   {change:<22}  {row[0]:<24}  {row[1]}")
    n, rows = len(CHANGES) - 1, list(outcomes.values())[1:]
    kept = [sum(row[i] == "same outputs" for row in rows) for i in (0, 1)]
    print(f"   -> the whole network survives {kept[0]} of {n} changes, the state dict {kept[1]};")
    silent = ", ".join(change for change, row in outcomes.items() if "no error" in row[1])
    print(f'      "{silent}" goes unnoticed: save an input with its output, and compare')
    return outcomes


# --- 5. a save that fails ----------------------------------------------------------------------


def show_failed_save(folder):
    path, left = folder / "over_a_good_file.pth", {}
    print("5. What is left of the old file if a save over it fails? (A lambda cannot be saved)")
    print("   save, of section 2: writes a new file beside the old one, then puts it in its place")
    print("   saved by              bytes before   bytes left")
    for name, way in (("torch.save", torch.save), ("save", save)):
        save({"weights": torch.zeros(1000)}, path)
        old = path.read_bytes()
        with suppress(PicklingError, AttributeError):
            way({"weights": torch.ones(1000), "schedule": lambda epoch: 0.1}, path)
        left[name] = path.read_bytes()
        print(f"   {name:<20}  {len(old):12,}   {len(left[name]):10,}")
    print(f"   -> the old file is whole after: {', '.join(n for n in left if left[n] == old)}")
    return {name: data == old for name, data in left.items()}


def main(seed=0, log_dir=LOG_DIR, checkpoint_dir=CHECKPOINT_DIR, epochs=400, total=200):
    torch.manual_seed(seed)
    measured = {"same": show_everyday(checkpoint_dir), **show_best(checkpoint_dir, epochs)}
    measured |= show_resume(log_dir, checkpoint_dir, total)
    measured["outcomes"] = show_whole(checkpoint_dir)
    measured["unharmed"] = show_failed_save(checkpoint_dir)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
