"""Files written by ``torch.save``, and a malicious object to put into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class MaliciousPickle:
    """An object that creates the file ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


def save(values: Any, path: Path) -> Path:
    """Writes a file by ``torch.save`` and returns its path."""
    torch.save(values, path)
    return path
