"""Labels of an adapter: what the outputs of its head mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, safe_repr

LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def check_labels(id2label: Any, label2id: Any, problem_type: Any) -> dict[str, Any]:
    """Validates labels as they are read from a file, where the numbers of ``id2label`` are strings.

    Returns:
        ``id2label``, ``label2id`` and ``problem_type``, with integers as numbers.

    Raises:
        ConfigError: the numbers are not 0 to n-1, a name is no string, or the problem type is unknown.
    """
    try:
        names = {int(number): name for number, name in id2label.items() if str(int(number)) == number}
        numbers = dict(label2id.items())
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"id2label and label2id must map numbers and names: {safe_repr(str(error))}.") from error
    if sorted(names) != list(range(len(id2label))) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"id2label must map 0 to n-1 to names, got {safe_repr(id2label)}.")
    if not all(isinstance(name, str) and type(number) is int and number in names for name, number in numbers.items()):
        raise ConfigError(f"label2id must map names to 0 to {len(names) - 1}, got {safe_repr(label2id)}.")
    if problem_type not in PROBLEM_TYPES:
        raise ConfigError(f"problem_type must be one of {PROBLEM_TYPES}, got {safe_repr(problem_type)}.")
    return {"id2label": names, "label2id": numbers, "problem_type": problem_type}


def set_labels(model_config: Any, labels: Mapping[str, Any]) -> None:
    """Sets an adapter's labels in its copy of the model's config.

    Raises:
        ConfigError: a field is unknown.
    """
    unknown = sorted(set(labels) - set(LABEL_FIELDS))
    if unknown:
        raise ConfigError(f"The labels of an adapter are {', '.join(LABEL_FIELDS)}, got {', '.join(unknown)}.")
    for name, value in labels.items():
        setattr(model_config, name, value)


def get_labels(model_config: Any) -> dict[str, Any]:
    """``id2label``, ``label2id`` and ``problem_type`` of a config."""
    return {name: getattr(model_config, name) for name in LABEL_FIELDS if name != "num_labels"}
