"""State of the current forward pass, available to all hooks.

The code of the backbone knows nothing of adapters, so the state is not passed through it as an argument:
:func:`activate` makes it the current one of the running thread. Nothing else in the package is global.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, LayerPlan, ProjectionCache
from ..backbones import Backbone, Layer
from .cached_input import CachedInput


@dataclass(eq=False)
class AdapterBatch:
    """The images of a batch that belong to one adapter.

    Attributes:
        adapter: the adapter; None for the bare backbone.
        rows: indices of the images; None: all of them.
        cache: keys and values of its prompts from earlier calls, while serving.
        prompts: outputs of the last layer's prompts, ``(images of the adapter, num_tokens, width)``, where used.
    """

    adapter: Adapter | None = None
    rows: tuple[int, ...] | None = None
    cache: ProjectionCache | None = None
    prompts: Tensor | None = None

    @property
    def pooling(self) -> str:
        """What its classifier reads."""
        return "default" if self.adapter is None else self.adapter.config.pooling

    def plan(self, layer: int) -> LayerPlan | None:
        """The plan of a layer; None if it has no prompts there."""
        return None if self.adapter is None else self.adapter.plan[layer]

    def replacement(self, path: str) -> nn.Module | None:
        """The adapter's copy of a module of the model; None if it has none."""
        return None if self.adapter is None else self.adapter.replacement(path)

    def select(self, batch: Tensor) -> Tensor:
        """The rows of a batch that belong to the adapter."""
        return batch if self.rows is None else batch[list(self.rows)]


@dataclass(eq=False)
class ForwardContext:
    """One forward pass of one batch.

    Attributes:
        backbone: the backbone that runs.
        num_images: number of images in the batch.
        batches: its parts by adapter.
        training: whether gradients may be needed.
        tasks: for an exported mixed batch, the index of each image's part, ``(num_images,)``. All parts then have all
            images, and each image takes what its own part computes, so that the graph is the same for all batches.
        entered: the modules that must be entered once, the model and its encoder, as far as they have been.
        layers_reached: number of layers with prompts that have run so far.
        image_reached: the prompts that are part of the image have been put into it.
        last_hidden_state: output of the encoder, ``(num_images, num_tokens, width)``, where a pooling reads it.
        pooler_output: its pooled output, ``(num_images, width)``, likewise; None if it has none.
        token_mask: ``(num_images, num_tokens)``, 0 for padded tokens; None: there are none.
        cached: features in place of pixels; None: there are none.
        mixes_biases: images of a mixed batch have different biases.
        prompt_tables: which prompts each image of a mixed batch attends to, see :func:`~.prompt_batch.batch_prompts`.
    """

    backbone: Backbone
    num_images: int
    batches: Sequence[AdapterBatch]
    training: bool
    tasks: Tensor | None = None
    entered: tuple[nn.Module, ...] = ()
    layers_reached: int = 0
    image_reached: bool = False
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    token_mask: Tensor | None = None
    cached: CachedInput | None = None
    mixes_biases: bool = field(init=False)
    prompt_tables: dict[Any, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.mixes_biases = len(self.batches) > 1 and any(
            batch.adapter is not None and batch.adapter.bias.paths for batch in self.batches
        )

    def plans(self, layer: int) -> list[LayerPlan | None]:
        """The plans of a layer, one for each adapter."""
        return [batch.plan(layer) for batch in self.batches]

    @property
    def pools_tokens(self) -> bool:
        """Whether a head reads tokens by the pooling of its adapter."""
        return any(batch.pooling != "default" for batch in self.batches)

    @property
    def batch_of_image(self) -> list[int] | Tensor:
        """For each image of a mixed batch, the index of the part that it belongs to."""
        if self.tasks is not None:
            return self.tasks
        part = {row: index for index, batch in enumerate(self.batches) for row in batch.rows or ()}
        return [part[row] for row in range(self.num_images)]

    def count_images(self, batch: AdapterBatch) -> int:
        """Number of images of an adapter."""
        return self.num_images if batch.rows is None else len(batch.rows)


@dataclass(eq=False)
class LayerContext:
    """One layer of a forward pass.

    Attributes:
        plans: for each adapter's batch, its plan of this layer; None: it has no prompts here.
        prompts_in: outputs of the previous layer's prompts, for each adapter's batch.
        prompts_out: outputs of this layer's prompts, likewise; written by the attention.
        attention_ran: the attention has seen the prompts.
    """

    forward: ForwardContext
    layer: Layer
    plans: Sequence[LayerPlan | None]
    prompts_in: Sequence[Tensor | None]
    prompts_out: list[Tensor | None]
    attention_ran: bool = False

    @property
    def has_prompts(self) -> bool:
        """Whether any image has prompts in this layer."""
        return any(self.plans)

    def has_route(self, *routes: str) -> bool:
        """Whether any image has prompts in this layer that are computed in one of these ways."""
        return any([plan is not None and plan.route in routes for plan in self.plans])


class _Current(threading.local):
    """The context of the running thread.

    A ``ContextVar`` would serve as well, but torch.compile cannot trace one. The attribute is set for each thread:
    torch.compile guards on it, and a default of the class would appear in the thread only at the first write.
    """

    def __init__(self) -> None:
        self.context: ForwardContext | LayerContext | None = None
        self.disabled: list[tuple[object, object]] = []  # models and tasks, see disable()


_current = _Current()


@contextmanager
def activate(context: ForwardContext | LayerContext | None) -> Iterator[None]:
    """Makes a context the current one of this thread, None for the bare backbone, and restores the previous one."""
    previous, _current.context = _current.context, context
    try:
        yield
    finally:
        _current.context = previous


@contextmanager
def activate_alone(forward: ForwardContext, batch: AdapterBatch) -> Iterator[None]:
    """Makes one part of a mixed batch the whole of it, for modules that are applied to the prompts of its adapter or to
    its images only: in :class:`~.overrides.ModuleOverride`, each image has the biases of its own adapter."""
    if len(forward.batches) == 1:
        yield
    else:
        alone = {"batches": [replace(batch, rows=None)], "num_images": forward.count_images(batch), "tasks": None}
        with activate(replace(forward, **alone)):  # type: ignore[arg-type]
            yield


def current_forward(backbone: Backbone) -> ForwardContext | None:
    """The forward pass of a backbone that the caller is part of; None if the backbone was called directly."""
    context = _current.context
    forward = context.forward if isinstance(context, LayerContext) else context
    return forward if forward is not None and forward.backbone is backbone else None


def current_layer() -> LayerContext | None:
    """The layer that the caller is part of; None outside of layers."""
    context = _current.context
    return context if isinstance(context, LayerContext) else None


@contextmanager
def disable(model: object) -> Iterator[None]:
    """A context in which :func:`is_disabled` holds for a model, in this thread and this task of an event loop."""
    entry = (model, _current_task())
    _current.disabled.append(entry)
    try:
        yield
    finally:
        _current.disabled.remove(entry)


def is_disabled(model: object) -> bool:
    """Whether the caller is inside :func:`disable`. torch.compile cannot trace tasks: there, the thread counts."""
    if not _current.disabled:
        return False
    if torch.compiler.is_compiling():
        return any(owner is model for owner, _ in _current.disabled)
    return any(owner is model and task is _current_task() for owner, task in _current.disabled)


def _current_task() -> Any:
    """The running task of an event loop; None outside of loops."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
