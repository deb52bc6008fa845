import subprocess
import sys

import pytest


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
    assert run_all.run_lesson("good.py", False, tree)[2] == "ok"
    assert run_all.run_lesson("bad.py", False, tree)[2] == "failed: no data: get it"
    assert run_all.run_lesson("gpu.py", False, tree)[1:] == (0.0, "skipped: needs CUDA")
    assert run_all.run_lesson("gpu.py", True, tree)[2].startswith("failed")


def test_main_prints_a_line_a_lesson_also_two_at_a_time(run_all, tree, capsys, monkeypatch):
    monkeypatch.setattr(run_all, "draw_data", lambda: None)
    monkeypatch.setattr(run_all, "needs_cuda", lambda path: path.name == "gpu.py")
    outcomes = run_all.main(jobs=2, root=tree)
    assert outcomes[0] == "ok" and outcomes[1].startswith("failed") and outcomes[3] == "ok"
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "good.py", "bad.py", "gpu.py", "peft/small.py"]  # fmt: skip


@pytest.mark.parametrize("wrong", [["--only", "no-such-lesson"], ["--jobs", "0"], ["--job", "x"]])
def test_wrong_arguments_end_with_status_2(run_all, wrong):
    with pytest.raises(SystemExit) as stop:
        run_all.parse(wrong)
    assert stop.value.code == 2


def test_status_is_1_if_a_lesson_failed(tmp_path, run_all):
    (tmp_path / "run_all.py").write_text(
        (run_all.ROOT / "run_all.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (tmp_path / "model.py").write_text("raise SystemExit('broken')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "run_all.py"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "failed: broken" in done.stdout and "1 lessons, 1 failed" in done.stdout
