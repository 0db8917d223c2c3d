"""Models on the hub: taken from its cache, or downloaded."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.families import family_of_folder
from safelight.families.part import tokenizer_of
from safelight.weights.check import printable, read_json, refusal
from safelight.weights.digest import digest_file
from safelight.weights.folder import DIFFUSION, INDEX_LIMIT, choose_weights, shards_of
from safelight.weights.hub_names import HubName
from safelight.weights.library import ENDINGS

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo

    from safelight.families import Family


def files_of(
    index: Mapping[str, Any],
    names: Collection[str],
    where: str,
    *,
    lacking: Collection[str] | None = None,
) -> list[str]:
    """Return which of a repository's files a model is read from.

    lacking: the networks and tokenizers that a single file lacks; only what it takes from a folder
    is listed then. None: all.

    Raises SafelightError that names what is missing.
    """
    family = family_of_folder(index, where)
    if lacking is None:
        files = {n for n in ("model_index.json", "safelight.json") if n in names}
        wanted = [*family.parts, *family.tokenizers, "scheduler"]
    else:
        files = {"model_index.json"}
        wanted = lent(family, index, lacking)
        if family.told_by_scheduler:
            wanted.append("scheduler")
    for part in wanted:
        if family.lacks(index, part):
            continue
        folder = _place(family, part, names, where)
        here = [n for n in names if _lies_in(folder, n)]
        files |= {n for n in here if n.endswith(".json") and ".index." not in n}
        if part in family.tokenizers:
            files |= {n for n in here if n == f"{folder}merges.txt"}
        if part in family.parts:
            stem = family.parts[part].stem
            if family.flat:  # the weights may lie elsewhere than the config, as when read
                here = [n for n in names if _lies_in(f"{part}/", n) or _lies_in("", n)]
            files |= _with_shards(choose_weights(part, here, where, stem), here)
    return sorted(files)


def _place(family: Family, part: str, names: Collection[str], where: str) -> str:
    """Return the folder of a part's configs, such as "unet/"; "" for the root.

    Raises SafelightError that names a missing file.
    """
    forms = _needed(family, part)
    for folder in [f"{part}/", ""] if family.flat else [f"{part}/"]:
        if any(all(f"{folder}{n}" in names for n in form) for form in forms):
            return folder
    nested = any(n.startswith(f"{part}/") for n in names)
    folder = f"{part}/" if nested or not family.flat else ""
    # Of a form that is there in part, the file that is not there is named.
    form = next((f for f in forms if any(f"{folder}{n}" in names for n in f)), forms[0])
    missing = next(n for n in form if f"{folder}{n}" not in names)
    raise refusal(where, f"{folder}{missing} is missing")


def _lies_in(folder: str, name: str) -> bool:
    """Return whether a file lies in a folder itself; "": in the root."""
    return name.startswith(folder) and "/" not in name.removeprefix(folder)


def lent(family: Family, index: Mapping[str, Any], lacking: Collection[str]) -> list[str]:
    """Return the networks and tokenizers that a single file takes from a model's folder.

    index: the folder's model_index.json. lacking: what the file lacks. A text encoder comes with
    its tokenizer, though CLIP's vocabulary ships with us: the folder may have another.
    """
    beside = {name for name in lacking if name in family.parts}
    beside = {tokenizer_of(name) for name in beside}
    wanted = {*lacking, *(beside & family.tokenizers.keys())}
    names = (*family.parts, *family.tokenizers)
    return [name for name in names if name in wanted and not family.lacks(index, name)]


def _with_shards(weights: str, names: Collection[str]) -> set[str]:
    """Return a file of weights and, if it is an index, those of `names` that are its shards."""
    if ".index." not in weights:
        return {weights}
    return {weights, *filter(_shards_of_index(weights).fullmatch, names)}


def _shards_of_index(index: str) -> re.Pattern[str]:
    """Return what the shards are called that an index lists, by its name.

    "x.safetensors.index.fp16.json" lists "x.fp16-00001-of-00002.safetensors" where diffusers wrote
    it, and "x-00001-of-00002.fp16.safetensors" where transformers did.
    """
    stem, _, end = index.partition(".safetensors.index")
    variant, number = re.escape(end.removesuffix(".json")), r"-\d+-of-\d+"
    names = f"({variant}{number}|{number}{variant})"
    return re.compile(re.escape(stem) + names + r"\.safetensors")


def _needed(family: Family, part: str) -> list[tuple[str, ...]]:
    """Return the files besides weights without which a part cannot be read: any of the sets."""
    if part == "scheduler":
        return [("scheduler_config.json",)]
    if part in family.parts:
        return [("config.json",)]
    # Those of Qwen-Image on the hub are in the older files alone, as most of CLIP's are.
    older = any(name in family.tokenizers[part] for name in ("CLIPTokenizer", "Qwen2Tokenizer"))
    return [("tokenizer.json",), *([("vocab.json", "merges.txt")] if older else [])]


def _network_files(
    part: str, stem: str = DIFFUSION
) -> Callable[[Mapping[str, Any], Collection[str], str], list[str]]:
    """Return what tells which of a repository's files one network is read from."""

    def files(index: Mapping[str, Any], names: Collection[str], where: str) -> list[str]:
        weights = choose_weights(part, names, where, stem)
        return sorted({"config.json", *_with_shards(weights, names)})

    return files


@dataclass(frozen=True, slots=True)
class Layout:
    """What a repository has to hold.

    index: the file that says what it is. files: returns the files to read; it is given the index's
    content, the names of all files, and what to call the repository in errors. options: of the
    command that downloads them.
    """

    index: str
    files: Callable[[Mapping[str, Any], Collection[str], str], list[str]]
    options: str = ""


MODEL = Layout("model_index.json", files_of)
VAE = Layout("config.json", _network_files("vae"))
CONTROLNET = Layout("config.json", _network_files("controlnet"))
IMAGE_ENCODER = Layout("config.json", _network_files("image_encoder", "model"))


def _files_of_one(index: Mapping[str, Any], names: Collection[str], where: str) -> list[str]:
    """Return which of a repository's files a network is read from, whose config tells its kind."""
    encodes = index.get("model_type") in ("clip", "clip_vision_model")
    return (IMAGE_ENCODER if encodes else VAE).files(index, names, where)


NETWORK = Layout("config.json", _files_of_one)
"""Of an autoencoder, a ControlNet or an image encoder."""


def parts_for(file: Path, lacking: Collection[str], given: Sequence[str] = ()) -> Layout:
    """Return the layout of a repository that lends a single file what it lacks.

    given: what else lends it something, and is asked first.
    """
    files = partial(files_of, lacking=lacking)
    options = f" --parts-for {shlex.quote(str(file))}"
    options += "".join(f" --parts {shlex.quote(name)}" for name in given)
    return Layout(MODEL.index, files, options)


def from_hub(name: HubName, *, download: bool = True, layout: Layout = MODEL) -> Path:
    """Return the folder of a repository in the hub's cache, or the path of one file of it.

    layout: what a repository has to hold. What is not complete there is downloaded, unless
    HF_HUB_OFFLINE is set or download is False. Raises SafelightError that says what is missing and
    how to get it.
    """
    # Takes a quarter of a second to import, and most models need no hub.
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    get, wanted = _command(name, layout), name.file or layout.index
    try:
        found = hub.try_to_load_from_cache(name.repo, wanted, revision=name.revision)
    except HFValidationError as e:
        raise SafelightError(printable(f"{name.repo} is not a hub id: {e}", 200)) from None
    if isinstance(found, str):
        path = Path(found)
        if name.file is not None:
            return path
        if constants.HF_HUB_OFFLINE or not download or _complete(path.parent, name.repo, layout):
            return path.parent
    if not download:
        raise _missing(name, "is not in the hub cache", get)
    if constants.HF_HUB_OFFLINE:
        raise _missing(name, "is not in the hub cache and HF_HUB_OFFLINE is set", get)
    return _fetch(name, (layout,), get)


def download(name: HubName, tell: Callable[[str], None], layout: Layout | None = None) -> Path:
    """Download a model, one network or one file into the hub's cache, and check it.

    Returns the folder, or the path of the file. What is there already stays, and a download that
    was cut short goes on. tell: called with a line about the sizes before it begins. layout: what
    is read of a repository; by default it may be a whole model, or one network of the kinds of
    NETWORK.

    Raises SafelightError if it cannot be downloaded, or if a file is not what the hub says it is.
    """
    layouts = (MODEL, NETWORK) if layout is None else (layout,)
    got = _fetch(name, layouts, "", tell)
    for path in [got] if name.file is not None else sorted(got.rglob("*")):
        if path.is_file():
            digest_file(path)
    return got


def _command(name: HubName, layout: Layout) -> str:
    """Return the command that downloads a file, or what is read of a repository."""
    options = layout.options if name.file is None else ""
    return f"safelight download {shlex.quote(str(name))}{options}"


def _fetch(
    name: HubName,
    layouts: Sequence[Layout],
    get: str,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Download a file, or the files of a repository that a model is read from, of one commit.

    layouts: what a repository may be; the first whose index it has is taken.
    """
    import huggingface_hub as hub

    repo, revision = name.repo, name.revision
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=tell is not None)
        sizes = {f.rfilename: f.size or 0 for f in info.siblings or []}
        if name.file is not None:
            if name.file not in sizes:
                raise _missing(name, f"is not in that repository{_others(name, sizes)}", get)
            if tell is not None:
                tell(f"{name}: {_size(sizes, [name.file])}")
            return Path(hub.hf_hub_download(repo, name.file, revision=revision))
        layout = next((each for each in layouts if each.index in sizes), None)
        if layout is None:
            raise SafelightError(f"{repo}: no {layouts[0].index}{_others(name, sizes)}")
        index = hub.hf_hub_download(repo, layout.index, revision=revision)
        files = layout.files(read_json(Path(index)), list(sizes), repo)
        if tell is not None:
            here = Path(index).parent
            left = [name for name in files if not (here / name).is_file()]
            tell(
                f"{repo}: {len(files)} files, {_size(sizes, files)}; "
                f"{_size(sizes, left)} of it to download"
            )
        return Path(hub.snapshot_download(repo, revision=info.sha, allow_patterns=files))
    except SafelightError:
        raise
    except Exception as e:  # the hub's client raises what its transport raises
        raise _missing(name, _reason(e), get) from e


def _others(name: HubName, names: Collection[str]) -> str:
    """Return some files of weights in a repository, to end an error: "; its files are …"."""
    files = [f"{replace(name, file=n)}" for n in sorted(names) if n.lower().endswith(ENDINGS)]
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"; its files are {', '.join(files[:3])}{more}" if files else ", and no weights"


def _size(sizes: Mapping[str, int], names: Collection[str]) -> str:
    return f"{sum(sizes[name] for name in names) / 1e9:.2f} GB"


def _complete(folder: Path, repo: str, layout: Layout) -> bool:
    """Return whether a cached snapshot has all files of its model.

    A download that was cut short leaves a part of them.
    """
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    try:
        files = layout.files(read_json(folder / layout.index), names, repo)
        return all(
            (folder / name).with_name(shard).is_file()
            for name in files
            if name.endswith(".json") and ".index." in name
            for shard in shards_of(read_json(folder / name, INDEX_LIMIT), name).values()
        )
    except SafelightError:
        return False


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "is not downloaded while HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, errors.GatedRepoError):
        return "asks for its terms to be accepted on the hub, and a login (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the hub, or is private (hf auth login)"
    # The client's transport is httpx or httpx2, by its version.
    transport = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
    if transport and not isinstance(error, errors.HfHubHTTPError):
        return (
            f"is not in the hub cache, and the hub could not be reached ({type(error).__name__}): "
            "is there a network, or a proxy (HTTPS_PROXY)?"
        )
    return f"could not be downloaded ({type(error).__name__})"


def _missing(name: HubName, why: str, get: str) -> SafelightError:
    """Return an error about what is not there; `get` is the command that gets it, "" for none."""
    shown = name if name.file is not None else name.repo
    told = f"{shown} {why}"
    if get:  # longer than other errors may be: the command is of no use without its end
        told += f"{'' if told.endswith('?') else ';'} to get it: {get}"
    return SafelightError(printable(told, 700), code="no_model")


def cached_files() -> list[tuple[str, Path]]:
    """Return the files of weights in the hub's cache that are in no model's folder: name, path."""
    return [
        (str(HubName(repo.repo_id, None, file)), revision.snapshot_path / file)
        for repo, revision in _cached()
        if not _has_index(revision)
        for file in sorted(_names(revision))
        if file.lower().endswith(ENDINGS)
    ]


def cached_folders() -> list[tuple[str, Path]]:
    """Return the models in the hub's cache: the name, and the folder of the newest revision."""
    return [
        (repo.repo_id, revision.snapshot_path)
        for repo, revision in _cached()
        if _has_index(revision)
    ]


def _cached() -> Iterator[tuple[CachedRepoInfo, CachedRevisionInfo]]:
    """Yield the repositories of models in the hub's cache, by name, each with one revision.

    It is the newest one that has a model's index, if there is any.
    """
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, RuntimeError):  # the latter where there is no home directory
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model" and repo.revisions:
            yield repo, max(repo.revisions, key=lambda r: (_has_index(r), r.last_modified))


def _has_index(revision: CachedRevisionInfo) -> bool:
    return any(file.file_name == MODEL.index for file in revision.files)


def _names(revision: CachedRevisionInfo) -> list[str]:
    """Return the places of a revision's files in its repository."""
    paths = (file.file_path for file in revision.files)
    return [path.relative_to(revision.snapshot_path).as_posix() for path in paths]
