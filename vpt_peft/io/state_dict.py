"""State dicts of adapters: checked completely, then copied, or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CheckpointError, safe_repr, truncate_list

MAX_LISTED = 1000  # more than real adapters have; a file can contain any number of tensors
MAX_NAME = 300
MAX_CHUNK = 2**14
COMPILE_PREFIX = "_orig_mod."


def gather_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The detached tensors of a module by name. They share its memory; sharded ones (FSDP2) are gathered, which all
    processes must do together."""
    return {name: _gather(tensor.detach()) for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into a module, strictly. Sharded modules (FSDP2) take their part of what each process is given.

    Raises:
        CheckpointError: see :func:`check_state_dict`; nothing was copied.
    """
    own = module.state_dict()
    check_state_dict(own, tensors)
    for name, tensor in tensors.items():
        _copy(tensor, own[name])


def check_state_dict(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, outcome: str = "Nothing was loaded."
) -> None:
    """Checks that tensors can replace a module's own.

    Args:
        outcome: end of the error message.

    Raises:
        CheckpointError: lists all tensors that are missing, unexpected, no dense tensors, of another shape or type, or
            not finite in the module's precision.
    """
    _check_names(tensors)
    other = [f"{name}: {type(tensor).__name__}" for name, tensor in tensors.items() if not _is_dense(tensor)]
    _raise_mismatches({"no dense tensors": other}, outcome)
    other_type, not_finite = [], []
    for name in [name for name in own if name in tensors]:
        given, dtype = tensors[name], own[name].dtype
        if given.is_floating_point() != dtype.is_floating_point or given.is_complex():
            other_type.append(f"{name}: expected {dtype}, got {given.dtype}")
        elif not _is_finite(given, dtype):
            not_finite.append(name if given.dtype == dtype else f"{name} in {dtype}")
    mismatches = _shape_mismatches(own, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    mismatches |= {"of another type": other_type, "not finite (NaN or infinite)": not_finite}
    _raise_mismatches(mismatches, outcome)


def check_shapes(own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks names and shapes before tensors are read.

    Raises:
        CheckpointError: lists all that are missing, unexpected or of another shape.
    """
    _raise_mismatches(_shape_mismatches(own, shapes), "Nothing was loaded.")


def strip_compile_prefix(state_dict: object) -> dict[str, Tensor]:
    """A state dict of ``torch.compile(module)`` with the keys of the module itself.

    Raises:
        CheckpointError: the argument is not a mapping with strings as keys.
    """
    _check_names(state_dict)
    return {name.removeprefix(COMPILE_PREFIX): tensor for name, tensor in state_dict.items()}  # type: ignore[attr-defined]


def _check_names(tensors: object) -> None:
    got = type(tensors).__name__
    if isinstance(tensors, Mapping):
        got = next((f"the name {safe_repr(name)}" for name in tensors if not isinstance(name, str)), "")
    if got:
        raise CheckpointError(f"Expected a state dict, a dict of tensors by name, got {got}.")


def _shape_mismatches(own: Mapping[str, Tensor], given: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    return {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in given],
        "unexpected": [f"{name} {shape}" for name, shape in given.items() if name not in expected],
        "of another shape": [
            f"{name}: expected {shape}, got {given[name]}"
            for name, shape in expected.items()
            if given.get(name, shape) != shape
        ],
    }


def _raise_mismatches(mismatches: Mapping[str, list[str]], outcome: str) -> None:
    """Raises one CheckpointError that lists all mismatches by kind; nothing if there are none."""
    shortened = {
        kind: [name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..." for name in sorted(names)]
        for kind, names in mismatches.items()
    }
    found = [f"{kind}: {truncate_list(names, MAX_LISTED)}" for kind, names in shortened.items() if names]
    if found:
        raise CheckpointError(f"The tensors do not match the adapter. {'; '.join(found)}. {outcome}")


def _is_dense(tensor: object) -> bool:
    if not isinstance(tensor, Tensor):
        return False
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite in a precision."""
    # One sum is quicker than a look at each value, and finite only if they all are; but it may overflow by itself.
    chunks = (chunk.to(dtype) for chunk in _chunks(tensor.to_local() if isinstance(tensor, DTensor) else tensor))
    return all(bool(chunk.sum().isfinite()) or bool(chunk.isfinite().all()) for chunk in chunks)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each: from 2^15 elements on torch waits for all its threads, up to 10 ms on a busy CPU."""
    rows = tensor.unsqueeze(0) if tensor.ndim == 0 else tensor
    size = rows.numel() // max(1, rows.shape[0])
    return rows.split(max(1, MAX_CHUNK // max(1, size)))


def _gather(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy(given: Tensor, own: Tensor) -> None:
    given = _gather(given)
    if isinstance(own, DTensor):  # all processes are given the same tensor, so none sends it
        given = given.to(own.device)
        given = distribute_tensor(given, own.device_mesh, own.placements, src_data_rank=None).to_local()
        own = own.to_local()
    for target, values in zip(_chunks(own), _chunks(given), strict=True):
        target.copy_(values)
