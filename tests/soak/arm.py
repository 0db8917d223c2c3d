"""The kernels' tests with the portable library compiled for ARM, in an emulator.

    apt-get install g++-aarch64-linux-gnu qemu-user
    python tests/soak/arm.py [pytest's arguments]

The tests run on this machine. Each call of a kernel, with the memory of its tensors, is sent to a
process that runs under qemu-aarch64 (arm.c), and what the kernel wrote comes back. This shows that
results are right, not that they are fast.
"""

import ctypes
import struct
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
COMPILER, SYSROOT = "aarch64-linux-gnu-", "/usr/aarch64-linux-gnu"
VARIANTS = {"of any ARM processor": [], "with bfloat16": ["-march=armv8.2-a+bf16"]}


def build(folder: Path, flags: list[str]) -> list[str]:
    """Compile the library and its caller; return the command that runs them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extensions = project["tool"]["setuptools"]["ext-modules"]
    own = next(one for one in extensions if one["name"].endswith("._portable"))
    library, caller = folder / "portable.so", folder / "caller"
    common = [*own["extra-compile-args"], "-std=c++17", "-shared", "-fPIC", "-fopenmp", *flags]
    sources = [str(ROOT / one) for one in own["sources"]]
    subprocess.run([f"{COMPILER}g++", *common, *sources, "-o", library], check=True)
    call = str(ROOT / "tests" / "soak" / "arm.c")
    subprocess.run([f"{COMPILER}gcc", "-O1", call, "-ldl", "-o", caller], check=True)
    return ["qemu-aarch64", "-cpu", "max", "-L", SYSROOT, str(caller), str(library)]


class Emulated:
    """Replaces `call` of kernels.Library: calls run in the emulator."""

    def __init__(self, command: list[str]) -> None:
        self.calls = 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"OMP_NUM_THREADS": "2"}
        )

    def call(self, library: Any, name: str, **arguments: Any) -> None:
        _, kind, names = library._kernels[name]
        if arguments.keys() != names:
            raise TypeError(f"{name} takes {sorted(names)}")
        given = {n: a.data_ptr() if isinstance(a, Tensor) else a for n, a in arguments.items()}
        memory, patches = [bytes(kind(**given))], []
        tensors: dict[int, tuple[int, torch.UntypedStorage]] = {}  # by storage: its region
        for field, value in arguments.items():
            if isinstance(value, Tensor) and value.numel():
                storage = value.untyped_storage()
                if storage.data_ptr() not in tensors:
                    tensors[storage.data_ptr()] = len(memory), storage
                    memory.append(ctypes.string_at(storage.data_ptr(), storage.nbytes()))
                region = tensors[storage.data_ptr()][0]
                offset = value.data_ptr() - storage.data_ptr()
                patches.append((0, getattr(kind, field).offset, region, offset))
        message = self._exchange(name, memory, patches, list(tensors.values()))
        if message == "memory":
            raise MemoryError(name)
        if message:
            raise ValueError(f"{name}({given}): not {message}")

    def _exchange(
        self,
        name: str,
        memory: list[bytes],
        patches: list[tuple[int, int, int, int]],
        tensors: list[tuple[int, torch.UntypedStorage]],
    ) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self.calls += 1
        stdin.write(f"safelight_{name}".encode().ljust(64, b"\0"))
        stdin.write(struct.pack(f"<{1 + len(memory)}Q", len(memory), *map(len, memory)))
        stdin.writelines(memory)
        stdin.write(struct.pack("<Q", len(patches)))
        stdin.writelines(struct.pack("<4Q", *patch) for patch in patches)
        stdin.flush()
        message = stdout.read(256).rstrip(b"\0").decode()
        found = [stdout.read(len(one)) for one in memory]
        if len(found[-1]) != len(memory[-1]):
            raise RuntimeError(f"the emulated process died in {name}")
        for region, storage in tensors:
            ctypes.memmove(storage.data_ptr(), found[region], len(found[region]))
        return message


def main() -> int:
    from safelight.fast.kernels import Library

    tests = sys.argv[1:] or [str(ROOT / "tests" / "test_kernels.py")]
    status = 0
    for variant, flags in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            emulated = Emulated(build(Path(folder), flags))
            patch = pytest.MonkeyPatch()
            here = Library.call

            def call(self: Library, name: str, here=here, emulated=emulated, **arguments) -> None:
                if self.variant == "portable":
                    emulated.call(self, name, **arguments)
                else:
                    here(self, name, **arguments)

            patch.setattr(Library, "call", call)
            options = [
                "-n0",
                "-q",
                "-p",
                "no:cacheprovider",
                "-k",
                "portable",
                "--rootdir",
                str(ROOT),
            ]
            status |= pytest.main([*options, *tests])
            patch.undo()
            sys.stdout.write(f"ARM {variant}: {emulated.calls} calls of kernels, {status=}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
