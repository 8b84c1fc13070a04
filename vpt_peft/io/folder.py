"""Adapter folders: saved atomically, loaded strictly and completely.

A folder holds ``adapter_config.json`` (the PromptConfig, the labels, and the backbone's type and widths) and
``adapter_model.safetensors`` (the adapter's state dict). The weights are replaced first and contain the new config and
the hash of the old config file; whoever finds the old config beside the new weights takes the one in the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..adapter import Adapter, check_labels
from ..backbones import Backbone, find_class
from ..config import PromptConfig
from ..errors import CheckpointError, ConfigError, safe_repr, truncate_list
from ..version import __version__
from .atomic import atomic_write, lock_folder, read_unreplaced
from .fingerprint import Fingerprint, check_fingerprint
from .state_dict import check_shapes, load_state_dict
from .weights import Weights, digest, open_weights, pack_weights

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 8 * 2**20
MAX_LISTED = 20
# Fields that define the function of an adapter; they may be edited only together with the weights.
SEALED = (
    "num_tokens", "kind", "deep", "layers_to_transform", "carry", "shared", "projection_dim", "pooling", "location",
    "bias", "modules_to_save", "model_type", "model_class", "widths",
)  # fmt: skip


@dataclass(frozen=True)
class SavedConfig:
    """The content of ``adapter_config.json``.

    Attributes:
        labels: ``id2label``, ``label2id`` and ``problem_type``.
        model_type, widths: type of the backbone, and the width of each layer, as they are in the file.
        model_class: name of the backbone's class; None in older files, and for classes outside of transformers.
        head: classes of the head's output layers by path, as they are in the file; None in files of other tools.
        fingerprint: of the backbone; None in files of other tools.
    """

    config: PromptConfig
    labels: dict[str, Any]
    model_type: Any
    model_class: str | None
    widths: Any
    head: Any
    fingerprint: Fingerprint | None


@dataclass(frozen=True)
class SavedAdapter(SavedConfig):
    """The content of an adapter folder, with its weights file, open."""

    weights: Weights


def parse_config(values: Mapping[str, Any]) -> SavedConfig:
    """The content of ``adapter_config.json``, given as the JSON object in it.

    Raises:
        CheckpointError: a value is missing or not valid.
    """
    return SavedConfig(*_parse(values))


def pack_config(adapter: Adapter, fingerprint: Fingerprint) -> bytes:
    """The content of ``adapter_config.json``, checked as when it is loaded.

    Args:
        fingerprint: of the adapter's backbone.

    Raises:
        CheckpointError, ConfigError: it could not be loaded.
    """
    values = {
        **adapter.config.replace(inference_mode=True).to_dict(),
        **adapter.labels(),
        "model_type": adapter.model_type,
        "model_class": adapter.model_class,
        "widths": adapter.widths,
        "head": adapter.head_classes,
        "fingerprint": fingerprint.without(
            [*adapter.head.paths, *adapter.modules_to_save.paths], adapter.bias.paths
        ).to_dict(),
        "vpt_peft_version": __version__,
    }
    content = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
    if len(content) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{CONFIG_NAME} must be at most {MAX_CONFIG_BYTES:,} bytes, got {len(content):,}. Shorten the label names."
        )
    _parse(json.loads(content))
    return content


def save_adapter(
    folder: Path, content: bytes, tensors: Mapping[str, Tensor], others: Mapping[str, bytes] | None = None
) -> None:
    """Writes an adapter folder. At any moment it holds the old adapter or the new one.

    Args:
        content: see :func:`pack_config`.
        tensors: the adapter's state dict.
        others: further files by name. Who reads them together with the adapter must lock the folder.
    """
    with lock_folder(folder):
        path = folder / CONFIG_NAME
        previous = path.read_bytes() if path.is_file() else b""
        replaces = digest(previous) if previous not in (b"", content) else ""
        atomic_write(folder / WEIGHTS_NAME, pack_weights(tensors, json.loads(content), replaces))
        atomic_write(path, content)
        for name, other in (others or {}).items():
            atomic_write(folder / name, other)


def load_adapter(
    saved: SavedAdapter,
    backbone: Backbone,
    fingerprint: Fingerprint | None,
    is_trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Creates an adapter from its folder.

    Args:
        saved: the folder, see :func:`open_folder`.
        fingerprint: the backbone's, which must be that of the adapter; None: it may be another.
        is_trainable: whether it may train.
        dtype: precision of its tensors; None: float32.

    Raises:
        CheckpointError: the folder is damaged, or the adapter was made for another backbone.
    """
    adapter = make_adapter(saved, backbone, fingerprint, is_trainable)
    check_shapes(adapter.state_dict(), saved.weights.shapes)
    adapter.materialize(backbone.device, dtype)
    load_state_dict(adapter, saved.weights.tensors())
    return adapter


def make_adapter(
    saved: SavedConfig, backbone: Backbone, fingerprint: Fingerprint | None, is_trainable: bool = False
) -> Adapter:
    """An adapter with the config and labels of a saved one, on the meta device; see :func:`load_adapter`.

    Raises:
        CheckpointError: no such adapter can be created, or it was made for another backbone.
    """
    _check_backbone(saved, backbone, fingerprint)
    config = saved.config.replace(inference_mode=not is_trainable)
    try:  # on the meta device: no memory is allocated until the shapes are known to match
        adapter = Adapter(config, backbone, saved.labels, torch.device("meta"))
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"No adapter with the values of {CONFIG_NAME} can be created: {reason}.") from error
    _check_head(saved, adapter)
    return adapter


def reload_adapter(adapter: Adapter, saved: SavedAdapter, backbone: Backbone, fingerprint: Fingerprint | None) -> None:
    """Loads the tensors in a folder into an adapter with equal config and labels; see :func:`load_adapter`.

    Raises:
        CheckpointError: the folder is damaged, or its config differs. Nothing has changed.
    """
    _check_backbone(saved, backbone, fingerprint)
    different = _different_fields(adapter, saved)
    if different:
        raise CheckpointError(
            f"Expected the config and labels of the existing adapter, but '{saved.weights.path.parent}' differs in "
            f"{', '.join(different)}. Delete that adapter first, or load under another name."
        )
    _check_head(saved, adapter)
    check_shapes(adapter.state_dict(), saved.weights.shapes)
    load_state_dict(adapter, saved.weights.tensors())


@contextmanager
def open_folder(folder: str | os.PathLike[str]) -> Iterator[SavedAdapter]:
    """Opens an adapter folder, or a folder with a single adapter in a subfolder.

    Raises:
        CheckpointError: a file is missing or damaged, or a value is not valid.
    """
    path = _find(Path(folder))
    with ExitStack() as stack:
        try:  # if the config is replaced meanwhile, another process has saved both files
            content, weights = read_unreplaced(
                path / CONFIG_NAME,
                lambda file: (_read_config(file), stack.enter_context(open_weights(path / WEIGHTS_NAME))),
            )
        except OSError as error:
            raise CheckpointError(f"Cannot read the folder '{path}': {error}.") from error
        values = _parse_json(content, path)
        if weights.config is not None and weights.replaces == digest(content):
            values = weights.config  # saving was interrupted between the two files
        saved = SavedAdapter(*_parse(values), weights)
        if weights.config not in (None, values):
            _check_sealed(saved, parse_config(weights.config))
        yield saved


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"Expected an adapter folder, got '{folder}', which does not exist or is not a folder.")
    path = folder
    if not (path / CONFIG_NAME).exists():
        inner = [entry.parent for entry in sorted(path.glob(f"*/{CONFIG_NAME}"))]
        if len(inner) > 1:
            names = truncate_list([entry.name for entry in inner], MAX_LISTED)
            raise CheckpointError(f"'{path}' contains several adapters: {names}. Give the folder of one of them.")
        path = inner[0] if inner else path
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            found = truncate_list(sorted(entry.name for entry in path.iterdir()), MAX_LISTED)
            raise CheckpointError(
                f"An adapter folder contains {CONFIG_NAME} and {WEIGHTS_NAME}, but '{path}' lacks {name}; it contains "
                f"[{found}]. Pickled weights (.bin, .pt, .pth) are never opened: save them as safetensors."
            )
        _check_inside(folder, path / name)
    return path


def _check_inside(folder: Path, file: Path) -> None:
    """Raises CheckpointError for a link out of the folder, or out of the repository in the Hub's cache of links."""
    caches = (parent.parent for parent in folder.absolute().parents if parent.name == "snapshots")
    root = next((cache for cache in caches if (cache / "blobs").is_dir()), folder).resolve()
    if not file.resolve().is_relative_to(root):
        raise CheckpointError(f"'{file}' must be a file in its folder, got a link out of it. Copy the file there.")


def _read_config(file: BinaryIO) -> bytes:
    content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"'{file.name}' must be at most {MAX_CONFIG_BYTES:,} bytes, got more.")
    return content


def _parse_json(content: bytes, folder: Path) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{folder / CONFIG_NAME}' must be a JSON file, but cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"'{folder / CONFIG_NAME}' must contain a JSON object, got {type(values).__name__}.")
    return values


def _parse(
    values: Mapping[str, Any],
) -> tuple[PromptConfig, dict[str, Any], Any, str | None, Any, Any, Fingerprint | None]:
    """Config, labels, model type, backbone class, widths, head and fingerprint in ``adapter_config.json``."""
    values = {name: value for name, value in values.items() if name != "vpt_peft_version"}
    try:
        labels = {name: values.pop(name) for name in ("id2label", "label2id", "problem_type")}
        model_type, widths = values.pop("model_type"), values.pop("widths")
        head, fingerprint = values.pop("head", None), values.pop("fingerprint", None)
        model_class = values.pop("model_class", None)
        config, checked = PromptConfig.from_dict(values), check_labels(**labels)
        names = {str(label): name for label, name in checked["id2label"].items()}
        if {**checked, "id2label": names} != labels:  # such as names that are numbers
            raise ConfigError("id2label must map 0 to n-1 to strings, and label2id strings to 0 to n-1.")
        if model_class is not None and find_class(model_class) is None:
            raise ConfigError(
                "model_class must be the name of a supported class of transformers, such as 'ViTModel', or null, "
                f"got {safe_repr(model_class)}."
            )
        parsed = None if fingerprint is None else Fingerprint.from_dict(fingerprint)
        return config, checked, model_type, model_class, widths, head, parsed
    except KeyError as error:
        raise CheckpointError(f"{CONFIG_NAME} must contain {error}. Was it saved by vpt-peft?") from error
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG_NAME} is not valid: {error}") from error


def _check_sealed(saved: SavedConfig, sealed: SavedConfig) -> None:
    """Raises CheckpointError if the config file and the weights belong to different adapters."""
    values, expected = (
        {
            **part.config.to_dict(),
            "model_type": part.model_type,
            "model_class": part.model_class,
            "widths": part.widths,
        }
        for part in (saved, sealed)
    )
    changed = [
        f"{name}: expected {safe_repr(expected[name])}, got {safe_repr(values[name])}"
        for name in SEALED
        if values[name] != expected[name]
    ]
    if changed:
        raise CheckpointError(
            f"{CONFIG_NAME} does not belong to {WEIGHTS_NAME}, which was saved with other values: "
            f"{'; '.join(changed)}. Restore them, or save the adapter again."
        )


def _check_backbone(saved: SavedConfig, backbone: Backbone, fingerprint: Fingerprint | None) -> None:
    """Raises CheckpointError, naming both, if an adapter was made for another backbone."""
    name = saved.config.base_model_name_or_path
    if (saved.model_type, saved.widths) != (backbone.model_type, backbone.widths):
        raise CheckpointError(
            f"The adapter was made for a {safe_repr(saved.model_type)} backbone with layers of widths "
            f"{safe_repr(saved.widths)}, got {type(backbone.model).__name__} ('{backbone.model_type}') with layers of "
            f"widths {backbone.widths}. Load the backbone it was trained on{f': {safe_repr(name)}' if name else ''}."
        )

    if fingerprint is not None and saved.fingerprint is not None:
        check_fingerprint(saved.fingerprint, fingerprint, name)


def _check_head(saved: SavedConfig, adapter: Adapter) -> None:
    """Raises CheckpointError if a head of the user's own was saved, and the backbone has another, or the reverse."""
    if saved.head not in (None, adapter.head_classes):
        raise CheckpointError(
            f"The adapter was saved with the head {safe_repr(saved.head)}, but the backbone has "
            f"{adapter.head_classes}. Give the backbone the same head before loading."
        )


def _different_fields(adapter: Adapter, saved: SavedAdapter) -> list[str]:
    """Fields in which an adapter and a folder differ. Whether it may train is not compared."""
    own, other = (
        {**config.to_dict(), **labels, "inference_mode": None, "problem_type": None}
        for config, labels in ((adapter.config, adapter.labels()), (saved.config, saved.labels))
    )
    return [name for name in own if own[name] != other[name]]
