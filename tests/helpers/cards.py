"""Model cards, and running their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import ViTImageProcessor

from vpt_peft import VPTModel


def save_with_processor(vpt: VPTModel, side: int, folder: Path, has_own: bool) -> tuple[str, Any]:
    """Saves an adapter into "adapter", and an image processor for squares beside the backbone in "backbone".

    Args:
        has_own: the image processor is saved with the adapter too.

    Returns:
        The adapter's card, and the image processor.
    """
    processor = ViTImageProcessor(size={"height": side, "width": side}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(folder / "backbone")
    vpt.save_pretrained(folder / "adapter", image_processor=processor if has_own else None)
    return (folder / "adapter/README.md").read_text(), processor


def run_code(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, block: int = -1) -> dict[str, Any]:
    """Runs the code of a card in a folder with an image, and with the backbone if the card cannot name it.

    Args:
        block: 0: the pipeline, if the card has two blocks of code; -1: the model itself.

    Returns:
        The variables.
    """
    if not (folder / "image.jpg").exists():
        Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "image.jpg")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    code = card.split("```python\n")[1:][block].split("```")[0].replace("path/to/backbone", "backbone")
    try:
        exec(code, names)
    except ImportError:
        pytest.skip("AutoImageProcessor of this version of transformers needs torchvision")
    return names
