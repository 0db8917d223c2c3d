"""The ranges of the settings of a picture, as types."""

from typing import Annotated

from PIL.Image import Image
from pydantic import BeforeValidator, Field

from safelight.request_pictures import MAX_CONTROLS
from safelight.settings import Number, Whole
from safelight.sizes import MAX_SIDE, MIN_SIDE, SIDE_STEP

MAX_SEED = 2**63 - 1


def _as_one(value: object) -> object:
    """Return a list as a tuple, and its value if it has only one."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else tuple(value)
    return value


_AS_ONE, _SEVERAL = BeforeValidator(_as_one), Field(min_length=2, max_length=MAX_CONTROLS)

Side = Annotated[Whole, Field(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=SIDE_STEP)]
Steps = Annotated[Whole, Field(ge=1, le=1000)]
# Above 100 the two estimates are pulled so far apart that half precision overflows.
Guidance = Annotated[Number, Field(ge=0, le=100)]
Seed = Annotated[Whole, Field(ge=0, le=MAX_SEED)]
Count = Annotated[Whole, Field(ge=1, le=64)]
Shift = Annotated[Number, Field(ge=0.01, le=100)]
Strength = Annotated[Number, Field(gt=0, le=1)]
IpAdapterScale = Annotated[Number, Field(ge=0, le=10)]
Share = Annotated[Number, Field(ge=0, le=1)]
_Scale = Annotated[Number, Field(ge=0, le=10)]
# Of the pictures that guide: one for all, or one for each.
ControlImage = Annotated[Image | Annotated[tuple[Image, ...], _SEVERAL], _AS_ONE]
ControlScale = Annotated[_Scale | Annotated[tuple[_Scale, ...], _SEVERAL], _AS_ONE]
ControlShare = Annotated[Share | Annotated[tuple[Share, ...], _SEVERAL], _AS_ONE]
ClipSkip = Annotated[Whole, Field(ge=1, le=48)]
# Sizes that SDXL is told. They need not be sizes that can be drawn.
ToldSide = Annotated[Whole, Field(ge=1, le=2**15)]
ToldPlace = Annotated[Whole, Field(ge=0, le=2**15)]
Score = Annotated[Number, Field(ge=0, le=10)]
Level = Annotated[Whole, Field(ge=0, le=3)]
CacheEvery = Annotated[Whole, Field(ge=1, le=100)]
CacheBranch = Annotated[Whole, Field(ge=0, le=100)]
MaskPadding = Annotated[Whole, Field(ge=0, le=MAX_SIDE)]
MaskBlur = Annotated[Number, Field(ge=0, le=64)]
UpscalerName = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")]
HiresScale = Annotated[Number, Field(ge=1, le=4)]
