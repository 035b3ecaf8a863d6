"""What the documents say is checked: commands, flags, targets, settings, code and links."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prometheus_client import Histogram

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
METRIC = re.compile(r"\bphalanx_[a-z_]+(?<!_)\b(?![:*])")
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    path: str
    language: str
    text: str


def blocks(documents: dict[str, str], *languages: str) -> list[Block]:
    """The blocks in these languages."""
    return [
        Block(path, match[1], match[2])
        for path, text in documents.items()
        for match in FENCE.finditer(text)
        if match[1] in languages
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command after a prompt, continued lines joined, pipes taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            words = shlex.split(line[2:], comments=True)
            while words:
                end = next((at for at, word in enumerate(words) if word in ("|", "&&", "&")), None)
                yield words if end is None else words[:end]
                words = [] if end is None else words[end + 1 :]


@pytest.fixture(scope="module")
def subcommands() -> dict[str, set[str]]:
    """Subcommand of `phalanx` to its flags."""
    from phalanx.controller.cli import app

    def flags(command: Any) -> set[str]:
        """Of its own subcommands, too."""
        own = {flag for item in command.params for flag in (*item.opts, *item.secondary_opts)}
        return own.union(*map(flags, getattr(command, "commands", {}).values()))

    group = typer.main.get_command(app)
    return {
        name: flags(command) | {"--help", "-h"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def wrong_words(words: list[str], known: dict[str, set[str]], targets: set[str]) -> list[str]:
    """What does not exist in a command of ours; nothing for other commands."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    name = words[0].rpartition("/")[2] if words else ""
    if name == "make":
        return [word for word in words[1:] if "=" not in word and word not in targets]
    if name != "phalanx":
        return []
    if len(words) == 1 or words[1] in ("--help", "--version"):
        return []
    if words[1] not in known:
        return [words[1]]
    flags = [word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)]
    return [flag for flag in flags if flag not in known[words[1]]]


@pytest.fixture(scope="module")
def targets(root: Path) -> set[str]:
    """Targets of the Makefile."""
    return set(TARGET.findall((root / "Makefile").read_text(encoding="utf-8")))


def test_console_blocks_name_real_commands(
    documents: dict[str, str], subcommands: dict[str, set[str]], targets: set[str]
) -> None:
    found = [
        f"{block.path}: {' '.join(words)}: no such {wrong}"
        for block in blocks(documents, "console", "sh", "bash", "shell")
        for words in commands(block.text)
        for wrong in wrong_words(words, subcommands, targets)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("$ phalanx serve smollm2 --tp 2 --port=0", []),
        ("$ phalanx serve smollm2 --tensor-parallel 2", ["--tensor-parallel"]),
        ("$ cat story.txt | phalanx generat -", ["generat"]),
        ("$ make demo && .venv/bin/phalanx stats", ["stats"]),
        ("$ make deploy TP=2", ["deploy"]),
        ("$ ls # phalanx nothing", []),
    ],
)
def test_a_planted_command_is_found(
    line: str, wrong: list[str], subcommands: dict[str, set[str]], targets: set[str]
) -> None:
    found = [word for words in commands(line) for word in wrong_words(words, subcommands, targets)]
    assert found == wrong


def test_examples_in_the_help_are_real(subcommands: dict[str, set[str]]) -> None:
    from phalanx.controller.cli import app

    group = typer.main.get_command(app)
    texts = [group.help or "", *(item.help or "" for item in group.commands.values())]  # type: ignore[attr-defined]
    examples = re.findall(r"\[bold\](.+?)\[/bold\]", "\n".join(texts))
    lines = [line for line in examples if "phalanx" in line]
    assert len(lines) >= len(subcommands)
    found = [
        f"{line}: {word}"
        for line in lines
        for words in commands(f"$ {line}")
        for word in wrong_words(words, subcommands, set())
    ]
    assert found == []


def test_python_blocks_name_what_exists(documents: dict[str, str]) -> None:
    """They compile as they stand (also with a bare `await`), and every name that they import
    from phalanx is there."""
    for block in blocks(documents, "python", "py"):
        if EXCERPT.match(block.text):
            continue
        tree = compile(
            block.text,
            block.path,
            "exec",
            flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phalanx."):
                module = importlib.import_module(node.module or "")
                missing = [item.name for item in node.names if not hasattr(module, item.name)]
                assert missing == [], f"{block.path}: {node.module}"


EXCERPT = re.compile(r"# ([a-z_]+/[\w/]+\.py)\n")


def missing_lines(root: Path, block: Block) -> list[str]:
    """Of an excerpt, the runs of lines that its file lacks; "..." stands between runs."""
    head = EXCERPT.match(block.text)
    if head is None:
        return []
    runs = re.split(r"^\.\.\.\n", block.text[head.end() :], flags=re.MULTILINE)
    file = "\n" + (root / head[1]).read_text(encoding="utf-8")
    return [run for run in runs if "\n" + run not in file]


def test_excerpts_are_in_their_files(root: Path, documents: dict[str, str]) -> None:
    found = [block for block in blocks(documents, "python") if EXCERPT.match(block.text)]
    assert len(found) >= 4
    assert [run for block in found for run in missing_lines(root, block)] == []


def test_a_planted_excerpt_is_found(root: Path) -> None:
    text = "# workers/models/chatglm.py\n_FIELDS = {\n...\n_FIELD = {\n"
    assert missing_lines(root, Block("a.md", "python", text)) == ["_FIELD = {\n"]


def test_toml_blocks_and_files_name_real_settings(root: Path, documents: dict[str, str]) -> None:
    from phalanx.controller.config import RULES

    texts = {block.path: block.text for block in blocks(documents, "toml")}
    texts |= {
        str(path): path.read_text(encoding="utf-8") for path in (root / "deploy").rglob("*.toml")
    }
    for path, text in texts.items():
        assert set(tomllib.loads(text)) - set(RULES) == set(), path


def _anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as code hosts make them."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_links_lead_somewhere(root: Path, documents: dict[str, str]) -> None:
    broken = []
    for path, text in documents.items():
        for link in LINK.findall(FENCE.sub("", text)):
            if re.match(r"[a-z]+:", link):
                continue
            place, _, anchor = link.partition("#")
            target = (root / path).parent / place if place else root / path
            missing = not target.exists()
            if missing or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
                broken.append(f"{path}: {link}")
    assert broken == []


def test_metrics_in_documents_and_dashboards_are_on_the_page(
    root: Path, documents: dict[str, str]
) -> None:
    from phalanx.controller.metrics import TABLE

    on_page = {row.page_name for row in TABLE}
    for row in TABLE:
        if row.kind is Histogram:
            on_page |= {f"{row.page_name}_{part}" for part in ("bucket", "sum", "count")}
    watched = [path for kind in ("*.yaml", "*.json") for path in (root / "deploy").rglob(kind)]
    texts = documents | {str(path): path.read_text(encoding="utf-8") for path in watched}
    found = {path: set(METRIC.findall(text)) - on_page for path, text in texts.items()}
    assert {path: names for path, names in found.items() if names} == {}
    assert len(METRIC.findall(documents["README.md"])) >= 5


def test_the_readme_is_there_and_shows_how_to_begin(documents: dict[str, str]) -> None:
    shown = [words for block in blocks(documents, "console") for words in commands(block.text)]
    assert any(words[0] == "make" for words in shown)
