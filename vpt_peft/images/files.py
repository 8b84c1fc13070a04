"""Image files: whether they can be read, and their conversion to RGB. Without torch, which workers do not need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from ..errors import ImageError, VPTError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # not EPS, whose files are programs
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of a supported image format."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Adds the name of an image to errors raised while it is read.

    Raises:
        ImageError: the image cannot be read or used.
    """
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError):  # the first names the file; the others are not the image's
        raise
    except ImageError as error:
        raise ImageError(f"{name} cannot be used: {error}.") from error
    except VPTError:
        raise
    except Exception as error:  # decoders raise errors of many kinds
        raise ImageError(f"{name} cannot be read as an image ({error}). Repair or remove it.") from error


@contextmanager
def open_image(file: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file; errors name it, see :func:`image_errors`."""
    with image_errors(f"'{os.fspath(file)}'"), Image.open(file) as image:
        yield image


def read_image(file: str | os.PathLike[str]) -> Image.Image:
    """The image in a file, by :func:`to_rgb`; errors name it, see :func:`image_errors`."""
    with open_image(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image with 8 bits per channel, rotated according to its EXIF orientation.

    Gray, palette and CMYK images are converted; alpha channels are dropped, as by transformers' pipelines.

    Raises:
        ImageError: the image has more than 8 bits per channel.
    """
    check_mode(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return ImageOps.exif_transpose(image).convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raises ImageError for more than 8 bits per channel: PIL would clip values above 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ImageError(
            f"images must have 8 bits per channel, got mode {image.mode}; convert them, scaled by the range of their "
            "values"
        )


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1: upright."""
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))
