"""Adapters where they are used: as files that run without vpt-peft, and thousands of them on one backbone."""

from .endpoint import EndpointHandler
from .engine import Engine, EngineError
from .exporting import export, export_adapter

__all__ = ["EndpointHandler", "Engine", "EngineError", "export", "export_adapter"]
