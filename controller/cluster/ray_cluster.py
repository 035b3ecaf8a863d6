"""Our connection to Ray: what there is, and what is free."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ray
from ray._private import ray_constants, state
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from phalanx.protos.errors import ConfigError, GroupLost

from .ray_nodes import NodeWatch
from .ray_removals import Removals
from .ray_sessions import Session, sweep

NAMESPACE = "phalanx"
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes; nothing of ours goes through it
PROBE_S = 5.0

Device = Literal["cpu", "cuda"]


class RayCluster:
    """Our connection to Ray: an embedded instance, or a cluster that runs already."""

    def __init__(self, address: str | None, ranks: int, *, verbose: bool = False) -> None:
        """Connect. ranks: how many an embedded instance must have room for. Raises
        `ConfigError` when there is no cluster at `address`."""
        self.watch = NodeWatch()
        """Who has gone of its nodes."""
        self.removals = Removals()
        """Of the places that ended fleets had."""
        self._session: Session | None = None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        common: dict[str, Any] = {
            "namespace": NAMESPACE,
            "logging_level": "INFO" if verbose else "ERROR",
            "log_to_driver": verbose,
        }
        if address is None:
            with _loopback_alone():
                context = ray.init(
                    # without this, another cluster of the machine or RAY_ADDRESS would be joined
                    "local",
                    **common,
                    # ranks are counted, not cores: they share the cores by setting their threads
                    num_cpus=max(ranks, os.cpu_count() or 1),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _node_ip_address=LOOPBACK,
                    # Ray would run ranks below every other process of the machine
                    _system_config={"worker_niceness": 0},
                )
            folder = Path(context.address_info["session_dir"])
            self._session = Session(folder)
            sweep(folder.parent)
            return
        _check_answers(address)
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"ray_address is {address!r}, no Ray cluster answers there; one with token "
                "authentication wants RAY_AUTH_MODE=token and its token, in RAY_AUTH_TOKEN or "
                "~/.ray/auth_token"
            ) from error

    def device(self, wanted: str, ranks: int) -> Device:
        """Where ranks compute: "auto" takes GPUs when there is one for each rank."""
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if wanted == "cuda" and gpus < ranks:
            raise ConfigError(f"device is 'cuda' for {ranks} ranks, the cluster has {gpus} GPUs")
        return "cuda" if wanted == "cuda" or (wanted == "auto" and gpus >= ranks) else "cpu"

    def free(self, device: Device) -> dict[str, int]:
        """Ranks that each live node could take now. Raises `GroupLost` when Ray does not answer."""
        wanted = ("CPU", "GPU") if device == "cuda" else ("CPU",)
        try:
            self.removals.settle()
            nodes, gone = state.available_resources_per_node(), self.watch.gone()
            return {
                node: int(min(resources.get(name, 0.0) for name in wanted))
                for node, resources in nodes.items()
                if node not in gone
            }
        except RayError as error:
            raise GroupLost(f"Ray does not say what is free: {type(error).__name__}") from error

    def ask_for(self, ranks: int, device: Device) -> None:
        """Tell the cluster's autoscaler, where it has one, that it shall have room for so many ranks
        in all, the server's own included. Raises `GroupLost` when Ray does not answer."""
        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        try:
            request_resources(bundles=[bundle] * ranks)
        except (RayError, RuntimeError, ConnectionError) as error:
            raise GroupLost(f"Ray's autoscaler cannot be told: {type(error).__name__}") from error

    def close(self) -> None:
        """Disconnect; an embedded instance ends."""
        ray.shutdown()
        if self._session is not None:
            self._session.close()
            self._session = None


@contextlib.contextmanager
def _loopback_alone() -> Iterator[None]:
    """What Ray starts listens on the loopback address. It would take the machine's own one for that,
    but where it makes no clusters of several machines: on Windows and macOS, or when told so."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    known, before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[name] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" or a name that Ray resolves
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"ray_address is {address!r}, nothing listens there: {error.strerror or 'no answer'}"
        ) from None
