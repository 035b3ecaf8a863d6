"""Flags that say what an answer must look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("words", "grammar"),
    [
        (["--json-schema", '{"type": "object"}'], {"json_schema": '{"type": "object"}'}),
        (["--regex", "[a-z]+"], {"regex": "[a-z]+"}),
        (["--choice", "yes", "--choice", "no"], {"choice": ["yes", "no"]}),
        (["--grammar", 'start: "a"+'], {"lark": 'start: "a"+'}),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_form_reaches_the_server(
    run: Any, clients: Any, command: str, words: list[str], grammar: dict[str, Any]
) -> None:
    clients.answers.append(["a"])
    assert run(command, "Hello", *words).exit_code == 0
    ((_, params),) = clients[0].calls
    assert params["grammar"] == grammar


def test_a_file_of_it(run: Any, clients: Any, tmp_path: Path) -> None:
    clients.answers.append(["a"])
    file = tmp_path / "schema.json"
    file.write_text('{"type": "array"}')
    assert run("generate", "Hello", "--json-schema", f"@{file}").exit_code == 0
    ((_, params),) = clients[0].calls
    assert params["grammar"] == {"json_schema": '{"type": "array"}'}
    assert "cannot be read" in run("generate", "Hello", "--regex", "@/nothing").stderr
    file.write_bytes(b"\xff")
    assert "not UTF-8" in run("generate", "Hello", "--regex", f"@{file}").stderr


def test_two_forms_are_one_too_many(run: Any, clients: Any) -> None:
    result = run("generate", "Hello", "--regex", "a", "--choice", "b")
    assert result.exit_code != 0
    assert "--regex, --choice: only one" in result.stderr
    assert not clients
