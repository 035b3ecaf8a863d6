"""What is checked before a request goes further, and what it is turned into."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from phalanx.controller.model import ServedModel
from phalanx.controller.tools.formats import FORMATS, Reading, Tool, detect, forced_calls
from phalanx.protos.errors import FieldViolation, InvalidArgument, ModelError
from phalanx.protos.grammars import GrammarCompiler
from phalanx.protos.limits import (
    MAX_DEADLINE_S,
    MAX_DETOKENIZE_IDS,
    MAX_MESSAGE_BYTES,
    MAX_N,
    MAX_REQUEST_ID_CHARS,
    MAX_STREAM_INTERVAL_S,
    MAX_TEXT_BYTES,
    PRIORITY_RANGE,
    SEED_RANGE,
)
from phalanx.protos.sampling import Grammar, SamplingParams
from phalanx.protos.v1 import serving_pb2, types_pb2

from .chat import ChatTemplate
from .conversation import plain_messages, read_tools, template_tools
from .convert import check_params, read_params, shortest, unknown_fields

SHOWN_IDS = 8
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:\-]{{1,{MAX_REQUEST_ID_CHARS}}}")

Violations = list[FieldViolation]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may go to the engine; `params.seed` is drawn."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    """Seconds from the arrival in which it must be finished."""
    fingerprint: bytes = b""
    """Of the body, where the caller chose the id; the same body has the same one."""
    stream_interval_s: float = 0.0
    """Between two messages, at least."""
    tools: Reading | None = None
    """How calls of tools are read from the answer."""


class Admission:
    """Checks requests against one model. Every violation is listed, not only the first.

    Safe to call from several threads.
    """

    def __init__(self, model: ServedModel, tool_parser: str = "auto") -> None:
        self._model, self._tokenizer = model, model.tokenizer
        self._vocab_size = model.spec.vocab_size
        self._grammars: GrammarCompiler | None = None
        self._grammar_lock = threading.Lock()
        self._template = (
            None
            if model.chat_template is None
            else ChatTemplate(model.chat_template, model.special_tokens)
        )

        found = detect(model.chat_template or "") if tool_parser == "auto" else tool_parser
        self._format = found if self._template is not None else None

    @property
    def tool_parser(self) -> str:
        """The format in which tools are called; "" where `chat` takes none."""
        takes = self._template is not None and self._template.takes_tools
        return self._format or "" if takes else ""

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can succeed."""
        return self._template is not None

    def generate(self, request: serving_pb2.GenerateRequest) -> Admitted:
        """Raises `InvalidArgument`."""
        violations = unknown_fields(request)
        prompt = self._prompt(request, violations)
        field = "text" if request.WhichOneof("prompt") == "text" else "token_ids"
        return self._admit(request, prompt, field, violations)

    def chat(self, request: serving_pb2.ChatRequest) -> Admitted:
        """Raises `InvalidArgument`, or `ModelError` for a model without a chat template."""
        violations = unknown_fields(request)
        original, known = request, len(violations)
        request = serving_pb2.ChatRequest.FromString(original.SerializeToString())
        tools = read_tools(request, violations)
        reading = None if len(violations) > known else self._reading(request, tools, violations)
        prompt = self._conversation(request, tools, violations)
        try:
            admitted = self._admit(request, prompt, "messages", violations)
        except InvalidArgument as error:
            raise _about_tools(error, request, original) from None
        fingerprint = _fingerprint(original) if original.request_id else b""
        return dataclasses.replace(admitted, fingerprint=fingerprint, tools=reading)

    def tokenize(self, request: serving_pb2.TokenizeRequest) -> list[int]:
        """Raises `InvalidArgument`."""
        violations = unknown_fields(request)
        _check_size("text", request.text, violations)
        _refuse(violations)
        return self._encode(request.text, special=request.add_special_tokens)

    def detokenize(self, request: serving_pb2.DetokenizeRequest) -> str:
        """Raises `InvalidArgument`."""
        violations = unknown_fields(request)
        if len(request.token_ids) > MAX_DETOKENIZE_IDS:
            text = f"{len(request.token_ids)} entries, at most {MAX_DETOKENIZE_IDS} allowed"
            violations.append(FieldViolation("token_ids", text))
        else:
            self._check_ids("token_ids", list(request.token_ids), violations)
        _refuse(violations)
        text = self._tokenizer.decode(
            list(request.token_ids), skip_special_tokens=request.skip_special_tokens
        )
        room = MAX_MESSAGE_BYTES - 1024
        if len(text.encode()) > room:
            raise InvalidArgument.of("token_ids", f"their text has over {room} bytes")
        return str(text)

    def abort(self, request: serving_pb2.AbortRequest) -> str:
        """The id to abort. Raises `InvalidArgument`."""
        return self._named(request)

    def explain(self, request: serving_pb2.ExplainPlacementRequest) -> str:
        """The id that is asked about. Raises `InvalidArgument`."""
        return self._named(request)

    def resume(self, request: serving_pb2.ResumeRequest) -> None:
        """Raises `InvalidArgument`."""
        violations: Violations = []
        if len(request.next_index) > MAX_N:
            text = f"{len(request.next_index)} entries, at most {MAX_N} allowed"
            violations.append(FieldViolation("next_index", text))
        self._named(request, violations)

    def _named(
        self,
        request: serving_pb2.AbortRequest
        | serving_pb2.ExplainPlacementRequest
        | serving_pb2.ResumeRequest,
        others: Sequence[FieldViolation] = (),
    ) -> str:
        """The id that a call about another request names; `others`: what else is wrong with it."""
        violations = unknown_fields(request)
        if not request.request_id:
            violations.append(FieldViolation("request_id", "is empty, a request's id is needed"))
        self._request_id(request.request_id, violations)
        _refuse([*violations, *others])
        return request.request_id

    def _prompt(self, request: serving_pb2.GenerateRequest, violations: Violations) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                if not request.text:
                    violations.append(FieldViolation("text", "is empty, a text is allowed"))
                if not _check_size("text", request.text, violations):
                    return []
                return self._encode(request.text, special=True)
            case "token_ids":
                ids = list(request.token_ids.ids)
                if not ids:
                    violations.append(
                        FieldViolation("token_ids", "is empty, token ids are allowed")
                    )
                # the length is checked first: it bounds the work
                if len(ids) < self._model.max_context:
                    self._check_ids("token_ids.ids", ids, violations)
                return ids
        violations.append(FieldViolation("prompt", "is missing, one of text, token_ids is needed"))
        return []

    def _conversation(
        self, request: serving_pb2.ChatRequest, tools: list[Tool], violations: Violations
    ) -> list[int]:
        if self._template is None:
            raise ModelError(
                f"model {self._model.name} has no chat template; Generate takes its text"
            )
        messages = plain_messages(request.messages, violations)
        if violations:
            return []
        try:
            # the template writes the special tokens itself
            shown = () if request.tool_use == types_pb2.TOOL_USE_NONE else template_tools(tools)
            return self._encode(self._template.render(messages, shown), special=False)
        except InvalidArgument as error:
            violations += error.violations
            return []

    def _reading(
        self, request: serving_pb2.ChatRequest, tools: list[Tool], violations: Violations
    ) -> Reading | None:
        """How the answer is read, and into the parameters what it needs of them."""
        active = bool(tools) and request.tool_use != types_pb2.TOOL_USE_NONE
        name, params = self._format, request.params
        if active and self._template is not None and not self.tool_parser:
            raise ModelError(self._no_tools())
        if name is None or not (active or name == "harmony"):
            return None
        constrained = params.HasField("grammar")
        if constrained and active:
            text = "is not allowed beside tools, which say what calls look like"
            violations.append(FieldViolation("params.grammar", text))
        elif constrained:
            return None
        if FORMATS[name].special:
            params.skip_special_tokens = False
        single = request.single_tool_call or bool(request.tool_name)
        read_as = name
        if request.tool_use == types_pb2.TOOL_USE_REQUIRED:
            # no grammar speaks of Python's literals: JSON is asked for there
            read_as = "json" if name == "pythonic" else name
            allowed = [tool for tool in tools if request.tool_name in ("", tool.name)]
            forced = forced_calls(name, allowed, self._spelled, single=single)
            params.grammar.lark = forced.text
        names = tuple(tool.name for tool in tools) if active else ()
        return Reading(read_as, names, single)

    def _no_tools(self) -> str:
        if self._template is not None and self._template.takes_tools:
            return (
                f"model {self._model.name} writes calls of tools in a format that is not known "
                f"here; tool_parser may be one of {', '.join(FORMATS)}"
            )
        return f"model {self._model.name} has a chat template that takes no tools"

    def _spelled(self, marker: str) -> str:
        """A marker for a grammar: the one token that it is, where that is special."""
        token = self._tokenizer.token_to_id(marker)
        if token is not None and self._tokenizer.get_added_tokens_decoder()[token].special:
            return f"<[{token}]>"
        return json.dumps(marker)

    def _admit(
        self,
        request: serving_pb2.GenerateRequest | serving_pb2.ChatRequest,
        prompt: list[int],
        field: str,
        violations: Violations,
    ) -> Admitted:
        request_id, message = request.request_id, request.params
        self._request_id(request_id, violations)
        params = read_params(message, self._encode, violations)
        check_params(params, self._vocab_size, violations)
        if params.grammar is not None and not violations:
            self._check_grammar(params.grammar, violations)
        self._check_room(prompt, field, params, violations)
        priority, deadline_s, interval_s = _read_options(request.options, violations)
        _refuse(violations)
        if not message.HasField("seed"):
            seed = secrets.randbelow(SEED_RANGE[1] + 1)
            params = msgspec.structs.replace(params, seed=seed)
        mark = _fingerprint(request) if request_id else b""
        request_id = request_id or uuid.uuid4().hex
        return Admitted(request_id, prompt, params, priority, deadline_s, mark, interval_s)

    def _check_room(
        self, prompt: list[int], field: str, params: SamplingParams, violations: Violations
    ) -> None:
        limit, size = self._model.max_context, len(prompt)
        if not size:
            if not violations:
                violations.append(FieldViolation(field, "has no tokens, at least one is needed"))
            return
        if size >= limit:
            text = f"{size} tokens, at most {limit - 1} allowed (max_context is {limit})"
            violations.append(FieldViolation(field, text))
            return
        for name in ("max_tokens", "min_tokens"):
            asked = getattr(params, name)
            if size + asked > limit:
                text = (
                    f"{asked} tokens after a prompt of {size}, at most {limit - size} allowed "
                    f"(max_context is {limit})"
                )
                violations.append(FieldViolation(f"params.{name}", text))

    def _check_grammar(self, grammar: Grammar, violations: Violations) -> None:
        """Compile it as the ranks will. Raises `ModelError` where the model can have none."""
        with self._grammar_lock:
            if self._grammars is None:
                model = self._model
                self._grammars = GrammarCompiler(
                    model.tokenizer.to_str(), self._vocab_size, model.eos_token_ids
                )
        try:
            self._grammars.compile(grammar)
        except InvalidArgument as error:
            violations += error.violations

    def _request_id(self, request_id: str, violations: Violations) -> None:
        if request_id and not _REQUEST_ID.fullmatch(request_id):
            text = (
                f"{request_id!r:.60} is not 1 to {MAX_REQUEST_ID_CHARS} letters, digits and . _ : -"
            )
            violations.append(FieldViolation("request_id", text))

    def _check_ids(self, field: str, ids: list[int], violations: Violations) -> None:
        wrong = [(at, token) for at, token in enumerate(ids) if token >= self._vocab_size]
        for at, token in wrong[:SHOWN_IDS]:
            text = f"{token} is not a token id in [0, {self._vocab_size})"
            violations.append(FieldViolation(f"{field}[{at}]", text))
        if len(wrong) > SHOWN_IDS:
            text = f"{len(wrong) - SHOWN_IDS} more entries are not token ids"
            violations.append(FieldViolation(field, text))

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)


def _fingerprint(request: serving_pb2.GenerateRequest | serving_pb2.ChatRequest) -> bytes:
    """SHA-256 over the kind of request and all of its fields but the id."""
    body = type(request).FromString(request.SerializeToString())
    body.ClearField("request_id")
    kind = type(request).DESCRIPTOR.full_name.encode()
    return hashlib.sha256(kind + b"\0" + body.SerializeToString(deterministic=True)).digest()


def _about_tools(
    error: InvalidArgument, asked: serving_pb2.ChatRequest, original: serving_pb2.ChatRequest
) -> InvalidArgument:
    """The refusal of a grammar that we made is one of the tools that it was made of."""
    if not asked.params.HasField("grammar") or original.params.HasField("grammar"):
        return error
    return InvalidArgument(
        [
            FieldViolation("tools", f"cannot be kept to: {item.description}")
            if item.field == "params.grammar"
            else item
            for item in error.violations
        ]
    )


def _read_options(
    options: serving_pb2.RequestOptions, violations: Violations
) -> tuple[int, float | None, float]:
    """Priority, seconds in which the request must be finished, and those between messages."""
    low, high = PRIORITY_RANGE
    if not low <= options.priority <= high:
        text = f"{options.priority} is not an integer in [{low}, {high}]"
        violations.append(FieldViolation("options.priority", text))
    interval = shortest(options.stream_interval_s)
    if not 0.0 <= interval <= MAX_STREAM_INTERVAL_S:
        text = f"{interval:g} is not in [0, {MAX_STREAM_INTERVAL_S:g}]"
        violations.append(FieldViolation("options.stream_interval_s", text))
    if not options.HasField("deadline_s"):
        return options.priority, None, interval
    seconds = shortest(options.deadline_s)
    if not 0.0 < seconds <= MAX_DEADLINE_S:
        text = f"{seconds:g} is not above 0 and at most {MAX_DEADLINE_S:g}"
        violations.append(FieldViolation("options.deadline_s", text))
    return options.priority, seconds, interval


def _check_size(field: str, text: str, violations: Violations) -> bool:
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        text = f"{size} bytes, at most {MAX_TEXT_BYTES} allowed"
        violations.append(FieldViolation(field, text))
    return size <= MAX_TEXT_BYTES


def _refuse(violations: Violations) -> None:
    if violations:
        raise InvalidArgument(violations)
