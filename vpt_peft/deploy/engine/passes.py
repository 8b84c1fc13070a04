"""Forward passes: which images share one, and what happens if one fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError, RouteError, VPTError, safe_repr
from ...images.positions import ARGUMENT, can_interpolate
from ...model import VPTModel
from .costs import PassCosts
from .errors import EngineError
from .loading import Entry


@dataclass(eq=False)
class Request:
    """A request that was accepted.

    Attributes:
        entry: its adapter.
        future: its answer.
        adapter, revision, top_k: as given to ``submit``.
        image: a PIL image, or pixel values; None: the adapter shall only be loaded.
        accepted_at, ready_at: times of ``time.monotonic()``; the latter when ``pixel_values`` were ready.
        pixel_values: ``(num_channels, height, width)``.
        is_finished: it has its answer or error, or was cancelled.
    """

    entry: Entry
    future: Future[Any]
    adapter: str
    revision: str | None
    top_k: int | None
    image: Any
    accepted_at: float
    ready_at: float = 0.0
    pixel_values: Tensor | None = None
    is_finished: bool = False


class PassRunner:
    """Runs requests through the model, in the one thread that may change it.

    Args:
        vpt: the model.
        structure: see :class:`~.loading.AdapterLoader`.
        costs: decide what is mixed.
        answer, fail, record: called with ``(request, logits)``, ``(request, error)`` and ``(number of images, number
            of adapters)``.
    """

    def __init__(
        self,
        vpt: VPTModel,
        structure: Lock,
        costs: PassCosts,
        answer: Callable[[Request, Tensor], None],
        fail: Callable[[Request, BaseException], None],
        record: Callable[[int, int], None],
    ) -> None:
        self.vpt, self.structure, self.costs = vpt, structure, costs
        self.answer, self.fail, self.record = answer, fail, record
        self.idle_adapter = vpt.active_adapter
        self.can_interpolate = can_interpolate(vpt.get_base_model())

    def run(self, requests: Sequence[Request]) -> None:
        """Answers requests, or lets each fail alone."""
        for passed in self.plan(requests):
            self._run_pass(passed)

    def plan(self, requests: Sequence[Request]) -> list[list[Request]]:
        """The requests of each forward pass: images of one size, and of adapters that may be mixed."""
        passes = []
        for same_size in _group(requests, self._image_size):
            alone: list[list[Request]] = []
            others: list[list[Request]] = []
            for same_adapter in _group(same_size, lambda request: request.entry):
                (alone if self._is_alone(same_adapter[0].entry) else others).append(same_adapter)
            passes += alone + self.costs.plan(others)
        return passes

    def remove(self, entry: Entry) -> None:
        """Takes an adapter out of the model."""
        if not entry.is_attached:
            return
        entry.is_attached = False
        if self.vpt.active_adapter == entry.name:
            self.vpt.set_adapter(self.idle_adapter)
        self.vpt.delete_adapter(entry.name)

    def _image_size(self, request: Request) -> tuple[Any, bool]:
        """Shape of an image, and whether the model must be told that it is not the one of its position embeddings."""
        assert request.pixel_values is not None and request.entry.adapter is not None
        shape = tuple(request.pixel_values.shape)
        expected = request.entry.adapter.image_size or self.vpt.backbone.image_size
        return shape, self.can_interpolate and shape[-2:] != tuple(expected)

    def _is_alone(self, entry: Entry) -> bool:
        """Whether an adapter needs forward passes of its own."""
        adapter = entry.adapter
        assert adapter is not None
        mixes_biases = self.vpt.backbone.architecture.batch_first or not adapter.bias.paths
        return entry.is_alone or bool(adapter.modules_to_save.paths) or adapter.is_in_image or not mixes_biases

    def _run_pass(self, requests: list[Request]) -> None:
        by_adapter = _group(requests, lambda request: request.entry)
        try:
            logits = self._forward(requests, by_adapter)
        except Exception as error:
            if len(requests) == 1:
                self.fail(requests[0], _of_one_image(error))
                return
            if len(by_adapter) > 1 and isinstance(error, AdapterError | RouteError):  # they cannot be mixed here
                for same_adapter in by_adapter:
                    same_adapter[0].entry.is_alone = True
            for part in by_adapter if len(by_adapter) > 1 else [[request] for request in requests]:
                self._run_pass(part)
            return
        for request, row in zip(requests, logits, strict=True):
            assert request.entry.adapter is not None
            self.answer(request, row[: request.entry.adapter.num_labels].clone())

    def _forward(self, requests: list[Request], by_adapter: list[list[Request]]) -> Tensor:
        """Logits ``(num_images, most labels)``, in float32 on the CPU."""
        for same_adapter in by_adapter:
            self._attach(same_adapter[0].entry)
        vpt, images = self.vpt, [request.pixel_values for request in requests]
        pixel_values = torch.stack([image.to(vpt.device, vpt.dtype) for image in images if image is not None])
        options: dict[str, Any] = {"return_dict": True}
        if self._image_size(requests[0])[1]:
            options[ARGUMENT] = True
        if len(by_adapter) == 1:  # keys and values of its prompts are kept between passes
            vpt.set_adapter(requests[0].entry.name)
        else:
            options["adapter_names"] = [request.entry.name for request in requests]
        logits: Tensor = vpt(pixel_values, **options).logits.float().cpu()
        self.record(len(requests), len(by_adapter))
        for request, row in zip(requests, logits, strict=True):
            assert request.entry.adapter is not None
            if not row[: request.entry.adapter.num_labels].isfinite().all():
                raise EngineError("The logits are not finite. Are the weights of the adapter damaged?")
        return logits

    def _attach(self, entry: Entry) -> None:
        """Makes an adapter part of the model."""
        if entry.is_attached:
            return
        adapter, injector = entry.adapter, self.vpt._injector
        assert adapter is not None and injector is not None
        adds_overrides = not injector.overridden.issuperset(adapter.overridden_paths)
        with self.structure if adds_overrides else nullcontext():
            self.vpt._insert(entry.name, adapter)
        entry.is_attached = True


def _group(requests: Sequence[Request], key: Callable[[Request], Any]) -> list[list[Request]]:
    """Requests with equal keys, each group in the order of the first request."""
    groups: dict[Any, list[Request]] = {}
    for request in requests:
        groups.setdefault(key(request), []).append(request)
    return list(groups.values())


def _of_one_image(error: Exception) -> Exception:
    """The error for the only image of a forward pass: those of other libraries say that it was the model's."""
    if isinstance(error, VPTError):
        return error
    wrapped = EngineError(f"The model cannot compute this image: {type(error).__name__}: {safe_repr(str(error))}.")
    wrapped.__cause__ = error
    return wrapped
