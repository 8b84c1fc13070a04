"""Tables of what ``accuracy.py`` measured, and putting them into a text."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from images import DataError
from settings import ALL_METHODS, Run, best, candidates, find, settings_of
from training import Method, table

HEADING = ("Data", "Method", "Accuracy", "Trained parameters", "Of the backbone", "Saved", "Training")


def summary(runs: Sequence[Run]) -> str:
    """One row for each image set and method: the mean over the seeds, ± the standard deviation if there are several."""
    rows = [HEADING]
    groups: dict[tuple[str, str], list[Run]] = {}
    for one in runs:
        groups.setdefault((one["data"], one["method"]), []).append(one)
    for (data, name), group in groups.items():
        rows.append((
            data, ALL_METHODS[name].title, spread(group, " %"), between(group, "parameters", ","),
            between(group, "share", ".2f", " %"), f"{group[0]['bytes'] / 1000:,.0f} kB",
            f"{statistics.mean(one['seconds'] for one in group):,.0f} s",
        ))  # fmt: skip
    return table(rows)


def comparison(runs: Sequence[Run], sweep: Sequence[Run]) -> str:
    """Two tables of the accuracy on all image sets: with each method's defaults, and with the sweep's best settings.

    The second one is left out where nothing was run with other settings than the defaults.
    """
    names = list(dict.fromkeys(one["data"] for one in runs))
    methods = methods_of(runs)

    def with_defaults(name: str, data: str) -> list[Run]:
        return find(runs, {"data": data, **settings_of(name, ALL_METHODS[name])})

    def with_best(name: str, data: str) -> list[Run]:
        return find(runs, {"data": data, **settings_of(name, best(sweep, name, data))})

    defaults = {name: [with_defaults(name, data) for data in names] for name in methods}
    tables = f"{setting(runs[0])}. With the defaults:\n\n{side_by_side(defaults, names)}"
    if sum(len(group) for groups in defaults.values() for group in groups) < len(runs):
        tuned = {name: [with_best(name, data) for data in names] for name in methods}
        tables += f"\n\nWith each image set's best of the sweep:\n\n{side_by_side(tuned, names)}"
    return tables


def setting(one: Run) -> str:
    """What all runs of a table have in common."""
    return (
        f"Accuracy in percent, {one['model']}, images of {one['image_size']} pixels, {one['epochs']} epochs, "
        f"batches of {one['batch_size']}, {one['precision']}"
    )


def side_by_side(found: dict[str, list[list[Run]]], names: Sequence[str]) -> str:
    """One row for each method, a column for each image set; each set's best stands out, "-" is not measured.

    The heading of an image set tells the number of seeds; where fewer were run, so does the cell.
    """
    seeds = [max(map(len, column)) for column in zip(*found.values(), strict=True)]
    heads = [f"{name}, {count} seed{'s' if count > 1 else ''}" for name, count in zip(names, seeds, strict=True)]
    rows: list[tuple[str, ...]] = [("Method", *heads, "Mean", "Trained parameters", "Of the backbone")]
    columns = zip(*found.values(), strict=True)
    tops = [max((mean(group) for group in column if group), default=None) for column in columns]
    for name, groups in found.items():
        cells = []
        for group, top, count in zip(groups, tops, seeds, strict=True):
            cell = "-" if not group else f"**{spread(group)}**" if mean(group) == top else spread(group)
            cells.append(f"{cell} ({len(group)})" if 0 < len(group) < count else cell)
        overall = f"{statistics.mean(map(mean, groups)):.1f}" if all(groups) else "-"
        every = [one for group in groups for one in group]
        counts = (between(every, "parameters", ","), between(every, "share", ".2f", " %")) if every else ("-", "-")
        rows.append((ALL_METHODS[name].title, *cells, overall, *counts))
    return table(rows)


def sweep_table(runs: Sequence[Run]) -> str:
    """One row for each candidate: its accuracy on each image set's validation images, and their mean.

    Of each method's candidates, the best on each image set and in the mean stand out.
    """
    names = list(dict.fromkeys(one["data"] for one in runs))
    rows: list[tuple[str, ...]] = [(*SETTINGS, *names, "Mean")]
    for name in methods_of(runs):
        lines = []
        for method in candidates(name):
            found = [find(runs, {**settings_of(name, method), "data": data, "validation": True}) for data in names]
            if all(found):
                lines.append((method, [*map(mean, found), statistics.mean(map(mean, found))]))
        tops = [max(column) for column in zip(*(values for _, values in lines), strict=True)]
        for method, values in lines:
            cells = (
                f"**{value:.1f}**" if value == top else f"{value:.1f}" for value, top in zip(values, tops, strict=True)
            )
            rows.append((*settings_cells(method), *cells))
    return table(rows)


SETTINGS = ("Method", "Learning rate", "Of the head", "Prompts")


def settings_table(names: Sequence[str]) -> str:
    """The methods' default settings."""
    return table([SETTINGS, *(settings_cells(ALL_METHODS[name]) for name in names)])


def settings_cells(method: Method) -> tuple[str, str, str, str]:
    """A method's settings under :data:`SETTINGS`."""
    prompts = method.config.num_tokens if method.config else 0
    head = method.learning_rate if method.head_learning_rate is None else method.head_learning_rate
    return method.title, f"{method.learning_rate:g}", f"{head:g}", str(prompts) if prompts else ""


def methods_of(runs: Sequence[Run]) -> list[str]:
    """The methods that have runs, in the tables' order."""
    return [name for name in ALL_METHODS if find(runs, {"method": name})]


def mean(runs: Sequence[Run]) -> float:
    """The mean accuracy, in percent."""
    return statistics.mean(one["accuracy"] for one in runs)


def spread(runs: Sequence[Run], unit: str = "") -> str:
    """The mean accuracy, ± the standard deviation if there are several runs."""
    deviation = f" ± {statistics.stdev(one['accuracy'] for one in runs):.1f}" if len(runs) > 1 else ""
    return f"{mean(runs):.1f}{unit}{deviation}"


def between(runs: Sequence[Run], field: str, form: str, unit: str = "") -> str:
    """The least and the largest value of a field, or the only one."""
    ends = dict.fromkeys(format(end(one[field] for one in runs), form) for end in (min, max))
    return " to ".join(ends) + unit


def insert(text: Path, mark: str, tables: str) -> None:
    """Replaces what stands between ``<!-- mark -->`` and ``<!-- /mark -->`` in a text.

    Raises:
        DataError: the marks are not there, once each and in this order.
    """
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    content = text.read_text(encoding="utf-8")
    if content.count(start) != 1 or content.count(end) != 1 or content.index(start) > content.index(end):
        raise DataError(f"{text} must hold the marks {start} and {end}, once each. Put them around the tables' place.")
    before, after = content.split(start)[0], content.split(end)[1]
    text.write_text(f"{before}{start}\n{tables}\n{end}{after}", encoding="utf-8")
