"""Cached features: what the frozen layers below an adapter compute is computed once, and not in every epoch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .. import io
from ..errors import AdapterError, CheckpointError, UnsupportedModelError, safe_repr
from ..injection import FeatureEntry
from ..model import VPTModel
from ..model.cached_features import check_eval_mode, describe_entry, find_entry_layer
from ..model.modes import evaluating
from .draws import Draw, Draws, as_bytes
from .feature_folder import DIGEST, FEATURES, CachedFeatures, FeatureFolder, locked

FORMAT = 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = 1e-3  # of outputs from cached features, as a fraction of the largest value
ROUNDING = 2e-2  # of saved features, likewise: batches of other sizes, and bfloat16
CHECKED = -1  # the key of features that are being checked


def cache_features(
    vpt: VPTModel,
    dataset: Any,
    folder: str | os.PathLike[str],
    augmentations: int = 1,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float16,
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> CachedFeatures:
    """Computes what the layers below the active adapter make of images, once, for training with many epochs.

    Below the first layer that an adapter changes, a frozen backbone computes the same in every epoch. This writes its
    output to disk: the tokens that enter that layer, ``(num_tokens, width)`` for each image, or for an adapter that has
    only a head the features that enter it, ``(width,)``. The model takes a batch of the result in place of pixels,
    ``vpt(**batch)``, as does ``Trainer(vpt, train_dataset=cache_features(...), ...)``. With ``dtype=torch.float32``,
    outputs are equal to the bit to those of the same batch of pixel values, if the features were computed in batches of
    the same size (matrix products may round differently in others).

    Features that are in the folder already are used again, also those that an interrupted call has left. They cannot be
    stale: the folder names the backbone, by fingerprint and a hash of all weights but the head's, the layer and the
    settings. Each call reads all images once, compares a hash of their pixel values and labels, and computes the
    features of images that have changed, be it by the image processor. Several processes may call it together.

    Args:
        vpt: the model; the active adapter must leave the lower layers unchanged, such as by ``layers_to_transform``.
            An adapter that changes only later layers than this one may use the features too.
        dataset: has a length and items by index: dicts with ``pixel_values`` ``(num_channels, height, width)``, all of
            one size, and numbers or tensors such as ``labels``; or pairs of pixels and label.
        folder: for the features of this data set; created if it does not exist.
        augmentations: how many times each image is read, for data sets with random augmentation, see
            :class:`CachedFeatures`. Random numbers come from the default generators of torch, numpy and Python, which
            are seeded for each read, and restored.
        batch_size: of the forward passes.
        dtype: precision on disk; float16, bfloat16 or float32. A ViT-B/16 at 224 pixels takes 0.3 MB an image in
            float16.
        workers: processes that read images; 0: this one.
        seed: of the augmentations.
        progress: shows a progress bar.
        kwargs: of the forward call, such as ``interpolate_pos_encoding=True``; to be given with the features too.

    Raises:
        AdapterError: an argument is not valid, nothing can be cached for this adapter, or features are not finite in
            ``dtype``.
        CheckpointError: the folder has features of something else, or other files.
        UnsupportedModelError: the outputs from cached features differ from those from pixels.
    """
    vpt._check_loaded()
    _check_arguments(dataset, augmentations, batch_size, dtype, kwargs)
    layer = find_entry_layer(vpt._active, vpt.backbone)
    check_eval_mode(vpt.backbone)
    architecture = vpt.backbone.architecture
    draws = Draws(dataset, architecture.input_name, architecture.input_dims, seed)
    read = partial(_read, draws, batch_size, workers, progress)
    with locked(Path(folder)) as path, evaluating(vpt):
        first = draws[0]
        features = _compute(vpt, [first], layer, kwargs)
        entry = _make_entry(vpt, layer, first, features)
        _check_entry(vpt, entry, first, _join(features), kwargs)
        description = _describe(vpt, entry, len(dataset), augmentations, dtype, seed, kwargs)
        files = FeatureFolder.prepare(path, description, math.prod(entry.shape) * dtype.itemsize)
        stale = _find_stale(files, read)
        batches = read([row for rows in stale for row in rows], "Caching features")
        computed = (row for batch in batches for row in _make_rows(vpt, batch, layer, dtype, kwargs))
        for rows in stale:
            files.write(rows, list(islice(computed, len(rows))))
        _check_first_row(files, _join(features)[0].to(dtype))
    key = _hash(description)
    vpt._feature_entries[key] = entry
    return CachedFeatures(files, key)


def _check_arguments(
    dataset: Any, augmentations: object, batch_size: object, dtype: object, kwargs: Mapping[str, Any]
) -> None:
    for name, value in (("augmentations", augmentations), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError(f"{name} must be a whole number of at least 1, got {safe_repr(value)}.")
    if dtype not in DTYPES:
        raise AdapterError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {safe_repr(dtype)}.")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        raise AdapterError(
            f"dataset must have a length of at least 1 and items by index, got a {type(dataset).__name__}. Load it "
            "without streaming."
        )
    refused = [name for name in kwargs if name != "interpolate_pos_encoding"]
    if refused:
        raise AdapterError(
            f"cache_features() takes no {', '.join(refused)}, on which the features would depend. Leave it out."
        )


def _read(
    draws: Draws, batch_size: int, workers: int, progress: bool, rows: Sequence[int], title: str
) -> Iterator[list[Draw]]:
    """Batches of rows, with a progress bar."""
    loader: DataLoader[Draw] = DataLoader(
        Subset(draws, rows), batch_size, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    with tqdm(total=len(rows), desc=title, unit="image", leave=False, disable=not progress or not rows) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch))


def _find_stale(files: FeatureFolder, read: Callable[..., Iterator[list[Draw]]]) -> list[range]:
    """The shards that are missing, or have features of images that have changed since.

    If the first augmentation of all images is unchanged, so are the others.
    """
    saved = {rows: files.read_digests(rows) for rows in files.shards()}
    stale = {rows for rows, digests in saved.items() if digests is None}
    missing, total = set(stale), files.num_images * files.draws
    for part in (range(files.num_images), range(files.num_images, total)):
        present = [(rows, row) for rows in saved if rows not in missing for row in rows if row in part]
        images = chain.from_iterable(read([row for _, row in present], "Checking images"))
        for (rows, row), image in zip(present, images, strict=True):
            if not torch.equal(image.digest, cast(Tensor, saved[rows])[row - rows.start]):
                stale.add(rows)
        if stale == missing:
            break
    return sorted(stale, key=lambda rows: rows.start)


def _make_rows(
    vpt: VPTModel, batch: Sequence[Draw], layer: int | None, dtype: torch.dtype, kwargs: dict[str, Any]
) -> Iterator[dict[str, Tensor]]:
    """What is saved of each image of a batch."""
    features = _join(_compute(vpt, batch, layer, kwargs)).to(dtype).cpu()
    if not features.isfinite().all():
        raise AdapterError(
            f"Features must be finite in {dtype}, got NaN or infinite values. Use dtype=torch.float32 or bfloat16, and "
            "check the images."
        )
    for one, image in zip(features, batch, strict=True):
        yield {**image.fields, FEATURES: one, DIGEST: image.digest}


def _check_first_row(files: FeatureFolder, features: Tensor) -> None:
    """Raises CheckpointError if the saved features of the first image are not those that the model computes now."""
    saved = files.open_shard(next(files.shards()))[FEATURES][0]
    if not _is_close(saved, features.cpu(), ROUNDING):
        raise CheckpointError(
            f"The features in '{files.path}' are not those that the model computes, by an older version of a library "
            "or since a file was changed. Delete the folder to cache again."
        )


class _Recorded(Exception):  # noqa: N818  it is no error
    """All features of a batch are recorded."""


def _compute(vpt: VPTModel, draws: Sequence[Draw], layer: int | None, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The features of a batch in the precision of the model: the tokens that enter a layer, ``{"": (num_images,
    num_tokens, width)}``, or what enters the modules of the head, ``{path: (num_images, width)}``."""
    backbone, head = vpt.backbone, vpt._active.head
    paths = backbone.head.paths if layer is None else ("",)
    found: dict[str, Tensor] = {}

    def record(path: str, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[path] = (args[0] if args else next(iter(named.values()))).clone()
        if len(found) == len(paths):
            raise _Recorded  # what follows is not needed

    shapes = {tuple(draw.pixels.shape) for draw in draws}
    if len(shapes) > 1:
        raise AdapterError(f"All images must have one size, got {sorted(shapes)}. Resize them in the data set.")
    pixels = torch.stack([draw.pixels for draw in draws]).to(vpt.device, vpt.dtype)
    with ExitStack() as hooks, suppress(_Recorded):
        for path in paths:
            module = head.find(path) if layer is None else backbone.layers[layer].module
            assert module is not None
            handle = module.register_forward_pre_hook(partial(record, path), with_kwargs=True)
            hooks.callback(handle.remove)
        vpt(**{backbone.architecture.input_name: pixels}, **kwargs)
    return found


def _make_entry(vpt: VPTModel, layer: int | None, first: Draw, features: dict[str, Tensor]) -> FeatureEntry:
    joined = _join(features)
    if layer is None and joined.ndim != 2:
        raise AdapterError(
            f"The head of {type(vpt.backbone.original).__name__} must read one vector for each image, got features of "
            f"shape {tuple(joined.shape)}. Train it on pixel values."
        )
    return FeatureEntry(
        layer=layer,
        input_shape=tuple(first.pixels.shape),
        shape=tuple(joined.shape[1:]),
        widths={} if layer is not None else {path: value.shape[-1] for path, value in features.items()},
        pooling=vpt._active.config.pooling,
    )


def _join(features: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(features.values()), dim=-1)


def _check_entry(vpt: VPTModel, entry: FeatureEntry, first: Draw, features: Tensor, kwargs: dict[str, Any]) -> None:
    """Compares the outputs from the features of an image, in a batch of two, with those from its pixels.

    Raises:
        UnsupportedModelError: they differ: the model passes something else than tokens on to its upper layers.
    """
    name = type(vpt.backbone.original).__name__
    pixels = torch.stack([first.pixels] * 2).to(vpt.device, vpt.dtype)
    expected = vpt(**{vpt.backbone.architecture.input_name: pixels}, **kwargs)
    vpt._feature_entries[CHECKED] = entry
    try:
        for _ in range(2):  # the first time, the entry learns what the skipped layers return
            found = vpt(cached_features=torch.cat([features] * 2), cache_key=CHECKED, **kwargs)
    except (RuntimeError, IndexError, TypeError) as error:
        raise UnsupportedModelError(
            f"Features cannot be cached for {name}, whose upper layers need more than tokens: {error}. Train it on "
            "pixel values."
        ) from error
    finally:
        del vpt._feature_entries[CHECKED]
    others = dict(_tensors(found))
    for key, value in _tensors(expected):
        if key not in others or not _is_close(others[key], value):
            raise UnsupportedModelError(
                f"Features cannot be cached in front of {describe_entry(entry.layer, entry.pooling)} of {name}: its "
                f"{key} would differ from that of pixel values. Train it on pixel values."
            )


def _tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output, by name."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping | tuple | list):
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        for key, value in items:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _is_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().abs().max())


def _describe(
    vpt: VPTModel,
    entry: FeatureEntry,
    num_images: int,
    augmentations: int,
    dtype: torch.dtype,
    seed: int,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """All that the features depend on besides the images."""
    device = vpt.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return {
        "format": FORMAT,
        "model": type(vpt.backbone.original).__name__,
        "backbone": io.take_fingerprint(vpt.backbone).to_dict(),
        "weights": _hash_weights(vpt),
        "in front of": describe_entry(entry.layer, entry.pooling),
        "image size": list(entry.input_shape),
        "features": list(entry.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": str(autocast).removeprefix("torch."),
        "images": num_images,
        "augmentations": augmentations,
        "seed": seed,
        "arguments": kwargs,
    }


def _hash_weights(vpt: VPTModel) -> str:
    """Hash of all parameters and buffers of the backbone without its head."""
    model, heads = vpt.backbone.model, tuple(f"{path}." for path in vpt.backbone.head.paths)
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, DTensor):
            raise AdapterError("The backbone must be whole, got sharded weights. Cache features before FSDP shards it.")
        if not name.startswith(heads or "\0"):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(as_bytes(tensor))
    return found.hexdigest()


def _hash(description: dict[str, Any]) -> int:
    """The key of a cache, a positive number of 64 bits with sign."""
    text = json.dumps(description, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
