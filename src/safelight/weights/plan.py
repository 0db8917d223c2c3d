"""Plan the loading of a checkpoint, from its headers and configs alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.families import Family, Part, family_of_file, family_of_folder
from safelight.families.flow import FlowFamily
from safelight.families.part import encoder_of
from safelight.sampling import SchedulerConfig
from safelight.sizes import MAX_SIDE, MIN_SIDE, SIDE_STEP
from safelight.weights.check import Header, printable, refusal
from safelight.weights.find import PartsFinder, Source
from safelight.weights.folder import Folder
from safelight.weights.headers import header_of
from safelight.weights.hub_names import hub_name
from safelight.weights.lender import Borrower, Lender, borrow, listed, missing
from safelight.weights.names import Weight
from safelight.weights.networks import (
    Networks,
    check_depth,
    check_weights,
    networks_of,
    own_networks,
    read_config,
)
from safelight.weights.tokenizers import Gathered

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
    lenders: the folders and files that give a single file its missing parts. lacking: the networks
    and tokenizers that a file lacks nonetheless.
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
    lenders: tuple[Lender, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.source.name

    @property
    def _lent_tokenizers(self) -> Gathered | None:
        """The tokenizers that a single file takes from elsewhere, None if it takes none."""
        homes = {name: home for lender in self.lenders for name, home in lender.homes.items()}
        return Gathered(homes, self.source.name) if homes else None

    def tokenizer_folder(self, name: str) -> Folder | None:
        """Return the folder with a tokenizer, None if it is one that we ship."""
        if any(name in lender.homes for lender in self.lenders):
            return self._lent_tokenizers
        return self.folder

    def load_tokenizers(self) -> dict[str, Any]:
        """Return the model's tokenizers by name."""
        lent = self._lent_tokenizers
        if lent is None:
            return self.family.load_tokenizers(self.folder, self.configs)
        try:
            return self.family.load_tokenizers(lent, self.configs, lent.tokenizers)
        finally:
            lent.drop()

    @property
    def all_files(self) -> dict[str, Mapping[str, Path]]:
        """All files that it is made of, by their use: "" for the model's own, those of
        `lender_uses`, and of each addition."""
        lent = {use: lender.files for use, lender in self.lender_uses.items()}
        return {"": self.files, **lent, **{use: one.files for use, one in self.additions.items()}}

    @property
    def lender_uses(self) -> dict[str, Lender]:
        """The lenders, as `all_files` calls them."""
        return {f"parts {number}": lender for number, lender in enumerate(self.lenders)}

    def source_of(self, use: str) -> Source:
        """Return where a network comes from, or the files of a use in `all_files`."""
        if use in self.additions:
            return self.additions[use].source
        if use in (uses := self.lender_uses):
            return uses[use].source
        lent = (one.source for one in self.lenders if use in one.networks.parts)
        return next(lent, self.source)

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
    source: Source,
    prediction_type: str | None = None,
    *,
    without: Collection[str] = (),
    parts: PartsFinder | None = None,
    partial: bool = False,
) -> Plan:
    """Read a checkpoint's headers and configs.

    prediction_type: what the UNet predicts, in place of what the checkpoint says.
    without: parts that a single file need not have, because others take their place.
    parts: finds the folders and files that give a single file its missing parts; asked if it lacks
      something.
    partial: a single file may lack parts, as for showing what it holds; see `Plan.lacking`.

    Raises SafelightError if it is malformed, or of a kind that is not supported.
    """
    if prediction_type is not None and prediction_type not in PREDICTIONS:
        raise SafelightError(
            f"prediction_type={prediction_type!r:.40}; expected one of {', '.join(PREDICTIONS)}"
        )
    parts = PartsFinder() if parts is None else parts
    unused = [*parts.names]
    if source.path.is_dir():
        plan = _folder_plan(source, prediction_type)
    else:
        plan, unused = _file_plan(source, prediction_type, without, parts, partial)
    if prediction_type is not None and isinstance(plan.family, FlowFamily):
        raise SafelightError(
            f"prediction_type={prediction_type!r} does nothing with {printable(plan.name, 60)}, "
            "a model of flow matching: leave it out"
        )
    for name in unused:
        why = f"{printable(plan.name, 60)} lacks nothing"
        if plan.lenders:
            why += " that it has"
        if plan.lacking:
            why = f"it has no {listed(plan.lacking)} either"
        what = f"{printable(Path(name).name, 60)} of the parts"
        hub = hub_name(name)
        if len(parts.names) == 1 and (Path(name).is_dir() or (hub and hub.file is None)):
            what = "the folder of parts"
        told = f"{what} is not used: {why}"
        if not plan.lenders and not plan.lacking:  # it may not even be there
            told = f"{printable(name, 60)!r} of the parts was not looked for: {why}"
        plan.warnings.append(told)
    return plan


def _folder_plan(source: Source, prediction_type: str | None) -> Plan:
    folder = Folder(source.path, source.name)
    family = family_of_folder(folder.index, source.name)
    folder.flat = family.flat
    there = [name for name in family.parts if not family.lacks(folder.index, name)]
    networks = networks_of(folder, family, there)
    parts, raw, weights = networks.parts, networks.raw, networks.weights
    check_weights(source, weights)
    configs = _configs(source, family, networks)
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


def _file_plan(
    source: Source,
    prediction_type: str | None,
    without: Collection[str],
    parts: PartsFinder,
    partial: bool,
) -> tuple[Plan, list[str]]:
    """Return the plan of a single file, and what of the given parts lends it nothing."""
    header = header_of(source.path)
    family = family_of_file(header)
    file = family.single_file(header)
    check_weights(source, file.weights)
    warnings: list[str] = []
    networks, lacking = own_networks(family, file, without)
    borrower = Borrower(source, header.name, family, networks.raw)
    lenders, lacking, unused = borrow(parts, borrower, lacking)
    for lender in lenders:
        networks.take(lender.networks)
    if lacking and not partial:
        lent = {part for lender in lenders for part in lender.networks.parts}
        needed = [
            name for name in lacking if name not in family.optional or encoder_of(name) in lent
        ]
        if needed:
            raise refusal(header.name, missing(family, needed, lenders))
        left_out = [name for name in family.optional if name in networks.parts]
        networks.drop(left_out)
        warnings.append(
            f"drawn without {listed(left_out)}, because {printable(header.name, 60)} has no "
            f"{listed(lacking)}; a folder of {family.title} with it can be given with --parts"
        )
    configs = _configs(source, family, networks, lenders)
    settings = file.scheduler
    if family.told_by_scheduler or family.told_by_index:
        family, settings, told = _told(header.name, family, settings, configs, lenders)
        warnings += told
    if not isinstance(family, FlowFamily):  # those predict one thing, whatever a file says
        prediction_type = prediction_type or file.prediction or _stated_prediction(header)
    if prediction_type is None and file.v_native:
        warnings.append(
            f"{printable(header.name, 60)} does not say what it predicts: epsilon is assumed; if "
            "pictures are noise, write one that says it with safelight convert --prediction-type "
            'v_prediction, or in Python load it with prediction_type="v_prediction"'
        )
    scheduler = _scheduler(source, settings, prediction_type)
    side = file.native
    if file.v_native and scheduler.prediction_type == "v_prediction":
        side = file.v_native
    plan = Plan(
        source=source,
        family=family,
        configs=configs,
        weights=networks.weights,
        scheduler=scheduler,
        native_size=_stated_size(header) or (side, side),
        files={source.path.name: header.path},  # where a link led when it was read
        warnings=warnings,
        parts=networks.parts,
        raw={**networks.raw, "scheduler": settings},
        lenders=tuple(lenders),
        lacking=tuple(lacking),
    )
    return plan, unused


def _told(
    name: str,
    family: Family,
    scheduler: Mapping[str, Any],
    configs: Mapping[str, Any],
    lenders: Sequence[Lender],
) -> tuple[Family, Mapping[str, Any], list[str]]:
    """Return the variant of a single file, its scheduler's config, and warnings.

    The file's name tells it, else a folder of its parts: both variants share those, so that the
    folder may be the other's. name, scheduler: of the file.
    """
    shown = printable(name, 60)
    named = family.named_index(name), family.named_scheduler(name, scheduler)
    is_named = bool(named[0]) or named[1] is not scheduler
    folder = next((one for one in lenders if one.folder is not None), None)
    mine = family.variant(configs, *named)
    if folder is None or folder.folder is None:
        warnings = [
            f"{shown} does not say which {family.title} it is, and is drawn as {mine.name}; "
            "another has it in its name, or a folder as --parts"
        ]
        return mine, named[1], warnings if lenders and not (is_named or family.usual) else []
    lent = folder.folder.index, folder.scheduler or scheduler
    theirs = family.variant(configs, *lent)
    if not is_named or theirs.name == mine.name:
        return theirs, lent[1], []
    if family.usual:  # a folder of it is what most have
        return mine, named[1], []
    lender = printable(folder.source.name, 60)
    warning = f"{shown} is drawn as {mine.name}, as its name says; {lender}, which lends it parts, "
    return mine, named[1], [f"{warning}is of {theirs.name}"]


def _configs(
    source: Source, family: Family, networks: Networks, lenders: Sequence[Lender] = ()
) -> dict[str, Any]:
    """Return the checked config of each network."""
    configs: dict[str, Any] = {}
    origins = {name: one.source for one in lenders for name in one.networks.parts}
    for name, part in networks.parts.items():
        origin = origins.get(name, source)
        config = read_config(origin, part, networks.raw[name], f"{name}/config.json: ")
        if weights := networks.weights[name]:
            check_depth(origin, config.depth, len(weights), f"{name}/config.json")
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
    if match is None:
        return None
    width, height = int(match[1]), int(match[2])
    allowed = all(MIN_SIDE <= n <= MAX_SIDE and n % SIDE_STEP == 0 for n in (width, height))
    return (width, height) if allowed else None


def _words(words: Any) -> frozenset[str] | None:
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise refusal("safelight.json", '"words" should be a list of words')
    return frozenset(words)
