"""The README's table of methods."""

from __future__ import annotations

from pathlib import Path

import overview

from vpt_peft.recipes.training.methods import METHODS

README = Path(overview.__file__).resolve().parents[1] / "README.md"


def test_the_readme_has_the_table_that_the_recorded_runs_give() -> None:
    assert overview.overview() in README.read_text(encoding="utf-8"), "run benchmarks/overview.py --readme README.md"


def test_it_has_a_row_for_each_method_of_the_command() -> None:

    assert list(overview.ADVICE) == list(METHODS) or set(overview.ADVICE) == set(METHODS)
