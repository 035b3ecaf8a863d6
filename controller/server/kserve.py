"""The Open Inference Protocol over the inference service: `inference.GRPCInferenceService`.

Tensors are those of Triton's vLLM backend, so that Triton's clients work as they are. A request
goes the way of `Generate`: the same checks, limits, books and end.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError

from phalanx.protos.errors import InvalidArgument, NotFound, PhalanxError, ResourceExhausted
from phalanx.protos.kserve import open_inference_pb2 as pb
from phalanx.protos.kserve import open_inference_pb2_grpc
from phalanx.protos.limits import MAX_CONCURRENT_STREAMS, MAX_STALL_S
from phalanx.protos.v1 import serving_pb2

from .answer import SLOW_RETRY_S
from .convert import unknown_fields
from .interceptors import logged_incident
from .kserve_params import in_their_names
from .kserve_request import VERSION, Asked, Reply, failure, read_request
from .kserve_tensors import CONFIG_TYPES, INPUTS, OUTPUTS
from .service import InferenceService

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
PLATFORM = "phalanx"
EXTENSIONS = ("model_configuration",)

Send = Callable[[pb.ModelInferResponse], Awaitable[None]]


class OpenInferenceService(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves the model of `service`. `ready`: what health checks are told.

    max_stall_s: how long an answer may wait for its reader before its call is ended.
    """

    def __init__(
        self,
        service: InferenceService,
        ready: Callable[[], bool],
        *,
        max_stall_s: float = MAX_STALL_S,
    ) -> None:
        self._service, self._ready, self._max_stall_s = service, ready, max_stall_s

    # --- what is served ---

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Any
    ) -> pb.ServerLiveResponse:
        """Live as long as it answers."""
        _refuse_unknown(request)
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Any
    ) -> pb.ServerReadyResponse:
        """As grpc.health.v1 says."""
        _refuse_unknown(request)
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Any
    ) -> pb.ModelReadyResponse:
        """Another model, or another version, is not ready."""
        _refuse_unknown(request)
        served = request.name == self._service.model_name and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=served and self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Any
    ) -> pb.ServerMetadataResponse:
        """Name and version of the server."""
        _refuse_unknown(request)
        return pb.ServerMetadataResponse(
            name=PLATFORM, version=importlib.metadata.version("phalanx"), extensions=EXTENSIONS
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Any
    ) -> pb.ModelMetadataResponse:
        """The model's tensors."""
        _refuse_unknown(request)
        self._check_model(request.name, request.version)
        response = pb.ModelMetadataResponse(
            name=self._service.model_name, versions=[VERSION], platform=PLATFORM
        )
        for tensors, specs in ((response.inputs, INPUTS), (response.outputs, OUTPUTS)):
            for spec in specs:
                tensors.add(name=spec.name, datatype=spec.datatype, shape=[spec.size])
        return response

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Any
    ) -> pb.ModelConfigResponse:
        """The same in Triton's form, and which inputs are optional."""
        _refuse_unknown(request)
        self._check_model(request.name, request.version)
        config = pb.ModelConfig(
            name=self._service.model_name, platform=PLATFORM, backend=PLATFORM, max_batch_size=0
        )
        for spec in INPUTS:
            config.input.add(
                name=spec.name,
                data_type=CONFIG_TYPES[spec.datatype],
                dims=[spec.size],
                optional=spec.optional,
            )
        for spec in OUTPUTS:
            kind = CONFIG_TYPES[spec.datatype]
            config.output.add(name=spec.name, data_type=kind, dims=[spec.size])
        config.model_transaction_policy.decoupled = True
        return pb.ModelConfigResponse(config=config)

    def _check_model(self, name: str, version: str) -> None:
        served = self._service.model_name
        if name != served:
            raise NotFound(f"model {name!r:.80} is not served here, {served!r} is")
        if version not in ("", VERSION):
            raise NotFound(f"version {version!r:.80} of {served!r} is not served here, 1 is")

    # --- inference ---

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Any
    ) -> pb.ModelInferResponse:
        """The whole text at once."""
        answers: list[pb.ModelInferResponse] = []

        async def keep(response: pb.ModelInferResponse) -> None:
            answers.append(response)

        tenant = self._service.identify(context)
        await self.answer(request, context, tenant, keep, streaming=False)
        return answers[-1]

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> None:
        """Requests as they come; answers as there are any, in no order between requests."""
        await _Stream(self, context, self._service.identify(context), self._max_stall_s).run(
            requests
        )

    async def answer(
        self,
        request: pb.ModelInferRequest,
        context: Any,
        tenant: str,
        send: Send,
        *,
        streaming: bool,
    ) -> None:
        """Answer one request. Raises `PhalanxError`; cancelling this frees all that it holds."""
        self._check_model(request.model_name, request.model_version)
        asked = read_request(request, streaming=streaming)
        reader = _Reader(asked, self._service.model_name, context, send)
        try:
            await self._service.generate(asked.request, reader, tenant)
        except InvalidArgument as error:
            raise in_their_names(error, asked.params_field) from None


class _Reader:
    """Whom the service writes to: its messages leave as answers of this protocol."""

    def __init__(self, asked: Asked, model_name: str, context: Any, send: Send) -> None:
        self._asked, self._model_name = asked, model_name
        self._context, self._send = context, send
        self._reply: Reply | None = None
        self._ends = None if asked.timeout_s is None else time.monotonic() + asked.timeout_s

    def time_remaining(self) -> float | None:
        """The sooner one of the call's deadline and the request's own."""
        left: float | None = self._context.time_remaining()
        if self._ends is None:
            return left
        own = self._ends - time.monotonic()
        return own if left is None else min(left, own)

    async def write(self, message: serving_pb2.GenerateResponse) -> None:
        """Send what it adds to the answer, if that is sent yet."""
        if self._reply is None:  # not before the number of samples was checked
            self._reply = Reply(self._asked, self._model_name)
        response = self._reply.fold(message)
        if response is not None:
            await self._send(response)


class _Stream:
    """One call of ModelStreamInfer. A request's failure is its own; only a caller that does not
    read, or sends what is no message, ends the call."""

    def __init__(
        self, service: OpenInferenceService, context: Any, tenant: str, max_stall_s: float
    ) -> None:
        self._service, self._context, self._tenant = service, context, tenant
        self._max_stall_s = max_stall_s
        self._outbox: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(1)
        self._room = asyncio.Semaphore(MAX_CONCURRENT_STREAMS)

    async def run(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Return when the caller has sent all, and all is answered."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write())
                async with asyncio.TaskGroup() as answering:
                    async for request in requests:
                        # past this many at once the caller is held back by flow control
                        await self._room.acquire()
                        answering.create_task(self._answer(request))
                await self._outbox.put(None)
        except ExceptionGroup as group:
            error = _first(group)
            if isinstance(error, DecodeError):
                text = "these bytes are not a message of this call"
                raise InvalidArgument.of("request", text) from None
            raise error from None

    async def _answer(self, request: pb.ModelInferRequest) -> None:
        try:
            await self._service.answer(
                request, self._context, self._tenant, self._send, streaming=True
            )
        except PhalanxError as error:
            await self._outbox.put(failure(request.id, error.status, str(error)))
        except Exception as error:  # noqa: BLE001  a defect ends its own request only
            text = logged_incident(f"/{SERVICE}/ModelStreamInfer", error)
            await self._outbox.put(failure(request.id, "INTERNAL", text))
        finally:
            self._room.release()

    async def _send(self, response: pb.ModelInferResponse) -> None:
        await self._outbox.put(pb.ModelStreamInferResponse(infer_response=response))

    async def _write(self) -> None:
        """The one writer: a call takes one message at a time."""
        while (message := await self._outbox.get()) is not None:
            try:
                async with asyncio.timeout(self._max_stall_s):
                    await self._context.write(message)
            except TimeoutError:
                text = f"an answer was not read for {self._max_stall_s:g} s"
                raise ResourceExhausted(text, SLOW_RETRY_S) from None


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _refuse_unknown(request: Any) -> None:
    if violations := unknown_fields(request):
        raise InvalidArgument(violations)
