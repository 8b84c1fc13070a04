"""Backbone and Layer: the declared parts of a live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ..errors import RouteError, UnsupportedModelError, safe_repr, truncate_list
from .architecture import ARCHITECTURES, Architecture, Head
from .unsupported import explain

MAX_LISTED = 5
IN_ATTENTION = (
    "q_proj", "k_proj", "v_proj", "qkv", "o_proj", "q_bias", "v_bias", "q_norm", "k_norm", "logit_scale", "caller",
)  # fmt: skip
OPTIONAL = ("attention_scale", "mlp_scale", "q_bias", "v_bias", "q_norm", "k_norm")  # their attributes may be None


class Layer:
    """One layer of a live backbone. Its parts are looked up at each use, so that replaced modules are found.

    Args:
        index: number of the layer, from 0.
        module: the layer.
        architecture: its declaration.
        stage: the stage that it is part of; where there are none, the layer itself.
    """

    def __init__(self, index: int, module: nn.Module, architecture: Architecture, stage: nn.Module) -> None:
        self.index = index
        self.module = module
        self.stage = stage
        self.architecture = architecture
        declared = {name: getattr(architecture, name) for name in ("norm", "attention", "mlp_norm", *OPTIONAL[:2])}
        skipped = ("q_proj", "k_proj", "v_proj") if architecture.qkv else ("qkv",)
        for name in IN_ATTENTION:
            path = None if name in skipped else getattr(architecture, name)
            declared[name] = f"{architecture.attention}.{path}" if path else None
        declared["caller"] = declared["caller"] or architecture.attention
        mlp = architecture.mlp
        declared |= {"mlp": mlp} if isinstance(mlp, str) else {f"mlp {index}": path for index, path in enumerate(mlp)}
        self.paths: dict[str, str] = {name: path for name, path in declared.items() if path}
        self._attributes = {name: tuple(path.split(".")) for name, path in self.paths.items()}
        self._mlp = [name for name in self.paths if name == "mlp" or name.startswith("mlp ")]

    def part(self, name: str) -> Any:
        """The module or parameter declared as ``name``; None where nothing is declared."""
        attributes = self._attributes.get(name)
        if attributes is None:
            return None
        module: Any = self.module
        for attribute in attributes:
            child = module._modules.get(attribute)  # much faster than getattr
            module = getattr(module, attribute) if child is None else child
        return module

    @property
    def width(self) -> int:
        """Width of the tokens that enter it, and of its prompts."""
        return int(self.part("norm").weight.shape[0])

    @property
    def output_width(self) -> int:
        """Width of the tokens that leave it."""
        return int(self.part("mlp_norm").weight.shape[0])

    @property
    def key_width(self) -> int:
        """Width of the keys and values of all heads, ``num_heads · head_dim``."""
        if "qkv" in self.paths:
            return int(self.part("qkv").out_features) // 3
        return int(self.part("k_proj").out_features)

    @property
    def head_dim(self) -> int:
        """Width of one head; only where keys have a norm, else any divisor of :attr:`key_width` serves as well."""
        if "logit_scale" in self.paths:
            return self.key_width // len(self.part("logit_scale"))
        weight = getattr(self.part("k_norm"), "weight", None)
        return self.key_width if weight is None else int(weight.shape[-1])

    def to_layer(self, tokens: Tensor) -> Tensor:
        """Tokens on this layer's device and in its precision."""
        weight = self.part("norm").weight
        return tokens.to(weight.device, weight.dtype)

    def attention_input(self, tokens: Tensor) -> Tensor:
        """What the attention takes: tokens ``(..., width)`` behind the norm, unless that is behind the attention."""
        return tokens if self.architecture.post_norm else cast(Tensor, self.part("norm")(tokens))

    def project(self, names: Sequence[str], tokens: Tensor) -> list[Tensor]:
        """Queries ``"q"``, keys ``"k"`` or values ``"v"``, in front of their own norms.

        Args:
            tokens: ``(..., width)``, see :meth:`attention_input`.

        Returns:
            ``(..., num_heads · head_dim)`` for each name.
        """
        if "qkv" not in self.paths:
            return [self.part(f"{name}_proj")(tokens) for name in names]
        fused = dict(zip("qkv", self.part("qkv")(tokens).chunk(3, dim=-1), strict=True))
        for name in ("q", "v"):
            bias = self.part(f"{name}_bias")
            if bias is not None:
                fused[name] = fused[name] + bias
        return [fused[name] for name in names]

    def projecting_modules(self, names: Sequence[str]) -> list[nn.Module]:
        """The modules whose parameters :meth:`project` reads."""
        return [self.part("attention")] if "qkv" in self.paths else [self.part(f"{name}_proj") for name in names]

    def normalize(self, name: str, heads: Tensor) -> Tensor:
        """Queries ``"q"`` or keys ``"k"`` behind their norm, where the family has one; values ``"v"`` have none.

        Args:
            heads: ``(..., num_heads, num_tokens, head_dim)``.
        """
        if "logit_scale" in self.paths and name != "v":
            return nn.functional.normalize(heads, dim=-1)
        norm = self.part(f"{name}_norm")
        weight = getattr(norm, "weight", None)
        if norm is None or weight is None:
            return heads
        if weight.shape[-1] == heads.shape[-1]:
            return cast(Tensor, norm(heads))
        joined = norm(heads.transpose(-3, -2).flatten(-2))
        return cast(Tensor, joined.unflatten(-1, (heads.shape[-3], -1)).transpose(-3, -2))

    def finish(self, tokens: Tensor, attention_output: Tensor) -> Tensor:
        """The rest of the layer after the attention: both residual branches and the MLP.

        Args:
            tokens: input of the layer, ``(..., width)``.
            attention_output: output of the attention's ``o_proj``, ``(..., width)``.
        """
        if self.architecture.post_norm:
            tokens = tokens + self.part("norm")(attention_output)
            return cast(Tensor, tokens + self.part("mlp_norm")(self._run_mlp(tokens)))
        tokens = tokens + self._scale("attention_scale", attention_output)
        return tokens + self._scale("mlp_scale", self._run_mlp(self.part("mlp_norm")(tokens)))

    def _run_mlp(self, tokens: Tensor) -> Tensor:
        for name in self._mlp:
            tokens = self.part(name)(tokens)
        return tokens

    def _scale(self, name: str, tokens: Tensor) -> Tensor:
        scale = self.part(name)
        if scale is None:
            return tokens
        return cast(Tensor, scale(tokens) if isinstance(scale, nn.Module) else scale * tokens)

    def undeclared(self) -> list[str]:
        """Names of its parameters that belong to no declared part."""
        inside = [path for name, path in self.paths.items() if name not in ("attention", "caller")]
        known = (*inside, *self.architecture.unused)
        return [
            name
            for name, _ in self.module.named_parameters()
            if not any(name == path or name.startswith(f"{path}.") for path in known)
        ]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A live model and its parts.

    Attributes:
        model: the model that runs: the original, or that with a classifier.
        original: the model as it was passed in.
        encoder: the vision transformer in it, without head.
        layers: its layers in order, as far as the head reads them.
        mergings: ``{index of the last layer of a stage: patch merging}`` between those layers.
    """

    model: Any
    original: Any
    encoder: Any
    architecture: Architecture
    head: Head
    layers: tuple[Layer, ...]
    mergings: dict[int, nn.Module]

    @property
    def has_added_head(self) -> bool:
        """Whether a linear head was added to the model, which has none, see :mod:`.added_heads`."""
        return self.original is not self.model

    @property
    def widths(self) -> list[int]:
        """Width of each layer."""
        return [layer.width for layer in self.layers]

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer; an identity where there is none."""
        path = self.architecture.final_norm
        norm = None if path is None else attrgetter(path)(self.encoder)
        return nn.Identity() if norm is None else cast(nn.Module, norm)

    @property
    def unread_modules(self) -> set[nn.Module]:
        """Modules whose output does not reach the head."""
        named = [module for path, module in self.model.named_modules() if path in self.head.unread]
        layers, mergings = _find_layers(self.encoder, self.architecture, None)
        unread = [layer.module for layer in layers[len(self.layers) :]]
        unread += [merging for index, merging in mergings.items() if index not in self.mergings]
        unread += [] if self.head_is_normed else [self.final_norm]
        return {module for root in (*named, *unread) for module in root.modules()}

    @property
    def pooler_modules(self) -> set[nn.Module]:
        """Modules that only the pooled output reads."""
        return {
            module for path, root in self.model.named_modules() if path == self.head.pooler for module in root.modules()
        }

    @property
    def unread_pooler_modules(self) -> set[nn.Module]:
        """Modules of a pooled output that no output depends on: they may differ, and be missing in a checkpoint."""
        return self.pooler_modules & self.unread_modules

    @property
    def head_is_normed(self) -> bool:
        """Whether the head reads tokens behind the final norm."""
        normed = self.head.normed
        return normed if isinstance(normed, bool) else normed(self.model)

    @property
    def pooled_norm(self) -> Any:
        """The norm of the mean over tokens; None where the model has none."""
        path = self.head.pooled_norm
        return attrgetter(path)(self.model) if path else None

    @property
    def biased_masks(self) -> bool:
        """Whether the encoder adds position biases to its attention mask."""
        biased = self.architecture.biased_masks
        return biased is not None and biased(self.encoder)

    @property
    def wrapped(self) -> Any:
        """The model of another library inside of the model; None if there is none."""
        wrapped = self.architecture.wrapped
        return self.encoder.get_submodule(wrapped[0]) if wrapped else None

    @property
    def model_type(self) -> str:
        """Family of the model; the inner backbone may be of another."""
        return str(_model_type(self.model))

    @property
    def model_class(self) -> str | None:
        """Name of the model's class in transformers, or of the supported class there that it is derived from; None if
        there is none."""
        names = [cls.__name__ for cls in type(self.original).__mro__ if cls is find_class(cls.__name__)]
        return names[0] if names else None

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        number = self.architecture.num_prefix_tokens
        return number if isinstance(number, int) else number(self.encoder)

    @property
    def num_suffix_tokens(self) -> int:
        """Number of tokens behind the patches."""
        number = self.architecture.num_suffix_tokens
        return number if isinstance(number, int) else number(self.encoder)

    def image_tokens(self, tokens: Tensor) -> Tensor:
        """Those of an image's patches.

        Args:
            tokens: ``(num_images, num_tokens, width)``, prefix and suffix tokens included.
        """
        return tokens[:, self.num_prefix_tokens : tokens.shape[1] - self.num_suffix_tokens]

    def token_grid(self, images: Tensor, num_tokens: int) -> tuple[int, int]:
        """Number of rows and columns of the tokens of the last layer, without prefix and suffix tokens.

        Args:
            images: ``(num_images, num_channels, height, width)``.
            num_tokens: number of tokens of an image.

        Raises:
            RouteError: it is not that of the patches.
        """
        stride = self.patch_size * 2 ** len(self.mergings)
        height, width = images.shape[-2:]
        # a ViT cuts the rest of an image off, a Swin pads it
        for rows, columns in ((height // stride, width // stride), (-(-height // stride), -(-width // stride))):
            if rows * columns == num_tokens:
                return rows, columns
        raise RouteError(
            f"The last layer of {type(self.original).__name__} must have a token for each {stride} x {stride} pixels, "
            f"got {num_tokens} tokens for images of {height} x {width} pixels. Use images of a multiple of {stride}."
        )

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        if self.architecture.patch_size is not None:
            return self.architecture.patch_size(self.encoder)
        size = self.encoder.config.patch_size
        return int(size) if isinstance(size, int) else int(size[0])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it was made for, in pixels."""
        sizes = self.architecture.image_size
        size = self.encoder.config.image_size if sizes is None else sizes(self.encoder)
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def num_channels(self) -> int:
        """Number of channels of its images."""
        number = getattr(self.encoder.config, "num_channels", None)  # some configs take it for granted
        return next(iter(self.find_patch_embedding().values())).in_channels if number is None else int(number)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one of the images or videos that it was made for."""
        shape = self.architecture.video_shape
        return (self.num_channels, *self.image_size) if shape is None else shape(self.encoder)

    def find_patch_embedding(self) -> dict[str, Any]:
        """``{path in the model: module}`` of the convolution that embeds patches, and of the norm after it.

        Raises:
            UnsupportedModelError: they are not where the declaration of the model says.
        """
        named = dict(self.encoder.named_modules())
        norms = self.architecture.patch_norm or ()
        names = [self.architecture.patch_projection, *([norms] if isinstance(norms, str) else norms)]
        modules = [named.get(name) for name in names]
        if not isinstance(modules[0], nn.Conv2d) or None in modules:
            raise UnsupportedModelError(
                f"Expected the convolution that embeds patches at '{names[0]}' of {type(self.encoder).__name__}, got "
                f"{', '.join(type(module).__name__ for module in modules)} at {', '.join(names)}. Declare its path "
                "with vpt_peft.register_architecture (patch_projection, patch_norm)."
            )
        paths = {module: path for path, module in self.model.named_modules()}
        return {paths[module]: module for module in modules if module is not None}

    @property
    def device(self) -> torch.device:
        """Device of the adapters; layers on other devices get prompts moved at each use."""
        return next(self.encoder.parameters()).device

    @property
    def num_features(self) -> int:
        """Input width of a linear head."""
        return self.layers[-1].output_width * (2 if self.head.joins_class_token else 1)


def find_backbone(model: nn.Module) -> Backbone:
    """Finds the declared parts of a model.

    Raises:
        UnsupportedModelError: no declaration fits; the error says why, or names the nearest supported class.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"Expected a model, got {safe_repr(model)}. Load it first, for example by "
            "AutoModelForImageClassification.from_pretrained(name)."
        )
    declared = ARCHITECTURES.get(_model_type(model) or "", [])
    fitting = [
        (family, head)
        for family in declared
        if (head := _find_head(model, family.heads)) is not None and _wraps_declared(model, family)
    ]
    if not fitting:
        raise UnsupportedModelError(explain(model, _model_type(model)))
    errors: list[UnsupportedModelError] = []
    for family, head in fitting:
        inner, architectures = _find_inner(model, family)
        for architecture in architectures:
            try:
                return _build(model, inner, architecture, head)
            except UnsupportedModelError as error:
                errors.append(error)
    raise errors[0]


def _build(model: Any, inner: Any, architecture: Architecture, head: Head) -> Backbone:
    """The parts of a model. Raises UnsupportedModelError if the declaration does not fit."""
    try:
        return _find_parts(model, inner, architecture, head)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not match the declaration of '{architecture.model_type}': {error}. "
            "Use a supported version of transformers, or declare it with vpt_peft.register_architecture."
        ) from error


def _find_parts(model: Any, inner: Any, architecture: Architecture, head: Head) -> Backbone:
    head = replace(head, paths=tuple(path for path in head.paths if attrgetter(path)(model) is not None))
    encoder: Any = inner.base_model if head.encoder is None else inner.get_submodule(head.encoder)
    reason = architecture.refuse(encoder) if architecture.refuse else None
    if reason is not None:
        raise UnsupportedModelError(f"This {type(model).__name__} cannot be prompted: {reason}")
    layers, mergings = _find_layers(encoder, architecture, head.layers_read(model) if head.layers_read else None)
    if not layers:
        raise UnsupportedModelError(
            f"The outputs of {type(model).__name__} must include at least one layer, got the embeddings alone. "
            "Choose other out_features or out_indices."
        )
    backbone = Backbone(model, model, encoder, architecture, head, layers, mergings)
    _check_parts(backbone)
    return backbone


def _check_parts(backbone: Backbone) -> None:
    """Checks that all declared parts exist, and that no parameter of a layer is overlooked.

    Raises:
        AttributeError: a part does not exist.
        UnsupportedModelError: a parameter belongs to no part.
    """
    for layer in backbone.layers:
        for name, path in layer.paths.items():
            if layer.part(name) is None and name not in OPTIONAL:
                raise AttributeError(f"'{path}' of {type(layer.module).__name__} is None")
        uses_sdpa, caller = backbone.architecture.uses_sdpa, layer.part("caller")
        if not uses_sdpa and backbone.architecture.attention_forward is None:
            _ = caller.config  # names the attention implementation
        if uses_sdpa and getattr(getattr(caller, "config", None), "_attn_implementation", "sdpa") != "sdpa":
            raise UnsupportedModelError(
                f"Prompts reach the attention of a {type(backbone.model).__name__} where it calls "
                "F.scaled_dot_product_attention, got a model with another implementation. Load it with "
                'attn_implementation="sdpa".'
            )
        undeclared = layer.undeclared()
        if undeclared:
            raise UnsupportedModelError(
                f"Each parameter of a layer must belong to a part that is declared, but the declaration of "
                f"'{backbone.architecture.model_type}' overlooks {truncate_list(undeclared, MAX_LISTED)} of "
                f"{type(layer.module).__name__}, so that prompts might be computed wrongly. Add them to the "
                "declaration, or to unused if they have no effect on prompts (vpt_peft.register_architecture)."
            )
    _ = backbone.final_norm
    backbone.encoder.get_submodule(backbone.head.tokens or "")
    for path in backbone.head.paths:
        backbone.model.get_submodule(path)


def _model_type(model: Any) -> str | None:
    """Family of a model, that of its config's class: a checkpoint may have put another name into the config."""
    config = getattr(model, "config", None)
    model_type = getattr(type(config), "model_type", None) or getattr(config, "model_type", None)
    return model_type if isinstance(model_type, str) else None


def list_classes(architectures: Sequence[Architecture] | None = None) -> list[str]:
    """Names of the model classes that are declared, each once; None: by all declarations."""
    declared = chain(*ARCHITECTURES.values()) if architectures is None else architectures
    return list(dict.fromkeys(name for architecture in declared for name in architecture.heads))


def find_class(name: object) -> type[transformers.PreTrainedModel] | None:
    """The supported model class of transformers with a name; None if there is none. No other name is looked up."""
    found = getattr(transformers, name, None) if isinstance(name, str) and name in list_classes() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _find_head(model: nn.Module, heads: dict[str, Head]) -> Head | None:
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((heads[name] for name in names if name in heads), None)


def _wraps_declared(model: nn.Module, declared: Architecture) -> bool:
    """Whether a model has the model of another library inside that its declaration is for, if it is for one."""
    if declared.wrapped is None:
        return True
    path, name = declared.wrapped
    return any(cls.__name__ == name for cls in type(attrgetter(path)(model)).__mro__)


def _find_inner(model: Any, declared: Architecture) -> tuple[Any, list[Architecture]]:
    """The model that has the layers, which is ``model`` or its inner backbone, and its declarations."""
    inner = dict(model.named_modules()).get(declared.backbone) if declared.backbone else None
    if inner is None:
        return model, [declared]
    known = ARCHITECTURES.get(_model_type(inner) or "", [])
    if not known or not any(cls.__name__ in declared.backbones for cls in type(inner).__mro__):
        raise UnsupportedModelError(
            f"{type(model).__name__} is supported with a backbone among {', '.join(declared.backbones)}; "
            f"got {type(inner).__name__}. Others can be declared with vpt_peft.register_architecture."
        )
    return inner, known


def _find_layers(
    encoder: nn.Module, architecture: Architecture, number: int | None
) -> tuple[tuple[Layer, ...], dict[int, nn.Module]]:
    """The first ``number`` layers, all of them for None, and the patch mergings between them."""
    modules: list[tuple[nn.Module, nn.Module]] = []
    mergings: dict[int, nn.Module] = {}
    for stage in encoder.get_submodule(architecture.layers).children():
        inside = stage.get_submodule(architecture.blocks).children() if architecture.blocks else [stage]
        modules += [(module, stage) for module in inside]
        merging = getattr(stage, architecture.merging, None) if architecture.merging else None
        if merging is not None:
            mergings[len(modules) - 1] = merging
    layers = tuple(Layer(index, module, architecture, stage) for index, (module, stage) in enumerate(modules[:number]))
    return layers, {index: merging for index, merging in mergings.items() if index < len(layers) - 1}
