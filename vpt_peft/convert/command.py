"""The command ``python -m vpt_peft.convert``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config import CHOICES
from .checkpoint import convert


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: the command line; None: that of the process.

    Raises:
        SystemExit: with status 2 and a message on stderr, if an argument is invalid or :func:`convert` fails.
    """
    parser = argparse.ArgumentParser(
        "python -m vpt_peft.convert",
        description="Convert a checkpoint of the official VPT code (github.com/KMnP/vpt) to an adapter folder.",
    )
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
    args = parser.parse_args(arguments)
    try:
        result = convert(
            args.checkpoint,
            args.model,
            args.output,
            pooling=args.pooling,
            carry=not args.no_carry,
            shared=args.shared,
            keep_head=args.keep_head,
            num_labels=args.num_labels,
        )
    except (ValueError, OSError) as error:  # VPTError is a ValueError; loading the model raises either
        parser.error(str(error))
    print(f"Read {args.checkpoint}:")
    for name, shape in result.shapes.items():
        print(f"  {name} {shape}")
    print(f"  head: {result.head}")
    print(f"  left out: {len(result.left_out)} tensors" + (f", e.g. {result.left_out[0]}" if result.left_out else ""))
    print(f"Wrote {args.output}: {result.config}")
