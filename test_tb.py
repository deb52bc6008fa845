"""TensorBoard draws a curve from its tag, its steps and its folder; its page shows no warning if a
curve is wrong.

A SummaryWriter writes points to a file in its folder. TensorBoard reads the files of all folders
below --logdir. One folder is one run: it has one colour, and one curve for each tag (the name of a
curve). Two mistakes are common. If no step is given, all points lie at step 0. If a second writer
uses the folder of another one, its curve replaces the older one or is mixed with it.

    add_scalar(tag, y, step)         one point (step, y) of the curve named tag
    add_image(tag, picture, step)    (C, H, W), or (H, W, C) with dataformats="HWC"
    purge_step=s                     tells TensorBoard to drop older points at step s and later

    C  channels     H, W  height and width in pixels. Numbers: floats in [0, 1], or uint8

So always give a step, take a new folder for each run, and give purge_step where a run is resumed.
TensorBoard has two programs that read files. The fast loader is the default where it is installed
(not on Windows). It does not read purge_step: a new point removes older points of its tag at the
same or a later step. The slow loader obeys purge_step if each writer in the folder was given one.
Both keep, for each tag of a run, at most 10 pictures and 1,000 points: always the last one, the
others chosen at random. Options choose the loader and keep more.

Needs          nothing
Checked here   what TensorBoard shows, started without options and with those that section 2 prints
TensorBoard    line/y by step: the run with_step is the line y = 2 step, no_step one point at step
               0, resumed bends at step 10. Pictures, histogram, text, graph: the run everyday
Try            in write_curves, write with_step in reverse, range(points - 1, -1, -1) for
               range(points): how many points does each loader show?
Answer         The fast one shows 1, the last one written. With the options all 20 are there
Source         torch.utils.tensorboard; TensorBoard's README; github.com/tensorflow/tensorboard 4784
"""

import io
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
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.data import first_picture, hymenoptera, hymenoptera_source
from support.files import DATASET, DataError, guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "test_tb"
OPTIONS = ["--load_fast=false", "--samples_per_plugin=images=200,scalars=5000"]


# --- 1. in everyday code -----------------------------------------------------------------------


def write_everyday(log_dir, picture):
    """One of each kind; `picture` is (H, W, 3) uint8. Returns the 1000 numbers of the histogram."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    numbers = torch.randn(1000)
    with SummaryWriter(log_dir / "everyday", purge_step=0) as writer:  # 0: replace older runs
        for step in range(20):
            writer.add_scalar("line/y", 2 * step, step)
        writer.add_image("image/bee", picture, 0, dataformats="HWC")
        writer.add_histogram("histogram/normal", numbers, 0)
        writer.add_text("text/note", "The line is **y = 2 x**.", 0)
        with warnings.catch_warnings():  # add_graph itself still uses torch.jit.trace, an old tool
            warnings.filterwarnings("ignore", "`torch.jit.trace")
            writer.add_graph(model, torch.zeros(1, 4))
    return numbers


def show_everyday(address, picture, numbers):
    print("1. In everyday code: is all that was written to the run everyday there?")
    print("   call            written                         TensorBoard shows")
    curve = ask(address, "scalars/scalars", run="everyday", tag="line/y")
    entry = ask(address, "images/images", run="everyday", tag="image/bee", sample=0)[0]
    png = ask(address, f"images/individualImage?{entry['query']}")
    shown = np.asarray(Image.open(io.BytesIO(png)))  # (H, W, 3)
    bins = ask(address, "histograms/histograms", run="everyday", tag="histogram/normal")[0][2]
    count, low, high = sum(count for *_, count in bins), bins[0][0], bins[-1][1]
    note = ask(address, "text/text", run="everyday", tag="text/note/text_summary")[0]["text"]
    graph = ask(address, "graphs/graph", run="everyday", conceptual="false").decode()
    layers = sorted(set(re.findall(r"\w+\[\d\]", graph)), key=lambda layer: layer[-2])
    lowest, highest = numbers.min().item(), numbers.max().item()
    rows = (
        ("add_scalar", "20 points, y = 2 step",
         f"{len(curve)} points, the last one at step {curve[-1][1]}: y = {curve[-1][2]:g}",
         [point[1:] for point in curve] == [[step, 2 * step] for step in range(20)]),
        ("add_image", "a picture of a bee", f"{shown.shape[1]} x {shown.shape[0]} pixels at step "
         f"{entry['step']}", np.array_equal(shown, picture)),
        ("add_histogram", f"1000 numbers, {lowest:.2f} to {highest:.2f}",
         f"{count:.0f} numbers, {low:.2f} to {high:.2f}",
         round(count) == 1000 and abs(low - lowest) + abs(high - highest) < 1e-3),
        ("add_text", "The line is **y = 2 x**.", re.search("<p>.*</p>", note)[0],
         "<strong>y = 2 x</strong>" in note),
        ("add_graph", "layers Linear, ReLU, Linear", f"layers {', '.join(layers)}",
         layers == ["Linear[0]", "ReLU[1]", "Linear[2]"]),
    )  # fmt: skip
    for call, written, answer, _ in rows:
        print(f"   {call:<13}   {written:<29}   {answer}")
    print(f"   -> {sum(right for *_, right in rows)} of {len(rows)} came back")
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

    # A file's name holds the time in whole seconds, and TensorBoard reads files in that order.
    time.sleep(1.01 - time.time() % 1)
    write_line(log_dir / "one_folder", range(half), 3)
    write_line(log_dir / "folder_b", range(half), 3, purge_step=0)
    write_line(log_dir / "resumed", range(half, points), 3)
    write_line(log_dir / "purge_step", range(half, points), 3, purge_step=half)


def describe(curve):
    """(points, different steps, the last y) of a curve [(time, step, y)]. Exercise."""
    return len(curve), len({step for _, step, _ in curve}), curve[-1][2]


def in_short(curve):
    points, steps, last_y = curve
    return f"{points}/{steps}/{last_y:g}"


def show_curves(log_dir, default, with_options, points, many):
    half = points // 2
    whole, resumed = (points, points, 2.0 * points - 2), (points, points, 3.0 * points - 3)
    part, old = (half, half, 3.0 * half - 3), (half, half, 2.0 * half - 2)
    rows = [
        ("no_step", "line/y", "no step is given", whole),
        ("with_step", "line/y", "cure: step=step", whole),
        ("one_folder", "line/y", "a second run, same folder", None),
        ("folder_a", "line/y", "cure: own folder, run 1", whole),
        ("folder_b", "line/y", "      own folder, run 2", part),
        ("resumed", "line/y", f"resumed at step {half}", resumed),
        ("purge_step", "line/y", f"cure: purge_step={half}", resumed),
        ("purge_step", "line/old", "      a tag not written again", old),
        ("long", "line/y", f"{many} points", (many, many, 2.0 * many - 2)),
    ]
    print("2. Traps: which curves does TensorBoard show, and are they as meant?")
    first, second = loader(default), loader(with_options)
    print(f"   by default:   tensorboard --logdir {log_dir} (files read by its {first} loader)")
    print(f"   with options: the same, and {' '.join(OPTIONS)} (its {second} loader)")
    print("   20/10/38: a curve of 20 points at 10 different steps, whose last y is 38")
    tables = (
        ("a. Common mistakes, cures. y = 2 step, but second runs (one_folder, folder_b) 3 step",
         [row for row in rows if row[0] not in ("resumed", "purge_step")]),
        (f"b. Resuming: a first writer wrote y = 2 step, a second one y = 3 step from {half} on.\n"
         f"      As meant, every curve shows no old point from step {half} on",
         [row for row in rows if row[0] in ("resumed", "purge_step")]),
    )  # fmt: skip
    shown, wrong = {}, ([], [])
    for title, part_rows in tables:
        print(f"   {title}")
        print(f"   {'run':<20}{'how it was written':<32}{'meant':<17}"
              f"{'by default':<17}as meant?   {'with options':<17}as meant?")  # fmt: skip
        for run, tag, how, meant in part_rows:
            answers = [describe(ask(address, "scalars/scalars", run=run, tag=tag))
                       for address in (default, with_options)]  # fmt: skip
            shown[run, tag] = answers
            name = f"{run}: {tag}" if run == "purge_step" else run
            cells = f"{in_short(meant) if meant else 'a curve per run':<17}"
            for names, answer in zip(wrong, answers, strict=True):
                if answer != meant:
                    names.append(name)
                cells += f"{in_short(answer):<17}{'yes' if answer == meant else 'no':<12}"
            print(f"   {name:<20}{how:<32}{cells}".rstrip())
    cures = ["with_step", "folder_a", "folder_b", "purge_step: line/y"]
    good = [cure for cure in cures if cure not in wrong[0] + wrong[1]]
    print(f"   -> not as meant by default:   {', '.join(wrong[0])}")
    print(f"   -> not as meant with options: {', '.join(wrong[1])}")
    print(f"   -> as meant both times: {', '.join(good)}")
    if good == cures:
        print("      so give a step, a folder for each run, and purge_step where you resume")
    if "resumed" in wrong[1] and "resumed" not in wrong[0]:
        print(f"      resumed: the {first} loader drops older points by itself, the {second} one "
              "only where purge_step was given")  # fmt: skip
    if "purge_step: line/old" in wrong[0]:
        print("      a tag that is not written again needs the slow loader, too: --load_fast=false")
    return {"shown": shown, "wrong": wrong, "good": good}


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
    """The kind of error of add_image when `picture` (H, W, 3) is taken for (C, H, W), or None."""
    with SummaryWriter(log_dir / "layout", purge_step=0) as writer:
        try:
            writer.add_image("image/wrong", picture, 0)
        except (TypeError, ValueError) as error:
            return type(error).__name__


def show_pictures(default, with_options, count, height, error):
    print(f"3. Traps: {count} pictures of one tag, how many can be looked at?")
    kept = [len(ask(address, "images/images", run="pictures", tag="image/bee", sample=0))
            for address in (default, with_options)]  # fmt: skip
    print("   written   shown by default   with options")
    print(f"   {count:7}   {kept[0]:16}   {kept[1]:12}")
    print(f"   -> by default {count - kept[0]} are missing, with options {count - kept[1]}")
    print(f"   -> a picture (H, W, 3) without dataformats='HWC': {error or 'drawn'}, as its "
          f"height, {height}, is taken for the number of channels")  # fmt: skip
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


def fetch(address):
    opener = build_opener(ProxyHandler({}))  # no proxy stands between a machine and itself
    with opener.open(address, timeout=30) as answer:
        return answer.read()


def ask(address, path, **query):
    """What TensorBoard's own page asks for: lists of points, pictures ..., else the bytes."""
    words = f"?{urlencode(query)}" if query else ""
    answer = fetch(f"{address}data/plugin/{path}{words}")
    return json.loads(answer) if answer[:1] in (b"[", b"{") else answer


def loader(address):
    """Which loader it uses: only the fast one is a program of its own, asked by gRPC."""
    provider = json.loads(fetch(f"{address}data/environment"))["debug"]["data_provider"]
    return "fast" if provider.startswith("Grpc") else "slow"


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
    numbers = write_everyday(log_dir, picture)
    write_curves(log_dir, points, many)
    write_pictures(log_dir, picture, pictures)
    error = layout_error(log_dir, picture)
    with tensorboard(log_dir) as default, tensorboard(log_dir, *OPTIONS) as with_options:
        for address in (default, with_options):
            wait_until_read(address, log_dir)
        measured = {
            "answers": show_everyday(default, picture, numbers),
            "curves": show_curves(log_dir, default, with_options, points, many),
            "pictures": show_pictures(default, with_options, pictures, len(picture), error),
        }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
