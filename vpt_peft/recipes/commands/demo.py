"""``vpt-peft demo``: a page that shows the labels of an image in several tasks, and the attention to it."""

from __future__ import annotations

import argparse

from ...deploy.demo import Tasks, build_page, launch
from ..errors import RecipeError
from ..runtime import choose_device, silence_transformers


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    silence_transformers()
    missing = [str(file) for file in args.examples if not file.is_file()]
    if missing:
        raise RecipeError(f"--examples must be image files, got {', '.join(missing)}, which there are not.")
    tasks = Tasks(args.adapters, args.model, choose_device(args.device))
    page = build_page(tasks, args.examples)
    print(f"The page is at {launch(page, args.host, args.port, args.share)} until you press Ctrl+C.", flush=True)
    page.block_thread()
