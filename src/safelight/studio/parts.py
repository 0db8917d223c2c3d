"""Pieces that several tabs have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from safelight.studio.mount import KEPT_AT

_HERE = Path(__file__).parent
HEAD = f"<script>{(_HERE / 'studio.js').read_text('utf-8')}</script>"
STYLE = (_HERE / "studio.css").read_text("utf-8")

# Each name in quotes is an event that Python can listen to, with the picture's id as `event.id`.
_CALL = "safelight.%s(element, {trigger, watch, props}, ['use', 'recall', 'inside'])"


def plain(*fields: Any) -> None:
    """Give the function of an event what the page sends: Request says what is wrong with a value
    in a sentence, Gradio in terms of its own.
    """
    for field in fields:
        field.preprocess = _as_it_is


def _as_it_is(payload: Any) -> Any:
    return payload


def problem(name: str) -> gr.HTML:
    """Where a tab says what went wrong, as a sentence; its text is escaped."""
    return _sentence(name, "problem", "alert")


def said(name: str) -> gr.HTML:
    """Where a tab says what it does."""
    return _sentence(name, "status", "status")


def _sentence(name: str, kind: str, role: str) -> gr.HTML:
    return gr.HTML(
        "",
        html_template=f'<p class="{kind}" role="{role}">{{{{value}}}}</p>',
        js_on_load=None,
        elem_id=f"{name}-{kind}",
    )


def now() -> Any:
    """What the server draws just now, and what it made last. Its value is a new job's id."""
    return gr.HTML(
        "",
        html_template='<div class="now"></div>',
        js_on_load=_CALL % "now",
        elem_id="now",
    )


def gallery() -> Any:
    """All that was made, with a field to search it."""
    return gr.HTML(
        "", html_template='<div class="find"></div>', js_on_load=_CALL % "find", elem_id="find"
    )


def progress(name: str) -> gr.HTML:
    """A bar; its value is a share of 1, or empty."""
    return gr.HTML(
        "",
        html_template='{{#if value}}<progress max="1" value="{{value}}" aria-label="progress">'
        "</progress>{{/if}}",
        js_on_load=None,
        elem_id=f"{name}-progress",
    )


def kept(name: str, alt: str) -> gr.HTML:
    """A picture of the data folder, with a link to save it; its value is the path there, or empty.

    Gradio's Image would copy it first, and has a button without a name.
    """
    return gr.HTML(
        "",
        html_template=f'{{{{#if value}}}}<a href="{KEPT_AT}{{{{value}}}}" download class="kept">'
        f'<img src="{KEPT_AT}{{{{value}}}}" alt="{alt}"></a>{{{{/if}}}}',
        js_on_load=None,
        elem_id=f"{name}-picture",
    )
