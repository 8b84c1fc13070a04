"""Engines as replicas of a Ray Serve application, on one machine or on many.

Each replica has an :class:`~vpt_peft.deploy.Engine`, which loads adapters on demand and mixes them in batches. By model
multiplexing, Serve prefers a replica that has had a request's adapter, and takes another one when that is busy: any
replica can answer any request. ``@serve.batch`` has no part in this: it would gather requests in front of the engine,
which gathers them anyway, and splits its batches by model, which is what mixed batches avoid.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from threading import Thread
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError

from .engine import Engine, EngineStats, Prediction, QueueFullError
from .engine.backbone import load_backbone

HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
BATCHES_AHEAD = 2  # that a replica accepts: one is computed, and the next one gathered
STATS_SECONDS = 5.0


def deployment(
    model: Any,
    *,
    num_replicas: int = 1,
    max_adapters: int = 1000,
    max_batch: int = 32,
    batch_wait_timeout_s: float = 0.005,
    max_queue: int = 1024,
    ray_actor_options: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> Any:
    """The application of engines alone, for ``serve.run``, whose handle an :class:`EngineHandle` takes.

    Args:
        model: folder or Hub repository of a backbone, which each replica loads, or a model, which is copied to it.
            Folders, also those of adapters, must be on a file system that all machines share.
        num_replicas: number of replicas.
        max_adapters, max_batch: of each replica, as of an engine.
        batch_wait_timeout_s: how long a request may wait for others to share a forward pass with, in seconds.
        max_queue: number of requests that wait for a replica, beyond which they are refused.
        ray_actor_options: of a replica, such as ``{"num_gpus": 1}``, or ``{"num_cpus": 4}`` for four threads.
        engine_options: further arguments of :class:`~vpt_peft.deploy.Engine`.

    Returns:
        A ``ray.serve.Application``.
    """
    options = {"max_adapters": max_adapters, "max_batch": max_batch, "max_wait_ms": 1000 * batch_wait_timeout_s}
    replica: Any = serve.deployment(
        _make_replica(max_adapters),
        name="Engine",
        num_replicas=num_replicas,
        max_ongoing_requests=BATCHES_AHEAD * max_batch,
        max_queued_requests=max_queue,
        ray_actor_options=dict(ray_actor_options or {}),
    )
    return replica.bind(os.fspath(model) if isinstance(model, os.PathLike) else model, {**options, **engine_options})


def build(model: Any, adapters: Iterable[str], *, settings: Any = None, **options: Any) -> Any:
    """The application of engines with the HTTP server of ``vpt-peft serve`` in front, for ``serve.run``.

    Args:
        model: see :func:`deployment`.
        adapters: the table of adapters that can be asked for, see :func:`~vpt_peft.deploy.server.find_adapters`.
        settings: limits and tokens, a :class:`~vpt_peft.deploy.server.ServerSettings`.
        options: of :func:`deployment`.

    Returns:
        A ``ray.serve.Application``.

    Raises:
        AdapterError: an adapter of the table is neither a folder nor a repository.
        ImportError: the packages of the extra ``serve`` are missing.
    """
    from .server import ServerSettings, find_adapters  # here, since engines alone do not need its packages

    settings = settings or ServerSettings()
    server: Any = serve.deployment(Server, name="HTTP", max_ongoing_requests=settings.max_requests)
    return server.bind(deployment(model, **options), find_adapters(adapters), settings)


class EngineHandle:
    """Asks the replicas of :func:`deployment`, as one asks an :class:`~vpt_peft.deploy.Engine`.

    Args:
        handle: of the deployment, as ``serve.run(deployment(...))`` returns it.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="vpt-engine-handle", daemon=True).start()

    def submit(
        self, image: Any, adapter: str | os.PathLike[str], *, revision: str | None = None, top_k: int | None = None
    ) -> Future[Prediction]:
        """A request, whose answer or error the future will have; see :meth:`~vpt_peft.deploy.Engine.submit`.

        If too many requests wait, the future's error is :class:`~vpt_peft.deploy.engine.QueueFullError`.
        """
        request = self._ask(image, os.fspath(adapter), revision, top_k)
        return asyncio.run_coroutine_threadsafe(request, self._loop)

    def predict(
        self, image: Any, adapter: str | os.PathLike[str], *, revision: str | None = None, top_k: int | None = None
    ) -> Prediction:
        """The answer to a request; see :meth:`submit`, whose errors it raises."""
        return self.submit(image, adapter, revision=revision, top_k=top_k).result()

    def stats(self) -> EngineStats:
        """The sums over all replicas; of latencies, the largest of the replicas' percentiles."""
        return add_stats(self._handle.broadcast("stats").results(timeout_s=STATS_SECONDS))

    async def _ask(self, image: Any, adapter: str, revision: str | None, top_k: int | None) -> Prediction:
        preferred = self._handle.options(multiplexed_model_id=_key(adapter, revision))
        try:
            return await preferred.predict.remote(image, adapter, revision, top_k)
        except RayTaskError as error:
            raise error.cause from None  # without the traceback of the replica, with its paths
        except BackPressureError as error:
            raise QueueFullError("Too many requests wait for a replica, more than max_queue. Try again.") from error


def add_stats(stats: Iterable[EngineStats]) -> EngineStats:
    """The statistics of several engines as one; of latencies, the largest of the percentiles."""
    dictionaries = [asdict(one) for one in stats]
    sums: dict[str, Any] = {"batch_sizes": {}}
    for name in EngineStats.__dataclass_fields__:
        values = [one[name] for one in dictionaries]
        if name == "batch_sizes":
            sizes = sum(map(Counter, values), Counter[int]())
            sums[name] = dict(sorted(sizes.items()))
        elif name.startswith("latency_"):
            sums[name] = max((value for value in values if value is not None), default=None)
        else:
            sums[name] = sum(values)
    return EngineStats(**sums)


def _key(adapter: str, revision: str | None) -> str:
    """The name of an adapter in Serve's model multiplexing."""
    return adapter if revision is None else f"{adapter}@{revision}"


def _make_replica(max_adapters: int) -> type[Any]:
    """The class of a replica. Its number of adapters is part of a decorator."""

    class Replica:
        engine: Engine | None = None

        def __init__(self, model: Any, options: dict[str, Any]) -> None:
            if isinstance(model, str):
                hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
                model = load_backbone(model, hub_options).to("cuda" if ray.get_gpu_ids() else "cpu")
            self.engine = Engine(model, **options)

        @serve.multiplexed(max_num_models_per_replica=max_adapters)  # type: ignore[untyped-decorator]
        async def tell_serve(self, key: str) -> str:
            """Lets Serve know that this replica has an adapter. The engine loads it, with others at a time."""
            return key

        async def predict(self, image: Any, adapter: str, revision: str | None, top_k: int | None) -> Prediction:
            assert self.engine is not None
            await self.tell_serve(_key(adapter, revision))
            future = await asyncio.to_thread(self.engine.submit, image, adapter, revision=revision, top_k=top_k)
            return await asyncio.wrap_future(future)

        def stats(self) -> EngineStats:
            assert self.engine is not None
            return self.engine.stats()

        def __del__(self) -> None:
            if self.engine is not None:
                self.engine.close()

    return Replica


@serve.ingress()
class Server:
    """The HTTP server in front of the engines; see :func:`build`."""

    def __init__(self, engines: Any, adapters: Mapping[str, Any], settings: Any) -> None:
        self.engine, self.adapters, self.settings = EngineHandle(engines), adapters, settings

    def __serve_build_asgi_app__(self) -> Any:
        from .server import create_app

        engine: Any = self.engine  # does what the app asks of an engine
        return create_app(engine, self.adapters, self.settings)
