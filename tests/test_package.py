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
PACKAGE = Path(str(vpt_peft.__file__)).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# Top first: a module imports only from modules further down.
LAYERS = [
    "vpt_peft",
    "vpt_peft.__main__",
    "vpt_peft.recipes",
    "vpt_peft.recipes.command",
    "vpt_peft.recipes.options",
    "vpt_peft.recipes.commands",
    "vpt_peft.recipes.commands.sweep",
    "vpt_peft.recipes.commands.train",
    "vpt_peft.recipes.commands.evaluate",
    "vpt_peft.recipes.commands.predict",
    "vpt_peft.recipes.commands.explain",
    "vpt_peft.recipes.commands.demo",
    "vpt_peft.recipes.commands.export",
    "vpt_peft.recipes.commands.serve",
    "vpt_peft.recipes.commands.push",
    "vpt_peft.recipes.commands.info",
    "vpt_peft.recipes.search",
    "vpt_peft.recipes.search.on_ray",
    "vpt_peft.recipes.search.space",
    "vpt_peft.recipes.search.trials",
    "vpt_peft.recipes.training",
    "vpt_peft.recipes.training.output",
    "vpt_peft.recipes.training.repository",
    "vpt_peft.recipes.training.task",
    "vpt_peft.recipes.training.pretraining",
    "vpt_peft.recipes.training.trainer",
    "vpt_peft.recipes.training.models",
    "vpt_peft.recipes.training.methods",
    "vpt_peft.recipes.report",
    "vpt_peft.recipes.report.plots",
    "vpt_peft.recipes.report.metrics",
    "vpt_peft.recipes.report.tables",
    "vpt_peft.recipes.data",
    "vpt_peft.recipes.data.digits",
    "vpt_peft.recipes.data.transforms",
    "vpt_peft.recipes.data.masks",
    "vpt_peft.recipes.data.folders",
    "vpt_peft.recipes.data.images",
    "vpt_peft.recipes.sources",
    "vpt_peft.recipes.runtime",
    "vpt_peft.recipes.errors",
    "vpt_peft.convert.__main__",
    "vpt_peft.convert",
    "vpt_peft.convert.command",
    "vpt_peft.convert.options",
    "vpt_peft.convert.checkpoint",
    "vpt_peft.convert.official",
    "vpt_peft.convert.pth",
    "vpt_peft.deploy.demo",
    "vpt_peft.deploy.ray_serve",
    "vpt_peft.explanation",
    "vpt_peft.explanation.image_file",
    "vpt_peft.explanation.drawing",
    "vpt_peft.explanation.attention",
    "vpt_peft.explanation.recorder",
    "vpt_peft.training",
    "vpt_peft.training.callbacks",
    "vpt_peft.training.features",
    "vpt_peft.training.feature_folder",
    "vpt_peft.training.draws",
    "vpt_peft.training.optimizer",
    "vpt_peft.deploy.server",
    "vpt_peft.deploy.server.app",
    "vpt_peft.deploy.server.uploads",
    "vpt_peft.deploy.server.images",
    "vpt_peft.deploy.server.errors",
    "vpt_peft.deploy.server.metrics",
    "vpt_peft.deploy.server.catalog",
    "vpt_peft.deploy.server.settings",
    "vpt_peft.deploy",
    "vpt_peft.deploy.endpoint",
    "vpt_peft.deploy.exporting",
    "vpt_peft.deploy.exporting.file",
    "vpt_peft.deploy.exporting.inputs",
    "vpt_peft.deploy.exporting.formats",
    "vpt_peft.deploy.exporting.graph",
    "vpt_peft.deploy.engine",
    "vpt_peft.deploy.engine.engine",
    "vpt_peft.deploy.engine.scheduler",
    "vpt_peft.deploy.engine.passes",
    "vpt_peft.deploy.engine.loading",
    "vpt_peft.deploy.engine.images",
    "vpt_peft.deploy.engine.costs",
    "vpt_peft.deploy.engine.backbone",
    "vpt_peft.deploy.engine.prediction",
    "vpt_peft.deploy.engine.stats",
    "vpt_peft.deploy.engine.errors",
    "vpt_peft.deploy.adapters",
    "vpt_peft.pipelines",
    "vpt_peft.images",
    "vpt_peft.images.processors",
    "vpt_peft.images.positions",
    "vpt_peft.images.files",
    "vpt_peft.auto",
    "vpt_peft.peft",
    "vpt_peft.peft.tuner",
    "vpt_peft.peft.native",
    "vpt_peft.peft.layer",
    "vpt_peft.peft.model",
    "vpt_peft.peft.config",
    "vpt_peft.check",
    "vpt_peft.model",
    "vpt_peft.model.vpt_model",
    "vpt_peft.model.saving",
    "vpt_peft.model.initialisation",
    "vpt_peft.model.modes",
    "vpt_peft.model.pretrained",
    "vpt_peft.model.status",
    "vpt_peft.model.backbone_checks",
    "vpt_peft.model.cached_features",
    "vpt_peft.model.forward",
    "vpt_peft.model.arguments",
    "vpt_peft.hub",
    "vpt_peft.hub.card",
    "vpt_peft.hub.card_content",
    "vpt_peft.hub.usage",
    "vpt_peft.hub.transfer",
    "vpt_peft.hub.endpoint_files",
    "vpt_peft.hub.provenance",
    "vpt_peft.hub.repo_ids",
    "vpt_peft.io",
    "vpt_peft.io.folder",
    "vpt_peft.io.fingerprint",
    "vpt_peft.io.weights",
    "vpt_peft.io.state_dict",
    "vpt_peft.io.atomic",
    "vpt_peft.injection",
    "vpt_peft.injection.injector",
    "vpt_peft.injection.hooks",
    "vpt_peft.injection.attention",
    "vpt_peft.injection.prefix_attention",
    "vpt_peft.injection.fused",
    "vpt_peft.injection.joined",
    "vpt_peft.injection.overrides",
    "vpt_peft.injection.masks",
    "vpt_peft.injection.prompt_batch",
    "vpt_peft.injection.locations",
    "vpt_peft.injection.context",
    "vpt_peft.injection.cached_input",
    "vpt_peft.adapter",
    "vpt_peft.adapter.adapter",
    "vpt_peft.adapter.prefix",
    "vpt_peft.adapter.locations",
    "vpt_peft.adapter.modules",
    "vpt_peft.adapter.dequantize",
    "vpt_peft.adapter.labels",
    "vpt_peft.adapter.plan",
    "vpt_peft.adapter.prompts",
    "vpt_peft.adapter.projection_cache",
    "vpt_peft.backbones",
    "vpt_peft.backbones.added_heads",
    "vpt_peft.backbones.backbone",
    "vpt_peft.backbones.unsupported",
    "vpt_peft.backbones.vit",
    "vpt_peft.backbones.deit",
    "vpt_peft.backbones.dinov2",
    "vpt_peft.backbones.dinov3",
    "vpt_peft.backbones.dpt",
    "vpt_peft.backbones.vitpose",
    "vpt_peft.backbones.yolos",
    "vpt_peft.backbones.masked",
    "vpt_peft.backbones.vision_language",
    "vpt_peft.backbones.data2vec",
    "vpt_peft.backbones.beit",
    "vpt_peft.backbones.upernet",
    "vpt_peft.backbones.video",
    "vpt_peft.backbones.swinv2",
    "vpt_peft.backbones.hiera",
    "vpt_peft.backbones.swin",
    "vpt_peft.backbones.timm",
    "vpt_peft.backbones.siglip",
    "vpt_peft.backbones.clip",
    "vpt_peft.backbones.architecture",
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
    for name in vpt_peft.__all__:
        getattr(vpt_peft, name)
seen += [str(warning.message) for warning in caught]
seen += [] if torch.equal(torch.get_rng_state(), random_state) else ["random numbers were drawn"]
print(seen)
"""


def test_importing_the_package_does_nothing_else() -> None:
    deploy = ("vpt_peft.deploy.demo", "vpt_peft.deploy.ray_serve", "vpt_peft.deploy.server")
    extras = ("vpt_peft.recipes.", "vpt_peft.peft", "vpt_peft.images.files", *deploy)  # need other packages
    own = [path for name, path in MODULES.items() if not name.startswith(extras)]
    others = {line for path in own for line in others_imported_by(path)}
    theirs = "\n".join(sorted(others))  # what other packages do when they are imported does not count
    script = [sys.executable, "-c", theirs + IMPORT_AND_TELL]
    run = subprocess.run(script, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
    assert run.stderr.partition(OURS)[2] == ""


def test_importing_the_package_alone_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, vpt_peft; dir(vpt_peft); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


USE = """
import pickle, sys
import vpt_peft
assert vpt_peft.__version__ and "torch" not in sys.modules
assert vpt_peft.errors.VPTError is vpt_peft.VPTError  # a submodule that nobody has imported
assert vpt_peft.backbones.architecture.ARCHITECTURES  # registered as soon as they are needed
try:
    vpt_peft.missing
except AttributeError as error:
    print(error)
from vpt_peft import *
assert set(vpt_peft.__all__) <= set(globals()) and set(vpt_peft.__all__) <= set(dir(vpt_peft))
for name in set(vpt_peft.__all__) - {"__version__"}:
    assert globals()[name] is getattr(vpt_peft, name)
    assert pickle.loads(pickle.dumps(globals()[name])) is globals()[name], name
print(PromptConfig.__module__)
"""


def test_names_and_submodules_are_found_when_they_are_used() -> None:
    run = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True)
    assert run.stdout == "module 'vpt_peft' has no attribute 'missing'\nvpt_peft.config\n"


def test_every_public_name_is_known_to_type_checkers() -> None:
    tree = ast.parse(Path(str(vpt_peft.__file__)).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(vpt_peft.__all__) <= imported
    assert set(vpt_peft.__all__) - {"__version__"} == set(vpt_peft._HOMES)


def test_using_the_package_does_not_load_trainer_or_peft() -> None:
    code = """
import sys, transformers
transformers.ViTForImageClassification
before = set(sys.modules)
from vpt_peft import PromptConfig, VPTModel, adamw, get_vpt_model, parameter_groups
print({"transformers.trainer", "accelerate", "peft", "datasets"} & (set(sys.modules) - before))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def others_imported_by(path: Path) -> Iterator[str]:
    """The top-level imports of a module from other packages."""
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
