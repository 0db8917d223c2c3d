"""The words of a prompt, and where each one's tokens stand: for maps of attention."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.prompt.chunks import Chunk, chunks_of
from safelight.prompt.reading import Piece, Word
from safelight.prompt.tokenizer import Tokenizer


def words_of(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """Return CLIP's words of a prompt in the syntax "plain", up to where it is cut."""
    return words_of_chunks(tokenizer, chunks_of(tokenizer, ((Piece(prompt),),), "plain"))


def joined_to(words: Sequence[Word], wholes: Sequence[str]) -> list[Word] | None:
    """Return words, in lower case, joined to these longer ones; None if their letters differ.

    CLIP has "apple" and "," where others have "apple,".
    """
    found: list[Word] = []
    rest = iter(words)
    for whole in map(str.lower, wholes):
        text, tokens = "", list[int]()
        while len(text) < len(whole) and (word := next(rest, None)) is not None:
            text, tokens = text + word.text, tokens + word.tokens
        if text != whole:
            return None
        found.append(Word(text, tokens))
    return found if next(rest, None) is None else None


def words_of_chunks(tokenizer: Tokenizer, chunks: Sequence[Chunk]) -> list[Word]:
    """Return the words of chunks that follow each other, in lower case.

    A textual inversion is one word, its name. A token that was added to the tokenizer is one word,
    its text.
    """
    learned = {number: one for one in tokenizer.learned for number in one.ids}
    alone = {*learned, *tokenizer.added}
    marks = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    words: list[Word] = []
    for number, chunk in enumerate(chunks):
        start, first = 1, number * tokenizer.max_length
        for place in range(1, chunk.count + 1):
            here, after = chunk.ids[place], chunk.ids[place + 1]
            one = learned.get(here)
            if one is not None:
                text, ends = one.name, learned.get(after) is not one or after != here + 1
            elif here in tokenizer.added:
                text, ends = tokenizer.added[here], True
            else:
                text = tokenizer.text(chunk.ids[start : place + 1]).strip()
                ends = after in alone or place == chunk.count
                ends = ends or here in marks or tokenizer.name(here).endswith("</w>")
            if ends:
                words.append(Word(text, list(range(first + start, first + place + 1))))
                start = place + 1
    return words
