"""Arguments of VPTModel's methods: what is accepted, and the error for what is not."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..config import PromptConfig
from ..errors import AdapterError, safe_repr, truncate_list

BASE = "__base__"
Dtype = TypeVar("Dtype")
MAX_LISTED = 20
MAX_NAME_BYTES = 255
NOT_PRINTED = ("Cc", "Cs", "Zl", "Zp")  # control characters, half surrogate pairs, separators of lines
RESERVED_NAMES = re.compile("con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)
HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Options of PEFT's and transformers' methods of the same name that make no difference to an adapter.
IGNORED = (
    "ephemeral_gpu_offload", "low_cpu_mem_usage", "max_shard_size", "save_embedding_layers", "save_original_format",
    "save_peft_format", "torch_device", "use_temp_dir",
)  # fmt: skip
# Other options of theirs, by what to do instead. The values in DEFAULTS, and None, are accepted.
REFUSED = {
    "It is an option of the backbone: pass it to the from_pretrained() that loads the backbone, or to "
    "AutoVPTModel.from_pretrained(), which loads both.": (
        "attn_implementation", "device_map", "ignore_mismatched_sizes", "max_memory", "offload_buffers", "offload_dir",
        "offload_folder", "offload_index", "offload_state_dict", "quantization_config", "trust_remote_code",
    ),
    "The adapter is loaded with its own labels.": ("id2label", "label2id", "num_labels", "problem_type"),
    "The config in the adapter's folder is used.": ("config",),
    "An adapter is loaded in float32, or in the precision given as dtype.": ("autocast_adapter_dtype",),
    "Adapters are read and written as safetensors only.": ("safe_serialization", "use_safetensors"),
    "The names of an adapter's tensors do not depend on the backbone.": (
        "key_mapping", "path_initial_model_for_weight_conversion",
    ),
    "Files that have changed on the Hub are downloaded again anyway; for all files, give a new cache_dir.": (
        "force_download",
    ),
    "Set the environment variable HTTPS_PROXY.": ("proxies",),
    "Use token.": ("use_auth_token",),
    "Call push_to_hub(repo_id).": ("push_to_hub",),
    "Give every variant a folder of its own.": ("variant",),
    "Write tags into the metadata of the model card (README.md), where they are kept when it is updated.": ("tags",),
}  # fmt: skip
DEFAULTS = {
    "autocast_adapter_dtype": True, "safe_serialization": True, "use_safetensors": True, "force_download": False,
    "ignore_mismatched_sizes": False, "offload_buffers": False, "offload_state_dict": False, "push_to_hub": False,
    "trust_remote_code": False,
}  # fmt: skip
PEFT_OPTIONS = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "torch_device")
_ADVICE = {name: advice for advice, names in REFUSED.items() for name in names}


def check_options(method: str, given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The known options among the given ones.

    Args:
        method: name of the method, for the error message.

    Raises:
        TypeError: there are others that make a difference.
    """
    for name, value in given.items():
        if name in known or name in IGNORED:
            continue
        if name not in _ADVICE:
            raise TypeError(f"{method}() takes no {name}. Its further options are {', '.join(sorted(known))}.")
        if value is not None and value is not DEFAULTS.get(name):
            raise TypeError(f"{method}() takes no {name}, got {safe_repr(value)}. {_ADVICE[name]}")
    return {name: value for name, value in given.items() if name in known}


def pop_peft_options(method: str, options: dict[str, Any]) -> None:
    """Removes options of PEFT's methods that make no difference, where others have another meaning.

    Raises:
        TypeError: one makes a difference.
    """
    check_options(method, {name: options.pop(name) for name in PEFT_OPTIONS if name in options}, ())


SHAPES = {
    4: "(num_images, num_channels, height, width)",
    3: "(num_images, num_patches, num_channels * patch_size * patch_size)",
    5: "(num_videos, num_frames, num_channels, height, width)",
}
PROCESSING = 'the image processor of the backbone: vpt(**processor(PIL.Image.open("image.jpg"), return_tensors="pt"))'
PROCESSING_VIDEOS = 'the video processor of the backbone: vpt(**processor("video.mp4", return_tensors="pt"))'


def find_pixel_values(backbone: Backbone, pixel_values: Any, pixel_values_videos: Any = None) -> Tensor:
    """The images or videos of a forward call, which as the first argument need not be called as in the backbone's.

    Raises:
        AdapterError: they have another format than the backbone takes, or the name of another's.
    """
    name = backbone.architecture.input_name
    if pixel_values_videos is not None and (pixel_values is not None or name != "pixel_values_videos"):
        both = "pixel_values and " if pixel_values is not None else ""
        raise AdapterError(
            f"{type(backbone.original).__name__} takes {name}, got {both}pixel_values_videos. Give {name} alone."
        )
    given: Any = pixel_values if pixel_values_videos is None else pixel_values_videos
    check_pixel_values(given, backbone.architecture.input_dims, name)
    return cast(Tensor, given)


def check_pixel_values(pixel_values: object, num_dims: int = 4, name: str = "pixel_values") -> None:
    """Raises AdapterError unless images or videos are in the format that processors return.

    Args:
        num_dims: number of dimensions that the backbone takes, 4 for images, 3 for patches, 5 for videos.
        name: of the argument.
    """
    if isinstance(pixel_values, Tensor):
        if pixel_values.ndim == num_dims and pixel_values.is_floating_point():
            return
        got = f"a tensor of {pixel_values.dtype} and shape {tuple(pixel_values.shape)}"
    elif isinstance(pixel_values, str | PathLike | None):
        got = safe_repr(pixel_values)
    else:
        got = f"a value of type {type(pixel_values).__name__}"
    raise AdapterError(
        f"{name} must be a floating-point tensor of shape {SHAPES[num_dims]}, got {got}. Use "
        f"{PROCESSING_VIDEOS if num_dims == 5 else PROCESSING}."
    )


def check_adapters_exist(adapters: Mapping[str, object], names: Sequence[object]) -> None:
    """Raises AdapterError for names of adapters that do not exist."""
    unknown = sorted(
        {
            name if isinstance(name, str) else safe_repr(name)
            for name in names
            if not isinstance(name, str) or name not in adapters
        }
    )
    if unknown:
        raise AdapterError(
            f"The model has the adapters {truncate_list(list(adapters), MAX_LISTED)}, got "
            f"{truncate_list(unknown, MAX_LISTED)}."
        )


def check_adapter_name(name: object) -> None:
    """Raises AdapterError unless a name can be an adapter's: part of keys, and the name of a folder on any system."""
    if not isinstance(name, str) or not name or name == BASE or any(character in name for character in "./\\"):
        raise AdapterError(
            f"An adapter's name must be a word without dots and slashes, not '{BASE}', got {safe_repr(name)}."
        )
    reason = ""
    if name in vars(nn.ModuleDict()):
        reason = "which torch uses itself"
    elif len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        reason = f"which is longer than {MAX_NAME_BYTES} bytes"
    elif any(unicodedata.category(character) in NOT_PRINTED or character in '<>:"|?*' for character in name):
        reason = "which contains characters that names of files must not contain on all systems"
    elif name != name.strip() or RESERVED_NAMES.fullmatch(name):
        reason = "which is no name of a folder on Windows"
    if reason:
        raise AdapterError(
            f"An adapter is saved in a folder of its name, got {safe_repr(name)}, {reason}. Choose another name."
        )


def check_names(names: object, argument: str = "selected_adapters") -> list[str]:
    """A list of adapters.

    Raises:
        AdapterError: it is a single name, or none.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise AdapterError(f"{argument} must be a list of names, got {safe_repr(names)}.")
    return list(names)


def single_name(adapter_name: Any) -> Any:
    """The adapter to activate, also from a list of one name, as in PEFT.

    Raises:
        AdapterError: the list has another length.
    """
    if not isinstance(adapter_name, list | tuple):
        return adapter_name
    if len(adapter_name) != 1:
        raise AdapterError(
            f"Exactly one adapter is active, got {safe_repr(adapter_name)}. For a batch with images of several tasks, "
            "call vpt(pixel_values, adapter_names=[...]) with a name for each image."
        )
    return str(adapter_name[0])


def single_dtype(dtype: Dtype | None, torch_dtype: Dtype | None) -> Dtype | None:
    """The precision given by either of two argument names.

    Raises:
        AdapterError: the two differ.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise AdapterError(
            f"dtype and its older name torch_dtype must agree, got {dtype} and {torch_dtype}. Give one of them."
        )
    return torch_dtype if dtype is None else dtype


def storage_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype | None:
    """The precision of an adapter's tensors, given by either of two argument names.

    Raises:
        AdapterError: it is none of ``DTYPES``, or the two differ.
    """
    asked = single_dtype(dtype, torch_dtype)
    if asked is not None and asked not in DTYPES:
        raise AdapterError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {asked!r}.")
    return asked


TO_HAVE_BOTH = (
    "To have both, train that first, merge it into the weights (merge_and_unload()) and save the result as a "
    "checkpoint; then train prompts on the checkpoint."
)


class ReadOnlyConfigs(dict[str, PromptConfig]):
    """The configs of a model's adapters, to which PEFT's functions would add those of their own."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(
            "The adapters of a VPTModel are made by vpt.add_adapter(name, PromptConfig(...)), and removed by "
            "vpt.delete_adapter(name), got a change of vpt.peft_config. A VPTModel takes no adapters of PEFT, such as "
            f"LoRA. {TO_HAVE_BOTH}"
        )

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # copies can be changed

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse
