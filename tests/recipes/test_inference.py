"""``vpt-peft evaluate``, ``predict`` and ``info``."""

from __future__ import annotations

import csv
import io
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import HubServer
from helpers.models import Tiny, tiny_vit
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPModel, ViTImageProcessorPil

from vpt_peft import AutoVPTModel, PromptConfig, explain_attention, get_vpt_model
from vpt_peft.images.processors import read_processor
from vpt_peft.recipes.commands import predict as predict_module

Command = Callable[..., Any]
Refused = Callable[..., str]


@pytest.fixture
def adapter(train: Command, tmp_path: Path) -> Path:
    """The output folder of a training on red, green and blue images, long enough to learn something."""
    train("--method", "vpt-prefix-bias", "--min-crop", 1, "--learning-rate", "0.1", epochs=5)
    return tmp_path / "out"


@pytest.fixture
def other(train: Command, image_folder: Any, checkpoint: Path, tmp_path: Path) -> Path:
    """An adapter of two other labels on the same backbone."""
    train(
        "--data", image_folder("tones", "black white", splits=("train", "test")), "--method", "vpt-deep", output="tone"
    )
    return tmp_path / "tone"


def expected_scores(adapter: Path, files: list[Path]) -> list[dict[str, float]]:
    """The probabilities of each image by the library alone."""
    vpt, processor = AutoVPTModel.from_pretrained(adapter), read_processor(str(adapter))
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        rows = vpt(**processor(images, return_tensors="pt")).logits.softmax(-1).tolist()
    return [{vpt.config.id2label[label]: score for label, score in enumerate(row)} for row in rows]


def predicted(done: Any) -> list[dict[str, float]]:
    """The scores in JSON output."""
    assert done.code == 0, done.err
    return [{label["label"]: label["score"] for label in entry["labels"]} for entry in json.loads(done.out)]


def close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> bool:
    return len(found) == len(expected) and all(
        one.keys() == two.keys() and all(one[key] == pytest.approx(two[key], abs=1e-5) for key in one)
        for one, two in zip(found, expected, strict=True)
    )


# -- predict ----------------------------------------------------------------------------------------------------------


def test_images_are_named_by_files_folders_and_patterns(adapter: Path, command: Command, tmp_path: Path) -> None:
    test = tmp_path / "colors/test"
    files = [test / "red/3.png", *sorted((test / "blue").iterdir()), *sorted(test.glob("*/1.png"))]
    files = list(dict.fromkeys(files))
    sources = [test / "red/3.png", test / "blue", test / "*/1.png"]
    done = command("predict", adapter, *sources, "--format", "json", "--batch-size", 2)
    assert [entry["image"] for entry in json.loads(done.out)] == list(map(str, files)), "each image once"
    assert {entry["adapter"] for entry in json.loads(done.out)} == {"out"}
    assert close(predicted(done), expected_scores(adapter, files))
    everything = command("predict", adapter, tmp_path / "colors", "--format", "json")
    assert len(predicted(everything)) == 30, "folders at any depth"


def test_the_formats_contain_the_same_labels(adapter: Path, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "colors/test/red/0.png"
    (scores,) = expected_scores(adapter, [file])
    ranked = sorted(scores, key=lambda name: -scores[name])
    table = command("predict", adapter, file, "--top-k", 2).out
    assert [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")] == [
        str(file), *(f"{name} {100 * scores[name]:.1f} %" for name in ranked[:2]),
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(command("predict", adapter, file, "--format", "csv").out)))
    assert [(row["image"], row["rank"], row["label"]) for row in rows] == [
        (str(file), str(rank), name) for rank, name in enumerate(ranked, 1)
    ]
    assert float(rows[0]["score"]) == pytest.approx(scores[ranked[0]], abs=1e-5)


def test_several_adapters_answer_each_image_in_mixed_batches(
    adapter: Path, other: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((tmp_path / "colors/test/red").iterdir())
    calls = []
    predict = predict_module.predict

    def counting(*args: Any) -> Any:
        calls.append(len(args[2]))
        return predict(*args)

    monkeypatch.setattr(predict_module, "predict", counting)
    done = command("predict", adapter, other, *files, "--format", "json", "--batch-size", 3)
    entries = json.loads(done.out)
    assert [(entry["image"], entry["adapter"]) for entry in entries] == [
        (str(file), name) for file in files for name in ("out", "tone")
    ]
    found = predicted(done)
    assert close(found[0::2], expected_scores(adapter, files)) and close(found[1::2], expected_scores(other, files))
    assert calls == [3, 2]
    table = command("predict", adapter, other, files[0]).out
    assert [line.split("|")[2].strip() for line in table.splitlines()] == ["Adapter", "------:", "out", "tone"]


def test_an_adapter_in_a_subfolder_prepares_images_in_its_own_way(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=2), "colors").eval()
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.9] * 3)
    vpt.save_pretrained(tmp_path / "adapters", image_processor=processor)
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    expected = expected_scores(tmp_path / "adapters/colors", [tmp_path / "red.png"])
    found = command("predict", tmp_path / "adapters", tmp_path / "red.png", "--format", "json")
    assert close(predicted(found), expected)
    of_backbone = command("predict", checkpoint, tmp_path / "red.png", "--format", "json")
    assert not close(predicted(of_backbone), expected)


def test_adapters_that_prepare_images_differently_are_not_mixed(
    adapter: Path, other: Path, refused: Refused, tmp_path: Path
) -> None:
    file = other / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.1", "0.2", 1))
    message = refused("predict", adapter, other, tmp_path / "colors/test")
    assert f"'{other}' differs in image_mean. Predict by one after the other." in message


def test_adapters_of_other_backbones_are_not_mixed(adapter: Path, refused: Refused, tmp_path: Path, vit: Tiny) -> None:
    vit.model.save_pretrained(tmp_path / "vit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    get_vpt_model(model, PromptConfig(num_tokens=2)).save_pretrained(tmp_path / "foreign")
    assert "The adapter was made for" in refused("predict", adapter, tmp_path / "foreign", tmp_path / "colors/test")


def test_full_models_and_lora_predict_too(train: Command, command: Command, tmp_path: Path) -> None:
    for method in ("full", "lora"):
        if method == "lora":
            pytest.importorskip("peft")
        train("--method", method, output=method)
        done = command("predict", tmp_path / method, tmp_path / "colors/test/red/0.png", "--format", "json")
        assert predicted(done)[0].keys() == {"red", "green", "blue"}


@pytest.mark.parametrize(
    ("problem_type", "total"), [("multi_label_classification", None), ("regression", None), (None, 1.0)]
)
def test_scores_are_those_of_the_problem(
    problem_type: str | None, total: float | None, command: Command, tmp_path: Path
) -> None:
    tiny = tiny_vit(num_labels=3, problem_type=problem_type)
    tiny.model.save_pretrained(tmp_path / "vit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    vpt = get_vpt_model(model, PromptConfig(num_tokens=2)).eval()
    vpt.save_pretrained(tmp_path / "adapter")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    (scores,) = predicted(command("predict", tmp_path / "adapter", tmp_path / "red.png", "--format", "json"))
    pixels = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)  # mean and std 0.5
    with torch.no_grad():
        logits = vpt(pixels).logits[0]
    expected = {"regression": logits, "multi_label_classification": logits.sigmoid()}.get(
        str(problem_type), logits.softmax(0)
    )
    assert scores == {f"LABEL_{label}": pytest.approx(value, abs=1e-5) for label, value in enumerate(expected.tolist())}
    assert total is None or sum(scores.values()) == pytest.approx(total)


def test_images_of_all_modes_are_predicted_and_broken_ones_are_named(
    adapter: Path, command: Command, refused: Refused, tmp_path: Path
) -> None:
    for mode in ("L", "P", "RGBA", "CMYK"):
        Image.new("RGB", (20, 20), "red").convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    done = command("predict", adapter, tmp_path / "*.*g", "--format", "json")
    assert len(predicted(done)) == 4
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "broken.png' cannot be read as an image" in refused("predict", adapter, tmp_path / "broken.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    assert "deep.png' cannot be used: images must have 8 bits" in refused("predict", adapter, tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nowhere.png"], "The first argument must be an adapter, a folder with adapter_config.json"),
        (["colors"], "The first argument must be an adapter"),
        (["out"], "Expected images after the adapter out, got none"),
        (["out", "nowhere.png"], "got 'nowhere.png', which does not exist"),
        (["out", "*.tiff"], "got '*.tiff', which does not exist"),
        (["out", "empty"], "got 'empty', which has no images"),
    ],
)
def test_missing_adapters_and_images_are_told(
    sources: list[str], message: str, adapter: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert message in refused("predict", *sources)


def test_an_adapter_of_another_task_is_refused(refused: Refused, checkpoint: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    text = {**shape, "vocab_size": 9, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path / "clip")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "clip")
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    get_vpt_model(model, PromptConfig(num_tokens=2)).save_pretrained(tmp_path / "adapter")
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    message = "is for classification and segmentation, got an adapter for zero_shot_image_classification"
    assert message in refused("predict", tmp_path / "adapter", tmp_path / "black.png")
    assert message in refused("evaluate", tmp_path / "adapter", "--data", tmp_path)


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluation_repeats_the_scores_of_training(adapter: Path, command: Command, tmp_path: Path) -> None:
    done = command("evaluate", adapter, "--data", tmp_path / "colors", "--output", tmp_path / "new/scores.json")
    results = json.loads((adapter / "results.json").read_text())
    scores = json.loads((tmp_path / "new/scores.json").read_text())
    assert (scores["confusion"], scores["labels"]) == (results["confusion"], results["labels"])
    assert f"Test: accuracy {scores['accuracy']:.1f} % of 15 images." in done.out
    done = command("evaluate", adapter, "--data", tmp_path / "colors", "--split", "train")
    assert done.code == 0 and "Train: accuracy" in done.out


def test_a_folder_without_splits_is_evaluated_as_a_whole_with_the_labels_of_the_adapter(
    adapter: Path, command: Command, image_folder: Any, tmp_path: Path
) -> None:
    some = image_folder("some", "green red", number=2)  # green is 0 here, and 1 in the adapter
    done = command("evaluate", adapter, "--data", some, "--output", tmp_path / "scores.json")
    assert "All images: accuracy" in done.out and " of 4 images." in done.out
    files = [some / color / f"{index}.png" for color in ("green", "red") for index in range(2)]
    best = [max(scores, key=lambda name: scores[name]) for scores in expected_scores(adapter, files)]
    right = sum(answer == file.parent.name for answer, file in zip(best, files, strict=True))
    assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == pytest.approx(25 * right)


def test_unknown_classes_splits_and_data_are_told(
    adapter: Path, refused: Refused, image_folder: Any, tmp_path: Path
) -> None:
    message = refused("evaluate", adapter, "--data", image_folder("others", "red pink"))
    assert "must be among those of the adapter, blue, green, red; got also pink" in message
    assert "must have the split validation, got train, test" in refused(
        "evaluate", adapter, "--data", tmp_path / "colors", "--split", "validation"
    )
    assert "does not exist. Check the path" in refused("evaluate", adapter, "--data", tmp_path / "nowhere")
    assert "nowhere" in refused("evaluate", tmp_path / "nowhere", "--data", tmp_path / "colors")


# -- missing adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_connection(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Hub cannot be reached, and its client must not wait before it tries again."""

    def refuse(seconds: float) -> None:
        raise AssertionError(f"waited for {seconds} s")

    with hub.client(), socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr("time.sleep", refuse)
        yield


COMMAND_LINES = ["info {}", "explain {} red.png", "predict {} red.png", "evaluate {} --data ."]


@pytest.mark.parametrize("command_line", COMMAND_LINES)
def test_without_a_connection_a_missing_adapter_is_told_at_once(
    command_line: str, no_connection: None, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/flowers").mkdir(parents=True)
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    message = refused(*command_line.format("runs/flowerz").split())
    assert "There is no folder 'runs/flowerz', and whether there is a repository of that name is unknown" in message
    assert "the Hub cannot be reached" in message and message.endswith("Did you mean 'runs/flowers'?")
    message = refused(*command_line.format("me/nothing").split())
    assert "There is no folder 'me/nothing'" in message and "Did you mean" not in message
    assert "Did you mean 'runs/flowers'?" in refused(*command_line.format("./runs/flower").split())
    assert not constants.HF_HUB_OFFLINE


def test_without_a_connection_a_cached_adapter_is_used_at_once(
    adapter: Path, command: Command, no_connection: None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable = constants.ENDPOINT
    hub.add_repo("me/colors", adapter)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    image = str(adapter.parent / "colors/test/red/3.png")
    expected = predicted(command("predict", "me/colors", image, "--format", "json"))
    monkeypatch.setattr(constants, "ENDPOINT", unreachable)
    assert predicted(command("predict", "me/colors", image, "--format", "json")) == expected
    assert not constants.HF_HUB_OFFLINE


def test_a_missing_repository_may_be_a_misspelt_folder(
    refused: Refused, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me/flowers").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with hub.client():
        message = refused("info", "me/flowerz")
    assert message.endswith("folder 'me/flowerz' nor a repository of that name. Did you mean 'me/flowers'?")


# -- info -------------------------------------------------------------------------------------------------------------


def test_info_reads_the_adapter_without_its_backbone(adapter: Path, command: Command, checkpoint: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/such-backbone"}))
    found = json.loads(command("info", adapter, "--json").out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert found["labels"] == ["blue", "green", "red"]
    assert found["backbone"]["name"] == "no/such-backbone" and found["backbone"]["class"] == "ViTForImageClassification"
    assert (found["config"]["kind"], found["config"]["num_tokens"], found["config"]["bias"]) == ("prefix", 10, "all")
    assert sum(found["parameters"].values()) == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes"] == 4 * sum(found["parameters"].values()) and set(found["parameters"]) == {
        "prefix", "bias", "head",
    }  # fmt: skip
    shown = command("info", adapter).out
    assert "3: blue, green, red" in shown and "no/such-backbone (ViTForImageClassification)" in shown


def test_info_reads_from_the_hub(adapter: Path, command: Command, hub: HubServer) -> None:
    with hub.client(token="hf_me"):
        vpt = AutoVPTModel.from_pretrained(adapter)
        with pytest.warns(UserWarning, match="is a local folder"):
            vpt.push_to_hub("me/colors")
        assert "not named (ViTForImageClassification)" in command("info", "me/colors").out


def test_info_says_what_is_no_adapter(
    refused: Refused, train: Command, checkpoint: Path, tmp_path: Path, hub: HubServer
) -> None:
    assert "got a full model or no model in" in refused("info", checkpoint)
    with hub.client():
        assert "404" in refused("info", "me/nothing") or "not found" in refused("info", "me/nothing").lower()
    pytest.importorskip("peft")
    train("--method", "lora")
    assert "got an adapter of PEFT (LORA)" in refused("info", tmp_path / "out")


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_draws_the_attention_and_prints_the_share_of_the_prompts(
    adapter: Path, command: Command, tmp_path: Path
) -> None:
    picture = tmp_path / "pictures" / "explain.png"
    picture.parent.mkdir()
    image = tmp_path / "colors/test/red/3.png"
    done = command("explain", adapter, image, "--layers", 0, 1, "--output", picture)
    assert done.code == 0, done.err
    explanation = explain_attention(AutoVPTModel.from_pretrained(adapter), prepared(adapter, image))
    for layer in explanation.with_adapter:
        assert layer.prompt_share is not None and f"{100 * layer.prompt_share:.1f} %" in done.out
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 200 and len(drawn.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_explain_computes_in_float32_whatever_the_backbone_is_stored_in(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "half", dtype=torch.float32)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    get_vpt_model(model, PromptConfig(num_tokens=2)).save_pretrained(tmp_path / "adapter", image_processor=processor)
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    done = command("explain", tmp_path / "adapter", tmp_path / "red.png", "--output", tmp_path / "explain.png")
    assert done.code == 0 and "float16" not in done.err, done.err


def prepared(adapter: Path, image: Path) -> torch.Tensor:
    """The pixel values of an image."""
    return read_processor(str(adapter))(Image.open(image).convert("RGB"), return_tensors="pt").pixel_values


def test_explain_refuses_what_it_cannot_draw(adapter: Path, command: Command, tmp_path: Path) -> None:
    image = tmp_path / "colors/test/red/3.png"
    assert "from 0 to 1" in command("explain", adapter, image, "--layers", 7).err
    assert "nothing.png" in command("explain", adapter, tmp_path / "nothing.png").err
    done = command("explain", adapter, image, "--output", tmp_path / "explain.txt")
    assert done.code == 2 and ".txt" in done.err
