"""Models without a head, for the tests of heads that are added to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel


def build(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that a function makes, in eval mode, with all parameters random."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(model: PreTrainedModel) -> Tensor:
    """Four images of the model's size."""
    side = model.config.image_size
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(2))
