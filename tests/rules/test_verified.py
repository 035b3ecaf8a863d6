"""The table of families is what the tests have written down, for the families that there are."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from phalanx.controller.model import families_document
from phalanx.workers.models.families import FAMILIES
from phalanx.workers.models.verified import EVERYWHERE, GGUF, records, verified


def compared(test_modules: list[Any], file: str) -> tuple[set[str], list[int]]:
    """The configurations and TP sizes over which a test module is parametrised."""
    (tree,) = (item.tree for item in test_modules if item.path == f"tests/parity/{file}")
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MODELS":
            assert isinstance(node.value, ast.Dict)
            found["MODELS"] = {ast.literal_eval(key) for key in node.value.keys if key is not None}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TP_SIZES":
            found["TP_SIZES"] = list(ast.literal_eval(node.value))
    return found["MODELS"], found["TP_SIZES"]


def test_the_record_lists_what_is_compared(test_modules: list[Any]) -> None:
    """Else run `make families`."""
    folders, sizes = compared(test_modules, "test_families.py")
    files, gguf_sizes = compared(test_modules, "test_gguf_families.py")
    found = records()
    assert set(found) == folders | {f"{name} ({GGUF})" for name in files}
    for name, record in found.items():
        wanted = {GGUF} if name.endswith(f"({GGUF})") else set(EVERYWHERE)
        assert wanted <= set(record["features"]), name
        for seen in record["features"].values():
            assert seen == (gguf_sizes if wanted == {GGUF} else sizes), name


def test_every_family_was_compared_in_each_of_its_kinds() -> None:
    for name, features in verified().items():
        kinds = {"safetensors"} | ({GGUF} & set(features))
        assert kinds == set(FAMILIES[name].kinds), name
        assert set(EVERYWHERE) <= set(features), name


def test_the_document_is_made_of_the_record(root: Path) -> None:
    """Else run `make families`."""
    committed = (root / "workers" / "FAMILIES.md").read_text(encoding="utf-8")
    assert committed == families_document() + "\n"
    assert len([line for line in committed.splitlines() if line.startswith("| ")]) == (
        len(FAMILIES) + 2
    )
