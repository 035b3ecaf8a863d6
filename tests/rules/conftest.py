"""The repository as the rules see it: its Python files, parsed, and its documents."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOMS = ("controller", "kernels", "protos", "workers")


@dataclass(frozen=True)
class Module:
    """A Python file: its path in the repository, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The top folder."""
        return self.path.partition("/")[0]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[2]


def _modules(root: Path, folders: tuple[str, ...]) -> list[Module]:
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    generated = [root / "protos" / package for package in ("kserve", "v1")]
    kept = [path for path in files if path.parent not in generated]
    texts = [path.read_text(encoding="utf-8") for path in kept]
    return [
        Module(str(path.relative_to(root)), text, ast.parse(text))
        for path, text in zip(kept, texts, strict=True)
    ]


@pytest.fixture(scope="session")
def modules(root: Path) -> list[Module]:
    """Every module of the rooms, generated ones left out."""
    return _modules(root, ROOMS)


@pytest.fixture(scope="session")
def test_modules(root: Path) -> list[Module]:
    """Every module of the tests."""
    return _modules(root, ("tests",))


@pytest.fixture(scope="session")
def documents(root: Path) -> dict[str, str]:
    """Path to text of every Markdown file, in the order of paths."""
    folders = [root / name for name in (*ROOMS, "tests", "deploy")]
    files = [*root.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in sorted(files)}
