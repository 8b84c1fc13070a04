"""What saving writes can be loaded; what could not be is refused before the first file is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.hub_server import HubServer
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import Tiny, assert_same, logits, tiny_upernet, tiny_vit
from huggingface_hub import ModelCard
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils.weight_norm import weight_norm
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from vpt_peft import (
    AdapterError,
    CheckpointError,
    ConfigError,
    PromptConfig,
    VPTError,
    VPTModel,
    get_adapter_state_dict,
    get_vpt_model,
)

CONFIG = PromptConfig(num_tokens=2)
CARD, SAVED, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"


def files(folder: Path) -> dict[str, bytes]:
    """The files in a folder and in its subfolders."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(vpt: VPTModel, folder: Path, message: str, error: type[Exception] = VPTError, **given: Any) -> None:
    """Asserts that saving raises an error, and that the folder is as before."""
    before = files(folder)
    with pytest.raises(error, match=message):
        vpt.save_pretrained(folder, **given)
    assert files(folder) == before


# -- heads ----------------------------------------------------------------------------------------------------------


class CosineLinear(nn.Linear):
    """A linear layer of another function, with tensors of the same names and shapes."""

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(features), nn.functional.normalize(self.weight), self.bias)


HEADS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "more layers": (lambda: nn.Sequential(nn.Linear(24, 9), nn.GELU(), nn.Linear(9, 7)), "Sequential.Linear, GELU, "),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(24, 7)), "ParametrizedLinear"),
    "equal tensors": (lambda: CosineLinear(24, 7), "CosineLinear"),
    "another activation": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(24, 7)), "Sequential.ReLU, Linear"),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_ones_own_is_loaded_onto_a_backbone_with_the_same_head_only(head: str, tmp_path: Path) -> None:
    tiny, (make, description) = tiny_vit(), HEADS[head]
    tiny.model.classifier = make()
    vpt = tiny.prompted()
    vpt.save_pretrained(tmp_path)
    same = tiny_vit().model
    same.classifier = make()
    loaded = VPTModel.from_pretrained(same, tmp_path)
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    loaded.load_adapter(tmp_path, "default")
    for other in (tiny_vit(), tiny_vit(num_labels=3)):
        before = snapshot(other.model)
        with pytest.raises(CheckpointError, match=rf"with the head .*{description}.*, but .* 'Linear'.*the same head"):
            VPTModel.from_pretrained(other.model, tmp_path)
        assert_unchanged(before, snapshot(other.model))
    tiny_vit().prompted().save_pretrained(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=rf"with the head .*'Linear'.*, but .*{description}"):
        VPTModel.from_pretrained(loaded.unload(), tmp_path / "stock")


def test_the_same_layers_with_another_activation_are_another_head(tmp_path: Path) -> None:
    tiny, other = tiny_vit(), tiny_vit()
    tiny.model.classifier = nn.Sequential(nn.ReLU(), nn.Linear(24, 7))
    other.model.classifier = nn.Sequential(nn.GELU(), nn.Linear(24, 7))
    tiny.prompted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"Sequential\(ReLU, Linear\)'}, but .*Sequential\(GELU, Linear\)"):
        VPTModel.from_pretrained(other.model, tmp_path)


class PixelClassifier(nn.Module):
    """A segmentation head without the layers of transformers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(8, 7, kernel_size=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.pixels(features[0])


def test_a_segmentation_head_of_ones_own_is_loaded_onto_a_backbone_with_the_same_head_only(tmp_path: Path) -> None:
    tiny, same, stock = tiny_upernet(), tiny_upernet(), tiny_upernet()
    tiny.model.decode_head, same.model.decode_head = PixelClassifier(), PixelClassifier()
    vpt = tiny.prompted()
    vpt.save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(same.model, tmp_path)
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    with pytest.raises(
        CheckpointError, match=r"with the head {'auxiliary_head.classifier': 'Conv2d'}, but the backbone"
    ):
        VPTModel.from_pretrained(stock.model, tmp_path)
    with pytest.raises(ConfigError, match=r"got NoneType at 'decode_head\.classifier'"):
        vpt.add_adapter("other", CONFIG, num_labels=3)


def frozen(prepare: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda module: prepare(module.requires_grad_(False))


HOOKED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "pruned and frozen": frozen(lambda module: prune.l1_unstructured(module, "weight", 0.5)),
    "weight norm": weight_norm,
    "weight norm, frozen": frozen(weight_norm),
    "spectral norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("path", ["classifier", "vit.layers.1.mlp.fc1"])
@pytest.mark.parametrize("kind", HOOKED)
def test_a_module_with_a_hook_that_computes_its_weight_is_refused(kind: str, path: str, vit: Tiny) -> None:
    HOOKED[kind](vit.model.get_submodule(path))
    before = snapshot(vit.model)
    config = CONFIG if path == "classifier" else CONFIG.replace(modules_to_save=("layers.1.mlp.fc1",))
    with pytest.raises(ConfigError, match=r"got a Linear with a hook that computes its weight, .*prune.remove"):
        get_vpt_model(vit.model, config)
    assert_unchanged(before, snapshot(vit.model))


def test_a_pruned_module_that_is_made_permanent_is_like_any_other(vit: Tiny, tmp_path: Path) -> None:
    prune.l1_unstructured(vit.model.classifier, "weight", 0.5)
    prune.remove(vit.model.classifier, "weight")
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


def test_a_head_with_other_outputs_than_the_config_has_labels_is_refused(vit: Tiny, tmp_path: Path) -> None:
    vit.model.classifier = nn.Linear(24, 5)
    before = snapshot(vit.model)
    with pytest.raises(ConfigError, match=r"got 5 outputs of 'classifier' for num_labels=7. Load .* num_labels=5, or"):
        get_vpt_model(vit.model, CONFIG)
    assert_unchanged(before, snapshot(vit.model))
    vit.model.config.num_labels = 5
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


def test_a_module_with_a_state_that_is_no_tensor_is_refused(vit: Tiny) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 0}

        def set_extra_state(self, state: Any) -> None: ...

    vit.model.classifier = Counting(24, 7)
    with pytest.raises(ConfigError, match=r"state of tensors, got dict for head\.classifier\._extra_state"):
        get_vpt_model(vit.model, CONFIG)


@pytest.mark.parametrize("arguments", [{}, {"state_dict": None}], ids=["saved", "checkpoint"])
def test_an_adapters_own_head_that_was_changed_after_attaching_is_refused(
    arguments: dict[str, Any], vit: Tiny, tmp_path: Path
) -> None:
    vpt = vit.prompted()
    head = vpt.adapters["default"].head.find("classifier")
    prune.l1_unstructured(head, "weight", 0.5)
    message = r"missing: head\.classifier\.weight .*unexpected: .*weight_orig.*Nothing was saved, since 'default' could"
    assert_refused(vpt, tmp_path, message, **arguments)
    prune.remove(head, "weight")
    vpt.save_pretrained(tmp_path, **arguments)
    assert_same(
        get_adapter_state_dict(VPTModel.from_pretrained(tiny_vit().model, tmp_path)), get_adapter_state_dict(vpt)
    )


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["prompts.1", "head.classifier.bias", "bias.vit.layers.0.mlp.fc1"])
def test_values_that_are_not_finite_are_refused_by_name(key: str, value: float, vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted(bias="all")
    vpt.save_pretrained(tmp_path)
    get_adapter_state_dict(vpt)[key].view(-1)[3] = value
    for arguments in ({}, {"state_dict": None}, {"state_dict": vpt.state_dict()}):
        message = rf"not finite \(NaN or infinite\): {key}\. Nothing was saved, since 'default' could not be loaded"
        assert_refused(vpt, tmp_path, message, CheckpointError, **arguments)


def test_a_checkpoint_of_trainer_with_values_that_are_not_finite_is_refused(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    trainer = Trainer(vpt, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    get_adapter_state_dict(vpt)["prompts.0"].fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"not finite .*prompts\.0\. Nothing was saved"):
        trainer.save_model(str(tmp_path / "checkpoint"))
    assert files(tmp_path) == {}


def test_a_state_dict_of_other_shapes_is_refused(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    state = {**vpt.state_dict(), "adapters.default.prompts.0": torch.zeros(4, 24)}
    assert_refused(vpt, tmp_path, r"of another shape: prompts\.0: expected \(5, 24\), got \(4, 24\)", state_dict=state)


# -- names ----------------------------------------------------------------------------------------------------------

NAMES = {
    "x" * 256: "longer than 255 bytes", "x" * 300: "longer than 255 bytes", "\u732b" * 100: "longer than 255 bytes",
    "a\0b": "must not contain", "a\nb": "must not contain", "\x7f": "must not contain", "\u2028": "must not contain",
    "\ud800": "must not contain", "a:b": "must not contain", "what?": "must not contain", "a*": "must not contain",
    "<a>": "must not contain", '"a"': "must not contain", "a|b": "must not contain",
    "training": "torch uses itself", "_modules": "torch uses itself",
    " a": "no name of a folder on Windows", "a ": "no name of a folder on Windows",
    "NUL": "no name of a folder on Windows", "com1": "no name of a folder on Windows",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_no_folder_or_module_can_have_is_refused_with_the_reason(
    name: str, vit: Tiny, tmp_path: Path
) -> None:
    before = snapshot(vit.model)
    with pytest.raises(AdapterError, match=f"{NAMES[name]}.*Choose another name") as error:
        get_vpt_model(vit.model, CONFIG, adapter_name=name)
    assert len(str(error.value)) < 500
    assert_unchanged(before, snapshot(vit.model))
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    for call in (lambda: vpt.add_adapter(name, CONFIG), lambda: vpt.load_adapter(tmp_path, name)):
        with pytest.raises(AdapterError, match=NAMES[name]):
            call()
    assert list(vpt.adapters) == ["default"]
    vpt.train()
    vpt.unload()
    with pytest.raises(AdapterError, match=NAMES[name]):
        VPTModel.from_pretrained(vit.model, tmp_path, adapter_name=name)


@pytest.mark.parametrize(
    "name", ["x" * 255, "two words", "\u732b", "b\u00e9b\u00e9", "train", "half", "console", "1", "a-b_c", "\U0001f426"]
)
def test_any_other_name_is_saved_and_loaded(name: str, vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.add_adapter(name, CONFIG)
    vpt.train()
    vpt.save_pretrained(tmp_path)
    assert (tmp_path / name / SAVED).is_file()
    vpt.load_adapter(tmp_path / name, name)


# -- several adapters -----------------------------------------------------------------------------------------------


@pytest.fixture
def three(vit: Tiny) -> VPTModel:
    """The adapters "default", "birds" and "cars"."""
    vpt = vit.prompted()
    vpt.add_adapter("birds", CONFIG, id2label={0: "crow", 1: "owl"})
    vpt.add_adapter("cars", CONFIG.replace(deep=False), num_labels=3)
    return vpt


def test_a_file_in_place_of_a_folder_is_found_before_the_first_adapter_is_written(
    three: VPTModel, tmp_path: Path
) -> None:
    (tmp_path / "cars").touch()
    assert_refused(three, tmp_path, r"needs a folder, got the file '.*cars'", CheckpointError)
    assert_refused(three, tmp_path / "cars" / "inner", r"needs a folder, got the file '.*cars'", CheckpointError)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert_refused(three, tmp_path / "nowhere", r"needs a folder, got the file '.*nowhere'", CheckpointError)


@pytest.mark.parametrize("name", [CARD, SAVED, WEIGHTS, "model.safetensors"])
def test_a_folder_in_place_of_a_file_is_found_before_the_first_adapter_is_written(
    name: str, three: VPTModel, tmp_path: Path
) -> None:
    (tmp_path / "cars" / name).mkdir(parents=True)
    assert_refused(three, tmp_path, rf"writes the file '.*cars.*{name}', got a folder\. Remove it", CheckpointError)


def test_two_adapters_are_not_saved_in_one_folder(three: VPTModel, tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "cars").symlink_to(tmp_path / "birds")
    message = "Each adapter needs a folder of its own, but those of 'birds' and 'cars' are the same"
    assert_refused(three, tmp_path, message, CheckpointError)


def test_an_adapter_that_could_not_be_loaded_keeps_all_others_from_being_written(
    three: VPTModel, tmp_path: Path
) -> None:
    tensor = get_adapter_state_dict(three, "cars")["prompts.0"]
    tensor[0, 0] = torch.nan
    assert_refused(three, tmp_path, r"prompts\.0\. Nothing was saved, since 'cars' could not be loaded again")
    tensor[0, 0] = 0
    three.set_adapter("cars")
    three.config.num_labels = 5
    assert_refused(three, tmp_path, "must have the 3 labels that the adapter was made with, got 5")
    three.config.num_labels = 3
    three.save_pretrained(tmp_path)


def test_a_crash_at_any_step_leaves_each_adapter_whole(
    three: VPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three.save_pretrained(tmp_path)
    names = {"default": tmp_path, "birds": tmp_path / "birds", "cars": tmp_path / "cars"}
    old = {name: {key: tensor.clone() for key, tensor in get_adapter_state_dict(three, name).items()} for name in names}
    with torch.no_grad():
        for parameter in three.adapters.parameters():
            parameter.add_(1)
    model, replace, steps = tiny_vit().model, os.replace, 0
    crashed = True
    while crashed:
        steps, left = steps + 1, iter(range(steps))

        def replace_some(source: Any, target: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_some)
        try:
            three.save_pretrained(tmp_path)
            crashed = False
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", replace)
        for name, folder in names.items():
            held = get_adapter_state_dict(loaded := VPTModel.from_pretrained(model, folder))
            is_new = not torch.equal(held["prompts.0"], old[name]["prompts.0"])
            assert_same(held, get_adapter_state_dict(three, name) if is_new else old[name])
            loaded.unload()
    assert steps > 6 and is_new


# -- image processors and cards -------------------------------------------------------------------------------------


def test_an_image_processor_that_cannot_be_saved_is_found_before_the_adapter_is_written(
    three: VPTModel, tmp_path: Path
) -> None:
    assert_refused(three, tmp_path, "save_pretrained", AttributeError, image_processor="google/vit")


def test_a_card_is_written_into_a_new_folder(three: VPTModel, tmp_path: Path) -> None:
    three.create_or_update_model_card(tmp_path / "a" / "b", "birds", license="mit")
    assert "license: mit" in (tmp_path / "a" / "b" / "birds" / CARD).read_text()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"needs a folder, got the file '.*file'"):
        three.create_or_update_model_card(tmp_path / "file")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0.93", "0.93"), ("93 %", "93 %"), (0.931, "0.931"), (1, "1"), (np.float32(0.5), "0.5"),
        (torch.tensor(2), "2"), ("a|b", "a&#124;b"),
    ],
)  # fmt: skip
def test_metrics_are_numbers_or_text(value: Any, text: str, vit: Tiny, tmp_path: Path) -> None:
    vit.prompted().save_pretrained(tmp_path, metrics={"accuracy": value})
    assert f"| accuracy | {text} |" in (tmp_path / CARD).read_text()


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"metrics": {"accuracy": None}}, "metrics must map names to numbers or strings, got None"),
        ({"metrics": {"accuracy": [0.5]}}, r"metrics must map names to numbers or strings, got \[0.5\]"),
        ({"metrics": {"accuracy": torch.zeros(2)}}, "metrics must map names to numbers or strings, got tensor"),
        ({"metrics": [("accuracy", 0.5)]}, "metrics must map names to numbers or strings, got "),
        ({"metrics": {"\ud800": 0.5}}, "must be valid Unicode"),
        ({"training_data": ["a", "b"]}, r"training_data must be a string or None, got \['a', 'b'\]"),
        ({"training_data": "\ud800"}, "must be valid Unicode"),
        ({"license": 2}, "license must be a string or None, got 2"),
        ({"license": "\ud800"}, "must be valid Unicode"),
        ({"model_id": 2}, "model_id must be a string or None, got 2"),
    ],
    ids=ascii,
)
def test_details_that_no_card_can_have_are_refused_before_anything_is_written(
    details: dict[str, Any], message: str, three: VPTModel, tmp_path: Path
) -> None:
    assert_refused(three, tmp_path, message, ConfigError, **details)


METADATA = """---
language: no
license: 2.0
tags:
- 2024
- 1.10
- yes
- 2024-01-31
- ~
- birds
datasets: 123
pipeline_tag: image-classification
my_number: 5
---
Words.
"""


def test_metadata_that_yaml_reads_as_numbers_are_written_as_the_text_that_they_were(
    three: VPTModel, tmp_path: Path
) -> None:
    (tmp_path / CARD).write_text(METADATA)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            three.save_pretrained(tmp_path)
        content = (tmp_path / CARD).read_text()
        data = yaml.safe_load(content.split("---")[1])
        assert data["tags"] == [
            "1.10", "2024", "2024-01-31", "birds", "peft", "visual-prompt-tuning", "vpt-peft", "yes",
        ]  # fmt: skip
        assert (data["language"], data["license"], data["datasets"]) == ("no", "2.0", "123") and data["my_number"] == 5
        assert content.endswith("Words.\n") and ModelCard.load(tmp_path / CARD).data.tags == data["tags"]


@pytest.mark.parametrize(
    ("metadata", "tags"), [("tags: 2024\n", ["2024"]), ("tags:\n", []), ("", []), ("tags: a\n", ["a"])]
)
def test_tags_may_be_one_or_none(metadata: str, tags: list[str], vit: Tiny, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(f"---\n{metadata}---\nWords.\n")
    vit.prompted().save_pretrained(tmp_path)
    data = yaml.safe_load((tmp_path / CARD).read_text().split("---")[1])
    assert data["tags"] == sorted([*tags, "peft", "visual-prompt-tuning", "vpt-peft"])


def test_a_card_with_numbers_as_tags_can_be_pushed(hub: HubServer, vit: Tiny, tmp_path: Path) -> None:
    vit.model.save_pretrained(tmp_path / "backbone")
    hub.add_repo("google/vit", tmp_path / "backbone")
    with hub.client(token="hf_me", cache=tmp_path / "cache"):
        vpt = get_vpt_model(ViTForImageClassification.from_pretrained("google/vit"), CONFIG)
        vpt.push_to_hub("me/birds")
        hub.repo("me/birds").put({CARD: METADATA.encode()})
        vpt.push_to_hub("me/birds", metrics={"accuracy": "93 %"})
    data = yaml.safe_load(hub.repo("me/birds").files()[CARD].decode().split("---")[1])
    assert "2024" in data["tags"] and "yes" in data["tags"]
