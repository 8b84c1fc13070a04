"""The fine-tuning methods, with their default settings. Importing this module loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import PromptConfig
from ..errors import RecipeError

DEFAULT_METHOD = "vpt-prefix-bias"


@dataclass(frozen=True)
class Method:
    """A fine-tuning method with its default learning rates.

    Attributes:
        config: the adapter that is trained; None: full fine-tuning.
        head_learning_rate, bias_learning_rate: of the head and of biases; None: ``learning_rate``.
        steps: optimizer steps below which the method is no better than the linear head; measured on 350 images, see
            "Short runs" in ``benchmarks/results/README.md``.
    """

    title: str
    config: PromptConfig | None
    learning_rate: float
    head_learning_rate: float | None = None
    bias_learning_rate: float | None = None
    steps: int = 60

    def with_rates(
        self, learning_rate: float | None, head_learning_rate: float | None, bias_learning_rate: float | None = None
    ) -> Method:
        """The method with other learning rates; None: unchanged. ``learning_rate`` alone applies to all parameters."""
        rates = self.learning_rate, self.head_learning_rate, self.bias_learning_rate
        if learning_rate is not None:
            rates = learning_rate, None, None
        rate, head, bias = rates
        head = head if head_learning_rate is None else head_learning_rate
        bias = bias if bias_learning_rate is None else bias_learning_rate
        return dataclasses.replace(self, learning_rate=rate, head_learning_rate=head, bias_learning_rate=bias)

    def with_tokens(self, num_tokens: int) -> Method:
        """The method with another prompt length.

        Raises:
            RecipeError: it has no prompts.
        """
        if self.config is None or self.config.num_tokens == 0:
            raise RecipeError(f"--num-tokens requires a method with prompts, got {self.title}.")
        return dataclasses.replace(self, config=self.config.replace(num_tokens=num_tokens))

    def in_last_layers(self, number: int, model: Any) -> Method:
        """The method with prompts in the last layers of a model only.

        Raises:
            RecipeError: it has no prompts, or the model has fewer layers.
        """
        from ...backbones import find_backbone

        if self.config is None or self.config.num_tokens == 0:
            raise RecipeError(f"--last-layers requires a method with prompts, got {self.title}.")
        depth = len(find_backbone(model).layers)
        if number > depth:
            raise RecipeError(
                f"--last-layers must be at most {depth}, the number of layers of the model, got {number}."
            )
        layers = range(depth - number, depth)
        return dataclasses.replace(self, config=self.config.replace(layers_to_transform=tuple(layers)))

    @property
    def arguments(self) -> dict[str, float | None]:
        """Learning rates as arguments of ``vpt_peft.adamw`` and ``parameter_groups``."""
        names = ("learning_rate", "head_learning_rate", "bias_learning_rate")
        return {name: getattr(self, name) for name in names}

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates by name, for a model card."""
        head = self.learning_rate if self.head_learning_rate is None else self.head_learning_rate
        rates = {"learning rate": self.learning_rate, "head learning rate": head}
        return rates if self.bias_learning_rate is None else {**rates, "bias learning rate": self.bias_learning_rate}

    def attach(self, model: Any, task_type: str = "IMAGE_CLASSIFICATION", **labels: Any) -> Any:
        """The model to train: the backbone with an adapter or, for full fine-tuning, the backbone itself.

        Args:
            task_type: task of the linear head that a backbone without a head gets.
            labels: ``id2label`` and ``label2id`` for that head; else none.
        """
        if self.config is None:
            if labels:
                raise RecipeError(f"{self.title} requires a model with a head, got {type(model).__name__}.")
            return model
        from ...model import get_vpt_model

        config = self.config.replace(task_type=task_type) if labels else self.config
        return get_vpt_model(model, config, **labels)

    def parameter_groups(self, model: Any, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer, with the method's learning rates. Biases and norms have no weight decay."""
        from ...training import parameter_groups

        return parameter_groups(model, **self.arguments, weight_decay=weight_decay)


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA (Hu et al., ICLR 2022) by PEFT, an optional dependency, on the query and value projections, as in the paper.
    Updates are scaled by ``alpha / rank``."""

    rank: int = 8
    alpha: int = 16

    def attach(self, model: Any, task_type: str = "IMAGE_CLASSIFICATION", **labels: Any) -> Any:
        """A ``PeftModel`` that trains the low-rank updates and the head."""
        try:
            from peft import LoraConfig, get_peft_model  # optional dependency
        except ImportError as error:
            raise RecipeError("LoRA requires the package peft, which is not installed: pip install peft") from error
        from ...backbones import find_backbone

        if labels:
            raise RecipeError(f"LoRA requires a model with a head, got {type(model).__name__}.")
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=find_projections(model),
            modules_to_save=list(find_backbone(model).head.paths),
        )  # fmt: skip
        return get_peft_model(model, config)

    def parameter_groups(self, model: Any, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of the low-rank updates and of the head."""
        base, paths = model.get_base_model(), model.peft_config["default"].modules_to_save
        head = {parameter for path in paths for parameter in base.get_submodule(path).parameters()}
        head_rate = self.learning_rate if self.head_learning_rate is None else self.head_learning_rate
        groups: dict[tuple[float, float], list[Any]] = {}
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            rate = head_rate if parameter in head else self.learning_rate
            groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
        return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def find_projections(model: Any) -> list[str]:
    """Paths of the query and value projections in all attention modules.

    Raises:
        RecipeError: the model has none.
    """
    from torch import nn

    names: Sequence[tuple[str, str]] = (("q_proj", "v_proj"), ("query", "value"))  # of different families and versions
    for wanted in names:
        found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        found = [name for name in found if name.rpartition(".")[2] in wanted]
        if found:
            return found
    raise RecipeError(
        f"LoRA requires linear layers named {names} in the attention, but {type(model).__name__} has none."
    )


METHODS = {
    "vpt-prefix-bias": Method(
        "VPT-Prefix and biases", PromptConfig(num_tokens=10, kind="prefix", bias="all"), 3e-2, 1e-2, 3e-3
    ),
    "vpt-prefix": Method("VPT-Prefix", PromptConfig(num_tokens=10, kind="prefix"), 3e-2, 1e-2),
    "vpt-deep": Method("VPT-Deep", PromptConfig(num_tokens=10), 3e-3, 1e-2, steps=300),
    "vpt-shallow": Method("VPT-Shallow", PromptConfig(num_tokens=10, deep=False), 1e-2, 1e-2, steps=300),
    "linear": Method("Linear head", PromptConfig(num_tokens=0), 1e-2, steps=20),
    "bitfit": Method("BitFit", PromptConfig(num_tokens=0, bias="all"), 3e-3, 1e-2),
    "lora": LoRA("LoRA", None, 3e-3, 1e-2),
    "full": Method("Full fine-tuning", None, 3e-4, 1e-3),
}

# The defaults are for pretrained models of common widths; heads of narrow backbones need larger learning rates.
SMALL_METHODS = {
    **METHODS,
    "linear": dataclasses.replace(METHODS["linear"], learning_rate=1e-1),
    **{
        name: dataclasses.replace(METHODS[name], head_learning_rate=3e-2)
        for name in ("vpt-shallow", "vpt-deep", "vpt-prefix", "vpt-prefix-bias")
    },
}
SEGMENTATION_HEAD_RATE = 3e-3
SEGMENTATION_METHODS = {
    name: dataclasses.replace(
        method,
        learning_rate=SEGMENTATION_HEAD_RATE if name == "linear" else method.learning_rate,
        head_learning_rate=method.learning_rate if name == "full" else SEGMENTATION_HEAD_RATE,
    )
    for name, method in METHODS.items()
}
