"""Tiny random models of flow matching, as folders that diffusers' pipelines write."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from safelight.engine import Engine
from safelight.model import Model
from safelight.request import Request
from tests.parity.sdxl_models import TEXT, VAE, write_clip_tokenizer

ASKED = {"steps": 2, "width": 64, "height": 64, "seed": 3}
"""A small picture in few steps."""

VAE_16 = {
    **VAE,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
CLIP = {**TEXT, "projection_dim": 16}
CLIP_2 = {**TEXT, "hidden_size": 24, "hidden_act": "gelu", "projection_dim": 20}
T5 = {
    "vocab_size": 120,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 36,
    "pos_embed_max_size": 12,
}


def randomised(network: Any, std: float = 0.1) -> Any:
    """Return the network with weights that tell its inputs apart, none of them zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            torch.nn.init.normal_(parameter, std=std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return network.eval()


def t5_tokenizer(folder: Path) -> None:
    """Write a small tokenizer of T5's kind: its pieces are letters and some syllables."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁red", "app", "le", "▁on", "▁ta", "ble"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    vocabulary += [(piece, -8.0 + len(piece)) for piece in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    whole = transformers.T5TokenizerFast(
        tokenizer_object=backend, extra_ids=0, model_max_length=512
    )
    whole.save_pretrained(folder)


def text_encoder(kind: str, config: dict[str, Any], folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    made = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    randomised(made, 0.2)
    if config["projection_dim"] == config["hidden_size"] and hasattr(made, "text_projection"):
        # As in the published folders of Stable Diffusion 3; its single files hold none.
        torch.nn.init.eye_(made.text_projection.weight)
    made.save_pretrained(folder)


def t5_encoder(folder: Path) -> None:
    torch.manual_seed(5)
    made = transformers.T5EncoderModel(transformers.T5Config(**T5))
    randomised(made, 0.2).save_pretrained(folder)


def make_sd3(
    folder: Path,
    *,
    t5: bool = True,
    scheduler: dict[str, Any] = SD3_SCHEDULER,
    **transformer: Any,
) -> Path:
    """Write a model folder of Stable Diffusion 3. transformer: settings that differ from SD3."""
    torch.manual_seed(1)
    net = diffusers.SD3Transformer2DModel(**{**SD3, **transformer})
    randomised(net, 0.06).save_pretrained(folder / "transformer")
    torch.manual_seed(2)
    diffusers.AutoencoderKL(**VAE_16).save_pretrained(folder / "vae")
    text_encoder("CLIPTextModelWithProjection", CLIP, folder / "text_encoder", 3)
    text_encoder("CLIPTextModelWithProjection", CLIP_2, folder / "text_encoder_2", 4)
    write_clip_tokenizer(folder / "tokenizer", "<|endoftext|>")
    write_clip_tokenizer(folder / "tokenizer_2", "!")
    if t5:
        t5_encoder(folder / "text_encoder_3")
        t5_tokenizer(folder / "tokenizer_3")
    write_index(
        folder,
        scheduler,
        _class_name="StableDiffusion3Pipeline",
        text_encoder=["transformers", "CLIPTextModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizer"],
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
        text_encoder_3=["transformers", "T5EncoderModel"] if t5 else [None, None],
        tokenizer_3=["transformers", "T5TokenizerFast"] if t5 else [None, None],
        transformer=["diffusers", "SD3Transformer2DModel"],
        feature_extractor=[None, None],
        image_encoder=[None, None],
    )
    return folder


FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
SCHNELL = {**SD3_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}
DEV = {**SCHNELL, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FLUX_VAE = {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}


def make_flux(folder: Path, *, guided: bool) -> Path:
    """Write a model folder of FLUX.1. guided: it is like dev, else like schnell."""
    torch.manual_seed(1)
    net = diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=guided)
    randomised(net, 0.06).save_pretrained(folder / "transformer")
    torch.manual_seed(2)
    diffusers.AutoencoderKL(**FLUX_VAE).save_pretrained(folder / "vae")
    text_encoder("CLIPTextModel", TEXT, folder / "text_encoder", 3)
    write_clip_tokenizer(folder / "tokenizer", "<|endoftext|>")
    t5_encoder(folder / "text_encoder_2")
    t5_tokenizer(folder / "tokenizer_2")
    write_index(
        folder,
        DEV if guided else SCHNELL,
        _class_name="FluxPipeline",
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        text_encoder_2=["transformers", "T5EncoderModel"],
        tokenizer_2=["transformers", "T5TokenizerFast"],
        transformer=["diffusers", "FluxTransformer2DModel"],
    )
    return folder


ZIMAGE = {
    "in_channels": 16,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 32,
    "axes_dims": [4, 6, 6],
    "axes_lens": [1024, 64, 64],
}
QWEN = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""What Qwen3's chat template makes of one message, with or without enable_thinking."""


def qwen_tokenizer(folder: Path) -> None:
    """Write a small tokenizer of Qwen3's kind: bytes, and the marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken(one, normalized=False) for one in ("<think>", "</think>")])
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT,
    )
    whole.save_pretrained(folder)


KLEIN = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
KLEIN_VAE = {
    **{key: value for key, value in VAE.items() if key not in ("scaling_factor", "force_upcast")},
    "latent_channels": 16,
}
KLEIN_QWEN = {**QWEN, "num_hidden_layers": 28}


def make_klein(folder: Path, *, distilled: bool, shift: bool = True, **vae: Any) -> Path:
    """Write a model folder of FLUX.2 klein. vae: settings that differ from KLEIN_VAE."""
    torch.manual_seed(1)
    net = diffusers.Flux2Transformer2DModel(**KLEIN)
    randomised(net, 0.1).save_pretrained(folder / "transformer")
    torch.manual_seed(2)
    made = diffusers.AutoencoderKLFlux2(**{**KLEIN_VAE, **vae})
    torch.nn.init.normal_(made.bn.running_mean, std=0.3)
    torch.nn.init.uniform_(made.bn.running_var, 0.5, 2.0)
    made.save_pretrained(folder / "vae")
    torch.manual_seed(3)
    reads = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**KLEIN_QWEN))
    randomised(reads, 0.2).save_pretrained(folder / "text_encoder")
    qwen_tokenizer(folder / "tokenizer")
    write_index(
        folder,
        {**DEV, "shift": 3.0, "use_dynamic_shifting": shift},
        _class_name="Flux2KleinPipeline",
        is_distilled=distilled,
        text_encoder=["transformers", "Qwen3ForCausalLM"],
        tokenizer=["transformers", "Qwen2TokenizerFast"],
        transformer=["diffusers", "Flux2Transformer2DModel"],
        vae=["diffusers", "AutoencoderKLFlux2"],
    )
    return folder


QWEN_IMAGE_NET = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
QWEN_VAE: dict[str, Any] = {
    "base_dim": 8,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
QWEN_IMAGE_SCHEDULER = {
    **DEV,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


def qwen2_config() -> Any:
    """Return the config of a small Qwen2.5-VL."""
    text = {key: value for key, value in QWEN.items() if key != "head_dim"}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rms_norm_eps": 1e-6}
    sees = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**sees, "out_hidden_size": text["hidden_size"]}
    )


def make_qwen_image(folder: Path, **scheduler: Any) -> Path:
    """Write a model folder of Qwen-Image. scheduler: settings that differ from the published."""
    torch.manual_seed(1)
    net = diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE_NET)
    randomised(net, 0.1).save_pretrained(folder / "transformer")
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKLQwenImage(**QWEN_VAE)
    randomised(vae, 0.1).save_pretrained(folder / "vae")
    torch.manual_seed(3)
    reads = transformers.Qwen2_5_VLForConditionalGeneration(qwen2_config())
    randomised(reads, 0.2).save_pretrained(folder / "text_encoder")
    qwen_tokenizer(folder / "tokenizer")
    write_index(
        folder,
        {**QWEN_IMAGE_SCHEDULER, **scheduler},
        _class_name="QwenImagePipeline",
        text_encoder=["transformers", "Qwen2_5_VLForConditionalGeneration"],
        tokenizer=["transformers", "Qwen2Tokenizer"],
        transformer=["diffusers", "QwenImageTransformer2DModel"],
        vae=["diffusers", "AutoencoderKLQwenImage"],
    )
    return folder


def make_zimage(folder: Path, *, shift: float) -> Path:
    """Write a model folder of Z-Image; with shift 3 it is Turbo."""
    torch.manual_seed(1)
    net = diffusers.ZImageTransformer2DModel(**ZIMAGE)
    randomised(net, 0.1).save_pretrained(folder / "transformer")
    torch.manual_seed(2)
    diffusers.AutoencoderKL(**FLUX_VAE).save_pretrained(folder / "vae")
    torch.manual_seed(3)
    reads = randomised(transformers.Qwen3Model(transformers.Qwen3Config(**QWEN)), 0.2)
    reads.save_pretrained(folder / "text_encoder")
    qwen_tokenizer(folder / "tokenizer")
    write_index(
        folder,
        {**SD3_SCHEDULER, "shift": shift, "use_dynamic_shifting": False},
        _class_name="ZImagePipeline",
        text_encoder=["transformers", "Qwen3Model"],
        tokenizer=["transformers", "Qwen2Tokenizer"],
        transformer=["diffusers", "ZImageTransformer2DModel"],
    )
    return folder


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configs of a folder's networks, as `Published` has them."""
    found = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/config.json")
    }
    return {
        part: {key: value for key, value in config.items() if value is not None}
        for part, config in found.items()
    }


def write_index(folder: Path, scheduler: dict[str, Any], **parts: Any) -> None:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
        **parts,
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def check_shared_calls(model: Model, requests: list[Request]) -> None:
    """Assert that pictures drawn in shared calls are those that each request gives alone."""
    engine = Engine(model, exact=False, rows=8)
    for request in requests:
        engine.add(request)
    tickets = [*engine.tickets]
    while engine.busy:
        engine.step()
    for request, ticket in zip(requests, tickets, strict=True):
        alone = np.asarray(model.generate(request).images[0]).astype(int)
        assert np.abs(alone - np.asarray(ticket.image)).max() <= 1
