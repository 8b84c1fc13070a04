"""What a model card says, and that its code runs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cards import run_code, save_with_processor
from helpers.clip_families import CLIP_FAMILIES
from helpers.models import BEIT, SWIN, VIT, Tiny, logits, tiny_beit_segmenter
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitImageProcessor,
    CLIPImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessor,
    SwinBackbone,
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    __version__,
)

from vpt_peft import ConfigError, PromptConfig, VPTModel, get_vpt_model

SIZE = {"size": {"height": 32, "width": 32}}


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
        f"| transformers | {__version__} |", f"| torch | {torch.__version__} |",
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
        ({"kind": "prefix"}, "VPT-Prefix"),
        ({"kind": "prefix", "layers_to_transform": (0,)}, "VPT-Prefix in layer 0, counted from 0"),
        ({"location": "add"}, 'VPT-Deep (location "add")'),
        ({"location": "add-shared", "deep": False}, 'VPT-Shallow (location "add-shared")'),
        ({"location": "pixel", "deep": False}, 'VPT-Shallow (location "pixel")'),
        ({"location": "border", "deep": False}, 'VPT (location "border")'),
        ({"location": "channel", "deep": False}, 'VPT (location "channel")'),
        ({"num_tokens": 0, "location": "border", "deep": False}, "linear probing"),
        ({"num_tokens": 0}, "linear probing"),
        ({"num_tokens": 0, "bias": "all"}, "BitFit"),
    ],
)
def test_a_card_names_the_variant_by_the_layers_that_have_prompts(
    config: dict[str, Any], variant: str, vit: Tiny, tmp_path: Path
) -> None:
    vit.prompted(**config).save_pretrained(tmp_path)
    assert f"| variant | {variant} |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("location", "length"),
    [
        ("prepend", "3"),
        ("add", "a vector for each token"),
        ("add-shared", "a vector for all tokens"),
        ("pixel", "3 patches of pixels"),
        ("border", "3 pixels at each side of the image"),
        ("channel", "3 channels of the image"),
    ],
)
def test_a_card_says_what_a_prompt_length_counts(location: str, length: str, vit: Tiny, tmp_path: Path) -> None:
    vit.prompted(num_tokens=3, location=location, deep=False).save_pretrained(tmp_path)
    assert f"| prompt length | {length} |" in (tmp_path / "README.md").read_text()


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
    [
        b"caf\xe9",
        b"---\na: [1\nb: }\n---\n\nMine\n",
        b"---\n- a\n---\n\nMine\n",
        b"---\n3: 4\n---\n\nMine\n",
        b"---\nmodel-index: 3\n---\n\nMine\n",
    ],
    ids=["latin-1", "no YAML", "a list", "numbers", "no results"],
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


def test_names_in_a_card_are_text_and_no_markup(vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nasty = ["a|b", "<!-- vpt-peft: generated, end -->", "x\n```\n# y", "[z](http://x)", "long" * 1000, "f", "g"]
    vit.model.config.id2label = dict(enumerate(nasty))
    vpt = vit.prompted(num_tokens=3)
    folder = tmp_path / 'of "quotes" and \\'
    details = {"training_data": "a\n|b", "metrics": {"x|y": 0.5}}
    vpt.save_pretrained(folder, **details)
    first = (folder / "README.md").read_text()
    vpt.save_pretrained(folder, **details)
    assert (folder / "README.md").read_text() == first  # the generated part is found again, whole
    tables = [line for line in first[first.index("| backbone") :].split("\n") if line.startswith("|")]
    assert all(line.count("|") == 3 for line in tables) and len(tables) == 15
    assert first.count("<!--") == 2 and first.count("```") == 2 and "](http://x)" not in first and len(first) < 3_000
    vpt.unload()
    vit.model.save_pretrained(tmp_path / "backbone")
    ViTImageProcessor(**SIZE).save_pretrained(tmp_path / "backbone")
    names = run_code(first, tmp_path, monkeypatch)
    assert names["vpt"].config.id2label == dict(enumerate(nasty))


def _bare(tiny: Tiny) -> Any:
    """The same model without adapters."""
    model = type(tiny.model)(tiny.model.config)
    model.load_state_dict(tiny.model.state_dict())
    return model.eval()


@pytest.mark.parametrize("has_own", [True, False], ids=["adapter's processor", "backbone's processor"])
def test_code_from_a_card_classifies_a_file(
    trained: VPTModel,
    tiny: Tiny,
    tmp_path: Path,
    has_own: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card, processor = save_with_processor(trained, tiny.pixel_values.shape[-1], tmp_path, has_own)
    names = run_code(card, tmp_path, monkeypatch)
    expected = logits(trained, processor(names["image"], return_tensors="pt").pixel_values)
    assert torch.equal(names["logits"], expected)
    assert capsys.readouterr().out.strip() == f"LABEL_{expected.argmax().item()}"


@pytest.mark.parametrize("has_own", [True, False], ids=["adapter's processor", "backbone's processor"])
def test_two_lines_from_a_card_classify_a_file(
    trained: VPTModel,
    tiny: Tiny,
    tmp_path: Path,
    has_own: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card, _ = save_with_processor(trained, tiny.pixel_values.shape[-1], tmp_path, has_own)
    run_code(card, tmp_path, monkeypatch, block=0)
    answer = ast.literal_eval(capsys.readouterr().out)
    names = run_code(card, tmp_path, monkeypatch)
    scores = names["logits"].softmax(-1)[0]
    assert answer[0] == {"label": f"LABEL_{scores.argmax()}", "score": pytest.approx(scores.max().item(), abs=1e-5)}


def test_a_card_has_no_pipeline_where_none_can_run(vit: Tiny, tmp_path: Path) -> None:
    for model in (BeitForMaskedImageModeling(BeitConfig(**BEIT, vocab_size=11)), SwinBackbone(SwinConfig(**SWIN))):
        model.save_pretrained(tmp_path / "backbone")
        vpt = get_vpt_model(type(model).from_pretrained(tmp_path / "backbone"), PromptConfig(num_tokens=2))
        vpt.save_pretrained(tmp_path / "adapter")
        assert "pipeline" not in (tmp_path / "adapter/README.md").read_text().split("---\n")[2]
    vit.prompted().save_pretrained(tmp_path / "unnamed")
    assert "import pipeline" not in (tmp_path / "unnamed/README.md").read_text()


def test_a_card_of_an_adapter_in_a_subfolder_names_it(vit: Tiny, tmp_path: Path) -> None:
    vpt = get_vpt_model(vit.model, PromptConfig(base_model_name_or_path="google/vit"), adapter_name="cars")
    vpt.save_pretrained(tmp_path, model_id="me/all")
    assert 'print(pipeline("me/all", subfolder="cars")("image.jpg"))' in (tmp_path / "cars/README.md").read_text()


def vit_for(problem_type: str | None, num_labels: int = 2) -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**VIT, problem_type=problem_type, num_labels=num_labels))


# The model, and what the code prints.
TASKS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "segmentation": (lambda: tiny_beit_segmenter().model, r"\['LABEL_"),
    "features": (lambda: ViTModel(ViTConfig(**VIT)), r"torch.Size\(\[1, 17, 24\]\)"),
    "masked": (
        lambda: SwinForMaskedImageModeling(SwinConfig(**SWIN, encoder_stride=8)),
        r"torch.Size\(\[1, 3, 64, 64\]\)",
    ),
    "masked tokens": (
        lambda: BeitForMaskedImageModeling(BeitConfig(**BEIT, vocab_size=11)),
        r"torch.Size\(\[1, 16, 11\]\)",
    ),
    "feature maps": (
        lambda: SwinBackbone(SwinConfig(**SWIN, out_features=["stage1", "stage2"])),
        r"\[torch.Size\(\[1, 8, 16, 16\]\), torch.Size\(\[1, 16, 8, 8\]\)\]",
    ),
    "several labels": (
        lambda: vit_for("multi_label_classification"),
        r"\{'LABEL_0': 0\.\d+, 'LABEL_1': 0\.\d+\}",
    ),
    "two values": (lambda: vit_for("regression"), r"\{'LABEL_0': -?\d.+, 'LABEL_1': -?\d.+\}"),
    "one value": (lambda: vit_for(None, 1), r"\{'LABEL_0': -?\d.+\}"),
}


@pytest.mark.parametrize("processor_class", [ViTImageProcessor, BeitImageProcessor])
def test_code_from_a_card_makes_room_for_a_border(
    processor_class: Any, vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit.model.save_pretrained(tmp_path / "backbone")
    crop = {"crop_size": SIZE["size"], "do_center_crop": True} if processor_class is BeitImageProcessor else {}
    processor = processor_class(**SIZE, **crop)
    vpt = vit.prompted(num_tokens=3, location="border", deep=False)
    vpt.save_pretrained(tmp_path / "adapter", image_processor=processor)
    names = run_code((tmp_path / "adapter/README.md").read_text(), tmp_path, monkeypatch)
    assert names["inputs"].pixel_values.shape == (1, 3, 26, 26)


@pytest.mark.parametrize("task", TASKS)
def test_code_from_a_card_fits_the_task(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build, printed = TASKS[task]
    model = build()
    model.save_pretrained(tmp_path / "backbone")
    side = model.config.image_size
    vpt = get_vpt_model(type(model).from_pretrained(tmp_path / "backbone"), PromptConfig(num_tokens=2))
    vpt.save_pretrained(tmp_path / "adapter", image_processor=ViTImageProcessor(size={"height": side, "width": side}))
    card = (tmp_path / "adapter/README.md").read_text()
    run_code(card, tmp_path, monkeypatch)
    assert re.match(printed, capsys.readouterr().out)
    if "import pipeline" in card:
        run_code(card, tmp_path, monkeypatch, block=0)
        assert capsys.readouterr().out.startswith("[")


@pytest.mark.parametrize("has_own", [True, False], ids=["adapter's processor", "backbone's processor"])
def test_code_from_a_card_segments_the_whole_image_by_an_added_decode_head(
    has_own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "backbone")
    crop = BeitImageProcessor(**SIZE, do_center_crop=True, crop_size={"height": 24, "width": 24})
    crop.save_pretrained(tmp_path / "backbone")
    model = ViTModel.from_pretrained(tmp_path / "backbone")
    vpt = get_vpt_model(model, PromptConfig(task_type="SEMANTIC_SEGMENTATION"), num_labels=3)
    own = ViTImageProcessor(**SIZE) if has_own else None
    vpt.save_pretrained(tmp_path / "adapter", image_processor=own)
    names = run_code((tmp_path / "adapter/README.md").read_text(), tmp_path, monkeypatch)
    assert names["inputs"].pixel_values.shape == (1, 3, 32, 32)
    assert names["mask"].shape == (names["image"].height, names["image"].width)
    assert re.match(r"\['LABEL_", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize("is_named", [True, False], ids=["named backbone", "unnamed backbone"])
def test_code_from_a_card_compares_an_image_with_texts(
    name: str, is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family = CLIP_FAMILIES[name]
    config = {**family.config, "text_config": {**family.config["text_config"], "max_position_embeddings": 64}}
    model = family.bare(**config)
    model.save_pretrained(tmp_path / "backbone")
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", "photo", "of", "cat", "dog"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path / "backbone")
    model = type(model).from_pretrained(tmp_path / "backbone")
    model.config.name_or_path = str(tmp_path / "backbone") if is_named else ""
    vpt = get_vpt_model(model, PromptConfig(num_tokens=2))
    processor: Any = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    if name == "siglip2":
        processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    vpt.save_pretrained(tmp_path / "adapter", image_processor=processor)
    card = (tmp_path / "adapter/README.md").read_text()
    assert is_named or f"model = {type(model).__name__}.from_pretrained(" in card
    if is_named:
        run_code(card, tmp_path, monkeypatch, block=0)
        assert {one["label"] for one in ast.literal_eval(capsys.readouterr().out)} == {"cat", "dog"}
    names = run_code(card, tmp_path, monkeypatch)
    with torch.no_grad():
        expected = vpt(**names["inputs"], **names["texts"]).logits_per_image
    assert torch.equal(names["logits"], expected) and expected.shape == (1, 2)
    assert capsys.readouterr().out.strip() in ("a photo of a cat", "a photo of a dog")


def test_a_card_shows_no_absolute_path(trained: VPTModel, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    hyperparameters = {"learning_rate": 0.001, "data": str(tmp_path / "images"), "mirror": r"C:\data\more images"}
    trained.save_pretrained(
        tmp_path / "adapter", training_data=str(tmp_path / "images"), hyperparameters=hyperparameters
    )
    card = (tmp_path / "adapter/README.md").read_text()
    assert str(tmp_path) not in card and tmp_path.as_posix() not in card
    for line in (
        "| backbone | backbone |", "| training data | images |", "| data | images |", "| mirror | more images |",
        "| learning_rate | 0.001 |", 'from_pretrained("adapter")',
    ):  # fmt: skip
        assert line in card, line
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "backbone"
    )


def test_the_title_is_the_folder_or_the_repository(vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vpt = vit.prompted()
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    vpt.save_pretrained(".")
    assert "# birds\n" in Path("README.md").read_text()
    vpt.save_pretrained(".", model_id="me/cars")
    assert "# cars\n" in Path("README.md").read_text()


@pytest.mark.parametrize(
    ("training_data", "dataset"),
    [("me/flowers", ("me/flowers", "me/flowers")), ("my photos", ("unknown", "my photos")), (None, ("unknown",) * 2)],
)
def test_metrics_are_in_the_metadata_of_a_card(
    training_data: str | None, dataset: tuple[str, str], vit: Tiny, tmp_path: Path
) -> None:
    metrics = {"accuracy, % of 40 images": torch.tensor(87.5), "F1": np.float32(0.5), "IoU": "60 ± 1"}
    vit.prompted().save_pretrained(
        tmp_path / "birds", metrics=metrics, training_data=training_data, hyperparameters={"epochs": 3, "lr": 1e-3}
    )
    card = ModelCard.load(tmp_path / "birds/README.md")
    assert card.data.model_name == "birds"
    found = [
        (result.task_type, result.dataset_type, result.dataset_name, result.metric_type, result.metric_value)
        for result in card.data.eval_results
    ]
    assert found == [
        ("image-classification", *dataset, "accuracy", 87.5), ("image-classification", *dataset, "f1", 0.5),
        ("image-classification", *dataset, "iou", "60 ± 1"),
    ]  # fmt: skip
    for line in ("| accuracy, % of 40 images | 87.5 |", "| F1 | 0.5 |", "| epochs | 3 |", "| lr | 0.001 |"):
        assert line in card.text, line


def test_results_of_others_are_kept_and_those_of_an_earlier_saving_are_not(vit: Tiny, tmp_path: Path) -> None:
    def values() -> list[tuple[str, float]]:
        results = ModelCard.load(path).data.eval_results or []
        return [(result.dataset_name, result.metric_value) for result in results]

    path, vpt = tmp_path / "README.md", vit.prompted()
    vpt.save_pretrained(tmp_path, metrics={"accuracy": 0.5})
    card = ModelCard.load(path)
    theirs = EvalResult("image-classification", "me/other", "other", "accuracy", 0.25, metric_name="accuracy")
    card.data.eval_results.append(theirs)
    card.save(path)
    vpt.save_pretrained(tmp_path, metrics={"accuracy": 0.75})
    assert values() == [("other", 0.25), ("unknown", 0.75)]
    vpt.save_pretrained(tmp_path)
    assert values() == [("other", 0.25)] and "0.75" not in path.read_text()
    card = ModelCard.load(path)
    card.data.eval_results = None
    card.data.model_name = None
    card.save(path)
    vpt.save_pretrained(tmp_path, metrics={"accuracy": 0.5})
    vpt.save_pretrained(tmp_path)
    assert "model" not in ModelCard.load(path).data.to_dict()


@pytest.mark.parametrize(
    "details",
    [
        {"metrics": {"accuracy": [0.9]}}, {"metrics": [0.9]}, {"hyperparameters": "lr=3"},
        {"license": 3}, {"training_data": ["a", "b"]}, {"model_id": 7},
    ],
    ids=str,
)  # fmt: skip
def test_details_of_the_wrong_type_are_refused_before_anything_is_saved(
    details: dict[str, Any], vit: Tiny, tmp_path: Path
) -> None:
    vpt = vit.prompted()
    with pytest.raises(ConfigError, match=f"{next(iter(details))} must (be|map)"):
        vpt.save_pretrained(tmp_path / "new", **details)
    assert not (tmp_path / "new").exists()
    vpt.save_pretrained(tmp_path / "new")
    with pytest.raises(ConfigError, match=f"{next(iter(details))} must (be|map)"):
        vpt.create_or_update_model_card(tmp_path / "new", **details)
