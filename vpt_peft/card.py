"""The model card that lies beside an adapter. The user's own words in it are kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .adapter import Adapter
from .config import PromptConfig
from .files import locked, replace
from .names import is_repository

NAME = "README.md"
BEGIN, END = "<!-- vpt-peft: generated, begin -->", "<!-- vpt-peft: generated, end -->"
PIPELINES = {
    "IMAGE_CLASSIFICATION": "image-classification",
    "SEMANTIC_SEGMENTATION": "image-segmentation",
    "FEATURE_EXTRACTION": "image-feature-extraction",
}
LABELS_SHOWN = 50
DETAILS = frozenset({"model_id", "training_data", "metrics", "license"})


def write(
    adapter: Adapter,
    folder: Path,
    model_id: str | None = None,
    subfolder: str | None = None,
    training_data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
) -> None:
    """Writes an adapter's card, or refreshes the generated part and the metadata of the one that is there.

    A card without a generated part is the user's: its text stays as it is. One that cannot be read stays altogether,
    with a warning.

    Args:
        model_id: how the adapter will be found, in its ``subfolder``; None: by its folder.
        training_data: what it was trained on: a data set of the Hub, by its name, which goes into the metadata too; or
            any text that cannot be one's name.
        metrics: ``{name: value}`` measured on it.
        license: of the adapter.
    """
    where = (str(folder), None) if model_id is None else (model_id, subfolder)
    facts = _metadata(adapter, training_data, license)
    refresh(folder, _render(adapter, where, training_data, metrics), facts, stacklevel=5)


def refresh(folder: Path, body: str, facts: Mapping[str, Any], stacklevel: int = 2) -> None:
    """Writes a card, or puts its generated part and metadata in place of those of the one that is there.

    Args:
        body: the generated part, in Markdown.
        facts: metadata; tags join those that are there, all else replaces what is there.
        stacklevel: whose line the warning about a card that cannot be read points at.
    """
    generated = f"{BEGIN}\n{body.strip()}\n{END}"
    with locked(folder):
        try:
            data, text = _split(_read(folder / NAME))
        except Exception as error:  # whatever YAML and the client make of it
            reason = " ".join(str(error).split())[:500]
            warnings.warn(
                f"'{folder / NAME}' must be UTF-8 text, with YAML between two lines '---' if it begins with one, but "
                f"cannot be read: {reason}. It was left as it is. Mend or delete it, and save again.",
                stacklevel=stacklevel,
            )
            return
        tags = sorted({*(data.get("tags") or []), *facts.get("tags", [])})
        data |= {**facts, "tags": tags or None}
        before, begin, rest = text.partition(BEGIN)
        _, end, behind = rest.partition(END)
        if begin and end:
            text = before + generated + behind
        metadata = ModelCardData(**data).to_yaml()
        replace(folder / NAME, f"---\n{metadata}\n---\n\n{text or generated}\n".encode())


def _read(path: Path) -> str:
    """The card that is there; a link out of the folder is none."""
    is_card = path.is_file() and path.resolve().is_relative_to(path.parent.resolve())
    return path.read_text(encoding="utf-8") if is_card else ""


def _split(content: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    if not content.startswith("---"):
        return {}, content.strip()
    card = ModelCard(content, ignore_metadata_errors=True)
    data = card.data.to_dict()  # type: ignore[no-untyped-call]
    ModelCardData(**data)  # what cannot be written again is not taken
    return data, card.text.strip()


def _metadata(adapter: Adapter, training_data: str | None, license: str | None) -> dict[str, Any]:
    config = adapter.config
    values = {
        "library_name": "vpt-peft",
        # A local folder is none: the Hub refuses cards that name anything but a model there.
        "base_model": config.base_model_name_or_path if _is_on_hub(config) else None,
        "base_model_relation": "adapter" if _is_on_hub(config) else None,
        "pipeline_tag": PIPELINES.get(str(config.task_type)),
        "tags": ["peft", "visual-prompt-tuning", "vpt-peft"],
        "datasets": [training_data] if training_data and is_repository(training_data) else None,
        "license": license,
    }
    return {name: value for name, value in values.items() if value is not None}


def _is_on_hub(config: PromptConfig) -> bool:
    return config.base_model_name_or_path is not None and is_repository(config.base_model_name_or_path)


def _render(
    adapter: Adapter,
    where: tuple[str, str | None],
    training_data: str | None,
    metrics: Mapping[str, float] | None,
) -> str:
    config = adapter.config
    template = Template(files("vpt_peft").joinpath("card_template.md").read_text(encoding="utf-8"))
    tensors = adapter.tensors().values()
    return template.substitute(
        title=_cell(where[1] or Path(where[0]).name),
        variant=_variant(adapter),
        backbone=_backbone(config),
        num_tokens=config.num_tokens,
        parameters=f"{sum(parameter.numel() for parameter in adapter.parameters()):,}",
        bytes=f"{sum(tensor.numel() * tensor.element_size() for tensor in tensors):,}",
        details=_details(adapter, training_data, metrics),
        code=_code(config, *where),
    )


def _variant(adapter: Adapter) -> str:
    if adapter.config.num_tokens == 0:
        return "BitFit" if adapter.config.bias == "all" else "linear probing"
    fresh = [layer for layer, step in enumerate(adapter.steps) if step is not None and step.fresh]
    if fresh == [0] and adapter.config.carry:
        return "VPT-Shallow"
    if len(fresh) == len(adapter.steps):
        return "VPT-Deep"
    in_a_row = len(fresh) > 2 and fresh == list(range(fresh[0], fresh[-1] + 1))
    layers = f"{fresh[0]} to {fresh[-1]}" if in_a_row else ", ".join(map(str, fresh))
    return f"VPT with fresh prompts in layer{'s' if len(fresh) > 1 else ''} {layers}, counted from 0"


def _cell(text: str) -> str:
    """Text of anyone's as one cell of a table: no markup, no line of its own, not endless."""
    text = " ".join(text.split())
    text = text if len(text) <= 200 else text[:200] + "..."
    return text.translate({ord(sign): f"&#{ord(sign)};" for sign in "|<>`[]"})


def _backbone(config: PromptConfig) -> str:
    name = config.base_model_name_or_path
    if name is None:
        return "a backbone without a name"
    return f"[{name}](https://huggingface.co/{name})" if _is_on_hub(config) else _cell(name)


def _details(adapter: Adapter, training_data: str | None, metrics: Mapping[str, float] | None) -> str:
    lines = []
    if training_data:
        lines.append(f"| training data | {_cell(training_data)} |")
    lines += [f"| {_cell(name)} | {value:.4g} |" for name, value in (metrics or {}).items()]
    if adapter.config.task_type in ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION"):
        names = list(adapter.labels()["id2label"].values())
        more = f" and {len(names) - LABELS_SHOWN} more" if len(names) > LABELS_SHOWN else ""
        lines.append(f"| labels | {', '.join(map(_cell, names[:LABELS_SHOWN]))}{more} |")
    return "".join(f"{line}\n" for line in lines)


def _code(config: PromptConfig, model_id: str, subfolder: str | None) -> str:
    source = json.dumps(model_id)  # quotes and backslashes too are the same in Python
    source += f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    if config.base_model_name_or_path is not None:
        return f"from vpt_peft import AutoVPTModel\n\nvpt = AutoVPTModel.from_pretrained({source})"
    return (
        "from vpt_peft import VPTModel\n\n"
        f"vpt = VPTModel.from_pretrained(model, {source})  # model: the backbone it was trained on"
    )
