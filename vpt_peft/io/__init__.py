"""Adapters to folders and back: strict, complete and atomic."""

from .atomic import atomic_write, lock_folder, save_atomically
from .folder import CONFIG_NAME, WEIGHTS_NAME, load_adapter, open_folder, reload_adapter, save_adapter
from .state_dict import check_state_dict, gather_state_dict, load_state_dict, strip_compile_prefix
from .weights import open_weights, pack_weights

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "atomic_write",
    "check_state_dict",
    "gather_state_dict",
    "load_adapter",
    "load_state_dict",
    "lock_folder",
    "open_folder",
    "open_weights",
    "pack_weights",
    "reload_adapter",
    "save_adapter",
    "save_atomically",
    "strip_compile_prefix",
]
