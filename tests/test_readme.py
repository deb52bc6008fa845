"""README.md and README_CN.md tell the same: lessons, commands, numbers, links that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md")
}
ROW = re.compile(r"^\| \[(?P<name>[^\]]+)\]\((?P<path>[^)]+)\) \|(?P<rest>.+)\|$", re.MULTILINE)
NUMBER = re.compile(r"\d[\d,.]*\d|\d")


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


@pytest.mark.parametrize("name", READMES)
def test_every_lesson_in_the_tree_has_a_row_in_learning_order(name, load):
    assert list(rows(READMES[name])) == load("run_all.py").lessons()


@pytest.mark.parametrize("name", READMES)
def test_every_row_names_its_file_and_has_three_more_cells(name):
    for match in ROW.finditer(READMES[name]):
        assert match["name"] == match["path"].rpartition("/")[2]
        cells = [cell.strip() for cell in match["rest"].split("|")]
        assert len(cells) == 3 and all(cells), match["path"]


def test_both_have_the_same_commands():
    english, chinese = READMES.values()
    assert code_blocks(english) == code_blocks(chinese)
    assert sorted(inline_commands(english)) == sorted(inline_commands(chinese))


def test_both_have_the_same_numbers_in_every_row():
    english, chinese = (rows(text) for text in READMES.values())
    for path in english:
        numbers = [sorted(NUMBER.findall(table[path])) for table in (english, chinese)]
        assert numbers[0] == numbers[1], path


@pytest.mark.parametrize("name", READMES)
def test_links_and_pictures_exist(name):
    for target in re.findall(r"\]\(([^)#]+)\)", READMES[name]):
        assert target.startswith("http") or (ROOT / target).is_file(), target


def test_both_have_the_same_pictures_headings_and_numbers():
    english, chinese = READMES["README.md"], READMES["README_CN.md"].partition("## 术语对照")[0]
    english = english.partition("## Licence")[0]
    for pattern in (r"!\[", r"^#{2,3} ", r"^\|"):
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert counts[0] == counts[1], pattern
    assert sorted(NUMBER.findall(english)) == sorted(NUMBER.findall(chinese))


def test_the_workflow_and_ci_run_the_readmes_own_commands():
    tests = next(code for code in code_blocks(READMES["README.md"]) if "pytest" in code).strip()
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert all(f"run: {half}" in workflow for half in tests.split(" && "))
