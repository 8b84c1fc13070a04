"""Plots of learning curves, confusion matrices, searches and segmentations, saved to files without a display."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..data.masks import VOID

BLUE, ORANGE, GREY = "#2f6db3", "#d9822b", "#8a8f98"
MAX_CLASSES_WITH_COUNTS = 30  # with more classes, the numbers in the cells are unreadable
MAX_NAME_LENGTH = 24
MAX_LEGEND = 24


def _figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def learning_curve(
    path: Path,
    histories: Mapping[int, Sequence[Mapping[str, Any]]],
    title: str,
    split: str,
    score: str = "accuracy",
    chance: float | None = None,
) -> None:
    """Loss and score after each epoch, of training and of an evaluated split.

    Args:
        histories: ``Trainer.state.log_history`` by seed.
        split: name of the evaluated split.
        score: "accuracy" or "mean_iou".
        chance: accuracy in percent of always predicting the most frequent class.
    """
    figure = _figure(9, 3.6)
    figure.suptitle(title, fontsize=12)
    losses, scores = figure.subplots(1, 2)
    curves = {losses: {"loss": "training", "eval_loss": split}, scores: {f"eval_{score}": split}}
    if score == "accuracy":
        curves[scores] = {"accuracy": "training", **curves[scores]}
    for axes, named in curves.items():
        for key, name in named.items():
            for index, (seed, history) in enumerate(histories.items()):
                points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
                if not points:
                    continue
                label = name if len(histories) == 1 else f"{name}, seed {seed}" if index == 0 else f"seed {seed}"
                style = ("-", "--", ":", "-.")[index % 4]
                color = BLUE if name == "training" else ORANGE
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker="o", markersize=3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chance is not None and score == "accuracy":
        scores.axhline(chance, color=GREY, linestyle="--", linewidth=1, label="chance")
    for axes in curves:
        axes.legend(frameon=False, fontsize=8)
    _style(losses, "Loss", "epoch", "cross-entropy")
    _style(scores, "Mean IoU" if score == "mean_iou" else "Accuracy", "epoch", "%")
    _save(figure, path)


def confusion_plot(path: Path, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """Plots a confusion matrix, coloured by the share of the true class."""
    number = len(names)
    side = min(0.55 * number + 2.8, 16)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03, label="% of the true class")
    short = [name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…" for name in names]
    size = 10 if number <= MAX_CLASSES_WITH_COUNTS else max(3.0, 400 / number)
    rotate = max(map(len, short)) > 3
    rotation: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if rotate else {}
    axes.set_xticks(range(number), short, fontsize=size, **rotation)
    axes.set_yticks(range(number), short, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11, loc="left")
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if number <= MAX_CLASSES_WITH_COUNTS else 0.3)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if number <= MAX_CLASSES_WITH_COUNTS:
        for row, column in zip(*counts.nonzero(), strict=True):
            count, share = counts[row, column], shares[row, column]
            text = str(count) if counts.max() < 10_000 else f"{100 * share:.0f} %" if share >= 0.005 else ""
            color = "white" if share > 0.55 else "#1b2733"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    _save(figure, path)


def search(
    path: Path,
    trials: Sequence[Mapping[str, Any]],
    log_scales: Sequence[str],
    importance: Mapping[str, float],
    title: str,
) -> None:
    """Plots the accuracy of the trials against each hyperparameter, the best accuracy so far, and the importance.

    Args:
        trials: with ``number``, ``state`` ("complete" or "pruned"), ``accuracy`` and ``params``.
        log_scales: hyperparameters to plot on a logarithmic scale.
        importance: of hyperparameters, from 0 to 1; empty: not known.
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    panels = 1 + len(names) + bool(importance)
    columns = 3 if panels <= 6 else 4
    rows = -(-panels // columns)
    figure = _figure(3.6 * columns, 3.1 * rows)
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = max(complete, key=lambda trial: trial["accuracy"])
    for axes, name in zip(grid, ("number", *names), strict=False):
        for state, color, marker in (("complete", BLUE, "o"), ("pruned", GREY, "x")):  # pruned: after the last epoch
            found = [trial for trial in trials if trial["state"] == state and name in {"number", *trial["params"]}]
            values = [_value(trial, name) for trial in found]
            axes.scatter(values, [trial["accuracy"] for trial in found], 26, color=color, marker=marker, label=state)
        axes.scatter(_value(best, name), best["accuracy"], 130, marker="*", color=ORANGE, zorder=3, label="best")
        if name == "number":
            steps = sorted(complete, key=lambda trial: trial["number"])
            reached = np.maximum.accumulate([trial["accuracy"] for trial in steps])
            axes.step([t["number"] for t in steps], reached, where="post", color=ORANGE, label="best so far", zorder=0)
        if name in log_scales:
            axes.set_xscale("log")
            values = [trial["params"][name] for trial in trials if name in trial["params"]]
            axes.xaxis.set_major_locator(LogLocator(subs=_ticks(min(values), max(values)), numticks=6))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _style(axes, "", "trial" if name == "number" else name.replace("_", " "), "")
    for axes in list(figure.axes)[len(names) + 1 :]:
        axes.remove()
    for axes in list(figure.axes)[::columns]:
        axes.set_ylabel("validation accuracy, %")
    if importance:  # in the rest of the last row
        _importance(figure.add_subplot(rows, columns, (panels, rows * columns)), importance)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, path)


def _ticks(lowest: float, highest: float) -> tuple[int, ...]:
    """Multiples of powers of ten to label on a logarithmic axis, so that the labels do not overlap."""
    if lowest >= 1 or highest < 10 * lowest:
        return (1, 2, 5)
    return (1, 3) if highest <= 100 * lowest else (1,)


def _importance(axes: Axes, importance: Mapping[str, float]) -> None:
    """Bars of the importance of hyperparameters, the largest above."""
    names = sorted(importance, key=lambda name: importance[name])
    shares = [100 * importance[name] for name in names]
    bars = axes.barh(names, shares, color=BLUE, height=0.6)
    labels = [f"{name.replace('_', ' ')}, {share:.0f} %" for name, share in zip(names, shares, strict=True)]
    axes.bar_label(bars, labels, padding=4)  # beside the bars: ticks would move the other panels
    axes.set_xlim(0, 1.7 * max(shares))
    _style(axes, "", "importance: % of the variance explained", "")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _value(trial: Mapping[str, Any], name: str) -> float:
    return trial["number"] if name == "number" else trial["params"][name]


def segmentation(
    path: Path, images: np.ndarray, masks: np.ndarray, predictions: np.ndarray, names: Sequence[str], title: str
) -> None:
    """One row per image: the image, its mask and the prediction, with a legend. Unlabelled pixels are white, in the
    prediction too.

    Args:
        images: uint8 ``(num_images, height, width, 3)``.
        masks, predictions: labels ``(num_images, height, width)``.
    """
    number, height, width = masks.shape
    colours = label_colours(len(names))
    shown = {"image": images, "mask": colours[masks], "prediction": colours[np.where(masks == VOID, VOID, predictions)]}
    panel = 2.6
    figure = _figure(3 * panel + 1.8, number * panel * height / width + 0.7)
    figure.suptitle(title, fontsize=12)
    for row, axes_of_row in enumerate(figure.subplots(number, 3, squeeze=False)):
        for axes, (column, pictures) in zip(axes_of_row, shown.items(), strict=True):
            axes.imshow(pictures[row], interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(column, fontsize=10)
    present = sorted({*np.unique(masks), *np.unique(predictions)} - {VOID})[:MAX_LEGEND]
    patches = [Patch(color=colours[label] / 255, label=names[label]) for label in present]
    if VOID in masks:
        patches.append(Patch(facecolor="white", edgecolor=GREY, label="unlabelled"))
    figure.legend(handles=patches, loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def label_colours(number: int) -> np.ndarray:
    """A colour for each of 256 labels, uint8 ``(256, 3)``.

    Grey for label 0, which often is the background, distinct ones for the others below ``number``, white for the rest.
    """
    colours = np.full((256, 3), 255, dtype=np.uint8)
    colours[0] = 205
    for label in range(1, number):
        parts = colorsys.hsv_to_rgb(label * 0.618 % 1, (0.85, 0.5)[label % 2], (0.95, 0.7, 0.45)[label % 3])
        colours[label] = [round(255 * part) for part in parts]
    return colours
