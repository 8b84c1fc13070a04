"""The status of a model, with the fields of PEFT's ``get_model_status``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..adapter import Adapter


@dataclass(frozen=True)
class ModelStatus:
    """Status of a :class:`~vpt_peft.VPTModel`.

    Attributes:
        base_model_type, adapter_model_type: class of the backbone, and of the model with adapters.
        peft_types, requires_grad, devices: of each adapter; ``"irregular"`` if only some of its tensors train.
        num_adapter_layers: number of layers with prompts of any adapter.
        enabled: False inside ``disable_adapter()``.
        merged_adapters: empty, since prompts cannot be merged into weights.
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


def get_status(
    adapters: Mapping[str, Adapter], active: str, enabled: bool, base_model_type: str, trainable: int, total: int
) -> ModelStatus:
    """The status of a model with these adapters; ``trainable`` and ``total`` are numbers of parameters."""
    prompted = {layer for adapter in adapters.values() for layer, plan in enumerate(adapter.plan) if plan is not None}
    return ModelStatus(
        base_model_type=base_model_type,
        adapter_model_type="VPTModel",
        peft_types={name: adapter.config.peft_type for name, adapter in adapters.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(prompted),
        enabled=enabled,
        active_adapters=[active],
        requires_grad={name: _requires_grad(adapter) for name, adapter in adapters.items()},
        available_adapters=sorted(adapters),
        devices={
            name: sorted({parameter.device.type for parameter in adapter.parameters()})
            for name, adapter in adapters.items()
        },
    )


def _requires_grad(adapter: Adapter) -> bool | str:
    found = {parameter.requires_grad for parameter in adapter.parameters()}
    return found == {True} if len(found) < 2 else "irregular"
