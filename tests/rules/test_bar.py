"""Every one of the forty tests of the chaos suite is there, or it is said plainly why not."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
EXCUSE = re.compile(r"^Not (yet|as such|on a cluster): .{20,}")


def rows(text: str) -> dict[int, str]:
    return {int(number): where for number, _, where in ROW.findall(text)}


@pytest.fixture(scope="module")
def table(root: Path) -> dict[int, str]:
    return rows((root / "tests" / "chaos" / "README.md").read_text(encoding="utf-8"))


def test_all_forty_are_listed(table: dict[int, str]) -> None:
    assert sorted(table) == list(range(1, 41))
    assert [
        number for number, text in table.items() if not TEST.search(text) and not EXCUSE.match(text)
    ] == []


def test_the_tests_that_are_named_exist(table: dict[int, str], test_modules: list[Any]) -> None:
    there = {
        (item.path, node.name)
        for item in test_modules
        for node in item.tree.body
        if isinstance(node, ast.FunctionDef)
    }
    named = {(path, name) for text in table.values() for path, name in TEST.findall(text)}
    assert named - there == set()


def test_marks_and_table_agree(table: dict[int, str], test_modules: list[Any]) -> None:
    """A test that says which number it is stands in that row."""
    found = 0
    for item in test_modules:
        if not item.path.startswith("tests/chaos/"):
            continue
        for node in item.tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in numbers(node):
                    found += 1
                    assert f"`{item.path}::{node.name}`" in table[number], (number, node.name)
    assert found > 15


def numbers(test: ast.FunctionDef) -> set[int]:
    """What `pytest.mark.bar` says of it, literally."""
    return {
        int(argument.value)
        for decorator in test.decorator_list
        for node in ast.walk(decorator)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.bar"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }


def test_a_planted_gap_is_found() -> None:
    assert rows("| 1 | a | `tests/x.py::test_a` |\n| 2 | b | Later |") == {
        1: "`tests/x.py::test_a`",
        2: "Later",
    }
    assert not EXCUSE.match("Later") and not EXCUSE.match("Not yet: no")
