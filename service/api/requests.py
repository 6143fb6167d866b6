"""Parses requests: questions and documents in their bodies, and the `Prefer` header."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from mmap import mmap
from typing import Any, Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.engine.protocol import RETRY_SECONDS
from service.errors import MalformedRequest, Overloaded, TooLarge, UnsupportedMedia, as_json
from service.predictions.question import PredictRequest
from service.validation import invalid_field, invalid_fields

T = TypeVar("T")
Document = TypeVar("Document", bound=BaseModel)

LONGEST_WAIT = 600
"""Seconds; a longer `Prefer: wait` is reduced to this."""

_JSON, _FORM = "application/json", "multipart/form-data"
_MAX_FIELDS = 20
_MAX_FIELD_BYTES = 4 * 2**10
_MAX_NAME = 255
_TEXT_FIELDS = PredictRequest.model_fields.keys() - {"image"}


@dataclass(frozen=True, slots=True)
class Preferences:
    """The preferences of RFC 7240's `Prefer` header that the service honors."""

    respond_async: bool = False
    wait: int | None = None

    @classmethod
    def of(cls, headers: Sequence[str]) -> Self:
        """Parse the headers; other preferences are ignored, as the RFC requires."""
        tokens = (token.split(";")[0].partition("=") for token in ",".join(headers).split(","))
        named = {name.strip().lower(): value.strip(' "') for name, _, value in reversed([*tokens])}
        wait = named.get("wait", "")
        seconds = min(max(int(wait[:9]), 1), LONGEST_WAIT) if wait.isdecimal() else None
        return cls("respond-async" in named, seconds)

    def seconds(self, default: int) -> int:
        """Seconds to wait before responding without the result."""
        if self.wait is not None:
            return self.wait
        return 0 if self.respond_async else default


async def read_question(request: Request, max_body_bytes: int, kind: type[Document]) -> Document:
    """The `kind` of a form or of JSON, with an image; the body is bounded while it is read.

    Raises UnsupportedMedia, TooLarge, MalformedRequest, and InvalidField with every invalid field.
    """
    media_type = _media_type(request)
    try:
        if media_type == _JSON:
            return _read_json(await _whole_body(request, max_body_bytes), kind)
        if media_type == _FORM:
            text, bounded = kind.model_fields.keys() - {"image"}, _bounded(request, max_body_bytes)
            async with _form(bounded, _MAX_FIELDS, lambda form: _read_form(form, text)) as fields:
                return validated(lambda: kind.model_validate(fields), kind)
    except ClientDisconnect as error:
        raise MalformedRequest("The connection ended before the body did") from error
    raise UnsupportedMedia(f"Send {_FORM} or {_JSON}")


@asynccontextmanager
async def read_batch(
    request: Request, max_body_bytes: int, max_images: int
) -> AsyncIterator[tuple[PredictRequest, list[UploadFile]]]:
    """The question of a form without its image, and the files of its repeated field `images`.

    The files are open within the context. Raises as `read_question` does, and TooLarge for more
    than `max_images` files.
    """
    if _media_type(request) != _FORM:
        raise UnsupportedMedia(f"Send {_FORM}")
    try:
        async with _form(_bounded(request, max_body_bytes), max_images, _read_batch) as found:
            yield found
    except HTTPException as error:
        if str(error.detail).startswith("Too many files"):
            detail = f"The batch has more than {max_images} images"
            raise TooLarge(detail, limit=max_images) from error
        raise
    except ClientDisconnect as error:
        raise MalformedRequest("The connection ended before the body did") from error


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, bounded while it is read.

    Raises TooLarge, MalformedRequest, and UnsupportedMedia for a compressed body.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise UnsupportedMedia(f"Content-Encoding is {as_json(coding)}: send the body uncompressed")
    try:
        return await _whole_body(request, max_bytes)
    except ClientDisconnect as error:
        raise MalformedRequest("The connection ended before the body did") from error


async def read_document(request: Request, kind: type[Document], max_bytes: int) -> Document:
    """The JSON body as a `kind`, bounded while it is read; raises as `read_question` does."""
    if _media_type(request) != _JSON:
        raise UnsupportedMedia(f"Send {_JSON}")
    return _read_json(await read_body(request, max_bytes), kind)


def _read_json(body: bytes, kind: type[Document]) -> Document:
    _check_fields(body)
    return validated(lambda: kind.model_validate_json(body, strict=True), kind)


def _check_fields(body: bytes) -> None:
    """Raise MalformedRequest for too many fields, since every invalid field is reported."""
    try:
        fields = from_json(body)
    except ValueError as error:
        raise MalformedRequest(f"The body is not JSON: {error}") from error
    if isinstance(fields, dict) and len(fields) > _MAX_FIELDS:
        raise MalformedRequest(f"The body has {len(fields)} fields; the limit is {_MAX_FIELDS}")


async def _whole_body(request: Request, max_bytes: int) -> bytes:
    """The body, at most `max_bytes` long, collected outside the heap.

    Small parts on the heap would hold its pages long after they are freed.
    """
    with mmap(-1, max_bytes) as arrived:
        async for part in _bounded(request, max_bytes).stream():
            arrived.write(part)
        return arrived[: arrived.tell()]


def _bounded(request: Request, max_bytes: int) -> Request:
    """The same request; reading its body raises TooLarge beyond `max_bytes`."""
    received = 0
    too_large = TooLarge(f"The body is larger than {max_bytes} bytes", limit=max_bytes)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > max_bytes:
        raise too_large

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise too_large
        return message

    return Request(request.scope, receive)


@asynccontextmanager
async def _form(
    request: Request, max_files: int, read: Callable[[FormData], Awaitable[T]]
) -> AsyncIterator[T]:
    """The result of `read` on the request's form, whose files are open within the context.

    Raises UnsupportedMedia for another charset than UTF-8: Python has codecs that fail on any text,
    and some that decode to text which UTF-8 cannot encode.
    """
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise UnsupportedMedia(f"The charset of the form is {as_json(charset)}: it must be utf-8")
    form = FormData()
    try:
        try:
            form = await request.form(
                max_files=max_files, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
            )
            found = await read(form)
        except OSError as error:
            reason = error.strerror
            detail = f"The upload cannot be written to the folder of temporary files: {reason}"
            raise Overloaded(detail, retry_after=RETRY_SECONDS) from error
        yield found
    finally:
        await form.close()


async def _read_form(form: FormData, text: Set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields and name != "sigma":
            raise invalid_field(name, f"The field {name} is given more than once")
        if name == "image" and not isinstance(value, UploadFile):
            raise invalid_field(name, "image must be sent as a file, with a file name")
        if name in text and isinstance(value, UploadFile):
            raise invalid_field(name, f"{name} must be sent as text, without a file name")
        fields[name] = await value.read() if isinstance(value, UploadFile) else value
    if len(sigmas := form.getlist("sigma")) > 1:
        fields["sigma"] = sigmas
    return fields


async def _read_batch(form: FormData) -> tuple[PredictRequest, list[UploadFile]]:
    images: list[UploadFile] = []
    others = FormData([item for item in form.multi_items() if item[0] != "images"])
    for image in form.getlist("images"):
        if not isinstance(image, UploadFile):
            raise invalid_field("images", "images must be sent as files, with file names")
        if (length := len(image.filename or "")) > _MAX_NAME:
            detail = f"images: a file's name has {length} characters; at most {_MAX_NAME} are kept"
            raise invalid_field("images", detail, length, _MAX_NAME)
        images.append(image)
    if not images:
        raise invalid_field("images", "images: send at least one file", 0, 1)
    if "image" in others:
        raise invalid_field("image", "there is no field 'image'; did you mean images?")
    fields = await _read_form(others, _TEXT_FIELDS) | {"image": b""}
    return validated(lambda: PredictRequest.model_validate(fields), PredictRequest), images


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def validated(validate: Callable[[], Document], kind: type[Document]) -> Document:
    """The validated document; raises MalformedRequest, and InvalidField with every field."""
    try:
        return validate()
    except ValidationError as error:
        errors = error.errors(include_url=False)
        if errors[0]["type"] == "json_invalid":
            raise MalformedRequest(errors[0]["msg"]) from error
        raise invalid_fields(errors, kind) from error
