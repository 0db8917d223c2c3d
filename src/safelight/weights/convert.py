"""Write a model in another layout: a folder as diffusers has it, or one file.

No network computes: weights go from file to file, by the names that a plan gives them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.families import Part
from safelight.families.part import NO_PART
from safelight.fast.quantised import GGML
from safelight.paths import expanded
from safelight.sampling import SchedulerConfig
from safelight.weights.autoencoders import with_autoencoders
from safelight.weights.check import refusal
from safelight.weights.digest import digest_files
from safelight.weights.find import (
    PREVIEWS,
    Given,
    Source,
    find,
    find_previews,
    find_vae,
    parts_finder,
)
from safelight.weights.frames import frame
from safelight.weights.library import ENDINGS
from safelight.weights.names import Original, Weight, original_names
from safelight.weights.plan import Plan, read_plan
from safelight.weights.stored import SMALL, Read, stored_tensor
from safelight.weights.tensors import DTYPES, is_finite, open_tensors
from safelight.weights.write import Out, write_tensors, written

PRECISIONS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_BOOKKEEPING = ("sample_size", "projection_dim", "eos_token_id")
_MODEL_TYPES = {"T5EncoderModel": "t5", "Qwen3Model": "qwen3"}
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")

Parts = dict[str, dict[str, Out]]
"""The tensors to write, by network and our name."""


def convert(
    name: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    parts: Given | Sequence[Given] | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    overwrite: bool = False,
    models_dir: str | Path | None = None,
    download: bool = True,
) -> list[str]:
    """Write a model as one file if `out` ends in ".safetensors", else as a folder.

    name, parts, vae, prediction_type, models_dir, download: as for `load_model`.
    dtype: "float32", "float16" or "bfloat16"; without it each weight stays as it is stored, to
      the bit. Weights of GGUF and of scaled float8 become float16.

    Returns one line for each thing that the new layout does not hold. Raises SafelightError if the
    model cannot be loaded, if `out` exists and overwrite is false, or if one file cannot hold it.
    """
    if dtype not in (None, *PRECISIONS):
        raise SafelightError(f"dtype {dtype!r:.40}; expected {', '.join(PRECISIONS)}")
    path = expanded(out)
    single = path.suffix.lower() == ".safetensors"
    if not single and path.suffix.lower() in ENDINGS:
        raise SafelightError(f"out must end in .safetensors, or be a folder, not {path.name!r}")
    source, vaes = find(name, download=download, models_dir=models_dir), dict[str, Source]()
    if vae is not None:
        vaes["vae"] = find_vae(vae, download=download, models_dir=models_dir)
    rest = parts_finder(parts, download=download, models_dir=models_dir)
    plan = read_plan(source, prediction_type, without=vaes, parts=rest)
    plan = with_autoencoders(plan, vaes)
    if not all(part.whole for part in plan.parts.values()):
        raise SafelightError(
            f"{plan.source.name} cannot be converted: the parts of {plan.family.title}'s text "
            "encoder and autoencoder that only images and video need are not read"
        )
    beside = _beside(plan)
    _check_place(path, plan, beside)
    for part in plan.weights:
        frame(plan, part)
    originals = _originals(plan) if single else {}
    for files in plan.all_files.values():
        digest_files(files)  # finds a damaged download
    stored = None if dtype is None else PRECISIONS[dtype]
    with _open(plan) as read:
        tensors = {
            part: {ours: _out(part, weight, read, stored) for ours, weight in weights.items()}
            for part, weights in plan.weights.items()
        }
        need = sum(out.bytes for outs in tensors.values() for out in outs.values())
        with written(path, need + 2**22, overwrite=overwrite, folder=not single) as new:
            if single:
                _write_file(new, plan, tensors, originals)
            else:
                _write_folder(new, plan, tensors, beside)
            told = _check_written(new, plan, path.name if single else None)
            if single and beside:
                lost = sorted({name.partition("/")[0] for name in beside})
                told.append(f"one file does not hold the model's {' and '.join(lost)}")
            return told


def _check_place(path: Path, plan: Plan, beside: Mapping[str, Path]) -> None:
    """Refuse to write over or into what is read."""
    here = path.resolve()
    tables = (beside, *plan.all_files.values())
    read = [file.resolve() for files in tables for file in files.values()]
    folders = [plan.folder, *(lender.folder for lender in plan.lenders)]
    inside = any(one is not None and one.root in (here, *here.parents) for one in folders)
    if inside or any(here in (file, *file.parents) for file in read):
        raise SafelightError(f"{str(path)[-100:]!r} is or holds what is read: give another --out")


# --- weights -------------------------------------------------------------------------------------


@contextmanager
def _open(plan: Plan) -> Iterator[Callable[[Weight], Tensor]]:
    """Yield a function that reads a weight; files are opened when they are first read."""
    with ExitStack() as stack:
        opened: dict[int, Read] = {}

        def read(weight: Weight) -> Tensor:
            if id(weight.header) not in opened:
                opened[id(weight.header)] = stack.enter_context(open_tensors(weight.header))
            return stored_tensor(opened[id(weight.header)], weight)

        yield read


def _out(part: str, weight: Weight, read: Callable[[Weight], Tensor], dtype: str | None) -> Out:
    """Return the tensor to write for a weight; it is checked when it is written."""
    decoded = weight.dtype in GGML or weight.scale is not None
    stored = dtype or ("F16" if decoded else weight.dtype)

    def checked() -> Tensor:
        tensor = read(weight)
        wide = tensor.float() if weight.dtype in SMALL else tensor
        if not is_finite(wide, torch.float32 if stored in SMALL else DTYPES[stored]):
            raise refusal(
                weight.header.name, f"{part} {weight.key} holds NaN or Inf as {stored.lower()}"
            )
        return tensor if tensor.dtype == DTYPES[stored] else wide.to(DTYPES[stored])

    return Out(stored, weight.shape, checked)


# --- one file ------------------------------------------------------------------------------------


def _originals(plan: Plan) -> dict[str, Original]:
    shapes = {
        part: {ours: weight.shape for ours, weight in weights.items()}
        for part, weights in plan.weights.items()
    }
    try:
        if all(plan.parts[part] is plan.family.parts[part] for part in plan.weights):
            return original_names(plan.family.sections(), shapes)
    except (KeyError, StopIteration):
        pass  # other shapes, or a family that has no such layout
    raise SafelightError(
        f"{plan.source.name} ({plan.family}) cannot be one file, which holds no configs: only "
        "published networks can; write a folder"
    )


def _write_file(path: Path, plan: Plan, parts: Parts, originals: Mapping[str, Original]) -> None:
    _check_identities(plan, parts)
    tensors = {key: _joined(original, parts) for key, original in originals.items()}
    for mark in plan.family.file_marks(plan.scheduler):
        tensors[mark] = Out("F32", (0,), lambda: torch.zeros(0))
    width, height = plan.native_size
    metadata = {"modelspec.resolution": f"{width}x{height}"}
    predicts = {"epsilon": "epsilon", "v_prediction": "v"}.get(plan.scheduler.prediction_type)
    if predicts is not None:
        metadata["modelspec.prediction_type"] = predicts
    write_tensors(path, tensors, metadata)


def _check_identities(plan: Plan, parts: Parts) -> None:
    """Refuse a model with a matrix that one file leaves out, unless that changes nothing."""
    for section in plan.family.sections().values():
        for name in section.identity if section.part in parts else ():
            matrix = parts[section.part][name].read().float()
            if not torch.equal(matrix, torch.eye(len(matrix))):
                raise SafelightError(
                    f"{plan.source.name} cannot be one file, which holds no {name} of its "
                    f"{section.part}: write a folder"
                )


def _joined(original: Original, parts: Parts) -> Out:
    """Return the tensor of a single file that holds one weight, or three on top of each other."""
    outs = [parts[original.part][name] for name in original.names]
    rows = sum(out.shape[0] for out in outs) if len(outs) > 1 else None
    shape = outs[0].shape if rows is None else (rows, *outs[0].shape[1:])
    shape = (*(shape[::-1] if original.transposed else shape), *(1,) * original.conv)

    # Those that are stored in several types become what holds them all.
    dtype = outs[0].dtype if len({out.dtype for out in outs}) == 1 else "F32"

    def read() -> Tensor:
        pieces = [out.read() for out in outs]
        if rows is None:
            tensor = pieces[0]
        else:
            tensor = torch.cat([piece.to(DTYPES[dtype]) for piece in pieces])
        if original.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return (tensor.t() if original.transposed else tensor).reshape(shape)

    return Out(dtype, shape, read)


# --- a folder ------------------------------------------------------------------------------------


def _write_folder(folder: Path, plan: Plan, parts: Parts, beside: Mapping[str, Path]) -> None:
    for name, outs in parts.items():
        part = plan.parts[name]
        config = {**_identity(part), **plan.raw[name]}
        sized = hasattr(plan.configs[name], "sample_size")
        if name == plan.family.network and plan.folder is None and sized:
            config["sample_size"] = plan.native_size[0] // plan.configs["vae"].factor
        _write_json(folder / name / "config.json", config)
        write_tensors(folder / name / f"{part.stem}.safetensors", outs)
    scheduler = dict(plan.raw["scheduler"])
    if not plan.scheduler.is_flow:
        scheduler["prediction_type"] = plan.scheduler.prediction_type
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_tokenizers(folder, plan)
    index = dict(plan.folder.index if plan.folder else plan.family.index(plan.configs))
    for name, part in plan.parts.items():
        index[name] = [_library(part), part.network]
    for name, classes in plan.family.tokenizers.items():
        if (folder / name).is_dir():
            index[name] = ["transformers", classes[0]]
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "DDIMScheduler")]
    index |= {name: NO_PART for name in _UNUSED if name in index}
    _write_json(folder / "model_index.json", index)
    if plan.folder is not None and (notes := plan.folder.json("safelight.json")) is not None:
        _write_json(folder / "safelight.json", notes)
    for name, source in beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)


def _beside(plan: Plan) -> dict[str, Path]:
    """Return the other files of a model's folder, by the names inside it.

    They are the credits, and the decoder of previews unless the model gets another autoencoder,
    whose latents it cannot decode.
    """
    notice = None if plan.folder is None else plan.folder.file("NOTICE")
    found = {} if notice is None else {"NOTICE": notice}
    if "vae" not in plan.additions and (previews := find_previews(plan.source)) is not None:
        own = with_autoencoders(plan, {PREVIEWS: previews}).additions[PREVIEWS]
        found |= {f"{PREVIEWS}/{name}": path for name, path in own.files.items()}
    return found


def _library(part: Part) -> str:
    return "transformers" if part.stem == "model" else "diffusers"


def _identity(part: Part) -> dict[str, Any]:
    """Return what a network's config.json has besides its settings."""
    if _library(part) == "diffusers":
        return {"_class_name": part.network}
    kind = _MODEL_TYPES.get(part.network, "clip_text_model")
    return {"architectures": [part.network], "model_type": kind}


def _write_tokenizers(folder: Path, plan: Plan) -> None:
    shipped = plan.family.load_tokenizers(None, plan.configs)
    for name in plan.family.tokenizers:
        home = plan.tokenizer_folder(name)
        if home is None:
            if name in shipped:
                shipped[name].save(folder / name)
            continue
        for file in _TOKENIZER:
            source = home.file(f"{name}/{file}")
            if source is not None:
                (folder / name).mkdir(exist_ok=True)
                shutil.copyfile(source, folder / name / file)
            elif file.endswith(".json") and (made := home.json(f"{name}/{file}")) is not None:
                _write_json(folder / name / file, made)  # from the metadata of a GGUF file


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- the check of the result ---------------------------------------------------------------------


def _check_written(path: Path, plan: Plan, name: str | None) -> list[str]:
    """Read what was written; raise SafelightError if it is another model, return what it lacks.

    name: that a single file will have; None for a folder.
    """
    again = read_plan(Source(plan.source.name, path), partial=True)
    layout, family = "a folder" if name is None else "one file", again.family
    named = {} if name is None else family.named_index(name)
    if named:
        family = family.variant(again.configs, named, again.raw["scheduler"])
    configs = plan.configs.items()
    # Of some families only a folder tells variants apart; what is lost of it is told below.
    elsewhere = plan.family.told_by_scheduler or plan.family.told_by_index
    kind = "title" if elsewhere else "name"
    for what, before, after in (
        ("family", getattr(plan.family, kind), getattr(again.family, kind)),
        ("prediction type", plan.scheduler.prediction_type, again.scheduler.prediction_type),
        ("size", plan.native_size, again.native_size),
        *((f"{part} config", _told(c), _told(again.configs[part])) for part, c in configs),
    ):
        if before != after:
            shown = f": {before} became {after}" if isinstance(before, str | tuple) else ""
            raise SafelightError(
                f"{plan.source.name} cannot be {layout}, which does not hold its {what}{shown}"
            )
    defaults = SchedulerConfig()
    lost = [
        key
        for key in sorted(plan.scheduler.given - again.scheduler.given)
        if getattr(plan.scheduler, key) != getattr(defaults, key) or key == "timestep_spacing"
    ]
    lost += [
        key
        for key in sorted(plan.scheduler.given & again.scheduler.given)
        if getattr(plan.scheduler, key) != getattr(again.scheduler, key)
    ]
    told = [f"{layout} does not hold the scheduler's {', '.join(lost)}"] if lost else []
    if plan.family.told_by_index and family is not plan.family:
        way = f"its name says {family}" if named else "a folder for --parts says it"
        told.append(f"{layout} does not say that it is {plan.family}: {way}")
    return told


def _told(config: Any) -> dict[str, Any]:
    """Return a config in a form to compare, without entries that no network computes with."""
    told = {k: v for k, v in asdict(config).items() if k not in _BOOKKEEPING}
    heads, levels = told.get("attention_head_dim"), len(told.get("block_out_channels", ()))
    if isinstance(heads, int):
        told["attention_head_dim"] = (heads,) * levels
    return told
