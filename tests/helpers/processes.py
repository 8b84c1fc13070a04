"""What each of two processes does in test_processes.py, started by torchrun: ``torchrun processes.py folder``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from helpers.models import BUILDERS, Tiny, gradients
from vpt_peft import VPTModel, adamw, get_adapter_state_dict, set_adapter_state_dict

CONFIGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"deep": False, "projection_dim": 6, "bias": "all"},
    "prefix": {"kind": "prefix", "bias": "all"},
}


class Four(Dataset):  # type: ignore[type-arg]
    """The images of a tiny model, as Trainer reads them."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.tiny.pixel_values[index % 4] + index // 4, "labels": self.tiny.labels[index % 4]}


def step(vpt: VPTModel, model: Callable[..., Any], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """One step of AdamW; returns its gradients."""
    optimizer_class, groups = adamw(vpt)
    optimizer = optimizer_class(**groups)
    model(images, labels=labels).loss.backward()
    found = {name: whole(gradient).clone() for name, gradient in gradients(vpt).items()}
    optimizer.step()
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(vpt: VPTModel, tiny: Tiny, folder: Path, batch_size: int, **settings: Any) -> None:
    """Two steps of Trainer, saved at the end."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=batch_size, save_strategy="no", use_cpu=True,
        report_to=[], disable_tqdm=True, seed=3, learning_rate=1e-2, **settings,
    )  # fmt: skip
    trainer = Trainer(vpt, arguments, train_dataset=Four(tiny))
    trainer.train()
    trainer.save_model()


def with_ddp(vpt: VPTModel, tiny: Tiny) -> dict[str, Tensor]:
    own = slice(2 * distributed.get_rank(), 2 * distributed.get_rank() + 2)
    return step(vpt, DistributedDataParallel(vpt), tiny.pixel_values[own], tiny.labels[own])


def with_fsdp(vpt: VPTModel, tiny: Tiny) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    for layer in vpt.get_base_model().modules():
        if type(layer).__name__ in vpt._no_split_modules:
            fully_shard(layer, mesh=mesh)
    fully_shard(vpt, mesh=mesh)
    own = slice(2 * distributed.get_rank(), 2 * distributed.get_rank() + 2)
    found = step(vpt, vpt, tiny.pixel_values[own], tiny.labels[own])
    assert all(isinstance(parameter, DTensor) for parameter in vpt.parameters())
    return found


def load_back(vpt: VPTModel, folder: Path) -> None:
    """All ways to load an adapter that has gone astray give it the saved weights again."""
    saved = load_file(folder / "adapter_model.safetensors")
    of_model = {name: tensor.clone() for name, tensor in vpt.state_dict().items()}
    ways: dict[str, Callable[[], Any]] = {
        "set_adapter_state_dict": lambda: set_adapter_state_dict(vpt, saved),
        "load_state_dict": lambda: vpt.load_state_dict(of_model),
        "load_adapter": lambda: vpt.load_adapter(folder, "default"),
    }
    for way, load in ways.items():
        with torch.no_grad():
            for tensor in vpt.state_dict().values():
                tensor.fill_(7)
        load()
        for name, tensor in get_adapter_state_dict(vpt).items():
            assert torch.equal(tensor, saved[name]), f"{way} left {name} as it was"


def init_prompts(vpt: VPTModel, build: Callable[[], Tiny]) -> dict[str, Tensor]:
    """Prompts that start as tokens, where each process sees other images. The model then computes with them."""
    tiny, rank = build(), distributed.get_rank()
    torch.manual_seed(rank)
    vpt.init_prompts([tiny.pixel_values + rank])
    found = get_adapter_state_dict(vpt)
    alone = tiny.prompted(**CONFIGS["deep"])
    set_adapter_state_dict(alone, found)
    with torch.no_grad():
        torch.testing.assert_close(vpt(tiny.pixel_values).logits, alone(tiny.pixel_values).logits, atol=1e-5, rtol=0)
    return {name: tensor.clone() for name, tensor in found.items() if name.startswith("prompts.")}


WAYS = {"ddp": with_ddp, "fsdp": with_fsdp}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    is_main = distributed.get_rank() == 0
    for way, run in WAYS.items():
        for kind, build in BUILDERS.items():
            for name, config in CONFIGS.items():
                tiny, place = build(), folder / f"{way}-{kind}-{name}"
                vpt = tiny.prompted(**config).train()
                found = run(vpt, tiny)
                with patch.object(DTensor, "full_tensor", autospec=True, side_effect=DTensor.full_tensor) as gather:
                    vpt.save_pretrained(place, is_main_process=is_main)  # all of them: a sharded adapter is gathered
                assert gather.call_count == (len(found) if way == "fsdp" else 0), "the adapter's tensors and no others"
                distributed.barrier()
                load_back(vpt, place)
                if name == "deep":
                    prompts = init_prompts(vpt, build)
                    save_file(prompts, place / f"prompts-{distributed.get_rank()}.safetensors")
                if is_main:
                    save_file(found, place / "gradients.safetensors")
    for kind, build in BUILDERS.items():
        tiny = build()
        train(tiny.prompted(), tiny, folder / f"trainer-{kind}", batch_size=2, ddp_backend="gloo")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo can abort the regular end of a process
