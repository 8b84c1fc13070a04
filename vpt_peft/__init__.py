"""Visual Prompt Tuning for the vision transformers of ``transformers``.

Public names are imported when they are used: ``import vpt_peft`` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .auto import (
        AutoVPTModel,
        AutoVPTModelForDepthEstimation,
        AutoVPTModelForFeatureExtraction,
        AutoVPTModelForImageClassification,
        AutoVPTModelForKeypointDetection,
        AutoVPTModelForMaskedImageModeling,
        AutoVPTModelForObjectDetection,
        AutoVPTModelForSemanticSegmentation,
        AutoVPTModelForVideoClassification,
        AutoVPTModelForZeroShotImageClassification,
    )
    from .backbones import Architecture, Head, register_architecture
    from .check import ArchitectureReport, check_architecture
    from .config import PromptConfig
    from .deploy import export
    from .errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        ImageError,
        RouteError,
        UnsupportedModelError,
        VPTError,
    )
    from .explanation import Explanation, LayerAttention, draw_explanation, explain, explain_attention
    from .model import VPTModel, get_adapter_state_dict, get_vpt_model, set_adapter_state_dict
    from .pipelines import pipeline
    from .training import PushAdapter, adamw, parameter_groups

__all__ = [
    "AdapterError",
    "Architecture",
    "ArchitectureReport",
    "AutoVPTModel",
    "AutoVPTModelForDepthEstimation",
    "AutoVPTModelForFeatureExtraction",
    "AutoVPTModelForImageClassification",
    "AutoVPTModelForKeypointDetection",
    "AutoVPTModelForMaskedImageModeling",
    "AutoVPTModelForObjectDetection",
    "AutoVPTModelForSemanticSegmentation",
    "AutoVPTModelForVideoClassification",
    "AutoVPTModelForZeroShotImageClassification",
    "CheckpointError",
    "ConfigError",
    "Explanation",
    "Head",
    "ImageError",
    "LayerAttention",
    "PromptConfig",
    "PushAdapter",
    "RouteError",
    "UnsupportedModelError",
    "VPTError",
    "VPTModel",
    "__version__",
    "adamw",
    "check_architecture",
    "draw_explanation",
    "explain",
    "explain_attention",
    "export",
    "get_adapter_state_dict",
    "get_vpt_model",
    "parameter_groups",
    "pipeline",
    "register_architecture",
    "set_adapter_state_dict",
]

_MODULES = {
    "auto": (
        "AutoVPTModel", "AutoVPTModelForDepthEstimation", "AutoVPTModelForFeatureExtraction",
        "AutoVPTModelForImageClassification", "AutoVPTModelForKeypointDetection", "AutoVPTModelForMaskedImageModeling",
        "AutoVPTModelForObjectDetection", "AutoVPTModelForSemanticSegmentation", "AutoVPTModelForVideoClassification",
        "AutoVPTModelForZeroShotImageClassification",
    ),
    "backbones": ("Architecture", "Head", "register_architecture"),
    "check": ("ArchitectureReport", "check_architecture"),
    "config": ("PromptConfig",),
    "deploy": ("export",),
    "errors": (
        "AdapterError", "CheckpointError", "ConfigError", "ImageError", "RouteError", "UnsupportedModelError",
        "VPTError",
    ),
    "explanation": ("Explanation", "LayerAttention", "draw_explanation", "explain", "explain_attention"),
    "model": ("VPTModel", "get_adapter_state_dict", "get_vpt_model", "set_adapter_state_dict"),
    "pipelines": ("pipeline",),
    "training": ("PushAdapter", "adamw", "parameter_groups"),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if find_spec(f"{__name__}.{name}") is not None:  # a submodule, such as vpt_peft.convert
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
