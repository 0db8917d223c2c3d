"""Networks before any weight is read: of a folder, of a single file, or of what lends it more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safelight.errors import SafelightError
from safelight.families import Family, Part, SingleFile
from safelight.weights.check import Header, refusal
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.names import Weight, from_folder


@dataclass(frozen=True, slots=True)
class Networks:
    """Networks by their names, before any weight is read.

    parts: what each is built from. raw: the configs as they were written.
    """

    parts: dict[str, Part]
    raw: dict[str, Mapping[str, Any]]
    weights: dict[str, dict[str, Weight]]

    def take(self, others: Networks) -> None:
        """Add networks, or put them in the place of those of the same names."""
        self.parts.update(others.parts)
        self.raw.update(others.raw)
        self.weights.update(others.weights)

    def drop(self, names: Iterable[str]) -> None:
        """Remove networks."""
        for name in names:
            del self.parts[name], self.raw[name], self.weights[name]


def networks_of(folder: Folder, family: Family, names: Iterable[str]) -> Networks:
    """Return networks of a folder by their names. Raises SafelightError if one is malformed."""
    parts = {
        name: family.parts[name].others.get(_class_of(folder.index.get(name)), family.parts[name])
        for name in names
    }
    raw: dict[str, Mapping[str, Any]] = {
        name: folder.part_json(name, "config.json") for name in parts
    }
    weights = {
        name: from_folder(part, folder.part_headers(name, part.stem))
        for name, part in parts.items()
    }
    return Networks(parts, raw, weights)


def own_networks(
    family: Family, file: SingleFile, without: Collection[str]
) -> tuple[Networks, list[str]]:
    """Return the networks of a single file, and the names of what it lacks.

    A network that it lacks has a config and no weights. CLIP's vocabulary ships with us, so that no
    file lacks CLIP's tokenizers.
    """
    weights = dict(file.weights)
    lacking = [name for name, found in weights.items() if not found and name not in without]
    lacking += [
        name for name, classes in family.tokenizers.items() if "CLIPTokenizer" not in classes
    ]
    return Networks(dict(family.parts), dict(file.configs), weights), lacking


def check_weights(source: Source, weights: Mapping[str, Mapping[str, Weight]]) -> None:
    """Refuse weights without numbers, and files that are mostly something else."""
    used: dict[int, tuple[Header, set[str]]] = {}
    for part, those in weights.items():
        for name, weight in those.items():
            if 0 in weight.shape:
                raise refusal(source.name, f"{part} {name:.60} is empty: {weight.shape}")
            used.setdefault(id(weight.header), (weight.header, set()))[1].add(weight.key)
    for header, keys in used.values():
        sizes = {key: info.end - info.start for key, info in header.tensors.items()}
        needed = sum(sizes[key] for key in keys)
        # A moving average of training may be stored beside the weights, and in twice the precision.
        if sum(sizes.values()) > 4 * needed + 2**26:
            largest = max(sizes.keys() - keys, key=lambda key: sizes[key])
            raise refusal(header.name, f"mostly not weights of the model: {largest:.60}")


def check_depth(source: Source, depth: int, tensors: int, what: str = "its config") -> None:
    """Refuse a config that asks for more layers than its file has tensors: each layer has some.

    what: names the config.
    """
    if depth > tensors:
        raise refusal(source.name, f"{what} has more layers than its file tensors")


def read_config(
    source: Source, part: Part, raw: Mapping[str, Any], where: str = "config.json: "
) -> Any:
    """Return a network's checked config. raw: as it was written. where: how errors begin.

    Raises SafelightError with the source's name.
    """
    config_class, _ = part.load_classes()
    try:
        return config_class.from_dict(raw)
    except SafelightError as e:
        raise refusal(source.name, f"{where}{e}") from None


def _class_of(entry: Any) -> str:
    """Return the class that model_index.json names for a part, as [library, class]; or nothing."""
    return str(entry[-1]) if isinstance(entry, list) and entry else ""
