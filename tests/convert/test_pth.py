"""Files written by ``torch.save``: tensors and arrays are read, anything else raises an error and is not executed."""

from __future__ import annotations

import copy
import io
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import pack, pack_into, unpack_from
from typing import Any

import pytest
import torch
from helpers.pickles import MaliciousPickle, save
from torch import serialization

from vpt_peft import CheckpointError
from vpt_peft.convert.pth import SAFE_GLOBALS, read_tensors

NUM_MUTATIONS = 200  # mutated files of each format


# -- pickles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["prompt", "beside"])
def test_a_malicious_pickle_raises_and_is_not_executed(place: str, legacy: bool, tmp_path: Path) -> None:
    created = tmp_path / "created"
    malicious = MaliciousPickle(created)
    inside = {"shallow_prompt": malicious}
    beside = {"model": {"head.bias": torch.ones(7)}, "args": malicious}
    file = tmp_path / "prompt_ep1.pth"
    torch.save(inside if place == "prompt" else beside, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="No code in it was run"):
        read_tensors(file)
    assert not created.exists()
    torch.load(file, weights_only=False)
    assert created.exists()  # the pickle does execute code


def test_the_error_names_the_functions_that_a_file_references(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"references .*eval"):
        read_tensors(save({"shallow_prompt": MaliciousPickle(tmp_path)}, tmp_path / "file.pth"))


def test_safe_globals_of_the_program_are_not_allowed_here_and_restored_afterwards(tmp_path: Path) -> None:
    with serialization.safe_globals([eval]):
        before = set(serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match="references"):
            read_tensors(save({"shallow_prompt": MaliciousPickle(tmp_path / "created")}, tmp_path / "file.pth"))
        assert set(serialization.get_safe_globals()) == before
        assert before.isdisjoint(SAFE_GLOBALS)
    assert not (tmp_path / "created").exists()


def test_safe_globals_that_are_added_while_a_file_is_read_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may import a module that adds some."""
    load = torch.load

    def add_and_load(*arguments: Any, **options: Any) -> Any:
        serialization.add_safe_globals([MaliciousPickle])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", add_and_load)
    before = set(serialization.get_safe_globals())
    try:
        read_tensors(save({"prompt": torch.ones(3)}, tmp_path / "file.pth"))
        assert set(serialization.get_safe_globals()) == before | {MaliciousPickle}
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(list(before))


class OrderedDictWithAttributes(OrderedDict):
    """It is unpickled as an OrderedDict with instance attributes that hide its methods."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), dict.fromkeys(("items", "keys", "get"), "no method"), None, iter(self.items())


def test_instance_attributes_that_hide_methods_are_ignored(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    tensor.isfinite = tensor.detach = "no method"  # type: ignore[assignment]
    tensors = read_tensors(save(OrderedDictWithAttributes(prompt=tensor), tmp_path / "file.pth"))
    assert tensors["prompt"].isfinite().all()


# -- arrays and tensors ------------------------------------------------------------------------------------------------


def test_arrays_are_read_with_their_values_shapes_and_dtypes(tmp_path: Path) -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    arrays = {
        "single": values.numpy(),
        "double": values.double().numpy(),
        "half": values.half().numpy(),
        "fortran": values.numpy().copy(order="F"),
        "strided": values.numpy()[:, ::2],
    }
    tensors = read_tensors(save(arrays, tmp_path / "arrays.pth"))
    for name, array in arrays.items():
        expected = torch.from_numpy(array.copy())
        assert tensors[name].dtype == expected.dtype and torch.equal(tensors[name], expected), name


def test_arrays_written_with_numpy_1_and_numpy_2_are_read(tmp_path: Path) -> None:
    torch.save({"prompt": torch.ones(2, 3).numpy()}, tmp_path / "this.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "this.pth").read_bytes()
    names = b"numpy._core.multiarray", b"numpy.core.multiarray"
    other = data.replace(*names) if names[0] in data else data.replace(*reversed(names))
    assert other != data
    (tmp_path / "other.pth").write_bytes(other)
    for name in ("this.pth", "other.pth"):
        assert torch.equal(read_tensors(tmp_path / name)["prompt"], torch.ones(2, 3))


@pytest.mark.parametrize("dtype", ["i4", "?", "O", "U3", ">f4", "f4,f4"])
def test_arrays_of_other_types_than_floats_raise(dtype: str, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(CheckpointError):
        read_tensors(save({"shallow_prompt": numpy.zeros((1, 5, 24), dtype)}, tmp_path / "file.pth"))


RECURSIVE: dict[str, Any] = {}
RECURSIVE["model"] = RECURSIVE["state_dict"] = RECURSIVE

INVALID: dict[str, Callable[[], Any]] = {
    "empty": lambda: {},
    "recursive": lambda: RECURSIVE,
    "a list": lambda: [torch.ones(3)],
    "a tensor": lambda: torch.ones(3),
    "keys that are numbers": lambda: {0: torch.ones(3)},
    "an integer": lambda: {"shallow_prompt": 3},
    "a dict inside": lambda: {"shallow_prompt": {"x": torch.ones(3)}},
    "a sparse tensor": lambda: {"shallow_prompt": torch.ones(3, 3).to_sparse()},
    "a nested tensor": lambda: {"shallow_prompt": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    "a quantized tensor": lambda: {"shallow_prompt": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    "a tensor without data": lambda: {"shallow_prompt": torch.ones(3, device="meta")},
    "a tensor larger than the file": lambda: {"shallow_prompt": torch.ones(1, 1, 1).expand(1, 10**9, 10**6)},
}


@pytest.mark.filterwarnings("ignore:.*(nested|quantize|TypedStorage)")
@pytest.mark.parametrize("kind", INVALID)
def test_anything_but_a_dict_of_dense_tensors_raises(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must contain"):
        read_tensors(save(INVALID[kind](), tmp_path / "file.pth"))


# -- damaged and oversized files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_and_missing_files_raise(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(path)
    whole = save({"prompt": torch.ones(5, 24).numpy()}, tmp_path / "whole.pth").read_bytes()
    for data in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[100:], b"\x80\x02."):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"must (contain|be an archive)"):
            read_tensors(path)


@dataclass
class Archive:
    """The parts of a zip archive.

    Attributes:
        members: the contents of its files.
        directory: the entries of its files.
        count: number of entries.
    """

    members: bytes
    directory: bytes
    count: int

    def end64(self, offset: int) -> bytes:
        """The record with the directory's size and offset."""
        size = len(self.directory)
        return pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, self.count, self.count, size, offset)

    def join(self) -> bytes:
        """The archive, laid out as by ``torch.save``."""
        offset, position = len(self.members), len(self.members) + len(self.directory)
        return self.members + self.directory + self.end64(offset) + locator(position) + END

    def harmless_directory(self) -> bytes:
        """The directory with all sizes 0."""
        directory = bytearray(self.directory)
        for start in self.entries():
            pack_into("<L", directory, start + 24, 0)
        return bytes(directory)

    def add_comment(self, comment: bytes) -> None:
        """Appends a comment to the last entry of the directory."""
        directory = bytearray(self.directory)
        pack_into("<H", directory, list(self.entries())[-1] + 32, len(comment))
        self.directory = bytes(directory) + comment

    def entries(self) -> Iterator[int]:
        """The offsets of the entries in the directory."""
        start = 0
        for _ in range(self.count):
            yield start
            start += 46 + sum(unpack_from("<3H", self.directory, start + 28))


END = pack("<4s4H2LH", b"PK\5\6", *4 * [0xFFFF], *2 * [0xFFFFFFFF], 0)


def locator(position: int) -> bytes:
    """The record with the position of the one above."""
    return pack("<4sIQI", b"PK\6\7", 0, position, 1)


def split(archive: zipfile.ZipFile, buffer: io.BytesIO) -> Archive:
    """Closes an archive that was written to a buffer, and splits it."""
    archive.close()
    count, size, offset = unpack_from("<H2L", buffer.getvalue(), len(buffer.getvalue()) - 12)
    return Archive(buffer.getvalue()[:offset], buffer.getvalue()[offset : offset + size], count)


def rewrite(source: zipfile.ZipFile, compression: int = zipfile.ZIP_STORED) -> tuple[zipfile.ZipFile, io.BytesIO]:
    buffer = io.BytesIO()
    archive = zipfile.ZipFile(buffer, "w", compression)
    for name in source.namelist():
        archive.writestr(name, source.read(name))
    return archive, buffer


def uncompressed(source: zipfile.ZipFile) -> bytes:
    return split(*rewrite(source)).join()


def compressed(source: zipfile.ZipFile) -> bytes:
    return split(*rewrite(source, zipfile.ZIP_DEFLATED)).join()


def overlapping(source: zipfile.ZipFile) -> bytes:
    """An uncompressed archive in which the members of all tensors are the same bytes."""
    storages = [name for name in source.namelist() if "/data/" in name]
    buffer = io.BytesIO()
    archive = zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED)
    for name in source.namelist():
        if name not in storages[1:]:
            archive.writestr(name, source.read(name))
    for name in storages[1:]:
        member = copy.copy(archive.getinfo(storages[0]))
        member.filename = name
        archive.filelist.append(member)
    return split(archive, buffer).join()


def mis_sized(source: zipfile.ZipFile) -> bytes:
    """An uncompressed archive with a size of 1 TB for one member in its directory."""
    archive, buffer = rewrite(source)
    archive.getinfo(source.namelist()[-1]).file_size = 10**12
    return split(archive, buffer).join()


def hidden_by_offset(source: zipfile.ZipFile) -> bytes:
    """A compressed archive with its directory at the given offset, and a harmless one where zipfile looks for it."""
    archive = split(*rewrite(source, zipfile.ZIP_DEFLATED))
    start = archive.members + archive.directory + archive.harmless_directory()
    return start + archive.end64(len(archive.members)) + locator(len(start)) + END


def hidden_by_position(source: zipfile.ZipFile, is_harmless: bool = True) -> bytes:
    """The same with two records of an offset, of which torch uses the first, and zipfile (before 2025) the second."""
    archive = split(*rewrite(source, zipfile.ZIP_DEFLATED))
    offset, position = len(archive.members), len(archive.members) + len(archive.directory)
    first = archive.members + archive.directory + archive.end64(offset)
    second = archive.harmless_directory() + archive.end64(len(first) if is_harmless else offset)
    return first + second + locator(position) + END


def hidden_by_position_and_offset(source: zipfile.ZipFile) -> bytes:
    return hidden_by_position(source, is_harmless=False)


def hidden_in_the_original_format(source: zipfile.ZipFile) -> bytes:
    """The same without ZIP64; a comment in the directory holds its numbers."""
    archive = split(*rewrite(source, zipfile.ZIP_DEFLATED))
    size, comment_size = len(archive.directory), len(archive.end64(0)) + len(locator(0))
    position = len(archive.members) + 2 * size + comment_size
    archive.add_comment((archive.end64(position - size) + locator(position)).replace(b"PK", b"KP"))
    offset = len(archive.members)
    end = pack("<4s4H2LH", b"PK\5\6", 0, 0, archive.count, archive.count, size + comment_size, offset, 0)
    return archive.members + archive.directory + archive.harmless_directory() + end


OVERSIZED: dict[Callable[[zipfile.ZipFile], bytes], str] = {
    compressed: r"bytes that unpack to [\d,]+\. Nothing was unpacked",
    overlapping: r"bytes that unpack to [\d,]+\. Nothing was unpacked",
    mis_sized: r"bytes that unpack to 1,000,[\d,]+\. Nothing was unpacked",
    hidden_by_offset: "directory is damaged",
    hidden_by_position: "directory is damaged",
    hidden_by_position_and_offset: "directory is damaged",
    hidden_in_the_original_format: "directory is damaged",
}


@pytest.mark.parametrize("write", OVERSIZED)
def test_an_archive_that_unpacks_to_more_than_its_size_raises_before_anything_is_unpacked(
    write: Callable[[zipfile.ZipFile], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {f"prompt{number}": torch.zeros(10**5) for number in range(10)}
    plain, oversized = save(values, tmp_path / "plain.pth"), tmp_path / "oversized.pth"
    with zipfile.ZipFile(plain) as source:
        oversized.write_bytes(uncompressed(source))
        assert len(read_tensors(oversized)) == 10
        oversized.write_bytes(write(source))
    if write is not mis_sized:  # torch itself reads the archive, which takes many times its size in memory
        assert sum(tensor.nbytes for tensor in torch.load(oversized).values()) > 9 * oversized.stat().st_size
    for owner, name in ((torch, "load"), (zipfile.ZipFile, "open"), (serialization, "_open_zipfile_reader")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("the archive was unpacked"))
    with pytest.raises(CheckpointError, match=OVERSIZED[write]):
        read_tensors(oversized)


def test_a_truncated_archive_raises(tmp_path: Path) -> None:
    file = save({"prompt": torch.zeros(10**4)}, tmp_path / "file.pth")
    for size in (1000, 4):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="directory is damaged"):
            read_tensors(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_with_random_bytes_changed_gives_tensors_or_a_checkpoint_error(legacy: bool, tmp_path: Path) -> None:
    path, generator = tmp_path / "file.pth", random.Random(0)
    values = {"array": torch.ones(2, 3).numpy(), "tensor": torch.ones(3, 2)}
    torch.save(values, path, _use_new_zipfile_serialization=not legacy)
    original = path.read_bytes()
    for _ in range(NUM_MUTATIONS):
        data = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            tensors = read_tensors(path)
        except CheckpointError:
            continue
        assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
