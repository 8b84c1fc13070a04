"""Adapter folders and state dicts: strict, complete, tensors only."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_invariants import CONFIGS, assert_unchanged, snapshot, train_a_little
from tiny import BUILDERS, VIT, Tiny, assert_same, logits, tiny_swin, tiny_vit
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTModel

from vpt_peft import (
    CheckpointError,
    PromptConfig,
    VPTError,
    VPTModel,
    get_adapter_state_dict,
    get_vpt_model,
    set_adapter_state_dict,
)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_reloaded_adapter_agrees_bit_for_bit(
    tiny: Tiny, new: Callable[[], Tiny], tmp_path: Path, config: dict[str, Any]
) -> None:
    vpt = tiny.prompted(**config).train()
    train_a_little(vpt, tiny)
    vpt.eval().save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(new().model, tmp_path)
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(vpt))
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_folder_is_as_the_format_says(vit: Tiny, tmp_path: Path) -> None:
    vit.model.config.name_or_path = "google/vit-tiny"
    vpt = vit.prompted(num_tokens=3, bias="all", modules_to_save=["vit.layernorm"], projection_dim=6)
    vpt.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "VPT" and config["task_type"] == "IMAGE_CLASSIFICATION"
    assert config["model_type"] == "vit" and config["widths"] == [24] * 4 and config["inference_mode"]
    assert config["base_model_name_or_path"] == "google/vit-tiny"
    assert len(config["id2label"]) == len(config["label2id"]) == 7 and "problem_type" in config
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("bias.")} == {
        **{f"prompts.{layer}": (3, 6) for layer in range(4)},
        "projection.weight": (24, 6), "projection.bias": (24,),
        "head.classifier.weight": (7, 24), "head.classifier.bias": (7,),
        "modules.vit.layernorm.weight": (24,), "modules.vit.layernorm.bias": (24,),
    }  # fmt: skip
    assert shapes["bias.vit.layers.0.attention.q_proj"] == (24,)
    assert "bias.classifier" not in shapes and "bias.vit.layernorm" not in shapes


def test_the_head_and_its_labels_belong_to_the_adapter(tiny: Tiny, tmp_path: Path) -> None:
    names = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    build = tiny_vit if tiny.name == "vit" else tiny_swin
    trained = build(num_labels=3, **names)
    trained.labels %= 3
    vpt = trained.prompted().train()
    train_a_little(vpt, trained)
    vpt.eval().save_pretrained(tmp_path)
    for num_labels in (7, 1, 0):
        model = build(num_labels=num_labels).model
        loaded = VPTModel.from_pretrained(model, tmp_path)
        assert loaded.config.id2label == names["id2label"] and loaded.config.label2id == names["label2id"]
        assert loaded.config.problem_type == "single_label_classification"
        assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))
        assert model.config.num_labels == num_labels and model.config.problem_type is None


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, 1.0, -1.0, 2.0])),
        ("single_label_classification", 3, torch.tensor([0, 1, 2, 0])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
    ],
)
def test_the_loss_follows_the_adapters_labels_not_the_backbones(
    tiny: Tiny, problem: str, num_labels: int, labels: torch.Tensor
) -> None:
    vpt = tiny.prompted()
    vpt.add_adapter("other", PromptConfig(), num_labels=num_labels)
    vpt.set_adapter("other")
    output = vpt(tiny.pixel_values, labels=labels)
    losses = {
        "regression": lambda: torch.nn.functional.mse_loss(output.logits.squeeze(), labels),
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(output.logits, labels),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(
            output.logits, labels
        ),
    }
    torch.testing.assert_close(output.loss, losses[problem]())
    assert vpt.config.problem_type == problem and tiny.model.config.problem_type is None
    as_tuple = vpt(tiny.pixel_values, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


@pytest.mark.parametrize("build", [ViTModel, ViTForMaskedImageModeling])
def test_other_vit_classes(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(**VIT, encoder_stride=8)
    model = build(config).eval()
    images, masked = torch.randn(2, 3, 32, 32), torch.rand(2, 16) > 0.5
    inputs = {"bool_masked_pos": masked} if build is ViTForMaskedImageModeling else {}
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3))
    with torch.no_grad():
        ours, bare = vpt(images, **inputs), model(images, **inputs)
    assert ours.keys() == bare.keys()
    name = "reconstruction" if build is ViTForMaskedImageModeling else "last_hidden_state"
    assert ours[name].shape == bare[name].shape and (ours[name] - bare[name]).abs().max() > 1e-3
    vpt.save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(vpt.unload(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images, **inputs)[name], ours[name])
    if build is ViTModel:
        with pytest.raises(VPTError, match="labels need a model with a classifier"):
            loaded(images, labels=torch.tensor([0, 1]))


def test_all_wrong_tensors_are_listed_in_one_error_and_nothing_is_loaded(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["prompts.0"]
    state["prompts.1"] = torch.zeros(5, 3)
    state["prompts.2"] = torch.full_like(state["prompts.2"], float("nan"))
    state["prompts.3"] = state["prompts.3"].long()
    state["prompts.9"] = torch.zeros(1)
    width = before["prompts.0"].shape[1]
    with pytest.raises(CheckpointError) as error:
        set_adapter_state_dict(vpt, state)
    for part in (
        f"missing: prompts.0 (5, {width})", "unexpected: prompts.9 (1,)",
        f"of another shape: prompts.1: expected (5, {before['prompts.1'].shape[1]}), got (5, 3)",
        "of another type: prompts.3: expected torch.float32, got torch.int64",
        "not finite (NaN or infinite): prompts.2", "Nothing was loaded",
    ):  # fmt: skip
        assert part in str(error.value)
    assert_same(get_adapter_state_dict(vpt), before)
    set_adapter_state_dict(vpt, {name: tensor + 1 for name, tensor in before.items()})
    assert torch.equal(get_adapter_state_dict(vpt)["prompts.0"], before["prompts.0"] + 1)


NO_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda tensor: None,
    "a list": lambda tensor: tensor.tolist(),
    "an array": lambda tensor: tensor.numpy(),
    "sparse": lambda tensor: tensor.to_sparse(),
    "without data": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_what_is_no_tensor_with_data_is_refused_by_name(vit: Tiny, kind: str) -> None:
    vpt = vit.prompted()
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["prompts.3"] = NO_TENSORS[kind](state["prompts.3"])
    with pytest.raises(CheckpointError, match=r"no dense tensors with data: prompts\.3: "):
        set_adapter_state_dict(vpt, state)
    with pytest.raises(CheckpointError, match="a dict of tensors by name, got NoneType"):
        set_adapter_state_dict(vpt, None)  # type: ignore[arg-type]
    assert_same(get_adapter_state_dict(vpt), before)


def test_values_that_are_infinite_in_the_adapters_precision_are_refused(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    state = {name: tensor + 1e5 for name, tensor in get_adapter_state_dict(vpt).items()}
    set_adapter_state_dict(vpt, state)
    vpt.save_pretrained(tmp_path)
    vpt.load_adapter(tmp_path, "wide", torch_dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"too large: .*prompts.0 for torch.float16.* Nothing was loaded"):
        vpt.load_adapter(tmp_path, "half", torch_dtype=torch.float16)
    assert list(vpt.adapters) == ["default", "wide"]
    state["prompts.0"] = state["prompts.0"].double() * 1e300
    with pytest.raises(CheckpointError, match=r"too large: prompts.0 for torch.float32\."):
        set_adapter_state_dict(vpt, state)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "REMOVE"}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_config": (lambda f: (f / "adapter_config.json").unlink(), "lacks adapter_config.json"),
    "no_weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
    "pickle_beside": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "are never opened",
    ),
    "no_json": (lambda f: (f / "adapter_config.json").write_text("{"), "must be a JSON file"),
    "json_list": (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold a JSON object, got list"),
    "binary_json": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "must be a JSON file"),
    "unknown_field": (lambda f: edit_config(f, depth=3), "no field depth"),
    "wrong_type": (lambda f: edit_config(f, num_tokens="5"), "num_tokens must be an integer, got '5'"),
    "other_length": (lambda f: edit_config(f, num_tokens=6), "does not belong to adapter_model.safetensors"),
    "no_widths": (lambda f: edit_config(f, widths="REMOVE"), "must name 'widths'"),
    "bad_labels": (lambda f: edit_config(f, id2label={"1": "a"}), "id2label in adapter_config.json must map 0 to n-1"),
    "bad_problem": (lambda f: edit_config(f, problem_type="guessing"), "problem_type in adapter_config.json"),
    "other_depth": (lambda f: edit_config(f, widths=[24, 24]), "widths: expected ["),
    "other_model": (lambda f: edit_config(f, model_type="bert"), "got 'bert'"),
    "truncated_header": (lambda f: truncate(f / "adapter_model.safetensors", 20), "must be a safetensors file"),
    "truncated_data": (lambda f: truncate(f / "adapter_model.safetensors", 700), "must be a safetensors file"),
    "empty": (lambda f: truncate(f / "adapter_model.safetensors", 0), "must be a safetensors file"),
    "missing_tensor": (lambda f: edit_weights(f, lambda t: t.pop("prompts.1")), "missing: prompts.1"),
    "extra_tensor": (lambda f: edit_weights(f, lambda t: t.update(x=torch.zeros(2))), "unexpected: x (2,)"),
    "infinite": (lambda f: edit_weights(f, lambda t: t["prompts.1"].fill_(torch.inf)), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_and_changes_nothing(
    tiny: Tiny, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    tiny.prompted().save_pretrained(tmp_path)
    damage(tmp_path)
    model = BUILDERS[tiny.name]().model
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        VPTModel.from_pretrained(model, tmp_path)
    assert message in str(error.value)
    assert isinstance(error.value, VPTError)
    assert_unchanged(before, snapshot(model))


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


def test_a_pickle_in_place_of_safetensors_is_never_opened(tiny: Tiny, tmp_path: Path) -> None:
    tiny.prompted().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="never opened"):
        VPTModel.from_pretrained(BUILDERS[tiny.name]().model, tmp_path)


def test_a_folder_that_does_not_exist_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        VPTModel.from_pretrained(tiny.model, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="needs a folder, got the file"):
        tiny.prompted().save_pretrained(tmp_path / "file")


def test_an_adapter_for_another_architecture_names_both(vit: Tiny, swin: Tiny, tmp_path: Path) -> None:
    vit.prompted().save_pretrained(tmp_path / "vit")
    swin.prompted().save_pretrained(tmp_path / "swin")
    with pytest.raises(CheckpointError, match=r"made for a 'vit' backbone, got SwinForImageClassification \('swin'\)"):
        VPTModel.from_pretrained(tiny_swin().model, tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"made for a 'swin' backbone, got ViTForImageClassification \('vit'\)"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path / "swin")
    with pytest.raises(CheckpointError, match=r"widths \[24\], got a backbone of 4 layers of widths \[48\]"):
        VPTModel.from_pretrained(tiny_vit(hidden_size=48).model, tmp_path / "vit")
