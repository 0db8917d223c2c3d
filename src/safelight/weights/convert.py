"""Write a model that can be loaded in another layout: a folder of diffusers', or one file.

No network computes: weights go from file to file, by the names that a plan gives them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.weights.autoencoders import with_autoencoders
from safelight.weights.check import refusal
from safelight.weights.digest import digest_files
from safelight.weights.find import Source, find, find_vae
from safelight.weights.load import frame
from safelight.weights.names import Original, Weight, original_names
from safelight.weights.plan import Plan, read_plan
from safelight.weights.tensors import DTYPES, is_finite, open_tensors, taken
from safelight.weights.write import Out, write_tensors, written

PRECISIONS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SMALL = ("F8_E4M3", "F8_E5M2")
_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_NO_PART = [None, None]
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")

Parts = dict[str, dict[str, Out]]
"""What is written of each network, by our names."""


def convert(
    name: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    overwrite: bool = False,
    models_dir: str | Path | None = None,
    download: bool = True,
) -> list[str]:
    """Write a model as one file if `out` ends in ".safetensors", else as a folder.

    name, vae, prediction_type, models_dir, download: as for `load_model`.
    dtype: "float32", "float16" or "bfloat16"; without it each weight stays as it is stored, to
      the bit.

    Returns what a person should know about what was written. Raises SafelightError if the model
    cannot be loaded, if `out` is there and not to be overwritten, or if one file cannot hold it.
    """
    if dtype not in (None, *PRECISIONS):
        raise SafelightError(f"dtype {dtype!r:.40}; expected {', '.join(PRECISIONS)}")
    path = Path(out).expanduser()
    plan = read_plan(find(name, download=download, models_dir=models_dir), prediction_type)
    if vae is not None:
        found = find_vae(vae, download=download, models_dir=models_dir)
        plan = with_autoencoders(plan, {"vae": found})
    _check_place(path, plan)
    for part in plan.weights:
        frame(plan, part)
    single = path.suffix.lower() == ".safetensors"
    originals = _originals(plan) if single else {}
    digest_files(plan.files)  # finds a damaged download
    stored = None if dtype is None else PRECISIONS[dtype]
    with _open(plan) as read:
        parts = {
            part: {ours: _out(part, weight, read, stored) for ours, weight in weights.items()}
            for part, weights in plan.weights.items()
        }
        need = sum(out.bytes for outs in parts.values() for out in outs.values())
        with written(path, need + 2**22, overwrite=overwrite, folder=not single) as new:
            if single:
                _write_file(new, plan, parts, originals)
            else:
                _write_folder(new, plan, parts)
            return _check_written(new, plan)


def _check_place(path: Path, plan: Plan) -> None:
    """Refuse to write over or into what is read."""
    here = path.resolve()
    read = [file.resolve() for file in plan.files.values()]
    inside = plan.folder is not None and plan.folder.root in (here, *here.parents)
    if inside or any(here in (file, *file.parents) for file in read):
        raise SafelightError(f"{str(path)[-100:]!r} is or holds what is read: give another --out")


# --- weights -------------------------------------------------------------------------------------


@contextmanager
def _open(plan: Plan) -> Iterator[Callable[[Weight], Tensor]]:
    """Yield a function that reads a weight; files are opened when they are first read."""
    with ExitStack() as stack:
        opened: dict[int, Callable[[str], Tensor]] = {}

        def read(weight: Weight) -> Tensor:
            if id(weight.header) not in opened:
                opened[id(weight.header)] = stack.enter_context(open_tensors(weight.header))
            return taken(opened[id(weight.header)](weight.key), weight)

        yield read


def _out(part: str, weight: Weight, read: Callable[[Weight], Tensor], dtype: str | None) -> Out:
    """Return what is written of a weight, checked when its turn comes."""
    stored = weight.dtype if dtype is None else dtype

    def checked() -> Tensor:
        tensor = read(weight)
        wide = tensor.float() if weight.dtype in _SMALL else tensor
        if not is_finite(wide, torch.float32 if stored in _SMALL else DTYPES[stored]):
            raise refusal(
                weight.header.name, f"{part} {weight.key} holds NaN or Inf as {stored.lower()}"
            )
        return tensor if weight.dtype == stored else wide.to(DTYPES[stored])

    return Out(stored, weight.shape, checked)


# --- one file ------------------------------------------------------------------------------------


def _originals(plan: Plan) -> dict[str, Original]:
    sections = plan.family.sections()
    known = {section.part for section in sections.values()}
    if set(plan.weights) - known or any(p.network in _FOLDERS_ONLY for p in plan.parts.values()):
        raise SafelightError(
            f"{plan.source.name} has no layout of one file ({plan.family.title}, "
            f"{', '.join(p.network for p in plan.parts.values())}): write a folder"
        )
    shapes = {
        part: {ours: weight.shape for ours, weight in weights.items()}
        for part, weights in plan.weights.items()
    }
    try:
        return original_names(sections, shapes)
    except (KeyError, StopIteration) as error:
        raise SafelightError(
            f"{plan.source.name} has other shapes than one file can tell ({error}): write a folder"
        ) from None


_FOLDERS_ONLY = ("AutoencoderTiny",)


def _write_file(
    path: Path, plan: Plan, parts: Parts, originals: Mapping[str, Original]
) -> None:
    tensors = {key: _joined(original, parts) for key, original in originals.items()}
    for mark in plan.family.file_marks(plan.scheduler):
        tensors[mark] = Out("F32", (0,), lambda: torch.zeros(0))
    width, height = plan.native_size
    metadata = {"modelspec.resolution": f"{width}x{height}"}
    predicts = {"epsilon": "epsilon", "v_prediction": "v"}.get(plan.scheduler.prediction_type)
    if predicts is not None:
        metadata["modelspec.prediction_type"] = predicts
    write_tensors(path, tensors, metadata)


def _joined(original: Original, parts: Parts) -> Out:
    """Return the tensor of a single file that holds one weight, or three on top of each other."""
    outs = [parts[original.part][name] for name in original.names]
    rows = sum(out.shape[0] for out in outs) if len(outs) > 1 else None
    shape = outs[0].shape if rows is None else (rows, *outs[0].shape[1:])
    shape = (*(shape[::-1] if original.transposed else shape), *(1,) * original.conv)

    def read() -> Tensor:
        tensor = outs[0].read() if rows is None else torch.cat([out.read() for out in outs])
        return (tensor.t() if original.transposed else tensor).reshape(shape)

    return Out(outs[0].dtype, shape, read)


# --- a folder ------------------------------------------------------------------------------------


def _write_folder(folder: Path, plan: Plan, parts: Parts) -> None:
    for name, outs in parts.items():
        part = plan.parts[name]
        config = {**part.saved, **plan.raw[name]}
        _write_json(folder / name / "config.json", config)
        write_tensors(folder / name / f"{part.stem}.safetensors", outs)
    scheduler = {**plan.raw["scheduler"], "prediction_type": plan.scheduler.prediction_type}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_tokenizers(folder, plan)
    index: dict[str, Any] = {**plan.family.index(), **(plan.folder.index if plan.folder else {})}
    for name, part in plan.parts.items():
        index[name] = [part.library, part.network]
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "DDIMScheduler")]
    index |= {name: _NO_PART for name in _UNUSED if name in index}
    _write_json(folder / "model_index.json", index)
    if plan.folder is not None and (notes := plan.folder.json("safelight.json")) is not None:
        _write_json(folder / "safelight.json", notes)


def _write_tokenizers(folder: Path, plan: Plan) -> None:
    if plan.folder is None:
        for name, tokenizer in plan.family.load_tokenizers(None, plan.configs).items():
            tokenizer.save(folder / name)
        return
    for name in plan.family.tokenizers:
        for file in _TOKENIZER:
            source = plan.folder.file(f"{name}/{file}")
            if source is not None:
                (folder / name).mkdir(exist_ok=True)
                shutil.copyfile(source, folder / name / file)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- what became of it ---------------------------------------------------------------------------


def _check_written(path: Path, plan: Plan) -> list[str]:
    """Read what was written, and refuse it if it is another model; return what it does not say."""
    again = read_plan(Source(plan.source.name, path))
    for what, before, after in (
        ("family", plan.family.name, again.family.name),
        ("prediction type", plan.scheduler.prediction_type, again.scheduler.prediction_type),
        ("size", plan.native_size, again.native_size),
        *((f"{part} config", c, again.configs[part]) for part, c in plan.configs.items()),
    ):
        if before != after:
            shown = f": {before} became {after}" if isinstance(before, str | tuple) else ""
            raise SafelightError(
                f"{plan.source.name} cannot be one file, which does not hold its {what}{shown}; "
                "write a folder"
            )
    lost = [
        key
        for key, value in plan.scheduler.to_dict().items()
        if value != getattr(again.scheduler, key, value)
    ]
    return [f"one file does not hold the scheduler's {', '.join(lost)}"] if lost else []


