"""A model folder in diffusers' layout: model_index.json, and a folder for each part."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safelight.weights.check import Header, read_header, read_json, refusal

# What a pipeline class of model_index.json makes; a config is data, so nothing is imported by
# a name that stands in it.
PIPELINES = {
    "StableDiffusionPipeline": "text",
    "StableDiffusionImg2ImgPipeline": "text",
    "StableDiffusionInpaintPipeline": "text",
    "DDPMPipeline": "pixels",
    "DDIMPipeline": "pixels",
}
# The parts of each kind, and the classes they may be of. A scheduler's class is read with its
# config.
PARTS = {
    "text": {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "scheduler": (),
    },
    "pixels": {"unet": ("UNet2DModel",), "scheduler": ()},
}
# Parts of diffusers' pipelines that no picture is made from.
IGNORED = {"safety_checker", "feature_extractor", "image_encoder"}
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
MAX_SHARDS = 256


class Folder:
    """A model folder whose index has been read. Every file is opened through `file`, which
    keeps paths inside, and remembers what the model was made of in `files`. `label` is the name
    of the model in errors."""

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label
        self.root = path.resolve()
        self.files: dict[str, Path] = {}
        index = self.json("model_index.json")
        if index is None:
            raise refusal(label, "no model_index.json; a folder in diffusers' layout is needed")
        self.kind = kind_of(index, label)

    def file(self, name: str) -> Path | None:
        """The file `name` ("unet/config.json"), or None if it is not there.

        Raises SafelightError if it lies outside the folder. A hub cache is the one exception:
        its snapshots are links into the `blobs` folder beside them.
        """
        if (self.path / name).is_symlink() and not (self.path / name).exists():
            raise refusal(name, "a link to a file that is not there")
        if not (self.path / name).is_file():
            return None
        path = (self.path / name).resolve()
        allowed = [self.root]
        if self.root.parent.name == "snapshots":
            allowed.append(self.root.parent.parent / "blobs")
        if not any(path.is_relative_to(a) for a in allowed):
            raise refusal(self.label, f"{name} is a link out of the folder; copy the file instead")
        self.files[name] = path
        return path

    def json(self, name: str, limit: int = 2**20) -> dict[str, Any] | None:
        """The JSON object in a file, or None if the file is not there."""
        path = self.file(name)
        if path is None:
            return None
        return read_json(path, limit, name)

    def part_json(self, part: str, name: str) -> dict[str, Any]:
        """A part's config. Small models of one network may keep it in the root."""
        found = self.json(f"{part}/{name}")
        if found is None and self.kind == "pixels":
            found = self.json(name)
        if found is None:
            raise refusal(self.label, f"{part}/{name} is missing")
        return found

    def part_headers(self, part: str) -> list[Header]:
        """The checked headers of a part's weight files: one, or as many as it has shards."""
        name = choose_weights(part, self.names(part), self.label)
        if not name.endswith(".json"):
            return [self.header(name)]
        index = self.json(name, 2**22)
        shards = _shards(index or {}, name)
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
        return read_header(path, name)

    def names(self, part: str) -> list[str]:
        """The names of the files of a part, as seen from the root."""
        folder = self.path / part
        names = [f"{part}/{p.name}" for p in folder.iterdir()] if folder.is_dir() else []
        if self.kind == "pixels":
            names += [p.name for p in self.path.iterdir()]
        return names


def kind_of(index: Mapping[str, Any], where: str) -> str:
    """The kind ("text" or "pixels") of model that a model_index.json describes.

    Raises SafelightError if it is of another kind, or has a part that we do not build.
    """
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise refusal(
            where,
            f"{pipeline!r:.40} is not supported; supported are Stable Diffusion 1.x and 2.x "
            "(StableDiffusionPipeline) and DDPMPipeline",
        )
    kind = PIPELINES[pipeline]
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None] or name in IGNORED:
            continue
        if name not in PARTS[kind]:
            raise refusal(where, f"the part {name!r:.60} of model_index.json is not supported")
        classes = PARTS[kind][name]
        if classes and value[-1:] not in [[c] for c in classes]:
            raise refusal(where, f"{name} is a {value[-1:]!r:.60}; expected {classes[0]}")
    return kind


def choose_weights(part: str, names: Collection[str], where: str) -> str:
    """Which of `names` holds a part's weights: the plain file, its index if it is in shards, and
    a file of the fp16 variant only if there is no plain one.

    Raises SafelightError if there is none.
    """
    stem = STEMS[part]
    for folder in (f"{part}/", ""):
        for ending in (
            ".safetensors",
            ".safetensors.index.json",
            ".fp16.safetensors",
            ".safetensors.index.fp16.json",
        ):
            if f"{folder}{stem}{ending}" in names:
                return f"{folder}{stem}{ending}"
    if any(n.endswith((".bin", ".ckpt", ".pt")) for n in names if n.startswith(part)):
        raise refusal(
            where, f"{part} has pickled weights only; ask for, or convert to, safetensors"
        )
    raise refusal(where, f"{part}/{stem}.safetensors is missing")


def files_of(index: Mapping[str, Any], names: Collection[str], where: str) -> list[str]:
    """The files, of all that a repository has, that a model is read from.

    Raises SafelightError that names what is missing.
    """
    kind = kind_of(index, where)
    nested = {n.partition("/")[0] for n in names if "/" in n}
    files = {n for n in ("model_index.json", "safelight.json") if n in names}
    for part in PARTS[kind]:
        folder = f"{part}/" if part in nested or kind == "text" else ""
        here = [n for n in names if n.startswith(folder) and "/" not in n.removeprefix(folder)]
        files |= {n for n in here if n.endswith(".json") and ".index." not in n}
        if part == "tokenizer":
            files |= {n for n in here if n == f"{folder}merges.txt"}
        if part in STEMS:
            weights = choose_weights(part, here, where)
            files.add(weights)
            if weights.endswith(".json"):
                fp16 = ".fp16" if weights.endswith(".fp16.json") else ""
                shard = re.compile(
                    re.escape(f"{folder}{STEMS[part]}{fp16}") + r"-\d+-of-\d+(\.fp16)?\.safetensors"
                )
                files |= {n for n in here if shard.fullmatch(n)}
    return sorted(files)


def _shards(index: Mapping[str, Any], name: str) -> dict[str, str]:
    """Which file holds each tensor. The files must be plain names in the index's own folder."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise refusal(name, "no weight_map in the index")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise refusal(name, f"{shard!r:.60} is not the name of a file beside it")
    if len(set(shards.values())) > MAX_SHARDS:
        raise refusal(name, f"more than {MAX_SHARDS} files")
    return shards
