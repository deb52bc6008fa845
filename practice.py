"""Write a lesson's functions yourself; the lesson's own tests tell whether they are right.

    python practice.py                    all exercises in learning order, and which are solved
    python practice.py start nn_linear    write a copy with blank exercises to practice/
    python practice.py check nn_linear    judge your copy; without a name all that are started
    python practice.py answer nn_linear   how the lesson does it; nn_linear:linear is one function
    python practice.py run nn_linear      run your copy as a program

A name may be any part of a lesson's path that fits no other lesson. Each exercise is judged alone:
the others are put back as the lesson has them, and the tests that call it are run, slow ones last
and no longer than about 20 s.
"""

import difflib
import json
import os
import subprocess
import sys
import textwrap
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from support import exercises
from support.files import ROOT, DataError, guard, options_parser, write_whole

PRACTICE = Path(os.environ.get("NOTES_PRACTICE", ROOT / "practice"))
SECONDS = 20  # of tests for an exercise: some train for a minute on three seeds
PATIENCE = 60  # seconds, besides ten times what the lesson's own functions take
SIGNS = {"solved": "+", "wrong": "!", "unchecked": "?", "your turn": "-", "not started": ""}


# --- lessons, copies and what is known of them -------------------------------------------------


def lessons():
    """{lesson: its source} in learning order, of those that have exercises."""
    import run_all

    sources = {lesson: exercises.read(ROOT / lesson) for lesson in run_all.lessons()}
    return {lesson: source for lesson, source in sources.items() if exercises.of(source)}


def pick(name, known):
    """(lesson, function or "") that a name means; what fits none or several ends with status 2."""
    part, _, function = name.replace("\\", "/").removeprefix("practice/").partition(":")
    exact = [n for n in known if part in (n, n.removesuffix(".py"), Path(n).name, Path(n).stem)]
    fitting = exact or [n for n in known if part in n]
    if len(fitting) == 1 and (not function or function in exercises.of(known[fitting[0]])):
        return fitting[0], function
    if len(fitting) == 1:
        message = f"exercises of {fitting[0]}: {', '.join(exercises.of(known[fitting[0]]))}"
    elif fitting:
        message = f"{part!r} fits {', '.join(fitting)}"
    else:
        stems = {Path(n).stem: n for n in known}
        near = difflib.get_close_matches(part, stems, 1)
        guess = f": did you mean {near[0]}?" if near else "; python practice.py lists them"
        message = f"no lesson with exercises is called {part!r}{guess}"
    print(message, file=sys.stderr)
    sys.exit(2)


def shown(path):
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path


def read_progress():
    """What was measured and judged before, each entry with the digest of what it is about."""
    try:
        found = json.loads((PRACTICE / "progress.json").read_text(encoding="utf-8"))
        return {"calls": dict(found["calls"]), "verdicts": dict(found["verdicts"])}
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: then all is done anew
        return {"calls": {}, "verdicts": {}}


def write_progress(progress):
    with write_whole(PRACTICE / "progress.json") as beside:
        beside.write_text(json.dumps(progress, indent=1), encoding="utf-8")


def states(lesson, source, progress):
    """{exercise: (state, lines that say why, the source to judge)}. DataError for a broken copy."""
    asked, path = exercises.of(source), PRACTICE / lesson
    if not path.exists():
        return dict.fromkeys(asked, ("not started", [], ""))
    mine = exercises.read(path)
    try:
        own = exercises.functions(mine)
    except (SyntaxError, ValueError) as error:  # a zero byte is a ValueError
        text = (getattr(error, "text", "") or "").strip()
        line = getattr(error, "lineno", None) or 1
        raise DataError(f"{shown(path)}, line {line}: {error.args[0]}: {text}") from error
    if gone := [name for name in asked if name not in own]:
        raise DataError(
            f"{shown(path)} lacks {gone[0]}: put {exercises.signature(asked[gone[0]])} back"
        )
    found = {}
    for name, node in asked.items():
        judged, lines = exercises.alone(mine, source, name), []
        key, before = progress["verdicts"].get(f"{lesson}:{name}", ("", []))
        if all(map(exercises.is_blank, exercises.body(own[name]))):
            state, lines = (
                "your turn",
                [f"{shown(path)}, line {exercises.body(own[name])[0].lineno}"],
            )
        elif exercises.signature(own[name]) != exercises.signature(node):
            state, lines = "wrong", [f"the lesson calls it as {exercises.signature(node)}"]
        elif key == exercises.digest(judged, exercises.test_of(lesson)):
            state, lines = "wrong" if before else "solved", before
        else:
            state = "unchecked"
        found[name] = state, lines, judged
    return found


# --- the commands ------------------------------------------------------------------------------


def show_list(known):
    progress, count, solved = read_progress(), 0, 0
    print("+ solved   - your turn   ! wrong   ? changed since its check   no sign: not started")
    for lesson, source in known.items():
        try:
            found, broken = states(lesson, source, progress), ""
        except DataError as error:
            found = dict.fromkeys(exercises.of(source), ("your turn", [], ""))
            broken = f"   {error}"
        done = sum(state == "solved" for state, *_ in found.values())
        print(f"{lesson}   {done} of {len(found)}{broken}")
        names = " ".join(SIGNS[state] + name for name, (state, *_) in found.items())
        print(textwrap.fill(names, 96, initial_indent="    ", subsequent_indent="    "))
        count, solved = count + len(found), solved + done
    print(f"{solved} of {count} exercises in {len(known)} lessons are solved")
    return 0


def start(known, name, again):
    lesson, _ = pick(name, known)
    path = PRACTICE / lesson
    if path.exists() and not again:
        raise DataError(f"{shown(path)} is there; --again would replace it by a blank one")
    with write_whole(path) as beside:
        beside.write_text(exercises.blanked(known[lesson]), encoding="utf-8")
    own = exercises.functions(exercises.read(path))
    print(f"{shown(path)} is yours. Write the body of")
    for name in exercises.of(known[lesson]):
        print(f"   line {exercises.body(own[name])[0].lineno:3}   {exercises.signature(own[name])}")
    print(f"then: python practice.py check {Path(lesson).stem}")
    return 0


def soon_done(tests):
    """Of {test: seconds} the first ones, as many as take SECONDS in all; one at least."""
    ends = accumulate(tests.values())
    return dict(
        row for row, end in zip(tests.items(), ends, strict=True) if end < SECONDS or row[1] == end
    )


def check(known, name):
    """A line an exercise, below it why it is wrong. Status 1 while one is open."""
    progress = read_progress()
    chosen = [pick(name, known)[0]] if name else [n for n in known if (PRACTICE / n).exists()]
    if not chosen or not (PRACTICE / chosen[0]).exists():
        raise DataError(f"not started: python practice.py start {Path([*chosen, *known][0]).stem}")
    rows, broken = [], []
    for lesson in chosen:
        try:
            found = states(lesson, known[lesson], progress)
            rows += [(lesson, exercise, *found[exercise]) for exercise in found]
        except DataError as error:
            broken.append(str(error))
    todo = {lesson: known[lesson] for lesson, _, state, *_ in rows if state == "unchecked"}
    shape = {"unit": " tests", "leave": False, "delay": 3, "disable": None}
    with tqdm(desc="which test calls what", **shape) as bar:
        calls = exercises.calls_of(todo, progress["calls"], bar)
    tries = {}
    for lesson, exercise, state, _, source in rows:
        if state == "unchecked" and (tests := soon_done(calls[lesson][exercise])):
            limit = PATIENCE + 10 * sum(tests.values())
            one = exercises.attempt(lesson, source, [exercise], list(tests), limit)
            tries[lesson, exercise] = one
    last, solved = "", 0
    try:
        with tqdm(total=sum(len(one["tests"]) for one in tries.values()), **shape) as bar:
            verdicts = exercises.judge(tries.values(), bar)
            for lesson, exercise, state, lines, source in rows:
                if (lesson, exercise) in tries:
                    lines = next(verdicts)["failure"] or []
                    state = "wrong" if lines else "solved"
                    key = exercises.digest(source, exercises.test_of(lesson))
                    progress["verdicts"][f"{lesson}:{exercise}"] = key, lines
                elif state == "unchecked":
                    lines = ["no test that calls it passes here, not even with the lesson's own"]
                if lesson != last:
                    tqdm.write(last := lesson)
                tqdm.write(f"   {exercise:<30} {state:<10} {(lines or [''])[0]}".rstrip())
                for line in lines[1:]:
                    tqdm.write(f"      {line}")
                solved += state == "solved"
    finally:
        write_progress(progress)
    print(*broken, f"{solved} of {len(rows)} solved", sep="\n")
    return int(bool(broken) or solved < len(rows))


def answer(known, name):
    lesson, function = pick(name, known)
    for exercise, node in exercises.of(known[lesson]).items():
        if function in ("", exercise):
            print(f"# {exercise}: {lesson}, line {node.lineno}")
            print(textwrap.dedent(exercises.text_of(known[lesson], node)))
    return 0


def run(known, name):
    path = PRACTICE / pick(name, known)[0]
    if not path.exists():
        raise DataError(f"not started: python practice.py start {path.stem}")
    environment = os.environ | {"PYTHONPATH": exercises.path_with_root()}
    return subprocess.run([sys.executable, "-P", path], env=environment).returncode


def main(command=None, name=None, again=False):
    known = lessons()
    if command == "start":
        return start(known, name, again)
    if command:
        return {"check": check, "answer": answer, "run": run}[command](known, name)
    return show_list(known)


def parse(argv=None):
    parser = options_parser()
    commands = parser.add_subparsers(dest="command", metavar="start, check, answer, run")
    for command in ("start", "check", "answer", "run"):
        its = commands.add_parser(command)
        its.add_argument("name", nargs="?" if command == "check" else None)
        if command == "start":
            its.add_argument("--again", action="store_true", help="replace an old copy")
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    guard(main, parse)
