"""The suite runs in several processes of one thread each. Its summary says what was skipped."""

import collections
import os
import signal
import sys

import hypothesis
import pytest

from safelight.threads import before_torch

# Read when PyTorch is imported, and by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
before_torch()

# Tests start some hundred processes; without kept bytecode each would compile all of Safelight.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A busy machine is slow, which is no fault of the example that it was slow with.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# A shell that starts something in the background lets it ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

MISSING = ("this processor has no ", "no CUDA GPU here")
"""How the reasons of skips begin that no installation mends."""
REMEDIES = {
    "chromium": "apt-get install chromium",
    "browser": "apt-get install chromium",
    "postgres": "apt-get install postgresql",
    "initdb": "apt-get install postgresql",
    "compiler": "apt-get install g++ && make clean test",
    "could not import": "make test",
}
"""Words of a skip's reason, and the command that brings what is missing."""


def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: who drives a browser or waits for a server leaves one idle."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Leave out what is of the long run alone. What shares a module's fixture shares a process.
    Modules that wait for servers and modules that compute alternate: side by side, the processes
    keep the processors busy.
    """
    for item in items:
        if _shares(item) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if os.environ.get("SAFELIGHT_SOAK"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = _alternating([item for item in items if not item.get_closest_marker("soak")])


def _alternating(items: list) -> list:
    """Return the tests in an order in which both kinds of module are spread over the whole run.

    The studio's come first: they share one process, and would be the last to end.
    """
    modules = collections.defaultdict(list)
    for item in items:
        modules[item.path].append(item)
    kinds = {True: [], False: []}
    for path in sorted(modules, key=lambda path: path.stem != "test_studio"):
        kinds[path.parent.name == "server"].append(modules[path])
    placed = [(i / len(kind), module) for kind in kinds.values() for i, module in enumerate(kind)]
    return [item for _, module in sorted(placed, key=lambda one: one[0]) for item in module]


def _shares(item) -> bool:
    found = getattr(item, "_fixtureinfo", None)
    fixtures = [one[-1] for one in found.name2fixturedefs.values()] if found else []
    return any(one.scope == "module" and one.baseid.endswith(item.path.name) for one in fixtures)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    """Lines of how near pictures are to diffusers', of what was repeated and why, and of what was
    skipped and why.
    """
    near = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "against diffusers"
    ]
    if near:
        terminalreporter.write_line(
            f"against diffusers, {len(near)} tests: latents within "
            f"{max(one['latents'] for one in near):.1e}, pixels within "
            f"{max(one['pixels'] for one in near):.2g} of 255"
        )
    for report in terminalreporter.stats.get("rerun", []):
        # What passes at the second try may still be a bug that a user meets at the first.
        crash = getattr(report.longrepr, "reprcrash", None)
        why = " ".join((crash.message if crash else str(report.longrepr)).split())
        terminalreporter.write_line(f"repeated: {report.nodeid}: {why[:400]}")
    reasons = collections.Counter(
        _reason(report) for report in terminalreporter.stats.get("skipped", [])
    )
    if not reasons:
        terminalreporter.write_line("skipped: none")
        return
    told = [
        f"{count} ({reason}{f': {remedy}' if (remedy := _remedy(reason)) else ''})"
        for reason, count in reasons.most_common()
    ]
    terminalreporter.write_line(f"skipped: {reasons.total()}: {'; '.join(told)}")


def pytest_sessionfinish(session, exitstatus) -> None:
    """SAFELIGHT_NO_SKIPS=1: the run fails if anything was skipped but for want of a processor."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("SAFELIGHT_NO_SKIPS") != "1" or reporter is None:
        return
    reasons = map(_reason, reporter.stats.get("skipped", []))
    if not all(reason.startswith(MISSING) for reason in reasons):
        session.exitstatus = session.exitstatus or 1


def _reason(report) -> str:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ").strip()


def _remedy(reason: str) -> str:
    small = reason.lower()
    return next((remedy for word, remedy in REMEDIES.items() if word in small), "")
