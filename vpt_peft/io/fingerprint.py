"""Fingerprint of a backbone: enough to tell whether an adapter is loaded onto the backbone that it was trained on.

It holds the fields of the config that define the function of the model, and a few values of each tensor, with a
tolerance that lets half-precision and quantised copies of the same checkpoint pass.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from ..adapter import is_quantized
from ..backbones import Backbone
from ..errors import CheckpointError, safe_repr, truncate_list

NUM_VALUES = 3  # of each tensor
MAX_SCALE_VALUES = 256
MAX_LISTED = 5
MAX_NAME = 300
# Fields that have no effect in eval mode, or whose effect shows in the shapes of tensors.
IGNORED_FIELDS = re.compile(
    r"dropout|drop_path|drop_rate|initializer|init_|image_size|_attn_implementation|_version|num_classes|label_names"
)
# Largest error of a value, as a fraction of the tensor's scale.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2, "8 bits": 0.15, "4 bits": 0.6}


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a backbone.

    Attributes:
        config: fields of the config.
        tensors: ``{name: (scale, value, value, value)}``, where scale is the root mean square.
        precision: key of ``TOLERANCES``: the least precise type that represents the tensors.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[float, ...]]
    precision: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        tensors = {name: " ".join(f"{value:.5g}" for value in values) for name, values in self.tensors.items()}
        return {"config": dict(self.config), "precision": self.precision, "tensors": tensors}

    @classmethod
    def from_dict(cls, values: Any) -> Fingerprint:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: the values are not those of a fingerprint.
        """
        try:
            config, precision = dict(values["config"]), values["precision"]
            tensors = {str(name): tuple(map(float, numbers.split())) for name, numbers in values["tensors"].items()}
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"The fingerprint of the backbone cannot be read: {safe_repr(error)}.") from error
        if precision not in list(TOLERANCES) or any(len(numbers) != 1 + NUM_VALUES for numbers in tensors.values()):
            raise CheckpointError(f"The fingerprint of the backbone is not valid: precision {safe_repr(precision)}.")
        return cls(config, tensors, precision)

    def without(self, modules: Iterable[str], biases: Iterable[str]) -> Fingerprint:
        """The fingerprint without tensors that an adapter has copies of.

        Args:
            modules: paths of copied modules; biases: paths of modules whose bias is copied.
        """
        modules, copied = tuple(modules), {f"{path}.bias" for path in biases}
        prefixes = tuple(f"{path}." for path in modules)
        tensors = {
            name: values
            for name, values in self.tensors.items()
            if name not in copied and not name.startswith(prefixes or ("\0",))
        }
        return Fingerprint(self.config, tensors, self.precision)

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs in another backbone: fields of the config and names of tensors, each with both values.

        Tensors that another version of transformers has renamed are found by their values.
        """
        fields = [name for name in self.config if name in other.config and self.config[name] != other.config[name]]
        found = [
            f"{name}: expected {safe_repr(self.config[name])}, got {safe_repr(other.config[name])}" for name in fields
        ]
        tolerance = max(TOLERANCES[self.precision], TOLERANCES[other.precision])
        unmatched = [values for name, values in other.tensors.items() if name not in self.tensors]
        for name, values in self.tensors.items():
            if name in other.tensors:
                if not _is_close(values, other.tensors[name], tolerance):
                    found.append(f"{name}: expected {_format(values)}, got {_format(other.tensors[name])}")
            elif not any(_is_close(values, candidate, tolerance) for candidate in unmatched):
                found.append(f"{name[:MAX_NAME]}: expected {_format(values)}, got no such tensor")
        return found


@torch.no_grad()
def take_fingerprint(backbone: Backbone) -> Fingerprint:
    """The fingerprint of a live backbone without its head and a pooled output that is not read, and without sharded,
    offloaded and integer tensors."""
    samples: dict[str, Tensor] = {}
    bits = 32
    heads = tuple(f"{path}." for path in backbone.head.paths)
    unread = backbone.unread_pooler_modules
    for path, module in backbone.model.named_modules():
        prefix = f"{path}." if path else ""
        if module in unread or (heads and prefix.startswith(heads)):
            continue
        quantized = is_quantized(module)
        if quantized and isinstance(module, nn.Linear) and not module.weight.is_meta:
            samples[f"{prefix}weight"] = _sample_quantized(module)
            bits = min(bits, 4 if 2 * module.weight.numel() <= module.in_features * module.out_features else 8)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            is_compared = tensor is not None and name not in module._non_persistent_buffers_set
            if is_compared and not (quantized and name == "weight") and _is_dense(tensor):
                samples[prefix + name] = _sample(tensor.detach())
    values = torch.stack([sample.cpu() for sample in samples.values()]) if samples else torch.empty(0, 1 + NUM_VALUES)
    return Fingerprint(
        _config_fields(backbone.model.config),
        dict(zip(samples, map(tuple, values.tolist()), strict=True)),
        _precision(values[:, 1:]) if bits == 32 else f"{bits} bits",
    )


def check_fingerprint(saved: Fingerprint, own: Fingerprint, name: str | None) -> None:
    """Checks that a backbone is the one that an adapter was trained on.

    Args:
        saved: fingerprint in the adapter's config; own: that of the backbone.
        name: of the backbone in the adapter's config.

    Raises:
        CheckpointError: lists the first fields and tensors that differ.
    """
    different = saved.differences(own)
    if different:
        original = f" ({safe_repr(name)})" if name else ""
        raise CheckpointError(
            f"The backbone is not the one that the adapter was trained on: {truncate_list(different, MAX_LISTED)}. "
            f"Load the backbone it was trained on{original}; if these parts were trained or initialised before, save "
            "them with the adapter by modules_to_save. check_backbone=False loads it anyway."
        )


def _config_fields(config: Any) -> dict[str, Any]:
    """The fields of a model's own config class, nested ones by dotted names; not those that every model has."""
    common = set(PreTrainedConfig().to_dict())
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in common or IGNORED_FIELDS.search(name):
            continue
        if isinstance(nested := getattr(config, name, None), PreTrainedConfig):
            fields |= {f"{name}.{inner}": value for inner, value in _config_fields(nested).items()}
        else:
            fields[name] = json.loads(json.dumps(value, default=str))
    return fields


def _is_dense(tensor: Tensor) -> bool:
    """Whether the values of a tensor are here, as floating-point numbers."""
    return tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0 and not isinstance(tensor, DTensor)


def _positions(size: int) -> list[int]:
    """Positions of the sampled values in a flattened tensor."""
    return [size * (2 * number + 1) // (2 * NUM_VALUES) for number in range(NUM_VALUES)]


def _sample(tensor: Tensor) -> Tensor:
    """Scale and sampled values of a dense tensor, ``(1 + NUM_VALUES,)``."""
    flat = tensor.reshape(-1)
    some = flat[:: max(1, flat.numel() // MAX_SCALE_VALUES)].float()
    return torch.cat([some.square().mean().sqrt().view(1), flat[_positions(flat.numel())].float()])


def _sample_quantized(module: nn.Linear) -> Tensor:
    """The same of a quantised weight, whichever library quantised it: its columns are the outputs of unit vectors."""
    rows, columns = zip(
        *(divmod(place, module.in_features) for place in _positions(module.in_features * module.out_features)),
        strict=True,
    )
    bias = module.bias
    reference = module.weight if bias is None else bias
    dtype = reference.dtype if reference.is_floating_point() else torch.float32
    units = torch.zeros(NUM_VALUES, module.in_features, device=module.weight.device, dtype=dtype)
    units[range(NUM_VALUES), columns] = 1
    training, module.training = module.training, True  # in eval mode some pack their weights for inference
    try:
        outputs = module(units).float() - (0 if bias is None else bias.float())
    finally:
        module.training = training
    return torch.cat([outputs.square().mean().sqrt().view(1), outputs[range(NUM_VALUES), rows]])


def _precision(values: Tensor) -> str:
    """The least precise type that represents all values: a model may have been converted back to float32."""
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return next((name for name, dtype in types.items() if torch.equal(values.to(dtype).float(), values)), "float32")


def _is_close(values: tuple[float, ...], others: tuple[float, ...], tolerance: float) -> bool:
    scale = max((value for value in (values[0], others[0]) if math.isfinite(value)), default=0.0)
    return all(
        abs(one - other) <= tolerance * max(scale, abs(one)) + 1e-7 if math.isfinite(one) else str(one) == str(other)
        for one, other in zip(values[1:], others[1:], strict=True)
    )


def _format(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values[1:]) + "]"
