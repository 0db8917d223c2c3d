"""Builds the kernels. Everything else about the package is in pyproject.toml.

They are libraries of C functions for ctypes, not extensions of Python: a file's name has no version
of Python in it, and one wheel serves all versions. They are written in GCC's dialect of C++, which
GCC and Clang compile: CXX is the compiler, with options if need be, CXXFLAGS are more options.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WINDOWS, MACOS = sys.platform == "win32", sys.platform == "darwin"
EVERYWHERE, OF_LINUX = "_portable", "_amx"


def compiler() -> list[str]:
    """Return the command of the C++ compiler.

    It is Clang on Windows, where GCC does not align vectors on the stack.
    """
    if said := os.environ.get("CXX"):
        return [said] if shutil.which(said) else words(said)  # a path may have blanks
    names = ["clang++"] if WINDOWS or MACOS else ["g++", "clang++"]
    return [next(filter(shutil.which, names), names[0])]


def words(line: str) -> list[str]:
    """Return the arguments in a line, as a shell does: quoted ones may have blanks."""
    return shlex.split(line, posix=not WINDOWS)


def link() -> list[str]:
    """Return the flags that link a library which shares the threads of PyTorch's OpenMP.

    On macOS it has one thread: PyTorch brings an OpenMP of its own, without files to compile with.
    """
    if WINDOWS:
        return ["-shared", "-fopenmp=libiomp5"]
    return ["-shared", "-fPIC", "-fvisibility=hidden", *([] if MACOS else ["-fopenmp"])]


class Build(build_ext):
    """Compiles each library with one call of the compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + (".dll" if WINDOWS else ".so")

    def finalize_options(self) -> None:
        super().finalize_options()
        self.extensions = [one for one in self.extensions if fits(one.name)]
        self.parallel = self.parallel or True

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not self.force and out.stat().st_mtime > changed():
            return
        own = words(os.environ.get("CXXFLAGS", ""))
        flags = [*ext.extra_compile_args, "-std=c++17", *own, *link()]
        command = [*compiler(), *flags, *ext.sources, "-o", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as e:
            raise CompileError(f"{command[0]} cannot be run: {e.strerror}") from None
        if done.returncode:
            raise CompileError(done.stderr)


def changed() -> float:
    """Return when the sources and flags of the libraries last changed, in seconds since 1970."""
    here = Path(__file__).parent
    sources = [*here.glob("src/safelight/fast/*.cpp"), *here.glob("src/safelight/fast/*.h")]
    return max(
        one.stat().st_mtime for one in (*sources, here / "setup.py", here / "pyproject.toml")
    )


def fits(name: str) -> bool:
    """Return whether a library is for this kind of processor and system."""
    own = name.rpartition(".")[2]
    if own == OF_LINUX and not sys.platform.startswith("linux"):
        return False
    return own == EVERYWHERE or platform.machine().lower() in ("x86_64", "amd64")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


arguments: dict[str, Any] = {"cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}
setup(**arguments)
