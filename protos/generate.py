"""Regenerate the protocol-buffer code: `python -m phalanx.protos.generate`.

The output is committed, so that installing needs no compiler; a test compares it with a fresh
run. `grpcio-tools` is pinned low, because generated code refuses older runtimes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOM = Path(__file__).resolve().parent


def generate(target: Path) -> None:
    """Write the generated modules and stubs of every .proto file into the folder `target`."""
    names = sorted(path.name for path in (ROOM / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        command = [sys.executable, "-P", "-m", "grpc_tools.protoc", f"-Iphalanx/protos={ROOM}"]
        command += outputs + [f"phalanx/protos/v1/{name}" for name in names]
        subprocess.run(command, check=True)
        for path in sorted((Path(scratch) / "phalanx/protos/v1").iterdir()):
            text = path.read_text()
            if path.name.endswith("_grpc.py") and "class " not in text:
                continue  # a file of messages only has no stubs
            shutil.copy(path, target / path.name)


if __name__ == "__main__":
    generate(ROOM / "v1")
