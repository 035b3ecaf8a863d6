"""Bodies of HTTP requests, turned into the messages of the service.

A field is read, or has no meaning here and is named in `WITHOUT_EFFECT`, or is refused by name.
The limits of values are those of the service, which checks them again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.controller.server.constraints import is_text
from phalanx.protos.errors import FieldViolation, InvalidArgument, NotFound
from phalanx.protos.limits import (
    MAX_CHAT_MESSAGES,
    MAX_DEADLINE_S,
    MAX_LOGPROBS,
    MAX_N,
    MAX_NGRAM_SIZE,
    MIN_P_RANGE,
    PENALTY_RANGE,
    PRIORITY_RANGE,
    REPETITION_PENALTY_RANGE,
    SEED_RANGE,
    TEMPERATURE_RANGE,
    TOP_P_RANGE,
)
from phalanx.protos.v1 import serving_pb2, types_pb2

from .constraints import read_response_format, read_structured_outputs
from .fields import Fields, as_number, is_token_id, refuse, shown
from .tools import NAMES as TOOL_NAMES
from .tools import read_calls, read_tools

WITHOUT_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Taken and not used: they are about an account, its bill and its records."""

COMPLETION_TOKENS = 16
"""What `/v1/completions` generates when nothing is said, as its documentation has it."""

MAX_PROMPTS = 16
"""Prompts of one request."""

MAX_PARTS = 64
"""Parts of one message's content."""

INT32_MAX = 2**31 - 1
_RANGES = {
    "temperature": TEMPERATURE_RANGE,
    "top_p": TOP_P_RANGE,
    "min_p": MIN_P_RANGE,
    "repetition_penalty": REPETITION_PENALTY_RANGE,
    "presence_penalty": PENALTY_RANGE,
    "frequency_penalty": PENALTY_RANGE,
}
_UNSUPPORTED = (
    "audio",
    "function_call",
    "functions",
    "moderation",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
)
_CALLED = re.compile(r"^(tools\[\d+\]|messages\[\d+\]\.tool_calls\[\d+\])\.(.*)")
_DIGITS = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in the service's words, a message for each prompt, and how it is to be answered.

    samples: of each prompt. continuous_usage: in every chunk. names: field of the service to what the caller calls it.
    """

    messages: Sequence[serving_pb2.GenerateRequest | serving_pb2.ChatRequest]
    samples: int
    scored: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    names: Mapping[str, str]

    def renamed(self, error: InvalidArgument, at: int) -> InvalidArgument:
        """The service's refusal of message `at`, in the caller's names."""
        return InvalidArgument(
            [
                FieldViolation(self._caller_name(item.field, at), item.description)
                for item in error.violations
            ]
        )

    def _caller_name(self, field: str, at: int) -> str:
        name = field.removeprefix("params.").removeprefix("options.")
        name = _CALLED.sub(r"\1.function.\2", name)
        head = re.split(r"[.\[]", name, maxsplit=1)[0]
        if head in ("text", "token_ids"):
            place = f"[{at}]" if len(self.messages) > 1 else ""
            return f"prompt{place}{name[len(head) :].removeprefix('.ids')}"
        return self.names.get(head, head) + name[len(head) :]


def read_chat(body: Mapping[str, Any], model: str, request_id: str) -> Asked:
    """Of `/v1/chat/completions`. Raises `InvalidArgument`, or `NotFound` for another model."""
    fields = Fields(body, [])
    params = types_pb2.SamplingParams()
    names = {"include_stop": "include_stop_str_in_output", **TOOL_NAMES}
    _read_model(fields, model)
    messages = _messages(fields)
    longest = fields.integer("max_completion_tokens", 1, INT32_MAX)
    shorter = fields.integer("max_tokens", 1, INT32_MAX)
    if longest is not None and shorter not in (None, longest):
        fields.refuse("max_tokens", f"is {shorter}, but max_completion_tokens is {longest}")
    if longest is not None:
        names["max_tokens"] = "max_completion_tokens"
    _set(params, max_tokens=longest if longest is not None else shorter)
    alternatives = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if fields.flag("logprobs"):
        params.logprobs = alternatives or 0
    elif alternatives is not None:
        fields.refuse("top_logprobs", "is allowed only where logprobs is true")
    names["logprobs"] = "top_logprobs"
    fields.only("modalities", (["text"],), 'only ["text"] is')
    read_response_format(fields, params)
    names["grammar"] = "response_format" if params.HasField("grammar") else "structured_outputs"
    request = serving_pb2.ChatRequest(request_id=request_id, messages=messages)
    read_tools(fields, request)
    for name in _UNSUPPORTED:
        fields.only(name, ([],), "leave it out")
    stream, usage = _read_shared(fields, params, request.options)
    request.params.CopyFrom(params)
    return _asked([request], params, stream, usage, names)


def read_completion(body: Mapping[str, Any], model: str, request_id: str) -> Asked:
    """Of `/v1/completions`. Raises as `read_chat` does."""
    fields = Fields(body, [])
    params = types_pb2.SamplingParams()
    _read_model(fields, model)
    requests = _read_prompts(fields)
    longest = fields.integer("max_tokens", 1, INT32_MAX)
    _set(params, max_tokens=COMPLETION_TOKENS if longest is None else longest)
    _set(params, logprobs=fields.integer("logprobs", 0, MAX_LOGPROBS))
    fields.only("echo", (False,), "the prompt is never repeated, leave it out")
    fields.only("suffix", ("",), "text is only continued, leave it out")
    samples = fields.value("n") or 1
    fields.only("best_of", (samples,), "it may only be the same as n; all samples are given back")
    options = serving_pb2.RequestOptions()
    stream, usage = _read_shared(fields, params, options)
    for at, request in enumerate(requests):
        request.request_id = request_id if len(requests) == 1 else f"{request_id}-{at}"
        request.params.CopyFrom(params)
        request.options.CopyFrom(options)
    names = {"include_stop": "include_stop_str_in_output", "grammar": "structured_outputs"}
    return _asked(requests, params, stream, usage, names)


def _asked(
    messages: Sequence[serving_pb2.GenerateRequest | serving_pb2.ChatRequest],
    params: types_pb2.SamplingParams,
    stream: bool,
    usage: tuple[bool, bool],
    names: Mapping[str, str],
) -> Asked:
    samples = params.n if params.HasField("n") else 1
    return Asked(messages, samples, params.HasField("logprobs"), stream, *usage, names)


def _read_model(fields: Fields, model: str) -> None:
    asked = fields.text("model")
    if not fields.has("model"):
        fields.refuse("model", f"is missing, {model!r} is served here")
    elif asked is not None and asked != model:
        raise NotFound(f"model {shown(asked)} is not served here, {model!r} is")


def _read_shared(
    fields: Fields, params: types_pb2.SamplingParams, options: serving_pb2.RequestOptions
) -> tuple[bool, tuple[bool, bool]]:
    """What both calls have; gives `stream`, and whether usage is wanted in it, and in every
    chunk. Raises."""
    _set(
        options,
        priority=fields.integer("priority", *PRIORITY_RANGE),
        deadline_s=fields.number("deadline_s", 0.0, MAX_DEADLINE_S),
    )
    for name, bounds in _RANGES.items():
        _set(params, **{name: fields.number(name, *bounds)})
    _set(
        params,
        n=fields.integer("n", 1, MAX_N),
        seed=fields.integer("seed", *SEED_RANGE),
        min_tokens=fields.integer("min_tokens", 0, INT32_MAX),
        no_repeat_ngram_size=fields.integer("no_repeat_ngram_size", 0, MAX_NGRAM_SIZE),
        top_k=max(0, fields.integer("top_k", -1, INT32_MAX) or 0),  # -1, too, keeps all
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        ignore_eos=fields.flag("ignore_eos"),
        include_stop=fields.flag("include_stop_str_in_output"),
    )
    params.stop.extend(fields.texts("stop"))
    params.bad_words.extend(fields.texts("bad_words"))
    params.stop_token_ids.extend(fields.integers("stop_token_ids"))
    _read_bias(fields, params)
    read_structured_outputs(fields, params)
    stream = fields.flag("stream")
    usage = _read_stream_options(fields, stream)
    fields.ignore(WITHOUT_EFFECT)
    fields.finish()
    refuse(fields.violations)
    return stream, usage


def _set(message: types_pb2.SamplingParams | serving_pb2.RequestOptions, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            setattr(message, name, value)


def _read_bias(fields: Fields, params: types_pb2.SamplingParams) -> None:
    given = fields.value("logit_bias")
    if given is None:
        return
    if not isinstance(given, dict):
        fields.refuse("logit_bias", f"{shown(given)} is not an object")
        return
    for key, value in given.items():
        number = as_number(value)
        if not _DIGITS.fullmatch(key) or not is_token_id(int(key)):
            fields.refuse("logit_bias", f"{shown(key)} is not a token id")
        elif number is None:
            fields.refuse(f"logit_bias[{key}]", f"{shown(value)} is not a number of this size")
        else:
            params.logit_bias[int(key)] = number
            continue
        return


def _read_stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    given = fields.value("stream_options")
    if given is None:
        return False, False
    if not isinstance(given, dict):
        fields.refuse("stream_options", f"{shown(given)} is not an object")
        return False, False
    if not stream:
        fields.refuse("stream_options", "is allowed only where stream is true")
    options = Fields(given, fields.violations, "stream_options")
    usage = options.flag("include_usage")
    continuous = options.flag("continuous_usage_stats")  # vLLM's
    options.ignore(("include_obfuscation",))
    options.finish()
    return usage, usage and continuous


def _read_prompts(fields: Fields) -> list[serving_pb2.GenerateRequest]:
    value = fields.value("prompt")
    if value is None:
        fields.refuse("prompt", "is missing, a text or a list of token ids is needed")
        return []
    several = isinstance(value, list) and any(isinstance(item, str | list) for item in value)
    prompts = value if several else [value]
    if len(prompts) > MAX_PROMPTS:
        fields.refuse("prompt", f"{len(prompts)} prompts, at most {MAX_PROMPTS} allowed")
        return []
    requests = [serving_pb2.GenerateRequest() for _ in prompts]
    for at, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        if is_text(prompt):
            request.text = prompt
        elif isinstance(prompt, list) and all(map(is_token_id, prompt)):
            request.token_ids.ids.extend(prompt)
        else:
            field = f"prompt[{at}]" if several else "prompt"
            fields.refuse(field, "is neither a text nor a list of token ids")
    return requests


def _messages(fields: Fields) -> list[types_pb2.ChatMessage]:
    given = fields.value("messages")
    if not isinstance(given, list):
        text = "is missing" if given is None else f"{shown(given)} is not one"
        fields.refuse("messages", f"{text}, a list of messages is needed")
        return []
    if len(given) > MAX_CHAT_MESSAGES:
        fields.refuse("messages", f"{len(given)} entries, 1 to {MAX_CHAT_MESSAGES} allowed")
        return []
    return [_message(item, f"messages[{at}]", fields.violations) for at, item in enumerate(given)]


def _message(given: object, path: str, violations: list[FieldViolation]) -> types_pb2.ChatMessage:
    if not isinstance(given, dict):
        violations.append(FieldViolation(path, f"{shown(given)} is not an object"))
        return types_pb2.ChatMessage()
    fields = Fields(given, violations, path)
    role, content = fields.text("role"), fields.value("content")
    if not fields.has("role"):
        fields.refuse("role", "is missing")
    if isinstance(content, list):
        content = _parts(content, fields.name("content"), violations)
    elif content is None:
        content = ""
    elif not is_text(content):
        fields.refuse("content", f"{shown(content)} is neither a text nor a list of parts")
        content = ""
    for name in ("audio", "function_call", "refusal"):
        fields.only(name, (), "leave it out")
    fields.only("annotations", ([],), "leave it out")  # empty in answers that are sent back
    fields.ignore(("reasoning_content",))  # templates leave out what was thought before
    message = types_pb2.ChatMessage(role=role or "", content=content)
    read_calls(fields, message)
    fields.finish()
    return message


def _parts(parts: list[Any], path: str, violations: list[FieldViolation]) -> str:
    """The texts of a content's parts, a line each."""
    texts: list[str] = []
    if len(parts) > MAX_PARTS:
        violations.append(FieldViolation(path, f"{len(parts)} parts, at most {MAX_PARTS} allowed"))
        return ""
    for at, part in enumerate(parts):
        where = f"{path}[{at}]"
        if not isinstance(part, dict):
            violations.append(FieldViolation(where, f"{shown(part)} is not an object"))
            continue
        fields = Fields(part, violations, where)
        kind = fields.value("type")
        if kind != "text":
            fields.refuse("type", f"{shown(kind)} is not supported here, only 'text' is")
            continue
        if not fields.has("text"):
            fields.refuse("text", "is missing")
        texts.append(fields.text("text") or "")
        fields.finish()
    return "\n".join(texts)
