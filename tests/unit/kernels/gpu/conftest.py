"""Kernels for CUDA devices, run or compiled where there is none."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: in the interpreter on the CPU, else on the CUDA device."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("neither Triton's interpreter nor a CUDA device")
    return torch.device("cpu" if INTERPRETED else "cuda")


def _scaled(a: Tensor, b: Tensor, **given: Any) -> Tensor:
    """What the library's scaled product is documented to compute, with its checks of layouts."""
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert a.is_contiguous() and b.t().is_contiguous() and b.shape[0] % 16 == b.shape[1] % 16 == 0
    scale_a, scale_b = given["scale_a"], given["scale_b"]
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
    assert scale_a.dtype is scale_b.dtype is torch.float32
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    assert given["out_dtype"] is torch.bfloat16
    total = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    if given["bias"] is not None:
        assert given["bias"].dtype is torch.bfloat16
        total += given["bias"].double()
    return total.to(given["out_dtype"])


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's product of float8 rows, where there is no device that has it."""
    if INTERPRETED:
        from phalanx.kernels.gpu import float8

        monkeypatch.setattr(float8.torch, "_scaled_mm", _scaled)


class Launch(NamedTuple):
    """A call of a kernel that was recorded instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What the compilers for sm_90a made of a launch."""

    ptx: str
    spills: int
    """Bytes stored to and loaded from local memory because registers ran out."""
    registers: int
    shared: int
    """Bytes of shared memory."""

    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread, to registers or straight to shared memory."""
        vectors = (
            r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg[.\w]* .*0x10"
        )
        return len(re.findall(vectors, self.ptx))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A context in which launches are kept in a list instead of being run."""

    @contextmanager
    def recording() -> Iterator[list[Launch]]:
        from phalanx.kernels import gpu

        launches: list[Launch] = []

        def launch(kernel: Any, *grid: int) -> Callable[..., None]:
            return lambda *args, **options: launches.append(Launch(kernel, grid, args, options))

        with monkeypatch.context() as patch:
            for module in pkgutil.iter_modules(gpu.__path__, "phalanx.kernels.gpu."):
                loaded = importlib.import_module(module.name)
                if hasattr(loaded, "launch") and callable(loaded.launch):
                    patch.setattr(loaded, "launch", launch)
            yield launches

    return recording


def _specialised(value: Any) -> tuple[str, bool]:
    """(type, divisible by 16), as Triton specialises an argument when it is launched."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], True
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[Launch], Compiled]:
    """Compiles a recorded launch for sm_90a; needs no device."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_launch(launch: Launch) -> Compiled:
        names = launch.kernel.arg_names
        options = {key: launch.options[key] for key in OPTIONS if key in launch.options}
        constants = {key: value for key, value in launch.options.items() if key in names}
        signature = dict.fromkeys(constants, "constexpr")
        attributes = {}
        for index, (name, value) in enumerate(zip(names, launch.args, strict=False)):
            signature[name], divisible = _specialised(value)
            if signature[name] == "constexpr":
                constants[name] = value
            elif divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature = {name: signature[name] for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(launch.kernel, signature, places, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        return _assembled(triton, made, tmp_path)

    return compile_launch


def _assembled(triton: Any, made: Any, folder: Path) -> Compiled:
    ptx, path = made.asm["ptx"], folder / "kernel.ptx"
    path.write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path)]
    done = subprocess.run(
        [*command, "-o", str(folder / "kernel.cubin")], capture_output=True, text=True, check=True
    )
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    return Compiled(ptx, spills, registers, made.metadata.shared)
