"""The command ``vpt-peft``: its subcommands, and what happens to their errors.

Importing this module, and printing the help, loads neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from ..convert.options import add_options as add_convert
from ..errors import VPTError
from ..version import __version__
from . import options
from .errors import RecipeError

PROG = "vpt-peft"
FAILED, INTERRUPTED = 2, 130  # exit codes
EXTRAS = {  # what to install for a package; others come with vpt-peft[train]
    "gradio": "vpt-peft[demo]",
    "ray": "ray[tune]",
    **dict.fromkeys(("fastapi", "prometheus_client", "python_multipart", "uvicorn"), "vpt-peft[serve]"),
}


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        add_options: adds its options to a parser.
        module: has the function ``run(args)``, and is imported when the command is run.
    """

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    module: str


COMMANDS = {
    "train": Command("fine-tune a model on images", options.add_train, "vpt_peft.recipes.commands.train"),
    "sweep": Command("search for the best hyperparameters", options.add_sweep, "vpt_peft.recipes.commands.sweep"),
    "evaluate": Command("measure an adapter on images", options.add_evaluate, "vpt_peft.recipes.commands.evaluate"),
    "predict": Command("label images", options.add_predict, "vpt_peft.recipes.commands.predict"),
    "explain": Command(
        "draw what prompts do to the attention", options.add_explain, "vpt_peft.recipes.commands.explain"
    ),
    "info": Command("show what an adapter is", options.add_info, "vpt_peft.recipes.commands.info"),
    "convert": Command("convert a checkpoint of the official VPT code", add_convert, "vpt_peft.convert.command"),
    "export": Command("write adapters as ONNX or torch.export", options.add_export, "vpt_peft.recipes.commands.export"),
    "demo": Command("show labels and attention on a page", options.add_demo, "vpt_peft.recipes.commands.demo"),
    "serve": Command("serve adapters of one backbone over HTTP", options.add_serve, "vpt_peft.recipes.commands.serve"),
    "push": Command("upload a fine-tuned model to the Hub", options.add_push, "vpt_peft.recipes.commands.push"),
}


def build_parsers() -> tuple[options.Parser, dict[str, options.Parser]]:
    """The parser of the command, and those of the subcommands."""
    parser = options.Parser(PROG, description="Visual Prompt Tuning: from a folder of images to an answer.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    found = {}
    for name, command in COMMANDS.items():
        found[name] = subparsers.add_parser(name, help=command.help, description=f"{command.help.capitalize()}.")
        command.add_options(found[name])
    return parser, found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line, with the options of its ``--config`` file.

    Raises:
        SystemExit: with code 2 and a message on stderr, if an argument is wrong.
    """
    parser, subparsers = build_parsers()
    args, unknown = parser.parse_known_args(argv)
    subparser = subparsers[args.command]
    if unknown:
        subparser.refuse(unknown)
    if getattr(args, "config", None) is not None:
        try:
            from_file = options.arguments_in(args.config, subparser)
        except RecipeError as error:
            subparser.error(str(error))
        args = parser.parse_args([args.command, *from_file, *argv[1:]])
    args.command_line = shlex.join([PROG, *argv])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the command line; None: that of the process.

    Returns:
        The exit code: 0, 2 after an error that is told in one line, or 130 after an interruption.
    """
    args = parse(list(sys.argv[1:] if argv is None else argv))
    prog = f"{PROG} {args.command}"
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # for those who maintain our dependencies
                warnings.simplefilter("ignore", category)
            warnings.showwarning = lambda message, *_, **__: options.report(f"{prog}: warning", message)
            command = import_module(COMMANDS[args.command].module)
            from .sources import hub_settings  # here, since it imports torch

            with hub_settings():
                command.run(args)
    except KeyboardInterrupt as interrupt:
        options.report(prog, interrupt if str(interrupt) else "Interrupted.")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "vpt_peft").partition(".")[0] == "vpt_peft":
            raise
        extra = EXTRAS.get(str(error.name), "vpt-peft[train]")
        problem: object = f"this command needs the package {error.name}: pip install '{extra}'"
    except ImportError as error:
        if error.name is not None:
            raise
        problem = error  # our own, which says what to install
    except (VPTError, OSError) as error:
        problem = error
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        problem = f"out of memory: use a smaller --batch-size with --accumulate, or --gradient-checkpointing: {error}"
    else:
        return 0
    options.report(f"{prog}: error", problem)
    return FAILED
