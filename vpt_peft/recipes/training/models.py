"""Loading backbones to fine-tune, and fine-tuned models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    SwinBackbone,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ...adapter import Adapter
from ...auto import AutoVPTModel
from ...hub import is_folder, pulled_adapter, suggest_login
from ...images.positions import ARGUMENT, can_interpolate
from ...images.processors import backbone_revision, load_processor, read_processor, saved_processor
from ...model import VPTModel
from ...model.modes import eval_mode
from ..data.transforms import Size, has_processor, load_image_processor, processed_size
from ..errors import RecipeError
from ..sources import check_source

TASKS = ("classification", "segmentation")
ADAPTER_CONFIG = "adapter_config.json"
UPERNET_WIDTH = 256


# -- backbones --------------------------------------------------------------------------------------------------------


def load_classifier(name: str, label_names: Sequence[str], seed: int, precision: str = "fp32") -> Any:
    """Loads a checkpoint in float32, with a new, randomly initialised head for these classes.

    Without a classification model of its family, the model has no head: adapters add one.

    Args:
        precision: for the attention implementation on a CPU; weights are float32 in any case.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dtype": torch.float32}
    if precision == "bf16" and not torch.accelerator.is_available():
        options["attn_implementation"] = "eager"  # with the fused attention, training takes 1.3 times as long
    if type(AutoConfig.from_pretrained(name)) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return AutoModel.from_pretrained(name, **options)
    model = AutoModelForImageClassification.from_pretrained(
        name, num_labels=len(label_names), ignore_mismatched_sizes=True, **labels_of(label_names), **options
    )
    if isinstance(getattr(model, "classifier", None), nn.Linear):
        model.classifier.reset_parameters()  # also if the checkpoint's head has as many classes
    return model


def gets_upernet(name: str) -> bool:
    """Whether a checkpoint is a Swin without a decode head. UperNet reads the feature maps of all of its stages."""
    return bool(AutoConfig.from_pretrained(name).model_type == "swin")


def save_upernet(swin: str, folder: Path, label_names: Sequence[str], processor: Any, seed: int) -> None:
    """Saves UperNet with a new decode head on a pretrained Swin. Its norms, which are new too, are the backbone's."""
    torch.manual_seed(seed)
    processor.save_pretrained(folder)
    upernet(swin, label_names, UPERNET_WIDTH).save_pretrained(folder)  # last: its presence says that it is complete


def load_segmenter(name: str, label_names: Sequence[str], seed: int) -> Any:
    """Loads a checkpoint in float32 for these labels.

    Without a segmentation model of its family, the model has no head: adapters add one.
    """
    torch.manual_seed(seed)
    if type(AutoConfig.from_pretrained(name)) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        return AutoModel.from_pretrained(name, dtype=torch.float32)
    return AutoModelForSemanticSegmentation.from_pretrained(
        name, ignore_mismatched_sizes=True, dtype=torch.float32, **labels_of(label_names)
    )


def upernet(swin: str | SwinConfig, label_names: Sequence[str], width: int) -> Any:
    """UperNet with a new decode head on a pretrained Swin or, given a config, a randomly initialised one."""
    config = SwinConfig.from_pretrained(swin) if isinstance(swin, str) else swin
    config.out_features = [f"stage{stage + 1}" for stage in range(len(config.depths))]
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, hidden_size=width, auxiliary_channels=width, **labels_of(label_names))
    )
    if isinstance(swin, str):
        model.backbone = SwinBackbone.from_pretrained(swin, config=config, dtype=torch.float32)
    return model


def labels_of(names: Sequence[str]) -> dict[str, Any]:
    """``id2label`` and ``label2id``."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def stored_dtype(name: str) -> str:
    """The precision that a checkpoint is stored in, such as "float16"; "float32" if it does not say."""
    dtype = getattr(AutoConfig.from_pretrained(name), "dtype", None) or torch.float32
    return str(dtype).removeprefix("torch.")


# -- image sizes ------------------------------------------------------------------------------------------------------


def fit_to_size(model: Any, size: Size) -> None:
    """Makes a model take images of a size: position embeddings are interpolated if it is not the backbone's own.

    Raises:
        RecipeError: the model cannot take images of that size.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(bare.config, "image_size", None)
    if own is None or size == ((own, own) if isinstance(own, int) else tuple(own)):
        return
    if can_interpolate(bare):
        model.register_forward_pre_hook(_interpolate, with_kwargs=True)
    try:
        with eval_mode(model), torch.no_grad():
            model(pixel_values=torch.zeros(1, 3, *size, device=next(model.parameters()).device))
    except (RuntimeError, ValueError) as error:
        raise RecipeError(
            f"{type(bare).__name__} cannot take images of {size[0]} x {size[1]} pixels: {error}. Try a multiple of its "
            "patch size, or leave out --image-size."
        ) from error


def _interpolate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, ARGUMENT: True}


# -- fine-tuned models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model in eval mode, with its image processor.

    Attributes:
        source: the backbone, an adapter or a full model.
        label_names: by label.
        task: "classification", "segmentation" or another task type in lower case.
    """

    model: Any
    processor: Any
    label_names: list[str]
    task: str

    def check_task(self, command: str) -> None:
        """Raises RecipeError unless a command is for this task."""
        if self.task not in TASKS:
            raise RecipeError(f"{command} is for {' and '.join(TASKS)}, got an adapter for {self.task}.")

    @classmethod
    def load(cls, name: str, device: torch.device) -> Tuned:
        """Loads an adapter of this library or of PEFT with its backbone, or a fully fine-tuned model, in float32.

        Args:
            name: folder or Hub repository.

        Raises:
            VPTError, OSError: there is none, or it cannot be loaded.
        """
        check_source(name)
        with suggest_login():
            kind = peft_type(name)
            processor = None
            if kind == "VPT":
                with pulled_adapter(name, with_processor=True) as folder:
                    model = AutoVPTModel.from_pretrained(folder, dtype=torch.float32)
                    processor = processor_of_adapter(model, folder)
            elif kind is not None:
                model = _load_peft(name)
            else:
                architectures = getattr(AutoConfig.from_pretrained(name), "architectures", None) or [""]
                segments = "Segmentation" in architectures[0]
                auto_class: Any = AutoModelForSemanticSegmentation if segments else AutoModelForImageClassification
                model = auto_class.from_pretrained(name, dtype=torch.float32)
        model.to(device).train(False)
        processor = processor or _processor_of(name, model)
        fit_to_size(model, processed_size(processor))
        names = model.config.id2label
        return cls(model, processor, [names[label] for label in range(model.config.num_labels)], _task_of(model))


def _task_of(model: Any) -> str:
    """ "classification", "segmentation", or another task type of adapters in lower case."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = {"IMAGE_CLASSIFICATION": "classification", "SEMANTIC_SEGMENTATION": "segmentation"}
    if isinstance(model, VPTModel):
        task_type = str(model.active_config.task_type)
        return known.get(task_type, task_type.lower())
    return "segmentation" if type(bare).__name__.endswith("ForSemanticSegmentation") else "classification"


def peft_type(name: str) -> str | None:
    """The ``peft_type`` of an adapter's config; None: there is no adapter."""
    if is_folder(name):
        file = Path(name) / ADAPTER_CONFIG
        if not file.is_file():
            nested = sorted(Path(name).glob(f"*/{ADAPTER_CONFIG}"))
            has_model = (Path(name) / "config.json").is_file()
            return None if has_model or not nested else "VPT"
    else:
        try:
            file = Path(hf_hub_download(name, ADAPTER_CONFIG))
        except EntryNotFoundError:
            return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("peft_type", "VPT"))
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"'{file}' must be the JSON config of an adapter, but cannot be read: {error}") from error


def _load_peft(name: str) -> Any:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise RecipeError(f"'{name}' is an adapter of PEFT, which is not installed: pip install peft") from error
    backbone = PeftConfig.from_pretrained(name).base_model_name_or_path
    config = AutoConfig.from_pretrained(name)  # saved beside the adapter, with its labels
    model = AutoModelForImageClassification.from_pretrained(
        backbone, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    return PeftModel.from_pretrained(model, name)


def processor_of_adapter(vpt: VPTModel, folder: Path) -> Any:
    """The image processor saved with the active adapter, in this folder; else that of its backbone."""
    saved, adapter = saved_processor(folder), cast(Adapter, vpt.adapters[vpt.active_adapter])
    if saved is not None:
        return load_processor(vpt, saved)
    return load_image_processor(vpt.name_or_path, adapter.image_size, backbone_revision(vpt))


def _processor_of(name: str, model: Any) -> Any:
    """The image processor saved with a model; else that of its backbone."""
    if has_processor(name):
        return read_processor(name)
    return load_image_processor(model.config.name_or_path)


def say(text: str) -> None:
    """Prints a remark to stderr."""
    print(text, file=sys.stderr)
