"""What an installed wheel does: its kernels are there, `doctor` says so, and it draws a picture.

python use_wheel.py      in the environment that the wheel is installed in
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

X86 = platform.machine().lower() in ("x86_64", "amd64")
LINUX = sys.platform.startswith("linux")
WANTED = {"portable", *(("avx512", "avx2") if X86 else ()), *(("amx",) if X86 and LINUX else ())}


def run(*arguments: str, folder: str) -> str:
    """Return what a command of Safelight prints."""
    command = [sys.executable, "-m", "safelight", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        states = json.loads(run("doctor", "--json", folder=folder))["kernels"]["states"]
        for name in WANTED:
            if "built" in states[name]:
                raise SystemExit(f"the kernels {name}: {states[name]}")
        if X86 and not any(states[name] == "active" for name in WANTED):
            raise SystemExit(f"no kernels are active: {states}")
        run("generate", "a red apple", "--steps=2", "--out=apple.png", folder=folder)
        size = (Path(folder) / "apple.png").stat().st_size
    sys.stdout.write(f"kernels: {states}; a picture of {size} bytes\n")


if __name__ == "__main__":
    main()
