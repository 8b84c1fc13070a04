"""Models of videos: their input, the classifier that is added, and what becomes of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.families import NUM_IMAGES, NUM_LABELS, Family, difference, enlarge, run, some_images
from helpers.models import Tiny
from helpers.video_families import NUM_FRAMES, VIDEO_FAMILIES, make_videos
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import Trainer, TrainingArguments

from vpt_peft import (
    AdapterError,
    AutoVPTModel,
    AutoVPTModelForImageClassification,
    AutoVPTModelForVideoClassification,
    CheckpointError,
    ConfigError,
    PromptConfig,
    RouteError,
    VPTModel,
    check_architecture,
    get_vpt_model,
)
from vpt_peft.backbones import find_backbone

CLASSIFIERS = ("videomae", "vivit", "vjepa2")
MODELS = ("videomae_model", "videomae_model_with_norm", "vivit_model", "vjepa2_model")
TASK = {"task_type": "VIDEO_CLASSIFICATION"}


def some_videos(seed: int = 3) -> Tensor:
    return make_videos(some_images(seed))


def logits(model: Any, videos: Tensor, **kwargs: Any) -> Tensor:
    """Logits, without gradients."""
    with torch.no_grad():
        found: Tensor = model(videos, **kwargs).logits
    return found


def classify(family: Family, **config: Any) -> VPTModel:
    """A model without a classifier, with one that is added."""
    torch.manual_seed(1)
    return enlarge(get_vpt_model(family.bare(), PromptConfig(num_tokens=3, **TASK, **config), num_labels=4).eval())


@pytest.fixture(params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest) -> Family:
    return VIDEO_FAMILIES[request.param]


@pytest.fixture(params=MODELS)
def headless(request: pytest.FixtureRequest) -> Family:
    return VIDEO_FAMILIES[request.param]


@pytest.fixture
def vjepa2() -> Family:
    return VIDEO_FAMILIES["vjepa2"]


def test_videos_have_the_backbones_name_or_come_first(classifier: Family) -> None:
    vpt, videos = classifier.prompted(), some_videos()
    name = "pixel_values_videos" if "VJEPA2" in classifier.model_class else "pixel_values"
    assert vpt.main_input_name == name
    assert torch.equal(logits(vpt, videos), run(vpt, some_images(), classifier).logits)
    with pytest.raises(AdapterError, match=rf"{name} must be .* shape \(num_videos, num_frames, num_channels, height"):
        vpt(**{name: some_images()})
    with pytest.raises(AdapterError, match=f"{name} must be .* got None. Use the video processor"):
        vpt()
    with pytest.raises(AdapterError, match=f"takes {name}, got pixel_values and pixel_values_videos"):
        vpt(pixel_values=videos, pixel_values_videos=videos)
    if name == "pixel_values":
        with pytest.raises(AdapterError, match="VideoClassification takes pixel_values, got pixel_values_videos"):
            vpt(pixel_values_videos=videos)


def test_images_are_not_called_videos(vit: Tiny) -> None:
    with pytest.raises(AdapterError, match="ViTForImageClassification takes pixel_values, got pixel_values_videos"):
        vit.prompted()(pixel_values_videos=vit.pixel_values)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_the_declaration_agrees_with_a_concatenation_on_the_model_itself(name: str) -> None:
    report = check_architecture(VIDEO_FAMILIES[name].bare())
    assert report.agrees is True and len(report.ways) == 3
    assert all(way.agrees for way in report.ways.values()), report


def test_the_shape_of_videos_is_that_of_the_published_models() -> None:
    shapes = {name: find_backbone(VIDEO_FAMILIES[name].full_size()).input_shape for name in CLASSIFIERS}
    assert shapes == {"videomae": (16, 3, 224, 224), "vivit": (32, 3, 224, 224), "vjepa2": (64, 3, 256, 256)}
    assert {find_backbone(VIDEO_FAMILIES[name].full_size()).patch_size for name in CLASSIFIERS} == {16}


def test_vjepa2_takes_videos_of_other_lengths(vjepa2: Family) -> None:
    vpt, videos = vjepa2.prompted(), some_videos()
    longer = torch.cat([videos, videos.flip(1)], dim=1)
    assert logits(vpt, longer).shape == (NUM_IMAGES, NUM_LABELS)
    assert (logits(vpt, longer) - logits(vpt, videos)).abs().max() > 0.01


def test_an_added_classifier_reads_the_tokens(headless: Family) -> None:
    tokens = run(headless.bare(), some_images(), headless).last_hidden_state
    vpt = get_vpt_model(headless.bare(), PromptConfig(num_tokens=0, **TASK), num_labels=4).eval()
    adapter: Any = vpt.adapters["default"]
    with torch.no_grad():
        features = tokens[:, 0] if headless.num_prefix_tokens else tokens.mean(1)
        expected = adapter.head.find("classifier")(features)
    torch.testing.assert_close(logits(vpt, some_videos()), expected, atol=1e-5, rtol=0)
    assert vpt.config.num_labels == 4 and vpt.active_config.task_type == "VIDEO_CLASSIFICATION"


@pytest.mark.parametrize("pooling", ["default", "image", "global"])
def test_an_added_classifier_trains_with_all_that_it_has_and_comes_back(
    headless: Family, pooling: str, tmp_path: Path
) -> None:
    videos, labels = some_videos(), torch.tensor([0, 1, 3])
    vpt = classify(headless, bias="all", pooling=pooling).train()
    optimizer = torch.optim.SGD([parameter for parameter in vpt.parameters() if parameter.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = vpt(videos, labels=labels).loss
        loss.backward()
        assert [name for name, parameter in vpt.adapters.named_parameters() if parameter.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    expected = logits(vpt.eval(), videos)
    vpt.save_pretrained(tmp_path)
    assert torch.equal(logits(VPTModel.from_pretrained(headless.bare(), tmp_path), videos), expected)


@pytest.mark.heavy
def test_an_added_classifier_compiles_checkpoints_and_mixes(headless: Family) -> None:
    vpt, videos = classify(headless), some_videos()
    compiled: Any = torch.compile(vpt, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, videos), logits(vpt, videos), atol=1e-5, rtol=0)
    vpt.add_adapter("other", PromptConfig(num_tokens=5, deep=False, pooling="image", **TASK), num_labels=2)
    enlarge(vpt, "other")
    mixed = logits(vpt, videos, adapter_names=["other", "default", "other"])
    torch.testing.assert_close(mixed[1:2], logits(vpt, videos)[1:2], atol=1e-5, rtol=0)
    vpt.set_adapter("other")
    torch.testing.assert_close(mixed[::2, :2], logits(vpt, videos)[::2], atol=1e-5, rtol=0)
    vpt.train().gradient_checkpointing_enable()
    checkpointed = vpt(videos, labels=torch.tensor([0, 1, 0])).loss
    vpt.gradient_checkpointing_disable()
    torch.testing.assert_close(checkpointed, vpt(videos, labels=torch.tensor([0, 1, 0])).loss)


def test_an_added_classifier_does_not_run_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    vpt, videos = classify(VIDEO_FAMILIES["vjepa2_model"]), some_videos()
    model, calls = vpt.get_base_model(), []
    model.predictor.register_forward_hook(lambda *_: calls.append(1))
    logits(vpt, videos)
    assert calls == []
    with vpt.disable_adapter(), torch.no_grad():
        assert vpt(videos).predictor_output.last_hidden_state.shape == (NUM_IMAGES, 32, 32)
    assert calls == [1]


def test_the_task_must_be_that_of_the_models_input(headless: Family, vit: Tiny) -> None:
    with pytest.raises(ConfigError, match='needs task_type="VIDEO_CLASSIFICATION", got "IMAGE_CLASSIFICATION"'):
        get_vpt_model(headless.bare(), PromptConfig(task_type="IMAGE_CLASSIFICATION"), num_labels=4)
    model: Any = vit.model
    with pytest.raises(ConfigError, match='needs task_type="IMAGE_CLASSIFICATION", got "VIDEO_CLASSIFICATION"'):
        get_vpt_model(model.vit, PromptConfig(**TASK), num_labels=4)
    with pytest.raises(ConfigError, match="is IMAGE_CLASSIFICATION, got task_type=VIDEO_CLASSIFICATION"):
        get_vpt_model(vit.model, PromptConfig(**TASK))


@pytest.mark.parametrize("auto", [AutoVPTModel, AutoVPTModelForVideoClassification])
@pytest.mark.parametrize("name", [*CLASSIFIERS, *MODELS])
def test_an_adapter_finds_its_backbone(name: str, auto: Any, tmp_path: Path) -> None:
    family = VIDEO_FAMILIES[name]
    family.bare().save_pretrained(tmp_path / "backbone")
    cls = getattr(transformers, family.model_class)
    model = cls.from_pretrained(tmp_path / "backbone")
    vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=2, **TASK), num_labels=4).eval())
    vpt.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is cls
    assert torch.equal(logits(loaded, some_videos()), logits(vpt, some_videos()))
    with pytest.raises(CheckpointError, match="for IMAGE_CLASSIFICATION, got task_type=VIDEO_CLASSIFICATION"):
        AutoVPTModelForImageClassification.from_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["task_type"], config["model_class"]) == ("VIDEO_CLASSIFICATION", family.model_class)


class VideoProcessor:
    """Stands in for the video processors of transformers, which need torchvision."""

    loaded: list[str] = []  # noqa: RUF012
    name = "pixel_values"

    @classmethod
    def from_pretrained(cls, source: str) -> VideoProcessor:
        cls.loaded.append(source)
        return cls()

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "video_preprocessor_config.json").write_text("{}")

    def __call__(self, file: str, do_sample_frames: bool, num_frames: int, return_tensors: str) -> dict[str, Tensor]:
        assert (file, do_sample_frames, num_frames, return_tensors) == ("video.mp4", True, NUM_FRAMES, "pt")
        return {self.name: some_videos()[:1]}


@pytest.mark.parametrize("has_processor", [True, False])
@pytest.mark.parametrize("name", [*CLASSIFIERS, "videomae_model"])
def test_the_code_of_a_card_runs_on_a_video(
    name: str, has_processor: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = VIDEO_FAMILIES[name]
    family.bare().save_pretrained(tmp_path / "backbone")
    vpt = get_vpt_model(
        getattr(transformers, family.model_class).from_pretrained(tmp_path / "backbone"), PromptConfig()
    )
    processor = VideoProcessor() if has_processor else None
    vpt.save_pretrained(tmp_path / "adapter", image_processor=processor, metrics={"accuracy": 0.5})
    card = ModelCard.load(tmp_path / "adapter/README.md")
    task = "video-classification" if family.classifier else "feature-extraction"
    assert card.data["pipeline_tag"] == task
    assert [result.task_type for result in card.data.eval_results or []] == [task]
    assert ("| labels | LABEL_0, LABEL_1" in card.text) == bool(family.classifier)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers, "AutoVideoProcessor", VideoProcessor)
    monkeypatch.setattr(VideoProcessor, "name", vpt.main_input_name)
    monkeypatch.setattr(VideoProcessor, "loaded", [])
    names: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert VideoProcessor.loaded == ["adapter" if has_processor else str(tmp_path / "backbone")]
    if family.classifier:
        assert torch.equal(names["logits"], logits(vpt.eval(), some_videos()[:1]))
    else:
        assert names["features"].shape == (1, 32, 24)


def test_trainer_keeps_the_videos_and_trains(vjepa2: Family, tmp_path: Path) -> None:
    vpt = get_vpt_model(vjepa2.bare(), PromptConfig(num_tokens=2))
    rows = [{"pixel_values_videos": video, "label": index} for index, video in enumerate(some_videos())]
    before = vpt.get_adapter_state_dict()["prompts.0"].clone()
    arguments = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.1, report_to="none", use_cpu=True)
    trainer = Trainer(vpt, arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert not torch.equal(vpt.get_adapter_state_dict()["prompts.0"], before)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (NUM_IMAGES, NUM_LABELS)  # type: ignore[arg-type]


def test_the_pooler_of_vjepa2_trains_if_it_is_named(vjepa2: Family, tmp_path: Path) -> None:
    vpt = get_vpt_model(vjepa2.bare(), PromptConfig(num_tokens=2, bias="all", modules_to_save=["pooler"])).train()
    vpt(some_videos(), labels=torch.arange(3)).loss.backward()
    adapter: Any = vpt.adapters["default"]
    assert [name for name, parameter in adapter.named_parameters() if parameter.grad is None] == []
    assert "predictor" not in "".join(adapter.bias.paths) and adapter.modules_to_save.paths == ["pooler"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.sub_(0.1 * parameter.grad)
    expected = logits(vpt.eval(), some_videos())
    vpt.save_pretrained(tmp_path)
    assert torch.equal(logits(VPTModel.from_pretrained(vjepa2.bare(), tmp_path), some_videos()), expected)


def test_a_pooler_that_no_checkpoint_has_is_warned_about(vjepa2: Family, tmp_path: Path) -> None:
    VIDEO_FAMILIES["vjepa2_model"].bare().save_pretrained(tmp_path)
    model = transformers.VJEPA2ForVideoClassification.from_pretrained(tmp_path, num_labels=3)
    with pytest.warns(UserWarning, match=r"pooler\..* were not in its checkpoint .*modules_to_save"):
        get_vpt_model(model, PromptConfig(num_tokens=2))


def test_eager_attention_that_ignores_masks_is_refused_where_it_needs_one(vjepa2: Family) -> None:
    vpt = vjepa2.prompted()
    vpt.add_adapter("as_long", PromptConfig(num_tokens=3))
    vpt.add_adapter("longer", PromptConfig(num_tokens=5))
    videos, names = some_videos(), ["default", "as_long", "default"]
    expected = logits(vpt, videos, adapter_names=names)
    logits(vpt, videos, adapter_names=["default", "longer", "__base__"])  # with sdpa, which takes masks
    vpt.set_attn_implementation("eager")
    torch.testing.assert_close(logits(vpt, videos, adapter_names=names), expected, atol=1e-5, rtol=0)
    for other in ("longer", "__base__"):
        with pytest.raises(RouteError, match=r'does not with attn_implementation="eager"\. Use "sdpa"'):
            vpt(videos, adapter_names=["default", other, "default"])


@pytest.mark.parametrize("location", ["add", "pixel", "border", "channel"])
def test_locations_in_an_image_are_refused(classifier: Family, location: str) -> None:
    with pytest.raises(ConfigError, match=f'location="{location}" needs images of one size, but .* takes videos'):
        get_vpt_model(classifier.bare(), PromptConfig(location=location, deep=location in ("add", "pixel")))


def test_a_vector_is_added_to_all_tokens(classifier: Family) -> None:
    model, images = classifier.bare(), some_images()
    vpt = enlarge(get_vpt_model(classifier.bare(), PromptConfig(location="add-shared")).eval())
    prompts: Any = vpt.adapters["default"].prompts
    for layer, own in zip(model.get_submodule(classifier.layers), prompts.parameters(), strict=True):
        layer.register_forward_pre_hook(lambda _, args, own=own: (args[0] + own.detach(), *args[1:]))
    assert difference(run(vpt, images, classifier), run(model, images, classifier)) < 1e-5


@pytest.mark.parametrize("method", ["sample", "mean"])
def test_prompts_start_as_tokens_of_videos(classifier: Family, method: str) -> None:
    vpt = get_vpt_model(classifier.bare(), PromptConfig(num_tokens=3))
    inputs: list[Tensor] = []
    layer: Any = list(vpt.get_base_model().get_submodule(classifier.layers))[1]
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        vpt.get_base_model()(**classifier.arguments(some_images()))
        handle.remove()
    tokens = inputs[0][:, classifier.num_prefix_tokens :]
    found = tokens.mean(1) if method == "mean" else tokens.flatten(0, 1)
    vpt.init_prompts([{vpt.main_input_name: some_videos()}], method=method)
    prompts = vpt.get_adapter_state_dict()["prompts.1"]
    distances = torch.cdist(prompts, found, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.amin(1).max() < 1e-4
    with pytest.raises(AdapterError, match=f"must have the key {vpt.main_input_name}, got 'videos'"):
        vpt.init_prompts([{"videos": some_videos()}])
