"""VPTModel: the public class, composed of the folders below it."""

from .status import ModelStatus
from .vpt_model import VPTModel, get_adapter_state_dict, get_vpt_model, set_adapter_state_dict

__all__ = ["ModelStatus", "VPTModel", "get_adapter_state_dict", "get_vpt_model", "set_adapter_state_dict"]
