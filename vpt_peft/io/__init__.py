"""Adapters to folders and back: strict, complete and atomic."""

from .atomic import atomic_write, lock_folder, pack_files
from .fingerprint import Fingerprint, take_fingerprint
from .folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_adapter,
    make_adapter,
    open_folder,
    pack_config,
    parse_config,
    reload_adapter,
    save_adapter,
)
from .state_dict import check_state_dict, gather_state_dict, load_state_dict, strip_compile_prefix
from .weights import PEFT_PREFIX, open_weights, pack_weights

__all__ = [
    "CONFIG_NAME",
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "Fingerprint",
    "atomic_write",
    "check_state_dict",
    "gather_state_dict",
    "load_adapter",
    "load_state_dict",
    "lock_folder",
    "make_adapter",
    "open_folder",
    "open_weights",
    "pack_config",
    "pack_files",
    "pack_weights",
    "parse_config",
    "reload_adapter",
    "save_adapter",
    "strip_compile_prefix",
    "take_fingerprint",
]
