"""Text encoders in a single file, as people have them: one or several, by transformers' names.

Each may stand below a prefix, such as `text_encoders.clip_l.transformer.`. A GGUF file may have
llama.cpp's names instead. No such file holds a config: which network of a family it is follows from
its kind, its width and its count of layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from safelight.families import Family, Part
from safelight.families.flow_files import is_unused
from safelight.weights.check import Header, refusal
from safelight.weights.names import Weight, some
from safelight.weights.names_gguf import llama_names
from safelight.weights.names_qwen import qwen2_folder_name
from safelight.weights.networks import Networks
from safelight.weights.scales import read_scales

MAX_ENCODERS = 8
"""The most text encoders in one file. Stable Diffusion 3 reads three."""

_PREFIX = r"((?:.*?\.)??)"
_QWEN2 = "Qwen2.5-VL"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of text encoder.

    title: in messages. module: of its network. told: matches one name of it, with what stands
    before all its names. layer: matches a name inside a layer. unused: names that are not read.
    width, layers: the keys of both in a config.
    """

    title: str
    module: str
    told: re.Pattern[str]
    layer: re.Pattern[str]
    unused: re.Pattern[str]
    width: str
    layers: str

    def sizes(self, config: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return width and count of layers by a config."""
        return config.get(self.width), config.get(self.layers)


KINDS = (
    Kind(
        "CLIP",
        "safelight.nets.clip",
        re.compile(_PREFIX + r"(?:text_model\.)?embeddings\.token_embedding\.weight"),
        re.compile(r"text_model\.encoder\.layers\.(\d+)\..*"),
        re.compile(
            r"(text_model\.)?embeddings\.position_ids|logit_scale|text_projection"
            r"|vision_model\..*|visual_projection\.weight"
        ),
        "hidden_size",
        "num_hidden_layers",
    ),
    Kind(
        "T5",
        "safelight.nets.t5",
        re.compile(_PREFIX + r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"),
        re.compile(r"encoder\.block\.(\d+)\..*"),
        re.compile(r"decoder\..*|lm_head\.weight|logit_scale|spiece_model"),
        "d_model",
        "num_layers",
    ),
    Kind(
        "Qwen3",
        "safelight.nets.qwen3",
        re.compile(_PREFIX + r"(?:model\.)?layers\.0\.self_attn\.q_norm\.weight"),
        re.compile(r"layers\.(\d+)\..*"),
        re.compile(r"lm_head\.weight|logit_scale"),
        "hidden_size",
        "num_hidden_layers",
    ),
    Kind(
        _QWEN2,
        "safelight.nets.qwen2",
        # CLIP has such a bias, too, below encoder.
        re.compile(
            _PREFIX + r"(?:model\.)?(?:language_model\.)?(?<!encoder\.)"
            r"layers\.0\.self_attn\.q_proj\.bias"
        ),
        re.compile(r"layers\.(\d+)\..*"),
        re.compile(r"lm_head\.weight|logit_scale|(model\.)?visual\..*"),
        "hidden_size",
        "num_hidden_layers",
    ),
)

_EMBEDDINGS = {
    "CLIP": "text_model.embeddings.token_embedding.weight",
    "T5": "shared.weight",
    "Qwen3": "embed_tokens.weight",
    _QWEN2: "embed_tokens.weight",
}
_TWICE = "encoder.embed_tokens.weight"
"""T5's embeddings by the other of their two names; a file may have either, or both."""

_PROJECTION = "text_projection.weight"


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder of a file. weights: by our names."""

    kind: Kind
    prefix: str
    weights: dict[str, Weight]

    @property
    def width(self) -> int:
        """How many numbers it gives for a token, 0 if its file does not say."""
        found = self.weights.get(_EMBEDDINGS[self.kind.title])
        return found.shape[-1] if found is not None and found.shape else 0

    @property
    def layers(self) -> int:
        """How many layers it has."""
        numbers = map(self.kind.layer.fullmatch, self.weights)
        return len({match[1] for match in numbers if match is not None})


def kinds_of(family: Family) -> list[Kind]:
    """Return the kinds of text encoders that a family reads."""
    modules = {part.module for part in family.parts.values()}
    return [kind for kind in KINDS if kind.module in modules]


def read_encoders(header: Header) -> list[Encoder]:
    """Return the text encoders of a file; none if it has none.

    Raises SafelightError if there is something else in it too.
    """
    names = llama_names(header) or {key: key for key in header.tensors}
    found: dict[str, Kind] = {}
    for name in names.values():
        for kind in KINDS:
            if (told := kind.told.fullmatch(name)) is not None:
                found.setdefault(told[1], kind)
    if len(found) > MAX_ENCODERS:
        raise refusal(header.name, f"{len(found)} text encoders; {MAX_ENCODERS} are the most")
    prefixes = sorted(found, key=len, reverse=True)
    inside: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    scales = read_scales(header)
    unknown: list[str] = []
    for key, name in names.items():
        prefix = next((one for one in prefixes if name.startswith(one)), None)
        if key in scales.beside or is_unused(key):
            continue
        if prefix is None:
            unknown.append(key)
        elif not found[prefix].unused.fullmatch(name.removeprefix(prefix)):
            inside[prefix][key] = name.removeprefix(prefix)
    if found and unknown:
        raise refusal(header.name, f"{len(unknown)} keys that we do not know: {some(unknown)}")
    return [
        Encoder(kind, prefix, _weights(header, kind, inside[prefix], scales.by_weight))
        for prefix, kind in found.items()
    ]


def _weights(
    header: Header, kind: Kind, names: Mapping[str, str], scales: Mapping[str, str]
) -> dict[str, Weight]:
    """Return the weights of a text encoder by our names. names: transformers', by the keys."""
    found: dict[str, Weight] = {}
    for key, name in names.items():
        if name == _TWICE:
            if "shared.weight" in names.values():
                continue
            name = "shared.weight"
        elif kind.title == "CLIP":
            if not name.startswith(("text_model.", "text_projection.")):
                name = f"text_model.{name}"
        elif kind.title == "Qwen3":
            name = name.removeprefix("model.")
        elif kind.title == _QWEN2:
            name = qwen2_folder_name(name) or name
        if name in found:
            both = f"{key!r:.50} and {found[name].key!r:.50}"
            raise refusal(header.name, f"{both} are the same weight")
        found[name] = Weight(header, key, header.tensors[key].shape, scale=scales.get(key))
    return found


def place_encoders(
    header: Header,
    encoders: list[Encoder],
    family: Family,
    configs: Mapping[str, Mapping[str, Any]],
    lacking: Collection[str],
) -> Networks:
    """Return the networks that text encoders are, of those that a model lacks or has already.

    configs: of the family's networks, which say how large each is.

    Raises SafelightError for one that is no network of the family.
    """
    found = Networks({}, {}, {})
    for encoder in encoders:
        name = _place(encoder, family, configs, found.parts, lacking)
        if name is None:
            raise refusal(header.name, _unfit(encoder, family, configs))
        part = family.parts[name]
        found.take(
            Networks({name: part}, {name: configs[name]}, {name: _fitted(encoder, family, name)})
        )
    return found


def _place(
    encoder: Encoder,
    family: Family,
    configs: Mapping[str, Mapping[str, Any]],
    taken: Collection[str],
    lacking: Collection[str],
) -> str | None:
    """Return which network of a family an encoder is, None if it is none."""
    parts = [name for name, part in family.parts.items() if part.module == encoder.kind.module]
    section = family.sections().get(encoder.prefix) if encoder.prefix else None
    if section is not None and section.part in parts:
        return section.part
    sizes = encoder.width, encoder.layers
    fits = [name for name in parts if encoder.kind.sizes(configs.get(name, {})) == sizes]
    fits = [name for name in fits if name not in taken]
    return next((name for name in fits if name in lacking), fits[0] if fits else None)


def _unfit(encoder: Encoder, family: Family, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what to say of an encoder that is no network of a family."""
    reads = [
        "{1} layers of {0}".format(*encoder.kind.sizes(configs[name]))
        for name, part in family.parts.items()
        if part.module == encoder.kind.module and name in configs
    ]
    what = f"a {encoder.kind.title} encoder of {encoder.layers} layers of {encoder.width} numbers"
    if not reads:
        kinds = " and ".join(kind.title for kind in kinds_of(family))
        return f"{what}; {family.title} reads {kinds}"
    return f"{what}; {family.title} reads {' and '.join(dict.fromkeys(reads))}"


def _fitted(encoder: Encoder, family: Family, name: str) -> dict[str, Weight]:
    """Return the weights of an encoder with the projection that its place in the model has.

    CLIP-L's own is not applied where a family's files leave it out; there it is the identity.
    """
    weights = dict(encoder.weights)
    if encoder.kind.title != "CLIP":
        return weights
    part: Part = family.parts[name]
    identity: dict[str, str] = {}
    for section in family.sections().values():
        if section.part == name:
            identity |= section.identity
    if identity or "Projection" not in part.network:
        weights.pop(_PROJECTION, None)
    for ours, like in identity.items():
        if (one := weights.get(like)) is not None and one.shape:
            rows = one.shape[0]
            weights[ours] = replace(one, shape=(rows, rows), identity=True, scale=None)
    return weights
