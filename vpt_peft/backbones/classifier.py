"""A linear classifier for models that have none."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .architecture import Head
from .backbone import Backbone


class BackboneForImageClassification(PreTrainedModel):
    """A model of images or videos with a linear classifier on ``[CLS]``, else on its pooled output, else on the mean
    over the tokens; for timm's models, on the pooled output.

    The classifier is a template: adapters train and own theirs.

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
        self.classifier = nn.Linear(backbone.num_features, num_labels, device=backbone.device)
        self.main_input_name = backbone.architecture.input_name
        self.parts = (backbone,)  # in a tuple: it is no module
        self.train(backbone.model.training)

    def forward(self, return_dict: bool = True, **inputs: Any) -> Any:
        """Logits ``(num_images, num_labels)``, with hidden states and attentions of the model."""
        (backbone,) = self.parts
        output = self.backbone(return_dict=True, **{**backbone.head.tokens_only, **inputs})
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

    def get_input_embeddings(self) -> Any:
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Sets that of the backbone."""
        self.backbone.set_attn_implementation(*args, **kwargs)


def add_classifier(backbone: Backbone, num_labels: int) -> Backbone:
    """The backbone in a :class:`BackboneForImageClassification`. The model itself is not changed."""
    unread = [*backbone.head.unread]
    if backbone.num_prefix_tokens and getattr(backbone.model, "pooler", None) is not None:
        unread.append("pooler")  # [CLS] is read in its place
    norm, pooler = (path and f"backbone.{path}" for path in (backbone.head.pooled_norm, backbone.head.pooler))
    head = Head(
        backbone.architecture.classification,
        ("classifier",),
        unread=tuple(f"backbone.{path}" for path in unread),
        pooled_norm=norm if backbone.head.reads_pooled else None,
        pooler=pooler,
    )
    return replace(backbone, model=BackboneForImageClassification(backbone, num_labels), head=head)
