"""Under load, while adapters are replaced and the server is killed, each request gets its right answer or its error.

This is ``benchmarks/load.py`` with fewer requests.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy


def test_each_request_is_answered_rightly_or_with_an_error_of_its_own(tmp_path: Path) -> None:
    for package in ("fastapi", "httpx", "prometheus_client", "python_multipart", "uvicorn"):
        pytest.importorskip(package)
    import load

    output = tmp_path / "load.json"
    numbers = {"--requests": 400, "--clients": 16, "--tasks": 12, "--max-adapters": 8, "--images": 8}
    load.main([str(part) for pair in numbers.items() for part in pair] + ["--output", str(output)])
    summary = json.loads(output.read_text())
    assert summary["wrong"] == []
    assert sum(summary["right"].values()) == 400 and set(summary["right"]) == set(load.SHARES)
    assert summary["server_starts"] == 2 and summary["exit_code"] == 0
    assert summary["adapters_replaced_on_disk"] > 0
    memory = summary["resident_mb"]
    assert memory["end"] < 1.2 * memory["warm"] + 20


def test_an_answer_is_wrong_if_it_is_that_of_another_adapter_or_version(tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    import load

    world = load.World(tmp_path, tasks=2, images=2, seed=0)
    replacements = load.Replacements(world)
    client = load.Client("", replacements, load.Report(), iter(()))

    def check(task: str, version: int, ended: int = 0) -> str:
        answer = httpx.Response(200, json={"logits": world.right[task, version][0].tolist()})
        return client.check(answer, 200, "task-0", 0, ended)

    assert check("task-0", 0) == ""
    assert "logits differ" in check("task-0", 1) and "logits differ" in check("task-1", 0)
    replacements.replace("task-0")
    assert check("task-0", 0) == check("task-0", 1) == "", "it was sent before the replacement"
    assert check("task-0", 1, ended=1) == "" and "logits differ" in check("task-0", 0, ended=1)
    leak = httpx.Response(500, json={"error": {"message": f"'{world.served}/task-0' is damaged"}})
    assert "a path" in client.check(leak, 500, "task-0", 0, 0)
    assert "expected status 404" in client.check(leak, 404, "task-0", 0, 0)
