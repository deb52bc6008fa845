"""What a lesson asks its readers to write, and the judgement of what they wrote.

An exercise is a function or a method whose docstring ends with the word "Exercise.". It is found by
ast, without importing the lesson, and judged by the lesson's tests, which tests/grader.py runs.
"""

import ast
import copy
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from support.files import ROOT, DataError

MARK = "Exercise."
BLANK = 'raise NotImplementedError("your turn")\n'


# --- sources -----------------------------------------------------------------------------------


@functools.cache
def functions(source):
    """{name or Class.method: syntax tree} of all functions, in the order of the file."""
    found = {}
    for node in ast.parse(source).body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                found[inner.name if inner is node else f"{node.name}.{inner.name}"] = inner
    return found


def of(source):
    """Those of the functions whose docstring ends with the word "Exercise."."""
    named = functions(source).items()
    return {name: node for name, node in named if (ast.get_docstring(node) or "").endswith(MARK)}


def body(node):
    """The statements of a function behind its docstring."""
    return node.body if ast.get_docstring(node) is None else node.body[1:]


def first_line(node):
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def signature(node):
    """Name and arguments as text, without annotations."""
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{node.name}({ast.unparse(arguments)})"


def text_of(source, node):
    """The lines of a function, its decorators first, without the mark of an exercise."""
    lines = source.splitlines(keepends=True)[first_line(node) - 1 : node.end_lineno]
    return re.sub(rf'\s*{re.escape(MARK)}\s*(?=""")', "", "".join(lines), count=1)


def replace(source, changes):
    """The source with the lines first ... last of each (first, last, text) replaced by the text."""
    lines = source.splitlines(keepends=True)
    for first, last, text in sorted(changes, reverse=True):  # from below: numbers stay right
        lines[first - 1 : last] = [text]
    return "".join(lines)


def blanked(source):
    """The lesson, the bodies of its exercises left to the learner."""
    changes = []
    for node in of(source).values():
        head = copy.copy(node)
        head.end_lineno = node.body[0].end_lineno  # of the docstring
        blank = " " * node.body[0].col_offset + BLANK
        changes.append((first_line(node), node.end_lineno, text_of(source, head) + blank))
    return replace(source, changes)


def alone(mine, lesson, name):
    """The learner's source in which all exercises but this one are as in the lesson."""
    own, others = functions(mine), of(lesson)
    return replace(mine, [
        (first_line(own[other]), own[other].end_lineno, text_of(lesson, node))
        for other, node in others.items() if other != name
    ])  # fmt: skip


def reporting(source, names):
    """The source, in which these functions tell tests/grader.py that they are called."""
    changes, named = [], functions(source)
    for name in names:
        first = body(named[name])[0]
        if (line := first_line(first)) > named[name].lineno:  # unless all is on one line
            call = f'{" " * first.col_offset}practice_call("{name}", locals())\n'
            changes.append((line, line - 1, call))
    return replace(source, changes)


def is_blank(statement):
    if isinstance(statement, ast.Raise):
        return "NotImplementedError" in ast.unparse(statement)
    expression = isinstance(statement, ast.Expr) and statement.value  # "..." or a text
    return isinstance(statement, ast.Pass) or isinstance(expression, ast.Constant)


# --- judgement ---------------------------------------------------------------------------------


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def test_of(lesson):
    folder, _, name = lesson.rpartition("/")
    return read(ROOT / "tests" / folder / f"test_{name}")


def path_with_root():
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def attempt(lesson, source, names, tests=None, limit=1800, record=False):
    """A source of the lesson for tests/grader.py, which says there what each key means."""
    return {"lesson": lesson, "name": names[0], "source": reporting(source, names),
            "tests": tests, "limit": limit, "record": record}  # fmt: skip


def judge(attempts, bar):
    """Yield what the grader says of each attempt. One process serves many, till one ends it."""
    attempts = list(attempts)
    environment = os.environ | {
        "PYTHONPATH": path_with_root(),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those that shuffle or spread tests, for example
    }
    for name in ("PYTHONOPTIMIZE", "PYTEST_ADDOPTS"):  # without asserts all tests would pass
        environment.pop(name, None)
    while attempts:
        with tempfile.TemporaryDirectory(prefix="practice_", ignore_cleanup_errors=True) as folder:
            for number, one in enumerate(attempts):
                one["folder"] = str(Path(folder, str(number)))
                place = Path(one["folder"], one["lesson"])
                place.parent.mkdir(parents=True)
                place.write_text(one["source"], encoding="utf-8")
            job, log, ready = Path(folder, "job.json"), Path(folder, "log"), False
            job.write_text(json.dumps(attempts), encoding="utf-8")
            with job.open() as stdin, log.open("wb") as stderr, subprocess.Popen(
                [sys.executable, "-P", ROOT / "tests" / "grader.py"], stdin=stdin,
                stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", cwd=ROOT, env=environment,
            ) as process:  # fmt: skip
                try:
                    for line in process.stdout:
                        said, ready = json.loads(line), True
                        if "broken" in said:
                            raise DataError(said["broken"])
                        bar.update("test" in said)
                        if "failure" in said:
                            attempts.pop(0)
                            yield said
                finally:
                    process.kill()
            if attempts:  # the first of them has ended the process
                ended = log.read_text(encoding="utf-8", errors="replace").strip()
                if not ready:
                    raise DataError(f"the tests do not run: {ended.splitlines()[-1:]}")
                yield {"failure": [why_ended(attempts.pop(0), ended)]}


def why_ended(one, log):
    """One line on an attempt that did not let its process live."""
    if "Timeout (" not in log:
        return f"Python itself ended: {' '.join(log.splitlines()[-1:])}"
    place = re.escape(str(Path(one["folder"], one["lesson"])))
    lines = [int(number) for number in re.findall(f'File "{place}", line ([0-9]+)', log)]
    at = f", still at: {one['source'].splitlines()[lines[0] - 1].strip()}" if lines else ""
    return f"not done after {one['limit']:.0f} s{at}   (does a loop never end?)"


def calls_of(lessons, known, bar):
    """{lesson: {exercise: {test that calls it: seconds}}} of {lesson: source}; the slow ones last.

    known: {lesson: {"key", "calls"}} of what was measured before; what is new is added.
    """
    keys = {lesson: digest(source, test_of(lesson)) for lesson, source in lessons.items()}
    new = [lesson for lesson in lessons if known.get(lesson, {}).get("key") != keys[lesson]]
    tries = [attempt(n, lessons[n], list(of(lessons[n])), record=True) for n in new]
    for lesson, said in zip(new, judge(tries, bar), strict=True):
        calls = {name: {} for name in of(lessons[lesson])}
        for test, seconds, names in sorted(
            said.get("record", ()), key=lambda row: max(row[1], 0.2)
        ):
            for name in names:
                calls[name][test] = round(seconds, 3)
        known[lesson] = {"key": keys[lesson], "calls": calls}
    return {lesson: known[lesson]["calls"] for lesson in lessons}
