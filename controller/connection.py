"""How a Python client reaches a server: address, locks, channel, and its open streams."""

from __future__ import annotations

import re
import threading
from typing import Any, ClassVar

import grpc
from grpc_health.v1 import health_pb2_grpc

from phalanx.protos.errors import ConfigError, PhalanxError
from phalanx.protos.limits import MAX_MESSAGE_BYTES
from phalanx.protos.status import decode
from phalanx.protos.v1 import admin_pb2_grpc, serving_pb2, serving_pb2_grpc

from .resuming import Resuming
from .wakeups import gathered

RECONNECT_S = 300.0
LEAVE_S = 2.0
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 15_000),  # a connection that was cut is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
)


def typed(error: grpc.RpcError) -> PhalanxError:
    """The typed error of a failed call."""
    call: Any = error
    trailers = [(key, value) for key, value in call.trailing_metadata() or ()]
    return decode(call.code(), call.details() or "", trailers)


def _stub(channel: Any) -> Any:
    return serving_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]


def _admin_stub(channel: Any) -> Any:
    return admin_pb2_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]


class Connection:
    """How to reach a server: what both clients are told, and their channel."""

    _library: ClassVar[Any]
    """`grpc` or `grpc.aio`."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        root_certificates: bytes | None = None,
        certificate: bytes | None = None,
        private_key: bytes | None = None,
        server_name: str | None = None,
        timeout: float | None = None,
        retries: int = 0,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        self.address, self.timeout, self.retries = address, timeout, retries
        self.reconnect_s = reconnect_s
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise ConfigError("token: allowed are printable ASCII characters without spaces")
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        options: list[tuple[str, Any]] = list(OPTIONS)
        if server_name is not None:
            options.append(("grpc.ssl_target_name_override", server_name))
        with gathered():
            if root_certificates is None and certificate is None:
                self._channel = self._library.insecure_channel(address, options)
            else:
                credentials = grpc.ssl_channel_credentials(
                    root_certificates, private_key, certificate
                )
                self._channel = self._library.secure_channel(address, credentials, options)
        self._stub, self._admin = _stub(self._channel), _admin_stub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._calls: dict[Any, Resuming] = {}
        """Open streams."""
        self._lock = threading.Lock()
        self._met = False
        """Whether the server has answered anything."""

    def _call_options(self) -> dict[str, Any]:
        return {"timeout": self.timeout, "metadata": self._metadata}

    def _resuming(self, request: Any) -> Resuming:
        return Resuming(
            request,
            timeout=self.timeout,
            retries=self.retries,
            reconnect_s=self.reconnect_s,
            met=self._met,
        )

    def _begin(self, stream: Resuming) -> Any:
        """The stream's next call."""
        method, request = stream.call()
        call = getattr(self._stub, method)(request, timeout=stream.left(), metadata=self._metadata)
        with self._lock:
            self._calls[call] = stream
        return call

    def _end(self, call: Any) -> None:
        call.cancel()
        with self._lock:
            self._calls.pop(call, None)

    def _leave(self, stream: Resuming) -> Any:
        """Tell the server that nobody will come back for the request; it would wait for a while."""
        request = serving_pb2.AbortRequest(request_id=stream.request_id)
        return request, {"timeout": LEAVE_S, "metadata": self._metadata}
