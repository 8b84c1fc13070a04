"""Labels of an adapter: of whatever types they are given, they can be saved and loaded, or are refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import VIT, Tiny, tiny_beit_segmenter, tiny_vit
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from vpt_peft import ConfigError, PromptConfig, VPTModel, get_vpt_model

CONFIG = PromptConfig(num_tokens=2)
CARD, SAVED = "README.md", "adapter_config.json"
Labels = dict[str, Any]


def by_add_adapter(labels: Labels, folder: Path) -> VPTModel:
    """Labels given to ``add_adapter``, where the backbone has seven others."""
    vpt = get_vpt_model(tiny_vit().model, CONFIG, adapter_name="other")
    vpt.add_adapter("default", CONFIG, **labels)
    vpt.set_adapter("default")
    vpt.delete_adapter("other")
    return vpt


def by_config(labels: Labels, folder: Path) -> VPTModel:
    """Labels given to the config of a new backbone."""
    return get_vpt_model(ViTForImageClassification(ViTConfig(**{**VIT, **labels})), CONFIG)


def by_assignment(labels: Labels, folder: Path) -> VPTModel:
    """Labels set in the config of a backbone with two others."""
    model = tiny_vit(num_labels=2).model
    for name, value in labels.items():
        setattr(model.config, name, value)
    return get_vpt_model(model, CONFIG)


def by_loading(labels: Labels, folder: Path) -> VPTModel:
    """Labels given to ``from_pretrained`` of a checkpoint with three others, of which one has an equal name."""
    tiny_vit(num_labels=3, **named("x", "y", "a")).model.save_pretrained(folder)
    model = ViTForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **labels)
    return get_vpt_model(model, CONFIG)


WAYS = {
    "add_adapter": by_add_adapter, "config": by_config, "assignment": by_assignment, "from_pretrained": by_loading,
}  # fmt: skip
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def named(*names: str) -> Labels:
    """Both maps of labels with these names."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def labels_of(vpt: VPTModel) -> Labels:
    return {"id2label": vpt.config.id2label, "label2id": vpt.config.label2id}


def is_normal(labels: Labels) -> bool:
    """Whether ids are integers and names are strings, of exactly these types."""
    pairs = [*labels["id2label"].items(), *((label, name) for name, label in labels["label2id"].items())]
    return all(type(label) is int and type(name) is str for label, name in pairs)


ONE, TWO = np.int64(0), np.int64(1)
FORMS: dict[str, Labels] = {
    "integers": named("a", "b"),
    "ids as strings": {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": "0", "b": "1"}},
    "ids as strings in one": {"id2label": {0: "a", 1: "b"}, "label2id": {"a": "0", "b": "1"}},
    "id2label alone": {"id2label": {0: "a", 1: "b"}},
    "id2label alone, ids as strings": {"id2label": {"0": "a", "1": "b"}},
    "NumPy": {"id2label": {ONE: np.str_("a"), TWO: np.str_("b")}, "label2id": {np.str_("a"): ONE, np.str_("b"): TWO}},
    "any order": {"id2label": {1: "b", 0: "a"}},
}


@each_way
@pytest.mark.parametrize("form", FORMS)
def test_labels_of_any_types_are_saved_and_loaded_as_integers_and_strings(
    form: str, way: Callable[..., VPTModel], tmp_path: Path
) -> None:
    if form == "NumPy" and way is by_loading:
        pytest.skip("transformers cannot log such a config")
    vpt = way(FORMS[form], tmp_path / "backbone")
    assert labels_of(vpt) == named("a", "b") and is_normal(labels_of(vpt))
    assert list(vpt.config.id2label) == [0, 1] and vpt.config.num_labels == 2
    vpt.save_pretrained(tmp_path / "adapter")
    loaded = VPTModel.from_pretrained(vpt.unload(), tmp_path / "adapter")
    assert labels_of(loaded) == named("a", "b") and is_normal(labels_of(loaded))


@pytest.mark.parametrize("way", [by_add_adapter, by_assignment])
@pytest.mark.parametrize("ids", [(0, 1), ("0", "1")])
def test_label2id_alone_names_the_labels(way: Callable[..., VPTModel], ids: tuple[Any, Any], tmp_path: Path) -> None:
    vpt = way({"label2id": {"a": ids[0], "b": ids[1]}}, tmp_path)
    assert labels_of(vpt) == named("a", "b") and is_normal(labels_of(vpt))


@each_way
@pytest.mark.parametrize(
    ("given", "names"),
    [({0: 5, 1: 6}, ("5", "6")), ({0: True, 1: False}, ("True", "False")), ({0: 0.5, 1: -3}, ("0.5", "-3"))],
)
def test_names_that_are_numbers_become_strings(
    given: dict[int, Any], names: tuple[str, str], way: Callable[..., VPTModel], tmp_path: Path
) -> None:
    vpt = way({"id2label": given}, tmp_path / "backbone")
    assert labels_of(vpt) == named(*names) and is_normal(labels_of(vpt))
    vpt.save_pretrained(tmp_path / "adapter")
    assert f"| labels | {names[0]}, {names[1]} |" in (tmp_path / "adapter" / CARD).read_text()
    assert VPTModel.from_pretrained(vpt.unload(), tmp_path / "adapter").config.id2label == dict(enumerate(names))


@each_way
def test_labels_may_have_equal_names(way: Callable[..., VPTModel], tmp_path: Path) -> None:
    vpt = way({"id2label": {0: "crane", 1: "crane"}}, tmp_path / "backbone")  # as in ImageNet
    vpt.save_pretrained(tmp_path / "adapter")
    loaded = VPTModel.from_pretrained(vpt.unload(), tmp_path / "adapter")
    assert loaded.config.id2label == {0: "crane", 1: "crane"} and loaded.config.label2id == {"crane": 1}


def test_an_adapter_with_as_many_labels_as_the_backbone_has_its_names() -> None:
    vpt = get_vpt_model(tiny_vit(num_labels=3, **named("a", "b", "c")).model, CONFIG)
    for name, number in (("inherits", None), ("integer", 3), ("NumPy", np.int64(3)), ("string", "3")):
        vpt.add_adapter(name, CONFIG, num_labels=number)
        vpt.set_adapter(name)
        assert labels_of(vpt) == named("a", "b", "c")
    vpt.add_adapter("other", CONFIG, num_labels=2)
    vpt.set_adapter("other")
    assert labels_of(vpt) == named("LABEL_0", "LABEL_1")
    vpt.add_adapter("agrees", CONFIG, num_labels=np.int64(2), id2label={0: "x", 1: "y"})
    vpt.set_adapter("agrees")
    assert labels_of(vpt) == named("x", "y")


FROM_1 = {"id2label": {1: "a", 2: "b"}, "label2id": {"a": 1, "b": 2}}
WRONG: dict[str, tuple[Labels, str]] = {
    "ids from 1": (FROM_1, "id2label must map 0 to n-1 to names, got {1: 'a', 2: 'b'}. Count from 0."),
    "ids from 1 as strings": ({"id2label": {"1": "a", "2": "b"}}, "Count from 0."),
    "ids with a gap": ({"id2label": {0: "a", 2: "b"}}, "id2label must map 0 to n-1 to names"),
    "one id twice": ({"id2label": {0: "a", "0": "b"}}, "id2label must map 0 to n-1 to names"),
    "a negative id": ({"id2label": {-1: "a", 0: "b"}}, "Numbers of labels must be integers from 0, got -1."),
    "a fraction as id": ({"id2label": {0.0: "a", 1.5: "b"}}, "Numbers of labels must be integers from 0, got 0.0."),
    "a boolean as id": ({"id2label": {False: "a", True: "b"}}, "Numbers of labels must be integers from 0, got False."),
    "no digits": ({"id2label": {"zero": "a", "one": "b"}}, "Numbers of labels must be integers from 0, got 'zero'."),
    "maps the wrong way round": ({"id2label": {"a": 0, "b": 1}}, "Numbers of labels must be integers from 0, got 'a'."),
    "no name": ({"id2label": {0: "a", 1: None}}, "Names of labels must be strings, got None."),
    "half a character": ({"id2label": {0: "a", 1: "\ud800"}}, r"got '\ud800': surrogates not allowed."),
    "contradiction": (
        {"id2label": {0: "a", 1: "b"}, "label2id": {"b": 0, "a": 1}},
        "label2id must map names to their ids in id2label, got 'b': 0, but id2label has 0: 'a'. Give one of the two",
    ),
    "problem type": (
        {**named("a", "b"), "problem_type": "single_label"}, "problem_type must be one of (None, 'regression', ",
    ),
}  # fmt: skip
# What transformers takes for something else, or refuses by itself.
WRONG_ARGUMENTS: dict[str, tuple[Labels, str]] = {
    "label2id from 1": ({"label2id": {"a": 1, "b": 2}}, "label2id must map n names to 0 to n-1, got {'a': 1, 'b': 2}."),
    "one id for two names": ({"label2id": {"a": 0, "b": 0}}, "label2id must map n names to 0 to n-1"),
    "a list": ({"id2label": ["a", "b"]}, "id2label must map 0 to n-1 to names, got ['a', 'b']."),
    "a list of ids": ({"label2id": ["a", "b"]}, "label2id must map names to 0 to n-1, got ['a', 'b']."),
    "names of others": ({**named("a", "b"), "label2id": {"c": 0, "d": 1}}, "got 'c': 0, but id2label has 0: 'a'"),
    "fewer names": (
        {"num_labels": 3, "id2label": {0: "a", 1: "b"}},
        "Each of num_labels=3 labels must have a name in id2label or label2id, got 2 names: ['a', 'b'].",
    ),
    "more names": ({"num_labels": 1, "label2id": {"a": 0, "b": 1}}, "Each of num_labels=1 labels must have a name"),
    "a negative number": ({"num_labels": -1}, "Numbers of labels must be integers from 0, got -1."),
    "a number in words": ({"num_labels": "two"}, "Numbers of labels must be integers from 0, got 'two'."),
    "one class": (
        {"num_labels": 1, "problem_type": "single_label_classification"}, "needs at least 2 labels, got 1: the loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*WRONG, *WRONG_ARGUMENTS])
def test_wrong_labels_of_an_adapter_are_refused_when_it_is_added(case: str, vit: Tiny) -> None:
    vpt = vit.prompted()
    labels, message = {**WRONG, **WRONG_ARGUMENTS}[case]
    with pytest.raises(ConfigError) as error:
        vpt.add_adapter("other", CONFIG, **labels)
    assert message in str(error.value)
    assert list(vpt.adapters) == ["default"]


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels_of_a_backbone_are_refused_when_the_adapter_is_made(case: str) -> None:
    labels, message = WRONG[case]
    model = tiny_vit(num_labels=2).model
    for name, value in labels.items():
        setattr(model.config, name, value)
    before = snapshot(model)
    with pytest.raises(ConfigError) as error:
        get_vpt_model(model, CONFIG)
    assert message in str(error.value)
    assert_unchanged(before, snapshot(model))


def test_fewer_names_than_the_backbone_has_labels_are_refused(vit: Tiny) -> None:
    vit.model.config.label2id = {"a": 0, "b": 1}
    with pytest.raises(ConfigError, match=r"Each of num_labels=7 labels must have a name .* got 2 names"):
        get_vpt_model(vit.model, CONFIG)
    vit.model.config.id2label = {0: "a", 1: "b"}
    with pytest.raises(ConfigError, match="got 7 outputs of 'classifier' for num_labels=2"):
        get_vpt_model(vit.model, CONFIG)


def test_labels_that_are_wrong_in_the_backbone_do_not_matter_to_an_adapter_with_others(
    vit: Tiny, tmp_path: Path
) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    vpt.unload()
    vit.model.config.id2label = {label + 1: "a" for label in range(7)}
    loaded = VPTModel.from_pretrained(vit.model, tmp_path)
    loaded.add_adapter("other", CONFIG, id2label={0: "a", 1: "b"})


# -- labels that are changed later ----------------------------------------------------------------------------------


def test_labels_that_are_set_after_attaching_are_saved_as_if_they_had_been_given(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.config.id2label = {str(label): 10 + label for label in range(7)}
    vpt.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / SAVED).read_text())
    assert saved["label2id"] == {str(10 + label): label for label in range(7)}
    assert VPTModel.from_pretrained(vpt.unload(), tmp_path).config.id2label[6] == "16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 3}, "must have the 7 labels that the adapter was made with, got 3"),
        ({"id2label": {0: "a", 1: "b"}}, "must have the 7 labels that the adapter was made with, got 2"),
        ({"id2label": {label + 1: "a" for label in range(7)}}, "Count from 0"),
        ({"problem_type": "guessing"}, "problem_type must be one of"),
    ],
)
def test_labels_that_are_set_after_attaching_and_could_not_be_loaded_are_refused_by_saving(
    changes: Labels, message: str, vit: Tiny, tmp_path: Path
) -> None:
    vpt = vit.prompted()
    for name, value in changes.items():
        setattr(vpt.config, name, value)
    for state in ({}, {"state_dict": vpt.state_dict()}):
        with pytest.raises(ConfigError, match=message):
            vpt.save_pretrained(tmp_path / "x", **state)
    assert not (tmp_path / "x").exists()


def test_a_model_without_a_head_may_have_any_number_of_labels(tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**VIT))
    model.config.id2label = model.config.label2id = None
    vpt = get_vpt_model(model, CONFIG)
    vpt.config.num_labels = 3
    vpt.save_pretrained(tmp_path)
    assert VPTModel.from_pretrained(vpt.unload(), tmp_path).config.num_labels == 3


# -- problem_type ---------------------------------------------------------------------------------------------------


def test_an_adapter_with_another_number_of_labels_does_not_inherit_problem_type(vit: Tiny, tmp_path: Path) -> None:
    vit.model.config.problem_type = "single_label_classification"
    vpt = vit.prompted()
    assert vpt.config.problem_type == "single_label_classification"
    vpt.add_adapter("one", CONFIG, num_labels=1)
    vpt.set_adapter("one")
    targets = torch.tensor([0, 2, 4, 6])
    output = vpt(vit.pixel_values, labels=targets)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - targets).square().mean())
    assert vpt.config.problem_type == "regression"
    vpt.save_pretrained(tmp_path)
    vpt.load_adapter(tmp_path / "one", "again")


def test_an_adapter_may_be_given_a_problem_type_of_its_own(vit: Tiny) -> None:
    vit.model.config.problem_type = "multi_label_classification"
    vpt = vit.prompted()
    for name, labels, expected in (
        ("inherits", {}, "multi_label_classification"),
        ("none", {"problem_type": None}, None),
        ("own", {"problem_type": "regression"}, "regression"),
        ("other", {"num_labels": 3, "problem_type": "multi_label_classification"}, "multi_label_classification"),
    ):
        vpt.add_adapter(name, CONFIG, **labels)
        vpt.set_adapter(name)
        assert vpt.config.problem_type == expected


# -- models without labels ------------------------------------------------------------------------------------------


def test_an_adapter_without_labels_answers_with_features_wherever_it_is_loaded(tmp_path: Path) -> None:
    tiny = tiny_vit(num_labels=0)
    vpt = tiny.prompted()
    features = vpt(tiny.pixel_values).logits
    assert features.shape == (4, 24)
    vpt.save_pretrained(tmp_path)
    model = tiny_vit().model
    model.vit.load_state_dict(vpt.unload().vit.state_dict())
    loaded = VPTModel.from_pretrained(model, tmp_path)
    assert torch.equal(loaded(tiny.pixel_values).logits, features)
    loaded.add_adapter("seven", CONFIG)
    loaded.add_adapter("none", CONFIG, num_labels=0)
    mixed = loaded(tiny.pixel_values, adapter_names=["default", "seven", "default", "none"])
    torch.testing.assert_close(mixed.logits[[0, 2]], features[[0, 2]])
    assert mixed.num_labels.tolist() == [24, 7, 24, 24] and mixed.logits.isfinite().sum() == 3 * 24 + 7
    with pytest.raises(ValueError, match="labels need a model with a classifier, got num_labels=0"):
        loaded(tiny.pixel_values, labels=tiny.labels)


def test_a_segmentation_model_needs_a_label() -> None:
    vpt = tiny_beit_segmenter().prompted()
    with pytest.raises(ConfigError, match="BeitForSemanticSegmentation needs at least one label, got num_labels=0"):
        vpt.add_adapter("none", CONFIG, num_labels=0)
    assert list(vpt.adapters) == ["default"]


def test_a_segmentation_model_names_its_labels_in_the_same_way(tmp_path: Path) -> None:
    tiny = tiny_beit_segmenter()
    vpt = tiny.prompted()
    vpt.add_adapter("streets", CONFIG, id2label={"0": "road", "1": "car"})
    vpt.save_pretrained(tmp_path)
    vpt.load_adapter(tmp_path / "streets", "again")
    vpt.set_adapter("again")
    assert labels_of(vpt) == named("road", "car")
