"""A model folder in diffusers' layout: model_index.json, and a folder for each part."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safelight.weights.check import Header, read_json, refusal
from safelight.weights.headers import plain_header_of

MAX_SHARDS = 256
INDEX_LIMIT = 1 << 22
"""Most bytes of the index of a part in shards."""

VARIANTS = ("fp16", "bf16")
"""The variants of diffusers' weight files that are read, the first that is there before others."""

DIFFUSION = "diffusion_pytorch_model"
"""What diffusers calls the weight files of its networks."""


class Folder:
    """A model folder.

    Every file is opened through `file`, which keeps paths inside the folder and notes in `files`
    what the model is made of. index: the content of the file that says what it is, which has this
    name; None for a folder without one. label: the name of the model in errors. flat: the files of
    a part may lie in the root, as small models of one network have them.
    """

    def __init__(self, path: Path, label: str, index: str | None = "model_index.json") -> None:
        self.path = path
        self.label = label
        self.root = path.resolve()
        self.files: dict[str, Path] = {}
        self.flat = False
        content = {} if index is None else self.json(index)
        if content is None:
            raise refusal(label, f"no {index}; a folder in diffusers' layout is needed")
        self.index = content

    def file(self, name: str) -> Path | None:
        """Return the path of `name` ("unet/config.json"), or None if it is not there.

        Raises SafelightError if it lies outside the folder. A hub cache is the one exception:
        its snapshots are links into the `blobs` folder beside them.
        """
        if (self.path / name).is_symlink() and not (self.path / name).exists():
            raise refusal(name, "a link to a file that is not there")
        if not (self.path / name).is_file():
            return None
        path = (self.path / name).resolve()
        allowed = [self.root]
        for snapshots in self.root.parents[:2]:  # the folder may be one part of a snapshot
            if snapshots.name == "snapshots":
                allowed.append(snapshots.parent / "blobs")
        if not any(path.is_relative_to(a) for a in allowed):
            raise refusal(self.label, f"{name} is a link out of the folder; copy the file instead")
        self.files[name] = path
        return path

    def json(self, name: str, limit: int = 2**20) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None if the file is not there."""
        path = self.file(name)
        if path is None:
            return None
        return read_json(path, limit, name)

    def part_json(self, part: str, name: str) -> dict[str, Any]:
        """Return the config of a part."""
        found = self.json(f"{part}/{name}")
        if found is None and self.flat:
            found = self.json(name)
        if found is None:
            raise refusal(self.label, f"{part}/{name} is missing")
        return found

    def part_headers(self, part: str, stem: str = DIFFUSION) -> list[Header]:
        """Return the checked headers of a part's weight files, one of each shard.

        stem: the name of the file, without its ending.
        """
        name = choose_weights(part, self.names(part), self.label, stem)
        if not name.endswith(".json"):
            return [self.header(name)]
        index = self.json(name, INDEX_LIMIT)
        shards = shards_of(index or {}, name)
        folder = PurePosixPath(name).parent
        headers = {shard: self.header(str(folder / shard)) for shard in set(shards.values())}
        found = {key: shard for shard, header in headers.items() for key in header.tensors}
        if found != shards or len(found) != sum(len(h.tensors) for h in headers.values()):
            raise refusal(self.label, f"{name} does not list what its files hold")
        return [headers[shard] for shard in sorted(headers)]

    def header(self, name: str) -> Header:
        path = self.file(name)
        if path is None:
            raise refusal(self.label, f"{name} is missing")
        return plain_header_of(path, "a folder", name)

    def names(self, part: str) -> list[str]:
        """Return the names of the files of a part, as seen from the root."""
        folder = self.path / part
        names = [f"{part}/{p.name}" for p in folder.iterdir()] if folder.is_dir() else []
        if self.flat:
            names += [p.name for p in self.path.iterdir()]
        return names


def choose_weights(part: str, names: Collection[str], where: str, stem: str = DIFFUSION) -> str:
    """Return which of `names` holds a part's weights.

    That is the plain file, or its index if it is in shards; a file of a variant only if there is no
    plain one, and one of torch.save only if there is no other. Raises SafelightError if there is
    none.
    """
    pickled = "pytorch_model" if stem == "model" else stem  # as transformers called it
    halves: list[str] = []
    for variant in VARIANTS:
        halves += [f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"]
    for folder in (f"{part}/", ""):
        for name in (
            f"{stem}.safetensors",
            f"{stem}.safetensors.index.json",
            *halves,
            f"{pickled}.bin",
            *(f"{pickled}.{variant}.bin" for variant in VARIANTS),
        ):
            if f"{folder}{name}" in names:
                return f"{folder}{name}"
    raise refusal(where, f"{part}/{stem}.safetensors is missing")


def shards_of(index: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return which file holds each tensor; all must lie in the folder of the index."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise refusal(name, "no weight_map in the index")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise refusal(name, f"{shard!r:.60} is not the name of a file beside it")
    if len(set(shards.values())) > MAX_SHARDS:
        raise refusal(name, f"more than {MAX_SHARDS} files")
    return shards
