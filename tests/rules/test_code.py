"""Sizes, names and words that the code keeps to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils", "util", "common", "core", "base", "helpers", "misc"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
HOMES = re.compile(r"/(?:home|root|Users|work)/\w")


def test_files_are_short(modules: list[Any], test_modules: list[Any]) -> None:
    sizes = {item.path: item.text.count("\n") for item in [*modules, *test_modules]}
    assert {path: size for path, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_functions_are_short(modules: list[Any], test_modules: list[Any]) -> None:
    long = {
        f"{item.path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for item in [*modules, *test_modules]
        for node in ast.walk(item.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_init_files_hold_a_docstring_only(modules: list[Any]) -> None:
    """So importing one module never drags in its neighbours, and no cycle can hide."""
    code = [
        item.path
        for item in modules
        if item.path.endswith("__init__.py")
        and (ast.get_docstring(item.tree) is None or len(item.tree.body) != 1)
    ]
    assert code == []


def test_names_say_what_is_inside(modules: list[Any], test_modules: list[Any]) -> None:
    paths = [Path(item.path) for item in [*modules, *test_modules]]
    assert [path for path in paths if VAGUE_NAMES & {path.stem, path.parent.name}] == []


def unsafe(tree: ast.Module) -> Iterator[str]:
    """Constructs that run foreign text or bytes, hide behind -O, or share state unseen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
            yield node.module
        elif isinstance(node, ast.Assert):
            yield f"assert on line {node.lineno}"
        elif isinstance(node, ast.Global):
            yield f"global on line {node.lineno}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE_CALLS or name in ("torch.load", "os.system"):
                yield f"{name}() on line {node.lineno}"
            yield from (
                f"shell=True on line {node.lineno}" for item in node.keywords if item.arg == "shell"
            )


def test_nothing_unsafe_in_the_rooms(modules: list[Any]) -> None:
    found = {item.path: list(unsafe(item.tree)) for item in modules}
    assert {path: texts for path, texts in found.items() if texts} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "exec(text)",
        "assert value > 0",
        "torch.load(path)",
        "subprocess.run(text, shell=True)",
        "def f():\n    global count",
    ],
)
def test_a_planted_construct_is_found(source: str) -> None:
    assert len(list(unsafe(ast.parse(source)))) == 1


def test_nobody_imports_tests(modules: list[Any], test_modules: list[Any]) -> None:
    """Tests share through fixtures."""
    users = [
        item.path
        for item in [*modules, *test_modules]
        for node in ast.walk(item.tree)
        if isinstance(node, ast.ImportFrom)
        and (node.level > 0 or (node.module or "").partition(".")[0] in ("tests", "conftest"))
        and (item.room == "tests" or node.level == 0)
    ]
    assert users == []


def test_no_file_names_a_home_folder(
    root: Path, modules: list[Any], test_modules: list[Any], documents: dict[str, str]
) -> None:
    texts = {item.path: item.text for item in [*modules, *test_modules]} | documents
    for name in ("Makefile", "pyproject.toml"):
        texts[name] = (root / name).read_text(encoding="utf-8")
    found = {path: match[0] for path, text in texts.items() if (match := HOMES.search(text))}
    assert found == {}
