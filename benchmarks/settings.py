"""The settings that ``accuracy.py --sweep`` tries for each method, and the choice among them.

Each method's best in the mean over the image sets is its default in ``examples/training.py`` and ``lora.py``, but for
the linear head and VPT-Deep, where it is no better than chance and further runs decided (see ``results/README.md``).
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from images import DataError
from lora import LORA
from training import METHODS, Method

Run = dict[str, Any]  # what accuracy.py writes of a training run: its settings and what it reached

ALL_METHODS = {
    name: {**METHODS, "lora": LORA}[name] for name in ("linear", "bitfit", "lora", "vpt-shallow", "vpt-deep", "full")
}

# For each method: learning rate, learning rate of the head (None: the same), prompt length (None: the method's own).
GRID: dict[str, tuple[tuple[float, float | None, int | None], ...]] = {
    "linear": ((1e-2, None, None), (1e-1, None, None)),
    "bitfit": ((1e-3, 1e-2, None), (3e-3, 1e-2, None)),
    "lora": ((1e-3, 1e-2, None), (3e-3, 1e-2, None)),
    "vpt-shallow": ((3e-3, 1e-2, None), (1e-2, 1e-2, None)),
    "vpt-deep": ((1e-3, 1e-2, None), (3e-3, 1e-2, None), (3e-3, 1e-2, 50)),
    "full": ((1e-4, 1e-3, None), (3e-4, 1e-3, None)),
}


def candidates(name: str) -> list[Method]:
    """The method with each of its settings in the grid."""
    return [variant(ALL_METHODS[name], *point) for point in GRID[name]]


def variant(
    method: Method, learning_rate: float | None, head_learning_rate: float | None, num_tokens: int | None
) -> Method:
    """The method with other settings. A prompt length changes only methods with prompts."""
    config = method.config
    if config is not None and config.num_tokens and num_tokens is not None:
        config = config.replace(num_tokens=num_tokens)
    return dataclasses.replace(method.with_rates(learning_rate, head_learning_rate), config=config)


def settings_of(name: str, method: Method) -> Run:
    """The part of a run that tells a method's settings."""
    return {
        "method": name, "learning_rate": method.learning_rate, "head_learning_rate": method.head_learning_rate,
        "num_tokens": method.config.num_tokens if method.config else 0,
    }  # fmt: skip


def find(runs: Sequence[Run], wanted: Run) -> list[Run]:
    """The runs with all of these values."""
    return [one for one in runs if wanted.items() <= one.items()]


def best(runs: Sequence[Run], name: str, data: str) -> Method:
    """The candidate that did best on an image set's validation images; of equals the method's default, else the first.

    Raises:
        DataError: a candidate has no such run.
    """

    def reached(method: Method) -> float:
        found = find(runs, {**settings_of(name, method), "data": data, "validation": True})
        if not found:
            raise DataError(
                f"The sweep must hold validation runs of all settings of {name} on {data}, but has none of "
                f"{settings_of(name, method)}. Run accuracy.py --sweep --resume on this image set first."
            )
        return statistics.mean(one["accuracy"] for one in found)

    return max(candidates(name), key=lambda method: (reached(method), method == ALL_METHODS[name]))
