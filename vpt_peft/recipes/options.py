"""The options of the subcommands. Importing this module loads neither torch nor transformers."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import RecipeError
from .training.methods import DEFAULT_METHOD, METHODS

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TOKEN = "VPT_PEFT_TOKEN"  # the environment variable of a server's token
DATA_HELP = "a folder with one folder of images per class, with or without train/ and test/, or a dataset on the Hub"


class Parser(argparse.ArgumentParser):
    """A parser that does not guess what abbreviations mean, and reports errors in one line with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Exits with a message and code 2."""
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: error: {one_line(message)}{end} See {self.prog} --help.\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exits because of arguments that are unknown, with the option that was probably meant."""
        options = [option for action in self._actions for option in action.option_strings]
        name = next((text for text in unknown if text.startswith("-")), unknown[0])
        similar = difflib.get_close_matches(name.partition("=")[0], options, 1)
        self.error(f"unknown argument {name}{f', did you mean {similar[0]}?' if similar else '.'}")


def one_line(message: object) -> str:
    """A message without line breaks; of an error in a worker process, without its traceback."""
    text = str(message)
    if "\nOriginal Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


# -- types ------------------------------------------------------------------------------------------------------------


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text}")
        return value

    return parse


def any_or_pixels(text: str) -> int | str:
    """The type of a height or width that may be ``any``."""
    return text if text == "any" else at_least(1)(text)


def rate(text: str) -> float:
    """The type of a learning rate, weight decay or tolerance."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def fraction(text: str) -> float:
    """The type of a share of the whole, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


# -- options ----------------------------------------------------------------------------------------------------------


def add_task(parser: argparse.ArgumentParser) -> None:
    """Adds options for model, data and augmentation."""
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="a checkpoint's name on the Hub or its folder (default: a small one is pretrained on digits)")
    add("--data", help=f"{DATA_HELP}; for segmentation, a folder with images and masks in train/ and test/")
    add("--image-column", help="default: the column with images")
    add("--label-column", help="default: the column with classes")
    add("--backbone", choices=("vit", "swin"), default="vit", help="small backbone, without --model (default: vit)")
    add(
        "--image-size",
        nargs="+",
        type=at_least(1),
        metavar="PIXELS",
        help="of a side, or height and width (default: the checkpoint's); position embeddings are interpolated",
    )
    add("--max-train-samples", type=at_least(2), metavar="N", help="use at most N training images")
    add("--min-crop", type=fraction, help="minimum area of random crops (default: 0.08, digits 0.7; segmentation 0.5)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random horizontal flips (default: yes, digits: no)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(1), help="default: 15, digits: 25")
    add("--batch-size", type=at_least(1), help="per device (default: 16, segmentation 8)")
    add("--workers", type=at_least(0), default=0, help="processes for data loading (default: 0, the main process)")
    add_device(add)
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of computing; weights are float32 in any case (default: bf16 where the device has it, else fp32)",
    )


def add_device(add: Callable[..., Any]) -> None:
    """Adds the option for the device."""
    add("--device", default="auto", help="cpu, cuda, mps, ... (default: an accelerator if there is one)")


def add_train(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``."""
    add = parser.add_argument
    add("--task", choices=("classification", "segmentation"), default="classification", help="default: %(default)s")
    add("--method", choices=METHODS, default=DEFAULT_METHOD, help="default: %(default)s; lora requires peft")
    add_task(parser)
    add("--ignore-index", type=int, default=255, help="value of unlabelled pixels in masks (default: 255)")
    add("--num-tokens", type=at_least(1), help="prompt length (default: the method's)")
    add("--last-layers", type=at_least(1), metavar="N", help="prompts in the last N layers only (default: in all)")
    add(
        "--cache-features",
        action="store_true",
        help="compute the layers below the prompts once and not in every epoch; with --last-layers or --method linear",
    )
    add("--augmentations", type=at_least(1), metavar="N", help="of each image, with --cache-features (default: 8)")
    add("--accumulate", type=at_least(1), default=1, metavar="N", help="gradient accumulation over N batches")
    add(
        "--learning-rate", type=rate, help="of all that has no rate of its own, such as prompts (default: the method's)"
    )
    add("--head-learning-rate", type=rate, help="default: the method's")
    add("--bias-learning-rate", type=rate, help="default: the method's")
    add("--weight-decay", type=rate, default=0.01, help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0], help="one run per seed (default: 0)")
    add(
        "--keep-best",
        action="store_true",
        help="keep the best epoch on the validation split, or on a tenth of the training images if there is none",
    )
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--report-to", nargs="+", default=[], metavar="NAME", help="tensorboard, wandb, ... (default: none)")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--push-to-hub", metavar="REPO", help="upload the model with its card, for example to me/beans-vpt")
    add("--private", action="store_true", help="create a private repository")
    add("--output", type=Path, default=Path("runs/train"), help="default: %(default)s")
    add_config(add)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Options of ``sweep``."""
    prompted = [name for name, method in METHODS.items() if method.config is not None and method.config.num_tokens]
    add = parser.add_argument
    add("--method", choices=prompted, default=DEFAULT_METHOD, help="default: %(default)s")
    add_task(parser)
    add("--trials", type=at_least(1), default=20, help="total number, including earlier ones (default: 20)")
    add("--most-tokens", type=at_least(1), default=50, help="maximum prompt length (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="random seed (default: 0)")
    add(
        "--ray",
        metavar="ADDRESS",
        help='search with Ray Tune at this address: "auto" on a machine of a cluster, "local" to start Ray here',
    )
    add("--cpus", type=float, default=1, help="per trial on Ray (default: %(default)s)")
    add("--gpus", type=float, default=0, help="per trial on Ray; 0.5 lets two share a GPU (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/sweep"), help="default: %(default)s")
    add_config(add)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Options of ``evaluate``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub repository of an adapter or a full model")
    add("--data", required=True, help=f"{DATA_HELP}; of a dataset with splits, the test images are used")
    add("--split", choices=("train", "validation", "test"), help="default: test, or all images without splits")
    add("--image-column", help="default: the column with images")
    add("--label-column", help="default: the column with classes")
    add("--ignore-index", type=int, default=255, help="value of unlabelled pixels in masks (default: 255)")
    add("--batch-size", type=at_least(1), default=32, help="default: %(default)s")
    add_device(add)
    add("--output", type=Path, metavar="FILE", help="also write the scores and the confusion matrix to a JSON file")


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Options of ``predict``."""
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="ADAPTER... IMAGE...",
        help="one or several adapters of one backbone, then image files, folders of images, or patterns",
    )
    add("--top-k", type=at_least(1), default=3, help="labels per image (default: %(default)s)")
    add("--format", choices=("table", "csv", "json"), default="table", help="default: %(default)s")
    add("--batch-size", type=at_least(1), default=16, help="images per pass (default: %(default)s)")
    add("--masks", type=Path, metavar="FOLDER", help="segmentation: write the predicted masks as PNG files")
    add_device(add)


def add_info(parser: argparse.ArgumentParser) -> None:
    """Options of ``info``."""
    parser.add_argument("adapter", help="folder or Hub repository of an adapter")
    parser.add_argument("--json", action="store_true", help="as JSON")


def add_explain(parser: argparse.ArgumentParser) -> None:
    """Options of ``explain``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub repository of an adapter")
    add("image", type=Path, help="an image file")
    add("--layers", type=at_least(0), nargs="+", help="layers to draw, from 0 (default: four, evenly spaced)")
    add(
        "--query",
        choices=("class", "patches"),
        help="whose attention: that of [CLS], or the mean over the patches (default: what the head reads)",
    )
    add("--output", type=Path, default=Path("explain.png"), help="the picture (default: %(default)s)")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Options of ``export``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub repository of an adapter")
    add("file", type=Path, metavar="OUT", help="the file to write: .onnx for ONNX, .pt2 for a program of torch.export")
    add(
        "--adapters",
        nargs="+",
        default=[],
        metavar="MORE",
        help="further adapters of the same backbone, __base__ for the bare backbone: the file then has an input tasks, "
        "for each image the number of its adapter, from 0",
    )
    add("--revision", help="of ADAPTER on the Hub")
    add("--probabilities", action="store_true", help="probabilities in place of logits")
    add("--normalize", action="store_true", help="take pixels from 0 to 255, which the file normalises")
    add("--batch-size", type=at_least(1), help="number of images (default: any)")
    add(
        "--image-size",
        nargs="+",
        type=any_or_pixels,
        metavar="PIXELS",
        help="height and width, or any (default: those that the backbone was made for)",
    )
    add("--int8", action="store_true", help="ONNX: linear layers in 8 bits")
    add("--compile", action="store_true", help=".pt2: compile by AOTInductor for the processor or GPU at hand")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add(
        "--tolerance",
        type=rate,
        help="largest difference permitted, relative to the largest value (default: 1e-4; 0.05 in half precision, 0.1 "
        "with --int8)",
    )


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="folders or Hub repositories of adapters of one backbone")
    add("--model", help="folder or Hub repository of the backbone (default: the one that the first adapter names)")
    add("--examples", type=Path, nargs="+", default=[], metavar="IMAGE", help="image files to choose from")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, for this machine only)")
    add("--port", type=at_least(1), default=7860, help="default: %(default)s")
    add("--share", action="store_true", help="make the page public, by a tunnel through Gradio's servers")
    add_device(add)


def add_push(parser: argparse.ArgumentParser) -> None:
    """Options of ``push``."""
    add = parser.add_argument
    add("folder", type=Path, metavar="OUT", help="output folder of train or sweep, or any adapter folder")
    add("repo", metavar="REPO", help="repository on the Hub, such as me/beans-vpt; created if it does not exist")
    add("--private", action="store_true", help="create a private repository")
    add("--handler", action="store_true", help="with the handler.py of an Inference Endpoint; of an adapter only")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Options of ``serve``."""
    add = parser.add_argument
    add("--model", required=True, help="the backbone of all adapters: a checkpoint's name on the Hub or its folder")
    add(
        "--adapters",
        nargs="+",
        required=True,
        metavar="ADAPTER",
        help="what is served, and nothing else: adapter folders, folders of adapter folders, or Hub repositories "
        "(me/birds-vpt, me/birds-vpt@revision); birds=ADAPTER gives one the name birds",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--port", type=at_least(0), default=8000, help="default: %(default)s; 0: any that is free")
    add("--token-file", type=Path, metavar="FILE", help=f"tokens that requests must carry, one a line (or {TOKEN})")
    parser.set_defaults(token_variable=TOKEN)
    add("--max-adapters", type=at_least(1), default=1000, help="adapters in memory (default: %(default)s)")
    add("--max-batch", type=at_least(1), default=32, help="images in a pass (default: %(default)s)")
    add("--max-wait-ms", type=rate, default=5.0, help="that a batch waits for more images (default: %(default)s)")
    add("--max-queue", type=at_least(1), default=1024, help="images that wait for a pass (default: %(default)s)")
    add("--max-requests", type=at_least(1), default=256, help="requests in progress (default: %(default)s)")
    add("--max-upload-mb", type=at_least(1), default=10, help="of a request, in MiB (default: %(default)s)")
    add("--max-pixels", type=at_least(1), default=50_000_000, help="of an image (default: %(default)s)")
    add("--decode-workers", type=at_least(1), default=2, help="threads that decode images (default: %(default)s)")
    add_device(add)
    add_config(add)


# -- options from a file ----------------------------------------------------------------------------------------------


def add_config(add: Callable[..., Any]) -> None:
    """Adds the option for a file of options."""
    add("--config", type=Path, metavar="FILE", help="YAML or JSON file of options; those of the command line win")


def arguments_in(file: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The options in a YAML or JSON file as arguments of the command line.

    Raises:
        RecipeError: the file cannot be read, or a key is no option of the command.
    """
    import yaml  # type: ignore[import-untyped]  # a dependency of huggingface_hub

    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"--config must be a YAML or JSON file, got '{file}', which cannot be read: {error}"
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(f"'{file}' must map options to values, got {type(values).__name__}.")
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("config", "help")
    }
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if name not in actions or name.startswith("no-"):
            similar = difflib.get_close_matches(name, actions, 1)
            hint = f", did you mean {similar[0]}?" if similar else f". Options: {', '.join(sorted(actions))}."
            raise RecipeError(f"'{file}' has the unknown option {key}{hint}")
        arguments += _arguments(name, actions[name], value, file)
    return arguments


def _arguments(name: str, action: argparse.Action, value: Any, file: Path) -> list[str]:
    if value is None:
        return []
    is_flag = action.nargs == 0
    if is_flag != isinstance(value, bool):
        expected = "true or false" if is_flag else "a value" if action.nargs is None else "a value or a list"
        raise RecipeError(f"{name} in '{file}' must be {expected}, got {value!r}.")
    if is_flag:
        negated = isinstance(action, argparse.BooleanOptionalAction) and not value
        return [f"--no-{name}"] if negated else [f"--{name}"] if value else []
    if isinstance(value, dict) or (isinstance(value, list) and action.nargs is None):
        raise RecipeError(f"{name} in '{file}' must be a single value, got {value!r}.")
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)] if action.nargs else [f"--{name}={values[0]}"]


def report(prog: str, message: object) -> None:
    """Prints a message to stderr in one line."""
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
