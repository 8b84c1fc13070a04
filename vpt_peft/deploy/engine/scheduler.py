"""From a request to its answer: what waits for an adapter, for its image to be processed, and for a forward pass."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Condition, get_ident
from typing import Any

from torch import Tensor

from ...errors import ConfigError, safe_repr
from .errors import EngineClosedError, QueueFullError
from .images import ImageProcessors, process_image, read_image
from .loading import AdapterCache, AdapterLoader, Entry, Source
from .passes import Request
from .prediction import Prediction, rank_labels
from .stats import EngineStats, Recorder

NO_IMAGE = object()


class Scheduler:
    """Takes requests through their stations: threads of one pool load adapters, those of another process images, and
    one further thread asks for the next batch, computes it and hands in the answers.

    Args:
        num_channels: of images.
        max_wait: in seconds; the others as in :class:`~vpt_peft.deploy.Engine`.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        processors: ImageProcessors,
        num_channels: int,
        *,
        max_adapters: int,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        workers: int,
    ) -> None:
        self.loader, self.processors, self.num_channels = loader, processors, num_channels
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.threads: list[int] = []  # identifiers of those of the pools
        self.load_pool = ThreadPoolExecutor(workers, "vpt-engine-load", self._add_thread)
        self.image_pool = ThreadPoolExecutor(workers, "vpt-engine-image", self._add_thread)
        # Guards all that follows, and is notified when the computing thread may have something to do:
        self.changed = Condition()
        self.cache = AdapterCache(max_adapters)
        self.recorder = Recorder()
        self.ready: deque[Request] = deque()
        self.unanswered = 0
        self.closing = False

    def _add_thread(self) -> None:
        self.threads.append(get_ident())

    def check_open(self) -> None:
        """Raises QueueFullError or EngineClosedError if no request can be accepted."""
        if self.closing:
            raise EngineClosedError("The engine was closed and accepts no requests. Make a new one.")
        if self.unanswered >= self.max_queue:
            with self.changed:
                self.recorder.counts["refused"] += 1
            raise QueueFullError(
                f"{self.max_queue} requests are waiting, which is max_queue. Try again later, or make the engine with "
                "a larger max_queue."
            )

    def accept(
        self,
        adapter: str | os.PathLike[str],
        revision: str | None,
        top_k: int | None = None,
        image: Any = NO_IMAGE,
    ) -> tuple[Future[Any], Entry | None]:
        """Accepts a request.

        Args:
            image: without one, the adapter is only loaded.

        Returns:
            The future, and the adapter; None if the request has failed already.
        """
        self.check_open()  # before the work of decoding
        future: Future[Any] = Future()
        try:
            if top_k is not None and (type(top_k) is not int or top_k < 1):
                raise ConfigError(f"top_k must be a positive number or None, got {safe_repr(top_k)}.")
            source = Source.find(adapter, revision)
            signature = source.signature
            image = None if image is NO_IMAGE else read_image(image, self.num_channels)
        except Exception as error:
            with self.changed:
                self.check_open()
                self.recorder.counts.update(["accepted", "failed"])
            future.set_exception(error)
            return future, None
        with self.changed:
            self.check_open()
            entry = self.cache.use(source, signature)
            request = Request(entry, future, os.fspath(adapter), revision, top_k, image, time.monotonic())
            self.unanswered += 1
            is_loaded, is_new = entry.adapter is not None, entry.adapter is None and not entry.waiting
            self.recorder.counts.update(["accepted", "hits" if is_loaded else "misses"])
            if not is_loaded:
                entry.waiting.append(request)
        if is_loaded:
            self._process_soon(request)
        elif is_new:
            run_in(self.load_pool, partial(self._load, entry), partial(self._fail_waiting, entry))
        return future, entry

    def _load(self, entry: Entry) -> None:
        """Loads the adapter of an entry, and lets the requests for it go on."""
        adapter, processor_file, signature = self.loader.load(entry.source)
        with self.changed:
            entry.adapter, entry.processor_file, entry.signature = adapter, processor_file, signature
            waiting, entry.waiting = entry.waiting, []
        for request in waiting:
            self._process_soon(request)

    def _fail_waiting(self, entry: Entry, error: BaseException) -> None:
        """Lets the requests for an adapter that cannot be loaded fail. The next one tries again."""
        with self.changed:
            self.cache.remove(entry)
            waiting, entry.waiting = entry.waiting, []
        for request in waiting:
            self.fail(request, error)

    def _process_soon(self, request: Request) -> None:
        if request.image is None:
            self._finish(request, "answered", lambda: request.future.set_result(None))
        else:
            run_in(self.image_pool, partial(self._process, request), partial(self.fail, request))

    def _process(self, request: Request) -> None:
        """Makes the ``pixel_values`` of a request, and puts it into the queue."""
        entry, image = request.entry, request.image
        assert entry.adapter is not None
        if not isinstance(image, Tensor):
            if entry.image_processor is None:
                entry.image_processor = self.processors.load(entry.processor_file, entry.adapter)
            image = process_image(entry.image_processor, image, self.num_channels)
        request.image, request.pixel_values = None, image
        with self.changed:
            request.ready_at = time.monotonic()
            self.ready.append(request)
            self.changed.notify()

    def next_batch(self, remove: Callable[[Entry], None]) -> list[Request]:
        """Waits for requests to compute; there are none when the engine is closed and all are answered.

        Args:
            remove: called with entries that are needed no more.
        """
        with self.changed:
            while True:
                removed, self.cache.removed = self.cache.removed, []
                for entry in removed:
                    remove(entry)
                if self.ready:
                    left = self.ready[0].ready_at + self.max_wait - time.monotonic()
                    if self.closing or len(self.ready) >= self.max_batch or left <= 0:
                        return [self.ready.popleft() for _ in range(min(self.max_batch, len(self.ready)))]
                    self.changed.wait(left)
                elif self.closing and not self.unanswered:
                    return []
                else:
                    self.changed.wait()

    def drop_cancelled(self, request: Request) -> bool:
        """Finishes a request whose future was cancelled."""
        if not request.future.cancelled():
            return False
        self._finish(request, "cancelled", lambda: None)
        return True

    def answer(self, request: Request, logits: Tensor) -> None:
        """Answers a request with the logits of its image, ``(num_labels,)``."""
        adapter = request.entry.adapter
        assert adapter is not None
        labels = rank_labels(logits, adapter, request.top_k)
        problem_type = adapter.model_config.problem_type
        prediction = Prediction(request.adapter, request.revision, labels, logits, problem_type)
        self._finish(request, "answered", lambda: request.future.set_result(prediction))

    def fail(self, request: Request, error: BaseException) -> None:
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
        with self.changed:
            self.recorder.counts[outcome if is_wanted else "cancelled"] += 1
            if is_wanted and outcome == "answered" and request.pixel_values is not None:
                self.recorder.latencies.append(time.monotonic() - request.accepted_at)
            self.unanswered -= 1
            self.cache.release(request.entry)
            self.changed.notify()
        if is_wanted:
            give()

    def record_batch(self, num_images: int, num_adapters: int) -> None:
        """Counts a forward pass."""
        with self.changed:
            self.recorder.record_batch(num_images, num_adapters)

    def tasks(self) -> list[str]:
        """The adapters in memory, the most recently used first."""
        with self.changed:
            entries = [entry for entry in self.cache.entries.values() if entry.adapter is not None]
            return [str(entry.source) for entry in reversed(entries)]

    def stats(self) -> EngineStats:
        """The statistics."""
        with self.changed:
            return self.recorder.summarize(
                queue_length=self.unanswered,
                adapters=sum(entry.adapter is not None for entry in self.cache.entries.values()),
                evictions=self.cache.evictions,
                replacements=self.cache.replacements,
            )

    def close(self) -> None:
        """Accepts no further requests, and lets :meth:`next_batch` end when all are answered."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def stop(self) -> None:
        """Stops the pools."""
        self.load_pool.shutdown()
        self.image_pool.shutdown()


def run_in(pool: ThreadPoolExecutor, work: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
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
