"""Model cards, and adapters that find their backbone by themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SWIN, VIT, Tiny, logits
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from vpt_peft import (
    AutoVPTModel,
    AutoVPTModelForFeatureExtraction,
    AutoVPTModelForImageClassification,
    AutoVPTModelForMaskedImageModeling,
    CheckpointError,
    PromptConfig,
    VPTModel,
    get_vpt_model,
)


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path) -> VPTModel:
    """A prompted model whose backbone was loaded from a folder, as users load theirs."""
    tiny.model.save_pretrained(tmp_path / "backbone")
    tiny.model = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    return tiny.prompted()


def test_a_card_says_what_the_adapter_is(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model.config.name_or_path = "google/a-backbone"
    vpt = tiny.prompted(num_tokens=3)
    details = {"training_data": "flowers", "metrics": {"accuracy": 0.875}, "license": "mit", "model_id": "me/flowers"}
    vpt.save_pretrained(tmp_path, **details)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "vpt-peft" and card.data.base_model == "google/a-backbone"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.pipeline_tag == "image-classification" and card.data.license == "mit"
    assert card.data.datasets == ["flowers"] and "visual-prompt-tuning" in card.data.tags
    parameters = sum(parameter.numel() for parameter in vpt.adapters.parameters())
    for line in (
        "| variant | VPT-Deep |", "| prompt length | 3 |", f"| trained parameters | {parameters:,} |",
        f"| bytes | {4 * parameters:,} |", "| training data | flowers |", "| accuracy | 0.875 |",
        "[google/a-backbone](https://huggingface.co/google/a-backbone)", "LABEL_6",
        'AutoVPTModel.from_pretrained("me/flowers")',
    ):  # fmt: skip
        assert line in card.text, line


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({"deep": False}, "VPT-Shallow"),
        ({"layers_to_transform": (0,)}, "VPT-Shallow"),
        ({"layers_to_transform": (1,)}, "VPT with fresh prompts in layer 1, counted from 0"),
        ({"deep": False, "carry": False}, "VPT with fresh prompts in layer 0, counted from 0"),
        ({"layers_to_transform": (0, 2)}, "VPT with fresh prompts in layers 0, 2, counted from 0"),
        ({"layers_to_transform": (0, 1, 2)}, "VPT with fresh prompts in layers 0 to 2, counted from 0"),
        ({"layers_to_transform": (0, 1, 2, 3)}, "VPT-Deep"),
        ({"num_tokens": 0}, "linear probing"),
        ({"num_tokens": 0, "bias": "all"}, "BitFit"),
    ],
)
def test_a_card_names_the_variant_by_the_layers_that_have_prompts(
    config: dict[str, Any], variant: str, vit: Tiny, tmp_path: Path
) -> None:
    vit.prompted(**config).save_pretrained(tmp_path)
    assert f"| variant | {variant} |" in (tmp_path / "README.md").read_text()


def test_what_the_user_wrote_into_a_card_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    vpt = tiny.prompted(num_tokens=3)
    vpt.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    text = path.read_text()
    path.write_text(text.replace("---\n\n", "language: en\n---\n\nMy words before.\n", 1) + "\nMy words behind.\n")
    vpt.unload()
    tiny.prompted(num_tokens=4).save_pretrained(tmp_path)
    refreshed = path.read_text()
    assert "My words before." in refreshed and "My words behind." in refreshed and "language: en" in refreshed
    assert "| prompt length | 4 |" in refreshed and "| prompt length | 3 |" not in refreshed
    path.write_text("# All mine\n")
    vpt = VPTModel.from_pretrained(_bare(tiny), tmp_path)
    vpt.create_or_update_model_card(tmp_path)
    assert ModelCard.load(path).text.strip() == "# All mine"
    assert ModelCard.load(path).data.library_name == "vpt-peft"


@pytest.mark.parametrize(
    "content",
    [b"caf\xe9", b"---\na: [1\nb: }\n---\n\nMine\n", b"---\n- a\n---\n\nMine\n", b"---\n3: 4\n---\n\nMine\n"],
    ids=["latin-1", "no YAML", "a list", "numbers"],
)
def test_a_card_that_cannot_be_read_is_left_with_a_warning_and_the_adapter_saved(
    content: bytes, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(content)
    vpt = tiny.prompted(num_tokens=3)
    with pytest.warns(UserWarning, match=r"README.md' must be UTF-8 text.* It was not changed"):
        vpt.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    VPTModel.from_pretrained(_bare(tiny), tmp_path)


def test_data_that_is_not_on_the_hub_is_named_in_the_text_alone(vit: Tiny, tmp_path: Path) -> None:
    vit.prompted().save_pretrained(tmp_path, training_data="my holiday pictures")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets is None and "| training data | my holiday pictures |" in card.text


def test_names_in_a_card_are_text_and_no_markup(vit: Tiny, tmp_path: Path) -> None:
    nasty = ["a|b", "<!-- vpt-peft: generated, end -->", "x\n```\n# y", "[z](http://x)", "long" * 1000, "f", "g"]
    vit.model.config.id2label = dict(enumerate(nasty))
    vpt = vit.prompted(num_tokens=3)
    folder = tmp_path / 'of "quotes" and \\'
    details = {"training_data": "a\n|b", "metrics": {"x|y": 0.5}}
    vpt.save_pretrained(folder, **details)
    first = (folder / "README.md").read_text()
    vpt.save_pretrained(folder, **details)
    assert (folder / "README.md").read_text() == first  # the generated part is found again, whole
    table = first[first.index("| backbone") : first.index("## How")].strip().split("\n")
    assert all(line.startswith("| ") and line.count("|") == 3 for line in table) and len(table) == 8
    assert first.count("<!--") == 2 and first.count("```") == 2 and "](http://x)" not in first and len(first) < 3_000
    code = first.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"model": vit.model}
    vpt.unload()
    exec(code, names)
    assert names["vpt"].config.id2label == dict(enumerate(nasty))


def _bare(tiny: Tiny) -> Any:
    return type(tiny.model)(tiny.model.config)


def test_code_from_the_card_runs_when_pasted(trained: VPTModel, tiny: Tiny, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "adapter")
    code = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(logits(names["vpt"], tiny.pixel_values), logits(trained, tiny.pixel_values))


@pytest.mark.parametrize("auto", [AutoVPTModel, AutoVPTModelForImageClassification])
def test_an_adapter_finds_its_backbone(trained: VPTModel, tiny: Tiny, tmp_path: Path, auto: Any) -> None:
    trained.save_pretrained(tmp_path / "adapter")
    vpt = auto.from_pretrained(tmp_path / "adapter")
    assert type(vpt.get_base_model()) is type(tiny.model) and not vpt.training
    assert torch.equal(logits(vpt, tiny.pixel_values), logits(trained, tiny.pixel_values))
    half = auto.from_pretrained(tmp_path / "adapter", is_trainable=True, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.get_nb_trainable_parameters()[0] > 0


def test_other_tasks_find_their_backbone(tmp_path: Path) -> None:
    for build, config, auto in (
        (ViTModel, ViTConfig(**VIT), AutoVPTModelForFeatureExtraction),
        (SwinForMaskedImageModeling, SwinConfig(**SWIN, encoder_stride=8), AutoVPTModelForMaskedImageModeling),
    ):
        build(config).save_pretrained(tmp_path / "backbone")
        get_vpt_model(build.from_pretrained(tmp_path / "backbone"), PromptConfig()).save_pretrained(
            tmp_path / "adapter"
        )
        for loader in (auto, AutoVPTModel):
            assert isinstance(loader.from_pretrained(tmp_path / "adapter").get_base_model(), build)
        with pytest.raises(CheckpointError, match="loads adapters for IMAGE_CLASSIFICATION, got task_type="):
            AutoVPTModelForImageClassification.from_pretrained(tmp_path / "adapter")


def test_an_adapter_without_a_named_backbone_says_so(tiny: Tiny, tmp_path: Path) -> None:
    tiny.prompted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Expected an adapter that names its backbone"):
        AutoVPTModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="has no instances"):
        AutoVPTModel()


def test_another_revision_of_the_backbone_is_warned_about(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model.config._commit_hash = "a" * 40
    tiny.prompted().save_pretrained(tmp_path)
    model = _bare(tiny)
    model.config._commit_hash = "b" * 40
    with pytest.warns(UserWarning, match="was trained on revision aaa.* has revision bbb"):
        VPTModel.from_pretrained(model, tmp_path)


def test_an_image_processor_is_saved_beside_and_pipelines_take_the_model(
    trained: VPTModel, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = tiny.pixel_values.shape[-1]
    processor = ViTImageProcessor(size={"height": size, "width": size})
    trained.save_pretrained(tmp_path / "adapter", image_processor=processor)
    try:
        found = AutoImageProcessor.from_pretrained(tmp_path / "adapter")
    except ImportError:
        pytest.skip("AutoImageProcessor of this version of transformers needs torchvision")
    assert found.size == {"height": size, "width": size}
    image = Image.new("RGB", (50, 40), (200, 30, 120))
    with caplog.at_level(logging.CRITICAL):
        answers = pipeline("image-classification", model=trained.eval(), image_processor=found)(image, top_k=7)
    expected = logits(trained, found(image, return_tensors="pt").pixel_values).softmax(-1)[0]
    assert {answer["label"] for answer in answers} == set(trained.config.id2label.values())
    assert answers[0]["score"] == pytest.approx(expected.max().item(), abs=1e-5)
