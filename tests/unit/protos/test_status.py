"""Every typed error survives its way over gRPC."""

from __future__ import annotations

import grpc
import pytest

from phalanx.protos.errors import (
    AlreadyExists,
    ConfigError,
    DeadlineExceeded,
    FieldViolation,
    GroupLost,
    InvalidArgument,
    ModelError,
    NotFound,
    PhalanxError,
    RequestFailed,
    ResourceExhausted,
    SetAside,
    Unauthenticated,
    Unavailable,
)
from phalanx.protos.status import decode, encode


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeadlineExceeded("late"), DeadlineExceeded),
        (NotFound("gone"), NotFound),
        (AlreadyExists("taken"), AlreadyExists),
        (Unauthenticated("who"), Unauthenticated),
        (Unavailable("not yet"), Unavailable),
        (GroupLost("rank 1"), Unavailable),
        (RequestFailed("NaN"), RequestFailed),
        (ModelError("no template"), ModelError),
        (ConfigError("no"), ModelError),
        (SetAside("no"), SetAside),
        (PhalanxError("odd"), RequestFailed),
    ],
)
def test_kinds_and_texts(error: PhalanxError, kind: type[PhalanxError]) -> None:
    code, text, trailers = encode(error)
    assert code.name == error.status
    back = decode(code, text, trailers)
    assert type(back) is kind
    assert str(back) == str(error)


def test_violations() -> None:
    violations = [FieldViolation("a.b", "1 is wrong"), FieldViolation("c", "東京")]
    back = decode(*encode(InvalidArgument(violations)))
    assert isinstance(back, InvalidArgument)
    assert back.violations == violations


@pytest.mark.parametrize("seconds", [0.0, 0.05, 1.5, 3600.0])
def test_retry_times(seconds: float) -> None:
    back = decode(*encode(ResourceExhausted("full", seconds)))
    assert isinstance(back, ResourceExhausted)
    assert back.retry_after_s == seconds
    assert str(back) == "full"


def test_trailers_stay_small() -> None:
    """Clients refuse trailers beyond 8 KiB, text and details together."""
    violations = [FieldViolation(f"field[{index}]" * 20, "é" * 3000) for index in range(400)]
    code, text, trailers = encode(InvalidArgument(violations))
    size = len(text.encode()) * 3 + sum(len(key) + len(value) * 4 // 3 for key, value in trailers)
    assert size < 8000
    back = decode(code, text, trailers)
    assert isinstance(back, InvalidArgument)
    assert back.violations[0].field == "field[0]" * 20
    assert back.violations[-1].description.endswith("more violations")


def test_statuses_of_others() -> None:
    """gRPC itself and proxies send statuses without details, or with broken ones."""
    assert isinstance(decode(grpc.StatusCode.INVALID_ARGUMENT, "bad", ()), InvalidArgument)
    broken = (("grpc-status-details-bin", b"\xff\xff"),)
    assert str(decode(grpc.StatusCode.INVALID_ARGUMENT, "bad", broken)) == "request: bad"
    too_large = "Received message larger than max (5 vs. 4)"
    assert isinstance(decode(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large, ()), InvalidArgument)
    crowded = decode(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", ())
    assert isinstance(crowded, ResourceExhausted)
    assert crowded.retry_after_s > 0
    odd = decode(grpc.StatusCode.DATA_LOSS, "hm", ())
    assert type(odd) is PhalanxError
    assert str(odd) == "DATA_LOSS: hm"
