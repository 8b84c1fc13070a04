"""Backbones: the one place that knows where transformers keeps the parts of a vision transformer.

An :class:`Architecture` declares names; :func:`find_backbone` resolves them on a live model into a :class:`Backbone`.
Adding an architecture is one more declaration, ours below or a user's through :func:`register_architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Head:
    """What a model class puts on top of its backbone: the ``task_type`` it serves and the ``paths`` of its modules."""

    task_type: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Where a family of vision transformers keeps what VPT touches. All names are attribute paths.

    Args:
        model_type: ``config.model_type`` of the family.
        heads: ``{model class name: Head}``, the classes that are supported.
        layers: the list of layers, or of stages if ``blocks`` is given, seen from the backbone (``model.base_model``).
        final_norm: the norm behind the last layer, seen from the backbone.
        norm: the norm before attention, seen from a layer; and so on:
        attention: the attention module, with projections named ``query``, ``key``, ``value`` and ``output`` in it.
        mlp_norm, mlp: the second half of the layer, for prompts that live on.
        num_prefix_tokens: tokens in front of the patches (``[CLS]``).
        blocks: where attention is inside windows (Swin): the list of layers, seen from a stage.
        merging: the patch merging behind the last layer of a stage, seen from the stage, with ``norm`` and
            ``reduction`` in it; None in the last stage.
        overwrites_settings: a layer's forward overwrites its attributes with what suits the current input.
    """

    model_type: str
    heads: dict[str, Head] = field(hash=False)
    layers: str = "layers"
    final_norm: str = "layernorm"
    norm: str = "layernorm_before"
    attention: str = "attention"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    mlp_norm: str = "layernorm_after"
    mlp: str = "mlp"
    num_prefix_tokens: int = 1
    blocks: str | None = None
    merging: str | None = None
    overwrites_settings: bool = False


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Makes :func:`~vpt_peft.get_vpt_model` know a family of models; an earlier declaration of it is replaced."""
    ARCHITECTURES[architecture.model_type] = architecture


register_architecture(
    Architecture(
        model_type="vit",
        heads={
            "ViTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "ViTForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("decoder",)),
            "ViTModel": Head("FEATURE_EXTRACTION"),
        },
    )
)
register_architecture(
    Architecture(
        model_type="swin",
        heads={
            "SwinForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "SwinForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("decoder",)),
            "SwinBackbone": Head("FEATURE_EXTRACTION"),
            "SwinModel": Head("FEATURE_EXTRACTION"),
        },
        layers="encoder.layers",
        num_prefix_tokens=0,
        blocks="blocks",
        merging="downsample",
        overwrites_settings=True,
    )
)


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
        tokens = tokens + attended
        return tokens + self.part("mlp")(self.part("mlp_norm")(tokens))


@dataclass(frozen=True, eq=False)
class Backbone:
    """A live model whose parts have been found.

    Attributes:
        model: the model as it was passed in; ``trunk``: the vision transformer in it, without head.
        layers: its layers in order; ``mergings``: ``{index of a stage's last layer: patch merging}``.
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
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    head = _head(model, architecture) if architecture else None
    if architecture is None or head is None:
        supported = ", ".join(name for known in ARCHITECTURES.values() for name in known.heads)
        raise UnsupportedModelError(
            f"Expected a vision transformer among {supported}; got {type(model).__name__}. "
            "Other architectures can be declared with vpt_peft.register_architecture."
        )
    trunk: Any = model.base_model
    try:
        layers, mergings = _layers(trunk, architecture)
        backbone = Backbone(model, trunk, architecture, head, layers, mergings)
        for layer in layers:
            for name in ("norm", "attention", "query", "key", "value", "output", "mlp_norm", "mlp"):
                layer.part(name)
        backbone.final_norm  # noqa: B018  resolves the name
        for path in head.paths:
            model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not look as its architecture '{model_type}' is declared: {error}. "
            "Use a supported version of transformers, or declare it with vpt_peft.register_architecture."
        ) from error
    return backbone


def _head(model: nn.Module, architecture: Architecture) -> Head | None:
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((architecture.heads[name] for name in names if name in architecture.heads), None)


def _layers(trunk: nn.Module, architecture: Architecture) -> tuple[tuple[Layer, ...], dict[int, nn.Module]]:
    modules: list[nn.Module] = []
    mergings: dict[int, nn.Module] = {}
    for stage in trunk.get_submodule(architecture.layers).children():
        modules += stage.get_submodule(architecture.blocks).children() if architecture.blocks else [stage]
        merging = getattr(stage, architecture.merging, None) if architecture.merging else None
        if merging is not None:
            mergings[len(modules) - 1] = merging
    return tuple(Layer(index, module, architecture) for index, module in enumerate(modules)), mergings
