"""The grader must grade: a wrong body is refused in every exercise, the lesson's own is taken."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import exercises
from support.files import DataError

ROOT = Path(__file__).resolve().parents[1]
ZEROS = """
def zeros(function):
    import functools, inspect, torch

    def zero(x):
        if isinstance(x, torch.Tensor):
            return torch.zeros_like(x)
        if isinstance(x, dict):  # one that serves as a set has no values to change
            return {key: zero(x[key]) for key in x if x[key] is not True}
        if type(x) in (list, tuple, set):
            return type(x)(map(zero, x))
        return type(x)() if isinstance(x, (bool, int, float, str)) else None

    def changed(*args, **kwargs):
        x = function(*args, **kwargs)
        return map(zero, x) if inspect.isgenerator(x) else zero(x)

    return functools.wraps(function)(changed)


"""


@pytest.fixture
def practice(load, tmp_path, monkeypatch):
    """practice.py, its copies under tmp_path."""
    module = load("practice.py")
    monkeypatch.setattr(module, "PRACTICE", tmp_path)
    return module


@pytest.fixture(scope="module")
def known(load):
    return load("practice.py").lessons()


def write_body(path, name, text):
    """Put lines of code in place of a function's body, as a learner does."""
    source = path.read_text(encoding="utf-8")
    node = exercises.functions(source)[name]
    first = exercises.body(node)[0]
    lines = "".join(f"{' ' * first.col_offset}{line}\n" for line in text.splitlines())
    change = (exercises.first_line(first), node.end_lineno, lines)
    path.write_text(exercises.replace(source, [change]), encoding="utf-8")


# --- exercises and their copies ----------------------------------------------------------------


def test_there_are_exercises_in_every_chapter(known):
    assert sum(len(exercises.of(source)) for source in known.values()) >= 150
    assert len({lesson.rpartition("/")[0] for lesson in known}) == 8  # the top, and seven folders
    for part in ("0", "nn_", "model", "train"):
        assert any(lesson.startswith(part) and "/" not in lesson for lesson in known), part


def test_a_docstring_says_more_than_the_mark(known):
    for lesson, source in known.items():
        for name, node in exercises.of(source).items():
            assert len(ast.get_docstring(node).split()) > 4, f"{lesson}: {name}"


def bare(source):
    """The tree of a source as text, without the marks of exercises and the breaks of lines."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = " ".join(node.value.replace("Exercise.", "").split())
    return ast.dump(tree)


def test_a_copy_is_the_lesson_but_for_the_bodies_of_its_exercises(known):
    for lesson, source in known.items():
        copy, asked = exercises.blanked(source), exercises.of(source)
        assert not exercises.of(copy) and copy.count(exercises.BLANK) == len(asked)
        assert bare(exercises.alone(copy, source, "none of them")) == bare(source)
        own = exercises.functions(copy)
        for name, node in asked.items():
            assert exercises.signature(own[name]) == exercises.signature(node), f"{lesson}: {name}"
            assert all(map(exercises.is_blank, exercises.body(own[name])))


SOURCE = '''
class A:
    @staticmethod
    def f(x: int = 3) -> int:
        """Doubles. Exercise."""
        # as it should be
        return 2 * x

    def g(self):
        """Exercise. Or not."""
        "Exercise."


def k(*a, b, **c):
    """Sums.

    Exercise.
    """

    def inner():
        """Exercise."""

    return sum(a)
'''


def test_only_the_word_at_the_end_of_a_docstring_marks_an_exercise():
    asked = exercises.of(SOURCE)
    assert list(asked) == ["A.f", "k"] and exercises.signature(asked["A.f"]) == "f(x=3)"
    copy = exercises.blanked(SOURCE)
    assert (
        '@staticmethod\n    def f(x: int = 3) -> int:\n        """Doubles."""\n        raise'
        in copy
    )
    assert '"""Sums."""\n    raise' in copy and copy.endswith('turn")\n')
    assert "as it should be" not in copy and '"""Exercise. Or not."""' in copy
    called = exercises.reporting(SOURCE, ["A.f", "k"])
    assert called.count("practice_call") == 2
    assert '        practice_call("A.f", locals())\n        return 2 * x' in called


@pytest.mark.parametrize(
    ("text", "blank"),
    [('raise NotImplementedError("your turn")', True), ("pass", True), ("...", True),
     ("return 0", False), ("x = 3\n    return x", False), ("raise ValueError", False)],
)  # fmt: skip
def test_what_counts_as_blank(text, blank):
    (node,) = exercises.functions(f"def f():\n    {text}\n").values()
    assert all(map(exercises.is_blank, exercises.body(node))) == blank


# --- the grader --------------------------------------------------------------------------------


def wrong_bodies(source, name):
    """{what it does: the lesson with this body}: raises, returns nothing, its argument, zeros."""
    node = exercises.of(source)[name]
    first = exercises.body(node)[0]
    arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args] if a.arg != "self"]
    bodies = {"blank": exercises.BLANK, "None": "return None\n"}
    if arguments:
        bodies["argument"] = f"return {arguments[0]}\n"
    lines = exercises.first_line(first), node.end_lineno
    changed = {
        what: exercises.replace(source, [(*lines, " " * first.col_offset + text)])
        for what, text in bodies.items()
    }
    if any(isinstance(n, ast.Return | ast.Yield) and n.value for n in ast.walk(node)):
        top = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        begin = exercises.first_line(top[0])
        decorator = (node.lineno, node.lineno - 1, " " * node.col_offset + "@zeros\n")
        changed["zeros"] = exercises.replace(source, [decorator, (begin, begin - 1, ZEROS)])
    return changed


class Bar:
    """Counts tests as a tqdm bar would."""

    n = 0

    def update(self, n=1):
        self.n += n


def judged(attempts):
    """[(what it is, the failure or None)] of attempts with a key "what"."""
    verdicts = exercises.judge(attempts, Bar())
    return [(one["what"], said["failure"]) for one, said in zip(attempts, verdicts, strict=True)]


def labelled(lesson, source, name, what):
    return exercises.attempt(lesson, source, [name], limit=120) | {"what": (lesson, name, what)}


def test_the_grader_refuses_wrong_bodies(known):
    """A sample: one body of every eighth exercise, in CI of every third; with EVERY_BODY all."""
    attempts = []
    for number, (lesson, name) in enumerate((n, e) for n in known for e in exercises.of(known[n])):
        bodies = wrong_bodies(known[lesson], name)
        chosen = list(bodies)
        if "EVERY_BODY" not in os.environ:
            few = number % (3 if "CI" in os.environ else 8)
            chosen = [] if few else [chosen[number // 8 % len(chosen)]]
        attempts += [labelled(lesson, bodies[what], name, what) for what in chosen]
    taken = [what for what, failure in judged(attempts)
             if failure is None or failure[0].startswith("not done after")]  # fmt: skip
    assert not taken, f"{len(taken)} of {len(attempts)} wrong bodies were taken: {taken}"


BODIES = [  # lesson, function, body, what the grader says of it; the last two end its process
    ("nn_conv.py", "convolve", "h, w = kernel.shape\nreturn fourier_convolve(x, kernel)", None),
    ("nn_conv.py", "output_size", "return (size + 2 * padding - kernel) // stride + 2", [
        "sizes that everyone should know",
        "last call  output_size(size = 32, kernel = 5, stride = 1, padding = 2, dilation = 1)",
        "expected   32", "got        33",
        "in         assert lesson.output_size(32, 5, padding=2) == 32",
    ]),
    ("nn_conv.py", "conv2d_unfold", "return F.conv2d(x, weight, bias)", [
        "loop and unfold are the layer   (channels = 2, out = 3, kernel = (1, 4), "
        "options = {'stride': 3})",
        "last call  conv2d_unfold(x = a tensor (3, 2, 13, 10) of float64, "
        "weight = a tensor (3, 2, 1, 4) of float64, bias = ",
        "expected   a tensor (3, 3, 5, 3) of float64",
        "got        a tensor (3, 3, 13, 7) of float64",
        "in         torch.testing.assert_close(ours(",
    ]),
    ("nn_conv.py", "conv2d_loop", "return conv2d_unfold(x, weight, bias, stride, padding, "
     "dilation, groups)", [
        "channels that do not fit are refused   (channels = 1, groups = 1)",
        "last call  conv2d_loop(x = a tensor (1, 4, 5, 5) of float32, ",
        "raised     RuntimeError: ", "in         out = (matrix @ windows)",
    ]),
    ("nn_maxpool.py", "max_pool", "return F.max_pool2d(x, kernel, stride, padding, dilation, "
     "ceil_mode) + 1", [
        "pooling by unfold is the layer   (kernel = 2, stride = 2, ",
        "last call  max_pool(x = a tensor (2, 3, 13, 10) of float64, ",
        "expected   -", "got        -", "in         assert torch.equal(ours, layer(x))",
    ]),
    ("nn_loss.py", "same_shape", "x + t", [
        "shapes that would broadcast are refused",
        "last call  same_shape(x = [[0], [0], [0], [0]], ",
        "expected   with pytest.raises(ValueError, match=", "got        DID NOT RAISE",
    ]),
    ("nn_loss.py", "log_sum_exp", "return helper(z)  # which there is not", [
        "log sum exp has no overflow and no underflow",
        "last call  log_sum_exp(z = [[1000, 1001, 999], [-1000, -1001, -999]])",
        "raised     NameError: name 'helper' is not defined", "in         return helper(z)",
    ]),
    ("nn_loss.py", "log_sum_exp", "while True:\n    z = z + 1", [
        "not done after 3 s, still at: ",
    ]),
    ("nn_loss.py", "reduce", "import os\nos._exit(3)", ["Python itself ended: "]),
]  # fmt: skip


@pytest.fixture(scope="module")
def said(known, tmp_path_factory):
    """What the grader says of BODIES."""
    attempts = []
    for number, (lesson, name, text, _) in enumerate(BODIES):
        path = tmp_path_factory.mktemp("body") / lesson
        path.write_text(known[lesson], encoding="utf-8")
        write_body(path, name, text)
        one = labelled(lesson, path.read_text(encoding="utf-8"), name, number)
        attempts.append(one | {"limit": 3 if "while" in text else 120})
    return [failure for _, failure in judged(attempts)]


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_what_is_wrong_is_said_in_words(said, number):
    expected, lines = BODIES[number][-1], said[number]
    if expected is None:
        assert lines is None
    else:
        assert len(lines) == len(expected), lines
        for line, begin in zip(lines, expected, strict=True):
            assert line.startswith(begin) and line.isascii() and len(line) < 400, line


# --- a learner's way through practice.py -------------------------------------------------------


def test_a_session_from_start_to_solved(practice, known, tmp_path, capsys):
    def shown(*command):
        status = practice.main(*command)
        out = capsys.readouterr().out
        assert out.isascii()
        return status, out

    status, out = shown("start", "n_loss.")
    path = tmp_path / "nn_loss.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    asked = [line.split(maxsplit=2) for line in out.splitlines() if line.startswith("   line")]
    assert status == 0 and [text.partition("(")[0] for *_, text in asked] == list(
        exercises.of(known["nn_loss.py"])
    )
    assert all("your turn" in lines[int(number) - 1] for _, number, _ in asked)
    path.write_text(path.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    with pytest.raises(DataError, match="is there; --again would replace it"):
        practice.main("start", "nn_loss")
    assert path.read_text(encoding="utf-8").endswith("# mine\n")

    status, out = shown("check", "nn_loss")
    assert status == 1 and out.count("your turn") == 5 and "0 of 5 solved" in out
    write_body(path, "log_sum_exp", "return other(z)")
    path.write_text("from torch import logsumexp\n" + path.read_text(encoding="utf-8").replace(
        "def log_sum_exp", "def other(z):\n    return logsumexp(z, -1)\n\n\ndef log_sum_exp"
    ), encoding="utf-8")  # fmt: skip
    write_body(path, "naive_cross_entropy", "return cross_entropy(z, t)")
    status, out = shown("check")
    assert status == 1 and "1 of 5 solved" in out and out.count("your turn") == 3
    assert "log_sum_exp                    solved" in out
    assert "naive_cross_entropy            wrong      main overflows where theory" in out
    status, out = shown()
    assert status == 0 and "-reduce +log_sum_exp -cross_entropy !naive_cross_entropy" in out
    assert "nn_loss.py   1 of 5" in out and "\n1 of " in out

    calls = practice.read_progress()["calls"]["nn_loss.py"]["calls"]
    tests = {name: {test.partition("::")[2].partition("[")[0] for test in found}
             for name, found in calls.items()}  # fmt: skip
    assert set(calls) == set(exercises.of(known["nn_loss.py"]))
    assert "test_shapes_that_would_broadcast_are_refused" in tests["same_shape"]
    assert tests["naive_cross_entropy"] == {"test_main_overflows_where_theory_says"}
    assert all(0 <= seconds < 60 for found in calls.values() for seconds in found.values())

    path.write_text(known["nn_loss.py"], encoding="utf-8")
    assert "?reduce ?log_sum_exp" in shown()[1]
    assert shown("check", "nn_loss") == (0, shown("check", "nn_loss")[1])
    assert "5 of 5 solved" in shown("check")[1] and "nn_loss.py   5 of 5" in shown()[1]
    assert shown("start", "nn_loss", True)[0] == 0 and "nn_loss.py   0 of 5" in shown()[1]


def test_what_has_been_judged_is_not_judged_again(practice, known, tmp_path, monkeypatch, capsys):
    tries = []
    monkeypatch.setattr(exercises, "judge", lambda attempts, bar: (
        tries.append(one["name"]) or {"failure": None, "record": [["t", 1, list(
            exercises.of(known["nn_loss.py"]))]]} for one in attempts))  # fmt: skip
    path = tmp_path / "nn_loss.py"
    path.write_text(known["nn_loss.py"], encoding="utf-8")
    for expected in (["same_shape", *exercises.of(known["nn_loss.py"])], [], ["reduce"]):
        tries.clear()
        assert practice.main("check") == 0 and tries == expected  # first, which test calls what
        if not expected:
            write_body(path, "reduce", "return 3")
    (tmp_path / "progress.json").write_text("{", encoding="utf-8")  # damaged: all anew
    assert practice.main("check") == 0 and len(tries) == 1 + 6


def test_an_exercise_is_judged_by_as_many_tests_as_take_little(practice):
    assert practice.soon_done({"a": 1.0, "b": 15.0, "c": 5.0}) == {"a": 1.0, "b": 15.0}
    assert practice.soon_done({"a": 50.0, "b": 0.1}) == {"a": 50.0} and practice.soon_done({}) == {}


def test_answers_are_the_lessons_own(practice, known, capsys):
    assert practice.main("answer", "peft/lora:LoRALinear.delta") == 0
    out = capsys.readouterr().out
    assert out.startswith("# LoRALinear.delta: peft/lora_principle.py, line ")
    assert "\ndef delta(self):\n" in out and "Exercise." not in out
    practice.main("answer", "nn_loss")
    assert capsys.readouterr().out.count("\ndef ") == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [("nn_lostt", "did you mean nn_loss?"), ("peft", "fits peft/lora_principle.py, peft/adapter"),
     ("zzz", "python practice.py lists them"), ("nn_loss:l2", "exercises of nn_loss.py: same_"),
     ("", "fits ")],
)  # fmt: skip
def test_a_name_that_fits_none_or_several_ends_with_2(practice, capsys, name, message):
    for command in ("start", "answer"):
        with pytest.raises(SystemExit) as end:
            practice.main(command, name)
        err = capsys.readouterr().err
        assert end.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["nn_conv", "nn_conv.py", "practice/nn_conv.py", "peft\\lora", "lora"]
)
def test_a_name_may_be_any_part_of_a_path(practice, known, name):
    expected = "nn_conv.py" if "conv" in name else "peft/lora_principle.py"
    assert practice.pick(name, known) == (expected, "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("def reduce(", "def reduce((", r"nn_loss.py, line \d+: invalid syntax: def reduce\(\("),
     ("def reduce(", "def reduced(", r"nn_loss.py lacks reduce: put reduce\(losses, reduction, w"),
     ('"""', "\0", r"nn_loss.py, line 1: .*null bytes")],
)  # fmt: skip
def test_a_broken_copy_is_one_line(practice, known, tmp_path, capsys, old, new, message):
    text = known["nn_loss.py"].replace(old, new, 1)
    (tmp_path / "nn_loss.py").write_text(text, encoding="utf-8")
    assert practice.main("check") == 1
    *_, line, count = capsys.readouterr().out.splitlines()
    assert re.search(message, line) and count == "0 of 0 solved"
    assert practice.main() == 0 and re.search(message, capsys.readouterr().out)


def test_another_signature_is_wrong_and_hints_are_not(practice, known, tmp_path, capsys):
    source = exercises.blanked(known["nn_loss.py"])
    source = source.replace("def log_sum_exp(z):", "def log_sum_exp(z: 'a tensor') -> None:")
    source = source.replace("def reduce(losses, ", "def reduce(loss, ")
    (tmp_path / "nn_loss.py").write_text(source, encoding="utf-8")
    write_body(tmp_path / "nn_loss.py", "reduce", "return 3")
    assert practice.main("check") == 1
    out = capsys.readouterr().out
    assert "wrong      the lesson calls it as reduce(losses, reduction, weights=None)" in out
    assert out.count("your turn") == 4


def test_a_folder_that_cannot_be_written_and_other_bytes_are_one_line(
    practice, tmp_path, monkeypatch
):
    (tmp_path / "nn_loss.py").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is no text in UTF-8"):
        practice.states("nn_loss.py", practice.lessons()["nn_loss.py"], practice.read_progress())
    (tmp_path / "file").touch()
    monkeypatch.setattr(practice, "PRACTICE", tmp_path / "file")
    with pytest.raises(DataError, match="cannot write "):
        practice.main("start", "nn_loss")
    for command in ("check", "run"):
        with pytest.raises(DataError, match=r"not started: python practice\.py start nn_loss"):
            practice.main(command, "nn_loss")
    with pytest.raises(DataError, match=r"not started: python practice\.py start"):
        practice.main("check")


def program(folder, *command, **more):
    return subprocess.Popen(
        [sys.executable, ROOT / "practice.py", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"NOTES_PRACTICE": str(folder)} | more,
    )


def test_as_a_program_it_lists_and_runs_a_copy(tmp_path, known):
    with program(tmp_path, PYTHONOPTIMIZE="2", PYTHONIOENCODING="ascii:strict") as listing:
        out, err = listing.communicate()
        assert listing.returncode == 0 and err == "" and "exercises in" in out
    listed = [line.split()[0] for line in out.splitlines() if " of " in line and ".py" in line]
    assert listed == list(known)  # in learning order
    (tmp_path / "nn_loss.py").write_text(known["nn_loss.py"], encoding="utf-8")
    (tmp_path / "torch.py").write_text("raise ImportError", encoding="utf-8")  # hides nothing
    with program(tmp_path, "run", "nn_loss") as copy:
        out, err = copy.communicate()
        assert copy.returncode == 0 and "log-sum-exp" in out, err
    assert any((tmp_path / "runs" / "nn_loss").rglob("*tfevents*"))
    with program(tmp_path, "check", "no_such_lesson") as wrong:
        assert wrong.communicate()[1].count("\n") == 1 and wrong.returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
def test_ctrl_c_ends_it(tmp_path, known):
    (tmp_path / "nn_loss.py").write_text(known["nn_loss.py"], encoding="utf-8")
    with program(tmp_path, "check") as check:
        time.sleep(2)  # the grader imports torch
        check.send_signal(signal.SIGINT)
        _, err = check.communicate(timeout=20)
    assert check.returncode == 130 and err.count("\n") <= 1 and "Traceback" not in err
