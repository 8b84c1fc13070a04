"""Checkpoints: an adapter's folder or state dict, and back. Strict, complete, and tensors only.

The folder holds ``adapter_config.json`` (the PromptConfig and what the head's outputs mean) and
``adapter_model.safetensors`` with keys of our own, not the backbone's paths, so that adapters outlive its
refactorings: ``prompts.{layer}``, ``projection.*``, ``head.{path}.*``, ``bias.{path}``, ``modules.{path}.*``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapter import Adapter
from .backbones import Backbone
from .config import PromptConfig
from .errors import CheckpointError, ConfigError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Saved:
    """What an adapter folder holds.

    Attributes:
        labels: ``id2label``, ``label2id`` and ``problem_type``.
        model_type, widths: the backbone it was made for, and the width of each of its layers.
    """

    config: PromptConfig
    labels: dict[str, Any]
    model_type: str
    widths: list[int]
    tensors: dict[str, Tensor]

    def matches(self, adapter: Adapter) -> bool:
        """Whether it was saved from an adapter of the same config and number of labels."""
        own = adapter.config.replace(inference_mode=self.config.inference_mode)
        return self.config == own and len(self.labels["id2label"]) == adapter.num_labels


def save(adapter: Adapter, folder: str | os.PathLike[str], version: str) -> None:
    """Writes an adapter folder; each file is replaced as a whole."""
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
    tensors = {name: tensor.contiguous() for name, tensor in state_dict(adapter).items()}
    _replace(path / WEIGHTS_NAME, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    _replace(path / CONFIG_NAME, lambda file: file.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Any) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        file = Path(folder) / path.name
        write(file)
        os.replace(file, path)


def load(folder: str | os.PathLike[str]) -> Saved:
    """Reads an adapter folder.

    Raises:
        CheckpointError: a file is missing or damaged, or a value is not what the format says.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"Expected an adapter folder, got '{path}', which does not exist or is no folder.")
    inner = [entry.parent for entry in sorted(path.glob(f"*/{CONFIG_NAME}"))]
    if not (path / CONFIG_NAME).exists() and len(inner) > 1:
        names = ", ".join(folder.name for folder in inner)
        raise CheckpointError(f"'{path}' holds several adapters: {names}. Give the folder of one of them.")
    if not (path / CONFIG_NAME).exists() and inner:
        path = inner[0]
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            there = sorted(entry.name for entry in path.iterdir())
            raise CheckpointError(
                f"An adapter folder holds {CONFIG_NAME} and {WEIGHTS_NAME}, but '{path}' lacks {name}; it holds "
                f"{there}. Pickled weights (.bin, .pt, .pth) are never opened: save them as safetensors."
            )
    config, labels, model_type, widths = _parse(_read_json(path / CONFIG_NAME))
    return Saved(config, labels, model_type, widths, _read_tensors(path / WEIGHTS_NAME))


def check_fit(saved: Saved, backbone: Backbone) -> None:
    """Raises CheckpointError, naming both, if an adapter was made for another backbone."""
    if saved.model_type != backbone.architecture.model_type:
        raise CheckpointError(
            f"The adapter was made for a '{saved.model_type}' backbone, got {type(backbone.model).__name__} "
            f"('{backbone.architecture.model_type}'). Load the backbone that it was trained on"
            + (f": {saved.config.base_model_name_or_path}." if saved.config.base_model_name_or_path else ".")
        )
    if saved.widths != backbone.widths:
        raise CheckpointError(
            f"The adapter was made for {len(saved.widths)} layers of widths {_brief(saved.widths)}, got a backbone of "
            f"{len(backbone.widths)} layers of widths {_brief(backbone.widths)}. Load the one that it was trained on."
        )


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Detached tensors of an adapter under the names of the format; they share its memory."""
    return {name: tensor.detach() for name, tensor in adapter.tensors().items()}


@torch.no_grad()
def load_state_dict(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into an adapter. Strict and complete; if it fails, nothing has changed.

    Raises:
        CheckpointError: names every missing, unexpected and mis-shaped tensor, and those with values that are not
            finite.
    """
    own = state_dict(adapter)
    missing = [f"{name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    unexpected = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if name not in own]
    shapes, types, values = [], [], []
    for name in own.keys() & tensors.keys():
        new, old = tensors[name], own[name]
        if new.shape != old.shape:
            shapes.append(f"{name}: expected {tuple(old.shape)}, got {tuple(new.shape)}")
        elif new.is_floating_point() != old.is_floating_point() or new.is_complex():
            types.append(f"{name}: expected {old.dtype}, got {new.dtype}")
        elif new.is_floating_point() and not new.isfinite().all():
            values.append(name)
    problems = {
        "missing": missing, "unexpected": unexpected, "of another shape": sorted(shapes),
        "of another type": sorted(types), "not finite (NaN or infinite)": sorted(values),
    }  # fmt: skip
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError("The tensors do not fit the adapter. " + "; ".join(found) + ". Nothing was loaded.")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"'{path}' must be a JSON file, but cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"'{path}' must hold a JSON object, got {type(values).__name__}.")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"'{path}' must be a safetensors file, but is damaged, cut off, or something else: {error}. "
            "Pickled weights are never opened."
        ) from error


def _parse(values: dict[str, Any]) -> tuple[PromptConfig, dict[str, Any], str, list[int]]:
    values = dict(values)
    values.pop("vpt_peft_version", None)
    try:
        labels = {name: values.pop(name) for name in ("id2label", "label2id", "problem_type")}
        model_type, widths = values.pop("model_type"), values.pop("widths")
    except KeyError as error:
        raise CheckpointError(f"{CONFIG_NAME} must name {error}, but does not. Was it saved by vpt-peft?") from error
    try:
        config = PromptConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG_NAME} is not valid: {error}") from error
    if not isinstance(model_type, str):
        raise CheckpointError(f"model_type in {CONFIG_NAME} must be a string, got {model_type!r}.")
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        raise CheckpointError(f"widths in {CONFIG_NAME} must be a list of positive integers, got {widths!r}.")
    return config, _parse_labels(labels), model_type, widths


def _parse_labels(labels: dict[str, Any]) -> dict[str, Any]:
    id2label, label2id, problem_type = labels["id2label"], labels["label2id"], labels["problem_type"]
    try:
        names = {int(number): name for number, name in id2label.items()}
        numbers = dict(label2id)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"id2label and label2id in {CONFIG_NAME} must map numbers and names: {error}.") from error
    if sorted(names) != list(range(len(names))) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"id2label in {CONFIG_NAME} must map 0 to n-1 to names, got {id2label!r}.")
    if not all(type(number) is int and number in names for number in numbers.values()):
        raise CheckpointError(f"label2id in {CONFIG_NAME} must map names to 0 to {len(names) - 1}, got {label2id!r}.")
    if problem_type not in PROBLEM_TYPES:
        raise CheckpointError(f"problem_type in {CONFIG_NAME} must be one of {PROBLEM_TYPES}, got {problem_type!r}.")
    return {"id2label": names, "label2id": numbers, "problem_type": problem_type}


def _brief(widths: list[int]) -> str:
    return str(sorted(set(widths)))
