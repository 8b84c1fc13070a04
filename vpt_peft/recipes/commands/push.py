"""``vpt-peft push``: uploads a fine-tuned model with its card to the Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ...hub import is_folder
from ...model import VPTModel
from ..errors import RecipeError
from ..runtime import silence_transformers
from ..training.models import Tuned, peft_type
from ..training.repository import Repository


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    silence_transformers()
    folder: Path = args.folder
    if not is_folder(folder):
        raise RecipeError(f"OUT must be the output folder of a training, got '{folder}', which is not a folder.")
    kind = peft_type(str(folder))
    if kind is None and not (folder / "config.json").is_file():
        raise RecipeError(f"'{folder}' must contain an adapter or a model, got neither. Give the folder of --output.")
    details = card_details(folder)
    if kind == "VPT":
        tuned = Tuned.load(str(folder), torch.device("cpu"))
        assert isinstance(tuned.model, VPTModel)
        repository = Repository(args.repo, args.private, for_adapter=True)
        url = repository.push_adapter(tuned.model, tuned.processor, details, args.handler)
    elif args.handler:
        raise RecipeError(f"--handler is for adapters of this library, got '{folder}', which has none. Leave it out.")
    else:
        url = Repository(args.repo, args.private, for_adapter=False).push_folder(folder)
    print(f"Pushed to {url}")


def card_details(folder: Path) -> dict[str, Any]:
    """What the card says about training, from the results of a run; nothing without them."""
    file = folder / "results.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).get("card") or {})
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"'{file}' must be the JSON file of a run, but cannot be read: {error}") from error
