"""The kernels' tests with libraries that check memory accesses and undefined behaviour.

    python tests/soak/sanitize.py [pytest's arguments]

All libraries are compiled with AddressSanitizer and UndefinedBehaviorSanitizer (GCC), beside a copy
of the package. Those that this processor can run are tested, that of AMX emulated; a fault ends the
tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = (
    "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
)


def runtime(name: str) -> str:
    """Return the path of one of GCC's libraries."""
    done = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def main() -> int:
    tests = sys.argv[1:] or ["tests/test_fast.py", "tests/test_int8.py", "tests/test_kernels.py"]
    with tempfile.TemporaryDirectory() as folder:
        leave_out = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "src" / "safelight", Path(folder) / "safelight", ignore=leave_out)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--force", "--build-lib", folder]
        subprocess.run(build, cwd=ROOT, env=os.environ | {"CXXFLAGS": FLAGS}, check=True)
        environment = os.environ | {
            "PYTHONPATH": folder,
            "CXXFLAGS": FLAGS,  # for the emulator of AMX
            "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
            # Python and PyTorch do not free all memory at the end of the process.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        # AddressSanitizer keeps freed memory, and has blocks of its own.
        left_out = "not given_back and not large_blocks"
        options = ["-n0", "-q", "-p", "no:cacheprovider", "-k", left_out]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
