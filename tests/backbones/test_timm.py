"""Models of timm: which are refused and why, heads, labels, added classifiers, checkpointing, saving."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import NUM_LABELS, all_families, enlarge, randomized, some_images
from helpers.invariants import assert_unchanged, snapshot
from helpers.timm_families import EVA, VIT
from torch import nn

from vpt_peft import (
    AutoVPTModel,
    ConfigError,
    PromptConfig,
    RouteError,
    UnsupportedModelError,
    VPTModel,
    check_architecture,
    get_vpt_model,
)

timm: Any = pytest.importorskip("timm")
from timm.models.vision_transformer import (  # noqa: E402
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel  # noqa: E402

FAMILIES = all_families()


def classifier(architecture: str = "vit_tiny_patch16_224", num_labels: int = NUM_LABELS, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, num_labels=num_labels, model_args={**VIT, **sizes})
    return randomized(TimmWrapperForImageClassification(config)).eval()


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=some_images(), **kwargs).logits


def classify(model: Any, num_labels: int = NUM_LABELS, **config: Any) -> VPTModel:
    """The model with the classifier that the library adds."""
    config = {"num_tokens": 3, "task_type": "IMAGE_CLASSIFICATION", **config}
    return enlarge(get_vpt_model(model, PromptConfig(**config), num_labels=num_labels).eval())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [ResPostBlock, ParallelThingsBlock, ParallelScalingBlock, DiffParallelScalingBlock])
def test_other_layers_are_refused(block: type[nn.Module]) -> None:
    model = classifier(block_fn=block)
    with pytest.raises(
        UnsupportedModelError, match=f"expected layers of class Block with Attention, got {block.__name__}"
    ):
        get_vpt_model(model, PromptConfig())


@pytest.mark.parametrize(
    ("architecture", "sizes", "message"),
    [
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "got Block with DiffAttention. Use a model with such layers"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "got attn.norm. Use a model without it"),
        ("eva02_base_patch16_clip_224", EVA, "got attn.norm. Use a model without it"),
        ("eva02_enormous_patch14_clip_224", EVA, "got EvaBlockPostNorm with EvaAttention"),
        (
            "vit_small_patch16_rope_224",
            {**EVA, "qkv_fused": False, "num_kv_heads": 2},
            "expected as many heads of keys as of queries, got 2 and 4",
        ),
        ("resnet18", None, "supported with a model of class .*VisionTransformer.* inside, got ResNet"),
        ("swin_tiny_patch4_window7_224", None, "got SwinTransformer"),
    ],
)
def test_what_prompts_cannot_be_computed_in_is_refused(
    architecture: str, sizes: dict[str, Any] | None, message: str
) -> None:
    if sizes is None:
        model: Any = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=2))
    else:
        model = classifier(architecture, **sizes)
    with pytest.raises(UnsupportedModelError, match=message):
        get_vpt_model(model, PromptConfig())


def test_a_gate_on_the_attention_is_refused() -> None:
    model = classifier()
    attention = model.timm_model.blocks[1].attn
    attention.gate = nn.Linear(VIT["embed_dim"], VIT["embed_dim"])
    with pytest.raises(UnsupportedModelError, match=r"got attn\.gate"):
        get_vpt_model(model, PromptConfig())


def test_an_attention_that_does_not_call_the_function_of_torch_is_refused() -> None:
    model = classifier()
    for layer in model.timm_model.blocks:
        layer.attn.fused_attn = False
    with pytest.raises(UnsupportedModelError, match=r"got fused_attn=False. Call timm.layers.set_fused_attn\(True\)"):
        get_vpt_model(model, PromptConfig())


def test_a_model_of_timm_itself_is_refused_with_the_way_to_load_it() -> None:
    with pytest.raises(UnsupportedModelError, match=r"got timm's VisionTransformer itself. Load .*TimmWrapperConfig"):
        get_vpt_model(timm.create_model("vit_tiny_patch16_224", **VIT), PromptConfig())


def test_a_causal_attention_is_refused() -> None:
    with pytest.raises(RouteError, match="visible to all tokens, got is_causal=True"):
        logits(FAMILIES["timm_vit"].prompted(), is_causal=True)


def test_a_copy_of_a_projection_that_is_not_called_is_refused() -> None:
    for architecture, is_called in (("eva02_tiny_patch14_224", False), ("eva02_base_patch14_224", True)):
        model, name = classifier(architecture, **EVA), "q_proj" if is_called else "qkv"
        if is_called:
            assert get_vpt_model(model, PromptConfig(modules_to_save=[name]))
        else:
            with pytest.raises(ConfigError, match=r"modules that are called, got 'timm_model.blocks.0.attn.qkv'"):
                get_vpt_model(model, PromptConfig(modules_to_save=[name]))


# -- heads and labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("timm")])
def test_the_declaration_agrees_with_concatenation(name: str) -> None:
    report = check_architecture(FAMILIES[name].bare())
    assert report.agrees, report


def test_a_distilled_model_has_both_heads_of_its_own_and_answers_with_their_mean() -> None:
    vpt = FAMILIES["timm_deit_distilled"].prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2), num_labels=2)
    assert logits(vpt, adapter_names=["other", "default", "__base__"]).isneginf().sum(1).tolist() == [3, 0, 0]
    vpt.set_adapter("other")
    heads = [vpt.adapters["other"].replacement(f"timm_model.{path}") for path in ("head", "head_dist")]
    found: list[torch.Tensor] = []
    for head in heads:
        head.register_forward_hook(lambda _, args, output: found.append(output))
    torch.testing.assert_close(logits(vpt), (found[0] + found[1]) / 2)
    vpt.train()(pixel_values=some_images(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in vpt.adapters["other"].parameters())


@pytest.mark.parametrize("pooling", ["image", "prompt", "global"])
def test_both_heads_of_a_distilled_model_read_the_same_tokens(pooling: str) -> None:
    vpt = FAMILIES["timm_deit_distilled"].prompted(pooling=pooling)
    found: list[torch.Tensor] = []
    for path in ("head", "head_dist"):
        head: Any = vpt.adapters["default"].replacement(f"timm_model.{path}")
        head.register_forward_hook(lambda _, args, output: found.append(args[0]))
    logits(vpt)
    assert len(found) == 2 and torch.equal(*found)


@pytest.mark.parametrize(
    "name", ["vit", "vit_mean_of_patches", "vit_without_class_token", "siglip", "dinov2_registers", "eva02", "dinov3"]
)
def test_an_added_classifier_reads_what_a_classifier_of_timm_reads(name: str) -> None:
    source = FAMILIES[f"timm_{name}"].bare()
    config = TimmWrapperConfig(architecture=source.config.architecture, model_args=source.config.model_args)
    model = TimmWrapperModel(config).eval()
    weights = {key: value for key, value in source.state_dict().items() if not key.startswith("timm_model.head.")}
    model.load_state_dict(weights)
    for pooling in ("default", "image", "prompt", "global"):
        ours, theirs = (
            classify(model, pooling=pooling),
            get_vpt_model(source, PromptConfig(num_tokens=3, pooling=pooling)),
        )
        theirs = enlarge(theirs.eval())
        head: Any = ours.adapters["default"].replacement("classifier")
        with torch.no_grad():
            head.weight.copy_(source.timm_model.head.weight)
            head.bias.copy_(source.timm_model.head.bias)
        torch.testing.assert_close(
            logits(ours), logits(theirs), atol=1e-5, rtol=0, msg=lambda m, p=pooling: f"{p}: {m}"
        )
        if pooling == "default":
            ours.add_adapter("pooled", PromptConfig(num_tokens=3, pooling="pooled"), num_labels=NUM_LABELS)
            tensors = ours.get_adapter_state_dict("default")
            ours.adapters["pooled"].load_state_dict(tensors)
            names = ["pooled", "default", "pooled"]
            torch.testing.assert_close(logits(ours, adapter_names=names), logits(ours), atol=1e-5, rtol=0)
        ours.unload()
        theirs.unload()


@pytest.mark.parametrize("name", ["vit_model", "siglip_model", "eva02_model", "deit_distilled_model"])
def test_an_added_classifier_works_in_every_way(name: str, tmp_path: Path) -> None:
    family = FAMILIES[f"timm_{name}"]
    vpt = classify(family.bare(), bias="all")
    poolings = ["image", "prompt", "global", *(["class", "class_and_image"] if family.num_prefix_tokens else [])]
    for number, pooling in enumerate(poolings):
        config = PromptConfig(num_tokens=2, kind="token", deep=bool(number % 2), pooling=pooling)
        vpt.add_adapter(pooling, config, num_labels=3)
    names = ["default", *poolings]
    images = torch.cat([some_images(1), some_images(2)])[: len(names)]
    with torch.no_grad():
        mixed = vpt(pixel_values=images, adapter_names=names).logits
        for row, adapter in enumerate(names):
            vpt.set_adapter(adapter)
            alone = vpt(pixel_values=images[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row, : len(alone)], alone, atol=1e-5, rtol=0)
    vpt.set_adapter("default")
    expected = logits(vpt)
    vpt.save_pretrained(tmp_path)
    assert torch.equal(logits(VPTModel.from_pretrained(family.bare(), tmp_path)), expected)
    compiled: Any = torch.compile(vpt, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=0)
    gradients = []
    for checkpointing in (False, True):
        vpt.zero_grad()
        if checkpointing:
            vpt.gradient_checkpointing_enable()
        vpt.train()(pixel_values=some_images(), labels=torch.arange(3)).loss.backward()
        gradients.append({name: one.grad for name, one in vpt.named_parameters() if one.requires_grad})
    assert all(value is not None for value in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


def segment(model: Any, num_labels: int = NUM_LABELS, **config: Any) -> VPTModel:
    """The model with the decode head that the library adds."""
    config = {"num_tokens": 3, "task_type": "SEMANTIC_SEGMENTATION", **config}
    return enlarge(get_vpt_model(model, PromptConfig(**config), num_labels=num_labels).eval())


def without_head(name: str) -> Any:
    """A model of timm without a classifier, of an architecture whose classifier the tests know."""
    source = FAMILIES[f"timm_{name}"].bare()
    config = TimmWrapperConfig(architecture=source.config.architecture, model_args=source.config.model_args)
    return randomized(TimmWrapperModel(config)).eval()


@pytest.mark.parametrize(
    "name",
    [
        "vit", "vit_mean_of_patches", "vit_without_class_token", "siglip", "dinov2_registers", "deit_distilled",
        "eva02", "dinov3", "perception_encoder",
    ],
)  # fmt: skip
def test_an_added_decode_head_reads_the_token_of_each_patch_behind_its_norm(name: str) -> None:
    model = without_head(name)
    vpt, part = segment(model, num_tokens=0), model.timm_model
    with torch.no_grad():
        tokens = part.fc_norm(part.forward_features(some_images()))[:, part.num_prefix_tokens :]
        head: Any = vpt.adapters["default"].replacement("classifier")
        expected = head(tokens.transpose(1, 2).unflatten(2, (4, 4)))
    torch.testing.assert_close(logits(vpt), expected, atol=1e-5, rtol=0)
    assert expected.shape == (3, NUM_LABELS, 4, 4)


@pytest.mark.parametrize("name", ["vit_model", "siglip_model", "eva02_model", "deit_distilled_model"])
def test_an_added_decode_head_works_in_every_way(name: str, tmp_path: Path) -> None:
    family = FAMILIES[f"timm_{name}"]
    vpt = segment(family.bare(), bias="all")
    vpt.add_adapter("shallow", PromptConfig(num_tokens=2, deep=False), num_labels=3)
    vpt.add_adapter("prefix", PromptConfig(num_tokens=2, kind="prefix"), num_labels=5)
    names, images = ["default", "shallow", "prefix"], some_images()
    mixed = logits(vpt, adapter_names=names)
    with torch.no_grad():
        for row, adapter in enumerate(names):
            vpt.set_adapter(adapter)
            alone = vpt(pixel_values=images[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row, : len(alone)], alone, atol=1e-5, rtol=0)
    vpt.set_adapter("default")
    expected = logits(vpt)
    vpt.save_pretrained(tmp_path)
    assert torch.equal(logits(VPTModel.from_pretrained(family.bare(), tmp_path)), expected)
    compiled: Any = torch.compile(vpt, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=0)
    labels, gradients = torch.arange(3 * 32 * 32).view(3, 32, 32) % NUM_LABELS, []
    for checkpointing in (False, True):
        vpt.zero_grad()
        if checkpointing:
            vpt.gradient_checkpointing_enable()
        vpt.train()(pixel_values=images, labels=labels).loss.backward()
        gradients.append({name: one.grad for name, one in vpt.named_parameters() if one.requires_grad})
    assert all(value is not None for value in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "perception_encoder", "vit_mean_of_patches"])
@pytest.mark.parametrize("pooling", ["image", "prompt", "global"])
def test_biases_that_a_pooling_does_not_read_are_not_trained(name: str, pooling: str) -> None:
    vpt = FAMILIES[f"timm_{name}"].prompted(pooling=pooling, bias="all").train()
    vpt(pixel_values=some_images(), labels=torch.arange(3)).loss.backward()
    assert [key for key, one in vpt.named_parameters() if one.requires_grad and one.grad is None] == []


def test_a_pooling_compiles_to_one_graph() -> None:
    vpt = FAMILIES["timm_eva02"].prompted(pooling="global")
    compiled: Any = torch.compile(vpt, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(vpt), atol=1e-5, rtol=0)


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm_vit", "timm_siglip", "timm_dinov3", "timm_eva02_model"])
def test_an_adapter_finds_its_backbone(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.bare().save_pretrained(tmp_path / "backbone")
    model_class = type(family.bare())
    model = model_class.from_pretrained(tmp_path / "backbone").eval()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), family.bare().parameters(), strict=True))
    labels = {"id2label": {0: "crow", 1: "owl"}}
    config = {} if family.classifier else {"task_type": "IMAGE_CLASSIFICATION"}
    vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=3, **config), **labels).eval())
    vpt.save_pretrained(tmp_path / "adapter")
    loaded = AutoVPTModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is model_class
    assert loaded.config.id2label == {0: "crow", 1: "owl"}
    assert torch.equal(logits(loaded), logits(vpt))


def test_labels_of_the_backbone_do_not_matter_to_an_adapter(tmp_path: Path) -> None:
    model = classifier(num_labels=4)
    vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=3), num_labels=2).eval())
    vpt.save_pretrained(tmp_path)
    other = classifier(num_labels=7)
    weights = {key: value for key, value in model.state_dict().items() if "head" not in key}
    assert len(other.load_state_dict(weights, strict=False).missing_keys) == 2
    assert torch.equal(logits(VPTModel.from_pretrained(other, tmp_path)), logits(vpt))


def test_copies_and_pickles_of_an_attached_backbone_are_bare() -> None:
    vpt = FAMILIES["timm_vit"].prompted()
    bare = logits(vpt.get_base_model())
    for other in (copy.deepcopy(vpt.get_base_model()), pickle.loads(pickle.dumps(vpt.get_base_model()))):
        assert torch.equal(logits(other), bare)
        other.gradient_checkpointing_enable()
        assert other.timm_model.grad_checkpointing
    for copied in (copy.deepcopy(vpt), pickle.loads(pickle.dumps(vpt))):
        assert torch.equal(logits(copied), logits(vpt))
        copied.unload().gradient_checkpointing_enable()
        assert copied.get_base_model().timm_model.grad_checkpointing


# -- gradient checkpointing -------------------------------------------------------------------------------------------


def count_runs(model: Any, step: Any) -> list[int]:
    """How often each layer's attention runs in a step."""
    runs = [0] * len(model.timm_model.blocks)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            runs[index] += 1

        return hook

    handles = [
        layer.attn.qkv.register_forward_hook(count(index)) for index, layer in enumerate(model.timm_model.blocks)
    ]
    step()
    for handle in handles:
        handle.remove()
    return runs


@pytest.mark.parametrize("location", ["prepend", "add"])
def test_layers_are_recomputed_with_their_prompts_however_checkpointing_is_enabled(location: str) -> None:
    def train(vpt: VPTModel) -> tuple[list[int], list[Any]]:
        def step() -> None:
            vpt.train()(pixel_values=some_images(), labels=torch.arange(3)).loss.backward()

        runs = count_runs(vpt.get_base_model(), step)
        return runs, [parameter.grad for parameter in vpt.adapters["default"].prompts.parameters()]

    config = PromptConfig(num_tokens=2, location=location, deep=False)
    once, expected = train(enlarge(get_vpt_model(FAMILIES["timm_vit"].bare(), config)))
    before = FAMILIES["timm_vit"].bare()
    before.gradient_checkpointing_enable()
    state = snapshot(before)
    early = enlarge(get_vpt_model(before, config))
    by_vpt, by_model, by_timm = (enlarge(get_vpt_model(FAMILIES["timm_vit"].bare(), config)) for _ in range(3))
    by_vpt.gradient_checkpointing_enable()
    by_model.get_base_model().gradient_checkpointing_enable()
    by_timm.get_base_model().timm_model.set_grad_checkpointing()
    for vpt in (early, by_vpt, by_model, by_timm):
        runs, gradients = train(vpt)
        assert runs == [2 * number for number in once]
        torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-5)
    by_vpt.gradient_checkpointing_disable()
    by_vpt.zero_grad()
    assert train(by_vpt)[0] == once
    early.unload()
    assert before.timm_model.grad_checkpointing
    assert_unchanged(state, snapshot(before))
    assert not by_model.unload().timm_model.grad_checkpointing
