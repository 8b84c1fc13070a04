"""Checkpoints of the official code, converted to adapters, give the logits that the official code recorded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import logits
from helpers.pickles import save
from helpers.reference_cases import FOLDER, Case, load_case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SwinForMaskedImageModeling, ViTModel

from vpt_peft import CheckpointError, ConfigError, PromptConfig, VPTError, VPTModel
from vpt_peft.convert import Conversion, convert, main

StateDict = dict[str, Tensor]

# name of the case: (arguments of convert, expected fields of the config)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_shallow": ({}, {"deep": False}),
    "vit_deep": ({}, {}),
    "vit_deep_project": ({}, {"projection_dim": 12}),
    "vit_deep_shared": ({"shared": True}, {"shared": True}),
    "vit_deep_first2_carried": ({}, {"layers_to_transform": (0, 1)}),
    "vit_deep_first2_removed": ({"carry": False}, {"layers_to_transform": (0, 1), "carry": False}),
    "vit_deep_img_pool": ({"pooling": "image"}, {"pooling": "image"}),
    "vit_shallow_prompt_pool": ({"pooling": "prompt"}, {"deep": False, "pooling": "prompt"}),
    "vit_deep_imgprompt_pool": ({"pooling": "global"}, {"pooling": "global"}),
    "swin_deep": ({}, {"pooling": "global"}),
    "swin_shallow_batch1": ({}, {"deep": False, "pooling": "global"}),
}


def official_state(name: str) -> StateDict:
    """The state dict of the official prompted transformer with the head of its backbone."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}


def with_official_model_names(state: StateDict, prefix: str = "") -> StateDict:
    """The state dict of the official model, which contains the transformer as ``enc`` and has a head of its own."""
    return {
        prefix + (key.replace("head.", "head.last_layer.") if key.startswith("head.") else f"enc.{key}"): tensor
        for key, tensor in state.items()
    }


def save_prompts(name: str, path: Path, as_arrays: bool = True) -> Path:
    """Writes ``prompt_ep*.pth`` of a ViT, in which the official code saves the prompts as numpy arrays."""
    state = official_state(name)
    names = {
        "shallow_prompt": "transformer.prompt_embeddings",
        "deep_prompt": "transformer.deep_prompt_embeddings",
    }
    prompts = {key: state[source] for key, source in names.items() if source in state}
    return save({key: tensor.numpy() for key, tensor in prompts.items()} if as_arrays else prompts, path)


def check_logits(case: Case, folder: Path) -> PromptConfig:
    """Asserts that an adapter folder gives the recorded logits."""
    vpt = VPTModel.from_pretrained(case.model, folder)
    torch.testing.assert_close(logits(vpt, case.pixel_values), case.logits, atol=1e-5, rtol=0)
    return vpt.active_config


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_a_model_gives_the_official_logits(name: str, tmp_path: Path) -> None:
    arguments, fields = CASES[name]
    case = load_case(name)
    checkpoint = {"model": with_official_model_names(official_state(name)), "optimizer": {"lr": 0.1}, "iteration": 3}
    result = convert(save(checkpoint, tmp_path / "last.pth"), case.model, tmp_path / "adapter", **arguments)
    assert isinstance(result, Conversion)
    assert result.config == PromptConfig(num_tokens=5, **fields)
    assert result.head == "checkpoint"
    assert result.left_out == sorted(
        key.removeprefix("transformer.") for key in official_state(name) if "prompt" not in key and "head" not in key
    )
    config = check_logits(case, tmp_path / "adapter")
    assert config.replace(task_type=None, inference_mode=False) == result.config


@pytest.mark.parametrize("as_arrays", [True, False], ids=["arrays", "tensors"])
@pytest.mark.parametrize("name", ["vit_shallow", "vit_deep", "vit_deep_first2_carried"])
def test_a_file_of_prompts_gives_the_official_logits_with_the_head_of_the_model(
    name: str, as_arrays: bool, tmp_path: Path
) -> None:
    case = load_case(name)
    file = save_prompts(name, tmp_path / "prompt_ep10.pth", as_arrays)
    result = convert(file, case.model, tmp_path / "adapter", keep_head=True)
    assert (result.head, result.left_out) == ("model", [])
    check_logits(case, tmp_path / "adapter")


NESTINGS: dict[str, Callable[[StateDict], Any]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 7},
    "official model": with_official_model_names,
    "data parallel": lambda state: {"state_dict": with_official_model_names(state, "module.")},
    "parameters": lambda state: {key: nn.Parameter(tensor) for key, tensor in state.items()},
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_nested_state_dicts_are_found(nesting: str, legacy: bool, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in official_state("vit_deep").items() if "encoder" not in key}
    file = tmp_path / "model.pth"
    torch.save(NESTINGS[nesting](state), file, _use_new_zipfile_serialization=not legacy)
    case = load_case("vit_deep")
    convert(file, case.model, tmp_path / "adapter")
    check_logits(case, tmp_path / "adapter")


def test_a_safetensors_file_is_converted(tmp_path: Path) -> None:
    case = load_case("swin_deep")
    save_file(official_state("swin_deep"), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", case.model, tmp_path / "adapter")
    check_logits(case, tmp_path / "adapter")


def test_the_unused_projection_of_the_official_swin_is_left_out(tmp_path: Path) -> None:
    state = official_state("swin_deep") | {"prompt_proj.weight": torch.ones(8, 3), "prompt_proj.bias": torch.ones(8)}
    case = load_case("swin_deep")
    file = save(with_official_model_names(state), tmp_path / "model.pth")
    result = convert(file, case.model, tmp_path / "adapter")
    assert {"prompt_proj.bias", "prompt_proj.weight"} <= set(result.left_out)
    check_logits(case, tmp_path / "adapter")


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    case = load_case("vit_deep")
    case.model.train()
    case.model.vit.embeddings.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    requires_grad = [parameter.requires_grad for parameter in case.model.parameters()]
    config = case.model.config.to_dict()
    convert(save(official_state("vit_deep"), tmp_path / "model.pth"), case.model, tmp_path / "adapter")
    with pytest.raises(VPTError):
        convert(tmp_path / "model.pth", case.model, tmp_path / "adapter", id2label={0: "cat", 1: "dog"})
    infinite = {key: tensor / 0 if "prompt" in key else tensor for key, tensor in official_state("vit_deep").items()}
    with pytest.raises(VPTError, match="not finite"):  # raised while the adapter is in place
        convert(save(infinite, tmp_path / "infinite.pth"), case.model, tmp_path / "adapter")
    assert case.model.training
    assert case.model.config.to_dict() == config
    assert requires_grad == [parameter.requires_grad for parameter in case.model.parameters()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


# -- heads and labels --------------------------------------------------------------------------------------------------


def test_prompts_without_a_head_raise_unless_the_head_of_the_model_is_kept(tmp_path: Path) -> None:
    file = save_prompts("vit_deep", tmp_path / "prompt_ep10.pth")
    with pytest.raises(CheckpointError, match="keep_head=True"):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_number_of_labels_is_that_of_the_head_in_the_checkpoint(tmp_path: Path) -> None:
    state = official_state("vit_deep")
    state["head.weight"], state["head.bias"] = state["head.weight"][:3].clone(), state["head.bias"][:3].clone()
    case = load_case("vit_deep")
    file = save(with_official_model_names(state), tmp_path / "model.pth")
    convert(file, case.model, tmp_path / "adapter", id2label={0: "ant", 1: "bee", 2: "fly"})
    vpt = VPTModel.from_pretrained(case.model, tmp_path / "adapter")
    torch.testing.assert_close(logits(vpt, case.pixel_values), case.logits[:, :3], atol=1e-5, rtol=0)
    assert vpt.adapters["default"].labels()["label2id"] == {"ant": 0, "bee": 1, "fly": 2}


def test_a_kept_head_with_another_number_of_labels_is_created_anew(tmp_path: Path) -> None:
    case = load_case("vit_deep")
    file = save_prompts("vit_deep", tmp_path / "prompt_ep10.pth")
    result = convert(file, case.model, tmp_path / "adapter", keep_head=True, num_labels=4)
    assert result.shapes["head.classifier.weight"] == (4, 24)


@pytest.mark.parametrize(
    "labels", [{"num_labels": 8}, {"id2label": {0: "cat"}}, {"id2label": dict.fromkeys("abcdefg", "x")}]
)
def test_labels_that_do_not_fit_the_head_raise(labels: dict[str, Any], tmp_path: Path) -> None:
    file = save(official_state("vit_deep"), tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="label"):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter", **labels)


def test_no_labels_raise(tmp_path: Path) -> None:
    file = save_prompts("vit_deep", tmp_path / "prompt_ep10.pth")
    with pytest.raises(ConfigError, match="at least 1"):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter", keep_head=True, num_labels=0)


def test_a_model_without_a_head_needs_none(tmp_path: Path) -> None:
    model = ViTModel(load_case("vit_deep").model.config)
    result = convert(save_prompts("vit_deep", tmp_path / "prompt_ep0.pth"), model, tmp_path / "adapter")
    assert result.head == "none"
    assert not any(name.startswith("head.") for name in result.shapes)


def test_a_model_for_another_task_keeps_its_head(tmp_path: Path) -> None:
    model = SwinForMaskedImageModeling(load_case("swin_deep").model.config)
    state = {key: tensor for key, tensor in official_state("swin_deep").items() if "prompt" in key or "head" in key}
    file = save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"image classification, got SwinForMasked.*keep_head=True"):
        convert(file, model, tmp_path / "adapter")
    result = convert(file, model, tmp_path / "adapter", keep_head=True)
    assert (result.head, result.config.pooling) == ("model", "default")
    assert result.left_out == ["head.bias", "head.weight"]


# -- checkpoints that do not fit ---------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {key: tensor for key, tensor in state.items() if key not in names}


def plus(name: str, *shape: int) -> Callable[[StateDict], StateDict]:
    return lambda state: state | {name: torch.ones(shape)}


FIRST, DEEP = "transformer.prompt_embeddings", "transformer.deep_prompt_embeddings"
NORM = "transformer.encoder.encoder_norm"
DEFECTS: dict[str, tuple[Callable[[StateDict], StateDict], str]] = {
    "no prompts": (without(FIRST, DEEP), "got no prompts"),
    "last layers only": (without(FIRST), "REVERSE_DEEP"),
    "too many layers": (plus(DEEP, 4, 5, 24), "1 to 4 layers, got prompts for 5"),
    "another width": (plus(FIRST, 1, 5, 12), "width 24 for layer 0, got width 12"),
    "another length": (plus(DEEP, 3, 4, 24), r"prompts.1: expected \(5, 24\), got \(4, 24\)"),
    "pixels": (plus(FIRST, 1, 2, 32, 32), r"got \(1, 2, 32, 32\).*LOCATION"),
    "empty": (plus(FIRST, 0, 5, 24), r"\(1, num_tokens, width\), got \(0, 5, 24\)"),
    "pad": (plus("transformer.prompt_embeddings_tb", 1, 3, 8, 40), "unknown tensors: prompt_embeddings_tb"),
    "hidden head": (plus("head.projection.0.weight", 24, 24), "unknown tensors: head.projection.0.weight"),
    "MAE": (plus("fc_norm.weight", 24), "fc_norm.weight.*MAE"),
    "stages": (plus("deep_prompt_embeddings_1", 2, 5, 24), "got .*deep_prompt_embeddings_1"),
    "duplicate": (plus("enc.transformer.prompt_embeddings", 1, 5, 24), "several, one as 'enc.transformer.prompt_emb"),
    "narrow head": (plus("head.weight", 7, 12), r"expected \(7, 24\), got \(7, 12\)"),
    "flat projection": (plus("transformer.prompt_proj.weight", 24), r"prompt_proj.weight must .* got \(24,\)"),
    "head without bias": (without("head.bias"), "missing: head.classifier.bias"),
    "infinite values": (lambda state: state | {FIRST: state[FIRST] / 0}, "not finite"),
    "another backbone": (plus(f"{NORM}.bias", 24), "the bias of its final norm, .* differs from the model's"),
    "a smaller backbone": (plus(f"{NORM}.weight", 12), r"the weight of its final norm, of shape \(12,\), differs"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_checkpoint_that_does_not_fit_raises_and_nothing_is_written(defect: str, tmp_path: Path) -> None:
    change, message = DEFECTS[defect]
    file = save(change(official_state("vit_deep")), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_errors_list_a_limited_number_of_tensors(tmp_path: Path) -> None:
    file = save({f"unknown.{number}": torch.ones(1) for number in range(5_000)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="and 4,900 more") as error:
        convert(file, load_case("vit_deep").model, tmp_path / "adapter")
    assert len(str(error.value)) < 5_000


def test_a_checkpoint_of_another_family_raises(tmp_path: Path) -> None:
    vit, swin = load_case("vit_deep").model, load_case("swin_deep").model
    for case, model in (("vit_deep", swin), ("swin_deep", vit)):
        state = {key: tensor for key, tensor in official_state(case).items() if "prompt" in key or "head" in key}
        with pytest.raises(CheckpointError, match=f"for {type(model).__name__}, got"):
            convert(save(state, tmp_path / "model.pth"), model, tmp_path / "adapter")


def test_swin_requires_prompts_for_all_layers_or_the_first(tmp_path: Path) -> None:
    state = without("deep_prompt_embeddings_3")(official_state("swin_deep"))
    with pytest.raises(CheckpointError, match="1 or 8 layers, got prompts for 6"):
        convert(save(state, tmp_path / "model.pth"), load_case("swin_deep").model, tmp_path / "adapter")


def test_projected_prompts_without_their_projection_raise(tmp_path: Path) -> None:
    file = save_prompts("vit_deep_project", tmp_path / "prompt_ep10.pth")
    with pytest.raises(CheckpointError, match="do not contain the projection"):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter", keep_head=True)


def test_shared_requires_deep_prompts(tmp_path: Path) -> None:
    file = save(official_state("vit_shallow"), tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="shared=True"):
        convert(file, load_case("vit_shallow").model, tmp_path / "adapter", shared=True)


# -- command -----------------------------------------------------------------------------------------------------------


def test_the_command_converts_a_checkpoint_and_prints_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = load_case("vit_deep_img_pool")
    case.model.save_pretrained(tmp_path / "backbone")
    checkpoint = {"model": with_official_model_names(official_state("vit_deep_img_pool"))}
    file = save(checkpoint, tmp_path / "model.pth")
    main(
        [str(file), "--model", str(tmp_path / "backbone"), "--output", str(tmp_path / "adapter"), "--pooling", "image"]
    )
    output = capsys.readouterr().out
    assert "prompts.3 (5, 24)" in output
    assert "head: checkpoint" in output
    assert str(tmp_path / "adapter") in output
    check_logits(case, tmp_path / "adapter")


def test_the_options_of_the_command_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*arguments: Any, **options: Any) -> Conversion:
        calls.append((arguments, options))
        return Conversion(PromptConfig(), {}, "none", [])

    monkeypatch.setattr("vpt_peft.convert.command.convert", record)
    main(["a.pth", "--model", "b", "--output", "c"])
    options = ["--no-carry", "--shared", "--keep-head", "--num-labels", "3", "--pooling", "global"]
    main(["a.pth", "--model", "b", "--output", "c", *options])
    defaults = {"pooling": None, "carry": True, "shared": False, "keep_head": False, "num_labels": None}
    changed = {"pooling": "global", "carry": False, "shared": True, "keep_head": True, "num_labels": 3}
    assert calls == [(("a.pth", "b", "c"), defaults), (("a.pth", "b", "c"), changed)]
    assert "left out: 0 tensors" in capsys.readouterr().out


@pytest.mark.heavy
def test_the_command_runs_as_a_module_and_exits_with_status_2_and_a_message_on_errors(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "missing.pth"), "--model", "none", "--output", str(tmp_path / "adapter")]
    run = subprocess.run([sys.executable, "-m", "vpt_peft.convert", *arguments], capture_output=True, text=True)
    assert run.returncode == 2
    assert "missing.pth', which does not exist" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("config", [None, "no JSON"])
def test_the_command_exits_with_status_2_if_the_backbone_cannot_be_loaded(
    config: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, backbone = save_prompts("vit_deep", tmp_path / "prompt_ep1.pth"), tmp_path / "backbone"
    backbone.mkdir()
    if config is not None:
        (backbone / "config.json").write_text(config)
    with pytest.raises(SystemExit) as exit:
        main([str(file), "--model", str(backbone), "--output", str(tmp_path / "adapter"), "--keep-head"])
    assert exit.value.code == 2
    assert str(backbone) in capsys.readouterr().err
