"""A pass goes through the layers: prompts in, prompts out, gradient checkpointing, and what windows add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..backbones import Layer
from ..errors import RouteError
from ..passes import Pass, Visit, current, current_pass
from .doors import Door


class LayerDoor(Door):
    """Brings the prompts of a pass into one layer and takes up what they became."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.module)
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        if running is None:
            return self.forward(*args, **kwargs)
        run: Callable[..., Any] = partial(self._visit, running, **kwargs)
        if running.training and getattr(self.module, "gradient_checkpointing", False):
            run = partial(self._checkpoint, run)
        output, left = run(tuple(group.tokens for group in running.groups), *args)
        for group, tokens in zip(running.groups, left, strict=True):
            group.tokens = tokens
        running.num_reached += running.meets(self.layer.index)
        return output

    def _visit(self, running: Pass, entered: Sequence[Tensor | None], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Runs the layer; all that a recomputation in the backward pass needs comes in as arguments."""
        visit = Visit(running, self.layer, entered, [None] * len(entered))
        with current.entered(visit):
            output = self._own_forward(*args, **kwargs)
        if running.meets(self.layer.index) and not visit.met:
            raise RouteError(
                f"Prompts did not reach the attention of layer {self.layer.index} "
                f"({type(self.layer.part('attention')).__name__}), whose output would be the bare backbone's. "
                "Its code was replaced or ignores the attention interface: unload and attach the adapter again."
            )
        return output, tuple(visit.left)

    @property
    def _own_forward(self) -> Callable[..., Any]:
        """The layer's forward. Where it overwrites settings to suit an input (Swin's window and shift sizes), it works
        on a shallow copy that shares all parameters, so that no input changes what others get, before or after."""
        if not self.layer.architecture.overwrites_settings or self.previous is not None:
            return self.forward
        layer = object.__new__(type(self.module))  # what copy.copy does, in words that torch.compile can trace
        layer.__dict__.update(self.module.__dict__)
        return partial(type(layer).forward, layer)

    @property
    def _checkpoint(self) -> Callable[..., Any]:
        """The layer's own checkpointing: transformers skips it in eval mode, which a frozen backbone always is in."""
        function: Callable[..., Any] = self.module._gradient_checkpointing_func
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise RouteError(
                "Gradient checkpointing must be non-reentrant, got use_reentrant=True, which loses the prompts' "
                'gradients. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        return function


class MergingDoor(Door):
    """Carries prompts through Swin's patch merging: four copies of a prompt take the place of four patches."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        for group in running.groups if running is not None else ():
            if group.tokens is not None:
                group.tokens = self.module.reduction(self.module.norm(group.tokens.repeat(1, 1, 4)))
        # The image comes last, so that in the backward pass it comes first: sharded weights are gathered for it.
        return self.forward(*args, **kwargs)
