"""Converts checkpoints of the official VPT code (Jia et al., ECCV 2022, github.com/KMnP/vpt) to adapter folders.

From Python, call :func:`convert`; from a shell::

    vpt-peft convert CHECKPOINT --model NAME_OR_FOLDER --output FOLDER
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Conversion, convert
    from .command import main

__all__ = ["Conversion", "convert", "main"]


def __getattr__(name: str) -> Any:
    if name in ("Conversion", "convert"):  # loads torch, which the options of the command do not need
        from . import checkpoint

        return getattr(checkpoint, name)
    if name == "main":
        from .command import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
