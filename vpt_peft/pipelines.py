"""Inference in two lines: the pipelines of transformers, with an adapter, its backbone and its image processor."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch.nn.functional import interpolate
from transformers.backbone_utils import BackboneMixin

from . import hub
from .auto import AutoVPTModel
from .errors import AdapterError, CheckpointError, safe_repr
from .images.positions import interpolation
from .images.processors import backbone_revision, load_processor, saved_processor
from .io import open_folder
from .model import VPTModel
from .model.modes import eval_mode

WITH_LABELS = ("image-classification", "image-segmentation", "object-detection")  # they answer with an adapter's own


class AdapterPipeline(transformers.Pipeline):
    """A pipeline whose model is a :class:`~vpt_peft.VPTModel`: what differs from the pipelines of transformers.

    It answers with the adapter that is active at the time of the call.
    """

    model: VPTModel

    def check_model_type(self, supported_models: Any) -> None:
        """Does nothing: transformers' lists of models lack VPTModel, and :func:`pipeline` checks the adapter's task."""

    def forward(self, model_inputs: Any, **forward_params: Any) -> Any:
        """Runs the model in eval mode, and leaves it in the mode it was in.

        Position embeddings are interpolated for images of another size than the backbone's, as they were in training.
        """
        model_inputs |= interpolation(self.model, tuple(model_inputs["pixel_values"].shape[-2:]))
        with eval_mode(self.model):
            return super().forward(model_inputs, **forward_params)  # type: ignore[no-untyped-call]


class ImageClassificationPipeline(AdapterPipeline, transformers.ImageClassificationPipeline):
    """``pipe("rose.jpg", top_k=5)`` gives ``[{"label": "rose", "score": 0.98}, ...]``."""

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, function_to_apply: Any = None, **options: Any
    ) -> Any:
        """Probabilities; of regression the values, also in versions of transformers that take their softmax."""
        if function_to_apply is None and self.model.config.problem_type == "regression":
            function_to_apply = "none"
        return super().postprocess(model_outputs, function_to_apply, **options)  # type: ignore[no-untyped-call]


class ImageFeatureExtractionPipeline(AdapterPipeline, transformers.ImageFeatureExtractionPipeline):
    """``pipe("rose.jpg", return_tensors=True)`` gives a tensor ``(1, number of tokens, width)``."""


class ZeroShotImageClassificationPipeline(AdapterPipeline, transformers.ZeroShotImageClassificationPipeline):
    """``pipe("rose.jpg", candidate_labels=["rose", "daisy"])`` gives ``[{"label": "rose", "score": 0.98}, ...]``."""


class ObjectDetectionPipeline(AdapterPipeline, transformers.ObjectDetectionPipeline):
    """``pipe("street.jpg")`` gives ``[{"label": "car", "score": 0.98, "box": {"xmin": 40, ...}}, ...]``."""


class DepthEstimationPipeline(AdapterPipeline, transformers.DepthEstimationPipeline):
    """``pipe("room.jpg")`` gives ``{"predicted_depth": tensor (height, width), "depth": PIL image}``."""


class ImageSegmentationPipeline(AdapterPipeline, transformers.ImageSegmentationPipeline):
    """``pipe("room.jpg")`` gives ``[{"label": "wall", "score": None, "mask": PIL image of 0 and 255}, ...]``."""

    def postprocess(self, model_outputs: Any, **options: Any) -> Any:  # type: ignore[override]
        """Masks by label, also with image processors that cannot make them, such as ViT's."""
        is_semantic = options.get("subtask") in (None, "semantic")
        if not is_semantic or hasattr(self.image_processor, "post_process_semantic_segmentation"):
            return super().postprocess(model_outputs, **options)  # type: ignore[no-untyped-call]
        from PIL import Image  # here, since only pipelines need it

        size = tuple(model_outputs["target_size"][0])
        labels = interpolate(model_outputs["logits"].float(), size, mode="bilinear").argmax(1)[0]
        return [
            {
                "score": None,
                "label": self.model.config.id2label[label],
                "mask": Image.fromarray((labels == label).mul(255).to(torch.uint8).numpy()),
            }
            for label in labels.unique().tolist()
        ]


PIPELINES: dict[str, type[Any]] = {
    "depth-estimation": DepthEstimationPipeline,
    "image-classification": ImageClassificationPipeline,
    "image-feature-extraction": ImageFeatureExtractionPipeline,
    "image-segmentation": ImageSegmentationPipeline,
    "object-detection": ObjectDetectionPipeline,
    "zero-shot-image-classification": ZeroShotImageClassificationPipeline,
}


def pipeline(
    adapter: str | os.PathLike[str] | VPTModel,
    task: str | None = None,
    *,
    image_processor: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: str | torch.dtype | None = None,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The pipeline of ``transformers`` for the task of an adapter: ``pipeline("me/flowers-vpt")("rose.jpg")``.

    Args:
        adapter: folder or Hub repository of an adapter, which is loaded with its backbone; or a model, of which the
            active adapter is used.
        task: None: the adapter's; any other is an error.
        image_processor: an image processor, or its folder or repository. None: the one that is saved with the adapter,
            else the backbone's. With a model it must be given. For segmentation, one that crops the center resizes the
            whole image instead, so that masks cover it.
        tokenizer: for dual encoders; None: the backbone's.
        revision, subfolder: of the adapter, as for :meth:`AutoVPTModel.from_pretrained`.
        token, cache_dir, local_files_only: as in ``huggingface_hub``.
        dtype: precision of the backbone, as for :meth:`AutoVPTModel.from_pretrained`.
        device: None: the first accelerator, else the CPU, as in ``transformers``.
        device_map: as in ``transformers``; not together with ``device``.
        model_kwargs: further options of :meth:`AutoVPTModel.from_pretrained`.
        kwargs: of the pipeline, such as ``batch_size`` or ``top_k``.

    Returns:
        An :class:`AdapterPipeline`, which is a pipeline of ``transformers``: ``pipe(images, batch_size=8)``, where an
        image is a path, a URL or a PIL image.

    Raises:
        AdapterError: there is no pipeline for the adapter, or none for that task, or the adapter has no labels.
        CheckpointError: the adapter, its backbone or a processor cannot be loaded.
    """
    source: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    options = {"dtype": dtype, "device_map": device_map, **(model_kwargs or {})}
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(adapter, VPTModel):
        _check_loaded_model(image_processor, {"revision": revision, "subfolder": subfolder, **options})
        vpt, task = adapter, _find_task(adapter.active_config.task_type, adapter.config.num_labels, task, "adapter")
    else:
        _check_name(adapter)
        with_processor = image_processor is None
        where = {"revision": revision, "subfolder": subfolder, "with_processor": with_processor, **source}
        with hub.pulled(adapter, **where) as pulled:
            with open_folder(pulled) as saved:
                folder, name = saved.weights.path.parent, f"adapter '{adapter}'"
                task = _find_task(saved.config.task_type, len(saved.labels["id2label"]), task, name)
            vpt = AutoVPTModel.from_pretrained(folder, **source, **options)
        if with_processor:
            image_processor = saved_processor(folder)
    if isinstance(vpt.get_base_model(), BackboneMixin):
        raise AdapterError(
            f"'{task}' gives one tensor of features, but {type(vpt.get_base_model()).__name__} has feature maps of "
            "several layers. Call the model itself: AutoVPTModel.from_pretrained(...)(pixel_values).feature_maps."
        )
    if isinstance(image_processor, str | os.PathLike | None):
        image_processor = load_processor(vpt, image_processor, **source)
    if task == "image-segmentation" and getattr(image_processor, "do_center_crop", False):
        image_processor = _without_crop(image_processor)
    if PIPELINES[task]._load_tokenizer and isinstance(tokenizer, str | os.PathLike | None):
        tokenizer = _load_tokenizer(vpt, tokenizer, source)
    return PIPELINES[task](
        model=vpt, task=task, image_processor=image_processor, tokenizer=tokenizer, device=device, **kwargs
    )


def _check_name(adapter: object) -> None:
    """Raises AdapterError for what cannot be the folder or the repository of an adapter."""
    if not isinstance(adapter, str | os.PathLike):
        raise AdapterError(
            f"Expected the folder or the repository of an adapter, or a VPTModel, got {type(adapter).__name__}."
        )
    if adapter in PIPELINES and not hub.is_folder(adapter):
        raise AdapterError(
            f"Expected the folder or the repository of an adapter, got the task '{adapter}'. The task is the "
            'adapter\'s own: pipeline("me/my-task").'
        )


def _check_loaded_model(image_processor: object, options: Mapping[str, Any]) -> None:
    """Raises AdapterError for options of loading, and without an image processor."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise AdapterError(
            f"Options for loading an adapter must be left out with a VPTModel, which is loaded, got {', '.join(given)}."
        )
    if image_processor is None:
        raise AdapterError(
            "image_processor must be given with a VPTModel, got None. Pass the one that the adapter was trained with, "
            "or the folder or repository that contains it."
        )


def _find_task(task_type: str | None, num_labels: int, task: str | None, adapter: str) -> str:
    """The pipeline for the task of an adapter.

    Raises:
        AdapterError: there is none, or it is not ``task``, or the adapter has no labels.
    """
    own = hub.PIPELINES.get(str(task_type))
    if own not in PIPELINES:
        raise AdapterError(
            f"Expected an adapter for {', '.join(sorted(PIPELINES))}, got the {adapter} for {task_type}, for which "
            "there is no pipeline. Load it by AutoVPTModel.from_pretrained(...); its model card has code to run it."
        )
    if task not in (None, own):
        raise AdapterError(
            f"Expected the task of the {adapter}, '{own}', got {safe_repr(task)}. Leave task out, or load another "
            "adapter."
        )
    if own in WITH_LABELS and num_labels == 0:
        raise AdapterError(
            f"Expected an adapter with labels, got the {adapter} with num_labels=0. Load it by "
            "AutoVPTModel.from_pretrained(...) for what its model computes without a classifier."
        )
    return own


def _load_tokenizer(vpt: VPTModel, name: str | os.PathLike[str] | None, source: dict[str, Any]) -> Any:
    """The tokenizer in a folder or repository; None: the backbone's."""
    revision = backbone_revision(vpt) if name is None else None
    name = vpt.name_or_path if name is None else os.fspath(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, **source)
    except (OSError, ValueError) as error:  # transformers turns the Hub client's errors into these
        raise CheckpointError(
            "Pass tokenizer=..., an object, a folder or a repository. None can be loaded from "
            f"{safe_repr(name)}: {error}"
        ) from error


def _without_crop(image_processor: Any) -> Any:
    """An image processor that resizes the whole image to the size that it would crop."""
    image_processor = copy.copy(image_processor)
    image_processor.do_center_crop, image_processor.size = False, image_processor.crop_size
    return image_processor
