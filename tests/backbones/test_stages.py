"""Swin V2 and Hiera: what the table of families does not cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.families import Family, concatenated, difference, enlarge, run, some_images
from helpers.stage_families import HIERA, STAGE_FAMILIES, SWIN
from torch import Tensor, nn
from transformers import HieraConfig, HieraModel, Swinv2Config, Swinv2Model
from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention

from vpt_peft import (
    AutoVPTModelForImageClassification,
    PromptConfig,
    RouteError,
    UnsupportedModelError,
    VPTModel,
    check_architecture,
    get_vpt_model,
)

SWINV2, PADDED, HIERA_CLASSIFIER = (STAGE_FAMILIES[name] for name in ("swinv2", "swinv2_padded", "hiera"))
CONFIGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "tokens": {"route": "tokens"},
    "shallow": {"deep": False},
    "carried": {"layers_to_transform": [0, 1]},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_classifier = pytest.mark.parametrize("family", [SWINV2, HIERA_CLASSIFIER], ids=["swinv2", "hiera"])


def images(*size: int) -> Tensor:
    """Two images of a height and width."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(4))


def prompts_of(vpt: VPTModel) -> dict[int, Tensor]:
    """The prompts of each layer that has its own."""
    prompts: Any = vpt.adapters["default"].prompts
    return {int(name): parameter.detach() for name, parameter in prompts.named_parameters()}


@each_config
@pytest.mark.parametrize("family", [SWINV2, PADDED], ids=["window_4", "window_3"])
@pytest.mark.parametrize("size", [(36, 52), (30, 45), (64, 40), (12, 16)])
def test_images_of_any_size(family: Family, config: dict[str, Any], size: tuple[int, int]) -> None:
    """Odd numbers of patches are padded at the patch merging, and others than a multiple of the window in a layer."""
    model, vpt, pixel_values = family.bare(), family.prompted(**config), images(*size)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    ours, bare = run(vpt, pixel_values, family, **wanted), run(model, pixel_values, family, **wanted)
    with concatenated(family, model, prompts_of(vpt)):
        expected = run(model, pixel_values, family)
    assert difference([ours.logits], [expected.logits]) < 1e-4
    for name in ("hidden_states", "reshaped_hidden_states"):
        assert [state.shape for state in ours[name]] == [state.shape for state in bare[name]]
    assert [weights.shape[:3] for weights in ours.attentions] == [weights.shape[:3] for weights in bare.attentions]


def test_an_input_never_changes_the_next_ones_result() -> None:
    vpt = PADDED.prompted()
    sizes = (32, 12, 40, 32, 12)
    expected = {size: run(PADDED.prompted(), images(size, size), PADDED).logits for size in set(sizes)}
    for size in sizes:
        assert torch.equal(run(vpt, images(size, size), PADDED).logits, expected[size]), size


@each_config
def test_the_factor_of_cosine_attention_is_bounded_as_in_the_backbone(config: dict[str, Any]) -> None:
    """With a factor of 100 and heads of width 2, some tokens attend to masked ones, as they do in the backbone."""
    logits = []
    for scale in (4.0, 4.7, 6.0):  # e^4.7 > 100
        model = SWINV2.bare(num_heads=[6, 12]).double()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Swinv2SelfAttention):
                    module.logit_scale.fill_(scale)
        vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=3, **config)).eval())
        logits.append(run(vpt, some_images().double(), SWINV2).logits)
        prompts = {layer: prompts.double() for layer, prompts in prompts_of(vpt).items()}
        vpt.unload()
        with concatenated(SWINV2, model, prompts):
            assert difference([logits[-1]], [run(model, some_images().double(), SWINV2).logits]) < 1e-4
    assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[0], logits[1])


def test_the_attention_to_a_prompt_is_that_to_an_image_token_without_position() -> None:
    model = SWINV2.bare()
    for module in model.modules():
        if isinstance(module, Swinv2SelfAttention):
            nn.init.zeros_(module.continuous_position_bias_mlp[2].weight)  # no pair has a position
    tokens: list[Tensor] = []
    first = SWINV2.find_layers(model)[0]
    handle = first.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    pixel_values = some_images()[:1, :, :16, :16]  # one window
    run(model, pixel_values, SWINV2)
    handle.remove()
    vpt = get_vpt_model(model, PromptConfig(num_tokens=1, layers_to_transform=[0], carry=False)).eval()
    with torch.no_grad():
        prompts_of(vpt)[0].copy_(tokens[0][0, 5:6])
    found: list[Tensor] = []
    first.attention.register_forward_hook(lambda *call: found.append(call[-1][1]))
    run(vpt, pixel_values, SWINV2, output_attentions=True)
    torch.testing.assert_close(found[0][..., 16], found[0][..., 5])


@each_classifier
def test_gradient_checkpointing_recomputes_each_layer(family: Family) -> None:
    """The settings are those of the stages."""
    calls: list[Any] = []
    vpt = get_vpt_model(family.bare(), PromptConfig(num_tokens=3)).train()
    for layer in family.find_layers(vpt.get_base_model()):
        norm: Any = layer.layernorm_after
        norm.register_forward_pre_hook(lambda module, _: calls.append(module))
    vpt.gradient_checkpointing_enable()
    vpt(pixel_values=some_images()).logits.sum().backward()
    assert [calls.count(module) for module in dict.fromkeys(calls)] == [2, 2, 2, 2]


@each_classifier
def test_keys_and_values_are_cached_while_serving(family: Family) -> None:
    vpt = family.prompted()
    expected = run(vpt, some_images(), family).logits
    with vpt.serving():
        for _ in range(2):
            torch.testing.assert_close(run(vpt, some_images(), family).logits, expected, atol=1e-6, rtol=0)


@each_classifier
@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_prompts_start_as_tokens_of_images(family: Family, kind: str) -> None:
    vpt = get_vpt_model(family.bare(), PromptConfig(num_tokens=2, kind=kind)).eval()
    vpt.init_prompts([some_images()], method="mean")
    for layer in vpt.backbone.layers:
        own: Any = vpt.adapters["default"]
        values = own.prompts[layer.index] if kind == "token" else own.prefix[layer.index]["key"]
        assert values.shape == (2, layer.width if kind == "token" else layer.key_width)
        if kind == "prefix" and family is SWINV2:
            heads = values.unflatten(-1, (-1, layer.head_dim))
            torch.testing.assert_close(heads.norm(dim=-1), torch.ones(heads.shape[:-1]))
    assert torch.isfinite(run(vpt, some_images(), family).logits).all()


@each_classifier
def test_an_adapter_finds_its_backbone(family: Family, tmp_path: Path) -> None:
    family.bare().save_pretrained(tmp_path / "backbone")
    model = type(family.bare()).from_pretrained(tmp_path / "backbone")
    vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=3, bias="all")).eval())
    vpt.save_pretrained(tmp_path / "adapter")
    loaded = AutoVPTModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is type(model)
    assert torch.equal(run(loaded, some_images(), family).logits, run(vpt, some_images(), family).logits)


@pytest.mark.parametrize("build", [lambda: Swinv2Model(Swinv2Config(**SWIN)), lambda: HieraModel(HieraConfig(**HIERA))])
@pytest.mark.parametrize("pooling", ["default", "pooled", "image"])
def test_a_classifier_is_added_to_a_model_without_one(build: Any, pooling: str) -> None:
    model = build().eval()
    bare = run(model, some_images(), SWINV2)
    config = PromptConfig(num_tokens=3, kind="prefix", task_type="IMAGE_CLASSIFICATION", pooling=pooling)
    vpt = get_vpt_model(model, config, num_labels=5).eval()
    features = bare.last_hidden_state.mean(1) if pooling == "image" else bare.pooler_output
    with torch.no_grad():
        expected = vpt.adapters["default"].head.find("classifier")(features)
    torch.testing.assert_close(run(vpt, some_images(), SWINV2).logits, expected)


@pytest.mark.parametrize(
    ("config", "got"),
    [
        ({"route": "tokens"}, r"tokens in layers \[0, 1, 2, 3\]"),
        ({"deep": False}, r"tokens in layers \[0, 1, 2\]"),
        ({"layers_to_transform": [1, 3]}, r"tokens in layers \[1\]"),
        ({"pooling": "global"}, r"tokens in layers \[3\]"),
        ({"location": "add"}, 'location="add"'),
        ({"location": "channel", "deep": False}, 'location="channel"'),
    ],
)
def test_prompts_that_are_more_than_keys_and_values_are_refused_on_hiera(config: dict[str, Any], got: str) -> None:
    model = HIERA_CLASSIFIER.bare()
    reason = "keys and values only .* since some layers pool the tokens of a mask unit and change their width; got "
    with pytest.raises(RouteError, match=f"{reason}.*{got}.*Use "):
        get_vpt_model(model, PromptConfig(num_tokens=3, **config))
    assert run(model, some_images(), HIERA_CLASSIFIER).logits.shape == (3, 5)
    get_vpt_model(model, PromptConfig(num_tokens=0))


@each_classifier
def test_an_attention_with_other_code_is_refused(family: Family) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    for change in ("class", "instance"):
        model = family.bare()
        layer = family.find_layers(model)[1]
        caller: Any = layer.attn if family is HIERA_CLASSIFIER else layer.attention.self
        if change == "class":
            caller.__class__ = type("Mine", (type(caller),), {"forward": forward})
        else:
            caller.forward = forward.__get__(caller)
        with pytest.raises(UnsupportedModelError, match=r"attention of layer 1 .* with other code, .*forward"):
            get_vpt_model(model, PromptConfig(num_tokens=3))
        assert all(parameter.requires_grad for parameter in model.parameters())


@each_classifier
def test_hooks_of_accelerate_on_the_attention_are_accepted(family: Family) -> None:
    model = family.bare()
    for layer in family.find_layers(model):
        add_hook_to_module(layer.attn if family is HIERA_CLASSIFIER else layer.attention.self, ModelHook())
    vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=3)).eval())
    assert torch.equal(run(vpt, some_images(), family).logits, run(family.prompted(), some_images(), family).logits)


@each_classifier
def test_windows_are_reported_as_not_compared(family: Family) -> None:
    report = check_architecture(family.bare())
    assert report.agrees is None
    assert str(report).count("not compared") == 3
    assert ("keys and values only" in str(report)) == family.key_value_only
