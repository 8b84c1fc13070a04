"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADERS = {"precision": "Precision", "recall": "Recall", "f1": "F1", "iou": "IoU"}


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns. The first row is the header; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *rest])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(cells) for cells in (rows[0], rule, *rows[1:]))


def label_table(labels: Sequence[Mapping[str, Any]]) -> str:
    """The table of :meth:`~vpt_peft.recipes.report.metrics.Scores.by_label`."""
    names = list(labels[0])
    header = ["Label", *(HEADERS[name] for name in names[1:-1]), "Support"]
    rows = [header]
    for label in labels:
        scores = ("-" if label[name] is None else f"{label[name]:.1f} %" for name in names[1:-1])
        rows.append([str(label["label"]), *scores, f"{label['support']:,}"])
    return table(rows)
