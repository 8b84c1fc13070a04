"""The engine: requests in, predictions out."""

from __future__ import annotations

import atexit
import os
from concurrent.futures import Future
from threading import Lock, Thread, get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...errors import ConfigError, safe_repr
from .backbone import ServedModel
from .costs import ALWAYS_MIX, NEVER_MIX, measure_costs
from .images import ImageProcessors
from .loading import AdapterLoader
from .passes import PassRunner
from .prediction import Prediction
from .scheduler import Scheduler
from .stats import EngineStats

if TYPE_CHECKING:
    from typing_extensions import Self


class Engine:
    """Answers requests for any number of adapters on one frozen backbone.

    An adapter is loaded when it is first asked for, and the least recently used ones go. Requests for different
    adapters that wait at the same time share forward passes. One thread computes; adapters are loaded and images
    processed in others. All methods may be called from any thread.

    Args:
        model: a model for image classification or without a head, or a :class:`~vpt_peft.VPTModel`, of which the
            backbone is used; or the folder or the Hub repository of a backbone. Until :meth:`close` it belongs to the
            engine; afterwards it is as it was before.
        max_adapters: number of adapters in memory, beyond which those that no waiting request needs go.
        max_batch: largest number of images in a forward pass.
        max_wait_ms: how long a request may wait for others to share a forward pass with, in milliseconds.
        max_queue: number of accepted requests that are not answered yet, beyond which requests are refused.
        image_processor: an image processor, or its folder or repository, for adapters that were saved without one.
            None: the backbone's.
        load_workers: number of threads that load adapters, and of those that process images.
        mixing: whether images of different adapters share a forward pass, where the adapters permit it. "auto": where
            that is faster, by a measurement of some forward passes at the start.
        token, cache_dir, local_files_only: as in ``huggingface_hub``.

    Each image is processed by the image processor that was saved with its adapter. A folder that has changed since it
    was loaded is loaded again: requests that were accepted after the change are answered by the new adapter, earlier
    ones by either. A repository is not looked up again while its adapter is in memory.

    Raises:
        UnsupportedModelError, AdapterError, ConfigError: the model has another task, or is not supported.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_adapters: int = 1000,
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        max_queue: int = 1024,
        image_processor: Any = None,
        load_workers: int = 2,
        mixing: Literal["auto"] | bool = "auto",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        _check_numbers(max_adapters=max_adapters, max_batch=max_batch, max_queue=max_queue, load_workers=load_workers)
        if not isinstance(max_wait_ms, int | float) or not 0 <= max_wait_ms < float("inf"):
            raise ConfigError(f"max_wait_ms must be a number of milliseconds from 0, got {safe_repr(max_wait_ms)}.")
        if mixing not in ("auto", True, False):
            raise ConfigError(f'mixing must be "auto", True or False, got {safe_repr(mixing)}.')
        hub_options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        self._model = ServedModel(model, hub_options)
        try:
            vpt, structure = self._model.vpt, Lock()
            costs = ALWAYS_MIX if mixing is True else NEVER_MIX
            if mixing == "auto" and max_batch > 1:
                costs = measure_costs(vpt)
        except BaseException:
            self._model.restore()
            raise
        processors = ImageProcessors(vpt, image_processor, hub_options)
        self._scheduler = Scheduler(
            AdapterLoader(vpt, structure, hub_options),
            processors,
            vpt.backbone.num_channels,
            max_adapters=max_adapters,
            max_batch=max_batch,
            max_wait=max_wait_ms / 1000,
            max_queue=max_queue,
            workers=load_workers,
        )
        scheduler = self._scheduler
        self._runner = PassRunner(vpt, structure, costs, scheduler.answer, scheduler.fail, scheduler.record_batch)
        self._thread = Thread(target=self._compute, name="vpt-engine-compute", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(
        self,
        image: Any,
        adapter: str | os.PathLike[str],
        *,
        revision: str | None = None,
        top_k: int | None = None,
    ) -> Future[Prediction]:
        """Accepts a request, whose answer the future will have.

        The image is decoded at once, in the calling thread; its file may be closed afterwards. Functions that are
        called when the future is done run in a thread of the engine, and must not wait for it.

        Args:
            image: a PIL image; or a tensor, ``pixel_values`` of one image, ``(num_channels, height, width)``.
            adapter: folder or Hub repository of an adapter for image classification.
            revision: branch, tag or commit of the repository.
            top_k: number of labels in the answer; None: all.

        Raises:
            QueueFullError: ``max_queue`` requests are waiting. EngineClosedError: the engine was closed.

        Every other error is the future's: :class:`ImageError` of the image; :class:`~vpt_peft.CheckpointError`,
        :class:`~vpt_peft.AdapterError` or an error of the Hub client of the adapter; :class:`EngineError` of the model.
        """
        return self._scheduler.accept(adapter, revision, top_k, image)[0]

    def predict(
        self,
        image: Any,
        adapter: str | os.PathLike[str],
        *,
        revision: str | None = None,
        top_k: int | None = None,
    ) -> Prediction:
        """The answer to a request; see :meth:`submit`, whose errors it raises too."""
        return self.submit(image, adapter, revision=revision, top_k=top_k).result()

    def preload(self, adapter: str | os.PathLike[str], revision: str | None = None) -> Future[None]:
        """Loads an adapter if it is not in memory. The future has its errors; see :meth:`submit`."""
        return self._scheduler.accept(adapter, revision)[0]

    def labels(self, adapter: str | os.PathLike[str], revision: str | None = None) -> list[str]:
        """The labels of an adapter, in the order of its logits. It is loaded if it is not in memory.

        Raises:
            As :meth:`submit`, and the errors of loading.
        """
        future, entry = self._scheduler.accept(adapter, revision)
        future.result()
        assert entry is not None and entry.adapter is not None  # or else the future has an error
        return list(entry.adapter.labels()["id2label"].values())

    def tasks(self) -> list[str]:
        """The adapters in memory, the most recently used first: folders, and repositories as ``"me/birds@revision"``,
        or ``"me/birds"`` for requests without a revision."""
        return self._scheduler.tasks()

    def stats(self) -> EngineStats:
        """Numbers of requests, forward passes and adapters, and latencies."""
        return self._scheduler.stats()

    def close(self) -> None:
        """Refuses further requests, answers those that were accepted, stops all threads, and gives the model back.

        Called in a thread of the engine, such as by a function of a future that is done, it does not wait for that.
        """
        self._scheduler.close()
        atexit.unregister(self.close)
        if get_ident() not in (self._thread.ident, *self._scheduler.threads):
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _compute(self) -> None:
        """The computing thread."""
        scheduler, runner = self._scheduler, self._runner
        try:
            # Not inference_mode: transformers keeps BEiT's indices for the process, whose other models may train.
            with torch.no_grad(), self._model.vpt.serving():
                while batch := scheduler.next_batch(runner.remove):
                    requests = [request for request in batch if not scheduler.drop_cancelled(request)]
                    try:
                        runner.run(requests)
                    except BaseException as error:
                        for request in requests:
                            scheduler.fail(request, error)
        finally:
            self._model.restore()
            scheduler.stop()


def _check_numbers(**numbers: object) -> None:
    """Raises ConfigError for what is no positive integer."""
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ConfigError(f"{name} must be a positive integer, got {safe_repr(number)}.")
