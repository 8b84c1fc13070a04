"""draw_explanation: the picture of an explanation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import AdapterError, safe_repr
from .attention import Explanation
from .recorder import LayerAttention

if TYPE_CHECKING:
    from PIL.Image import Image

ORANGE, GREY, DARK, LIGHT = "#d9822b", "#6b7178", "#1b2733", "#e6e8eb"
COLOURS, OPACITY = "YlOrRd", 0.9  # of the highest weights; the lowest are transparent
HIGHEST = 0.98  # quantile of the weights of all maps at the end of the colour scale; single patches are far above
PANEL = 1.75  # inches
BAR_OFFSET = -6  # points below a map
QUERIES = {"class": "of [CLS]", "patches": "of all patches, on average,"}
BARS = {
    "token": "bars: share of the attention\nthat goes to the prompts",
    "prefix": "bars: share of the prefix in\nthe output of the attention",
}
SHARES = {"token": "{:.0f} % to prompts", "prefix": "{:.0f} % from the prefix"}


def draw_explanation(
    explanation: Explanation, image: Image, file: str | os.PathLike[str], title: str | None = None
) -> None:
    """Draws the attention of each layer as a map over the image: with the adapter above, without it below.

    All maps share one colour scale, on which 1 is the weight of a patch if all attention went to the patches in equal
    parts. The share of the prompts is written under each map, see :class:`~vpt_peft.explanation.LayerAttention`.

    Args:
        explanation: of :func:`~vpt_peft.explanation.explain_attention`.
        image: the image as the model has seen it, resized and cropped.
        file: the picture; its suffix chooses the format, such as ``.png``, ``.svg`` or ``.pdf``.
        title: in place of "Attention of [CLS] to the image".

    Raises:
        AdapterError: an argument is not valid.
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    file = check_output(file)
    from matplotlib import colors
    from matplotlib.figure import Figure

    pixels = _to_pixels(image)
    rows = {"with the adapter": explanation.with_adapter, "without": explanation.without_adapter}
    scale = colors.Normalize(0, _highest([layer for row in rows.values() for layer in row]))
    colours = _transparent_below(colors)
    columns = len(explanation.layers)
    height = PANEL * pixels.shape[0] / pixels.shape[1]
    figure: Any = Figure((PANEL * (columns + 1.55) + 0.3, 2 * height + 1.15), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.06, wspace=0.02, hspace=0.02)
    figure.suptitle(title or default_title(explanation), fontsize=12, color=DARK, x=0.01, ha="left")
    grid = figure.add_gridspec(2, columns + 1, width_ratios=[1.15] + [1] * columns)
    picture = figure.add_subplot(grid[:, 0])
    _draw_panel(picture, pixels, "image")
    picture.set_xlabel(BARS[explanation.kind], fontsize=8, color=GREY, labelpad=8)
    maps: list[Any] = []
    for row, (name, layers) in enumerate(rows.items()):
        for column, (index, layer) in enumerate(zip(explanation.layers, layers, strict=True)):
            axes = figure.add_subplot(grid[row, column + 1])
            _draw_panel(axes, 0.3 + 0.7 * pixels.mean(-1), f"layer {index}" if row == 0 else "")
            maps.append(_draw_map(axes, layer, pixels, cmap=colours, norm=scale))
            if column == 0:
                axes.set_ylabel(name, fontsize=10, color=DARK)
            if row == 0:
                _draw_share(axes, layer.prompt_share, explanation.kind)
    bar = figure.colorbar(maps[0], ax=figure.axes[1:], extend="max", fraction=0.04, pad=0.015, aspect=28)
    bar.set_label("attention to a patch, 1 = even", fontsize=9, color=DARK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2, colors=GREY)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def default_title(explanation: Explanation) -> str:
    """Whose attention is drawn."""
    return f"Attention {QUERIES[explanation.query]} to the image"


def check_output(file: str | os.PathLike[str]) -> Path:
    """The path of a picture that can be drawn.

    Raises:
        AdapterError: matplotlib does not know its suffix; ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError(f"draw_explanation needs matplotlib ({error}): pip install matplotlib") from error
    known = FigureCanvasAgg.get_supported_filetypes()
    path = Path(file)
    if path.suffix.removeprefix(".").lower() not in known:
        raise AdapterError(
            f"The picture must have one of the suffixes {', '.join(f'.{name}' for name in sorted(known))}, got "
            f"{safe_repr(str(file))}."
        )
    return path


def _draw_panel(axes: Any, pixels: Any, title: str) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10, color=DARK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _draw_map(axes: Any, layer: LayerAttention, pixels: Any, **colours: Any) -> Any:
    height, width = pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    return axes.imshow(_relative(layer).numpy(), extent=extent, interpolation="bilinear", **colours)


def _transparent_below(colors: Any) -> Any:
    """A colour map that lets the image shine through where weights are low."""
    from matplotlib import colormaps

    colours = colormaps[COLOURS].resampled(256)([index / 255 for index in range(256)])
    colours[:, 3] = [OPACITY * (index / 255) ** 0.5 for index in range(256)]
    return colors.ListedColormap(colours)


def _draw_share(axes: Any, share: float | None, kind: str) -> None:
    """Writes the share of the prompts under a map, with a bar as long as it."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, BAR_OFFSET / 72, axes.figure.dpi_scale_trans)
    text = "no prompts" if share is None else SHARES[kind].format(100 * share)
    axes.set_xlabel(text, fontsize=9, color=GREY if share is None else ORANGE, labelpad=9)
    for length, color in ((1.0, LIGHT), (share or 0.0, ORANGE)):
        axes.plot([0, length], [0, 0], color=color, linewidth=4, solid_capstyle="butt", transform=below, clip_on=False)


def _relative(layer: LayerAttention) -> Any:
    """The mean over the heads, ``(rows, columns)``, in multiples of even attention to the patches."""
    return layer.patches.mean(0) * layer.patches[0].numel()


def _highest(layers: Sequence[LayerAttention]) -> float:
    """The end of the colour scale: one layer with few bright patches must not leave the others without colour."""
    return max(1.0, float(torch.cat([_relative(layer).flatten() for layer in layers]).quantile(HIGHEST)))


def _to_pixels(image: Image) -> Any:
    """Red, green and blue from 0 to 1, ``(height, width, 3)``."""
    import numpy as np
    import PIL.Image

    if not isinstance(image, PIL.Image.Image):
        raise AdapterError(
            f"image must be a PIL image, got {safe_repr(type(image))}. Use PIL.Image.open(file), resized as for the "
            "model."
        )
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
