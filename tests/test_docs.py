"""The code in README and docs: names exist, options exist, links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from vpt_peft.recipes.command import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> Iterator[str]:
    """The code blocks of a language."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
        yield "\n".join(line.removeprefix(block[0]) for line in block[1].splitlines())


NEEDED = {  # other packages that parts of ours need
    "vpt_peft.deploy.demo": "gradio",
    "vpt_peft.deploy.ray_serve": "ray",
    "vpt_peft.deploy.server": "fastapi",
    "vpt_peft.peft": "peft",
}


@each_page
def test_python_in_the_documentation_parses_and_imports_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vpt_peft"):
                for package in (needed for part, needed in NEEDED.items() if str(node.module).startswith(part)):
                    pytest.importorskip(package)
                module = import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == [], block


@each_page
def test_commands_in_the_documentation_have_these_options(page: Path) -> None:
    for block in blocks(page, "(?:ba)?sh"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.startswith("vpt-peft "):
                parse(shlex.split(line, comments=True)[1:])


@each_page
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
