"""The commands ``vpt-peft convert`` and ``python -m vpt_peft.convert``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import CheckpointError
from .checkpoint import convert
from .options import add_options


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
        allow_abbrev=False,
    )
    add_options(parser)
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """Converts a checkpoint, and prints what was read and written.

    Args:
        args: see :func:`add_options`.

    Raises:
        CheckpointError, OSError: it cannot be converted.
    """
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
    except ValueError as error:  # a VPTError, or from loading the model
        raise CheckpointError(str(error)) from error
    print(f"Read {args.checkpoint}:")
    for name, shape in result.shapes.items():
        print(f"  {name} {shape}")
    print(f"  head: {result.head}")
    print(f"  left out: {len(result.left_out)} tensors" + (f", e.g. {result.left_out[0]}" if result.left_out else ""))
    print(f"Wrote {args.output}: {result.config}")
