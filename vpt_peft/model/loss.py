"""The loss of an adapter: the backbone's own loss function, with the adapter's labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..backbones import Backbone
from ..errors import AdapterError


def check_own_loss(backbone: Backbone, adapter: Adapter) -> None:
    """Raises AdapterError where a model that computes the loss in its forward would refuse the number of labels."""
    counts = (backbone.model.config.num_labels, adapter.num_labels)
    if backbone.head.label_layers and 1 in counts:
        raise AdapterError(
            f"The loss of {type(backbone.model).__name__} needs at least two labels, got {counts[0]} in the "
            f"backbone's config and {counts[1]} in the adapter's. Load the backbone with more, or leave labels out."
        )


def add_loss(output: Any, labels: Tensor, loss_function: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The output with the loss of its logits.

    Args:
        loss_function: ``loss_function(labels, logits, config)``.
        config: the backbone's config with the adapter's labels.
        kwargs: arguments of the forward call, of which ``num_items_in_batch`` is passed on.

    Raises:
        AdapterError: the output has no logits of labels.
    """
    if "logits" not in output or config.num_labels == 0:
        got = "num_labels=0" if "logits" in output else type(output).__name__
        raise AdapterError(f"labels need a model with a classifier, got {got}. Leave labels out.")
    counted = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
    loss = loss_function(labels, output.logits, config, **counted)
    return type(output)(**{**output, "loss": loss})
