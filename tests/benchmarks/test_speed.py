"""The benchmark of run time, on tiny backbones: what it runs and reports, not how long it takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import speed

WITHOUT_PEFT = [name for name in speed.COLUMNS if name != "lora"]
VARIANTS = [*speed.COLUMNS] if importlib.util.find_spec("peft") else WITHOUT_PEFT
QUICK = ["--runs", "1", "--batch", "2", "--warmup", "0"]


def test_the_table_compares_all_variants_with_keys_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "speed.json"
    backbones = ["--backbone", "tiny-vit", "tiny-swin"]
    speed.main([*QUICK, *backbones, "--tokens", "2", "4", "--variants", *VARIANTS, "--output", str(output)])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * 2 * 2, "backbones, kinds of work and prompt lengths"
    assert all(title in header for name, title in speed.COLUMNS.items() if name in VARIANTS)
    vit, swin = json.loads(output.read_text())
    inference, training = (next(row for row in vit["rows"] if row["work"] == work) for work in speed.WORK)
    assert set(VARIANTS) - set(inference["to_bare"]) == {"full"} and set(VARIANTS) - set(training["to_key_value"]) == {
        "bare"
    }
    assert inference["to_bare"]["bare"] == inference["to_key_value"]["key_value"] == 1
    assert "concatenated" not in swin["rows"][0]["milliseconds"]
    assert vit["environment"]["torch"] and vit["settings"]["batch"] == 2
    lengths = {entry["num_tokens"] for entry in vit["seconds"] if entry["variant"] == "prefix"}
    assert lengths == {2, 4}


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main([*QUICK, "--variants", "bare"])
    assert "must contain key_value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed.main([*QUICK, "--clock", "cpu", "--device", "cuda"])
    assert "does not measure a GPU" in capsys.readouterr().err
