"""Which adapters share a forward pass: the cheaper choice, by the measured cost of a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...config import PromptConfig
from ...errors import VPTError
from ...model import VPTModel
from .backbone import PREFIX

T = TypeVar("T")
IMAGES = 4
MAX_ROUNDS = 5
ENOUGH = 2.0  # seconds


@dataclass(frozen=True)
class PassCosts:
    """What forward passes cost beyond the time that each image takes in any of them.

    A pass for ``n`` images takes ``fixed + n · t`` seconds, a mixed one ``fixed + n · (t + mixing)``. Mixing saves the
    ``fixed`` time of all passes but one and costs ``mixing`` for each image. A thread of a CPU is as busy with one
    image as with many: there, mixing gains with few images of each of many adapters on a small backbone.

    Attributes:
        fixed: seconds.
        mixing: seconds.
    """

    fixed: float
    mixing: float

    def plan(self, adapters: list[list[T]]) -> list[list[T]]:
        """The images of each forward pass.

        Args:
            adapters: the images of each adapter.
        """
        mixed = [images for images in adapters if len(images) * self.mixing < self.fixed]
        apart = [images for images in adapters if len(images) * self.mixing >= self.fixed]
        together = [image for images in mixed for image in images]
        if (len(mixed) - 1) * self.fixed <= len(together) * self.mixing:
            return mixed + apart
        return [together, *apart]


ALWAYS_MIX, NEVER_MIX = PassCosts(1.0, 0.0), PassCosts(0.0, 1.0)


@torch.no_grad()
def measure_costs(vpt: VPTModel) -> PassCosts:
    """Measures the costs on black images, with new adapters of 10 prompts in each layer, in rounds of three passes.

    The fastest of each counts, in CPU time on a CPU, so that other work of the machine hardly matters. The first round
    does not count; afterwards, the model is warm.
    """
    try:
        return _measure(vpt)
    except VPTError:  # this backbone takes no such prompts, or cannot mix them
        return NEVER_MIX


def _measure(vpt: VPTModel) -> PassCosts:
    clock = time.thread_time if vpt.device.type == "cpu" else time.perf_counter
    images = torch.zeros(IMAGES, *vpt.backbone.input_shape, device=vpt.device, dtype=vpt.dtype)
    with _adapters(vpt) as names:
        calls: list[Callable[[], Any]] = [
            lambda: vpt(images[:1]),
            lambda: vpt(images),
            lambda: vpt(images, adapter_names=names),
        ]
        fastest = [float("inf")] * len(calls)
        for turn in range(1 + MAX_ROUNDS):
            for index, call in enumerate(calls):
                start = clock()
                call().logits.cpu()  # waits for a GPU
                if turn:
                    fastest[index] = min(fastest[index], clock() - start)
            if turn and turn * sum(fastest) > ENOUGH:
                break
    one, several, mixed = fastest
    per_image = (several - one) / (IMAGES - 1)
    return PassCosts(fixed=max(0.0, one - per_image), mixing=max(0.0, (mixed - several) / IMAGES))


@contextmanager
def _adapters(vpt: VPTModel) -> Iterator[list[str]]:
    """Names of new adapters, the first of which is active."""
    previous, names = vpt.active_adapter, [f"{PREFIX}cost-{number}" for number in range(IMAGES)]
    added = []
    try:
        for name in names:
            vpt.add_adapter(name, PromptConfig(), num_labels=2)
            added.append(name)
        vpt.set_adapter(names[0])
        yield names
    finally:
        vpt.set_adapter(previous)
        for name in added:
            vpt.delete_adapter(name)
