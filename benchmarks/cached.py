"""Training steps from cached features and from pixels, and the size of the cache.

    python benchmarks/cached.py --backbone deit-tiny vit-b16 --output benchmarks/results/cached-cpu.json

Weights and images are random, nothing is downloaded. A step reads a batch, from disk if it is cached, and is followed
by the backward pass and a step of AdamW; pixels are in memory, without the time to decode them. All steps are
interleaved in one process, on one thread, and measured as CPU time; a ratio is the median over rounds of the ratio
within a round. With the same batches, it is also the ratio of epochs, after the first one, in which features are
computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from speed import LABELS, environment, share_weights
from torch.utils.data import default_collate
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from vpt_peft import PromptConfig, VPTModel, adamw, get_vpt_model
from vpt_peft.backbones import find_backbone
from vpt_peft.recipes.report.tables import table
from vpt_peft.training import cache_features

TINY = {"num_labels": LABELS, "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
BACKBONES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "deit-tiny": (
        ViTForImageClassification,
        ViTConfig(num_labels=LABELS, hidden_size=192, num_attention_heads=3, intermediate_size=768),
    ),
    "vit-b16": (ViTForImageClassification, ViTConfig(num_labels=LABELS)),
    "swin-t": (SwinForImageClassification, SwinConfig(num_labels=LABELS)),
    "tiny-vit": (ViTForImageClassification, ViTConfig(**TINY, num_hidden_layers=4, num_attention_heads=2)),
}
NUM_TOKENS = 10
VARIANTS = {
    "deep": "prompts in all layers",
    "quarter": "in the last quarter",
    "quarter cached": "in the last quarter, cached",
    "linear": "linear head",
    "linear cached": "linear head, cached",
}
RATIOS = {
    "deep / quarter cached": ("deep", "quarter cached"),
    "quarter / quarter cached": ("quarter", "quarter cached"),
    "linear / linear cached": ("linear", "linear cached"),
}


def prompted(model: PreTrainedModel, name: str) -> VPTModel:
    """The model with the adapter of a variant, in training mode."""
    depth = len(find_backbone(model).layers)
    config = PromptConfig(num_tokens=0 if name.startswith("linear") else NUM_TOKENS)
    if name.startswith("quarter"):
        config = config.replace(layers_to_transform=tuple(range(depth - max(1, depth // 4), depth)))
    return get_vpt_model(share_weights(model), config).train()


def make_step(vpt: VPTModel, dataset: Any, batch_size: int) -> Callable[[], None]:
    """A training step on the next batch of a data set."""
    optimizer_class, settings = adamw(vpt)
    optimizer = optimizer_class(**settings)
    position = 0

    def step() -> None:
        nonlocal position
        indices = [(position + offset) % len(dataset) for offset in range(batch_size)]
        position += batch_size
        vpt(**default_collate([dataset[index] for index in indices])).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(backbone: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of one backbone."""
    torch.manual_seed(0)
    model_class, config = BACKBONES[backbone]
    model = model_class(config).eval()
    size = config.image_size
    images = [{"pixel_values": torch.randn(3, size, size), "labels": index % LABELS} for index in range(2 * args.batch)]
    steps: dict[str, Callable[[], None]] = {}
    caches: dict[str, Any] = {}
    for name in VARIANTS:
        vpt, dataset = prompted(model, name), images
        if name.endswith("cached"):
            start = time.process_time()
            dataset = cache_features(vpt, images, folder / backbone / name, batch_size=args.batch, progress=False)
            caches[name] = {
                "seconds_per_image": (time.process_time() - start) / len(images),
                "gigabytes_per_1000_images": dataset.nbytes / len(images) / 1e6,
            }
        steps[name] = make_step(vpt, dataset, args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(args.warmup + args.rounds):
        for name, step in steps.items():
            repeats = args.repeats if name == "linear cached" else 1  # it takes about a millisecond
            start = time.process_time()
            for _ in range(repeats):
                step()
            if turn >= args.warmup:
                seconds[name].append((time.process_time() - start) / repeats)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
        for name, (slow, fast) in RATIOS.items()
    }
    return {
        "backbone": backbone,
        "batch": args.batch,
        "milliseconds": {name: 1000 * statistics.median(times) for name, times in seconds.items()},
        "ratios": ratios,
        "caches": caches,
        "seconds": seconds,
    }


def make_table(reports: Sequence[dict[str, Any]]) -> str:
    """The reports in Markdown: milliseconds of a step, its ratios, and the size of 1,000 images."""
    rows = [["ms a step", *VARIANTS.values(), *RATIOS, "GB for 1,000 images"]]
    for report in reports:
        cells = [f"{report['milliseconds'][name]:.1f}" for name in VARIANTS]
        cells += [f"{ratio:.1f}" for ratio in report["ratios"].values()]
        cells += [f"{report['caches']['quarter cached']['gigabytes_per_1000_images']:.3f}"]
        rows.append([report["backbone"], *cells])
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", nargs="+", choices=BACKBONES, default=["deit-tiny", "vit-b16"])
    add("--batch", type=int, default=8, help="images in a step (default: %(default)s)")
    add("--rounds", type=int, default=7, help="measured rounds (default: %(default)s)")
    add("--warmup", type=int, default=1, help="rounds before those (default: %(default)s)")
    add("--repeats", type=int, default=20, help="steps of the linear head from the cache (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write JSON with all times")
    args = parser.parse_args(arguments)
    args.device = "cpu"  # for environment()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        reports = [measure(backbone, args, Path(folder)) for backbone in args.backbone]
    print(make_table(reports))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        text = json.dumps({"environment": environment(args), "settings": settings, "reports": reports}, indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
