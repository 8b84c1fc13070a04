"""Exported files answer as the model that they were made of, run by other libraries than ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import all_families, enlarge
from helpers.models import Tiny, logits, tiny_swin, tiny_vit
from helpers.tasks import TASKS
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, ViTImageProcessorPil

from vpt_peft import AdapterError, PromptConfig, VPTModel, export, get_vpt_model
from vpt_peft.deploy import export_adapter
from vpt_peft.images.processors import read_processor

pytestmark = pytest.mark.heavy
MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: tiny_vit(num_hidden_layers=2).model,
    "swin": lambda: tiny_swin().model,
    "dinov2": lambda: all_families()["dinov2"].bare(),
    "siglip": lambda: all_families()["siglip_classifier"].bare(),
}
KINDS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"deep": False},
    "prefix": {"kind": "prefix"},
    "biases": {"bias": "all"},
    "prefix_and_biases": {"kind": "prefix", "bias": "all"},
    "tokens": {"route": "tokens"},
    "projected": {"projection_dim": 5},
    "added": {"location": "add"},
    "pooled": {"deep": False, "pooling": "global"},
}
EXACT = 1e-5


def thorough(*models: str) -> list[Any]:
    """Parameters that only thorough runs of the tests take."""
    return [pytest.param(model, marks=pytest.mark.thorough) for model in models]


def prompted(model: str, num_tokens: int = 3, **config: Any) -> VPTModel:
    vpt = get_vpt_model(MODELS[model](), PromptConfig(num_tokens=num_tokens, **config))
    return enlarge(vpt.eval())


def images(vpt: VPTModel, number: int, seed: int = 5, grow: int = 0) -> Tensor:
    """Images of another random state than those that ``export`` compares with, ``grow`` patches larger."""
    height, width = (side + grow * vpt.backbone.patch_size for side in vpt.backbone.image_size)
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run_onnx(path: Path, **inputs: Tensor) -> list[np.ndarray]:
    """The outputs of an ONNX model in onnxruntime."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    return list(session.run(None, {name: value.numpy() for name, value in inputs.items()}))


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def nodes(path: Path, *kinds: str) -> list[Any]:
    """The nodes of an ONNX model."""
    onnx = pytest.importorskip("onnx")
    return [node for node in onnx.load(path).graph.node if not kinds or node.op_type in kinds]


# -- one adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *(("vit", kind) for kind in KINDS),
        *(("swin", kind) for kind in ("shallow", "prefix_and_biases")),
        *(("dinov2", kind) for kind in ("shallow", "biases")),
        *(("siglip", kind) for kind in ("deep", "prefix")),
    ],
)
def test_a_program_answers_as_the_model_for_batches_of_any_size(model: str, kind: str, tmp_path: Path) -> None:
    vpt = prompted(model, **KINDS[kind])
    path = tmp_path / "model.pt2"
    assert export(vpt, path) < EXACT
    program = torch.export.load(path).module()
    for number in (1, 2, 5):
        batch = images(vpt, number)
        expected = logits(vpt, batch)
        torch.testing.assert_close(program(batch)["logits"], expected, atol=EXACT, rtol=0)
        with vpt.disable_adapter():
            assert (logits(vpt, batch) - expected).abs().max() > 1e-3, "the adapter must be seen"


@pytest.mark.parametrize(
    ("model", "kind"),
    [("vit", "deep"), ("swin", "shallow"), ("swin", "deep"), ("dinov2", "prefix"), ("siglip", "biases")],
)
def test_an_onnx_model_answers_as_the_model_for_batches_of_any_size(model: str, kind: str, tmp_path: Path) -> None:
    needs_onnx()
    vpt = prompted(model, **KINDS[kind])
    path = tmp_path / "model.onnx"
    assert export(vpt, path) < EXACT
    for number in (1, 2, 5):
        batch = images(vpt, number)
        found = run_onnx(path, pixel_values=batch)[0]
        torch.testing.assert_close(torch.from_numpy(found), logits(vpt, batch), atol=EXACT, rtol=0)


def test_keys_and_values_of_prompts_are_constants(tmp_path: Path) -> None:
    """As many projections and norms as without prompts, and no mask and no check for NaN."""
    needs_onnx()
    kinds = ("MatMul", "Gemm", "LayerNormalization", "Softmax", "Where", "IsNaN")
    counts = []
    for num_tokens in (0, 4):
        export(prompted("vit", num_tokens), tmp_path / "model.onnx")
        counts.append({kind: len(nodes(tmp_path / "model.onnx", kind)) for kind in kinds})
    assert counts[0] == counts[1]
    assert counts[0]["LayerNormalization"] == 5 and counts[0]["Softmax"] == 2
    assert counts[0]["Where"] == counts[0]["IsNaN"] == 0


def test_exporting_leaves_the_model_as_it_was(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted().train()
    config = vit.model.config
    before, modes = logits(vpt, vit.pixel_values), [module.training for module in vpt.modules()]
    export(vpt, tmp_path / "model.pt2")
    assert config._attn_implementation == "sdpa"
    assert [module.training for module in vpt.modules()] == modes
    assert torch.equal(logits(vpt, vit.pixel_values), before)
    assert all(parameter.grad is None for parameter in vpt.parameters())
    vpt(vit.pixel_values, labels=vit.labels).loss.backward()


# -- several adapters -----------------------------------------------------------------------------------------------


def with_every_kind(model: str) -> tuple[VPTModel, list[str]]:
    """A model with adapters of every kind, and their names with that of the bare backbone."""
    torch.manual_seed(1)
    vpt = get_vpt_model(MODELS[model](), PromptConfig(num_tokens=2), "first")
    num_layers = len(vpt.backbone.layers)
    for name, (config, num_labels) in TASKS.items():
        layers = [layer for layer in config.get("layers_to_transform", ()) if layer < num_layers]
        config = {**config, "layers_to_transform": layers} if layers else config
        if model == "swin" or not (config.get("projection_dim") and layers):
            vpt.add_adapter(name, PromptConfig(**config), num_labels=num_labels)
    vpt.add_adapter("added", PromptConfig(location="add"), num_labels=3)
    for name in vpt.adapters:
        enlarge(vpt, name)
    return vpt.eval(), ["__base__", *vpt.adapters]


def check_tasks(vpt: VPTModel, names: list[str], run: Callable[[Tensor, Tensor], Tensor]) -> None:
    """For each image the file answers as the model with that image's adapter, and -inf beyond its labels."""
    tasks = torch.tensor([*reversed(range(len(names))), 0, 3, 3])
    batch = images(vpt, len(tasks))
    for chosen in (slice(0, 1), slice(2, None)):
        found = run(batch[chosen], tasks[chosen])
        for row, image, task in zip(found, batch[chosen], tasks[chosen].tolist(), strict=True):
            expected = logits(vpt, image[None], adapter_names=[names[task]])[0]
            torch.testing.assert_close(row[: len(expected)], expected, atol=EXACT, rtol=0, msg=names[task])
            assert (row[len(expected) :] == -torch.inf).all()
    assert found.shape[1] == 7


@pytest.mark.parametrize("model", ["vit", *thorough("swin", "dinov2", "siglip")])
def test_a_program_answers_mixed_batches_by_task_numbers(model: str, tmp_path: Path) -> None:
    vpt, names = with_every_kind(model)
    assert export(vpt, tmp_path / "model.pt2", adapter_names=names) < EXACT
    program = torch.export.load(tmp_path / "model.pt2").module()
    check_tasks(vpt, names, lambda batch, tasks: program(batch, tasks)["logits"])


@pytest.mark.parametrize("model", ["vit", *thorough("swin")])
def test_an_onnx_model_answers_mixed_batches_by_task_numbers(model: str, tmp_path: Path) -> None:
    needs_onnx()
    vpt, names = with_every_kind(model)[0], ["__base__", "long", "shallow", "biased"]
    path = tmp_path / "model.onnx"
    assert export(vpt, path, adapter_names=names) < EXACT
    check_tasks(vpt, names, lambda batch, tasks: torch.from_numpy(run_onnx(path, pixel_values=batch, tasks=tasks)[0]))


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_probabilities_and_labels_are_in_the_file(suffix: str, tmp_path: Path) -> None:
    vpt = prompted("vit")
    vpt.add_adapter("pets", PromptConfig(num_tokens=2), id2label={0: "cat", 1: "dög"})
    path = tmp_path / f"model.{suffix}"
    batch, tasks = images(vpt, 2), torch.tensor([1, 0])
    if suffix == "onnx":
        needs_onnx()
    export(vpt, path, adapter_names=["default", "pets"], probabilities=True)
    if suffix == "onnx":
        import onnxruntime

        found = torch.from_numpy(run_onnx(path, pixel_values=batch, tasks=tasks)[0])
        metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    else:
        files = {"metadata.json": ""}
        found = torch.export.load(path, extra_files=files).module()(batch, tasks)["probabilities"]
        metadata = json.loads(files["metadata.json"])
    expected = logits(vpt, batch, adapter_names=["pets", "default"]).softmax(-1)
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)
    assert (found[0, 2:] == 0).all()
    default, pets = json.loads(metadata["tasks"])
    assert pets["name"] == "pets" and pets["id2label"] == {"0": "cat", "1": "dög"}
    assert len(default["id2label"]) == 7
    assert metadata["task_type"] == "IMAGE_CLASSIFICATION" and metadata["vpt_peft_version"]


def test_probabilities_of_labels_that_do_not_exclude_each_other_are_sigmoids(tmp_path: Path) -> None:
    vpt = get_vpt_model(MODELS["vit"](), PromptConfig(num_tokens=2), problem_type="multi_label_classification").eval()
    export(vpt, tmp_path / "model.pt2", probabilities=True)
    batch = images(vpt, 3)
    found = torch.export.load(tmp_path / "model.pt2").module()(batch)["probabilities"]
    torch.testing.assert_close(found, logits(vpt, batch).sigmoid(), atol=EXACT, rtol=0)


def test_the_image_processors_normalisation_is_in_the_file(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size=32)
    vpt = prompted("vit")
    assert export(vpt, tmp_path / "model.pt2", image_processor=processor) < EXACT
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    expected = logits(vpt, processor(arrays, return_tensors="pt")["pixel_values"])
    found = torch.export.load(tmp_path / "model.pt2").module()(pixels)["logits"]
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("do", ["do_rescale", "do_normalize"])
def test_steps_that_an_image_processor_leaves_out_are_left_out_of_the_file(do: str, tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[40.0, 50.0, 60.0], **{do: False})
    vpt = prompted("vit")
    assert export(vpt, tmp_path / "model.pt2", image_processor=processor) < 1e-4


@pytest.mark.parametrize("model", ["vit", *thorough("dinov2", "siglip")])
def test_an_exported_model_takes_images_of_any_size(model: str, tmp_path: Path) -> None:
    vpt = prompted(model)
    told = {} if model == "dinov2" else {"interpolate_pos_encoding": True}
    export(vpt, tmp_path / "model.pt2", image_size="any")
    program = torch.export.load(tmp_path / "model.pt2").module(check_guards=False)
    for grow in (0, 1, 3):
        batch = images(vpt, 2, grow=grow)
        torch.testing.assert_close(program(batch)["logits"], logits(vpt, batch, **told), atol=EXACT, rtol=0)


def test_an_onnx_model_takes_images_of_any_size(tmp_path: Path) -> None:
    needs_onnx()
    vpt = prompted("vit")
    export(vpt, tmp_path / "model.onnx", image_size="any")
    for grow in (0, 1, 3):
        batch = images(vpt, 2, grow=grow)
        found = torch.from_numpy(run_onnx(tmp_path / "model.onnx", pixel_values=batch)[0])
        torch.testing.assert_close(found, logits(vpt, batch, interpolate_pos_encoding=True), atol=EXACT, rtol=0)


def test_an_exported_model_takes_one_size_and_number_of_images_where_these_are_given(tmp_path: Path) -> None:
    vpt = prompted("vit")
    export(vpt, tmp_path / "model.pt2", image_size=(40, 24), batch_size=3)
    program = torch.export.load(tmp_path / "model.pt2").module()
    batch = torch.randn(3, 3, 40, 24)
    expected = logits(vpt, batch, interpolate_pos_encoding=True)
    torch.testing.assert_close(program(batch)["logits"], expected, atol=EXACT, rtol=0)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(batch[:2])


def test_linear_layers_are_quantised_to_8_bits(tmp_path: Path) -> None:
    needs_onnx()
    vpt = prompted("vit")
    path = tmp_path / "model.onnx"
    export(vpt, path)
    floats = {kind: len(nodes(path, kind)) for kind in ("MatMul", "Gemm")}
    assert b".py" not in path.read_bytes(), "no names of the exporting machine's files"
    difference = export(vpt, path, int8=True)
    onnx = pytest.importorskip("onnx")
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}
    assert len(nodes(path, "MatMulInteger")) == sum(floats.values()) - 4, "all but those of two attentions"
    batch = images(vpt, 5)
    found = torch.from_numpy(run_onnx(path, pixel_values=batch)[0])
    assert EXACT < (found - logits(vpt, batch)).abs().max() < 3 * difference
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_model_is_compiled_by_aotinductor(tmp_path: Path) -> None:
    vpt = get_vpt_model(tiny_vit(num_hidden_layers=1).model, PromptConfig(num_tokens=3)).eval()
    export(vpt, tmp_path / "model.pt2", compile=True)
    compiled = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    for number in (1, 3):
        batch = images(vpt, number)
        torch.testing.assert_close(compiled(batch)["logits"], logits(vpt, batch), atol=EXACT, rtol=0)
    assert len(json.loads(compiled.get_metadata()["tasks"])[0]["id2label"]) == 7


def test_attention_in_which_heads_share_keys_and_values_is_exported(tmp_path: Path) -> None:
    vpt = all_families()["sapiens2"].prompted()
    export(vpt, tmp_path / "model.pt2")
    batch = images(vpt, 2)
    found = torch.export.load(tmp_path / "model.pt2").module()(batch)
    with torch.no_grad():
        torch.testing.assert_close(found["last_hidden_state"], vpt(batch).last_hidden_state, atol=EXACT, rtol=0)


def test_models_without_a_classifier_are_exported_with_all_of_their_outputs(tmp_path: Path) -> None:
    vpt = all_families()["dinov2_backbone"].prompted()
    export(vpt, tmp_path / "model.pt2")
    batch = images(vpt, 2)
    found = torch.export.load(tmp_path / "model.pt2").module()(batch)
    with torch.no_grad():
        expected = vpt(batch).feature_maps
    assert list(found) == ["feature_maps.0", "feature_maps.1"]
    for name, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(found[name], theirs, atol=EXACT, rtol=0)


# -- the command's function -----------------------------------------------------------------------------------------


def test_an_adapter_is_exported_from_its_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import ViTForImageClassification

    vpt = get_vpt_model(ViTForImageClassification.from_pretrained(checkpoint), PromptConfig(num_tokens=2))
    enlarge(vpt.eval()).save_pretrained(tmp_path / "adapter")
    difference = export_adapter(tmp_path / "adapter", tmp_path / "new" / "model.pt2", normalize=True)
    assert f"{difference:.1e}" in capsys.readouterr().out
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    processor = read_processor(checkpoint)
    normalised = processor(list(pixels.numpy()), return_tensors="pt", do_resize=False)["pixel_values"]
    found = torch.export.load(tmp_path / "new" / "model.pt2").module()(pixels)["logits"]
    torch.testing.assert_close(found, logits(vpt, normalised), atol=EXACT, rtol=0)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("model.pt", {}, "ends in .onnx or .pt2, got 'model.pt'"),
        ("model.onnx", {"compile": True}, "ends in .pt2, got 'model.onnx'"),
        ("model.pt2", {"int8": True}, "ends in .onnx, got 'model.pt2'"),
        ("model.pt2", {"adapter_names": ["default"]}, "at least two different adapters, got default"),
        ("model.pt2", {"adapter_names": "default"}, "adapter_names must be a list of names, got 'default'"),
        ("model.pt2", {"adapter_names": ["default", "birds"]}, "has the adapters default, got birds"),
        ("model.pt2", {"image_size": 32}, r"must be \(height, width\) in pixels or \"any\", got 32"),
        ("model.pt2", {"batch_size": 0}, "batch_size must be a positive number or None, got 0"),
    ],
)
def test_wrong_arguments_are_a_clear_error(
    vit: Tiny, file: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        export(vit.prompted(), tmp_path / file, **options)
    assert not list(tmp_path.iterdir())


def test_images_of_any_size_are_refused_where_the_size_changes_the_computation(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="windows of SwinForImageClassification depend on the size"):
        export(prompted("swin"), tmp_path / "model.pt2", image_size="any")
    with pytest.raises(AdapterError, match="prompts at this location fit one size"):
        export(prompted("vit", location="add"), tmp_path / "model.pt2", image_size="any")


def test_models_of_images_and_texts_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    with pytest.raises(AdapterError, match=r"got CLIPModel, a model of images and texts. Export an adapter of its"):
        export(get_vpt_model(CLIPModel(config), PromptConfig()), tmp_path / "model.pt2")


def test_models_that_take_patches_are_refused(tmp_path: Path) -> None:
    vpt = all_families()["siglip2_classifier"].prompted()
    with pytest.raises(AdapterError, match="got Siglip2ForImageClassification, which takes patches"):
        export(vpt, tmp_path / "model.pt2")


def test_half_precision_is_refused_for_onnx(tmp_path: Path) -> None:
    vpt = prompted("vit").to(torch.bfloat16)
    with pytest.raises(AdapterError, match=r"exported in float32, got a backbone in torch.bfloat16"):
        export(vpt, tmp_path / "model.onnx")


def test_adapters_that_cannot_be_mixed_are_refused(tmp_path: Path) -> None:
    vpt = prompted("vit")
    vpt.add_adapter("owner", PromptConfig(modules_to_save=["layernorm"]))
    with pytest.raises(AdapterError, match="The adapters owner have copies of modules of the backbone"):
        export(vpt, tmp_path / "model.pt2", adapter_names=["default", "owner"])


def test_probabilities_of_features_are_refused(tmp_path: Path) -> None:
    vpt = all_families()["dinov2_model"].prompted()
    with pytest.raises(AdapterError, match="probabilities=True needs a classifier, got Dinov2Model"):
        export(vpt, tmp_path / "model.pt2", probabilities=True)


@pytest.mark.parametrize("tolerance", [0.0, float("nan")])
def test_a_file_that_differs_is_not_written(tolerance: float, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("an earlier file")
    with pytest.raises(AdapterError, match=r"computes something else: logits of .* Nothing was written"):
        export(prompted("vit", bias="all"), path, tolerance=tolerance)
    assert path.read_text() == "an earlier file" and len(list(tmp_path.iterdir())) == 1


def test_missing_packages_are_named(vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnx.*cannot be imported.*pip install 'vpt-peft\[export\]'"):
        export(vit.prompted(), tmp_path / "model.onnx")
