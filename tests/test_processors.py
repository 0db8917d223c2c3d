"""How many threads are best, on machines that a test lays out as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from safelight import processors, threads
from safelight.processors import Choice


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Machine":
    return Machine(tmp_path, monkeypatch)


class Machine:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._monkeypatch = root, monkeypatch

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def has(self, cores: Sequence[str], capacities: Sequence[int] = ()) -> None:
        """Give it cores, each the list of its processors, such as "0-1", and their capacities."""
        count = 0
        for i, core in enumerate(cores):
            for number in sorted(processors._numbers(core)):
                cpu = f"sys/devices/system/cpu/cpu{number}"
                self.write(f"{cpu}/topology/thread_siblings_list", core)
                if capacities:
                    self.write(f"{cpu}/cpu_capacity", str(capacities[i]))
                count += 1
        self.allow(range(count))

    def allow(self, numbers: Sequence[int]) -> None:
        allowed: Any = lambda pid: set(numbers)  # noqa: E731
        self._monkeypatch.setattr(processors.os, "sched_getaffinity", allowed, raising=False)

    def choose(self) -> Choice | None:
        return processors.choose(self.root)


PAIRS = [f"{2 * i}-{2 * i + 1}" for i in range(8)]
"""Eight cores of two threads each."""


def test_equal_cores_keep_pytorchs_own_number(machine: Machine) -> None:
    machine.has(PAIRS)
    assert machine.choose() is None
    assert processors.best(machine.root) == 8
    assert processors.cores() == 16


def test_nothing_is_chosen_where_linux_does_not_tell(machine: Machine) -> None:
    machine.allow(range(4))
    assert machine.choose() is None
    assert processors.best(machine.root) is None


@pytest.mark.parametrize(
    ("performance", "efficiency", "threads"),
    [(8, 8, 8), (8, 4, 8), (6, 4, 6), (2, 8, None), (4, 8, None)],
)
def test_performance_cores_of_intel(
    machine: Machine, performance: int, efficiency: int, threads: int | None
) -> None:
    """An efficiency core counts half: 2 and 8 are worth 5 together, 8 and 4 no more than 6."""
    cores = PAIRS[:performance]
    first = 2 * performance
    machine.has(cores + [str(first + i) for i in range(efficiency)])
    machine.write("sys/devices/cpu_core/cpus", f"0-{first - 1}")
    machine.write("sys/devices/cpu_atom/cpus", f"{first}-{first + efficiency - 1}")
    found = machine.choose()
    assert (found and found.threads) == threads
    if found is not None:
        assert found.why == (
            f"one for each of the {performance} fastest cores; the other {efficiency} are slower"
        )


def test_large_and_small_cores_of_arm(machine: Machine) -> None:
    machine.has([str(i) for i in range(8)], [414] * 4 + [1024] * 4)
    assert machine.choose() == Choice(
        4, "one for each of the 4 fastest cores; the other 4 are slower"
    )
    machine.has([str(i) for i in range(8)], [1024] + [870] * 3 + [279] * 4)
    assert machine.choose() == Choice(
        4, "one for each of the 4 fastest cores; the other 4 are slower"
    )


def test_only_processors_that_the_process_may_use_count(machine: Machine) -> None:
    machine.has([str(i) for i in range(8)], [414] * 4 + [1024] * 4)
    machine.allow([0, 1, 2, 3, 4])  # four slow ones and a fast one
    assert machine.choose() is None


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"": "max 100000"}, None),
        ({"": "200000 100000"}, 2),
        ({"": "150000 100000"}, 2),
        ({"": "10000 100000"}, 1),
        ({"": "800000 100000"}, None),  # as many as there are cores
        ({"": "600000 100000", "kubepods/": "max 100000", "kubepods/pod/": "300000 100000"}, 3),
        ({"": "many few"}, None),
        ({"": "0 0"}, None),
        ({}, None),
    ],
)
def test_the_time_of_a_control_group(
    machine: Machine, files: dict[str, str], threads: int | None
) -> None:
    machine.has(PAIRS)
    machine.write("proc/self/cgroup", "0::/kubepods/pod")
    for group, text in files.items():
        machine.write(f"sys/fs/cgroup/{group}cpu.max", text)
    found = machine.choose()
    assert (found and found.threads) == threads


@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("group", ["", "docker/1f/"])  # inside of a container, and outside
@pytest.mark.parametrize(("time", "threads"), [("250000", 3), ("-1", None)])
def test_the_time_of_a_control_group_of_version_1(
    machine: Machine, mounted: str, group: str, time: str, threads: int | None
) -> None:
    machine.has(PAIRS)
    machine.write("proc/self/cgroup", "7:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/")
    machine.write(f"sys/fs/cgroup/{mounted}/{group}cpu.cfs_quota_us", time)
    machine.write(f"sys/fs/cgroup/{mounted}/{group}cpu.cfs_period_us", "100000")
    found = machine.choose()
    assert (found and found.threads) == threads
    if found is not None:
        assert found.why == "the container may use 2.5 of 16 processors"


def test_less_time_than_fast_cores(machine: Machine) -> None:
    machine.has([str(i) for i in range(8)], [414] * 4 + [1024] * 4)
    machine.write("proc/self/cgroup", "0::/")
    machine.write("sys/fs/cgroup/cpu.max", "300000 100000")
    assert machine.choose() == Choice(3, "the container may use 3 of 8 processors")


@pytest.mark.parametrize(
    ("chosen", "used"),
    [
        ({}, {"OMP_NUM_THREADS": "3"}),
        *[({name: count}, {name: count}) for name in threads.COUNTS for count in ("7", "8,2", "")],
        *[({name: "9"}, {name: "8"}) for name in threads.COUNTS],
    ],
)
def test_the_number_is_the_users_up_to_that_of_processors(
    chosen: dict[str, str], used: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "choose", lambda: Choice(3, "a test"))
    monkeypatch.setattr(processors, "cores", lambda: 8)
    for name in threads.COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    threads.before_torch()
    import os

    found = {name: os.environ[name] for name in threads.COUNTS if name in os.environ}
    assert found == used
