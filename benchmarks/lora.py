"""LoRA (Hu et al., ICLR 2022) by PEFT, to compare with: an optional extra of the benchmarks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from images import DataError
from training import Method


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank updates of the queries' and values' projections, as in the paper, scaled by ``alpha / rank``."""

    rank: int = 8
    alpha: int = 16

    def attach(self, model: Any) -> Any:
        """The backbone, frozen, inside a ``PeftModel`` that trains the updates and the head."""
        try:
            from peft import LoraConfig, get_peft_model  # optional
        except ImportError as error:
            raise DataError(
                "LoRA needs the package peft, which is not installed: pip install 'vpt-peft[benchmarks]', "
                "or leave lora out of --methods."
            ) from error
        projections = projections_of(model)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=projections, modules_to_save=["classifier"]
        )
        return get_peft_model(model, config)


def projections_of(model: nn.Module) -> list[str]:
    """The paths of the attentions' linear layers for queries and values, under the names that transformers gives them.

    Raises:
        DataError: the model has none.
    """
    names = (("q_proj", "v_proj"), ("query", "value"))  # the names changed with transformers' versions
    for wanted in names:
        found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        found = [name for name in found if name.rpartition(".")[2] in wanted]
        if found:
            return found
    raise DataError(f"LoRA needs attentions with linear layers named {names}, but {type(model).__name__} has none.")


LORA = LoRA("LoRA", None, 3e-3, 1e-2)
