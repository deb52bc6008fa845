"""TensorBoard draws what tag, step and folder say: a wrong one draws a wrong curve, without a word.

A SummaryWriter writes its points to a file in its folder. TensorBoard reads the files of all
folders below --logdir. One folder is one run: it has one colour, and one curve for each tag. If no
step is given, all points lie at step 0. If a second writer writes to the same folder, its curve
replaces the first one from its own first step on, or the two are mixed.

    add_scalar(tag, y, step)         one point (step, y) of the curve named tag
    add_image(tag, picture, step)    (C, H, W), or (H, W, C) with dataformats="HWC"
    purge_step=s                     TensorBoard shall forget the older points from step s on

    C  channels     H, W  height and width in pixels. Numbers: floats in [0, 1], or uint8

TensorBoard has two loaders. The fast one, the default where it is installed (not on Windows), does
not read purge_step: each new point removes the older points of its tag at the same or a later step.
The other one obeys purge_step if each writer in the folder was given one. Of a tag both keep 10
pictures and 1,000 points, a random choice with the last one. Options choose the loader, and keep
more. So take a new folder for each run, always give a step, and give purge_step where you resume.

Needs          nothing
Checked here   what TensorBoard shows, started without options and with those that the lesson prints
TensorBoard    line/y by step: one run for each mistake and each cure; y = 2 step, and 3 step where
               a second writer went on. image/bee, histogram/normal, text/note, graph: run everyday
Try            in write_curves, write with_step in reverse: range(points - 1, -1, -1)
Answer         The fast loader shows one point, the last one written; with the options all are there
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
    with SummaryWriter(log_dir / "everyday", purge_step=0) as writer:  # 0: replace older runs
        for step in range(20):
            writer.add_scalar("line/y", 2 * step, step)
        writer.add_image("image/bee", picture, 0, dataformats="HWC")
        writer.add_histogram("histogram/normal", torch.randn(1000), 0)
        writer.add_text("text/note", "The line is **y = 2 x**.", 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # add_graph calls torch.jit.trace, which is deprecated
            writer.add_graph(model, torch.zeros(1, 4))


def show_everyday(address):
    print("1. In everyday code: is all that was written to the run everyday there?")
    print("   call            written                         TensorBoard shows")
    curve = ask(address, "scalars/scalars", run="everyday", tag="line/y")
    pictures = ask(address, "images/images", run="everyday", tag="image/bee", sample=0)
    bins = ask(address, "histograms/histograms", run="everyday", tag="histogram/normal")[0][2]
    note = ask(address, "text/text", run="everyday", tag="text/note/text_summary")[0]["text"]
    graph = ask(address, "graphs/graph", run="everyday", conceptual="false")
    values, nodes = sum(count for *_, count in bins), graph.count("node {")
    rows = (
        ("add_scalar", "20 points, y = 2 step",
         f"{len(curve)} points, the last one at step {curve[-1][1]}: y = {curve[-1][2]:g}",
         len(curve) == 20 and curve[-1][1:] == [19, 38]),
        ("add_image", "1 picture of a bee", f"{len(pictures)} picture, at step "
         f"{pictures[0]['step']}", len(pictures) == 1),
        ("add_histogram", "1000 normal numbers", f"{values:.0f} numbers", round(values) == 1000),
        ("add_text", "The line is **y = 2 x**.", re.search("<p>.*</p>", note)[0],
         "<strong>y = 2 x</strong>" in note),
        ("add_graph", "3 layers (a deprecated call)", f"{nodes} nodes of the graph", nodes > 3),
    )  # fmt: skip
    for call, written, answer, _ in rows:
        print(f"   {call:<13}   {written:<29}   {answer}")
    print(f"   -> {sum(right for *_, right in rows)} of {len(rows)} are as they were written")
    return {call: answer for call, _, answer, _ in rows}


# --- 2. curves ---------------------------------------------------------------------------------


def write_line(folder, steps, slope, purge_step=None, tags=("line/y",)):
    """A point (step, slope * step) of each of the curves `tags`, for each of the steps.

    They are written by one SummaryWriter, which is given the folder and purge_step. Exercise.
    """
    with SummaryWriter(folder, purge_step=purge_step) as writer:
        for step in steps:
            for tag in tags:
                writer.add_scalar(tag, slope * step, step)


def write_curves(log_dir, points, many):
    half = points // 2
    write_line(log_dir / "with_step", range(points), 2, purge_step=0)
    with SummaryWriter(log_dir / "no_step", purge_step=0) as writer:
        for step in range(points):
            writer.add_scalar("line/y", 2 * step)
    write_line(log_dir / "long", range(many), 2, purge_step=0)
    for run in ("one_folder", "folder_a", "resumed"):
        write_line(log_dir / run, range(points), 2, purge_step=0)
    write_line(log_dir / "purge_step", range(points), 2, 0, tags=("line/y", "line/old"))

    time.sleep(1.01 - time.time() % 1)  # the names of files tell no less than seconds apart
    write_line(log_dir / "one_folder", range(half), 3)
    write_line(log_dir / "folder_b", range(half), 3, purge_step=0)
    write_line(log_dir / "resumed", range(half, points), 3)
    write_line(log_dir / "purge_step", range(half, points), 3, purge_step=half)


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
        ("purge_step", "line/old", "      a tag not resumed", old),
        ("long", "line/y", f"{many} points", (many, many, 2.0 * many - 2)),
    ]
    print("2. Which curves does TensorBoard show? (steps: different ones; x: not what was meant)")
    groups = "".join(f"   {name:^20}" for name in ("right", "by default", "with options"))
    print(f"   {'':<46}{groups}".rstrip())
    print(
        "   run        tag        how it was written     "
        + "   points steps last y " * 2
        + "   points steps last y"
    )
    shown, wrong = {}, ([], [])
    for run, tag, how, right in rows:
        answers = [describe(ask(address, "scalars/scalars", run=run, tag=tag))
                   for address in (default, with_options)]  # fmt: skip
        shown[run, tag] = answers
        cells = "{:9} {:5} {:6g} ".format(*right) if right else f"{'two curves':>22} "
        for names, answer in zip(wrong, answers, strict=True):
            if answer != right:
                names.append(run if tag == "line/y" else f"{run} {tag}")
            cells += "{:9} {:5} {:6g}".format(*answer) + (" " if answer == right else "x")
        print(f"   {run:<10} {tag:<8}   {how:<25}{cells}".rstrip())
    print(f"   -> wrong by default:   {', '.join(wrong[0])}")
    print(f"   -> wrong with options: {', '.join(wrong[1])}")
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
    print("   written   by default   with options")
    print(f"   {count:7}   {kept[0]:10}   {kept[1]:12}")
    print(f"   -> by default {count - kept[0]} are missing, with options {count - kept[1]}")
    error = layout_error(log_dir, picture)
    print(f"   an (H, W, 3) picture without dataformats='HWC': {error or 'no error'}")
    print(f"   -> add_image took {len(picture)}, the height, for the number of channels, and "
          f"{'refused it' if error else 'drew it'}")  # fmt: skip
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
    print(f"with options: the same, and {' '.join(OPTIONS)}")
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
