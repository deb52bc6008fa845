import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import files

FOLDER_LESSON = files.ROOT / "peft" / "lora_principle.py"  # the house holds all of them equal
TOP = "from support.files import DataError, guard\n"
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(files.DataError, match="No space left"), files.write_whole(path) as beside:
        beside.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_is_whole_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "new" / "kept.txt", []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=real, n=name: (f(*a), done.append(n)))
    with files.write_whole(path) as beside:
        beside.write_text("whole", encoding="utf-8")
        assert not path.exists() and beside.parent == path.parent
    assert done == ["fsync", "replace"] and path.read_text(encoding="utf-8") == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("text", "low"), [("0", 1), ("nan", 0), ("inf", 0), ("1e19", 0)])
def test_a_number_out_of_bounds_is_refused(text, low):
    with pytest.raises(files.argparse.ArgumentTypeError, match=f"{text} is less than {low}"):
        files.number(float, low)(text)
    assert files.number(int, 1)("1") == 1 and files.number(float, 0)("0") == 0


# --- the guard, in a program at the top and in one that stands alone ----------------------------


@pytest.fixture(params=["top", "folder"])
def program(request, tmp_path):
    """program(body, *arguments, **how): runs a script whose main has that body, under the guard."""
    head = '"""What it does.\n\nMore."""\n'
    if request.param == "top":
        head += TOP
    else:
        tree = ast.parse(FOLDER_LESSON.read_text(encoding="utf-8"))
        own = next(n for n in tree.body if getattr(n, "name", "") == "guard")
        head += f"import argparse\nLOG_DIR = 'runs/x'\n{ast.unparse(own)}\n"
    head += "import os, signal, sys, threading, time\n"

    def run(body, *arguments, flags=(), **how):
        script = tmp_path / "program.py"
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        source = f"{head}LOG_DIR = 'runs/x'\ndef main():\n{lines}\nguard(main)\n"
        script.write_text(source, encoding="utf-8")
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
        plain = {**os.environ, "PYTHONPATH": str(files.ROOT), "PYTHONUNBUFFERED": ""}
        how["env"] = plain | how.get("env", {})
        return subprocess.run(
            [sys.executable, *flags, script, *arguments], encoding="utf-8", cwd=tmp_path, **how
        )

    run.kind = request.param
    return run


@pytest.mark.parametrize(("error", "told"), [
    ("FileExistsError(17, 'File exists', 'runs')", "[Errno 17] File exists: 'runs'"),
    ("ConnectionError('no network')", "no network"),
])  # fmt: skip
def test_what_the_system_refuses_is_one_line_and_status_1(program, error, told):
    done = program(f"print('before')\nraise {error}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "before\n", told + "\n")


def test_a_mistake_of_the_program_keeps_its_traceback(program):
    done = program("raise RuntimeError('a mistake')")
    assert done.returncode == 1 and "Traceback" in done.stderr


@needs_signals
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_and_sigterm_end_it_silently_with_status_130(program, name):
    done = program(f"print('before')\nos.kill(os.getpid(), signal.{name})\ntime.sleep(60)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "before\n", "")


def test_a_pipe_whose_reader_has_left_ends_it_silently(program):
    read, write = os.pipe()
    os.close(read)
    done = program("for i in range(100_000): print(i)", stdout=write)
    os.close(write)
    assert done.returncode == 1
    if sys.platform != "win32":  # there it is an invalid argument
        assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_line(program):
    with Path("/dev/full").open("w") as full:
        done = program("print('lost')", stdout=full)
    assert (done.returncode, done.stderr) == (1, "[Errno 28] No space left on device\n")


def test_what_tensorboards_thread_cannot_write_is_not_lost_in_silence(program):
    thread = "thread = threading.Thread(target=lambda: open('no/such/folder'))"
    done = program(f"{thread}\nthread.start()\nthread.join()\nprint('done')")
    assert done.returncode == 1 and done.stdout == "done\n" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cannot log to runs/x: [Errno 2]")


def test_a_log_fills_while_the_program_runs(program, tmp_path):
    with (tmp_path / "log").open("w") as log:
        done = program("print('first')\nprint(repr(open('log').read()))", stdout=log)
    assert done.returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == ["first", r"'first\n'"]


def test_any_text_can_be_printed_on_any_console(program):
    body = "print('\u00e9 \u4e2d')\nraise OSError('\u00e9 \u4e2d')"
    done = program(body, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (1, "\\xe9 \\u4e2d\n", "\\xe9 \\u4e2d\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes it")
def test_without_any_output_it_still_runs(program):
    done = program("print('nowhere')", preexec_fn=lambda: os.close(1), stdout=None)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_arguments_end_with_2_and_help_works_without_docstrings(program):
    done = program("print('ran')", "--nonsense")
    assert done.returncode == 2 and done.stdout == "" and "--nonsense" in done.stderr
    assert "What it does." in program("print('ran')", "--help").stdout
    done = program("print('ran')", "--help", flags=["-OO"])
    assert done.returncode == 0 and "--help" in done.stdout and "ran" not in done.stdout


def test_at_the_top_data_errors_are_told_and_a_status_is_kept(program):
    if program.kind == "folder":
        pytest.skip("lessons in folders have neither")
    assert program("return 3").returncode == 3 and program("return {'a': 1}").returncode == 0
    worker = "Caught DataError in worker 0.\\nTraceback:\\n  x\\nDataError: a.jpg is no picture\\n"
    done = program(f"raise DataError('{worker}')")
    assert (done.returncode, done.stderr) == (1, "DataError: a.jpg is no picture\n")
    assert not issubclass(files.DataError, SystemExit)


# --- two lessons for real ----------------------------------------------------------------------


@pytest.mark.parametrize("lesson", ["nn_relu.py", "peft/lora_principle.py"])
@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_ctrl_c_while_torch_is_being_imported_is_silent(lesson):
    child = subprocess.Popen(
        [sys.executable, "-v", files.ROOT / lesson], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    with child:  # -v tells each import as it ends
        last = next(line for line in child.stderr if line.startswith("import 'torch."))
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
    assert last and child.returncode == -signal.SIGINT and "Traceback" not in rest
