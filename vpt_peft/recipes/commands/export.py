"""``vpt-peft export``: an adapter and its backbone as a file that runs without vpt-peft."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ...deploy import export_adapter
from ..errors import RecipeError
from ..runtime import silence_transformers


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    image_size = _image_size(args.image_size)
    silence_transformers()
    export_adapter(
        args.adapter,
        args.file,
        further_adapters=args.adapters,
        normalize=args.normalize,
        revision=args.revision,
        dtype=args.dtype,
        probabilities=args.probabilities,
        batch_size=args.batch_size,
        image_size=image_size,
        int8=args.int8,
        compile=args.compile,
        tolerance=args.tolerance,
    )


def _image_size(given: Sequence[int | str] | None) -> Any:
    """``image_size`` of :func:`~vpt_peft.export`.

    Raises:
        RecipeError: it is neither "any" nor height and width.
    """
    if given is None:
        return None
    if list(given) == ["any"]:
        return "any"
    if len(given) == 2 and "any" not in given:
        return tuple(given)
    raise RecipeError(
        f"--image-size must be height and width in pixels, or any, got {' '.join(map(str, given))}. For example: "
        "--image-size 224 224."
    )
