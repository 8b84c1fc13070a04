"""explain: from an adapter and an image file to the picture of what its prompts do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import hub
from ..auto import AutoVPTModel
from ..images.positions import interpolation
from ..images.processors import load_processor, saved_processor
from ..model import VPTModel
from ..model.modes import evaluating
from .attention import Explanation, explain_attention
from .drawing import check_output, default_title, draw_explanation

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_LAYERS = 4  # drawn by default
MAX_LABEL = 40  # characters


def explain(
    adapter_or_model: str | os.PathLike[str] | VPTModel,
    image_file: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    output: str | os.PathLike[str] = "explain.png",
    query: str | None = None,
    image_processor: Any = None,
    dtype: str | torch.dtype | None = None,
) -> Explanation:
    """Draws what the prompts of an adapter do to the attention of one image.

    Args:
        adapter_or_model: folder or Hub repository of an adapter, which is loaded with its backbone, or a model, whose
            active adapter is explained.
        image_file: an image file.
        layers: indices of layers, from 0; None: four of them, from the first to the last.
        output: the picture, see :func:`~vpt_peft.explanation.draw_explanation`.
        query: see :func:`~vpt_peft.explanation.explain_attention`.
        image_processor: prepares the image; None: that of the adapter, else of its backbone.
        dtype: precision of the backbone of an adapter, as for :meth:`AutoVPTModel.from_pretrained`.

    Returns:
        What has been drawn, as numbers.

    Raises:
        VPTError: the adapter, the image or an argument cannot be used; see the functions above.
        ImportError: matplotlib or Pillow is missing.
        OSError: a file does not exist, or cannot be written.
    """
    from ..images.files import read_image  # here, since only files need Pillow

    output = check_output(output)  # before anything is loaded
    image = read_image(image_file)
    if isinstance(adapter_or_model, VPTModel):
        vpt, processor = adapter_or_model, image_processor or load_processor(adapter_or_model)
    else:
        with hub.pulled_adapter(adapter_or_model, with_processor=image_processor is None) as folder:
            vpt = AutoVPTModel.from_pretrained(folder, dtype=dtype)
            processor = image_processor or load_processor(vpt, saved_processor(folder))
    inputs = dict(processor(image, return_tensors="pt"))
    pixel_values: Tensor = inputs.pop("pixel_values")
    inputs |= interpolation(vpt, tuple(pixel_values.shape[-2:]))
    if layers is None:
        last = len(vpt.backbone.layers) - 1
        layers = sorted({round(last * step / (NUM_LAYERS - 1)) for step in range(NUM_LAYERS)})
    explanation = explain_attention(vpt, pixel_values, layers, query, **inputs)
    title = default_title(explanation) + _answer(vpt, pixel_values, inputs)
    draw_explanation(explanation, _as_seen(image, processor), output, title)
    return explanation


def _answer(vpt: VPTModel, pixel_values: Tensor, inputs: dict[str, Any]) -> str:
    """What the image is classified as, for the title; empty for tasks other than a choice between classes."""
    is_choice = vpt.config.problem_type in (None, "single_label_classification") and vpt.config.num_labels > 1
    if vpt.active_config.task_type != "IMAGE_CLASSIFICATION" or not is_choice:
        return ""
    with evaluating(vpt):
        label = int(vpt(pixel_values=pixel_values.to(vpt.device, vpt.dtype), **inputs).logits.argmax())
    return f", classified as {str(vpt.config.id2label[label])[:MAX_LABEL]}"


def _as_seen(image: Image, processor: Any) -> Image:
    """The image as it reaches the model, but not normalised; for processors that cut it into patches, all of it."""
    from PIL import Image

    pixels = processor(image, do_rescale=True, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    if pixels.ndim != 3:
        return image
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
