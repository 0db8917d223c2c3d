"""The fast mode: which parts of a step are skipped, at which steps, and what is reused for them.

Each shortcut changes the picture. They can be combined, and are off unless a request asks for
them by name or by a level of `fast`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from safelight.defaults import LEVELS, with_level
from safelight.families.base import SHORTCUTS, Conditioning
from safelight.fast import int8
from safelight.nets.reuse import Reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from safelight.model import Model
    from safelight.request import Request


def shortened(request: Request, model: Model) -> Request:
    """Return the request with the settings of its `fast` level, as far as they work here."""
    request = with_level(request, model.family, model.notes)
    if request.linears == "int8" and not int8.available(model.device, model.dtype):
        return request.replace(linears="plain")
    return request


def remark(asked: Request, resolved: Request) -> str:
    """Return a warning if a shortcut that was asked for by name does not work here, else ""."""
    if asked.linears in (None, resolved.linears, LEVELS.get(asked.fast, {}).get("linears")):
        return ""
    return (
        "linears int8 needs a model in bfloat16 on a processor with AVX512-BF16 or AMX, and "
        "Safelight's kernels for it: this picture is drawn without"
    )


@dataclass(frozen=True)
class Shortcuts:
    """Which parts are skipped, and when. Shares are of a picture's rows, from 0 to 1.

    cache_every: one row in so many is computed in full; the others reuse the deep part of the
      network from it (DeepCache, arXiv:2312.00858). Counted back from the last row, where errors
      show most. cache_branch: layers that the others compute beyond the outermost one.
    guidance_start, guidance_end: rows between these shares are guided (arXiv:2404.07724). The
      others see the prompt alone, or a composed prompt at a guidance of at most 1.
    text_end: after this share, outputs of cross-attention are reused (T-GATE, arXiv:2404.02747).
    linears: "int8": linear layers and 1×1 convolutions multiply 8-bit integers.
    """

    cache_every: int = 1
    cache_branch: int = 0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    text_end: float = 1.0
    linears: str = "plain"

    @classmethod
    def of(cls, request: Request) -> Shortcuts:
        """Return the shortcuts of a resolved request."""
        asked = {name: getattr(request, name) for name in SHORTCUTS}
        return cls(**{name: value for name, value in asked.items() if value is not None})

    def guided(self, share: float) -> bool:
        """Return whether the row at a share of the rows is guided."""
        return self.guidance_start <= share < self.guidance_end


Words = tuple[object, object]
"""The prompts of a row: its text states, and what it reads of a picture. Each may be None."""


def _same(words: Words, others: Words) -> bool:
    """Return whether prompts are the same objects, from which layers computed the same."""
    return all(one is other for one, other in zip(words, others, strict=True))


@dataclass
class Kept:
    """What a picture's earlier rows left for later ones.

    shortcuts: which parts may be skipped, and when. deep, texts: as in `nets.reuse.Reuse`, for
    this picture alone. model, evaluations: the id of the model that left them, and its evaluations
    at that row. told: the number of evaluations in `texts`. words: the prompts behind `texts`.
    """

    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    deep: Tensor | None = None
    texts: dict[nn.Module, Tensor] = field(default_factory=dict)
    model: int | None = None
    evaluations: int = 0
    told: int = 0
    words: Words = (None, None)
    _alone: dict[int, Conditioning] = field(default_factory=dict)

    def asked(self, conditioning: Conditioning, row: int, rows: int) -> Conditioning:
        """Return the conditioning of a row; without guidance, the prompt's own part of it."""
        if conditioning.evaluations < 2 or self.shortcuts.guided(row / rows):
            return conditioning
        if conditioning.evaluations > 2 or conditioning.weights is not None:
            # Prompts with AND or a weight are composed against the negative one, guided or not.
            return replace(conditioning, guidance=min(conditioning.guidance, 1.0))
        key = id(conditioning)  # cached: layers reuse what they computed from the same tensor
        if key not in self._alone:
            self._alone[key] = conditioning.positive()
        return self._alone[key]

    def plan(self, row: int, rows: int, model: int, evaluations: int, words: Words) -> Plan:
        """Return what a row reuses and keeps.

        model: the id of the model that takes it. words: its prompts, as if it were guided.
        """
        cuts = self.shortcuts
        begun = self.model == model and row > 0
        deep = begun and self.deep is not None and self.evaluations == evaluations
        return Plan(
            skips=cuts.cache_branch + 1 if cuts.cache_every > 1 else 0,
            taken=deep and (rows - 1 - row) % cuts.cache_every != 0,
            texts=cuts.text_end < 1,
            told=(
                begun
                and 0 < evaluations <= self.told
                and _same(self.words, words)  # a schedule's next stage is computed
                and row / rows >= cuts.text_end
            ),
            int8=cuts.linears == "int8",
        )


@dataclass(frozen=True)
class Plan:
    """What a row reuses and keeps, and how its linear layers multiply; equal within a call.

    skips, taken, told: as in `nets.reuse.Reuse`. texts: whether outputs of cross-attention are
    kept. int8: see `Shortcuts.linears`.
    """

    skips: int = 0
    taken: bool = False
    texts: bool = False
    told: bool = False
    int8: bool = False

    @property
    def full(self) -> bool:
        """Whether nothing is reused or kept."""
        return not (self.skips or self.texts)


def gather(plan: Plan, kept: list[Kept], evaluations: list[int]) -> Reuse | None:
    """Return what a call of the network for these pictures reuses and keeps, None if nothing.

    plan: the same for all of them. evaluations: of each picture in this call.
    """
    if plan.full:
        return None
    reuse = Reuse(plan.skips, taken=plan.taken, told=plan.told)
    if plan.taken:
        reuse.deep = torch.cat([one.deep for one in kept if one.deep is not None])
    if plan.texts:
        # A block is computed if one of the pictures has kept nothing of it.
        blocks = [block for block in kept[0].texts if all(block in one.texts for one in kept)]
        reuse.texts = {
            block: torch.cat(
                [_fitted(one.texts[block], n) for one, n in zip(kept, evaluations, strict=True)]
            )
            for block in (blocks if plan.told else ())
        }
    return reuse


def scatter(
    reuse: Reuse | None,
    kept: list[Kept],
    model: int,
    evaluations: list[int],
    words: list[Words],
) -> None:
    """Store what a call has kept with each of its pictures. model, words: as in `Kept.plan`."""
    if reuse is None:
        return
    ends = torch.tensor(evaluations).cumsum(0).tolist()
    for one, count, end, said in zip(kept, evaluations, ends, words, strict=True):
        here = slice(end - count, end)
        if one.model != model:
            one.texts = {}
        one.model, one.evaluations = model, count
        if reuse.deep is not None and not reuse.taken:
            one.deep = reuse.deep[here]
        if reuse.texts is not None:
            if count != one.told or not _same(said, one.words):
                one.texts, one.told, one.words = {}, count, said
            # Blocks that this row skipped keep their earlier outputs.
            one.texts |= {block: told[here] for block, told in reuse.texts.items()}


def _fitted(told: Tensor, evaluations: int) -> Tensor:
    """Return outputs of cross-attention for so many evaluations; without guidance, the mean."""
    return told if len(told) == evaluations else told.mean(0, keepdim=True)
