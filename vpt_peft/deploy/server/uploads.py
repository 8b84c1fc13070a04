"""The body of a prediction request: a form with a file, or JSON with base64. Limited while it arrives."""

from __future__ import annotations

import asyncio
import base64
import binascii
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from .errors import RequestError
from .settings import ServerSettings

MAX_FIELD_BYTES = 4096  # of a field that is not the image


class PredictOptions(BaseModel):
    """What is asked about an image."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(description="a name that /v1/tasks lists", max_length=1000)
    top_k: int | None = Field(None, ge=1, description="the number of labels in the answer; default: all")
    logits: bool = Field(False, description="answer with the logits of all labels, in their order, too")


class PredictJSON(PredictOptions):
    """The body of a request in JSON."""

    image: str = Field(description="the bytes of an image file in base64", json_schema_extra={"format": "byte"})


class PredictForm(PredictOptions):
    """The body of a request as a form."""

    file: Any = Field(description="an image file", json_schema_extra={"type": "string", "format": "binary"})


@dataclass(frozen=True)
class Upload:
    """A request that has arrived: its image, still encoded, and what is asked."""

    image: BinaryIO
    options: PredictOptions


async def read_upload(request: Request, settings: ServerSettings) -> Upload:
    """Reads the body of a request.

    Raises:
        RequestError: it is too large, takes too long, or is not of the expected form.
    """
    limited = Request(request.scope, _limit(request.receive, settings.max_upload_bytes))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    readers = {"multipart/form-data": _read_form, "application/json": _read_json}
    if kind not in readers:
        raise RequestError(
            415, "unsupported_media_type", f"The body must be {' or '.join(readers)}, got {kind[:100] or 'no type'}."
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > settings.max_upload_bytes:
        raise _too_large(settings.max_upload_bytes)
    try:
        return await asyncio.wait_for(readers[kind](limited), settings.upload_timeout)
    except asyncio.TimeoutError as error:
        raise RequestError(
            408, "timeout", f"The body must arrive within {settings.upload_timeout:g} seconds."
        ) from error
    except ClientDisconnect as error:
        raise RequestError(400, "disconnected", "The client closed the connection before the body arrived.") from error


def _limit(receive: Receive, max_bytes: int) -> Receive:
    """Receives at most that many bytes of a body, whatever its headers say."""
    left = max_bytes

    async def limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large(max_bytes)
        return message

    return limited


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, "upload_too_large", f"The body must be at most {max_bytes:,} bytes, got more.")


async def _read_form(request: Request) -> Upload:
    try:  # files above 1 MB are spooled to an unnamed temporary file
        form = await request.form(
            max_files=1, max_fields=len(PredictOptions.model_fields), max_part_size=MAX_FIELD_BYTES
        )
    except HTTPException as error:
        raise RequestError(400, "invalid_request", str(error.detail)) from error
    except UnicodeError as error:
        raise RequestError(400, "invalid_request", "The form must be in UTF-8.") from error
    options = _validate(PredictForm, dict(form))
    if not isinstance(options.file, UploadFile):
        raise RequestError(422, "invalid_request", "file: must be a file of the form, got a text.")
    return Upload(options.file.file, options)


async def _read_json(request: Request) -> Upload:
    body = await request.body()
    return await run_in_threadpool(_parse_json, body)


def _parse_json(body: bytes) -> Upload:
    options = _validate(PredictJSON, body)
    try:
        return Upload(BytesIO(base64.b64decode(options.image, validate=True)), options)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            422, "invalid_request", "image: must be the bytes of an image file in base64, without a prefix."
        ) from error


def _validate(model: type[Any], body: Any) -> Any:
    """The body as an instance of a model.

    Raises:
        RequestError: names the first field that is wrong.
    """
    try:
        return model.model_validate_json(body) if isinstance(body, bytes) else model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))[:100]
        raise RequestError(422, "invalid_request", f"{field or 'body'}: {first['msg']}.") from error
