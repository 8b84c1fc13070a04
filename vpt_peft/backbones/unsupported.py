"""Why a model cannot be prompted, and what to use in its place."""

from __future__ import annotations

import difflib
from itertools import chain
from operator import attrgetter

from torch import nn

from .architecture import ARCHITECTURES

# {reason: families, by model_type, and classes}
REFUSED: dict[str, tuple[str, ...]] = {
    "a convolution over the image makes its keys and values, and prompts have no place in the image": (
        "cvt", "glpn", "pvt", "pvt_v2", "segformer",
    ),
    "it has no attention to tokens: focal modulation, pooling or convolutions mix its tokens": (
        "bit", "convnext", "convnextv2", "dinov3_convnext", "efficientnet", "focalnet", "hgnet_v2", "mobilenet_v1",
        "mobilenet_v2", "poolformer", "regnet", "resnet", "textnet",
    ),
    "its attention sums all tokens up in one vector, and has no softmax over keys that prompts could join": (
        "mobilevitv2", "swiftformer",
    ),
    "it attends among the pixels at one place in each patch, and not among patches": ("mobilevit",),
    "its attention has batch norms in place of a layer norm and a bias for each pair of patches, and calls no "
    "attention function of transformers": ("levit",),
    "each patch attends only to its neighbours in the image, and prompts have no place there": ("dinat",),
    "it packs the patches of all images into one sequence, so that prompts would have to be inserted for each image": (
        "glm4v_vision", "paddleocr_vl_vision", "pixtral", "qwen2_5_vl_vision", "qwen2_vl_vision", "qwen3_vl_vision",
        "video_llama_3_vision",
    ),
    "its layers take maps of rows and columns, and not sequences of tokens": (
        "sam2_vision_model", "sam_hq_vision_model", "sam_vision_model", "vitdet",
    ),
    "it hides patches at random, also outside of training": ("ViTMAEForPreTraining", "ViTMAEModel"),
}  # fmt: skip
SIMILARITY = 0.6  # of names, from 0 to 1


def find_reason(model: nn.Module, model_type: str | None) -> str | None:
    """Why a family or a class cannot be prompted; None: nothing is known of it."""
    names = {model_type, *(cls.__name__ for cls in type(model).__mro__)}
    return next((reason for reason, refused in REFUSED.items() if names & set(refused)), None)


def nearest_class(model: nn.Module, model_type: str | None) -> tuple[str | None, bool]:
    """The supported class that is nearest to a model's, and whether it loads the same checkpoints.

    It is one of the same family, without a head if there is such a one, or else, for a model of images, one of a
    similar name; None: there is none.
    """
    name = type(model).__name__
    family = dict(chain(*(architecture.heads.items() for architecture in ARCHITECTURES.get(model_type or "", ()))))
    if family:
        headless = [other for other, head in family.items() if head.task_type == "FEATURE_EXTRACTION"]
        return difflib.get_close_matches(name, headless or [*family], n=1, cutoff=0)[0], True
    if not str(getattr(model, "main_input_name", "")).startswith("pixel_values"):
        return None, False
    known = [other for architecture in chain(*ARCHITECTURES.values()) for other in architecture.heads]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=SIMILARITY)), None), False


def explain(model: nn.Module, model_type: str | None) -> str:
    """The error message for a model that no declaration fits."""
    name, reason = type(model).__name__, find_reason(model, model_type)
    if type(model).__module__.startswith("timm."):
        return (
            f"Expected a model of transformers, got timm's {name} itself. Load its checkpoint by "
            'AutoModelForImageClassification.from_pretrained("timm/..."), or put its name and arguments into '
            "TimmWrapperForImageClassification(TimmWrapperConfig(architecture=..., model_args={...})), and its weights "
            "into the timm_model of that."
        )
    wrapped = {one.wrapped[1]: one.wrapped[0] for one in ARCHITECTURES.get(model_type or "", ()) if one.wrapped}
    if wrapped:
        inner = attrgetter(min(wrapped.values()))(model)
        return (
            f"{name} is supported with a model of class {' or '.join(sorted(wrapped))} inside, got "
            f"{type(inner).__name__}. Others can be declared with vpt_peft.register_architecture."
        )
    nearest, loads_checkpoint = nearest_class(model, model_type)
    if reason is not None:
        advice = f"Load the checkpoint into {nearest}" if loads_checkpoint else "Use another family, such as DINOv2"
        return f"A {name} cannot be prompted: {reason}. {advice}."
    advice = f" The nearest supported class is {nearest}" if nearest else ""
    advice += ", which loads the same checkpoints." if loads_checkpoint else "." if nearest else ""
    return (
        f"Expected a model of a supported class, such as ViTModel, got {name}.{advice} docs/families.md lists all. "
        "Others can be declared with vpt_peft.register_architecture, and vpt_peft.check_architecture checks the "
        "declaration (see CONTRIBUTING.md)."
    )
