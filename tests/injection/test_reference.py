"""Agreement with the numbers of the authors' implementation (Jia et al., ECCV 2022)."""

from __future__ import annotations

import pytest
import torch
from helpers.reference_cases import Case, load_case

from vpt_peft import PromptConfig, VPTModel, get_adapter_state_dict, get_vpt_model, set_adapter_state_dict

TOLERANCE = 1e-5
CASES = {
    "vit_shallow": {"deep": False},
    "vit_deep": {},
    "vit_deep_project": {"projection_dim": 12},
    "vit_deep_first2_carried": {"layers_to_transform": [0, 1]},
    "vit_deep_first2_removed": {"layers_to_transform": [0, 1], "carry": False},
    "vit_deep_shared": {"shared": True},
    "vit_deep_img_pool": {"pooling": "image"},
    "vit_deep_prompt_pool": {"pooling": "prompt"},
    "vit_deep_imgprompt_pool": {"pooling": "global"},
    "vit_shallow_img_pool": {"deep": False, "pooling": "image"},
    "vit_shallow_prompt_pool": {"deep": False, "pooling": "prompt"},
    "vit_shallow_imgprompt_pool": {"deep": False, "pooling": "global"},
    "vit_prepend_pixel": {"location": "pixel", "deep": False},
    "swin_deep": {"pooling": "global"},
    "swin_shallow_batch1": {"deep": False, "pooling": "global"},
}
AT_OTHER_LOCATIONS = {
    "vit_add_deep": {"location": "add"},
    "vit_add_shallow": {"location": "add", "deep": False},
    "vit_add1_deep": {"location": "add-shared"},
    "vit_add1_shallow": {"location": "add-shared", "deep": False},
    "vit_pad": {"location": "border", "deep": False, "num_tokens": 4},
    "vit_below": {"location": "channel", "deep": False, "num_tokens": 2},
}
KEY_VALUE_EVERYWHERE = [
    "vit_deep", "vit_deep_project", "vit_deep_first2_removed", "vit_deep_shared", "vit_deep_img_pool",
]  # fmt: skip


def prompted(case: Case, **config: object) -> VPTModel:
    """The case's model with the case's prompts."""
    vpt = get_vpt_model(case.model, PromptConfig(**{"num_tokens": 5, **config}))  # type: ignore[arg-type]
    head = {name: tensor for name, tensor in get_adapter_state_dict(vpt).items() if name.startswith("head.")}
    set_adapter_state_dict(vpt, head | case.prompts)
    return vpt.eval()


def weighted_sum(logits: torch.Tensor) -> torch.Tensor:
    """The scalar whose gradients were recorded."""
    return (logits * torch.arange(1.0, logits.shape[1] + 1)).sum()


def check(vpt: VPTModel, case: Case) -> None:
    logits = vpt(case.pixel_values).logits
    torch.testing.assert_close(logits, case.logits, atol=TOLERANCE, rtol=0)
    weighted_sum(logits).backward()
    live = {name: tensor.grad for name, tensor in vpt.adapters["default"].state_dict(keep_vars=True).items()}
    assert case.gradients
    for name, gradient in case.gradients.items():
        torch.testing.assert_close(
            live[name], gradient, atol=TOLERANCE, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("route", ["auto", "tokens"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_prompt_gradients_agree_with_the_authors(name: str, route: str) -> None:
    case = load_case(name)
    check(prompted(case, **CASES[name], route=route), case)


@pytest.mark.parametrize("name", AT_OTHER_LOCATIONS)
def test_logits_and_gradients_of_prompts_at_other_locations_agree_with_the_authors(name: str) -> None:
    case = load_case(name)
    check(prompted(case, **AT_OTHER_LOCATIONS[name]), case)


@pytest.mark.parametrize("name", KEY_VALUE_EVERYWHERE)
def test_keys_and_values_alone_agree_with_the_authors(name: str) -> None:
    case = load_case(name)
    vpt = prompted(case, **CASES[name], route="key_value")
    assert set(vpt.routes.values()) == {"key_value"}
    check(vpt, case)


def test_prompts_in_the_last_layers_keep_every_image_token() -> None:
    """The authors' code overwrites the first image tokens with prompts there; ours must not agree with it."""
    case = load_case("vit_deep_last2")
    case.prompts = {f"prompts.{layer + 2}": case.prompts[f"prompts.{layer}"] for layer in range(2)}
    vpt = prompted(case, layers_to_transform=[2, 3])
    with torch.no_grad():
        ours = vpt(case.pixel_values).logits
        bare = vpt.get_base_model()(case.pixel_values).logits
    assert (ours - case.logits).abs().max() > 1e-3
    assert (ours - bare).abs().max() > 1e-3


def test_swin_shallow_does_not_mix_prompts_between_images() -> None:
    """The authors' Swin-Shallow does: only its numbers for one image alone are right."""
    case = load_case("swin_shallow_batch3")
    vpt = prompted(case, deep=False, pooling="global")
    with torch.no_grad():
        together = vpt(case.pixel_values).logits
        alone = torch.cat([vpt(image[None]).logits for image in case.pixel_values])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert (together - case.logits).abs().max() > 1e-3
