"""How a text that is read whole, in one piece and without weights, becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelight.prompt.reading import Word

if TYPE_CHECKING:
    from safelight.prompt.text_tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Reader:
    """A tokenizer, and how much of a text the model reads with it.

    most: the ids of a text, with all that is around it. before, after: what is put around a text.
    dropped: how many ids at the beginning have states that the network does not read.
    """

    tokenizer: TextTokenizer
    most: int
    before: str = ""
    after: str = ""
    dropped: int = 0

    def cut(self, text: str) -> str | None:
        """Return the end of a text that is longer than the model reads, None if it is not."""
        pieces = self.tokenizer.pieces(f"{self.before}{text}{self.after}")
        room = self.tokenizer.room(self.most)
        if len(pieces) <= room:
            return None
        return text[max(pieces[room].start - len(self.before), 0) :].strip() or None

    def words(self, text: str) -> list[Word]:
        """Return the words of a text that the model reads."""
        whole, begin = f"{self.before}{text}{self.after}", len(self.before)
        end, first = begin + len(text), len(self.tokenizer.prefix) - self.dropped
        found: list[Word] = []
        places: list[int] = []
        starts = begin
        read = self.tokenizer.pieces(whole)[: self.tokenizer.room(self.most)]
        for place, piece in enumerate(read, first):
            if piece.end <= begin or piece.start >= end:
                continue
            places.append(place)
            ends = min(piece.end, end)
            if ends == end or whole[ends].isspace():
                if word := whole[starts:ends].strip():
                    found.append(Word(word, places))
                places, starts = [], ends
        return found

    def chunk(self, text: str) -> dict[str, Any]:
        """Return the tokens that the model reads of a text, as `show.describe` has a chunk."""
        whole, begin = f"{self.before}{text}{self.after}", len(self.before)
        end, room = begin + len(text), self.tokenizer.room(self.most)
        pieces = self.tokenizer.pieces(whole)
        own, read = (
            [piece for piece in some if piece.start < end and piece.end > begin]
            for some in (pieces, pieces[:room])
        )
        # If a text is too long, what would be after it makes room as well.
        return {
            "count": len(read),
            "room": max(room - (len(pieces) - len(own)), len(read)),
            "tokens": [
                {
                    "id": piece.id,
                    "token": (whole[piece.start : piece.end].strip() or piece.name)
                    + ("</w>" if piece.end >= end or whole[piece.end].isspace() else ""),
                    "weight": 1.0,
                }
                for piece in read
            ],
        }
