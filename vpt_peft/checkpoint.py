"""Checkpoints: an adapter to its folder, and back. Strict, complete and atomic."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter
from .backbones import Backbone
from .errors import CheckpointError, listed, shown
from .files import locked, replace
from .folder import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, Saved, open_folder
from .state import COMPILED, load_state_dict, misfits, refuse, shapes_of
from .weights import digest, open_weights, pack

TRAINER_WEIGHTS_NAME = "model.safetensors"
MAX_LISTED = 5
MODEL_WEIGHTS = re.compile(r"((pytorch_|tf_|flax_)?model)([.-].*)?\.(safetensors|bin|h5|msgpack)(\.index\..*json)?")


# -- saving ---------------------------------------------------------------------------------------------------------


def save(adapter: Adapter, folder: str | os.PathLike[str], version: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter folder. At any moment it holds the adapter that was there, or the new one.

    Args:
        tensors: the adapter's, under the names of the format.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"save_pretrained needs a folder, got the file '{path}'. Choose another name.")
    path.mkdir(parents=True, exist_ok=True)
    values = {
        **adapter.config.replace(inference_mode=True).to_dict(),
        **adapter.labels(),
        "model_type": adapter.model_type,
        "widths": adapter.widths,
        "vpt_peft_version": version,
    }
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{CONFIG_NAME} must be at most {MAX_CONFIG_BYTES:,} bytes, got {len(text):,}. Shorten the labels' names."
        )
    with locked(path):
        config = path / CONFIG_NAME
        before = config.read_bytes() if config.is_file() else b""
        replaces = digest(before) if before not in (b"", text.encode()) else ""
        # The weights hold the config too, so that replacing them replaces both: see open_folder.
        content = pack({name: tensor.contiguous() for name, tensor in tensors.items()}, text, replaces)
        replace(path / WEIGHTS_NAME, content)
        replace(config, text.encode())


def link(folder: Path, checkpoint: Path, names: Mapping[str, str] | None = None) -> None:
    """Gives a folder's weights the name under which ``Trainer`` looks for them, without taking space for them twice
    where the file system can do that.

    Args:
        names: ``{name: other name}`` of the tensors there, which takes the space; None: they keep their names.
    """
    source, target = folder / WEIGHTS_NAME, checkpoint / TRAINER_WEIGHTS_NAME
    with locked(checkpoint):
        if names is not None:
            replace(target, _renamed(source, names))
            return
        with tempfile.TemporaryDirectory(dir=checkpoint, prefix=".saving-") as temporary:
            file = Path(temporary) / TRAINER_WEIGHTS_NAME
            try:
                os.link(source, file)
            except OSError:
                shutil.copyfile(source, file)
            os.replace(file, target)


def _renamed(file: Path, names: Mapping[str, str]) -> bytes:
    with open_weights(file) as weights:
        tensors = {names[name]: tensor for name, tensor in weights.tensors().items()}
        return pack(tensors, weights.config or "", "")


def is_linked(checkpoint: Path) -> bool:
    """Whether :func:`link` has been there: weights of an adapter's have that name, which must not become stale."""
    try:
        with open_weights(checkpoint / TRAINER_WEIGHTS_NAME) as weights:
            return weights.config is not None
    except CheckpointError:
        return False


def check_place(folder: Path) -> None:
    """Raises CheckpointError for a folder with a whole model, which could not be loaded any more with an adapter in it.

    A checkpoint would replace its weights, and transformers, where PEFT is installed, would take it for an adapter.
    """
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in names if MODEL_WEIGHTS.fullmatch(name)]
    if found and not (found == [TRAINER_WEIGHTS_NAME] and _holds_adapters(folder / TRAINER_WEIGHTS_NAME)):
        raise CheckpointError(
            f"An adapter needs a folder of its own, but '{folder}' holds a model ({listed(found, MAX_LISTED)}), which "
            "could not be loaded any more. Choose another folder. Nothing was saved."
        )


def _holds_adapters(file: Path) -> bool:
    """Whether a file is a checkpoint's, or a state that accelerate has saved, and not a model."""
    try:
        with open_weights(file) as weights:
            names = [name.removeprefix(COMPILED) for name in weights.shapes]
            return weights.config is not None or all(name.startswith("adapters.") for name in names)
    except CheckpointError:
        return False


# -- loading --------------------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    backbone: Backbone,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Builds an adapter from its folder.

    Args:
        folder: see :func:`open_folder`.
        trainable: whether it may train.
        dtype: precision to keep its tensors in; None: float32.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or made for another backbone.
    """
    with open_folder(folder) as saved:
        _check_fit(saved, backbone)
        try:  # on the meta device, where nothing takes memory until the sizes are known to be right
            config = saved.config.replace(inference_mode=not trainable)
            adapter = Adapter(config, backbone, saved.labels, torch.device("meta"))
        except (RuntimeError, OverflowError, TypeError) as error:
            raise CheckpointError(f"{CONFIG_NAME} describes no adapter that can exist: {_first(error)}.") from error
        refuse(misfits(shapes_of(adapter.tensors()), saved.weights.shapes))
        adapter.materialize(backbone.device, dtype)
        load_state_dict(adapter, saved.weights.tensors())
        return adapter


def reload(adapter: Adapter, folder: str | os.PathLike[str], backbone: Backbone) -> None:
    """Loads the tensors of a folder into an adapter of equal config and labels.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or its config is another. Nothing has changed.
    """
    with open_folder(folder) as saved:
        _check_fit(saved, backbone)
        differing = _differing(adapter, saved)
        if differing:
            raise CheckpointError(
                f"Expected an adapter of the same config and labels as the one of that name, but '{folder}' differs in "
                f"{', '.join(differing)}. Delete the one that exists first, or load under another name."
            )
        refuse(misfits(shapes_of(adapter.tensors()), saved.weights.shapes))
        load_state_dict(adapter, saved.weights.tensors())


def _differing(adapter: Adapter, saved: Saved) -> list[str]:
    """Names of what an adapter and a folder say differently. Whether it may train is the adapter's own affair."""
    own, other = (
        {**config.to_dict(), **labels, "inference_mode": None, "problem_type": None}
        for config, labels in ((adapter.config, adapter.labels()), (saved.config, saved.labels))
    )
    return [name for name in own if own[name] != other[name]]


def _check_fit(saved: Saved, backbone: Backbone) -> None:
    """Raises CheckpointError, naming both, if an adapter was made for another backbone."""
    if saved.model_type != backbone.model_type:
        raise CheckpointError(
            f"The adapter was made for a {shown(saved.model_type)} backbone, got {type(backbone.model).__name__} "
            f"('{backbone.model_type}'). Load the backbone that it was trained on"
            + (f": {shown(saved.config.base_model_name_or_path)}." if saved.config.base_model_name_or_path else ".")
        )
    if saved.widths != backbone.widths:
        raise CheckpointError(
            f"The adapter was made for {len(saved.widths)} layers of widths {_brief(saved.widths)}, got a backbone of "
            f"{len(backbone.widths)} layers of widths {_brief(backbone.widths)}. Load the one that it was trained on."
        )


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _brief(widths: list[int]) -> str:
    return shown(sorted(set(widths)))
