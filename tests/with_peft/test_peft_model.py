"""PeftModel with our adapters: everything that PEFT's users do with LoRA."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clip_families import CLIP_FAMILIES
from helpers.families import some_images
from helpers.hub_server import HubServer
from helpers.models import Tiny, assert_same, logits, move, tiny_vit, train_two_steps
from helpers.tasks import TASKS
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTModel

pytest.importorskip("peft", minversion="0.21")


from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

from vpt_peft import AdapterError, PromptConfig, VPTModel, get_vpt_model
from vpt_peft.peft import VPTConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SEVERAL = ["deep", "long", "shallow", "prefix", "biased"]
KINDS = ["long", "pooled", "gaps", "prefixes", "biased_shallow", "linear"]


@pytest.mark.parametrize("task", KINDS)
def test_peft_opens_what_we_save_and_we_open_what_peft_saves(
    tiny: Tiny, fresh: Any, save: Any, task: str, tmp_path: Path
) -> None:
    folder, vpt = save(fresh(), task)
    model = PeftModel.from_pretrained(fresh(), folder)
    assert torch.equal(logits(model, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    assert model.get_nb_trainable_parameters()[0] == 0 and not model.training
    model.save_pretrained(tmp_path / "by-peft")
    loaded = VPTModel.from_pretrained(fresh(), tmp_path / "by-peft")
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "by-peft")]
    assert configs[0] == configs[1]
    assert (tmp_path / "by-peft" / "README.md").is_file()


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["vit.layernorm", "mlp.fc1"]}, {"location": "channel", "deep": False},
        {"location": "pixel"}, {"location": "add"}, {"shared": True}, {"num_labels": 0},
    ],
)  # fmt: skip
def test_every_kind_of_adapter_is_saved_and_opened_by_all_three(
    vit: Tiny, fresh_vit: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = get_peft_model(fresh_vit(), VPTConfig(**{"num_tokens": 3, **config})).eval()
    move(*model.adapters.values())
    expected = logits(model, vit.pixel_values)
    model.save_pretrained(tmp_path / "peft")
    native = fresh_vit()
    native.load_adapter(tmp_path / "peft")
    native.save_pretrained(tmp_path / "native")
    for folder in (tmp_path / "peft", tmp_path / "native"):
        for load in (PeftModel, VPTModel):
            assert torch.equal(logits(load.from_pretrained(fresh_vit(), folder), vit.pixel_values), expected)
    assert torch.equal(logits(native, vit.pixel_values), expected)


@pytest.mark.parametrize("config", [{}, {"kind": "prefix", "bias": "all"}, {"deep": False, "dropout": 0.2}])
def test_training_is_that_of_get_vpt_model(tiny: Tiny, new: Any, config: dict[str, Any], tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    twin = new().model
    torch.manual_seed(5)
    vpt = get_vpt_model(twin, PromptConfig(**config), num_labels=7)
    torch.manual_seed(5)
    model = get_peft_model(tiny.model, VPTConfig(**config, num_labels=7))
    assert model.get_nb_trainable_parameters() == vpt.get_nb_trainable_parameters()
    for one in (vpt, model):
        train_two_steps(one, tiny)
    assert torch.equal(logits(model, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    assert_same(tiny.model.state_dict(), before)
    model.save_pretrained(tmp_path / "trained")
    loaded = VPTModel.from_pretrained(new().model, tmp_path / "trained")
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))


def test_auto_peft_model_finds_the_backbone(tiny: Tiny, fresh: Any, save: Any) -> None:
    folder, vpt = save(fresh(), "long")
    model = AutoPeftModel.from_pretrained(folder)
    assert type(model.get_base_model().base_model) is type(tiny.model)
    assert torch.equal(logits(model, tiny.pixel_values), logits(vpt, tiny.pixel_values))


def test_auto_peft_model_adds_a_classifier_where_the_adapter_has_one(vit: Tiny, tmp_path: Path) -> None:
    backbone = ViTModel(ViTConfig(**{**vit.model.config.to_dict(), "num_labels": 2}))
    backbone.save_pretrained(tmp_path / "backbone")
    backbone = ViTModel.from_pretrained(tmp_path / "backbone")
    config = VPTConfig(num_tokens=3, task_type="IMAGE_CLASSIFICATION", id2label={0: "a", 1: "b", 2: "c"})
    model = get_peft_model(backbone, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    for loaded in (
        AutoPeftModel.from_pretrained(tmp_path / "adapter"),
        VPTModel.from_pretrained(ViTModel.from_pretrained(tmp_path / "backbone"), tmp_path / "adapter"),
    ):
        assert torch.equal(logits(loaded, vit.pixel_values), logits(model, vit.pixel_values))
        assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.fixture
def many(tiny: Tiny, fresh: Any, save: Any) -> tuple[PeftModel, VPTModel]:
    """A PeftModel and a VPTModel with the same adapters."""
    folders = {task: save(fresh(), task)[0] for task in SEVERAL}
    first = next(iter(folders))
    model = PeftModel.from_pretrained(fresh(), folders[first], first)
    vpt = VPTModel.from_pretrained(fresh(), folders[first], first)
    for task in list(folders)[1:]:
        model.load_adapter(folders[task], task)
        vpt.load_adapter(folders[task], task)
    return model, vpt


def test_adapters_with_other_numbers_of_labels_are_loaded_and_switched(tiny: Tiny, many: Any) -> None:
    model, vpt = many
    for task in SEVERAL:
        num_labels = TASKS[task][1]
        model.set_adapter(task)
        vpt.set_adapter(task)
        assert model.active_adapters == [task] and model.config.num_labels == num_labels
        assert torch.equal(logits(model, tiny.pixel_values), logits(vpt, tiny.pixel_values))
        status = model.get_model_status()
        assert status.active_adapters == [task] and status.requires_grad == {name: name == task for name in SEVERAL}
    assert sorted(status.available_adapters) == sorted(SEVERAL) and set(status.peft_types.values()) == {"VPT"}


def test_a_batch_can_mix_adapters(tiny: Tiny, many: Any) -> None:
    model, vpt = many
    for names in (["deep", "long", "deep", "__base__"], ["biased", "shallow", "prefix", "long"], ["long"] * 4):
        mixed = logits(vpt, tiny.pixel_values, adapter_names=names)
        assert torch.equal(logits(model, tiny.pixel_values, adapter_names=names), mixed)
    assert torch.equal(logits(model, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    with pytest.raises(AdapterError, match="got cats"):
        logits(model, tiny.pixel_values, adapter_names=["cats"] * 4)


def test_names_of_a_mixed_batch_are_those_of_one_thread(tiny: Tiny, many: Any) -> None:
    model, vpt = many
    seen: list[Tensor] = []
    with model.base_model._enable_peft_forward_hooks(adapter_names=["long"] * 4):
        other = threading.Thread(target=lambda: seen.append(logits(model.get_base_model(), tiny.pixel_values)))
        other.start()
        other.join()
    assert torch.equal(seen[0], logits(vpt, tiny.pixel_values))


def test_disabling_adapters_gives_the_logits_of_the_backbone_in_every_thread(tiny: Tiny, fresh: Any, save: Any) -> None:
    model = PeftModel.from_pretrained(fresh(), save(fresh(), "long")[0])
    prompted, bare = logits(model, tiny.pixel_values), logits(fresh(), tiny.pixel_values)
    seen: list[Tensor] = []
    with model.disable_adapter():
        assert torch.equal(logits(model, tiny.pixel_values), bare)
        assert model.get_model_status().enabled is False
        other = threading.Thread(target=lambda: seen.append(logits(model, tiny.pixel_values)))
        other.start()
        other.join()
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model, tiny.pixel_values), bare)
    assert torch.equal(seen[0], bare) and torch.equal(logits(model, tiny.pixel_values), prompted)


def test_adapters_are_added_frozen_and_deleted(vit: Tiny, tmp_path: Path) -> None:
    model = get_peft_model(vit.model, VPTConfig(num_tokens=3))
    model.add_adapter("b", VPTConfig(num_tokens=4, num_labels=2))
    assert model.active_adapter == "default" and not any(p.requires_grad for p in model.adapters["b"].parameters())
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("b", VPTConfig())
    with pytest.warns(UserWarning, match="was deleted; 'b' is active now"):
        model.delete_adapter("default")
    assert model.active_adapter == "b" and list(model.peft_config) == ["b"]
    assert logits(model, vit.pixel_values).shape == (4, 2)
    with pytest.raises(AdapterError, match="only adapter"):
        model.delete_adapter("b")
    assert list(model.peft_config) == ["b"]


def test_a_failed_adapter_leaves_the_model_as_it_was(vit: Tiny) -> None:
    model = get_peft_model(vit.model, VPTConfig(num_tokens=3)).eval()
    before = logits(model, vit.pixel_values)
    for config, error in ((VPTConfig(layers_to_transform=[9]), "layers from 0 to 3"), (VPTConfig(), "'a.b'")):
        with pytest.raises(ValueError, match=error):
            model.add_adapter("a.b" if error == "'a.b'" else "b", config)
    assert list(model.peft_config) == ["default"] == list(model.adapters)
    assert torch.equal(logits(model, vit.pixel_values), before)
    bare = tiny_vit().model
    modules = list(bare.modules())
    with pytest.raises(ValueError, match="layers from 0 to 3"):
        get_peft_model(bare, VPTConfig(layers_to_transform=[9]))
    assert list(bare.modules()) == modules and not any("forward" in vars(module) for module in modules)


def test_an_adapter_is_not_replaced_by_another_of_its_name(vit: Tiny, fresh_vit: Any, save: Any) -> None:
    config = VPTConfig.from_pretrained(save(fresh_vit(), "deep")[0])
    model = inject_adapter_in_model(VPTConfig(num_tokens=2), fresh_vit(), "a")
    for given in (VPTConfig(), config):
        with pytest.raises(AdapterError, match="'a' exists already"):
            inject_adapter_in_model(given, model, "a")
    assert model.peft_config["a"].num_tokens == 2


def test_adapters_on_the_hub_are_opened(vit: Tiny, fresh_vit: Any, save: Any, hub: HubServer) -> None:
    vpt = save(fresh_vit(), "long")[1]
    vpt.push_to_hub("me/birds-vpt", token="hf_me")
    expected = logits(vpt, vit.pixel_values)
    native = fresh_vit()
    native.load_adapter("me/birds-vpt")
    for model in (PeftModel.from_pretrained(fresh_vit(), "me/birds-vpt"), native):
        assert torch.equal(logits(model, vit.pixel_values), expected)


def test_names_that_are_words_in_other_adapters_keys_lose_no_tensor(vit: Tiny, fresh_vit: Any, tmp_path: Path) -> None:
    model = get_peft_model(fresh_vit(), VPTConfig(num_tokens=3, bias="all")).eval()
    for name in ("head", "prompts", "0", "classifier", "adapters", "e", "weight"):
        model.add_adapter(name, VPTConfig(num_tokens=2, bias="all"))
    model.save_pretrained(tmp_path / "all")
    for name in model.peft_config:
        folder = tmp_path / "all" / ("" if name == "default" else name)
        model.set_adapter(name)
        loaded = VPTModel.from_pretrained(fresh_vit(), folder)
        assert torch.equal(logits(loaded, vit.pixel_values), logits(model, vit.pixel_values))


@pytest.mark.parametrize("wrap", [get_peft_model, lambda model, config: model.add_adapter(config) or model])
def test_a_state_dict_that_is_given_is_the_one_that_is_saved(vit: Tiny, wrap: Any) -> None:
    model = wrap(vit.model, VPTConfig(num_tokens=3))
    own = get_peft_model_state_dict(model)
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    saved = get_peft_model_state_dict(model, state_dict=gathered)
    assert_same(saved, {name: tensor + 1 for name, tensor in own.items()})


@pytest.mark.parametrize("task", ["long", "biased"])
def test_adapters_load_without_memory_for_initial_values(vit: Tiny, fresh_vit: Any, save: Any, task: str) -> None:
    folder, vpt = save(fresh_vit(), task)
    model = PeftModel.from_pretrained(fresh_vit(), folder, low_cpu_mem_usage=True)
    model.load_adapter(folder, "b", low_cpu_mem_usage=True)
    for name in ("default", "b"):
        model.set_adapter(name)
        assert torch.equal(logits(model, vit.pixel_values), logits(vpt, vit.pixel_values))


def test_a_loaded_adapter_trains_on_if_asked(vit: Tiny, fresh_vit: Any, save: Any) -> None:
    folder, vpt = save(fresh_vit(), "deep")
    model = PeftModel.from_pretrained(fresh_vit(), folder, is_trainable=True)
    model(pixel_values=vit.pixel_values, labels=vit.labels).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(trained) == len(list(vpt.adapters["default"].parameters()))
    assert all(".adapters.default." in name for name in trained)


def test_saving_refuses_a_backbone_that_was_trained(vit: Tiny, fresh_vit: Any, tmp_path: Path) -> None:
    model = get_peft_model(fresh_vit(), VPTConfig(num_tokens=3))
    with torch.no_grad():
        model.get_base_model().base_model.vit.layernorm.weight.mul_(1.1)
    with pytest.raises(AdapterError, match=r"vit\.layernorm\.weight.* changed"):
        model.save_pretrained(tmp_path / "x")


def test_unload_returns_the_bare_backbone_and_merging_is_refused(vit: Tiny) -> None:
    model = vit.model
    before, modules = logits(model, vit.pixel_values), list(model.modules())
    wrapped = get_peft_model(model, VPTConfig(num_tokens=3))
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter, wrapped.unmerge_adapter):
        with pytest.raises(AdapterError, match="cannot be merged"):
            merge()
    assert wrapped.unload() is model
    assert torch.equal(logits(model, vit.pixel_values), before) and list(model.modules()) == modules


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_answers_likewise_and_is_independent(vit: Tiny, twin: Callable[[Any], Any]) -> None:
    model = get_peft_model(vit.model, VPTConfig(num_tokens=3)).eval()
    copied = twin(model)
    before = logits(model, vit.pixel_values)
    assert torch.equal(logits(copied, vit.pixel_values), before)
    with torch.no_grad():
        next(copied.adapters["default"].prompts.parameters()).add_(1)
    assert not torch.equal(logits(copied, vit.pixel_values), before)
    assert torch.equal(logits(model, vit.pixel_values), before)
    with copied.disable_adapter():
        assert torch.equal(logits(model, vit.pixel_values), before)


def test_labels_that_are_changed_later_are_saved(vit: Tiny, fresh_vit: Any, tmp_path: Path) -> None:
    model = get_peft_model(fresh_vit(), VPTConfig(num_tokens=3, num_labels=2))
    model.config.id2label, model.config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    model.save_pretrained(tmp_path / "a")
    assert VPTModel.from_pretrained(fresh_vit(), tmp_path / "a").config.id2label == {0: "cat", 1: "dog"}


def test_dual_encoders_have_prompts_in_all_their_methods(tmp_path: Path) -> None:
    family = CLIP_FAMILIES["clip"]
    vpt, images = family.prompted(), some_images()
    vpt.save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(family.bare(), tmp_path / "a")
    inputs = family.arguments(images)
    with torch.no_grad():
        features = vpt.get_image_features(images).pooler_output
        assert torch.equal(model(**inputs).logits_per_image, vpt(**inputs).logits_per_image)
        assert torch.equal(model.get_image_features(images).pooler_output, features)
        with model.disable_adapter():
            assert not torch.equal(model.get_image_features(images).pooler_output, features)


class Images(Dataset):  # type: ignore[type-arg]
    """Random images with labels, and a column that no model takes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image, "labels": index % 7, "row": index}


def train(model: Any, folder: Path, resume: bool = False) -> Trainer:
    arguments = TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, save_strategy="epoch", learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=3, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Images())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


def test_trainer_trains_saves_and_resumes_as_with_lora(vit: Tiny, fresh_vit: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = get_peft_model(fresh_vit(), VPTConfig(num_tokens=3, bias="all"))
    train(model, tmp_path / "run")
    loaded = VPTModel.from_pretrained(fresh_vit(), tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(loaded, vit.pixel_values), logits(model.eval(), vit.pixel_values))
    earlier = VPTModel.from_pretrained(fresh_vit(), tmp_path / "run" / "checkpoint-2")
    assert not torch.equal(logits(earlier, vit.pixel_values), logits(loaded, vit.pixel_values))
    resumed = get_peft_model(fresh_vit(), VPTConfig(num_tokens=3, bias="all"))
    train(resumed, tmp_path / "run", resume=True)
    assert_same(dict(resumed.eval().state_dict()), dict(model.state_dict()))
