"""Checkpoints as the authors' code writes them become adapters that give the authors' logits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_cases import FOLDER, Case, load_case
from safetensors.torch import load_file, save_file
from tiny import logits
from torch import Tensor, nn
from transformers import ViTModel

from vpt_peft import CheckpointError, ConfigError, PromptConfig, VPTError, VPTModel
from vpt_peft.convert import convert, main

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


def weights(name: str) -> dict[str, Tensor]:
    """The state dict of the authors' prompted transformer with a head."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}


def wrapped(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The same as the authors' wrapper saves it: the transformer is ``enc``, the head is its own."""
    return {
        prefix + (key.replace("head.", "head.last_layer.") if key.startswith("head.") else f"enc.{key}"): tensor
        for key, tensor in state.items()
    }


def prompt_file(name: str, path: Path, as_tensors: bool = False) -> Path:
    """``prompt_ep*.pth`` of a ViT: its prompts as numpy arrays."""
    state = weights(name)
    names = {
        "shallow_prompt": "transformer.prompt_embeddings",
        "deep_prompt": "transformer.deep_prompt_embeddings",
    }
    found = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
    torch.save(found if as_tensors else {key: tensor.numpy() for key, tensor in found.items()}, path)
    return path


def saved(values: Any, path: Path) -> Path:
    torch.save(values, path)
    return path


def check(case: Case, folder: Path) -> PromptConfig:
    """Asserts that an adapter folder gives the recorded logits."""
    vpt = VPTModel.from_pretrained(case.model, folder)
    torch.testing.assert_close(logits(vpt, case.pixel_values), case.logits, atol=1e-5, rtol=0)
    return vpt.active_config


@pytest.mark.parametrize("name", CASES)
def test_a_model_checkpoint_gives_the_authors_logits(name: str, tmp_path: Path) -> None:
    told, inferred = CASES[name]
    case = load_case(name)
    file = saved({"model": wrapped(weights(name)), "optimizer": {"lr": 0.1}, "iteration": 3}, tmp_path / "last.pth")
    done = convert(file, case.model, tmp_path / "adapter", **told)
    assert done.config == PromptConfig(num_tokens=5, **inferred)
    assert done.head == "checkpoint"
    assert not any("prompt" in name or "head" in name for name in done.left_out)
    config = check(case, tmp_path / "adapter")
    assert config.replace(task_type=None, inference_mode=False) == done.config


@pytest.mark.parametrize("as_tensors", [False, True], ids=["arrays", "tensors"])
@pytest.mark.parametrize("name", ["vit_shallow", "vit_deep", "vit_deep_first2_carried"])
def test_a_prompt_file_gives_the_authors_logits_with_the_models_head(
    name: str, as_tensors: bool, tmp_path: Path
) -> None:
    case = load_case(name)
    file = prompt_file(name, tmp_path / "prompt_ep10.pth", as_tensors)
    done = convert(file, case.model, tmp_path / "adapter", keep_head=True)
    assert (done.head, done.left_out) == ("model", [])
    check(case, tmp_path / "adapter")


NESTINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 7},
    "wrapped": wrapped,
    "parallel": lambda state: {"state_dict": wrapped(state, "module.")},
    "parameters": lambda state: {key: nn.Parameter(tensor) for key, tensor in state.items()},
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_is_found_however_it_is_nested(nesting: str, legacy: bool, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in weights("vit_deep").items() if "encoder" not in key}
    file = tmp_path / "model.pth"
    torch.save(NESTINGS[nesting](state), file, _use_new_zipfile_serialization=not legacy)
    case = load_case("vit_deep")
    convert(file, case.model, tmp_path / "adapter")
    check(case, tmp_path / "adapter")


def test_a_safetensors_file_is_read_too(tmp_path: Path) -> None:
    case = load_case("swin_deep")
    save_file(weights("swin_deep"), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", case.model, tmp_path / "adapter")
    check(case, tmp_path / "adapter")


def test_the_unused_projection_of_the_authors_swin_is_left_out(tmp_path: Path) -> None:
    state = weights("swin_deep") | {"prompt_proj.weight": torch.ones(8, 3), "prompt_proj.bias": torch.ones(8)}
    case = load_case("swin_deep")
    done = convert(saved(wrapped(state), tmp_path / "model.pth"), case.model, tmp_path / "adapter")
    assert {"prompt_proj.bias", "prompt_proj.weight"} <= set(done.left_out)
    check(case, tmp_path / "adapter")


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    case = load_case("vit_deep")
    case.model.train()
    case.model.vit.embeddings.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in case.model.parameters()]
    settings, random_labels = case.model.config.to_dict(), {0: "cat", 1: "dog"}
    convert(saved(weights("vit_deep"), tmp_path / "model.pth"), case.model, tmp_path / "adapter")
    with pytest.raises(VPTError):
        convert(tmp_path / "model.pth", case.model, tmp_path / "adapter", id2label=random_labels)
    assert case.model.training
    assert case.model.config.to_dict() == settings
    assert flags == [parameter.requires_grad for parameter in case.model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


# -- heads and labels --------------------------------------------------------------------------------------------------


def test_prompts_without_a_head_are_refused_unless_the_models_is_kept(tmp_path: Path) -> None:
    file = prompt_file("vit_deep", tmp_path / "prompt_ep10.pth")
    with pytest.raises(CheckpointError, match="keep_head=True"):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_checkpoints_head_decides_the_number_of_labels(tmp_path: Path) -> None:
    state = weights("vit_deep")
    state["head.weight"], state["head.bias"] = state["head.weight"][:3].clone(), state["head.bias"][:3].clone()
    case = load_case("vit_deep")
    file = saved(wrapped(state), tmp_path / "model.pth")
    convert(file, case.model, tmp_path / "adapter", id2label={0: "ant", 1: "bee", 2: "fly"})
    vpt = VPTModel.from_pretrained(case.model, tmp_path / "adapter")
    torch.testing.assert_close(logits(vpt, case.pixel_values), case.logits[:, :3], atol=1e-5, rtol=0)
    assert vpt.adapters["default"].labels()["label2id"] == {"ant": 0, "bee": 1, "fly": 2}


def test_a_kept_head_of_another_number_of_labels_starts_anew(tmp_path: Path) -> None:
    case = load_case("vit_deep")
    file = prompt_file("vit_deep", tmp_path / "prompt_ep10.pth")
    done = convert(file, case.model, tmp_path / "adapter", keep_head=True, num_labels=4)
    assert done.shapes["head.classifier.weight"] == (4, 24)


@pytest.mark.parametrize(
    "labels", [{"num_labels": 8}, {"id2label": {0: "cat"}}, {"id2label": dict.fromkeys("abcdefg", "x")}]
)
def test_labels_that_do_not_fit_the_head_are_refused(labels: dict[str, Any], tmp_path: Path) -> None:
    file = saved(weights("vit_deep"), tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="label"):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter", **labels)


def test_a_model_without_a_head_needs_none(tmp_path: Path) -> None:
    model = load_case("vit_deep").model
    done = convert(prompt_file("vit_deep", tmp_path / "prompt_ep0.pth"), ViTModel(model.config), tmp_path / "adapter")
    assert done.head == "none"
    assert not any(name.startswith("head.") for name in done.shapes)


# -- what does not fit -------------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: tensor for key, tensor in state.items() if key not in names}


def plus(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {name: torch.ones(shape)}


FIRST, DEEP = "transformer.prompt_embeddings", "transformer.deep_prompt_embeddings"
MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no prompts": (without(FIRST, DEEP), "got no prompts"),
    "last layers only": (without(FIRST), "REVERSE_DEEP"),
    "too many layers": (plus(DEEP, 4, 5, 24), "4 layers.*got them for 5"),
    "another width": (plus(FIRST, 1, 5, 12), "width 24 for layer 0, got 12"),
    "another length": (plus(DEEP, 3, 4, 24), r"prompts.1: expected \(5, 24\), got \(4, 24\)"),
    "pixels": (plus(FIRST, 1, 2, 32, 32), r"got \(1, 2, 32, 32\).*LOCATION"),
    "no row": (plus(FIRST, 0, 5, 24), r"got \(0, 5, 24\)"),
    "pad": (plus("transformer.prompt_embeddings_tb", 1, 3, 8, 40), "unknown names: prompt_embeddings_tb"),
    "hidden head": (plus("head.projection.0.weight", 24, 24), "unknown names: head.projection.0.weight"),
    "MAE": (plus("fc_norm.weight", 24), "fc_norm.weight.*MAE"),
    "stages": (plus("deep_prompt_embeddings_1", 2, 5, 24), "got .*deep_prompt_embeddings_1"),
    "twice": (plus("enc.transformer.prompt_embeddings", 1, 5, 24), "several, one as 'enc.transformer.prompt"),
    "narrow head": (plus("head.weight", 7, 12), r"expected \(7, 24\), got \(7, 12\)"),
    "flat projection": (plus("transformer.prompt_proj.weight", 24), r"prompt_proj.weight must .* got \(24,\)"),
    "half a head": (without("head.bias"), "missing: head.classifier.bias"),
    "not finite": (lambda state: state | {FIRST: state[FIRST] / 0}, "not finite"),
    "another backbone": (plus("transformer.encoder.encoder_norm.bias", 24), "another one: the bias"),
    "a smaller backbone": (plus("transformer.encoder.encoder_norm.weight", 12), r"\(12,\), is not"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_and_nothing_written(misfit: str, tmp_path: Path) -> None:
    change, message = MISFITS[misfit]
    file = saved(change(weights("vit_deep")), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    vit, swin = load_case("vit_deep").model, load_case("swin_deep").model
    for case, model in (("vit_deep", swin), ("swin_deep", vit)):
        state = {key: tensor for key, tensor in weights(case).items() if "prompt" in key or "head" in key}
        with pytest.raises(CheckpointError, match=f"for {type(model).__name__}, got"):
            convert(saved(state, tmp_path / "model.pth"), model, tmp_path / "adapter")


def test_swin_needs_prompts_for_all_blocks_or_the_first(tmp_path: Path) -> None:
    state = without("deep_prompt_embeddings_3")(weights("swin_deep"))
    with pytest.raises(CheckpointError, match=r"8 layers.*got them for 6"):
        convert(saved(state, tmp_path / "model.pth"), load_case("swin_deep").model, tmp_path / "adapter")


def test_projected_prompts_without_their_projection_are_refused(tmp_path: Path) -> None:
    file = prompt_file("vit_deep_project", tmp_path / "prompt_ep10.pth")
    with pytest.raises(CheckpointError, match="lack the projection"):
        convert(file, load_case("vit_deep").model, tmp_path / "adapter", keep_head=True)


def test_shared_needs_deep_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shared=True"):
        file = saved(weights("vit_shallow"), tmp_path / "model.pth")
        convert(file, load_case("vit_shallow").model, tmp_path / "adapter", shared=True)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_converts_and_tells_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = load_case("vit_deep_img_pool")
    case.model.save_pretrained(tmp_path / "backbone")
    file = saved({"model": wrapped(weights("vit_deep_img_pool"))}, tmp_path / "model.pth")
    main(
        [str(file), "--model", str(tmp_path / "backbone"), "--output", str(tmp_path / "adapter"), "--pooling", "image"]
    )
    told = capsys.readouterr().out
    assert "prompts.3 (5, 24)" in told
    assert "head: checkpoint" in told
    assert str(tmp_path / "adapter") in told
    check(case, tmp_path / "adapter")


def test_the_command_runs_as_a_module_and_fails_with_a_message_and_status_2(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "missing.pth"), "--model", "none", "--output", str(tmp_path / "adapter")]
    run = subprocess.run([sys.executable, "-m", "vpt_peft.convert", *arguments], capture_output=True, text=True)
    assert run.returncode == 2
    assert "missing.pth', which does not exist" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_command_refuses_a_backbone_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prompt_file("vit_deep", tmp_path / "prompt_ep1.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as exit:
        main([str(file), "--model", str(tmp_path / "empty"), "--output", str(tmp_path / "adapter"), "--keep-head"])
    assert exit.value.code == 2
    assert "empty" in capsys.readouterr().err
