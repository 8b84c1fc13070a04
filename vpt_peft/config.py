"""PromptConfig: the hyperparameters of a VPT adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ConfigError, safe_repr

TASK_TYPES = (
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "MASKED_IMAGE_MODELING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION", "KEYPOINT_DETECTION",
    "FEATURE_EXTRACTION",
)  # fmt: skip
CLASSIFICATION_TASKS = ("IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION")  # one row of logits for each input
# tasks with outputs for places in the image
SPATIAL_TASKS = ("SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION", "KEYPOINT_DETECTION")

# choices of pooling for a classifier that is added
ADDED_POOLINGS = ("class", "class_and_image", "pooled")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "kind": ("token", "prefix"),
    "init": ("uniform", "normal"),
    "pooling": ("default", "image", "prompt", "global", *ADDED_POOLINGS),
    "location": ("prepend", "add", "add-shared", "pixel", "border", "channel"),
    "bias": ("none", "all"),
    "route": ("auto", "tokens", "key_value"),
    "task_type": (None, *TASK_TYPES),
    "peft_type": ("VPT",),
}
ADDED = ("add", "add-shared")  # locations whose prompts are added to tokens
IN_IMAGE = ("border", "channel")  # locations whose prompts are part of the image
# {location or kind: (options with the only value that makes sense there, the reason)}
_FIXED: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": (
        {"deep": True, "route": "auto", "location": "prepend"},
        "its keys and values belong to the attention of one layer, and do not flow on to the next",
    ),
    **dict.fromkeys(ADDED, (
        {"carry": True, "projection_dim": None, "route": "auto"}, "its prompts are added to tokens and are none",
    )),
    "pixel": ({"projection_dim": None}, "its prompts are projected by the patch embedding"),
    **dict.fromkeys(IN_IMAGE, (
        {
            "deep": False, "layers_to_transform": None, "carry": True, "shared": False, "projection_dim": None,
            "route": "auto",
        },
        "its prompts are part of the image and not of a layer",
    )),
}  # fmt: skip


@dataclass(frozen=True)
class PromptConfig:
    """Configuration of a VPT adapter (Jia et al., Visual Prompt Tuning, ECCV 2022), validated when it is created.

    Args:
        num_tokens: prompt length p. 0 means no prompts: linear probing, or BitFit with ``bias="all"``.
        kind: ``"token"``: prompts are tokens, as in the paper. ``"prefix"``: keys and values of each layer's attention,
            learned directly and attended to apart from the image; values start at zero, so that training starts from
            the pretrained model.
        deep: fresh prompts at every layer (VPT-Deep); ``False``: at layer 0 only (VPT-Shallow).
        layers_to_transform: indices of the layers with fresh prompts, from 0 (Swin's blocks are numbered across
            stages); ``None``: all layers if ``deep``, else layer 0.
        carry: the outputs of a layer's prompts are inputs of the next layer unless that has fresh prompts;
            ``False``: they are discarded.
        shared: all those layers use the same prompts.
        projection_dim: learn prompts of this width and project them to the backbone's width with a linear layer, one
            for each width of the backbone.
        dropout: dropout probability of prompt elements during training, sampled per image.
        init: initial distribution of the prompts: ``"uniform"``, as in the paper (a border: from 0 to 1, before it is
            normalised), or ``"normal"`` with standard deviation 0.02.
        pooling: input of the classifier: ``"default"`` (the backbone's own), or the mean over ``"image"`` tokens,
            ``"prompt"`` tokens, or both (``"global"``), without ``[CLS]``. For models without a classifier, to which
            one is added (``task_type="IMAGE_CLASSIFICATION"``, for models of videos ``"VIDEO_CLASSIFICATION"``), also
            ``"class"`` (``[CLS]``), ``"class_and_image"`` (both joined), or ``"pooled"`` (the model's pooled output).
        location: where prompts enter, as in the paper's ablation. ``"prepend"``: as tokens of the sequence;
            ``"pixel"``: likewise, but learned as patches of pixels, which the frozen patch embedding projects;
            ``"add"``: a vector for each token, prefix tokens included, is added to the input of a layer;
            ``"add-shared"``: one vector for all tokens (for both, ``num_tokens`` does not matter unless it is 0);
            ``"border"``: ``num_tokens`` pixels at each side of the image, which must be smaller than the backbone's
            by twice as many; ``"channel"``: ``num_tokens`` further channels of the image, and the patch embedding
            trains too. The last two need ``deep=False``.
        bias: ``"all"`` also trains and saves a copy of the backbone's biases (BitFit).
        modules_to_save: names of further modules to copy, train and save; the head always is.
        route: how prompts are computed. ``"auto"``: as keys and values only, wherever that is exact.
        base_model_name_or_path, revision, task_type, inference_mode, peft_type: as in PEFT's adapter_config.json.
        num_virtual_tokens: PEFT's name of ``num_tokens``; the config does not keep it.

    Raises:
        ConfigError: a value is out of range, of the wrong type, or contradicts another one.
    """

    num_tokens: int = 10
    kind: str = "token"
    deep: bool = True
    layers_to_transform: tuple[int, ...] | None = None
    carry: bool = True
    shared: bool = False
    projection_dim: int | None = None
    dropout: float = 0.0
    init: str = "uniform"
    pooling: str = "default"
    location: str = "prepend"
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    route: str = "auto"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    peft_type: str = "VPT"
    num_virtual_tokens: InitVar[int | None] = field(default=None, kw_only=True)

    def __post_init__(self, num_virtual_tokens: int | None) -> None:
        if num_virtual_tokens is not None:
            if self.num_tokens not in (num_virtual_tokens, type(self).num_tokens):
                raise ConfigError(
                    f"num_tokens and PEFT's name for it, num_virtual_tokens, must agree, got {self.num_tokens} and "
                    f"{safe_repr(num_virtual_tokens)}. Give one of them."
                )
            self._freeze("num_tokens", num_virtual_tokens)
        _check_integer("num_tokens", self.num_tokens, minimum=0)
        for name in ("deep", "carry", "shared", "inference_mode"):
            _check(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        if self.projection_dim is not None:
            _check_integer("projection_dim", self.projection_dim, minimum=1)
        self._freeze("dropout", _probability(self.dropout))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _check(value is None or isinstance(value, str), name, _one_of(choices), value)
            _check(value in choices, name, _one_of(choices), value)
        for name in ("base_model_name_or_path", "revision"):
            _check(isinstance(getattr(self, name), str | None), name, "a string or None", getattr(self, name))
            check_unicode(name, getattr(self, name) or "")
        self._freeze("layers_to_transform", _layers(self.layers_to_transform))
        self._freeze("modules_to_save", _module_names(self.modules_to_save))
        self._check_together()

    def _check_together(self) -> None:
        if not self.deep and self.layers_to_transform not in (None, (0,)):
            raise ConfigError(
                f"deep=False uses fresh prompts in layer 0 only, got layers_to_transform="
                f"{list(self.layers_to_transform or ())}. Keep deep=True to choose layers."
            )
        if self.num_tokens == 0 and self.pooling in ("prompt", "global"):
            raise ConfigError(f'pooling="{self.pooling}" reads prompts, got num_tokens=0. Use at least 1 token.')
        for option in ("kind", "location"):
            value = getattr(self, option)
            fixed, reason = _FIXED.get(value, ({}, ""))
            for name, only in fixed.items():
                if getattr(self, name) != only:
                    raise ConfigError(
                        f'{option}="{value}" needs {name}={only!r}, got {getattr(self, name)!r}: {reason}.'
                    )
            if value in ("prefix", *ADDED, *IN_IMAGE) and self.pooling in ("prompt", "global"):
                raise ConfigError(
                    f'pooling="{self.pooling}" reads outputs of prompts, which {option}="{value}" does not have. '
                    'Use pooling="default" or "image".'
                )

    def _freeze(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen: fields are normalised only in __post_init__

    def replace(self, **changes: Any) -> PromptConfig:
        """A validated copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptConfig:
        """The inverse of :meth:`to_dict`; one error names all unknown fields."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"PromptConfig has no field {', '.join(unknown)[:500]}. Known fields: {', '.join(known)}. "
                "The adapter may come from a newer vpt-peft: update, or remove the field."
            )
        return cls(**values)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"A PromptConfig has no attribute {name!r}. {_NOT_OF_PEFT}")


class FrozenConfigError(ConfigError, dataclasses.FrozenInstanceError):
    """An attribute of a config was assigned or deleted."""


def _refuse_change(config: PromptConfig, name: str, *value: Any) -> NoReturn:
    raise FrozenConfigError(
        f"A PromptConfig cannot be changed, got a change of {name}. Use config.replace({name}=...). {_NOT_OF_PEFT}"
    )


_NOT_OF_PEFT = (
    "It is used with vpt_peft.get_vpt_model(model, config), and not with functions of PEFT, such as get_peft_model, "
    "which take a vpt_peft.peft.VPTConfig."
)
PromptConfig.__setattr__ = PromptConfig.__delattr__ = _refuse_change  # type: ignore[method-assign,assignment]


def check_unicode(name: str, value: str) -> None:
    """Raises ConfigError for half a surrogate pair, which JSON may contain, but no other file."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} must be valid Unicode, got {safe_repr(value)}: {error.reason}.") from error


def _check(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {safe_repr(value)}.")


def _check_integer(name: str, value: Any, minimum: int) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    _check(is_integer, name, "an integer", value)
    _check(value >= minimum, name, f"at least {minimum}", value)


def _one_of(choices: tuple[str | None, ...]) -> str:
    return "one of " + ", ".join(repr(choice) for choice in choices)


def _probability(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _check(is_number and 0 <= value < 1, "dropout", "a number from 0 to below 1", value)
    return float(value)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    expected = "None or a list of different layer numbers, counted from 0"
    layers = [value] if isinstance(value, int) else value
    _check(isinstance(layers, list | tuple | range) and len(layers) > 0, "layers_to_transform", expected, value)
    for layer in layers:
        _check(
            isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0,
            "layers_to_transform", expected, value,
        )  # fmt: skip
    _check(len(set(layers)) == len(layers), "layers_to_transform", expected, value)
    return tuple(sorted(layers))


def _module_names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    is_names = isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value)
    _check(is_names, "modules_to_save", "None or a list of module names", value)
    _check(len(set(value)) == len(value), "modules_to_save", "a list of different module names", value)
    check_unicode("modules_to_save", "".join(value))
    return tuple(value) or None
