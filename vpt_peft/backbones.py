"""Backbones: the one place that knows where transformers keeps the parts of a vision transformer.

An :class:`Architecture` declares names; :func:`find_backbone` resolves them on a live model into a :class:`Backbone`.
Adding an architecture is one more declaration, ours below or a user's through :func:`register_architecture`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Head:
    """What a model class puts on top of its backbone.

    Args:
        task_type: the task it serves.
        paths: its modules, seen from the model; those that are None in a model are left out.
        outputs: the layers among or in them with one output a label; None: ``paths``, where images are classified.
        own_loss: the model computes the loss from ``labels`` in its forward, in a way of its own.
        layers_read: given the model, how many of its first layers the head reads; prompts in later ones would be in
            vain. None: all.
    """

    task_type: str
    paths: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None
    own_loss: bool = False
    layers_read: Callable[[Any], int] | None = None

    @property
    def label_layers(self) -> tuple[str, ...]:
        """Paths of the layers with one output a label."""
        if self.outputs is not None:
            return self.outputs
        return self.paths if self.task_type == "IMAGE_CLASSIFICATION" else ()


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
        attention_scale, mlp_scale: what the halves' outputs are scaled by (LayerScale), a factor or a module; seen from
            a layer.
        pooled_norm: the norm of the mean over tokens that a classifier reads, seen from the backbone; it may be None.
        num_prefix_tokens: tokens in front of the patches (``[CLS]``).
        blocks: where attention is inside windows (Swin): the list of layers, seen from a stage.
        merging: the patch merging behind the last layer of a stage, seen from the stage, with ``norm`` and
            ``reduction`` in it; None in the last stage.
        overwrites_settings: a layer's forward overwrites its attributes with what suits the current input.
        backbone: where the model holds a backbone of another family (UperNet), whose declaration then counts for all
            of this but the heads; ``backbones``: the classes of it that are supported.
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
    attention_scale: str | None = None
    mlp_scale: str | None = None
    pooled_norm: str | None = None
    num_prefix_tokens: int = 1
    blocks: str | None = None
    merging: str | None = None
    overwrites_settings: bool = False
    backbone: str | None = None
    backbones: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Architecture] = {}
SEGMENTATION_OUTPUTS = ("decode_head.classifier", "auxiliary_head.classifier")


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


def _beit_layers_read(model: Any) -> int:
    """The decode head takes ``hidden_states[index - 1]``, which is what ``index - 1`` layers made."""
    return max((index - 1) % (len(model.beit.layers) + 1) for index in model.config.out_indices)


def _upernet_layers_read(model: Any) -> int:
    """Feature map 0 is of the embeddings, the next ones are of the stages."""
    backbone = model.backbone
    return sum(backbone.config.depths[: max(backbone.stage_names.index(name) for name in backbone.out_features)])


register_architecture(
    Architecture(
        model_type="beit",
        heads={
            "BeitForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "BeitForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("layernorm", "lm_head"), own_loss=True),
            "BeitForSemanticSegmentation": Head(
                "SEMANTIC_SEGMENTATION",
                ("fpn", "decode_head", "auxiliary_head"),
                SEGMENTATION_OUTPUTS,
                own_loss=True,
                layers_read=_beit_layers_read,
            ),
            "BeitModel": Head("FEATURE_EXTRACTION"),
        },
        attention_scale="lambda_1",
        mlp_scale="lambda_2",
        pooled_norm="pooler.layernorm",
    )
)
register_architecture(
    Architecture(
        model_type="upernet",
        heads={
            "UperNetForSemanticSegmentation": Head(
                "SEMANTIC_SEGMENTATION",
                ("decode_head", "auxiliary_head"),
                SEGMENTATION_OUTPUTS,
                own_loss=True,
                layers_read=_upernet_layers_read,
            ),
        },
        backbone="backbone",
        backbones=("SwinBackbone",),
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
