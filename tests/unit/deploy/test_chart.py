"""The Helm chart: what it renders, what it refuses, and that the manifests are made by it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from phalanx.controller.config import KINDS, RULES
from phalanx.controller.settings import load_config
from phalanx.controller.units import is_loopback

MADE_BY_CHART = {
    "host",
    "port",
    "metrics_host",
    "metrics_port",
    "openai_host",
    "openai_port",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "token_file",
    "insecure",
    "ray_address",
    "journal",
}
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


@pytest.mark.parametrize(
    "path",
    [
        "kubernetes/single-node-cpu.yaml",
        "kubernetes/single-node-gpu.yaml",
        "kuberay/two-nodes-cpu.yaml",
        "kuberay/two-nodes-gpu.yaml",
    ],
)
def test_manifests_are_what_the_chart_renders(template: Any, deploy: Path, path: str) -> None:
    """Their first line is the command that makes them."""
    first, _, rest = (deploy / path).read_text(encoding="utf-8").partition("\n")
    made = template(values=Path(path).stem)
    assert made.returncode == 0, made.stderr
    assert made.stdout == rest
    assert first == "# " + " ".join(["helm", *made.args[1:]])


@pytest.mark.parametrize("mode", ["mtls", "tls", "mesh"])
@pytest.mark.parametrize("topology", ["pod", "raycluster"])
def test_every_mode_fits_the_schemas(
    template: Any, load: Any, check_schema: Any, tmp_path: Path, mode: str, topology: str
) -> None:
    made = template(
        *("--set", f"security.mode={mode}", "--set", f"topology={topology}"),
        *("--set", "monitoring.rules=true", "--set", "monitoring.dashboard=true"),
        *("--set", f"monitoring.podMonitor={'false' if mode == 'tls' else 'true'}"),
    )
    assert made.returncode == 0, made.stderr
    objects = load(made.stdout)
    for item in objects:
        check_schema(item)
    [deployment] = [item for item in objects if item["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    native = "grpc" in container["readinessProbe"]
    assert native == (mode == "mesh")  # kubelet's gRPC probe speaks no TLS
    assert ("Certificate" in {item["kind"] for item in objects}) == (mode != "mesh")
    [text] = [
        item["data"]["config.toml"] for item in objects if "config.toml" in item.get("data", {})
    ]
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    config = load_config(file, {})
    ports = {port["name"] for port in container["ports"]}
    assert ("metrics" in ports) == (not is_loopback(config.metrics_host)) == (mode != "tls")
    assert config.insecure == (mode == "mesh")


@pytest.mark.parametrize("mode", ["mtls", "tls", "mesh"])
def test_the_http_front_has_a_port(
    template: Any, load: Any, check_schema: Any, tmp_path: Path, mode: str
) -> None:
    """In the container, the services and the policy, where it is asked for and not else."""
    arguments = ["--set", f"security.mode={mode}", "--set", "config.vllm_protocol=true"]
    for asked in (False, True):
        if asked:
            arguments += ["--set", "openai.enabled=true", "--set", "openai.port=80"]
        made = template(*arguments)
        assert made.returncode == 0, made.stderr
        objects = load(made.stdout)
        for item in objects:
            check_schema(item)
        [deployment] = [item for item in objects if item["kind"] == "Deployment"]
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        opened = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert opened.get("openai") == (8000 if asked else None)
        services = [item for item in objects if item["kind"] == "Service"]
        ports = [
            [port for port in item["spec"]["ports"] if port["name"] == "openai"]
            for item in services
        ]
        assert [[port["port"] for port in found] for found in ports] == (
            [[8000], [80]] if asked else [[], []]
        )
        [policy] = [item for item in objects if item["kind"] == "NetworkPolicy"]
        allowed = {port["port"] for port in policy["spec"]["ingress"][0]["ports"]}
        assert allowed == ({50051, 8000} if asked else {50051})
        [text] = [
            item["data"]["config.toml"] for item in objects if "config.toml" in item.get("data", {})
        ]
        file = tmp_path / "config.toml"
        file.write_text(text, encoding="utf-8")
        config = load_config(file, {})
        assert (config.openai_port, config.vllm_protocol) == (8000 if asked else None, True)


def test_keda_scales_by_a_query(template: Any, load: Any, check_schema: Any) -> None:
    made = template("--set", "pod.autoscaling.kind=keda")
    [scaled] = [item for item in load(made.stdout) if item["kind"] == "ScaledObject"]
    check_schema(scaled)
    waiting, desired = (trigger["metadata"] for trigger in scaled["spec"]["triggers"])
    assert "phalanx_waiting_requests{" in waiting["query"]
    assert "phalanx_desired_replicas{" in desired["query"]
    assert desired["threshold"] == "1", "a copy has as many replicas as its config says"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (["config.tp=0"], "tp"),
        (["config.host=0.0.0.0"], "host"),
        (["config.model=null"], "model"),
        (["config.device=auto"], "device"),
        (["topology=raycluster", "config.tp=3"], "raycluster.ranksPerWorker"),
        (["topology=raycluster", "config.pp=3"], "config.tp x config.pp"),
        (
            [
                "topology=raycluster",
                "config.pp=2",
                "config.tp=2",
                "raycluster.workers=4",
                "raycluster.ranksPerWorker=1",
            ],
            "the ranks of a stage share a worker",
        ),
        (["topology=raycluster", "pod.autoscaling.kind=hpa"], "pod.autoscaling"),
        (["security.mode=tls", "monitoring.podMonitor=true"], "monitoring.podMonitor"),
        (["security.mode=none"], "mode"),
        (["drain.graceSeconds=20"], "graceSeconds"),
        (["openai.port=0"], "port"),
        (["openai.token=x"], "token"),
        (["config.openai_port=8000"], "openai_port"),
        (["unknown=1"], "unknown"),
    ],
)
def test_wrong_values_are_refused(template: Any, values: list[str], named: str) -> None:
    made = template(*(part for value in values for part in ("--set", value)))
    assert made.returncode != 0
    assert named in made.stderr


def test_cpu_ranks_need_a_bound_of_memory(template: Any) -> None:
    """They see the memory of the node, and would be killed for taking it."""
    made = template("--set", "config.device=cpu", values="single-node-gpu")
    assert made.returncode != 0
    assert "config.memory_per_rank or config.kv_tokens" in made.stderr


def test_two_releases_share_a_namespace(template: Any, load: Any) -> None:
    """No object of one has the name of another's of the same kind."""
    names = []
    for release in ("blue", "green"):
        made = template("--set", "topology=raycluster", release=release)
        assert made.returncode == 0, made.stderr
        names.append({(item["kind"], item["metadata"]["name"]) for item in load(made.stdout)})
    assert not names[0] & names[1]


def test_a_journal_lies_on_its_volume(
    template: Any, load: Any, check_schema: Any, tmp_path: Path
) -> None:
    made = template("--set", "journalVolume.emptyDir.sizeLimit=2Gi")
    assert made.returncode == 0, made.stderr
    objects = load(made.stdout)
    for item in objects:
        check_schema(item)
    [deployment] = [item for item in objects if item["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    [volume] = [item for item in pod["volumes"] if item["name"] == "journal"]
    assert volume["emptyDir"] == {"sizeLimit": "2Gi"}
    [mount] = [item for item in pod["containers"][0]["volumeMounts"] if item["name"] == "journal"]
    [text] = [
        item["data"]["config.toml"] for item in objects if "config.toml" in item.get("data", {})
    ]
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    # a folder of its own inside, since a volume's mode is the kubelet's
    assert Path(str(load_config(file, {}).journal)).parent == Path(mount["mountPath"])


def test_schema_knows_every_field_of_the_configuration(deploy: Path) -> None:
    schema = json.loads((deploy / "helm/phalanx/values.schema.json").read_text(encoding="utf-8"))
    config = schema["properties"]["config"]
    assert config["additionalProperties"] is False
    assert set(config["properties"]) == set(RULES) - MADE_BY_CHART
    for name, described in config["properties"].items():
        rule = RULES[name]
        assert described["description"] == rule.help
        if rule.choices:
            assert set(described["enum"]) <= set(rule.choices)
        elif not rule.size:
            assert described["type"] == JSON_TYPES[KINDS[name]]
            assert (described.get("minimum"), described.get("maximum")) == (rule.low, rule.high)


def test_versions_agree(root: Path, deploy: Path) -> None:
    """Of the package, the chart, the images and Ray."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((deploy / "helm/phalanx/Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((deploy / "helm/phalanx/values.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == project["version"]
    [ray] = [item for item in map(Requirement, project["dependencies"]) if item.name == "ray"]
    assert values["raycluster"]["rayVersion"] in ray.specifier
    for name in ("Dockerfile", "Dockerfile.cpu"):
        text = (deploy / name).read_text(encoding="utf-8")
        assert re.findall(r"^ARG RAY_VERSION=(.+)$", text, re.MULTILINE) == [
            values["raycluster"]["rayVersion"]
        ]
        assert f'image.version="{project["version"]}"' in text
