"""Images of strangers: decoded only if their header says that they are small enough."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from ...errors import ImageError
from ...images.files import FORMATS, to_rgb
from .errors import RequestError


def open_image(file: BinaryIO, max_pixels: int) -> Image.Image:
    """The first image in a file, of which only the header is read.

    Args:
        file: an image file; its first bytes tell the format, not its name or type.
        max_pixels: height times width.

    Raises:
        RequestError: it is no image, damaged or too large.
    """
    with _told(max_pixels):
        image = Image.open(file, formats=FORMATS)
        _check_size(image, max_pixels)
        return image


def decode_image(image: Image.Image, max_pixels: int) -> Image.Image:
    """An opened image, decoded, in RGB and upright.

    Raises:
        RequestError: it is damaged, too large or has more than 8 bits per channel.
    """
    with _told(max_pixels):
        image.load()
        _check_size(image, max_pixels)  # the header is not the last word in each format
        return to_rgb(image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _too_large(max_pixels)


def _too_large(max_pixels: int) -> RequestError:
    return RequestError(413, "image_too_large", f"The image must have at most {max_pixels:,} pixels, got more.")


@contextmanager
def _told(max_pixels: int) -> Iterator[None]:
    """Turns errors of decoding into what a client is told."""
    try:
        yield
    except RequestError:
        raise
    except ImageError as error:
        raise RequestError(422, "invalid_image", f"The image cannot be used: {error}.") from error
    except UnidentifiedImageError as error:
        raise RequestError(
            422, "invalid_image", f"The image must be a file in one of the formats {', '.join(FORMATS)}."
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(max_pixels) from error
    except Exception as error:  # PIL raises errors of many kinds for damaged files
        raise RequestError(
            422, "invalid_image", "The image cannot be decoded: the file is damaged or cut off."
        ) from error


class PixelBudget:
    """Bounds the pixels in memory at one time: images wait for their turn, first come, first served.

    Args:
        pixels: at least those of the largest image.
    """

    def __init__(self, pixels: int) -> None:
        self.free = pixels
        self.turn = asyncio.Lock()
        self.released = asyncio.Event()

    @asynccontextmanager
    async def take(self, pixels: int) -> AsyncIterator[None]:
        """Holds a number of pixels, when there are as many left."""
        async with self.turn:
            while self.free < pixels:
                self.released.clear()
                await self.released.wait()
            self.free -= pixels
        try:
            yield
        finally:
            self.free += pixels
            self.released.set()
