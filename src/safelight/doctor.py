"""What this machine has, and what Safelight uses of it.

`examine` gathers it, `report` writes it as a page. Neither names the user nor a path outside the
project: a home directory is written ~.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from safelight import __version__, fast, processors, threads
from safelight.fast import kernels, memory, onednn

_OTHERS = ("numpy", "safetensors", "diffusers", "fastapi", "gradio", "openvino")
_INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "bf16")


def examine() -> dict[str, Any]:
    """Return what `safelight doctor --json` prints.

    That is versions, processor, threads, precision, kernels, memory (bytes, 0 if the system does
    not tell), devices, folders, models and advice.
    """
    found = {
        "versions": _versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": _threads(),
        "precision": _precision(),
        "kernels": _kernels(),
        "memory": {"total": memory.total(), "available": memory.free()},
        "devices": _devices(),
        "folders": _folders(),
        "models": _models(),
    }
    return found | {"advice": _advice(found)}


def report(found: dict[str, Any]) -> list[str]:
    """Return the lines of a page about what `examine` found."""
    versions, processor, waits = found["versions"], found["processor"], found["threads"]
    has, precision = found["memory"], found["precision"]
    wait = f", which {waits['waiting']}" if waits["count"] > 1 else ""  # one waits for no other
    lines = [
        f"Safelight {versions['safelight']}, {found['system']}",
        "",
        "Versions    " + ", ".join(f"{k} {v}" for k, v in versions.items() if k != "safelight"),
        f"Processor   {processor['name']}, {processor['cores']} cores",
        f"            instructions: {', '.join(processor['instructions']) or 'none that count'}",
        f"Threads     {waits['count']}{wait}",
        *([f"            {waits['why']}"] if waits["why"] else []),
        f"Precision   {precision['auto']}: {precision['why']}",
        f"Kernels     SAFELIGHT_KERNELS={found['kernels']['setting']}",
    ]
    lines += [f"            {name}: {state}" for name, state in found["kernels"]["states"].items()]
    free = f", {has['available'] / 1e9:.1f} GB of it free" if has["available"] else ""
    lines += [
        f"Memory      {has['total'] / 1e9:.1f} GB{free}",
        f"Devices     {', '.join(found['devices'])}",
    ]
    for i, (name, state) in enumerate(found["folders"].items()):
        lines.append(f"{'Folders' if not i else '':<12}{name}: {state}")
    models = found["models"]
    lines.append(f"Models      with Safelight: {', '.join(models['shipped'])}")
    lines.append(f"            in the hub's cache: {', '.join(models['cached']) or 'none'}")
    lines += ["", "What would make it faster:"]
    return lines + [f"- {one}" for one in found["advice"] or ["nothing that Safelight knows of"]]


def _versions() -> dict[str, str]:
    found = {
        "safelight": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in _OTHERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> dict[str, Any]:
    has = torch.cpu.get_capabilities()
    return {
        "name": str(has.get("cpu_name") or platform.processor() or "unknown"),
        "cores": processors.cores(),
        "instructions": [name for name in _INSTRUCTIONS if has.get(name)],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


def _threads() -> dict[str, Any]:
    chosen = {name: os.environ[name] for name in threads.SETTINGS if name in os.environ}
    if not chosen:
        waiting = "spin while they wait"
    elif chosen in (threads.BRIEFLY, {"OMP_WAIT_POLICY": "passive"}):
        waiting = "sleep while they wait"
    else:
        waiting = "wait as " + ", ".join(f"{k}={v}" for k, v in chosen.items()) + " says"
    count, choice = torch.get_num_threads(), processors.choose()
    why = choice.why if choice is not None and choice.threads == count else ""
    return {"count": count, "why": why, "waiting": waiting, "settings": chosen}


def _precision() -> dict[str, str]:
    doubt = fast.bfloat16_doubt()
    if not doubt:
        why = "this processor multiplies it faster than float32"
        return {"auto": "bfloat16", "why": why}
    return {"auto": "float32", "why": doubt}


def _kernels() -> dict[str, Any]:
    setting, used = kernels.setting(), kernels.allowed()
    states = {"oneDNN": "active" if onednn.available() else "not in this build of PyTorch"}
    for name in kernels.LIBRARIES:
        refusal = kernels.refusal(name)
        if refusal:
            states[name] = refusal
        elif name in used:
            states[name] = "active"
        else:
            states[name] = "for tests" if name == "portable" else "switched off"
    return {"setting": setting, "states": states}


def _devices() -> list[str]:
    found = [
        f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def _folders() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    folders = {
        "hub cache": Path(HF_HUB_CACHE),
        "server's data": Path(data) / "safelight",
        "temporary": Path(tempfile.gettempdir()),
    }
    return {name: _state(folder) for name, folder in folders.items()}


def _state(folder: Path) -> str:
    try:
        folder = folder.expanduser()
    except RuntimeError:
        return "none: there is no home directory"
    there = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    writable = "writable" if os.access(there, os.W_OK) else "not writable"
    try:
        shown = f"~/{folder.relative_to(Path.home())}, "
    except (ValueError, RuntimeError):  # not below the home directory, or there is none
        shown = ""
    return shown + (writable if there == folder else f"not there yet, {writable}")


def _models() -> dict[str, list[str]]:
    from safelight.weights.find import BUILT_IN, MODELS
    from safelight.weights.hub import cached_folders

    return {
        "shipped": [name for name in BUILT_IN if (MODELS / name).is_dir()],
        "cached": [name for name, _ in cached_folders()],
    }


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    states = found["kernels"]["states"]
    if any("no C++ compiler" in states[name] for name in kernels.LIBRARIES):
        advice.append(
            "install a C++ compiler, g++ 11 or clang++ 14 or later (apt-get install g++), and "
            "Safelight again"
        )
    if any("cannot be loaded" in states[name] for name in kernels.LIBRARIES):
        advice.append("install Safelight again: a library of its kernels cannot be loaded")
    if any("other sources" in states[name] for name in kernels.LIBRARIES):
        advice.append("install Safelight again: its kernels are of another version")
    if "switched off" in states.values():
        advice.append("unset SAFELIGHT_KERNELS, which switches kernels off")
    if found["kernels"]["setting"] == "portable":
        advice.append("unset SAFELIGHT_KERNELS: the portable kernels are for tests, and slow")
    if states["oneDNN"] != "active":
        advice.append("a build of PyTorch with oneDNN (torch.backends.mkldnn)")
    count, best = found["threads"]["count"], processors.best()
    if best is not None and count != best:
        has = f"{count} threads" if count != 1 else "1 thread"
        advice.append(f"OMP_NUM_THREADS={best}: PyTorch has {has}")
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        if name in os.environ:
            advice.append(f"unset {name}, which keeps PyTorch from this processor's instructions")
    if found["devices"] == ["cpu"]:
        few = "the model embedded-fast draws in 4 steps" if sys.platform != "darwin" else "mps"
        advice.append(f"a GPU; without one, {few}")
    return advice
