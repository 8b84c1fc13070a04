"""A training loop of your own with ``accelerate``: several devices, gradient accumulation, states to resume from.

    python examples/accelerate_loop.py                                # handwritten digits, nothing to download
    python examples/accelerate_loop.py --model google/vit-base-patch16-224-in21k --data my-images
    accelerate launch examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
    python examples/accelerate_loop.py --resume runs/accelerate/state-5

A state holds the adapter, not the backbone; what is computed behind it is what would have been without the break.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from images import DataError, ImageSet, Preprocessing, augment, load_images
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from trainer_tools import check_same_settings, chosen
from training import METHODS, Settings, be_quiet, check_least, learning_rate_factor, load_backbone

from vpt_peft import VPTError, get_vpt_model, parameter_groups

METHOD = METHODS["vpt-deep"]
KEPT = ("model", "data", "epochs", "batch_size", "accumulate", "seed")  # what a run must not change when it goes on


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and completed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="a checkpoint's name on the Hub or its folder; left out, a small ViT is pretrained on digits")
    add("--data", help="your images: a folder of class folders, with or without train/ and test/, or a Hub data set")
    add("--epochs", type=int, default=Settings.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="of each process (default: %(default)s)")
    add("--accumulate", type=int, default=2, metavar="N", help="an optimizer's step every N batches (default: 2)")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="of the computation (default: float32)")
    add("--save-every", type=int, default=5, metavar="EPOCHS", help="a state to resume from (default: 5 epochs)")
    add("--resume", type=Path, metavar="STATE", help="go on behind a state, such as runs/accelerate/state-5")
    add("--seed", type=int, default=0, help="sets everything that is random (default: 0)")
    add("--output", type=Path, default=Path("runs/accelerate"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together: give both, or neither for the handwritten digits.")
    check_least(parser, args, epochs=1, batch_size=1, accumulate=1, save_every=1, seed=0)
    if args.resume and not (args.resume / "epoch.json").is_file():
        parser.error(f"--resume must be a folder that this script saved, such as state-5, got {args.resume}.")
    return args


def prepare(accelerator: Accelerator, args: argparse.Namespace) -> tuple[str, ImageSet, ImageSet]:
    """The backbone's name or folder, and the images to train on and to test on."""
    if args.model:
        with accelerator.main_process_first():  # it downloads, the others find what it has downloaded
            return args.model, *load_images(args.data, Preprocessing.of(args.model), args.seed)
    folder = args.output / "backbone"
    if accelerator.is_main_process and not (folder / "model.safetensors").is_file():
        digits.pretrain("vit", folder, digits.PRETRAINING_EPOCHS, args.seed)
    accelerator.wait_for_everyone()
    return str(folder), *digits.new_task(args.seed)


def loader(images: ImageSet, batch_size: int, shuffle: bool) -> Any:
    """Batches of bytes and labels; what is random about images is drawn in the loop, so that a state covers it."""
    return DataLoader(TensorDataset(images.images, images.labels), batch_size, shuffle=shuffle)


def train(accelerator: Accelerator, vpt: Any, images: ImageSet, test_set: ImageSet, args: argparse.Namespace) -> Any:
    """Trains and tests. Returns the model, and the percent of the test images that it names."""
    method = METHOD if args.model else digits.SMALL_METHODS["vpt-deep"]
    groups = parameter_groups(vpt, method.learning_rate, method.head_learning_rate, Settings.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    batches, tests = loader(images, args.batch_size, True), loader(test_set, 8 * args.batch_size, False)
    vpt, optimizer, batches, tests = accelerator.prepare(vpt, optimizer, batches, tests)
    steps = args.epochs * -(-len(batches) // args.accumulate)  # known once the batches are shared out
    # Not prepared: the loop steps it once an optimizer's step, in every process.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: learning_rate_factor(step, steps))
    accelerator.register_for_checkpointing(schedule)
    done = 0
    if args.resume:
        begun = json.loads((args.resume / "epoch.json").read_text())
        check_same_settings(f"The run of {args.resume}", begun, chosen(args, KEPT))  # seeds draw the test images
        accelerator.load_state(str(args.resume))
        done = begun["epoch"]
    bar = tqdm(total=steps, initial=schedule.last_epoch, disable=not accelerator.is_main_process, unit="step")
    for epoch in range(done, args.epochs):
        vpt.train()
        batches.set_epoch(epoch)  # its order of images is a matter of the seed and the epoch
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
            save_state(accelerator, args.output / f"state-{epoch + 1}", {"epoch": epoch + 1, **chosen(args, KEPT)})
        accuracy = test(accelerator, vpt, tests, images)
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.1f} %")
    bar.close()
    return accelerator.unwrap_model(vpt), test(accelerator, vpt, tests, images)


def save_state(accelerator: Accelerator, folder: Path, begun: dict[str, Any]) -> None:
    """Everything that training goes on from: adapter, optimizer, schedule, generators, and what it is a part of."""
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        (folder / "epoch.json").write_text(json.dumps(begun))


@torch.no_grad()
def test(accelerator: Accelerator, vpt: Any, batches: Any, images: ImageSet) -> float:
    """Percent of the test images that are named, over all processes."""
    vpt.eval()
    right = []
    for pixels, labels in batches:
        predicted = vpt(pixel_values=images.pixel_values(pixels.cpu()).to(accelerator.device)).logits.argmax(-1)
        right.append(accelerator.gather_for_metrics(predicted == labels))  # without what fills up the last batch
    return 100 * torch.cat(right).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    be_quiet()
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # several processes of one CPU have to be asked for
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=loading,
    )
    try:
        backbone, train_set, test_set = prepare(accelerator, args)
        vpt = get_vpt_model(load_backbone(backbone, train_set.class_names, args.seed), METHOD.config)
        set_seed(args.seed, device_specific=True)
        vpt, accuracy = train(accelerator, vpt, train_set, test_set, args)
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    metrics = {f"accuracy, % of {len(test_set)} test images": accuracy}
    vpt.save_pretrained(args.output, is_main_process=accelerator.is_main_process, metrics=metrics)
    accelerator.print(
        f"{accuracy:.1f} % of the {len(test_set)} test images are right, with {accelerator.num_processes} processes. "
        f"Saved in {args.output}."
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
