"""Checks of rendered plots."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def assert_is_plot(file: Path) -> None:
    """The file is a PNG image of a plot and not blank."""
    with Image.open(file) as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
