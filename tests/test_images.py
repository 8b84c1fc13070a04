"""Pictures of the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def test_the_picture_of_the_method_is_what_its_script_draws() -> None:
    picture = (IMAGES / "method.svg").read_text(encoding="utf-8")
    assert picture == runpy.run_path(str(IMAGES / "method.py"))["draw"]()
    words = {element.text for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"VPT-Shallow", "VPT-Deep", "VPT-Prefix", "trained: prompts and head", "frozen: the transformer"} <= words
