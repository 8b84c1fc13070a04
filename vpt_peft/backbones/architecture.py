"""Architecture: a declaration of where a family of vision transformers keeps its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import CLASSIFICATION_TASKS


@dataclass(frozen=True)
class Head:
    """The head of a model class.

    Args:
        task_type: the task of the model class.
        paths: modules of the head, relative to the model; those that are None in a model are ignored.
        outputs: layers of the head with one output per label; None: ``paths`` for classification, else none.
        extra_outputs: number of outputs besides those of the labels: 1 for "no object" of a detector.
        own_loss: the model computes the loss from ``labels`` inside its forward.
        layers_read: for heads that read intermediate layers: given the model, the number of leading layers that are
            read. Prompts and biases of later layers would have no effect. None: all layers.
        encoder: path of the encoder in the model; None: ``model.base_model``.
        joins_class_token: the classifier reads ``[CLS]`` joined with the pooled tokens (DINOv2), twice the width.
        pooled_norm: the norm applied to the mean over tokens before the classifier, relative to the model; the
            attribute may be None.
        normed: the head reads tokens behind the final norm, or a function of the model; False: in front of it (CLIP).
        unread: modules of the model whose biases are not trained: those without effect on the outputs, those of the
            text model, and those whose bias is read without a call. Those that a model lacks are ignored.
        tokens_only: arguments of the model's forward that leave out all that is computed from its tokens, for a
            classifier that is added and reads them.
        tokens: the module whose output are the tokens, relative to the encoder; None: they are the encoder's
            ``last_hidden_state``.
        reads_pooled: a classifier that is added to the model reads its pooled output, even if there is ``[CLS]``.
        pooler: a module that computes the pooled output, with parameters that nothing else reads.
    """

    task_type: str
    paths: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None
    extra_outputs: int = 0
    own_loss: bool = False
    layers_read: Callable[[Any], int] | None = None
    encoder: str | None = None
    joins_class_token: bool = False
    pooled_norm: str | None = None
    normed: bool | Callable[[Any], bool] = True
    unread: tuple[str, ...] = ()
    tokens_only: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tokens: str | None = None
    reads_pooled: bool = False
    pooler: str | None = None

    @property
    def label_layers(self) -> tuple[str, ...]:
        """Paths of the layers with one output per label."""
        if self.outputs is not None:
            return self.outputs
        return self.paths if self.task_type in CLASSIFICATION_TASKS else ()


@dataclass(frozen=True)
class Architecture:
    """Where a family of vision transformers keeps the modules that VPT needs. All names are attribute paths.

    Each parameter of a layer must belong to one of the parts, so that none is overlooked.

    Args:
        model_type: ``model_type`` of the family's config class.
        heads: ``{model class name: Head}`` of the supported classes.
        layers: the list of layers, or of stages if ``blocks`` is given, relative to the encoder.
        final_norm: the norm after the last layer, relative to the encoder; None, there or in a model: there is none.
        norm: the norm before the attention, relative to a layer, as the following are.
        post_norm: ``norm`` and ``mlp_norm`` are applied to the outputs of attention and MLP, and ``norm`` of a patch
            merging to that of its ``reduction`` (Swin V2); False: to the inputs.
        attention: the attention module; the next fields are relative to it.
        q_proj, k_proj, v_proj, o_proj: linear layers of queries, keys, values and output.
        qkv: one linear layer for queries, keys and values, in place of the three; ``q_bias`` and ``v_bias`` are its
            separate biases, which may be None.
        q_norm, k_norm: norms of queries and keys, by head or over all heads; the modules may be None.
        logit_scale: of cosine attention, in which queries and keys have unit length in each head: the parameter
            ``(num_heads, 1, 1)``, logarithm of the factor of their products.
        caller: the module that calls the attention function, if it is inside of ``attention``.
        uses_sdpa: that module calls ``F.scaled_dot_product_attention`` itself, and not the function that transformers
            has for an attention implementation.
        attention_forward: where that module computes attention step by step: its forward, which takes the module, a
            function in place of those steps (:func:`vpt_peft.injection.attention.attend`), and the module's arguments.
        mlp_norm, mlp: the second half of a layer; ``mlp`` may be several modules, called one after the other.
        attention_scale, mlp_scale: LayerScale of the two residual branches, a parameter or a module.
        unused: parameters and modules of a layer that have no effect on prompts, such as position biases.
        num_prefix_tokens: number of tokens before the patches (``[CLS]``, registers), or a function of the encoder.
        num_suffix_tokens: number of tokens behind the patches (detection tokens), likewise.
        patch_size: side of a patch in pixels, as a function of the encoder; None: ``encoder.config.patch_size``.
        image_size: height and width of images in pixels, likewise.
        patch_projection: the convolution that embeds patches, relative to the encoder.
        patch_norm: the norm after it, or several, likewise; None: there is none.
        normed_output: the tokens in the encoder's output are behind the final norm.
        input_name: argument of the model's forward that takes images or videos.
        input_dims: number of its dimensions: 4 for images, 3 for patches, 5 for videos, with ``video_shape``.
        video_shape: ``(num_frames, num_channels, height, width)`` of the videos that it was made for, as a function of
            the encoder.
        token_mask: argument of the model's forward that masks padded tokens, ``(num_images, num_tokens)``.
        blocks: where layers are in stages (Swin): the list of layers, relative to a stage.
        merging: the patch merging after the last layer of a stage, relative to the stage, with submodules ``norm`` and
            ``reduction``; None in the last stage.
        eager_masks: the family's eager attention takes masks; False: with it, adapters that have different numbers of
            prompts cannot be mixed in a batch.
        biased_masks: whether the encoder adds position biases to its attention mask, as a function of the encoder;
            None: it does not.
        key_value_only: why a layer has no outputs for prompts, as a clause; prompts act as keys and values only. None:
            it has them.
        batch_first: all linear layers are applied to images along the first dimension; False: adapters with different
            biases cannot be mixed in a batch.
        overwrites_settings: the forward of a layer overwrites attributes of the layer depending on its input.
        backbone: path of an inner backbone of another family (UperNet), whose declaration then applies to everything
            but the heads; where it is None in a model, this declaration applies.
        backbones: supported classes of the inner backbone.
        wrapped: path and class of a model of another library inside of the model (timm); the declaration applies where
            there is one.
        refuse: the reason why a model of the family cannot be prompted, as a function of its encoder; None: it can.
    """

    model_type: str
    heads: dict[str, Head] = field(hash=False)
    layers: str = "layers"
    final_norm: str | None = "layernorm"
    norm: str = "layernorm_before"
    post_norm: bool = False
    attention: str = "attention"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    qkv: str | None = None
    q_bias: str | None = None
    v_bias: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    logit_scale: str | None = None
    caller: str | None = None
    uses_sdpa: bool = False
    attention_forward: Callable[..., Any] | None = None
    mlp_norm: str = "layernorm_after"
    mlp: str | tuple[str, ...] = "mlp"
    attention_scale: str | None = None
    mlp_scale: str | None = None
    unused: tuple[str, ...] = ()
    num_prefix_tokens: int | Callable[[Any], int] = 1
    num_suffix_tokens: int | Callable[[Any], int] = 0
    patch_size: Callable[[Any], int] | None = None
    image_size: Callable[[Any], tuple[int, int]] | None = None
    patch_projection: str = "embeddings.patch_embeddings.projection"
    patch_norm: str | tuple[str, ...] | None = None
    normed_output: bool = True
    input_name: str = "pixel_values"
    input_dims: int = 4
    video_shape: Callable[[Any], tuple[int, int, int, int]] | None = None
    token_mask: str | None = None
    blocks: str | None = None
    merging: str | None = None
    eager_masks: bool = True
    biased_masks: Callable[[Any], bool] | None = None
    key_value_only: str | None = None
    batch_first: bool = True
    overwrites_settings: bool = False
    backbone: str | None = None
    backbones: tuple[str, ...] = ()
    wrapped: tuple[str, str] | None = None
    refuse: Callable[[Any], str | None] | None = None

    @property
    def classification(self) -> str:
        """Task type of the family's classifiers."""
        return "VIDEO_CLASSIFICATION" if self.input_dims == 5 else "IMAGE_CLASSIFICATION"


def count_layers_read(backbone: Any) -> int:
    """Number of leading layers that the feature maps of a backbone depend on, where each layer is a stage."""
    return max(backbone.stage_names.index(name) for name in backbone.out_features)


ARCHITECTURES: dict[str, list[Architecture]] = {}


def register_architecture(architecture: Architecture) -> None:
    """Registers a model family for :func:`~vpt_peft.get_vpt_model`.

    A family may have several declarations, for versions of transformers that keep its parts in different places: the
    first that fits a model is used, and the last registered is tried first.
    """
    declared = ARCHITECTURES.setdefault(architecture.model_type, [])
    declared.insert(0, architecture)
