"""Draws ``method.svg``: how prompts enter a frozen vision transformer. Run it in this folder: ``python method.py``.

All text stands on opaque cards, so that it is legible on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 924, 396
CARD_WIDTH, CARD_HEIGHT, MARGIN, GAP = 292, 338, 8, 16
BOX_LEFT, BOX_WIDTH, BOX_HEIGHT = 50, 216, 28
TOKEN, STEP = 16, 20  # side of a token, and the distance to the next
HEAD, LAYERS, ROWS, DOTS, FORMULA = 64, (108, 184, 242), (143, 219, 277), 173, 318
INK, PALE_INK = "#1f2933", "#52606d"
TRAINED, OUTPUT = "#e8590c", "#ffd8b8"
FROZEN, FROZEN_EDGE = "#e4e7eb", "#b8c0c9"
CLASS, PATCHES = "#3d5a80", ("#8fb3d9", "#a9c6e3", "#7fa7d1", "#b7d0e8", "#98badd")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif"


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = "none", radius: float = 4) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
        f'stroke="{edge}"/>'
    )


def text(x: float, y: float, words: str, size: float = 12, fill: str = INK, **style: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{attributes}>{words}</text>'


def line(x: float, top: float, bottom: float, color: str = FROZEN_EDGE) -> str:
    return f'<path d="M{x:g} {bottom:g}V{top:g}" stroke="{color}" stroke-width="1.5"/>'


def trained(words: str) -> str:
    return f'<tspan fill="{TRAINED}" font-weight="600">{words}</tspan>'


def tokens(x: float, prompts: str | None) -> list[tuple[float, str, str]]:
    """Left side, fill and edge of each token of a row: [CLS], prompts of a fill, if there are any, and patches."""
    row = [(x, CLASS, CLASS)]
    x += STEP + 8
    if prompts:
        row += [(x + STEP * index, prompts, TRAINED) for index in range(3)]
        x += 3 * STEP + 8
    return [*row, *((x + STEP * index, fill, fill) for index, fill in enumerate(PATCHES))]


def card(left: float, title: str, subtitle: str, prompts: tuple[str | None, ...], formula: str, keys: str) -> list[str]:
    """One way for prompts to act.

    Args:
        prompts: fill of the prompts in the rows of tokens under the layers, the last layer first; None: there are none.
        formula: the attention.
        keys: where its K and V come from.
    """
    x = left + BOX_LEFT
    centre = x + BOX_WIDTH / 2
    width = TOKEN + 8 + (3 * STEP + 8 if prompts[0] else 0) + 5 * STEP
    start = centre - width / 2
    parts = [
        box(left, MARGIN, CARD_WIDTH, CARD_HEIGHT, "#ffffff", "#d5dae0", 10),
        text(left + 18, 32, title, 16, font_weight="600"),
        text(left + 18, 51, subtitle, 12, PALE_INK),
    ]
    for index, (top, row) in enumerate(zip(LAYERS, ROWS, strict=True)):
        drawn = tokens(start, prompts[index])
        above = ROWS[index - 1] + TOKEN if index == 2 else DOTS + 7
        for token, _, edge in drawn:
            middle = token + TOKEN / 2
            parts.append(line(middle, top + BOX_HEIGHT, row))
            if index and not (edge == TRAINED and prompts[index - 1] == TRAINED):  # those end behind their layer
                parts.append(line(middle, above, top))
        parts += [box(token, row, TOKEN, TOKEN, fill, edge, 3) for token, fill, edge in drawn]
        parts.append(box(x, top, BOX_WIDTH, BOX_HEIGHT, FROZEN, FROZEN_EDGE, 6))
        parts.append(text(centre, top + 18.5, f"layer {'N21'[index]}", 12, PALE_INK, text_anchor="middle"))
        if not prompts[index]:
            parts += key_value(left + 16, top, x)
    middle = start + TOKEN / 2
    parts.append(text(centre, DOTS, "⋮", 13, PALE_INK, text_anchor="middle"))
    parts += [
        line(middle, HEAD + 26, LAYERS[0], CLASS),
        box(middle - 22, HEAD, 44, 26, TRAINED, radius=6),
        text(middle, HEAD + 17.5, "head", 12, "#ffffff", text_anchor="middle", font_weight="600"),
        text(middle + 30, HEAD + 17.5, "→ class", 12, PALE_INK),
        text(left + 18, FORMULA, formula, 12, PALE_INK),
        text(left + 18, FORMULA + 18, keys, 12, PALE_INK),
    ]
    return parts


def key_value(x: float, top: float, box_left: float) -> list[str]:
    """The keys and values of a prefix, beside a layer."""
    parts = [f'<path d="M{x + 20:g} {top + BOX_HEIGHT / 2:g}H{box_left:g}" stroke="{TRAINED}" stroke-width="1.5"/>']
    for index, name in enumerate("KV"):
        y = top - 2 + 17 * index
        parts.append(box(x, y, 22, 15, TRAINED, radius=3))
        parts.append(text(x + 11, y + 11.5, name, 10.5, "#ffffff", text_anchor="middle", font_weight="600"))
    return parts


def legend() -> list[str]:
    top = MARGIN + CARD_HEIGHT + 10
    entries = [
        (box(0, 0, 14, 14, TRAINED, radius=3), "trained: prompts and head", 200),
        (box(0, 0, 14, 14, FROZEN, FROZEN_EDGE, 3), "frozen: the transformer", 186),
        (box(0, 0, 14, 14, OUTPUT, TRAINED, 3), "what prompts have become", 206),
        (box(0, 0, 14, 14, CLASS, radius=3), "[CLS]", 82),
        (box(0, 0, 14, 14, PATCHES[0], radius=3), "patches of the image", 150),
    ]
    parts = [box(MARGIN, top, WIDTH - 2 * MARGIN, 30, "#ffffff", "#d5dae0", 8)]
    x = MARGIN + 28
    for swatch, words, width in entries:
        parts.append(f'<g transform="translate({x:g} {top + 8:g})">{swatch}</g>')
        parts.append(text(x + 21, top + 19.5, words, 12, PALE_INK))
        x += width
    return parts


def draw() -> str:
    """The picture as SVG."""
    key, value = trained("K"), trained("V")
    one_softmax = f"softmax( q [k, {key}]ᵀ ) [v, {value}]"
    projected = f"{key}, {value}: computed from the prompts"
    learned = f"{key}, {value}: learned directly"
    own_softmax = f"softmax( q kᵀ ) v + softmax( q {key}ᵀ ) {value}"
    lefts = [MARGIN + index * (CARD_WIDTH + GAP) for index in range(3)]
    parts = [
        *card(lefts[0], "VPT-Shallow", "prompts enter the first layer and flow on", (OUTPUT, OUTPUT, TRAINED),
              one_softmax, projected),
        *card(lefts[1], "VPT-Deep", "fresh prompts enter every layer", (TRAINED, TRAINED, TRAINED), one_softmax,
              projected),
        *card(lefts[2], "VPT-Prefix", "learned keys and values in every layer", (None, None, None), own_softmax,
              learned),
        *legend(),
    ]  # fmt: skip
    title = "VPT-Shallow, VPT-Deep and VPT-Prefix: how prompts enter a frozen vision transformer"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join([f'{head} font-family="{FONT}" role="img">', f"<title>{title}</title>", *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
