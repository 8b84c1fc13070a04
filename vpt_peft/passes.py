"""One forward pass: whose prompts are on their way, known to every part of the backbone that they meet.

The backbone's own code knows nothing of adapters, so the pass is ambient: :data:`current` holds it for the thread
that runs it. Nothing else in the package is global.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import Prompts
from .plan import Step


@dataclass(eq=False)
class Pass:
    """One forward pass with one adapter.

    Attributes:
        num_images: images in the batch.
        prompts, steps: the adapter's prompts and its plan, one step a layer.
        modules: ``{path: module}`` standing in for modules of the model; biases: ``{path: tensor}`` likewise.
        pooling: what the classifier reads.
        tokens: what the last layer's prompts became, ``(num_images, num_tokens, width)``, where it is read.
        num_reached: layers that have met their prompts so far.
        last_hidden_state: the trunk's output, ``(num_images, num_tokens, width)``.
    """

    num_images: int
    prompts: Prompts
    steps: Sequence[Step | None]
    modules: Mapping[str, nn.Module]
    biases: Mapping[str, Tensor]
    pooling: str
    tokens: Tensor | None = None
    num_reached: int = 0
    last_hidden_state: Tensor | None = None


@dataclass(eq=False)
class Visit:
    """A pass inside one layer: the prompts that came in, and what they became, if they live on."""

    of: Pass
    layer: Any
    step: Step | None
    entered: Tensor | None
    left: Tensor | None = None
    met: bool = False


@dataclass(eq=False)
class _Current:
    """A context variable of the running thread that torch.compile can trace.

    ``ContextVar`` has no graph representation, so while a graph is traced a plain attribute takes its place.
    """

    running: ContextVar[Pass | Visit | None] = field(default_factory=lambda: ContextVar("vpt_pass", default=None))
    traced: Pass | Visit | None = None

    def get(self) -> Pass | Visit | None:
        if torch.compiler.is_compiling():
            return self.traced
        return self.running.get()

    @contextmanager
    def entered(self, value: Pass | Visit) -> Iterator[None]:
        if torch.compiler.is_compiling():
            before, self.traced = self.traced, value
            try:
                yield
            finally:
                self.traced = before
        else:
            token = self.running.set(value)
            try:
                yield
            finally:
                self.running.reset(token)


current = _Current()


def current_pass() -> Pass | None:
    """The pass that the calling code is part of; None where the backbone was called directly."""
    value = current.get()
    return value.of if isinstance(value, Visit) else value
