"""A cluster of its own for one benchmark, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from phalanx.protos.errors import PhalanxError

READY = re.compile(r"^ready on (\S+)$")
COLOURS = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
STOP_TIMEOUT_S = 60.0


@contextlib.contextmanager
def served(model: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """Run `phalanx serve MODEL` on a free port; yields its address, and stops it at the end.

    A process of its own, so that client and server do not share an interpreter. Raises
    `PhalanxError` when it ends before it is ready; its own words are on stderr.
    """
    command = [sys.executable, "-P", "-m", "phalanx.controller", "serve", model, "--port", "0"]
    command += ["--metrics-port", "off", *flags]
    kept = {name: value for name, value in os.environ.items() if name not in COLOURS}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=kept,
        start_new_session=True,  # Ctrl-C reaches us alone; the server is then stopped in order
    )
    try:
        yield _wait_ready(process)
    finally:
        _stop(process)


def _wait_ready(process: subprocess.Popen[str]) -> str:
    if process.stdout is None:
        raise RuntimeError("the server's output is not piped")
    for line in process.stdout:
        match = READY.match(line.strip())
        if match:
            # what it prints later is read too, or it would block on a full pipe
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return match[1]
    raise PhalanxError(f"phalanx serve ended with code {process.wait()} before it was ready")


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
