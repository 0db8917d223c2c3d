"""Memory of control groups, on machines that a test lays out as files. Time: test_processors.py."""

from pathlib import Path

import pytest

from safelight import containers
from safelight.fast import memory

HUGE = "9223372036854771712"
"""What version 1 writes for no limit."""


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


VERSION_2 = {
    "proc/self/cgroup": "0::/user/job",
    "sys/fs/cgroup/memory.max": "16000000",
    "sys/fs/cgroup/memory.current": "8500000",
    "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 500000\nactive_file 0",
    "sys/fs/cgroup/user/memory.max": "8000000",
    "sys/fs/cgroup/user/memory.current": "7900000",
    "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 5000000\nactive_file 2000000",
    "sys/fs/cgroup/user/job/memory.max": "max",
    "sys/fs/cgroup/user/job/memory.current": "1",
    "sys/fs/cgroup/user/job/memory.events": "low 0\noom 3\noom_kill 2",
}
VERSION_1 = {
    "proc/self/cgroup": "8:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/",
    "sys/fs/cgroup/memory/docker/1f/memory.limit_in_bytes": "8000000",
    "sys/fs/cgroup/memory/docker/1f/memory.usage_in_bytes": "7900000",
    "sys/fs/cgroup/memory/docker/1f/memory.stat": (
        "inactive_file 1\ntotal_inactive_file 5000000\ntotal_active_file 2000000"
    ),
    "sys/fs/cgroup/memory/docker/1f/memory.oom_control": "oom_kill_disable 0\noom_kill 2",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": HUGE,
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
}


def inside(files: dict[str, str]) -> dict[str, str]:
    """Return the files of a container of version 1, which sees its group as the top."""
    known = {k.replace("docker/1f/", ""): v for k, v in files.items() if "docker/1f/" in k}
    return known | {"proc/self/cgroup": files["proc/self/cgroup"]}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1, inside(VERSION_1)])
def test_the_narrowest_limit_counts_and_cached_files_are_free(
    tmp_path: Path, files: dict[str, str]
) -> None:
    root = lay_out(tmp_path, files)
    assert containers.memory_limit(root) == 8_000_000
    assert containers.free_memory(root) == 7_100_000
    assert containers.out_of_memory_kills(root) == 2


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/"},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"},
        {"proc/self/cgroup": "8:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": HUGE},
        {"proc/self/cgroup": "nonsense\n\n:", "sys/fs/cgroup/memory.max": "many"},
    ],
)
def test_nothing_limits_memory(tmp_path: Path, files: dict[str, str]) -> None:
    root = lay_out(tmp_path, files)
    assert containers.memory_limit(root) is None
    assert containers.free_memory(root) is None
    assert containers.out_of_memory_kills(root) == 0


def test_kills_are_counted_for_the_machine_where_groups_do_not_tell(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/vmstat": "nr_free_pages 9\noom_kill 4"})
    assert containers.out_of_memory_kills(root) == 4


def test_a_limit_holds_for_the_memory_that_models_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "memory_limit", lambda: 1 << 28)
    monkeypatch.setattr(containers, "free_memory", lambda: 1 << 27)
    memory.total.cache_clear()
    try:
        assert memory.total() == 1 << 28
        assert memory.free() == 1 << 27
    finally:
        memory.total.cache_clear()
