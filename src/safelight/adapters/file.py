"""Open the file of a LoRA or its kin, and match each of its keys to a layer of a model.

Only the header is read here. It comes from a stranger: `weights.check` checks it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.adapters.algorithms import (
    ALGORITHMS,
    OFT,
    Algorithm,
    Full,
    LoKr,
    SetWeight,
    UnfitError,
    check_dora,
)
from safelight.adapters.embedding import BUNDLE
from safelight.adapters.keys import differ, endings, family_of, refused_kind, slot_of
from safelight.adapters.names import Target
from safelight.adapters.passed import is_control, is_idle, repeated
from safelight.adapters.places import config_of, file_in
from safelight.errors import SafelightError
from safelight.weights.check import Header, printable, read_json
from safelight.weights.digest import HashedFile, digest_file
from safelight.weights.headers import plain_header_of
from safelight.weights.kinds import IP_ADAPTER

FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
METADATA = "lora_adapter_metadata"
"""What diffusers calls PEFT's configs in a header."""

_SHARED = {"alpha", "dora_scale", "magnitude"}
_OWNERS = {slot: one for one in ALGORITHMS for slot in (*one.needs, *one.optional)}

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""The shape of each weight of a model, by part and name."""


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter's file, kept open and compared with its digest.

    name: what it is called in messages. settings: PEFT's config for each part, under "" for all.
    """

    name: str
    header: Header
    sha256: str
    hashed: HashedFile
    settings: Mapping[str, Mapping[str, Any]]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.header.tensors[key].shape


@dataclass(frozen=True)
class Change:
    """What a file does to one weight, or to several that are one in it.

    parameters: the weights' names in their part, in the order of their rows in the file. keys: of
    the tensors, by slot. alpha: PEFT's, if no tensor holds it. rooted: alpha is divided by the root
    of the rank (arXiv:2312.03732). swapped: the file has the second half of the rows first. rank:
    PEFT's, if no tensor has it as a side.
    """

    part: str
    parameters: tuple[str, ...]
    algorithm: type[Algorithm]
    keys: Mapping[str, str]
    alpha: float | None = None
    rooted: bool = False
    swapped: bool = False
    rank: int | None = None


@dataclass
class Match:
    """A file's changes to a model, and the keys that change nothing.

    unmatched: keys that belong to nothing in the model. repeated: those that say the same as others
    in another naming. idle: those that are known to do nothing in any program.
    """

    changes: list[Change] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)


def open_adapter(path: Path) -> AdapterFile:
    """Open a file, or a folder that PEFT or diffusers wrote.

    Raises SafelightError, one line, if it is not a valid weight file.
    """
    name, config = path.name, dict[str, Any]()
    try:
        path = file_in(path)
        if (told := config_of(path)) is not None:
            config = read_json(told, name=f"{name}/{told.name}")
        header = plain_header_of(path, "a LoRA", name)
        digest = digest_file(path)
        hashed = HashedFile(digest)
    except SafelightError as error:
        raise SafelightError(f"lora {error}", code=error.code, field="loras") from None
    except OSError as error:
        raise refusal(name, f"cannot be read ({error.strerror})") from None
    settings = _settings(name, header, config)
    return AdapterFile(name, header, digest.sha256, hashed, settings)


def match(
    file: AdapterFile,
    table: Mapping[str, Target],
    shapes: Shapes,
    family: str,
    takes_embeddings: bool = True,
) -> Match:
    """Return what a file does to a model.

    table: see `names.table`. shapes: of the model's weights. family: what the model is, for
    errors. takes_embeddings: whether it reads embeddings inside the file; otherwise they belong to
    nothing. Raises SafelightError for a tensor that does not fit its layer, for a pair that lacks
    one half, for two changes of one weight, and for a kind that is not supported.
    """
    found, groups = Match(), dict[Target, dict[str, str]]()
    if is_control(file.header.tensors):
        raise refusal(file.name, "a Control-LoRA is not supported")
    if any(key.startswith(IP_ADAPTER) for key in file.header.tensors):
        raise refusal(file.name, "an IP-Adapter, which is no LoRA: give it with --ip-adapter")
    again = repeated(file.header.tensors, family)
    for key in file.header.tensors:
        if key.startswith(BUNDLE) and takes_embeddings:
            continue  # an embedding inside the file
        if key in again:
            found.repeated.append(key)
            continue
        taken = next(((table[s], e) for s, e in endings(key) if s in table), None)
        if taken is None:
            (found.idle if is_idle(key, family) else found.unmatched).append(key)
            continue
        target, ending = taken
        slot = slot_of(ending)
        if slot is None:
            raise refusal(file.name, f"{refused_kind(ending)} ({key!r:.60}) is not supported")
        slots = groups.setdefault(target, {})
        if slot in slots:
            raise refusal(file.name, f"{slots[slot]!r:.60} and {key!r:.60} are the same")
        slots[slot] = key
    for target, slots in groups.items():
        try:
            _add(file, target, slots, shapes[target.part], found)
        except UnfitError as error:
            key = slots.get(error.slot, error.slot)
            raise refusal(file.name, f"{key!r:.70} {error.why}{_hint(file, family)}") from None
    changed: dict[tuple[str, str], Change] = {}
    for change in found.changes:
        for name in change.parameters:
            if (other := changed.setdefault((change.part, name), change)) is not change:
                raise _two_ways(file, next(iter(other.keys.values())), *change.keys.values())
    return found


def refusal(name: str, why: str) -> SafelightError:
    """Return the error for a LoRA: one line, which a hostile key can neither break nor hide."""
    return SafelightError(f"lora {printable(name, 60)}: {printable(why, 300)}", field="loras")


def unmatched_error(file: AdapterFile, found: Match, family: str) -> SafelightError:
    """Return the error for keys that belong to nothing in the model."""
    why = f"{told_unmatched(file, found)}{_hint(file, family)}"
    if found.changes:
        why += "; lora_unmatched warn draws without them"
    return refusal(file.name, why)


def told_unmatched(file: AdapterFile, found: Match) -> str:
    """Return how many keys belong to nothing, and the first of them."""
    verb = "belongs" if len(found.unmatched) == 1 else "belong"
    return _told(file, found.unmatched, f"{verb} to nothing in the model")


def told_repeated(file: AdapterFile, found: Match) -> str:
    """Return how many keys repeat others, and the first of them."""
    return _told(file, found.repeated, "repeat others in another naming, and are left out")


def _told(file: AdapterFile, keys: list[str], what: str) -> str:
    some = ", ".join(f"{key:.60}" for key in keys[:2]) + (" …" if len(keys) > 2 else "")
    return f"{len(keys)} of {len(file.header.tensors)} keys {what}: {some}"


def _two_ways(file: AdapterFile, one: str, other: str, *_: str) -> SafelightError:
    return refusal(file.name, f"{one:.60} and {other:.60} change one layer in two ways")


def _hint(file: AdapterFile, family: str) -> str:
    """Return what kind of model the file was made for, if this model is another."""
    shapes = {key: info.shape for key, info in file.header.tensors.items()}
    made_for = family_of(shapes, file.header.metadata)
    if made_for is None or not differ(made_for, family):
        return ""
    return f"; it is for {made_for}, and this model is {family}"


def _add(
    file: AdapterFile,
    target: Target,
    slots: dict[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    found: Match,
) -> None:
    """Add the changes of one layer to a match."""
    weights, biases = (tuple(f"{one}.{of}" for one in target.layers) for of in ("weight", "bias"))
    if "bias" in slots:
        key = slots.pop("bias")
        if not shapes.keys() >= set(biases):
            found.unmatched.append(key)
        else:
            _check_float(file, key)
            _check(Full, {"diff": file.shape(key)}, _joint(shapes, biases))
            keys = {"diff": key}
            found.changes.append(Change(target.part, biases, Full, keys, swapped=target.swapped))
    owners = {_OWNERS[slot] for slot in slots if slot not in _SHARED}
    if not owners:
        found.unmatched += slots.values()  # an alpha without factors
        return
    if len(owners) > 1:
        raise _two_ways(file, *slots.values())
    [algorithm] = owners
    missing = [slot for slot in algorithm.needs if slot not in slots]
    key = next(iter(slots.values()))
    if missing == ["on_input"]:
        raise refusal(file.name, f"{key!r:.70} is a whole weight, as a checkpoint has them")
    if missing:
        raise refusal(file.name, f"{algorithm.title} of {key!r:.70} lacks its {missing[0]} half")
    for slot, one in slots.items():
        if slot != "on_input":
            _check_float(file, one)
    if "alpha" in slots and math.prod(file.shape(slots["alpha"])) != 1:
        raise UnfitError("alpha", f"has the shape {file.shape(slots['alpha'])}; it is one number")
    keys = {slot: one for slot, one in slots.items() if slot != "magnitude"}
    if "magnitude" in slots:
        keys["dora_scale"] = slots["magnitude"]
    held = {slot: file.shape(one) for slot, one in keys.items()}
    if "dora_scale" in held and not algorithm.dora:
        raise UnfitError("dora_scale", f"cannot follow {algorithm.title}")
    if "magnitude" in slots:
        held["dora_scale"] = (math.prod(held["dora_scale"]),)
    _check(algorithm, held, _joint(shapes, weights))
    alpha, rooted = _alpha(file, target)
    rank = None
    if algorithm is not OFT and algorithm.rank(held) is None:
        keys.pop("alpha", None)  # it scales nothing: trainers write any number, also inf
        if algorithm is LoKr and alpha is not None:
            rank = _rank(file, target)  # but PEFT's does
    found.changes.append(
        Change(target.part, weights, algorithm, keys, alpha, rooted, target.swapped, rank)
    )


def _joint(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the shape of weights whose rows lie one after the other."""
    return (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])


def _check(
    algorithm: type[Algorithm], shapes: Mapping[str, tuple[int, ...]], layer: tuple[int, ...]
) -> None:
    if any(0 in shape for shape in shapes.values()):
        slot = next(slot for slot, shape in shapes.items() if 0 in shape)
        raise UnfitError(slot, "is empty")
    if len(layer) < 2 and algorithm not in (Full, SetWeight):
        raise UnfitError(next(iter(shapes)), f"is for a matrix; the layer is {layer}")
    algorithm.check(shapes, layer)
    if "dora_scale" in shapes:
        check_dora(shapes["dora_scale"], layer)


def _check_float(file: AdapterFile, key: str) -> None:
    dtype = file.header.tensors[key].dtype
    if dtype not in FLOATS and not key.endswith(".alpha"):
        raise refusal(file.name, f"{key!r:.70} is stored as {dtype}; floats are needed")


# --- PEFT's configs -------------------------------------------------------------------------------


def _settings(name: str, header: Header, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return PEFT's settings by part: those of a folder's config, or of the header's metadata."""
    found: dict[str, dict[str, Any]] = {"": dict(config)} if config else {}
    try:
        told = json.loads(header.metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise refusal(name, f"its {METADATA} is not a JSON object")
    for key, value in told.items():
        # A pipeline writes a part before each setting, a network on its own writes none.
        part, _, setting = key.rpartition(".")
        found.setdefault(part, {})[setting] = value
    for settings in found.values():
        settings["alpha_pattern"] = _patterns(name, settings, "alpha_pattern")
        if settings.get("peft_type") == "LOKR":  # elsewhere the tensors have the ranks
            settings["rank_pattern"] = _patterns(name, settings, "rank_pattern")
        else:
            settings["rank_pattern"] = {}
    return dict(found)


def _patterns(name: str, settings: Mapping[str, Any], which: str) -> dict[str, tuple[int, Any]]:
    """Return PEFT's numbers of single layers, each with its place, by the end of a layer's name.

    A key that begins with ^ is a whole name. which: "alpha_pattern" or "rank_pattern".
    """
    found: dict[str, tuple[int, Any]] = {}
    patterns = settings.get(which)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        # PEFT reads these as regular expressions; a stranger's may run for ever.
        plain = pattern.replace("\\.", ".")
        if not re.fullmatch(r"\^?[\w.]*", plain):
            raise refusal(name, f"its {which} {pattern!r:.40} is not a layer's name")
        found.setdefault(plain, (len(found), value))
    return found


def _alpha(file: AdapterFile, target: Target) -> tuple[float | None, bool]:
    """Return the alpha of a layer by PEFT's config, and whether the root of the rank divides it."""
    settings = _settings_of(file, target)
    alpha: Any = settings.get("lora_alpha", settings.get("alpha"))
    alpha = _of_layer(settings, "alpha_pattern", target, alpha)
    if alpha is None:
        return None, False
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise refusal(file.name, f"its config has the alpha {alpha!r:.20}; a number is needed")
    return float(alpha), settings.get("use_rslora") is True


def _rank(file: AdapterFile, target: Target) -> int | None:
    """Return the rank of a layer by PEFT's config; None if it has none."""
    settings = _settings_of(file, target)
    rank = _of_layer(settings, "rank_pattern", target, settings.get("r"))
    if rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0):
        return rank
    raise refusal(file.name, f"its config has the rank {rank!r:.20}; a number from 1 is needed")


def _settings_of(file: AdapterFile, target: Target) -> Mapping[str, Any]:
    return file.settings.get(target.part) or file.settings.get("") or {}


def _of_layer(settings: Mapping[str, Any], which: str, target: Target, common: Any) -> Any:
    """Return a layer's own number by PEFT's patterns, else the common one."""
    patterns, names = settings.get(which, {}), target.name.split(".")
    ends = [f"^{target.name}", *(".".join(names[i:]) for i in range(len(names)))]
    if told := [patterns[end] for end in ends if end in patterns]:
        return min(told, key=lambda one: one[0])[1]  # the first counts, as in PEFT
    return common
