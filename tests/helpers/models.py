"""Builders of tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForSemanticSegmentation,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from vpt_peft import PromptConfig, VPTModel, get_vpt_model

VIT = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
SWIN = {
    "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4,
    "initializer_range": 0.2,
}  # fmt: skip
BEIT = {**VIT, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.5, "use_mask_token": True}


@dataclass
class Tiny:
    """A model in eval mode with four images and their labels."""

    name: str
    model: PreTrainedModel
    pixel_values: Tensor
    labels: Tensor

    def prompted(self, num_tokens: int = 5, **config: object) -> VPTModel:
        """The model with fresh prompts, always the same ones, and far enough from zero to be seen."""
        torch.manual_seed(1)
        vpt = get_vpt_model(self.model, PromptConfig(num_tokens=num_tokens, **config))  # type: ignore[arg-type]
        move(vpt.adapters["default"].prefix)
        return vpt


def move(*modules: nn.Module) -> None:
    """Adds noise to parameters that start at zero or as copies, as training does."""
    with torch.no_grad():
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            parameter.add_(torch.randn_like(parameter))


def tiny_vit(**config: object) -> Tiny:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**{**VIT, "num_labels": 7, **config})).eval()
    return Tiny("vit", model, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 6]))


def tiny_swin(**config: object) -> Tiny:
    torch.manual_seed(0)
    model = SwinForImageClassification(SwinConfig(**{**SWIN, "num_labels": 7, **config})).eval()
    return Tiny("swin", model, torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 6]))


def tiny_beit(**config: object) -> Tiny:
    torch.manual_seed(0)
    model = BeitForImageClassification(BeitConfig(**{**BEIT, "num_labels": 7, **config})).eval()
    return Tiny("beit", stirred(model), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 6]))


def tiny_beit_segmenter(**config: object) -> Tiny:
    torch.manual_seed(0)
    heads = {
        "auxiliary_channels": 6,
        "num_hidden_layers": 5,
        "initializer_range": 0.1,
        "out_indices": [2, 3, 4, 5],
        "pool_scales": [1, 2],
    }
    model = BeitForSemanticSegmentation(BeitConfig(**{**BEIT, **heads, "num_labels": 7, **config})).eval()
    return Tiny("beit_segmenter", stirred(model), torch.randn(4, 3, 32, 32), some_masks(32))


def tiny_upernet(**config: object) -> Tiny:
    torch.manual_seed(0)
    stages = {"depths": [2, 1, 1], "num_heads": [1, 2, 2], "out_features": ["stage1", "stage2", "stage3"]}
    heads = {"hidden_size": 12, "auxiliary_channels": 6, "auxiliary_in_channels": 32, "pool_scales": [1, 2]}
    values = {"backbone_config": SwinConfig(**{**SWIN, **stages}), "initializer_range": 0.1, "num_labels": 7}
    model = UperNetForSemanticSegmentation(UperNetConfig(**{**values, **heads, **config})).eval()
    return Tiny("upernet", stirred(model), torch.randn(4, 3, 64, 64), some_masks(64))


def some_masks(size: int) -> Tensor:
    """Masks of the labels 0 to 6 in patches, and 255 for what has none."""
    labels = torch.randint(0, 8, (4, 8, 8))
    return labels.masked_fill(labels == 7, 255).repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    """What starts as zeros or ones, such as position biases and batch norms' averages, made to count."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias_table", "lambda_1", "lambda_2", "running_mean", "running_var", "cls_token")):
                tensor += torch.rand_like(tensor) * 0.5
    return model


BUILDERS: dict[str, Callable[..., Tiny]] = {"vit": tiny_vit, "swin": tiny_swin, "beit": tiny_beit}
SEGMENTERS: dict[str, Callable[..., Tiny]] = {"beit_segmenter": tiny_beit_segmenter, "upernet": tiny_upernet}


def logits(model: torch.nn.Module, pixel_values: Tensor, **kwargs: object) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(pixel_values, **kwargs).logits


def train_two_steps(model: torch.nn.Module, tiny: Tiny) -> None:
    """Two steps of SGD on the trainable parameters, with the same random numbers in each call."""
    torch.manual_seed(6)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(pixel_values=tiny.pixel_values, labels=tiny.labels).loss.backward()
        optimizer.step()
    model.eval()


def gradients(vpt: VPTModel) -> dict[str, Tensor]:
    """Gradients of the active adapter's tensors by name."""
    tensors = vpt.adapters[vpt.active_adapter].state_dict(keep_vars=True)
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def step(vpt: VPTModel, tiny: Tiny) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one training step."""
    vpt.zero_grad()
    output = vpt(tiny.pixel_values.to(vpt.dtype), labels=tiny.labels)
    output.loss.backward()
    return output.logits.detach(), gradients(vpt)


def loss_and_gradients(
    vpt: VPTModel, tiny: Tiny, compiled: Callable[..., Any] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step, dropout drawn alike each time.

    Args:
        compiled: the compiled model, which is called in place of the model itself.
    """
    torch.manual_seed(2)
    vpt.zero_grad()
    call = vpt if compiled is None else compiled
    loss = call(tiny.pixel_values, labels=tiny.labels).loss
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(vpt).items()}


def saved_bytes(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """Bytes that a call keeps for the backward pass, each storage once, parameters of the model left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Same keys, and values within an absolute tolerance."""
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
