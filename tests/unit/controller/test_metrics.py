"""The Prometheus page: its names, its closed labels, and that it counts right."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from phalanx.controller.kvcache.tiers import TierStats
from phalanx.controller.metrics import COUNTS, OUTCOMES, SECONDS, TABLE, Metrics
from phalanx.controller.observing import StepTimes

KIND_NAMES = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def value(metrics: Metrics) -> Callable[..., float | None]:
    """Reads a sample of the page: `value("phalanx_steps_total", phase="schedule")`."""

    def read(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    return read


def stats(**changes: Any) -> Any:
    counts = {"running": 2, "waiting": 1, "blocks_total": 100, "blocks_free": 25}
    counts |= {"prefix_queried": 50, "prefix_hit": 10, "preemptions": 3}
    tiers = TierStats(host_used=7, loaded_host=4, loaded_disk=2, block_tokens=16, block_bytes=100)
    return SimpleNamespace(**({"tiers": tiers} | counts | changes))


def step(**changes: Any) -> StepTimes:
    times = {"schedule_s": 0.001, "execute_s": 0.02, "update_s": 0.002, "overhead_s": 0.004}
    return StepTimes(**(times | {"rows": 3, "tokens": 40} | changes))


def families(metrics: Metrics) -> dict[str, Any]:
    text = generate_latest(metrics.registry).decode()
    return {item.name: item for item in text_string_to_metric_families(text)}


def test_the_page_holds_the_table(metrics: Metrics) -> None:
    metrics.set_replica("replica-0", stats())
    page = families(metrics)
    for row in TABLE:
        family = page.pop(f"phalanx_{row.name}")
        assert (family.type, family.documentation) == (KIND_NAMES[row.kind.__name__], row.help)
        suffix = "_count" if family.type == "histogram" else ""
        assert f"{row.page_name}{suffix}" in {sample.name for sample in family.samples}
    assert [name for name in page if not name.endswith("_created")] == []


def test_labels_take_values_from_closed_sets(metrics: Metrics) -> None:
    """Whatever callers send, the page does not grow."""

    def series() -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {
            (sample.name, frozenset(sample.labels.items()))
            for family in families(metrics).values()
            for sample in family.samples
        }

    before = series()
    for index in range(20):
        metrics.on_start(f"Method{index}")
        metrics.on_end(f"outcome {index}", 1, 1, 0.1)
    metrics.on_first_token(3.0)
    metrics.on_tokens(2, 0.5)
    metrics.on_queue_time(0.1)
    metrics.on_step(step())
    assert series() == before


def test_requests_are_counted_by_method_and_outcome(
    metrics: Metrics, value: Callable[..., float | None]
) -> None:
    for method in ("Generate", "Chat", "Chat", "Embed"):
        metrics.on_start(method)
    assert value("phalanx_requests_open") == 4
    for outcome in ("stop", "RESOURCE_EXHAUSTED", "length", "no such thing"):
        metrics.on_end(outcome, 10, 5, 0.5)
    assert value("phalanx_requests_started_total", method="chat") == 2
    assert value("phalanx_requests_started_total", method="other") == 1
    assert value("phalanx_requests_total", outcome="resource_exhausted") == 1
    assert value("phalanx_requests_total", outcome="error") == 1
    assert value("phalanx_requests_total", outcome="abort") == 0
    assert value("phalanx_requests_open") == 0
    assert value("phalanx_prompt_tokens_total") == 40
    assert value("phalanx_completion_tokens_total") == 20
    assert value("phalanx_request_seconds_sum") == 2


def test_every_status_of_ours_has_an_outcome() -> None:
    from phalanx.protos import errors

    kinds = [item for item in vars(errors).values() if isinstance(item, type)]
    statuses = {item.status for item in kinds if issubclass(item, errors.PhalanxError)}
    assert {status.lower() for status in statuses} - {"internal"} <= set(OUTCOMES)


def test_a_gap_is_shared_by_the_tokens_that_ended_it(
    metrics: Metrics, value: Callable[..., float | None]
) -> None:
    metrics.on_tokens(4, 0.2)
    metrics.on_tokens(0, 9.0)
    assert value("phalanx_inter_token_seconds_sum") == pytest.approx(0.05)
    assert value("phalanx_inter_token_seconds_count") == 1


def test_steps(metrics: Metrics, value: Callable[..., float | None]) -> None:
    metrics.on_step(step())
    metrics.on_step(step(rows=5))
    assert value("phalanx_steps_total") == 2
    assert value("phalanx_step_seconds_total", phase="overhead") == pytest.approx(0.008)
    assert value("phalanx_step_seconds_total", phase="execute") == pytest.approx(0.04)
    assert value("phalanx_step_rows_sum") == 8
    assert value("phalanx_step_rows_bucket", le="4.0") == 1


def test_replicas(metrics: Metrics, value: Callable[..., float | None]) -> None:
    metrics.set_replica("replica-0", stats())
    metrics.set_replica("replica-1", stats(blocks_total=0, blocks_free=0))
    metrics.set_replica("replica-0", stats(running=7, prefix_hit=12))
    assert value("phalanx_running_requests", replica="replica-0") == 7
    assert value("phalanx_kv_use_ratio", replica="replica-0") == 0.75
    assert value("phalanx_kv_use_ratio", replica="replica-1") == 0
    assert value("phalanx_prefix_hit_tokens_total", replica="replica-0") == 12
    assert value("phalanx_preemptions_total", replica="replica-0") == 3


def test_a_replica_that_starts_anew_goes_on_counting(
    metrics: Metrics, value: Callable[..., float | None]
) -> None:
    for preemptions in (3, 5, 0, 2):
        metrics.set_replica("replica-0", stats(preemptions=preemptions))
    assert value("phalanx_preemptions_total", replica="replica-0") == 7


def test_threads_lose_no_count(metrics: Metrics, value: Callable[..., float | None]) -> None:
    def work() -> None:
        for _ in range(200):
            metrics.on_step(step())
            metrics.on_queue_time(0.1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value("phalanx_steps_total") == value("phalanx_queue_seconds_count") == 800


def test_buckets_rise() -> None:
    assert list(SECONDS) == sorted(set(SECONDS)) and list(COUNTS) == sorted(set(COUNTS))


def test_the_page_is_served_and_given_up(metrics: Metrics) -> None:
    server = metrics.serve("127.0.0.1", 0)
    host, port = server.address.split(":")
    with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
        assert "phalanx_requests_open 0.0" in answer.read().decode()
    with pytest.raises(OSError, match="in use"):
        Metrics().serve(host, int(port))
    server.close()
    again = Metrics().serve(host, int(port))
    again.close()


def test_two_clusters_in_one_process_do_not_share_a_page(metrics: Metrics) -> None:
    other = Metrics()
    metrics.on_start("Chat")
    assert other.registry.get_sample_value("phalanx_requests_open") == 0


def test_tiers_are_counted_in_tokens_and_bytes(
    metrics: Metrics, value: Callable[..., float | None]
) -> None:
    metrics.set_replica("replica-0", stats())
    assert value("phalanx_host_kv_blocks", replica="replica-0") == 7
    assert value("phalanx_host_kv_hit_tokens_total", replica="replica-0") == 64
    assert value("phalanx_disk_kv_hit_tokens_total", replica="replica-0") == 32
    assert value("phalanx_kv_loaded_bytes_total", replica="replica-0") == 600
    metrics.set_replica("replica-1", stats(tiers=None))
    assert value("phalanx_host_kv_blocks", replica="replica-1") is None
