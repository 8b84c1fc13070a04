"""Cost of many adapters on one frozen backbone: mixed batches, switching, loading, and memory per adapter.

    python benchmarks/many_tasks.py
    python benchmarks/many_tasks.py --device cuda --dtype bfloat16 --runs 20 --warmup 3
    python benchmarks/many_tasks.py --tokens 5 10 20 50         # prompts of different lengths

Weights are random, nothing is downloaded. First, one adapter folder is loaded many times under different names: memory
per adapter is the growth of the process, and an audit hook counts the files that are opened. Then batches with images
of 1, 2, 8 or 32 tasks are computed in one mixed pass, and in one pass per task. All variants are interleaved in one
process, in random order in each round; a ratio is the median over rounds of the ratio within a round. Prints Markdown
tables; ``--output`` writes JSON with all times.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import mmap
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import BACKBONES, CLOCKS, DTYPES, environment
from torch import Tensor
from tqdm import tqdm

from vpt_peft import PromptConfig, VPTModel, get_vpt_model
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.runtime import silence_transformers

LOADED_TOKENS = 50
STATM = Path("/proc/self/statm")


class Meter:
    """Measures time and memory on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock, self.on_gpu = CLOCKS[args.clock], args.device == "cuda"

    def seconds(self, run: Callable[[], object]) -> float:
        """Time of a call."""
        start = self.clock()
        run()
        if self.on_gpu:
            torch.cuda.synchronize()
        return round(self.clock() - start, 7)

    def used_bytes(self) -> int | None:
        """GPU memory, or the process's resident memory (Linux only, else None)."""
        gc.collect()
        if self.on_gpu:
            return torch.cuda.memory_allocated()
        if not STATM.exists():
            return None
        return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


@contextmanager
def count_opened_files() -> Iterator[Counter[str]]:
    """Counts the files that Python opens within the context, by name."""
    counts, counting = Counter[str](), True

    def count(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and counting:
            counts[Path(str(args[0])).name] += 1

    sys.addaudithook(count)
    try:
        yield counts
    finally:
        counting = False  # audit hooks cannot be removed


def build(args: argparse.Namespace) -> VPTModel:
    """A backbone with random weights, and one adapter per task."""
    torch.manual_seed(0)
    model_class, config = BACKBONES[args.backbone]
    model = model_class(copy.deepcopy(config)).to(args.device, DTYPES[args.dtype]).eval()

    def prompts(task: int) -> PromptConfig:
        return PromptConfig(num_tokens=args.tokens[task % len(args.tokens)])

    vpt = get_vpt_model(model, prompts(0), "task-0")
    for task in range(1, max(args.tasks)):
        vpt.add_adapter(f"task-{task}", prompts(task))
    for parameter in vpt.adapters.parameters():  # heads start as copies of the backbone's
        torch.nn.init.normal_(parameter, std=0.1)
    return vpt


@torch.inference_mode()
def mixed(vpt: VPTModel, pixel_values: Tensor, names: Sequence[str]) -> Tensor:
    """Logits of a mixed batch in one pass."""
    return vpt(pixel_values, adapter_names=names).logits


@torch.inference_mode()
def apart(vpt: VPTModel, pixel_values: Tensor, names: Sequence[str]) -> Tensor:
    """Logits of the same batch in one pass per task."""
    parts, order = [], []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        vpt.set_adapter(name)
        parts.append(vpt(pixel_values[rows] if len(rows) < len(names) else pixel_values).logits)
        order += rows
    return torch.cat(parts)[torch.tensor(order).argsort()]


def measure_batches(vpt: VPTModel, meter: Meter, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of tasks: a mixed batch compared to one pass per task, and to a batch with one task."""
    size = vpt.config.image_size
    pixel_values = torch.randn(args.batch, 3, size, size, device=args.device, dtype=DTYPES[args.dtype])
    names = {count: [f"task-{row % count}" for row in range(args.batch)] for count in sorted({1, *args.tasks})}
    calls = {
        (function, count): partial(function, vpt, pixel_values, names[count])
        for count in names
        for function in (mixed, apart)
    }
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    keys, order = list(calls), random.Random(0)
    for turn in tqdm(range(args.warmup + args.runs), desc="Batches", unit="round"):
        order.shuffle(keys)
        for key in keys:
            elapsed = meter.seconds(calls[key])
            if turn >= args.warmup:
                seconds[key].append(elapsed)
    return [
        {
            "tasks": count,
            "milliseconds": {function.__name__: _milliseconds(seconds[function, count]) for function in (mixed, apart)},
            "images_per_second": args.batch / statistics.median(seconds[mixed, count]),
            "throughput_to_one_task": _ratio(seconds[apart, 1], seconds[mixed, count]),
            "times_faster_than_apart": _ratio(seconds[apart, count], seconds[mixed, count]),
            "largest_difference": (calls[mixed, count]() - calls[apart, count]()).abs().max().item(),
            "seconds": {function.__name__: seconds[function, count] for function in (mixed, apart)},
        }
        for count in sorted(set(args.tasks))
    ]


def measure_switching(vpt: VPTModel, meter: Meter, args: argparse.Namespace) -> dict[str, Any]:
    """Time of ``set_adapter`` with the current number of adapters."""
    names = [f"task-{number % max(args.tasks)}" for number in range(101)]
    seconds = [meter.seconds(partial(vpt.set_adapter, name)) for name in names]
    return {"adapters": len(vpt.adapters), "milliseconds": _milliseconds(seconds), "seconds": seconds}


def measure_loading(vpt: VPTModel, meter: Meter, args: argparse.Namespace) -> dict[str, Any]:
    """Loads one adapter folder under many names, and then one with more prompts a few times."""
    vpt.add_adapter("long", PromptConfig(num_tokens=LOADED_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        vpt.save_pretrained(folder, ["task-0", "long"])
        vpt.load_adapter(Path(folder, "task-0"), "warm")
        before = meter.used_bytes()
        with count_opened_files() as opened:
            for number in tqdm(range(args.adapters), desc="Loading", unit="adapter"):
                vpt.load_adapter(Path(folder, "task-0"), f"loaded-{number}")
        after = meter.used_bytes()
        loads = [partial(vpt.load_adapter, Path(folder, "long"), f"long-{number}") for number in range(21)]
        seconds = [meter.seconds(load) for load in loads]
    return {
        "latency": {"num_tokens": LOADED_TOKENS, "milliseconds": _milliseconds(seconds), "seconds": seconds},
        "adapters": args.adapters,
        "num_tokens": args.tokens[0],
        "own_bytes": sum(tensor.nbytes for tensor in vpt.adapters["warm"].parameters()),
        "bytes_per_adapter": None if before is None or after is None else (after - before) / args.adapters,
        "files_opened": dict(opened),
    }


def _milliseconds(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def make_tables(report: dict[str, Any]) -> str:
    """The report in Markdown: mixed batches, and the cost of a single adapter."""
    batches = [
        ("Tasks in the batch", "Mixed batch", "Images/s", "Relative throughput", "One pass per task", "Speedup"),
        *(
            (
                str(row["tasks"]), f"{row['milliseconds']['mixed']:.1f} ms", f"{row['images_per_second']:.1f}",
                f"{row['throughput_to_one_task']:.2f}", f"{row['milliseconds']['apart']:.1f} ms",
                f"{row['times_faster_than_apart']:.2f}x",
            )
            for row in report["batches"]
        ),
    ]  # fmt: skip
    loading, latency = report["loading"], report["loading"]["latency"]
    growth, own, count = loading["bytes_per_adapter"], loading["own_bytes"], loading["adapters"]
    costs = [
        ("Cost of an adapter", "Measured"),
        (f"load_adapter, p = {latency['num_tokens']}", f"{latency['milliseconds']:.1f} ms"),
        *(
            (f"set_adapter among {switching['adapters']} adapters", f"{switching['milliseconds']:.3f} ms")
            for switching in report["switching"]
        ),
        (f"adapter tensors, p = {loading['num_tokens']}", f"{own / 1000:.1f} kB"),
        (f"memory per adapter, {count} loaded", f"{growth / 1000:.1f} kB" if growth is not None else "unknown"),
        *(
            (f"{name} opened, {count} loads", f"{number} times")
            for name, number in sorted(loading["files_opened"].items())
        ),
    ]
    return f"{table(batches)}\n\n{table(costs)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="vit-b16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone; adapters are float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 2, 8, 32], help="numbers of tasks in a batch")
    parser.add_argument("--tokens", nargs="+", type=int, default=[10], help="prompt lengths, assigned to tasks in turn")
    parser.add_argument("--adapters", type=int, default=1000, help="number of adapters to load from disk")
    parser.add_argument("--runs", type=int, default=5, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the measured ones")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time of the process, for busy machines"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu does not measure a GPU; use --clock wall")
    if max(args.tasks) > args.batch:
        parser.error(f"--tasks must be at most the {args.batch} images of the batch, got {max(args.tasks)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    silence_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    vpt, meter = build(args), Meter(args)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report: dict[str, Any] = {"environment": environment(args), "settings": settings}
    few = measure_switching(vpt, meter, args)
    report["loading"] = measure_loading(vpt, meter, args)
    report["switching"] = [few, measure_switching(vpt, meter, args)]
    report["batches"] = measure_batches(vpt, meter, args)  # last: memory that it frees would be reused by loading
    print(make_tables(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
