"""Steps that a GPU replays from a recording train like steps that Python starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.train.loop import Draw, fit
from safelight.train.plan import Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

PLAN = Plan(steps=40, batch=16, learning_rate=1e-2, warmup=2)


def trained(folder: Path, on_device: bool, log: Callable[[str], None]) -> dict[str, Tensor]:
    """Return the weights of a small network that learned to find noise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1))
    rng = torch.Generator("cuda").manual_seed(1)
    data = torch.randn(64, 4, 8, 8, generator=rng, device="cuda")

    def loss_of(run: Any, draw: Draw) -> Tensor:
        clean = data[draw.pick(64, PLAN.batch)]
        noise = draw.normal(clean.shape)
        return (run(clean + noise) - noise).square().mean()

    fit(net, loss_of, PLAN, folder, on_device=on_device, log=log)
    return net.state_dict()


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-4) for name in one)


def test_a_recording_trains_as_python_does(tmp_path: Path) -> None:
    lines: list[list[str]] = [[], []]
    plain = trained(tmp_path / "plain", False, lines[0].append)
    recorded = trained(tmp_path / "recorded", True, lines[1].append)
    losses = [[line.split("loss ")[1].split()[0] for line in said] for said in lines]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 10
    assert alike(plain, recorded)


def test_a_recording_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 20/"):
            raise KeyboardInterrupt

    whole = trained(tmp_path / "whole", True, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", True, stop)
    assert alike(whole, trained(tmp_path / "parts", True, lambda _: None))
