"""Architectures: the one place that knows where transformers keeps the parts of a vision transformer.

Adding an architecture is one more declaration, ours below or a user's through :func:`register_architecture`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Head:
    """What a model class puts on top of its backbone.

    Args:
        task_type: the task it serves.
        paths: its modules, seen from the model; those that are None in a model are left out.
        outputs: the layers among or in them with one output a label; None: ``paths``, where images are classified.
        own_loss: the model computes the loss from ``labels`` in its forward, in a way of its own.
        layers_read: given the model, how many of its first layers the head reads, where it reads those and not the
            final norm; prompts and biases behind them would be in vain. None: all, through the final norm.
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


def _swin_layers_read(backbone: Any) -> int:
    """Feature map 0 is of the embeddings, the next ones are of the stages."""
    return sum(backbone.config.depths[: max(backbone.stage_names.index(name) for name in backbone.out_features)])


register_architecture(
    Architecture(
        model_type="swin",
        heads={
            "SwinForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "SwinForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("decoder",)),
            "SwinBackbone": Head("FEATURE_EXTRACTION", layers_read=_swin_layers_read),
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
                layers_read=lambda model: _swin_layers_read(model.backbone),
            ),
        },
        backbone="backbone",
        backbones=("SwinBackbone",),
    )
)
