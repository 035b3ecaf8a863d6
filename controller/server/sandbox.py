"""Jinja's sandbox, bounded in size and time.

The sandbox keeps a template from Python's internals, but not from doubling a text forty times.
Here every way to build a large value is charged or checked first, and loops and calls look at
the clock.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, filters, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from phalanx.protos.limits import MAX_TEXT_BYTES

MAX_RENDER_S = 5.0
MAX_OUTPUT_CHARS = 4 * MAX_TEXT_BYTES  # in all, block assignments and macros included
MAX_WIDTH = 1000
MAX_NUMBER_BITS = 256

# No chat template needs these, and each can build a value of any size from a small one.
REMOVED_FILTERS = (
    "batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "urlize",
    "wordwrap", "xmlattr",
)  # fmt: skip
REMOVED_METHODS = frozenset(
    {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"}
)
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)")


class RaisedByTemplate(TemplateError):
    """The template's own `raise_exception`, in words meant for the caller."""


def refuse(what: str) -> NoReturn:
    """End the template."""
    raise SecurityError(f"the template {what}")


def check_size(size: int) -> None:
    """Refuse a text or list of so many characters or items."""
    if size > MAX_TEXT_BYTES:
        refuse(f"builds a value of over {MAX_TEXT_BYTES} characters or items")


def check_value(value: Any) -> Any:
    """The value, unless it is too large."""
    if isinstance(value, str | bytes | list | tuple | dict):
        check_size(len(value))
    elif isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        refuse(f"builds a number of over {MAX_NUMBER_BITS} bits")
    return value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """One render's environment; make one with `fresh` out of the one that compiled."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._deadline = float("inf")
        self._written = 0
        for name in REMOVED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"tojson": to_json, "indent": indent, "replace": replace, "join": join}
        self.filters |= {"_written": _written, "_joined": _joined, "_looped": _looped}
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "namespace": BoundedNamespace,
        }

    def fresh(self) -> BoundedEnvironment:
        """The same with all bounds ahead of it."""
        environment = self.overlay()
        environment._deadline = time.monotonic() + MAX_RENDER_S
        environment._written = 0
        return environment

    def tick(self) -> None:
        """Refuse to go on when the time is over."""
        if time.monotonic() > self._deadline:
            refuse(f"runs for over {MAX_RENDER_S:g} s")

    def charge(self, characters: int) -> None:
        """Count what is written."""
        self._written += characters
        if self._written > MAX_OUTPUT_CHARS:
            refuse(f"writes over {MAX_OUTPUT_CHARS} characters")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also without the methods of a text that widen it at will."""
        if isinstance(obj, str | bytes | type) and attr in REMOVED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """No `str.format`: a width in its text widens it at will."""
        if isinstance(getattr(value, "__self__", None), str) and value.__name__ in REMOVED_METHODS:
            refuse(f"calls {value.__name__}, which is not available")
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can build large values."""
        self.tick()
        if operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            many, times = (left, right) if hasattr(left, "__len__") else (right, left)
            check_size(len(many) * times if isinstance(times, int) else 0)
        elif operator == "**" and not (abs(left) <= 2**16 and abs(right) <= 64):
            refuse("raises to too high a power")
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            refuse("formats too wide a text")
        return check_value(super().call_binop(context, operator, left, right))

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls of methods, functions and macros."""
        self.tick()
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            _check_replace(owner, *args)
        elif isinstance(owner, str) and name == "join":
            args = (_checked_items(owner, *args),)
        return check_value(super().call(context, called, *args, **kwargs))


class _Bounding(NodeTransformer):
    """Lets everything that is written, joined or looped over pass through the bounds."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _filter(
                nodes.Const(item.data, lineno=item.lineno)
                if isinstance(item, nodes.TemplateData)
                else item,
                "_written",
            )
            for item in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "_joined", node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_looped", node.lineno)
        return node


def _filter(value: nodes.Node, name: str, lineno: int | None = None) -> nodes.Filter:
    made: Any = nodes.Filter(value, name, [], [], None, None)
    made.set_lineno(value.lineno if lineno is None else lineno)
    return made  # type: ignore[no-any-return]


def bound(tree: nodes.Template) -> nodes.Template:
    """The template with its bounds built in."""
    bounded = _Bounding().visit(tree)
    bounded.set_environment(tree.environment)
    return bounded  # type: ignore[no-any-return]


# A filter that takes the context is never folded into a constant when the template is compiled.


@pass_context
def _written(context: Context, value: Any) -> Any:
    text = value if isinstance(value, str) else str(value)
    context.environment.charge(len(text))  # type: ignore[attr-defined]
    return text


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    context.environment.tick()  # type: ignore[attr-defined]
    texts = [str(value) for value in values]
    check_size(sum(map(len, texts)))
    return "".join(texts)


@pass_context
def _looped(context: Context, values: Any) -> Any:
    context.environment.tick()  # type: ignore[attr-defined]
    return values


def _check_replace(text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        check_size(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _checked_items(separator: str, items: Iterable[Any] = ()) -> list[Any]:
    listed = list(items)
    check_size(len(separator) * len(listed) + sum(len(str(item)) for item in listed))
    return listed


def replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    """Jinja's filter, bounded."""
    _check_replace(str(value), str(old), str(new))
    return str(value).replace(str(old), str(new), -1 if count is None else count)


@pass_context
def join(context: Context, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Jinja's filter, bounded."""
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    return str(d).join(map(str, _checked_items(str(d), value)))


def indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's filter, bounded."""
    size = len(width) if isinstance(width, str) else width
    check_size(len(value) + size * (value.count("\n") + 1))
    return filters.do_indent(value, width, first, blank)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: plain JSON, without HTML escapes."""
    if isinstance(indent, int) and indent > MAX_WIDTH:
        refuse("indents too far")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: object) -> NoReturn:
    """For templates to refuse a conversation."""
    raise RaisedByTemplate(str(message))


def strftime_now(form: str) -> str:
    """The local time, as Llama's templates ask for it."""
    if len(form) > MAX_WIDTH or re.search(r"%[^a-zA-Z%]*\d{3}", form):
        refuse("formats too wide a date")
    return datetime.now().strftime(form)


class BoundedNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        refuse(f"sets {name!r:.40}, names with a leading underscore are not allowed")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  as its base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())
