"""Take `<kind:…>` out of a prompt, which is A1111's way to name LoRAs."""

import re

_ANY = re.compile(r"<(\w++):([^<>]*+)>")
_LORA = re.compile(r"<(lora|lyco):([^<>]*+)>")


def split_networks(
    text: str, *, loras_alone: bool = False
) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """Return a prompt without its `<kind:…>`, and what stood in them, split at the colons.

    loras_alone: other kinds are text.
    """
    pattern = _LORA if loras_alone else _ANY
    return pattern.sub("", text), tuple((m[1], *m[2].split(":")) for m in pattern.finditer(text))


def is_lora(network: tuple[str, ...]) -> bool:
    """Return whether it is a LoRA or one of its kin; `lyco` is what A1111 once called those."""
    return network[0] in ("lora", "lyco")
