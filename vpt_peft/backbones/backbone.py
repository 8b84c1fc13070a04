"""Backbone and Layer: the declared parts of a live model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError, safe_repr
from .architecture import ARCHITECTURES, Architecture, Head

IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PARTS = ("norm", "attention", *IN_ATTENTION, "mlp_norm", "mlp")


class Layer:
    """One layer of a live backbone. Its parts are looked up at each use, so that replaced modules are found.

    Args:
        index: number of the layer, from 0.
        module: the layer.
        architecture: its declaration.
    """

    def __init__(self, index: int, module: nn.Module, architecture: Architecture) -> None:
        self.index = index
        self.module = module
        self.architecture = architecture
        paths = {name: getattr(architecture, name) for name in PARTS}
        paths |= {name: f"{architecture.attention}.{paths[name]}" for name in IN_ATTENTION}
        self._paths = {name: tuple(path.split(".")) for name, path in paths.items()}

    def part(self, name: str) -> Any:
        """The module declared as ``name``."""
        module = self.module
        for attribute in self._paths[name]:
            module = getattr(module, attribute)
        return module

    @property
    def width(self) -> int:
        """Width of its tokens."""
        return int(self.part("norm").weight.shape[0])

    @property
    def key_width(self) -> int:
        """Width of the keys and values of all heads, ``num_heads · head_dim``."""
        return int(self.part("k_proj").out_features)

    def to_layer(self, tokens: Tensor) -> Tensor:
        """Tokens on this layer's device and in its precision."""
        weight = self.part("norm").weight
        return tokens.to(weight.device, weight.dtype)

    def finish(self, tokens: Tensor, attention_output: Tensor) -> Tensor:
        """The rest of the layer after the attention: both residual branches and the MLP.

        Args:
            tokens: input of the layer, ``(..., width)``.
            attention_output: output of the attention's ``o_proj``, ``(..., width)``.
        """
        tokens = tokens + self._scale("attention_scale", attention_output)
        return tokens + self._scale("mlp_scale", self.part("mlp")(self.part("mlp_norm")(tokens)))

    def _scale(self, name: str, tokens: Tensor) -> Tensor:
        path = getattr(self.architecture, name)
        if path is None:
            return tokens
        scale = attrgetter(path)(self.module)
        return scale(tokens) if isinstance(scale, nn.Module) else scale * tokens


@dataclass(frozen=True, eq=False)
class Backbone:
    """A live model and its parts.

    Attributes:
        model: the model as it was passed in.
        encoder: the vision transformer in it, without head.
        layers: its layers in order, as far as the head reads them.
        mergings: ``{index of the last layer of a stage: patch merging}`` between those layers.
    """

    model: Any
    encoder: Any
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
        """The norm after the last layer."""
        return self.encoder.get_submodule(self.architecture.final_norm)

    @property
    def unread_modules(self) -> set[nn.Module]:
        """Modules whose output does not reach the head."""
        if self.head.layers_read is None:
            return set()
        layers, mergings = _find_layers(self.encoder, self.architecture, None)
        unread = [layer.module for layer in layers[len(self.layers) :]]
        unread += [merging for index, merging in mergings.items() if index not in self.mergings]
        return {module for root in (*unread, self.final_norm) for module in root.modules()}

    @property
    def pooled_norm(self) -> Any:
        """The norm of the mean over tokens; None where the model has none."""
        path = self.architecture.pooled_norm
        return attrgetter(path)(self.encoder) if path else None

    @property
    def model_type(self) -> str:
        """Family of the model; the inner backbone may be of another."""
        return str(self.model.config.model_type)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        size = self.encoder.config.patch_size
        return int(size) if isinstance(size, int) else int(size[0])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it was made for, in pixels."""
        size = self.encoder.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    def find_patch_embedding(self) -> dict[str, nn.Module]:
        """``{path in the model: module}`` of the convolution that embeds patches, and of the norm after it.

        Raises:
            UnsupportedModelError: they are not where the declaration of the model says.
        """
        named = dict(self.encoder.named_modules())
        names = [name for name in (self.architecture.patch_projection, self.architecture.patch_norm) if name]
        modules = [named.get(name) for name in names]
        if not isinstance(modules[0], nn.Conv2d) or None in modules:
            raise UnsupportedModelError(
                f"Expected the convolution that embeds patches at '{names[0]}' of {type(self.encoder).__name__}, got "
                f"{', '.join(type(module).__name__ for module in modules)} at {', '.join(names)}. Declare its path "
                "with vpt_peft.register_architecture (patch_projection, patch_norm)."
            )
        paths = {module: path for path, module in self.model.named_modules()}
        return {paths[module]: module for module in modules if module is not None}

    @property
    def device(self) -> torch.device:
        """Device of the adapters; layers on other devices get prompts moved at each use."""
        return next(self.encoder.parameters()).device

    @property
    def num_features(self) -> int:
        """Input width of a linear head."""
        return self.widths[-1]


def find_backbone(model: nn.Module) -> Backbone:
    """Finds the declared parts of a model.

    Raises:
        UnsupportedModelError: no declaration fits; the error lists the supported classes.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"Expected a model, got {safe_repr(model)}. Load it first, for example by "
            "AutoModelForImageClassification.from_pretrained(name)."
        )
    declared = _find_architecture(model)
    head = _find_head(model, declared.heads) if declared else None
    if declared is None or head is None:
        supported = ", ".join(name for known in ARCHITECTURES.values() for name in known.heads)
        raise UnsupportedModelError(
            f"Expected a vision transformer among {supported}; got {type(model).__name__}. "
            "Other architectures can be declared with vpt_peft.register_architecture."
        )
    try:
        head = replace(head, paths=tuple(path for path in head.paths if attrgetter(path)(model) is not None))
        inner, architecture = _find_inner(model, declared)
        encoder: Any = inner.base_model
        layers, mergings = _find_layers(encoder, architecture, head.layers_read(model) if head.layers_read else None)
        if not layers:
            raise UnsupportedModelError(
                f"The outputs of {type(model).__name__} must include at least one layer, got the embeddings alone. "
                "Choose other out_features or out_indices."
            )
        backbone = Backbone(model, encoder, architecture, head, layers, mergings)
        _check_parts(backbone)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not match the declaration of '{declared.model_type}': {error}. "
            "Use a supported version of transformers, or declare it with vpt_peft.register_architecture."
        ) from error
    return backbone


def _check_parts(backbone: Backbone) -> None:
    """Raises AttributeError if a declared part does not exist."""
    for layer in backbone.layers:
        for name in PARTS:
            layer.part(name)
        _ = layer.part("attention").config  # names the attention implementation
        for scale in (backbone.architecture.attention_scale, backbone.architecture.mlp_scale):
            if scale is not None:
                attrgetter(scale)(layer.module)
    backbone.encoder.get_submodule(backbone.architecture.final_norm)
    for path in backbone.head.paths:
        backbone.model.get_submodule(path)


def _find_architecture(model: nn.Module) -> Architecture | None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None


def _find_head(model: nn.Module, heads: dict[str, Head]) -> Head | None:
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((heads[name] for name in names if name in heads), None)


def _find_inner(model: Any, declared: Architecture) -> tuple[Any, Architecture]:
    """The model that has the layers, which is ``model`` or its inner backbone, and its declaration."""
    if declared.backbone is None:
        return model, declared
    inner = model.get_submodule(declared.backbone)
    architecture = _find_architecture(inner)
    if architecture is None or not any(cls.__name__ in declared.backbones for cls in type(inner).__mro__):
        raise UnsupportedModelError(
            f"{type(model).__name__} is supported with a backbone among {', '.join(declared.backbones)}; "
            f"got {type(inner).__name__}. Others can be declared with vpt_peft.register_architecture."
        )
    return inner, architecture


def _find_layers(
    encoder: nn.Module, architecture: Architecture, number: int | None
) -> tuple[tuple[Layer, ...], dict[int, nn.Module]]:
    """The first ``number`` layers, all of them for None, and the patch mergings between them."""
    modules: list[nn.Module] = []
    mergings: dict[int, nn.Module] = {}
    for stage in encoder.get_submodule(architecture.layers).children():
        modules += stage.get_submodule(architecture.blocks).children() if architecture.blocks else [stage]
        merging = getattr(stage, architecture.merging, None) if architecture.merging else None
        if merging is not None:
            mergings[len(modules) - 1] = merging
    layers = tuple(Layer(index, module, architecture) for index, module in enumerate(modules[:number]))
    return layers, {index: merging for index, merging in mergings.items() if index < len(layers) - 1}
