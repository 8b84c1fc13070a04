"""Saving the adapters of a model, as folders and as checkpoints of Trainer."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..errors import AdapterError, CheckpointError, truncate_list
from ..hub import CARD_NAME, find_commit, render_card, tensor_names, update_card, without_local_backbone
from ..io import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Fingerprint,
    atomic_write,
    check_state_dict,
    gather_state_dict,
    lock_folder,
    open_weights,
    pack_config,
    pack_files,
    pack_weights,
    save_adapter,
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
    fingerprint: Fingerprint,
    *,
    checkpointed: str | None = None,
    model_state: Mapping[str, Tensor] | None = None,
    image_processor: Any = None,
    is_main_process: bool = True,
    card_details: Mapping[str, Any],
) -> None:
    """Saves adapters, each in its folder. All of it is checked before the first file is written; then each adapter is
    replaced atomically, but not all of them together.

    Args:
        adapters: those to save, by name.
        fingerprint: of their backbone.
        checkpointed: name of the adapter whose weights are also written to ``model.safetensors``, where Trainer looks
            for them, with the keys of the model's state dict. None: only if the file exists already.
        model_state: state dict of the model, gathered from several processes; None: the adapters' own tensors.
        is_main_process: False: only take part in gathering tensors.
        card_details: see :func:`~vpt_peft.hub.render_card`. With ``model_id``, the folder is made to be published: the
            path of a local backbone is left out.

    Raises:
        CheckpointError, ConfigError: an adapter could not be loaded again, a folder contains a full model or cannot be
            written to, or ``model_state`` lacks tensors. Nothing was saved.
    """
    directory = Path(save_directory)
    if card_details.get("model_id") is not None:
        adapters = {name: _to_publish(adapter) for name, adapter in adapters.items()}
    folders = {name: adapter_folder(directory, name) for name in adapters}
    # In all processes, since those that go on would wait for the others.
    for folder in sorted({*folders.values(), *([] if checkpointed is None else [directory])}):
        _check_writable(folder)
        _check_no_model(folder)
    configs = {name: pack_config(adapter, fingerprint) for name, adapter in adapters.items()}
    details = {**card_details, "has_processor": image_processor is not None}
    cards = {
        name: render_card(adapter, folders[name], subfolder=None if name == "default" else name, **details)
        for name, adapter in adapters.items()
    }
    gathered = None if not model_state else strip_compile_prefix(model_state)
    states = {name: _adapter_state(name, adapter, gathered) for name, adapter in adapters.items()}
    if not is_main_process:
        return
    for name, adapter in adapters.items():
        outcome = f"Nothing was saved, since '{name}' could not be loaded again."
        check_state_dict(adapter.layout, states[name], outcome=outcome)
    processor_files = {} if image_processor is None else pack_files(image_processor)
    _make_folders(folders)
    for name, folder in folders.items():
        save_adapter(folder, configs[name], states[name], processor_files)
        update_card(folder, cards[name], stacklevel=4)
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


def _to_publish(adapter: Adapter) -> Adapter:
    """The same adapter, sharing its tensors, with the config to publish."""
    published = copy.copy(adapter)
    published.config = without_local_backbone(adapter.config)
    return published


def check_repository(
    adapter_names: Iterable[str], repo_id: str, revision: str | None = None, token: str | bool | None = None
) -> str:
    """Checks that pushing adapters to a repository leaves no model in it unloadable.

    Args:
        revision: the branch that is pushed to.

    Returns:
        The commit that the push is based on; empty if there is no such repository.

    Raises:
        CheckpointError: a folder that an adapter would be pushed to contains a full model.
    """
    commit, files = find_commit(repo_id, revision, token)
    for folder in sorted({PurePosixPath() if name == "default" else PurePosixPath(name) for name in adapter_names}):
        names = [PurePosixPath(file).name for file in files if PurePosixPath(file).parent == folder]
        where = repo_id if folder == PurePosixPath() else f"{repo_id}/{folder}"
        _refuse_model(names, where, partial(tensor_names, repo_id, str(folder / TRAINER_WEIGHTS), commit, token))
    return commit


def check_endpoint(adapters: Mapping[str, Adapter]) -> None:
    """Raises AdapterError if an Inference Endpoint, which loads one adapter with its backbone, could not run them."""
    if not adapters:
        return  # save_pretrained refuses that
    if "default" not in adapters and len(adapters) > 1:
        raise AdapterError(
            f"An endpoint runs one adapter, got {truncate_list(list(adapters), MAX_LISTED)}, none of them 'default'. "
            "Push one of them, by selected_adapters."
        )
    name = "default" if "default" in adapters else next(iter(adapters))
    config, labels = adapters[name].config, adapters[name].labels()["id2label"]
    if config.task_type != "IMAGE_CLASSIFICATION" or not labels:
        raise AdapterError(
            f"handler=True is for image classification, got the adapter '{name}' for {config.task_type} with "
            f"{len(labels)} labels. Push it without a handler."
        )


def _check_writable(folder: Path) -> None:
    """Raises CheckpointError if there is a file where a folder should be, or a folder where a file should be."""
    found = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not found.is_dir():
        raise CheckpointError(f"save_pretrained needs a folder, got the file '{found}'. Choose another name.")
    for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, TRAINER_WEIGHTS):
        if (folder / name).is_dir():
            raise CheckpointError(f"save_pretrained writes the file '{folder / name}', got a folder. Remove it.")


def _make_folders(folders: Mapping[str, Path]) -> None:
    """Creates folders. Raises CheckpointError if two are one, by a link or since the file system ignores case."""
    owners: dict[tuple[int, int], str] = {}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        status = folder.stat()
        other = owners.setdefault((status.st_dev, status.st_ino), name)
        if other != name:
            raise CheckpointError(
                f"Each adapter needs a folder of its own, but those of '{other}' and '{name}' are the same. "
                "Nothing was saved."
            )


def _check_no_model(folder: Path) -> None:
    """Raises CheckpointError for a folder with a full model."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    _refuse_model(names, str(folder), partial(_tensor_names, folder / TRAINER_WEIGHTS))


def _refuse_model(file_names: Iterable[str], where: str, tensors: Callable[[], Iterable[str]]) -> None:
    """Raises CheckpointError for a folder with a full model: a checkpoint would replace its weights, and transformers
    with PEFT would take it for an adapter.

    Args:
        where: the folder or repository, for the error message.
        tensors: returns the names of the tensors in the file that Trainer's checkpoints have too.
    """
    found = sorted(name for name in file_names if MODEL_WEIGHTS.fullmatch(name))
    if found and not (found == [TRAINER_WEIGHTS] and _are_adapters(tensors())):
        raise CheckpointError(
            f"An adapter needs a folder of its own, but '{where}' contains a model "
            f"({truncate_list(found, MAX_LISTED)}), which could not be loaded any more. Choose another folder or "
            "repository. Nothing was saved."
        )


def _checkpointed_adapter(directory: Path) -> str | None:
    """Name of the adapter that :func:`_write_trainer_file` has written; None if there is no such file."""
    try:
        with open_weights(directory / TRAINER_WEIGHTS) as weights:
            name = (weights.config or {}).get("adapter")
            return name if isinstance(name, str) else None
    except CheckpointError:
        return None


def _tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a file; none if it is damaged."""
    try:
        with open_weights(path) as weights:
            return list(weights.shapes)
    except CheckpointError:
        return []


def _are_adapters(names: Iterable[str]) -> bool:
    """Whether tensors are those of a checkpoint of adapters, ours or accelerate's."""
    stripped = strip_compile_prefix(dict.fromkeys(names))
    return bool(stripped) and all(name.startswith("adapters.") for name in stripped)
