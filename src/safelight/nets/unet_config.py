"""The config of the UNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safelight.nets.config import Depths, NetConfig


@dataclass(frozen=True)
class UNetConfig(NetConfig):
    """The keys of unet/config.json that the arithmetic depends on, with diffusers' defaults."""

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    # For each down level; and for each up level, if those differ.
    transformer_layers_per_block: int | Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    # The number of heads, one for all blocks or one per block. The key has the name that it has in
    # checkpoints, although that says something else.
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1
    time_cond_proj_dim: int | None = None
    # "text_time": the network also reads a pooled text state and numbers about the picture's size.
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    _inert: ClassVar = {
        "act_fn": ("silu", "swish"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_scale_factor": (1, 1.0),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each down block."""
        h = self.attention_head_dim
        return h if isinstance(h, tuple) else (h,) * len(self.block_out_channels)

    @property
    def skips(self) -> int:
        """The number of skip connections."""
        return len(self.block_out_channels) * (self.layers_per_block + 1)

    @property
    def depth(self) -> int:
        """Number of transformer blocks, for the bound on layers."""
        return sum(map(sum, self.down_depths)) + sum(map(sum, self.up_depths))

    @property
    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of each transformer in the down blocks, by level and layer."""
        levels, layers = len(self.block_out_channels), self.layers_per_block
        return _spread(self.transformer_layers_per_block, levels, layers)

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """The same for the up blocks, in the order in which they run."""
        levels, layers = len(self.block_out_channels), self.layers_per_block + 1
        if self.reverse_transformer_layers_per_block is not None:
            return _spread(self.reverse_transformer_layers_per_block, levels, layers)
        down = self.transformer_layers_per_block
        return _spread(down if isinstance(down, int) else down[::-1], levels, layers)

    @property
    def cross_attentions(self) -> tuple[int, ...]:
        """The channels of each cross-attention: in the down blocks, the up blocks, the middle.

        IP-Adapters number them in this order.
        """
        widths, found = self.block_out_channels, list[int]()
        down = zip(self.down_block_types, widths, self.down_depths, strict=True)
        up = zip(self.up_block_types, widths[::-1], self.up_depths, strict=True)
        for kind, width, depths in (*down, *up):
            found += [width] * (sum(depths) if kind.startswith("CrossAttn") else 0)
        if self.mid_block_type == "UNetMidBlock2DCrossAttn":
            found += [widths[-1]] * self.down_depths[-1][0]
        return tuple(found)

    def _validate(self) -> None:
        n = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.heads) == n:
            self._refuse("block types, channels and heads differ in number")
        known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        for name in (*self.down_block_types, *self.up_block_types):
            if name not in known:
                self._refuse(
                    f"block {name!r:.40} is not supported; expected {', '.join(sorted(known))}"
                )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads or channels % self.norm_num_groups:
                self._refuse(f"{channels} channels do not divide into heads and norm groups")
        self._check_sines(self.block_out_channels[0], self.freq_shift)
        if self.time_cond_proj_dim is not None:
            self._check_sines(self.time_cond_proj_dim, 1)
        if self.mid_block_type not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None):
            self._refuse(
                f"mid_block_type={self.mid_block_type!r:.40} is not supported; expected "
                "UNetMidBlock2DCrossAttn, UNetMidBlock2D or null"
            )
        self._check_depths()
        self._check_added()

    def _check_depths(self) -> None:
        """Raise SafelightError if transformer depths do not fit the levels and layers."""
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        uneven = isinstance(down, tuple) and any(isinstance(level, tuple) for level in down)
        if uneven and up is None:
            self._refuse(
                "transformer_layers_per_block has a list in it: "
                "reverse_transformer_layers_per_block is needed as well"
            )
        for depths, layers in ((down, self.layers_per_block), (up, self.layers_per_block + 1)):
            levels = depths if isinstance(depths, tuple) else ()
            if levels and len(levels) != len(self.block_out_channels):
                self._refuse(f"{len(levels)} levels of transformers; channels have another number")
            if any(isinstance(level, tuple) and len(level) != layers for level in levels):
                self._refuse(f"a level of transformers has not {layers} layers")
        if self.mid_block_type == "UNetMidBlock2DCrossAttn" and len(set(self.down_depths[-1])) > 1:
            self._refuse("the middle's transformer has no single number of blocks")

    def _check_added(self) -> None:
        """Raise SafelightError if the embedding of pooled text and sizes is incomplete."""
        if self.addition_embed_type not in (None, "text_time"):
            self._refuse(
                f"addition_embed_type={self.addition_embed_type!r:.40} is not supported; "
                "expected text_time or null"
            )
        if self.addition_embed_type is None:
            return
        width, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if width is None or total is None:
            self._refuse(
                "text_time needs addition_time_embed_dim and projection_class_embeddings_input_dim"
            )
        else:
            self._check_sines(width, self.freq_shift)


def _spread(depths: int | Depths, levels: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """Return depths by level and layer."""
    by_level: Depths = (depths,) * levels if isinstance(depths, int) else depths
    return tuple(one if isinstance(one, tuple) else (one,) * layers for one in by_level)
