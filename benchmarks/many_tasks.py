"""How well one frozen backbone serves many tasks: mixed batches, switching, loading, and memory for each adapter.

    python benchmarks/many_tasks.py
    python benchmarks/many_tasks.py --device cuda --dtype bfloat16 --runs 20 --warmup 3
    python benchmarks/many_tasks.py --tokens 5 10 20 50         # tasks with prompts of different lengths

Weights are random, nothing is downloaded. First one adapter's folder is loaded many times under different names; its
memory is what the process grew by, and Python tells which files were opened. Then the images of a batch belong to 1, 2,
8 or 32 tasks and are answered in one mixed pass, or, as without mixed batches, in one pass for each task. All of these
take turns in one process, in a new random order each round; a ratio is the median over rounds of the ratio within a
round. Prints Markdown tables; ``--output`` writes JSON with every single time.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from training import be_quiet, table

LOADED_TOKENS = 50
STATM = Path("/proc/self/statm")


class Meter:
    """Measures time and memory on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock, self.on_gpu = CLOCKS[args.clock], args.device == "cuda"

    def seconds(self, run: Callable[[], object]) -> float:
        """How long a call takes."""
        start = self.clock()
        run()
        if self.on_gpu:
            torch.cuda.synchronize()
        return round(self.clock() - start, 7)

    def used_bytes(self) -> int | None:
        """What the process holds: GPU memory, or resident memory where the system tells it (Linux)."""
        gc.collect()
        if self.on_gpu:
            return torch.cuda.memory_allocated()
        if not STATM.exists():
            return None
        return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


@contextmanager
def opened_files() -> Iterator[Counter[str]]:
    """Counts, by name, the files that Python opens while it is entered."""
    counts, counting = Counter[str](), True

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and counting:
            counts[Path(str(args[0])).name] += 1

    sys.addaudithook(note)
    try:
        yield counts
    finally:
        counting = False  # a hook cannot be taken away


def build(args: argparse.Namespace) -> VPTModel:
    """A backbone with random weights and one adapter, with prompts and head of its own, for each task."""
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
    """The whole batch in one pass."""
    return vpt(pixel_values, adapter_names=names).logits


@torch.inference_mode()
def apart(vpt: VPTModel, pixel_values: Tensor, names: Sequence[str]) -> Tensor:
    """The same by one pass for each task, over the rows that are its own."""
    parts, order = [], []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        vpt.set_adapter(name)
        parts.append(vpt(pixel_values[rows] if len(rows) < len(names) else pixel_values).logits)
        order += rows
    return torch.cat(parts)[torch.tensor(order).argsort()]


def measure_batches(vpt: VPTModel, meter: Meter, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of tasks, against one pass for each task and against the same batch with one task."""
    size = vpt.config.image_size
    pixel_values = torch.randn(args.batch, 3, size, size, device=args.device, dtype=DTYPES[args.dtype])
    names = {count: [f"task-{row % count}" for row in range(args.batch)] for count in sorted({1, *args.tasks})}
    calls = {(way, count): partial(way, vpt, pixel_values, names[count]) for count in names for way in (mixed, apart)}
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    turns, order = list(calls), random.Random(0)
    for turn in tqdm(range(args.warmup + args.runs), desc="Batches", unit="round"):
        order.shuffle(turns)
        for key in turns:
            took = meter.seconds(calls[key])
            if turn >= args.warmup:
                seconds[key].append(took)
    return [
        {
            "tasks": count,
            "milliseconds": {way.__name__: _milliseconds(seconds[way, count]) for way in (mixed, apart)},
            "images_per_second": args.batch / statistics.median(seconds[mixed, count]),
            "throughput_to_one_task": _ratio(seconds[apart, 1], seconds[mixed, count]),
            "times_faster_than_apart": _ratio(seconds[apart, count], seconds[mixed, count]),
            "largest_difference": (calls[mixed, count]() - calls[apart, count]()).abs().max().item(),
            "seconds": {way.__name__: seconds[way, count] for way in (mixed, apart)},
        }
        for count in sorted(set(args.tasks))
    ]


def measure_switching(vpt: VPTModel, meter: Meter, args: argparse.Namespace) -> dict[str, Any]:
    """How long ``set_adapter`` takes among the adapters that there are now."""
    names = [f"task-{number % max(args.tasks)}" for number in range(101)]
    seconds = [meter.seconds(partial(vpt.set_adapter, name)) for name in names]
    return {"adapters": len(vpt.adapters), "milliseconds": _milliseconds(seconds), "seconds": seconds}


def measure_loading(vpt: VPTModel, meter: Meter, args: argparse.Namespace) -> dict[str, Any]:
    """Loads one adapter's folder under many names, and then one with more prompts a few times."""
    vpt.add_adapter("long", PromptConfig(num_tokens=LOADED_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        vpt.save_pretrained(folder, ["task-0", "long"])
        vpt.load_adapter(Path(folder, "task-0"), "warm")
        before = meter.used_bytes()
        with opened_files() as opened:
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
    """The report in Markdown: batches first, then what a single adapter costs."""
    batches = [
        ("Tasks in the batch", "One mixed pass", "Images per second", "To one task", "One pass per task", "Gain"),
        *(
            (
                str(row["tasks"]), f"{row['milliseconds']['mixed']:.1f} ms", f"{row['images_per_second']:.1f}",
                f"{row['throughput_to_one_task']:.2f}", f"{row['milliseconds']['apart']:.1f} ms",
                f"{row['times_faster_than_apart']:.2f} times",
            )
            for row in report["batches"]
        ),
    ]  # fmt: skip
    loading, latency = report["loading"], report["loading"]["latency"]
    grown, own, count = loading["bytes_per_adapter"], loading["own_bytes"], loading["adapters"]
    costs = [
        ("What an adapter costs", "Measured"),
        (f"load_adapter, p = {latency['num_tokens']}", f"{latency['milliseconds']:.1f} ms"),
        *(
            (f"set_adapter among {switching['adapters']} adapters", f"{switching['milliseconds']:.3f} ms")
            for switching in report["switching"]
        ),
        (f"tensors of an adapter, p = {loading['num_tokens']}", f"{own / 1000:.1f} kB"),
        (f"memory for each of {count} loaded ones", f"{grown / 1000:.1f} kB" if grown is not None else "unknown"),
        *((f"{name} opened for them", f"{number} times") for name, number in sorted(loading["files_opened"].items())),
    ]
    return f"{table(batches)}\n\n{table(costs)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="vit-b16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone; adapters are in float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 2, 8, 32], help="different tasks in a batch")
    parser.add_argument("--tokens", nargs="+", type=int, default=[10], help="prompt lengths that tasks take in turn")
    parser.add_argument("--adapters", type=int, default=1000, help="how many to load from disk")
    parser.add_argument("--runs", type=int, default=5, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, on a busy CPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu sees nothing of a GPU's work; use --clock wall")
    if max(args.tasks) > args.batch:
        parser.error(f"--tasks must be at most the {args.batch} images of the batch, got {max(args.tasks)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    be_quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    vpt, meter = build(args), Meter(args)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report: dict[str, Any] = {"environment": environment(args), "settings": settings}
    few = measure_switching(vpt, meter, args)
    report["loading"] = measure_loading(vpt, meter, args)
    report["switching"] = [few, measure_switching(vpt, meter, args)]
    report["batches"] = measure_batches(vpt, meter, args)  # at the end: it leaves free memory behind that loading uses
    print(make_tables(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
