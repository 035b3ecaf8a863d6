"""The standard health service, grpc.health.v1, with one state for all that is served here."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """NOT_SERVING until told otherwise. Watchers are told of every change, and let go at `close`."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._known = ("", *services)
        self._status = NOT_SERVING
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """The state now."""
        return bool(self._status == SERVING)

    def set_serving(self, serving: bool) -> None:
        """Change the state; without effect after `close`."""
        if not self._closed:
            self._tell(SERVING if serving else NOT_SERVING)

    def close(self) -> None:
        """NOT_SERVING for good; streams of watchers end."""
        self._closed = True
        self._tell(NOT_SERVING)

    def _tell(self, status: int) -> None:
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:
        """The state now; NOT_FOUND for other services."""
        if request.service not in self._known:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this service is not served here")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: Any, context: Any) -> None:
        """The state now and at every change."""
        known = request.service in self._known
        sent = None
        while True:
            changed, closed = self._changed, self._closed
            status = self._status if known else SERVICE_UNKNOWN
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if closed:
                return
            await changed.wait()
