"""List the models, LoRAs, text encoders, ControlNets and the like of this machine.

Only headers and configs are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safelight.adapters.keys import family_of_width
from safelight.errors import SafelightError
from safelight.families import family_of_file
from safelight.weights.cache import Stamp, keep, recall, stamp_of
from safelight.weights.check import Header
from safelight.weights.find import BUILT_IN, MODELS, Source
from safelight.weights.headers import header_of
from safelight.weights.hub import cached_files, cached_folders
from safelight.weights.library import PICTURE, Library, facts_of


@dataclass(frozen=True, slots=True)
class Listed:
    """One file or folder of the catalogue.

    kind: a key of `library.SUBFOLDERS`. family: a model's variant, or what a LoRA's
    training says it is for; None if unknown. bytes: on disk. dtypes: of the stored numbers. where:
    where it comes from. why_not: the reason, if it cannot be used.
    """

    kind: str
    name: str
    family: str | None
    bytes: int
    dtypes: tuple[str, ...]
    where: str
    why_not: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return asdict(self)


def catalog(library: Library | None, *, everything: bool = False) -> Iterator[Listed]:
    """Yield what is shipped, in the hub's cache, and in the models folder, in this order.

    everything: not models alone. What a header says is remembered as long as
    its file stays.
    """
    for name in BUILT_IN:
        if (MODELS / name).is_dir():
            yield _listed("model", name, MODELS / name, "ships with Safelight")
    for name, folder in cached_folders():
        yield _listed("model", name, folder, "hub cache")
    for name, file in cached_files():
        kind = facts_of(file).get("kind")  # None: of other programs, such as a language model
        if kind == "model" or (everything and kind is not None):
            yield _listed(kind, name, file, "hub cache")
    if library is not None:
        for entry in library.entries(None if everything else "model"):
            yield _listed(entry.kind, entry.name, entry.path, "models folder")


def _listed(kind: str, name: str, path: Path, where: str) -> Listed:
    try:
        stamp = _stamp(path)
        facts = recall(f"listed-{kind}", path.resolve(), stamp)
        if not isinstance(facts, dict):
            facts = _facts(kind, name, path)
            keep(f"listed-{kind}", path.resolve(), stamp, facts)
    except (OSError, SafelightError) as error:
        facts = {"family": None, "bytes": _size(path), "dtypes": [], "why_not": str(error)}
    return Listed(
        kind=kind,
        name=name,
        family=facts["family"],
        bytes=facts["bytes"],
        dtypes=tuple(facts["dtypes"]),
        where=where,
        why_not=facts.get("why_not"),
    )


def _stamp(path: Path) -> Stamp:
    """Return the stamp of a file, or one of all files of a folder."""
    if path.is_file():
        return stamp_of(path)
    stamps = [stamp_of(each) for each in _files(path)]
    return (len(stamps), *(sum(column) for column in zip(*stamps, strict=True)))


def _files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file())


def _size(path: Path) -> int:
    try:
        return (
            path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in _files(path))
        )
    except OSError:
        return 0


def _facts(kind: str, name: str, path: Path) -> dict[str, Any]:
    """Return family, bytes and dtypes, as JSON has them."""
    if path.is_dir() or path.suffix.lower() == PICTURE:
        if kind != "model":
            return {"family": None, "bytes": _size(path), "dtypes": []}
        # Its configs are read with the networks' own classes, which import PyTorch.
        from safelight.weights.plan import read_plan

        plan = read_plan(Source(name, path))
        dtypes = {w.dtype for part in plan.weights.values() for w in part.values()}
        size = sum(file.stat().st_size for file in plan.files.values())
        return {"family": plan.family.name, "bytes": size, "dtypes": sorted(dtypes)}
    header = header_of(path)
    family = family_of_file(header).name if kind == "model" else _made_for(header)
    dtypes = {info.dtype for info in header.tensors.values() if info.end > info.start}
    return {"family": family, "bytes": path.stat().st_size, "dtypes": sorted(dtypes)}


def _made_for(header: Header) -> str | None:
    """Return what a file says it was trained for."""
    told = header.metadata
    stated = told.get("ss_base_model_version") or told.get("modelspec.architecture")
    reads = (i.shape for key, i in header.tensors.items() if key.endswith(".to_k_ip.weight"))
    return stated or family_of_width(next((shape[-1] for shape in reads if shape), None))
