"""`phalanx token`: what it writes is what servers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phalanx.controller.server.rights import Caller
from phalanx.controller.server.security import TokenTable


def caller(file: Path, token: str) -> Caller:
    return TokenTable.read(str(file)).caller([("authorization", f"Bearer {token}")])


def test_tokens_are_known_to_the_server(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# callers\n" + "red:" + "ab" * 32)  # no end of line
    user = run("token", "team-a", "--add-to", str(file))
    admin = run("token", "ops", "--role", "admin", "--add-to", str(file))
    assert (user.exit_code, admin.exit_code) == (0, 0)
    tokens = [result.stdout.strip() for result in (user, admin)]
    assert [len(token) >= 40 for token in tokens] == [True, True]
    assert caller(file, tokens[0]) == Caller("team-a", "user")
    assert caller(file, tokens[1]) == Caller("ops", "admin")
    text = file.read_text()
    assert text.startswith("# callers\nred:")
    assert not any(token in text for token in tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert file.stat().st_mode & 0o077 == 0


def test_what_is_wrong_is_said(run: Any, tmp_path: Path) -> None:
    assert "tenant is" in run("token", "a b").stderr
    broken = tmp_path / "tokens"
    broken.write_text("nonsense\n")
    assert "line 1" in run("token", "a", "--add-to", str(broken)).stderr
    assert broken.read_text() == "nonsense\n"
    assert "cannot be written" in run("token", "a", "--add-to", str(tmp_path / "no" / "f")).stderr
