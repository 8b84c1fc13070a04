"""examples/tour.ipynb: its code runs, and the outputs that are stored in it are complete and small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import transformers
from packaging.version import Version

from vpt_peft import AutoVPTModel

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"
MAX_BYTES = 400_000
EPOCHS = "epochs = 15\n"
PICTURES = 5
TEXTS = (
    "images to train on",
    "trainable params",
    "adapter_model.safetensors",
    "'label': '5'",
    "same predictions: True",
)


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """The code cells."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="AutoImageProcessor needs torchvision there"
)
@pytest.mark.heavy
def test_the_notebook_fine_tunes_draws_saves_and_predicts(
    cells: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    code = "\n".join("".join(cell["source"]) + "\n" for cell in cells)
    assert code.count(EPOCHS) == 1
    namespace: dict[str, Any] = {}
    exec(compile(code.replace(EPOCHS, "epochs = 1\n"), NOTEBOOK.name, "exec"), namespace)
    namespace["plt"].close("all")

    assert "same predictions: True" in capsys.readouterr().out
    vpt = AutoVPTModel.from_pretrained(tmp_path / "runs/tour/digits")
    assert list(vpt.config.id2label.values()) == ["5", "6", "7", "8", "9"]
    assert vpt.adapters["default"].state_dict()["prefix.0.value"].any(), "values start at zero"
    assert (tmp_path / "runs/tour/attention.png").is_file()


def test_the_stored_outputs_are_those_of_one_run_in_order(cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}, "no error"
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}, "no warning"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    texts = ["".join(output.get("text") or output["data"]["text/plain"]) for output in outputs]
    for words in TEXTS:
        assert any(words in text for text in texts)


def test_the_notebook_is_small_and_has_no_paths_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    assert not re.findall(r"""["' ]/(?:home|root|tmp|work|Users)/""", text)
