"""docs/tools.md, the page of which tool opens which adapter, and its summary in the README."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", minversion="0.21")

import tools


@pytest.mark.heavy
def test_the_page_agrees_with_what_the_tools_do() -> None:
    errors, readme = tools.try_tools(), tools.README.read_text(encoding="utf-8")
    assert tools.build_page(errors) == tools.PAGE.read_text(encoding="utf-8"), "run python docs/tools.py"
    assert tools.insert_summary(readme, errors) == readme, "run python docs/tools.py"
