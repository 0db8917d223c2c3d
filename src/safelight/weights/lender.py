"""What lends a single file the networks and tokenizers that it lacks, before any weight is read.

It is a model's folder, a file of text encoders, an autoencoder's file, or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.families import Family, family_of_folder
from safelight.families.part import encoder_of, tokenizer_of
from safelight.weights.check import Header, printable, refusal
from safelight.weights.encoder_files import kinds_of, place_encoders, read_encoders
from safelight.weights.find import PartsFinder, Source
from safelight.weights.folder import Folder
from safelight.weights.headers import header_of
from safelight.weights.hub import lent
from safelight.weights.kinds import kind_of
from safelight.weights.library import is_tokenizer_folder
from safelight.weights.networks import Networks, check_weights, networks_of, read_config
from safelight.weights.tokenizers import (
    FolderHome,
    Home,
    check_tokenizer,
    gguf_home,
    installed_for,
    of_class,
)
from safelight.weights.vae_file import check_latents, read_vae_file


@dataclass(frozen=True, slots=True)
class Lender:
    """A folder or file that lends a single file what it lacks.

    networks: those that it lends. homes: the tokenizers that it lends, by their names. own: the
    files that its networks are in, where it is no folder. folder: a model's. scheduler: the config
    of that folder's scheduler, None if it tells nothing about the file.
    """

    source: Source
    networks: Networks
    homes: Mapping[str, Home] = field(default_factory=dict)
    own: Mapping[str, Path] = field(default_factory=dict)
    folder: Folder | None = None
    scheduler: Mapping[str, Any] | None = None

    @property
    def names(self) -> frozenset[str]:
        """The networks and tokenizers that it lends."""
        return frozenset((*self.networks.parts, *self.homes))

    @property
    def files(self) -> dict[str, Path]:
        """The files that were read, by their names inside it."""
        found = dict(self.own if self.folder is None else self.folder.files)
        for home in self.homes.values():
            found |= home.files
        return found


@dataclass(frozen=True, slots=True)
class Borrower:
    """A single file that lacks something.

    name: of the file. configs: of the networks of its variant.
    """

    source: Source
    name: str
    family: Family
    configs: Mapping[str, Mapping[str, Any]]


def borrow(
    finder: PartsFinder, file: Borrower, lacking: list[str]
) -> tuple[list[Lender], list[str], list[str]]:
    """Return what lends a file something, what it lacks still, and what of the given lends nothing.

    A tokenizer that nothing given has is taken from an installation around the models folder.

    Raises SafelightError if something given is not found, malformed, or of another family.
    """
    lenders: list[Lender] = []
    unused: list[str] = []
    for number, name in enumerate(finder.names):
        found = None
        if lacking:
            found = read_lender(finder.find(number, file.source, lacking), file, lacking)
        if found is None:
            unused.append(name)
            continue
        lenders.append(found)
        lacking = [name for name in lacking if name not in found.names]
    for name in [name for name in lacking if name in file.family.tokenizers]:
        encoder, library = encoder_of(name), finder.library
        if encoder in lacking or library is None:
            continue
        found = installed_for(library, file.family, name, _text_configs(file, lenders))
        if found is not None:
            source, home = found
            lenders.append(Lender(source, Networks({}, {}, {}), {name: home}))
            lacking = [other for other in lacking if other != name]
    return lenders, lacking, unused


def _text_configs(file: Borrower, lenders: Sequence[Lender]) -> dict[str, Any]:
    """Return the configs of the text encoders, of the file's own and of those that are lent."""
    parts, raw = dict(file.family.parts), dict(file.configs)
    for lender in lenders:
        parts |= lender.networks.parts
        raw |= lender.networks.raw
    names = [name for name in raw if name.startswith("text_encoder")]
    return {name: read_config(file.source, parts[name], raw[name]) for name in names}


def read_lender(source: Source, file: Borrower, lacking: Collection[str]) -> Lender | None:
    """Read the headers and configs of what a single file takes from a folder or another file.

    lacking: the networks and tokenizers that it lacks.

    Returns None if there is nothing of it. Raises SafelightError if the folder or file is
    malformed, or of another family.
    """
    if source.path.is_dir():
        lone = is_tokenizer_folder(source.path)
        found = _of_tokenizer(source, file, lacking) if lone else _of_folder(source, file, lacking)
    elif source.path.suffix.lower() == ".json":
        found = _of_tokenizer(source, file, lacking)
    else:
        found = _of_file(source, file, lacking)
    return found if found.names else None


def _of_folder(source: Source, file: Borrower, lacking: Collection[str]) -> Lender:
    folder, family = Folder(source.path, source.name), file.family
    theirs = family_of_folder(folder.index, source.name)
    if theirs.title != family.title:
        raise refusal(
            source.name, f"a folder of {theirs.title}; {file.name:.40} is of {family.title}"
        )
    names = lent(family, folder.index, lacking)
    networks = networks_of(folder, family, [name for name in family.parts if name in names])
    check_weights(source, networks.weights)
    scheduler = None
    if names and family.told_by_scheduler:
        scheduler = folder.part_json("scheduler", "scheduler_config.json")
    homes = {name: FolderHome(folder, f"{name}/") for name in names if name in family.tokenizers}
    return Lender(source, networks, homes, folder=folder, scheduler=scheduler)


def _of_tokenizer(source: Source, file: Borrower, lacking: Collection[str]) -> Lender:
    home, names = check_tokenizer(source, file.family)
    homes = {name: home for name in names if name in lacking}
    return Lender(source, Networks({}, {}, {}), homes)


def _of_file(source: Source, file: Borrower, lacking: Collection[str]) -> Lender:
    header = header_of(source.path)
    if any(key.startswith("model.diffusion_model.") for key in header.tensors):
        raise refusal(
            header.name,
            "a whole model's file; parts come from a model's folder, or from files of text "
            "encoders or an autoencoder",
        )
    own = {source.path.name: header.path}
    encoders = read_encoders(header)
    if encoders:
        check_weights(source, {one.prefix: one.weights for one in encoders})
        placed = place_encoders(header, encoders, file.family, file.configs, lacking)
        homes = _homes(header, file.family, placed, lacking)
        placed.drop([name for name in placed.parts if name not in lacking])
        return Lender(source, placed, homes, own)
    if kind_of(header.tensors) == "vae" and "vae" in file.configs:
        return _of_autoencoder(source, file, lacking)
    kinds = ", ".join(kind.title for kind in kinds_of(file.family))
    raise refusal(
        header.name,
        f"nothing that {file.family.title} takes from a file: a text encoder ({kinds}) in "
        "transformers' or llama.cpp's names, or an autoencoder",
    )


def _of_autoencoder(source: Source, file: Borrower, lacking: Collection[str]) -> Lender:
    own, like = file.family.parts["vae"], file.configs["vae"]
    found = read_vae_file(source, own, like)
    check_weights(source, {"vae": found.weights})
    config = read_config(source, own, like)
    check_latents(source, found.config, config, len(found.weights))
    networks = Networks({"vae": found.part}, {"vae": found.raw}, {"vae": found.weights})
    if "vae" not in lacking:
        networks.drop(["vae"])
    return Lender(source, networks, {}, found.files)


def _homes(
    header: Header, family: Family, placed: Networks, lacking: Collection[str]
) -> dict[str, Home]:
    """Return the tokenizers that a GGUF file lends: those of its text encoders."""
    if (found := gguf_home(header)) is None:
        return {}
    home, kind = found
    mine = {tokenizer_of(name) for name in placed.parts}
    names = [name for name in of_class(family, kind) if name in mine]
    return {name: home for name in names if name in lacking}


def missing(family: Family, names: Sequence[str], lenders: Sequence[Lender]) -> str:
    """Return what to say of a file that lacks parts."""
    if all(name in family.tokenizers for name in names):
        part = family.parts[encoder_of(names[0])]
        kind = next(kind.title for kind in kinds_of(family) if kind.module == part.module)
        return (
            f"no {listed(names)} in the file; --parts takes {kind}'s tokenizer.json, a folder of "
            f"{family.title} or a {kind} GGUF; --models-dir ComfyUI's models"
        )
    if lenders:
        nor = listed([printable(one.source.name, 40) for one in lenders], "or")
        more = "" if any(one.folder for one in lenders) else "; --parts may be given several times"
        return f"no {listed(names)} in the file, nor in {nor}{more}"
    known = ""
    if len(names) == 1:
        mine = [f"{p}*" for p, section in family.sections().items() if section.part == names[0]]
        known = f" ({' or '.join(mine)})" if mine else ""
    way = f"give a folder of {family.title}, or their files, with --parts"
    if names == ["vae"]:
        way = "give one with --vae"
    return f"{way}: the file has no {listed(names)}{known}"  # what is cut off is the list


def listed(names: Sequence[str], word: str = "and") -> str:
    """Return names with commas, and a word before the last."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last
