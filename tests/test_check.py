"""check_architecture: declarations that are right, and ones that are wrong although all their parts exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.dense_families import DENSE_FAMILIES
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import BUILDERS, Tiny, tiny_beit, tiny_vit

from vpt_peft import Architecture, Head, UnsupportedModelError, check_architecture, register_architecture
from vpt_peft.backbones import ARCHITECTURES

HEADS = {"ViTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",))}


def test_the_declaration_of_vit_agrees_in_all_ways_and_the_model_is_unchanged(vit: Tiny) -> None:
    before = snapshot(vit.model)
    report = check_architecture(vit.model)
    assert report.agrees is True
    assert list(report.ways) == ["VPT-Deep, keys and values", "VPT-Deep, tokens", "VPT-Shallow"]
    for name, way in report.ways.items():
        assert way.agrees, f"{name}: {way}"
        assert f"  {name}: agrees (difference" in str(report)
    assert_unchanged(before, snapshot(vit.model))


@pytest.mark.parametrize("name", ["yolos", "depth_anything", "vitpose", "vitpose_backbone"])
def test_models_without_logits_or_tokens_are_compared(name: str) -> None:
    assert check_architecture(DENSE_FAMILIES[name].bare()).agrees is True


def test_inputs_are_those_of_the_user(vit: Tiny) -> None:
    images = torch.randn(1, 3, 64, 64)
    assert check_architecture(vit.model, pixel_values=images, interpolate_pos_encoding=True).agrees


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"norm": "layernorm_after", "mlp_norm": "layernorm_before"}, 3),
        ({"q_proj": "k_proj", "k_proj": "q_proj"}, 3),
        ({"k_proj": "v_proj", "v_proj": "k_proj"}, 3),
        ({"v_proj": "o_proj", "o_proj": "v_proj"}, 3),
        ({"mlp": ("mlp.fc1", "mlp.fc2")}, 2),  # without the activation; it has no part in keys and values
    ],
)
def test_a_declaration_that_mixes_up_parts_is_found(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], wrong: int
) -> None:
    vit = tiny_vit(intermediate_size=48)
    monkeypatch.setitem(ARCHITECTURES, "vit", [])
    register_architecture(Architecture("vit", HEADS, **change))
    report = check_architecture(vit.model)
    assert report.agrees is False
    assert [way.agrees for way in report.ways.values()].count(False) >= wrong - 1, report
    assert "DIFFERS (difference" in str(report)


def test_a_layer_scale_that_was_mixed_up_is_found_although_both_are_alike_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beit = tiny_beit(use_shared_relative_position_bias=False)
    heads = {
        "BeitForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",), pooled_norm="beit.pooler.layernorm")
    }
    for scales, agrees in ((("lambda_1", "lambda_2"), True), (("lambda_2", "lambda_1"), False)):
        monkeypatch.setitem(ARCHITECTURES, "beit", [])
        register_architecture(
            Architecture(
                "beit",
                heads,
                attention_scale=scales[0],
                mlp_scale=scales[1],
                unused=("relative_position_bias",),
            )
        )
        assert check_architecture(beit.model).ways["VPT-Shallow"].agrees is agrees


def test_windows_are_reported_as_not_compared() -> None:
    report = check_architecture(BUILDERS["swin"]().model)
    assert report.agrees is None
    assert str(report).count("not compared: its layers do not take further tokens") == 3


def test_what_is_not_declared_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        check_architecture(torch.nn.Linear(2, 2))
