"""The benchmark of the engine, on a tiny backbone: what it runs and reports, not how long it takes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import serving

ARGUMENTS = (
    "--shape tiny-vit --tokens 2 --tasks 1 5 --few-adapters 2 --lora-tasks 1 "
    "--clients 4 --max-batch 3 --requests 7 --rounds 2"
)


def test_the_table_compares_the_engine_with_passes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    output = tmp_path / "new" / "serving.json"
    for _ in range(2):
        serving.main([*ARGUMENTS.split(), "--output", str(output)])
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in capsys.readouterr().out.splitlines()[-8:]]
    names = ["mixed batches", "one pass per task", "the engine's choice"]
    few, lora = "the engine's choice, 2 in memory", "LoRA, adapter_names"
    assert cells == [["1", name] for name in (*names, lora)] + [["5", name] for name in (*names, few)]
    report = json.loads(output.read_text())[1]
    assert report["environment"]["threads"] == 1 and report["settings"]["requests"] == 7
    assert report["costs"]["fixed"] >= 0 and report["costs"]["mixing"] >= 0
    for row in report["rows"]:
        assert len(row["rounds"]) == 2 and 0 < row["p50"] <= row["p95"] <= row["p99"]
        assert row["variant"] != "one pass per task" or row["speedup"] == 1


def test_popular_tasks_are_drawn_in_inverse_proportion_to_their_rank() -> None:
    drawn = list(islice(serving.draw_tasks(4, seed=0), 25_000))
    shares = [drawn.count(task) / len(drawn) for task in range(4)]
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.02)
    assert list(islice(serving.draw_tasks(4, seed=0), 100)) == drawn[:100]


def test_a_speedup_is_the_median_ratio_within_rounds() -> None:
    latencies = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    rows = [
        {"variant": name, "tasks": 8, "rounds": [{"seconds": seconds, **latencies} for seconds in rounds]}
        for name, rounds in (("one pass per task", (2, 4, 10)), ("mixed batches", (1, 4, 2)))
    ]
    apart, mixed = serving.summarize(rows, num_requests=10)
    assert apart["speedup"] == 1 and mixed["speedup"] == 2
    assert apart["requests_per_second"] == 2.5 and mixed["requests_per_second"] == 5
