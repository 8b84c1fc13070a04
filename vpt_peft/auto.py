"""AutoVPTModel: loads an adapter together with its backbone."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch

from . import hub
from .backbones import find_class
from .config import PromptConfig
from .errors import CheckpointError, safe_repr
from .io import open_folder
from .model import VPTModel, pop_peft_options, single_dtype


class AutoVPTModel:
    """Loads an adapter and the backbone that its config names, for any task."""

    task_type: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} has no instances: use {type(self).__name__}.from_pretrained().")

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        check_backbone: bool = True,
        **model_kwargs: Any,
    ) -> VPTModel:
        """Loads backbone and adapter.

        Args:
            model_id: folder or Hub repository of the adapter.
            revision, subfolder: of the adapter; the backbone is loaded at the revision the adapter was trained on.
            dtype: precision of the backbone, such as ``torch.bfloat16`` or ``"bfloat16"``. None: ``"auto"``, as in
                ``transformers``: the precision that its checkpoint was saved in, with a warning for float16 on a CPU.
                ``torch_dtype`` is its older name. The adapter's tensors are in float32 in any case, as in PEFT.
            check_backbone: False: loads the adapter although its backbone has changed.
            model_kwargs: for the backbone's ``from_pretrained``, such as ``device_map``. The backbone
                named by an adapter is not trusted: running code of its repository (``trust_remote_code=True``) and
                reading pickled weights (``use_safetensors=False``) must be allowed here.

        Raises:
            CheckpointError: the config names no backbone, it cannot be loaded, or the adapter is damaged or for another
                task.
        """
        pop_peft_options(f"{cls.__name__}.from_pretrained", model_kwargs)
        model_kwargs["dtype"] = single_dtype(dtype, torch_dtype) or "auto"
        source: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        with hub.pulled(model_id, revision=revision, subfolder=subfolder, **source) as folder:
            with open_folder(folder) as saved:
                config, model_class = saved.config, saved.model_class
            name = _backbone_name(cls.__name__, cls.task_type, config, model_id)
            model = _load_backbone(name, config, model_class, model_id, {**source, **model_kwargs})
            return VPTModel.from_pretrained(model, folder, adapter_name, is_trainable, check_backbone=check_backbone)


def _backbone_name(loader: str, task_type: str | None, config: PromptConfig, model_id: object) -> str:
    """Name of the backbone; raises CheckpointError if there is none, or the adapter is for another task."""
    if config.base_model_name_or_path is None:
        raise CheckpointError(
            f"Expected an adapter that names its backbone, got base_model_name_or_path=None in '{model_id}'. "
            "Load the backbone yourself and use VPTModel.from_pretrained(model, ...)."
        )
    if config.task_type is None or task_type not in (None, config.task_type):
        raise CheckpointError(
            f"{loader} loads adapters for {task_type or 'a task'}, got task_type={config.task_type} in "
            f"'{model_id}'. Use AutoVPTModel."
        )
    return config.base_model_name_or_path


def _load_backbone(
    name: str, config: PromptConfig, model_class: str | None, model_id: object, options: dict[str, Any]
) -> Any:
    """The backbone of an adapter.

    Args:
        name: its folder or repository.
        model_class: name of its class; None: the class that transformers has for the task and the repository's config.
        options: of ``from_pretrained``.
    """
    if not hub.is_folder(name) and not hub.is_repo_id(name):
        raise CheckpointError(
            f"The adapter '{model_id}' was trained on {safe_repr(name)}, which is neither an existing folder nor the "
            "name of a repository. Load its backbone yourself and use VPTModel.from_pretrained(model, ...)."
        )
    import transformers  # here, since it is needed only to load a backbone

    auto_class: Any = getattr(transformers, hub.BACKBONE_CLASSES[str(config.task_type)])
    backbone_class = find_class(model_class) or auto_class
    options = {"trust_remote_code": False, "use_safetensors": True, "revision": config.revision or "main", **options}
    try:
        model = backbone_class.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as error:  # transformers turns the Hub client's errors into these
        raise CheckpointError(
            f"The backbone {safe_repr(name)} of the adapter '{model_id}' cannot be loaded: {error}"
        ) from error
    if getattr(model.config, "_commit_hash", None) is None:
        model.config._commit_hash = hub.resolve_commit(config)  # as in older versions of transformers
    return model


class AutoVPTModelForImageClassification(AutoVPTModel):
    """:class:`AutoVPTModel` for image classification."""

    task_type = "IMAGE_CLASSIFICATION"


class AutoVPTModelForVideoClassification(AutoVPTModel):
    """:class:`AutoVPTModel` for video classification."""

    task_type = "VIDEO_CLASSIFICATION"


class AutoVPTModelForSemanticSegmentation(AutoVPTModel):
    """:class:`AutoVPTModel` for semantic segmentation."""

    task_type = "SEMANTIC_SEGMENTATION"


class AutoVPTModelForMaskedImageModeling(AutoVPTModel):
    """:class:`AutoVPTModel` for masked image modeling."""

    task_type = "MASKED_IMAGE_MODELING"


class AutoVPTModelForZeroShotImageClassification(AutoVPTModel):
    """:class:`AutoVPTModel` for dual encoders of images and texts."""

    task_type = "ZERO_SHOT_IMAGE_CLASSIFICATION"


class AutoVPTModelForObjectDetection(AutoVPTModel):
    """:class:`AutoVPTModel` for object detection."""

    task_type = "OBJECT_DETECTION"


class AutoVPTModelForDepthEstimation(AutoVPTModel):
    """:class:`AutoVPTModel` for depth estimation."""

    task_type = "DEPTH_ESTIMATION"


class AutoVPTModelForKeypointDetection(AutoVPTModel):
    """:class:`AutoVPTModel` for keypoint detection, as of poses."""

    task_type = "KEYPOINT_DETECTION"


class AutoVPTModelForFeatureExtraction(AutoVPTModel):
    """:class:`AutoVPTModel` for models without a head."""

    task_type = "FEATURE_EXTRACTION"
