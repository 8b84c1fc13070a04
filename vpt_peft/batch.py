"""A batch and its tasks: which adapter answers for which image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .errors import AdapterError, listed
from .passes import Group, Pass

BASE = "__base__"
MAX_LISTED = 20


def check_known(adapters: Mapping[str, object], names: Sequence[object]) -> None:
    """Raises AdapterError for names of adapters that do not exist."""
    unknown = sorted({str(name) for name in names if name not in adapters})
    if unknown:
        raise AdapterError(
            f"The model has the adapters {listed(list(adapters), MAX_LISTED)}, got {listed(unknown, MAX_LISTED)}."
        )


def check_name(name: str) -> None:
    if not isinstance(name, str) or not name or name == BASE or any(sign in name for sign in "./\\"):
        raise AdapterError(f"An adapter's name must be a word without dots and slashes, not '{BASE}', got {name!r}.")


def begin_pass(adapters: Mapping[str, Adapter], names: Sequence[str], num_images: int, training: bool) -> Pass:
    """A pass in which each image is seen with its own task's prompts and head.

    Args:
        names: the adapter of each image; ``"__base__"``: the bare backbone with its own head.

    Raises:
        AdapterError: a name is unknown, their number is not that of the images, or adapters that own parts of the
            backbone would have to share it.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != num_images:
        came = f"{len(names)} names" if isinstance(names, list | tuple) else repr(names)
        raise AdapterError(f"adapter_names must be a list of one name for each of the {num_images} images, got {came}.")
    check_known(adapters, [name for name in names if name != BASE])
    different = list(dict.fromkeys(names))
    owners = [name for name in different if name != BASE and adapters[name].owns_backbone_parts]
    if owners and len(different) > 1:
        raise AdapterError(
            f"The adapters {', '.join(owners)} own parts of the backbone (bias or modules_to_save), so their images "
            f"cannot share a pass with those of {', '.join(name for name in different if name != owners[0])}. "
            "Call the model once for each of them."
        )
    groups = []
    for name in different:
        rows = tuple(row for row, other in enumerate(names) if other == name) if len(different) > 1 else None
        groups.append(Group(rows=rows) if name == BASE else adapters[name].group(rows))
    return Pass(num_images, groups, training)


def count_labels(adapters: Mapping[str, Adapter], names: Sequence[str], base_labels: int) -> Tensor:
    """How many labels each image's task has, ``(num_images,)``."""
    return torch.tensor([base_labels if name == BASE else adapters[name].num_labels for name in names])


def tell_labels(output: Any, num_labels: Tensor) -> None:
    """Writes into a mixed batch's output how many labels each image's task has, and ``-inf`` into ``logits`` of
    ``(num_images, most labels, ...)`` behind them."""
    logits = output["logits"]
    output["num_labels"] = num_labels.to(logits.device)
    if num_labels.min() < num_labels.max():
        behind = torch.arange(logits.shape[1], device=logits.device) >= output["num_labels"][:, None]
        output["logits"] = logits.masked_fill(behind.view(*behind.shape, *[1] * (logits.ndim - 2)), -torch.inf)
