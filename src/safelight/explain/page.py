"""Write a story as one HTML page that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from PIL import Image
from torch import Tensor

from safelight import __version__
from safelight.explain.forward import SHARES
from safelight.explain.texts import (
    ATTENTION,
    FORWARD,
    PARTS,
    SETTINGS,
    TEXT_ENCODER,
    VIEWS,
    Text,
)
from safelight.explain.watch import Moment, Story
from safelight.picture import from_tensor
from safelight.sampling import SAMPLERS

LARGEST = 256
"""Side in pixels of a step's picture; the finished picture is twice as large."""

SMALL = 128
"""Pictures up to this side are stored without loss."""

LONG = 100
"""Letters of a prompt. A longer one is set smaller; it is cut at four times as many."""

MASK = 32
"""Side of an attention map, which the browser enlarges."""

WIDTH, HEIGHT = 600, 150
"""Size of the chart, in its own units."""

BEGIN_AT = 1 / 3
"""The step that the page opens at, as a share of all: a shape is visible, but not finished."""


def page(story: Story) -> str:
    """Return the HTML page of a story, with its pictures inside.

    Texts are escaped, so that no prompt can add a tag or a script. A policy in the page's head
    forbids every script but its own.
    """
    moments, settings = story.moments, story.result.settings
    prompt = settings["prompt"]
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    views = _views(story)
    shown = {name: VIEWS[name] for name in VIEWS if name in views}
    parts = [*(["autoencoder"] if story.colours is not None else []), story.network]
    return Template(_part("page.html")).substitute(
        script_hash=f"sha256-{digest}",
        title=escape(f"{prompt[:80] or 'Without a prompt'}: step by step"),
        style=_part("page.css"),
        length="long" if len(prompt) > LONG else "short",
        heading=escape(f"“{_short(prompt)}”" if prompt else "A picture without a prompt"),
        lead="This page shows how one picture was drawn. Move through its steps with the slider or "
        "the arrow keys.",
        facts=_facts(story),
        picture=_uri(story.picture, 2 * LARGEST),
        diffusion_title=escape(PARTS["diffusion"].title),
        diffusion=escape(PARTS["diffusion"].body),
        forward="".join(
            _figure(_uri(one.picture), f"σ {_number(one.sigma)}") for one in story.forward
        ),
        forward_note=escape(FORWARD[story.network]),
        chart_width=WIDTH,
        chart_height=HEIGHT,
        curve=_curve(story),
        sampler=_block(PARTS["sampler"]),
        views="".join(_view(name, text) for name, text in shown.items()),
        parts="".join(_block(PARTS[name]) for name in parts),
        attention=_attention(story),
        settings="".join(_setting(name, story, views) for name in SETTINGS),
        footer=escape(
            f"Made by Safelight {__version__} with {story.result.model}, SHA-256 "
            f"{story.result.sha256}, on {story.result.device} in {story.result.dtype}."
        ),
        last=len(moments) - 1,
        first=round((len(moments) - 1) * BEGIN_AT),
        steps=moments[0].steps,
        step="step" if moments[0].steps == settings["steps"] else "evaluation",
        story=_json({"views": views, "moments": [_moment(story, m) for m in moments]}),
        script=script,
    )


def _part(name: str) -> str:
    return (files("safelight.explain") / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element around it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _uri(picture: Image.Image, largest: int = LARGEST) -> str:
    """Return the picture, reduced to `largest`, as a data URI."""
    picture = picture.convert("RGB")
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # Lossy compression would blur a small picture.
    picture.save(file, "WEBP", lossless=max(picture.size) <= SMALL, quality=85, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _mask(attention: Tensor, shown: tuple[float, float]) -> str:
    """Return a map, float32 [h, w], as a picture that is opaque where the map is strongest.

    shown: see `Moment`; the rest is cut off.
    """
    low, high = attention.min(), attention.max()
    strength = from_tensor(((attention - low) / (high - low + 1e-9))[None] * 2 - 1)
    box = (0, 0, strength.width * shown[0], strength.height * shown[1])
    opaque = strength.resize((MASK, MASK), Image.Resampling.BICUBIC, box)
    file = io.BytesIO()
    Image.merge("LA", (Image.new("L", opaque.size), opaque)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- what changes with the step ------------------------------------------------------------------


def _views(story: Story) -> dict[str, list[str]]:
    """Return the pictures of every step as data URIs, by view, without views that have none."""
    pictures = {
        "noisy": [moment.noisy for moment in story.moments],
        "latents": [moment.latents for moment in story.moments],
        "clean": [moment.clean for moment in story.moments],
        "guidance": [moment.guidance for moment in story.moments],
        "unguided": [moment.unguided for moment in story.moments],
    }
    return {
        name: [_uri(picture) for picture in found if picture is not None]
        for name, found in pictures.items()
        if found[0] is not None
    }


def _moment(story: Story, moment: Moment) -> dict[str, Any]:
    x, y = _point(story, moment.step - 1)
    maps = [] if moment.attention is None else list(moment.attention)
    shares = [float(one.mean()) for one in maps]
    return {
        "step": str(moment.step),
        "sigma": _number(moment.sigma),
        "timestep": _number(moment.timestep),
        "noise": _percent(story.levels[moment.step - 1].noise_share),
        "x": x,
        "y": y,
        "masks": [_mask(one, moment.shown) for one in maps],
        "shares": [_percent(share) for share in shares],
        "rest": _percent(1 - sum(shares)),
    }


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _short(text: str) -> str:
    return text if len(text) <= 4 * LONG else f"{text[: 4 * LONG]}…"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


# --- what stays the same -------------------------------------------------------------------------


def _point(story: Story, i: int) -> tuple[float, float]:
    """Return the place on the chart of the level before step i + 1."""
    x = WIDTH * i / (len(story.levels) - 1)
    return round(x, 1), round(HEIGHT * (1 - story.levels[i].noise_share), 1)


def _curve(story: Story) -> str:
    points = [_point(story, i) for i in range(len(story.levels))]
    line = " ".join(f"{x},{y}" for x, y in points)
    stops = ""
    if len(points) <= 60:
        stops = "".join(f'<circle class="stop" cx="{x}" cy="{y}" r="4"/>' for x, y in points)
    area = f'<path class="area" d="M0,{HEIGHT} L{line} L{WIDTH},{HEIGHT} Z"/>'
    return f'{area}<path d="M{line}"/>{stops}'


def _block(text: Text) -> str:
    return f"<div><h3>{escape(text.title)}</h3><p>{escape(text.body)}</p></div>"


def _figure(uri: str, caption: str) -> str:
    return f'<figure><img src="{uri}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'


def _live(view: str, at: str = "") -> str:
    at = at and f' data-at="{at}"'
    return f'<img data-view="{view}"{at} alt="">'


def _view(name: str, text: Text) -> str:
    return (
        f"<figure>{_live(name)}<figcaption><h3>{escape(text.title)}</h3>"
        f"{escape(text.body)}</figcaption></figure>"
    )


def _facts(story: Story) -> str:
    settings, evaluations = story.result.settings, story.moments[0].steps
    steps = str(settings["steps"])
    if evaluations != settings["steps"]:
        steps += f" ({evaluations} evaluations of the network)"
    facts = {
        "model": story.result.model,
        "sampler": settings["sampler"],
        "steps": steps,
        "seed": settings["seed"],
    }
    return "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
    )


def _attention(story: Story) -> str:
    if story.moments[0].attention is None:
        return ""
    words = "".join(
        f'<figure><div class="lit">{_live("clean")}<div>{_live("clean")}</div></div>'
        f"<figcaption><h3>{escape(word.text)}</h3><span data-share></span> of the attention"
        "</figcaption></figure>"
        for word in story.words
    )
    return (
        "<section><h2>Attention to each word</h2>"
        f"{_block(TEXT_ENCODER[story.network])}"
        f'<p class="note">{escape(ATTENTION[story.network])} <b data-text="rest"></b> here.</p>'
        f'<div class="words">{words}</div></section>'
    )


def _setting(name: str, story: Story, views: dict[str, list[str]]) -> str:
    value, live = _setting_here(name, story, views)
    text = SETTINGS[name]
    return (
        f'<div class="card"><div class="live">{live}</div><div>'
        f"<h3>{escape(text.title)} <span>{escape(value)}</span></h3><p>{escape(text.body)}</p>"
        "</div></div>"
    )


def _setting_here(name: str, story: Story, views: dict[str, list[str]]) -> tuple[str, str]:
    """Return a setting's value in this story, and the picture or curve that shows it, as HTML."""
    settings = story.result.settings
    curve = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true"><use href="#curve"/></svg>'
    guided, nothing = "guidance" in views, '<span class="big">–</span>'
    match name:
        case "sampler":
            sampler = SAMPLERS[settings["sampler"]]
            return sampler.a1111 or sampler.name, _live("noisy")
        case "schedule":
            return settings["schedule"] or "the model's own", curve
        case "steps":
            return str(settings["steps"]), '<span class="big" data-text="step"></span>'
        case "guidance_scale":
            live = f"{_live('unguided')}<small>without guidance</small>" if guided else nothing
            return _number(settings["guidance_scale"]) if guided else "off", live
        case "seed":
            return str(settings["seed"]), f"{_live('noisy', '0')}<small>the start</small>"
        case "strength":
            if settings["strength"] is not None:
                live = f"{_live('noisy', '0')}<small>the start</small>"
                return _number(settings["strength"]), live
            live = f'<img src="{_uri(story.forward[-2].picture)}" alt="">'
            return "no picture", f"{live}<small>the start at {SHARES[-2]}</small>"
        case "size":
            width, height = story.picture.size
            channels, h, w = story.shape
            if "latents" not in views:
                return f"{width} × {height}", _live("noisy")
            live = f"{_live('latents')}<small>{w} × {h} latents of {channels} numbers</small>"
            return f"{width} × {height}", live
        case _:
            negative = _short(settings["negative_prompt"])
            return negative or "empty", _live("guidance") if guided else nothing
