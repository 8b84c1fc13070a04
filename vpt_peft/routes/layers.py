"""A pass goes through the layers: prompts in, prompts out, gradient checkpointing, and what windows add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        visit = partial(self._visit, running, **kwargs)
        if running.prompts.training and getattr(self.module, "gradient_checkpointing", False):
            output, running.tokens = self._checkpoint(visit, running.tokens, *args)
        else:
            output, running.tokens = visit(running.tokens, *args)
        running.num_reached += running.steps[self.layer.index] is not None
        return output

    def _visit(self, running: Pass, tokens: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """Runs the layer; all that a recomputation in the backward pass needs comes in as arguments."""
        visit = Visit(running, self.layer, running.steps[self.layer.index], tokens)
        with current.entered(visit), self._state_kept():
            output = self.forward(*args, **kwargs)
        if visit.step is not None and not visit.met:
            raise RouteError(
                f"Prompts did not reach the attention of layer {self.layer.index} "
                f"({type(self.layer.part('attention')).__name__}), whose output would be the bare backbone's. "
                "Its code was replaced or ignores the attention interface: unload and attach the adapter again."
            )
        return output, visit.left

    @property
    def _checkpoint(self) -> Callable[..., Any]:
        """The layer's own checkpointing: transformers skips it in eval mode, which a frozen backbone always is in."""
        function = self.module._gradient_checkpointing_func
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise RouteError(
                "Gradient checkpointing must be non-reentrant, got use_reentrant=True, which loses the prompts' "
                'gradients. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        return function  # type: ignore[no-any-return]

    @contextmanager
    def _state_kept(self) -> Iterator[None]:
        """Restores what the layer's forward overwrites to suit an input (Swin's window and shift sizes), so that
        one input never changes the next one's result."""
        state = {name: getattr(self.module, name) for name in self.layer.architecture.layer_state}
        try:
            yield
        finally:
            for name, value in state.items():
                setattr(self.module, name, value)


class MergingDoor(Door):
    """Carries prompts through Swin's patch merging: four copies of a prompt take the place of four patches."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        running = current_pass()
        if running is not None and running.tokens is not None:
            running.tokens = self.module.reduction(self.module.norm(running.tokens.repeat(1, 1, 4)))
        return output
