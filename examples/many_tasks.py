"""Train adapters for several tasks on one frozen backbone, then run a mixed batch: one task per image.

    python examples/many_tasks.py                   # handwritten digits, no download

Each task has its own prompts, head and labels. Here, tasks differ in prompt depth, prompt length and number of labels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from vpt_peft import PromptConfig, VPTModel, get_vpt_model
from vpt_peft.recipes.data.digits import NEW
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.training.methods import SMALL_METHODS, Method
from vpt_peft.recipes.training.models import silence_transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the loop in memory

import digit_sets
from harness import DEVICE, Settings, accuracy, load_backbone, predict, train
from image_sets import ImageSet

TOLERANCE = 1e-4  # for logits; a different order of summation changes them by about 1e-6
SHADES = " .:*#@"
COLUMNS = 4


@dataclass(frozen=True)
class Task:
    """A question about a digit, its answers with the digits that they apply to, and the training method."""

    question: str
    answers: Mapping[str, Sequence[int]]
    method: Method


DEEP = SMALL_METHODS["vpt-deep"]
LONG = replace(SMALL_METHODS["vpt-shallow"], config=PromptConfig(num_tokens=20, deep=False))
TASKS = {
    "digit": Task("Which digit is it?", {str(digit): [digit] for digit in NEW}, DEEP),
    "parity": Task("Is it even?", {"even": [6, 8], "odd": [5, 7, 9]}, replace(DEEP, config=PromptConfig(num_tokens=5))),
    "loop": Task("Has it a loop?", {"loop": [6, 8, 9], "no loop": [5, 7]}, LONG),
    "size": Task("How large is it?", {"5 or 6": [5, 6], "7": [7], "8 or 9": [8, 9]}, SMALL_METHODS["linear"]),
}


def relabel(task: Task, images: ImageSet) -> ImageSet:
    """The same images with the labels of a task."""
    answers = {str(digit): label for label, group in enumerate(task.answers.values()) for digit in group}
    labels = torch.tensor([answers[images.class_names[label]] for label in images.labels.tolist()])
    return replace(images, labels=labels, class_names=tuple(task.answers))


def train_adapters(model: Any, train_set: ImageSet, test_set: ImageSet, args: argparse.Namespace) -> VPTModel:
    """Trains the adapters one after the other on the same backbone, and prints their accuracy."""
    vpt: VPTModel | None = None
    rows = [("Task", "Question", "Labels", "Prompts", "Trained parameters", "Accuracy")]
    for name, task in TASKS.items():
        config, labels = task.method.config, list(task.answers)
        assert config is not None
        torch.manual_seed(args.seed)
        if vpt is None:
            vpt = get_vpt_model(model, config, adapter_name=name)  # labels: the model's
        else:
            id2label = dict(enumerate(labels))
            label2id = {label: number for number, label in id2label.items()}
            vpt.add_adapter(name, config, num_labels=len(labels), id2label=id2label, label2id=label2id)
        vpt.set_adapter(name)  # the adapter that is trained and used
        train(vpt, relabel(task, train_set), Settings(args.epochs), replace(task.method, title=name), args.seed)
        test_accuracy = accuracy(predict(vpt, relabel(task, test_set)), relabel(task, test_set))
        kind = f"{config.num_tokens} {'per layer' if config.deep else 'at layer 0'}" if config.num_tokens else "none"
        parameters = vpt.get_nb_trainable_parameters()[0]
        rows.append((name, task.question, str(len(labels)), kind, f"{parameters:,}", f"{test_accuracy:.1f} %"))
    assert vpt is not None
    print(f"\n{table(rows)}\n")
    return vpt


@torch.inference_mode()
def predict_mixed(vpt: VPTModel, pixel_values: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Logits of each image from its own task, in one pass. Padding after a task's own labels is removed."""
    output = vpt(pixel_values, adapter_names=names)
    rows = zip(output.logits, output.num_labels.tolist(), strict=True)
    return [logits[:num_labels] for logits, num_labels in rows]


@torch.inference_mode()
def predict_per_task(vpt: VPTModel, pixel_values: Tensor, names: Sequence[str]) -> list[Tensor]:
    """The same with one pass per task."""
    answers: dict[int, Tensor] = {}
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        vpt.set_adapter(name)
        answers |= zip(rows, vpt(pixel_values[rows]).logits, strict=True)
    return [answers[row] for row in range(len(names))]


def to_ascii(image: Tensor) -> list[str]:
    """Renders a digit, uint8 ``(3, 32, 32)``, as 8 lines of 16 characters."""
    pixels = image.float().mean(0).unflatten(0, (8, -1)).unflatten(2, (8, -1)).mean((1, 3)) / 256
    return ["".join(2 * SHADES[int(value * len(SHADES))] for value in line) for line in pixels.tolist()]


def print_predictions(batch: ImageSet, names: Sequence[str], answers: Sequence[Tensor], vpt: VPTModel) -> None:
    """Prints each image with its task, the predicted and the true label."""
    cells = []
    for row, (name, logits) in enumerate(zip(names, answers, strict=True)):
        vpt.set_adapter(name)
        answer = vpt.config.id2label[int(logits.argmax())]  # labels of the active adapter
        labelled = relabel(TASKS[name], batch)
        truth = labelled.class_names[labelled.labels[row]]
        mark = "" if answer == truth else "  WRONG"
        cells.append([*to_ascii(batch.images[row]), f"task:   {name}", f"answer: {answer}{mark}", f"truth:  {truth}"])
    for start in range(0, len(cells), COLUMNS):
        for line in zip(*cells[start : start + COLUMNS], strict=True):
            print("   " + "  ".join(cell.ljust(20) for cell in line).rstrip())
        print()


def load_adapters(backbone: Path, folder: Path) -> VPTModel:
    """Loads all adapters onto one fresh backbone."""
    fresh = AutoModelForImageClassification.from_pretrained(backbone, dtype=torch.float32).to(DEVICE)
    first, *others = TASKS
    vpt = VPTModel.from_pretrained(fresh, folder / first, adapter_name=first)
    for name in others:
        vpt.load_adapter(folder / name, name)
    return vpt


def size(folder: Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def run(args: argparse.Namespace) -> None:
    """Pretrains a backbone, trains the adapters, runs a mixed batch, saves the adapters and reloads them."""
    backbone, adapters = args.output / "backbone", args.output / "adapters"
    print("1. Pretraining a small ViT on the handwritten digits 0 to 4.")
    test_accuracy = digit_sets.pretrain("vit", backbone, args.pretraining_epochs, args.seed)
    print(f"   Test accuracy {test_accuracy:.1f} %. Saved in {backbone}.\n")

    train_set, test_set = digit_sets.new_task(args.seed)
    print(f"2. Training {len(TASKS)} adapters on the frozen backbone: {len(train_set)} images of the digits 5 to 9.")
    model = load_backbone(str(backbone), list(next(iter(TASKS.values())).answers), args.seed)
    vpt = train_adapters(model, train_set, test_set, args)

    indices = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    batch = test_set.select(indices)
    names = [list(TASKS)[row % len(TASKS)] for row in range(len(batch))]
    pixel_values = batch.pixel_values(batch.images).to(DEVICE)
    print(f"3. A mixed batch of {len(batch)} test images: vpt(pixel_values, adapter_names={names[:COLUMNS]} + ...)")
    mixed = predict_mixed(vpt, pixel_values, names)
    print_predictions(batch, names, mixed, vpt)
    separate = predict_per_task(vpt, pixel_values, names)
    difference = max((one - other).abs().max().item() for one, other in zip(mixed, separate, strict=True))
    if difference > TOLERANCE:
        sys.exit(f"Logits of the mixed batch differ by {difference} from those of one pass per task.")
    print(f"   Maximum difference to the logits of one pass per task ({len(set(names))} passes): {difference:.0e}.\n")

    vpt.save_pretrained(adapters, image_processor=train_set.preprocessing.image_processor())
    loaded = predict_mixed(load_adapters(backbone, adapters), pixel_values, names)
    if not all(torch.equal(one, other) for one, other in zip(mixed, loaded, strict=True)):
        sys.exit("Logits of the reloaded adapters differ from those before saving.")
    print(f"4. Saved all adapters in {adapters}: {size(adapters):,} bytes (backbone: {size(backbone):,} bytes).")
    print("   Reloaded onto a fresh backbone: logits of the mixed batch are bit-identical.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=int, default=15, help="per task (default: %(default)s)")
    add("--pretraining-epochs", type=int, default=digit_sets.PRETRAINING_EPOCHS, help="default: %(default)s")
    add("--images", type=int, default=8, help="images in the mixed batch (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, default=Path("runs", "many-tasks"), help="output folder (default: %(default)s)")
    silence_transformers()
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
