"""Files that ``torch.save`` wrote: tensors and arrays come back, anything else is refused and never run."""

from __future__ import annotations

import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import serialization

from vpt_peft import CheckpointError
from vpt_peft.pth import read_tensors

FUZZ = 200  # mutated files of each kind; 3,000 found nothing else


def saved(values: Any, path: Path) -> Path:
    torch.save(values, path)
    return path


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["prompt", "beside"])
def test_a_malicious_pickle_is_refused_and_not_run(place: str, legacy: bool, tmp_path: Path) -> None:
    trap, sprung = Trap(tmp_path / "sprung"), tmp_path / "sprung"
    model = {"shallow_prompt": trap} if place == "prompt" else {"model": {"head.bias": torch.ones(7)}, "args": trap}
    torch.save(model, tmp_path / "prompt_ep1.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        read_tensors(tmp_path / "prompt_ep1.pth")
    assert not sprung.exists()
    torch.load(tmp_path / "prompt_ep1.pth", weights_only=False)
    assert sprung.exists()  # it was a real one


def test_what_a_refused_file_asks_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"asks for .*eval"):
        read_tensors(saved({"shallow_prompt": Trap(tmp_path)}, tmp_path / "file.pth"))


def test_what_the_program_allows_elsewhere_is_refused_here_and_still_allowed_afterwards(tmp_path: Path) -> None:
    with serialization.safe_globals([eval]):
        before = set(serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match="asks for"):
            read_tensors(saved({"shallow_prompt": Trap(tmp_path / "sprung")}, tmp_path / "file.pth"))
        assert set(serialization.get_safe_globals()) == before
    assert not (tmp_path / "sprung").exists()


def test_arrays_are_read_as_numpy_wrote_them(tmp_path: Path) -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    arrays = {
        "single": values.numpy(),
        "double": values.double().numpy(),
        "half": values.half().numpy(),
        "fortran": values.numpy().copy(order="F"),
        "strided": values.numpy()[:, ::2],
    }
    read = read_tensors(saved(arrays, tmp_path / "arrays.pth"))
    for name, array in arrays.items():
        assert torch.equal(read[name], torch.from_numpy(array.copy())), name


def test_arrays_of_older_numpys_are_read(tmp_path: Path) -> None:
    """numpy 1 named its module otherwise."""
    torch.save({"prompt": torch.ones(2, 3).numpy()}, tmp_path / "new.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "new.pth").read_bytes()
    names = b"numpy._core.multiarray", b"numpy.core.multiarray"
    other = data.replace(*names) if names[0] in data else data.replace(*reversed(names))
    assert other != data
    (tmp_path / "old.pth").write_bytes(other)
    assert torch.equal(read_tensors(tmp_path / "old.pth")["prompt"], torch.ones(2, 3))


@pytest.mark.parametrize("code", ["i4", "?", "O", "U3", ">f4", "f4,f4"])
def test_arrays_of_anything_but_floats_are_refused(code: str, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(CheckpointError):
        read_tensors(saved({"shallow_prompt": numpy.zeros((1, 5, 24), code)}, tmp_path / "file.pth"))


RECURSIVE: dict[str, Any] = {}
RECURSIVE["model"] = RECURSIVE["state_dict"] = RECURSIVE

ODD: dict[str, Any] = {
    "nothing": {},
    "itself": RECURSIVE,
    "a list": [torch.ones(3)],
    "a tensor": torch.ones(3),
    "numbers as names": {0: torch.ones(3)},
    "an integer": {"shallow_prompt": 3},
    "a dict inside": {"shallow_prompt": {"x": torch.ones(3)}},
    "a sparse tensor": {"shallow_prompt": torch.ones(3, 3).to_sparse()},
    "a tensor without data": {"shallow_prompt": torch.ones(3, device="meta")},
    "a tensor larger than the file": {"shallow_prompt": torch.ones(1, 1, 1).expand(1, 10**9, 10**6)},
}


@pytest.mark.parametrize("kind", ODD)
def test_anything_but_a_dict_of_dense_tensors_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must hold"):
        read_tensors(saved(ODD[kind], tmp_path / "file.pth"))


def test_attributes_in_front_of_methods_do_no_harm(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    tensor.isfinite = tensor.detach = "no method"  # type: ignore[assignment]
    read = read_tensors(saved(Odd(prompt=tensor), tmp_path / "file.pth"))
    assert read["prompt"].isfinite().all()


class Odd(OrderedDict):
    """Unpickled, it is an OrderedDict with attributes that hide its methods."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), dict.fromkeys(("items", "keys", "get"), "no method"), None, iter(self.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_and_missing_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(path)
    whole = saved({"prompt": torch.ones(5, 24).numpy()}, tmp_path / "whole.pth").read_bytes()
    for data in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[100:], b"\x80\x02."):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="must hold"):
            read_tensors(path)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused_unopened(tmp_path: Path) -> None:
    plain = saved({"prompt": torch.zeros(10**6)}, tmp_path / "plain.pth")
    assert read_tensors(plain)["prompt"].shape == (10**6,)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    assert torch.load(tmp_path / "bomb.pth")["prompt"].shape == (10**6,)  # torch would unpack it
    with pytest.raises(CheckpointError, match=r"uncompressed, got an archive of .* that unpacks to 4,"):
        read_tensors(tmp_path / "bomb.pth")
    (tmp_path / "bomb.pth").write_bytes(plain.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"must hold .* damaged"):
        read_tensors(tmp_path / "bomb.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_with_changed_bytes_gives_tensors_or_a_checkpoint_error(legacy: bool, tmp_path: Path) -> None:
    path, chance = tmp_path / "file.pth", random.Random(0)
    values = {"array": torch.ones(2, 3).numpy(), "tensor": torch.ones(3, 2)}
    torch.save(values, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for _ in range(FUZZ):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            tensors = read_tensors(path)
        except CheckpointError:
            continue
        assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
