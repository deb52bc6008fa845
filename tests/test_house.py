"""What holds for every lesson at once: its form, its imports, its paths, its own test."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "training_engineering", "loss_functions", "model_architecture", "peft",
    "generative_models", "evaluation_inference", "multimodal",
)  # fmt: skip
NO_LESSON = {"practice.py", "run_all.py"}
LESSONS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", *(f"{folder}/*.py" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
    if path.name not in NO_LESSON
)
LOGS_NOTHING = {"model.py", "generate_labels.py", "Console.py"}
PACKAGES = {"torch", "torchvision", "tensorboard", "numpy", "PIL", "tqdm"}
MAY_IMPORT = {  # of the project's own; what is not named here may import model and support
    "model.py": {"support"},
    "train_gpu_1.py": {"model", "support", "train"},
    "train_gpu_2.py": {"model", "support", "train"},
}

each_lesson = pytest.mark.parametrize("lesson", LESSONS)


def tree_of(lesson):
    return ast.parse((ROOT / lesson).read_text(encoding="utf-8"))


def imported(tree):
    """The top-level names of all modules that a script imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_file(lesson):
    folder, _, name = lesson.rpartition("/")
    return ROOT / "tests" / folder / f"test_{name}"


test_file.__test__ = False


@each_lesson
def test_lesson_has_the_four_labels_a_main_and_a_guard(lesson):
    tree = tree_of(lesson)
    doc = ast.get_docstring(tree)
    for label in ("Checked here", "TensorBoard", "Try", "Source"):
        assert re.search(rf"^{label}  +\S", doc, re.MULTILINE), label
    main = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    defaults = dict(
        zip([a.arg for a in main.args.args][::-1], main.args.defaults[::-1], strict=False)
    )
    assert defaults["seed"].value == 0
    assert ("log_dir" in defaults) == (lesson not in LOGS_NOTHING)
    assert "__main__" in ast.unparse(tree.body[-1].test)


@each_lesson
def test_lesson_imports_in_silence(lesson, load, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = lesson.removesuffix(".py")
    for key in (name, "notes_" + name.replace("/", "_")):
        monkeypatch.delitem(sys.modules, key, raising=False)
    module = load(lesson)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    if lesson not in LOGS_NOTHING:
        assert ROOT / "runs" / name == module.LOG_DIR


@each_lesson
def test_lesson_imports_only_what_the_house_allows(lesson):
    own = MAY_IMPORT.get(lesson, set() if "/" in lesson else {"model", "support"})
    assert set(imported(tree_of(lesson))) <= sys.stdlib_module_names | PACKAGES | own


@each_lesson
def test_lesson_stands_on_its_own_path(lesson):
    source = (ROOT / lesson).read_text(encoding="utf-8")
    for forbidden in ("cwd()", "chdir(", "sys.path", "\\\\"):
        assert forbidden not in source or (lesson, forbidden) == ("Console.py", "sys.path")
    if lesson not in LOGS_NOTHING:
        assert "__file__" in source


PROGRAMS = sorted([*LESSONS, *NO_LESSON, *(f"support/{p.name}" for p in ROOT.glob("support/*.py"))])


@pytest.mark.parametrize("path", PROGRAMS)
def test_what_may_be_printed_is_ascii(path):
    """Docstrings may hold other characters, save their first line, which --help prints."""
    tree = tree_of(path)
    scopes = [n for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list)]
    docs = {id(n.body[0].value) for n in scopes if n.body and isinstance(n.body[0], ast.Expr)}
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
    assert [n.value for n in texts if isinstance(n.value, str) and not n.value.isascii()] == []
    assert (ast.get_docstring(tree) or "").partition("\n")[0].isascii()


def test_draw_is_the_same_wherever_it_is_written():
    """Lessons stand alone, so that the few lines which write curves are in several of them."""
    written = {
        ast.unparse(node)
        for lesson in LESSONS
        for node in tree_of(lesson).body
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.args) == "log_dir, curves"
    }
    assert len(written) == 1


def test_guard_is_the_same_in_every_lesson_that_stands_alone():
    in_folders = [lesson for lesson in LESSONS if "/" in lesson]
    written = {
        lesson: ast.unparse(node)
        for lesson in in_folders
        for node in tree_of(lesson).body
        if isinstance(node, ast.FunctionDef) and node.name == "guard"
    }
    assert list(written) == in_folders and len(set(written.values())) == 1


SUPPORT = {  # who may import whom within support/: one way, few steps
    "files.py": set(),
    "drawings.py": {"files"},
    "data.py": {"files", "drawings"},
    "pictures.py": set(),
    "checkpoints.py": {"files"},
    "options.py": {"files", "checkpoints"},
    "expressions.py": {"files"},
    "exercises.py": {"files"},
    "__init__.py": set(),
}


@pytest.mark.parametrize("path", sorted((ROOT / "support").glob("*.py")), ids=lambda p: p.name)
def test_support_is_imported_one_way(path):
    tree, used = tree_of(f"support/{path.name}"), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "support":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("support."):
            used.add(node.module.partition(".")[2])
    assert used <= SUPPORT[path.name]
    assert set(imported(tree)) <= sys.stdlib_module_names | PACKAGES | {"support"}


@each_lesson
def test_lesson_has_a_test_that_runs_its_main(lesson):
    source = test_file(lesson).read_text(encoding="utf-8")
    assert f'"{lesson}"' in source
    assert re.search(r"\bmain\(", source)


def test_every_test_file_has_its_lesson():
    house = {"test_house.py", "test_readme.py", "test_run_all.py", "test_practice.py"}
    found = {
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if path.name not in house and path.parent.name != "support"
    }
    assert found == {test_file(lesson) for lesson in LESSONS}


def test_run_all_knows_every_lesson_in_the_tree(load):
    assert sorted(load("run_all.py").lessons()) == LESSONS
