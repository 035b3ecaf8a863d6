"""Conversations to prompts, by the template that comes with the model.

A template is a program out of a model's files. It runs in Jinja's immutable sandbox, with bounds
on what it may build and how long it may run (`sandbox`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, meta

from phalanx.protos.errors import InvalidArgument, ModelError

from .sandbox import BoundedEnvironment, RaisedByTemplate, bound

MAX_SHOWN_CHARS = 200


class ChatTemplate:
    """A compiled template, rendered as transformers does: same settings, filters and functions.

    special_tokens: names such as "bos_token" to their texts. Raises `ModelError` when the
    template is not valid Jinja. Safe to call from several threads.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special = dict(special_tokens)
        self._environment = BoundedEnvironment()
        try:
            tree = bound(self._environment.parse(source))
            self._code = self._environment.compile(tree)
            names = meta.find_undeclared_variables(self._environment.parse(source))
        except (TemplateError, RecursionError) as error:
            raise ModelError(f"the model's chat template is not usable: {_words(error)}") from None
        self.takes_tools = "tools" in names
        """Whether it shows the model what tools there are."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt up to where the assistant's answer begins; tools as transformers has them.

        Raises `InvalidArgument` naming `messages` for a conversation that the template refuses.
        """
        environment = self._environment.fresh()
        template = environment.template_class.from_code(
            environment, self._code, environment.make_globals(None)
        )
        values: dict[str, Any] = {**self._special, "messages": [dict(item) for item in messages]}
        values |= {
            "tools": copy.deepcopy(list(tools)) or None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return template.render(values)
        except RaisedByTemplate as error:
            raise InvalidArgument.of("messages", _words(error)) from None
        except Exception as error:  # noqa: BLE001  a template is a program: it may raise anything
            text = f"the model's chat template fails on them: {_words(error)}"
            raise InvalidArgument.of("messages", text) from None


def _words(error: Exception) -> str:
    """The error's own text when it is of the template, else only its kind."""
    if isinstance(error, TemplateError) and error.message:
        return error.message[:MAX_SHOWN_CHARS]
    return type(error).__name__
