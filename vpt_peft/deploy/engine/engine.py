"""The engine: requests in, predictions out."""

from __future__ import annotations

import atexit
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Condition, Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from ...errors import ConfigError, safe_repr
from .backbone import ServedModel
from .costs import ALWAYS_MIX, NEVER_MIX, measure_costs
from .errors import EngineClosedError, QueueFullError
from .images import ImageProcessors, process_image, read_image
from .loading import AdapterCache, AdapterLoader, Entry, Source
from .passes import PassRunner, Request
from .prediction import Prediction, rank_labels
from .stats import EngineStats, Recorder

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


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
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait_ms / 1000, max_queue
        self._model = ServedModel(model, hub_options)
        try:
            vpt, structure = self._model.vpt, Lock()
            costs = ALWAYS_MIX if mixing is True else NEVER_MIX
            if mixing == "auto" and max_batch > 1:
                costs = measure_costs(vpt)
        except BaseException:
            self._model.restore()
            raise
        self._processors = ImageProcessors(vpt, image_processor, hub_options)
        self._loader = AdapterLoader(vpt, structure, hub_options)
        self._runner = PassRunner(vpt, structure, costs, self._answer, self._fail, self._record_batch)
        self._load_pool = ThreadPoolExecutor(load_workers, "vpt-engine-load")
        self._image_pool = ThreadPoolExecutor(load_workers, "vpt-engine-image")
        # Guarded by the condition, which is notified when the computing thread may have something to do:
        self._changed = Condition()
        self._cache = AdapterCache(max_adapters)
        self._recorder = Recorder()
        self._ready: deque[Request] = deque()
        self._unanswered = 0
        self._closing = False
        self._thread = Thread(target=self._compute, name="vpt-engine-compute", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # -- requests ---------------------------------------------------------------------------------------------------

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
        self._check_open()  # before the work of decoding
        future: Future[Prediction] = Future()
        try:
            if top_k is not None and (type(top_k) is not int or top_k < 1):
                raise ConfigError(f"top_k must be a positive number or None, got {safe_repr(top_k)}.")
            source = Source.find(adapter, revision)
            image = read_image(image, self._model.vpt.backbone.num_channels)
        except Exception as error:
            return self._accept_failed(future, error)
        self._accept(future, source, os.fspath(adapter), revision, top_k, image)
        return future

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
        future: Future[None] = Future()
        try:
            source = Source.find(adapter, revision)
        except Exception as error:
            return self._accept_failed(future, error)
        self._accept(future, source, os.fspath(adapter), revision, None, None)
        return future

    def labels(self, adapter: str | os.PathLike[str], revision: str | None = None) -> list[str]:
        """The labels of an adapter, in the order of its logits. It is loaded if it is not in memory.

        Raises:
            As :meth:`submit`, and the errors of loading.
        """
        source, future = Source.find(adapter, revision), Future[None]()
        entry = self._accept(future, source, os.fspath(adapter), revision, None, None)
        future.result()
        assert entry.adapter is not None
        return list(entry.adapter.labels()["id2label"].values())

    def tasks(self) -> list[str]:
        """The adapters in memory, the most recently used first: folders, and repositories as ``"me/birds@revision"``,
        or ``"me/birds"`` for requests without a revision."""
        with self._changed:
            entries = [entry for entry in self._cache.entries.values() if entry.adapter is not None]
            return [str(entry.source) for entry in reversed(entries)]

    def stats(self) -> EngineStats:
        """Numbers of requests, forward passes and adapters, and latencies."""
        with self._changed:
            cache = self._cache
            return self._recorder.summarize(
                queue_length=self._unanswered,
                adapters=sum(entry.adapter is not None for entry in cache.entries.values()),
                evictions=cache.evictions,
                replacements=cache.replacements,
            )

    def close(self) -> None:
        """Refuses further requests, answers those that were accepted, stops all threads, and gives the model back."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._load_pool.shutdown()
        self._image_pool.shutdown()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- from acceptance to the queue, in the threads of callers and of the pools --------------------------------------

    def _check_open(self) -> None:
        """Raises an error if no request can be accepted."""
        if self._closing:
            raise EngineClosedError("The engine was closed and accepts no requests. Make a new one.")
        if self._unanswered >= self.max_queue:
            with self._changed:
                self._recorder.counts["refused"] += 1
            raise QueueFullError(
                f"{self.max_queue} requests are waiting, which is max_queue. Try again later, or make the engine with "
                "a larger max_queue."
            )

    def _accept(
        self, future: Future[Any], source: Source, adapter: str, revision: str | None, top_k: int | None, image: Any
    ) -> Entry:
        signature = source.signature
        with self._changed:
            self._check_open()
            entry = self._cache.use(source, signature)
            request = Request(entry, future, adapter, revision, top_k, image, time.monotonic())
            self._unanswered += 1
            is_loaded, is_new = entry.adapter is not None, entry.adapter is None and not entry.waiting
            self._recorder.counts["accepted"] += 1
            self._recorder.counts["hits" if is_loaded else "misses"] += 1
            if not is_loaded:
                entry.waiting.append(request)
        if is_loaded:
            self._process_soon(request)
        elif is_new:
            self._in_pool(self._load_pool, partial(self._load, entry), partial(self._fail_waiting, entry))
        return entry

    def _accept_failed(self, future: Future[T], error: Exception) -> Future[T]:
        """Accepts a request that cannot even wait."""
        with self._changed:
            self._check_open()
            self._recorder.counts.update(["accepted", "failed"])
        future.set_exception(error)
        return future

    def _in_pool(
        self, pool: ThreadPoolExecutor, work: Callable[[], None], fail: Callable[[BaseException], None]
    ) -> None:
        """Runs a function in a thread of a pool, and another one with its error.

        While the interpreter is shutting down, pools take nothing, and it runs in this thread.
        """

        def run() -> None:
            try:
                work()
            except BaseException as error:  # a request that nobody answers would wait for ever
                fail(error)

        try:
            pool.submit(run)
        except RuntimeError:
            run()

    def _load(self, entry: Entry) -> None:
        """Loads the adapter of an entry, and lets the requests for it go on."""
        adapter, processor_file, signature = self._loader.load(entry.source)
        with self._changed:
            entry.adapter, entry.processor_file, entry.signature = adapter, processor_file, signature
            waiting, entry.waiting = entry.waiting, []
        for request in waiting:
            self._process_soon(request)

    def _fail_waiting(self, entry: Entry, error: BaseException) -> None:
        """Lets the requests for an adapter that cannot be loaded fail. The next one tries again."""
        with self._changed:
            self._cache.remove(entry)
            waiting, entry.waiting = entry.waiting, []
        for request in waiting:
            self._fail(request, error)

    def _process_soon(self, request: Request) -> None:
        if request.image is None:
            self._finish(request, "answered", lambda: request.future.set_result(None))
        else:
            self._in_pool(self._image_pool, partial(self._process, request), partial(self._fail, request))

    def _process(self, request: Request) -> None:
        """Makes the ``pixel_values`` of a request, and puts it into the queue."""
        entry, image = request.entry, request.image
        assert entry.adapter is not None
        if not isinstance(image, Tensor):
            if entry.image_processor is None:
                entry.image_processor = self._processors.load(entry.processor_file, entry.adapter)
            image = process_image(entry.image_processor, image, self._model.vpt.backbone.num_channels)
        request.image, request.pixel_values = None, image
        with self._changed:
            request.ready_at = time.monotonic()
            self._ready.append(request)
            self._changed.notify()

    # -- the computing thread -----------------------------------------------------------------------------------------

    def _compute(self) -> None:
        try:
            with torch.inference_mode(), self._model.vpt.serving():
                while batch := self._next_batch():
                    requests = [request for request in batch if not self._drop_cancelled(request)]
                    try:
                        self._runner.run(requests)
                    except BaseException as error:
                        for request in requests:
                            self._fail(request, error)
        finally:
            self._model.restore()

    def _next_batch(self) -> list[Request]:
        """The requests to compute next; none when the engine is closed and all are answered."""
        with self._changed:
            while True:
                removed, self._cache.removed = self._cache.removed, []
                for entry in removed:
                    self._runner.remove(entry)
                if self._ready:
                    left = self._ready[0].ready_at + self.max_wait - time.monotonic()
                    if self._closing or len(self._ready) >= self.max_batch or left <= 0:
                        return [self._ready.popleft() for _ in range(min(self.max_batch, len(self._ready)))]
                    self._changed.wait(left)
                elif self._closing and not self._unanswered:
                    return []
                else:
                    self._changed.wait()

    def _drop_cancelled(self, request: Request) -> bool:
        """Finishes a request whose future was cancelled."""
        if not request.future.cancelled():
            return False
        self._finish(request, "cancelled", lambda: None)
        return True

    def _answer(self, request: Request, logits: Tensor) -> None:
        adapter = request.entry.adapter
        assert adapter is not None
        labels = rank_labels(logits, adapter, request.top_k)
        problem_type = adapter.model_config.problem_type
        prediction = Prediction(request.adapter, request.revision, labels, logits, problem_type)
        self._finish(request, "answered", lambda: request.future.set_result(prediction))

    def _fail(self, request: Request, error: BaseException) -> None:
        """Lets a request fail, unless it was cancelled or has an answer."""
        self._finish(request, "failed", lambda: request.future.set_exception(error))

    def _finish(self, request: Request, outcome: str, give: Callable[[], None]) -> None:
        """Ends a request: counts it, ends the use of its adapter, and gives it its answer or error.

        At any time, one thread has the request, so nobody else ends it meanwhile.
        """
        if request.is_finished:
            return
        request.is_finished = True
        is_wanted = request.future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        with self._changed:
            self._recorder.counts[outcome if is_wanted else "cancelled"] += 1
            if is_wanted and outcome == "answered" and request.pixel_values is not None:
                self._recorder.latencies.append(time.monotonic() - request.accepted_at)
            self._unanswered -= 1
            self._cache.release(request.entry)
            self._changed.notify()
        if is_wanted:
            give()

    def _record_batch(self, num_images: int, num_adapters: int) -> None:
        with self._changed:
            self._recorder.record_batch(num_images, num_adapters)


def _check_numbers(**numbers: object) -> None:
    """Raises ConfigError for what is no positive integer."""
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ConfigError(f"{name} must be a positive integer, got {safe_repr(number)}.")
