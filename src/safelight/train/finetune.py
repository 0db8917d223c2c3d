"""Fine-tune a loaded model on a folder of captioned pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from safelight.defaults import is_distilled
from safelight.errors import SafelightError
from safelight.model import Model
from safelight.nets.clip import CLIPTextModel
from safelight.nets.tiny import AutoencoderTiny
from safelight.nets.unet import UNet2DConditionModel
from safelight.nets.vae import AutoencoderKL
from safelight.train.autoencoder import encode
from safelight.train.denoiser import TextToImage, train_text_to_image
from safelight.train.devices import Net, accelerator, memory_told
from safelight.train.export import export_text_to_image, replacing, writing
from safelight.train.folder import Pixels, captioned, check_apart, digest, read
from safelight.train.loop import check_plan, progress
from safelight.train.out import is_kept, save_whole
from safelight.train.plan import Plan
from safelight.train.sheet import draw_sheet, is_sheet, under
from safelight.train.tokens import token_ids
from safelight.weights import load_model
from safelight.weights.find import PREVIEWS, Source
from safelight.weights.plan import read_plan
from safelight.words import words_in

CHECKPOINT_EVERY = 100
SHEET_PROMPTS = 6


@memory_told()
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
    tell(base, base.unet, base.text_encoder)
    prompts = list(dict.fromkeys(captions))[:SHEET_PROMPTS]
    chief = accelerator().is_main_process
    # Without a checkpoint, a sheet may be of another model that was to be trained here.
    if chief and not (is_sheet(out / "before.png") and (out / "checkpoint.pt").exists()):
        with writing(made):
            draw_sheet(model, out / "before.png", prompts)

    latents = _latents(vae, squares, out / f"latents-{plan.recipe[:12]}.pt")
    del squares  # their memory is needed now
    ids = token_ids(tokenizer, captions)
    empty = torch.tensor(tokenizer.encode("").ids, dtype=torch.int32)
    net = _trainable(base)
    scheduler = _scheduler(base)
    notes = _notes(base, captions)

    def show(trained: Any, step: int) -> Image.Image:
        parts = vae, trained.text_encoder, trained.unet
        with writing(made):
            with replacing(made) as new:
                tokenizer.save(new / "tokenizer")
                bring_along(base, new)
                export_text_to_image(new, *parts, scheduler, notes)
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
    if chief:
        after = show(net, plan.steps)
        with writing(made):
            under(out / "before.png", after).save(out / "sheet.png")
    return made


def _check(base: Model) -> None:
    if not base.uses_prompt:
        raise SafelightError(
            f"{base.name} draws from noise alone: `safelight train unconditional` makes such a one"
        )
    check_trainable(base)


def check_trainable(base: Model) -> None:
    """Raise SafelightError if a model that reads a prompt cannot be trained further."""
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
    if base.family.takes_guidance(base):
        # The input would stay as it is, while the rest of the network learns without it.
        raise SafelightError(
            f"{base.name} takes the guidance scale as an input: such models cannot be trained "
            "further yet; take the one it was made from"
        )


def tell(base: Model, *nets: Any) -> None:
    """Say what loading a model warned of, and what its training takes.

    Each weight is kept five times in float32: with its gradient, its average and the two moments of
    the optimizer. A checkpoint has all but the gradient.
    """
    if not accelerator().is_main_process:
        return
    for warning in base.warnings:
        progress(f"warning: {warning}")
    count = sum(p.numel() for net in nets for p in net.parameters())
    progress(
        f"{count / 1e6:,.0f} million weights are trained, which takes {count * 20 / 1e9:.1f} GB of "
        f"memory beside the pictures of a step; a checkpoint has {count * 16 / 1e9:.1f} GB"
    )


def _latents(vae: AutoencoderKL | AutoencoderTiny, squares: Pixels, path: Path) -> Tensor:
    """Return the latents of pictures, which the first process makes and keeps in a file."""
    machine = accelerator()
    if machine.is_main_process and not is_kept(path, len(squares), progress):
        save_whole(path, encode(vae, squares), "the latents of the pictures", "nothing is lost")
    machine.wait_for_everyone()
    return torch.load(path, weights_only=True)


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


def _scheduler(base: Model) -> dict[str, Any]:
    """Return the scheduler's config as it is written in the model's files.

    Another program samples by all of it: by its class, and by settings that we do not know.
    """
    found = read_plan(Source(base.name, Path(base.path))).raw["scheduler"]
    told = {"prediction_type": base.scheduler.prediction_type}
    return {"_class_name": "DDIMScheduler", **found, **told}


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
