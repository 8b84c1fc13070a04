"""Markdown tables of the runs of ``accuracy.py``, and their insertion into files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from settings import ALL_METHODS, Run, best_candidate, candidates, find_runs, settings_of

from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.training.methods import Method

HEADER = ("Data", "Method", "Accuracy", "Trained parameters", "Share of backbone", "Size on disk", "Training time")


def summary(runs: Sequence[Run]) -> str:
    """One row per dataset and method: mean over the seeds, ± standard deviation if there are several."""
    rows = [HEADER]
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["data"], run["method"]), []).append(run)
    for (data, name), group in groups.items():
        rows.append((
            data, ALL_METHODS[name].title, format_accuracy(group, " %"), format_range(group, "parameters", ","),
            format_range(group, "share", ".2f", " %"), f"{group[0]['bytes'] / 1000:,.0f} kB",
            f"{statistics.mean(run['seconds'] for run in group):,.0f} s",
        ))  # fmt: skip
    return table(rows)


def comparison(runs: Sequence[Run], sweep: Sequence[Run] = ()) -> str:
    """Tables of the accuracy on all datasets with the default settings, of its difference to LoRA, and of the accuracy
    with the best settings of the sweep.

    The second one is omitted without runs of LoRA, and the last one without a sweep, or if all runs have default
    settings.
    """
    names = list(dict.fromkeys(run["data"] for run in runs))
    methods = methods_in(runs)

    def with_defaults(name: str, data: str) -> list[Run]:
        return find_runs(runs, {"data": data, **settings_of(name, ALL_METHODS[name])})

    def with_best(name: str, data: str) -> list[Run]:
        return find_runs(runs, {"data": data, **settings_of(name, best_candidate(sweep, name, data))})

    defaults = {name: [with_defaults(name, data) for data in names] for name in methods}
    tables = f"{common_settings(runs[0])}. Default settings:\n\n{comparison_table(defaults, names)}"
    if any(defaults.get(REFERENCE, [])):
        tables += (
            f"\n\nDifference to {ALL_METHODS[REFERENCE].title} in points, paired over the seeds, ± standard error:"
        )
        tables += f"\n\n{paired_table(defaults, names)}"
    if sweep and sum(len(group) for groups in defaults.values() for group in groups) < len(runs):
        tuned = {name: [with_best(name, data) for data in names] for name in methods}
        tables += f"\n\nBest settings of the sweep for each dataset:\n\n{comparison_table(tuned, names)}"
    return tables


def common_settings(run: Run) -> str:
    """Describes the settings that all runs of a table share."""
    size = run["image_size"]
    return (
        f"Test accuracy in %, {run['model']}, {size} x {size} pixels, {run['epochs']} epochs, "
        f"batch size {run['batch_size']}, {run['precision']}"
    )


def comparison_table(found: dict[str, list[list[Run]]], names: Sequence[str]) -> str:
    """One row per method, one column per dataset; the best of each dataset is bold, "-" means no runs.

    The header of a dataset contains the number of seeds; cells with fewer seeds contain theirs.
    """
    seeds = [max(map(len, column)) for column in zip(*found.values(), strict=True)]
    header = [f"{name}, {count} seed{'s' if count > 1 else ''}" for name, count in zip(names, seeds, strict=True)]
    rows: list[tuple[str, ...]] = [("Method", *header, "Mean", "Trained parameters", "Share of backbone")]
    columns = zip(*found.values(), strict=True)
    best = [max((mean(group) for group in column if group), default=None) for column in columns]
    for name, groups in found.items():
        cells = []
        for group, highest, count in zip(groups, best, seeds, strict=True):
            text = format_accuracy(group) if group else "-"
            cell = f"**{text}**" if group and mean(group) == highest else text
            cells.append(f"{cell} ({len(group)})" if 0 < len(group) < count else cell)
        overall = f"{statistics.mean(map(mean, groups)):.1f}" if all(groups) else "-"
        all_runs = [run for group in groups for run in group]
        counts = ("-", "-")
        if all_runs:
            counts = format_range(all_runs, "parameters", ","), format_range(all_runs, "share", ".2f", " %")
        rows.append((ALL_METHODS[name].title, *cells, overall, *counts))
    return table(rows)


REFERENCE = "lora"


def paired_table(found: dict[str, list[list[Run]]], names: Sequence[str]) -> str:
    """The difference of each method to LoRA on each dataset, and in the mean over the datasets.

    Runs of the same seed have the same data, batches and initial head, so their differences vary less than the runs.
    """
    rows: list[tuple[str, ...]] = [("Method", *names, "Mean")]
    for name, groups in found.items():
        if name == REFERENCE:
            continue
        differences = []
        for group, reference in zip(groups, found[REFERENCE], strict=True):
            expected = {run["seed"]: run["accuracy"] for run in reference}
            pairs = {run["seed"]: run["accuracy"] - expected[run["seed"]] for run in group if run["seed"] in expected}
            differences.append(pairs)
        seeds = set[int].intersection(*map(set, differences))
        means = [statistics.mean(pairs[seed] for pairs in differences) for seed in sorted(seeds)]
        cells = [format_difference(list(pairs.values())) for pairs in differences]
        rows.append((ALL_METHODS[name].title, *cells, format_difference(means)))
    return table(rows)


def format_difference(values: Sequence[float]) -> str:
    """The mean, ± its standard error if there are several values."""
    if not values:
        return "-"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{error}"


def sweep_table(runs: Sequence[Run]) -> str:
    """One row per candidate: validation accuracy on each dataset, and the mean.

    The best of each method's candidates on each dataset and in the mean are bold.
    """
    names = list(dict.fromkeys(run["data"] for run in runs))
    rows: list[tuple[str, ...]] = [(*SETTINGS_HEADER, *names, "Mean")]
    for name in methods_in(runs):
        lines = []
        for method in candidates(name):
            found = [find_runs(runs, {**settings_of(name, method), "data": data, "validation": True}) for data in names]
            if all(found):
                lines.append((method, [*map(mean, found), statistics.mean(map(mean, found))]))
        best = [max(column) for column in zip(*(values for _, values in lines), strict=True)]
        for method, values in lines:
            cells = (
                f"**{value:.1f}**" if value == highest else f"{value:.1f}"
                for value, highest in zip(values, best, strict=True)
            )
            rows.append((*settings_cells(method), *cells))
    return table(rows)


SETTINGS_HEADER = ("Method", "Learning rate", "Head learning rate", "Prompt length")


def settings_table(names: Sequence[str]) -> str:
    """Default settings of the methods."""
    return table([SETTINGS_HEADER, *(settings_cells(ALL_METHODS[name]) for name in names)])


def settings_cells(method: Method) -> tuple[str, str, str, str]:
    """Cells of a method for :data:`SETTINGS_HEADER`."""
    prompts = method.config.num_tokens if method.config else 0
    head = method.learning_rate if method.head_learning_rate is None else method.head_learning_rate
    biases = "" if method.bias_learning_rate is None else f", biases {method.bias_learning_rate:g}"
    return method.title, f"{method.learning_rate:g}{biases}", f"{head:g}", str(prompts) if prompts else ""


def methods_in(runs: Sequence[Run]) -> list[str]:
    """The methods with runs, in the order of the tables."""
    return [name for name in ALL_METHODS if find_runs(runs, {"method": name})]


def mean(runs: Sequence[Run]) -> float:
    """The mean accuracy in percent."""
    return statistics.mean(run["accuracy"] for run in runs)


def format_accuracy(runs: Sequence[Run], unit: str = "") -> str:
    """Mean accuracy, ± standard deviation if there are several runs."""
    deviation = f" ± {statistics.stdev(run['accuracy'] for run in runs):.1f}" if len(runs) > 1 else ""
    return f"{mean(runs):.1f}{unit}{deviation}"


def format_range(runs: Sequence[Run], field: str, form: str, unit: str = "") -> str:
    """Minimum and maximum of a field, or its only value."""
    bounds = dict.fromkeys(format(bound(run[field] for run in runs), form) for bound in (min, max))
    return " to ".join(bounds) + unit


def insert_table(file: Path, mark: str, tables: str) -> None:
    """Replaces the text between ``<!-- mark -->`` and ``<!-- /mark -->`` in a file.

    Raises:
        RecipeError: the marks are not there exactly once each and in this order.
    """
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    content = file.read_text(encoding="utf-8")
    if content.count(start) != 1 or content.count(end) != 1 or content.index(start) > content.index(end):
        raise RecipeError(f"{file} must contain the marks {start} and {end} once each. Add them where tables belong.")
    before, after = content.split(start)[0], content.split(end)[1]
    file.write_text(f"{before}{start}\n{tables}\n{end}{after}", encoding="utf-8")
