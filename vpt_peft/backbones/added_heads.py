"""Linear heads for models that have none: a classifier, and a decode head for segmentation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import ImageClassifierOutput, SemanticSegmenterOutput

from ..errors import AdapterError, UnsupportedModelError, safe_repr
from .architecture import Head
from .backbone import Backbone

IGNORED_LABEL = 255  # of pixels without label, as in transformers
POOLERS = ("pooler", "head")  # what transformers calls the module of the pooled output


class BackboneWithHead(PreTrainedModel):
    """A model of images or videos with a head on its tokens.

    The head is a template: adapters train and own theirs.

    Args:
        backbone: a model without a head.
        num_labels: number of labels.
    """

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, backbone: Backbone, num_labels: int) -> None:
        config = copy.deepcopy(backbone.model.config)
        config.num_labels = num_labels
        super().__init__(config)
        self.backbone: Any = backbone.model
        self.classifier = self._make_head(backbone, num_labels)
        self.main_input_name = backbone.architecture.input_name
        self.parts = (backbone,)  # in a tuple: it is no module
        self.train(backbone.model.training)

    def _make_head(self, backbone: Backbone, num_labels: int) -> nn.Module:
        raise NotImplementedError

    def _run_backbone(self, inputs: dict[str, Any]) -> Any:
        (backbone,) = self.parts
        return self.backbone(return_dict=True, **{**backbone.head.tokens_only, **inputs})

    def get_input_embeddings(self) -> Any:
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Sets that of the backbone."""
        self.backbone.set_attn_implementation(*args, **kwargs)


class BackboneForImageClassification(BackboneWithHead):
    """A linear classifier on ``[CLS]``, else on the pooled output, else on the mean over the tokens; for timm's models,
    on the pooled output."""

    def _make_head(self, backbone: Backbone, num_labels: int) -> nn.Module:
        return nn.Linear(backbone.num_features, num_labels, device=backbone.device)

    def forward(self, return_dict: bool = True, **inputs: Any) -> Any:
        """Logits ``(num_images, num_labels)``, with hidden states and attentions of the model."""
        output = self._run_backbone(inputs)
        return ImageClassifierOutput(
            logits=self.classifier(self._features(output)),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def _features(self, output: Any) -> Tensor:
        """What the classifier reads, ``(num_images, width)``."""
        (backbone,) = self.parts
        tokens, pooled = output.last_hidden_state, output.get("pooler_output")
        if isinstance(pooled, Tensor) and (backbone.head.reads_pooled or backbone.num_prefix_tokens == 0):
            return pooled
        features: Tensor = tokens[:, 0] if backbone.num_prefix_tokens else tokens.mean(1)
        return features if backbone.architecture.normed_output else backbone.final_norm(features)


class BackboneForSemanticSegmentation(BackboneWithHead):
    """A linear layer on each patch token behind the final norm, as a convolution of size 1."""

    def __init__(self, backbone: Backbone, num_labels: int) -> None:
        super().__init__(backbone, num_labels)
        self.loss_function = segmentation_loss

    def _make_head(self, backbone: Backbone, num_labels: int) -> nn.Module:
        return nn.Conv2d(backbone.num_features, num_labels, kernel_size=1, device=backbone.device)

    def forward(self, return_dict: bool = True, **inputs: Any) -> Any:
        """Logits of patches ``(num_images, num_labels, rows, columns)``, with hidden states and attentions."""
        output = self._run_backbone(inputs)
        return SemanticSegmenterOutput(
            logits=self.classifier(self._feature_map(output, inputs[self.main_input_name])),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def _feature_map(self, output: Any, images: Tensor) -> Tensor:
        """The patch tokens, ``(num_images, width, rows, columns)``."""
        (backbone,) = self.parts
        tokens = backbone.image_tokens(output.last_hidden_state)
        if not backbone.architecture.normed_output:
            tokens = backbone.final_norm(tokens)
        if backbone.pooled_norm is not None:  # in place of the final norm
            tokens = backbone.pooled_norm(tokens)
        return tokens.transpose(1, 2).unflatten(2, backbone.token_grid(images, tokens.shape[1]))


def segmentation_loss(labels: Tensor, logits: Tensor, config: Any, **kwargs: Any) -> Tensor:
    """Mean cross-entropy over the labelled pixels, with the logits upsampled to the masks; 0 if no pixel has a label.

    Args:
        labels: ``(num_images, height, width)``; 255 for pixels without label.
        logits: ``(num_images, num_labels, rows, columns)``.

    Raises:
        AdapterError: the masks have another shape, or there is only one label.
    """
    if not isinstance(labels, Tensor) or labels.ndim != 3 or len(labels) != len(logits):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else safe_repr(labels)
        raise AdapterError(
            f"labels must be masks of shape (num_images, height, width) for {len(logits)} images, got {got}."
        )
    if config.num_labels == 1:
        raise AdapterError(
            "The loss of segmentation needs at least two labels, got 1: it would always be 0. Add one for the rest, or "
            "leave labels out."
        )
    ignored = getattr(config, "semantic_loss_ignore_index", IGNORED_LABEL)
    upsampled = interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
    loss = cross_entropy(upsampled, labels.long(), ignore_index=ignored, reduction="sum")
    return loss / (labels != ignored).sum().clamp(min=1)


def add_classifier(backbone: Backbone, num_labels: int) -> Backbone:
    """The backbone in a :class:`BackboneForImageClassification`. The model itself is not changed."""
    unread = [*backbone.head.unread]
    if backbone.num_prefix_tokens and getattr(backbone.model, "pooler", None) is not None:
        unread.append("pooler")  # [CLS] is read in its place
    head = Head(
        backbone.architecture.classification,
        unread=tuple(unread),
        pooled_norm=backbone.head.pooled_norm if backbone.head.reads_pooled else None,
        pooler=backbone.head.pooler,
    )
    return _wrap(backbone, BackboneForImageClassification, num_labels, head)


def add_decode_head(backbone: Backbone, num_labels: int) -> Backbone:
    """The backbone in a :class:`BackboneForSemanticSegmentation`. The model itself is not changed.

    Raises:
        UnsupportedModelError: the tokens of its last layer are not one for each patch of an image.
    """
    reason = _reason_against_decode_head(backbone)
    if reason:
        raise UnsupportedModelError(
            f"A decode head can be added to a model whose last layer has one token for each patch of an image, in rows "
            f"and columns, but {type(backbone.model).__name__} {reason}."
        )
    modules = dict(backbone.model.named_modules())
    pooler = next((path for path in (backbone.head.pooler, *POOLERS) if path in modules), None)
    unread = [*backbone.head.unread, *([] if pooler is None else [pooler])]
    head = Head("SEMANTIC_SEGMENTATION", outputs=("classifier",), unread=tuple(unread), pooler=pooler)
    return _wrap(backbone, BackboneForSemanticSegmentation, num_labels, head)


def _wrap(backbone: Backbone, model_class: type[BackboneWithHead], num_labels: int, head: Head) -> Backbone:
    """The backbone in a model with a head.

    Args:
        head: its declaration, with paths of modules in the model without a head.
    """

    def inside(path: str | None) -> str | None:
        return path and f"backbone.{path}"

    head = replace(
        head,
        paths=("classifier",),
        unread=tuple(f"backbone.{path}" for path in head.unread),
        pooled_norm=inside(head.pooled_norm),
        pooler=inside(head.pooler),
    )
    return replace(backbone, model=model_class(backbone, num_labels), head=head)


def _reason_against_decode_head(backbone: Backbone) -> str | None:
    if backbone.architecture.input_dims == 5:
        return "takes videos"
    if backbone.architecture.input_dims != 4:
        return "takes patches with padding, whose rows and columns differ by image"
    if isinstance(backbone.model, BackboneMixin):
        return "returns feature maps of several layers. Load the model class that returns tokens, such as Dinov2Model"
    if backbone.architecture.key_value_only:
        return f"has fewer: {backbone.architecture.key_value_only}"
    return None
