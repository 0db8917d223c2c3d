"""The structure of src/: which file may import which, and what exists in one place only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import safelight

ROOT = Path(safelight.__file__).parent
MAX_LINES = 400


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["safelight", *path.relative_to(ROOT).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below, without those for a type checker only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from nodes(child)


@cache
def imports(name: str) -> frozenset[str]:
    """Return the modules of the package that a module imports, at the top or in a function."""
    found: set[str] = set()
    for node in nodes(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in modules() else node.module for module in inner}
    return frozenset(found & modules().keys() - {name})


def circles() -> list[list[str]]:
    """Return groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imports(name):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in modules():
        if name not in index:
            visit(name)
    return found


def test_no_import_circle() -> None:
    """Imports inside functions count; those for a type checker do not."""
    assert circles() == []


# BELOW: all that a package may import. NOT_ABOVE: what a package must not import.
BELOW = {
    "sampling": ("errors", "sampling"),
    "nets": ("errors", "nets"),
}
NOT_ABOVE = {
    "families": ("engine", "model", "server", "studio", "cli", "explain", "train"),
    "weights": ("engine", "server", "studio", "cli", "explain", "train"),
    "engine": ("model", "server", "studio", "cli", "explain", "train", "compare", "bench"),
    "explain": ("server", "studio", "cli", "train"),
    "server": ("studio", "cli", "train"),
    "studio": ("cli",),
}


def package(name: str) -> str:
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize("name", [*BELOW, *NOT_ABOVE])
def test_no_arrow_runs_back_up(name: str) -> None:
    """cli and studio know the server, it knows the engine, the engine families and sampling."""
    mine = [module for module in modules() if package(module) == name]
    assert mine
    arrows = {(module, package(other)) for module in mine for other in imports(module)}
    if name in BELOW:
        assert not {arrow for arrow in arrows if arrow[1] not in BELOW[name]}
    else:
        assert not {arrow for arrow in arrows if arrow[1] in NOT_ABOVE[name]}


def calls(name: str, function: str) -> int:
    """Return how often a module calls a function, by its own name or as an attribute."""
    names = [
        getattr(node.func, "id", getattr(node.func, "attr", None))
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call)
    ]
    return names.count(function)


def test_the_engine_alone_steps_jobs() -> None:
    """`advance` is called once, and nobody imports it under another name."""
    assert {name: n for name in modules() if (n := calls(name, "advance"))} == {
        "safelight.engine.core": 1
    }
    takers = {
        name
        for name in modules()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom) and "advance" in [a.name for a in node.names]
    }
    assert takers == {"safelight.engine.core"}


def text(name: str) -> str:
    return modules()[name].read_text(encoding="utf-8")


@cache
def code(name: str) -> str:
    """Return the module without docstrings and comments."""
    return ast.unparse(_Bare().visit(ast.parse(text(name))))


class _Bare(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else node


def test_the_scale_of_variance_exploding_stands_once() -> None:
    """√(1 + σ²), its square and its inverse are only in `Level.exploding`."""
    shapes = (
        r"1(\.0)? \+ \w*(\.\w+)*sigma\w* ?\*\* ?2",
        r"1(\.0)? \+ (\w*sigma\w*) \* \2",
        r"hypot\((1(\.0)?, \S*sigma|\S*sigma\S*, 1(\.0)?\))",
        r"1(\.0)? \+ \S*sigma\S*\.(square|pow)\(",
    )
    found = [name for name in modules() for shape in shapes if re.search(shape, code(name))]
    assert found == ["safelight.sampling.rows"]


def test_nothing_waits_by_wait_for() -> None:
    """In Python 3.11 `asyncio.wait_for` loses a cancellation that comes with its result."""
    assert [name for name in modules() if "asyncio.wait_for(" in code(name)] == []


def test_nobody_asks_for_a_kind_of_model() -> None:
    """The family answers what differs between families."""
    kinds = {"text", "pixels"}
    found = set()
    for name in modules():
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Compare):
                values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                asked = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(node)}
                if "kind" in asked and values & kinds:
                    found.add(name)
    assert found == set()


@pytest.mark.parametrize("ending", ["py", "cpp", "h"])
def test_a_file_can_be_read_in_one_sitting(ending: str) -> None:
    names = {path: name for name, path in modules().items()}
    long = {
        names.get(path, path.name)
        for path in ROOT.rglob(f"*.{ending}")
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES
    }
    assert long == set()


def test_the_server_s_modules_are_in_its_table() -> None:
    """Each stands once in the lists by subject in `server/__init__.py`."""
    table = (ast.get_docstring(tree("safelight.server")) or "").split("\n- ")[1:]
    listed = sorted(name.strip() for row in table for name in row.split(":")[1].split(","))
    within = [name.split(".")[2] for name in modules() if name.startswith("safelight.server.")]
    assert listed == sorted(set(within))


def test_families_and_samplers_need_no_pytorch() -> None:
    """A server and `safelight models` ask them without loading PyTorch."""
    import subprocess
    import sys

    program = (
        "import sys; import safelight.families, safelight.sampling, safelight.weights.find; "
        "print([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() in ("[]", "['numpy']"), done.stderr
