"""Train and eval modes of a model that are set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode. Afterwards, each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """:func:`eval_mode` without gradients, and not compiled, so that hooks work."""
    with eval_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
