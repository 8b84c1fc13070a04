"""Mutated adapters: each raises VPTError and changes nothing, or loads as exactly the model that its files describe.

``VPT_FUZZ_EXAMPLES=5000 pytest tests/io/test_fuzz.py`` tries other mutations, and more of them, than the suite does.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import mutations
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import Tiny, assert_same, logits, tiny_swin, tiny_vit
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vpt_peft import PromptConfig, VPTError, VPTModel, get_adapter_state_dict, get_vpt_model, set_adapter_state_dict

EXAMPLES = int(os.environ.get("VPT_FUZZ_EXAMPLES", "100"))  # of each test
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_MESSAGE = 50_000  # characters; what a file contains can be longer
SEALED = (
    "num_tokens", "deep", "layers_to_transform", "carry", "shared", "projection_dim", "pooling", "location", "bias",
    "modules_to_save", "model_type", "model_class", "widths",
)  # fmt: skip
FIELDS = set(PromptConfig().to_dict()) - {"inference_mode", "task_type"}  # loading sets these two
BUILDS: list[tuple[Callable[..., Tiny], dict[str, Any]]] = [
    (tiny_vit, {"num_tokens": 2}),
    (tiny_vit, {"num_tokens": 3, "deep": False, "pooling": "global", "dropout": 0.1, "init": "normal"}),
    (tiny_vit, {"num_tokens": 2, "layers_to_transform": [1, 3], "carry": False, "projection_dim": 4, "shared": True}),
    (tiny_vit, {"num_tokens": 0, "bias": "all", "modules_to_save": ["vit.layernorm"]}),
    (tiny_swin, {"num_tokens": 2, "projection_dim": 3}),
]


@dataclass
class Good:
    """A valid adapter: its files, with and without a seal, its model, and the logits of both."""

    tiny: Tiny
    config: bytes
    sealed: bytes
    unsealed: bytes
    state: dict[str, torch.Tensor]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> list[Good]:
    made = []
    for build, config in BUILDS:
        tiny, folder = build(), tmp_path_factory.mktemp("good")
        vpt = tiny.prompted(**config)
        vpt.save_pretrained(folder)
        state = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
        files = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes(), safetensors.torch.save(state)
        made.append(Good(tiny, *files, state, logits(vpt, tiny.pixel_values)))
        vpt.unload()
    return made


def fuzz(check: Callable[..., str], *drawn: st.SearchStrategy[Any]) -> Counter[str]:
    """Runs a check for many draws and counts its results. The suite's draws are always the same ones."""
    found: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize="VPT_FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(st.tuples(*drawn))
    def run(values: tuple[Any, ...]) -> None:
        found[check(*values)] += 1

    run()
    print(dict(found))
    assert min(found.values()) > EXAMPLES // 30, found  # some are refused and some are loaded
    return found


KINDS = [
    "config", "config", "bytes of config", "header", "header", "tensors", "bytes of weights", "numbers", "both",
    "seal", "seal", "resealed",
]  # fmt: skip


@st.composite
def folders(draw: mutations.Draw) -> Any:
    """The number of a valid adapter and a way to change its files; drawn in two steps, since files are big."""
    number, is_sealed = draw(st.integers(0, len(BUILDS) - 1)), draw(st.booleans())
    return number, is_sealed, draw(st.sampled_from(KINDS)), draw(st.data())


def mutate(good: Good, is_sealed: bool, kind: str, data: Any) -> tuple[bytes, bytes]:
    config, weights = good.config, good.sealed if is_sealed or kind == "seal" else good.unsealed
    match kind:
        case "config":
            config = mutations.configs(data.draw, config)
        case "bytes of config":
            config = mutations.damaged(data.draw, config)
        case "header":
            weights = mutations.headers(data.draw, weights)
        case "both":
            config, weights = mutations.configs(data.draw, config), mutations.headers(data.draw, weights)
        case "tensors":
            weights = mutations.retensored(data.draw, weights)
        case "numbers":
            header, numbers = mutations.split(weights)
            weights = mutations.join(header, mutations.damaged(data.draw, numbers))
        case "bytes of weights":
            weights = mutations.damaged(data.draw, weights)
        case "seal":
            weights = mutations.seals(data.draw, weights)
        case "resealed":
            weights = mutations.resealed(data.draw, config, weights)
    return config, weights


@contextmanager
def refusals() -> Iterator[list[str]]:
    """Collects a VPTError; any other error propagates, and so does a warning of the package."""
    came: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        try:
            yield came
        except VPTError as error:
            assert len(str(error)) < MAX_MESSAGE, f"{len(str(error)):,} characters"
            came.append(str(error))


def described(config: bytes, weights: bytes, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config that counts in two files, and the one in the seal; None without a seal."""
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata() or {}
    if "vpt_peft" not in metadata:
        return json.loads(config), None
    sealed = json.loads(metadata["vpt_peft"])
    is_interrupted = sealed["replaces"] == hashlib.sha256(config).hexdigest()
    return sealed["config"] if is_interrupted else json.loads(config), sealed["config"]


def normalized(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a PromptConfig, with defaults for missing ones, and layers in order."""
    fields = {name: values.get(name, default) for name, default in PromptConfig().to_dict().items() if name in FIELDS}
    layers = fields["layers_to_transform"]
    fields["layers_to_transform"] = [layers] if isinstance(layers, int) else layers and sorted(layers)
    fields["modules_to_save"] = fields["modules_to_save"] or None
    return fields


def check_loaded(vpt: VPTModel, good: Good, kind: str, folder: Path) -> None:
    """Asserts that a model is what an independent reading of two files says; and, if sealed, the one that was saved."""
    config, weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    said, sealed = described(config, weights, folder)
    loaded = vpt.active_config.to_dict()
    assert normalized(loaded) == normalized(said)
    assert said.keys() <= loaded.keys() | {
        "id2label", "label2id", "problem_type", "model_type", "model_class", "widths", "head", "fingerprint",
        "vpt_peft_version",
    }  # fmt: skip
    labels = vpt.adapters[vpt.active_adapter].labels()
    assert {str(number): name for number, name in labels["id2label"].items()} == said["id2label"]
    assert (labels["label2id"], labels["problem_type"]) == (said["label2id"], said["problem_type"])

    tensors = {name: tensor.to(torch.float32) for name, tensor in safetensors.torch.load(weights).items()}
    state = get_adapter_state_dict(vpt)
    assert_same(state, tensors)
    assert all(tensor.isfinite().all() for tensor in state.values())
    answer = logits(vpt, good.tiny.pixel_values)
    if sealed is not None:
        saved = json.loads(good.config)
        assert kind == "resealed" or sealed == saved
        expected, got = ({**values, **normalized(values)} for values in (sealed, said))
        assert {name: got[name] for name in SEALED} == {name: expected[name] for name in SEALED}
    if sealed is not None and kind != "resealed":
        assert_same(state, good.state)
        if said.get("route") == saved["route"]:
            assert torch.equal(answer, good.logits)
        torch.testing.assert_close(answer, good.logits, atol=1e-5, rtol=0)  # another route: the same up to rounding
    vpt.add_adapter("said", PromptConfig.from_dict(normalized(said)), **labels)
    with torch.no_grad():
        for name, tensor in vpt.adapters["said"].state_dict(keep_vars=True).items():
            tensor.copy_(tensors[name])
    vpt.set_adapter("said")
    # Finite numbers can be too large to compute with; then both give NaN.
    torch.testing.assert_close(answer, logits(vpt, good.tiny.pixel_values), atol=0, rtol=0, equal_nan=True)


def test_a_mutated_folder_is_refused_or_loads_as_its_files_describe(goods: list[Good], tmp_path: Path) -> None:
    before = [snapshot(good.tiny.model) for good in goods]

    def check(drawn: Any) -> str:
        number, is_sealed, kind, data = drawn
        good = goods[number]
        config, weights = mutate(good, is_sealed, kind, data)
        (tmp_path / CONFIG).write_bytes(config)
        (tmp_path / WEIGHTS).write_bytes(weights)
        with refusals() as came:
            vpt = VPTModel.from_pretrained(good.tiny.model, tmp_path)
        if not came:
            try:
                check_loaded(vpt, good, kind, tmp_path)
            finally:
                vpt.unload()
        assert_unchanged(before[number], snapshot(good.tiny.model))
        return "refused" if came else "loaded"

    fuzz(check, folders())


def test_a_mutated_folder_is_refused_or_loads_into_an_adapter_completely(goods: list[Good], tmp_path: Path) -> None:
    models = []
    for good in goods:
        values = {name: value for name, value in json.loads(good.config).items() if name in FIELDS}
        models.append(get_vpt_model(good.tiny.model, PromptConfig.from_dict(values)).eval())

    def check(drawn: Any) -> str:
        number, is_sealed, kind, data = drawn
        good, vpt = goods[number], models[number]
        config, weights = mutate(good, is_sealed, kind, data)
        (tmp_path / CONFIG).write_bytes(config)
        (tmp_path / WEIGHTS).write_bytes(weights)
        before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
        kept = vpt.active_config, vpt.adapters["default"].labels()
        with refusals() as came:
            vpt.load_adapter(tmp_path, "default")
        read = {} if came else safetensors.torch.load(weights)
        after = before if came else {name: tensor.to(torch.float32) for name, tensor in read.items()}
        assert_same(get_adapter_state_dict(vpt), after)
        assert (vpt.active_config, vpt.adapters["default"].labels()) == kept and list(vpt.adapters) == ["default"]
        with refusals() as also:
            vpt.load_adapter(tmp_path, "other")
        assert ("other" in vpt.adapters) is not bool(also)
        assert vpt.active_adapter == "default" and (came or not also)
        if not also:
            vpt.delete_adapter("other")
        return "refused" if came else "loaded"

    try:
        fuzz(check, folders())
    finally:
        for vpt in models:
            vpt.unload()


def test_a_mutated_state_dict_is_refused_or_loads_completely(goods: list[Good]) -> None:
    vpt = goods[0].tiny.prompted(num_tokens=2)
    odd: list[Any] = [
        None, 3, "x", [1.0], torch.zeros(2, 24, device="meta"), torch.zeros(2, 24).to_sparse(), torch.zeros(2, 24) * 1j,
    ]  # fmt: skip

    def check(number: int | None, name: Any, data: Any) -> str:
        tensors: dict[Any, Any] = {name: tensor.clone() for name, tensor in goods[0].state.items()}
        for _ in range(data.draw(st.integers(1, 2))):
            mutations.change_tensors(data.draw, tensors)
        if number is not None:
            tensors[name] = odd[number]
        before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
        with refusals() as came:
            set_adapter_state_dict(vpt, tensors)
        taken = before if came else {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
        assert_same(get_adapter_state_dict(vpt), taken)
        return "refused" if came else "loaded"

    numbers = st.none() | st.integers(0, len(odd) - 1)
    fuzz(check, numbers, st.sampled_from(["prompts.0", "head.classifier.weight", "x", 7, None]), st.data())
    vpt.unload()
