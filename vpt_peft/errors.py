"""Errors of the package. Each says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import Repr

_REPR = Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 40, 40, 40
_REPR.maxstring = _REPR.maxother = 200


def shown(value: object) -> str:
    """A value in an error message: its repr, cut where a stranger's file could make it endless."""
    return _REPR.repr(value)


def listed(names: Sequence[str], most: int) -> str:
    """Names in an error message, as many as can be read: there may be thousands."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class VPTError(ValueError):
    """Base class of every error raised by vpt-peft. It is a ``ValueError`` too."""


class ConfigError(VPTError):
    """A :class:`~vpt_peft.PromptConfig` is invalid, or does not fit the model it is used with."""


class UnsupportedModelError(VPTError):
    """The model is no vision transformer that vpt-peft knows, or its code no longer looks as declared."""


class AdapterError(VPTError):
    """An adapter is missing, exists already, or cannot do what was asked of it."""


class CheckpointError(VPTError):
    """An adapter folder or state dict is incomplete, damaged, or made for another model."""


class RouteError(VPTError):
    """Prompts cannot take the route asked for, or did not reach a layer that they should have reached."""
