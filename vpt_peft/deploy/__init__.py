"""Adapters where they are used: as files that run without vpt-peft."""

from .exporting import export, export_adapter

__all__ = ["export", "export_adapter"]
