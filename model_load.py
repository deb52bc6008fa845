"""To load a network, build it, fill it, call eval(): else other images change its answers.

A file of weights holds tensors under names. You build a network with the same layers, and
load_state_dict copies each tensor to its place. In train() mode BatchNorm normalises by the batch
that it sees, so that an image alone gets another answer than among others; eval() ends that. Three
more things can go wrong. Names may differ, and strict=False hides it. A file may hold code, since
its format, the pickle, may name any function and have it called; weights_only=True refuses every
name but the few that tensors, lists and dicts need. On a machine without a GPU, a file saved from
one needs map_location="cpu".

    net = Moli(3)                                                a network with 3 classes, to fill
    net.load_state_dict(torch.load(path, weights_only=True))     fill it from a file
    net.eval()                                                   before you predict

Needs          nn_common_layers.py, model.py, model_save.py
Checked here   train() and eval() for one image, alone and among others; missing and unexpected
               names; what is loaded, refused or run of three files; map_location; a reader of our
               own with such a table of names
TensorBoard    load/as_saved, by place: how many of the first tensors are as saved; runs complete
               and mended rise to 22, headless to 18, prefixed stays at 0
Try            in variants, add "wide": {**state, "classifier.3.bias": torch.zeros(9)} to what is
               returned: does strict=False leave that tensor out?
Answer         No: both ways raise a RuntimeError. strict is about names, and this is a wrong shape.
               And yet the 21 other tensors have been loaded
Source         torch.load and PyTorch notes, "Serialization semantics"; Python's pickle,
               "Restricting Globals"
"""

import io
import pickle
import signal
import tempfile
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from unittest import mock
from zipfile import ZipFile

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from model import Moli
from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "model_load"
CLASSES = ("red", "green", "blue")


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(path, image):
    net = Moli(3)
    net.load_state_dict(torch.load(path, weights_only=True))
    net.eval()
    with torch.no_grad():
        p = net(image[None]).softmax(1)[0]  # [None]: image (3, 32, 32) is a batch (1, 3, 32, 32)

    print("1. In everyday code: load a network that knows three colours, and predict one image")
    print("   class    mean of that colour in the image   probability")
    for name, colour, probability in zip(CLASSES, image.mean((1, 2)), p, strict=True):
        print(f"   {name:<7}  {colour:32.2f}   {probability:11.3f}")
    print(f"   -> the loaded network says {CLASSES[p.argmax()]}")
    return p.tolist()


def tinted(n):
    """n images of noise (n, 3, 32, 32), in turn a little more red, green and blue; classes (n,)."""
    y = torch.arange(n) % 3
    x = torch.randn(n, 3, 32, 32)
    x[torch.arange(n), y] += 0.5
    return x, y


def make_moli(steps):
    """A Moli(3) that has learned the three colours; no tensor is as it was when it was new."""
    moli = Moli(3)
    optimizer = torch.optim.SGD(moli.parameters(), lr=0.05)
    for _ in range(steps):
        x, y = tinted(24)
        optimizer.zero_grad()
        F.cross_entropy(moli(x), y).backward()
        optimizer.step()
    return moli.eval()


# --- 2. without eval() -------------------------------------------------------------------------


def equal(state, other):
    """For each tensor of a state dict: does `other` hold it, equal bit for bit? A list of bools.

    `other` is a state dict, too; what it holds besides does not matter. Exercise.
    """
    return [key in other and torch.equal(tensor, other[key]) for key, tensor in state.items()]


@torch.no_grad()
def show_eval(path, x, y):
    net, state = Moli(3), torch.load(path, weights_only=True)
    net.load_state_dict(state)
    print(f"2. What if eval() is forgotten? One image, {CLASSES[y[0]]}, alone and among others")
    print("   mode      predicted together with   probability of its class")
    groups = {"no other image": x[:1], "7 of its colour": x[y == y[0]], "23 of all colours": x}
    p = {"eval()": [], "train()": []}
    for mode in p:
        net.train(mode == "train()")  # net.train(False) is net.eval()
        for name, group in groups.items():
            p[mode].append(net(group).softmax(1)[0, y[0]].item())
            print(f"   {mode:<7}   {name:<23}   {p[mode][-1]:24.3f}")
    swing = {mode: max(row) - min(row) for mode, row in p.items()}
    moved = equal(state, net.state_dict()).count(False)
    print(f"   -> other images change its probability by {swing['eval()']:.3f} in eval(), by "
          f"{swing['train()']:.3f} in train();")  # fmt: skip
    print(
        f"      predicting in train() overwrote {moved} of {len(state)} tensors, all in BatchNorm"
    )
    return {"p": p, "swing": swing, "moved": moved}


# --- 3. names that do not match ----------------------------------------------------------------


def variants(state):
    """State dicts as one meets them: all there, cut, of a wrapped network, and that one mended.

    {"complete": state; "headless": without the keys that begin with "classifier."; "prefixed": all
    keys behind "module.", as nn.DataParallel saves them; "mended": the prefix taken off again}.
    Exercise.
    """
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    return {
        "complete": state,
        "headless": {key: t for key, t in state.items() if not key.startswith("classifier.")},
        "prefixed": prefixed,
        "mended": {key.removeprefix("module."): t for key, t in prefixed.items()},
    }


def load_into(net, given, strict):
    """Load the state dict `given` into net: [missing keys, unexpected keys], two numbers.

    The name of the error instead, "RuntimeError", if load_state_dict raises it. Exercise.
    """
    try:
        result = net.load_state_dict(given, strict=strict)
    except RuntimeError as error:
        return type(error).__name__
    return [len(result.missing_keys), len(result.unexpected_keys)]


def show_names(log_dir, state):
    print("3. What if names differ? Each state dict is loaded with strict=True, then strict=False")
    print(
        '   headless: no classifier; prefixed: all names with "module."; mended: without it again'
    )
    print(
        "   state dict   absent names  strict=True    strict=False                tensors as saved"
    )
    loaded = {}
    for run, given in variants(state).items():
        absent, net = len(state.keys() - given.keys()), Moli(3)
        told = [load_into(Moli(3), given, strict=True), load_into(net, given, strict=False)]
        as_saved = equal(state, net.state_dict())
        loaded[run] = absent, *told, sum(as_saved)
        first, second = (out if isinstance(out, str) else "loaded" for out in told)
        if second == "loaded":
            second = "{:2d} missing, {:2d} unexpected".format(*told[1])
        row = f"{absent:12d}  {first:<12}   {second:<25}  {sum(as_saved):2d} of {len(state)}"
        print(f"   {run:<10}   {row}")
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for place, number in enumerate(accumulate(as_saved), 1):
                writer.add_scalar("load/as_saved", number, place)
    absent, _, (missing, _), number = loaded["prefixed"]
    print(f"   -> strict=False loaded {number} tensors of prefixed without an error: so print what")
    free = absent - missing
    print(
        f"      load_state_dict returns ({free} of the {absent} absent ones are BatchNorm counters:"
    )
    print("      torch does not call them missing where the state is a plain dict)")
    return loaded


# --- 4. a file from a GPU ----------------------------------------------------------------------


def device_after(path, map_location):
    """Where the tensors in a file are after torch.load with this map_location, or its error."""
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except RuntimeError as error:
        return f"RuntimeError: {str(error).partition(' but ')[0]}"
    return str(next(iter(state.values())).device)


def show_devices(state, path):
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save(state, path)  # tensors of the CPU, with the tag that a GPU's get
    print('4. Where do tensors go from a file that says "cuda:0"? (Made here, tagged as by a GPU)')
    print("   map_location   the tensors are then on")
    here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    devices = {str(to): device_after(path, to) for to in (None, "cpu", here)}
    for to, device in devices.items():
        print(f"   {to:<12}   {device}")
    print(f'   -> with map_location="cpu" they are on {devices["cpu"]}; then net.to(device)')
    return devices


# --- 5. code in a file -------------------------------------------------------------------------


class Surprise:
    """Is saved as a call of exec: whoever loads it makes an empty file at `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"import pathlib; pathlib.Path({str(self.marker)!r}).touch()",)


def moli_allowed(path):
    with torch.serialization.safe_globals([type(module) for module in Moli().modules()]):
        return torch.load(path, weights_only=True)  # the file may name these classes, too


def weights_only(path):
    return torch.load(path, weights_only=True)  # the default since PyTorch 2.6


def unguarded(path):
    return torch.load(path, weights_only=False)  # here to be seen; never on a file from elsewhere


def attempt(load, path, state, marker):
    """(outcome, has code run?) of load(path), which is a state dict or a network that has one.

    The outcome is how many tensors are as in `state`, a number; if load raises
    pickle.UnpicklingError, it is the name of that error. Code has run if the file `marker` is there
    afterwards. Exercise.
    """
    try:
        loaded = load(path)
    except pickle.UnpicklingError as error:
        return type(error).__name__, marker.exists()
    if not isinstance(loaded, dict):
        loaded = loaded.state_dict()
    return sum(equal(state, loaded)), marker.exists()


def show_code(paths, state, marker):
    loaders = {
        "weights_only=True": weights_only,
        "True, Moli allowed": moli_allowed,
        "weights_only=False": unguarded,
    }
    print(f"5. What may a file do? How many of its {len(state)} tensors torch.load gives back")
    print("   file              " + "".join(f"{name:<25}" for name in loaders).rstrip())
    outcomes, ran = {}, []
    for kind, path in paths.items():
        outcomes[kind], row = {}, f"   {kind:<18}"
        for name, load in loaders.items():
            marker.unlink(missing_ok=True)
            outcome, has_run = outcomes[kind][name] = attempt(load, path, state, marker)
            if has_run:
                outcome = f"{outcome}, and code ran"
                ran.append(name)
            row += f"{outcome:<25}"
        print(row.rstrip())
    print(f"   -> code from a file ran with: {', '.join(ran)}. Use that for your own files only")
    return outcomes


# --- 6. second reading: a reader of our own ----------------------------------------------------


def rebuild(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)


ALLOWED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": rebuild,
    "torch.FloatStorage": torch.float32,
    "torch.LongStorage": torch.int64,
}


class Reader(pickle.Unpickler):
    """Of a file of torch.save, a zip; raises UnpicklingError at a name that is not in ALLOWED."""

    def __init__(self, file):
        pickle_name = next(name for name in file.namelist() if name.endswith("/data.pkl"))
        super().__init__(io.BytesIO(file.read(pickle_name)))
        self.file, self.folder = file, pickle_name.removesuffix("data.pkl")

    def find_class(self, module, name):
        """What ALLOWED has for "module.name"; UnpicklingError "module.name is refused" if nothing.

        Exercise.
        """
        if f"{module}.{name}" not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return ALLOWED[f"{module}.{name}"]

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid  # "storage", dtype, key, device, length
        return torch.frombuffer(bytearray(self.file.read(f"{self.folder}data/{key}")), dtype=dtype)


def read_state(path):
    with ZipFile(path) as file:
        return Reader(file).load()


def show_reader(paths, state):
    print(f"6. How can a loader refuse code? Ours may call {len(ALLOWED)} names and no other")
    print("   file              outcome")
    outcomes = {}
    for kind, path in paths.items():
        try:
            outcomes[kind] = f"{sum(equal(state, read_state(path)))} of {len(state)} tensors"
        except pickle.UnpicklingError as error:
            outcomes[kind] = str(error)
        print(f"   {kind:<16}  {outcomes[kind]}")
    refused = sum("is refused" in outcome for outcome in outcomes.values())
    print(
        f"   -> a name outside the table ended the reading of {refused} files, before it was called"
    )
    return outcomes


def main(seed=0, log_dir=LOG_DIR, steps=30):
    torch.manual_seed(seed)
    moli, (x, y) = make_moli(steps), tinted(24)
    state = moli.state_dict()
    with tempfile.TemporaryDirectory() as name:
        folder, marker = Path(name), Path(name, "code has run")
        files = {"state dict": state, "whole network": moli,
                 "with code in it": {**state, "surprise": Surprise(marker)}}  # fmt: skip
        paths = {kind: folder / f"{kind}.pth" for kind in files}
        for kind, thing in files.items():
            torch.save(thing, paths[kind])
        measured = {
            "p": show_everyday(paths["state dict"], x[1]),
            "eval": show_eval(paths["state dict"], x, y),
            "names": show_names(log_dir, state),
            "devices": show_devices(state, folder / "gpu.pth"),
            "code": show_code(paths, state, marker),
            "reader": show_reader(paths, state),
        }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
