"""AutoVPTModel: finds the backbone of an adapter by itself."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import transformers

from . import hub
from .config import PromptConfig
from .errors import CheckpointError, shown
from .folder import open_folder
from .model import VPTModel
from .names import is_folder, is_repository
from .origin import as_commit

BACKBONE_CLASSES = {
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "SEMANTIC_SEGMENTATION": "AutoModelForSemanticSegmentation",
    "MASKED_IMAGE_MODELING": "AutoModelForMaskedImageModeling",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoVPTModel:
    """Loads an adapter together with the backbone that its config names, for whichever task it was trained."""

    task_type: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not made but loaded: use {type(self).__name__}.from_pretrained().")

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
        **model_kwargs: Any,
    ) -> VPTModel:
        """Loads backbone and adapter.

        Args:
            model_id: the adapter's folder, or its repository on the Hub.
            revision, subfolder: of the adapter; the backbone's revision is the one that the adapter was trained on.
            model_kwargs: for the backbone's ``from_pretrained``, such as ``dtype`` or ``device_map``. Only those here
                let it run code of its repository (``trust_remote_code=True``) or read pickled weights
                (``use_safetensors=False``): what an adapter names is not trusted.

        Raises:
            CheckpointError: no backbone is named or it cannot be loaded, the adapter is for another task, or it is
                damaged.
        """
        source: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        with hub.pulled(model_id, revision=revision, subfolder=subfolder, **source) as folder:
            with open_folder(folder) as saved:
                config = saved.config
            name = _check_names(cls.__name__, cls.task_type, config, model_id)
            model = _load_backbone(name, config, model_id, {**source, **model_kwargs})
            return VPTModel.from_pretrained(model, folder, adapter_name, is_trainable)


def _check_names(loader: str, task_type: str | None, config: PromptConfig, model_id: object) -> str:
    """The backbone's name; raises CheckpointError if there is none, or the adapter is for another task."""
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


def _load_backbone(name: str, config: PromptConfig, model_id: object, options: dict[str, Any]) -> Any:
    if not is_folder(name) and not is_repository(name):
        raise CheckpointError(
            f"The adapter '{model_id}' was trained on {shown(name)}, which is neither a folder here nor the name of a "
            "repository. Load its backbone yourself and use VPTModel.from_pretrained(model, ...)."
        )
    backbone_class = getattr(transformers, BACKBONE_CLASSES[str(config.task_type)])
    options = {"trust_remote_code": False, "use_safetensors": True, "revision": config.revision or "main", **options}
    try:
        model = backbone_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:  # what transformers makes of the client's errors
        raise CheckpointError(
            f"The backbone {shown(name)} of the adapter '{model_id}' cannot be loaded: {error}"
        ) from error
    if getattr(model.config, "_commit_hash", None) is None:
        model.config._commit_hash = as_commit(config)  # as older versions of transformers do
    return model


class AutoVPTModelForImageClassification(AutoVPTModel):
    """:class:`AutoVPTModel` for adapters that classify images."""

    task_type = "IMAGE_CLASSIFICATION"


class AutoVPTModelForSemanticSegmentation(AutoVPTModel):
    """:class:`AutoVPTModel` for adapters that segment images."""

    task_type = "SEMANTIC_SEGMENTATION"


class AutoVPTModelForMaskedImageModeling(AutoVPTModel):
    """:class:`AutoVPTModel` for adapters that reconstruct masked images."""

    task_type = "MASKED_IMAGE_MODELING"


class AutoVPTModelForFeatureExtraction(AutoVPTModel):
    """:class:`AutoVPTModel` for adapters of models without a head."""

    task_type = "FEATURE_EXTRACTION"
