"""Position embeddings for images of another size than the backbone's."""

from __future__ import annotations

import inspect
from typing import cast

from torch import nn

from ..adapter import Adapter
from ..model import VPTModel

ARGUMENT = "interpolate_pos_encoding"  # of the forward call of models that must be told


def can_interpolate(model: nn.Module) -> bool:
    """Whether a bare model interpolates position embeddings if it is told to; others do by themselves, or cannot."""
    return ARGUMENT in inspect.signature(type(model).forward).parameters


def interpolation(vpt: VPTModel, size: tuple[int, ...] | None) -> dict[str, bool]:
    """What the forward call must be told besides images of this size: ``interpolate_pos_encoding`` or nothing.

    Args:
        size: height and width; None: they may differ from call to call.
    """
    adapter = cast(Adapter, vpt.adapters[vpt.active_adapter])
    if not can_interpolate(vpt.get_base_model()):
        return {}
    own = adapter.image_size or vpt.backbone.image_size  # a border of prompts leaves less
    return {} if size == own else {ARGUMENT: True}
