"""What suits a model, for the form: its size, its defaults, and the settings that it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safelight.defaults import with_level
from safelight.errors import SafelightError
from safelight.hires import HIRES
from safelight.request import Request
from safelight.request_pictures import REFERENCES
from safelight.sampling import SAMPLERS
from safelight.server.hub import Hub
from safelight.server.names import Names
from safelight.settings import Setting, settings_of
from safelight.weights.plan import Plan

NATIVE = "0: the model's own"
SIZE = (512, 512)
"""The size, width and height, of a model of which nothing is known."""

EXAMPLE = "three teddy bears on a yellow background"
"""The prompt that an empty box shows, and that is drawn if it stays empty."""


async def suits_of(hub: Hub, model: str | None) -> Suits:
    """Return what suits a model. Raises SafelightError if the server has no model of that name."""
    if not isinstance(model, str | None):  # events come from strangers
        raise SafelightError("model must be the name of a model", field="model")
    name = await hub.find_model(model)
    return await asyncio.to_thread(Suits.of, hub.names, name, await hub.defaults(name))


@dataclass(frozen=True)
class Suits:
    """What suits a model. The defaults of the fields are for a model that is not known here.

    defaults: its best settings (`defaults_of`). size: its own width and height. fixed_size: whether
    it draws no other size. reads: of the settings that only some models read, those that it reads;
    None for all. controlnets, ip_adapter: the names of its ControlNets and its IP-Adapter, if it
    has them. plan: from its headers.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    uses_prompt: bool = True
    size: tuple[int, int] | None = None
    fixed_size: bool = False
    reads: frozenset[str] | None = None
    controlnets: tuple[str, ...] = ()
    plan: Plan | None = None
    ip_adapter: str | None = None

    @classmethod
    def of(cls, names: Names, model: str | None, defaults: Mapping[str, Any]) -> Suits:
        """Return what suits a model, from its headers. model: None for the server's own."""
        try:
            plan = names.plan(model)
            family, size, refiner = plan.family, plan.native_size, names.refiner(model)
            control, adapter = names.controlnets(model), names.ip_adapter(model)
        except (OSError, SafelightError):  # the model is on another machine
            return cls(defaults)
        reads = family.reads(refiner, bool(control), adapter is not None)
        more = {"controlnets": tuple(control), "plan": plan, "ip_adapter": adapter}
        return cls(defaults, family.uses_prompt, size, family.fixed_size, reads, **more)

    def first(self, request_type: type[Request] = Request, fast: int = 0) -> Request:
        """Return the request of the form's first values, at a level of `fast`."""
        request = request_type(fast=fast)
        if self.plan is not None:
            request = with_level(request, self.plan.family, self.plan.notes)
        return request.with_defaults({"sampler": "dpmpp_2m", **self.defaults})

    def has(self, setting: Setting) -> bool:
        """Return whether the model reads a setting."""
        if self.fixed_size and setting.name in ("width", "height", *HIRES):
            return False
        return self.reads is None or not setting.about.some_models or setting.name in self.reads

    @property
    def samplers(self) -> list[str]:
        """The names of the samplers that the model takes; all if it is not known here."""
        flow = self.plan is not None and self.plan.scheduler.is_flow
        return [name for name, one in SAMPLERS.items() if not flow or one.flow is not None]

    @property
    def guided(self) -> bool:
        """Whether the model has a ControlNet, or may have one as it is not known here."""
        return self.has(settings_of(Request)["control_image"])

    @property
    def guides(self) -> int:
        """How many pictures may guide the model on the page."""
        return max(1, len(self.controlnets))

    @property
    def prompted(self) -> bool:
        """Whether the model has an IP-Adapter, or may have one as it is not known here."""
        return self.has(settings_of(Request)["ip_adapter_image"])

    @property
    def edits(self) -> bool:
        """Whether the model edits reference pictures, or may do so as it is not known here."""
        taught = self.plan is None or self.plan.family.edits
        return taught and self.has(settings_of(Request)[REFERENCES])

    def side(self, place: int) -> str:
        """Return the hint below the field of width (0) or height (1)."""
        return NATIVE if self.size is None else f"{NATIVE}, {self.size[place]}"

    @property
    def placeholder(self) -> str:
        """The text in the prompt's box while it is empty."""
        return EXAMPLE if self.uses_prompt else "this model takes no prompt: leave it empty"
