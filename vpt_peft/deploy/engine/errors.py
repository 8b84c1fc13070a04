"""Errors of the engine."""

from __future__ import annotations

from ...errors import VPTError


class EngineError(VPTError):
    """The engine cannot answer a request."""


class QueueFullError(EngineError):
    """As many requests as ``max_queue`` are waiting for an answer."""


class EngineClosedError(EngineError):
    """The engine was closed, and accepts no further requests."""
