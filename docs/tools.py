"""Writes tools.md, the page of which tool opens which adapter, and its summary in the README, by trying them.

python docs/tools.py
"""

from __future__ import annotations

import configparser
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from families import FOLDER, tested_version, to_lines
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor

import vpt_peft.peft  # noqa: F401  # for what it does
from vpt_peft import AutoVPTModel, PromptConfig, VPTModel, get_vpt_model, hub

PAGE = FOLDER / "tools.md"
README = FOLDER.parent / "README.md"
START, END = "<!-- tools -->\n", "<!-- /tools -->"  # around the table in the README
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
SEGMENTER = {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 6, "num_labels": 3}
DEPTH = {
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "is_hybrid": False,
    "backbone_out_indices": [0, 1, 2, 3],
}
INTRODUCTION = """\
# Which tool opens my adapter?

*Written by `python docs/tools.py`, which tries them on small models and compares outputs; tested with transformers
{oldest} and {newest}, and peft{peft}.*

`pip install 'vpt-peft[peft]'` and `import vpt_peft.peft` let PEFT, and transformers with PEFT, open our adapters
([guide](guides/from-peft.md#our-adapters-in-peft-and-transformers)). *yes*: the tool gives the same outputs as the
model that was saved.

"""
WITHOUT = "without `import vpt_peft.peft`"
REASONS = """
## What does not work

| Tool | Adapter | Error |
|---|---|---|
"""


@dataclass(frozen=True)
class Kind:
    """A kind of adapters.

    Attributes:
        model_class: of the backbone.
        config: of the backbone.
        options: of the adapter's PromptConfig.
        labels: of the adapter.
        writer: who saves the adapter: ``"vpt-peft"``, ``"PEFT"`` or ``"transformers"``.
    """

    model_class: str
    config: Any
    options: dict[str, Any]
    labels: dict[str, Any]
    writer: str = "vpt-peft"

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of a forward call."""
        generator = torch.Generator().manual_seed(0)
        texts = {"input_ids": torch.tensor([[1, 5, 39]])} if self.model_class == "CLIPModel" else {}
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), **texts}

    def save(self, folder: Path) -> Tensor:
        """Saves a backbone and an adapter, and returns the outputs of the model."""
        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        model_class(self.config()).save_pretrained(folder / "backbone")
        vpt = get_vpt_model(self.load_backbone(folder), PromptConfig(num_tokens=3, **self.options), **self.labels)
        vpt.save_pretrained(folder / "adapter")
        if self.writer == "PEFT":
            peft.PeftModel.from_pretrained(self.load_backbone(folder), folder / "adapter").save_pretrained(folder)
        elif self.writer == "transformers":
            model = self.load_backbone(folder)
            model.load_adapter(folder / "adapter")
            model.save_pretrained(folder)
        return output(vpt.eval(), self.inputs)

    def adapter(self, folder: Path) -> Path:
        """Folder of the adapter."""
        return folder / "adapter" if self.writer == "vpt-peft" else folder

    def load_backbone(self, folder: Path) -> Any:
        """The backbone alone."""
        return getattr(transformers, self.model_class).from_pretrained(folder / "backbone")


def vit_config() -> Any:
    return transformers.ViTConfig(**SIZES, num_labels=5)


KINDS: dict[str, Kind] = {
    "VPT-Deep": Kind("ViTForImageClassification", vit_config, {}, {"num_labels": 3}),
    "prefix and biases": Kind("ViTForImageClassification", vit_config, {"kind": "prefix", "bias": "all"}, {}),
    "saved by PEFT": Kind("ViTForImageClassification", vit_config, {}, {"num_labels": 3}, "PEFT"),
    "saved by transformers": Kind("ViTForImageClassification", vit_config, {}, {"num_labels": 3}, "transformers"),
    "with an added classifier": Kind(
        "ViTModel", vit_config, {"task_type": "IMAGE_CLASSIFICATION"}, {"num_labels": 3},
    ),
    "segmentation (BEiT)": Kind(
        "BeitForSemanticSegmentation", lambda: transformers.BeitConfig(**SIZES, **SEGMENTER), {}, {"num_labels": 4},
    ),
    "depth (DPT)": Kind("DPTForDepthEstimation", lambda: transformers.DPTConfig(**SIZES, **DEPTH), {}, {}),
    "images and texts (CLIP)": Kind(
        "CLIPModel", lambda: transformers.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=8), {}, {},
    ),
}  # fmt: skip

# A tool gets the kind of adapter and the folder of its backbone, and returns a model.
Tool = Callable[[Kind, Path], Any]


def load_second_adapter(kind: Kind, folder: Path) -> Any:
    model = peft.PeftModel.from_pretrained(kind.load_backbone(folder), kind.adapter(folder), "first")
    model.load_adapter(kind.adapter(folder), "second")
    model.set_adapter("second")
    return model


def load_native_adapter(kind: Kind, folder: Path) -> Any:
    model = kind.load_backbone(folder)
    model.load_adapter(kind.adapter(folder))
    return model


def load_auto_model(kind: Kind, folder: Path) -> Any:
    task = AutoVPTModel.from_pretrained(kind.adapter(folder)).active_config.task_type
    return getattr(transformers, hub.BACKBONE_CLASSES[task]).from_pretrained(kind.adapter(folder))


def load_pipeline(kind: Kind, folder: Path) -> Any:
    task = hub.PIPELINES[AutoVPTModel.from_pretrained(kind.adapter(folder)).active_config.task_type]
    return transformers.pipeline(
        task, model=str(kind.adapter(folder)), image_processor=transformers.ViTImageProcessorPil(), tokenizer=object()
    ).model


TOOLS: dict[str, Tool] = {
    "`VPTModel.from_pretrained(model, adapter)`": lambda kind, folder: VPTModel.from_pretrained(
        kind.load_backbone(folder), kind.adapter(folder)
    ),
    "`AutoVPTModel.from_pretrained(adapter)`": lambda kind, folder: AutoVPTModel.from_pretrained(kind.adapter(folder)),
    "`PeftModel.from_pretrained(model, adapter)`": lambda kind, folder: peft.PeftModel.from_pretrained(
        kind.load_backbone(folder), kind.adapter(folder)
    ),
    '`peft_model.load_adapter(adapter, "second")`': load_second_adapter,
    "`AutoPeftModel.from_pretrained(adapter)`": lambda kind, folder: peft.AutoPeftModel.from_pretrained(
        kind.adapter(folder)
    ),
    "transformers: `model.load_adapter(adapter)`": load_native_adapter,
    "transformers: `AutoModelFor….from_pretrained(adapter)`": load_auto_model,
    "transformers: `pipeline(task, model=adapter)`": load_pipeline,
}


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first tensor of a model's output."""
    with torch.no_grad():
        values = model(**inputs).values()
    return next(value for value in values if isinstance(value, Tensor))


@contextmanager
def without_bridge() -> Iterator[None]:
    """A context in which PEFT is as before ``import vpt_peft.peft``."""
    mappings: list[dict[Any, Any]] = [
        PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING,
    ]  # fmt: skip
    kept = [(mapping, *next((key, mapping[key]) for key in mapping if key == "VPT")) for mapping in mappings]
    for mapping, key, _ in kept:
        del mapping[key]
    try:
        yield
    finally:
        for mapping, key, value in kept:
            mapping[key] = value


def find_error(tool: Tool, kind: Kind, folder: Path, expected: Tensor) -> str:
    """What is wrong with the model that a tool opens; empty if nothing is."""
    try:
        found = output(tool(kind, folder).eval(), kind.inputs)
    except Exception as error:
        message = str(error).replace(str(folder), "").partition(". ")[0].partition(": ")[0]
        return f"`{type(error).__name__}`: {message.replace('<', '&lt;')}"
    return "" if torch.equal(found, expected) else "other outputs"


def tested_peft() -> str:
    """The versions of PEFT in ``setup.cfg``."""
    setup = configparser.RawConfigParser()
    setup.read(FOLDER.parent / "setup.cfg", encoding="utf-8")
    return setup["options.extras_require"]["peft"].strip().removeprefix("peft")


def try_tools() -> dict[tuple[str, str], str]:
    """By tool and kind of adapter: what is wrong with the model that the tool opens; empty if nothing is."""
    errors: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (name, kind) in enumerate(KINDS.items()):
            folder = Path(root, str(number))
            expected = kind.save(folder)
            for tool, load in TOOLS.items():
                errors[tool, name] = find_error(load, kind, folder, expected)
                if number == 0:
                    with without_bridge():
                        errors[tool, WITHOUT] = find_error(load, kind, folder, expected)
    return errors


def build_page(errors: dict[tuple[str, str], str]) -> str:
    """The page, in Markdown."""
    columns = [*KINDS, WITHOUT]
    rows = [["Tool", *columns], ["---", *[":-:"] * len(columns)]]
    rows += [[tool, *["no" if errors[tool, column] else "yes" for column in columns]] for tool in TOOLS]
    reasons = [[tool, column, errors[tool, column]] for tool in TOOLS for column in columns if errors[tool, column]]
    versions = {"oldest": tested_version("oldest.txt"), "newest": tested_version("current.txt"), "peft": tested_peft()}
    return INTRODUCTION.format(**versions) + to_lines(rows) + REASONS + to_lines(reasons)


def insert_summary(readme: str, errors: dict[tuple[str, str], str]) -> str:
    """The README with a row for each tool: which of the kinds of adapters it opens."""
    rows = [["Tool", "opens", WITHOUT], ["---", "---", ":-:"]]
    for tool in TOOLS:
        closed = [kind for kind in KINDS if errors[tool, kind]]
        opens = "all but " + ", ".join(closed) if closed else "all"
        rows.append([tool, opens, "no" if errors[tool, WITHOUT] else "yes"])
    before, _, rest = readme.partition(START)
    return before + START + to_lines(rows) + END + rest.partition(END)[2]


if __name__ == "__main__":
    found = try_tools()
    PAGE.write_text(build_page(found), encoding="utf-8")
    README.write_text(insert_summary(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"Wrote {PAGE} and the table in {README}.")
