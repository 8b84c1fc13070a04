"""One forward pass: whose prompts are on their way, known to every part of the backbone that they meet.

The backbone's own code knows nothing of adapters, so the pass is ambient: :data:`current` holds it for the thread
that runs it. Nothing else in the package is global.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from .backbones import Layer
from .plan import Step
from .prompts import Prompts


@dataclass(eq=False)
class Group:
    """The images of a batch that belong to one adapter.

    Attributes:
        prompts, steps: the adapter's prompts, and its plan, one step a layer; the bare backbone has neither.
        modules: ``{path: module}`` standing in for modules of the model; biases: ``{path: tensor}`` likewise.
        pooling: what the classifier reads.
        rows: numbers of the images; None: all of them.
        keep: while serving, keeps prompts' keys and values between calls: ``keep(layer, sources, compute)``.
        tokens: what the last layer's prompts became, ``(images of the group, num_tokens, width)``, where it is read.
    """

    prompts: Prompts | None = None
    steps: Sequence[Step | None] = ()
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    pooling: str = "default"
    rows: tuple[int, ...] | None = None
    keep: Callable[..., list[Tensor]] | None = None
    tokens: Tensor | None = None

    def step(self, layer: int) -> Step | None:
        return self.steps[layer] if self.prompts is not None else None

    def select(self, batch: Tensor) -> Tensor:
        """The rows of a batch that are the group's."""
        return batch if self.rows is None else batch[list(self.rows)]


@dataclass(eq=False)
class Pass:
    """One forward pass of one batch.

    Attributes:
        num_images: images in the batch; groups: whose they are.
        training: gradients will be wanted.
        num_reached: layers that have met their prompts so far.
        last_hidden_state: the trunk's output, ``(num_images, num_tokens, width)``.
    """

    num_images: int
    groups: Sequence[Group]
    training: bool
    num_reached: int = 0
    last_hidden_state: Tensor | None = None

    def meets(self, layer: int) -> bool:
        """Whether any image has prompts in a layer."""
        return any(group.step(layer) is not None for group in self.groups)


@dataclass(eq=False)
class Visit:
    """A pass inside one layer.

    Attributes:
        entered: what the previous layer made of its prompts, for each group.
        left: what this layer makes of its own, likewise.
        met: the attention has seen the prompts.
    """

    of: Pass
    layer: Layer
    entered: Sequence[Tensor | None]
    left: list[Tensor | None]
    met: bool = False


class _Current(threading.local):
    """What the running thread is inside of.

    A ``ContextVar`` would do as well, but torch.compile cannot trace one; and it must read the same value wherever it
    begins, since at a graph break it goes on inside of a pass that has been entered without it.
    """

    value: Pass | Visit | None = None

    @contextmanager
    def entered(self, value: Pass | Visit) -> Iterator[None]:
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before


current = _Current()


def current_pass() -> Pass | None:
    """The pass that the calling code is part of; None where the backbone was called directly."""
    value = current.value
    return value.of if isinstance(value, Visit) else value
