"""A custom training loop with ``accelerate``: several devices, gradient accumulation, resumable states.

    python examples/accelerate_loop.py                                # handwritten digits, no download
    python examples/accelerate_loop.py --model google/vit-base-patch16-224-in21k --data my-images
    accelerate launch examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
    python examples/accelerate_loop.py --resume runs/accelerate/state-5

A state contains the adapter without the backbone. Resumed training gives the same result as uninterrupted training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from vpt_peft import VPTError, get_vpt_model, parameter_groups
from vpt_peft.recipes.commands.train import option_values
from vpt_peft.recipes.training.methods import METHODS, SMALL_METHODS, Method
from vpt_peft.recipes.training.models import silence_transformers
from vpt_peft.recipes.training.trainer import check_same_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the loop in memory

import digit_sets
from harness import Settings, check_minimum, learning_rate_factor, load_backbone
from image_sets import ImageSet, Preprocessing, augment, load_images

METHOD = METHODS["vpt-deep"]
RESUME_SETTINGS = ("model", "data", "epochs", "batch_size", "accumulate", "seed")  # must not change on --resume


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        help="a checkpoint's name on the Hub or its folder (default: a small ViT is pretrained on digits)",
    )
    add("--data", help="a folder with one folder per class, with or without train/ and test/, or a dataset on the Hub")
    add("--epochs", type=int, default=Settings.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="per process (default: %(default)s)")
    add("--accumulate", type=int, default=2, metavar="N", help="gradient accumulation over N batches (default: 2)")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision (default: no)")
    add("--save-every", type=int, default=5, metavar="EPOCHS", help="save a state every so many epochs (default: 5)")
    add("--resume", type=Path, metavar="STATE", help="resume from a state, such as runs/accelerate/state-5")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, default=Path("runs/accelerate"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data must be given together, or neither of them for the handwritten digit_sets.")
    check_minimum(parser, args, epochs=1, batch_size=1, accumulate=1, save_every=1, seed=0)
    if args.resume and not (args.resume / "epoch.json").is_file():
        parser.error(f"--resume must be a folder saved by this script, such as state-5, got {args.resume}.")
    return args


def prepare(accelerator: Accelerator, args: argparse.Namespace) -> tuple[str, ImageSet, ImageSet]:
    """The backbone's name or folder, training images and test images."""
    if args.model:
        with accelerator.main_process_first():  # downloads once
            return args.model, *load_images(args.data, Preprocessing.from_checkpoint(args.model), args.seed)
    folder = args.output / "backbone"
    if accelerator.is_main_process and not (folder / "model.safetensors").is_file():
        digit_sets.pretrain("vit", folder, digit_sets.PRETRAINING_EPOCHS, args.seed)
    accelerator.wait_for_everyone()
    return str(folder), *digit_sets.new_task(args.seed)


def chosen_method(args: argparse.Namespace) -> Method:
    """VPT-Deep, with learning rates for a pretrained model or for the small one."""
    return METHOD if args.model else SMALL_METHODS["vpt-deep"]


def make_loader(images: ImageSet, batch_size: int, shuffle: bool) -> Any:
    """Batches of uint8 images and labels. The loop draws augmentations, so that states contain their generator."""
    return DataLoader(TensorDataset(images.images, images.labels), batch_size, shuffle=shuffle)


def train(accelerator: Accelerator, vpt: Any, images: ImageSet, test_set: ImageSet, args: argparse.Namespace) -> Any:
    """Trains and evaluates. Returns the model and its test accuracy in percent."""
    method = chosen_method(args)
    groups = parameter_groups(vpt, **method.arguments, weight_decay=Settings.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    batches = make_loader(images, args.batch_size, shuffle=True)
    test_batches = make_loader(test_set, 8 * args.batch_size, shuffle=False)
    vpt, optimizer, batches, test_batches = accelerator.prepare(vpt, optimizer, batches, test_batches)
    steps = args.epochs * -(-len(batches) // args.accumulate)  # batches of this process
    # Not prepared: the loop steps it once per optimizer step, in every process.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: learning_rate_factor(step, steps))
    accelerator.register_for_checkpointing(schedule)
    done = 0
    if args.resume:
        saved = json.loads((args.resume / "epoch.json").read_text())
        check_same_settings(f"The run of {args.resume}", saved, option_values(args, list(RESUME_SETTINGS)))
        accelerator.load_state(str(args.resume))
        done = saved["epoch"]
    bar = tqdm(total=steps, initial=schedule.last_epoch, disable=not accelerator.is_main_process, unit="step")
    for epoch in range(done, args.epochs):
        vpt.train()
        batches.set_epoch(epoch)  # the shuffling depends on seed and epoch
        for pixels, labels in batches:
            with accelerator.accumulate(vpt):
                augmented = augment(pixels.cpu(), torch.default_generator)
                loss = vpt(pixel_values=images.pixel_values(augmented).to(accelerator.device), labels=labels).loss
                accelerator.backward(loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    schedule.step()
                    bar.update()
                optimizer.zero_grad()
        if (epoch + 1) % args.save_every == 0:
            settings = option_values(args, list(RESUME_SETTINGS))
            save_state(accelerator, args.output / f"state-{epoch + 1}", {"epoch": epoch + 1, **settings})
        accuracy = evaluate(accelerator, vpt, test_batches, images)
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.1f} %")
    bar.close()
    return accelerator.unwrap_model(vpt), evaluate(accelerator, vpt, test_batches, images)


def save_state(accelerator: Accelerator, folder: Path, progress: dict[str, Any]) -> None:
    """Saves adapter, optimizer, schedule, random generators, the epoch and the settings."""
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        (folder / "epoch.json").write_text(json.dumps(progress))


@torch.no_grad()
def evaluate(accelerator: Accelerator, vpt: Any, batches: Any, images: ImageSet) -> float:
    """Test accuracy in percent, over all processes."""
    vpt.eval()
    correct = []
    for pixels, labels in batches:
        predicted = vpt(pixel_values=images.pixel_values(pixels.cpu()).to(accelerator.device)).logits.argmax(-1)
        correct.append(accelerator.gather_for_metrics(predicted == labels))  # without padding of the last batch
    return 100 * torch.cat(correct).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    silence_transformers()
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # required for several processes on a CPU
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=loading,
    )
    try:
        backbone, train_set, test_set = prepare(accelerator, args)
        vpt = get_vpt_model(load_backbone(backbone, train_set.class_names, args.seed), METHOD.config)
        set_seed(args.seed, device_specific=True)
        vpt, accuracy = train(accelerator, vpt, train_set, test_set, args)
    except (VPTError, OSError) as error:
        sys.exit(str(error))
    metrics = {f"accuracy, % of {len(test_set)} test images": accuracy}
    vpt.save_pretrained(
        args.output,
        image_processor=train_set.preprocessing.image_processor(),
        is_main_process=accelerator.is_main_process,
        metrics=metrics,
        hyperparameters={
            "epochs": args.epochs,
            "batch size": args.batch_size * args.accumulate * accelerator.num_processes,
            **chosen_method(args).rates,
            "weight decay": Settings.weight_decay,
            "precision": args.precision,
            "seed": args.seed,
        },
    )
    accelerator.print(
        f"Test accuracy {accuracy:.1f} % on {len(test_set)} images, with {accelerator.num_processes} processes. "
        f"Saved in {args.output}."
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
