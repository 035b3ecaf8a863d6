"""Alert rules, dashboard and scaling name metrics that exist, by expressions that parse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from phalanx.controller.metrics import OUTCOMES, TABLE

FOREIGN = {"up", "certmanager_certificate_expiration_timestamp_seconds"}
SERIES = {
    **{row.page_name: row for row in TABLE if row.kind is not Histogram},
    **{
        f"phalanx_{row.name}_{suffix}": row
        for row in TABLE
        if row.kind is Histogram
        for suffix in ("bucket", "sum", "count")
    },
}
"""Every series of the page, by name."""


def selectors(expression: str) -> Iterator[Any]:
    """The vector selectors of an expression, with the function that reads each as `rate` or ''."""
    text = re.sub(r"\$__rate_interval|\$__interval", "5m", expression)

    def walk(node: Any, function: str) -> Iterator[tuple[Any, str]]:
        if isinstance(node, promql_parser.VectorSelector):
            yield node, function
        elif isinstance(node, promql_parser.MatrixSelector):
            yield node.vector_selector, function
        elif isinstance(node, promql_parser.Call):
            for argument in node.args:
                yield from walk(argument, node.func.name)
        elif isinstance(node, promql_parser.BinaryExpr):
            yield from walk(node.lhs, function)
            yield from walk(node.rhs, function)
        elif hasattr(node, "expr"):
            yield from walk(node.expr, function)

    yield from walk(promql_parser.parse(text), "")


def groupings(node: Any) -> Iterator[str]:
    """The labels that an expression's aggregations keep."""
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        yield from node.modifier.labels
    parts = [getattr(node, name, None) for name in ("lhs", "rhs", "expr")]
    for part in [*parts, *getattr(node, "args", [])]:
        if part is not None:
            yield from groupings(part)


def check_expression(expression: str) -> None:
    """Names exist, counters and buckets are read as rates, labels are those of the metric."""
    rows = [SERIES[item.name] for item, _ in selectors(expression) if item.name in SERIES]
    parsed = promql_parser.parse(re.sub(r"\$__rate_interval|\$__interval", "5m", expression))
    kept = {"instance", "namespace", "pod", "job", "le", *(row.label for row in rows)}
    assert set(groupings(parsed)) <= kept, expression
    found = list(selectors(expression))
    assert found, expression
    for selector, function in found:
        if selector.name in FOREIGN:
            continue
        assert selector.name in SERIES, f"{selector.name} in {expression}"
        row = SERIES[selector.name]
        counts = row.kind in (Counter, Histogram)
        assert function in ({"rate", "increase"} if counts else {"", "absent"}), expression
        known = {"instance", "namespace", "pod", "job", "le", row.label}
        labels = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        assert set(labels) <= known, expression
        if "outcome" in labels:
            assert set(labels["outcome"].split("|")) <= set(OUTCOMES), expression


@pytest.fixture
def rules(deploy: Path) -> list[dict[str, Any]]:
    text = (deploy / "monitoring/alerts.yaml").read_text(encoding="utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@pytest.fixture
def dashboard(deploy: Path) -> dict[str, Any]:
    loaded = json.loads((deploy / "monitoring/dashboard.json").read_text(encoding="utf-8"))
    return dict(loaded)


def test_alerts_name_real_metrics(rules: list[dict[str, Any]]) -> None:
    assert len(rules) == 12
    for rule in rules:
        check_expression(rule["expr"])


def test_alerts_say_what_they_are(rules: list[dict[str, Any]], deploy: Path) -> None:
    """And the runbook says what to do."""
    runbook = (deploy / "README.md").read_text(encoding="utf-8")
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        assert f"### {rule['alert']}\n" in runbook, rule["alert"]
    named = set(re.findall(r"^### (Phalanx\w+)$", runbook, re.MULTILINE))
    assert named == {rule["alert"] for rule in rules}


@pytest.mark.parametrize(
    "expression",
    [
        "rate(phalanx_requests_totl[5m])",
        "phalanx_requests_total > 5",
        'rate(phalanx_requests_total{outcome="errors"}[5m])',
        'phalanx_kv_use_ratio{phase="x"}',
        "1 + 1",
        "sum by (outcomes) (rate(phalanx_requests_total[5m]))",
        "histogram_quantile(0.5, sum by (le, phase) (rate(phalanx_queue_seconds_bucket[5m])))",
    ],
)
def test_a_wrong_expression_is_caught(expression: str) -> None:
    with pytest.raises(AssertionError):
        check_expression(expression)


def test_dashboard_names_real_metrics(dashboard: dict[str, Any]) -> None:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) >= 25
    for panel in panels:
        for target in panel["targets"]:
            check_expression(target["expr"])
    for panel in panels:
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"instance"}
            rows = [SERIES[item.name] for item, _ in selectors(target["expr"])]
            assert named <= {row.label for row in rows}, panel["title"]
    [variable] = [item for item in dashboard["templating"]["list"] if item["type"] == "query"]
    assert re.match(r"label_values\((\w+), instance\)", variable["query"]["query"])[1] in SERIES  # type: ignore[index]
    shown = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    hidden = [row.name for row in TABLE if f"phalanx_{row.name}" not in shown]
    assert hidden == []


def test_dashboard_is_laid_out(dashboard: dict[str, Any]) -> None:
    """Within 24 columns, nothing over anything else, every id once."""
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= mine
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_scaling_names_gauges(deploy: Path) -> None:
    text = (deploy / "helm/phalanx/templates/autoscaling.yaml").read_text(encoding="utf-8")
    named = set(re.findall(r"phalanx_\w+", text))
    wanted = {"waiting_requests", "kv_use_ratio", "desired_replicas"}
    assert named == {f"phalanx_{name}" for name in wanted}
    assert all(SERIES[name].kind is Gauge for name in named)


def test_alerts_fire_when_they_should(deploy: Path) -> None:
    """Against made-up series, by Prometheus' own tool where it is installed."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed")
    tests = str(deploy / "monitoring/alerts-test.yaml")
    done = subprocess.run(
        [tool, "test", "rules", tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_scrapes_the_port_that_compose_serves(deploy: Path) -> None:
    text = (deploy / "monitoring/prometheus.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    [job] = settings["scrape_configs"]
    assert job["job_name"] == "phalanx"  # the alerts' `up{job="phalanx"}`
    assert job["static_configs"] == [{"targets": ["phalanx:9400"]}]
    assert settings["rule_files"] == ["alerts.yaml"]
