"""LoRA (Hu et al., ICLR 2022), from PEFT, as a baseline. peft is an optional dependency."""

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
    """LoRA on the query and value projections, as in the paper. Updates are scaled by ``alpha / rank``."""

    rank: int = 8
    alpha: int = 16

    def attach(self, model: Any) -> Any:
        """A ``PeftModel`` that trains the low-rank updates and the head."""
        try:
            from peft import LoraConfig, get_peft_model  # optional dependency
        except ImportError as error:
            raise DataError(
                "LoRA requires the package peft, which is not installed: pip install 'vpt-peft[benchmarks]', "
                "or omit lora in --methods."
            ) from error
        projections = find_projections(model)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=projections, modules_to_save=["classifier"]
        )
        return get_peft_model(model, config)


def find_projections(model: nn.Module) -> list[str]:
    """Paths of the query and value projections in all attention modules.

    Raises:
        DataError: the model has none.
    """
    names = (("q_proj", "v_proj"), ("query", "value"))  # in different versions of transformers
    for wanted in names:
        found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        found = [name for name in found if name.rpartition(".")[2] in wanted]
        if found:
            return found
    raise DataError(f"LoRA requires linear layers named {names} in the attention, but {type(model).__name__} has none.")


LORA = LoRA("LoRA", None, 3e-3, 1e-2)
