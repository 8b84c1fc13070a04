"""Backbones: a live model whose parts have been found where its architecture declares them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import ARCHITECTURES, Architecture, Head
from .errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a live backbone. Its parts are looked up at each use, so that replaced ones are found."""

    index: int
    module: nn.Module
    architecture: Architecture

    def part(self, name: str) -> Any:
        """The module that the architecture declares as ``name``."""
        path = getattr(self.architecture, name)
        if name in ("query", "key", "value", "output"):
            path = f"{self.architecture.attention}.{path}"
        return self.module.get_submodule(path)

    @property
    def width(self) -> int:
        return self.part("norm").weight.shape[0]

    def place(self, tokens: Tensor) -> Tensor:
        """Tokens on this layer's device and in its precision."""
        weight = self.part("norm").weight
        return tokens.to(weight.device, weight.dtype)

    def finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """What tokens become in the rest of the layer, given their attention's output, both ``(..., width)``."""
        tokens = tokens + self._scaled("attention_scale", attended)
        return tokens + self._scaled("mlp_scale", self.part("mlp")(self.part("mlp_norm")(tokens)))

    def _scaled(self, name: str, tokens: Tensor) -> Tensor:
        path = getattr(self.architecture, name)
        if path is None:
            return tokens
        scale = attrgetter(path)(self.module)
        return scale(tokens) if isinstance(scale, nn.Module) else scale * tokens


@dataclass(frozen=True, eq=False)
class Backbone:
    """A live model whose parts have been found.

    Attributes:
        model: the model as it was passed in; ``trunk``: the vision transformer in it, without head.
        layers: its layers in order, as far as they are read; ``mergings``: ``{index of a stage's last layer: patch
            merging}`` between them.
    """

    model: Any
    trunk: Any
    architecture: Architecture
    head: Head
    layers: tuple[Layer, ...]
    mergings: dict[int, nn.Module]

    @property
    def widths(self) -> list[int]:
        """Width of each layer."""
        return [layer.width for layer in self.layers]

    @property
    def final_norm(self) -> nn.Module:
        return self.trunk.get_submodule(self.architecture.final_norm)

    @property
    def unread(self) -> set[nn.Module]:
        """The modules behind the last one that the head reads: nothing that they compute matters."""
        if self.head.layers_read is None:
            return set()
        layers, mergings = _layers(self.trunk, self.architecture, None)
        behind = [layer.module for layer in layers[len(self.layers) :]]
        behind += [merging for index, merging in mergings.items() if index not in self.mergings]
        return {module for one in (*behind, self.final_norm) for module in one.modules()}

    @property
    def pooled_norm(self) -> Any:
        """The norm of the mean over tokens; None where the model has none."""
        path = self.architecture.pooled_norm
        return attrgetter(path)(self.trunk) if path else None

    @property
    def model_type(self) -> str:
        """The model's own family, also where the backbone in it is of another."""
        return str(self.model.config.model_type)

    @property
    def patch_size(self) -> int:
        size = self.trunk.config.patch_size
        return int(size) if isinstance(size, int) else int(size[0])

    @property
    def device(self) -> torch.device:
        """Where prompts are kept; a layer on another device gets them moved at each use."""
        return next(self.trunk.parameters()).device

    @property
    def num_features(self) -> int:
        """Width of what a linear head reads."""
        return self.widths[-1]


def find_backbone(model: nn.Module) -> Backbone:
    """Resolves the declaration that fits ``model``.

    Raises:
        UnsupportedModelError: no declaration fits; the supported classes are named.
    """
    declared = _declared(model)
    head = _named(model, declared.heads) if declared else None
    if declared is None or head is None:
        supported = ", ".join(name for known in ARCHITECTURES.values() for name in known.heads)
        raise UnsupportedModelError(
            f"Expected a vision transformer among {supported}; got {type(model).__name__}. "
            "Other architectures can be declared with vpt_peft.register_architecture."
        )
    try:
        head = replace(head, paths=tuple(path for path in head.paths if attrgetter(path)(model) is not None))
        inner, architecture = _inside(model, declared)
        trunk: Any = inner.base_model
        layers, mergings = _layers(trunk, architecture, head.layers_read(model) if head.layers_read else None)
        if not layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} must give out what at least one layer made, but gives the embeddings alone. "
                "Choose other out_features or out_indices."
            )
        backbone = Backbone(model, trunk, architecture, head, layers, mergings)
        for layer in layers:
            for name in ("norm", "attention", "query", "key", "value", "output", "mlp_norm", "mlp"):
                layer.part(name)
            for scale in (architecture.attention_scale, architecture.mlp_scale):
                attrgetter(scale)(layer.module) if scale else None
        backbone.final_norm  # noqa: B018  resolves the name
        for path in head.paths:
            model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not look as its architecture '{declared.model_type}' is declared: {error}. "
            "Use a supported version of transformers, or declare it with vpt_peft.register_architecture."
        ) from error
    return backbone


def _declared(model: nn.Module) -> Architecture | None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None


def _named(model: nn.Module, heads: dict[str, Head]) -> Head | None:
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((heads[name] for name in names if name in heads), None)


def _inside(model: Any, declared: Architecture) -> tuple[Any, Architecture]:
    """The model that has the layers, ``model`` itself or the backbone that it holds, and how it is declared."""
    if declared.backbone is None:
        return model, declared
    inner = model.get_submodule(declared.backbone)
    architecture = _declared(inner)
    if architecture is None or not any(cls.__name__ in declared.backbones for cls in type(inner).__mro__):
        raise UnsupportedModelError(
            f"{type(model).__name__} is supported with a backbone among {', '.join(declared.backbones)}; "
            f"got {type(inner).__name__}. Others can be declared with vpt_peft.register_architecture."
        )
    return inner, architecture


def _layers(
    trunk: nn.Module, architecture: Architecture, number: int | None
) -> tuple[tuple[Layer, ...], dict[int, nn.Module]]:
    modules: list[nn.Module] = []
    mergings: dict[int, nn.Module] = {}
    for stage in trunk.get_submodule(architecture.layers).children():
        modules += stage.get_submodule(architecture.blocks).children() if architecture.blocks else [stage]
        merging = getattr(stage, architecture.merging, None) if architecture.merging else None
        if merging is not None:
            mergings[len(modules) - 1] = merging
    layers = tuple(Layer(index, module, architecture) for index, module in enumerate(modules[:number]))
    return layers, {index: merging for index, merging in mergings.items() if index < len(layers) - 1}
