"""The benchmark of initial prompts, at a minimal size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import initialisation
import pytest
import torch
from image_sets import Preprocessing, load_images
from transformers import ViTForImageClassification

from vpt_peft.recipes.data.digits import small_classifier
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.training.methods import SMALL_METHODS

Bench = Callable[..., list[dict[str, Any]]]
QUICK = ["--epochs", "1", "--mae-epochs", "1", "--pretraining-epochs", "1"]


@pytest.fixture
def colors(image_folder: Callable[..., Path]) -> Path:
    return image_folder("colors", number=10)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Runs the benchmark for one epoch. Returns the runs in the output."""

    def run(*args: object) -> list[dict[str, Any]]:
        output = tmp_path / "results.json"
        initialisation.main([*QUICK, *map(str, args), "--output", str(output)])
        return json.loads(output.read_text())  # type: ignore[no-any-return]

    return run


@pytest.mark.heavy
def test_the_table_has_a_column_for_each_initialisation(
    bench: Bench, colors: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def tune(model: Any, method: Any, *rest: Any) -> Any:
        trained.append((method.title, method.learning_rate, method.initialisation))
        return harness.tune(model, method, *rest)

    monkeypatch.setattr(initialisation, "tune", tune)
    runs = bench(
        "--data", colors, "--image-size", 16, "--seeds", 0, 1, "--initialisations", "uniform", "sample", "mean",
        "--learning-rate-factors", 1, 10,
    )  # fmt: skip
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][4:] == ["uniform", "sample", "mean"]
    assert len(rows) == 2 * 2 and all(row.count("±") == 3 and "| MAE" in row and "colors" in row for row in rows)
    assert len(runs) == 2 * 2 * 3 * 2
    assert {run["image_size"] for run in runs} == {16} and all(0 <= run["accuracy"] <= 100 for run in runs)
    assert {(run["method"], run["learning_rate"]) for run in runs} == {
        ("vpt-shallow", 1e-2), ("vpt-shallow", 1e-1), ("vpt-deep", 3e-3), ("vpt-deep", 3e-2),
    }  # fmt: skip
    titles = {name: method.title for name, method in SMALL_METHODS.items()}
    assert trained == [(titles[run["method"]], run["learning_rate"], run["initialisation"]) for run in runs]
    assert str(colors.parent) not in json.dumps(runs), "no paths of this machine"


@pytest.mark.heavy
def test_both_pretrainings_are_compared_on_digits(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--methods", "vpt-deep", "--initialisations", "uniform", "kmeans")
    runs = bench(*command)
    table = capsys.readouterr().out
    found = {(run["pretraining"], run["initialisation"]): run["accuracy"] for run in runs}
    assert list(found) == [(how, name) for how in ("supervised", "mae") for name in ("uniform", "kmeans")]
    assert all(f"{accuracy:.1f}" in table for accuracy in found.values())

    with pytest.raises(SystemExit):
        bench(*command)
    assert "Add --resume" in capsys.readouterr().err
    monkeypatch.setattr(initialisation, "backbones", None)  # nothing is trained
    assert bench(*command, "--resume") == runs
    assert capsys.readouterr().out == table


def test_the_autoencoders_encoder_is_the_one_that_is_tuned(colors: Path, tmp_path: Path) -> None:
    train_set, _ = load_images(str(colors), Preprocessing(32), 0)
    loss = initialisation.pretrain_mae([train_set], tmp_path / "mae", epochs=1, seed=0)
    assert 0 < loss < 10
    torch.manual_seed(0)
    fresh = dict(initialisation.small_vit(32).vit.named_parameters())
    loaded = harness.load_backbone(str(tmp_path / "mae"), ["one", "two"], seed=0)
    assert isinstance(loaded, ViTForImageClassification) and loaded.config.model_type == "vit"
    same = [name for name, tensor in loaded.vit.named_parameters() if torch.equal(tensor.cpu(), fresh[name])]
    assert same == [], "weights that no pretraining has changed"
    positions = loaded.vit.embeddings.position_embeddings[0, 1:]  # sines and cosines of row and column
    halves = positions.unflatten(-1, (4, -1))
    torch.testing.assert_close(halves[:, 0] ** 2 + halves[:, 1] ** 2, torch.ones_like(halves[:, 0]))

    encoder = {name: tensor.clone() for name, tensor in loaded.vit.state_dict().items()}
    initialisation.check_encoder(encoder, tmp_path / "mae")
    encoder["layernorm.bias"] += 1
    with pytest.raises(RecipeError, match=r"these differ: layernorm\.bias\."):
        initialisation.check_encoder(encoder, tmp_path / "mae")


def test_prompts_start_as_the_method_says(colors: Path) -> None:
    train_set, _ = load_images(str(colors), Preprocessing(32), 0)
    prompts = {}
    for name in (None, "uniform", "sample", "mean"):
        method = SMALL_METHODS["vpt-deep"]
        if name is not None:
            method = initialisation.Initialised(**vars(method), initialisation=name, images=train_set)
        torch.manual_seed(0)
        model = small_classifier("vit")
        torch.manual_seed(1)
        prompts[name] = method.attach(model).get_adapter_state_dict()["prompts.3"]
    assert torch.equal(prompts["uniform"], prompts[None])
    for name in ("sample", "mean"):
        assert not torch.isclose(prompts[name], prompts["uniform"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "64"], "is for --data only, got 64"),
        (["--data", "flowers", "--image-size", "60"], "must be a multiple of 8, and is for --data only, got 60"),
        (["--mae-epochs", "0"], "--mae-epochs must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        initialisation.main(options)
    assert message in capsys.readouterr().err
