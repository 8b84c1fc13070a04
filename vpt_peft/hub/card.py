"""The model card of an adapter. Text that the user has added is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..adapter import Adapter
from ..config import PromptConfig
from ..io import atomic_write, lock_folder
from .repo_ids import is_repo_id

CARD_NAME = "README.md"
BEGIN, END = "<!-- vpt-peft: generated, begin -->", "<!-- vpt-peft: generated, end -->"
PIPELINES = {
    "IMAGE_CLASSIFICATION": "image-classification",
    "SEMANTIC_SEGMENTATION": "image-segmentation",
    "FEATURE_EXTRACTION": "image-feature-extraction",
}
MAX_LABELS = 50
CARD_DETAILS = frozenset({"model_id", "training_data", "metrics", "license"})


def write_card(
    adapter: Adapter,
    folder: Path,
    model_id: str | None = None,
    subfolder: str | None = None,
    training_data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
) -> None:
    """Writes the card of an adapter, or updates the generated part and the metadata of an existing one.

    The text of a card without a generated part is not changed. A card that cannot be read is not changed at all, with
    a warning.

    Args:
        model_id: repository of the adapter, with its ``subfolder``; None: its folder.
        training_data: the name of a data set on the Hub, which the metadata then name too, or any other text.
        metrics: ``{name: value}``.
        license: license of the adapter.
    """
    source = (str(folder), None) if model_id is None else (model_id, subfolder)
    metadata = _metadata(adapter, training_data, license)
    update_card(folder, _render(adapter, source, training_data, metrics), metadata, stacklevel=5)


def update_card(folder: Path, body: str, metadata: Mapping[str, Any], stacklevel: int = 2) -> None:
    """Writes a card, or updates the generated part and the metadata of an existing one.

    Args:
        body: the generated part, in Markdown.
        metadata: tags are added to existing ones, other fields replace them.
        stacklevel: as in ``warnings.warn``.
    """
    generated = f"{BEGIN}\n{body.strip()}\n{END}"
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
        tags = sorted({*(data.get("tags") or []), *metadata.get("tags", [])})
        data |= {**metadata, "tags": tags or None}
        before, begin, rest = text.partition(BEGIN)
        _, end, behind = rest.partition(END)
        if begin and end:
            text = before + generated + behind
        header = ModelCardData(**data).to_yaml()
        atomic_write(folder / CARD_NAME, f"---\n{header}\n---\n\n{text or generated}\n".encode())


def _read(path: Path) -> str:
    """The existing card; empty if there is none, or a link out of the folder."""
    is_card = path.is_file() and path.resolve().is_relative_to(path.parent.resolve())
    return path.read_text(encoding="utf-8") if is_card else ""


def _split(content: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card."""
    if not content.startswith("---"):
        return {}, content.strip()
    card = ModelCard(content, ignore_metadata_errors=True)
    data = card.data.to_dict()  # type: ignore[no-untyped-call]
    ModelCardData(**data)  # raises here what could not be written again
    return data, card.text.strip()


def _metadata(adapter: Adapter, training_data: str | None, license: str | None) -> dict[str, Any]:
    config = adapter.config
    values = {
        "library_name": "vpt-peft",
        # The Hub rejects cards whose base model is not on it.
        "base_model": config.base_model_name_or_path if _is_on_hub(config) else None,
        "base_model_relation": "adapter" if _is_on_hub(config) else None,
        "pipeline_tag": PIPELINES.get(str(config.task_type)),
        "tags": ["peft", "visual-prompt-tuning", "vpt-peft"],
        "datasets": [training_data] if training_data and is_repo_id(training_data) else None,
        "license": license,
    }
    return {name: value for name, value in values.items() if value is not None}


def _is_on_hub(config: PromptConfig) -> bool:
    return config.base_model_name_or_path is not None and is_repo_id(config.base_model_name_or_path)


def _render(
    adapter: Adapter,
    source: tuple[str, str | None],
    training_data: str | None,
    metrics: Mapping[str, float] | None,
) -> str:
    config = adapter.config
    template = Template(files("vpt_peft.hub").joinpath("card_template.md").read_text(encoding="utf-8"))
    tensors = adapter.state_dict().values()
    return template.substitute(
        title=_cell(source[1] or Path(source[0]).name),
        variant=_variant(adapter),
        backbone=_backbone(config),
        num_tokens=config.num_tokens,
        parameters=f"{sum(parameter.numel() for parameter in adapter.parameters()):,}",
        bytes=f"{sum(tensor.numel() * tensor.element_size() for tensor in tensors):,}",
        details=_details(adapter, training_data, metrics),
        code=_code(config, *source),
    )


def _variant(adapter: Adapter) -> str:
    if adapter.config.num_tokens == 0:
        return "BitFit" if adapter.config.bias == "all" else "linear probing"
    fresh = [layer for layer, plan in enumerate(adapter.plan) if plan is not None and plan.fresh]
    if fresh == [0] and adapter.config.carry:
        return "VPT-Shallow"
    if len(fresh) == len(adapter.plan):
        return "VPT-Deep"
    in_a_row = len(fresh) > 2 and fresh == list(range(fresh[0], fresh[-1] + 1))
    layers = f"{fresh[0]} to {fresh[-1]}" if in_a_row else ", ".join(map(str, fresh))
    return f"VPT with fresh prompts in layer{'s' if len(fresh) > 1 else ''} {layers}, counted from 0"


def _cell(text: str) -> str:
    """Untrusted text as one cell of a table: without markup and line breaks, truncated."""
    text = " ".join(text.split())
    text = text if len(text) <= 200 else text[:200] + "..."
    return text.translate({ord(character): f"&#{ord(character)};" for character in "|<>`[]"})


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
        more = f" and {len(names) - MAX_LABELS} more" if len(names) > MAX_LABELS else ""
        lines.append(f"| labels | {', '.join(map(_cell, names[:MAX_LABELS]))}{more} |")
    return "".join(f"{line}\n" for line in lines)


def _code(config: PromptConfig, model_id: str, subfolder: str | None) -> str:
    source = json.dumps(model_id)  # a JSON string is a Python string
    source += f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    if config.base_model_name_or_path is not None:
        return f"from vpt_peft import AutoVPTModel\n\nvpt = AutoVPTModel.from_pretrained({source})"
    return (
        "from vpt_peft import VPTModel\n\n"
        f"vpt = VPTModel.from_pretrained(model, {source})  # model: the backbone it was trained on"
    )
