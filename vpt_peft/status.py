"""A status report in the terms of PEFT's ``get_model_status``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .adapter import Adapter


@dataclass(frozen=True)
class ModelStatus:
    """What is attached to a backbone, and what of it is active and trains.

    Attributes:
        base_model_type: class of the backbone; adapter_model_type: that of what prompts it.
        peft_types, requires_grad, devices: for each adapter; ``"irregular"`` where only some of its tensors train.
        num_adapter_layers: layers that prompts of any adapter reach.
        enabled: False inside ``disable_adapter()``.
        merged_adapters: none, since prompts cannot be merged into weights.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    merged_adapters: list[str] = field(default_factory=list)


def describe(
    adapters: Mapping[str, Adapter], active: str, enabled: bool, base_model_type: str, trainable: int, total: int
) -> ModelStatus:
    reached = {layer for adapter in adapters.values() for layer, step in enumerate(adapter.steps) if step is not None}
    return ModelStatus(
        base_model_type=base_model_type,
        adapter_model_type="VPTModel",
        peft_types={name: adapter.config.peft_type for name, adapter in adapters.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(reached),
        enabled=enabled,
        active_adapters=[active],
        requires_grad={name: _trains(adapter) for name, adapter in adapters.items()},
        available_adapters=sorted(adapters),
        devices={
            name: sorted({parameter.device.type for parameter in adapter.parameters()})
            for name, adapter in adapters.items()
        },
    )


def _trains(adapter: Adapter) -> bool | str:
    found = {parameter.requires_grad for parameter in adapter.parameters()}
    return found == {True} if len(found) < 2 else "irregular"
