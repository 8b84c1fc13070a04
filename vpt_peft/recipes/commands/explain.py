"""``vpt-peft explain``: a picture of what prompts do to the attention to an image."""

from __future__ import annotations

import argparse

import torch

from ...explanation import explain
from ..report.tables import table
from ..runtime import silence_transformers
from ..sources import check_source


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    silence_transformers()
    check_source(args.adapter)
    explanation = explain(args.adapter, args.image, args.layers, args.output, args.query, dtype=torch.float32)
    rows = [("Layer", "Attention to the prompts")]
    for index, layer in zip(explanation.layers, explanation.with_adapter, strict=True):
        share = layer.prompt_share
        rows.append((str(index), "no prompts" if share is None else f"{100 * share:.1f} %"))
    print(table(rows))
    print(f"Saved in {args.output}.")
