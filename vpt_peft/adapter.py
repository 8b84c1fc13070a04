"""An adapter: one task's config, prompts, head and labels, and its copies of what it trains of the backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backbones import Backbone
from .config import PromptConfig
from .copies import clone, modules_to_save, own_head
from .dense import dense
from .errors import ConfigError
from .passes import Group
from .plan import plan_steps
from .prompts import Prompts

if TYPE_CHECKING:
    from typing_extensions import Self

LABELS = ("num_labels", "id2label", "label2id", "problem_type")


class Adapter(nn.Module):
    """Everything that belongs to one task. The backbone is not part of it.

    Args:
        config: what to build.
        backbone: what it is for; nothing of it is changed.
        labels: ``id2label``, ``label2id``, ``problem_type`` where they differ from the model's.
        device: where to create what is new; None: where the backbone is.

    Attributes:
        model_config: the model's config with this task's labels.
        steps: what each layer does with prompts, see :class:`~vpt_peft.plan.Step`.

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
        self.widths = backbone.widths
        _check_pooling(config, backbone)
        self.steps = plan_steps(config, len(backbone.layers), config.pooling in ("prompt", "global"))
        fresh = {layer: self.widths[layer] for layer, step in enumerate(self.steps) if step and step.fresh}
        _check_shared(config, fresh)
        self.prompts = Prompts(config, fresh, backbone.patch_size, device)

        self.model_config = _copy_config(backbone.model.config)
        for name, value in _checked_labels(labels or {}).items():
            setattr(self.model_config, name, value)
        self._heads = nn.ModuleDict()
        for path in backbone.head.paths:
            self._heads[_key(path)] = own_head(backbone, path, self.model_config.num_labels, device)
        saved = modules_to_save(config, backbone)
        self._copies = nn.ModuleDict({_key(path): dense(clone(module), path) for path, module in saved.items()})
        own = (*backbone.head.paths, *saved)
        self._biases = nn.ParameterDict(
            {_key(path): nn.Parameter(bias.detach().clone()) for path, bias in _biases(config, backbone, own).items()}
        )
        for tensor in chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():  # trained in float32 whatever the backbone's precision, as PEFT does
                tensor.data = tensor.data.float()
        self.requires_grad_(True)

    @property
    def modules_by_path(self) -> dict[str, nn.Module]:
        """The adapter's own modules and the paths in the model where they stand in, head included."""
        return {_path(key): module for part in (self._heads, self._copies) for key, module in part.items()}

    @property
    def biases_by_path(self) -> dict[str, nn.Parameter]:
        """The adapter's own biases and the paths of the modules that they belong to."""
        return {_path(key): bias for key, bias in self._biases.items()}

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The head's parameters."""
        return self._heads.parameters()

    @property
    def num_labels(self) -> int:
        return int(self.model_config.num_labels)

    @property
    def owns_backbone_parts(self) -> bool:
        """Whether it trains parts of the backbone besides the head."""
        return len(self._copies) > 0 or len(self._biases) > 0

    def train(self, mode: bool = True) -> Self:
        """Sets the mode. Modules of an adapter that does not train stay in eval mode: batch norms would go on
        averaging, though nothing else of it changes."""
        super().train(mode)
        for part in (self._heads, self._copies):
            part.train(mode and self._trains)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Lets it train, or freezes it."""
        super().requires_grad_(requires_grad)
        self._trains = requires_grad
        return self.train(self.training)

    def group(self, rows: tuple[int, ...] | None = None) -> Group:
        """Its images in a batch: all of them, or those with the numbers ``rows``."""
        return Group(self.prompts, self.steps, self.modules_by_path, self.biases_by_path, self.config.pooling, rows)

    def materialize(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Gives memory, as yet unfilled, to what was created on the meta device, and all floats another precision."""
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype))
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
        self.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors, live, under the names of the adapter format (see :mod:`vpt_peft.folder`)."""
        tensors = self.prompts.tensors()
        for kind, part in (("head", self._heads), ("modules", self._copies)):
            for key, module in part.items():
                state = module.state_dict(keep_vars=True)
                tensors |= {f"{kind}.{_path(key)}.{name}": tensor for name, tensor in state.items()}
        tensors |= {f"bias.{path}": bias for path, bias in self.biases_by_path.items()}
        return tensors

    def labels(self) -> dict[str, Any]:
        """What the head's outputs mean."""
        return {name: getattr(self.model_config, name) for name in ("id2label", "label2id", "problem_type")}


def _copy_config(config: Any) -> Any:
    """A deep copy; of the maps of labels, which may be long, a flat one, which is as good and much faster."""
    return copy.deepcopy(config, {id(labels): dict(labels) for labels in (config.id2label, config.label2id) if labels})


def _checked_labels(labels: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(labels) - set(LABELS))
    if unknown:
        raise ConfigError(f"An adapter's labels are given by {', '.join(LABELS)}, got {', '.join(unknown)}.")
    return labels


def _task_type(config: PromptConfig, backbone: Backbone) -> str:
    task_type = backbone.head.task_type
    if config.task_type not in (None, task_type):
        raise ConfigError(
            f"{type(backbone.model).__name__} is for {task_type}, got task_type={config.task_type}. "
            "Leave task_type out, or load the model class that fits it."
        )
    return task_type


def _check_pooling(config: PromptConfig, backbone: Backbone) -> None:
    if config.pooling != "default" and backbone.head.task_type != "IMAGE_CLASSIFICATION":
        raise ConfigError(
            f'pooling="{config.pooling}" chooses what a classifier reads, but {type(backbone.model).__name__} '
            'has none. Use pooling="default".'
        )


def _check_shared(config: PromptConfig, fresh: Mapping[int, int]) -> None:
    widths = sorted(set(fresh.values()))
    if config.shared and not config.projection_dim and len(widths) > 1:
        raise ConfigError(
            f"shared=True needs layers of one width, got layers of widths {widths}. "
            "Choose layers of one stage by layers_to_transform, or set projection_dim."
        )


def _biases(config: PromptConfig, backbone: Backbone, own: tuple[str, ...]) -> dict[str, Tensor]:
    """``{module path: bias}`` of all biases that are read and that the adapter has no copy of yet."""
    if config.bias == "none":
        return {}
    unread = backbone.unread
    return {
        path: module.bias
        for path, module in backbone.model.named_modules()
        if module not in unread
        and isinstance(getattr(module, "bias", None), nn.Parameter)
        and not any(path == one or path.startswith(one + ".") for one in own)
    }


def _key(path: str) -> str:
    return path.replace(".", "/")  # torch's containers take no dots


def _path(key: str) -> str:
    return key.replace("/", ".")
