"""Writes the table of methods in the README from the runs in ``benchmarks/results``.

    python benchmarks/overview.py --readme README.md

Accuracy is the mean over the datasets with each method's default settings, at each image size. Times and memory are
those of a training step of ViT-B/16 with 50 prompts, relative to LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from accuracy_tables import format_range, insert_table, mean
from settings import ALL_METHODS, Run, find_runs, settings_of

from vpt_peft.recipes.report.tables import table

RESULTS = Path(__file__).parent / "results"
SIZES = (224, 112)
NUM_TOKENS = 50
# By method: its name in speed.py, whether it has mixed batches, and when to choose it.
ADVICE: dict[str, tuple[str | None, str, str]] = {
    "vpt-prefix-bias": ("prefix_bias", "yes", "**by default**"),
    "vpt-prefix": ("prefix", "yes", "for many tasks in a batch at the lowest cost"),
    "vpt-deep": ("key_value", "yes", "for the fewest parameters and the fastest step; needs some 300 steps"),
    "vpt-shallow": ("shallow", "yes", "to compare with the paper"),
    "bitfit": ("bitfit", "yes", "if nothing may be added to the attention"),
    "lora": ("lora", "without heads", "to merge it into the weights (by PEFT)"),
    "linear": ("linear", "yes", "if the features are good enough"),
    "full": ("full", "no", "for thousands of images and a copy per task"),
}


def accuracy(runs: Sequence[Run], name: str, image_size: int) -> str:
    """Mean over the datasets of the mean over the seeds, in %."""
    found = find_runs(runs, {**settings_of(name, ALL_METHODS[name]), "image_size": image_size, "validation": False})
    by_data: dict[str, list[Run]] = {}
    for run in found:
        by_data.setdefault(run["data"], []).append(run)
    return f"{statistics.mean(map(mean, by_data.values())):.1f}"


def ratios(reports: Sequence[Run], name: str | None) -> tuple[str, str]:
    """Time and memory of a training step relative to LoRA's; "" if they were not measured."""
    report = next(one for one in reports if one["backbone"] == "vit-b16" and not one["settings"]["compile"])
    rows = {row["variant"]: row for row in report["rows"] if row["num_tokens"] in (None, NUM_TOKENS)}
    if name not in rows:
        return "", ""
    time, memory = (f"{rows[name][field] / rows['lora'][field]:.2f}" for field in ("step_ms", "peak_mb"))
    return time, memory


def overview() -> str:
    """One row for each method."""
    runs = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))
    reports = json.loads((RESULTS / "speed-h100.json").read_text(encoding="utf-8"))
    sizes = [f"{size} px" for size in SIZES]
    rows = [("Method", *sizes, "Trained parameters", "Time", "Memory", "Mixed batches", "Choose it")]
    for name, (variant, mixes, advice) in ADVICE.items():
        method = ALL_METHODS[name]
        own = find_runs(runs, {**settings_of(name, method), "image_size": SIZES[0], "validation": False})
        count = format_range(own, "parameters", ",").rpartition(" ")[2]  # with the most labels
        accuracies = [accuracy(runs, name, size) for size in SIZES]
        rows.append((f"{method.title} (`{name}`)", *accuracies, count, *ratios(reports, variant), mixes, advice))
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and inserts it into a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--readme", type=Path, help="a file with <!-- overview --> and <!-- /overview -->")
    args = parser.parse_args(argv)
    text = overview()
    if args.readme:
        insert_table(args.readme, "overview", text)
    print(text)


if __name__ == "__main__":
    main()
