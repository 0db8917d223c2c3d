"""Write a model that can be loaded in another layout: a folder of diffusers', or one file.

Nothing is built: weights go from file to file, by the names that a plan gives them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.families import Family
from safelight.weights.autoencoders import with_autoencoders
from safelight.weights.check import Header, refusal
from safelight.weights.digest import digest_files
from safelight.weights.find import Source, find, find_vae
from safelight.weights.names import Weight
from safelight.weights.plan import Plan, read_plan
from safelight.weights.tensors import DTYPES, open_tensors
from safelight.weights.write import Out, write_tensors, written

PRECISIONS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


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
) -> Path:
    """Write a model as one file if `out` ends in ".safetensors", else as a folder.

    name, vae, prediction_type, models_dir, download: as for `load_model`.
    dtype: "float32", "float16" or "bfloat16"; without it each weight stays as it is stored, to
      the bit.

    Raises SafelightError if the model cannot be loaded, if `out` is there and not to be
    overwritten, or if one file cannot say what the model is.
    """
    if dtype not in (None, *PRECISIONS):
        raise SafelightError(f"dtype {dtype!r:.40}; expected {', '.join(PRECISIONS)}")
    path = Path(out).expanduser()
    plan = read_plan(find(name, download=download, models_dir=models_dir), prediction_type)
    if vae is not None:
        found = find_vae(vae, download=download, models_dir=models_dir)
        plan = with_autoencoders(plan, {"vae": found})
    _check_place(path, plan)
    single = path.suffix.lower() == ".safetensors"
    names = original_names(plan.family, plan.weights, path.name) if single else {}
    stored = None if dtype is None else PRECISIONS[dtype]
    digest_files(plan.files)  # finds a damaged download
    with ExitStack() as stack, _reader(plan, stack) as read:
        parts = {
            part: {ours: _out(weight, read, stored) for ours, weight in weights.items()}
            for part, weights in plan.weights.items()
        }
        need = sum(out.bytes for outs in parts.values() for out in outs.values())
        with written(path, need + 2**22, overwrite=overwrite, folder=not single) as new:
            if single:
                _write_file(new, plan, _joined(parts, names))
            else:
                _write_folder(new, plan, parts)
            _check_written(Source(plan.source.name, new), plan, path.name)
    return path


def _check_place(path: Path, plan: Plan) -> None:
    """Refuse to write into what is read."""
    here = path.resolve()
    for file in plan.files.values():
        if here == file.resolve() or here in file.resolve().parents:
            raise SafelightError(f"{str(path)[-100:]!r} is what is read: give another --out")
    if plan.folder is not None and plan.folder.root in (here, *here.parents):
        raise SafelightError(f"{str(path)[-100:]!r} lies in what is read: give another --out")
