import io
import json
import re
import time
from contextlib import contextmanager, redirect_stdout
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from PIL import Image

from support import drawings
from support.pictures import caption_row


@pytest.fixture(scope="module")
def lesson(load):
    return load("test_tb.py")


def has_fast_loader():
    try:
        from tensorboard_data_server import server_binary
    except ImportError:  # there is none for Windows, nor for ARM processors
        return False
    return server_binary() is not None


POINTS, MANY, PICTURES = 12, 1200, 14
ROWS = {  # what was written, by default, with OPTIONS
    ("no_step", "line/y"): ((12, 12, 22), (1, 1, 22), (12, 1, 22)),
    ("with_step", "line/y"): ((12, 12, 22), (12, 12, 22), (12, 12, 22)),
    ("one_folder", "line/y"): (None, (6, 6, 15), (18, 12, 15)),
    ("folder_a", "line/y"): ((12, 12, 22), (12, 12, 22), (12, 12, 22)),
    ("folder_b", "line/y"): ((6, 6, 15), (6, 6, 15), (6, 6, 15)),
    ("resumed", "line/y"): ((12, 12, 33), (12, 12, 33), (18, 12, 33)),
    ("purge_step", "line/y"): ((12, 12, 33), (12, 12, 33), (12, 12, 33)),
    ("purge_step", "line/old"): ((6, 6, 10), (12, 12, 22), (6, 6, 10)),
    ("long", "line/y"): ((1200, 1200, 2398), (1000, 1000, 2398), (1200, 1200, 2398)),
}
WRONG = (
    ["no_step", "one_folder", "long", "purge_step: line/old"],
    ["no_step", "one_folder", "resumed"],
)


def set_clock_back(folder, seconds=86_400):
    """Rename the newest event file as if it were written earlier: its name tells the time."""
    newest = max(folder.glob("events.out.tfevents.*"))
    stamp = newest.name.split(".")[3]
    newest.rename(folder / newest.name.replace(stamp, f"{int(stamp) - seconds:010d}", 1))


@pytest.fixture(scope="module")
def run(lesson, edited, tmp_path_factory):
    """main's result and output, when it is run again, and the answers about Try's change."""
    log_dir, root = tmp_path_factory.mktemp("test_logs"), tmp_path_factory.mktemp("insects")
    drawings.write_hymenoptera_sample(root / "hymenoptera_sample", train=1, val=1)
    picture = np.zeros((120, 160, 3), np.uint8)
    lesson.write_everyday(log_dir, picture)
    lesson.write_curves(log_dir, POINTS, MANY)
    lesson.write_pictures(log_dir, picture, PICTURES)
    call = 'write_line(log_dir / "with_step", range(points), 2'
    copy = edited(lesson, call, call.replace("range(points)", "range(points - 1, -1, -1)"))
    copy.write_curves(log_dir / "try", POINTS, 3)
    lesson.write_line(log_dir / "clock_back", range(12), 2, purge_step=0)
    time.sleep(1.01 - time.time() % 1)
    lesson.write_line(log_dir / "clock_back", range(6, 12), 3, purge_step=6)
    set_clock_back(log_dir / "clock_back")

    asked, show = {"try/with_step": [], "clock_back": []}, lesson.show_curves

    def show_curves(log_dir, default, with_options, *sizes):
        for address in (default, with_options):
            for name, curves in asked.items():
                curves.append(lesson.ask(address, "scalars/scalars", run=name, tag="line/y"))
        return show(log_dir, default, with_options, *sizes)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(lesson, "show_curves", show_curves)
        measured = lesson.main(0, log_dir, root, POINTS, MANY, PICTURES)
    return measured, out.getvalue().splitlines(), asked, log_dir


def test_everything_is_there(run, events):
    measured, lines, _, log_dir = run
    answers = measured["answers"]
    torch.manual_seed(0)
    torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)  # drawn before, as in the lesson
    numbers = torch.randn(1000)
    span = f"1000 numbers, {numbers.min():.2f} to {numbers.max():.2f}"
    assert answers["add_scalar"] == "20 points, the last one at step 19: y = 38"
    assert answers["add_image"] == "160 x 120 pixels at step 0"
    assert answers["add_histogram"] == span
    assert answers["add_text"] == "<p>The line is <strong>y = 2 x</strong>.</p>"
    assert answers["add_graph"] == "layers Linear[0], ReLU[1], Linear[2]"
    picture = events(log_dir / "everyday").Images("image/bee")[-1]
    assert (picture.width, picture.height) == (160, 120)
    assert lines[1].startswith("1. In everyday code")
    assert [line.split()[0] for line in lines[3:8]] == list(answers)
    assert f"   {span}   " in lines[5] and lines[5].endswith(f"   {span}")
    assert lines[8] == "   -> 5 of 5 came back"


def test_the_curves_are_shown_as_the_table_says(run):
    measured, lines, _, _ = run
    fast = has_fast_loader()
    shown = measured["curves"]["shown"]
    expected = {
        key: [by_default if fast else (1000, 1000, 2398) if key[0] == "long" else changed, changed]
        for key, (_, by_default, changed) in ROWS.items()
    }
    assert shown == expected
    wrong = WRONG if fast else (["no_step", "one_folder", "long", "resumed"], WRONG[1])
    assert measured["curves"]["wrong"] == tuple(wrong)
    assert lines[9].startswith("2. Traps: which curves does TensorBoard show")
    chosen = "fast" if fast else "slow"
    log_dir = run[3]
    start = f"tensorboard --logdir {log_dir} (files read by its {chosen} loader)"
    assert lines[10] == f"   by default:   {start}"
    options = "--load_fast=false --samples_per_plugin=images=200,scalars=5000"
    assert lines[11] == f"   with options: the same, and {options} (its slow loader)"
    assert lines[13].startswith("   a. Common mistakes, cures. y = 2 step, but second runs")
    assert lines[21].endswith("a first writer wrote y = 2 step, a second one y = 3 step from 6 on.")
    assert lines[22] == "      As meant, every curve shows no old point from step 6 on"
    for i in (14, 23):
        heads = "run|how it was written|meant|by default|as meant?|with options|as meant?"
        assert re.split("  +", lines[i].strip()) == heads.split("|")
    order = [key for key in ROWS if key[0] not in ("resumed", "purge_step")]
    order += [key for key in ROWS if key not in order]
    for line, (run_name, tag) in zip(lines[15:21] + lines[24:27], order, strict=True):
        meant = ROWS[run_name, tag][0]
        name = f"{run_name}: {tag}" if run_name == "purge_step" else run_name
        cells = ["{}/{}/{}".format(*meant) if meant else "a curve per run"]
        for answer in expected[run_name, tag]:
            cells += ["{}/{}/{}".format(*answer), "yes" if answer == meant else "no"]
        found = re.split("  +", line.strip())
        assert found[0] == name and found[-5:] == cells
    assert lines[27] == f"   -> not as meant by default:   {', '.join(wrong[0])}"
    assert lines[28] == f"   -> not as meant with options: {', '.join(wrong[1])}"
    assert (
        lines[29] == "   -> as meant both times: with_step, folder_a, folder_b, purge_step: line/y"
    )
    assert lines[30].startswith("      so give a step, a folder for each run, and purge_step")


def test_ten_pictures_are_kept_by_default(run):
    measured, lines, _, _ = run
    if has_fast_loader():
        assert lines[31].startswith("      resumed: the fast loader drops older points by itself")
        assert "not written again needs the slow loader, too: --load_fast=false" in lines[32]
        lines = lines[:31] + lines[33:]
    assert measured["pictures"] == {"kept": [10, 14], "error": "TypeError"}
    assert lines[31].startswith("3. Traps: 14 pictures of one tag")
    assert lines[33].split() == ["14", "10", "14"]
    assert lines[34] == "   -> by default 4 are missing, with options 0"
    assert ": TypeError, as its height, 120, is taken" in lines[35]
    assert len(lines) == 37 and lines[36].startswith("look: tensorboard --logdir")


def test_try_steps_in_reverse_leave_one_point_by_default(lesson, run):
    by_default, with_options = run[2]["try/with_step"]
    assert lesson.describe(with_options) == (12, 12, 0)
    if has_fast_loader():
        assert [point[1:] for point in by_default] == [[0, 0]]


def test_the_newer_file_counts_as_the_older_after_the_clock_was_set_back(lesson, run):
    assert [lesson.describe(curve) for curve in run[2]["clock_back"]] == [(12, 12, 22)] * 2


# --- what is written ---------------------------------------------------------------------------


def test_a_line_has_a_point_for_each_step(lesson, tmp_path, events):
    lesson.write_line(tmp_path, [3, 4, 8], 5)
    lesson.write_line(tmp_path / "other", [2, 7], -1, tags=("line/z", "line/w"))
    points = [(e.step, e.value) for e in events(tmp_path).Scalars("line/y")]
    assert points == [(3, 15), (4, 20), (8, 40)]
    loaded = events(tmp_path / "other")
    assert set(loaded.Tags()["scalars"]) == {"line/z", "line/w"}
    for tag in ("line/z", "line/w"):
        assert [(e.step, e.value) for e in loaded.Scalars(tag)] == [(2, -2), (7, -7)]


def test_purge_step_is_passed_on(lesson, tmp_path, events):
    for first, purge_step in ((0, 0), (2, 2)):
        lesson.write_line(tmp_path, range(first, 4), 1 + first, purge_step)
    points = [(e.step, e.value) for e in events(tmp_path).Scalars("line/y")]
    assert points == [(0, 0), (1, 1), (2, 6), (3, 9)]


def test_a_curve_is_described_by_points_steps_and_its_last_value(lesson):
    assert lesson.describe([[0.1, 3, 5.0], [0.2, 4, 9.0], [0.0, 3, 7.0]]) == (3, 2, 7.0)
    assert lesson.describe([[0.1, 3, 5.0]]) == (1, 1, 5.0)


def test_pictures_grow_darker_under_their_words(lesson, tmp_path, events):
    picture = np.full((40, 50, 3), 200, np.uint8)
    lesson.write_pictures(tmp_path, picture, 4)
    pictures = events(tmp_path / "pictures").Images("image/bee")
    assert [e.step for e in pictures] == [0, 1, 2, 3]
    for step, bright in enumerate((200, 150, 100, 50)):
        shown = np.asarray(Image.open(io.BytesIO(pictures[step].encoded_image_string)))
        words = f"step {step}: {bright // 2}% bright"
        plain = torch.full((3, 40, 50), bright, dtype=torch.uint8)
        assert np.array_equal(shown.transpose(2, 0, 1), caption_row(words, [plain], [""]))


def test_only_a_picture_with_its_channels_last_is_an_error(lesson, tmp_path):
    assert lesson.layout_error(tmp_path, np.zeros((8, 9, 3), np.uint8)) == "TypeError"
    assert lesson.layout_error(tmp_path, np.zeros((3, 8, 9), np.uint8)) is None


# --- TensorBoard -------------------------------------------------------------------------------


def test_a_server_that_does_not_start_is_an_error_in_its_own_words(lesson, tmp_path):
    line = r"TensorBoard does not start: .*no_such_option"
    with (
        pytest.raises(lesson.DataError, match=line),
        lesson.tensorboard(tmp_path, "--no_such_option"),
    ):
        pytest.fail("it started")


def test_waiting_ends_when_the_same_answers_come_twice(lesson, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "events.out.tfevents.1").touch()
    calls, sleeps = [], []

    def ask(address, path, **query):
        calls.append((path, query["run"]))
        turn = len(sleeps)
        if turn == 0:
            raise HTTPError(address, 404, "unknown", None, None)
        return [[0, 0, 1]] * min(turn, 3) if turn > 1 else []

    monkeypatch.setattr(lesson, "ask", ask)
    monkeypatch.setattr(time, "sleep", sleeps.append)
    lesson.wait_until_read("http://nowhere/", tmp_path)
    assert len(sleeps) == 4
    assert set(calls) == {("scalars/scalars", "a"), ("images/images", "pictures"),
                          ("graphs/graph", "everyday")}  # fmt: skip
    monkeypatch.setattr(lesson, "ask", lambda *_, **__: [])
    with pytest.raises(lesson.DataError, match=r"has not read .* after 0\.1 s"):
        lesson.wait_until_read("http://nowhere/", tmp_path, seconds=0.1)


@pytest.mark.any_steps
@pytest.mark.parametrize("seed", range(3))
def test_main_asks_both_servers(lesson, insects_root, tmp_path, monkeypatch, capsys, seed):
    """Without TensorBoard: answers as they should be."""
    asked = []

    @contextmanager
    def tensorboard(log_dir, *options):
        assert log_dir == tmp_path and list(options) in ([], lesson.OPTIONS)
        yield " ".join(["http", *options])

    def ask(address, path, run=None, **query):
        asked.append(address)
        meant = ROWS.get((run, query.get("tag")), [None])[0] or (12, 12, 22)
        if path.startswith("images/individualImage?"):
            assert path.endswith("?blob_key=bee")
            return png
        return {
            "scalars/scalars": [[0, min(i, meant[1] - 1), meant[2]] for i in range(meant[0])],
            "images/images": [{"step": 5, "query": "blob_key=bee"}] * 14,
            "histograms/histograms": [[0, 0, [[0, 1, 40.0], [1, 2, 2.0]]]],
            "text/text": [{"text": "<td><p>note</p>\n"}],
            "graphs/graph": b"node {} node {Linear[3] Linear[3]}",
        }[path]

    out = io.BytesIO()
    Image.new("RGB", (7, 6)).save(out, "PNG")
    png = out.getvalue()
    monkeypatch.setattr(lesson, "tensorboard", tensorboard)
    monkeypatch.setattr(lesson, "ask", ask)
    monkeypatch.setattr(lesson, "loader", lambda address: f"loader of {address}")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    measured = lesson.main(seed, tmp_path, insects_root, POINTS, MANY, PICTURES)
    assert measured["curves"]["wrong"] == (["one_folder"], ["one_folder"])
    assert set(asked) == {"http", f"http {' '.join(lesson.OPTIONS)}"}
    out = capsys.readouterr().out
    for line in ("42 numbers, 0.00 to 2.00", "   7 x 6 pixels at step 5\n", "   <p>note</p>",
                 "   layers Linear[3]\n", "-> 0 of 5 came back", "loader of http loader",
                 "-> by default 0 are missing, with options 0"):  # fmt: skip
        assert line in out
    assert json.dumps(measured["pictures"]["kept"]) == "[14, 14]"
