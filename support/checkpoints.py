"""Checkpoints: all that decides what comes next, whole or not at all, refused where damaged."""

import hashlib
import io
import random
import re
import warnings
import zlib
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch

from support.files import DataError, write_whole

KEYS = {
    "model", "optimizer", "scheduler", "options", "data", "stats", "classes", "epoch", "accuracy",
    "best", "random", "machine", "checksum",
}  # fmt: skip
DAMAGE = (  # torch.load's answers to damaged bytes
    OSError, RuntimeError, ValueError, EOFError, UnpicklingError, LookupError, TypeError,
    AttributeError, AssertionError, MemoryError, OverflowError, NotImplementedError, Warning,
)  # fmt: skip


# --- what is in it -----------------------------------------------------------------------------


def seed_all(seed):
    """Begin every random stream of random_state anew."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state():
    """Every random stream that a run may draw from."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state):
    torch.set_rng_state(state["torch"])
    for device, stream in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(stream, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def checksum(value):
    """The SHA-256 of a nest of dicts, lists, tensors and plain values, in hexadecimal."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            sha.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            sha.update(f"{type(value).__name__} {len(value)} ".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            sha.update(f"{value!r} ".encode())

    add(value)
    return sha.hexdigest()


def fingerprint(dataset, splits):
    """A word on the images of a run, which differs as soon as one of their bytes does."""
    crc = 0
    for tensors in splits.values():
        for tensor in tensors:
            crc = zlib.crc32(tensor.contiguous().numpy(), crc)
    return f"{type(dataset).__name__} {sum(len(y) for _, y in splits.values())} {crc:08x}"


def machine(device):
    """What rounding depends on besides the program: another one may differ in the last bits."""
    kind = torch.device(device).type
    chip = torch.backends.cpu.get_cpu_capability() if kind == "cpu" else kind
    return f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def what_is_fixed(options, train_set, splits, stats, device):
    """What no epoch changes: to know the run again, and to name classes without its data."""
    return {"options": options, "data": fingerprint(train_set, splits), "stats": stats,
            "classes": train_set.classes, "machine": machine(device)}  # fmt: skip


def check_finite(losses, step, of=""):
    """Raise DataError if one of the losses, the last of which is of `step`, is not finite."""
    losses = torch.as_tensor(losses).reshape(-1)
    wrong = (~losses.isfinite()).nonzero()
    if len(wrong):
        first = int(wrong[0])
        at = step - len(losses) + 1 + first
        raise DataError(
            f"the {of}loss is {losses[first]:g} at step {at}: begin anew with a smaller --lr"
        )


def fresh(options):
    """Where a run begins."""
    return {"options": options, "epoch": 0, "best": 0.0}


# --- to a file and back ------------------------------------------------------------------------


def save(path, state):
    """Write `state` to `path`, whole or not at all. Raises DataError if the disk refuses."""
    buffer = io.BytesIO()
    torch.save({**state, "checksum": checksum(state)}, buffer)
    with write_whole(path) as beside:
        beside.write_bytes(buffer.getvalue())


def save_epoch(folder, parts, fixed, epoch, accuracy, best):
    """Write folder/epoch_003.pth, the same as last.pth and, if no epoch was better, as best.pth.

    `parts` are the model, its optimizer and its scheduler, `fixed` is what no epoch changes. A run
    goes on from the epoch's own file, so that a kill between the writes loses nothing: the best one
    is written before it.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {**fixed, **states, "random": random_state(), "epoch": epoch, "accuracy": accuracy,
             "best": best}  # fmt: skip
    if accuracy == best:
        save(folder / "best.pth", state)
    save(folder / f"epoch_{epoch:03d}.pth", state)
    save(folder / "last.pth", state)


def read(path):
    """The state in a file that save_epoch wrote; it runs no code.

    Raises DataError if the file is missing, cut short, changed in any bit that counts, or foreign.
    """
    try:
        with warnings.catch_warnings(action="error"):  # torch.load warns of what it cannot know
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.keys() != KEYS:
            raise ValueError("it holds other things")
        if state.pop("checksum") != checksum(state):
            raise ValueError("it was changed or damaged, its checksum is another one")
    except DAMAGE as error:
        why = f"{error}".partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} is not a whole checkpoint of train.py: {why}") from error
    return state


def restore(old, fixed, **parts):
    """Bring `parts` and the random streams to where the state `old` was taken.

    Raises DataError if it is of another model or of other images than `fixed` tells of; prints a
    line if the machine is another one, as sums are then added in another order.
    """
    if old["data"] != fixed["data"]:
        raise DataError(f"the run was trained on images {old['data']}, here are {fixed['data']}")
    if old["machine"] != fixed["machine"]:
        print(f"note: this was saved with {old['machine']}, here is {fixed['machine']}: weights "
              "will differ from those of a run that was never stopped, by rounding")  # fmt: skip
    try:
        for name, part in parts.items():
            part.load_state_dict(old[name])
        set_random_state(old["random"])
    except DAMAGE as error:
        why = " ".join(str(error).split())[:160]
        raise DataError(f"the checkpoint is of another model: {why}") from error


# --- a run's folder ----------------------------------------------------------------------------


def claim_run(name, checkpoint_dir, log_dir):
    """Make checkpoint_dir/name before anything else is done, so that two runs never share one.

    Without a name it is the time. Raises DataError if it is taken, here or in log_dir.
    """
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    for label in [name] if name else [now, *(f"{now}-{n}" for n in range(2, 100))]:
        folder, log = Path(checkpoint_dir) / label, Path(log_dir) / label
        if not log.exists():
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    taken = folder if folder.exists() else log
    how = f'go on with --resume "{folder}"' if epochs_in(folder) else f"delete {taken}"
    raise DataError(f"run {label} exists: choose another --run-name, or {how}")


def epochs_in(folder):
    """{epoch: path} of the checkpoints epoch_000.pth, epoch_001.pth ... in a run's folder."""
    found = (re.fullmatch(r"epoch_(\d{3,})\.pth", path.name) for path in folder.glob("epoch_*.pth"))
    return {int(match[1]): folder / match[0] for match in found if match}


def find(where, checkpoint_dir, best=False):
    """The file `where`; or the last epoch in the folder `where`, or for "" in the newest run's.

    With `best` the best epoch instead of the last one. Raises DataError if there is none.
    """
    try:
        if where and not Path(where).is_dir():
            return Path(where).resolve(strict=True)
        folder = Path(where or checkpoint_dir).resolve()
        runs = [folder] if where else [path for path in folder.glob("*") if path.is_dir()]
        last = [found[max(found)] for found in map(epochs_in, runs) if found]
    except (OSError, RuntimeError) as error:  # missing, or a loop of links
        raise DataError(f"no checkpoint {where or checkpoint_dir}: {error}") from error
    if not last:
        raise DataError(f"no checkpoint in {folder}: begin a run with python train.py")
    newest = max(last, key=lambda path: path.stat().st_mtime_ns)
    return best_in(newest.parent) if best else newest


def best_in(folder):
    """The best checkpoint in a run's folder; the last one where an epoch was copied there alone."""
    saved = epochs_in(folder)
    return folder / "best.pth" if (folder / "best.pth").is_file() else saved[max(saved)]


@contextmanager
def telling_how_to_resume(folder):
    """If Ctrl-C, the disk or the data stop the block, their one line names the last checkpoint.

    What a killed run left half written is removed, and a folder in which nothing was saved yet.
    """
    for half in folder.glob("*.part"):
        half.unlink(missing_ok=True)
    try:
        yield
    except KeyboardInterrupt:
        how = f'go on with: python train.py --resume "{path}"' if (path := last_in(folder)) else ""
        raise KeyboardInterrupt(f"stopped; {how or 'nothing was saved yet'}") from None
    except (DataError, OSError) as error:
        good = f"; the last good checkpoint is {path}" if (path := last_in(folder)) else ""
        raise DataError(f"{error}{good}") from error


def last_in(folder):
    """The last epoch's checkpoint; None if there is none, and then the empty folder is removed."""
    if saved := epochs_in(folder):
        return saved[max(saved)]
    with suppress(OSError):
        folder.rmdir()
    return None
