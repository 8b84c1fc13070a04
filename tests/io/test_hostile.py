"""Hostile folders: each raises CheckpointError, with little memory, and nothing is run or changed."""

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
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import Tiny, assert_same, logits, tiny_vit
from helpers.mutations import DTYPES, HUGE, NASTY, join, render, split
from safetensors.torch import load_file, save_file

from vpt_peft import CheckpointError, PromptConfig, VPTError, VPTModel, get_adapter_state_dict
from vpt_peft.io.weights import Weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MEGABYTES = 1024  # of further address space that loading may take
MAX_MESSAGE = 20_000


@contextmanager
def little_memory() -> Iterator[None]:
    """Limits the address space of this process, on Linux."""
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
    """Changes fields of the config of an adapter without a seal."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors, folder / WEIGHTS)
        text(lambda old: json.dumps({**json.loads(old), **changes}))(folder)

    return change


def fingerprint(**changes: Any) -> Callable[[Path], Any]:
    """Changes the fingerprint of the backbone in the config."""

    def change(old: str) -> str:
        values = json.loads(old)
        return json.dumps({**values, "fingerprint": {**values["fingerprint"], **changes}})

    return text(change)


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
    """A sparse file, as long as its header says."""
    size = 2**40
    claim = {"prompts.0": {"dtype": "F32", "shape": [2**28, 2**10], "data_offsets": [0, size]}}
    (folder / WEIGHTS).write_bytes(join(json.dumps(claim).encode(), b""))
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + size)


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


NO_WEIGHTS = "must be a safetensors file"
TRICKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a header of terabytes": (
        lambda f: (f / WEIGHTS).write_bytes((2**42).to_bytes(8, "little")), "header must be at most 33,554,432 bytes",
    ),
    "a header of all there is": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8), "header must be at most"),
    "a tensor of terabytes": (entry(shape=[2**20, 2**20]), NO_WEIGHTS),
    "a tensor of terabytes that fills its offsets": (
        entry(shape=[2**20, 2**20], data_offsets=[0, 2**42]), NO_WEIGHTS,
    ),
    "a file of terabytes": (terabytes, f"of another shape: prompts.0|{NO_WEIGHTS}.*Cannot allocate memory"),
    "a product beyond 64 bits": (entry(shape=[2**62, 2**62]), NO_WEIGHTS),
    "a million dimensions": (entry(shape=[1] * 10**6), NO_WEIGHTS),
    "offsets out of range": (entry(data_offsets=[10**6, 10**6 + 192]), NO_WEIGHTS),
    "offsets backwards": (entry(data_offsets=[192, 0]), NO_WEIGHTS),
    "offsets below zero": (entry(data_offsets=[-192, 0]), NO_WEIGHTS),
    "tensors that share bytes": (entry(data_offsets=[0, 192]), NO_WEIGHTS),
    "data that no tensor is": (header(lambda entries: None, more=b"\0" * 4), NO_WEIGHTS),
    "a boolean as size": (entry(shape=[True, 48]), NO_WEIGHTS),
    "a fraction as size": (entry(shape=[2.0, 24]), NO_WEIGHTS),
    "a long name that is repeated in the library's error": (
        header(lambda entries: entries.update({"x" * 10**5: {**entries["prompts.1"], "data_offsets": [7, 199]}})),
        NO_WEIGHTS,
    ),
    "a label twice": (text(lambda old: old.replace('"1": "LABEL_1"', '"0": "LABEL_1"')), "must map 0 to n-1"),
    "NaN": (value(float("nan")), "not finite"),
    "infinity": (value(float("-inf")), "not finite"),
    "infinity as float32": (value(1e300), r"not finite .*: prompts.1 in torch.float32"),
    "NaN in the config": (text(lambda old: old.replace('"dropout": 0.0', '"dropout": NaN')), "dropout must be"),
    "infinity in the config": (text(lambda old: old.replace('"dropout": 0.0', '"dropout": 1e999')), "dropout must be"),
    "10 MB of junk": (lambda f: (f / CONFIG).write_bytes(b"{" + b" " * 10**7 + b"}"), "at most 8,388,608 bytes"),
    "8 MB of junk": (text(lambda old: '{"junk": "' + "x" * (8 * 10**6) + '",' + old[1:]), "no field junk"),
    "a million lists": (text(lambda old: '{"widths": [' + "[]," * 10**6 + "[]]}"), "must contain 'id2label'"),
    "30 MB of lists": (header(lambda entries: b'{"x": [' + b"[]," * 10**7 + b"[]]}"), NO_WEIGHTS),
    "a deep config": (text(lambda old: "[" * 10**5), "must be a JSON file"),
    "a deep header": (header(lambda entries: b"[" * 10**5), NO_WEIGHTS),
    "13 MB of names": (
        header(lambda entries: b"{" + b",".join(b'"%d":0' % number for number in range(1_200_000)) + b"}"), NO_WEIGHTS,
    ),
    "50,000 empty tensors": (
        header(lambda entries: entries.update(
            {str(number): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(50_000)}
        )),
        "at most 10,000, got 50,0",
    ),
    "5,000 empty tensors": (
        header(lambda entries: entries.update(
            {str(number): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(5_000)}
        )),
        "unexpected: 0 .* and 4,000 more",
    ),
    "a number of 5,000 digits": (config(num_tokens=10**4000), "No adapter with the values of .* can be created"),
    "prompts of terabytes": (config(num_tokens=2**40), "of another shape: .*prompts.0"),
    "a projection of terabytes": (config(projection_dim=2**40), "missing: projection.bias"),
    "half a character in a label": (
        text(lambda old: old.replace("LABEL_0", "\\ud800", 1)), "surrogates not allowed",
    ),
    "half a character in a name": (config(base_model_name_or_path="\ud800"), "surrogates not allowed"),
    "a list as precision": (fingerprint(precision=[]), "fingerprint of the backbone is not valid"),
    "a long name in the fingerprint": (fingerprint(tensors={"x" * 10**6: "1 2 3 4"}), "got no such tensor"),
    "a million values in the fingerprint": (fingerprint(tensors={"x": "1 " * 10**6}), "is not valid"),
    "a link out of the folder to the config": (linked(CONFIG, "../out.json"), "link out of it"),
    "a link out of the folder to the weights": (linked(WEIGHTS, "../out.bin"), "link out of it"),
    "a link to a device": (instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "lacks"),
    "a pipe": (instead(CONFIG, lambda path: os.mkfifo(path)), "lacks"),
    "a folder as file": (instead(WEIGHTS, lambda path: path.mkdir()), "lacks"),
    "a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({"prompts.0": 1})), "never opened"),
    "a class outside of the package": (config(model_class="os.system"), "model_class must be the name of a sup"),
    "a class without a declaration": (config(model_class="BertModel"), "model_class must be the name of a sup"),
    "a class of classes": (config(model_class="AutoModel"), "model_class must be the name of a supported class"),
    "code of its own": (config(auto_map={"AutoModel": "evil--Model"}), "no field auto_map"),
}  # fmt: skip
TRICKS |= {f"a tensor named {name[:20]!r}": (renamed(name), f"unexpected: |{NO_WEIGHTS}") for name in NASTY}
TRICKS |= {
    f"the type {dtype!r}": (entry(dtype=dtype), f"of another type|{NO_WEIGHTS}") for dtype in DTYPES if dtype != "F32"
}
WRONG: list[Any] = [None, -1, 0.5, "x", "", [], {}, [None], {"a": 1}, [[]], *HUGE]
FIELDS = sorted({
    *PromptConfig().to_dict(), "id2label", "label2id", "problem_type", "model_type", "model_class", "widths",
    "fingerprint",
})  # fmt: skip


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
    assert len(str(error.value)) < MAX_MESSAGE
    assert_unchanged(before, snapshot(model))


def test_tensors_are_read_only_if_their_names_and_shapes_match(
    vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vpt = vit.prompted(num_tokens=2)
    vpt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "prompts.0": torch.zeros(3, 24)}, tmp_path / WEIGHTS)
    monkeypatch.setattr(Weights, "tensors", lambda self: pytest.fail("tensors were read"))
    with pytest.raises(CheckpointError, match=r"of another shape: prompts\.0"):
        VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    with pytest.raises(CheckpointError, match=r"of another shape: prompts\.0"):
        vpt.load_adapter(tmp_path, "default")


def test_of_a_key_that_occurs_twice_the_last_value_counts(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted(num_tokens=2)
    vpt.save_pretrained(tmp_path)
    text(lambda old: '{"dropout": 0.5, "num_tokens": 9,' + old[1:])(tmp_path)
    header(lambda entries: render([(name, json.dumps(entries[name])) for name in (*entries, "prompts.1")]).encode())(
        tmp_path
    )
    loaded = VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    assert loaded.active_config == vpt.active_config.replace(inference_mode=True)
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(vpt))


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
            assert len(str(error)) < MAX_MESSAGE
            refused += 1
        else:
            said = vpt.active_config.to_dict() | vpt.adapters["default"].labels()
            is_default = field in ("inference_mode", "task_type", "modules_to_save", "fingerprint", "model_class")
            assert said.get(field) == wrong or is_default
            vpt.unload()
    assert refused >= len(WRONG) - 6
