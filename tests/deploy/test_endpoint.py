"""An Inference Endpoint runs an adapter by the ``handler.py`` that was pushed with it."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import BACKBONE, HubServer
from helpers.models import Tiny, move
from helpers.served import PROCESSOR, encode, picture
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoModelForImageClassification, ViTForMaskedImageModeling

from vpt_peft import AdapterError, PromptConfig, VPTError, VPTModel, __version__, get_vpt_model

NAME = "me/birds-vpt"
ENDPOINT = {"handler.py", "requirements.txt"}


@pytest.fixture
def vpt(online: HubServer) -> VPTModel:
    model = AutoModelForImageClassification.from_pretrained(BACKBONE)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3), id2label={0: "duck", 1: "heron", 2: "swan"})
    move(vpt.adapters["default"])
    return vpt.eval()


def handler_in(folder: Path) -> Any:
    """The object that an endpoint makes of the ``handler.py`` in a folder."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.EndpointHandler(str(folder))
    except ImportError:
        pytest.skip("AutoImageProcessor of this version of transformers needs torchvision")


@pytest.fixture
def handler(vpt: VPTModel, tmp_path: Path) -> Any:
    """The handler in a downloaded repository."""
    vpt.push_to_hub(NAME, image_processor=PROCESSOR, handler=True)
    return handler_in(Path(snapshot_download(NAME, local_dir=tmp_path / "downloaded")))


def test_the_pushed_handler_answers_as_the_adapter(handler: Any, vpt: VPTModel) -> None:
    image = picture()
    with torch.no_grad():
        scores = vpt(PROCESSOR(image, return_tensors="pt")["pixel_values"]).logits[0].softmax(-1)
    order = scores.argsort(descending=True).tolist()
    for inputs in (image, base64.b64encode(encode(image)).decode(), encode(image)):
        answer = handler({"inputs": inputs})
        assert [label["label"] for label in answer] == [["duck", "heron", "swan"][index] for index in order]
        assert [label["score"] for label in answer] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert handler({"inputs": image, "parameters": {"top_k": 1}}) == answer[:1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "got NoneType"),
        ({"inputs": "http://127.0.0.1/image.png"}, "in base64, got another text"),
        ({"inputs": "downloaded/image.png"}, "in base64, got another text"),
        ({"inputs": Image.new("I;16", (8, 8))}, "8 bits per channel"),
        ({"inputs": {"image": ""}}, "got dict"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"timeout": 3}}, "may contain top_k"),
    ],
)
def test_the_handler_opens_neither_paths_nor_urls(data: dict[str, Any], message: str, handler: Any) -> None:
    with pytest.raises(VPTError, match=message):
        handler(data)


def test_the_handler_needs_the_packages_that_are_pushed_with_it(handler: Any, online: HubServer) -> None:
    files = online.repo(NAME).files()
    assert files["requirements.txt"].decode().split() == [f"vpt-peft>={__version__}", "pillow"]
    assert set(files) >= ENDPOINT | {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"}


def test_without_handler_the_users_own_files_stay(vpt: VPTModel, online: HubServer) -> None:
    vpt.push_to_hub(NAME)
    assert not ENDPOINT & set(online.repo(NAME).files())
    online.repo(NAME).put({"handler.py": b"mine"})
    vpt.push_to_hub(NAME, license="mit")
    assert online.repo(NAME).files()["handler.py"] == b"mine"


def test_adapters_that_an_endpoint_cannot_run_are_refused_before_anything_is_pushed(
    vpt: VPTModel, online: HubServer, vit: Tiny
) -> None:
    vpt.add_adapter("cars", PromptConfig(num_tokens=2), num_labels=3)
    vpt.add_adapter("planes", PromptConfig(num_tokens=2), num_labels=3)
    with pytest.raises(AdapterError, match="An endpoint runs one adapter, got cars, planes"):
        vpt.push_to_hub(NAME, selected_adapters=["cars", "planes"], handler=True)
    masked = get_vpt_model(ViTForMaskedImageModeling(vit.model.config), PromptConfig(num_tokens=2))
    with pytest.raises(AdapterError, match="handler=True is for image classification, got the adapter 'default'"):
        masked.push_to_hub(NAME, handler=True)
    assert NAME not in online.repos


def test_a_single_adapter_with_another_name_is_run(vpt: VPTModel, tmp_path: Path) -> None:
    vpt.add_adapter("cars", PromptConfig(num_tokens=2), id2label={0: "bus", 1: "van"})
    vpt.push_to_hub(NAME, selected_adapters=["cars"], image_processor=PROCESSOR, handler=True)
    answer = handler_in(Path(snapshot_download(NAME, local_dir=tmp_path / "downloaded")))({"inputs": picture()})
    assert {label["label"] for label in answer} == {"bus", "van"}
