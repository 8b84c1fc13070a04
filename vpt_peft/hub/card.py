"""The model card of an adapter. Text that the user has added is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..adapter import Adapter
from ..config import PromptConfig, check_unicode
from ..errors import CheckpointError, ConfigError, safe_repr
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
TEXT_FIELDS = ("language", "license", "license_name", "library_name", "tags", "datasets", "metrics", "base_model")
CARD_DETAILS = frozenset({"model_id", "training_data", "metrics", "license"})


def write_card(adapter: Adapter, folder: Path, **details: Any) -> None:
    """Writes the card of an adapter, or updates an existing one, see :func:`update_card`.

    Args:
        folder: of the adapter; created if it does not exist.
        details: see :func:`render_card`.

    Raises:
        CheckpointError: the folder is a file.
    """
    body, metadata = render_card(adapter, folder, **details)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"A model card needs a folder, got the file '{folder}'. Choose another name.")
    folder.mkdir(parents=True, exist_ok=True)
    update_card(folder, body, metadata, stacklevel=4)


def render_card(
    adapter: Adapter,
    folder: Path,
    model_id: str | None = None,
    subfolder: str | None = None,
    training_data: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
    license: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """The generated part of an adapter's card, and its metadata.

    Args:
        folder: of the adapter.
        model_id: repository of the adapter, with its ``subfolder``; None: its folder.
        training_data: the name of a data set on the Hub, which the metadata then name too, or any other text.
        metrics: ``{name: value}``, numbers or text.
        license: license of the adapter.

    Raises:
        ConfigError: a value is of the wrong type.
    """
    texts = {"model_id": model_id, "training_data": training_data, "license": license}
    for name, text in texts.items():
        if not isinstance(text, str | None):
            raise ConfigError(f"{name} must be a string or None, got {safe_repr(text)}.")
    source = (str(folder), None) if model_id is None else (model_id, subfolder)
    body = _render(adapter, source, training_data, metrics)
    check_unicode("The model card", f"{body}{license}")
    return body, _metadata(adapter, training_data, license)


def update_card(folder: Path, body: str, metadata: Mapping[str, Any], stacklevel: int = 2) -> None:
    """Writes a card, or updates the generated part and the metadata of an existing one.

    The text of a card without a generated part is not changed. A card that cannot be read is not changed at all, with
    a warning.

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
    """Metadata and text of a card. Fields in which the Hub expects strings are those that are written there: YAML reads
    2024 and 1.10 as numbers, and no, the code of Norwegian, as False."""
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return {}, content.strip()
    values = yaml.safe_load(block[2]) or {}
    texts = yaml.load(block[2], Loader=yaml.BaseLoader)  # all values as strings
    values |= {name: _as_written(values[name], texts[name]) for name in TEXT_FIELDS if values.get(name) is not None}
    data = ModelCardData(**values, ignore_metadata_errors=True).to_dict()  # type: ignore[no-untyped-call]
    ModelCardData(**data)  # raises here what could not be written again
    return data, content[block.end() :].strip()


def _as_written(value: Any, text: Any) -> Any:
    if isinstance(value, list):
        return [_as_written(item, item_text) for item, item_text in zip(value, text, strict=True) if item is not None]
    return value if isinstance(value, str | dict) else text


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
    metrics: Mapping[str, float | str] | None,
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


def _details(adapter: Adapter, training_data: str | None, metrics: Mapping[str, float | str] | None) -> str:
    lines = []
    if training_data:
        lines.append(f"| training data | {_cell(training_data)} |")
    if not isinstance(metrics, Mapping | None):
        raise ConfigError(f"metrics must map names to numbers or strings, got {safe_repr(metrics)}.")
    lines += [f"| {_cell(str(name))} | {_format(value)} |" for name, value in (metrics or {}).items()]
    if adapter.config.task_type in ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION"):
        names = list(adapter.labels()["id2label"].values())
        more = f" and {len(names) - MAX_LABELS} more" if len(names) > MAX_LABELS else ""
        lines.append(f"| labels | {', '.join(map(_cell, names[:MAX_LABELS]))}{more} |")
    return "".join(f"{line}\n" for line in lines)


def _format(value: Any) -> str:
    """The value of a metric: a number, such as NumPy's or a tensor of one element, or any text."""
    try:
        return _cell(value) if isinstance(value, str) else f"{float(value):.4g}"
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metrics must map names to numbers or strings, got {safe_repr(value)}.") from error


def _code(config: PromptConfig, model_id: str, subfolder: str | None) -> str:
    source = json.dumps(model_id)  # a JSON string is a Python string
    source += f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    if config.base_model_name_or_path is not None:
        return f"from vpt_peft import AutoVPTModel\n\nvpt = AutoVPTModel.from_pretrained({source})"
    return (
        "from vpt_peft import VPTModel\n\n"
        f"vpt = VPTModel.from_pretrained(model, {source})  # model: the backbone it was trained on"
    )
