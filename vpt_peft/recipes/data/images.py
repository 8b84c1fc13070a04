"""Image files: their checks before training, and their conversion to RGB. Without torch, which workers do not need."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from ..errors import RecipeError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_LISTED = 5
FILES_PER_PROCESS = 2000  # starting a process takes as long as reading some thousand headers
MAX_PROCESSES = 8

T = TypeVar("T")


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of a supported image format."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image with 8 bits per channel, rotated according to its EXIF orientation.

    Gray, palette and CMYK images are converted; alpha channels are dropped, as by transformers' pipelines.

    Raises:
        RecipeError: the image has more than 8 bits per channel.
    """
    check_mode(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return ImageOps.exif_transpose(image).convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raises RecipeError for more than 8 bits per channel: PIL would clip values above 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise RecipeError(
            f"images must have 8 bits per channel, got mode {image.mode}; convert them, scaled by the range of their "
            "values"
        )


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1: upright."""
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Adds the name of an image to errors raised while it is read.

    Raises:
        RecipeError: the image cannot be read or used.
    """
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{name} cannot be read as an image ({error}). Repair or remove it.") from error
    except RecipeError as error:
        raise RecipeError(f"{name} cannot be used: {error}.") from error


@contextmanager
def open_image(file: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file; errors name it, see :func:`image_errors`."""
    with image_errors(f"'{os.fspath(file)}'"), Image.open(file) as image:
        yield image


def check_image(file: str) -> None:
    """Checks the header of an image file, and what the format lets check without decoding pixels."""
    with open_image(file) as image:
        check_mode(image)
        image.verify()


def check_all(check: Callable[[str], T], files: Sequence[str], title: str) -> list[T]:
    """Calls ``check`` for each file, in several processes where there are many, with a progress bar.

    Args:
        check: a function of a module; raises RecipeError for a file that cannot be used.

    Returns:
        The results, in order.

    Raises:
        RecipeError: lists the files that cannot be used.
    """
    processes = min(MAX_PROCESSES, os.cpu_count() or 1, len(files) // FILES_PER_PROCESS)
    bar = tqdm(total=len(files), desc=title, unit="file", leave=False)
    results: list[T] = []
    problems: list[str] = []
    with bar:
        for result, problem in _outcomes(check, files, processes):
            bar.update()
            if problem is None:
                results.append(result)  # type: ignore[arg-type]  # there is one
            else:
                problems.append(problem)
    if problems:
        number = f"{len(problems)} of {len(files)} files: " if len(problems) > 1 else ""
        more = f" And {len(problems) - MAX_LISTED:,} more." if len(problems) > MAX_LISTED else ""
        raise RecipeError(number + " ".join(problems[:MAX_LISTED]) + more)
    return results


def _outcomes(check: Callable[[str], T], files: Sequence[str], processes: int) -> Iterator[tuple[T | None, str | None]]:
    """Result or problem of each file."""
    calls = ((check, file) for file in files)
    if processes < 2:
        yield from map(_outcome, calls)
        return
    # Not forked: torch has threads.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_outcome, calls, chunksize=64)


def _outcome(call: tuple[Callable[[str], T], str]) -> tuple[T | None, str | None]:
    check, file = call
    try:
        return check(file), None
    except RecipeError as error:
        return None, str(error)
