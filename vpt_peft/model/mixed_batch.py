"""Mixed batches: each image is computed with the adapter of its own task."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import AdapterError, safe_repr, truncate_list
from ..injection import AdapterBatch, ForwardContext

BASE = "__base__"
MAX_LISTED = 20
MAX_NAME_BYTES = 255
NOT_PRINTED = ("Cc", "Cs", "Zl", "Zp")  # control characters, half surrogate pairs, separators of lines
RESERVED_NAMES = re.compile("con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)


def check_adapters_exist(adapters: Mapping[str, object], names: Sequence[object]) -> None:
    """Raises AdapterError for names of adapters that do not exist."""
    unknown = sorted({str(name) for name in names if name not in adapters})
    if unknown:
        raise AdapterError(
            f"The model has the adapters {truncate_list(list(adapters), MAX_LISTED)}, got "
            f"{truncate_list(unknown, MAX_LISTED)}."
        )


def check_adapter_name(name: object) -> None:
    """Raises AdapterError unless a name can be an adapter's: part of keys, and the name of a folder on any system."""
    if not isinstance(name, str) or not name or name == BASE or any(character in name for character in "./\\"):
        raise AdapterError(
            f"An adapter's name must be a word without dots and slashes, not '{BASE}', got {safe_repr(name)}."
        )
    reason = ""
    if name in vars(nn.ModuleDict()):
        reason = "which torch uses itself"
    elif len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        reason = f"which is longer than {MAX_NAME_BYTES} bytes"
    elif any(unicodedata.category(character) in NOT_PRINTED or character in '<>:"|?*' for character in name):
        reason = "which contains characters that names of files must not contain on all systems"
    elif name != name.strip() or RESERVED_NAMES.fullmatch(name):
        reason = "which is no name of a folder on Windows"
    if reason:
        raise AdapterError(
            f"An adapter is saved in a folder of its name, got {safe_repr(name)}, {reason}. Choose another name."
        )


def mix_adapters(adapters: Mapping[str, Adapter], names: Sequence[str], num_images: int) -> list[AdapterBatch]:
    """The parts of a mixed batch, by adapter.

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
    return batches


def count_labels(adapters: Mapping[str, Adapter], names: Sequence[str], base_labels: int) -> Tensor:
    """Number of labels of each image's task, ``(num_images,)``; without a classifier, the number of features."""
    num_features = next(iter(adapters.values())).widths[-1]
    return torch.tensor(
        [(base_labels if name == BASE else adapters[name].num_labels) or num_features for name in names]
    )


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


def watch_gradients(output: Any, context: ForwardContext) -> None:
    """Makes sure that no gradient of a training step is lost without a word.

    Adapters that are frozen between the forward and the backward pass, as by ``set_adapter``, raise an error in the
    backward pass; adapters of a mixed batch that do not train are warned about.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    adapters = [batch.adapter for batch in context.batches if batch.adapter is not None]
    trained = [adapter for adapter in adapters if adapter.is_trainable]
    if context.training and trained and len(trained) < len(adapters):
        warnings.warn(
            "Only the active adapter of a mixed batch gets gradients. Train adapters one at a time with set_adapter(), "
            "or call vpt.adapters[name].requires_grad_() for each that shall train.",
            stacklevel=4,
        )

    def check(_: Tensor) -> None:
        if not all(adapter.is_trainable for adapter in trained):
            raise AdapterError(
                "The adapter of this forward pass was frozen before the backward pass, by set_adapter() or "
                "delete_adapter(), so that its gradients would be lost. Call backward() first."
            )

    for value in output.values() if trained else ():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(check)
