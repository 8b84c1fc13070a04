"""The HTTP server of ``vpt-peft serve``: one process, one backbone, the adapters of a fixed table."""

from .app import create_app
from .catalog import AdapterSource, find_adapters
from .settings import ServerSettings, read_tokens

__all__ = ["AdapterSource", "ServerSettings", "create_app", "find_adapters", "read_tokens"]
