"""The memory that a model takes is told, and refused if too much, before it is loaded."""

import json
import math
import struct

import pytest
import torch

from safelight.errors import SafelightError
from safelight.families.sdxl import VARIANTS
from safelight.fast import memory
from safelight.weights.budget import budget, check_memory
from safelight.weights.find import find
from safelight.weights.frames import _Unfilled
from safelight.weights.names import original_names
from safelight.weights.plan import Plan, read_plan

HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return the plan of a sparse file of SDXL's full size."""
    family = VARIANTS[0]
    shapes = {}
    for part, config in family.configs.items():
        config_class, network_class = family.parts[part].load_classes()
        with torch.device("meta"), _Unfilled():
            state = network_class(config_class.from_dict(config)).state_dict()
        shapes[part] = {name: tuple(t.shape) for name, t in state.items()}
    end, header = 0, {}
    for key, one in original_names(family.sections(), shapes).items():
        rows, *rest = shapes[one.part][one.names[0]]
        shape = (len(one.names) * rows, *rest, *(1,) * one.conv)
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("budget") / "xl.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return read_plan(find(str(path)))


def dtypes(plan: Plan, dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dict.fromkeys(plan.weights, dtype)


def test_weights_are_those_that_stay_in_memory(plan: Plan) -> None:
    whole = budget(plan, dtypes(plan, HALF), fast=True, low_memory=False)
    assert whole.weights == 2 * (2_567_463_684 + 83_653_863)  # text encoders stay in the file
    low = budget(plan, dtypes(plan, HALF), fast=True, low_memory=True)
    assert low.weights < whole.weights / 2
    plain = budget(plan, dtypes(plan, FULL), fast=False, low_memory=True)
    assert plain.weights == 4 * sum(
        math.prod(w.shape) for those in plan.weights.values() for w in those.values()
    )
    assert whole.work == low.work < plain.work


def test_a_line_tells_all(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda: 12 * 10**9)
    line = str(budget(plan, dtypes(plan, HALF), fast=True, low_memory=False))
    assert line.startswith("memory: 5.3 GB of weights and ")
    assert line.endswith(" in all, of 12.0 GB that are free")


@pytest.mark.parametrize(
    ("total", "dtype", "low", "way"),
    [
        (10, FULL, False, "try low_memory"),
        (8, FULL, True, "try dtype bfloat16"),
        (7, HALF, False, "try low_memory"),
        (2, HALF, False, "no setting makes it fit"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    dtype: torch.dtype,
    low: bool,
    way: str,
) -> None:
    monkeypatch.setattr(memory, "total", lambda: total * 10**9)
    with pytest.raises(SafelightError, match=way) as caught:
        check_memory(plan, dtypes(plan, dtype), fast=True, low=low)
    assert len(str(caught.value)) <= 200
    monkeypatch.setattr(memory, "total", lambda: 64 * 10**9)
    assert check_memory(plan, dtypes(plan, dtype), fast=True, low=low).needed > 2**30
