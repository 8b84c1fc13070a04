"""Engines as replicas of a Ray Serve application, run on this machine."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import enlarge
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vpt_peft import CheckpointError, ImageError, PromptConfig, VPTError, VPTModel, get_vpt_model
from vpt_peft.deploy.engine import EngineStats

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
for package in ("fastapi", "prometheus_client", "python_multipart"):
    pytest.importorskip(package)
from vpt_peft.deploy import ray_serve  # noqa: E402
from vpt_peft.deploy.server import ServerSettings  # noqa: E402

SIZE = {"height": 16, "width": 16}
TASKS: dict[str, dict[str, Any]] = {"deep": {}, "prefix": {"kind": "prefix"}, "shallow": {"deep": False}}
with socket.create_server(("127.0.0.1", 0)) as unused:
    PORT = unused.getsockname()[1]  # another process that runs some of these tests has a cluster of its own
SHARE = {"num_cpus": 0.25}  # of the two processors that there are


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and adapters of it with 2, 3 and 4 labels."""
    folder = tmp_path_factory.mktemp("ray")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder / "backbone")
    ViTImageProcessorPil(size=SIZE).save_pretrained(folder / "backbone")
    for num_labels, (name, options) in enumerate(TASKS.items(), 2):
        model = ViTForImageClassification.from_pretrained(
            folder / "backbone", num_labels=num_labels, ignore_mismatched_sizes=True
        )
        vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=num_labels, **options)).eval())
        vpt.save_pretrained(folder / "adapters" / name)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, without its dashboard and without reports of its use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def engines(cluster: None, folder: Path) -> Any:
    """The handle of an application with two replicas and the HTTP server."""
    settings = ServerSettings(tokens=frozenset({"secret"}), max_pixels=10_000)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    table = [str(folder / "adapters"), str(folder / "broken")]
    application = ray_serve.build(
        folder / "backbone", table, settings=settings, num_replicas=2, max_adapters=2, max_batch=4,
        ray_actor_options=SHARE,
    )  # fmt: skip
    serve.run(application, name="tasks")
    return ray_serve.EngineHandle(serve.get_deployment_handle("Engine", "tasks"))


def pictures(number: int) -> list[Image.Image]:
    pixels = torch.randint(256, (number, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return [Image.fromarray(one) for one in pixels.numpy()]


def expected(folder: Path, task: str, image: Image.Image) -> torch.Tensor:
    """The logits of an adapter on a fresh backbone."""
    model = ViTForImageClassification.from_pretrained(folder / "backbone")
    vpt = VPTModel.from_pretrained(model, folder / "adapters" / task)
    with torch.no_grad():
        return vpt(**ViTImageProcessorPil(size=SIZE)(image, return_tensors="pt")).logits[0]


@pytest.mark.heavy
def test_replicas_answer_requests_for_all_tasks_as_the_adapters_alone(engines: Any, folder: Path) -> None:
    images = pictures(8)
    asked = [(task, image) for image in images for task in TASKS]
    futures = [engines.submit(image, folder / "adapters" / task, top_k=2) for task, image in asked]
    for (task, image), future in zip(asked, futures, strict=True):
        prediction = future.result(60)
        torch.testing.assert_close(prediction.logits, expected(folder, task, image), atol=1e-5, rtol=0)
        assert prediction.adapter == str(folder / "adapters" / task) and len(prediction.labels) == 2
    stats = engines.stats()
    assert stats.answered >= len(asked) and stats.queue_length == 0
    assert stats.evictions > 0, "three adapters do not fit into a replica"


@pytest.mark.heavy
def test_requests_prefer_the_replica_that_has_their_adapter(cluster: None, folder: Path, tmp_path: Path) -> None:
    application = ray_serve.deployment(folder / "backbone", num_replicas=2, ray_actor_options=SHARE)
    engines = ray_serve.EngineHandle(serve.run(application, name="routed", route_prefix=None))
    try:
        replicas = []  # that loaded the adapter of each attempt; Serve is told of it some time after the first request
        for attempt in range(8):
            adapter = shutil.copytree(folder / "adapters" / "deep", tmp_path / str(attempt))
            before = engines.stats().misses
            for index, image in enumerate(pictures(12)):
                engines.predict(image, adapter)
                if index == 0:
                    time.sleep(0.1 * 2**attempt)
            replicas.append(engines.stats().misses - before)
            if replicas[-1] == 1:
                return
        raise AssertionError(f"requests for one adapter went to all replicas: {replicas}")
    finally:
        serve.delete("routed")


@pytest.mark.heavy
def test_an_adapter_or_an_image_that_cannot_be_used_fails_alone(engines: Any, folder: Path) -> None:
    (image,) = pictures(1)
    futures = {
        "good": engines.submit(image, folder / "adapters" / "deep"),
        "adapter": engines.submit(image, folder / "broken"),
        "image": engines.submit(torch.zeros(1, 2), folder / "adapters" / "deep"),
    }
    wait(futures.values(), 60)
    assert len(futures["good"].result().labels) == 2
    assert isinstance(futures["adapter"].exception(), CheckpointError)
    assert isinstance(futures["image"].exception(), ImageError)
    assert "Traceback" not in str(futures["adapter"].exception()), "of the replica"


def post(task: str, image: Image.Image, token: str = "secret") -> tuple[int, Any]:
    """Status and answer of a request over HTTP."""
    file = io.BytesIO()
    image.save(file, "PNG")
    body = json.dumps({"task": task, "image": base64.b64encode(file.getvalue()).decode(), "logits": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/predict", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


@pytest.mark.heavy
def test_the_http_server_in_front_has_the_limits_of_vpt_peft_serve(engines: Any, folder: Path) -> None:
    (image,) = pictures(1)
    status, answer = post("prefix", image)
    assert status == 200, answer
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected(folder, "prefix", image), atol=1e-5, rtol=0)
    assert post("prefix", image, token="wrong")[0] == 401
    assert post("dogs", image)[1]["code"] == "unknown_task"
    assert post(str(folder / "adapters" / "prefix"), image)[1]["code"] == "unknown_task", "no path is opened"
    assert post("prefix", image.resize((200, 200)))[1]["code"] == "image_too_large"
    status, problem = post("broken", image)
    assert (status, problem["code"]) == (500, "adapter_unavailable") and str(folder) not in problem["message"]
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/metrics", headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        numbers = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    assert float(numbers["vpt_peft_engine_answered_total"]) == engines.stats().answered > 0


def test_statistics_of_replicas_are_added() -> None:
    zero = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, {}, 0, 0, 0, 0, 0, None, None, None)
    one = replace(zero, accepted=5, batch_sizes={1: 2, 4: 1}, latency_p50=0.2)
    two = replace(zero, accepted=7, batch_sizes={2: 1, 4: 2}, latency_p50=0.3, latency_p99=1.5)
    added = replace(zero, accepted=12, batch_sizes={1: 2, 2: 1, 4: 3}, latency_p50=0.3, latency_p99=1.5)
    assert ray_serve.add_stats([one, two, zero]) == added
    assert ray_serve.add_stats([]) == zero


def test_a_table_with_what_is_no_adapter_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(VPTError, match="Expected an adapter folder"):
        ray_serve.build("me/backbone", [str(tmp_path)])
