"""Queries, keys and values of image and prompts joined, of which autograd keeps the parts: no copies of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def keep_parts(
    joined: Sequence[Tensor], parts: Sequence[tuple[Tensor, ...]], join: Callable[..., Tensor]
) -> AbstractContextManager[Any]:
    """While it is open, where autograd would keep a joined tensor for the backward pass, it keeps its parts, and joins
    them again.

    Everything that is kept goes through the hooks that are there already, such as those of gradient checkpointing and
    of ``torch.autograd.graph.save_on_cpu``, of which PyTorch calls only the innermost. Compiled graphs decide for
    themselves what they keep; the transforms of ``torch.func`` permit no hooks.

    Args:
        joined: each is ``join(*its_parts)``.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not _may_hook():
        return nullcontext()
    outer: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    keep, give_back = outer or (_Kept, _Kept.give_back)
    by_storage = {StorageWeakRef(one.untyped_storage()): its for one, its in zip(joined, parts, strict=True)}

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        its_parts = by_storage.get(StorageWeakRef(tensor.untyped_storage()))
        kept = [keep(part) for part in its_parts or (tensor,)]
        if its_parts is None:
            return lambda: give_back(kept[0])
        layout = tensor.shape, tensor.stride(), tensor.storage_offset()
        return lambda: join(*map(give_back, kept)).as_strided(*layout)

    return saved_tensors_hooks(pack, lambda unpack: unpack())


def _may_hook() -> bool:
    """Whether hooks for saved tensors are permitted, and tensors have a storage."""
    is_enabled: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return is_enabled and not torch._C._are_functorch_transforms_active()


class _Kept:
    """A tensor, as autograd keeps it: with its version, so that later changes in place are errors."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version

    def give_back(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor {tuple(self.tensor.shape)} that the backward pass of the attention needs was changed in "
                "place. Change a clone of it."
            )
        return self.tensor
