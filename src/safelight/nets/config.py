"""How a network's frozen config is read from the JSON beside its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from safelight.errors import SafelightError

Depths = tuple[int | tuple[int, ...], ...]
"""A number for each level of a network, or one for each layer of a level."""

Layers = tuple[int, ...]
"""The numbers of some of a network's layers, from 0; there may be none."""

Channels = tuple[float, ...]
"""A number for each channel of a latent."""

BOUNDS: dict[str, tuple[float, float]] = {
    "addition_time_embed_dim": (2, 2**14),
    "all_patch_size": (1, 2**4),
    "attention_head_dim": (1, 2**14),
    "axes_dims": (2, 2**10),
    "axes_dims_rope": (2, 2**10),
    "base_dim": (1, 2**12),
    "batch_norm_eps": (1e-12, 0.1),
    "block_out_channels": (1, 2**14),
    "cap_feat_dim": (1, 2**14),
    "channels": (1, 2**14),
    "caption_projection_dim": (1, 2**14),
    "cross_attention_dim": (1, 2**14),
    "d_ff": (1, 2**16),
    "d_kv": (1, 2**14),
    "d_model": (1, 2**14),
    "decoder_block_out_channels": (1, 2**14),
    "dim": (2, 2**14),
    "dim_mult": (1, 2**6),
    "downsample_padding": (0, 1),
    "dual_attention_layers": (0, 2**7 - 1),
    "encoder_block_out_channels": (1, 2**14),
    "eos_token_id": (0, 2**20),
    "freq_shift": (0, 1),
    "head_dim": (2, 2**10),
    "heads_size": (1, 2**14),
    "hidden_size": (1, 2**14),
    "image_dim": (1, 2**14),
    "image_size": (1, 2**11),
    "in_channels": (1, 2**8),
    "intermediate_size": (1, 2**16),
    "joint_attention_dim": (1, 2**16),
    "latent_channels": (1, 2**8),
    "latents_mean": (-1e3, 1e3),
    "latents_std": (1e-3, 1e3),
    "layer_norm_eps": (1e-12, 0.1),
    "layer_norm_epsilon": (1e-12, 0.1),
    "layers_per_block": (1, 16),
    "max_position_embeddings": (3, 2**12),
    "mlp_ratio": (0.125, 2**4),
    "n_heads": (1, 2**8),
    "n_kv_heads": (1, 2**8),
    "n_layers": (1, 2**7),
    "n_refiner_layers": (0, 2**5),
    "norm_eps": (1e-12, 0.1),
    "norm_num_groups": (1, 2**10),
    "num_attention_heads": (1, 2**8),
    "num_decoder_blocks": (0, 2**6),
    "num_encoder_blocks": (0, 2**6),
    "num_heads": (1, 2**8),
    "num_hidden_layers": (1, 2**7),
    "num_key_value_heads": (1, 2**8),
    "num_layers": (1, 2**7),
    "num_res_blocks": (1, 16),
    "num_single_layers": (0, 2**7),
    "num_tokens": (1, 2**10),
    "out_channels": (1, 2**8),
    "patch_size": (1, 2**6),
    "pooled_projection_dim": (1, 2**14),
    "pos_embed_max_size": (1, 2**11),
    "projection_class_embeddings_input_dim": (1, 2**16),
    "projection_dim": (1, 2**14),
    "relative_attention_max_distance": (2, 2**16),
    "relative_attention_num_buckets": (4, 2**10),
    "reverse_transformer_layers_per_block": (1, 32),
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (2, 1e9),
    "sample_size": (1, 2**11),
    "scaling_factor": (1e-3, 1e3),
    "shift_factor": (-1e3, 1e3),
    "t_scale": (1, 1e5),
    "time_cond_proj_dim": (4, 2**14),
    "transformer_layers_per_block": (0, 32),
    "vocab_size": (3, 2**20),
    "widths": (1, 2**14),
    "z_dim": (1, 2**8),
}
"""The smallest and the largest value of each number in a config, or of each number in a list.

They are far outside those of published models, and keep a network from a stranger's config small:
its shapes are known, and compared with those of its file, before memory is taken.
"""

_OTHERS = (0, 2**24)
"""The same for numbers that are not in BOUNDS."""

MAX_LEVELS = 12
"""The most values in a list that is not of layers: one for each level of a network.

Each level halves the sides.
"""

MAX_CHANNELS = 256
"""The most values in a list of channels."""

MAX_LAYERS = 128
"""The most layers of a network, and values in a list of layers.

Building a layer takes milliseconds, even without weights.
"""


class NetConfig:
    """Base of the frozen config dataclasses.

    A config is data from a stranger. A key that we build from is a field. A key that would change
    the arithmetic, and that we do not build, is in `_inert` with the values that change nothing.
    Other keys are bookkeeping of the library that wrote the file, and are ignored.
    """

    _inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> Self:
        """Return the config of a parsed config.json.

        Raises SafelightError when a key asks for a part that Safelight does not build, or when
        a value has the wrong type or is out of bounds.
        """
        for key, harmless in cls._inert.items():
            value = json.get(key, harmless[0])
            if not any(type(value) is type(h) and value == h for h in harmless):
                raise SafelightError(
                    f"{cls._label()}: {key}={shown(value)} is not supported; "
                    f"expected {' or '.join(repr(h) for h in harmless)}"
                )
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name not in json:
                continue
            values[field.name] = _tuples(json[field.name])
        config = cls(**values)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            _check(cls._label(), field.name, getattr(config, field.name), str(field.type))
        if config.depth > MAX_LAYERS:
            config._refuse(f"{config.depth} layers; {MAX_LAYERS} are the most")
        config._validate()
        return config

    @property
    def depth(self) -> int:
        """About how many layers the network has."""
        layers = (getattr(self, key, 1) for key in ("num_hidden_layers", "layers_per_block"))
        return math.prod(layers) * len(getattr(self, "block_out_channels", (0,)))

    @classmethod
    def _label(cls) -> str:
        return cls.__name__.removesuffix("Config")

    def _validate(self) -> None:
        """Check what is particular to one kind of config; raises SafelightError."""

    def _check_sines(self, width: int, shift: int) -> None:
        """Raise SafelightError unless `width` // 2 − `shift`, by which sines divide, is above 0."""
        if width // 2 <= shift:
            self._refuse(f"{width} channels are too few for the sines of a timestep")

    def _check_axes(self, axes: Sequence[int], count: int, width: int) -> None:
        """Raise SafelightError unless rotary axes are `count` even numbers with the sum `width`."""
        if len(axes) != count or any(axis % 2 for axis in axes) or sum(axes) != width:
            number = {3: "three", 4: "four"}[count]
            self._refuse(
                f"axes_dims_rope should be {number} even numbers with the sum of "
                f"attention_head_dim={width}"
            )

    def _refuse(self, why: str) -> None:
        raise SafelightError(f"{self._label()}: {why}")


def shown(value: Any) -> str:
    """Return a config's value as a short text for a message."""
    if isinstance(value, list | tuple | dict):
        return f"a {'list' if isinstance(value, list | tuple) else 'table'} of {len(value)}"
    return f"{value!r:.40}"


def _tuples(value: Any) -> Any:
    """Return a JSON value with its lists as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check(label: str, name: str, value: Any, kind: str) -> None:
    """Check a value against its annotation.

    It is int, float, bool, str, a tuple of them, Depths, Layers, Channels, or one of these or None.
    Numbers are checked against `BOUNDS` too.
    """
    if value is None and kind.endswith(" | None"):
        return
    options = [k.strip() for k in kind.removesuffix(" | None").split("|")]
    single = not isinstance(value, tuple)
    members: tuple[Any, ...] = (value,) if single else value
    if "Depths" in options and not single:
        for one in members:
            if isinstance(one, tuple) and len(one) > MAX_LEVELS:
                raise SafelightError(f"{label}: {name} has {len(one)} values of one level")
        options.append("tuple[int, ...]")
        members = tuple(n for one in members for n in (one if isinstance(one, tuple) else (one,)))
    most = MAX_LEVELS
    if kind == "Layers":
        options, most = ["tuple[int, ...]"], MAX_LAYERS
    elif kind == "Channels":
        options, most = ["tuple[float, ...]"], MAX_CHANNELS
    for option in options:
        inner = option.removeprefix("tuple[").removesuffix(", ...]")
        filled = len(members) > 0 or kind == "Layers"
        if single == (inner == option) and filled and all(_is(v, inner) for v in members):
            break
    else:
        raise SafelightError(f"{label}: {name}={shown(value)} should be {' or '.join(options)}")
    if not single and len(value) > most:
        raise SafelightError(f"{label}: {name} has {len(value)} values; at most {most}")
    if inner not in ("int", "float"):
        return
    low, high = BOUNDS.get(name, _OTHERS)
    for number in members:
        if not low <= number <= high:
            raise SafelightError(
                f"{label}: {name}={shown(number)} should be from {low:g} to {high:g}"
            )


def _is(value: Any, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        # NaN passes here, but not the check of bounds.
        allowed = int if kind == "int" else int | float
        return isinstance(value, allowed) and not isinstance(value, bool)
    return isinstance(value, str)
