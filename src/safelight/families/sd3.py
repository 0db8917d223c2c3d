"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): a transformer that reads three text encoders.

Two CLIP encoders are read before their last layer and side by side; T5's states follow them along
the tokens. A model may lack T5: its states are zeros then, and long prompts and writing suffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families import colours
from safelight.families.base import Conditioning
from safelight.families.flow import (
    T5_PART,
    T5_TOKENIZERS,
    FlowFamily,
    Reader,
    Rows,
    t5_states,
)
from safelight.families.flow_files import (
    SD3_LAYOUT,
    SD3_MEDIUM,
    SD35_LARGE,
    SD35_MEDIUM,
    Layout,
    Published,
)
from safelight.families.latent import END, TEXT_PART, TOKENIZERS, VAE_PART
from safelight.families.part import NO_PART, Part
from safelight.weights.names_joint import sd3_section

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.prompt.reading import Word
    from safelight.prompt.tokenizer import Tokenizer
    from safelight.request import Request
    from safelight.weights.folder import Folder
    from safelight.weights.names import Section
    from safelight.weights.plan import Plan

LONGEST = 256
"""The most tokens of T5, as in diffusers' pipeline."""

_CLIP = Part(
    TEXT_PART.module,
    "CLIPTextModelWithProjection",
    TEXT_PART.config,
    stem=TEXT_PART.stem,
    rename=TEXT_PART.rename,
)
_DEFAULTS = MappingProxyType({"sampler": "euler", "steps": 28, "guidance_scale": 7.0})
"""The defaults of diffusers' StableDiffusion3Pipeline."""

_DEFAULTS_35 = MappingProxyType({"sampler": "euler", "steps": 40, "guidance_scale": 4.5})
"""Those that the published folders of 3.5 name."""


@dataclass(frozen=True, eq=False)
class StableDiffusion3(FlowFamily):
    """One variant.

    layers: of the transformer. dual: whether its first layers attend twice. normed: whether it
    norms queries and keys.
    """

    name: str
    layers: int = 0
    dual: bool = False
    normed: bool = False
    defaults: Mapping[str, Any] = field(default_factory=lambda: _DEFAULTS)
    latent_rgb: tuple[tuple[float, ...], ...] | None = colours.SD3
    published: Published | None = None

    title: ClassVar[str] = "Stable Diffusion 3"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "transformer": Part("safelight.nets.sd3", "SD3Transformer2DModel", "SD3Config"),
        "vae": VAE_PART,
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": T5_PART,
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer": TOKENIZERS,
        "tokenizer_2": TOKENIZERS,
        "tokenizer_3": T5_TOKENIZERS,
    }
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    trained: ClassVar[bool] = True
    layout: ClassVar[Layout] = SD3_LAYOUT

    # --- files -------------------------------------------------------------------------------

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> StableDiffusion3:
        super().variant(configs, index, scheduler)
        net = configs["transformer"]
        shapes = net.num_layers, bool(net.dual_attention_layers), net.qk_norm is not None
        named = (v for v in VARIANTS if (v.layers, v.dual, v.normed) == shapes)
        return next(named, self)

    def published_variants(self) -> tuple[FlowFamily, ...]:
        return VARIANTS

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        net, vae = configs["transformer"], configs["vae"]
        clips = [configs[name] for name in ("text_encoder", "text_encoder_2")]
        if sum(clip.hidden_size for clip in clips) > net.joint_attention_dim:
            raise SafelightError("its text encoders give more numbers than its transformer reads")
        if sum(clip.projection_dim for clip in clips) != net.pooled_projection_dim:
            raise SafelightError(
                "the pooled states of its text encoders have "
                f"{sum(clip.projection_dim for clip in clips)} numbers, and its transformer reads "
                f"{net.pooled_projection_dim}"
            )
        t5 = configs.get("text_encoder_3")
        if t5 is not None and t5.d_model != net.joint_attention_dim:
            raise SafelightError(
                f"its T5 gives {t5.d_model} numbers for a word, and its transformer reads "
                f"{net.joint_attention_dim}"
            )
        if not net.in_channels == net.out_channels == vae.latent_channels:
            raise SafelightError(
                f"its vae decodes {vae.latent_channels} channels, and its transformer reads "
                f"{net.in_channels}"
            )

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        side = configs["transformer"].sample_size * configs["vae"].factor
        return side, side

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        lacking = () if "text_encoder_3" in configs else self.optional
        absent = ("image_encoder", "feature_extractor", *lacking)
        return {**super().index(configs), **dict.fromkeys(absent, NO_PART)}

    def original(self, part: str, config: Mapping[str, Any]) -> Section:
        if part == self.network:
            return sd3_section(part, config)
        return super().original(part, config)

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        from safelight.prompt.text_tokenizer import folder_text_tokenizer
        from safelight.prompt.tokenizer import clip_tokenizer, folder_tokenizer

        found: dict[str, Any] = {}
        for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            config = configs[encoder]
            length = config.max_position_embeddings
            if folder is None or (names is not None and name not in names):
                pad = "!" if name == "tokenizer_2" else END
                found[name] = clip_tokenizer(pad, length)
            else:
                found[name] = folder_tokenizer(folder, config.vocab_size, length, name)
        if folder is not None and "text_encoder_3" in configs:
            vocabulary = configs["text_encoder_3"].vocab_size
            found["tokenizer_3"] = folder_text_tokenizer(folder, vocabulary, "tokenizer_3")
        return found

    # --- drawing -----------------------------------------------------------------------------

    def check_request(self, model: Model | Plan, request: Request) -> None:
        super().check_request(model, request)
        net, vae = model.configs["transformer"], model.configs["vae"]
        most = net.pos_embed_max_size * net.patch_size * vae.factor
        for name in ("width", "height"):
            side = getattr(request, name)
            if side is not None and side > most:
                raise SafelightError(
                    f"{name} is at most {most} with {model.name}, not {side}: its network knows "
                    "no places beyond",
                    field=name,
                )

    def reader(self, tokenizers: Mapping[str, Any]) -> Reader | Tokenizer:
        if "tokenizer_3" in tokenizers:
            return Reader(tokenizers["tokenizer_3"], LONGEST)
        return tokenizers["tokenizer"]

    def words(self, model: Model, text: str) -> list[Word]:
        from safelight.prompt.places import joined_to, words_of
        from safelight.prompt.reading import Word

        first = words_of(model.parts["tokenizer"], text)
        if "tokenizer_3" not in model.parts:
            return first
        second, length = super().words(model, text), model.parts["tokenizer"].max_length
        moved = [Word(one.text, [length + n for n in one.tokens]) for one in second]
        # CLIP and T5 read the same words, unless a text is too long for CLIP or has odd letters.
        same = joined_to(first, [one.text for one in second])
        if same is None:
            return moved
        both = zip(same, moved, strict=True)
        return [Word(b.text, a.tokens + b.tokens) for a, b in both]

    def encode_text(self, model: Model, text: str) -> Conditioning:
        import torch
        import torch.nn.functional as F

        width = model.network.config.joint_attention_dim
        states, pooled = [], []
        for tokenizer, encoder in (
            ("tokenizer", "text_encoder"),
            ("tokenizer_2", "text_encoder_2"),
        ):
            ids = torch.tensor([model.parts[tokenizer].encode(text).ids], device=model.device)
            of_tokens, of_text = model.parts[encoder](ids, 1)
            states.append(of_tokens)
            pooled.append(of_text)
        clip = torch.cat(states, dim=-1)
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        if "text_encoder_3" in model.parts:
            long = t5_states(model, text, "tokenizer_3", "text_encoder_3", LONGEST).to(clip.dtype)
        else:
            long = torch.zeros(1, LONGEST, width, device=model.device, dtype=clip.dtype)
        tokens = torch.cat([clip, long], dim=1).to(model.dtype)
        return Conditioning(tokens, torch.cat(pooled, dim=-1))

    def velocity(self, model: Model, rows: Rows) -> Tensor:
        return model.network(rows.x, rows.timestep, rows.tokens, rows.pooled)

    def example(self, model: Model) -> Conditioning:
        import torch

        config = model.network.config
        like = {"device": model.device, "dtype": model.dtype}
        length = model.parts["text_encoder"].config.max_position_embeddings + LONGEST
        tokens = torch.ones(1, length, config.joint_attention_dim, **like)
        return Conditioning(tokens, torch.ones(1, config.pooled_projection_dim, **like))


VARIANTS = (
    StableDiffusion3("sd3", 24, published=SD3_MEDIUM),
    StableDiffusion3(
        "sd3.5-medium",
        24,
        dual=True,
        normed=True,
        defaults=_DEFAULTS_35,
        published=SD35_MEDIUM,
    ),
    StableDiffusion3("sd3.5-large", 38, normed=True, defaults=_DEFAULTS_35, published=SD35_LARGE),
)
SD3 = StableDiffusion3("sd3-custom", latent_rgb=None)
"""The family of folders whose transformer has the shapes of no published variant."""
