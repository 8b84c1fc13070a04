"""VPTConfig, and what importing vpt_peft.peft does."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.models import Tiny, tiny_vit

pytest.importorskip("peft", minversion="0.21")

import peft

from vpt_peft import CheckpointError, ConfigError, PromptConfig
from vpt_peft.peft import VPTConfig

UNTOUCHED = """
import sys, types, warnings
import peft, transformers, transformers.integrations.peft, transformers.pipelines, peft.mapping as mapping
import transformers.trainer, peft.utils.save_and_load, peft.auto, peft.tuners.tuners_utils
from vpt_peft import VPTModel, PromptConfig
VPTModel, PromptConfig, __import__("vpt_peft.auto")

def functions():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("peft", "transformers"):
            owners = [module, *[one for one in list(vars(module).values()) if isinstance(one, type)]]
            for owner in owners:
                for key, value in list(vars(owner).items()):
                    if isinstance(value, (types.FunctionType, type, classmethod, staticmethod, property)):
                        found[id(owner), key] = value
    return found

before = functions()
sizes = len(mapping.PEFT_TYPE_TO_CONFIG_MAPPING), len(mapping.PEFT_TYPE_TO_TUNER_MAPPING)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import vpt_peft.peft
after = functions()
assert not caught, caught
print([key for (_, key), value in before.items() if after.get((_, key)) is not value])
print(len(mapping.PEFT_TYPE_TO_CONFIG_MAPPING) - sizes[0], len(mapping.PEFT_TYPE_TO_TUNER_MAPPING) - sizes[1])
"""


def test_importing_the_bridge_replaces_no_function_of_peft_and_transformers() -> None:
    run = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n1 1\n"


def test_the_config_has_every_field_of_prompt_config_with_the_same_default() -> None:
    for field in dataclasses.fields(PromptConfig):
        assert field.name in VPTConfig.__dataclass_fields__, f"add {field.name} to VPTConfig"
    assert VPTConfig().prompt_config() == PromptConfig()


@pytest.mark.parametrize(
    "values",
    [
        {"num_tokens": 3, "deep": False}, {"layers_to_transform": [1, 2], "carry": False}, {"kind": "prefix"},
        {"bias": "all", "dropout": 0.1}, {"task_type": "IMAGE_CLASSIFICATION"}, {"modules_to_save": ["layernorm"]},
        {"num_virtual_tokens": 4},
    ],
)  # fmt: skip
def test_values_are_those_of_a_prompt_config(values: dict[str, Any]) -> None:
    assert VPTConfig(**values).prompt_config() == PromptConfig(**values)


def test_a_value_that_is_not_valid_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match="num_tokens must be at least 0, got -1"):
        VPTConfig(num_tokens=-1)
    with pytest.raises(ConfigError, match="got 5 and 3"):
        VPTConfig(num_tokens=5, num_virtual_tokens=3)


def test_configs_are_equal_if_their_fields_are_and_can_be_copied() -> None:
    config = VPTConfig(num_tokens=4, task_type="IMAGE_CLASSIFICATION", id2label={0: "a", 1: "b"})
    assert config != VPTConfig(num_tokens=5) and config.task_type is None
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert twin == config and twin.prompt_config() == config.prompt_config()


@pytest.fixture
def folder(vit: Tiny, tmp_path: Path) -> Path:
    vit.prompted(num_tokens=6, bias="all").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_opens_as_our_config(folder: Path) -> None:
    config = peft.PeftConfig.from_pretrained(folder)
    assert type(config) is VPTConfig and config.num_tokens == 6 and config.is_saved
    assert config.peft_type == "VPT" and hash(config.peft_type) == hash("VPT") and config.peft_type.value == "VPT"
    assert config.auto_mapping["base_model_class"] == "ViTForImageClassification"
    assert peft.get_peft_config(json.loads((folder / "adapter_config.json").read_text())) == config


def test_a_config_that_peft_writes_has_the_same_content(folder: Path, tmp_path: Path) -> None:
    peft.PeftConfig.from_pretrained(folder).save_pretrained(tmp_path / "again")
    contents = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"new_option": 1}, ConfigError, "no field new_option. The adapter may come from a newer vpt-peft"),
        ({"num_tokens": "6"}, ConfigError, "num_tokens must be an integer"),
        ({"id2label": {"0": "a"}}, CheckpointError, "adapter_config.json is not valid"),
        ({"fingerprint": {"config": 3}}, CheckpointError, "fingerprint of the backbone cannot be read"),
        ({"model_class": "os.system"}, CheckpointError, "model_class must be the name of a supported class"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_an_error(folder: Path, change: dict[str, Any], error: Any, match: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for load in (peft.PeftConfig.from_pretrained, VPTConfig.from_pretrained):
        with pytest.raises(error, match=match):
            load(folder)
    with pytest.raises(error, match=match):
        tiny_vit().model.load_adapter(folder)
