"""Adapters where they are used: as files that run without vpt-peft, and thousands of them on one backbone."""

from .engine import Engine, EngineError
from .exporting import export, export_adapter

__all__ = ["Engine", "EngineError", "export", "export_adapter"]
