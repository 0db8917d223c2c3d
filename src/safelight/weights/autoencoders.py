"""Plan another autoencoder for a model, from headers and configs alone.

It may be diffusers' folder of an AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage or
AutoencoderTiny, a whole model's folder, a single file with the original code's names or diffusers',
with or without a prefix, or the two files of TAESD.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safelight.errors import SafelightError
from safelight.families.flux2 import FLUX2_VAE_PART
from safelight.families.latent import VAE_PART
from safelight.families.qwenimage import QWEN_VAE_PART
from safelight.weights.check import refusal
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.names import from_folder
from safelight.weights.networks import read_config
from safelight.weights.plan import Addition, Plan
from safelight.weights.vae_file import check_kind, check_latents, read_vae_file

PARTS = {part.network: part for part in (VAE_PART, FLUX2_VAE_PART, QWEN_VAE_PART)}
PARTS |= VAE_PART.others


def with_autoencoders(plan: Plan, sources: Mapping[str, Source]) -> Plan:
    """Return the plan of a model with other autoencoders.

    sources: "vae" takes the place of the model's own, "preview_vae" is for previews alone.

    Raises SafelightError if one is malformed, is no autoencoder, or does not fit the model.
    """
    if not sources:
        return plan
    own = plan.configs.get("vae")
    if own is None:
        raise SafelightError(f"{plan.source.name} draws pixels: it takes no autoencoder")
    found = {use: _read(source, plan, own) for use, source in sources.items()}
    told = [line for each in found.values() for line in _warnings(each, plan)]
    return plan.with_additions(found, told)


def _read(source: Source, model: Plan, own: Any) -> Addition:
    """Read an autoencoder. A single file has no config: it is read with that of the model's own."""
    plan = _folder_plan(source) if source.path.is_dir() else _file_plan(source, model)
    _check_fit(plan, model, own)
    return plan


def _folder_plan(source: Source) -> Addition:
    path = source.path
    if (path / "model_index.json").is_file():
        path = path / "vae"
    folder = Folder(path, source.name, index="config.json")
    folder.flat = True
    part = PARTS.get(str(folder.index.get("_class_name")))
    if part is None:
        told = f"{folder.index.get('_class_name')!r:.40}"
        raise refusal(source.name, f"{told} is no autoencoder; known are {', '.join(PARTS)}")
    weights = from_folder(part, folder.part_headers("vae", part.stem))
    config = read_config(source, part, folder.index)
    return Addition(source, part, folder.index, config, weights, folder.files)


def _file_plan(source: Source, model: Plan) -> Addition:
    found = read_vae_file(source, model.parts["vae"], model.raw["vae"])
    return Addition(source, found.part, found.raw, found.config, found.weights, found.files)


def _check_fit(plan: Addition, model: Plan, own: Any) -> None:
    """Refuse an autoencoder whose latents are not those of the model."""
    check_kind(plan.source, plan.part, model.parts["vae"])
    check_latents(plan.source, plan.config, own, len(plan.weights))
    try:
        model.family.check_configs({**model.configs, "vae": plan.config})
    except SafelightError as e:
        raise refusal(plan.source.name, str(e)) from None


def _warnings(plan: Addition, model: Plan) -> list[str]:
    """Return warnings about an autoencoder in place of a model's own."""
    if {plan.part.network, model.parts["vae"].network} != {VAE_PART.network}:
        return []  # a tiny one scales in its weights
    theirs, ours = plan.config.scaling_factor, model.configs["vae"].scaling_factor
    if 0.99 < theirs / ours < 1.01:
        return []
    return [
        f"the autoencoder {plan.source.name} scales latents by {theirs:g}, the model's own by "
        f"{ours:g}: it may be another family's"
    ]
