"""Cached features: equal to what pixels give, never stale, and refused where they cannot be right."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import Family, each_family, enlarge, some_images, tensors
from helpers.headless import build, images
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import BUILDERS, Tiny, assert_same, gradients, logits, move, tiny_swin, tiny_vit
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import DINOv3ViTConfig, DINOv3ViTModel, Trainer, TrainingArguments

from vpt_peft import (
    AdapterError,
    CheckpointError,
    PromptConfig,
    UnsupportedModelError,
    VPTModel,
    adamw,
    get_adapter_state_dict,
    get_vpt_model,
)
from vpt_peft.training import CachedFeatures, cache_features, feature_folder

Cache = Callable[..., CachedFeatures]
LAST = {"layers_to_transform": (2, 3)}


class Images(Dataset):  # type: ignore[type-arg]
    """Labelled images that are transformed on access. ``reads`` are the images that have been read."""

    def __init__(self, pixels: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] = lambda one: one) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads.append(index)
        return {"pixel_values": self.transform(self.pixels[index]), "labels": int(self.labels[index])}


def noisy(image: Tensor) -> Tensor:
    """Random augmentation by the generators of torch and numpy."""
    return image + torch.randn_like(image) + float(np.random.rand())


def of(tiny: Tiny, **changes: Any) -> Images:
    return Images(**{"pixels": tiny.pixel_values.clone(), "labels": tiny.labels.clone(), **changes})


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Caches features in float32 in the folder "features", in batches of four."""

    def make(vpt: VPTModel, dataset: Any, **options: Any) -> CachedFeatures:
        defaults = {"folder": tmp_path / "features", "batch_size": 4, "dtype": torch.float32, "progress": False}
        return cache_features(vpt, dataset, **{**defaults, **options})

    return make


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of two images."""
    monkeypatch.setattr(feature_folder, "MAX_SHARD_ROWS", 2)


def batch(features: Any) -> dict[str, Any]:
    """All items as one batch."""
    found: dict[str, Any] = default_collate([features[index] for index in range(len(features))])
    return found


def values(features: CachedFeatures) -> Tensor:
    found: Tensor = batch(features)["cached_features"]
    return found


def answers(vpt: VPTModel, features: Any) -> Tensor:
    """Logits from cached features."""
    return logits(vpt, None, **batch(features))  # type: ignore[arg-type]


# -- outputs ----------------------------------------------------------------------------------------------------------


def can_be_cached(vpt: VPTModel) -> bool:
    name = type(vpt.get_base_model()).__name__
    reads_more = name.endswith("Backbone") or name == "VJEPA2Model" or name.startswith("Siglip2")
    one_vector = ("IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "FEATURE_EXTRACTION")
    return vpt.active_config.task_type in one_vector and not reads_more


@each_family()
def test_each_family_gives_the_same_outputs_to_the_bit_or_refuses(family: Family, cache: Cache) -> None:
    last = len(family.prompted().backbone.layers) - 1
    vpt = enlarge(get_vpt_model(family.bare(), PromptConfig(num_tokens=3, layers_to_transform=(last,)))).eval()
    name = vpt.main_input_name
    pixels = family.arguments(some_images())[name]
    dataset = [{name: one} for one in pixels]
    if not can_be_cached(vpt):
        with pytest.raises((AdapterError, UnsupportedModelError), match="Features can"):
            cache(vpt, dataset)
        return
    features = cache(vpt, dataset, batch_size=len(pixels))
    with torch.no_grad():
        found, expected = tensors(vpt(**batch(features))), tensors(vpt(**{name: pixels}))
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "config",
    [
        LAST,
        {"layers_to_transform": (1,)},
        {"layers_to_transform": (3,), "kind": "prefix"},
        {"layers_to_transform": (2,), "pooling": "prompt"},
        {"layers_to_transform": (2, 3), "location": "add-shared", "num_tokens": 1},
        {"layers_to_transform": (3,), "dropout": 0.5, "projection_dim": 6},
    ],
)
def test_loss_and_gradients_are_those_of_pixels(tiny: Tiny, cache: Cache, config: dict[str, Any]) -> None:
    vpt = tiny.prompted(**config).train()
    features = cache(vpt, of(tiny))

    def step(**inputs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        vpt.zero_grad()
        output = vpt(**inputs)
        output.loss.backward()
        return output.loss, output.logits, {name: gradient.clone() for name, gradient in gradients(vpt).items()}

    found, expected = step(**batch(features)), step(pixel_values=tiny.pixel_values, labels=tiny.labels)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert_same(found[2], expected[2])


@pytest.mark.parametrize("pooling", ["default", "image"])
def test_a_linear_head_reads_pooled_features(tiny: Tiny, cache: Cache, pooling: str) -> None:
    vpt = tiny.prompted(num_tokens=0, pooling=pooling).eval()
    features = cache(vpt, of(tiny))
    assert values(features).ndim == 2
    assert torch.equal(answers(vpt, features), logits(vpt, tiny.pixel_values))


@pytest.mark.parametrize("options", [{"layers_to_transform": (2,)}, {"num_tokens": 0}])
def test_a_classifier_that_is_added_to_a_model_reads_cached_features(cache: Cache, options: dict[str, Any]) -> None:
    config = DINOv3ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, image_size=32, patch_size=8
    )
    model = build(lambda: DINOv3ViTModel(config))
    vpt = get_vpt_model(model, PromptConfig(task_type="IMAGE_CLASSIFICATION", **options), num_labels=5).eval()
    features = cache(vpt, [{"pixel_values": one} for one in images(model)])
    assert torch.equal(answers(vpt, features), logits(vpt, images(model)))


@pytest.mark.parametrize(("path", "layer"), [("layers.2.mlp", 2), ("layernorm", 3)])
def test_copies_of_upper_modules_act_on_cached_features(vit: Tiny, cache: Cache, path: str, layer: int) -> None:
    vpt = vit.prompted(num_tokens=0, modules_to_save=[path]).eval()
    move(vpt.adapters["default"].modules_to_save)  # type: ignore[arg-type]
    features = cache(vpt, of(vit))
    assert values(features).shape == (4, 17, 24)
    assert f'"layer {layer}"' in (features.folder / "features.json").read_text()
    assert torch.equal(answers(vpt, features), logits(vpt, vit.pixel_values))


def test_float16_takes_two_bytes_a_value_and_stays_close(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = cache(vpt, of(vit), dtype=torch.float16)
    assert values(features).dtype == torch.float16
    assert (payload := values(features).nbytes) == 4 * 17 * 24 * 2
    assert payload < features.nbytes < payload + 2**14
    found, expected = answers(vpt, features), logits(vpt, vit.pixel_values)
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_autocast_gives_the_same_outputs_to_the_bit(tiny: Tiny, cache: Cache) -> None:
    vpt = tiny.prompted(**LAST).eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = cache(vpt, of(tiny))
        found, expected = answers(vpt, features), logits(vpt, tiny.pixel_values)
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(vpt, tiny.pixel_values))


def test_images_of_another_size_need_the_same_argument_as_with_pixels(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    larger = torch.randn(4, 3, 48, 40)
    features = cache(vpt, of(vit, pixels=larger), interpolate_pos_encoding=True)
    found = logits(vpt, None, **batch(features), interpolate_pos_encoding=True)  # type: ignore[arg-type]
    assert torch.equal(found, logits(vpt, larger, interpolate_pos_encoding=True))


def test_several_adapters_share_the_features_of_the_lowest(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = cache(vpt, of(vit))
    for name, config in (("last", {"layers_to_transform": (3,)}), ("head", {"num_tokens": 0})):
        vpt.add_adapter(name, PromptConfig(**config))  # type: ignore[arg-type]
        vpt.set_adapter(name)
        assert torch.equal(answers(vpt, features), logits(vpt, vit.pixel_values))
    vpt.add_adapter("lower", PromptConfig(layers_to_transform=(1,)))
    vpt.set_adapter("lower")
    with pytest.raises(AdapterError, match="in front of layer 2, but the active adapter changes layer 1"):
        answers(vpt, features)


def test_the_backbone_is_left_as_it_was(vit: Tiny, cache: Cache) -> None:
    before = snapshot(vit.model)
    vpt = vit.prompted(**LAST).train()
    features = cache(vpt, of(vit))
    assert vpt.training and vpt.adapters.training
    answers(vpt, features)
    assert_unchanged(before, snapshot(vpt.unload()))


# -- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_go_through_the_augmentations_in_turn(vit: Tiny, cache: Cache, workers: int) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = cache(vpt, of(vit, transform=noisy), augmentations=3)
    loader = DataLoader(features, batch_size=2, num_workers=workers)
    epochs = [torch.cat([part["cached_features"] for part in loader]) for _ in range(4)]
    assert all(not torch.equal(epochs[one], epochs[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(epochs[3], epochs[0])
    features.set_epoch(1)
    assert torch.equal(values(features), epochs[1])


def test_augmentations_are_drawn_the_same_way_each_time_and_leave_the_generators_alone(
    vit: Tiny, cache: Cache, tmp_path: Path
) -> None:
    vpt = vit.prompted(**LAST).eval()
    torch.manual_seed(5)
    np.random.seed(5)
    first = cache(vpt, of(vit, transform=noisy), augmentations=2)
    found = torch.rand(()), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert found == (torch.rand(()), np.random.rand())
    second = cache(vpt, of(vit, transform=noisy), augmentations=2, folder=tmp_path / "other", workers=2)
    other_seed = cache(vpt, of(vit, transform=noisy), augmentations=2, folder=tmp_path / "seed", seed=1)
    for _ in range(2):
        drawn = values(first)
        assert torch.equal(drawn, values(second)) and not torch.equal(drawn, values(other_seed))


# -- never stale ------------------------------------------------------------------------------------------------------


def modified(features: CachedFeatures) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in features.folder.glob("*.safetensors")}


@pytest.mark.usefixtures("small_shards")
def test_unchanged_images_are_not_computed_again(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    before = cache(vpt, of(vit, transform=noisy), augmentations=2)
    dataset = of(vit, transform=noisy)
    again = cache(BUILDERS["vit"]().prompted(**LAST), dataset, augmentations=2)
    assert modified(again) == modified(before) and len(modified(again)) == 4
    assert dataset.reads == [0, 0, 1, 2, 3], "each image is read once, and the first for a comparison of outputs"


@pytest.mark.usefixtures("small_shards")
def test_a_changed_image_or_label_is_computed_again_with_all_its_augmentations(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = cache(vpt, of(vit, transform=noisy), augmentations=2)
    before, old = modified(features), [values(features), values(features)]
    dataset = of(vit, transform=noisy)
    dataset.pixels[3, 0, 0, 0] += 1e-3
    features = cache(vpt, dataset, augmentations=2)
    new, after = [values(features), values(features)], modified(features)
    assert [name for name in before if after[name] != before[name]] != []
    unchanged = {name for name in before if after[name] == before[name]}
    assert unchanged == {"features-00000000.safetensors", "features-00000004.safetensors"}
    for draw in range(2):
        assert torch.equal(new[draw][:3], old[draw][:3]) and not torch.equal(new[draw][3], old[draw][3])
    dataset.labels[0] = 5
    assert batch(cache(vpt, dataset, augmentations=2))["labels"].tolist() == [5, 1, 2, 6]


def test_another_image_processor_gives_other_features(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    before = values(cache(vpt, of(vit)))
    after = cache(vpt, of(vit, transform=lambda image: (image - 0.1) / 0.9))
    assert not torch.equal(values(after), before)
    assert torch.equal(answers(vpt, after), logits(vpt, (vit.pixel_values - 0.1) / 0.9))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda model: model.vit.layers[0].mlp.fc1.weight.data.mul_(2), "vit.layers.0.mlp.fc1.weight"),
        (lambda model: model.vit.layers[0].mlp.fc1.weight.data[1, 1].add_(1e-5), "weights"),
        (lambda model: setattr(model.config, "layer_norm_eps", 1e-3), "layer_norm_eps"),
    ],
)
def test_features_of_another_backbone_are_an_error(
    vit: Tiny, cache: Cache, change: Callable[[Any], Any], names: str
) -> None:
    cache(vit.prompted(**LAST), of(vit))
    other = BUILDERS["vit"]()
    change(other.model)
    with pytest.raises(CheckpointError, match=f"has cached features of something else: .*{names}.*delete this one"):
        cache(other.prompted(**LAST), of(vit))


@pytest.mark.parametrize(
    ("config", "options", "names"),
    [
        ({"layers_to_transform": (3,)}, {}, "in front of 'layer 2', now 'layer 3'"),
        ({"num_tokens": 0}, {}, "now .*the head"),
        (LAST, {"dtype": torch.bfloat16}, "dtype 'float32', now 'bfloat16'"),
        (LAST, {"augmentations": 2}, "augmentations 1, now 2"),
        (LAST, {"seed": 3}, "seed 0, now 3"),
        (LAST, {"interpolate_pos_encoding": True}, "arguments"),
    ],
)
def test_features_of_other_settings_are_an_error(
    vit: Tiny, cache: Cache, config: dict[str, Any], options: dict[str, Any], names: str
) -> None:
    cache(vit.prompted(**LAST), of(vit))
    with pytest.raises(CheckpointError, match=names):
        cache(BUILDERS["vit"]().prompted(**config), of(vit), **options)


def test_another_number_of_images_or_autocast_is_an_error(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST)
    cache(vpt, of(vit))
    with pytest.raises(CheckpointError, match="images 4, now 3"):
        cache(vpt, of(vit, pixels=vit.pixel_values[:3]))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CheckpointError, match="autocast 'None', now 'bfloat16'"):
        cache(vpt, of(vit))


def test_a_head_may_change_without_the_features(vit: Tiny, cache: Cache) -> None:
    before = modified(cache(vit.prompted(num_tokens=0), of(vit)))
    other = BUILDERS["vit"]()
    with torch.no_grad():
        other.model.classifier.weight += 1
    vpt = other.prompted(num_tokens=0).eval()
    features = cache(vpt, of(vit))
    assert modified(features) == before
    assert torch.equal(answers(vpt, features), logits(vpt, vit.pixel_values))


# -- interrupts and damage --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.usefixtures("small_shards")
def test_a_killed_call_is_continued(vit: Tiny, cache: Cache, tmp_path: Path) -> None:
    vpt = vit.prompted(**LAST).eval()

    def killing(image: Tensor) -> Tensor:
        if torch.equal(image, vit.pixel_values[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, of which the child uses none
        child = os.fork()
    if child == 0:
        try:
            cache(vpt, of(vit, transform=killing), batch_size=1)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = [file.name for file in (tmp_path / "features").glob("*.safetensors")]
    assert left == ["features-00000000.safetensors"]
    dataset = of(vit)
    features = cache(vpt, dataset, batch_size=2)
    assert dataset.reads == [0, 0, 1, 2, 3], "two images are compared, and two are computed"
    assert torch.equal(answers(vpt, features), logits(vpt, vit.pixel_values))
    assert not [file for file in features.folder.iterdir() if file.name.startswith(".")]


def test_an_error_of_the_data_set_keeps_what_was_finished(
    vit: Tiny, cache: Cache, small_shards: None, tmp_path: Path
) -> None:
    vpt = vit.prompted(**LAST).eval()

    def failing(image: Tensor) -> Tensor:
        if torch.equal(image, vit.pixel_values[2]):
            raise OSError("the disk")
        return image

    with pytest.raises(OSError, match="the disk"):
        cache(vpt, of(vit, transform=failing), batch_size=1)
    assert [file.name for file in (tmp_path / "features").glob("*.safetensors")] == ["features-00000000.safetensors"]


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_file_is_written_again(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = cache(vpt, of(vit))
    expected = values(features)
    file = features.folder / "features-00000002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(values(cache(vpt, of(vit))), expected)


def test_features_that_the_model_does_not_compute_are_an_error(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    file = cache(vpt, of(vit)).folder / "features-00000000.safetensors"
    tensors_in = load_file(file)
    save_file({**tensors_in, "cached_features": tensors_in["cached_features"] + 1}, file)
    with pytest.raises(CheckpointError, match=r"are not those that the model computes.*Delete the folder"):
        cache(vpt, of(vit))


def test_a_folder_with_other_files_is_an_error(vit: Tiny, cache: Cache, tmp_path: Path) -> None:
    vpt = vit.prompted(**LAST)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"must be empty, or have cached features.*Choose another folder"):
        cache(vpt, of(vit), folder=tmp_path)
    folder = cache(vpt, of(vit)).folder
    (folder / "features.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"features\.json' cannot be read"):
        cache(vpt, of(vit))


# -- training ---------------------------------------------------------------------------------------------------------


def test_trainer_learns_from_cached_features_what_it_learns_from_pixels(
    tiny: Tiny, new: Any, cache: Cache, tmp_path: Path
) -> None:
    def train(vpt: VPTModel, dataset: Any, evaluated: Any) -> dict[str, float]:
        settings = TrainingArguments(
            str(tmp_path / "out"), num_train_epochs=3, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
            use_cpu=True, seed=3, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(vpt, settings, train_dataset=dataset, optimizer_cls_and_kwargs=adamw(vpt))
        trainer.train()
        return trainer.evaluate(evaluated)

    pixels, cached = new().prompted(**LAST), new().prompted(**LAST)
    features = cache(cached, of(tiny))
    scores = train(cached, features, features), train(pixels, of(tiny), of(tiny))
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=1e-4)
    ours, theirs = get_adapter_state_dict(cached), get_adapter_state_dict(pixels)
    assert_same(ours, theirs, tolerance=1e-4)
    assert not torch.equal(ours["prompts.2"], new().prompted(**LAST).adapters["default"].prompts[2])


def test_gradient_checkpointing_gives_the_same_gradients(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).train()
    features = batch(cache(vpt, of(vit)))
    vpt(**features).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(vpt).items()}
    vpt.zero_grad()
    vpt.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    vpt(**features).loss.backward()
    assert_same(gradients(vpt), expected, tolerance=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("config", [LAST, {"num_tokens": 0}])
def test_a_compiled_model_takes_cached_features(vit: Tiny, cache: Cache, config: dict[str, Any]) -> None:
    vpt = vit.prompted(**config).eval()
    features = batch(cache(vpt, of(vit)))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(vpt)(**features).logits, vpt(**features).logits)


# -- data sets --------------------------------------------------------------------------------------------------------


def test_items_may_be_pairs_or_pixels_alone(vit: Tiny, cache: Cache, tmp_path: Path) -> None:
    vpt = vit.prompted(**LAST).eval()
    pairs = cache(vpt, list(zip(vit.pixel_values, vit.labels, strict=True)))
    assert batch(pairs)["labels"].tolist() == vit.labels.tolist()
    alone = cache(vpt, vit.pixel_values, folder=tmp_path / "alone")
    assert set(alone[0]) == {"cached_features", "cache_key"}
    assert torch.equal(values(alone), values(pairs))
    with pytest.raises(IndexError, match="index must be from 0 to 3, got 4"):
        alone[4]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"image": 1}], "Item 0 of the data set must be a dict with pixel_values.*got the keys image"),
        ([{"pixel_values": torch.zeros(3, 32, 32), "file": "rose.jpg"}], "got file='rose.jpg'. Remove it"),
        ([{"pixel_values": torch.zeros(1, 3, 32, 32)}], "must be a floating-point tensor"),
        ([torch.zeros(3, 32, 32), torch.zeros(3, 32, 40)], "All images must have one size"),
        ([(torch.zeros(3, 32, 32), 1), (torch.zeros(3, 32, 32), [1, 2])], "fields of all images must have the same"),
        ([], "dataset must have a length of at least 1"),
        (iter(()), "dataset must have a length"),
    ],
)
def test_data_sets_that_cannot_be_read_are_named(vit: Tiny, cache: Cache, items: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        cache(vit.prompted(**LAST), items)


def test_values_that_float16_cannot_hold_are_an_error(vit: Tiny, cache: Cache, tmp_path: Path) -> None:
    vpt = vit.prompted(**LAST).eval()
    huge = of(vit, transform=lambda image: image * 1e6)
    with pytest.raises(AdapterError, match=r"finite in torch.float16.*Use dtype=torch.float32 or bfloat16"):
        cache(vpt, huge, dtype=torch.float16)
    assert values(cache(vpt, huge, folder=tmp_path / "whole")).abs().max() > 65504


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, r"is layer 0 \(of 4\).*layers_to_transform=\[3\]"),
        ({"deep": False}, "is layer 0"),
        ({"kind": "prefix", "bias": "all"}, "with bias='all' it changes all of them"),
        ({"num_tokens": 0, "bias": "all"}, "with bias='all'"),
        ({"location": "border", "deep": False, "num_tokens": 1}, 'location="border" they are in the image'),
        ({**LAST, "modules_to_save": ["embeddings"]}, "modules_to_save has 'vit.embeddings'.*in front of layers"),
        ({**LAST, "modules_to_save": ["layers.0.mlp"]}, "is layer 0"),
    ],
)
def test_adapters_that_change_what_would_be_cached_are_refused(
    vit: Tiny, cache: Cache, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=reason):
        cache(vit.prompted(**config), of(vit))
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentations": 0}, "augmentations must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float16"),
        ({"output_hidden_states": True}, "takes no output_hidden_states"),
    ],
)
def test_arguments_are_checked(vit: Tiny, cache: Cache, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        cache(vit.prompted(**LAST), of(vit), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(4, 3, 32, 32)}, "combined with pixel_values"),
        ({"adapter_names": ["default"] * 4}, "combined with adapter_names"),
        ({"output_hidden_states": True}, "combined with output_hidden_states"),
        ({"output_attentions": True}, "combined with output_attentions"),
        ({"bool_masked_pos": torch.zeros(4, 16)}, "combined with bool_masked_pos"),
        ({"cached_features": torch.zeros(4, 16, 24)}, r"must be of shape \(num_images, 17, 24\).*got \(4, 16, 24\)"),
        ({"cached_features": None}, "must be given together.*got only cache_key"),
        ({"cache_key": None}, "must be given together.*got only cached_features"),
        ({"cache_key": torch.tensor([1, 2, 1, 1])}, "got features of 2 caches"),
        ({"cache_key": torch.tensor([12] * 4)}, "made or opened with this model, got cache_key 12"),
    ],
)
def test_batches_that_do_not_fit_are_refused(vit: Tiny, cache: Cache, changes: dict[str, Any], message: str) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = {name: value for name, value in batch(cache(vpt, of(vit))).items() if name != "labels"}
    with pytest.raises(AdapterError, match=message):
        vpt(**{**features, **changes})


def test_outputs_that_skipped_layers_would_give_are_refused_by_the_config_too(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = batch(cache(vpt, of(vit)))
    vit.model.config.output_hidden_states = True
    with pytest.raises(AdapterError, match="combined with output_hidden_states"):
        vpt(**features)


def test_the_bare_backbone_takes_no_cached_features(vit: Tiny, cache: Cache) -> None:
    vpt = vit.prompted(**LAST).eval()
    features = batch(cache(vpt, of(vit)))
    with vpt.disable_adapter(), pytest.raises(AdapterError, match=r"combined with disable_adapter\(\)"):
        vpt(**features)


def test_dropout_in_the_lower_layers_is_refused(cache: Cache) -> None:
    tiny = tiny_vit(hidden_dropout_prob=0.5)
    vpt = tiny.prompted(**LAST).train()
    features = batch(cache(vpt, of(tiny)))
    tiny.model.train()
    for call in (lambda: vpt(**features), lambda: cache(vpt, of(tiny))):
        with pytest.raises(AdapterError, match="must be in eval mode"):
            call()


def test_features_of_another_model_are_refused(cache: Cache, tmp_path: Path) -> None:
    vit, swin = tiny_vit(), tiny_swin()
    features = cache(vit.prompted(**LAST), of(vit))
    other = swin.prompted(**LAST).eval()
    cache(other, of(swin), folder=tmp_path / "swin")
    with pytest.raises(AdapterError, match="made or opened with this model"):
        answers(other, features)
