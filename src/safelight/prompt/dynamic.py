"""Dynamic prompts: `{a|b}` and wildcards, `__name__`, drawn with a picture's seed.

`{a|b}` draws one of them; `{2::a|b}` draws a twice as often as b; `{2$$a|b|c}` draws two, in the
order drawn, separated by ", "; `{1-2$$ and $$a|b|c}` draws one or two, separated by " and ".
`__animal__` draws a line of animal.txt in the folder of wildcards. What is drawn may hold choices
again. A brace or a bar after a backslash is text.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from safelight.errors import SafelightError

MAX_DEPTH = 20
"""How deep choices and wildcards may be nested: a wildcard may name itself."""

MAX_TEXT = 16 * 1024
_LARGEST_FILE = 4 * 2**20

_TOKEN = re.compile(r"\\[{}|\\]|[{}|]|__[\w-]+(?:/[\w-]+)*__|[^\\{}|_]++|.", re.DOTALL)
_COUNT = re.compile(r"\s*+(\d{1,3})(?:-(\d{1,3}))?\$\$")
_WEIGHT = re.compile(r"\s*+(\d++(?:\.\d*+)?|\.\d++)::")


@dataclass
class _Choice:
    options: list[list[_Node]] = field(default_factory=lambda: [[]])


_Node = str | _Choice


def has_choices(text: str) -> bool:
    """Return whether a text may hold something to draw."""
    return "{" in text or "__" in text or "\\" in text


def draw(texts: list[str], seed: int, wildcards: Path | None = None) -> list[str]:
    """Return the texts with their choices drawn, one after the other, by one generator.

    wildcards: the folder of text files. The same seed draws the same, while the files are the
    same. Raises SafelightError for a wildcard without a file, or a text that grows too long.
    """
    drawing = _Drawing(random.Random(seed), wildcards)
    return [drawing.text(text, 0) if has_choices(text) else text for text in texts]


class _Drawing:
    def __init__(self, generator: random.Random, wildcards: Path | None) -> None:
        # Only random() gives the same numbers in every version of Python.
        self._random, self._folder = generator.random, wildcards
        self._lines: dict[str, list[str]] = {}
        self._drawn = 0

    def text(self, text: str, depth: int) -> str:
        return self._join(_parse(text), depth)

    def _join(self, nodes: list[_Node], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise SafelightError(
                f"prompt has choices in choices, more than {MAX_DEPTH} deep: "
                "a wildcard may name itself",
                field="prompt",
            )
        said = "".join(self._one(node, depth) for node in nodes)
        self._drawn += len(said) if depth else 0
        if len(said) > MAX_TEXT or self._drawn > 64 * MAX_TEXT:
            raise SafelightError("prompt is over 16 KiB once its choices are drawn", field="prompt")
        return said

    def _one(self, node: _Node, depth: int) -> str:
        if isinstance(node, _Choice):
            return self._choose(node, depth + 1)
        if len(node) > 4 and node.startswith("__") and node.endswith("__"):
            lines = self._wildcard(node[2:-2])
            return self.text(lines[self._pick([1.0] * len(lines))], depth + 1)
        return node[1:] if len(node) == 2 and node[0] == "\\" else node

    def _choose(self, choice: _Choice, depth: int) -> str:
        least = most = 1
        separator, options = ", ", [list(option) for option in choice.options]
        head = options[0]
        if head and isinstance(head[0], str) and (count := _COUNT.match(head[0])):
            least, most = int(count[1]), int(count[2] or count[1])
            head[0] = head[0][count.end() :]
            before, found, after = head[0].partition("$$")
            if found:
                separator, head[0] = before, after
        weights = [_take_weight(option) for option in options]
        number = least + int(self._random() * (most - least + 1)) if most > least else least
        chosen: list[str] = []
        for _ in range(min(number, len(options))):
            place = self._pick(weights)
            weights.pop(place)
            chosen.append(self._join(options.pop(place), depth))
        return separator.join(chosen)

    def _pick(self, weights: list[float]) -> int:
        """Return a place, drawn in proportion to its weight; if all weights are 0, evenly."""
        total = sum(weights)
        if not 0 < total < float("inf"):
            return int(self._random() * len(weights))
        rest = self._random() * total
        for place, weight in enumerate(weights):
            rest -= weight
            if rest < 0:
                return place
        return len(weights) - 1

    def _wildcard(self, name: str) -> list[str]:
        if self._folder is None:
            raise SafelightError(
                f"prompt has the wildcard __{name[:60]}__, and no folder of wildcards was given: "
                "name one with --wildcards, or escape it",
                field="prompt",
            )
        if name not in self._lines:
            self._lines[name] = read_wildcard(self._folder, name)
        return self._lines[name]


def read_wildcard(folder: Path, name: str) -> list[str]:
    """Return the lines of a wildcard's file, without empty ones and comments (`#`).

    Raises SafelightError if it is not there, has no lines, or is no text.
    """
    file = folder / f"{name}.txt"
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise FileNotFoundError
        if file.stat().st_size > _LARGEST_FILE:
            raise SafelightError(f"wildcard {name[:60]}.txt is over 4 MiB", field="prompt")
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise SafelightError(
            f"wildcard {name[:60]}.txt is not UTF-8: save it as UTF-8", field="prompt"
        ) from None
    except OSError:
        there = sorted(path.stem for path in folder.glob("*.txt"))[:8] if folder.is_dir() else []
        known = ", ".join(there) or "none"
        raise SafelightError(
            f"there is no wildcard __{name[:60]}__ in {folder.name!r}; there are: {known}",
            field="prompt",
        ) from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise SafelightError(f"wildcard {name[:60]}.txt has no lines", field="prompt")
    return found


def _take_weight(option: list[_Node]) -> float:
    """Return an option's weight, and take it off its text."""
    if option and isinstance(option[0], str) and (weight := _WEIGHT.match(option[0])):
        option[0] = option[0][weight.end() :]
        return float(weight[1])
    return 1.0


def _parse(text: str) -> list[_Node]:
    """Return the tree of a text. A brace without a partner is text, as is a bar outside braces."""
    root: list[_Node] = []
    stack: list[_Choice] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == "{":
            stack.append(_Choice())
        elif token == "|" and stack:
            stack[-1].options.append([])
        elif token == "}" and stack:
            closed = stack.pop()
            _append(stack[-1].options[-1] if stack else root, closed)
        else:
            _append(stack[-1].options[-1] if stack else root, token)
    for one in stack:  # never closed
        for i, option in enumerate(one.options):
            _append(root, "|" if i else "{")
            root.extend(option)
    return root


def _append(nodes: list[_Node], node: _Node) -> None:
    """Append a node. Text after text is joined, so that counts and weights are not split."""
    last = nodes[-1] if nodes else None
    texts = [one for one in (last, node) if isinstance(one, str)]
    if len(texts) == 2 and not any(one.startswith(("\\", "__")) for one in texts):
        nodes[-1] = "".join(texts)
    else:
        nodes.append(node)
