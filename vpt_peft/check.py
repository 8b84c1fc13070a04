"""check_architecture: whether the declaration of a model family is right, found out on a model itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import find_backbone
from .config import PromptConfig
from .errors import RouteError
from .model import VPTModel

NUM_TOKENS = 3
TOLERANCE = 1e-4  # of the largest output
NOISE = 0.1  # of a parameter's standard deviation, so that zeros and ones hide nothing
WAYS: dict[str, dict[str, Any]] = {
    "VPT-Deep, keys and values": {"route": "key_value"},
    "VPT-Deep, tokens": {"route": "tokens"},
    "VPT-Shallow": {"deep": False},
}


@dataclass(frozen=True)
class Comparison:
    """One way of computing prompts, compared with their concatenation.

    Attributes:
        difference: largest difference of an output, as a fraction of the largest output; None: not comparable.
        effect: largest difference to the bare backbone, likewise.
        reason: why it could not be compared.
    """

    difference: float | None = None
    effect: float | None = None
    reason: str = ""

    @property
    def agrees(self) -> bool | None:
        """Whether it agrees and prompts have an effect; None: not comparable."""
        if self.difference is None or self.effect is None:
            return None
        return self.difference < TOLERANCE < self.effect

    def __str__(self) -> str:
        if self.agrees is None:
            return f"not compared: {self.reason}"
        words = "agrees" if self.agrees else "DIFFERS" if self.difference >= TOLERANCE else "HAS NO EFFECT"  # type: ignore[operator]
        return f"{words} (difference {self.difference:.1e}, effect of prompts {self.effect:.1e})"


@dataclass(frozen=True)
class ArchitectureReport:
    """The result of :func:`check_architecture`; ``print(report)`` shows it.

    Attributes:
        model: class of the model.
        ways: the comparison of each way of computing prompts.
    """

    model: str
    ways: Mapping[str, Comparison]

    @property
    def agrees(self) -> bool | None:
        """True: everything that can be compared agrees; False: something does not; None: nothing can be compared."""
        verdicts = [way.agrees for way in self.ways.values() if way.agrees is not None]
        return all(verdicts) if verdicts else None

    def __str__(self) -> str:
        return "\n".join([self.model, *(f"  {name}: {way}" for name, way in self.ways.items())])


def check_architecture(model: nn.Module, **inputs: Any) -> ArchitectureReport:
    """Compares prompts with an independent computation: their concatenation with the input of each layer.

    It tells whether a declaration (:func:`~vpt_peft.register_architecture`) is right. The model is not changed: it is
    copied, converted to float32, and noise is added to its parameters, since zeros and ones would hide faults. Layers
    with windows or position biases cannot take further tokens, and are reported as not compared.

    Args:
        model: a model of the family; a small one with random weights will do.
        inputs: arguments of its forward; without ``pixel_values``, or what the model calls them, two random images or
            videos of the size in its config.

    Raises:
        UnsupportedModelError: no declaration fits the model.
    """
    backbone = find_backbone(model)
    noisy = _with_noise(model)
    name = backbone.architecture.input_name
    if name not in inputs:
        inputs[name] = torch.randn(2, *backbone.input_shape, device=backbone.device)
    with torch.no_grad():
        bare = _output(noisy(**inputs))
        ways = {name: _compare(noisy, config, inputs, bare) for name, config in WAYS.items()}
    return ArchitectureReport(type(model).__name__, ways)


def _with_noise(model: nn.Module) -> Any:
    noisy: Any = copy.deepcopy(model)
    noisy = noisy.float().eval()
    with torch.no_grad():
        for parameter in noisy.parameters():
            scale = parameter.std() if parameter.numel() > 1 else parameter.new_tensor(0.0)
            parameter.add_(torch.randn_like(parameter) * (NOISE * scale).clamp(min=0.02))
    return noisy


def _compare(model: Any, config: Mapping[str, Any], inputs: dict[str, Any], bare: Tensor) -> Comparison:
    try:
        vpt: Any = VPTModel(model, PromptConfig(num_tokens=NUM_TOKENS, **config))
    except RouteError as error:
        return Comparison(reason=str(error))
    vpt.train(False)
    adapter = vpt.adapters[vpt.active_adapter]
    for prompts in adapter.prompts.parameters():
        nn.init.normal_(prompts)
    prompts = {int(name): tensor.detach() for name, tensor in adapter.prompts.named_parameters()}
    ours = _output(vpt(**inputs))
    layers = [layer.module for layer in vpt.backbone.layers]
    num_prefix_tokens = vpt.backbone.num_prefix_tokens
    vpt.unload()
    try:
        with concatenated(layers, prompts, num_prefix_tokens):
            theirs = _output(model(**inputs))
    except (RuntimeError, ValueError, IndexError) as error:
        return Comparison(reason=f"its layers do not take further tokens ({str(error).partition(chr(10))[0][:120]})")
    largest = theirs.abs().max()
    difference, effect = (((ours - other).abs().max() / largest).item() for other in (theirs, bare))
    return Comparison(difference, effect)


def _output(output: Any) -> Tensor:
    """The logits of a model, else its tokens, else its first output, of feature maps the last."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if isinstance(output.get(name), Tensor):
            return output[name]
    others = (value[-1] if isinstance(value, tuple) else value for value in output.values())
    return next(value for value in others if isinstance(value, Tensor))


@contextmanager
def concatenated(layers: list[Any], prompts: Mapping[int, Tensor], num_prefix_tokens: int) -> Iterator[None]:
    """A context in which prompts stand behind the prefix tokens at the input of each layer, as plain tokens.

    Args:
        prompts: ``{layer: (num_tokens, width)}``; other layers get the outputs of the previous layer's.
    """
    carried: list[Tensor] = []

    def override(index: int, layer: Any) -> Any:
        forward = layer.forward

        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = prompts[index].expand(len(hidden), -1, -1) if index in prompts else carried[0]
            tokens = torch.cat([hidden[:, :num_prefix_tokens], own, hidden[:, num_prefix_tokens:]], dim=1)
            args, kwargs = _pad_masks(args, hidden, own), _pad_masks(kwargs, hidden, own)
            if "position_mask" in inspect.signature(forward).parameters:  # V-JEPA 2 numbers the tokens that it rotates
                args, kwargs = (), {**kwargs, "position_mask": _number(hidden, own, num_prefix_tokens)}
            counting = [module for module in layer.modules() if isinstance(vars(module).get("num_prefix_tokens"), int)]
            for module in counting:  # timm's layers count the tokens without position
                module.num_prefix_tokens += own.shape[1]
            try:
                output = forward(tokens, *args, **kwargs)
            finally:
                for module in counting:
                    module.num_prefix_tokens -= own.shape[1]
            result = output[0] if isinstance(output, tuple) else output
            end = num_prefix_tokens + own.shape[1]
            carried[:] = [result[:, num_prefix_tokens:end]]
            image = torch.cat([result[:, :num_prefix_tokens], result[:, end:]], dim=1)
            return (image, *output[1:]) if isinstance(output, tuple) else image

        return run

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            layer.forward = override(index, layer)
            stack.callback(layer.__dict__.pop, "forward")
        yield


def _number(hidden: Tensor, prompts: Tensor, num_prefix_tokens: int) -> Tensor:
    """The place of each token in the video, ``(num_videos, num_tokens)``; prompts get 0, where nothing is rotated."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    before, after = places.split([num_prefix_tokens, len(places) - num_prefix_tokens])
    return torch.cat([before, places.new_zeros(prompts.shape[1]), after]).expand(len(hidden), -1)


def _pad_masks(arguments: Any, hidden: Tensor, prompts: Tensor) -> Any:
    """Arguments of a layer, with attention masks ``(..., num_tokens, num_tokens)`` in which all tokens see prompts."""
    number, added = hidden.shape[1], prompts.shape[1]

    def pad(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-1] != number:
            return value
        visible = True if value.dtype == torch.bool else 0.0
        rows = value.amax(-2, keepdim=True) if visible == 0.0 else value.any(-2, keepdim=True)
        value = torch.cat([rows.expand(*value.shape[:-2], added, -1), value], dim=-2)
        return nn.functional.pad(value, (added, 0), value=visible)

    if isinstance(arguments, dict):
        return {name: pad(value) for name, value in arguments.items()}
    return tuple(pad(value) for value in arguments)
