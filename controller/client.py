"""Python clients of a cluster, for threads (`Client`) and for asyncio (`AsyncClient`)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import grpc
from grpc_health.v1 import health_pb2

from phalanx.protos.errors import DeadlineExceeded
from phalanx.protos.v1 import admin_pb2, serving_pb2

from .completion import Collector, Completion
from .connection import Connection, typed
from .messages import Messages, Prompt, chat_request, generate_request
from .resuming import Resuming

POLL_S = 0.1


class Client(Connection):
    """A blocking client, safe to share between threads. Use it with `with`, or `close` it.

    Every method raises a `PhalanxError` of the server's kind. `params` are the fields of the
    messages `SamplingParams` and `RequestOptions`, such as `temperature`, `priority` and
    `deadline_s`; an unknown name is a `TypeError`.

    address: "host:port". token: bearer token. root_certificates: PEM of the authority that signed
    the server's certificate; turns TLS on. certificate and private_key: the caller's own, PEM, for
    mutual TLS. server_name: the name in the server's certificate when it is not the address's.
    timeout: seconds that each call may take, streams included. retries: how often a request that is
    refused with `ResourceExhausted` is sent again, after the time that the server names; a stream
    is never repeated once a message has come. reconnect_s: a stream whose connection breaks, or
    whose server ends, is resumed where it stood, and the iterator just goes on; `StreamLost` says
    that so many seconds of trying were in vain; 0: do not resume.
    """

    _library: ClassVar[Any] = grpc

    def generate(
        self, prompt: Prompt, *, request_id: str = "", **params: Any
    ) -> Iterator[serving_pb2.GenerateResponse]:
        """Continue a text or token ids; yields messages as they come.

        Closing the iterator cancels the request.
        """
        return self._messages(self._resuming(generate_request(prompt, request_id, params)))

    def chat(
        self, messages: Messages, *, request_id: str = "", **params: Any
    ) -> Iterator[serving_pb2.ChatResponse]:
        """Answer a conversation, `{"role", "content"}` each; a text is one user's message. Tools
        may stand among the parameters: `messages.chat_request` says how."""
        return self._messages(self._resuming(chat_request(messages, request_id, params)))

    def complete(self, prompt: Prompt, *, request_id: str = "", **params: Any) -> Completion:
        """The whole continuation."""
        collector = Collector()
        for message in self.generate(prompt, request_id=request_id, **params):
            collector.add(message)
        return collector.completion()

    def ask(self, messages: Messages, *, request_id: str = "", **params: Any) -> Completion:
        """The whole answer to a conversation, or to a text as one user's message."""
        collector = Collector()
        for message in self.chat(messages, request_id=request_id, **params):
            collector.add(message)
        return collector.completion()

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        request = serving_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._unary(self._stub.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        request = serving_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return str(self._unary(self._stub.Detokenize, request).text)

    def abort(self, request_id: str) -> None:
        """End a running request of the same tenant. Raises `NotFound`."""
        self._unary(self._stub.Abort, serving_pb2.AbortRequest(request_id=request_id))

    def model_info(self) -> serving_pb2.GetModelInfoResponse:
        """The model that is served."""
        request = serving_pb2.GetModelInfoRequest()
        info: serving_pb2.GetModelInfoResponse = self._unary(self._stub.GetModelInfo, request)
        return info

    def cluster_state(self) -> serving_pb2.GetClusterStateResponse:
        """Replicas, ranks, queue and KV cache."""
        request = serving_pb2.GetClusterStateRequest()
        state: serving_pb2.GetClusterStateResponse = self._unary(
            self._stub.GetClusterState, request
        )
        return state

    def explain(self, request_id: str) -> serving_pb2.ExplainPlacementResponse:
        """Why a request went to its replica. Raises `NotFound` where no decision is kept."""
        request = serving_pb2.ExplainPlacementRequest(request_id=request_id)
        found: serving_pb2.ExplainPlacementResponse = self._unary(
            self._stub.ExplainPlacement, request
        )
        return found

    def restart_replicas(self) -> int:
        """Begin to replace every replica, one after the other; returns how many. For operators,
        else `PermissionDenied`. Those that are left have `outdated` in `cluster_state`."""
        request = admin_pb2.RestartReplicasRequest()
        return int(self._unary(self._admin.RestartReplicas, request).replicas)

    def scale_replicas(self, replicas: int) -> int:
        """Begin to let replicas join or leave until there are so many; returns how many were wanted
        before. For operators, else `PermissionDenied`."""
        request = admin_pb2.ScaleReplicasRequest(replicas=replicas)
        return int(self._unary(self._admin.ScaleReplicas, request).before)

    def healthy(self) -> bool:
        """Whether the server answers and says that it can serve."""
        return self._check_health(self.timeout)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return once the server is healthy. Raises `DeadlineExceeded` after `timeout` seconds."""
        ends = time.monotonic() + timeout
        while not self._check_health(max(POLL_S, ends - time.monotonic())):
            if time.monotonic() + POLL_S > ends:
                raise DeadlineExceeded(f"{self.address} was not ready within {timeout:g} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Cancel what runs and close the connection."""
        with self._lock:
            streams = list(self._calls.values())
        for stream in streams:
            self._abandon(stream)
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_health(self, timeout: float | None) -> bool:
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError:
            return False
        self._met = True
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _unary(self, method: Any, request: Any) -> Any:
        try:
            answer = method(request, **self._call_options())
        except grpc.RpcError as error:
            raise typed(error) from None
        self._met = True
        return answer

    def _messages(self, stream: Resuming) -> Iterator[Any]:
        while True:
            call = self._begin(stream)
            try:
                for message in call:
                    self._met = True
                    if (new := stream.take(message)) is not None:
                        yield new
                return
            except grpc.RpcError as error:
                wait = stream.failed(typed(error))
            except (GeneratorExit, KeyboardInterrupt):
                self._end(call)
                self._abandon(stream)
                raise
            finally:
                self._end(call)
            time.sleep(wait)

    def _abandon(self, stream: Resuming) -> None:
        if stream.lives_on:
            request, options = self._leave(stream)
            with contextlib.suppress(grpc.RpcError, ValueError):  # closed, or unknown by now
                self._stub.Abort(request, **options)


class AsyncClient(Connection):
    """`Client` for asyncio: the same methods, awaited or iterated with `async for`.

    Create and use it on one running event loop, with `async with`, or `await close()`.
    """

    _library: ClassVar[Any] = grpc.aio

    def generate(
        self, prompt: Prompt, *, request_id: str = "", **params: Any
    ) -> AsyncIterator[serving_pb2.GenerateResponse]:
        """See `Client.generate`."""
        return self._messages(self._resuming(generate_request(prompt, request_id, params)))

    def chat(
        self, messages: Messages, *, request_id: str = "", **params: Any
    ) -> AsyncIterator[serving_pb2.ChatResponse]:
        """See `Client.chat`."""
        return self._messages(self._resuming(chat_request(messages, request_id, params)))

    async def complete(self, prompt: Prompt, *, request_id: str = "", **params: Any) -> Completion:
        """See `Client.complete`."""
        collector = Collector()
        async for message in self.generate(prompt, request_id=request_id, **params):
            collector.add(message)
        return collector.completion()

    async def ask(self, messages: Messages, *, request_id: str = "", **params: Any) -> Completion:
        """See `Client.ask`."""
        collector = Collector()
        async for message in self.chat(messages, request_id=request_id, **params):
            collector.add(message)
        return collector.completion()

    async def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """See `Client.tokenize`."""
        request = serving_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self._unary(self._stub.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False
    ) -> str:
        """See `Client.detokenize`."""
        request = serving_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return str((await self._unary(self._stub.Detokenize, request)).text)

    async def abort(self, request_id: str) -> None:
        """See `Client.abort`."""
        await self._unary(self._stub.Abort, serving_pb2.AbortRequest(request_id=request_id))

    async def model_info(self) -> serving_pb2.GetModelInfoResponse:
        """See `Client.model_info`."""
        request = serving_pb2.GetModelInfoRequest()
        info: serving_pb2.GetModelInfoResponse = await self._unary(self._stub.GetModelInfo, request)
        return info

    async def cluster_state(self) -> serving_pb2.GetClusterStateResponse:
        """See `Client.cluster_state`."""
        request = serving_pb2.GetClusterStateRequest()
        state: serving_pb2.GetClusterStateResponse = await self._unary(
            self._stub.GetClusterState, request
        )
        return state

    async def explain(self, request_id: str) -> serving_pb2.ExplainPlacementResponse:
        """See `Client.explain`."""
        request = serving_pb2.ExplainPlacementRequest(request_id=request_id)
        found: serving_pb2.ExplainPlacementResponse = await self._unary(
            self._stub.ExplainPlacement, request
        )
        return found

    async def restart_replicas(self) -> int:
        """See `Client.restart_replicas`."""
        request = admin_pb2.RestartReplicasRequest()
        return int((await self._unary(self._admin.RestartReplicas, request)).replicas)

    async def scale_replicas(self, replicas: int) -> int:
        """See `Client.scale_replicas`."""
        request = admin_pb2.ScaleReplicasRequest(replicas=replicas)
        return int((await self._unary(self._admin.ScaleReplicas, request)).before)

    async def healthy(self) -> bool:
        """See `Client.healthy`."""
        return await self._check_health(self.timeout)

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """See `Client.wait_ready`."""
        ends = time.monotonic() + timeout
        while not await self._check_health(max(POLL_S, ends - time.monotonic())):
            if time.monotonic() + POLL_S > ends:
                raise DeadlineExceeded(f"{self.address} was not ready within {timeout:g} s")
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Cancel what runs and close the connection."""
        streams = list(self._calls.items())
        await asyncio.gather(*(self._abandon(stream) for _, stream in streams))
        for call, _ in streams:  # the channel forgets those that nobody waits for just now
            call.cancel()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _check_health(self, timeout: float | None) -> bool:
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError:
            return False
        self._met = True
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _unary(self, method: Any, request: Any) -> Any:
        try:
            answer = await method(request, **self._call_options())
        except grpc.RpcError as error:
            raise typed(error) from None
        self._met = True
        return answer

    async def _messages(self, stream: Resuming) -> AsyncIterator[Any]:
        while True:
            call = self._begin(stream)
            try:
                async for message in call:
                    self._met = True
                    if (new := stream.take(message)) is not None:
                        yield new
                return
            except grpc.RpcError as error:
                wait = stream.failed(typed(error))
            except (GeneratorExit, asyncio.CancelledError):
                self._end(call)
                await self._abandon(stream)
                raise
            finally:
                self._end(call)
            await asyncio.sleep(wait)

    async def _abandon(self, stream: Resuming) -> None:
        if stream.lives_on:
            request, options = self._leave(stream)
            with contextlib.suppress(grpc.RpcError, asyncio.CancelledError, grpc.aio.UsageError):
                await self._stub.Abort(request, **options)
