"""An engine for thousands of adapters on one backbone: loaded on demand, computed in mixed batches."""

from .engine import Engine
from .errors import EngineClosedError, EngineError, QueueFullError
from .prediction import Prediction
from .stats import EngineStats

__all__ = [
    "Engine",
    "EngineClosedError",
    "EngineError",
    "EngineStats",
    "Prediction",
    "QueueFullError",
]
