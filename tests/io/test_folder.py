"""Adapter folders and state dicts: strict, complete, tensors only."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.invariants import CONFIGS, assert_unchanged, snapshot, train_a_little
from helpers.models import BUILDERS, VIT, Tiny, assert_same, logits, tiny_swin, tiny_vit
from helpers.mutations import join, split
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
from vpt_peft.io import check_state_dict

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RELOADED = [("vit", name) for name in CONFIGS]
RELOADED += [(family, name) for family in ("swin", "beit") for name in ("projected", "biases", "modules")]


@pytest.mark.parametrize(("family", "name"), RELOADED)
def test_a_reloaded_adapter_agrees_bit_for_bit(family: str, name: str, tmp_path: Path) -> None:
    tiny = BUILDERS[family]()
    vpt = tiny.prompted(**CONFIGS[name]).train()
    train_a_little(vpt, tiny)
    vpt.eval().save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(BUILDERS[family]().model, tmp_path)
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(vpt))
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_folder_has_the_documented_files_fields_and_keys(vit: Tiny, tmp_path: Path) -> None:
    vit.model.config.name_or_path = "google/vit-tiny"
    vpt = vit.prompted(num_tokens=3, bias="all", modules_to_save=["vit.layernorm"], projection_dim=6)
    vpt.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "VPT" and config["task_type"] == "IMAGE_CLASSIFICATION"
    assert config["model_type"] == "vit" and config["widths"] == [24] * 4 and config["inference_mode"]
    assert config["base_model_name_or_path"] == "google/vit-tiny"
    assert len(config["id2label"]) == len(config["label2id"]) == 7 and "problem_type" in config
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    sealed = json.loads(metadata.pop("vpt_peft"))
    assert metadata == {"format": "pt"} and sealed.keys() == {"config", "replaces", "seal"}
    assert sealed["config"] == config and sealed["replaces"] == ""
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in vpt.adapters["default"].state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("bias.")} == {
        **{f"prompts.{layer}": (3, 6) for layer in range(4)},
        "projection.weight": (24, 6), "projection.bias": (24,),
        "head.classifier.weight": (7, 24), "head.classifier.bias": (7,),
        "modules_to_save.vit.layernorm.weight": (24,), "modules_to_save.vit.layernorm.bias": (24,),
    }  # fmt: skip
    assert shapes["bias.vit.layers.0.attention.q_proj"] == (24,)
    assert "bias.classifier" not in shapes and "bias.vit.layernorm" not in shapes


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_head_and_its_labels_belong_to_the_adapter(family: str, tmp_path: Path) -> None:
    names = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    build = BUILDERS[family]
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
        assert torch.equal(logits(loaded, trained.pixel_values), logits(vpt, trained.pixel_values))
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


def test_all_wrong_tensors_are_listed_in_one_error_and_nothing_is_loaded(vit: Tiny) -> None:
    vpt = vit.prompted()
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
def test_a_value_that_is_no_dense_tensor_is_refused_by_name(vit: Tiny, kind: str) -> None:
    vpt = vit.prompted()
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["prompts.3"] = NO_TENSORS[kind](state["prompts.3"])
    with pytest.raises(CheckpointError, match=r"no dense tensors: prompts\.3: "):
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
    with pytest.raises(CheckpointError, match=r"not finite.*: .*prompts.0 in torch.float16.* Nothing was loaded"):
        vpt.load_adapter(tmp_path, "half", torch_dtype=torch.float16)
    assert list(vpt.adapters) == ["default", "wide"]
    state["prompts.0"] = state["prompts.0"].double() * 1e300
    with pytest.raises(CheckpointError, match=r"not finite \(NaN or infinite\): prompts.0 in torch.float32\."):
        set_adapter_state_dict(vpt, state)


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (torch.float32, torch.int64), (torch.float32, torch.complex64), (torch.int64, torch.float32),
        (torch.int64, torch.complex64),
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_of_another_kind_of_number_is_refused(own: torch.dtype, given: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=f"of another type: x: expected {own}, got {given}"):
        check_state_dict({"x": torch.zeros(2, dtype=own)}, {"x": torch.zeros(2, dtype=given)})


def test_large_values_are_finite_though_their_sum_is_not() -> None:
    check_state_dict({"x": torch.zeros(2)}, {"x": torch.full((2,), 3e38)})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "REMOVE"}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_config": (lambda f: (f / CONFIG).unlink(), "lacks adapter_config.json"),
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), "lacks adapter_model.safetensors"),
    "pickle_beside": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "are never opened",
    ),
    "no_json": (lambda f: (f / CONFIG).write_text("{"), "must be a JSON file"),
    "json_list": (lambda f: (f / CONFIG).write_text("[]"), "must contain a JSON object, got list"),
    "binary_json": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "must be a JSON file"),
    "unknown_field": (lambda f: edit_config(f, depth=3), "no field depth"),
    "wrong_type": (lambda f: edit_config(f, num_tokens="5"), "num_tokens must be an integer, got '5'"),
    "other_length": (lambda f: edit_config(f, num_tokens=6), "does not belong to adapter_model.safetensors"),
    "no_widths": (lambda f: edit_config(f, widths="REMOVE"), "must contain 'widths'"),
    "bad_labels": (lambda f: edit_config(f, id2label={"1": "a"}), "is not valid: id2label must map 0 to n-1"),
    "bad_problem": (lambda f: edit_config(f, problem_type="guessing"), "is not valid: problem_type must be one of"),
    "other_depth": (lambda f: edit_config(f, widths=[24, 24]), "widths: expected ["),
    "other_model": (lambda f: edit_config(f, model_type="bert"), "got 'bert'"),
    "truncated_header": (lambda f: truncate(f / WEIGHTS, 20), "must be a safetensors file"),
    "truncated_data": (lambda f: truncate(f / WEIGHTS, 700), "must be a safetensors file"),
    "empty": (lambda f: truncate(f / WEIGHTS, 0), "must be a safetensors file"),
    "missing_tensor": (lambda f: edit_weights(f, lambda t: t.pop("prompts.1")), "missing: prompts.1"),
    "extra_tensor": (lambda f: edit_weights(f, lambda t: t.update(x=torch.zeros(2))), "unexpected: x (2,)"),
    "infinite": (lambda f: edit_weights(f, lambda t: t["prompts.1"].fill_(torch.inf)), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_and_changes_nothing(
    vit: Tiny, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    vit.prompted().save_pretrained(tmp_path)
    damage(tmp_path)
    model = tiny_vit().model
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        VPTModel.from_pretrained(model, tmp_path)
    assert message in str(error.value)
    assert isinstance(error.value, VPTError)
    assert_unchanged(before, snapshot(model))


# Of each field that defines an adapter's function, another value that is valid by itself.
SEALED: dict[str, Any] = {
    "num_tokens": 6, "kind": "prefix", "deep": False, "layers_to_transform": [0, 1, 2], "carry": False, "shared": True,
    "projection_dim": 6, "pooling": "prompt", "location": "add", "bias": "all", "modules_to_save": ["vit.layernorm"],
    "model_type": "swin", "model_class": "ViTModel", "widths": [24] * 3,
}  # fmt: skip
FREE: dict[str, Any] = {
    "dropout": 0.5, "init": "normal", "route": "tokens", "base_model_name_or_path": "me/vit", "revision": "main",
}  # fmt: skip


@pytest.mark.parametrize("field", SEALED)
def test_a_sealed_field_edited_alone_is_refused(field: str, vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    edit_config(tmp_path, **{field: SEALED[field]})
    message = f"does not belong to {WEIGHTS}, .*: {field}: expected "
    with pytest.raises(CheckpointError, match=message):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        vpt.load_adapter(tmp_path, "default")


def test_a_field_is_sealed_or_may_be_edited(vit: Tiny, tmp_path: Path) -> None:
    constant = {"task_type", "inference_mode", "peft_type"}  # set by loading, or of one value
    assert SEALED.keys() | FREE.keys() | constant == PromptConfig().to_dict().keys() | {
        "model_type", "model_class", "widths"
    }  # fmt: skip
    vit.prompted().save_pretrained(tmp_path)
    edit_config(tmp_path, **FREE, id2label={"0": "cat"}, label2id={"cat": 0}, problem_type="regression")
    with pytest.raises(CheckpointError, match=r"of another shape: head.classifier.bias: expected \(1,\), got \(7,\)"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    names = {str(number): f"name {number}" for number in range(7)}
    edit_config(tmp_path, id2label=names, label2id={"name 3": 3})
    loaded = VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    assert {name: loaded.active_config.to_dict()[name] for name in FREE} == FREE
    labels = loaded.adapters["default"].labels()
    assert labels["id2label"][3] == "name 3" and labels["label2id"] == {"name 3": 3}
    assert labels["problem_type"] == "regression"


@pytest.mark.parametrize("name", ["prompts.0", "prompts.3", "head.classifier.weight", "head.classifier.bias"])
def test_one_flipped_bit_of_a_tensor_is_noticed(name: str, vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8:start])[name]["data_offsets"]
    for place in (first, last - 4):  # the lowest bit of the first number and of the last
        content[start + place] ^= 1
        (tmp_path / WEIGHTS).write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged: its content is not what was saved"):
            VPTModel.from_pretrained(tiny_vit().model, tmp_path)
        with pytest.raises(CheckpointError, match="is damaged: its content is not what was saved"):
            vpt.load_adapter(tmp_path, "default")
        content[start + place] ^= 1
    assert_same(get_adapter_state_dict(vpt), before)


def edit_seal(folder: Path, **changes: Any) -> None:
    """Edits the metadata of a weights file, which keeps its seal unless that is edited."""
    header, data = split((folder / WEIGHTS).read_bytes())
    entries = json.loads(header)
    sealed = json.loads(entries["__metadata__"]["vpt_peft"]) | changes
    entries["__metadata__"]["vpt_peft"] = json.dumps({name: value for name, value in sealed.items() if value != "GONE"})
    (folder / WEIGHTS).write_bytes(join(json.dumps(entries).encode(), data))


@pytest.mark.parametrize(
    "changes",
    [
        {"replaces": "0" * 64}, {"seal": "0" * 64}, {"seal": None}, {"seal": "GONE"}, {"config": "GONE"},
        {"config": {}}, {"config": None}, {"config": "x"}, {"replaces": "GONE"}, {"replaces": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_edited_seal_is_noticed(changes: dict[str, Any], vit: Tiny, tmp_path: Path) -> None:
    vit.prompted().save_pretrained(tmp_path)
    edit_seal(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"is damaged|must contain"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path)


def test_a_label_edited_in_the_seal_alone_is_noticed(vit: Tiny, tmp_path: Path) -> None:
    vit.prompted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    edit_seal(tmp_path, config=config)
    VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    names = config["id2label"] | {"0": "cat"}
    labels = {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    edit_seal(tmp_path, config={**config, **labels})
    with pytest.raises(CheckpointError, match="is damaged: its content is not what was saved"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path)


def test_an_adapter_is_reloaded_only_from_an_equal_config(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    edit_config(tmp_path, dropout=0.5, revision="main")
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    with pytest.raises(CheckpointError, match=r"differs in dropout, revision\. Delete that adapter first"):
        vpt.load_adapter(tmp_path, "default")
    assert_same(get_adapter_state_dict(vpt), before)


def test_a_config_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    names = {0: "x" * 9 * 2**20, 1: "y"}
    vpt = tiny_vit(num_labels=2, id2label=names, label2id={name: number for number, name in names.items()}).prompted()
    with pytest.raises(CheckpointError, match=r"at most 8,388,608 bytes, got 18,.*Shorten the label names"):
        vpt.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


def test_a_pickle_in_place_of_safetensors_is_never_opened(vit: Tiny, tmp_path: Path) -> None:
    vit.prompted().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="never opened"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path)


def test_a_folder_that_does_not_exist_is_named(vit: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        VPTModel.from_pretrained(vit.model, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="needs a folder, got the file"):
        vit.prompted().save_pretrained(tmp_path / "file")


def test_an_adapter_for_another_architecture_names_both(vit: Tiny, swin: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path / "vit")
    swin.prompted().save_pretrained(tmp_path / "swin")
    with pytest.raises(CheckpointError, match=r"for a 'vit' backbone .* got SwinForImageClassification \('swin'\)"):
        VPTModel.from_pretrained(tiny_swin().model, tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"for a 'swin' backbone .* got ViTForImageClassification \('vit'\)"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path / "swin")
    with pytest.raises(CheckpointError, match=r"widths \[24, 24, 24, 24\], got .* of widths \[48, 48, 48, 48\]"):
        VPTModel.from_pretrained(tiny_vit(hidden_size=48).model, tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"for a 'swin' backbone .* got ViTForImageClassification"):
        vpt.load_adapter(tmp_path / "swin", "default")


def test_tensors_that_transformers_has_saved_with_a_prefix_are_read(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    tensors = get_adapter_state_dict(vpt)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    assert_same(get_adapter_state_dict(VPTModel.from_pretrained(tiny_vit().model, tmp_path)), tensors)
    first, *others = tensors
    save_file(
        {first: tensors[first], **{f"base_model.model.{name}": tensors[name] for name in others}}, tmp_path / WEIGHTS
    )
    with pytest.raises(CheckpointError, match=r"unexpected: base_model\.model\."):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path)
