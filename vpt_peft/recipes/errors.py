"""The error that a command reports in one line."""

from __future__ import annotations

from ..errors import VPTError


class RecipeError(VPTError):
    """The data, the model or an option of a recipe cannot be used."""
