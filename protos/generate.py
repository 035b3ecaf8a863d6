"""Regenerate the protocol-buffer code: `python -m phalanx.protos.generate`.

The output is committed, so that installing needs no compiler; a test compares it with a fresh
run. `grpcio-tools` is pinned low, because generated code refuses older runtimes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOM = Path(__file__).resolve().parent
PACKAGES = ("kserve", "v1")
PRIVATE = ("kserve",)
"""Packages whose message names are not ours: other software of the process may register the same
ones, and a pool of descriptors holds each name once, so these have a pool of their own. (Of the
compiled protobuf runtime, that is; the pure Python one keeps one registry for all pools.)"""

_SHARED_POOL = "_descriptor_pool.Default()"
_OWN_POOL = "_descriptor_pool.DescriptorPool()"


def generate(target: Path) -> None:
    """Write the generated modules and stubs of every .proto file, by package, below `target`."""
    for package in PACKAGES:
        folder = target / package
        folder.mkdir(exist_ok=True)
        for name, text in _compiled(package).items():
            (folder / name).write_text(text, encoding="utf-8")


def _compiled(package: str) -> dict[str, str]:
    """Name to text of what the compiler makes of a package's files."""
    names = sorted(path.name for path in (ROOM / package).glob("*.proto"))
    made: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        command = [sys.executable, "-P", "-m", "grpc_tools.protoc", f"-Iphalanx/protos={ROOM}"]
        command += outputs + [f"phalanx/protos/{package}/{name}" for name in names]
        subprocess.run(command, check=True)
        for path in sorted((Path(scratch) / "phalanx/protos" / package).iterdir()):
            text = path.read_text(encoding="utf-8")
            if path.name.endswith("_grpc.py") and "class " not in text:
                continue  # a file of messages only has no stubs
            made[path.name] = _with_own_pool(text) if package in PRIVATE else text
    return made


def _with_own_pool(text: str) -> str:
    """A package of one file: a second file would need to be in the same pool."""
    return text.replace(_SHARED_POOL, _OWN_POOL)


if __name__ == "__main__":
    generate(ROOM)
