"""The README's table of methods."""

from __future__ import annotations

import overview
import pytest

from vpt_peft.recipes.training.methods import METHODS


@pytest.mark.parametrize(("file", "mark"), overview.TABLES)
def test_the_documentation_has_the_tables_that_the_recorded_runs_give(file: str, mark: str) -> None:
    text = (overview.ROOT / file).read_text(encoding="utf-8")
    table = text.partition(f"<!-- {mark} -->\n")[2].partition(f"\n<!-- /{mark} -->")[0]
    assert table == overview.TABLES[file, mark](), "run python benchmarks/overview.py --write"


def test_it_has_a_row_for_each_method_of_the_command() -> None:

    assert list(overview.ADVICE) == list(METHODS) or set(overview.ADVICE) == set(METHODS)
