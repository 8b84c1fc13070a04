"""Scores of classification and segmentation, all computed from the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]
from torch import Tensor, nn

from ..data.masks import VOID


@dataclass(frozen=True)
class Scores:
    """Scores of predictions, in percent.

    Attributes:
        confusion: counts of images or pixels, ``(num_labels, num_labels)``: true labels by predicted labels.
        kind: "classification" or "segmentation".
    """

    confusion: np.ndarray
    kind: str = "classification"

    @property
    def total(self) -> int:
        """Number of images or labelled pixels."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of images or labelled pixels that are predicted rightly."""
        return 100 * float(self.confusion.trace()) / max(1, self.total)

    @property
    def chance(self) -> float:
        """Accuracy of always predicting the most frequent label."""
        return 100 * float(self.confusion.sum(1).max()) / max(1, self.total)

    @property
    def mean_iou(self) -> float:
        """Mean intersection over union, without labels in neither truth nor predictions."""
        return float(np.nanmean(self._columns()["iou"])) if self.total else math.nan

    @property
    def main(self) -> float:
        """The score by which runs are compared: accuracy, or mean IoU of segmentation."""
        return self.mean_iou if self.kind == "segmentation" else self.accuracy

    @property
    def is_near_chance(self) -> bool:
        """Whether accuracy is within two standard errors of :attr:`chance`, or below."""
        share = self.chance / 100
        return self.accuracy <= self.chance + 200 * math.sqrt(share * (1 - share) / max(1, self.total))

    def by_label(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Precision, recall, F1 (segmentation: and IoU) of each label, and the number of its images or pixels.

        A score without a denominator, such as the precision of a label that is never predicted, is None.
        """
        columns = self._columns()
        if self.kind != "segmentation":
            del columns["iou"]
        rows = []
        for label, name in enumerate(names):
            values = {
                key: None if np.isnan(column[label]) else round(float(column[label]), 2)
                for key, column in columns.items()
            }
            rows.append({"label": name, **values, "support": int(self.confusion[label].sum())})
        return rows

    def _columns(self) -> dict[str, np.ndarray]:
        counts = self.confusion.astype(float)
        correct, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        with np.errstate(invalid="ignore"):
            return {
                "precision": 100 * correct / predicted,
                "recall": 100 * correct / true,
                "f1": 200 * correct / (predicted + true),
                "iou": 100 * correct / (predicted + true - correct),
            }


class Metric:
    """Collects the confusion matrix over batches, as Trainer's ``compute_metrics`` with ``batch_eval_metrics``.

    Attributes:
        scores: of the last evaluation that was completed.
    """

    def __init__(self, num_labels: int, kind: str = "classification") -> None:
        self.num_labels, self.kind = num_labels, kind
        self.scores = Scores(self._zeros(), kind)
        self._confusion = self._zeros()

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Adds a batch of predicted labels and, after the last one, returns the scores.

        Args:
            prediction: with ``predictions`` and ``label_ids`` of equal shape.
        """
        predicted, labels = (
            torch.as_tensor(part).cpu().numpy().ravel() for part in (prediction.predictions, prediction.label_ids)
        )
        if self.kind == "segmentation":
            known = labels != VOID
            predicted, labels = predicted[known], labels[known]
        if labels.size:
            # not in place: Ray copies this object to its workers as read-only memory
            self._confusion = self._confusion + confusion_matrix(labels, predicted, labels=range(self.num_labels))
        if not compute_result:
            return {}
        self.scores, self._confusion = Scores(self._confusion, self.kind), self._zeros()
        found = {"accuracy": self.scores.accuracy}
        return found | {"mean_iou": self.scores.mean_iou} if self.kind == "segmentation" else found

    def _zeros(self) -> np.ndarray:
        return np.zeros((self.num_labels, self.num_labels), dtype=np.int64)


def predicted_labels(logits: Any, labels: Tensor) -> Tensor:
    """The most likely label of each image ``(batch,)`` or pixel ``(batch, height, width)``.

    Args:
        logits: ``(batch, num_labels)``, or ``(batch, num_labels, ...)`` at any resolution; or a tuple that starts so.
        labels: of the shape of the result.
    """
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    if labels.ndim == 3:
        scores = nn.functional.interpolate(scores.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    return scores.argmax(1)
