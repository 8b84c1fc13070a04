"""The accuracy benchmark."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import accuracy
import accuracy_tables
import digit_sets
import harness
import pytest
import settings
import torch

from vpt_peft import get_adapter_state_dict
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.training.methods import METHODS as ALL
from vpt_peft.recipes.training.methods import find_projections

WITHOUT_PEFT = [name for name in settings.ALL_METHODS if name != "lora"]
METHODS = [*WITHOUT_PEFT, "lora"] if importlib.util.find_spec("peft") else WITHOUT_PEFT
Bench = Callable[..., list[dict[str, object]]]


@pytest.fixture
def bench(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Bench:
    """Runs the benchmark for one epoch on the tiny checkpoint. Returns the runs in the output."""
    datasets = {
        "colors": image_folder("colors", number=10, splits=("train",)),
        "others": image_folder("others", "blue white", splits=("train",)),
    }
    image_folder("colors", number=3, splits=("test",))
    image_folder("others", "blue white", number=2, splits=("test",))

    def run(*args: object, data: Iterable[str] = ("colors",), output: str = "results.json") -> list[dict[str, object]]:
        folders = [str(datasets[name]) for name in data]
        command = ["--model", str(checkpoint), "--data", *folders, "--epochs", "1", "--output", str(tmp_path / output)]
        accuracy.main([*command, *map(str, args)])
        return json.loads((tmp_path / output).read_text())  # type: ignore[no-any-return]

    return run


def test_table_has_a_row_for_each_method(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {run["method"]: run for run in bench("--methods", *METHODS)}
    table = capsys.readouterr().out
    assert list(runs) == METHODS
    assert len(table.splitlines()) == 2 + len(METHODS)
    for name in METHODS:
        assert settings.ALL_METHODS[name].title in table
    assert 0 < runs["linear"]["parameters"] < runs["bitfit"]["parameters"] < runs["full"]["parameters"]  # type: ignore[operator]


def test_existing_output_needs_resume_which_skips_its_runs(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--methods", "linear", "vpt-deep", "--seeds", 0, 1)
    runs = bench(*command, data=("colors", "others"))
    table = capsys.readouterr().out
    assert len(runs) == 2 * 2 * 2
    assert "±" in table
    assert {run["data"] for run in runs} == {"colors", "others"}
    assert str(tmp_path.parent) not in json.dumps(runs), "no paths of this machine"

    with pytest.raises(SystemExit):
        bench(*command)
    assert "Add --resume" in capsys.readouterr().err

    monkeypatch.setattr(accuracy, "tune", None)  # nothing is trained
    assert bench(*command, "--resume", data=("colors", "others")) == runs
    assert capsys.readouterr().out == table


def test_validation_does_not_use_the_test_images(bench: Bench) -> None:
    bench("--methods", "linear", "--validation")
    runs = bench("--methods", "linear", "--resume")
    assert [(run["train_images"], run["test_images"]) for run in runs] == [(16, 4), (20, 6)]


def test_image_size_interpolates_position_embeddings(bench: Bench) -> None:
    runs = bench("--methods", "linear", "vpt-deep", "full", "--image-size", 32)
    assert [run["image_size"] for run in runs] == [32, 32, 32]


def test_image_size_without_a_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--image-size", "64"])
    assert "the handwritten digits have 32 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--mark", "settings"], ["--sweep", "--mark", "native"]])
def test_mark_of_another_table_is_an_error(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(options)
    assert "--mark is for tables of accuracy" in capsys.readouterr().err


def test_trained_tensors_are_float32_with_bfloat16_autocast(bench: Bench, checkpoint: Path) -> None:
    (run,) = bench("--methods", "vpt-deep", "--precision", "bfloat16")
    assert run["precision"] == "bfloat16"
    model = harness.load_backbone(str(checkpoint), ["a", "b"], seed=0, precision="bfloat16")
    vpt = ALL["vpt-deep"].attach(model)
    pixel_values = torch.randn(4, 3, 16, 16)
    with harness.autocast_to("bfloat16"):
        rounded = vpt(pixel_values=pixel_values).logits
    exact = vpt(pixel_values=pixel_values).logits
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)
    assert {tensor.dtype for tensor in get_adapter_state_dict(vpt).values()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_parameter_group_for_the_head(name: str, checkpoint: Path) -> None:
    tuned = settings.ALL_METHODS[name].attach(harness.load_backbone(str(checkpoint), ["a", "b"], seed=0))
    method = settings.ALL_METHODS[name].with_rates(1e-3, 1e-2)
    groups = harness.optimizer_groups(tuned, method)
    head = groups[-1]
    assert head["lr"] == 1e-2
    assert sorted(tuple(parameter.shape) for parameter in head["params"]) == [(2,), (2, 8)]
    num_parameters = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert num_parameters == sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)


def test_lora_without_peft_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="pip install peft"):
        bench("--methods", "lora")


def test_lora_for_a_model_without_attention_is_an_error() -> None:
    with pytest.raises(RecipeError, match="but Linear has none"):
        find_projections(torch.nn.Linear(2, 2))


def test_lora_trains_query_and_value_projections_and_the_head(checkpoint: Path) -> None:
    pytest.importorskip("peft")
    tuned = ALL["lora"].attach(harness.load_backbone(str(checkpoint), ["a", "b"], seed=0))
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 2, "2 layers, 2 projections, 2 factors, and the head's weight and bias"


# -- the sweep and the tables ---------------------------------------------------------------------------------------


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods with two settings each."""
    grid = {
        "linear": ((1e-3, None, None), (ALL["linear"].learning_rate, None, None)),
        "vpt-deep": ((1e-3, 1e-2, 3), (1e-2, 1e-2, None)),
    }
    monkeypatch.setattr(settings, "GRID", grid)


TWO = ("--methods", "linear", "vpt-deep")


@pytest.mark.usefixtures("small_grid")
def test_sweep_runs_the_grid_and_tuned_by_adds_its_best_settings(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = bench(*TWO, "--sweep", output="sweep.json")
    assert [(run["method"], run["learning_rate"], run["num_tokens"]) for run in sweep] == [
        ("linear", 1e-3, 0), ("linear", ALL["linear"].learning_rate, 0),
        ("vpt-deep", 1e-3, 3), ("vpt-deep", 1e-2, 10),
    ]  # fmt: skip
    assert all(run["validation"] for run in sweep)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4

    for run, value in zip(sweep, (75.0, 75.0, 80.0, 60.0), strict=True):
        run["accuracy"] = value
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    readme = tmp_path / "text.md"
    readme.write_text("a\n<!-- settings -->\n<!-- /settings -->\nb\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nc\n")
    runs = bench(*TWO, "--tuned-by", tmp_path / "sweep.json", "--readme", readme)
    deep = ALL["vpt-deep"]
    assert [(run["method"], run["learning_rate"], run["num_tokens"]) for run in runs] == [
        ("linear", ALL["linear"].learning_rate, 0),  # tie: the default, one run
        ("vpt-deep", deep.learning_rate, 10), ("vpt-deep", 1e-3, 3),
    ]  # fmt: skip
    written = readme.read_text()
    assert "old" not in written
    assert written.startswith("a\n<!-- settings -->\n| Method ")
    assert written.endswith("<!-- /accuracy -->\nc\n")
    assert written.count("| VPT-Deep") == 3
    assert "16 x 16 pixels, 1 epochs, batch size 16, float32. Default settings:" in written
    assert "Best settings of the sweep for each dataset:" in written

    readme.write_text(f"{written}<!-- seeds -->\n<!-- /seeds -->\n")
    bench("--methods", "linear", "--resume", "--report", "--readme", readme, "--mark", "seeds")
    assert readme.read_text().startswith(written)
    assert "<!-- seeds -->\n| Data " in readme.read_text()


@pytest.mark.usefixtures("small_grid")
def test_report_of_default_settings_has_one_table(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = bench(*TWO, "--sweep", output="sweep.json")
    for run in sweep:
        run["accuracy"] = 90.0 if run["num_tokens"] == 3 else 80.0
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    bench(*TWO)
    capsys.readouterr()
    bench(*TWO, "--report", "--tuned-by", tmp_path / "sweep.json")
    report = capsys.readouterr().out
    assert "Default settings:" in report
    assert "Best settings" not in report


@pytest.mark.usefixtures("small_grid")
def test_incomplete_sweep_is_an_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(SystemExit, match="validation runs of all settings of linear on colors"):
        bench(*TWO, "--tuned-by", tmp_path / "sweep.json")


def test_report_prints_existing_runs_without_training(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="contains none of the requested runs"):
        bench("--methods", "linear", "--report")
    bench("--methods", "linear")
    bench("--methods", "vpt-deep", "--resume", data=("others",))
    capsys.readouterr()
    assert len(bench(*TWO, "--report", data=("colors", "others"))) == 2
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2


def make_run(name: str, data: str, accuracy: float, seed: int) -> dict[str, object]:
    method = settings.settings_of(name, settings.ALL_METHODS[name])
    return {**method, "data": data, "accuracy": accuracy, "seed": seed, "parameters": 1000, "share": 0.5}


def test_comparison_has_mean_and_standard_deviation_and_the_best_in_bold() -> None:
    found = {
        "linear": [[make_run("linear", "a", 80.0, 0), make_run("linear", "a", 82.0, 1)], []],
        "vpt-deep": [[make_run("vpt-deep", "a", 90.0, 0)], [make_run("vpt-deep", "b", 70.0, 0)]],
        "full": [[], []],
    }
    lines = accuracy_tables.comparison_table(found, ["a", "b"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["Method", "a, 2 seeds", "b, 1 seed", "Mean", "Trained parameters", "Share of backbone"]
    assert cells[2] == ["Linear head", "81.0 ± 1.4", "-", "-", "1,000", "0.50 %"]
    assert cells[3] == ["VPT-Deep", "**90.0** (1)", "**70.0**", "80.0", "1,000", "0.50 %"]
    assert cells[4] == ["Full fine-tuning", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize("text", ["no marks", "<!-- /x --> <!-- x -->", "<!-- x --> <!-- x --> <!-- /x -->"])
def test_inserting_into_a_file_without_marks_is_an_error_and_changes_nothing(text: str, tmp_path: Path) -> None:
    file = tmp_path / "text.md"
    file.write_text(text)
    with pytest.raises(RecipeError, match="must contain the marks <!-- x --> and <!-- /x --> once each"):
        accuracy_tables.insert_table(file, "x", "table")
    assert file.read_text() == text


def test_benchmark_pretrains_a_swin_on_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digit_sets.load_digits()
    few = SimpleNamespace(images=whole.images[:200], target=whole.target[:200])
    monkeypatch.setattr(digit_sets, "load_digits", lambda: few)
    monkeypatch.setattr(digit_sets, "PRETRAINING_EPOCHS", 1)
    output = tmp_path / "results.json"
    accuracy.main(["--backbone", "swin", "--methods", "vpt-deep", "--epochs", "1", "--output", str(output)])
    assert "| digits 5-9 | VPT-Deep" in capsys.readouterr().out
    assert json.loads(output.read_text())[0]["model"] == "small swin, digits 0-4"


def test_differences_to_lora_are_paired_over_the_seeds() -> None:
    def runs(*values: float) -> list[settings.Run]:
        return [{"seed": seed, "accuracy": value} for seed, value in enumerate(values)]

    found = {"lora": [runs(90.0, 80.0), runs(50.0, 60.0, 70.0)], "vpt-prefix": [runs(91.0, 83.0), runs(49.0, 59.0)]}
    lines = accuracy_tables.paired_table(found, ["a", "b"]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "VPT-Prefix", "+2.0 ± 1.0", "-1.0 ± 0.0", "+0.5 ± 0.5",
    ]  # fmt: skip
    assert len(lines) == 3


def test_adapters_start_as_the_backbone_and_are_removed_again(checkpoint: Path) -> None:
    pixel_values = torch.randn(2, 3, 16, 16)
    model = harness.load_backbone(str(checkpoint), ["a", "b"], seed=0)
    with torch.no_grad():
        bare = model(pixel_values).logits
        tuned = settings.ALL_METHODS["adapter"].attach(model)
        torch.testing.assert_close(tuned(pixel_values=pixel_values).logits, bare, atol=0, rtol=0)
        layers = model.vit.layers
        torch.nn.init.normal_(layers[0].mlp.up.weight)
        assert (tuned(pixel_values=pixel_values).logits - bare).abs().max() > 1e-3
        trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
        assert trained == {"model.classifier.weight", "model.classifier.bias"} | {
            f"model.vit.layers.{layer}.mlp.{part}.{kind}"
            for layer in range(len(layers))
            for part in ("down", "up")
            for kind in ("weight", "bias")
        }
        assert tuned.unload() is model
        torch.testing.assert_close(model(pixel_values).logits, bare, atol=0, rtol=0)


def test_a_comparison_without_a_sweep_has_the_defaults_and_the_settings(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "text.md"
    readme.write_text("<!-- settings -->\n<!-- /settings -->\n<!-- accuracy -->\n<!-- /accuracy -->\n")
    bench("--methods", "linear", "vpt-prefix-bias", "--compare", "--readme", readme)
    for text in (capsys.readouterr().out, readme.read_text()):
        assert "Default settings:" in text and "Best settings" not in text and "Difference to LoRA" not in text
        assert "0.03, biases 0.003" in text
