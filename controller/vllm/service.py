"""`vllm.grpc.engine.VllmEngine` over the inference service.

Its messages come with the package `smg-grpc-proto`, which is needed only where this is served.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import grpc

from phalanx.controller.cluster.snapshot import ClusterSnapshot
from phalanx.controller.server.service import InferenceService
from phalanx.protos.errors import ConfigError, FieldViolation, InvalidArgument
from phalanx.protos.v1 import serving_pb2

from .answers import Answers
from .bundle import CHUNK_BYTES, tokenizer_bundle
from .requests import in_their_names, read_request

SERVICE = "vllm.grpc.engine.VllmEngine"
MAX_ABORTED_IDS = 1024


def load_messages() -> tuple[Any, Any]:
    """The protocol's modules of messages: its own and those it shares. Raises `ConfigError`."""
    try:
        from smg_grpc_proto import vllm_engine_pb2
        from smg_grpc_proto.generated import common_pb2
    except ImportError:
        raise ConfigError(
            "vllm_protocol needs the package smg-grpc-proto: pip install 'phalanx[gateway]'"
        ) from None
    return vllm_engine_pb2, common_pb2


class VllmEngineService:
    """Serves the model of `service`. `ready`: what health checks are told."""

    def __init__(self, service: InferenceService, ready: Callable[[], bool]) -> None:
        self._pb, self._common = load_messages()
        self._service, self._ready = service, ready
        self._engine, self._model = service.engine, service.model
        self._began = time.monotonic()
        self._bundle: asyncio.Future[tuple[bytes, str]] | None = None

    def handlers(self) -> grpc.GenericRpcHandler:
        """The calls that are served; others of the protocol are UNIMPLEMENTED."""
        messages = {
            item.name: item for item in self._pb.DESCRIPTOR.services_by_name["VllmEngine"].methods
        }
        found = {}
        for name in _METHODS:
            asked = messages[name].input_type._concrete_class
            answered = messages[name].output_type._concrete_class
            streams = messages[name].server_streaming
            make = (
                grpc.unary_stream_rpc_method_handler
                if streams
                else grpc.unary_unary_rpc_method_handler
            )
            found[name] = make(getattr(self, name), asked.FromString, answered.SerializeToString)
        return grpc.method_handlers_generic_handler(SERVICE, found)

    @property
    def descriptors(self) -> Any:
        """The pool that reflection finds the protocol in."""
        return self._pb.DESCRIPTOR.pool

    async def Generate(self, request: Any, context: Any) -> None:
        """Continue a prompt."""
        asked = read_request(request)
        answers = Answers(self._pb, request)
        reader = _Reader(answers, context)
        try:
            await self._service.generate(asked, reader, self._service.identify(context))
        except InvalidArgument as error:
            raise in_their_names(error) from None

    async def Abort(self, request: Any, context: Any) -> Any:
        """End the caller's own requests; ids that are not running are no error."""
        if len(request.request_ids) > MAX_ABORTED_IDS:
            text = f"{len(request.request_ids)} entries, at most {MAX_ABORTED_IDS} allowed"
            raise InvalidArgument([FieldViolation("request_ids", text)])
        for request_id in request.request_ids:
            self._engine.abort(request_id, self._service.identify(context))
        return self._pb.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        """As grpc.health.v1 says."""
        ready = self._ready()
        message = "" if ready else "no replica is ready, or the server is shutting down"
        return self._pb.HealthCheckResponse(healthy=ready, message=message)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        """What is served."""
        model = self._model
        ids = {
            role: model.tokenizer.token_to_id(model.special_tokens.get(role, ""))
            for role in ("pad_token", "bos_token")
        }
        return self._pb.GetModelInfoResponse(
            model_path=model.name,
            tokenizer_path=model.name,
            served_model_name=model.name,
            is_generation=True,
            max_context_length=model.max_context,
            max_req_input_len=model.max_context - 1,
            vocab_size=model.spec.vocab_size,
            model_type=model.spec.family,
            eos_token_ids=model.eos_token_ids,
            pad_token_id=ids["pad_token"] or 0,
            bos_token_id=ids["bos_token"] or 0,
        )

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        """The server as one engine, whatever its replicas."""
        snapshot = self._engine.snapshot()
        return self._pb.GetServerInfoResponse(
            active_requests=_active(snapshot),
            uptime_seconds=time.monotonic() - self._began,
            server_type="vllm-grpc",
            data_parallel_size=1,
            model_dtype=self._service.dtype,
            block_size=max((item.kv_block_tokens for item in snapshot.replicas), default=0),
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: Any, context: Any) -> Any:
        """All replicas together, as one engine."""
        snapshot = self._engine.snapshot()
        return self._pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=version("phalanx"),
            dp_rank_count=1,
            loads=[self._load(snapshot)],
        )

    def _load(self, snapshot: ClusterSnapshot) -> Any:
        running = sum(item.running_requests for item in snapshot.replicas)
        waiting = snapshot.queued_requests
        total = sum(item.kv_blocks_total * item.kv_block_tokens for item in snapshot.replicas)
        free = sum(item.kv_blocks_free * item.kv_block_tokens for item in snapshot.replicas)
        asked = sum(item.prefix_queried_tokens for item in snapshot.replicas)
        found = sum(item.prefix_hit_tokens for item in snapshot.replicas)
        return self._pb.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            num_used_tokens=total - free,
            max_total_num_tokens=total,
            token_usage=(total - free) / total if total else 0.0,
            cache_hit_rate=found / asked if asked else 0.0,
        )

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The tokenizer's files as a zip archive; the last chunk has its SHA-256."""
        if self._bundle is None:
            self._bundle = asyncio.ensure_future(asyncio.to_thread(tokenizer_bundle, self._model))
        data, digest = await asyncio.shield(self._bundle)
        for start in range(0, len(data), CHUNK_BYTES):
            last = start + CHUNK_BYTES >= len(data)
            yield self._common.GetTokenizerChunk(
                data=data[start : start + CHUNK_BYTES], sha256=digest if last else ""
            )


_METHODS = (
    "Generate",
    "Abort",
    "HealthCheck",
    "GetModelInfo",
    "GetServerInfo",
    "GetLoads",
    "GetTokenizer",
)


def _active(snapshot: ClusterSnapshot) -> int:
    return snapshot.queued_requests + sum(item.running_requests for item in snapshot.replicas)


class _Reader:
    """Whom the service writes to: its messages leave as answers of this protocol."""

    def __init__(self, answers: Answers, context: Any) -> None:
        self._answers, self._context = answers, context

    def time_remaining(self) -> float | None:
        """Of the call."""
        left: float | None = self._context.time_remaining()
        return left

    def admitted(self, prompt_tokens: int) -> None:
        """Of a text, it is known only now."""
        self._answers.prompt_tokens = prompt_tokens

    async def write(self, message: serving_pb2.GenerateResponse) -> None:
        """Send what it adds."""
        for answer in self._answers.fold(message):
            await self._context.write(answer)
