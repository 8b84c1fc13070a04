"""explain: from an adapter and an image file to the picture of what its prompts do."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import hub
from ..auto import AutoVPTModel
from ..backbones import Backbone
from ..errors import AdapterError
from ..model import VPTModel
from .attention import Explanation, explain_attention
from .drawing import check_output, draw_explanation

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_LAYERS = 4  # drawn by default


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
        OSError: a file cannot be read or written, or there is no image processor.
    """
    output = check_output(output)  # before anything is loaded
    image = _open_image(Path(image_file))
    folder: str | os.PathLike[str] | None = None
    if isinstance(adapter_or_model, VPTModel):
        vpt = adapter_or_model
    else:
        vpt, folder = AutoVPTModel.from_pretrained(adapter_or_model, dtype=dtype), adapter_or_model
    processor = image_processor or _load_processor(vpt, folder)
    inputs = dict(processor(image, return_tensors="pt"))
    pixel_values: Tensor = inputs.pop("pixel_values")
    if _must_interpolate(vpt.backbone, pixel_values):
        inputs["interpolate_pos_encoding"] = True
    if layers is None:
        last = len(vpt.backbone.layers) - 1
        layers = sorted({round(last * step / (NUM_LAYERS - 1)) for step in range(NUM_LAYERS)})
    explanation = explain_attention(vpt, pixel_values, layers, query, **inputs)
    draw_explanation(explanation, _as_seen(image, processor), output)
    return explanation


def _open_image(file: Path) -> Image:
    """An upright RGB image.

    Raises:
        AdapterError: it has more than 8 bits per channel, of which PIL would clip the values.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise AdapterError(
                f"The image must have 8 bits per channel, got mode {image.mode} in '{file}'. Convert it to 8 bits, "
                "scaled by the full range of its values."
            )
        return ImageOps.exif_transpose(image).convert("RGB")


def _load_processor(vpt: VPTModel, adapter: str | os.PathLike[str] | None) -> Any:
    """The image processor that is saved beside an adapter, else that of its backbone."""
    from transformers import AutoImageProcessor

    base = vpt.active_config.base_model_name_or_path
    in_folder = adapter is not None and hub.is_folder(adapter)
    if adapter is not None and (not in_folder or Path(adapter, hub.PREPROCESSOR_NAME).is_file()):
        try:
            return AutoImageProcessor.from_pretrained(adapter, trust_remote_code=False)
        except OSError:
            if in_folder:
                raise
    if base is None:
        raise AdapterError(
            "The image must be prepared as in training, but neither the adapter nor its config names an image "
            "processor, got base_model_name_or_path=None. Pass image_processor."
        )
    revision = vpt.active_config.revision or "main"
    return AutoImageProcessor.from_pretrained(base, revision=revision, trust_remote_code=False)


def _must_interpolate(backbone: Backbone, pixel_values: Tensor) -> bool:
    """Whether the image has another size than the backbone's position embeddings, and it must be told so."""
    accepted = inspect.signature(type(backbone.encoder).forward).parameters
    if pixel_values.ndim != 4 or "interpolate_pos_encoding" not in accepted:
        return False
    return tuple(pixel_values.shape[-2:]) != backbone.image_size


def _as_seen(image: Image, processor: Any) -> Image:
    """The image as it reaches the model, but not normalised; for processors that cut it into patches, all of it."""
    from PIL import Image

    pixels = processor(image, do_rescale=True, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    if pixels.ndim != 3:
        return image
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
