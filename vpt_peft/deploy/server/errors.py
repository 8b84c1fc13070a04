"""What a client is told: a status, a code for programs and a sentence for people. Never a path, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

RETRY_AFTER = {"Retry-After": "1"}  # seconds
UNKNOWN_ROUTE = {404: "There is no such page. /docs shows what there is.", 405: "This page has other methods."}


class RequestError(Exception):
    """A request that gets an error as its answer.

    Args:
        status: of HTTP.
        code: a word that does not change.
        message: a sentence.
        headers: of the response.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def response(self) -> JSONResponse:
        """The answer: ``{"error": {"code": "unknown_task", "message": "There is no task ..."}}``."""
        return JSONResponse({"error": {"code": self.code, "message": self.message}}, self.status, self.headers)


def answer_request_error(request: Request, error: Exception) -> JSONResponse:
    """The answer to a :class:`RequestError`."""
    assert isinstance(error, RequestError)
    return error.response()


def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """The answer to an error of the framework, such as an unknown page."""
    assert isinstance(error, HTTPException)
    message = UNKNOWN_ROUTE.get(error.status_code, str(error.detail))
    return RequestError(error.status_code, f"http_{error.status_code}", message, error.headers).response()


def answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    """The answer to an error of the server's own. The server's log has it."""
    return RequestError(500, "internal", "The server failed on this request; its log says why.").response()
