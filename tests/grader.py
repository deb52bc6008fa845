"""Runs a lesson's tests against changed copies of the lesson; practice.py starts it.

On stdin there is a JSON list of attempts. An attempt has
    folder   what tests/conftest.py finds there, it loads in place of the lesson
    lesson   as "peft/lora_principle.py"      name   of the function that is judged
    tests    the ids to run, in this order; or null: all of the lesson's, those that name it first
    limit    seconds; whoever needs longer is ended, with a traceback on stderr
    record   run all, and tell which test calls which function
On stdout there is one JSON object a line: {"ready": true} once, {"test": id} after each test, and
after each attempt {"failure": null, or lines of text, "record": [[id, seconds, names], ...]}, which
holds the tests that passed. {"broken": text} if a test file cannot be read.
"""

import ast
import builtins
import faulthandler
import inspect
import json
import math
import os
import sys
import time
from contextlib import suppress
from operator import eq, ge, gt, le, lt, ne
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMPARE = {"==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}


def test_file(lesson):
    folder, _, name = lesson.rpartition("/")
    return ROOT / "tests" / folder / f"test_{name}"


def shorten(text, most=200):
    text = text.replace("±", "+-").encode("ascii", "backslashreplace").decode()
    return text if len(text) <= most else text[: most - 4] + " ..."


def show(value, most=12):
    """A value in words that fit on a line: small tensors whole, larger ones by their shape."""
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.numel() > most or value.is_meta:
            return f"a tensor {tuple(value.shape)} of {dtype}"
        return show(value.tolist()) + ("" if dtype == "float32" else f" ({dtype})")
    if isinstance(value, float):
        return f"{value:.5g}"
    if type(value) in (list, tuple):
        inside = ", ".join([*map(show, value[:most]), *["..."] * (len(value) > most)])
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if inspect.isroutine(value):
        return getattr(value, "__qualname__", "a function")
    return shorten(repr(value), 100)


def differing(got, expected):
    """Both in words; of two larger tensors what they hold where they differ most."""
    tensors = isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor)
    if tensors and got.shape == expected.shape and got.numel() > 12 and not got.is_meta:
        a, b = (t.detach().cpu().to(torch.complex128) for t in (got, expected))
        off = (a - b).abs().nan_to_num(math.inf)
        at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        where = f"  (at {list(at)} of {tuple(off.shape)}, where they differ most)"
        return f"{got[at].item():.6g}{where}", f"{expected[at].item():.6g}"
    words = show(got), show(expected)
    return words if words[0] != words[1] else (shorten(repr(got)), shorten(repr(expected)))


def statement(path, line):
    """The statement of a file that holds this line, as a syntax tree, or None."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)
              and node.lineno <= line <= node.end_lineno]  # fmt: skip
    return max(around, key=lambda node: node.lineno, default=None)


def compared_in(node):
    """The texts of the two things that an expression or a statement compares, if it does."""
    node = getattr(node, "test", getattr(node, "value", node))
    if isinstance(node, ast.Compare):
        return ast.unparse(node.left), ast.unparse(node.comparators[-1])
    if isinstance(node, ast.Call) and len(node.args) > 1:  # torch.equal(a, b), assert_close(a, b)
        return ast.unparse(node.args[0]), ast.unparse(node.args[1])
    return None


class Grader:
    """The plugin. One collection serves all attempts: the lesson is loaded anew for each."""

    def __init__(self, attempts, out, log):
        self.attempts, self.out, self.log = attempts, out, log
        self.where, self.called, self.last, self.compared = [], {}, None, None

    def tell(self, **what):
        print(json.dumps(what), file=self.out, flush=True)

    def note(self, name, arguments):
        """The first statement of each function that is judged calls this."""
        self.last = arguments
        for place in self.where[-1:]:
            self.called.setdefault(place, set()).add(name)

    def pytest_collectreport(self, report):
        if report.failed:
            self.tell(broken=f"{report.nodeid} cannot be read: {report.longreprtext[-400:]}")

    def pytest_runtestloop(self, session):
        self.tell(ready=True)
        for attempt in self.attempts:
            failure, record = self.judge(session, attempt)
            self.tell(failure=failure, record=record)
        return True

    def judge(self, session, attempt):
        tests = test_file(attempt["lesson"])
        items = {item.nodeid: item for item in session.items if item.path == tests}
        if attempt["tests"] is None:
            parts = attempt["name"].split(".")
            items = sorted(items.values(), key=lambda item: not any(
                part in inspect.getsource(item.function) for part in parts))  # fmt: skip
        else:
            items = [items[test] for test in attempt["tests"] if test in items]
        os.environ["NOTES_PRACTICE"] = attempt["folder"]
        name = attempt["lesson"].removesuffix(".py")  # the module, as tests/conftest.py names it
        sys.modules.pop("notes_" + name.replace("/", "_") if "/" in name else name, None)
        self.attempt, self.called, self.failure, record = attempt, {}, None, []
        torch.set_grad_enabled(True)  # what the attempt before may have left
        torch.set_default_dtype(torch.float32)
        faulthandler.dump_traceback_later(attempt["limit"], exit=True, file=self.log)
        for item, following in zip(items, [*items[1:], None], strict=True):
            self.where, self.failure, self.last, self.passed = [item.nodeid], None, None, True
            begin = time.perf_counter()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            self.tell(test=item.nodeid)
            record.append([item, time.perf_counter() - begin, self.passed])
            if self.failure and not attempt["record"]:
                with suppress(Exception):  # fixtures may hold this copy of the lesson: all must end
                    session._setupstate.teardown_exact(None)  # as pytest does after its last test
                break
        faulthandler.cancel_dump_traceback_later()
        return self.failure, [
            [item.nodeid, seconds, sorted(set().union(*(
                self.called.get(place, ()) for place in (item.nodeid, *item.fixturenames))))]
            for item, seconds, passed in record if passed
        ]  # fmt: skip

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        """What a fixture calls is called by every test that uses the fixture."""
        self.where.append(fixturedef.argname)
        try:
            return (yield)
        finally:
            self.where.pop()

    def pytest_assertrepr_compare(self, op, left, right):
        with suppress(Exception):  # of several joined by `and`, those that hold are shown as well
            if bool(COMPARE[op](left, right)):
                return
        self.compared = op, left, right

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        self.passed &= report.passed
        if report.failed and report.when != "teardown" and not self.failure:
            try:
                self.failure = self.explain(item, call.excinfo)
            except Exception:  # what a learner's objects do when they are shown, nobody knows
                self.failure = [self.sentence(item), f"raised     {call.excinfo.typename}"]
        self.compared = None
        return report

    def explain(self, item, error):
        """Lines on the first failure: which test, the arguments, what was expected, what came."""
        copy, value = Path(self.attempt["folder"], self.attempt["lesson"]), error.value
        own = [entry for entry in error.traceback if Path(entry.path) in (copy, item.path)]
        if not own:
            return [f"{type(value).__name__}: {shorten(str(value))}"]
        node = statement(own[-1].path, own[-1].lineno + 1)
        line = shorten(ast.unparse(node).splitlines()[0]) if node else "a line that is not there"
        lines = [self.sentence(item)]
        if self.last:
            given = [f"{key} = {show(given)}" for key, given in self.last.items()
                     if key != "self" and not key.startswith("__")]  # fmt: skip
            lines.append(f"last call  {self.attempt['name']}({', '.join(given)})")
        if pair := self.pair(error, own[-1], node):
            op, left, right = pair
            texts = compared_in(node)
            if texts and op == "==" and "lesson." in texts[1] and "lesson." not in texts[0]:
                left, right = right, left
            got, expected = differing(left, right)
            if op in ("==", "<", "<=", ">", ">="):
                expected = f"{op} {expected}" if op != "==" else expected
                return [*lines, f"expected   {expected}", f"got        {got}", f"in         {line}"]
            return [*lines, f"expected   {line}", f"got        {got} against {expected}"]
        said = shorten((str(value) or "nothing more").splitlines()[0])
        if isinstance(value, AssertionError):
            return [*lines, f"expected   {line}", "got        this is not so"]
        if isinstance(value, pytest.fail.Exception):  # DID NOT RAISE
            return [*lines, f"expected   {line}", f"got        {said}"]
        raised = f"raised     {type(value).__name__}: {said}"
        return [*lines, raised, f"in         {line}"]

    def sentence(self, item):
        """test_a_b[3-4] -> a b (x = 3, y = 4)"""
        words = item.originalname.removeprefix("test_").replace("_", " ")
        case = item.callspec.params if hasattr(item, "callspec") else {}
        case = ", ".join(f"{key} = {show(value)}" for key, value in case.items())
        return f"{words}   ({case})" if case else words

    def pair(self, error, entry, node):
        """(operator, left, right) of the comparison that failed, or None."""
        for inner in error.traceback:
            values = inner.frame.f_locals
            if inner.name == "assert_close" and {"actual", "expected"} <= set(values):
                return "==", values["actual"], values["expected"]
        if not isinstance(error.value, AssertionError):
            return None
        if self.compared:
            return self.compared
        with suppress(Exception):  # torch.equal(a, b): both once more
            joined = isinstance(node.test, ast.BoolOp)
            for part in node.test.values if joined else [node.test]:
                if not entry.frame.eval(ast.unparse(part)):
                    return "==", *(entry.frame.eval(text) for text in compared_in(part))
        return None


def main():
    sys.dont_write_bytecode = True  # attempts of one second and one length would be mistaken
    out, log = (os.fdopen(os.dup(n), "w", encoding="utf-8") for n in (1, 2))  # tests capture both
    grader = Grader(json.load(sys.stdin), out, log)
    builtins.practice_call = grader.note
    lessons = {attempt["lesson"]: None for attempt in grader.attempts}
    files = [str(test_file(lesson)) for lesson in lessons]
    place = Path(grader.attempts[0]["folder"]).parent / "tmp_path"
    options = ["-p", "no:terminal", f"--basetemp={place}", "-o", "tmp_path_retention_policy=none"]
    sys.exit(pytest.main([*options, "--rootdir", str(ROOT), *files], plugins=[grader]))


if __name__ == "__main__":
    main()
