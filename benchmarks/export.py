"""Run time of exported models in onnxruntime, on one thread: what prompts cost over the bare backbone.

    pip install '.[export]'
    python benchmarks/export.py --tokens 10 50 --output benchmarks/results/export-cpu.json

The backbone has DeiT-tiny's shape and random weights, nothing is downloaded. "bare" is exported by vpt-peft too, as an
adapter without prompts, so that it has the same attention; "plain" is the bare backbone by ``torch.onnx.export`` alone.
All models are interleaved in random order in one process. Two sessions of one and the same model differ by one or two
percent with the place of its weights in memory, so each model has several sessions: its time is the mean over them of
the median over rounds, of the CPU time of the thread. Prints a Markdown table; ``--output`` writes JSON with all times.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import onnxruntime
import torch
from speed import environment
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from vpt_peft import PromptConfig, export, get_vpt_model

SHAPES: dict[str, dict[str, int]] = {
    "deit-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "tiny-vit": {
        "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 32,
    },
}  # fmt: skip


class Logits(nn.Module):
    """A model whose output is the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def build_backbone(shape: str) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPES[shape], num_labels=100)).eval()


def export_plain(shape: str, path: Path) -> None:
    """The bare backbone, exported as the documentation of torch says."""
    size = build_backbone(shape).config.image_size
    example = (torch.randn(2, 3, size, size),)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Logits(build_backbone(shape)), example, dynamic_shapes=batch)
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)


def export_models(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """``{name: file}`` of all models."""
    configs = {"bare": PromptConfig(num_tokens=0)}
    for number in args.tokens:
        configs[f"VPT-Deep, p = {number}"] = PromptConfig(num_tokens=number)
        configs[f"VPT-Prefix, p = {number}"] = PromptConfig(num_tokens=number, kind="prefix")
    files = {name: folder / f"{index}.onnx" for index, name in enumerate(configs)}
    for name, path in files.items():
        export(get_vpt_model(build_backbone(args.shape), configs[name]), path, batch_size=args.fixed_batch)
    export_plain(args.shape, folder / "plain.onnx")
    return {**files, "plain": folder / "plain.onnx"}


def measure(files: dict[str, Path], args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Milliseconds of CPU time: for each model, those of each of its sessions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [
        (name, number, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        for number in range(args.sessions)
        for name, path in files.items()
    ]
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(args.sessions)] for name in files}
    size = build_backbone(args.shape).config.image_size
    images = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    order = random.Random(0)
    for turn in range(args.warmup + args.runs):
        order.shuffle(sessions)
        for name, number, session in sessions:
            inputs = {session.get_inputs()[0].name: images}
            start = time.thread_time()
            session.run(None, inputs)
            elapsed = 1000 * (time.thread_time() - start)
            if turn >= args.warmup:
                times[name][number].append(round(elapsed, 4))
    return times


def make_rows(times: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """For each model its milliseconds, and the ratio to the bare backbone: over all sessions, and between those of one
    number, the smallest and the largest."""
    medians = {name: [statistics.median(session) for session in sessions] for name, sessions in times.items()}
    rows = []
    for name, own in medians.items():
        bare = medians["bare"]
        pairs = [one / other for one, other in zip(own, bare, strict=True)]
        ratio = statistics.mean(own) / statistics.mean(bare)
        row = {"model": name, "milliseconds": statistics.mean(own), "to_bare": ratio}
        rows.append({**row, "lowest": min(pairs), "highest": max(pairs)})
    return rows


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| model | ms | to bare | lowest to highest |", "|---|---:|---:|---:|"]
    for row in rows:
        spread = f"{row['lowest']:.3f} to {row['highest']:.3f}"
        lines.append(f"| {row['model']} | {row['milliseconds']:.2f} | {row['to_bare']:.3f} | {spread} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="deit-tiny")
    parser.add_argument("--tokens", nargs="+", type=int, default=[10, 50], help="prompt lengths")
    parser.add_argument("--fixed-batch", type=int, metavar="N", help="export for N images (default: for any number)")
    parser.add_argument("--sessions", type=int, default=5, help="sessions of each model")
    parser.add_argument("--runs", type=int, default=100, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the measured ones")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    args.device = "cpu"  # for environment()
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with TemporaryDirectory() as folder:
        times = measure(export_models(args, Path(folder)), args)
    rows = make_rows(times)
    print(make_table(rows))
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        versions = {**environment(args), "threads": 1, "onnxruntime": onnxruntime.__version__}
        report = {"environment": versions, "settings": settings, "rows": rows, "milliseconds": times}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
