"""Tune a model of images and texts, such as CLIP, to classes that are given as texts, with prompts in its vision model.

    python benchmarks/zero_shot.py                                          # handwritten digits, no download
    python benchmarks/zero_shot.py --model openai/clip-vit-base-patch32 --data my-images --text "a photo of a {}"

``my-images`` contains one folder of images per class, or ``train`` and ``test`` with such folders. Each class is the
text with the name of its folder. Without options, a tiny CLIP is trained from scratch on handwritten digits, and tuned
to digits of half the contrast on a gradient, from 10 images of each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import (
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from vpt_peft import VPTError, VPTModel
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.runtime import silence_transformers
from vpt_peft.recipes.training.methods import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the loop in memory

import digit_sets
from harness import DEVICE, accuracy, check_minimum
from image_sets import ImageSet, Preprocessing, augment, load_images

NAMES = ("vpt-deep", "vpt-prefix")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT_LENGTH = 64  # SigLIP was trained on texts of this length
LAYERS = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
BATCH_SIZE = 16

Logits = Callable[[Tensor], Tensor]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="a checkpoint of CLIP, SigLIP or similar, by its name on the Hugging Face Hub or its folder")
    add("--data", help="a folder with one folder per class, with or without train/ and test/, or a dataset on the Hub")
    add("--text", default="a photo of a {}", help="text of a class, with {} for its name (default: %(default)s)")
    add("--epochs", type=int, default=40, help="default: %(default)s")
    add("--pretraining-epochs", type=int, default=15, help="of the tiny CLIP (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, default=Path("runs/zero_shot"), help="output folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data must be given together, or neither of them for the handwritten digits.")
    if "{}" not in args.text:
        parser.error(f"--text must contain {{}} for the name of a class, got {args.text!r}.")
    check_minimum(parser, args, epochs=1, pretraining_epochs=1)
    return args


def tokenize(tokenizer: Any, images: ImageSet, text: str) -> dict[str, Tensor]:
    """The model's inputs for the texts of the classes."""
    texts = [text.format(name) for name in images.class_names]
    length = min(TEXT_LENGTH, tokenizer.model_max_length)
    inputs = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return dict(inputs.to(DEVICE))


def classify_by(model: Any, texts: dict[str, Tensor]) -> Logits:
    """A function of images ``(num_images, 3, height, width)`` that returns logits ``(num_images, num_classes)``.

    The features of the texts are computed once: prompts do not change them.
    """
    with torch.no_grad():
        classes = normalize(model.get_text_features(**texts).pooler_output, dim=-1)
        scale = (model.get_base_model() if isinstance(model, VPTModel) else model).logit_scale.exp()
    return lambda images: scale * normalize(model.get_image_features(images).pooler_output, dim=-1) @ classes.T


def train(model: nn.Module, logits: Logits, images: ImageSet, epochs: int, rate: float, seed: int, title: str) -> None:
    """Trains all parameters that require gradients by the cross-entropy of the logits."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    model.train()
    for _ in tqdm(range(epochs), desc=title, unit="epoch"):
        for indices in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            batch = images.pixel_values(augment(images.images[indices], generator))
            loss = cross_entropy(logits(batch.to(DEVICE)), images.labels[indices].to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def predict(model: nn.Module, logits: Logits, images: ImageSet) -> Tensor:
    """Logits ``(num_images, num_classes)``."""
    model.eval()
    return torch.cat([logits(images.pixel_values(batch).to(DEVICE)).cpu() for batch in images.images.split(64)])


def pretrain(folder: Path, images: ImageSet, args: argparse.Namespace) -> None:
    """Trains a tiny CLIP from scratch and saves it with its tokenizer and image processor."""
    words = ("[PAD]", "[UNK]", *args.text.replace("{}", " ").split(), *WORDS)
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    words_only = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words_only.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 8}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, **special)
    torch.set_num_threads(1)  # more are no faster for such small models
    torch.manual_seed(args.seed)
    last = len(vocabulary) - 1  # CLIP reads a text at its largest token, here the name of the digit
    config = CLIPConfig(
        vision_config={**LAYERS, "image_size": digit_sets.SIZE, "patch_size": 8},
        text_config={
            **LAYERS, "vocab_size": len(vocabulary), "max_position_embeddings": 8, "eos_token_id": 2,
            "bos_token_id": last, "pad_token_id": 0,
        },
        projection_dim=64,
        initializer_factor=3.0,  # the default of 1 is for wider models
    )  # fmt: skip
    model = CLIPModel(config).to(DEVICE)
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight)  # words that differ from the beginning
    texts = tokenize(tokenizer, images, args.text)
    logits = lambda pixel_values: model(pixel_values=pixel_values, **texts).logits_per_image  # noqa: E731
    train(model, logits, images, args.pretraining_epochs, 1e-3, args.seed, "Pretraining")
    for part in (model, tokenizer, images.preprocessing.image_processor()):
        part.save_pretrained(folder)


def shade(images: Tensor) -> Tensor:
    """Images ``(num_images, 3, height, width)`` at half their contrast, on a gradient from black to grey."""
    return images // 2 + torch.linspace(0, 127, images.shape[-1]).to(torch.uint8)


def prepare(args: argparse.Namespace) -> tuple[str, ImageSet, ImageSet]:
    """The model's name or folder, training images and test images."""
    if args.model:
        return args.model, *load_images(args.data, Preprocessing.from_checkpoint(args.model), args.seed)
    first, rest = replace(digit_sets.load(), class_names=WORDS).split(0.5, args.seed)
    folder = args.output / "backbone"
    print("1. Training a tiny CLIP from scratch on handwritten digits.")
    pretrain(folder, first, args)
    few, many = replace(rest, images=shade(rest.images)).split(0.11, args.seed)
    return str(folder), few, many


def compare(name: str, train_set: ImageSet, test_set: ImageSet, args: argparse.Namespace) -> None:
    """Prints the test accuracy without and with prompts, saves the adapters, and loads them again.

    Raises:
        RecipeError: a reloaded adapter gives other logits.
    """

    def load() -> Any:
        return AutoModelForZeroShotImageClassification.from_pretrained(name, dtype=torch.float32).to(DEVICE)

    model = load()
    texts = tokenize(AutoTokenizer.from_pretrained(name), train_set, args.text)
    bare = accuracy(predict(model, classify_by(model, texts), test_set), test_set)
    rows = [("Method", "Accuracy", "Trained parameters"), ("Without training", f"{bare:.1f} %", "0")]
    for method in (METHODS[method_name] for method_name in NAMES):
        torch.manual_seed(args.seed)
        vpt = method.attach(model)
        logits = classify_by(vpt, texts)
        train(vpt, logits, train_set, args.epochs, method.learning_rate, args.seed, method.title)
        predicted = predict(vpt, logits, test_set)
        rows.append((method.title, f"{accuracy(predicted, test_set):.1f} %", f"{vpt.num_parameters(True):,}"))
        folder = args.output / method.title.lower()
        vpt.save_pretrained(folder, image_processor=train_set.preprocessing.image_processor())
        vpt.unload()
        again = VPTModel.from_pretrained(load(), folder)
        if not torch.equal(predict(again, classify_by(again, texts), test_set), predicted):
            raise RecipeError(f"The adapter reloaded from {folder} must give the same logits, got others.")
    print(f"{table(rows)}\n\nSaved the adapters in {args.output}; reloaded, they give the same logits.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    silence_transformers()
    try:
        name, train_set, test_set = prepare(args)
        classes = ", ".join(args.text.format(name) for name in train_set.class_names[:3])
        print(f"{'' if args.model else '2. '}Tuning it to {len(train_set.class_names)} classes: {classes}, ...")
        print(f"   {len(train_set)} training images, {len(test_set)} test images, {args.epochs} epochs.\n")
        compare(name, train_set, test_set, args)
    except (RecipeError, VPTError, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
