"""The device and the precision to compute in, and what transformers may print."""

from __future__ import annotations

import torch
import transformers

from .errors import RecipeError


def choose_device(name: str) -> torch.device:
    """The device of an option: "auto", or a device of this machine, as torch names it.

    Raises:
        RecipeError: this machine has no such device.
    """
    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return own or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device must be auto, cpu or an accelerator such as cuda, got {name}.") from error
    if device.type != "cpu" and (own is None or device.type != own.type):
        found = f"cpu and {own.type}" if own else "cpu only"
        raise RecipeError(f"--device {name} is not available: torch {torch.__version__} finds {found} here.")
    number = torch.accelerator.device_count() if device.type != "cpu" else 1
    if device.index is not None and device.index >= number:
        raise RecipeError(f"--device {name} is not available: this machine has {number}, counted from 0.")
    return device


def choose_first_device(name: str) -> torch.device:
    """As :func:`choose_device`, for what runs in Trainer, which always takes the first device of its type."""
    device = choose_device(name)
    if ":" in name:
        raise RecipeError(
            f"--device must be without a number, got {name}. Choose one of several GPUs by CUDA_VISIBLE_DEVICES="
            f"{device.index}."
        )
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision of an option: "auto" is "bf16" on accelerators that compute in it, and "fp32" elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "xpu" else "fp32"


def silence_transformers() -> None:
    """Disables transformers' progress bars and messages, such as those about a newly initialised head."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
