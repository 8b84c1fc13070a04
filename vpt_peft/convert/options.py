"""The options of the command. Importing this module loads no torch."""

from __future__ import annotations

import argparse

from ..config import CHOICES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    parser.add_argument("checkpoint", help="prompt_ep*.pth, or the state dict of a model as .pth or .safetensors")
    parser.add_argument("--model", required=True, help="name or folder of the backbone, an image classification model")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write the adapter to")
    parser.add_argument("--num-labels", type=int, help="number of labels; with --keep-head, of a new head")
    parser.add_argument(
        "--pooling", choices=CHOICES["pooling"], help="input of the head, if not the official code's default"
    )
    parser.add_argument("--keep-head", action="store_true", help="use the model's head, not the checkpoint's")
    parser.add_argument("--shared", action="store_true", help="the checkpoint was trained with DEEP_SHARED")
    parser.add_argument("--no-carry", action="store_true", help="the checkpoint was trained with FORWARD_DEEP_NOEXPAND")
