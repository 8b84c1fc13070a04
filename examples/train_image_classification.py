"""Fine-tune a vision transformer for image classification with ``transformers.Trainer``.

    python examples/train_image_classification.py                     # handwritten digits, no download
    python examples/train_image_classification.py --model google/vit-base-patch16-224-in21k --data my-images
    python examples/train_image_classification.py --model microsoft/swin-tiny-patch4-window7-224 --data beans \\
        --method vpt-shallow --seeds 0 1 2 --precision bf16 --push-to-hub me/beans-vpt

``my-images`` contains one folder of images per class, or ``train`` and ``test`` with such folders. The output folder
contains the first seed's adapter with image processor and model card, ``results.json``, a learning curve, a confusion
matrix and, in one folder per seed, Trainer's checkpoints without the backbone. ``torchrun`` runs it on several devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import digits
from accelerate import PartialState
from classification_output import Report, Run
from images import DataError
from trainer_data import DatasetDict, split
from trainer_task import Task, add_options, set_defaults
from trainer_tools import (
    PRECISIONS,
    Throughput,
    check_same_settings,
    compute_accuracy,
    last_checkpoint,
    option_values,
    peak_memory,
    training_arguments,
    use_short_progress,
)
from training import METHODS, Method, Settings, check_minimum, learning_rate, load_backbone, silence_transformers
from transformers import Trainer

from vpt_peft import VPTError, adamw, get_vpt_model


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    add = parser.add_argument
    add("--method", choices=METHODS, default="vpt-deep", help="default: %(default)s")
    add("--num-tokens", type=int, help="prompt length (default: the method's)")
    add("--accumulate", type=int, default=1, metavar="N", help="gradient accumulation over N batches (default: 1)")
    add("--learning-rate", type=learning_rate, help="default: the method's")
    add("--head-learning-rate", type=learning_rate, help="default: --learning-rate if given, else the method's")
    add("--weight-decay", type=float, default=Settings.weight_decay, help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0], help="one run per seed (default: 0)")
    add("--keep-best", action="store_true", help="keep the best epoch on a tenth of the training images")
    add("--precision", choices=PRECISIONS, default="fp32", help="mixed precision (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--workers", type=int, default=0, help="processes for data loading (default: 0, the main process)")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--push-to-hub", metavar="REPO", help="upload the model with its card, for example to me/beans-vpt")
    add("--private", action="store_true", help="create a private repository")
    add("--output", type=Path, default=Path("runs/train"), help="default: %(default)s")
    args = set_defaults(parser, parser.parse_args(argv))
    check_minimum(parser, args, accumulate=1, workers=0)
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds must be different and at least 0, got {' '.join(map(str, args.seeds))}.")
    if not args.resume and any(args.output.glob("seed-*/checkpoint-*")):
        parser.error(f"{args.output} already contains a run. Add --resume to continue it, or choose another --output.")
    return args


def check_settings(args: argparse.Namespace, task: Task) -> None:
    """Checks the settings of a resumed run against those saved in the output folder, and saves them for a new run."""
    excluded = ("seeds", "resume", "workers", "push_to_hub", "private", "output")
    file = args.output / "settings.json"
    current = option_values(args, [name for name in vars(args) if name not in excluded])
    current |= {"first seed": args.seeds[0], **task.contents}  # the first seed determines the test split
    state = PartialState()
    with state.main_process_first():
        saved = json.loads(file.read_text(encoding="utf-8")) if args.resume and file.is_file() else current
        check_same_settings(f"The run in {args.output}", saved, current)
        if state.is_main_process:
            args.output.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(current, indent=1), encoding="utf-8")


def build_method(args: argparse.Namespace) -> Method:
    """The method with the settings of the command line."""
    methods = METHODS if args.model else METHODS | digits.SMALL_METHODS
    method = methods[args.method].with_rates(args.learning_rate, args.head_learning_rate)
    config = method.config
    if args.num_tokens is not None:
        if config is None or config.num_tokens == 0:
            raise DataError(f"--num-tokens requires a method with prompts, got --method {args.method}.")
        config = dataclasses.replace(config, num_tokens=args.num_tokens)
    return dataclasses.replace(method, config=config)


def run(args: argparse.Namespace, method: Method, task: Task, splits: DatasetDict, seed: int) -> Run:
    """Trains and evaluates with one seed."""
    model = load_backbone(task.backbone, task.class_names, seed)
    tuned = model if method.config is None else get_vpt_model(model, method.config)
    folder = args.output / f"seed-{seed}"
    settings = training_arguments(
        output_dir=str(folder),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4 * args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=args.keep_best,
        metric_for_best_model="accuracy" if args.keep_best else None,
        seed=seed,
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        dataloader_num_workers=args.workers,
    )
    throughput = Throughput()
    trainer = Trainer(
        tuned,
        settings,
        train_dataset=task.for_training(splits["train"]),
        eval_dataset=task.for_testing(splits["validation" if args.keep_best else "test"]),
        compute_metrics=compute_accuracy,
        optimizer_cls_and_kwargs=adamw(tuned, **method.arguments, weight_decay=args.weight_decay),
        callbacks=[throughput],
    )
    use_short_progress(trainer, f"{method.title}, seed {seed}").train(
        resume_from_checkpoint=last_checkpoint(folder) if args.resume else None
    )
    tested = trainer.predict(task.for_testing(splits["test"]))
    memory, kind = peak_memory()
    return Run(
        seed=seed,
        accuracy=tested.metrics["test_accuracy"],
        loss=tested.metrics["test_loss"],
        parameters=sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad),
        images_per_second=throughput.images_per_second(len(splits["train"]), trainer.state.max_steps / args.epochs),
        seconds=throughput.seconds,
        memory_mib=memory,
        memory_of=kind,
        history=trainer.state.log_history,
        predictions=tested.predictions.argmax(-1).tolist(),
        labels=tested.label_ids.tolist(),
        model=tuned,
        main=trainer.is_world_process_zero(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    silence_transformers()
    try:
        method = build_method(args)
        task = Task.load(args, args.seeds[0])
        check_settings(args, task)
        splits = task.splits
        if args.keep_best:
            parts = split(splits["train"], 0.1, args.seeds[0])
            splits = DatasetDict(train=parts["train"], validation=parts["test"], test=splits["test"])
        report = Report(args, method, task, splits)
        for seed in args.seeds:
            report.add(run(args, method, task, splits, seed))
        report.finish()
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
