"""Requests a second and latencies of the engine with many tasks, on one thread.

    python benchmarks/serving.py --output serving.json
    python benchmarks/serving.py --shape vit-b16 --tasks 8 32 --requests 64 --rounds 2

The backbone has DeiT-tiny's shape and random weights, nothing is downloaded. A number of clients ask for one image
after the other, each as soon as it has the answer to the last. The task of a request is drawn by Zipf's law: the task
of rank k is asked for in proportion to 1 / k. Compared are the engine with mixed batches, with one pass for each task,
and with its own choice of the two, and PEFT's LoRA with ``adapter_names`` in a loop that answers the longest waiting
requests in each pass. LoRA has the head of the backbone, since PEFT cannot mix heads, and the loop has no threads.
It is measured with few tasks, since the time to add adapters to a model of PEFT grows with the square of their number.
All adapters are in memory, except in the row of an engine that may keep fewer than there are tasks.

All variants are interleaved in one process, in random order in each round, and every variant gets the same requests.
Numbers are medians over rounds; the speedup is the median over rounds of the ratio within a round. Prints a Markdown
table; ``--output`` adds a report with the numbers of all rounds to the list in a JSON file.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import torch
from speed import CLOCKS, DTYPES, environment
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from vpt_peft import PromptConfig, get_vpt_model
from vpt_peft.deploy import Engine
from vpt_peft.deploy.engine.costs import ALWAYS_MIX, NEVER_MIX, PassCosts
from vpt_peft.deploy.engine.stats import percentile
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.runtime import silence_transformers

SHAPES: dict[str, dict[str, int]] = {
    "deit-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "vit-b16": {},
    "tiny-vit": {
        "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 32,
    },
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "deep": {},
    "prefix": {"kind": "prefix"},
    "prefix-bias": {"kind": "prefix", "bias": "all"},
}
CHOICE, LORA = "the engine's choice", "LoRA, adapter_names"
LABELS = 10
IMAGES = 8  # different ones
Clock = Callable[[], float]
Serve = Callable[[Sequence[int], Sequence[Tensor], int, Clock], list[float]]


def build_backbone(args: argparse.Namespace) -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SHAPES[args.shape], num_labels=LABELS))
    return model.to(args.device, DTYPES[args.dtype]).eval()


def save_adapters(args: argparse.Namespace, folder: Path, count: int) -> list[Path]:
    """Folders of adapters, one for each task. They are equal, which makes no difference to the engine."""
    vpt = get_vpt_model(build_backbone(args), PromptConfig(num_tokens=args.tokens, **KINDS[args.kind]))
    folders = [folder / f"task-{task}" for task in range(count)]
    vpt.save_pretrained(folders[0])
    for other in folders[1:]:
        shutil.copytree(folders[0], other)
    return folders


def draw_tasks(count: int, seed: int) -> Iterator[int]:
    """Tasks of requests, by Zipf's law."""
    weights = [1 / rank for rank in range(1, count + 1)]
    choose = random.Random(seed)
    while True:
        yield choose.choices(range(count), weights)[0]


def serve_by_engine(engine: Engine, folders: Sequence[Path], costs: PassCosts | None = None) -> Serve:
    """Clients of an engine.

    Args:
        costs: by which it chooses what is mixed; None: those that it has measured.
    """
    costs = costs or engine._runner.costs

    def serve(tasks: Sequence[int], images: Sequence[Tensor], clients: int, clock: Clock) -> list[float]:
        engine._runner.costs = costs  # one engine for all, so that adapters are loaded once
        waiting, latencies = iter(enumerate(tasks)), []
        answered: SimpleQueue[tuple[float, Future[Any]]] = SimpleQueue()

        def ask(number: int, task: int) -> None:
            start = clock()
            future = engine.submit(images[number % len(images)], folders[task], top_k=1)
            future.add_done_callback(lambda done: answered.put((clock() - start, done)))

        for number, task in islice(waiting, clients):
            ask(number, task)
        for _ in tasks:
            seconds, future = answered.get()
            future.result()
            latencies.append(seconds)
            for number, task in islice(waiting, 1):
                ask(number, task)
        return latencies

    return serve


def serve_by_lora(args: argparse.Namespace, count: int) -> Serve:
    """Clients of a loop around PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=args.rank, target_modules=["q_proj", "v_proj", "query", "value"], init_lora_weights=False)
    model = get_peft_model(build_backbone(args), config, "task-0")
    for task in range(1, count):
        model.add_adapter(f"task-{task}", config)
    model.eval()

    @torch.inference_mode()
    def serve(tasks: Sequence[int], images: Sequence[Tensor], clients: int, clock: Clock) -> list[float]:
        waiting, latencies = iter(enumerate(tasks)), []
        start = clock()
        queue = deque((number, task, start) for number, task in islice(waiting, clients))
        while queue:
            batch = [queue.popleft() for _ in range(min(args.max_batch, len(queue)))]
            pixel_values = torch.stack([images[number % len(images)] for number, _, _ in batch])
            pixel_values = pixel_values.to(args.device, DTYPES[args.dtype])
            names = [f"task-{task}" for _, task, _ in batch]
            model(pixel_values=pixel_values, adapter_names=names).logits.softmax(-1).cpu()
            now = clock()
            latencies += [now - asked for _, _, asked in batch]
            queue.extend((number, task, now) for number, task in islice(waiting, len(batch)))
        return latencies

    return serve


def make_variants(
    args: argparse.Namespace, folders: Sequence[Path], stack: ExitStack
) -> tuple[dict[str, Serve], PassCosts]:
    """What is measured, by name, and what the engine has measured itself."""
    options = {"max_batch": args.max_batch, "max_queue": max(args.clients, len(folders)), "max_wait_ms": args.max_wait}
    engine = stack.enter_context(Engine(build_backbone(args), max_adapters=len(folders), **options))
    for future in [engine.preload(folder) for folder in folders]:
        future.result()
    variants = {
        "mixed batches": serve_by_engine(engine, folders, ALWAYS_MIX),
        "one pass per task": serve_by_engine(engine, folders, NEVER_MIX),
        CHOICE: serve_by_engine(engine, folders),
    }
    if args.few_adapters < len(folders):
        few = stack.enter_context(Engine(build_backbone(args), max_adapters=args.few_adapters, **options))
        variants[f"{CHOICE}, {args.few_adapters} in memory"] = serve_by_engine(few, folders)
    lora_tasks = [count for count in args.tasks if count <= args.lora_tasks]
    if lora_tasks:
        variants[LORA] = serve_by_lora(args, max(lora_tasks))
    return variants, engine._runner.costs


def make_cells(variants: dict[str, Serve], args: argparse.Namespace) -> list[tuple[str, int]]:
    """Variants and numbers of tasks that are measured."""
    few = f"{CHOICE}, {args.few_adapters} in memory"
    return [
        (name, count)
        for name in variants
        for count in args.tasks
        if (name != LORA or count <= args.lora_tasks) and (name != few or count > args.few_adapters)
    ]


def measure(variants: dict[str, Serve], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant and number of tasks, with the numbers of all rounds."""
    size = SHAPES[args.shape].get("image_size", 224)
    images = list(torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0)))
    cells, clock = make_cells(variants, args), CLOCKS[args.clock]
    rows: dict[tuple[str, int], dict[str, Any]] = {
        (name, count): {"variant": name, "tasks": count, "rounds": []} for name, count in cells
    }
    order = random.Random(0)
    for turn in range(args.warmup + args.rounds):
        order.shuffle(cells)
        for name, count in cells:
            tasks = list(islice(draw_tasks(count, turn), args.requests))
            start = clock()
            latencies = sorted(variants[name](tasks, images, args.clients, clock))
            seconds = clock() - start
            if turn >= args.warmup:
                shares = {f"p{share}": percentile(latencies, share) for share in (50, 95, 99)}
                rows[name, count]["rounds"].append({"seconds": seconds, **shares})
    return summarize(list(rows.values()), args.requests)


def summarize(rows: list[dict[str, Any]], num_requests: int) -> list[dict[str, Any]]:
    """Adds medians to the rows, and how much faster than one pass per task each is."""
    apart = {row["tasks"]: row["rounds"] for row in rows if row["variant"] == "one pass per task"}
    for row in rows:
        rounds = row["rounds"]
        row["requests_per_second"] = statistics.median(num_requests / one["seconds"] for one in rounds)
        pairs = zip(apart[row["tasks"]], rounds, strict=True)
        row["speedup"] = statistics.median(other["seconds"] / own["seconds"] for other, own in pairs)
        for share in ("p50", "p95", "p99"):
            row[share] = statistics.median(one[share] for one in rounds)
    return rows


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["Tasks", "Variant", "Requests/s", "Speedup", "p50", "p95", "p99"]]
    for row in sorted(rows, key=lambda row: row["tasks"]):
        latencies = [f"{1000 * row[share]:.0f} ms" for share in ("p50", "p95", "p99")]
        numbers = [f"{row['requests_per_second']:.1f}", f"{row['speedup']:.2f}x", *latencies]
        lines.append([f"{row['tasks']:,}", row["variant"], *numbers])
    return table(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="deit-tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone; adapters are float32")
    parser.add_argument("--kind", choices=KINDS, default="deep", help="of the adapters")
    parser.add_argument("--tokens", type=int, default=10, help="prompt length")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--lora-tasks", type=int, default=32, help="largest number for LoRA; 0: without it and peft")
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 8, 32, 1000], help="numbers of tasks")
    parser.add_argument("--few-adapters", type=int, default=100, help="adapters in memory of another engine")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-wait", type=float, default=5.0, metavar="MS")
    parser.add_argument("--requests", type=int, default=96, help="in each round, for each variant")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the measured ones")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time of the process, for busy machines"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu does not measure a GPU; use --clock wall")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    silence_transformers()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        variants, costs = make_variants(args, save_adapters(args, Path(folder), max(args.tasks)), stack)
        rows = measure(variants, args)
    print(make_table(rows))
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        report = {"environment": environment(args), "settings": settings, "costs": asdict(costs), "rows": rows}
        reports = json.loads(args.output.read_text()) if args.output.exists() else []
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps([*reports, report]) + "\n")


if __name__ == "__main__":
    main()
