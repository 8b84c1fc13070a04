"""The answer to a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...adapter import Adapter


@dataclass(frozen=True, eq=False)
class Prediction:
    """What an adapter says about an image.

    Attributes:
        adapter, revision: as in the request.
        labels: ``[{"label": "rose", "score": 0.98}, ...]``, best first, as the pipelines of transformers; ``top_k`` of
            them. Scores are probabilities: their sum is 1, or each is one of its own where labels do not exclude each
            other (``problem_type="multi_label_classification"``, or a single label); of a regression, the values.
        logits: of all labels, ``(num_labels,)``, float32 on the CPU.
        problem_type: of the adapter, as in ``transformers``.
    """

    adapter: str
    revision: str | None
    labels: list[dict[str, Any]]
    logits: Tensor
    problem_type: str | None


def rank_labels(logits: Tensor, adapter: Adapter, top_k: int | None) -> list[dict[str, Any]]:
    """The labels of :class:`Prediction`.

    Args:
        logits: ``(num_labels,)``.
        top_k: number of labels; None: all.
    """
    config: Any = adapter.model_config
    if config.problem_type == "regression":
        scores = logits
    elif config.problem_type == "multi_label_classification" or len(logits) == 1:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1)
    best = scores.topk(min(len(scores), top_k or len(scores)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"label": config.id2label[label], "score": score} for label, score in pairs]
