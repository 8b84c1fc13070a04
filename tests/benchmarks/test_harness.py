"""The training loop of the benchmarks, and its images in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import digit_sets
import harness
import image_sets
import pytest
import torch
from PIL import Image

from vpt_peft.recipes.data.digits import small_classifier
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.training.methods import METHODS, SMALL_METHODS


def random_images() -> image_sets.ImageSet:
    labels = torch.arange(3).repeat_interleave(10)
    pixels = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return image_sets.ImageSet(pixels.to(torch.uint8), labels, ("a", "b", "c"), image_sets.Preprocessing(32))


def test_images_are_normalised_with_the_checkpoints_mean_and_std(checkpoint: Path) -> None:
    preprocessing = image_sets.Preprocessing.from_checkpoint(str(checkpoint))
    assert preprocessing == image_sets.Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    white = preprocessing.load(Image.new("L", (30, 20), 255))
    dataset = image_sets.ImageSet(white[None], torch.tensor([0]), ("white",), preprocessing)
    expected = torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6])
    torch.testing.assert_close(dataset.pixel_values(dataset.images)[0, :, 0, 0], expected)


@pytest.mark.parametrize("size", [(32, 32), (50, 40), (301, 223), (8, 20)])
def test_the_saved_image_processor_preprocesses_as_in_training(size: tuple[int, int]) -> None:
    preprocessing = image_sets.Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB")
    expected = image_sets.normalize(preprocessing.load(image)[None], preprocessing.mean, preprocessing.std)
    found = preprocessing.image_processor()(image, return_tensors="pt").pixel_values
    assert found.shape == expected.shape and (found - expected).abs().mean() < 0.05


def test_preprocessing_without_an_image_processor_has_mean_and_std_of_one_half(tmp_path: Path) -> None:
    small_classifier("vit").save_pretrained(tmp_path)
    half = (0.5, 0.5, 0.5)
    assert image_sets.Preprocessing.from_checkpoint(str(tmp_path)) == image_sets.Preprocessing(32, half, half)


def test_split_is_disjoint_stratified_and_determined_by_the_seed() -> None:
    whole = random_images()
    first, second = whole.split(0.8, seed=1)
    assert first.labels.bincount().tolist() == [8, 8, 8]
    assert second.labels.bincount().tolist() == [2, 2, 2]
    together = torch.cat([first.images, second.images]).flatten(1)
    assert len(together.unique(dim=0)) == len(whole)
    assert torch.equal(first.images, whole.split(0.8, seed=1)[0].images)
    assert not torch.equal(first.images, whole.split(0.8, seed=2)[0].images)


def test_select_classes_relabels_from_zero() -> None:
    subset = random_images().select_classes([1, 2])
    assert subset.class_names == ("b", "c")
    assert subset.labels.bincount().tolist() == [10, 10]


def test_augmentation_shifts_images_and_flips_them_only_on_request() -> None:
    ramp = torch.arange(32).expand(40, 3, 32, 32).to(torch.uint8)
    shifted = image_sets.augment(ramp, torch.Generator().manual_seed(0))
    assert ((shifted.int() - ramp.int()).abs() <= 2).all()
    assert len(shifted.unique(dim=0)) > 1
    flipped = image_sets.augment(ramp, torch.Generator().manual_seed(0), flip=True)[:, 0, 0].int().diff().sum(dim=1) < 0
    assert 0 < flipped.sum() < len(ramp)


def test_error_for_a_broken_image_names_the_file(image_folder: Callable[..., Path]) -> None:
    folder = image_folder("colors")
    (folder / "red" / "0.png").write_bytes(b"not an image")
    with pytest.raises(RecipeError, match=r"red.0\.png' cannot be read as an image"):
        image_sets.load_images(str(folder), image_sets.Preprocessing(8), seed=0)


def test_too_few_images_for_a_split_are_an_error(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="more images per class, got 4 images of 2 classes"):
        image_sets.load_images(str(image_folder("colors", number=2)), image_sets.Preprocessing(8), seed=0)


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    factors = [harness.learning_rate_factor(step, 100) for step in range(101)]
    assert max(factors) == factors[10] == 1
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)


def test_fine_tuning_is_reproducible_for_a_seed(checkpoint: Path, tmp_path: Path) -> None:
    logits = []
    for name in ("first", "second"):
        data = random_images().split(0.5, seed=0)
        data = tuple(crop(part, 16) for part in data)  # type: ignore[assignment]
        model = harness.load_backbone(str(checkpoint), data[0].class_names, seed=3)
        method = METHODS["vpt-deep"]
        logits.append(harness.tune(model, method, data, harness.Settings(1), 3, tmp_path / name).logits)
    assert torch.equal(*logits)


def crop(part: image_sets.ImageSet, size: int) -> image_sets.ImageSet:
    return image_sets.ImageSet(part.images[..., :size, :size], part.labels, part.class_names, part.preprocessing)


# -- short runs -----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_short_run_with_a_prefix_is_not_below_the_linear_head(tmp_path: Path) -> None:
    """A prefix starts without effect, so that three epochs are enough to gain something and never cost anything."""
    digit_sets.pretrain("vit", tmp_path / "backbone", epochs=6, seed=0)
    methods = {"linear": METHODS["linear"].with_rates(3e-2, None)}
    methods |= {name: SMALL_METHODS[name] for name in ("vpt-prefix", "vpt-prefix-bias")}
    found: dict[str, list[float]] = {name: [] for name in methods}
    for seed in (0, 1):
        train_set, test_set = digit_sets.new_task(seed)
        for name, method in methods.items():
            assert method.head_learning_rate in (None, 3e-2)  # the head learns alike in all methods
            model = harness.load_backbone(str(tmp_path / "backbone"), train_set.class_names, seed)
            folder = tmp_path / f"{name}-{seed}"
            result = harness.tune(model, method, (train_set, test_set), harness.Settings(3), seed, folder)
            found[name].append(result.accuracy)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    print(found)
    assert means["vpt-prefix"] >= means["linear"], found
    assert means["vpt-prefix-bias"] >= means["linear"], found
