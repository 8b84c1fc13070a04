"""One frozen backbone, many adapters: the verbs that PEFT's users know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Tiny, assert_same, logits

from vpt_peft import AdapterError, CheckpointError, PromptConfig, VPTModel, get_adapter_state_dict, get_vpt_model

BIRDS = PromptConfig(num_tokens=3)
CARS = PromptConfig(num_tokens=5, deep=False, pooling="image")


@pytest.fixture
def two(tiny: Tiny) -> VPTModel:
    """Two adapters that differ in everything; "birds" is active."""
    torch.manual_seed(1)
    vpt = get_vpt_model(tiny.model, BIRDS, adapter_name="birds")
    vpt.add_adapter("cars", CARS, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    return vpt


def copies(vpt: VPTModel, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in get_adapter_state_dict(vpt, name).items()}


def trainable(vpt: VPTModel) -> set[str]:
    return {name.split(".")[1] for name, parameter in vpt.named_parameters() if parameter.requires_grad}


def test_each_adapter_has_its_own_head_and_labels(tiny: Tiny, two: VPTModel) -> None:
    assert two.active_adapter == "birds" and two.config.num_labels == 7
    assert logits(two, tiny.pixel_values).shape == (4, 7)
    two.set_adapter("cars")
    assert two.active_adapter == "cars" and two.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert logits(two, tiny.pixel_values).shape == (4, 3)
    assert two.active_config.pooling == "image"
    assert tiny.model.config.num_labels == 7


def test_only_the_active_adapter_trains(tiny: Tiny, two: VPTModel) -> None:
    two.train()
    for name, other, labels in (("birds", "cars", tiny.labels), ("cars", "birds", tiny.labels % 3)):
        two.set_adapter(name)
        assert trainable(two) == {name}
        kept, own = copies(two, other), copies(two, name)
        optimizer = torch.optim.SGD([p for p in two.parameters() if p.requires_grad], lr=0.1)
        two(tiny.pixel_values, labels=labels).loss.backward()
        optimizer.step()
        assert_same(copies(two, other), kept)
        assert all(not torch.equal(own[key], tensor) for key, tensor in copies(two, name).items())


def test_adding_and_deleting_leaves_the_others_bit_identical(tiny: Tiny, two: VPTModel) -> None:
    before, answer = copies(two, "birds"), logits(two, tiny.pixel_values)
    two.add_adapter("planes", PromptConfig(num_tokens=2, bias="all"))
    two.delete_adapter("cars")
    assert list(two.adapters) == ["birds", "planes"]
    assert_same(copies(two, "birds"), before)
    assert torch.equal(logits(two, tiny.pixel_values), answer)


def test_deleting_the_active_adapter_activates_another_and_warns(tiny: Tiny, two: VPTModel) -> None:
    with pytest.warns(UserWarning, match="'birds' was deleted; 'cars' is active now"):
        two.delete_adapter("birds")
    assert two.active_adapter == "cars" and trainable(two) == {"cars"}
    assert logits(two, tiny.pixel_values).shape == (4, 3)
    with pytest.raises(AdapterError, match="only adapter"):
        two.delete_adapter("cars")


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("set_adapter", ("boats",), "has the adapters birds, cars, got boats"),
        ("delete_adapter", ("boats",), "has the adapters birds, cars, got boats"),
        ("add_adapter", ("birds", BIRDS), "'birds' exists already"),
        ("add_adapter", ("a/b", BIRDS), "must be a word without dots"),
        ("add_adapter", ("a.b", BIRDS), "must be a word without dots"),
        ("add_adapter", ("../up", BIRDS), "must be a word without dots"),
        ("add_adapter", ("__base__", BIRDS), "not '__base__'"),
        ("add_adapter", ("boats", {"num_tokens": 3}), "config must be a PromptConfig, got {"),
    ],
)
def test_a_wrong_name_is_a_clear_error_and_changes_nothing(
    two: VPTModel, verb: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        getattr(two, verb)(*arguments)
    assert list(two.adapters) == ["birds", "cars"] and two.active_adapter == "birds"


def test_disabling_gives_the_bare_backbone_nests_and_survives_exceptions(tiny: Tiny, two: VPTModel) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    ours = logits(two, tiny.pixel_values)
    with pytest.raises(RuntimeError, match="inside"), two.disable_adapter():
        assert torch.equal(logits(two, tiny.pixel_values), bare)
        with two.disable_adapter():
            assert torch.equal(logits(two, tiny.pixel_values), bare)
        assert torch.equal(logits(two, tiny.pixel_values), bare)
        assert not two.get_model_status().enabled
        raise RuntimeError("inside")
    assert torch.equal(logits(two, tiny.pixel_values), ours)


def test_switching_inside_disabling_takes_effect_behind_it(tiny: Tiny, two: VPTModel) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    with two.disable_adapter():
        two.set_adapter("cars")
        assert torch.equal(logits(two, tiny.pixel_values), bare)
        two.delete_adapter("birds")
        assert torch.equal(logits(two.get_base_model(), tiny.pixel_values), bare)
    assert logits(two, tiny.pixel_values).shape == (4, 3)


def test_no_verb_works_after_unload(tiny: Tiny, two: VPTModel, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path)
    assert two.unload() is tiny.model
    for verb in (
        lambda: two.add_adapter("boats", BIRDS),
        lambda: two.load_adapter(tmp_path / "birds", "boats"),
        lambda: two.set_adapter("cars"),
        lambda: two.delete_adapter("cars"),
        lambda: two.save_pretrained(tmp_path / "again"),
        lambda: two(tiny.pixel_values, adapter_names=["cars"] * 4),
        lambda: two.unload(),
    ):
        with pytest.raises(AdapterError, match="was unloaded"):
            verb()


def test_unknown_label_arguments_are_named(two: VPTModel) -> None:
    with pytest.raises(ValueError, match="num_labels, id2label, label2id, problem_type, got labels"):
        two.add_adapter("boats", CARS, labels=3)
    assert list(two.adapters) == ["birds", "cars"]


@pytest.mark.parametrize("name", ["half", "keys", "train", "forward", "two words", "\u732b"])
def test_any_word_is_a_name(tiny: Tiny, two: VPTModel, name: str) -> None:
    two.add_adapter(name, CARS)
    two.set_adapter(name)
    assert logits(two, tiny.pixel_values).shape == (4, 7)
    with pytest.warns(UserWarning, match="was deleted"):
        two.delete_adapter(name)


def test_adapters_are_told_as_peft_tells_them(two: VPTModel) -> None:
    two.set_adapter("cars")
    assert two.active_adapters == ["cars"] and two.active_adapter == "cars"
    assert list(two.peft_config) == ["birds", "cars"] and two.peft_config["cars"] == two.active_config


def test_the_status_names_what_is_attached(two: VPTModel) -> None:
    status = two.get_model_status()
    assert status.available_adapters == ["birds", "cars"]
    assert status.active_adapters == ["birds"] and status.enabled and status.merged_adapters == []
    assert status.requires_grad == {"birds": True, "cars": False}
    assert status.trainable_params == sum(tensor.numel() for tensor in copies(two, "birds").values())
    assert status.total_params == two.get_nb_trainable_parameters()[1]
    assert status.num_adapter_layers == 4
    assert status.peft_types == {"birds": "VPT", "cars": "VPT"}
    assert status.devices == {"birds": ["cpu"], "cars": ["cpu"]}
    assert status.base_model_type == type(two.get_base_model()).__name__
    two.adapters["cars"].prompts.requires_grad_(True)
    assert two.get_model_status().requires_grad == {"birds": True, "cars": "irregular"}


def test_saving_writes_default_at_the_top_and_others_into_subfolders(tiny: Tiny, tmp_path: Path) -> None:
    vpt = get_vpt_model(tiny.model, BIRDS)
    vpt.add_adapter("cars", CARS, num_labels=3)
    vpt.save_pretrained(tmp_path / "both")
    assert sorted(str(path.relative_to(tmp_path / "both")) for path in (tmp_path / "both").rglob("*.*")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
        "cars/README.md", "cars/adapter_config.json", "cars/adapter_model.safetensors",
    ]  # fmt: skip
    vpt.save_pretrained(tmp_path / "one", selected_adapters=["cars"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["cars"]
    with pytest.raises(AdapterError, match="got boats"):
        vpt.save_pretrained(tmp_path / "none", selected_adapters=["boats"])
    assert not (tmp_path / "none").exists()


def test_an_only_adapter_is_found_wherever_it_lies(tiny: Tiny, two: VPTModel, tmp_path: Path) -> None:
    answer = logits(two, tiny.pixel_values)
    two.save_pretrained(tmp_path / "one", selected_adapters=["birds"])
    two.save_pretrained(tmp_path / "both")
    model = two.unload()
    loaded = VPTModel.from_pretrained(model, tmp_path / "one")
    assert torch.equal(logits(loaded, tiny.pixel_values), answer)
    loaded.unload()
    with pytest.raises(ValueError, match="several adapters: birds, cars"):
        VPTModel.from_pretrained(model, tmp_path / "both")


def test_save_then_delete_then_load_gives_the_same_adapter(tiny: Tiny, two: VPTModel, tmp_path: Path) -> None:
    two.set_adapter("cars")
    answer = logits(two, tiny.pixel_values)
    two.save_pretrained(tmp_path)
    two.set_adapter("birds")
    two.delete_adapter("cars")
    two.load_adapter(tmp_path / "cars", "again")
    two.set_adapter("again")
    assert torch.equal(logits(two, tiny.pixel_values), answer)
    assert two.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_frozen_adapter_stays_frozen_when_it_becomes_active(tiny: Tiny, two: VPTModel, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path)
    two.load_adapter(tmp_path / "birds", "frozen")
    two.load_adapter(tmp_path / "birds", "trained", is_trainable=True)
    two.set_adapter("frozen")
    assert trainable(two) == set()
    two.set_adapter("trained")
    assert trainable(two) == {"trained"}


def test_loading_onto_an_existing_name_replaces_tensors_of_an_equal_config(
    tiny: Tiny, two: VPTModel, tmp_path: Path
) -> None:
    two.save_pretrained(tmp_path)
    answer = logits(two, tiny.pixel_values)
    with torch.no_grad():
        for tensor in get_adapter_state_dict(two, "birds").values():
            tensor.add_(1)
    assert not torch.equal(logits(two, tiny.pixel_values), answer)
    two.load_adapter(tmp_path / "birds", "birds")
    assert torch.equal(logits(two, tiny.pixel_values), answer)
    kept = copies(two, "birds")
    with pytest.raises(CheckpointError, match="Expected the config and labels of the existing adapter"):
        two.load_adapter(tmp_path / "cars", "birds")
    assert_same(copies(two, "birds"), kept)


def test_loading_onto_an_existing_name_with_other_labels_names_them(two: VPTModel, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path)
    two.delete_adapter("cars")
    two.add_adapter("cars", CARS, id2label={0: "c", 1: "b", 2: "a"}, label2id={"c": 0, "b": 1, "a": 2})
    kept = copies(two, "cars")
    with pytest.raises(CheckpointError, match="differs in id2label, label2id"):
        two.load_adapter(tmp_path / "cars", "cars")
    assert_same(copies(two, "cars"), kept)


def test_a_failed_load_adds_nothing(two: VPTModel, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path)
    for folder, name, message in (
        (tmp_path / "boats", "boats", "neither an existing folder"),
        (tmp_path, "boats", "several adapters: birds, cars"),
        (tmp_path / "birds", "a.b", "must be a word without dots"),
        (tmp_path / "birds", "__base__", "not '__base__'"),
    ):
        with pytest.raises(ValueError, match=message):
            two.load_adapter(folder, name)
        assert list(two.adapters) == ["birds", "cars"] and two.active_adapter == "birds"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_low_precision_storage(tiny: Tiny, two: VPTModel, tmp_path: Path, name: str) -> None:
    answer = logits(two, tiny.pixel_values)
    two.save_pretrained(tmp_path)
    two.load_adapter(tmp_path / "birds", "half", **{name: torch.bfloat16})
    assert {tensor.dtype for tensor in get_adapter_state_dict(two, "half").values()} == {torch.bfloat16}
    two.set_adapter("half")
    torch.testing.assert_close(logits(two, tiny.pixel_values).float(), answer, atol=0.1, rtol=0.1)
    loaded = VPTModel.from_pretrained(two.unload(), tmp_path / "birds", **{name: torch.float16})
    assert {tensor.dtype for tensor in get_adapter_state_dict(loaded).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"dtype": torch.float16, "torch_dtype": torch.bfloat16}, "must agree, got torch.float16 and torch.bfloat16"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float32, .*, got torch.int8"),
        ({"torch_dtype": "half"}, "dtype must be one of torch.float32, .*, got 'half'"),
    ],
)
def test_a_wrong_dtype_is_a_clear_error(two: VPTModel, tmp_path: Path, dtypes: dict[str, Any], message: str) -> None:
    two.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=message):
        two.load_adapter(tmp_path / "birds", "half", **dtypes)
    assert list(two.adapters) == ["birds", "cars"]
    model = two.unload()
    with pytest.raises(AdapterError, match=message):
        VPTModel.from_pretrained(model, tmp_path / "birds", **dtypes)


def test_an_error_lists_no_more_names_than_can_be_read(two: VPTModel) -> None:
    for number in range(30):
        two.add_adapter(f"task{number}", BIRDS)
    with pytest.raises(AdapterError, match=r"the adapters birds, cars, .*, task17 and 12 more, got boats\.$"):
        two.set_adapter("boats")


def test_parameters_are_counted_as_peft_prints_them(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    bare = sum(parameter.numel() for parameter in tiny.model.parameters())
    vpt = tiny.prompted()
    own = sum(tensor.numel() for tensor in get_adapter_state_dict(vpt).values())
    assert vpt.get_nb_trainable_parameters() == (own, bare + own)
    vpt.print_trainable_parameters()
    expected = (
        f"trainable params: {own:,d} || all params: {bare + own:,d} || trainable%: {100 * own / (bare + own):.4f}\n"
    )
    assert capsys.readouterr().out == expected
