"""docs/tools.md, the page of which tool opens which adapter."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", minversion="0.21")

import tools


@pytest.mark.heavy
def test_the_page_agrees_with_what_the_tools_do() -> None:
    assert tools.build_page() == tools.PAGE.read_text(encoding="utf-8"), "run python docs/tools.py"
