"""Adapter, a baseline of the VPT paper (Houlsby et al., ICML 2019): a bottleneck behind the MLP of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from vpt_peft.backbones import find_backbone
from vpt_peft.recipes.training.methods import Method


class Bottleneck(nn.Module):
    """An MLP and a bottleneck that starts as the identity: ``y + up(gelu(down(y)))`` with ``y = mlp(x)``."""

    def __init__(self, mlp: nn.Module, width: int, dim: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.down, self.up = nn.Linear(width, dim), nn.Linear(dim, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mlp(hidden)
        return hidden + self.up(nn.functional.gelu(self.down(hidden)))


class BottleneckModel(nn.Module):
    """A classifier with a bottleneck of ``dim`` channels in each layer; only those and the head are trained."""

    def __init__(self, model: Any, dim: int) -> None:
        super().__init__()
        self.model, self.config, self.layers = model, model.config, find_backbone(model).layers
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        for layer in self.layers:
            bottleneck = Bottleneck(layer.part("mlp"), layer.width, dim)
            setattr(layer.module, layer.architecture.mlp, bottleneck.to(model.device))

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def get_base_model(self) -> Any:
        return self.model

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Saves what was trained."""
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        save_file(trained, folder / "adapter_model.safetensors")

    def unload(self) -> Any:
        """Removes the bottlenecks."""
        for layer in self.layers:
            setattr(layer.module, layer.architecture.mlp, layer.part("mlp").mlp)
        return self.model


@dataclass(frozen=True)
class Adapter(Method):
    """Bottlenecks of ``dim`` channels."""

    dim: int = 8

    def attach(self, model: Any, task_type: str = "IMAGE_CLASSIFICATION", **_: Any) -> BottleneckModel:
        return BottleneckModel(model, self.dim)


ADAPTER = Adapter("Adapter", None, 3e-3, 1e-2)
