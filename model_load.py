"""A pickle is a program: torch.load runs it, unless weights_only=True refuses what is not data.

    net.load_state_dict(torch.load(path, weights_only=True))    the default since PyTorch 2.6
    net = torch.load(path, weights_only=False)       a whole model, and whatever else the file says
    with torch.serialization.safe_globals([Moli, nn.Linear, …]):
        net = torch.load(path, weights_only=True)    a whole model, of these classes and no others

A pickle may name any function and have it called. The guard is a table of the few names that
tensors and containers need; every other name is refused, a model's class too. strict=False is a
guard taken away: it forgives names, so a state dict with a prefix before each of them loads
nothing, and only the returned lists tell.

Checked here   a reader of our own with such a table agrees with torch.load; the ways back are
               equal bit for bit; a file that runs code is refused, and unguarded it runs; missing
               and unexpected keys are differences of sets; a file that was saved on another device
TensorBoard    load/as_saved, how many tensors so far are as saved: complete and mended rise to the
               last, headless stops before the classifier, prefixed never starts
Try            strict=False and a head of three classes: is it left out? No, the shape is an error
Source         torch.load and PyTorch notes, "Serialization semantics"; Python's pickle,
               "Restricting globals"
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


def make_moli(steps=1):
    """A Moli after `steps` steps of SGD on noise, so that every tensor of it has moved."""
    moli = Moli()
    optimizer = torch.optim.SGD(moli.parameters(), lr=0.1)
    for _ in range(steps):
        x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        optimizer.zero_grad()
        F.cross_entropy(moli(x), y).backward()
        optimizer.step()
    return moli.eval()


# --- a reader of our own ---------------------------------------------------------------------


def rebuild(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)


ALLOWED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": rebuild,
    "torch.FloatStorage": torch.float32,
    "torch.LongStorage": torch.int64,
}


class Reader(pickle.Unpickler):
    """Of a zip file of torch.save; raises UnpicklingError at a name that is not in ALLOWED."""

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


# --- code in a file --------------------------------------------------------------------------


class Surprise:
    """Pickles as a call: whoever loads it makes an empty file at `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"import pathlib; pathlib.Path({str(self.marker)!r}).touch()",)


def unguarded(path):
    return torch.load(path, weights_only=False)  # here to be seen; never on a file from elsewhere


def attempt(load, path, marker):
    """(name of a type, whether code has run) of what a loader makes of a file.

    The type is that of load(path), or of the pickle.UnpicklingError that it raises; code has run if
    the file `marker` exists then. Exercise.
    """
    try:
        outcome = load(path)
    except pickle.UnpicklingError as error:
        outcome = error
    return type(outcome).__name__, marker.exists()


# --- names and devices -----------------------------------------------------------------------


def variants(state):
    """State dicts as one meets them: all there, cut, of a wrapped model, and that one mended.

    {"complete": state; "headless": without the keys that begin with "classifier."; "prefixed": all
    keys behind "module."; "mended": the prefix taken off again}. Exercise.
    """
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    return {
        "complete": state,
        "headless": {key: t for key, t in state.items() if not key.startswith("classifier.")},
        "prefixed": prefixed,
        "mended": {key.removeprefix("module."): t for key, t in prefixed.items()},
    }


def equal(state, other):
    """For each tensor of two state dicts with the same keys: is it equal bit for bit? A list.

    Exercise.
    """
    assert state.keys() == other.keys()
    return [torch.equal(state[key], other[key]) for key in state]


def device_after(path, map_location):
    """Where the tensors of a file are after torch.load with this map_location: "cpu", "meta" ….

    The name of the error instead, "RuntimeError", if they cannot be there. Exercise.
    """
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except RuntimeError as error:
        return type(error).__name__
    return str({tensor.device for tensor in state.values()}.pop())


def ways_back(state_path, whole_path):
    """The state dict that each way of loading gives."""
    empty, filled = Moli(), Moli()
    filled.load_state_dict(torch.load(state_path, weights_only=True))
    whole = unguarded(whole_path)
    classes = {type(module) for module in empty.modules()}
    with torch.serialization.safe_globals(list(classes)):
        listed = torch.load(whole_path, weights_only=True)
    return {
        "nothing loaded": empty.state_dict(),
        "state dict": filled.state_dict(),
        "state dict, our reader": read_state(state_path),
        "whole, unguarded": whole.state_dict(),
        f"whole, {len(classes)} safe_globals": listed.state_dict(),
    }


def load_loosely(given, state):
    """Load `given` with strict=False into a new Moli: ((missing, unexpected, untouched), as saved).

    missing and unexpected are the numbers of keys that load_state_dict returns; untouched is the
    number of tensors that are what they were before; "as saved" is equal(state, the new state
    dict). Exercise.
    """
    net = Moli()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    result = net.load_state_dict(given, strict=False)
    absent = state.keys() - given.keys()
    counters = {key for key in absent if key.endswith("num_batches_tracked")}  # may be missing
    assert set(result.missing_keys) | counters == absent
    assert set(result.unexpected_keys) == given.keys() - state.keys()
    untouched = sum(equal(before, net.state_dict()))
    counts = len(result.missing_keys), len(result.unexpected_keys), untouched
    return counts, equal(state, net.state_dict())


def main(seed=0, log_dir=LOG_DIR):
    torch.manual_seed(seed)
    moli = make_moli()
    state = moli.state_dict()
    with tempfile.TemporaryDirectory() as name:
        folder, marker = Path(name), Path(name, "the surprise was here")
        things = {"state dict": state, "whole model": moli, "surprise": [Surprise(marker), state]}
        paths = {kind: folder / f"{kind}.pth" for kind in things}
        for kind, thing in things.items():
            torch.save(thing, paths[kind])

        print(f"1. ways back: tensors of {len(state)} that are equal bit for bit")
        ways = ways_back(paths["state dict"], paths["whole model"])
        same = {way: sum(equal(state, loaded)) for way, loaded in ways.items()}
        for way, number in same.items():
            print(f"   {way:<24} {number:2d}")

        print("2. what each loader returns or raises, and whether the code in the file has run")
        loaders = {"our reader": read_state, "torch.load": torch.load, "unguarded": unguarded}
        outcomes = {
            kind: {loader: attempt(load, path, marker) for loader, load in loaders.items()}
            for kind, path in paths.items()
        }
        print(f"   {'':<13}" + "".join(f"{loader:<27}" for loader in loaders).rstrip())
        for kind, row in outcomes.items():
            cells = [f"{thing}, {'ran' if ran else 'not run'}" for thing, ran in row.values()]
            print(f"   {kind:<13}" + "".join(f"{cell:<27}" for cell in cells).rstrip())

        print("3. strict=False into a new Moli: keys, and tensors that are still the new ones")
        keys = {}
        for run, given in variants(state).items():
            keys[run], as_saved = load_loosely(given, state)
            missing, unexpected, untouched = keys[run]
            print(f"   {run:<10} missing {missing:2d}   unexpected {unexpected:2d}"
                  f"   untouched {untouched:2d}")  # fmt: skip
            with SummaryWriter(log_dir / run, purge_step=0) as writer:
                for place, number in enumerate(accumulate(as_saved), 1):
                    writer.add_scalar("load/as_saved", number, place)

        print("4. a file whose tensors were on cuda:0, loaded here")
        elsewhere = folder / "cuda.pth"
        with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
            torch.save(state, elsewhere)  # what a machine with a GPU writes
        on_cpu = torch.load(elsewhere, map_location="cpu", weights_only=True)
        assert all(equal(state, on_cpu))
        here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        devices = {str(to): device_after(elsewhere, to) for to in (None, "cpu", "meta", here)}
        for to, device in devices.items():
            print(f"   map_location={to:<6} {device}")
    return {"same": same, "outcomes": outcomes, "keys": keys, "devices": devices}


if __name__ == "__main__":
    guard(main)
