"""docs/families.md, the page of supported models."""

from __future__ import annotations

import families
import pytest

from vpt_peft import Architecture, Head, register_architecture
from vpt_peft.backbones import ARCHITECTURES, list_classes
from vpt_peft.backbones.unsupported import REFUSED

PAGE = families.PAGE.read_text(encoding="utf-8")


def test_the_page_agrees_with_the_declarations() -> None:
    assert families.build_page() == PAGE, "run python docs/families.py"


def test_the_page_has_every_class_that_is_declared_or_refused() -> None:
    assert [name for name in list_classes() if f"`{name}`" not in PAGE] == []
    assert [name for refused in REFUSED.values() for name in refused if f"`{name}`" not in PAGE] == []


def test_the_page_has_every_way_of_a_family_that_users_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mine", [])  # put back afterwards
    heads = {"MyDetector": Head("OBJECT_DETECTION", ("head",))}
    register_architecture(Architecture("mine", heads, batch_first=False, input_dims=3, num_suffix_tokens=2))
    page = families.build_page()
    assert "| mine | yes | yes | yes | yes | no | no | no | tokens behind the patches" in page
    assert "| mine | `OBJECT_DETECTION` | `MyDetector` |" in page
