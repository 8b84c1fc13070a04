"""Mixed batches: each image is computed with the adapter of its own task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import AdapterError, truncate_list
from ..injection import AdapterBatch, ForwardContext

BASE = "__base__"
MAX_LISTED = 20


def check_adapters_exist(adapters: Mapping[str, object], names: Sequence[object]) -> None:
    """Raises AdapterError for names of adapters that do not exist."""
    unknown = sorted({str(name) for name in names if name not in adapters})
    if unknown:
        raise AdapterError(
            f"The model has the adapters {truncate_list(list(adapters), MAX_LISTED)}, got "
            f"{truncate_list(unknown, MAX_LISTED)}."
        )


def check_adapter_name(name: object) -> None:
    """Raises AdapterError unless a name can be an adapter's: it becomes part of keys and the name of a folder."""
    if not isinstance(name, str) or not name or name == BASE or any(character in name for character in "./\\"):
        raise AdapterError(f"An adapter's name must be a word without dots and slashes, not '{BASE}', got {name!r}.")


def mix_adapters(
    adapters: Mapping[str, Adapter], names: Sequence[str], num_images: int, training: bool
) -> ForwardContext:
    """The forward pass of a mixed batch.

    Args:
        names: the adapter of each image; ``"__base__"``: the bare backbone with its own head.

    Raises:
        AdapterError: a name is unknown, their number differs from that of the images, or an adapter with copies of
            parts of the backbone is mixed with others.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != num_images:
        got = f"{len(names)} names" if isinstance(names, list | tuple) else repr(names)
        raise AdapterError(f"adapter_names must be a list of one name for each of the {num_images} images, got {got}.")
    check_adapters_exist(adapters, [name for name in names if name != BASE])
    distinct = list(dict.fromkeys(names))
    owners = [name for name in distinct if name != BASE and adapters[name].owns_backbone_parts]
    if owners and len(distinct) > 1:
        raise AdapterError(
            f"The adapters {', '.join(owners)} have copies of parts of the backbone (bias or modules_to_save), so they "
            f"cannot be mixed with {', '.join(name for name in distinct if name != owners[0])}. "
            "Call the model once for each of them."
        )
    batches = []
    for name in distinct:
        rows = tuple(row for row, other in enumerate(names) if other == name) if len(distinct) > 1 else None
        batches.append(AdapterBatch(None if name == BASE else adapters[name], rows))
    return ForwardContext(num_images, batches, training)


def count_labels(adapters: Mapping[str, Adapter], names: Sequence[str], base_labels: int) -> Tensor:
    """Number of labels of each image's task, ``(num_images,)``."""
    return torch.tensor([base_labels if name == BASE else adapters[name].num_labels for name in names])


def mask_padded_logits(output: Any, num_labels: Tensor) -> None:
    """Sets ``num_labels`` of a mixed batch's output, and ``-inf`` for the padded labels in its ``logits``.

    Args:
        output: with ``logits`` of shape ``(num_images, most labels, ...)``.
        num_labels: ``(num_images,)``.
    """
    logits = output["logits"]
    output["num_labels"] = num_labels.to(logits.device)
    if num_labels.min() < num_labels.max():
        padding = torch.arange(logits.shape[1], device=logits.device) >= output["num_labels"][:, None]
        output["logits"] = logits.masked_fill(padding.view(*padding.shape, *[1] * (logits.ndim - 2)), -torch.inf)
