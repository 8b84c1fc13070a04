"""A tiny backbone, adapters of it, and what each of them says alone."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ViTForImageClassification, ViTImageProcessorPil

from helpers.models import move, tiny_vit
from vpt_peft import PromptConfig, VPTModel, get_vpt_model
from vpt_peft.images.files import to_rgb

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@dataclass
class Adapters:
    """Adapter folders of one backbone.

    Attributes:
        model: folder of the backbone. folder: of the adapter folders.
    """

    model: Path
    folder: Path

    def save(self, task: str, labels: list[str], seed: int = 0, **config: Any) -> Path:
        """Saves an adapter with random weights, in place of one that is there."""
        torch.manual_seed(seed)
        model = ViTForImageClassification.from_pretrained(self.model)
        id2label = dict(enumerate(labels))
        vpt = get_vpt_model(model, PromptConfig(**{"num_tokens": 3, **config}), task, id2label=id2label)
        move(vpt.adapters[task])
        vpt.save_pretrained(self.folder, image_processor=PROCESSOR)
        return self.folder / task

    def logits(self, task: str, image: Image.Image) -> Tensor:
        """The logits of an adapter alone, by the model and the image processor themselves."""
        vpt = VPTModel.from_pretrained(ViTForImageClassification.from_pretrained(self.model), self.folder / task)
        with torch.no_grad():
            return vpt.eval()(PROCESSOR(to_rgb(image), return_tensors="pt")["pixel_values"]).logits[0]


def make_adapters(folder: Path) -> Adapters:
    """Two tasks, "birds" and "cars"."""
    tiny_vit().model.save_pretrained(folder / "model")
    PROCESSOR.save_pretrained(folder / "model")
    made = Adapters(folder / "model", folder / "adapters")
    made.save("birds", ["duck", "heron", "swan"])
    made.save("cars", ["bus", "van"], seed=1, kind="prefix")
    return made


def picture(mode: str = "RGB", size: tuple[int, int] = (30, 20), seed: int = 0) -> Image.Image:
    """An image of random pixels in a mode of PIL."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy()).convert(mode)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
