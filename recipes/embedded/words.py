"""Train the text encoder, alone, to tell what its captions mean.

A denoiser's loss says little about which thing a word names: most of a picture's error is its
brightness and colours, so after a million samples all things were still blobs. Questions with
one right answer each teach the same text encoder its 458 things within minutes. Its last states
learn more: what the things look like (looks.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.embedded.captions import BIG, PLACES, RELATIONS, SMALL, STYLES
from recipes.embedded.colours import PAINTS
from recipes.embedded.judge import GROUNDS
from recipes.embedded.looks import PARTS, Looks
from recipes.embedded.scenes import Scene, Scenes
from recipes.embedded.supply import PART, parts
from safelight.nets.clip import CLIPTextModel
from safelight.prompt.tokenizer import Tokenizer
from safelight.train.devices import autocast
from safelight.train.loop import Draw, fit, progress
from safelight.train.plan import Plan


class Questions:
    """The questions about a caption, each with a list of answers.

    None is the answer if a question does not apply: one about a second thing, if there is only one.
    """

    def __init__(self, scenes: Scenes) -> None:
        things = list(scenes.names)
        paints = [None, *PAINTS]
        self.answers: list[list[Any]] = [
            things,
            [None, *things],
            paints,
            paints,
            list(GROUNDS),
            [1, 2, 3, 4],
            [None, *RELATIONS, *PLACES],
            [None, "small", "big"],
            list(STYLES),
        ]
        self._at = [{answer: i for i, answer in enumerate(some)} for some in self.answers]

    def right(self, scene: Scene) -> list[int]:
        """Return the number of the right answer to each question.

        The style is asked for even if the caption leaves it open: the best answer is then that all
        are equally likely.
        """
        size = "big" if scene.size in BIG else "small" if scene.size in SMALL else None
        first, second = (*scene.concepts, None)[:2]
        paint, other = (*scene.paints, None)[:2]
        said = first, second, paint, other, scene.ground, scene.count, scene.where, size
        return [at[answer] for at, answer in zip(self._at, (*said, scene.style), strict=True)]

    @property
    def sizes(self) -> list[int]:
        """The number of answers to each question."""
        return [len(some) for some in self.answers]


LOOKS = 10.0
"""Weight of the unexplained share of the looks, beside the questions' cross entropy."""


class Reader(nn.Module):
    """A text encoder, and two linear layers on its states.

    One answers all questions from any state. The other tells, from each of the last states, a part
    of what the things look like.
    """

    def __init__(self, text: CLIPTextModel, sizes: list[int], numbers: int) -> None:
        super().__init__()
        self.text_encoder, self.sizes = text, sizes
        self.answer = nn.Linear(text.config.hidden_size, sum(sizes))
        self.look = nn.Linear(text.config.hidden_size, numbers)

    def forward(self, ids: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [n, k, answers] of the states at the k positions where [n, k], and what
        the last states tell, [n, PARTS, numbers].
        """
        states = self.text_encoder(ids)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        return self.answer(states[rows, where]), self.look(states[:, -PARTS:])

    def error(self, logits: Tensor, right: Tensor) -> Tensor:
        """Return the summed cross entropy of all questions; right: [n, questions]."""
        each = logits.float().split(self.sizes, dim=-1)
        wanted = right[:, None].expand(-1, logits.shape[1], -1).flatten(0, 1)
        return torch.stack(
            [F.cross_entropy(some.flatten(0, 1), wanted[:, i]) for i, some in enumerate(each)]
        ).sum()


def ends(ids: Tensor, end: int, draw: Draw) -> Tensor:
    """Return two positions [n, 2] of each caption: its end mark, and one after it at random.

    The end mark also pads, and a denoiser reads all states, so all states must know the answers.
    The last ones are left out: they tell what things look like.
    """
    first = (ids == end).int().argmax(dim=1)
    left = (ids.shape[1] - PARTS - first).clamp(min=1)
    later = first + (draw.uniform([len(ids)]) * left).long()
    return torch.stack([first, later], dim=1)


def teach(
    text: CLIPTextModel,
    scenes: Scenes,
    path: Path,
    tokenizer: Tokenizer,
    looks: Looks,
    captions: int,
    plan: Plan,
    folder: Path,
    device: torch.device | str,
) -> tuple[float, float]:
    """Train `text`, in place, to answer the questions about `captions` invented captions, and to
    tell the looks of their things.

    path: of cutouts.npz, for the processes that invent. folder: for checkpoints. Returns, for other
    captions, the share whose first thing it tells, and the share of the looks' variance that it
    explains.
    """
    questions = Questions(scenes)
    reader = Reader(text, questions.sizes, looks.numbers)

    def asked(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        shown = [scene for some, _, _ in parts(scenes, path, count, seed) for scene in some]
        ids = torch.tensor([tokenizer.encode(scene.said).ids for scene in shown])
        right = torch.tensor([questions.right(scene) for scene in shown])
        rows = torch.tensor([looks.rows(scene) for scene in shown])
        return ids.to(device), right.to(device), rows.to(device)

    ids, right, rows = asked(captions, 5)

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pick = torch.from_numpy(draw.data.integers(len(ids), size=plan.batch)).to(device)
        some = ids[pick]
        with autocast(draw.device):
            logits, told = run(some, ends(some, tokenizer.eos, draw))
        unexplained = looks.unexplained(told, rows[pick])
        return reader.error(logits, right[pick]) + LOOKS * unexplained

    fit(reader, loss_of, plan, folder)
    ids, right, rows = asked(PART, 6)
    told, parts_told = understood(reader, ids, right, tokenizer.eos)
    explained = 1 - float(looks.unexplained(parts_told, rows))
    reader.cpu()
    progress("told of other captions: " + " ".join(f"{share:.1%}" for share in told))
    progress(f"of the looks of their things: {explained:.1%}")
    return told[0], explained


@torch.inference_mode()
def understood(reader: Reader, ids: Tensor, right: Tensor, end: int) -> tuple[list[float], Tensor]:
    """Return the share of right answers to each question, and what the states tell of the looks.

    The answers are those at the end mark of each caption.
    """
    where = (ids == end).int().argmax(dim=1, keepdim=True)
    logits, parts_told = reader(ids, where)
    each = logits[:, 0].split(reader.sizes, dim=-1)
    told = torch.stack([some.argmax(dim=-1) for some in each], dim=1)
    return (told == right).float().mean(dim=0).tolist(), parts_told
