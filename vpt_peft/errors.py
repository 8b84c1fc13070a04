"""Exceptions, and the formatting of untrusted values in their messages."""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import Repr

_REPR = Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 40, 40, 40
_REPR.maxstring = _REPR.maxother = 200


def safe_repr(value: object) -> str:
    """The repr of a value, truncated: values read from a file can be arbitrarily large."""
    return _REPR.repr(value)


def truncate_list(names: Sequence[str], limit: int) -> str:
    """The first ``limit`` names, comma-separated, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class VPTError(ValueError):
    """Base class of all errors raised by vpt-peft."""


class ConfigError(VPTError):
    """A :class:`~vpt_peft.PromptConfig` is invalid or does not fit the model."""


class UnsupportedModelError(VPTError):
    """No declared architecture fits the model."""


class AdapterError(VPTError):
    """An adapter does not exist, already exists, or does not support the operation."""


class CheckpointError(VPTError):
    """An adapter folder or state dict is incomplete, damaged, or made for another model."""


class ImageError(VPTError):
    """An image cannot be read, or not be used."""


class RouteError(VPTError):
    """Prompts cannot take the requested route, or did not reach a layer."""
