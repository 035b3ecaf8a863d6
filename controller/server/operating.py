"""The operators' service: what changes the cluster, for those who may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phalanx.protos.errors import InvalidArgument, PermissionDenied
from phalanx.protos.v1 import admin_pb2, admin_pb2_grpc

from .convert import unknown_fields


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Errors are raised as `PhalanxError`.

    may_operate: whether the caller behind a call's context is an operator. restart: replaces all
    replicas; returns how many. scale: how many there are to be; returns how many were wanted before.
    """

    def __init__(
        self,
        may_operate: Callable[[Any], bool],
        restart: Callable[[], int],
        scale: Callable[[int], int],
    ) -> None:
        self._may_operate, self._restart, self._scale = may_operate, restart, scale

    async def RestartReplicas(
        self, request: admin_pb2.RestartReplicasRequest, context: Any
    ) -> admin_pb2.RestartReplicasResponse:
        """Begin a rolling restart."""
        self._check(request, context)
        return admin_pb2.RestartReplicasResponse(replicas=self._restart())

    async def ScaleReplicas(
        self, request: admin_pb2.ScaleReplicasRequest, context: Any
    ) -> admin_pb2.ScaleReplicasResponse:
        """Begin to let replicas join or leave."""
        self._check(request, context)
        return admin_pb2.ScaleReplicasResponse(before=self._scale(request.replicas))

    def _check(self, request: Any, context: Any) -> None:
        if not self._may_operate(context):
            raise PermissionDenied("this call is for operators")
        if violations := unknown_fields(request):
            raise InvalidArgument(violations)
