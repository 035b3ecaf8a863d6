"""The manifests fit their schemas, and hold to the rules of a hardened pod."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from kubernetes_validate import ValidationError as SchemaError

from phalanx.controller.app import DRAIN_S
from phalanx.controller.config import DEFAULTS, ClusterConfig
from phalanx.controller.settings import load_config

OWN_TIME_S = 10  # what the server takes beyond its drain, to end ranks and Ray
RAY_PORTS = {6379, 6380, 8265, 10001, 52365}

Objects = list[dict[str, Any]]


def test_every_object_fits_its_schema(manifests: Any, check_schema: Any) -> None:
    assert len(manifests) == 5
    for objects in manifests.values():
        for item in objects:
            check_schema(item)


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("Deployment", lambda spec: spec["template"]["spec"]["containers"][0].update(imge="x")),
        ("Deployment", lambda spec: spec.update(replicas="two")),
        ("RayCluster", lambda spec: spec.update(headGroup={})),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0].pop("groupName")),
        ("RayCluster", lambda spec: spec["headGroupSpec"]["rayStartParams"].update(port=6379)),
        (
            "RayCluster",
            lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(env={}),
        ),
        ("Certificate", lambda spec: spec.update(dnsName=["x"])),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(tls={})),
        ("PodMonitor", lambda spec: spec.pop("selector")),
        ("NetworkPolicy", lambda spec: spec["ingress"].append({"form": []})),
    ],
)
def test_a_broken_object_is_caught(
    manifests: Any, check_schema: Any, kind: str, break_it: Callable[[Any], Any]
) -> None:
    objects = [item for file in manifests.values() for item in file if item["kind"] == kind]
    broken = copy.deepcopy(objects[-1])
    break_it(broken["spec"])
    with pytest.raises((ValueError, jsonschema.ValidationError, SchemaError)):
        check_schema(broken)


def containers(spec: dict[str, Any]) -> Objects:
    return [*spec.get("initContainers", []), *spec["containers"]]


def test_pods_are_restricted(manifests: Any, pods: Any) -> None:
    """As the Pod Security Standard "restricted" asks, with a read-only root besides."""
    found = [pod for objects in manifests.values() for pod in pods(objects)]
    assert len(found) == 8
    for name, spec, _ in found:
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not spec.get("hostNetwork") and not spec.get("hostIPC"), name
        for container in containers(spec):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name


def test_what_is_written_has_a_place_of_known_size(manifests: Any, pods: Any) -> None:
    for objects in manifests.values():
        for name, spec, _ in pods(objects):
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory", name
            assert volumes["shared-memory"]["emptyDir"]["sizeLimit"], name
            assert volumes["temporary"]["emptyDir"]["sizeLimit"], name
            for container in containers(spec):
                mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
                assert {"/tmp", "/dev/shm"} <= set(mounts), name
                assert all(volumes[mount["name"]] for mount in mounts.values()), name
                writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
                assert writable == {"/tmp", "/dev/shm"}, name


def test_memory_is_requested_in_full(manifests: Any, pods: Any) -> None:
    for objects in manifests.values():
        for name, spec, _ in pods(objects):
            for container in containers(spec):
                resources = container["resources"]
                assert resources["requests"]["memory"] == resources["limits"]["memory"], name
                assert resources["requests"]["cpu"], name


def server_of(objects: Objects, pods: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pod spec and container of the server."""
    [spec] = [spec for name, spec, _ in pods(objects) if name.startswith("Deployment")]
    [container] = spec["containers"]
    return spec, container


def config_of(objects: Objects, folder: Path) -> ClusterConfig:
    """The configuration that the server would read."""
    [text] = [
        item["data"]["config.toml"]
        for item in objects
        if item["kind"] == "ConfigMap" and "config.toml" in item["data"]
    ]
    tomllib.loads(text)
    file = folder / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, {})


def applications(manifests: Any) -> dict[str, Objects]:
    found = {name: items for name, items in manifests.items() if name != "prerequisites.yaml"}
    assert len(found) == 4
    return found


def test_the_server_loads_its_config(manifests: Any, pods: Any, tmp_path: Path) -> None:
    for objects in applications(manifests).values():
        _, container = server_of(objects, pods)
        config = config_of(objects, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"grpc": config.port, "metrics": config.metrics_port}
        assert container["args"] == ["serve", "--config", "/etc/phalanx/config.toml"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        files = [config.tls_cert, config.tls_key, config.tls_client_ca, config.token_file]
        assert all(str(Path(str(file)).parent) in mounts for file in files)
        assert config.model == "smollm2" or "/models" in mounts
        assert not config.insecure
        assert config.threads is not None  # the node's cores are not the pod's


def test_ranks_have_places(manifests: Any, pods: Any, tmp_path: Path) -> None:
    """As many as the configuration takes, each with its GPU, and cores for its threads."""
    for objects in applications(manifests).values():
        config = config_of(objects, tmp_path)
        clusters = [item for item in objects if item["kind"] == "RayCluster"]
        _, server = server_of(objects, pods)
        count, container = 1, server
        if clusters:
            [group] = clusters[0]["spec"]["workerGroupSpecs"]
            count, [container] = group["replicas"], group["template"]["spec"]["containers"]
            places = int(group["rayStartParams"]["num-cpus"])
            assert clusters[0]["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            assert places * count == config.ranks_per_replica * config.replicas
            assert config.placement == ("STRICT_SPREAD" if places == 1 else "PACK")
            assert config.ray_address == "auto"
        ranks = config.ranks_per_replica * config.replicas // count
        assert ranks * (config.threads or 0) <= container["resources"]["limits"]["cpu"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert gpus == (ranks if config.device == "cuda" else 0)


def test_probes_are_split(manifests: Any, pods: Any, deploy: Path) -> None:
    """Liveness asks for any answer, readiness for SERVING; neither runs before the start is over."""
    assert (deploy / "healthcheck.py").exists()
    alive = ["python", "/opt/phalanx/healthcheck.py", "--live"]
    for objects in applications(manifests).values():
        _, container = server_of(objects, pods)
        assert container["startupProbe"]["exec"]["command"] == alive
        assert container["livenessProbe"]["exec"]["command"] == alive
        assert container["readinessProbe"]["exec"]["command"] == alive[:2]
        assert container["readinessProbe"]["failureThreshold"] <= 2


def test_a_start_may_take_as_long_as_configured(manifests: Any, pods: Any, tmp_path: Path) -> None:
    for objects in applications(manifests).values():
        config = config_of(objects, tmp_path)
        _, container = server_of(objects, pods)
        probe = container["startupProbe"]
        allowed = probe["periodSeconds"] * probe["failureThreshold"]
        assert allowed > config.start_timeout_s * config.replicas
        [deployment] = [item for item in objects if item["kind"] == "Deployment"]
        assert deployment["spec"]["progressDeadlineSeconds"] > allowed


def test_pods_outlive_the_drain(manifests: Any, pods: Any) -> None:
    """The server has its whole drain, and Ray's pods stay until it is over."""
    for objects in applications(manifests).values():
        spec, container = server_of(objects, pods)
        sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert sleep == "sleep" and int(seconds) > 0
        end = int(seconds) + DRAIN_S + OWN_TIME_S
        assert spec["terminationGracePeriodSeconds"] >= end
        for name, other, _ in pods(objects):
            if not name.startswith("RayCluster"):
                continue
            [ray] = other["containers"]
            assert int(ray["lifecycle"]["preStop"]["exec"]["command"][1]) >= end, name
            assert other["terminationGracePeriodSeconds"] > end, name


def test_the_driver_has_a_raylet_beside_it(manifests: Any, pods: Any) -> None:
    """It starts before the server, ends after it, and sees its processes, files and memory."""
    clusters = {name: items for name, items in manifests.items() if name.startswith("two-nodes")}
    assert len(clusters) == 2
    for objects in clusters.values():
        spec, server = server_of(objects, pods)
        [raylet] = spec["initContainers"]
        assert raylet["restartPolicy"] == "Always"
        assert spec["shareProcessNamespace"] is True
        assert "--num-cpus=0" in raylet["command"]
        [cluster] = [item for item in objects if item["kind"] == "RayCluster"]
        head = f"{cluster['metadata']['name']}-head-svc"  # as KubeRay names it
        assert f"--address={head}:6379" in raylet["command"]
        assert raylet["env"] == server["env"]
        token = {"name": cluster["metadata"]["name"], "key": "auth_token"}
        assert server["env"][1]["valueFrom"]["secretKeyRef"] == token
        assert cluster["spec"]["authOptions"] == {"mode": "token"}
        assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["include-dashboard"] == "false"


def selected(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    selector = policy["spec"]["podSelector"]
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def test_only_own_pods_reach_rays_ports(manifests: Any, pods: Any, tmp_path: Path) -> None:
    for objects in applications(manifests).values():
        config = config_of(objects, tmp_path)
        policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
        for name, _, labels in pods(objects):
            mine = [policy for policy in policies if selected(policy, labels)]
            assert mine, name
            own = {key: labels[key] for key in labels if key.endswith(("part-of", "instance"))}
            for policy in mine:
                assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
                for rule in policy["spec"]["ingress"]:
                    if rule["from"] == [{"podSelector": {"matchLabels": own}}]:
                        continue
                    open_ports = {port["port"] for port in rule["ports"]}
                    assert open_ports <= {config.port, config.metrics_port}, name
                    assert not open_ports & RAY_PORTS
                    assert rule["from"], name


def test_disruption_budgets_cover_the_pods(manifests: Any, pods: Any) -> None:
    for objects in applications(manifests).values():
        [budget] = [item for item in objects if item["kind"] == "PodDisruptionBudget"]
        wanted = budget["spec"]["selector"]["matchLabels"]
        covered = [wanted.items() <= labels.items() for _, _, labels in pods(objects)]
        assert all(covered)
        [cluster] = [item for item in objects if item["kind"] == "RayCluster"] or [None]
        if cluster is None:
            assert budget["spec"]["maxUnavailable"] == 1
            continue
        workers = cluster["spec"]["workerGroupSpecs"][0]["replicas"]
        # maxUnavailable would need a scale, which a RayCluster lacks
        assert "maxUnavailable" not in budget["spec"]
        assert budget["spec"]["minAvailable"] == 2 + workers


def test_services_select_the_server_alone(manifests: Any, pods: Any) -> None:
    for objects in applications(manifests).values():
        services = [item for item in objects if item["kind"] == "Service"]
        assert {item["spec"].get("clusterIP") for item in services} == {None, "None"}
        for service in services:
            wanted = service["spec"]["selector"].items()
            hit = [name for name, _, labels in pods(objects) if wanted <= labels.items()]
            assert hit == ["Deployment/phalanx"], service["metadata"]["name"]
            assert {port["targetPort"] for port in service["spec"]["ports"]} == {"grpc"}


def test_certificates_name_the_services(manifests: Any) -> None:
    for objects in applications(manifests).values():
        services = {item["metadata"]["name"] for item in objects if item["kind"] == "Service"}
        [server] = [
            item["spec"]
            for item in objects
            if item["kind"] == "Certificate" and item["metadata"]["name"].endswith("-server")
        ]
        assert {"localhost", *services} <= set(server["dnsNames"])
        assert "server auth" in server["usages"] and "client auth" in server["usages"]


def test_the_autoscaler_knows_our_metric(manifests: Any) -> None:
    [scaler] = [
        item
        for item in manifests["single-node-gpu.yaml"]
        if item["kind"] == "HorizontalPodAutoscaler"
    ]
    [deployment] = [
        item for item in manifests["single-node-gpu.yaml"] if item["kind"] == "Deployment"
    ]
    assert "replicas" not in deployment["spec"]  # which would undo the autoscaler at every upgrade
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    names = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert names == {"phalanx_waiting_requests", "phalanx_kv_use_ratio"}
    assert DEFAULTS["metrics_port"] == 9400
