"""The path loader, small data, and a check on every event file that a test leaves behind."""

import importlib.util
import inspect
import io
import logging
import os
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small networks are faster on one

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from support import drawings

ROOT = Path(__file__).resolve().parents[1]


def source_of(path):
    """A script, or the copy of it in the folder NOTES_PRACTICE: tests/grader.py judges a copy."""
    copy = Path(os.environ.get("NOTES_PRACTICE", ROOT)) / path
    return copy if copy.is_file() else ROOT / path


def load_script(path):
    """Import a script by its path: names may start with a digit, folders may shadow packages.

    A script at the top keeps its own name, so that `model` is one module however it is imported.
    """
    name = path.removesuffix(".py")
    if "/" in name:
        name = "notes_" + name.replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source_of(path))
        module = importlib.util.module_from_spec(spec)
        module.__file__ = str(ROOT / path)
        sys.modules[name] = module  # before exec: dataclasses look themselves up here
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@pytest.fixture(scope="session")
def load():
    return load_script


@pytest.fixture(scope="session")
def images_root(tmp_path_factory):
    """A dataset2/ with a small Shapes-10: 800 training and 200 test images. Read only."""
    root = tmp_path_factory.mktemp("dataset2")
    drawings.write_shapes10(root / "shapes10.npz", train=800, test=200)
    return root


@pytest.fixture
def insects_root(tmp_path_factory):
    """A dataset/ with a few drawn ants and bees, its own for each test."""
    root = tmp_path_factory.mktemp("dataset")
    drawings.write_hymenoptera_sample(root / "hymenoptera_sample", train=3, val=2)
    return root


def run_of_three_seeds(call, folders):
    """[(what call(seed, log_dir) returned, log_dir, what it printed)] for the seeds 0, 1 and 2."""
    runs = []
    for seed in range(3):
        log_dir, out = folders.mktemp("runs"), io.StringIO()
        with redirect_stdout(out):
            result = call(seed, log_dir)
        runs.append((result, log_dir, out.getvalue()))
    return runs


@pytest.fixture(scope="session")
def three_seeds():
    return run_of_three_seeds


def edited_copy(lesson, old, new, *more):
    """The lesson with `new` for `old`, below its docstring, as a reader changes a copy.

    `old` must stand there once. More changes follow as pairs (old, new).
    """
    code = Path(lesson.__file__).read_text(encoding="utf-8").split('"""', 2)[2]
    for was, becomes in ((old, new), *more):
        assert code.count(was) == 1
        code = code.replace(was, becomes)
    copy = ModuleType("copy")
    copy.__file__ = lesson.__file__
    exec(compile(code, lesson.__file__, "exec"), vars(copy))
    return copy


@pytest.fixture(scope="session")
def edited():
    return edited_copy


def read_events(log_dir):
    """The events of one run's folder, as TensorBoard loads them."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it announces every purge
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    return EventAccumulator(str(log_dir), everything).Reload()


@pytest.fixture(scope="session")
def events():
    return read_events


def falling_steps(log_dir):
    """The tags under `log_dir` whose steps do not rise."""
    falling = []
    for run in sorted({path.parent for path in log_dir.rglob("*tfevents*")}):
        loaded = read_events(run)
        tags = loaded.Tags()
        for kind, read in {"scalars": loaded.Scalars, "images": loaded.Images,
                           "histograms": loaded.Histograms}.items():  # fmt: skip
            for tag in tags[kind]:
                steps = [event.step for event in read(tag)]
                if any(b <= a for a, b in pairwise(steps)):
                    falling.append(f"{run.name}: {tag} {steps[:20]}")
    return falling


@pytest.fixture(scope="session", autouse=True)
def event_files_sort_as_written():
    """Files of one second are told apart by a counter, and read by name: .10 would precede .9."""
    event_file_writer._global_uid = event_file_writer.AtomicCounter(100_000)


@pytest.fixture(scope="session", autouse=True)
def rising_steps_of_shared_runs(tmp_path_factory):
    """Folders that several tests share are looked at once, when all is done."""
    yield
    for folder in tmp_path_factory.getbasetemp().iterdir():
        if folder.is_dir() and not folder.name.startswith("test_"):  # a test's own tmp_path
            assert falling_steps(folder) == []


@pytest.fixture(autouse=True)
def rising_steps(request):
    """Whatever a test logs under its tmp_path has rising steps, unless marked any_steps."""
    log_dir = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if log_dir and not request.node.get_closest_marker("any_steps"):
        assert falling_steps(log_dir) == []
        if (
            ".main(" in (source := inspect.getsource(request.function))
            and "log_dir=tmp_path" in source
        ):
            assert any(log_dir.rglob("*tfevents*")), "main logged nothing"
