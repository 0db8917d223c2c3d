"""Components that several tabs use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from safelight.request import Request
from safelight.server.callers import Caller, caller_of
from safelight.settings import settings_of
from safelight.studio.paths import KEPT_AT

_HERE = Path(__file__).parent
_SCRIPTS = [(_HERE / name).read_text("utf-8") for name in ("studio.js", "form.js", "words.js")]
_USUAL = {
    name: setting.default
    for name, setting in settings_of(Request).items()
    if isinstance(setting.default, bool | int | float | str) and not setting.about.default
}
"""The values of settings that are the same for every model: a picture's dialog leaves them out."""
_SCRIPTS.append(f"safelight.usual = {json.dumps(_USUAL)};")
HEAD = "".join(f"<script>{script}</script>" for script in _SCRIPTS)
STYLE = (_HERE / "studio.css").read_text("utf-8")

# Each name in quotes is an event that Python can listen to; `event.id` is the picture's id.
_EVENTS = "['use', 'edit', 'guide', 'prompt', 'recall', 'inside']"
_CALL = f"safelight.%s(element, {{trigger, watch, props}}, {_EVENTS})"
_CHOOSE = "safelight.model(element, {trigger, watch, props}, ['choose'])"


def plain(*fields: Any) -> None:
    """Pass values from the page to the event's function unchecked. Request reports a wrong value in
    a sentence; Gradio's own message would name its component.
    """
    for field in fields:
        field.preprocess = _unchanged


def _unchanged(payload: Any) -> Any:
    return payload


def problem(name: str) -> gr.HTML:
    """A line for a tab's error, as text (escaped). name: of the tab."""
    return _line(name, "problem", "alert")


def status(name: str) -> gr.HTML:
    """A line for what a tab is doing, as text (escaped). name: of the tab."""
    return _line(name, "status", "status")


def _line(name: str, kind: str, role: str) -> gr.HTML:
    return gr.HTML(
        "",
        html_template=f'<p class="{kind}" role="{role}">{{{{value}}}}</p>',
        js_on_load=None,
        elem_id=f"{name}-{kind}",
    )


def chooser(model: str) -> Any:
    """The list of models. Its value is the name of the one that is chosen; model: the first.

    It has the event "choose", for when a person chooses another one.
    """
    return gr.HTML(
        model, html_template='<div class="model"></div>', js_on_load=_CHOOSE, elem_id="model"
    )


def now() -> Any:
    """The jobs being drawn and the latest pictures. Its value is the id of the job to show."""
    return gr.HTML(
        "",
        html_template='<div class="now"></div>',
        js_on_load=_CALL % "now",
        elem_id="now",
    )


def gallery() -> Any:
    """All pictures, with a search field."""
    return gr.HTML(
        "", html_template='<div class="find"></div>', js_on_load=_CALL % "find", elem_id="find"
    )


def progress(name: str) -> gr.HTML:
    """A progress bar. Its value is from 0 to 1, or empty to hide it."""
    return gr.HTML(
        "",
        html_template='{{#if value}}<progress max="1" value="{{value}}" aria-label="progress">'
        "</progress>{{/if}}",
        js_on_load=None,
        elem_id=f"{name}-progress",
    )


def kept(name: str, alt: str) -> gr.HTML:
    """A picture of the data folder, with a link to save it. Its value is the path there, or empty.

    Gradio's Image copies the picture first, and has a button without an accessible name.
    """
    return gr.HTML(
        "",
        html_template=f'{{{{#if value}}}}<a href="{KEPT_AT}{{{{value}}}}" download class="kept">'
        f'<img src="{KEPT_AT}{{{{value}}}}" alt="{alt}"></a>{{{{/if}}}}',
        js_on_load=None,
        elem_id=f"{name}-picture",
    )


def asker(by: gr.Request) -> Caller:
    """Return who sent an event of the page."""
    return Caller() if by.request is None else caller_of(by.request.scope)
