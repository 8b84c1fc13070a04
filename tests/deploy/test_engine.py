"""The engine answers each request as its adapter alone would, whatever else is asked at the same time."""

from __future__ import annotations

import gc
import io
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.hub_server import HubServer
from helpers.models import BUILDERS, VIT, move, tiny_beit, tiny_beit_segmenter, tiny_swin, tiny_vit
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTImageProcessorPil, ViTModel

import vpt_peft
from vpt_peft import AdapterError, CheckpointError, ConfigError, ImageError, PromptConfig, VPTModel, get_vpt_model
from vpt_peft.adapter import Adapter
from vpt_peft.deploy import Engine, EngineError
from vpt_peft.deploy.engine import EngineClosedError, Prediction, QueueFullError
from vpt_peft.deploy.engine.costs import PassCosts
from vpt_peft.deploy.engine.stats import percentile

FOREVER = 1e9  # milliseconds: a batch is computed when it is full, or when the engine is closed
SOON = 120  # seconds, for what takes milliseconds
KINDS: list[dict[str, Any]] = [
    {"num_tokens": 3},
    {"num_tokens": 6, "kind": "prefix"},
    {"num_tokens": 2, "kind": "prefix", "bias": "all"},
    {"num_tokens": 4, "deep": False},
    {"num_tokens": 5, "bias": "all"},
    {"num_tokens": 1, "pooling": "image"},
]


class Tasks:
    """Adapters of one backbone in folders, and what each of them answers alone."""

    def __init__(self, folder: Path, build: Callable[[], PreTrainedModel]) -> None:
        self.folder, self.build = folder, build
        self.vpts: dict[str, VPTModel] = {}
        self.saved = 0

    def add(self, name: str, config: dict[str, Any], processor: Any = None, **labels: Any) -> str:
        """Saves a new adapter with random weights, in place of an earlier one of that name."""
        self.saved += 1
        torch.manual_seed(self.saved)
        vpt = get_vpt_model(self.build(), PromptConfig(**config), **labels).eval()
        move(vpt.adapters["default"])
        self.vpts[name] = vpt
        vpt.save_pretrained(self.folder / name, image_processor=processor)
        return self.path(name)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def logits(self, name: str, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Of one image, by the adapter alone."""
        with torch.no_grad():
            return self.vpts[name](pixel_values[None], **kwargs).logits[0]

    def check(self, name: str, pixel_values: Tensor, answer: Prediction, **kwargs: Any) -> None:
        """An answer is that of the adapter alone."""
        torch.testing.assert_close(answer.logits, self.logits(name, pixel_values, **kwargs), atol=1e-5, rtol=1e-5)
        assert answer.adapter == self.path(name)


def vit() -> PreTrainedModel:
    return tiny_vit().model


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path, vit)


@pytest.fixture
def six(tasks: Tasks) -> list[str]:
    """Six adapters with different prompts and numbers of labels."""
    return [
        tasks.add(f"task-{number}", config, num_labels=3 + number) and f"task-{number}"
        for number, config in enumerate(KINDS)
    ]


def some_images(number: int, size: int = 32) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(5))


def picture(seed: int = 0, width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def results(futures: list[Future[Any]]) -> list[Any]:
    """The answers or errors of requests."""
    return [future.exception(SOON) or future.result() for future in futures]


def count_adapters() -> int:
    """Number of adapters in memory, those of this test and of any other."""
    gc.collect()
    return sum(isinstance(one, Adapter) for one in gc.get_objects())


class Gate:
    """Holds the computing thread at its next forward pass of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.hook = model.register_forward_pre_hook(self.wait)

    def wait(self, *_: Any) -> None:
        self.reached.set()
        assert self.opened.wait(SOON)

    def open(self) -> None:
        self.opened.set()
        self.hook.remove()


@contextmanager
def held_loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Adapters are loaded only when the event is set."""
    opened, load = threading.Event(), vpt_peft.io.load_adapter

    def wait(*args: Any, **kwargs: Any) -> Any:
        assert opened.wait(SOON)
        return load(*args, **kwargs)

    monkeypatch.setattr(vpt_peft.io, "load_adapter", wait)
    try:
        yield opened
    finally:
        opened.set()


def processor_for(size: int = 32, **options: Any) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size}, **options)


# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit", "swin"])
@pytest.mark.parametrize("mixing", [True, False, "auto"])
def test_answers_are_those_of_each_adapter_alone(tmp_path: Path, backbone: str, mixing: Any) -> None:
    tasks, images = Tasks(tmp_path, lambda: BUILDERS[backbone]().model), some_images(8, 32 if backbone == "vit" else 64)
    for number, config in enumerate(KINDS):
        tasks.add(f"task-{number}", config, num_labels=3 + number)
    asked = [(f"task-{(5 * number) % 6}", images[number % 8]) for number in range(14)]
    with Engine(tasks.build(), max_batch=14, max_wait_ms=FOREVER, mixing=mixing) as engine:
        futures = [engine.submit(image, tasks.path(name)) for name, image in asked]
        for (name, image), future in zip(asked, futures, strict=True):
            tasks.check(name, image, future.result(SOON))
        stats = engine.stats()
    assert (stats.accepted, stats.answered, stats.failed, stats.queue_length) == (14, 14, 0, 0)
    assert sum(size * number for size, number in stats.batch_sizes.items()) == 14
    if mixing is True:
        assert stats.batch_sizes == {14: 1} and stats.mixed_batches == 1
    if mixing is False:
        assert stats.batches == 6 and stats.mixed_batches == 0


def test_adapters_that_cannot_be_mixed_get_passes_of_their_own(tasks: Tasks) -> None:
    tasks.add("plain", {"num_tokens": 3})
    tasks.add("biased", {"num_tokens": 3, "bias": "all"}, num_labels=4)
    tasks.add("owner", {"num_tokens": 2, "modules_to_save": ["layernorm"]}, num_labels=5)
    tasks.add("in_image", {"num_tokens": 2, "location": "channel", "deep": False})
    names = ["plain", "owner", "biased", "in_image", "owner", "plain"]
    images = some_images(6)
    with Engine(vit(), max_batch=6, max_wait_ms=FOREVER, mixing=True) as engine:
        futures = [engine.submit(image, tasks.path(name)) for name, image in zip(names, images, strict=True)]
        for name, image, answer in zip(names, images, results(futures), strict=True):
            tasks.check(name, image, answer)
        assert engine.stats().batch_sizes == {1: 1, 2: 1, 3: 1}


def test_adapters_whose_mixing_the_backbone_refuses_are_answered_apart(tmp_path: Path) -> None:
    def build() -> PreTrainedModel:
        return tiny_swin(attn_implementation="eager").model

    tasks, images = Tasks(tmp_path, build), some_images(4, 64)
    for number in range(2):  # Swin's attention in eager mode takes no masks, which different lengths need
        tasks.add(f"task-{number}", {"num_tokens": 2 + number})
    with Engine(build(), max_batch=4, max_wait_ms=FOREVER, mixing=True) as engine:
        for _ in range(2):
            futures = [engine.submit(image, tasks.path(f"task-{row % 2}")) for row, image in enumerate(images)]
            for row, answer in enumerate(results(futures)):
                tasks.check(f"task-{row % 2}", images[row], answer)


@pytest.mark.parametrize("size", [24, 48])
def test_images_of_different_sizes_are_computed_apart(tasks: Tasks, six: list[str], size: int) -> None:
    images = [*some_images(2), *some_images(2, size)]
    with Engine(vit(), max_batch=4, max_wait_ms=FOREVER, mixing=True) as engine:
        futures = [engine.submit(image, tasks.path(six[row % 2])) for row, image in enumerate(images)]
        for row, answer in enumerate(results(futures)):
            tasks.check(six[row % 2], images[row], answer, interpolate_pos_encoding=True)
        assert engine.stats().batch_sizes == {2: 2}


def test_a_swin_answers_the_same_after_images_of_another_size(tmp_path: Path) -> None:
    tasks, image = Tasks(tmp_path, lambda: tiny_swin().model), some_images(1, 64)[0]
    tasks.add("task", {"num_tokens": 3})
    with Engine(tasks.build(), max_wait_ms=0) as engine:
        before = engine.predict(image, tasks.path("task"))
        engine.predict(some_images(1, 32)[0], tasks.path("task"))
        tasks.check("task", image, engine.predict(image, tasks.path("task")))
    tasks.check("task", image, before)


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {0: "rose", 1: "daisy", 2: "tulip"}},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 2, "problem_type": "regression"},
        {"num_labels": 1},
    ],
)
def test_labels_are_those_of_the_pipeline(tasks: Tasks, labels: dict[str, Any]) -> None:
    image, processor = picture(), processor_for()
    tasks.add("task", {"num_tokens": 3}, processor, **labels)
    pipe = vpt_peft.pipeline(tasks.vpts["task"], image_processor=processor)
    with Engine(vit(), max_wait_ms=0) as engine:
        answer = engine.predict(image, tasks.path("task"), top_k=2)
        assert engine.predict(image, tasks.path("task")).labels[:2] == answer.labels
        assert engine.labels(tasks.path("task")) == list(tasks.vpts["task"].config.id2label.values())
    expected = pipe(image, top_k=2)
    assert [one["label"] for one in answer.labels] == [one["label"] for one in expected]
    assert [one["score"] for one in answer.labels] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    assert answer.problem_type == labels.get("problem_type") and answer.revision is None
    assert answer.logits.shape == (len(tasks.vpts["task"].config.id2label),) and answer.logits.dtype == torch.float32


def test_adapters_with_a_classifier_of_their_own_run_on_a_backbone_without_a_head(tmp_path: Path) -> None:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        return ViTModel(ViTConfig(**VIT)).eval()

    tasks, images = Tasks(tmp_path, build), some_images(4)
    for number in range(2):
        config = {"num_tokens": 2, "task_type": "IMAGE_CLASSIFICATION"}
        tasks.add(f"task-{number}", config, num_labels=3 + number)
    model = build()
    with Engine(model, max_batch=4, max_wait_ms=FOREVER, mixing=True) as engine:
        futures = [engine.submit(image, tasks.path(f"task-{row % 2}")) for row, image in enumerate(images)]
        for row, answer in enumerate(results(futures)):
            tasks.check(f"task-{row % 2}", images[row], answer)
    torch.testing.assert_close(model(images).last_hidden_state, build()(images).last_hidden_state, rtol=0, atol=0)


def test_a_backbone_is_loaded_by_name(checkpoint: Path, tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, lambda: transformers.AutoModelForImageClassification.from_pretrained(checkpoint).eval())
    tasks.add("task", {"num_tokens": 2}, num_labels=3)
    image = some_images(1, 16)[0]
    with Engine(checkpoint, max_wait_ms=0) as engine:
        tasks.check("task", image, engine.predict(image, tasks.path("task")))


# -- image processors -----------------------------------------------------------------------------------------------


def test_each_image_is_processed_as_its_adapter_was_trained(tasks: Tasks, checkpoint: Path) -> None:
    processors = {
        "bright": processor_for(image_mean=[0.9] * 3),
        "wide": processor_for(48, image_std=[0.1, 0.2, 0.3]),
        "also_bright": processor_for(image_mean=[0.9] * 3),
        "backbones": None,
    }
    for name, processor in processors.items():
        tasks.add(name, {"num_tokens": 3}, processor)
    backbones, image = processor_for(image_mean=[0.2] * 3), picture()
    with Engine(vit(), max_batch=4, max_wait_ms=FOREVER, mixing=True, image_processor=backbones) as engine:
        futures = {name: engine.submit(image, tasks.path(name)) for name in processors}
        for name, future in futures.items():
            pixel_values = (processors[name] or backbones)(image, return_tensors="pt")["pixel_values"][0]
            tasks.check(name, pixel_values, future.result(SOON), interpolate_pos_encoding=True)
        assert engine.stats().batch_sizes == {1: 1, 3: 1}


def test_images_for_a_border_of_prompts_are_smaller(tasks: Tasks) -> None:
    tasks.add("border", {"num_tokens": 2, "location": "border", "deep": False}, processor_for())
    expected = processor_for(28)(picture(), return_tensors="pt")["pixel_values"][0]
    with Engine(vit(), max_wait_ms=0) as engine:
        tasks.check("border", expected, engine.predict(picture(), tasks.path("border")))


def test_the_backbones_image_processor_is_found_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, lambda: transformers.AutoModelForImageClassification.from_pretrained(checkpoint).eval())
    tasks.add("task", {"num_tokens": 2})
    processor = ViTImageProcessorPil.from_pretrained(checkpoint)
    image = picture()
    with Engine(tasks.build(), max_wait_ms=0) as engine:
        answer = engine.predict(image, tasks.path("task"))
    tasks.check("task", processor(image, return_tensors="pt")["pixel_values"][0], answer, interpolate_pos_encoding=True)


def test_without_an_image_processor_only_tensors_are_answered(tasks: Tasks) -> None:
    tasks.add("task", {"num_tokens": 3})
    image = some_images(1)[0]
    with Engine(vit(), max_wait_ms=0) as engine:
        with pytest.raises(CheckpointError, match="Pass image_processor="):
            engine.predict(picture(), tasks.path("task"))
        tasks.check("task", image, engine.predict(image, tasks.path("task")))


def test_a_damaged_image_processor_fails_its_adapter_alone(tasks: Tasks) -> None:
    for name in ("good", "bad"):
        tasks.add(name, {"num_tokens": 3}, processor_for())
    (tasks.folder / "bad" / "preprocessor_config.json").write_text("{")
    with Engine(vit(), max_wait_ms=0) as engine:
        with pytest.raises(CheckpointError, match="image processor of the adapter"):
            engine.predict(picture(), tasks.path("bad"))
        engine.predict(picture(), tasks.path("good"))


# -- what fails, fails alone ----------------------------------------------------------------------------------------


def damage_missing(tasks: Tasks, name: str) -> str:
    return tasks.path(name) + "-missing"


def damage_weights(tasks: Tasks, name: str) -> str:
    file = tasks.folder / name / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(content)
    return tasks.path(name)


def damage_config(tasks: Tasks, name: str) -> str:
    (tasks.folder / name / "adapter_config.json").write_text("[]")
    return tasks.path(name)


def damage_by_another_backbone(tasks: Tasks, name: str) -> str:
    other = Tasks(tasks.folder, lambda: tiny_vit(hidden_act="relu").model)
    return other.add(name, {"num_tokens": 2})


def damage_by_other_weights_of_the_backbone(tasks: Tasks, name: str) -> str:
    def build() -> PreTrainedModel:
        model = vit()
        torch.nn.init.normal_(model.vit.layernorm.weight)
        return model

    return Tasks(tasks.folder, build).add(name, {"num_tokens": 2})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "Expected an adapter folder or the name of a repository"),
        (lambda tasks, name: "/no\0path", "Expected an adapter folder or the name of a repository"),
        (damage_weights, "is damaged"),
        (damage_config, "must contain a JSON object"),
        (damage_by_another_backbone, "hidden_act"),
        (damage_by_other_weights_of_the_backbone, "layernorm.weight"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_fails_alone(
    tasks: Tasks, six: list[str], damage: Callable[[Tasks, str], str], message: str
) -> None:
    tasks.add("broken", {"num_tokens": 2})
    broken = damage(tasks, "broken")
    images = some_images(6)
    with Engine(vit(), max_batch=6, max_wait_ms=FOREVER, mixing=True) as engine:
        futures = [
            (name, image, engine.submit(image, tasks.path(name))) for name, image in zip(six, images, strict=True)
        ]
        failing = [engine.submit(image, broken) for image in images[:3]]
        for error in results([*failing, engine.preload(broken)]):
            assert isinstance(error, CheckpointError) and message in str(error)
        for name, image, future in futures:
            tasks.check(name, image, future.result(SOON))
        assert broken not in engine.tasks()
        assert (engine.stats().failed, engine.stats().answered) == (4, 6)


def test_a_damaged_adapter_is_answered_once_it_is_mended(tasks: Tasks) -> None:
    image = some_images(1)[0]
    tasks.add("task", {"num_tokens": 2})
    damage_weights(tasks, "task")
    with Engine(vit(), max_wait_ms=0) as engine:
        with pytest.raises(CheckpointError):
            engine.predict(image, tasks.path("task"))
        tasks.add("task", {"num_tokens": 2})
        tasks.check("task", image, engine.predict(image, tasks.path("task")))
        damage_weights(tasks, "task")
        with pytest.raises(CheckpointError):
            engine.predict(image, tasks.path("task"))


def truncated() -> Image.Image:
    file = io.BytesIO()
    picture().save(file, "jpeg")
    return Image.open(io.BytesIO(file.getvalue()[:-300]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (truncated, "cannot be decoded"),
        (lambda: Image.new("I;16", (32, 32), 3000), "must have 8 bits per channel, got mode I;16"),
        (lambda: "photo.jpg", "Expected a PIL image or a tensor"),
        (lambda: None, "Expected a PIL image or a tensor"),
        (lambda: np.zeros((3, 32, 32)), "Expected a PIL image or a tensor"),
        (lambda: torch.zeros(1, 3, 32, 32), "shape (1, 3, 32, 32)"),
        (lambda: torch.zeros(4, 32, 32), "shape (4, 32, 32)"),
        (lambda: torch.zeros(3, 32, 32, dtype=torch.uint8), "torch.uint8"),
        (lambda: torch.full((3, 32, 32), torch.nan), "must be finite"),
    ],
)
def test_an_image_that_cannot_be_read_fails_alone(tasks: Tasks, image: Callable[[], Any], message: str) -> None:
    tasks.add("task", {"num_tokens": 3})
    good = some_images(2)
    with Engine(vit(), max_batch=2, max_wait_ms=FOREVER) as engine:
        futures = [engine.submit(one, tasks.path("task")) for one in (good[0], image(), good[1])]
        first, error, last = results(futures)
    assert isinstance(error, ImageError) and message in str(error)
    tasks.check("task", good[0], first)
    tasks.check("task", good[1], last)


def test_an_image_that_the_processor_refuses_fails_alone(tasks: Tasks) -> None:
    class Refusing(ViTImageProcessorPil):
        def __call__(self, image: Any, **kwargs: Any) -> Any:
            if image.size == (1, 1):
                raise KeyError("too small")
            return super().__call__(image, **kwargs)

    tasks.add("task", {"num_tokens": 3})
    processor = Refusing(size={"height": 32, "width": 32})
    with Engine(vit(), max_wait_ms=0, image_processor=processor) as engine:
        futures = [engine.submit(one, tasks.path("task")) for one in (picture(), picture(1, 1, 1))]
        answer, error = results(futures)
    assert isinstance(error, ImageError) and "too small" in str(error)
    tasks.check("task", processor(picture(), return_tensors="pt")["pixel_values"][0], answer)


@pytest.mark.parametrize("mixing", [True, False])
def test_a_pass_that_fails_is_run_again_without_the_image_that_fails(
    tasks: Tasks, six: list[str], mixing: bool
) -> None:
    model, images = vit(), some_images(12)
    images[7, 0, 0, 0] = 1234

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if (kwargs["pixel_values"] == 1234).any():
            raise RuntimeError("out of memory")

    with Engine(model, max_batch=12, max_wait_ms=FOREVER, mixing=mixing) as engine:
        hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
        asked = [(six[row % 6], image) for row, image in enumerate(images)]
        answers = results([engine.submit(image, tasks.path(name)) for name, image in asked])
        hook.remove()
        error = answers.pop(7)
        assert type(error) is EngineError and "out of memory" in str(error)
        del asked[7]
        for (name, image), answer in zip(asked, answers, strict=True):
            tasks.check(name, image, answer)
        assert engine.stats().failed == 1


def test_an_adapter_that_computes_no_numbers_fails_alone(tasks: Tasks) -> None:
    tasks.add("good", {"num_tokens": 5})
    tasks.add("also_good", {"num_tokens": 2})
    vpt = get_vpt_model(vit(), PromptConfig(num_tokens=3, kind="prefix"), num_labels=2)
    for parameter in vpt.adapters.parameters():
        torch.nn.init.constant_(parameter, 3e38)
    vpt.save_pretrained(tasks.folder / "huge")
    images = some_images(6)
    names = ["huge", "good", "also_good"] * 2
    with Engine(vit(), max_batch=6, max_wait_ms=FOREVER, mixing=True) as engine:
        futures = [engine.submit(image, tasks.path(name)) for name, image in zip(names, images, strict=True)]
        for name, image, answer in zip(names, images, results(futures), strict=True):
            if name == "huge":
                assert type(answer) is EngineError and "not finite" in str(answer)
            else:
                tasks.check(name, image, answer)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "2"])
def test_a_wrong_number_of_labels_is_the_requests_own_error(tasks: Tasks, top_k: Any) -> None:
    with Engine(vit(), max_wait_ms=0) as engine, pytest.raises(ConfigError, match="top_k"):
        engine.predict(some_images(1)[0], tasks.path("task"), top_k=top_k)


def test_the_file_of_an_image_may_be_closed_and_its_pixels_changed_after_submit(tasks: Tasks) -> None:
    tasks.add("task", {"num_tokens": 3})
    processor, pixel_values = processor_for(), some_images(1)[0]
    picture().save(tasks.folder / "image.png")
    expected = pixel_values.clone()
    with Engine(vit(), max_batch=2, max_wait_ms=FOREVER, image_processor=processor) as engine:
        with Image.open(tasks.folder / "image.png") as image:
            of_file = engine.submit(image, tasks.path("task"))
        of_tensor = engine.submit(pixel_values, tasks.path("task"))
        pixel_values.zero_()
        tasks.check("task", expected, of_tensor.result(SOON))
        tasks.check("task", processor(picture(), return_tensors="pt")["pixel_values"][0], of_file.result(SOON))


# -- which adapters are in memory -----------------------------------------------------------------------------------


def test_the_least_recently_used_adapters_go(tasks: Tasks, six: list[str]) -> None:
    image, paths = some_images(1)[0], [tasks.path(name) for name in six]
    with Engine(vit(), max_adapters=3, max_wait_ms=0) as engine:
        for number in (0, 1, 2, 0, 3):
            engine.predict(image, paths[number])
        assert engine.tasks() == [paths[3], paths[0], paths[2]]
        assert engine.preload(paths[4]).result(SOON) is None
        assert engine.tasks() == [paths[4], paths[3], paths[0]]
        stats = engine.stats()
        assert (stats.hits, stats.misses, stats.evictions, stats.adapters) == (1, 5, 2, 3)
        tasks.check(six[1], image, engine.predict(image, paths[1]))


def test_adapters_that_waiting_requests_need_stay(tasks: Tasks, six: list[str]) -> None:
    images = some_images(6)
    with Engine(vit(), max_adapters=2, max_batch=6, max_wait_ms=FOREVER, mixing=True) as engine:
        futures = [engine.submit(image, tasks.path(name)) for name, image in zip(six, images, strict=True)]
        for name, image, answer in zip(six, images, results(futures), strict=True):
            tasks.check(name, image, answer)
        assert len(engine.tasks()) == engine.stats().adapters == 2
    with Engine(vit(), max_adapters=1, max_batch=2, max_wait_ms=FOREVER) as engine:
        future = engine.submit(images[0], tasks.path(six[0]))
        for name in six[:2]:
            engine.preload(tasks.path(name)).result(SOON)
        assert engine.tasks() == [tasks.path(six[0])] and not future.done()


def test_many_clients_are_answered_rightly_while_adapters_come_and_go(tasks: Tasks, six: list[str]) -> None:
    images, answered = some_images(8), []

    def ask(client: int) -> None:
        choose = random.Random(client)
        for _ in range(25):
            name, row = choose.choice(six), choose.randrange(8)
            answered.append((name, row, engine.predict(images[row], tasks.path(name))))

    in_memory = -count_adapters()
    with Engine(vit(), max_adapters=2, max_batch=4, max_wait_ms=1) as engine, ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(8))) == [None] * 8
        stats = engine.stats()
        engine.predict(images[0], engine.tasks()[0])  # before that, the computing thread removes those that went
        in_memory += count_adapters()
    for name, row, answer in answered:
        tasks.check(name, images[row], answer)
    assert (stats.accepted, stats.answered, stats.failed) == (200, 200, 0)
    assert stats.evictions >= 4 and stats.adapters == 2
    assert in_memory <= 3  # two, and the one without prompts


def test_an_adapter_is_loaded_once_for_all_requests_that_wait_for_it(
    tasks: Tasks, six: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = some_images(6)
    with Engine(vit(), max_batch=6, max_wait_ms=FOREVER) as engine:
        with held_loading(monkeypatch):
            futures = [engine.submit(image, tasks.path(six[0])) for image in images]
            assert engine.tasks() == [] and engine.stats().queue_length == 6
        for image, answer in zip(images, results(futures), strict=True):
            tasks.check(six[0], image, answer)
        assert engine.stats().misses == 6 and engine.tasks() == [tasks.path(six[0])]


def test_other_adapters_are_answered_while_one_is_loaded(
    tasks: Tasks, six: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = some_images(1)[0]
    with Engine(vit(), max_wait_ms=0) as engine:
        engine.preload(tasks.path(six[0])).result(SOON)
        with held_loading(monkeypatch):
            slow = engine.submit(image, tasks.path(six[1]))
            tasks.check(six[0], image, engine.predict(image, tasks.path(six[0])))
            assert not slow.done()
        tasks.check(six[1], image, slow.result(SOON))


# -- revisions, and folders that change -----------------------------------------------------------------------------


def test_the_only_adapter_in_a_subfolder_is_found_and_loaded_again_when_it_changes(tasks: Tasks) -> None:
    image = some_images(1)[0]
    with Engine(vit(), max_wait_ms=0) as engine:
        for _ in range(2):
            tasks.add("outer/inner", {"num_tokens": 2})
            answer = engine.predict(image, tasks.path("outer"))
            torch.testing.assert_close(answer.logits, tasks.logits("outer/inner", image), atol=1e-5, rtol=1e-5)
        assert engine.tasks() == [tasks.path("outer")]


def test_two_revisions_of_a_repository_are_two_adapters(tasks: Tasks, hub: HubServer, tmp_path: Path) -> None:
    image = some_images(1)[0]
    for version in ("old", "new"):
        tasks.add(version, {"num_tokens": 3})
    with hub.client(token="hf_me"):
        old = tasks.vpts["old"].push_to_hub("me/birds").oid
        tasks.vpts["new"].push_to_hub("me/birds")
        with Engine(vit(), max_batch=3, max_wait_ms=FOREVER, mixing=True) as engine:
            revisions = (old, None, "main")
            futures = [engine.submit(image, "me/birds", revision=revision) for revision in revisions]
            missing = [engine.submit(image, "me/fish"), engine.submit(image, "me/birds", revision="never")]
            for error in results(missing):
                assert isinstance(error, OSError)
            for revision, version, answer in zip(revisions, ("old", "new", "new"), results(futures), strict=True):
                torch.testing.assert_close(answer.logits, tasks.logits(version, image), atol=1e-5, rtol=1e-5)
                assert (answer.adapter, answer.revision) == ("me/birds", revision)
            assert engine.tasks() == ["me/birds@main", "me/birds", f"me/birds@{old}"]


def test_a_replaced_folder_is_loaded_again(tasks: Tasks) -> None:
    image = some_images(1)[0]
    with Engine(vit(), max_wait_ms=0) as engine:
        for config in ({"num_tokens": 2}, {"num_tokens": 2}, {"num_tokens": 4, "kind": "prefix"}):
            tasks.add("task", config)
            tasks.check("task", image, engine.predict(image, tasks.path("task")))
            tasks.check("task", image, engine.predict(image, tasks.path("task")))
        stats = engine.stats()
        assert (stats.replacements, stats.misses, stats.adapters) == (2, 3, 1)


def test_requests_from_before_a_replacement_are_answered_by_the_old_adapter_once_it_is_in_memory(tasks: Tasks) -> None:
    images = some_images(2)
    path = tasks.add("task", {"num_tokens": 2})
    before = tasks.logits("task", images[0])
    with Engine(vit(), max_batch=2, max_wait_ms=FOREVER, mixing=True) as engine:
        engine.preload(path).result(SOON)
        first = engine.submit(images[0], path)
        tasks.add("task", {"num_tokens": 3})
        second = engine.submit(images[1], path)
        torch.testing.assert_close(first.result(SOON).logits, before, atol=1e-5, rtol=1e-5)
        tasks.check("task", images[1], second.result(SOON))
        assert engine.stats().mixed_batches == 1


def test_weights_are_not_read_before_the_image_processor_that_is_saved_with_them(
    tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, write, asked = picture(), vpt_peft.io.atomic_write, list[Future[Prediction]]()
    path = tasks.add("task", {"num_tokens": 2}, processor_for(image_mean=[0.1] * 3))
    after = processor_for(image_mean=[0.8] * 3)

    with Engine(vit(), max_wait_ms=0) as engine:

        def ask_and_write(file: Path, content: bytes) -> None:
            if file.name == "preprocessor_config.json":
                asked.append(engine.submit(image, path))
                wait(asked, 0.5)  # where weights are read too early, their image is processed too early
            write(file, content)

        monkeypatch.setattr(vpt_peft.io.folder, "atomic_write", ask_and_write)
        tasks.add("task", {"num_tokens": 3}, after)
        tasks.check("task", after(image, return_tensors="pt")["pixel_values"][0], asked[0].result(SOON))


def test_a_folder_that_another_program_overwrites_while_it_is_read_is_read_again(
    tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, load, after = picture(), vpt_peft.io.load_adapter, processor_for(image_mean=[0.8] * 3)
    path = tasks.add("task", {"num_tokens": 2}, processor_for(image_mean=[0.1] * 3))
    tasks.add("after", {"num_tokens": 3}, after)

    def load_and_overwrite(*args: Any) -> Adapter:
        adapter = load(*args)
        for file in (tasks.folder / "after").iterdir():
            shutil.copy(file, path)
        monkeypatch.undo()
        return adapter

    monkeypatch.setattr(vpt_peft.io, "load_adapter", load_and_overwrite)
    with Engine(vit(), max_wait_ms=0) as engine:
        answer = engine.predict(image, path)
    expected = tasks.logits("after", after(image, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=1e-5)


def test_no_answer_mixes_the_versions_of_a_folder_that_is_replaced_over_and_over(tasks: Tasks) -> None:
    image, expected = picture(), []
    for version in range(2):
        processor = processor_for(image_mean=[0.1 + 0.7 * version] * 3)
        tasks.add(f"version-{version}", {"num_tokens": 2 + version}, processor, num_labels=4)
        pixel_values = processor(image, return_tensors="pt")["pixel_values"][0]
        expected.append(tasks.logits(f"version-{version}", pixel_values))
    processors = [processor_for(image_mean=[0.1 + 0.7 * version] * 3) for version in range(2)]
    folder, stop = tasks.folder / "task", threading.Event()
    tasks.vpts["version-0"].save_pretrained(folder, image_processor=processors[0])

    def replace() -> int:
        for number in itertools.count(1):
            if stop.is_set():
                return number
            tasks.vpts[f"version-{number % 2}"].save_pretrained(folder, image_processor=processors[number % 2])

    with Engine(vit(), max_wait_ms=0) as engine, ThreadPoolExecutor(1) as writer:
        replacing = writer.submit(replace)
        try:
            answers = [engine.submit(image, folder) for _ in range(60)]
            answers += [engine.submit(image, folder) for _ in range(5) if answers[-1].result(SOON)]
            logits = [answer.result(SOON).logits for answer in answers]
        finally:
            stop.set()
        assert replacing.result(SOON) > 1
    for answer in logits:
        assert min((answer - one).abs().max() for one in expected) < 1e-5


def test_a_folder_that_was_removed_fails_and_its_earlier_requests_do_not(tasks: Tasks) -> None:
    images = some_images(2)
    path = tasks.add("task", {"num_tokens": 2})
    model = vit()
    with Engine(model, max_wait_ms=0) as engine:
        engine.preload(path).result(SOON)
        gate = Gate(model)
        first = engine.submit(images[0], path)
        shutil.rmtree(path)
        second = engine.submit(images[1], path)
        gate.open()
        tasks.check("task", images[0], first.result(SOON))
        assert isinstance(second.exception(SOON), CheckpointError)


# -- queue, cancelling and closing ----------------------------------------------------------------------------------


def test_requests_beyond_max_queue_are_refused_until_others_are_answered(tasks: Tasks) -> None:
    model, image = vit(), some_images(1)[0]
    path = tasks.add("task", {"num_tokens": 2})
    with Engine(model, max_queue=3, max_wait_ms=0) as engine:
        gate = Gate(model)
        futures = [engine.submit(image, path) for _ in range(3)]
        for refused in (lambda: engine.submit(image, path), lambda: engine.preload(path), lambda: engine.labels(path)):
            with pytest.raises(QueueFullError, match="3 requests are waiting"):
                refused()
        gate.open()
        for answer in results(futures):
            tasks.check("task", image, answer)
        tasks.check("task", image, engine.predict(image, path))
        stats = engine.stats()
        assert (stats.refused, stats.accepted, stats.answered, stats.queue_length) == (3, 4, 4, 0)


def test_cancelled_requests_are_not_computed(tasks: Tasks) -> None:
    model, images = vit(), some_images(3)
    path = tasks.add("task", {"num_tokens": 2})
    with Engine(model, max_wait_ms=0, max_batch=1) as engine:
        gate = Gate(model)
        first = engine.submit(images[0], path)
        assert gate.reached.wait(SOON)
        second, third = (engine.submit(image, path) for image in images[1:])
        assert second.cancel()
        gate.open()
        tasks.check("task", images[0], first.result(SOON))
        tasks.check("task", images[2], third.result(SOON))
    stats = engine.stats()
    assert (stats.accepted, stats.answered, stats.cancelled, stats.batches, stats.queue_length) == (3, 2, 1, 2, 0)


def test_close_answers_what_was_accepted_and_refuses_the_rest(
    tasks: Tasks, six: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = some_images(6)
    engine = Engine(vit(), max_batch=32, max_wait_ms=FOREVER)
    with held_loading(monkeypatch) as opened, ThreadPoolExecutor(2) as closers:
        futures = [engine.submit(image, tasks.path(name)) for name, image in zip(six, images, strict=True)]
        futures.append(engine.submit(images[0], tasks.path("missing")))
        closing = [closers.submit(engine.close) for _ in range(2)]
        with pytest.raises(EngineClosedError, match="was closed"):
            while True:
                futures.append(engine.submit(images[0], tasks.path(six[0])))
        opened.set()
        assert [one.result(SOON) for one in closing] == [None, None]
    assert all(future.done() for future in futures)
    answers = results(futures)
    for name, image, answer in zip(six, images, answers, strict=False):
        tasks.check(name, image, answer)
    assert isinstance(answers[6], CheckpointError)
    for answer in answers[7:]:
        assert isinstance(answer, QueueFullError) or tasks.check(six[0], images[0], answer) is None
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.predict(images[0], tasks.path(six[0]))
    with pytest.raises(EngineClosedError):
        engine.preload(tasks.path(six[0]))
    assert engine.stats().queue_length == 0


@pytest.mark.parametrize("name", ["answered", "failed"])
def test_close_in_a_function_of_a_future_answers_what_was_accepted(
    name: str, tasks: Tasks, six: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It runs in the thread that computes, or in the only one that loads adapters."""
    folder = shutil.copytree(tasks.path(six[0]), tmp_path / "closing")
    if name == "failed":
        (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    images, closed, errors = some_images(4), threading.Event(), list[Exception]()

    def close(_: Future[Any]) -> None:
        try:
            engine.close()
        except Exception as error:
            errors.append(error)
        closed.set()

    threads = set(threading.enumerate())
    with held_loading(monkeypatch) as opened:
        engine = Engine(vit(), max_batch=4, load_workers=1)
        others = [engine.submit(image, tasks.path(task)) for task, image in zip(six[1:4], images[1:], strict=True)]
        closing = engine.submit(images[0], folder)
        closing.add_done_callback(close)
        opened.set()
        assert closed.wait(SOON) and not errors
        for task, image, other in zip(six[1:4], images[1:], others, strict=True):
            tasks.check(task, image, other.result(SOON))
    engine.close()
    assert isinstance(closing.exception(), CheckpointError if name == "failed" else type(None))
    assert not {thread for thread in set(threading.enumerate()) - threads if "vpt-engine" in thread.name}
    with pytest.raises(EngineClosedError):
        engine.predict(images[0], tasks.path(six[0]))


def test_close_ends_all_threads_and_gives_the_model_back(tasks: Tasks, six: list[str]) -> None:
    model, images = vit(), some_images(6)
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    modes = [parameter.requires_grad for parameter in model.parameters()]
    threads = set(threading.enumerate())
    with Engine(model, max_batch=6, max_wait_ms=FOREVER) as engine:
        results([engine.submit(image, tasks.path(name)) for name, image in zip(six, images, strict=True)])
    assert not {thread for thread in set(threading.enumerate()) - threads if "vpt-engine" in thread.name}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        n: set(v) for n, v in modules.items()
    }
    assert all("forward" not in vars(module) for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == modes
    for (name, ours), theirs in zip(model.named_parameters(), vit().parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert get_vpt_model(model, PromptConfig()).active_adapter == "default"


def test_a_vpt_model_keeps_its_own_adapters(tasks: Tasks, six: list[str]) -> None:
    vpt, images = tiny_vit().prompted(), some_images(4)
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    vpt.set_adapter("other")
    with torch.no_grad():
        before = vpt(images).logits
    with Engine(vpt, max_wait_ms=0) as engine:
        tasks.check(six[0], images[0], engine.predict(images[0], tasks.path(six[0])))
        with pytest.raises(AdapterError, match="belongs to another engine"):
            Engine(vpt)
    assert list(vpt.adapters) == ["default", "other"] and vpt.active_adapter == "other"
    assert all(parameter.requires_grad for parameter in vpt.adapters["other"].parameters())
    with torch.no_grad():
        assert torch.equal(vpt(images).logits, before)


def test_backbones_of_the_same_process_can_be_trained_afterwards(tmp_path: Path) -> None:
    """transformers keeps the indices of BEiT's position bias for all models of the process with as many patches."""

    def build() -> PreTrainedModel:
        return tiny_beit(image_size=56).model  # of a size that no other test has

    name = Tasks(tmp_path, build).add("task", {"num_tokens": 3})
    images = some_images(1, 56)
    with Engine(build()) as engine:
        engine.predict(images[0], name)
    model = build()
    model(images).logits.sum().backward()
    bias = model.get_parameter("beit.shared_position_bias.relative_position_bias_table")
    assert bias.grad is not None and bias.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_the_engine_runs_and_the_mode_is_restored(tasks: Tasks, training: bool) -> None:
    vpt = tiny_vit().prompted().train(training)
    path = tasks.add("task", {"num_tokens": 2, "dropout": 0.5})
    image = some_images(1)[0]
    with Engine(vpt, max_wait_ms=0) as engine:
        tasks.check("task", image, engine.predict(image, path))
    assert vpt.training is training


FORGETFUL = """
import sys, torch
from transformers import ViTConfig, ViTForImageClassification
from vpt_peft import PromptConfig, get_vpt_model
from vpt_peft.deploy import Engine

def build():
    torch.manual_seed(0)
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    return ViTForImageClassification(ViTConfig(**small, patch_size=8)).eval()

get_vpt_model(build(), PromptConfig(num_tokens=2)).save_pretrained(sys.argv[1])
engine = Engine(build(), max_batch=9, max_wait_ms=1e9)
for name in (sys.argv[1], "missing/.."):
    engine.submit(torch.zeros(3, 16, 16), name).add_done_callback(lambda future: print(future.exception() is None))
print("end")
"""


@pytest.mark.heavy
def test_a_program_that_does_not_close_the_engine_gets_its_answers_and_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORGETFUL, str(tmp_path / "task")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=True)
    assert sorted(run.stdout.split()) == ["False", "True", "end"], run.stderr


def test_a_model_for_another_task_is_refused_and_unchanged() -> None:
    tiny = tiny_beit_segmenter()
    with pytest.raises(AdapterError, match="SEMANTIC_SEGMENTATION"):
        Engine(tiny.model)
    get_vpt_model(tiny.model, PromptConfig())


@pytest.mark.parametrize(
    "options",
    [
        {"max_adapters": 0}, {"max_batch": 0}, {"max_batch": True}, {"max_queue": -1}, {"load_workers": 1.5},
        {"max_wait_ms": -1}, {"max_wait_ms": float("nan")}, {"max_wait_ms": "5"}, {"mixing": "often"},
    ],
)  # fmt: skip
def test_wrong_options_are_refused_and_the_model_is_unchanged(options: dict[str, Any]) -> None:
    model = vit()
    with pytest.raises(ConfigError, match=next(iter(options))):
        Engine(model, **options)
    get_vpt_model(model, PromptConfig())


@pytest.mark.parametrize("name", ["missing/../..", "me/missing\0"])
def test_a_backbone_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError):
        Engine(name)


# -- what is mixed, and statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixed", "mixing", "adapters", "passes"),
    [
        (4.0, 1.0, ["a", "b", "c"], ["abc"]),  # mixing saves two passes, 8, and costs 3
        (1.0, 1.0, ["a", "b", "c"], ["a", "b", "c"]),  # an image costs what a pass costs
        (4.0, 1.0, ["a", "b", "cccc"], ["ab", "cccc"]),  # leaving the mixed pass gains c as much as a pass costs
        (4.0, 1.0, ["aaa", "bbb"], ["aaa", "bbb"]),  # mixing saves 4 and costs 6
        (4.0, 0.0, ["a" * 9, "b"], ["a" * 9 + "b"]),  # as on a GPU
        (0.0, 0.0, ["a", "b"], ["a", "b"]),
        (4.0, 1.0, ["a"], ["a"]),
    ],
)
def test_adapters_share_a_pass_where_that_costs_less(
    fixed: float, mixing: float, adapters: list[str], passes: list[str]
) -> None:
    planned = PassCosts(fixed, mixing).plan([list(images) for images in adapters])
    assert ["".join(images) for images in planned] == passes


def test_percentiles_are_the_smallest_values_that_enough_others_do_not_exceed() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 50) == 7 and percentile([], 50) is None


def test_statistics_are_plain_numbers(tasks: Tasks) -> None:
    path = tasks.add("task", {"num_tokens": 2})
    with Engine(vit(), max_wait_ms=0) as engine:
        empty = json.loads(json.dumps(engine.stats().to_dict()))
        assert empty["accepted"] == 0 and empty["latency_p50"] is None and empty["batch_sizes"] == {}
        engine.predict(some_images(1)[0], path)
        stats = engine.stats().to_dict()
    assert 0 < stats["latency_p50"] <= stats["latency_p95"] <= stats["latency_p99"]
    assert stats["batch_sizes"] == {1: 1} and stats["batches"] == 1
