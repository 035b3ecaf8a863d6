"""One benchmark from its settings to its report: ask the server, warm up, measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from phalanx.protos.errors import PermissionDenied, PhalanxError
from phalanx.protos.v1 import serving_pb2

from .jobs import Planned, plan
from .load import Attempt, Done, closed_loop, open_loop
from .report import date_now, machine_facts, software_versions
from .results import Results, measure
from .settings import Settings

if TYPE_CHECKING:
    from phalanx.controller.client import AsyncClient


@dataclass(frozen=True)
class Outcome:
    """A finished benchmark: its attempts, what they amount to, and the report as JSON values."""

    attempts: list[Attempt]
    results: Results
    report: dict[str, Any]


Stage = Callable[[str, int], Done]
"""Told that a stage of so many requests begins; returns what is called when one has ended."""


async def run_benchmark(client: AsyncClient, settings: Settings, stage: Stage) -> Outcome:
    """Warm up, measure, and describe what was measured.

    Raises `ConfigError` for lengths that the model's context does not hold, and what the first
    calls to the server raise. A warm-up request that fails ends the benchmark.
    """
    info = await client.model_info()
    planned = await plan(client, settings, info)
    warm, measured = planned.warm, planned.measured
    if warm:
        done = stage("warm-up", len(warm))
        _check_warm(await closed_loop(client, warm, settings.concurrency, settings.params, done))
    done = stage("measuring", len(measured))
    attempts = await _run(client, planned, settings, done)
    results = measure(attempts)
    try:
        state = await client.cluster_state()
    except PermissionDenied:  # for administrators alone
        state = serving_pb2.GetClusterStateResponse()
    report = {
        "report": 1,
        "date": date_now(),
        "settings": dataclasses.asdict(settings)
        | {"mode": planned.mode, "warmup": settings.warmups},
        "skipped_too_long": planned.skipped,
        "model": _values(info),
        "cluster": _values(state),
        "client_machine": machine_facts(),
        "client_versions": software_versions(),
        "results": results.as_json(),
        "requests": [_row(item, attempts[0].due_s) for item in attempts],
    }
    return Outcome(attempts, results, report)


async def _run(
    client: AsyncClient, planned: Planned, settings: Settings, done: Done
) -> list[Attempt]:
    jobs, params = planned.measured, settings.params
    if planned.arrivals is None:
        return await closed_loop(client, jobs, settings.concurrency, params, done)
    return await open_loop(client, jobs, planned.arrivals, params, done)


def _check_warm(attempts: list[Attempt]) -> None:
    failed = [item for item in attempts if not item.ok]
    if failed:
        raise PhalanxError(
            f"{len(failed)} of {len(attempts)} warm-up requests failed, the first with "
            f"{failed[0].status}: {failed[0].error}"
        )


def _values(item: Any) -> Any:
    """A message as JSON values, zeros included and numbers as numbers."""
    if isinstance(item, Message):
        return {field.name: _values(getattr(item, field.name)) for field in item.DESCRIPTOR.fields}
    return item if isinstance(item, str | int | float) else [_values(part) for part in item]


def _row(item: Attempt, began: float) -> dict[str, Any]:
    first = item.time_to_first_token_s
    return {
        "due_s": item.due_s - began,
        "send_delay_s": item.sent_s - item.due_s,
        "time_to_first_token_s": first,
        "latency_s": item.latency_s,
        "prompt_tokens": item.prompt_tokens,
        "asked_tokens": item.asked_tokens,
        "output_tokens": item.output_tokens,
        "status": item.status,
    }
