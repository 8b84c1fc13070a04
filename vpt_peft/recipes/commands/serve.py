"""``vpt-peft serve``: adapters of one backbone over HTTP, in one process."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import warnings

import python_multipart  # noqa: F401  # forms cannot be read without it
import torch
import uvicorn

from ...deploy.engine import Engine
from ...deploy.engine.backbone import load_backbone
from ...deploy.server import ServerSettings, create_app, find_adapters, read_tokens
from ..errors import RecipeError
from ..runtime import choose_device, silence_transformers

SHUTDOWN_SECONDS = 60  # for requests in progress

log = logging.getLogger("vpt_peft.serve")


def run(args: argparse.Namespace) -> None:
    """Runs the command until it is stopped (Ctrl-C or SIGTERM); then it answers what it has accepted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    silence_transformers()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("vpt_peft").setLevel(logging.INFO)
    # What may be wrong is found before the backbone is loaded.
    adapters = find_adapters(args.adapters)
    settings = ServerSettings(
        tokens=read_tokens(args.token_file, os.environ.get(args.token_variable)),
        max_upload_bytes=args.max_upload_mb * 2**20,
        max_pixels=args.max_pixels,
        max_requests=args.max_requests,
        decode_workers=args.decode_workers,
    )
    if not settings.tokens and not _is_loopback(args.host):
        warnings.warn(f"Anyone who reaches {args.host} can send requests: give --token-file.", stacklevel=2)
    device = choose_device(args.device)
    precision = {"dtype": torch.float32} if device.type == "cpu" else {}  # half precision is slow on a CPU
    with (
        _bind(args.host, args.port) as listener,
        Engine(
            load_backbone(args.model, precision).to(device),
            max_adapters=args.max_adapters,
            max_batch=args.max_batch,
            max_wait_ms=args.max_wait_ms,
            max_queue=args.max_queue,
        ) as engine,
    ):
        config = uvicorn.Config(
            create_app(engine, adapters, settings),
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        log.info("%d tasks at http://%s:%d, described at /docs.", len(adapters), host, port)
        uvicorn.Server(config).run([listener])


def _bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which is not open to clients yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise RecipeError(f"--host and --port must be a free address here, got {host}:{port}: {error}") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
