"""Settings of the test suite: it runs in several processes of one thread each.

Its summary says which tests were skipped, and why.
"""

import collections
import gc
import os
import signal
import sys

import hypothesis
import pytest

from safelight.threads import before_torch

# PyTorch reads this when it is imported; processes started by tests inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
before_torch()

# Tests start some hundred processes. Without stored bytecode, each would compile all of Safelight.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No deadline: on a busy machine, a slow example is no fault of the example.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# A shell makes background processes ignore Ctrl-C, which the tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

MISSING = ("this processor has no ", "no CUDA GPU here")
"""The beginnings of reasons to skip that no installation can remove."""
REMEDIES = {
    "chromium": "apt-get install chromium",
    "browser": "apt-get install chromium",
    "postgres": "apt-get install postgresql",
    "initdb": "apt-get install postgresql",
    "compiler": "apt-get install g++ && make clean test",
    "could not import": "make test",
}
"""By a word in the reason of a skip: the command that installs what is missing."""


# The tests themselves are a million objects, which each collection would look through.
gc.disable()


def pytest_collection_finish(session) -> None:
    gc.freeze()  # a collection before it takes a second of each process, and finds little
    gc.enable()


def pytest_xdist_auto_num_workers() -> int:
    """Return one more than the processors: a test that waits for a browser leaves one idle."""
    return (os.cpu_count() or 1) + 1


def pytest_addoption(parser) -> None:
    parser.addoption("--emulate-amx", action="store_true", help="have every test use AMX, emulated")


def pytest_sessionstart(session) -> None:
    if session.config.getoption("emulate_amx"):
        from tests import emulated_amx  # imports PyTorch

        if why := emulated_amx.lacks():
            raise pytest.UsageError(f"AMX cannot be emulated: {why}")
        emulated_amx.emulate(pytest.MonkeyPatch())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Leave out the tests of the long run, and order and group the others.

    Tests that share a module's fixture run in one process. Modules that wait for servers and
    modules that compute alternate, so that the processes together keep the processors busy.
    """
    if config.getoption("loadgroup", default=False):  # in a process of pytest-xdist
        for item in items:
            if mark := item.get_closest_marker("xdist_group"):
                _run_with(item, mark.args[0])
            elif _shares(item):
                _run_with(item, item.path.stem)
    if os.environ.get("SAFELIGHT_SOAK"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = _alternating([item for item in items if not item.get_closest_marker("soak")])


def _run_with(item, group: str) -> None:
    """Have pytest-xdist run this test in the same process as the others of its group.

    pytest-xdist 3.8 itself loses the groups under pytest 9.2, without a word:
    https://github.com/pytest-dev/pytest-xdist/issues/1386
    """
    if not item.nodeid.endswith(f"@{group}"):
        item._id = type(item.id).parse(f"{item.nodeid}@{group}")
    assert item.nodeid.endswith(f"@{group}")


def _alternating(items: list) -> list:
    """Return the tests in an order that spreads both kinds of module over the whole run.

    The studio's tests come first: they share one process, and would otherwise end last.
    """
    modules = collections.defaultdict(list)
    for item in items:
        modules[item.path].append(item)
    kinds = {True: [], False: []}
    for path in sorted(modules, key=lambda path: path.stem != "test_studio"):
        kinds[path.parent.name == "server"].append(modules[path])
    # A whole module at a server takes long. At the end, other processes would wait for it.
    until = {True: 0.85, False: 1}
    placed = [
        (until[server] * i / len(kind), module)
        for server, kind in kinds.items()
        for i, module in enumerate(kind)
    ]
    return [item for _, module in sorted(placed, key=lambda one: one[0]) for item in module]


def _shares(item) -> bool:
    found = getattr(item, "_fixtureinfo", None)
    fixtures = [one[-1] for one in found.name2fixturedefs.values()] if found else []
    return any(one.scope == "module" and one.baseid.endswith(item.path.name) for one in fixtures)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    """Write how near pictures are to diffusers, and what was repeated or skipped, and why."""
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
        # A test that passes at its second try may show a bug that a user meets at the first.
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
    """Fail the run, with SAFELIGHT_NO_SKIPS=1, for any skip but those for lack of a processor."""
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
