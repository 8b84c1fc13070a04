"""An adapter folder: found, read as one although it is two files, and checked. Nothing in it is believed.

It holds ``adapter_config.json`` (the PromptConfig and what the head's outputs mean) and ``adapter_model.safetensors``
with keys of our own, not the backbone's paths, so that adapters outlive its refactorings: ``prompts.{layer}``,
``projection.*``, ``head.{path}.*``, ``bias.{path}``, ``modules.{path}.*``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import PromptConfig
from .errors import CheckpointError, ConfigError, shown
from .weights import Weights, digest, open_weights, parse_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 8 * 2**20
ATTEMPTS = 20
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
# What an adapter computes. Other fields may be edited by hand; these only together with the weights.
SEALED = (
    "num_tokens", "deep", "layers_to_transform", "carry", "shared", "projection_dim", "pooling", "location", "bias",
    "modules_to_save", "model_type", "widths",
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """What an open adapter folder holds.

    Attributes:
        labels: ``id2label``, ``label2id`` and ``problem_type``.
        model_type, widths: the backbone it was made for, and the width of each of its layers.
    """

    config: PromptConfig
    labels: dict[str, Any]
    model_type: str
    widths: list[int]
    weights: Weights


@contextmanager
def open_folder(folder: str | os.PathLike[str]) -> Iterator[Saved]:
    """Opens an adapter folder, or a folder with an only adapter in a subfolder.

    Raises:
        CheckpointError: a file is missing or damaged, or a value is not what the format says.
    """
    path = _find(Path(folder))
    with ExitStack() as stack:
        for attempt in range(ATTEMPTS):
            try:
                before = _stamps(path)
                content = _read_config(path / CONFIG_NAME)
                weights = stack.enter_context(open_weights(path / WEIGHTS_NAME))
                unchanged = _stamps(path) == before
            except OSError as error:
                raise CheckpointError(f"'{path}' must be a folder that can be read, but cannot: {error}.") from error
            if unchanged or attempt == ATTEMPTS - 1:
                break
            stack.close()  # another process has saved in between: the two files may be of two adapters
        if weights.config is not None and weights.replaces == digest(content):  # a save ended between its two files
            content = weights.config.encode()
        parsed = _parse(_parse_config(content, path))
        if weights.config is not None:
            sealed = _parse(_parse_config(weights.config.encode(), path))
            _check_belongs(_function(*parsed), _function(*sealed))
        yield Saved(*parsed, weights)


def _stamps(path: Path) -> list[tuple[int, int]]:
    stats = [(path / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    return [(stat.st_ino, stat.st_mtime_ns) for stat in stats]


def _find(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"Expected an adapter folder, got '{path}', which does not exist or is no folder.")
    root = path
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
        _check_inside(root, path / name)
    return path


def _check_inside(folder: Path, file: Path) -> None:
    """A file must lie in its folder; in the Hub's cache, where files are links, in the repository's."""
    caches = (parent.parent for parent in folder.absolute().parents if parent.name == "snapshots")
    root = next((cache for cache in caches if (cache / "blobs").is_dir()), folder).resolve()
    if not file.resolve().is_relative_to(root):
        raise CheckpointError(f"'{file}' must be a file of its folder, got a link out of it. Copy it there.")


def _function(config: PromptConfig, labels: dict[str, Any], model_type: str, widths: list[int]) -> dict[str, Any]:
    values = {**config.to_dict(), "model_type": model_type, "widths": widths}
    return {name: values[name] for name in SEALED}


def _check_belongs(values: dict[str, Any], sealed: dict[str, Any]) -> None:
    changed = [
        f"{name}: expected {shown(sealed[name])}, got {shown(values[name])}"
        for name in SEALED
        if values[name] != sealed[name]
    ]
    if changed:
        raise CheckpointError(
            f"{CONFIG_NAME} does not belong to {WEIGHTS_NAME}, which was saved with other values. {changed}. "
            "Restore them, or save the adapter again."
        )


def _read_config(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            size = os.fstat(file.fileno()).st_size
            raise CheckpointError(f"'{path}' must be at most {MAX_CONFIG_BYTES:,} bytes, got {size:,}.")
    return content


def _parse_config(content: bytes, folder: Path) -> dict[str, Any]:
    try:
        return parse_json(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{folder / CONFIG_NAME}' must be a JSON file, but cannot be read: {error}.") from error


# -- the config file ------------------------------------------------------------------------------------------------


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
        raise CheckpointError(f"model_type in {CONFIG_NAME} must be a string, got {shown(model_type)}.")
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        raise CheckpointError(f"widths in {CONFIG_NAME} must be a list of positive integers, got {shown(widths)}.")
    return config, _parse_labels(labels), model_type, widths


def _parse_labels(labels: dict[str, Any]) -> dict[str, Any]:
    id2label, label2id, problem_type = labels["id2label"], labels["label2id"], labels["problem_type"]
    try:
        names = {int(number): name for number, name in id2label.items() if str(int(number)) == number}
        numbers = dict(label2id.items())
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"id2label and label2id in {CONFIG_NAME} must map numbers and names: {shown(str(error))}."
        ) from error
    if sorted(names) != list(range(len(id2label))) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"id2label in {CONFIG_NAME} must map 0 to n-1 to names, got {shown(id2label)}.")
    if not all(type(number) is int and number in names for number in numbers.values()):
        raise CheckpointError(
            f"label2id in {CONFIG_NAME} must map names to 0 to {len(names) - 1}, got {shown(label2id)}."
        )
    if problem_type not in PROBLEM_TYPES:
        raise CheckpointError(
            f"problem_type in {CONFIG_NAME} must be one of {PROBLEM_TYPES}, got {shown(problem_type)}."
        )
    return {"id2label": names, "label2id": numbers, "problem_type": problem_type}
