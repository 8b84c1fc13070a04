"""``vpt-peft info``: what an adapter is, read from its files, without its backbone."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from ...config import PromptConfig
from ...errors import truncate_list
from ...hub import is_folder, pulled
from ...io import open_folder
from ...io.folder import SavedAdapter
from ..errors import RecipeError
from ..sources import check_source
from ..training.models import peft_type

MAX_LABELS = 20
# Fields of the config that are shown where they are not the default.
ALWAYS = ("task_type", "num_tokens", "kind", "deep", "bias")
HIDDEN = ("base_model_name_or_path", "revision", "inference_mode", "peft_type")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    check_source(args.adapter)
    kind = peft_type(args.adapter) if is_folder(args.adapter) else "VPT"
    if kind != "VPT":
        what = "a full model or no model" if kind is None else f"an adapter of PEFT ({kind})"
        raise RecipeError(f"info is for adapters of this library, got {what} in '{args.adapter}'.")
    with pulled(args.adapter) as folder, open_folder(folder) as saved:
        found = describe(saved)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    backbone = found["backbone"]
    labels = truncate_list(list(map(str, found["labels"])), MAX_LABELS)
    rows = [
        ("adapter", str(args.adapter)),
        ("backbone", f"{backbone['name'] or 'not named'} ({backbone['class'] or backbone['type']})"),
        *([("revision", backbone["revision"])] if backbone["revision"] else []),
        *((name.replace("_", " "), str(value)) for name, value in found["config"].items()),
        ("labels", f"{len(found['labels'])}: {labels}" if found["labels"] else "none"),
        *((f"parameters of {name}", f"{number:,}") for name, number in found["parameters"].items()),
        ("parameters", f"{sum(found['parameters'].values()):,}"),
        ("bytes of tensors", f"{found['bytes']:,}"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def describe(saved: SavedAdapter) -> dict[str, Any]:
    """Config, labels, backbone and sizes of an adapter, for JSON."""
    default, values = PromptConfig().to_dict(), saved.config.to_dict()
    changed = {
        name: value
        for name, value in values.items()
        if name not in HIDDEN and (name in ALWAYS or value != default.get(name))
    }
    parameters: dict[str, int] = {}
    for name, shape in saved.weights.shapes.items():
        part = name.partition(".")[0]
        parameters[part] = parameters.get(part, 0) + math.prod(shape)
    is_labelled = saved.config.task_type in ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION")
    return {
        "backbone": {
            "name": saved.config.base_model_name_or_path,
            "revision": saved.config.revision,
            "class": saved.model_class,
            "type": saved.model_type,
            "layers": len(saved.widths),
        },
        "config": changed,
        "labels": list(saved.labels["id2label"].values()) if is_labelled else [],
        "parameters": parameters,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in saved.weights.tensors().values()),
    }
