"""Where Ray puts the ranks of several stages: two nodes of one cluster, on this machine; which an
embedded instance does not join."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

SCRIPT = """
import os, sys, traceback
import ray
from ray.cluster_utils import Cluster
from phalanx.controller.cluster.ray_cluster import RayCluster
from phalanx.controller.cluster.ray_fleet import RayFleet
from phalanx.protos.errors import ConfigError

os.environ["RAY_AUTH_MODE"] = "disabled"
SETTINGS = dict(
    collectives="auto", threads=1, replicas=1, start_timeout_s=30.0, step_timeout_s=30.0,
    silence_timeout_s=3.0,
)

def nodes_of(fleet):
    get = lambda self: __import__("ray").get_runtime_context().get_node_id()
    return ray.get([actor.__ray_call__.remote(get) for actor in fleet._actors])

try:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    nodes.add_node(num_cpus=3)
    alone = RayCluster(None, 99)
    assert ray.cluster_resources()["CPU"] == 99, "an embedded instance joined the cluster"
    alone.close()
    cluster = RayCluster(nodes.address, 4)
    for placement in ("auto", "STRICT_SPREAD"):
        fleet = RayFleet(2, 2, "cpu", placement=placement, **SETTINGS)
        fleet.reserve()
        a, b, c, d = nodes_of(fleet)
        assert a == b and c == d and a != c, (placement, a, b, c, d)
        fleet.stop()
    fleet = RayFleet(2, 2, "cpu", placement="STRICT_PACK", **SETTINGS | {"start_timeout_s": 2.0})
    try:
        fleet.reserve()
    except ConfigError as error:
        print(error)
    cluster.close()
    nodes.shutdown()
except BaseException:
    traceback.print_exc()
    os._exit(1)
"""


def test_ranks_of_a_stage_share_a_node_and_stages_are_spread() -> None:
    # a cluster of this process says things of itself in the environment
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # not where others look for clusters
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=env | {"RAY_TMPDIR": folder},
        )
    assert done.returncode == 0, done.stderr
    assert "tp is 2, pp is 2 with placement STRICT_PACK: no such place became free" in done.stdout
