"""One backbone for thousands of adapters and for several threads: what switching, loading and sharing may not cost."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Tiny, assert_same, logits
from helpers.tasks import MIXES, TASKS
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from vpt_peft import (
    AdapterError,
    CheckpointError,
    PromptConfig,
    VPTModel,
    get_adapter_state_dict,
    set_adapter_state_dict,
)


class Operations(TorchDispatchMode):
    """Notes what torch computes while it is entered: each operation, and the elements of what it works on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_real = bool(args) and isinstance(args[0], torch.Tensor) and not args[0].is_meta
        self.seen.append((function.overloadpacket.__name__, args[0].numel() if is_real else 0))
        return function(*args, **(kwargs or {}))


# -- switching ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["deep", "shallow"])
def equal(request: pytest.FixtureRequest, vit: Tiny, tmp_path: Path) -> VPTModel:
    """More adapters of equal shape than graphs that the compiler would keep: fresh ones and loaded ones."""
    vpt = vit.prompted(deep=request.param)
    for number in range(5):
        vpt.add_adapter(f"task{number}", PromptConfig(num_tokens=5, deep=request.param))
    vpt.save_pretrained(tmp_path)
    for number in range(5):
        vpt.load_adapter(tmp_path / f"task{number}", f"loaded{number}", is_trainable=True)
    return vpt


@pytest.mark.heavy
def test_switching_between_adapters_of_equal_shape_does_not_recompile(vit: Tiny, equal: VPTModel) -> None:
    counters.clear()
    compiled = torch.compile(equal, fullgraph=True, dynamic=False, backend="aot_eager")
    for name in equal.adapters:
        equal.set_adapter(name)
        ours = logits(compiled, vit.pixel_values)
        torch.testing.assert_close(ours, logits(equal, vit.pixel_values), atol=1e-6, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompile_limit"]


@pytest.mark.heavy
def test_switching_between_training_steps_does_not_recompile(vit: Tiny, equal: VPTModel) -> None:
    counters.clear()
    equal.train()
    compiled = torch.compile(equal, fullgraph=True, dynamic=False, backend="aot_eager")
    for name in equal.adapters:
        equal.set_adapter(name)
        compiled(vit.pixel_values, labels=vit.labels).loss.backward()
        assert all(parameter.grad is not None for parameter in equal.adapters[name].parameters())
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompile_limit"]


def test_switching_computes_nothing(many: VPTModel) -> None:
    with Operations() as operations:
        for name in TASKS:
            many.set_adapter(name)
    assert operations.seen == []


# -- loading --------------------------------------------------------------------------------------------------------


def test_a_thousand_adapters_cost_their_own_bytes_and_go_when_deleted(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path)
    own = sum(tensor.nbytes for tensor in get_adapter_state_dict(vpt).values())
    backbone = {parameter.data_ptr() for parameter in vit.model.parameters()}
    for number in range(1000):
        vpt.load_adapter(tmp_path, f"task{number}", dtype=torch.bfloat16)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for number in range(1000)
        for tensor in get_adapter_state_dict(vpt, f"task{number}").values()
    }
    assert sum(storages.values()) == 1000 * own // 2  # at half the precision, none shared, none a part of more
    assert {parameter.data_ptr() for parameter in vit.model.parameters()} == backbone
    vpt.set_adapter("task7")
    watched = [weakref.ref(vpt.adapters[f"task{number}"]) for number in range(500, 1000)]
    for number in range(500, 1000):
        vpt.delete_adapter(f"task{number}")
    gc.collect()
    assert not any(reference() for reference in watched)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_never_waits_for_torchs_other_threads(vit: Tiny, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """On a busy CPU each operation on 2^15 elements or more takes 10 ms and longer."""
    vpt = vit.prompted()
    vpt.add_adapter("large", PromptConfig(num_tokens=1500), num_labels=2000)
    vpt.save_pretrained(tmp_path)
    views = {"detach", "split", "unsqueeze", "view", "alias", "select", "lift_fresh"}
    with Operations() as operations:
        vpt.load_adapter(tmp_path / "large", "again", dtype=dtype)
    assert {"copy_", "sum"} <= {name for name, _ in operations.seen}
    assert max(size for name, size in operations.seen if name not in views) < 2**15
    assert_same(
        get_adapter_state_dict(vpt, "again"),
        {name: tensor.to(dtype) for name, tensor in get_adapter_state_dict(vpt, "large").items()},
    )


def test_values_that_are_finite_but_not_their_sum_are_loaded(vit: Tiny) -> None:
    vpt = vit.prompted()
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in get_adapter_state_dict(vpt).items()}
    set_adapter_state_dict(vpt, huge)
    assert_same(get_adapter_state_dict(vpt), huge)
    for value in (torch.nan, torch.inf, -torch.inf):
        damaged = {name: tensor.clone() for name, tensor in huge.items()}
        damaged["prompts.2"][1, 1] = value
        with pytest.raises(CheckpointError, match=r"not finite \(NaN or infinite\): prompts.2\."):
            set_adapter_state_dict(vpt, damaged)


def test_loading_leaves_backbone_and_other_adapters_bit_identical(tiny: Tiny, many: VPTModel, tmp_path: Path) -> None:
    many.save_pretrained(tmp_path)
    backbone = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    others = {name: {k: t.clone() for k, t in get_adapter_state_dict(many, name).items()} for name in TASKS}
    for name in TASKS:
        many.load_adapter(tmp_path / name, f"{name}-again")
    assert_same(dict(tiny.model.state_dict()), backbone)
    for name in TASKS:
        assert_same(get_adapter_state_dict(many, name), others[name])
        assert_same(get_adapter_state_dict(many, f"{name}-again"), others[name])


# -- threads --------------------------------------------------------------------------------------------------------


def test_threads_get_each_their_own_answer(tiny: Tiny, many: VPTModel) -> None:
    mixes = MIXES * 6
    expected = [logits(many, tiny.pixel_values, adapter_names=names) for names in mixes]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda names: logits(many, tiny.pixel_values, adapter_names=names), mixes)
    for ours, alone in zip(answers, expected, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-6, rtol=0)


def test_threads_with_images_of_different_sizes_get_each_their_own_answer(swin: Tiny) -> None:
    """Swin's layers overwrite their window's size to suit an input; that must not reach another thread."""
    vpt = swin.prompted(deep=False)
    sizes = [64, 32, 96, 40] * 6
    images = [torch.randn(2, 3, size, size) for size in sizes]
    expected = [logits(vpt, image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda image: logits(vpt, image), images))
    for ours, alone in zip(answers, expected, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-6, rtol=0)


def test_threads_that_name_adapters_do_not_mind_what_others_switch_load_and_delete(
    tiny: Tiny, many: VPTModel, tmp_path: Path
) -> None:
    many.save_pretrained(tmp_path)
    expected = [logits(many, tiny.pixel_values, adapter_names=names) for names in MIXES]

    def manage() -> None:
        for turn in range(40):
            many.load_adapter(tmp_path / "long", f"new{turn}")
            many.set_adapter(f"new{turn}")
            with many.disable_adapter():
                many.set_adapter("deep")
            many.delete_adapter(f"new{turn}")

    with ThreadPoolExecutor(4) as pool:
        managing = pool.submit(manage)
        answers = list(pool.map(lambda names: logits(many, tiny.pixel_values, adapter_names=names), MIXES * 6))
        managing.result()
    for ours, alone in zip(answers, expected * 6, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-6, rtol=0)
    assert sorted(many.adapters) == sorted(TASKS)
    with pytest.raises(AdapterError, match="got new0"):
        many(tiny.pixel_values, adapter_names=["new0"] * 4)
