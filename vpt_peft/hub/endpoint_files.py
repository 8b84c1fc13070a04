"""The files by which an Inference Endpoint of Hugging Face runs an adapter: ``handler.py`` and ``requirements.txt``."""

from __future__ import annotations

from pathlib import Path

from ..version import __version__

HANDLER_NAME, REQUIREMENTS_NAME = "handler.py", "requirements.txt"
HANDLER = '''\
"""Runs this adapter on Inference Endpoints of Hugging Face, which import EndpointHandler from this file."""

from vpt_peft.deploy import EndpointHandler

__all__ = ["EndpointHandler"]
'''


def write_endpoint_files(folder: Path) -> None:
    """Writes the files into the folder of an adapter that is going to be pushed."""
    (folder / HANDLER_NAME).write_text(HANDLER, encoding="utf-8")
    (folder / REQUIREMENTS_NAME).write_text(f"vpt-peft>={__version__}\npillow\n", encoding="utf-8")
