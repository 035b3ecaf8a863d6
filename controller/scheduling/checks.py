"""What a request must satisfy before the scheduler takes it, whoever has checked it before."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.protos.errors import FieldViolation, InvalidArgument, PhalanxError, RequestFailed
from phalanx.protos.steps import SequenceFailure

from .request import Request

TOKEN_IDS = 2**31
"""Every vocabulary is smaller. The door knows the real one and has checked it."""


def check_group(group: Sequence[Request], context: int) -> None:
    """Raise `InvalidArgument` unless these are samples of one request that can be computed.

    context: tokens that one sample may have at most.
    """
    if not group:
        raise InvalidArgument.of("n", "0 samples, at least 1 needed")
    first = group[0]
    if any(
        request.request_id != first.request_id
        or request.prompt_token_ids != first.prompt_token_ids
        or request.tenant != first.tenant
        for request in group
    ):
        raise InvalidArgument.of("request_id", f"{first.request_id!r} names different requests")
    indexes = [request.sample_index for request in group]
    if len(set(indexes)) < len(indexes):
        raise InvalidArgument.of("sample_index", f"{indexes} holds an index twice")
    violations = _prompt_violations(first.prompt_token_ids, context)
    violations += [
        violation for request in group for violation in _output_violations(request, context)
    ]
    if violations:
        raise InvalidArgument(violations)
    for request in group:
        request.params.validate(TOKEN_IDS)


def _prompt_violations(token_ids: Sequence[int], context: int) -> list[FieldViolation]:
    size = len(token_ids)
    if not 0 < size < context:
        allowed = f"1 to {context - 1} allowed, so that a token fits behind them"
        return [FieldViolation("prompt_token_ids", f"{size} tokens, {allowed}")]
    if min(token_ids) < 0 or max(token_ids) >= TOKEN_IDS:
        text = f"a token id lies outside [0, {TOKEN_IDS})"
        return [FieldViolation("prompt_token_ids", text)]
    return []


def _output_violations(request: Request, context: int) -> list[FieldViolation]:
    """A sample that goes on elsewhere must not have ended yet."""
    size = len(request.output_token_ids)
    room = context - len(request.prompt_token_ids)
    allowed = min(room, request.params.max_tokens or room)
    if size and size >= allowed:
        text = f"{size} tokens are known already, the sample ends at {allowed}"
        return [FieldViolation("output_token_ids", text)]
    return []


def error_of(failure: SequenceFailure) -> PhalanxError:
    """What the caller is told of a failure on the ranks."""
    if failure.field:
        return InvalidArgument.of(failure.field, failure.message)
    return RequestFailed(failure.message)
