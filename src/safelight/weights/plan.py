"""Plan the loading of a checkpoint, from its headers and configs alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.families import Family, Part, family_of_file, family_of_folder
from safelight.sampling import SchedulerConfig
from safelight.sizes import MAX_SIDE
from safelight.weights.check import Header, printable, refusal
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.headers import header_of
from safelight.weights.names import Weight, from_folder

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, slots=True)
class Addition:
    """A network that is not the checkpoint's own, before any weight is read.

    raw: its config as it was written. files: names inside it to paths.
    """

    source: Source
    part: Part
    raw: Mapping[str, Any]
    config: Any
    weights: dict[str, Weight]
    files: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint, before any weight is read.

    family: the variant. configs and weights: of each network. files: what it is made of, names
    inside the model to paths. folder: None for a single file. parts: what each network is built
    from. raw: the configs as they were written, the scheduler's too. additions: the networks that
    are not the checkpoint's own, such as another autoencoder or a ControlNet, by their use.
    """

    source: Source
    family: Family
    configs: dict[str, Any]
    weights: dict[str, dict[str, Weight]]
    scheduler: SchedulerConfig
    native_size: tuple[int, int]
    files: dict[str, Path]
    folder: Folder | None = None
    words: frozenset[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    parts: Mapping[str, Part] = field(default_factory=dict)
    raw: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    additions: Mapping[str, Addition] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.source.name

    def with_additions(self, found: Mapping[str, Addition], warnings: list[str]) -> Plan:
        """Return the plan with other networks, by their use. warnings: about them."""
        return replace(
            self,
            configs={**self.configs, **{use: each.config for use, each in found.items()}},
            weights={**self.weights, **{use: each.weights for use, each in found.items()}},
            parts={**self.parts, **{use: each.part for use, each in found.items()}},
            raw={**self.raw, **{use: each.raw for use, each in found.items()}},
            additions={**self.additions, **found},
            warnings=[*self.warnings, *warnings],
        )


def read_plan(
    source: Source, prediction_type: str | None = None, *, without: Collection[str] = ()
) -> Plan:
    """Read a checkpoint's headers and configs.

    prediction_type: what the UNet predicts, in place of what the checkpoint says.
    without: parts that a single file need not have, because others take their place.

    Raises SafelightError if it is malformed, or of a kind that is not supported.
    """
    if prediction_type is not None and prediction_type not in PREDICTIONS:
        raise SafelightError(
            f"prediction_type={prediction_type!r:.40}; expected one of {', '.join(PREDICTIONS)}"
        )
    if source.path.is_dir():
        return _folder_plan(source, prediction_type)
    return _file_plan(source, prediction_type, without)


def _class_of(entry: Any) -> str:
    """Return the class that model_index.json names for a part, as [library, class]; or nothing."""
    return str(entry[-1]) if isinstance(entry, list) and entry else ""


def _folder_plan(source: Source, prediction_type: str | None) -> Plan:
    folder = Folder(source.path, source.name)
    family = family_of_folder(folder.index, source.name)
    folder.flat = family.flat
    parts = {
        name: part.others.get(_class_of(folder.index.get(name)), part)
        for name, part in family.parts.items()
        if not family.lacks(folder.index, name)
    }
    raw = {part: folder.part_json(part, "config.json") for part in parts}
    weights = {
        name: from_folder(part, folder.part_headers(name, part.stem))
        for name, part in parts.items()
    }
    _check_weights(source, weights)
    configs = _configs(source, family, parts, raw, weights)
    settings = folder.part_json("scheduler", "scheduler_config.json")
    family = family.variant(configs, folder.index, settings)
    notes = folder.json("safelight.json") or {}
    try:
        native = family.native_size(configs)
    except SafelightError as e:
        raise refusal(source.name, str(e)) from None
    if max(native) > MAX_SIDE:
        raise refusal(source.name, f"made for {native[0]} pixels a side; {MAX_SIDE} are the most")
    return Plan(
        source=source,
        family=family,
        configs=configs,
        weights=weights,
        scheduler=_scheduler(source, settings, prediction_type),
        native_size=native,
        files=folder.files,
        folder=folder,
        words=_words(notes.pop("words", None)),
        notes=notes,
        parts=parts,
        raw={**raw, "scheduler": settings},
    )


def _file_plan(source: Source, prediction_type: str | None, without: Collection[str]) -> Plan:
    header = header_of(source.path)
    family = family_of_file(header)
    file = family.single_file(header)
    for part, found in file.weights.items():
        if not found and part not in without:
            known = [f"{p}*" for p, section in family.sections().items() if section.part == part]
            needed = "give one with --vae" if part == "vae" else "a full one is needed"
            raise refusal(header.name, f"no {part} ({' or '.join(known)}) in the file; {needed}")
    _check_weights(source, file.weights)
    warnings: list[str] = []
    prediction_type = prediction_type or file.prediction or _stated_prediction(header)
    if prediction_type is None and file.v_native:
        warnings.append(
            f"{printable(header.name, 60)} does not say what it predicts: epsilon is assumed; if "
            "pictures are noise, write one that says it with safelight convert --prediction-type "
            'v_prediction, or in Python load it with prediction_type="v_prediction"'
        )
    scheduler = _scheduler(source, file.scheduler, prediction_type)
    side = file.native
    if file.v_native and scheduler.prediction_type == "v_prediction":
        side = file.v_native
    return Plan(
        source=source,
        family=family,
        configs=_configs(source, family, family.parts, file.configs, file.weights),
        weights=file.weights,
        scheduler=scheduler,
        native_size=_stated_size(header) or (side, side),
        files={source.path.name: header.path},  # where a link led when it was read
        warnings=warnings,
        parts=family.parts,
        raw={**file.configs, "scheduler": file.scheduler},
    )


def _check_weights(source: Source, weights: Mapping[str, Mapping[str, Weight]]) -> None:
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


def _configs(
    source: Source,
    family: Family,
    parts: Mapping[str, Part],
    raw: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, Weight]],
) -> dict[str, Any]:
    """Return the checked config of each network."""
    configs: dict[str, Any] = {}
    for name, part in parts.items():
        config = read_config(source, part, raw[name], f"{name}/config.json: ")
        # Each layer has tensors: a config that asks for more is not that of its file.
        if weights[name] and config.depth > len(weights[name]):
            raise refusal(source.name, f"{name}/config.json has more layers than its file tensors")
        configs[name] = config
    try:
        family.check_configs(configs)
    except SafelightError as e:
        raise refusal(source.name, str(e)) from None
    return configs


def _scheduler(
    source: Source, settings: Mapping[str, Any], prediction_type: str | None
) -> SchedulerConfig:
    if prediction_type is not None:
        settings = {**settings, "prediction_type": prediction_type}
    try:
        return SchedulerConfig.from_dict(settings)
    except SafelightError as e:
        raise refusal(source.name, f"scheduler: {e}") from None


def _stated_prediction(header: Header) -> str | None:
    """Return what a file's metadata says it predicts (github.com/Stability-AI/ModelSpec)."""
    # ComfyUI writes the second key.
    keys = "modelspec.prediction_type", "modelspec.predict_key"
    stated = next((header.metadata[key] for key in keys if header.metadata.get(key)), "").lower()
    if stated:
        return {"v": "v_prediction", "epsilon": "epsilon"}.get(stated.removesuffix("_prediction"))
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    return {
        "stable-diffusion-v2-768-v": "v_prediction",
        "stable-diffusion-v2-512": "epsilon",
    }.get(architecture)


def _stated_size(header: Header) -> tuple[int, int] | None:
    """Return the width and height that a file's metadata says it was trained on."""
    stated = header.metadata.get("modelspec.resolution", "")
    match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", stated)
    if match and not int(match[1]) % 8 and not int(match[2]) % 8:
        return int(match[1]), int(match[2])
    return None


def _words(words: Any) -> frozenset[str] | None:
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise refusal("safelight.json", '"words" should be a list of words')
    return frozenset(words)
