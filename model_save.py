"""A saved model is not whole: it only names its class, and once that has moved, loading fails.

    torch.save(model, path)                the tensors, and the name of every class around them
    torch.save(model.state_dict(), path)   the same tensors, each under its own name

A whole model needs its classes where they were when it is loaded; a state dict needs a model with
the same layers, from anywhere. Neither notices that forward was rewritten. To go on with training,
weights are not enough: Adam's next step depends on its moving averages and step count, and the
learning rate here on the epoch. Whatever is saved is written beside its place and then renamed, so
that a save that fails leaves the last good file.

Checked here   both files hold the same bytes of weights; what each makes of four changes to the
               class; a resumed fit ends as one never stopped, but not without optimizer or epoch;
               a save that fails over a good file, by torch.save and by our `save`
TensorBoard    train/log10_loss of never_stopped, resumed, without_optimizer, without_epoch
Try            keep best = net.state_dict() in memory, train on: is it still the best? No: it shares
               the weights' memory and moves with them; copy.deepcopy of it stays
Source         PyTorch tutorial "Saving and Loading Models"; Kingma & Ba 2015, arXiv:1412.6980
"""

import inspect
import io
import math
import pickletools
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import PicklingError
from types import ModuleType
from zipfile import ZipFile

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from model import Moli
from support.files import guard, write_whole

ROOT = Path(__file__).resolve().parent
LOG_DIR = ROOT / "runs" / "model_save"
CHECKPOINT_DIR = ROOT / "checkpoints" / "model_save"
CHANGES = {  # what is replaced in the text of Net, and by what
    "nothing": ("", ""),
    "class moved": None,
    "class renamed": ("class Net", "class Network"),
    "layer renamed": ("hidden", "first"),
    "tanh to relu": ("tanh", "relu"),
}


class Net(nn.Module):
    """(B, 1) -> (B, 1)"""

    def __init__(self, width=32):
        super().__init__()
        self.hidden = nn.Linear(1, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))


# --- what is in a file -----------------------------------------------------------------------


def save(thing, path):
    """torch.save to `path`, whole or not at all. Raises DataError if the disk refuses.

    torch.save into an io.BytesIO first; then write its bytes by write_bytes to the path that
    write_whole(path), a context manager, gives. Exercise.
    """
    buffer = io.BytesIO()  # so that only write_bytes meets the disk, and its OSError says why
    torch.save(thing, buffer)
    with write_whole(path) as beside:
        beside.write_bytes(buffer.getvalue())


def read_zip(path):
    """(pickle, [bytes of each tensor, in order]) of a file of torch.save, which is a zip.

    Within its one folder the pickle is called data.pkl, and each tensor data/0, data/1 and so on,
    in the order of namelist(). Exercise.
    """
    with ZipFile(path) as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    return records["data.pkl"], [data for name, data in records.items() if name.startswith("data/")]


def names_in(path):
    """The classes and functions that loading a file would import, read without loading it.

    A sorted list without repeats. pickletools.genops(pickle) yields (code, argument, place); where
    code.name is GLOBAL, the argument is "module name": here it becomes "module.name". Exercise.
    """
    pickle, _ = read_zip(path)
    operations = pickletools.genops(pickle)
    return sorted({name.replace(" ", ".") for code, name, _ in operations if code.name == "GLOBAL"})


# --- the class changes -----------------------------------------------------------------------


@contextmanager
def net_py(text):
    """Inside the block there is an importable net.py with this text; with None there is none."""
    module = ModuleType("net")
    if text is not None:
        exec("import torch\nfrom torch import nn\n\n" + text, vars(module))
        sys.modules["net"] = module
    try:
        yield module
    finally:
        sys.modules.pop("net", None)


def load_whole(path):
    return torch.load(path, weights_only=False)  # runs what the file says: only for your own files


def load_state(path, net_class):
    """A net_class() with the state dict that lies at `path`, loaded with weights_only=True.

    Exercise.
    """
    net = net_class()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def outcome(load, x, y):
    """What becomes of a saved model that gave y (B, 1) for x (B, 1)."""
    try:
        net = load()
    except (AttributeError, ImportError, RuntimeError) as error:
        return f"{type(error).__name__} on loading"
    try:
        return "same outputs" if torch.equal(net(x), y) else "other outputs, no error"
    except AttributeError as error:
        return f"loads; {type(error).__name__} on calling"


def survive(folder, x):
    """For each of CHANGES, what comes of the whole model and of the state dict saved before it."""
    whole, state, text = folder / "net_whole.pth", folder / "net_state.pth", inspect.getsource(Net)
    with net_py(text) as module:
        net = module.Net()
        save(net, whole)
        save(net.state_dict(), state)
        y = net(x)
    outcomes = {}
    for change, edit in CHANGES.items():
        with net_py(edit and text.replace(*edit)) as module:
            net_class = getattr(module, "Network", getattr(module, "Net", Net))  # moved: to here
            outcomes[change] = (
                outcome(lambda: load_whole(whole), x, y),
                outcome(lambda c=net_class: load_state(state, c), x, y),
            )
    return outcomes


# --- going on with a fit ---------------------------------------------------------------------


def learning_rate(epoch, total):
    """From 0.05 down to 0 over `total` epochs, along half a cosine: a float.

    0.05 (1 + cos(pi epoch / total)) / 2. Exercise.
    """
    return 0.05 * (1 + math.cos(math.pi * epoch / total)) / 2


def fit(net, optimizer, x, y, epochs, total):
    """Adam, one step an epoch, for `epochs`, a range out of `total`. Returns each epoch's loss.

    Before each step every parameter group gets learning_rate(epoch, total). The loss is the mean
    squared error of net(x) and y, taken before the step; a list of floats. Exercise.
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
    """(net, optimizer, epoch) of a checkpoint, as if it held no `forget`.

    The file holds the state dicts "model" of a Net and "optimizer" of a torch.optim.Adam, and
    "epoch". Forgotten, the optimizer is a new one, and the epoch 0. Exercise.
    """
    state = torch.load(path, weights_only=True)
    net = Net()
    net.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(net.parameters())
    if forget != "optimizer":
        optimizer.load_state_dict(state["optimizer"])
    return net, optimizer, 0 if forget == "epoch" else state["epoch"]


def after_failed_save(way, good, path):
    """Save by `way`, over a file of the bytes `good`, what cannot be pickled: the bytes then."""
    path.write_bytes(good)
    with suppress(PicklingError, AttributeError):
        way({"schedule": lambda epoch: 0.1}, path)
    left = path.read_bytes()
    path.unlink()
    return left


def is_readable(data):
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except RuntimeError:
        return False
    return True


def main(seed=0, log_dir=LOG_DIR, checkpoint_dir=CHECKPOINT_DIR, total=200):
    torch.manual_seed(seed)

    print("1. Moli saved both ways")
    moli, contents = Moli(), {}
    for name, thing in {"moli_whole.pth": moli, "moli_state.pth": moli.state_dict()}.items():
        save(thing, checkpoint_dir / name)
        pickle, tensors = contents[name] = read_zip(checkpoint_dir / name)
        layers = [n for n in names_in(checkpoint_dir / name) if n.startswith(("model", "torch.nn"))]
        print(f"   {name}   tensors {len(tensors)}, {sum(map(len, tensors)):,} bytes   "
              f"pickle {len(pickle):5,} bytes   classes of layers {len(layers)}")  # fmt: skip
    assert contents["moli_whole.pth"][1] == contents["moli_state.pth"][1]  # byte for byte

    print("2. what is left when the class has changed since")
    x = torch.linspace(-1, 1, 128)[:, None]  # (128, 1)
    outcomes = survive(checkpoint_dir, x)
    print(f"   {'':<15} {'whole model':<34} state dict")
    for change, (of_whole, of_state) in outcomes.items():
        print(f"   {change:<15} {of_whole:<34} {of_state}")

    half = total // 2
    print(f"3. y = sin(3 x), {total} epochs of Adam, saved after {half}: going on from the file")
    y, path, distance = torch.sin(3 * x), checkpoint_dir / f"net_epoch_{half}.pth", {}
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    losses = {"never_stopped": fit(net, optimizer, x, y, range(half), total)}
    save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": half}, path)
    losses["never_stopped"] += fit(net, optimizer, x, y, range(half, total), total)
    end = nn.utils.parameters_to_vector(net.parameters())
    for run, forget in {"resumed": None, "without_optimizer": "optimizer",
                        "without_epoch": "epoch"}.items():  # fmt: skip
        net, optimizer, epoch = resume(path, forget)
        losses[run] = fit(net, optimizer, x, y, range(epoch, epoch + total - half), total)
        off = nn.utils.parameters_to_vector(net.parameters()) - end
        distance[run] = off.abs().max().item()
        print(f"   {run:<18} first loss {losses[run][0]:.4f}   largest {max(losses[run]):.4f}   "
              f"weights at the end off by {distance[run]:.2f}")  # fmt: skip
    assert losses["resumed"] == losses["never_stopped"][half:] and distance["resumed"] == 0
    for run, values in losses.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, value in enumerate(values, total - len(values)):
                writer.add_scalar("train/log10_loss", math.log10(value), step)

    print("4. a save that fails (a lambda cannot be pickled) over a good file: what is left")
    good, readable = path.read_bytes(), {}
    for name, way in {"torch.save": torch.save, "save": save}.items():
        left = after_failed_save(way, good, checkpoint_dir / "over_a_good_file.pth")
        readable[name] = is_readable(left)
        print(f"   {name:<11} bytes {len(left):5,} of {len(good):,}   "
              f"can be loaded {'yes' if readable[name] else 'no'}")  # fmt: skip
    return {"outcomes": outcomes, "losses": losses, "distance": distance, "readable": readable}


if __name__ == "__main__":
    guard(main)
