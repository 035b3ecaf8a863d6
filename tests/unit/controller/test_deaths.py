"""What the kernel and Ray say of killed processes, and ports that are taken."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from phalanx.controller.cluster.deaths import oom_kills, starved
from phalanx.controller.ports import check_free
from phalanx.protos.errors import ConfigError


def test_kills_are_those_of_the_control_group_where_it_counts_them(tmp_path: Path) -> None:
    events, vmstat = tmp_path / "memory.events", tmp_path / "vmstat"
    assert oom_kills(events, vmstat) == 0
    vmstat.write_text("nr_free_pages 10\noom_kill 7\n")
    assert oom_kills(events, vmstat) == 7
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(events, vmstat) == 2


def test_rays_own_monitor_is_told_from_its_guesses() -> None:
    guess = "Some common causes include: (1) the process was killed by the OOM killer due to high"
    assert not starved(guess)
    assert starved("Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed")
    assert starved("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low")


def test_a_taken_port_and_a_foreign_host_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"openai_host '127.0.0.1', port {port}: cannot be"):
            check_free("openai_host", "127.0.0.1", port)
    check_free("host", "127.0.0.1", port)
    check_free("host", "[::1]" if socket.has_dualstack_ipv6() else "127.0.0.1", 0)
    with pytest.raises(ConfigError, match="host '192.0.2.77'"):
        check_free("host", "192.0.2.77", 0)
