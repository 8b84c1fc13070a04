"""An adapter's state dict: its tensors under names of our own, taken in strictly or not at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .adapter import Adapter
from .errors import AdapterError, CheckpointError, listed, shown

MAX_LISTED = 1000
MAX_ALONE = 2**14
COMPILED = "_orig_mod."  # before the names of a compiled module's tensors


def storage_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype | None:
    """The precision asked for, by its name in transformers or by the older one.

    Raises:
        AdapterError: it is none of floating point, or the two names disagree.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise AdapterError(
            f"dtype and its older name torch_dtype must agree, got {dtype} and {torch_dtype}. Give one of them."
        )
    asked = torch_dtype if dtype is None else dtype
    if asked is not None and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise AdapterError(f"dtype must be a torch.dtype of floating point, such as torch.bfloat16, got {asked!r}.")
    return asked


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Detached tensors of an adapter under the names of the format; they share its memory, or, where several processes
    each hold a part (FSDP2), are gathered by all of them at once."""
    return {name: _whole(tensor.detach()) for name, tensor in adapter.tensors().items()}


def places(adapter: Adapter, prefix: str) -> dict[str, str]:
    """``{name in the format: name in a module's state dict}`` of an adapter whose tensors stand there behind
    ``prefix``."""
    found = {id(tensor): prefix + name for name, tensor in adapter.state_dict(keep_vars=True).items()}
    return {name: found[id(tensor)] for name, tensor in adapter.tensors().items()}


def unwrapped(module_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a module, or of what ``torch.compile`` made of it, under the names that the module gives."""
    _check_mapping(module_state)
    names = OrderedDict((name.removeprefix(COMPILED), tensor) for name, tensor in module_state.items())
    if hasattr(module_state, "_metadata"):  # versions of modules' states, such as batch norms'
        metadata = {name.removeprefix(COMPILED): versions for name, versions in module_state._metadata.items()}
        names._metadata = metadata  # type: ignore[attr-defined]
    return names


def translate(adapter: Adapter, prefix: str, module_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors out of a module's state dict, in which they stand behind ``prefix``.

    Raises:
        CheckpointError: one is missing.
    """
    names, module_state = places(adapter, prefix), unwrapped(module_state)
    missing = [place for place in names.values() if place not in module_state]
    if missing:
        raise CheckpointError(
            f"The state dict must hold the adapter's tensors, but lacks {_listed(missing)}. Pass the one that "
            "model.state_dict() or Accelerator.get_state_dict(model) gives, or none."
        )
    return {name: module_state[place].detach() for name, place in names.items()}


@torch.no_grad()
def load_state_dict(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into an adapter. Strict and complete; if it fails, nothing has changed.

    Where several processes each hold a part of the adapter (FSDP2), each takes its part of what it is given.

    Raises:
        CheckpointError: names every missing, unexpected and mis-shaped tensor, and those with values that are not
            finite.
    """
    own = adapter.tensors()
    check(own, tensors)
    for name, tensor in tensors.items():
        _copy(tensor, own[name])


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered by all processes where each holds a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy(given: Tensor, own: Tensor) -> None:
    """Copies a tensor, or of it the part that this process holds."""
    given = _whole(given)
    if isinstance(own, DTensor):  # no process sends its values: all have been given the same
        given = given.to(own.device)
        given = distribute_tensor(given, own.device_mesh, own.placements, src_data_rank=None).to_local()
        own = own.to_local()
    for place, values in zip(_pieces(own), _pieces(given), strict=True):
        place.copy_(values)


def check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, naming all that is wrong, unless ``tensors`` can take the place of ``own``."""
    _check_tensors(tensors)
    known = {name: tensor for name, tensor in tensors.items() if name in own}
    finite = {name for name, tensor in known.items() if _is_finite(tensor)}
    refuse(
        misfits(shapes_of(own), shapes_of(tensors))
        | {
            "of another type": [
                f"{name}: expected {own[name].dtype}, got {tensor.dtype}"
                for name, tensor in known.items()
                if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex()
            ],
            "not finite (NaN or infinite)": [name for name in known if name not in finite],
            "too large": [
                f"{name} for {own[name].dtype}"
                for name, tensor in known.items()
                if name in finite and tensor.dtype != own[name].dtype and not _is_finite(tensor, own[name].dtype)
            ],
        }
    )


def _is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether its values are finite, and stay so in another precision."""
    # A sum is finite only if all that it adds is, and it is one quick operation; but it may overflow by itself.
    pieces = (part.to(dtype or part.dtype) for part in _pieces(tensor))
    return all(bool(part.sum().isfinite()) or bool(part.isfinite().all()) for part in pieces)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each, so small that torch works on them alone.

    From 2^15 elements on it waits for all its threads, which on a busy CPU takes 10 ms and more, each time.
    """
    rows = tensor.unsqueeze(0) if tensor.ndim == 0 else tensor
    size = rows.numel() // max(1, rows.shape[0])
    return rows.split(max(1, MAX_ALONE // max(1, size)))


def _check_mapping(tensors: object) -> None:
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"Expected a state dict, a dict of tensors by name, got {type(tensors).__name__}.")
    other = next((name for name in tensors if not isinstance(name, str)), None)
    if other is not None:
        raise CheckpointError(f"Expected a state dict, a dict of tensors by name, got the name {shown(other)}.")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for what is no state dict, or holds what cannot be copied from."""
    _check_mapping(tensors)
    others = {
        "no dense tensors with data": [
            f"{name}: {type(tensor).__name__}" for name, tensor in tensors.items() if not _is_dense(tensor)
        ]
    }
    refuse(others)


def _is_dense(tensor: object) -> bool:
    if not isinstance(tensor, Tensor):
        return False
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def misfits(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    both = [name for name in own if name in given]
    return {
        "missing": [f"{name} {own[name]}" for name in own if name not in given],
        "unexpected": [f"{name} {given[name]}" for name in given if name not in own],
        "of another shape": [
            f"{name}: expected {own[name]}, got {given[name]}" for name in both if own[name] != given[name]
        ],
    }


def refuse(problems: Mapping[str, list[str]]) -> None:
    found = [f"{kind}: {_listed(sorted(names))}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError("The tensors do not fit the adapter. " + "; ".join(found) + ". Nothing was loaded.")


def _listed(names: Sequence[str]) -> str:
    """All names of any real adapter, and not endlessly long ones, or endlessly many, of a stranger's file."""
    return listed([name if len(name) <= 300 else name[:300] + "..." for name in names], MAX_LISTED)
