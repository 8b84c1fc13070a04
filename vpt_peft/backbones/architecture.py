"""Architecture: a declaration of where a family of vision transformers keeps its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Head:
    """The head of a model class.

    Args:
        task_type: the task of the model class.
        paths: modules of the head, relative to the model; those that are None in a model are ignored.
        outputs: layers of the head with one output per label; None: ``paths`` for image classification, else none.
        own_loss: the model computes the loss from ``labels`` inside its forward.
        layers_read: for heads that read intermediate layers and not the final norm: given the model, the number of
            leading layers that are read. Prompts and biases of later layers would have no effect. None: all layers,
            through the final norm.
    """

    task_type: str
    paths: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None
    own_loss: bool = False
    layers_read: Callable[[Any], int] | None = None

    @property
    def label_layers(self) -> tuple[str, ...]:
        """Paths of the layers with one output per label."""
        if self.outputs is not None:
            return self.outputs
        return self.paths if self.task_type == "IMAGE_CLASSIFICATION" else ()


@dataclass(frozen=True)
class Architecture:
    """Where a family of vision transformers keeps the modules that VPT needs. All names are attribute paths.

    Args:
        model_type: ``config.model_type`` of the family.
        heads: ``{model class name: Head}`` of the supported classes.
        layers: the list of layers, or of stages if ``blocks`` is given, relative to the encoder (``model.base_model``).
        final_norm: the norm after the last layer, relative to the encoder.
        norm: the norm before the attention, relative to a layer, as the following are.
        attention: the attention module; ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` are relative to it.
        mlp_norm, mlp: the second half of a layer.
        attention_scale, mlp_scale: LayerScale of the two residual branches, a parameter or a module.
        pooled_norm: the norm applied to the mean over tokens before the classifier, relative to the encoder; the
            attribute may be None.
        num_prefix_tokens: number of tokens before the patches (``[CLS]``).
        patch_projection: the convolution that embeds patches, relative to the encoder.
        patch_norm: the norm after it, likewise; None: there is none.
        blocks: for window attention (Swin): the list of layers, relative to a stage.
        merging: the patch merging after the last layer of a stage, relative to the stage, with submodules ``norm`` and
            ``reduction``; None in the last stage.
        overwrites_settings: the forward of a layer overwrites attributes of the layer depending on its input.
        backbone: path of an inner backbone of another family (UperNet), whose declaration then applies to everything
            but the heads.
        backbones: supported classes of the inner backbone.
    """

    model_type: str
    heads: dict[str, Head] = field(hash=False)
    layers: str = "layers"
    final_norm: str = "layernorm"
    norm: str = "layernorm_before"
    attention: str = "attention"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    mlp_norm: str = "layernorm_after"
    mlp: str = "mlp"
    attention_scale: str | None = None
    mlp_scale: str | None = None
    pooled_norm: str | None = None
    num_prefix_tokens: int = 1
    patch_projection: str = "embeddings.patch_embeddings.projection"
    patch_norm: str | None = None
    blocks: str | None = None
    merging: str | None = None
    overwrites_settings: bool = False
    backbone: str | None = None
    backbones: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Registers a model family for :func:`~vpt_peft.get_vpt_model`, replacing an earlier declaration of it."""
    ARCHITECTURES[architecture.model_type] = architecture
