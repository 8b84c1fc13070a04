"""Strangers' folders: each trick is refused with a CheckpointError, little memory, and nothing run or changed."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import DTYPES, HUGE, NASTY, join, render, split
from safetensors.torch import load_file, save_file
from test_invariants import assert_unchanged, snapshot
from tiny import Tiny, logits, tiny_vit

from vpt_peft import CheckpointError, PromptConfig, VPTError, VPTModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MEGABYTES = 1024  # of address space that loading may take, be it claimed only


@contextmanager
def little_memory() -> Iterator[None]:
    """While it is open, more memory than that is refused by the system, where it can."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEGABYTES * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def text(change: Callable[[str], str]) -> Callable[[Path], Any]:
    """Changes the text of the config."""
    return lambda folder: (folder / CONFIG).write_text(change((folder / CONFIG).read_text()))


def config(**changes: Any) -> Callable[[Path], Any]:
    """Changes fields of the config, whose weights bear no seal, so that nothing else notices."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors, folder / WEIGHTS)
        text(lambda old: json.dumps({**json.loads(old), **changes}))(folder)

    return change


def header(
    change: Callable[[dict[str, Any]], Any], more: bytes = b"", length: int | None = None
) -> Callable[[Path], Any]:
    """Changes the header of a weights file without a seal."""

    def apply(folder: Path) -> None:
        head, data = split((folder / WEIGHTS).read_bytes())
        entries = json.loads(head)
        entries.pop("__metadata__")
        changed = change(entries)
        new = changed if isinstance(changed, bytes) else json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(join(new, data + more, length))

    return apply


def entry(**changes: Any) -> Callable[[Path], Any]:
    return header(lambda entries: entries["prompts.1"].update(changes))


def renamed(name: str) -> Callable[[Path], Any]:
    return header(lambda entries: entries.update({name: entries.pop("prompts.1")}))


def linked(name: str, where: str) -> Callable[[Path], Any]:
    """Moves a file away and puts a link to it in its place."""

    def link(folder: Path) -> None:
        (folder / where).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / where)
        (folder / name).symlink_to(folder / where)

    return link


def terabytes(folder: Path) -> None:
    """A file that really is as long as it claims, though it takes no room on disk."""
    size = 2**40
    claim = {"prompts.0": {"dtype": "F32", "shape": [2**28, 2**10], "data_offsets": [0, size]}}
    (folder / WEIGHTS).write_bytes(join(json.dumps(claim).encode(), b""))
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + size)


def twice(entries: dict[str, Any]) -> bytes:
    pairs = [(name, json.dumps(value)) for name, value in entries.items()]
    return render([*pairs, pairs[-1]]).encode()


def value(number: float) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors["prompts.1"] = tensors["prompts.1"].double()
        tensors["prompts.1"][0, 0] = number
        save_file(tensors, folder / WEIGHTS)

    return change


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


TRICKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a header of terabytes": (lambda f: (f / WEIGHTS).write_bytes((2**42).to_bytes(8, "little")), "header claims"),
    "a header of all there is": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8), "header claims"),
    "a tensor of terabytes": (entry(shape=[2**20, 2**20]), "does not fill"),
    "a tensor of terabytes that fills its offsets": (
        entry(shape=[2**20, 2**20], data_offsets=[0, 2**42]), "lie one behind the other",
    ),
    "a file of terabytes": (terabytes, "of another shape: prompts.0"),
    "a product beyond 64 bits": (entry(shape=[2**62, 2**62]), "does not fill"),
    "a million dimensions": (entry(shape=[1] * 10**6), "is not valid"),
    "offsets out of range": (entry(data_offsets=[10**6, 10**6 + 192]), "lie one behind the other"),
    "offsets backwards": (entry(data_offsets=[192, 0]), "does not fill"),
    "offsets below zero": (entry(data_offsets=[-192, 0]), "is not valid"),
    "tensors that share bytes": (entry(data_offsets=[0, 192]), "lie one behind the other"),
    "data that no tensor is": (header(lambda entries: None, more=b"\0" * 4), "its tensors end at"),
    "a boolean as size": (entry(shape=[True, 48]), "is not valid"),
    "a fraction as size": (entry(shape=[2.0, 24]), "is not valid"),
    "a tensor twice": (header(twice), "a key stands twice"),
    "a config field twice": (text(lambda old: '{"num_tokens": 9,' + old[1:]), "a key stands twice"),
    "a label twice": (text(lambda old: old.replace('"1": "LABEL_1"', '"0": "LABEL_1"')), "a key stands twice"),
    "NaN": (value(float("nan")), "not finite"),
    "infinity": (value(float("-inf")), "not finite"),
    "infinity as float32": (value(1e300), "too large: prompts.1"),
    "NaN in the config": (text(lambda old: old.replace('"dropout": 0.0', '"dropout": NaN')), "NaN is no JSON"),
    "infinity in the config": (text(lambda old: old.replace('"dropout": 0.0', '"dropout": 1e999')), "dropout must be"),
    "10 MB of junk": (lambda f: (f / CONFIG).write_bytes(b"{" + b" " * 10**7 + b"}"), "at most 8,388,608 bytes"),
    "8 MB of junk": (text(lambda old: '{"junk": "' + "x" * (8 * 10**6) + '",' + old[1:]), "no field junk"),
    "7 MB of lists": (text(lambda old: '{"widths": [' + "[]," * 2_300_000 + "[]]}"), "at most 200,000 lists"),
    "30 MB of lists": (header(lambda entries: b'{"x": [' + b"[]," * 10**7 + b"[]]}"), "at most 200,000 lists"),
    "a deep config": (text(lambda old: "[" * 10**5), "must be a JSON file"),
    "a deep header": (header(lambda entries: b"[" * 10**5), "must be a safetensors file"),
    "13 MB of names": (
        header(lambda entries: b"{" + b",".join(b'"%d":0' % number for number in range(1_200_000)) + b"}"), "dtype",
    ),
    "a number of 5,000 digits": (config(num_tokens=10**4000), "no adapter that can exist|must be|num_tokens"),
    "prompts of terabytes": (config(num_tokens=2**40), "of another shape: .*prompts.0"),
    "a projection of terabytes": (config(projection_dim=2**40), "missing: projection.bias"),
    "half a character": (text(lambda old: old.replace("LABEL_0", "\\ud800", 1)), "surrogates not allowed"),
    "a link out of the folder to the config": (linked(CONFIG, "../out.json"), "link out of it"),
    "a link out of the folder to the weights": (linked(WEIGHTS, "../out.bin"), "link out of it"),
    "a link to a device": (instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "lacks"),
    "a pipe": (instead(CONFIG, lambda path: os.mkfifo(path)), "lacks"),
    "a folder as file": (instead(WEIGHTS, lambda path: path.mkdir()), "lacks"),
    "a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({"prompts.0": 1})), "never opened"),
    "code of its own": (config(auto_map={"AutoModel": "evil--Model"}), "no field auto_map"),
}  # fmt: skip
TRICKS |= {
    f"a tensor named {name[:20]!r}": (renamed(name), "unexpected: |must be a safetensors file") for name in NASTY
}
TRICKS |= {
    f"the type {dtype!r}": (entry(dtype=dtype), "not valid|not fill|of another type")
    for dtype in DTYPES
    if dtype != "F32"
}
WRONG: list[Any] = [None, -1, 0.5, "x", "", [], {}, [None], {"a": 1}, [[]], *HUGE]
FIELDS = sorted(
    PromptConfig().to_dict() | dict.fromkeys(("id2label", "label2id", "problem_type", "model_type", "widths"))
)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes are those of POSIX")
@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_is_refused_and_takes_no_memory(trick: str, vit: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    vit.prompted(num_tokens=2).save_pretrained(folder)
    play, message = TRICKS[trick]
    play(folder)
    model = tiny_vit().model
    before = snapshot(model)
    with little_memory(), pytest.raises(CheckpointError, match=message) as error:
        VPTModel.from_pretrained(model, folder)
    assert len(str(error.value)) < 5_000
    assert_unchanged(before, snapshot(model))


def test_a_link_within_the_folder_is_none_out_of_it(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted(num_tokens=2)
    vpt.save_pretrained(tmp_path / "x")
    linked(WEIGHTS, "inner/weights")(tmp_path / "x")
    (tmp_path / "y").symlink_to(tmp_path / "x")  # the user's own link to a folder
    loaded = VPTModel.from_pretrained(tiny_vit().model, tmp_path / "y")
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


def test_a_subfolder_that_is_a_link_out_of_the_folder_is_refused(vit: Tiny, tmp_path: Path) -> None:
    vit.prompted(num_tokens=2).save_pretrained(tmp_path / "out")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "inner").symlink_to(tmp_path / "out")
    with pytest.raises(CheckpointError, match="link out of it"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path / "x")


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_of_wrong_types_is_refused_or_means_nothing_else(field: str, vit: Tiny, tmp_path: Path) -> None:
    vit.prompted(num_tokens=2).save_pretrained(tmp_path)
    model, refused = tiny_vit().model, 0
    original = (tmp_path / CONFIG).read_text()
    for wrong in WRONG:
        (tmp_path / CONFIG).write_text(original)
        config(**{field: wrong})(tmp_path)
        try:
            vpt = VPTModel.from_pretrained(model, tmp_path)
        except VPTError as error:
            assert len(str(error)) < 5_000
            refused += 1
        else:
            said = vpt.active_config.to_dict() | vpt.adapters["default"].labels()
            assert said.get(field) == wrong or field in ("inference_mode", "task_type", "modules_to_save")
            vpt.unload()
    assert refused >= len(WRONG) - 6
