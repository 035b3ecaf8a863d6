"""One inference request of the Open Inference Protocol: what it asks for, and its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from phalanx.protos.errors import FieldViolation, InvalidArgument
from phalanx.protos.kserve import open_inference_pb2 as pb
from phalanx.protos.limits import MAX_MESSAGE_BYTES, MAX_REQUEST_ID_CHARS
from phalanx.protos.v1 import serving_pb2, types_pb2

from .convert import unknown_fields
from .kserve_params import TENSOR, parse, read_parameters
from .kserve_tensors import OUTPUTS, SHOWN, Violations, add_output, asked_outputs, read_inputs

FINAL = "triton_final_response"
EMPTY_FINAL = "triton_enable_empty_final_response"
NOT_OFFERED = ("sequence_id", "sequence_start", "sequence_end", "priority")
VERSION = "1"
MAX_ANSWER_BYTES = MAX_MESSAGE_BYTES - 64 * 1024  # leaves room for what surrounds the tensors

_REASONS = {
    types_pb2.FINISH_REASON_UNSPECIFIED: b"None",
    types_pb2.FINISH_REASON_STOP: b"stop",
    types_pb2.FINISH_REASON_LENGTH: b"length",
    types_pb2.FINISH_REASON_ABORT: b"abort",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was read."""

    request: serving_pb2.GenerateRequest
    id: str
    """The caller's name for it, which need not be unique."""
    stream: bool
    """Answers as text comes, not one at the end."""
    with_input: bool
    """The text begins with the prompt."""
    outputs: tuple[str, ...]
    raw: bool
    """Whether tensors are in raw contents."""
    timeout_s: float | None
    params_field: str
    """Where the sampling parameters were."""


def read_request(request: pb.ModelInferRequest, *, streaming: bool) -> Asked:
    """Raises `InvalidArgument` with all that is wrong, but for what the service itself checks.

    streaming: whether the call can carry several answers.
    """
    violations = unknown_fields(request)
    if len(request.id) > MAX_REQUEST_ID_CHARS:
        text = f"{len(request.id)} characters, at most {MAX_REQUEST_ID_CHARS} allowed"
        violations.append(FieldViolation("id", text))
    inputs = read_inputs(request, violations)
    stream = inputs.get("stream", False)
    if stream and not streaming:
        violations.append(FieldViolation("stream", "true is for ModelStreamInfer, false allowed"))
    with_input = not inputs.get("exclude_input_in_output", stream)
    if stream and with_input:
        text = "false is for one answer, true allowed when 'stream' is true"
        violations.append(FieldViolation("exclude_input_in_output", text))
    timeout_s, others = _parameters(request, violations)
    field = TENSOR if TENSOR in inputs or not others else "parameters"
    if TENSOR in inputs:
        _refuse_all(others, violations)
        others = parse(inputs[TENSOR], violations)
    params = read_parameters(others, field, violations)
    wanted = {name for name, value in inputs.items() if name.startswith("return_") and value}
    if wanted & {"return_logprobs", "return_cumulative_logprob"} and not params.HasField(
        "logprobs"
    ):
        params.logprobs = 0
    made = [
        spec.name
        for spec in OUTPUTS
        if spec.name == "text_output" or f"return_{spec.name}" in wanted
    ]
    outputs = asked_outputs(request, made, violations)
    text = _text(inputs, violations)
    if violations:
        raise InvalidArgument(violations)
    return Asked(
        request=serving_pb2.GenerateRequest(text=text, params=params),
        id=request.id,
        stream=stream,
        with_input=with_input,
        outputs=outputs,
        raw=bool(request.raw_input_contents),
        timeout_s=timeout_s,
        params_field=field,
    )


def _text(inputs: dict[str, Any], violations: Violations) -> str:
    try:
        return str(inputs.get("text_input", b"").decode())
    except UnicodeDecodeError as error:
        text = f"is not UTF-8: byte {error.start} is {inputs['text_input'][error.start]:#04x}"
        violations.append(FieldViolation("text_input", text))
        return ""


def _parameters(
    request: pb.ModelInferRequest, violations: Violations
) -> tuple[float | None, dict[str, Any]]:
    """The timeout in seconds, and the parameters that are not the protocol's."""
    values: dict[str, Any] = {}
    for key, item in sorted(request.parameters.items()):
        choice = item.WhichOneof("parameter_choice")
        values[key] = None if choice is None else getattr(item, choice)
    for key in NOT_OFFERED:
        if key in values:
            del values[key]
            text = "is not offered: requests are independent, in the order of their arrival"
            violations.append(FieldViolation(f"parameters.{key}", text))
    if not isinstance(values.pop(EMPTY_FINAL, False), bool):
        violations.append(FieldViolation(f"parameters.{EMPTY_FINAL}", "is not true or false"))
    micros = values.pop("timeout", 0)
    if isinstance(micros, bool) or not isinstance(micros, int) or micros < 0:
        text = f"{micros!r:.{SHOWN}} is not a number of microseconds"
        violations.append(FieldViolation("parameters.timeout", text))
        return None, values
    return micros / 1e6 if micros else None, values


def _refuse_all(others: Iterable[str], violations: Violations) -> None:
    for key in others:
        text = f"is not known here; sampling parameters are either all in {TENSOR} or all here"
        violations.append(FieldViolation(f"parameters.{key:.{SHOWN}}", text))


class Reply:
    """Turns the service's messages for one request into answers of this protocol."""

    def __init__(self, asked: Asked, model_name: str) -> None:
        self._asked, self._model_name = asked, model_name
        count = asked.request.params.n if asked.request.params.HasField("n") else 1
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._held = 0
        if asked.with_input:
            for texts in self._texts:
                texts.append(asked.request.text)
            self._held = count * len(asked.request.text.encode())
        self._scores: list[list[str]] = [[] for _ in range(count)]
        self._tokens = [0] * count
        self._sums = [0.0] * count
        self._reasons = [b"None"] * count

    def fold(self, message: serving_pb2.GenerateResponse) -> pb.ModelInferResponse | None:
        """Take in a message. An answer when it is time for one; of a stream, what is new.

        Raises `InvalidArgument` when the answer is too large for a message.
        """
        for delta in message.samples:
            self._texts[delta.index].append(delta.text)
            self._held += len(delta.text.encode())
            self._tokens[delta.index] += len(delta.token_ids)
            for position in delta.logprobs:
                self._sums[delta.index] += position.token.logprob
                if "logprobs" in self._asked.outputs:
                    self._scores[delta.index].append(_scores(position))
                    self._held += len(self._scores[delta.index][-1]) + 2
            if delta.finish_reason:
                self._reasons[delta.index] = _REASONS[delta.finish_reason]
        if self._held > MAX_ANSWER_BYTES:
            text = f"an answer of over {MAX_ANSWER_BYTES} bytes fits no message; true allowed"
            raise InvalidArgument.of("stream", text)
        final = message.HasField("usage")
        if not (final or self._asked.stream):
            return None
        values: dict[str, list[Any]] = {
            "text_output": ["".join(texts).encode() for texts in self._texts],
            "finish_reason": self._reasons,
            "cumulative_logprob": self._sums,
            "logprobs": [f"[{', '.join(scores)}]".encode() for scores in self._scores],
            "num_output_tokens": self._tokens,
        }
        if final:
            values["num_input_tokens"] = [message.usage.prompt_tokens]
        response = self._response(values, final)
        count = len(self._texts)
        self._texts, self._scores = [[] for _ in range(count)], [[] for _ in range(count)]
        self._tokens, self._held = [0] * count, 0
        return response

    def _response(self, values: dict[str, list[Any]], final: bool) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(
            model_name=self._model_name, model_version=VERSION, id=self._asked.id
        )
        response.parameters[FINAL].bool_param = final
        for name in self._asked.outputs:
            if name in values:
                add_output(response, name, values[name], raw=self._asked.raw)
        return response


def _scores(position: types_pb2.PositionLogprobs) -> str:
    """JSON of a token and its alternatives by id, as vLLM's backend writes them; ASCII."""
    scores = {
        str(item.token_id): {
            "logprob": item.logprob,
            "rank": item.rank,
            "decoded_token": item.text,
        }
        for item in (position.token, *position.top)
    }
    return json.dumps(scores)


def failure(request_id: str, status: str, text: str) -> pb.ModelStreamInferResponse:
    """An error as the last answer to a request of a stream."""
    response = pb.ModelStreamInferResponse(error_message=f"[{status}] {text}")
    response.infer_response.id = request_id[:MAX_REQUEST_ID_CHARS]
    response.infer_response.parameters[FINAL].bool_param = True
    return response
