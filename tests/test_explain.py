"""What prompts do to the attention: against weights computed by hand, and against those that backbones return."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from helpers.families import all_families, concatenated, each_family, some_images
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import Tiny, tiny_beit, tiny_beit_segmenter, tiny_swin, tiny_upernet, tiny_vit
from helpers.plots import assert_is_plot
from PIL import Image
from torch import Tensor, nn
from transformers import ViTImageProcessorPil, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.swin.modeling_swin import window_partition, window_reverse

from vpt_peft import (
    AdapterError,
    CheckpointError,
    ImageError,
    PromptConfig,
    RouteError,
    UnsupportedModelError,
    VPTModel,
    get_vpt_model,
)
from vpt_peft.explanation import Explanation, LayerAttention, draw_explanation, explain, explain_attention
from vpt_peft.images.processors import read_processor

FAMILIES = all_families()
QUERIES = {  # families whose layers are plain, and what their heads read
    "vit": "class", "deit": "class", "msn": "class", "dinov2": "class", "dinov2_registers": "class",
    "vit_masked": "patches", "ijepa": "patches", "clip_vision": "class", "clip_classifier": "patches",
    "siglip_classifier": "patches",
}  # fmt: skip


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[list[Any]]:
    """A list of the outputs of modules, in the order in which they are called."""
    outputs: list[Any] = []
    handles = [module.register_forward_hook(lambda _, inputs, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list of the inputs of a module."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def by_heads(tokens: Tensor, num_heads: int) -> Tensor:
    return tokens[0].unflatten(-1, (num_heads, -1)).transpose(0, 1)


def read(weights: Tensor, query: str, num_prefix_tokens: int, num_patches: int) -> Tensor:
    """The mean over the reading tokens of weights ``(num_heads, queries, keys)``."""
    first = num_prefix_tokens
    return weights[:, 0] if query == "class" else weights[:, first : first + num_patches].mean(1)


def assert_equal(ours: LayerAttention, prefix_tokens: Tensor, prompts: Tensor, patches: Tensor) -> None:
    assert ours.patches.shape == (4, 4, 4)
    for own, expected in ((ours.prefix_tokens, prefix_tokens), (ours.prompts, prompts), (ours.patches, patches)):
        torch.testing.assert_close(own.flatten(1), expected.float(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("config", [{}, {"route": "tokens"}, {"deep": False}], ids=["deep", "tokens", "shallow"])
@pytest.mark.parametrize("name", QUERIES)
def test_weights_are_the_softmax_of_queries_and_keys(name: str, config: dict[str, Any]) -> None:
    family, images = FAMILIES[name], some_images()[:1]
    vpt = family.prompted(**config)
    explanation = explain_attention(vpt, images)
    assert explanation.query == QUERIES[name]
    assert explanation.layers == (0, 1, 2)

    prompts = {int(layer): tensor.detach() for layer, tensor in vpt.adapters["default"].prompts.named_parameters()}
    vpt.unload()
    for ours, inserted in ((explanation.with_adapter, prompts), (explanation.without_adapter, {})):
        model = family.bare()
        named = dict(model.get_submodule(family.layers).named_modules())
        queries, keys = (
            outputs_of(*(module for path, module in named.items() if path.endswith(names)))
            for names in ((".q_proj", ".query"), (".k_proj", ".key"))
        )
        with queries as query_outputs, keys as key_outputs, concatenated(family, model, inserted), torch.no_grad():
            model(images)
        first, number = family.num_prefix_tokens, 3 if inserted else 0
        for own, query, key in zip(ours, query_outputs, key_outputs, strict=True):
            query, key = by_heads(query, 4), by_heads(key, 4)
            weights = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
            mean = weights[:, 0] if QUERIES[name] == "class" else weights[:, first + number :].mean(1)
            prefix_tokens, own_prompts, patches = mean.split([first, number, 16], dim=1)
            assert_equal(own, prefix_tokens, own_prompts, patches)
            share = float(own_prompts.sum(1).mean()) if inserted else None
            assert own.prompt_share == pytest.approx(share, abs=1e-6)


@each_family(
    lambda family: (
        family.feed is None and family.reference is None and not family.model_class.startswith(("Data2Vec", "Timm"))
    )
)
@pytest.mark.parametrize("config", [{}, {"deep": False}], ids=["deep", "shallow"])
def test_weights_are_those_that_the_backbone_returns(family: Any, config: dict[str, Any]) -> None:
    images = some_images()[:1]
    vpt = family.prompted(**config)
    explanation = explain_attention(vpt, images, **family.inputs)
    vpt.base_model.set_attn_implementation("eager")
    modules = [layer.part("caller") for layer in vpt.backbone.layers]
    for ours, disabled, number in ((explanation.with_adapter, False, 3), (explanation.without_adapter, True, 0)):
        with outputs_of(*modules) as outputs, torch.no_grad():
            if disabled:
                with vpt.disable_adapter():
                    vpt(images, output_attentions=True, **family.inputs)
            else:
                vpt(images, output_attentions=True, **family.inputs)
        assert len(outputs) == len(ours)
        for own, (_, weights) in zip(ours, outputs, strict=True):
            mean = read(weights[0], explanation.query, family.num_prefix_tokens, 16)
            sizes = [family.num_prefix_tokens, 16, vpt.backbone.num_suffix_tokens, number]
            prefix_tokens, patches, _, prompts = mean.split(sizes, dim=1)
            assert_equal(own, prefix_tokens, prompts, patches)


@pytest.mark.parametrize("name", ["data2vec", "siglip2_vision", "siglip2", "clip"])
def test_weights_of_all_tokens_add_up_to_one(name: str) -> None:
    family = FAMILIES[name]
    inputs = family.arguments(some_images()[:1])
    inputs = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    explanation = explain_attention(family.prompted(), **inputs)
    assert explanation.query == ("class" if name == "clip" else "patches")
    for layer in (*explanation.with_adapter, *explanation.without_adapter):
        total = layer.patches.sum((1, 2)) + layer.prefix_tokens.sum(1) + layer.prompts.sum(1)
        torch.testing.assert_close(total, torch.ones(4))
    assert [layer.prompts.shape[1] for layer in explanation.with_adapter] == [3, 3, 3]


@pytest.mark.parametrize("name", ["data2vec", "siglip2_vision"])
def test_position_biases_and_padding_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    inputs = family.arguments(some_images(seed=5)[:1])
    ours = explain_attention(family.prompted(), **inputs).without_adapter[0]
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    plain = nn.functional.scaled_dot_product_attention

    def keep(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        calls.append((query, key, kwargs))
        return plain(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", keep)
    with torch.no_grad():
        family.bare()(**inputs)
    query, key, options = calls[0]
    mask = options["attn_mask"]
    assert mask is not None
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias).softmax(-1)[0]
    first, number = family.num_prefix_tokens, ours.patches[0].numel()
    mean = read(weights, "patches", first, number)[:, first : first + number]
    torch.testing.assert_close(ours.patches.flatten(1), mean, atol=2e-6, rtol=1e-4)
    if name == "siglip2_vision":
        assert ours.patches.shape[1:] == tuple(inputs["spatial_shapes"][0].tolist())


# -- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["class", "patches"])
def test_the_share_of_a_prefix_compares_the_norms_of_both_outputs(query: str) -> None:
    vit = tiny_vit()
    vpt = vit.prompted(kind="prefix")
    ours = explain_attention(vpt, vit.pixel_values[:1], query=query)
    for layer, own in enumerate(ours.with_adapter):
        attention = vpt.backbone.layers[layer].part("attention")
        with outputs_of(attention.q_proj, attention.k_proj, attention.v_proj) as outputs, torch.no_grad():
            vpt(vit.pixel_values[:1])
        q, k, v = (by_heads(output, 4) for output in outputs)
        pair = vpt.adapters["default"].prefix[layer]
        prefix_key, prefix_value = (by_heads(pair[part].detach()[None], 4) for part in ("key", "value"))
        to_image = torch.softmax(q @ k.transpose(1, 2) / 6**0.5, dim=-1)
        of_image = (to_image @ v).transpose(0, 1).flatten(1)
        of_prefix = (torch.softmax(q @ prefix_key.transpose(1, 2) / 6**0.5, dim=-1) @ prefix_value).transpose(0, 1)
        image, prefix = of_image.norm(dim=1), of_prefix.flatten(1).norm(dim=1)
        shares = prefix / (image + prefix)
        assert own.prompt_share == pytest.approx(float(shares[0] if query == "class" else shares[1:].mean()), abs=1e-5)
        assert own.prompts.shape == (4, 0)
        mean = read(to_image, query, 1, 16)
        assert_equal(own, mean[:, :1], mean[:, :0], mean[:, 1:])


@pytest.mark.parametrize("name", ["dinov3", "sapiens2", "internvl", "data2vec", "blip2", "siglip2_vision", "swin"])
def test_the_share_of_a_prefix_is_that_of_what_it_adds(name: str) -> None:
    if name == "swin":
        swin = tiny_swin()
        vpt, inputs = swin.prompted(kind="prefix"), {"pixel_values": swin.pixel_values[:1]}
    else:
        vpt, inputs = FAMILIES[name].prompted(kind="prefix"), FAMILIES[name].arguments(some_images()[:1])
    last = len(vpt.backbone.layers) - 1
    explanation = explain_attention(vpt, **inputs, query="patches")
    projection = vpt.backbone.layers[last].part("o_proj")
    with inputs_of(projection) as outputs, torch.no_grad():
        vpt(**inputs)
        vpt.adapters["default"].prefix[last]["value"].zero_()
        vpt(**inputs)
    total, of_image = (output.flatten(0, 1) for output in outputs)
    shares = (total - of_image).norm(dim=-1) / (of_image.norm(dim=-1) + (total - of_image).norm(dim=-1))
    first = vpt.backbone.num_prefix_tokens
    number = explanation.with_adapter[-1].patches[0].numel()
    assert explanation.with_adapter[-1].prompt_share == pytest.approx(
        float(shares[first : first + number].mean()), abs=1e-5
    )
    assert explain_attention(vpt, **inputs).with_adapter[-1].prompt_share == 0.0


def test_a_new_prefix_has_no_share_and_leaves_the_attention_as_it_is() -> None:
    vit = tiny_vit()
    vpt = get_vpt_model(vit.model, PromptConfig(kind="prefix"))
    explanation = explain_attention(vpt, vit.pixel_values[:1])
    for own, bare in zip(explanation.with_adapter, explanation.without_adapter, strict=True):
        assert own.prompt_share == 0.0 and bare.prompt_share is None
        assert torch.equal(own.patches, bare.patches)


# -- windows ----------------------------------------------------------------------------------------------------------


def put_back(weights: Tensor, height: int, width: int, size: int, shift: int, number: int) -> tuple[Tensor, Tensor]:
    """The mean over all patches of what they give to patches ``(num_heads, height, width)`` and to prompts, from the
    weights in windows, with the functions that Swin itself has for windows."""
    padded = (height + -height % size, width + -width % size)
    real = torch.zeros(1, *padded, 1)
    real[:, :height, :width] = 1
    reading = window_partition(real.roll((-shift, -shift), (1, 2)), size).flatten(1)[:, None, :, None]
    given = (weights * reading).sum(2) / (height * width)
    windows = given[..., : size * size].transpose(1, 2).unflatten(1, (size, size))
    image = window_reverse(windows, size, *padded).roll((shift, shift), (1, 2))[0, :height, :width]
    return image.permute(2, 0, 1), given[..., size * size :].sum(0)


@pytest.mark.parametrize(
    ("build", "size"),
    [(tiny_swin, 64), (tiny_swin, 72), (tiny_swin, 32), (tiny_upernet, 64), (tiny_upernet, 80), (tiny_upernet, 16)],
)
@pytest.mark.parametrize("config", [{}, {"deep": False}], ids=["deep", "shallow"])
def test_windows_of_swin_are_put_back_in_place(build: Callable[..., Tiny], size: int, config: dict[str, Any]) -> None:
    tiny = build(**({"image_size": size} if build is tiny_swin else {}))
    images = torch.randn(1, 3, size, size)
    vpt = tiny.prompted(**config).eval()
    explanation = explain_attention(vpt, images)
    assert explanation.query == "patches"
    vpt.base_model.set_attn_implementation("eager")
    callers = [layer.part("caller") for layer in vpt.backbone.layers]
    with outputs_of(*callers) as outputs, torch.no_grad():
        vpt(images)
        with vpt.disable_adapter():
            vpt(images)
    both = (*explanation.with_adapter, *explanation.without_adapter)
    assert len(outputs) == len(both)
    shifts = [layer.module.shift_size for layer in vpt.backbone.layers] * 2
    stages = [index for index, depth in enumerate(depths(vpt)) for _ in range(depth)] * 2
    for own, (_, weights), shift, stage in zip(both, outputs, shifts, stages, strict=True):
        side = -(-size // 4 // 2**stage)
        window = 4 if build is tiny_upernet else min(4, side)
        shift = 0 if side <= 4 and build is tiny_swin else shift
        image, prompts = put_back(weights, side, side, window, shift, 5)
        torch.testing.assert_close(own.patches, image, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(own.prompts, prompts, atol=2e-6, rtol=1e-4)


def depths(vpt: VPTModel) -> list[int]:
    return list(vpt.backbone.encoder.config.depths)


def test_swin_keeps_its_settings_on_images_as_small_as_a_window() -> None:
    swin = tiny_swin(image_size=32)
    vpt = swin.prompted()
    shifts = [layer.module.shift_size for layer in vpt.backbone.layers]
    explain_attention(vpt, torch.randn(1, 3, 32, 32))
    assert [layer.module.shift_size for layer in vpt.backbone.layers] == shifts


# -- the model is unchanged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "of_the_user"])
def test_the_result_does_not_depend_on_the_attention_implementation_which_stays(
    vit: Tiny, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def of_the_user(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        calls.append(query)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "of_the_user", of_the_user)
    vpt = vit.prompted()
    expected = explain_attention(vpt, vit.pixel_values[:1])
    vit.model.set_attn_implementation(implementation)
    before = snapshot(vpt)
    ours = explain_attention(vpt, vit.pixel_values[:1])
    assert_unchanged(before, snapshot(vpt))
    assert vit.model.config._attn_implementation == implementation
    assert_same_explanation(ours, expected)
    assert calls == []


def assert_same_explanation(ours: Explanation, theirs: Explanation) -> None:
    pairs = zip(ours.with_adapter + ours.without_adapter, theirs.with_adapter + theirs.without_adapter, strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own.patches, other.patches)
        assert own.prompt_share == (None if other.prompt_share is None else pytest.approx(other.prompt_share))


@pytest.mark.parametrize("config", [{}, {"kind": "prefix"}, {"bias": "all"}, {"deep": False}])
def test_the_model_is_unchanged_also_while_it_trains(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt = tiny.prompted(**config).train()
    tiny.model.set_attn_implementation("eager")
    before = snapshot(vpt)
    explain_attention(vpt, tiny.pixel_values[:1])
    assert_unchanged(before, snapshot(vpt))
    assert vpt.training
    assert not any(parameter.grad is not None for parameter in vpt.parameters())


def test_an_error_in_the_model_leaves_it_unchanged(vit: Tiny) -> None:
    vpt = vit.prompted()
    vit.model.set_attn_implementation("eager")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    before = snapshot(vpt)
    with pytest.raises(ValueError, match="size"):
        explain_attention(vpt, torch.randn(1, 3, 40, 40))
    handle = vpt.backbone.layers[1].part("attention").q_proj.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        explain_attention(vpt, vit.pixel_values[:1])
    handle.remove()
    assert_unchanged(before, snapshot(vpt))
    assert not vpt.training


def test_half_precision_is_explained_in_float32(vit: Tiny) -> None:
    vpt = vit.prompted(kind="prefix")
    expected = explain_attention(vpt, vit.pixel_values[:1])
    vit.model.to(torch.bfloat16)
    ours = explain_attention(vpt, vit.pixel_values[:1])
    for own, other in zip(ours.with_adapter, expected.with_adapter, strict=True):
        assert own.patches.dtype == torch.float32
        torch.testing.assert_close(own.patches, other.patches, atol=0.05, rtol=0.1)
        assert own.prompt_share == pytest.approx(other.prompt_share, abs=0.03)
    vit.model.float()


def test_an_image_of_another_size_has_another_grid(vit: Tiny) -> None:
    images = torch.randn(1, 3, 48, 64)
    explanation = explain_attention(vit.prompted(), images, interpolate_pos_encoding=True)
    assert explanation.with_adapter[0].patches.shape == (4, 6, 8)


def test_the_adapter_that_is_active_is_explained_and_layers_come_in_the_order_asked_for(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    first = explain_attention(vpt, vit.pixel_values[:1])
    vpt.set_adapter("other")
    ours = explain_attention(vpt, vit.pixel_values[:1], layers=[3, 1])
    assert (ours.adapter_name, ours.layers) == ("other", (3, 1))
    assert [layer.prompts.shape[1] for layer in ours.with_adapter] == [2, 2]
    assert torch.equal(ours.without_adapter[0].patches, first.without_adapter[3].patches)
    assert torch.equal(ours.without_adapter[1].patches, first.without_adapter[1].patches)


# -- what heads read, and what has no share ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "config", "query"),
    [
        (tiny_vit, {}, "class"),
        (tiny_vit, {"pooling": "image"}, "patches"),
        (tiny_vit, {"pooling": "global"}, "patches"),
        (tiny_vit, {"pooling": "prompt"}, "class"),
        (tiny_beit, {}, "patches"),
        (lambda: tiny_beit(use_mean_pooling=False), {}, "class"),
        (tiny_beit_segmenter, {}, "patches"),
        (tiny_swin, {}, "patches"),
    ],
)
def test_the_query_is_what_the_head_reads(build: Callable[[], Tiny], config: dict[str, Any], query: str) -> None:
    tiny = build()
    explanation = explain_attention(tiny.prompted(**config), tiny.pixel_values[:1], layers=[0])
    assert explanation.query == query


@pytest.mark.parametrize(
    ("pooling", "query"), [("default", "class"), ("class_and_image", "class"), ("image", "patches")]
)
def test_the_query_of_an_added_classifier_is_what_it_reads(vit: Tiny, pooling: str, query: str) -> None:
    model = ViTModel(vit.model.config)
    config = PromptConfig(task_type="IMAGE_CLASSIFICATION", pooling=pooling)
    explanation = explain_attention(get_vpt_model(model, config, num_labels=3), vit.pixel_values[:1])
    assert explanation.query == query


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        ({"num_tokens": 0}, [False] * 4),
        ({"location": "add"}, [False] * 4),
        ({"layers_to_transform": [1], "carry": False}, [False, True, False, False]),
        ({"layers_to_transform": [1]}, [False, True, True, True]),
        ({"location": "pixel"}, [True] * 4),
        ({"location": "channel", "deep": False}, [False] * 4),
        ({"kind": "prefix", "layers_to_transform": [0, 2]}, [True, False, True, False]),
    ],
)
def test_layers_without_prompts_in_their_attention_have_no_share(
    vit: Tiny, config: dict[str, Any], shares: list[bool]
) -> None:
    explanation = explain_attention(vit.prompted(**config), vit.pixel_values[:1])
    assert [layer.prompt_share is not None for layer in explanation.with_adapter] == shares
    assert [layer.prompt_share for layer in explanation.without_adapter] == [None] * 4


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "must be one image, got 2"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"shape \(num_images, num_channels, height, width\), got"),
        ({"pixel_values": "rose.jpg"}, r"got 'rose.jpg'. Use the image processor"),
        ({"layers": []}, r"must be None or a list of layer numbers, got \[\]"),
        ({"layers": 3}, "must be None or a list of layer numbers, got 3"),
        ({"layers": [True]}, "must be None or a list of layer numbers"),
        ({"layers": [0, 4]}, r"different numbers from 0 to 3, the layers that the head reads, got \[0, 4\]"),
        ({"layers": [-1]}, r"different numbers from 0 to 3, the layers that the head reads, got \[-1\]"),
        ({"layers": [1, 1]}, r"different numbers from 0 to 3, the layers that the head reads, got \[1, 1\]"),
        ({"query": "cls"}, "query must be None, 'class' or 'patches', got 'cls'"),
    ],
)
def test_bad_arguments_are_named(vit: Tiny, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        explain_attention(vit.prompted(), **{"pixel_values": vit.pixel_values[:1], **arguments})


def test_what_cannot_be_explained_says_why(vit: Tiny) -> None:
    with pytest.raises(AdapterError, match="must be a VPTModel, got ViTForImageClassification"):
        explain_attention(vit.model, vit.pixel_values[:1])  # type: ignore[arg-type]
    swin = tiny_swin()
    with pytest.raises(AdapterError, match=r"\[CLS\], which SwinForImageClassification does not have"):
        explain_attention(swin.prompted(), swin.pixel_values[:1], query="class")
    padded = FAMILIES["siglip2_vision"]
    inputs = padded.arguments(some_images()[:1])
    with pytest.raises(AdapterError, match="spatial_shapes must be a tensor of shape"):
        explain_attention(padded.prompted(), inputs["pixel_values"])
    vpt = vit.prompted(location="border", deep=False, num_tokens=4)
    with pytest.raises(RouteError, match="needs larger images than the adapter"):
        explain_attention(vpt, vit.pixel_values[:1, :, 4:-4, 4:-4])
    vpt.unload()
    unloaded = vit.prompted()
    unloaded.unload()
    with pytest.raises(AdapterError, match="was unloaded"):
        explain_attention(unloaded, vit.pixel_values[:1])


@pytest.mark.parametrize("name", ["swinv2", "hiera", "videomae"])
def test_models_without_a_map_of_attention_are_refused(name: str) -> None:
    family = all_families()[name]
    with pytest.raises(UnsupportedModelError, match=f"got a {family.model_class}, which is explained by no map"):
        explain_attention(family.prompted(), some_images()[:1])


def test_attention_that_is_computed_in_another_way_is_refused(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", by_hand)
    with pytest.raises(UnsupportedModelError, match=r"but layer 0 \(ViTAttention\) did not"):
        explain_attention(vit.prompted(), vit.pixel_values[:1])


# -- the picture ------------------------------------------------------------------------------------------------------


def some_picture(size: int = 32) -> Image.Image:
    return Image.effect_mandelbrot((size, size), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.mark.parametrize(("config", "words"), [({}, "to prompts"), ({"kind": "prefix"}, "from the prefix")])
def test_the_picture_shows_layers_and_shares(vit: Tiny, tmp_path: Path, config: dict[str, Any], words: str) -> None:
    explanation = explain_attention(vit.prompted(**config), vit.pixel_values[:1], layers=[0, 2, 3])
    draw_explanation(explanation, some_picture(), tmp_path / "new" / "picture.png")
    assert_is_plot(tmp_path / "new" / "picture.png")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_explanation(explanation, some_picture(), tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    for layer, own in zip(explanation.layers, explanation.with_adapter, strict=True):
        assert f">layer {layer}<" in drawn
        assert own.prompt_share is not None
        assert f">{100 * own.prompt_share:.0f} % {words}<" in drawn
    for label in ("with the adapter", "without", "Attention of [CLS] to the image"):
        assert f">{label}<" in drawn


def test_the_picture_of_layers_without_prompts_says_so(vit: Tiny, tmp_path: Path) -> None:
    explanation = explain_attention(vit.prompted(num_tokens=0), vit.pixel_values[:1])
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_explanation(explanation, some_picture(), tmp_path / "picture.svg", title="Roses")
    drawn = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert drawn.count(">no prompts<") == 4 and ">Roses<" in drawn and "Attention of" not in drawn


def test_maps_of_different_resolutions_are_drawn_side_by_side(tmp_path: Path) -> None:
    swin = tiny_swin()
    explanation = explain_attention(swin.prompted(), swin.pixel_values[:1])
    assert [layer.patches.shape[1:] for layer in explanation.with_adapter] == [(16, 16)] * 2 + [(8, 8)] * 2
    draw_explanation(explanation, some_picture(64), tmp_path / "swin.png")
    assert_is_plot(tmp_path / "swin.png")


def test_a_layer_with_few_bright_patches_leaves_the_others_their_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layer(patches: Tensor) -> LayerAttention:
        return LayerAttention(patches / patches.sum((1, 2), keepdim=True), torch.zeros(2, 1), torch.zeros(2, 3), 0.1)

    smooth = layer(0.5 + torch.rand(2, 14, 14))
    bright = torch.zeros(2, 14, 14) + 0.01
    bright[:, 3, 3:8] = 1
    explanation = Explanation("default", "token", "class", (0, 1, 2), (smooth,) * 3, (smooth, smooth, layer(bright)))
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    draw_explanation(explanation, some_picture(), tmp_path / "picture.png")
    scales = {panel.images[1].norm.vmax for panel in drawn[0].axes if len(panel.images) == 2}
    assert len(scales) == 1 and 1 <= scales.pop() < 2


def test_bad_pictures_are_named(vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = explain_attention(vit.prompted(), vit.pixel_values[:1])
    with pytest.raises(AdapterError, match=r"one of the suffixes .*\.png.*, got '.*picture.txt'"):
        draw_explanation(explanation, some_picture(), tmp_path / "picture.txt")
    with pytest.raises(AdapterError, match=r"must be a PIL image, got <class 'torch.Tensor'>"):
        draw_explanation(explanation, vit.pixel_values[0], tmp_path / "picture.png")  # type: ignore[arg-type]
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs matplotlib .*: pip install matplotlib"):
        draw_explanation(explanation, some_picture(), tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


# -- from a file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    some_picture(50).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_an_image_file_is_explained_by_a_model(vit: Tiny, photo: Path, tmp_path: Path) -> None:
    vpt = vit.prompted()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    ours = explain(vpt, photo, output=tmp_path / "out.png", image_processor=processor)
    assert_is_plot(tmp_path / "out.png")
    pixel_values = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    assert_same_explanation(ours, explain_attention(vpt, pixel_values))
    assert ours.layers == (0, 1, 2, 3)
    larger = ViTImageProcessorPil(size={"height": 40, "width": 48})
    ours = explain(vpt, photo, [1], tmp_path / "out.png", query="patches", image_processor=larger)
    assert (ours.layers, ours.query, ours.with_adapter[0].patches.shape) == ((1,), "patches", (4, 5, 6))


def test_the_title_says_what_the_image_is_classified_as(vit: Tiny, photo: Path, tmp_path: Path) -> None:
    vit.model.config.id2label = {label: f"flower {label}" for label in range(7)}
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    pixel_values = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    for task, problem_type, ending in (
        ("IMAGE_CLASSIFICATION", None, ", classified as flower {}"),
        ("IMAGE_CLASSIFICATION", "multi_label_classification", ""),
    ):
        vit.model.config.problem_type = problem_type
        vpt = vit.prompted(task_type=task)
        with torch.no_grad():
            best = int(vpt(pixel_values).logits.argmax())
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            explain(vpt, photo, output=tmp_path / "out.svg", image_processor=processor)
        title = f">Attention of [CLS] to the image{ending.format(best)}<"
        assert title in (tmp_path / "out.svg").read_text(encoding="utf-8")
        vpt.unload()


def test_four_layers_are_drawn_of_a_deep_model(photo: Path, tmp_path: Path) -> None:
    vit = tiny_vit(num_hidden_layers=12)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    ours = explain(vit.prompted(), photo, output=tmp_path / "out.png", image_processor=processor)
    assert ours.layers == (0, 4, 7, 11)


def test_an_adapter_is_explained_with_its_backbone_and_processor(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    processor = read_processor(checkpoint)
    vpt = get_vpt_model(ViTForImageClassification.from_pretrained(checkpoint), PromptConfig(num_tokens=2))
    vpt.save_pretrained(tmp_path / "without")
    own = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.9] * 3, image_std=[0.1] * 3)
    vpt.save_pretrained(tmp_path / "with", image_processor=own)
    for name, prepare, options in (("without", processor, {"interpolate_pos_encoding": True}), ("with", own, {})):
        ours = explain(str(tmp_path / name), photo, output=tmp_path / f"{name}.png")
        pixel_values = prepare(Image.open(photo), return_tensors="pt")["pixel_values"]
        assert pixel_values.shape[-1] == (224 if name == "without" else 16)
        assert_same_explanation(ours, explain_attention(vpt, pixel_values, **options))
        assert (tmp_path / f"{name}.png").is_file()


def test_a_photo_is_turned_upright(vit: Tiny, tmp_path: Path) -> None:
    upright = some_picture(32).crop((0, 0, 32, 20))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when it is shown
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    processor, vpt = ViTImageProcessorPil(size={"height": 32, "width": 32}), vit.prompted()
    files = [tmp_path / name for name in ("upright.png", "turned.png")]
    ours, turned = (explain(vpt, file, output=tmp_path / "out.png", image_processor=processor) for file in files)
    assert_same_explanation(turned, ours)


def test_bad_files_are_named(vit: Tiny, photo: Path, tmp_path: Path) -> None:
    vpt, processor = vit.prompted(), ViTImageProcessorPil(size={"height": 32, "width": 32})
    output = tmp_path / "out.png"
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:100])
    Image.new("I;16", (32, 32), 3000).save(tmp_path / "deep.png")
    for file, error, message in (
        ("missing.png", FileNotFoundError, r"missing.png"),
        ("broken.png", ImageError, r"broken.png' cannot be read as an image .*Repair or remove it"),
        ("deep.png", ImageError, "deep.png' cannot be used: images must have 8 bits per channel, got mode I"),
    ):
        with pytest.raises(error, match=message):
            explain(vpt, tmp_path / file, output=output, image_processor=processor)
    with pytest.raises(AdapterError, match=r"suffixes .*\.png.*, got '.*out'"):
        explain("no-such-adapter", photo, output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="Pass image_processor"):
        explain(vpt, photo, output=output)
    assert not output.exists()
