"""The gRPC server around the service: its address, its locks, its beginning and its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.controller.units import is_loopback
from phalanx.controller.vllm.service import SERVICE as VLLM_ENGINE
from phalanx.controller.vllm.service import VllmEngineService
from phalanx.controller.wakeups import gathered
from phalanx.protos.errors import ConfigError
from phalanx.protos.kserve import open_inference_pb2, open_inference_pb2_grpc
from phalanx.protos.limits import (
    MAX_CONCURRENT_CALLS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
)
from phalanx.protos.v1 import admin_pb2, admin_pb2_grpc, serving_pb2, serving_pb2_grpc

from .health import HealthService
from .interceptors import Containment
from .kserve import SERVICE as OPEN_INFERENCE
from .kserve import OpenInferenceService
from .listeners import Listener, authentication, encryption
from .operating import AdminService
from .reflection import Descriptors
from .rights import DEFAULT_TENANT
from .security import Keys, TlsFiles, TokenFile, check_exposure, server_credentials
from .service import InferenceService
from .watched import CHECK_S

ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
SERVICE = serving_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
LAST_WORDS_S = 0.5
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # calls are bounded by `Containment`, which says when to come back; the library would refuse
    # those beyond its own bounds without a word, so these are out of reach
    ("grpc.max_concurrent_streams", 4 * MAX_CONCURRENT_CALLS),
    ("grpc.server.max_pending_requests", 4 * MAX_CONCURRENT_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 4 * MAX_CONCURRENT_CALLS),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error
    ("grpc.keepalive_time_ms", 30_000),  # a caller that vanished is noticed, and its KV freed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class GrpcHost:
    """Serves `service` on `host`:`port` (0 takes a free one).

    With `token_file`, every call but health checks needs a bearer token, and its line names the
    tenant; with `tls_client_ca` alone, the tenant is the common name of the caller's certificate.
    Raises `ConfigError` for an address that other machines reach without both TLS and one of
    these, unless `insecure`. `vllm_protocol` needs the package smg-grpc-proto.
    Files of tokens and certificates are looked at every `check_s` seconds. Create and use it on one running event loop.
    """

    def __init__(
        self,
        service: InferenceService,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_client_ca: str | None = None,
        token_file: str | None = None,
        insecure: bool = False,
        reflection: bool = False,
        operators: Collection[str] = (),
        restart: Callable[[], int] | None = None,
        scale: Callable[[int], int] | None = None,
        vllm_protocol: bool = False,
        check_s: float = CHECK_S,
    ) -> None:
        """operators: tenants who may call the `AdminService`, beside tokens of the role admin;
        where callers are not known, all of this machine may. restart and scale: what its `RestartReplicas` and `ScaleReplicas` do;
        None: there is no such service."""
        self._service, self._host, self._port = service, host, port
        self._files = TlsFiles.of(tls_cert, tls_key, tls_client_ca)
        self._credentials = (
            None if self._files is None else server_credentials(self._files, check_s=check_s)
        )
        self._tokens: Keys | None = (
            None
            if token_file is None
            else TokenFile(token_file, operators=operators, check_s=check_s)
        )
        known = self._tokens is not None or tls_client_ca is not None
        encrypted = self._credentials is not None
        check_exposure(host, encrypted=encrypted, authenticated=known, insecure=insecure)
        service.identify = self._tenant
        self._operators = frozenset(operators) if known else None
        self._admin = None
        if restart is not None and scale is not None:
            self._admin = AdminService(self._may_operate, restart, scale)
        more = (VLLM_ENGINE,) if vllm_protocol else ()
        self._health = HealthService((SERVICE, OPEN_INFERENCE, *more))
        self._vllm_engine = (
            VllmEngineService(service, lambda: self._health.serving) if vllm_protocol else None
        )
        self._open_inference = OpenInferenceService(service, lambda: self._health.serving)
        self._server: Any = None
        self._reflection = reflection
        self.address = ""
        """Where it listens, "host:port", once started."""

    async def start(self) -> None:
        """Bind and answer. Health says NOT_SERVING until `set_serving(True)`.

        Raises `ConfigError` when the address cannot be bound.
        """
        calls: Any = Containment(MAX_CONCURRENT_CALLS, self._tokens)
        add: Any = serving_pb2_grpc.add_InferenceServiceServicer_to_server
        add(self._service, calls)
        add = open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
        add(self._open_inference, calls)
        if self._admin is not None:
            add = admin_pb2_grpc.add_AdminServiceServicer_to_server
            add(self._admin, calls)
        if self._vllm_engine is not None:
            calls.add_generic_rpc_handlers((self._vllm_engine.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, calls)
        if self._reflection:
            self._add_reflection(calls)
        with gathered():
            server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((calls,))
        self.address = self._bind(server)
        await server.start()
        self._server = server

    @property
    def listener(self) -> Listener:
        """What listens here."""
        served = ["phalanx.v1", "Open Inference Protocol"]
        served += ["vLLM engine"] if self._vllm_engine is not None else []
        return Listener(
            self.address,
            f"gRPC: {', '.join(served)}",
            encryption(self._files),
            authentication(self._tokens is not None, self._files),
        )

    def set_serving(self, serving: bool) -> None:
        """What health checks are told. The calls themselves are not affected."""
        self._health.set_serving(serving)

    async def stop(self, grace_s: float = 30.0) -> None:
        """Say NOT_SERVING, refuse new requests, let running ones finish for `grace_s` seconds,
        end the rest with UNAVAILABLE, and close the port."""
        self._health.set_serving(False)
        await self._service.drain(grace_s)
        self._health.close()
        if self._server is not None:
            await self._server.stop(LAST_WORDS_S)
        self._service.close()

    def _bind(self, server: Any) -> str:
        bare = self._host.strip("[]")
        shown = f"[{bare}]" if ":" in bare else bare
        wanted = f"{shown}:{self._port}"
        port = 0
        with contextlib.suppress(RuntimeError):
            if self._credentials is None:
                port = server.add_insecure_port(wanted)
            else:
                port = server.add_secure_port(wanted, self._credentials)
        if port == 0:
            raise ConfigError(
                f"{wanted} cannot be bound: the port is taken or the host is not here"
            )
        return f"{shown}:{port}"

    def _add_reflection(self, calls: Any) -> None:
        from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        own = [SERVICE, OPEN_INFERENCE, *([ADMIN] if self._admin else [])]
        names = [*own, health, reflection.SERVICE_NAME]
        # another software's messages of the same names may be in the default pool
        pools = [open_inference_pb2.DESCRIPTOR.pool, serving_pb2.DESCRIPTOR.pool]
        if self._vllm_engine is not None:
            names.append(VLLM_ENGINE)
            pools.append(self._vllm_engine.descriptors)
        servicer = reflection.aio.ReflectionServicer(names, pool=Descriptors(pools))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, calls)

    def _may_operate(self, context: Any) -> bool:
        if self._tokens is not None:
            caller = self._tokens.caller(context.invocation_metadata() or ())
            return caller.role == "admin"
        if self._operators is None:
            return is_loopback(self._host)
        return self._tenant(context) in self._operators

    def _tenant(self, context: Any) -> str:
        if self._tokens is not None:
            return self._tokens.caller(context.invocation_metadata() or ()).tenant
        names = context.auth_context().get("x509_common_name", ())
        return next((name.decode(errors="replace") for name in names), DEFAULT_TENANT)
