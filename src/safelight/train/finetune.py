"""Fine-tune a loaded model on a folder of captioned pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from safelight.defaults import is_distilled
from safelight.errors import SafelightError
from safelight.model import Model
from safelight.nets.clip import CLIPTextModel
from safelight.nets.unet import UNet2DConditionModel
from safelight.train.autoencoder import encode
from safelight.train.denoiser import TextToImage, train_text_to_image
from safelight.train.devices import Net
from safelight.train.export import export_text_to_image, writing
from safelight.train.folder import captioned, check_apart, digest, read
from safelight.train.loop import check_plan
from safelight.train.plan import Plan
from safelight.train.sheet import draw_sheet, under
from safelight.train.tokens import token_ids
from safelight.weights import load_model
from safelight.weights.find import PREVIEWS
from safelight.words import words_in

CHECKPOINT_EVERY = 100
SHEET_PROMPTS = 6


def finetune(
    folder: Path,
    out: Path,
    plan: Plan,
    *,
    model: str = "embedded",
    size: int | None = None,
    min_snr: float | None = None,
    native: bool = False,
) -> Path:
    """Train UNet and text encoder of `model` on a folder of pictures, and return out/model.

    folder: pictures with captions, see `train.folder.captioned`. size: side of the squares that
    pictures are cut to, the model's own if None. out/sheet.png has pictures of the first
    captions, drawn before and after. A call with the same `out` continues where it was stopped.
    Raises SafelightError if there are no pictures, or if the model cannot be trained.
    """
    base = load_model(model, device="cpu", dtype="float32", plain=True)
    _check(base)
    vae, tokenizer = base.vae, base.tokenizer
    assert vae is not None
    assert tokenizer is not None
    tokenizer = tokenizer.with_words(None)  # it learns words that it was never taught
    side = size or min(base.native_size)
    if side % 8 or side < 64:
        raise SafelightError(f"size {side}: expected a multiple of 8, 64 or more")
    check_apart(folder, out)
    examples = captioned(folder)
    captions = [example.caption for example in examples]
    squares = read([example.path for example in examples], side)
    told = [] if min_snr is None else [f"min-snr {min_snr:g}"]
    plan = replace(plan, recipe=digest(squares, [base.sha256, *told, *captions]))
    check_plan(out, plan, native=native)
    made = out / "model"
    prompts = list(dict.fromkeys(captions))[:SHEET_PROMPTS]
    with writing(made):
        # Without a checkpoint, a sheet may be of another model that was to be trained here.
        if not ((out / "before.png").exists() and (out / "checkpoint.pt").exists()):
            draw_sheet(model, out / "before.png", prompts)
        tokenizer.save(made / "tokenizer")

    latents = encode(vae, squares)
    ids = token_ids(tokenizer, captions)
    empty = torch.tensor(tokenizer.encode("").ids, dtype=torch.int32)
    net = _trainable(base)
    notes = _notes(base, captions)

    def show(trained: Any, step: int) -> Image.Image:
        parts = vae, trained.text_encoder, trained.unet
        with writing(made):
            export_text_to_image(made, *parts, base.scheduler.to_dict(), notes)
            return draw_sheet(made, out / f"step-{step:06}.png", prompts)

    train_text_to_image(
        net,
        base.scheduler,
        latents,
        ids,
        empty,
        plan,
        out,
        every=CHECKPOINT_EVERY,
        native=native,
        min_snr=min_snr,
        on_checkpoint=show,
    )
    after = show(net, plan.steps)
    with writing(made):
        under(out / "before.png", after).save(out / "sheet.png")
        bring_along(base, made)
    return made


def _check(base: Model) -> None:
    if not base.uses_prompt:
        raise SafelightError(
            f"{base.name} draws from noise alone: `safelight train unconditional` makes such a one"
        )
    if not base.family.trainable:
        raise SafelightError(
            f"{base.name} is of {base.family.title}, which cannot be trained further yet; "
            "Stable Diffusion 1.x and 2.x can"
        )
    if base.family.reads_mask(base):
        raise SafelightError(
            f"{base.name} reads a mask beside the picture: such models cannot be trained further "
            "yet; take the one it was made from"
        )


def _trainable(base: Model) -> TextToImage:
    assert isinstance(base.text_encoder, CLIPTextModel)
    assert isinstance(base.unet, UNet2DConditionModel)
    net = TextToImage.__new__(TextToImage)
    nn.Module.__init__(net)
    net.text_encoder, net.unet = base.text_encoder, base.unet
    return own_memory(net).train()


def own_memory(net: Net) -> Net:
    """Copy a network's weights out of the mapped file, so that they can be trained."""
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return net


def _notes(base: Model, captions: list[str]) -> dict[str, Any]:
    words = {word for caption in captions for word in words_in(caption)}
    kept = {name: base.notes[name] for name in ("draw_with", "prompts") if name in base.notes}
    notes = {
        **kept,
        "made_from": f"{base.name}, sha256 {base.sha256}",
        # Always written: a model with the two above and without this counts as distilled.
        "distilled": is_distilled(base.notes),
    }
    if base.words is not None:
        notes["words"] = sorted(base.words | words)
    return notes


def bring_along(base: Model, made: Path) -> None:
    """Copy the NOTICE and the preview decoder of the model that the weights were made from.

    The decoder still fits, because the autoencoder stays the same.
    """
    notice, previews = (Path(base.path) / name for name in ("NOTICE", PREVIEWS))
    if notice.is_file():
        shutil.copyfile(notice, made / "NOTICE")
    if previews.is_dir():
        shutil.copytree(previews, made / PREVIEWS, dirs_exist_ok=True)
