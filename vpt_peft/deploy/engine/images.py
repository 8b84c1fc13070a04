"""Images of requests, and the image processors that make ``pixel_values`` of them."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ... import hub
from ...adapter import Adapter
from ...errors import CheckpointError, ImageError, safe_repr
from ...images.processors import border_settings, read_processor
from ...model import VPTModel


def read_image(image: Any, num_channels: int) -> Any:
    """A copy of an image, decoded: later changes of it, or closing its file, make no difference.

    Args:
        image: a PIL image, or ``pixel_values`` of one image, ``(num_channels, height, width)``.
        num_channels: of the backbone.

    Returns:
        A PIL image, turned as its EXIF data say, in RGB or, for backbones with one channel, in grey; or a tensor.

    Raises:
        ImageError: it cannot be decoded, or is something else.
    """
    if isinstance(image, Tensor):
        _check_tensor(image, num_channels)
        return image.detach().clone()
    if not hasattr(image, "convert"):
        raise ImageError(
            f"Expected a PIL image or a tensor (num_channels, height, width), got {type(image).__name__}. Open "
            "files by PIL.Image.open."
        )
    from ...images.files import to_rgb  # here, since tensors need no Pillow

    try:
        rgb = to_rgb(image)
        return rgb.convert("L") if num_channels == 1 else rgb
    except ImageError as error:
        raise ImageError(f"The image cannot be used: {error}.") from error
    except Exception as error:  # decoders raise errors of many kinds
        raise ImageError(f"The image cannot be decoded: {safe_repr(str(error))}.") from error


def _check_tensor(image: Tensor, num_channels: int) -> None:
    if image.ndim != 3 or image.shape[0] != num_channels or not image.is_floating_point() or image.numel() == 0:
        raise ImageError(
            f"Expected the pixel_values of one image, floating-point numbers ({num_channels}, height, width), got a "
            f"tensor of {image.dtype} and shape {tuple(image.shape)}. Give a PIL image to have it processed."
        )
    if not image.isfinite().all():
        raise ImageError("The pixel_values of an image must be finite, got NaN or infinity.")


class ImageProcessors:
    """The image processors of adapters and of their backbone. Adapters with equal ones share one object.

    Args:
        vpt: the model.
        image_processor: the backbone's, or its folder or repository; None: that of the backbone's own folder or
            repository.
        hub_options: ``token``, ``cache_dir`` and ``local_files_only``.
    """

    def __init__(self, vpt: VPTModel, image_processor: Any, hub_options: dict[str, Any]) -> None:
        self.vpt, self.given, self.hub_options = vpt, image_processor, hub_options
        self.lock = Lock()
        self.loaded: WeakValueDictionary[Any, Any] = WeakValueDictionary()

    def load(self, content: bytes | None, adapter: Adapter) -> Any:
        """The image processor of an adapter.

        Args:
            content: of the file that was saved with it; None: the adapter has none, and the backbone's is used.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        if content is None and not isinstance(self.given, str | os.PathLike | None):
            return self.given
        options = border_settings(adapter)
        key = content, adapter.image_size if options else None
        with self.lock:
            processor = self.loaded.get(key)
            if processor is None:
                processor = self._load_backbones(options) if content is None else _from_content(content, options)
                self.loaded[key] = processor
            return processor

    def _load_backbones(self, options: dict[str, Any]) -> Any:
        name = self.vpt.name_or_path if self.given is None else os.fspath(self.given)
        revision = getattr(self.vpt.config, "_commit_hash", None) if self.given is None else None
        try:
            return read_processor(name, revision=revision, **self.hub_options, **options)
        except (OSError, ValueError) as error:  # transformers turns the Hub client's errors into these
            raise CheckpointError(
                "The adapter was saved without an image processor, and none can be loaded from the backbone's "
                f"{safe_repr(name)}: {error}. Pass image_processor=..., an object, a folder or a repository."
            ) from error


def _from_content(content: bytes, options: dict[str, Any]) -> Any:
    with TemporaryDirectory() as folder:
        (Path(folder) / hub.PREPROCESSOR_NAME).write_bytes(content)
        try:
            return read_processor(folder, **options)
        except ImportError:
            raise
        except Exception as error:  # values that are not valid raise errors of many kinds
            raise CheckpointError(
                f"The image processor of the adapter ({hub.PREPROCESSOR_NAME}) cannot be loaded: {error}"
            ) from error


def process_image(processor: Any, image: Any, num_channels: int) -> Tensor:
    """``pixel_values`` of a PIL image, ``(num_channels, height, width)``.

    Raises:
        ImageError: the image processor cannot take the image.
    """
    try:
        pixel_values = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    except Exception as error:  # image processors raise errors of many kinds
        raise ImageError(f"The image processor cannot take the image: {safe_repr(str(error))}.") from error
    pixel_values = pixel_values[0]
    _check_tensor(pixel_values, num_channels)
    return pixel_values
