"""One request, one tree of spans: the caller's, the controller's and the ranks', at a collector."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from phalanx.controller.app import start_cluster
from phalanx.controller.config import ClusterConfig
from phalanx.protos.v1 import serving_pb2, serving_pb2_grpc

pytestmark = pytest.mark.slow

SECRET = "xyzzy-plugh"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span, with its resource."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.received: list[tuple[dict[str, Any], Any]] = []
        self.bytes = b""

    def Export(self, request: Any, context: Any) -> Any:
        with self._lock:
            self.bytes += request.SerializeToString()
            for group in request.resource_spans:
                resource = values(group.resource.attributes)
                for scope in group.scope_spans:
                    self.received += [(resource, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def tree(self, trace_id: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """Span id to (parent id, name, attributes and resource) of one trace."""
        with self._lock:
            return {
                span.span_id.hex(): (
                    span.parent_span_id.hex(),
                    span.name,
                    resource | values(span.attributes),
                )
                for resource, span in self.received
                if span.trace_id.hex() == trace_id
            }


def values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    made = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, f"http://127.0.0.1:{port}"
    server.stop(0)


def names_below(tree: dict[str, Any], parent: str) -> list[str]:
    return sorted(name for above, name, _ in tree.values() if above == parent)


def test_a_request_yields_one_connected_tree(
    collector: tuple[Collector, str], tiny_llama: Callable[..., Path]
) -> None:
    made, endpoint = collector

    async def main() -> None:
        config = ClusterConfig(
            model=str(tiny_llama()),
            tp=2,
            port=0,
            openai_port=0,
            metrics_port=None,
            kv_tokens=2048,
            trace_endpoint=endpoint,
            trace_ratio=0.0,  # only who asks for it is traced
            log_level="warning",
        )
        cluster = await start_cluster(config)
        try:
            async with grpc.aio.insecure_channel(cluster.address) as channel:
                stub: Any = serving_pb2_grpc.InferenceServiceStub(channel)
                request = serving_pb2.GenerateRequest(text=SECRET, request_id="mine")
                request.params.max_tokens = 12
                request.params.ignore_eos = True
                metadata = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")]
                async for _ in stub.Generate(request, metadata=metadata):
                    pass
                async for _ in stub.Generate(serving_pb2.GenerateRequest(text="a")):
                    pass
            async with httpx.AsyncClient(timeout=60) as http:
                body: dict[str, Any] = {
                    "model": cluster_model(config),
                    "prompt": SECRET,
                    "max_tokens": 6,
                }
                body["ignore_eos"] = True
                header = {"traceparent": f"00-{TRACE_ID[::-1]}-{PARENT_ID}-01"}
                answer = await http.post(
                    f"{cluster.openai_url}/completions", json=body, headers=header
                )
                assert answer.status_code == 200, answer.text
        finally:
            await cluster.stop()

    asyncio.run(main())
    ends = time.monotonic() + 20
    while len(made.tree(TRACE_ID)) < 8 and time.monotonic() < ends:
        time.sleep(0.2)
    check(made.tree(TRACE_ID), "Generate")
    check(made.tree(TRACE_ID[::-1]), "Generate")
    assert {span.trace_id.hex() for _, span in made.received} == {TRACE_ID, TRACE_ID[::-1]}
    assert SECRET.encode() not in made.bytes


def cluster_model(config: ClusterConfig) -> str:
    return Path(config.model).name


def check(tree: dict[str, tuple[str, str, dict[str, Any]]], method: str) -> None:
    [root] = [key for key, (above, _, _) in tree.items() if above == PARENT_ID]
    assert tree[root][1] == method
    assert tree[root][2]["phalanx.outcome"] == "length"
    assert names_below(tree, root) == ["decode", "placement", "prefill", "queue"]
    assert all(above in tree for key, (above, _, _) in tree.items() if key != root)
    phases = {name: key for key, (above, name, _) in tree.items() if above == root}
    for phase in ("prefill", "decode"):
        ranks = {
            item["phalanx.rank"] for above, name, item in tree.values() if above == phases[phase]
        }
        assert ranks == {0, 1}, phase
    assert tree[phases["queue"]][2]["phalanx.replica"] == "replica-0"
