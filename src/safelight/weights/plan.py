"""What a checkpoint is and where its weights lie, read from headers and configs alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextConfig, CLIPTextModel
from safelight.nets.config import NetConfig
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.unet2d import UNet2DConfig, UNet2DModel
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.sampling.schedule import SchedulerConfig
from safelight.weights.check import Header, printable, read_header, refusal
from safelight.weights.families import Family, family_by_shape
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.ldm import Weight, family_of, from_folder, from_single_file

NETS: Mapping[str, Mapping[str, tuple[type[NetConfig], type[nn.Module]]]] = {
    "text": {
        "unet": (UNetConfig, UNet2DConditionModel),
        "vae": (VAEConfig, AutoencoderKL),
        "text_encoder": (CLIPTextConfig, CLIPTextModel),
    },
    "pixels": {"unet": (UNet2DConfig, UNet2DModel)},
}
_MAY_BE_ZERO = ("freq_shift", "downsample_padding")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint, before any weight is read.

    family: its name in families.FAMILIES, "custom" for another text model, "pixels" for a model
      of pixels. configs and weights: of each network. files: what it is made of, names inside
      the model to paths. folder: None for a single file. pad: the token that fills a prompt, for
      a single file, which has no tokenizer of its own.
    """

    source: Source
    kind: str
    family: str
    configs: dict[str, Any]
    weights: dict[str, dict[str, Weight]]
    scheduler: SchedulerConfig
    native_size: tuple[int, int]
    files: dict[str, Path]
    folder: Folder | None = None
    pad: str | None = None
    words: frozenset[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_plan(source: Source, prediction_type: str | None = None) -> Plan:
    """Read a checkpoint's headers and configs.

    prediction_type: what the UNet predicts, in place of what the checkpoint says.

    Raises SafelightError if it is malformed, or of a kind that is not supported.
    """
    if prediction_type is not None and prediction_type not in PREDICTIONS:
        raise SafelightError(
            f"prediction_type={prediction_type!r:.40}; expected one of {', '.join(PREDICTIONS)}"
        )
    if source.path.is_dir():
        return _folder_plan(source, prediction_type)
    return _file_plan(source, prediction_type)


def _folder_plan(source: Source, prediction_type: str | None) -> Plan:
    folder = Folder(source.path, source.name)
    raw = {part: folder.part_json(part, "config.json") for part in NETS[folder.kind]}
    weights = {part: from_folder(part, folder.part_headers(part)) for part in raw}
    configs = _configs(source, folder.kind, raw, weights)
    settings = folder.part_json("scheduler", "scheduler_config.json")
    notes = folder.json("safelight.json") or {}
    unet = configs["unet"]
    side = unet.sample_size
    if folder.kind == "pixels":
        family = "pixels"
        if not side:
            raise refusal(source.name, "unet/config.json needs a sample_size")
    else:
        shapes = unet.block_out_channels[0], unet.cross_attention_dim, unet.in_channels
        known = family_by_shape(*shapes)
        family = known.name if known else "custom"
        side = (side or 64) * configs["vae"].factor
    return Plan(
        source=source,
        kind=folder.kind,
        family=family,
        configs=configs,
        weights=weights,
        scheduler=_scheduler(source, settings, prediction_type),
        native_size=(side, side),
        files=folder.files,
        folder=folder,
        words=_words(notes.pop("words", None)),
        notes=notes,
    )


def _file_plan(source: Source, prediction_type: str | None) -> Plan:
    header = read_header(source.path)
    family = family_of(header)
    weights = from_single_file(header, family)
    warnings: list[str] = []
    prediction_type = prediction_type or _stated_prediction(header)
    if prediction_type is None and family.v_native:
        warnings.append(
            f"{printable(header.name, 60)} does not say what it predicts: epsilon is assumed; "
            'if pictures are noise, load it with prediction_type="v_prediction"'
        )
    scheduler = _scheduler(source, family.scheduler, prediction_type)
    return Plan(
        source=source,
        kind="text",
        family=family.name,
        configs=_configs(source, "text", family.configs, weights),
        weights=weights,
        scheduler=scheduler,
        native_size=_native_size(header, family, scheduler),
        files={source.path.name: source.path},
        pad=family.pad,
        warnings=warnings,
    )


def _configs(
    source: Source,
    kind: str,
    raw: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, Weight]],
) -> dict[str, Any]:
    configs: dict[str, Any] = {}
    for part, (config_class, _) in NETS[kind].items():
        try:
            config = config_class.from_dict(raw[part])
        except SafelightError as e:
            raise refusal(source.name, f"{part}/config.json: {e}") from None
        for key, value in vars(config).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if 0 in [n for n in numbers if type(n) is int] and key not in _MAY_BE_ZERO:
                raise refusal(source.name, f"{part}/config.json: {key}={value!r:.40}")
        # A config could ask for millions of layers, and building them takes time even when
        # they take no memory. Each layer has tensors, so there are fewer layers than tensors.
        depth = math.prod(
            getattr(config, name, 1)
            for name in ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block")
        ) * len(getattr(config, "block_out_channels", (0,)))
        if depth > len(weights[part]):
            raise refusal(source.name, f"{part}/config.json has more layers than its file tensors")
        configs[part] = config
    if kind == "text":
        _check_together(source, configs)
    return configs


def _check_together(source: Source, configs: Mapping[str, Any]) -> None:
    """Refuses networks that are fine alone and do not fit one another."""
    unet = configs["unet"]
    words, channels = configs["text_encoder"].hidden_size, configs["vae"].latent_channels
    if words != unet.cross_attention_dim:
        raise refusal(
            source.name,
            f"its text encoder gives {words} numbers for a word, "
            f"and its unet reads {unet.cross_attention_dim}",
        )
    if channels != unet.out_channels:
        raise refusal(
            source.name,
            f"its vae decodes {channels} channels, and its unet gives {unet.out_channels}",
        )


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
    """What a file's ModelSpec metadata (github.com/Stability-AI/ModelSpec) says it predicts."""
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    if stated:
        return {"v": "v_prediction", "epsilon": "epsilon"}.get(stated.removesuffix("_prediction"))
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    return {
        "stable-diffusion-v2-768-v": "v_prediction",
        "stable-diffusion-v2-512": "epsilon",
    }.get(architecture)


def _native_size(header: Header, family: Family, scheduler: SchedulerConfig) -> tuple[int, int]:
    stated = header.metadata.get("modelspec.resolution", "")
    match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", stated)
    if match and not int(match[1]) % 8 and not int(match[2]) % 8:
        return int(match[1]), int(match[2])
    side = family.native
    if family.v_native and scheduler.prediction_type == "v_prediction":
        side = family.v_native
    return side, side


def _words(words: Any) -> frozenset[str] | None:
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise refusal("safelight.json", '"words" should be a list of words')
    return frozenset(words)
