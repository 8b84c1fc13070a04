"""Hooks that lead prompts through the layers and patch mergings, and read the tokens behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from ..adapter import LayerPlan
from ..backbones import Backbone, Layer
from ..errors import RouteError
from .context import ForwardContext, LayerContext, activate, activate_alone, current_forward
from .locations import add_to_tokens
from .overrides import ForwardOverride, identity


class LayerHook(ForwardOverride):
    """Runs one layer with its prompts: an override of ``forward`` rather than a hook, since the layer must run inside
    a context, be checkpointed in eval mode and, in Swin, on a copy of its settings."""

    def __init__(self, backbone: Backbone, layer: Layer) -> None:
        super().__init__(backbone, layer.module)
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = current_forward(self.backbone)
        if forward is None:
            return self._layer_forward(*args, **kwargs)
        if forward.cached is not None:
            if forward.cached.skips(self.layer.index):
                with activate(None):
                    return forward.cached.skip(self.layer.index, self._layer_forward, *args, **kwargs)
            args = forward.cached.enter_layer(self.layer.index, args)
        plans = forward.plans(self.layer.index)
        prompts_in = [batch.prompts for batch in forward.batches]
        if forward.training and getattr(self._checkpointed, "gradient_checkpointing", False):
            run = partial(self._run, forward, plans, **kwargs)
            output, prompts_out = self._checkpoint(run, prompts_in, *args)
        else:
            output, prompts_out = self._run(forward, plans, prompts_in, *args, **kwargs)
        for batch, prompts in zip(forward.batches, prompts_out, strict=True):
            batch.prompts = prompts
        forward.layers_reached += any(plans)
        return output

    def _run(
        self,
        forward: ForwardContext,
        plans: Sequence[LayerPlan | None],
        prompts_in: Sequence[Tensor | None],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Runs the layer. Everything that a recomputation in the backward pass needs is an argument."""
        context = LayerContext(forward, self.layer, plans, prompts_in, [None] * len(prompts_in))
        if context.has_route("add"):
            args = add_to_tokens(context, *args)
        with activate(context):
            output = self._layer_forward(*args, **kwargs)
        if not context.attention_ran and context.has_route("key_value", "tokens", "prefix"):
            raise RouteError(
                f"Prompts did not reach the attention of layer {self.layer.index} "
                f"({type(self.layer.part('attention')).__name__}): the output would be the bare backbone's. "
                "Its code was replaced or ignores the attention interface: unload and attach the adapter again."
            )
        return output, tuple(context.prompts_out)

    @property
    def _layer_forward(self) -> Callable[..., Any]:
        """The layer's forward. Where it overwrites settings of the layer to suit an input (window and shift size of
        Swin), it runs on a shallow copy that shares all parameters, so that no input changes the output of others."""
        if not self.layer.architecture.overwrites_settings or self.earlier is not None:
            return self.forward
        layer = object.__new__(type(self.module))  # copy.copy, in a form that torch.compile can trace
        layer.__dict__.update(self.module.__dict__)
        return partial(type(layer).forward, layer)

    @property
    def _checkpointed(self) -> nn.Module:
        """The module that has the settings of gradient checkpointing: the layer, or its stage."""
        return self.module if hasattr(self.module, "gradient_checkpointing") else self.layer.stage

    @property
    def _checkpoint(self) -> Callable[..., Any]:
        """The layer's checkpointing function, which transformers skips in eval mode, that is for a frozen backbone."""
        function: Callable[..., Any] = self._checkpointed._gradient_checkpointing_func  # type: ignore[assignment]
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise RouteError(
                "Gradient checkpointing must be non-reentrant, got use_reentrant=True, which loses the prompts' "
                'gradients. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        return function


class CheckpointingOverride:
    """Takes the place of ``set_grad_checkpointing`` of a timm model, which checkpoints its layers from outside: there,
    the recomputation would miss the prompts. Instead, :class:`LayerHook` checkpoints each layer, never reentrant.

    Copies and pickles of the model have its own method again.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.model = backbone.wrapped
        self.layers: list[Any] = [layer.module for layer in backbone.layers]

    def inject(self) -> None:
        """Overrides the method, and lets it take effect if checkpointing is enabled already."""
        enabled = self.model.grad_checkpointing or any(
            getattr(one, "gradient_checkpointing", False) for one in self.layers
        )
        self.model.grad_checkpointing = False
        self.model.set_grad_checkpointing = self
        self(enabled)

    def remove(self) -> None:
        """Restores the method; the settings of the model are restored with all others."""
        del self.model.set_grad_checkpointing
        for layer in self.layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func

    def __call__(self, enable: bool = True) -> None:
        for layer in self.layers:
            layer.gradient_checkpointing = enable
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def __reduce__(self) -> Any:
        return getattr, (self.model, "set_grad_checkpointing")


class ForwardHook(ABC):
    """A hook that is called around the forward of a module; copies and pickles of the module do not have it."""

    def __init__(self, backbone: Backbone, module: nn.Module) -> None:
        self.backbone = backbone
        self.module = module
        self.handle: RemovableHandle | None = None

    @abstractmethod
    def inject(self) -> None:
        """Registers the hook."""

    def remove(self) -> None:
        """Removes the hook."""
        if self.handle is not None:
            self.handle.remove()

    def __reduce__(self) -> Any:
        return identity, (_no_hook,)


class TokensHook(ForwardHook):
    """Reads the tokens that a head pools, where the output of the encoder does not contain them (timm)."""

    def inject(self) -> None:
        self.handle = self.module.register_forward_hook(self)

    def __call__(self, module: Any, _: Any, output: Tensor) -> None:
        forward = current_forward(self.backbone)
        if forward is not None and forward.pools_tokens:
            forward.last_hidden_state = output


class PatchMergingHook(ForwardHook):
    """Carries prompts through Swin's patch merging: a prompt, repeated four times, takes the place of four patches.

    It runs before the merging, so that in the backward pass the image comes first and gathers sharded weights (FSDP2).
    """

    def inject(self) -> None:
        self.handle = self.module.register_forward_pre_hook(self)

    def __call__(self, module: Any, _: Any) -> None:
        forward = current_forward(self.backbone)
        if forward is None:
            return
        first, second = module.norm, module.reduction
        if self.backbone.architecture.post_norm:
            first, second = second, first
        for batch in forward.batches:
            if batch.prompts is not None:
                with activate_alone(forward, batch):
                    batch.prompts = second(first(batch.prompts.repeat(1, 1, 4)))


def _no_hook(*_: Any) -> None:
    """Takes the place of a hook in a copy or pickle of a module, see :class:`~.overrides.ForwardOverride`."""
