"""Tensors of the Open Inference Protocol: which ones there are, read and written.

Names, datatypes and shapes are those of Triton's vLLM backend. A tensor's elements are either in
the message's raw contents (little-endian; each element of BYTES after its length in 4 bytes) or in
the typed field of its datatype.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.protos.errors import FieldViolation
from phalanx.protos.kserve import open_inference_pb2 as pb

Violations = list[FieldViolation]
SHOWN = 80


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of one dimension; size -1: one element per sample."""

    name: str
    datatype: str
    size: int = 1
    optional: bool = True


INPUTS = (
    TensorSpec("text_input", "BYTES", optional=False),
    TensorSpec("stream", "BOOL"),
    TensorSpec("sampling_parameters", "BYTES"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("return_finish_reason", "BOOL"),
    TensorSpec("return_cumulative_logprob", "BOOL"),
    TensorSpec("return_logprobs", "BOOL"),
    TensorSpec("return_num_input_tokens", "BOOL"),
    TensorSpec("return_num_output_tokens", "BOOL"),
)
OUTPUTS = (
    TensorSpec("text_output", "BYTES", -1),
    TensorSpec("finish_reason", "BYTES", -1),
    TensorSpec("cumulative_logprob", "FP32", -1),
    TensorSpec("logprobs", "BYTES", -1),
    TensorSpec("num_input_tokens", "UINT32"),
    TensorSpec("num_output_tokens", "UINT32", -1),
)
_INPUTS = {spec.name: spec for spec in INPUTS}
_OUTPUTS = {spec.name: spec for spec in OUTPUTS}
_FIELDS = {
    "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
    "UINT32": "uint_contents",
    "FP32": "fp32_contents",
}
CONFIG_TYPES = {
    "BOOL": pb.TYPE_BOOL,
    "BYTES": pb.TYPE_STRING,
    "UINT32": pb.TYPE_UINT32,
    "FP32": pb.TYPE_FP32,
}


class _Malformed(ValueError):
    """Contents that are no element of their datatype; the text says why."""


def read_inputs(request: pb.ModelInferRequest, violations: Violations) -> dict[str, Any]:
    """The inputs by name, bytes or bool; what is wrong with the others is added to `violations`."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        text = f"{len(raw)} entries for {len(request.inputs)} inputs, one each or none allowed"
        violations.append(FieldViolation("raw_input_contents", text))
        return {}
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for index, tensor in enumerate(request.inputs):
        spec = _INPUTS.get(tensor.name)
        if spec is None:
            text = f"{tensor.name!r:.{SHOWN}} is not one of {', '.join(_INPUTS)}"
            violations.append(FieldViolation(f"inputs[{index}].name", text))
            continue
        wrong = "is given twice" if tensor.name in seen else _misdescribed(tensor, spec)
        seen.add(tensor.name)
        if not wrong:
            try:
                values[tensor.name] = _element(tensor, spec, raw[index] if raw else None)
            except _Malformed as error:
                wrong = str(error)
        if wrong:
            violations.append(FieldViolation(tensor.name, wrong))
    for spec in INPUTS:
        if not spec.optional and spec.name not in seen:
            text = f"is missing, a {spec.datatype} tensor of shape [1] is needed"
            violations.append(FieldViolation(spec.name, text))
    return values


def _misdescribed(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec) -> str:
    if tensor.datatype != spec.datatype:
        return f"datatype {tensor.datatype!r:.{SHOWN}}, {spec.datatype!r} allowed"
    if list(tensor.shape) != [1]:
        return f"shape {list(tensor.shape)!r:.{SHOWN}}, [1] allowed"
    if tensor.parameters:
        names = ", ".join(sorted(tensor.parameters))
        return f"parameters {names!r:.{SHOWN}}, none allowed; shared memory is not offered"
    return ""


def _element(
    tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, raw: bytes | None
) -> bytes | bool:
    if raw is None:
        return _typed_element(tensor.contents, spec)
    if tensor.HasField("contents"):
        raise _Malformed("has contents beside raw_input_contents, one of them allowed")
    if spec.datatype == "BOOL":
        if raw not in (b"\0", b"\1"):
            raise _Malformed(f"{len(raw)} bytes of raw contents, one byte of 0 or 1 allowed")
        return raw == b"\1"
    size = int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or size != len(raw) - 4:
        raise _Malformed(
            f"{len(raw)} bytes of raw contents are not one element after its length in 4 bytes"
        )
    return raw[4:]


def _typed_element(contents: pb.InferTensorContents, spec: TensorSpec) -> bytes | bool:
    wanted = _FIELDS[spec.datatype]
    for field, _ in contents.ListFields():
        if field.name != wanted:
            raise _Malformed(f"has {field.name}, {wanted} allowed")
    values: Sequence[bytes | bool] = getattr(contents, wanted)
    if len(values) != 1:
        raise _Malformed(f"{len(values)} elements in {wanted}, 1 allowed")
    return values[0]


def asked_outputs(
    request: pb.ModelInferRequest, made: Sequence[str], violations: Violations
) -> tuple[str, ...]:
    """Names of the outputs to send: those asked for, all that are made when none is."""
    for index, output in enumerate(request.outputs):
        field = f"outputs[{index}]"
        if output.name not in _OUTPUTS:
            text = f"{output.name!r:.{SHOWN}} is not one of {', '.join(_OUTPUTS)}"
            violations.append(FieldViolation(f"{field}.name", text))
        elif output.name not in made:
            text = f"{output.name!r} is made when the input 'return_{output.name}' is true"
            violations.append(FieldViolation(f"{field}.name", text))
        if output.parameters:
            given = ", ".join(sorted(output.parameters))
            text = f"{given!r:.{SHOWN}}, none allowed; shared memory is not offered"
            violations.append(FieldViolation(f"{field}.parameters", text))
    names = [output.name for output in request.outputs]
    if len(set(names)) < len(names):
        violations.append(FieldViolation("outputs", "an output is asked for twice"))
    return tuple(names or made)


def add_output(
    response: pb.ModelInferResponse, name: str, values: Sequence[Any], *, raw: bool
) -> None:
    """Append an output of shape [len(values)]."""
    spec = _OUTPUTS[name]
    tensor = response.outputs.add(name=name, datatype=spec.datatype, shape=[len(values)])
    if raw:
        response.raw_output_contents.append(_packed(values, spec.datatype))
    else:
        getattr(tensor.contents, _FIELDS[spec.datatype]).extend(values)


def _packed(values: Sequence[Any], datatype: str) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    return struct.pack(f"<{len(values)}{'f' if datatype == 'FP32' else 'I'}", *values)
