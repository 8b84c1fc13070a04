"""Saving the adapters of a model, as folders and as checkpoints of Trainer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..errors import CheckpointError, truncate_list
from ..hub import write_card
from ..io import (
    atomic_write,
    gather_state_dict,
    lock_folder,
    open_weights,
    pack_weights,
    save_adapter,
    save_atomically,
    strip_compile_prefix,
)

TRAINER_WEIGHTS = "model.safetensors"
MODEL_WEIGHTS = re.compile(r"((pytorch_|tf_|flax_)?model)([.-].*)?\.(safetensors|bin|h5|msgpack)(\.index\..*json)?")
MAX_LISTED = 5


def adapter_folder(save_directory: str | os.PathLike[str], adapter_name: str) -> Path:
    """Folder of an adapter: "default" is in ``save_directory`` itself, any other in a subfolder of its name."""
    return Path(save_directory) if adapter_name == "default" else Path(save_directory) / adapter_name


def save_adapters(
    adapters: Mapping[str, Adapter],
    save_directory: str | os.PathLike[str],
    *,
    checkpointed: str | None = None,
    model_state: Mapping[str, Tensor] | None = None,
    image_processor: Any = None,
    is_main_process: bool = True,
    card_details: Mapping[str, Any],
) -> None:
    """Saves adapters, each in its folder.

    Args:
        adapters: those to save, by name.
        checkpointed: name of the adapter whose weights are also written to ``model.safetensors``, where Trainer looks
            for them, with the keys of the model's state dict. None: only if the file exists already.
        model_state: state dict of the model, gathered from several processes; None: the adapters' own tensors.
        is_main_process: False: only take part in gathering tensors.
        card_details: see :func:`~vpt_peft.hub.write_card`.

    Raises:
        CheckpointError: a folder contains a full model, or ``model_state`` lacks tensors. Nothing was saved.
    """
    directory = Path(save_directory)
    folders = {adapter_folder(directory, name) for name in adapters}
    for folder in sorted(folders if checkpointed is None else folders | {directory}):
        _check_no_model(folder)  # in all processes, since those that go on would wait for the others
    gathered = None if not model_state else strip_compile_prefix(model_state)
    states = {name: _adapter_state(name, adapter, gathered) for name, adapter in adapters.items()}
    if not is_main_process:
        return
    for name, adapter in adapters.items():
        folder = adapter_folder(directory, name)
        save_adapter(adapter, folder, states[name])
        if image_processor is not None:
            save_atomically(image_processor, folder)
        subfolder = None if name == "default" else name
        write_card(adapter, folder, subfolder=subfolder, **card_details)
    checkpointed = checkpointed or _checkpointed_adapter(directory)  # an existing file must not become stale
    if checkpointed in states:
        _write_trainer_file(directory, checkpointed, states[checkpointed])


def _adapter_state(name: str, adapter: Adapter, model_state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of an adapter, out of the state dict of the model if that is given."""
    if model_state is None:
        return gather_state_dict(adapter)
    keys = {key: f"adapters.{name}.{key}" for key in adapter.state_dict()}
    missing = [key for key in keys.values() if key not in model_state]
    if missing:
        raise CheckpointError(
            f"state_dict must contain the tensors of the adapter, but lacks {truncate_list(missing, MAX_LISTED)}. Pass "
            "the result of model.state_dict() or Accelerator.get_state_dict(model), or leave it out."
        )
    return {key: model_state[model_key].detach() for key, model_key in keys.items()}


def _write_trainer_file(directory: Path, name: str, state: Mapping[str, Tensor]) -> None:
    content = pack_weights({f"adapters.{name}.{key}": tensor for key, tensor in state.items()}, {"adapter": name})
    with lock_folder(directory):
        atomic_write(directory / TRAINER_WEIGHTS, content)


def _check_no_model(folder: Path) -> None:
    """Raises CheckpointError for a folder with a full model: a checkpoint would replace its weights, and transformers
    with PEFT would take it for an adapter."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in names if MODEL_WEIGHTS.fullmatch(name)]
    if found and not (found == [TRAINER_WEIGHTS] and _has_only_adapters(folder / TRAINER_WEIGHTS)):
        raise CheckpointError(
            f"An adapter needs a folder of its own, but '{folder}' contains a model "
            f"({truncate_list(found, MAX_LISTED)}), which could not be loaded any more. Choose another folder. "
            "Nothing was saved."
        )


def _checkpointed_adapter(directory: Path) -> str | None:
    """Name of the adapter that :func:`_write_trainer_file` has written; None if there is no such file."""
    try:
        with open_weights(directory / TRAINER_WEIGHTS) as weights:
            return None if weights.config is None else weights.config.get("adapter")
    except CheckpointError:
        return None


def _has_only_adapters(path: Path) -> bool:
    """Whether a file is a checkpoint of adapters, ours or accelerate's."""
    try:
        with open_weights(path) as weights:
            return all(name.startswith("adapters.") for name in strip_compile_prefix(weights.shapes))
    except CheckpointError:
        return False
