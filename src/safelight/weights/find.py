"""From the name that a user gives to files on this machine: built in, a path, or the hub."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.families import family_of_folder
from safelight.weights.check import printable, read_json
from safelight.weights.folder import Folder, choose_weights

BUILT_IN = ("embedded", "embedded-fast", "embedded-unconditional")
MODELS = Path(__file__).parent.parent / "models"
# "org/name", or "org/name@revision" with a branch, a tag or a commit.
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files are: a single file, or a folder in diffusers' layout.

    name: what it is called, as text that can be written anywhere. path: may hold any bytes.
    """

    name: str
    path: Path

    def __post_init__(self) -> None:
        # A name that is not UTF-8 comes as lone surrogates, which no recipe and no log can hold.
        object.__setattr__(self, "name", self.name.encode(errors="replace").decode())


def on_disk(name: str) -> Source | None:
    """Return the model of a path, None if there is no such file or folder."""
    try:
        path = Path(name).expanduser()
        if name and path.exists():
            return Source(path.resolve().stem if path.is_file() else path.resolve().name, path)
    except (OSError, RuntimeError, ValueError):
        pass  # too long, a NUL in it, no home: not a path
    return None


def find(name: str | Path, *, download: bool = True) -> Source:
    """Find a model by name.

    name: a built-in model ("embedded"), the path of a folder or of a single .safetensors file,
      or a hub id ("org/name", "org/name@revision"). A hub model is taken from the cache if it
      is complete there, and downloaded if not, unless HF_HUB_OFFLINE is set.
    download: False takes a hub model from the cache alone.

    Raises SafelightError, one line that says what is missing and how to get it.
    """
    name = str(name)
    if name in BUILT_IN:
        if not (MODELS / name).is_dir():
            raise SafelightError(
                f"the built-in model {name!r} is not part of this installation", code="no_model"
            )
        return Source(name, MODELS / name)
    here = on_disk(name)
    if here is not None:
        return here
    hub_id = _HUB_ID.fullmatch(name)
    # "models/sd15.safetensors" is a file that is not there, not a repository.
    if hub_id is None or name.endswith((".safetensors", ".ckpt")) or ".." in name:
        raise SafelightError(
            f"no model {printable(repr(name), 60)}: not built in ({', '.join(BUILT_IN)}), "
            'not a file or folder here, not a hub id ("org/name")',
            code="no_model",
        )
    return Source(name, _from_hub(hub_id[1], hub_id[2], download))


def notes_of(name: str | Path) -> dict[str, Any]:
    """Return the content of a model's safelight.json; empty if it has none or is not here."""
    try:
        path = find(name, download=False).path
        return (Folder(path, str(name)).json("safelight.json") or {}) if path.is_dir() else {}
    except SafelightError:
        return {}  # said when it is loaded


def _from_hub(repo: str, revision: str | None, download: bool) -> Path:
    # Takes a quarter of a second to import, and most models need no hub.
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    at = f" --revision {revision}" if revision else ""
    get = f'hf download {repo}{at} --include "*.json" "*/*.safetensors" "tokenizer/*"'
    try:
        index = hub.try_to_load_from_cache(repo, "model_index.json", revision=revision)
    except HFValidationError as e:
        raise SafelightError(printable(f"{repo} is not a hub id: {e}", 200)) from None
    if isinstance(index, str):
        folder = Path(index).parent
        if constants.HF_HUB_OFFLINE or not download or _complete(folder, repo):
            return folder
    if not download:
        raise _missing(repo, "is not in the hub cache", get)
    if constants.HF_HUB_OFFLINE:
        raise _missing(repo, "is not in the hub cache and HF_HUB_OFFLINE is set", get)
    try:
        info = hub.HfApi().model_info(repo, revision=revision)
        names = [f.rfilename for f in info.siblings or []]
        if "model_index.json" not in names:
            raise SafelightError(
                f"{repo}: no model_index.json; download its file and give its path"
            )
        path = hub.hf_hub_download(repo, "model_index.json", revision=revision)
        wanted = files_of(read_json(Path(path)), names, repo)
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except SafelightError:
        raise
    except Exception as e:  # the hub's client raises what its transport raises
        raise _missing(repo, _reason(e), get) from e


def files_of(index: Mapping[str, Any], names: Collection[str], where: str) -> list[str]:
    """Return the files, of all that a repository has, that a model is read from.

    Raises SafelightError that names what is missing.
    """
    family = family_of_folder(index, where)
    nested = {n.partition("/")[0] for n in names if "/" in n}
    files = {n for n in ("model_index.json", "safelight.json") if n in names}
    for part in (*family.parts, *family.tokenizers, "scheduler"):
        folder = f"{part}/" if part in nested or not family.flat else ""
        here = [n for n in names if n.startswith(folder) and "/" not in n.removeprefix(folder)]
        files |= {n for n in here if n.endswith(".json") and ".index." not in n}
        if part in family.tokenizers:
            files |= {n for n in here if n == f"{folder}merges.txt"}
        if part in family.parts:
            stem = family.parts[part].stem
            weights = choose_weights(part, here, where, stem)
            files.add(weights)
            if weights.endswith(".json"):
                fp16 = ".fp16" if weights.endswith(".fp16.json") else ""
                shard = re.compile(
                    re.escape(f"{folder}{stem}{fp16}") + r"-\d+-of-\d+(\.fp16)?\.safetensors"
                )
                files |= {n for n in here if shard.fullmatch(n)}
    return sorted(files)


def _complete(folder: Path, repo: str) -> bool:
    """Return whether a cached snapshot has all files of its model.

    A download that was cut short leaves a part of them.
    """
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    try:
        files_of(read_json(folder / "model_index.json"), names, repo)
    except SafelightError:
        return False
    return True


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "asks for its terms to be accepted on the hub, and a login (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the hub, or is private (hf auth login)"
    if isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError):
        return f"is not in the hub cache and could not be downloaded ({type(error).__name__})"
    return f"could not be downloaded ({type(error).__name__})"


def _missing(repo: str, why: str, get: str) -> SafelightError:
    # Longer than other errors may be: the command is of no use without its end.
    return SafelightError(printable(f"{repo} {why}; to get it: {get}", 500), code="no_model")


def cached() -> list[str]:
    """The models in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(
        repo.repo_id
        for repo in repos
        if repo.repo_type == "model"
        and any(f.file_name == "model_index.json" for r in repo.revisions for f in r.files)
    )
