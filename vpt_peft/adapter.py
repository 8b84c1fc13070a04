"""An adapter: one task's config, prompts, head and labels, and its copies of what it trains of the backbone."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backbones import Backbone
from .config import PromptConfig
from .dense import dense, is_quantized
from .errors import ConfigError
from .passes import Group
from .plan import plan_steps
from .prompts import Prompts

if TYPE_CHECKING:
    from typing_extensions import Self

LABELS = ("num_labels", "id2label", "label2id", "problem_type")
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


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
            self._heads[_key(path)] = _own_head(backbone, path, self.model_config.num_labels, device)
        saved = _modules_to_save(config, backbone)
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
        """All its tensors, live, under the names of the adapter format (see :mod:`vpt_peft.checkpoint`)."""
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


def clone(module: nn.Module, on_meta: bool = False) -> nn.Module:
    """A deep copy without hooks or doors, which would bring along whatever they hold on to.

    Args:
        on_meta: its parameters take no memory, since others will take their place.
    """
    memo: dict[int, Any] = {}
    if on_meta:
        plain = [own for part in module.modules() if not is_quantized(part) for own in part.parameters(recurse=False)]
        memo |= {id(own): nn.Parameter(torch.empty_like(own, device="meta")) for own in plain}
    for part in module.modules():
        memo |= {id(part.__dict__[name]): OrderedDict() for name in HOOKS}
        if "forward" in part.__dict__:
            memo[id(part.__dict__["forward"])] = None
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name in HOOKS:  # one empty dict each: the memo shares its own
            setattr(part, name, OrderedDict())
        part.__dict__.pop("forward", None)
    return copied


def _copy_config(config: Any) -> Any:
    """A deep copy; of the maps of labels, which may be long, a flat one, which is as good and much faster."""
    return copy.deepcopy(config, {id(labels): dict(labels) for labels in (config.id2label, config.label2id) if labels})


def _own_head(backbone: Backbone, path: str, num_labels: int, device: torch.device) -> nn.Module:
    """A copy of a module of the model's head; with new output layers where it has another number of labels."""
    on_meta = device.type == "meta"
    head = dense(clone(backbone.model.get_submodule(path), on_meta), path, on_meta)
    if num_labels == backbone.model.config.num_labels:
        return head
    for output in backbone.head.label_layers:
        if output == path:
            return _new_output(head, output, backbone, num_labels, device)
        if output.startswith(path + "."):
            parent, _, name = output.removeprefix(path + ".").rpartition(".")
            holder = head.get_submodule(parent)
            setattr(holder, name, _new_output(getattr(holder, name), output, backbone, num_labels, device))
    return head


def _new_output(layer: Any, path: str, backbone: Backbone, num_labels: int, device: torch.device) -> nn.Module:
    if isinstance(layer, nn.Linear | nn.Identity):
        return nn.Linear(backbone.num_features, num_labels, device=device)
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, num_labels, kernel_size=1, device=device)
    raise ConfigError(
        f"The head at '{path}' must be a linear layer or a convolution to be replaced by one with {num_labels} labels, "
        f"got {type(layer).__name__}. Load the backbone with num_labels={num_labels}."
    )


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


def _modules_to_save(config: PromptConfig, backbone: Backbone) -> dict[str, nn.Module]:
    """The modules named in ``modules_to_save`` by their paths; the head, which is saved anyway, is left out."""
    found: dict[str, nn.Module] = {}
    for name in config.modules_to_save or ():
        matches = {
            path: module for path, module in backbone.model.named_modules() if path == name or path.endswith("." + name)
        }
        if not matches:
            raise ConfigError(
                f"modules_to_save must name modules of {type(backbone.model).__name__}, got '{name}', which is none. "
                "model.named_modules() lists them."
            )
        for path, module in matches.items():
            if not any(path == head or path.startswith(head + ".") for head in backbone.head.paths):
                found[path] = _check_free(path, module, backbone)
    for path in found:
        outer = [other for other in found if path.startswith(other + ".")]
        if outer:
            raise ConfigError(f"modules_to_save must not overlap, got '{path}' inside '{outer[0]}'. Name one of them.")
    return found


def _check_free(path: str, module: nn.Module, backbone: Backbone) -> nn.Module:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ConfigError(f"modules_to_save must name modules that are called, got the list '{path}'. Name its parts.")
    inside = {id(part) for part in module.modules()}
    guarded = [backbone.trunk, *backbone.mergings.values()]
    guarded += [part for layer in backbone.layers for part in (layer.module, layer.part("attention"))]
    if any(id(part) in inside for part in guarded):
        raise ConfigError(
            f"modules_to_save must not name a module through which prompts pass, got '{path}'. "
            "Name smaller parts, such as 'mlp' or 'layernorm_after'."
        )
    return module


def _biases(config: PromptConfig, backbone: Backbone, own: tuple[str, ...]) -> dict[str, Tensor]:
    """``{module path: bias}`` of all biases that the adapter has no copy of yet."""
    if config.bias == "none":
        return {}
    return {
        path: module.bias
        for path, module in backbone.model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and not any(path == one or path.startswith(one + ".") for one in own)
    }


def _key(path: str) -> str:
    return path.replace(".", "/")  # torch's containers take no dots


def _path(key: str) -> str:
    return key.replace("/", ".")
