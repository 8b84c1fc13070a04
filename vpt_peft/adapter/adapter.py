"""Adapter: the prompts, head and labels of one task, and its copies of parts of the backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..config import ADDED_POOLINGS, CLASSIFICATION_TASKS, IN_IMAGE, PromptConfig
from ..errors import ConfigError, RouteError
from .dequantize import dequantize
from .labels import get_labels, make_labels
from .locations import embed_patches, normalize_pixels, patch_embedding, prompt_shapes, required_size
from .modules import (
    ModuleTree,
    clone,
    copy_head,
    copy_patch_projection,
    describe,
    find_biases,
    find_modules_to_save,
)
from .plan import LayerPlan, plan_layers
from .prefix import PARTS, Prefix
from .prompts import Prompts, make_projection

if TYPE_CHECKING:
    from typing_extensions import Self


class Adapter(nn.Module):
    """Everything that belongs to one task. The keys of its state dict are those of ``adapter_model.safetensors``.

    Args:
        config: the configuration.
        backbone: the backbone, which is not changed.
        labels: ``num_labels``, ``id2label``, ``label2id``, ``problem_type`` where they differ from the model's.
        device: device of the new tensors; None: the backbone's.

    Attributes:
        prompts: ``prompts.{layer}``, or ``prompts.{part of the image}``, see :mod:`~vpt_peft.adapter.locations`.
        prefix: ``prefix.{layer}.key`` and ``.value``, prompts that are keys and values.
        projection: ``projection.*``; None without ``projection_dim``.
        head: ``head.{path}.*``, the copies of the modules of the model's head.
        bias: ``bias.{path}``, the copies of the backbone's biases by the path of their module.
        modules_to_save: ``modules_to_save.{path}.*``.
        plan: one :class:`~vpt_peft.adapter.LayerPlan` for each layer, or None.
        image_size: height and width that images must have; None: any that the backbone takes.
        num_frames: number of frames of the videos that the backbone was made for; None: it takes images.
        patch_embedding: paths of the modules of the patch embedding that prompts go through, or that it copies.
        model_type, model_class: family and class of the backbone, see :class:`~vpt_peft.backbones.Backbone`.
        num_labels: number of labels of the task.
        model_config: the model's config with the labels of this task.
        layout: its state dict on the meta device.
        head_classes: classes of the head's output layers by path, such as ``{"classifier": "Linear"}``.

    Raises:
        ConfigError, RouteError: the config does not fit the backbone.
    """

    def __init__(
        self,
        config: PromptConfig,
        backbone: Backbone,
        labels: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        device = device or backbone.device
        self.config = config.replace(task_type=_task_type(config, backbone))
        self.model_type = backbone.model_type
        self.model_class = backbone.model_class
        self.widths = backbone.widths
        _check_pooling(config, backbone)
        self.plan = plan_layers(config, len(backbone.layers), config.pooling in ("prompt", "global"))
        _check_outputs(config, backbone, self.plan)
        is_prefix = config.kind == "prefix"
        fresh = [layer for layer, plan in enumerate(self.plan) if plan and plan.fresh]
        widths = {layer: backbone.layers[layer].key_width if is_prefix else self.widths[layer] for layer in fresh}
        _check_shared(config, widths)
        self.prompts = Prompts(config, prompt_shapes(config, backbone, widths), backbone.patch_size, device)
        self.prefix = Prefix(config, widths if is_prefix else {}, backbone, device)
        self.projection: Any = make_projection(config, widths, device)
        several = len(set(widths.values())) > 1
        self._width_keys = {layer: str(width) for layer, width in widths.items()} if several else {}
        self.image_size = required_size(config, backbone)
        self.num_frames = backbone.input_shape[0] if backbone.architecture.video_shape else None
        self.patch_embedding = patch_embedding(config, backbone)

        labels = make_labels(backbone.model.config, labels or {})
        self.num_labels = len(labels["id2label"])
        self.model_config = _copy_config(backbone.model.config)
        for name, value in labels.items():
            setattr(self.model_config, name, value)
        self.head, self.bias, self.modules_to_save = ModuleTree(), ModuleTree(), ModuleTree()
        for path in backbone.head.paths:
            self.head.add(path, copy_head(backbone, path, self.num_labels, device, config.pooling))
        for path, module in find_modules_to_save(config, backbone).items():
            self.modules_to_save.add(path, dequantize(clone(module), path))
        for path in self.patch_embedding if config.location == "channel" else ():
            projection = copy_patch_projection(backbone, path, config.num_tokens, self.modules_to_save.paths, device)
            self.modules_to_save.add(path, projection)
        owned = [*backbone.head.paths, *self.modules_to_save.paths]
        for path, bias in find_biases(config, backbone, owned).items():
            self.bias.add(path, nn.Parameter(bias.detach().clone()))
        for tensor in chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():  # trained in float32 whatever the backbone's precision, as in PEFT
                tensor.data = tensor.data.float()
        self.requires_grad_(True)
        # What an adapter of this config has when it is loaded: whatever changes later cannot be saved.
        self.layout = {name: _to_meta(name, value) for name, value in self.state_dict().items()}
        layers = {path: self.head.find(path) for path in backbone.head.label_layers}
        self.head_classes = {path: describe(layer) for path, layer in layers.items() if layer is not None}

    def fresh_prompts(self, name: int | str, num_images: int, backbone: Backbone) -> Tensor:
        """The prompts that enter a layer, or a part of the image.

        Args:
            name: index of the layer, or name of the part.

        Returns:
            ``(1, num_tokens, width)`` for a layer, ``(1, channels, height, width)`` for a part of the image; with
            dropout, ``num_images`` of them.
        """
        prompts = self.prompts[name]
        if self.config.location == "pixel":
            prompts = embed_patches(prompts, self._patch_modules(backbone))
        elif self.config.location == "border":
            prompts = normalize_pixels(prompts)
        return self._drop(self._project(name, prompts), num_images)

    def fresh_prefix(self, layer: int, num_images: int) -> Tensor:
        """The keys and values of a layer's prefix, side by side.

        Returns:
            ``(1, num_tokens, 2 · num_heads · head_dim)``, or ``(num_images, ...)`` with dropout.
        """
        pair = self.prefix[layer]
        parts = [self._project(layer, pair[part], part) for part in PARTS]
        return self._drop(torch.cat(parts, dim=-1), num_images)

    def _project(self, name: int | str, prompts: Tensor, part: str | None = None) -> Tensor:
        """Prompts ``(num_tokens, dim)`` of a layer in its width."""
        projection = self.projection
        if projection is None:
            return prompts
        if self._width_keys:
            projection = projection[self._width_keys[int(name)]]
        projected: Tensor = (projection if part is None else projection[part])(prompts)
        return projected

    def _drop(self, prompts: Tensor, num_images: int) -> Tensor:
        """Prompts as a batch, with dropout for each image while training."""
        if self.config.dropout and self.training:
            return nn.functional.dropout(prompts.expand(num_images, *prompts.shape), self.config.dropout)
        return prompts.unsqueeze(0)

    def _patch_modules(self, backbone: Backbone) -> Iterator[nn.Module]:
        """The modules that embed patches: the adapter's copies, else the backbone's."""
        for path in self.patch_embedding:
            copied = self.replacement(path)
            yield backbone.model.get_submodule(path) if copied is None else copied

    @property
    def is_in_image(self) -> bool:
        """Whether its prompts are part of the image."""
        return self.config.location in IN_IMAGE and self.config.num_tokens > 0

    def replacement(self, path: str) -> nn.Module | None:
        """The adapter's own copy of the module at a path of the model; None if it has none."""
        module: nn.Module | None = self.head.find(path)
        return self.modules_to_save.find(path) if module is None else module

    @property
    def overridden_paths(self) -> list[str]:
        """Paths of the modules that the adapter replaces, or whose bias it replaces."""
        return [*self.head.paths, *self.modules_to_save.paths, *self.bias.paths]

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the head."""
        return self.head.parameters()

    @property
    def owns_backbone_parts(self) -> bool:
        """Whether it has copies of biases or modules of the backbone."""
        return bool(self.modules_to_save.paths or self.bias.paths)

    def labels(self) -> dict[str, Any]:
        """``id2label``, ``label2id`` and ``problem_type``.

        Raises:
            ConfigError: they have been changed in ``model_config``, and are not valid or not as many as the outputs.
        """
        labels = get_labels(self.model_config)
        if len(labels["id2label"]) != self.num_labels and self.head.paths:
            raise ConfigError(
                f"The config must have the {self.num_labels} labels that the adapter was made with, got "
                f"{len(labels['id2label'])}. Set config.id2label, or add an adapter with another num_labels."
            )
        return labels

    def train(self, mode: bool = True) -> Self:
        """Sets the mode. Modules of an adapter that is frozen stay in eval mode, so that batch norms do not update."""
        super().train(mode)
        for modules in (self.head, self.modules_to_save):
            modules.train(mode and self.is_trainable)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Makes it trainable, or freezes it."""
        super().requires_grad_(requires_grad)
        self.is_trainable = requires_grad
        return self.train(self.training)

    def materialize(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Allocates tensors that are on the meta device, without initialising them.

        Args:
            device: device of those tensors.
            dtype: precision of all floating-point tensors; None: as they are.
        """
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype))
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
        self.to(dtype)


def _copy_config(config: Any) -> Any:
    """A deep copy; the label maps, which may be long, are copied flat, which is equivalent and much faster."""
    return copy.deepcopy(
        config, {id(labels): dict(labels) for labels in (config.id2label, config.label2id) if isinstance(labels, dict)}
    )


def _to_meta(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"Modules trained by an adapter must have a state of tensors, got {type(value).__name__} for {name}. Only "
            "tensors can be saved."
        )
    return value.to("meta")


def _task_type(config: PromptConfig, backbone: Backbone) -> str:
    task_type = backbone.head.task_type
    if config.task_type not in (None, task_type):
        raise ConfigError(
            f"The task of {type(backbone.model).__name__} is {task_type}, got task_type={config.task_type}. "
            "Leave task_type out, or load the model class that fits it."
        )
    return task_type


def _check_pooling(config: PromptConfig, backbone: Backbone) -> None:
    if config.pooling in ADDED_POOLINGS and not backbone.has_added_head:
        raise ConfigError(
            f'pooling="{config.pooling}" needs a classifier that is added to a model without one, got '
            f"{type(backbone.model).__name__}. Use another pooling, or the model class without a head and "
            f'task_type="{backbone.architecture.classification}".'
        )
    if config.pooling.startswith("class") and backbone.num_prefix_tokens == 0:
        raise ConfigError(
            f'pooling="{config.pooling}" reads [CLS], which {type(backbone.original).__name__} does not have. '
            'Use pooling="default", "pooled" or "image".'
        )
    if config.pooling != "default" and backbone.head.task_type not in CLASSIFICATION_TASKS:
        raise ConfigError(
            f'pooling="{config.pooling}" needs an image classifier or a video classifier, got '
            f'{type(backbone.model).__name__}. Use pooling="default".'
        )


def _check_outputs(config: PromptConfig, backbone: Backbone, plan: Sequence[LayerPlan | None]) -> None:
    """Raises RouteError if prompts would be more than keys and values in a family where they cannot be."""
    reason = backbone.architecture.key_value_only
    tokens = [index for index, layer in enumerate(plan) if layer is not None and layer.route == "tokens"]
    if reason and config.num_tokens > 0 and (tokens or config.location != "prepend"):
        got = f"prompts that are tokens in layers {tokens}" if tokens else f'location="{config.location}"'
        raise RouteError(
            f"Prompts are keys and values only on a {type(backbone.model).__name__}, since {reason}; got {got}. Use "
            'deep=True with all layers, or carry=False, and route="auto", location="prepend" and a pooling that reads '
            "no prompts."
        )


def _check_shared(config: PromptConfig, fresh: Mapping[int, int]) -> None:
    widths = sorted(set(fresh.values()))
    if config.shared and not config.projection_dim and len(widths) > 1:
        raise ConfigError(
            f"shared=True needs layers of one width, got layers of widths {widths}. "
            "Choose layers of one stage with layers_to_transform, or set projection_dim."
        )
