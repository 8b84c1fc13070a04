"""``vpt-peft train``: fine-tunes a vision transformer on a folder of images, or a dataset on the Hub.

The output folder contains the first seed's adapter with image processor and model card, ``results.json``, a learning
curve, a confusion matrix and, in one folder per seed, Trainer's checkpoints without the backbone. ``torchrun`` runs it
on several devices: ``torchrun --nproc-per-node 2 -m vpt_peft train ...``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ...model import VPTModel
from ...training import cache_features
from ..errors import RecipeError
from ..runtime import choose_first_device, choose_precision, silence_transformers
from ..training.methods import Method
from ..training.output import Report, Run
from ..training.task import Task, display_name, set_defaults
from ..training.trainer import (
    NextAugmentations,
    RecipeTrainer,
    Settings,
    Throughput,
    check_same_settings,
    last_checkpoint,
    names_of,
    peak_memory,
)

VALIDATION_SHARE = 0.1
AUGMENTATIONS = 8  # of cached features
FEATURES = "features"
RESULTS = ("results.json", "adapter_config.json", "config.json")
# Options that may change when a run is continued.
FREE_OPTIONS = (
    "seeds", "resume", "workers", "push_to_hub", "private", "output", "device", "report_to", "command_line", "config",
    "command",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    silence_transformers()
    set_defaults(args)
    settings = settings_of(args)
    check_output(args, settings)
    try:
        task = Task.load(args, settings, args.seeds[0])
        method = method_of(args, task)
        check_settings(args, task)
        args.keep_best = args.keep_best or "validation" in task.splits
        if args.keep_best:
            task = task.with_validation(VALIDATION_SHARE, args.seeds[0])
        report = Report(args, method, task, settings)
        for seed in args.seeds:
            report.add(train(args, settings, method, task, seed))
        report.finish()
        if settings.process_state().is_main_process:
            shutil.rmtree(args.output / FEATURES, ignore_errors=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(args)) from None


def train(args: argparse.Namespace, settings: Settings, method: Method, task: Task, seed: int) -> Run:
    """Trains and evaluates with one seed."""
    backbone = task.load_backbone(seed, settings)
    if args.last_layers is not None:
        method = method.in_last_layers(args.last_layers, backbone)
    tuned = task.attach(method, backbone)
    train_set, eval_set = data_sets(args, settings, task, tuned)
    folder = args.output / f"seed-{seed}"
    score = "mean_iou" if task.kind == "segmentation" else "accuracy"
    rows = task.splits["train"]
    throughput = Throughput()
    trainer = RecipeTrainer(
        tuned,
        settings.arguments(
            folder,
            seed,
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=args.keep_best,
            metric_for_best_model=score if args.keep_best else None,
            dataloader_drop_last=task.drops_last(settings),
        ),
        train_dataset=train_set,
        eval_dataset=eval_set,
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": method.parameter_groups(tuned, settings.weight_decay)},
        ),
        callbacks=[throughput, NextAugmentations()],
        metric=task.metric(),
        title=f"{method.title}, seed {seed}",
    )
    checkpoint = last_checkpoint(folder) if args.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    history = list(trainer.state.log_history)
    tested = trainer.evaluate(task.for_testing(task.splits["test"]), metric_key_prefix="test")
    memory, kind = peak_memory(settings.device)
    return Run(
        seed=seed,
        scores=trainer.metric.scores,
        loss=tested["test_loss"],
        parameters=sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad),
        images_per_second=throughput.images_per_second(len(rows), trainer.state.max_steps / settings.epochs),
        seconds=throughput.seconds,
        memory_mib=memory,
        memory_of=kind,
        history=history,
        model=tuned,
        main=trainer.is_world_process_zero(),
    )


def data_sets(args: argparse.Namespace, settings: Settings, task: Task, tuned: Any) -> tuple[Any, Any]:
    """The images to train on, and those to evaluate each epoch on; with ``--cache-features``, their features.

    Raises:
        RecipeError: there is no adapter, or it changes all layers.
    """
    evaluated = task.splits["validation" if args.keep_best else "test"]
    sets = {"train": task.for_training(task.splits["train"]), "evaluation": task.for_testing(evaluated)}
    if args.cache_features:
        if not isinstance(tuned, VPTModel) or tuned.active_config.bias != "none" or 0 in tuned.routes:
            layers = "" if args.last_layers is None else f" --last-layers {args.last_layers}"
            raise RecipeError(
                "--cache-features requires an adapter that leaves the lower layers unchanged, got --method "
                f"{args.method}{layers}. Use --method linear, or --method vpt-prefix --last-layers 3."
            )
        draws = {"train": min(args.augmentations or AUGMENTATIONS, settings.epochs), "evaluation": 1}  # one an epoch
        with settings.autocast():
            for name, images in sets.items():
                folder, batch_size = args.output / FEATURES / name, 4 * settings.batch_size
                sets[name] = cache_features(tuned, images, folder, draws[name], batch_size, workers=settings.workers)
    return sets["train"], sets["evaluation"]


def settings_of(args: argparse.Namespace) -> Settings:
    """The training settings of the command line, for the device that there is."""
    device = choose_first_device(args.device)
    precision = choose_precision(args.precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("--precision fp16 needs an accelerator. Use bf16 or fp32 on a CPU.")
    return Settings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        accumulate=getattr(args, "accumulate", 1),
        weight_decay=getattr(args, "weight_decay", Settings.weight_decay),
        precision=precision,
        gradient_checkpointing=getattr(args, "gradient_checkpointing", False),
        workers=args.workers,
        report_to=names_of(getattr(args, "report_to", [])),
        device=device,
    )


def method_of(args: argparse.Namespace, task: Task) -> Method:
    """The method with the settings of the command line."""
    names = ("learning_rate", "head_learning_rate", "bias_learning_rate")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    method = replace(task.methods[args.method], **given)
    return method if args.num_tokens is None else method.with_tokens(args.num_tokens)


def check_output(args: argparse.Namespace, settings: Settings) -> None:
    """Checks that a run can be written to the output folder.

    Raises:
        RecipeError: it cannot, or the folder already contains a run.
    """
    output: Path = args.output
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise RecipeError(f"--seeds must be different and at least 0, got {' '.join(map(str, args.seeds))}.")
    if not args.resume and settings.process_state().is_main_process:
        found = any(output.glob("seed-*/checkpoint-*")) or any((output / name).exists() for name in RESULTS)
        if found:
            raise RecipeError(
                f"{output} already contains a run. Add --resume to continue it, or choose another --output."
            )
    check_writable(output)


def check_writable(folder: Path) -> None:
    """Creates a folder. Raises RecipeError if files cannot be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"--output must be a folder that can be written to, got '{folder}': {error}.") from error


def check_settings(args: argparse.Namespace, task: Task) -> None:
    """Checks the settings of a resumed run against those saved in the output folder, and saves them for a new run."""
    file = args.output / "settings.json"
    names = [name for name in vars(args) if name not in FREE_OPTIONS]
    current = option_values(args, names) | {"first seed": args.seeds[0], **task.contents}  # it draws the test split
    state = PartialState()
    with state.main_process_first():
        saved = json.loads(file.read_text(encoding="utf-8")) if args.resume and file.is_file() else current
        check_same_settings(f"The run in {args.output}", saved, current)
        if state.is_main_process:
            file.write_text(json.dumps(current, indent=1), encoding="utf-8")


def option_values(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Values of options. Of the folders of model and data, only the names, without paths of this machine."""
    values = {name: getattr(args, name) for name in names}
    return values | {name: values[name] and display_name(values[name]) for name in ("model", "data")}


def how_to_go_on(args: argparse.Namespace) -> str:
    """What to do after an interruption."""
    command: str = args.command_line
    if any(args.output.glob("seed-*/checkpoint-*")):
        resumed = command if "--resume" in command.split() else f"{command} --resume"
        return f"Interrupted. Finished epochs are saved; to go on: {resumed}"
    return f"Interrupted before the end of the first epoch. To start again: {command}"
