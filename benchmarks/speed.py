"""Run time of a forward pass and of a training step: the bare backbone, each kind of prompts, and other methods.

    python benchmarks/speed.py --backbone vit-b16 swin-t --tokens 1 10 50 100 200
    python benchmarks/speed.py --device cuda --dtype bfloat16 --batch 64 --compile

Weights are random, nothing is downloaded. All variants are interleaved in one process, in random order in each round,
so that a noisy or throttled machine affects all of them alike. A ratio is the median over rounds of the ratio within a
round. Prints a Markdown table; ``--output`` writes JSON with all times, one report per backbone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vpt_peft import PromptConfig, get_vpt_model
from vpt_peft.recipes.training.methods import METHODS

LABELS = 100
TINY = {"image_size": 32, "num_labels": LABELS}
TINY_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BACKBONES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "vit-b16": (ViTForImageClassification, ViTConfig(num_labels=LABELS)),
    "swin-t": (SwinForImageClassification, SwinConfig(num_labels=LABELS)),
    "timm-vit-b16": (  # "linear head" is the way through timm's attention, without prompts
        TimmWrapperForImageClassification,
        TimmWrapperConfig(architecture="vit_base_patch16_224", num_labels=LABELS),
    ),
    "tiny-vit": (ViTForImageClassification, ViTConfig(**TINY, **TINY_VIT, patch_size=8)),
    "tiny-swin": (
        SwinForImageClassification,
        SwinConfig(**TINY, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=2),
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WORK = ("inference", "training")
COLUMNS = {
    "bare": "bare backbone",
    "linear": "linear head",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "key_value": "keys and values",
    "prefix": "prefix",
    "shallow": "VPT-Shallow",
    "tokens": "tokens route",
    "concatenated": "concatenated",
    "full": "full fine-tuning",
}


class Concatenated(nn.Module):
    """The usual implementation of VPT-Deep: prompts are concatenated as tokens of whole layers. ViT only."""

    def __init__(self, model: PreTrainedModel, num_tokens: int) -> None:
        super().__init__()
        self.encoder, width = model.base_model, model.config.hidden_size
        self.prompts = nn.ParameterList(0.1 * torch.randn(num_tokens, width) for _ in self.encoder.layers)
        self.head = nn.Linear(width, LABELS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.encoder.embeddings(pixel_values)
        for layer, prompts in zip(self.encoder.layers, self.prompts, strict=True):
            tokens = prompts.to(hidden.dtype).expand(len(hidden), -1, -1)
            hidden = layer(torch.cat([tokens, hidden], dim=1))[:, len(prompts) :]
        return self.head(self.encoder.layernorm(hidden)[:, 0].to(self.head.weight.dtype))


@dataclass
class Variant:
    """A variant of the backbone to measure.

    Attributes:
        name: a key of ``COLUMNS``.
        num_tokens: prompt length; None: no prompts.
    """

    name: str
    num_tokens: int | None
    model: nn.Module
    compiled: bool = False
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None
        self.call = self.model
        if self.compiled:  # variants share code, but not compiled graphs
            self.call = torch.compile(self.model, fullgraph=True, dynamic=False, isolate_recompiles=True)

    def supports(self, work: str) -> bool:
        return self.name != ("full" if work == "inference" else "bare")

    def run(self, work: str, pixel_values: Tensor, labels: Tensor) -> None:
        """One forward pass; for training also loss, backward pass and a step of AdamW."""
        if work == "inference":
            with torch.inference_mode():
                self.call(pixel_values)
            return
        assert self.optimizer is not None
        output = self.call(pixel_values)
        nn.functional.cross_entropy(getattr(output, "logits", output).float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def held_bytes(self) -> int:
        """GPU memory of weights and optimizer state of this variant alone."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        states = self.optimizer.state.values() if self.optimizer else ()
        tensors += [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
        return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def build_variants(backbone: str, args: argparse.Namespace) -> list[Variant]:
    """All variants of a backbone. They share its frozen weights, except for full fine-tuning."""
    torch.manual_seed(0)
    model_class, config = BACKBONES[backbone]
    model = model_class(copy.deepcopy(config)).to(args.device, DTYPES[args.dtype]).eval()
    full = copy.deepcopy(model)
    model.requires_grad_(False)

    def prompted(num_tokens: int, **config: Any) -> nn.Module:
        return get_vpt_model(share_weights(model), PromptConfig(num_tokens=num_tokens, **config))

    variants = [("bare", None, model), ("linear", None, prompted(0)), ("full", None, full)]
    variants.append(("bitfit", None, prompted(0, bias="all")))
    if "lora" in args.variants:
        variants.append(("lora", None, METHODS["lora"].attach(share_weights(model))))
    for num_tokens in args.tokens:
        variants.append(("key_value", num_tokens, prompted(num_tokens)))
        variants.append(("prefix", num_tokens, prompted(num_tokens, kind="prefix")))
        variants.append(("shallow", num_tokens, prompted(num_tokens, deep=False)))
        variants.append(("tokens", num_tokens, prompted(num_tokens, route="tokens")))
        if isinstance(model, ViTForImageClassification):
            variants.append(
                ("concatenated", num_tokens, Concatenated(share_weights(model), num_tokens).to(args.device))
            )
    return [Variant(*variant, compiled=args.compile) for variant in variants if variant[0] in args.variants]


def measure(variants: Sequence[Variant], work: str, args: argparse.Namespace) -> None:
    """Measures time and, on a GPU, peak memory of the variants, interleaved."""
    size, on_gpu = getattr(variants[0].model.config, "image_size", 224), args.device == "cuda"
    pixel_values = torch.randn(args.batch, 3, size, size, device=args.device, dtype=DTYPES[args.dtype])
    labels = torch.randint(LABELS, (args.batch,), device=args.device)
    measured = [variant for variant in variants if variant.supports(work)]
    for variant in measured:
        variant.model.train(work == "training")
        variant.seconds[work] = []
    order, clock = random.Random(0), CLOCKS[args.clock]
    for turn in range(args.warmup + args.runs):
        order.shuffle(measured)
        for variant in measured:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                variant.peak_bytes[work] = variant.held_bytes - torch.cuda.memory_allocated()
            start = clock()
            variant.run(work, pixel_values, labels)
            if on_gpu:
                torch.cuda.synchronize()
                variant.peak_bytes[work] += torch.cuda.max_memory_allocated()
            seconds = clock() - start
            if turn >= args.warmup:
                variant.seconds[work].append(round(seconds, 6))


def make_rows(backbone: str, variants: Sequence[Variant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per kind of work and prompt length: milliseconds, and ratios to the key-value route and to bare."""
    rows = []
    for work in args.work:
        for num_tokens in args.tokens:
            compared = {
                variant.name: variant
                for variant in variants
                if variant.num_tokens in (None, num_tokens) and variant.supports(work)
            }
            times = {name: variant.seconds[work] for name, variant in compared.items()}
            row: dict[str, Any] = {"backbone": backbone, "work": work, "num_tokens": num_tokens}
            row["milliseconds"] = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
            row["to_key_value"] = {name: _ratio(seconds, times["key_value"]) for name, seconds in times.items()}
            if "bare" in times:
                row["to_bare"] = {name: _ratio(seconds, times["bare"]) for name, seconds in times.items()}
            row["peak_megabytes"] = {
                name: variant.peak_bytes[work] / 1e6 for name, variant in compared.items() if variant.peak_bytes
            }
            rows.append(row)
    return rows


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown: milliseconds of the key-value route, and the other variants relative to it."""
    others = [name for name in COLUMNS if name != "key_value" and any(name in row["to_key_value"] for row in rows)]
    header = ["backbone", "work", "p", "keys and values, ms", *(COLUMNS[name] for name in others)]
    if any(row["peak_megabytes"] for row in rows):
        header += ["peak MB: " + COLUMNS[name] for name in COLUMNS]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        ratios, memory = row["to_key_value"], row["peak_megabytes"]
        cells = [row["backbone"], row["work"], str(row["num_tokens"]), f"{row['milliseconds']['key_value']:.1f}"]
        cells += [f"{ratios[name]:.2f}" if name in ratios else "" for name in others]
        if len(header) > len(cells):
            cells += [f"{memory[name]:.0f}" if name in memory else "" for name in COLUMNS]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", choices=BACKBONES, default=["vit-b16", "swin-t"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 10, 50, 100, 200], help="prompt lengths")
    parser.add_argument(
        "--variants", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="key_value is required; lora needs peft"
    )
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone; prompts are float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True, dynamic=False)")
    parser.add_argument("--runs", type=int, default=7, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the measured ones")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time of the process, for busy machines"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if "key_value" not in args.variants:
        parser.error("--variants must contain key_value, to which the others are compared")
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu does not measure a GPU; use --clock wall")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    reports = [make_report(backbone, args) for backbone in args.backbone]
    print(make_table([row for report in reports for row in report["rows"]]))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(reports, indent=1) + "\n")


def make_report(backbone: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one backbone and frees its memory."""
    variants = build_variants(backbone, args)
    for work in args.work:
        measure(variants, work, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("backbone", "output")}
    seconds = [{"variant": variant.name, "num_tokens": variant.num_tokens, **variant.seconds} for variant in variants]
    rows = make_rows(backbone, variants, args)
    del variants
    gc.collect()
    torch.compiler.reset()
    return {"environment": environment(args), "settings": settings, "rows": rows, "seconds": seconds}


if __name__ == "__main__":
    main()
