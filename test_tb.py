"""TensorBoard draws what tag, step and folder say: a wrong one draws a wrong curve, without a word.

A SummaryWriter appends events to a file in its folder; TensorBoard reads the files of all folders
below --logdir. A folder is a run: one colour, and one curve per tag. Without a step all points lie
at step 0; a second run in the same folder takes the place of the first, or is mixed with it.

    add_scalar(tag, y, step)         one point (step, y) of the curve named tag
    add_image(tag, picture, step)    (C, H, W), or (H, W, C) with dataformats="HWC"

    C  channels     H, W  height and width in pixels     purge_step  a run's first step that is new

TensorBoard keeps 1,000 points and 10 pictures per tag, and its fast loader, the default except on
Windows, ignores purge_step. With OPTIONS (below) it keeps more, and obeys purge_step if each writer
in the folder was given one. So take a new folder for each run. Files are read in the order of their
names, which begin with the time: after a clock was set back, the newer file counts as the older.

Needs          nothing
Checked here   what TensorBoard answers over HTTP, started as by default and with OPTIONS
TensorBoard    line/y by step: one run for each mistake and each cure; y = 2 step, and 3 step where
               a second writer went on. image/bee, histogram/normal, text/note, graph: run everyday
Try            in write_curves, write with_step in reverse: range(points - 1, -1, -1)
Answer         The fast loader shows one point, the last one written; with OPTIONS all are there
Source         torch.utils.tensorboard; TensorBoard's README; github.com/tensorflow/tensorboard 4784
"""

import json
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.data import first_picture, hymenoptera, hymenoptera_source
from support.files import DATASET, DataError, guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "test_tb"
OPTIONS = ["--load_fast=false", "--samples_per_plugin=images=200,scalars=5000"]


# --- 1. in everyday code -----------------------------------------------------------------------


def write_everyday(log_dir, picture):
    """One of each kind; `picture` is (H, W, 3) uint8."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with SummaryWriter(log_dir / "everyday", purge_step=0) as writer:
        for step in range(20):
            writer.add_scalar("line/y", 2 * step, step)
        writer.add_image("image/bee", picture, 0, dataformats="HWC")
        writer.add_histogram("histogram/normal", torch.randn(1000), 0)
        writer.add_text("text/note", "The line is **y = 2 x**.", 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # add_graph uses torch.jit.trace, which is deprecated
            writer.add_graph(model, torch.zeros(1, 4))


def show_everyday(address):
    print("1. What has TensorBoard read of the run everyday?")
    curve = ask(address, "scalars/scalars", run="everyday", tag="line/y")
    pictures = ask(address, "images/images", run="everyday", tag="image/bee", sample=0)
    bins = ask(address, "histograms/histograms", run="everyday", tag="histogram/normal")[0][2]
    note = ask(address, "text/text", run="everyday", tag="text/note/text_summary")[0]["text"]
    graph = ask(address, "graphs/graph", run="everyday", conceptual="false")
    answers = {
        "add_scalar": f"{len(curve)} points, the last one at step {curve[-1][1]}: {curve[-1][2]:g}",
        "add_image": f"{len(pictures)} picture, at step {pictures[0]['step']}",
        "add_histogram": f"{sum(count for *_, count in bins):.0f} values",
        "add_text": re.search("<p>.*</p>", note)[0],
        "add_graph": f"{graph.count('node {')} nodes",
    }
    for call, answer in answers.items():
        print(f"   {call:<13}   {answer}")
    print(f"   -> all {len(answers)} kinds are there")
    return answers


# --- 2. curves ---------------------------------------------------------------------------------


def write_line(folder, steps, slope, purge_step=None, tags=("line/y",)):
    """A point (step, slope * step) of each of the curves `tags`, for each of the steps.

    They are written by one SummaryWriter, which is given the folder and purge_step. Exercise.
    """
    with SummaryWriter(folder, purge_step=purge_step) as writer:
        for step in steps:
            for tag in tags:
                writer.add_scalar(tag, slope * step, step)


def set_clock_back(folder, seconds=86_400):
    """Rename the newest event file in `folder` as if it were written `seconds` earlier.

    It is called events.out.tfevents.1700000000.host.pid.number: the time is in seconds. Exercise.
    """
    newest = max(folder.glob("events.out.tfevents.*"))
    stamp = newest.name.split(".")[3]
    newest.rename(folder / newest.name.replace(stamp, f"{int(stamp) - seconds:010d}", 1))


def write_curves(log_dir, points, many):
    half = points // 2
    write_line(log_dir / "with_step", range(points), 2, purge_step=0)
    with SummaryWriter(log_dir / "no_step", purge_step=0) as writer:
        for step in range(points):
            writer.add_scalar("line/y", 2 * step)
    write_line(log_dir / "long", range(many), 2, purge_step=0)
    for run in ("one_folder", "folder_a", "resumed", "clock_back"):
        write_line(log_dir / run, range(points), 2, purge_step=0)
    write_line(log_dir / "purge_step", range(points), 2, 0, tags=("line/y", "line/old"))

    time.sleep(1.01 - time.time() % 1)  # the names of files tell no less than seconds apart
    write_line(log_dir / "one_folder", range(half), 3)
    write_line(log_dir / "folder_b", range(half), 3, purge_step=0)
    write_line(log_dir / "resumed", range(half, points), 3)
    write_line(log_dir / "purge_step", range(half, points), 3, purge_step=half)
    write_line(log_dir / "clock_back", range(half, points), 3, purge_step=half)
    set_clock_back(log_dir / "clock_back")


def describe(curve):
    """(points, different steps, the last y) of a curve [(time, step, y)]. Exercise."""
    return len(curve), len({step for _, step, _ in curve}), curve[-1][2]


def show_curves(default, with_options, points, many):
    half = points // 2
    whole, resumed = (points, points, 2.0 * points - 2), (points, points, 3.0 * points - 3)
    part, old = (half, half, 3.0 * half - 3), (half, half, 2.0 * half - 2)
    rows = [
        ("no_step", "line/y", "no step is given", whole),
        ("with_step", "line/y", "cure: step=step", whole),
        ("one_folder", "line/y", "two runs in one folder", None),
        ("folder_a", "line/y", "cure: a folder for each", whole),
        ("folder_b", "line/y", "      the second run", part),
        ("resumed", "line/y", f"stopped, then from step {half}", resumed),
        ("purge_step", "line/y", f"cure: purge_step={half}", resumed),
        ("purge_step", "line/old", "      a curve not resumed", old),
        ("clock_back", "line/y", "the same, clock set back", resumed),
        ("long", "line/y", f"{many} points", (many, many, 2.0 * many - 2)),
    ]
    print("2. Which curves are shown? points / different steps, and the last y")
    print("   run and tag           how it was written           right              "
          "by default         with OPTIONS")  # fmt: skip
    shown, wrong = {}, ([], [])
    for run, tag, how, right in rows:
        answers = [describe(ask(address, "scalars/scalars", run=run, tag=tag))
                   for address in (default, with_options)]  # fmt: skip
        shown[run, tag] = answers
        for names, answer in zip(wrong, answers, strict=True):
            if answer != right:
                names.append(run if tag == "line/y" else f"{run} {tag}")
        cells = [f"{n}/{steps} y={y:g}" for n, steps, y in (right or (0, 0, 0), *answers)]
        cells[0] = cells[0] if right else "two curves"
        print(f"   {run:<10} {tag:<8}   {how:<26}   {cells[0]:<16}   {cells[1]:<16}   {cells[2]}")
    print(f"   -> wrong by default:   {', '.join(wrong[0])}")
    print(f"   -> wrong with OPTIONS: {', '.join(wrong[1])}")
    return {"shown": shown, "wrong": wrong}


# --- 3. pictures -------------------------------------------------------------------------------


def write_pictures(log_dir, picture, count):
    """`picture` (H, W, 3) times 1 - step / count as image/bee, at each of the steps below count.

    caption_row sets each one under its words, and gives (3, H', W').
    """
    with SummaryWriter(log_dir / "pictures", purge_step=0) as writer:
        for step in range(count):
            darker = torch.tensor(picture * (1 - step / count)).byte().permute(2, 0, 1)
            words = f"step {step}: {1 - step / count:.0%} bright"
            writer.add_image("image/bee", caption_row(words, [darker], [""]), step)


def layout_error(log_dir, picture):
    """The error of add_image when `picture` (H, W, 3) is taken for (C, H, W), or None."""
    with SummaryWriter(log_dir / "layout", purge_step=0) as writer:
        try:
            writer.add_image("image/wrong", picture, 0)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def show_pictures(log_dir, picture, default, with_options, count):
    print(f"3. {count} pictures of one tag: how many can be looked at?")
    kept = [len(ask(address, "images/images", run="pictures", tag="image/bee", sample=0))
            for address in (default, with_options)]  # fmt: skip
    print(f"   right   {count:5d}   by default   {kept[0]:5d}   with OPTIONS   {kept[1]:5d}")
    error = layout_error(log_dir, picture)
    print(f"   and an (H, W, 3) picture without dataformats='HWC': {error}")
    print(f"   -> by default {count - kept[0]} are missing, with OPTIONS {count - kept[1]}")
    return {"kept": kept, "error": error}


# --- TensorBoard itself ------------------------------------------------------------------------


@contextmanager
def tensorboard(log_dir, *options):
    """Start TensorBoard on a free port, as on the command line; yield its address; stop it."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--port=0"]
    server = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True,
                              encoding="utf-8", errors="replace")  # fmt: skip
    try:
        said = ""
        while not (found := re.search(r"http://\S+", said)):
            if not (line := server.stderr.readline()):
                raise DataError(f"TensorBoard does not start: {said.strip() or 'it says nothing'}")
            said = line
        yield found[0]
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


def ask(address, path, **query):
    """What TensorBoard's own page asks for: lists of points, pictures ..., or a graph as text."""
    opener = build_opener(ProxyHandler({}))  # no proxy stands between a machine and itself
    with opener.open(f"{address}data/plugin/{path}?{urlencode(query)}", timeout=30) as answer:
        text = answer.read().decode()
    return json.loads(text) if text[:1] in ("[", "{") else text


def wait_until_read(address, log_dir, seconds=120):
    """Return once TensorBoard has read all runs: when the same answers come twice."""
    folders = {path.parent.relative_to(log_dir) for path in log_dir.rglob("*tfevents*")}
    runs = [folder.as_posix() for folder in folders if folder.name not in ("layout", "pictures")]
    questions = [("scalars/scalars", {"run": run, "tag": "line/y"}) for run in runs]
    questions += [("images/images", {"run": "pictures", "tag": "image/bee", "sample": 0}),
                  ("graphs/graph", {"run": "everyday", "conceptual": "false"})]  # fmt: skip
    before, stop = None, time.monotonic() + seconds
    while time.monotonic() < stop:
        try:
            answers = [ask(address, path, **query) for path, query in questions]
        except HTTPError:  # it does not know one of them yet
            answers = []
        if answers and all(answers) and answers == before:
            return
        before = answers
        time.sleep(0.3)
    raise DataError(f"TensorBoard has not read {log_dir} after {seconds} s")


# --- the lesson --------------------------------------------------------------------------------


def main(seed=0, log_dir=LOG_DIR, root=DATASET, points=20, many=1500, pictures=30):
    torch.manual_seed(seed)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    picture = np.array(first_picture(folder, "bees").resize((160, 120)))  # (120, 160, 3)
    write_everyday(log_dir, picture)
    write_curves(log_dir, points, many)
    write_pictures(log_dir, picture, pictures)
    print(f"by default:   tensorboard --logdir {log_dir}")
    print(f"with OPTIONS: the same, and {' '.join(OPTIONS)}")
    with tensorboard(log_dir) as default, tensorboard(log_dir, *OPTIONS) as with_options:
        for address in (default, with_options):
            wait_until_read(address, log_dir)
        measured = {
            "answers": show_everyday(default),
            "curves": show_curves(default, with_options, points, many),
            "pictures": show_pictures(log_dir, picture, default, with_options, pictures),
        }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
