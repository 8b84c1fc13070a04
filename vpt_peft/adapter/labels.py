"""Labels of an adapter: what the outputs of its head mean."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from operator import index
from typing import Any

from ..config import check_unicode
from ..errors import ConfigError, safe_repr

LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def check_labels(
    id2label: Any = None, label2id: Any = None, num_labels: Any = None, problem_type: Any = None
) -> dict[str, Any]:
    """Validates labels, and converts ids to integers and names to strings: ids may be strings, as in JSON, and names
    may be numbers.

    Args:
        id2label: names by id; None: the inverse of ``label2id``.
        label2id: ids by name, of all names or some; None: the inverse of ``id2label``.
        num_labels: number of labels; None: that of the names. Without names, they are LABEL_0, LABEL_1 etc.
        problem_type: as in ``transformers``.

    Returns:
        ``id2label``, in the order of the ids, ``label2id`` and ``problem_type``.

    Raises:
        ConfigError: ids are not 0 to n-1, a value is of the wrong type, or the arguments contradict each other.
    """
    number = None if num_labels is None else _to_id(num_labels)
    names = None if id2label is None else _parse_id2label(id2label)
    ids = None if label2id is None else _parse_label2id(label2id)
    if names is None and ids is None:
        names = {label: f"LABEL_{label}" for label in range(number or 0)}
    if names is None:
        names = {label: name for name, label in (ids or {}).items()}
        if sorted(names) != list(range(len(ids or {}))):
            raise ConfigError(f"label2id must map n names to 0 to n-1, got {safe_repr(label2id)}. Count from 0.")
    if not ids:
        ids = {name: label for label, name in names.items()}
    if number not in (None, len(names)):
        raise ConfigError(
            f"Each of num_labels={number} labels must have a name in id2label or label2id, got {len(names)} names: "
            f"{safe_repr(list(names.values()))}."
        )
    for name, label in ids.items():
        if names.get(label) != name:
            raise ConfigError(
                f"label2id must map names to their ids in id2label, got {safe_repr(name)}: {label}, but id2label has "
                f"{label}: {safe_repr(names.get(label))}. Give one of the two; the other is its inverse."
            )
    _check_problem_type(problem_type, len(names))
    return {"id2label": dict(sorted(names.items())), "label2id": ids, "problem_type": problem_type}


def get_labels(model_config: Any) -> dict[str, Any]:
    """The labels of a model, see :func:`check_labels`."""
    return check_labels(*_current_names(model_config), model_config.problem_type)


def make_labels(model_config: Any, labels: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of a new adapter, see :func:`check_labels`.

    Args:
        model_config: config of the model, from which labels are inherited, and ``problem_type`` by adapters with the
            same number of labels.
        labels: the arguments of :func:`check_labels` by name; names without a value are inherited.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = sorted(set(labels) - set(LABEL_FIELDS))
    if unknown:
        raise ConfigError(f"The labels of an adapter are {', '.join(LABEL_FIELDS)}, got {', '.join(unknown)}.")
    id2label, label2id, num_labels = (labels.get(name) for name in ("id2label", "label2id", "num_labels"))
    inherited = len(model_config.id2label or ())
    if id2label is None and label2id is None and (num_labels is None or _to_id(num_labels) == inherited):
        id2label, label2id, num_labels = _current_names(model_config)
    made = check_labels(id2label, label2id, num_labels)
    problem_type = model_config.problem_type if len(made["id2label"]) == inherited else None
    made["problem_type"] = labels.get("problem_type", problem_type)
    _check_problem_type(made["problem_type"], len(made["id2label"]))
    return made


def _current_names(model_config: Any) -> tuple[dict[int, str] | None, dict[str, int] | None, int | None]:
    """``id2label``, ``label2id`` and the number of labels of a model.

    Where users have set one of the two, transformers keeps earlier labels in the other, such as those of the
    checkpoint, or LABEL_0 etc. In their place, the result contains None.
    """
    names = None if model_config.id2label is None else _parse_id2label(model_config.id2label)
    ids = None if model_config.label2id is None else _parse_label2id(model_config.label2id)
    number = None if names is None else len(names)
    if names and ids and not set(ids) <= set(names.values()):
        if all(name == f"LABEL_{label}" for label, name in names.items()):
            names = None
        else:
            ids = None
    return names, ids, number


def _check_problem_type(problem_type: Any, num_labels: int) -> None:
    if problem_type not in PROBLEM_TYPES:
        raise ConfigError(f"problem_type must be one of {PROBLEM_TYPES}, got {safe_repr(problem_type)}.")
    if problem_type == "single_label_classification" and num_labels == 1:
        raise ConfigError(
            'problem_type="single_label_classification" needs at least 2 labels, got 1: the loss would always be 0. '
            'Use 2 labels, or problem_type="regression".'
        )


def _parse_id2label(id2label: Any) -> dict[int, str]:
    if not isinstance(id2label, Mapping):
        raise ConfigError(f"id2label must map 0 to n-1 to names, got {safe_repr(id2label)}.")
    names = {_to_id(label): _to_name(name) for label, name in id2label.items()}
    if sorted(names) != list(range(len(id2label))):
        raise ConfigError(f"id2label must map 0 to n-1 to names, got {safe_repr(id2label)}. Count from 0.")
    return names


def _parse_label2id(label2id: Any) -> dict[str, int]:
    if not isinstance(label2id, Mapping):
        raise ConfigError(f"label2id must map names to 0 to n-1, got {safe_repr(label2id)}.")
    return {_to_name(name): _to_id(label) for name, label in label2id.items()}


def _to_id(value: Any) -> int:
    """A label, or the number of labels: an integer, or its digits in a string."""
    try:
        label = int(value) if isinstance(value, str) else index(value)
    except (TypeError, ValueError):
        label = -1
    if label < 0 or isinstance(value, bool) or (isinstance(value, str) and str(label) != value):
        raise ConfigError(f"Numbers of labels must be integers from 0, got {safe_repr(value)}.")
    return label


def _to_name(value: Any) -> str:
    """The name of a label: a string, NumPy's included, or a number."""
    if not isinstance(value, str | Real):
        raise ConfigError(f"Names of labels must be strings, got {safe_repr(value)}.")
    name = str.__str__(value) if isinstance(value, str) else str(value)
    check_unicode("Names of labels", name)
    return name
