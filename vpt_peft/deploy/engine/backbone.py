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

PREFIX = "engine-"  # of the names of an engine's adapters
IDLE = f"{PREFIX}idle"


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
        self.previous = None if not isinstance(model, VPTModel) else (model.active_adapter, model.training)
        self.vpt = _with_idle_adapter(model)
        try:
            _check_task(self.vpt)
        except AdapterError:
            self.restore()
            raise
        self.vpt.train(False)
        self.vpt.set_adapter(IDLE)

    def restore(self) -> None:
        """Removes what was added to the model since, and restores its active adapter and mode."""
        if self.previous is None:
            self.vpt.unload()
            return
        active, training = self.previous
        self.vpt.set_adapter(active)
        for name in [name for name in self.vpt.adapters if name.startswith(PREFIX)]:
            self.vpt.delete_adapter(name)
        self.vpt.train(training)


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
    """A VPTModel with an adapter without prompts; with a classifier for adapters if the model has none."""
    config = PromptConfig(num_tokens=0)
    if isinstance(model, VPTModel):
        if any(name.startswith(PREFIX) for name in model.adapters):
            raise AdapterError("The model belongs to another engine. Close that first.")
        model.add_adapter(IDLE, config)
        return model
    if find_bare_backbone(model).head.task_type == "FEATURE_EXTRACTION":
        return get_vpt_model(model, config.replace(task_type="IMAGE_CLASSIFICATION"), IDLE, num_labels=1)
    return get_vpt_model(model, config, IDLE)


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
