"""README.md and README_CN.md tell the same, and what they say of the files is so."""

import re
from inspect import signature
from pathlib import Path

import pytest

from support.drawings import CLASSES, SIZE, write_shapes10

ROOT = Path(__file__).resolve().parents[1]
READMES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md")
}
ROW = re.compile(r"^\| \[(?P<name>[^\]]+)\]\((?P<path>[^)]+)\) \|(?P<rest>.+)\|$", re.MULTILINE)
INDEX = re.compile(
    r"^\| (?P<question>[^|]+) \| \[(?P<name>[^\]]+)\]\((?P<path>[^)]+)\) \| (?P<section>\d+) "
    r"\| `(?P<code>[^`|]+)` \|$",
    re.MULTILINE,
)
NUMBER = re.compile(r"\d[\d,.]*\d|\d")

each = pytest.mark.parametrize("name", READMES)


def rows(text):
    return {match["path"]: match["rest"] for match in ROW.finditer(text)}


def code_blocks(text):
    return re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def inline_commands(text):
    return [
        code
        for code in re.findall(r"`([^`\n]+)`", text)
        if re.match(r"python |--|tensorboard", code)
    ]


def anchors(text):
    """The names that GitHub gives to the headings: lower case, no punctuation, - for a space."""
    bare = re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", bare, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(source, number):
    """What stands under the banner of a section; the whole source where only a title is printed."""
    banner = rf"^# --- {number}\. .*?(?=^# --- |\Z)"
    if found := re.search(banner, source, re.MULTILINE | re.DOTALL):
        return found[0]
    return source if f'"{number}. ' in source else ""


# --- each of the two ---------------------------------------------------------------------------


@each
def test_every_lesson_in_the_tree_has_a_row_in_learning_order(name, load):
    assert list(rows(READMES[name])) == load("run_all.py").lessons()


@each
def test_every_row_names_its_file_and_has_four_more_cells_of_at_most_160_characters(name):
    for match in ROW.finditer(READMES[name]):
        assert match["name"] == match["path"].rpartition("/")[2]
        cells = [cell.strip() for cell in match["rest"].split("|")]
        assert len(cells) == 4 and all(cells), match["path"]
        assert max(map(len, cells)) <= 160, match["path"]
        assert re.fullmatch(r"\d+|–", cells[-1]), match["path"]


@each
def test_no_cell_of_any_table_is_longer_than_160_characters(name):
    for line in re.findall(r"^ *\|.*\|$", READMES[name], re.MULTILINE):
        assert all(len(cell.strip()) <= 160 for cell in line.split("|")), line


@each
def test_the_index_names_twenty_sections_that_are_there_and_what_to_look_for_in_them(name):
    found = list(INDEX.finditer(READMES[name]))
    assert len(found) == 20 and len({match["question"] for match in found}) == 20
    for match in found:
        source = (ROOT / match["path"]).read_text(encoding="utf-8")
        assert match["name"] == match["path"].rpartition("/")[2]
        assert match["code"] in section(source, match["section"]), match["question"]


@each
def test_links_anchors_and_pictures_exist(name):
    for target in re.findall(r"\]\(([^)]+)\)", READMES[name]):
        path, _, anchor = target.partition("#")
        if target.startswith("#"):
            assert anchor in anchors(READMES[name]), target
        else:
            outside = path.startswith(("https://", "../../actions/"))  # GitHub's own pages
            assert outside or (ROOT / path).is_file(), target


@each
def test_the_contents_name_every_heading(name):
    contents = READMES[name].split("\n## ")[1]
    linked = set(re.findall(r"\]\(#([^)]+)\)", contents))
    assert linked == anchors("\n## ".join(["", *READMES[name].split("\n## ")[2:]]))


@each
def test_every_picture_is_small_is_shown_and_has_words_under_it(name):
    shown = set(re.findall(r"^!\[[^\]]+\]\(assets/([^)]+)\)$", READMES[name], re.MULTILINE))
    assert shown == {path.name for path in (ROOT / "assets").iterdir()}
    for picture in shown:
        path = ROOT / "assets" / picture
        assert path.stat().st_size <= 60_000
        assert path.read_bytes().startswith(b"\x89PNG")
    captions = re.findall(r"\(assets/[^)]+\)\n\n\*[^*]+\*$", READMES[name], re.MULTILINE)
    assert len(captions) == len(shown) - 1  # the one on top stands over the first sentence


# --- both alike --------------------------------------------------------------------------------


def test_both_have_the_same_commands():
    english, chinese = READMES.values()
    assert code_blocks(english) == code_blocks(chinese)
    assert sorted(inline_commands(english)) == sorted(inline_commands(chinese))


def test_both_have_the_same_numbers_in_every_row():
    english, chinese = (rows(text) for text in READMES.values())
    for path in english:
        numbers = [sorted(NUMBER.findall(table[path])) for table in (english, chinese)]
        assert numbers[0] == numbers[1], path


def test_both_ask_for_the_same_sections():
    english, chinese = (
        [match.group("path", "section", "code") for match in INDEX.finditer(text)]
        for text in READMES.values()
    )
    assert english == chinese


def test_both_have_the_same_pictures_headings_tables_and_numbers():
    english, chinese = READMES["README.md"], READMES["README_CN.md"].partition("## 术语对照")[0]
    english = english.partition("## Licence")[0]
    for pattern in (r"!\[", r"^#{2,3} ", r"^ *\|", r"^ *(?:-|\d\.) "):
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert counts[0] == counts[1], pattern
    assert sorted(NUMBER.findall(english)) == sorted(NUMBER.findall(chinese))


# --- what they say of the project --------------------------------------------------------------


def test_the_workflow_and_ci_run_the_readmes_own_commands():
    tests = next(code for code in code_blocks(READMES["README.md"]) if "pytest" in code).strip()
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert all(f"run: {half}" in workflow for half in tests.split(" && "))


@each
def test_what_they_say_of_shapes_10_is_so(name):
    sizes = signature(write_shapes10).parameters
    text = re.search(r"^Shapes-10 .+?\n\n", READMES[name], re.MULTILINE | re.DOTALL)[0]
    for number in (sizes["train"].default, sizes["test"].default):
        assert f"{number:,}" in text and f"{number // len(CLASSES):,}" in text
    assert f"{SIZE}×{SIZE}" in text
    if name == "README.md":
        assert f"*Shapes-10: {', '.join(CLASSES)}.*" in READMES[name]


@each
def test_scripts_and_options_that_they_name_exist(name):
    blocks = " ".join(code_blocks(READMES[name])) + " ".join(inline_commands(READMES[name]))
    for script in re.findall(r"python ([\w/]+\.py)", blocks):
        if script != "file.py":
            assert (ROOT / script).is_file(), script
    for script, options in re.findall(
        r"python ([\w/]+\.py)((?: (?:--[\w-]+)(?: [\w.]+)?)+)", READMES[name]
    ):
        source = (ROOT / script).read_text(encoding="utf-8")
        if script.startswith("train"):
            source += (ROOT / "support" / "options.py").read_text(encoding="utf-8")
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, (script, option)


@each
def test_counts_and_statuses_are_those_of_the_project(name, load):
    text = READMES[name]
    assert re.search(rf"^{len(load('run_all.py').lessons())} ", text, re.MULTILINE)
    statuses = re.findall(r"^\| (\d+) \| [^|]+ \|$", text, re.MULTILINE)
    assert statuses == ["0", "1", "2", "130"]
    source = (ROOT / "support" / "files.py").read_text(encoding="utf-8")
    assert all(f"quit_with({status}" in source for status in (1, 130))
    wheels = set(re.findall(r"`(cu\d+)`", text))
    assert wheels <= set(load("Console.py").WHEELS.values()) and len(wheels) == 3


@each
def test_the_total_time_is_that_of_the_rows(name):
    seconds = [cells.rpartition("|")[2].strip() for cells in rows(READMES[name]).values()]
    total = sum(int(cell) for cell in seconds if cell.isdigit()) / 60
    minutes = int(re.search(r"(\d+) (?:minutes|分钟)", READMES[name])[1])
    assert abs(total - minutes) < 1.5


@each
def test_the_example_of_practice_is_what_it_prints(name, load, tmp_path, monkeypatch, capsys):
    example = next(code for code in code_blocks(READMES[name]) if "practice.py start" in code)
    practice = load("practice.py")
    monkeypatch.setattr(practice, "PRACTICE", tmp_path)
    practice.start(practice.lessons(), "nn_linear", again=False)
    exercises = capsys.readouterr().out.splitlines()[1:]  # the first line names the folder
    assert "\n".join(exercises) in example
    open_ones = re.findall(
        r"^   (\w+) +your turn +practice/nn_linear.py, line (\d+)$", example, re.M
    )
    assert open_ones
    for exercise, line in open_ones:
        assert f"   line {line:>3}   {exercise}(" in example
