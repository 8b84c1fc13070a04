"""Trust: a folder survives kill -9 and competing writers, and nothing that a stranger's folder says is believed."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same, tiny_vit
from transformers import ViTImageProcessor

from vpt_peft import VPTModel, get_adapter_state_dict

EXAMPLES = int(os.environ.get("VPT_FUZZ_EXAMPLES", "150"))  # of mutations
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PROCESSOR = "preprocessor_config.json"
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that import torch anew take seconds")
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def two() -> list[VPTModel]:
    return [tiny_vit().prompted(num_tokens=2), tiny_vit(num_labels=3).prompted(num_tokens=5, deep=False)]


def held(folder: Path, two: list[VPTModel]) -> int:
    """Which of the two a folder holds, to the last bit; fails if that is neither."""
    loaded = VPTModel.from_pretrained(tiny_vit().model, folder)
    number = int(loaded.config.num_labels == 3)
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(two[number]))
    assert loaded.active_config == two[number].active_config.replace(inference_mode=True)
    assert loaded.config.id2label == two[number].config.id2label
    return number


@contextmanager
def processes(*works: Callable[[], object], kill: bool) -> Iterator[None]:
    """Runs works in forks of this process, and in the end kills them, or waits until they are done."""
    running = [os.fork() or _work(work) for work in works]
    try:
        yield
    finally:
        for process in running:
            if kill:
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill else 0)


def _work(work: Callable[[], object]) -> int:
    try:
        signal.alarm(300)  # nothing outlives the tests
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def save(folder: Path, models: list[VPTModel], times: int, temporary: str | None = None) -> None:
    tempfile.tempdir = temporary
    for _ in range(times):
        random.choice(models).save_pretrained(folder)


def save_in_turn(folder: Path, models: list[VPTModel], temporary: Path) -> None:
    """Saves until it is killed, each model with an image processor of its own."""
    tempfile.tempdir = str(temporary)
    for number in itertools.count():
        size = {"height": 16 + number % 2, "width": 16}
        models[number % 2].save_pretrained(folder, image_processor=ViTImageProcessor(size=size))


@forks
def test_a_process_killed_while_saving_leaves_the_old_adapter_or_the_new_one(two: Any, tmp_path: Path) -> None:
    folder, temporary = tmp_path / "x", tmp_path / "temporary"
    temporary.mkdir()
    two[0].save_pretrained(folder, image_processor=ViTImageProcessor())
    (folder / CARD).write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    moments, found = random.Random(0), set()
    for _ in range(max(25, EXAMPLES // 25)):
        with processes(lambda: save_in_turn(folder, two, temporary), kill=True):
            time.sleep(moments.uniform(0, 0.1))
        found.add(held(folder, two))
        assert {"license: mit", "My own words."} <= set((folder / CARD).read_text().split("\n"))
        assert json.loads((folder / PROCESSOR).read_text())["image_processor_type"]
    two[0].save_pretrained(folder)
    assert found == {0, 1} and held(folder, two) == 0
    assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS, PROCESSOR]


@forks
def test_processes_that_save_to_one_folder_leave_one_whole_adapter(two: Any, tmp_path: Path) -> None:
    folder, places = tmp_path / "x", [tempfile.mkdtemp(dir=tmp_path) for _ in two]
    two[0].save_pretrained(folder)
    for _ in range(5):  # each with a temporary folder of its own, as containers have
        with processes(*(lambda place=place: save(folder, two, 5, place) for place in places), kill=False):  # type: ignore[misc]
            for _ in range(10):
                held(folder, two)
        held(folder, two)
        assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS]


def test_a_reader_gets_a_whole_adapter_whatever_is_saved_between_its_steps(two: Any, tmp_path: Path) -> None:
    for number in (0, 1, 1):  # twice, so that the second forgets what was there before the first
        two[number].save_pretrained(tmp_path / str(number))
    folder = Path(shutil.copytree(tmp_path / "0", tmp_path / "x"))
    steps, found = set[Any](), []

    def put(number: int) -> None:
        for name in (WEIGHTS, CONFIG):
            shutil.copy(tmp_path / str(number) / name, tmp_path / name)
            os.replace(tmp_path / name, folder / name)

    def trace(frame: Any, event: str, _: object) -> Any:
        step = frame.f_globals.get("__name__"), frame.f_lineno
        if (
            step[0] in ("vpt_peft.checkpoint", "vpt_peft.folder", "vpt_peft.weights")
            and event == "line"
            and step not in steps
        ):
            steps.add(step)  # each line once, just before it runs
            put(1)
            sys.settrace(None)
        return trace

    before = sys.gettrace()
    while len(found) == len(steps):
        put(0)
        sys.settrace(trace)
        try:
            found.append(held(folder, two))
        finally:
            sys.settrace(before)
    assert found[0] == 1 and found[-1] == 0 and len(found) > 30


def test_a_file_is_replaced_not_rewritten_and_a_link_not_followed(two: Any, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    two[0].save_pretrained(folder)
    for name in (CONFIG, WEIGHTS, CARD):
        os.link(folder / name, tmp_path / name)
    before = [(tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS, CARD)]
    two[1].save_pretrained(folder, license="mit")
    assert [(tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS, CARD)] == before
    (folder / CARD).unlink()
    (folder / CARD).symlink_to(tmp_path / CARD)
    two[1].save_pretrained(folder, license="apache-2.0")
    assert (tmp_path / CARD).read_bytes() == before[2] and not (folder / CARD).is_symlink()
