"""The app: its routes, and the way of a request from the upload to the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ...errors import ImageError, VPTError, safe_repr
from ...version import __version__
from ..engine import Engine, EngineClosedError, Prediction, QueueFullError
from .catalog import AdapterSource, read_labels
from .errors import RETRY_AFTER, RequestError, answer_http_error, answer_request_error, answer_unexpected
from .images import PixelBudget, decode_image, open_image
from .metrics import CONTENT_TYPE, MeasureRequests, Metrics
from .settings import ServerSettings
from .uploads import PredictForm, PredictJSON, Upload, read_upload

log = logging.getLogger(__name__)
IMAGES_IN_MEMORY = 4  # of the largest size; more of smaller ones
BEARER = HTTPBearer(auto_error=False)


class Label(BaseModel):
    """A label and its score."""

    label: str
    score: float


class PredictAnswer(BaseModel):
    """The labels of an image, best first."""

    task: str
    labels: list[Label]
    logits: list[float] | None = Field(None, description="of all labels, in their order, if they were asked for")


class Task(BaseModel):
    """A task that can be asked for."""

    name: str
    labels: list[str] | None = Field(description="null: not downloaded yet, or damaged")


class Tasks(BaseModel):
    """All tasks."""

    tasks: list[Task]


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str


class Problem(BaseModel):
    """The answer to a request that failed."""

    error: ErrorDetail


STATUSES = {
    400: "malformed body", 401: "no valid token", 404: "unknown task", 408: "the body took too long",
    413: "too many bytes or pixels", 415: "neither a form nor JSON", 422: "wrong fields, or no image",
    500: "the adapter cannot be loaded", 503: "too many requests, or shutting down: try again",
}  # fmt: skip
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text} for status, text in STATUSES.items()
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": PredictForm.model_json_schema()},
            "application/json": {"schema": PredictJSON.model_json_schema()},
        },
    }
}


def create_app(
    engine: Engine, adapters: Mapping[str, AdapterSource], settings: ServerSettings | None = None
) -> FastAPI:
    """The ASGI app that serves adapters.

    Args:
        engine: computes. It belongs to the caller, who closes it after the app has shut down.
        adapters: the tasks by name, see :func:`find_adapters`; others cannot be asked for.
        settings: limits and tokens.

    Returns:
        An app with the pages ``/v1/predict``, ``/v1/tasks``, ``/healthz``, ``/readyz``, ``/metrics`` and ``/docs``.
    """
    settings = settings or ServerSettings()
    predictor = Predictor(engine, adapters, settings)
    metrics = Metrics(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        predictor.close()

    app = FastAPI(
        title="vpt-peft", description="Adapters of one vision transformer.", version=__version__, lifespan=lifespan,
        redoc_url=None,
    )  # fmt: skip
    app.add_exception_handler(RequestError, answer_request_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Exception, answer_unexpected)
    app.add_middleware(MeasureRequests, metrics=metrics)

    def authorize(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        if not settings.accepts(credentials.credentials if credentials else None):
            raise _unauthorized()

    protected = [Depends(authorize)] if settings.tokens else []

    @app.post("/v1/predict", dependencies=protected, responses=PROBLEMS, openapi_extra=BODY, tags=["predict"])
    async def predict(request: Request) -> PredictAnswer:
        """The labels of an image in a task: a form with a file, or JSON with base64."""
        return await predictor.answer(request)

    @app.get("/v1/tasks", dependencies=protected, tags=["predict"])
    def tasks() -> Tasks:
        """The names of the tasks, with their labels."""
        return Tasks(tasks=[Task(name=name, labels=labels) for name, labels in read_labels(adapters).items()])

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """The process runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: PROBLEMS[503]}, tags=["operation"])
    async def readyz() -> dict[str, str]:
        """Predictions are accepted."""
        predictor.check_open()
        return {"status": "ready"}

    @app.get("/metrics", dependencies=protected, response_class=Response, tags=["operation"])
    def prometheus() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    return app


class Predictor:
    """Answers prediction requests: decodes images in threads of its own, and asks the engine.

    Args:
        engine, adapters, settings: see :func:`create_app`.
    """

    def __init__(self, engine: Engine, adapters: Mapping[str, AdapterSource], settings: ServerSettings) -> None:
        self.engine, self.adapters, self.settings = engine, dict(adapters), settings
        self.decoders = ThreadPoolExecutor(settings.decode_workers, thread_name_prefix="vpt-decode")
        self.budget = PixelBudget(IMAGES_IN_MEMORY * settings.max_pixels)
        self.in_progress = 0
        self.is_closed = False

    def close(self) -> None:
        """Refuses further requests."""
        self.is_closed = True
        self.decoders.shutdown(wait=False)

    def check_open(self) -> None:
        """Raises RequestError after :meth:`close`."""
        if self.is_closed:
            raise _closing()

    async def answer(self, request: Request) -> PredictAnswer:
        """The answer to a request.

        Raises:
            RequestError: with what to tell the client.
        """
        self.check_open()
        with self._place():
            upload = await read_upload(request, self.settings)
            task = upload.options.task
            source = self.adapters.get(task)
            if source is None:
                raise RequestError(
                    404, "unknown_task", f"There is no task {safe_repr(task)}. /v1/tasks lists the tasks."
                )
            try:
                prediction = await self._predict(upload, source)
            except (VPTError, OSError) as error:  # those of the Hub client are OSErrors
                raise _explain(error, task) from error
        logits = prediction.logits.tolist() if upload.options.logits else None
        return PredictAnswer(task=task, labels=[Label(**label) for label in prediction.labels], logits=logits)

    async def _predict(self, upload: Upload, source: AdapterSource) -> Prediction:
        loop, max_pixels = asyncio.get_running_loop(), self.settings.max_pixels
        with upload.image as file:
            image = await loop.run_in_executor(self.decoders, open_image, file, max_pixels)
            async with self.budget.take(image.width * image.height):
                future = await loop.run_in_executor(self.decoders, self._submit, image, source, upload.options.top_k)
                return await asyncio.wrap_future(future)

    def _submit(self, image: Image.Image, source: AdapterSource, top_k: int | None) -> Future[Prediction]:
        """Decodes an image, and hands it to the engine."""
        decoded = decode_image(image, self.settings.max_pixels)
        return self.engine.submit(decoded, source.adapter, revision=source.revision, top_k=top_k)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for requests in progress."""
        if self.in_progress >= self.settings.max_requests:
            raise _full()
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1


def _unauthorized() -> RequestError:
    message = "Expected a valid token in a header: Authorization: Bearer TOKEN"
    return RequestError(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})


def _explain(error: Exception, task: str) -> RequestError:
    """What a client is told of an error of the engine. Those of an adapter go to the log: they contain paths."""
    if isinstance(error, QueueFullError):
        return _full()
    if isinstance(error, EngineClosedError):
        return _closing()
    if isinstance(error, ImageError):
        return RequestError(422, "invalid_image", str(error))
    log.error("The adapter of the task '%s' cannot be used: %s", task, error)
    return RequestError(
        500, "adapter_unavailable", f"The adapter of the task '{task}' cannot be used; the server's log says why."
    )


def _full() -> RequestError:
    return RequestError(503, "queue_full", "The server has too many requests in progress. Try again.", RETRY_AFTER)


def _closing() -> RequestError:
    return RequestError(503, "shutting_down", "The server is shutting down. Try again.", RETRY_AFTER)
