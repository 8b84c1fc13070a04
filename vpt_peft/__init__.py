"""Visual Prompt Tuning for the vision transformers of ``transformers``."""

from .architectures import Architecture, Head, register_architecture
from .auto import (
    AutoVPTModel,
    AutoVPTModelForFeatureExtraction,
    AutoVPTModelForImageClassification,
    AutoVPTModelForMaskedImageModeling,
    AutoVPTModelForSemanticSegmentation,
)
from .config import PromptConfig
from .errors import AdapterError, CheckpointError, ConfigError, RouteError, UnsupportedModelError, VPTError
from .model import VPTModel, get_adapter_state_dict, get_vpt_model, set_adapter_state_dict
from .trainer import PushAdapter, adamw, parameter_groups
from .version import __version__

__all__ = [
    "AdapterError",
    "Architecture",
    "AutoVPTModel",
    "AutoVPTModelForFeatureExtraction",
    "AutoVPTModelForImageClassification",
    "AutoVPTModelForMaskedImageModeling",
    "AutoVPTModelForSemanticSegmentation",
    "CheckpointError",
    "ConfigError",
    "Head",
    "PromptConfig",
    "PushAdapter",
    "RouteError",
    "UnsupportedModelError",
    "VPTError",
    "VPTModel",
    "__version__",
    "adamw",
    "get_adapter_state_dict",
    "get_vpt_model",
    "parameter_groups",
    "register_architecture",
    "set_adapter_state_dict",
]
