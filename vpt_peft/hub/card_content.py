"""What a model card says: its generated part in Markdown, and its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath, PureWindowsPath
from string import Template
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult

from ..adapter import Adapter
from ..config import CLASSIFICATION_TASKS, PromptConfig, check_unicode
from ..errors import ConfigError, safe_repr
from ..version import __version__
from .repo_ids import is_repo_id
from .transfer import PROCESSOR_NAMES
from .usage import PIPELINE_TAGS, pipeline_code, usage_code

CARD_DETAILS = frozenset({"model_id", "training_data", "metrics", "hyperparameters", "license"})
LABELLED_TASKS = (*CLASSIFICATION_TASKS, "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "KEYPOINT_DETECTION")
MAX_LABELS = 50
# Prompt lengths by location, where they are no number of tokens.
LENGTHS = {
    "add": "a vector for each token", "add-shared": "a vector for all tokens", "pixel": "{} patches of pixels",
    "border": "{} pixels at each side of the image", "channel": "{} channels of the image",
}  # fmt: skip
# Fields of the config that a card lists where they are not the default.
OPTIONAL_FIELDS = (
    "carry", "shared", "projection_dim", "dropout", "init", "pooling", "location", "bias", "modules_to_save",
)  # fmt: skip


@dataclass(frozen=True)
class CardContent:
    """The content of a card.

    Attributes:
        name: title, without markup.
        body: generated part, in Markdown.
        metadata: tags are added to existing ones, other fields replace them.
        results: metrics for the metadata, besides existing ones.
    """

    name: str
    body: str
    metadata: Mapping[str, Any]
    results: tuple[EvalResult, ...] = ()


def render_card(
    adapter: Adapter,
    folder: Path,
    model_id: str | None = None,
    subfolder: str | None = None,
    training_data: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    license: str | None = None,
    has_processor: bool = False,
) -> CardContent:
    """The content of an adapter's card.

    Args:
        folder: of the adapter.
        model_id: repository of the adapter, with its ``subfolder``; None: its folder.
        training_data: the name of a data set on the Hub, which the metadata then name too, or any other text. Of an
            absolute path, only the last part is shown.
        metrics: ``{name: value}``, numbers or text, for the table of results and the metadata (``model-index``).
        hyperparameters: of the training, ``{name: value}``.
        license: license of the adapter.
        has_processor: an image or video processor is going to be saved in the folder.

    Raises:
        ConfigError: a value is of the wrong type.
    """
    texts = {"model_id": model_id, "training_data": training_data, "license": license}
    for name, text in texts.items():
        if not isinstance(text, str | None):
            raise ConfigError(f"{name} must be a string or None, got {safe_repr(text)}.")
    if not isinstance(metrics, Mapping | None):
        raise ConfigError(f"metrics must map names to numbers or strings, got {safe_repr(metrics)}.")
    if not isinstance(hyperparameters, Mapping | None):
        raise ConfigError(f"hyperparameters must map names to values, got {safe_repr(hyperparameters)}.")
    training_data = _display(training_data) if training_data else None
    metrics = {str(name): _metric(value) for name, value in (metrics or {}).items()}
    # An absolute path is private, and of no use to others.
    local = folder.resolve().name if folder.is_absolute() else folder.as_posix()
    source = (local, None) if model_id is None else (model_id, subfolder)
    title = source[1] or Path(model_id or folder.resolve()).name
    has_processor = has_processor or any((folder / name).is_file() for name in PROCESSOR_NAMES)
    body = Template(files("vpt_peft.hub").joinpath("card_template.md").read_text(encoding="utf-8")).substitute(
        title=_cell(title),
        variant=_variant(adapter),
        backbone=_backbone(adapter),
        adapter=_adapter_rows(adapter),
        pipeline=_pipeline_section(pipeline_code(adapter, *source)),
        code=usage_code(adapter, *source, has_processor),
        results=_results(metrics),
        training=_training_rows(training_data, hyperparameters),
    )
    check_unicode("The model card", f"{body}{license}")
    results = _eval_results(adapter, training_data, metrics)
    return CardContent(title, body, _metadata(adapter, training_data, license), tuple(results))


def is_listed(result: EvalResult, body: str) -> bool:
    """Whether a result is in the generated part of a card."""
    value = result.metric_value
    return isinstance(value, float | str) and f"| {_cell(str(result.metric_name))} | {_format(value)} |" in body


def _metric(value: Any) -> float | str:
    """The value of a metric: a number, such as NumPy's or a tensor of one element, or any text."""
    try:
        return value if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metrics must map names to numbers or strings, got {safe_repr(value)}.") from error


def _format(value: float | str) -> str:
    return _cell(value) if isinstance(value, str) else f"{value:.4g}"


def _display(value: object) -> str:
    """A value as text; of an absolute path only the last part, since the others are private."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    paths = [path for path in (PurePosixPath(text), PureWindowsPath(text)) if path.is_absolute()]
    return (paths[0].name if paths else "") or text


def _cell(text: str) -> str:
    """Untrusted text as one cell of a table: without markup and line breaks, truncated."""
    text = " ".join(text.split())
    text = text if len(text) <= 200 else text[:200] + "..."
    return text.translate({ord(character): f"&#{ord(character)};" for character in "|<>`[]"})


def _cells(values: Mapping[str, Any]) -> dict[str, str]:
    return {_cell(str(name)): _cell(_display(value)) for name, value in values.items()}


def _rows(cells: Mapping[str, str]) -> str:
    return "".join(f"| {name} | {value} |\n" for name, value in cells.items())


def _adapter_rows(adapter: Adapter) -> str:
    config, default = adapter.config, PromptConfig()
    tensors = adapter.state_dict().values()
    changed = {name: getattr(config, name) for name in OPTIONAL_FIELDS}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    rows = {
        "backbone": _backbone(adapter),
        "variant": _variant(adapter),
        "prompt length": _prompt_length(config),
        **_cells(changed),
        "trained parameters": f"{sum(parameter.numel() for parameter in adapter.parameters()):,}",
        "bytes": f"{sum(tensor.numel() * tensor.element_size() for tensor in tensors):,}",
    }
    if config.task_type in LABELLED_TASKS:
        names = list(adapter.labels()["id2label"].values())
        more = f" and {len(names) - MAX_LABELS} more" if len(names) > MAX_LABELS else ""
        rows["labels"] = f"{', '.join(map(_cell, names[:MAX_LABELS]))}{more}"
    return _rows(rows)


def _prompt_length(config: PromptConfig) -> str:
    number = str(config.num_tokens)
    return LENGTHS.get(config.location, "{}").format(number) if config.num_tokens else number


def _variant(adapter: Adapter) -> str:
    if adapter.config.num_tokens == 0:
        return "BitFit" if adapter.config.bias == "all" else "linear probing"
    location = adapter.config.location
    variant = "VPT" if adapter.is_in_image else _layers_variant(adapter)
    return variant if location == "prepend" else f'{variant} (location "{location}")'


def _layers_variant(adapter: Adapter) -> str:
    fresh = [layer for layer, plan in enumerate(adapter.plan) if plan is not None and plan.fresh]
    is_prefix = adapter.config.kind == "prefix"
    if fresh == [0] and adapter.config.carry and not is_prefix:
        return "VPT-Shallow"
    if len(fresh) == len(adapter.plan):
        return "VPT-Prefix" if is_prefix else "VPT-Deep"
    in_a_row = len(fresh) > 2 and fresh == list(range(fresh[0], fresh[-1] + 1))
    layers = f"{fresh[0]} to {fresh[-1]}" if in_a_row else ", ".join(map(str, fresh))
    name = "VPT-Prefix" if is_prefix else "VPT with fresh prompts"
    return f"{name} in layer{'s' if len(fresh) > 1 else ''} {layers}, counted from 0"


def _backbone(adapter: Adapter) -> str:
    name = adapter.config.base_model_name_or_path
    if name is None:
        return f"a backbone of type `{_cell(adapter.model_type)}` that is not on the Hub"
    return f"[{name}](https://huggingface.co/{name})" if _is_on_hub(adapter.config) else _cell(_display(name))


def _is_on_hub(config: PromptConfig) -> bool:
    return config.base_model_name_or_path is not None and is_repo_id(config.base_model_name_or_path)


def _pipeline_section(code: str | None) -> str:
    """The code of a pipeline, in front of that of the model itself; empty if there is none."""
    return f"```python\n{code}\n```\n\nOr, step by step:\n\n" if code else ""


def _results(metrics: Mapping[str, float | str]) -> str:
    """The section with the metrics; empty if there are none."""
    rows = _rows({_cell(name): _format(value) for name, value in metrics.items()})
    return f"## Results\n\n| metric | value |\n|---|---|\n{rows}\n" if rows else ""


def _training_rows(training_data: str | None, hyperparameters: Mapping[str, Any] | None) -> str:
    data = {"training data": training_data} if training_data else {}
    versions = {"vpt-peft": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return _rows(_cells({**data, **(hyperparameters or {}), **versions}))


def _metadata(adapter: Adapter, training_data: str | None, license: str | None) -> dict[str, Any]:
    config = adapter.config
    values = {
        "library_name": "vpt-peft",
        # The Hub rejects cards whose base model is not on it.
        "base_model": config.base_model_name_or_path if _is_on_hub(config) else None,
        "base_model_relation": "adapter" if _is_on_hub(config) else None,
        "pipeline_tag": _pipeline_tag(adapter),
        "tags": ["peft", "visual-prompt-tuning", "vpt-peft"],
        "datasets": [training_data] if training_data and is_repo_id(training_data) else None,
        "license": license,
    }
    return {name: value for name, value in values.items() if value is not None}


def _pipeline_tag(adapter: Adapter) -> str | None:
    """The Hub's name of the task; None if it has none."""
    task_type = str(adapter.config.task_type)
    takes_videos = adapter.num_frames is not None
    return "feature-extraction" if takes_videos and task_type == "FEATURE_EXTRACTION" else PIPELINE_TAGS.get(task_type)


def _eval_results(adapter: Adapter, training_data: str | None, metrics: Mapping[str, float | str]) -> list[EvalResult]:
    dataset = training_data or "unknown"
    return [
        EvalResult(
            task_type=_pipeline_tag(adapter) or "other",
            dataset_type=dataset if is_repo_id(dataset) else "unknown",
            dataset_name=dataset,
            metric_type=re.sub(r"[^a-z0-9]+", "_", name.partition(",")[0].lower()).strip("_") or "metric",
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
