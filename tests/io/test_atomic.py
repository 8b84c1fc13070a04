"""Atomic saving: killed processes, processes that save at once, and readers in between."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import assert_same, tiny_vit
from transformers import ViTImageProcessor

from vpt_peft import CheckpointError, VPTModel, get_adapter_state_dict
from vpt_peft.io import folder as folder_module

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PROCESSOR = "preprocessor_config.json"
READERS = {f"vpt_peft.io.{name}" for name in ("folder", "weights", "state_dict", "atomic")}
OPERATIONS = ("mkdir", "fsync", "replace", "unlink", "rmdir")  # of os, in which a saving process is killed
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def two() -> list[VPTModel]:
    return [tiny_vit().prompted(num_tokens=2), tiny_vit(num_labels=3).prompted(num_tokens=5, deep=False)]


@cache
def bare_model() -> Any:
    return tiny_vit().model


def held(folder: Path, two: list[VPTModel]) -> int:
    """Which of the two a folder holds, bit for bit; fails if it is neither."""
    loaded = VPTModel.from_pretrained(bare_model(), folder)
    number = int(loaded.config.num_labels == 3)
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(two[number]))
    assert loaded.active_config == two[number].active_config.replace(inference_mode=True)
    assert loaded.config.id2label == two[number].config.id2label
    loaded.unload()
    return number


def fork(work: Callable[[], object]) -> int:
    """Starts a fork of this process that does some work; returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        signal.alarm(120)  # in case it never ends
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def wait(process: int) -> int:
    """The exit code of a process, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(step: int) -> None:
    """Makes this process kill itself before or after one of its operations on files, counted from 0."""
    steps = itertools.count()

    def count() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            result = operation(*args, **kwargs)
            count()
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))


def save_killed_at(step: int, vpt: VPTModel, folder: Path) -> bool:
    """Saves in another process that is killed at a step; returns whether it has finished before."""

    def work() -> None:
        tempfile.tempdir = str(folder.parent)
        kill_at(step)
        vpt.save_pretrained(folder, image_processor=ViTImageProcessor(size={"height": 17, "width": 16}))

    code = wait(fork(work))
    assert code in (0, -signal.SIGKILL)
    return code == 0


@forks
@pytest.mark.heavy
def test_a_process_killed_at_any_step_of_saving_leaves_the_old_adapter_or_the_new_one(two: Any, tmp_path: Path) -> None:
    folder, found = tmp_path / "x", []
    two[0].save_pretrained(folder)
    (folder / CARD).write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    for step in itertools.count():
        two[0].save_pretrained(folder, image_processor=ViTImageProcessor(size={"height": 16, "width": 16}))
        assert held(folder, two) == 0
        assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS, PROCESSOR]  # nothing is left of a killed process
        is_done = save_killed_at(step, two[1], folder)
        found.append(held(folder, two))
        assert json.loads((folder / PROCESSOR).read_text())["size"]["height"] in (16, 17)
        assert {"license: mit", "My own words."} <= set((folder / CARD).read_text().split("\n"))
        if is_done:
            break
    replaced = found.index(1)
    assert found == [0] * replaced + [1] * (len(found) - replaced)
    assert replaced >= 4 and len(found) > 4 * 4  # two steps at fsync and two at replace, for each of four files


@forks
@pytest.mark.heavy
def test_a_process_killed_at_any_step_leaves_a_new_folder_without_an_adapter_or_with_it(
    two: Any, tmp_path: Path
) -> None:
    found = []
    for step in itertools.count():
        folder = tmp_path / str(step) / "x"
        folder.parent.mkdir()
        is_done = save_killed_at(step, two[1], folder)
        try:
            found.append(held(folder, two))
        except CheckpointError as error:
            assert "neither an existing folder" in str(error) or "lacks" in str(error)
            found.append(-1)
        two[1].save_pretrained(folder)
        assert held(folder, two) == 1
        assert set(os.listdir(folder)) - {PROCESSOR} == {CARD, CONFIG, WEIGHTS}
        if is_done:
            break
    assert found == sorted(found) and set(found) == {-1, 1}


@forks
@pytest.mark.parametrize("has_folder_locks", [True, False])
def test_a_process_waits_until_another_has_saved(
    has_folder_locks: bool, two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    folder, running, events = tmp_path / "x", [], []
    flock, fsync, replace = fcntl.flock, os.fsync, os.replace
    two[0].save_pretrained(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def recorded_flock(descriptor: Any, operation: int) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if stat.S_ISDIR(os.fstat(number).st_mode) and not has_folder_locks:
            raise OSError(errno.ENOLCK, "no locks on folders")
        flock(descriptor, operation)
        events.append("unlock" if operation & fcntl.LOCK_UN else "lock")

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append("fsync")

    def save_other() -> None:
        os.replace = replace
        two[1].save_pretrained(folder)

    def recorded_replace(source: Any, target: Any) -> None:
        (locked,) = [folder] if has_folder_locks else tmp_path.glob("vpt-peft-*.lock")
        descriptor = os.open(locked, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        if not running:
            running.append(fork(save_other))
        replace(source, target)
        events.append(Path(target).name)

    monkeypatch.setattr(fcntl, "flock", recorded_flock)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    two[0].save_pretrained(folder)
    assert wait(running[0]) == 0
    first = events.index(WEIGHTS)
    assert "lock" in events[:first]
    assert events[first - 1 : first + 4] == ["fsync", WEIGHTS, "fsync", CONFIG, "unlock"]  # no other process in between
    assert held(folder, two) == 1
    assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS]


@forks
def test_readers_get_a_whole_adapter_while_processes_save_at_once(two: Any, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    two[0].save_pretrained(folder)

    def save(place: Path, first: int) -> None:
        place.mkdir()
        tempfile.tempdir = str(place)  # not a common one, as in containers
        for number in range(8):  # fewer than the attempts of a reader
            two[(first + number) % 2].save_pretrained(folder)

    running = [fork(lambda first=first: save(tmp_path / str(first), first)) for first in (0, 1)]
    while running:
        held(folder, two)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                assert status == 0
                running.remove(process)
    held(folder, two)
    assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS]


@pytest.fixture
def put(two: Any, tmp_path: Path) -> Callable[[int], None]:
    """Replaces the files in the folder "x" by those of one of the two, as saving does."""
    for number in (0, 1):
        two[number].save_pretrained(tmp_path / str(number))
    (tmp_path / "x").mkdir()

    def replace(number: int) -> None:
        for name in (WEIGHTS, CONFIG):
            shutil.copy(tmp_path / str(number) / name, tmp_path / name)
            os.replace(tmp_path / name, tmp_path / "x" / name)

    replace(0)
    return replace


def test_a_reader_gets_a_whole_adapter_whatever_is_saved_between_its_steps(
    two: Any, put: Callable[[int], None], tmp_path: Path
) -> None:
    steps, found = set[Any](), []

    def trace(frame: Any, event: str, _: object) -> Any:
        step = frame.f_globals.get("__name__"), frame.f_lineno
        if step[0] not in READERS:
            return None
        if event == "line" and step not in steps:
            steps.add(step)  # each line once, just before it runs
            put(1)
            sys.settrace(None)
        return trace

    before = sys.gettrace()
    while len(found) == len(steps):
        put(0)
        sys.settrace(trace)
        try:
            found.append(held(tmp_path / "x", two))
        finally:
            sys.settrace(before)
    assert found[0] == 1 and found[-1] == 0 and len(found) > 50


def test_a_file_that_is_replaced_while_safetensors_opens_it_is_opened_again(
    two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 1):
        two[number].save_pretrained(tmp_path / "x")
    shutil.copy(tmp_path / "x" / WEIGHTS, tmp_path / "weights-1")  # with the hash of the other's config
    two[0].save_pretrained(tmp_path / "x")
    from_file, replacing = torch.UntypedStorage.from_file, [tmp_path / "weights-1"]

    def replace_before(*args: Any, **kwargs: Any) -> Any:  # called by safetensors when it has read the header
        if replacing:
            os.replace(replacing.pop(), tmp_path / "x" / WEIGHTS)
        return from_file(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(replace_before))
    assert held(tmp_path / "x", two) == 1


def test_files_that_are_replaced_twice_while_they_are_read_are_read_again(
    two: Any, put: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_weights, numbers = folder_module.open_weights, [0, 1]

    @contextmanager
    def replace_around(path: Path) -> Any:
        if numbers:
            put(numbers.pop())
        with open_weights(path) as weights:
            if numbers:  # now the config is again as it was, but not the weights that were opened
                put(numbers.pop())
            yield weights

    monkeypatch.setattr(folder_module, "open_weights", replace_around)
    assert held(tmp_path / "x", two) == 0


def test_a_file_is_replaced_not_rewritten_and_a_link_not_followed(two: Any, tmp_path: Path) -> None:
    folder, names = tmp_path / "x", (CONFIG, WEIGHTS, CARD, PROCESSOR)
    two[0].save_pretrained(folder, image_processor=ViTImageProcessor())
    for name in names:
        os.link(folder / name, tmp_path / name)
    before = [(tmp_path / name).read_bytes() for name in names]
    changed = ViTImageProcessor(size={"height": 17, "width": 16})
    two[1].save_pretrained(folder, license="mit", image_processor=changed)
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert all((folder / name).read_bytes() != content for name, content in zip(names, before, strict=True))
    (folder / CARD).unlink()
    (folder / CARD).symlink_to(tmp_path / CARD)
    two[1].save_pretrained(folder, license="apache-2.0")
    assert (tmp_path / CARD).read_bytes() == before[2] and not (folder / CARD).is_symlink()
