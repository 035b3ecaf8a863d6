"""A cluster on a Ray head of its own, whose GCS can be killed and started again.

The GCS keeps its tables in RocksDB, so that it goes on where it was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

import psutil

from harness.nodes import OBJECT_STORE
from harness.server import ENDED, MARK, Server, Topology

START_S = 120.0


def free_port() -> int:
    """One that nobody has right now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class OwnHead(Server):
    """`phalanx serve --ray-address`, beside a Ray head that is not ours to start elsewhere."""

    def __init__(self, folder: Path, model: str, topology: Topology) -> None:
        super().__init__(folder, model, topology)
        port = free_port()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        self._more = token | {"RAY_USAGE_STATS_ENABLED": "0", MARK: self.mark}
        self._arguments += ["--ray-address", f"127.0.0.1:{port}"]
        # sockets of Ray's are files below it, and their paths may have 107 characters
        self._session = Path(tempfile.mkdtemp(prefix="phx"))
        self._log = folder / "ray.log"
        words = ["ray", "start", "--head", "--port", str(port), "--num-cpus", "2"]
        words += ["--node-ip-address", "127.0.0.1", "--include-dashboard", "false"]
        words += ["--object-store-memory", str(OBJECT_STORE), "--disable-usage-stats"]
        self._start_head = [*words, "--temp-dir", str(self._session)]
        self._storage = {
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "gcs"),
            # for so long raylet and ranks go on without it
            "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
            "PHALANX_FAILPOINTS": str(self.points),
        }
        self._gcs: tuple[list[str], dict[str, str]] | None = None
        self._gcs_process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> str:
        """The head is started before, once."""
        if self._gcs is None:
            with self._log.open("ab") as log:
                subprocess.run(
                    self._start_head,
                    stdout=log,
                    stderr=log,
                    env=os.environ | self._more | self._storage,
                    timeout=START_S,
                    check=True,
                )
            gcs = self.gcs()
            self._gcs = gcs.cmdline(), gcs.environ()
        return super().start(wait)

    def gcs(self) -> psutil.Process:
        """The process that is Ray's GCS."""
        [found] = [process for process in self.processes() if process.name() == "gcs_server"]
        return found

    def kill_gcs(self) -> None:
        """SIGKILL."""
        gcs = self.gcs()
        gcs.kill()
        with contextlib.suppress(psutil.Error):
            gcs.wait(10)

    def start_gcs(self) -> None:
        """As it was."""
        assert self._gcs is not None
        command, environment = self._gcs
        with self._log.open("ab") as log:
            self._gcs_process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def close(self) -> None:
        """End all of it."""
        try:
            self.stop()
        finally:
            self.sweep()
            if self._gcs_process is not None:
                self._gcs_process.wait(10)
            psutil.wait_procs([item for item in self.processes() if item.status() not in ENDED], 10)
            shutil.rmtree(self._session, ignore_errors=True)
