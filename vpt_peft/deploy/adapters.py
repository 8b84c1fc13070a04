"""Names for several saved adapters of one backbone."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from .. import hub


def name_adapters(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Names for adapters: the last part of each folder or repository, or all of it if these are not different."""
    paths = [os.path.abspath(source) if hub.is_folder(source) else os.fspath(source) for source in sources]
    short = [_as_name(os.path.basename(path)) for path in paths]
    return short if len(set(short)) == len(short) else [_as_name(path) for path in paths]


def _as_name(path: str) -> str:
    return re.sub(r"[./\\:]+", "-", path).strip("-")
