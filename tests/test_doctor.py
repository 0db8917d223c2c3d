"""What `safelight doctor` shows, and what it does not."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from safelight import doctor, threads
from safelight.cli import app
from safelight.cli.loading import load
from safelight.cli.serve import data_folder
from safelight.errors import SafelightError
from safelight.fast import kernels, memory
from safelight.server.wording import public
from safelight.weights import cache


@pytest.fixture
def said() -> list[str]:
    return CliRunner().invoke(app, ["doctor"]).stdout.splitlines()


def test_a_page_that_ends_with_advice(said: list[str]) -> None:
    assert len(said) < 50
    text = "\n".join(said)
    for heading in ("Processor", "Threads", "Precision", "Kernels", "Memory", "Devices", "Models"):
        assert f"\n{heading}" in text
    assert "embedded" in text
    assert said[said.index("What would make it faster:") + 1].startswith("- ")


def test_the_json_is_what_the_page_is_made_of() -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert doctor.report(found)
    assert found["threads"]["count"] >= 1
    assert found["memory"]["total"] > 1 << 28
    assert found["precision"]["auto"] in ("float32", "bfloat16")


def test_no_names_and_no_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home directory is shown as ~; other folders are not named."""
    home = tmp_path / "home" / "jane.doe"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / ".cache" / "hub"))
    found = doctor.examine()
    for text in (json.dumps(found), "\n".join(doctor.report(found))):
        assert "jane" not in text
        assert str(tmp_path) not in text
        assert "~/.cache/hub, not there yet, writable" in text


@pytest.mark.parametrize(
    ("count", "told"), [(1, "Threads     1\n"), (2, "Threads     2, which sleep while they wait\n")]
)
def test_one_thread_waits_for_no_other(
    monkeypatch: pytest.MonkeyPatch, count: int, told: str
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr("safelight.processors.best", lambda: 3)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    text = "\n".join(doctor.report(doctor.examine()))
    assert told in text
    assert f"PyTorch has {count} thread{'s' * (count > 1)}\n" in text


@pytest.mark.parametrize(("free", "told"), [(3 * 10**9, ", 3.0 GB of it free"), (0, "")])
def test_free_memory_is_what_this_container_may_take(
    monkeypatch: pytest.MonkeyPatch, free: int, told: str
) -> None:
    monkeypatch.setattr(memory, "free", lambda: free)
    monkeypatch.setattr(memory, "total", lambda: 8 * 10**9)
    found = doctor.examine()
    assert found["memory"] == {"total": 8 * 10**9, "available": free}
    assert f"Memory      8.0 GB{told}" in doctor.report(found)


@pytest.mark.skipif(os.name == "nt", reason="homes of POSIX")
def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container whose user is only a number has none."""
    import pwd

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    found = doctor.examine()
    assert found["folders"]["server's data"] == "none: there is no home directory"
    assert found["models"]["cached"] == []
    stamp = cache.stamp_of(tmp_path)
    cache.keep("size", tmp_path, stamp, 7)
    assert cache.recall("size", tmp_path, stamp) is None
    assert public("no model here") == "no model here"
    with pytest.raises(SafelightError, match="give --data-dir as a full path"):
        data_folder(None)
    assert data_folder(tmp_path / "data").is_dir()


@pytest.mark.parametrize(
    ("setting", "amx", "advice"),
    [("off", "switched off", "unset SAFELIGHT_KERNELS"), ("portable", "", "portable kernels")],
)
def test_what_is_switched_off_is_said(
    monkeypatch: pytest.MonkeyPatch, setting: str, amx: str, advice: str
) -> None:
    monkeypatch.setenv("SAFELIGHT_KERNELS", setting)
    monkeypatch.setattr(kernels, "refusal", lambda name: "")
    found = doctor.examine()
    assert amx in found["kernels"]["states"]["amx"]
    assert any(advice in line for line in found["advice"])


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "built", lambda name: None)
    monkeypatch.setattr(kernels, "lacks", lambda name: "")
    found = doctor.examine()
    assert "no C++ compiler" in found["kernels"]["states"]["amx"]
    assert any("g++" in line for line in found["advice"])


@pytest.fixture
def loaded_anew() -> Iterator[None]:
    """Forget the loaded libraries of kernels before and after the test."""
    caches = kernels._first, kernels._load
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.mark.usefixtures("loaded_anew")
def test_kernels_of_another_version_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERFACE", -1)
    monkeypatch.setenv("SAFELIGHT_KERNELS", "portable")
    assert kernels.tiles() is None
    found = doctor.examine()
    assert "other sources" in found["kernels"]["states"]["portable"]
    assert any("another version" in line for line in found["advice"])


@pytest.mark.usefixtures("loaded_anew")
def test_kernels_that_cannot_be_loaded_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"_portable{kernels.SUFFIX}").write_text("half a file")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    monkeypatch.setenv("SAFELIGHT_KERNELS", "portable")
    assert kernels.tiles() is None
    found = doctor.examine()
    assert found["kernels"]["states"]["portable"].startswith("cannot be loaded: ")
    assert str(tmp_path) not in found["kernels"]["states"]["portable"]
    assert any("cannot be loaded" in line for line in found["advice"])


def test_a_library_needs_the_instructions_that_it_is_compiled_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    for extension in project["tool"]["setuptools"]["ext-modules"]:
        flags = {f[2:].replace("-", "_") for f in extension["extra-compile-args"] if f[1] == "m"}
        _, names = kernels._INSTRUCTIONS[extension["name"].rpartition("._")[2]]
        needed = {n.replace("fma3", "fma").replace("avx512_", "avx512") for n in names.split()}
        assert needed == flags


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_command_says_once_that_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    model = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr("safelight.load", lambda name, **how: model)
    monkeypatch.setattr(kernels, "lacks", lambda name: "")
    monkeypatch.setattr(kernels, "built", lambda name: None)
    monkeypatch.setenv("SAFELIGHT_KERNELS", "auto")
    load("embedded")
    said = capsys.readouterr().err
    assert said.count("warning: no compiled kernels (amx, avx512, avx2)") == (device == "cpu")
    monkeypatch.setenv("SAFELIGHT_KERNELS", "off")  # as the user wants it
    load("embedded")
    assert not capsys.readouterr().err


# --- how threads wait ----------------------------------------------------------------------------


def waiting(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads.wait_asleep()
    return {name: os.environ[name] for name in threads.SETTINGS if name in os.environ}


def test_threads_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waiting({}, monkeypatch) == threads.BRIEFLY
    assert waiting(threads.BRIEFLY, monkeypatch) == threads.BRIEFLY  # a process that ours starts


@pytest.mark.parametrize(
    "chosen",
    [
        {"OMP_WAIT_POLICY": "active"},
        {"OMP_WAIT_POLICY": "passive"},
        {"GOMP_SPINCOUNT": "9"},
        {"KMP_BLOCKTIME": "5"},
    ],
)
def test_what_the_user_chose_stays(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waiting(chosen, monkeypatch) == chosen


def test_what_onednn_keeps_is_set_unless_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = threads.PRIMITIVES
    monkeypatch.delenv(name, raising=False)
    threads.before_torch()
    assert os.environ[name] == value
    monkeypatch.setenv(name, "7")
    threads.before_torch()
    assert os.environ[name] == "7"


def test_it_is_set_before_pytorch_is_loaded() -> None:
    program = (
        "import sys, os, safelight.threads, safelight.__main__\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.argv = ['safelight', '--version']\n"
        "os._exit = lambda code: print(os.environ['OMP_WAIT_POLICY'])\n"
        "safelight.__main__.main()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in threads.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split()[-1] == "passive"
