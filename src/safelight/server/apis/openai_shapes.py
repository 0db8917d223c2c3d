"""The bodies, errors and pictures of OpenAI's images API."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastapi import Request as HttpRequest
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from safelight.errors import SafelightError
from safelight.families.control import CONTROL, IP_ADAPTER
from safelight.picture import encode
from safelight.request import Request
from safelight.request_pictures import MAX_REFERENCES, PICTURES, REFERENCES
from safelight.server.caged import MAX_JSON
from safelight.server.jobs import retry_after, status_of
from safelight.server.wording import clipped, public
from safelight.settings import Setting, settings_of
from safelight.sizes import allowed_size

if TYPE_CHECKING:
    from safelight.families import Family

# --- what is asked for ---------------------------------------------------------------------------


def _field(description: str, **limits: Any) -> Any:
    return Field(None, description=description, **limits)


_UNUSED = "text; it has no effect"

DALL_E = "dall-e-"
"""The beginning of the names of OpenAI's models whose pictures are addresses by default."""


class ImagesBody(BaseModel):
    """OpenAI's fields of both routes. A field's description is also the text of its error message.

    Further fields of a body are Safelight's own settings (`own_settings`), which Request checks.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, description="text of at most 16 KiB")
    model: str | None = _field("the name of a served model, or any of OpenAI's")
    n: int | None = _field("a whole number from 1 to 10", ge=1, le=10)
    size: str | None = _field("WIDTHxHEIGHT or auto", pattern="^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    response_format: Literal["url", "b64_json"] | None = _field("url or b64_json, the default")
    output_format: Literal["png", "jpeg", "webp"] | None = _field("png, the default, jpeg or webp")
    output_compression: int | None = _field("a whole number from 0 to 100", ge=0, le=100)
    stream: bool | None = _field("true or false")
    partial_images: int | None = _field("a whole number from 0 to 3", ge=0, le=3)
    quality: str | None = _field(_UNUSED)
    complexity: str | None = _field(_UNUSED)
    background: str | None = _field(_UNUSED)
    style: str | None = _field(_UNUSED)
    moderation: str | None = _field(_UNUSED)
    input_fidelity: str | None = _field(_UNUSED)
    user: str | None = _field(_UNUSED)
    safety_identifier: str | None = _field(_UNUSED)

    @property
    def form(self) -> str:
        """The format of the pictures: png, jpeg or webp."""
        return self.output_format or "png"

    @property
    def has_urls(self) -> bool:
        """Whether the answer has addresses: if requested, and by default for models of DALL·E.

        Addresses are the default of these models at OpenAI, and programs made for them rely on it.
        """
        silent = self.response_format is None and self.form == "png"
        return self.response_format == "url" or (silent and (self.model or "").startswith(DALL_E))


_THEIRS = {"width": "size", "height": "size", "count": "n", REFERENCES: "image"}
"""Settings that OpenAI has another name for."""


def own_settings(request_type: type[Request]) -> dict[str, Setting]:
    """Return the settings of a Request that a body may have as further fields."""
    left_out = {"prompt", *PICTURES, *CONTROL, *IP_ADAPTER, "unconditional", *_THEIRS}
    return {n: s for n, s in settings_of(request_type).items() if n not in left_out}


def body_of(request_type: type[Request], media_type: str, *files: str) -> dict[str, Any]:
    """Return the OpenAPI description of a body. files: names of pictures; the first is required."""
    schema = ImagesBody.model_json_schema()
    schema["properties"] |= {n: s.schema() for n, s in own_settings(request_type).items()}
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] += files[:1]
    content: dict[str, Any] = {"schema": schema}
    if not files:
        content["example"] = {"prompt": "a red apple", "n": 1}
    return {"requestBody": {"required": True, "content": {media_type: content}}}


def read_settings(fields: dict[str, Any], *, text: bool) -> tuple[ImagesBody, dict[str, Any]]:
    """Return OpenAI's fields of a body, and the settings of a Request without pictures.

    text: whether all values are strings, as in a form.
    """
    own = own_settings(Request)
    theirs = {name: value for name, value in fields.items() if name not in own}
    try:
        validate = ImagesBody.model_validate_strings if text else ImagesBody.model_validate
        body = validate(theirs)
    except ValidationError as error:
        raise _explained(error) from None
    settings = {
        name: own[name].parse(value) if text and isinstance(value, str) else value
        for name, value in fields.items()
        if name in own and value is not None
    }
    settings |= {"prompt": body.prompt, "count": body.n or 1}
    if body.size is not None and body.size != "auto":
        settings["width"], settings["height"] = map(int, body.size.split("x"))
    return body, settings


Files = dict[str, list[list[bytes]]]
"""The files of a form by their names, each in a list that a decoder empties."""


_TOO_LONG = (
    f"the texts of a form must have at most {MAX_JSON >> 20} MiB in all: "
    "image and mask must be uploaded, as files"
)


async def read_form(http: HttpRequest) -> tuple[ImagesBody, dict[str, Any], Files]:
    """Return OpenAI's fields, the settings, and the files of a form: images, and maybe a mask."""
    kind, options = parse_options_header(http.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise ApiError(400, "the body must be multipart/form-data, with the picture in it")
    # Python has codecs that raise anything, and some whose time grows with the square of the text.
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise ApiError(400, "the form's charset must be utf-8, or left out")
    fields: dict[str, Any] = {}
    own = own_settings(Request)
    files: Files = {}
    length = 0
    parts = await _form_of(http)
    try:
        for name, value in parts.multi_items():
            length += len(name) + (len(value) if isinstance(value, str) else 0)
            if length > MAX_JSON:
                raise ApiError(413, _TOO_LONG)
            plain = name.removesuffix("[]")
            if plain not in ("image", "mask"):
                if not isinstance(value, str):
                    raise ApiError(400, f"there is no file {_quoted(name)}; known: image, mask")
                listed = plain in own and own[plain].kind is tuple
                if name in fields and not listed:
                    raise ApiError(400, f"{_quoted(name)} is there more than once")
                if value and listed:
                    fields.setdefault(plain, []).append(value)
                elif value:  # empty is how forms, and the client, say null
                    fields[name] = value
            elif isinstance(value, str):
                raise ApiError(400, f"{plain} must be uploaded: no address is fetched", plain)
            elif len(files.get(plain, ())) == (MAX_REFERENCES if plain == "image" else 1):
                raise ApiError(400, f"{plain} must be {_MOST[plain]}, not more", plain)
            else:
                files.setdefault(plain, []).append([await value.read()])
    finally:
        await parts.close()
    body, settings = read_settings(fields, text=True)
    if "image" not in files:
        raise ApiError(400, "image is needed: a PNG, JPEG or WebP picture", "image")
    return body, settings, files


_MOST = {"image": f"at most {MAX_REFERENCES} pictures", "mask": "one picture"}


def check_files(files: Files, family: Family | None, model: str) -> None:
    """Raise ApiError for more pictures than a model reads. family: None if it is not known."""
    several = len(files["image"])
    if family is None or several == 1 or family.references >= several:
        return
    if family.references == 0:
        told = f"one picture, not several: {model} reads no reference pictures"
    else:
        told = f"one picture, and at most {family.references} with a mask, for {model}"
        if "mask" in files and several - 1 <= family.references:
            return
    raise ApiError(400, f"image must be {told}", "image")


async def _form_of(http: HttpRequest) -> FormData:
    """Return the parts of a form. Raises ApiError if a text is too long, such as a picture."""
    try:
        return await http.form(max_files=32, max_fields=64, max_part_size=MAX_JSON)
    except HTTPException as error:
        if "exceeded maximum size" in str(error.detail):
            raise ApiError(413, _TOO_LONG) from None
        raise


def edit_request(
    settings: dict[str, Any],
    pictures: Sequence[Image.Image],
    alpha: Image.Image | None,
    *,
    separate: bool,
    family: Family | None = None,
) -> Request:
    """Return the request to edit a picture. It looks at the alpha channel: call it in a thread.

    pictures: the one to edit, and references. alpha: of the mask, or if none was sent (`separate`
    false), of the picture; fully transparent pixels are repainted. family: of the model, None if it
    is not known. A model that edits by references gets all pictures as such, unless some of the
    first is to be repainted, or a strength says how much. Without a requested size, the picture
    keeps its own size, or gets the nearest allowed size of the same proportions.
    """
    picture, *others = pictures
    if separate and alpha is None:
        raise SafelightError("mask must have an alpha channel: 0 where to repaint", field="mask")
    holes = None if alpha is None else alpha.point([255] + [0] * 255)
    if not separate and holes is not None and holes.getbbox() is None:
        holes = None
    refers = others if family is None else family.edits
    size = picture.size
    if refers and holes is None and "strength" not in settings:
        given: dict[str, Any] = {"reference_images": tuple(pictures)}
        if family is not None and not family.reference_problem(size):
            size = family.reference_size(size)
    else:
        given = {"image": picture, "mask": holes}
        given |= {"reference_images": tuple(others)} if others else {}
    if "width" not in settings:
        width, height = allowed_size(size)
        settings = {**settings, "width": width, "height": height}
    return Request(**settings).with_pictures(**given)


# --- errors --------------------------------------------------------------------------------------


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        error = {"message": public(message), "type": kind, "code": code}
        self.body = {"error": error | {"param": None if param is None else clipped(param)}}


def failed(message: str) -> ApiError:
    """Return the answer about a job that failed. It tells the client not to try again."""
    return ApiError(500, message, kind="server_error", headers={"x-should-retry": "false"})


def refused(error: SafelightError) -> ApiError:
    """Return the answer of a SafelightError."""
    status = status_of(error)
    if status == 429:
        return ApiError(
            429,
            str(error),
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers=retry_after(error),
        )
    if status >= 500:
        return ApiError(status, str(error), kind="server_error")
    if error.code == "unknown_setting":
        return ApiError(400, str(error), error.field, code="unknown_parameter")
    if error.field in ("count", REFERENCES):  # errors of the size name a side
        error = error.renamed(_THEIRS[error.field])
    return ApiError(400, str(error), _THEIRS.get(error.field or "", error.field))


def _explained(error: ValidationError) -> ApiError:
    """Return an answer with one line about the first error that pydantic found."""
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:  # a name that is not text
        return ApiError(400, f"the body: {first['msg']}")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = ", ".join([*ImagesBody.model_fields, *own_settings(Request)])
        message = f"there is no setting {_quoted(name)}; known: {known}"
        return ApiError(400, message, name[:40], code="unknown_parameter")
    if name not in ImagesBody.model_fields:  # such as a name with a lone surrogate
        return ApiError(400, f"the body cannot be read: {clipped(first['msg'])}")
    verb = "is needed:" if first["type"] == "missing" else "must be"
    return ApiError(400, f"{name} {verb} {ImagesBody.model_fields[name].description}", name)


def _quoted(name: str) -> str:
    return repr(name[:40])


def no_such_model(message: str) -> ApiError:
    """Return the answer about a model that is not served."""
    return ApiError(404, message, "model", code="model_not_found")


# --- pictures ------------------------------------------------------------------------------------


def about(body: ImagesBody, size: tuple[int, int]) -> dict[str, Any]:
    """Return the facts that the answer states about a picture. Quality and background are fixed."""
    described = {"size": f"{size[0]}x{size[1]}", "output_format": body.form}
    return {**described, "quality": "high", "background": "opaque"}


def encoded(
    png: bytes, body: ImagesBody, text: str = "", *, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return a PNG as it is, or as JPEG or WebP with the text in its EXIF.

    size: width and height to resize it to; None to keep its own.
    """
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        shown = image
        if size is not None and size != image.size:
            shown = image.resize(size, Image.Resampling.LANCZOS)
        if shown is not image or body.form != "png":
            quality = 100 if body.output_compression is None else body.output_compression
            texts = {"parameters": text} if text else {}
            png = encode(shown, body.form.upper(), texts, quality=quality)
        return {"b64_json": base64.b64encode(png).decode(), **about(body, shown.size)}
