"""VPTModel: the public class, composed of the folders below it."""

from .arguments import pop_peft_options, single_dtype
from .saving import check_repository
from .status import ModelStatus
from .vpt_model import VPTModel, get_adapter_state_dict, get_vpt_model, set_adapter_state_dict

__all__ = [
    "ModelStatus",
    "VPTModel",
    "check_repository",
    "get_adapter_state_dict",
    "get_vpt_model",
    "pop_peft_options",
    "set_adapter_state_dict",
    "single_dtype",
]
