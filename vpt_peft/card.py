"""The model card that lies beside an adapter."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template

from .adapter import Adapter
from .config import PromptConfig

NAME = "README.md"
AUTO_CLASSES = {
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "SEMANTIC_SEGMENTATION": "AutoModelForSemanticSegmentation",
    "MASKED_IMAGE_MODELING": "AutoModelForMaskedImageModeling",
    "FEATURE_EXTRACTION": "AutoModel",
}


def write(adapter: Adapter, folder: Path) -> None:
    """Writes a card into an adapter folder that has none; a card that is there is the user's."""
    path = folder / NAME
    if not path.exists():
        path.write_text(_render(adapter, folder), encoding="utf-8")


def _render(adapter: Adapter, folder: Path) -> str:
    config = adapter.config
    template = Template(files("vpt_peft").joinpath("card_template.md").read_text(encoding="utf-8"))
    base_model = config.base_model_name_or_path or "PATH OR NAME OF THE BACKBONE"
    labels = [str(label) for label in adapter.labels()["id2label"].values()]
    return template.substitute(
        title=folder.name,
        variant=_variant(config),
        backbone=base_model,
        base_model=base_model,
        num_tokens=config.num_tokens,
        parameters=f"{sum(parameter.numel() for parameter in adapter.parameters()):,}",
        labels=", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else ""),
        model_class=AUTO_CLASSES[str(config.task_type)],
        folder=folder,
    )


def _variant(config: PromptConfig) -> str:
    if config.num_tokens == 0:
        return "BitFit" if config.bias == "all" else "linear probing"
    return "VPT-Deep" if config.deep else "VPT-Shallow"
