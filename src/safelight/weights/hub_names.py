"""Names of repositories on the hub and of files in them. Needs no network."""

from __future__ import annotations

import re
from dataclasses import dataclass

from safelight.weights.library import ENDINGS

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?")
"""A hub id: "org/name", or "org/name@revision" with a branch, a tag or a commit."""

_FILE = re.compile(rf"{HUB_ID.pattern}/([^\\\0]+)")
_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/([^/?#]+)(/[^?#]+)?)?/?(?:[?#].*)?"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the hub, or a file in it.

    repo: "org/name". revision: a branch, a tag or a commit; None: the main branch. file: its place
    in the repository; None for the repository as a whole.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """Return the name as `hub_name` takes it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


def hub_name(text: str) -> HubName | None:
    """Return what a name of the hub means, None if it is none.

    text: "org/name", "org/name@revision", either with the place of a file of weights behind it, as
    in "org/name/folder/file.safetensors"; or the address of one of these on huggingface.co.
    """
    if address := _ADDRESS.fullmatch(text):
        repo, revision, file = address.groups()
        text = repo + (f"@{revision}" if revision and revision != "main" else "") + (file or "")
    if ".." in text:
        return None
    if (found := HUB_ID.fullmatch(text)) is not None:
        # "models/sd15.safetensors" is a file that is not there, not a repository.
        return None if text.lower().endswith(ENDINGS) else HubName(*found.groups())
    found = _FILE.fullmatch(text)
    if found is None or not text.lower().endswith(ENDINGS) or not all(found[3].split("/")):
        return None
    return HubName(*found.groups())
