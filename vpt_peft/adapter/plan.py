"""The plan of an adapter: which layers have prompts, and how those are computed."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ADDED, IN_IMAGE, PromptConfig
from ..errors import ConfigError, RouteError, safe_repr


@dataclass(frozen=True)
class LayerPlan:
    """The prompts of one layer.

    Attributes:
        fresh: the layer has its own prompts; else its prompts are the outputs of the previous layer's.
        route: ``"key_value"``: only the keys and values of the prompts are computed; ``"tokens"``: the prompts are
            computed like all other tokens, since their outputs are used; ``"add"``: the prompts are added to the tokens
            that enter the layer; ``"prefix"``: keys and values are learned directly, see ``kind`` in
            :class:`~vpt_peft.PromptConfig`.
    """

    fresh: bool
    route: str


def plan_layers(config: PromptConfig, num_layers: int, pools_prompts: bool) -> tuple[LayerPlan | None, ...]:
    """The plan of each layer; None for layers without prompts.

    Args:
        pools_prompts: the classifier reads the outputs of the last layer's prompts.

    Raises:
        ConfigError: a layer does not exist, or the pooling reads prompts and the last layer has none.
        RouteError: ``route="key_value"``, but the outputs of prompts are used.
    """
    fresh = _fresh_layers(config, num_layers)
    direct = "prefix" if config.kind == "prefix" else "add" if config.location in ADDED else None
    if direct is not None:
        return tuple(LayerPlan(True, direct) if layer in fresh else None for layer in range(num_layers))
    present: list[bool] = []
    for layer in range(num_layers):
        carried = config.carry and layer > 0 and present[layer - 1]
        present.append(layer in fresh or carried)
    if pools_prompts and not present[-1]:
        raise ConfigError(
            f'pooling="{config.pooling}" reads prompts in the last layer ({num_layers - 1}), but none reach it with '
            f"layers_to_transform={sorted(fresh)} and carry={config.carry}. Add that layer, or set carry=True."
        )

    def needs_output(layer: int) -> bool:
        if layer == num_layers - 1:
            return pools_prompts
        return config.carry and layer + 1 not in fresh

    used = [layer for layer in range(num_layers) if present[layer] and needs_output(layer)]
    if config.route == "key_value" and used:
        reason = "the pooling reads them" if used == [num_layers - 1] else "they are inputs of the next layer"
        raise RouteError(
            f'route="key_value" requires that the outputs of prompts are not used, but in layers {used} {reason}. '
            'Use route="auto", which computes keys and values only in all other layers.'
        )
    return tuple(
        LayerPlan(layer in fresh, "tokens" if layer in used or config.route == "tokens" else "key_value")
        if present[layer]
        else None
        for layer in range(num_layers)
    )


def _fresh_layers(config: PromptConfig, num_layers: int) -> set[int]:
    if config.num_tokens == 0 or config.location in IN_IMAGE:
        return set()
    if config.layers_to_transform is None:
        return set(range(num_layers)) if config.deep else {0}
    missing = [layer for layer in config.layers_to_transform if layer >= num_layers]
    if missing:
        raise ConfigError(
            f"layers_to_transform must name layers from 0 to {num_layers - 1}, got {safe_repr(missing)}. "
            f"The head reads the outputs of {num_layers} layers of the backbone."
        )
    return set(config.layers_to_transform)
