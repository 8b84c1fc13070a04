"""The authors' implementation on tiny random models: inputs, logits and prompt gradients, as recorded numbers.

Each file in ``reference/`` holds all weights under the names that implementation gives them. Here they are put into
models of ``transformers`` and adapters of ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

PATCHES = "vit.embeddings.patch_embeddings.projection"
FOLDER = Path(__file__).parents[1] / "reference"


@dataclass
class Case:
    """A recorded case: ``prompts`` and ``gradients`` are an adapter's tensors and their gradients, by our names."""

    model: PreTrainedModel
    pixel_values: Tensor
    logits: Tensor
    prompts: dict[str, Tensor]
    gradients: dict[str, Tensor]


def load_case(name: str) -> Case:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open has no iterator
        metadata = file.metadata()
    arch = json.loads(metadata["arch"])
    model_tensors = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    gradients = {key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")}
    build, rename = (_vit, _vit_prompts) if metadata["backbone"] == "vit" else (_swin, _swin_prompts)
    settings = json.loads(metadata["prompt"])
    shared, location = settings.get("DEEP_SHARED", False), settings.get("LOCATION", "prepend")
    border = settings["NUM_TOKENS"] if location == "pad" else 0
    model = build(arch, int(metadata["img_size"]) + 2 * border, model_tensors)
    return Case(
        model.eval(),
        tensors["pixel_values"],
        tensors["logits"],
        _first_if(shared, rename(model_tensors, arch)),
        _first_if(shared, rename(gradients, arch)),
    )


def _first_if(shared: bool, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not shared or key == "prompts.0"}


def _vit(arch: dict[str, Any], image_size: int, tensors: dict[str, Tensor]) -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=arch["hidden"], num_hidden_layers=arch["layers"], num_attention_heads=arch["heads"],
        intermediate_size=arch["mlp"], patch_size=arch["patch"], image_size=image_size, layer_norm_eps=1e-6,
        num_labels=tensors["head.bias"].shape[0],
    )  # fmt: skip
    model = ViTForImageClassification(config)
    embeddings, encoder = "transformer.embeddings.", "transformer.encoder."
    state = {
        "vit.embeddings.cls_token": tensors[embeddings + "cls_token"],
        "vit.embeddings.position_embeddings": tensors[embeddings + "position_embeddings"],
        f"{PATCHES}.weight": tensors[embeddings + "patch_embeddings.weight"][:, :3],  # without the channels of "below"
        f"{PATCHES}.bias": tensors[embeddings + "patch_embeddings.bias"],
        **_renamed(tensors, encoder + "encoder_norm", "vit.layernorm"),
        **_renamed(tensors, "head", "classifier"),
    }
    parts = {
        "attention_norm": "layernorm_before", "ffn_norm": "layernorm_after", "ffn.fc1": "mlp.fc1",
        "ffn.fc2": "mlp.fc2", "attn.query": "attention.q_proj", "attn.key": "attention.k_proj",
        "attn.value": "attention.v_proj", "attn.out": "attention.o_proj",
    }  # fmt: skip
    for layer in range(arch["layers"]):
        for theirs, ours in parts.items():
            state |= _renamed(tensors, f"{encoder}layer.{layer}.{theirs}", f"vit.layers.{layer}.{ours}")
    model.load_state_dict(state)
    return model


def _vit_prompts(tensors: dict[str, Tensor], arch: dict[str, Any]) -> dict[str, Tensor]:
    if "transformer.prompt_embeddings_tb" in tensors:
        return _border(*(tensors[f"transformer.prompt_embeddings_{sides}"][0] for sides in ("tb", "lr")))
    prompts = [
        *tensors.get("transformer.prompt_embeddings", ()),
        *tensors.get("transformer.deep_prompt_embeddings", ()),
    ]
    patch = arch["patch"]
    if prompts[0].ndim == 3 and prompts[0].shape[1] == patch:  # patches side by side, (3, patch, num_tokens * patch)
        prompts = [torch.stack(prompt.split(patch, dim=-1)) for prompt in prompts]
    elif prompts[0].ndim == 3:
        embedding = _renamed(tensors, "transformer.embeddings.patch_embeddings", f"modules_to_save.{PATCHES}")
        return {"prompts.channels": prompts[0], **embedding}
    found = {f"prompts.{layer}": prompt for layer, prompt in enumerate(prompts)}
    for name in ("weight", "bias"):
        if f"transformer.prompt_proj.{name}" in tensors:
            found[f"projection.{name}"] = tensors[f"transformer.prompt_proj.{name}"]
    return found


def _border(ends: Tensor, sides: Tensor) -> dict[str, Tensor]:
    """Top and bottom, ``(3, 2 * num_tokens, width)``, and left and right, ``(3, height, 2 * num_tokens)``."""
    parts = zip(("top", "bottom", "left", "right"), (*ends.chunk(2, dim=1), *sides.chunk(2, dim=2)), strict=True)
    return {f"prompts.{name}": part for name, part in parts}


def _swin(arch: dict[str, Any], image_size: int, tensors: dict[str, Tensor]) -> PreTrainedModel:
    config = SwinConfig(**arch, image_size=image_size, num_labels=tensors["head.bias"].shape[0], layer_norm_eps=1e-5)
    model = SwinForImageClassification(config)
    state = {
        **_renamed(tensors, "patch_embed.proj", "swin.embeddings.patch_embeddings.projection"),
        **_renamed(tensors, "patch_embed.norm", "swin.embeddings.norm"),
        **_renamed(tensors, "norm", "swin.layernorm"),
        **_renamed(tensors, "head", "classifier"),
    }
    parts = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    for stage, depth in enumerate(arch["depths"]):
        there, here = f"layers.{stage}", f"swin.encoder.layers.{stage}"
        for part in ("downsample.norm", "downsample.reduction"):
            state |= _renamed(tensors, f"{there}.{part}", f"{here}.{part}")
        for block in range(depth):
            theirs, ours = f"{there}.blocks.{block}", f"{here}.blocks.{block}"
            for part, name in parts.items():
                state |= _renamed(tensors, f"{theirs}.{part}", f"{ours}.{name}")
            for name in ("weight", "bias"):
                thirds = tensors[f"{theirs}.attn.qkv.{name}"].chunk(3)
                state |= {
                    f"{ours}.attention.{letter}_proj.{name}": third for letter, third in zip("qkv", thirds, strict=True)
                }
            table = "relative_position_bias_table"
            state[f"{ours}.attention.relative_position_bias.{table}"] = tensors[f"{theirs}.attn.{table}"]
    model.load_state_dict(state)
    return model


def _swin_prompts(tensors: dict[str, Tensor], arch: dict[str, Any]) -> dict[str, Tensor]:
    prompts = list(tensors["prompt_embeddings"])
    for stage in range(len(arch["depths"])):
        prompts += list(tensors.get(f"deep_prompt_embeddings_{stage}", torch.empty(0)))
    return {f"prompts.{layer}": prompt for layer, prompt in enumerate(prompts)}


def _renamed(tensors: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    names = ("weight", "bias")
    return {f"{ours}.{name}": tensors[f"{theirs}.{name}"] for name in names if f"{theirs}.{name}" in tensors}
