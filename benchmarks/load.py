"""A server under load: every accepted request is answered rightly, or with an error of its own.

    pip install '.[serve]' httpx
    python benchmarks/load.py --output benchmarks/results/load-cpu.json

Starts ``vpt-peft serve`` with a tiny backbone of random weights and sends requests over loopback from many clients.
Among them are damaged and oversized images, adapters that are damaged, and tasks that do not exist. Adapters are
replaced on disk all the while. Once, the server process is killed, and a supervisor starts it again: requests that it
had accepted then end in a connection error, which their clients see, and send them again.

The logits of each answer are compared with those of the adapter run alone. Of an adapter that was replaced while the
request was on its way, the old and the new version are right; before and after, only one is. Resident memory is that of
the second process, after two fifths of the requests and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import httpx
import torch
from PIL import Image
from speed import environment
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vpt_peft import PromptConfig, VPTModel, get_vpt_model
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.runtime import silence_transformers

VIT = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = (
    {"num_tokens": 3}, {"num_tokens": 4, "kind": "prefix"}, {"num_tokens": 2, "deep": False},
    {"num_tokens": 0, "bias": "all"},
)  # fmt: skip
TOLERANCE = 1e-4
START_SECONDS = 180
KILL_AFTER = 0.2  # of the requests
WARM_AFTER = 0.4  # of the requests: then the memory of the second process is taken for its size
SHARES = {"good": 0.88, "bad image": 0.05, "bad adapter": 0.04, "no task": 0.03}  # of the requests
VERSIONS = 2  # of each adapter


# -- adapters, images and right answers -------------------------------------------------------------------------------


class World:
    """A backbone, adapters in two versions each, images, and the logits of each adapter run alone.

    Attributes:
        tasks: names of the adapters that work; damaged: of those that do not.
        images: image files. bad_images: files that are none, with the status that each should get.
        right: logits (number of images, labels) by task and version.
    """

    def __init__(self, folder: Path, tasks: int, images: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model_folder, self.served = folder / "model", folder / "adapters"
        model = ViTForImageClassification(ViTConfig(**VIT, num_labels=7)).eval()
        model.save_pretrained(self.model_folder)
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        processor.save_pretrained(self.model_folder)
        self.images = [make_image(index) for index in range(images)]
        opened = [Image.open(io.BytesIO(image)) for image in self.images]
        pixel_values = processor(opened, return_tensors="pt")["pixel_values"]
        self.tasks = [f"task-{index}" for index in range(tasks)]
        self.right: dict[tuple[str, int], Tensor] = {}
        self.versions = [self._make_version(version, pixel_values) for version in range(VERSIONS)]
        for task in self.tasks:
            self.put(task, 0)
        self.damaged = ["damaged-weights", "damaged-config"]
        for name in self.damaged:
            shutil.copytree(self.served / self.tasks[0], self.served / name)
        weights = self.served / "damaged-weights" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        (self.served / "damaged-config" / "adapter_config.json").write_text("{")
        self.bad_images = make_bad_images()

    def _make_version(self, version: int, pixel_values: Tensor) -> VPTModel:
        """A model with all tasks, whose logits are noted."""
        model = ViTForImageClassification.from_pretrained(self.model_folder)
        vpt: VPTModel | None = None
        for index, task in enumerate(self.tasks):
            config, labels = PromptConfig(**CONFIGS[index % len(CONFIGS)]), 2 + (index + version) % 6
            if vpt is None:
                vpt = get_vpt_model(model, config, task, num_labels=labels)
            else:
                vpt.add_adapter(task, config, num_labels=labels)
        assert vpt is not None
        vpt.eval()
        with torch.no_grad():
            for parameter in vpt.adapters.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            for task in self.tasks:
                vpt.set_adapter(task)
                self.right[task, version] = vpt(pixel_values).logits
        return vpt

    def put(self, task: str, version: int) -> None:
        """Saves a version of an adapter into the folder that is served, in place of the one there."""
        self.versions[version].save_pretrained(self.served, [task])


def encode(image: Image.Image, format: str) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def make_image(index: int) -> bytes:
    """An image file without loss, so that it decodes to the same pixels everywhere."""
    pixels = torch.randint(0, 256, (20 + index, 24, 3), dtype=torch.uint8)
    return encode(Image.fromarray(pixels.numpy()), ("PNG", "BMP", "TIFF")[index % 3])


def make_bad_images() -> list[tuple[bytes, int]]:
    """Files that are no images, or too large when they are decoded, with the status that each should get."""
    whole = encode(Image.new("RGB", (64, 64), "red"), "PNG")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + whole[24:29]
    bomb = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    return [(whole[:60], 422), (b"", 422), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422), (bomb, 413)]


# -- the server -------------------------------------------------------------------------------------------------------


class Supervisor:
    """Runs the server, and starts it again when it has ended, as systemd or a container would.

    Attributes:
        starts: how often it was started.
    """

    def __init__(self, command: Sequence[str], url: str, log: Path) -> None:
        self.command, self.url, self.log = list(command), url, log
        self.starts = 0
        self.stopping = Event()
        self.start()
        self.thread = Thread(target=self._watch, daemon=True)
        self.thread.start()

    def start(self) -> None:
        """Starts the server."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        self.starts += 1

    def wait_until_ready(self) -> None:
        """Waits until it accepts predictions."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"The server did not start within {START_SECONDS} s: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """Kills the server as the kernel does when memory runs out: it can finish nothing."""
        process = self.process  # the supervisor soon has another
        process.send_signal(signal.SIGKILL)
        process.wait()

    def wait_until_restarted(self) -> None:
        """Waits until a second process accepts predictions."""
        while self.starts < 2:
            time.sleep(0.05)
        self.wait_until_ready()

    def stop(self) -> int:
        """Stops the server, which answers what it has accepted. Returns its exit code."""
        self.stopping.set()
        self.thread.join()
        self.process.terminate()
        return self.process.wait(START_SECONDS)

    def resident_bytes(self) -> int:
        """Resident memory of the server."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def _watch(self) -> None:
        while not self.stopping.wait(0.05):
            if self.process.poll() is not None:
                self.start()


# -- clients ----------------------------------------------------------------------------------------------------------


@dataclass
class Replacements:
    """How often each adapter was replaced: its versions take turns, so that the number tells which one is on disk.

    Attributes:
        begun, ended: number of replacements by task.
    """

    world: World
    begun: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)

    def replace(self, task: str) -> None:
        """Puts the other version of an adapter on disk."""
        self.begun[task] += 1
        self.world.put(task, self.begun[task] % VERSIONS)
        self.ended[task] += 1

    def versions(self, task: str, ended_when_sent: int) -> set[int]:
        """The versions that a request that is answered now may have met."""
        return {count % VERSIONS for count in range(ended_when_sent, self.begun[task] + 1)}


@dataclass
class Report:
    """What became of the requests.

    Attributes:
        answers: number of right answers by kind of request.
        wrong: descriptions of the answers that should have been others.
        lost: requests that the killed server had not answered; they were sent again.
        refused: requests that were sent again after status 503.
        replaced: replacements of adapters on disk.
        memory: resident bytes of the last process: at each sample, the number of answers so far and the bytes.
        seconds: times from sending to the answer.
    """

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    refused: int = 0
    replaced: int = 0
    memory: list[tuple[int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    largest_difference: float = 0.0

    @property
    def count(self) -> int:
        """Number of requests that were answered."""
        return sum(self.answers.values()) + len(self.wrong)


class Client:
    """Sends requests one after the other over one connection, and checks the answers.

    Args:
        numbers: of the requests, shared with other clients.
    """

    def __init__(self, url: str, replacements: Replacements, report: Report, numbers: Iterator[int]) -> None:
        self.url, self.replacements, self.report, self.numbers = url, replacements, report, numbers
        self.world = replacements.world

    async def run(self) -> None:
        """Sends requests until there are no more numbers."""
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as http:
            for number in self.numbers:
                await self.request(http, random.Random(number))

    async def request(self, http: httpx.AsyncClient, chance: random.Random) -> None:
        """Sends a request until it is answered."""
        (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
        task = chance.choice(self.world.tasks)
        index = chance.randrange(len(self.world.images))
        image, status = self.world.images[index], 200
        if kind == "bad image":
            image, status = chance.choice(self.world.bad_images)
        elif kind == "bad adapter":
            task, status = chance.choice(self.world.damaged), 500
        elif kind == "no task":
            task, status = chance.choice(["", "task-x", "../adapters/task-0", str(self.world.served / "task-0")]), 404
        options = {"task": task, "logits": True}
        while True:
            ended = self.replacements.ended[task]
            start = time.perf_counter()
            try:
                if chance.random() < 0.5:
                    form = {"task": task, "logits": "true"}
                    answer = await http.post("/v1/predict", data=form, files={"file": ("../../image", image)})
                else:
                    text = base64.b64encode(image).decode()
                    answer = await http.post("/v1/predict", json={**options, "image": text})
            except httpx.TransportError as error:
                self.report.lost += not isinstance(
                    error, httpx.ConnectError
                )  # until it runs again, nothing is accepted
                await asyncio.sleep(0.1)
                continue
            if answer.status_code == 503:
                self.report.refused += 1
                await asyncio.sleep(float(answer.headers["Retry-After"]))
                continue
            self.report.seconds.append(time.perf_counter() - start)
            problem = self.check(answer, status, task, index, ended)
            if problem:
                self.report.wrong.append(f"{kind}: {problem}")
            else:
                self.report.answers[kind] += 1
            return

    def check(self, answer: httpx.Response, status: int, task: str, index: int, ended: int) -> str:
        """What is wrong with an answer; nothing if it is right."""
        if answer.status_code != status:
            return f"expected status {status} for {task}, got {answer.status_code}: {answer.text[:300]}"
        if status != 200:
            error = answer.json()["error"]
            leaks = "Traceback" in answer.text or str(self.world.served.parent) in error["message"].replace(task, "")
            return f"a path or a traceback in {answer.text}" if leaks else ""
        logits = torch.tensor(answer.json()["logits"])
        right = [self.world.right[task, version][index] for version in self.replacements.versions(task, ended)]
        differences = [(logits - one).abs().max().item() for one in right if one.shape == logits.shape]
        if not differences or min(differences) > TOLERANCE:
            return f"{task}, image {index}: logits differ by {differences}"
        self.report.largest_difference = max(self.report.largest_difference, min(differences))
        return ""


# -- the run ----------------------------------------------------------------------------------------------------------


async def send_requests(world: World, supervisor: Supervisor, args: argparse.Namespace) -> Report:
    """Sends all requests, replaces adapters and kills the server meanwhile."""
    report, replacements, numbers = Report(), Replacements(world), iter(range(args.requests))
    clients = [Client(supervisor.url, replacements, report, numbers) for _ in range(args.clients)]
    disturbing = asyncio.create_task(disturb(supervisor, replacements, report, args))
    await asyncio.gather(*(client.run() for client in clients))
    disturbing.cancel()
    with suppress(asyncio.CancelledError):
        await disturbing
    report.memory.append((report.count, supervisor.resident_bytes()))
    report.replaced = sum(replacements.ended.values())
    return report


async def disturb(supervisor: Supervisor, replacements: Replacements, report: Report, args: argparse.Namespace) -> None:
    """Replaces an adapter every now and then; kills the server after a fifth of the requests; samples its memory."""
    chance, is_killed, next_sample = random.Random(args.seed), False, 0.0
    while True:
        await asyncio.sleep(args.replace_seconds)
        await asyncio.to_thread(replacements.replace, chance.choice(replacements.world.tasks))
        if not is_killed and report.count >= KILL_AFTER * args.requests:
            supervisor.kill()
            await asyncio.to_thread(supervisor.wait_until_restarted)
            is_killed = True
        elif is_killed and report.count >= next_sample:
            report.memory.append((report.count, supervisor.resident_bytes()))
            next_sample = report.count + args.requests / 50


def summarize(report: Report, elapsed: float, starts: int, exit_code: int, args: argparse.Namespace) -> dict[str, Any]:
    """The report as JSON types."""
    ordered = sorted(report.seconds)
    warm = [size for count, size in report.memory if count >= WARM_AFTER * args.requests]
    return {
        "environment": environment(args),
        "requests": args.requests,
        "clients": args.clients,
        "tasks": args.tasks,
        "right": dict(report.answers),
        "wrong": report.wrong,
        "largest_difference": report.largest_difference,
        "lost_with_the_killed_process": report.lost,
        "refused_and_sent_again": report.refused,
        "adapters_replaced_on_disk": report.replaced,
        "server_starts": starts,
        "exit_code": exit_code,
        "requests_per_second": report.count / elapsed,
        "seconds": {f"p{share}": ordered[len(ordered) * share // 100] for share in (50, 95, 99)},
        "resident_mb": {"warm": warm[0] / 1e6, "end": warm[-1] / 1e6, "largest": max(warm) / 1e6},
        "memory": report.memory,
    }


def make_table(summary: dict[str, Any]) -> str:
    """The summary in Markdown."""
    right, memory, seconds = summary["right"], summary["resident_mb"], summary["seconds"]
    rows = [
        ("Load", "Measured"),
        ("requests, clients, tasks", f"{summary['requests']:,}, {summary['clients']}, {summary['tasks']}"),
        ("right predictions", f"{right.get('good', 0):,}, largest difference {summary['largest_difference']:.1e}"),
        ("right errors", ", ".join(f"{kind} {count:,}" for kind, count in right.items() if kind != "good")),
        ("wrong answers", str(len(summary["wrong"]))),
        ("lost with the killed process, sent again", str(summary["lost_with_the_killed_process"])),
        ("refused with status 503, sent again", str(summary["refused_and_sent_again"])),
        ("adapters replaced on disk", str(summary["adapters_replaced_on_disk"])),
        ("requests a second", f"{summary['requests_per_second']:.0f}"),
        ("latency p50, p95, p99", ", ".join(f"{1000 * seconds[name]:.0f} ms" for name in ("p50", "p95", "p99"))),
        ("resident MB, warm, at the end, largest", ", ".join(f"{value:.0f}" for value in memory.values())),
    ]  # fmt: skip
    return table(rows)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs server and clients; returns the summary."""
    world, port = World(folder, args.tasks, args.images, args.seed), free_port()
    command = [
        sys.executable, "-m", "vpt_peft", "serve", "--model", world.model_folder, "--adapters", world.served,
        "--port", port, "--device", "cpu", "--max-adapters", args.max_adapters, "--max-pixels", 10**6,
    ]  # fmt: skip
    supervisor = Supervisor([str(part) for part in command], f"http://127.0.0.1:{port}", folder / "server.log")
    exit_code = -1
    try:
        supervisor.wait_until_ready()
        start = time.perf_counter()
        report = asyncio.run(send_requests(world, supervisor, args))
        elapsed = time.perf_counter() - start
    finally:
        exit_code = supervisor.stop()
    return summarize(report, elapsed, supervisor.starts, exit_code, args)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--max-adapters", type=int, default=32, help="in memory; fewer than tasks, to evict some")
    parser.add_argument("--replace-seconds", type=float, default=0.1, help="between replacements of adapters on disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its table."""
    args = parse(arguments)
    args.device = "cpu"
    silence_transformers()
    with TemporaryDirectory() as folder:
        summary = run(args, Path(folder))
    print(make_table(summary))
    for problem in summary["wrong"][:10]:
        print(f"WRONG: {problem}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


if __name__ == "__main__":
    sys.exit(bool(main()["wrong"]))
