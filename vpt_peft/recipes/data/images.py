"""Checks of image files before training, by several processes. Without torch, which they do not need."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from ...errors import ImageError
from ...images.files import check_mode, open_image
from ..errors import RecipeError

MAX_LISTED = 5
FILES_PER_PROCESS = 2000  # starting a process takes as long as reading some thousand headers
MAX_PROCESSES = 8
END_OF_JPEG = b"\xff\xd9"

T = TypeVar("T")


def check_image(file: str) -> None:
    """Checks that an image file can be used and is not cut off.

    PNG files are verified by their checksums, WebP files by their size, and JPEGs by the marker at their end, without
    decoding pixels. All others are decoded, also JPEGs with something behind that marker.

    Raises:
        ImageError: names the file.
    """
    with open_image(file) as image:
        check_mode(image)
        image.verify()
        is_complete = image.format in ("PNG", "WEBP") or (image.format in ("JPEG", "MPO") and _has_end(file))
    if not is_complete:
        with open_image(file) as image:
            image.load()


def _has_end(file: str) -> bool:
    with open(file, "rb") as stream:
        stream.seek(-len(END_OF_JPEG), os.SEEK_END)
        return stream.read() == END_OF_JPEG


def check_all(check: Callable[[str], T], files: Sequence[str], title: str) -> list[T]:
    """Calls ``check`` for each file, in several processes where there are many, with a progress bar.

    Args:
        check: a function of a module; raises ImageError for a file that cannot be used.

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
    except ImageError as error:
        return None, str(error)
