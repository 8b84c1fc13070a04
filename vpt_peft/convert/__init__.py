"""Converts checkpoints of the official VPT code (Jia et al., ECCV 2022, github.com/KMnP/vpt) to adapter folders.

From Python, call :func:`convert`; from a shell::

    python -m vpt_peft.convert CHECKPOINT --model NAME_OR_FOLDER --output FOLDER
"""

from .checkpoint import Conversion, convert
from .command import main

__all__ = ["Conversion", "convert", "main"]
