"""The file of a model card. Text that the user has added is kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of huggingface_hub
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..adapter import Adapter
from ..errors import CheckpointError
from ..io import atomic_write, lock_folder
from .card_content import CardContent, is_listed, render_card

CARD_NAME = "README.md"
BEGIN, END = "<!-- vpt-peft: generated, begin -->", "<!-- vpt-peft: generated, end -->"
TEXT_FIELDS = ("language", "license", "license_name", "library_name", "tags", "datasets", "metrics", "base_model")


def write_card(adapter: Adapter, folder: Path, **details: Any) -> None:
    """Writes the card of an adapter, or updates an existing one, see :func:`update_card`.

    Args:
        folder: of the adapter; created if it does not exist.
        details: see :func:`render_card`.

    Raises:
        CheckpointError: the folder is a file.
    """
    content = render_card(adapter, folder, **details)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"A model card needs a folder, got the file '{folder}'. Choose another name.")
    folder.mkdir(parents=True, exist_ok=True)
    update_card(folder, content, stacklevel=4)


def update_card(folder: Path, content: CardContent, stacklevel: int = 2) -> None:
    """Writes a card, or updates the generated part and the metadata of an existing one.

    The text of a card without a generated part is not changed. A card that cannot be read is not changed at all, with
    a warning. Results in the metadata are kept, but not those of the previous generated part.

    Args:
        stacklevel: as in ``warnings.warn``.
    """
    generated = f"{BEGIN}\n{content.body.strip()}\n{END}"
    with lock_folder(folder):
        try:
            data, text = _split(_read(folder / CARD_NAME))
        except Exception as error:  # anything that YAML and the Hub client raise
            reason = " ".join(str(error).split())[:500]
            warnings.warn(
                f"'{folder / CARD_NAME}' must be UTF-8 text with optional YAML between two lines '---', but cannot be "
                f"read: {reason}. It was not changed. Correct or delete it, and save again.",
                stacklevel=stacklevel,
            )
            return
        before, begin, rest = text.partition(BEGIN)
        previous, end, behind = rest.partition(END)
        if begin and end:
            text = before + generated + behind
        tags = sorted({*(data.get("tags") or []), *content.metadata.get("tags", [])})
        header = _merge_results({**data, **content.metadata, "tags": tags or None}, content, previous).to_yaml()
        atomic_write(folder / CARD_NAME, f"---\n{header}\n---\n\n{text or generated}\n".encode())


def _merge_results(data: dict[str, Any], content: CardContent, previous: str) -> ModelCardData:
    """Metadata with the results of a card.

    Args:
        data: without the new results.
        previous: generated part of the existing card.
    """
    card = ModelCardData(**data)
    kept = [result for result in card.eval_results or [] if not is_listed(result, previous)]
    card.eval_results = [*kept, *content.results] or None
    if card.eval_results:
        card.model_name = card.model_name or content.name
    else:
        card.model_name = data.get("model_name")  # without that of the results
    return card


def _read(path: Path) -> str:
    """The existing card; empty if there is none, or a link out of the folder."""
    is_card = path.is_file() and path.resolve().is_relative_to(path.parent.resolve())
    return path.read_text(encoding="utf-8") if is_card else ""


def _split(content: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card. Fields in which the Hub expects strings are those that are written there: YAML reads
    2024 and 1.10 as numbers, and no, the code of Norwegian, as False."""
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return {}, content.strip()
    values = yaml.safe_load(block[2]) or {}
    texts = yaml.load(block[2], Loader=yaml.BaseLoader)  # all values as strings
    values |= {name: _as_written(values[name], texts[name]) for name in TEXT_FIELDS if values.get(name) is not None}
    if isinstance(values.get("tags"), str):  # one tag may stand alone
        values["tags"] = [values["tags"]]
    data = ModelCardData(**values).to_dict()  # type: ignore[no-untyped-call]  # raises what could not be written again
    return data, content[block.end() :].strip()


def _as_written(value: Any, text: Any) -> Any:
    if isinstance(value, list):
        return [_as_written(item, item_text) for item, item_text in zip(value, text, strict=True) if item is not None]
    return value if isinstance(value, str | dict) else text
