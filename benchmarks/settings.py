"""The grid of ``accuracy.py --sweep``, and the selection of the best settings.

The defaults in ``vpt_peft/recipes/training/methods.py`` are the settings with the best mean over the datasets, except
for the linear head and VPT-Deep, where the differences are within noise and further runs decided, see
``results/README.md``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bottleneck_adapter import ADAPTER

from vpt_peft import PromptConfig
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.training.methods import METHODS, Method

Run = dict[str, Any]  # settings and results of a run, as in the output of accuracy.py

NAMES = (
    "linear", "bitfit", "adapter", "lora", "vpt-shallow", "vpt-deep", "vpt-prefix", "vpt-prefix-20", "vpt-prefix-bias",
    "full",
)  # fmt: skip
LONGER = replace(METHODS["vpt-prefix"], title="VPT-Prefix, p = 20", config=PromptConfig(num_tokens=20, kind="prefix"))
ALL_METHODS = {name: {**METHODS, "adapter": ADAPTER, "vpt-prefix-20": LONGER}[name] for name in NAMES}

# By method: learning rate, head learning rate (None: the same), prompt length (None: the method's), and the learning
# rate of biases where it is another.
GRID: dict[str, tuple[tuple[float | int | None, ...], ...]] = {
    "linear": ((1e-2, None, None), (1e-1, None, None)),
    "bitfit": ((1e-3, 1e-2, None), (3e-3, 1e-2, None)),
    "adapter": ((1e-3, 1e-2, None), (3e-3, 1e-2, None)),
    "lora": ((1e-3, 1e-2, None), (3e-3, 1e-2, None)),
    "vpt-shallow": ((3e-3, 1e-2, None), (1e-2, 1e-2, None)),
    "vpt-deep": ((1e-3, 1e-2, None), (3e-3, 1e-2, None), (3e-3, 1e-2, 50)),
    "vpt-prefix": ((1e-2, 1e-2, None), (3e-2, 1e-2, None), (1e-1, 1e-2, None)),
    "vpt-prefix-20": ((1e-2, 1e-2, None), (3e-2, 1e-2, None)),
    "vpt-prefix-bias": ((1e-2, 1e-2, None, 3e-3), (3e-2, 1e-2, None, 1e-3), (3e-2, 1e-2, None, 3e-3)),
    "full": ((1e-4, 1e-3, None), (3e-4, 1e-3, None)),
}


def candidates(name: str) -> list[Method]:
    """The method with each of its settings in the grid."""
    return [with_settings(ALL_METHODS[name], *point) for point in GRID[name]]


def with_settings(
    method: Method,
    learning_rate: float | None,
    head_learning_rate: float | None,
    num_tokens: int | None,
    bias_learning_rate: float | None = None,
) -> Method:
    """The method with other settings. The prompt length applies only to methods with prompts."""
    config = method.config
    if config is not None and config.num_tokens and num_tokens is not None:
        config = config.replace(num_tokens=num_tokens)
    return replace(method.with_rates(learning_rate, head_learning_rate, bias_learning_rate), config=config)


def settings_of(name: str, method: Method) -> Run:
    """The fields of a run with the settings of a method."""
    fields: Run = {
        "method": name, "learning_rate": method.learning_rate, "head_learning_rate": method.head_learning_rate,
        "num_tokens": method.config.num_tokens if method.config else 0,
    }  # fmt: skip
    if method.bias_learning_rate is not None:
        fields["bias_learning_rate"] = method.bias_learning_rate
    return fields


def find_runs(runs: Sequence[Run], wanted: Run) -> list[Run]:
    """The runs with all of these values."""
    return [run for run in runs if wanted.items() <= run.items()]


def best_candidate(runs: Sequence[Run], name: str, data: str) -> Method:
    """The candidate with the highest validation accuracy on a dataset. Ties: the default, else the first.

    Raises:
        RecipeError: a candidate has no such run.
    """

    def validation_accuracy(method: Method) -> float:
        found = find_runs(runs, {**settings_of(name, method), "data": data, "validation": True})
        if not found:
            raise RecipeError(
                f"The sweep must contain validation runs of all settings of {name} on {data}, but has none of "
                f"{settings_of(name, method)}. Run accuracy.py --sweep --resume on this dataset first."
            )
        return statistics.mean(run["accuracy"] for run in found)

    return max(candidates(name), key=lambda method: (validation_accuracy(method), method == ALL_METHODS[name]))
