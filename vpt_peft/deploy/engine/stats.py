"""Statistics of an engine."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

WINDOW = 2048  # answered requests whose latencies are kept
COUNTED = ("accepted", "refused", "answered", "failed", "cancelled", "batches", "mixed_batches", "hits", "misses")


@dataclass(frozen=True)
class EngineStats:
    """Statistics of an engine since its start.

    Attributes:
        queue_length: requests that were accepted and are not answered yet.
        accepted, refused: requests that were accepted, and those refused since the queue was full.
        answered, failed, cancelled: how the accepted ones ended; their sum and ``queue_length`` is ``accepted``.
        batches: forward passes; ``mixed_batches``: those of several adapters.
        batch_sizes: ``{number of images: number of forward passes}``.
        adapters: adapters in memory.
        hits, misses: accepted requests whose adapter was in memory, and whose adapter was not.
        evictions: adapters that were removed for others; ``replacements``: since their folder had changed.
        latency_p50, latency_p95, latency_p99: percentiles of the seconds from ``submit`` to the answer, over the latest
            2,048 answers; None before the first.
    """

    queue_length: int
    accepted: int
    refused: int
    answered: int
    failed: int
    cancelled: int
    batches: int
    mixed_batches: int
    batch_sizes: dict[int, int]
    adapters: int
    hits: int
    misses: int
    evictions: int
    replacements: int
    latency_p50: float | None
    latency_p95: float | None
    latency_p99: float | None

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary of JSON types."""
        return asdict(self)


class Recorder:
    """Counts what happens, in the fields of :class:`EngineStats`. Its owner makes sure that threads take turns."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.batch_sizes: Counter[int] = Counter()
        self.latencies: deque[float] = deque(maxlen=WINDOW)

    def record_batch(self, num_images: int, num_adapters: int) -> None:
        """Counts a forward pass."""
        self.counts["batches"] += 1
        self.counts["mixed_batches"] += num_adapters > 1
        self.batch_sizes[num_images] += 1

    def summarize(self, **current: int) -> EngineStats:
        """The statistics.

        Args:
            current: the fields that are not counted.
        """
        counts = {name: self.counts[name] for name in COUNTED}
        latencies = sorted(self.latencies)
        percentiles: dict[str, Any] = {f"latency_p{share}": percentile(latencies, share) for share in (50, 95, 99)}
        return EngineStats(batch_sizes=dict(sorted(self.batch_sizes.items())), **counts, **current, **percentiles)


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least ``share`` percent of the values do not exceed; None if there are none.

    Args:
        ordered: values in ascending order.
    """
    return ordered[max(0, ceil(len(ordered) * share / 100) - 1)] if ordered else None
