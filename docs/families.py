"""Writes families.md, the page of supported models, from the declarations in ``vpt_peft.backbones``.

python docs/families.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.backbone_utils import BackboneMixin

from vpt_peft.backbones import ARCHITECTURES, Architecture, find_class
from vpt_peft.backbones.unsupported import REFUSED

FOLDER = Path(__file__).parent
PAGE = FOLDER / "families.md"
# {family: (the model types that it consists of, remarks that the declarations do not tell)}
FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {
    "ViT": (("vit",), ""),
    "DeiT": (("deit",), "both classifiers of the class with a teacher are trained"),
    "DINOv2": (("dinov2", "dinov2_with_registers"), "its classifier reads `[CLS]` joined with the mean"),
    "DINOv3": (("dinov3_vit",), ""),
    "MAE": (("vit_mae",), "checkpoints of ViT-MAE in the classes of ViT"),
    "MSN": (("vit_msn",), ""),
    "I-JEPA": (("ijepa",), ""),
    "Pixio": (("pixio",), ""),
    "Swin": (("swin",), ""),
    "Swin V2": (("swinv2",), "prompts have the position bias of an MLP output of zero"),
    "Hiera": (("hiera",), ""),
    "BEiT": (("beit",), ""),
    "Data2Vec": (("data2vec-vision",), ""),
    "Sapiens2": (("sapiens2",), ""),
    "UperNet": (("upernet",), ""),
    "CLIP": (("clip", "clip_vision_model"), ""),
    "MetaCLIP 2": (("metaclip_2", "metaclip_2_vision_model"), ""),
    "SigLIP": (("siglip", "siglip_vision_model"), ""),
    "SigLIP 2": (("siglip2", "siglip2_vision_model"), ""),
    "Chinese-CLIP": (("chinese_clip", "chinese_clip_vision_model"), ""),
    "AltCLIP": (("altclip", "altclip_vision_model"), ""),
    "OWL-ViT": (("owlvit", "owlvit_vision_model"), "not its detector"),
    "OWLv2": (("owlv2", "owlv2_vision_model"), "not its detector"),
    "GIT": (("git_vision_model",), ""),
    "AIMv2": (("aimv2_vision_model",), ""),
    "BLIP-2": (("blip_2_vision_model",), ""),
    "InternVL": (("internvl_vision",), ""),
    "MLCD": (("mlcd_vision_model",), ""),
    "timm": (("timm_wrapper",), "`pip install timm`; no plain `timm.create_model(...)`"),
    "YOLOS": (("yolos",), "a mixed batch needs adapters with the same number of labels"),
    "DPT": (
        ("dpt",),
        "the neck belongs to the head; hybrid models are refused; `torch.compile(fullgraph=True)` after a first call",
    ),
    "Depth Anything": (("depth_anything",), "the neck belongs to the head"),
    "VideoMAE": (
        ("videomae",),
        "with transformers 5.12, published checkpoints lose biases; `VideoMAEForPreTraining` is not supported",
    ),
    "ViViT": (("vivit",), ""),
    "V-JEPA 2": (("vjepa2",), "attentive pooler and predictor stay frozen; prompts of different lengths need sdpa"),
    "ViTPose": (("vitpose", "vitpose_backbone"), "models with experts (ViTPose++) are refused"),
}
INTRODUCTION = """\
# Supported models

*Written by `python docs/families.py` from the declarations in `vpt_peft/backbones/`; tested with transformers {oldest}
and {newest}.*

Prompts act as keys and values or as tokens (`PromptConfig(route=...)`, both give the same outputs), enter the first
layer only (VPT-Shallow, `deep=False`), or are a prefix (`kind="prefix"`). *Pooling*: the classifier, of the class or
added to a class without one (`task_type="IMAGE_CLASSIFICATION"`), can read prompts or the mean of the image's tokens.
*Mixed biases*: adapters with `bias="all"` can be mixed in a batch. *Pixels*: prompts can be patches or channels of the
image, or its border where outputs are not for places in it (`location=...`). Feature maps and heads that do not read
the last layers have prompts in those that they read.

"""
CLASSES = """
## Classes

"""
REFUSED_MODELS = """
## Models that are refused

| Families or classes | They cannot be prompted, since |
|---|---|
"""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: of the family.
        architectures: its declarations.
        remark: what they do not tell.
    """

    name: str
    architectures: tuple[Architecture, ...]
    remark: str = ""

    @property
    def tasks(self) -> dict[str, list[str]]:
        """``{task type: classes}``."""
        tasks: dict[str, list[str]] = {}
        for architecture in self.architectures:
            for name, head in architecture.heads.items():
                classes = tasks.setdefault(head.task_type, [])
                classes += [name] if name not in classes else []
        return tasks

    @property
    def ways(self) -> dict[str, bool]:
        """What is possible with it."""
        flows_on = not any(architecture.key_value_only for architecture in self.architectures)
        features = [find_class(name) or object for name in self.tasks.get("FEATURE_EXTRACTION", ())]
        return {
            "Keys and values": True,  # these need no more than the parts that every declaration has
            "Tokens": flows_on,
            "Shallow": flows_on,
            "Prefix": True,
            "Pooling": "IMAGE_CLASSIFICATION" in self.tasks
            or any(not issubclass(cls, BackboneMixin) for cls in features),
            "Mixed biases": all(architecture.batch_first for architecture in self.architectures),
            "Pixels": flows_on and all(architecture.input_dims == 4 for architecture in self.architectures),
        }

    @property
    def remarks(self) -> Iterator[str]:
        """What its declarations tell, and the remark."""
        parts = self.architectures[0]
        if parts.key_value_only:
            yield parts.key_value_only
        elif parts.blocks:
            yield "prompts are in every window"
        wrapped = dict.fromkeys(f"`{one.wrapped[1]}`" for one in self.architectures if one.wrapped)
        if wrapped:
            yield f"with {' or '.join(sorted(wrapped))} inside"
        elif parts.uses_sdpa:
            yield 'needs `attn_implementation="sdpa"`, the default'
        if parts.backbones:
            yield f"{'also ' if parts.refuse else ''}with {' or '.join(f'`{name}`' for name in parts.backbones)} inside"
        if any(architecture.num_suffix_tokens for architecture in self.architectures):
            yield "tokens behind the patches are not tokens of the image"
        if self.remark:
            yield self.remark


def list_families() -> Iterator[Family]:
    """All families that are declared."""
    named: set[str] = set()
    for name, (model_types, remark) in FAMILIES.items():
        named.update(model_types)
        yield Family(name, tuple(one for model_type in model_types for one in ARCHITECTURES[model_type]), remark)
    for model_type in sorted(ARCHITECTURES.keys() - named):
        yield Family(model_type, tuple(ARCHITECTURES[model_type]))


def tested_version(constraints: str) -> str:
    """The version of transformers that is pinned in a file of ``constraints/``."""
    lines = (FOLDER.parent / "constraints" / constraints).read_text(encoding="utf-8").split()
    pinned = next(line for line in lines if line.startswith("transformers=="))
    return pinned.removeprefix("transformers==").rstrip(";")


def build_page() -> str:
    """The page, in Markdown."""
    families = list(list_families())
    ways = list(families[0].ways)
    possible = [["Family", *ways, "Remarks"], ["---", *[":-:"] * len(ways), "---"]]
    classes = [["Family", "Task type", "Classes"], ["---"] * 3]
    for family in families:
        marks = ["yes" if way else "no" for way in family.ways.values()]
        possible.append([family.name, *marks, "; ".join(family.remarks)])
        for task, names in sorted(family.tasks.items()):
            classes.append([family.name, f"`{task}`", ", ".join(f"`{name}`" for name in sorted(names))])
    refused = [[", ".join(f"`{name}`" for name in sorted(names)), reason] for reason, names in REFUSED.items()]
    introduction = INTRODUCTION.format(oldest=tested_version("oldest.txt"), newest=tested_version("current.txt"))
    return introduction + to_lines(possible) + CLASSES + to_lines(classes) + REFUSED_MODELS + to_lines(refused)


def to_lines(rows: list[list[str]]) -> str:
    """The lines of a table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    PAGE.write_text(build_page(), encoding="utf-8")
    print(f"Wrote {PAGE}.")
