"""What prompts cost, counted exactly: operations and bytes kept for the backward pass, never seconds.

The models have their full size, but their activations hold no data (fake tensors), so a count takes about a second.
The limits are far enough from what is counted today to survive a rewrite, and close enough to notice wasted work:
a query, an output projection or an MLP computed for prompts whose result nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from vpt_peft import PromptConfig, get_vpt_model

BATCH, LABELS = 8, 100


@dataclass(frozen=True)
class Cost:
    """``flops`` of one call; ``saved``: bytes that it keeps for the backward pass, parameters left out."""

    flops: int
    saved: int


@dataclass(frozen=True)
class Ratio:
    """Two counts of the same kind and their quotient, all shown where an assertion fails."""

    ours: int
    other: int

    @property
    def value(self) -> float:
        return self.ours / self.other

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.ours:,} to {self.other:,})"

    def check(self, limit: float) -> None:
        print(self)
        assert self.value <= limit, f"expected at most {limit} times the other, got {self}"


@cache
def vit_b16() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(num_labels=LABELS)).eval().requires_grad_(False)


@cache
def swin_t() -> PreTrainedModel:
    config = SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, num_labels=LABELS)
    return SwinForImageClassification(config).eval().requires_grad_(False)


class Concatenated(nn.Module):
    """VPT-Deep by concatenation: through whole layers, prompts are tokens like any other."""

    def __init__(self, model: PreTrainedModel, num_tokens: int) -> None:
        super().__init__()
        self.vit, self.head = model.vit, nn.Linear(model.config.hidden_size, LABELS)
        self.prompts = nn.Parameter(torch.randn(len(self.vit.layers), num_tokens, model.config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.vit.embeddings(pixel_values)
        for layer, prompts in zip(self.vit.layers, self.prompts, strict=True):
            hidden = torch.cat([prompts.expand(len(hidden), -1, -1), hidden], dim=1)
            hidden = layer(hidden)[:, len(prompts) :]
        return self.head(self.vit.layernorm(hidden)[:, 0])


@contextmanager
def prompted(model: PreTrainedModel, num_tokens: int, **config: Any) -> Iterator[nn.Module]:
    vpt = get_vpt_model(model, PromptConfig(num_tokens=num_tokens, **config))
    try:
        yield vpt
    finally:
        vpt.unload()


def count(model: nn.Module, training: bool = False, fused: bool = False, fake: bool = True, size: int = 224) -> Cost:
    """Counts one call of ``model``, with loss and backward pass if ``training``.

    Args:
        fused: use the CPU's fused attention, which keeps no attention weights but whose FLOPs torch cannot count.
        fake: without data. Parameters stay what they are, and a gradient never reaches them.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not training:  # not no_grad, under which the counter fails on views of parameters that train
        for parameter in trained:
            parameter.requires_grad_(False)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad()
    backend = SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    with mode, sdpa_kernel(backend):
        if isinstance(mode, FakeTensorMode):
            parameters += [mode.from_tensor(one) for one in parameters]
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(torch.zeros(BATCH, 3, size, size))
            logits = getattr(output, "logits", output)
            if training:
                loss = nn.functional.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
                torch.autograd.grad(loss, trained)
    for parameter in parameters:
        kept.pop(parameter.untyped_storage()._cdata, None)
    for parameter in trained:
        parameter.requires_grad_(True)
    return Cost(counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values()))


@cache
def bare(build: Callable[[], PreTrainedModel]) -> Cost:
    return count(build())


def inference(build: Callable[[], PreTrainedModel], num_tokens: int) -> Ratio:
    """FLOPs with prompts, to those of the bare backbone."""
    other = bare(build)
    with prompted(build(), num_tokens) as vpt:
        return Ratio(count(vpt).flops, other.flops)


@cache
def training(num_tokens: int, fused: bool = False) -> tuple[Cost, Cost]:
    """A training step of ViT-B/16 with prompts, and one by plain concatenation."""
    concatenated = count(Concatenated(vit_b16(), num_tokens), training=True, fused=fused)
    with prompted(vit_b16(), num_tokens) as vpt:
        return count(vpt.train(), training=True, fused=fused), concatenated


def test_a_count_without_data_is_the_count_of_a_real_run() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = ViTForImageClassification(config).eval()
    with prompted(model, 5) as vpt:
        for fused in (False, True):
            without, real = (count(vpt, training=True, fused=fused, fake=fake, size=32) for fake in (True, False))
            assert without == real
            assert real.flops > 0 and real.saved > 0


def test_a_count_knows_the_price_of_attention() -> None:
    """Else prompts as keys and values would seem to cost nothing but their projections."""
    tokens, width, mlp, patches = 197, 768, 3072, 196
    layer = 4 * tokens * width**2 + 2 * tokens * width * mlp + 2 * tokens**2 * width
    model = patches * width * 3 * 16**2 + 12 * layer + width * LABELS
    assert bare(vit_b16).flops == 2 * BATCH * model


@pytest.mark.parametrize(("num_tokens", "limit"), [(50, 1.02), (200, 1.07)])
def test_prompts_add_a_few_percent_to_inference(num_tokens: int, limit: float) -> None:
    inference(vit_b16, num_tokens).check(limit)


@pytest.mark.parametrize(("num_tokens", "limit"), [(50, 0.82), (200, 0.55)])
def test_training_needs_fewer_operations_than_concatenation(num_tokens: int, limit: float) -> None:
    ours, concatenated = training(num_tokens)
    Ratio(ours.flops, concatenated.flops).check(limit)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(("num_tokens", "limit"), [(50, 0.85), (200, 0.62)])
@pytest.mark.heavy
def test_training_keeps_fewer_bytes_than_concatenation(num_tokens: int, limit: float, fused: bool) -> None:
    ours, concatenated = training(num_tokens, fused)
    Ratio(ours.saved, concatenated.saved).check(limit)


def test_prompts_add_a_few_percent_to_inference_in_windows() -> None:
    """Swin's windows are small (49 tokens), so 50 prompts double the attention; but attention is a small part."""
    inference(swin_t, 50).check(1.06)


@pytest.mark.heavy
def test_training_in_windows_needs_fewer_operations_than_the_tokens_route() -> None:
    with prompted(swin_t(), 50) as vpt:
        ours = count(vpt.train(), training=True)
    with prompted(swin_t(), 50, route="tokens") as vpt:
        tokens = count(vpt.train(), training=True)
    Ratio(ours.flops, tokens.flops).check(0.85)


@cache
def of_kind(kind: str, build: Callable[[], PreTrainedModel], num_tokens: int, training: bool, fused: bool) -> Cost:
    with prompted(build(), num_tokens, kind=kind) as vpt:
        return count(vpt.train(training), training=training, fused=fused)


@pytest.mark.parametrize("num_tokens", [10, 50])
@pytest.mark.parametrize("build", [vit_b16, swin_t])
@pytest.mark.heavy
def test_a_prefix_costs_no_more_than_keys_and_values_of_prompts(
    build: Callable[[], PreTrainedModel], num_tokens: int
) -> None:
    for training in (False, True):
        prefix, prompts = (of_kind(kind, build, num_tokens, training, False) for kind in ("prefix", "token"))
        Ratio(prefix.flops, prompts.flops).check(1.0)
    prefix, prompts = (of_kind(kind, build, num_tokens, True, True) for kind in ("prefix", "token"))
    Ratio(prefix.saved, prompts.saved).check(1.0)


@pytest.mark.parametrize(
    ("build", "num_tokens", "megabytes"), [(vit_b16, 10, 74), (vit_b16, 200, 76), (swin_t, 50, 62)]
)
@pytest.mark.heavy
def test_what_training_keeps_of_an_image_hardly_grows_with_prompts(
    build: Callable[[], PreTrainedModel], num_tokens: int, megabytes: int
) -> None:
    """LoRA keeps 80.8 (ViT-B/16) and 69.2 MB (Swin-T), see docs/results.md."""
    kept = of_kind("token", build, num_tokens, True, True).saved / BATCH / 1e6
    print(f"{kept:.1f} MB")
    assert kept <= megabytes, f"expected at most {megabytes} MB, got {kept:.1f}"


def test_the_adapter_in_a_checkpoint_of_vit_b_takes_less_than_5_mb(tmp_path: Path) -> None:
    with prompted(vit_b16(), 50) as vpt:
        vpt.save_pretrained(tmp_path, state_dict=None)  # as Trainer does
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (tmp_path / "model.safetensors").stat().st_size > 2_000_000
    assert size < 5_000_000, f"{size:,} bytes"
