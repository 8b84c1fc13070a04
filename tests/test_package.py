"""The package as a whole: what importing it does, which module may import which, and what is declared."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import pytest

import vpt_peft

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(vpt_peft.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# Top first: a module imports only from modules further down.
LAYERS = [
    "vpt_peft",
    "vpt_peft.auto",
    "vpt_peft.convert",
    "vpt_peft.trainer",
    "vpt_peft.model",
    "vpt_peft.saving",
    "vpt_peft.origin",
    "vpt_peft.hub",
    "vpt_peft.card",
    "vpt_peft.checkpoint",
    "vpt_peft.folder",
    "vpt_peft.weights",
    "vpt_peft.files",
    "vpt_peft.prompted",
    "vpt_peft.pretrained",
    "vpt_peft.state",
    "vpt_peft.status",
    "vpt_peft.batch",
    "vpt_peft.adapter",
    "vpt_peft.copies",
    "vpt_peft.dense",
    "vpt_peft.routes",
    "vpt_peft.routes.attachment",
    "vpt_peft.routes.heads",
    "vpt_peft.routes.layers",
    "vpt_peft.routes.attention",
    "vpt_peft.routes.seating",
    "vpt_peft.routes.masks",
    "vpt_peft.routes.cache",
    "vpt_peft.routes.doors",
    "vpt_peft.passes",
    "vpt_peft.plan",
    "vpt_peft.prompts",
    "vpt_peft.authors",
    "vpt_peft.pth",
    "vpt_peft.backbones",
    "vpt_peft.architectures",
    "vpt_peft.names",
    "vpt_peft.config",
    "vpt_peft.errors",
    "vpt_peft.version",
]

OURS = "what others print ends here\n"
IMPORT_AND_TELL = """
import sys, torch, warnings

sys.stderr.write("what others print ends here\\n")

seen = []
def note(event, arguments):
    if event.startswith("socket.") or event in ("os.putenv", "os.unsetenv", "subprocess.Popen", "os.system"):
        seen.append(f"{event} {arguments}")

sys.addaudithook(note)
random_state = torch.get_rng_state()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import vpt_peft
seen += [str(warning.message) for warning in caught]
seen += [] if torch.equal(torch.get_rng_state(), random_state) else ["random numbers were drawn"]
print(seen)
"""


def test_importing_the_package_does_nothing_else() -> None:
    others = {line for path in MODULES.values() for line in others_imported_by(path)}
    theirs = "\n".join(sorted(others))  # what they do when imported is not our doing
    script = [sys.executable, "-c", theirs + IMPORT_AND_TELL]
    run = subprocess.run(script, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
    assert run.stderr.partition(OURS)[2] == ""


def others_imported_by(path: Path) -> Iterator[str]:
    """A module's own statements that import what is of other packages."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_other = isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__"
        if isinstance(node, ast.Import) or is_other:
            yield ast.unparse(node)


def test_imports_point_down_only() -> None:
    upward = [
        f"{importer} imports {imported}"
        for importer, path in MODULES.items()
        for imported in imports(importer, path)
        if LAYERS.index(imported) <= LAYERS.index(importer)
    ]
    assert upward == []


def test_every_module_has_its_place_in_the_layers() -> None:
    assert set(MODULES) ^ set(LAYERS) == set()


def imports(importer: str, path: Path) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it."""
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in inside]
        yield from (name for name in names if name in MODULES)


@pytest.mark.parametrize("name", sorted(set(vpt_peft.__all__) - {"__version__"}))
def test_every_public_name_has_a_docstring(name: str) -> None:
    public = getattr(vpt_peft, name)
    assert has_docstring(public)
    if isinstance(public, type):
        members = {member: value for member, value in vars(public).items() if not member.startswith("_")}
        functions = {member: value for member, value in members.items() if callable(value) or hasattr(value, "__get__")}
        assert [member for member, value in functions.items() if not has_docstring(value)] == []


def has_docstring(public: Any) -> bool:
    """Whether it has one of its own: a dataclass makes up a signature where there is none."""
    text = vars(public).get("__doc__") if isinstance(public, type) else public.__doc__
    return bool(text) and not text.startswith(f"{getattr(public, '__name__', None)}(")


def test_the_package_is_marked_as_typed() -> None:
    assert files("vpt_peft").joinpath("py.typed").is_file()


def test_the_oldest_versions_that_are_tested_are_the_declared_floors() -> None:
    setup = configparser.RawConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    floors = setup["options"]["install_requires"].split()
    assert all(">=" in floor for floor in floors)
    pinned = (REPOSITORY / "constraints" / "oldest.txt").read_text(encoding="utf-8").split()
    assert [floor.replace(">=", "==") for floor in floors if floor.replace(">=", "==") not in pinned] == []
