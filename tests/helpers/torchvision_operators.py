"""Lets torchvision be imported beside a build of torch for another device, as a CPU build beside the index's wheel."""

from __future__ import annotations

import importlib.util

import torch

NAMES = ("nms", "qnms")  # of object detection; torchvision registers more for them even if its binary cannot be loaded
DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def declare_missing_operators() -> None:
    """Declares the operators, without any code, that importing torchvision needs and its binary would bring."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in NAMES:
            DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
