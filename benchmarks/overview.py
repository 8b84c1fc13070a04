"""Writes the tables of the documentation from the runs in ``benchmarks/results``: methods, and their cost.

    python benchmarks/overview.py --write

The README compares the methods. Accuracy is the mean over the datasets with each method's default settings, at each
image size; time and memory are those of ViT-B/16 with 50 prompts. docs/results.md has all measurements of time, and the
guide to cached features what these save and cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cached
import speed
from accuracy_tables import format_range, insert_table, mean
from settings import ALL_METHODS, Run, find_runs, settings_of

from vpt_peft.recipes.report.tables import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
SIZES = (224, 112)
NUM_TOKENS = 50
# By method: its name in speed.py, whether it has mixed batches, and when to choose it.
ADVICE: dict[str, tuple[str, str, str]] = {
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


def load(name: str) -> Any:
    """The runs or reports in a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cost(reports: Sequence[Run], name: str) -> tuple[str, str, str]:
    """Time of inference to the bare backbone's, and time and memory of a training step to LoRA's."""
    report = next(one for one in reports if one["backbone"] == "vit-b16" and "training" in one["settings"]["work"])
    rows = {row["variant"]: row for row in report["rows"] if row["num_tokens"] in (None, NUM_TOKENS)}
    row = rows[name]
    inference = row["inference_to_bare"] or 1.0  # of full fine-tuning, the backbone's own
    memory = row["saved_mb_per_image"] / rows["lora"]["saved_mb_per_image"]
    return f"{inference:.2f}", f"{row['step_to_lora']:.2f}", f"{memory:.2f}"


def overview() -> str:
    """One row for each method."""
    runs, reports = load("accuracy"), load("speed-cpu")
    sizes = [f"{size} px" for size in SIZES]
    rows = [("Method", *sizes, "Trained parameters", "Inference", "Step", "Memory", "Mixed batches", "Choose it")]
    for name, (variant, mixes, advice) in ADVICE.items():
        method = ALL_METHODS[name]
        own = find_runs(runs, {**settings_of(name, method), "image_size": SIZES[0], "validation": False})
        count = format_range(own, "parameters", ",").rpartition(" ")[2]  # with the most labels
        accuracies = [accuracy(runs, name, size) for size in SIZES]
        rows.append((f"{method.title} (`{name}`)", *accuracies, count, *cost(reports, variant), mixes, advice))
    return table(rows)


def speed_tables(name: str) -> str:
    """All tables of a file of ``speed.py``."""
    return "\n".join(map(speed.make_table, load(name)))


def cached_table() -> str:
    """Times of ``cached.py``."""
    return cached.make_table(load("cached-cpu")["reports"])


def last_layers_table() -> str:
    """Mean test accuracy of prompts in the last layers on cached features, and in all layers on pixels."""
    on_pixels, on_features = load("accuracy"), load("last_layers")
    names = list(dict.fromkeys(run["data"] for run in on_pixels))

    def row(title: str, runs: Sequence[Run]) -> list[str]:
        by_data = ([run for run in runs if run["data"] == name] for name in names)
        return [title, *(f"{mean(own):.1f} ({len(own)})" for own in by_data)]

    def on_all_layers(name: str) -> list[str]:
        settings = {**settings_of(name, ALL_METHODS[name]), "image_size": SIZES[1], "validation": False}
        return row(f"{ALL_METHODS[name].title}{', all layers' * (name != 'linear')}", find_runs(on_pixels, settings))

    rows = [["Accuracy, % (seeds)", *names], on_all_layers("linear")]
    methods = sorted({run["method"] for run in on_features})
    for number in sorted({run["layers"] for run in on_features}):
        for name in methods:
            own = [run for run in on_features if (run["method"], run["layers"]) == (name, number)]
            rows.append(row(f"{ALL_METHODS[name].title}, last {number} layers, cached", own))
    return table([*rows, *map(on_all_layers, methods)])


TABLES: dict[tuple[str, str], Callable[[], str]] = {  # by file and mark
    ("README.md", "overview"): overview,
    **{("docs/results.md", name): partial(speed_tables, name) for name in ("speed-cpu", "speed-h100")},
    ("docs/guides/cached-features.md", "cached-cpu"): cached_table,
    ("docs/guides/cached-features.md", "last-layers"): last_layers_table,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, and inserts them into the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="insert the tables between their marks, <!-- name -->")
    args = parser.parse_args(argv)
    for (file, mark), build in TABLES.items():
        text = build()
        print(text)
        if args.write:
            insert_table(ROOT / file, mark, text)


if __name__ == "__main__":
    main()
