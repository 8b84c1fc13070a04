"""Pipelines of transformers with an adapter, its backbone and its image processor."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.clip_families import CLIP_FAMILIES
from helpers.hub_server import HubServer
from helpers.models import BEIT, SWIN, VIT, Tiny, logits, tiny_beit_segmenter, tiny_upernet, tiny_vit
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitImageProcessorPil,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    SwinBackbone,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from vpt_peft import AdapterError, CheckpointError, PromptConfig, VPTModel, get_vpt_model, hub, pipeline
from vpt_peft.pipelines import PIPELINES

NAME, BACKBONE = "me/flowers-vpt", "me/vit"
MEAN = [0.1, 0.2, 0.3]


def processor_for(side: int, **options: Any) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side}, **options)


def some_images() -> list[Image.Image]:
    """Images of different sizes and content."""
    return [
        Image.effect_mandelbrot((50 + 9 * index, 40), (-2 + 0.3 * index, -1, 1, 1), 50).convert("RGB")
        for index in range(3)
    ]


def save(model: Any, folder: Path, processor: Any = None, saved: Any = None, **config: Any) -> VPTModel:
    """Saves a backbone with the image processor ``processor``, and an adapter for it with ``saved``."""
    model.save_pretrained(folder / "backbone")
    if processor is not None:
        processor.save_pretrained(folder / "backbone")
    vpt = get_vpt_model(type(model).from_pretrained(folder / "backbone"), PromptConfig(num_tokens=3, **config))
    with torch.no_grad():
        for parameter in vpt.adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    vpt.eval().save_pretrained(folder / "adapter", image_processor=saved)
    return vpt


def scores(answer: list[dict[str, Any]]) -> dict[str, float]:
    return {one["label"]: one["score"] for one in answer}


def expected_scores(vpt: VPTModel, pixel_values: Tensor, **kwargs: Any) -> dict[str, Any]:
    probabilities = logits(vpt, pixel_values, **kwargs).softmax(-1)[0]
    return {
        vpt.config.id2label[label]: pytest.approx(one, abs=1e-5) for label, one in enumerate(probabilities.tolist())
    }


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """Errors that transformers logs."""
    messages: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Notes(logging.ERROR)
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


# -- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_own", [True, False], ids=["adapter's processor", "backbone's processor"])
def test_two_lines_classify_a_file_as_the_model_does(
    has_own: bool, tiny: Tiny, tmp_path: Path, errors: list[str]
) -> None:
    side = tiny.pixel_values.shape[-1]
    of_backbone, of_adapter = processor_for(side), processor_for(side, image_mean=MEAN)
    vpt = save(tiny.model, tmp_path, of_backbone, of_adapter if has_own else None)
    image = some_images()[0]
    image.save(tmp_path / "rose.png")
    answer = pipeline(tmp_path / "adapter")(str(tmp_path / "rose.png"), top_k=7)
    pixel_values = (of_adapter if has_own else of_backbone)(image, return_tensors="pt").pixel_values
    assert scores(answer) == expected_scores(vpt, pixel_values)
    assert [one["score"] for one in answer] == sorted((one["score"] for one in answer), reverse=True)
    assert errors == []
    transformers.pipeline("image-classification", model=vpt, image_processor=of_backbone)
    assert len(errors) == 1 and "'VPTModel' is not supported" in errors[0]  # others' messages are not silenced


def test_a_batch_of_images_gets_the_answers_of_single_images(vit: Tiny, tmp_path: Path) -> None:
    save(vit.model, tmp_path, processor_for(32))
    pipe = pipeline(tmp_path / "adapter", batch_size=2, top_k=2)
    answers = pipe(some_images())
    assert [len(answer) for answer in answers] == [2, 2, 2]
    for answer, image in zip(answers, some_images(), strict=True):
        assert scores(answer) == {name: pytest.approx(one, abs=1e-5) for name, one in scores(pipe(image)).items()}
    assert len({answer[0]["score"] for answer in answers}) == 3


def test_features_are_those_of_the_model(tmp_path: Path) -> None:
    vpt = save(ViTModel(ViTConfig(**VIT)), tmp_path, processor_for(32))
    pipe = pipeline(tmp_path / "adapter", "image-feature-extraction")
    features = pipe(some_images()[0], return_tensors=True)
    pixel_values = processor_for(32)(some_images()[0], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = vpt(pixel_values)
    assert torch.equal(features, expected.last_hidden_state) and features.shape == (1, 17, 24)
    assert pipe(some_images()[0], pool=True) == expected.pooler_output.tolist()


@pytest.mark.parametrize("makes_masks", [True, False], ids=["processor makes masks", "pipeline makes masks"])
@pytest.mark.parametrize("build", [tiny_beit_segmenter, tiny_upernet])
def test_masks_have_the_size_of_the_image(build: Callable[[], Tiny], makes_masks: bool, tmp_path: Path) -> None:
    segmenter = build()
    side = segmenter.pixel_values.shape[-1]
    options: dict[str, Any] = {"size": {"height": side, "width": side}}
    processor = (
        BeitImageProcessorPil(**options, do_center_crop=False) if makes_masks else ViTImageProcessorPil(**options)
    )
    vpt = save(segmenter.model, tmp_path, processor)
    pipe = pipeline(tmp_path / "adapter")
    images = some_images()
    for image, answer in zip(images, pipe(images, batch_size=2), strict=True):
        output = logits(vpt, processor(image, return_tensors="pt").pixel_values)
        labels = torch.nn.functional.interpolate(output, (image.height, image.width), mode="bilinear").argmax(1)[0]
        assert [one["label"] for one in answer] == [vpt.config.id2label[label] for label in labels.unique().tolist()]
        for one, label in zip(answer, labels.unique(), strict=True):
            mask = torch.tensor(one["mask"].get_flattened_data()).view(image.height, image.width)
            assert torch.equal(mask == 255, labels == label) and set(mask.unique().tolist()) <= {0, 255}
    with pytest.raises(ValueError, match="Subtask panoptic is not supported"):
        pipe(images[0], subtask="panoptic")


@pytest.mark.parametrize("is_loaded", [True, False])
def test_masks_of_an_added_decode_head_cover_the_image_though_the_processor_crops(
    is_loaded: bool, tmp_path: Path
) -> None:
    crop = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "backbone")
    model = ViTModel.from_pretrained(tmp_path / "backbone")
    crop.save_pretrained(tmp_path / "backbone")
    vpt = get_vpt_model(model, PromptConfig(task_type="SEMANTIC_SEGMENTATION"), num_labels=4).eval()
    vpt.save_pretrained(tmp_path / "adapter")
    pipe = pipeline(vpt, image_processor=crop) if is_loaded else pipeline(tmp_path / "adapter")
    image = some_images()[0]
    whole = crop(image, do_center_crop=False, size={"height": 32, "width": 32}, return_tensors="pt").pixel_values
    labels = torch.nn.functional.interpolate(logits(vpt, whole), (image.height, image.width), mode="bilinear").argmax(1)
    for one in pipe(image):
        mask = torch.tensor(one["mask"].get_flattened_data()).view(image.height, image.width)
        assert torch.equal(mask == 255, labels[0] == vpt.config.label2id[one["label"]])
    assert crop.do_center_crop and crop.size["shortest_edge"] == 40


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_an_image_is_compared_with_texts(name: str, tmp_path: Path, errors: list[str]) -> None:
    family = CLIP_FAMILIES[name]
    config = {**family.config, "text_config": {**family.config["text_config"], "max_position_embeddings": 64}}
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    if name == "siglip2":
        processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "rose", "daisy"])}
    words_only = Tokenizer(WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "backbone")
    vpt = save(family.bare(**config), tmp_path, processor)
    given = {"tokenizer": tokenizer} if name == "siglip2" else {}  # whose own class would know no word of this one
    pipe = pipeline(tmp_path / "adapter", **given)
    options = {"candidate_labels": ["rose", "daisy"], "hypothesis_template": "{}"}
    padding = {"padding": True} if name == "clip" else {"padding": "max_length", "max_length": 64}
    texts = tokenizer(["rose", "daisy"], return_tensors="pt", **padding)
    for image, answer in zip(some_images(), pipe(some_images(), batch_size=2, **options), strict=True):
        with torch.no_grad():
            output = vpt(**processor(image, return_tensors="pt"), **texts).logits_per_image[0]
        expected = output.softmax(-1) if name == "clip" else output.sigmoid()
        assert scores(answer) == {
            "rose": pytest.approx(expected[0].item(), abs=1e-5), "daisy": pytest.approx(expected[1].item(), abs=1e-5),
        }  # fmt: skip
    assert errors == []


def test_each_task_on_model_cards_has_a_pipeline() -> None:
    assert set(PIPELINES) == set(hub.PIPELINES.values())


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [48, 80])
def test_positions_are_interpolated_for_an_adapter_of_another_image_size(side: int, tiny: Tiny, tmp_path: Path) -> None:
    processor = processor_for(side)
    vpt = save(tiny.model, tmp_path, saved=processor)
    answer = pipeline(tmp_path / "adapter", top_k=7)(some_images()[0])
    pixel_values = processor(some_images()[0], return_tensors="pt").pixel_values
    assert scores(answer) == expected_scores(vpt, pixel_values, interpolate_pos_encoding=True)


def test_images_leave_room_for_a_border_of_prompts(vit: Tiny, tmp_path: Path) -> None:
    vpt = save(vit.model, tmp_path, processor_for(32), location="border", deep=False)
    answer = pipeline(tmp_path / "adapter", top_k=7)(some_images()[0])
    pixel_values = processor_for(26)(some_images()[0], return_tensors="pt").pixel_values
    assert scores(answer) == expected_scores(vpt, pixel_values)


@pytest.mark.parametrize("as_name", [True, False], ids=["name", "object"])
def test_an_image_processor_that_is_given_is_used(as_name: bool, vit: Tiny, tmp_path: Path) -> None:
    vpt = save(vit.model, tmp_path, processor_for(32), processor_for(32))
    given = processor_for(32, image_mean=MEAN)
    given.save_pretrained(tmp_path / "given")
    pipe = pipeline(tmp_path / "adapter", image_processor=tmp_path / "given" if as_name else given, top_k=7)
    pixel_values = given(some_images()[0], return_tensors="pt").pixel_values
    assert scores(pipe(some_images()[0])) == expected_scores(vpt, pixel_values)


# -- the model ------------------------------------------------------------------------------------------------------


def test_a_model_answers_with_the_adapter_that_is_active(vit: Tiny) -> None:
    vpt = vit.prompted().eval()
    vpt.add_adapter("colors", PromptConfig(num_tokens=2), id2label={0: "red", 1: "green"})
    pipe = pipeline(vpt, image_processor=processor_for(32), top_k=7)
    pixel_values = processor_for(32)(some_images()[0], return_tensors="pt").pixel_values
    assert scores(pipe(some_images()[0])) == expected_scores(vpt, pixel_values)
    vpt.set_adapter("colors")
    answer = pipe(some_images()[0])
    assert scores(answer) == expected_scores(vpt, pixel_values) and set(scores(answer)) == {"red", "green"}


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(vit: Tiny) -> None:
    vpt = vit.prompted(dropout=0.9).train()
    pipe = pipeline(vpt, image_processor=processor_for(32), top_k=7)
    answer = pipe(some_images()[0])
    modes = [vpt.training, vpt.adapters["default"].training, vpt.base_model.training]
    assert modes == [True, True, False]
    pixel_values = processor_for(32)(some_images()[0], return_tensors="pt").pixel_values
    assert scores(answer) == expected_scores(vpt.eval(), pixel_values)


def test_a_pipeline_loads_in_the_precision_that_is_asked_for(vit: Tiny, tmp_path: Path) -> None:
    vpt = save(vit.model, tmp_path, processor_for(32))
    pipe = pipeline(tmp_path / "adapter", dtype="bfloat16", device="cpu", top_k=7)
    assert (pipe.model.dtype, pipe.device) == (torch.bfloat16, torch.device("cpu"))
    pixel_values = processor_for(32)(some_images()[0], return_tensors="pt").pixel_values
    expected = logits(vpt, pixel_values).softmax(-1)[0]
    found = scores(pipe(some_images()[0]))
    assert [found[f"LABEL_{label}"] for label in range(7)] == pytest.approx(expected.tolist(), abs=0.05)


def test_options_of_the_model_are_passed_on(vit: Tiny, tmp_path: Path) -> None:
    save(vit.model, tmp_path, processor_for(32))
    pipe = pipeline(tmp_path / "adapter", model_kwargs={"attn_implementation": "eager", "adapter_name": "flowers"})
    assert pipe.model.active_adapter == "flowers" and pipe.model.config._attn_implementation == "eager"


def test_a_pipeline_is_pickled_and_saved_with_its_adapter(vit: Tiny, tmp_path: Path) -> None:
    save(vit.model, tmp_path, processor_for(32, image_mean=MEAN))
    pipe = pipeline(tmp_path / "adapter")
    expected = pipe(some_images()[0])
    pipe.save_pretrained(tmp_path / "saved")
    assert pipeline(tmp_path / "saved")(some_images()[0]) == expected
    assert pickle.loads(pickle.dumps(pipe))(some_images()[0]) == expected
    assert isinstance(pipe, transformers.ImageClassificationPipeline) and "'image'" in repr(pipe)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_a_task_that_the_adapter_lacks_is_refused_before_the_backbone_is_loaded(vit: Tiny, tmp_path: Path) -> None:
    vpt = save(vit.model, tmp_path, processor_for(32))
    (tmp_path / "backbone/config.json").unlink()
    for task in ("depth-estimation", "image-feature-extraction", "text-generation"):
        with pytest.raises(AdapterError, match=f"adapter '.*adapter', 'image-classification', got '{task}'"):
            pipeline(tmp_path / "adapter", task)
        with pytest.raises(
            AdapterError, match=f"Expected the task of the adapter, 'image-classification', got '{task}"
        ):
            pipeline(vpt, task, image_processor=processor_for(32))


def test_an_adapter_without_a_pipeline_says_how_to_run_it(tmp_path: Path) -> None:
    save(BeitForMaskedImageModeling(BeitConfig(**BEIT, vocab_size=11)), tmp_path, processor_for(32))
    with pytest.raises(AdapterError, match=r"for MASKED_IMAGE_MODELING, .* no pipeline. Load it by AutoVPTModel"):
        pipeline(tmp_path / "adapter")


def test_feature_maps_are_no_features(tmp_path: Path) -> None:
    save(SwinBackbone(SwinConfig(**SWIN, out_features=["stage1", "stage2"])), tmp_path, processor_for(64))
    with pytest.raises(AdapterError, match=r"SwinBackbone has feature maps of several layers. Call the model itself"):
        pipeline(tmp_path / "adapter")


def test_an_adapter_without_labels_is_refused(tmp_path: Path) -> None:
    model = ViTForImageClassification(ViTConfig(**VIT, num_labels=0))
    vpt = save(model, tmp_path, processor_for(32))
    for adapter, options in ((tmp_path / "adapter", {}), (vpt, {"image_processor": processor_for(32)})):
        with pytest.raises(AdapterError, match=r"Expected an adapter with labels, got .* with num_labels=0"):
            pipeline(adapter, **options)


def test_what_is_no_adapter_is_refused(vit: Tiny, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"got the task 'image-classification'.*pipeline\(\"me/my-task\"\)"):
        pipeline("image-classification")
    for adapter in (vit.model, None, 3):
        with pytest.raises(AdapterError, match=f"or a VPTModel, got {type(adapter).__name__}"):
            pipeline(adapter)
    with pytest.raises(CheckpointError, match="neither an existing folder nor a valid repository name"):
        pipeline(tmp_path / "missing")


def test_a_model_needs_an_image_processor_and_no_options_of_loading(vit: Tiny) -> None:
    vpt = vit.prompted()
    with pytest.raises(AdapterError, match="image_processor must be given with a VPTModel, got None"):
        pipeline(vpt)
    with pytest.raises(AdapterError, match="must be left out with a VPTModel, which is loaded, got revision, dtype"):
        pipeline(vpt, image_processor=processor_for(32), dtype=torch.bfloat16, revision="main")


def test_a_missing_image_processor_is_asked_for(vit: Tiny, tmp_path: Path) -> None:
    save(vit.model, tmp_path)
    with pytest.raises(CheckpointError, match=r"Pass image_processor=.*None can be loaded from '.*backbone'"):
        pipeline(tmp_path / "adapter")


# -- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(hub: HubServer, vit: Tiny, tmp_path: Path) -> Iterator[HubServer]:
    """The Hub with a backbone and its image processor on it, and the client logged in as "me"."""
    vit.model.save_pretrained(tmp_path / "backbone")
    processor_for(32).save_pretrained(tmp_path / "backbone")
    hub.add_repo(BACKBONE, tmp_path / "backbone")
    with hub.client(token="hf_me", cache=tmp_path / "cache"):
        yield hub


def pushed(image_processor: Any = None, adapter_name: str = "default", **options: Any) -> VPTModel:
    """A model whose adapter is on the Hub."""
    model = AutoModelForImageClassification.from_pretrained(BACKBONE)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3), adapter_name).eval()
    vpt.push_to_hub(NAME, image_processor=image_processor, **options)
    return vpt


@pytest.mark.parametrize("adapter_name", ["default", "flowers"])
@pytest.mark.parametrize("has_own", [True, False], ids=["adapter's processor", "backbone's processor"])
def test_an_adapter_on_the_hub_brings_its_processor_and_works_offline(
    has_own: bool, adapter_name: str, online: HubServer, tmp_path: Path
) -> None:
    processor = processor_for(32, image_mean=MEAN)
    vpt = pushed(processor if has_own else None, adapter_name)
    used = processor if has_own else processor_for(32)
    expected = expected_scores(vpt, used(some_images()[0], return_tensors="pt").pixel_values)
    assert scores(pipeline(NAME, top_k=7)(some_images()[0])) == expected
    online.requests.clear()
    assert scores(pipeline(NAME, local_files_only=True, top_k=7)(some_images()[0])) == expected
    with online.client(cache=tmp_path / "cache", offline=True):
        assert scores(pipeline(NAME, top_k=7)(some_images()[0])) == expected
    assert online.requests == []


def test_offline_a_processor_that_may_exist_is_not_replaced_by_the_backbones(online: HubServer) -> None:
    pushed(processor_for(32, image_mean=MEAN))
    VPTModel.from_pretrained(tiny_vit().model, NAME)  # caches the adapter alone
    with pytest.raises(CheckpointError, match=r"Whether the repository 'me/flowers-vpt' has an image processor is unk"):
        pipeline(NAME, local_files_only=True)
    assert pipeline(NAME, local_files_only=True, image_processor=processor_for(32)).model.active_adapter == "default"


def test_an_adapter_of_an_older_revision_and_a_subfolder_brings_the_processor_of_then(online: HubServer) -> None:
    vpt = pushed(processor_for(32, image_mean=MEAN), "flowers")
    first = online.repo(NAME).history()[0].oid
    vpt.push_to_hub(NAME, image_processor=processor_for(32, image_mean=[0.9] * 3))
    pipe = pipeline(NAME, revision=first, subfolder="flowers", top_k=7)
    pixel_values = processor_for(32, image_mean=MEAN)(some_images()[0], return_tensors="pt").pixel_values
    assert scores(pipe(some_images()[0])) == expected_scores(vpt, pixel_values)
    with pytest.raises(RevisionNotFoundError):
        pipeline(NAME, revision="v9")


def test_the_backbones_processor_is_that_of_the_revision_that_the_adapter_was_trained_on(
    online: HubServer, tmp_path: Path
) -> None:
    vpt = pushed()
    processor_for(32, image_mean=MEAN).save_pretrained(tmp_path / "changed")
    changed = (tmp_path / "changed/preprocessor_config.json").read_bytes()
    online.repo(BACKBONE).put({"preprocessor_config.json": changed})
    pixel_values = processor_for(32)(some_images()[0], return_tensors="pt").pixel_values
    assert scores(pipeline(NAME, top_k=7)(some_images()[0])) == expected_scores(vpt, pixel_values)


@pytest.mark.skipif(transformers.__version__.startswith("5.12."), reason="it loads configs without the token")
def test_a_private_adapter_and_its_private_backbone_need_the_token(online: HubServer, tmp_path: Path) -> None:
    vpt = pushed(private=True)
    online.repo(BACKBONE).private = True
    pixel_values = processor_for(32)(some_images()[0], return_tensors="pt").pixel_values
    with online.client(cache=tmp_path / "another"):
        with pytest.raises(RepositoryNotFoundError, match="hf auth login"):
            pipeline(NAME)
        pipe = pipeline(NAME, token="hf_me", top_k=7)
    assert scores(pipe(some_images()[0])) == expected_scores(vpt, pixel_values)
