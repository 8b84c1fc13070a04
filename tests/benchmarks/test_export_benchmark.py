"""The benchmark of exported models, on a tiny backbone: what it runs and reports, not how long it takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


@pytest.mark.heavy
def test_the_table_compares_exported_models_with_the_bare_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    benchmark = importlib.import_module("export")
    output = tmp_path / "new" / "export.json"
    benchmark.main(["--shape", "tiny-vit", "--tokens", "2", "--runs", "2", "--sessions", "2", "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("| model")) :]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["bare", "VPT-Deep, p = 2", "VPT-Prefix, p = 2", "plain"]
    report = json.loads(output.read_text())
    assert report["rows"][0]["to_bare"] == 1
    assert {len(session) for sessions in report["milliseconds"].values() for session in sessions} == {2}
    assert report["environment"]["threads"] == 1


def test_a_ratio_is_that_of_mean_medians_and_its_spread_is_over_sessions() -> None:
    pytest.importorskip("onnxruntime")
    benchmark = importlib.import_module("export")
    bare, prompted = benchmark.make_rows({"bare": [[1.0, 1.0, 9.0], [2.0]], "prompted": [[1.5], [2.0, 8.0, 0.0]]})
    assert bare["to_bare"] == bare["lowest"] == bare["highest"] == 1 and bare["milliseconds"] == 1.5
    assert prompted["to_bare"] == 3.5 / 3 and prompted["lowest"] == 1 and prompted["highest"] == 1.5
