"""Flags that commands share: those of the configuration, of a connection, and of sampling.

A command names the value that it wants, `connection: Connection` say, and a decorator of this
module turns that parameter into the flags it is made of.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from phalanx.controller.config import DEFAULTS, KINDS, RULES
from phalanx.protos.errors import ConfigError

Command = Callable[..., None]
DEFAULT_ADDRESS = f"{DEFAULTS['host']}:{DEFAULTS['port']}"


def gathered(
    into: str, flags: Iterable[inspect.Parameter], make: Callable[..., object]
) -> Callable[[Command], Command]:
    """Decorator: replaces a command's parameter `into` by `flags`, and fills it with
    `make(**flags)`."""
    flags = list(flags)

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [item.replace(kind=item.KEYWORD_ONLY) for item in own if item.name != into]

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> None:
            values = {flag.name: arguments.pop(flag.name) for flag in flags}
            command(**arguments, **{into: make(**values)})

        wrapped.__signature__ = inspect.Signature([*kept, *flags])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {}
        return wrapped

    return decorate


def parameter(
    name: str, kind: Any, default: object, *names: str, **option: Any
) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(*names, **option)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def given(**params: object) -> dict[str, Any]:
    """The flags that were set; defaults hold for the rest."""
    return {name: value for name, value in params.items() if value not in (None, [])}


def shown_default(name: str) -> str:
    """A configuration field's default as its help shows it."""
    value = DEFAULTS[name]
    if value is None:
        return RULES[name].unset
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _config_flag(name: str) -> inspect.Parameter:
    rule, kind, dashed = RULES[name], KINDS[name], name.replace("_", "-")
    choices = f" One of {', '.join(rule.choices)}." if rule.choices else ""
    default = f" [default: {shown_default(name)}]" if name in DEFAULTS else ""
    shown = {
        "help": f"{rule.help}{choices}{default}".replace("[", "\\["),
        "rich_help_panel": rule.group,
        "show_default": False,
    }
    if kind is bool:
        return parameter(name, bool | None, None, f"--{dashed}/--no-{dashed}", **shown)
    metavar = "BYTES" if rule.size else {int: "N", float: "SECONDS"}.get(kind, "TEXT")
    return parameter(name, str | None, None, f"--{dashed}", metavar=metavar, **shown)


def config_flags(*names: str) -> Callable[[Command], Command]:
    """The named configuration fields as flags; parameter `flags` is a dict of those given."""
    return gathered("flags", map(_config_flag, names), given)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How to reach a cluster."""

    address: str
    token_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    timeout: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Client` and `AsyncClient`. Raises `ConfigError` for a bad file."""
        token = _read(self.token_file, "token_file")
        return {
            "address": self.address,
            "token": token.decode().strip() if token is not None else None,
            "root_certificates": _read(self.tls_ca, "tls_ca"),
            "certificate": _read(self.tls_cert, "tls_cert"),
            "private_key": _read(self.tls_key, "tls_key"),
            "timeout": self.timeout,
        }


def _read(path: Path | None, what: str) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as error:
        raise ConfigError(f"{what} is {path}, which cannot be read: {error.strerror}") from None


def _connection_flags() -> list[inspect.Parameter]:
    def flag(
        name: str, kind: Any, default: object, help: str, env: str | None = None, **option: Any
    ) -> inspect.Parameter:
        return parameter(
            name, kind, default, help=help, envvar=env, rich_help_panel="Connection", **option
        )

    path = Path | None
    certificate = "Authority of the server's certificate (PEM); turns TLS on."
    seconds = "Seconds that a call may take."
    return [
        flag("address", str, DEFAULT_ADDRESS, "Where the cluster listens.", "PHALANX_ADDRESS"),
        flag("token_file", path, None, "File with the bearer token.", "PHALANX_TOKEN_FILE"),
        flag("tls_ca", path, None, certificate, "PHALANX_TLS_CA"),
        flag("tls_cert", path, None, "Our own certificate (PEM).", "PHALANX_TLS_CERT"),
        flag("tls_key", path, None, "Its private key (PEM).", "PHALANX_TLS_KEY"),
        flag("timeout", float | None, None, seconds, min=0.001),
    ]


connection_flags = gathered("connection", _connection_flags(), Connection)
"""Decorator: parameter `connection` is a `Connection` made of flags."""


def _sampling_flags() -> list[inspect.Parameter]:
    def flag(name: str, kind: Any, default: object, help: str) -> inspect.Parameter:
        return parameter(name, kind, default, help=help, rich_help_panel="Sampling")

    number, count = float | None, int | None
    freedom = "0 always takes the likeliest token, more is freer. \\[default: 1]"
    return [
        flag("max_tokens", int, 256, "Tokens to write at most."),
        flag("temperature", number, None, freedom),
        flag("top_k", count, None, "Choose among the K likeliest tokens."),
        flag("top_p", number, None, "Choose among the likeliest, up to this probability in all."),
        flag("min_p", number, None, "Drop tokens below this fraction of the likeliest one."),
        flag("repetition_penalty", number, None, "Above 1 discourages repetition."),
        flag("seed", count, None, "The same seed gives the same text again."),
        flag("stop", list[str] | None, None, "Text that ends the answer; may be repeated."),
    ]


GRAMMAR_FLAGS = ("json_schema", "regex", "choice", "grammar")


def _grammar_flags() -> list[inspect.Parameter]:
    def flag(name: str, kind: Any, help: str, metavar: str) -> inspect.Parameter:
        return parameter(
            name, kind, None, help=help, metavar=metavar, rich_help_panel="Form of the answer"
        )

    text = str | None
    file = "; @FILE reads a file."
    return [
        flag("json_schema", text, f"JSON that this schema describes{file}", "SCHEMA"),
        flag(
            "regex", text, f"A text that this regular expression matches as a whole{file}", "REGEX"
        ),
        flag("choice", list[str] | None, "One of these; give it several times.", "TEXT"),
        flag("grammar", text, f"A text of this grammar in Lark's notation{file}", "LARK"),
    ]


def _sampling(**flags: Any) -> dict[str, Any]:
    """Sampling parameters; a form of the answer is one of them. Raises `ConfigError`."""
    forms = given(**{name: flags.pop(name) for name in GRAMMAR_FLAGS})
    if len(forms) > 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in forms)
        raise ConfigError(f"{names}: only one of them can be kept to")
    params = given(**flags)
    for name, value in forms.items():
        kind = "lark" if name == "grammar" else name
        params["grammar"] = {kind: value if name == "choice" else _text_or_file(value, name)}
    return params


def _text_or_file(value: str, name: str) -> str:
    if not value.startswith("@"):
        return value
    data = _read(Path(value[1:]), name) or b""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is {value[1:]}, which is not UTF-8 text") from None


sampling_flags = gathered("params", [*_sampling_flags(), *_grammar_flags()], _sampling)
"""Decorator: parameter `params` is a dict of the sampling parameters that were set."""
