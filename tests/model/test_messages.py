"""What users of PEFT, accelerate and transformers try on a VPTModel: it works, or the error says what to do instead."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import Tiny, logits, tiny_vit
from PIL import Image
from torch import Tensor, nn

from vpt_peft import (
    AdapterError,
    AutoVPTModel,
    CheckpointError,
    ConfigError,
    PromptConfig,
    UnsupportedModelError,
    VPTError,
    VPTModel,
    get_adapter_state_dict,
    get_vpt_model,
)
from vpt_peft.convert import convert


@pytest.fixture
def saved(vit: Tiny, tmp_path: Path) -> Path:
    """An adapter whose backbone is a folder."""
    vit.model.save_pretrained(tmp_path / "backbone")
    model = type(vit.model).from_pretrained(tmp_path / "backbone")
    get_vpt_model(model, PromptConfig(num_tokens=3)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def loaders(folder: Path) -> list[Callable[..., Any]]:
    return [
        lambda **options: VPTModel.from_pretrained(tiny_vit().model, folder, **options),
        lambda **options: tiny_vit().prompted().load_adapter(folder, "other", **options),
    ]


HARMLESS: dict[str, Any] = {
    "low_cpu_mem_usage": True, "ephemeral_gpu_offload": False, "torch_device": "cpu", "autocast_adapter_dtype": True,
    "use_safetensors": True, "config": None, "key_mapping": None, "device_map": None, "force_download": False,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_an_option_of_peft_that_makes_no_difference_is_accepted(name: str, saved: Path) -> None:
    for load in loaders(saved):
        load(**{name: HARMLESS[name]})


@pytest.mark.parametrize("name", list(HARMLESS)[:4])
def test_options_of_peft_are_not_given_to_the_backbone(name: str, saved: Path) -> None:
    AutoVPTModel.from_pretrained(saved, **{name: HARMLESS[name]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto"}, "takes no device_map, got 'auto'. It is an option of the backbone"),
        (
            {"quantization_config": {"load_in_8bit": True}},
            "It is an option of the backbone: pass it to the from_pretrained",
        ),
        ({"attn_implementation": "eager"}, "or to AutoVPTModel.from_pretrained"),
        ({"num_labels": 3}, "takes no num_labels, got 3. The adapter is loaded with its own labels"),
        ({"config": PromptConfig()}, "The config in the adapter's folder is used"),
        ({"autocast_adapter_dtype": False}, "in the precision given as dtype"),
        ({"use_safetensors": False}, "as safetensors only"),
        ({"force_download": True}, "give a new cache_dir"),
        ({"proxies": {"https": "localhost"}}, "HTTPS_PROXY"),
        (
            {"adapter_nmae": "x"},
            "takes no adapter_nmae. Its further options are cache_dir, local_files_only,",
        ),
    ],
    ids=str,
)
def test_an_option_that_is_not_supported_says_what_to_use(options: dict[str, Any], message: str, saved: Path) -> None:
    for load in loaders(saved):
        with pytest.raises(TypeError, match=r"^(VPTModel\.from_pretrained|load_adapter)\(\) takes no ") as error:
            load(**options)
        assert message in str(error.value)


def test_saving_accepts_what_makes_no_difference_and_says_what_to_use(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="5GB", save_embedding_layers="auto")
    saves: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (
            vpt.save_pretrained,
            {"safe_serialization": False},
            "save_pretrained() takes no safe_serialization, got False",
        ),
        (vpt.save_pretrained, {"push_to_hub": True}, "Call push_to_hub(repo_id)."),
        (vpt.save_pretrained, {"metric": {}}, "takes no metric. Its further options are hyperparameters, license,"),
        (vpt.push_to_hub, {"tags": ["a"]}, "push_to_hub() takes no tags, got ['a']. Write tags into the metadata"),
        (vpt.create_or_update_model_card, {"author": "me"}, "create_or_update_model_card() takes no author."),
    ]
    for save, options, message in saves:
        with pytest.raises(TypeError, match=re.escape(message)):
            save(str(tmp_path / "new"), **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, "float16"], ids=str)
def test_a_precision_that_no_adapter_can_have_names_those_that_work(dtype: Any, saved: Path) -> None:
    for load in loaders(saved):
        for name in ("dtype", "torch_dtype"):
            with pytest.raises(AdapterError, match=r"dtype must be one of torch.float32, torch.bfloat16, torch"):
                load(**{name: dtype})


# -- arguments of the forward pass ----------------------------------------------------------------------------------


WRONG: dict[str, tuple[object, str]] = {
    "none": (None, "got None"),
    "path": ("cat.jpg", "got 'cat.jpg'"),
    "image": (Image.new("RGB", (32, 32)), "got a value of type Image"),
    "list": ([torch.zeros(3, 32, 32)], "got a value of type list"),
    "array": (np.zeros((1, 3, 32, 32), dtype=np.float32), "got a value of type ndarray"),
    "inputs": ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "got a value of type dict"),
    "one image": (torch.zeros(3, 32, 32), r"got a tensor of torch.float32 and shape \(3, 32, 32\)"),
    "bytes": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got a tensor of torch.uint8 and shape"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_batch_of_images_says_how_to_make_one(kind: str, vit: Tiny) -> None:
    vpt, (given, got) = vit.prompted(), WRONG[kind]
    with vpt.disable_adapter(), pytest.raises(AdapterError, match=got):
        vpt(given)
    for options in ({}, {"adapter_names": ["default"]}):
        with pytest.raises(AdapterError, match=rf"pixel_values must be a floating-point .* {got}.*image processor"):
            vpt(given, **options)


class WithFixedNames(nn.Module):
    """A model for a mixed batch of fixed tasks."""

    def __init__(self, vpt: VPTModel, names: list[str]) -> None:
        super().__init__()
        self.vpt, self.names = vpt, names

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = self.vpt(pixel_values, adapter_names=self.names)
        return output.logits, output.num_labels


@pytest.mark.parametrize("names", [["a", "b", "__base__", "a"], ["a", "a", "a", "a"]], ids=["mixed", "one task"])
def test_a_mixed_batch_can_be_exported(names: list[str], vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.add_adapter("a", PromptConfig(num_tokens=2), num_labels=3)
    vpt.add_adapter("b", PromptConfig(num_tokens=4, deep=False), num_labels=5)
    model = WithFixedNames(vpt.eval(), names)
    exported = torch.export.export(model, (vit.pixel_values,)).module()
    with torch.no_grad():
        for found, expected in zip(exported(vit.pixel_values), model(vit.pixel_values), strict=True):
            torch.testing.assert_close(found, expected)


# -- adapters -------------------------------------------------------------------------------------------------------


def test_a_list_of_one_adapter_is_set_and_no_other_list(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.add_adapter("a", PromptConfig(num_tokens=2))
    vpt.set_adapter(["a"])
    assert vpt.active_adapter == "a" and vpt.active_adapters == ["a"]
    for names in (["a", "default"], []):
        with pytest.raises(AdapterError, match=rf"one adapter is active, got {re.escape(repr(names))}.*adapter_names"):
            vpt.set_adapter(names)
    calls: list[Callable[[Any], Any]] = [vpt.delete_adapter, vpt.get_adapter_state_dict, lambda x: vpt.set_adapter([x])]
    for call in calls:
        with pytest.raises(AdapterError, match=r"has the adapters default, a, got \['a'\]\."):
            call(["a"])
    assert vpt.active_adapter == "a"


def test_an_adapter_can_be_set_without_training_it(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.set_adapter("default", inference_mode=True)
    assert vpt.get_nb_trainable_parameters()[0] == 0
    vpt.set_adapter("default")
    assert vpt.get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize("selected", ["default", 3])
def test_selected_adapters_are_a_list(selected: Any, vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    for save in (vpt.save_pretrained, vpt.push_to_hub):
        with pytest.raises(AdapterError, match=f"selected_adapters must be a list of names, got {selected!r}"):
            save(str(tmp_path / "new"), selected_adapters=selected)


def test_an_adapter_is_added_with_pefts_name_of_its_config(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.add_adapter("a", peft_config=PromptConfig(num_virtual_tokens=2), low_cpu_mem_usage=True)
    assert vpt.peft_config["a"].num_tokens == 2
    with pytest.raises(AdapterError, match=r"config must be a PromptConfig, got None. Make one: vpt_peft.PromptConfig"):
        vpt.add_adapter("b")
    with pytest.raises(TypeError, match="takes no autocast_adapter_dtype, got False"):
        vpt.add_adapter("b", PromptConfig(), autocast_adapter_dtype=False)


@pytest.mark.parametrize(
    ("config", "got"),
    [({"num_tokens": 3}, "got {'num_tokens': 3}"), (PromptConfig, "got the class itself"), (None, "got None")],
)
def test_what_is_no_config_says_how_to_make_one(config: Any, got: str, vit: Tiny) -> None:
    with pytest.raises(AdapterError, match=rf"config must be a PromptConfig, .*{got}. Make one: vpt_peft.PromptConfig"):
        get_vpt_model(vit.model, config)
    get_vpt_model(vit.model, PromptConfig())  # unchanged


@pytest.mark.parametrize("model", ["google/vit", Path("google/vit"), None], ids=str)
def test_a_name_is_no_backbone(model: Any, saved: Path) -> None:
    for attach in (lambda: get_vpt_model(model, PromptConfig()), lambda: VPTModel.from_pretrained(model, saved)):
        with pytest.raises(UnsupportedModelError, match=r"Expected a model, got .*Load it first.*from_pretrained"):
            attach()


# -- the config -----------------------------------------------------------------------------------------------------


def test_pefts_name_of_the_prompt_length_is_accepted() -> None:
    config = PromptConfig(num_virtual_tokens=7, deep=False)
    assert config == PromptConfig(7, deep=False) and "num_virtual_tokens" not in config.to_dict()
    assert config.replace(num_tokens=3) == dataclasses.replace(config, num_tokens=3) == PromptConfig(3, deep=False)
    assert PromptConfig(num_tokens=7, num_virtual_tokens=7).num_tokens == 7
    with pytest.raises(ConfigError, match="must agree, got 5 and 7"):
        PromptConfig(num_tokens=5, num_virtual_tokens=7)
    for wrong in (-1, 2.5, "3"):
        with pytest.raises(ConfigError, match="num_tokens must be"):
            PromptConfig(num_virtual_tokens=wrong)  # type: ignore[arg-type]


def test_a_config_that_is_changed_says_how_to_make_another() -> None:
    config = PromptConfig()
    for change in (lambda: setattr(config, "num_tokens", 3), lambda: delattr(config, "num_tokens")):
        with pytest.raises(ConfigError, match=r"got a change of num_tokens. Use config.replace\(num_t"):
            change()
    assert config == PromptConfig()
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and hash(twin) == hash(config)
    assert not hasattr(config, "target_modules")


# -- PEFT and accelerate --------------------------------------------------------------------------------------------


def test_functions_of_peft_say_what_to_use_for_prompts(vit: Tiny) -> None:
    peft = pytest.importorskip("peft")
    before = logits(vit.model, vit.pixel_values)
    with pytest.raises(VPTError, match=r"vpt_peft.get_vpt_model\(model, config\)"):
        peft.get_peft_model(vit.model, PromptConfig())
    with pytest.raises(AttributeError, match=r"vpt_peft.get_vpt_model\(model, config\)"):
        peft.inject_adapter_in_model(PromptConfig(), vit.model)
    assert torch.equal(logits(vit.model, vit.pixel_values), before)


def test_a_model_with_prompts_takes_no_adapters_of_peft(vit: Tiny) -> None:
    peft = pytest.importorskip("peft")
    vpt, config = vit.prompted(), peft.LoraConfig(target_modules=["q_proj"])
    before, modules = logits(vpt, vit.pixel_values), list(vpt.modules())
    for attach in (peft.get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)):
        with (
            pytest.raises(AdapterError, match="takes no adapters of PEFT"),
            pytest.warns(UserWarning, match="Already"),
        ):
            attach(vpt, config)
    for attach in (vpt.add_adapter, lambda config: vpt.add_adapter("lora", config)):
        with pytest.raises(AdapterError, match="got LoraConfig"):
            attach(config)
    assert torch.equal(logits(vpt, vit.pixel_values), before) and list(vpt.modules()) == modules


def test_the_configs_of_a_model_cannot_be_changed(vit: Tiny) -> None:
    vpt = vit.prompted()
    changes: list[Callable[[Any], Any]] = [
        lambda configs: configs.update(a=PromptConfig()),
        lambda configs: configs.__setitem__("a", PromptConfig()),
        lambda configs: configs.pop("default"),
        lambda configs: configs.__delitem__("default"),
        lambda configs: configs.clear(),
    ]
    for change in changes:
        with pytest.raises(AdapterError, match=r"made by vpt.add_adapter\(name, PromptConfig\(...\)\)"):
            change(vpt.peft_config)
    assert vpt.peft_config == {"default": vpt.active_config}
    for twin in (copy.copy(vpt.peft_config), copy.deepcopy(vpt.peft_config), dict(vpt.peft_config)):
        twin["a"] = PromptConfig()


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_prompts_cannot_be_merged(method: str, vit: Tiny) -> None:
    with pytest.raises(AdapterError, match=rf"{method}\(\) .*cannot be merged.*Keep the adapter, or call unload\(\)"):
        getattr(vit.prompted(), method)()


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("add_weighted_adapter", "cannot be combined"), ("get_layer_status", "get_model_status"),
        ("disable_adapter_layers", "disable_adapter"), ("enable_adapter_layers", "disable_adapter"),
    ],
)  # fmt: skip
def test_a_method_of_peft_that_is_not_supported_says_what_to_use(method: str, advice: str, vit: Tiny) -> None:
    with pytest.raises(AdapterError, match=rf"{method}\(\) does not apply to a VPTModel.*{advice}"):
        getattr(vit.prompted(), method)()


def test_accelerate_cannot_dispatch_a_model_with_prompts_and_leaves_it_whole(vit: Tiny, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    vpt = vit.prompted()
    before, modules = logits(vpt, vit.pixel_values), set(vpt.modules())
    split = {"base_model": "cpu", "adapters": "disk"}
    calls: list[Callable[[], Any]] = [
        lambda: accelerate.dispatch_model(vpt, {"": "cpu"}),
        lambda: accelerate.dispatch_model(vpt, split, offload_dir=tmp_path / "a"),
        lambda: accelerate.cpu_offload(vpt),
        lambda: accelerate.disk_offload(vpt, tmp_path / "c"),
        lambda: accelerate.cpu_offload_with_hook(vpt),
    ]
    for call in calls:
        with pytest.raises(AdapterError, match=r"from_pretrained\(..., device_map=...\) before get_vpt_model\(\), or"):
            call()
        assert not any(hasattr(module, "_hf_hook") for module in vpt.modules()) and set(vpt.modules()) == modules
    assert torch.equal(logits(vpt, vit.pixel_values), before)


def test_accelerate_does_not_load_the_file_of_an_adapter_into_nothing(vit: Tiny, saved: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    vpt = vit.prompted()
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    for strict in (False, True):
        with pytest.raises(CheckpointError, match=r"For the folder of an adapter use load_adapter\(folder, name\)"):
            accelerate.load_checkpoint_in_model(vpt, str(saved / "adapter_model.safetensors"), strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_adapter_state_dict(vpt).items())


# -- names of models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./typo", "a/b/c", "C:\\typo"])
def test_a_misspelt_path_of_a_backbone_is_named(name: str, tmp_path: Path) -> None:
    torch.save({"shallow_prompt": torch.zeros(1, 5, 24)}, tmp_path / "prompts.pth")
    with pytest.raises(CheckpointError, match=r"neither an existing folder nor a valid repository name. Check"):
        convert(tmp_path / "prompts.pth", name, tmp_path / "adapter")
