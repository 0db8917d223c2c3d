"""How A1111 and ComfyUI read a prompt, written from their published rules (docs/prompts.md).

Only Safelight's table of words is used here. The algorithms are the plainest possible: quadratic,
recursive, one string at a time, with transformers' tokenizer and text encoder.
"""

import contextlib
import random
import re

import lark
import torch

A1111_SCHEDULE = lark.Lark(
    r"""
    start: (_things | STRAY)*
    _things: (group | turns | switch | WORDS)+
    content: (group | turns | switch | WORDS)*
    group: "(" content (":" content)? ")" -> round
         | "[" content "]" -> square
    turns: "[" content ("|" content)+ "]"
    switch: "[" (content ":")? content ":" WHEN "]"
    STRAY: /[\[\]():]/
    WHEN.2: /\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*/
    WORDS: /([^\\\[\]():|]|\\.)+/s
    """,
    parser="earley",
    lexer="dynamic",
    keep_all_tokens=False,
)


def a1111_emphasis(text):
    """[[text, weight]], "BREAK" with weight -1: brackets multiply all that they reached."""
    found, round_, square = [], [], []

    def multiply(start, factor):
        for one in found[start:]:
            if one[0] != "BREAK":
                one[1] *= factor

    at = 0
    while at < len(text):
        rest = text[at:]
        number = re.match(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)", rest)
        if number and round_:
            multiply(round_.pop(), float(number[1]))
            at += number.end()
        elif re.match(r"\\[()\[\]\\]", rest):
            found.append([rest[1], 1.0])
            at += 2
        elif rest[0] == "(":
            round_.append(len(found))
            at += 1
        elif rest[0] == "[":
            square.append(len(found))
            at += 1
        elif rest[0] == ")" and round_:
            multiply(round_.pop(), 1.1)
            at += 1
        elif rest[0] == "]" and square:
            multiply(square.pop(), 1 / 1.1)
            at += 1
        elif word := re.match(r"\s*\bBREAK\b\s*", text[at:]):
            found.append(["BREAK", -1])
            at += word.end()
        else:
            found.append([rest[0], 1.0])
            at += 1
    for start in round_:
        multiply(start, 1.1)
    for start in square:
        multiply(start, 1 / 1.1)
    merged = []
    for said, weight in found:
        if merged and "BREAK" not in (said, merged[-1][0]) and abs(merged[-1][1] - weight) < 1e-12:
            merged[-1][0] += said
        else:
            merged.append([said, weight])
    return merged or [["", 1.0]]


def a1111_groups(tokenizer, said, named=None):
    """[ids] that stay together: each token, and all vectors of an embedding.

    named: embeddings by name. An embedding is where its name's tokens are, the longest name first.
    """
    tokens = tokenizer(said, add_special_tokens=False).input_ids
    names = {name: tokenizer(name, add_special_tokens=False).input_ids for name in named or {}}
    found = []
    while tokens:
        here = [name for name, ids in names.items() if tokens[: len(ids)] == ids]
        if here:
            name = max(here, key=lambda name: len(names[name]))
            found.append(named[name])
            tokens = tokens[len(names[name]) :]
        else:
            found.append(tokens[:1])
            tokens = tokens[1:]
    return found


def a1111_chunks(tokenizer, pieces, named=None):
    """[(ids, weights)] of 77: full chunks end after a comma that is at most 20 tokens back."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    chunks, now, last = [], [], -1

    def finish():
        ids, weights = [begin, *(i for i, _ in now), end], [1.0, *(w for _, w in now), 1.0]
        chunks.append((ids + [pad] * (77 - len(ids)), weights + [1.0] * (77 - len(weights))))

    for said, weight in pieces:
        if said == "BREAK":
            finish()
            now, last = [], -1
            continue
        for tokens in a1111_groups(tokenizer, said, named):
            if tokens == [comma]:
                last = len(now)
            elif len(now) == 75 and last != -1 and 75 - last <= 20:
                later = now[last + 1 :]
                now = now[: last + 1]
                finish()
                now, last = later, -1
            if len(now) == 75 or len(now) + len(tokens) > 75:
                finish()
                now, last = [], -1
            now += [(token, weight) for token in tokens]
    if now or not chunks:
        finish()
    return chunks


def states(encoder, ids, clip_skip=1, mask=None):
    """[1, 77, width] of one chunk, from transformers' own CLIP."""
    with torch.no_grad():
        out = encoder(torch.tensor([ids]), attention_mask=mask, output_hidden_states=True)
        return encoder.final_layer_norm(out.hidden_states[-clip_skip])


def a1111_states(tokenizer, encoder, texts, emphasis="original", clip_skip=1, named=None):
    """The states of the stages of one prompt, encoded together."""
    read = [[[t, 1.0]] if emphasis == "none" else a1111_emphasis(t) for t in texts]
    chunks = [a1111_chunks(tokenizer, pieces, named) for pieces in read]
    [empty] = a1111_chunks(tokenizer, [["", 1.0]])
    longest = max(len(one) for one in chunks)
    found = [[] for _ in texts]
    for i in range(longest):
        rows = [one[i] if i < len(one) else empty for one in chunks]
        z = torch.cat([states(encoder, ids, clip_skip) for ids, _ in rows])
        if emphasis not in ("ignore", "none"):
            before = z.mean()
            z = z * torch.tensor([weights for _, weights in rows])[..., None]
            if emphasis == "original":
                z = z * (before / z.mean())
        for one, row in zip(found, z, strict=True):
            one.append(row[None])
    return [torch.cat(one, dim=1) for one in found]


def a1111_schedule(text, steps):
    """[[last step, text]], by an Earley parser of the grammar: ambiguous, slow, and complete."""
    try:
        tree = A1111_SCHEDULE.parse(text)
    except lark.exceptions.LarkError:
        return [[steps, text]]

    def number(when):
        value = float(when) * steps if "." in when else float(when)
        return min(steps, int(value))

    def at(node, step):
        if isinstance(node, lark.Token):
            return str(node)
        parts = [at(child, step) for child in node.children]
        if node.data == "turns":
            return parts[(step - 1) % len(parts)]
        if node.data == "switch":
            before = parts[0] if len(parts) == 3 else ""
            return before if step <= number(parts[-1]) else parts[-2]
        if node.data == "round":
            return "(" + ":".join(parts) + ")"
        return "[" + parts[0] + "]" if node.data == "square" else "".join(parts)

    ends = {steps}
    for node in tree.iter_subtrees():
        if node.data == "turns":
            ends |= set(range(1, steps + 1))
        if node.data == "switch" and number(node.children[-1]) >= 1:
            ends.add(number(node.children[-1]))
    return [[end, at(tree, end)] for end in sorted(ends)]


def comfy_pieces(text, weight=1.0):
    """[(text, weight)]: items in brackets, each read again inside."""
    if weight == 1.0:
        text = text.replace(r"\)", "\0\1").replace(r"\(", "\0\2")
    items, item, depth = [], "", 0
    for letter in text:
        if letter == "(" and depth == 0:
            items.append(item)
            item = ""
        item += letter
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == ")" and depth == 0:
            items.append(item)
            item = ""
    found = []
    items.append(item)
    for item in filter(None, items):
        if len(item) >= 2 and item[0] == "(" and item[-1] == ")":
            inside, inner = item[1:-1], weight * 1.1
            colon = inside.rfind(":")
            if colon > 0:
                with contextlib.suppress(ValueError):
                    inside, inner = inside[:colon], float(inside[colon + 1 :])
            found += comfy_pieces(inside, inner)
        else:
            found.append((item, weight))
    return found


def comfy_groups(tokenizer, said, named):
    """[ids] that stay together: the words of a piece, and all vectors of `embedding:name`."""
    first, *others = re.split(r"(?<=\s)embedding:", f" {said}")
    found = [first[1:]] if first[1:] else []
    for one in others:
        name, *words = one.split()
        rest = " ".join(words)
        if name not in named:
            bare = name.strip(",")
            rest = f"{name[len(bare) :]} {rest}"
            name = bare
        found += [named[name], rest]
    return [
        tokenizer(one, add_special_tokens=False).input_ids if isinstance(one, str) else one
        for one in found
    ]


def comfy_chunks(tokenizer, text, named=None):
    """[(ids, weights)] of 77: pieces of fewer than 8 tokens are not cut."""
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    chunks = [[(begin, 1.0)]]
    for said, weight in comfy_pieces(text):
        said = said.replace("\0\1", ")").replace("\0\2", "(")
        for group in comfy_groups(tokenizer, said, named or {}):
            piece = [(i, weight) for i in group]
            large = len(piece) >= 8
            while piece:
                room = 76 - len(chunks[-1])
                if len(piece) <= room:
                    chunks[-1] += piece
                    break
                if large:
                    chunks[-1] += piece[:room]
                    piece = piece[room:]
                chunks.append([(begin, 1.0)])
    full = [[*one, (end, 1.0), *[(pad, 1.0)] * (76 - len(one))] for one in chunks]
    return [([i for i, _ in one], [w for _, w in one]) for one in full]


def comfy_states(tokenizer, encoder, text, clip_skip=1, named=None):
    """Away from the empty prompt's states, token by token."""
    [(nothing, _)] = comfy_chunks(tokenizer, "")
    empty = states(encoder, nothing, clip_skip)
    found = []
    for ids, weights in comfy_chunks(tokenizer, text, named):
        z = states(encoder, ids, clip_skip)
        for place, weight in enumerate(weights):
            if weight != 1.0:
                z[0, place] = (z[0, place] - empty[0, place]) * weight + empty[0, place]
        found.append(z)
    return torch.cat(found, dim=1)


WORDS = """
a an the red blue apple house mountain lake, castle, knight. portrait; of in with light dark oil
painting masterpiece, 8k best-quality don't naïve 山 3.5 (e.g.) @!
""".split()  # noqa: SIM905


def prompts(count, around, seed=0, longest=120, depth=2):
    """Random prompts of up to so many words. around: templates for a few words, `{}` in them.

    depth: how deep they are nested.
    """
    draw = random.Random(seed)

    def words(most):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    def some(depth):
        parts = []
        for _ in range(draw.randint(1, 4)):
            template = draw.choice([*around, "{}", "{}"])
            inside = some(depth - 1) if depth and draw.random() < 0.4 else words(6)
            if template[0] == '"':
                inside = inside.replace('"', "")  # quotes in quotes are no syntax anywhere
            parts.append(template.replace("{}", inside))
            parts.append(draw.choice([" ", ", ", " and "]))
        return "".join(parts)

    found = []
    for i in range(count):
        text = some(depth)
        if i % 5 == 0:
            text += words(longest)
        found.append(text)
    return found
