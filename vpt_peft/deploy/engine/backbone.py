"""The model of an engine: a VPTModel that has an adapter without prompts while no other is active."""

from __future__ import annotations

import os
from typing import Any

import transformers

from ... import hub
from ...config import PromptConfig
from ...errors import AdapterError, CheckpointError, safe_repr
from ...model import VPTModel, get_vpt_model
from ...model.backbone_checks import find_bare_backbone

IDLE = "engine-idle"


class ServedModel:
    """Takes a model for an engine, and gives it back.

    Args:
        model: as for :class:`~vpt_peft.deploy.Engine`.
        hub_options: ``token``, ``cache_dir`` and ``local_files_only``.

    Attributes:
        vpt: the model, in eval mode. Its active adapter is not one of the engine's.

    Raises:
        UnsupportedModelError, AdapterError: the model is not one for image classification, or is not supported.
        CheckpointError: it cannot be loaded.
    """

    def __init__(self, model: Any, hub_options: dict[str, Any]) -> None:
        if isinstance(model, str | os.PathLike):
            model = load_backbone(os.fspath(model), hub_options)
        self.is_own = not isinstance(model, VPTModel)
        self.vpt = _with_idle_adapter(model) if self.is_own else model
        self.active_adapter, self.adapters = self.vpt.active_adapter, list(self.vpt.adapters)
        self.training = self.vpt.training
        try:
            _check_task(self.vpt)
        except AdapterError:
            self.restore()
            raise
        self.vpt.train(False)

    def restore(self) -> None:
        """Removes what was added to the model since, and restores its mode."""
        if self.is_own:
            self.vpt.unload()
            return
        self.vpt.set_adapter(self.active_adapter)
        for name in [name for name in self.vpt.adapters if name not in self.adapters]:
            self.vpt.delete_adapter(name)
        self.vpt.train(self.training)


def load_backbone(name: str, hub_options: dict[str, Any]) -> Any:
    """A model for image classification, as :class:`~vpt_peft.AutoVPTModel` loads it: without running code of its
    repository, from safetensors only, in the precision that it was saved in.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    hub.check_model_name(name)
    options = {"trust_remote_code": False, "use_safetensors": True, "dtype": "auto", **hub_options}
    try:
        return transformers.AutoModelForImageClassification.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as error:  # transformers turns the Hub client's errors into these
        raise CheckpointError(f"The backbone {safe_repr(name)} cannot be loaded: {error}") from error


def _with_idle_adapter(model: Any) -> VPTModel:
    """A VPTModel whose only adapter has no prompts; with a classifier for adapters if the model has none."""
    options: dict[str, Any] = {}
    if find_bare_backbone(model).head.task_type == "FEATURE_EXTRACTION":
        options = {"task_type": "IMAGE_CLASSIFICATION"}
    labels = {"num_labels": 1} if options else {}
    return get_vpt_model(model, PromptConfig(num_tokens=0, **options), IDLE, **labels)


def _check_task(vpt: VPTModel) -> None:
    """Raises AdapterError for a model that is not one for image classification."""
    task, backbone = vpt.backbone.head.task_type, vpt.backbone
    name = type(vpt.get_base_model()).__name__
    if task != "IMAGE_CLASSIFICATION":
        raise AdapterError(
            f"The engine needs a model for image classification, or one without a head, got {name} for {task}. Use "
            "AutoVPTModel, or vpt_peft.pipeline."
        )
    if backbone.architecture.input_dims != 4:
        raise AdapterError(
            f"The engine needs a model that takes pixel_values (num_images, num_channels, height, width), got {name}, "
            "which takes patches with masks and shapes. Use AutoVPTModel, or vpt_peft.pipeline."
        )
