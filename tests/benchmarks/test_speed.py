"""The benchmark of run time, on tiny backbones: what it runs and reports, not how long it takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import speed

HAS_PEFT = importlib.util.find_spec("peft") is not None
VARIANTS = [name for name in speed.TITLES if HAS_PEFT or name != "lora"]
QUICK = ["--runs", "1", "--warmup", "0"]


def lines_of(report: dict[str, Any]) -> dict[tuple[str, int | None], dict[str, Any]]:
    return {(row["variant"], row["num_tokens"]): row for row in report["rows"]}


def test_the_tables_compare_all_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "speed.json"
    backbones = ["--backbone", "tiny-vit", "tiny-swin", "--batch", "2", "4"]
    speed.main([*QUICK, *backbones, "--tokens", "2", "5", "--variants", *VARIANTS, "--output", str(output)])

    reports = json.loads(output.read_text())
    assert [(one["backbone"], one["settings"]["batch"]) for one in reports] == [
        ("tiny-vit", 2), ("tiny-vit", 4), ("tiny-swin", 2), ("tiny-swin", 4),
    ]  # fmt: skip
    small, vit, _, swin = map(lines_of, reports)
    assert {name for name, _ in vit} == set(VARIANTS)
    assert {name for name, _ in vit} - {name for name, _ in swin} == {"concatenated"}
    assert {name for name, _ in vit} - {name for name, _ in small} == {"mixed"}, "two images have no four tasks"
    printed = capsys.readouterr().out
    assert all(speed.TITLES[name] in printed for name in VARIANTS)
    assert "**tiny-vit, batch size 4**" in printed and "saved for backward, MB an image" in printed

    assert vit["bare", None]["inference_to_bare"] == 1 and vit["bare", None]["step_ms"] is None
    assert vit["full", None]["step_to_full"] == 1 and vit["full", None]["inference_ms"] is None
    prefix = vit["prefix", 5]
    assert prefix["step_to_bare"] == pytest.approx(prefix["step_ms"] / vit["bare", None]["inference_ms"], rel=1e-3)
    assert reports[0]["environment"]["torch"] and len(reports[0]["seconds"]) == len(small)


def test_bytes_saved_for_the_backward_pass_are_counted_for_each_image(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    variants = ["--variants", "bare", "linear", "tokens", "full"]
    speed.main([*QUICK, "--backbone", "tiny-vit", "--batch", "2", "8", *variants, "--tokens", "2", "9",
                "--output", str(output)])  # fmt: skip
    two, eight = ({key: row["saved_mb_per_image"] for key, row in lines_of(one).items()} for one in
                  json.loads(output.read_text()))  # fmt: skip
    assert two["bare", None] is None
    assert two["linear", None] < two["tokens", 2] < two["tokens", 9] < two["full", None]
    assert eight["full", None] == pytest.approx(two["full", None], rel=0.2)


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main([*QUICK, "--variants", "key_value"])
    assert "must contain bare" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed.main([*QUICK, "--clock", "cpu", "--device", "cuda"])
    assert "does not measure a GPU" in capsys.readouterr().err
