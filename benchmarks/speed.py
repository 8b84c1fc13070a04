"""Time and memory of a forward pass and of a training step: the bare backbone, prompts, and other methods.

    python benchmarks/speed.py --backbone vit-b16 swin-t --tokens 10 50 200 --threads 1 --clock cpu
    python benchmarks/speed.py --batch 1 4 32 --work inference
    python benchmarks/speed.py --backbone narrow-vit --tokens 10 --batch 1 4 --work inference
    python benchmarks/speed.py --device cuda --dtype bfloat16 --batch 64 --compile

Weights are random, nothing is downloaded. All variants are interleaved in one process, in random order in each round,
so that a noisy or throttled machine affects all of them alike. A ratio is the median over rounds of the ratio within a
round. Prints Markdown tables; ``--output`` writes JSON with all times, one report for each backbone and batch size.
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
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice
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

from vpt_peft import PromptConfig, VPTModel, get_vpt_model
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
    "narrow-vit": (  # little to compute, so that its time is that of Python
        ViTForImageClassification,
        ViTConfig(**TINY, **{**TINY_VIT, "num_hidden_layers": 12}, patch_size=8),
    ),
    "tiny-vit": (ViTForImageClassification, ViTConfig(**TINY, **TINY_VIT, patch_size=8)),
    "tiny-swin": (
        SwinForImageClassification,
        SwinConfig(**TINY, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=2),
    ),
}
PYTHON_BOUND = ("narrow-vit", "tiny-vit", "tiny-swin")  # whose time is that of Python
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WORK = ("inference", "training")
TITLES = {
    "bare": "bare backbone",
    "linear": "linear head",
    "bitfit": "BitFit",
    "lora": "LoRA, r = 8, not merged",
    "key_value": "VPT-Deep",
    "served": "VPT-Deep, in serving()",
    "mixed": "VPT-Deep, four tasks in a batch",
    "prefix": "VPT-Prefix",
    "prefix_bias": "VPT-Prefix and biases",
    "shallow": "VPT-Shallow",
    "tokens": "VPT-Deep, tokens route",
    "concatenated": "VPT-Deep, concatenated",
    "full": "full fine-tuning",
}
PROMPTS: dict[str, dict[str, Any]] = {  # options of PromptConfig
    "key_value": {},
    "served": {},
    "mixed": {},
    "prefix": {"kind": "prefix"},
    "prefix_bias": {"kind": "prefix", "bias": "all"},
    "shallow": {"deep": False},
    "tokens": {"route": "tokens"},
}
ONLY = {
    "bare": "inference",
    "served": "inference",
    "full": "training",
}  # variants that are measured at one kind of work
TASKS = ["default", "second", "third", "fourth"]


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
        name: a key of ``TITLES``.
        num_tokens: prompt length; None: no prompts.
        seconds: times of each kind of work, one for each round.
        saved_bytes: kept for the backward pass of a training step, parameters left out.
        peak_bytes: GPU memory by kind of work.
    """

    name: str
    num_tokens: int | None
    model: nn.Module
    compiled: bool = False
    seconds: dict[str, list[float]] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None
        self.call = self.model
        if self.compiled:  # variants share code, but not compiled graphs
            self.call = torch.compile(self.model, fullgraph=True, dynamic=False, isolate_recompiles=True)

    def supports(self, work: str, batch: int) -> bool:
        return ONLY.get(self.name, work) == work and (self.name != "mixed" or batch >= len(TASKS))

    def run(self, work: str, pixel_values: Tensor, labels: Tensor) -> None:
        """One forward pass; for training also loss, backward pass and a step of AdamW."""
        if work == "inference":
            with torch.inference_mode():
                self.forward(pixel_values)
            return
        assert self.optimizer is not None
        output = self.forward(pixel_values)
        nn.functional.cross_entropy(getattr(output, "logits", output).float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self, pixel_values: Tensor) -> Any:
        if self.name != "mixed":
            return self.call(pixel_values)
        return self.call(pixel_values, adapter_names=list(islice(cycle(TASKS), len(pixel_values))))

    def count_saved_bytes(self, pixel_values: Tensor, labels: Tensor) -> None:
        """Counts what a training step keeps for its backward pass."""
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.run("training", pixel_values, labels)
        for parameter in self.model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        self.saved_bytes = sum(storage.nbytes() for storage in kept.values())

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

    def prompted(num_tokens: int, **config: Any) -> VPTModel:
        return get_vpt_model(share_weights(model), PromptConfig(num_tokens=num_tokens, **config))

    variants = [("bare", None, model), ("linear", None, prompted(0)), ("full", None, full)]
    variants.append(("bitfit", None, prompted(0, bias="all")))
    if "lora" in args.variants:
        variants.append(("lora", None, METHODS["lora"].attach(share_weights(model))))
    for num_tokens in args.tokens:
        for name in PROMPTS.keys() & set(args.variants):
            variants.append((name, num_tokens, prompted(num_tokens, **PROMPTS[name])))
            for task in TASKS[1:] if name == "mixed" else ():
                variants[-1][2].add_adapter(task, PromptConfig(num_tokens=num_tokens))
        if isinstance(model, ViTForImageClassification):
            variants.append(
                ("concatenated", num_tokens, Concatenated(share_weights(model), num_tokens).to(args.device))
            )
    return [Variant(*variant, compiled=args.compile) for variant in variants if variant[0] in args.variants]


def measure(variants: Sequence[Variant], batch: int, args: argparse.Namespace) -> None:
    """Measures times, bytes saved for the backward pass and, on a GPU, peak memory of the variants, interleaved."""
    size, on_gpu = getattr(variants[0].model.config, "image_size", 224), args.device == "cuda"
    pixel_values = torch.randn(batch, 3, size, size, device=args.device, dtype=DTYPES[args.dtype])
    labels = torch.randint(LABELS, (batch,), device=args.device)
    measured = [(variant, work) for variant in variants for work in args.work if variant.supports(work, batch)]
    for variant, work in measured:
        variant.seconds[work] = []
        if work == "training" and not args.compile:
            variant.model.train()
            variant.count_saved_bytes(pixel_values, labels)
    order, clock = random.Random(0), CLOCKS[args.clock]
    for turn in range(args.warmup + args.runs):
        order.shuffle(measured)
        for variant, work in measured:
            variant.model.train(work == "training")
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                variant.peak_bytes[work] = variant.held_bytes - torch.cuda.memory_allocated()
            with variant.model.serving() if variant.name == "served" else nullcontext():
                if variant.name == "served":
                    variant.run(work, pixel_values, labels)  # computes what is kept
                start = clock()
                for _ in range(args.repeats):
                    variant.run(work, pixel_values, labels)
                if on_gpu:
                    torch.cuda.synchronize()
                    variant.peak_bytes[work] += torch.cuda.max_memory_allocated()
                seconds = (clock() - start) / args.repeats
            if turn >= args.warmup:
                variant.seconds[work].append(round(seconds, 7))


def make_rows(variants: Sequence[Variant], batch: int, num_layers: int | None) -> list[dict[str, Any]]:
    """One row for each variant: milliseconds, ratios and memory; with ``num_layers``, also the time above the bare
    model's for each of them."""
    times = {(variant.name, work): variant.seconds.get(work) for variant in variants for work in WORK}
    bare, lora, full = (times.get(key) for key in (("bare", WORK[0]), ("lora", WORK[1]), ("full", WORK[1])))
    rows = []
    for variant in variants:
        inference, step = (variant.seconds.get(work) for work in WORK)
        peak = variant.peak_bytes.get("training")
        row = {
            "variant": variant.name,
            "num_tokens": variant.num_tokens,
            "inference_ms": inference and 1000 * statistics.median(inference),
            "inference_to_bare": _ratio(inference, bare),
            "overhead_us_per_layer": _overhead(inference, bare, num_layers),
            "step_ms": step and 1000 * statistics.median(step),
            "step_to_bare": _ratio(step, bare),
            "step_to_lora": _ratio(step, lora),
            "step_to_full": _ratio(step, full),
            "saved_mb_per_image": None if variant.saved_bytes is None else variant.saved_bytes / batch / 1e6,
            "peak_mb": None if peak is None else peak / 1e6,
        }
        if inference or step:
            rows.append(row)
    return rows


def _ratio(times: Sequence[float] | None, others: Sequence[float] | None) -> float | None:
    if not times or not others:
        return None
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def _overhead(times: Sequence[float] | None, bare: Sequence[float] | None, num_layers: int | None) -> float | None:
    if not times or not bare or not num_layers:
        return None
    return 1e6 * statistics.median(time - other for time, other in zip(times, bare, strict=True)) / num_layers


HEADER = {
    "inference_ms": ("inference, ms", "{:.1f}"),
    "inference_to_bare": ("÷ bare", "{:.3f}"),
    "overhead_us_per_layer": ("above bare, µs a layer", "{:.0f}"),
    "step_ms": ("step, ms", "{:.1f}"),
    "step_to_bare": ("÷ bare forward", "{:.2f}"),
    "step_to_lora": ("÷ LoRA", "{:.3f}"),
    "step_to_full": ("÷ full", "{:.2f}"),
    "saved_mb_per_image": ("saved for backward, MB an image", "{:.1f}"),
    "peak_mb": ("peak memory of a step, MB", "{:.0f}"),
}


def make_table(report: dict[str, Any]) -> str:
    """The rows of a report in Markdown, under its title. Columns without values are left out."""
    rows, settings = report["rows"], report["settings"]
    columns = [name for name in HEADER if any(row[name] is not None for row in rows)]
    header = ["variant", "p", *(HEADER[name][0] for name in columns)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        cells = [TITLES[row["variant"]], "" if row["num_tokens"] is None else str(row["num_tokens"])]
        lines.append(cells + ["" if row[name] is None else HEADER[name][1].format(row[name]) for name in columns])
    title = f"{report['backbone']}, batch size {settings['batch']}{', compiled' if settings['compile'] else ''}"
    return "\n".join([f"**{title}**\n", *("| " + " | ".join(cells) + " |" for cells in lines), ""])


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
    parser.add_argument("--variants", nargs="+", choices=TITLES, default=list(TITLES), help="lora needs peft")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone; prompts are float32")
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="batch sizes, measured one after the other")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True, dynamic=False)")
    parser.add_argument("--runs", type=int, default=7, help="measured rounds")
    parser.add_argument("--repeats", type=int, default=1, help="calls in a measurement")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the measured ones")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time of the process, for busy machines"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if "bare" not in args.variants:
        parser.error("--variants must contain bare, to which the others are compared")
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu does not measure a GPU; use --clock wall")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    reports = []
    for backbone in args.backbone:
        for batch in args.batch:
            reports.append(make_report(backbone, batch, args))
            print(make_table(reports[-1]), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(reports, indent=1) + "\n")


def make_report(backbone: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one backbone with one batch size, and frees its memory."""
    variants = sorted(build_variants(backbone, args), key=lambda one: (list(TITLES).index(one.name), one.num_tokens))
    measure(variants, batch, args)
    left_out = ("backbone", "output", "batch")
    settings = {name: value for name, value in vars(args).items() if name not in left_out} | {"batch": batch}
    seconds = [
        {"variant": variant.name, "num_tokens": variant.num_tokens, **variant.seconds}
        for variant in variants
        if variant.seconds
    ]
    config = BACKBONES[backbone][1]
    num_layers = sum(getattr(config, "depths", ())) or getattr(config, "num_hidden_layers", 12)
    rows = make_rows(variants, batch, num_layers if backbone in PYTHON_BOUND else None)
    del variants
    gc.collect()
    torch.compiler.reset()
    return {
        "backbone": backbone,
        "environment": environment(args),
        "settings": settings,
        "rows": rows,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
