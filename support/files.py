"""The ground that lessons stand on: folders, writing whole or not at all, the guard of a program.

This module imports no torch, so that it is there before torch is.
"""

import argparse
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATASET = ROOT / "dataset"  # hymenoptera_data, or hymenoptera_sample as drawn
DATASET2 = ROOT / "dataset2"  # CIFAR-10, or Shapes-10 as drawn


class DataError(Exception):
    """Data that cannot be read or written. `guard` ends a program by its one line, status 1."""


@contextmanager
def write_whole(path):
    """Yield a path beside `path`, and rename it to `path` once the block has written it whole.

    Raises DataError if the disk refuses; an old file at `path` is then untouched.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before it gets its name: a power cut may follow
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # where the folder may not even be read, the error above says so
            beside.unlink(missing_ok=True)


def number(kind, low):
    """An argparse type: a finite `kind`, `low` or more."""

    def convert(text):
        if not low <= (value := kind(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}, or beyond all bounds")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def options_parser(**more):
    """An argparse parser that is described by the script's docstring and keeps its lines."""
    description = getattr(sys.modules["__main__"], "__doc__", None)  # None under python -OO
    keep = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=keep, **more)


def guard(main, parse=None):
    """Run main(**parse()) as a program; without `parse` the one argument is --help.

    Ctrl-C, SIGTERM, a pipe whose reader has left, and what the system or the data refuse end it in
    one line, with status 130, 1, or 2 for wrong arguments. A status that main returns is kept.
    """
    if hasattr(sys.stdout, "reconfigure"):  # any path, on any console, and logs that fill
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    lost = []  # what TensorBoard's thread could not write
    threading.excepthook = lost.append
    try:
        status = main(**(parse() if parse else vars(options_parser().parse_args())))
        if lost:
            raise lost[0].exc_value
    except KeyboardInterrupt as stop:
        quit_with(130, stop)
    except BrokenPipeError:
        quit_with(1)
    except (DataError, OSError) as error:
        log_dir = getattr(sys.modules["__main__"], "LOG_DIR", None)
        quit_with(1, f"cannot log to {log_dir}: {error}" if lost else error)
    if isinstance(status, int) and status:
        sys.exit(status)


def quit_with(status, error=""):
    """End the program. Of a long message, such as a worker's traceback, the last line is told."""
    if lines := str(error).strip().splitlines():
        print(lines[-1], file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what print still holds has nowhere to go
    sys.exit(status)
