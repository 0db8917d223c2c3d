"""Read what a container may use: the time and memory of Linux's control groups.

A process is in a group, and in those around it; each may have limits. Version 1 has a tree of
groups for each controller, such as cpu and memory; version 2 has one tree. Inside a container
only the top of a tree may exist, and it is the container's group. Nothing is found on other
systems. This module imports nothing heavy.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""Where `/sys` and `/proc` are."""

UNLIMITED = 1 << 60
"""Version 1 writes a number above this one for memory without a limit."""


def processor_time(root: Path = ROOT) -> float | None:
    """Return how many processors' time this process may use, None if there is no limit."""
    limits: list[float] = []
    for group in _groups("cpu", root):
        most, period = [*read(group / "cpu.max").split(), "", ""][:2]
        if not most:
            most, period = read(group / "cpu.cfs_quota_us"), read(group / "cpu.cfs_period_us")
        if most.isdecimal() and period.isdecimal() and int(most) and int(period):
            limits.append(int(most) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the bytes of memory this process may use, None if there is no limit."""
    limits = [most for group in _groups("memory", root) if (most := _most(group)) is not None]
    return min(limits, default=None)


def free_memory(root: Path = ROOT) -> int | None:
    """Return the bytes of memory this process may still use, None if there is no limit.

    What files are cached in counts as free: Linux drops it when memory is short.
    """
    found: list[int] = []
    for group in _groups("memory", root):
        most = _most(group)
        used = read(group / "memory.current") or read(group / "memory.usage_in_bytes")
        if most is None or not used.isdecimal():
            continue
        counts = _counts(group / "memory.stat")
        whole = "total_" if "total_inactive_file" in counts else ""  # version 1: of groups inside
        cached = sum(counts.get(f"{whole}{name}_file", 0) for name in ("active", "inactive"))
        found.append(max(0, most - int(used) + cached))
    return min(found, default=None)


def out_of_memory_kills(root: Path = ROOT) -> int:
    """Return how many processes Linux has ended because memory ran out; 0 if it is not counted.

    Where Linux counts them by group, only those of this process's group.
    """
    for group in _groups("memory", root):
        for name in ("memory.events", "memory.oom_control"):
            found = _counts(group / name).get("oom_kill")
            if found is not None:
                return found
    return _counts(root / "proc/vmstat").get("oom_kill", 0)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups, its own first."""
    top = root / "sys/fs/cgroup"
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        trees = [top] if not controllers else [top / controller, top / controllers]
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for n in range(len(parts), -1, -1):
            for tree in dict.fromkeys(trees):
                yield tree.joinpath(*parts[:n])


def _most(group: Path) -> int | None:
    """Return a group's limit of memory in bytes, None if it has none."""
    most = read(group / "memory.max") or read(group / "memory.limit_in_bytes")
    return int(most) if most.isdecimal() and int(most) < UNLIMITED else None


def _counts(path: Path) -> dict[str, int]:
    """Return the counts of a file with lines of a name and a number."""
    pairs = (line.split() for line in read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def read(path: Path) -> str:
    """Return a file's text without blanks at its ends; nothing if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
