import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from support import data, drawings


@pytest.fixture
def run_all(load):
    return load("run_all.py")


@pytest.fixture
def tree(tmp_path, run_all, monkeypatch):
    """Four lessons: a good one, one that fails, one that needs CUDA, one in peft/."""
    scripts = {
        "good.py": "print('fine')",
        "bad.py": "print('partly')\nraise SystemExit('no data: get it')",
        "gpu.py": '"""Trains.\n\nNeeds CUDA\n"""\nraise SystemExit(9)',
        "peft/small.py": "print('ok')",
    }
    (tmp_path / "peft").mkdir()
    for name, source in scripts.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    monkeypatch.setattr(run_all, "LESSONS", ["good.py", "gone.py", "bad.py", *list(scripts)[2:]])
    return tmp_path


def test_lessons_that_are_there_come_in_learning_order(run_all, tree):
    assert run_all.lessons(root=tree) == ["good.py", "bad.py", "gpu.py", "peft/small.py"]
    assert run_all.lessons("peft", tree) == ["peft/small.py"]


def test_each_outcome_is_one_line_that_says_why(run_all, tree):
    assert run_all.run_lesson("good.py", False, tree, [])[2] == "ok"
    assert run_all.run_lesson("bad.py", False, tree, [])[2] == "failed: no data: get it"
    assert run_all.run_lesson("gpu.py", False, tree, [])[1:] == (0.0, "skipped: needs CUDA")
    assert run_all.run_lesson("gpu.py", True, tree, [])[2].startswith("failed")


def test_main_prints_a_line_a_lesson_also_two_at_a_time(run_all, tree, capsys, monkeypatch):
    monkeypatch.setattr(run_all, "draw_data", lambda: None)
    monkeypatch.setattr(run_all, "needs_cuda", lambda path: path.name == "gpu.py")
    outcomes = run_all.main(jobs=2, root=tree)
    assert outcomes[0] == "ok" and outcomes[1].startswith("failed") and outcomes[3] == "ok"
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "good.py", "bad.py", "gpu.py", "peft/small.py"]  # fmt: skip


def write(tree, **lessons):
    for name, source in lessons.items():
        (tree / f"{name}.py").write_text(source, encoding="utf-8")


def test_two_jobs_run_at_once_and_one_waits(run_all, tree, monkeypatch):
    monkeypatch.setattr(run_all, "LESSONS", ["good.py", "bad.py"])
    monkeypatch.setattr(run_all, "draw_data", lambda: None)
    met = """
import pathlib, time
here = pathlib.Path(__file__)
here.with_suffix(".on").touch()
stop = time.monotonic() + {patience}
while len(list(here.parent.glob("*.on"))) < 2 and time.monotonic() < stop: time.sleep(0.01)
assert time.monotonic() < stop, "alone"
"""
    write(tree, good=met.format(patience=30), bad=met.format(patience=30))
    assert run_all.main(jobs=2, root=tree) == ["ok", "ok"]
    for path in tree.glob("*.on"):
        path.unlink()
    write(tree, good=met.format(patience=0.2), bad="")
    assert run_all.main(jobs=1, root=tree) == ["failed: AssertionError: alone", "ok"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_data_is_drawn_before_two_lessons_at_once_would(run_all, tree, monkeypatch, jobs):
    told = []
    monkeypatch.setattr(run_all, "draw_data", lambda: told.append("drawn"))
    monkeypatch.setattr(run_all, "run_lesson", lambda *a: told.append(a[0]) or (a[0], 0.0, "ok"))
    run_all.main(jobs=jobs, root=tree)
    assert told[: jobs - 1] == ["drawn"] * (jobs - 1) and told.count("drawn") == jobs - 1


def test_both_kinds_of_data_are_drawn(run_all, monkeypatch):
    told = []
    monkeypatch.setattr(drawings, "Shapes10", lambda: told.append("shapes"))
    monkeypatch.setattr(data, "hymenoptera", lambda: told.append("insects"))
    run_all.draw_data()
    assert told == ["shapes", "insects"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals")
def test_a_lesson_that_a_signal_ended_says_so(run_all, tree):
    write(tree, good="import os\nprint('all fine so far', flush=True)\nos.kill(os.getpid(), 9)")
    assert run_all.run_lesson("good.py", False, tree, [])[2] == "failed: killed by SIGKILL"


@pytest.mark.parametrize(("source", "needs"), [
    ('"""Trains.\n\nNeeds CUDA\n"""', True), ('"""Trains.\n\nNeeds          CUDA\n"""', True),
    ('"""Trains.\n\nNeeds CUDA or not\n"""', False), ("x = 1", False),
    ('"""Trains."""\nx = """\nNeeds CUDA\n"""', False),
])  # fmt: skip
def test_only_a_line_of_the_docstring_asks_for_cuda(run_all, tree, source, needs):
    write(tree, good=source)
    assert run_all.needs_cuda(tree / "good.py") == needs


@pytest.mark.parametrize("wrong", [["--only", "no-such-lesson"], ["--jobs", "0"], ["--job", "x"]])
def test_wrong_arguments_end_with_status_2(run_all, wrong):
    with pytest.raises(SystemExit) as stop:
        run_all.parse(wrong)
    assert stop.value.code == 2


@pytest.fixture
def start(tmp_path, run_all):
    """start(*flags, **lessons): run_all as a program over those lessons, in a folder of its own."""

    def begin(*flags, **lessons):
        shutil.copy(run_all.ROOT / "run_all.py", tmp_path)
        write(tmp_path, torch="class cuda:\n    is_available = bool", **lessons)  # soon imported
        how = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, *flags], cwd=tmp_path, encoding="utf-8", **how,
            env={**os.environ, "PYTHONPATH": str(run_all.ROOT)},
        )  # fmt: skip

    return begin


def test_status_is_1_if_a_lesson_failed_and_none_reads_the_terminal(start):
    ask = "import sys\nraise SystemExit(f'read {sys.stdin.read()!r}')"
    child = start("run_all.py", model=ask, train="print('fine')")
    out, err = child.communicate("typed")
    assert child.returncode == 1 and err == ""
    assert "failed: read ''" in out and out.endswith("2 lessons, 1 failed\n")


def test_help_works_without_docstrings(start):
    child = start("-OO", "run_all.py", "--help", model="")
    out, err = child.communicate()
    assert (child.returncode, err) == (0, "") and "--jobs" in out


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_it_alone_ends_what_runs_and_begins_no_more(start, tmp_path, name, jobs):
    sleep = """
import os, pathlib, time
pathlib.Path(__file__).with_suffix(".tmp").write_text(str(os.getpid()))
pathlib.Path(__file__).with_suffix(".tmp").rename(pathlib.Path(__file__).with_suffix(".pid"))
time.sleep(60)
"""
    lessons = dict.fromkeys(("model", "train", "nn_module"), sleep)
    child = start("-c", f"""
import run_all, sys
run_all.draw_data = lambda: None
sys.argv = ["run_all.py", "--jobs", "{jobs}"]
run_all.guard(run_all.command, run_all.parse)
""", **lessons)  # fmt: skip
    while len(pids := list(tmp_path.glob("*.pid"))) < int(jobs):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(getattr(signal, name))
    out, err = child.communicate()
    assert (child.returncode, out, err) == (130, "", "stopped\n")
    assert sorted(tmp_path.glob("*.pid")) == sorted(pids)
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
