"""The accuracy benchmark, in a setting of seconds."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch


import accuracy
import accuracy_tables
import digits
import lora
import settings
import training
from images import DataError

from vpt_peft import get_adapter_state_dict

WITHOUT_PEFT = ["linear", "bitfit", "vpt-shallow", "vpt-deep", "full"]
METHODS = [*WITHOUT_PEFT, "lora"] if importlib.util.find_spec("peft") else WITHOUT_PEFT
Bench = Callable[..., list[dict[str, object]]]


@pytest.fixture
def bench(checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path) -> Bench:
    """Runs the benchmark for one epoch on the tiny checkpoint, with further arguments. Returns the output's runs."""
    made = {
        "colors": picture_folder("colors", number=10, splits=("train",)),
        "others": picture_folder("others", "blue white", splits=("train",)),
    }
    picture_folder("colors", number=3, splits=("test",))
    picture_folder("others", "blue white", number=2, splits=("test",))

    def run(*args: object, data: Iterable[str] = ("colors",), output: str = "results.json") -> list[dict[str, object]]:
        folders = [str(made[name]) for name in data]
        command = ["--model", str(checkpoint), "--data", *folders, "--epochs", "1", "--output", str(tmp_path / output)]
        accuracy.main([*command, *map(str, args)])
        return json.loads((tmp_path / output).read_text())  # type: ignore[no-any-return]

    return run


def test_each_method_runs_and_the_table_shows_it(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {run["method"]: run for run in bench("--methods", *METHODS)}
    table = capsys.readouterr().out
    assert list(runs) == METHODS
    assert len(table.splitlines()) == 2 + len(METHODS)
    for name in METHODS:
        assert settings.ALL_METHODS[name].title in table
    assert 0 < runs["linear"]["parameters"] < runs["bitfit"]["parameters"] < runs["full"]["parameters"]  # type: ignore[operator]


def test_a_second_run_needs_resume_and_trains_only_what_is_missing(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--methods", "linear", "vpt-deep", "--seeds", 0, 1)
    runs = bench(*command, data=("colors", "others"))
    table = capsys.readouterr().out
    assert len(runs) == 2 * 2 * 2
    assert "±" in table
    assert {run["data"] for run in runs} == {"colors", "others"}
    assert str(tmp_path.parent) not in json.dumps(runs), "no machine paths"

    with pytest.raises(SystemExit):
        bench(*command)
    assert "Add --resume" in capsys.readouterr().err

    monkeypatch.setattr(accuracy, "tune", None)  # nothing is trained a second time
    assert bench(*command, "--resume", data=("colors", "others")) == runs
    assert capsys.readouterr().out == table


def test_validation_leaves_the_test_images_alone(bench: Bench) -> None:
    bench("--methods", "linear", "--validation")
    runs = bench("--methods", "linear", "--resume")
    assert [(run["train_images"], run["test_images"]) for run in runs] == [(16, 4), (20, 6)]


def test_images_are_read_at_another_size_and_positions_interpolated(bench: Bench) -> None:
    runs = bench("--methods", "linear", "vpt-deep", "full", "--image-size", 32)
    assert [run["image_size"] for run in runs] == [32, 32, 32]


def test_an_image_size_needs_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--image-size", "64"])
    assert "the handwritten digits have 32 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--mark", "settings"], ["--sweep", "--mark", "native"]])
def test_a_mark_is_for_tables_of_accuracy(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(options)
    assert "--mark is for tables of accuracy" in capsys.readouterr().err


def test_what_trains_stays_in_float32_when_it_is_computed_in_bfloat16(bench: Bench, checkpoint: Path) -> None:
    (run,) = bench("--methods", "vpt-deep", "--precision", "bfloat16")
    assert run["precision"] == "bfloat16"
    model = training.load_backbone(str(checkpoint), ["a", "b"], seed=0, precision="bfloat16")
    vpt = training.METHODS["vpt-deep"].attach(model)
    pixel_values = torch.randn(4, 3, 16, 16)
    with training.computing_in("bfloat16"):
        rounded = vpt(pixel_values=pixel_values).logits
    exact = vpt(pixel_values=pixel_values).logits
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)
    assert {tensor.dtype for tensor in get_adapter_state_dict(vpt).values()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_the_head_has_its_own_learning_rate_in_every_method(name: str, checkpoint: Path) -> None:
    tuned = settings.ALL_METHODS[name].attach(training.load_backbone(str(checkpoint), ["a", "b"], seed=0))
    groups = training.groups(tuned, 1e-3, 1e-2)
    head = groups[-1]
    assert head["lr"] == 1e-2
    assert sorted(tuple(parameter.shape) for parameter in head["params"]) == [(2,), (2, 8)]
    in_groups = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert in_groups == sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)


def test_lora_without_peft_says_what_to_install(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"pip install 'vpt-peft\[benchmarks\]'"):
        bench("--methods", "lora")


def test_lora_names_a_model_that_it_does_not_fit() -> None:
    with pytest.raises(DataError, match="but Linear has none"):
        lora.projections_of(torch.nn.Linear(2, 2))


def test_lora_trains_queries_values_and_the_head(checkpoint: Path) -> None:
    pytest.importorskip("peft")
    tuned = lora.LORA.attach(training.load_backbone(str(checkpoint), ["a", "b"], seed=0))
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 2, "two layers, two projections, two factors, and the head"


# -- the sweep and the tables ---------------------------------------------------------------------------------------


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings each of two methods."""
    grid = {
        "linear": ((1e-3, None, None), (training.METHODS["linear"].learning_rate, None, None)),
        "vpt-deep": ((1e-3, 1e-2, 3), (1e-2, 1e-2, None)),
    }
    monkeypatch.setattr(settings, "GRID", grid)


TWO = ("--methods", "linear", "vpt-deep")


@pytest.mark.usefixtures("small_grid")
def test_the_sweep_tries_the_grid_and_its_best_is_measured_beside_the_defaults(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = bench(*TWO, "--sweep", output="sweep.json")
    assert [(run["method"], run["learning_rate"], run["num_tokens"]) for run in tried] == [
        ("linear", 1e-3, 0), ("linear", training.METHODS["linear"].learning_rate, 0),
        ("vpt-deep", 1e-3, 3), ("vpt-deep", 1e-2, 10),
    ]  # fmt: skip
    assert all(run["validation"] for run in tried)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4

    for run, reached in zip(tried, (75.0, 75.0, 80.0, 60.0), strict=True):
        run["accuracy"] = reached
    (tmp_path / "sweep.json").write_text(json.dumps(tried))
    readme = tmp_path / "text.md"
    readme.write_text("a\n<!-- settings -->\n<!-- /settings -->\nb\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nc\n")
    runs = bench(*TWO, "--tuned-by", tmp_path / "sweep.json", "--readme", readme)
    deep = training.METHODS["vpt-deep"]
    assert [(run["method"], run["learning_rate"], run["num_tokens"]) for run in runs] == [
        ("linear", training.METHODS["linear"].learning_rate, 0),  # of equals the default: one run
        ("vpt-deep", deep.learning_rate, 10), ("vpt-deep", 1e-3, 3),
    ]  # fmt: skip
    written = readme.read_text()
    assert "old" not in written
    assert written.startswith("a\n<!-- settings -->\n| Method ")
    assert written.endswith("<!-- /accuracy -->\nc\n")
    assert written.count("| VPT-Deep") == 3
    assert "images of 16 pixels, 1 epochs, batches of 16, float32. With the defaults:" in written
    assert "With each image set's best of the sweep:" in written

    readme.write_text(f"{written}<!-- seeds -->\n<!-- /seeds -->\n")
    bench("--methods", "linear", "--resume", "--report", "--readme", readme, "--mark", "seeds")
    assert readme.read_text().startswith(written)
    assert "<!-- seeds -->\n| Data " in readme.read_text()


@pytest.mark.usefixtures("small_grid")
def test_a_report_of_the_defaults_alone_has_one_table(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = bench(*TWO, "--sweep", output="sweep.json")
    for run in tried:
        run["accuracy"] = 90.0 if run["num_tokens"] == 3 else 80.0
    (tmp_path / "sweep.json").write_text(json.dumps(tried))
    bench(*TWO)
    capsys.readouterr()
    bench(*TWO, "--report", "--tuned-by", tmp_path / "sweep.json")
    report = capsys.readouterr().out
    assert "With the defaults:" in report
    assert "best of the sweep" not in report


@pytest.mark.usefixtures("small_grid")
def test_a_sweep_that_lacks_a_setting_is_refused_by_name(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(SystemExit, match="validation runs of all settings of linear on colors"):
        bench(*TWO, "--tuned-by", tmp_path / "sweep.json")


def test_a_report_trains_nothing_and_marks_what_is_missing(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="must hold such runs to report on"):
        bench("--methods", "linear", "--report")
    bench("--methods", "linear")
    bench("--methods", "vpt-deep", "--resume", data=("others",))
    capsys.readouterr()
    assert len(bench(*TWO, "--report", data=("colors", "others"))) == 2
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2


def run_of(name: str, data: str, reached: float, seed: int) -> dict[str, object]:
    own = settings.settings_of(name, settings.ALL_METHODS[name])
    return {**own, "data": data, "accuracy": reached, "seed": seed, "parameters": 1000, "share": 0.5}


def test_the_comparison_has_means_and_deviations_and_the_best_stands_out() -> None:
    found = {
        "linear": [[run_of("linear", "a", 80.0, 0), run_of("linear", "a", 82.0, 1)], []],
        "vpt-deep": [[run_of("vpt-deep", "a", 90.0, 0)], [run_of("vpt-deep", "b", 70.0, 0)]],
        "full": [[], []],
    }
    lines = accuracy_tables.side_by_side(found, ["a", "b"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["Method", "a, 2 seeds", "b, 1 seed", "Mean", "Trained parameters", "Of the backbone"]
    assert cells[2] == ["Linear head", "81.0 ± 1.4", "-", "-", "1,000", "0.50 %"]
    assert cells[3] == ["VPT-Deep", "**90.0** (1)", "**70.0**", "80.0", "1,000", "0.50 %"]
    assert cells[4] == ["Full fine-tuning", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize("text", ["no marks", "<!-- /x --> <!-- x -->", "<!-- x --> <!-- x --> <!-- /x -->"])
def test_a_text_without_its_marks_is_refused_and_stays_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "text.md"
    file.write_text(text)
    with pytest.raises(DataError, match="must hold the marks <!-- x --> and <!-- /x -->, once each"):
        accuracy_tables.insert(file, "x", "table")
    assert file.read_text() == text


def test_the_benchmark_pretrains_a_swin_on_the_spot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "PRETRAINING_EPOCHS", 1)
    output = tmp_path / "results.json"
    accuracy.main(["--backbone", "swin", "--methods", "vpt-deep", "--epochs", "1", "--output", str(output)])
    assert "| digits 5-9 | VPT-Deep" in capsys.readouterr().out
    assert json.loads(output.read_text())[0]["model"] == "small swin, digits 0-4"
