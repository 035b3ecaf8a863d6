"""Traces turned on: from where they go to, to what begins them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from phalanx.controller.config import ClusterConfig
from phalanx.protos.errors import ConfigError

if TYPE_CHECKING:
    from .spans import SpanTracing

EXPORT_TIMEOUT_S = 5


def with_endpoint(config: ClusterConfig) -> ClusterConfig:
    """The configuration with the collector that the environment names, where it names none.

    Raises `ConfigError` for a protocol of `OTEL_EXPORTER_OTLP_PROTOCOL` that is not offered, and where
    OpenTelemetry is wanted and not installed.
    """
    named = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    if config.trace_endpoint is None and named:
        config = dataclasses.replace(config, trace_endpoint=named)
    if config.trace_endpoint is None:
        return config
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    if protocol != "grpc":
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, allowed: grpc")
    try:
        import opentelemetry.exporter.otlp.proto.grpc.trace_exporter  # noqa: F401
    except ImportError:
        raise ConfigError(
            "trace_endpoint needs OpenTelemetry, which is not installed; install it with: "
            "pip install 'phalanx[trace]'"
        ) from None
    return config


def start_tracing(config: ClusterConfig, model: str, stack: AsyncExitStack) -> SpanTracing | None:
    """`make_tracing`, closed when the stack ends."""
    tracing = make_tracing(config, model)
    if tracing is not None:
        stack.push_async_callback(asyncio.to_thread, tracing.close)
    return tracing


def make_tracing(config: ClusterConfig, model: str) -> SpanTracing | None:
    """None without an endpoint. It opens a connection, so call it once nothing will be forked."""
    if config.trace_endpoint is None:
        return None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from .spans import SpanTracing

    exporter = OTLPSpanExporter(endpoint=config.trace_endpoint, timeout=EXPORT_TIMEOUT_S)
    return SpanTracing(BatchSpanProcessor(exporter), model=model, ratio=config.trace_ratio)
