"""Load a model by name, ready to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.controls import CONTROLNETS
from safelight.errors import SafelightError
from safelight.fast import (
    accelerate,
    helps,
    keep_codes,
    layers,
    memory,
    native_bfloat16,
    remark,
    runs_once,
)
from safelight.fast.quantised import GGML, Quantised, of_floats
from safelight.fast.store import in_file
from safelight.machine import has_bfloat16, pick_device
from safelight.model import Model
from safelight.paths import expanded
from safelight.prompt.styles import read_styles
from safelight.prompt.tokenizer import Tokenizer
from safelight.weights.autoencoders import with_autoencoders
from safelight.weights.budget import TOLD_FROM, check_memory, coded
from safelight.weights.check import Header, refusal
from safelight.weights.controlnets import with_controlnets
from safelight.weights.digest import FileDigest, HashedFile, digest_files, model_digest
from safelight.weights.find import (
    Given,
    Source,
    find,
    find_previews,
    find_vae,
    parts_finder,
)
from safelight.weights.finite import FiniteCheck
from safelight.weights.frames import frame
from safelight.weights.ip_adapters import with_image_prompts
from safelight.weights.library import open_library
from safelight.weights.names import Weight
from safelight.weights.plan import Plan, read_plan
from safelight.weights.refiners import beside_of, read_refiner
from safelight.weights.stored import SMALL, Stored, stored_weight
from safelight.weights.tensors import is_finite, open_tensors

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_COMPUTE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    name: str | Path | Source = "embedded",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    prediction_type: str | None = None,
    low_memory: bool = False,
    plain: bool = False,
    download: bool = True,
    wildcards_dir: str | Path | None = None,
    styles_file: str | Path | None = None,
    models_dir: str | Path | None = None,
    parts: Given | Sequence[Given] | None = None,
    vae: str | Path | None = None,
    preview_vae: str | Path | None = None,
    refiner: str | Path | None = None,
    controlnet: str | Path | Sequence[str | Path] | None = None,
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    takes_paths: bool = True,
    on_plan: Callable[[str], object] | None = None,
) -> Model:
    """Load a model by name (see `find`); without one, the model that ships.

    device: "auto" (CUDA, else MPS, else the CPU) or the name of one.
    dtype: "float32", "float16", "bfloat16", or "auto": float16 on a GPU, or bfloat16 if it has that
      and the model is one of flow matching; on the CPU bfloat16 if it multiplies that natively,
      else float32. Weights that are stored in it stay in the mapped file until they are first
      used; others are converted one by one.
    prediction_type: "epsilon", "v_prediction" or "sample", in place of what the checkpoint says.
    low_memory: on the CPU, keep large weights in a file between their uses: the same pictures, a
      little slower.
    plain: without the fast layers, which cannot be trained.
    download: False takes a hub model from the cache alone.
    wildcards_dir: a folder of text files, whose lines `__name__` in a prompt is drawn from.
    styles_file: a styles.csv, as web UIs keep it: words that `styles` puts around prompts.
    models_dir: the folder in which models, LoRAs, embeddings, autoencoders, text encoders,
      ControlNets, IP-Adapters and their image encoders are found by name (see
      `safelight.weights.library`), in place of that of SAFELIGHT_MODELS.
    parts: the folders and files that give a single file its missing parts (text encoders,
      tokenizers, the autoencoder): a model's folder or its hub id, a file of text encoders, an
      autoencoder's file, a tokenizer.json or a folder with one. Of several, each is asked for what
      is still missing.
    vae: an autoencoder in place of the model's own: a folder, a file, a name in the models
      folder or a hub id.
    preview_vae: the same, a tiny one, for previews alone, in place of the one that lies in the
      model's folder as preview_vae/.
    refiner: a model that takes over for the last steps, as SDXL's refiner does.
    controlnet: a network through which a request's `control_image` guides the model: a folder, a
      file, a name in the models folder or a hub id; or a list of several, each with a picture.
    ip_adapter: a network through which a request's `ip_adapter_image` is a prompt: a file, a name
      in the models folder, or the place of a file in a repository, "org/name/models/file".
    image_encoder: the network that it reads pictures with: a folder, a file, a name in the models
      folder or a hub id. None: looked for beside it.
    takes_paths: whether requests may name a LoRA or an embedding by its path. A server takes names
      alone.
    on_plan: called with a line about the memory that a large model takes, before it is loaded.

    Raises SafelightError, one line, if the model is not found or not usable: a missing,
    left-over or misshapen weight is named, and so is one that is not finite.
    """
    if wildcards_dir is not None and not expanded(wildcards_dir).is_dir():
        raise SafelightError(f"there is no folder of wildcards {str(wildcards_dir)[-100:]!r}")
    styles = {} if styles_file is None else read_styles(styles_file)
    where = pick_device(device)
    pick_dtype(dtype, where)  # refused before a download
    source = find(name, download=download, models_dir=models_dir)
    given = {"vae": vae, "preview_vae": preview_vae}
    vaes = {
        use: find_vae(name, download=download, models_dir=models_dir)
        for use, name in given.items()
        if name is not None
    }
    if preview_vae is None and (own := find_previews(source)) is not None:
        vaes["preview_vae"] = own
    rest = parts_finder(parts, download=download, models_dir=models_dir)
    plan = with_autoencoders(read_plan(source, prediction_type, without=vaes, parts=rest), vaes)
    plan = with_controlnets(plan, controlnet, models_dir, download=download)
    plan = with_image_prompts(plan, ip_adapter, image_encoder, models_dir, download=download)
    precision = pick_dtype(dtype, where, plan.family.half)
    # Headers and configs are checked first, because hashing or reading a large file takes long.
    nets = {part: frame(plan, part) for part in plan.weights}
    fast = helps(where, precision) and not plain
    dtypes = {part: plan.family.dtype_of(part, plan.configs[part], precision) for part in nets}
    codes = coded(plan, nets) if where.type == "cpu" else {}
    beside, needs = None, None
    if refiner is not None:
        other = read_refiner(refiner, plan, download=download, models_dir=models_dir)
        beside = beside_of(other, precision) if where.type == "cpu" else None
    if where.type == "cpu":
        needs = check_memory(plan, dtypes, fast=fast, low=low_memory, codes=codes, beside=beside)
        if on_plan is not None and needs.needed > TOLD_FROM:
            on_plan(str(needs))
        kept = nets if needs.codes else [part for part, net in nets.items() if runs_once(net)]
        codes = {part: codes[part] for part in kept} if fast else {}
    tokenizers = {
        name: one.with_words(plan.words) if isinstance(one, Tokenizer) else one
        for name, one in plan.load_tokenizers().items()
    }
    digests, files = _filled(plan, nets, dtypes, where, mapped=fast, codes=codes, filed=low_memory)
    for part, net in nets.items() if fast else ():
        accelerate(net, dtypes[part], low_memory)
    warnings = list(plan.warnings)
    if slow := remark(where, precision):
        warnings.append(slow)
    if low_memory and not fast:
        warnings.append(f"low_memory does nothing on {where.type} in {str(precision)[6:]}")
    second = None
    if refiner is not None:
        second = load_model(
            refiner,
            device=where,
            dtype=precision,
            low_memory=low_memory,
            plain=plain,
            download=download,
            models_dir=models_dir,
            takes_paths=takes_paths,
        )
    return Model(
        name=plan.source.name,
        path=str(plan.source.path),
        sha256=model_digest(digests[""]),
        family=plan.family,
        parts={**tokenizers, **nets},
        scheduler=plan.scheduler,
        words=plan.words,
        notes=plan.notes,
        native_size=plan.native_size,
        device=where,
        dtype=precision,
        warnings=warnings,
        wildcards_dir=None if wildcards_dir is None else expanded(wildcards_dir),
        styles=styles,
        library=open_library(models_dir),
        prediction_type=prediction_type,
        refiner=second,
        takes_paths=takes_paths,
        other_parts=_records(plan, plan.lender_uses, digests),
        other_vae=_record(plan, "vae", digests),
        control=_records(plan, CONTROLNETS, digests),
        image_prompts={
            use: found
            for use in ("ip_adapter", "image_encoder")
            if (found := _record(plan, use, digests)) is not None
        },
        stored=Stored(plan.weights, files),
        weights_held=None if needs is None else needs.weights,
    )


def _record(
    plan: Plan, use: str, digests: Mapping[str, dict[str, FileDigest]]
) -> dict[str, str] | None:
    """Return name and digest of what is not the model's own; None if there is none."""
    if use not in digests:
        return None
    return {"name": plan.source_of(use).name, "sha256": model_digest(digests[use])}


def _records(
    plan: Plan, uses: Iterable[str], digests: Mapping[str, dict[str, FileDigest]]
) -> dict[str, str] | list[dict[str, str]] | None:
    """Return name and digest of what is there for some uses; a list if that are several."""
    found = [record for use in uses if (record := _record(plan, use, digests))]
    if len(found) > 1:
        return found
    return found[0] if found else None


def pick_dtype(name: str | torch.dtype, device: torch.device, half: str = "float16") -> torch.dtype:
    """Return the dtype of this name. Raises SafelightError if no network computes in it.

    half: what "auto" is on a GPU that has it; see `Family.half`.
    """
    if name == "auto":
        if device.type != "cpu":
            return _COMPUTE[half] if half == "float16" or has_bfloat16(device) else torch.float16
        return torch.bfloat16 if native_bfloat16() else torch.float32
    found = _COMPUTE.get(str(name).removeprefix("torch."))
    if found is None:
        raise SafelightError(f"dtype {str(name)!r:.40}; expected auto, {', '.join(_COMPUTE)}")
    return found


def _filled(
    plan: Plan,
    nets: Mapping[str, nn.Module],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    mapped: bool,
    codes: Mapping[str, Set[str]],
    filed: bool,
) -> tuple[dict[str, dict[str, FileDigest]], dict[Path, HashedFile]]:
    """Give the networks their weights; return the digests of the files, and the files by path.

    The digests are those of `Plan.all_files`. No weight of a damaged download is used, because all
    files are hashed first. codes: names of the weights that stay as codes, by network.
    filed: large ones that are decoded go to a file, as others that are mapped are in theirs.
    """
    checks = _finite_checks(plan, dtypes)
    looks = {path: check.check_piece for path, check in checks.items()}
    digests = {use: digest_files(found, looks) for use, found in plan.all_files.items()}
    by_path = {digest.path: digest for each in digests.values() for digest in each.values()}
    files = {path: HashedFile(digest) for path, digest in by_path.items()}
    for path, check in checks.items():
        check.finish(path, by_path[path].stamp)
    for part, net in nets.items():
        names = codes.get(part, set())
        _fill(net, plan.weights[part], files, checks, device, dtypes[part], mapped, names, filed)
    for path, check in checks.items():
        check.keep(path, by_path[path].stamp)
    return digests, files


def _finite_checks(plan: Plan, dtypes: Mapping[str, torch.dtype]) -> dict[Path, FiniteCheck]:
    """Return the check of each file's weights, by its path. dtypes: of each network."""
    wanted: dict[int, dict[str, torch.dtype]] = {}
    headers: dict[int, Header] = {}
    for part, weights in plan.weights.items():
        for weight in weights.values():
            headers[id(weight.header)] = weight.header
            wanted.setdefault(id(weight.header), {})[weight.key] = dtypes[part]
    return {h.path: FiniteCheck(h, wanted[key]) for key, h in headers.items()}


def _fill(
    network: nn.Module,
    weights: Mapping[str, Weight],
    files: Mapping[Path, HashedFile],
    checks: Mapping[Path, FiniteCheck],
    device: torch.device,
    dtype: torch.dtype,
    mapped: bool,
    codes: Set[str],
    filed: bool,
) -> None:
    """Give a network its weights.

    files, checks: by path. mapped: weights stay in the file, in their stored precision, until they
    are used; before and after each use the file is checked to hold what was hashed. codes: names
    of those that are decoded at each use; others are decoded now. filed: see `_filled`.
    """
    state: dict[str, Tensor | Quantised] = {}
    own: list[HashedFile] = []
    for header in {id(w.header): w.header for w in weights.values()}.values():
        here = {name: w for name, w in weights.items() if w.header is header}
        file, finite = files[header.path], checks[header.path].finite_keys
        state |= _read(header, here, file.openable, device, dtype, mapped, codes, finite, filed)
        file.check()
        own.append(file)
    keep_codes(network, {name: one for name, one in state.items() if isinstance(one, Quantised)})
    tensors = {name: one for name, one in state.items() if isinstance(one, Tensor)}
    network.load_state_dict(tensors, strict=True, assign=True)
    network.eval().requires_grad_(False)
    # Weights that were converted are not in the file any more.
    if not mapped and all(w.dtype != _STORED[dtype] for w in weights.values()):
        return
    # Children as well: the autoencoder's parts are called by themselves.
    for module in (network, *network.children()):
        for file in own:
            module.register_forward_pre_hook(file.check)
            module.register_forward_hook(file.check)


def _read(
    header: Header,
    weights: Mapping[str, Weight],
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    keep: bool,
    codes: Set[str] = frozenset(),
    finite: Set[str] = frozenset(),
    filed: bool = False,
) -> dict[str, Tensor | Quantised]:
    """Return weights by our names.

    path: where the file is opened. keep: leave them in the mapped file, in their stored precision.
    codes: names of those that are not decoded. finite: keys whose numbers are known to be finite.
    filed: see `_filled`.
    """
    state: dict[str, Tensor | Quantised] = {}
    with open_tensors(header, path) as read:
        for name, weight in weights.items():
            tensor = stored_weight(read, weight)
            if isinstance(tensor, Tensor) and weight.dtype in SMALL:
                tensor = of_floats(tensor)  # torch does not compute in 8 bits
            if isinstance(tensor, Quantised) or weight.dtype in GGML:
                if weight.key not in finite and not is_finite(tensor, dtype):
                    raise refusal(header.name, f"{weight.key} holds NaN or Inf as {dtype}")
                if isinstance(tensor, Quantised) and name in codes:
                    memory.page_out(tensor.codes)
                    state[name] = tensor
                else:
                    decoded = tensor.to(dtype).to(device)
                    large = keep and filed and decoded.numel() >= layers.LARGE
                    state[name] = in_file(decoded, "low_memory") if large else decoded
                continue
            if tensor.data_ptr() % tensor.element_size():
                tensor = tensor.clone()  # a file need not align it, but our kernels need it aligned
            if not keep:
                tensor = tensor.to(device, dtype)
            if weight.key not in finite:
                if not is_finite(tensor, dtype):
                    raise refusal(header.name, f"{weight.key} holds NaN or Inf as {dtype}")
                if keep:
                    memory.page_out(tensor)
            state[name] = tensor
    return state
